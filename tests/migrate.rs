//! `banter migrate`, by running it: a real Redis as the source, and both stores as the target.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use banter::store::embedded::Embedded;
use banter::store::redis::{RedisSettings, RedisStore};
use banter::store::{NewMessage, PAGE_LIMIT, Range, Store};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Long enough for a loaded machine; only a failing test waits for it.
const DEADLINE: Duration = Duration::from_secs(60);

/// Accounts of [`Before`], which all have the password `hunter42`.
const USERS: usize = 300;
/// Channels beside General.
const CHANNELS: usize = 200;
/// Messages of General, and of each other channel.
const IN_GENERAL: u64 = 2500;
const IN_OTHERS: u64 = 3;

/// A `redis-server` on a unix socket, which ends and goes when it is dropped.
struct Redis {
    directory: TempDir,
    process: Child,
}

impl Redis {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("redis.sock");
        let process = Command::new("redis-server")
            .args(["--port", "0", "--save", "", "--unixsocket"])
            .arg(&socket)
            .arg("--dir")
            .arg(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("these tests need the program redis-server: `make install-test-deps`");
        let redis = Self { directory, process };
        until("redis-server listens", || {
            UnixStream::connect(&socket).is_ok()
        });
        redis
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("redis.sock")
    }

    fn url(&self) -> String {
        url(&self.socket())
    }

    fn connect(&self) -> redis::Connection {
        let client = redis::Client::open(self.url()).unwrap();
        client.get_connection().unwrap()
    }

    /// What is not Banter's, in the form in which Redis would write it to its disk.
    fn others(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let mut connection = self.connect();
        let keys: Vec<Vec<u8>> = redis::cmd("KEYS").arg("*").query(&mut connection).unwrap();
        let keys = keys.into_iter().filter(|key| !key.starts_with(b"{"));
        keys.map(|key| {
            let value = redis::cmd("DUMP").arg(&key).query(&mut connection);
            (key, value.unwrap())
        })
        .collect()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn url(socket: &Path) -> String {
    format!("unix:{}", socket.display())
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < DEADLINE, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The data of the server that came before, with garbage of every kind.
struct Before {
    redis: Redis,
    /// The hash of every account.
    hash: String,
}

impl Before {
    fn new() -> Self {
        let redis = Redis::start();
        let hash = bcrypt::hash("hunter42", 4).unwrap();
        let mut pipe = redis::pipe();
        let mut user = |key: &str, fields: &[(&str, &str)]| {
            pipe.hset_multiple(key, fields).ignore();
        };
        for n in 0..USERS {
            let name = format!("user{n}");
            let fields = [("name", name.as_str()), ("password", &hash)];
            user(&format!("user__{name}"), &fields);
        }
        user("user__ab", &[("name", "ab"), ("password", &hash)]);
        user("user__System", &[("name", "System"), ("password", &hash)]);
        user("user__no body", &[("password", &hash)]);
        user("user__Other", &[("name", "other"), ("password", &hash)]);
        user("user__nopassword", &[("name", "nopassword")]);
        user(
            "user__plain",
            &[("name", "plain"), ("password", "hunter42")],
        );
        pipe.set("user__string", "not a hash").ignore();

        let mut channel = |item: String| {
            pipe.rpush("channel__", item).ignore();
        };
        channel(json!({"key": "general", "name": "General"}).to_string());
        for n in 0..CHANNELS {
            channel(json!({"key": format!("c{n}"), "name": format!("Ch {n}")}).to_string());
            if n == 7 {
                channel("{\"key\": \"half".to_owned());
                channel(json!({"name": "no key"}).to_string());
                channel(json!({"key": "nameless"}).to_string());
                channel(json!({"key": "c1", "name": "again"}).to_string());
            }
        }

        for n in 0..CHANNELS {
            for m in 0..IN_OTHERS {
                let item = json!({"message": format!("{n} {m}"), "user": "user1", "date": m});
                pipe.rpush(format!("channel_msg__c{n}"), item.to_string())
                    .ignore();
            }
        }
        pipe.rpush(
            "channel_msg__privä te",
            json!({"message": "psst", "user": "user1", "date": 5}).to_string(),
        )
        .ignore();
        pipe.set("channel_msg__string", "not a list").ignore();
        pipe.rpush("channel_msg__", "{}").ignore();
        pipe.rpush(format!("channel_msg__{}", "x".repeat(129)), "{}")
            .ignore();
        pipe.set("unrelated", "1").ignore();
        for n in 1..=IN_GENERAL {
            let date = posted_at(n);
            let date = match n {
                100 => json!("yesterday"),
                101 => json!(date.as_millisecond()),
                102 => json!("2099-01-01T00:00:00.000Z"),
                _ => json!(format!("{date:.3}")),
            };
            let item = json!({"message": general_text(n), "user": "user2", "date": date});
            pipe.rpush("channel_msg__general", item.to_string())
                .ignore();
            // All of these are left out.
            let garbage: &[u8] = match n {
                1 => b"",
                50 => b"{\"message\": \"cut of",
                999 => br#"{"message": 5, "user": "user1", "date": 1}"#,
                1000 => br#"{"message": "", "user": "user1", "date": 1}"#,
                1001 => br#"{"message": "nobody", "date": 1}"#,
                2000 => b"\xff\xfe",
                2001 => br#"["message", "user1"]"#,
                _ => continue,
            };
            pipe.rpush("channel_msg__general", garbage).ignore();
        }
        let large = json!({"message": "x".repeat(1_000_001), "user": "user1"});
        pipe.rpush("channel_msg__general", large.to_string())
            .ignore();
        pipe.query::<()>(&mut redis.connect()).unwrap();
        Self { redis, hash }
    }

    /// The report of the first run.
    fn report(&self) -> String {
        let messages = IN_GENERAL + CHANNELS as u64 * IN_OTHERS + 1;
        format!(
            "users: {USERS} migrated, 0 already there, 7 skipped\n  \
             1 skipped: it has no password (user__nopassword)\n  \
             1 skipped: it is not a hash (user__string)\n  \
             1 skipped: its field \"name\" holds another name than its key (user__Other)\n  \
             1 skipped: its password is not a hash of bcrypt ($2a$, $2b$, $2y$; cost 4 to 16) \
             (user__plain)\n  \
             3 skipped: the name is not allowed here\n\
             channels: {CHANNELS} migrated, 1 already there, 4 skipped\n  \
             1 skipped: it has no name (channel__[11])\n  \
             1 skipped: it is not a JSON object (channel__[9])\n  \
             1 skipped: its key is in the list twice (channel__[12])\n  \
             1 skipped: its key is not a string of 1 to 128 characters (channel__[10])\n\
             messages: {messages} migrated, 0 already there, 11 skipped\n  \
             1 skipped: it has no author (channel_msg__general[1005])\n  \
             1 skipped: it is not UTF-8 (channel_msg__general[2005])\n  \
             3 skipped: it is not a JSON object (channel_msg__general[1], \
             channel_msg__general[51], channel_msg__general[2007])\n  \
             1 skipped: it is not a list (channel_msg__string)\n  \
             2 skipped: the channel's key is not 1 to 128 characters of UTF-8\n  \
             1 skipped: the message has more than 1 MB (channel_msg__general[2507])\n  \
             1 skipped: the message is empty (channel_msg__general[1003])\n  \
             1 skipped: the message is not a string (channel_msg__general[1001])\n  \
             2 without a date that can be read: each has the date of the one before\n"
        )
    }

    /// The report of a run after everything was migrated.
    fn report_of_nothing(&self) -> String {
        let users = format!("users: {USERS} migrated, 0 already there");
        let channels = format!("channels: {CHANNELS} migrated, 1 already there");
        let count = IN_GENERAL + CHANNELS as u64 * IN_OTHERS + 1;
        let messages = format!("messages: {count} migrated, 0 already there");
        self.report()
            .replace(&users, &format!("users: 0 migrated, {USERS} already there"))
            .replace(
                &channels,
                &format!("channels: 0 migrated, {} already there", CHANNELS + 1),
            )
            .replace(
                &messages,
                &format!("messages: 0 migrated, {count} already there"),
            )
    }

    /// Checks that a store holds exactly what is to be taken over.
    async fn check(&self, store: &dyn Store) {
        for n in 0..USERS {
            let user = store.user(&format!("user{n}")).await.unwrap().unwrap();
            assert_eq!(user.password_hash, self.hash);
        }
        for name in [
            "ab",
            "System",
            "no body",
            "Other",
            "other",
            "nopassword",
            "plain",
            "string",
        ] {
            assert_eq!(store.user(name).await.unwrap(), None, "{name}");
        }

        let channels = store.channels().await.unwrap();
        let names: Vec<_> = channels.iter().map(|c| (&*c.key, &*c.name)).collect();
        assert_eq!(names.len(), CHANNELS + 3);
        assert_eq!(names[0], ("general", "General"));
        for (n, name) in names[3..].iter().enumerate() {
            assert_eq!(*name, (&*format!("c{n}"), &*format!("Ch {n}")));
        }

        let general = everything(store, "general").await;
        assert_eq!(general.len() as u64, IN_GENERAL);
        for (n, message) in (1..).zip(&general) {
            let dated = match n {
                100 => 99,
                102 => 101,
                _ => n,
            };
            let date = posted_at(dated);
            assert_eq!(message["message"], general_text(n));
            assert_eq!(message["user"], "user2");
            assert_eq!(message["date"], format!("{date:.3}"));
        }
        let page = store.read("general", Range::Latest { start: 25, end: 50 });
        let page = page.await.unwrap();
        let ids: Vec<u64> = page.messages.iter().map(|message| message.id).collect();
        assert_eq!(ids, (IN_GENERAL - 49..=IN_GENERAL - 25).collect::<Vec<_>>());
        for n in 0..CHANNELS {
            let messages = everything(store, &format!("c{n}")).await;
            let texts: Vec<_> = messages.iter().map(|m| m["message"].clone()).collect();
            let expected: Vec<_> = (0..IN_OTHERS).map(|m| format!("{n} {m}")).collect();
            assert_eq!(texts, expected);
        }
        let private = everything(store, "privä te").await;
        assert_eq!(private.len(), 1);
        assert_eq!(private[0]["date"], "1970-01-01T00:00:00.005Z");
    }
}

/// When General's message `n` was posted.
fn posted_at(n: u64) -> jiff::Timestamp {
    jiff::Timestamp::from_second(1_500_000_000 + n.cast_signed()).unwrap()
}

/// The text of General's message `n`.
fn general_text(n: u64) -> String {
    format!("message {n}: \"ä\u{0}\n😀\"")
}

/// All events of a channel; checks that their ids are dense.
async fn everything(store: &dyn Store, channel: &str) -> Vec<Value> {
    let mut all: Vec<Value> = Vec::new();
    loop {
        let range = Range::After {
            id: all.len() as u64,
            limit: PAGE_LIMIT,
        };
        let page = store.read(channel, range).await.unwrap();
        if page.messages.is_empty() {
            assert_eq!(page.last, all.len() as u64, "{channel}");
            return all;
        }
        for message in page.messages {
            let event: Value = serde_json::from_str(message.event.get()).unwrap();
            assert_eq!(event["id"], all.len() as u64 + 1, "{channel}");
            assert_eq!(event["channel"], channel);
            assert_eq!(message.sender, "");
            all.push(event);
        }
    }
}

/// Where to migrate to.
enum Target {
    /// A state directory.
    Embedded(TempDir),
    /// The URL of a Redis.
    Redis(String),
}

impl Target {
    /// A new state directory.
    fn embedded() -> Self {
        Self::Embedded(tempfile::tempdir().unwrap())
    }

    /// `banter migrate` to it.
    fn migrate(&self, from: &str) -> Command {
        let mut command = banter(&["migrate", "--from", from]);
        match self {
            Self::Embedded(directory) => command.arg("--state-dir").arg(directory.path()),
            Self::Redis(url) => command.env("REDIS_URL", url),
        };
        command
    }

    /// Its report.
    fn report(&self, from: &str) -> String {
        report(&self.migrate(from).output().unwrap())
    }

    /// Has `then` look at what it holds.
    async fn open(&self, then: impl AsyncFnOnce(Arc<dyn Store>)) {
        match self {
            Self::Embedded(directory) => {
                let store = Embedded::open(&directory.path().join("banter.db")).unwrap();
                then(Arc::new(store.client(Arc::new(|_| true)))).await;
                store.shutdown().await;
            }
            Self::Redis(url) => {
                let settings = RedisSettings::new(url);
                then(
                    RedisStore::connect(settings, Arc::new(|_| true))
                        .await
                        .unwrap(),
                )
                .await;
            }
        }
    }
}

fn banter(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_banter"));
    command.args(args).env_clear().stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn report(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Without the examples whose order is Redis'.
fn without_order(report: &str) -> String {
    let lines = report.lines().map(|line| match line.split_once(" (") {
        Some((before, _))
            if before.ends_with("not allowed here") || before.ends_with("of UTF-8") =>
        {
            before
        }
        _ => line,
    });
    lines.map(|line| format!("{line}\n")).collect()
}

/// Stands between a client and a Redis, counts the bytes that Redis sends, and stops after some.
struct Relay {
    directory: TempDir,
    passed: Arc<AtomicU64>,
    stopped: mpsc::Receiver<()>,
}

impl Relay {
    fn start(server: PathBuf, limit: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("relay.sock")).unwrap();
        let passed = Arc::new(AtomicU64::new(0));
        let (stop, stopped) = mpsc::channel();
        let count = Arc::clone(&passed);
        // It ends with its one client, or with the test.
        thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            let mut server = UnixStream::connect(server).unwrap();
            let (mut requests, mut into) =
                (client.try_clone().unwrap(), server.try_clone().unwrap());
            thread::spawn(move || std::io::copy(&mut requests, &mut into));
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = server.read(&mut buffer) {
                if count.load(Ordering::Relaxed) > limit {
                    let _ = stop.send(());
                    // Silent, but not closed.
                    thread::sleep(DEADLINE);
                    return;
                }
                if client.write_all(&buffer[..length]).is_err() {
                    return;
                }
                count.fetch_add(length as u64, Ordering::Relaxed);
            }
        });
        Self {
            directory,
            passed,
            stopped,
        }
    }

    fn url(&self) -> String {
        url(&self.directory.path().join("relay.sock"))
    }
}

async fn survives_kills_and_repetition(before: &Before, target: &Target) {
    let untouched = before.redis.others();
    // How much there is to read.
    let relay = Relay::start(before.redis.socket(), u64::MAX);
    let report = Target::embedded().report(&relay.url());
    assert_eq!(without_order(&report), without_order(&before.report()));
    let bytes = relay.passed.load(Ordering::Relaxed);

    let mut migrated = Vec::new();
    for percent in [8, 20, 50, 70] {
        let relay = Relay::start(before.redis.socket(), bytes * percent / 100);
        let mut process = target.migrate(&relay.url()).spawn().unwrap();
        let stopped = relay.stopped.recv_timeout(DEADLINE);
        process.kill().unwrap();
        let output = process.wait_with_output().unwrap();
        stopped.expect("it got so far");
        assert_eq!((output.status.code(), output.stdout), (None, Vec::new()));
        target
            .open(async |store| migrated.push(everything(&*store, "general").await.len()))
            .await;
    }
    assert!(migrated.is_sorted(), "{migrated:?}");
    let half = migrated
        .iter()
        .any(|n| (1..IN_GENERAL as usize).contains(n));
    assert!(half, "none was killed amid the messages: {migrated:?}");

    let report = target.report(&before.redis.url());
    assert!(report.contains("users: 0 migrated"), "{report}");
    target.open(async |store| before.check(&*store).await).await;

    let nothing = target.report(&before.redis.url());
    assert_eq!(
        without_order(&nothing),
        without_order(&before.report_of_nothing())
    );
    target.open(async |store| before.check(&*store).await).await;
    assert_eq!(before.redis.others(), untouched, "the source was changed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_into_the_embedded_store_survives_kills_and_repetition() {
    survives_kills_and_repetition(&Before::new(), &Target::embedded()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_within_one_redis_survives_kills_and_repetition() {
    let before = Before::new();
    let target = Target::Redis(before.redis.url());
    survives_kills_and_repetition(&before, &target).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_changed_on_either_side_is_respected() {
    let before = Before::new();
    let redis = Redis::start();
    let from = before.redis.url();
    let targets = [Target::embedded(), Target::Redis(redis.url())];
    for target in &targets {
        target.report(&from);
        target
            .open(async |store| {
                let hash = &before.hash;
                store.replace_hash("user1", hash, "newer").await.unwrap();
                let post = NewMessage {
                    channel: "c1".to_owned(),
                    user: "user1".to_owned(),
                    message: "native".to_owned(),
                    nonce: "n".to_owned(),
                    client_nonce: false,
                    sender: String::new(),
                };
                assert_eq!(store.post(post).await.unwrap().id, IN_OTHERS + 1);
            })
            .await;
    }

    let mut pipe = redis::pipe();
    let item = |message: &str| json!({"message": message, "user": "u", "date": 9}).to_string();
    for channel in ["c1", "c2"] {
        pipe.rpush(format!("channel_msg__{channel}"), item("late"));
    }
    // As if it were another server's.
    pipe.lset("channel_msg__c3", 2, item("another"));
    pipe.rpush("channel_msg__c3", item("late"));
    pipe.query::<redis::Value>(&mut before.redis.connect())
        .unwrap();

    for target in &targets {
        let report = target.report(&from);
        let there = IN_GENERAL + (CHANNELS as u64 - 1) * IN_OTHERS + 1;
        for line in [
            &format!("messages: 1 migrated, {there} already there, 16 skipped"),
            "  1 skipped: the channel has got messages of its own already (channel_msg__c1)",
            "  4 skipped: other messages than these were brought into the channel before \
             (channel_msg__c3)",
        ] {
            assert!(report.lines().any(|l| l == line), "{line} in {report}");
        }
        target
            .open(async |store| {
                let user = store.user("user1").await.unwrap().unwrap();
                assert_eq!(user.password_hash, "newer");
                for (channel, last) in [("c1", "native"), ("c2", "late"), ("c3", "3 2")] {
                    let messages = everything(&*store, channel).await;
                    assert_eq!(messages.last().unwrap()["message"], last);
                }
            })
            .await;
    }
}

#[test]
fn an_empty_source_is_done_at_once_and_a_missing_one_is_told_in_one_line() {
    let redis = Redis::start();
    let target = Target::embedded();
    let nothing = "0 migrated, 0 already there, 0 skipped";
    assert_eq!(
        target.report(&redis.url()),
        format!("users: {nothing}\nchannels: {nothing}\nmessages: {nothing}\n")
    );
    for from in ["unix:/nonexistent/redis.sock", "nonsense"] {
        let output = target.migrate(from).output().unwrap();
        let line = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(78), "{line}");
        assert!(
            line.starts_with("banter: ") && line.contains("--from"),
            "{line}"
        );
        assert_eq!(line.lines().count(), 1, "{line}");
    }
}

/// A running `banter serve`, killed at the end.
struct Serve {
    process: Child,
    port: u16,
    _home: TempDir,
}

impl Serve {
    fn start(state_dir: &Path) -> Self {
        let home = tempfile::tempdir().unwrap();
        let mut process = banter(&["serve", "--port", "0", "--workers", "1"])
            .env("BANTER_STATE_DIR", state_dir)
            .env("XDG_RUNTIME_DIR", home.path())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let port = line
            .strip_prefix("Banter listens on http://localhost:")
            .and_then(|rest| rest.strip_suffix("/\n")?.parse().ok());
        let Some(port) = port else {
            let _ = process.kill();
            panic!("{line:?}");
        };
        Self {
            process,
            port,
            _home: home,
        }
    }

    /// The status of a login.
    fn login(&self, name: &str, password: &str) -> String {
        let body = json!({"name": name, "password": password}).to_string();
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        write!(
            stream,
            "POST /auth/login HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.lines().next().unwrap_or_default().to_owned()
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn a_login_with_the_old_password_replaces_its_hash() {
    let before = Before::new();
    let target = Target::embedded();
    target.report(&before.redis.url());
    let Target::Embedded(directory) = &target else {
        unreachable!()
    };
    let database = rusqlite::Connection::open(directory.path().join("banter.db")).unwrap();
    let hash = || -> String {
        let query = "SELECT password_hash FROM users WHERE name = 'user1'";
        database.query_row(query, [], |row| row.get(0)).unwrap()
    };

    let serve = Serve::start(directory.path());
    assert_eq!(
        serve.login("user1", "hunter43"),
        "HTTP/1.1 401 Unauthorized"
    );
    assert_eq!(hash(), before.hash);
    assert_eq!(serve.login("user1", "hunter42"), "HTTP/1.1 200 OK");
    let renewed = hash();
    assert!(renewed.starts_with("$argon2id$"), "{renewed}");
    assert_eq!(serve.login("user1", "hunter42"), "HTTP/1.1 200 OK");
    assert_eq!(
        serve.login("user1", "hunter43"),
        "HTTP/1.1 401 Unauthorized"
    );
    assert_eq!(hash(), renewed);

    // The server has to be stopped for a migration.
    let output = target.migrate(&before.redis.url()).output().unwrap();
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(78), "{line}");
    assert!(line.contains("stop that one first"), "{line}");
    drop(serve);
    let report = target.report(&before.redis.url());
    assert_eq!(
        without_order(&report),
        without_order(&before.report_of_nothing())
    );
    assert_eq!(hash(), renewed, "the hash was overwritten");
}
