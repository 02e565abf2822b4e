//! What the master answers by itself, in place of a worker.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Semaphore;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// Refusals being written at once; more are closed without an answer.
const AT_ONCE: usize = 64;

/// How long a client may take to read one.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why a connection is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Every worker is full.
    Full,
    /// The head of a proxy's request is longer than the master looks at.
    LongHead,
}

/// Writes refusals, a bounded number at a time.
#[derive(Debug, Clone)]
pub struct Refusals(Arc<Semaphore>);

impl Default for Refusals {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(AT_ONCE)))
    }
}

impl Refusals {
    /// Answers and closes a connection, in a task of its own. It is `under_way` until then.
    pub fn refuse(
        &self,
        stream: OwnedFd,
        client: IpAddr,
        under_way: TaskTrackerToken,
        why: Refusal,
    ) {
        let Ok(permit) = self.0.clone().try_acquire_owned() else {
            return;
        };
        tokio::spawn(async move {
            let _held = (permit, under_way);
            if let Err(error) = answer(stream, why).await {
                tracing::debug!(%client, ?why, %error, "a refused client did not wait for the answer");
            }
        });
    }
}

async fn answer(stream: OwnedFd, why: Refusal) -> io::Result<()> {
    let (status, retry, body) = match why {
        Refusal::Full => (
            "503 Service Unavailable",
            "Retry-After: 5\r\n",
            r#"{"error":"The server is full, try again in a few seconds"}"#,
        ),
        Refusal::LongHead => (
            "431 Request Header Fields Too Large",
            "",
            r#"{"error":"The headers of the request are too long"}"#,
        ),
    };
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Access-Control-Allow-Origin: *\r\n{retry}Connection: close\r\n\r\n{body}",
        body.len()
    );
    let mut stream = tokio::net::TcpStream::from_std(stream.into())?;
    let talk = async {
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await?;
        // What the client has sent must be read, or closing resets the connection under the
        // answer.
        let mut rest = [0; 4096];
        while stream.read(&mut rest).await? > 0 {}
        Ok(())
    };
    tokio::time::timeout(PATIENCE, talk)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
