//! `GET /health`.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use serde_json::json;

use crate::worker::App;

/// How long the master may be away before that is a problem: a restart takes less.
const PATIENCE: Duration = Duration::from_secs(2);

/// `GET /health`: whether this worker can serve, and which one it is.
pub async fn read(State(app): State<Arc<App>>) -> Response {
    let worker = app.identity.worker;
    let version = env!("CARGO_PKG_VERSION");
    let problem = if !app.link.await_connected(PATIENCE).await {
        "The master is not reachable"
    } else if app.redis.as_ref().is_some_and(|redis| !redis.connected()) {
        "Redis is not reachable"
    } else {
        return Json(json!({ "status": "ok", "worker": worker, "version": version }))
            .into_response();
    };
    let body = json!({
        "status": "unavailable",
        "error": problem,
        "worker": worker,
        "version": version,
    });
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}
