//! What a process is told by signals.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// What a signal means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// SIGTERM: finish what is under way, within bounds, and end.
    Stop,
    /// SIGINT: end at once. Ctrl-C on a terminal, and `banter serve` when all of it stops, so that
    /// there is nobody else to take over.
    StopNow,
    /// SIGHUP: read the settings again.
    Reload,
}

/// The signals that the roles listen to.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Listens from now on; until then each of them ends the process.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// The next one. Cancel safe.
    pub async fn next(&mut self) -> Told {
        // None of the streams ever ends.
        tokio::select! {
            _ = self.terminate.recv() => Told::Stop,
            _ = self.interrupt.recv() => Told::StopNow,
            _ = self.hangup.recv() => Told::Reload,
        }
    }

    /// Waits for a signal that asks for an end.
    pub async fn told_to_end(&mut self) {
        while self.next().await == Told::Reload {}
    }
}
