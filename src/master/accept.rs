//! Takes connections from a listening socket, only while some worker can serve them: what is
//! not accepted waits in the kernel's backlog, which a dying master does not take along.

use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::router::{Accepted, RouterHandle};
use crate::routing::{self, RoutingKey};

/// Accepts until stopped.
pub async fn run(
    listener: TcpListener,
    router: RouterHandle,
    mut gate: watch::Receiver<bool>,
    stop: CancellationToken,
) {
    let accepting = async {
        loop {
            if gate.wait_for(|open| *open).await.is_err() {
                return;
            }
            let accepted = tokio::select! {
                biased;
                closed = gate.wait_for(|open| !*open) => match closed {
                    Ok(_) => continue,
                    Err(_) => return,
                },
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => match stream.into_std() {
                    Ok(stream) => {
                        let client = routing::canonical(peer.ip());
                        let key = RoutingKey::of(client);
                        let stream = stream.into();
                        let since = Instant::now();
                        let accepted = Accepted {
                            stream,
                            peer,
                            client,
                            key,
                            since,
                        };
                        if router.route(accepted).await.is_none() {
                            return;
                        }
                    }
                    Err(error) => tracing::warn!(%error, "an accepted connection was lost"),
                },
                Err(error) => {
                    // Out of descriptors, or the peer was gone already. The former lasts.
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    };
    let _ = stop.run_until_cancelled(accepting).await;
}
