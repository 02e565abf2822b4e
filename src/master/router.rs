//! Chooses a worker for every connection and hands it over.
//!
//! One task owns what is under way. A worker says how many unacknowledged connections it takes
//! ([`Credit`]); the master keeps its own copy of each until it is acknowledged, and routes it
//! anew when the worker dies or says nothing for [`SILENCE`].

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::affinity::Affinity;
use super::recent::{self, Recent};
use super::refusal::{Refusal, Refusals};
use super::status::Able;
use crate::handoff::{self, Credit, KnownBy, MasterEnd, Offer, ToMaster, ToWorker, WorkerState};
use crate::pulse::Pulse;
use crate::routing::{self, RoutingKey};

/// A worker that has not acknowledged a connection for so long is passed over, and the
/// connection goes elsewhere.
const SILENCE: Duration = Duration::from_millis(500);

/// Accepted connections on their way to the router. Few: a master that dies resets them.
const ACCEPTED_QUEUE: usize = 4;

/// Frames from workers on their way to the router.
const FRAME_QUEUE: usize = 256;

/// How long a connection waits for a worker that has its address' sessions and is not there yet.
const PATIENCE: Duration = Duration::from_secs(1);

/// Accepted connections that may wait for an acknowledgement before no more are accepted.
const WAITING: usize = 64;

/// An accepted connection.
#[derive(Debug)]
pub struct Accepted {
    /// The socket.
    pub stream: OwnedFd,
    /// Where the connection comes from.
    pub peer: SocketAddr,
    /// The client's address.
    pub client: IpAddr,
    /// How that is known.
    pub known_by: KnownBy,
    /// What it is routed by.
    pub key: RoutingKey,
    /// When it was accepted.
    pub since: Instant,
    /// Kept for as long as the master has to do with it.
    pub under_way: TaskTrackerToken,
}

/// What the hand-off streams tell the router.
#[derive(Debug)]
enum FromLink {
    Joined {
        link: u64,
        worker: u32,
        end: Arc<MasterEnd>,
    },
    Frame {
        link: u64,
        frame: ToMaster,
    },
    Gone {
        link: u64,
    },
}

/// The way to the router.
#[derive(Debug, Clone)]
pub struct RouterHandle {
    accepted: mpsc::Sender<Accepted>,
    links: mpsc::Sender<FromLink>,
}

impl RouterHandle {
    /// Routes a connection; `None` once the router has stopped.
    pub async fn route(&self, accepted: Accepted) -> Option<()> {
        self.accepted.send(accepted).await.ok()
    }
}

/// What others may know of the router.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Of its loop.
    pub pulse: Pulse,
    routed: AtomicU64,
    able: Mutex<Able>,
}

impl Traffic {
    /// Connections that workers took.
    pub fn routed(&self) -> u64 {
        self.routed.load(Ordering::Relaxed)
    }

    /// Whether connections that come in find a worker.
    pub fn able(&self) -> Able {
        *self.able.lock()
    }
}

/// Starts the router. The gate is open while it wants connections to be accepted.
pub fn spawn(
    tasks: &TaskTracker,
    affinity: Arc<Affinity>,
    refusals: Refusals,
    stop: CancellationToken,
) -> (RouterHandle, watch::Receiver<bool>, Arc<Traffic>) {
    let (accepted, accepted_rx) = mpsc::channel(ACCEPTED_QUEUE);
    let (links, links_rx) = mpsc::channel(FRAME_QUEUE);
    let (gate, gate_rx) = watch::channel(false);
    let traffic = Arc::new(Traffic::default());
    let router = Router {
        affinity,
        traffic: traffic.clone(),
        gate,
        slots: BTreeMap::new(),
        recent: Recent::default(),
        waiting: VecDeque::new(),
        next_seq: 1,
        refusals,
    };
    let pulse = traffic.pulse.clone();
    tasks.spawn(async move {
        let _ = stop
            .run_until_cancelled(router.run(accepted_rx, links_rx))
            .await;
        pulse.rest();
    });
    (RouterHandle { accepted, links }, gate_rx, traffic)
}

/// Accepts the workers' hand-off connections.
pub async fn serve_workers(
    listener: handoff::Listener,
    router: RouterHandle,
    stop: CancellationToken,
) {
    let streams = TaskTracker::new();
    let accepting = async {
        for link in 0.. {
            match listener.accept().await {
                Ok(end) => {
                    let links = router.links.clone();
                    let stop = stop.clone();
                    streams.spawn(async move {
                        let _ = stop
                            .run_until_cancelled(serve_worker(link, end, links))
                            .await;
                    });
                }
                Err(error) => {
                    tracing::warn!("accepting a hand-off connection failed: {error}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    };
    let _ = stop.run_until_cancelled(accepting).await;
    streams.close();
    streams.wait().await;
}

/// Reads one worker's frames.
async fn serve_worker(link: u64, end: MasterEnd, links: mpsc::Sender<FromLink>) {
    let end = Arc::new(end);
    loop {
        let input = match end.recv().await {
            Ok(Some(ToMaster::Hello {
                protocol, worker, ..
            })) => {
                if protocol != handoff::PROTOCOL {
                    tracing::warn!(worker, protocol, "a worker of another version: no hand-off");
                    break;
                }
                FromLink::Joined {
                    link,
                    worker,
                    end: end.clone(),
                }
            }
            Ok(Some(frame)) => FromLink::Frame { link, frame },
            Ok(None) => break,
            Err(error) => {
                tracing::warn!("a hand-off connection failed: {error}");
                break;
            }
        };
        if links.send(input).await.is_err() {
            return;
        }
    }
    // The router may have stopped first; then nobody needs to know.
    let _ = links.send(FromLink::Gone { link }).await;
}

/// A worker as the router sees it.
#[derive(Debug)]
struct Slot {
    link: u64,
    end: Arc<MasterEnd>,
    credit: Credit,
    /// Sent and not acknowledged, by sequence number.
    unacknowledged: BTreeMap<u64, (Instant, Accepted)>,
    /// Let an offer go unanswered for [`SILENCE`], and has not been heard since.
    silent: bool,
    /// Since when it takes connections from anybody.
    serving_since: Option<Instant>,
}

/// What the choice needs to know of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Standing {
    worker: u32,
    state: WorkerState,
    /// Connections that it takes from anybody.
    window: u32,
    /// More, that it takes from addresses with living sessions on it.
    reserve: u32,
    /// It takes nothing from anybody, however many it acknowledges.
    exhausted: bool,
    /// Not to be given anything now.
    passed_over: bool,
    /// It has not served for long: who is on the way to another worker is not torn away from there.
    settling: bool,
}

/// What is known of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ties {
    /// The worker that has its living sessions.
    home: Option<u32>,
    /// The worker that it connected to a moment ago.
    lately: Option<u32>,
}

/// Where a connection goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    Worker(u32),
    /// Somebody will be able to take it.
    Wait,
    /// Everybody is full.
    Refuse,
}

/// Chooses a worker for an address. `patient` says that the connection has not waited long.
fn choose(key: &RoutingKey, ties: Ties, standings: &[Standing], patient: bool) -> Choice {
    match ties
        .home
        .map(|home| standings.iter().find(|s| s.worker == home))
    {
        // It lives, or it would have no sessions, and is about to open its hand-off stream.
        Some(None) if patient => return Choice::Wait,
        Some(Some(home)) if home.state == WorkerState::Starting && patient => {
            return Choice::Wait;
        }
        Some(Some(home))
            if matches!(home.state, WorkerState::Serving | WorkerState::Full)
                && !home.passed_over
                && !home.exhausted =>
        {
            return if home.window + home.reserve > 0 {
                Choice::Worker(home.worker)
            } else {
                Choice::Wait
            };
        }
        _ => {}
    }
    let serving = |worker: u32| {
        standings
            .iter()
            .find(|s| s.worker == worker && s.state == WorkerState::Serving && !s.passed_over)
    };
    // A worker that has only yet to acknowledge others is worth the moment: a polling client's
    // requests must meet the same worker also before its session is registered.
    let ranked = routing::ranked(key, standings.iter().map(|s| s.worker));
    if let Some(worker) = ranked.into_iter().find_map(serving) {
        let before = ties.lately.and_then(serving).filter(|_| worker.settling);
        let worker = before.unwrap_or(worker);
        return if worker.window > 0 {
            Choice::Worker(worker.worker)
        } else {
            Choice::Wait
        };
    }
    if !standings.is_empty() && standings.iter().all(|s| s.state == WorkerState::Full) {
        Choice::Refuse
    } else {
        Choice::Wait
    }
}

/// Whether connections that come in find a worker.
fn able(standings: &[Standing]) -> Able {
    let any = |state| standings.iter().any(|s| s.state == state);
    let all = |state| standings.iter().all(|s| s.state == state);
    let serves = |s: &Standing| s.state == WorkerState::Serving && !s.passed_over;
    if standings.is_empty() {
        Able::Nobody
    } else if standings.iter().any(serves) {
        Able::Served
    } else if all(WorkerState::Full) {
        Able::Full
    } else if any(WorkerState::Serving) {
        Able::Silent
    } else if any(WorkerState::Starting) {
        Able::Starting
    } else {
        Able::Draining
    }
}

struct Router {
    affinity: Arc<Affinity>,
    traffic: Arc<Traffic>,
    gate: watch::Sender<bool>,
    slots: BTreeMap<u32, Slot>,
    recent: Recent,
    /// Accepted, and nobody could take them yet.
    waiting: VecDeque<Accepted>,
    next_seq: u64,
    refusals: Refusals,
}

impl Router {
    async fn run(
        mut self,
        mut accepted: mpsc::Receiver<Accepted>,
        mut links: mpsc::Receiver<FromLink>,
    ) {
        let mut tick = tokio::time::interval(SILENCE / 10);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                // Not to be starved by what follows.
                due = tick.tick() => {
                    // What came before counts first. After a standstill of the process it may not even
                    // have been read: then nothing is overdue before the next tick. Else two workers
                    // would serve one connection.
                    while let Ok(input) = links.try_recv() {
                        self.heard(input);
                    }
                    if due.elapsed() < SILENCE / 5 {
                        self.take_back_unanswered();
                    }
                    self.recent.sweep(Instant::now());
                }
                // Acknowledgements before connections: they make room.
                Some(input) = links.recv() => self.heard(input),
                Some(connection) = accepted.recv() => self.waiting.push_back(connection),
                else => return,
            }
            self.route_waiting();
            self.set_gate();
            self.traffic.pulse.beat();
        }
    }

    fn heard(&mut self, input: FromLink) {
        match input {
            FromLink::Joined { link, worker, end } => {
                let credit = Credit {
                    window: 0,
                    reserve: 0,
                    state: WorkerState::Starting,
                };
                let slot = Slot {
                    link,
                    end,
                    credit,
                    unacknowledged: BTreeMap::new(),
                    silent: false,
                    serving_since: None,
                };
                if let Some(old) = self.slots.insert(worker, slot) {
                    self.take_back(old);
                }
            }
            FromLink::Gone { link } => {
                let worker = self
                    .slots
                    .iter()
                    .find(|(_, s)| s.link == link)
                    .map(|(w, _)| *w);
                if let Some(old) = worker.and_then(|worker| self.slots.remove(&worker)) {
                    self.take_back(old);
                }
            }
            FromLink::Frame { link, frame } => {
                let Some(slot) = self.slots.values_mut().find(|slot| slot.link == link) else {
                    return;
                };
                slot.silent = false;
                match frame {
                    // Ours is only a copy: dropping it leaves the worker's open.
                    ToMaster::Ack { seq } => {
                        if slot.unacknowledged.remove(&seq).is_some() {
                            self.traffic.routed.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    ToMaster::Refuse { seq } => {
                        if let Some((_, connection)) = slot.unacknowledged.remove(&seq) {
                            self.waiting.push_front(connection);
                        }
                    }
                    ToMaster::Credit(credit) => {
                        slot.serving_since = match credit.state {
                            WorkerState::Serving => slot.serving_since.or(Some(Instant::now())),
                            _ => None,
                        };
                        slot.credit = credit;
                    }
                    ToMaster::Hello { .. } => {}
                }
            }
        }
    }

    /// Routes anew what a worker that is gone had not acknowledged.
    fn take_back(&mut self, slot: Slot) {
        for (_, connection) in slot.unacknowledged.into_values().rev() {
            self.waiting.push_front(connection);
        }
    }

    fn take_back_unanswered(&mut self) {
        let now = Instant::now();
        let mut overdue = Vec::new();
        for (worker, slot) in &mut self.slots {
            // Only those: a younger one the worker may still take, should it come back to life.
            let late: Vec<_> = slot
                .unacknowledged
                .extract_if(.., |_, (sent, _)| now.duration_since(*sent) >= SILENCE)
                .collect();
            if !late.is_empty() {
                tracing::warn!(
                    worker,
                    connections = late.len(),
                    "the worker does not take connections: routing them anew"
                );
                slot.silent = true;
                overdue.extend(late.into_iter().map(|(_, sent)| sent));
            }
        }
        for (_, connection) in overdue.into_iter().rev() {
            self.waiting.push_front(connection);
        }
    }

    fn route_waiting(&mut self) {
        if !self.affinity.is_known() {
            return;
        }
        let mut unplaced = VecDeque::new();
        while let Some(connection) = self.waiting.pop_front() {
            let ties = Ties {
                home: self.affinity.of(&connection.key.to_string()),
                lately: self.recent.of(&connection.key, Instant::now()),
            };
            let patient = connection.since.elapsed() < PATIENCE;
            match choose(&connection.key, ties, &self.standings(), patient) {
                Choice::Worker(worker) => {
                    if let Some(connection) = self.hand_over(worker, connection) {
                        unplaced.push_back(connection);
                    }
                }
                Choice::Wait => unplaced.push_back(connection),
                Choice::Refuse => {
                    let Accepted {
                        stream,
                        client,
                        under_way,
                        ..
                    } = connection;
                    self.refusals
                        .refuse(stream, client, under_way, Refusal::Full);
                }
            }
        }
        self.waiting = unplaced;
    }

    fn standings(&self) -> Vec<Standing> {
        self.slots
            .iter()
            .map(|(worker, slot)| {
                let outstanding = u32::try_from(slot.unacknowledged.len()).unwrap_or(u32::MAX);
                Standing {
                    worker: *worker,
                    state: slot.credit.state,
                    window: slot.credit.window.saturating_sub(outstanding),
                    reserve: (slot.credit.window + slot.credit.reserve)
                        .saturating_sub(outstanding)
                        .min(slot.credit.reserve),
                    exhausted: slot.credit.window + slot.credit.reserve == 0,
                    passed_over: slot.silent || self.affinity.is_suspended(*worker),
                    settling: slot
                        .serving_since
                        .is_some_and(|since| since.elapsed() < recent::SETTLING),
                }
            })
            .collect()
    }

    /// Sends a connection to a worker; returns it if that cannot be done.
    fn hand_over(&mut self, worker: u32, connection: Accepted) -> Option<Accepted> {
        let Some(slot) = self.slots.get_mut(&worker) else {
            return Some(connection);
        };
        let seq = self.next_seq;
        self.next_seq += 1;
        let offer = Offer {
            seq,
            peer: connection.peer,
            client: connection.client,
            known_by: connection.known_by,
            at: handoff::monotonic_millis(),
        };
        match slot
            .end
            .try_send(&ToWorker::Offer(offer), connection.stream.as_fd())
        {
            Ok(()) => {
                let now = Instant::now();
                self.recent.note(connection.key, worker, now);
                slot.unacknowledged.insert(seq, (now, connection));
                None
            }
            Err(error) => {
                // Its end will be noticed by the reader; until then it gets nothing.
                tracing::debug!(worker, %error, "hand-off failed");
                slot.silent = true;
                Some(connection)
            }
        }
    }

    fn set_gate(&self) {
        let standings = self.standings();
        let able = able(&standings);
        *self.traffic.able.lock() = able;
        let open = self.affinity.is_known()
            && self.waiting.len() < WAITING
            && match able {
                Able::Served => standings
                    .iter()
                    .any(|s| s.state == WorkerState::Serving && s.window > 0 && !s.passed_over),
                Able::Full => true,
                Able::Nobody | Able::Starting | Able::Draining | Able::Silent => false,
            };
        self.gate
            .send_if_modified(|gate| std::mem::replace(gate, open) != open);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> RoutingKey {
        RoutingKey::of(IpAddr::from([10, 0, 0, n]))
    }

    fn standing(worker: u32, state: WorkerState, window: u32) -> Standing {
        Standing {
            worker,
            state,
            window,
            reserve: 0,
            exhausted: window == 0,
            passed_over: false,
            settling: false,
        }
    }

    use WorkerState::{Draining, Full, Serving, Starting};

    fn at(home: Option<u32>) -> Ties {
        Ties { home, lately: None }
    }

    #[test]
    fn who_is_on_the_way_to_a_worker_is_not_torn_away_by_one_that_begins_to_serve() {
        let all = [0, 1].map(|worker| standing(worker, Serving, 1));
        let Choice::Worker(own) = choose(&key(1), at(None), &all, true) else {
            panic!("no worker")
        };
        let ties = Ties {
            home: None,
            lately: Some(1 - own),
        };
        let settling = all.map(|s| Standing {
            settling: s.worker == own,
            ..s
        });
        assert_eq!(
            choose(&key(1), ties, &settling, true),
            Choice::Worker(1 - own)
        );
        assert_eq!(
            choose(&key(1), at(None), &settling, true),
            Choice::Worker(own)
        );
        assert_eq!(choose(&key(1), ties, &all, true), Choice::Worker(own));
        let gone = settling.map(|s| match s.worker == own {
            true => s,
            false => standing(s.worker, Draining, 0),
        });
        assert_eq!(choose(&key(1), ties, &gone, true), Choice::Worker(own));
    }

    #[test]
    fn without_sessions_the_hash_decides_and_a_full_worker_is_passed_over() {
        let all = [0, 1, 2].map(|worker| standing(worker, Serving, 1));
        let Choice::Worker(first) = choose(&key(1), at(None), &all, true) else {
            panic!("no worker")
        };
        let full = all.map(|s| match s.worker == first {
            true => standing(s.worker, Full, 0),
            false => s,
        });
        let Choice::Worker(second) = choose(&key(1), at(None), &full, true) else {
            panic!("no worker")
        };
        assert_ne!(first, second);
    }

    #[test]
    fn a_worker_that_has_yet_to_acknowledge_others_is_waited_for() {
        let all = [0, 1, 2].map(|worker| standing(worker, Serving, 1));
        let Choice::Worker(first) = choose(&key(1), at(None), &all, true) else {
            panic!("no worker")
        };
        let busy = all.map(|s| Standing {
            window: u32::from(s.worker != first),
            ..s
        });
        assert_eq!(choose(&key(1), at(None), &busy, true), Choice::Wait);
    }

    #[test]
    fn an_address_with_living_sessions_stays_with_its_worker_even_when_that_is_full() {
        for home in 0..3 {
            let all = [0, 1, 2].map(|worker| {
                let state = if worker == home { Full } else { Serving };
                Standing {
                    reserve: 1,
                    exhausted: false,
                    ..standing(worker, state, u32::from(state == Serving))
                }
            });
            assert_eq!(
                choose(&key(1), at(Some(home)), &all, true),
                Choice::Worker(home)
            );
        }
    }

    #[test]
    fn an_address_waits_a_while_for_its_worker_to_open_its_hand_off_stream() {
        let absent = vec![standing(1, Serving, 5)];
        let starting = vec![standing(0, Starting, 0), standing(1, Serving, 5)];
        for others in [absent, starting] {
            assert_eq!(choose(&key(1), at(Some(0)), &others, true), Choice::Wait);
            assert_eq!(
                choose(&key(1), at(Some(0)), &others, false),
                Choice::Worker(1)
            );
        }
    }

    #[test]
    fn it_waits_for_its_worker_to_acknowledge_others() {
        let busy = Standing {
            exhausted: false,
            ..standing(0, Serving, 0)
        };
        let all = [busy, standing(1, Serving, 5)];
        assert_eq!(choose(&key(1), at(Some(0)), &all, true), Choice::Wait);
    }

    #[test]
    fn an_address_whose_worker_has_used_up_its_reserve_keeps_nobody_waiting() {
        let all = [standing(0, Full, 0), standing(1, Serving, 5)];
        assert_eq!(choose(&key(1), at(Some(0)), &all, true), Choice::Worker(1));
        let all = [standing(0, Full, 0), standing(1, Full, 0)];
        assert_eq!(choose(&key(1), at(Some(0)), &all, true), Choice::Refuse);
    }

    #[test]
    fn a_worker_that_drains_or_is_silent_keeps_nobody() {
        let draining = [standing(0, Draining, 0), standing(1, Serving, 5)];
        assert_eq!(
            choose(&key(1), at(Some(0)), &draining, true),
            Choice::Worker(1)
        );
        let silent = [
            Standing {
                passed_over: true,
                ..standing(0, Serving, 5)
            },
            standing(1, Serving, 5),
        ];
        assert_eq!(
            choose(&key(1), at(Some(0)), &silent, true),
            Choice::Worker(1)
        );
    }

    #[tokio::test]
    async fn only_what_is_overdue_is_routed_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handoff.sock");
        let listener = handoff::Listener::bind(&path).unwrap();
        let _worker = handoff::WorkerEnd::connect(&path).unwrap();
        let end = Arc::new(listener.accept().await.unwrap());
        let tracker = TaskTracker::new();
        let sent = |seq: u64, ago: Duration| {
            let connection = Accepted {
                stream: std::fs::File::open("/dev/null").unwrap().into(),
                peer: ([127, 0, 0, 1], seq as u16).into(),
                known_by: KnownBy::Connection,
                client: [127, 0, 0, 1].into(),
                key: key(1),
                since: Instant::now(),
                under_way: tracker.token(),
            };
            (seq, (Instant::now() - ago, connection))
        };
        let credit = Credit {
            window: 5,
            reserve: 0,
            state: Serving,
        };
        let slot = Slot {
            link: 1,
            end,
            credit,
            // The worker may come back to life just now, and takes what is young.
            unacknowledged: BTreeMap::from([
                sent(1, SILENCE),
                sent(2, SILENCE),
                sent(3, SILENCE / 2),
            ]),
            silent: false,
            serving_since: None,
        };
        let (gate, _) = watch::channel(false);
        let mut router = Router {
            affinity: Arc::default(),
            traffic: Arc::default(),
            gate,
            recent: Recent::default(),
            slots: BTreeMap::from([(0, slot)]),
            waiting: VecDeque::new(),
            next_seq: 4,
            refusals: Refusals::default(),
        };
        router.take_back_unanswered();
        let ports = router.waiting.iter().map(|one| one.peer.port());
        assert_eq!(ports.collect::<Vec<_>>(), [1, 2]);
        let slot = &router.slots[&0];
        assert!(slot.silent, "nothing more for it now");
        assert_eq!(slot.unacknowledged.keys().collect::<Vec<_>>(), [&3]);
    }

    #[test]
    fn only_when_all_are_full_a_client_is_refused() {
        let full = [standing(0, Full, 0), standing(1, Full, 0)];
        assert_eq!(choose(&key(1), at(None), &full, true), Choice::Refuse);
        let starting = [standing(0, Full, 0), standing(1, Starting, 0)];
        assert_eq!(choose(&key(1), at(None), &starting, true), Choice::Wait);
        assert_eq!(choose(&key(1), at(None), &[], true), Choice::Wait);
    }
}
