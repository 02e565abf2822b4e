//! No id is given out twice, even by a Redis that has lost some.
//!
//! With `appendfsync everysec`, snapshots, or a replica that takes over, a Redis that comes back may
//! lack what it acknowledged last. Then a channel's counter is where it was before, while people know
//! messages with higher ids, and no worker knows all that any client has seen. So it is Redis' *life*
//! that counts: from the start of a process, or its promotion from a replica, to the next. In Redis is
//! written in which life its data are; where that is not the one it leads, ids of all channels go on
//! from a floor (`scripts/life.lua`). What is left out below it does not exist, and readers see that.
//!
//! The floor is the time, in microseconds since 1970. A fixed step would not do: of two crashes in a
//! row the second may take all trace of the first, and the same step would lead to the same ids. Time
//! goes on whatever Redis forgets, and faster than any channel's ids: a Redis takes about a tenth of a
//! million posts a second. It stays below 2^53, where JavaScript's numbers end, until the year 2255.
//!
//! If everything is on the disk before it is answered (`appendfsync always`), a restart loses nothing,
//! and ids stay dense. So they do within a life.
//!
//! Asking for the life costs a fifth of a post, so it is remembered with each connection, which leads to
//! one process as long as it lasts: another process needs another connection, and there the life is
//! asked for anew, also for a post that is tried again. Every post says in which life it believes
//! Redis to be, and is refused if the data are of another one: they may have been replaced under a
//! living process. That they were while it was a replica for a while shows in its replication id, which
//! is looked at again for a post that comes [`TRUSTED`] after the last look.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use redis::aio::MultiplexedConnection;
use redis::{FromRedisValue, RedisError, RedisResult, ScriptInvocation};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::connection::Connection;
use super::scripts;

/// How long a life is believed to go on without a look.
const TRUSTED: Duration = Duration::from_secs(1);

/// The highest floor, should the clock be far off: half of the ids are left above it.
const MAX_FLOOR: i64 = 1 << 52;

/// What the post script answers if the data are of another life than it was told.
const OTHER_LIFE: &str = "OTHERLIFE";

/// The life of the Redis at the other end of a connection, once somebody has asked.
#[derive(Default)]
pub(super) struct KnownLife(Mutex<Option<Known>>);

struct Known {
    id: Arc<str>,
    looked: Instant,
}

/// Finds out in which life Redis is, for those who give out ids.
pub(super) struct Lives {
    key: String,
    /// Whether any was found out before: then a Redis that knows of none has lost it.
    any: AtomicBool,
}

impl Lives {
    /// `key` is where Redis keeps the life of its data.
    pub(super) fn new(key: String) -> Self {
        Self {
            key,
            any: AtomicBool::new(false),
        }
    }

    /// Runs a script that must be told the life.
    ///
    /// # Errors
    ///
    /// As of the script.
    pub(super) async fn invoke<T: FromRedisValue>(
        &self,
        mut connection: Connection,
        script: impl Fn(&str) -> ScriptInvocation<'static>,
    ) -> RedisResult<T> {
        let life = self.current(&connection).await?;
        let answer: RedisResult<T> = script(&life).invoke_async(&mut connection.inner).await;
        match answer.as_ref().err().and_then(RedisError::code) {
            Some(OTHER_LIFE) => {
                connection.life.forget(&life).await;
                let life = self.current(&connection).await?;
                script(&life).invoke_async(&mut connection.inner).await
            }
            // When it takes writes again, it does so in another life.
            Some("READONLY") => {
                connection.life.forget(&life).await;
                answer
            }
            _ => answer,
        }
    }

    /// The life at the other end of a connection.
    async fn current(&self, connection: &Connection) -> RedisResult<Arc<str>> {
        // While one looks, the others wait for what it finds.
        let mut known = connection.life.0.lock().await;
        if let Some(known) = &*known
            && known.looked.elapsed() < TRUSTED
        {
            return Ok(Arc::clone(&known.id));
        }
        let looked = Instant::now();
        let id = self.look(connection.inner.clone()).await?;
        *known = Some(Known {
            id: Arc::clone(&id),
            looked,
        });
        Ok(id)
    }

    async fn look(&self, mut connection: MultiplexedConnection) -> RedisResult<Arc<str>> {
        let mut get = redis::cmd("CONFIG");
        get.arg("GET").arg("*append*");
        // Services that run Redis for others do not tell.
        let settings: HashMap<String, String> =
            get.query_async(&mut connection).await.unwrap_or_default();
        let now = Timestamp::now().as_microsecond().clamp(0, MAX_FLOOR);
        let mut look = scripts::LIFE.key(&self.key);
        look.arg(now)
            .arg(u8::from(durable(&settings)))
            .arg(u8::from(self.any.load(Ordering::Relaxed)));
        let (id, floor): (String, Option<u64>) = look.invoke_async(&mut connection).await?;
        self.any.store(true, Ordering::Relaxed);
        if let Some(floor) = floor {
            tracing::warn!(
                floor,
                "Redis has started anew or taken over, and may have lost what it acknowledged last: \
                 ids of messages go on from the floor"
            );
        }
        Ok(id.into())
    }
}

impl KnownLife {
    /// Has it asked for again, unless somebody has done so meanwhile.
    async fn forget(&self, id: &Arc<str>) {
        let mut known = self.0.lock().await;
        if known
            .as_ref()
            .is_some_and(|known| Arc::ptr_eq(&known.id, id))
        {
            *known = None;
        }
    }
}

/// Whether a Redis with these settings has everything on its disk before it answers.
fn durable(settings: &HashMap<String, String>) -> bool {
    let is = |name, value| settings.get(name).is_some_and(|is| is == value);
    is("appendonly", "yes") && is("appendfsync", "always") && is("no-appendfsync-on-rewrite", "no")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_always_on_the_disk_before_the_answer_is_durable() {
        let always = [
            ("appendonly", "yes"),
            ("appendfsync", "always"),
            ("no-appendfsync-on-rewrite", "no"),
        ];
        let durable = |settings: &[(&str, &str)]| {
            let settings = settings.iter();
            durable(
                &settings
                    .map(|&(k, v)| (k.to_owned(), v.to_owned()))
                    .collect(),
            )
        };
        assert!(durable(&always));
        let others = [
            ("appendonly", "no"),
            ("appendfsync", "everysec"),
            ("no-appendfsync-on-rewrite", "yes"),
        ];
        for (n, other) in others.into_iter().enumerate() {
            let mut settings = always;
            settings[n] = other;
            assert!(!durable(&settings), "{other:?}");
        }
        assert!(
            !durable(&always[..2]),
            "what Redis does not tell is not believed"
        );
    }
}
