//! Takes connections from the master and serves them, within the worker's limits.

use std::any::Any;
use std::collections::HashMap;
use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::Request;
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::http::error::ApiError;
use super::link::Identity;
use super::transport::{Handle, Transport};
use crate::cli::LimitArgs;
use crate::handoff::{
    self, Credit, HandoffError, KnownBy, MAX_RESERVE, MAX_WINDOW, Offer, ToMaster, WorkerEnd,
    WorkerState,
};
use crate::pulse::{self, Pulse};
use crate::routing::RoutingKey;
use crate::telemetry::Throttle;

/// How long a client may take for the head of a request, also between two requests.
const HEADER_TIMEOUT: Duration = Duration::from_secs(20);

/// Descriptors for everything but clients' connections: sockets to the master, logs, libraries.
const RESERVED_DESCRIPTORS: u64 = 64;

/// First and longest pause between attempts to reach the master.
const RETRY: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// How many connections a worker may have.
#[derive(Debug, Clone, Copy)]
pub struct Capacity {
    /// From anybody; addresses with living sessions may go [`MAX_RESERVE`] beyond.
    pub connections: u32,
    /// From one address; `None`: any number.
    pub per_address: Option<u32>,
}

impl Capacity {
    /// What the limits say, but never more than the process has descriptors for.
    pub fn of(limits: &LimitArgs) -> Self {
        let (connections, per_address) = (limits.max_connections, limits.max_per_address);
        let descriptors =
            descriptors().saturating_sub(RESERVED_DESCRIPTORS + u64::from(MAX_RESERVE));
        let possible = u32::try_from(descriptors).unwrap_or(u32::MAX).max(1);
        let connections = match connections {
            0 => possible,
            wanted => wanted.min(possible),
        };
        Self {
            connections,
            per_address: (per_address > 0).then_some(per_address),
        }
    }
}

/// The limit on open descriptors, after raising it as far as it goes.
fn descriptors() -> u64 {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            tracing::debug!(%error, "the limit on open files stays as it is");
            limit = getrlimit(Resource::Nofile);
        }
    }
    limit.current.unwrap_or(u64::MAX)
}

/// The connections being served.
pub struct Connections {
    open: Mutex<Open>,
    /// Changes with every connection that comes or goes.
    count: watch::Sender<u32>,
}

#[derive(Default)]
struct Open {
    next: u64,
    handles: HashMap<u64, Arc<Handle>>,
    by_address: HashMap<RoutingKey, u32>,
}

/// Kept by a connection's stream: its place is free when that is dropped.
struct Place {
    id: u64,
    address: RoutingKey,
    connections: Arc<Connections>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.connections.open.lock();
        open.handles.remove(&self.id);
        if let Some(count) = open.by_address.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                open.by_address.remove(&self.address);
            }
        }
        self.connections.count.send_replace(len(&open));
    }
}

fn len(open: &Open) -> u32 {
    u32::try_from(open.handles.len()).unwrap_or(u32::MAX)
}

impl Connections {
    /// None yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            open: Mutex::default(),
            count: watch::Sender::new(0),
        })
    }

    /// Adds a connection; returns what its stream has to keep, and how many its address has.
    fn add(self: &Arc<Self>, handle: Arc<Handle>) -> (Place, u32) {
        let mut open = self.open.lock();
        let id = open.next;
        open.next += 1;
        let address = RoutingKey::of(handle.client());
        open.handles.insert(id, handle);
        let count = open.by_address.entry(address).or_default();
        *count += 1;
        let of_address = *count;
        self.count.send_replace(len(&open));
        (
            Place {
                id,
                address,
                connections: self.clone(),
            },
            of_address,
        )
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        *self.count.borrow()
    }

    /// Closes them all.
    pub fn kill_all(&self) {
        self.kill(|_| true);
    }

    /// Closes those that it applies to.
    pub fn kill(&self, applies: impl Fn(&Handle) -> bool) {
        let open = self.open.lock();
        for handle in open.handles.values().filter(|handle| applies(handle)) {
            handle.kill();
        }
    }

    /// Waits until there are none.
    pub async fn drained(&self) {
        // The sender lives as long as `self`.
        let _ = self.count.subscribe().wait_for(|count| *count == 0).await;
    }
}

/// Takes connections until stopped; until `ready` it says that it is starting.
pub struct Intake {
    /// Who takes them.
    pub identity: Identity,
    /// The master's hand-off socket.
    pub handoff: PathBuf,
    /// How many.
    pub capacity: watch::Receiver<Capacity>,
    /// Those that there are.
    pub connections: Arc<Connections>,
    /// What serves them.
    pub router: Router,
    /// The worker has its copy of the state.
    pub ready: CancellationToken,
    /// The worker is on its way out.
    pub draining: CancellationToken,
    /// Beats for as long as connections can be taken, or the master be looked for.
    pub pulse: Pulse,
    /// Bounds what is logged of proxies that name their client too late.
    pub complaints: Arc<Throttle>,
}

impl Intake {
    /// Connects to the master, for ever.
    pub async fn run(self, stop: CancellationToken) {
        let taking = async {
            let mut pause = RETRY.0;
            loop {
                self.pulse.beat();
                let begun = Instant::now();
                match self.stream().await {
                    Ok(()) => tracing::debug!("the master closed the hand-off stream"),
                    Err(error) => tracing::debug!(%error, "no hand-off stream: trying again"),
                }
                // One that ends at once, as with a master of another version, is no success.
                if begun.elapsed() > RETRY.1 {
                    pause = RETRY.0;
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY.1);
            }
        };
        let _ = stop.run_until_cancelled(taking).await;
    }

    async fn stream(&self) -> Result<(), HandoffError> {
        let end = WorkerEnd::connect(&self.handoff)?;
        let Identity { worker, boot } = self.identity.clone();
        end.send(&ToMaster::Hello {
            protocol: handoff::PROTOCOL,
            worker,
            boot,
        })
        .await?;
        let mut count = self.connections.count.subscribe();
        let mut capacity = self.capacity.clone();
        let mut said = None;
        let mut beat = tokio::time::interval(pulse::BEAT);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            count.borrow_and_update();
            capacity.borrow_and_update();
            let state = self.say_credit(&end, &mut said).await?;
            tokio::select! {
                received = end.recv() => match received {
                    Ok(Some((offer, socket))) => {
                        self.offered(&end, offer, socket, &mut said).await?;
                    }
                    Ok(None) => return Ok(()),
                    Err(HandoffError::FdLost { seq }) => {
                        tracing::error!("a connection was lost to the limit on open files");
                        tell(&end, &ToMaster::Refuse { seq }).await?;
                    }
                    Err(error) => return Err(error),
                },
                _ = beat.tick() => self.pulse.beat(),
                // The senders live as long as the intake.
                _ = count.changed() => {}
                Ok(()) = capacity.changed() => {}
                () = self.ready.cancelled(), if state == WorkerState::Starting => {}
                () = self.draining.cancelled(), if state != WorkerState::Draining => {}
            }
        }
    }

    /// Tells the master what the worker takes from now on, if that has changed.
    async fn say_credit(
        &self,
        end: &WorkerEnd,
        said: &mut Option<Credit>,
    ) -> Result<WorkerState, HandoffError> {
        let credit = self.credit(self.connections.count());
        if *said != Some(credit) && tell(end, &ToMaster::Credit(credit)).await? {
            *said = Some(credit);
        }
        Ok(credit.state)
    }

    fn credit(&self, count: u32) -> Credit {
        let none = |state| Credit {
            window: 0,
            reserve: 0,
            state,
        };
        if self.draining.is_cancelled() {
            return none(WorkerState::Draining);
        }
        if !self.ready.is_cancelled() {
            return none(WorkerState::Starting);
        }
        let limit = self.capacity.borrow().connections;
        let window = limit.saturating_sub(count).min(MAX_WINDOW);
        let reserve = (limit + MAX_RESERVE).saturating_sub(count).min(MAX_RESERVE);
        let state = if window == 0 {
            crate::limit_hit!("BANTER_MAX_CONNECTIONS", connections = count);
            WorkerState::Full
        } else {
            WorkerState::Serving
        };
        Credit {
            window,
            reserve,
            state,
        }
    }

    async fn offered(
        &self,
        end: &WorkerEnd,
        offer: Offer,
        socket: OwnedFd,
        said: &mut Option<Credit>,
    ) -> Result<(), HandoffError> {
        let seq = offer.seq;
        if offer.is_stale(handoff::monotonic_millis()) {
            // It is being served elsewhere by now, even if the master has died since: two must not
            // read from it.
            tell(end, &ToMaster::Refuse { seq }).await?;
            return Ok(());
        }
        if self.draining.is_cancelled() && tell(end, &ToMaster::Refuse { seq }).await? {
            return Ok(());
        }
        let (transport, handle) = match Transport::new(socket.into(), offer.peer, offer.client) {
            Ok(transport) => transport,
            Err(error) => {
                // It was reset on the way.
                tracing::debug!(%error, "a connection could not be set up");
                tell(end, &ToMaster::Ack { seq }).await?;
                return Ok(());
            }
        };
        let (place, of_address) = self.connections.add(handle.clone());
        // First the place that it takes, then the acknowledgement that makes room for the next.
        self.say_credit(end, said).await?;
        // Where the master is gone, so is its descriptor: nobody else can serve the connection.
        tell(end, &ToMaster::Ack { seq }).await?;
        self.serve(transport, handle, place, of_address, offer.known_by);
        Ok(())
    }

    fn serve(
        &self,
        mut transport: Transport,
        handle: Arc<Handle>,
        place: Place,
        of_address: u32,
        known_by: KnownBy,
    ) {
        transport.hold(Box::new(place) as Box<dyn Any + Send>);
        let too_many = self
            .capacity
            .borrow()
            .per_address
            .is_some_and(|limit| of_address > limit);
        if too_many {
            crate::limit_hit!("BANTER_MAX_PER_ADDRESS", client = %handle.client());
        }
        let router = self.router.clone();
        let complaints = self.complaints.clone();
        let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
            let (router, handle) = (router.clone(), handle.clone());
            if known_by == KnownBy::Silence
                && request.headers().contains_key("x-forwarded-for")
                && complaints.allows()
            {
                tracing::warn!(
                    event = "late_client",
                    peer = %handle.peer().ip(),
                    "a proxy opened a connection, and only later named its client on it: the client \
                     may be on the wrong worker. Have the proxy connect when a request is there"
                );
            }
            async move {
                if too_many {
                    return Ok::<_, Infallible>(refuse());
                }
                let mut request: Request = request.map(axum::body::Body::new);
                request.extensions_mut().insert(handle);
                let mut response = router.oneshot(request).await?;
                if known_by != KnownBy::Connection
                    && response.status() != StatusCode::SWITCHING_PROTOCOLS
                {
                    close_after(&mut response);
                }
                Ok(response)
            }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .max_buf_size(64 * 1024)
            .serve_connection(TokioIo::new(transport), service)
            .with_upgrades();
        let draining = self.draining.clone();
        tokio::spawn(async move {
            let mut connection = std::pin::pin!(connection);
            let served = tokio::select! {
                // First: a request that has arrived is answered.
                biased;
                served = connection.as_mut() => served,
                () = draining.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = served {
                // Clients that break off or send garbage: their own affair.
                tracing::debug!(%error, "a connection ended");
            }
        });
    }
}

/// Tells the master something; `false` if it is gone. What it sent before can still be received, and
/// is the worker's alone: a master that lives ends a stream only after its worker has.
async fn tell(end: &WorkerEnd, frame: &ToMaster) -> Result<bool, HandoffError> {
    match end.send(frame).await {
        Ok(()) => Ok(true),
        Err(HandoffError::Closed) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Makes a response the last one on its connection.
///
/// A proxy may send the requests of several clients on one connection, and only the first came to
/// the right worker under the right address. So there is no second.
fn close_after(response: &mut Response) {
    response.headers_mut().insert(
        http::header::CONNECTION,
        http::HeaderValue::from_static("close"),
    );
}

/// The answer to a connection too many from one address.
fn refuse() -> Response {
    let mut response = ApiError::too_many(Duration::from_secs(5)).into_response();
    close_after(&mut response);
    response.headers_mut().insert(
        http::header::ACCESS_CONTROL_ALLOW_ORIGIN,
        http::HeaderValue::from_static("*"),
    );
    response
}
