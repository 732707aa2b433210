//! What is wrong with a configuration, for the person who wrote it.

use crate::log::Reason;
use std::fmt::{self, Display};
use std::io;
use std::path::PathBuf;

/// Something wrong in a configuration. Displays as one line:
/// `line 4: [Server] HttpPort = 70000: must be 0 to 65535`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Line of the file, from 1; `None`: it is about the whole file.
    pub line: Option<usize>,
    /// Section or key: `[Server]`, `[Server] HttpPort`.
    pub(crate) key: Option<String>,
    /// The wrong value as written, shortened. Not that of an unknown key: it may be a secret.
    pub(crate) found: Option<String>,
    /// What it must be.
    pub message: String,
}

impl Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        match (&self.key, &self.found) {
            (Some(key), Some(found)) => write!(f, "{key} = {found}: ")?,
            (Some(key), None) => write!(f, "{key}: ")?,
            (None, Some(found)) => write!(f, "{found}: ")?,
            (None, None) => {}
        }
        f.write_str(&self.message)
    }
}

/// Why [`super::load`] failed. Displays as one line, or one and one more for each problem.
#[derive(Debug)]
pub enum LoadError {
    /// The file cannot be read.
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The file was read, but it is wrong.
    Invalid {
        /// The file.
        path: PathBuf,
        /// Everything that is wrong in it, by line; at least one.
        problems: Vec<Problem>,
    },
}

impl Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LoadError::Read { path, error } => {
                write!(f, "cannot read the configuration {}: {}", path.display(), Reason(error))
            }
            LoadError::Invalid { path, problems } => {
                let plural = if problems.len() == 1 { "problem" } else { "problems" };
                write!(f, "{} {plural} in the configuration {}:", problems.len(), path.display())?;
                problems.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
            }
        }
    }
}
