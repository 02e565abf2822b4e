//! The worker's end of the control stream: connects to the master and again for ever, sends
//! what is asked for, and asks again after a reconnection for what was not answered.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::codec::{FramedRead, FramedWrite};
use tokio_util::sync::CancellationToken;

use super::dispatch::{Dispatch, Item};
use crate::control::{
    self, Command, FrameError, FromMaster, FromWorker, Hello, JoinedElsewhere, PROTOCOL, Reply,
    StoreRequest, StoreResponse,
};
use crate::store::{BusEvent, StoreError};

/// How long a caller waits for an answer, a restart of the master included.
const PATIENCE: Duration = Duration::from_secs(5);

/// Questions on their way to the link.
const QUEUE: usize = 1024;

/// First and longest pause between attempts to reach the master.
const RETRY: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// The master did not answer in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the master does not answer")]
pub struct Away;

/// An answer of the master.
enum Answer {
    Reply(Reply),
    Joined(JoinedElsewhere),
    Store(Result<StoreResponse, StoreError>),
}

/// Something for the master.
enum Ask {
    /// Wants an answer; sent again until there is one, or nobody waits for it any more.
    Question {
        frame: Box<dyn FnOnce(u64) -> FromWorker + Send>,
        answer: oneshot::Sender<Answer>,
    },
    /// Wants none; dropped while the master is away.
    Tell(FromWorker),
}

/// The way to the master.
#[derive(Clone)]
pub struct Link {
    asks: mpsc::Sender<Ask>,
    connected: watch::Receiver<bool>,
    other_protocol: watch::Receiver<Option<u32>>,
}

impl Link {
    /// Has the registry decide something.
    ///
    /// # Errors
    /// [`Away`] after some seconds; the command may have been carried out all the same.
    pub async fn command(&self, command: Command) -> Result<Reply, Away> {
        tokio::time::timeout(PATIENCE, self.insist(command))
            .await
            .map_err(|_| Away)?
    }

    /// As [`Link::command`], for as long as it takes.
    ///
    /// # Errors
    /// [`Away`] only when the worker stops.
    pub async fn insist(&self, command: Command) -> Result<Reply, Away> {
        match self
            .question(|id| FromWorker::Command { id, command })
            .await?
        {
            Answer::Reply(reply) => Ok(reply),
            Answer::Joined(_) | Answer::Store(_) => Err(Away),
        }
    }

    /// Joins a user to a channel, whichever worker has the user's socket.
    ///
    /// # Errors
    /// [`Away`] after some seconds.
    pub async fn join_user(&self, user: String, channel: String) -> Result<JoinedElsewhere, Away> {
        let question = self.question(|id| FromWorker::JoinUser { id, user, channel });
        match tokio::time::timeout(PATIENCE, question)
            .await
            .map_err(|_| Away)??
        {
            Answer::Joined(outcome) => Ok(outcome),
            Answer::Reply(_) | Answer::Store(_) => Err(Away),
        }
    }

    /// Calls the embedded store.
    ///
    /// # Errors
    /// [`Away`] after some seconds; otherwise what the store answers.
    pub async fn store(
        &self,
        request: StoreRequest,
    ) -> Result<Result<StoreResponse, StoreError>, Away> {
        let question = self.question(|id| FromWorker::Store { id, request });
        match tokio::time::timeout(PATIENCE, question)
            .await
            .map_err(|_| Away)??
        {
            Answer::Store(result) => Ok(result),
            Answer::Reply(_) | Answer::Joined(_) => Err(Away),
        }
    }

    /// Tells the master something, if it is there and the queue has room. Called by the
    /// dispatch loop, which must not wait.
    pub fn tell(&self, frame: FromWorker) {
        if self.asks.try_send(Ask::Tell(frame)).is_err() {
            tracing::warn!("a frame to the master was dropped: the queue is full");
        }
    }

    /// Whether the master is there.
    pub fn is_connected(&self) -> bool {
        *self.connected.borrow()
    }

    /// Waits until the master is there, `patience` at most; whether it is.
    pub async fn await_connected(&self, patience: Duration) -> bool {
        let mut connected = self.connected.clone();
        let there = connected.wait_for(|connected| *connected);
        matches!(tokio::time::timeout(patience, there).await, Ok(Ok(_)))
    }

    /// The version of the control protocol that the master spoke at the last attempt, if it was not
    /// this worker's.
    pub fn other_protocol(&self) -> Option<u32> {
        *self.other_protocol.borrow()
    }

    async fn question(
        &self,
        frame: impl FnOnce(u64) -> FromWorker + Send + 'static,
    ) -> Result<Answer, Away> {
        let (answer, answered) = oneshot::channel();
        let ask = Ask::Question {
            frame: Box::new(frame),
            answer,
        };
        self.asks.send(ask).await.map_err(|_| Away)?;
        answered.await.map_err(|_| Away)
    }
}

/// Who this worker is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Its number.
    pub worker: u32,
    /// Of this process.
    pub boot: String,
}

/// Makes a link; nothing moves until [`Connector::run`].
///
/// `carries_bus` says whether the store's bus comes through the link.
pub fn new(identity: Identity, control: PathBuf, carries_bus: bool) -> (Link, Connector) {
    let (asks, asks_rx) = mpsc::channel(QUEUE);
    let (connected_tx, connected) = watch::channel(false);
    let (other_protocol_tx, other_protocol) = watch::channel(None);
    let connector = Connector {
        identity,
        control,
        carries_bus,
        asks: asks_rx,
        connected: connected_tx,
        other_protocol: other_protocol_tx,
        unanswered: BTreeMap::new(),
        next_id: 1,
    };
    let link = Link {
        asks,
        connected,
        other_protocol,
    };
    (link, connector)
}

/// A question that was sent, or is to be.
struct Unanswered {
    bytes: Bytes,
    answer: oneshot::Sender<Answer>,
}

/// Keeps the stream.
pub struct Connector {
    identity: Identity,
    control: PathBuf,
    carries_bus: bool,
    asks: mpsc::Receiver<Ask>,
    connected: watch::Sender<bool>,
    other_protocol: watch::Sender<Option<u32>>,
    unanswered: BTreeMap<u64, Unanswered>,
    next_id: u64,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("it closed the stream")]
    Closed,
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error(
        "it speaks version {0} of the control protocol, this worker {PROTOCOL}; waiting for a restart"
    )]
    Mismatch(u32),
    #[error("the dispatch loop has stopped")]
    Stopped,
}

impl Connector {
    /// Connects to the master, for ever.
    pub async fn run(mut self, dispatch: Dispatch, stop: CancellationToken) {
        let keeping = async {
            let mut pause = RETRY.0;
            loop {
                match self.attempt(&dispatch, &mut pause).await {
                    Broken::Stopped => return,
                    why => tracing::warn!(
                        event = "master_away",
                        "no stream to the master, trying again: {why}"
                    ),
                }
                self.connected.send_replace(false);
                self.wait(pause).await;
                pause = (pause * 2).min(RETRY.1);
            }
        };
        let _ = stop.run_until_cancelled(keeping).await;
    }

    /// Collects what is asked meanwhile.
    async fn wait(&mut self, pause: Duration) {
        let deadline = tokio::time::Instant::now() + pause;
        while let Ok(Some(ask)) = tokio::time::timeout_at(deadline, self.asks.recv()).await {
            // What is only told is of no use later.
            if let Ask::Question { frame, answer } = ask {
                self.remember(frame, answer);
            }
        }
        tokio::time::sleep_until(deadline).await;
        self.unanswered
            .retain(|_, question| !question.answer.is_closed());
    }

    fn remember(
        &mut self,
        frame: Box<dyn FnOnce(u64) -> FromWorker + Send>,
        answer: oneshot::Sender<Answer>,
    ) -> Option<Bytes> {
        let id = self.next_id;
        self.next_id += 1;
        match control::encode(&frame(id)) {
            Ok(bytes) => {
                self.unanswered.insert(
                    id,
                    Unanswered {
                        bytes: bytes.clone(),
                        answer,
                    },
                );
                Some(bytes)
            }
            Err(error) => {
                tracing::error!("a question to the master cannot be written: {error}");
                None
            }
        }
    }

    async fn attempt(&mut self, dispatch: &Dispatch, pause: &mut Duration) -> Broken {
        let why = match self.connection(dispatch, pause).await {
            Ok(()) => Broken::Closed,
            Err(why) => why,
        };
        let other = match why {
            Broken::Mismatch(protocol) => Some(protocol),
            _ => None,
        };
        self.other_protocol.send_replace(other);
        why
    }

    async fn connection(
        &mut self,
        dispatch: &Dispatch,
        pause: &mut Duration,
    ) -> Result<(), Broken> {
        let stream = UnixStream::connect(&self.control).await?;
        let (read, write) = stream.into_split();
        let mut reader = FramedRead::new(read, control::codec());
        let mut writer = FramedWrite::new(write, control::codec());
        // Asked through the dispatch queue, so that it has applied all that came before.
        let known = dispatch.known().await.ok_or(Broken::Stopped)?;
        let hello = Hello {
            protocol: PROTOCOL,
            worker: self.identity.worker,
            boot: self.identity.boot.clone(),
            replica: known.replica,
            sessions: known.sessions,
        };
        writer
            .send(control::encode(&FromWorker::Hello(hello))?)
            .await?;
        let welcome = loop {
            let bytes = tokio::select! {
                bytes = reader.next() => bytes.ok_or(Broken::Closed)??,
                Some(ask) = self.asks.recv() => {
                    if let Ask::Question { frame, answer } = ask {
                        self.remember(frame, answer);
                    }
                    continue;
                }
            };
            match control::decode::<FromMaster>(&bytes)? {
                welcome @ FromMaster::Welcome(_) => break welcome,
                FromMaster::Mismatch { protocol } => return Err(Broken::Mismatch(protocol)),
                // Events of the time between the hello and the welcome are in its snapshot.
                _ => {}
            }
        };
        dispatch
            .send(Item::Master(welcome))
            .await
            .ok_or(Broken::Stopped)?;
        if self.carries_bus {
            // The master's bus knows nothing of what this worker was subscribed to.
            let interrupted = Item::Bus(BusEvent::Interrupted);
            dispatch.send(interrupted).await.ok_or(Broken::Stopped)?;
        }
        self.unanswered
            .retain(|_, question| !question.answer.is_closed());
        for question in self.unanswered.values() {
            writer.feed(question.bytes.clone()).await?;
        }
        control::flush(&mut writer).await?;
        self.connected.send_replace(true);
        *pause = RETRY.0;
        tracing::info!(event = "master_joined", "connected to the master");
        loop {
            tokio::select! {
                bytes = reader.next() => {
                    let bytes = bytes.ok_or(Broken::Closed)??;
                    let frame = control::decode::<FromMaster>(&bytes)?;
                    self.received(frame, dispatch).await?;
                }
                ask = self.asks.recv() => {
                    let mut ask = ask.ok_or(Broken::Stopped)?;
                    loop {
                        let bytes = match ask {
                            Ask::Question { frame, answer } => self.remember(frame, answer),
                            Ask::Tell(frame) => Some(control::encode(&frame)?),
                        };
                        if let Some(bytes) = bytes {
                            writer.feed(bytes).await?;
                        }
                        match self.asks.try_recv() {
                            Ok(next) => ask = next,
                            Err(_) => break,
                        }
                    }
                    control::flush(&mut writer).await?;
                }
            }
        }
    }

    async fn received(&mut self, frame: FromMaster, dispatch: &Dispatch) -> Result<(), Broken> {
        let (id, answer) = match frame {
            FromMaster::Reply {
                id,
                reply,
                position,
            } => {
                // Through the dispatch loop, which passes it on once its replica is so far: who
                // gets the answer finds a state that agrees with it.
                let Some(question) = self.unanswered.remove(&id) else {
                    return Ok(());
                };
                let deliver: Box<dyn FnOnce() + Send> = Box::new(move || {
                    // Whoever asked may have given up.
                    let _ = question.answer.send(Answer::Reply(reply));
                });
                let item = Item::Replied { position, deliver };
                return dispatch.send(item).await.ok_or(Broken::Stopped);
            }
            FromMaster::JoinedUser { id, outcome } => (id, Answer::Joined(outcome)),
            FromMaster::Store { id, result } => (id, Answer::Store(result)),
            FromMaster::Bus(event) => {
                return dispatch.send(Item::Bus(event)).await.ok_or(Broken::Stopped);
            }
            frame => {
                return dispatch
                    .send(Item::Master(frame))
                    .await
                    .ok_or(Broken::Stopped);
            }
        };
        if let Some(question) = self.unanswered.remove(&id) {
            // Whoever asked may have given up.
            let _ = question.answer.send(answer);
        }
        Ok(())
    }
}
