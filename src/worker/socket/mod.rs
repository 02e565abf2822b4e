//! The Socket.IO side of a worker.
//!
//! - [`engine`]: the HTTP requests underneath, before and after socketioxide;
//! - [`eio3`]: what polling clients of old versions make of UTF-8;
//! - [`wire`]: one connection, to emit to and to close;
//! - [`session`]: what one client does, in order;
//! - [`events`]: the payloads that clients send.

pub mod eio3;
pub mod engine;
pub mod events;
pub mod session;
pub mod wire;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use socketioxide::extract::{AckSender, Event, SocketRef, TryData};
use socketioxide::handler::ConnectHandler as _;
use socketioxide::socket::DisconnectReason;
use socketioxide::{ProtocolVersion, SocketIo};
use tokio::sync::{Semaphore, mpsc};

use super::App;
use super::http::error::ApiError;
use super::http::token::Caller;
use super::transport::Handle;
use engine::OpenedBy;
use events::Credentials;
use session::{Input, Session};

/// Events of one client that wait to be handled; more are refused.
const QUEUE: usize = 1024;

/// Bytes of such events, for few can be large.
const QUEUE_BYTES: usize = 4 * engine::MAX_PAYLOAD;

/// How long a refused client may take to read why.
const REFUSAL: Duration = Duration::from_secs(1);

/// What the middleware leaves for the connect handler, in the engine's session. Not in the socket
/// itself: queued events keep the socket, and where it is gone before the handler runs, the two
/// would keep each other for ever.
#[derive(Debug)]
pub struct Admission {
    caller: Caller,
    credentials: Credentials,
    client: IpAddr,
    room: Arc<Semaphore>,
    inputs: (mpsc::Sender<Input>, mpsc::Receiver<Input>),
}

/// Serves the sockets of the main namespace.
pub fn listen(app: &Arc<App>, io: &SocketIo) {
    let admitting = app.clone();
    let middleware = move |socket: SocketRef, TryData(auth): TryData<Value>| {
        let app = admitting.clone();
        async move { admit(app, socket, auth.ok()).await }
    };
    let app = app.clone();
    let connected = move |socket: SocketRef| {
        let app = app.clone();
        async move {
            let Some(engine) = app.sessions.get(&socket.id.to_string()) else {
                return;
            };
            let Some(admission) = engine.take_admission() else {
                return;
            };
            let Admission {
                caller,
                credentials,
                client,
                room,
                inputs,
            } = admission;
            let wire = Arc::new(wire::Connection::new(socket, engine, client, room));
            let clients = app.clients.clone();
            let session = Session::new(app, caller, wire, credentials, inputs);
            clients.track_future(session.run()).await;
        }
    };
    io.ns("/", connected.with(middleware));
}

/// Lets a socket in, or not. Everything it may do is registered here, because its first events
/// can arrive before the connect handler runs.
async fn admit(app: Arc<App>, socket: SocketRef, auth: Option<Value>) -> Result<(), ApiError> {
    let parts = socket.req_parts();
    let handle = parts.extensions.get::<Arc<Handle>>().cloned();
    let client = handle
        .as_ref()
        .map(|handle| handle.client())
        .ok_or_else(ApiError::internal)?;
    let params = engine::params(&parts.uri);
    // The connection of the first request is the session's own only if that asked for it; a poll's
    // is not, also where the session has been upgraded meanwhile.
    let websocket = handle.filter(|_| params.transport.as_deref() == Some("websocket"));
    let engine = app.sessions.connected(&socket.id.to_string(), websocket);
    let opened_by = parts.extensions.get::<OpenedBy>().cloned();
    let credentials = Credentials::of(&params, auth.as_ref());
    let caller: Result<Caller, ApiError> = match (opened_by, &credentials.token) {
        (Some(OpenedBy(caller)), _) => Ok(caller),
        (None, Some(token)) => app.authenticate(token).await,
        (None, None) => Err(ApiError::token_missing()),
    };
    let caller = match caller {
        Ok(caller) => caller,
        Err(error) => {
            // The protocol leaves the transport of a refused client open.
            tokio::spawn(async move {
                tokio::time::sleep(REFUSAL).await;
                engine.kill();
            });
            return Err(error);
        }
    };
    let (inputs, inputs_rx) = mpsc::channel(QUEUE);
    // The handlers' bodies run in the order of the events; what they return would not. So they
    // do nothing but queue.
    let events = inputs.clone();
    let room = Arc::new(Semaphore::new(QUEUE_BYTES));
    let shares = room.clone();
    socket.on_fallback(
        move |Event(name): Event, TryData(data): TryData<Value>, ack: AckSender| {
            let data = data.ok();
            let size = events::size(&name, data.as_ref());
            let refused = match shares.clone().try_acquire_many_owned(size) {
                _ if name.len() > events::NAME_MAX => Some((ack, events::unknown(&name))),
                Err(_) => Some((ack, events::overrun())),
                Ok(held) => {
                    let event = Input::Event {
                        name,
                        data,
                        ack,
                        held,
                    };
                    match events.try_send(event).map_err(|error| error.into_inner()) {
                        Err(Input::Event { ack, .. }) => Some((ack, events::overrun())),
                        _ => None,
                    }
                }
            };
            if let Some((ack, refusal)) = refused
                && let Err(error) = ack.send(&refusal)
            {
                tracing::debug!(%error, "a refusal could not be sent");
            }
            std::future::ready(())
        },
    );
    let ending = inputs.clone();
    let sessions = app.clone();
    socket.on_disconnect(async move |socket: SocketRef, reason: DisconnectReason| {
        sessions.sessions.closed(&socket.id.to_string());
        // In the queue, so that what came before is done first; its task empties it.
        let _ = ending.send(Input::Disconnected(reason)).await;
    });
    let is_old = socket.protocol() == ProtocolVersion::V4;
    tracing::debug!(user = caller.name, %client, old_protocol = is_old, "a client connects");
    engine.admit(Admission {
        caller,
        credentials,
        client,
        room,
        inputs: (inputs, inputs_rx),
    });
    Ok(())
}

/// Forgets Engine.IO sessions that are over, now and then.
pub fn sweep_sessions(app: Arc<App>, io: SocketIo) {
    let app = Arc::downgrade(&app);
    tokio::spawn(async move {
        let mut timer = tokio::time::interval(Duration::from_secs(30));
        loop {
            timer.tick().await;
            let Some(app) = app.upgrade() else { return };
            app.sessions
                .sweep(|sid| sid.parse().is_ok_and(|sid| io.get_socket(sid).is_some()));
        }
    });
}
