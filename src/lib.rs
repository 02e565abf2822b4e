//! Banter, a self-hosted chat server.
//!
//! The library does everything; `main.rs` only parses the command line. See ARCHITECTURE.md for
//! the whole picture.

pub mod cli;
pub mod control;
pub mod handoff;
pub mod presence;
pub mod store;
