//! The token that clients have to show: where it comes from, and how its file is made.

use crate::log::Reason;
use crate::random::Random;
use crate::secret::Secret;
use rustix::fs::{Mode, OFlags};
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Where the token is if no variable says otherwise.
pub const DEFAULT_FILE: &str = "/var/run/kmstoken";
/// A larger file is not a token's.
pub const FILE_BYTES_MAX: u64 = 4096;
/// Owner: read and write; group, which applications join: read.
const FILE_MODE: u32 = 0o640;

/// Why there is no token.
#[derive(Debug)]
pub enum TokenError {
    /// The file cannot be read.
    Read(PathBuf, io::Error),
    /// The file cannot be made.
    Create(PathBuf, io::Error),
    /// A variable's value is not what a token can be.
    Variable(String, &'static str),
}

impl fmt::Display for TokenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TokenError::Read(path, error) => {
                write!(f, "token file {}: cannot read it: {}", path.display(), Reason(error))
            }
            TokenError::Create(path, error) => {
                write!(f, "token file {}: cannot create it: {}", path.display(), Reason(error))
            }
            TokenError::Variable(name, what) => write!(f, "environment variable {name}: {what}"),
        }
    }
}

impl std::error::Error for TokenError {}

/// Where a process finds its token; the same rule for the daemon and its command line.
#[derive(Debug)]
pub enum Source {
    /// In a variable.
    Value {
        /// Its name.
        variable: String,
        /// The token.
        token: Secret,
    },
    /// In a file; the daemon makes the default one if it is not there.
    File {
        /// Which.
        path: PathBuf,
        /// Nothing named it: it is [`DEFAULT_FILE`].
        default: bool,
    },
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Value { variable, .. } => write!(f, "environment variable {variable}"),
            Source::File { path, .. } => path.display().fmt(f),
        }
    }
}

impl Source {
    /// The first of `variables` that is set wins: it holds the token, or `file:///path`.
    ///
    /// # Errors
    /// When its value can be neither.
    pub fn find(variables: &[String], env: &dyn Fn(&str) -> Option<OsString>) -> Result<Source, TokenError> {
        let Some((name, value)) = variables.iter().find_map(|name| env(name).map(|value| (name, value)))
        else {
            return Ok(Source::File { path: DEFAULT_FILE.into(), default: true });
        };
        let Ok(value) = value.into_string() else {
            return Err(TokenError::Variable(name.clone(), "its value is not UTF-8"));
        };
        match value.strip_prefix("file://") {
            Some(path) if path.starts_with('/') => Ok(Source::File { path: path.into(), default: false }),
            Some(_) => {
                Err(TokenError::Variable(name.clone(), "file:// must be followed by an absolute path"))
            }
            None if value.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("file:")) => {
                Err(TokenError::Variable(name.clone(), "a file is written file:///path, in lower case"))
            }
            None => match parse(value.as_bytes()) {
                Ok(token) => Ok(Source::Value { variable: name.clone(), token }),
                Err(what) => Err(TokenError::Variable(name.clone(), what)),
            },
        }
    }

    /// The token as it is now.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read(&self) -> Result<Secret, TokenError> {
        match self {
            Source::Value { token, .. } => Ok(token.duplicate()),
            Source::File { path, .. } => read(path).map_err(|error| TokenError::Read(path.clone(), error)),
        }
    }
}

fn read(path: &Path) -> io::Result<Secret> {
    // Never grows: a vector that moves leaves its old bytes behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(2 * 4096));
    File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    parse(&bytes).map_err(|problem| io::Error::new(io::ErrorKind::InvalidData, problem))
}

/// The token in a file's content: all of it, without the white space around it. Empty: there is none.
///
/// # Errors
/// What is wrong with the content, for a message.
pub fn parse(bytes: &[u8]) -> Result<Secret, &'static str> {
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err("it is over 4 KiB");
    }
    let token = bytes.trim_ascii();
    // What no header line can carry would lock everybody out.
    if token.iter().all(|byte| matches!(byte, b' '..=b'~')) {
        Ok(Secret::from(token))
    } else {
        Err("it holds characters that no header can carry")
    }
}

/// Writes a fresh 256-bit token in hex, unless the file is there. No line end: clients that put the file's
/// content into a header as it is are right, too. At no instant can others read it, and
/// nobody sees half of it: it is written under another name with its final mode, then linked to its own.
///
/// # Errors
/// When the folder cannot be written to.
pub fn create_if_missing(path: &Path, random: &mut Random) -> Result<bool, TokenError> {
    if path.exists() {
        return Ok(false);
    }
    let failed = |error: io::Error| TokenError::Create(path.to_path_buf(), error);
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{:016x}", random.next_u64()));
    let temporary = PathBuf::from(name);
    // A link, unlike a rename, never replaces what somebody put there meanwhile.
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::open(&temporary, flags, Mode::from_raw_mode(FILE_MODE))
        .map_err(|error| failed(error.into()))?;
    let mut bytes = Zeroizing::new([0_u8; 32]);
    let written = ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), bytes.as_mut())
        .map_err(|_| io::Error::other("the system gives no random bytes"))
        .and_then(|()| {
            let token = Zeroizing::new(crate::kms::sign::hex(bytes.as_ref()));
            // A umask would take the group's right away.
            rustix::fs::fchmod(&file, Mode::from_raw_mode(FILE_MODE))?;
            let mut file = File::from(file);
            file.write_all(token.as_bytes())?;
            file.sync_all()
        })
        .and_then(|()| match std::fs::hard_link(&temporary, path) {
            Ok(()) => Ok(true),
            // Somebody else was faster; theirs is as good.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error),
        });
    let _ = std::fs::remove_file(&temporary);
    written.map_err(failed)
}

/// Watches the source for the daemon: a changed token is taken up, an empty or unreadable file keeps the
/// last good one.
#[derive(Debug)]
pub struct Watch {
    source: Source,
    last: Secret,
    complained: bool,
}

impl Watch {
    /// `last`: the token in use.
    #[must_use]
    pub const fn new(source: Source, last: Secret) -> Watch {
        Watch { source, last, complained: false }
    }

    /// The token, if it is another one than before.
    pub fn poll(&mut self) -> Option<Secret> {
        let Source::File { path, .. } = &self.source else { return None };
        let complaint = match read(path) {
            Ok(token) if token.is_empty() => "it is empty".to_owned(),
            Ok(token) => {
                self.complained = false;
                if self.last.ct_eq(token.expose()) {
                    return None;
                }
                self.last = token.duplicate();
                return Some(token);
            }
            Err(error) => Reason(&error).to_string(),
        };
        if !self.complained && !self.last.is_empty() {
            self.complained = true;
            log::warn!("token file {}: {complaint}; the last good token stays in force", path.display());
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn folder(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("kms-agent-token-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn the_first_variable_that_is_set_wins() {
        let names = ["A".to_owned(), "B".to_owned()];
        let with = |a: Option<&str>, b: Option<&str>| {
            let (a, b) = (a.map(OsString::from), b.map(OsString::from));
            Source::find(&names, &move |name| if name == "A" { a.clone() } else { b.clone() })
        };
        assert!(with(Some(" x\n"), Some("y")).unwrap().read().unwrap().ct_eq(b"x"));
        assert!(
            matches!(with(None, Some("file:///p")).unwrap(), Source::File { path, default: false } if path == Path::new("/p"))
        );
        assert!(matches!(with(None, None).unwrap(), Source::File { default: true, .. }));
        assert!(with(Some(""), Some("y")).unwrap().read().unwrap().is_empty(), "set, though empty");
        assert!(with(Some("file:/p"), None).is_err() && with(Some("FILE:///p"), None).is_err());
        assert!(with(Some("a\tb"), None).is_err());
        assert!(with(Some("file://p"), None).unwrap_err().to_string().contains("absolute path"));
    }

    #[test]
    fn a_created_file_is_private_and_stays() {
        let folder = folder("create");
        let path = folder.join("kmstoken");
        let mut random = Random::from_seed(1);
        assert!(create_if_missing(&path, &mut random).unwrap());
        let token = read(&path).unwrap();
        assert_eq!(token.expose().len(), 64);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 64, "nothing to be trimmed");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o137, 0);
        assert!(!create_if_missing(&path, &mut random).unwrap());
        assert!(read(&path).unwrap().ct_eq(token.expose()));
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "no temporary file is left");
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_file_is_followed_and_the_last_good_token_kept() {
        let folder = folder("watch");
        let path = folder.join("kmstoken");
        std::fs::write(&path, "one\n").unwrap();
        let source = Source::File { path: path.clone(), default: false };
        let first = source.read().unwrap();
        let mut watch = Watch::new(source, first);
        assert!(watch.poll().is_none());
        std::fs::write(&path, " two ").unwrap();
        assert!(watch.poll().unwrap().ct_eq(b"two"));
        std::fs::write(&path, " \n").unwrap();
        assert!(watch.poll().is_none());
        std::fs::remove_file(&path).unwrap();
        assert!(watch.poll().is_none());
        std::fs::write(&path, "two").unwrap();
        assert!(watch.poll().is_none(), "the same again");
        std::fs::write(&path, "x".repeat(5000)).unwrap();
        assert!(watch.poll().is_none(), "too large");
        std::fs::write(&path, "thr\nee").unwrap();
        assert!(watch.poll().is_none(), "two lines");
        std::fs::write(&path, "three").unwrap();
        assert!(watch.poll().unwrap().ct_eq(b"three"));
        std::fs::remove_dir_all(folder).unwrap();
    }
}
