//! What a proxy in front says of its client: the PROXY protocol, versions 1 and 2, and the
//! `X-Forwarded-For` header; and whose word counts ([`Trusted`]).
//!
//! The PROXY protocol is that of HAProxy's `doc/proxy-protocol.txt`: a header in front of everything
//! else on the connection. `X-Forwarded-For` is a list to which each proxy adds the address that it
//! was reached from, at the right end; so its right part is as good as the proxies, and the rest is
//! whatever the client cared to write.
//!
//! Pure: works on the bytes that are there, and says when they are not enough. Addresses that come
//! out are [canonical](routing::canonical).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net};

use crate::routing;

/// The most bytes of a PROXY header of version 1, its line end included (as its specification says).
pub const MAX_V1: usize = 107;

/// The most bytes of a PROXY header of version 2 that is accepted. Addresses take 52 of them at most;
/// the rest is for extensions (TLVs), which are skipped.
pub const MAX_V2: usize = 4096;

/// The most header lines that a request may have: what hyper, which parses it in the worker, accepts.
const MAX_HEADER_LINES: usize = 100;

const V1: &[u8] = b"PROXY ";
const V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// The bytes of a version 2 header before its addresses.
const V2_FIXED: usize = V2.len() + 4;

/// The networks whose word about a client's address counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trusted(Vec<IpNet>);

/// A text that is no network to trust.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidNetwork {
    /// Neither a network nor an address.
    #[error("{0:?} is no network; expected one such as 10.0.0.0/8 or fd00::/8, or an address")]
    Malformed(String),
    /// Such as `10.1.2.3/8`: a slip in the address, or in the length of its prefix.
    #[error("{given} is an address within {network}; expected {network}, or the address alone")]
    HostBits {
        /// What was given.
        given: IpNet,
        /// The network that it is in.
        network: IpNet,
    },
}

impl Trusted {
    /// Whether nobody is trusted.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether an address, which need not be canonical, is in one of the networks.
    pub fn contains(&self, ip: IpAddr) -> bool {
        let ip = routing::canonical(ip);
        self.0.iter().any(|network| network.contains(&ip))
    }

    /// A network that holds every address of its kind, so that anybody could pose as anybody.
    pub fn everybody(&self) -> Option<IpNet> {
        self.0.iter().copied().find(|one| one.prefix_len() == 0)
    }
}

impl FromIterator<Trusted> for Trusted {
    fn from_iter<T: IntoIterator<Item = Trusted>>(several: T) -> Self {
        Self(several.into_iter().flat_map(|one| one.0).collect())
    }
}

impl FromStr for Trusted {
    type Err = InvalidNetwork;

    /// Reads networks and addresses with commas between them; an empty text is none.
    fn from_str(text: &str) -> Result<Self, InvalidNetwork> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        let networks = text.split(',').map(|part| network(part.trim()));
        networks.collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Display for Trusted {
    /// What `from_str` reads.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, network) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            network.fmt(f)?;
        }
        Ok(())
    }
}

fn network(text: &str) -> Result<IpNet, InvalidNetwork> {
    let malformed = || InvalidNetwork::Malformed(text.to_owned());
    let given: IpNet = if text.contains('/') {
        text.parse().map_err(|_| malformed())?
    } else {
        IpNet::from(text.parse::<IpAddr>().map_err(|_| malformed())?)
    };
    if given.trunc() != given {
        return Err(InvalidNetwork::HostBits {
            given,
            network: given.trunc(),
        });
    }
    Ok(unmapped(given))
}

/// A network of IPv4-mapped addresses as the IPv4 network that it is.
fn unmapped(network: IpNet) -> IpNet {
    let v4 = |net: ipnet::Ipv6Net| {
        let prefix = net.prefix_len().checked_sub(96)?;
        Ipv4Net::new(net.addr().to_ipv4_mapped()?, prefix).ok()
    };
    match network {
        IpNet::V6(net) => v4(net).map_or(network, IpNet::V4),
        IpNet::V4(_) => network,
    }
}

/// What the first bytes of a connection say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Too few to tell whether a PROXY header begins.
    Undecided,
    /// One has begun.
    Incomplete,
    /// There is one.
    Header(Header),
    /// There is none.
    NoHeader,
}

/// A PROXY header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The client's address; `None` where the proxy speaks for itself (`LOCAL`, as health checks do)
    /// or knows no address (`UNKNOWN`, a unix socket).
    pub client: Option<IpAddr>,
    /// How many bytes it takes; what follows is the client's.
    pub len: usize,
}

/// A PROXY header that breaks the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A line that is not as version 1 has it.
    #[error("{0:?} is no PROXY header of version 1")]
    Line(String),
    /// No line end where there must be one.
    #[error("no line end in the {MAX_V1} bytes that a PROXY header of version 1 may have")]
    EndlessLine,
    /// The byte that holds version and command.
    #[error("version and command {0:#04x} in a PROXY header; expected 0x20 or 0x21")]
    Command(u8),
    /// The byte that holds address family and transport.
    #[error("address family and transport {0:#04x} in a PROXY header")]
    Family(u8),
    /// Too short for the addresses.
    #[error("{len} bytes for addresses in a PROXY header; {expected} are needed")]
    TooShort {
        /// What the header says.
        len: usize,
        /// What its family takes.
        expected: usize,
    },
    /// Longer than accepted.
    #[error("a PROXY header of {0} bytes; at most {MAX_V2} are accepted")]
    TooLong(usize),
    /// It has begun, and nothing more came.
    #[error("a PROXY header that was not finished")]
    Unfinished,
}

/// Reads the PROXY header at the beginning of a connection, if there is one.
///
/// # Errors
/// If one begins and is none: nobody can tell then where the client's bytes begin.
pub fn start(bytes: &[u8]) -> Result<Start, Malformed> {
    let begins = |signature: &[u8]| bytes.starts_with(signature);
    if begins(V1) {
        v1(bytes)
    } else if begins(V2) {
        v2(bytes)
    } else if V1.starts_with(bytes) || V2.starts_with(bytes) {
        Ok(Start::Undecided)
    } else {
        Ok(Start::NoHeader)
    }
}

fn v1(bytes: &[u8]) -> Result<Start, Malformed> {
    let bytes = &bytes[..bytes.len().min(MAX_V1)];
    let Some(end) = bytes.windows(2).position(|two| two == b"\r\n") else {
        return match bytes.len() {
            MAX_V1 => Err(Malformed::EndlessLine),
            _ => Ok(Start::Incomplete),
        };
    };
    let line = &bytes[..end];
    let malformed = || Malformed::Line(String::from_utf8_lossy(line).into_owned());
    let text = std::str::from_utf8(line).map_err(|_| malformed())?;
    let fields: Vec<&str> = text.split(' ').collect();
    let client = match fields[..] {
        ["PROXY", "UNKNOWN", ..] => None,
        ["PROXY", "TCP4", from, to, from_port, to_port] if ports(from_port, to_port) => {
            Some(pair::<Ipv4Addr>(from, to).ok_or_else(malformed)?)
        }
        ["PROXY", "TCP6", from, to, from_port, to_port] if ports(from_port, to_port) => {
            Some(pair::<Ipv6Addr>(from, to).ok_or_else(malformed)?)
        }
        _ => return Err(malformed()),
    };
    Ok(Start::Header(Header {
        client: client.map(routing::canonical),
        len: end + 2,
    }))
}

/// The first of two addresses of one family.
fn pair<A: FromStr + Into<IpAddr>>(from: &str, to: &str) -> Option<IpAddr> {
    to.parse::<A>().ok()?;
    Some(from.parse::<A>().ok()?.into())
}

fn ports(from: &str, to: &str) -> bool {
    // `parse` alone would take a sign.
    let is_port =
        |text: &str| text.bytes().all(|b| b.is_ascii_digit()) && text.parse::<u16>().is_ok();
    is_port(from) && is_port(to)
}

fn v2(bytes: &[u8]) -> Result<Start, Malformed> {
    let Some((&[command, family, high, low], rest)) = bytes[V2.len()..].split_first_chunk() else {
        return Ok(Start::Incomplete);
    };
    if !matches!(command, 0x20 | 0x21) {
        return Err(Malformed::Command(command));
    }
    // Family: unspecified, IPv4, IPv6, unix. Transport: unspecified, stream, datagram.
    if command == 0x21 && (family >> 4 > 3 || family & 0x0f > 2) {
        return Err(Malformed::Family(family));
    }
    let announced = usize::from(u16::from_be_bytes([high, low]));
    let len = V2_FIXED + announced;
    if len > MAX_V2 {
        return Err(Malformed::TooLong(len));
    }
    // A LOCAL command's addresses mean nothing, and neither do those of an unknown transport.
    let named = command == 0x21 && family & 0x0f != 0;
    let expected = match family >> 4 {
        1 if named => 12,
        2 if named => 36,
        3 if named => 216,
        _ => 0,
    };
    if announced < expected {
        return Err(Malformed::TooShort {
            len: announced,
            expected,
        });
    }
    if rest.len() < announced {
        return Ok(Start::Incomplete);
    }
    let client = match expected {
        12 => rest.first_chunk::<4>().map(|ip| IpAddr::from(*ip)),
        36 => rest.first_chunk::<16>().map(|ip| IpAddr::from(*ip)),
        _ => None,
    };
    Ok(Start::Header(Header {
        client: client.map(routing::canonical),
        len,
    }))
}

/// Whom a request's head names as the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forwarded {
    /// The head is not complete. What it says so far must not be believed: the proxy's own line may
    /// come last.
    Incomplete,
    /// The rightmost address of `X-Forwarded-For` that is not trusted; if all are, the leftmost.
    Client(IpAddr),
    /// No address, or this is no HTTP request.
    Nobody,
}

/// Looks for the client in the head of an HTTP/1 request.
///
/// Several `X-Forwarded-For` lines are one list. What is no address ends the search: what is left of
/// it was added by nobody knows whom.
pub fn forwarded(head: &[u8], trusted: &Trusted) -> Forwarded {
    let mut lines = [httparse::EMPTY_HEADER; MAX_HEADER_LINES];
    let mut request = httparse::Request::new(&mut lines);
    match request.parse(head) {
        Ok(httparse::Status::Partial) => return Forwarded::Incomplete,
        Ok(httparse::Status::Complete(_)) => {}
        // The worker refuses it.
        Err(_) => return Forwarded::Nobody,
    }
    let mut found = Forwarded::Nobody;
    let right_to_left = request.headers.iter().rev();
    for element in right_to_left
        .filter(|line| line.name.eq_ignore_ascii_case("x-forwarded-for"))
        .flat_map(|line| line.value.rsplit(|byte| *byte == b','))
    {
        let Some(ip) = address(element) else {
            return found;
        };
        found = Forwarded::Client(ip);
        if !trusted.contains(ip) {
            return found;
        }
    }
    found
}

/// An address as proxies write it: alone, in brackets, or with a port.
fn address(element: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(element).ok()?.trim_matches([' ', '\t']);
    let alone = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'))
        .map_or_else(|| text.parse().ok(), |v6| v6.parse().map(IpAddr::V6).ok());
    alone
        .or_else(|| {
            text.parse()
                .map(|with_port: SocketAddr| with_port.ip())
                .ok()
        })
        .map(routing::canonical)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn trusted(text: &str) -> Trusted {
        text.parse().unwrap()
    }

    fn header(client: Option<IpAddr>, len: usize) -> Result<Start, Malformed> {
        Ok(Start::Header(Header { client, len }))
    }

    /// A version 2 header as HAProxy would write it; `extensions` are TLVs.
    fn encode_v2(from: SocketAddr, to: SocketAddr, datagram: bool, extensions: &[u8]) -> Vec<u8> {
        let mut block = Vec::new();
        let family = match (from.ip(), to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                block.extend(from.octets());
                block.extend(to.octets());
                1
            }
            (from, to) => {
                for ip in [from, to] {
                    block.extend(match ip {
                        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                        IpAddr::V6(ip) => ip.octets(),
                    });
                }
                2
            }
        };
        block.extend(from.port().to_be_bytes());
        block.extend(to.port().to_be_bytes());
        block.extend(extensions);
        raw_v2(0x21, family << 4 | if datagram { 2 } else { 1 }, &block)
    }

    fn raw_v2(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
        let mut bytes = V2.to_vec();
        bytes.extend([command, family]);
        bytes.extend(u16::try_from(block.len()).unwrap().to_be_bytes());
        bytes.extend(block);
        bytes
    }

    fn encode_v1(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
        let (kind, from_ip, to_ip) = match (from.ip(), to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => ("TCP4", from.to_string(), to.to_string()),
            (from, to) => {
                let v6 = |ip| match ip {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped().to_string(),
                    IpAddr::V6(ip) => ip.to_string(),
                };
                ("TCP6", v6(from), v6(to))
            }
        };
        let (from_port, to_port) = (from.port(), to.port());
        format!("PROXY {kind} {from_ip} {to_ip} {from_port} {to_port}\r\n").into_bytes()
    }

    #[test]
    fn networks_are_read_as_people_write_them() {
        let networks = trusted(" 10.0.0.0/8, 192.0.2.7,fd00::/8,::1 ");
        for inside in [
            "10.255.0.1",
            "192.0.2.7",
            "fd12::1",
            "::1",
            "::ffff:10.1.1.1",
        ] {
            assert!(networks.contains(ip(inside)), "{inside}");
        }
        for outside in ["11.0.0.1", "192.0.2.8", "fe80::1", "::2", "::ffff:11.0.0.1"] {
            assert!(!networks.contains(ip(outside)), "{outside}");
        }
        assert_eq!(
            networks.to_string(),
            "10.0.0.0/8,192.0.2.7/32,fd00::/8,::1/128"
        );
        assert_eq!(networks.everybody(), None);
        assert_eq!(trusted(""), Trusted::default());
        assert!(Trusted::default().is_empty() && !networks.is_empty());
    }

    #[test]
    fn a_network_of_mapped_addresses_is_an_ipv4_network() {
        let networks = trusted("::ffff:10.0.0.0/104,::ffff:192.0.2.7");
        assert_eq!(networks, trusted("10.0.0.0/8,192.0.2.7"));
        assert!(networks.contains(ip("10.1.2.3")));
        assert!(networks.contains(ip("::ffff:10.1.2.3")));
    }

    #[test]
    fn a_slip_in_a_network_is_told_with_what_to_write_instead() {
        let error = |text: &str| text.parse::<Trusted>().unwrap_err().to_string();
        assert_eq!(
            error("10.1.2.3/8"),
            "10.1.2.3/8 is an address within 10.0.0.0/8; expected 10.0.0.0/8, or the address alone"
        );
        for malformed in [
            "10.0.0.0/33",
            "10.0.0/8",
            "localhost",
            "unix",
            "1.2.3.4,",
            "::/129",
        ] {
            assert!(error(malformed).contains("is no network"), "{malformed}");
        }
    }

    #[test]
    fn a_network_that_holds_everybody_is_noticed() {
        for all in ["0.0.0.0/0", "10.0.0.0/8,::/0", "::ffff:0.0.0.0/96"] {
            assert!(trusted(all).everybody().is_some(), "{all}");
        }
    }

    #[test]
    fn version_1_as_in_its_specification() {
        let line = b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\nGET / HTTP/1.1\r\n";
        assert_eq!(start(line), header(Some(ip("192.168.0.1")), 47));
        let longest = b"PROXY UNKNOWN ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff \
            ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n";
        assert_eq!(longest.len(), MAX_V1);
        assert_eq!(start(longest), header(None, MAX_V1));
        assert_eq!(start(b"PROXY UNKNOWN\r\n"), header(None, 15));
        let mapped = b"PROXY TCP6 ::ffff:1.2.3.4 ::1 1 2\r\n";
        assert_eq!(start(mapped), header(Some(ip("1.2.3.4")), mapped.len()));
    }

    #[test]
    fn what_is_not_quite_version_1_is_malformed() {
        for line in [
            "PROXY \r\n",
            "PROXY TCP4\r\n",
            "PROXY TCP5 1.2.3.4 1.2.3.4 1 2\r\n",
            "PROXY tcp4 1.2.3.4 1.2.3.4 1 2\r\n",
            "PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n",
            "PROXY TCP4 1.2.3.4 1.2.3.4 1 2 3\r\n",
            "PROXY TCP4  1.2.3.4 1.2.3.4 1 2\r\n",
            "PROXY TCP4 ::1 1.2.3.4 1 2\r\n",
            "PROXY TCP4 1.2.3.4 ::1 1 2\r\n",
            "PROXY TCP6 1.2.3.4 ::1 1 2\r\n",
            "PROXY TCP4 01.2.3.4 1.2.3.4 1 2\r\n",
            "PROXY TCP4 1.2.3.4 1.2.3.4 +1 2\r\n",
            "PROXY TCP4 1.2.3.4 1.2.3.4 1 65536\r\n",
            "PROXY TCP4 1.2.3.4 1.2.3.4  2\r\n",
            "PROXY TCP4 1.2.3.4\n1.2.3.4 1 2\r\n",
            "PROXY TCP4 1.2.3.4 1.2.3.4 1 2 \r\n",
        ] {
            assert!(
                matches!(start(line.as_bytes()), Err(Malformed::Line(_))),
                "{line:?}"
            );
        }
        assert!(start(b"PROXY \xff\xfe\r\n").is_err());
        let endless = [b"PROXY UNKNOWN ".as_slice(), &[b'x'; MAX_V1]].concat();
        assert_eq!(start(&endless), Err(Malformed::EndlessLine));
        assert_eq!(start(&endless[..MAX_V1 - 1]), Ok(Start::Incomplete));
    }

    #[test]
    fn version_2_speaks_for_the_proxy_itself_where_it_names_nobody() {
        let unix = [7; 216];
        for (command, family, block) in [
            (0x20, 0x00, &[][..]),
            (0x20, 0x11, &[1; 12]),
            // The family of a LOCAL command means nothing.
            (0x20, 0xff, &[1; 3]),
            (0x21, 0x00, &[]),
            (0x21, 0x10, &[1; 12]),
            (0x21, 0x31, &unix),
        ] {
            let bytes = raw_v2(command, family, block);
            assert_eq!(
                start(&bytes),
                header(None, bytes.len()),
                "{command:x} {family:x}"
            );
        }
    }

    #[test]
    fn what_is_not_quite_version_2_is_malformed() {
        let malformed = |bytes: &[u8]| start(bytes).unwrap_err();
        for command in [0x00, 0x11, 0x22, 0x2f, 0x31] {
            assert_eq!(
                malformed(&raw_v2(command, 0x11, &[0; 12])),
                Malformed::Command(command)
            );
        }
        for family in [0x13, 0x41, 0xff] {
            assert_eq!(
                malformed(&raw_v2(0x21, family, &[0; 216])),
                Malformed::Family(family)
            );
        }
        for (family, expected) in [(0x11, 12), (0x22, 36), (0x31, 216)] {
            let len = expected - 1;
            let bytes = raw_v2(0x21, family, &vec![0; len]);
            assert_eq!(malformed(&bytes), Malformed::TooShort { len, expected });
        }
        let longest = raw_v2(0x21, 0x11, &[0; MAX_V2 - V2_FIXED]);
        assert_eq!(start(&longest), header(Some(ip("0.0.0.0")), MAX_V2));
        // Refused before anybody waits for it.
        let longer = raw_v2(0x20, 0x00, &[0; MAX_V2 - V2_FIXED + 1]);
        assert_eq!(
            malformed(&longer[..V2_FIXED]),
            Malformed::TooLong(MAX_V2 + 1)
        );
    }

    #[test]
    fn requests_have_no_proxy_header() {
        for bytes in [
            "GET / HTTP/1.1\r\n",
            "POST",
            "PROXYING ",
            "PROPFIND",
            "\r\n\r\nGET",
            "\0",
        ] {
            assert_eq!(start(bytes.as_bytes()), Ok(Start::NoHeader), "{bytes:?}");
        }
        for bytes in ["", "P", "PROXY", "\r\n", "\r\n\r\n\0\r\nQUI"] {
            assert_eq!(start(bytes.as_bytes()), Ok(Start::Undecided), "{bytes:?}");
        }
    }

    /// Looks into a head with these lines, trusting 10.0.0.0/8.
    fn found(lines: &str) -> Forwarded {
        let head = format!("GET /x HTTP/1.1\r\nHost: x\r\n{lines}\r\n");
        forwarded(head.as_bytes(), &trusted("10.0.0.0/8"))
    }

    fn client(text: &str) -> Forwarded {
        Forwarded::Client(ip(text))
    }

    #[test]
    fn the_rightmost_address_that_is_not_trusted_is_the_client() {
        for (lines, expected) in [
            ("X-Forwarded-For: 1.1.1.1\r\n", "1.1.1.1"),
            ("x-forwarded-for:1.1.1.1,2.2.2.2\r\n", "2.2.2.2"),
            ("X-Forwarded-For: 1.1.1.1, 2.2.2.2, 10.0.0.1\r\n", "2.2.2.2"),
            ("X-Forwarded-For: 10.0.0.2, 10.0.0.1\r\n", "10.0.0.2"),
            (
                "X-Forwarded-For: 1.1.1.1\r\nA: b\r\nX-FORWARDED-FOR: 10.0.0.1\r\n",
                "1.1.1.1",
            ),
            (
                "X-Forwarded-For: 10.0.0.1\r\nX-Forwarded-For: 1.1.1.1\r\n",
                "1.1.1.1",
            ),
            ("X-Forwarded-For: ::ffff:1.1.1.1\r\n", "1.1.1.1"),
            ("X-Forwarded-For: 1.1.1.1, ::ffff:10.9.9.9\r\n", "1.1.1.1"),
            ("X-Forwarded-For: 2001:db8::1\r\n", "2001:db8::1"),
            ("X-Forwarded-For: [2001:db8::1]\r\n", "2001:db8::1"),
            ("X-Forwarded-For: [2001:db8::1]:4711 \t\r\n", "2001:db8::1"),
            ("X-Forwarded-For: 1.1.1.1:4711\r\n", "1.1.1.1"),
        ] {
            assert_eq!(found(lines), client(expected), "{lines:?}");
        }
    }

    #[test]
    fn what_is_no_address_ends_the_search() {
        for (lines, expected) in [
            ("", Forwarded::Nobody),
            ("X-Forwarded-For:\r\n", Forwarded::Nobody),
            ("X-Forwarded-For: unknown\r\n", Forwarded::Nobody),
            ("X-Forwarded-For: 1.1.1.1, \r\n", Forwarded::Nobody),
            (
                "X-Forwarded-For: 1.1.1.1\r\nX-Forwarded-For: [1.1.1.1]\r\n",
                Forwarded::Nobody,
            ),
            (
                "X-Forwarded-For: 1.1.1.1, nonsense, 10.0.0.1\r\n",
                client("10.0.0.1"),
            ),
            (
                "X-Forwarded-For: 1.1.1.1\r\nX-Forwarded-For: x, 10.0.0.1\r\n",
                client("10.0.0.1"),
            ),
            (
                "X-Forwarded-Fo: 1.1.1.1\r\nForwarded: for=1.1.1.1\r\n",
                Forwarded::Nobody,
            ),
        ] {
            assert_eq!(found(lines), expected, "{lines:?}");
        }
    }

    #[test]
    fn nothing_is_believed_before_the_head_is_complete_nor_in_what_is_no_request() {
        let nobody = Trusted::default();
        let head = b"GET / HTTP/1.1\r\nX-Forwarded-For: 1.1.1.1\r\n";
        assert_eq!(forwarded(head, &nobody), Forwarded::Incomplete);
        assert_eq!(forwarded(b"", &nobody), Forwarded::Incomplete);
        assert_eq!(
            forwarded(b"\x16\x03\x01\x00\xc8", &nobody),
            Forwarded::Nobody
        );
        let body = b"POST / HTTP/1.1\r\n\r\nX-Forwarded-For: 1.1.1.1\r\n\r\n";
        assert_eq!(forwarded(body, &nobody), Forwarded::Nobody);
        let many = format!(
            "GET / HTTP/1.1\r\nX-Forwarded-For: 1.1.1.1\r\n{}\r\n",
            "A: b\r\n".repeat(100)
        );
        assert_eq!(forwarded(many.as_bytes(), &nobody), Forwarded::Nobody);
    }

    /// Something that connections begin with, whole or broken.
    fn beginnings() -> impl Strategy<Value = Vec<u8>> {
        let pair = (any::<SocketAddr>(), any::<SocketAddr>());
        prop_oneof![
            pair.clone().prop_map(|(from, to)| encode_v1(from, to)),
            (
                pair,
                any::<bool>(),
                prop::collection::vec(any::<u8>(), 0..300)
            )
                .prop_map(|((from, to), datagram, tlvs)| encode_v2(from, to, datagram, &tlvs)),
            (
                any::<u8>(),
                any::<u8>(),
                prop::collection::vec(any::<u8>(), 0..300)
            )
                .prop_map(|(command, family, block)| raw_v2(command, family, &block)),
            "PROXY (TCP4|TCP6|UNKNOWN)?[ 0-9a-f.:]{0,120}(\r\n)?".prop_map(String::into_bytes),
            prop::collection::vec(any::<u8>(), 0..300),
            "GET /[a-z]{0,20} HTTP/1.[01]\r\n(X-Forwarded-For:[ ,0-9.:a-f]{0,40}\r\n){0,4}\r\n"
                .prop_map(String::into_bytes),
        ]
    }

    proptest! {
        #[test]
        fn an_encoded_header_is_read_back_and_nothing_after_it_is_touched(
            from in any::<SocketAddr>(),
            to in any::<SocketAddr>(),
            datagram in any::<bool>(),
            tlvs in prop::collection::vec(any::<u8>(), 0..2_000),
            after in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let client = Some(routing::canonical(from.ip()));
            for encoded in [encode_v1(from, to), encode_v2(from, to, datagram, &tlvs)] {
                let all = [&encoded[..], &after].concat();
                prop_assert_eq!(start(&all), header(client, encoded.len()));
            }
        }

        #[test]
        fn bytes_say_the_same_however_they_are_split(
            bytes in beginnings(),
            after in prop::collection::vec(any::<u8>(), 0..50),
        ) {
            let all = [&bytes[..], &after].concat();
            let whole = start(&all);
            let mut undecided = true;
            for end in 0..=all.len() {
                let part = start(&all[..end]);
                match part {
                    Ok(Start::Undecided) => prop_assert!(undecided, "it was decided before"),
                    Ok(Start::Incomplete) => undecided = false,
                    // The last word, whatever follows.
                    _ => {
                        prop_assert_eq!(&part, &whole);
                        undecided = false;
                    }
                }
            }
            let trusted = trusted("10.0.0.0/8,::/4");
            let whole = forwarded(&all, &trusted);
            for end in 0..=all.len() {
                let part = forwarded(&all[..end], &trusted);
                prop_assert!(part == Forwarded::Incomplete || part == whole);
            }
        }

        #[test]
        fn garbage_in_the_list_changes_nothing_to_its_right(
            left in "[ -~]{0,100}",
            right in any::<IpAddr>(),
            hops in prop::collection::vec(any::<u8>(), 0..5),
        ) {
            let trusted = trusted("10.0.0.0/8");
            prop_assume!(!trusted.contains(right));
            let hops: String = hops.iter().map(|n| format!(", 10.0.0.{n}")).collect();
            let head = format!("GET / HTTP/1.1\r\nX-Forwarded-For: {left}, {right}{hops}\r\n\r\n");
            prop_assert_eq!(
                forwarded(head.as_bytes(), &trusted),
                Forwarded::Client(routing::canonical(right))
            );
        }

        #[test]
        fn networks_survive_being_written(
            networks in prop::collection::vec((any::<IpAddr>(), 0u8..=128), 0..5),
        ) {
            let networks = networks.into_iter().map(|(ip, prefix)| {
                let prefix = if ip.is_ipv4() { prefix % 33 } else { prefix };
                Trusted(vec![unmapped(IpNet::new(ip, prefix).unwrap().trunc())])
            });
            let networks: Trusted = networks.collect();
            prop_assert_eq!(networks.to_string().parse::<Trusted>(), Ok(networks));
        }
    }
}
