//! Passwords: argon2id, on a bounded number of threads, so that logins never stall the chat.
//!
//! Accounts that were moved here from another server have bcrypt hashes until their first login,
//! see [`Verdict::Outdated`]. bcrypt takes another time than argon2id. So how long a wrong password
//! takes tells, until then, that the name is one of those accounts; for all others, and for names
//! that nobody has, it takes the same. That an account exists is no secret (registration tells it);
//! whoever minds that it has not been used since the move can only be helped by its owner's login.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use argon2::Argon2;
use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher as _, PasswordVerifier as _};
use tokio::sync::Semaphore;

use super::http::error::ApiError;

/// Passwords waiting for a thread; more are refused.
const WAITING: usize = 256;

/// Bytes of a password that bcrypt looks at.
const BCRYPT_BYTES: usize = 72;

/// The least and the most work of a bcrypt hash, as the logarithm of its rounds: from what bcrypt
/// allows to several seconds.
const BCRYPT_COST: std::ops::RangeInclusive<u32> = 4..=16;

/// What a password is to an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Not its password, or there is no account.
    Wrong,
    /// Its password.
    Right,
    /// Its password, but the hash is bcrypt's, and the password's argon2id should replace it.
    Outdated,
}

/// Whether a hash is one of bcrypt that can be verified here: `$2a$`, `$2b$` or `$2y$`, which
/// differ in nothing but what old implementations did wrong, and at most 16 as its cost.
pub fn is_bcrypt(hash: &str) -> bool {
    !hash.starts_with("$2x$")
        && hash
            .parse::<bcrypt::HashParts>()
            .is_ok_and(|parts| BCRYPT_COST.contains(&parts.get_cost()))
}

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
                tracing::error!("a password cannot be hashed: {error}");
                ApiError::internal()
            })
    }

    /// Whether a password is the one that was hashed. Without a hash it is not, after the same
    /// time as with an argon2id hash.
    ///
    /// # Errors
    /// 503 if too many are waiting.
    pub async fn verify(
        &self,
        password: String,
        hash: Option<String>,
    ) -> Result<Verdict, ApiError> {
        let exists = hash.is_some();
        let hash = hash.unwrap_or_else(|| self.decoy.clone());
        let verdict = self.compute(move || verify(&password, &hash)).await?;
        Ok(if exists { verdict } else { Verdict::Wrong })
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

fn verify(password: &str, hash: &str) -> Verdict {
    if hash.starts_with("$2") {
        return verify_bcrypt(password, hash);
    }
    match PasswordHash::new(hash) {
        Ok(hash) => match Argon2::default().verify_password(password.as_bytes(), &hash) {
            Ok(()) => Verdict::Right,
            Err(_) => Verdict::Wrong,
        },
        Err(error) => {
            tracing::error!("a stored password hash cannot be read: {error}");
            Verdict::Wrong
        }
    }
}

/// As the server did that made the hash: bcrypt looks at the first 72 bytes only, and in some
/// versions at nothing from a NUL on.
///
/// A password that is longer, or has a NUL, keeps its bcrypt hash: what was typed need not be the
/// whole of what its owner chose, who would be locked out if it became the password.
fn verify_bcrypt(password: &str, hash: &str) -> Verdict {
    let matches = |password: &str| {
        bcrypt::verify(password, hash).unwrap_or_else(|error| {
            tracing::error!("a stored password hash cannot be read: {error}");
            false
        })
    };
    match password.split_once('\0') {
        Some((before, _)) if matches(password) || matches(before) => Verdict::Right,
        None if matches(password) => match password.len() {
            0..=BCRYPT_BYTES => Verdict::Outdated,
            _ => Verdict::Right,
        },
        _ => Verdict::Wrong,
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
        let verify = async |password: &str, hash: Option<&str>| {
            let hash = hash.map(str::to_owned);
            passwords.verify(password.to_owned(), hash).await.unwrap()
        };
        let hash = passwords.hash("hunter42".into()).await.unwrap();
        assert!(
            hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"),
            "{hash}"
        );
        assert_eq!(verify("hunter42", Some(&hash)).await, Verdict::Right);
        assert_eq!(verify("hunter43", Some(&hash)).await, Verdict::Wrong);
        let nobody = "nobody has this password";
        assert_eq!(verify(nobody, None).await, Verdict::Wrong);

        let old = bcrypt::hash("hunter42", 4).unwrap();
        assert_eq!(verify("hunter42", Some(&old)).await, Verdict::Outdated);
        assert_eq!(verify("hunter43", Some(&old)).await, Verdict::Wrong);
        for broken in ["", "$2b$", "$2b$04$short", "$argon2id$", "secret"] {
            assert_eq!(verify("secret", Some(broken)).await, Verdict::Wrong);
        }
    }

    #[test]
    fn hashes_of_other_implementations_match() {
        // Published test vectors of jBCrypt and of the Openwall project.
        for (password, hash) in [
            (
                "",
                "$2a$06$DCq7YPn5Rq63x1Lad4cll.TV4S6ytwfsfvkgY8jIucDrjc8deX1s.",
            ),
            (
                "a",
                "$2a$06$m0CrhHm10qJ3lXRY.5zDGO3rS2KdeeWLuGmsfGlMfOxih58VYVfxe",
            ),
            (
                "U*U",
                "$2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW",
            ),
            (
                "U*U",
                "$2y$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW",
            ),
            (
                "U*U",
                "$2b$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW",
            ),
        ] {
            assert!(is_bcrypt(hash), "{hash}");
            assert_eq!(verify(password, hash), Verdict::Outdated, "{hash}");
            assert_eq!(verify("other", hash), Verdict::Wrong, "{hash}");
        }
    }

    #[test]
    fn what_bcrypt_does_not_look_at_never_becomes_the_password() {
        let seventy_two = "x".repeat(72);
        let hash = bcrypt::hash(&seventy_two, 4).unwrap();
        assert_eq!(verify(&seventy_two, &hash), Verdict::Outdated);
        assert_eq!(verify(&format!("{seventy_two}typo"), &hash), Verdict::Right);
        assert_eq!(verify(&"x".repeat(71), &hash), Verdict::Wrong);

        // Whether the hash is of the whole or only of what comes before the NUL.
        for hashed in ["secret", "secret\0more"] {
            let hash = bcrypt::hash(hashed, 4).unwrap();
            assert_eq!(verify("secret\0more", &hash), Verdict::Right, "{hashed:?}");
            assert_eq!(verify("secre\0more", &hash), Verdict::Wrong, "{hashed:?}");
        }
    }

    #[test]
    fn only_hashes_that_can_be_verified_in_time_are_taken_for_bcrypt() {
        let rest = "CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW";
        assert!(is_bcrypt(&format!("$2b$16${rest}")));
        for bad in ["$2b$17$", "$2b$03$", "$2x$05$", "$2c$05$", "$1$", ""] {
            assert!(!is_bcrypt(&format!("{bad}{rest}")), "{bad}");
        }
        assert!(!is_bcrypt(&format!("$2b$05${}", &rest[1..])));
        assert!(!is_bcrypt("hunter42"));
        assert!(!is_bcrypt(""));
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
