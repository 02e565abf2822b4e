//! Spots a client's Engine.IO heartbeats in the bytes of its WebSocket.
//!
//! socketioxide tells nobody when a heartbeat comes in, and a heartbeat is the only proof that a
//! client received what was sent to it. [`ClientFrames`] therefore follows the client's frames
//! (RFC 6455, section 5) as they pass through the [transport](super::transport), without copying,
//! and without a say in what happens to them.
//!
//! A wrong heartbeat is worse than a missed one: at the first byte that no client of this server
//! sends, it stops looking for good.

/// A revision of the Engine.IO protocol; it decides which packet a client's heartbeat is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// Engine.IO 3 (socket.io-client 1.x and 2.x): the client pings, `2`.
    V3,
    /// Engine.IO 4 (socket.io-client 3.x and 4.x): the client answers pings, `3`.
    V4,
}

impl Engine {
    /// The revision that the query of a client's request asks for (`EIO=3` or `EIO=4`).
    pub fn from_query(query: &str) -> Option<Self> {
        query.split('&').find_map(|pair| match pair {
            "EIO=3" => Some(Self::V3),
            "EIO=4" => Some(Self::V4),
            _ => None,
        })
    }

    /// The type of the packet that is the client's heartbeat.
    pub fn heartbeat(self) -> u8 {
        match self {
            Self::V3 => b'2',
            Self::V4 => b'3',
        }
    }
}

/// The longest frame header: two bytes, a 64-bit length, the mask.
const MAX_HEADER: usize = 2 + 8 + 4;

const FIN: u8 = 0x80;
const RESERVED: u8 = 0x70;
const MASKED: u8 = 0x80;

const CONTINUATION: u8 = 0x0;
const TEXT: u8 = 0x1;
const BINARY: u8 = 0x2;
const CLOSE: u8 = 0x8;
const PONG: u8 = 0xa;

/// Follows the frames of one WebSocket, from its first byte on.
#[derive(Debug, Clone)]
pub struct ClientFrames {
    heartbeat: u8,
    state: State,
    /// The message whose frames are coming in; control frames may come between them.
    message: Option<Message>,
}

#[derive(Debug, Clone)]
enum State {
    /// Collecting a frame's header, of which `have` bytes are there.
    Header { bytes: [u8; MAX_HEADER], have: u8 },
    /// Passing over a frame's payload.
    Payload {
        left: u64,
        mask: u8,
        fin: bool,
        control: bool,
    },
    /// Not looking any more.
    Over,
}

const NEXT_HEADER: State = State::Header {
    bytes: [0; MAX_HEADER],
    have: 0,
};

#[derive(Debug, Clone, Copy)]
struct Message {
    text: bool,
    /// Its first byte, unmasked, once there.
    first: Option<u8>,
    /// Whether it has more than one byte.
    longer: bool,
}

/// What a complete header says.
struct Header {
    fin: bool,
    opcode: u8,
    length: u64,
    /// The mask's first byte: that of the payload's first byte, the only one that is looked at.
    mask: u8,
}

impl ClientFrames {
    /// For a WebSocket of revision `engine` whose first frame begins with the next byte.
    pub fn new(engine: Engine) -> Self {
        Self {
            heartbeat: engine.heartbeat(),
            state: NEXT_HEADER,
            message: None,
        }
    }

    /// Whether it stopped looking: the client closed the WebSocket, or broke the protocol.
    pub fn is_over(&self) -> bool {
        matches!(self.state, State::Over)
    }

    /// Takes the next bytes that the client sent, split anywhere; calls `on_heartbeat` for every
    /// text message that consists of a heartbeat packet and nothing else.
    pub fn push(&mut self, mut bytes: &[u8], mut on_heartbeat: impl FnMut()) {
        while !bytes.is_empty() {
            match &mut self.state {
                State::Over => return,
                State::Header {
                    bytes: header,
                    have,
                } => {
                    header[usize::from(*have)] = bytes[0];
                    *have += 1;
                    bytes = &bytes[1..];
                    let header = &header[..usize::from(*have)];
                    match parse_header(header) {
                        Ok(None) => {}
                        Ok(Some(header)) => self.begin_frame(&header, &mut on_heartbeat),
                        Err(Violation) => self.state = State::Over,
                    }
                }
                State::Payload {
                    left,
                    mask,
                    control,
                    ..
                } => {
                    // At most as much as there are bytes, so it fits.
                    let passed = (*left).min(bytes.len() as u64) as usize;
                    if !*control && let Some(message) = &mut self.message {
                        message.longer |= message.first.is_some() || passed > 1;
                        message.first.get_or_insert(bytes[0] ^ *mask);
                    }
                    *left -= passed as u64;
                    bytes = &bytes[passed..];
                    if *left == 0 {
                        self.end_frame(&mut on_heartbeat);
                    }
                }
            }
        }
    }

    fn begin_frame(&mut self, header: &Header, on_heartbeat: &mut impl FnMut()) {
        let control = header.opcode >= CLOSE;
        match (header.opcode, &self.message) {
            (TEXT | BINARY, None) => {
                let text = header.opcode == TEXT;
                self.message = Some(Message {
                    text,
                    first: None,
                    longer: false,
                });
            }
            (CONTINUATION, Some(_)) => {}
            // A close is the last frame; what else could come is nobody's heartbeat.
            (CLOSE, _) => {
                self.state = State::Over;
                return;
            }
            _ if control => {}
            // A message within a message, or a continuation of none.
            _ => {
                self.state = State::Over;
                return;
            }
        }
        self.state = State::Payload {
            left: header.length,
            mask: header.mask,
            fin: header.fin,
            control,
        };
        if header.length == 0 {
            self.end_frame(on_heartbeat);
        }
    }

    fn end_frame(&mut self, on_heartbeat: &mut impl FnMut()) {
        let ends_message = matches!(
            self.state,
            State::Payload {
                fin: true,
                control: false,
                ..
            }
        );
        if ends_message
            && let Some(Message {
                text: true,
                first: Some(first),
                longer: false,
            }) = self.message.take()
            && first == self.heartbeat
        {
            on_heartbeat();
        }
        self.state = NEXT_HEADER;
    }
}

/// Something that a client must not send.
struct Violation;

/// Reads a frame's header; `None` if `bytes` is only the beginning of one.
fn parse_header(bytes: &[u8]) -> Result<Option<Header>, Violation> {
    let &[first, ref rest @ ..] = bytes else {
        return Ok(None);
    };
    let (fin, opcode) = (first & FIN != 0, first & 0x0f);
    let control = opcode >= CLOSE;
    // Reserved bits belong to extensions, and none is ever negotiated here.
    let known = matches!(opcode, CONTINUATION..=BINARY | CLOSE..=PONG);
    if first & RESERVED != 0 || !known || (control && !fin) {
        return Err(Violation);
    }
    let &[second, ref rest @ ..] = rest else {
        return Ok(None);
    };
    let short = second & !MASKED;
    if second & MASKED == 0 || (control && short > 125) {
        return Err(Violation);
    }
    let (length, rest) = match short {
        126 => match rest.split_first_chunk() {
            Some((length, rest)) => (u64::from(u16::from_be_bytes(*length)), rest),
            None => return Ok(None),
        },
        127 => match rest.split_first_chunk() {
            Some((length, rest)) => (u64::from_be_bytes(*length), rest),
            None => return Ok(None),
        },
        short => (u64::from(short), rest),
    };
    if length > i64::MAX as u64 {
        return Err(Violation);
    }
    match rest {
        &[mask, _, _, _] => Ok(Some(Header {
            fin,
            opcode,
            length,
            mask,
        })),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PING: u8 = 0x9;

    /// A frame as clients send them.
    fn frame(fin: bool, opcode: u8, payload: &[u8], mask: [u8; 4]) -> Vec<u8> {
        let mut frame = vec![if fin { FIN } else { 0 } | opcode];
        match payload.len() {
            n @ 0..=125 => frame.push(MASKED | n as u8),
            n @ 126..=0xffff => {
                frame.push(MASKED | 126);
                frame.extend((n as u16).to_be_bytes());
            }
            n => {
                frame.push(MASKED | 127);
                frame.extend((n as u64).to_be_bytes());
            }
        }
        frame.extend(mask);
        frame.extend(
            payload
                .iter()
                .zip(mask.iter().cycle())
                .map(|(byte, mask)| byte ^ mask),
        );
        frame
    }

    fn text(payload: &[u8]) -> Vec<u8> {
        frame(true, TEXT, payload, [1, 2, 3, 4])
    }

    fn heartbeats(engine: Engine, bytes: &[u8]) -> u32 {
        let mut count = 0;
        ClientFrames::new(engine).push(bytes, || count += 1);
        count
    }

    #[test]
    fn only_the_clients_heartbeat_packet_counts() {
        for (engine, own, other) in [(Engine::V3, b"2", b"3"), (Engine::V4, b"3", b"2")] {
            assert_eq!(heartbeats(engine, &text(own)), 1);
            assert_eq!(heartbeats(engine, &text(other)), 0);
            assert_eq!(heartbeats(engine, &frame(true, BINARY, own, [9; 4])), 0);
            assert_eq!(heartbeats(engine, &frame(true, PING, own, [9; 4])), 0);
            for payload in [
                "",
                "2probe",
                "3probe",
                "5",
                "22",
                "33",
                "42[\"post\",{}]",
                "43[3]",
            ] {
                assert_eq!(
                    heartbeats(engine, &text(payload.as_bytes())),
                    0,
                    "{payload}"
                );
            }
        }
    }

    #[test]
    fn a_fragmented_heartbeat_with_a_ping_between_counts_once() {
        let mut bytes = frame(false, TEXT, b"", [5, 6, 7, 8]);
        bytes.extend(frame(true, PING, b"3", [5, 6, 7, 8]));
        bytes.extend(frame(false, CONTINUATION, b"3", [50, 6, 7, 8]));
        bytes.extend(frame(true, PONG, b"", [5, 6, 7, 8]));
        assert_eq!(heartbeats(Engine::V4, &bytes), 0);
        bytes.extend(frame(true, CONTINUATION, b"", [5, 6, 7, 8]));
        assert_eq!(heartbeats(Engine::V4, &bytes), 1);
        // The second half makes it a longer message.
        let mut bytes = frame(false, TEXT, b"3", [5, 6, 7, 8]);
        bytes.extend(frame(true, CONTINUATION, b"3", [5, 6, 7, 8]));
        bytes.extend(text(b"3"));
        assert_eq!(heartbeats(Engine::V4, &bytes), 1);
    }

    #[test]
    fn looking_ends_at_a_close_and_at_every_violation() {
        let unmasked = vec![FIN | TEXT, 1, b'3'];
        let mut huge = vec![FIN | TEXT, MASKED | 127];
        huge.extend([0xff; 12]);
        let mut nested = frame(false, TEXT, b"x", [0; 4]);
        nested.extend(frame(false, TEXT, b"x", [0; 4]));
        let wrong = [
            ("a close", frame(true, CLOSE, &[], [0; 4])),
            ("an unmasked frame", unmasked),
            ("a length of 64 bits", huge),
            ("a reserved bit", frame(true, 0x40 | TEXT, b"x", [0; 4])),
            ("a reserved opcode", frame(true, 0x3, b"x", [0; 4])),
            ("a reserved control opcode", frame(true, 0xb, b"x", [0; 4])),
            ("a fragmented ping", frame(false, PING, b"x", [0; 4])),
            ("a long ping", frame(true, PING, &[0; 126], [0; 4])),
            (
                "a continuation of nothing",
                frame(true, CONTINUATION, b"x", [0; 4]),
            ),
            ("a message within a message", nested),
            (
                "an HTTP request",
                b"GET /socket.io/?EIO=4 HTTP/1.1\r\n\r\n".to_vec(),
            ),
            (
                "an HTTP request",
                b"POST /socket.io/?EIO=4 HTTP/1.1\r\n\r\n".to_vec(),
            ),
        ];
        for (what, bytes) in wrong {
            let mut frames = ClientFrames::new(Engine::V4);
            let mut count = 0;
            frames.push(&text(b"3"), || count += 1);
            frames.push(&bytes, || count += 1);
            assert!(frames.is_over(), "{what}");
            frames.push(&text(b"3"), || count += 1);
            assert_eq!(count, 1, "{what}");
        }
    }

    #[test]
    fn the_revision_is_in_the_query() {
        assert_eq!(
            Engine::from_query("EIO=4&transport=websocket"),
            Some(Engine::V4)
        );
        assert_eq!(Engine::from_query("t=1&EIO=3"), Some(Engine::V3));
        for query in ["", "EIO=2", "XEIO=3", "EIO=34"] {
            assert_eq!(Engine::from_query(query), None, "{query}");
        }
    }

    /// Frames of one message or of a control frame, and whether it is a heartbeat.
    fn message() -> impl Strategy<Value = (Vec<u8>, u32)> {
        let payload = prop_oneof![
            4 => Just(b"3".to_vec()),
            2 => proptest::collection::vec(any::<u8>(), 0..4),
            1 => (0usize..300).prop_map(|n| vec![b'3'; n]),
            1 => (65_500usize..65_600).prop_map(|n| vec![b'3'; n]),
        ];
        let cuts = proptest::collection::vec(any::<prop::sample::Index>(), 0..3);
        (payload, cuts, 0u8..6, any::<[u8; 4]>(), any::<bool>()).prop_map(
            |(payload, cuts, kind, mask, ping)| {
                if kind == 0 {
                    let payload = &payload[..payload.len().min(125)];
                    return (frame(true, PING, payload, mask), 0);
                }
                let opcode = if kind == 1 { BINARY } else { TEXT };
                let heartbeat = opcode == TEXT && payload == b"3";
                let mut cuts: Vec<_> = cuts
                    .iter()
                    .map(|cut| cut.index(payload.len() + 1))
                    .collect();
                cuts.sort_unstable();
                cuts.push(payload.len());
                let (mut frames, mut from) = (Vec::new(), 0);
                for (i, &to) in cuts.iter().enumerate() {
                    if i > 0 && ping {
                        frames.extend(frame(true, PONG, b"3", mask));
                    }
                    let opcode = if i == 0 { opcode } else { CONTINUATION };
                    let fin = i == cuts.len() - 1;
                    frames.extend(frame(fin, opcode, &payload[from..to], mask));
                    from = to;
                }
                (frames, u32::from(heartbeat))
            },
        )
    }

    proptest! {
        #[test]
        fn heartbeats_are_seen_however_the_bytes_are_split(
            messages in proptest::collection::vec(message(), 1..20),
            sizes in proptest::collection::vec(1usize..40, 1..50),
        ) {
            let expected: u32 = messages.iter().map(|(_, heartbeats)| heartbeats).sum();
            let bytes: Vec<u8> = messages.into_iter().flat_map(|(frames, _)| frames).collect();
            prop_assert_eq!(heartbeats(Engine::V4, &bytes), expected);

            let mut frames = ClientFrames::new(Engine::V4);
            let (mut count, mut rest, mut sizes) = (0, &bytes[..], sizes.iter().cycle());
            while !rest.is_empty() {
                let size = sizes.next().copied().unwrap_or(1).min(rest.len());
                frames.push(&rest[..size], || count += 1);
                rest = &rest[size..];
            }
            prop_assert_eq!(count, expected);
            prop_assert!(!frames.is_over());
        }

        #[test]
        fn no_bytes_confuse_it(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            heartbeats(Engine::V3, &bytes);
        }
    }
}
