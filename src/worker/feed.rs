//! One channel's messages as they reach a worker: put in order, gaps noticed, the last ones kept.
//!
//! Pure. The bus may lose, double or reorder; a [`Feed`] delivers every id once and in order,
//! and says what has to be read from the store to go on.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::store::{Message, PAGE_LIMIT, Page};

/// Messages kept for sockets that come back, and their bytes; at least one is kept.
const RING: usize = 256;
const RING_BYTES: usize = 1024 * 1024;

/// Messages that arrived early and wait for what is missing before them, and their bytes. More
/// are dropped: they are in the store.
const HELD: usize = 1024;
const HELD_BYTES: usize = 1024 * 1024;

/// What a feed asks for.
#[derive(Debug, Default)]
pub struct Step {
    /// To be emitted now, in this order.
    pub deliver: Vec<Arc<Message>>,
    /// Read what comes after this id from the store, and give it to [`Feed::mend`].
    pub read_after: Option<u64>,
}

/// A channel's messages.
#[derive(Debug, Default)]
pub struct Feed {
    /// Everything up to here was delivered, or came before the subscription.
    tip: u64,
    /// The last messages, ids increasing, up to `tip`.
    ring: VecDeque<Arc<Message>>,
    ring_bytes: usize,
    /// Ids above this one, up to `tip`, are in the ring or do not exist.
    base: u64,
    /// Arrived early.
    held: BTreeMap<u64, Message>,
    held_bytes: usize,
    /// Whether the subscription has begun; before that, the tip means nothing.
    begun: bool,
    /// Whether a read from the store is under way.
    reading: bool,
    /// The highest id that the store is known to have given out: up to there something may be
    /// missing.
    known: u64,
    /// What was known when the read was asked for.
    known_to_reader: u64,
}

impl Feed {
    /// The last id delivered; 0 if none.
    pub fn tip(&self) -> u64 {
        self.tip
    }

    /// The subscription began, or began anew after it was interrupted, when the channel's last
    /// id was `last`.
    pub fn subscribed(&mut self, last: u64) -> Step {
        if !self.begun {
            self.begun = true;
            self.tip = last;
            self.base = last;
        }
        self.known = self.known.max(last);
        self.advance()
    }

    /// A message arrived.
    pub fn offer(&mut self, message: Message) -> Step {
        if !self.begun || message.id > self.tip {
            // Also where it is dropped: that it exists must not be forgotten.
            self.known = self.known.max(message.id);
            let bytes = size(&message);
            let room = self.held.len() < HELD && self.held_bytes + bytes <= HELD_BYTES;
            let next = self.begun && message.id == self.tip + 1;
            if (room || next) && !self.held.contains_key(&message.id) {
                self.held_bytes += bytes;
                self.held.insert(message.id, message);
            }
        }
        self.advance()
    }

    /// What was asked for has been read. Ids that the page passes over do not exist.
    pub fn mend(&mut self, page: Page) -> Step {
        self.reading = false;
        self.known = self.known.max(page.last);
        let complete = page.messages.len() < PAGE_LIMIT as usize;
        let mut step = Step::default();
        for message in page.messages {
            if message.id > self.tip {
                self.keep(message, &mut step.deliver);
            }
        }
        if complete {
            // What was known by then and is not there, a store that came back has lost. Of that, what
            // was heard is delivered, as it was elsewhere; the rest is nowhere to be had.
            while let Some(entry) = self.held.first_entry()
                && *entry.key() <= self.known_to_reader
            {
                let message = entry.remove();
                self.release(message, &mut step.deliver);
            }
            self.tip = self.tip.max(page.last).max(self.known_to_reader);
        }
        let more = self.advance();
        step.deliver.extend(more.deliver);
        step.read_after = more.read_after;
        step
    }

    /// The read failed; [`Feed::retry`] asks again.
    pub fn failed(&mut self) {
        self.reading = false;
    }

    /// Asks again for what is still missing.
    pub fn retry(&mut self) -> Step {
        self.advance()
    }

    /// Whether everything after `id` is at hand.
    pub fn covers(&self, id: u64) -> bool {
        self.begun && id >= self.base
    }

    /// The messages after `id`, in order; complete if the feed [covers](Self::covers) it.
    pub fn after(&self, id: u64) -> impl Iterator<Item = &Arc<Message>> {
        let from = self.ring.partition_point(|message| message.id <= id);
        self.ring.range(from..)
    }

    /// Delivers what is next in line and finds out what is missing.
    fn advance(&mut self) -> Step {
        let mut step = Step::default();
        if !self.begun {
            return step;
        }
        while let Some(entry) = self.held.first_entry() {
            if *entry.key() > self.tip + 1 {
                break;
            }
            let message = entry.remove();
            self.release(message, &mut step.deliver);
        }
        if !self.reading && (!self.held.is_empty() || self.known > self.tip) {
            self.reading = true;
            self.known_to_reader = self.known;
            step.read_after = Some(self.tip);
        }
        step
    }

    /// Takes a message that was held into account, if it is still new.
    fn release(&mut self, message: Message, deliver: &mut Vec<Arc<Message>>) {
        self.held_bytes -= size(&message);
        if message.id > self.tip {
            self.keep(message, deliver);
        }
    }

    fn keep(&mut self, message: Message, deliver: &mut Vec<Arc<Message>>) {
        self.tip = message.id;
        self.ring_bytes += size(&message);
        while (self.ring.len() >= RING || self.ring_bytes > RING_BYTES)
            && let Some(oldest) = self.ring.pop_front()
        {
            self.ring_bytes -= size(&oldest);
            self.base = oldest.id;
        }
        let message = Arc::new(message);
        self.ring.push_back(message.clone());
        deliver.push(message);
    }
}

/// Bytes of a message, roughly.
fn size(message: &Message) -> usize {
    message.event.get().len() + message.user.len() + message.sender.len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::value::RawValue;

    use super::*;

    fn message(id: u64) -> Message {
        let event = RawValue::from_string("{}".into()).unwrap();
        Message {
            id,
            user: "ann".into(),
            sender: "c".into(),
            event,
        }
    }

    /// A store of messages, of which some ids do not exist.
    struct Channel {
        ids: Vec<u64>,
        last: u64,
    }

    impl Channel {
        fn read_after(&self, id: u64) -> Page {
            let messages = self
                .ids
                .iter()
                .filter(|i| **i > id)
                .take(PAGE_LIMIT as usize)
                .map(|i| message(*i))
                .collect();
            Page {
                messages,
                last: self.last,
            }
        }
    }

    /// Does what the feed asks for, and returns what it delivers.
    fn settle(feed: &mut Feed, channel: &Channel, mut step: Step) -> Vec<u64> {
        let mut delivered = Vec::new();
        for _ in 0..100 {
            delivered.extend(step.deliver.iter().map(|m| m.id));
            match step.read_after {
                Some(id) => step = feed.mend(channel.read_after(id)),
                None => return delivered,
            }
        }
        panic!("it reads for ever");
    }

    proptest! {
        /// However the bus loses, doubles and reorders: after the subscription is renewed, every
        /// message that exists was delivered once, in order.
        #[test]
        fn every_message_once_and_in_order(
            count in 0..600u64,
            before in 0..50u64,
            holes in prop::collection::vec(0..600u64, 0..5),
            arrivals in prop::collection::vec((0..600u64, any::<bool>()), 0..700),
        ) {
            let last = before + count;
            let ids: Vec<u64> = (1..=last).filter(|id| !holes.contains(id)).collect();
            let channel = Channel { ids, last };
            let mut feed = Feed::default();
            let mut delivered = Vec::new();
            let step = feed.subscribed(before);
            delivered.extend(settle(&mut feed, &channel, step));
            for (n, twice) in arrivals {
                let id = before + 1 + n;
                if !channel.ids.contains(&id) {
                    continue;
                }
                for _ in 0..=u8::from(twice) {
                    let step = feed.offer(message(id));
                    delivered.extend(settle(&mut feed, &channel, step));
                }
            }
            let step = feed.subscribed(last);
            delivered.extend(settle(&mut feed, &channel, step));
            let expected: Vec<u64> =
                channel.ids.iter().copied().filter(|id| *id > before).collect();
            prop_assert_eq!(delivered, expected);
            prop_assert_eq!(feed.tip(), last);
        }

        /// What a feed says it covers, it has.
        #[test]
        fn what_is_covered_is_complete(count in 0..700u64, after in 0..800u64) {
            let mut feed = Feed::default();
            feed.subscribed(0);
            for id in 1..=count {
                feed.offer(message(id));
            }
            if feed.covers(after) {
                let got: Vec<u64> = feed.after(after).map(|m| m.id).collect();
                let expected: Vec<u64> = (after + 1..=count).collect();
                prop_assert_eq!(got, expected);
            } else {
                prop_assert!(after + (RING as u64) < count);
            }
        }
    }

    #[test]
    fn what_arrives_before_the_subscription_is_confirmed_is_kept_if_it_is_newer() {
        let mut feed = Feed::default();
        assert!(feed.offer(message(5)).deliver.is_empty());
        assert!(feed.offer(message(6)).deliver.is_empty());
        let step = feed.subscribed(5);
        assert_eq!(step.deliver.iter().map(|m| m.id).collect::<Vec<_>>(), [6]);
        assert_eq!(step.read_after, None);
    }

    #[test]
    fn large_messages_are_bounded_by_their_bytes() {
        let large = |id| Message {
            event: RawValue::from_string(format!("\"{}\"", "x".repeat(300_000))).unwrap(),
            ..message(id)
        };
        let mut feed = Feed::default();
        feed.subscribed(0);
        for id in 1..=10 {
            let step = feed.offer(large(id));
            assert_eq!(step.deliver.len(), 1, "every one is delivered");
        }
        assert!(feed.covers(7) && !feed.covers(6));
        for id in 12..=20 {
            assert!(feed.offer(large(id)).deliver.is_empty());
        }
        assert!(feed.held.len() <= 3, "{}", feed.held.len());
        let messages = (11..=20).map(large).collect();
        let step = feed.mend(Page { messages, last: 20 });
        assert_eq!((step.deliver.len(), feed.tip()), (10, 20));
        assert_eq!(feed.held_bytes, 0);
    }

    proptest! {
        /// A store that loses its latest messages, and goes on with higher ids than anybody knows:
        /// reading comes to an end at once, and what is stored then reaches everybody in order.
        #[test]
        fn what_the_store_has_lost_is_not_waited_for(
            kept in 0..30u64,
            lost in 1..30u64,
            heard in prop::collection::vec(any::<bool>(), 60),
            renewed: bool,
            leap in 1..1u64 << 50,
            after in 0..300u64,
        ) {
            let mut feed = Feed::default();
            feed.subscribed(0);
            let mut delivered = Vec::new();
            // What is missing is being read when the store loses it.
            let mut reading = None;
            for id in (1..=kept + lost).filter(|id| heard[*id as usize % heard.len()]) {
                let step = feed.offer(message(id));
                delivered.extend(step.deliver.iter().map(|m| m.id));
                reading = reading.or(step.read_after);
            }
            let mut channel = Channel { ids: (1..=kept).collect(), last: kept };
            let read_after = reading;
            delivered.extend(settle(&mut feed, &channel, Step { read_after, ..Step::default() }));
            if renewed {
                let step = feed.subscribed(kept);
                delivered.extend(settle(&mut feed, &channel, step));
            }
            let first = kept + lost + leap;
            channel.ids.extend(first..=first + after);
            channel.last = first + after;
            for id in (first..=channel.last).filter(|id| heard[*id as usize % heard.len()]) {
                let step = feed.offer(message(id));
                delivered.extend(settle(&mut feed, &channel, step));
            }
            let step = feed.subscribed(channel.last);
            delivered.extend(settle(&mut feed, &channel, step));
            prop_assert!(delivered.is_sorted_by(|a, b| a < b), "{:?}", delivered);
            prop_assert_eq!(feed.tip(), channel.last);
            let new: Vec<u64> = delivered.iter().copied().filter(|id| *id >= first).collect();
            prop_assert_eq!(new, (first..=channel.last).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_failed_read_is_asked_for_again() {
        let mut feed = Feed::default();
        feed.subscribed(1);
        assert_eq!(feed.offer(message(4)).read_after, Some(1));
        assert_eq!(
            feed.offer(message(5)).read_after,
            None,
            "one read at a time"
        );
        feed.failed();
        assert_eq!(feed.retry().read_after, Some(1));
    }
}
