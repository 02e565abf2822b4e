//! Who is online, in which channel: the state that the master decides and every worker copies.
//!
//! Pure: no I/O, no clock. [`State`] changes only by [`State::apply`], which also says what the
//! rooms should hear of it, so that one log of events drives both the state and the sockets.
//! [`Authority`] is the master's side (it numbers events and can bring others up to date),
//! [`Replica`] a worker's.

use std::collections::{BTreeMap, HashMap, VecDeque};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How many events the master keeps for replicas that fell behind; older ones get a snapshot.
const LOG_LENGTH: usize = 4096;

/// A place in the log. Epochs are ordered, one for each start of a master; versions count the
/// events of an epoch.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Position {
    /// The master's start.
    pub epoch: u64,
    /// Events since then.
    pub version: u64,
}

impl std::fmt::Display for Position {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.epoch, self.version)
    }
}

/// What a user shows to the others in a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// At the keyboard.
    #[default]
    Online,
    /// Not at the keyboard.
    Away,
}

/// A user's place in a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// The status shown there.
    pub status: Status,
    /// When the user joined: Unix time, milliseconds. Nothing older is replayed to them.
    pub since: i64,
}

/// The connection that carries a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Strictly increasing over all sessions; of two owners of a name the higher one is right.
    pub generation: u64,
    /// Number of the worker that holds the socket.
    pub worker: u32,
    /// That worker process' boot id: a restarted worker does not own its predecessor's sessions.
    pub boot: String,
    /// The connection's id, unique over all workers and their restarts.
    pub connection: String,
    /// Routing key of the client's address: its next connections go to the same worker.
    pub address: String,
    /// Hash of the secret that takes this session over at once.
    pub secret: String,
}

/// A user's presence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// The connection that has it, or had it last.
    pub owner: Owner,
    /// The connection is gone; the session waits for the user to come back.
    pub lost: bool,
    /// Whether the present connection took the session over from an earlier one.
    pub resumed: bool,
    /// Up to when the client provably has received everything: Unix time, milliseconds.
    pub confirmed: i64,
    /// The channels joined.
    pub channels: BTreeMap<String, Membership>,
}

/// A change of the state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// A user came online, in no channel yet.
    Connected {
        /// Who.
        user: String,
        /// The connection.
        owner: Owner,
        /// Now: Unix time, milliseconds.
        at: i64,
    },
    /// Another connection took the user's session over, channels and all.
    Resumed {
        /// Who.
        user: String,
        /// The new connection.
        owner: Owner,
    },
    /// The connection broke; the session goes on for a grace period.
    Lost {
        /// Who.
        user: String,
        /// See [`Session::confirmed`].
        confirmed: i64,
    },
    /// The connection that was thought lost is there after all.
    Reclaimed {
        /// Who.
        user: String,
    },
    /// The session is over.
    Ended {
        /// Who.
        user: String,
    },
    /// A user joined a channel.
    Joined {
        /// Who.
        user: String,
        /// Key of the channel.
        channel: String,
        /// Now: Unix time, milliseconds.
        at: i64,
    },
    /// A user left a channel.
    Left {
        /// Who.
        user: String,
        /// Key of the channel.
        channel: String,
        /// Now: Unix time, milliseconds.
        at: i64,
    },
    /// A user's status in a channel changed.
    StatusChanged {
        /// Who.
        user: String,
        /// Key of the channel.
        channel: String,
        /// The new one.
        status: Status,
    },
    /// A worker joined the cluster.
    WorkerUp {
        /// Its number.
        worker: u32,
        /// Its boot id.
        boot: String,
    },
    /// A worker left it.
    WorkerDown {
        /// Its number.
        worker: u32,
    },
}

/// What a room should hear of a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// `user : joined`, to the room, the joiner included.
    Joined {
        /// Who.
        user: String,
        /// Where.
        channel: String,
    },
    /// `user : left`, to the room but the leaver.
    Left {
        /// Who.
        user: String,
        /// Where.
        channel: String,
        /// When: Unix time, milliseconds; unknown where the change was seen only in a snapshot.
        at: Option<i64>,
    },
    /// `user : quit`, to the room.
    Quit {
        /// Who.
        user: String,
        /// Where.
        channel: String,
    },
    /// `user : status_changed`, to the room but the user.
    StatusChanged {
        /// Who.
        user: String,
        /// Where.
        channel: String,
        /// The new status.
        status: Status,
    },
}

/// Who is online, in which channel, and which workers there are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Stored")]
pub struct State {
    /// Sessions by user name; lost ones in their grace period included.
    sessions: BTreeMap<String, Session>,
    /// Workers by number, with their boot ids.
    workers: BTreeMap<u32, String>,
    /// The highest generation given out.
    generation: u64,
    /// Members by channel: `sessions` turned around, so that a room is listed without a scan.
    #[serde(skip_serializing)]
    channels: HashMap<String, BTreeMap<String, Status>>,
}

/// [`State`] as it is written: without what can be derived.
#[derive(Deserialize)]
struct Stored {
    sessions: BTreeMap<String, Session>,
    workers: BTreeMap<u32, String>,
    generation: u64,
}

impl From<Stored> for State {
    fn from(stored: Stored) -> Self {
        let mut channels: HashMap<String, BTreeMap<String, Status>> = HashMap::new();
        for (user, session) in &stored.sessions {
            for (channel, membership) in &session.channels {
                channels
                    .entry(channel.clone())
                    .or_default()
                    .insert(user.clone(), membership.status);
            }
        }
        Self {
            sessions: stored.sessions,
            workers: stored.workers,
            generation: stored.generation,
            channels,
        }
    }
}

impl State {
    /// A user's session, lost ones included.
    pub fn session(&self, user: &str) -> Option<&Session> {
        self.sessions.get(user)
    }

    /// All sessions by user, in order of names.
    pub fn sessions(&self) -> impl Iterator<Item = (&str, &Session)> {
        self.sessions
            .iter()
            .map(|(user, session)| (user.as_str(), session))
    }

    /// A channel's members with their status, in order of names.
    pub fn members(&self, channel: &str) -> impl Iterator<Item = (&str, Status)> {
        self.channels.get(channel).into_iter().flat_map(|members| {
            members
                .iter()
                .map(|(user, status)| (user.as_str(), *status))
        })
    }

    /// How many users a channel has.
    pub fn member_count(&self, channel: &str) -> usize {
        self.channels.get(channel).map_or(0, BTreeMap::len)
    }

    /// How many users are online.
    pub fn user_count(&self) -> usize {
        self.sessions.len()
    }

    /// The workers of the cluster: number and boot id.
    pub fn workers(&self) -> &BTreeMap<u32, String> {
        &self.workers
    }

    /// The highest generation that a session was given.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Changes the state, and says what the rooms should hear. An event that does not fit
    /// (somebody unknown leaves) changes nothing and is heard by nobody.
    pub fn apply(&mut self, event: &Event) -> Vec<Notice> {
        match event {
            Event::Connected { user, owner, at } => {
                let notices = self.end(user);
                self.generation = self.generation.max(owner.generation);
                self.sessions.insert(
                    user.clone(),
                    Session {
                        owner: owner.clone(),
                        lost: false,
                        resumed: false,
                        confirmed: *at,
                        channels: BTreeMap::new(),
                    },
                );
                notices
            }
            Event::Resumed { user, owner } => {
                self.generation = self.generation.max(owner.generation);
                if let Some(session) = self.sessions.get_mut(user) {
                    session.owner = owner.clone();
                    session.lost = false;
                    session.resumed = true;
                }
                Vec::new()
            }
            Event::Lost { user, confirmed } => {
                if let Some(session) = self.sessions.get_mut(user) {
                    session.lost = true;
                    session.confirmed = session.confirmed.max(*confirmed);
                }
                Vec::new()
            }
            Event::Reclaimed { user } => {
                if let Some(session) = self.sessions.get_mut(user) {
                    session.lost = false;
                }
                Vec::new()
            }
            Event::Ended { user } => self.end(user),
            Event::Joined { user, channel, at } => {
                let Some(session) = self.sessions.get_mut(user) else {
                    return Vec::new();
                };
                if session.channels.contains_key(channel) {
                    return Vec::new();
                }
                let membership = Membership {
                    status: Status::Online,
                    since: *at,
                };
                session.channels.insert(channel.clone(), membership);
                self.channels
                    .entry(channel.clone())
                    .or_default()
                    .insert(user.clone(), membership.status);
                vec![Notice::Joined {
                    user: user.clone(),
                    channel: channel.clone(),
                }]
            }
            Event::Left { user, channel, at } => {
                let Some(session) = self.sessions.get_mut(user) else {
                    return Vec::new();
                };
                if session.channels.remove(channel).is_none() {
                    return Vec::new();
                }
                self.remove_member(channel, user);
                vec![Notice::Left {
                    user: user.clone(),
                    channel: channel.clone(),
                    at: Some(*at),
                }]
            }
            Event::StatusChanged {
                user,
                channel,
                status,
            } => {
                let membership = self
                    .sessions
                    .get_mut(user)
                    .and_then(|s| s.channels.get_mut(channel));
                let Some(membership) = membership else {
                    return Vec::new();
                };
                membership.status = *status;
                if let Some(shown) = self.channels.get_mut(channel).and_then(|m| m.get_mut(user)) {
                    *shown = *status;
                }
                vec![Notice::StatusChanged {
                    user: user.clone(),
                    channel: channel.clone(),
                    status: *status,
                }]
            }
            Event::WorkerUp { worker, boot } => {
                self.workers.insert(*worker, boot.clone());
                Vec::new()
            }
            Event::WorkerDown { worker } => {
                self.workers.remove(worker);
                Vec::new()
            }
        }
    }

    /// What the rooms should hear when this state is replaced by `newer`, whose events were
    /// not seen one by one.
    pub fn diff(&self, newer: &State) -> Vec<Notice> {
        let mut notices = Vec::new();
        for (user, old) in &self.sessions {
            let new = newer.sessions.get(user);
            for channel in old.channels.keys() {
                let (user, channel) = (user.clone(), channel.clone());
                match new {
                    None => notices.push(Notice::Quit { user, channel }),
                    Some(new) if !new.channels.contains_key(&channel) => {
                        notices.push(Notice::Left {
                            user,
                            channel,
                            at: None,
                        });
                    }
                    Some(_) => {}
                }
            }
        }
        for (user, new) in &newer.sessions {
            for (channel, membership) in &new.channels {
                let old = self
                    .sessions
                    .get(user)
                    .and_then(|s| s.channels.get(channel));
                let (user, channel) = (user.clone(), channel.clone());
                match old {
                    None => notices.push(Notice::Joined { user, channel }),
                    Some(old) if old.status != membership.status => {
                        let status = membership.status;
                        notices.push(Notice::StatusChanged {
                            user,
                            channel,
                            status,
                        });
                    }
                    Some(_) => {}
                }
            }
        }
        notices
    }

    fn end(&mut self, user: &str) -> Vec<Notice> {
        let Some(session) = self.sessions.remove(user) else {
            return Vec::new();
        };
        session
            .channels
            .into_keys()
            .map(|channel| {
                self.remove_member(&channel, user);
                Notice::Quit {
                    user: user.to_owned(),
                    channel,
                }
            })
            .collect()
    }

    fn remove_member(&mut self, channel: &str, user: &str) {
        if let Some(members) = self.channels.get_mut(channel) {
            members.remove(user);
            if members.is_empty() {
                self.channels.remove(channel);
            }
        }
    }
}

/// An event with its place in the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numbered {
    /// The position that the state has after the event.
    pub position: Position,
    /// The event.
    pub event: Event,
}

/// The whole state at a position.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Snapshot {
    /// Where in the log.
    pub position: Position,
    /// The state there.
    pub state: State,
}

/// What brings a replica up to date.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CatchUp {
    /// The events that it lacks, in order; empty if it lacks none.
    Events(Vec<Numbered>),
    /// It is too far behind, or of another epoch.
    Snapshot(Snapshot),
}

/// The master's side: the state that counts, and the log's end.
#[derive(Debug)]
pub struct Authority {
    current: Snapshot,
    recent: VecDeque<Numbered>,
}

impl Authority {
    /// Begins an epoch with a state that earlier epochs left.
    pub fn new(epoch: u64, state: State) -> Self {
        let position = Position { epoch, version: 0 };
        Self {
            current: Snapshot { position, state },
            recent: VecDeque::new(),
        }
    }

    /// The state.
    pub fn state(&self) -> &State {
        &self.current.state
    }

    /// The log's end.
    pub fn position(&self) -> Position {
        self.current.position
    }

    /// A copy of the whole.
    pub fn snapshot(&self) -> Snapshot {
        self.current.clone()
    }

    /// Applies an event and numbers it.
    pub fn commit(&mut self, event: Event) -> Numbered {
        self.current.position.version += 1;
        self.current.state.apply(&event);
        let numbered = Numbered {
            position: self.current.position,
            event,
        };
        if self.recent.len() == LOG_LENGTH {
            self.recent.pop_front();
        }
        self.recent.push_back(numbered.clone());
        numbered
    }

    /// What a replica at `position` lacks.
    pub fn since(&self, position: Option<Position>) -> CatchUp {
        let current = self.current.position;
        match position {
            Some(at) if at.epoch == current.epoch && at.version <= current.version => {
                let missing = current.version - at.version;
                match usize::try_from(missing) {
                    Ok(missing) if missing <= self.recent.len() => {
                        let from = self.recent.len() - missing;
                        CatchUp::Events(self.recent.iter().skip(from).cloned().collect())
                    }
                    _ => CatchUp::Snapshot(self.snapshot()),
                }
            }
            _ => CatchUp::Snapshot(self.snapshot()),
        }
    }
}

/// What became of an event that a replica received.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// It was the next one; the rooms should hear this.
    Applied(Vec<Notice>),
    /// It was known already, or belongs to an epoch that is over.
    Stale,
    /// Something before it is missing: ask the master for what came since the replica's position.
    Gap,
}

/// A worker's copy of the state.
#[derive(Debug, Default, Clone)]
pub struct Replica {
    current: Option<Snapshot>,
}

impl Replica {
    /// The position, once a snapshot has been applied.
    pub fn position(&self) -> Option<Position> {
        self.current.as_ref().map(|current| current.position)
    }

    /// The whole copy, once a snapshot has been applied.
    pub fn snapshot(&self) -> Option<&Snapshot> {
        self.current.as_ref()
    }

    /// The state; `None` before the first snapshot.
    pub fn state(&self) -> Option<&State> {
        self.current.as_ref().map(|current| &current.state)
    }

    /// Takes an event, in whatever order they come.
    pub fn receive(&mut self, numbered: &Numbered) -> Received {
        let Some(current) = &mut self.current else {
            return Received::Gap;
        };
        let (at, next) = (current.position, numbered.position);
        if next.epoch > at.epoch {
            return Received::Gap;
        }
        if next.epoch < at.epoch || next.version <= at.version {
            return Received::Stale;
        }
        if next.version > at.version + 1 {
            return Received::Gap;
        }
        current.position = next;
        Received::Applied(current.state.apply(&numbered.event))
    }

    /// Whether the master, at `position`, is ahead.
    pub fn is_behind(&self, position: Position) -> bool {
        self.position().is_none_or(|at| at < position)
    }

    /// Takes a snapshot, unless the replica is further already. Returns what the rooms should
    /// hear of the difference.
    pub fn reset(&mut self, snapshot: Snapshot) -> Vec<Notice> {
        if !self.is_behind(snapshot.position) {
            return Vec::new();
        }
        let notices = match &self.current {
            Some(current) => current.state.diff(&snapshot.state),
            None => Vec::new(),
        };
        self.current = Some(snapshot);
        notices
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn owner(generation: u64) -> Owner {
        Owner {
            generation,
            worker: (generation % 3) as u32,
            boot: "b".into(),
            connection: format!("c{generation}"),
            address: "127.0.0.1".into(),
            secret: String::new(),
        }
    }

    fn any_event() -> impl Strategy<Value = Event> {
        let user = prop::sample::select(vec!["ann", "bob", "eve", "joe"]).prop_map(str::to_owned);
        let channel = prop::sample::select(vec!["general", "x", "y"]).prop_map(str::to_owned);
        let status = prop::sample::select(vec![Status::Online, Status::Away]);
        (user, channel, status, 0..9u8, 1..1000u64).prop_map(|(user, channel, status, kind, n)| {
            match kind {
                0 => Event::Connected {
                    user,
                    owner: owner(n),
                    at: n as i64,
                },
                1 => Event::Resumed {
                    user,
                    owner: owner(n),
                },
                2 => Event::Lost {
                    user,
                    confirmed: n as i64,
                },
                3 => Event::Reclaimed { user },
                4 => Event::Ended { user },
                5 | 6 => Event::Joined {
                    user,
                    channel,
                    at: n as i64,
                },
                7 => Event::Left {
                    user,
                    channel,
                    at: n as i64,
                },
                _ => Event::StatusChanged {
                    user,
                    channel,
                    status,
                },
            }
        })
    }

    /// What happens to a published event on its way to one replica.
    #[derive(Debug, Clone, Copy)]
    enum Fate {
        Delivered,
        Lost,
        Twice,
        Late,
    }

    fn any_fate() -> impl Strategy<Value = Fate> {
        prop::sample::select(vec![
            Fate::Delivered,
            Fate::Delivered,
            Fate::Lost,
            Fate::Twice,
            Fate::Late,
        ])
    }

    fn catch_up(authority: &Authority, replica: &mut Replica) -> Vec<Notice> {
        match authority.since(replica.position()) {
            CatchUp::Snapshot(snapshot) => replica.reset(snapshot),
            CatchUp::Events(events) => events
                .iter()
                .flat_map(|event| match replica.receive(event) {
                    Received::Applied(notices) => notices,
                    other => panic!("an event that catches up was {other:?}"),
                })
                .collect(),
        }
    }

    proptest! {
        /// Whatever is lost, doubled or late: with re-sync every replica ends equal to the
        /// master, also over a restart of the master that begins from a replica.
        #[test]
        fn replicas_end_equal_to_the_master(
            events in prop::collection::vec((any_event(), any_fate(), any_fate()), 0..200),
            restart_at in 0..200usize,
        ) {
            let mut authority = Authority::new(1, State::default());
            let mut replicas = [Replica::default(), Replica::default()];
            let mut late: [Vec<Numbered>; 2] = [Vec::new(), Vec::new()];
            for (step, (event, first, second)) in events.into_iter().enumerate() {
                if step == restart_at {
                    let best = replicas.iter().max_by_key(|r| r.position()).unwrap();
                    let state = best.state().cloned().unwrap_or_default();
                    authority = Authority::new(2, state);
                }
                let numbered = authority.commit(event);
                for (i, fate) in [first, second].into_iter().enumerate() {
                    let mut arrivals = match fate {
                        Fate::Delivered => vec![numbered.clone()],
                        Fate::Twice => vec![numbered.clone(), numbered.clone()],
                        Fate::Lost => vec![],
                        Fate::Late => { late[i].push(numbered.clone()); vec![] }
                    };
                    if step % 7 == 0 {
                        arrivals.append(&mut late[i]);
                    }
                    for arrival in arrivals {
                        if replicas[i].receive(&arrival) == Received::Gap {
                            catch_up(&authority, &mut replicas[i]);
                        }
                    }
                }
            }
            for replica in &mut replicas {
                catch_up(&authority, replica);
                prop_assert_eq!(replica.state().unwrap(), authority.state());
                prop_assert!(!replica.is_behind(authority.position()));
            }
        }

        /// The members of the channels are always what the sessions say, and a snapshot keeps
        /// its meaning when written and read.
        #[test]
        fn members_agree_with_sessions(events in prop::collection::vec(any_event(), 0..100)) {
            let mut state = State::default();
            for event in &events {
                state.apply(event);
            }
            let written = serde_json::to_string(&state).unwrap();
            let read: State = serde_json::from_str(&written).unwrap();
            prop_assert_eq!(read, state);
        }

        /// A room that hears the difference of two states and one that hears the events in
        /// between know the same members in the end.
        #[test]
        fn a_difference_tells_rooms_what_the_events_would_have(
            before in prop::collection::vec(any_event(), 0..40),
            after in prop::collection::vec(any_event(), 0..40),
        ) {
            let mut old = State::default();
            for event in &before { old.apply(event); }
            let mut new = old.clone();
            for event in &after { new.apply(event); }
            let mut heard: BTreeMap<(String, String), Status> = old
                .sessions()
                .flat_map(|(u, s)| s.channels.iter().map(move |(c, m)| ((u.to_owned(), c.clone()), m.status)))
                .collect();
            for notice in old.diff(&new) {
                match notice {
                    Notice::Joined { user, channel } => {
                        let status = new.session(&user).unwrap().channels[&channel].status;
                        heard.insert((user, channel), status);
                    }
                    Notice::Left { user, channel, .. } | Notice::Quit { user, channel } => {
                        heard.remove(&(user, channel));
                    }
                    Notice::StatusChanged { user, channel, status } => {
                        heard.insert((user, channel), status);
                    }
                }
            }
            let expected: BTreeMap<(String, String), Status> = new
                .sessions()
                .flat_map(|(u, s)| s.channels.iter().map(move |(c, m)| ((u.to_owned(), c.clone()), m.status)))
                .collect();
            prop_assert_eq!(heard, expected);
        }
    }

    #[test]
    fn quitting_is_heard_once_per_channel() {
        let mut state = State::default();
        state.apply(&Event::Connected {
            user: "ann".into(),
            owner: owner(1),
            at: 0,
        });
        for channel in ["a", "b"] {
            state.apply(&Event::Joined {
                user: "ann".into(),
                channel: channel.into(),
                at: 0,
            });
        }
        let ended = Event::Ended { user: "ann".into() };
        assert_eq!(
            state.apply(&ended),
            ["a", "b"].map(|c| Notice::Quit {
                user: "ann".into(),
                channel: c.into()
            })
        );
        assert_eq!(state.apply(&ended), []);
        assert_eq!(state.member_count("a"), 0);
    }

    #[test]
    fn a_session_taken_over_keeps_its_channels_and_nobody_hears_of_it() {
        let mut state = State::default();
        state.apply(&Event::Connected {
            user: "ann".into(),
            owner: owner(1),
            at: 0,
        });
        state.apply(&Event::Joined {
            user: "ann".into(),
            channel: "a".into(),
            at: 0,
        });
        assert_eq!(
            state.apply(&Event::Lost {
                user: "ann".into(),
                confirmed: 5
            }),
            []
        );
        assert_eq!(
            state.apply(&Event::Resumed {
                user: "ann".into(),
                owner: owner(2)
            }),
            []
        );
        let session = state.session("ann").unwrap();
        assert!(!session.lost && session.resumed && session.channels.contains_key("a"));
        assert_eq!((session.confirmed, state.generation()), (5, 2));
    }
}
