//! What goes into Redis for a message, and what comes over its topic.
//!
//! Id and date of a message are decided in the script, so the event is sent there in two pieces,
//! each finished JSON but for what is inserted between them. Redis never parses an event.
//!
//! A topic carries
//!
//! - `m ID USER SENDER\n` and then author, sender and event one after the other, where `USER` and
//!   `SENDER` are the lengths of the first two in bytes: a message;
//! - `t\n` and then who types.

use serde::Serialize;
use serde_json::value::RawValue;

use crate::store::{Message, NewMessage, Posted};

/// An event without its date and id: `before DATE ","id": ID after`.
pub(super) struct Fragments {
    pub(super) before: String,
    pub(super) after: String,
}

/// The pieces of a new message's event: [`fragments_of`] it.
pub(super) fn fragments(message: &NewMessage) -> serde_json::Result<Fragments> {
    let nonce = message.client_nonce.then_some(message.nonce.as_str());
    fragments_of(&message.channel, &message.user, &message.message, nonce)
}

/// The pieces of a message's event, which is [`EventBody`](crate::store::EventBody).
///
/// # Errors
///
/// None that can happen with strings.
pub(super) fn fragments_of(
    channel: &str,
    user: &str,
    message: &str,
    nonce: Option<&str>,
) -> serde_json::Result<Fragments> {
    #[derive(Serialize)]
    struct Before<'a> {
        message: &'a str,
        user: &'a str,
        date: &'a str,
    }
    #[derive(Serialize)]
    struct After<'a> {
        channel: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        nonce: Option<&'a str>,
    }
    let mut before = serde_json::to_string(&Before {
        message,
        user,
        date: "",
    })?;
    // `"}`: the date goes in, and more follows.
    before.truncate(before.len() - 2);
    let mut after = serde_json::to_string(&After { channel, nonce })?;
    after.replace_range(..1, ",");
    Ok(Fragments { before, after })
}

/// Reads what the post script answers: `ID DATE`.
pub(super) fn posted(answer: &str) -> Option<Posted> {
    let (id, date) = answer.split_once(' ')?;
    Some(Posted {
        id: id.parse().ok()?,
        date: date.to_owned(),
    })
}

/// What a topic carries to say that `user` is typing.
pub(super) fn typing(user: &str) -> String {
    format!("t\n{user}")
}

/// What came over a topic.
#[derive(Debug)]
pub(super) enum Heard {
    Message(Message),
    /// Who types.
    Typing(String),
}

/// Reads what came over a topic; `None` if it is not of ours.
pub(super) fn heard(payload: Vec<u8>) -> Option<Heard> {
    let payload = String::from_utf8(payload).ok()?;
    let (header, rest) = payload.split_once('\n')?;
    let mut header = header.split(' ');
    let heard = match header.next()? {
        "m" => {
            let id = header.next()?.parse().ok()?;
            let (user, rest) = rest.split_at_checked(header.next()?.parse().ok()?)?;
            let (sender, event) = rest.split_at_checked(header.next()?.parse().ok()?)?;
            Heard::Message(Message {
                id,
                user: user.to_owned(),
                sender: sender.to_owned(),
                event: RawValue::from_string(event.to_owned()).ok()?,
            })
        }
        "t" => Heard::Typing(rest.to_owned()),
        _ => return None,
    };
    header.next().is_none().then_some(heard)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::EventBody;

    proptest! {
        #[test]
        fn fragments_and_what_is_inserted_make_the_event(
            message in any::<String>(),
            user in any::<String>(),
            channel in any::<String>(),
            nonce in any::<String>(),
            client_nonce: bool,
            id in 1_u64..1 << 53,
        ) {
            let date = "2026-11-24T16:00:00.000Z";
            let event = serde_json::to_string(&EventBody {
                message: &message,
                user: &user,
                date,
                id,
                channel: &channel,
                nonce: client_nonce.then_some(&*nonce),
            })
            .unwrap();
            let sender = String::new();
            let new = NewMessage { channel, user, message, nonce, client_nonce, sender };
            let Fragments { before, after } = fragments(&new).unwrap();
            prop_assert_eq!(format!(r#"{before}{date}","id":{id}{after}"#), event);
        }

        #[test]
        fn whatever_comes_over_a_topic_harms_nobody(payload: Vec<u8>) {
            heard(payload);
        }
    }

    #[test]
    fn messages_and_typing_are_told_apart_and_rubbish_is_refused() {
        let payload = "m 7 5 2\nan\nnaß{\"a\": 1}";
        let Some(Heard::Message(message)) = heard(payload.into()) else {
            panic!("{payload}");
        };
        assert_eq!(
            (message.id, &*message.user, &*message.sender),
            (7, "an\nna", "ß")
        );
        assert_eq!(message.event.get(), "{\"a\": 1}");
        let Some(Heard::Typing(user)) = heard(typing("an\nna").into()) else {
            panic!("typing");
        };
        assert_eq!(user, "an\nna");
        let rubbish = [
            "",
            "m",
            "m 1 0 0",
            "x\n",
            "m 1 1 0\nß{}",
            "m 1 9 9\n{}",
            "m 1 0 0\n{",
            "m 1 0 0 0\n{}",
            "m -1 0 0\n{}",
            "t 1\nanna",
        ];
        for payload in rubbish {
            assert!(heard(payload.into()).is_none(), "{payload:?}");
        }
        assert!(heard(vec![b't', b'\n', 0xff]).is_none());
    }
}
