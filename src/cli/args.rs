//! What the arguments of all commands have in common.

use std::fmt::Display;
use std::path::PathBuf;

/// Why a command's arguments give no options.
pub(super) enum Stop {
    /// They ask for its help.
    Help,
    /// They are wrong; what is, in one line.
    Wrong(String),
}

impl<E: Display> From<E> for Stop {
    fn from(error: E) -> Stop {
        Stop::Wrong(error.to_string())
    }
}

/// The arguments of a command that takes `--config` alone, which may have come before its name.
pub(super) fn config_alone(
    parser: &mut lexopt::Parser,
    mut config: Option<PathBuf>,
) -> Result<Option<PathBuf>, Stop> {
    use lexopt::Arg::{Long, Short};
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => return Err(Stop::Help),
            Short('c') | Long("config") => set_path(&mut config, "--config", parser)?,
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(config)
}

pub(super) fn set_path(
    slot: &mut Option<PathBuf>,
    name: &str,
    parser: &mut lexopt::Parser,
) -> Result<(), Stop> {
    let value = parser.value()?;
    set(slot, name, PathBuf::from(value))
}

pub(super) fn set_string(
    slot: &mut Option<String>,
    name: &str,
    parser: &mut lexopt::Parser,
) -> Result<(), Stop> {
    let value = parser.value()?;
    set(slot, name, value.into_string().map_err(|value| format!("{name} {value:?} is not UTF-8 text"))?)
}

pub(super) fn set<T>(slot: &mut Option<T>, name: &str, value: T) -> Result<(), Stop> {
    if slot.replace(value).is_some() { Err(format!("{name} is given twice").into()) } else { Ok(()) }
}

pub(super) fn text(error: impl Display) -> String {
    error.to_string()
}
