//! Takes connections from a listening socket, only while some worker can serve them: what is
//! not accepted waits in the kernel's backlog, which a dying master does not take along.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::peek::Lookout;

/// Accepts until stopped.
pub async fn run(
    listener: TcpListener,
    lookout: Arc<Lookout>,
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
                Ok((stream, peer)) => {
                    if lookout.admit(stream, peer).await.is_none() {
                        return;
                    }
                }
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
