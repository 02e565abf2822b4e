//! `GET /channels/KEY/messages`.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use serde::{Deserialize, Serialize};

use super::channels::channel_key;
use super::error::ApiError;
use super::token::Caller;
use crate::store::{Message, PAGE_LIMIT, Range};
use crate::worker::App;

/// Which messages; numbers are read here, so that what is wrong with one can be said.
#[derive(Debug, Default, Deserialize)]
pub struct Params {
    start: Option<String>,
    end: Option<String>,
    before: Option<String>,
    after: Option<String>,
    limit: Option<String>,
}

/// The answer.
#[derive(Debug, Serialize)]
pub struct History {
    messages: Vec<String>,
}

/// `GET /channels/KEY/messages`.
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
