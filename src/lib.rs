//! Banter, a self-hosted chat server.
//!
//! The library does everything; `main.rs` only parses the command line. See ARCHITECTURE.md for
//! the whole picture.

pub mod cli;
pub mod config;
pub mod control;
pub mod handoff;
pub mod limits;
pub mod master;
pub mod presence;
pub mod routing;
pub mod store;
pub mod systemd;
pub mod worker;
