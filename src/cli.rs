//! The command line: subcommands, flags, and the environment variable of each flag.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::proxy::Trusted;

/// A self-hosted chat server.
#[derive(Debug, Parser)]
#[command(name = "banter", version, about, disable_help_subcommand = true)]
pub struct Cli {
    /// What to run.
    #[command(subcommand)]
    pub command: Command,
    /// Log filter: a level (error, warn, info, debug, trace) or RUST_LOG directives.
    #[arg(
        long,
        global = true,
        env = "RUST_LOG",
        default_value = "info",
        value_name = "FILTER"
    )]
    pub log: String,
    /// A file of settings, NAME=value a line, with the names of the environment variables, which
    /// outrank it. Read again after SIGHUP. With - before its name it may be missing.
    #[arg(long, global = true, env = "BANTER_CONFIG", value_name = "FILE")]
    pub config: Option<OsString>,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run everything: a master and its workers, for development and containers.
    Serve(ServeArgs),
    /// Accept connections, hand them to workers, and keep the registry of who is online.
    Master(MasterArgs),
    /// Serve REST and Socket.IO on connections that a master hands over.
    Worker(WorkerArgs),
    /// Ask a running server whether it can serve; exits with 0 if so, else with 1.
    Health(HealthArgs),
    /// Bring over the users, channels and messages of the Node.js chat server that came before.
    Migrate(MigrateArgs),
}

/// Where state is kept.
#[derive(Debug, Clone, Args)]
pub struct StateArgs {
    /// Directory of the embedded store and of a generated JWT secret. Default: $STATE_DIRECTORY,
    /// else the XDG data directory.
    #[arg(long, env = "BANTER_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// A Redis that keeps users, channels and messages, in place of the embedded store.
#[derive(Debug, Clone, Args)]
pub struct RedisArgs {
    /// The Redis to keep everything in: redis://HOST:PORT, rediss://HOST:PORT (TLS) or unix:PATH,
    /// with USER:PASSWORD@ before the host. Default: none, the embedded store.
    #[arg(
        long,
        env = "REDIS_URL",
        hide_env_values = true,
        value_name = "URL",
        hide_default_value = true
    )]
    pub redis_url: Option<String>,
    /// Host of the Redis, where there is no REDIS_URL.
    #[arg(long, env = "REDIS_HOST", value_name = "HOST")]
    pub redis_host: Option<String>,
    /// Port of the Redis at REDIS_HOST (default 6379), or tcp://HOST:PORT as container platforms
    /// set it.
    #[arg(long, env = "REDIS_PORT", value_name = "PORT")]
    pub redis_port: Option<String>,
    /// What all names in Redis begin with: deployments with different ones can share a Redis.
    #[arg(long, env = "BANTER_REDIS_PREFIX", default_value = crate::store::redis::DEFAULT_PREFIX, value_name = "PREFIX")]
    pub redis_prefix: String,
    /// Messages that each channel keeps in Redis. 0: all.
    #[arg(
        long,
        env = "BANTER_RETENTION_COUNT",
        default_value_t = 0,
        value_name = "N"
    )]
    pub retention_count: u32,
    /// Days that messages are kept in Redis. 0: for ever.
    #[arg(
        long,
        env = "BANTER_RETENTION_DAYS",
        default_value_t = 0,
        value_name = "DAYS"
    )]
    pub retention_days: u32,
}

/// Where the sockets between master and workers are.
#[derive(Debug, Clone, Args)]
pub struct RuntimeArgs {
    /// Directory of the sockets between master and workers. Default: $RUNTIME_DIRECTORY, else
    /// `banter` in $XDG_RUNTIME_DIR.
    #[arg(long, env = "BANTER_RUNTIME_DIR", value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,
}

/// How tokens are signed.
#[derive(Debug, Clone, Args)]
pub struct SecretArgs {
    /// The secret that signs tokens, at least 32 bytes. Better kept in a file.
    #[arg(
        long,
        env = "JWT_SECRET",
        hide_env_values = true,
        value_name = "SECRET"
    )]
    pub jwt_secret: Option<String>,
    /// A file that holds the secret.
    #[arg(long, env = "BANTER_JWT_SECRET_FILE", value_name = "FILE")]
    pub jwt_secret_file: Option<PathBuf>,
}

/// Proxies in front.
#[derive(Debug, Clone, Args)]
pub struct ProxyArgs {
    /// Networks whose PROXY headers and X-Forwarded-For are believed, with commas between them;
    /// may be given several times. Default: none.
    #[arg(long, env = "BANTER_TRUST_PROXY", value_name = "CIDR")]
    pub trust_proxy: Vec<Trusted>,
}

impl ProxyArgs {
    /// All of them.
    pub fn trusted(&self) -> Trusted {
        self.trust_proxy.iter().cloned().collect()
    }
}

/// Limits; 0 switches one off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Args)]
pub struct LimitArgs {
    /// Registrations and failed logins per minute and address. 0: no limit.
    #[arg(long, env = "BANTER_AUTH_RATE", default_value_t = 30, value_name = "N")]
    pub auth_rate: u32,
    /// Posts per second and session, with a burst of three times as many; a user may create a
    /// twentieth as many channels. 0: no limit.
    #[arg(long, env = "BANTER_POST_RATE", default_value_t = 20, value_name = "N")]
    pub post_rate: u32,
    /// Connections per worker. 0: what the limit on open files allows.
    #[arg(
        long,
        env = "BANTER_MAX_CONNECTIONS",
        default_value_t = 0,
        value_name = "N"
    )]
    pub max_connections: u32,
    /// Connections per client address. 0: no limit.
    #[arg(
        long,
        env = "BANTER_MAX_PER_ADDRESS",
        default_value_t = 0,
        value_name = "N"
    )]
    pub max_per_address: u32,
    /// Bytes of UTF-8 in a message. 0: no limit but the transport's (1 MB).
    #[arg(
        long,
        env = "BANTER_MAX_MESSAGE",
        default_value_t = 16_384,
        value_name = "BYTES"
    )]
    pub max_message: u32,
    /// Seconds that a lost session keeps its name and channels. 0: it ends at once.
    #[arg(
        long,
        env = "BANTER_GRACE",
        default_value_t = 10,
        value_name = "SECONDS"
    )]
    pub grace: u32,
    /// Seconds between heartbeats.
    #[arg(long, env = "BANTER_PING_INTERVAL", default_value_t = 15, value_name = "SECONDS",
          value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub ping_interval: u32,
    /// Seconds that a heartbeat may stay unanswered.
    #[arg(long, env = "BANTER_PING_TIMEOUT", default_value_t = 10, value_name = "SECONDS",
          value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub ping_timeout: u32,
}

/// `banter serve`.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// TCP port to listen on, on every address, IPv6 and IPv4. 0: any free one.
    #[arg(long, short, env = "PORT", default_value_t = 8000)]
    pub port: u16,
    /// Number of worker processes. Default: processors minus one, at least one.
    #[arg(long, short, env = "WORKERS", value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub workers: Option<u32>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub state: StateArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub redis: RedisArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub secret: SecretArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub proxy: ProxyArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub limits: LimitArgs,
}

/// `banter master`.
#[derive(Debug, Clone, Args)]
pub struct MasterArgs {
    /// TCP port to listen on where no socket is passed in by LISTEN_FDS.
    #[arg(long, short, env = "PORT", default_value_t = 8000)]
    pub port: u16,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub state: StateArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub redis: RedisArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub runtime: RuntimeArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub proxy: ProxyArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub limits: LimitArgs,
}

/// `banter worker N`.
#[derive(Debug, Clone, Args)]
pub struct WorkerArgs {
    /// The worker's number, its identity in routing and logs.
    #[arg(value_name = "N")]
    pub number: u32,
    /// Seconds over which the clients' sockets are closed after SIGTERM, so that they do not come back
    /// all at once. 0: all together.
    #[arg(long, env = "BANTER_DRAIN", default_value_t = 3, value_name = "SECONDS",
          value_parser = clap::value_parser!(u32).range(0..=3600))]
    pub drain: u32,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub runtime: RuntimeArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub redis: RedisArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub secret: SecretArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub limits: LimitArgs,
}

/// `banter health`.
#[derive(Debug, Clone, Args)]
pub struct HealthArgs {
    /// Port of the server on this host.
    #[arg(long, short, env = "PORT", default_value_t = 8000)]
    pub port: u16,
    /// Seconds to wait for the answer.
    #[arg(long, default_value_t = 5, value_name = "SECONDS")]
    pub timeout: u32,
}

/// `banter migrate`.
#[derive(Debug, Clone, Args)]
pub struct MigrateArgs {
    /// The Redis to read: `redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE]`, `rediss://` for TLS, or
    /// `unix:PATH`. Nothing is written there.
    #[arg(
        long,
        env = "BANTER_MIGRATE_FROM",
        hide_env_values = true,
        value_name = "URL"
    )]
    pub from: String,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub state: StateArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub redis: RedisArgs,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }
}
