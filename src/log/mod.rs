//! The process's log: where the agent's records go, and what keeps them harmless.
//!
//! Records go to standard error (`LogPath = "-"`) or to `<LogPath>/kms-agent.log`, rotated by size.
//! With a file, warnings and errors go to standard error too, so that `journalctl` shows them. To the journal
//! they go with its priority and without a time of their own.
//!
//! Nothing here may stop the agent from serving: lines wait in a bounded buffer, a write that fails
//! is tried again a second later, and what no longer fits meanwhile is counted and left out. Only a
//! standard error that is a full pipe can block, as for every program that writes to one.
//!
//! Rotation is our own (`LogFile`), for what the crates for it bring along: file-rotate 0.8 chrono and
//! flate2, rolling-file 0.2 chrono, logroller 0.1 chrono, flate2 and regex; and none of them goes on where a
//! full disk cut a line. So is the `log::Log` behind it, which writes each line straight into the buffer:
//! simplelog 0.12, used before, took 13,800 instructions for a request's line, this takes 2,250 (callgrind).

mod file;
mod text;

pub use text::{LeftOut, RateLimit, escape};

use file::{Lines, LogFile, Notice, Output, Stderr, create_folder};
use text::{Prefix, put_line};

use std::fmt::{self, Display};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::time::{Clock, Mono};

/// Name of the log file in the folder `LogPath`.
pub const FILE_NAME: &str = "kms-agent.log";
/// Mode of a log folder that is created.
pub const FOLDER_MODE: u32 = 0o750;
/// Mode of a log file that is created.
pub const FILE_MODE: u32 = 0o640;
/// Most backups that `LogBackupFiles` may ask for.
pub const BACKUP_FILES_MAX: u32 = 100;
/// Bytes of whole lines that wait for the next flush, or for a full disk to have room again.
pub const BUFFER_BYTES_MAX: usize = 32 * 1024;
/// Bytes of a record's text, escaped; the rest is cut off.
pub const RECORD_BYTES_MAX: usize = 4096;
/// Characters of foreign text that [`escape`] lets through; the rest is cut off.
pub const ESCAPE_CHARS_MAX: usize = 256;
/// Between two tries to write after a failure, and between two looks whether the log file is still
/// the one at its path.
pub const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// First segment of the targets of our own records (library and binary have the same name).
const OWN_TARGET: &str = env!("CARGO_CRATE_NAME");
/// Marks text that was cut.
const ELLIPSIS: char = '…';

/// The `[Log]` section of the configuration, which also calls it `config::Log`. It lives here
/// because imports point one way: `config` knows `log`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// `LogLevel`: most detailed level that is written. Records of other crates never go below warn.
    pub level: LevelFilter,
    /// `LogPath`: where to.
    pub path: LogPath,
    /// `LogFileSizeMB`: most MiB of a log file; one that would grow past it is rotated first.
    pub file_size_mb: u32,
    /// `LogBackupFiles`: how many rotated files are kept; 0: the file is emptied instead.
    pub backup_files: u32,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            level: LevelFilter::Debug,
            path: LogPath::Folder(PathBuf::from("./logs/")),
            file_size_mb: 100,
            backup_files: 2,
        }
    }
}

/// Where the log goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogPath {
    /// `"-"`: standard error.
    Stderr,
    /// [`FILE_NAME`] in this folder, as written: a relative one is relative to the working directory.
    Folder(PathBuf),
}

/// Why [`init`] failed.
#[derive(Debug)]
pub enum LogError {
    /// The folder does not exist and cannot be created.
    Folder {
        /// `LogPath`, as written.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The file in it cannot be created or opened.
    File {
        /// `LogPath`, as written.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// A logger is already set up in this process.
    AlreadySet,
}

impl Display for LogError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LogError::Folder { path, error } => {
                write!(f, "LogPath {}: cannot create this folder: {}", path.display(), Reason(error))
            }
            LogError::File { path, error } => {
                write!(f, "LogPath {}: cannot create {FILE_NAME}: {}", path.display(), Reason(error))
            }
            LogError::AlreadySet => f.write_str("the log is already set up"),
        }
    }
}

impl std::error::Error for LogError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            LogError::Folder { error, .. } | LogError::File { error, .. } => Some(error),
            LogError::AlreadySet => None,
        }
    }
}

/// An [`io::Error`] for a message: without the ` (os error 13)` that Rust adds.
#[derive(Debug)]
pub struct Reason<'a>(pub &'a io::Error);

impl Display for Reason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.to_string();
        f.write_str(text.split_once(" (os error").map_or(&*text, |(reason, _)| reason))
    }
}

/// Sets up the process's log. Once a process.
///
/// Keep the handle: records reach their file when [`LogHandle::flush`] is called, at once when they
/// are warnings or errors, and when the handle is dropped.
///
/// # Errors
/// If the folder or file of `LogPath` cannot be created, or a logger is already set.
pub fn init(settings: &Settings) -> Result<LogHandle, LogError> {
    let (logger, handle) = build(settings, stderr_is_journal())?;
    // A file that would grow past RLIMIT_FSIZE is a write that fails, as on a full disk; without a handler
    // the signal for it ends the process.
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::new(AtomicBool::new(false)));
    log::set_boxed_logger(Box::new(logger)).map_err(|_| LogError::AlreadySet)?;
    log::set_max_level(settings.level);
    Ok(handle)
}

/// What [`init`] sets up, not yet made the process's own. `journal`: standard error is read by journald.
fn build(settings: &Settings, journal: bool) -> Result<(Logger, LogHandle), LogError> {
    let prefix = if journal { Prefix::Priority } else { Prefix::Time };
    let stderr = Sink::new(Box::new(Stderr), prefix);
    let (main, alarms) = match &settings.path {
        LogPath::Stderr => (stderr, None),
        LogPath::Folder(folder) => {
            let mut file = LogFile::new(folder, settings);
            create_folder(folder).map_err(|error| LogError::Folder { path: folder.clone(), error })?;
            file.open().map_err(|error| LogError::File { path: folder.clone(), error })?;
            (Sink::new(Box::new(file), Prefix::Time), Some(stderr))
        }
    };
    let handle = LogHandle { main: main.clone() };
    Ok((Logger { level: settings.level, main, alarms }, handle))
}

/// `true` if standard error goes to journald: `JOURNAL_STREAM` names its device and inode
/// (systemd.exec(5)). Only to compare them tells a redirected standard error apart.
fn stderr_is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    rustix::fs::fstat(io::stderr()).is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// The process's logger: decides which records are written, and makes one line of each.
struct Logger {
    level: LevelFilter,
    main: Sink,
    /// Standard error, for warnings and errors, when the log itself goes to a file.
    alarms: Option<Sink>,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let level = metadata.level();
        level <= self.level && (level <= Level::Warn || is_own(metadata.target()))
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        self.main.put(record);
        if record.level() <= Level::Warn {
            self.main.flush();
            if let Some(alarms) = &self.alarms {
                alarms.put(record);
                alarms.flush();
            }
        }
    }

    fn flush(&self) {
        self.main.flush();
    }
}

/// `true` for a record of our own crate.
fn is_own(target: &str) -> bool {
    target.strip_prefix(OWN_TARGET).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// The process's log, for the event loop.
#[derive(Debug)]
pub struct LogHandle {
    main: Sink,
}

impl LogHandle {
    /// Hands the waiting lines to the system. To be called once a tick; without waiting lines it
    /// costs an uncontended lock. Says in the log (so at least on standard error) when
    /// writing begins to fail, and once it works again how many lines were lost.
    pub fn flush(&self) {
        let notice = {
            let mut lines = self.main.lock();
            if !lines.buffer.is_empty() {
                lines.flush(self.main.now());
            }
            lines.notice.take()
        };
        match notice {
            None => {}
            Some(Notice::Failing(reason)) => {
                log::warn!("cannot write the log: {reason}; trying again every second");
            }
            Some(Notice::Works { lost }) => {
                log::warn!("the log can be written again; {lost} lines were lost")
            }
        }
    }

    /// Flushes, closes the log file and opens it afresh (SIGHUP, after others moved it away). If
    /// that fails, it is tried again like every failed write. Nothing to do on standard error.
    pub fn reopen(&self) {
        let now = self.main.now();
        let mut lines = self.main.lock();
        lines.flush(now);
        lines.reopen(now);
    }

    /// Lines that could not be written since the start.
    #[must_use]
    pub fn lost_lines(&self) -> u64 {
        self.main.lock().lost
    }
}

impl Drop for LogHandle {
    fn drop(&mut self) {
        let now = self.main.now();
        self.main.lock().flush(now);
    }
}

/// An output with its buffer and the way its lines begin. Clones write to the same [`Lines`].
#[derive(Clone, Debug)]
struct Sink {
    lines: Arc<Mutex<Lines>>,
    clock: Clock,
}

impl Sink {
    #[expect(clippy::disallowed_methods, reason = "it puts the time on each line, and retries writing")]
    fn new(out: Box<dyn Output>, prefix: Prefix) -> Sink {
        Sink { lines: Arc::new(Mutex::new(Lines::new(out, prefix))), clock: Clock::start() }
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Mono {
        self.clock.now().mono
    }

    /// Makes a line of the record, which waits for the next flush.
    fn put(&self, record: &Record<'_>) {
        let unix_ms = self.clock.unix_ms();
        let origin = Some(record.target()).filter(|target| !is_own(target));
        let mut lines = self.lock();
        let full = !lines.put(|buffer, stamp, prefix| {
            prefix.put(buffer, stamp, unix_ms, record.level());
            put_line(buffer, origin, record.args());
        });
        if full {
            lines.retry(self.now());
        }
    }

    fn flush(&self) {
        let now = self.now();
        self.lock().flush(now);
    }
}

#[cfg(test)]
mod tests;
