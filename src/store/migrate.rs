//! `banter migrate`: brings over what the Node.js chat server that came before keeps in Redis.
//!
//! | file | what |
//! | --- | --- |
//! | `source.rs` | reading that Redis, in pages |
//! | `record.rs` | what one user, channel or message there means here |
//! | `report.rs` | what was done, for people |
//! | `progress.rs` | how far it is, for who waits |
//!
//! A list's messages keep their order, which is the order in which they were posted, and get the
//! ids from 1 on. Those that cannot be taken over are left out without a hole. Because the same
//! list always yields the same ids, a run recognises what an earlier one has brought over, goes on
//! where it was interrupted, and adds what has come to the source meanwhile. An account or channel
//! that exists here already is left as it is. The source is never written to.

mod progress;
mod record;
mod report;
mod source;

use std::collections::HashSet;
use std::sync::Arc;

use anyhow::Context;
use futures_util::{StreamExt, TryStreamExt, stream};

use self::progress::Progress;
use self::report::{Report, Tally};
use self::source::{List, Source};
use super::embedded::Embedded;
use super::redis::RedisStore;
use super::{Import, ImportError, Imported, Range, StoreError, User};
use crate::cli::MigrateArgs;
use crate::worker::http::channels::is_channel_key;
use crate::{ConfigError, config, systemd};

/// How many users are created at once: the embedded store then commits them together.
const USERS_AT_ONCE: usize = 128;

/// The most messages, and about the most bytes, of a batch.
const BATCH: usize = 1000;
const BATCH_BYTES: usize = 4 << 20;

/// Runs `banter migrate`: prints the report to stdout, and progress to stderr.
///
/// # Errors
///
/// [`ConfigError`] if source or target cannot be used; any other if one of them fails half-way.
/// Nothing is lost then: another run goes on.
pub async fn run(args: MigrateArgs) -> anyhow::Result<()> {
    let source = Source::connect(&args.from).await?;
    let report = match config::redis(&args.redis)? {
        Some(settings) => {
            // Nothing is subscribed to.
            let store = RedisStore::connect(settings, Arc::new(|_| true))
                .await
                .map_err(ConfigError::new)?;
            migrate(source, store).await?
        }
        None => {
            let state_dir = systemd::state_dir(&args.state)?;
            let store = Embedded::open(&state_dir.join("banter.db")).map_err(ConfigError::new)?;
            let report = migrate(source, Arc::new(store.client(Arc::new(|_| true)))).await;
            store.shutdown().await;
            report?
        }
    };
    crate::print_line(&report.to_string());
    Ok(())
}

async fn migrate(source: Source, target: Arc<dyn Import>) -> anyhow::Result<Report> {
    let mut migration = Migration {
        source,
        target,
        report: Report::default(),
        now: jiff::Timestamp::now().as_millisecond(),
    };
    migration.run().await.context(
        "the migration is not finished, but nothing is lost: run it again, and it goes on where it \
         stopped",
    )?;
    Ok(migration.report)
}

/// A run under way.
struct Migration {
    source: Source,
    target: Arc<dyn Import>,
    report: Report,
    /// Unix time in milliseconds: no message can be newer.
    now: i64,
}

impl Migration {
    async fn run(&mut self) -> anyhow::Result<()> {
        self.users().await?;
        self.channels().await?;
        self.messages().await
    }

    async fn users(&mut self) -> anyhow::Result<()> {
        let progress = Progress::begin("users", None);
        // SCAN may tell of a key more than once.
        let mut seen = HashSet::new();
        let mut scan = self.source.scan("user__*");
        while let Some(mut keys) = scan.next(&mut self.source).await? {
            keys.retain(|key| seen.insert(key.clone()));
            let read = self.source.users(&keys).await?;
            let tally = &mut self.report.users;
            let mut users = Vec::with_capacity(keys.len());
            for (key, fields) in keys.iter().zip(read) {
                match record::user(key, fields) {
                    Ok(user) => users.push(user),
                    Err(reason) => tally.skip(reason, || readable(key)),
                }
            }
            let target = &self.target;
            let created: Vec<bool> = stream::iter(users)
                .map(|user| create_user(target, user))
                .buffer_unordered(USERS_AT_ONCE)
                .try_collect()
                .await?;
            for created in created {
                tally.count(created);
            }
            progress.advance(keys.len() as u64);
        }
        Ok(())
    }

    async fn channels(&mut self) -> anyhow::Result<()> {
        let there = self.target.channels().await?.into_iter();
        let there: HashSet<String> = there.map(|channel| channel.key).collect();
        let Some(list) = self.source.list(b"channel__").await? else {
            let reason = "it is not a list";
            self.report.channels.skip(reason, || "channel__".to_owned());
            return Ok(());
        };
        let progress = Progress::begin("channels", Some(list.length));
        let mut seen = HashSet::new();
        let mut pages = list.pages();
        while let Some(page) = pages.next(&mut self.source).await? {
            for (position, item) in page.positioned() {
                let channel = match record::channel(item) {
                    Ok(channel) if !seen.insert(channel.key.clone()) => {
                        Err("its key is in the list twice")
                    }
                    other => other,
                };
                match channel {
                    Ok(channel) => {
                        let new = !there.contains(&channel.key);
                        // One by one, for their order is kept.
                        self.target.create_channel(channel).await?;
                        self.report.channels.count(new);
                    }
                    Err(reason) => self
                        .report
                        .channels
                        .skip(reason, || format!("channel__[{position}]")),
                }
                progress.advance(1);
            }
        }
        Ok(())
    }

    async fn messages(&mut self) -> anyhow::Result<()> {
        // Not only of the channels in the list: others are found by who knows their keys.
        let mut lists = Vec::new();
        let mut seen = HashSet::new();
        let mut scan = self.source.scan("channel_msg__*");
        while let Some(mut keys) = scan.next(&mut self.source).await? {
            keys.retain(|key| seen.insert(key.clone()));
            for (key, list) in keys.iter().zip(self.source.lists(&keys).await?) {
                match list {
                    Some(list) => lists.push(list),
                    None => self
                        .report
                        .messages
                        .skip("it is not a list", || readable(key)),
                }
            }
        }
        let total = lists.iter().map(|list| list.length).sum();
        let progress = Progress::begin("messages", Some(total));
        for list in lists {
            self.messages_of(list, &progress).await?;
        }
        Ok(())
    }

    async fn messages_of(&mut self, list: List, progress: &Progress) -> anyhow::Result<()> {
        let name = readable(&list.key);
        let key = list.key.strip_prefix(b"channel_msg__").unwrap_or_default();
        let key = match std::str::from_utf8(key) {
            Ok(key) if is_channel_key(key) => key.to_owned(),
            _ => {
                let reason = "the channel's key is not 1 to 128 characters of UTF-8";
                self.report.messages.skip_many(reason, list.length, || name);
                progress.advance(list.length);
                return Ok(());
            }
        };
        let mut channel = ChannelImport::begin(&*self.target, key).await?;
        let mut pages = list.pages();
        while let Some(page) = pages.next(&mut self.source).await? {
            let records: Vec<_> = page
                .positioned()
                .map(|(position, item)| (position, record::message(item, self.now)))
                .collect();
            for (position, record) in channel.dated(records) {
                match record {
                    Ok(message) => channel.take(message).await?,
                    Err(reason) => channel.tally.skip(reason, || format!("{name}[{position}]")),
                }
                progress.advance(1);
            }
        }
        channel.flush().await?;
        let undated = channel.undated;
        self.report.messages.add(channel.finish(&name));
        self.report.undated += undated;
        Ok(())
    }
}

/// Creates a user. Returns whether there was none of that name.
async fn create_user(target: &Arc<dyn Import>, user: User) -> Result<bool, StoreError> {
    // The hash that is there may be a newer one: it is not compared.
    if target.user(&user.name).await?.is_some() {
        return Ok(false);
    }
    match target.create_user(user).await {
        Ok(()) => Ok(true),
        Err(StoreError::Exists) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The import of one channel's messages.
struct ChannelImport<'a> {
    target: &'a dyn Import,
    key: String,
    /// How many messages earlier runs have imported.
    before: u64,
    /// How many are imported.
    imported: u64,
    /// The id of the message that was taken last.
    taken: u64,
    /// How many of those that were taken are there since earlier runs.
    there: u64,
    /// Messages that are to be imported next, and about how many bytes they have.
    batch: Vec<Imported>,
    batch_bytes: usize,
    /// The date of the message before, Unix time in milliseconds.
    date: Option<i64>,
    /// Why the channel takes no more, and how many messages that has affected.
    refused: Option<(&'static str, u64)>,
    undated: u64,
    tally: Tally,
}

impl<'a> ChannelImport<'a> {
    async fn begin(target: &'a dyn Import, key: String) -> Result<Self, ImportError> {
        let before = target.import(&key, 1, Vec::new()).await?;
        Ok(Self {
            target,
            key,
            before,
            imported: before,
            taken: 0,
            there: 0,
            batch: Vec::new(),
            batch_bytes: 0,
            date: None,
            refused: None,
            undated: 0,
            tally: Tally::default(),
        })
    }

    /// Gives a page's messages their dates. One that has none of its own gets that of the message
    /// before, or at the beginning of the first one that has.
    fn dated<P, E>(
        &mut self,
        page: Vec<(P, Result<record::Message, E>)>,
    ) -> Vec<(P, Result<Imported, E>)> {
        let mut dates = page.iter().filter_map(|(_, record)| record.as_ref().ok());
        let mut date = self
            .date
            .or_else(|| dates.find_map(|message| message.millis))
            .unwrap_or(0);
        let mut dated = Vec::with_capacity(page.len());
        for (position, record) in page {
            let record = record.map(|message| {
                match message.millis {
                    Some(millis) => date = millis,
                    None => self.undated += 1,
                }
                self.date = Some(date);
                Imported {
                    user: message.user,
                    message: message.message,
                    millis: date,
                }
            });
            dated.push((position, record));
        }
        dated
    }

    /// Takes the next message of the list.
    async fn take(&mut self, message: Imported) -> anyhow::Result<()> {
        self.taken += 1;
        if let Some((_, count)) = &mut self.refused {
            *count += 1;
            return Ok(());
        }
        if self.taken < self.before || self.taken == self.before && self.is_stored(&message).await?
        {
            self.there = self.taken;
            return Ok(());
        }
        if self.taken == self.before {
            // Then those before are not the same either.
            self.there = 0;
            let reason = "other messages than these were brought into the channel before";
            self.refused = Some((reason, self.taken));
            return Ok(());
        }
        self.batch_bytes += message.message.len() + message.user.len();
        self.batch.push(message);
        if self.batch.len() >= BATCH || self.batch_bytes >= BATCH_BYTES {
            self.flush().await?;
        }
        Ok(())
    }

    /// Whether the last message that was imported before is this one; `true` if it was removed
    /// since.
    async fn is_stored(&self, message: &Imported) -> anyhow::Result<bool> {
        let range = Range::After {
            id: self.before - 1,
            limit: 1,
        };
        let page = self.target.read(&self.key, range).await?;
        let Some(stored) = page.messages.first().filter(|m| m.id == self.before) else {
            return Ok(true);
        };
        let event: serde_json::Value = serde_json::from_str(stored.event.get())?;
        Ok(stored.user == message.user && event["message"] == *message.message)
    }

    /// Imports what has been taken.
    async fn flush(&mut self) -> anyhow::Result<()> {
        let batch = std::mem::take(&mut self.batch);
        self.batch_bytes = 0;
        if batch.is_empty() {
            return Ok(());
        }
        let length = batch.len() as u64;
        match self
            .target
            .import(&self.key, self.imported + 1, batch)
            .await
        {
            Ok(imported) => self.imported = imported,
            Err(ImportError::Native { .. }) => {
                let reason = "the channel has got messages of its own already";
                self.refused = Some((reason, length));
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// What came of it; `name` is the list's.
    fn finish(mut self, name: &str) -> Tally {
        self.tally.migrated = self.imported - self.before;
        self.tally.there = self.there;
        if let Some((reason, count)) = self.refused {
            self.tally.skip_many(reason, count, || name.to_owned());
        }
        self.tally
    }
}

/// A key of the source, for people.
fn readable(key: &[u8]) -> String {
    const LONGEST: usize = 80;
    let text = String::from_utf8_lossy(key);
    let mut shown: String = text.chars().take(LONGEST).collect::<String>();
    shown = shown.escape_debug().to_string();
    if text.chars().nth(LONGEST).is_some() {
        shown.push('…');
    }
    shown
}
