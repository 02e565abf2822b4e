//! The one loop through which everything that a worker's sockets hear passes, in order.
//!
//! It owns the replica of the registry's state, the worker's sockets and the channels' feeds.
//! It never waits: what takes time is done beside it and comes back as another [`Item`].

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use serde_json::json;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::feed::{Feed, Step};
use super::link::{Identity, Link};
use super::socket::events::Refusal;
use super::socket::session::{self, JoinAnswer};
use super::socket::wire::{self, Connection};
use crate::control::{Command, Ending, FromMaster, FromWorker, JoinedElsewhere};
use crate::presence::{Event, Notice, Numbered, Position, Received, Replica, Snapshot, Status};
use crate::store::{BusEvent, BusSink, Message, PAGE_LIMIT, Page, Range, Store, StoreError};

/// Items waiting for the loop.
const QUEUE: usize = 8192;

/// How long a channel without members here stays subscribed: people come back.
const LINGER: Duration = Duration::from_secs(30);

/// What the link tells a master that the worker greets.
#[derive(Debug)]
pub struct Known {
    /// The worker's copy of the state.
    pub replica: Option<Snapshot>,
    /// The sessions of its living sockets.
    pub sessions: Vec<(String, u64)>,
}

/// A socket that has a name, or asks for one.
pub struct Local {
    /// Its id.
    pub connection: Arc<str>,
    /// The name.
    pub user: Arc<str>,
    /// The way out.
    pub wire: Arc<Connection>,
    /// Its session's queue.
    pub session: mpsc::Sender<session::Input>,
    /// The client names no ids when it comes back, and is spared its own messages.
    pub spare_own: bool,
}

impl Local {
    /// Whether a message is one that the socket is not to hear, since it said it itself.
    fn is_own(&self, message: &Message) -> bool {
        *message.sender == *self.connection || (self.spare_own && *message.user == *self.user)
    }
}

/// Puts a socket into rooms, at an exact place in each one's messages.
pub struct Attach {
    /// The socket.
    pub connection: Arc<str>,
    /// The channels: key, and the last id that the socket (or its answer) already has.
    pub channels: Vec<(String, u64)>,
    /// What else is to happen.
    pub purpose: Purpose,
    /// Told what came of it.
    pub outcome: oneshot::Sender<Attached>,
}

/// Why a socket is put into rooms.
pub enum Purpose {
    /// It joined one channel, and gets an answer with the history.
    Join(Box<JoinAnswer>),
    /// It came back, and gets what it missed as events.
    Resume,
}

/// What came of an [`Attach`].
pub enum Attached {
    /// Done.
    Done,
    /// The feeds no longer hold everything after these ids, or the socket's buffer is full: read
    /// on from the store, and ask again.
    Again(Vec<(String, u64)>, Purpose),
    /// Not any more: the socket is gone, or is a member no longer.
    Gone,
}

/// What the loop deals with.
pub enum Item {
    /// A frame from the master.
    Master(FromMaster),
    /// The master's answer to a command; to be delivered once the replica is where the log was
    /// then.
    Replied {
        /// The log's end.
        position: Position,
        /// Delivers it.
        deliver: Box<dyn FnOnce() + Send>,
    },
    /// From the bus.
    Bus(BusEvent),
    /// What does the worker know?
    Known(oneshot::Sender<Known>),
    /// Which sockets are there?
    Sockets(oneshot::Sender<Vec<Arc<Connection>>>),
    /// A socket asks for its name.
    Arrived(Local),
    /// A socket is gone.
    Departed {
        /// The socket.
        connection: Arc<str>,
        /// Of the session that it knew that it had; 0 if it knew of none.
        generation: u64,
    },
    /// Subscribe to a channel. The answer is its last id.
    Open {
        /// Key of the channel.
        channel: String,
        /// The answer.
        reply: oneshot::Sender<Result<u64, StoreError>>,
    },
    /// Put a socket into rooms.
    Attach(Attach),
    /// A subscription began, or could not.
    Subscribed {
        /// Key of the channel.
        channel: String,
        /// Its last id.
        result: Result<u64, StoreError>,
    },
    /// A subscription ended.
    Unsubscribed {
        /// Key of the channel.
        channel: String,
    },
    /// A feed's gap was read.
    Mended {
        /// Key of the channel.
        channel: String,
        /// What was missing.
        result: Result<Page, StoreError>,
    },
}

/// The way to the loop.
#[derive(Clone)]
pub struct Dispatch {
    items: mpsc::Sender<Item>,
    replica: Arc<RwLock<Replica>>,
}

impl Dispatch {
    /// Queues an item; `None` if the loop has stopped.
    pub async fn send(&self, item: Item) -> Option<()> {
        self.items.send(item).await.ok()
    }

    /// A sink for a bus, which must not wait: what the loop has no room for is dropped, and made
    /// good as an interruption of the bus once there is room.
    pub fn sink(&self) -> BusSink {
        let items = self.items.clone();
        let behind = Arc::new(AtomicBool::new(false));
        Arc::new(move |event| {
            if items.try_send(Item::Bus(event)).is_err() && !behind.swap(true, Ordering::AcqRel) {
                let (items, behind) = (items.clone(), behind.clone());
                tokio::spawn(async move {
                    if let Ok(room) = items.reserve().await {
                        // From here on a drop is another interruption.
                        behind.store(false, Ordering::Release);
                        room.send(Item::Bus(BusEvent::Interrupted));
                    }
                });
            }
            true
        })
    }

    /// What the worker knows, once everything queued before has been applied.
    pub async fn known(&self) -> Option<Known> {
        let (reply, answer) = oneshot::channel();
        self.send(Item::Known(reply)).await?;
        answer.await.ok()
    }

    /// The sockets that have a name or ask for one; none once the loop has stopped.
    pub async fn sockets(&self) -> Vec<Arc<Connection>> {
        let (reply, answer) = oneshot::channel();
        if self.send(Item::Sockets(reply)).await.is_none() {
            return Vec::new();
        }
        answer.await.unwrap_or_default()
    }

    /// Subscribes to a channel, if the worker is not yet, and returns its last id.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn open(&self, channel: &str) -> Result<u64, StoreError> {
        let (reply, answer) = oneshot::channel();
        let item = Item::Open {
            channel: channel.to_owned(),
            reply,
        };
        let stopped = || StoreError::Unavailable("the worker stops".to_owned());
        self.send(item).await.ok_or_else(stopped)?;
        answer.await.map_err(|_| stopped())?
    }

    /// Looks at the state. `None` before the first snapshot.
    pub fn with_state<T>(&self, look: impl FnOnce(&crate::presence::State) -> T) -> Option<T> {
        self.replica.read().state().map(look)
    }

    /// A channel's members, as clients see them.
    pub fn online(&self, channel: &str) -> Vec<(String, Status)> {
        self.with_state(|state| {
            state
                .members(channel)
                .map(|(user, status)| (user.to_owned(), status))
                .collect()
        })
        .unwrap_or_default()
    }
}

/// Makes the way to the loop; what is sent waits for [`Loop::run`].
pub fn new() -> (Dispatch, mpsc::Receiver<Item>) {
    let (items, items_rx) = mpsc::channel(QUEUE);
    let replica = Arc::new(RwLock::new(Replica::default()));
    (Dispatch { items, replica }, items_rx)
}

/// How a room stands with the bus.
#[derive(Debug, PartialEq, Eq)]
enum Subscription {
    /// Nothing yet, or the last attempt failed.
    Absent,
    /// Asked for.
    Pending,
    /// It delivers.
    Active,
    /// Being ended.
    Ending,
}

/// A channel with members on this worker, now or a little while ago.
struct Room {
    feed: Feed,
    subscription: Subscription,
    /// The sockets in it, each with the last id that it had when it came in: what the bus
    /// delivers late of those is not for them.
    members: HashMap<Arc<str>, u64>,
    /// Waiting for the subscription.
    opening: Vec<oneshot::Sender<Result<u64, StoreError>>>,
    /// Since when it has no members.
    idle_since: Instant,
}

impl Room {
    fn new() -> Self {
        Self {
            feed: Feed::default(),
            subscription: Subscription::Absent,
            members: HashMap::new(),
            opening: Vec::new(),
            idle_since: Instant::now(),
        }
    }
}

/// A socket as the loop sees it.
struct Seat {
    local: Local,
    /// Of its session, once it has one.
    generation: Option<u64>,
    /// The rooms that it is in.
    rooms: HashSet<String>,
}

/// The loop.
pub struct Loop {
    dispatch: Dispatch,
    identity: Identity,
    link: Link,
    store: Arc<dyn Store>,
    seats: HashMap<Arc<str>, Seat>,
    /// Which socket has a name.
    users: HashMap<Arc<str>, Arc<str>>,
    rooms: HashMap<String, Room>,
    /// Whether the master has been asked for missing events.
    catching_up: bool,
    /// Waiting for the replica to reach a position.
    parked: Vec<(Position, Item)>,
    ready: bool,
}

impl Loop {
    /// A loop without sockets.
    pub fn new(dispatch: Dispatch, identity: Identity, link: Link, store: Arc<dyn Store>) -> Self {
        Self {
            dispatch,
            identity,
            link,
            store,
            seats: HashMap::new(),
            users: HashMap::new(),
            rooms: HashMap::new(),
            catching_up: false,
            parked: Vec::new(),
            ready: false,
        }
    }

    /// Runs until stopped. `ready` is cancelled once the first snapshot has been applied. `sign_of_life`
    /// is called each second.
    pub async fn run(
        mut self,
        mut items: mpsc::Receiver<Item>,
        ready: CancellationToken,
        sign_of_life: impl Fn(),
        stop: CancellationToken,
    ) {
        let mut sweep = tokio::time::interval(Duration::from_secs(1));
        sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                item = items.recv() => match item {
                    Some(item) => self.handle(item),
                    None => return,
                },
                _ = sweep.tick() => {
                    self.sweep();
                    sign_of_life();
                }
            }
            if self.ready && !ready.is_cancelled() {
                ready.cancel();
            }
        }
    }

    fn handle(&mut self, item: Item) {
        match item {
            Item::Master(frame) => self.master(frame),
            Item::Replied { position, deliver } => {
                if self.is_behind(position) {
                    self.park(position, Item::Replied { position, deliver });
                } else {
                    deliver();
                }
            }
            Item::Bus(event) => self.bus(event),
            Item::Known(reply) => {
                let replica = self.dispatch.replica.read().snapshot().cloned();
                let sessions = self
                    .seats
                    .values()
                    .filter_map(|seat| Some((seat.local.user.to_string(), seat.generation?)))
                    .collect();
                // The link may have stopped.
                let _ = reply.send(Known { replica, sessions });
            }
            Item::Sockets(reply) => {
                let sockets = self.seats.values().map(|seat| seat.local.wire.clone());
                // Whoever asked may have given up.
                let _ = reply.send(sockets.collect());
            }
            Item::Arrived(local) => {
                let seat = Seat {
                    local,
                    generation: None,
                    rooms: HashSet::new(),
                };
                self.seats.insert(seat.local.connection.clone(), seat);
            }
            Item::Departed {
                connection,
                generation: known,
            } => {
                let seat = self.seats.get(&connection);
                let session =
                    seat.and_then(|seat| Some((seat.local.user.clone(), seat.generation?)));
                self.departed(&connection);
                if let Some((user, generation)) = session
                    && generation != known
                {
                    self.disown(user.to_string(), generation);
                }
            }
            Item::Open { channel, reply } => self.open(channel, reply),
            Item::Attach(attach) => self.attach(attach),
            Item::Subscribed { channel, result } => self.subscribed(&channel, result),
            Item::Unsubscribed { channel } => self.unsubscribed(channel),
            Item::Mended { channel, result } => {
                let Some(room) = self.rooms.get_mut(&channel) else {
                    return;
                };
                match result {
                    Ok(page) => {
                        let step = room.feed.mend(page);
                        self.step(&channel, step);
                    }
                    Err(error) => {
                        tracing::warn!("missing messages of a channel cannot be read yet: {error}");
                        room.feed.failed();
                    }
                }
            }
        }
    }

    // ---- the registry's events

    fn master(&mut self, frame: FromMaster) {
        match frame {
            FromMaster::Welcome(snapshot) | FromMaster::Snapshot(snapshot) => {
                self.snapshot(snapshot);
            }
            FromMaster::Event(numbered) => self.event(&numbered),
            FromMaster::Events(events) => {
                self.catching_up = false;
                for numbered in &events {
                    self.event(numbered);
                }
            }
            FromMaster::Tick { seq, position } => {
                self.link.tell(FromWorker::Pong { seq });
                if self.is_behind(position) {
                    // Asked again each second, should the answer be lost.
                    self.catching_up = false;
                    self.catch_up();
                }
            }
            FromMaster::Attach { position, .. } if self.is_behind(position) => {
                self.park(position, Item::Master(frame));
            }
            FromMaster::Attach {
                id,
                user,
                generation,
                channel,
                fresh,
                ..
            } => self.attach_elsewhere(id, &user, generation, channel, fresh),
            FromMaster::Probe { user, generation } => {
                if let Some(seat) = self.seat_of(&user, generation) {
                    seat.local.wire.probe();
                }
            }
            FromMaster::Mismatch { .. }
            | FromMaster::Reply { .. }
            | FromMaster::JoinedUser { .. }
            | FromMaster::Store { .. }
            | FromMaster::Bus(_) => tracing::error!("the link passed on a frame of its own"),
        }
    }

    fn event(&mut self, numbered: &Numbered) {
        let received = self.dispatch.replica.write().receive(numbered);
        match received {
            Received::Stale => {}
            Received::Gap => self.catch_up(),
            Received::Applied(notices) => {
                self.follow(&numbered.event);
                self.announce(notices);
                self.unpark();
            }
        }
    }

    fn is_behind(&self, position: Position) -> bool {
        self.dispatch.replica.read().is_behind(position)
    }

    /// Keeps an item until the replica has reached a position. What is missing is on its way, or
    /// is lost; so it is asked for.
    fn park(&mut self, position: Position, item: Item) {
        self.parked.push((position, item));
        self.catch_up();
    }

    /// Handles what waited for a position that the replica has reached.
    fn unpark(&mut self) {
        if self.parked.is_empty() {
            return;
        }
        let parked = std::mem::take(&mut self.parked);
        for (position, item) in parked {
            if self.is_behind(position) {
                self.parked.push((position, item));
            } else {
                self.handle(item);
            }
        }
    }

    fn catch_up(&mut self) {
        if !self.catching_up {
            self.catching_up = true;
            let position = self.dispatch.replica.read().position();
            self.link.tell(FromWorker::CatchUp { position });
        }
    }

    fn snapshot(&mut self, snapshot: Snapshot) {
        self.catching_up = false;
        let notices = self.dispatch.replica.write().reset(snapshot);
        self.ready = true;
        self.announce(notices);
        let stale = self.reconcile();
        for connection in stale {
            self.evict(&connection, "its session ended while the master was away");
        }
        self.unpark();
    }

    /// Gives sockets the sessions that they have by the state, of which the events were not seen,
    /// and returns those that have none any more.
    fn reconcile(&mut self) -> Vec<Arc<str>> {
        let replica = self.dispatch.replica.read();
        let Some(state) = replica.state() else {
            return Vec::new();
        };
        let mut stale = Vec::new();
        for (connection, seat) in &mut self.seats {
            let owner = state
                .session(&seat.local.user)
                .map(|session| &session.owner);
            match owner {
                Some(owner) if *owner.connection == **connection => {
                    seat.generation = Some(owner.generation);
                    self.users
                        .insert(seat.local.user.clone(), connection.clone());
                }
                // One without a session may be waiting for it.
                _ if seat.generation.is_some() => stale.push(connection.clone()),
                _ => {}
            }
        }
        stale
    }

    /// Keeps the sockets in step with an event that has just been applied.
    fn follow(&mut self, event: &Event) {
        match event {
            Event::Connected { user, owner, .. } | Event::Resumed { user, owner } => {
                let old = self.users.get(user.as_str()).cloned();
                if let Some(old) = old.filter(|old| **old != *owner.connection) {
                    self.evict(&old, "another connection has its session");
                }
                if let Some(seat) = self.seats.get_mut(owner.connection.as_str()) {
                    seat.generation = Some(owner.generation);
                    self.users
                        .insert(user.as_str().into(), seat.local.connection.clone());
                } else if owner.boot == self.identity.boot {
                    self.disown(user.clone(), owner.generation);
                }
            }
            Event::Ended { user } => {
                if let Some(connection) = self.users.get(user.as_str()).cloned() {
                    self.evict(&connection, "its session is over");
                }
            }
            Event::Lost { .. }
            | Event::Reclaimed { .. }
            | Event::Joined { .. }
            | Event::Left { .. }
            | Event::StatusChanged { .. }
            | Event::WorkerUp { .. }
            | Event::WorkerDown { .. } => {}
        }
    }

    fn announce(&mut self, notices: Vec<Notice>) {
        for notice in notices {
            match notice {
                Notice::Joined { user, channel } => {
                    let data = json!({ "username": user, "channel": channel });
                    self.to_room(&channel, None, "user : joined", &data);
                }
                Notice::Left { user, channel, at } => {
                    if let Some(connection) = self.users.get(user.as_str()).cloned() {
                        self.leave_room(&connection, &channel);
                    }
                    let date = wire::iso_date(at);
                    let data = json!({ "channel": channel, "user": user, "date": date });
                    self.to_room(&channel, None, "user : left", &data);
                }
                Notice::Quit { user, channel } => {
                    let data = json!({ "username": user, "channel": channel });
                    self.to_room(&channel, Some(&user), "user : quit", &data);
                }
                Notice::StatusChanged {
                    user,
                    channel,
                    status,
                } => {
                    let data = json!({ "channel": channel, "user": user, "status": status });
                    self.to_room(&channel, Some(&user), "user : status_changed", &data);
                }
            }
        }
    }

    // ---- sockets

    fn seat_of(&self, user: &str, generation: u64) -> Option<&Seat> {
        let seat = self.seats.get(self.users.get(user)?)?;
        (seat.generation == Some(generation)).then_some(seat)
    }

    fn departed(&mut self, connection: &Arc<str>) {
        let Some(seat) = self.seats.remove(connection) else {
            return;
        };
        if self.users.get(&seat.local.user) == Some(connection) {
            self.users.remove(&seat.local.user);
        }
        for channel in &seat.rooms {
            self.empty_seat(connection, channel);
        }
    }

    /// The registry gave a session to a socket that is gone, because it did not wait for the
    /// answer.
    fn disown(&self, user: String, generation: u64) {
        let link = self.link.clone();
        let ending = Ending::Lost { confirmed: None };
        tokio::spawn(async move {
            // It fails only when the worker stops, and then the master sees that.
            let _ = link
                .insist(Command::Disconnect {
                    user,
                    generation,
                    ending,
                })
                .await;
        });
    }

    /// Closes a socket that has no right to its name any more.
    fn evict(&mut self, connection: &Arc<str>, why: &'static str) {
        if let Some(seat) = self.seats.get(connection) {
            tracing::debug!(user = &*seat.local.user, why, "closing a connection");
            seat.local.wire.supersede();
        }
        self.departed(connection);
    }

    fn leave_room(&mut self, connection: &Arc<str>, channel: &str) {
        if let Some(seat) = self.seats.get_mut(connection) {
            seat.rooms.remove(channel);
        }
        self.empty_seat(connection, channel);
    }

    fn empty_seat(&mut self, connection: &Arc<str>, channel: &str) {
        if let Some(room) = self.rooms.get_mut(channel)
            && room.members.remove(connection).is_some()
            && room.members.is_empty()
        {
            room.idle_since = Instant::now();
        }
    }

    fn to_room(
        &self,
        channel: &str,
        except: Option<&str>,
        event: &'static str,
        data: &serde_json::Value,
    ) {
        let Some(room) = self.rooms.get(channel) else {
            return;
        };
        for connection in room.members.keys() {
            let Some(seat) = self.seats.get(connection) else {
                continue;
            };
            if except != Some(&*seat.local.user) {
                seat.local.wire.emit(event, data);
            }
        }
    }

    // ---- rooms

    fn bus(&mut self, event: BusEvent) {
        match event {
            BusEvent::Message { channel, message } => {
                let Some(room) = self.rooms.get_mut(&channel) else {
                    return;
                };
                let step = room.feed.offer(message);
                self.step(&channel, step);
            }
            BusEvent::Typing { channel, user } => {
                let Some(room) = self.rooms.get(&channel) else {
                    return;
                };
                let data = json!({ "username": user, "channel": channel });
                for connection in room.members.keys() {
                    let Some(seat) = self.seats.get(connection) else {
                        continue;
                    };
                    if *seat.local.user != *user {
                        seat.local.wire.emit_volatile("user : typing", &data);
                    }
                }
            }
            BusEvent::Presence(numbered) => self.event(&numbered),
            BusEvent::Interrupted => {
                let channels: Vec<String> = self
                    .rooms
                    .iter()
                    .filter(|(_, room)| room.subscription != Subscription::Ending)
                    .map(|(channel, _)| channel.clone())
                    .collect();
                for channel in channels {
                    self.subscribe(&channel);
                }
            }
        }
    }

    /// Emits what a feed delivers, and reads what it lacks.
    fn step(&mut self, channel: &str, step: Step) {
        if let Some(room) = self.rooms.get(channel) {
            for message in &step.deliver {
                for (connection, from) in &room.members {
                    let Some(seat) = self.seats.get(connection) else {
                        continue;
                    };
                    if !seat.local.is_own(message) && message.id > *from {
                        seat.local.wire.emit("message:post", &*message.event);
                    }
                }
            }
        }
        if let Some(id) = step.read_after {
            let (store, dispatch) = (self.store.clone(), self.dispatch.clone());
            let channel = channel.to_owned();
            tokio::spawn(async move {
                let range = Range::After {
                    id,
                    limit: PAGE_LIMIT,
                };
                let result = store.read(&channel, range).await;
                dispatch.send(Item::Mended { channel, result }).await;
            });
        }
    }

    fn open(&mut self, channel: String, reply: oneshot::Sender<Result<u64, StoreError>>) {
        let room = self.rooms.entry(channel.clone()).or_insert_with(Room::new);
        room.idle_since = Instant::now();
        match room.subscription {
            Subscription::Active => {
                // Whoever asked may have gone.
                let _ = reply.send(Ok(room.feed.tip()));
            }
            Subscription::Absent => {
                room.opening.push(reply);
                self.subscribe(&channel);
            }
            Subscription::Pending | Subscription::Ending => room.opening.push(reply),
        }
    }

    fn subscribe(&mut self, channel: &str) {
        let Some(room) = self.rooms.get_mut(channel) else {
            return;
        };
        room.subscription = Subscription::Pending;
        let (store, dispatch) = (self.store.clone(), self.dispatch.clone());
        let channel = channel.to_owned();
        tokio::spawn(async move {
            let result = store.subscribe(&channel).await;
            dispatch.send(Item::Subscribed { channel, result }).await;
        });
    }

    fn subscribed(&mut self, channel: &str, result: Result<u64, StoreError>) {
        let Some(room) = self.rooms.get_mut(channel) else {
            return;
        };
        match result {
            Ok(last) => {
                room.subscription = Subscription::Active;
                let step = room.feed.subscribed(last);
                let tip = room.feed.tip();
                for reply in room.opening.drain(..) {
                    // Whoever asked may have gone.
                    let _ = reply.send(Ok(tip));
                }
                self.step(channel, step);
            }
            Err(error) => {
                tracing::warn!("subscribing to a channel failed, trying again: {error}");
                room.subscription = Subscription::Absent;
                for reply in room.opening.drain(..) {
                    let _ = reply.send(Err(error.clone()));
                }
            }
        }
    }

    fn unsubscribed(&mut self, channel: String) {
        let Some(room) = self.rooms.get_mut(&channel) else {
            return;
        };
        if room.opening.is_empty() {
            self.rooms.remove(&channel);
        } else {
            // Somebody came while the subscription was being ended. What was missed meanwhile
            // is not in the feed: it begins anew.
            room.feed = Feed::default();
            self.subscribe(&channel);
        }
    }

    fn attach(&mut self, attach: Attach) {
        let Attach {
            connection,
            mut channels,
            purpose,
            outcome,
        } = attach;
        // Between the registry's decision and this the user may have left, or lost the session.
        let seat = self.seats.get(&connection);
        if let Some(seat) = seat {
            let is_in = |channel: &str| {
                let state = self.dispatch.with_state(|state| {
                    state.session(&seat.local.user).is_some_and(|session| {
                        Some(session.owner.generation) == seat.generation
                            && session.channels.contains_key(channel)
                    })
                });
                state == Some(true)
            };
            channels.retain(|(channel, _)| is_in(channel));
        }
        let (Some(seat), false) = (seat, channels.is_empty()) else {
            if let (Some(seat), Purpose::Join(answer)) = (seat, purpose) {
                answer.refuse(&seat.local.wire, &Refusal::not_joined());
            }
            // The session may have ended by itself.
            let _ = outcome.send(Attached::Gone);
            return;
        };
        let covered = channels.iter().all(|(channel, id)| {
            self.rooms.get(channel).is_some_and(|room| {
                room.subscription == Subscription::Active && room.feed.covers(*id)
            })
        });
        if !covered {
            let _ = outcome.send(Attached::Again(channels, purpose));
            return;
        }
        match purpose {
            Purpose::Join(answer) => {
                let Some((channel, id)) = channels.first() else {
                    return;
                };
                let Some(room) = self.rooms.get(channel) else {
                    return;
                };
                let missed: Vec<_> = room.feed.after(*id).cloned().collect();
                let fresh = answer.fresh();
                let online = self.dispatch.online(channel);
                answer.send(&seat.local.wire, &missed, room.feed.tip().max(*id), online);
                if fresh {
                    let data = json!({ "username": &*seat.local.user, "channel": channel });
                    seat.local.wire.emit("user : joined", &data);
                }
            }
            Purpose::Resume => {
                for (channel, id) in &mut channels {
                    let Some(room) = self.rooms.get(channel.as_str()) else {
                        continue;
                    };
                    for message in room.feed.after(*id) {
                        if !seat.local.is_own(message)
                            && !seat.local.wire.try_emit("message:post", &*message.event)
                        {
                            let _ = outcome.send(Attached::Again(channels, Purpose::Resume));
                            return;
                        }
                        *id = message.id;
                    }
                }
            }
        }
        let Some(seat) = self.seats.get_mut(&connection) else {
            return;
        };
        for (channel, id) in channels {
            if let Some(room) = self.rooms.get_mut(&channel) {
                room.members
                    .insert(connection.clone(), id.max(room.feed.tip()));
                seat.rooms.insert(channel);
            }
        }
        let _ = outcome.send(Attached::Done);
    }

    /// A join that came by REST, perhaps on another worker: the session's task does it.
    fn attach_elsewhere(&self, id: u64, user: &str, generation: u64, channel: String, fresh: bool) {
        let queued = self.seat_of(user, generation).is_some_and(|seat| {
            seat.local
                .session
                .try_send(session::Input::Attach { id, channel, fresh })
                .is_ok()
        });
        if !queued {
            let outcome = JoinedElsewhere::Unavailable;
            self.link.tell(FromWorker::Attached { id, outcome });
        }
    }

    /// What is due by time: failed subscriptions and reads again, idle rooms closed.
    fn sweep(&mut self) {
        let channels: Vec<String> = self.rooms.keys().cloned().collect();
        for channel in channels {
            let Some(room) = self.rooms.get_mut(&channel) else {
                continue;
            };
            if !room.members.is_empty() {
                room.idle_since = Instant::now();
            }
            let idle = room.idle_since.elapsed() >= LINGER && room.opening.is_empty();
            match room.subscription {
                Subscription::Absent if idle => {
                    self.rooms.remove(&channel);
                }
                Subscription::Absent => self.subscribe(&channel),
                Subscription::Active if idle => {
                    room.subscription = Subscription::Ending;
                    let (store, dispatch) = (self.store.clone(), self.dispatch.clone());
                    tokio::spawn(async move {
                        if let Err(error) = store.unsubscribe(&channel).await {
                            // At worst the bus delivers what nobody hears.
                            tracing::debug!(%error, "unsubscribing from a channel failed");
                        }
                        dispatch.send(Item::Unsubscribed { channel }).await;
                    });
                }
                Subscription::Active => {
                    let step = room.feed.retry();
                    self.step(&channel, step);
                }
                Subscription::Pending | Subscription::Ending => {}
            }
        }
    }
}
