//! What things are called in Redis.
//!
//! All names begin with `{PREFIX}:`. The braces are a hash tag: a cluster keeps such keys together
//! on one node, which scripts that use several of them need.
//!
//! | name | what |
//! | --- | --- |
//! | `{P}:user:NAME` | hash: `name`, `password_hash` |
//! | `{P}:channels` | hash: key of a created channel → its name |
//! | `{P}:channels:order` | list: their keys in order of creation |
//! | `{P}:channel:KEY` | hash: `last` id, and `millis` and `date` of that message; `imported`: how many came from another server |
//! | `{P}:messages:KEY` | stream: a message's id is that of its entry, `ID-0` |
//! | `{P}:holes:KEY` | sorted set: the ids before which others were left out; the score counts messages (`scripts/ids.lua`) |
//! | `{P}:life` | hash: `id` of the life that Redis leads, whether it is `durable`, and the `floor` of its ids (`life.rs`) |
//! | `{P}:nonce:HASH` | string: `ID DATE` of the message posted with it; expires |
//! | `{P}:topic:KEY` | pub/sub: a channel's messages, and who types |
//! | `{P}:presence` | pub/sub: the master's numbered changes of who is online |
//! | `{P}:master` | string: which master holds the lease; expires |
//! | `{P}:probe:RANDOM` | pub/sub: what a subscriber connection sends to itself |
//!
//! `KEY` is the channel's key in base64url, since it may hold anything.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};

/// Makes the names that begin with one prefix.
#[derive(Debug, Clone)]
pub(super) struct Keys {
    /// `{PREFIX}:`
    tag: String,
}

impl Keys {
    /// `prefix` must hold no brace.
    pub(super) fn new(prefix: &str) -> Self {
        Self {
            tag: format!("{{{prefix}}}:"),
        }
    }

    pub(super) fn user(&self, name: &str) -> String {
        format!("{}user:{name}", self.tag)
    }

    pub(super) fn channels(&self) -> String {
        format!("{}channels", self.tag)
    }

    pub(super) fn channels_order(&self) -> String {
        format!("{}channels:order", self.tag)
    }

    pub(super) fn counter(&self, channel: &str) -> String {
        self.of_channel("channel", channel)
    }

    pub(super) fn messages(&self, channel: &str) -> String {
        self.of_channel("messages", channel)
    }

    pub(super) fn holes(&self, channel: &str) -> String {
        self.of_channel("holes", channel)
    }

    pub(super) fn topic(&self, channel: &str) -> String {
        self.of_channel("topic", channel)
    }

    /// Hashed, since all three parts may be long.
    pub(super) fn nonce(&self, channel: &str, user: &str, nonce: &str) -> String {
        let mut hash = Sha256::new();
        for part in [channel, user, nonce] {
            // With its length, so that no two triples look alike.
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        format!(
            "{}nonce:{}",
            self.tag,
            URL_SAFE_NO_PAD.encode(hash.finalize())
        )
    }

    /// Where the master publishes who is online.
    pub(super) fn presence(&self) -> String {
        format!("{}presence", self.tag)
    }

    /// The life that Redis leads.
    pub(super) fn life(&self) -> String {
        format!("{}life", self.tag)
    }

    /// The lease of the master.
    pub(super) fn lease(&self) -> String {
        format!("{}master", self.tag)
    }

    /// A topic that nobody else uses.
    pub(super) fn probe(&self) -> String {
        format!("{}probe:{:032x}", self.tag, rand::random::<u128>())
    }

    fn of_channel(&self, kind: &str, channel: &str) -> String {
        format!("{}{kind}:{}", self.tag, URL_SAFE_NO_PAD.encode(channel))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_names_share_the_hash_tag_of_their_prefix() {
        let keys = Keys::new("banter");
        let all = [
            keys.user("{anna}"),
            keys.channels(),
            keys.channels_order(),
            keys.counter("}{ c"),
            keys.messages("c"),
            keys.holes("c"),
            keys.topic("c"),
            keys.life(),
            keys.nonce("c", "anna", "1"),
            keys.probe(),
        ];
        for key in &all {
            assert!(key.starts_with("{banter}:"), "{key}");
        }
        assert_eq!(keys.counter("general"), "{banter}:channel:Z2VuZXJhbA");
        let distinct: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
    }

    #[test]
    fn nonces_of_different_channels_and_users_are_told_apart() {
        let keys = Keys::new("banter");
        let nonce = keys.nonce("c", "anna", "1");
        for other in [("ca", "nna", "1"), ("c", "anna1", ""), ("", "canna", "1")] {
            assert_ne!(keys.nonce(other.0, other.1, other.2), nonce);
        }
        assert_eq!(keys.nonce("c", "anna", "1"), nonce);
    }
}
