//! The highest message ids that this process has seen.

use std::collections::HashMap;

use parking_lot::Mutex;

/// How many channels are remembered for sure, and half of those that may be.
const GENERATION: usize = 8192;

/// The highest id seen in each of the channels used lately.
///
/// If somebody removes a channel's keys from a living Redis, or it is set up to evict them, it knows of
/// no id any more; a post takes along what is known here, so that ids do not begin anew for people
/// who have seen higher ones. What a Redis loses when it ends is [`life`](super::life)'s concern.
#[derive(Default)]
pub(super) struct Seen(Mutex<Generations>);

/// When `young` is full, it takes the place of `old`: what has not been used for a while goes.
#[derive(Default)]
struct Generations {
    young: HashMap<String, u64>,
    old: HashMap<String, u64>,
}

impl Seen {
    /// Notes that the channel has come to `id`.
    pub(super) fn note(&self, channel: &str, id: u64) {
        if id > 0 {
            self.0.lock().note(channel, id, GENERATION);
        }
    }

    /// The highest id seen in a channel; 0 if unknown.
    pub(super) fn highest(&self, channel: &str) -> u64 {
        self.0.lock().highest(channel)
    }
}

impl Generations {
    fn note(&mut self, channel: &str, id: u64, capacity: usize) {
        if let Some(highest) = self.young.get_mut(channel) {
            *highest = id.max(*highest);
            return;
        }
        let id = id.max(self.old.remove(channel).unwrap_or(0));
        if self.young.len() == capacity {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(channel.to_owned(), id);
    }

    fn highest(&self, channel: &str) -> u64 {
        let id = self.young.get(channel).or_else(|| self.old.get(channel));
        id.copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_id_counts_and_what_is_used_stays() {
        let mut seen = Generations::default();
        seen.note("c", 5, 4);
        seen.note("c", 3, 4);
        assert_eq!(seen.highest("c"), 5);
        assert_eq!(seen.highest("d"), 0);
        for n in 0..100 {
            seen.note(&format!("other {n}"), 1, 4);
            // It takes over what was known before.
            seen.note("c", 1, 4);
            assert!(seen.young.len() <= 4 && seen.old.len() <= 4);
        }
        assert_eq!(seen.highest("c"), 5);
        assert_eq!(seen.highest("other 0"), 0);
        assert_eq!(seen.highest("other 99"), 1);
    }
}
