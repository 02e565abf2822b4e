//! Where settings come from: the command line, else the environment, else a file, else their defaults.
//!
//! The file (`--config`) has lines `NAME=value`, with the names of the environment variables, as
//! systemd's `EnvironmentFile=` has them. Its values become the defaults of clap's arguments, so that
//! they are parsed, checked and outranked like any other.
//!
//! [`Settings::reload`] reads everything again. What can change while a process runs is in
//! [`RELOADABLE`]; for the rest the log says that a restart is needed.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{ArgMatches, Command, CommandFactory as _, FromArgMatches as _};

use crate::cli::Cli;
use crate::{ConfigError, systemd, telemetry};

/// The most bytes of a file.
const MAX_FILE: usize = 1024 * 1024;

/// The variable of the log filter, whose syntax clap does not know.
const LOG: &str = "RUST_LOG";

/// Settings that count as soon as they are reloaded, by their variables.
pub const RELOADABLE: [&str; 9] = [
    LOG,
    "BANTER_AUTH_RATE",
    "BANTER_POST_RATE",
    "BANTER_MAX_CONNECTIONS",
    "BANTER_MAX_PER_ADDRESS",
    "BANTER_MAX_MESSAGE",
    "BANTER_GRACE",
    "BANTER_DRAIN",
    "BANTER_TRUST_PROXY",
];

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The command line is wrong, or asks for help: clap says the rest.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    /// The file is wrong.
    #[error(transparent)]
    File(#[from] ConfigError),
}

/// The settings of this process, to be read again.
#[derive(Debug)]
pub struct Settings {
    argv: Vec<OsString>,
    /// What counts, by variable; of a list each value.
    values: BTreeMap<String, Vec<OsString>>,
    given: Vec<(String, OsString)>,
    file: Option<File>,
}

impl Settings {
    /// Reads the command line `argv`, the environment, and the file that one of the two names.
    ///
    /// # Errors
    /// [`LoadError`], with a text for the operator.
    pub fn load(argv: Vec<OsString>) -> Result<(Cli, Self), LoadError> {
        let mut command = Cli::command();
        let file = config_file(command.clone(), &argv);
        if let Some(file) = &file {
            command = with_file(command, file)?;
        }
        let matches = command.clone().try_get_matches_from(&argv)?;
        let cli = Cli::from_arg_matches(&matches)?;
        let mut settings = Self {
            argv,
            values: BTreeMap::new(),
            given: Vec::new(),
            file,
        };
        if let Some((name, matches)) = matches.subcommand()
            && let Some(role) = command.find_subcommand(name)
        {
            // Global ones are not among a subcommand's arguments, but among its matches.
            settings.note(role, matches);
            settings.note(&command, matches);
        }
        Ok((cli, settings))
    }

    fn note(&mut self, command: &Command, matches: &ArgMatches) {
        for (variable, id) in variables(command) {
            let Ok(Some(raw)) = matches.try_get_raw(&id) else {
                continue;
            };
            // An empty one is as good as unset, wherever that makes a difference.
            let raw: Vec<OsString> = raw
                .map(OsStr::to_owned)
                .filter(|one| !one.is_empty())
                .collect();
            if matches.value_source(&id) == Some(ValueSource::CommandLine) {
                let value = raw.join(OsStr::new(","));
                self.given.push((variable.clone(), value));
            }
            if !raw.is_empty() {
                self.values.insert(variable, raw);
            }
        }
    }

    /// The settings that the command line gives, as variables for a process to which it is not given.
    pub fn given(&self) -> &[(String, OsString)] {
        &self.given
    }

    /// The file that they are read from, if there is one.
    pub fn file(&self) -> Option<&File> {
        self.file.as_ref()
    }

    /// Reads everything again and has `apply` take over what is [`RELOADABLE`]; a file that is wrong
    /// changes nothing. Tells log and service manager.
    pub fn reload(&mut self, apply: impl FnOnce(&Cli)) {
        systemd::reloading();
        match self.read_again() {
            Ok((cli, changed)) => {
                // It has been parsed before.
                if let Err(error) = telemetry::set_filter(&cli.log) {
                    tracing::error!("the log filter stays as it is: {error}");
                }
                apply(&cli);
                let (live, fixed): (Vec<&str>, Vec<&str>) = changed
                    .iter()
                    .map(String::as_str)
                    .partition(|name| RELOADABLE.contains(name));
                tracing::info!(
                    event = "reloaded",
                    changed = live.join(", "),
                    "the settings were read again"
                );
                if !fixed.is_empty() {
                    tracing::warn!(
                        event = "restart_needed",
                        settings = fixed.join(", "),
                        "some settings changed that count only after a restart"
                    );
                }
                systemd::complain(None);
            }
            Err(error) => {
                tracing::error!(
                    event = "reload_failed",
                    "the settings stay as they are: {error}"
                );
                systemd::complain(Some(&format!("settings not reloaded: {error}")));
            }
        }
        systemd::reloaded();
    }

    /// The settings as they are now, and which of them changed; keeps them, but for those that a
    /// restart is needed for: these are told again until there is one.
    fn read_again(&mut self) -> Result<(Cli, Vec<String>), ConfigError> {
        let (cli, new) = Self::load(self.argv.clone()).map_err(|error| match error {
            LoadError::File(error) => error,
            LoadError::Usage(error) => ConfigError::new(first_line(&error)),
        })?;
        telemetry::check_filter(&cli.log)?;
        let mut changed = Vec::new();
        for name in self.values.keys().chain(new.values.keys()) {
            if self.values.get(name) != new.values.get(name) && !changed.contains(name) {
                changed.push(name.clone());
            }
        }
        for name in RELOADABLE {
            match new.values.get(name) {
                Some(value) => self.values.insert(name.to_owned(), value.clone()),
                None => self.values.remove(name),
            };
        }
        Ok((cli, changed))
    }
}

/// A file of settings, as `--config` names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    path: PathBuf,
    /// Whether it may be missing.
    optional: bool,
}

impl File {
    /// None of an empty name.
    fn named(name: &OsStr) -> Option<Self> {
        let name = name.as_bytes();
        let (path, optional) = match name.strip_prefix(b"-") {
            Some(path) => (path, true),
            None => (name, false),
        };
        let path = PathBuf::from(OsStr::from_bytes(path));
        (path != Path::new("")).then_some(Self { path, optional })
    }

    /// Its name for a process in whatever directory.
    ///
    /// # Errors
    /// If the working directory is gone.
    pub fn absolute_name(&self) -> io::Result<OsString> {
        let mut name = OsString::from(if self.optional { "-" } else { "" });
        name.push(std::path::absolute(&self.path)?);
        Ok(name)
    }

    /// What it says; `None` if it is missing and may be.
    fn read(&self) -> Result<Option<String>, ConfigError> {
        let path = self.path.display();
        match std::fs::read(&self.path) {
            Ok(bytes) if bytes.len() > MAX_FILE => Err(ConfigError::new(format_args!(
                "{path}: larger than {MAX_FILE} bytes"
            ))),
            Ok(bytes) => String::from_utf8(bytes)
                .map(Some)
                .map_err(|_| ConfigError::new(format_args!("{path}: is not UTF-8"))),
            Err(error) if self.optional && error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ConfigError::new(format_args!(
                "{path}: cannot read: {error}"
            ))),
        }
    }
}

/// The variables of a command's own arguments, with the arguments' ids.
fn variables(command: &Command) -> Vec<(String, String)> {
    let arguments = command.get_arguments();
    arguments
        .filter_map(|argument| {
            let variable = argument.get_env()?.to_str()?;
            Some((variable.to_owned(), argument.get_id().to_string()))
        })
        .collect()
}

/// The file that the command line or the environment names; none where the former makes no sense.
fn config_file(command: Command, argv: &[OsString]) -> Option<File> {
    let matches = command
        .ignore_errors(true)
        .try_get_matches_from(argv)
        .ok()?;
    let own = matches.subcommand().map_or(&matches, |(_, own)| own);
    File::named(own.try_get_one::<OsString>("config").ok()??)
}

/// The command with what a file says as its arguments' defaults.
fn with_file(mut command: Command, file: &File) -> Result<Command, ConfigError> {
    let text = file.read()?.unwrap_or_default();
    for (number, line) in (1..).zip(text.lines()) {
        let path = file.path.display();
        let fail = |what: String| ConfigError::new(format!("{path}, line {number}: {what}"));
        let Some((name, value)) = parse_line(line).map_err(fail)? else {
            continue;
        };
        let found = set_default(&mut command, name, &value).map_err(fail)?;
        if !found {
            return Err(fail(format!(
                "{name} is no setting; see README.md for their names"
            )));
        }
    }
    Ok(command)
}

/// Makes a value the default of the arguments that have this variable; `false` if there are none.
fn set_default(command: &mut Command, name: &str, value: &str) -> Result<bool, String> {
    if name == "BANTER_CONFIG" {
        return Err("BANTER_CONFIG names this file, and cannot be in it".to_owned());
    }
    if name == LOG {
        telemetry::check_filter(value).map_err(|error| error.to_string())?;
    }
    let id = variables(command)
        .into_iter()
        .find(|(variable, _)| variable == name);
    let mut found = id.is_some();
    if let Some((_, id)) = id {
        if let Some(argument) = command.get_arguments().find(|one| *one.get_id() == *id) {
            check(argument, name, value)?;
        }
        let changed = std::mem::take(command).mut_arg(id, |argument| {
            // Help must not show a secret.
            let secret = argument.is_hide_env_values_set();
            argument
                .required(false)
                .default_value(value.to_owned())
                .hide_default_value(secret)
        });
        *command = changed;
    }
    for subcommand in command.get_subcommands_mut() {
        found |= set_default(subcommand, name, value)?;
    }
    Ok(found)
}

/// Whether an argument takes a value.
fn check(argument: &clap::Arg, name: &str, value: &str) -> Result<(), String> {
    let Some(flag) = argument.get_long() else {
        return Ok(());
    };
    Command::new("check")
        .no_binary_name(true)
        .arg(argument.clone().required(false))
        .try_get_matches_from([format!("--{flag}={value}")])
        .map(drop)
        .map_err(|error| format!("{name}: {}", first_line(&error)))
}

/// What clap has to say, without its advice.
fn first_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    line.trim_start_matches("error: ").to_owned()
}

/// The name and value on a line, if there are any.
fn parse_line(line: &str) -> Result<Option<(&str, String)>, String> {
    let line = line.trim();
    if line.is_empty() || line.starts_with(['#', ';']) {
        return Ok(None);
    }
    // Not the line itself in the message: it may hold a secret.
    let Some((name, value)) = line.split_once('=') else {
        return Err("expected NAME=value".to_owned());
    };
    let name = name.trim_end();
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if name.is_empty() || !name.chars().all(is_name) {
        return Err("expected NAME=value, and a name of letters, digits and _".to_owned());
    }
    let value = unquote(value.trim_start()).map_err(|error| format!("{name}: {error}"))?;
    Ok(Some((name, value)))
}

/// A value without its quotes, as systemd reads it: between single quotes everything is itself,
/// elsewhere a backslash takes the meaning from the character after it.
fn unquote(value: &str) -> Result<String, &'static str> {
    if let Some(quoted) = value.strip_prefix('\'') {
        return match quoted.split_once('\'') {
            Some((inside, "")) => Ok(inside.to_owned()),
            Some(_) => Err("something follows the closing quote"),
            None => Err("the closing quote is missing"),
        };
    }
    let (text, mut open) = match value.strip_prefix('"') {
        Some(quoted) => (quoted, true),
        None => (value, false),
    };
    let is_quoted = open;
    let mut result = String::new();
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => match characters.next() {
                Some(escaped) => result.push(escaped),
                None => return Err("a line cannot be continued on the next one"),
            },
            '"' if open => {
                open = false;
                if characters.next().is_some() {
                    return Err("something follows the closing quote");
                }
            }
            '"' | '\'' if !is_quoted => {
                return Err("a quote in the middle: put all of it in quotes");
            }
            _ => result.push(character),
        }
    }
    match open {
        true => Err("the closing quote is missing"),
        false => Ok(result),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_are_read_as_systemd_reads_them() {
        let read = |line: &str| parse_line(line).map(|found| found.map(|(_, value)| value));
        for (line, value) in [
            ("A=1", "1"),
            ("  A = 1  ", "1"),
            ("A=", ""),
            ("A=two words", "two words"),
            ("A=x # y", "x # y"),
            ("A=\"two words \"", "two words "),
            ("A='it is \\ \"so\"'", "it is \\ \"so\""),
            ("A=\"it's \\\"so\\\"\"", "it's \"so\""),
            ("A=C:\\\\x", "C:\\x"),
            ("A=a=b", "a=b"),
        ] {
            assert_eq!(read(line), Ok(Some(value.to_owned())), "{line}");
        }
        for line in ["", "   ", "# A=1", " ; A=1"] {
            assert_eq!(read(line), Ok(None), "{line}");
        }
        for (line, told) in [
            ("A", "expected NAME=value"),
            ("=1", "expected NAME=value"),
            ("A B=1", "expected NAME=value"),
            ("export A=1", "expected NAME=value"),
            ("A=\"x", "A: the closing quote is missing"),
            ("A='x", "A: the closing quote is missing"),
            ("A='x' y", "A: something follows"),
            ("A=\"x\"y", "A: something follows"),
            ("A=x\"y", "A: a quote in the middle"),
            ("A=x\\", "A: a line cannot be continued"),
        ] {
            let error = read(line).unwrap_err();
            assert!(error.starts_with(told), "{line}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_value_can_be_written_in_double_quotes(value in "\\PC*") {
            let quoted = value.replace('\\', "\\\\").replace('"', "\\\"");
            let line = format!("NAME=\"{quoted}\"");
            prop_assert_eq!(parse_line(&line), Ok(Some(("NAME", value))));
        }
    }

    #[test]
    fn what_can_be_reloaded_are_settings() {
        let mut command = Cli::command();
        for name in RELOADABLE {
            let value = match name {
                LOG => "info",
                "BANTER_TRUST_PROXY" => "10.0.0.0/8,192.0.2.1",
                _ => "1",
            };
            assert_eq!(set_default(&mut command, name, value), Ok(true), "{name}");
        }
        command.debug_assert();
    }
}
