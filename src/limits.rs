//! Rate limits as token buckets.
//!
//! A bucket holds at most [`Limit`]'s burst of tokens, is refilled at its rate, and every granted
//! request takes a token. Kept as the generic cell rate algorithm does it (ITU-T I.371): a bucket
//! *is* the instant at which it would be full again, in whole nanoseconds, so nothing is rounded
//! in the client's favour, and "try again in" is exact.
//!
//! Pure: the time is a parameter.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Bounds what is added to an [`Instant`], which would panic when it overflows.
const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// How much is allowed: a steady rate, and how much at once after a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// The time in which one token comes in, rounded up; `None` if there is no limit.
    interval: Option<Duration>,
    /// The time in which all tokens but one come in.
    tolerance: Duration,
}

impl Limit {
    /// No limit at all.
    pub const UNLIMITED: Self = Self {
        interval: None,
        tolerance: Duration::ZERO,
    };

    /// At most `rate` per second in the long run, and `burst` at once.
    ///
    /// A rate of 0 (or one that is no positive finite number) means [`Limit::UNLIMITED`]. A burst
    /// of 0 counts as 1, for nothing would ever be granted; rates below one in a century count as
    /// that.
    pub fn new(rate: f64, burst: u32) -> Self {
        if !(rate > 0.0 && rate.is_finite()) {
            return Self::UNLIMITED;
        }
        let nanos = (1e9 / rate).ceil().min(CENTURY.as_nanos() as f64);
        // Exact: positive and below 2^63.
        let interval = Duration::from_nanos(nanos as u64);
        let tolerance = interval.saturating_mul(burst.max(1) - 1).min(CENTURY);
        Self {
            interval: Some(interval),
            tolerance,
        }
    }

    /// Whether everything is granted.
    pub fn is_unlimited(&self) -> bool {
        self.interval.is_none()
    }

    /// How long to wait until a token is there, for a bucket that is full at `full_at`.
    fn check(&self, full_at: Option<Instant>, now: Instant) -> Result<(), Duration> {
        let missing = full_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(now));
        match missing.checked_sub(self.tolerance) {
            None | Some(Duration::ZERO) => Ok(()),
            Some(wait) => Err(wait),
        }
    }

    /// Takes a token; `Ok` is when the bucket will be full again, `None` if it always is.
    fn take(&self, full_at: Option<Instant>, now: Instant) -> Result<Option<Instant>, Duration> {
        let Some(interval) = self.interval else {
            return Ok(None);
        };
        self.check(full_at, now)?;
        Ok(Some(full_at.map_or(now, |at| at.max(now)) + interval))
    }
}

/// When a bucket will be full with another limit, if as many tokens stay taken; `None`: it is full.
fn convert(full_at: Instant, from: Limit, to: Limit, now: Instant) -> Option<Instant> {
    let missing = full_at.saturating_duration_since(now);
    let (from, to) = (from.interval?, to.interval?);
    // An interval is a nanosecond at least.
    let taken = missing.as_secs_f64() / from.as_secs_f64();
    let missing = (taken * to.as_secs_f64()).min(CENTURY.as_secs_f64());
    (missing > 0.0).then(|| now + Duration::from_secs_f64(missing))
}

/// One token bucket. It starts full.
#[derive(Debug, Clone)]
pub struct Bucket {
    limit: Limit,
    /// When all tokens will be there; `None` before the first is taken.
    full_at: Option<Instant>,
}

impl Bucket {
    /// A full bucket.
    pub fn new(limit: Limit) -> Self {
        Self {
            limit,
            full_at: None,
        }
    }

    /// Takes a token, if one is there.
    ///
    /// # Errors
    /// The time until one is there; nothing is taken then.
    pub fn try_take(&mut self, now: Instant) -> Result<(), Duration> {
        self.full_at = self.limit.take(self.full_at, now)?;
        Ok(())
    }

    /// Goes on with another limit; as many tokens stay taken.
    pub fn set_limit(&mut self, limit: Limit, now: Instant) {
        self.full_at = self
            .full_at
            .and_then(|full_at| convert(full_at, self.limit, limit, now));
        self.limit = limit;
    }

    /// Whether a token is there; takes none.
    ///
    /// # Errors
    /// The time until one is there.
    pub fn peek(&self, now: Instant) -> Result<(), Duration> {
        self.limit.check(self.full_at, now)
    }
}

/// Token buckets by key, such as an address or a name; one that is not kept is full.
///
/// At most `capacity` are kept, however many keys there are: whoever floods with ever new keys
/// pushes out the bucket that is the nearest to full, and that loses the least.
#[derive(Debug)]
pub struct KeyedBuckets<K> {
    limit: Limit,
    capacity: usize,
    /// When each bucket that is not full will be.
    full_at: HashMap<K, Instant>,
    /// The same, in the order in which they get full.
    by_time: BTreeSet<(Instant, K)>,
}

impl<K: Hash + Ord + Clone> KeyedBuckets<K> {
    /// No buckets yet; at most `capacity` (at least one) will be kept.
    pub fn new(limit: Limit, capacity: usize) -> Self {
        Self {
            limit,
            capacity: capacity.max(1),
            full_at: HashMap::new(),
            by_time: BTreeSet::new(),
        }
    }

    /// Whether a token is there for `key`; takes none.
    ///
    /// # Errors
    /// The time until one is there.
    pub fn check(&self, key: &K, now: Instant) -> Result<(), Duration> {
        self.limit.check(self.full_at.get(key).copied(), now)
    }

    /// Takes a token of `key`, if one is there.
    ///
    /// # Errors
    /// The time until one is there; nothing is taken then.
    pub fn take(&mut self, key: &K, now: Instant) -> Result<(), Duration> {
        let before = self.full_at.get(key).copied();
        let Some(full_at) = self.limit.take(before, now)? else {
            return Ok(());
        };
        match before {
            Some(before) => {
                self.by_time.remove(&(before, key.clone()));
            }
            None => self.make_room(now),
        }
        self.full_at.insert(key.clone(), full_at);
        self.by_time.insert((full_at, key.clone()));
        Ok(())
    }

    /// Gives back a token that was taken of `key`.
    pub fn give_back(&mut self, key: &K, now: Instant) {
        let Some(before) = self.full_at.get(key).copied() else {
            return;
        };
        self.by_time.remove(&(before, key.clone()));
        let earlier = self
            .limit
            .interval
            .and_then(|interval| before.checked_sub(interval));
        match earlier.filter(|full_at| *full_at > now) {
            Some(full_at) => {
                self.full_at.insert(key.clone(), full_at);
                self.by_time.insert((full_at, key.clone()));
            }
            None => {
                self.full_at.remove(key);
            }
        }
    }

    /// Goes on with another limit; as many tokens stay taken of each key.
    pub fn set_limit(&mut self, limit: Limit, now: Instant) {
        let from = std::mem::replace(&mut self.limit, limit);
        self.by_time.clear();
        self.full_at
            .retain(|key, full_at| match convert(*full_at, from, limit, now) {
                Some(converted) => {
                    *full_at = converted;
                    self.by_time.insert((converted, key.clone()));
                    true
                }
                None => false,
            });
    }

    /// How many buckets are kept.
    pub fn len(&self) -> usize {
        self.full_at.len()
    }

    /// Whether no buckets are kept.
    pub fn is_empty(&self) -> bool {
        self.full_at.is_empty()
    }

    /// Forgets buckets so that one more fits.
    fn make_room(&mut self, now: Instant) {
        // Two full ones for each new one: the map shrinks after a flood, and no call takes long.
        for _ in 0..2 {
            match self.by_time.first() {
                Some((full_at, _)) if *full_at <= now => self.forget_first(),
                _ => break,
            }
        }
        while self.full_at.len() >= self.capacity {
            self.forget_first();
        }
    }

    fn forget_first(&mut self) {
        if let Some((_, key)) = self.by_time.pop_first() {
            self.full_at.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    proptest! {
        #[test]
        fn what_was_taken_stays_taken_when_the_limit_changes(
            rate in 0.01..1_000_f64,
            burst in 1..500_u32,
            other in 0.01..1_000_f64,
            taken in 0..500_u32,
        ) {
            let now = Instant::now();
            let taken = taken.min(burst);
            let mut one = Bucket::new(Limit::new(rate, burst));
            let mut many = KeyedBuckets::new(Limit::new(rate, burst), 8);
            for _ in 0..taken {
                prop_assert_eq!(one.try_take(now), Ok(()));
                prop_assert_eq!(many.take(&"ann", now), Ok(()));
            }
            one.set_limit(Limit::new(other, burst), now);
            many.set_limit(Limit::new(other, burst), now);
            let mut left = 0;
            while one.try_take(now).is_ok() {
                prop_assert_eq!(many.take(&"ann", now), Ok(()));
                left += 1;
            }
            prop_assert!(many.take(&"ann", now).is_err());
            // Whole nanoseconds are rounded.
            prop_assert!(left == burst - taken || left + 1 == burst - taken, "{} left", left);
            many.set_limit(Limit::UNLIMITED, now);
            prop_assert!(many.is_empty());
            prop_assert_eq!(many.take(&"ann", now), Ok(()));
        }
    }

    #[test]
    fn what_is_given_back_can_be_taken_again() {
        let now = Instant::now();
        let mut buckets = KeyedBuckets::new(Limit::new(1.0, 2), 8);
        for _ in 0..2 {
            assert_eq!(buckets.take(&"ann", now), Ok(()));
        }
        assert!(buckets.take(&"ann", now).is_err());
        buckets.give_back(&"ann", now);
        assert_eq!(buckets.take(&"ann", now), Ok(()));
        assert!(buckets.take(&"ann", now).is_err());
        for _ in 0..5 {
            buckets.give_back(&"ann", now);
        }
        assert!(buckets.is_empty(), "never more than full");
    }

    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_burst_then_the_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::new(Limit::new(20.0, 60));
        for _ in 0..60 {
            assert_eq!(bucket.try_take(start), Ok(()));
        }
        assert_eq!(bucket.peek(start), Err(SECOND / 20));
        assert_eq!(bucket.try_take(start), Err(SECOND / 20));
        assert_eq!(bucket.try_take(start + SECOND / 20), Ok(()));
        assert_eq!(bucket.try_take(start + SECOND / 20), Err(SECOND / 20));
        // A long pause fills it, and never to more than the burst.
        let later = start + 1000 * SECOND;
        let granted = (0..100).filter(|_| bucket.try_take(later).is_ok()).count();
        assert_eq!(granted, 60);
    }

    #[test]
    fn peeking_takes_nothing() {
        let now = Instant::now();
        let mut bucket = Bucket::new(Limit::new(1.0, 1));
        assert_eq!(bucket.peek(now), Ok(()));
        assert_eq!(bucket.peek(now), Ok(()));
        assert_eq!(bucket.try_take(now), Ok(()));
        let mut keyed = KeyedBuckets::new(Limit::new(1.0, 1), 10);
        assert_eq!(keyed.check(&"a", now), Ok(()));
        assert!(keyed.is_empty());
        assert_eq!(keyed.take(&"a", now), Ok(()));
        assert_eq!(keyed.check(&"a", now), Err(SECOND));
    }

    #[test]
    fn no_rate_no_limit() {
        let now = Instant::now();
        for rate in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let limit = Limit::new(rate, 1);
            assert!(limit.is_unlimited());
            let mut bucket = Bucket::new(limit);
            assert!((0..1000).all(|_| bucket.try_take(now).is_ok()));
            let mut keyed = KeyedBuckets::new(limit, 1);
            assert!((0..1000).all(|_| keyed.take(&"a", now).is_ok()));
            assert!(keyed.is_empty());
        }
    }

    #[test]
    fn extreme_limits_do_not_overflow() {
        let now = Instant::now();
        for rate in [f64::MIN_POSITIVE, 1e-12, 1e12, f64::MAX] {
            for burst in [0, 1, u32::MAX] {
                let mut bucket = Bucket::new(Limit::new(rate, burst));
                assert_eq!(bucket.try_take(now), Ok(()));
                let _ = bucket.try_take(now);
            }
        }
    }

    #[test]
    fn keys_have_buckets_of_their_own() {
        let now = Instant::now();
        let mut keyed = KeyedBuckets::new(Limit::new(0.5, 1), 10);
        assert_eq!(keyed.take(&"a", now), Ok(()));
        assert_eq!(keyed.take(&"a", now), Err(2 * SECOND));
        assert_eq!(keyed.take(&"b", now), Ok(()));
    }

    #[test]
    fn a_flood_of_keys_does_not_free_the_heaviest() {
        let now = Instant::now();
        let mut keyed = KeyedBuckets::new(Limit::new(1.0, 5), 100);
        while keyed.take(&u32::MAX, now).is_ok() {}
        for key in 0..10_000 {
            assert_eq!(keyed.take(&key, now), Ok(()));
            assert!(keyed.len() <= 100);
        }
        assert_eq!(keyed.check(&u32::MAX, now), Err(SECOND));
        // After the flood, what is full goes.
        let later = now + 60 * SECOND;
        for key in 0..100 {
            assert_eq!(keyed.take(&key, later + key * SECOND), Ok(()));
        }
        assert!(keyed.len() < 10, "{}", keyed.len());
    }

    proptest! {
        #[test]
        fn never_more_than_burst_and_rate_and_honest_waits(
            rate in 0.01f64..5000.0,
            burst in 1u32..100,
            steps in proptest::collection::vec((0u64..200_000_000, 1usize..20), 1..100),
        ) {
            let start = Instant::now();
            let mut now = start;
            let mut bucket = Bucket::new(Limit::new(rate, burst));
            let mut grants: Vec<Instant> = Vec::new();
            for (nanos, tries) in steps {
                now += Duration::from_nanos(nanos);
                for _ in 0..tries {
                    prop_assert_eq!(bucket.peek(now), bucket.clone().try_take(now));
                    match bucket.try_take(now) {
                        Ok(()) => grants.push(now),
                        Err(wait) => {
                            prop_assert!(wait > Duration::ZERO);
                            prop_assert_eq!(bucket.clone().try_take(now + wait), Ok(()));
                            let early = now + wait - Duration::from_nanos(1);
                            prop_assert_eq!(
                                bucket.clone().try_take(early),
                                Err(Duration::from_nanos(1))
                            );
                        }
                    }
                }
            }
            // In every window from one grant to another.
            for (i, from) in grants.iter().enumerate() {
                for (j, to) in grants.iter().enumerate().skip(i) {
                    let allowed = f64::from(burst) + rate * (*to - *from).as_secs_f64();
                    prop_assert!((j - i + 1) as f64 <= allowed + 1e-6);
                }
            }
        }

        #[test]
        fn keyed_is_a_bucket_per_key_and_stays_bounded(
            takes in proptest::collection::vec((0u8..20, 0u64..500_000_000), 1..300),
            capacity in 1usize..30,
        ) {
            let limit = Limit::new(2.0, 3);
            let mut keyed = KeyedBuckets::new(limit, capacity);
            let mut buckets: HashMap<u8, Bucket> = HashMap::new();
            let mut now = Instant::now();
            for (key, nanos) in takes {
                now += Duration::from_nanos(nanos);
                let single = buckets.entry(key).or_insert_with(|| Bucket::new(limit));
                let checked = keyed.check(&key, now);
                let taken = keyed.take(&key, now);
                prop_assert_eq!(checked, taken);
                if capacity >= 20 {
                    prop_assert_eq!(taken, single.try_take(now));
                }
                prop_assert!(keyed.len() <= capacity);
                prop_assert_eq!(keyed.len(), keyed.by_time.len());
            }
        }
    }
}
