//! The bus: one connection that listens to the topics of all channels subscribed to.
//!
//! The [table](Table) says what is wanted, and changes at once; a task of its own has Redis follow
//! (`SUBSCRIBE`, `UNSUBSCRIBE`), in batches, and connects again when the connection breaks. What
//! comes over a topic goes straight from the connection into the sink, without a queue.
//!
//! A subscription begins like this: its topic is put into the table, Redis confirms `SUBSCRIBE`,
//! and only then the channel's last id is read. What is heard meanwhile is not delivered, but the
//! id that the subscriber is told is no lower than any of these: so every message is either
//! at or below that id, or delivered.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use redis::{PushInfo, PushKind, RedisError, Value};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::connection::{
    BackOff, Connection, Failure, PATIENCE, Server, answer, unavailable, unreachable,
};
use super::seen::Seen;
use super::wire::{self, Heard};
use crate::presence::Numbered;
use crate::store::{BusEvent, BusSink, StoreError};

/// How many subscriptions may wait to be confirmed; more wait for room.
const QUEUE: usize = 1024;

/// The most topics in one command.
const BATCH: usize = 256;

/// How often the connection proves that it hears what is published.
const PROBE_EVERY: Duration = Duration::from_secs(1);

/// So many probes unheard, and the connection is given up.
const DEAF_AFTER: u32 = 3;

/// Delivers what is published in the channels subscribed to.
pub(super) struct Bus {
    shared: Arc<Shared>,
    orders: mpsc::Sender<Order>,
    _listener: AbortOnDropHandle<()>,
}

/// Asks the task to subscribe to a topic, which is in the table.
struct Order {
    topic: String,
    /// Gets the epoch in which Redis has confirmed it. Dropped if it has come to nothing.
    confirmed: oneshot::Sender<Result<u64, StoreError>>,
}

impl Bus {
    /// Starts listening. `probe` is a topic that nobody else uses.
    /// `presence` is the topic of [`watch_presence`](Self::watch_presence).
    pub(super) fn new(
        server: Arc<Server>,
        probe: String,
        presence: String,
        sink: BusSink,
        seen: Arc<Seen>,
    ) -> Self {
        let shared = Arc::new(Shared {
            sink,
            seen,
            probe,
            presence,
            echoed: AtomicBool::new(false),
            delivery: Mutex::new(()),
            table: Mutex::new(Table::default()),
            dropped: Notify::new(),
        });
        let (orders, queue) = mpsc::channel(QUEUE);
        let listener = tokio::spawn(listen(Arc::clone(&shared), server, queue));
        Self {
            shared,
            orders,
            _listener: AbortOnDropHandle::new(listener),
        }
    }

    /// Starts delivery of a channel's events. `last` reads the channel's last id. Returns the id
    /// after which every message is delivered.
    ///
    /// # Errors
    ///
    /// [`StoreError::Unavailable`] if Redis cannot be reached, or refuses.
    pub(super) async fn subscribe<F>(
        &self,
        channel: &str,
        topic: &str,
        last: impl Fn() -> F,
    ) -> Result<u64, StoreError>
    where
        F: Future<Output = Result<u64, StoreError>>,
    {
        let attempts = async {
            loop {
                let opening = self.shared.open(channel, topic);
                // If the connection breaks on the way, it all begins anew.
                let Some(epoch) = self.confirmation(topic).await? else {
                    continue;
                };
                let last = last().await?;
                if let Some(last) = opening.finish(epoch, last) {
                    return Ok(last);
                }
            }
        };
        let timely = timeout(PATIENCE, attempts).await;
        timely.unwrap_or_else(|_| Err(unreachable()))
    }

    /// Starts delivery of changes of who is online, for good.
    ///
    /// # Errors
    ///
    /// [`StoreError::Unavailable`] if Redis cannot be reached; it starts as soon as it can all the
    /// same.
    pub(super) async fn watch_presence(&self) -> Result<(), StoreError> {
        let topic = &self.shared.presence;
        self.shared.table.lock().topics.insert(
            topic.clone(),
            Topic {
                channel: String::new(),
                serial: 0,
                state: State::Open { floor: 0 },
            },
        );
        let confirmed = timeout(PATIENCE, async {
            while self.confirmation(topic).await?.is_none() {}
            Ok(())
        });
        confirmed.await.unwrap_or_else(|_| Err(unreachable()))
    }

    /// Ends delivery of a channel's events, at once.
    pub(super) fn unsubscribe(&self, topic: &str) {
        self.shared.close_if(topic, |_| true);
    }

    /// Has Redis confirm that it is subscribed to a topic. Returns in which epoch that was.
    async fn confirmation(&self, topic: &str) -> Result<Option<u64>, StoreError> {
        let (confirmed, confirmation) = oneshot::channel();
        let order = Order {
            topic: topic.to_owned(),
            confirmed,
        };
        let sent = self.orders.send(order).await;
        sent.map_err(|_| unreachable())?;
        confirmation.await.ok().transpose()
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        *self.shared.table.lock() = Table {
            closed: true,
            ..Table::default()
        };
    }
}

/// What the connection's task, the one that keeps it, and the callers share.
struct Shared {
    sink: BusSink,
    seen: Arc<Seen>,
    /// The topic by which the connection proves that it hears.
    probe: String,
    /// The topic of who is online.
    presence: String,
    /// Whether the probe was heard since the last look.
    echoed: AtomicBool,
    /// Held while the sink is called, so that a connection that ends and the one that follows
    /// never deliver at the same time.
    delivery: Mutex<()>,
    /// Never held while the sink is called, which may do what it likes.
    table: Mutex<Table>,
    /// Says that there are dropped topics.
    dropped: Notify,
}

/// What is wanted.
#[derive(Default)]
struct Table {
    /// The number of connections so far. What one of an earlier epoch says does not count.
    epoch: u64,
    next_serial: u64,
    topics: HashMap<String, Topic>,
    /// Topics that Redis may still believe to be subscribed to.
    dropped: HashSet<String>,
    /// Set when the bus is dropped: nothing is delivered any more.
    closed: bool,
}

/// A subscription.
struct Topic {
    channel: String,
    /// Tells a subscription from an earlier one to the same topic.
    serial: u64,
    state: State,
}

enum State {
    /// Nothing is delivered yet; the highest id that was heard and not delivered.
    Opening { highest: u64 },
    /// Messages with higher ids than `floor` are delivered.
    Open { floor: u64 },
}

impl Shared {
    /// Puts a topic into the table. One that is there stays in its state, and counts as renewed.
    fn open<'a>(&'a self, channel: &str, topic: &'a str) -> Opening<'a> {
        let mut table = self.table.lock();
        let new = table.next_serial;
        table.next_serial += 1;
        let entry = table
            .topics
            .entry(topic.to_owned())
            .and_modify(|entry| {
                if matches!(entry.state, State::Open { .. }) {
                    entry.serial = new;
                }
            })
            .or_insert_with(|| Topic {
                channel: channel.to_owned(),
                serial: new,
                state: State::Opening { highest: 0 },
            });
        Opening {
            shared: self,
            topic,
            serial: entry.serial,
        }
    }

    /// Takes a topic out of the table, if `condition` agrees.
    fn close_if(&self, topic: &str, condition: impl FnOnce(&Topic) -> bool) {
        let mut table = self.table.lock();
        if table.topics.get(topic).is_some_and(condition) {
            table.topics.remove(topic);
            table.dropped.insert(topic.to_owned());
            self.dropped.notify_one();
        }
    }

    /// Takes all topics out of the table, if `only_if` agrees.
    fn close_all(&self, only_if: impl FnOnce(&Table) -> bool) {
        let mut table = self.table.lock();
        if only_if(&table) {
            let topics = std::mem::take(&mut table.topics);
            table.dropped.extend(topics.into_keys());
            self.dropped.notify_one();
        }
    }

    /// Begins an epoch: a new connection, which knows of no topics, and before which anything may
    /// have been missed. Even ids may have been lost, so that lower ones come.
    fn begin_epoch(&self) -> u64 {
        let mut table = self.table.lock();
        for topic in table.topics.values_mut() {
            match &mut topic.state {
                State::Opening { highest: id } | State::Open { floor: id } => *id = 0,
            }
        }
        table.dropped.clear();
        table.epoch += 1;
        self.echoed.store(true, Ordering::Relaxed);
        table.epoch
    }

    /// Takes what a connection pushes.
    fn pushed(&self, epoch: u64, info: PushInfo) {
        if info.kind != PushKind::Message {
            return;
        }
        let mut data = info.data.into_iter();
        let (Some(Value::BulkString(topic)), Some(Value::BulkString(payload))) =
            (data.next(), data.next())
        else {
            return;
        };
        let Ok(topic) = String::from_utf8(topic) else {
            return;
        };
        if topic == self.probe {
            self.echoed.store(true, Ordering::Relaxed);
            return;
        }
        if topic == self.presence {
            match serde_json::from_slice(&payload) {
                Ok(numbered) => self.deliver_presence(epoch, numbered),
                Err(error) => tracing::warn!("a change of who is online is malformed: {error}"),
            }
            return;
        }
        let Some(heard) = wire::heard(payload) else {
            tracing::warn!(topic, "something else than Banter publishes on its topics");
            return;
        };
        let _delivery = self.delivery.lock();
        let Some((channel, serial)) = self.admit(epoch, &topic, &heard) else {
            return;
        };
        let event = match heard {
            Heard::Message(message) => BusEvent::Message { channel, message },
            Heard::Typing(user) => BusEvent::Typing { channel, user },
        };
        if !(self.sink)(event) {
            // Unless the subscription was renewed since: then the subscriber knows already, and
            // has begun anew.
            self.close_all(|table| {
                let current = table.topics.get(&topic);
                current.is_some_and(|current| current.serial == serial)
            });
        }
    }

    /// Gives the subscriber a change of who is online. It notices by the numbers what it lacks, so
    /// nothing has to follow where it cannot keep up.
    fn deliver_presence(&self, epoch: u64, numbered: Numbered) {
        let _delivery = self.delivery.lock();
        let current = {
            let table = self.table.lock();
            !table.closed && table.epoch == epoch
        };
        if current {
            (self.sink)(BusEvent::Presence(numbered));
        }
    }

    /// Decides whether something is delivered: returns the channel, and the subscription's serial.
    fn admit(&self, epoch: u64, topic: &str, heard: &Heard) -> Option<(String, u64)> {
        let mut table = self.table.lock();
        if table.closed || table.epoch != epoch {
            return None;
        }
        let entry = table.topics.get_mut(topic)?;
        if let Heard::Message(message) = heard {
            self.seen.note(&entry.channel, message.id);
        }
        let admitted = match (&mut entry.state, heard) {
            (State::Open { .. }, Heard::Typing(_)) => true,
            (State::Open { floor }, Heard::Message(message)) => message.id > *floor,
            (State::Opening { .. }, Heard::Typing(_)) => false,
            (State::Opening { highest }, Heard::Message(message)) => {
                *highest = message.id.max(*highest);
                false
            }
        };
        admitted.then(|| (entry.channel.clone(), entry.serial))
    }

    /// Tells the subscriber that it may have missed anything.
    fn interrupted(&self) {
        let _delivery = self.delivery.lock();
        if !self.table.lock().closed && !(self.sink)(BusEvent::Interrupted) {
            self.close_all(|_| true);
        }
    }
}

/// A subscription that is being made. Dropped before it is finished, it comes to nothing.
struct Opening<'a> {
    shared: &'a Shared,
    topic: &'a str,
    serial: u64,
}

impl Opening<'_> {
    /// Begins delivery, given the epoch in which Redis confirmed the subscription and the
    /// channel's last id, read after that. Returns the id after which every message is delivered,
    /// or `None` if the subscription did not last so long.
    fn finish(self, epoch: u64, last: u64) -> Option<u64> {
        let mut table = self.shared.table.lock();
        if table.epoch != epoch {
            return None;
        }
        let entry = table.topics.get_mut(self.topic)?;
        match entry.state {
            State::Opening { highest } if entry.serial == self.serial => {
                let floor = last.max(highest);
                entry.state = State::Open { floor };
                Some(floor)
            }
            State::Opening { .. } => None,
            // It was open before, or another caller was faster.
            State::Open { floor } => Some(last.max(floor)),
        }
    }
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        self.shared.close_if(self.topic, |entry| {
            entry.serial == self.serial && matches!(entry.state, State::Opening { .. })
        });
    }
}

/// Why a connection is given up.
#[derive(Debug, thiserror::Error)]
enum Loss {
    #[error("it was closed")]
    Closed,
    #[error("it hears nothing any more")]
    Deaf,
    #[error(transparent)]
    Failed(#[from] RedisError),
}

/// Keeps a connection that listens, until nobody can give orders any more.
async fn listen(shared: Arc<Shared>, server: Arc<Server>, mut orders: mpsc::Receiver<Order>) {
    let mut back_off = BackOff::new("listening");
    let mut interrupted = false;
    loop {
        let epoch = shared.begin_epoch();
        let pushed = {
            let shared = Arc::clone(&shared);
            Arc::new(move |info| shared.pushed(epoch, info))
        };
        let connection = server.connect_at_last(&mut back_off, &pushed).await;
        back_off.connected();
        let mut listener = Listener {
            shared: &shared,
            connection,
            epoch,
            silent: 0,
        };
        let lasted = async {
            listener.resume().await?;
            if interrupted {
                shared.interrupted();
            }
            interrupted = true;
            listener.serve(&mut orders).await
        };
        match lasted.await {
            Ok(()) => return,
            Err(loss) => {
                tracing::warn!(address = server.shown, %loss, "lost the connection that listens");
            }
        }
        drop(listener);
        back_off.wait().await;
    }
}

/// One connection that listens.
struct Listener<'a> {
    shared: &'a Shared,
    connection: Connection,
    epoch: u64,
    /// How many probes in a row were not heard.
    silent: u32,
}

impl Listener<'_> {
    /// Subscribes to the probe and to everything in the table.
    async fn resume(&mut self) -> Result<(), Loss> {
        let mut topics: Vec<_> = self.shared.table.lock().topics.keys().cloned().collect();
        topics.push(self.shared.probe.clone());
        for batch in topics.chunks(BATCH) {
            answer(self.connection.inner.subscribe(batch)).await?;
        }
        Ok(())
    }

    /// Has Redis follow the table until the connection is lost.
    async fn serve(&mut self, orders: &mut mpsc::Receiver<Order>) -> Result<(), Loss> {
        let lost = self.connection.lost.clone();
        let mut ticks = interval(PROBE_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            tokio::select! {
                () = lost.cancelled() => return Err(Loss::Closed),
                count = orders.recv_many(&mut batch, BATCH) => {
                    if count == 0 {
                        return Ok(());
                    }
                    self.subscribe(&mut batch).await?;
                }
                () = self.shared.dropped.notified() => {}
                _ = ticks.tick() => self.probe().await?,
            }
            self.unsubscribe().await?;
        }
    }

    /// Carries out orders. Those left over when it fails come to nothing.
    async fn subscribe(&mut self, orders: &mut Vec<Order>) -> Result<(), Loss> {
        {
            // What was unsubscribed from meanwhile must not be subscribed to: nobody would undo it.
            let table = self.shared.table.lock();
            orders.retain(|order| table.topics.contains_key(&order.topic));
        }
        if orders.is_empty() {
            return Ok(());
        }
        let topics: Vec<&str> = orders.iter().map(|order| &*order.topic).collect();
        let result = match answer(self.connection.inner.subscribe(topics)).await {
            Ok(()) => Ok(self.epoch),
            Err(error) if Failure::of(&error) == Failure::Refused => {
                Err(unavailable("subscribing", &error))
            }
            Err(error) => {
                orders.clear();
                return Err(error.into());
            }
        };
        for order in orders.drain(..) {
            // Whoever ordered it may have given up.
            let _ = order.confirmed.send(result.clone());
        }
        Ok(())
    }

    /// Unsubscribes from what was dropped from the table and has not come back.
    async fn unsubscribe(&mut self) -> Result<(), Loss> {
        let dropped: Vec<_> = {
            let mut table = self.shared.table.lock();
            let dropped = std::mem::take(&mut table.dropped);
            let gone = |topic: &String| !table.topics.contains_key(topic);
            dropped.into_iter().filter(gone).collect()
        };
        for batch in dropped.chunks(BATCH) {
            answer(self.connection.inner.unsubscribe(batch)).await?;
        }
        Ok(())
    }

    /// Publishes something that this connection must hear itself.
    async fn probe(&mut self) -> Result<(), Loss> {
        if self.shared.echoed.swap(false, Ordering::Relaxed) {
            self.silent = 0;
        } else {
            self.silent += 1;
            if self.silent == DEAF_AFTER {
                return Err(Loss::Deaf);
            }
        }
        let mut publish = redis::cmd("PUBLISH");
        publish.arg(&self.shared.probe).arg("");
        let receivers: u64 = answer(publish.query_async(&mut self.connection.inner)).await?;
        tracing::trace!(receivers, "probed the connection that listens");
        Ok(())
    }
}
