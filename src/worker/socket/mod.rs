//! The Socket.IO side of a worker.

pub mod eio3;
