//! `GET /health`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use serde_json::json;

use crate::worker::App;

/// `GET /health`: whether this worker can serve, and which one it is.
pub async fn read(State(app): State<Arc<App>>) -> Response {
    let worker = app.identity.worker;
    let version = env!("CARGO_PKG_VERSION");
    if app.link.is_connected() {
        Json(json!({ "status": "ok", "worker": worker, "version": version })).into_response()
    } else {
        let body = json!({
            "status": "unavailable",
            "error": "The master is not reachable",
            "worker": worker,
            "version": version,
        });
        (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
    }
}
