//! `GET` and `POST /channels`, `POST /channels/KEY/join`.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::body::Fields;
use super::error::{ApiError, ErrorBody};
use super::messages;
use super::openapi::{self, Anywhere, Limited, NewChannel, OnChannel, WithBody, WithToken};
use super::token::Caller;
use crate::control::JoinedElsewhere;
use crate::limits::{KeyedBuckets, Limit};
use crate::presence::Status;
use crate::store::{Channel, Message, Range};
use crate::worker::App;

/// Characters of a channel's name.
const NAME_MAX: usize = 64;
/// Characters of a channel's key.
const KEY_MAX: usize = 128;
/// Messages that somebody who joins gets.
pub const HISTORY: u64 = 25;

/// People whose creations are remembered.
const CREATORS: usize = 65_536;

/// How many channels somebody may create: a twentieth of the posts that are allowed, for they
/// stay, and everybody sees them.
pub fn creation_limit(post_rate: u32) -> Limit {
    Limit::new(f64::from(post_rate) / 20.0, post_rate.saturating_mul(3))
}

/// Nobody's creations yet.
pub fn creations(post_rate: u32) -> KeyedBuckets<String> {
    KeyedBuckets::new(creation_limit(post_rate), CREATORS)
}

/// A public channel, as the list shows it.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Channel)]
pub struct Listed {
    /// For people.
    #[schema(example = "General")]
    name: String,
    /// For programs.
    #[schema(example = "general")]
    key: String,
    /// Members who are online.
    online_count: usize,
}

/// The public channels.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Channels)]
pub struct List {
    /// General, Programming, Random, then the others in order of creation.
    channels: Vec<Listed>,
}

/// A channel that was made.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = CreatedChannel)]
pub struct Created {
    #[schema(example = "Gardening")]
    name: String,
    /// 32 random bytes, base64url.
    #[schema(example = "Yj0zgWkYpGDyWEYPr6pKZ8pzKkTUxZVvDkQSwpsgxyQ")]
    key: String,
    /// 0, as nobody is in it.
    online_users: usize,
    /// The same.
    online_count: usize,
}

/// A member of a channel.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Member {
    #[schema(example = "ann")]
    username: String,
    /// What it says of itself in this channel.
    status: Status,
}

impl Member {
    /// The members as clients get them.
    pub fn list(online: Vec<(String, Status)>) -> Vec<Self> {
        online
            .into_iter()
            .map(|(username, status)| Self { username, status })
            .collect()
    }
}

/// A channel for one who joins it.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = JoinedChannel)]
pub struct Joined {
    #[schema(example = "general")]
    key: String,
    #[schema(schema_with = openapi::stored_messages)]
    messages: Vec<String>,
    /// Everybody in it, the caller included.
    online_users: Vec<Member>,
}

/// Lists the public channels.
#[utoipa::path(
    get,
    path = "/channels",
    tag = "channels",
    operation_id = "channels",
    security(("token" = [])),
    responses((status = 200, description = "All of them", body = List), Anywhere, WithToken),
)]
pub async fn list(State(app): State<Arc<App>>, _caller: Caller) -> Result<Json<List>, ApiError> {
    let stored = app.store.channels().await?;
    let channels = stored
        .into_iter()
        .map(|Channel { key, name }| {
            let online_count = app
                .dispatch
                .with_state(|state| state.member_count(&key))
                .unwrap_or_default();
            Listed {
                name,
                key,
                online_count,
            }
        })
        .collect();
    Ok(Json(List { channels }))
}

/// Makes a public channel.
#[utoipa::path(
    post,
    path = "/channels",
    tag = "channels",
    operation_id = "createChannel",
    security(("token" = [])),
    request_body = NewChannel,
    responses(
        (status = 201, description = "It is made", body = Created),
        (status = 400, description = "The name is missing, blank, not a string or too long",
            body = ErrorBody, example = json!({ "error": "Missing channel name!" })),
        Anywhere, WithBody, Limited, WithToken,
    ),
)]
pub async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    fields: Fields,
) -> Result<(StatusCode, Json<Created>), ApiError> {
    let name = fields
        .string("name")
        .filter(|name| !name.trim().is_empty())
        .ok_or_else(|| ApiError::bad_request("Missing channel name!"))?;
    if name.chars().count() > NAME_MAX {
        return Err(ApiError::bad_request(format!(
            "The channel name is too long. (max {NAME_MAX}. characters)"
        )));
    }
    app.creations
        .lock()
        .take(&caller.name, Instant::now())
        .map_err(|after| {
            crate::limit_hit!("BANTER_POST_RATE", user = caller.name);
            ApiError::too_many(after)
        })?;
    let key = BASE64_URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>());
    let name = name.to_owned();
    app.store
        .create_channel(Channel {
            key: key.clone(),
            name: name.clone(),
        })
        .await?;
    tracing::info!(
        event = "channel_created",
        user = caller.name,
        channel = key,
        "{} created a channel",
        caller.name
    );
    Ok((
        StatusCode::CREATED,
        Json(Created {
            name,
            key,
            online_users: 0,
            online_count: 0,
        }),
    ))
}

/// Puts the caller's Socket.IO session into a channel.
///
/// Any key is a channel; who knows it may join. The caller's socket gets live events from right after the last of
/// `messages` on. Joining twice is joining once. Without a living session the answer is the same, and
/// nobody is joined.
#[utoipa::path(
    post,
    path = "/channels/{key}/join",
    tag = "channels",
    operation_id = "join",
    security(("token" = [])),
    params(("key" = String, Path, description = "The channel's key: 1 to 128 characters of UTF-8",
        min_length = 1, max_length = 128, example = "general")),
    responses(
        (status = 200, description = "The latest 25 messages, and who is there", body = Joined),
        (status = 400, description = "The key is too long, or is no UTF-8", body = ErrorBody,
            example = json!({ "error": "The channel key must be 1 to 128 characters of UTF-8" })),
        (status = 403, description = "The session is in 128 channels already", body = ErrorBody,
            example = json!({ "error": "You are in too many channels, leave one first" })),
        Anywhere, OnChannel, WithToken,
    ),
)]
pub async fn join(
    State(app): State<Arc<App>>,
    caller: Caller,
    key: Result<Path<String>, PathRejection>,
) -> Result<Json<Joined>, ApiError> {
    let key = channel_key(key)?;
    let answer = |messages: Vec<Message>, online| Joined {
        key: key.clone(),
        messages: messages::as_strings(&messages),
        online_users: Member::list(online),
    };
    match app.link.join_user(caller.name.clone(), key.clone()).await? {
        JoinedElsewhere::Joined { messages, online } => Ok(Json(answer(messages, online))),
        JoinedElsewhere::Offline => {
            let range = Range::Latest {
                start: 0,
                end: HISTORY,
            };
            let page = app.store.read(&key, range).await?;
            let mut online = app.dispatch.online(&key);
            // The caller is in the list, as for everybody else.
            if online.iter().all(|(name, _)| *name != caller.name) {
                online.push((caller.name, Status::Online));
            }
            Ok(Json(answer(page.messages, online)))
        }
        JoinedElsewhere::TooManyChannels => Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "You are in too many channels, leave one first",
        )),
        JoinedElsewhere::Unavailable => Err(ApiError::unavailable()),
    }
}

/// The key in a path.
pub fn channel_key(key: Result<Path<String>, PathRejection>) -> Result<String, ApiError> {
    match key {
        Ok(Path(key)) if is_channel_key(&key) => Ok(key),
        _ => Err(ApiError::bad_request(format!(
            "The channel key must be 1 to {KEY_MAX} characters of UTF-8"
        ))),
    }
}

/// Whether a channel can have this key.
pub fn is_channel_key(key: &str) -> bool {
    (1..=KEY_MAX).contains(&key.chars().count())
}
