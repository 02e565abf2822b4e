//! Reading the Redis of the server that came before: only with commands that write nothing, and in
//! pages, so that neither side is ever busy with one for long.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, Client, Cmd, FromRedisValue, Pipeline, ProtocolVersion, RedisError,
    RedisResult,
};

use crate::ConfigError;
use crate::store::redis::{SettingsError, address, refused};

/// How long the source may take to connect, and to answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);

/// How many keys SCAN looks at for one answer.
const SCAN_COUNT: u32 = 1000;

/// The most items of a page, how many the first one has, and about the most bytes of one, once it
/// is known how large the items are.
const PAGE: u64 = 1000;
const FIRST_PAGE: u64 = 100;
const PAGE_BYTES: u64 = 2 << 20;

/// A connection to the source.
pub(super) struct Source {
    connection: MultiplexedConnection,
}

/// The fields of a user; `None` if it has none, because it is something else.
pub(super) type UserFields = Option<[Option<Vec<u8>>; 2]>;

impl Source {
    /// Connects to the Redis at `url`.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], without the password.
    pub(super) async fn connect(url: &str) -> Result<Self, ConfigError> {
        let info = address::parse(url).map_err(|error| config_error(&error))?;
        let shown = address::shown(info.addr());
        if matches!(info.addr(), redis::ConnectionAddr::TcpTls { .. }) {
            // It fails if there is one already, which is as good.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        // What a Redis as old as the server before may know.
        let settings = info.redis_settings().clone();
        let settings = settings
            .set_protocol(ProtocolVersion::RESP2)
            .set_skip_set_lib_name();
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(Some(RESPONSE_TIMEOUT));
        let failed = |error: RedisError| {
            config_error(&refused(&shown, &error, "check --from, and that it runs"))
        };
        let client = Client::open(info.set_redis_settings(settings)).map_err(failed)?;
        let connection = client
            .get_multiplexed_async_connection_with_config(&config)
            .await
            .map_err(failed)?;
        Ok(Self { connection })
    }

    /// Looks for all keys that match a pattern.
    pub(super) fn scan(&self, pattern: &'static str) -> Scan {
        Scan {
            pattern,
            cursor: Some(0),
        }
    }

    /// Reads users.
    pub(super) async fn users(&mut self, keys: &[Vec<u8>]) -> RedisResult<Vec<UserFields>> {
        self.each(keys, |key| {
            let mut get = redis::cmd("HMGET");
            get.arg(key).arg("name").arg("password");
            get
        })
        .await
    }

    /// The lists with these keys; `None` for those that are something else.
    pub(super) async fn lists(&mut self, keys: &[Vec<u8>]) -> RedisResult<Vec<Option<List>>> {
        let lengths: Vec<Option<u64>> = self
            .each(keys, |key| {
                let mut length = redis::cmd("LLEN");
                length.arg(key);
                length
            })
            .await?;
        let lists = keys.iter().zip(lengths).map(|(key, length)| {
            Some(List {
                key: key.clone(),
                length: length?,
            })
        });
        Ok(lists.collect())
    }

    /// As [`lists`](Self::lists), for one key. One that does not exist is an empty list.
    pub(super) async fn list(&mut self, key: &[u8]) -> RedisResult<Option<List>> {
        let lists = self.lists(&[key.to_vec()]).await?;
        Ok(lists.into_iter().next().flatten())
    }

    /// The answers to a command for each key; `None` where the key holds something of another type.
    async fn each<T: FromRedisValue>(
        &mut self,
        keys: &[Vec<u8>],
        command: impl Fn(&[u8]) -> Cmd,
    ) -> RedisResult<Vec<Option<T>>> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let mut pipeline = Pipeline::with_capacity(keys.len());
        pipeline.ignore_errors();
        for key in keys {
            pipeline.add_command(command(key));
        }
        let answers: Vec<RedisResult<T>> = pipeline.query_async(&mut self.connection).await?;
        answers
            .into_iter()
            .map(|answer| match answer {
                Ok(answer) => Ok(Some(answer)),
                Err(error) if error.code() == Some("WRONGTYPE") => Ok(None),
                Err(error) => Err(error),
            })
            .collect()
    }
}

/// A search for keys under way.
pub(super) struct Scan {
    pattern: &'static str,
    /// `None` at the end.
    cursor: Option<u64>,
}

impl Scan {
    /// The next keys, which may be none, and may have come before; `None` at the end.
    pub(super) async fn next(&mut self, source: &mut Source) -> RedisResult<Option<Vec<Vec<u8>>>> {
        let Some(cursor) = self.cursor else {
            return Ok(None);
        };
        let mut scan = redis::cmd("SCAN");
        scan.arg(cursor)
            .arg("MATCH")
            .arg(self.pattern)
            .arg("COUNT")
            .arg(SCAN_COUNT);
        let (cursor, keys): (u64, Vec<Vec<u8>>) = scan.query_async(&mut source.connection).await?;
        self.cursor = Some(cursor).filter(|&cursor| cursor != 0);
        Ok(Some(keys))
    }
}

/// A list in the source.
pub(super) struct List {
    pub(super) key: Vec<u8>,
    /// How many items it had when it was looked at.
    pub(super) length: u64,
}

impl List {
    /// Reads it from the beginning on.
    pub(super) fn pages(self) -> Pages {
        Pages {
            key: self.key,
            position: 0,
            size: FIRST_PAGE,
        }
    }
}

/// A list being read.
pub(super) struct Pages {
    key: Vec<u8>,
    /// Of the next item.
    position: u64,
    /// How many items the next page has.
    size: u64,
}

impl Pages {
    /// The next page; `None` at the end.
    pub(super) async fn next(&mut self, source: &mut Source) -> RedisResult<Option<Page>> {
        let mut range = redis::cmd("LRANGE");
        range
            .arg(&self.key)
            .arg(self.position)
            .arg(self.position + self.size - 1);
        let items: Vec<Vec<u8>> = range.query_async(&mut source.connection).await?;
        let count = items.len() as u64;
        if count == 0 {
            return Ok(None);
        }
        let bytes = items.iter().map(|item| item.len() as u64).sum();
        self.size = next_size(count, bytes);
        let page = Page {
            start: self.position,
            items,
        };
        self.position += count;
        Ok(Some(page))
    }
}

/// How many items to read next, after `count` items that had `bytes` bytes.
fn next_size(count: u64, bytes: u64) -> u64 {
    (PAGE_BYTES.saturating_mul(count) / bytes.max(1)).clamp(1, PAGE)
}

/// Items of a list.
pub(super) struct Page {
    start: u64,
    items: Vec<Vec<u8>>,
}

impl Page {
    /// The items with their positions in the list, from 0 on.
    pub(super) fn positioned(&self) -> impl Iterator<Item = (u64, &[u8])> {
        (self.start..).zip(self.items.iter().map(Vec::as_slice))
    }
}

/// What is wrong with the source, by the name that its setting has.
fn config_error(error: &SettingsError) -> ConfigError {
    ConfigError::new(error.to_string().replace("REDIS_URL", "--from"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_bounded_by_items_and_by_bytes() {
        assert_eq!(next_size(100, 10_000), PAGE);
        assert_eq!(next_size(100, 0), PAGE);
        assert_eq!(next_size(100, 100 << 20), 2);
        assert_eq!(next_size(1, 100 << 20), 1);
        assert_eq!(next_size(1000, 1000 * 4096), 512);
    }

    #[tokio::test]
    async fn a_source_that_is_no_use_is_told_in_one_line_without_its_password() {
        for url in ["me:secret@h", "redis:/x", "unix:/nonexistent?pass=secret"] {
            let line = Source::connect(url).await.err().unwrap().to_string();
            assert!(
                line.contains("--from") && !line.contains("secret"),
                "{line}"
            );
            assert!(
                !line.contains('\n') && !line.contains("REDIS_URL"),
                "{line}"
            );
        }
    }
}
