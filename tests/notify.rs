//! What master and worker tell the service manager. Real processes, and the test in its place.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

use banter::control::{self, FromMaster};
use common::{Manager, Place, Process, ask_health, read_one, until};
use rustix::process::Signal;

/// A process that notifies this manager.
fn run(place: &Place, args: &[&str], env: &[(&str, &str)], manager: &Manager) -> Process {
    let env = [env, &[("NOTIFY_SOCKET", manager.address())]].concat();
    place.run(args, &env)
}

/// Waits for a status of this text, among what is said from now on or was said last.
fn until_status(manager: &Manager, text: &str) {
    let last = || {
        let heard = manager.heard();
        heard
            .into_iter()
            .rev()
            .find_map(|one| one.strip_prefix("STATUS=").map(str::to_owned))
    };
    until(&format!("the status {text:?}"), || {
        last().as_deref() == Some(text)
    });
}

#[test]
fn a_worker_without_a_master_asks_for_time_and_is_ready_when_it_has_its_state() {
    let place = Place::new();
    let manager = Manager::new(&place, "worker.notify");
    let worker = run(&place, &["worker", "3"], &[], &manager);
    until_status(
        &manager,
        "starting: waiting for the master; 0 connections, 0 users",
    );
    let extensions = || {
        let heard = manager.heard();
        let extension = |one: &&String| *one == "EXTEND_TIMEOUT_USEC=30000000";
        heard.iter().filter(extension).count()
    };
    until("more time, again and again", || extensions() >= 3);
    assert!(!manager.heard().iter().any(|one| one == "READY=1"));
    assert!(!manager.heard().iter().any(|one| one == "WATCHDOG=1"));

    let master = place.master();
    manager.until("READY=1", 0, |one| one == "READY=1");
    until_status(&manager, "0 connections, 0 users");
    let since = manager.heard().len();
    manager.until("WATCHDOG=1", since, |one| one == "WATCHDOG=1");
    assert_eq!(
        manager
            .heard()
            .iter()
            .filter(|one| *one == "READY=1")
            .count(),
        1
    );
    let mut client = place.connect(2).unwrap();
    ask_health(&mut client, "keep-alive");
    assert!(read_one(&mut client).starts_with("HTTP/1.1 200 OK\r\n"));
    until_status(&manager, "1 connection, 0 users");
    drop(master);
    until_status(&manager, "waiting for the master; 1 connection, 0 users");
    assert!(worker.stop());
}

#[test]
fn a_worker_says_that_the_master_is_of_another_version() {
    let place = Place::new();
    let manager = Manager::new(&place, "worker.notify");
    let control = UnixListener::bind(place.dir.path().join("control.sock")).unwrap();
    let _worker = run(&place, &["worker", "0"], &[], &manager);
    let (mut stream, _) = control.accept().unwrap();
    let mut length = [0; 4];
    stream.read_exact(&mut length).unwrap();
    let answer = control::encode(&FromMaster::Mismatch { protocol: 77 }).unwrap();
    let length = u32::try_from(answer.len()).unwrap().to_be_bytes();
    stream.write_all(&[&length[..], &answer].concat()).unwrap();
    until_status(
        &manager,
        &format!(
            "starting: the master speaks version 77 of the control protocol, this worker {}: \
             restart the older of the two; 0 connections, 0 users",
            control::PROTOCOL
        ),
    );
}

#[test]
fn a_worker_that_drains_says_what_is_left_and_how_long_it_may_take() {
    let place = Place::new();
    let _master = place.master();
    let manager = Manager::new(&place, "worker.notify");
    let worker = run(&place, &["worker", "0"], &[("BANTER_DRAIN", "2")], &manager);
    place.hosts_of(0);
    let mut client = place.connect(2).unwrap();
    // A request that is not finished.
    client
        .write_all(b"POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
        .unwrap();
    until_status(&manager, "1 connection, 0 users");
    let since = manager.heard().len();
    worker.signal(Signal::TERM);
    until_status(&manager, "draining: 1 connection left");
    let heard = manager.heard().split_off(since);
    let begun = heard.iter().position(|one| one == "STOPPING=1").unwrap();
    assert_eq!(heard[begun + 1], "EXTEND_TIMEOUT_USEC=8000000");
    drop(client);
    assert!(worker.stop());
}

#[test]
fn the_master_says_how_many_are_served_and_why_nobody_is() {
    let place = Place::new();
    let manager = Manager::new(&place, "master.notify");
    let master = run(&place, &["master"], &[], &manager);
    manager.until("READY=1", 0, |one| one == "READY=1");
    until_status(
        &manager,
        "waiting for workers; 0 workers, 0 connections routed, 0 users online",
    );
    let worker = place.worker(0, &[("BANTER_MAX_CONNECTIONS", "1")]);
    until_status(&manager, "1 worker, 0 connections routed, 0 users online");
    let mut client = place.connect(2).unwrap();
    ask_health(&mut client, "keep-alive");
    assert!(read_one(&mut client).starts_with("HTTP/1.1 200 OK\r\n"));
    until_status(
        &manager,
        "all workers are full, connections are refused; 1 worker, 1 connection routed, 0 users online",
    );
    let since = manager.heard().len();
    manager.until("WATCHDOG=1", since, |one| one == "WATCHDOG=1");
    assert!(worker.stop());
    until_status(
        &manager,
        "waiting for workers; 0 workers, 1 connection routed, 0 users online",
    );
    // What has not changed is not said again.
    let heard = manager.heard();
    let statuses: Vec<_> = heard
        .iter()
        .filter(|one| one.starts_with("STATUS="))
        .collect();
    assert!(
        statuses.windows(2).all(|pair| pair[0] != pair[1]),
        "{statuses:?}"
    );
    assert!(master.stop());
    manager.until("STOPPING=1", since, |one| one == "STOPPING=1");
}
