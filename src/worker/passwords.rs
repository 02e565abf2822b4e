//! Passwords: argon2id, on a bounded number of threads, so that logins never stall the chat.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use argon2::Argon2;
use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher as _, PasswordVerifier as _};
use tokio::sync::Semaphore;

use super::http::error::ApiError;

/// Passwords waiting for a thread; more are refused.
const WAITING: usize = 256;

/// Hashes and checks passwords. The parameters are argon2's defaults, which are those that OWASP's
/// Password Storage Cheat Sheet names (argon2id, 19 MiB, two passes, one lane).
pub struct Passwords {
    /// A permit for each hash that may be computed at once: half the processors, at least one.
    threads: Arc<Semaphore>,
    waiting: AtomicUsize,
    /// Checked where there is no account, so that this takes as long as where there is one.
    decoy: String,
}

impl Passwords {
    /// Ready to hash.
    ///
    /// # Errors
    /// If hashing does not work at all.
    pub fn new() -> anyhow::Result<Self> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let decoy = compute(b"nobody has this password")
            .map_err(|error| anyhow::anyhow!("passwords cannot be hashed: {error}"))?;
        let threads = Arc::new(Semaphore::new((processors / 2).max(1)));
        Ok(Self {
            threads,
            waiting: AtomicUsize::new(0),
            decoy,
        })
    }

    /// A password's hash, in PHC string format.
    ///
    /// # Errors
    /// 503 if too many are waiting.
    pub async fn hash(&self, password: String) -> Result<String, ApiError> {
        self.compute(move || compute(password.as_bytes()))
            .await?
            .map_err(|error| {
                tracing::error!(%error, "a password cannot be hashed");
                ApiError::internal()
            })
    }

    /// Whether a password is the one that was hashed. Without a hash it is not, after the same
    /// time.
    ///
    /// # Errors
    /// 503 if too many are waiting.
    pub async fn verify(&self, password: String, hash: Option<String>) -> Result<bool, ApiError> {
        let exists = hash.is_some();
        let hash = hash.unwrap_or_else(|| self.decoy.clone());
        let matches = self
            .compute(move || match PasswordHash::new(&hash) {
                Ok(hash) => Argon2::default()
                    .verify_password(password.as_bytes(), &hash)
                    .is_ok(),
                Err(error) => {
                    tracing::error!(%error, "a stored password hash cannot be read");
                    false
                }
            })
            .await?;
        Ok(matches && exists)
    }

    async fn compute<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let _place = Place::take(&self.waiting).ok_or_else(ApiError::unavailable)?;
        let permit = self
            .threads
            .clone()
            .acquire_owned()
            .await
            .map_err(|_| ApiError::unavailable())?;
        tokio::task::spawn_blocking(move || {
            // Held by the work, not by the request: a client that goes away frees nothing.
            let _permit = permit;
            work()
        })
        .await
        .map_err(|_| ApiError::internal())
    }
}

/// A place in the queue, given back when dropped.
struct Place<'a>(&'a AtomicUsize);

impl<'a> Place<'a> {
    fn take(waiting: &'a AtomicUsize) -> Option<Self> {
        let place = Self(waiting);
        (waiting.fetch_add(1, Ordering::Relaxed) < WAITING).then_some(place)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn compute(password: &[u8]) -> Result<String, argon2::password_hash::Error> {
    Argon2::default()
        .hash_password(password)
        .map(|hash| hash.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_right_password_matches() {
        let passwords = Passwords::new().unwrap();
        let hash = passwords.hash("hunter42".into()).await.unwrap();
        assert!(
            hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"),
            "{hash}"
        );
        assert!(
            passwords
                .verify("hunter42".into(), Some(hash.clone()))
                .await
                .unwrap()
        );
        assert!(
            !passwords
                .verify("hunter43".into(), Some(hash))
                .await
                .unwrap()
        );
        assert!(
            !passwords
                .verify("nobody has this password".into(), None)
                .await
                .unwrap()
        );
    }

    #[test]
    fn places_are_bounded_and_given_back() {
        let waiting = AtomicUsize::new(0);
        let places: Vec<_> = (0..WAITING)
            .map(|_| Place::take(&waiting).unwrap())
            .collect();
        assert!(Place::take(&waiting).is_none());
        drop(places);
        assert_eq!(waiting.load(Ordering::Relaxed), 0);
    }
}
