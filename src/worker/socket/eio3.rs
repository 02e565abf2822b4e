//! Text of Engine.IO 3 clients over polling, right for 1.x and 2.x at once.
//!
//! A text payload of Engine.IO 3 is a row of `<length>:<packet>`, lengths counted in UTF-16 units.
//! Both client generations ask for `EIO=3`, and nothing in a request tells them apart, yet they
//! treat text differently (engine.io-parser 1.3 and 2.2):
//!
//! - 1.x turns each packet into a string of its UTF-8 *bytes*, and the request encodes that string
//!   as UTF-8 once more, so that it posts text encoded twice. It decodes what it receives twice too,
//!   and throws a payload away in which that fails.
//! - 2.x encodes and decodes once.
//!
//! To both of them we can send ASCII: [`escape_payload`]. From both of them we can read text, as long
//! as it is clear which one it is: [`decode_post`]. (Where 1.x has binary XMLHttpRequests, in browsers, it
//! posts a binary payload, in which text is encoded once; that needs no repair.)

use std::borrow::Cow;
use std::fmt::Write as _;

use crate::worker::ws_frames::Engine;

/// Replaces non-ASCII characters in a text payload by JSON's `\uXXXX` (two of them, a surrogate
/// pair, above U+FFFF), and corrects the lengths.
///
/// Only what follows a packet's first `[`, `{` or `"` is replaced: before it there is no JSON, and
/// within JSON such characters occur in strings only.
///
/// `None` if nothing needs to be replaced, or if `body` is no well-formed text payload.
pub fn escape_payload(body: &str) -> Option<String> {
    rewrite(body, |packet| Some(escape_packet(packet)))
}

fn escape_packet(packet: &str) -> Cow<'_, str> {
    let json = packet.find(['[', '{', '"']).unwrap_or(packet.len());
    let (head, json) = packet.split_at(json);
    if json.is_ascii() {
        return Cow::Borrowed(packet);
    }
    let mut escaped = String::with_capacity(packet.len() * 2);
    escaped.push_str(head);
    for char in json.chars() {
        if char.is_ascii() {
            escaped.push(char);
        } else {
            for unit in char.encode_utf16(&mut [0; 2]) {
                // Writing to a string cannot fail.
                let _ = write!(escaped, "\\u{unit:04x}");
            }
        }
    }
    Cow::Owned(escaped)
}

/// What is known of how a session encodes the text that it posts. Starts as unknown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Utf8Mode {
    once: bool,
}

impl Utf8Mode {
    /// Whether the client is known to encode once, as 2.x does.
    pub fn is_v2(self) -> bool {
        self.once
    }
}

/// Repairs the text payload that a 1.x client posted: decodes its packets a second time, and
/// corrects the lengths.
///
/// A 1.x client's text, decoded once, consists of characters below U+0100 whose values are valid
/// UTF-8. Text that is not so cannot be a 1.x client's: from then on the session is known to be a
/// 2.x client, and is left alone for good. (What remains wrong: a 2.x client whose very first
/// non-ASCII text happens to look like that, such as `Ã©`.)
///
/// `None` if nothing needs to be repaired, or if `body` is no well-formed text payload.
pub fn decode_post(body: &str, mode: &mut Utf8Mode) -> Option<String> {
    if mode.once || body.is_ascii() || packets(body).any(|packet| packet.is_none()) {
        return None;
    }
    let repaired = rewrite(body, decode_packet);
    // The post is not all ASCII, so that some packet changes, unless one cannot be decoded.
    mode.once = repaired.is_none();
    repaired
}

/// The second decoding of one packet; `None` if it was encoded only once.
fn decode_packet(packet: &str) -> Option<Cow<'_, str>> {
    if packet.is_ascii() {
        return Some(Cow::Borrowed(packet));
    }
    let mut bytes: Vec<u8> = packet
        .chars()
        .map(|char| u8::try_from(char).ok())
        .collect::<Option<_>>()?;
    // 1.x encodes lone surrogates like other characters; U+FFFD stands for them, as with 2.x. In
    // valid UTF-8 none of these bytes follows 0xED.
    for i in 0..bytes.len() {
        if let [0xed, 0xa0..=0xbf, 0x80..=0xbf, ..] = bytes[i..] {
            bytes[i..i + 3].copy_from_slice("\u{fffd}".as_bytes());
        }
    }
    String::from_utf8(bytes).ok().map(Cow::Owned)
}

/// Whether the payload of a polling POST holds a heartbeat of the client: a ping of Engine.IO 3
/// (text or binary payload), a pong of Engine.IO 4.
///
/// Looks at as much of `payload` as is well-formed.
pub fn heartbeats_in(payload: &[u8], engine: Engine) -> bool {
    match engine {
        Engine::V4 => payload
            .split(|&byte| byte == 0x1e)
            .any(|packet| packet == b"3"),
        // Binary payloads begin with a packet's kind, text payloads with a digit.
        Engine::V3 if payload.first().is_some_and(|&byte| byte <= 1) => {
            binary_packets(payload).any(|(text, packet)| text && is_ping(packet))
        }
        Engine::V3 => std::str::from_utf8(payload).is_ok_and(|body| {
            packets(body)
                .flatten()
                .any(|packet| is_ping(packet.as_bytes()))
        }),
    }
}

fn is_ping(packet: &[u8]) -> bool {
    // A probe belongs to an upgrade to WebSocket and says nothing about what was received.
    packet
        .strip_prefix(b"2")
        .is_some_and(|data| data != b"probe")
}

/// The payload with every packet replaced by `change`; `None` if nothing changes, if one of them
/// cannot be changed, or if `body` is not well-formed.
fn rewrite<'a>(body: &'a str, change: impl Fn(&'a str) -> Option<Cow<'a, str>>) -> Option<String> {
    if body.is_ascii() {
        return None;
    }
    let mut changed = false;
    let mut payload = String::with_capacity(body.len() * 2);
    for packet in packets(body) {
        let packet = change(packet?)?;
        changed |= matches!(packet, Cow::Owned(_));
        payload.push_str(&packet.encode_utf16().count().to_string());
        payload.push(':');
        payload.push_str(&packet);
    }
    changed.then_some(payload)
}

/// The packets of a text payload; a `None`, the last item, is where it is not well-formed.
fn packets(body: &str) -> impl Iterator<Item = Option<&str>> {
    let mut rest = Some(body);
    std::iter::from_fn(move || {
        let body = rest.take().filter(|body| !body.is_empty())?;
        let Some((packet, after)) = split_packet(body) else {
            return Some(None);
        };
        rest = Some(after);
        Some(Some(packet))
    })
}

fn split_packet(body: &str) -> Option<(&str, &str)> {
    let (length, rest) = body.split_once(':')?;
    // `parse` would take a sign.
    if !length.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let mut units: usize = length.parse().ok()?;
    let mut end = 0;
    for char in rest.chars() {
        if units == 0 {
            break;
        }
        // A length that ends within a surrogate pair is wrong.
        units = units.checked_sub(char.len_utf16())?;
        end += char.len_utf8();
    }
    (units == 0).then(|| rest.split_at(end))
}

/// The well-formed beginning of a binary payload: `(is text, packet)`. Each packet is preceded by
/// its kind (0 text, 1 binary), the digits of its length in bytes as values 0 to 9, and 255.
fn binary_packets(payload: &[u8]) -> impl Iterator<Item = (bool, &[u8])> {
    let mut rest = payload;
    std::iter::from_fn(move || {
        let (&kind, after) = rest.split_first()?;
        let digits = after.iter().position(|&byte| byte == 0xff)?;
        let length = after[..digits].iter().try_fold(0usize, |length, &digit| {
            (digit <= 9).then_some(())?;
            length.checked_mul(10)?.checked_add(digit.into())
        })?;
        let (packet, after) = after[digits + 1..].split_at_checked(length)?;
        rest = after;
        (kind <= 1).then_some((kind == 0, packet))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The payload of `packets`, as engine.io-parser and engineioxide write it.
    fn payload<'a>(packets: impl IntoIterator<Item = &'a str>) -> String {
        packets
            .into_iter()
            .map(|packet| format!("{}:{packet}", packet.encode_utf16().count()))
            .collect()
    }

    /// What 1.x makes of a text: a string of its UTF-8 bytes.
    fn double(text: &str) -> String {
        text.bytes().map(char::from).collect()
    }

    #[test]
    fn answers_become_ascii() {
        assert_eq!(
            escape_payload(r#"15:42["m","é€😀"]1:3"#).as_deref(),
            None,
            "a wrong length is no payload"
        );
        assert_eq!(
            escape_payload(r#"14:42["m","é€😀"]1:3"#).as_deref(),
            Some(r#"34:42["m","\u00e9\u20ac\ud83d\ude00"]1:3"#)
        );
        assert_eq!(escape_payload(r#"10:42["m","e"]"#), None);
    }

    #[test]
    fn only_json_is_escaped() {
        // A namespace is not JSON; its event's argument is.
        assert_eq!(
            escape_payload(&payload(["42/é,[\"é\"]"])),
            Some(payload(["42/é,[\"\\u00e9\"]"]))
        );
        assert_eq!(escape_payload(&payload(["4é"])), None);
    }

    #[test]
    fn what_is_no_payload_is_left_alone() {
        for body in [
            "é", "1é:4", "-1:é", "+2:4é", ":4é", "3:4é", "1:4é", "2:4é3", "2:4😀",
        ] {
            assert_eq!(escape_payload(body), None, "{body}");
            let mut mode = Utf8Mode::default();
            assert_eq!(decode_post(body, &mut mode), None, "{body}");
            assert!(!mode.is_v2(), "{body}");
        }
    }

    #[test]
    fn posts_of_a_real_1x_client_are_repaired() {
        // Bytes that socket.io-client 1.7.4 posts for emit("m", "é€😀 x") and a ping.
        let body = "20:4[\"m\",\"\u{c3}\u{a9}\u{e2}\u{82}\u{ac}\u{f0}\u{9f}\u{98}\u{80} x\"]1:2";
        let mut mode = Utf8Mode::default();
        assert_eq!(
            decode_post(body, &mut mode).as_deref(),
            Some("15:4[\"m\",\"é€😀 x\"]1:2")
        );
        assert!(!mode.is_v2());
    }

    #[test]
    fn a_lone_surrogate_does_not_make_a_1x_client_a_2x_client() {
        // engine.io-parser 1.3 writes "4\ud800é" so.
        let mut mode = Utf8Mode::default();
        assert_eq!(
            decode_post("6:4\u{ed}\u{a0}\u{80}\u{c3}\u{a9}", &mut mode).as_deref(),
            Some("3:4\u{fffd}é")
        );
        assert!(!mode.is_v2());
    }

    #[test]
    fn a_2x_client_is_recognised_and_remembered() {
        // Above U+00FF; and Latin-1 that is no UTF-8.
        for text in ["4[\"€\"]", "4[\"é\"]"] {
            let mut mode = Utf8Mode::default();
            let looks_double = payload(["4[\"Ã©\"]"]);
            assert_eq!(
                decode_post(&looks_double, &mut mode),
                Some(payload(["4[\"é\"]"]))
            );
            assert_eq!(decode_post(&payload([text]), &mut mode), None);
            assert!(mode.is_v2());
            assert_eq!(decode_post(&looks_double, &mut mode), None);
        }
        // One such packet speaks for the whole post.
        let mut mode = Utf8Mode::default();
        assert_eq!(
            decode_post(&payload(["4[\"Ã©\"]", "4[\"€\"]"]), &mut mode),
            None
        );
        assert!(mode.is_v2());
    }

    #[test]
    fn heartbeats_are_found_in_every_kind_of_payload() {
        let yes: [(&[u8], Engine); 8] = [
            (b"1:2", Engine::V3),
            (b"4:4[1]1:2", Engine::V3),
            ("2:4é1:2".as_bytes(), Engine::V3),
            (b"6:2hello", Engine::V3),
            (b"\x00\x01\xff2", Engine::V3),
            (b"\x01\x01\x00\xff\x042345678\xff2\x00\x01\xff2", Engine::V3),
            (b"3", Engine::V4),
            (b"42[\"m\"]\x1e3", Engine::V4),
        ];
        for (payload, engine) in yes {
            assert!(
                heartbeats_in(payload, engine),
                "{:?}",
                String::from_utf8_lossy(payload)
            );
        }
        let no: [(&[u8], Engine); 12] = [
            (b"", Engine::V3),
            (b"1:3", Engine::V3),
            (b"6:2probe", Engine::V3),
            (b"5:41:21", Engine::V3),
            (b"2:2", Engine::V3),
            (b"2", Engine::V3),
            (b"\x00\x02\xff2", Engine::V3),
            (b"\x01\x01\xff2", Engine::V3),
            (b"", Engine::V4),
            (b"2", Engine::V4),
            (b"43[3]", Engine::V4),
            (b"3probe", Engine::V4),
        ];
        for (payload, engine) in no {
            assert!(
                !heartbeats_in(payload, engine),
                "{:?}",
                String::from_utf8_lossy(payload)
            );
        }
    }

    proptest! {
        #[test]
        fn escaped_json_means_the_same(texts in proptest::collection::vec(any::<String>(), 1..5)) {
            let bodies: Vec<String> =
                texts.iter().map(|text| format!("42{}", serde_json::json!(["m", text]))).collect();
            let before = payload(bodies.iter().map(String::as_str));
            match escape_payload(&before) {
                None => prop_assert!(before.is_ascii()),
                Some(after) => {
                    prop_assert!(after.is_ascii());
                    let read: Vec<String> = packets(&after)
                        .map(|packet| {
                            let json = packet.unwrap().strip_prefix("42").unwrap();
                            serde_json::from_str::<(String, String)>(json).unwrap().1
                        })
                        .collect();
                    prop_assert_eq!(read, texts);
                    prop_assert_eq!(escape_payload(&after), None);
                }
            }
        }

        #[test]
        fn what_1x_posts_arrives_as_meant(texts in proptest::collection::vec(any::<String>(), 1..5)) {
            let meant: Vec<String> = texts.iter().map(|text| format!("4{text}")).collect();
            let posted: Vec<String> = meant.iter().map(|packet| double(packet)).collect();
            let mut mode = Utf8Mode::default();
            let posted = payload(posted.iter().map(String::as_str));
            let read = decode_post(&posted, &mut mode).unwrap_or(posted);
            prop_assert_eq!(read, payload(meant.iter().map(String::as_str)));
            prop_assert!(!mode.is_v2());
        }

        #[test]
        fn what_2x_posts_stays(
            texts in proptest::collection::vec(any::<String>(), 1..5),
            first in "[\u{100}-\u{10ffff}]",
        ) {
            let mut mode = Utf8Mode::default();
            prop_assert_eq!(decode_post(&payload([format!("4{first}").as_str()]), &mut mode), None);
            let body = payload(texts.iter().map(String::as_str));
            prop_assert_eq!(decode_post(&body, &mut mode), None);
            prop_assert!(mode.is_v2());
        }

        #[test]
        fn packets_are_split_where_they_were_joined(
            texts in proptest::collection::vec(any::<String>(), 0..6),
        ) {
            let body = payload(texts.iter().map(String::as_str));
            let read: Option<Vec<&str>> = packets(&body).collect();
            prop_assert_eq!(read, Some(texts.iter().map(String::as_str).collect::<Vec<_>>()));
        }

        #[test]
        fn no_bytes_break_it(bytes in proptest::collection::vec(any::<u8>(), 0..100), text: String) {
            heartbeats_in(&bytes, Engine::V3);
            heartbeats_in(&bytes, Engine::V4);
            escape_payload(&text);
            decode_post(&text, &mut Utf8Mode::default());
        }
    }
}
