//! `banter master` and `banter worker N` one by one: what is accepted when, who gets it, and what
//! happens when everybody is full. Real processes, real connections.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

mod common;

use std::io::Read;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use banter::handoff::{self, KnownBy, Listener, MasterEnd, Offer, ToMaster, ToWorker};
use common::{DEADLINE, Place, ask_health, read_all, read_one, until};
use rustix::process::Signal;

#[test]
fn at_a_cold_start_nothing_is_accepted_until_a_worker_can_serve_and_then_nothing_is_lost() {
    let place = Place::new();
    let master = place.master();
    let mut waiting: Vec<TcpStream> = place.ask_health_from(2..52);
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
    let mut waiting: Vec<TcpStream> = place.ask_health_from(2..22);
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
    let mut waiting: Vec<TcpStream> = place.ask_health_from(2..22);
    until("all are accepted", || {
        place.accepted() == before + waiting.len()
    });
    // So old that the worker refuses what it was offered: the master alone has the connections.
    std::thread::sleep(Duration::from_millis(600));
    master.signal(Signal::TERM);
    worker.signal(Signal::CONT);
    for stream in &mut waiting {
        // 200, or 503 once the worker has missed its master for too long: a worker's in any case.
        let answer = read_all(stream);
        assert!(answer.contains(r#""worker":0}"#), "{answer}");
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
