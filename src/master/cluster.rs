//! Runs the registry: the control streams of the workers, what they ask and what they are told.
//!
//! One task ([`Cluster`]) owns the registry. Each stream has a reader, which passes on what the
//! registry must decide and serves store requests beside it, and a writer with a bounded queue:
//! a worker that does not read loses its stream, and never holds the master up.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{SinkExt as _, StreamExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::codec::{FramedRead, FramedWrite};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::affinity::Affinity;
use super::registry::{Now, Origin, Outcome, Registry, Timing};
use super::router::Traffic;
use super::status::Facts;
use crate::control::{
    self, Command, FromMaster, FromWorker, Hello, JoinedElsewhere, PROTOCOL, Reply,
};
use crate::presence::{CatchUp, Event, Numbered};
use crate::pulse::Pulse;
use crate::store::embedded::Embedded;
use crate::store::redis::RedisStore;
use crate::store::{BusSink, StoreError, remote};
use crate::systemd;

/// Frames waiting for one worker to read them.
const WORKER_QUEUE: usize = 8192;
/// Frames from all workers waiting for the registry.
const INPUT_QUEUE: usize = 1024;
/// Store requests of one worker that are carried out at once.
const STORE_REQUESTS: usize = 512;
/// How often workers are asked whether they live, and told the log's end.
const TICK: Duration = Duration::from_secs(1);
/// Ticks left unanswered after which a worker gets no new connections.
const SUSPECT_AFTER: u32 = 3;
/// Ticks left unanswered after which a worker is dead.
const DEAD_AFTER: u32 = 5;
/// How long a master that starts waits for the workers it should have.
const RECOVERY: Duration = Duration::from_secs(2);
/// How long a newcomer is held while the connection that has its name is probed.
const CONTEST: Duration = Duration::from_secs(3);
/// How long a worker may take to put a socket into a room for another worker.
const ATTACH: Duration = Duration::from_secs(3);

/// How long a worker of another version is remembered after its last attempt; it tries twice a second.
const VERSION_MEMORY: Duration = Duration::from_secs(3);
/// How long the router may show no sign of life before the watchdog is fed no more.
const SILENCE: Duration = Duration::from_secs(5);

/// What the cluster needs.
pub struct Settings {
    /// Grace period and silence.
    pub timing: Timing,
    /// The grace period from now on.
    pub grace: watch::Receiver<Duration>,
    /// File that says which workers there are, for a master that starts after this one.
    pub roster: PathBuf,
    /// Kept current for the router.
    pub affinity: Arc<Affinity>,
    /// The database, where workers reach it through their streams.
    pub store: Option<Arc<Embedded>>,
    /// Publishes changes, where they do not go through the streams.
    pub presence: Option<mpsc::Sender<Numbered>>,
    /// The Redis that everything depends on, where there is one.
    pub redis: Option<Arc<RedisStore>>,
    /// What the router does.
    pub traffic: Arc<Traffic>,
    /// Of the loops that must live for the watchdog to be fed.
    pub pulses: Vec<Pulse>,
}

/// A worker's stream.
#[derive(Debug, Clone)]
struct Link {
    origin: Origin,
    frames: mpsc::Sender<FromMaster>,
    /// Ends the stream.
    close: CancellationToken,
}

impl Link {
    /// Queues a frame. A worker whose queue is full has stopped reading and loses its stream.
    fn send(&self, frame: FromMaster) {
        if self.frames.try_send(frame).is_err() && !self.close.is_cancelled() {
            tracing::warn!(
                worker = self.origin.worker,
                "the worker does not read: dropping it"
            );
            self.close.cancel();
        }
    }
}

/// From a stream to the cluster's task.
#[derive(Debug)]
enum Input {
    Hello {
        id: u64,
        link: Link,
        hello: Box<Hello>,
    },
    Frame {
        id: u64,
        frame: FromWorker,
    },
    Gone {
        id: u64,
    },
    /// A worker of another version asked to be let in.
    OtherVersion {
        worker: u32,
    },
}

/// A worker that is part of the cluster.
#[derive(Debug)]
struct Member {
    link: Link,
    /// Ticks sent since the last answer.
    unanswered: u32,
}

/// A connection that waits while the one that has its name is probed.
#[derive(Debug)]
struct Contest {
    link: u64,
    id: u64,
    command: Command,
    deadline: Instant,
}

/// A join that waits for the worker that has the socket.
#[derive(Debug)]
struct PendingAttach {
    link: u64,
    id: u64,
    deadline: Instant,
}

/// The task that owns the registry.
pub struct Cluster {
    settings: Settings,
    /// `None` until enough workers have said what they know.
    registry: Option<Registry>,
    started: Instant,
    /// Workers that were there before this master started.
    expected: BTreeSet<u32>,
    /// Workers that greeted before there was a registry.
    greeters: HashMap<u64, (Link, Box<Hello>)>,
    members: HashMap<u64, Member>,
    contests: HashMap<String, Vec<Contest>>,
    attaches: HashMap<u64, PendingAttach>,
    next_attach: u64,
    tick: u64,
    /// Workers of another version, and when each last tried.
    other_version: BTreeMap<u32, Instant>,
}

impl Cluster {
    /// A cluster without workers.
    pub fn new(settings: Settings) -> Self {
        let expected = read_roster(&settings.roster);
        Self {
            settings,
            registry: None,
            started: Instant::now(),
            expected,
            greeters: HashMap::new(),
            members: HashMap::new(),
            contests: HashMap::new(),
            attaches: HashMap::new(),
            next_attach: 1,
            tick: 0,
            other_version: BTreeMap::new(),
        }
    }

    /// Serves the control socket until stopped.
    pub async fn run(mut self, listener: UnixListener, stop: CancellationToken) {
        let (inputs, mut inputs_rx) = mpsc::channel(INPUT_QUEUE);
        let streams = TaskTracker::new();
        let store = self.settings.store.clone();
        let mut grace = self.settings.grace.clone();
        let mut tick = tokio::time::interval(TICK);
        let mut sweep = tokio::time::interval(Duration::from_millis(100));
        for timer in [&mut tick, &mut sweep] {
            timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        }
        let mut next_id = 0;
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                Some(input) = inputs_rx.recv() => self.handle(input),
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        next_id += 1;
                        let serving =
                            serve_stream(next_id, stream, inputs.clone(), store.clone());
                        let stop = stop.clone();
                        streams.spawn(async move {
                            let _ = stop.run_until_cancelled(serving).await;
                        });
                    }
                    Err(error) => {
                        tracing::warn!("accepting a control connection failed: {error}");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                },
                // The sender may be gone when everything stops.
                Ok(()) = grace.changed() => self.set_grace(*grace.borrow_and_update()),
                _ = tick.tick() => self.on_tick(),
                _ = sweep.tick() => self.sweep(),
            }
        }
        streams.close();
        streams.wait().await;
    }

    fn set_grace(&mut self, grace: Duration) {
        self.settings.timing.grace = grace;
        if let Some(registry) = &mut self.registry {
            registry.set_grace(grace);
        }
    }

    fn handle(&mut self, input: Input) {
        match input {
            Input::Hello { id, link, hello } => {
                self.drop_predecessor(hello.worker);
                self.greeters.insert(id, (link, hello));
                self.admit();
            }
            Input::Frame { id, frame } => self.frame(id, frame),
            Input::Gone { id } => self.gone(id),
            Input::OtherVersion { worker } => {
                self.other_version.insert(worker, Instant::now());
            }
        }
    }

    /// A worker that greets again has lost its earlier stream, even if that is not known yet.
    fn drop_predecessor(&mut self, worker: u32) {
        self.greeters
            .retain(|_, (link, _)| link.origin.worker != worker);
        let old: Vec<u64> = self
            .members
            .iter()
            .filter(|(_, member)| member.link.origin.worker == worker)
            .map(|(id, _)| *id)
            .collect();
        for id in old {
            self.gone(id);
        }
    }

    /// Lets those who greeted in, once the state is known.
    fn admit(&mut self) {
        if self.greeters.is_empty() {
            return;
        }
        let now = Now::read();
        if self.registry.is_none() {
            let hellos: Vec<&Hello> = self.greeters.values().map(|(_, h)| h.as_ref()).collect();
            let known = hellos
                .iter()
                .filter_map(|hello| hello.replica.as_ref())
                .flat_map(|replica| replica.state.workers().keys().copied());
            let missing = self
                .expected
                .iter()
                .copied()
                .chain(known)
                .any(|worker| hellos.iter().all(|hello| hello.worker != worker));
            if missing && self.started.elapsed() < RECOVERY {
                return;
            }
            let registry = Registry::recover(&hellos, self.settings.timing, now);
            for (user, session) in registry.state().sessions() {
                self.settings.affinity.update(user, Some(session));
            }
            tracing::info!(
                event = "registry_started",
                position = %registry.position(),
                workers = hellos.len(),
                users = registry.state().user_count(),
                "the registry is complete"
            );
            self.registry = Some(registry);
            self.settings.affinity.set_known();
        }
        for (id, (link, hello)) in std::mem::take(&mut self.greeters) {
            let Some(registry) = &mut self.registry else {
                return;
            };
            let events = registry.worker_up(&hello, now);
            tracing::info!(
                event = "worker_joined",
                worker = hello.worker,
                boot = hello.boot,
                "worker {} has joined",
                hello.worker
            );
            self.publish(&events);
            let Some(registry) = &self.registry else {
                return;
            };
            link.send(FromMaster::Welcome(registry.snapshot()));
            self.settings.affinity.suspend(hello.worker, false);
            self.members.insert(
                id,
                Member {
                    link,
                    unanswered: 0,
                },
            );
            self.settle_contests(&events);
        }
        self.write_roster();
    }

    fn gone(&mut self, id: u64) {
        self.greeters.remove(&id);
        let Some(member) = self.members.remove(&id) else {
            return;
        };
        member.link.close.cancel();
        let origin = member.link.origin;
        tracing::warn!(
            event = "worker_left",
            worker = origin.worker,
            "a worker's stream closed"
        );
        if let Some(registry) = &mut self.registry {
            let events = registry.worker_down(&origin, Now::read());
            self.publish(&events);
            self.settle_contests(&events);
        }
        for contests in self.contests.values_mut() {
            contests.retain(|contest| contest.link != id);
        }
    }

    fn frame(&mut self, id: u64, frame: FromWorker) {
        let Some(registry) = &mut self.registry else {
            return;
        };
        let Some(member) = self.members.get_mut(&id) else {
            return;
        };
        match frame {
            FromWorker::Command {
                id: request,
                command,
            } => self.command(id, request, command),
            FromWorker::JoinUser {
                id: request,
                user,
                channel,
            } => {
                self.join_user(id, request, user, channel);
            }
            FromWorker::Attached {
                id: attach,
                outcome,
            } => {
                if let Some(pending) = self.attaches.remove(&attach) {
                    self.answer(
                        pending.link,
                        FromMaster::JoinedUser {
                            id: pending.id,
                            outcome,
                        },
                    );
                }
            }
            FromWorker::CatchUp { position } => {
                member.link.send(match registry.since(position) {
                    CatchUp::Events(events) => FromMaster::Events(events),
                    CatchUp::Snapshot(snapshot) => FromMaster::Snapshot(snapshot),
                });
            }
            FromWorker::Pong { seq } => {
                let answered = u32::try_from(self.tick.saturating_sub(seq)).unwrap_or(u32::MAX);
                member.unanswered = member.unanswered.min(answered);
                if member.unanswered < SUSPECT_AFTER {
                    self.settings
                        .affinity
                        .suspend(member.link.origin.worker, false);
                }
            }
            FromWorker::Hello(_) | FromWorker::Store { .. } => {
                tracing::warn!(
                    worker = member.link.origin.worker,
                    "unexpected frame: ignored"
                );
            }
        }
    }

    fn command(&mut self, link: u64, id: u64, command: Command) {
        let Some(registry) = &mut self.registry else {
            return;
        };
        let Some(member) = self.members.get(&link) else {
            return;
        };
        let now = Now::read();
        let (events, outcome) = registry.command(&member.link.origin, &command, now);
        self.publish(&events);
        match outcome {
            Outcome::Reply(reply) => self.reply(link, id, reply),
            Outcome::Contested { worker, generation } => {
                let Command::Connect { user, .. } = &command else {
                    return;
                };
                let user = user.clone();
                tracing::info!(
                    event = "name_contested",
                    user,
                    worker,
                    "somebody wants a name whose connection is believed alive: probing that"
                );
                let probe = FromMaster::Probe {
                    user: user.clone(),
                    generation,
                };
                if let Some(owner) = self.member_of(worker) {
                    owner.link.send(probe);
                }
                let deadline = now.instant + CONTEST;
                let contest = Contest {
                    link,
                    id,
                    command,
                    deadline,
                };
                self.contests.entry(user).or_default().push(contest);
            }
        }
        self.settle_contests(&events);
    }

    /// Those who wanted a name that has just become free try again.
    fn settle_contests(&mut self, events: &[Numbered]) {
        for numbered in events {
            if let Event::Lost { user, .. } | Event::Ended { user } = &numbered.event {
                for contest in self.contests.remove(user).unwrap_or_default() {
                    self.command(contest.link, contest.id, contest.command);
                }
            }
        }
    }

    /// The time of a contest is over: the name is the newcomer's only if it is free by now.
    fn end_contest(&mut self, contest: Contest, now: Now) {
        let Some(registry) = &mut self.registry else {
            return;
        };
        let Some(member) = self.members.get(&contest.link) else {
            return;
        };
        let (events, outcome) = registry.command(&member.link.origin, &contest.command, now);
        self.publish(&events);
        let reply = match outcome {
            Outcome::Reply(reply) => reply,
            Outcome::Contested { .. } => Reply::NameTaken,
        };
        self.reply(contest.link, contest.id, reply);
    }

    fn join_user(&mut self, link: u64, id: u64, user: String, channel: String) {
        let Some(registry) = &mut self.registry else {
            return;
        };
        let session = registry
            .state()
            .session(&user)
            .filter(|session| !session.lost);
        let Some(owner) = session.map(|session| session.owner.clone()) else {
            let outcome = JoinedElsewhere::Offline;
            self.answer(link, FromMaster::JoinedUser { id, outcome });
            return;
        };
        let generation = owner.generation;
        let origin = Origin {
            worker: owner.worker,
            boot: owner.boot,
        };
        let join = Command::Join {
            user: user.clone(),
            generation,
            channel: channel.clone(),
        };
        let (events, outcome) = registry.command(&origin, &join, Now::read());
        let position = registry.position();
        self.publish(&events);
        let Outcome::Reply(Reply::Joined { fresh }) = outcome else {
            let outcome = JoinedElsewhere::TooManyChannels;
            self.answer(link, FromMaster::JoinedUser { id, outcome });
            return;
        };
        let attach = self.next_attach;
        self.next_attach += 1;
        let pending = PendingAttach {
            link,
            id,
            deadline: Instant::now() + ATTACH,
        };
        self.attaches.insert(attach, pending);
        if let Some(owner) = self.member_of(origin.worker) {
            owner.link.send(FromMaster::Attach {
                id: attach,
                user,
                generation,
                channel,
                fresh,
                position,
            });
        }
    }

    fn member_of(&self, worker: u32) -> Option<&Member> {
        self.members
            .values()
            .find(|member| member.link.origin.worker == worker)
    }

    fn reply(&self, link: u64, id: u64, reply: Reply) {
        let Some(registry) = &self.registry else {
            return;
        };
        let position = registry.position();
        self.answer(
            link,
            FromMaster::Reply {
                id,
                reply,
                position,
            },
        );
    }

    fn answer(&self, link: u64, frame: FromMaster) {
        if let Some(member) = self.members.get(&link) {
            member.link.send(frame);
        }
    }

    /// Tells every worker, and the router, what changed.
    fn publish(&mut self, events: &[Numbered]) {
        let Some(registry) = &self.registry else {
            return;
        };
        for numbered in events {
            match &self.settings.presence {
                Some(presence) => {
                    // Dropped where the publisher cannot keep up: ticks tell of it.
                    let _ = presence.try_send(numbered.clone());
                }
                None => {
                    for member in self.members.values() {
                        member.link.send(FromMaster::Event(numbered.clone()));
                    }
                }
            }
            if let Event::Ended { user } = &numbered.event {
                tracing::info!(
                    event = "session_ended",
                    user,
                    "the session of {user} has ended"
                );
            }
            match &numbered.event {
                Event::Connected { user, .. }
                | Event::Resumed { user, .. }
                | Event::Lost { user, .. }
                | Event::Reclaimed { user }
                | Event::Ended { user } => {
                    self.settings
                        .affinity
                        .update(user, registry.state().session(user));
                }
                Event::WorkerUp { .. } | Event::WorkerDown { .. } => self.write_roster(),
                Event::Joined { .. } | Event::Left { .. } | Event::StatusChanged { .. } => {}
            }
        }
    }

    fn on_tick(&mut self) {
        self.tick += 1;
        self.other_version
            .retain(|_, tried| tried.elapsed() < VERSION_MEMORY);
        let mut dead = Vec::new();
        if let Some(registry) = &self.registry {
            let position = registry.position();
            for (id, member) in &mut self.members {
                let worker = member.link.origin.worker;
                if member.unanswered >= DEAD_AFTER {
                    tracing::warn!(worker, "the worker missed {DEAD_AFTER} ticks: it is dead");
                    dead.push(*id);
                    continue;
                }
                self.settings
                    .affinity
                    .suspend(worker, member.unanswered >= SUSPECT_AFTER);
                member.unanswered += 1;
                member.link.send(FromMaster::Tick {
                    seq: self.tick,
                    position,
                });
            }
        }
        for id in dead {
            self.gone(id);
        }
        if self.is_fit() {
            systemd::watchdog();
        } else {
            tracing::error!(
                event = "router_hangs",
                "connections are not accepted or not routed"
            );
        }
        self.report_status();
    }

    /// Whether the loops beside this one go round, too.
    fn is_fit(&self) -> bool {
        let mut pulses = self.settings.pulses.iter();
        pulses.all(|pulse| pulse.is_felt(SILENCE))
    }

    /// What is due by time: recovery, grace periods, contests, joins.
    fn sweep(&mut self) {
        self.admit();
        let now = Now::read();
        let closed: Vec<u64> = self
            .members
            .iter()
            .filter(|(_, member)| member.link.close.is_cancelled())
            .map(|(id, _)| *id)
            .collect();
        for id in closed {
            self.gone(id);
        }
        if let Some(registry) = &mut self.registry {
            let events = registry.expire(now);
            self.publish(&events);
            self.settle_contests(&events);
        }
        let mut due = Vec::new();
        for contests in self.contests.values_mut() {
            due.extend(contests.extract_if(.., |contest| contest.deadline <= now.instant));
        }
        self.contests.retain(|_, contests| !contests.is_empty());
        for contest in due {
            self.end_contest(contest, now);
        }
        let late: Vec<u64> = self
            .attaches
            .iter()
            .filter(|(_, pending)| pending.deadline <= now.instant)
            .map(|(attach, _)| *attach)
            .collect();
        for attach in late {
            if let Some(PendingAttach { link, id, .. }) = self.attaches.remove(&attach) {
                let outcome = JoinedElsewhere::Unavailable;
                self.answer(link, FromMaster::JoinedUser { id, outcome });
            }
        }
    }

    fn report_status(&self) {
        let users = self
            .registry
            .as_ref()
            .map_or(0, |registry| registry.state().user_count());
        let redis = self.settings.redis.as_ref();
        let facts = Facts {
            able: self.settings.traffic.able(),
            redis: redis.is_none_or(|redis| redis.connected()),
            other_version: self.other_version.keys().copied().collect(),
            workers: self.members.len() as u64,
            routed: self.settings.traffic.routed(),
            users: users as u64,
        };
        systemd::status(&facts.to_string());
    }

    /// Leaves word for the next master of whom to wait for. It is only a hint that makes its
    /// recovery complete, so failing to write it is no reason to stop.
    fn write_roster(&self) {
        let Some(registry) = &self.registry else {
            return;
        };
        let workers: Vec<u32> = registry.state().workers().keys().copied().collect();
        let written = serde_json::to_vec(&workers)
            .map_err(std::io::Error::from)
            .and_then(|json| std::fs::write(&self.settings.roster, json));
        if let Err(error) = written {
            let path = self.settings.roster.display();
            tracing::warn!(%path, "the list of workers cannot be written: {error}");
        }
    }
}

fn read_roster(path: &std::path::Path) -> BTreeSet<u32> {
    // Missing at a first start; unreadable, it only makes recovery less patient.
    std::fs::read(path)
        .ok()
        .and_then(|json| serde_json::from_slice(&json).ok())
        .unwrap_or_default()
}

/// Serves one worker's stream until either side ends it.
async fn serve_stream(
    id: u64,
    stream: UnixStream,
    inputs: mpsc::Sender<Input>,
    store: Option<Arc<Embedded>>,
) {
    let (read, write) = stream.into_split();
    let mut reader = FramedRead::new(read, control::codec());
    let mut writer = FramedWrite::new(write, control::codec());
    let hello = match tokio::time::timeout(Duration::from_secs(5), reader.next()).await {
        Ok(Some(Ok(bytes))) => match control::decode::<FromWorker>(&bytes) {
            Ok(FromWorker::Hello(hello)) => hello,
            Ok(_) => return tracing::warn!("a control connection did not begin with a hello"),
            Err(error) => return tracing::warn!("a control connection is not a worker's: {error}"),
        },
        _ => return tracing::debug!("a control connection ended before its hello"),
    };
    if hello.protocol != PROTOCOL {
        let (worker, protocol) = (hello.worker, hello.protocol);
        tracing::warn!(
            worker,
            protocol,
            "a worker of another version waits for its restart"
        );
        if let Ok(bytes) = control::encode(&FromMaster::Mismatch { protocol: PROTOCOL }) {
            // If it is gone, it need not be told.
            let _ = writer.send(bytes).await;
        }
        // The cluster may have stopped first.
        let _ = inputs.send(Input::OtherVersion { worker }).await;
        return;
    }
    let (frames, mut frames_rx) = mpsc::channel::<FromMaster>(WORKER_QUEUE);
    let close = CancellationToken::new();
    let origin = Origin {
        worker: hello.worker,
        boot: hello.boot.clone(),
    };
    let link = Link {
        origin,
        frames,
        close: close.clone(),
    };
    let sink: BusSink = {
        let link = link.clone();
        Arc::new(move |event| {
            link.send(FromMaster::Bus(event));
            !link.close.is_cancelled()
        })
    };
    let client = store.map(|store| Arc::new(store.client(sink)));
    let requests = Arc::new(Semaphore::new(STORE_REQUESTS));
    if inputs
        .send(Input::Hello {
            id,
            link: link.clone(),
            hello: Box::new(hello),
        })
        .await
        .is_err()
    {
        return;
    }
    let writing = async {
        while let Some(frame) = frames_rx.recv().await {
            let Ok(mut bytes) = control::encode(&frame) else {
                break;
            };
            if let FromMaster::Store { id, .. } = frame
                && bytes.len() > control::MAX_ANSWER
            {
                // The stream, and with it every session of the worker, is worth more.
                tracing::warn!(bytes = bytes.len(), "an answer of the store is too large");
                let error = StoreError::Unavailable("the answer is too large".to_owned());
                let refusal = FromMaster::Store {
                    id,
                    result: Err(error),
                };
                match control::encode(&refusal) {
                    Ok(refusal) => bytes = refusal,
                    Err(_) => break,
                }
            }
            if writer.feed(bytes).await.is_err() {
                break;
            }
            if frames_rx.is_empty() && control::flush(&mut writer).await.is_err() {
                break;
            }
        }
    };
    let reading = async {
        while let Some(Ok(bytes)) = reader.next().await {
            match control::decode::<FromWorker>(&bytes) {
                Ok(FromWorker::Store { id, request }) => {
                    // A worker that asks for too much at once waits, in its own stream.
                    let Ok(permit) = requests.clone().acquire_owned().await else {
                        break;
                    };
                    let (client, link) = (client.clone(), link.clone());
                    tokio::spawn(async move {
                        let _permit = permit;
                        let result = match client {
                            Some(client) => remote::carry_out(client.as_ref(), request).await,
                            None => Err(StoreError::Unavailable(
                                "the master has no store: REDIS_URL is set for it, and not for \
                                 the worker"
                                    .to_owned(),
                            )),
                        };
                        link.send(FromMaster::Store { id, result });
                    });
                }
                Ok(frame) => {
                    if inputs.send(Input::Frame { id, frame }).await.is_err() {
                        break;
                    }
                }
                Err(error) => {
                    tracing::warn!(worker = link.origin.worker, "dropping the worker: {error}");
                    break;
                }
            }
        }
    };
    tokio::select! {
        () = close.cancelled() => {}
        () = writing => {}
        () = reading => {}
    }
    close.cancel();
    // The cluster may have stopped first.
    let _ = inputs.send(Input::Gone { id }).await;
}

#[cfg(test)]
mod tests {
    use super::super::{accept, peek, refusal, router};
    use super::*;

    /// A cluster beside these loops.
    fn beside(pulses: Vec<Pulse>) -> Cluster {
        Cluster::new(Settings {
            timing: Timing {
                grace: Duration::ZERO,
                silence: Duration::ZERO,
            },
            grace: watch::channel(Duration::ZERO).1,
            roster: "/nowhere".into(),
            affinity: Arc::default(),
            store: None,
            presence: None,
            redis: None,
            traffic: Arc::default(),
            pulses,
        })
    }

    #[test]
    fn a_loop_that_hangs_is_not_outlived() {
        assert!(beside(vec![Pulse::new(), Pulse::new()]).is_fit());
        assert!(!beside(vec![Pulse::new(), Pulse::silent()]).is_fit());
        let ended = Pulse::silent();
        ended.rest();
        assert!(beside(vec![ended]).is_fit());
    }

    #[tokio::test]
    async fn router_and_accept_loop_show_that_they_live_with_nothing_to_do() {
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let refusals = refusal::Refusals::default();
        let (router, gate, traffic) =
            router::spawn(&tasks, Arc::default(), refusals.clone(), stop.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let accepting = Pulse::silent();
        let lookout = peek::Lookout::new(peek::Settings {
            trusted: watch::channel(Arc::default()).1,
            router,
            refusals,
            tasks: tasks.clone(),
            under_way: TaskTracker::new(),
            accept_no_more: stop.clone(),
            stop: stop.clone(),
        });
        let loops = accept::run(listener, lookout, gate, accepting.clone(), stop.clone());
        tasks.spawn(loops);
        let begin = Instant::now();
        // Not merely from its begin.
        tokio::time::sleep(Duration::from_millis(1)).await;
        let lives = |pulse: &Pulse| pulse.is_felt(begin.elapsed());
        while !lives(&accepting) || !lives(&traffic.pulse) {
            assert!(begin.elapsed() < Duration::from_secs(30));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        stop.cancel();
        tasks.close();
        tasks.wait().await;
        assert!(traffic.pulse.is_felt(Duration::ZERO) && accepting.is_felt(Duration::ZERO));
    }
}
