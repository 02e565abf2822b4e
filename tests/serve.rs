//! `banter serve`, and what the program says and exits with, by running it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, getpgid, kill_process};
use tempfile::TempDir;

/// Long enough for a loaded machine; only a failing test waits for it.
const DEADLINE: Duration = Duration::from_secs(60);

/// `banter` with nothing of this process's environment, at home in `dir`.
fn banter(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_banter"));
    command
        .args(args)
        .env_clear()
        .env("HOME", dir)
        .env("XDG_RUNTIME_DIR", dir);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Tells stderr's one line of a run that has to fail, with its exit status.
fn fails(output: &Output) -> (i32, String) {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(text.lines().count(), 1, "one line: {text}");
    (output.status.code().unwrap(), text.trim_end().to_owned())
}

/// A running `banter serve`, killed at the end.
struct Serve {
    process: Child,
    stdout: BufReader<ChildStdout>,
    /// Everything that it and its children write to stderr; ends when all of them have ended.
    stderr: mpsc::Receiver<String>,
    port: u16,
    dir: TempDir,
}

impl Serve {
    /// Starts it and waits until it says that it listens.
    fn start(workers: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let workers = workers.to_string();
        let mut process = banter(dir.path(), &["serve", "--port", "0", "--workers", &workers])
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(process.stdout.take().unwrap());
        let mut pipe = process.stderr.take().unwrap();
        let (sender, stderr) = mpsc::channel();
        thread::spawn(move || {
            let mut text = String::new();
            pipe.read_to_string(&mut text).unwrap();
            let _ = sender.send(text);
        });
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let port = line
            .strip_prefix("Banter listens on http://localhost:")
            .and_then(|rest| rest.strip_suffix("/\n")?.parse().ok());
        let Some(port) = port else {
            let _ = process.kill();
            panic!("{line:?}; {}", stderr.recv_timeout(DEADLINE).unwrap());
        };
        Self {
            process,
            stdout,
            stderr,
            port,
            dir,
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.process)
    }

    fn wait(&mut self) -> ExitStatus {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(begin.elapsed() < DEADLINE, "it does not end");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// The child process of this role (`master`, `worker 0`), once it is there and not `other`.
    fn child(&self, role: &str, other: Option<Pid>) -> Pid {
        let begin = Instant::now();
        loop {
            let children = children_of(self.pid());
            let found = children
                .into_iter()
                .find(|(_, args)| args == role)
                .map(|(pid, _)| pid);
            if let Some(pid) = found.filter(|pid| Some(*pid) != other) {
                return pid;
            }
            assert!(begin.elapsed() < DEADLINE, "no {role}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// The private directories of the sockets that are there.
    fn runtime_dirs(&self) -> usize {
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("banter-")).count()
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The living children of a process, each with its arguments.
fn children_of(parent: Pid) -> Vec<(Pid, String)> {
    let mut children = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        // Each may be gone before it is read.
        let read = |name| std::fs::read_to_string(entry.path().join(name)).ok();
        let Some((stat, args)) = read("stat").zip(read("cmdline")) else {
            continue;
        };
        // pid (name) state ppid …; the name may hold anything.
        let Some((_, fields)) = stat.rsplit_once(") ") else {
            continue;
        };
        let mut fields = fields.split(' ').skip(1);
        if fields.next() != Some(&parent.as_raw_nonzero().to_string()) {
            continue;
        }
        let pid = entry
            .file_name()
            .to_str()
            .and_then(|pid| Pid::from_raw(pid.parse().ok()?));
        let args: Vec<&str> = args.split_terminator('\0').skip(1).collect();
        children.extend(pid.map(|pid| (pid, args.join(" "))));
    }
    children
}

#[test]
fn serve_tells_once_where_it_listens_and_stops_cleanly_on_sigterm() {
    let mut serve = Serve::start(2);
    TcpStream::connect((Ipv4Addr::LOCALHOST, serve.port)).unwrap();
    let state = serve.dir.path().join(".local/share/banter");
    let secret = std::fs::metadata(state.join("jwt-secret")).unwrap();
    assert_eq!(secret.permissions().mode() & 0o777, 0o600);
    assert_eq!(
        std::fs::metadata(&state).unwrap().permissions().mode() & 0o777,
        0o700
    );
    assert_eq!(serve.runtime_dirs(), 1);
    // Else Ctrl-C would reach it beside the supervisor.
    let worker = serve.child("worker 1", None);
    assert_eq!(
        getpgid(Some(worker)).unwrap(),
        worker,
        "a process group of its own"
    );

    kill_process(serve.pid(), Signal::TERM).unwrap();
    let status = serve.wait();
    let log = serve
        .stderr
        .recv_timeout(DEADLINE)
        .expect("no child is left");
    assert_eq!(status.code(), Some(0), "{log}");
    let mut rest = String::new();
    serve.stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, format!("Store: embedded, in {}\n", state.display()));
    assert_eq!(serve.runtime_dirs(), 0);
    TcpListener::bind((Ipv4Addr::LOCALHOST, serve.port)).expect("the port is free again");
}

#[test]
fn children_may_open_as_many_files_as_the_hard_limit_allows() {
    let serve = Serve::start(1);
    let limits = format!(
        "/proc/{}/limits",
        serve.child("worker 0", None).as_raw_nonzero()
    );
    let limits = std::fs::read_to_string(limits).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .unwrap();
    let numbers: Vec<&str> = line.split_whitespace().skip(3).take(2).collect();
    assert_eq!(numbers[0], numbers[1], "{line}");
}

#[test]
fn sigint_stops_it_too() {
    let mut serve = Serve::start(1);
    kill_process(serve.pid(), Signal::INT).unwrap();
    assert_eq!(serve.wait().code(), Some(0));
    serve
        .stderr
        .recv_timeout(DEADLINE)
        .expect("no child is left");
}

#[test]
fn a_child_that_is_killed_comes_back_and_no_other_is_touched() {
    let serve = Serve::start(1);
    let (master, worker) = (serve.child("master", None), serve.child("worker 0", None));
    kill_process(master, Signal::KILL).unwrap();
    serve.child("master", Some(master));
    TcpStream::connect((Ipv4Addr::LOCALHOST, serve.port)).expect("not refused meanwhile");
    assert_eq!(serve.child("worker 0", None), worker);
    kill_process(worker, Signal::KILL).unwrap();
    serve.child("worker 0", Some(worker));
}

#[test]
fn nothing_outlives_a_supervisor_that_is_killed() {
    let mut serve = Serve::start(2);
    serve.process.kill().unwrap();
    serve.wait();
    serve
        .stderr
        .recv_timeout(DEADLINE)
        .expect("no child is left");
}

#[test]
fn a_port_in_use_is_told_in_one_line() {
    let serve = Serve::start(1);
    let dir = tempfile::tempdir().unwrap();
    let port = serve.port.to_string();
    let output = banter(dir.path(), &["serve"])
        .env("PORT", &port)
        .output()
        .unwrap();
    let (status, line) = fails(&output);
    assert_eq!(status, 1);
    assert!(
        line.starts_with(&format!("banter: port {port} is in use")),
        "{line}"
    );
}

#[test]
fn what_the_operator_has_to_mend_is_told_in_one_line_with_its_own_exit_status() {
    let dir = tempfile::tempdir().unwrap();
    let run = |args: &[&str], name: &str, value: &str| {
        let output = banter(dir.path(), args)
            .env("PORT", "0")
            .env(name, value)
            .output()
            .unwrap();
        fails(&output)
    };
    for (args, (name, value), told) in [
        (
            &["serve"][..],
            ("REDIS_URL", "localhost:6379"),
            "banter: REDIS_URL: \"localhost:6379\" does not begin with a known scheme",
        ),
        (
            &["serve"],
            ("JWT_SECRET", "shhhh"),
            "banter: JWT_SECRET: the JWT secret is a well-known",
        ),
        (
            &["serve"],
            ("RUST_LOG", "banter=loud"),
            "banter: --log (RUST_LOG): \"banter=loud\"",
        ),
        (
            &["serve"],
            ("BANTER_JWT_SECRET_FILE", "/missing"),
            "banter: /missing: cannot read",
        ),
        (
            &["serve"],
            ("BANTER_STATE_DIR", "/dev/null/x"),
            "banter: cannot make the state directory",
        ),
    ] {
        let (status, line) = run(args, name, value);
        assert_eq!(status, 78, "{line}");
        assert!(line.starts_with(told), "{line}");
    }
    let output = banter(dir.path(), &["serve"])
        .env_remove("HOME")
        .output()
        .unwrap();
    let (status, line) = fails(&output);
    assert_eq!(status, 78);
    assert!(
        line.starts_with("banter: no directory for the state"),
        "{line}"
    );
}

#[test]
fn a_wrong_command_line_has_the_usual_exit_status() {
    let dir = tempfile::tempdir().unwrap();
    let output = banter(dir.path(), &["serve", "--nonsense"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn health_without_a_server_says_so_on_stdout_and_fails() {
    let dir = tempfile::tempdir().unwrap();
    // Bound but not listening: nobody else can take the port meanwhile.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket
        .bind(&std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())
        .unwrap();
    let port = socket
        .local_addr()
        .unwrap()
        .as_socket()
        .unwrap()
        .port()
        .to_string();
    let output = banter(dir.path(), &["health", "--port", &port])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.starts_with(&format!("port {port}: ")) && text.lines().count() == 1,
        "{text}"
    );
}

#[test]
fn a_child_of_a_supervisor_that_is_gone_does_not_start() {
    let dir = tempfile::tempdir().unwrap();
    let output = banter(dir.path(), &["worker", "0"])
        .env("BANTER_SUPERVISOR_PID", "999999999")
        .output()
        .unwrap();
    let (status, line) = fails(&output);
    assert_eq!(
        (status, line.as_str()),
        (1, "banter: the supervisor, process 999999999, is gone")
    );
}
