//! What the master is doing, in a sentence for `systemctl status`.

use std::fmt::{self, Display};

use crate::systemd::count;

/// Whether connections that come in find a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Able {
    /// Some worker takes them.
    Served,
    /// Every worker is at its limit: they are refused.
    Full,
    /// There is no worker: they wait.
    #[default]
    Nobody,
    /// Those that there are have not started yet: they wait.
    Starting,
    /// Those that there are go: they wait.
    Draining,
    /// None that serves answers: they wait.
    Silent,
}

/// What the sentence depends on.
#[derive(Debug)]
pub struct Facts {
    /// Whether connections find a worker.
    pub able: Able,
    /// Whether Redis is there, where it is needed.
    pub redis: bool,
    /// Workers that speak another version of the control protocol.
    pub other_version: Vec<u32>,
    /// Workers that are part of the cluster.
    pub workers: u64,
    /// Connections that workers took.
    pub routed: u64,
    /// People who are online.
    pub users: u64,
}

impl Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.able {
            Able::Served => "",
            Able::Full => "all workers are full, connections are refused; ",
            Able::Nobody => "waiting for workers; ",
            Able::Starting => "waiting for workers that start; ",
            Able::Draining => "all workers are draining, connections wait; ",
            Able::Silent => "no worker answers, connections wait; ",
        })?;
        if !self.redis {
            f.write_str("Redis is away; ")?;
        }
        for worker in &self.other_version {
            write!(f, "worker {worker} is of another version: restart it; ")?;
        }
        write!(
            f,
            "{}, {} routed, {} online",
            count(self.workers, "worker"),
            count(self.routed, "connection"),
            count(self.users, "user")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sentence_says_why_nobody_is_served_first() {
        let fine = || Facts {
            able: Able::Served,
            redis: true,
            other_version: Vec::new(),
            workers: 2,
            routed: 14,
            users: 12,
        };
        let usual = "2 workers, 14 connections routed, 12 users online";
        assert_eq!(fine().to_string(), usual);
        let bad = Facts {
            able: Able::Full,
            redis: false,
            other_version: vec![3],
            ..fine()
        };
        assert_eq!(
            bad.to_string(),
            format!(
                "all workers are full, connections are refused; Redis is away; worker 3 is of another \
                 version: restart it; {usual}"
            )
        );
    }
}
