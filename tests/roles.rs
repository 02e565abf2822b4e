//! `banter master` and `banter worker N` one by one: what is accepted when, who gets it, and what
//! happens when everybody is full. Real processes, real connections.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use banter::handoff::{self, KnownBy, Listener, MasterEnd, Offer, ToMaster, ToWorker};
use rustix::process::{Pid, Signal, kill_process};
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

/// Long enough for a loaded machine; only a failing test waits for it.
const DEADLINE: Duration = Duration::from_secs(60);

/// Killed at the end of the test, whatever happens.
struct Process(Child);

impl Process {
    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    /// Freezes it, and waits until every thread is frozen: the signal alone does not.
    fn freeze(&self) {
        self.signal(Signal::STOP);
        until("every thread is stopped", || {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", self.0.id())).unwrap();
            tasks.flatten().all(|task| {
                std::fs::read_to_string(task.path().join("stat"))
                    .is_ok_and(|stat| stat.contains(") T "))
            })
        });
    }

    /// Stops it the way systemd does, and tells whether it ended well.
    fn stop(mut self) -> bool {
        self.signal(Signal::TERM);
        until("the process ends", || self.0.try_wait().unwrap().is_some());
        self.0.wait().unwrap().success()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits for a condition.
fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A place for a master and its workers.
struct Place {
    dir: TempDir,
    port: u16,
}

impl Place {
    fn new() -> Self {
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

    fn run(&self, args: &[&str], limits: &[(&str, &str)]) -> Process {
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
        Process(command.spawn().unwrap())
    }

    fn master(&self) -> Process {
        let master = self.run(&["master"], &[]);
        until("the master listens", || self.connect(1).is_ok());
        master
    }

    fn worker(&self, number: u32, limits: &[(&str, &str)]) -> Process {
        self.run(&["worker", &number.to_string()], limits)
    }

    /// A connection from 127.0.0.`host`.
    fn connect(&self, host: u8) -> std::io::Result<TcpStream> {
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
    fn accepted(&self) -> usize {
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
    fn health(&self, host: u8) -> String {
        let mut stream = self.connect(host).unwrap();
        ask_health(&mut stream, "close");
        read_all(&mut stream)
    }

    /// Waits until a worker serves, and returns the addresses (last bytes) that go to it.
    fn hosts_of(&self, worker: u32) -> Vec<u8> {
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

fn ask_health(stream: &mut TcpStream, connection: &str) {
    let request = format!("GET /health HTTP/1.1\r\nHost: x\r\nConnection: {connection}\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
}

fn read_all(stream: &mut TcpStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// The head and body of one answer on a connection that stays open.
fn read_one(stream: &mut TcpStream) -> String {
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

#[test]
fn at_a_cold_start_nothing_is_accepted_until_a_worker_can_serve_and_then_nothing_is_lost() {
    let place = Place::new();
    let master = place.master();
    let mut waiting: Vec<TcpStream> = (2..52)
        .map(|host| {
            let mut stream = place.connect(host).unwrap();
            ask_health(&mut stream, "close");
            stream
        })
        .collect();
    // The kernel has completed fifty connections. Were the master to accept, it would do so now.
    let watched = Instant::now() + Duration::from_millis(500);
    while Instant::now() < watched {
        assert_eq!(place.accepted(), 0, "the master accepts without a worker");
        std::thread::sleep(Duration::from_millis(20));
    }
    let worker = place.worker(5, &[]);
    for stream in &mut waiting {
        let answer = read_all(stream);
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.ends_with(r#""worker":5}"#), "{answer}");
    }
    assert!(worker.stop());
    assert!(master.stop());
}

#[test]
fn connections_that_a_hanging_worker_does_not_take_go_to_another_one() {
    let place = Place::new();
    let _master = place.master();
    let stuck = place.worker(0, &[]);
    let hosts = place.hosts_of(0);
    let _other = place.worker(1, &[]);
    place.hosts_of(1);
    stuck.freeze();
    for host in hosts {
        let answer = place.health(host);
        assert!(answer.ends_with(r#""worker":1}"#), "{answer}");
    }
    stuck.signal(Signal::CONT);
    // And it gets its own again once it is back.
    place.hosts_of(0);
}

#[test]
fn a_worker_that_dies_takes_no_waiting_connection_along() {
    let place = Place::new();
    let _master = place.master();
    let worker = place.worker(0, &[]);
    place.hosts_of(0);
    worker.freeze();
    let mut waiting: Vec<TcpStream> = (2..22)
        .map(|host| {
            let mut stream = place.connect(host).unwrap();
            ask_health(&mut stream, "close");
            stream
        })
        .collect();
    worker.signal(Signal::KILL);
    let _next = place.worker(0, &[]);
    for stream in &mut waiting {
        let answer = read_all(stream);
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    }
}

#[test]
fn a_master_that_is_told_to_stop_hands_over_what_it_has_accepted() {
    let place = Place::new();
    let master = place.master();
    let worker = place.worker(0, &[]);
    place.hosts_of(0);
    worker.freeze();
    let before = place.accepted();
    let mut waiting: Vec<TcpStream> = (2..22)
        .map(|host| {
            let mut stream = place.connect(host).unwrap();
            ask_health(&mut stream, "close");
            stream
        })
        .collect();
    until("all are accepted", || {
        place.accepted() == before + waiting.len()
    });
    // So old that the worker refuses what it was offered: the master alone has the connections.
    std::thread::sleep(Duration::from_millis(600));
    master.signal(Signal::TERM);
    worker.signal(Signal::CONT);
    for stream in &mut waiting {
        let answer = read_all(stream);
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    }
    assert!(master.stop());
}

/// The test in the master's place, for one worker.
async fn greeted(listener: &Listener) -> MasterEnd {
    let end = listener.accept().await.unwrap();
    let hello = end.recv().await.unwrap();
    assert!(matches!(hello, Some(ToMaster::Hello { .. })), "{hello:?}");
    let credit = end.recv().await.unwrap();
    assert!(matches!(credit, Some(ToMaster::Credit(_))), "{credit:?}");
    end
}

#[test]
fn a_worker_serves_what_it_was_offered_by_a_master_that_is_gone_but_not_what_others_may_have() {
    let place = Place::new();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let listener = Listener::bind(&place.dir.path().join("handoff.sock")).unwrap();
        let worker = place.worker(0, &[]);
        let end = greeted(&listener).await;
        worker.freeze();
        let now = handoff::monotonic_millis();
        let accepting = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        // However long this takes, the first and the last are young; the other is old.
        let clients = [now + 60_000, now - 1_000, now + 60_000].map(|at| {
            let client = TcpStream::connect(accepting.local_addr().unwrap()).unwrap();
            client.set_read_timeout(Some(DEADLINE)).unwrap();
            let (socket, peer) = accepting.accept().unwrap();
            let offer = Offer {
                seq: at,
                peer,
                client: peer.ip(),
                at,
                known_by: KnownBy::Connection,
            };
            end.try_send(&ToWorker::Offer(offer), socket.as_fd())
                .unwrap();
            client
        });
        drop((end, listener));
        worker.signal(Signal::CONT);
        let [mut first, mut second, mut third] = clients;
        for client in [&mut first, &mut third] {
            ask_health(client, "close");
            let answer = read_all(client);
            // Without a master it cannot say more.
            assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        }
        assert_eq!(second.read(&mut [0]).unwrap(), 0, "closed unread");
    });
}

#[test]
fn when_every_worker_is_full_a_client_is_told_when_to_come_back() {
    let place = Place::new();
    let _master = place.master();
    let _worker = place.worker(0, &[("BANTER_MAX_CONNECTIONS", "3")]);
    place.hosts_of(0);
    let mut inside = Vec::new();
    for host in 2..5 {
        let mut stream = place.connect(host).unwrap();
        ask_health(&mut stream, "keep-alive");
        let answer = read_one(&mut stream);
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        inside.push(stream);
    }
    assert!(place.accepted() >= 3, "accepted connections are counted");
    let answer = place.health(9);
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(
        answer.to_ascii_lowercase().contains("\r\nretry-after: "),
        "{answer}"
    );
    assert!(answer.contains(r#"{"error":""#), "{answer}");
    inside.clear();
    until("there is room again", || {
        place.health(9).starts_with("HTTP/1.1 200 OK\r\n")
    });
}

#[test]
fn an_address_with_too_many_connections_is_told_so_and_others_are_not() {
    let place = Place::new();
    let _master = place.master();
    let _worker = place.worker(0, &[("BANTER_MAX_PER_ADDRESS", "1")]);
    until("the worker serves", || {
        place.health(3).starts_with("HTTP/1.1 200 OK\r\n")
    });
    let mut first = place.connect(2).unwrap();
    ask_health(&mut first, "keep-alive");
    assert!(read_one(&mut first).starts_with("HTTP/1.1 200 OK\r\n"));
    let answer = place.health(2);
    assert!(answer.starts_with("HTTP/1.1 429 "), "{answer}");
    assert!(place.health(4).starts_with("HTTP/1.1 200 OK\r\n"));
}
