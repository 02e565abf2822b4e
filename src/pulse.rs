//! Signs of life. One loop of each process feeds the watchdog; the others, which it could outlive, show
//! it that they still go round.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How often a loop with nothing to do has to [beat](Pulse::beat).
pub const BEAT: Duration = Duration::from_secs(1);

/// What [`Pulse::rest`] leaves.
const RESTING: u64 = u64::MAX;

/// Shows that a loop goes round. Clones are the same.
#[derive(Debug, Clone)]
pub struct Pulse {
    begin: Instant,
    /// Nanoseconds from `begin` to the last beat.
    last: Arc<AtomicU64>,
}

impl Pulse {
    /// Begins with a beat.
    pub fn new() -> Self {
        Self {
            begin: Instant::now(),
            last: Arc::new(AtomicU64::new(0)),
        }
    }

    /// The loop has gone round.
    pub fn beat(&self) {
        let nanos = u64::try_from(self.begin.elapsed().as_nanos()).unwrap_or(RESTING);
        self.last.store(nanos, Ordering::Release);
    }

    /// The loop has ended in good order, and is not to be waited for.
    pub fn rest(&self) {
        self.last.store(RESTING, Ordering::Release);
    }

    /// Whether there has been a beat within this time, or the loop has ended.
    pub fn is_felt(&self, within: Duration) -> bool {
        let last = Duration::from_nanos(self.last.load(Ordering::Acquire));
        self.begin.elapsed().saturating_sub(last) <= within
    }
}

#[cfg(test)]
impl Pulse {
    /// One whose loop has not gone round for a minute.
    pub fn silent() -> Self {
        Self {
            begin: Instant::now() - Duration::from_secs(60),
            ..Self::new()
        }
    }
}

impl Default for Pulse {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pulse_is_felt_for_a_while_after_a_beat_and_always_at_rest() {
        let pulse = Pulse::silent();
        let within = Duration::from_secs(30);
        assert!(!pulse.is_felt(within));
        pulse.clone().beat();
        assert!(pulse.is_felt(within));
        pulse.last.store(0, Ordering::Release);
        pulse.rest();
        assert!(pulse.is_felt(within));
    }
}
