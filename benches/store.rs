//! The stores: what group commit is worth; whether a page costs the same wherever in a channel of a
//! million messages it lies; and whether master and worker start as quickly with them as without.
//!
//! The one in Redis is measured on a `redis-server` of its own. Absolute numbers are the disk's and the machine's; the ratios are what to compare.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use banter::store::embedded::{Client, Embedded};
use banter::store::redis::{RedisSettings, RedisStore};
use banter::store::{Import, Imported, NewMessage, PAGE_LIMIT, Range, Store as _};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// Posters at once, as many as there are people typing in a busy moment.
const POSTERS: u32 = 64;
/// How long each way of posting is measured, in each round.
const POSTING: Duration = Duration::from_secs(1);
/// Rounds of posting, of which the median counts. The ways take turns, so that a slow moment of
/// the machine meets all of them.
const POST_ROUNDS: usize = 5;
/// Messages of the channel that is read.
const MESSAGES: u64 = 1_000_000;
/// Messages imported at once.
const BATCH: u64 = 2_000;
/// Rounds of reading, as those of posting.
const READ_ROUNDS: usize = 25;
/// Pages read of each kind, in each round.
const PAGES: u32 = 100;
/// No page may cost so many times as much as the latest one.
const DEARER: f64 = 2.0;
/// Starts of each kind, of which the median counts.
const STARTS: usize = 11;
/// How long a process may take to be ready.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> anyhow::Result<()> {
    // Cargo asks each target for its tests, and passes flags that mean nothing here.
    if std::env::args().any(|arg| arg == "--list" || arg == "--test") {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(run())
}

async fn run() -> anyhow::Result<()> {
    // Not in the system's directory for temporary files, which may be memory: there syncing
    // costs nothing.
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let place = |name: &str| {
        let path = directory.path().join(name);
        std::fs::create_dir(&path).map(|()| path)
    };
    posts(&place("posts")?).await?;

    let (full, empty) = (place("full")?, place("empty")?);
    let store = Embedded::open(&full.join(DATABASE))?;
    pages("The embedded store", &store.client(Arc::new(|_| true))).await?;
    store.shutdown().await;
    let of = |state: &Path| vec![("BANTER_STATE_DIR", state.display().to_string())];
    starts(&of(&empty), &of(&full))?;

    let redis = Redis::start()?;
    let settings = RedisSettings::new(redis.url());
    let store = RedisStore::connect(settings, Arc::new(|_| true)).await?;
    pages("Redis", &*store).await?;
    drop(store);
    let of = |prefix: &str| {
        vec![
            ("REDIS_URL", redis.url()),
            ("BANTER_REDIS_PREFIX", prefix.to_owned()),
            ("BANTER_STATE_DIR", empty.display().to_string()),
        ]
    };
    starts(&of("empty"), &of(banter::store::redis::DEFAULT_PREFIX))
}

/// The database in a state directory.
const DATABASE: &str = "banter.db";

async fn posts(directory: &Path) -> anyhow::Result<()> {
    let store = Embedded::open(&directory.join(DATABASE))?;
    let client = Arc::new(store.client(Arc::new(|_| true)));
    let (mut alone, mut together, mut shared) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..POST_ROUNDS {
        alone.push(post_for(&client, POSTING, 1, &format!("alone {round}")).await?);
        let before = store.commits();
        let rate = post_for(&client, POSTING, POSTERS, &format!("together {round}")).await?;
        let commits = (store.commits() - before) as f64;
        shared.push(rate * POSTING.as_secs_f64() / commits.max(1.0));
        together.push(rate);
    }
    let (alone, together) = (median(alone), median(together));
    println!("Durable posts (each acknowledged after its commit, synchronous=FULL)");
    println!("  one at a time        {alone:>9.0} /s");
    println!(
        "  {POSTERS} posters at once  {together:>9.0} /s   {:.1} times as many, {:.0} in a commit",
        together / alone,
        median(shared)
    );
    store.shutdown().await;
    Ok(())
}

/// Posts from so many tasks for a time; returns posts per second.
async fn post_for(
    client: &Arc<Client>,
    time: Duration,
    posters: u32,
    run: &str,
) -> anyhow::Result<f64> {
    let start = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for poster in 0..posters {
        let (client, run) = (client.clone(), run.to_owned());
        tasks.spawn(async move {
            let mut posted = 0;
            while start.elapsed() < time {
                post(&client, format!("{run}, poster {poster}, message {posted}")).await?;
                posted += 1;
            }
            anyhow::Ok(posted)
        });
    }
    let mut posted = 0;
    while let Some(done) = tasks.join_next().await {
        posted += done??;
    }
    Ok(f64::from(posted) / start.elapsed().as_secs_f64())
}

async fn post(client: &Client, text: String) -> anyhow::Result<()> {
    let message = NewMessage {
        channel: "general".to_owned(),
        user: "ann".to_owned(),
        nonce: text.clone(),
        message: text,
        client_nonce: false,
        sender: "benchmark".to_owned(),
    };
    client.post(message).await?;
    Ok(())
}

/// Fills a store, and reads from it here and there.
async fn pages(name: &str, store: &dyn Import) -> anyhow::Result<()> {
    let start = Instant::now();
    fill(store).await?;
    println!(
        "\n{name}: pages of {PAGE_LIMIT} messages in a channel of {MESSAGES} (filled in {:.1} s)",
        start.elapsed().as_secs_f64()
    );

    let (size, middle) = (u64::from(PAGE_LIMIT), MESSAGES / 2);
    let latest = |start| Range::Latest {
        start,
        end: start + size,
    };
    let after = |id| Range::After {
        id,
        limit: PAGE_LIMIT,
    };
    let kinds = [
        ("the latest", latest(0)),
        ("positions in the middle", latest(middle)),
        ("the oldest", latest(MESSAGES - size)),
        ("after an id near the end", after(MESSAGES - size)),
        ("after an id in the middle", after(middle)),
        (
            "before an id in the middle",
            Range::Before {
                id: middle,
                limit: PAGE_LIMIT,
            },
        ),
    ];
    let mut times = vec![Vec::new(); kinds.len()];
    for _ in 0..READ_ROUNDS {
        for (times, (name, range)) in times.iter_mut().zip(&kinds) {
            times.push(read(store, *range).await.context(*name)?);
        }
    }
    let mut first = None;
    let mut dearest = 0.0_f64;
    for ((name, _), times) in kinds.iter().zip(times) {
        let time = median(times);
        let ratio = time / *first.get_or_insert(time);
        println!("  {name:<28} {time:>7.0} µs   {ratio:.2} times the latest");
        dearest = dearest.max(ratio);
    }
    ensure!(
        dearest < DEARER,
        "a page costs {dearest:.2} times the latest"
    );
    Ok(())
}

async fn fill(store: &dyn Import) -> anyhow::Result<()> {
    for first in (1..=MESSAGES).step_by(BATCH as usize) {
        let batch = (first..first + BATCH).map(|n| Imported {
            user: format!("user {}", n % 100),
            message: format!("message {n} of a long conversation"),
            millis: 1_600_000_000_000 + n as i64,
        });
        store.import("general", first, batch.collect()).await?;
    }
    Ok(())
}

/// Reads the same page many times; returns microseconds for each.
async fn read(store: &dyn Import, range: Range) -> anyhow::Result<f64> {
    let start = Instant::now();
    for _ in 0..PAGES {
        let page = store.read("general", range).await?;
        ensure!(
            page.messages.len() == PAGE_LIMIT as usize && page.last == MESSAGES,
            "not the page that was meant: {} messages, last id {}",
            page.messages.len(),
            page.last
        );
    }
    Ok(start.elapsed().as_secs_f64() * 1e6 / f64::from(PAGES))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Starts master and worker on either store, in turns: the environments say which.
fn starts(empty: &[(&str, String)], full: &[(&str, String)]) -> anyhow::Result<()> {
    let mut times: [[Vec<f64>; 2]; 2] = Default::default();
    for round in 0..STARTS {
        // Either is the first in turn.
        for which in [round % 2, (round + 1) % 2] {
            let (environment, [masters, workers]) = ([empty, full][which], &mut times[which]);
            let place = tempfile::tempdir()?;
            let (master, time) = Role::start(&["master"], &place, environment)?;
            masters.push(time);
            let (worker, time) = Role::start(&["worker", "0"], &place, environment)?;
            workers.push(time);
            worker.stop()?;
            master.stop()?;
        }
    }
    let [empty, full] = times;
    println!("Start until ready, on an empty store and on that of {MESSAGES} messages");
    for ((name, empty), full) in ["master", "worker"].iter().zip(empty).zip(full) {
        let (empty, full) = (median(empty), median(full));
        let ratio = full / empty;
        println!("  {name:<28} {empty:>7.1} ms, {full:.1} ms   {ratio:.2} times");
    }
    Ok(())
}

/// A master or a worker. Killed when it is dropped.
struct Role(Child);

impl Role {
    /// Starts one; returns how many milliseconds it took to be ready.
    fn start(
        args: &[&str],
        place: &TempDir,
        environment: &[(&str, String)],
    ) -> anyhow::Result<(Self, f64)> {
        let socket = place.path().join(format!("{}.notify", args[0]));
        let notifications = UnixDatagram::bind(&socket)?;
        notifications.set_read_timeout(Some(PATIENCE))?;
        let start = Instant::now();
        let role = Command::new(env!("CARGO_BIN_EXE_banter"))
            .args(args)
            .env_clear()
            .env("PORT", "0")
            .env("BANTER_RUNTIME_DIR", place.path())
            .env("JWT_SECRET", "a secret of this benchmark, long enough")
            .env("NOTIFY_SOCKET", &socket)
            .env("RUST_LOG", "error")
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .spawn()?;
        let role = Self(role);
        let mut buffer = [0; 4096];
        loop {
            let length = notifications
                .recv(&mut buffer)
                .with_context(|| format!("the {} is not ready", args[0]))?;
            let told = String::from_utf8_lossy(&buffer[..length]);
            if told.lines().any(|line| line == "READY=1") {
                return Ok((role, start.elapsed().as_secs_f64() * 1e3));
            }
        }
    }

    /// Stops it as systemd does, and waits until it has ended.
    fn stop(mut self) -> anyhow::Result<()> {
        kill_process(Pid::from_child(&self.0), Signal::TERM)?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A `redis-server` on a unix socket, which keeps nothing. Ended when it is dropped.
struct Redis {
    process: Child,
    directory: TempDir,
}

impl Redis {
    fn start() -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let process = Command::new("redis-server")
            .args(["--port", "0", "--save", "", "--appendonly", "no"])
            .arg("--dir")
            .arg(directory.path())
            .arg("--unixsocket")
            .arg(directory.path().join("redis.sock"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("this benchmark needs the program redis-server")?;
        let mut redis = Self { process, directory };
        let start = Instant::now();
        while std::os::unix::net::UnixStream::connect(redis.socket()).is_err() {
            if let Some(status) = redis.process.try_wait()? {
                bail!("redis-server ended by itself: {status}");
            }
            ensure!(start.elapsed() < PATIENCE, "redis-server does not answer");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(redis)
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("redis.sock")
    }

    fn url(&self) -> String {
        format!("unix:{}", self.socket().display())
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
