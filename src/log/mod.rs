//! Set-up of `log` + `simplelog`: where the agent's records go, and what keeps them harmless.
//!
//! Records go to standard error (`LogPath = "-"`) or to `<LogPath>/kms-agent.log`, rotated by size.
//! With a file, warnings and errors go to standard error too, so that `journalctl` shows them.
//!
//! Nothing here may stop the agent from serving: lines wait in a bounded buffer, a write that fails
//! is tried again a second later, and what no longer fits meanwhile is counted and left out. Only a
//! standard error that is a full pipe can block, as for every program that writes to one.
//!
//! Rotation is our own (`LogFile`), for what the crates for it bring along: file-rotate 0.8 chrono and
//! flate2, rolling-file 0.2 chrono, logroller 0.1 chrono, flate2 and regex.

mod file;
mod text;

pub use text::{LeftOut, RateLimit, escape};

use file::{Lines, LogFile, Notice, Output, Stderr, create_folder};
use text::OneLine;

use std::fmt::{self, Display};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use log::{Level, LevelFilter, Log, Metadata, Record};
use simplelog::{ConfigBuilder, FormatItem, WriteLogger, format_description};

use crate::time::Clock;

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

/// RFC 3339 in UTC, to the millisecond.
const TIMESTAMP: &[FormatItem<'static>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
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
    log::set_boxed_logger(Box::new(logger)).map_err(|_| LogError::AlreadySet)?;
    log::set_max_level(settings.level);
    Ok(handle)
}

/// What [`init`] sets up, not yet made the process's own. `journal`: standard error is read by
/// journald, which puts its own time on each line.
fn build(settings: &Settings, journal: bool) -> Result<(Logger, LogHandle), LogError> {
    let stderr = Writer::new(Box::new(Stderr));
    let (main, alarms) = match &settings.path {
        LogPath::Stderr => (stderr, None),
        LogPath::Folder(folder) => {
            let mut file = LogFile::new(folder, settings);
            create_folder(folder).map_err(|error| LogError::Folder { path: folder.clone(), error })?;
            file.open().map_err(|error| LogError::File { path: folder.clone(), error })?;
            (Writer::new(Box::new(file)), Some(sink(stderr, !journal)))
        }
    };
    let handle = LogHandle { main: main.clone() };
    let with_time = alarms.is_some() || !journal;
    Ok((Logger { level: settings.level, main: sink(main, with_time), alarms }, handle))
}

/// `true` if standard error goes to journald: `JOURNAL_STREAM` names its device and inode
/// (systemd.exec(5)). Only to compare them tells a redirected standard error apart.
fn stderr_is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    rustix::fs::fstat(io::stderr()).is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// A simplelog logger that adds at most the time; the rest of the line is [`Logger`]'s.
fn sink(writer: Writer, with_time: bool) -> Box<WriteLogger<Writer>> {
    let config = ConfigBuilder::new()
        .set_time_level(if with_time { LevelFilter::Error } else { LevelFilter::Off })
        .set_time_format_custom(TIMESTAMP)
        .set_max_level(LevelFilter::Off)
        .set_thread_level(LevelFilter::Off)
        .set_target_level(LevelFilter::Off)
        .set_location_level(LevelFilter::Off)
        .build();
    WriteLogger::new(LevelFilter::Trace, config, writer)
}

/// The process's logger: decides which records are written, and makes one line of each.
struct Logger {
    level: LevelFilter,
    main: Box<WriteLogger<Writer>>,
    /// Standard error, for warnings and errors, when the log itself goes to a file.
    alarms: Option<Box<WriteLogger<Writer>>>,
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
        let level = record.level();
        let (origin, colon) = if is_own(record.target()) { ("", "") } else { (record.target(), ": ") };
        // The level is put here and not by simplelog, which allocates a string for it.
        let write = |sink: &WriteLogger<Writer>| {
            sink.log(
                &Record::builder()
                    .args(format_args!("{level:<5} {origin}{colon}{}", OneLine(record.args())))
                    .metadata(record.metadata().clone())
                    .build(),
            );
        };
        write(&self.main);
        if level <= Level::Warn {
            self.main.flush();
            if let Some(alarms) = &self.alarms {
                write(alarms);
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
    main: Writer,
}

impl LogHandle {
    /// Hands the waiting lines to the system. To be called once a tick; without waiting lines it
    /// costs an uncontended lock. Says in the log (so at least on standard error) when
    /// writing begins to fail, and once it works again how many lines were lost.
    pub fn flush(&self) {
        let notice = {
            let mut lines = self.main.lock();
            if !lines.buffer.is_empty() {
                lines.flush(self.main.clock.now().mono);
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
        let now = self.main.clock.now().mono;
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
        let now = self.main.clock.now().mono;
        self.main.lock().flush(now);
    }
}

/// What simplelog writes to: gathers its pieces into lines. Clones write to the same [`Lines`].
#[derive(Debug)]
struct Writer {
    /// The line so far.
    line: Vec<u8>,
    lines: Arc<Mutex<Lines>>,
    clock: Clock,
}

impl Writer {
    fn new(out: Box<dyn Output>) -> Writer {
        Writer { line: Vec::new(), lines: Arc::new(Mutex::new(Lines::new(out))), clock: Clock::start() }
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clone for Writer {
    fn clone(&self) -> Writer {
        Writer { line: Vec::new(), lines: Arc::clone(&self.lines), clock: self.clock }
    }
}

impl Write for Writer {
    /// Takes a piece of a line. A line break only ever ends a record: [`OneLine`] sees to that.
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        self.line.extend_from_slice(piece);
        if piece.ends_with(b"\n") {
            let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
            if !lines.push(&self.line) {
                lines.flush(self.clock.now().mono);
                if !lines.push(&self.line) {
                    lines.lost = lines.lost.saturating_add(1);
                }
            }
            drop(lines);
            self.line.clear();
        }
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.lock().flush(self.clock.now().mono);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
