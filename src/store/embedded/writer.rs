//! The one thread that writes.
//!
//! It takes what has queued up, a few hundred jobs at most, and does it in one transaction.
//! Subscriptions are not part of that: they are dealt with first, between two transactions, when
//! everything that was stored has been published as well, and nothing else is under way. So the
//! id that a subscription begins at is exact.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use jiff::Timestamp;
use jiff::fmt::temporal::DateTimePrinter;
use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};
use serde_json::value::to_raw_value;
use tokio::sync::mpsc;

use super::bus::{Bus, Subscriber};
use super::{Reply, database_failed, from_sql, unavailable};
use crate::store::{
    BUILT_IN_CHANNELS, BusEvent, Channel, EventBody, ImportError, Imported, Message, NONCE_MEMORY,
    NewMessage, Posted, StoreError, User, already_imported,
};

/// The most jobs in one transaction.
const BATCH: usize = 256;

/// How many channels' counters are kept in memory.
const CACHED_COUNTERS: usize = 4096;

/// Something for the writer to do, and where the answer goes.
pub(super) enum Job {
    Post(NewMessage, Reply<Posted>),
    Change(Change, Reply<()>),
    Import(Batch, ImportReply),
    Subscribe {
        subscriber: Arc<Subscriber>,
        channel: String,
        reply: Reply<u64>,
    },
    Unsubscribe {
        subscriber: Arc<Subscriber>,
        channel: String,
        reply: Reply<()>,
    },
}

/// A change that nobody needs to hear of.
pub(super) enum Change {
    CreateUser(User),
    ReplaceHash {
        name: String,
        from: String,
        to: String,
    },
    CreateChannel(Channel),
}

/// Messages of another server.
pub(super) struct Batch {
    pub(super) channel: String,
    pub(super) first: u64,
    pub(super) messages: Vec<Imported>,
}

/// What an import is answered with: how many messages the channel has imported altogether, or why
/// it takes none. The outer error is the store's.
pub(super) type ImportReply = Reply<Result<u64, ImportError>>;

/// A job that belongs into the transaction.
enum Write {
    Post(NewMessage, Reply<Posted>),
    Change(Change, Reply<()>),
    Import(Batch, ImportReply),
}

/// What a job came to, to be answered once the transaction is committed.
enum Outcome {
    Post(Reply<Posted>, Result<Post, StoreError>),
    Change(Reply<()>, Result<(), StoreError>),
    Import(ImportReply, Result<Result<u64, ImportError>, StoreError>),
}

/// A post that was carried out.
struct Post {
    posted: Posted,
    /// The channel and the message for its subscribers; `None` if it repeats an earlier one.
    publish: Option<(String, Message)>,
}

/// The state of the writer's thread.
pub(super) struct Writer {
    connection: Connection,
    bus: Arc<Bus>,
    commits: Arc<AtomicU64>,
    counters: Counters,
    /// Unix time in milliseconds.
    clock: Box<dyn Fn() -> i64 + Send>,
}

impl Writer {
    /// `commits` counts the transactions.
    pub(super) fn new(connection: Connection, bus: Arc<Bus>, commits: Arc<AtomicU64>) -> Self {
        let clock = Box::new(|| Timestamp::now().as_millisecond());
        Self {
            connection,
            bus,
            commits,
            counters: Counters::default(),
            clock,
        }
    }

    /// Does what comes out of the queue until it is closed and empty. Gives the connection back.
    pub(super) fn run(mut self, mut queue: mpsc::Receiver<Job>) -> Connection {
        let mut jobs = Vec::with_capacity(BATCH);
        while queue.blocking_recv_many(&mut jobs, BATCH) > 0 {
            self.work(jobs.drain(..));
        }
        self.connection
    }

    fn work(&mut self, jobs: impl Iterator<Item = Job>) {
        let mut writes = Vec::new();
        for job in jobs {
            match job {
                Job::Post(message, reply) => writes.push(Write::Post(message, reply)),
                Job::Change(change, reply) => writes.push(Write::Change(change, reply)),
                Job::Import(batch, reply) => writes.push(Write::Import(batch, reply)),
                Job::Subscribe {
                    subscriber,
                    channel,
                    reply,
                } => {
                    let last = self.counters.last(&self.connection, &channel);
                    let last = last.map_err(|error| database_failed("subscribing", &error));
                    if last.is_ok() {
                        self.bus.subscribe(&subscriber, &channel);
                    }
                    answer(reply, last);
                }
                Job::Unsubscribe {
                    subscriber,
                    channel,
                    reply,
                } => {
                    self.bus.unsubscribe(&subscriber, &channel);
                    answer(reply, Ok(()));
                }
            }
        }
        if !writes.is_empty() {
            self.write(writes);
        }
    }

    /// Does a batch of writes, then publishes and answers.
    fn write(&mut self, writes: Vec<Write>) {
        let mut outcomes = Vec::with_capacity(writes.len());
        let mut writes = writes.into_iter();
        match self.transact(&mut writes, &mut outcomes) {
            Ok(()) => {
                self.commits.fetch_add(1, Ordering::Relaxed);
                outcomes
                    .into_iter()
                    .for_each(|outcome| outcome.conclude(&self.bus));
            }
            Err(error) => {
                // What they say may have been rolled back.
                self.counters.clear();
                outcomes
                    .into_iter()
                    .for_each(|outcome| outcome.refuse(error.clone()));
                writes.for_each(|write| write.refuse(error.clone()));
            }
        }
    }

    /// Turns writes into outcomes, which hold if it succeeds. If not, the database is as before,
    /// and writes may be left over.
    fn transact(
        &mut self,
        writes: &mut impl Iterator<Item = Write>,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<(), StoreError> {
        let failed = |error| database_failed("writing", &error);
        let now = (self.clock)();
        let counters = &mut self.counters;
        let mut tx = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(failed)?;
        for write in writes {
            outcomes.push(match write {
                Write::Post(message, reply) => {
                    let result = isolated(&mut tx, |db| post(db, counters, &message, now));
                    if result.is_err() {
                        counters.forget(&message.channel);
                    }
                    Outcome::Post(reply, result)
                }
                Write::Change(change, reply) => {
                    Outcome::Change(reply, isolated(&mut tx, |db| change.apply(db)).flatten())
                }
                Write::Import(batch, reply) => {
                    let result = isolated(&mut tx, |db| import(db, counters, &batch));
                    if result.is_err() {
                        counters.forget(&batch.channel);
                    }
                    Outcome::Import(reply, result)
                }
            });
            // Some errors (a full disk among them) make SQLite roll everything back.
            if tx.is_autocommit() {
                let why = outcomes.last().and_then(Outcome::error).cloned();
                return Err(why.unwrap_or_else(|| unavailable("the database failed")));
            }
        }
        forget_nonces(&tx, now, outcomes.len()).map_err(failed)?;
        tx.commit().map_err(failed)
    }
}

impl Write {
    fn refuse(self, error: StoreError) {
        match self {
            Self::Post(_, reply) => answer(reply, Err(error)),
            Self::Change(_, reply) => answer(reply, Err(error)),
            Self::Import(_, reply) => answer(reply, Err(error)),
        }
    }
}

impl Outcome {
    /// Publishes and answers.
    fn conclude(self, bus: &Bus) {
        match self {
            Self::Post(reply, Ok(Post { posted, publish })) => {
                if let Some((channel, message)) = publish {
                    let channel: &str = &channel;
                    bus.publish(channel, || BusEvent::Message {
                        channel: channel.to_owned(),
                        message: message.clone(),
                    });
                }
                answer(reply, Ok(posted));
            }
            Self::Post(reply, Err(error)) => answer(reply, Err(error)),
            Self::Change(reply, result) => answer(reply, result),
            Self::Import(reply, result) => answer(reply, result),
        }
    }

    fn error(&self) -> Option<&StoreError> {
        match self {
            Self::Post(_, result) => result.as_ref().err(),
            Self::Change(_, result) => result.as_ref().err(),
            Self::Import(_, result) => result.as_ref().err(),
        }
    }

    /// Answers that it came to nothing.
    fn refuse(self, error: StoreError) {
        match self {
            Self::Post(reply, _) => answer(reply, Err(error)),
            Self::Change(reply, _) => answer(reply, Err(error)),
            Self::Import(reply, _) => answer(reply, Err(error)),
        }
    }
}

/// Answers, if anybody still waits for it.
fn answer<T>(reply: Reply<T>, answer: Result<T, StoreError>) {
    let _ = reply.send(answer);
}

/// Does one write such that it leaves nothing behind if it fails.
fn isolated<T>(
    tx: &mut Transaction<'_>,
    write: impl FnOnce(&Connection) -> rusqlite::Result<T>,
) -> Result<T, StoreError> {
    let attempt = || {
        let savepoint = tx.savepoint()?;
        let done = write(&savepoint)?;
        savepoint.commit()?;
        Ok(done)
    };
    attempt().map_err(|error: rusqlite::Error| database_failed("writing", &error))
}

impl Change {
    fn apply(&self, db: &Connection) -> rusqlite::Result<Result<(), StoreError>> {
        match self {
            Self::CreateUser(user) => create_user(db, user),
            Self::ReplaceHash { name, from, to } => {
                let mut update = db.prepare_cached(
                    "UPDATE users SET password_hash = ?3 WHERE name = ?1 AND password_hash = ?2",
                )?;
                update.execute([name, from, to]).map(|_| Ok(()))
            }
            Self::CreateChannel(channel) => {
                if BUILT_IN_CHANNELS.iter().any(|&(key, _)| key == channel.key) {
                    return Ok(Ok(()));
                }
                let mut insert = db.prepare_cached(
                    "INSERT INTO channels (key, name) VALUES (?1, ?2) ON CONFLICT (key) DO NOTHING",
                )?;
                insert
                    .execute([&channel.key, &channel.name])
                    .map(|_| Ok(()))
            }
        }
    }
}

fn create_user(db: &Connection, user: &User) -> rusqlite::Result<Result<(), StoreError>> {
    let created = db
        .prepare_cached(
            "INSERT INTO users (name, password_hash) VALUES (?1, ?2) ON CONFLICT (name) DO NOTHING",
        )?
        .execute([&user.name, &user.password_hash])?;
    if created == 1 {
        return Ok(Ok(()));
    }
    let existing: String = db
        .prepare_cached("SELECT password_hash FROM users WHERE name = ?1")?
        .query_row([&user.name], |row| row.get(0))?;
    // The hash is salted: only a repetition of the request that created the user has the same.
    Ok(if existing == user.password_hash {
        Ok(())
    } else {
        Err(StoreError::Exists)
    })
}

const INSERT_MESSAGE: &str = "INSERT INTO messages (channel, id, date, user, sender, event)
     VALUES (?1, ?2, ?3, ?4, ?5, ?6)";

fn post(
    db: &Connection,
    counters: &mut Counters,
    message: &NewMessage,
    now: i64,
) -> rusqlite::Result<Post> {
    let counter = match counters.find(db, &message.channel)? {
        Some(counter) => counter,
        None => Counter::create(db, &message.channel)?,
    };
    if let Some(posted) = remembered(db, counter.number, message, now)? {
        return Ok(Post {
            posted,
            publish: None,
        });
    }

    // The clock may have been set back, but a channel's dates never go back.
    let counter = Counter {
        last: counter.last + 1,
        date: counter.date.max(now),
        ..counter
    };
    let posted = Posted {
        id: from_sql(counter.last),
        date: iso(counter.date)?,
    };
    let body = EventBody {
        message: &message.message,
        user: &message.user,
        date: &posted.date,
        id: posted.id,
        channel: &message.channel,
        nonce: message.client_nonce.then_some(message.nonce.as_str()),
    };
    let event = to_raw_value(&body)
        .map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))?;

    let Counter {
        number, last, date, ..
    } = counter;
    db.prepare_cached("UPDATE counters SET last = ?2, date = ?3 WHERE number = ?1")?
        .execute(params![number, last, date])?;
    db.prepare_cached(INSERT_MESSAGE)?.execute(params![
        number,
        last,
        date,
        message.user,
        message.sender,
        event.get()
    ])?;
    // One that is there already is too old to count.
    db.prepare_cached(
        "INSERT OR REPLACE INTO nonces (channel, user, nonce, id, date, forget)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?
    .execute(params![
        number,
        message.user,
        message.nonce,
        last,
        date,
        now + nonce_memory()
    ])?;

    counters.set(&message.channel, counter);
    let stored = Message {
        id: posted.id,
        user: message.user.clone(),
        sender: message.sender.clone(),
        event,
    };
    Ok(Post {
        posted,
        publish: Some((message.channel.clone(), stored)),
    })
}

/// Appends the messages of a batch that are not there yet. Returns how many the channel has
/// imported altogether.
fn import(
    db: &Connection,
    counters: &mut Counters,
    batch: &Batch,
) -> rusqlite::Result<Result<u64, ImportError>> {
    let found = counters.find(db, &batch.channel)?;
    let (last, imported) = found.map_or((0, 0), |c| (from_sql(c.last), from_sql(c.imported)));
    let there = match already_imported(batch.first, batch.messages.len() as u64, imported, last) {
        Ok(there) => usize::try_from(there).unwrap_or(usize::MAX),
        Err(error) => return Ok(Err(error)),
    };
    let new = batch.messages.get(there..).unwrap_or_default();
    if new.is_empty() {
        return Ok(Ok(imported));
    }

    let mut counter = match found {
        Some(counter) => counter,
        None => Counter::create(db, &batch.channel)?,
    };
    let mut insert = db.prepare_cached(INSERT_MESSAGE)?;
    for message in new {
        counter.last += 1;
        counter.date = counter.date.max(message.millis);
        let event = serde_json::to_string(&EventBody {
            message: &message.message,
            user: &message.user,
            date: &iso(counter.date)?,
            id: from_sql(counter.last),
            channel: &batch.channel,
            nonce: None,
        })
        .map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))?;
        let Counter {
            number, last, date, ..
        } = counter;
        // No connection of ours has posted it.
        insert.execute(params![number, last, date, message.user, "", event])?;
    }
    counter.imported = counter.last;
    db.prepare_cached("UPDATE counters SET last = ?2, date = ?3, imported = ?4 WHERE number = ?1")?
        .execute(params![
            counter.number,
            counter.last,
            counter.date,
            counter.imported
        ])?;
    counters.set(&batch.channel, counter);
    Ok(Ok(from_sql(counter.imported)))
}

/// What a message was answered with if it has been posted before.
fn remembered(
    db: &Connection,
    channel: i64,
    message: &NewMessage,
    now: i64,
) -> rusqlite::Result<Option<Posted>> {
    let found: Option<(i64, i64)> = db
        .prepare_cached(
            "SELECT id, date FROM nonces
             WHERE channel = ?1 AND user = ?2 AND nonce = ?3 AND forget > ?4",
        )?
        .query_row(params![channel, message.user, message.nonce, now], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .optional()?;
    found
        .map(|(id, date)| {
            Ok(Posted {
                id: from_sql(id),
                date: iso(date)?,
            })
        })
        .transpose()
}

/// Removes nonces whose time has passed: up to two for each write, so that it keeps up with any
/// load, yet never takes long.
fn forget_nonces(db: &Connection, now: i64, writes: usize) -> rusqlite::Result<()> {
    let limit = i64::try_from(writes).unwrap_or(i64::MAX).saturating_mul(2);
    db.prepare_cached(
        "DELETE FROM nonces WHERE (channel, user, nonce) IN
         (SELECT channel, user, nonce FROM nonces WHERE forget <= ?1 ORDER BY forget LIMIT ?2)",
    )?
    .execute([now, limit])?;
    Ok(())
}

/// [`NONCE_MEMORY`] in milliseconds.
fn nonce_memory() -> i64 {
    i64::try_from(NONCE_MEMORY.as_millis()).unwrap_or(i64::MAX)
}

/// ISO 8601, UTC, with milliseconds.
fn iso(millis: i64) -> rusqlite::Result<String> {
    const PRINTER: DateTimePrinter = DateTimePrinter::new().precision(Some(3));
    let timestamp = Timestamp::from_millisecond(millis)
        .map_err(|_| rusqlite::Error::IntegralValueOutOfRange(0, millis))?;
    Ok(PRINTER.timestamp_to_string(&timestamp))
}

/// How far a channel has come.
#[derive(Clone, Copy)]
struct Counter {
    /// What the database calls the channel.
    number: i64,
    /// The last id; 0 if none.
    last: i64,
    /// The last message's date, Unix time in milliseconds.
    date: i64,
    /// The last id that was imported; 0 if none.
    imported: i64,
}

impl Counter {
    /// Begins a channel.
    fn create(db: &Connection, channel: &str) -> rusqlite::Result<Self> {
        db.prepare_cached("INSERT INTO counters (channel, last, date) VALUES (?1, 0, 0)")?
            .execute([channel])?;
        Ok(Self {
            number: db.last_insert_rowid(),
            last: 0,
            date: 0,
            imported: 0,
        })
    }
}

/// The channels' counters, with the ones used lately in memory. This thread alone writes, so what
/// is in memory is what is in the database, within the current transaction too.
#[derive(Default)]
struct Counters(HashMap<String, Counter>);

impl Counters {
    fn find(&self, db: &Connection, channel: &str) -> rusqlite::Result<Option<Counter>> {
        if let Some(counter) = self.0.get(channel) {
            return Ok(Some(*counter));
        }
        db.prepare_cached("SELECT number, last, date, imported FROM counters WHERE channel = ?1")?
            .query_row([channel], |row| {
                Ok(Counter {
                    number: row.get(0)?,
                    last: row.get(1)?,
                    date: row.get(2)?,
                    imported: row.get(3)?,
                })
            })
            .optional()
    }

    /// The last id of a channel; 0 if none.
    fn last(&self, db: &Connection, channel: &str) -> rusqlite::Result<u64> {
        Ok(self
            .find(db, channel)?
            .map_or(0, |counter| from_sql(counter.last)))
    }

    fn set(&mut self, channel: &str, counter: Counter) {
        if let Some(known) = self.0.get_mut(channel) {
            *known = counter;
            return;
        }
        if self.0.len() >= CACHED_COUNTERS {
            // Rare, and costs each busy channel one look-up.
            self.0.clear();
        }
        self.0.insert(channel.to_owned(), counter);
    }

    /// Has a channel's counter read anew.
    fn forget(&mut self, channel: &str) {
        self.0.remove(channel);
    }

    /// Has all counters read anew.
    fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicI64;

    use tempfile::TempDir;
    use tokio::sync::oneshot;

    use super::super::open::Database;
    use super::*;

    /// A writer without its thread, with a clock to set.
    struct Fixture {
        writer: Writer,
        clock: Arc<AtomicI64>,
        _directory: TempDir,
    }

    impl Fixture {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let database = Database::open(&directory.path().join("db"), 0).unwrap();
            let clock = Arc::new(AtomicI64::new(1_000_000));
            let mut writer = Writer::new(database.writer, Arc::default(), Arc::default());
            writer.clock = {
                let clock = Arc::clone(&clock);
                Box::new(move || clock.load(Ordering::Relaxed))
            };
            Self {
                writer,
                clock,
                _directory: directory,
            }
        }

        /// Posts all of them in one batch.
        fn post_all(&mut self, messages: Vec<NewMessage>) -> Vec<Result<Posted, StoreError>> {
            let (jobs, mut answers): (Vec<_>, Vec<_>) = messages
                .into_iter()
                .map(|message| {
                    let (reply, answer) = oneshot::channel();
                    (Job::Post(message, reply), answer)
                })
                .unzip();
            self.writer.work(jobs.into_iter());
            answers
                .iter_mut()
                .map(|answer| answer.try_recv().unwrap())
                .collect()
        }

        fn post(&mut self, message: NewMessage) -> Result<Posted, StoreError> {
            self.post_all(vec![message]).remove(0)
        }

        fn count(&self, table: &str) -> i64 {
            let query = format!("SELECT count(*) FROM {table}");
            self.writer
                .connection
                .query_row(&query, [], |row| row.get(0))
                .unwrap()
        }

        /// Has the database do something whenever a message of that user is inserted.
        fn trap(&self, user: &str, action: &str) {
            let sql = format!(
                "CREATE TABLE debts (creditor TEXT REFERENCES users DEFERRABLE INITIALLY DEFERRED);
                 CREATE TRIGGER trap AFTER INSERT ON nonces WHEN new.user = '{user}'
                 BEGIN {action}; END;"
            );
            self.writer.connection.execute_batch(&sql).unwrap();
        }
    }

    fn message(user: &str, nonce: &str) -> NewMessage {
        NewMessage {
            channel: "c".to_owned(),
            user: user.to_owned(),
            message: "text".to_owned(),
            nonce: nonce.to_owned(),
            client_nonce: false,
            sender: "s".to_owned(),
        }
    }

    fn ids(results: &[Result<Posted, StoreError>]) -> Vec<Option<u64>> {
        results
            .iter()
            .map(|result| result.as_ref().ok().map(|posted| posted.id))
            .collect()
    }

    #[test]
    fn a_date_is_never_before_the_one_of_the_previous_message() {
        let mut fixture = Fixture::new();
        let first = fixture.post(message("anna", "1")).unwrap();
        assert_eq!(first.date, "1970-01-01T00:16:40.000Z");
        fixture.clock.store(999_999, Ordering::Relaxed);
        assert_eq!(fixture.post(message("anna", "2")).unwrap().date, first.date);
        fixture.writer.counters.clear();
        assert_eq!(fixture.post(message("anna", "3")).unwrap().date, first.date);
        fixture.clock.store(1_000_001, Ordering::Relaxed);
        assert_eq!(
            fixture.post(message("anna", "4")).unwrap().date,
            "1970-01-01T00:16:40.001Z"
        );
    }

    #[test]
    fn a_nonce_is_remembered_for_its_time_and_then_forgotten() {
        let mut fixture = Fixture::new();
        let first = fixture.post(message("anna", "1")).unwrap();
        fixture
            .clock
            .fetch_add(nonce_memory() - 1, Ordering::Relaxed);
        assert_eq!(fixture.post(message("anna", "1")).unwrap(), first);
        fixture.clock.fetch_add(1, Ordering::Relaxed);
        assert_eq!(fixture.post(message("anna", "1")).unwrap().id, 2);
    }

    #[test]
    fn old_nonces_are_removed_as_fast_as_new_ones_come() {
        let mut fixture = Fixture::new();
        for batch in 0..4 {
            let messages = (0..50)
                .map(|n| message("anna", &format!("{batch}-{n}")))
                .collect();
            fixture.post_all(messages);
        }
        assert_eq!(fixture.count("nonces"), 200);
        fixture.clock.fetch_add(nonce_memory(), Ordering::Relaxed);
        for batch in 4..6 {
            let messages = (0..50)
                .map(|n| message("anna", &format!("{batch}-{n}")))
                .collect();
            fixture.post_all(messages);
        }
        assert_eq!(fixture.count("nonces"), 100);
        assert_eq!(fixture.count("messages"), 300);
    }

    #[test]
    fn removing_old_nonces_uses_the_index() {
        let fixture = Fixture::new();
        let mut statement = fixture
            .writer
            .connection
            .prepare(
                "EXPLAIN QUERY PLAN DELETE FROM nonces WHERE (channel, user, nonce) IN
                 (SELECT channel, user, nonce FROM nonces WHERE forget <= 1 ORDER BY forget
                  LIMIT 2)",
            )
            .unwrap();
        let plan: Vec<String> = statement
            .query_map([], |row| row.get(3))
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert!(plan.iter().all(|line| !line.contains("SCAN")), "{plan:#?}");
        assert!(
            plan.iter().any(|line| line.contains("nonces_by_forget")),
            "{plan:#?}"
        );
    }

    #[test]
    fn a_write_that_fails_does_not_spoil_the_others_of_its_batch() {
        let mut fixture = Fixture::new();
        // It fails half-way: the counter and the message are written already.
        fixture.trap("mallory", "SELECT RAISE(ABORT, 'trapped')");
        let results = fixture.post_all(vec![
            message("anna", "1"),
            message("mallory", "2"),
            message("bert", "3"),
            message("mallory", "4"),
        ]);
        assert_eq!(ids(&results), [Some(1), None, Some(2), None]);
        assert_eq!(results[1], Err(unavailable("the database failed")));
        assert_eq!(fixture.count("messages"), 2);
        assert_eq!(fixture.post(message("bert", "5")).unwrap().id, 3);
    }

    #[test]
    fn a_batch_whose_commit_fails_is_refused_as_a_whole_and_nothing_is_published() {
        let mut fixture = Fixture::new();
        let heard = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&heard);
        let sink: crate::store::BusSink = Arc::new(move |_| {
            count.fetch_add(1, Ordering::Relaxed);
            true
        });
        fixture
            .writer
            .bus
            .subscribe(&Arc::new(Subscriber::new(1, sink)), "c");
        assert_eq!(fixture.post(message("anna", "1")).unwrap().id, 1);
        // A debt that nobody can pay is only noticed by COMMIT.
        fixture.trap("mallory", "INSERT INTO debts VALUES ('nobody')");

        let results = fixture.post_all(vec![message("anna", "2"), message("mallory", "3")]);
        assert_eq!(ids(&results), [None, None]);
        assert_eq!(heard.load(Ordering::Relaxed), 1);
        assert_eq!(fixture.count("messages"), 1);
        assert_eq!(
            fixture.post(message("anna", "2")).unwrap().id,
            2,
            "the counter went on"
        );
        assert_eq!(heard.load(Ordering::Relaxed), 2);
        assert_eq!(fixture.writer.commits.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_batch_that_sqlite_rolls_back_by_itself_is_refused_as_a_whole() {
        let mut fixture = Fixture::new();
        fixture.trap("mallory", "SELECT RAISE(ROLLBACK, 'trapped')");
        let batch = vec![
            message("anna", "1"),
            message("mallory", "2"),
            message("bert", "3"),
        ];
        assert_eq!(ids(&fixture.post_all(batch)), [None, None, None]);
        assert_eq!(fixture.count("messages"), 0);
        assert_eq!(fixture.post(message("bert", "3")).unwrap().id, 1);
    }

    #[test]
    fn an_import_that_fails_half_way_leaves_nothing_behind() {
        let mut fixture = Fixture::new();
        let sql = "CREATE TRIGGER trap AFTER INSERT ON messages WHEN new.user = 'mallory'
                   BEGIN SELECT RAISE(ABORT, 'trapped'); END";
        fixture.writer.connection.execute_batch(sql).unwrap();
        let mut import = |first: u64, users: &[&str]| {
            let messages = users.iter().map(|user| Imported {
                user: (*user).to_owned(),
                message: "text".to_owned(),
                millis: 1,
            });
            let batch = Batch {
                channel: "c".to_owned(),
                first,
                messages: messages.collect(),
            };
            let (reply, mut answer) = oneshot::channel();
            fixture
                .writer
                .work(std::iter::once(Job::Import(batch, reply)));
            answer.try_recv().unwrap()
        };
        let failed = Err(unavailable("the database failed"));
        assert_eq!(import(1, &["anna", "bert", "mallory"]), failed);
        assert_eq!(import(1, &["anna"]), Ok(Ok(1)));
        assert_eq!(import(2, &["bert", "mallory"]), failed);
        assert_eq!(import(1, &[]), Ok(Ok(1)));
        assert_eq!(fixture.count("messages"), 1);
        assert_eq!(fixture.post(message("bert", "1")).unwrap().id, 2);
    }

    #[test]
    fn it_works_again_once_a_full_disk_has_space_again() {
        let mut fixture = Fixture::new();
        let pages: i64 = fixture
            .writer
            .connection
            .pragma_query_one(None, "page_count")
            .unwrap();
        let limit = |fixture: &Fixture, pages: i64| {
            let set = |_: &rusqlite::Row<'_>| Ok(());
            let connection = &fixture.writer.connection;
            connection
                .pragma_update_and_check(None, "max_page_count", pages, set)
                .unwrap();
        };
        limit(&fixture, pages + 8);

        let large = |nonce: u64| NewMessage {
            message: "x".repeat(2000),
            ..message("anna", &nonce.to_string())
        };
        let mut stored = 0;
        let error = loop {
            match fixture.post(large(stored + 1)) {
                Ok(posted) => assert_eq!(posted.id, stored + 1),
                Err(error) => break error,
            }
            stored += 1;
            assert!(stored < 1000, "the disk never gets full");
        };
        assert_eq!(error, unavailable("the disk is full"));
        assert!(fixture.post(large(stored + 1)).is_err());

        limit(&fixture, pages + 1000);
        assert_eq!(fixture.post(large(stored + 1)).unwrap().id, stored + 1);
        assert_eq!(
            fixture.count("messages"),
            i64::try_from(stored + 1).unwrap()
        );
    }

    #[test]
    fn counters_in_memory_are_bounded_and_come_back_from_the_database() {
        let mut fixture = Fixture::new();
        let in_channel = |n: usize| NewMessage {
            channel: n.to_string(),
            ..message("anna", "1")
        };
        for batch in 0..=CACHED_COUNTERS / BATCH {
            fixture.post_all((0..BATCH).map(|n| in_channel(batch * BATCH + n)).collect());
            assert!(fixture.writer.counters.0.len() <= CACHED_COUNTERS);
        }
        let again = NewMessage {
            nonce: "2".to_owned(),
            ..in_channel(0)
        };
        assert_eq!(fixture.post(again).unwrap().id, 2);
    }
}
