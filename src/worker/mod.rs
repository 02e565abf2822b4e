//! A worker: serves REST and Socket.IO on the connections that the master hands to it.
//!
//! The way of a connection: [`intake`] takes it, [`transport`] is its stream, [`http`] and
//! [`socket`] serve it. The way of a message: [`socket::session`] posts it to the store, whose
//! bus brings it to every worker with members; [`dispatch`] puts it in order ([`feed`]) and emits
//! it. [`link`] is the stream to the master.

pub mod dispatch;
pub mod drain;
pub mod feed;
pub mod http;
pub mod intake;
pub mod link;
pub mod passwords;
pub mod socket;
pub mod status;
pub mod transport;
pub mod ws_frames;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::ConfigError;
use crate::cli::{Cli, Command, LimitArgs, WorkerArgs};
use crate::config;
use crate::limits::KeyedBuckets;
use crate::pulse::Pulse;
use crate::secret::JwtSecret;
use crate::settings::Settings;
use crate::signals::{Signals, Told};
use crate::store::Store;
use crate::store::redis::RedisStore;
use crate::store::remote::ControlStore;
use crate::{systemd, telemetry};
use dispatch::Dispatch;
use drain::Drain;
use http::accounts::Attempts;
use http::channels;
use http::error::ApiError;
use http::token::{Caller, Tokens};
use link::{Identity, Link};
use passwords::Passwords;
use socket::engine::Sessions;
use status::Look;

/// How long the intake may show no sign of life before the watchdog is fed no more. Longer than a
/// master that hangs, and could keep it waiting, lives.
const INTAKE_SILENCE: Duration = Duration::from_secs(15);

/// How much longer a start may take each time that it shows a sign of life.
const START: Duration = Duration::from_secs(30);

/// What everything in a worker shares.
pub struct App {
    /// Who this worker is.
    pub identity: Identity,
    limits: watch::Receiver<LimitArgs>,
    /// Users, channels, messages.
    pub store: Arc<dyn Store>,
    /// The store, where it is a Redis of its own.
    pub redis: Option<Arc<RedisStore>>,
    /// The way to the master.
    pub link: Link,
    /// The dispatch loop.
    pub dispatch: Dispatch,
    /// Signs and reads tokens.
    pub tokens: Tokens,
    /// Hashes passwords.
    pub passwords: Passwords,
    /// How often somebody failed to log in.
    pub attempts: Attempts,
    /// How many channels somebody created.
    pub creations: Mutex<KeyedBuckets<String>>,
    /// Engine.IO sessions.
    pub sessions: Sessions,
    /// The tasks of the clients' sessions.
    pub clients: TaskTracker,
    serial: AtomicU64,
}

impl App {
    /// The limits that count now.
    pub fn limits(&self) -> LimitArgs {
        *self.limits.borrow()
    }

    /// Who a token belongs to.
    ///
    /// # Errors
    /// 401 if it is not valid, or its account does not exist; 503 if that cannot be found out.
    pub async fn authenticate(&self, token: &str) -> Result<Caller, ApiError> {
        let name = self.tokens.read(token)?;
        match self.store.user(&name).await? {
            Some(user) => Ok(Caller { name: user.name }),
            None => Err(ApiError::unauthorized("Token is invalid")),
        }
    }

    /// How long a client that lives may be silent.
    pub fn silence(&self) -> Duration {
        let LimitArgs {
            ping_interval,
            ping_timeout,
            ..
        } = self.limits();
        Duration::from_secs(u64::from(ping_interval) + u64::from(ping_timeout))
    }

    /// An id for a connection that no other has, on any worker, ever.
    pub fn next_connection(&self) -> Arc<str> {
        self.unique().into()
    }

    /// A nonce for a post whose client chose none.
    pub fn next_nonce(&self) -> String {
        // A client's own cannot collide with it but by intent, and then only with its own posts.
        format!("~{}", self.unique())
    }

    fn unique(&self) -> String {
        format!(
            "{}.{}",
            self.identity.boot,
            self.serial.fetch_add(1, Ordering::Relaxed)
        )
    }
}

/// Runs a worker until it is told to stop.
///
/// # Errors
/// If its secret or its directories are not to be had.
pub async fn run(args: WorkerArgs, mut settings: Settings) -> anyhow::Result<()> {
    let mut signals = Signals::listen()?;
    let secret = JwtSecret::load(&args.secret).map_err(ConfigError::new)?;
    let runtime_dir = systemd::runtime_dir(&args.runtime)?;
    let boot = BASE64_URL_SAFE_NO_PAD.encode(rand::random::<[u8; 9]>());
    let identity = Identity {
        worker: args.number,
        boot,
    };

    let stop = CancellationToken::new();
    let (ready, draining) = (CancellationToken::new(), CancellationToken::new());
    let tasks = TaskTracker::new();
    let redis = config::redis(&args.redis)?;
    let control = runtime_dir.join(systemd::CONTROL_SOCKET);
    let (link, connector) = link::new(identity.clone(), control, redis.is_none());
    let (dispatch, items) = dispatch::new();
    let redis = match redis {
        Some(settings) => {
            let store = RedisStore::connect(settings, dispatch.sink()).await;
            Some(store.map_err(ConfigError::new)?)
        }
        None => None,
    };
    let store: Arc<dyn Store> = match &redis {
        Some(store) => store.clone(),
        None => Arc::new(ControlStore::new(link.clone())),
    };
    let (limits, limits_rx) = watch::channel(args.limits);
    let app = Arc::new(App {
        identity: identity.clone(),
        limits: limits_rx,
        store: store.clone(),
        redis: redis.clone(),
        link: link.clone(),
        dispatch: dispatch.clone(),
        tokens: Tokens::new(&secret),
        passwords: Passwords::new()?,
        attempts: Attempts::new(args.limits.auth_rate),
        creations: Mutex::new(channels::creations(args.limits.post_rate)),
        sessions: Sessions::default(),
        clients: TaskTracker::new(),
        serial: AtomicU64::new(0),
    });
    let connections = intake::Connections::new();
    let (capacity, capacity_rx) = watch::channel(intake::Capacity::of(&args.limits));
    let dispatching = dispatch::Loop::new(dispatch.clone(), identity.clone(), link, store);
    let look = Arc::new(Look {
        app: app.clone(),
        connections: connections.clone(),
        ready: ready.clone(),
        draining: draining.clone(),
        intake: Pulse::new(),
    });
    let (looking, intake_pulse) = (look.clone(), look.intake.clone());
    let sign_of_life = move || sign_of_life(&looking);
    tasks.spawn(dispatching.run(items, ready.clone(), sign_of_life, stop.clone()));
    tasks.spawn({
        let stop = stop.clone();
        async move {
            // First the subscription, then the snapshot. Without Redis it goes on all the same:
            // who is online is learnt by ticks, and people can at least come in.
            if let Some(redis) = &redis
                && let Err(error) = redis.watch_presence().await
            {
                tracing::warn!("starting without Redis: {error}");
            }
            connector.run(dispatch, stop).await;
        }
    });
    let intake = intake::Intake {
        identity: identity.clone(),
        handoff: runtime_dir.join(systemd::HANDOFF_SOCKET),
        capacity: capacity_rx,
        connections: connections.clone(),
        router: http::router(app.clone()),
        ready: ready.clone(),
        draining: draining.clone(),
        pulse: intake_pulse,
        complaints: Arc::new(telemetry::Throttle::per_minute(1)),
    };
    tracing::info!(
        event = "worker_started",
        worker = identity.worker,
        boot = identity.boot,
        connections = capacity.borrow().connections,
        "the worker starts"
    );
    tasks.spawn(intake.run(stop.clone()));
    tasks.close();

    let mut spread = drain_time(&args);
    let mut apply = |cli: &Cli| {
        let Command::Worker(new) = &cli.command else {
            return;
        };
        let new_limits = LimitArgs {
            // Clients were told these.
            ping_interval: args.limits.ping_interval,
            ping_timeout: args.limits.ping_timeout,
            ..new.limits
        };
        limits.send_replace(new_limits);
        app.attempts.set_rate(new_limits.auth_rate);
        let creations = channels::creation_limit(new_limits.post_rate);
        app.creations.lock().set_limit(creations, Instant::now());
        capacity.send_replace(intake::Capacity::of(&new_limits));
        spread = drain_time(new);
    };
    let told = async {
        loop {
            match signals.next().await {
                Told::Reload => settings.reload(&mut apply),
                told => return told,
            }
        }
    };
    let told = tokio::select! {
        () = async {
            ready.cancelled().await;
            systemd::ready(&look.sentence());
            std::future::pending::<()>().await;
        } => return Ok(()),
        told = told => told,
        () = tasks.wait() => anyhow::bail!("a part of the worker stopped unexpectedly"),
    };
    systemd::stopping(drain::bound(spread));
    draining.cancel();
    systemd::status(&look.sentence());
    let drain = Drain {
        app,
        connections,
        spread,
    };
    if told == Told::Stop {
        tokio::select! {
            () = drain.run() => {}
            () = signals.told_to_end() => drain.at_once().await,
        }
    } else {
        drain.at_once().await;
    }
    stop.cancel();
    tasks.wait().await;
    Ok(())
}

/// Tells the service manager that the dispatch loop goes round, and what it sees.
fn sign_of_life(look: &Look) {
    systemd::status(&look.sentence());
    if look.draining.is_cancelled() {
        systemd::watchdog();
    } else if !look.ready.is_cancelled() {
        // However long the master takes to come.
        systemd::starting(START);
    } else if look.intake.is_felt(INTAKE_SILENCE) {
        systemd::watchdog();
    } else {
        tracing::error!(event = "intake_hangs", "no connections are taken");
    }
}

fn drain_time(args: &WorkerArgs) -> Duration {
    Duration::from_secs(args.drain.into())
}
