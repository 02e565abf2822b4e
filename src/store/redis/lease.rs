//! The lease that lets one master serve each prefix.
//!
//! A key that expires names the master that holds it, and is renewed while that one lives. A
//! restarted master takes its own predecessor's lease over at once, known by what both were
//! started for: the host and the directory of the sockets, of which there can be only one.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{RedisStore, scripts};
use crate::store::StoreError;

/// How long a lease lasts without renewal.
const TERM: Duration = Duration::from_secs(10);

/// How often it is renewed.
const RENEWAL: Duration = Duration::from_secs(2);

/// How often it is looked whether another master's lease is being renewed.
const LOOK: Duration = Duration::from_millis(500);

/// Why a master does not hold the lease.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LeaseError {
    /// Another one does, and lives.
    #[error(
        "another master serves this Redis prefix: {0}; stop it, or give this one a prefix of its \
         own (--redis-prefix, BANTER_REDIS_PREFIX)"
    )]
    Held(String),
    /// Redis cannot be asked.
    #[error(transparent)]
    Unavailable(#[from] StoreError),
}

/// A master's claim to the lease.
pub struct Lease {
    store: Arc<RedisStore>,
    /// What a restarted master has in common with its predecessor.
    identity: String,
    /// What the operator of another master is told.
    description: String,
}

/// How an attempt to take the lease went.
enum Attempt {
    Ours,
    /// Somebody else's, for so long yet.
    Theirs {
        holder: String,
        left: Duration,
    },
}

impl Lease {
    /// The claim of a master on `host` whose sockets are in `runtime_dir`.
    pub fn new(store: Arc<RedisStore>, host: &str, runtime_dir: &std::path::Path) -> Self {
        let runtime_dir = runtime_dir.display();
        Self {
            store,
            identity: format!("{host}:{runtime_dir}"),
            description: format!(
                "process {} on {host}, with its sockets in {runtime_dir}",
                std::process::id()
            ),
        }
    }

    /// Takes the lease. One that a dead master left behind is waited for.
    ///
    /// # Errors
    ///
    /// [`LeaseError::Held`] if another master renews it, [`LeaseError::Unavailable`] if Redis
    /// cannot be reached.
    pub async fn acquire(&self) -> Result<(), LeaseError> {
        let mut seen: Option<(String, Instant)> = None;
        loop {
            let (holder, left) = match self.attempt().await? {
                Attempt::Ours => return Ok(()),
                Attempt::Theirs { holder, left } => (holder, left),
            };
            // It ends at the same moment as long as nobody renews it.
            let ends = Instant::now() + left;
            if let Some((first_holder, first_ends)) = &seen
                && (*first_holder != holder || ends > *first_ends + RENEWAL / 2)
            {
                return Err(LeaseError::Held(holder));
            }
            seen.get_or_insert((holder, ends));
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Renews the lease for as long as it is ours; returns who has it instead. While Redis is
    /// away nobody can take it, and it is taken again as soon as that is back.
    pub async fn keep(&self) -> LeaseError {
        loop {
            tokio::time::sleep(RENEWAL).await;
            match self.attempt().await {
                Ok(Attempt::Ours) => {}
                Ok(Attempt::Theirs { holder, .. }) => return LeaseError::Held(holder),
                Err(error) => tracing::debug!(%error, "the lease cannot be renewed"),
            }
        }
    }

    /// Gives the lease back, so that another master need not wait for its end.
    ///
    /// # Errors
    ///
    /// [`StoreError::Unavailable`] if Redis cannot be reached; the lease ends by itself then.
    pub async fn release(&self) -> Result<(), StoreError> {
        let mut invocation = scripts::RELEASE.prepare_invoke();
        invocation.key(self.store.keys.lease()).arg(&self.identity);
        let _: Option<bool> = self
            .store
            .script("giving the lease back", &invocation)
            .await?;
        Ok(())
    }

    async fn attempt(&self) -> Result<Attempt, StoreError> {
        let mut invocation = scripts::LEASE.prepare_invoke();
        invocation
            .key(self.store.keys.lease())
            .arg(&self.identity)
            .arg(&self.description)
            .arg(u64::try_from(TERM.as_millis()).unwrap_or(u64::MAX));
        let theirs: Option<(String, u64)> =
            self.store.script("taking the lease", &invocation).await?;
        Ok(match theirs {
            None => Attempt::Ours,
            Some((holder, left)) => Attempt::Theirs {
                holder,
                left: Duration::from_millis(left),
            },
        })
    }
}
