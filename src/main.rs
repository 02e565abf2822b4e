//! The command line of Banter; everything else is in the library.

use std::future::Future;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;

use banter::ConfigError;
use banter::cli::{Cli, Command};
use banter::settings::{LoadError, Settings};
use banter::store::migrate;
use banter::{health, master, serve, systemd, telemetry, worker};

/// How long work on blocking threads (the store, password hashes) may delay the end of a process.
const BLOCKING_GRACE: Duration = Duration::from_secs(5);

/// How long a unit stays before it ends with something to mend, and says so in its status. It is
/// started again as soon as it ends, by `Restart=` or by a connection that waits in its socket, so
/// that it serves once that is mended; the pause keeps it from doing so ten times a second.
const CONFIG_PAUSE: Duration = Duration::from_secs(3);

/// Exits with 0, or 1 for failures and for a server that is not healthy, 2 for a wrong command line
/// (clap's), 78 for what the operator has to mend ([`ConfigError`]).
fn main() -> ExitCode {
    let result = match Settings::load(std::env::args_os().collect()) {
        Ok((cli, settings)) => run(cli, settings),
        Err(LoadError::Usage(error)) => error.exit(),
        Err(LoadError::File(error)) => Err(error.into()),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            let text = format!("{error:#}");
            let line = text.lines().map(str::trim).collect::<Vec<_>>().join(" ");
            // Nobody may be there to read it.
            let _ = writeln!(std::io::stderr(), "banter: {line}");
            if !error.chain().any(|cause| cause.is::<ConfigError>()) {
                return ExitCode::FAILURE;
            }
            if systemd::is_main_process() {
                systemd::status(&line);
                std::thread::sleep(CONFIG_PAUSE);
            }
            ExitCode::from(serve::EXIT_CONFIG)
        }
    }
}

fn run(cli: Cli, settings: Settings) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Serve(args) => {
            telemetry::init(&cli.log, "supervisor", None)?;
            serve::run(args, settings)?;
        }
        Command::Master(args) => {
            serve::die_with_parent()?;
            telemetry::init(&cli.log, "master", None)?;
            block_on(master::run(args, settings))?;
        }
        Command::Worker(args) => {
            serve::die_with_parent()?;
            telemetry::init(
                &cli.log,
                &format!("worker {}", args.number),
                Some(args.number),
            )?;
            block_on(worker::run(args, settings))?;
        }
        Command::Health(args) => {
            if !health::run(&args)? {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Migrate(args) => {
            telemetry::init(&cli.log, "migrate", None)?;
            block_on(migrate::run(args))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn block_on(role: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let result = runtime.block_on(role);
    runtime.shutdown_timeout(BLOCKING_GRACE);
    result
}
