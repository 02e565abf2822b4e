//! The embedded store alone: what group commit is worth, and whether a page costs the same
//! wherever in a long channel it lies.
//!
//! Absolute numbers are the disk's and the machine's; the ratios are what to compare.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use banter::store::embedded::{Client, Embedded};
use banter::store::{NewMessage, PAGE_LIMIT, Range, Store as _};

/// Posters at once, as many as there are people typing in a busy moment.
const POSTERS: u32 = 64;
/// How long each way of posting is measured, in each round.
const POSTING: Duration = Duration::from_secs(1);
/// Rounds of posting, of which the median counts. The ways take turns, so that a slow moment of
/// the machine meets all of them.
const POST_ROUNDS: usize = 5;
/// Messages of the channel that is read.
const MESSAGES: u64 = 200_000;
/// Rounds of reading, as those of posting.
const READ_ROUNDS: usize = 25;
/// Pages read of each kind, in each round.
const PAGES: u32 = 100;

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
    posts(&directory.path().join("posts.db")).await?;
    pages(&directory.path().join("pages.db")).await
}

async fn posts(path: &Path) -> anyhow::Result<()> {
    let store = Embedded::open(path)?;
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

async fn pages(path: &Path) -> anyhow::Result<()> {
    let store = Embedded::open(path)?;
    let client = Arc::new(store.client(Arc::new(|_| true)));
    let start = Instant::now();
    fill(&client).await?;
    println!(
        "\nPages of {PAGE_LIMIT} messages in a channel of {MESSAGES} (filled in {:.1} s)",
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
            times.push(read(&client, *range).await.context(*name)?);
        }
    }
    let mut first = None;
    for ((name, _), times) in kinds.iter().zip(times) {
        let time = median(times);
        let ratio = time / *first.get_or_insert(time);
        println!("  {name:<28} {time:>7.0} µs   {ratio:.2} times the latest");
    }
    store.shutdown().await;
    Ok(())
}

async fn fill(client: &Arc<Client>) -> anyhow::Result<()> {
    const TASKS: u64 = 512;
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..TASKS {
        let client = client.clone();
        tasks.spawn(async move {
            for n in (task..MESSAGES).step_by(TASKS as usize) {
                post(&client, format!("message {n} of a long conversation")).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(())
}

/// Reads the same page many times; returns microseconds for each.
async fn read(client: &Client, range: Range) -> anyhow::Result<f64> {
    let start = Instant::now();
    for _ in 0..PAGES {
        let page = client.read("general", range).await?;
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
