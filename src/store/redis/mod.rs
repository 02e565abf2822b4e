//! The store in Redis, which every worker reaches on its own.
//!
//! | file | what |
//! | --- | --- |
//! | `address.rs` | reading `REDIS_URL` |
//! | `connection.rs` | connections that come back by themselves; what errors mean |
//! | `keys.rs` | what things are called in Redis |
//! | `scripts.rs`, `scripts/` | the atomic steps, in Lua |
//! | `wire.rs` | what is put into Redis for a message, and what comes over a topic |
//! | `bus.rs` | the connection that listens, and who hears what |
//! | `life.rs` | whether Redis may have lost ids that it gave out |
//! | `seen.rs` | the highest ids seen, for a Redis whose keys somebody removes |
//! | `lease.rs` | one master for each prefix |
//! | `inspect.rs` | whether Redis is set up to keep what it is given |
//!
//! There are two connections: one that all requests share, and one that listens to all topics, so
//! that Redis' order is the order in which everything is delivered. It needs Redis 6.2, or Valkey.
//!
//! A post is durable as far as Redis is configured to be: with `appendfsync always` an answered
//! one survives anything that the disk survives, with `everysec` the last second may be lost. No id
//! is given out twice in either case (`life.rs`).

pub(super) mod address;
mod bus;
mod connection;
mod inspect;
mod keys;
mod lease;
mod life;
mod scripts;
mod seen;
mod wire;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use jiff::fmt::temporal::DateTimePrinter;
use redis::{ErrorKind, FromRedisValue, RedisError, ScriptInvocation};
use serde_json::value::RawValue;

use self::bus::Bus;
use self::connection::{Commands, Server};
use self::keys::Keys;
pub use self::lease::{Lease, LeaseError};
use self::life::Lives;
use self::seen::Seen;
use crate::presence::Numbered;

use super::{
    BUILT_IN_CHANNELS, BusSink, Channel, Import, ImportError, Imported, Message, NONCE_MEMORY,
    NewMessage, PAGE_LIMIT, Page, Posted, Range, Store, StoreError, User, already_imported,
};

/// The prefix of all names in Redis, unless the settings say another.
pub const DEFAULT_PREFIX: &str = "banter";

/// Bytes of a prefix, at most.
const MAX_PREFIX: usize = 64;

/// Bound for ids and positions given to a script: Lua's numbers hold integers exactly up to here,
/// and nothing lies beyond.
const MAX_ID: u64 = 1 << 53;

/// Where the store is, and how it is kept.
#[derive(Clone)]
pub struct RedisSettings {
    /// Where Redis is: `redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE]`, the same with
    /// `rediss://` for TLS, or `unix:PATH[?user=USER&pass=PASSWORD&db=DATABASE]`.
    pub url: String,
    /// What all names in Redis begin with, in braces. Deployments with different prefixes can
    /// share a Redis. Printable ASCII without braces and spaces, 1 to 64 characters.
    pub prefix: String,
    /// What becomes of old messages.
    pub retention: Retention,
}

impl RedisSettings {
    /// The default settings for a Redis at `url`.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            prefix: DEFAULT_PREFIX.to_owned(),
            retention: Retention::default(),
        }
    }
}

/// Without the URL, which may hold a password.
impl fmt::Debug for RedisSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisSettings")
            .field("prefix", &self.prefix)
            .field("retention", &self.retention)
            .finish_non_exhaustive()
    }
}

/// How long messages are kept. The default is for ever.
///
/// It is applied to a channel whenever somebody posts to it, in steps of a thousand messages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retention {
    /// How many messages to keep in each channel.
    pub max_count: Option<std::num::NonZeroU32>,
    /// How long to keep a message.
    pub max_age: Option<Duration>,
}

/// Why the settings are of no use.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The URL is malformed.
    #[error("REDIS_URL: {url:?} {problem}; expected redis://HOST:PORT or unix:PATH")]
    Url {
        /// The URL, without its password.
        url: String,
        /// What is wrong, as the end of a sentence.
        problem: &'static str,
    },
    /// The prefix is malformed.
    #[error(
        "the Redis prefix {0:?} is of no use; expected 1 to {MAX_PREFIX} printable ASCII \
         characters, no braces and spaces"
    )]
    Prefix(String),
    /// Something answers there, but will not do.
    #[error("Redis at {address}: {problem}; {advice}")]
    Refused {
        /// Where, without user and password.
        address: String,
        /// What went wrong, in one line.
        problem: String,
        /// What to do.
        advice: &'static str,
    },
}

/// The store in Redis.
pub struct RedisStore {
    keys: Keys,
    retention: Retention,
    seen: Arc<Seen>,
    lives: Lives,
    commands: Commands,
    bus: Bus,
}

impl RedisStore {
    /// Opens the store; its bus events go to `sink`, which must not own the store.
    ///
    /// A Redis that is not there yet, or goes away, is no error: the store connects as soon as
    /// it can, for ever, and answers [`StoreError::Unavailable`] meanwhile. Dropping the store
    /// ends its connections.
    ///
    /// # Errors
    ///
    /// One line that says what to do, if the settings are malformed, or if Redis says that they
    /// are wrong: see [`SettingsError`].
    pub async fn connect(
        settings: RedisSettings,
        sink: BusSink,
    ) -> Result<Arc<Self>, SettingsError> {
        let RedisSettings {
            url,
            prefix,
            retention,
        } = settings;
        let usable = |c: char| c.is_ascii_graphic() && c != '{' && c != '}';
        if !(1..=MAX_PREFIX).contains(&prefix.len()) || !prefix.chars().all(usable) {
            return Err(SettingsError::Prefix(prefix));
        }
        let info = address::parse(&url)?;
        let shown = address::shown(info.addr());
        if matches!(info.addr(), redis::ConnectionAddr::TcpTls { .. }) {
            // It fails if there is one already, which is as good.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        let client = redis::Client::open(info)
            .map_err(|error| refused(&shown, &error, "check REDIS_URL"))?;

        let server = Arc::new(Server::new(client, shown));
        let first = match server.connect(|_| ()).await {
            Ok(connection) => Some(connection),
            Err(error) => match advice(&error) {
                Some(advice) => return Err(refused(&server.shown, &error, advice)),
                None => None,
            },
        };
        let keys = Keys::new(&prefix);
        let seen = Arc::new(Seen::default());
        let address = server.shown.clone();
        Ok(Arc::new(Self {
            commands: Commands::new(Arc::clone(&server), first, |connection| {
                inspect::inspect(connection, address)
            }),
            bus: Bus::new(
                server,
                keys.probe(),
                keys.presence(),
                sink,
                Arc::clone(&seen),
            ),
            lives: Lives::new(keys.life()),
            keys,
            retention,
            seen,
        }))
    }

    /// Whether there is a connection to Redis at this moment.
    pub fn connected(&self) -> bool {
        self.commands.connected()
    }

    /// Starts delivery of the changes of who is online that a master publishes, as
    /// [`BusEvent::Presence`](super::BusEvent::Presence).
    ///
    /// # Errors
    ///
    /// [`StoreError::Unavailable`] if Redis cannot be reached; delivery starts as soon as it can
    /// all the same.
    pub async fn watch_presence(&self) -> Result<(), StoreError> {
        self.bus.watch_presence().await
    }

    /// Publishes a change of who is online. Not repeated if it fails: subscribers notice a gap.
    ///
    /// # Errors
    ///
    /// [`StoreError::Unavailable`] if Redis cannot be reached.
    pub async fn publish_presence(&self, numbered: &Numbered) -> Result<(), StoreError> {
        let payload = serde_json::to_vec(numbered)
            .map_err(|error| StoreError::Unavailable(error.to_string()))?;
        let mut publish = redis::cmd("PUBLISH");
        publish.arg(self.keys.presence()).arg(payload);
        let publish = &publish;
        self.commands
            .run_now("publishing who is online", |mut connection| async move {
                publish.query_async(&mut connection).await
            })
            .await
    }

    /// Runs a script.
    async fn script<T: FromRedisValue>(
        &self,
        doing: &'static str,
        invocation: &ScriptInvocation<'_>,
    ) -> Result<T, StoreError> {
        self.commands
            .run(doing, |mut connection| async move {
                invocation.invoke_async(&mut connection).await
            })
            .await
    }

    /// A channel's last id; 0 if none.
    async fn last(&self, channel: &str) -> Result<u64, StoreError> {
        let counter = self.keys.counter(channel);
        let mut get = redis::cmd("HGET");
        get.arg(counter).arg("last");
        let get = &get;
        let last: Option<u64> = self
            .commands
            .run("reading an id", |mut connection| async move {
                get.query_async(&mut connection).await
            })
            .await?;
        Ok(last.unwrap_or(0))
    }
}

/// The address in a URL, without user and password.
///
/// # Errors
///
/// [`SettingsError::Url`] if it is malformed.
pub fn shown_address(url: &str) -> Result<String, SettingsError> {
    Ok(address::shown(address::parse(url)?.addr()))
}

/// The error for a Redis that will not do.
pub(super) fn refused(address: &str, error: &RedisError, advice: &'static str) -> SettingsError {
    let problem = match error.kind() {
        // What the parser says has several lines, and helps nobody.
        ErrorKind::Parse => "it does not speak the Redis protocol".to_owned(),
        _ => error.to_string().lines().collect::<Vec<_>>().join(" "),
    };
    SettingsError::Refused {
        address: address.to_owned(),
        problem,
        advice,
    }
}

/// What to do about an error that will not pass by itself; `None` for one that may.
fn advice(error: &RedisError) -> Option<&'static str> {
    // The crate keeps it behind a pointer, which counts as an error of its own.
    let io = std::error::Error::source(error)
        .and_then(|source| source.downcast_ref::<Arc<dyn std::error::Error + Send + Sync>>())
        .and_then(|error| error.downcast_ref::<std::io::Error>())
        .map(std::io::Error::kind);
    match (error.kind(), error.code()) {
        (ErrorKind::AuthenticationFailed, _) | (_, Some("NOAUTH" | "WRONGPASS" | "NOPERM")) => {
            Some("check user and password in REDIS_URL")
        }
        (ErrorKind::RESP3NotSupported, _) => Some("upgrade it to Redis 6.2 or newer"),
        (ErrorKind::Parse, _) => Some("check host and port in REDIS_URL"),
        _ if io == Some(std::io::ErrorKind::InvalidData) => {
            Some("check its certificate, and host and scheme in REDIS_URL")
        }
        _ => None,
    }
}

#[async_trait]
impl Store for RedisStore {
    async fn create_user(&self, user: User) -> Result<(), StoreError> {
        let mut create = scripts::CREATE_USER.key(self.keys.user(&user.name));
        create.arg(user.name).arg(user.password_hash);
        let created: bool = self.script("creating a user", &create).await?;
        if created {
            Ok(())
        } else {
            Err(StoreError::Exists)
        }
    }

    async fn user(&self, name: &str) -> Result<Option<User>, StoreError> {
        let mut get = redis::cmd("HMGET");
        get.arg(self.keys.user(name))
            .arg("name")
            .arg("password_hash");
        let get = &get;
        let (name, password_hash): (Option<String>, Option<String>) = self
            .commands
            .run("looking a user up", |mut connection| async move {
                get.query_async(&mut connection).await
            })
            .await?;
        Ok(name.zip(password_hash).map(|(name, password_hash)| User {
            name,
            password_hash,
        }))
    }

    async fn replace_hash(&self, name: &str, from: &str, to: &str) -> Result<(), StoreError> {
        let mut replace = scripts::REPLACE_HASH.key(self.keys.user(name));
        replace.arg(from).arg(to);
        self.script("replacing a hash", &replace).await
    }

    async fn channels(&self) -> Result<Vec<Channel>, StoreError> {
        let mut get = redis::pipe();
        get.atomic()
            .hgetall(self.keys.channels())
            .lrange(self.keys.channels_order(), 0, -1);
        let get = &get;
        let (mut names, order): (std::collections::HashMap<String, String>, Vec<String>) = self
            .commands
            .run("listing the channels", |mut connection| async move {
                get.query_async(&mut connection).await
            })
            .await?;
        let built_in = BUILT_IN_CHANNELS.iter().map(|&(key, name)| Channel {
            key: key.to_owned(),
            name: name.to_owned(),
        });
        let created = order.into_iter().filter_map(|key| {
            let name = names.remove(&key)?;
            Some(Channel { key, name })
        });
        Ok(built_in.chain(created).collect())
    }

    async fn create_channel(&self, channel: Channel) -> Result<(), StoreError> {
        if BUILT_IN_CHANNELS.iter().any(|&(key, _)| key == channel.key) {
            return Ok(());
        }
        let mut create = scripts::CREATE_CHANNEL.key(self.keys.channels());
        create
            .key(self.keys.channels_order())
            .arg(channel.key)
            .arg(channel.name);
        self.script("creating a channel", &create).await
    }

    async fn post(&self, message: NewMessage) -> Result<Posted, StoreError> {
        let NewMessage {
            channel,
            user,
            nonce,
            sender,
            ..
        } = &message;
        let fragments = wire::fragments(&message).map_err(|error| unwritable(&error))?;
        let now = Timestamp::now();
        let Retention { max_count, max_age } = self.retention;
        let cutoff = max_age.map_or(0, |age| {
            let age = i64::try_from(age.as_millis()).unwrap_or(i64::MAX);
            now.as_millisecond().saturating_sub(age).max(0)
        });
        let script = |life: &str| {
            let mut post = scripts::POST.key(self.keys.counter(channel));
            post.key(self.keys.messages(channel))
                .key(self.keys.nonce(channel, user, nonce))
                .key(self.keys.holes(channel))
                .key(self.keys.life())
                .arg(self.keys.topic(channel))
                .arg(self.seen.highest(channel))
                .arg(now.as_millisecond())
                .arg(iso(&now))
                .arg(&fragments.before)
                .arg(&fragments.after)
                .arg(user)
                .arg(sender)
                .arg(u64::try_from(NONCE_MEMORY.as_millis()).unwrap_or(u64::MAX))
                .arg(max_count.map_or(0, std::num::NonZeroU32::get))
                .arg(cutoff)
                .arg(life);
            post
        };
        let answer: String = self
            .commands
            .run_knowing("posting", |connection| {
                self.lives.invoke(connection, &script)
            })
            .await?;
        let posted = wire::posted(&answer).ok_or_else(|| foreign("a post", &answer))?;
        self.seen.note(channel, posted.id);
        Ok(posted)
    }

    async fn read(&self, channel: &str, range: Range) -> Result<Page, StoreError> {
        let (kind, bound, limit) = match range {
            Range::Latest { start, end } => ("latest", start, end.saturating_sub(start)),
            Range::Before { id, limit } => ("before", id, limit.into()),
            Range::After { id, limit } => ("after", id, limit.into()),
        };
        let mut read = scripts::READ.key(self.keys.counter(channel));
        read.key(self.keys.messages(channel))
            .key(self.keys.holes(channel))
            .arg(kind)
            .arg(bound.min(MAX_ID))
            .arg(limit.min(PAGE_LIMIT.into()));
        let answer: Vec<String> = self.script("reading", &read).await?;
        let page = page(answer, kind != "after")
            .ok_or_else(|| foreign("a channel", &self.keys.messages(channel)))?;
        self.seen.note(channel, page.last);
        Ok(page)
    }

    async fn last_before(&self, channel: &str, millis: i64) -> Result<u64, StoreError> {
        let mut find = scripts::LAST_BEFORE.key(self.keys.counter(channel));
        find.key(self.keys.messages(channel)).arg(millis);
        self.script("looking for a date", &find).await
    }

    async fn subscribe(&self, channel: &str) -> Result<u64, StoreError> {
        let topic = self.keys.topic(channel);
        let last = self
            .bus
            .subscribe(channel, &topic, || self.last(channel))
            .await?;
        self.seen.note(channel, last);
        Ok(last)
    }

    async fn unsubscribe(&self, channel: &str) -> Result<(), StoreError> {
        self.bus.unsubscribe(&self.keys.topic(channel));
        Ok(())
    }

    async fn typing(&self, channel: &str, user: &str) -> Result<(), StoreError> {
        let mut publish = redis::cmd("PUBLISH");
        publish
            .arg(self.keys.topic(channel))
            .arg(wire::typing(user));
        let publish = &publish;
        // It may be lost, and is of no use later.
        self.commands
            .run_now("publishing", |mut connection| async move {
                publish.query_async(&mut connection).await
            })
            .await
    }
}

#[async_trait]
impl Import for RedisStore {
    async fn import(
        &self,
        channel: &str,
        first: u64,
        batch: Vec<Imported>,
    ) -> Result<u64, ImportError> {
        let mut import = scripts::IMPORT.key(self.keys.counter(channel));
        import
            .key(self.keys.messages(channel))
            .arg(first.min(MAX_ID));
        let length = batch.len() as u64;
        for message in batch {
            let Imported {
                user,
                message,
                millis,
            } = message;
            let date = Timestamp::from_millisecond(millis).map_err(|error| {
                tracing::error!("a message has a date that no calendar has: {error}");
                StoreError::Unavailable("the message cannot be stored".to_owned())
            })?;
            let fragments = wire::fragments_of(channel, &user, &message, None)
                .map_err(|error| unwritable(&error))?;
            import
                .arg(millis)
                .arg(iso(&date))
                .arg(fragments.before)
                .arg(fragments.after)
                .arg(user);
        }
        let (imported, last): (u64, u64) = self.script("importing", &import).await?;
        // What the script has not appended it has left out for the same reasons.
        let there = already_imported(first, length, imported, last)?;
        debug_assert_eq!(there, length);
        self.seen.note(channel, last);
        Ok(imported)
    }
}

/// The error for a message that cannot be written as JSON.
fn unwritable(error: &serde_json::Error) -> StoreError {
    tracing::error!("a message cannot be written as JSON: {error}");
    StoreError::Unavailable("the message cannot be stored".to_owned())
}

/// Reads what the read script answers; `None` if it makes no sense.
fn page(answer: Vec<String>, newest_first: bool) -> Option<Page> {
    let mut answer = answer.into_iter();
    let last = answer.next()?.parse().ok()?;
    let mut messages = Vec::with_capacity(answer.len() / 4);
    while let Some(id) = answer.next() {
        messages.push(Message {
            id: id.parse().ok()?,
            user: answer.next()?,
            sender: answer.next()?,
            event: RawValue::from_string(answer.next()?).ok()?,
        });
    }
    if newest_first {
        messages.reverse();
    }
    Some(Page { messages, last })
}

/// The error for something in Redis that no Banter has put there.
fn foreign(what: &str, content: &str) -> StoreError {
    tracing::error!(what, content, "Redis holds something unexpected");
    StoreError::Unavailable("Redis holds something unexpected".to_owned())
}

/// ISO 8601, UTC, with milliseconds.
fn iso(timestamp: &Timestamp) -> String {
    const PRINTER: DateTimePrinter = DateTimePrinter::new().precision(Some(3));
    PRINTER.timestamp_to_string(timestamp)
}
