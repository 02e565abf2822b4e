//! `banter serve`: everything in one command, for development and containers.
//!
//! A supervisor that plays systemd's part. It binds the sockets, starts one master and the workers as
//! processes of their own, passes them the sockets (`LISTEN_FDS`), hears from them (`NOTIFY_SOCKET`,
//! `WATCHDOG_USEC`), starts again what dies, and stops all of them at its own end. The way of a child is
//! `supervise`: spawn, `follow`, wait a while, again.
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
use rustix::process::{
    Pid, Resource, Rlimit, Signal, getppid, getrlimit, kill_process,
    set_parent_process_death_signal, setrlimit,
};
use tokio::net::UnixDatagram;
use tokio::process::Child;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::ConfigError;
use crate::cli::{RedisArgs, ServeArgs, StateArgs};
use crate::config;
use crate::secret::{JwtSecret, Source};
use crate::settings::Settings;
use crate::signals::{Signals, Told};
use crate::store::redis::{RedisSettings, shown_address};
use crate::systemd::{self, ListenSockets, NAME_CLIENTS, NAME_CONTROL, NAME_HANDOFF};

/// The exit status of a process that refuses its configuration (`EX_CONFIG` of sysexits.h). Such a
/// child is not started again.
pub const EXIT_CONFIG: u8 = 78;

/// The variable of the file of settings.
const CONFIG: &str = "BANTER_CONFIG";

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

/// Runs `banter serve` until SIGTERM or SIGINT. After SIGHUP all of it reads its settings again.
///
/// # Errors
///
/// A [`ConfigError`] for what the operator has to mend, also where a child told so by its exit status;
/// others where the port is in use, or a directory or process cannot be made.
pub fn run(args: ServeArgs, mut settings: Settings) -> anyhow::Result<()> {
    let redis = config::redis(&args.redis)?;
    raise_file_limit();
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
        env: {
            let mut env = given_env(&settings)?;
            env.extend(common_env(port, &state_dir, runtime_dir.path()));
            env.extend(redis_env(&args.redis, redis.as_ref()));
            env
        },
        // The secret goes by the file's name where it can, for an environment is easily seen.
        secret: match secret {
            Source::Credential(_) => None,
            Source::File(path) => Some((
                "BANTER_JWT_SECRET_FILE".to_owned(),
                std::path::absolute(path)
                    .context("the working directory is gone")?
                    .into(),
            )),
            Source::Value => args
                .secret
                .jwt_secret
                .map(|secret| ("JWT_SECRET".to_owned(), secret.into())),
        },
    };
    let store = redis
        .map(|redis| shown_address(&redis.url))
        .transpose()
        .map_err(ConfigError::new)?;
    let master = household.master(sockets);
    let workers = (0..count).map(|number| household.worker(number)).collect();

    // One thread, because a child dies with the *thread* that started it (PR_SET_PDEATHSIG).
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        let signals = signals().context("cannot handle signals")?;
        let reload = || settings.reload(|_| ());
        supervise_all(master, workers, TIMING, signals, reload, || {
            crate::print_line(&format!("Banter listens on http://localhost:{port}/"));
            crate::print_line(&match &store {
                Some(address) => format!("Store: Redis at {address}"),
                None => format!("Store: embedded, in {}", state_dir.display()),
            });
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

/// Allows as many open files as may be, which the children inherit: each connection is one, and the
/// usual soft limit is 1024.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::debug!(%error, ?limit, "cannot raise the limit on open files");
    }
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

/// What every child is told of the supervisor's command line. The environment it inherits, and the
/// file it reads on its own, also when that has changed.
fn given_env(settings: &Settings) -> anyhow::Result<Vec<(String, OsString)>> {
    let mut env = settings.given().to_vec();
    if let Some(file) = settings.file() {
        let name = file
            .absolute_name()
            .context("the working directory is gone")?;
        env.push((CONFIG.to_owned(), name));
    }
    Ok(env)
}

/// What every child is told by its environment.
fn common_env(port: u16, state_dir: &Path, runtime_dir: &Path) -> Vec<(String, OsString)> {
    // Children live in the same process id namespace, so this is the id that they see.
    let supervisor = std::process::id().to_string();
    let env: [(&str, OsString); 4] = [
        ("PORT", port.to_string().into()),
        ("BANTER_STATE_DIR", state_dir.into()),
        ("BANTER_RUNTIME_DIR", runtime_dir.into()),
        (SUPERVISOR_PID, supervisor.into()),
    ];
    env.map(|(name, value)| (name.to_owned(), value)).into()
}

/// What every child is told of the store.
fn redis_env(args: &RedisArgs, redis: Option<&RedisSettings>) -> Vec<(String, OsString)> {
    let Some(settings) = redis else {
        return Vec::new();
    };
    let env: [(&str, OsString); 4] = [
        ("REDIS_URL", settings.url.clone().into()),
        ("BANTER_REDIS_PREFIX", settings.prefix.clone().into()),
        (
            "BANTER_RETENTION_COUNT",
            args.retention_count.to_string().into(),
        ),
        (
            "BANTER_RETENTION_DAYS",
            args.retention_days.to_string().into(),
        ),
    ];
    env.map(|(name, value)| (name.to_owned(), value)).into()
}

/// What the children have in common.
struct Household<'a> {
    program: PathBuf,
    runtime_dir: &'a Path,
    env: Vec<(String, OsString)>,
    /// Where workers find the secret, if not by what they inherit.
    secret: Option<(String, OsString)>,
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
    env: Vec<(String, OsString)>,
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
    /// From SIGINT, or a child's own `STOPPING=1`, to its end; a child may ask for more.
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
    /// By SIGINT, and no restart any more.
    term: CancellationToken,
    /// By SIGKILL, at once.
    kill: CancellationToken,
    /// How often they were to read their settings again, by SIGHUP.
    reload: watch::Sender<u64>,
}

/// Runs the children until they are told to stop by a first message of `signals`; a second one kills
/// them. One that asks for it has `reload` read the settings again, and then the children. Calls
/// `announce` once, when the master and any worker are ready.
///
/// # Errors
///
/// The first child's that cannot be run; the others are stopped first.
async fn supervise_all(
    master: ChildSpec,
    workers: Vec<ChildSpec>,
    timing: Timing,
    mut signals: mpsc::Receiver<Told>,
    mut reload: impl FnMut(),
    announce: impl FnOnce(),
) -> anyhow::Result<()> {
    let stop = [Stop::default(), Stop::default()];
    let [stop_workers, stop_master] = &stop;
    let (master_ready, is_master_ready) = watch::channel(false);
    let (worker_ready, is_worker_ready) = watch::channel(false);
    let (mut children, working) = (JoinSet::new(), TaskTracker::new());
    children.spawn(supervise(
        master,
        timing.clone(),
        master_ready,
        stop_master.clone(),
    ));
    for worker in workers {
        let ready = worker_ready.clone();
        let worker = supervise(worker, timing.clone(), ready, stop_workers.clone());
        children.spawn(working.track_future(worker));
    }
    drop(worker_ready);
    working.close();

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
                    stop_workers.term.cancel();
                }
            }
            // The master last, so that it hears what became of the workers' sessions.
            () = working.wait(), if is_stopping(stop_workers) && !is_stopping(stop_master) => {
                stop_master.term.cancel();
            }
            Some(told) = signals.recv() => {
                if told == Told::Reload {
                    reload();
                    stop.iter().for_each(|stop| stop.reload.send_modify(|times| *times += 1));
                } else if is_stopping(stop_workers) {
                    tracing::warn!("told to stop again, killing what is left");
                    stop.iter().for_each(|stop| stop.kill.cancel());
                } else {
                    tracing::info!("stopping");
                    systemd::stopping(2 * timing.stop_within);
                    stop_workers.term.cancel();
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

fn is_stopping(stop: &Stop) -> bool {
    stop.term.is_cancelled()
}

/// Waits until the value is true, for ever if nobody can set it any more.
async fn became_true(mut value: watch::Receiver<bool>) {
    if value.wait_for(|value| *value).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Signals as messages.
fn signals() -> io::Result<mpsc::Receiver<Told>> {
    let mut signals = Signals::listen()?;
    let (sender, receiver) = mpsc::channel(2);
    tokio::spawn(async move { while sender.send(signals.next().await).await.is_ok() {} });
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
        // Before it reads them: what is to be reloaded later is not lost.
        let reload = stop.reload.subscribe();
        // What the one before may have said last is not about the next.
        while notifications.try_recv(&mut [0]).is_ok() {}
        let started = Instant::now();
        let reason = match spec.spawn(&timing) {
            Ok(process) => {
                let end = follow(
                    child,
                    process,
                    &notifications,
                    &timing,
                    &ready,
                    &stop,
                    reload,
                )
                .await
                .with_context(|| format!("cannot follow {child}"))?;
                if stop.term.is_cancelled() {
                    tracing::info!(child, "ended: {end}");
                    return Ok(());
                }
                if end.status.code() == Some(EXIT_CONFIG.into()) {
                    let text = format!("{child} refuses its configuration; see what it says above");
                    return Err(ConfigError::new(text).into());
                }
                if end.status.success() {
                    // Told to go by somebody else, as in a rolling restart: no failure to wait longer for.
                    backoff.reset();
                }
                end.to_string()
            }
            Err(error) => format!("cannot start {}: {error}", spec.program.display()),
        };
        let delay = backoff.after(started.elapsed());
        let delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        tracing::warn!(child, delay_ms, "ended, starting it again: {reason}");
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

    /// Begins with the first wait again.
    fn reset(&mut self) {
        self.next = self.timing.first_delay;
    }

    /// The wait before the next start of a child that `ran` so long.
    fn after(&mut self, ran: Duration) -> Duration {
        if ran >= self.timing.reset_after {
            self.reset();
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

/// For how much longer a child asks, however its time is limited.
fn extension(assignment: &str) -> Option<Duration> {
    let micros = assignment.strip_prefix("EXTEND_TIMEOUT_USEC=")?;
    micros.parse().ok().map(Duration::from_micros)
}

/// Follows a child from its start to its end, and brings that about where it is due.
async fn follow(
    child: &str,
    mut process: Child,
    notifications: &UnixDatagram,
    timing: &Timing,
    ready: &watch::Sender<bool>,
    stop: &Stop,
    mut reload: watch::Receiver<u64>,
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
                            if let Some(time) = extension(assignment) {
                                deadline = deadline.max(Instant::now() + time);
                            }
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
                // All of them end, so that there is nobody to hand clients over to, as they would do
                // after SIGTERM.
                tell(&process, Signal::INT)?;
            }
            // Not before it is ready: until then the signal would end it.
            Ok(()) = reload.changed(), if matches!(phase, Phase::Serving) => {
                tell(&process, Signal::HUP)?;
            }
            () = stop.kill.cancelled(), if killed.is_none() => {
                killed = Some("told to stop twice");
                process.start_kill()?;
            }
        }
    }
}

/// Sends a signal to a child.
fn tell(process: &Child, signal: Signal) -> io::Result<()> {
    let pid = process
        .id()
        .and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
    match pid {
        // It has not been waited for, so the id is still its own.
        Some(pid) => Ok(kill_process(pid, signal)?),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read};
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    use tempfile::TempDir;
    use tokio::task::JoinHandle;
    use tokio::time::timeout;

    use super::*;

    /// Long enough for a loaded machine; only a failing test waits for it.
    const DEADLINE: Duration = Duration::from_secs(30);

    /// For what must not happen by time alone in a test.
    const NEVER: Duration = Duration::from_secs(3600);

    /// Restarts at once; nothing else is due to time alone.
    fn patient() -> Timing {
        Timing {
            first_delay: Duration::from_millis(1),
            max_delay: Duration::from_millis(1),
            reset_after: NEVER,
            ready_within: NEVER,
            watchdog: NEVER,
            stop_within: NEVER,
        }
    }

    /// A child that is a shell script, which has `$LOG` to tell what happens.
    fn shell(dir: &TempDir, name: &str, script: &str) -> ChildSpec {
        ChildSpec {
            name: name.to_owned(),
            // A shell cannot trap what was ignored when it began, as SIGINT is in the background.
            program: "/usr/bin/env".into(),
            args: ["--default-signal=INT", "/bin/sh", "-c", script]
                .map(Into::into)
                .into(),
            env: vec![("LOG".to_owned(), log_path(dir).into())],
            sockets: Vec::new(),
            notify_path: dir.path().join(format!("{name}.sock")),
        }
    }

    /// A child that is [`fake_child`].
    fn fake(dir: &TempDir, name: &str, behaviour: &str) -> ChildSpec {
        ChildSpec {
            program: env::current_exe().unwrap(),
            args: ["--exact", "serve::tests::fake_child", "--nocapture"]
                .map(Into::into)
                .to_vec(),
            env: vec![
                ("LOG".to_owned(), log_path(dir).into()),
                (FAKE.to_owned(), behaviour.into()),
            ],
            ..shell(dir, name, "")
        }
    }

    const FAKE: &str = "BANTER_TEST_FAKE";

    /// No test by itself: what [`fake`] children run.
    #[test]
    fn fake_child() {
        let Ok(behaviour) = env::var(FAKE) else {
            return;
        };
        let log = PathBuf::from(env::var_os("LOG").unwrap());
        let say = |line: &str| {
            let mut log = std::fs::OpenOptions::new()
                .append(true)
                .create(true)
                .open(&log)
                .unwrap();
            std::io::Write::write_all(&mut log, format!("{line}\n").as_bytes()).unwrap();
        };
        say("start");
        match behaviour.as_str() {
            "ready" => systemd::ready("fake"),
            "fed" => {
                systemd::ready("fake");
                let half = systemd::watchdog_interval().unwrap();
                let begin = std::time::Instant::now();
                while begin.elapsed() < 3 * 2 * half {
                    std::thread::sleep(half / 4);
                    systemd::watchdog();
                }
                say("fed");
            }
            "stopping" => {
                systemd::ready("fake");
                systemd::stopping(Duration::ZERO);
            }
            "accept" => {
                let sockets = ListenSockets::from_env().unwrap().unwrap();
                systemd::ready("fake");
                sockets.clients[0].set_nonblocking(false).unwrap();
                // Serves one connection, then crashes.
                let (mut stream, _) = sockets.clients[0].accept().unwrap();
                std::io::Write::write_all(&mut stream, b"served").unwrap();
                std::process::exit(1);
            }
            // With a child of its own that dies with it.
            "parent" => {
                let mut child = Command::new(env::current_exe().unwrap())
                    .args(["--exact", "serve::tests::fake_child", "--nocapture"])
                    .env(FAKE, "orphan")
                    .env(SUPERVISOR_PID, std::process::id().to_string())
                    .spawn()
                    .unwrap();
                child.wait().unwrap();
            }
            "orphan" => {
                die_with_parent().unwrap();
                println!("orphan bound");
            }
            other => panic!("{other}"),
        }
        // Does nothing more until it is killed.
        loop {
            std::thread::park();
        }
    }

    fn log_path(dir: &TempDir) -> PathBuf {
        dir.path().join("log")
    }

    fn log(dir: &TempDir) -> Vec<String> {
        let text = std::fs::read_to_string(log_path(dir)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Waits until the children's log says what it should.
    async fn until(dir: &TempDir, what: &str, holds: impl Fn(&[String]) -> bool) {
        let wait = async {
            while !holds(&log(dir)) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        assert!(
            timeout(DEADLINE, wait).await.is_ok(),
            "{what}: {:?}",
            log(dir)
        );
    }

    fn count(lines: &[String], line: &str) -> usize {
        lines.iter().filter(|other| *other == line).count()
    }

    /// One supervised child, alone.
    struct Alone {
        task: JoinHandle<anyhow::Result<()>>,
        stop: Stop,
        ready: watch::Receiver<bool>,
    }

    fn alone(spec: ChildSpec, timing: Timing) -> Alone {
        let stop = Stop::default();
        let (sender, ready) = watch::channel(false);
        let task = tokio::spawn(supervise(spec, timing, sender, stop.clone()));
        Alone { task, stop, ready }
    }

    impl Alone {
        async fn end(self) -> anyhow::Result<()> {
            timeout(DEADLINE, self.task).await.unwrap().unwrap()
        }

        async fn kill(self) {
            self.stop.term.cancel();
            self.stop.kill.cancel();
            self.end().await.unwrap();
        }
    }

    #[test]
    fn waits_double_up_to_a_bound_and_begin_anew_after_a_long_run() {
        let mut backoff = Backoff::new(&TIMING);
        let mut wait = |ran| backoff.after(Duration::from_millis(ran)).as_millis();
        let waits: Vec<_> = (0..8).map(|_| wait(9_999)).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000]);
        assert_eq!([wait(10_000), wait(0)], [100, 200]);
    }

    #[tokio::test]
    async fn a_child_that_dies_is_started_again_after_a_wait() {
        let dir = tempfile::tempdir().unwrap();
        let started = Instant::now();
        let timing = Timing {
            first_delay: Duration::from_millis(50),
            max_delay: Duration::from_millis(100),
            ..patient()
        };
        // Also one that is killed, and one that was told to go by somebody else, which is no reason
        // to wait longer.
        let script = "echo start >> $LOG; case $(wc -l < $LOG) in
            1) exit 1;; 2) exit 0;; 3) kill -9 $$;; *) exec sleep 1000;; esac";
        let child = alone(shell(&dir, "worker", script), timing);
        until(&dir, "four starts", |lines| lines.len() == 4).await;
        assert!(started.elapsed() >= Duration::from_millis(50 + 50 + 100));
        child.kill().await;
    }

    #[tokio::test]
    async fn a_program_that_cannot_be_started_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        let spec = ChildSpec {
            program: program.clone(),
            ..shell(&dir, "worker", "")
        };
        let child = alone(spec, patient());
        // Written whole and then given its name, for a file open for writing cannot be run.
        let new = dir.path().join("new");
        std::fs::write(&new, "#!/bin/sh\necho start >> $LOG\nexec sleep 1000\n").unwrap();
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o700)).unwrap();
        std::fs::rename(&new, &program).unwrap();
        until(&dir, "a start", |lines| !lines.is_empty()).await;
        child.kill().await;
    }

    #[tokio::test]
    async fn a_child_that_stops_feeding_its_watchdog_is_killed_and_started_again() {
        let dir = tempfile::tempdir().unwrap();
        let timing = Timing {
            watchdog: Duration::from_millis(100),
            ..patient()
        };
        let mut child = alone(fake(&dir, "worker", "ready"), timing);
        timeout(DEADLINE, child.ready.wait_for(|ready| *ready))
            .await
            .unwrap()
            .unwrap();
        until(&dir, "a restart", |lines| count(lines, "start") >= 2).await;
        child.kill().await;
    }

    #[tokio::test]
    async fn a_child_that_feeds_its_watchdog_lives() {
        let dir = tempfile::tempdir().unwrap();
        // It feeds eight times in this time, so a delay of the machine does no harm.
        let timing = Timing {
            watchdog: Duration::from_secs(1),
            ..patient()
        };
        let child = alone(fake(&dir, "worker", "fed"), timing);
        until(&dir, "three times the watchdog's time", |lines| {
            count(lines, "fed") == 1
        })
        .await;
        assert_eq!(count(&log(&dir), "start"), 1);
        child.kill().await;
    }

    #[tokio::test]
    async fn a_child_that_does_not_become_ready_is_killed_and_started_again() {
        let dir = tempfile::tempdir().unwrap();
        let timing = Timing {
            ready_within: Duration::from_millis(50),
            ..patient()
        };
        let child = alone(
            shell(&dir, "worker", "echo start >> $LOG; exec sleep 1000"),
            timing,
        );
        until(&dir, "restarts", |lines| count(lines, "start") >= 3).await;
        assert!(!*child.ready.borrow());
        child.kill().await;
    }

    #[tokio::test]
    async fn a_child_that_says_it_stops_but_does_not_is_killed_and_started_again() {
        let dir = tempfile::tempdir().unwrap();
        let timing = Timing {
            stop_within: Duration::from_millis(50),
            ..patient()
        };
        let child = alone(fake(&dir, "worker", "stopping"), timing);
        until(&dir, "a restart", |lines| count(lines, "start") >= 2).await;
        child.kill().await;
    }

    #[tokio::test]
    async fn a_child_that_ignores_being_told_to_stop_is_killed_in_time_and_not_started_again() {
        let dir = tempfile::tempdir().unwrap();
        let timing = Timing {
            stop_within: Duration::from_millis(100),
            ..patient()
        };
        let script = "trap '' INT; echo start >> $LOG; while :; do sleep 0.05; done";
        let child = alone(shell(&dir, "worker", script), timing);
        until(&dir, "a start", |lines| !lines.is_empty()).await;
        child.stop.term.cancel();
        child.end().await.unwrap();
        assert_eq!(log(&dir), ["start"]);
    }

    #[tokio::test]
    async fn a_stop_during_the_wait_before_a_restart_ends_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let timing = Timing {
            first_delay: NEVER,
            max_delay: NEVER,
            ..patient()
        };
        let child = alone(shell(&dir, "worker", "echo start >> $LOG; exit 1"), timing);
        until(&dir, "a start", |lines| !lines.is_empty()).await;
        child.stop.term.cancel();
        child.end().await.unwrap();
        assert_eq!(log(&dir), ["start"]);
    }

    const SLEEPER: &str = "trap 'echo stopped >> $LOG; exit 0' INT; echo start >> $LOG
        while :; do sleep 0.05; done";

    #[tokio::test]
    async fn a_child_that_refuses_its_configuration_ends_everything() {
        let dir = tempfile::tempdir().unwrap();
        let master = shell(&dir, "master", SLEEPER);
        let script = "while ! [ -s $LOG ]; do sleep 0.01; done; exit 78";
        let worker = shell(&dir, "worker 0", script);
        let (_signals, signals) = mpsc::channel(1);
        let all = supervise_all(master, vec![worker], patient(), signals, || (), || ());
        let error = timeout(DEADLINE, all).await.unwrap().unwrap_err();
        let error = error
            .downcast_ref::<ConfigError>()
            .expect("a ConfigError")
            .to_string();
        assert!(
            error.starts_with("worker 0 refuses its configuration"),
            "{error}"
        );
        assert_eq!(
            log(&dir),
            ["start", "stopped"],
            "the other child was told to stop"
        );
    }

    #[tokio::test]
    async fn workers_are_told_to_stop_all_at_once_and_the_master_once_they_have() {
        let dir = tempfile::tempdir().unwrap();
        // Each worker waits for the other's word before it ends.
        let wait_for = |own: &str, other: &str| {
            format!(
                "trap 'echo {own}-told >> $LOG
                       until grep -q {other}-told $LOG; do sleep 0.01; done
                       echo ended >> $LOG; exit 0' INT
                 echo start >> $LOG; while :; do sleep 0.05; done"
            )
        };
        let master = shell(
            &dir,
            "master",
            "trap 'echo master-told >> $LOG; exit 0' INT
             echo start >> $LOG; while :; do sleep 0.05; done",
        );
        let workers = [("a", "b"), ("b", "a")]
            .map(|(own, other)| shell(&dir, &format!("worker {own}"), &wait_for(own, other)));
        let (sender, signals) = mpsc::channel(1);
        let all = tokio::spawn(supervise_all(
            master,
            workers.into(),
            patient(),
            signals,
            || (),
            || (),
        ));
        until(&dir, "all to run", |lines| count(lines, "start") == 3).await;
        sender.send(Told::Stop).await.unwrap();
        timeout(DEADLINE, all).await.unwrap().unwrap().unwrap();
        let lines = log(&dir);
        assert_eq!(count(&lines, "ended"), 2, "{lines:?}");
        assert_eq!(lines.last().map(String::as_str), Some("master-told"));
    }

    #[tokio::test]
    async fn a_second_signal_kills_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let script = "trap 'echo told >> $LOG' INT; echo start >> $LOG
                      while :; do sleep 0.05; done";
        let master = shell(&dir, "master", script);
        let worker = shell(&dir, "worker 0", script);
        let (sender, signals) = mpsc::channel(1);
        let all = tokio::spawn(supervise_all(
            master,
            vec![worker],
            patient(),
            signals,
            || (),
            || (),
        ));
        until(&dir, "both to run", |lines| count(lines, "start") == 2).await;
        sender.send(Told::Stop).await.unwrap();
        until(&dir, "the worker to be told", |lines| {
            count(lines, "told") == 1
        })
        .await;
        assert!(!all.is_finished());
        sender.send(Told::Stop).await.unwrap();
        timeout(DEADLINE, all).await.unwrap().unwrap().unwrap();
    }

    #[tokio::test]
    async fn the_announcement_comes_once_when_the_master_and_any_worker_are_ready() {
        let dir = tempfile::tempdir().unwrap();
        let master = fake(&dir, "master", "ready");
        // One worker never gets there; the other dies again and again.
        let workers = vec![
            shell(&dir, "worker 0", "exec sleep 1000"),
            fake(&dir, "worker 1", "ready"),
        ];
        let (sender, signals) = mpsc::channel(2);
        let (announced, mut announcements) = mpsc::channel(9);
        let timing = Timing {
            watchdog: Duration::from_millis(50),
            ..patient()
        };
        let all = tokio::spawn(supervise_all(
            master,
            workers,
            timing,
            signals,
            || (),
            move || {
                announced.try_send(()).unwrap();
            },
        ));
        timeout(DEADLINE, announcements.recv())
            .await
            .unwrap()
            .unwrap();
        until(&dir, "restarts", |lines| count(lines, "start") >= 6).await;
        sender.send(Told::Stop).await.unwrap();
        sender.send(Told::Stop).await.unwrap();
        timeout(DEADLINE, all).await.unwrap().unwrap().unwrap();
        assert_eq!(announcements.recv().await, None, "only once");
    }

    #[tokio::test]
    async fn no_announcement_without_a_worker() {
        let dir = tempfile::tempdir().unwrap();
        let (sender, signals) = mpsc::channel(2);
        let workers = vec![shell(
            &dir,
            "worker 0",
            "echo start >> $LOG; exec sleep 1000",
        )];
        let mut all = Box::pin(supervise_all(
            fake(&dir, "master", "stopping"),
            workers,
            patient(),
            signals,
            || (),
            || panic!("announced"),
        ));
        let both = until(&dir, "both to run", |lines| count(lines, "start") == 2);
        tokio::select! {
            ended = &mut all => panic!("{ended:?}"),
            () = both => {}
        }
        sender.send(Told::Stop).await.unwrap();
        sender.send(Told::Stop).await.unwrap();
        timeout(DEADLINE, all).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn connections_wait_while_a_master_that_died_starts_again() {
        let dir = tempfile::tempdir().unwrap();
        let sockets = ListenSockets::bind(0, dir.path()).unwrap();
        let port = sockets.clients[0].local_addr().unwrap().port();
        let household = Household {
            program: env::current_exe().unwrap(),
            runtime_dir: dir.path(),
            env: fake(&dir, "master", "accept").env,
            secret: None,
        };
        let args = fake(&dir, "", "").args;
        let master = ChildSpec {
            args,
            ..household.master(sockets)
        };
        let child = alone(master, patient());
        // Each start serves one only, so all but the first wait for the next.
        let mut clients: Vec<_> = (0..3)
            .map(|_| std::net::TcpStream::connect(("127.0.0.1", port)).expect("not refused"))
            .collect();
        let read = tokio::task::spawn_blocking(move || {
            for client in &mut clients {
                client.set_read_timeout(Some(DEADLINE)).unwrap();
                let mut served = String::new();
                client.read_to_string(&mut served).unwrap();
                assert_eq!(served, "served");
            }
        });
        timeout(DEADLINE, read).await.unwrap().unwrap();
        assert!(count(&log(&dir), "start") >= 3);
        child.kill().await;
    }

    #[test]
    fn children_of_a_killed_supervisor_die() {
        let dir = tempfile::tempdir().unwrap();
        let spec = fake(&dir, "supervisor", "parent");
        let mut parent = Command::new(&spec.program)
            .args(&spec.args)
            .envs(spec.env)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // The child inherits the pipe: it ends when both are gone.
        let mut output = BufReader::new(parent.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("orphan bound") {
            line.clear();
            assert_ne!(
                output.read_line(&mut line).unwrap(),
                0,
                "the child did not start"
            );
        }
        parent.kill().unwrap();
        let (sender, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            output.read_to_string(&mut String::new()).unwrap();
            sender.send(()).unwrap();
        });
        let ended = ended.recv_timeout(DEADLINE);
        parent.wait().unwrap();
        ended.expect("the child outlives its supervisor");
    }

    #[test]
    fn the_runtime_directory_is_private_short_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(90));
        std::fs::create_dir(&long).unwrap();
        let missing = dir.path().join("missing");
        let bases = [long.clone(), missing.clone(), dir.path().to_owned()];
        let made = RuntimeDir::create_in_first(bases.into_iter()).unwrap();
        let path = made.path().to_owned();
        assert_eq!(path.parent(), Some(dir.path()));
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o700
        );
        let sockets = ListenSockets::bind(0, &path).unwrap();
        std::os::unix::net::UnixDatagram::bind(path.join(LONGEST_SOCKET_NAME)).unwrap();
        drop((made, sockets));
        assert!(!path.exists());

        let error = RuntimeDir::create_in_first([long, missing].into_iter()).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("too long") && error.contains("No such file"),
            "{error}"
        );
    }
}
