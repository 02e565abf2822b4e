//! `GET /openapi.json`: REST as an OpenAPI document, made of the routes themselves.
//!
//! Each handler says beside its code what it takes and answers; [`super::rest`] makes router and
//! document of these at once. What many operations have in common is here.

use std::sync::LazyLock;

use axum::response::Response;
use http::HeaderMap;
use utoipa::openapi::schema::{Array, Object, ObjectBuilder, SchemaType, Type};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{OpenApi as Document, Ref, RefOr, Schema};
use utoipa::{IntoResponses, Modify, OpenApi, ToSchema};

use super::error::ErrorBody;
use super::web::Asset;
use crate::store::EventBody;

const JSON: &str = "application/json";

/// What the document says beside the operations.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Banter",
        description = "Accounts, channels and history of a Banter server. Everything live is \
            Socket.IO, which docs/api.md describes.\n\nEvery answer, errors included, allows any \
            origin. Every error is JSON with a text for a person. Where there is GET there is \
            HEAD. Beside these paths, the page at `/` and Socket.IO there is nothing: other paths \
            get 404, other methods 405.",
        license(name = "MIT", identifier = "MIT"),
        contact(),
    ),
    tags(
        (name = "accounts", description = "Making an account, and getting a token"),
        (name = "channels", description = "Public channels, joining, history"),
        (name = "server", description = "About the server itself"),
    ),
    components(schemas(ErrorBody, EventBody)),
    modifiers(&TokenScheme),
)]
struct Head;

/// How callers prove who they are.
struct TokenScheme;

impl Modify for TokenScheme {
    fn modify(&self, document: &mut Document) {
        let scheme = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .bearer_format("JWT")
            .description(Some(
                "The token of `/auth/register` or `/auth/login`, good for a week. `Bearer: TOKEN` \
                 and the bare token are understood as well.",
            ))
            .build();
        document
            .components
            .get_or_insert_default()
            .add_security_scheme("token", SecurityScheme::Http(scheme));
    }
}

/// What any operation may answer.
#[derive(IntoResponses)]
#[allow(dead_code)] // it only describes
pub enum Anywhere {
    /// The request took more than 30 s, as a rule because its body did.
    #[response(status = 408, example = json!({ "error": "The request took too long" }))]
    TimedOut(ErrorBody),
    /// Not for the moment: the store or the master is away, or too much is waiting.
    #[response(
        status = 503,
        headers(("Retry-After" = u32, description = "Seconds until it may be tried again")),
        example = json!({ "error": "The server is not available for the moment, try again" }),
    )]
    Unavailable(ErrorBody),
}

/// What an operation with a JSON body may answer.
#[derive(IntoResponses)]
#[allow(dead_code)] // it only describes
pub enum WithBody {
    /// The body has more than 64 KiB.
    #[response(status = 413, example = json!({ "error": "The body is too large" }))]
    TooLarge(ErrorBody),
    /// The body is not declared as JSON.
    #[response(
        status = 415,
        example = json!({ "error": "The body must be JSON (Content-Type: application/json)" }),
    )]
    NotJson(ErrorBody),
}

/// What an operation that is limited may answer.
#[derive(IntoResponses)]
#[allow(dead_code)] // it only describes
pub enum Limited {
    /// Too often.
    #[response(
        status = 429,
        headers(("Retry-After" = u32, description = "Seconds until it may be tried again")),
        example = json!({ "error": "Too many attempts, try again later" }),
    )]
    TooMany(ErrorBody),
}

/// What an operation that needs a token may answer.
#[derive(IntoResponses)]
#[allow(dead_code)] // it only describes
pub enum WithToken {
    /// The token is missing, invalid or expired, or its account is gone.
    #[response(status = 401, example = json!({ "error": "Token is missing" }))]
    Unknown(ErrorBody),
}

/// What an operation on the password may answer.
#[derive(IntoResponses)]
#[allow(dead_code)] // it only describes
pub enum WithPassword {
    /// Something went wrong on the server; its log knows more.
    #[response(status = 500, example = json!({ "error": "Something went wrong on the server" }))]
    Internal(ErrorBody),
}

/// What an operation on one channel may answer.
#[derive(IntoResponses)]
#[allow(dead_code)] // it only describes
pub enum OnChannel {
    /// The key is empty: there is no such path.
    #[response(status = 404, example = json!({ "error": "There is nothing here" }))]
    NotFound(ErrorBody),
}

/// A name and a password.
#[derive(ToSchema)]
#[schema(example = json!({ "name": "ann", "password": "correct horse" }))]
#[allow(dead_code)] // it only describes
pub struct Credentials {
    /// Not `System` or `You` in any case.
    #[schema(min_length = 3, max_length = 32, pattern = "^[A-Za-z0-9]+$")]
    name: String,
    /// At least 6 characters (as JavaScript counts them), at most 1,024 bytes.
    #[schema(min_length = 6, max_length = 1024, format = Password)]
    password: String,
}

/// A name and a password, whatever they are.
#[derive(ToSchema)]
#[schema(example = json!({ "name": "ann", "password": "correct horse" }))]
#[allow(dead_code)] // it only describes
pub struct Login {
    #[schema(min_length = 1)]
    name: String,
    #[schema(min_length = 1, format = Password)]
    password: String,
}

/// A channel to be made.
#[derive(ToSchema)]
#[schema(example = json!({ "name": "Gardening" }))]
#[allow(dead_code)] // it only describes
pub struct NewChannel {
    /// Not blank.
    #[schema(min_length = 1, max_length = 64, pattern = r"\S")]
    name: String,
}

/// Messages of a history: strings, each of which holds a message as JSON.
pub fn stored_messages() -> Array {
    let one: Object = ObjectBuilder::new()
        .schema_type(SchemaType::Type(Type::String))
        .content_media_type(JSON)
        .content_schema(Some(Ref::from_schema_name("Message")))
        .build();
    let mut messages = Array::new(RefOr::T(Schema::Object(one)));
    messages.description =
        Some("Oldest first. Each one is a string: JSON to be parsed.".to_owned());
    messages
}

/// The document, as it is served and as docs/openapi.json holds it.
pub fn document() -> String {
    let document = super::rest().into_openapi();
    // It is made of strings and numbers: nothing in it could fail.
    let mut text = document.to_pretty_json().unwrap_or_default();
    text.push('\n');
    text
}

/// What the document begins with.
pub fn head() -> Document {
    Head::openapi()
}

static DOCUMENT: LazyLock<Asset> = LazyLock::new(|| Asset::new(JSON, document().into()));

/// This document.
///
/// It carries an `ETag`, and is compressed for those that take gzip.
#[utoipa::path(
    get,
    path = "/openapi.json",
    tag = "server",
    operation_id = "openapi",
    security(),
    responses(
        (status = 200, description = "The document", body = serde_json::Value,
            headers(("ETag" = String, description = "Of this text"))),
        (status = 304, description = "The document is the one that `If-None-Match` names"),
        Anywhere,
    ),
)]
pub async fn read(headers: HeaderMap) -> Response {
    DOCUMENT.answer_anew(&headers)
}
