//! The command line: arguments to a command, a command to an exit code.

mod args;
mod check;
mod configuration;
mod exec;
mod get;
mod listener;
mod local;
mod probe;
pub mod run;
mod status;
mod systemd;
mod terminal;
mod token;

use args::{Stop, set_path};
use std::ffi::OsString;
use std::io::{self, Write as _};
use std::path::PathBuf;
use terminal::{OK, USAGE, complain};

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

/// Which program listens on `port` of loopback, as far as this user may see it: `nginx (pid 4711)`. For a person.
#[must_use]
pub fn port_holder(port: u16) -> String {
    listener::of(port).to_string()
}

/// Reads the arguments behind a command's name; `--config` may have come before it.
type Parse = fn(&mut lexopt::Parser, Option<PathBuf>) -> Result<Command, Stop>;

/// The commands: name, help, how their arguments are read.
const COMMANDS: [(&str, &str, Parse); 6] = [
    ("run", run::HELP, |parser, config| args::config_alone(parser, config).map(Command::Run)),
    ("get", get::HELP, |parser, config| get::parse(parser, config).map(Command::Get)),
    ("exec", exec::HELP, |parser, config| exec::parse(parser, config).map(Command::Exec)),
    ("status", status::HELP, |parser, config| args::config_alone(parser, config).map(Command::Status)),
    ("check", check::HELP, |parser, config| check::parse(parser, config).map(Command::Check)),
    ("token", token::HELP, |parser, config| token::parse(parser, config).map(Command::Token)),
];

/// What the arguments ask for.
#[derive(Debug, PartialEq, Eq)]
enum Command {
    Print(String),
    /// With `--config`, as `Status`.
    Run(Option<PathBuf>),
    Get(get::Options),
    Exec(exec::Options),
    Status(Option<PathBuf>),
    Check(check::Options),
    Token(token::Options),
}

/// Arguments that mean nothing.
#[derive(Debug, PartialEq, Eq)]
struct Usage {
    /// The command whose help has what it should be; empty: the general one.
    command: &'static str,
    /// What is wrong, in one line.
    message: String,
}

/// Reads the arguments, the program's name left out.
fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, Usage> {
    let mut parser = lexopt::Parser::from_args(arguments);
    let (mut command, mut help) = ("", HELP);
    match parse_any(&mut parser, &mut command, &mut help) {
        Ok(command) => Ok(command),
        Err(Stop::Help) => Ok(Command::Print(help.to_owned())),
        Err(Stop::Wrong(message)) => Err(Usage { command, message }),
    }
}

/// `command` and `help`: those of the command, as soon as it is known.
fn parse_any(
    parser: &mut lexopt::Parser,
    command: &mut &'static str,
    help: &mut &'static str,
) -> Result<Command, Stop> {
    use lexopt::Arg::{Long, Short, Value};
    let mut config = None;
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => return Err(Stop::Help),
            Short('V') | Long("version") => {
                return Ok(Command::Print(format!("kms-agent {}\n", env!("CARGO_PKG_VERSION"))));
            }
            Short('c') | Long("config") => set_path(&mut config, "--config", parser)?,
            Value(name) => {
                let Some((known, its_help, parse)) = COMMANDS.iter().find(|(known, ..)| name == *known)
                else {
                    let known = COMMANDS.map(|(known, ..)| known).join(", ");
                    return Err(format!("unknown command {name:?}; there are {known}").into());
                };
                (*command, *help) = (known, its_help);
                return parse(parser, config);
            }
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(Command::Run(config))
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
        Ok(Command::Run(config)) => run::main(config),
        Ok(Command::Get(options)) => get::main(options),
        Ok(Command::Exec(options)) => exec::main(options),
        Ok(Command::Status(config)) => status::main(config),
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
        let run = |config: Option<&str>| Ok(Command::Run(config.map(Into::into)));
        assert_eq!(parsed(""), run(None));
        assert_eq!(parsed("run"), run(None));
        assert_eq!(parsed("run --config a.toml"), run(Some("a.toml")));
        assert_eq!(parsed("--config=a.toml"), run(Some("a.toml")));
        assert_eq!(parsed("run -c a.toml"), run(Some("a.toml")));
        assert_eq!(parsed("-c a.toml status"), Ok(Command::Status(Some("a.toml".into()))));
        let Ok(Command::Print(version)) = parsed("--version") else { panic!() };
        assert!(version.starts_with("kms-agent 0."), "{version}");
    }

    #[test]
    fn every_command_has_help_that_begins_and_fits_alike() {
        let mut texts = vec![("".to_owned(), HELP.to_owned())];
        for (command, ..) in COMMANDS {
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
