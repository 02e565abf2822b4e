//! The threads that read.
//!
//! Every answer comes out of one transaction, hence from one state of the database. None scans:
//! messages are found by their primary key, and dates, which ascend with the ids, by bisection.

use parking_lot::Mutex;
use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};
use serde_json::value::RawValue;
use tokio::sync::mpsc;

use super::{Reply, database_failed, from_sql, to_sql};
use crate::store::{BUILT_IN_CHANNELS, Channel, Message, PAGE_LIMIT, Page, Range, User};

/// Something to look up, and where the answer goes.
pub(super) enum Query {
    User {
        name: String,
        reply: Reply<Option<User>>,
    },
    Channels {
        reply: Reply<Vec<Channel>>,
    },
    Page {
        channel: String,
        range: Range,
        reply: Reply<Page>,
    },
    LastBefore {
        channel: String,
        millis: i64,
        reply: Reply<u64>,
    },
}

/// Answers what comes out of the queue until it is closed and empty.
pub(super) fn run(mut connection: Connection, queue: &Mutex<mpsc::Receiver<Query>>) {
    loop {
        // Bound on its own, so that the lock is free again while the query is answered.
        let query = queue.lock().blocking_recv();
        match query {
            Some(query) => query.answer(&mut connection),
            None => return,
        }
    }
}

impl Query {
    fn answer(self, connection: &mut Connection) {
        match self {
            Self::User { name, reply } => look_up(connection, reply, |tx| user(tx, &name)),
            Self::Channels { reply } => look_up(connection, reply, channels),
            Self::Page {
                channel,
                range,
                reply,
            } => {
                look_up(connection, reply, |tx| page(tx, &channel, range));
            }
            Self::LastBefore {
                channel,
                millis,
                reply,
            } => {
                look_up(connection, reply, |tx| last_before(tx, &channel, millis));
            }
        }
    }
}

/// Runs a query in a transaction of its own, unless whoever asked has given up.
fn look_up<T>(
    connection: &mut Connection,
    reply: Reply<T>,
    query: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>,
) {
    if reply.is_closed() {
        return;
    }
    let answer = connection.transaction().and_then(|tx| query(&tx));
    // Nobody may be waiting any more, which is no concern of ours.
    let _ = reply.send(answer.map_err(|error| database_failed("reading", &error)));
}

fn user(tx: &Transaction<'_>, name: &str) -> rusqlite::Result<Option<User>> {
    tx.prepare_cached("SELECT name, password_hash FROM users WHERE name = ?1")?
        .query_row([name], |row| {
            Ok(User {
                name: row.get(0)?,
                password_hash: row.get(1)?,
            })
        })
        .optional()
}

fn channels(tx: &Transaction<'_>) -> rusqlite::Result<Vec<Channel>> {
    let mut statement = tx.prepare_cached("SELECT key, name FROM channels ORDER BY number")?;
    let created = statement.query_map([], |row| {
        Ok(Channel {
            key: row.get(0)?,
            name: row.get(1)?,
        })
    })?;
    BUILT_IN_CHANNELS
        .iter()
        .map(|&(key, name)| {
            Ok(Channel {
                key: key.to_owned(),
                name: name.to_owned(),
            })
        })
        .chain(created)
        .collect()
}

/// A channel's number in the database and the last id it has given out, if it has any messages.
fn counter(tx: &Transaction<'_>, channel: &str) -> rusqlite::Result<Option<(i64, u64)>> {
    tx.prepare_cached("SELECT number, last FROM counters WHERE channel = ?1")?
        .query_row([channel], |row| Ok((row.get(0)?, from_sql(row.get(1)?))))
        .optional()
}

fn page(tx: &Transaction<'_>, channel: &str, range: Range) -> rusqlite::Result<Page> {
    let Some((number, last)) = counter(tx, channel)? else {
        return Ok(Page {
            messages: Vec::new(),
            last: 0,
        });
    };
    // Exclusive and inclusive bounds of the ids, how many of them at most, and from which end.
    let (above, up_to, limit, newest_first) = match range {
        Range::Latest { start, end } => {
            // Ids are dense, so positions translate by arithmetic.
            let up_to = last.saturating_sub(start);
            let above = last
                .saturating_sub(end)
                .max(up_to.saturating_sub(PAGE_LIMIT.into()));
            (above, up_to, PAGE_LIMIT, false)
        }
        Range::Before { id, limit } => (0, id.saturating_sub(1), limit, true),
        Range::After { id, limit } => (id, u64::MAX, limit, false),
    };
    let mut statement = tx.prepare_cached(if newest_first {
        "SELECT id, user, sender, event FROM messages
         WHERE channel = ?1 AND id > ?2 AND id <= ?3 ORDER BY id DESC LIMIT ?4"
    } else {
        "SELECT id, user, sender, event FROM messages
         WHERE channel = ?1 AND id > ?2 AND id <= ?3 ORDER BY id LIMIT ?4"
    })?;
    let limit = limit.min(PAGE_LIMIT);
    let mut messages = statement
        .query_map(
            params![number, to_sql(above), to_sql(up_to), limit],
            message,
        )?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    if newest_first {
        messages.reverse();
    }
    Ok(Page { messages, last })
}

fn message(row: &Row<'_>) -> rusqlite::Result<Message> {
    let event = RawValue::from_string(row.get(3)?)
        .map_err(|error| rusqlite::Error::FromSqlConversionFailure(3, Type::Text, error.into()))?;
    Ok(Message {
        id: from_sql(row.get(0)?),
        user: row.get(1)?,
        sender: row.get(2)?,
        event,
    })
}

fn last_before(tx: &Transaction<'_>, channel: &str, millis: i64) -> rusqlite::Result<u64> {
    let Some((number, last)) = counter(tx, channel)? else {
        return Ok(0);
    };
    let mut probe = tx.prepare_cached(
        "SELECT id, date FROM messages
         WHERE channel = ?1 AND id >= ?2 AND id < ?3 ORDER BY id LIMIT 1",
    )?;
    // `before` is a message before `millis` (or 0), nothing from `not_before` on is.
    let (mut before, mut not_before) = (0, last.saturating_add(1));
    while not_before - before > 1 {
        let middle = before + (not_before - before) / 2;
        // The first message from the middle on stands for a gap that may be there.
        let found: Option<(i64, i64)> = probe
            .query_row(params![number, to_sql(middle), to_sql(not_before)], |row| {
                Ok((row.get(0)?, row.get(1)?))
            })
            .optional()?;
        match found {
            Some((id, date)) if date < millis => before = from_sql(id),
            _ => not_before = middle,
        }
    }
    Ok(before)
}
