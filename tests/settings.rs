//! The table of settings in README.md is what the program says of itself, and the options of the NixOS
//! module (`nix/settings.nix`) are about settings that there are, with their defaults.
//!
//! To bring it up to date: `BANTER_UPDATE_README=1 cargo test --test settings`.

// The exemption of tests does not reach the helpers that they share.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

const COMMANDS: [&str; 5] = ["serve", "master", "worker", "health", "migrate"];
const BEGIN: &str = "<!-- settings: written by tests/settings.rs from the program's own help -->\n";
const END: &str = "<!-- end of settings -->\n";

/// Settings without an option of the NixOS module: units, systemd or other options take care of them.
const WITHOUT_OPTION: [&str; 7] = [
    "BANTER_CONFIG",
    "BANTER_MIGRATE_FROM",
    "BANTER_RUNTIME_DIR",
    "BANTER_STATE_DIR",
    "JWT_SECRET",
    "REDIS_HOST",
    "REDIS_PORT",
];

/// An option of the NixOS module, by `nix/settings.nix`.
#[derive(Debug, Default)]
struct NixOption {
    /// Below `services.banter`, such as `limits.grace`.
    name: String,
    default: Option<String>,
    /// Whether the module makes it of what is said there, and has no declaration of its own.
    is_plain: bool,
}

fn file(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// The options by the variable that they set.
fn options() -> BTreeMap<String, NixOption> {
    let mut options: BTreeMap<String, NixOption> = BTreeMap::new();
    let mut current = None;
    for line in file("nix/settings.nix").lines() {
        if let Some(name) = line.strip_prefix("  ").and_then(|l| l.strip_suffix(" = {")) {
            current = Some(name.to_owned());
            continue;
        }
        let Some(value) = line.strip_prefix("    ").and_then(|l| l.strip_suffix(';')) else {
            continue;
        };
        let (Some(variable), Some((key, value))) = (&current, value.split_once(" = ")) else {
            continue;
        };
        let option = options.entry(variable.clone()).or_default();
        let value = value.trim_matches('"').to_owned();
        match key {
            "option" => option.name = value,
            "default" => option.default = Some(value).filter(|value| value != "[ ]"),
            "type" => option.is_plain = true,
            _ => {}
        }
    }
    assert!(!options.is_empty());
    options
}

/// A flag, as `--help` tells it.
#[derive(Debug, PartialEq, Eq)]
struct Setting {
    /// Such as `-p, --port <PORT>`.
    flag: String,
    variable: Option<String>,
    default: Option<String>,
    meaning: String,
}

impl Setting {
    /// Reads a line such as `-p, --port <PORT>  Where it listens [env: PORT=] [default: 8000]`.
    fn parse(line: &str) -> Option<Self> {
        let (flag, text) = line.trim_start().split_once("  ")?;
        if !flag.starts_with('-') || flag.ends_with("--help") {
            return None;
        }
        let mut meaning = text.trim().to_owned();
        let mut take = |name: &str| {
            let at = meaning.rfind(&format!(" [{name}: "))?;
            let value = meaning[at..].strip_suffix(']')?[name.len() + 4..].to_owned();
            meaning.truncate(at);
            Some(value)
        };
        // From the end, where the default comes last.
        let default = take("default");
        let variable = take("env").map(|env| env.split('=').next().unwrap().to_owned());
        Some(Self {
            flag: flag.to_owned(),
            variable,
            default,
            meaning,
        })
    }

    fn row(&self, commands: &[&str], options: &BTreeMap<String, NixOption>) -> String {
        let code = |text: &Option<String>| match text {
            Some(text) => format!("`{text}`"),
            None => String::new(),
        };
        let option = self.variable.as_ref().and_then(|name| options.get(name));
        format!(
            "| `{}` | {} | {} | {} | {} | {} |\n",
            self.flag,
            code(&self.variable),
            code(&option.map(|option| option.name.clone())),
            code(&self.default),
            commands.join(", "),
            self.meaning.replace('|', "\\|"),
        )
    }
}

/// A command's settings, by its own help.
fn settings(command: &str) -> Vec<Setting> {
    let output = Command::new(env!("CARGO_BIN_EXE_banter"))
        .args([command, "--help"])
        // Help shows what is set.
        .env_clear()
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let help = String::from_utf8(output.stdout).unwrap();
    let settings: Vec<_> = help.lines().filter_map(Setting::parse).collect();
    let flags = help
        .lines()
        .filter(|line| line.trim_start().starts_with('-'))
        .count();
    assert_eq!(settings.len() + 1, flags, "all but --help: {help}");
    settings
}

fn table() -> String {
    let mut rows: Vec<(Setting, Vec<&str>)> = Vec::new();
    for command in COMMANDS {
        for setting in settings(command) {
            match rows.iter_mut().find(|(known, _)| *known == setting) {
                Some((_, commands)) => commands.push(command),
                None => rows.push((setting, vec![command])),
            }
        }
    }
    rows.sort_by_key(|(setting, commands)| {
        let by_name = setting.flag.trim_start_matches("-p, ").to_owned();
        // What belongs to one command only comes last, port first.
        (
            commands.len() == 1 && !by_name.starts_with("--port"),
            !by_name.starts_with("--port"),
        )
    });
    let mut table = "| flag | environment | NixOS option | default | of | meaning |\n\
                     | --- | --- | --- | --- | --- | --- |\n"
        .to_owned();
    let options = options();
    for (setting, commands) in rows {
        table += &setting.row(&commands, &options);
    }
    table
}

#[test]
fn the_table_in_the_readme_is_what_help_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = readme.split_once(BEGIN).unwrap();
    let (table_there, after) = rest.split_once(END).unwrap();
    let table = table();
    if std::env::var_os("BANTER_UPDATE_README").is_some() {
        std::fs::write(&path, format!("{before}{BEGIN}{table}{END}{after}")).unwrap();
    } else {
        assert!(
            table_there == table,
            "README.md is behind; BANTER_UPDATE_README=1 cargo test --test settings writes:\n{table}"
        );
    }
}

#[test]
fn every_setting_has_an_option_of_the_module_or_a_reason_not_to() {
    let options = options();
    let settings: Vec<Setting> = COMMANDS.into_iter().flat_map(settings).collect();
    for setting in &settings {
        let Some(variable) = &setting.variable else {
            continue;
        };
        assert!(
            options.contains_key(variable) != WITHOUT_OPTION.contains(&variable.as_str()),
            "{variable} belongs either into nix/settings.nix or into WITHOUT_OPTION"
        );
    }
    let module = file("nix/module.nix");
    for (variable, option) in &options {
        let mut of_this = settings
            .iter()
            .filter(|setting| setting.variable.as_ref() == Some(variable));
        let setting = of_this
            .next()
            .unwrap_or_else(|| panic!("nix/settings.nix: {variable} is no setting"));
        if option.is_plain || option.default.is_some() {
            assert_eq!(option.default, setting.default, "{variable}");
        }
        let last = option.name.rsplit('.').next().unwrap();
        let declared = module.contains(&format!(" {last} = mkOption {{\n"));
        assert_eq!(
            declared, !option.is_plain,
            "{} is declared where its type is",
            option.name
        );
    }
}

#[test]
fn a_line_of_help_is_read_with_all_its_parts() {
    let line = "  -p, --port <PORT>   Listens [here] [env: PORT=9] [default: 8000]";
    let setting = Setting::parse(line).unwrap();
    assert_eq!(setting.flag, "-p, --port <PORT>");
    assert_eq!(setting.variable.as_deref(), Some("PORT"));
    assert_eq!(setting.default.as_deref(), Some("8000"));
    assert_eq!(setting.meaning, "Listens [here]");
    assert_eq!(Setting::parse("  -h, --help   Print help"), None);
}
