//! `kms-agent status`: whether the agent is running.

use super::configuration::{Loaded, load};
use super::local::{self, AgentClient, LocalError};
use super::terminal::{self, print};
use crate::http::response::Response;
use crate::text::excerpt;
use serde_json::Value;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Not running, in the words of `systemctl status`.
const NOT_RUNNING: u8 = 3;
/// Something answers, and whether it is the agent cannot be told.
const UNKNOWN: u8 = 4;
/// Neither a configuration nor a unit is there.
const NOT_INSTALLED: u8 = 5;

/// Where a unit may be, see systemd.unit(5).
const UNITS: [&str; 4] = [
    "/etc/systemd/system/kms-agent.service",
    "/run/systemd/system/kms-agent.service",
    "/usr/lib/systemd/system/kms-agent.service",
    "/lib/systemd/system/kms-agent.service",
];
/// A text in the reply is cut to this many bytes.
const TEXT_BYTES_MAX: usize = 512;

pub(super) const HELP: &str = "\
kms-agent status - say whether the agent is running

Usage: kms-agent status [--config FILE]

This command asks the port of the configuration, and shows the agent's token. The first line that
it prints is one of

  Running          the agent answers; more lines say how it is
  Not running      no program listens on the port
  Not installed    as Not running, and there is neither a configuration nor a systemd unit
  Unknown          another program answers, none answers in time, or the agent refuses the token

Options:
  -c, --config FILE    the agent's configuration; see 'kms-agent run --help'
  -h, --help           print this help

Exit codes: 0 Running, 3 Not running, 4 Unknown, 5 Not installed, 2 wrong usage or configuration
";

/// The command; the result is the exit code.
pub(super) fn main(config: Option<PathBuf>) -> u8 {
    let loaded = match load(config) {
        Ok(loaded) => loaded,
        Err(exit_code) => return exit_code,
    };
    let (exit_code, text) = find(&loaded);
    match print(text.as_bytes()) {
        terminal::OK => exit_code,
        failed => failed,
    }
}

fn find(loaded: &Loaded) -> (u8, String) {
    let unknown = |why: &str| (UNKNOWN, format!("Unknown\n  {why}\n"));
    let ping = match local::ping(loaded.config.server.http_port) {
        Ok(reply) => reply,
        Err(LocalError::Refused { .. }) if is_installed(loaded) => {
            return (NOT_RUNNING, "Not running\n".to_owned());
        }
        Err(LocalError::Refused { .. }) => return (NOT_INSTALLED, "Not installed\n".to_owned()),
        Err(error) => return unknown(&error.to_string()),
    };
    if !is_healthy(&ping) {
        return unknown("something other than kms-agent answers on the port; 'kms-agent check' says what");
    }
    let agent = match AgentClient::of(&loaded.config) {
        Ok(agent) => agent,
        Err(why) => return unknown(&format!("an agent answers, but this command cannot ask it: {why}")),
    };
    match agent.status() {
        Ok(reply) if reply.status == 200 => match serde_json::from_slice(&reply.body) {
            Ok(status) => (terminal::OK, describe(&status)),
            Err(_) => unknown("what answers on the port is not kms-agent"),
        },
        Ok(reply) if local::is_busy(&reply) => {
            (terminal::OK, "Running\n  connections  all of [Server] MaxConn are busy\n".to_owned())
        }
        // An agent from before there was a /status: it took the token, so it is one.
        Ok(reply) if reply.status == 404 => (terminal::OK, "Running\n".to_owned()),
        Ok(reply) => unknown(&agent.refusal(&reply)),
        Err(error) => unknown(&error.to_string()),
    }
}

fn is_installed(loaded: &Loaded) -> bool {
    loaded.file.is_some() || UNITS.iter().any(|unit| Path::new(unit).exists())
}

/// Whether this is an agent's answer to `/ping`.
pub(super) fn is_healthy(reply: &Response) -> bool {
    reply.status == 200 && reply.body.as_slice() == b"healthy"
}

fn describe(status: &Value) -> String {
    let mut out = String::from("Running\n");
    let mut line = |name: &str, text: Option<String>| {
        if let Some(text) = text {
            let _ = writeln!(out, "  {name:<13}{text}");
        }
    };
    let number = |pointer: &str| status.pointer(pointer).and_then(Value::as_u64);
    line("version", string(status, "/version"));
    line("pid", number("/pid").map(|pid| pid.to_string()));
    line("uptime", number("/uptime_seconds").map(duration));
    let secrets = number("/secrets/count").zip(number("/secrets/bytes"));
    line("secrets", secrets.map(|(count, bytes)| format!("{count} cached, {bytes} bytes")));
    let connections = number("/connections/open").zip(number("/connections/max"));
    line("connections", connections.map(|(open, max)| format!("{open} of {max}")));
    line("KMS", health(status, "/kms"));
    line("credentials", health(status, "/credentials"));
    out
}

fn string(status: &Value, pointer: &str) -> Option<String> {
    status.pointer(pointer).and_then(Value::as_str).map(|text| excerpt(text, TEXT_BYTES_MAX))
}

/// `ok since .., until ..`, `failing since ..: why`, or that nothing was tried yet.
fn health(status: &Value, part: &str) -> Option<String> {
    let of = |name: &str| string(status, &format!("{part}/{name}"));
    let mut text = match status.pointer(&format!("{part}/ok"))? {
        Value::Bool(true) => "ok".to_owned(),
        Value::Bool(false) => "failing".to_owned(),
        _ => return Some("not tried yet".to_owned()),
    };
    let ok = text == "ok";
    if let Some(since) = of("since") {
        let _ = write!(text, " since {since}");
    }
    match (ok, of("expires"), of("last_error")) {
        (true, Some(expires), _) => {
            let _ = write!(text, ", until {expires}");
        }
        (false, _, Some(error)) => {
            let _ = write!(text, ": {error}");
        }
        _ => {}
    }
    Some(text)
}

/// `3 d 4 h`: the two largest units.
pub(super) fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, ..) => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_the_agent_says_is_told() {
        let status = json!({
            "status": "Running", "version": "0.1.0", "pid": 123, "uptime_seconds": 93_784,
            "secrets": {"count": 3, "bytes": 1234}, "connections": {"open": 2, "max": 800},
            "kms": {"ok": false, "since": "2026-11-22T09:00:00Z", "last_error": "connect\u{1b}x"},
            "credentials": {"ok": true, "since": "2026-11-22T08:00:00Z", "expires": "2026-11-22T14:00:00Z",
                            "last_error": null},
        });
        assert_eq!(
            describe(&status),
            "Running\n  version      0.1.0\n  pid          123\n  uptime       1 d 2 h\n  \
             secrets      3 cached, 1234 bytes\n  connections  2 of 800\n  \
             KMS          failing since 2026-11-22T09:00:00Z: connect\\u{1b}x\n  \
             credentials  ok since 2026-11-22T08:00:00Z, until 2026-11-22T14:00:00Z\n"
        );
        assert_eq!(
            describe(&json!({"kms": {"ok": null}, "pid": "x"})),
            "Running\n  KMS          not tried yet\n"
        );
    }

    #[test]
    fn durations() {
        for (seconds, text) in [(59, "59 s"), (61, "1 min 1 s"), (7260, "2 h 1 min"), (90_000, "1 d 1 h")] {
            assert_eq!(duration(seconds), text);
        }
    }
}
