//! The REST side of a worker, one file for each resource, and the page that people chat on.

pub mod accounts;
pub mod body;
pub mod channels;
pub mod error;
pub mod health;
pub mod messages;
pub mod openapi;
pub mod token;
pub mod web;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::any;
use http::{HeaderName, Method, header};
use tower_http::cors::{AllowOrigin, Any, CorsLayer};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::App;
use super::socket;
use error::ApiError;

/// Bytes that a request's body may have.
pub const MAX_BODY: usize = 64 * 1024;

/// How long a request may take, its body included; polls are not bound by it.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Headers that clients send and that a preflight must allow.
const ALLOWED_HEADERS: [HeaderName; 2] = [header::AUTHORIZATION, header::CONTENT_TYPE];

/// Methods that are used anywhere.
const ALLOWED_METHODS: [Method; 4] = [Method::GET, Method::POST, Method::HEAD, Method::OPTIONS];

/// The operations of REST: their routes, and the document about them.
fn rest() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::with_openapi(openapi::head())
        .routes(routes!(accounts::register))
        .routes(routes!(accounts::login))
        .routes(routes!(channels::list, channels::create))
        .routes(routes!(channels::join))
        .routes(routes!(messages::read))
        .routes(routes!(health::read))
        .routes(routes!(openapi::read))
}

/// Everything that a worker serves.
pub fn router(app: Arc<App>) -> Router {
    let rest = Router::from(rest())
        .merge(web::routes())
        .fallback(async || ApiError::not_found())
        .method_not_allowed_fallback(async || ApiError::method_not_allowed())
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn(bound_in_time))
        .layer(
            CorsLayer::new()
                .allow_origin(Any)
                .allow_headers(ALLOWED_HEADERS)
                .allow_methods(ALLOWED_METHODS)
                .expose_headers([header::RETRY_AFTER])
                .max_age(Duration::from_secs(3600)),
        );
    let (service, io) = socket::engine::socket_io(&app);
    socket::listen(&app, &io);
    socket::sweep_sessions(app.clone(), io);
    // Old browsers poll with credentials: the origin must be named, not `*`.
    let cors = CorsLayer::new()
        .allow_origin(AllowOrigin::mirror_request())
        .allow_credentials(true)
        .allow_headers(ALLOWED_HEADERS)
        .allow_methods(ALLOWED_METHODS)
        .max_age(Duration::from_secs(3600));
    let socket_io = Router::new()
        .route(
            "/socket.io/",
            any({
                let app = app.clone();
                move |request: Request| socket::engine::serve(app.clone(), service.clone(), request)
            }),
        )
        .layer(DefaultBodyLimit::disable())
        .layer(cors);
    rest.with_state(app).merge(socket_io)
}

/// Refuses a request that takes too long, as a rule because its body does.
async fn bound_in_time(request: Request, next: Next) -> Response {
    match tokio::time::timeout(TIMEOUT, next.run(request)).await {
        Ok(response) => response,
        Err(_) => ApiError::timeout().into_response(),
    }
}
