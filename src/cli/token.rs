//! `kms-agent token`: makes or replaces the token file.

use super::args::{Stop, set_path, set_string, text};
use super::configuration::load;
use super::terminal::{FAILED, USAGE, complain, print};
use crate::log::Reason;
use crate::random::Random;
use crate::token::{self, Created, Source};
use std::fs;
use std::path::{Path, PathBuf};

const GROUPS: &str = "/etc/group";

pub(super) const HELP: &str = "\
kms-agent token - make or replace the token file

Usage: kms-agent token create [--file F] [--group G] [--config FILE]
       kms-agent token rotate [--file F] [--group G] [--config FILE]

create leaves a file with a valid token alone. Otherwise it writes a new token: 256 random bits in
hex, mode 0640. rotate writes a new token in any case; within a second a running agent uses it, and
the old token stops working. At no moment can others read the file or see half of it.

Options:
      --file F         the file. Without this option it is the one that KMS_TOKEN=file:///path
                       (or another variable of [Server] SSRFEnvVariables) names, or
                       /var/run/kmstoken if none of these variables is set
      --group G        the file's group, by name or number; its users may read the token. Without
                       this option it is that of the file that is replaced, or of this process
  -c, --config FILE    the agent's configuration, for SSRFEnvVariables; see 'kms-agent run --help'
  -h, --help           print this help

Exit codes: 0 there is a token, 1 the command failed, 2 wrong usage or configuration
";

/// What to do, and with which file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Options {
    config: Option<PathBuf>,
    rotate: bool,
    file: Option<PathBuf>,
    group: Option<String>,
}

pub(super) fn parse(parser: &mut lexopt::Parser, mut config: Option<PathBuf>) -> Result<Options, Stop> {
    use lexopt::Arg::{Long, Short, Value};
    let (mut rotate, mut file, mut group) = (None, None, None);
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => return Err(Stop::Help),
            Short('c') | Long("config") => set_path(&mut config, "--config", parser)?,
            Long("file") => set_path(&mut file, "--file", parser)?,
            Long("group") => set_string(&mut group, "--group", parser)?,
            Value(action) if rotate.is_none() => match action.to_str() {
                Some("create") => rotate = Some(false),
                Some("rotate") => rotate = Some(true),
                _ => return Err(format!("unknown action {action:?}: it must be create or rotate").into()),
            },
            other => return Err(other.unexpected().into()),
        }
    }
    let rotate = rotate.ok_or("an action is missing: create or rotate")?;
    Ok(Options { config, rotate, file, group })
}

/// The command; the result is the exit code.
pub(super) fn main(options: &Options) -> u8 {
    let path = match &options.file {
        Some(path) => path.clone(),
        None => match default_file(options.config.clone()) {
            Ok(path) => path,
            Err(exit_code) => return exit_code,
        },
    };
    match write(&path, options) {
        Ok(told) => {
            let source = Source::File { path, default: false };
            source.complaints().iter().for_each(|complaint| complain(&format_args!("warning: {complaint}")));
            print(told.as_bytes())
        }
        Err(message) => {
            complain(&message);
            FAILED
        }
    }
}

fn default_file(config: Option<PathBuf>) -> Result<PathBuf, u8> {
    let loaded = load(config)?;
    let source = Source::find(&loaded.config.server.ssrf_env_variables, &|name| std::env::var_os(name));
    match source {
        Ok(Source::File { path, .. }) => Ok(path),
        Ok(Source::Value { variable, .. }) => {
            complain(&format_args!(
                "environment variable {variable} holds the token itself, so there is no file; name one with --file"
            ));
            Err(USAGE)
        }
        Err(error) => {
            complain(&error);
            Err(USAGE)
        }
    }
}

fn write(path: &Path, options: &Options) -> Result<String, String> {
    let gid = options.group.as_deref().map(group_id).transpose()?;
    let mut random = Random::from_system().map_err(|_| "the operating system gives no random bytes")?;
    let path_shown = path.display();
    if options.rotate {
        token::rotate(path, gid, &mut random).map_err(text)?;
        return Ok(format!("wrote a new token to {path_shown}\n"));
    }
    match token::create(path, gid, &mut random).map_err(text)? {
        Created::Fresh => Ok(format!("wrote a new token to {path_shown}\n")),
        Created::Kept { gid: group } => {
            if let (Some(wanted), Some(name)) = (gid.filter(|wanted| *wanted != group), &options.group) {
                complain(&format_args!(
                    "warning: the group of the token file {path_shown} is {group}, not {name} ({wanted}); run: chgrp {name} {path_shown}"
                ));
            }
            Ok(format!("kept the valid token in {path_shown}\n"))
        }
    }
}

fn group_id(group: &str) -> Result<u32, String> {
    match group.parse() {
        // The kernel takes the highest number for "leave it as it is".
        Ok(u32::MAX) => return Err(format!("--group {group}: this number cannot be a group's")),
        Ok(gid) => return Ok(gid),
        Err(_) => {}
    }
    let groups =
        fs::read_to_string(GROUPS).map_err(|error| format!("cannot read {GROUPS}: {}", Reason(&error)))?;
    find_group(&groups, group).ok_or_else(|| {
        format!("there is no group {group} in {GROUPS}; run: groupadd {group}, or give the number of a group")
    })
}

/// The id of a group by its name, see group(5).
fn find_group(groups: &str, wanted: &str) -> Option<u32> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(wanted)).then(|| fields.nth(1)?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_by_name() {
        let groups = "root:x:0:\nkms:x:12:a,b\nodd\nbad:x:y:\n";
        for (name, gid) in [("root", Some(0)), ("kms", Some(12)), ("odd", None), ("bad", None), ("k", None)] {
            assert_eq!(find_group(groups, name), gid, "{name}");
        }
        assert_eq!(group_id("4711"), Ok(4711));
        assert!(group_id("4294967295").is_err());
    }
}
