//! Finds out for whom a trusted proxy speaks, before its connection is routed.
//!
//! A PROXY header is read, exactly; the head of an HTTP request is only peeked at (`MSG_PEEK`), so that
//! the worker finds every byte that belongs to it. Each such connection has a task of its own and
//! one of [`PLACES`] places: the accept loop waits for none of them. A peer that says nothing keeps
//! its place for [`PATIENCE`], or until all are taken and it is the one that has had its place
//! longest; then it is taken for the client, as a peer is that says it all, but names nobody.
//!
//! The runtime watches sockets edge-triggered: peeking does not take the bytes away, but the next
//! wake-up comes only with new ones ([`Peek::more`]). So bytes that are too few cost nothing while
//! they wait.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::net::RecvFlags;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::refusal::{Refusal, Refusals};
use super::router::{Accepted, RouterHandle};
use crate::handoff::KnownBy;
use crate::proxy::{self, Forwarded, Malformed, Start, Trusted};
use crate::routing::{self, RoutingKey};
use crate::telemetry::Throttle;

/// Connections that are looked at, or that wait for the router after that.
const PLACES: usize = 256;

/// How long a trusted peer may take to say for whom it speaks.
const PATIENCE: Duration = Duration::from_secs(3);

/// The most bytes of a request's head that are looked at.
const MAX_HEAD: usize = 32 * 1024;

/// Bytes that are looked at first: nearly every head is shorter.
const FIRST_LOOK: usize = 2048;

/// How long it may still take once the master accepts nothing more; shorter than the master then
/// lives ([`super::HAND_OVER`]).
const LAST_PATIENCE: Duration = Duration::from_secs(1);

/// What it works with.
#[derive(Debug)]
pub struct Settings {
    /// Whose word counts; asked for each connection.
    pub trusted: watch::Receiver<Arc<Trusted>>,
    /// Where connections go.
    pub router: RouterHandle,
    /// Answers those that go nowhere.
    pub refusals: Refusals,
    /// Whose tasks these are.
    pub tasks: TaskTracker,
    /// Counts what has been accepted and not been handed over yet.
    pub under_way: TaskTracker,
    /// The master is on its way out.
    pub accept_no_more: CancellationToken,
    /// Everything ends.
    pub stop: CancellationToken,
}

/// Between accepting and routing.
#[derive(Debug)]
pub struct Lookout {
    settings: Settings,
    places: Arc<Semaphore>,
    /// Those who are looked at, the one who has been for longest first. (Dead ends among them are
    /// of those who are through.)
    looked_at: Mutex<VecDeque<oneshot::Sender<()>>>,
    complaints: Throttle,
}

/// What is to become of a connection.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Route {
        client: IpAddr,
        known_by: KnownBy,
    },
    Refuse(Refusal),
    /// Nobody can tell where the client's bytes begin.
    Close(Malformed),
    /// The peer has ended it, and no request can come any more.
    Gone,
}

impl Lookout {
    /// Believes those who are in `trusted` at the time when they connect.
    pub fn new(settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            settings,
            places: Arc::new(Semaphore::new(PLACES)),
            looked_at: Mutex::default(),
            complaints: Throttle::per_minute(10),
        })
    }

    /// Sends a connection on its way to the router; waits while that, or this, has too many.
    /// `None` once the router has stopped.
    pub async fn admit(self: &Arc<Self>, stream: TcpStream, peer: SocketAddr) -> Option<()> {
        let arrived = Arrived {
            stream,
            peer,
            under_way: self.settings.under_way.token(),
        };
        let client = routing::canonical(peer.ip());
        let trusted = self.settings.trusted.borrow().clone();
        if !trusted.contains(client) {
            return self.route(arrived, client, KnownBy::Connection).await;
        }
        let (place, hurry) = self.place().await?;
        let lookout = self.clone();
        self.settings.tasks.spawn(async move {
            let looking = lookout.look(arrived, trusted, hurry);
            let _ = lookout.settings.stop.run_until_cancelled(looking).await;
            drop(place);
        });
        Some(())
    }

    /// A place, and what tells its holder to make room.
    async fn place(&self) -> Option<(OwnedSemaphorePermit, oneshot::Receiver<()>)> {
        let place = match self.places.clone().try_acquire_owned() {
            Ok(place) => place,
            Err(_) => {
                self.hurry_one();
                self.places.clone().acquire_owned().await.ok()?
            }
        };
        let (sender, hurry) = oneshot::channel();
        let mut looked_at = self.looked_at.lock();
        if looked_at.len() >= 2 * PLACES {
            looked_at.retain(|one| !one.is_closed());
        }
        looked_at.push_back(sender);
        Some((place, hurry))
    }

    fn hurry_one(&self) {
        let mut looked_at = self.looked_at.lock();
        while let Some(one) = looked_at.pop_front() {
            if one.send(()).is_ok() {
                return;
            }
        }
    }

    async fn look(&self, arrived: Arrived, trusted: Arc<Trusted>, hurry: oneshot::Receiver<()>) {
        let peer = arrived.peer;
        let mut peek = Peek::new(arrived, trusted);
        let verdict = tokio::select! {
            biased;
            verdict = peek.verdict() => verdict,
            // Its sender lives until it is used: it stays in the queue.
            _ = hurry => Ok(peek.verdict_on_silence()),
            () = tokio::time::sleep(PATIENCE) => Ok(peek.verdict_on_silence()),
            () = self.last_patience() => Ok(peek.verdict_on_silence()),
        };
        match verdict {
            Ok(Verdict::Route { client, known_by }) => {
                tracing::debug!(%peer, %client, ?known_by, "a trusted proxy's connection");
                // Nobody is left to tell if the router has stopped.
                let _ = self.route(peek.arrived, client, known_by).await;
            }
            Ok(Verdict::Refuse(why)) => {
                let client = peek.client;
                let Arrived {
                    stream, under_way, ..
                } = peek.arrived;
                match stream.into_std() {
                    Ok(stream) => {
                        let refusals = &self.settings.refusals;
                        refusals.refuse(stream.into(), client, under_way, why);
                    }
                    Err(error) => tracing::debug!(%peer, %error, "a connection was lost"),
                }
            }
            Ok(Verdict::Close(error)) if self.complaints.allows() => {
                tracing::warn!(
                    event = "malformed_proxy_header",
                    peer = %peer.ip(),
                    "closed a connection of a trusted proxy: {error}"
                );
            }
            Ok(Verdict::Close(error)) => {
                tracing::debug!(%peer, %error, "closed a connection of a trusted proxy");
            }
            Ok(Verdict::Gone) => {}
            Err(error) => tracing::debug!(%peer, %error, "a connection broke before it was routed"),
        }
    }

    /// Returns a while after the master has begun to stop.
    async fn last_patience(&self) {
        self.settings.accept_no_more.cancelled().await;
        tokio::time::sleep(LAST_PATIENCE).await;
    }

    async fn route(&self, arrived: Arrived, client: IpAddr, known_by: KnownBy) -> Option<()> {
        let Arrived {
            stream,
            peer,
            under_way,
        } = arrived;
        let stream = match stream.into_std() {
            Ok(stream) => stream.into(),
            Err(error) => {
                tracing::warn!("an accepted connection was lost: {error}");
                return Some(());
            }
        };
        let accepted = Accepted {
            stream,
            peer,
            client,
            known_by,
            key: RoutingKey::of(client),
            since: Instant::now(),
            under_way,
        };
        self.settings.router.route(accepted).await
    }
}

/// A connection that was accepted.
#[derive(Debug)]
struct Arrived {
    stream: TcpStream,
    peer: SocketAddr,
    under_way: TaskTrackerToken,
}

/// A connection whose first bytes are looked at.
#[derive(Debug)]
struct Peek {
    arrived: Arrived,
    trusted: Arc<Trusted>,
    /// As far as is known.
    client: IpAddr,
    known_by: KnownBy,
    /// What is in the socket, as far as it was seen: the first `seen` bytes.
    buffer: Vec<u8>,
    seen: usize,
}

impl Peek {
    fn new(arrived: Arrived, trusted: Arc<Trusted>) -> Self {
        Self {
            client: routing::canonical(arrived.peer.ip()),
            arrived,
            trusted,
            known_by: KnownBy::Silence,
            buffer: vec![0; FIRST_LOOK],
            seen: 0,
        }
    }

    /// Looks until it is clear what to do. Cancel safe: [`Peek::verdict_on_silence`] may follow.
    async fn verdict(&mut self) -> io::Result<Verdict> {
        loop {
            match proxy::start(self.bytes()) {
                Ok(Start::NoHeader) => break,
                Ok(Start::Header(header)) => {
                    self.consume(header.len)?;
                    self.client = header.client.unwrap_or(self.client);
                    if header
                        .client
                        .is_none_or(|client| !self.trusted.contains(client))
                    {
                        self.known_by = KnownBy::Connection;
                        return Ok(self.route());
                    }
                    // A proxy behind a proxy: its request may name somebody.
                    break;
                }
                Ok(Start::Undecided | Start::Incomplete) => {}
                Err(error) => return Ok(Verdict::Close(error)),
            }
            if !self.more().await? {
                return Ok(match self.verdict_on_silence() {
                    Verdict::Route { .. } => Verdict::Gone,
                    other => other,
                });
            }
        }
        loop {
            match proxy::forwarded(self.bytes(), &self.trusted) {
                Forwarded::Client(client) => {
                    self.client = client;
                    break;
                }
                Forwarded::Nobody => break,
                Forwarded::Incomplete if self.seen >= MAX_HEAD => {
                    return Ok(Verdict::Refuse(Refusal::LongHead));
                }
                Forwarded::Incomplete => {
                    if !self.more().await? {
                        return Ok(Verdict::Gone);
                    }
                }
            }
        }
        self.known_by = KnownBy::Request;
        Ok(self.route())
    }

    /// What to do if nothing more is to be waited for.
    fn verdict_on_silence(&self) -> Verdict {
        match proxy::start(self.bytes()) {
            Ok(Start::Incomplete) => Verdict::Close(Malformed::Unfinished),
            _ => self.route(),
        }
    }

    fn route(&self) -> Verdict {
        Verdict::Route {
            client: self.client,
            known_by: self.known_by,
        }
    }

    fn bytes(&self) -> &[u8] {
        &self.buffer[..self.seen]
    }

    /// Takes the first `len` bytes, which have been seen, out of the socket.
    fn consume(&mut self, len: usize) -> io::Result<()> {
        let mut taken = vec![0; len];
        if self.arrived.stream.try_read(&mut taken)? != len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.buffer.copy_within(len..self.seen, 0);
        self.seen -= len;
        Ok(())
    }

    /// Waits until more can be seen; false if nothing more will come.
    async fn more(&mut self) -> io::Result<bool> {
        if self.seen == self.buffer.len() {
            self.buffer.resize((2 * self.seen).min(MAX_HEAD), 0);
        }
        let Self {
            arrived: Arrived { stream, .. },
            buffer,
            seen,
            ..
        } = self;
        loop {
            let ready = stream.ready(Interest::READABLE).await?;
            let peeked = stream.try_io(Interest::READABLE, || {
                let (_, peeked) = rustix::net::recv(&*stream, &mut buffer[..], RecvFlags::PEEK)?;
                // "Would block" makes the runtime wait for the next bytes to arrive.
                if peeked > *seen {
                    Ok(peeked)
                } else {
                    Err(io::ErrorKind::WouldBlock.into())
                }
            });
            match peeked {
                Ok(peeked) => {
                    *seen = peeked;
                    return Ok(true);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // What came before the end has been seen.
                    if ready.is_read_closed() {
                        return Ok(false);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }
}
