//! The command line: arguments to a command, a command to an exit code.

pub mod check;
pub mod exec;
pub mod get;
mod listener;
mod local;
mod probe;
pub mod run;
pub mod status;
mod systemd;
pub mod token;

use crate::config::{self, Config};
use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, Write as _};
use std::path::PathBuf;

/// All is well.
pub const OK: u8 = 0;
/// The command failed.
pub const FAILED: u8 = 1;
/// The arguments or the configuration are wrong.
pub const USAGE: u8 = 2;

const HELP: &str = "\
kms-agent - secrets from Alibaba Cloud KMS for the applications of this host

Usage: kms-agent [COMMAND] [OPTIONS]

Commands:
  run       serve applications on 127.0.0.1 and [::1] (the default)
  get       print a secret
  exec      run a program with secrets in its environment
  status    tell whether the agent is running
  check     find out what keeps the agent from working
  token     make or replace the token file

Options:
  -c, --config FILE    the configuration; see 'kms-agent run --help'
  -h, --help           print this, or a command's own help
  -V, --version        print the version

An application asks
  curl --noproxy localhost -H \"X-KMS-Token: $(cat /var/run/kmstoken)\" \\
       'http://localhost:2025/secretsmanager/get?secretId=NAME'
";

/// Reads the arguments behind a command's name; `--config` may have come before it.
type Parse = fn(&mut lexopt::Parser, Option<PathBuf>) -> Result<Command, String>;

const COMMANDS: [(&str, Parse); 6] = [
    ("run", run::parse),
    ("get", get::parse),
    ("exec", exec::parse),
    ("status", status::parse),
    ("check", check::parse),
    ("token", token::parse),
];

/// What the arguments ask for.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Print this text.
    Print(String),
    /// Serve.
    Run {
        /// `--config`.
        config: Option<PathBuf>,
    },
    /// Print a secret.
    Get(get::Options),
    /// Run a program with secrets in its environment.
    Exec(exec::Options),
    /// Tell whether the agent is running.
    Status {
        /// `--config`.
        config: Option<PathBuf>,
    },
    /// Look for what keeps the agent from working.
    Check(check::Options),
    /// Make or replace the token file.
    Token(token::Options),
}

/// Arguments that mean nothing.
#[derive(Debug, PartialEq, Eq)]
pub struct Usage {
    /// The command whose help has what it should be; empty: the general one.
    pub command: &'static str,
    /// What is wrong, in one line.
    pub message: String,
}

/// Reads the arguments, the program's name left out.
///
/// # Errors
/// What is wrong with them.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, Usage> {
    let mut parser = lexopt::Parser::from_args(arguments);
    let mut command = "";
    parse_any(&mut parser, &mut command).map_err(|message| Usage { command, message })
}

fn parse_any(parser: &mut lexopt::Parser, command: &mut &'static str) -> Result<Command, String> {
    use lexopt::Arg::{Long, Short, Value};
    let mut config = None;
    while let Some(argument) = parser.next().map_err(text)? {
        match argument {
            Short('h') | Long("help") => return Ok(Command::Print(HELP.to_owned())),
            Short('V') | Long("version") => {
                return Ok(Command::Print(format!("kms-agent {}\n", env!("CARGO_PKG_VERSION"))));
            }
            Short('c') | Long("config") => set_path(&mut config, "--config", parser)?,
            Value(name) => {
                let Some((known, parse)) = COMMANDS.iter().find(|(known, _)| name == *known) else {
                    let known = COMMANDS.map(|(known, _)| known).join(", ");
                    return Err(format!("unknown command {name:?}; there are {known}"));
                };
                *command = known;
                return parse(parser, config);
            }
            other => return Err(text(other.unexpected())),
        }
    }
    Ok(Command::Run { config })
}

/// The arguments of a command that takes `--config` alone; `done` makes the command of it.
fn parse_config_only(
    parser: &mut lexopt::Parser,
    mut config: Option<PathBuf>,
    help: &str,
    done: impl FnOnce(Option<PathBuf>) -> Command,
) -> Result<Command, String> {
    use lexopt::Arg::{Long, Short};
    while let Some(argument) = parser.next().map_err(text)? {
        match argument {
            Short('h') | Long("help") => return Ok(Command::Print(help.to_owned())),
            Short('c') | Long("config") => set_path(&mut config, "--config", parser)?,
            other => return Err(text(other.unexpected())),
        }
    }
    Ok(done(config))
}

fn set_path(slot: &mut Option<PathBuf>, name: &str, parser: &mut lexopt::Parser) -> Result<(), String> {
    let value = parser.value().map_err(text)?;
    set(slot, name, PathBuf::from(value))
}

fn set_string(slot: &mut Option<String>, name: &str, parser: &mut lexopt::Parser) -> Result<(), String> {
    let value = parser.value().map_err(text)?;
    set(slot, name, value.into_string().map_err(|value| format!("{name} {value:?}: not UTF-8"))?)
}

fn set<T>(slot: &mut Option<T>, name: &str, value: T) -> Result<(), String> {
    if slot.replace(value).is_some() { Err(format!("{name} is given twice")) } else { Ok(()) }
}

fn text(error: impl Display) -> String {
    error.to_string()
}

/// A configuration and where it is from.
struct Loaded {
    config: Config,
    /// `None`: the built-in defaults.
    file: Option<PathBuf>,
}

/// The configuration of a command: the named file, else the default one, else the built-in defaults. A
/// problem is printed; the error is the exit code then.
fn load(named: Option<PathBuf>) -> Result<Loaded, u8> {
    load_quietly(named).map_err(|error| {
        complain(&error);
        USAGE
    })
}

fn load_quietly(named: Option<PathBuf>) -> Result<Loaded, config::LoadError> {
    let file = named.or_else(run::default_file);
    let config = file.as_deref().map_or_else(|| Ok(Config::default()), config::load)?;
    Ok(Loaded { config, file })
}

/// Tells the person at the terminal what went wrong, or what else they should know.
fn complain(what: &dyn Display) {
    // Whoever closed standard error wants to hear nothing.
    let _ = writeln!(io::stderr(), "kms-agent: {what}");
}

/// Writes to standard output; a failure is told, since what it was meant for is missing now.
fn print(bytes: &[u8]) -> u8 {
    let mut out = io::stdout();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => OK,
        Err(error) => {
            complain(&format_args!("cannot write to standard output: {}", crate::log::Reason(&error)));
            FAILED
        }
    }
}

/// Does what the arguments of this process ask for; the result is its exit code.
#[must_use]
pub fn main() -> u8 {
    // Most commands hold a token or a secret for a moment.
    let _ = crate::harden::forbid_dumps();
    match parse(std::env::args_os().skip(1)) {
        Ok(Command::Print(text)) => {
            // Whoever closed the pipe early has seen enough.
            let _ = io::stdout().write_all(text.as_bytes());
            OK
        }
        Ok(Command::Run { config }) => run::main(config),
        Ok(Command::Get(options)) => get::main(options),
        Ok(Command::Exec(options)) => exec::main(options),
        Ok(Command::Status { config }) => status::main(config),
        Ok(Command::Check(options)) => check::main(options),
        Ok(Command::Token(options)) => token::main(&options),
        Err(Usage { command, message }) => {
            let space = if command.is_empty() { "" } else { " " };
            complain(&format_args!("{message}\nTry 'kms-agent{space}{command} --help'."));
            USAGE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, Usage> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn commands() {
        let run = |config: Option<&str>| Ok(Command::Run { config: config.map(Into::into) });
        assert_eq!(parsed(""), run(None));
        assert_eq!(parsed("run"), run(None));
        assert_eq!(parsed("run --config a.toml"), run(Some("a.toml")));
        assert_eq!(parsed("--config=a.toml"), run(Some("a.toml")));
        assert_eq!(parsed("run -c a.toml"), run(Some("a.toml")));
        assert_eq!(parsed("-c a.toml status"), Ok(Command::Status { config: Some("a.toml".into()) }));
        let Ok(Command::Print(version)) = parsed("--version") else { panic!() };
        assert!(version.starts_with("kms-agent 0."), "{version}");
    }

    #[test]
    fn every_command_has_help_that_begins_and_fits_alike() {
        let mut texts = vec![("".to_owned(), HELP.to_owned())];
        for (command, _) in COMMANDS {
            assert!(HELP.contains(&format!("\n  {command} ")), "{command} is missing in the general help");
            let Ok(Command::Print(help)) = parsed(&format!("{command} --help")) else { panic!("{command}") };
            assert_eq!(parsed(&format!("{command} -h")), Ok(Command::Print(help.clone())));
            texts.push((format!(" {command}"), help));
        }
        for (command, help) in texts {
            assert!(help.starts_with(&format!("kms-agent{command} - ")), "{help}");
            assert!(help.contains(&format!("\nUsage: kms-agent{command}")) && help.ends_with('\n'), "{help}");
            assert!(help.lines().all(|line| line.chars().count() <= 100), "{help}");
        }
    }

    #[test]
    fn wrong_usage() {
        for (line, command, part) in [
            ("serve", "", "unknown command \"serve\""),
            ("--port 1", "", "'--port'"),
            ("--config a --config b", "", "twice"),
            ("run fast", "run", "unexpected argument"),
            ("run --port 1", "run", "'--port'"),
            ("run --config", "run", "missing argument"),
            ("run --config a --config b", "run", "twice"),
            ("--config a run --config b", "run", "twice"),
            ("run --version", "run", "'--version'"),
            ("status now", "status", "unexpected argument \"now\""),
            ("get", "get", "SECRET_ID is missing"),
            ("get a b", "get", "unexpected argument \"b\""),
            ("get a --field x --json", "get", "--field and --json"),
            ("get a --refresh=yes", "get", "unexpected argument for option"),
            ("get a --version-id", "get", "missing argument"),
            ("exec", "exec", "-- and the program"),
            ("exec --env A=a --", "exec", "-- and the program"),
            ("exec --env A=a ls", "exec", "-- before \"ls\""),
            ("exec -- ls", "exec", "no --env"),
            ("exec --env A -- ls", "exec", "--env A: must be NAME=SECRET_ID"),
            ("exec --env =a -- ls", "exec", "no name of a variable"),
            ("exec --env 1A=a -- ls", "exec", "no name of a variable"),
            ("exec --env A-B=a -- ls", "exec", "no name of a variable"),
            ("exec --env A= -- ls", "exec", "SECRET_ID is missing"),
            ("exec --env A=#k -- ls", "exec", "SECRET_ID is missing"),
            ("exec --env A=a# -- ls", "exec", "KEY is missing"),
            ("exec --env A=a --env A=b -- ls", "exec", "A is set twice"),
            ("check a", "check", "unexpected argument \"a\""),
            ("token", "token", "create or rotate"),
            ("token delete", "token", "create or rotate"),
            ("token create now", "token", "unexpected argument \"now\""),
            ("token create --file a --file b", "token", "twice"),
        ] {
            let Err(usage) = parsed(line) else { panic!("{line}") };
            assert_eq!(usage.command, command, "{line}");
            assert!(usage.message.contains(part), "{line}: {}", usage.message);
        }
    }
}
