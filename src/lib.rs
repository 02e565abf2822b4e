//! Banter, a self-hosted chat server.
//!
//! The library does everything; `main.rs` only parses the command line. See ARCHITECTURE.md for
//! the whole picture.

pub mod cli;
pub mod config;
pub mod control;
pub mod handoff;
pub mod health;
pub mod limits;
pub mod master;
pub mod presence;
pub mod proxy;
pub mod pulse;
pub mod routing;
pub mod secret;
pub mod serve;
pub mod settings;
pub mod signals;
pub mod store;
pub mod systemd;
pub mod telemetry;
pub mod worker;

use std::io::Write;

/// Something that the operator has to mend: restarting does not help.
///
/// `main` exits with 78 (`EX_CONFIG` of sysexits.h) where one is in an error's chain, and `banter
/// serve` does not start such a process again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl ConfigError {
    /// The error with its text for the operator, in one line: what is wrong and what to do.
    pub fn new(text: impl std::fmt::Display) -> Self {
        Self(text.to_string())
    }
}

/// Prints a line to stdout.
///
/// Unlike `println!` it does not panic where nobody reads, as in `banter health | true`: who closed
/// the pipe does not want to know.
pub fn print_line(line: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}
