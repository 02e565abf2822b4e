//! Passing accepted TCP connections from the master to a worker.
//!
//! The two are joined by a unix socket of type `SOCK_SEQPACKET`. One datagram is one frame: JSON, at
//! most [`MAX_FRAME`] bytes, and an [`Offer`] carries exactly one file descriptor with it
//! (`SCM_RIGHTS`). The life of a connection on this socket:
//!
//! 1. The worker says who it is ([`ToMaster::Hello`]) and how many offers it allows to be unanswered
//!    ([`ToMaster::Credit`]). Without credit the master sends nothing: a worker that never reads would
//!    otherwise swallow hundreds of connections, and all of them would be reset when it dies.
//! 2. The master sends an [`Offer`] and keeps its own copy of the descriptor
//!    ([`MasterEnd::send`] only borrows it).
//! 3. The worker answers [`ToMaster::Ack`] before it reads a byte of the connection, or
//!    [`ToMaster::Refuse`]. An unanswered offer goes to another worker, so a worker must refuse one
//!    that is older than [`OFFER_MAX_AGE_MS`] ([`Offer::is_stale`]).
//!
//! Everything here may be used by several tasks at once through a shared reference, and every
//! `recv` and `send` is cancel safe: a future that is dropped has transferred all of a frame or
//! nothing of it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};

/// The version of the frames, as a worker states it in [`ToMaster::Hello`].
pub const PROTOCOL: u32 = crate::control::PROTOCOL;

/// The most bytes of a frame.
pub const MAX_FRAME: usize = 1024;

/// The most unacknowledged offers that a worker may allow.
///
/// Far below what the socket's buffer holds (about 278 descriptors), so that sending an offer for
/// which there is credit never has to wait.
pub const MAX_WINDOW: u32 = 32;

/// The most that a worker may allow beyond its window, for addresses with living sessions.
pub const MAX_RESERVE: u32 = 32;

/// The age, in milliseconds, beyond which a worker refuses an offer.
///
/// The master gives an offer that stayed unacknowledged for 500 ms to another worker. Were a worker
/// to take a later one, two workers would answer the same client. The 100 ms between are for the
/// acknowledgement's way back.
pub const OFFER_MAX_AGE_MS: u64 = 400;

/// Connections that may wait in the listener's backlog; more than there will ever be workers.
const BACKLOG: i32 = 1024;

/// A frame from the master to a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ToWorker {
    /// A connection; its descriptor travels with the frame.
    Offer(Offer),
}

/// A connection that the master offers to a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// What the worker answers with; unique on this socket.
    pub seq: u64,
    /// The address that the TCP connection comes from, maybe a proxy's.
    pub peer: SocketAddr,
    /// The client's address: the peer's, or what a trusted proxy says.
    pub client: IpAddr,
    /// How that address is known.
    pub known_by: KnownBy,
    /// When the master sent it ([`monotonic_millis`]).
    pub at: u64,
}

/// How the master knows a client's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KnownBy {
    /// By the connection: its peer is no proxy, or began with a PROXY header. All that comes on it is
    /// this client's.
    Connection,
    /// By the first request, in which a trusted proxy named its client, or nobody. The next request
    /// on this connection could be somebody else's.
    Request,
    /// By nothing: a trusted proxy had not said in time whom it speaks for. Its own address counts.
    Silence,
}

impl Offer {
    /// Whether the offer is too old to be taken, `now` being [`monotonic_millis`]: the master may
    /// have given it to another worker already.
    pub fn is_stale(&self, now: u64) -> bool {
        now.saturating_sub(self.at) > OFFER_MAX_AGE_MS
    }
}

/// A frame from a worker to the master.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ToMaster {
    /// The first frame: who speaks.
    Hello {
        /// The sender's [`PROTOCOL`].
        protocol: u32,
        /// The worker's number.
        worker: u32,
        /// Tells one start of this worker from another.
        boot: String,
    },
    /// The worker serves the connection from now on; the master closes its copy.
    Ack {
        /// The offer's number.
        seq: u64,
    },
    /// The worker does not take the connection; the master finds another worker.
    Refuse {
        /// The offer's number.
        seq: u64,
    },
    /// How many offers the worker allows from now on; replaces what it said before.
    Credit(Credit),
}

/// What a worker is ready to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credit {
    /// How many offers may be unacknowledged at a time, at most [`MAX_WINDOW`].
    pub window: u32,
    /// How many more, for addresses with living sessions on this worker, at most [`MAX_RESERVE`].
    pub reserve: u32,
    /// Why the window is what it is.
    pub state: WorkerState,
}

/// What a worker is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkerState {
    /// Not serving yet.
    Starting,
    /// Serving.
    Serving,
    /// At its limit of connections.
    Full,
    /// On its way out: it finishes what it has.
    Draining,
}

/// What can go wrong with a hand-off.
///
/// After [`NotAFrame`](Self::NotAFrame), [`TooLong`](Self::TooLong), [`OutOfRange`](Self::OutOfRange),
/// [`FdMissing`](Self::FdMissing), [`FdUnexpected`](Self::FdUnexpected) and
/// [`FdLost`](Self::FdLost) the socket is as good as before, because a datagram is received as a
/// whole or not at all; whether to go on with such a peer is the caller's decision.
#[derive(Debug, thiserror::Error)]
pub enum HandoffError {
    /// The kernel dropped the descriptor of an offer because the process is at its limit of open
    /// files (`RLIMIT_NOFILE`); it says so by `MSG_CTRUNC` only. The offer is to be refused.
    #[error("the descriptor of offer {seq} was lost to the limit on open files (RLIMIT_NOFILE)")]
    FdLost {
        /// The offer that cannot be taken.
        seq: u64,
    },
    /// An offer without a descriptor.
    #[error("offer {seq} came without a descriptor")]
    FdMissing {
        /// The offer's number.
        seq: u64,
    },
    /// More descriptors than the frame calls for. They are closed.
    #[error("a frame of {bytes} bytes came with descriptors that it must not have")]
    FdUnexpected {
        /// The frame's length.
        bytes: usize,
    },
    /// A datagram that is no frame of this protocol.
    #[error("not a frame ({bytes} bytes, {text:?}): {source}")]
    NotAFrame {
        /// The datagram's length.
        bytes: usize,
        /// Its beginning.
        text: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A frame over [`MAX_FRAME`], received or about to be sent.
    #[error("a frame of {bytes} bytes, at most {MAX_FRAME} are allowed")]
    TooLong {
        /// The frame's length.
        bytes: usize,
    },
    /// A credit beyond what the protocol allows, received or about to be sent.
    #[error("a credit of {value} for the {field}, at most {max} are allowed")]
    OutOfRange {
        /// `window` or `reserve`.
        field: &'static str,
        /// What was asked for.
        value: u32,
        /// What is allowed.
        max: u32,
    },
    /// The peer does not read, and the socket's buffer is full. Only from
    /// [`MasterEnd::try_send`], which does not wait.
    #[error("the worker's hand-off queue is full")]
    QueueFull,
    /// Too many descriptors of this user wait in sockets (`ETOOMANYREFS`; the bound is the sender's
    /// RLIMIT_NOFILE).
    #[error("too many descriptors are on their way (ETOOMANYREFS)")]
    TooManyInFlight,
    /// The peer is gone; what it sent before can still be received.
    #[error("the other side of the hand-off socket is gone")]
    Closed,
    /// A path that cannot be bound or connected.
    #[error("{path}: {source}")]
    Path {
        /// The socket's path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Any other failure of the socket.
    #[error("hand-off socket: {0}")]
    Io(#[from] io::Error),
}

impl HandoffError {
    fn at(path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Path {
            path: path.to_owned(),
            source: source.into(),
        }
    }
}

/// `CLOCK_MONOTONIC` in milliseconds: the same clock in every process of the host, unlike
/// [`std::time::Instant`], which cannot be sent.
pub fn monotonic_millis() -> u64 {
    // sd-notify sends this clock to systemd, so its reading of it comes for free.
    match sd_notify::NotifyState::monotonic_usec_now() {
        Ok(sd_notify::NotifyState::MonotonicUsec(micros)) => {
            u64::try_from(micros / 1_000).unwrap_or(u64::MAX)
        }
        // Linux always has this clock. Should it fail, an offer's age is taken for 0: it is served.
        _ => 0,
    }
}

/// The master's listening socket for workers.
#[derive(Debug)]
pub struct Listener {
    /// Accepting is the same for every type of unix socket, so tokio's listener does it.
    socket: UnixListener,
}

impl Listener {
    /// Binds and listens at `path`, in place of a socket there that nobody listens on any more.
    ///
    /// Who may connect is up to the permissions of the directory.
    ///
    /// # Errors
    ///
    /// [`HandoffError::Path`] if somebody listens there (`EADDRINUSE`), the path is longer than the
    /// 107 bytes that a unix address holds, or the directory is missing or not writable.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn bind(path: &Path) -> Result<Self, HandoffError> {
        Self::from_fd(bind_fd(path)?)
    }

    /// Takes over a bound, listening `SOCK_SEQPACKET` socket, such as one from systemd.
    ///
    /// # Errors
    ///
    /// [`HandoffError::Io`] if it cannot be made non-blocking or registered with the runtime.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, HandoffError> {
        let socket = std::os::unix::net::UnixListener::from(fd);
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket: UnixListener::from_std(socket)?,
        })
    }

    /// Waits for the next worker.
    ///
    /// # Errors
    ///
    /// [`HandoffError::Io`], for example `EMFILE`: wait a moment before trying again, for the worker
    /// stays in the backlog.
    pub async fn accept(&self) -> Result<MasterEnd, HandoffError> {
        let (stream, _) = self.socket.accept().await?;
        Ok(MasterEnd {
            socket: Socket { stream },
        })
    }
}

/// Binds and listens at `path`; see [`Listener::bind`].
///
/// For those who pass the socket on rather than accept from it: needs no runtime.
///
/// # Errors
///
/// As [`Listener::bind`].
pub fn bind_fd(path: &Path) -> Result<OwnedFd, HandoffError> {
    bind_unix(path, SocketType::SEQPACKET)
}

/// A non-blocking unix socket that listens at `path`; see [`Listener::bind`].
pub(crate) fn bind_unix(path: &Path, kind: SocketType) -> Result<OwnedFd, HandoffError> {
    let at_path = |errno: Errno| HandoffError::at(path, errno);
    let address = SocketAddrUnix::new(path).map_err(at_path)?;
    let fd = unix_socket(kind).map_err(at_path)?;
    match rustix::net::bind(&fd, &address) {
        Err(Errno::ADDRINUSE) if is_abandoned(&address, kind) => {
            std::fs::remove_file(path).map_err(|error| HandoffError::at(path, error))?;
            rustix::net::bind(&fd, &address).map_err(at_path)?;
        }
        result => result.map_err(at_path)?,
    }
    rustix::net::listen(&fd, BACKLOG).map_err(at_path)?;
    Ok(fd)
}

/// Whether the socket file at `address` outlived its process.
fn is_abandoned(address: &SocketAddrUnix, kind: SocketType) -> bool {
    unix_socket(kind).and_then(|fd| rustix::net::connect(&fd, address)) == Err(Errno::CONNREFUSED)
}

fn unix_socket(kind: SocketType) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)
}

/// The master's end of the socket to one worker.
#[derive(Debug)]
pub struct MasterEnd {
    socket: Socket,
}

impl MasterEnd {
    /// The next frame of the worker, `None` once it has closed its end or died and everything it
    /// sent has been received. Cancel safe.
    ///
    /// # Errors
    ///
    /// [`HandoffError::NotAFrame`], [`TooLong`](HandoffError::TooLong),
    /// [`OutOfRange`](HandoffError::OutOfRange), [`FdUnexpected`](HandoffError::FdUnexpected) for
    /// what a worker must not send, [`Io`](HandoffError::Io) otherwise.
    pub async fn recv(&self) -> Result<Option<ToMaster>, HandoffError> {
        // No room for descriptors: the kernel drops those that a worker may attach, so that it
        // cannot fill the master's table of open files.
        let Some(datagram) = self.socket.recv().await? else {
            return Ok(None);
        };
        if datagram.fds_dropped {
            return Err(HandoffError::FdUnexpected {
                bytes: datagram.bytes,
            });
        }
        let frame = datagram.decode()?;
        check(&frame)?;
        Ok(Some(frame))
    }

    /// Sends a frame with its descriptor, waiting while the worker's queue is full. Cancel safe.
    ///
    /// The worker gets a duplicate; the caller's descriptor stays open.
    ///
    /// # Errors
    ///
    /// [`HandoffError::Closed`] if the worker is gone,
    /// [`TooManyInFlight`](HandoffError::TooManyInFlight), [`Io`](HandoffError::Io).
    pub async fn send(&self, frame: &ToWorker, fd: BorrowedFd<'_>) -> Result<(), HandoffError> {
        self.socket.send(&encode(frame)?, Some(fd)).await
    }

    /// Like [`send`](Self::send), but returns [`HandoffError::QueueFull`] rather than wait.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send), and [`HandoffError::QueueFull`].
    pub fn try_send(&self, frame: &ToWorker, fd: BorrowedFd<'_>) -> Result<(), HandoffError> {
        self.socket.try_send(&encode(frame)?, Some(fd))
    }
}

/// A worker's end of the socket to the master.
#[derive(Debug)]
pub struct WorkerEnd {
    socket: Socket,
}

impl WorkerEnd {
    /// Connects to the master's socket at `path`.
    ///
    /// Never waits: unix sockets connect at once or not at all.
    ///
    /// # Errors
    ///
    /// [`HandoffError::Path`]: no such socket, nobody listens (`ECONNREFUSED`), or the master's
    /// backlog is full (`EAGAIN`). All may pass; try again after a moment.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn connect(path: &Path) -> Result<Self, HandoffError> {
        let at_path = |errno: Errno| HandoffError::at(path, errno);
        let address = SocketAddrUnix::new(path).map_err(at_path)?;
        let fd = unix_socket(SocketType::SEQPACKET).map_err(at_path)?;
        rustix::net::connect(&fd, &address).map_err(at_path)?;
        Ok(Self {
            socket: Socket::new(fd)?,
        })
    }

    /// The next connection offered, `None` once the master is gone and everything it sent has been
    /// received. Cancel safe. The descriptor is close-on-exec.
    ///
    /// # Errors
    ///
    /// [`HandoffError::FdLost`]: answer [`ToMaster::Refuse`] and go on. Else
    /// [`NotAFrame`](HandoffError::NotAFrame), [`TooLong`](HandoffError::TooLong),
    /// [`FdMissing`](HandoffError::FdMissing), [`FdUnexpected`](HandoffError::FdUnexpected) for what
    /// a master must not send, [`Io`](HandoffError::Io) otherwise.
    pub async fn recv(&self) -> Result<Option<(Offer, OwnedFd)>, HandoffError> {
        let mut fds = Vec::new();
        let Some(datagram) = self.socket.recv_with_fds(&mut fds).await? else {
            return Ok(None);
        };
        let ToWorker::Offer(offer) = datagram.decode()?;
        match (fds.pop(), fds.len(), datagram.fds_dropped) {
            (Some(fd), 0, false) => Ok(Some((offer, fd))),
            (None, _, true) => Err(HandoffError::FdLost { seq: offer.seq }),
            (None, _, false) => Err(HandoffError::FdMissing { seq: offer.seq }),
            (Some(_), _, _) => Err(HandoffError::FdUnexpected {
                bytes: datagram.bytes,
            }),
        }
    }

    /// Sends a frame, waiting while the master's queue is full. Cancel safe.
    ///
    /// # Errors
    ///
    /// [`HandoffError::Closed`] if the master is gone, [`OutOfRange`](HandoffError::OutOfRange) for a
    /// credit and [`TooLong`](HandoffError::TooLong) for a boot id that the protocol does not allow,
    /// [`Io`](HandoffError::Io) otherwise.
    pub async fn send(&self, frame: &ToMaster) -> Result<(), HandoffError> {
        check(frame)?;
        self.socket.send(&encode(frame)?, None).await
    }
}

/// Bounds what a worker may make the master keep open.
fn check(frame: &ToMaster) -> Result<(), HandoffError> {
    let &ToMaster::Credit(Credit {
        window, reserve, ..
    }) = frame
    else {
        return Ok(());
    };
    for (field, value, max) in [
        ("window", window, MAX_WINDOW),
        ("reserve", reserve, MAX_RESERVE),
    ] {
        if value > max {
            return Err(HandoffError::OutOfRange { field, value, max });
        }
    }
    Ok(())
}

fn encode(frame: &impl Serialize) -> Result<Vec<u8>, HandoffError> {
    let bytes = serde_json::to_vec(frame).map_err(io::Error::from)?;
    if bytes.len() > MAX_FRAME {
        return Err(HandoffError::TooLong { bytes: bytes.len() });
    }
    Ok(bytes)
}

/// What was received: one datagram.
struct Datagram {
    buffer: [u8; MAX_FRAME],
    /// Its length, which is more than the buffer's where it was cut.
    bytes: usize,
    /// Whether the kernel dropped descriptors that were attached (`MSG_CTRUNC`).
    fds_dropped: bool,
}

impl Datagram {
    fn decode<T: DeserializeOwned>(&self) -> Result<T, HandoffError> {
        let bytes = self.bytes;
        let content = self
            .buffer
            .get(..bytes)
            .ok_or(HandoffError::TooLong { bytes })?;
        serde_json::from_slice(content).map_err(|source| {
            let start = &content[..bytes.min(64)];
            let text = String::from_utf8_lossy(start).into_owned();
            HandoffError::NotAFrame {
                bytes,
                text,
                source,
            }
        })
    }
}

/// What both ends have in common: whole datagrams, with or without descriptors.
#[derive(Debug)]
struct Socket {
    /// Not a stream, but tokio has no type for `SOCK_SEQPACKET`, and its `AsyncFd` can only be made
    /// by unsafe code. Used for readiness alone: all reading and writing is by `recvmsg` and
    /// `sendmsg`.
    stream: UnixStream,
}

impl Socket {
    /// Takes over a connected socket that does not block.
    fn new(fd: OwnedFd) -> io::Result<Self> {
        let stream = UnixStream::from_std(std::os::unix::net::UnixStream::from(fd))?;
        Ok(Self { stream })
    }

    async fn send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<(), HandoffError> {
        let send = || Ok(send_now(self.stream.as_fd(), bytes, fd)?);
        self.stream
            .async_io(Interest::WRITABLE, send)
            .await
            .map_err(send_error)
    }

    fn try_send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<(), HandoffError> {
        send_now(self.stream.as_fd(), bytes, fd).map_err(|errno| send_error(errno.into()))
    }

    async fn recv(&self) -> Result<Option<Datagram>, HandoffError> {
        self.recv_into(&mut RecvAncillaryBuffer::default()).await
    }

    async fn recv_with_fds(
        &self,
        fds: &mut Vec<OwnedFd>,
    ) -> Result<Option<Datagram>, HandoffError> {
        let mut control = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut control);
        let datagram = self.recv_into(&mut ancillary).await?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        Ok(datagram)
    }

    async fn recv_into(
        &self,
        ancillary: &mut RecvAncillaryBuffer<'_>,
    ) -> Result<Option<Datagram>, HandoffError> {
        let recv = || Ok(recv_now(self.stream.as_fd(), ancillary)?);
        Ok(self.stream.async_io(Interest::READABLE, recv).await?)
    }
}

fn send_now(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> rustix::io::Result<()> {
    let mut control = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut control);
    let fds = fd.as_slice();
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::NOBUFS);
    }
    loop {
        // NOSIGNAL, because a dead peer is an error to handle and not a SIGPIPE.
        match rustix::net::sendmsg(
            socket,
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        ) {
            Err(Errno::INTR) => {}
            result => return result.map(drop),
        }
    }
}

fn send_error(error: io::Error) -> HandoffError {
    match Errno::from_io_error(&error) {
        Some(Errno::AGAIN) => HandoffError::QueueFull,
        Some(Errno::TOOMANYREFS) => HandoffError::TooManyInFlight,
        Some(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => HandoffError::Closed,
        _ => HandoffError::Io(error),
    }
}

fn recv_now(
    socket: BorrowedFd<'_>,
    ancillary: &mut RecvAncillaryBuffer<'_>,
) -> rustix::io::Result<Option<Datagram>> {
    let mut datagram = Datagram {
        buffer: [0; MAX_FRAME],
        bytes: 0,
        fds_dropped: false,
    };
    loop {
        // TRUNC makes the kernel tell the whole length of a datagram that does not fit.
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::TRUNC;
        let mut buffer = [IoSliceMut::new(&mut datagram.buffer)];
        match rustix::net::recvmsg(socket, &mut buffer, ancillary, flags) {
            // The peer closed without having read everything. The kernel says so once, and before
            // it hands out what the peer had sent.
            Err(Errno::INTR | Errno::CONNRESET) => {}
            Err(errno) => return Err(errno),
            // Nobody sends empty datagrams, so this is the end.
            Ok(received) if received.bytes == 0 => return Ok(None),
            Ok(received) => {
                datagram.bytes = received.bytes;
                datagram.fds_dropped = received.flags.contains(ReturnFlags::CTRUNC);
                return Ok(Some(datagram));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, SocketAddrV6, TcpListener, TcpStream};
    use std::process::Command;
    use std::sync::Arc;
    use std::time::Duration;

    use proptest::prelude::*;
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    use tempfile::TempDir;
    use tokio::time::timeout;

    use super::*;

    /// Long enough for a loaded machine; only a failing test waits for it.
    const DEADLINE: Duration = Duration::from_secs(20);

    /// A connected pair, and the directory that keeps the socket's path.
    async fn pair() -> (MasterEnd, WorkerEnd, TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handoff.sock");
        let listener = Listener::bind(&path).unwrap();
        let worker = WorkerEnd::connect(&path).unwrap();
        let master = timeout(DEADLINE, listener.accept()).await.unwrap().unwrap();
        (master, worker, dir)
    }

    fn offer(seq: u64) -> Offer {
        let peer = SocketAddr::from((Ipv4Addr::LOCALHOST, 40_000));
        Offer {
            seq,
            peer,
            client: peer.ip(),
            known_by: KnownBy::Connection,
            at: monotonic_millis(),
        }
    }

    fn null() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    /// What a peer sends that does not keep to the protocol.
    fn send_raw(socket: &Socket, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut control = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = SendAncillaryBuffer::new(&mut control);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let buffers = [IoSlice::new(bytes)];
        rustix::net::sendmsg(
            &socket.stream,
            &buffers,
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
        .unwrap();
    }

    #[tokio::test]
    async fn a_tcp_connection_is_served_by_the_receiver_while_the_sender_keeps_its_copy() {
        let (master, worker, _dir) = pair().await;
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
        client.set_read_timeout(Some(DEADLINE)).unwrap();
        let (accepted, peer) = tcp.accept().unwrap();

        let sent = Offer {
            seq: 7,
            peer,
            client: peer.ip(),
            known_by: KnownBy::Connection,
            at: monotonic_millis(),
        };
        master
            .send(&ToWorker::Offer(sent.clone()), accepted.as_fd())
            .await
            .unwrap();
        let (got, fd) = timeout(DEADLINE, worker.recv())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        assert_eq!(got, sent);
        assert!(!got.is_stale(monotonic_millis()));
        let flags = rustix::io::fcntl_getfd(&fd).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));

        let mut served = TcpStream::from(fd);
        served.write_all(b"hello").unwrap();
        let mut buffer = [0; 5];
        client.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"hello");

        // The worker dies: the master's copy still works.
        drop(served);
        (&accepted).write_all(b"again").unwrap();
        client.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"again");
    }

    #[tokio::test]
    async fn both_ends_serve_several_tasks_at_once() {
        const EACH: u64 = 200;
        let (master, worker, _dir) = pair().await;
        let (master, worker) = (Arc::new(master), Arc::new(worker));
        let sender = tokio::spawn({
            let master = Arc::clone(&master);
            async move {
                for seq in 0..EACH {
                    master
                        .send(&ToWorker::Offer(offer(seq)), null().as_fd())
                        .await
                        .unwrap();
                }
            }
        });
        let echo = tokio::spawn(async move {
            while let Some((offer, _fd)) = worker.recv().await.unwrap() {
                worker
                    .send(&ToMaster::Ack { seq: offer.seq })
                    .await
                    .unwrap();
            }
        });
        for expected in 0..EACH {
            let frame = timeout(DEADLINE, master.recv())
                .await
                .unwrap()
                .unwrap()
                .unwrap();
            assert_eq!(frame, ToMaster::Ack { seq: expected });
        }
        sender.await.unwrap();
        drop(master);
        timeout(DEADLINE, echo).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn what_a_dead_worker_had_said_is_still_received_then_the_end() {
        let (master, worker, _dir) = pair().await;
        // It dies with an unread offer, for which the kernel reports a reset as well.
        master
            .send(&ToWorker::Offer(offer(1)), null().as_fd())
            .await
            .unwrap();
        worker.send(&ToMaster::Ack { seq: 0 }).await.unwrap();
        drop(worker);
        let next = async || timeout(DEADLINE, master.recv()).await.unwrap().unwrap();
        assert_eq!(next().await, Some(ToMaster::Ack { seq: 0 }));
        assert_eq!(next().await, None);
        assert_eq!(next().await, None);
        let refused = master.try_send(&ToWorker::Offer(offer(2)), null().as_fd());
        assert!(matches!(refused, Err(HandoffError::Closed)), "{refused:?}");
    }

    #[tokio::test]
    async fn a_worker_sees_the_end_when_the_master_goes() {
        let (master, worker, _dir) = pair().await;
        drop(master);
        assert!(
            timeout(DEADLINE, worker.recv())
                .await
                .unwrap()
                .unwrap()
                .is_none()
        );
        let refused = worker.send(&ToMaster::Ack { seq: 0 }).await;
        assert!(matches!(refused, Err(HandoffError::Closed)), "{refused:?}");
    }

    #[tokio::test]
    async fn a_worker_that_does_not_read_fills_its_queue_and_no_more() {
        let (master, worker, _dir) = pair().await;
        let fd = null();
        let mut sent = 0;
        let error = loop {
            match master.try_send(&ToWorker::Offer(offer(sent)), fd.as_fd()) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(error, HandoffError::QueueFull), "{error:?}");
        assert!(
            sent > u64::from(MAX_WINDOW + MAX_RESERVE),
            "credit must fit: {sent}"
        );

        let frame = ToWorker::Offer(offer(sent));
        let blocked = master.send(&frame, fd.as_fd());
        let drain = async {
            for _ in 0..=sent {
                worker.recv().await.unwrap().unwrap();
            }
        };
        let (result, ()) = timeout(DEADLINE, async { tokio::join!(blocked, drain) })
            .await
            .unwrap();
        result.unwrap();
    }

    #[tokio::test]
    async fn garbage_is_an_error_that_shows_it_and_the_socket_goes_on() {
        let (master, worker, _dir) = pair().await;
        for (bytes, shown) in [
            (&b"GET / HTTP/1.1"[..], "GET / HTTP/1.1"),
            (&b"{\"ack\":{\"seq\":-1}}"[..], "seq"),
            (&b"{\"hello\":{}}"[..], "hello"),
            (&b"\xff\x00"[..], "not a frame (2 bytes"),
        ] {
            send_raw(&worker.socket, bytes, &[]);
            let error = timeout(DEADLINE, master.recv()).await.unwrap().unwrap_err();
            assert!(matches!(error, HandoffError::NotAFrame { .. }), "{error:?}");
            assert!(error.to_string().contains(shown), "{error}");

            send_raw(&master.socket, bytes, &[]);
            let error = timeout(DEADLINE, worker.recv()).await.unwrap().unwrap_err();
            assert!(matches!(error, HandoffError::NotAFrame { .. }), "{error:?}");
        }
        worker.send(&ToMaster::Refuse { seq: 3 }).await.unwrap();
        assert_eq!(
            master.recv().await.unwrap(),
            Some(ToMaster::Refuse { seq: 3 })
        );
    }

    #[tokio::test]
    async fn an_oversized_frame_is_refused_on_both_sides() {
        let (master, worker, _dir) = pair().await;
        let boot = "b".repeat(MAX_FRAME);
        let hello = ToMaster::Hello {
            protocol: PROTOCOL,
            worker: 0,
            boot,
        };
        let error = worker.send(&hello).await.unwrap_err();
        assert!(matches!(error, HandoffError::TooLong { .. }), "{error:?}");

        send_raw(&worker.socket, &serde_json::to_vec(&hello).unwrap(), &[]);
        let error = master.recv().await.unwrap_err();
        assert!(
            matches!(error, HandoffError::TooLong { bytes } if bytes > MAX_FRAME),
            "{error:?}"
        );

        send_raw(
            &master.socket,
            &vec![b' '; 5 * MAX_FRAME],
            &[null().as_fd()],
        );
        let error = worker.recv().await.unwrap_err();
        assert!(
            matches!(error, HandoffError::TooLong { bytes } if bytes == 5 * MAX_FRAME),
            "{error:?}"
        );
    }

    #[tokio::test]
    async fn credit_beyond_the_protocol_is_refused_on_both_sides() {
        let (master, worker, _dir) = pair().await;
        let state = WorkerState::Serving;
        let most = ToMaster::Credit(Credit {
            window: MAX_WINDOW,
            reserve: MAX_RESERVE,
            state,
        });
        worker.send(&most).await.unwrap();
        assert_eq!(master.recv().await.unwrap(), Some(most));
        for (window, reserve, name) in [
            (MAX_WINDOW + 1, 0, "window"),
            (0, MAX_RESERVE + 1, "reserve"),
        ] {
            let credit = ToMaster::Credit(Credit {
                window,
                reserve,
                state,
            });
            let error = worker.send(&credit).await.unwrap_err();
            assert!(
                matches!(error, HandoffError::OutOfRange { field, value: 33, max: 32 }
                if field == name)
            );
            send_raw(&worker.socket, &serde_json::to_vec(&credit).unwrap(), &[]);
            let error = master.recv().await.unwrap_err();
            assert!(matches!(error, HandoffError::OutOfRange { field, .. } if field == name));
        }
    }

    #[tokio::test]
    async fn an_offer_needs_exactly_one_descriptor() {
        let (master, worker, _dir) = pair().await;
        let frame = serde_json::to_vec(&ToWorker::Offer(offer(5))).unwrap();
        send_raw(&master.socket, &frame, &[]);
        let error = worker.recv().await.unwrap_err();
        assert!(
            matches!(error, HandoffError::FdMissing { seq: 5 }),
            "{error:?}"
        );

        let fd = null();
        send_raw(&master.socket, &frame, &[fd.as_fd(); 4]);
        let error = worker.recv().await.unwrap_err();
        assert!(
            matches!(error, HandoffError::FdUnexpected { .. }),
            "{error:?}"
        );
    }

    #[tokio::test]
    async fn a_worker_cannot_plant_descriptors_in_the_master() {
        let (master, worker, _dir) = pair().await;
        // The other end of the pipe tells when the last copy of this one is closed.
        let (mut reader, writer) = std::io::pipe().unwrap();
        let writer = OwnedFd::from(writer);
        let ack = serde_json::to_vec(&ToMaster::Ack { seq: 1 }).unwrap();
        send_raw(&worker.socket, &ack, &[writer.as_fd()]);
        drop(writer);
        let error = master.recv().await.unwrap_err();
        assert!(
            matches!(error, HandoffError::FdUnexpected { .. }),
            "{error:?}"
        );
        let mut rest = Vec::new();
        timeout(
            DEADLINE,
            tokio::task::spawn_blocking(move || reader.read_to_end(&mut rest)),
        )
        .await
        .expect("no copy stays open")
        .unwrap()
        .unwrap();
    }

    /// The limit is the whole process's, so this runs itself as a process of its own.
    #[test]
    fn a_descriptor_lost_to_the_limit_on_open_files_is_told_with_its_offer() {
        const CHILD: &str = "BANTER_TEST_FD_LIMIT";
        if std::env::var_os(CHILD).is_none() {
            let name = "handoff::tests::\
                        a_descriptor_lost_to_the_limit_on_open_files_is_told_with_its_offer";
            let output = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", name, "--nocapture"])
                .env(CHILD, "1")
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(
                output.status.success() && text.contains("1 passed"),
                "{output:?}"
            );
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let (master, worker, _dir) = pair().await;
            let fd = null();
            let send = async |seq| {
                master
                    .send(&ToWorker::Offer(offer(seq)), fd.as_fd())
                    .await
                    .unwrap();
            };
            // Descriptors are given out from the lowest: with the limit at the next one, none is left.
            let next = std::os::fd::AsRawFd::as_raw_fd(&null());
            let before = getrlimit(Resource::Nofile);
            let current = Some(u64::try_from(next).unwrap());
            setrlimit(Resource::Nofile, Rlimit { current, ..before }).unwrap();
            send(41).await;
            let error = worker.recv().await.unwrap_err();
            assert!(
                matches!(error, HandoffError::FdLost { seq: 41 }),
                "{error:?}"
            );
            assert!(error.to_string().contains("RLIMIT_NOFILE"));

            setrlimit(Resource::Nofile, before).unwrap();
            send(42).await;
            assert_eq!(worker.recv().await.unwrap().unwrap().0.seq, 42);
        });
    }

    #[tokio::test]
    async fn an_abandoned_socket_file_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handoff.sock");
        drop(Listener::bind(&path).unwrap());
        assert!(path.exists());
        let _listener = Listener::bind(&path).unwrap();
        let error = Listener::bind(&path).unwrap_err();
        assert!(
            error.to_string().starts_with(path.to_str().unwrap()),
            "{error}"
        );
        WorkerEnd::connect(&path).expect("the first listener is unharmed");

        let long = dir.path().join("x".repeat(120));
        assert!(matches!(
            Listener::bind(&long),
            Err(HandoffError::Path { .. })
        ));
    }

    #[test]
    fn an_offer_goes_stale_before_the_master_gives_it_to_another() {
        let offer = Offer {
            at: 1_000,
            ..offer(1)
        };
        assert!(!offer.is_stale(1_000 + OFFER_MAX_AGE_MS));
        assert!(offer.is_stale(1_001 + OFFER_MAX_AGE_MS));
        assert!(
            !offer.is_stale(0),
            "a clock cannot go back, but must not underflow"
        );
    }

    #[test]
    fn the_clock_is_the_kernels_and_never_goes_back() {
        let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
        let seconds: f64 = uptime.split(' ').next().unwrap().parse().unwrap();
        let first = monotonic_millis();
        assert!(first > 0);
        // Uptime counts suspended time too, so the monotonic clock is at most that.
        assert!(
            first as f64 / 1_000.0 <= seconds + 60.0,
            "{first} ms against {seconds} s"
        );
        assert!(monotonic_millis() >= first);
    }

    fn addresses() -> impl Strategy<Value = SocketAddr> {
        let v6 = (any::<std::net::Ipv6Addr>(), any::<u16>(), any::<u32>())
            .prop_map(|(ip, port, scope)| SocketAddr::V6(SocketAddrV6::new(ip, port, 0, scope)));
        prop_oneof![any::<std::net::SocketAddrV4>().prop_map(SocketAddr::V4), v6]
    }

    fn to_master() -> impl Strategy<Value = ToMaster> {
        let state = prop_oneof![
            Just(WorkerState::Starting),
            Just(WorkerState::Serving),
            Just(WorkerState::Full),
            Just(WorkerState::Draining),
        ];
        prop_oneof![
            (any::<u32>(), any::<u32>(), "\\PC{0,60}").prop_map(|(protocol, worker, boot)| {
                ToMaster::Hello {
                    protocol,
                    worker,
                    boot,
                }
            }),
            any::<u64>().prop_map(|seq| ToMaster::Ack { seq }),
            any::<u64>().prop_map(|seq| ToMaster::Refuse { seq }),
            (0..=MAX_WINDOW, 0..=MAX_RESERVE, state).prop_map(|(window, reserve, state)| {
                ToMaster::Credit(Credit {
                    window,
                    reserve,
                    state,
                })
            }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn frames_survive_the_socket(
            frame in to_master(),
            seq in any::<u64>(),
            peer in addresses(),
            client in any::<IpAddr>(),
            known_by in prop_oneof![
                Just(KnownBy::Connection),
                Just(KnownBy::Request),
                Just(KnownBy::Silence),
            ],
            at in any::<u64>(),
        ) {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (master, worker, _dir) = pair().await;
                worker.send(&frame).await.unwrap();
                prop_assert_eq!(master.recv().await.unwrap(), Some(frame));
                let offer = Offer { seq, peer, client, known_by, at };
                master.send(&ToWorker::Offer(offer.clone()), null().as_fd()).await.unwrap();
                prop_assert_eq!(worker.recv().await.unwrap().map(|(offer, _)| offer), Some(offer));
                Ok(())
            })?;
        }
    }
}
