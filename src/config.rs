//! Which store the settings mean.

use std::num::NonZeroU32;
use std::time::Duration;

use crate::ConfigError;
use crate::cli::RedisArgs;
use crate::store::redis::{RedisSettings, Retention, shown_address};

/// Where Redis listens unless told otherwise.
const REDIS_PORT: u16 = 6379;

/// The Redis that the settings name; `None` means the embedded store.
///
/// The predecessor's variables count as they did: `REDIS_URL`, else `REDIS_HOST` with
/// `REDIS_PORT`, else what a container link sets (`REDIS_PORT=tcp://HOST:PORT`,
/// `REDIS_PORT_6379_TCP_ADDR` with `REDIS_PORT_6379_TCP_PORT`). An empty one is as good as unset.
///
/// # Errors
/// [`ConfigError`] if they are malformed; it shows no password.
pub fn redis(args: &RedisArgs) -> Result<Option<RedisSettings>, ConfigError> {
    let Some(url) = url(args, |name| std::env::var(name).ok())? else {
        return Ok(None);
    };
    shown_address(&url).map_err(ConfigError::new)?;
    let day = Duration::from_secs(24 * 3600);
    let max_age = (args.retention_days > 0).then(|| day * args.retention_days);
    Ok(Some(RedisSettings {
        url,
        prefix: args.redis_prefix.clone(),
        retention: Retention {
            max_count: NonZeroU32::new(args.retention_count),
            max_age,
        },
    }))
}

fn url(
    args: &RedisArgs,
    var: impl Fn(&str) -> Option<String>,
) -> Result<Option<String>, ConfigError> {
    let set = |value: &Option<String>| value.clone().filter(|text| !text.trim().is_empty());
    if let Some(url) = set(&args.redis_url) {
        return Ok(Some(url));
    }
    let (host, port) = (set(&args.redis_host), set(&args.redis_port));
    if let Some(address) = port.as_ref().and_then(|port| port.strip_prefix("tcp://")) {
        return Ok(Some(match host {
            // The link's address is the platform's doing, the host the operator's.
            Some(host) => at(&host, address.rsplit_once(':').map(|(_, port)| port))?,
            None => format!("redis://{address}"),
        }));
    }
    if host.is_some() || port.is_some() {
        let host = host.unwrap_or_else(|| "localhost".to_owned());
        return at(&host, port.as_deref()).map(Some);
    }
    match set(&var("REDIS_PORT_6379_TCP_ADDR")) {
        Some(host) => at(&host, set(&var("REDIS_PORT_6379_TCP_PORT")).as_deref()).map(Some),
        None => Ok(None),
    }
}

fn at(host: &str, port: Option<&str>) -> Result<String, ConfigError> {
    let port = match port {
        None => REDIS_PORT,
        Some(text) => text.trim().parse().map_err(|_| {
            ConfigError::new(format_args!(
                "REDIS_PORT: {text:?} is no port; expected a number up to 65535 or \
                 tcp://HOST:PORT"
            ))
        })?,
    };
    let is_v6 = host.contains(':') && !host.starts_with('[');
    let host = if is_v6 {
        format!("[{host}]")
    } else {
        host.to_owned()
    };
    Ok(format!("redis://{host}:{port}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(args: &[(&str, &str)], vars: &[(&str, &str)]) -> Result<Option<String>, ConfigError> {
        let get = |list: &[(&str, &str)], name: &str| {
            let found = list.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        let args = RedisArgs {
            redis_url: get(args, "url"),
            redis_host: get(args, "host"),
            redis_port: get(args, "port"),
            redis_prefix: "banter".into(),
            retention_count: 0,
            retention_days: 0,
        };
        url(&args, |name| get(vars, name))
    }

    #[test]
    fn the_predecessors_variables_keep_their_meaning() {
        let link = [
            ("REDIS_PORT_6379_TCP_ADDR", "172.17.0.2"),
            ("REDIS_PORT_6379_TCP_PORT", "6380"),
        ];
        for (args, vars, expected) in [
            (&[][..], &[][..], None),
            (&[("url", ""), ("host", " ")], &[], None),
            (&[("url", "unix:/x"), ("host", "h")], &link, Some("unix:/x")),
            (&[("host", "h")], &link, Some("redis://h:6379")),
            (&[("host", "h"), ("port", "7")], &[], Some("redis://h:7")),
            (&[("host", "::1")], &[], Some("redis://[::1]:6379")),
            (&[("port", "7")], &[], Some("redis://localhost:7")),
            (
                &[("port", "tcp://10.0.0.1:7")],
                &[],
                Some("redis://10.0.0.1:7"),
            ),
            (
                &[("host", "h"), ("port", "tcp://10.0.0.1:7")],
                &[],
                Some("redis://h:7"),
            ),
            (&[], &link, Some("redis://172.17.0.2:6380")),
        ] {
            let found = find(args, vars).unwrap();
            assert_eq!(found.as_deref(), expected, "{args:?} {vars:?}");
        }
        let error = find(&[("host", "h"), ("port", "x")], &[]).unwrap_err();
        assert!(
            error.to_string().starts_with("REDIS_PORT: \"x\""),
            "{error}"
        );
    }
}
