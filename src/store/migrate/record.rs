//! What one user, channel or message of the server before means here. No I/O.
//!
//! Each function returns the reason where something cannot be taken over.

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::fmt::rfc2822;
use jiff::tz::TimeZone;
use serde_json::{Map, Value};

use super::source::UserFields;
use crate::store::{Channel, User};
use crate::worker::http::accounts::check_name;
use crate::worker::http::channels::is_channel_key;
use crate::worker::passwords::is_bcrypt;

/// Bytes of a message, at most: more would not fit into a packet of the clients' transport. The
/// limit for new messages is not asked for, because a change of it would change what is skipped,
/// and so the ids.
const MAX_MESSAGE: usize = 1_000_000;

/// Characters of an author's and of a channel's name, at most. Both may be longer than new ones
/// may, but not without bound.
const MAX_NAME: usize = 256;

/// A user from the fields `name` and `password` of the hash `user__NAME`. NAME is what the login
/// looks for.
pub(super) fn user(key: &[u8], fields: UserFields) -> Result<User, &'static str> {
    let [field, password] = fields.ok_or("it is not a hash")?;
    let name = key.strip_prefix(b"user__").unwrap_or_default();
    let name = std::str::from_utf8(name)
        .ok()
        .filter(|name| check_name(name).is_ok())
        .ok_or("the name is not allowed here")?;
    if field.is_some_and(|field| field != name.as_bytes()) {
        return Err("its field \"name\" holds another name than its key");
    }
    let password = password
        .filter(|password| !password.is_empty())
        .ok_or("it has no password")?;
    let password_hash = String::from_utf8(password)
        .ok()
        .filter(|hash| is_bcrypt(hash))
        .ok_or("its password is not a hash of bcrypt ($2a$, $2b$, $2y$; cost 4 to 16)")?;
    Ok(User {
        name: name.to_owned(),
        password_hash,
    })
}

/// A channel from an item of `channel__`: JSON `{key, name}`.
pub(super) fn channel(item: &[u8]) -> Result<Channel, &'static str> {
    let fields = object(item)?;
    let key = text(&fields, "key")
        .filter(|key| is_channel_key(key))
        .ok_or("its key is not a string of 1 to 128 characters")?;
    let name = text(&fields, "name")
        .filter(|name| !name.trim().is_empty())
        .ok_or("it has no name")?;
    if name.chars().count() > MAX_NAME {
        return Err("its name has more than 256 characters");
    }
    Ok(Channel {
        key: key.to_owned(),
        name: name.to_owned(),
    })
}

/// A message that can be taken over.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) user: String,
    pub(super) message: String,
    /// Unix time in milliseconds; `None` if there is none that can be read, or it lies in the
    /// future: all later messages would have to be as late.
    pub(super) millis: Option<i64>,
}

/// A message from an item of `channel_msg__KEY`: JSON `{message, user, date}`. `now` is Unix time
/// in milliseconds.
pub(super) fn message(item: &[u8], now: i64) -> Result<Message, &'static str> {
    let fields = object(item)?;
    // Whoever wrote it may have no account that is allowed here: it is said all the same.
    let user = text(&fields, "user")
        .filter(|user| !user.trim().is_empty())
        .ok_or("it has no author")?;
    if user.chars().count() > MAX_NAME {
        return Err("its author's name has more than 256 characters");
    }
    let message = text(&fields, "message").ok_or("the message is not a string")?;
    if message.trim().is_empty() {
        return Err("the message is empty");
    }
    if message.len() > MAX_MESSAGE {
        return Err("the message has more than 1 MB");
    }
    Ok(Message {
        user: user.to_owned(),
        message: message.to_owned(),
        millis: fields
            .get("date")
            .and_then(date)
            .filter(|millis| (0..=now).contains(millis)),
    })
}

fn text<'a>(fields: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    fields.get(name)?.as_str()
}

/// Reads a JSON object.
fn object(item: &[u8]) -> Result<Map<String, Value>, &'static str> {
    let text = std::str::from_utf8(item).map_err(|_| "it is not UTF-8")?;
    serde_json::from_str(text)
        .or_else(|_| serde_json::from_str(&without_lone_surrogates(text)))
        .map_err(|_| "it is not a JSON object")
}

/// JSON with U+FFFD for each escaped half of a surrogate pair, which a JavaScript string can hold
/// (where it was cut off amid an emoji) and no other.
fn without_lone_surrogates(json: &str) -> String {
    let unit = |escape: &str| {
        let digits = escape.strip_prefix("\\u")?.get(..4)?;
        u16::from_str_radix(digits, 16).ok()
    };
    let mut mended = String::with_capacity(json.len());
    let mut rest = json;
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        mended.push_str(before);
        let (kept, length) = match unit(escape) {
            Some(0xd800..0xdc00) => match escape.get(6..).and_then(unit) {
                Some(0xdc00..0xe000) => (escape.get(..12), 12),
                _ => (Some("\\ufffd"), 6),
            },
            Some(0xdc00..0xe000) => (Some("\\ufffd"), 6),
            // What is escaped may be a backslash.
            _ => {
                let length = escape.chars().take(2).map(char::len_utf8).sum();
                (escape.get(..length), length)
            }
        };
        mended.push_str(kept.unwrap_or_default());
        rest = escape.get(length..).unwrap_or_default();
    }
    mended.push_str(rest);
    mended
}

/// A date as Unix time in milliseconds, from any form that JavaScript gives one: milliseconds, ISO
/// 8601, and what `toString` and `toUTCString` return. Without a time zone it is UTC.
fn date(value: &Value) -> Option<i64> {
    let text = match value {
        Value::Number(number) => {
            #[allow(clippy::cast_possible_truncation, reason = "it saturates")]
            return number.as_i64().or(number.as_f64().map(|n| n as i64));
        }
        Value::String(text) => text.trim(),
        _ => return None,
    };
    if let Ok(millis) = text.parse() {
        return Some(millis);
    }
    let in_utc = |date: DateTime| TimeZone::UTC.to_timestamp(date).ok();
    // `toString` ends with the time zone's name.
    let unnamed = text.split(" (").next().unwrap_or_default();
    text.parse()
        .ok()
        .or_else(|| in_utc(text.parse().ok()?))
        .or_else(|| Timestamp::strptime("%a %b %d %Y %H:%M:%S GMT%z", unnamed).ok())
        .or_else(|| Some(rfc2822::parse(text).ok()?.timestamp()))
        .map(Timestamp::as_millisecond)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const HASH: &str = "$2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW";
    const NOW: i64 = 1_800_000_000_000;

    fn fields(name: &str, password: &str) -> UserFields {
        Some([Some(name.into()), Some(password.into())])
    }

    #[test]
    fn a_user_needs_a_name_of_ours_and_a_hash_of_bcrypt() {
        let anna = user(b"user__anna", fields("anna", HASH)).unwrap();
        assert_eq!((&*anna.name, &*anna.password_hash), ("anna", HASH));
        let without_name = Some([None, Some(HASH.into())]);
        assert_eq!(user(b"user__anna", without_name).unwrap(), anna);

        let skipped = |key: &[u8], fields| user(key, fields).unwrap_err();
        assert!(skipped(b"user__anna", None).contains("not a hash"));
        for name in [
            "",
            "ab",
            "System",
            "you",
            "an na",
            "anna\n",
            &"x".repeat(33),
        ] {
            let key = format!("user__{name}");
            let reason = skipped(key.as_bytes(), fields(name, HASH));
            assert_eq!(reason, "the name is not allowed here", "{name:?}");
        }
        assert!(skipped(b"user__\xff\xff\xff", fields("anna", HASH)).contains("not allowed"));
        assert!(skipped(b"user__anna", fields("Anna", HASH)).contains("another name"));
        let reason = skipped(b"user__anna", Some([Some("anna".into()), None]));
        assert_eq!(reason, "it has no password");
        assert_eq!(skipped(b"user__anna", fields("anna", "")), reason);
        assert!(skipped(b"user__anna", fields("anna", "secret")).contains("bcrypt"));
    }

    #[test]
    fn a_channel_needs_a_key_and_a_name() {
        let channel = |value: Value| super::channel(value.to_string().as_bytes());
        let good = channel(json!({"key": "k", "name": "N", "more": 1})).unwrap();
        assert_eq!((&*good.key, &*good.name), ("k", "N"));
        assert!(channel(json!({"key": "k", "name": "x".repeat(256)})).is_ok());
        for bad in [
            json!({"name": "N"}),
            json!({"key": "", "name": "N"}),
            json!({"key": "x".repeat(129), "name": "N"}),
            json!({"key": "k"}),
            json!({"key": "k", "name": " "}),
            json!({"key": "k", "name": 1}),
            json!({"key": "k", "name": "x".repeat(257)}),
            json!(["k", "N"]),
            json!("k"),
        ] {
            assert!(channel(bad.clone()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_message_needs_an_author_and_a_text() {
        let message = |value: Value| super::message(value.to_string().as_bytes(), NOW);
        let good = json!({"user": "an na", "message": " hi ", "date": "2017-03-01T10:00:00.000Z"});
        assert_eq!(
            message(good),
            Ok(Message {
                user: "an na".to_owned(),
                message: " hi ".to_owned(),
                millis: Some(1_488_362_400_000),
            })
        );
        for (bad, reason) in [
            (json!({"message": "hi"}), "no author"),
            (json!({"user": "", "message": "hi"}), "no author"),
            (json!({"user": 1, "message": "hi"}), "no author"),
            (json!({"user": "x".repeat(257), "message": "hi"}), "256"),
            (json!({"user": "anna"}), "not a string"),
            (json!({"user": "anna", "message": {"a": 1}}), "not a string"),
            (json!({"user": "anna", "message": " \n"}), "empty"),
            (
                json!({"user": "anna", "message": "x".repeat(MAX_MESSAGE + 1)}),
                "1 MB",
            ),
            (json!(null), "not a JSON object"),
        ] {
            assert!(message(bad).unwrap_err().contains(reason), "{reason}");
        }
        assert_eq!(super::message(b"{", NOW), Err("it is not a JSON object"));
        assert_eq!(super::message(b"\xff", NOW), Err("it is not UTF-8"));
    }

    #[test]
    fn dates_of_every_form_are_read() {
        let millis = 1_488_362_400_000;
        for form in [
            json!(millis),
            json!(1_488_362_400_000.9),
            json!("1488362400000"),
            json!("2017-03-01T10:00:00.000Z"),
            json!("2017-03-01T12:00:00+02:00"),
            json!("2017-03-01T10:00:00"),
            json!("2017-03-01 10:00:00"),
            json!("Wed Mar 01 2017 12:00:00 GMT+0200 (Central European Time)"),
            json!("Wed Mar 01 2017 10:00:00 GMT+0000"),
            json!("Wed, 01 Mar 2017 10:00:00 GMT"),
        ] {
            assert_eq!(date(&form), Some(millis), "{form}");
        }
        for no_date in [
            json!(null),
            json!("yesterday"),
            json!(""),
            json!({}),
            json!(true),
        ] {
            assert_eq!(date(&no_date), None, "{no_date}");
        }
        let dated = |date: Value| {
            let item = json!({"user": "anna", "message": "hi", "date": date}).to_string();
            message(item.as_bytes(), NOW).unwrap().millis
        };
        assert_eq!(dated(json!(NOW)), Some(NOW));
        assert_eq!(dated(json!(NOW + 1)), None);
        assert_eq!(dated(json!(-1)), None);
        assert_eq!(dated(json!(1e300)), None);
    }

    #[test]
    fn half_an_emoji_does_not_cost_the_message() {
        let text = |json: &str| {
            let json = format!(r#"{{"user": "anna", "message": "{json}"}}"#);
            message(json.as_bytes(), NOW).unwrap().message
        };
        assert_eq!(text(r"cut \ud83d"), "cut \u{fffd}");
        assert_eq!(text(r"\ude00 cut"), "\u{fffd} cut");
        assert_eq!(text(r"\ud83d\ud83d\ude00"), "\u{fffd}😀");
        assert_eq!(text(r"\\ud83d \ud83d ä"), "\\ud83d \u{fffd} ä");
    }

    proptest! {
        #[test]
        fn mending_changes_nothing_that_is_right(text: String) {
            let json = serde_json::to_string(&text).unwrap();
            prop_assert_eq!(without_lone_surrogates(&json), json);
        }

        #[test]
        fn whatever_is_in_the_source_harms_nobody(item: Vec<u8>, text: String) {
            let _ = message(&item, NOW);
            let _ = channel(&item);
            let _ = user(&item, None);
            without_lone_surrogates(&text);
            date(&Value::String(text));
        }
    }
}
