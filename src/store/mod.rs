//! Where users, channels and messages live, and the bus that tells workers of new messages.
//!
//! [`Store`] is the whole of what the server asks of a database. Two kinds of implementation stand
//! behind it: a [`redis`], which all workers reach on their own, and the [`embedded`] SQLite, which
//! the master owns and which workers reach through [`remote::ControlStore`], over the control
//! stream.

pub mod embedded;
pub mod migrate;
pub mod redis;
pub mod remote;

use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;

use crate::presence::Numbered;

/// The most messages that one [`Store::read`] returns.
pub const PAGE_LIMIT: u32 = 200;

/// How long a nonce is remembered: the same one within this time yields the first post's id.
pub const NONCE_MEMORY: std::time::Duration = std::time::Duration::from_secs(600);

/// A registered account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// The name, as registered; names are case-sensitive.
    pub name: String,
    /// The password's hash in PHC string format.
    pub password_hash: String,
}

/// A channel that appears in the public list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Channel {
    /// What clients name it by.
    pub key: String,
    /// What people read.
    pub name: String,
}

/// The three channels that every deployment starts with, in the order of the list.
pub const BUILT_IN_CHANNELS: [(&str, &str); 3] = [
    ("general", "General"),
    ("programming", "Programming"),
    ("random", "Random"),
];

/// A message to be stored and published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewMessage {
    /// Key of the channel.
    pub channel: String,
    /// The author's name.
    pub user: String,
    /// The text.
    pub message: String,
    /// Makes the post idempotent, together with `channel` and `user`, for [`NONCE_MEMORY`].
    pub nonce: String,
    /// Whether the client chose the nonce; only then the event carries it.
    pub client_nonce: bool,
    /// The connection that posts; it does not hear its own message.
    pub sender: String,
}

/// What a post came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Posted {
    /// The message's id: strictly increasing within its channel; dense from 1 on, but for ids that
    /// a store leaves out after it may have lost some. Below 2^53.
    pub id: u64,
    /// When it was stored: ISO 8601, UTC, milliseconds.
    pub date: String,
}

/// The event that clients receive for a message, as stored.
///
/// `{message, user, date, id, channel}`, and `nonce` if the client chose one.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = Message)]
pub struct EventBody<'a> {
    /// The text.
    pub message: &'a str,
    /// The author's name.
    pub user: &'a str,
    /// ISO 8601, UTC, milliseconds.
    pub date: &'a str,
    /// The message's id in its channel.
    pub id: u64,
    /// Key of the channel.
    pub channel: &'a str,
    /// The client's nonce.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nonce: Option<&'a str>,
}

/// A stored message.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Message {
    /// Its id in the channel.
    pub id: u64,
    /// The author's name, for those who replay without the author's own.
    pub user: String,
    /// The connection that posted it (see [`NewMessage::sender`]).
    pub sender: String,
    /// The finished event: what clients receive, unchanged.
    pub event: Box<RawValue>,
}

/// Which messages to read. Every page holds at most [`PAGE_LIMIT`] messages, oldest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Range {
    /// Positions counted from the newest message (0), `[start, end)`.
    Latest {
        /// First position.
        start: u64,
        /// The position after the last.
        end: u64,
    },
    /// The `limit` messages before `id`, closest to it.
    Before {
        /// Exclusive bound.
        id: u64,
        /// At most so many.
        limit: u32,
    },
    /// The first `limit` messages after `id`.
    After {
        /// Exclusive bound.
        id: u64,
        /// At most so many.
        limit: u32,
    },
}

/// A page of messages.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Page {
    /// Oldest first.
    pub messages: Vec<Message>,
    /// The highest id that the channel has given out when the page was read; 0 if none.
    pub last: u64,
}

/// What the bus delivers to a subscriber.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum BusEvent {
    /// A message was stored. Within a channel they come in the order of their ids.
    Message {
        /// Key of the channel.
        channel: String,
        /// The message.
        message: Message,
    },
    /// Somebody is typing. Not stored, may be lost.
    Typing {
        /// Key of the channel.
        channel: String,
        /// Who types.
        user: String,
    },
    /// Something changed in who is online.
    Presence(Numbered),
    /// The subscription was interrupted: anything may have been missed on any channel, and
    /// every channel is to be subscribed to again.
    Interrupted,
}

/// Takes what the bus delivers. Must not block; `false` says that the subscriber cannot keep up
/// or has gone, and ends its subscriptions.
pub type BusSink = Arc<dyn Fn(BusEvent) -> bool + Send + Sync>;

/// Why the store did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum StoreError {
    /// The user exists already (with another password hash).
    #[error("it exists already")]
    Exists,
    /// The store cannot be reached or refuses for now; the request may have been carried out
    /// or not, and is safe to repeat.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
}

/// Users, channels, messages, and the bus.
///
/// Every method is idempotent, so that a caller that lost an answer can repeat the call.
#[async_trait]
pub trait Store: Send + Sync {
    /// Creates a user; of two at once one wins. Repeating it with the very same hash succeeds.
    async fn create_user(&self, user: User) -> Result<(), StoreError>;

    /// Looks a user up.
    async fn user(&self, name: &str) -> Result<Option<User>, StoreError>;

    /// Replaces a user's password hash, if it still is `from`.
    async fn replace_hash(&self, name: &str, from: &str, to: &str) -> Result<(), StoreError>;

    /// The public channels: the built-in ones first, then in order of creation.
    async fn channels(&self) -> Result<Vec<Channel>, StoreError>;

    /// Adds a public channel. A key that exists already is left as it is.
    async fn create_channel(&self, channel: Channel) -> Result<(), StoreError>;

    /// Stores a message and publishes it. Returns once it is durable.
    async fn post(&self, message: NewMessage) -> Result<Posted, StoreError>;

    /// Reads a page of messages. A channel nobody has posted to is empty.
    async fn read(&self, channel: &str, range: Range) -> Result<Page, StoreError>;

    /// The id of the last message that was stored before `millis` (Unix time, milliseconds);
    /// 0 if there is none.
    async fn last_before(&self, channel: &str, millis: i64) -> Result<u64, StoreError>;

    /// Starts delivery of a channel's bus events to this store's sink. Returns the channel's
    /// last id at that moment: every later message is delivered.
    async fn subscribe(&self, channel: &str) -> Result<u64, StoreError>;

    /// Ends delivery.
    async fn unsubscribe(&self, channel: &str) -> Result<(), StoreError>;

    /// Tells the channel's subscribers that `user` is typing.
    async fn typing(&self, channel: &str, user: &str) -> Result<(), StoreError>;
}

/// A message that was posted to another server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// The author's name.
    pub user: String,
    /// The text.
    pub message: String,
    /// When it was posted there: Unix time, milliseconds, not in the future. A store gives the
    /// message the date of the one before it instead, if that is later: a channel's dates never
    /// go back.
    pub millis: i64,
}

/// Why a batch was not imported.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// Messages were posted to the channel, so that the ids of the batch are taken or would come
    /// after them.
    #[error("it has messages of its own: the last id is {last}, {imported} messages were imported")]
    Native {
        /// The channel's last id.
        last: u64,
        /// How many messages, from id 1 on, were imported.
        imported: u64,
    },
    /// The batch begins too late.
    #[error("the batch begins at id {first}, but only {imported} messages were imported")]
    Gap {
        /// The batch's first id.
        first: u64,
        /// How many messages, from id 1 on, were imported.
        imported: u64,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A store that takes over the messages of another server.
///
/// Only the stores themselves do, not [`remote`]: no worker imports anything.
#[async_trait]
pub trait Import: Store {
    /// Gives the messages of a batch the ids from `first` on, as a whole or not at all. What was
    /// imported before is left as it is, so that a batch can be repeated. Nothing is published.
    ///
    /// Returns how many messages, from id 1 on, the channel has imported altogether; an empty batch
    /// from 1 on only asks. Everybody else waits meanwhile, so that a batch should not be larger
    /// than some thousand messages and a few megabytes.
    ///
    /// # Errors
    ///
    /// See [`ImportError`]; the channel is as before.
    async fn import(
        &self,
        channel: &str,
        first: u64,
        batch: Vec<Imported>,
    ) -> Result<u64, ImportError>;
}

/// How many messages of a batch were imported before and are to be left out.
///
/// # Errors
///
/// Why the rest must not be appended to a channel that has imported messages up to the id
/// `imported` and has come to the id `last`.
fn already_imported(first: u64, length: u64, imported: u64, last: u64) -> Result<u64, ImportError> {
    if first == 0 || first > imported.saturating_add(1) {
        Err(ImportError::Gap { first, imported })
    } else if first - 1 + length <= imported {
        Ok(length)
    } else if last > imported {
        Err(ImportError::Native { last, imported })
    } else {
        Ok(imported - (first - 1))
    }
}
