//! The token that clients have to show: where it comes from, and how its file is made.

use crate::log::Reason;
use crate::random::Random;
use crate::secret::Secret;
use crate::text::hex;
use rustix::fs::{Gid, Mode, OFlags};
use std::ffi::OsString;
use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Where the token is if no variable says otherwise.
pub(crate) const DEFAULT_FILE: &str = "/var/run/kmstoken";
/// A larger file is not a token's.
pub const FILE_BYTES_MAX: u64 = 4096;
/// Owner: read and write; group, which applications join: read.
const FILE_MODE: u32 = 0o640;
/// Before the group is set: the owner alone.
const UNFINISHED_MODE: u32 = 0o600;

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
                write!(f, "cannot read the token file {}: {}", path.display(), Reason(error))
            }
            TokenError::Create(path, error) => {
                write!(f, "cannot create the token file {}: {}", path.display(), Reason(error))
            }
            TokenError::Variable(name, what) => write!(f, "environment variable {name}: {what}"),
        }
    }
}

/// Where a process finds its token; the same rule for the daemon and its command line.
#[derive(Debug)]
pub(crate) enum Source {
    Value {
        variable: String,
        token: Secret,
    },
    /// In a file; the daemon makes the default one if it is not there.
    File {
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
    /// Errors: when its value can be neither, or is the bare path of something that exists.
    pub(crate) fn find(
        variables: &[String],
        env: &dyn Fn(&str) -> Option<OsString>,
    ) -> Result<Source, TokenError> {
        let Some((name, value)) = variables.iter().find_map(|name| env(name).map(|value| (name, value)))
        else {
            return Ok(Source::File { path: DEFAULT_FILE.into(), default: true });
        };
        let Ok(value) = value.into_string() else {
            return Err(TokenError::Variable(name.clone(), "its value is not UTF-8 text"));
        };
        match value.strip_prefix("file://") {
            Some(path) if path.starts_with('/') => Ok(Source::File { path: path.into(), default: false }),
            Some(_) => Err(TokenError::Variable(
                name.clone(),
                "after file:// it must have an absolute path: file:///path",
            )),
            None if value.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("file:")) => Err(
                TokenError::Variable(name.clone(), "to name a file it must be file:///path, in lower case"),
            ),
            // A token that everybody can guess, and surely not what was meant.
            None if value.starts_with('/') && Path::new(value.trim_end()).exists() => {
                Err(TokenError::Variable(
                    name.clone(),
                    "its value is the path of a file; to name a file it must be file:///path",
                ))
            }
            None => match parse(value.as_bytes()) {
                Ok(token) => Ok(Source::Value { variable: name.clone(), token }),
                Err(what) => Err(TokenError::Variable(name.clone(), what)),
            },
        }
    }

    /// The token as it is now.
    /// Errors: when the file cannot be read.
    pub(crate) fn read(&self) -> Result<Secret, TokenError> {
        match self {
            Source::Value { token, .. } => Ok(token.duplicate()),
            Source::File { path, .. } => {
                read(path).map(|(token, _)| token).map_err(|error| TokenError::Read(path.clone(), error))
            }
        }
    }

    /// What is wrong with the file's owner and mode, one message each, for a warning; nothing, where it cannot
    /// be looked at or there is none.
    pub(crate) fn complaints(&self) -> Vec<String> {
        match self {
            Source::Value { .. } => Vec::new(),
            Source::File { path, .. } => std::fs::metadata(path)
                .map_or_else(|_| Vec::new(), |it| complaints(path, &it, rustix::process::geteuid().as_raw())),
        }
    }
}

/// Whom a token file lets in who should not be: `uid` is who asks, and may own it as well as root.
fn complaints(path: &Path, file: &Metadata, uid: u32) -> Vec<String> {
    let (path, mode, owner) = (path.display(), file.mode() & 0o7777, file.uid());
    let mut found = Vec::new();
    if mode & 0o007 != 0 {
        found.push(format!(
            "token file {path}: its mode {mode:04o} lets every user of this host access the token; run: chmod {FILE_MODE:o} {path}"
        ));
    } else if mode & 0o020 != 0 {
        found.push(format!(
            "token file {path}: its mode {mode:04o} lets its group replace the token; run: chmod {FILE_MODE:o} {path}"
        ));
    }
    if owner != 0 && owner != uid {
        found.push(format!(
            "token file {path}: it belongs to user {owner}, who can replace the token; run: chown root {path}"
        ));
    }
    found
}

fn read(path: &Path) -> io::Result<(Secret, Metadata)> {
    // A FIFO or a device would keep the reader waiting; `O_NONBLOCK` changes nothing for a file.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    // Never grows: a vector that moves leaves its old bytes behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(2 * 4096));
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    let token = parse(&bytes).map_err(|problem| io::Error::new(io::ErrorKind::InvalidData, problem))?;
    Ok((token, metadata))
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
        Err("it holds characters that an HTTP header cannot carry")
    }
}

/// What [`create`] found and did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Created {
    /// There is a fresh token now.
    Fresh,
    /// A valid token was there and stays.
    Kept { gid: u32 },
}

/// Makes sure that there is a token: a valid file stays as it is, an empty or unusable one is replaced, and
/// where there is none, one is made as by [`rotate`].
/// Errors: when it cannot be made, or something is there that no token file is: it stays.
pub(crate) fn create(path: &Path, gid: Option<u32>, random: &mut Random) -> Result<Created, TokenError> {
    match read(path) {
        Ok((token, file)) if !token.is_empty() => return Ok(Created::Kept { gid: file.gid() }),
        // Who may not read it cannot know that it is unusable.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Err(TokenError::Read(path.to_path_buf(), error));
        }
        _ => {}
    }
    if link_fresh(path, gid, random)? {
        return Ok(Created::Fresh);
    }
    // Somebody else may have been faster.
    match read(path) {
        Ok((token, file)) if !token.is_empty() => Ok(Created::Kept { gid: file.gid() }),
        _ => rotate(path, gid, random).map(|()| Created::Fresh),
    }
}

/// Puts a fresh token in the place of `path`, which need not be there: a 256-bit one in hex, mode 0640, with
/// this group, else that of the file that was there, else that of the process. No line end: clients that put the file's content into a header as it
/// is are right, too. At no instant can others read it, and nobody sees half of it: it is written under
/// another name and gets that of `path` when all is done.
/// Errors: when the folder cannot be written to or the group not be given; when `path` is something else than a
/// regular file: a device or a link is not replaced.
pub(crate) fn rotate(path: &Path, gid: Option<u32>, random: &mut Random) -> Result<(), TokenError> {
    let failed = |error: io::Error| TokenError::Create(path.to_path_buf(), error);
    let there = std::fs::symlink_metadata(path).ok();
    let strange = match &there {
        Some(file) if file.is_symlink() => {
            Some("it is a symbolic link; name the file that the link leads to")
        }
        Some(file) if !file.is_file() => {
            Some("something other than a regular file is there, and it is not replaced")
        }
        _ => None,
    };
    if let Some(strange) = strange {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, strange)));
    }
    // Who could read the old token needs the new one.
    let gid = gid.or(there.map(|file| file.gid()));
    write_fresh(path, gid, random, |temporary| std::fs::rename(temporary, path)).map_err(failed)
}

/// Makes a token file as [`rotate`] does, unless `path` is there, whatever it is; `false`: it is.
///
/// # Errors
/// When the folder cannot be written to.
pub fn create_if_missing(path: &Path, random: &mut Random) -> Result<bool, TokenError> {
    link_fresh(path, None, random)
}

fn link_fresh(path: &Path, gid: Option<u32>, random: &mut Random) -> Result<bool, TokenError> {
    if path.exists() {
        return Ok(false);
    }
    // A link, unlike a rename, never replaces what somebody put there meanwhile.
    let linked = write_fresh(path, gid, random, |temporary| std::fs::hard_link(temporary, path));
    match linked {
        Ok(()) => Ok(true),
        // Somebody else was faster; theirs is as good.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(TokenError::Create(path.to_path_buf(), error)),
    }
}

/// Writes a fresh token beside `path`, complete with group and mode; `place` then gives it its name.
fn write_fresh(
    path: &Path,
    gid: Option<u32>,
    random: &mut Random,
    place: impl FnOnce(&Path) -> io::Result<()>,
) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{:016x}", random.next_u64()));
    let temporary = PathBuf::from(name);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::open(&temporary, flags, Mode::from_raw_mode(UNFINISHED_MODE))?;
    let mut bytes = Zeroizing::new([0_u8; 32]);
    let placed = ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), bytes.as_mut())
        .map_err(|_| io::Error::other("the operating system gives no random bytes"))
        .and_then(|()| {
            let token = Zeroizing::new(hex(bytes.as_ref()));
            if let Some(gid) = gid.filter(|gid| rustix::fs::fstat(&file).map(|it| it.st_gid) != Ok(*gid)) {
                rustix::fs::fchown(&file, None, Some(Gid::from_raw(gid))).map_err(|error| {
                    let error = io::Error::from(error);
                    io::Error::new(
                        error.kind(),
                        format!("cannot give it the group {gid}: {}", Reason(&error)),
                    )
                })?;
            }
            // After the group, so that no other one may read; not by open, whose mode the umask cuts.
            rustix::fs::fchmod(&file, Mode::from_raw_mode(FILE_MODE))?;
            let mut file = File::from(file);
            file.write_all(token.as_bytes())?;
            file.sync_all()
        })
        .and_then(|()| place(&temporary));
    // Gone already, if it was renamed.
    let _ = std::fs::remove_file(&temporary);
    placed
}

/// Watches the source for the daemon: a changed token is taken up, an empty or unreadable file keeps the
/// last good one.
#[derive(Debug)]
pub(crate) struct Watch {
    source: Source,
    last: Secret,
    complained: bool,
}

impl Watch {
    /// `last`: the token in use.
    pub(crate) const fn new(source: Source, last: Secret) -> Watch {
        Watch { source, last, complained: false }
    }

    /// The token, if it is another one than before.
    pub(crate) fn poll(&mut self) -> Option<Secret> {
        let Source::File { path, .. } = &self.source else { return None };
        let complaint = match read(path) {
            Ok((token, _)) if token.is_empty() => "it is empty".to_owned(),
            Ok((token, _)) => {
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
        let bare_path = with(Some("/dev/null\n"), None).unwrap_err().to_string();
        assert!(
            bare_path.starts_with("environment variable A: ") && bare_path.contains("file:///path"),
            "{bare_path}"
        );
        assert!(with(Some("/no/such/file"), None).unwrap().read().unwrap().ct_eq(b"/no/such/file"));
    }

    fn token_in(path: &Path) -> Secret {
        read(path).unwrap().0
    }

    #[test]
    fn a_created_file_is_private_and_stays() {
        let folder = folder("create");
        let path = folder.join("kmstoken");
        let mut random = Random::from_seed(1);
        assert!(create_if_missing(&path, &mut random).unwrap());
        let token = token_in(&path);
        assert_eq!(token.expose().len(), 64);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 64, "nothing to be trimmed");
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
        assert!(!create_if_missing(&path, &mut random).unwrap());
        assert!(matches!(create(&path, None, &mut random).unwrap(), Created::Kept { .. }));
        assert!(token_in(&path).ct_eq(token.expose()));
        rotate(&path, None, &mut random).unwrap();
        assert!(!token_in(&path).ct_eq(token.expose()) && token_in(&path).expose().len() == 64);
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "no temporary file is left");
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn create_replaces_what_is_no_token_and_nothing_else() {
        let folder = folder("replace");
        let mut random = Random::from_seed(2);
        for (name, content) in [("empty", " \n"), ("two-lines", "a\nb"), ("large", &"x".repeat(5000))] {
            let path = folder.join(name);
            std::fs::write(&path, content).unwrap();
            assert_eq!(create(&path, None, &mut random).unwrap(), Created::Fresh, "{name}");
            assert_eq!(token_in(&path).expose().len(), 64, "{name}");
            assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o640, "{name}");
        }
        let [fifo, link] = ["fifo", "link"].map(|name| folder.join(name));
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RUSR, 0).unwrap();
        std::os::unix::fs::symlink("nowhere", &link).unwrap();
        for path in [&fifo, &link, &folder] {
            let before = std::fs::symlink_metadata(path).unwrap().ino();
            assert!(create(path, None, &mut random).is_err(), "{}", path.display());
            assert!(rotate(path, None, &mut random).is_err(), "{}", path.display());
            assert_eq!(std::fs::symlink_metadata(path).unwrap().ino(), before, "{}", path.display());
        }
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 5, "no temporary file is left");
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_fifo_or_device_does_not_keep_the_reader_waiting() {
        let folder = folder("fifo");
        let fifo = folder.join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RUSR, 0).unwrap();
        for path in [fifo.as_path(), Path::new("/dev/zero"), &folder] {
            let error = read(path).unwrap_err().to_string();
            assert!(error.contains("not a regular file"), "{}: {error}", path.display());
        }
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn owner_and_mode_are_looked_at() {
        let folder = folder("complaints");
        let path = folder.join("kmstoken");
        std::fs::write(&path, "x").unwrap();
        let me = std::fs::metadata(&path).unwrap().uid();
        for (mode, uid, parts) in [
            (0o640, me, &[][..]),
            (0o400, me, &[]),
            (0o644, me, &["0644 lets every user"]),
            (0o641, me, &["every user"]),
            (0o660, me, &["0660 lets its group replace"]),
        ] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let found = complaints(&path, &std::fs::metadata(&path).unwrap(), uid);
            assert_eq!(found.len(), parts.len(), "{mode:o}: {found:?}");
            assert!(found.iter().zip(parts).all(|(it, part)| it.contains(part)), "{mode:o}: {found:?}");
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let file = std::fs::metadata(&path).unwrap();
        let found = complaints(&path, &file, me + 1);
        assert_eq!(found.len(), usize::from(me != 0), "root's is fine for everybody: {found:?}");
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
