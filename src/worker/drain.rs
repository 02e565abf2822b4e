//! How a worker goes (SIGTERM): requests are finished, and sockets are closed one after the other, so
//! that their clients do not come back to the other workers all at once.
//!
//! A socket's transport is closed, and nothing said in Socket.IO's way: clients then come back by
//! themselves, and resume. A socket with events under way gets their answers first. A polling client
//! between two polls is closed without waiting for its turn, because its next request goes to another
//! worker already, which sends it into a new session; that must not find the old one living.
//!
//! The times add up to [`bound`] at most.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::task::TaskTracker;

use super::App;
use super::intake::Connections;
use super::socket::wire::{Connection, LAST_WORDS};

/// How often something is closed.
const TICK: Duration = Duration::from_millis(20);

/// How long requests may take once all sockets are closed.
const REQUESTS: Duration = Duration::from_secs(2);

/// A connection that was opened and has asked nothing for so long is not worth waiting for.
const SILENCE: Duration = Duration::from_secs(1);

/// How long sessions may take to tell the master of their end.
const FAREWELL: Duration = Duration::from_secs(2);

/// The most time that a drain takes which closes sockets over this time.
pub fn bound(spread: Duration) -> Duration {
    // And a second for what takes no time on a machine that is not overloaded.
    spread + LAST_WORDS + REQUESTS + FAREWELL + Duration::from_secs(1)
}

/// A worker on its way out: its intake takes nothing any more.
pub struct Drain {
    /// The worker.
    pub app: Arc<App>,
    /// Its connections.
    pub connections: Arc<Connections>,
    /// Over how long its sockets are closed.
    pub spread: Duration,
}

impl Drain {
    /// Closes everything in good order.
    pub async fn run(&self) {
        let begin = Instant::now();
        let mut sockets = self.app.dispatch.sockets().await;
        tracing::info!(
            event = "draining",
            sockets = sockets.len(),
            connections = self.connections.count(),
            "no new connections; closing those that there are"
        );
        let closing = TaskTracker::new();
        let close = |socket: Arc<Connection>| {
            closing.spawn(async move { socket.close().await });
        };
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let all = sockets.len();
        while !sockets.is_empty() {
            tick.tick().await;
            let keep = still_open(all, begin.elapsed(), self.spread);
            for socket in sockets.extract_if(.., |socket| socket.is_between_polls()) {
                close(socket);
            }
            if let Some(due) = sockets.len().checked_sub(keep) {
                sockets.drain(..due).for_each(close);
            }
        }
        closing.close();
        closing.wait().await;
        let requests = async {
            while self.connections.count() > 0 {
                // Also those that came in while the others were being closed.
                self.kill_sockets().await;
                let silent_for = |handle: &super::transport::Handle| handle.is_silent_for(SILENCE);
                self.connections
                    .kill(|handle| handle.upgraded() || silent_for(handle));
                tick.tick().await;
            }
        };
        if timeout(REQUESTS, requests).await.is_err() {
            tracing::warn!(
                connections = self.connections.count(),
                "some requests were not finished in time"
            );
        }
        self.at_once().await;
        tracing::info!(
            event = "drained",
            seconds = begin.elapsed().as_secs_f64(),
            "all connections are closed"
        );
    }

    /// Closes everything.
    pub async fn at_once(&self) {
        self.kill_sockets().await;
        self.connections.kill_all();
        let ended = async {
            self.connections.drained().await;
            self.app.clients.close();
            self.app.clients.wait().await;
        };
        // A client that still waits for the master's word is not served any more either.
        if timeout(FAREWELL, ended).await.is_err() {
            tracing::warn!(
                connections = self.connections.count(),
                sessions = self.app.clients.len(),
                "the master could not be told how all sessions ended"
            );
        }
    }

    async fn kill_sockets(&self) {
        for socket in self.app.dispatch.sockets().await {
            socket.kill();
        }
        self.app.sessions.kill_all();
    }
}

/// How many of so many sockets are to be open so long after the begin.
fn still_open(all: usize, elapsed: Duration, spread: Duration) -> usize {
    let left = spread.saturating_sub(elapsed);
    if left.is_zero() {
        return 0;
    }
    let share = left.as_secs_f64() / spread.as_secs_f64();
    // At most `all`, and rounded up: the last one stays until the end.
    (all as f64 * share).ceil() as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn sockets_are_closed_evenly_and_all_of_them(
            all in 0..100_000_usize,
            spread in 0..60_000_u64,
            at in 0..70_000_u64,
        ) {
            let time = Duration::from_millis;
            let open = still_open(all, time(at), time(spread));
            if at >= spread {
                prop_assert_eq!(open, 0);
            } else {
                let fair = all as f64 * (1.0 - at as f64 / spread as f64);
                prop_assert!((open as f64 - fair).abs() <= 1.0, "{} of {}", open, fair);
                prop_assert!(open <= all);
            }
        }
    }
}
