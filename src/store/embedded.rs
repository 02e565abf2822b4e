//! The embedded store: one SQLite database, owned by one process.
//!
//! | file | what |
//! | --- | --- |
//! | `open.rs` | the lock on the database, its connections, its schema; [`OpenError`] |
//! | `writer.rs` | the one thread that writes: group commit, ids, nonces, subscriptions |
//! | `reader.rs` | the few threads that read |
//! | `bus.rs` | who hears what |
//!
//! Callers are asynchronous and never touch the disk: a request goes into a bounded queue, with a
//! one-shot channel for its answer, and a full queue is answered [`StoreError::Unavailable`] at
//! once. The writer takes all that has queued up, does it in one transaction and commits once, so
//! that one sync to disk carries many messages; only then it publishes and answers. Therefore an
//! answered post is durable, has been handed to every subscriber, and is seen by every later read.

mod bus;
mod open;
mod reader;
mod writer;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use async_trait::async_trait;
use parking_lot::Mutex;
use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use self::bus::{Bus, Subscriber};
pub use self::open::OpenError;
use self::open::{Database, Lock};
use self::reader::Query;
use self::writer::{Batch, Change, Job, Writer};
use super::{
    BusEvent, BusSink, Channel, Import, ImportError, Imported, NewMessage, Page, Posted, Range,
    Store, StoreError, User,
};

/// How many requests may wait for the writer.
const WRITE_QUEUE: usize = 4096;

/// How many requests may wait for the readers.
const READ_QUEUE: usize = 1024;

/// How many threads read. Reads are short and mostly come out of the page cache.
const READERS: usize = 2;

/// Takes the answer to a request.
type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

/// An open database. Workers reach it through the [`Client`]s that it hands out.
///
/// Dropping it waits for the threads, which finish what was queued; prefer
/// [`shutdown`](Self::shutdown), which waits without blocking the caller's thread.
pub struct Embedded {
    /// Weak, so that the threads end once [`Running`] drops the strong ones, however many clients
    /// there still are.
    jobs: mpsc::WeakSender<Job>,
    /// As `jobs`.
    queries: mpsc::WeakSender<Query>,
    bus: Arc<Bus>,
    commits: Arc<AtomicU64>,
    next_subscriber: AtomicU64,
    /// `None` once it is shutting down. An asynchronous lock, so that a second `shutdown` waits
    /// for the first.
    running: tokio::sync::Mutex<Option<Running>>,
}

impl Embedded {
    /// Opens the database at `path`, creating it (mode 0600) and its directory (mode 0700) where
    /// they are missing, and brings its schema up to date.
    ///
    /// Blocks: for the disk, and up to a second for a predecessor that is just dying.
    ///
    /// # Errors
    ///
    /// One line that names the path and says what to do, see [`OpenError`].
    pub fn open(path: &Path) -> Result<Arc<Self>, OpenError> {
        let Database {
            writer,
            readers,
            lock,
        } = Database::open(path, READERS)?;

        let (jobs, job_queue) = mpsc::channel(WRITE_QUEUE);
        let (queries, query_queue) = mpsc::channel(READ_QUEUE);
        let bus = Arc::new(Bus::default());
        let commits = Arc::new(AtomicU64::new(0));

        let spawn_failed = |source| OpenError::Thread {
            path: path.to_owned(),
            source,
        };
        let query_queue = Arc::new(Mutex::new(query_queue));
        let mut reader_threads = Vec::with_capacity(READERS);
        for connection in readers {
            let queue = Arc::clone(&query_queue);
            let thread = thread::Builder::new()
                .name("store-reader".to_owned())
                .spawn(move || reader::run(connection, &queue))
                .map_err(spawn_failed)?;
            reader_threads.push(thread);
        }
        let writer = Writer::new(writer, Arc::clone(&bus), Arc::clone(&commits));
        let writer_thread = thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || writer.run(job_queue))
            .map_err(spawn_failed)?;

        Ok(Arc::new(Self {
            jobs: jobs.downgrade(),
            queries: queries.downgrade(),
            bus,
            commits,
            next_subscriber: AtomicU64::new(0),
            running: tokio::sync::Mutex::new(Some(Running {
                jobs,
                queries,
                writer: writer_thread,
                readers: reader_threads,
                lock,
            })),
        }))
    }

    /// A store whose bus events go to `sink`, on the writer's thread for messages and on the
    /// caller's for typing. Dropping it ends its subscriptions.
    ///
    /// The client keeps the database open. `sink` must not own the client: neither would ever go.
    pub fn client(self: &Arc<Self>, sink: BusSink) -> Client {
        let id = self.next_subscriber.fetch_add(1, Ordering::Relaxed);
        Client {
            store: Arc::clone(self),
            subscriber: Arc::new(Subscriber::new(id, sink)),
        }
    }

    /// How many transactions have been committed since it was opened. Under load it grows far
    /// slower than the number of posts.
    pub fn commits(&self) -> u64 {
        self.commits.load(Ordering::Relaxed)
    }

    /// Finishes what is queued, moves the write-ahead log into the database, closes it and gives
    /// up the lock. From then on every request is answered [`StoreError::Unavailable`].
    ///
    /// Once begun, it goes on even if the returned future is dropped.
    pub async fn shutdown(&self) {
        let mut running = self.running.lock().await;
        if let Some(threads) = running.take() {
            let stopped = tokio::task::spawn_blocking(move || threads.stop()).await;
            if let Err(error) = stopped {
                tracing::error!("closing the database failed: {error}");
            }
            self.bus.clear();
        }
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        if let Some(threads) = self.running.get_mut().take() {
            threads.stop();
        }
    }
}

/// What an open database keeps going.
struct Running {
    jobs: mpsc::Sender<Job>,
    queries: mpsc::Sender<Query>,
    /// Gives its connection back, because the last one that is closed must be one that can write:
    /// only such a one can checkpoint.
    writer: JoinHandle<Connection>,
    readers: Vec<JoinHandle<()>>,
    lock: Lock,
}

impl Running {
    /// Ends the threads once their queues are empty, and closes the database. Blocks.
    fn stop(self) {
        // A sink that held the last reference drops it on the writer's thread, which cannot wait
        // for itself.
        if self.writer.thread().id() == thread::current().id() {
            thread::spawn(move || self.stop());
            return;
        }
        let Self {
            jobs,
            queries,
            writer,
            readers,
            lock,
        } = self;
        drop((jobs, queries));
        for reader in readers {
            if reader.join().is_err() {
                tracing::error!("a thread that reads the database had panicked");
            }
        }
        match writer.join() {
            Ok(connection) => open::close(connection),
            Err(_) => tracing::error!("the thread that writes the database had panicked"),
        }
        drop(lock);
    }
}

/// One worker's view of an [`Embedded`] store. Created by [`Embedded::client`].
pub struct Client {
    store: Arc<Embedded>,
    subscriber: Arc<Subscriber>,
}

impl Client {
    /// Has the writer do something, and waits for its answer.
    async fn write<T>(&self, job: impl FnOnce(Reply<T>) -> Job) -> Result<T, StoreError> {
        ask(&self.store.jobs, "too many writes are waiting", job).await
    }

    /// Has a reader look something up, and waits for its answer.
    async fn look_up<T>(&self, query: impl FnOnce(Reply<T>) -> Query) -> Result<T, StoreError> {
        ask(&self.store.queries, "too many reads are waiting", query).await
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.store.bus.remove(&self.subscriber);
    }
}

#[async_trait]
impl Store for Client {
    async fn create_user(&self, user: User) -> Result<(), StoreError> {
        self.write(|reply| Job::Change(Change::CreateUser(user), reply))
            .await
    }

    async fn user(&self, name: &str) -> Result<Option<User>, StoreError> {
        self.look_up(|reply| Query::User {
            name: name.to_owned(),
            reply,
        })
        .await
    }

    async fn replace_hash(&self, name: &str, from: &str, to: &str) -> Result<(), StoreError> {
        let (name, from, to) = (name.to_owned(), from.to_owned(), to.to_owned());
        self.write(|reply| Job::Change(Change::ReplaceHash { name, from, to }, reply))
            .await
    }

    async fn channels(&self) -> Result<Vec<Channel>, StoreError> {
        self.look_up(|reply| Query::Channels { reply }).await
    }

    async fn create_channel(&self, channel: Channel) -> Result<(), StoreError> {
        self.write(|reply| Job::Change(Change::CreateChannel(channel), reply))
            .await
    }

    async fn post(&self, message: NewMessage) -> Result<Posted, StoreError> {
        self.write(|reply| Job::Post(message, reply)).await
    }

    async fn read(&self, channel: &str, range: Range) -> Result<Page, StoreError> {
        self.look_up(|reply| Query::Page {
            channel: channel.to_owned(),
            range,
            reply,
        })
        .await
    }

    async fn last_before(&self, channel: &str, millis: i64) -> Result<u64, StoreError> {
        let channel = channel.to_owned();
        self.look_up(|reply| Query::LastBefore {
            channel,
            millis,
            reply,
        })
        .await
    }

    async fn subscribe(&self, channel: &str) -> Result<u64, StoreError> {
        let subscriber = Arc::clone(&self.subscriber);
        let channel = channel.to_owned();
        self.write(|reply| Job::Subscribe {
            subscriber,
            channel,
            reply,
        })
        .await
    }

    async fn unsubscribe(&self, channel: &str) -> Result<(), StoreError> {
        let subscriber = Arc::clone(&self.subscriber);
        let channel = channel.to_owned();
        self.write(|reply| Job::Unsubscribe {
            subscriber,
            channel,
            reply,
        })
        .await
    }

    async fn typing(&self, channel: &str, user: &str) -> Result<(), StoreError> {
        // Not by way of the writer: typing must neither wait for the disk nor take up its queue.
        self.store.bus.publish(channel, || BusEvent::Typing {
            channel: channel.to_owned(),
            user: user.to_owned(),
        });
        Ok(())
    }
}

#[async_trait]
impl Import for Client {
    async fn import(
        &self,
        channel: &str,
        first: u64,
        messages: Vec<Imported>,
    ) -> Result<u64, ImportError> {
        let batch = Batch {
            channel: channel.to_owned(),
            first,
            messages,
        };
        self.write(|reply| Job::Import(batch, reply)).await?
    }
}

/// Puts a request into a queue and waits for its answer; `full` says why if there is no room.
async fn ask<R, T>(
    queue: &mpsc::WeakSender<R>,
    full: &str,
    request: impl FnOnce(Reply<T>) -> R,
) -> Result<T, StoreError> {
    let closed = || unavailable("it is shutting down");
    let (reply, answer) = oneshot::channel();
    // The strong sender lives no longer than this statement, or a shutdown would wait for it.
    queue
        .upgrade()
        .ok_or_else(closed)?
        .try_send(request(reply))
        .map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => unavailable(full),
            mpsc::error::TrySendError::Closed(_) => closed(),
        })?;
    answer.await.map_err(|_| closed())?
}

/// The error for a client; it says nothing about the database's insides.
fn unavailable(why: &str) -> StoreError {
    StoreError::Unavailable(why.to_owned())
}

/// Logs what went wrong while `doing` something, and makes the error for the client of it.
fn database_failed(doing: &str, error: &rusqlite::Error) -> StoreError {
    tracing::error!(doing, "the database failed: {error}");
    unavailable(match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DiskFull) => "the disk is full",
        Some(rusqlite::ErrorCode::DatabaseBusy) => "another program holds the database",
        _ => "the database failed",
    })
}

/// An id as SQLite keeps it. What is beyond its range is beyond every message as well.
fn to_sql(id: u64) -> i64 {
    i64::try_from(id).unwrap_or(i64::MAX)
}

/// An id as SQLite kept it; they are never negative.
fn from_sql(id: i64) -> u64 {
    u64::try_from(id).unwrap_or(0)
}
