//! Whether Redis is set up to keep what it is given.

use std::collections::HashMap;

use redis::aio::MultiplexedConnection;
use redis::{FromRedisValue, RedisResult};

/// Logs what whoever runs this Redis should know. What Redis does not tell is passed over: services
/// that run it for others forbid `CONFIG`.
pub(super) async fn inspect(mut connection: MultiplexedConnection, address: String) {
    let policy = config(&mut connection, "maxmemory-policy").await;
    if let Some(policy) = policy.filter(|policy| policy != "noeviction") {
        tracing::warn!(
            address,
            policy,
            "when its memory is full, Redis will throw away users and messages: \
             set maxmemory-policy to noeviction"
        );
    }
    let appending = config(&mut connection, "appendonly").await;
    let persistence = match appending.as_deref() {
        Some("yes") => {
            let sync = config(&mut connection, "appendfsync").await;
            match sync.as_deref() {
                Some("always") => "every message is on disk before it is answered".to_owned(),
                Some("everysec") => "a crash may lose the last second (appendfsync)".to_owned(),
                _ => "a crash may lose what the disk had not written (appendfsync)".to_owned(),
            }
        }
        Some(_) => match config(&mut connection, "save").await.as_deref() {
            Some("") => {
                tracing::warn!(
                    address,
                    "Redis keeps everything in memory only, and forgets it when it stops: \
                     set appendonly to yes"
                );
                "none".to_owned()
            }
            save => format!(
                "snapshots ({}); a crash loses what came since the last (set appendonly to yes)",
                save.unwrap_or("unknown")
            ),
        },
        None => "unknown, Redis does not tell".to_owned(),
    };
    let version = version(&mut connection).await;
    if version.is_none() {
        tracing::warn!(
            address,
            "Redis does not say who it is: should it lose messages when it restarts, their ids are \
             given out again; permit INFO"
        );
    }
    tracing::info!(
        address,
        version = version.as_deref().unwrap_or("unknown"),
        persistence,
        "connected to Redis"
    );
}

/// A configuration value, if Redis tells it.
async fn config(connection: &mut MultiplexedConnection, name: &str) -> Option<String> {
    let mut get = redis::cmd("CONFIG");
    get.arg("GET").arg(name);
    let values = ask::<HashMap<String, String>>(connection, &get).await;
    values.ok()?.remove(name)
}

async fn version(connection: &mut MultiplexedConnection) -> Option<String> {
    let mut info = redis::cmd("INFO");
    info.arg("server");
    let info = ask::<String>(connection, &info).await.ok()?;
    let mut lines = info.lines();
    lines.find_map(|line| Some(line.strip_prefix("redis_version:")?.to_owned()))
}

async fn ask<T: FromRedisValue>(
    connection: &mut MultiplexedConnection,
    command: &redis::Cmd,
) -> RedisResult<T> {
    let answer = command.query_async(connection).await;
    if let Err(error) = &answer {
        tracing::debug!(%error, "Redis does not tell about itself");
    }
    answer
}
