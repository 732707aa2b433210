//! Which configuration a command works with.

use super::terminal::{USAGE, complain};
use crate::config::{self, Config, LoadError};
use std::path::PathBuf;

/// A configuration and where it is from.
pub(super) struct Loaded {
    pub(super) config: Config,
    /// `None`: the built-in defaults.
    pub(super) file: Option<PathBuf>,
}

/// The configuration of a command: the named file, else the default one, else the built-in defaults. A
/// problem is printed; the error is the exit code then.
pub(super) fn load(named: Option<PathBuf>) -> Result<Loaded, u8> {
    load_quietly(named).map_err(|error| {
        complain(&error);
        USAGE
    })
}

pub(super) fn load_quietly(named: Option<PathBuf>) -> Result<Loaded, LoadError> {
    let file = named.or_else(default_file);
    let config = file.as_deref().map_or_else(|| Ok(Config::default()), config::load)?;
    Ok(Loaded { config, file })
}

/// `config.toml` beside the folder of the binary, if it is there.
fn default_file() -> Option<PathBuf> {
    let exe = std::env::current_exe().ok()?;
    config::default_path(&exe).filter(|file| file.exists())
}
