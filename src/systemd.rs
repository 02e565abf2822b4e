//! What systemd, or `banter serve` in its place, gives a process and wants to hear from it: listening
//! sockets by name, directories, and the notifications of sd_notify(3).

use std::env;
use std::ffi::OsString;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::anyhow;
use listenfd::ListenFd;
use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, sockopt};
use sd_notify::NotifyState;

use crate::ConfigError;
use crate::cli;
use crate::handoff::bind_unix;

/// Name (`FileDescriptorName=`) of the TCP sockets that clients connect to; one or more.
pub const NAME_CLIENTS: &str = "banter";
/// Name of the unix stream socket for the control streams; exactly one.
pub const NAME_CONTROL: &str = "banter-control";
/// Name of the unix seqpacket socket for the hand-off of connections; exactly one.
pub const NAME_HANDOFF: &str = "banter-handoff";

/// Name of the control socket in the runtime directory.
pub const CONTROL_SOCKET: &str = "control.sock";
/// Name of the hand-off socket in the runtime directory.
pub const HANDOFF_SOCKET: &str = "handoff.sock";

/// Connections that may wait to be accepted, if `net.core.somaxconn` (4096 by default) allows.
const BACKLOG: i32 = 4096;

/// The listening sockets of a master, all of them non-blocking and close-on-exec.
#[derive(Debug)]
pub struct ListenSockets {
    /// Where clients connect; never empty. For [`tokio::net::TcpListener::from_std`].
    pub clients: Vec<TcpListener>,
    /// Where workers open their control streams. For [`tokio::net::UnixListener::from_std`].
    pub control: UnixListener,
    /// Where workers take connections. For [`crate::handoff::Listener::from_fd`].
    pub handoff: OwnedFd,
}

/// What can be wrong with the sockets that were passed in.
#[derive(Debug, thiserror::Error)]
pub enum ActivationError {
    /// Sockets without names.
    #[error(
        "LISTEN_FDS passes {fds} sockets but LISTEN_FDNAMES is not set; give each .socket unit its \
         FileDescriptorName="
    )]
    NoNames {
        /// How many sockets there are.
        fds: usize,
    },
    /// Not as many names as sockets.
    #[error("LISTEN_FDS passes {fds} sockets but LISTEN_FDNAMES={names:?} has {count} names")]
    NameCount {
        /// How many sockets there are.
        fds: usize,
        /// How many names there are.
        count: usize,
        /// The names, as given.
        names: String,
    },
    /// A socket that must be there is not.
    #[error("no socket named {name:?} ({what}) was passed in; LISTEN_FDNAMES={names:?}")]
    Missing {
        /// The name looked for.
        name: &'static str,
        /// What it should be.
        what: &'static str,
        /// The names that there are.
        names: String,
    },
    /// A socket of which there must be one is there more than once.
    #[error("{count} sockets named {name:?} were passed in, but there must be exactly one")]
    Doubled {
        /// The name.
        name: &'static str,
        /// How many there are.
        count: usize,
    },
    /// A socket of another type, or not a socket.
    #[error("the socket named {name:?} is not a {what}: {source}")]
    WrongType {
        /// The name.
        name: &'static str,
        /// What it should be.
        what: &'static str,
        /// What the check says.
        source: io::Error,
    },
}

const WHAT_CLIENTS: &str = "listening TCP socket";
const WHAT_CONTROL: &str = "listening unix stream socket";
const WHAT_HANDOFF: &str = "listening unix seqpacket socket";

impl ListenSockets {
    /// Takes the sockets that `LISTEN_FDS` passes to this process, by their names in
    /// `LISTEN_FDNAMES`; `None` if there are none, or they are for another process (`LISTEN_PID`).
    /// Sockets of other names are left alone.
    ///
    /// Call it once and early: it removes `LISTEN_FDS` and `LISTEN_PID` from the environment, which
    /// other threads must not read at the same time, and a second call finds nothing.
    ///
    /// # Errors
    ///
    /// [`ActivationError`] if one is missing, doubled or of the wrong type.
    pub fn from_env() -> Result<Option<Self>, ActivationError> {
        // Before ListenFd, which knows no names.
        let names = env::var("LISTEN_FDNAMES").ok();
        let mut fds = ListenFd::from_env();
        if fds.len() == 0 {
            return Ok(None);
        }
        let names = names.ok_or(ActivationError::NoNames { fds: fds.len() })?;
        let places = Places::find(&names, fds.len())?;
        let clients = places
            .clients
            .iter()
            .map(|&index| {
                let taken = fds.take_tcp_listener(index);
                let listener = listening(taken, NAME_CLIENTS, WHAT_CLIENTS)?;
                listener
                    .set_nonblocking(true)
                    .map_err(wrong_type(NAME_CLIENTS, WHAT_CLIENTS))?;
                Ok(listener)
            })
            .collect::<Result<_, ActivationError>>()?;
        let taken = fds.take_unix_listener(places.control);
        let control = listening(taken, NAME_CONTROL, WHAT_CONTROL)?;
        control
            .set_nonblocking(true)
            .map_err(wrong_type(NAME_CONTROL, WHAT_CONTROL))?;
        let taken = fds.take_custom::<OwnedFd>(
            places.handoff,
            i32::from(AddressFamily::UNIX.as_raw()),
            SocketType::SEQPACKET.as_raw().cast_signed(),
            "unix seqpacket socket",
        );
        let handoff = listening(taken, NAME_HANDOFF, WHAT_HANDOFF)?;
        rustix::io::ioctl_fionbio(&handoff, true)
            .map_err(|errno| wrong_type(NAME_HANDOFF, WHAT_HANDOFF)(errno.into()))?;
        Ok(Some(Self {
            clients,
            control,
            handoff,
        }))
    }

    /// Binds the sockets where nobody passes them in: TCP on every address, IPv6 and IPv4, and
    /// [`CONTROL_SOCKET`] and [`HANDOFF_SOCKET`] in `runtime_dir`, which must exist.
    ///
    /// `port` 0 is any free one.
    ///
    /// # Errors
    ///
    /// If the port is in use or not allowed, with a text that names it; if the sockets in
    /// `runtime_dir` cannot be bound.
    pub fn bind(port: u16, runtime_dir: &Path) -> anyhow::Result<Self> {
        let clients = vec![bind_clients(port)?];
        let control = bind_unix(&runtime_dir.join(CONTROL_SOCKET), SocketType::STREAM)?.into();
        let handoff = bind_unix(&runtime_dir.join(HANDOFF_SOCKET), SocketType::SEQPACKET)?;
        Ok(Self {
            clients,
            control,
            handoff,
        })
    }
}

fn bind_clients(port: u16) -> anyhow::Result<TcpListener> {
    let bound = listen((Ipv6Addr::UNSPECIFIED, port).into()).or_else(|error| {
        // Where IPv6 is switched off.
        match Errno::from_io_error(&error) {
            Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => {
                listen((Ipv4Addr::UNSPECIFIED, port).into())
            }
            _ => Err(error),
        }
    });
    bound.map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => anyhow!(
            "port {port} is in use by another program; stop that one, or choose another port with \
             --port (PORT)"
        ),
        io::ErrorKind::PermissionDenied => anyhow!(
            "port {port} needs privileges; choose one from 1024 on with --port (PORT), or let \
             systemd pass the socket in"
        ),
        _ => anyhow!("cannot listen on port {port}: {error}"),
    })
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let domain = socket2::Domain::for_address(address);
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // Else connections of the last run in TIME_WAIT would keep the port.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// The socket taken, if it is one that connections can be accepted from.
fn listening<T: AsFd>(
    taken: io::Result<Option<T>>,
    name: &'static str,
    what: &'static str,
) -> Result<T, ActivationError> {
    let checked = taken.and_then(|socket| {
        let socket = socket.ok_or_else(|| io::Error::other("it was taken before"))?;
        match sockopt::socket_acceptconn(&socket)? {
            true => Ok(socket),
            false => Err(io::Error::other("it does not listen")),
        }
    });
    checked.map_err(wrong_type(name, what))
}

fn wrong_type(name: &'static str, what: &'static str) -> impl Fn(io::Error) -> ActivationError {
    move |source| ActivationError::WrongType { name, what, source }
}

/// At which position each socket was passed in.
#[derive(Debug, PartialEq, Eq)]
struct Places {
    clients: Vec<usize>,
    control: usize,
    handoff: usize,
}

impl Places {
    /// Finds them in the value of `LISTEN_FDNAMES`, which must name `fds` sockets.
    fn find(names: &str, fds: usize) -> Result<Self, ActivationError> {
        let list: Vec<&str> = names.split(':').collect();
        if list.len() != fds {
            let (count, names) = (list.len(), names.to_owned());
            return Err(ActivationError::NameCount { fds, count, names });
        }
        let all = |name: &'static str, what: &'static str| {
            let places: Vec<usize> = (0..fds).filter(|&index| list[index] == name).collect();
            if places.is_empty() {
                return Err(ActivationError::Missing {
                    name,
                    what,
                    names: names.to_owned(),
                });
            }
            Ok(places)
        };
        let one = |name, what| match all(name, what)?.as_slice() {
            &[index] => Ok(index),
            places => Err(ActivationError::Doubled {
                name,
                count: places.len(),
            }),
        };
        Ok(Self {
            clients: all(NAME_CLIENTS, WHAT_CLIENTS)?,
            control: one(NAME_CONTROL, WHAT_CONTROL)?,
            handoff: one(NAME_HANDOFF, WHAT_HANDOFF)?,
        })
    }
}

/// Tells that the process serves from now on, with a sentence on its state.
///
/// This and the other notifications do nothing where `NOTIFY_SOCKET` is not set; that one cannot be
/// sent is logged at debug and is no reason to stop.
pub fn ready(status: &str) {
    READY.store(true, Ordering::Release);
    let mut last = STATUS.lock();
    last.text = one_line(status);
    notify(&[NotifyState::Ready, NotifyState::Status(&last.sentence())]);
}

/// Tells the state in a sentence that `systemctl status` shows. The same again is not sent.
pub fn status(text: &str) {
    STATUS.lock().update(|status| status.text = one_line(text));
}

/// Has the status begin with something that is wrong, until it is right again (`None`).
pub fn complain(what: Option<&str>) {
    STATUS
        .lock()
        .update(|status| status.complaint = what.map(one_line));
}

/// Whether [`ready`] was called.
static READY: AtomicBool = AtomicBool::new(false);

/// The last status.
static STATUS: Mutex<Status> = Mutex::new(Status::new());

#[derive(Debug, Clone, PartialEq, Eq)]
struct Status {
    text: String,
    complaint: Option<String>,
}

impl Status {
    const fn new() -> Self {
        Self {
            text: String::new(),
            complaint: None,
        }
    }

    fn update(&mut self, change: impl FnOnce(&mut Self)) {
        let before = self.clone();
        change(self);
        if *self != before {
            notify(&[NotifyState::Status(&self.sentence())]);
        }
    }

    fn sentence(&self) -> String {
        match &self.complaint {
            Some(complaint) => format!("{complaint}; {}", self.text),
            None => self.text.clone(),
        }
    }
}

/// Tells that the settings are being read again; [`reloaded`] has to follow. Before the process is
/// ready, neither says anything.
pub fn reloading() {
    if !READY.load(Ordering::Acquire) {
        return;
    }
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(error) => tracing::debug!(%error, "the clock cannot be read"),
    }
}

/// Tells that the settings have been read.
pub fn reloaded() {
    if READY.load(Ordering::Acquire) {
        notify(&[NotifyState::Ready]);
    }
}

/// Tells that the process is on its way out, which takes no longer than `within`.
pub fn stopping(within: Duration) {
    notify(&[NotifyState::Stopping, extend(within)]);
}

fn extend(time: Duration) -> NotifyState<'static> {
    NotifyState::ExtendTimeoutUsec(u32::try_from(time.as_micros()).unwrap_or(u32::MAX))
}

/// Tells that the process is alive. Call it each [`watchdog_interval`] from the loop that does the
/// work, so that it stops when the work does.
pub fn watchdog() {
    notify(&[NotifyState::Watchdog]);
}

/// Asks that a start, which goes on, may take so long from now on.
pub fn starting(within: Duration) {
    notify(&[extend(within)]);
}

/// How often [`watchdog`] is to be called, half of the time after which the process would be
/// killed; `None` if nobody watches.
pub fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled()
        .filter(|timeout| !timeout.is_zero())
        .map(|timeout| timeout / 2)
}

/// Whether systemd itself started this process, as `ExecStart=` of a unit (systemd.exec(5),
/// `$SYSTEMD_EXEC_PID`).
pub fn is_main_process() -> bool {
    env::var("SYSTEMD_EXEC_PID").is_ok_and(|pid| pid == std::process::id().to_string())
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, ?state, "cannot notify the service manager");
    }
}

/// A number of things in words, for a status.
pub fn count(number: impl Into<u64>, thing: &str) -> String {
    match number.into() {
        1 => format!("1 {thing}"),
        number => format!("{number} {thing}s"),
    }
}

/// A line break would begin another assignment of the protocol.
fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

/// Where state is kept: the flag, else `$STATE_DIRECTORY`, else `banter` in the XDG data directory.
///
/// # Errors
///
/// [`ConfigError`] if none of them is set.
pub fn state_dir(args: &cli::StateArgs) -> Result<PathBuf, ConfigError> {
    find_state_dir(args.state_dir.clone(), |name| env::var_os(name))
}

/// Where the sockets between master and workers are: the flag, else `$RUNTIME_DIRECTORY`, else
/// `banter` in `$XDG_RUNTIME_DIR`.
///
/// # Errors
///
/// [`ConfigError`] if none of them is set.
pub fn runtime_dir(args: &cli::RuntimeArgs) -> Result<PathBuf, ConfigError> {
    find_runtime_dir(args.runtime_dir.clone(), |name| env::var_os(name))
}

fn find_state_dir(
    flag: Option<PathBuf>,
    var: impl Fn(&str) -> Option<OsString>,
) -> Result<PathBuf, ConfigError> {
    flag.or_else(|| first_directory(var("STATE_DIRECTORY")))
        .or_else(|| Some(absolute(var("XDG_DATA_HOME"))?.join("banter")))
        .or_else(|| Some(absolute(var("HOME"))?.join(".local/share/banter")))
        .ok_or_else(|| {
            ConfigError::new(
                "no directory for the state: set --state-dir (BANTER_STATE_DIR), STATE_DIRECTORY, \
                 XDG_DATA_HOME or HOME",
            )
        })
}

fn find_runtime_dir(
    flag: Option<PathBuf>,
    var: impl Fn(&str) -> Option<OsString>,
) -> Result<PathBuf, ConfigError> {
    flag.or_else(|| first_directory(var("RUNTIME_DIRECTORY")))
        .or_else(|| Some(absolute(var("XDG_RUNTIME_DIR"))?.join("banter")))
        .ok_or_else(|| {
            ConfigError::new(
                "no directory for the sockets: set --runtime-dir (BANTER_RUNTIME_DIR), \
                 RUNTIME_DIRECTORY or XDG_RUNTIME_DIR",
            )
        })
}

/// systemd separates several directories by colons; the first is the unit's main one.
fn first_directory(value: Option<OsString>) -> Option<PathBuf> {
    absolute(Some(value?.to_str()?.split(':').next()?.into()))
}

/// XDG says that relative paths (and an empty value) are to be ignored.
pub(crate) fn absolute(value: Option<OsString>) -> Option<PathBuf> {
    value.map(PathBuf::from).filter(|path| path.is_absolute())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    use command_fds::{CommandFdExt, FdMapping};
    use rustix::net::{SocketFlags, socket_with};

    use super::*;
    use crate::handoff;

    #[test]
    fn sockets_are_found_by_name_in_any_order() {
        let places = Places::find("banter-handoff:banter:other:banter-control:banter", 5).unwrap();
        assert_eq!(
            places,
            Places {
                clients: vec![1, 4],
                control: 3,
                handoff: 0
            }
        );
    }

    #[test]
    fn a_missing_or_doubled_name_is_an_error_that_names_it() {
        for (names, told) in [
            (
                "banter-control:banter-handoff",
                "no socket named \"banter\"",
            ),
            (
                "banter:banter-handoff",
                "no socket named \"banter-control\"",
            ),
            (
                "banter:banter-control",
                "no socket named \"banter-handoff\"",
            ),
            (
                "banter:banter-control:banter-handoff:banter-control",
                "2 sockets named \"banter-control\"",
            ),
            (
                "banter:banter-control:banter-handoff:banter-handoff",
                "2 sockets named \"banter-handoff\"",
            ),
        ] {
            let error = Places::find(names, names.split(':').count()).unwrap_err();
            assert!(error.to_string().starts_with(told), "{names}: {error}");
        }
        let error = Places::find("banter:banter-control", 3).unwrap_err();
        assert!(
            matches!(
                error,
                ActivationError::NameCount {
                    fds: 3,
                    count: 2,
                    ..
                }
            ),
            "{error}"
        );
    }

    /// Runs one test of this module in a process of its own, with `LISTEN_FDS` and other variables.
    struct Reexec {
        command: Command,
        fds: Vec<FdMapping>,
    }

    const CHILD: &str = "BANTER_TEST_CHILD";

    impl Reexec {
        fn new(test: &str) -> Self {
            let mut command = Command::new(env::current_exe().unwrap());
            command.args(["--exact", &format!("systemd::tests::{test}"), "--nocapture"]);
            command.env(CHILD, "1").env_remove("LISTEN_FDNAMES");
            Self {
                command,
                fds: Vec::new(),
            }
        }

        fn env(mut self, name: &str, value: &str) -> Self {
            self.command.env(name, value);
            self
        }

        fn socket(mut self, fd: impl Into<OwnedFd>) -> Self {
            let child_fd = 3 + i32::try_from(self.fds.len()).unwrap();
            self.fds.push(FdMapping {
                parent_fd: fd.into(),
                child_fd,
            });
            self
        }

        /// What the test prints as `told: …`.
        fn told(mut self) -> String {
            self.command.env("LISTEN_FDS", self.fds.len().to_string());
            self.command.fd_mappings(self.fds).unwrap();
            let output = self.command.output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            assert!(
                output.status.success(),
                "{text}{}",
                String::from_utf8_lossy(&output.stderr)
            );
            let (_, told) = text.split_once("told: ").unwrap();
            told.lines().next().unwrap().to_owned()
        }
    }

    fn tcp() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").unwrap()
    }

    fn control(dir: &Path) -> UnixListener {
        UnixListener::bind(dir.join("control.sock")).unwrap()
    }

    #[test]
    fn sockets_passed_in_are_taken_ready_to_accept() {
        if env::var_os(CHILD).is_some() {
            let taken = ListenSockets::from_env().unwrap().unwrap();
            let again = ListenSockets::from_env().unwrap();
            assert!(again.is_none());
            let blocked = taken.clients[0].accept().unwrap_err();
            assert_eq!(blocked.kind(), io::ErrorKind::WouldBlock);
            let blocked = taken.control.accept().unwrap_err();
            assert_eq!(blocked.kind(), io::ErrorKind::WouldBlock);
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let handoff = handoff::Listener::from_fd(taken.handoff).unwrap();
                handoff.accept().await.unwrap();
            });
            let port = taken.clients[1].local_addr().unwrap().port();
            println!("told: {} {port}", taken.clients.len());
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handoff.sock");
        let second = tcp();
        let port = second.local_addr().unwrap().port();
        let handoff = handoff::bind_fd(&path).unwrap();
        // Waits in the backlog until the child accepts it.
        let waiting = socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let address = rustix::net::SocketAddrUnix::new(&path).unwrap();
        rustix::net::connect(&waiting, &address).unwrap();
        let told = Reexec::new("sockets_passed_in_are_taken_ready_to_accept")
            .env(
                "LISTEN_FDNAMES",
                "banter:banter-handoff:banter-control:banter",
            )
            .socket(tcp())
            .socket(handoff)
            .socket(control(dir.path()))
            .socket(second)
            .told();
        assert_eq!(told, format!("2 {port}"));
    }

    #[test]
    fn what_is_wrong_with_sockets_passed_in_is_told_by_name() {
        const NAME: &str = "what_is_wrong_with_sockets_passed_in_is_told_by_name";
        if env::var_os(CHILD).is_some() {
            match ListenSockets::from_env() {
                Ok(sockets) => println!("told: {}", sockets.is_some()),
                Err(error) => println!("told: {error}"),
            }
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handoff.sock");
        let handoff = handoff::bind_fd(&path).unwrap();
        let control = control(dir.path());
        let names = "banter:banter-control:banter-handoff";
        let control = || control.try_clone().unwrap();
        let handoff = || handoff.try_clone().unwrap();
        let run = |first: OwnedFd, second: OwnedFd, third: OwnedFd| {
            Reexec::new(NAME)
                .env("LISTEN_FDNAMES", names)
                .socket(first)
                .socket(second)
                .socket(third)
                .told()
        };
        assert_eq!(run(tcp().into(), control().into(), handoff()), "true");

        let told = run(control().into(), control().into(), handoff());
        assert!(
            told.contains("\"banter\" is not a listening TCP socket"),
            "{told}"
        );
        let told = run(tcp().into(), handoff(), handoff());
        assert!(
            told.contains("\"banter-control\" is not a listening unix stream"),
            "{told}"
        );
        let told = run(tcp().into(), control().into(), control().into());
        assert!(
            told.contains("\"banter-handoff\" is not a listening unix seqpacket"),
            "{told}"
        );
        let file = std::fs::File::open("/dev/null").unwrap();
        let told = run(file.into(), control().into(), handoff());
        assert!(
            told.contains("\"banter\" is not a listening TCP socket"),
            "{told}"
        );
        let (stream, _other) = UnixStream::pair().unwrap();
        let told = run(tcp().into(), stream.into(), handoff());
        assert!(
            told.contains("\"banter-control\"") && told.contains("does not listen"),
            "{told}"
        );

        let told = Reexec::new(NAME).socket(tcp()).told();
        assert!(told.contains("LISTEN_FDNAMES is not set"), "{told}");
        let told = Reexec::new(NAME)
            .socket(tcp())
            .env("LISTEN_PID", "1")
            .told();
        assert_eq!(told, "false", "sockets for another process");
        assert_eq!(Reexec::new(NAME).told(), "false");
    }

    #[test]
    fn sockets_bound_here_take_both_ip_versions_and_tell_a_port_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let bound = ListenSockets::bind(0, dir.path()).unwrap();
        let port = bound.clients[0].local_addr().unwrap().port();
        let client = std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        // Who closes first has the connection in TIME_WAIT, and with it the port.
        drop(bound.clients[0].accept().unwrap());
        drop(client);
        if bound.clients[0].local_addr().unwrap().is_ipv6() {
            std::net::TcpStream::connect((Ipv6Addr::LOCALHOST, port)).unwrap();
        }
        UnixStream::connect(dir.path().join(CONTROL_SOCKET)).unwrap();

        let other = tempfile::tempdir().unwrap();
        let error = ListenSockets::bind(port, other.path())
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with(&format!("port {port} is in use")),
            "{error}"
        );
        let error = ListenSockets::bind(0, dir.path()).unwrap_err().to_string();
        assert!(error.contains(CONTROL_SOCKET), "{error}");
        drop(bound);
        ListenSockets::bind(port, dir.path()).expect("what is left of the last run is no obstacle");
    }

    #[test]
    fn notifications_go_to_the_notify_socket_one_line_each_and_repeatedly() {
        if env::var_os(CHILD).is_some() {
            ready("2 workers\nREADY=0");
            watchdog();
            status("3 workers");
            stopping(Duration::from_secs(3));
            println!("told: {:?}", watchdog_interval());
            return;
        }
        const NAME: &str = "notifications_go_to_the_notify_socket_one_line_each_and_repeatedly";
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify.sock");
        let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let told = Reexec::new(NAME)
            .env("NOTIFY_SOCKET", path.to_str().unwrap())
            .env("WATCHDOG_USEC", "10000000")
            .told();
        assert_eq!(told, "Some(5s)");
        let mut buffer = [0; 256];
        for expected in [
            "READY=1\nSTATUS=2 workers READY=0\n",
            "WATCHDOG=1\n",
            "STATUS=3 workers\n",
            "STOPPING=1\nEXTEND_TIMEOUT_USEC=3000000\n",
        ] {
            let length = socket.recv(&mut buffer).unwrap();
            assert_eq!(std::str::from_utf8(&buffer[..length]).unwrap(), expected);
        }
        // Nobody there any more: not an error.
        drop(socket);
        let told = Reexec::new(NAME)
            .env("NOTIFY_SOCKET", path.to_str().unwrap())
            .told();
        assert_eq!(told, "None");
    }

    #[test]
    fn directories_come_from_the_flag_then_systemd_then_xdg() {
        let state = |flag: Option<&str>, vars: &[(&str, &str)]| {
            find_state_dir(flag.map(PathBuf::from), |name| {
                vars.iter()
                    .find(|var| var.0 == name)
                    .map(|var| var.1.into())
            })
            .map_err(|error| error.to_string())
        };
        let systemd = ("STATE_DIRECTORY", "/var/lib/banter:/var/lib/other");
        let (xdg, home) = (("XDG_DATA_HOME", "/data"), ("HOME", "/home/ann"));
        assert_eq!(
            state(Some("here"), &[systemd, xdg, home]),
            Ok("here".into())
        );
        assert_eq!(
            state(None, &[systemd, xdg, home]),
            Ok("/var/lib/banter".into())
        );
        assert_eq!(state(None, &[xdg, home]), Ok("/data/banter".into()));
        assert_eq!(
            state(None, &[home]),
            Ok("/home/ann/.local/share/banter".into())
        );
        let relative = [("STATE_DIRECTORY", ""), ("XDG_DATA_HOME", "data"), home];
        assert_eq!(
            state(None, &relative),
            Ok("/home/ann/.local/share/banter".into())
        );
        assert!(state(None, &[]).unwrap_err().contains("--state-dir"));

        let runtime = |flag: Option<&str>, vars: &[(&str, &str)]| {
            find_runtime_dir(flag.map(PathBuf::from), |name| {
                vars.iter()
                    .find(|var| var.0 == name)
                    .map(|var| var.1.into())
            })
            .map_err(|error| error.to_string())
        };
        let (systemd, xdg) = (
            ("RUNTIME_DIRECTORY", "/run/banter"),
            ("XDG_RUNTIME_DIR", "/run/1"),
        );
        assert_eq!(runtime(Some("/here"), &[systemd, xdg]), Ok("/here".into()));
        assert_eq!(runtime(None, &[systemd, xdg]), Ok("/run/banter".into()));
        assert_eq!(runtime(None, &[xdg]), Ok("/run/1/banter".into()));
        assert!(runtime(None, &[]).unwrap_err().contains("--runtime-dir"));
    }
}
