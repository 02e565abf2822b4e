//! One client's connection as the rest of the worker sees it: emit to it, probe it, close it.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::value::RawValue;
use socketioxide::extract::{AckSender, SocketRef};
use socketioxide::{SendError, SocketError, TransportType};
use tokio::sync::Semaphore;

use super::QUEUE_BYTES;
use super::engine::EngineSession;

/// Bytes that may wait for a client to read them. One that has more is closed, comes back, and
/// resumes: so nobody is skipped in silence.
const MAX_BACKLOG: u64 = 4 * 1024 * 1024;

/// How long a polling client that is probed may take to open its next poll.
const POLL_PROBE: Duration = Duration::from_millis(2_500);

/// How long a connection that is to be closed is waited for: to be answered, and to take the answer.
pub const LAST_WORDS: Duration = Duration::from_secs(1);

/// How often it is looked at meanwhile. Longer than an answer takes from the queue to the kernel.
const LOOK: Duration = Duration::from_millis(10);

/// What a small event adds to the backlog; only messages are measured. No more than any such packet
/// has: what is counted and never written would add up, over days, to a backlog that is not there.
/// How many of them wait is bounded by the engine's buffer.
pub const SMALL_EVENT: u64 = 8;

/// A client's connection.
pub struct Connection {
    socket: SocketRef,
    engine: Arc<EngineSession>,
    /// The client's address, as the master found it out.
    client: IpAddr,
    /// Bytes emitted, raised to the bytes written whenever nothing waits: the difference is the
    /// backlog.
    emitted: AtomicU64,
    /// More bytes than this have been written once the last answer has.
    answered: AtomicU64,
    /// What events that are queued or being handled take their shares of.
    pending: Arc<Semaphore>,
    superseded: AtomicBool,
}

/// Something that can be emitted, with its size.
pub trait Payload: Serialize {
    /// Bytes, roughly.
    fn size(&self) -> u64;
}

impl Payload for RawValue {
    fn size(&self) -> u64 {
        self.get().len() as u64
    }
}

impl Payload for serde_json::Value {
    fn size(&self) -> u64 {
        SMALL_EVENT
    }
}

impl Connection {
    /// The connection under a socket.
    ///
    /// The client's events that are queued or being handled hold permits of `pending`, which has
    /// [`QUEUE_BYTES`].
    pub fn new(
        socket: SocketRef,
        engine: Arc<EngineSession>,
        client: IpAddr,
        pending: Arc<Semaphore>,
    ) -> Self {
        Self {
            socket,
            engine,
            client,
            emitted: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            pending,
            superseded: AtomicBool::new(false),
        }
    }

    /// The client's address.
    pub fn client(&self) -> IpAddr {
        self.client
    }

    /// Emits an event. A client that does not read fast enough is closed instead.
    pub fn emit<T: Payload + ?Sized>(&self, event: &'static str, data: &T) {
        if !self.try_emit(event, data) {
            self.kill_slow();
        }
    }

    fn kill_slow(&self) {
        tracing::info!(
            event = "slow_client",
            client = %self.client,
            "closing a connection that does not read"
        );
        self.kill();
    }

    /// Emits an event unless too much is waiting already; `false` then. To a connection that is
    /// gone anything can be emitted.
    pub fn try_emit<T: Payload + ?Sized>(&self, event: &'static str, data: &T) -> bool {
        self.account(data.size(), || self.socket.emit(event, data))
    }

    /// Answers an event; a client that asked for no answer gets none. `size` says how many bytes
    /// the answer has at least. A client that does not read fast enough is closed instead.
    pub fn acknowledge<T: Serialize + ?Sized>(&self, ack: AckSender, answer: &T, size: u64) {
        // Noted before: it may be written at once.
        let written = self.engine.bytes_written();
        self.answered.store(written, Ordering::Release);
        if !self.account(size, || ack.send(answer)) {
            self.kill_slow();
        }
    }

    /// Sends something unless too much is waiting, and counts it.
    fn account(&self, size: u64, send: impl FnOnce() -> Result<(), SendError>) -> bool {
        let written = self.engine.bytes_written();
        let emitted = self.emitted.load(Ordering::Relaxed).max(written);
        if emitted - written > MAX_BACKLOG {
            return false;
        }
        match send() {
            Ok(()) => {
                // The dispatch loop and the session's own task may do this at once: a lost update
                // makes the estimate a little low, no more.
                self.emitted.store(emitted + size, Ordering::Relaxed);
                true
            }
            Err(SendError::Socket(SocketError::InternalChannelFull)) => false,
            Err(SendError::Socket(SocketError::Closed)) => true,
            Err(SendError::Serialize(error)) => {
                tracing::error!("an event cannot be encoded: {error}");
                true
            }
        }
    }

    /// Emits an event that may be lost.
    pub fn emit_volatile<T: Serialize + ?Sized>(&self, event: &'static str, data: &T) {
        // Dropped under load, by design.
        let _ = self.socket.volatile().emit(event, data);
    }

    /// Finds out whether the peer is there: the connection of a dead one ends within seconds.
    pub fn probe(self: &Arc<Self>) {
        if let Some(transport) = self.engine.transport() {
            if let Err(error) = transport.probe() {
                tracing::debug!(%error, "probing failed");
            }
            return;
        }
        // A polling client that lives has a poll open, or opens one right away.
        let polls = self.engine.probe_poll();
        let wire = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(POLL_PROBE).await;
            if wire.engine.transport().is_none() && wire.engine.is_without_poll_since(polls) {
                wire.kill();
            }
        });
    }

    /// Closes the transport. The client takes it for a broken connection, and comes back.
    pub fn kill(&self) {
        self.engine.kill();
        if self.socket.transport_type() == TransportType::Polling {
            // Between two polls there is no stream whose end would be noticed.
            let _ = self.socket.clone().disconnect();
        }
    }

    /// Closes the transport, as [`Connection::kill`] does, as soon as everything that the client has
    /// asked is answered and the answers are on their way; after [`LAST_WORDS`] in any case.
    pub async fn close(&self) {
        let deadline = Instant::now() + LAST_WORDS;
        let mut settled = false;
        while Instant::now() < deadline && !self.is_between_polls() {
            // Twice: events come in a row, and what was written may be only a part.
            let before = std::mem::replace(&mut settled, self.is_settled());
            if before && settled {
                break;
            }
            tokio::time::sleep(LOOK).await;
        }
        self.kill();
    }

    /// Whether no event of the client waits for its answer, nor an answer to be written.
    fn is_settled(&self) -> bool {
        let answered = self.answered.load(Ordering::Acquire);
        self.pending.available_permits() == QUEUE_BYTES
            && (answered == 0 || self.engine.bytes_written() > answered)
    }

    /// Whether it is a polling client's, and no poll waits that could tell it anything.
    pub fn is_between_polls(&self) -> bool {
        self.engine.transport().is_none() && !self.engine.is_polled()
    }

    /// Closes the transport, since another connection has the session: what this one still had
    /// to say is dropped.
    pub fn supersede(&self) {
        self.superseded.store(true, Ordering::Release);
        self.kill();
    }

    /// Whether another connection has the session.
    pub fn is_superseded(&self) -> bool {
        self.superseded.load(Ordering::Acquire)
    }

    /// Says good-bye in the protocol's way (the client will not come back by itself), and closes
    /// the transport a little later, should the client not do it.
    pub fn dismiss(&self) {
        // If its buffer is full, the transport's end has to do.
        let _ = self.socket.clone().disconnect();
        let engine = self.engine.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            engine.kill();
        });
    }

    /// Whether a close frame, should one have come just now, is the client's own doing. After a
    /// longer silence of ours than it tolerates, it is the client that gave us up.
    pub fn closed_by_choice(&self, patience: Duration) -> bool {
        if self.engine.killed() {
            return false;
        }
        match (self.socket.transport_type(), self.engine.transport()) {
            (TransportType::Websocket, Some(transport)) => {
                !transport.killed() && transport.last_write().elapsed() <= patience
            }
            _ => true,
        }
    }

    /// Up to when the client has provably received everything: Unix time, milliseconds.
    pub fn confirmed(&self) -> Option<i64> {
        self.engine.confirmed_until().map(unix_millis)
    }
}

/// An instant on the clock that clients see.
fn unix_millis(instant: Instant) -> i64 {
    let ago = i64::try_from(instant.elapsed().as_millis()).unwrap_or(i64::MAX);
    jiff::Timestamp::now().as_millisecond().saturating_sub(ago)
}

/// Unix milliseconds, or now, as clients get it: ISO 8601, UTC, milliseconds.
pub fn iso_date(millis: Option<i64>) -> String {
    let time = millis
        .and_then(|millis| jiff::Timestamp::from_millisecond(millis).ok())
        .unwrap_or_else(jiff::Timestamp::now);
    format!("{time:.3}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_have_milliseconds_and_end_in_z() {
        assert_eq!(iso_date(Some(1_000)), "1970-01-01T00:00:01.000Z");
        assert_eq!(
            iso_date(Some(1_764_000_000_123)),
            "2025-11-24T16:00:00.123Z"
        );
    }
}
