//! The registry's decisions: may this connection have the name, who is in which channel, when
//! is a lost session over. No I/O and no clock of its own; [`super::cluster`] runs it.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use crate::control::{Command, Ending, Hello, Reply};
use crate::presence::{
    Authority, CatchUp, Event, Numbered, Owner, Position, Session, Snapshot, State,
};

/// Channels that one session can be in.
pub const MAX_CHANNELS: usize = 128;

/// The time of a decision, on both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// For deadlines.
    pub instant: Instant,
    /// For what clients see: Unix time, milliseconds.
    pub millis: i64,
}

impl Now {
    /// Reads the clocks.
    pub fn read() -> Self {
        Self {
            instant: Instant::now(),
            millis: jiff::Timestamp::now().as_millisecond(),
        }
    }
}

/// A worker process.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Origin {
    /// Its number.
    pub worker: u32,
    /// Its boot id.
    pub boot: String,
}

/// How long things take.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// How long a lost session waits for its user.
    pub grace: Duration,
    /// How long a living client may be silent: heartbeat interval and timeout.
    pub silence: Duration,
}

/// What the registry makes of a command.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The answer.
    Reply(Reply),
    /// A living connection has the name. Whether it really lives is to be found out before the
    /// newcomer is refused.
    Contested {
        /// Number of the worker that has the connection.
        worker: u32,
        /// Of its session.
        generation: u64,
    },
}

/// The registry.
#[derive(Debug)]
pub struct Registry {
    authority: Authority,
    timing: Timing,
    /// When lost sessions end, by user.
    deadlines: HashMap<String, Instant>,
}

impl Registry {
    /// Begins an epoch from what the workers know: the newest of their replicas is the state.
    /// Sessions that no worker claims are lost, and their grace periods begin anew.
    pub fn recover(hellos: &[&Hello], timing: Timing, now: Now) -> Self {
        let newest = hellos
            .iter()
            .filter_map(|hello| hello.replica.as_ref())
            .max_by_key(|replica| replica.position);
        let (last_epoch, mut state) = match newest {
            Some(replica) => (replica.position.epoch, replica.state.clone()),
            None => (0, State::default()),
        };
        let claims: Vec<Claims<'_>> = hellos.iter().map(|hello| Claims::of(hello)).collect();
        let mut deadlines = HashMap::new();
        for worker in state.workers().keys().copied().collect::<Vec<_>>() {
            state.apply(&Event::WorkerDown { worker });
        }
        for hello in hellos {
            let boot = hello.boot.clone();
            state.apply(&Event::WorkerUp {
                worker: hello.worker,
                boot,
            });
        }
        let users: Vec<String> = state.sessions().map(|(user, _)| user.to_owned()).collect();
        for user in users {
            let Some(session) = state.session(&user) else {
                continue;
            };
            let claimed = claims.iter().any(|claims| claims.include(&user, session));
            if claimed {
                state.apply(&Event::Reclaimed { user });
            } else {
                let confirmed = fallback_confirmed(timing, now);
                deadlines.insert(user.clone(), now.instant + timing.grace);
                state.apply(&Event::Lost { user, confirmed });
            }
        }
        // Milliseconds make epochs grow over restarts that leave nothing behind; a clock that
        // was set back must not make them shrink over restarts that do.
        let epoch = u64::try_from(now.millis).unwrap_or(0).max(last_epoch + 1);
        Self {
            authority: Authority::new(epoch, state),
            timing,
            deadlines,
        }
    }

    /// The state.
    pub fn state(&self) -> &State {
        self.authority.state()
    }

    /// The log's end.
    pub fn position(&self) -> Position {
        self.authority.position()
    }

    /// A copy of the whole.
    pub fn snapshot(&self) -> Snapshot {
        self.authority.snapshot()
    }

    /// What a replica lacks.
    pub fn since(&self, position: Option<Position>) -> CatchUp {
        self.authority.since(position)
    }

    /// Decides a command. What changed is to be published before the answer is sent.
    pub fn command(
        &mut self,
        from: &Origin,
        command: &Command,
        now: Now,
    ) -> (Vec<Numbered>, Outcome) {
        let mut events = Vec::new();
        let outcome = match command {
            Command::Connect {
                user,
                connection,
                address,
                secret,
                claim,
            } => {
                let owner = |generation| Owner {
                    generation,
                    worker: from.worker,
                    boot: from.boot.clone(),
                    connection: connection.clone(),
                    address: address.clone(),
                    secret: secret.clone(),
                };
                let generation = self.next_generation();
                match self.state().session(user) {
                    // The same command again: its answer was lost on the way.
                    Some(session) if session.owner.connection == *connection => {
                        if session.lost {
                            events.push(Event::Reclaimed { user: user.clone() });
                        }
                    }
                    None => {
                        let (user, at) = (user.clone(), now.millis);
                        events.push(Event::Connected {
                            user,
                            owner: owner(generation),
                            at,
                        });
                    }
                    Some(session)
                        if session.lost || claim.as_ref() == Some(&session.owner.secret) =>
                    {
                        events.push(Event::Resumed {
                            user: user.clone(),
                            owner: owner(generation),
                        });
                    }
                    Some(session) => {
                        let Owner {
                            worker, generation, ..
                        } = session.owner;
                        return (Vec::new(), Outcome::Contested { worker, generation });
                    }
                }
                let events = self.commit_all(events);
                self.deadlines.remove(user);
                let reply = match self.state().session(user) {
                    Some(session) => Reply::Connected {
                        generation: session.owner.generation,
                        resumed: session.resumed,
                        channels: session
                            .channels
                            .iter()
                            .map(|(channel, membership)| (channel.clone(), membership.since))
                            .collect(),
                        confirmed: session.confirmed,
                    },
                    None => Reply::NameTaken,
                };
                return (events, Outcome::Reply(reply));
            }
            Command::Disconnect {
                user,
                generation,
                ending,
            } => {
                if self.current(user, *generation).is_some() {
                    events.push(match ending {
                        Ending::Lost { confirmed } if !self.timing.grace.is_zero() => {
                            self.lose(user, *confirmed, now)
                        }
                        _ => Event::Ended { user: user.clone() },
                    });
                }
                Reply::Done
            }
            Command::Join {
                user,
                generation,
                channel,
            } => match self.current(user, *generation) {
                None => Reply::Superseded,
                Some(session) if session.channels.contains_key(channel) => {
                    Reply::Joined { fresh: false }
                }
                Some(session) if session.channels.len() >= MAX_CHANNELS => Reply::TooManyChannels,
                Some(_) => {
                    let (user, channel) = (user.clone(), channel.clone());
                    events.push(Event::Joined {
                        user,
                        channel,
                        at: now.millis,
                    });
                    Reply::Joined { fresh: true }
                }
            },
            Command::Leave {
                user,
                generation,
                channel,
            } => match self.current(user, *generation) {
                None => Reply::Superseded,
                Some(session) if session.channels.contains_key(channel) => {
                    let (user, channel) = (user.clone(), channel.clone());
                    events.push(Event::Left {
                        user,
                        channel,
                        at: now.millis,
                    });
                    Reply::Done
                }
                Some(_) => Reply::NotJoined,
            },
            Command::SetStatus {
                user,
                generation,
                channel,
                status,
            } => {
                match self
                    .current(user, *generation)
                    .map(|s| s.channels.get(channel))
                {
                    None => Reply::Superseded,
                    Some(None) => Reply::NotJoined,
                    Some(Some(membership)) if membership.status == *status => Reply::Done,
                    Some(Some(_)) => {
                        let (user, channel, status) = (user.clone(), channel.clone(), *status);
                        events.push(Event::StatusChanged {
                            user,
                            channel,
                            status,
                        });
                        Reply::Done
                    }
                }
            }
        };
        (self.commit_all(events), Outcome::Reply(outcome))
    }

    /// A worker joined, or came back to this master. Sessions that it claims and that are still
    /// its own go on as if nothing had happened; those of its that it does not claim are lost.
    pub fn worker_up(&mut self, hello: &Hello, now: Now) -> Vec<Numbered> {
        let mut events = Vec::new();
        if self.state().workers().get(&hello.worker) != Some(&hello.boot) {
            let boot = hello.boot.clone();
            events.push(Event::WorkerUp {
                worker: hello.worker,
                boot,
            });
        }
        let claims = Claims::of(hello);
        let mut reclaimed = Vec::new();
        let mut missing = Vec::new();
        for (user, session) in self.state().sessions() {
            if claims.include(user, session) {
                if session.lost {
                    reclaimed.push(user.to_owned());
                }
            } else if session.owner.worker == hello.worker && !session.lost {
                missing.push(user.to_owned());
            }
        }
        for user in reclaimed {
            self.deadlines.remove(&user);
            events.push(Event::Reclaimed { user });
        }
        for user in missing {
            events.push(self.lose_or_end(&user, now));
        }
        self.commit_all(events)
    }

    /// A worker is gone, and its connections with it.
    pub fn worker_down(&mut self, origin: &Origin, now: Now) -> Vec<Numbered> {
        let mut events = Vec::new();
        if self.state().workers().get(&origin.worker) == Some(&origin.boot) {
            events.push(Event::WorkerDown {
                worker: origin.worker,
            });
        }
        let orphans: Vec<String> = self
            .state()
            .sessions()
            .filter(|(_, s)| {
                !s.lost && s.owner.worker == origin.worker && s.owner.boot == origin.boot
            })
            .map(|(user, _)| user.to_owned())
            .collect();
        for user in orphans {
            events.push(self.lose_or_end(&user, now));
        }
        self.commit_all(events)
    }

    /// Gives sessions that are lost from now on another grace period.
    pub fn set_grace(&mut self, grace: Duration) {
        self.timing.grace = grace;
    }

    /// Ends the lost sessions whose grace period is over.
    pub fn expire(&mut self, now: Now) -> Vec<Numbered> {
        let due: Vec<String> = self
            .deadlines
            .iter()
            .filter(|(_, deadline)| **deadline <= now.instant)
            .map(|(user, _)| user.clone())
            .collect();
        let mut events = Vec::new();
        for user in due {
            self.deadlines.remove(&user);
            if self
                .state()
                .session(&user)
                .is_some_and(|session| session.lost)
            {
                events.push(Event::Ended { user });
            }
        }
        self.commit_all(events)
    }

    /// The session of a user, if it is of this generation.
    fn current(&self, user: &str, generation: u64) -> Option<&Session> {
        self.state()
            .session(user)
            .filter(|session| session.owner.generation == generation)
    }

    /// Above all that were ever given out: by this epoch's log, and by masters of which nothing
    /// is known any more, whose epochs were lower.
    fn next_generation(&self) -> u64 {
        (self.state().generation() + 1).max(self.position().epoch << 20)
    }

    fn lose(&mut self, user: &str, confirmed: Option<i64>, now: Now) -> Event {
        self.deadlines
            .insert(user.to_owned(), now.instant + self.timing.grace);
        let confirmed = confirmed.unwrap_or_else(|| fallback_confirmed(self.timing, now));
        Event::Lost {
            user: user.to_owned(),
            confirmed,
        }
    }

    fn lose_or_end(&mut self, user: &str, now: Now) -> Event {
        if self.timing.grace.is_zero() {
            Event::Ended {
                user: user.to_owned(),
            }
        } else {
            self.lose(user, None, now)
        }
    }

    fn commit_all(&mut self, events: Vec<Event>) -> Vec<Numbered> {
        events
            .into_iter()
            .map(|event| self.authority.commit(event))
            .collect()
    }
}

/// The sessions that a worker which greets says it holds.
struct Claims<'a> {
    hello: &'a Hello,
    sessions: HashSet<(&'a str, u64)>,
}

impl<'a> Claims<'a> {
    fn of(hello: &'a Hello) -> Self {
        let sessions = hello
            .sessions
            .iter()
            .map(|(user, generation)| (user.as_str(), *generation));
        Self {
            hello,
            sessions: sessions.collect(),
        }
    }

    fn include(&self, user: &str, session: &Session) -> bool {
        session.owner.worker == self.hello.worker
            && session.owner.boot == self.hello.boot
            && self.sessions.contains(&(user, session.owner.generation))
    }
}

/// Up to when a client whose worker died has received everything for certain. A connection is
/// alive only while heartbeats are answered, so what was sent two such rounds ago has arrived.
fn fallback_confirmed(timing: Timing, now: Now) -> i64 {
    let rounds = timing.silence.saturating_mul(2).as_millis();
    now.millis
        .saturating_sub(i64::try_from(rounds).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(10);

    fn timing() -> Timing {
        Timing {
            grace: GRACE,
            silence: Duration::from_secs(25),
        }
    }

    fn now() -> Now {
        Now {
            instant: Instant::now(),
            millis: 1_000_000,
        }
    }

    fn origin(worker: u32) -> Origin {
        Origin {
            worker,
            boot: format!("boot{worker}"),
        }
    }

    fn hello(worker: u32, replica: Option<Snapshot>, sessions: &[(&str, u64)]) -> Hello {
        Hello {
            protocol: crate::control::PROTOCOL,
            worker,
            boot: format!("boot{worker}"),
            replica,
            sessions: sessions
                .iter()
                .map(|(u, g)| ((*u).to_owned(), *g))
                .collect(),
        }
    }

    fn empty() -> Registry {
        Registry::recover(
            &[&hello(0, None, &[]), &hello(1, None, &[])],
            timing(),
            now(),
        )
    }

    fn connect(connection: &str, claim: Option<&str>) -> Command {
        Command::Connect {
            user: "ann".into(),
            connection: connection.into(),
            address: "127.0.0.1".into(),
            secret: format!("secret of {connection}"),
            claim: claim.map(str::to_owned),
        }
    }

    fn generation(outcome: &Outcome) -> u64 {
        match outcome {
            Outcome::Reply(Reply::Connected { generation, .. }) => *generation,
            other => panic!("not connected: {other:?}"),
        }
    }

    fn lost(generation: u64) -> Command {
        let ending = Ending::Lost { confirmed: Some(7) };
        Command::Disconnect {
            user: "ann".into(),
            generation,
            ending,
        }
    }

    fn join(generation: u64, channel: &str) -> Command {
        Command::Join {
            user: "ann".into(),
            generation,
            channel: channel.into(),
        }
    }

    #[test]
    fn a_name_is_online_once() {
        let mut registry = empty();
        let (_, first) = registry.command(&origin(0), &connect("c1", None), now());
        let (events, second) = registry.command(&origin(1), &connect("c2", None), now());
        assert_eq!(events, []);
        let generation = generation(&first);
        assert_eq!(
            second,
            Outcome::Contested {
                worker: 0,
                generation
            }
        );
    }

    #[test]
    fn a_command_repeated_changes_nothing_and_gets_the_same_answer() {
        let mut registry = empty();
        let (_, first) = registry.command(&origin(0), &connect("c1", None), now());
        let position = registry.position();
        let (events, again) = registry.command(&origin(0), &connect("c1", None), now());
        assert_eq!(
            (events, again, registry.position()),
            (vec![], first, position)
        );
    }

    #[test]
    fn a_connect_repeated_after_its_worker_was_lost_finds_its_session_alive() {
        let mut registry = empty();
        let (_, first) = registry.command(&origin(0), &connect("c1", None), now());
        registry.worker_down(&origin(0), now());
        registry.worker_up(&hello(0, None, &[]), now());
        let (_, again) = registry.command(&origin(0), &connect("c1", None), now());
        assert_eq!(generation(&again), generation(&first));
        assert!(!registry.state().session("ann").unwrap().lost);
        let late = Now {
            instant: Instant::now() + GRACE * 2,
            millis: 0,
        };
        assert_eq!(registry.expire(late), []);
    }

    #[test]
    fn the_secret_takes_a_living_session_over_and_the_old_connection_is_superseded() {
        let mut registry = empty();
        let (_, first) = registry.command(&origin(0), &connect("c1", None), now());
        let old = generation(&first);
        registry.command(&origin(0), &join(old, "x"), now());
        let (_, second) = registry.command(&origin(1), &connect("c2", Some("secret of c1")), now());
        match &second {
            Outcome::Reply(Reply::Connected {
                generation,
                resumed: true,
                channels,
                ..
            }) => {
                assert!(*generation > old);
                assert_eq!(channels.len(), 1);
            }
            other => panic!("{other:?}"),
        }
        let (_, outcome) = registry.command(&origin(0), &join(old, "y"), now());
        assert_eq!(outcome, Outcome::Reply(Reply::Superseded));
        let (events, _) = registry.command(&origin(0), &lost(old), now());
        assert_eq!(
            events,
            [],
            "an old connection must not end the new one's session"
        );
    }

    #[test]
    fn a_lost_session_ends_after_its_grace_period_and_not_before() {
        let mut registry = empty();
        let start = now();
        let (_, first) = registry.command(&origin(0), &connect("c1", None), start);
        registry.command(&origin(0), &lost(generation(&first)), start);
        let later = |d| Now {
            instant: start.instant + d,
            ..start
        };
        assert_eq!(registry.expire(later(GRACE - Duration::from_millis(1))), []);
        assert_eq!(registry.expire(later(GRACE)).len(), 1);
        assert!(registry.state().session("ann").is_none());
    }

    #[test]
    fn whoever_comes_back_in_time_does_not_expire() {
        let mut registry = empty();
        let start = now();
        let (_, first) = registry.command(&origin(0), &connect("c1", None), start);
        registry.command(&origin(0), &lost(generation(&first)), start);
        let (_, second) = registry.command(&origin(1), &connect("c2", None), start);
        assert!(matches!(
            second,
            Outcome::Reply(Reply::Connected {
                resumed: true,
                confirmed: 1_000_000,
                ..
            })
        ));
        let late = Now {
            instant: start.instant + GRACE * 2,
            ..start
        };
        assert_eq!(registry.expire(late), []);
    }

    #[test]
    fn a_worker_that_comes_back_reclaims_what_is_still_its_own() {
        let mut registry = empty();
        let (_, first) = registry.command(&origin(0), &connect("c1", None), now());
        let generation = generation(&first);
        registry.worker_down(&origin(0), now());
        assert!(registry.state().session("ann").unwrap().lost);
        registry.worker_up(&hello(0, None, &[("ann", generation)]), now());
        assert!(!registry.state().session("ann").unwrap().lost);
        let late = Now {
            instant: Instant::now() + GRACE * 2,
            millis: 0,
        };
        assert_eq!(registry.expire(late), []);
    }

    #[test]
    fn a_new_process_does_not_inherit_its_predecessors_sessions() {
        let mut registry = empty();
        registry.command(&origin(0), &connect("c1", None), now());
        let mut greeting = hello(0, None, &[]);
        greeting.boot = "another".into();
        registry.worker_up(&greeting, now());
        assert!(registry.state().session("ann").unwrap().lost);
    }

    #[test]
    fn a_new_master_goes_on_from_the_newest_replica() {
        let mut before = empty();
        let old = before.snapshot();
        let (_, first) = before.command(&origin(0), &connect("c1", None), now());
        let generation = generation(&first);
        let new = before.snapshot();
        let hellos = [
            hello(1, Some(old), &[]),
            hello(0, Some(new), &[("ann", generation)]),
        ];
        let after = Registry::recover(&[&hellos[0], &hellos[1]], timing(), now());
        assert!(!after.state().session("ann").unwrap().lost);
        assert!(after.position().epoch > before.position().epoch);

        let after = Registry::recover(&[&hellos[1], &hello(1, None, &[])], timing(), now());
        assert!(!after.state().session("ann").unwrap().lost);
        let mut after = Registry::recover(
            &[&hello(1, hellos[1].replica.clone(), &[])],
            timing(),
            now(),
        );
        assert!(
            after.state().session("ann").unwrap().lost,
            "its worker did not come back"
        );
        let late = Now {
            instant: Instant::now() + GRACE * 2,
            millis: 0,
        };
        assert_eq!(after.expire(late).len(), 1, "grace begins anew and ends");
    }

    #[test]
    fn a_session_has_a_bounded_number_of_channels() {
        let mut registry = empty();
        let (_, first) = registry.command(&origin(0), &connect("c1", None), now());
        let generation = generation(&first);
        for n in 0..MAX_CHANNELS {
            registry.command(&origin(0), &join(generation, &n.to_string()), now());
        }
        let (_, outcome) = registry.command(&origin(0), &join(generation, "more"), now());
        assert_eq!(outcome, Outcome::Reply(Reply::TooManyChannels));
        let (_, outcome) = registry.command(&origin(0), &join(generation, "0"), now());
        assert_eq!(outcome, Outcome::Reply(Reply::Joined { fresh: false }));
    }
}
