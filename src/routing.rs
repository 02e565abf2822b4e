//! Which worker serves a client: rendezvous hashing over the client's address.
//!
//! Every worker gets a [`weight`] for every [`RoutingKey`], and the heaviest one serves the client.
//! So a worker that goes takes only its own clients with it, and gets the same ones when it is
//! back; nobody else moves. (Thaler and Ravishankar, "Using name-based mappings to increase hit
//! rates", 1998.)
//!
//! Pure: no I/O and no state. The weights are part of how masters of different versions agree, so
//! they must never change; a test pins some of them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The address that stands for `ip`: an IPv4-mapped IPv6 address (`::ffff:192.0.2.1`) is the IPv4
/// address in it, every other one is itself.
pub fn canonical(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

/// What clients are told apart by when they are routed: an IPv4 address, or the /64 network of an
/// IPv6 address (one household or host holds a whole /64, and moves within it).
///
/// In text, and with serde, it is `192.0.2.1` or `2001:db8::/64`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RoutingKey(Network);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Network {
    V4(Ipv4Addr),
    /// The upper half of the address.
    V6(u64),
}

impl RoutingKey {
    /// The key of the client at `ip`, which need not be [`canonical`].
    pub fn of(ip: IpAddr) -> Self {
        Self(match canonical(ip) {
            IpAddr::V4(ip) => Network::V4(ip),
            IpAddr::V6(ip) => Network::V6((ip.to_bits() >> 64) as u64),
        })
    }

    /// A number whose bits all depend on all bits of the key.
    fn hash(&self) -> u64 {
        // Families start from different constants, so that `0.0.0.5` and `0:0:0:5::` differ.
        match self.0 {
            Network::V4(ip) => mix(u64::from(ip.to_bits()).wrapping_add(GOLDEN_GAMMA)),
            Network::V6(prefix) => mix(mix(prefix.wrapping_add(GOLDEN_GAMMA)) ^ GOLDEN_GAMMA),
        }
    }
}

impl From<IpAddr> for RoutingKey {
    fn from(ip: IpAddr) -> Self {
        Self::of(ip)
    }
}

impl fmt::Display for RoutingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Network::V4(ip) => ip.fmt(f),
            Network::V6(prefix) => {
                write!(f, "{}/64", Ipv6Addr::from_bits(u128::from(prefix) << 64))
            }
        }
    }
}

/// A text that is no [`RoutingKey`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no routing key; expected an address such as 192.0.2.1 or 2001:db8::/64")]
pub struct InvalidKey(String);

impl FromStr for RoutingKey {
    type Err = InvalidKey;

    /// Reads what `Display` writes; a plain IPv6 address counts as its /64.
    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        let invalid = || InvalidKey(text.to_owned());
        match text.strip_suffix("/64") {
            Some(prefix) => {
                // Not through `of`: the network of a mapped address is IPv6 here.
                let ip: Ipv6Addr = prefix.parse().map_err(|_| invalid())?;
                Ok(Self(Network::V6((ip.to_bits() >> 64) as u64)))
            }
            None => text.parse().map(Self::of).map_err(|_| invalid()),
        }
    }
}

impl Serialize for RoutingKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RoutingKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

/// How much `worker` wants the client of `key`: the worker with the largest weight serves it.
///
/// Weights of different workers for one key never tie: mixing is a bijection.
pub fn weight(key: &RoutingKey, worker: u32) -> u64 {
    weight_of_hash(key.hash(), worker)
}

fn weight_of_hash(key_hash: u64, worker: u32) -> u64 {
    mix(key_hash ^ mix(u64::from(worker).wrapping_add(1).wrapping_mul(GOLDEN_GAMMA)))
}

/// All of `workers` by their [`weight`] for `key`, the heaviest first: where to try in order.
pub fn ranked(key: &RoutingKey, workers: impl Iterator<Item = u32>) -> Vec<u32> {
    let hash = key.hash();
    let mut ranked: Vec<u32> = workers.collect();
    ranked.sort_by_cached_key(|&worker| std::cmp::Reverse(weight_of_hash(hash, worker)));
    ranked
}

/// The one of `workers` with the largest [`weight`] for `key`; `None` if there are none.
pub fn pick(key: &RoutingKey, workers: impl Iterator<Item = u32>) -> Option<u32> {
    let hash = key.hash();
    workers.max_by_key(|&worker| weight_of_hash(hash, worker))
}

/// The odd integer nearest to 2^64 divided by the golden ratio, as in SplitMix64: its multiples
/// spread evenly over 64 bits.
const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
/// generators", 2014), with the constants of David Stafford's "Mix13" variant of MurmurHash3's. A
/// bijection in which every bit of the output depends on every bit of the input.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn key(text: &str) -> RoutingKey {
        RoutingKey::of(text.parse().unwrap())
    }

    /// xorshift64* (Vigna 2016): unrelated to the hash under test, and the same in every run.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
        }
    }

    /// How many of `keys` each worker gets, for every number of workers up to 16: `[n][worker]`.
    fn shares(keys: impl Iterator<Item = RoutingKey>) -> Vec<Vec<u32>> {
        let mut shares: Vec<Vec<u32>> = (0..=16).map(|n| vec![0; n]).collect();
        for key in keys {
            // With n workers, the heaviest of the first n wins: one pass serves all n.
            let mut best = (0, 0);
            for worker in 0..16 {
                best = best.max((weight(&key, worker), worker));
                shares[worker as usize + 1][best.1 as usize] += 1;
            }
        }
        shares
    }

    #[test]
    fn a_million_random_addresses_spread_within_five_percent() {
        let mut random = Random(1);
        let v4 = shares((0..1_000_000).map(|_| {
            RoutingKey::of(IpAddr::V4(Ipv4Addr::from_bits(
                (random.next() >> 32) as u32,
            )))
        }));
        let mut random = Random(2);
        let v6 = shares((0..1_000_000).map(|_| {
            let bits = u128::from(random.next()) << 64 | u128::from(random.next());
            RoutingKey::of(IpAddr::V6(Ipv6Addr::from_bits(bits)))
        }));
        for (family, shares) in [("IPv4", v4), ("IPv6", v6)] {
            for (n, shares) in shares.iter().enumerate().skip(2) {
                let (largest, smallest) =
                    (*shares.iter().max().unwrap(), *shares.iter().min().unwrap());
                let ratio = f64::from(largest) / f64::from(smallest);
                assert!(ratio < 1.05, "{family}, {n} workers: {shares:?}");
            }
        }
    }

    #[test]
    fn neighbouring_addresses_spread_like_random_ones() {
        // A random spread has a standard deviation of sqrt(mean * (1 - 1/n)).
        let v4 = (0..1u32 << 16).map(|low| key("10.0.0.0").0.plus(low));
        // Providers hand out /56s: every 256th /64.
        let v6 = (0..1u32 << 16).map(|low| key("2001:db8::").0.plus(low << 8));
        for (family, shares) in [("IPv4", shares(v4)), ("IPv6", shares(v6))] {
            for (n, shares) in shares.iter().enumerate().skip(2) {
                let mean = f64::from(1 << 16) / n as f64;
                let deviation = (mean * (1.0 - 1.0 / n as f64)).sqrt();
                for &share in shares {
                    let off = (f64::from(share) - mean).abs();
                    assert!(off < 4.5 * deviation, "{family}, {n} workers: {shares:?}");
                }
            }
        }
    }

    impl Network {
        fn plus(self, n: u32) -> RoutingKey {
            RoutingKey(match self {
                Network::V4(ip) => Network::V4(Ipv4Addr::from_bits(ip.to_bits() + n)),
                Network::V6(prefix) => Network::V6(prefix + u64::from(n)),
            })
        }
    }

    #[test]
    fn the_next_best_worker_inherits_evenly() {
        // Second places must not follow from first places, or one worker inherits a whole share.
        let mut inherited = [0u32; 8];
        for n in 0..80_000 {
            let ranked = ranked(&key("10.0.0.0").0.plus(n), 0..8);
            if ranked[0] == 0 {
                inherited[ranked[1] as usize] += 1;
            }
        }
        let mean = f64::from(inherited.iter().sum::<u32>()) / 7.0;
        for &share in &inherited[1..] {
            assert!(
                (f64::from(share) - mean).abs() < 4.5 * mean.sqrt(),
                "{inherited:?}"
            );
        }
    }

    #[test]
    fn weights_never_change() {
        // Computed apart from this code, from the definitions.
        assert_eq!(weight(&key("192.0.2.1"), 0), 0x8994_bd76_866f_1a8a);
        assert_eq!(weight(&key("192.0.2.1"), 7), 0xdffb_5e6f_6c57_acdc);
        assert_eq!(weight(&key("2001:db8::1"), 0), 0xacc5_a30b_7575_3f87);
        assert_eq!(weight(&key("2001:db8::1"), 7), 0xd3db_8b81_8c18_c586);
    }

    #[test]
    fn keys_read_as_addresses() {
        assert_eq!(key("::ffff:192.0.2.1").to_string(), "192.0.2.1");
        assert_eq!(key("2001:db8:1:2:3:4:5:6").to_string(), "2001:db8:1:2::/64");
        assert_eq!(
            serde_json::to_string(&key("192.0.2.1")).unwrap(),
            r#""192.0.2.1""#
        );
        assert_eq!("2001:db8::9".parse(), Ok(key("2001:db8::")));
        assert_ne!(key("0.0.0.5"), key("0:0:0:5::"));
        assert_ne!(weight(&key("0.0.0.5"), 0), weight(&key("0:0:0:5::"), 0));
        for wrong in ["", "10.0.0.0/64", "10.0.0", "2001:db8::/48", "worker"] {
            assert_eq!(wrong.parse::<RoutingKey>(), Err(InvalidKey(wrong.into())));
        }
    }

    #[test]
    fn no_workers_no_pick() {
        assert_eq!(pick(&key("192.0.2.1"), std::iter::empty()), None);
        assert!(ranked(&key("192.0.2.1"), std::iter::empty()).is_empty());
    }

    fn any_ip() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            any::<u32>().prop_map(|bits| IpAddr::V4(Ipv4Addr::from_bits(bits))),
            any::<u128>().prop_map(|bits| IpAddr::V6(Ipv6Addr::from_bits(bits))),
        ]
    }

    proptest! {
        #[test]
        fn a_mapped_address_is_the_ipv4_address(bits: u32) {
            let v4 = Ipv4Addr::from_bits(bits);
            let mapped = IpAddr::V6(v4.to_ipv6_mapped());
            prop_assert_eq!(canonical(mapped), IpAddr::V4(v4));
            prop_assert_eq!(RoutingKey::of(mapped), RoutingKey::of(IpAddr::V4(v4)));
        }

        #[test]
        fn a_64_is_one_client(prefix in 1u64.., a: u64, b: u64) {
            let ip = |low: u64| {
                IpAddr::V6(Ipv6Addr::from_bits(u128::from(prefix) << 64 | u128::from(low)))
            };
            prop_assert_eq!(RoutingKey::of(ip(a)), RoutingKey::of(ip(b)));
        }

        #[test]
        fn text_and_back(ip in any_ip()) {
            let key = RoutingKey::of(ip);
            prop_assert_eq!(key.to_string().parse(), Ok(key));
            let json = serde_json::to_string(&key).unwrap();
            prop_assert_eq!(serde_json::from_str::<RoutingKey>(&json).unwrap(), key);
        }

        #[test]
        fn ranking_is_a_permutation_by_weight(
            ip in any_ip(),
            workers in proptest::collection::hash_set(any::<u32>(), 1..20),
        ) {
            let key = RoutingKey::of(ip);
            let ranked = ranked(&key, workers.iter().copied());
            prop_assert!(ranked.is_sorted_by(|&a, &b| weight(&key, a) > weight(&key, b)));
            prop_assert_eq!(&ranked.iter().copied().collect::<HashSet<_>>(), &workers);
            prop_assert_eq!(pick(&key, workers.into_iter()), Some(ranked[0]));
        }

        #[test]
        fn a_worker_that_goes_takes_only_its_own_clients(
            ips in proptest::collection::vec(any_ip(), 1..50),
            workers in 2u32..17,
            gone in 0u32..17,
        ) {
            let gone = gone % workers;
            for key in ips.into_iter().map(RoutingKey::of) {
                let before = pick(&key, 0..workers);
                let without = pick(&key, (0..workers).filter(|&worker| worker != gone));
                if before != Some(gone) {
                    prop_assert_eq!(without, before);
                } else {
                    prop_assert_eq!(without, Some(ranked(&key, 0..workers)[1]));
                }
                // Back again, and in whatever order workers are listed.
                prop_assert_eq!(pick(&key, (0..workers).rev()), before);
            }
        }
    }
}
