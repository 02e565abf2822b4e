//! The file of settings, and reading it again while everything runs. Real processes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

mod common;

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use common::{Manager, Place, Process, ask_health, read_all, read_one, until};
use rustix::process::Signal;

/// A file of settings.
struct File(PathBuf);

impl File {
    fn new(place: &Place, text: &str) -> Self {
        let file = Self(place.dir.path().join("banter.conf"));
        file.write(text);
        file
    }

    /// Replaces it whole, as editors do.
    fn write(&self, text: &str) {
        let new = self.0.with_extension("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, &self.0).unwrap();
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

fn banter(args: &[&str], env: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_banter"))
        .args(args)
        .env_clear()
        .envs(env.iter().copied())
        .output()
        .unwrap()
}

#[test]
fn a_file_counts_less_than_the_environment_and_that_less_than_the_command_line() {
    let place = Place::new();
    // Nobody listens on ports under 10.
    let file = File::new(&place, "# which port\nPORT=3\n");
    let asked = |args: &[&str], env: &[(&str, &str)]| {
        let args = [&["health", "--config", file.path()], args].concat();
        String::from_utf8(banter(&args, env).stdout).unwrap()
    };
    let told = asked(&[], &[]);
    assert!(told.starts_with("port 3: "), "{told}");
    let told = asked(&[], &[("PORT", "4")]);
    assert!(told.starts_with("port 4: "), "{told}");
    let told = asked(&["--port", "5"], &[("PORT", "4")]);
    assert!(told.starts_with("port 5: "), "{told}");
    let output = banter(&["health"], &[("BANTER_CONFIG", file.path())]);
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(told.starts_with("port 3: "), "{told}");
    // As a container's composer writes what is not set.
    let output = banter(&["health", "--port", "6"], &[("BANTER_CONFIG", "")]);
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(told.starts_with("port 6: "), "{told}");
}

#[test]
fn what_is_wrong_with_a_file_is_told_in_one_line_with_its_place() {
    let place = Place::new();
    let file = File::new(&place, "");
    for (text, place, told) in [
        (
            "\nBANTER_GRAZE=1",
            ", line 2: ",
            "BANTER_GRAZE is no setting",
        ),
        ("PORT=8000\nPORT 9000", ", line 2: ", "expected NAME=value"),
        (
            "PORT='8000",
            ", line 1: ",
            "PORT: the closing quote is missing",
        ),
        (
            "PORT=many",
            ", line 1: ",
            "PORT: invalid value 'many' for '--port <PORT>'",
        ),
        (
            "BANTER_DRAIN=9999",
            ", line 1: ",
            "BANTER_DRAIN: invalid value '9999'",
        ),
        (
            "RUST_LOG=banter=loud",
            ", line 1: ",
            "--log (RUST_LOG): \"banter=loud\"",
        ),
        (
            "BANTER_CONFIG=/x",
            ", line 1: ",
            "BANTER_CONFIG names this file",
        ),
        // What looks like a secret is not shown.
        ("JWT_SECRET: s3cret", ", line 1: ", "expected NAME=value"),
    ] {
        file.write(text);
        let output = banter(&["master", "--config", file.path()], &[]);
        let line = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(78), "{text}: {line}");
        assert_eq!(line.lines().count(), 1, "{line}");
        let begin = format!("banter: {}{place}{told}", file.path());
        assert!(line.starts_with(&begin), "{line}");
        assert!(!line.contains("s3cret"), "{line}");
    }
    let output = banter(&["master", "--config", "/nowhere/banter.conf"], &[]);
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(78));
    assert!(
        line.starts_with("banter: /nowhere/banter.conf: cannot read: "),
        "{line}"
    );
    // Nor is one missing that may be.
    let output = banter(
        &["health", "--port", "6", "--config=-/nowhere/banter.conf"],
        &[],
    );
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(told.starts_with("port 6: "), "{told}");
    file.write("JWT_SECRET=s3cret");
    let output = banter(&["worker", "--config", file.path(), "--help"], &[]);
    let help = String::from_utf8(output.stdout).unwrap();
    assert!(
        help.contains("JWT_SECRET") && !help.contains("s3cret"),
        "{help}"
    );
}

/// The status of a login that fails, by address 127.0.0.2.
fn login(place: &Place) -> u16 {
    let mut stream = place.connect(2).unwrap();
    let body = r#"{"name":"nobody","password":"nothing"}"#;
    write!(
        stream,
        "POST /auth/login HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let answer = read_all(&mut stream);
    answer[9..12].parse().unwrap()
}

/// Whether 127.0.0.3 may have five connections at once. (Fewer would depend on how soon the worker
/// notices the end of the ones before.)
fn has_room(place: &Place) -> bool {
    let mut open: Vec<_> = (0..5).map(|_| place.connect(3).unwrap()).collect();
    let answers = open.iter_mut().map(|stream| {
        ask_health(stream, "keep-alive");
        read_one(stream)
    });
    answers
        .into_iter()
        .all(|answer| answer.starts_with("HTTP/1.1 200 OK\r\n"))
}

/// Has a process read its settings again, and waits until it has.
fn reload(process: &Process, manager: &Manager) {
    let since = manager.heard().len();
    process.signal(Signal::HUP);
    manager.until("READY=1", since, |one| one == "READY=1");
    let heard = manager.heard().split_off(since);
    let begun = heard.iter().position(|one| one == "RELOADING=1").unwrap();
    assert!(heard[begun + 1].starts_with("MONOTONIC_USEC="), "{heard:?}");
}

#[test]
fn a_worker_goes_by_its_new_limits_and_a_broken_file_changes_nothing() {
    let place = Place::new();
    let _master = place.master();
    let manager = Manager::new(&place, "worker.notify");
    let file = File::new(
        &place,
        "BANTER_MAX_PER_ADDRESS=4\nBANTER_AUTH_RATE=3\nREDIS_URL=\n",
    );
    let worker = place.run(
        &[
            "worker",
            "0",
            "--config",
            file.path(),
            "--ping-timeout",
            "9",
        ],
        &[("NOTIFY_SOCKET", manager.address())],
    );
    manager.until("READY=1", 0, |one| one == "READY=1");
    assert!(!has_room(&place));
    for _ in 0..3 {
        assert_eq!(login(&place), 401);
    }
    assert_eq!(login(&place), 429);

    file.write("BANTER_MAX_PER_ADDRESS=0\nBANTER_AUTH_RATE=4\nRUST_LOG=warn,banter::settings=info");
    reload(&worker, &manager);
    // What failed before still counts.
    assert_eq!(login(&place), 401);
    assert_eq!(login(&place), 429);
    assert!(has_room(&place));
    worker.until_it_says(&[
        "event=\"reloaded\"",
        "BANTER_AUTH_RATE, BANTER_MAX_PER_ADDRESS, RUST_LOG",
    ]);
    let told = |what: &str| worker.log().matches(what).count();
    assert_eq!(told("login_failed"), 3, "the last was not logged any more");
    file.write("BANTER_AUTH_RATE=3");
    reload(&worker, &manager);
    assert_eq!(login(&place), 429);
    assert!(!worker.log().contains("restart_needed"), "{}", worker.log());

    let since = manager.heard().len();
    file.write("BANTER_AUTH_RATE=1000\nBANTER_AUTH_RATE=often");
    reload(&worker, &manager);
    assert_eq!(login(&place), 429, "the limits stay as they were");
    worker.until_it_says(&[
        "event=\"reload_failed\"",
        "banter.conf, line 2: BANTER_AUTH_RATE",
    ]);
    manager.until("what is wrong", since, |one| {
        one.starts_with("STATUS=settings not reloaded: ") && one.contains("banter.conf, line 2: ")
    });
    let since = manager.heard().len();
    file.write("BANTER_AUTH_RATE=1000\nJWT_SECRET=another secret, which is long enough too\nBANTER_PING_TIMEOUT=8");
    reload(&worker, &manager);
    assert_eq!(login(&place), 401);
    manager.until("no complaint", since, |one| {
        one.starts_with("STATUS=") && !one.contains("not reloaded")
    });
    // Both are outranked: nothing changes.
    assert!(!worker.log().contains("restart_needed"), "{}", worker.log());
    file.write("BANTER_REDIS_PREFIX=other\nBANTER_RUNTIME_DIR=/x");
    reload(&worker, &manager);
    worker.until_it_says(&[
        "event=\"restart_needed\"",
        "settings=\"BANTER_REDIS_PREFIX\"",
    ]);
    assert!(worker.stop());
}

#[test]
fn serve_and_all_its_processes_read_the_file_again_but_not_what_the_command_line_says() {
    let place = Place::new();
    let file = File::new(
        &place,
        "BANTER_AUTH_RATE=3\nBANTER_MAX_PER_ADDRESS=0\nWORKERS=1\n",
    );
    let manager = Manager::new(&place, "serve.notify");
    let mut command = Command::new(env!("CARGO_BIN_EXE_banter"));
    command
        .args(["serve", "--max-per-address", "4", "--config", file.path()])
        .env_clear()
        .env("PORT", place.port.to_string())
        .env("XDG_RUNTIME_DIR", place.dir.path())
        .env("BANTER_STATE_DIR", place.dir.path())
        .env("NOTIFY_SOCKET", manager.address())
        .stdout(Stdio::null());
    let serve = Process::start(&mut command);
    manager.until("READY=1", 0, |one| one == "READY=1");
    assert!(!has_room(&place), "the command line counts in the worker");
    for _ in 0..3 {
        assert_eq!(login(&place), 401);
    }
    assert_eq!(login(&place), 429, "the file counts in the worker");
    file.write("BANTER_AUTH_RATE=1000\nBANTER_MAX_PER_ADDRESS=5\nWORKERS=2\n");
    reload(&serve, &manager);
    until("the worker has read it", || login(&place) == 401);
    assert!(!has_room(&place));
    serve.until_it_says(&[
        "supervisor",
        "event=\"restart_needed\"",
        "settings=\"WORKERS\"",
    ]);
    serve.until_it_says(&["master", "event=\"reloaded\"", "BANTER_AUTH_RATE"]);
    serve.until_it_says(&["worker 0", "event=\"reloaded\"", "BANTER_AUTH_RATE"]);
    let log = serve.log();
    assert_eq!(log.matches("restart_needed").count(), 1, "{log}");
    assert!(serve.stop());
}
