//! The Engine.IO requests before and after socketioxide: who may open a session, text that old
//! clients can read, and sessions that can be closed from outside.
//!
//! socketioxide speaks both revisions of the protocol. What it lacks is done here: refusing a
//! handshake by HTTP status (clients 1.x and 2.x get `connect_error` only that way), the text
//! encoding of polling clients 1.x ([`super::eio3`]), and ending a session's transport.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{Query, Request};
use axum::response::{IntoResponse as _, Response};
use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::json;
use socketioxide::{ParserConfig, SocketIo};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;
use tower::util::BoxCloneSyncService;

use super::Admission;
use super::eio3::{self, Utf8Mode};
use crate::worker::App;
use crate::worker::http::error::ApiError;
use crate::worker::http::token::Caller;
use crate::worker::transport::{Handle, Heartbeats};
use crate::worker::ws_frames::Engine as Revision;

/// Bytes that one polling request may carry, and one WebSocket message.
pub const MAX_PAYLOAD: usize = 1_000_000;

/// How long a polling request's body may take.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Headers that socketioxide reads of a request that opens a session.
const KEPT_HEADERS: [HeaderName; 5] = [
    header::CONNECTION,
    header::UPGRADE,
    header::SEC_WEBSOCKET_KEY,
    header::SEC_WEBSOCKET_VERSION,
    header::CONTENT_TYPE,
];

/// Sessions that a worker keeps, those not authenticated yet included; no more are opened.
const MAX_SESSIONS: usize = 65_536;

/// Sessions that opened a transport and then nothing are forgotten after this time; the engine
/// closes them earlier.
const UNCONNECTED: Duration = Duration::from_secs(60);

/// What is known of an Engine.IO session beside what socketioxide knows.
#[derive(Debug)]
pub struct EngineSession {
    opened: Instant,
    killed: CancellationToken,
    /// The WebSocket's stream, once there is one.
    websocket: Mutex<Option<Arc<Handle>>>,
    /// Bytes of answers to polls.
    polled: AtomicU64,
    /// Polls begun.
    polls: AtomicU64,
    /// The connection of the poll that waits for an answer.
    poll: Mutex<Option<Arc<Handle>>>,
    /// Heartbeats that came by polling.
    heartbeats: Heartbeats,
    /// Which client's way of encoding text the session has shown (Engine.IO 3).
    utf8: Mutex<Utf8Mode>,
    /// Of a socket that was let in and is not served yet.
    admission: Mutex<Option<Admission>>,
}

impl EngineSession {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            opened: Instant::now(),
            killed: CancellationToken::new(),
            websocket: Mutex::new(None),
            polled: AtomicU64::new(0),
            polls: AtomicU64::new(0),
            poll: Mutex::new(None),
            heartbeats: Heartbeats::new(),
            utf8: Mutex::new(Utf8Mode::default()),
            admission: Mutex::new(None),
        })
    }

    /// Leaves word for who serves the socket.
    pub fn admit(&self, admission: Admission) {
        *self.admission.lock() = Some(admission);
    }

    /// Takes what [`EngineSession::admit`] left.
    pub fn take_admission(&self) -> Option<Admission> {
        self.admission.lock().take()
    }

    /// Ends the session's transport: a WebSocket at once, a polling client at its next request
    /// or in the one that waits.
    pub fn kill(&self) {
        self.killed.cancel();
        if let Some(websocket) = self.transport() {
            websocket.kill();
        }
    }

    /// Whether [`EngineSession::kill`] was called.
    pub fn killed(&self) -> bool {
        self.killed.is_cancelled()
    }

    /// The WebSocket's stream, once there is one.
    pub fn transport(&self) -> Option<Arc<Handle>> {
        self.websocket.lock().clone()
    }

    /// Probes the connection of the poll that waits, if one does. Returns how many polls there
    /// have been.
    pub fn probe_poll(&self) -> u64 {
        let poll = self.poll.lock().clone();
        if let Some(handle) = poll
            && let Err(error) = handle.probe()
        {
            tracing::debug!(%error, "probing failed");
        }
        self.polls.load(Ordering::Acquire)
    }

    /// Whether a poll waits for its answer.
    pub fn is_polled(&self) -> bool {
        self.poll.lock().is_some()
    }

    /// Whether no poll waits, and none has begun since there were so many.
    pub fn is_without_poll_since(&self, polls: u64) -> bool {
        self.poll.lock().is_none() && self.polls.load(Ordering::Acquire) == polls
    }

    /// Notes a poll until the guard is dropped: answered, or its connection gone.
    fn begin_poll(&self, handle: Option<Arc<Handle>>) -> PollGuard<'_> {
        self.polls.fetch_add(1, Ordering::AcqRel);
        *self.poll.lock() = handle;
        PollGuard(self)
    }

    /// Bytes that left for the client.
    pub fn bytes_written(&self) -> u64 {
        let websocket = self
            .websocket
            .lock()
            .as_ref()
            .map_or(0, |handle| handle.bytes_written());
        websocket + self.polled.load(Ordering::Relaxed)
    }

    /// Up to when the client has provably received everything.
    pub fn confirmed_until(&self) -> Option<Instant> {
        let websocket = self
            .websocket
            .lock()
            .as_ref()
            .and_then(|h| h.confirmed_until());
        websocket.max(self.heartbeats.confirmed_until())
    }
}

/// A poll that waits for its answer.
struct PollGuard<'a>(&'a EngineSession);

impl Drop for PollGuard<'_> {
    fn drop(&mut self) {
        *self.0.poll.lock() = None;
    }
}

/// The Engine.IO sessions of this worker.
#[derive(Debug, Default)]
pub struct Sessions {
    by_id: Mutex<HashMap<String, Arc<EngineSession>>>,
}

impl Sessions {
    /// The session of a connected socket. `transport` is the stream of its first request, which
    /// is the session's own if that asked for a WebSocket.
    pub fn connected(&self, sid: &str, websocket: Option<Arc<Handle>>) -> Arc<EngineSession> {
        let session = self.opened(sid.to_owned());
        if let Some(handle) = websocket {
            *session.websocket.lock() = Some(handle);
        }
        session
    }

    /// Forgets a session. One that was killed is remembered for a while, so that a polling
    /// client learns of its end.
    pub fn closed(&self, sid: &str) {
        let mut sessions = self.by_id.lock();
        if sessions.get(sid).is_some_and(|session| !session.killed()) {
            sessions.remove(sid);
        }
    }

    fn opened(&self, sid: String) -> Arc<EngineSession> {
        self.by_id
            .lock()
            .entry(sid)
            .or_insert_with(EngineSession::new)
            .clone()
    }

    fn len(&self) -> usize {
        self.by_id.lock().len()
    }

    /// The session of an id.
    pub fn get(&self, sid: &str) -> Option<Arc<EngineSession>> {
        self.by_id.lock().get(sid).cloned()
    }

    /// Ends the transports of all of them, as [`EngineSession::kill`] does.
    pub fn kill_all(&self) {
        // Not under the lock: who is woken may ask for it.
        let all: Vec<_> = self.by_id.lock().values().cloned().collect();
        for session in all {
            session.kill();
        }
    }

    /// Forgets what nobody will ask for again. `connected` says which sessions have sockets.
    pub fn sweep(&self, connected: impl Fn(&str) -> bool) {
        self.by_id
            .lock()
            .retain(|sid, session| session.opened.elapsed() < UNCONNECTED || connected(sid));
    }
}

/// What is in a request's query.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Params {
    /// Revision of the engine's protocol, `3` or `4`.
    #[serde(rename = "EIO")]
    pub revision: Option<String>,
    /// `polling` or `websocket`.
    pub transport: Option<String>,
    /// The engine's session, in all but the first request.
    pub sid: Option<String>,
    /// The caller's token, of clients that have no `auth`.
    pub token: Option<String>,
    /// The session to take over.
    pub session: Option<String>,
    /// The last ids that the client has, as JSON.
    pub resume: Option<String>,
}

/// The parameters of a request. A query that cannot be read is as good as none.
pub fn params(uri: &http::Uri) -> Params {
    Query::<Params>::try_from_uri(uri)
        .map(|Query(params)| params)
        .unwrap_or_default()
}

/// socketioxide, as a service.
pub type Inner = BoxCloneSyncService<Request, Response, Infallible>;

/// Who opened a session of revision 3; in the request's extensions.
#[derive(Debug, Clone)]
pub struct OpenedBy(pub Caller);

/// Serves a request under `/socket.io/`.
pub async fn serve(app: Arc<App>, inner: Inner, request: Request) -> Response {
    match exchange(&app, inner, request).await {
        Ok(response) => response,
        Err(error) => error.into_response(),
    }
}

async fn exchange(
    app: &Arc<App>,
    inner: Inner,
    mut request: Request,
) -> Result<Response, ApiError> {
    let params = params(request.uri());
    let revision = match params.revision.as_deref() {
        Some("3") => Revision::V3,
        Some("4") => Revision::V4,
        _ => {
            return Err(ApiError::bad_request(
                "Unsupported protocol version: EIO must be 3 or 4",
            ));
        }
    };
    let websocket = params.transport.as_deref() == Some("websocket");
    let handle = request.extensions().get::<Arc<Handle>>().cloned();
    if let (true, Some(handle)) = (websocket, &handle) {
        handle.expect_upgrade(revision);
    }
    let Some(sid) = params.sid else {
        if app.sessions.len() >= MAX_SESSIONS {
            return Err(ApiError::unavailable());
        }
        if revision == Revision::V3 {
            // These clients understand only a refusal by HTTP status.
            let token = params.token.ok_or_else(ApiError::token_missing)?;
            let caller = app.authenticate(&token).await?;
            request.extensions_mut().insert(OpenedBy(caller));
        }
        let response = call(inner, compact(request)).await;
        return if websocket {
            Ok(response)
        } else {
            open(app, response).await
        };
    };
    let Some(session) = app.sessions.get(&sid) else {
        // Unknown here: socketioxide knows how to say so.
        return Ok(call(inner, request).await);
    };
    if session.killed() {
        return Ok(unknown_session());
    }
    if websocket {
        let response = call(inner, request).await;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            *session.websocket.lock() = handle;
        }
        return Ok(response);
    }
    match *request.method() {
        Method::POST => {
            let request = read_post(&session, revision, request).await?;
            Ok(call(inner, request).await)
        }
        Method::GET => {
            let _poll = session.begin_poll(handle);
            let response = tokio::select! {
                // First: a session that was killed also has a packet that tells the client not
                // to come back.
                biased;
                () = session.killed.cancelled() => return Ok(unknown_session()),
                response = call(inner, request) => response,
            };
            answer_poll(&session, revision, response).await
        }
        _ => Ok(call(inner, request).await),
    }
}

async fn call(inner: Inner, request: Request) -> Response {
    match inner.oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}

/// Copies what is kept of a request that opens a session. The engine keeps it for the session's
/// life, and what hyper parsed are slices that would keep its whole read buffer.
fn compact(request: Request) -> Request {
    let (mut parts, body) = request.into_parts();
    parts.headers = parts
        .headers
        .iter()
        .filter(|(name, _)| KEPT_HEADERS.contains(name))
        .filter_map(|(name, value)| {
            let copy = HeaderValue::from_bytes(value.as_bytes()).ok()?;
            Some((name.clone(), copy))
        })
        .collect();
    if let Ok(uri) = parts.uri.to_string().parse() {
        parts.uri = uri;
    }
    Request::from_parts(parts, body)
}

/// The answer that makes a client open a new session.
fn unknown_session() -> Response {
    let body = axum::Json(json!({ "code": 1, "message": "Session ID unknown" }));
    (
        StatusCode::BAD_REQUEST,
        [(header::CONNECTION, "close")],
        body,
    )
        .into_response()
}

/// Notes the id of a session that was opened by polling.
async fn open(app: &App, response: Response) -> Result<Response, ApiError> {
    let (parts, body) = response.into_parts();
    let bytes = body
        .collect()
        .await
        .map_err(|_| ApiError::internal())?
        .to_bytes();
    if parts.status == StatusCode::OK
        && let Some(sid) = opened_sid(&bytes)
    {
        app.sessions.opened(sid);
    }
    Ok(Response::from_parts(parts, Body::from(bytes)))
}

/// The session id in an open packet: `0{"sid":"…",…}`, after a length and colon in revision 3.
fn opened_sid(packet: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Open {
        sid: String,
    }
    let from = packet.iter().position(|byte| *byte == b'{')?;
    serde_json::from_slice::<Open>(packet.get(from..)?)
        .ok()
        .map(|open| open.sid)
}

async fn read_post(
    session: &EngineSession,
    revision: Revision,
    request: Request,
) -> Result<Request, ApiError> {
    let (mut parts, body) = request.into_parts();
    let read = Limited::new(body, MAX_PAYLOAD).collect();
    let bytes = match tokio::time::timeout(BODY_TIMEOUT, read).await {
        Ok(Ok(collected)) => collected.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => return Err(ApiError::too_large()),
        Ok(Err(_)) => return Err(ApiError::bad_request("The body ended early")),
        Err(_) => return Err(ApiError::timeout()),
    };
    if eio3::heartbeats_in(&bytes, revision) {
        session.heartbeats.note(Instant::now());
    }
    let mut repaired = None;
    if revision == Revision::V3
        && let Ok(text) = std::str::from_utf8(&bytes)
    {
        repaired = eio3::decode_post(text, &mut session.utf8.lock());
    }
    let body = match repaired {
        Some(text) => {
            parts
                .headers
                .insert(header::CONTENT_LENGTH, text.len().into());
            Body::from(text)
        }
        None => Body::from(bytes),
    };
    Ok(Request::from_parts(parts, body))
}

async fn answer_poll(
    session: &EngineSession,
    revision: Revision,
    response: Response,
) -> Result<Response, ApiError> {
    let (mut parts, body) = response.into_parts();
    let bytes = body
        .collect()
        .await
        .map_err(|_| ApiError::internal())?
        .to_bytes();
    let is_text = parts
        .headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|t| t.as_bytes().starts_with(b"text"));
    let escaped = match std::str::from_utf8(&bytes) {
        Ok(text) if revision == Revision::V3 && is_text => eio3::escape_payload(text),
        _ => None,
    };
    let body = match escaped {
        Some(text) => {
            parts
                .headers
                .insert(header::CONTENT_LENGTH, text.len().into());
            bytes::Bytes::from(text)
        }
        None => bytes,
    };
    session
        .polled
        .fetch_add(body.len() as u64, Ordering::Relaxed);
    Ok(Response::from_parts(parts, Body::from(body)))
}

/// The Socket.IO server with the limits and times of this deployment.
pub fn socket_io(app: &App) -> (Inner, SocketIo) {
    let (service, io) = SocketIo::builder()
        .req_path("/socket.io")
        .ping_interval(Duration::from_secs(app.limits().ping_interval.into()))
        .ping_timeout(Duration::from_secs(app.limits().ping_timeout.into()))
        .connect_timeout(Duration::from_secs(10))
        .max_buffer_size(1024)
        .max_payload(MAX_PAYLOAD as u64)
        .ws_max_message_size(MAX_PAYLOAD)
        .ws_max_frame_size(MAX_PAYLOAD)
        .ws_read_buffer_size(1024)
        .with_parser(
            ParserConfig::common()
                .max_incoming_binaries(4)
                .max_incoming_binary_buf_size(MAX_PAYLOAD),
        )
        .build_svc();
    let service = tower::service_fn(move |request: Request| {
        let service = service.clone();
        async move {
            service
                .oneshot(request)
                .await
                .map(|response| response.map(Body::new))
        }
    });
    (Inner::new(service), io)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_of_an_opened_session_is_found_in_both_revisions() {
        let packet = br#"0{"sid":"abc","upgrades":["websocket"],"pingInterval":1}"#;
        assert_eq!(opened_sid(packet).as_deref(), Some("abc"));
        let packet = br#"38:0{"sid":"abc","upgrades":["websocket"]}"#;
        assert_eq!(opened_sid(packet).as_deref(), Some("abc"));
        assert_eq!(opened_sid(b"nonsense"), None);
    }
}
