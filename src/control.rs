//! The control stream between a worker and the master: its frames, and how they are written.
//!
//! A frame is a 32-bit big-endian length and that many bytes of JSON. The worker speaks first
//! ([`FromWorker::Hello`]); the master answers with [`FromMaster::Welcome`] once it has a state
//! to give. After that both send what they have to, in any order; answers carry the id of what
//! they answer.

use bytes::Bytes;
use futures_util::SinkExt;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWrite;
use tokio_util::codec::{FramedWrite, LengthDelimitedCodec};

use crate::presence::{Numbered, Position, Snapshot, Status};
use crate::store::{BusEvent, Channel, Message, NewMessage, Page, Posted, Range, StoreError, User};

/// Version of the frames; both sides must have the same one.
pub const PROTOCOL: u32 = 2;

/// The largest frame. Only snapshots come near it, and only those of hundreds of thousands of
/// sessions; both ends are Banter's own, so its size is a bound and not a danger.
const MAX_FRAME: usize = 512 * 1024 * 1024;

/// The largest answer of the store: a page of [`crate::store::PAGE_LIMIT`] messages as large as
/// the transport lets them be.
pub const MAX_ANSWER: usize = 256 * 1024 * 1024;

/// A frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// A frame that cannot be written.
    #[error("a control frame cannot be written: {0}")]
    Unwritable(serde_json::Error),
    /// The bytes are not a frame of this protocol.
    #[error("malformed control frame of {length} bytes: {source}")]
    Malformed {
        /// Length of the frame.
        length: usize,
        /// What is wrong.
        source: serde_json::Error,
    },
}

/// The framing of the stream.
pub fn codec() -> LengthDelimitedCodec {
    LengthDelimitedCodec::builder()
        .max_frame_length(MAX_FRAME)
        .new_codec()
}

/// Writes a frame's content.
pub fn encode<T: Serialize>(frame: &T) -> Result<Bytes, FrameError> {
    serde_json::to_vec(frame)
        .map(Bytes::from)
        .map_err(FrameError::Unwritable)
}

/// Reads a frame's content.
pub fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, FrameError> {
    serde_json::from_slice(bytes).map_err(|source| FrameError::Malformed {
        length: bytes.len(),
        source,
    })
}

/// Sends what has been fed to the stream.
///
/// # Errors
/// Those of the stream.
pub async fn flush<W: AsyncWrite + Unpin>(
    writer: &mut FramedWrite<W, LengthDelimitedCodec>,
) -> std::io::Result<()> {
    SinkExt::<Bytes>::flush(writer).await
}

/// What a worker says first.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL`] of the worker.
    pub protocol: u32,
    /// The worker's number.
    pub worker: u32,
    /// Identifies this process among all that ever had the number.
    pub boot: String,
    /// The state as the worker knows it; a master that starts goes on from the newest.
    pub replica: Option<Snapshot>,
    /// The sessions that the worker's living sockets carry: user and generation.
    pub sessions: Vec<(String, u64)>,
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// The client said good-bye.
    Ended,
    /// The connection broke.
    Lost {
        /// See [`crate::presence::Session::confirmed`]; `None` if the worker does not know.
        confirmed: Option<i64>,
    },
}

/// What a worker asks the registry to do. All can be repeated without harm.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Command {
    /// A client authenticated: may it have the name?
    Connect {
        /// The name.
        user: String,
        /// The connection's id.
        connection: String,
        /// Routing key of the client's address.
        address: String,
        /// Hash of the new session's secret.
        secret: String,
        /// Hash of the secret that the client presented, to take its session over.
        claim: Option<String>,
    },
    /// The connection is gone.
    Disconnect {
        /// The name.
        user: String,
        /// Of the session.
        generation: u64,
        /// How.
        ending: Ending,
    },
    /// Join a channel.
    Join {
        /// The name.
        user: String,
        /// Of the session.
        generation: u64,
        /// Key of the channel.
        channel: String,
    },
    /// Leave a channel.
    Leave {
        /// The name.
        user: String,
        /// Of the session.
        generation: u64,
        /// Key of the channel.
        channel: String,
    },
    /// Show a status in a channel.
    SetStatus {
        /// The name.
        user: String,
        /// Of the session.
        generation: u64,
        /// Key of the channel.
        channel: String,
        /// The status.
        status: Status,
    },
}

/// The registry's answer to a [`Command`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The name is the connection's.
    Connected {
        /// Of the session.
        generation: u64,
        /// Whether an earlier session goes on.
        resumed: bool,
        /// The channels of that session: key, and when it was joined (Unix time, milliseconds).
        channels: Vec<(String, i64)>,
        /// Up to when the client has everything: Unix time, milliseconds.
        confirmed: i64,
    },
    /// Somebody is online by that name.
    NameTaken,
    /// Done.
    Done,
    /// The user is in the channel.
    Joined {
        /// Whether they were not before.
        fresh: bool,
    },
    /// The user is not in the channel.
    NotJoined,
    /// The session has more channels than allowed.
    TooManyChannels,
    /// The session is over, or another connection has it.
    Superseded,
}

/// The answer to a join that another worker's socket was put into.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum JoinedElsewhere {
    /// The user's socket is in the room.
    Joined {
        /// The latest messages, oldest first.
        messages: Vec<Message>,
        /// The members.
        online: Vec<(String, Status)>,
    },
    /// The user has no living session: nobody was joined.
    Offline,
    /// The session has more channels than allowed.
    TooManyChannels,
    /// The worker that has the socket did not answer in time.
    Unavailable,
}

/// From a worker to the master.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum FromWorker {
    /// The first frame.
    Hello(Hello),
    /// Something to decide.
    Command {
        /// Of this request, unique on the worker.
        id: u64,
        /// What.
        command: Command,
    },
    /// Put the user's socket, wherever it is, into a channel.
    JoinUser {
        /// Of this request.
        id: u64,
        /// Who.
        user: String,
        /// Key of the channel.
        channel: String,
    },
    /// The answer to [`FromMaster::Attach`].
    Attached {
        /// That frame's id.
        id: u64,
        /// What came of it.
        outcome: JoinedElsewhere,
    },
    /// The replica lacks events.
    CatchUp {
        /// Where it is.
        position: Option<Position>,
    },
    /// The dispatch loop answers a tick.
    Pong {
        /// That tick's number.
        seq: u64,
    },
    /// A request to the embedded store.
    Store {
        /// Of this request.
        id: u64,
        /// What.
        request: StoreRequest,
    },
}

/// From the master to a worker.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum FromMaster {
    /// The answer to the hello: the state.
    Welcome(Snapshot),
    /// The worker's protocol is not the master's.
    Mismatch {
        /// [`PROTOCOL`] of the master.
        protocol: u32,
    },
    /// A change, in order.
    Event(Numbered),
    /// Changes that were missing, in order.
    Events(Vec<Numbered>),
    /// The whole state, for a replica too far behind.
    Snapshot(Snapshot),
    /// Once a second; to be answered with a pong.
    Tick {
        /// Number of the tick.
        seq: u64,
        /// The log's end.
        position: Position,
    },
    /// The answer to a command.
    Reply {
        /// That command's id.
        id: u64,
        /// The answer.
        reply: Reply,
        /// Where the log was after the command: the answer is true for a replica that is there.
        position: Position,
    },
    /// The answer to [`FromWorker::JoinUser`].
    JoinedUser {
        /// That frame's id.
        id: u64,
        /// What came of it.
        outcome: JoinedElsewhere,
    },
    /// Put this user's socket into a room: it has joined the channel.
    Attach {
        /// Of this request.
        id: u64,
        /// Who.
        user: String,
        /// Of the session.
        generation: u64,
        /// Key of the channel.
        channel: String,
        /// Whether the user was not in it before.
        fresh: bool,
        /// Where the log was after the join.
        position: Position,
    },
    /// Find out whether the peer of this user's socket is alive.
    Probe {
        /// Who.
        user: String,
        /// Of the session.
        generation: u64,
    },
    /// The embedded store's answer.
    Store {
        /// That request's id.
        id: u64,
        /// The answer.
        result: Result<StoreResponse, StoreError>,
    },
    /// The embedded store's bus.
    Bus(BusEvent),
}

/// A call of [`crate::store::Store`], over the control stream.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs)] // one variant for each method of the trait, with its parameters
pub enum StoreRequest {
    CreateUser(User),
    User {
        name: String,
    },
    ReplaceHash {
        name: String,
        from: String,
        to: String,
    },
    Channels,
    CreateChannel(Channel),
    Post(NewMessage),
    Read {
        channel: String,
        range: Range,
    },
    LastBefore {
        channel: String,
        millis: i64,
    },
    Subscribe {
        channel: String,
    },
    Unsubscribe {
        channel: String,
    },
    Typing {
        channel: String,
        user: String,
    },
}

/// What a [`StoreRequest`] returned.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs)] // one variant for each type that the trait's methods return
pub enum StoreResponse {
    Done,
    User(Option<User>),
    Channels(Vec<Channel>),
    Posted(Posted),
    Page(Page),
    Id(u64),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_event_passes_through_a_frame_unchanged() {
        let text = r#"{"message":"ä \u00e4 😀","n": 1.0}"#;
        let message = Message {
            id: 7,
            user: "ann".into(),
            sender: "c1".into(),
            event: serde_json::value::RawValue::from_string(text.into()).unwrap(),
        };
        let frame = FromMaster::Bus(BusEvent::Message {
            channel: "x".into(),
            message,
        });
        let bytes = encode(&frame).unwrap();
        match decode::<FromMaster>(&bytes).unwrap() {
            FromMaster::Bus(BusEvent::Message { message, .. }) => {
                assert_eq!(message.event.get(), text);
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_malformed_frame_is_refused_with_its_length() {
        let error = decode::<FromWorker>(b"{\"Pong\":{}}").unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("malformed control frame of 11 bytes"),
            "{error}"
        );
    }
}
