//! The suite against a real Redis, and what only the store in Redis promises.
//!
//! Every test starts a `redis-server` of its own, on a unix socket in a temporary directory.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use banter::store::redis::{RedisSettings, RedisStore, Retention};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::*;

run_suite!(RedisHarness::new());

struct RedisHarness {
    server: Mutex<RedisServer>,
}

impl RedisHarness {
    fn new() -> Self {
        // So that ids are dense over a restart, as the suite expects.
        Self {
            server: Mutex::new(RedisServer::start(&["--appendfsync", "always"])),
        }
    }
}

impl Harness for RedisHarness {
    async fn open(&self, sink: BusSink) -> Arc<dyn Store> {
        let settings = self.server.lock().settings();
        open(settings, sink).await
    }

    async fn open_to_import(&self) -> Arc<dyn Import> {
        let settings = self.server.lock().settings();
        RedisStore::connect(settings, deaf()).await.unwrap()
    }

    async fn restart(&self) {
        let mut server = self.server.lock();
        server.stop();
        server.run();
    }
}

/// A `redis-server` and its data, which go when it is dropped.
struct RedisServer {
    directory: TempDir,
    arguments: Vec<String>,
    process: Option<Child>,
}

impl RedisServer {
    /// Starts one that appends to its file.
    fn start(arguments: &[&str]) -> Self {
        let mut server = Self::stopped(arguments);
        server.run();
        server
    }

    /// One that is not running yet.
    fn stopped(arguments: &[&str]) -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
            arguments: arguments.iter().map(|&a| a.to_owned()).collect(),
            process: None,
        }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("redis.sock")
    }

    fn url(&self) -> String {
        format!("unix:{}", self.socket().display())
    }

    fn settings(&self) -> RedisSettings {
        RedisSettings::new(self.url())
    }

    /// Starts it, and waits until it has loaded its data.
    fn run(&mut self) {
        let process = Command::new("redis-server")
            .args(["--port", "0", "--save", "", "--appendonly", "yes"])
            .arg("--dir")
            .arg(self.directory.path())
            .arg("--unixsocket")
            .arg(self.socket())
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("these tests need the program redis-server: `make install-test-deps`");
        let process = self.process.insert(process);
        let socket = self.directory.path().join("redis.sock");
        let started = Instant::now();
        loop {
            if let Some(status) = process.try_wait().unwrap() {
                panic!("redis-server ended by itself: {status}");
            }
            if UnixStream::connect(&socket).is_ok() && loaded(&socket) {
                return;
            }
            assert!(started.elapsed() < DEADLINE, "redis-server does not answer");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn signal(&self, signal: Signal) {
        let process = self.process.as_ref().expect("it runs");
        kill_process(Pid::from_child(process), signal).unwrap();
    }

    /// Has it write its data and end.
    fn stop(&mut self) {
        self.signal(Signal::TERM);
        let mut process = self.process.take().expect("it runs");
        assert!(process.wait().unwrap().success());
    }

    /// Ends it at once, as a crash would.
    fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.process.take().expect("it runs").wait().unwrap();
    }

    /// The file that it appends to, the newest if there are several.
    fn append_file(&self) -> PathBuf {
        let directory = self.directory.path().join("appendonlydir");
        let files = directory.read_dir().unwrap();
        let files = files.map(|file| file.unwrap().path());
        let newest = files.filter(|file| file.to_string_lossy().ends_with(".incr.aof"));
        newest.max().expect("it appends")
    }

    /// How many bytes it has appended.
    fn appended(&self) -> u64 {
        self.append_file().metadata().unwrap().len()
    }

    /// Leaves so many bytes of its file, as a disk that lost its power would.
    fn truncate(&self, bytes: u64) {
        assert!(self.process.is_none() && self.appended() > bytes);
        let mut options = std::fs::OpenOptions::new();
        let file = options.write(true).open(self.append_file()).unwrap();
        file.set_len(bytes).unwrap();
    }

    /// Sends a command, given as words.
    fn command<T: ::redis::FromRedisValue>(&self, words: &[&str]) -> T {
        let client = ::redis::Client::open(self.url()).unwrap();
        let mut command = ::redis::cmd(words[0]);
        command.arg(&words[1..]);
        command
            .query(&mut client.get_connection().unwrap())
            .unwrap()
    }

    async fn open(&self, sink: BusSink) -> Arc<dyn Store> {
        open(self.settings(), sink).await
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It may have ended by itself.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// What a [`Proxy`] lets through from Redis.
#[derive(Clone, Copy, PartialEq)]
enum Mute {
    Nothing,
    /// Answers, but nothing that was published.
    Published,
    Everything,
}

/// Stands between a store and Redis, and can make its connections lose what Redis sends without
/// closing them.
struct Proxy {
    directory: TempDir,
    connections: Arc<Mutex<Vec<Arc<Mutex<Mute>>>>>,
}

impl Proxy {
    /// Starts one in front of a server. It ends with the test's process.
    fn start(server: &RedisServer) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("proxy.sock")).unwrap();
        let connections = Arc::<Mutex<Vec<_>>>::default();
        let (socket, all) = (server.socket(), Arc::clone(&connections));
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (Ok(client), Ok(server)) = (client, UnixStream::connect(&socket)) else {
                    continue;
                };
                let mute = Arc::new(Mutex::new(Mute::Nothing));
                all.lock().push(Arc::clone(&mute));
                let (requests, answers) =
                    (client.try_clone().unwrap(), server.try_clone().unwrap());
                std::thread::spawn(move || forward(requests, server, |_| {}));
                std::thread::spawn(move || {
                    forward(answers, client, |data| match *mute.lock() {
                        Mute::Nothing => {}
                        Mute::Everything => data.clear(),
                        // Redis writes what was published before or after the answer.
                        Mute::Published if data.contains(&b'>') => {
                            let answer = b":1\r\n";
                            let answered = data.starts_with(answer) || data.ends_with(answer);
                            data.clear();
                            data.extend(answer.iter().filter(|_| answered));
                        }
                        Mute::Published => {}
                    });
                });
            }
        });
        Self {
            directory,
            connections,
        }
    }

    fn settings(&self) -> RedisSettings {
        let socket = self.directory.path().join("proxy.sock");
        RedisSettings::new(format!("unix:{}", socket.display()))
    }

    /// Mutes the connections that there are.
    fn mute(&self, what: Mute) {
        for connection in &*self.connections.lock() {
            *connection.lock() = what;
        }
    }
}

/// Copies what comes from one side to the other until either closes, changed by `filter`.
fn forward(mut from: UnixStream, mut to: UnixStream, filter: impl Fn(&mut Vec<u8>)) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let mut data = buffer[..length].to_vec();
        filter(&mut data);
        if to.write_all(&data).is_err() {
            break;
        }
    }
    // They may be closed already.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

async fn open(settings: RedisSettings, sink: BusSink) -> Arc<dyn Store> {
    RedisStore::connect(settings, sink).await.unwrap()
}

/// Whether a Redis answers, and not that it is still loading.
fn loaded(socket: &std::path::Path) -> bool {
    let mut answer = [0; 5];
    let mut ping = || {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(b"PING\r\n")?;
        stream.read_exact(&mut answer)
    };
    // A Redis that wants a password is there as well.
    ping().is_ok() && (&answer == b"+PONG" || &answer == b"-NOAU")
}

/// Repeats a request until it succeeds, as a client would.
async fn stubbornly<T, F>(request: impl Fn() -> F) -> T
where
    F: Future<Output = Result<T, StoreError>>,
{
    let started = Instant::now();
    loop {
        match request().await {
            Ok(answer) => return answer,
            Err(StoreError::Unavailable(why)) => {
                assert!(started.elapsed() < DEADLINE, "still: {why}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(other) => panic!("{other}"),
        }
    }
}

/// Everything in a channel, by id.
async fn everything(store: &Arc<dyn Store>, channel: &str) -> BTreeMap<u64, String> {
    let mut all = BTreeMap::new();
    loop {
        let id = all.last_key_value().map_or(0, |(id, _)| *id);
        let limit = PAGE_LIMIT;
        let page = store.read(channel, Range::After { id, limit }).await;
        let page = page.unwrap();
        if page.messages.is_empty() {
            return all;
        }
        for message in page.messages {
            let text = event(&message)["message"].as_str().unwrap().to_owned();
            all.insert(message.id, text);
        }
    }
}

fn interruptions(ear: &Ear) -> usize {
    let events = ear.events.lock();
    let interruptions = events.iter().filter(|e| matches!(e, BusEvent::Interrupted));
    interruptions.count()
}

fn why<T: std::fmt::Debug>(result: Result<T, StoreError>) -> String {
    match result {
        Err(StoreError::Unavailable(why)) => why,
        other => panic!("not unavailable: {other:?}"),
    }
}

/// Waits for a condition that nobody tells of.
async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < DEADLINE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_when_redis_is_killed_amid_posts() {
    const ROUNDS: usize = 4;
    let mut server = RedisServer::start(&["--appendfsync", "always"]);
    let (ear, sink) = Ear::new();
    let store = server.open(sink).await;
    store.subscribe("c").await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let acknowledged = Arc::new(Mutex::new(BTreeMap::new()));
    let posters: Vec<_> = (0..8)
        .map(|poster| {
            let (store, stop) = (Arc::clone(&store), Arc::clone(&stop));
            let acknowledged = Arc::clone(&acknowledged);
            tokio::spawn(async move {
                for n in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let text = format!("poster {poster} message {n}");
                    let posted = stubbornly(|| store.post(message("c", "anna", &text))).await;
                    let before = acknowledged.lock().insert(posted.id, text);
                    assert_eq!(before, None, "id {} twice", posted.id);
                }
            })
        })
        .collect();
    for round in 1..=ROUNDS {
        let goal = acknowledged.lock().len() + rand::random_range(50..200);
        eventually("enough posts", || acknowledged.lock().len() >= goal).await;
        server.kill();
        server.run();
        ear.until("the interruption", |ear| interruptions(ear) == round)
            .await;
    }
    stop.store(true, Ordering::Relaxed);
    for poster in posters {
        poster.await.unwrap();
    }
    let end = stubbornly(|| store.post(message("c", "anna", "the end")))
        .await
        .id;
    acknowledged.lock().insert(end, "the end".to_owned());

    let stored = everything(&store, "c").await;
    // Every post was repeated until it was acknowledged: so nothing else is there, and none twice.
    assert_eq!(stored, *acknowledged.lock());
    assert!(stored.keys().copied().eq(1..=end), "ids are not dense");
    assert_eq!(store.subscribe("c").await.unwrap(), end);
    let heard = ear.ids("c");
    assert!(heard.is_sorted_by(|a, b| a < b), "{heard:?}");
}

#[tokio::test]
async fn a_redis_that_hangs_is_unavailable_soon_and_serves_again_when_it_goes_on() {
    let server = RedisServer::start(&[]);
    let (ear, sink) = Ear::new();
    let store = server.open(sink).await;
    store.subscribe("c").await.unwrap();
    post(&store, "c", "one").await;
    server.signal(Signal::STOP);
    let started = Instant::now();
    let (posted, read, subscribed) = tokio::join!(
        store.post(message("c", "anna", "two")),
        store.read("c", Range::Latest { start: 0, end: 5 }),
        store.subscribe("d"),
    );
    assert_eq!(why(posted), "Redis does not answer");
    assert_eq!(why(read), "Redis does not answer");
    assert_eq!(why(subscribed), "Redis cannot be reached");
    assert_eq!(
        why(store.typing("c", "anna").await),
        "Redis cannot be reached"
    );
    assert!(
        started.elapsed() < Duration::from_secs(6),
        "{:?}",
        started.elapsed()
    );
    // It has been away for so long that nobody waits any more.
    let started = Instant::now();
    assert_eq!(why(store.user("anna").await), "Redis cannot be reached");
    assert!(
        started.elapsed() < Duration::from_secs(3),
        "{:?}",
        started.elapsed()
    );

    server.signal(Signal::CONT);
    // The very same post: perhaps it was carried out after all.
    assert_eq!(
        stubbornly(|| store.post(message("c", "anna", "two")))
            .await
            .id,
        2
    );
    ear.until("an interruption", |ear| interruptions(ear) > 0)
        .await;
    assert_eq!(store.subscribe("c").await.unwrap(), 2);
    post(&store, "c", "three").await;
    ear.until_id("c", 3).await;
}

#[tokio::test]
async fn forgotten_scripts_are_sent_again() {
    let server = RedisServer::start(&[]);
    let store = server.open(deaf()).await;
    post(&store, "c", "one").await;
    server.command::<()>(&["SCRIPT", "FLUSH"]);
    assert_eq!(post(&store, "c", "two").await.id, 2);
    server.command::<()>(&["SCRIPT", "FLUSH"]);
    assert_eq!(everything(&store, "c").await.len(), 2);
}

#[tokio::test]
async fn requests_survive_the_loss_of_their_connection() {
    let server = RedisServer::start(&[]);
    let store = server.open(deaf()).await;
    for n in 1..=5 {
        server.command::<u64>(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
        assert_eq!(post(&store, "c", &n.to_string()).await.id, n);
    }
}

#[tokio::test]
async fn a_lost_subscriber_connection_is_an_interruption_and_delivery_goes_on() {
    let server = RedisServer::start(&[]);
    let (ear, sink) = Ear::new();
    let store = server.open(sink).await;
    for channel in ["c", "d"] {
        store.subscribe(channel).await.unwrap();
    }
    post(&store, "c", "one").await;
    ear.until_id("c", 1).await;
    assert_eq!(interruptions(&ear), 0);
    for round in 1..=3 {
        let killed: usize = server.command(&["CLIENT", "KILL", "TYPE", "pubsub"]);
        assert_eq!(killed, 1);
        ear.until("the interruption", |ear| interruptions(ear) == round)
            .await;
        // Delivery goes on by itself, and goes on when everything is subscribed to again.
        let id = post(&store, "c", &format!("before {round}")).await.id;
        ear.until_id("c", id).await;
        assert_eq!(store.subscribe("c").await.unwrap(), id);
        let id = post(&store, "c", &format!("after {round}")).await.id;
        ear.until_id("c", id).await;
        let id = post(&store, "d", &format!("after {round}")).await.id;
        ear.until_id("d", id).await;
    }
    assert_eq!(ear.ids("c"), (1..=7).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_subscriber_connection_that_hears_nothing_any_more_is_noticed_and_replaced() {
    let server = RedisServer::start(&[]);
    let poster = server.open(deaf()).await;
    for what in [Mute::Published, Mute::Everything] {
        let proxy = Proxy::start(&server);
        let (ear, sink) = Ear::new();
        let store = open(proxy.settings(), sink).await;
        let first = store.subscribe("c").await.unwrap() + 1;
        post(&poster, "c", &format!("heard {first}")).await;
        ear.until_id("c", first).await;
        proxy.mute(what);
        post(&poster, "c", &format!("missed {first}")).await;
        ear.until("the interruption", |ear| interruptions(ear) == 1)
            .await;
        // The other connection may be as mute, which shows once it is used.
        let last = stubbornly(|| store.subscribe("c")).await;
        assert_eq!(last, first + 1);
        post(&poster, "c", &format!("heard again {first}")).await;
        ear.until_id("c", first + 2).await;
        assert_eq!(ear.ids("c"), [first, first + 2]);
        assert_eq!(interruptions(&ear), 1);
    }
}

#[tokio::test]
async fn a_full_memory_is_unavailable_and_works_again_with_room() {
    let server = RedisServer::start(&[]);
    let store = server.open(deaf()).await;
    post(&store, "c", "one").await;
    server.command::<()>(&["CONFIG", "SET", "maxmemory", "1mb"]);
    let full = store.post(message("c", "anna", "two")).await;
    assert_eq!(why(full), "Redis is out of memory");
    let full = store.create_user(user("anna", "hash")).await;
    assert_eq!(why(full), "Redis is out of memory");
    assert_eq!(everything(&store, "c").await.len(), 1, "reading goes on");
    server.command::<()>(&["CONFIG", "SET", "maxmemory", "0"]);
    assert_eq!(post(&store, "c", "two").await.id, 2);
    store.create_user(user("anna", "hash")).await.unwrap();
}

#[tokio::test]
async fn a_replica_is_unavailable_and_no_second_message_comes_of_it() {
    let server = RedisServer::start(&[]);
    let store = server.open(deaf()).await;
    post(&store, "c", "one").await;
    server.command::<()>(&["REPLICAOF", "127.0.0.1", "1"]);
    let refused = store.post(message("c", "anna", "two")).await;
    assert_eq!(why(refused), "Redis takes no writes: it is a replica");
    server.command::<()>(&["REPLICAOF", "NO", "ONE"]);
    let after = post(&store, "c", "two").await.id;
    assert!(after >= FLOOR, "its data may have been replaced meanwhile");
    assert_eq!(everything(&store, "c").await.len(), 2);
}

#[tokio::test]
async fn two_prefixes_do_not_mix() {
    let server = RedisServer::start(&[]);
    let open = async |prefix: &str, sink| {
        let mut settings = server.settings();
        settings.prefix = prefix.to_owned();
        open(settings, sink).await
    };
    let (ear_a, sink_a) = Ear::new();
    let (ear_b, sink_b) = Ear::new();
    let a = open("a", sink_a).await;
    let b = open("b", sink_b).await;
    for store in [&a, &b] {
        assert_eq!(store.subscribe("c").await.unwrap(), 0);
    }
    assert_eq!(post(&a, "c", "one").await.id, 1);
    assert_eq!(post(&a, "c", "two").await.id, 2);
    assert_eq!(post(&b, "c", "one").await.id, 1);
    a.create_user(user("anna", "hash")).await.unwrap();
    assert_eq!(b.user("anna").await.unwrap(), None);
    let channel = Channel {
        key: "k".to_owned(),
        name: "n".to_owned(),
    };
    a.create_channel(channel).await.unwrap();
    assert_eq!(b.channels().await.unwrap().len(), 3);
    ear_a.until_id("c", 2).await;
    ear_b.until_id("c", 1).await;
    assert_eq!((ear_a.ids("c"), ear_b.ids("c")), (vec![1, 2], vec![1]));
    let keys: BTreeSet<String> = server.command(&["KEYS", "*"]);
    let alien: Vec<_> = keys
        .iter()
        .filter(|key| !key.starts_with("{a}:") && !key.starts_with("{b}:"))
        .collect();
    assert!(alien.is_empty(), "{alien:?}");
}

#[tokio::test]
async fn redis_hears_of_the_end_of_a_subscription() {
    let server = RedisServer::start(&[]);
    // That of the key `c`.
    let topic = "{banter}:topic:Yw";
    let subscribers = || {
        let counts: (String, u64) = server.command(&["PUBSUB", "NUMSUB", topic]);
        counts.1
    };
    let a = server.open(deaf()).await;
    let (ear, refusing) = Ear::accepting(|_| false);
    let b = server.open(refusing).await;
    a.subscribe("c").await.unwrap();
    b.subscribe("c").await.unwrap();
    assert_eq!(subscribers(), 2);
    a.unsubscribe("c").await.unwrap();
    eventually("one subscriber", || subscribers() == 1).await;
    // Its sink refuses.
    post(&a, "c", "one").await;
    ear.until_id("c", 1).await;
    eventually("no subscriber", || subscribers() == 0).await;
    a.subscribe("c").await.unwrap();
    assert_eq!(subscribers(), 1);
    drop(a);
    eventually("no subscriber", || subscribers() == 0).await;
}

/// Ids from here on come after a restart: the time in microseconds.
const FLOOR: u64 = 1 << 50;

/// Has the next post find out that Redis leads another life than before.
fn begin_another_life(server: &RedisServer) {
    server.command::<()>(&["HSET", "{banter}:life", "id", "another"]);
}

#[tokio::test]
async fn a_redis_that_lost_its_last_records_gives_out_no_id_again_and_no_worker_need_know_them() {
    // Unlike with `everysec`, what it has answered is in its file, which so can be cut to the byte.
    let mut server = RedisServer::start(&["--appendfsync", "no"]);
    // A new one each time, which has seen nothing.
    let poster = async |server: &RedisServer| server.open(deaf()).await;
    let store = poster(&server).await;
    for n in 1..=5 {
        assert_eq!(post(&store, "c", &format!("kept {n}")).await.id, n);
    }
    let kept = server.appended();
    let mut given = BTreeSet::from_iter(1..=5);
    let mut give = |id| assert!(given.insert(id), "{id} stands for two messages");
    for crash in 0..3 {
        for n in 0..4 {
            give(post(&store, "c", &format!("lost {crash} {n}")).await.id);
        }
        // Of this channel nothing is left at all.
        let of_d = post(&store, "d", &format!("lost {crash}")).await.id;
        server.kill();
        // The second and third crash leave no trace of what came after the first, either.
        server.truncate(kept);
        server.run();
        let new = poster(&server).await;
        assert_eq!(everything(&new, "c").await.len(), 5, "crash {crash}");
        let anew = post(&new, "d", &format!("new {crash}")).await.id;
        assert!(anew > of_d, "crash {crash}: {anew} after {of_d}");
        let seen = new.read("c", Range::Latest { start: 0, end: 0 }).await;
        assert_eq!(seen.unwrap().last, 5);
        give(post(&new, "c", &format!("new {crash}")).await.id);
        // And who knew them goes on from there.
        let next = stubbornly(|| store.post(message("c", "anna", &format!("next {crash}")))).await;
        give(next.id);
        let all = everything(&new, "c").await;
        assert_eq!(*all.last_key_value().unwrap().0, next.id, "in order");
        assert!((FLOOR..1 << 53).contains(&next.id));
    }
}

#[tokio::test]
async fn ids_are_dense_as_long_as_redis_lives() {
    let server = RedisServer::start(&["--appendfsync", "everysec"]);
    let stores = [server.open(deaf()).await, server.open(deaf()).await];
    for id in 1..=8 {
        let store = &stores[id as usize % 2];
        assert_eq!(post(store, "c", &id.to_string()).await.id, id);
        if id % 3 == 0 {
            server.command::<u64>(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
        }
        if id == 4 {
            // Now they look again.
            tokio::time::sleep(Duration::from_millis(1_100)).await;
        }
    }
    assert_eq!(post(&server.open(deaf()).await, "d", "one").await.id, 1);
}

#[tokio::test]
async fn a_restart_leaves_ids_dense_if_everything_was_on_the_disk() {
    let mut server = RedisServer::start(&["--appendfsync", "always"]);
    let post_one = async |server: &RedisServer, text: &str| {
        let store = server.open(deaf()).await;
        stubbornly(|| store.post(message("c", "anna", text)))
            .await
            .id
    };
    assert_eq!(post_one(&server, "one").await, 1);
    server.kill();
    server.run();
    assert_eq!(post_one(&server, "two").await, 2);
    // What counts is how it was when the ids were given out.
    server.kill();
    server.arguments = vec!["--appendfsync".to_owned(), "everysec".to_owned()];
    server.run();
    assert_eq!(post_one(&server, "three").await, 3);
    server.kill();
    server.arguments = vec!["--appendfsync".to_owned(), "always".to_owned()];
    server.run();
    let floor = post_one(&server, "four").await;
    assert!(floor >= FLOOR, "{floor}");
    // Later they are dense again.
    server.kill();
    server.run();
    assert_eq!(post_one(&server, "five").await, floor + 1);
    // A replica that takes over may lack what its master had on the disk.
    server.command::<()>(&["REPLICAOF", "127.0.0.1", "1"]);
    server.command::<()>(&["REPLICAOF", "NO", "ONE"]);
    assert!(post_one(&server, "six").await > floor + 2);
}

#[tokio::test]
async fn a_nonce_yields_its_first_id_in_another_life_as_well() {
    let mut server = RedisServer::start(&["--appendfsync", "everysec"]);
    let store = server.open(deaf()).await;
    let first = post(&store, "c", "one").await;
    server.stop();
    server.run();
    let again = stubbornly(|| store.post(message("c", "anna", "one"))).await;
    assert_eq!(again, first);
    let second = post(&store, "c", "two").await;
    assert!(second.id >= FLOOR);
    assert_eq!(post(&store, "c", "two").await, second);
    assert_eq!(everything(&store, "c").await.len(), 2);
}

#[tokio::test]
async fn positions_count_messages_whatever_ids_were_left_out() {
    let server = RedisServer::start(&["--appendfsync", "no"]);
    let store = server.open(deaf()).await;
    let mut ids_in_order = Vec::new();
    for (life, count) in [3, 1, 7, 2, 1, 1, 30].into_iter().enumerate() {
        if life > 0 {
            begin_another_life(&server);
        }
        for n in 0..count {
            ids_in_order.push(post(&store, "c", &format!("{life}, {n}")).await.id);
        }
    }
    assert!(ids_in_order.is_sorted_by(|a, b| a < b));
    assert_eq!(ids_in_order.iter().filter(|id| **id < FLOOR).count(), 3);
    let total = ids_in_order.len();
    for start in 0..=total + 2 {
        for end in [start, start + 1, start + 5, start + 25, total + 1] {
            let range = Range::Latest {
                start: start as u64,
                end: end as u64,
            };
            let page = store.read("c", range).await.unwrap();
            let newest_first = ids_in_order.iter().rev().copied();
            let mut expected: Vec<u64> = newest_first
                .skip(start)
                .take(end.saturating_sub(start))
                .collect();
            expected.reverse();
            assert_eq!(ids(&page), expected, "{range:?}");
            assert_eq!(page.last, ids_in_order[total - 1]);
        }
    }
    for (n, &id) in ids_in_order.iter().enumerate() {
        let after = store.read("c", Range::After { id, limit: 4 }).await;
        let following = &ids_in_order[n + 1..total.min(n + 5)];
        assert_eq!(ids(&after.unwrap()), following, "after {id}");
        let before = store.read("c", Range::Before { id, limit: 4 }).await;
        let preceding = &ids_in_order[n.saturating_sub(4)..n];
        assert_eq!(ids(&before.unwrap()), preceding, "before {id}");
    }
    assert_eq!(
        store.last_before("c", i64::MAX).await.unwrap(),
        ids_in_order[total - 1]
    );
}

#[tokio::test]
async fn as_many_messages_are_kept_as_configured_whatever_ids_were_left_out() {
    let server = RedisServer::start(&["--appendfsync", "no"]);
    let mut settings = server.settings();
    settings.retention.max_count = Some(4.try_into().unwrap());
    let store = open(settings, deaf()).await;
    let mut given = Vec::new();
    for n in 0..12_usize {
        if n % 3 == 2 {
            begin_another_life(&server);
        }
        given.push(post(&store, "c", &n.to_string()).await.id);
        let kept: Vec<u64> = everything(&store, "c").await.into_keys().collect();
        assert_eq!(kept, given[(n + 1).saturating_sub(4)..]);
        let page = store.read("c", Range::Latest { start: 2, end: 9 }).await;
        assert_eq!(ids(&page.unwrap()), kept[..kept.len().saturating_sub(2)]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_import_gives_the_ids_of_its_batch_in_any_life() {
    let server = RedisServer::start(&["--appendfsync", "no"]);
    let store = RedisStore::connect(server.settings(), deaf())
        .await
        .unwrap();
    let posting: Arc<dyn Store> = Arc::clone(&store) as _;
    post(&posting, "d", "one").await;
    begin_another_life(&server);
    assert!(post(&posting, "d", "two").await.id >= FLOOR);
    assert_eq!(store.import("c", 1, batch(1..=5)).await, Ok(5));
    assert_eq!(store.import("c", 4, batch(4..=8)).await, Ok(8));
    let next = post(&posting, "c", "after the import").await.id;
    assert!(next >= FLOOR);
    let page = posting.read("c", Range::Latest { start: 1, end: 4 }).await;
    assert_eq!(ids(&page.unwrap()), [6, 7, 8]);
}

#[tokio::test]
async fn ids_go_on_when_keys_are_removed_from_a_living_redis() {
    let server = RedisServer::start(&[]);
    let (ear, sink) = Ear::new();
    let (poster, listener) = (server.open(deaf()).await, server.open(sink).await);
    listener.subscribe("c").await.unwrap();
    for n in 1..=5 {
        post(&poster, "c", &n.to_string()).await;
    }
    ear.until_id("c", 5).await;
    // One of them posted, the other heard it.
    let (counter, messages) = ("{banter}:channel:Yw", "{banter}:messages:Yw");
    for (store, id) in [(&poster, 6), (&listener, 7)] {
        server.command::<()>(&["DEL", counter, messages]);
        assert_eq!(post(store, "c", &format!("after {id}")).await.id, id);
        assert_eq!(everything(store, "c").await.len(), 1);
        ear.until_id("c", id).await;
    }
    // Somebody new has seen nothing, and the counter or the stream may be there.
    server.command::<()>(&["DEL", counter]);
    let new = server.open(deaf()).await;
    assert_eq!(post(&new, "c", "with the stream").await.id, 8);
    server.command::<()>(&["DEL", messages]);
    let new = server.open(deaf()).await;
    assert_eq!(post(&new, "c", "with the counter").await.id, 9);
    let page = new
        .read("c", Range::Latest { start: 0, end: 5 })
        .await
        .unwrap();
    assert_eq!((ids(&page), page.last), (vec![9], 9));
    // All is gone, but not what this worker knows: that there was something.
    server.command::<()>(&["FLUSHALL"]);
    assert!(post(&new, "c", "into nothing").await.id >= FLOOR);
    assert!(post(&new, "d", "into nothing").await.id >= FLOOR);
}

#[tokio::test]
async fn pages_skip_over_lost_ids_and_leave_nothing_out() {
    let server = RedisServer::start(&[]);
    let store = server.open(deaf()).await;
    for n in 1..=10 {
        post(&store, "c", &n.to_string()).await;
    }
    for lost in ["4-0", "5-0", "6-0"] {
        server.command::<()>(&["XDEL", "{banter}:messages:Yw", lost]);
    }
    let read = async |range| ids(&store.read("c", range).await.unwrap());
    assert_eq!(
        read(Range::Latest { start: 0, end: 5 }).await,
        [3, 7, 8, 9, 10]
    );
    assert_eq!(read(Range::Before { id: 7, limit: 2 }).await, [2, 3]);
    assert_eq!(read(Range::After { id: 3, limit: 2 }).await, [7, 8]);
    assert_eq!(store.last_before("c", i64::MAX).await.unwrap(), 10);
    assert_eq!(store.last_before("c", 0).await.unwrap(), 0);
}

#[tokio::test]
async fn a_date_is_never_before_the_one_of_the_previous_message() {
    let server = RedisServer::start(&[]);
    let store = server.open(deaf()).await;
    post(&store, "c", "one").await;
    // As if the clock had been ahead, and was then set back.
    let (millis, date) = ("4102444800000", "2100-01-01T00:00:00.000Z");
    let counter = "{banter}:channel:Yw";
    server.command::<()>(&["HSET", counter, "millis", millis, "date", date]);
    for id in 2..=3 {
        let posted = post(&store, "c", &id.to_string()).await;
        assert_eq!((posted.id, &*posted.date), (id, date));
    }
    let millis: i64 = millis.parse().unwrap();
    assert_eq!(store.last_before("c", millis).await.unwrap(), 1);
    assert_eq!(store.last_before("c", millis + 1).await.unwrap(), 3);
}

#[tokio::test]
async fn a_nonce_expires() {
    let server = RedisServer::start(&[]);
    let store = server.open(deaf()).await;
    post(&store, "c", "one").await;
    let keys: Vec<String> = server.command(&["KEYS", "{banter}:nonce:*"]);
    let [nonce] = &*keys else { panic!("{keys:?}") };
    let left: u64 = server.command(&["PTTL", nonce]);
    let memory = banter::store::NONCE_MEMORY.as_millis() as u64;
    assert!((memory - 10_000..=memory).contains(&left), "{left}");
    server.command::<()>(&["PEXPIRE", nonce, "1"]);
    eventually("expiry", || {
        let left: i64 = server.command(&["PTTL", nonce]);
        left == -2
    })
    .await;
    assert_eq!(post(&store, "c", "one").await.id, 2);
}

#[tokio::test]
async fn old_messages_go_if_so_configured_and_positions_stay() {
    let server = RedisServer::start(&[]);
    let store = server.open(deaf()).await;
    let stores = [Arc::clone(&store)];
    post_many(&stores, "c", 2500).await;
    let retaining = async |max_count: Option<u32>, max_age| {
        let mut settings = server.settings();
        settings.retention = Retention {
            max_count: max_count.map(|count| count.try_into().unwrap()),
            max_age,
        };
        open(settings, deaf()).await
    };
    let kept = async |store: &Arc<dyn Store>| {
        let all = everything(store, "c").await;
        let (first, last) = (*all.keys().next().unwrap(), *all.keys().last().unwrap());
        assert_eq!(all.len() as u64, last - first + 1);
        (first, last)
    };
    // A thousand at a time.
    let by_count = retaining(Some(10), None).await;
    post(&by_count, "c", "2501").await;
    assert_eq!(kept(&store).await, (1001, 2501));
    for n in 2502..=2504 {
        post(&by_count, "c", &n.to_string()).await;
    }
    assert_eq!(kept(&store).await, (2495, 2504));
    let page = store.read("c", Range::Latest { start: 8, end: 20 }).await;
    assert_eq!(ids(&page.unwrap()), [2495, 2496]);
    assert_eq!(store.last_before("c", 0).await.unwrap(), 0);

    let hour = Duration::from_secs(3600);
    let by_age = retaining(None, Some(hour)).await;
    post(&by_age, "c", "2505").await;
    assert_eq!(kept(&store).await, (2495, 2505), "none is an hour old");
    let split = Instant::now();
    let short = Duration::from_secs(1);
    tokio::time::sleep(short * 2).await;
    post(&store, "c", "2506").await;
    let by_age = retaining(None, Some(split.elapsed() - short)).await;
    post(&by_age, "c", "2507").await;
    assert_eq!(kept(&store).await, (2506, 2507));
}

#[tokio::test]
async fn a_redis_that_comes_later_is_used_without_a_restart() {
    let mut server = RedisServer::stopped(&[]);
    let (ear, sink) = Ear::new();
    let store = RedisStore::connect(server.settings(), sink).await.unwrap();
    assert!(!store.connected());
    let store: Arc<dyn Store> = store;
    assert_eq!(why(store.channels().await), "Redis cannot be reached");
    assert_eq!(
        why(store.typing("c", "anna").await),
        "Redis cannot be reached"
    );
    server.run();
    stubbornly(|| store.post(message("c", "anna", "one"))).await;
    assert_eq!(store.subscribe("c").await.unwrap(), 1);
    post(&store, "c", "two").await;
    ear.until_id("c", 2).await;
    assert_eq!(interruptions(&ear), 0, "there was nothing to interrupt");
}

#[tokio::test]
async fn what_is_wrong_with_the_settings_is_said_in_one_line_without_the_password() {
    let server = RedisServer::start(&["--requirepass", "right"]);
    let line = async |settings| {
        let refused = RedisStore::connect(settings, deaf()).await;
        let line = refused.err().expect("it is refused").to_string();
        assert!(!line.contains('\n') && !line.contains("wrong#"), "{line}");
        line
    };
    let with = |query: &str| RedisSettings::new(format!("{}?{query}", server.url()));
    assert!(
        line(with("pass=wrong%23"))
            .await
            .contains("check user and password")
    );
    assert!(line(with("db=0")).await.contains("check user and password"));
    RedisStore::connect(with("pass=right"), deaf())
        .await
        .unwrap();

    let mut settings = with("pass=right");
    settings.prefix = "{a}".to_owned();
    assert!(line(settings).await.contains("\"{a}\""));

    // A port at which something else than Redis answers.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let web_server = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().unwrap();
            // What it is asked does not matter to it.
            let _ = stream.read(&mut [0; 1024]);
            stream
                .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                .unwrap();
        }
    });
    let plain = RedisSettings::new(format!("redis://{address}"));
    assert!(line(plain).await.contains("check host and port"));
    let tls = RedisSettings::new(format!("rediss://{address}"));
    assert!(line(tls).await.contains("check its certificate"));
    web_server.join().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_import_into_a_channel_whose_counter_is_gone_is_refused() {
    let harness = RedisHarness::new();
    let store = harness.open_to_import().await;
    assert_eq!(store.import("c", 1, batch(1..=3)).await, Ok(3));
    let command = |words: &[&str]| harness.server.lock().command::<()>(words);
    command(&["DEL", "{banter}:channel:Yw"]);
    let (last, imported) = (3, 0);
    let refused = Err(ImportError::Native { last, imported });
    assert_eq!(store.import("c", 1, batch(1..=4)).await, refused);
    let page = store.read("c", Range::After { id: 0, limit: 9 }).await;
    assert_eq!(ids(&page.unwrap()), [1, 2, 3]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_import_that_redis_has_no_memory_for_leaves_the_channel_as_it_was() {
    let harness = RedisHarness::new();
    let store = harness.open_to_import().await;
    assert_eq!(store.import("c", 1, batch(1..=3)).await, Ok(3));
    let command = |words: &[&str]| harness.server.lock().command::<()>(words);
    command(&["CONFIG", "SET", "maxmemory", "1"]);
    let refused = store.import("c", 4, batch(4..=9)).await;
    let why = StoreError::Unavailable("Redis is out of memory".to_owned());
    assert_eq!(refused, Err(ImportError::Store(why)));
    command(&["CONFIG", "SET", "maxmemory", "0"]);
    assert_eq!(store.import("c", 1, Vec::new()).await, Ok(3));
    assert_eq!(store.import("c", 4, batch(4..=9)).await, Ok(9));
}
