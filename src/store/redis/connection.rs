//! Connections to Redis that come back by themselves.
//!
//! [`Commands`] keeps the one connection that all requests share. When it breaks, requests wait
//! for the next one, for [`PATIENCE`] at most; once Redis has been away for longer, they are
//! refused at once.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use redis::aio::{MultiplexedConnection, SendError};
use redis::{
    AsyncConnectionConfig, Client, ErrorKind, PushInfo, PushKind, RedisError, RedisResult,
    ServerErrorKind,
};
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::life::KnownLife;
use crate::store::StoreError;

/// How long a request is tried while there is no connection, or it breaks.
pub(super) const PATIENCE: Duration = Duration::from_secs(4);

/// How long Redis may take to answer; after that the connection counts as dead.
pub(super) const RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a connection may take to be ready.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Pauses between attempts to connect: from the first to the longest.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// A connection that lived for so long was a good one: the next attempt may follow quickly.
const GOOD_LIFE: Duration = Duration::from_secs(2);

/// How many requests may be under way on one connection; more wait for their turn.
const IN_FLIGHT: usize = 1024;

/// Pause before a request that Redis was too busy for is repeated.
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// How often a failure to connect is logged, at most.
const LOG_EVERY: Duration = Duration::from_secs(30);

/// Where Redis is, and how to connect to it.
pub(super) struct Server {
    client: Client,
    /// Its address, fit for logs.
    pub(super) shown: String,
}

impl Server {
    pub(super) fn new(client: Client, shown: String) -> Self {
        Self { client, shown }
    }

    /// Connects, once. `pushed` gets what comes unasked; it must not block.
    pub(super) async fn connect(
        &self,
        pushed: impl Fn(PushInfo) + Send + Sync + 'static,
    ) -> RedisResult<Connection> {
        let lost = CancellationToken::new();
        let closed = lost.clone();
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(Some(RESPONSE_TIMEOUT))
            .set_pipeline_buffer_size(IN_FLIGHT)
            .set_concurrency_limit(IN_FLIGHT)
            .set_push_sender(move |info: PushInfo| {
                if info.kind == PushKind::Disconnection {
                    closed.cancel();
                } else {
                    pushed(info);
                }
                Ok::<_, SendError>(())
            });
        let connection = self
            .client
            .get_multiplexed_async_connection_with_config(&config);
        let inner = connection.await?;
        Ok(Connection {
            inner,
            lost,
            life: Arc::default(),
        })
    }

    /// Connects, however long it takes.
    pub(super) async fn connect_at_last<P>(
        &self,
        back_off: &mut BackOff,
        pushed: &Arc<P>,
    ) -> Connection
    where
        P: Fn(PushInfo) + Send + Sync + 'static,
    {
        loop {
            let pushed = Arc::clone(pushed);
            match self.connect(move |info| pushed(info)).await {
                Ok(connection) => return connection,
                Err(error) if back_off.worth_logging(Instant::now()) => {
                    tracing::warn!(
                        address = self.shown,
                        purpose = back_off.purpose,
                        "cannot connect to Redis, trying on: {error}"
                    );
                }
                Err(_) => {}
            }
            back_off.wait().await;
        }
    }
}

/// A connection, and the knowledge whether it is still one.
#[derive(Clone)]
pub(super) struct Connection {
    pub(super) inner: MultiplexedConnection,
    /// Cancelled when the connection is closed, and to have it replaced.
    pub(super) lost: CancellationToken,
    /// What is known of the life of the Redis at its other end.
    pub(super) life: Arc<KnownLife>,
}

/// How long to wait before the next attempt to connect, and whether to log that one failed.
pub(super) struct BackOff {
    /// What the connection is for, as logs say it.
    purpose: &'static str,
    pause: Duration,
    connected: Option<Instant>,
    logged: Option<Instant>,
}

impl BackOff {
    pub(super) fn new(purpose: &'static str) -> Self {
        Self {
            purpose,
            pause: BACK_OFF.0,
            connected: None,
            logged: None,
        }
    }

    /// A connection is there.
    pub(super) fn connected(&mut self) {
        self.connected = Some(Instant::now());
        self.logged = None;
    }

    /// A connection, or an attempt at one, has failed: waits.
    pub(super) async fn wait(&mut self) {
        let pause = self.next(Instant::now());
        // Many workers lose Redis at the same moment; they shall not all come back at the same.
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
    }

    /// The pause after something that failed `now`.
    fn next(&mut self, now: Instant) -> Duration {
        let connected = self.connected.take();
        if connected.is_some_and(|since| now - since > GOOD_LIFE) {
            self.pause = BACK_OFF.0;
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(BACK_OFF.1);
        pause
    }

    /// Whether an attempt that failed `now` is to be logged: the first, and then one from time to
    /// time.
    fn worth_logging(&mut self, now: Instant) -> bool {
        let due = self.logged.is_none_or(|last| now - last > LOG_EVERY);
        if due {
            self.logged = Some(now);
        }
        due
    }
}

/// Whether there is a connection.
enum State {
    Away { since: Instant },
    Here(Connection),
}

impl State {
    fn away() -> Self {
        Self::Away {
            since: Instant::now(),
        }
    }

    /// The connection, unless it is known to be broken.
    fn connection(&self) -> Option<&Connection> {
        match self {
            Self::Here(connection) if !connection.lost.is_cancelled() => Some(connection),
            Self::Here(_) | Self::Away { .. } => None,
        }
    }
}

/// The connection that requests share.
pub(super) struct Commands {
    state: watch::Receiver<State>,
    _keeper: AbortOnDropHandle<()>,
}

impl Commands {
    /// Keeps a connection, which `first` may be, until it is dropped. The first one that succeeds
    /// is given to `welcome`.
    pub(super) fn new<F>(
        server: Arc<Server>,
        first: Option<Connection>,
        welcome: impl FnOnce(MultiplexedConnection) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let state = first.clone().map_or_else(State::away, State::Here);
        let (state, receiver) = watch::channel(state);
        let keeper = tokio::spawn(keep(server, first, state, welcome));
        Self {
            state: receiver,
            _keeper: AbortOnDropHandle::new(keeper),
        }
    }

    /// Whether there is a connection now.
    pub(super) fn connected(&self) -> bool {
        self.state.borrow().connection().is_some()
    }

    /// Has a request carried out; `doing` says what it does, for logs. It may be carried out
    /// twice, if the connection breaks before the answer has come.
    ///
    /// # Errors
    ///
    /// [`StoreError::Unavailable`] if Redis cannot be reached, does not answer or refuses.
    pub(super) async fn run<T, F>(
        &self,
        doing: &'static str,
        request: impl Fn(MultiplexedConnection) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = RedisResult<T>>,
    {
        self.run_knowing(doing, |connection| request(connection.inner))
            .await
    }

    /// As [`run`](Self::run), for a request that needs to know whom it asks.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    pub(super) async fn run_knowing<T, F>(
        &self,
        doing: &'static str,
        request: impl Fn(Connection) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = RedisResult<T>>,
    {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let connection = self.connection(deadline).await?;
            let error = match answer(request(connection.clone())).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let failure = Failure::of(&error);
            if failure.breaks_connection() {
                connection.lost.cancel();
            }
            if !failure.passes_soon() || Instant::now() > deadline {
                return Err(unavailable(doing, &error));
            }
            tracing::debug!(%error, doing, "trying again");
            if failure == Failure::Busy {
                tokio::time::sleep(BUSY_PAUSE).await;
            }
        }
    }

    /// Has a request carried out once, and only if there is a connection at this moment.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    pub(super) async fn run_now<T, F>(
        &self,
        doing: &'static str,
        request: impl FnOnce(MultiplexedConnection) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = RedisResult<T>>,
    {
        let connection = self.state.borrow().connection().cloned();
        let connection = connection.ok_or_else(unreachable)?;
        answer(request(connection.inner.clone()))
            .await
            .map_err(|error| {
                if Failure::of(&error).breaks_connection() {
                    connection.lost.cancel();
                }
                unavailable(doing, &error)
            })
    }

    /// The connection, once there is one.
    async fn connection(&self, deadline: Instant) -> Result<Connection, StoreError> {
        let mut state = self.state.clone();
        let deadline = match *state.borrow() {
            State::Here(_) => deadline,
            // If Redis has been away for long, waiting would only pile up requests.
            State::Away { since } => deadline.min(since + PATIENCE),
        };
        let waiting = state.wait_for(|state| state.connection().is_some());
        match timeout_at(deadline, waiting).await {
            Ok(Ok(state)) => state.connection().cloned().ok_or_else(unreachable),
            Ok(Err(_)) | Err(_) => Err(unreachable()),
        }
    }
}

/// Keeps a connection, for ever.
async fn keep<F>(
    server: Arc<Server>,
    mut first: Option<Connection>,
    state: watch::Sender<State>,
    welcome: impl FnOnce(MultiplexedConnection) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let mut back_off = BackOff::new("requests");
    let mut welcome = Some(welcome);
    loop {
        let connection = match first.take() {
            Some(connection) => connection,
            None => {
                server
                    .connect_at_last(&mut back_off, &Arc::new(|_| ()))
                    .await
            }
        };
        back_off.connected();
        if let Some(welcome) = welcome.take() {
            tokio::spawn(welcome(connection.inner.clone()));
        } else {
            tracing::info!(address = server.shown, "connected to Redis again");
        }
        let lost = connection.lost.clone();
        state.send_replace(State::Here(connection));
        lost.cancelled().await;
        state.send_replace(State::away());
        tracing::warn!(address = server.shown, "lost the connection to Redis");
        back_off.wait().await;
    }
}

/// Waits for an answer, but not for long.
pub(super) async fn answer<T>(answer: impl Future<Output = RedisResult<T>>) -> RedisResult<T> {
    timeout(RESPONSE_TIMEOUT, answer)
        .await
        .unwrap_or_else(|elapsed| Err(std::io::Error::from(elapsed).into()))
}

/// What an error means for the request and for the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    /// The connection is broken; another may do.
    Lost,
    /// Nothing came in time. Another connection may do later.
    Silent,
    /// Redis says that it will do soon: it loads its data, or fails over.
    Busy,
    /// Redis refuses.
    Refused,
}

impl Failure {
    pub(super) fn of(error: &RedisError) -> Self {
        match error.kind() {
            _ if error.is_timeout() => Self::Silent,
            ErrorKind::Io | ErrorKind::Parse | ErrorKind::AuthenticationFailed => Self::Lost,
            ErrorKind::Server(
                ServerErrorKind::BusyLoading
                | ServerErrorKind::TryAgain
                | ServerErrorKind::MasterDown
                | ServerErrorKind::ClusterDown,
            ) => Self::Busy,
            _ => Self::Refused,
        }
    }

    /// Whether the connection is of no use any more.
    pub(super) fn breaks_connection(self) -> bool {
        matches!(self, Self::Lost | Self::Silent)
    }

    /// Whether the request is worth another try at once.
    fn passes_soon(self) -> bool {
        matches!(self, Self::Lost | Self::Busy)
    }
}

/// Logs what went wrong while `doing` something, and makes the error for the client of it, which
/// says nothing about Redis' insides.
pub(super) fn unavailable(doing: &str, error: &RedisError) -> StoreError {
    let why = match (Failure::of(error), error.code()) {
        // The loss is logged where the connection is kept, once for all requests.
        (Failure::Lost, _) => return unreachable(),
        (Failure::Silent, _) => "Redis does not answer",
        (_, Some("LOADING")) => "Redis is still loading its data",
        (_, Some("READONLY")) => "Redis takes no writes: it is a replica",
        (_, Some("OOM")) => "Redis is out of memory",
        (_, Some("MISCONF")) => "Redis cannot save to its disk",
        (_, Some("NOAUTH" | "NOPERM" | "WRONGPASS")) => "Redis denies access",
        _ => "Redis failed",
    };
    tracing::error!(doing, "{why}: {error}");
    StoreError::Unavailable(why.to_owned())
}

/// The error when there is no connection.
pub(super) fn unreachable() -> StoreError {
    StoreError::Unavailable("Redis cannot be reached".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_to_connect_come_slower_until_one_has_lasted() {
        let mut back_off = BackOff::new("tests");
        let now = Instant::now();
        let mut pauses: Vec<_> = (0..12).map(|_| back_off.next(now)).collect();
        assert_eq!((pauses[0], pauses[11]), BACK_OFF);
        assert!(pauses.is_sorted());
        pauses.dedup();
        assert!(pauses.len() > 4, "{pauses:?}");

        // One that is lost at once changes nothing.
        back_off.connected();
        assert_eq!(back_off.next(Instant::now()), BACK_OFF.1);
        back_off.connected();
        assert_eq!(back_off.next(Instant::now() + GOOD_LIFE * 2), BACK_OFF.0);
        assert!(back_off.next(Instant::now() + GOOD_LIFE * 4) > BACK_OFF.0);
    }

    #[test]
    fn a_failure_to_connect_is_logged_at_first_and_then_rarely() {
        let mut back_off = BackOff::new("tests");
        let now = Instant::now();
        assert!(back_off.worth_logging(now));
        assert!(!back_off.worth_logging(now));
        assert!(back_off.worth_logging(now + LOG_EVERY * 2));
        assert!(!back_off.worth_logging(now + LOG_EVERY * 2));
        back_off.connected();
        assert!(back_off.worth_logging(now + LOG_EVERY * 2));
    }

    #[test]
    fn errors_are_told_apart() {
        let io = |kind| RedisError::from(std::io::Error::from(kind));
        use std::io::ErrorKind::{BrokenPipe, ConnectionRefused, TimedOut, UnexpectedEof};
        for kind in [BrokenPipe, ConnectionRefused, UnexpectedEof] {
            assert_eq!(Failure::of(&io(kind)), Failure::Lost);
        }
        assert_eq!(Failure::of(&io(TimedOut)), Failure::Silent);
        let server = |kind| RedisError::from((ErrorKind::Server(kind), "a server's error"));
        let of = |kind| Failure::of(&server(kind));
        assert_eq!(of(ServerErrorKind::BusyLoading), Failure::Busy);
        assert_eq!(of(ServerErrorKind::ReadOnly), Failure::Refused);
        assert_eq!(of(ServerErrorKind::ResponseError), Failure::Refused);
    }
}
