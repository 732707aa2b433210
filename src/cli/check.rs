//! `kms-agent check`: what keeps the agent from working, one line a step.

mod report;
mod upstream;

use super::args::{Stop, set_path, set_string};
use super::configuration::load_quietly;
use super::local::{self, AgentClient, LocalError};
use super::terminal::{FAILED, OK, USAGE};
use super::{listener, status};
use crate::config::Config;
use crate::http::response::Response;
use crate::log::Reason;
use crate::text::excerpt;
use crate::token::{Source, TokenError};
use report::Report;
use serde_json::Value;
use std::io;
use std::path::PathBuf;

pub(super) const HELP: &str = "\
kms-agent check - find out what keeps the agent from working

Usage: kms-agent check [--secret ID] [--config FILE]

This command goes through what the agent needs and prints one line a step: 'ok', 'FAILED' with the
cause and what to do, or 'skipped' where an earlier failure leaves nothing to try. The first FAILED
is the cause to look at first.

  configuration   the file can be read and has no problems
  port            the port is free, or this agent listens on it
  token           there is a token, and other users can neither read nor replace it
  metadata        the instance metadata service answers
  credentials     the agent can get credentials for KMS
  DNS, TCP, TLS   the connection to KMS works
  clock           the clocks of this host and of KMS agree (KMS refuses more than 15 minutes)
  permission      KMS accepts the credentials and allows kms:GetSecretValue

It asks KMS itself, whatever a running agent has cached. Its result holds for the user and the
environment that it runs with, so run it as the agent's user and with the agent's environment.

Options:
      --secret ID      check that the current version of this secret may be read. Without this
                       option KMS is asked for a name that does not exist, which says nothing
                       about policies for single secrets
  -c, --config FILE    the agent's configuration; see 'kms-agent run --help'
  -h, --help           print this help

Exit codes: 0 no step failed, 1 a step failed, 2 wrong usage or configuration
";

/// What to look at.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Options {
    config: Option<PathBuf>,
    secret: Option<String>,
}

pub(super) fn parse(parser: &mut lexopt::Parser, mut config: Option<PathBuf>) -> Result<Options, Stop> {
    use lexopt::Arg::{Long, Short};
    let mut secret = None;
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => return Err(Stop::Help),
            Short('c') | Long("config") => set_path(&mut config, "--config", parser)?,
            Long("secret") => set_string(&mut secret, "--secret", parser)?,
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(Options { config, secret })
}

/// The command; the result is the exit code.
pub(super) fn main(options: Options) -> u8 {
    let mut report = Report::to_stdout();
    let loaded = match load_quietly(options.config) {
        Ok(loaded) => loaded,
        Err(error) => {
            report.failed("configuration", error);
            return USAGE;
        }
    };
    match &loaded.file {
        Some(file) => report.ok("configuration", file.display()),
        None => {
            report.ok("configuration", "the built-in defaults are used, because no file was given or found")
        }
    }
    let running = port(&loaded.config, &mut report);
    token(&loaded.config, running, &mut report);
    upstream::check(&loaded.config, options.secret.as_deref(), &mut report);
    if report.all_is_well() { OK } else { FAILED }
}

/// What is known of an agent that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Running {
    No,
    /// It takes our token, or we have none to show.
    Yes,
    RefusesToken,
}

fn port(config: &Config, report: &mut Report) -> Running {
    const STEP: &str = "port";
    let port = config.server.http_port;
    let ping = match local::ping(port) {
        Ok(reply) => reply,
        Err(LocalError::UnknownPort) => {
            report.ok(STEP, "[Server] HttpPort is 0, so the agent takes any free port");
            return Running::No;
        }
        Err(LocalError::Refused { .. }) => {
            match listener::may_bind(port) {
                Ok(()) => report.ok(STEP, format_args!("127.0.0.1:{port} is free: no agent is running")),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => report.failed(
                    STEP,
                    format_args!(
                        "this user may not listen on port {port}: ports below 1024 need root. Set another [Server] \
                         HttpPort, or give the agent CAP_NET_BIND_SERVICE"
                    ),
                ),
                Err(error) => report.failed(
                    STEP,
                    format_args!("cannot use 127.0.0.1:{port}: {}. Set another [Server] HttpPort", Reason(&error)),
                ),
            }
            return Running::No;
        }
        Err(_) => {
            taken(port, report);
            return Running::No;
        }
    };
    if !status::is_healthy(&ping) {
        taken(port, report);
        return Running::No;
    }
    let asked = AgentClient::of(config).map(|agent| agent.status());
    let holder = listener::of(port);
    let is_kms_agent =
        !matches!(&holder, listener::Holder::Process { name, .. } if !name.starts_with("kms-agent"));
    match asked {
        Ok(Ok(reply)) if reply.status == 200 => {
            report.ok(STEP, format_args!("127.0.0.1:{port} is held by this agent{}", description(&reply)));
            Running::Yes
        }
        Ok(Ok(reply)) if local::is_token_refusal(&reply) && is_kms_agent => {
            report.ok(STEP, format_args!("127.0.0.1:{port} is held by an agent: {holder}"));
            Running::RefusesToken
        }
        Ok(Ok(reply)) if local::is_busy(&reply) && is_kms_agent => {
            report.ok(
                STEP,
                format_args!(
                    "127.0.0.1:{port} is held by an agent: {holder}; all its connections ([Server] MaxConn) are busy"
                ),
            );
            Running::Yes
        }
        // Without a token of ours, or an agent from before there was a /status.
        Ok(Ok(Response { status: 404, .. })) | Err(_) if is_kms_agent => {
            report.ok(STEP, format_args!("127.0.0.1:{port} is held by an agent: {holder}"));
            Running::Yes
        }
        _ => {
            taken(port, report);
            Running::No
        }
    }
}

fn description(reply: &Response) -> String {
    let status: Value = serde_json::from_slice(&reply.body).unwrap_or_default();
    let pid = status.get("pid").and_then(Value::as_u64);
    let version = status.get("version").and_then(Value::as_str);
    match (pid, version) {
        (Some(pid), Some(version)) => {
            format!(" (pid {pid}, version {})", excerpt(version, 64))
        }
        _ => String::new(),
    }
}

fn taken(port: u16, report: &mut Report) {
    let holder = listener::of(port);
    report.failed(
        "port",
        format_args!(
            "{holder} listens on 127.0.0.1:{port}, and it is not this agent. End it, or set another [Server] HttpPort"
        ),
    );
}

fn token(config: &Config, running: Running, report: &mut Report) {
    const STEP: &str = "token";
    let source = match Source::find(&config.server.ssrf_env_variables, &|name| std::env::var_os(name)) {
        Ok(source) => source,
        Err(error) => return report.failed(STEP, error),
    };
    let by_default = matches!(source, Source::File { default: true, .. });
    let token = match source.read() {
        Ok(token) => token,
        Err(TokenError::Read(path, error)) => {
            let path = path.display();
            let what = match error.kind() {
                io::ErrorKind::NotFound if by_default => format!(
                    "the token file {path} does not exist. Start the agent, which creates it, or run: kms-agent token \
                     create"
                ),
                io::ErrorKind::NotFound => {
                    format!("the token file {path} does not exist. Run: kms-agent token create --file {path}")
                }
                io::ErrorKind::PermissionDenied => format!(
                    "this user may not read the token file {path}. Run this command as root, or as a user in the \
                     file's group (see: ls -l {path})"
                ),
                _ => {
                    format!(
                        "cannot use the token file {path}: {}. Run: kms-agent token rotate --file {path}",
                        Reason(&error)
                    )
                }
            };
            return report.failed(STEP, what);
        }
        Err(error) => return report.failed(STEP, error),
    };
    if token.is_empty() {
        let advice = match &source {
            Source::File { path, .. } => format!("Run: kms-agent token create --file {}", path.display()),
            Source::Value { variable, .. } => format!("Set {variable} to a token, or unset it"),
        };
        return report.failed(
            STEP,
            format_args!("the token in {source} is empty, and the agent refuses every request until it has a token. {advice}"),
        );
    }
    let complaints = source.complaints();
    if !complaints.is_empty() {
        return report.failed(STEP, complaints.join("; "));
    }
    match running {
        Running::RefusesToken => report.failed(
            STEP,
            format_args!(
                "the running agent has another token than {source}. Run this command with the agent's variables \
                 ({}), or restart the agent",
                config.server.ssrf_env_variables.join(", ")
            ),
        ),
        Running::Yes | Running::No => report.ok(STEP, source),
    }
}
