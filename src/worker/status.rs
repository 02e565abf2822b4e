//! What a worker is doing, in a sentence for `systemctl status`.

use std::fmt::{self, Display};
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::App;
use super::intake::Connections;
use crate::control::PROTOCOL;
use crate::pulse::Pulse;
use crate::systemd::count;

/// Where to look.
pub struct Look {
    /// The worker.
    pub app: Arc<App>,
    /// Its connections.
    pub connections: Arc<Connections>,
    /// It has its copy of the state.
    pub ready: CancellationToken,
    /// It is on its way out.
    pub draining: CancellationToken,
    /// Of its intake.
    pub intake: Pulse,
}

impl Look {
    /// What is to be seen now.
    pub fn sentence(&self) -> String {
        let redis = self.app.redis.as_ref();
        let facts = Facts {
            ready: self.ready.is_cancelled(),
            draining: self.draining.is_cancelled(),
            master: self.app.link.is_connected(),
            other_protocol: self.app.link.other_protocol(),
            redis: redis.is_none_or(|redis| redis.connected()),
            connections: self.connections.count(),
            users: self.app.clients.len() as u64,
        };
        facts.to_string()
    }
}

/// What the sentence depends on.
struct Facts {
    ready: bool,
    draining: bool,
    /// Whether the master is there.
    master: bool,
    /// The version of the control protocol that it speaks, if that is another one.
    other_protocol: Option<u32>,
    /// Whether Redis is there, where it is needed.
    redis: bool,
    connections: u32,
    users: u64,
}

impl Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let connections = count(self.connections, "connection");
        if self.draining {
            return write!(f, "draining: {connections} left");
        }
        if !self.ready {
            f.write_str("starting: ")?;
        }
        match self.other_protocol {
            _ if self.master => {}
            None => f.write_str("waiting for the master; ")?,
            Some(other) => write!(
                f,
                "the master speaks version {other} of the control protocol, this worker {PROTOCOL}: \
                 restart the older of the two; "
            )?,
        }
        if !self.redis {
            f.write_str("Redis is away; ")?;
        }
        write!(f, "{connections}, {}", count(self.users, "user"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sentence_says_what_is_missing_first() {
        let fine = || Facts {
            ready: true,
            draining: false,
            master: true,
            other_protocol: None,
            redis: true,
            connections: 14,
            users: 12,
        };
        assert_eq!(fine().to_string(), "14 connections, 12 users");
        let starting = Facts {
            ready: false,
            master: false,
            connections: 0,
            users: 0,
            ..fine()
        };
        assert_eq!(
            starting.to_string(),
            "starting: waiting for the master; 0 connections, 0 users"
        );
        let alone = Facts {
            master: false,
            other_protocol: Some(7),
            redis: false,
            ..fine()
        };
        assert_eq!(
            alone.to_string(),
            format!(
                "the master speaks version 7 of the control protocol, this worker {PROTOCOL}: restart \
                 the older of the two; Redis is away; 14 connections, 12 users"
            )
        );
        let draining = Facts {
            draining: true,
            redis: false,
            ..fine()
        };
        assert_eq!(draining.to_string(), "draining: 14 connections left");
    }
}
