//! The command line: arguments to a command, a command to an exit code.

pub mod run;

use std::ffi::OsString;
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
  run    serve applications on 127.0.0.1 and [::1] (the default)

Options:
  -c, --config FILE    the configuration; see 'kms-agent run --help'
  -h, --help           print this, or a command's own help
  -V, --version        print the version

An application asks
  curl -H \"X-KMS-Token: $(cat /var/run/kmstoken)\" \\
       'http://localhost:2025/secretsmanager/get?secretId=NAME'
";

const RUN_HELP: &str = "\
kms-agent run - serve applications on 127.0.0.1 and [::1]

Usage: kms-agent run [--config FILE]

Options:
  -c, --config FILE    the configuration, TOML; without it config.toml beside the folder of the
                       binary (/usr/local/alibabacloudkmsagent/config.toml when installed there),
                       and built-in defaults where that does not exist
  -h, --help           print this

The token is the value of KMS_TOKEN (or what file:///path in it names), else of the file
/var/run/kmstoken, made at the first start. The log is ./logs/kms-agent.log; see [Log] LogPath.

Signals:
  SIGTERM, SIGINT      finish what is in flight (at most 5 s), then end
  SIGHUP               read the token and CaFile again, reopen the log

Exit codes: 0 ended by a signal, 1 failed, 2 wrong usage or configuration
";

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
}

/// Reads the arguments, the program's name left out.
///
/// # Errors
/// What is wrong with them, in one line.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, String> {
    use lexopt::Arg::{Long, Short, Value};
    let mut parser = lexopt::Parser::from_args(arguments);
    let mut named = false;
    let mut config = None;
    while let Some(argument) = parser.next().map_err(|error| error.to_string())? {
        match argument {
            Short('h') | Long("help") => {
                return Ok(Command::Print(if named { RUN_HELP } else { HELP }.to_owned()));
            }
            Short('V') | Long("version") if !named => {
                return Ok(Command::Print(format!("kms-agent {}\n", env!("CARGO_PKG_VERSION"))));
            }
            Short('c') | Long("config") => {
                let value = parser.value().map_err(|error| error.to_string())?;
                if config.replace(PathBuf::from(value)).is_some() {
                    return Err("--config is given twice".to_owned());
                }
            }
            Value(name) if !named => match name.to_str() {
                Some("run") => named = true,
                _ => return Err(format!("unknown command {name:?}; there is only: run")),
            },
            other => return Err(other.unexpected().to_string()),
        }
    }
    Ok(Command::Run { config })
}

/// Does what the arguments of this process ask for; the result is its exit code.
#[must_use]
pub fn main() -> u8 {
    match parse(std::env::args_os().skip(1)) {
        Ok(Command::Print(text)) => {
            use std::io::Write as _;
            // Whoever closed the pipe early has seen enough.
            let _ = std::io::stdout().write_all(text.as_bytes());
            OK
        }
        Ok(Command::Run { config }) => run::main(config),
        Err(message) => {
            eprintln!("kms-agent: {message}\nTry 'kms-agent --help'.");
            USAGE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, String> {
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
        assert_eq!(parsed("--help"), Ok(Command::Print(HELP.into())));
        assert_eq!(parsed("run --help"), Ok(Command::Print(RUN_HELP.into())));
        let Ok(Command::Print(version)) = parsed("--version") else { panic!() };
        assert!(version.starts_with("kms-agent 0."), "{version}");
    }

    #[test]
    fn wrong_usage() {
        for (line, part) in [
            ("serve", "unknown command \"serve\""),
            ("run fast", "unexpected argument"),
            ("run --port 1", "'--port'"),
            ("run --config", "missing argument"),
            ("run --config a --config b", "twice"),
            ("run --version", "'--version'"),
        ] {
            let message = parsed(line).unwrap_err();
            assert!(message.contains(part), "{line}: {message}");
        }
    }
}
