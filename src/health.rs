//! `banter health`: asks the server on this host whether it can serve.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::cli::HealthArgs;

/// The most bytes of an answer that are read.
const MAX_BODY: usize = 64 * 1024;

/// What `/health` answers, as far as it matters here.
#[derive(Debug, Default, Deserialize)]
struct Answer {
    worker: Option<u64>,
    version: Option<String>,
    /// Why it cannot serve.
    error: Option<String>,
}

/// Asks, and tells the answer: whether the server can serve, and a line for people, such as `ok:
/// worker 1, version 0.1.0` or the reason why not.
///
/// No answer within `args.timeout` seconds is "no", as is anything but HTTP 200.
pub async fn check(args: &HealthArgs) -> (bool, String) {
    let limit = Duration::from_secs(args.timeout.into());
    let asked = match timeout(limit, ask(args.port)).await {
        Ok(asked) => asked,
        Err(_) => Err(anyhow!(
            "port {}: no answer within {} s",
            args.port,
            args.timeout
        )),
    };
    match asked {
        Ok(line) => (true, line),
        Err(error) => (false, format!("{error:#}")),
    }
}

/// Runs `banter health`: prints the line, and returns whether the server can serve.
///
/// # Errors
///
/// If the tokio runtime cannot be started.
pub fn run(args: &HealthArgs) -> anyhow::Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let (healthy, line) = runtime.block_on(check(args));
    crate::print_line(&line);
    Ok(healthy)
}

/// The line for a server that can serve; an error with the reason for one that cannot.
async fn ask(port: u16) -> anyhow::Result<String> {
    let stream = connect(port)
        .await
        .with_context(|| format!("port {port}"))?;
    let (status, body) = get(stream)
        .await
        .with_context(|| format!("port {port}: no answer"))?;
    let answer: Option<Answer> = serde_json::from_slice(&body).ok();
    if status != StatusCode::OK {
        let reason = answer.and_then(|answer| answer.error);
        bail!(
            "{}: {}",
            status.as_u16(),
            reason.as_deref().unwrap_or("no reason given")
        );
    }
    let answer = answer.unwrap_or_default();
    let worker = answer
        .worker
        .map_or_else(|| "?".to_owned(), |worker| worker.to_string());
    Ok(format!(
        "ok: worker {worker}, version {}",
        answer.version.as_deref().unwrap_or("?")
    ))
}

/// By IPv4, and by IPv6 for a server that listens there only. The error is the first one's.
async fn connect(port: u16) -> io::Result<TcpStream> {
    match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Ok(stream) => Ok(stream),
        Err(error) => TcpStream::connect((Ipv6Addr::LOCALHOST, port))
            .await
            .map_err(|_| error),
    }
}

async fn get(stream: TcpStream) -> anyhow::Result<(StatusCode, Bytes)> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get("/health")
        .header(header::HOST, "localhost")
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())?;
    let answer = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_BODY).collect().await;
        let body = body.map_err(|error| anyhow!("cannot read it: {error}"))?;
        anyhow::Ok((status, body.to_bytes()))
    };
    // The connection does the work, and must be driven until the answer is complete.
    tokio::pin!(answer);
    let connection = async { connection.await.map_err(anyhow::Error::from) };
    tokio::select! {
        biased;
        answer = &mut answer => answer,
        closed = connection => {
            closed?;
            answer.await
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// A server that answers one request with `answer`, then closes.
    async fn against(listener: TcpListener, answer: &'static str) -> (bool, String) {
        let port = listener.local_addr().unwrap().port();
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                assert_ne!(stream.read_buf(&mut request).await.unwrap(), 0);
            }
            assert!(request.starts_with(b"GET /health HTTP/1.1\r\n"));
            stream.write_all(answer.as_bytes()).await.unwrap();
        };
        let args = HealthArgs { port, timeout: 20 };
        let ((), result) = tokio::join!(server, check(&args));
        result
    }

    async fn v4() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").await.unwrap()
    }

    #[tokio::test]
    async fn a_server_that_can_serve_is_told_with_worker_and_version() {
        let answer = "HTTP/1.1 200 OK\r\ncontent-length: 46\r\n\r\n\
                      {\"status\":\"ok\",\"worker\":1,\"version\":\"0.1.0\"}  ";
        let (healthy, line) = against(v4().await, answer).await;
        assert_eq!(
            (healthy, line.as_str()),
            (true, "ok: worker 1, version 0.1.0")
        );
    }

    #[tokio::test]
    async fn a_server_that_cannot_serve_is_told_with_its_reason() {
        let answer = "HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\n\r\n\
                      {\"error\":\"the master is away\"}";
        let (healthy, line) = against(v4().await, answer).await;
        assert_eq!((healthy, line.as_str()), (false, "503: the master is away"));
    }

    #[tokio::test]
    async fn another_server_is_not_healthy() {
        let (healthy, line) = against(v4().await, "SSH-2.0-OpenSSH_9.6\r\n").await;
        assert!(!healthy && line.contains("no answer"), "{line}");
        let (healthy, line) = against(v4().await, "").await;
        assert!(!healthy && line.contains("no answer"), "{line}");
        let (healthy, line) = against(
            v4().await,
            "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",
        )
        .await;
        assert_eq!((healthy, line.as_str()), (false, "404: no reason given"));
    }

    #[tokio::test]
    async fn a_server_on_ipv6_only_is_reached() {
        let Ok(listener) = TcpListener::bind("[::1]:0").await else {
            eprintln!("skipped: this host has no IPv6");
            return;
        };
        let answer = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
        let (healthy, line) = against(listener, answer).await;
        assert_eq!((healthy, line.as_str()), (true, "ok: worker ?, version ?"));
    }

    #[tokio::test]
    async fn nobody_there_is_told_with_the_port() {
        // Bound but not listening: nobody else can take the port meanwhile.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = socket.local_addr().unwrap().port();
        let (healthy, line) = check(&HealthArgs { port, timeout: 20 }).await;
        assert!(!healthy && line.contains(&format!("port {port}")), "{line}");
        assert!(line.contains("refused"), "{line}");
    }

    #[tokio::test]
    async fn a_server_that_does_not_answer_in_time_is_not_healthy() {
        let listener = v4().await;
        let port = listener.local_addr().unwrap().port();
        let (healthy, line) = check(&HealthArgs { port, timeout: 0 }).await;
        assert!(!healthy && line.contains("within 0 s"), "{line}");
    }
}
