//! Where the log goes: to the journal with its fields under systemd, else to stderr as lines.

use std::env;
use std::fmt;
use std::io::{self, IsTerminal};
use std::sync::OnceLock;
use std::time::Instant;

use anyhow::Context;
use parking_lot::Mutex;
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, reload};

use crate::ConfigError;
use crate::limits::{Bucket, Limit};

/// Keeps lines that strangers can cause from filling the log.
#[derive(Debug)]
pub struct Throttle(Mutex<Bucket>);

impl Throttle {
    /// Lets `lines` a minute through, and as many at once.
    pub fn per_minute(lines: u32) -> Self {
        let limit = Limit::new(f64::from(lines) / 60.0, lines);
        Self(Mutex::new(Bucket::new(limit)))
    }

    /// Whether one more line may be written.
    pub fn allows(&self) -> bool {
        self.0.lock().try_take(Instant::now()).is_ok()
    }
}

/// Sets up logging for the whole process; once, at its start.
///
/// `filter` is a level or directives as in `RUST_LOG` (`info,banter::master=debug`). `role` says who
/// speaks where several processes share a terminal or journal: `master`, `worker 1`.
///
/// The journal gets every field of an event as `BANTER_…`, so that
/// `journalctl BANTER_USER=ann` finds what has `user = "ann"`; and everything that the process of a
/// worker says has its number as `BANTER_WORKER`.
///
/// # Errors
///
/// [`ConfigError`] if `filter` cannot be parsed; any other if logging is set up already.
pub fn init(filter: &str, role: &str, worker: Option<u32>) -> anyhow::Result<()> {
    let (filter, handle) = reload::Layer::new(parse_filter(filter)?);
    let registry = tracing_subscriber::registry().with(filter);
    let journal = if stderr_is_journal() {
        tracing_journald::layer().ok()
    } else {
        None
    };
    let mut fields = vec![("BANTER_ROLE", role.to_owned())];
    fields.extend(worker.map(|number| ("BANTER_WORKER", number.to_string())));
    let set_up = match journal {
        Some(journal) => registry
            .with(
                journal
                    .with_syslog_identifier("banter".to_owned())
                    .with_field_prefix(Some("BANTER".to_owned()))
                    .with_priority_mappings(PriorityMappings {
                        // The journal's names for the same: "notice" would be shown in bold.
                        info: Priority::Informational,
                        debug: Priority::Debug,
                        ..PriorityMappings::new()
                    })
                    .with_custom_fields(fields),
            )
            .try_init(),
        None => registry
            .with(
                tracing_subscriber::fmt::layer()
                    .compact()
                    .with_target(false)
                    .with_ansi(stderr_wants_colour())
                    .with_timer(Stamp {
                        role: role.to_owned(),
                    })
                    .with_writer(io::stderr),
            )
            .try_init(),
    };
    set_up.context("cannot set up logging")?;
    // Nobody else was the first, or setting up had failed.
    let _ = FILTER.set(handle);
    Ok(())
}

/// The filter in use.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Has another filter count from now on. Does nothing without [`init`].
///
/// # Errors
///
/// [`ConfigError`] if it cannot be parsed.
pub fn set_filter(filter: &str) -> Result<(), ConfigError> {
    let filter = parse_filter(filter)?;
    let Some(handle) = FILTER.get() else {
        return Ok(());
    };
    // It fails only where logging has been torn down.
    handle.reload(filter).map_err(ConfigError::new)
}

/// Whether a filter can be parsed.
///
/// # Errors
///
/// [`ConfigError`] if not.
pub fn check_filter(filter: &str) -> Result<(), ConfigError> {
    parse_filter(filter).map(drop)
}

/// Logs that somebody came up against a limit: `limit_hit!("BANTER_…", fields…)`; six times a minute at most
/// in each place.
#[macro_export]
macro_rules! limit_hit {
    ($setting:literal, $($field:tt)*) => {{
        static THROTTLE: std::sync::LazyLock<$crate::telemetry::Throttle> =
            std::sync::LazyLock::new(|| $crate::telemetry::Throttle::per_minute(6));
        if THROTTLE.allows() {
            tracing::warn!(
                event = "limit_hit",
                limit = $setting,
                $($field)*,
                "a limit refuses something"
            );
        }
    }};
}

/// What begins a line: the time, and who speaks.
struct Stamp {
    role: String,
}

impl FormatTime for Stamp {
    fn format_time(&self, w: &mut Writer<'_>) -> fmt::Result {
        SystemTime.format_time(w)?;
        write!(w, " {}", self.role)
    }
}

fn parse_filter(filter: &str) -> Result<EnvFilter, ConfigError> {
    // `RUST_LOG=` would mean errors only, which nobody means who leaves it empty.
    let filter = if filter.trim().is_empty() {
        "info"
    } else {
        filter
    };
    let parsed = EnvFilter::builder().parse(filter).map_err(|error| {
        ConfigError::new(format!(
            "--log (RUST_LOG): {filter:?} is no log filter ({error}); expected error, warn, info, \
             debug or trace, or directives such as info,banter::master=debug"
        ))
    })?;
    // What it traces are whole frames, with tokens and what people say to each other in them. A
    // directive for a module of it would outrank ours.
    if parsed.to_string().contains("tungstenite") {
        return Err(ConfigError::new(format!(
            "--log (RUST_LOG): {filter:?} names tungstenite, whose log shows tokens and messages; \
             leave that out"
        )));
    }
    Ok(match "tungstenite=info".parse() {
        Ok(directive) => parsed.add_directive(directive),
        Err(_) => parsed,
    })
}

fn stderr_wants_colour() -> bool {
    // https://no-color.org
    io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Whether systemd connected stderr to the journal: `$JOURNAL_STREAM` names the device and inode of
/// that connection, and may be inherited by a process whose stderr goes elsewhere.
fn stderr_is_journal() -> bool {
    let Ok(stream) = env::var("JOURNAL_STREAM") else {
        return false;
    };
    let Ok(stat) = rustix::fs::fstat(io::stderr()) else {
        return false;
    };
    is_stream(&stream, stat.st_dev, stat.st_ino)
}

fn is_stream(stream: &str, device: u64, inode: u64) -> bool {
    stream.split_once(':').is_some_and(|(dev, ino)| {
        dev.parse::<u64>() == Ok(device) && ino.parse::<u64>() == Ok(inode)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_filter_is_told_in_one_line_with_its_text() {
        for filter in [
            "banter=loud",
            "info,a=b=c",
            "info,tungstenite::protocol=trace",
        ] {
            let error = parse_filter(filter).unwrap_err().to_string();
            assert!(
                error.contains(&format!("{filter:?}")) && error.contains("RUST_LOG"),
                "{error}"
            );
            assert!(!error.contains('\n'), "{error}");
        }
        for filter in ["info", "WARN", "info,banter::master=debug"] {
            parse_filter(filter).unwrap();
        }
        let all = parse_filter("trace").unwrap().to_string();
        assert!(all.contains("tungstenite=info"), "no frames: {all}");
        assert_eq!(
            parse_filter("").unwrap().to_string(),
            parse_filter("info").unwrap().to_string()
        );
    }

    #[test]
    fn the_journal_is_recognised_by_device_and_inode() {
        assert!(is_stream("8:1234", 8, 1234));
        assert!(!is_stream("8:1234", 8, 1235));
        assert!(!is_stream("9:1234", 8, 1234));
        assert!(!is_stream("", 0, 0));
        assert!(!is_stream("8", 8, 8));
    }

    #[test]
    fn a_line_begins_with_the_time_and_the_role() {
        let mut line = String::new();
        Stamp {
            role: "worker 1".to_owned(),
        }
        .format_time(&mut Writer::new(&mut line))
        .unwrap();
        let (time, role) = line.split_once(' ').unwrap();
        assert!(time.ends_with('Z') && time.contains('T'), "{line}");
        assert_eq!(role, "worker 1");
    }
}
