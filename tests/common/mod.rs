//! What the tests of real processes share: deadlines, processes that end with the test, a place for a
//! master and its workers.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests, of which each file uses some"
)]

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

/// Long enough for a loaded machine; only a failing test waits for it.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Killed at the end of the test, whatever happens.
pub struct Process {
    pub child: Child,
    /// Everything that it has written to stderr.
    log: Arc<Mutex<String>>,
}

impl Process {
    /// Starts it, and reads what it says.
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut pipe = child.stderr.take().unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let writer = log.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = pipe.read(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..read]);
                writer.lock().unwrap().push_str(&text);
            }
        });
        Self { child, log }
    }

    /// What it has said so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits until it says something with all these parts in one line.
    pub fn until_it_says(&self, parts: &[&str]) {
        until(&format!("a line with {parts:?}"), || {
            let log = self.log();
            log.lines()
                .any(|line| parts.iter().all(|part| line.contains(part)))
        });
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Freezes it, and waits until every thread is frozen: the signal alone does not.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
        until("every thread is stopped", || {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
            tasks.flatten().all(|task| {
                std::fs::read_to_string(task.path().join("stat"))
                    .is_ok_and(|stat| stat.contains(") T "))
            })
        });
    }

    /// Stops it the way systemd does, and tells whether it ended well.
    pub fn stop(mut self) -> bool {
        self.signal(Signal::TERM);
        until("the process ends", || {
            self.child.try_wait().unwrap().is_some()
        });
        self.child.wait().unwrap().success()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- process {} said:\n{}---", self.child.id(), self.log());
        }
    }
}

/// The service manager that a process notifies.
pub struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    heard: RefCell<Vec<String>>,
}

impl Manager {
    pub fn new(place: &Place, name: &str) -> Self {
        let path = place.dir.path().join(name);
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self {
            socket,
            path,
            heard: RefCell::default(),
        }
    }

    pub fn address(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// All assignments so far, in order.
    pub fn heard(&self) -> Vec<String> {
        let mut buffer = [0; 4096];
        let mut heard = self.heard.borrow_mut();
        while let Ok(length) = self.socket.recv(&mut buffer) {
            let text = std::str::from_utf8(&buffer[..length]).unwrap();
            heard.extend(text.lines().map(str::to_owned));
        }
        heard.clone()
    }

    /// Waits until some assignment, of those after the first `since`, is so.
    pub fn until(&self, what: &str, since: usize, holds: impl Fn(&str) -> bool) {
        until(&format!("a notification: {what}"), || {
            self.heard().iter().skip(since).any(|one| holds(one))
        });
    }
}

/// Waits for a condition.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A place for a master and its workers.
pub struct Place {
    pub dir: TempDir,
    pub port: u16,
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Below the ports that the kernel gives to clients, or a client's connection could take
        // it first, even one to itself.
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let first = u16::try_from(std::process::id() % 997).unwrap() * 16;
        let port = std::iter::repeat_with(|| {
            12_000 + (first + NEXT.fetch_add(1, Ordering::Relaxed)) % 16_000
        })
        .find(|port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)).is_ok())
        .unwrap();
        Self { dir, port }
    }

    pub fn run(&self, args: &[&str], limits: &[(&str, &str)]) -> Process {
        let mut command = Command::new(env!("CARGO_BIN_EXE_banter"));
        command
            .args(args)
            .env_clear()
            .env("PORT", self.port.to_string())
            .env("BANTER_STATE_DIR", self.dir.path())
            .env("BANTER_RUNTIME_DIR", self.dir.path())
            .env("JWT_SECRET", "a secret of this test, long enough to be one")
            .envs(limits.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        Process::start(&mut command)
    }

    pub fn master(&self) -> Process {
        let master = self.run(&["master"], &[]);
        until("the master listens", || self.connect(1).is_ok());
        master
    }

    pub fn worker(&self, number: u32, limits: &[(&str, &str)]) -> Process {
        self.run(&["worker", &number.to_string()], limits)
    }

    /// A connection from 127.0.0.`host` for each, which has asked for `GET /health`.
    pub fn ask_health_from(&self, hosts: std::ops::Range<u8>) -> Vec<TcpStream> {
        hosts
            .map(|host| {
                let mut stream = self.connect(host).unwrap();
                ask_health(&mut stream, "close");
                stream
            })
            .collect()
    }

    /// A connection from 127.0.0.`host`.
    pub fn connect(&self, host: u8) -> std::io::Result<TcpStream> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddr::from((Ipv4Addr::new(127, 0, 0, host), 0)).into())?;
        let to = SocketAddrV4::new(Ipv4Addr::LOCALHOST, self.port);
        socket.connect(&SocketAddr::V4(to).into())?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(DEADLINE))?;
        Ok(stream)
    }

    /// How many connections to the port some process has accepted: those that wait in the
    /// kernel's backlog have no inode yet.
    pub fn accepted(&self) -> usize {
        let port = format!(":{:04X}", self.port);
        ["/proc/net/tcp", "/proc/net/tcp6"]
            .iter()
            .map(|table| std::fs::read_to_string(table).unwrap_or_default())
            .collect::<String>()
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .filter(|fields| fields.len() > 9 && fields[1].ends_with(&port))
            .filter(|fields| fields[3] == "01" && fields[9] != "0")
            .count()
    }

    /// The answer to `GET /health` from 127.0.0.`host`.
    pub fn health(&self, host: u8) -> String {
        let mut stream = self.connect(host).unwrap();
        ask_health(&mut stream, "close");
        read_all(&mut stream)
    }

    /// Waits until a worker serves, and returns the addresses (last bytes) that go to it.
    pub fn hosts_of(&self, worker: u32) -> Vec<u8> {
        let own = format!(r#""worker":{worker}}}"#);
        let mut hosts = Vec::new();
        until("some address goes to the worker", || {
            hosts = (2..40)
                .filter(|host| self.health(*host).contains(&own))
                .collect();
            !hosts.is_empty()
        });
        hosts
    }
}

pub fn ask_health(stream: &mut TcpStream, connection: &str) {
    let request = format!("GET /health HTTP/1.1\r\nHost: x\r\nConnection: {connection}\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
}

pub fn read_all(stream: &mut TcpStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// The head and body of one answer on a connection that stays open.
pub fn read_one(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    while !text.ends_with(b"}") {
        assert_eq!(
            stream.read(&mut byte).unwrap(),
            1,
            "{}",
            String::from_utf8_lossy(&text)
        );
        text.push(byte[0]);
    }
    String::from_utf8(text).unwrap()
}
