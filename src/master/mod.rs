//! The master: accepts connections and hands them to workers, owns the registry, and, with the
//! embedded store, the database.
//!
//! - [`accept`] takes connections from the listening sockets while somebody can serve them;
//! - [`router`] chooses a worker for each and passes it on, and takes back what was not received;
//! - [`registry`] decides who is online and where (pure);
//! - [`cluster`] runs it: the control streams of the workers, what they ask, what they are told.

pub mod accept;
pub mod affinity;
pub mod cluster;
pub mod registry;
pub mod router;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::ConfigError;
use crate::cli::MasterArgs;
use crate::handoff;
use crate::store::embedded::Embedded;
use crate::{serve, systemd};

/// Runs the master until it is told to stop.
///
/// # Errors
/// If the sockets or the store cannot be opened.
pub async fn run(args: MasterArgs) -> anyhow::Result<()> {
    serve::refuse_redis(&args.state)?;
    let state_dir = systemd::state_dir(&args.state)?;
    let runtime_dir = systemd::runtime_dir(&args.runtime)?;
    let sockets = match systemd::ListenSockets::from_env().map_err(ConfigError::new)? {
        Some(sockets) => sockets,
        None => systemd::ListenSockets::bind(args.port, &runtime_dir)?,
    };
    let store = Embedded::open(&state_dir.join("banter.db")).map_err(ConfigError::new)?;

    let stop = CancellationToken::new();
    let tasks = TaskTracker::new();
    let affinity = Arc::new(affinity::Affinity::default());
    let (router, gate) = router::spawn(&tasks, affinity.clone(), stop.clone());
    let handoff = handoff::Listener::from_fd(sockets.handoff)
        .context("the hand-off socket cannot be used")?;
    tasks.spawn(router::serve_workers(handoff, router.clone(), stop.clone()));
    for listener in sockets.clients {
        let listener = tokio::net::TcpListener::from_std(listener)
            .context("a listening socket cannot be used")?;
        tasks.spawn(accept::run(
            listener,
            router.clone(),
            gate.clone(),
            stop.clone(),
        ));
    }
    let control = tokio::net::UnixListener::from_std(sockets.control)
        .context("the control socket cannot be used")?;
    let cluster = cluster::Cluster::new(cluster::Settings {
        timing: registry::Timing {
            grace: Duration::from_secs(args.limits.grace.into()),
            silence: Duration::from_secs(
                u64::from(args.limits.ping_interval) + u64::from(args.limits.ping_timeout),
            ),
        },
        roster: runtime_dir.join("workers.json"),
        affinity,
        store,
    });
    tasks.spawn(cluster.run(control, stop.clone()));
    tasks.close();

    systemd::ready("waiting for workers");
    tracing::info!(event = "master_started", "the master is ready");
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = tasks.wait() => anyhow::bail!("a part of the master stopped unexpectedly"),
    }
    systemd::stopping();
    stop.cancel();
    if tokio::time::timeout(Duration::from_secs(5), tasks.wait())
        .await
        .is_err()
    {
        tracing::warn!("some tasks did not stop within 5 s");
    }
    Ok(())
}
