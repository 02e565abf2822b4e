//! Which worker has the living sessions of an address.
//!
//! The registry writes it, the router reads it: an address stays with the worker that has its
//! sessions, because a polling client's next request must reach the process that knows it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::presence::Session;

/// Living sessions by address, and the workers that should get nothing new.
#[derive(Debug, Default)]
pub struct Affinity {
    inner: Mutex<Inner>,
    /// Whether the registry knows what the workers know: before that, an address could be sent
    /// away from its sessions.
    known: AtomicBool,
}

#[derive(Debug, Default)]
struct Inner {
    /// Where each user's living session is, to know what an update replaces.
    users: HashMap<String, (String, u32)>,
    /// How many living sessions an address has on each worker.
    addresses: HashMap<String, BTreeMap<u32, usize>>,
    /// Workers whose dispatch loop has not answered for a while.
    suspended: HashSet<u32>,
}

impl Affinity {
    /// Notes the session that a user has now.
    pub fn update(&self, user: &str, session: Option<&Session>) {
        let place = session
            .filter(|session| !session.lost)
            .map(|session| (session.owner.address.clone(), session.owner.worker));
        let mut inner = self.inner.lock();
        let old = match &place {
            Some(place) => inner.users.insert(user.to_owned(), place.clone()),
            None => inner.users.remove(user),
        };
        if let Some((address, worker)) = old {
            inner.decrease(&address, worker);
        }
        if let Some((address, worker)) = place {
            *inner
                .addresses
                .entry(address)
                .or_default()
                .entry(worker)
                .or_default() += 1;
        }
    }

    /// The registry is complete.
    pub fn set_known(&self) {
        self.known.store(true, Ordering::Release);
    }

    /// Whether the registry is complete.
    pub fn is_known(&self) -> bool {
        self.known.load(Ordering::Acquire)
    }

    /// The worker with the most living sessions of an address.
    pub fn of(&self, address: &str) -> Option<u32> {
        let inner = self.inner.lock();
        let workers = inner.addresses.get(address)?;
        workers
            .iter()
            .max_by_key(|(_, count)| **count)
            .map(|(worker, _)| *worker)
    }

    /// Gives a worker no new connections until it is heard again, or ends that.
    pub fn suspend(&self, worker: u32, suspended: bool) {
        let mut inner = self.inner.lock();
        if suspended {
            inner.suspended.insert(worker);
        } else {
            inner.suspended.remove(&worker);
        }
    }

    /// Whether a worker is to get no new connections.
    pub fn is_suspended(&self, worker: u32) -> bool {
        self.inner.lock().suspended.contains(&worker)
    }
}

impl Inner {
    fn decrease(&mut self, address: &str, worker: u32) {
        let Some(workers) = self.addresses.get_mut(address) else {
            return;
        };
        if let Some(count) = workers.get_mut(&worker) {
            *count -= 1;
            if *count == 0 {
                workers.remove(&worker);
            }
        }
        if workers.is_empty() {
            self.addresses.remove(address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::presence::Owner;

    fn session(address: &str, worker: u32, lost: bool) -> Session {
        let owner = Owner {
            generation: 1,
            worker,
            boot: String::new(),
            connection: String::new(),
            address: address.into(),
            secret: String::new(),
        };
        let channels = BTreeMap::new();
        Session {
            owner,
            lost,
            resumed: false,
            confirmed: 0,
            channels,
        }
    }

    #[test]
    fn an_address_stays_where_its_living_sessions_are() {
        let affinity = Affinity::default();
        affinity.update("ann", Some(&session("a", 1, false)));
        affinity.update("bob", Some(&session("a", 2, false)));
        affinity.update("eve", Some(&session("a", 2, false)));
        assert_eq!(affinity.of("a"), Some(2));
        affinity.update("bob", Some(&session("a", 2, true)));
        affinity.update("eve", None);
        assert_eq!(affinity.of("a"), Some(1));
        affinity.update("ann", Some(&session("b", 1, false)));
        assert_eq!((affinity.of("a"), affinity.of("b")), (None, Some(1)));
    }
}
