//! Banter, a self-hosted chat server.
//!
//! The library does everything; `main.rs` only parses the command line. See ARCHITECTURE.md for
//! the whole picture.

pub mod cli;
pub mod handoff;
pub mod limits;
pub mod routing;
pub mod store;
pub mod worker;
