//! A worker: serves REST and Socket.IO on the connections that the master hands to it.

pub mod socket;
pub mod transport;
pub mod ws_frames;
