//! `GET /health`.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use crate::worker::App;

/// How long the master may be away before that is a problem: a restart takes less.
const PATIENCE: Duration = Duration::from_secs(2);

/// How it is with a worker.
#[derive(Debug, Serialize, ToSchema)]
pub struct Health {
    /// What is wrong, for a person.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'static str>,
    status: Condition,
    /// Of the program.
    #[schema(example = "0.1.0")]
    version: &'static str,
    /// The worker's number.
    worker: u32,
}

/// Whether a worker can serve.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Condition {
    Ok,
    Unavailable,
}

/// Tells whether the worker that answers can serve.
///
/// A master that is away is waited for, 2 s at most.
#[utoipa::path(
    get,
    path = "/health",
    tag = "server",
    operation_id = "health",
    security(),
    responses(
        (status = 200, description = "It can", body = Health,
            example = json!({ "status": "ok", "version": "0.1.0", "worker": 0 })),
        (status = 503, description = "It cannot", body = Health,
            example = json!({ "error": "The master is not reachable", "status": "unavailable",
                "version": "0.1.0", "worker": 0 })),
    ),
)]
pub async fn read(State(app): State<Arc<App>>) -> Response {
    let error = if !app.link.await_connected(PATIENCE).await {
        Some("The master is not reachable")
    } else if app.redis.as_ref().is_some_and(|redis| !redis.connected()) {
        Some("Redis is not reachable")
    } else {
        None
    };
    let (code, status) = match error {
        None => (StatusCode::OK, Condition::Ok),
        Some(_) => (StatusCode::SERVICE_UNAVAILABLE, Condition::Unavailable),
    };
    let health = Health {
        error,
        status,
        version: env!("CARGO_PKG_VERSION"),
        worker: app.identity.worker,
    };
    (code, Json(health)).into_response()
}
