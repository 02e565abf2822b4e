//! Takes connections from a listening socket, only while some worker can serve them: what is
//! not accepted waits in the kernel's backlog, which a dying master does not take along.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::peek::Lookout;
use crate::pulse::{self, Pulse};

/// Accepts until stopped, or until the router has. What is accepted by then goes on its way all the
/// same. `pulse` beats meanwhile.
pub async fn run(
    listener: TcpListener,
    lookout: Arc<Lookout>,
    mut gate: watch::Receiver<bool>,
    pulse: Pulse,
    stop: CancellationToken,
) {
    let mut beat = tokio::time::interval(pulse::BEAT);
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            _ = beat.tick() => {
                pulse.beat();
                continue;
            }
            accepted = accept(&listener, &mut gate) => accepted,
        };
        let Some((stream, peer)) = accepted else {
            break;
        };
        if lookout.admit(stream, peer).await.is_none() {
            break;
        }
    }
    pulse.rest();
}

/// The next connection, once there may be one; `None` if there will be none any more. Cancel safe.
async fn accept(
    listener: &TcpListener,
    gate: &mut watch::Receiver<bool>,
) -> Option<(TcpStream, SocketAddr)> {
    loop {
        gate.wait_for(|open| *open).await.ok()?;
        let accepted = tokio::select! {
            biased;
            closed = gate.wait_for(|open| !*open) => {
                closed.ok()?;
                continue;
            }
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok(accepted) => return Some(accepted),
            Err(error) => {
                // Out of descriptors, or the peer was gone already. The former lasts.
                tracing::warn!("accept failed: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}
