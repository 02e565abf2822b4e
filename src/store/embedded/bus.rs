//! Who hears what.
//!
//! The lock is only ever held to look a list up or to exchange one, never while a sink runs: a
//! sink may be slow, and may do what it likes with its client.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLock;

use crate::store::{BusEvent, BusSink};

/// Where a client's events go.
pub(super) struct Subscriber {
    id: u64,
    sink: BusSink,
    /// Set when the client is dropped. A subscription of its own that still waits in the writer's
    /// queue must then come to nothing.
    gone: AtomicBool,
}

impl Subscriber {
    /// `id` must be unique on the bus.
    pub(super) fn new(id: u64, sink: BusSink) -> Self {
        Self {
            id,
            sink,
            gone: AtomicBool::new(false),
        }
    }
}

/// A subscriber on a channel.
#[derive(Clone)]
struct Subscription {
    subscriber: Arc<Subscriber>,
    /// Tells a subscription from a later one of the same client to the same channel.
    serial: u64,
}

/// The subscriptions of all clients.
#[derive(Default)]
pub(super) struct Bus {
    table: RwLock<Table>,
}

#[derive(Default)]
struct Table {
    /// Lists are replaced, never changed, so that one can be walked without the lock.
    channels: HashMap<String, Arc<[Subscription]>>,
    /// What each client is subscribed to, so that it can be removed without a search.
    clients: HashMap<u64, HashSet<String>>,
    next_serial: u64,
}

impl Bus {
    /// Starts delivery of a channel's events; a subscription that there is already is renewed.
    pub(super) fn subscribe(&self, subscriber: &Arc<Subscriber>, channel: &str) {
        let mut table = self.table.write();
        if subscriber.gone.load(Ordering::Relaxed) {
            return;
        }
        let serial = table.next_serial;
        table.next_serial += 1;
        let new = Subscription {
            subscriber: Arc::clone(subscriber),
            serial,
        };
        let list = table.others(subscriber.id, channel).chain([new]).collect();
        table.channels.insert(channel.to_owned(), list);
        table
            .clients
            .entry(subscriber.id)
            .or_default()
            .insert(channel.to_owned());
    }

    /// Ends delivery of a channel's events.
    pub(super) fn unsubscribe(&self, subscriber: &Subscriber, channel: &str) {
        let mut table = self.table.write();
        table.take_from(subscriber.id, channel);
        if let Some(channels) = table.clients.get_mut(&subscriber.id) {
            channels.remove(channel);
            if channels.is_empty() {
                table.clients.remove(&subscriber.id);
            }
        }
    }

    /// Ends everything for a client that is being dropped.
    pub(super) fn remove(&self, subscriber: &Subscriber) {
        let mut table = self.table.write();
        subscriber.gone.store(true, Ordering::Relaxed);
        table.take_client(subscriber.id);
    }

    /// Ends everything for everybody.
    pub(super) fn clear(&self) {
        let old = std::mem::take(&mut *self.table.write());
        drop(old);
    }

    /// Hands an event to all who are subscribed to the channel. A client whose sink refuses it
    /// loses all its subscriptions.
    pub(super) fn publish(&self, channel: &str, event: impl Fn() -> BusEvent) {
        let Some(list) = self.table.read().channels.get(channel).cloned() else {
            return;
        };
        for subscription in list.iter() {
            let Subscriber { sink, gone, .. } = &*subscription.subscriber;
            if !gone.load(Ordering::Relaxed) && !sink(event()) {
                self.refused(subscription, channel);
            }
        }
    }

    /// Removes the client of a subscription whose sink refused an event, unless the subscription
    /// has been replaced since: then the client knows already, and has begun anew.
    fn refused(&self, refused: &Subscription, channel: &str) {
        let mut table = self.table.write();
        let current = table
            .channels
            .get(channel)
            .is_some_and(|list| list.iter().any(|s| s.serial == refused.serial));
        if current {
            table.take_client(refused.subscriber.id);
        }
    }
}

impl Table {
    /// A channel's subscriptions but for one client's.
    fn others(&self, client: u64, channel: &str) -> impl Iterator<Item = Subscription> {
        let list = self
            .channels
            .get(channel)
            .into_iter()
            .flat_map(|list| list.iter());
        list.filter(move |s| s.subscriber.id != client).cloned()
    }

    /// Takes a client off a channel's list.
    fn take_from(&mut self, client: u64, channel: &str) {
        let rest: Arc<[_]> = self.others(client, channel).collect();
        if rest.is_empty() {
            self.channels.remove(channel);
        } else {
            self.channels.insert(channel.to_owned(), rest);
        }
    }

    /// Takes a client off every list.
    fn take_client(&mut self, client: u64) {
        for channel in self.clients.remove(&client).unwrap_or_default() {
            self.take_from(client, &channel);
        }
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;

    fn typing(user: &str) -> BusEvent {
        BusEvent::Typing {
            channel: "c".to_owned(),
            user: user.to_owned(),
        }
    }

    /// A subscriber that counts what it hears, and refuses when `accepts` says so.
    fn counting(id: u64, accepts: fn(usize) -> bool) -> (Arc<Subscriber>, Arc<Mutex<usize>>) {
        let heard = Arc::new(Mutex::new(0));
        let count = Arc::clone(&heard);
        let sink: BusSink = Arc::new(move |_| {
            let mut count = count.lock();
            *count += 1;
            accepts(*count)
        });
        (Arc::new(Subscriber::new(id, sink)), heard)
    }

    #[test]
    fn a_subscription_that_was_queued_when_its_client_went_comes_to_nothing() {
        let bus = Bus::default();
        let (gone, heard) = counting(1, |_| true);
        bus.remove(&gone);
        bus.subscribe(&gone, "c");
        bus.publish("c", || typing("anna"));
        assert_eq!(*heard.lock(), 0);
        assert!(bus.table.read().channels.is_empty() && bus.table.read().clients.is_empty());
    }

    #[test]
    fn a_late_refusal_does_not_end_a_newer_subscription() {
        let bus = Bus::default();
        let (subscriber, heard) = counting(1, |_| true);
        bus.subscribe(&subscriber, "c");
        let stale = bus.table.read().channels["c"][0].clone();
        bus.subscribe(&subscriber, "c");
        bus.refused(&stale, "c");
        bus.publish("c", || typing("anna"));
        assert_eq!(*heard.lock(), 1);
    }

    #[test]
    fn a_refusal_ends_all_subscriptions_of_that_client_only() {
        let bus = Bus::default();
        let (refusing, refused) = counting(1, |_| false);
        let (other, heard) = counting(2, |_| true);
        for channel in ["c", "d"] {
            bus.subscribe(&refusing, channel);
            bus.subscribe(&other, channel);
        }
        for channel in ["c", "d", "c"] {
            bus.publish(channel, || typing("anna"));
        }
        assert_eq!((*refused.lock(), *heard.lock()), (1, 3));
        bus.unsubscribe(&other, "c");
        bus.unsubscribe(&other, "d");
        assert!(bus.table.read().channels.is_empty() && bus.table.read().clients.is_empty());
    }

    #[test]
    fn a_sink_may_drop_its_own_client() {
        let bus = Arc::new(Bus::default());
        let slot: Arc<Mutex<Option<Arc<Subscriber>>>> = Arc::default();
        let sink: BusSink = {
            let (bus, slot) = (Arc::clone(&bus), Arc::clone(&slot));
            Arc::new(move |_| {
                if let Some(own) = slot.lock().take() {
                    bus.remove(&own);
                }
                true
            })
        };
        let subscriber = Arc::new(Subscriber::new(1, sink));
        bus.subscribe(&subscriber, "c");
        *slot.lock() = Some(subscriber);
        bus.publish("c", || typing("anna"));
        assert!(bus.table.read().channels.is_empty());
    }
}
