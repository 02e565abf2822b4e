//! What clients send, read and checked; what they get when it will not do.

use std::time::Duration;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::engine::Params;
use crate::presence::Status;
use crate::store::StoreError;
use crate::worker::http::channels::is_channel_key;
use crate::worker::link::Away;

/// Bytes of an event's name; no event that there is has so many.
pub const NAME_MAX: usize = 64;

/// Bytes of a nonce.
const NONCE_MAX: usize = 64;

/// Why an event is refused, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)] // the names are the protocol's
pub enum Code {
    BadPayload,
    TooLarge,
    NotJoined,
    RateLimited,
    Unavailable,
    Forbidden,
}

/// A refusal, as it is acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Refusal {
    /// For a person.
    error: String,
    /// For a program.
    pub code: Code,
    /// Milliseconds until it may be tried again.
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after: Option<u64>,
}

impl Refusal {
    /// A refusal with its text.
    pub fn new(code: Code, error: impl Into<String>) -> Self {
        Self {
            error: error.into(),
            code,
            retry_after: None,
        }
    }

    /// The payload is wrong in this way.
    pub fn bad_payload(error: impl Into<String>) -> Self {
        Self::new(Code::BadPayload, error)
    }

    /// Too fast; `after` says when it may be tried again.
    pub fn rate_limited(after: Duration) -> Self {
        // Rounded up: whoever waits so long must succeed.
        let millis = after.as_nanos().div_ceil(1_000_000);
        let retry_after = Some(u64::try_from(millis).unwrap_or(u64::MAX).max(1));
        let error = "You are too fast, slow down".to_owned();
        Self {
            error,
            code: Code::RateLimited,
            retry_after,
        }
    }

    /// Not a member.
    pub fn not_joined() -> Self {
        Self::new(Code::NotJoined, "You have not joined this channel")
    }

    /// The session belongs to another connection.
    pub fn superseded() -> Self {
        Self::new(
            Code::Forbidden,
            "This session has been taken over by another connection",
        )
    }

    /// Too many channels.
    pub fn too_many_channels() -> Self {
        Self::new(
            Code::Forbidden,
            "You are in too many channels, leave one first",
        )
    }

    /// For the moment.
    pub fn unavailable() -> Self {
        Self::new(
            Code::Unavailable,
            "The server is not available for the moment, try again",
        )
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        tracing::warn!("an event failed: {error}");
        Self::unavailable()
    }
}

impl From<Away> for Refusal {
    fn from(_: Away) -> Self {
        Self::unavailable()
    }
}

/// Bytes that an event takes in a queue, roughly: what is nested counts by its nodes and texts.
pub fn size(name: &str, data: Option<&Value>) -> u32 {
    fn of(value: &Value) -> usize {
        const NODE: usize = 32;
        NODE + match value {
            Value::String(text) => text.len(),
            Value::Array(items) => items.iter().map(of).sum(),
            Value::Object(fields) => fields.iter().map(|(name, v)| name.len() + of(v)).sum(),
            Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        }
    }
    let bytes = name.len() + data.map_or(0, of) + 64;
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// More events at once than a session keeps.
pub fn overrun() -> Refusal {
    Refusal::rate_limited(Duration::from_secs(1))
}

/// There is no such event.
pub fn unknown(name: &str) -> Refusal {
    Refusal::bad_payload(format!("There is no event {name:.NAME_MAX$}"))
}

/// What a client presents when it connects.
#[derive(Debug, Default)]
pub struct Credentials {
    /// Who it is.
    pub token: Option<String>,
    /// The session that it takes over.
    pub session: Option<String>,
    /// The last ids that it has, by channel; `None` if it names none.
    pub resume: Option<Vec<(String, u64)>>,
}

impl Credentials {
    /// From the `auth` of newer clients, else from the query.
    pub fn of(query: &Params, auth: Option<&Value>) -> Self {
        let auth = auth.and_then(Value::as_object);
        let text = |name: &str| {
            auth.and_then(|auth| auth.get(name))
                .and_then(Value::as_str)
                .map(str::to_owned)
        };
        let resume = match auth.and_then(|auth| auth.get("resume")) {
            Some(Value::Object(ids)) => Some(ids.clone()),
            Some(Value::String(json)) => serde_json::from_str(json).ok(),
            _ => query
                .resume
                .as_deref()
                .and_then(|json| serde_json::from_str(json).ok()),
        };
        Self {
            token: text("token").or_else(|| query.token.clone()),
            session: text("session").or_else(|| query.session.clone()),
            resume: resume.map(|ids: Map<String, Value>| {
                ids.into_iter()
                    .filter_map(|(key, id)| Some((key, id.as_u64()?)))
                    .collect()
            }),
        }
    }
}

/// A post.
#[derive(Debug, PartialEq, Eq)]
pub struct Post {
    /// Key of the channel.
    pub channel: String,
    /// The text.
    pub message: String,
    /// The client's nonce.
    pub nonce: Option<String>,
}

/// The fields of a payload.
pub struct Payload(Map<String, Value>);

impl Payload {
    /// A payload must be an object.
    ///
    /// # Errors
    /// `bad_payload`.
    pub fn new(data: Option<Value>) -> Result<Self, Refusal> {
        match data {
            Some(Value::Object(fields)) => Ok(Self(fields)),
            _ => Err(Refusal::bad_payload("The payload must be an object")),
        }
    }

    fn text(&mut self, name: &str) -> Result<String, Refusal> {
        match self.0.remove(name) {
            Some(Value::String(text)) => Ok(text),
            _ => Err(Refusal::bad_payload(format!("{name} must be a string"))),
        }
    }

    /// The channel's key.
    ///
    /// # Errors
    /// `bad_payload`.
    pub fn channel(&mut self) -> Result<String, Refusal> {
        self.text("channel").and_then(|key| {
            if is_channel_key(&key) {
                Ok(key)
            } else {
                Err(Refusal::bad_payload("channel must be 1 to 128 characters"))
            }
        })
    }

    /// A post of at most `max` bytes (0: any number).
    ///
    /// # Errors
    /// `bad_payload` or `too_large`.
    pub fn post(mut self, max: u32) -> Result<Post, Refusal> {
        let channel = self.channel()?;
        let message = self.text("message")?;
        if max > 0 && message.len() > max as usize {
            return Err(Refusal::new(
                Code::TooLarge,
                format!(
                    "The message has {} bytes, at most {max} are allowed",
                    message.len()
                ),
            ));
        }
        if message.trim().is_empty() {
            return Err(Refusal::bad_payload("The message is empty"));
        }
        let nonce = match self.0.remove("nonce") {
            None | Some(Value::Null) => None,
            Some(Value::String(nonce)) if (1..=NONCE_MAX).contains(&nonce.len()) => Some(nonce),
            Some(_) => {
                return Err(Refusal::bad_payload(format!(
                    "nonce must be a string of 1 to {NONCE_MAX} bytes"
                )));
            }
        };
        Ok(Post {
            channel,
            message,
            nonce,
        })
    }

    /// A status.
    ///
    /// # Errors
    /// `bad_payload`.
    pub fn status(&mut self) -> Result<Status, Refusal> {
        match self.0.remove("status").as_ref().and_then(Value::as_str) {
            Some("online") => Ok(Status::Online),
            Some("away") => Ok(Status::Away),
            _ => Err(Refusal::bad_payload("status must be online or away")),
        }
    }

    /// The id after which messages are wanted.
    ///
    /// # Errors
    /// `bad_payload`.
    pub fn after(&mut self) -> Result<Option<u64>, Refusal> {
        match self.0.remove("after") {
            None | Some(Value::Null) => Ok(None),
            Some(id) => id.as_u64().map(Some).ok_or_else(|| {
                Refusal::bad_payload("after must be a message id: a whole number, zero or more")
            }),
        }
    }
}

/// The answer to what needs none.
pub fn nothing() -> Value {
    json!({})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn post(data: Value, max: u32) -> Result<Post, Code> {
        Payload::new(Some(data))
            .and_then(|p| p.post(max))
            .map_err(|refusal| refusal.code)
    }

    #[test]
    fn a_message_is_a_string_always() {
        for message in [
            json!(null),
            json!(1),
            json!({}),
            json!(["x"]),
            json!("  \n\t"),
        ] {
            let got = post(json!({ "channel": "x", "message": message }), 0);
            assert_eq!(got, Err(Code::BadPayload), "{message}");
        }
        for payload in [
            json!(null),
            json!("x"),
            json!([]),
            json!({ "message": "x" }),
        ] {
            assert_eq!(post(payload, 0), Err(Code::BadPayload));
        }
    }

    #[test]
    fn the_largest_message_is_measured_in_bytes() {
        let data = |n: usize| json!({ "channel": "x", "message": "ä".repeat(n) });
        assert!(post(data(8), 16).is_ok());
        assert_eq!(post(data(9), 16), Err(Code::TooLarge));
        assert!(post(data(9000), 0).is_ok());
    }

    #[test]
    fn a_nonce_is_bounded() {
        let data = |nonce: Value| json!({ "channel": "x", "message": "m", "nonce": nonce });
        assert_eq!(
            post(data(json!("n".repeat(64))), 0)
                .unwrap()
                .nonce
                .unwrap()
                .len(),
            64
        );
        for nonce in [json!("n".repeat(65)), json!(""), json!(5)] {
            assert_eq!(post(data(nonce), 0), Err(Code::BadPayload));
        }
    }

    #[test]
    fn credentials_come_from_auth_or_the_query() {
        let query = Params {
            token: Some("q".into()),
            resume: Some(r#"{"a":5,"b":"x"}"#.into()),
            ..Params::default()
        };
        let credentials = Credentials::of(&query, None);
        assert_eq!(credentials.token.as_deref(), Some("q"));
        assert_eq!(credentials.resume, Some(vec![("a".to_owned(), 5)]));
        let auth = json!({ "token": "a", "session": "s", "resume": { "c": 7 } });
        let credentials = Credentials::of(&query, Some(&auth));
        assert_eq!(credentials.token.as_deref(), Some("a"));
        assert_eq!(credentials.session.as_deref(), Some("s"));
        assert_eq!(credentials.resume, Some(vec![("c".to_owned(), 7)]));
    }

    #[test]
    fn whoever_waits_as_told_succeeds() {
        let refusal = Refusal::rate_limited(Duration::from_micros(1_500));
        assert_eq!(refusal.retry_after, Some(2));
    }
}
