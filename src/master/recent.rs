//! Which worker an address' connections went to a moment ago.
//!
//! A polling client that comes in opens several connections before its session is registered, and
//! with it its address ([`super::affinity`]). A worker that begins to serve in the middle of that must
//! not get the later ones: it does not know the session, and the client would take that for its end.
//!
//! Pure: time is a parameter.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::routing::RoutingKey;

/// How long an address is remembered after its last connection: longer than a client takes from
/// one to the next.
const REMEMBERED: Duration = Duration::from_secs(1);

/// For how long after a worker has begun to serve its addresses stay where they are, as long as they
/// keep connecting.
pub const SETTLING: Duration = Duration::from_secs(3);

/// Addresses that are remembered; others are not while there are so many.
const ADDRESSES: usize = 65_536;

/// Addresses and their workers.
#[derive(Debug, Default)]
pub struct Recent(HashMap<RoutingKey, (u32, Instant)>);

impl Recent {
    /// A connection went to this worker.
    pub fn note(&mut self, key: RoutingKey, worker: u32, now: Instant) {
        if self.0.len() < ADDRESSES || self.0.contains_key(&key) {
            self.0.insert(key, (worker, now));
        }
    }

    /// The worker that the last one went to, if that is not long ago.
    pub fn of(&self, key: &RoutingKey, now: Instant) -> Option<u32> {
        let (worker, at) = self.0.get(key)?;
        (now.saturating_duration_since(*at) < REMEMBERED).then_some(*worker)
    }

    /// Forgets what is long ago.
    pub fn sweep(&mut self, now: Instant) {
        self.0
            .retain(|_, (_, at)| now.saturating_duration_since(*at) < REMEMBERED);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_remembered_for_a_moment_after_its_last_connection() {
        let key = |n| RoutingKey::of([10, 0, 0, n].into());
        let start = Instant::now();
        let mut recent = Recent::default();
        recent.note(key(1), 7, start);
        let later = start + REMEMBERED / 2;
        recent.note(key(1), 8, later);
        recent.note(key(2), 7, start);
        let end = start + REMEMBERED;
        assert_eq!(recent.of(&key(1), end), Some(8));
        assert_eq!(recent.of(&key(2), end), None);
        assert_eq!(recent.of(&key(3), start), None);
        recent.sweep(end);
        assert_eq!(recent.0.len(), 1);
    }

    #[test]
    fn there_is_an_end_to_what_it_remembers() {
        let now = Instant::now();
        let mut recent = Recent::default();
        let key = |n: u32| RoutingKey::of(n.to_be_bytes().into());
        for n in 0..=u32::try_from(ADDRESSES).unwrap() {
            recent.note(key(n), 0, now);
        }
        assert_eq!(recent.0.len(), ADDRESSES);
        recent.note(key(0), 1, now);
        assert_eq!(recent.of(&key(0), now), Some(1));
    }
}
