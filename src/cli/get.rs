//! `kms-agent get`: prints a secret.

use super::args::{Stop, set, set_path, set_string};
use super::configuration::load;
use super::local::{self, AgentClient, SecretRequest};
use super::terminal::{FAILED, complain, print};
use std::io::{IsTerminal as _, stdout};
use std::path::PathBuf;
use zeroize::Zeroizing;

pub(super) const HELP: &str = "\
kms-agent get - print a secret

Usage: kms-agent get SECRET_ID [OPTIONS]

Asks the running agent and prints the secret's SecretData exactly as KMS has it, binary secrets
in base64. A line end is added on a terminal only: PASSWORD=$(kms-agent get db) and
kms-agent get tls-key > key.pem both do what they look like.

Options:
      --field KEY          only this member of a SecretData that is a JSON object
      --json               the agent's whole reply
      --version-id V       this version
      --version-stage S    the version at this stage, for example ACSPrevious (else ACSCurrent)
      --refresh            ask KMS, whatever is cached
  -c, --config FILE        the agent's configuration; see 'kms-agent run --help'
  -h, --help               print this

The port is the configuration's. The token is found as the agent finds its own: KMS_TOKEN (the
token, or file:///path), else /var/run/kmstoken. With ResponseType 2 a secret that is the JSON
object {\"value\": \"x\"} cannot be told from the plain secret x, and is printed as x.

Exit codes: 0 printed, 1 no such secret, no agent or no token, 2 wrong usage or configuration
";

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Options {
    config: Option<PathBuf>,
    request: SecretRequest,
    field: Option<String>,
    json: bool,
}

pub(super) fn parse(parser: &mut lexopt::Parser, mut config: Option<PathBuf>) -> Result<Options, Stop> {
    use lexopt::Arg::{Long, Short, Value};
    let (mut id, mut field, mut json) = (None, None, false);
    let mut request = SecretRequest::default();
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => return Err(Stop::Help),
            Short('c') | Long("config") => set_path(&mut config, "--config", parser)?,
            Long("field") => set_string(&mut field, "--field", parser)?,
            Long("json") => json = true,
            Long("version-id") => set_string(&mut request.version_id, "--version-id", parser)?,
            Long("version-stage") => set_string(&mut request.version_stage, "--version-stage", parser)?,
            Long("refresh") => request.refresh = true,
            Value(value) if id.is_none() => {
                set(
                    &mut id,
                    "SECRET_ID",
                    value.into_string().map_err(|it| format!("SECRET_ID {it:?}: not UTF-8"))?,
                )?;
            }
            other => return Err(other.unexpected().into()),
        }
    }
    if json && field.is_some() {
        return Err("--field and --json: only one of them".into());
    }
    request.id = id.filter(|id| !id.is_empty()).ok_or("SECRET_ID is missing")?;
    Ok(Options { config, request, field, json })
}

/// The command; the result is the exit code.
pub(super) fn main(options: Options) -> u8 {
    let loaded = match load(options.config.clone()) {
        Ok(loaded) => loaded,
        Err(exit_code) => return exit_code,
    };
    let wanted = AgentClient::of(&loaded.config).and_then(|agent| {
        find(&agent, &options).map_err(|message| format!("{}: {message}", options.request.id))
    });
    match wanted {
        Ok(mut value) => {
            if stdout().is_terminal() && !value.ends_with(b"\n") {
                value.push(b'\n');
            }
            print(&value)
        }
        Err(message) => {
            complain(&message);
            FAILED
        }
    }
}

fn find(agent: &AgentClient<'_>, options: &Options) -> Result<Zeroizing<Vec<u8>>, String> {
    let body = agent.ask(&options.request)?;
    if options.json {
        return Ok(body);
    }
    let data = agent.secret_data(&body).ok_or(local::UNUSABLE)?;
    let mut value = match &options.field {
        Some(key) => local::field(&data, key)?,
        None => data,
    };
    Ok(Zeroizing::new(std::mem::take(&mut *value).into_bytes()))
}
