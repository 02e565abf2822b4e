//! `POST /auth/register` and `POST /auth/login`.

use std::collections::HashMap;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::{Extension, Json};
use http::StatusCode;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::body::Fields;
use super::error::{ApiError, ErrorBody};
use super::openapi::{Anywhere, Credentials, Limited, Login, WithBody, WithPassword};
use super::token::Issued;
use crate::limits::{KeyedBuckets, Limit};
use crate::routing::RoutingKey;
use crate::store::{StoreError, User};
use crate::worker::App;
use crate::worker::passwords::Verdict;
use crate::worker::transport::Handle;

/// Characters of a name.
const NAME_LENGTH: std::ops::RangeInclusive<usize> = 3..=32;
/// Names that the old client uses for itself.
const RESERVED: [&str; 2] = ["system", "you"];
/// The least characters, and the most bytes, of a password.
const PASSWORD_MIN: usize = 6;
const PASSWORD_MAX: usize = 1024;
/// Addresses and names whose attempts are remembered.
const REMEMBERED: usize = 65_536;

/// How long a login waits for others from its address, while these use up what may fail.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often somebody may fail.
pub struct Attempts {
    buckets: Mutex<Buckets>,
    /// Told whenever a login is decided.
    decided: Notify,
}

struct Buckets {
    by_address: KeyedBuckets<RoutingKey>,
    by_name: KeyedBuckets<String>,
    /// Logins under way: each may still succeed and give back what it took.
    undecided: HashMap<RoutingKey, u32>,
}

/// A login under way.
struct Attempt<'a> {
    attempts: &'a Attempts,
    address: RoutingKey,
    name: String,
    failed: bool,
}

impl Attempts {
    /// `per_minute` registrations and failed logins, and as many at once; 0: no limit.
    pub fn new(per_minute: u32) -> Self {
        let limit = Self::limit(per_minute);
        Self {
            buckets: Mutex::new(Buckets {
                by_address: KeyedBuckets::new(limit, REMEMBERED),
                by_name: KeyedBuckets::new(limit, REMEMBERED),
                undecided: HashMap::new(),
            }),
            decided: Notify::new(),
        }
    }

    fn limit(per_minute: u32) -> Limit {
        Limit::new(f64::from(per_minute) / 60.0, per_minute)
    }

    /// Allows so many from now on; what was counted stays counted.
    pub fn set_rate(&self, per_minute: u32) {
        let (limit, now) = (Self::limit(per_minute), Instant::now());
        let mut buckets = self.buckets.lock();
        buckets.by_address.set_limit(limit, now);
        buckets.by_name.set_limit(limit, now);
        drop(buckets);
        // Who waits for others may have its turn now.
        self.decided.notify_waiters();
    }

    /// Counts a registration.
    fn register(&self, address: RoutingKey) -> Result<(), ApiError> {
        let mut buckets = self.buckets.lock();
        let taken = buckets.by_address.take(&address, Instant::now());
        taken.map_err(|after| too_fast(address, after))
    }

    /// Begins a login: takes beforehand what it costs to fail, so that many at once do not slip
    /// through together. Where others from the address hold all of it, it waits for them: they
    /// may be an office that comes to work.
    async fn begin(&self, client: IpAddr, name: &str) -> Result<Attempt<'_>, ApiError> {
        let address = RoutingKey::of(client);
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let mut decided = pin!(self.decided.notified());
            decided.as_mut().enable();
            let after = match self.buckets.lock().begin(address, name) {
                Ok(()) => break,
                Err((after, false)) => return Err(too_fast(address, after)),
                Err((after, true)) => after,
            };
            if tokio::time::timeout_at(deadline, decided).await.is_err() {
                return Err(too_fast(address, after));
            }
        }
        let name = name.to_owned();
        Ok(Attempt {
            attempts: self,
            address,
            name,
            failed: false,
        })
    }
}

fn too_fast(address: RoutingKey, after: Duration) -> ApiError {
    crate::limit_hit!("BANTER_AUTH_RATE", client = %address);
    ApiError::too_many(after)
}

impl Buckets {
    /// Takes what a failure costs; otherwise says when to try again, and whether one that is
    /// under way may give something back before.
    fn begin(&mut self, address: RoutingKey, name: &str) -> Result<(), (Duration, bool)> {
        let now = Instant::now();
        let undecided = self.undecided.contains_key(&address);
        self.by_address
            .take(&address, now)
            .map_err(|after| (after, undecided))?;
        if let Err(after) = self.by_name.take(&name.to_owned(), now) {
            self.by_address.give_back(&address, now);
            return Err((after, false));
        }
        *self.undecided.entry(address).or_default() += 1;
        Ok(())
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        let mut buckets = self.attempts.buckets.lock();
        if let Some(count) = buckets.undecided.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                buckets.undecided.remove(&self.address);
            }
        }
        if !self.failed {
            let now = Instant::now();
            buckets.by_address.give_back(&self.address, now);
            buckets.by_name.give_back(&self.name, now);
        }
        drop(buckets);
        self.attempts.decided.notify_waiters();
    }
}

/// Makes an account, and gives a token for it.
#[utoipa::path(
    post,
    path = "/auth/register",
    tag = "accounts",
    security(),
    request_body = Credentials,
    responses(
        (status = 200, description = "The account is made", body = Issued),
        (status = 400, description = "Something is missing, or not allowed: the text says what",
            body = ErrorBody, example = json!({ "error": "Missing parameter!" })),
        (status = 409, description = "Somebody has the name", body = ErrorBody,
            example = json!({ "error": "User with name already exists" })),
        Anywhere, WithBody, Limited, WithPassword,
    ),
)]
pub async fn register(
    State(app): State<Arc<App>>,
    Extension(connection): Extension<Arc<Handle>>,
    fields: Fields,
) -> Result<Json<Issued>, ApiError> {
    let (name, password) = credentials(&fields)?;
    check_name(name)?;
    check_password(password)?;
    app.attempts.register(RoutingKey::of(connection.client()))?;
    // Saves the hashing; the store decides.
    if app.store.user(name).await?.is_some() {
        return Err(exists());
    }
    let password_hash = app.passwords.hash(password.to_owned()).await?;
    let user = User {
        name: name.to_owned(),
        password_hash,
    };
    match app.store.create_user(user).await {
        Ok(()) => {
            tracing::info!(event = "registered", user = name, client = %connection.client(), "{name} registered");
            app.tokens.issue(name).map(Json)
        }
        Err(StoreError::Exists) => Err(exists()),
        Err(error) => Err(error.into()),
    }
}

/// Gives a token for an account.
#[utoipa::path(
    post,
    path = "/auth/login",
    tag = "accounts",
    security(),
    request_body = Login,
    responses(
        (status = 200, description = "Name and password are right", body = Issued),
        (status = 400, description = "Something is missing, empty, or not a string",
            body = ErrorBody, example = json!({ "error": "Missing parameter!" })),
        (status = 401, description = "There is no such account, or the password is another: \
            the answer does not tell which", body = ErrorBody,
            example = json!({ "error": "Wrong name or password" })),
        Anywhere, WithBody, Limited, WithPassword,
    ),
)]
pub async fn login(
    State(app): State<Arc<App>>,
    Extension(connection): Extension<Arc<Handle>>,
    fields: Fields,
) -> Result<Json<Issued>, ApiError> {
    let (name, password) = credentials(&fields)?;
    let client = connection.client();
    let mut attempt = app.attempts.begin(client, name).await?;
    let user = match check_name(name) {
        Ok(()) => app.store.user(name).await?,
        // No such account can exist.
        Err(_) => None,
    };
    let hash = user.map(|user| user.password_hash);
    let known = hash.is_some();
    let verdict = app.passwords.verify(password.to_owned(), hash.clone());
    match (verdict.await?, hash) {
        (Verdict::Wrong, _) | (_, None) => {
            attempt.failed = true;
            // Not a name that nobody has: it may be a password in the wrong field.
            let user = known.then_some(name);
            tracing::info!(event = "login_failed", user, %client, "wrong name or password");
            return Err(ApiError::unauthorized("Wrong name or password"));
        }
        (Verdict::Right, _) => {}
        (Verdict::Outdated, Some(old)) => renew_hash(&app, name, password, &old).await,
    }
    tracing::info!(event = "login", user = name, %client, "{name} got a token");
    app.tokens.issue(name).map(Json)
}

/// Replaces an outdated hash, now that the password is known. If that fails, the next login does.
async fn renew_hash(app: &App, name: &str, password: &str, old: &str) {
    let renewed = match app.passwords.hash(password.to_owned()).await {
        Ok(new) => app.store.replace_hash(name, old, &new).await,
        // Logged where it failed, or too many were waiting.
        Err(_) => return,
    };
    match renewed {
        Ok(()) => tracing::info!(
            event = "hash_renewed",
            user = name,
            "the password of {name} is hashed anew"
        ),
        Err(error) => tracing::warn!(user = name, "an old password hash was kept: {error}"),
    }
}

fn credentials(fields: &Fields) -> Result<(&str, &str), ApiError> {
    match (fields.string("name"), fields.string("password")) {
        (Some(name), Some(password)) => Ok((name, password)),
        _ => Err(ApiError::bad_request("Missing parameter!")),
    }
}

fn exists() -> ApiError {
    ApiError::new(StatusCode::CONFLICT, "User with name already exists")
}

/// Whether an account can have this name.
///
/// # Errors
/// 400 with what is wrong.
pub fn check_name(name: &str) -> Result<(), ApiError> {
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return Err(ApiError::bad_request(
            "Name must be numbers or letter a-z only",
        ));
    }
    if name.len() < *NAME_LENGTH.start() {
        return Err(ApiError::bad_request(format!(
            "The name {name} is too short. (min {}. characters)",
            NAME_LENGTH.start()
        )));
    }
    if name.len() > *NAME_LENGTH.end() {
        return Err(ApiError::bad_request(format!(
            "The name is too long. (max {}. characters)",
            NAME_LENGTH.end()
        )));
    }
    if RESERVED
        .iter()
        .any(|reserved| name.eq_ignore_ascii_case(reserved))
    {
        return Err(ApiError::bad_request("That name is not allowed"));
    }
    Ok(())
}

fn check_password(password: &str) -> Result<(), ApiError> {
    // Counted as the clients' JavaScript counts, which checks it too.
    if password.encode_utf16().count() < PASSWORD_MIN {
        return Err(ApiError::bad_request(format!(
            "The password is too short. (min {PASSWORD_MIN}. characters)"
        )));
    }
    if password.len() > PASSWORD_MAX {
        return Err(ApiError::bad_request(format!(
            "The password is too long. (max {PASSWORD_MAX}. bytes)"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_to_the_very_end() {
        for good in ["abc", "Ann0", &"x".repeat(32)] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        for (bad, text) in [
            ("ab", "The name ab is too short. (min 3. characters)"),
            ("abc\n", "Name must be numbers or letter a-z only"),
            ("a b", "Name must be numbers or letter a-z only"),
            ("änn", "Name must be numbers or letter a-z only"),
            ("SYSTEM", "That name is not allowed"),
            ("You", "That name is not allowed"),
        ] {
            assert_eq!(check_name(bad).unwrap_err().message(), text, "{bad:?}");
        }
        assert!(check_name(&"x".repeat(33)).is_err());
    }

    #[test]
    fn passwords_have_bounds() {
        assert!(check_password("12345").is_err());
        assert!(check_password("123456").is_ok());
        assert!(check_password(&"x".repeat(1024)).is_ok());
        assert!(check_password(&"ä".repeat(513)).is_err());
    }
}
