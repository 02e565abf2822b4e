//! How far it is, on stderr: a bar on a terminal, else a line every few seconds.

use std::cell::Cell;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// How often a line tells how far it is.
const EVERY: Duration = Duration::from_secs(5);

/// Counts what is done of one kind of thing, until it is dropped.
pub(super) struct Progress {
    /// What is counted.
    what: &'static str,
    /// How many there are, if that is known.
    total: Option<u64>,
    done: Cell<u64>,
    told: Cell<Instant>,
    /// On a terminal.
    bar: Option<ProgressBar>,
}

impl Progress {
    pub(super) fn begin(what: &'static str, total: Option<u64>) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| bar(what, total));
        Self {
            what,
            total,
            done: Cell::new(0),
            told: Cell::new(Instant::now()),
            bar,
        }
    }

    pub(super) fn advance(&self, count: u64) {
        let done = self.done.get() + count;
        self.done.set(done);
        if let Some(bar) = &self.bar {
            bar.inc(count);
        } else if self.told.get().elapsed() >= EVERY {
            self.told.set(Instant::now());
            let of = self.total.map_or_else(String::new, |n| format!(" of {n}"));
            // Nobody may be there to read it.
            let _ = writeln!(std::io::stderr(), "banter: {}: {done}{of}", self.what);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar(what: &'static str, total: Option<u64>) -> ProgressBar {
    let (bar, template) = match total {
        Some(total) => (
            ProgressBar::new(total),
            "{msg} {wide_bar} {human_pos} of {human_len}, {eta} left",
        ),
        None => (ProgressBar::no_length(), "{msg} {spinner} {human_pos}"),
    };
    let style = ProgressStyle::with_template(template);
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_message(what)
}
