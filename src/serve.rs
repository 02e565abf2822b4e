//! `banter serve`: everything in one command, for development and containers.
//!
//! A supervisor that plays systemd's part. It binds the sockets, starts one master and the workers as
//! processes of their own, passes them the sockets (`LISTEN_FDS`), hears from them (`NOTIFY_SOCKET`,
//! `WATCHDOG_USEC`), starts again what dies, and stops all of them at its own end. The way of a child is
//! [`supervise`]: spawn, [`watch`], wait a while, again.
//!
//! The supervisor keeps the listening sockets open, so that clients that connect while the master
//! starts again wait in the kernel's backlog instead of being refused.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs::DirBuilder;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use command_fds::{CommandFdExt, FdMapping};
use rustix::process::{Pid, Signal, getppid, kill_process, set_parent_process_death_signal};
use tokio::net::UnixDatagram;
use tokio::process::Child;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::ConfigError;
use crate::cli::{LimitArgs, ServeArgs, StateArgs};
use crate::secret::{JwtSecret, Source};
use crate::systemd::{self, ListenSockets, NAME_CLIENTS, NAME_CONTROL, NAME_HANDOFF};

/// The exit status of a process that refuses its configuration (`EX_CONFIG` of sysexits.h). Such a
/// child is not started again.
pub const EXIT_CONFIG: u8 = 78;

/// Tells a child its supervisor's process id; see [`die_with_parent`].
const SUPERVISOR_PID: &str = "BANTER_SUPERVISOR_PID";

/// The first descriptor of `LISTEN_FDS`.
const LISTEN_FDS_START: i32 = 3;

/// The most bytes of a path that a unix address holds.
const MAX_SOCKET_PATH: usize = 107;

/// The longest name of a socket in the runtime directory.
const LONGEST_SOCKET_NAME: &str = "notify-worker-1023.sock";

/// The most bytes of a notification that are read; systemd takes as many.
const MAX_NOTIFICATION: usize = 4096;

/// Runs `banter serve` until SIGTERM or SIGINT. `log` is the children's log filter.
///
/// # Errors
///
/// A [`ConfigError`] for what the operator has to mend, also where a child told so by its exit status;
/// others where the port is in use, or a directory or process cannot be made.
pub fn run(args: ServeArgs, log: String) -> anyhow::Result<()> {
    refuse_redis(&args.state)?;
    let state_dir = prepare_state_dir(&args.state)?;
    let secret = match JwtSecret::find(&args.secret).map_err(ConfigError::new)? {
        Some((_, source)) => source,
        None => {
            JwtSecret::load_or_create(&state_dir)
                .map_err(ConfigError::new)?
                .1
        }
    };
    let runtime_dir = RuntimeDir::create()?;
    let sockets = ListenSockets::bind(args.port, runtime_dir.path())?;
    let port = sockets.clients[0]
        .local_addr()
        .context("the port is not known")?
        .port();
    let count = args.workers.unwrap_or_else(default_workers);
    let household = Household {
        program: env::current_exe().context("the program's own path is not known")?,
        runtime_dir: runtime_dir.path(),
        env: common_env(&args.limits, &log, port, &state_dir, runtime_dir.path()),
        // The secret goes by the file's name where it can, for an environment is easily seen.
        secret: match secret {
            Source::Credential(_) => None,
            Source::File(path) => Some((
                "BANTER_JWT_SECRET_FILE",
                std::path::absolute(path)
                    .context("the working directory is gone")?
                    .into(),
            )),
            Source::Value => args
                .secret
                .jwt_secret
                .map(|secret| ("JWT_SECRET", secret.into())),
        },
    };
    let master = household.master(sockets);
    let workers = (0..count).map(|number| household.worker(number)).collect();

    // One thread, because a child dies with the *thread* that started it (PR_SET_PDEATHSIG).
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        let signals = stop_signals().context("cannot handle signals")?;
        supervise_all(master, workers, TIMING, signals, || {
            crate::print_line(&format!("Banter listens on http://localhost:{port}/"));
            crate::print_line(&format!("Store: embedded, in {}", state_dir.display()));
            systemd::ready(&format!("listening on port {port}"));
        })
        .await
    })
}

/// Makes this process die with its supervisor, even if that one is killed. Does nothing without a
/// supervisor.
///
/// SIGKILL, because nobody would be left to end a process that does not stop by itself, and it could
/// keep the port from the next supervisor. Call it at the very start, on the main thread: the setting
/// is the thread's.
///
/// # Errors
///
/// If the supervisor is gone already: exit then.
pub fn die_with_parent() -> anyhow::Result<()> {
    let Some(supervisor) = env::var_os(SUPERVISOR_PID) else {
        return Ok(());
    };
    set_parent_process_death_signal(Some(Signal::KILL))
        .context("cannot ask to die with the supervisor")?;
    // It may have died before the call.
    let parent = getppid().map(|parent| parent.as_raw_nonzero().to_string());
    if parent.as_deref().map(std::ffi::OsStr::new) != Some(&supervisor) {
        bail!("the supervisor, process {}, is gone", supervisor.display());
    }
    Ok(())
}

/// Refuses `REDIS_URL`, which a later version may support: starting with an empty store instead would
/// look like lost data.
///
/// # Errors
///
/// [`ConfigError`] if it is set and not empty.
pub fn refuse_redis(args: &StateArgs) -> Result<(), ConfigError> {
    match args.redis_url.as_deref() {
        None | Some("") => Ok(()),
        Some(_) => Err(ConfigError::new(
            "REDIS_URL is not supported by this version, which keeps everything in its state \
             directory; unset it",
        )),
    }
}

/// The state directory, made if missing, as an absolute path.
fn prepare_state_dir(args: &StateArgs) -> anyhow::Result<PathBuf> {
    let given = systemd::state_dir(args)?;
    let path = std::path::absolute(&given).map_err(|error| {
        ConfigError::new(format!("state directory {}: {error}", given.display()))
    })?;
    DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(&path)
        .map_err(|error| {
            ConfigError::new(format!(
                "cannot make the state directory {}: {error}",
                path.display()
            ))
        })?;
    Ok(path)
}

fn default_workers() -> u32 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    u32::try_from(processors)
        .unwrap_or(u32::MAX)
        .saturating_sub(1)
        .clamp(1, 1024)
}

/// A private directory for the sockets between the processes, removed at the end.
#[derive(Debug)]
struct RuntimeDir(PathBuf);

impl RuntimeDir {
    /// In `$XDG_RUNTIME_DIR` where that serves, else in a directory for temporary files.
    fn create() -> anyhow::Result<Self> {
        let bases = [
            systemd::absolute(env::var_os("XDG_RUNTIME_DIR")),
            systemd::absolute(env::var_os("TMPDIR")),
            Some(PathBuf::from("/tmp")),
        ];
        Self::create_in_first(bases.into_iter().flatten())
    }

    fn create_in_first(bases: impl Iterator<Item = PathBuf>) -> anyhow::Result<Self> {
        let mut failed = Vec::new();
        for base in bases {
            match Self::create_in(&base) {
                Ok(directory) => return Ok(directory),
                Err(error) => failed.push(format!("{}: {error}", base.display())),
            }
        }
        bail!(
            "no directory for the sockets between the processes: {}",
            failed.join("; ")
        )
    }

    fn create_in(base: &Path) -> io::Result<Self> {
        let path = base.join(format!("banter-{:08x}", rand::random::<u32>()));
        if path.join(LONGEST_SOCKET_NAME).as_os_str().len() > MAX_SOCKET_PATH {
            return Err(io::Error::new(
                io::ErrorKind::InvalidFilename,
                "too long for a unix socket in it",
            ));
        }
        // Not recursive: fails rather than take over what somebody else may have put there.
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for RuntimeDir {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::debug!(path = %self.0.display(), %error, "cannot remove the runtime directory");
        }
    }
}

/// What every child is told by its environment.
fn common_env(
    limits: &LimitArgs,
    log: &str,
    port: u16,
    state_dir: &Path,
    runtime_dir: &Path,
) -> Vec<(&'static str, OsString)> {
    // Children live in the same process id namespace, so this is the id that they see.
    let supervisor = std::process::id().to_string();
    let mut env: Vec<(&'static str, OsString)> = vec![
        ("RUST_LOG", log.into()),
        ("PORT", port.to_string().into()),
        ("BANTER_STATE_DIR", state_dir.into()),
        ("BANTER_RUNTIME_DIR", runtime_dir.into()),
        (SUPERVISOR_PID, supervisor.into()),
    ];
    env.extend(limits.env().map(|(name, value)| (name, value.into())));
    env
}

/// What the children have in common.
struct Household<'a> {
    program: PathBuf,
    runtime_dir: &'a Path,
    env: Vec<(&'static str, OsString)>,
    /// Where workers find the secret, if not by what they inherit.
    secret: Option<(&'static str, OsString)>,
}

impl Household<'_> {
    fn master(&self, sockets: ListenSockets) -> ChildSpec {
        let clients = sockets
            .clients
            .into_iter()
            .map(|socket| (NAME_CLIENTS, socket.into()));
        let mut named: Vec<(&'static str, OwnedFd)> = clients.collect();
        named.push((NAME_CONTROL, sockets.control.into()));
        named.push((NAME_HANDOFF, sockets.handoff));
        ChildSpec {
            name: "master".to_owned(),
            program: self.program.clone(),
            args: vec!["master".into()],
            env: self.env.clone(),
            sockets: named,
            notify_path: self.runtime_dir.join("notify-master.sock"),
        }
    }

    fn worker(&self, number: u32) -> ChildSpec {
        ChildSpec {
            name: format!("worker {number}"),
            program: self.program.clone(),
            args: vec!["worker".into(), number.to_string().into()],
            env: self
                .env
                .iter()
                .cloned()
                .chain(self.secret.clone())
                .collect(),
            sockets: Vec::new(),
            notify_path: self
                .runtime_dir
                .join(format!("notify-worker-{number}.sock")),
        }
    }
}

/// How to start a child, as often as need be.
#[derive(Debug)]
struct ChildSpec {
    /// For people.
    name: String,
    program: PathBuf,
    args: Vec<OsString>,
    /// Beside what it inherits.
    env: Vec<(&'static str, OsString)>,
    /// Passed by `LISTEN_FDS`, with their names. They stay open here, for the next start.
    sockets: Vec<(&'static str, OwnedFd)>,
    /// Where its notifications go.
    notify_path: PathBuf,
}

impl ChildSpec {
    fn spawn(&self, timing: &Timing) -> io::Result<Child> {
        // What is meant for the supervisor alone, should systemd have started it.
        const NOT_INHERITED: [&str; 6] = [
            "LISTEN_PID",
            "LISTEN_FDS",
            "LISTEN_FDNAMES",
            "LISTEN_FDS_FIRST_FD",
            "WATCHDOG_PID",
            "REDIS_URL",
        ];
        let mut command = std::process::Command::new(&self.program);
        for name in NOT_INHERITED {
            command.env_remove(name);
        }
        command
            .args(&self.args)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .env("NOTIFY_SOCKET", &self.notify_path)
            .env("WATCHDOG_USEC", timing.watchdog.as_micros().to_string())
            .stdin(Stdio::null())
            // Ctrl-C on a terminal goes to the whole group; the supervisor alone is to decide what
            // stops, and in which order.
            .process_group(0);
        if !self.sockets.is_empty() {
            // Without LISTEN_PID, for the id is known only after the environment is made. The reader
            // takes that as "for whoever reads it".
            let names: Vec<&str> = self.sockets.iter().map(|(name, _)| *name).collect();
            command
                .env("LISTEN_FDS", self.sockets.len().to_string())
                .env("LISTEN_FDNAMES", names.join(":"));
            let mappings = (LISTEN_FDS_START..)
                .zip(&self.sockets)
                .map(|(child_fd, (_, fd))| {
                    Ok(FdMapping {
                        parent_fd: fd.try_clone()?,
                        child_fd,
                    })
                })
                .collect::<io::Result<_>>()?;
            command.fd_mappings(mappings).map_err(io::Error::other)?;
        }
        tokio::process::Command::from(command)
            .kill_on_drop(true)
            .spawn()
    }
}

/// How long things may take.
#[derive(Debug, Clone)]
struct Timing {
    /// The wait before the first restart.
    first_delay: Duration,
    /// Each wait is twice the one before, up to this.
    max_delay: Duration,
    /// A child that ran so long begins with the first wait again.
    reset_after: Duration,
    /// From the start to `READY=1`.
    ready_within: Duration,
    /// From `READY=1` or `WATCHDOG=1` to the next `WATCHDOG=1`.
    watchdog: Duration,
    /// From SIGTERM, or a child's own `STOPPING=1`, to its end.
    stop_within: Duration,
}

const TIMING: Timing = Timing {
    first_delay: Duration::from_millis(100),
    max_delay: Duration::from_secs(5),
    reset_after: Duration::from_secs(10),
    ready_within: Duration::from_secs(60),
    watchdog: Duration::from_secs(10),
    stop_within: Duration::from_secs(10),
};

/// How children are told to stop.
#[derive(Debug, Clone, Default)]
struct Stop {
    /// By SIGTERM, and no restart any more.
    term: CancellationToken,
    /// By SIGKILL, at once.
    kill: CancellationToken,
}

/// Runs the children until they are told to stop by a first message of `signals`; a second one kills
/// them. Calls `announce` once, when the master and any worker are ready.
///
/// # Errors
///
/// The first child's that cannot be run; the others are stopped first.
async fn supervise_all(
    master: ChildSpec,
    workers: Vec<ChildSpec>,
    timing: Timing,
    mut signals: mpsc::Receiver<()>,
    announce: impl FnOnce(),
) -> anyhow::Result<()> {
    let stop = [Stop::default(), Stop::default()];
    let [stop_workers, stop_master] = &stop;
    let (master_ready, is_master_ready) = watch::channel(false);
    let (worker_ready, is_worker_ready) = watch::channel(false);
    let mut children = JoinSet::new();
    children.spawn(supervise(
        master,
        timing.clone(),
        master_ready,
        stop_master.clone(),
    ));
    for worker in workers {
        let ready = worker_ready.clone();
        children.spawn(supervise(
            worker,
            timing.clone(),
            ready,
            stop_workers.clone(),
        ));
    }
    drop(worker_ready);

    let ready = async {
        became_true(is_master_ready).await;
        became_true(is_worker_ready).await;
    };
    tokio::pin!(ready);
    let mut announce = Some(announce);
    let mut outcome = Ok(());
    loop {
        tokio::select! {
            ended = children.join_next() => {
                let ended = match ended {
                    None => return outcome,
                    Some(ended) => ended.unwrap_or_else(|panic| Err(panic.into())),
                };
                if let Err(error) = ended {
                    outcome = outcome.and(Err(error));
                    stop.iter().for_each(|stop| stop.term.cancel());
                }
            }
            Some(()) = signals.recv() => {
                if stop_master.term.is_cancelled() {
                    tracing::warn!("told to stop again, killing what is left");
                    stop.iter().for_each(|stop| stop.kill.cancel());
                } else {
                    tracing::info!("stopping");
                    systemd::stopping();
                    // The workers first, so that they say goodbye to their clients while the master
                    // is still there. Nobody waits for anybody.
                    stop.iter().for_each(|stop| stop.term.cancel());
                }
            }
            () = &mut ready, if announce.is_some() => {
                if let Some(announce) = announce.take() {
                    announce();
                }
            }
        }
    }
}

/// Waits until the value is true, for ever if nobody can set it any more.
async fn became_true(mut value: watch::Receiver<bool>) {
    if value.wait_for(|value| *value).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// SIGTERM and SIGINT as messages.
fn stop_signals() -> io::Result<mpsc::Receiver<()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (sender, receiver) = mpsc::channel(2);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if sender.send(()).await.is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}

/// Runs one child for as long as the supervisor runs: spawn, watch, wait a while, again.
///
/// # Errors
///
/// [`ConfigError`] if it refuses its configuration; any other if it cannot be watched.
async fn supervise(
    spec: ChildSpec,
    timing: Timing,
    ready: watch::Sender<bool>,
    stop: Stop,
) -> anyhow::Result<()> {
    let child = spec.name.as_str();
    let notifications = UnixDatagram::bind(&spec.notify_path)
        .with_context(|| format!("cannot bind {}", spec.notify_path.display()))?;
    let mut backoff = Backoff::new(&timing);
    while !stop.term.is_cancelled() {
        // What the one before may have said last is not about the next.
        while notifications.try_recv(&mut [0]).is_ok() {}
        let started = Instant::now();
        let reason = match spec.spawn(&timing) {
            Ok(process) => {
                let end = watch(child, process, &notifications, &timing, &ready, &stop)
                    .await
                    .with_context(|| format!("cannot watch {child}"))?;
                if stop.term.is_cancelled() {
                    tracing::info!(child, "ended: {end}");
                    return Ok(());
                }
                if end.status.code() == Some(EXIT_CONFIG.into()) {
                    let text = format!("{child} refuses its configuration; see what it says above");
                    return Err(ConfigError::new(text).into());
                }
                end.to_string()
            }
            Err(error) => format!("cannot start {}: {error}", spec.program.display()),
        };
        let delay = backoff.after(started.elapsed());
        let delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        tracing::warn!(child, delay_ms, "died, starting it again: {reason}");
        tokio::select! {
            () = sleep(delay) => {}
            () = stop.term.cancelled() => {}
        }
    }
    Ok(())
}

/// How long to wait before each restart.
#[derive(Debug)]
struct Backoff<'a> {
    timing: &'a Timing,
    next: Duration,
}

impl<'a> Backoff<'a> {
    fn new(timing: &'a Timing) -> Self {
        Self {
            timing,
            next: timing.first_delay,
        }
    }

    /// The wait before the next start of a child that `ran` so long.
    fn after(&mut self, ran: Duration) -> Duration {
        if ran >= self.timing.reset_after {
            self.next = self.timing.first_delay;
        }
        let delay = self.next;
        self.next = (delay * 2).min(self.timing.max_delay);
        delay
    }
}

/// How a child ended.
#[derive(Debug)]
struct End {
    status: ExitStatus,
    /// Why the supervisor killed it, if it did.
    killed: Option<&'static str>,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) => write!(f, "exit status {code}")?,
            (None, Some(signal)) => write!(f, "signal {signal}")?,
            (None, None) => write!(f, "{}", self.status)?,
        }
        match self.killed {
            Some(why) => write!(f, " (killed by the supervisor: {why})"),
            None => Ok(()),
        }
    }
}

/// What a child is doing, by its own notifications.
#[derive(Debug, Clone, Copy)]
enum Phase {
    Starting,
    Serving,
    Stopping,
}

impl Phase {
    /// How long it may last without a further word of the child.
    fn limit(self, timing: &Timing) -> Duration {
        match self {
            Self::Starting => timing.ready_within,
            Self::Serving => timing.watchdog,
            Self::Stopping => timing.stop_within,
        }
    }

    /// What it is killed for when that time is over.
    fn overdue(self) -> &'static str {
        match self {
            Self::Starting => "it did not become ready in time",
            Self::Serving => "it did not feed its watchdog in time",
            Self::Stopping => "it did not stop in time",
        }
    }
}

/// Follows a child from its start to its end, and brings that about where it is due.
async fn watch(
    child: &str,
    mut process: Child,
    notifications: &UnixDatagram,
    timing: &Timing,
    ready: &watch::Sender<bool>,
    stop: &Stop,
) -> io::Result<End> {
    let mut phase = Phase::Starting;
    let mut deadline = Instant::now() + phase.limit(timing);
    let mut told_to_stop = false;
    let mut killed = None;
    let mut buffer = [0; MAX_NOTIFICATION];
    loop {
        tokio::select! {
            status = process.wait() => return Ok(End { status: status?, killed }),
            length = notifications.recv(&mut buffer) => {
                let text = String::from_utf8_lossy(&buffer[..length?]);
                for assignment in text.lines() {
                    phase = match (assignment, phase) {
                        ("READY=1", Phase::Starting) => {
                            tracing::info!(child, "ready");
                            ready.send_replace(true);
                            Phase::Serving
                        }
                        ("WATCHDOG=1", Phase::Serving) => Phase::Serving,
                        ("STOPPING=1", Phase::Starting | Phase::Serving) => Phase::Stopping,
                        _ => {
                            tracing::debug!(child, assignment, "notification");
                            continue;
                        }
                    };
                    deadline = Instant::now() + phase.limit(timing);
                }
            }
            () = sleep_until(deadline), if killed.is_none() => {
                killed = Some(phase.overdue());
                process.start_kill()?;
            }
            () = stop.term.cancelled(), if !told_to_stop => {
                told_to_stop = true;
                phase = Phase::Stopping;
                deadline = Instant::now() + phase.limit(timing);
                terminate(&process)?;
            }
            () = stop.kill.cancelled(), if killed.is_none() => {
                killed = Some("told to stop twice");
                process.start_kill()?;
            }
        }
    }
}

/// Sends SIGTERM to a child that has not been waited for, whose id therefore is still its own.
fn terminate(process: &Child) -> io::Result<()> {
    let pid = process
        .id()
        .and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
    match pid {
        Some(pid) => Ok(kill_process(pid, Signal::TERM)?),
        None => Ok(()),
    }
}
