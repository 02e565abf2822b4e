//! The master: accepts connections and hands them to workers, owns the registry, and, with the
//! embedded store, the database.
//!
//! - [`accept`] takes connections from the listening sockets while somebody can serve them;
//! - [`peek`] finds out for whom a trusted proxy speaks;
//! - [`router`] chooses a worker for each and passes it on, and takes back what was not received;
//! - [`registry`] decides who is online and where (pure);
//! - [`cluster`] runs it: the control streams of the workers, what they ask, what they are told.

pub mod accept;
pub mod affinity;
pub mod cluster;
pub mod peek;
pub mod recent;
pub mod refusal;
pub mod registry;
pub mod router;
pub mod status;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::ConfigError;
use crate::cli::{Cli, Command, MasterArgs};
use crate::handoff;
use crate::presence::Numbered;
use crate::proxy::Trusted;
use crate::pulse::Pulse;
use crate::settings::Settings;
use crate::signals::{Signals, Told};
use crate::store::embedded::Embedded;
use crate::store::redis::{Lease, LeaseError, RedisStore};
use crate::{config, systemd};

/// Changes of who is online that wait to be published; more are dropped, and asked for.
const PUBLISHED: usize = 4096;

/// How long a master that stops goes on handing over what it has accepted.
const HAND_OVER: Duration = Duration::from_secs(2);

/// How long its tasks may then take to end.
const END: Duration = Duration::from_secs(5);

/// Runs the master until it is told to stop.
///
/// # Errors
/// If the sockets or the store cannot be opened.
pub async fn run(args: MasterArgs, mut settings: Settings) -> anyhow::Result<()> {
    let mut signals = Signals::listen()?;
    let runtime_dir = systemd::runtime_dir(&args.runtime)?;
    let sockets = match systemd::ListenSockets::from_env().map_err(ConfigError::new)? {
        Some(sockets) => sockets,
        None => systemd::ListenSockets::bind(args.port, &runtime_dir)?,
    };
    let backend = tokio::select! {
        backend = Backend::open(&args, &runtime_dir) => backend?,
        // A lease of another host may have to be waited for.
        () = signals.told_to_end() => return Ok(()),
    };

    let (stop, accept_no_more) = (CancellationToken::new(), CancellationToken::new());
    let (tasks, under_way) = (TaskTracker::new(), TaskTracker::new());
    let affinity = Arc::new(affinity::Affinity::default());
    let refusals = refusal::Refusals::default();
    let (router, gate, traffic) =
        router::spawn(&tasks, affinity.clone(), refusals.clone(), stop.clone());
    let handoff = handoff::Listener::from_fd(sockets.handoff)
        .context("the hand-off socket cannot be used")?;
    tasks.spawn(router::serve_workers(handoff, router.clone(), stop.clone()));
    let trusted = watch::Sender::new(Arc::new(Trusted::default()));
    trust(&trusted, &args);
    let lookout = peek::Lookout::new(peek::Settings {
        trusted: trusted.subscribe(),
        router: router.clone(),
        refusals,
        tasks: tasks.clone(),
        under_way: under_way.clone(),
        accept_no_more: accept_no_more.clone(),
        stop: stop.clone(),
    });
    let mut pulses = vec![traffic.pulse.clone()];
    for listener in sockets.clients {
        let pulse = Pulse::new();
        pulses.push(pulse.clone());
        let listener = tokio::net::TcpListener::from_std(listener)
            .context("a listening socket cannot be used")?;
        tasks.spawn(accept::run(
            listener,
            lookout.clone(),
            gate.clone(),
            pulse.clone(),
            accept_no_more.clone(),
        ));
    }
    let control = tokio::net::UnixListener::from_std(sockets.control)
        .context("the control socket cannot be used")?;
    let (grace, grace_rx) = watch::channel(grace_of(&args));
    let cluster = cluster::Cluster::new(cluster::Settings {
        timing: registry::Timing {
            grace: grace_of(&args),
            silence: Duration::from_secs(
                u64::from(args.limits.ping_interval) + u64::from(args.limits.ping_timeout),
            ),
        },
        grace: grace_rx,
        roster: runtime_dir.join("workers.json"),
        affinity,
        store: backend.embedded(),
        presence: backend.publisher(&tasks, &stop),
        redis: backend.redis(),
        traffic,
        pulses,
    });
    tasks.spawn(cluster.run(control, stop.clone()));
    tasks.close();

    systemd::ready("waiting for workers");
    tracing::info!(event = "master_started", "the master is ready");
    // What can change while the master runs.
    let apply = |cli: &Cli| {
        let Command::Master(new) = &cli.command else {
            return;
        };
        grace.send_replace(grace_of(new));
        trust(&trusted, new);
    };
    let told = async {
        loop {
            match signals.next().await {
                Told::Reload => settings.reload(apply),
                told => return told,
            }
        }
    };
    let told = tokio::select! {
        told = told => told,
        () = tasks.wait() => anyhow::bail!("a part of the master stopped unexpectedly"),
        error = backend.displaced() => return Err(ConfigError::new(error).into()),
    };
    systemd::stopping(HAND_OVER + END);
    // What is not accepted waits for the next master, in the backlog of a socket that outlives this
    // one; what is accepted would be lost with it.
    accept_no_more.cancel();
    under_way.close();
    if told == Told::Stop {
        tokio::select! {
            () = under_way.wait() => {}
            () = tokio::time::sleep(HAND_OVER) => tracing::warn!(
                connections = under_way.len(),
                "some accepted connections find no worker: closing them"
            ),
            () = signals.told_to_end() => {}
        }
    }
    stop.cancel();
    if tokio::time::timeout(END, tasks.wait()).await.is_err() {
        tracing::warn!("some tasks did not stop within {} s", END.as_secs());
    }
    backend.close().await;
    Ok(())
}

fn grace_of(args: &MasterArgs) -> Duration {
    Duration::from_secs(args.limits.grace.into())
}

/// Believes the proxies that the settings name, from now on.
fn trust(trusted: &watch::Sender<Arc<Trusted>>, args: &MasterArgs) {
    let new = args.proxy.trusted();
    if **trusted.borrow() == new {
        return;
    }
    if let Some(network) = new.everybody() {
        tracing::warn!(
            "--trust-proxy {network} trusts everybody: any client can pose as any other"
        );
    }
    tracing::info!(networks = %new, "believes proxies in these networks");
    trusted.send_replace(Arc::new(new));
}

/// Where users, channels and messages are.
enum Backend {
    /// In the master's own database.
    Embedded(Arc<Embedded>),
    /// In a Redis, which workers reach on their own.
    Redis {
        store: Arc<RedisStore>,
        lease: Lease,
    },
}

impl Backend {
    async fn open(args: &MasterArgs, runtime_dir: &Path) -> anyhow::Result<Self> {
        let Some(settings) = config::redis(&args.redis)? else {
            let path = systemd::state_dir(&args.state)?.join("banter.db");
            let store = Embedded::open(&path).map_err(ConfigError::new)?;
            return Ok(Self::Embedded(store));
        };
        // The master publishes, and listens to nothing.
        let store = RedisStore::connect(settings, Arc::new(|_| true)).await;
        let store = store.map_err(ConfigError::new)?;
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        systemd::status("starting: taking the place of the master in Redis");
        let lease = Lease::new(store.clone(), host.trim(), runtime_dir);
        match lease.acquire().await {
            Ok(()) => {}
            Err(error @ LeaseError::Held(_)) => return Err(ConfigError::new(error).into()),
            // It is taken as soon as Redis is back; until then there is nobody to take it either.
            Err(LeaseError::Unavailable(error)) => {
                tracing::warn!("starting without Redis: {error}");
            }
        }
        Ok(Self::Redis { store, lease })
    }

    /// The store that workers reach through the master.
    fn embedded(&self) -> Option<Arc<Embedded>> {
        match self {
            Self::Embedded(store) => Some(store.clone()),
            Self::Redis { .. } => None,
        }
    }

    /// The Redis, where there is one.
    fn redis(&self) -> Option<Arc<RedisStore>> {
        match self {
            Self::Embedded(_) => None,
            Self::Redis { store, .. } => Some(store.clone()),
        }
    }

    /// Takes changes of who is online and publishes them, where that goes by Redis.
    fn publisher(
        &self,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Option<mpsc::Sender<Numbered>> {
        let Self::Redis { store, .. } = self else {
            return None;
        };
        let (changes, mut changes_rx) = mpsc::channel::<Numbered>(PUBLISHED);
        let (store, stop) = (store.clone(), stop.clone());
        tasks.spawn(async move {
            let publishing = async {
                while let Some(numbered) = changes_rx.recv().await {
                    if let Err(error) = store.publish_presence(&numbered).await {
                        // Workers notice by the next tick, and ask.
                        tracing::debug!(%error, "a change of who is online was not published");
                    }
                }
            };
            let _ = stop.run_until_cancelled(publishing).await;
        });
        Some(changes)
    }

    /// Returns only if another master has taken this one's place.
    async fn displaced(&self) -> LeaseError {
        match self {
            Self::Embedded(_) => std::future::pending().await,
            Self::Redis { lease, .. } => lease.keep().await,
        }
    }

    async fn close(self) {
        match self {
            Self::Embedded(store) => store.shutdown().await,
            Self::Redis { lease, .. } => {
                if let Err(error) = lease.release().await {
                    tracing::debug!(%error, "the lease ends by itself");
                }
            }
        }
    }
}
