//! `GET /channels/KEY/messages`.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::channels::channel_key;
use super::error::{ApiError, ErrorBody};
use super::openapi::{self, Anywhere, OnChannel, WithToken};
use super::token::Caller;
use crate::store::{Message, PAGE_LIMIT, Range};
use crate::worker::App;

/// Which messages; numbers are read here, so that what is wrong with one can be said.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Params {
    /// Position of the newest message wanted, counted from the channel's newest, which is 0.
    #[param(value_type = Option<u64>, format = "uint64", example = 0)]
    start: Option<String>,
    /// The position after the oldest message wanted.
    #[param(value_type = Option<u64>, format = "uint64", example = 25)]
    end: Option<String>,
    /// Messages before this id, the closest to it.
    #[param(value_type = Option<u64>, format = "uint64")]
    before: Option<String>,
    /// Messages after this id, the closest to it.
    #[param(value_type = Option<u64>, format = "uint64")]
    after: Option<String>,
    /// With `before` or `after`: so many at most.
    #[param(value_type = Option<u64>, minimum = 1, maximum = 200)]
    limit: Option<String>,
}

/// A part of a channel's history.
#[derive(Debug, Serialize, ToSchema)]
pub struct History {
    #[schema(schema_with = openapi::stored_messages)]
    messages: Vec<String>,
}

/// Reads a part of a channel's history.
///
/// By positions, `start` and `end`, or by ids, `before` or `after` with `limit`: 200 messages at most.
/// Fewer than asked means that the history ends there.
#[utoipa::path(
    get,
    path = "/channels/{key}/messages",
    tag = "channels",
    operation_id = "history",
    security(("token" = [])),
    params(
        ("key" = String, Path, description = "The channel's key: 1 to 128 characters of UTF-8",
            min_length = 1, max_length = 128, example = "general"),
        Params,
    ),
    responses(
        (status = 200, description = "The messages", body = History),
        (status = 400, description = "The key or a number cannot be read, or the parameters do \
            not go together: the text says what", body = ErrorBody,
            example = json!({ "error": "start must be a whole number, zero or more" })),
        Anywhere, OnChannel, WithToken,
    ),
)]
pub async fn read(
    State(app): State<Arc<App>>,
    _caller: Caller,
    key: Result<Path<String>, PathRejection>,
    params: Result<Query<Params>, QueryRejection>,
) -> Result<Json<History>, ApiError> {
    let key = channel_key(key)?;
    let Query(params) = params.map_err(|_| {
        ApiError::bad_request("The query cannot be read: each parameter may be given once")
    })?;
    let range = params.range()?;
    let page = app.store.read(&key, range).await?;
    Ok(Json(History {
        messages: as_strings(&page.messages),
    }))
}

/// Messages as clients get them in a history: each one a string that holds JSON.
pub fn as_strings(messages: &[Message]) -> Vec<String> {
    messages
        .iter()
        .map(|message| message.event.get().to_owned())
        .collect()
}

impl Params {
    fn range(&self) -> Result<Range, ApiError> {
        let limit = match &self.limit {
            Some(text) => number("limit", text)?,
            None => u64::from(PAGE_LIMIT),
        };
        let limit = match u32::try_from(limit) {
            Ok(limit @ 1..=PAGE_LIMIT) => limit,
            _ => {
                return Err(ApiError::bad_request(format!(
                    "limit must be 1 to {PAGE_LIMIT}"
                )));
            }
        };
        match (&self.start, &self.end, &self.before, &self.after) {
            (None, None, Some(before), None) => Ok(Range::Before {
                id: number("before", before)?,
                limit,
            }),
            (None, None, None, Some(after)) => Ok(Range::After {
                id: number("after", after)?,
                limit,
            }),
            (Some(start), Some(end), None, None) => {
                let (start, end) = (number("start", start)?, number("end", end)?);
                if end < start {
                    return Err(ApiError::bad_request("end must not be before start"));
                }
                if end - start > u64::from(PAGE_LIMIT) {
                    return Err(ApiError::bad_request(format!(
                        "At most {PAGE_LIMIT} messages a request"
                    )));
                }
                Ok(Range::Latest { start, end })
            }
            _ => Err(ApiError::bad_request(
                "Missing parameter! Give start and end, or before, or after",
            )),
        }
    }
}

fn number(name: &str, text: &str) -> Result<u64, ApiError> {
    // `parse` takes a leading plus, which in a query is a space anyway.
    text.parse()
        .ok()
        .filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()))
        .ok_or_else(|| {
            ApiError::bad_request(format!("{name} must be a whole number, zero or more"))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(start: &str, end: &str) -> Params {
        Params {
            start: Some(start.into()),
            end: Some(end.into()),
            ..Params::default()
        }
    }

    #[test]
    fn positions_must_be_whole_numbers_in_order() {
        assert_eq!(
            params("0", "25").range(),
            Ok(Range::Latest { start: 0, end: 25 })
        );
        for (start, end) in [
            ("-1", "5"),
            ("1.5", "5"),
            ("x", "5"),
            ("", "5"),
            ("6", "5"),
            ("0", "201"),
            ("+1", "5"),
        ] {
            assert!(params(start, end).range().is_err(), "{start} {end}");
        }
        assert!(Params::default().range().is_err());
    }
}
