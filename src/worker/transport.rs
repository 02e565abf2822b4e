//! The stream under each served connection.
//!
//! hyper and socketioxide own a connection once it is served, and neither can be told to let go of
//! it, or says what a client received. So every accepted socket is served as a [`Transport`], and
//! its [`Handle`], which the request extensions carry, can [kill](Handle::kill) it, knows how much
//! went through it and when, and when the client's heartbeats came in.
//!
//! # What a heartbeat proves
//!
//! Only the client knows what it received, but its heartbeats give it away, because each of them
//! follows something that the server sent: in Engine.IO 4 the client's pong answers a ping; in
//! Engine.IO 3 the client pings an interval after the pong to its previous ping came in. Packets
//! arrive in the order in which they were queued. What was queued before one heartbeat arrived
//! therefore precedes the ping or pong that the next heartbeat follows: once that one is here, the
//! client has it all. Hence [`Handle::confirmed_until`].

use std::any::Any;
use std::io::{self, IoSlice};
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

use super::ws_frames::{ClientFrames, Engine};

/// How long sent data may stay unacknowledged, or the peer's window closed, before the kernel gives
/// the connection up. Without it a peer that vanished would hold what was sent to it for a quarter
/// of an hour.
const USER_TIMEOUT: Duration = Duration::from_secs(30);

/// How fast a probe's packets follow each other, and a silence after which they start.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);

/// How many packets of a probe may go unanswered.
const PROBE_RETRIES: u32 = 2;

/// How every HTTP/1.1 response starts that turns a connection into a WebSocket.
const SWITCHING_PROTOCOLS: &[u8] = b"HTTP/1.1 101 ";

/// A served TCP connection, as a stream.
///
/// Dropping it closes the socket, whoever still holds its [`Handle`].
#[derive(Debug)]
pub struct Transport {
    /// The only strong reference that lasts.
    socket: Arc<TcpStream>,
    handle: Arc<Handle>,
    /// The last bytes read, to see whether a request's head was all that the client sent.
    tail: [u8; 4],
    /// The client's WebSocket, once it is one.
    frames: Option<ClientFrames>,
    /// Dropped when the connection closes.
    held: Option<Box<dyn Any + Send>>,
}

/// What others may know of a [`Transport`] and do to it; it does not keep the connection open.
#[derive(Debug)]
pub struct Handle {
    socket: Weak<TcpStream>,
    killed: AtomicBool,
    /// A read and a write can wait at once, in different tasks.
    reader: AtomicWaker,
    writer: AtomicWaker,
    opened: Instant,
    /// Nanoseconds after `opened`.
    last_read: AtomicU64,
    /// Nanoseconds after `opened`.
    last_write: AtomicU64,
    bytes_written: AtomicU64,
    peer: SocketAddr,
    client: IpAddr,
    /// Whether it has become a WebSocket.
    upgraded: AtomicBool,
    /// Set by [`Handle::expect_upgrade`] until the response: [`NO_UPGRADE`] or an upgrade's code.
    expected_upgrade: AtomicU8,
    /// Whether the socket has a probe's settings.
    probing: AtomicBool,
    heartbeats: Heartbeats,
}

const NO_UPGRADE: u8 = 0;
const UPGRADE_V3: u8 = 3;
const UPGRADE_V4: u8 = 4;

impl Transport {
    /// Takes over an accepted socket whose TCP peer is `peer` (a proxy, perhaps) and whose client
    /// is at `client`. Must be called within a tokio runtime.
    ///
    /// Sets TCP_NODELAY; TCP_USER_TIMEOUT to 30 s; and keepalive to begin after 60 s of silence,
    /// 15 s apart, 4 times.
    ///
    /// # Errors
    /// When the socket does not take an option, or cannot be registered with the runtime.
    pub fn new(
        socket: std::net::TcpStream,
        peer: SocketAddr,
        client: IpAddr,
    ) -> io::Result<(Self, Arc<Handle>)> {
        socket.set_nonblocking(true)?;
        Self::from_tokio(TcpStream::from_std(socket)?, peer, client)
    }

    /// As [`Transport::new`], for a socket that the runtime has already.
    ///
    /// # Errors
    /// When the socket does not take an option.
    pub fn from_tokio(
        socket: TcpStream,
        peer: SocketAddr,
        client: IpAddr,
    ) -> io::Result<(Self, Arc<Handle>)> {
        socket.set_nodelay(true)?;
        relax(&socket)?;
        let socket = Arc::new(socket);
        let handle = Arc::new(Handle {
            socket: Arc::downgrade(&socket),
            killed: AtomicBool::new(false),
            reader: AtomicWaker::new(),
            writer: AtomicWaker::new(),
            opened: Instant::now(),
            last_read: AtomicU64::new(0),
            last_write: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
            peer,
            client,
            upgraded: AtomicBool::new(false),
            expected_upgrade: AtomicU8::new(NO_UPGRADE),
            probing: AtomicBool::new(false),
            heartbeats: Heartbeats::new(),
        });
        let transport = Self {
            socket,
            handle: Arc::clone(&handle),
            tail: [0; 4],
            frames: None,
            held: None,
        };
        Ok((transport, handle))
    }

    /// Keeps something for as long as the connection is open, through an upgrade too.
    pub fn hold(&mut self, something: Box<dyn Any + Send>) {
        self.held = Some(something);
    }

    /// The handle that [`Transport::new`] also returned.
    pub fn handle(&self) -> &Arc<Handle> {
        &self.handle
    }

    fn after_read(&mut self, bytes: &[u8]) {
        let handle = &self.handle;
        handle
            .last_read
            .store(handle.since_opened(), Ordering::Relaxed);
        if handle.probing.load(Ordering::Relaxed) {
            handle.probing.store(false, Ordering::Relaxed);
            // It lives. A socket that refuses the options only stays impatient.
            let _ = relax(&self.socket);
        }
        match &mut self.frames {
            Some(frames) => frames.push(bytes, || handle.note_heartbeat()),
            None => keep_tail(&mut self.tail, bytes),
        }
    }

    /// Accounts for `written` bytes, of what began with `start`.
    fn after_write(&mut self, written: usize, start: &[u8]) {
        let handle = &self.handle;
        handle
            .last_write
            .store(handle.since_opened(), Ordering::Relaxed);
        handle
            .bytes_written
            .fetch_add(written as u64, Ordering::Relaxed);
        if handle.expected_upgrade.load(Ordering::Acquire) == NO_UPGRADE {
            return;
        }
        // Whatever this write is, what comes after it is no longer that response's beginning.
        let engine = match handle.expected_upgrade.swap(NO_UPGRADE, Ordering::AcqRel) {
            UPGRADE_V3 => Engine::V3,
            UPGRADE_V4 => Engine::V4,
            _ => return,
        };
        // A client has to wait for this response before it sends a frame (RFC 6455, 4.1). If one
        // did not, and a frame's beginning came with the head, its frames cannot be followed.
        if !start.starts_with(SWITCHING_PROTOCOLS) {
            return;
        }
        handle.upgraded.store(true, Ordering::Release);
        if &self.tail == b"\r\n\r\n" {
            self.frames = Some(ClientFrames::new(engine));
        }
    }

    fn poll_write_with(
        &mut self,
        cx: &mut Context<'_>,
        start: &[u8],
        length: usize,
        write: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            self.handle.check_alive()?;
            let ready = self.socket.poll_write_ready(cx);
            ready!(self.handle.wait(&self.handle.writer, cx, ready))?;
            match once(&self.socket, Interest::WRITABLE, length, &write) {
                Ok(written) => {
                    self.after_write(written, start);
                    return Poll::Ready(Ok(written));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

/// Does one read or write of at most `length` bytes. When it moves fewer, the socket is drained or
/// full, and is marked as not ready, which saves the call that would only find that out.
fn once(
    socket: &TcpStream,
    interest: Interest,
    length: usize,
    io: impl FnOnce(&TcpStream) -> io::Result<usize>,
) -> io::Result<usize> {
    let mut moved = None;
    // `try_io` marks the socket when it sees `WouldBlock`, unless it became ready again meanwhile.
    let result = socket.try_io(interest, || match io(socket)? {
        n if 0 < n && n < length => {
            moved = Some(n);
            Err(io::ErrorKind::WouldBlock.into())
        }
        n => Ok(n),
    });
    moved.map_or(result, Ok)
}

impl AsyncRead for Transport {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            this.handle.check_alive()?;
            if buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            let ready = this.socket.poll_read_ready(cx);
            ready!(this.handle.wait(&this.handle.reader, cx, ready))?;
            let length = buf.remaining();
            match once(&this.socket, Interest::READABLE, length, |socket| {
                socket.try_read_buf(buf)
            }) {
                Ok(0) => return Poll::Ready(Ok(())),
                Ok(read) => {
                    let filled = buf.filled();
                    this.after_read(&filled[filled.len() - read..]);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Transport {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.get_mut()
            .poll_write_with(cx, buf, buf.len(), |socket| socket.try_write(buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let start: &[u8] = bufs
            .iter()
            .find(|buf| !buf.is_empty())
            .map_or(&[], |buf| buf);
        let length = bufs.iter().map(|buf| buf.len()).sum();
        self.get_mut()
            .poll_write_with(cx, start, length, |socket| socket.try_write_vectored(bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.handle.check_alive())
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // A killed one is shut down already.
        Poll::Ready(if self.handle.killed() {
            Ok(())
        } else {
            shut(&self.socket, Shutdown::Write)
        })
    }
}

impl Handle {
    /// Ends the connection, now and from any thread: the peer sees its end after what was sent
    /// before, and every read and write fails with [`io::ErrorKind::ConnectionAborted`], those that
    /// wait included. Does nothing the second time, or when the connection is closed.
    pub fn kill(&self) {
        if self.killed.swap(true, Ordering::AcqRel) {
            return;
        }
        if let Some(socket) = self.socket.upgrade() {
            // It fails if the peer reset the connection, and then there is nothing left to end.
            let _ = shut(&socket, Shutdown::Both);
        }
        self.reader.wake();
        self.writer.wake();
    }

    /// Whether [`Handle::kill`] was called.
    pub fn killed(&self) -> bool {
        self.killed.load(Ordering::Acquire)
    }

    /// Whether the [`Transport`] was dropped, and so the socket closed.
    pub fn closed(&self) -> bool {
        self.socket.strong_count() == 0
    }

    /// Whether it has become a WebSocket.
    pub fn upgraded(&self) -> bool {
        self.upgraded.load(Ordering::Acquire)
    }

    /// Whether nothing has come in yet, for so long.
    pub fn is_silent_for(&self, time: Duration) -> bool {
        self.last_read.load(Ordering::Relaxed) == 0 && self.opened.elapsed() >= time
    }

    /// When bytes last came in; when the connection was taken over, if none have.
    pub fn last_read(&self) -> Instant {
        self.opened + Duration::from_nanos(self.last_read.load(Ordering::Relaxed))
    }

    /// When the kernel last took bytes to send; when the connection was taken over, if it has
    /// taken none.
    pub fn last_write(&self) -> Instant {
        self.opened + Duration::from_nanos(self.last_write.load(Ordering::Relaxed))
    }

    /// How many bytes the kernel has taken to send.
    pub fn bytes_written(&self) -> u64 {
        self.bytes_written.load(Ordering::Relaxed)
    }

    /// The other end of the TCP connection: the client, or a proxy in front of it.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// The client's address, as the master found it out.
    pub fn client(&self) -> IpAddr {
        self.client
    }

    /// Finds out whether a silent peer is still there: asks its kernel twice, a second apart.
    /// Without an answer the connection fails about two seconds later (`ETIMEDOUT`), and so what
    /// serves it ends. When next something is read, the usual patience returns.
    ///
    /// A peer that answers but does not read what it was sent may fail too.
    ///
    /// # Errors
    /// When the socket does not take the options. None when it is closed.
    pub fn probe(&self) -> io::Result<()> {
        let Some(socket) = self.socket.upgrade() else {
            return Ok(());
        };
        // With TCP_USER_TIMEOUT set, Linux counts no probes, but gives up one that is unanswered
        // when nothing was heard for that long: so that time must cover the silence until now.
        // (An acknowledged write was heard from; an unacknowledged one is sent again, instead of
        // probes, for as long as the same option says.)
        let silence = self.last_read().max(self.last_write()).elapsed();
        set_patience(
            &socket,
            silence + PROBE_INTERVAL * PROBE_RETRIES,
            &TcpKeepalive::new()
                .with_time(PROBE_INTERVAL)
                .with_interval(PROBE_INTERVAL)
                .with_retries(PROBE_RETRIES),
        )?;
        // After the options: a read in between leaves them to the next read, never for good.
        self.probing.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Says that the request now being answered asks for a WebSocket of revision `engine`. If the
    /// response agrees (status 101), the heartbeats in the client's frames are noted from there
    /// on.
    ///
    /// To be called while the request is handled, before its response is written. Ordinary requests
    /// need nothing, and their bodies are never looked into.
    pub fn expect_upgrade(&self, engine: Engine) {
        let code = match engine {
            Engine::V3 => UPGRADE_V3,
            Engine::V4 => UPGRADE_V4,
        };
        self.expected_upgrade.store(code, Ordering::Release);
    }

    /// Notes that a heartbeat of the client arrived just now. On a WebSocket this happens by
    /// itself, after [`Handle::expect_upgrade`].
    pub fn note_heartbeat(&self) {
        self.heartbeats.note(Instant::now());
    }

    /// When the client's last heartbeat arrived.
    pub fn heartbeat(&self) -> Option<Instant> {
        self.heartbeats.last()
    }

    /// What was sent before this instant has been received by the client; see
    /// [`Heartbeats::confirmed_until`].
    pub fn confirmed_until(&self) -> Option<Instant> {
        self.heartbeats.confirmed_until()
    }

    fn since_opened(&self) -> u64 {
        // 584 years fit.
        self.opened.elapsed().as_nanos() as u64
    }

    fn check_alive(&self) -> io::Result<()> {
        if self.killed() {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "connection killed",
            ));
        }
        Ok(())
    }

    /// Passes a socket's readiness on, and sees to it that [`Handle::kill`] wakes who waits.
    fn wait(
        &self,
        waker: &AtomicWaker,
        cx: &Context<'_>,
        ready: Poll<io::Result<()>>,
    ) -> Poll<io::Result<()>> {
        if ready.is_pending() {
            waker.register(cx.waker());
            // Killed before the waker was there to be woken.
            self.check_alive()?;
        }
        ready
    }
}

/// When a client's last two heartbeats arrived. A polling session needs one of its own, since its
/// requests come over several connections.
#[derive(Debug, Default)]
pub struct Heartbeats(Mutex<LastTwo>);

#[derive(Debug, Default)]
struct LastTwo {
    last: Option<Instant>,
    previous: Option<Instant>,
}

impl Heartbeats {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes one that arrived `at`; they must be noted in order.
    pub fn note(&self, at: Instant) {
        let mut times = self.0.lock();
        times.previous = times.last.replace(at);
    }

    /// When the last one arrived.
    pub fn last(&self) -> Option<Instant> {
        self.0.lock().last
    }

    /// What the session was sent before this instant has been received by the client: it is when
    /// the last heartbeat but one arrived (the module's documentation says why). `None`: nothing is
    /// certain yet.
    pub fn confirmed_until(&self) -> Option<Instant> {
        self.0.lock().previous
    }
}

/// Sets the patience that a connection ordinarily deserves.
fn relax(socket: &TcpStream) -> io::Result<()> {
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(60))
        .with_interval(Duration::from_secs(15))
        .with_retries(4);
    set_patience(socket, USER_TIMEOUT, &keepalive)
}

fn set_patience(
    socket: &TcpStream,
    user_timeout: Duration,
    keepalive: &TcpKeepalive,
) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_tcp_user_timeout(Some(user_timeout))?;
    socket.set_tcp_keepalive(keepalive)
}

fn shut(socket: &TcpStream, how: Shutdown) -> io::Result<()> {
    match SockRef::from(socket).shutdown(how) {
        // The peer has ended it.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        result => result,
    }
}

/// Appends `bytes` to what was read, of which `tail` keeps the end.
fn keep_tail(tail: &mut [u8; 4], bytes: &[u8]) {
    let kept = bytes.len().min(tail.len());
    tail.rotate_left(kept);
    let from = tail.len() - kept;
    tail[from..].copy_from_slice(&bytes[bytes.len() - kept..]);
}

#[cfg(test)]
mod tests {
    use std::task::Wake;

    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::time::timeout;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    async fn within<T>(future: impl Future<Output = T>) -> T {
        timeout(DEADLINE, future).await.expect("in time")
    }

    /// A served connection and its client.
    async fn connected() -> (Transport, Arc<Handle>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let (socket, peer) = listener.accept().await.unwrap();
        let (transport, handle) =
            Transport::new(socket.into_std().unwrap(), peer, peer.ip()).unwrap();
        (transport, handle, client)
    }

    /// Reads at the client until the end; a reset is an end, too.
    async fn read_all(client: &mut TcpStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        match within(client.read_to_end(&mut bytes)).await {
            Ok(_) => bytes,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => bytes,
            Err(error) => panic!("{error}"),
        }
    }

    fn is_aborted<T: std::fmt::Debug>(result: io::Result<T>) {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    }

    /// Counts its wake-ups.
    #[derive(Default)]
    struct Wakes(AtomicU64);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[tokio::test]
    async fn bytes_pass_and_are_accounted_for() {
        let (mut transport, handle, mut client) = connected().await;
        assert_eq!((handle.peer(), handle.client()), {
            let local = client.local_addr().unwrap();
            (local, local.ip())
        });
        let before = handle.last_write();
        within(client.write_all(b"hello")).await.unwrap();
        let mut buf = [0; 5];
        within(transport.read_exact(&mut buf)).await.unwrap();
        assert_eq!(&buf, b"hello");
        assert!(handle.last_read() > before);
        assert_eq!(handle.last_write(), before);

        assert!(transport.is_write_vectored());
        let bufs = [
            IoSlice::new(b""),
            IoSlice::new(b"good "),
            IoSlice::new(b"bye"),
        ];
        assert_eq!(within(transport.write_vectored(&bufs)).await.unwrap(), 8);
        within(transport.flush()).await.unwrap();
        within(transport.shutdown()).await.unwrap();
        assert_eq!(handle.bytes_written(), 8);
        assert!(handle.last_write() > before);
        assert_eq!(read_all(&mut client).await, b"good bye");
        // The other half still works.
        within(client.write_all(b"more")).await.unwrap();
        drop(client);
        let mut rest = Vec::new();
        within(transport.read_to_end(&mut rest)).await.unwrap();
        assert_eq!(rest, b"more");
    }

    #[tokio::test]
    async fn much_passes_both_ways_at_once() {
        // More than socket buffers hold, so that both directions wait and go on many times.
        const SIZE: usize = 16 << 20;
        let (transport, handle, client) = connected().await;
        let pattern: Vec<u8> = (0..SIZE).map(|i| (i / 7 % 251) as u8).collect();
        let (mut from_client, mut to_client) = tokio::io::split(transport);
        let (mut from_server, mut to_server) = tokio::io::split(client);
        let (mut at_server, mut at_client) = (Vec::new(), Vec::new());
        let all = within(async {
            tokio::join!(
                async {
                    to_client.write_all(&pattern).await?;
                    to_client.shutdown().await
                },
                async {
                    to_server.write_all(&pattern).await?;
                    to_server.shutdown().await
                },
                from_client.read_to_end(&mut at_server),
                from_server.read_to_end(&mut at_client),
            )
        });
        let (a, b, c, d) = all.await;
        a.and(b).and(c).and(d).unwrap();
        assert!(at_server == pattern && at_client == pattern);
        assert_eq!(handle.bytes_written(), SIZE as u64);
    }

    #[tokio::test]
    async fn a_kill_wakes_a_waiting_read_and_the_peer_sees_the_end() {
        let (mut transport, handle, mut client) = connected().await;
        within(transport.write_all(b"last words")).await.unwrap();
        let reader = tokio::spawn(async move {
            let result = transport.read_u8().await;
            (transport, result)
        });
        handle.kill();
        let (mut transport, result) = within(reader).await.unwrap();
        is_aborted(result);
        // The transport still lives: the end comes from the kill.
        assert_eq!(read_all(&mut client).await, b"last words");
        is_aborted(transport.write(b"x").await);
        is_aborted(transport.flush().await);
        transport.shutdown().await.unwrap();
        assert!(handle.killed());
        handle.kill();
    }

    #[tokio::test]
    async fn a_kill_wakes_a_write_to_a_peer_that_does_not_read() {
        let (mut transport, handle, _client) = connected().await;
        let wakes = Arc::new(Wakes::default());
        let waker = Arc::clone(&wakes).into();
        let mut cx = Context::from_waker(&waker);
        // The first write waits until the runtime knows the socket; then on until it is full.
        within(transport.write(b"x")).await.unwrap();
        let mut full = false;
        while !full {
            // Within a poll of its own, for tokio lets one poll do only so much.
            full = std::future::poll_fn(|_| {
                let write = Pin::new(&mut transport).poll_write(&mut cx, &[0; 65536]);
                Poll::Ready(write.map(|written| written.unwrap()).is_pending())
            })
            .await;
            tokio::task::yield_now().await;
        }
        let before = wakes.0.load(Ordering::SeqCst);
        handle.kill();
        // At once, not when the kernel reports something.
        assert!(wakes.0.load(Ordering::SeqCst) > before);
        is_aborted(within(transport.write(b"x")).await);
    }

    #[tokio::test]
    async fn a_handle_does_not_keep_the_socket_open() {
        let (transport, handle, mut client) = connected().await;
        let other = Arc::clone(&handle);
        assert!(!handle.closed());
        drop(transport);
        assert!(handle.closed());
        assert_eq!(read_all(&mut client).await, b"");
        // A socket that is only shut down would still take this.
        within(client.write_all(b"x")).await.ok();
        let gone = within(async {
            while client.write_all(b"x").await.is_ok() {
                tokio::task::yield_now().await;
            }
        });
        gone.await;
        other.kill();
        other.probe().unwrap();
    }

    #[tokio::test]
    async fn options_are_set_and_a_probe_lasts_until_the_next_read() {
        let (mut transport, handle, mut client) = connected().await;
        let socket = Arc::clone(&transport.socket);
        let patience = || {
            let socket = SockRef::from(&*socket);
            assert!(socket.keepalive().unwrap());
            (
                socket.tcp_user_timeout().unwrap().unwrap(),
                socket.tcp_keepalive_time().unwrap().as_secs(),
                socket.tcp_keepalive_interval().unwrap().as_secs(),
                socket.tcp_keepalive_retries().unwrap(),
            )
        };
        assert!(socket.nodelay().unwrap());
        let usual = patience();
        assert_eq!(usual, (Duration::from_secs(30), 60, 15, 4));
        handle.probe().unwrap();
        let (user_timeout, time, interval, retries) = patience();
        assert_eq!((time, interval, retries), (1, 1, 2));
        assert!(user_timeout >= Duration::from_secs(2), "{user_timeout:?}");
        assert!(user_timeout < DEADLINE, "{user_timeout:?}");
        within(client.write_all(b"x")).await.unwrap();
        within(transport.read_u8()).await.unwrap();
        assert_eq!(patience(), usual);
    }

    const UPGRADE: &[u8] = b"GET /socket.io/?EIO=4 HTTP/1.1\r\nupgrade: websocket\r\n\r\n";
    const AGREED: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\r\n";
    /// A text message `3`, masked with zeros.
    const PONG: &[u8] = &[0x81, 0x81, 0, 0, 0, 0, b'3'];

    /// The client sends `bytes`, the server reads them.
    async fn pass(client: &mut TcpStream, transport: &mut Transport, bytes: &[u8]) {
        within(client.write_all(bytes)).await.unwrap();
        let mut read = vec![0; bytes.len()];
        within(transport.read_exact(&mut read)).await.unwrap();
        assert_eq!(read, bytes);
    }

    #[tokio::test]
    async fn heartbeats_of_a_websocket_confirm_what_was_sent_before() {
        let (mut transport, handle, mut client) = connected().await;
        // Ordinary requests first, on the same connection, whose bodies look like frames.
        for body in [&b"3"[..], PONG, AGREED] {
            pass(&mut client, &mut transport, body).await;
            within(transport.write_all(b"HTTP/1.1 200 OK\r\n\r\n"))
                .await
                .unwrap();
            within(transport.write_all(AGREED)).await.unwrap();
        }
        assert_eq!(handle.heartbeat(), None);
        pass(&mut client, &mut transport, UPGRADE).await;
        handle.expect_upgrade(Engine::V4);
        within(transport.write_all(AGREED)).await.unwrap();
        let sent = Instant::now();
        pass(&mut client, &mut transport, PONG).await;
        let first = handle.heartbeat().unwrap();
        assert!(first >= sent);
        assert_eq!(handle.confirmed_until(), None);
        pass(&mut client, &mut transport, PONG).await;
        assert_eq!(handle.confirmed_until(), Some(first));
        assert!(handle.heartbeat().unwrap() > first);
    }

    #[tokio::test]
    async fn without_a_clean_upgrade_no_heartbeat_is_seen() {
        // Refused.
        let (mut transport, handle, mut client) = connected().await;
        pass(&mut client, &mut transport, UPGRADE).await;
        handle.expect_upgrade(Engine::V4);
        within(transport.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
            .await
            .unwrap();
        within(transport.write_all(AGREED)).await.unwrap();
        pass(&mut client, &mut transport, PONG).await;
        assert_eq!(handle.heartbeat(), None);
        // The client did not wait for the response.
        let (mut transport, handle, mut client) = connected().await;
        pass(&mut client, &mut transport, UPGRADE).await;
        // What comes after the response is the text of a message, though it looks like a frame.
        pass(
            &mut client,
            &mut transport,
            &[0x81, 0x80 | PONG.len() as u8, 0, 0, 0, 0],
        )
        .await;
        handle.expect_upgrade(Engine::V4);
        within(transport.write_all(AGREED)).await.unwrap();
        pass(&mut client, &mut transport, PONG).await;
        assert_eq!(handle.heartbeat(), None);
    }

    proptest! {
        #[test]
        fn the_tail_is_the_end_of_what_was_read(
            chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..7), 0..9),
        ) {
            let mut tail = [0; 4];
            let mut all = vec![0; 4];
            for chunk in chunks {
                keep_tail(&mut tail, &chunk);
                all.extend(chunk);
                prop_assert_eq!(&tail[..], &all[all.len() - 4..]);
            }
        }
    }
}
