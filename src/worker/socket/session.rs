//! What one client does, in order: a task for each socket, fed by a bounded queue.
//!
//! It asks the registry for the name, gives a client that comes back what it missed, and then
//! handles its events one after the other, so that their order holds.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use socketioxide::extract::AckSender;
use socketioxide::socket::DisconnectReason;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::events::{self, Code, Credentials, Payload, Refusal, nothing};
use super::wire::{Connection, SMALL_EVENT};
use crate::control::{Command, Ending, FromWorker, JoinedElsewhere, Reply};
use crate::limits::{Bucket, Limit};
use crate::presence::Status;
use crate::routing::RoutingKey;
use crate::store::{Message, NewMessage, PAGE_LIMIT, Range};
use crate::worker::App;
use crate::worker::dispatch::{Attach, Attached, Item, Local, Purpose};
use crate::worker::http::channels::{HISTORY, Member};
use crate::worker::http::messages;
use crate::worker::http::token::Caller;
use crate::worker::link::{Away, Link};

/// How long a replay waits for a client that reads nothing at all.
const REPLAY_PATIENCE: Duration = Duration::from_secs(30);

/// How long a replay waits before it looks again whether the socket's buffer has room. The
/// engine tells nobody.
const REPLAY_PAUSE: Duration = Duration::from_millis(10);

/// Bytes of the messages in an answer to a join; the oldest are left out, and `more` says so.
const ANSWER_BYTES: usize = 1024 * 1024;

/// How often a join reads on before it gives up: each time the feed moved on meanwhile.
const ATTEMPTS: usize = 20;

/// Typing notices a second, and at once; more are dropped.
const TYPING: (f64, u32) = (2.0, 5);

/// What a session's queue holds.
pub enum Input {
    /// The client sent an event.
    Event {
        /// Its name.
        name: String,
        /// Its first argument, if that could be read.
        data: Option<Value>,
        /// The way back.
        ack: AckSender,
        /// Its share of the queue's bytes.
        held: OwnedSemaphorePermit,
    },
    /// A join by REST.
    Attach {
        /// Of the master's request.
        id: u64,
        /// Key of the channel.
        channel: String,
        /// Whether the user was not in it before.
        fresh: bool,
    },
    /// The socket is gone.
    Disconnected(DisconnectReason),
}

/// The answer to a join, but for what is added last.
pub struct JoinAnswer {
    history: Vec<Message>,
    /// The most messages that it may hold.
    most: usize,
    /// Whether it holds what the client missed, rather than the latest.
    missed: bool,
    more: bool,
    reset: bool,
    fresh: bool,
    to: AnswerTo,
}

/// Who gets it.
enum AnswerTo {
    Client(AckSender),
    /// The master, for a worker that was asked by REST.
    Master {
        id: u64,
        link: Link,
    },
}

/// The answer to `channel:join`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Joined {
    messages: Vec<String>,
    online_users: Vec<Member>,
    last: u64,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    more: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    reset: bool,
}

impl JoinAnswer {
    /// Whether the user was not in the channel before.
    pub fn fresh(&self) -> bool {
        self.fresh
    }

    /// Sends it, with the messages that the feed had beyond the history.
    pub fn send(
        self,
        wire: &Connection,
        missed: &[Arc<Message>],
        last: u64,
        online: Vec<(String, Status)>,
    ) {
        let mut messages = self.history;
        messages.extend(missed.iter().map(|message| Message::clone(message)));
        let kept = messages
            .iter()
            .rev()
            .scan(0, |bytes, message| {
                *bytes += message.event.get().len();
                Some(*bytes)
            })
            .take(self.most)
            .enumerate()
            .take_while(|(n, bytes)| *n == 0 || *bytes <= ANSWER_BYTES)
            .count();
        let surplus = messages.len() - kept;
        messages.drain(..surplus);
        match self.to {
            AnswerTo::Client(ack) => {
                let answer = Joined {
                    messages: messages::as_strings(&messages),
                    online_users: Member::list(online),
                    last,
                    more: self.more || (self.missed && surplus > 0),
                    reset: self.reset,
                };
                let members = answer.online_users.len() as u64 * SMALL_EVENT;
                let texts: usize = answer.messages.iter().map(String::len).sum();
                wire.acknowledge(ack, &answer, members + texts as u64);
            }
            AnswerTo::Master { id, link } => {
                let outcome = JoinedElsewhere::Joined { messages, online };
                link.tell(FromWorker::Attached { id, outcome });
            }
        }
    }

    /// Answers that nobody was put anywhere.
    pub fn refuse(self, wire: &Connection, refusal: &Refusal) {
        self.to.refuse(wire, refusal);
    }
}

impl AnswerTo {
    fn refuse(self, wire: &Connection, refusal: &Refusal) {
        match self {
            Self::Client(ack) => wire.acknowledge(ack, refusal, SMALL_EVENT),
            Self::Master { id, link } => {
                let outcome = match refusal.code {
                    // The user left at the same moment: nobody is joined.
                    Code::NotJoined => JoinedElsewhere::Offline,
                    _ => JoinedElsewhere::Unavailable,
                };
                link.tell(FromWorker::Attached { id, outcome });
            }
        }
    }
}

/// A client's session on this worker.
pub struct Session {
    app: Arc<App>,
    user: String,
    connection: Arc<str>,
    wire: Arc<Connection>,
    credentials: Credentials,
    /// Its queue, also for the dispatch loop.
    inputs: (mpsc::Sender<Input>, mpsc::Receiver<Input>),
    generation: u64,
    /// Up to when the client has everything, as far as was known when it connected: Unix time,
    /// milliseconds.
    confirmed: i64,
    /// Whether a client that came back has been given everything that it missed.
    caught_up: bool,
    /// What the next two go by.
    post_rate: u32,
    posts: Bucket,
    /// Everything else that the registry or the store has work with.
    requests: Bucket,
    typing: Bucket,
}

/// How the part before the first event went.
enum Entrance {
    Admitted {
        resumed: bool,
        channels: Vec<(String, i64)>,
        secret: String,
    },
    /// The name is taken.
    Refused,
    /// The master did not answer.
    Failed,
}

impl Session {
    /// A session for an authenticated socket.
    pub fn new(
        app: Arc<App>,
        caller: Caller,
        wire: Arc<Connection>,
        credentials: Credentials,
        inputs: (mpsc::Sender<Input>, mpsc::Receiver<Input>),
    ) -> Self {
        let post_rate = app.limits().post_rate;
        let limit = post_limit(post_rate);
        let connection = app.next_connection();
        Self {
            app,
            user: caller.name,
            connection,
            wire,
            credentials,
            inputs,
            generation: 0,
            confirmed: 0,
            caught_up: false,
            post_rate,
            posts: Bucket::new(limit),
            requests: Bucket::new(limit),
            typing: Bucket::new(Limit::new(TYPING.0, TYPING.1)),
        }
    }

    /// Runs until the socket is gone.
    pub async fn run(mut self) {
        let local = Local {
            connection: self.connection.clone(),
            user: self.user.as_str().into(),
            wire: self.wire.clone(),
            session: self.inputs.0.clone(),
            spare_own: self.credentials.resume.is_none(),
        };
        if self.app.dispatch.send(Item::Arrived(local)).await.is_none() {
            return;
        }
        match self.enter().await {
            Entrance::Admitted {
                resumed,
                channels,
                secret,
            } => {
                match self.welcome(resumed, channels, secret).await {
                    Ok(()) => self.caught_up = true,
                    // It comes back and finds its session waiting.
                    Err(_) => self.wire.kill(),
                }
            }
            Entrance::Refused => {
                tracing::info!(event = "name_taken", user = self.user, client = %self.wire.client(), "{} is connected already", self.user);
                self.wire.emit("name_taken", &nothing());
                self.wire.dismiss();
            }
            Entrance::Failed => self.wire.kill(),
        }
        let reason = self.handle_inputs().await;
        self.inputs.1.close();
        while let Ok(input) = self.inputs.1.try_recv() {
            if let Input::Attach { id, .. } = input {
                let link = self.app.link.clone();
                AnswerTo::Master { id, link }.refuse(&self.wire, &Refusal::unavailable());
            }
        }
        let departed = Item::Departed {
            connection: self.connection.clone(),
            generation: self.generation,
        };
        self.app.dispatch.send(departed).await;
        if self.generation > 0 {
            self.leave(reason).await;
        }
    }

    /// Asks for the name.
    async fn enter(&mut self) -> Entrance {
        let secret = BASE64_URL_SAFE_NO_PAD.encode(rand::random::<[u8; 24]>());
        let command = Command::Connect {
            user: self.user.clone(),
            connection: self.connection.to_string(),
            address: RoutingKey::of(self.wire.client()).to_string(),
            secret: digest(&secret),
            claim: self.credentials.session.as_deref().map(digest),
        };
        match self.app.link.command(command).await {
            Ok(Reply::Connected {
                generation,
                resumed,
                channels,
                confirmed,
            }) => {
                self.generation = generation;
                self.confirmed = confirmed;
                Entrance::Admitted {
                    resumed,
                    channels,
                    secret,
                }
            }
            Ok(Reply::NameTaken) => Entrance::Refused,
            Ok(_) | Err(Away) => Entrance::Failed,
        }
    }

    /// Says `logged_in`, and gives a client that comes back what it missed, before anything new.
    async fn welcome(
        &self,
        resumed: bool,
        channels: Vec<(String, i64)>,
        secret: String,
    ) -> Result<(), Refusal> {
        let named = |channel: &str| {
            let ids = self.credentials.resume.as_ref()?;
            ids.iter()
                .find(|(key, _)| key == channel)
                .map(|(_, id)| *id)
        };
        let mut last = HashMap::new();
        for (channel, _) in &channels {
            let mut tip = self.app.dispatch.open(channel).await?;
            if named(channel).is_some_and(|id| id > tip) {
                // The client may know from another worker what this one has yet to hear.
                let newest = Range::Latest { start: 0, end: 1 };
                tip = tip.max(self.app.store.read(channel, newest).await?.last);
            }
            last.insert(channel.as_str(), tip);
        }
        let listed: Vec<Value> = channels
            .iter()
            .map(|(key, _)| json!({ "key": key, "last": last.get(key.as_str()) }))
            .collect();
        let hello = json!({ "session": secret, "resumed": resumed, "channels": listed });
        self.wire.emit("logged_in", &hello);
        tracing::info!(
            event = "logged_in",
            user = self.user,
            client = %self.wire.client(),
            resumed, "{} is connected", self.user);
        let mut places = Vec::with_capacity(channels.len());
        for (channel, since) in &channels {
            let id = match named(channel) {
                // An id that the channel never gave out names nothing: only what is new follows.
                Some(id) => id.min(last.get(channel.as_str()).copied().unwrap_or(id)),
                None => {
                    let known = self.confirmed.max(*since);
                    self.app.store.last_before(channel, known).await?
                }
            };
            places.push((channel.clone(), id));
        }
        self.resume(places).await
    }

    /// Emits what came after these places, and puts the socket into the rooms. As a rule the
    /// feeds have all of it; what they have not is read from the store.
    async fn resume(&self, mut places: Vec<(String, u64)>) -> Result<(), Refusal> {
        loop {
            match self.attach(places, Purpose::Resume).await {
                Some(Attached::Again(reached, _)) => places = reached,
                _ => return Ok(()),
            }
            for (channel, id) in &mut places {
                // It may have been interrupted since.
                self.app.dispatch.open(channel).await?;
                loop {
                    let range = Range::After {
                        id: *id,
                        limit: PAGE_LIMIT,
                    };
                    let page = self.app.store.read(channel, range).await?;
                    let complete = page.messages.len() < PAGE_LIMIT as usize;
                    for message in &page.messages {
                        self.replay(message).await?;
                        *id = message.id;
                    }
                    if complete {
                        *id = (*id).max(page.last);
                        break;
                    }
                }
            }
        }
    }

    /// Emits one missed message, as soon as the socket has room for it.
    async fn replay(&self, message: &Message) -> Result<(), Refusal> {
        if self.credentials.resume.is_none() && message.user == self.user {
            return Ok(());
        }
        let deadline = Instant::now() + REPLAY_PATIENCE;
        while !self.wire.try_emit("message:post", &*message.event) {
            if Instant::now() > deadline {
                return Err(Refusal::unavailable());
            }
            tokio::time::sleep(REPLAY_PAUSE).await;
        }
        Ok(())
    }

    async fn attach(&self, channels: Vec<(String, u64)>, purpose: Purpose) -> Option<Attached> {
        let (outcome, answer) = oneshot::channel();
        let connection = self.connection.clone();
        let attach = Attach {
            connection,
            channels,
            purpose,
            outcome,
        };
        self.app.dispatch.send(Item::Attach(attach)).await?;
        answer.await.ok()
    }

    /// Handles what comes, until the socket is gone.
    async fn handle_inputs(&mut self) -> DisconnectReason {
        while let Some(input) = self.inputs.1.recv().await {
            match input {
                Input::Disconnected(reason) => return reason,
                // Without a session there is nothing that it may do.
                Input::Event { ack, .. } if self.generation == 0 || self.wire.is_superseded() => {
                    self.answer(ack, Err(Refusal::superseded()));
                }
                Input::Event {
                    name,
                    data,
                    ack,
                    held,
                } => {
                    self.event(&name, data, ack).await;
                    drop(held);
                }
                Input::Attach { id, channel, fresh } => {
                    let to = AnswerTo::Master {
                        id,
                        link: self.app.link.clone(),
                    };
                    self.put_into_room(channel, None, fresh, to).await;
                }
            }
        }
        DisconnectReason::TransportError
    }

    async fn event(&mut self, name: &str, data: Option<Value>, ack: AckSender) {
        self.follow_limits();
        let answer = match name {
            "message:post" => self.post(data).await,
            "user : left" => self.leave_channel(data).await,
            "user : status_changed" => self.change_status(data).await,
            "channel:typing" => self.type_in(data).await,
            "channel:join" => return self.join(data, ack).await,
            _ => Err(events::unknown(name)),
        };
        self.answer(ack, answer);
    }

    fn too_fast(&self, after: Duration) -> Refusal {
        crate::limit_hit!("BANTER_POST_RATE", user = self.user);
        Refusal::rate_limited(after)
    }

    /// Goes by the limits that count now.
    fn follow_limits(&mut self) {
        let post_rate = self.app.limits().post_rate;
        if post_rate != self.post_rate {
            self.post_rate = post_rate;
            let (limit, now) = (post_limit(post_rate), Instant::now());
            self.posts.set_limit(limit, now);
            self.requests.set_limit(limit, now);
        }
    }

    fn answer(&self, ack: AckSender, answer: Result<Value, Refusal>) {
        match answer {
            Ok(answer) => self.wire.acknowledge(ack, &answer, SMALL_EVENT),
            Err(refusal) => self.wire.acknowledge(ack, &refusal, SMALL_EVENT),
        }
    }

    async fn post(&mut self, data: Option<Value>) -> Result<Value, Refusal> {
        let post = Payload::new(data)?.post(self.app.limits().max_message)?;
        self.must_be_in(&post.channel)?;
        let taken = self.posts.try_take(Instant::now());
        taken.map_err(|after| self.too_fast(after))?;
        let client_nonce = post.nonce.is_some();
        let nonce = post.nonce.unwrap_or_else(|| self.app.next_nonce());
        let message = NewMessage {
            channel: post.channel,
            user: self.user.clone(),
            message: post.message,
            nonce,
            client_nonce,
            sender: self.connection.to_string(),
        };
        let posted = self.app.store.post(message).await?;
        Ok(json!({ "id": posted.id, "date": posted.date }))
    }

    async fn leave_channel(&mut self, data: Option<Value>) -> Result<Value, Refusal> {
        let channel = Payload::new(data)?.channel()?;
        self.must_be_in(&channel)?;
        let (user, generation) = (self.user.clone(), self.generation);
        let leave = Command::Leave {
            user,
            generation,
            channel,
        };
        match self.request(leave).await {
            // The same command, sent again because its answer was lost: it is done.
            Err(refusal) if refusal.code == Code::NotJoined => Ok(nothing()),
            answer => answer.map(|_| nothing()),
        }
    }

    async fn change_status(&mut self, data: Option<Value>) -> Result<Value, Refusal> {
        let mut payload = Payload::new(data)?;
        let channel = payload.channel()?;
        let status = payload.status()?;
        self.must_be_in(&channel)?;
        let (user, generation) = (self.user.clone(), self.generation);
        self.request(Command::SetStatus {
            user,
            generation,
            channel,
            status,
        })
        .await?;
        Ok(nothing())
    }

    async fn type_in(&mut self, data: Option<Value>) -> Result<Value, Refusal> {
        let channel = Payload::new(data)?.channel()?;
        self.must_be_in(&channel)?;
        if self.typing.try_take(Instant::now()).is_ok() {
            self.app.store.typing(&channel, &self.user).await?;
        }
        Ok(nothing())
    }

    async fn join(&mut self, data: Option<Value>, ack: AckSender) {
        let joining = async {
            let mut payload = Payload::new(data)?;
            let channel = payload.channel()?;
            let after = payload.after()?;
            let (user, generation) = (self.user.clone(), self.generation);
            let command = Command::Join {
                user,
                generation,
                channel: channel.clone(),
            };
            let fresh = matches!(self.request(command).await?, Reply::Joined { fresh: true });
            Ok((channel, after, fresh))
        };
        match joining.await {
            Ok((channel, after, fresh)) => {
                self.put_into_room(channel, after, fresh, AnswerTo::Client(ack))
                    .await;
            }
            Err(refusal) => self.answer(ack, Err(refusal)),
        }
    }

    fn must_be_in(&self, channel: &str) -> Result<(), Refusal> {
        let is_in = self.app.dispatch.with_state(|state| {
            state.session(&self.user).is_some_and(|session| {
                session.owner.generation == self.generation
                    && session.channels.contains_key(channel)
            })
        });
        match is_in {
            Some(true) => Ok(()),
            _ => Err(Refusal::not_joined()),
        }
    }

    /// Has the registry decide something.
    async fn request(&mut self, command: Command) -> Result<Reply, Refusal> {
        let taken = self.requests.try_take(Instant::now());
        taken.map_err(|after| self.too_fast(after))?;
        match self.app.link.command(command).await? {
            Reply::NotJoined => Err(Refusal::not_joined()),
            Reply::TooManyChannels => Err(Refusal::too_many_channels()),
            Reply::Superseded => Err(Refusal::superseded()),
            reply => Ok(reply),
        }
    }

    /// Reads a channel's history and puts the socket into its room right behind it.
    async fn put_into_room(&self, channel: String, after: Option<u64>, fresh: bool, to: AnswerTo) {
        let mut to = to;
        for _ in 0..ATTEMPTS {
            let (history, last, more, reset) = match self.history(&channel, after).await {
                Ok(read) => read,
                Err(refusal) => return to.refuse(&self.wire, &refusal),
            };
            let missed = after.is_some() && !reset;
            let most = if missed {
                u64::from(PAGE_LIMIT)
            } else {
                HISTORY
            };
            let answer = Box::new(JoinAnswer {
                history,
                most: usize::try_from(most).unwrap_or(usize::MAX),
                missed,
                more,
                reset,
                fresh,
                to,
            });
            let place = vec![(channel.clone(), last)];
            match self.attach(place, Purpose::Join(answer)).await {
                Some(Attached::Again(_, Purpose::Join(answer))) => to = answer.to,
                // Answered, or the worker stops.
                _ => return,
            }
        }
        to.refuse(&self.wire, &Refusal::unavailable());
    }

    /// The history that a join shows, the channel's last id then, whether more was missed, and
    /// whether the id named lies beyond the last.
    async fn history(
        &self,
        channel: &str,
        after: Option<u64>,
    ) -> Result<(Vec<Message>, u64, bool, bool), Refusal> {
        // First the subscription, then the history: nothing falls between them.
        self.app.dispatch.open(channel).await?;
        let latest = |end| Range::Latest { start: 0, end };
        let most = u64::from(PAGE_LIMIT);
        let wanted = if after.is_some() { most } else { HISTORY };
        let page = self.app.store.read(channel, latest(wanted)).await?;
        match after {
            Some(id) if id > page.last => {
                let page = self.app.store.read(channel, latest(HISTORY)).await?;
                Ok((page.messages, page.last, false, true))
            }
            Some(id) => {
                let oldest = page.messages.first().map_or(0, |message| message.id);
                let full = page.messages.len() >= PAGE_LIMIT as usize;
                // Ids between the two need not exist.
                let more = full && oldest > id + 1 && {
                    let next = Range::After { id, limit: 1 };
                    let next = self.app.store.read(channel, next).await?;
                    next.messages.first().is_some_and(|next| next.id < oldest)
                };
                let missed = page.messages.into_iter().filter(|m| m.id > id).collect();
                Ok((missed, page.last, more, false))
            }
            None => Ok((page.messages, page.last, false, false)),
        }
    }

    /// Tells the registry that the connection is gone.
    async fn leave(&self, reason: DisconnectReason) {
        let ending = self.ending(&reason);
        tracing::info!(
            event = "disconnected",
            user = self.user,
            client = %self.wire.client(),
            ?reason,
            lost = ending != Ending::Ended, "{} is disconnected", self.user);
        let (user, generation) = (self.user.clone(), self.generation);
        let command = Command::Disconnect {
            user,
            generation,
            ending,
        };
        // It fails only when the worker stops, and then the master sees that.
        let _ = self.app.link.insist(command).await;
    }

    fn ending(&self, reason: &DisconnectReason) -> Ending {
        let patience = self.app.silence();
        let chosen = match reason {
            DisconnectReason::ClientNSDisconnect => true,
            DisconnectReason::TransportClose => self.wire.closed_by_choice(patience),
            _ => false,
        };
        if chosen && !self.wire.is_superseded() {
            return Ending::Ended;
        }
        // One that was still being given what it missed has received none of that for certain.
        let confirmed = if self.caught_up {
            self.wire.confirmed().unwrap_or_else(|| {
                // No heartbeat was seen, but it lives: two rounds of them prove receipt.
                let rounds = patience.as_millis().saturating_mul(2);
                let now = jiff::Timestamp::now().as_millisecond();
                now.saturating_sub(i64::try_from(rounds).unwrap_or(i64::MAX))
            })
        } else {
            self.confirmed
        };
        Ending::Lost {
            confirmed: Some(confirmed.max(self.confirmed)),
        }
    }
}

fn post_limit(per_second: u32) -> Limit {
    Limit::new(f64::from(per_second), per_second.saturating_mul(3))
}

/// Secrets of sessions travel and are kept as digests only.
fn digest(secret: &str) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(Sha256::digest(secret.as_bytes()))
}
