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
//! simplelog makes the lines, `2026-01-31T12:34:56.789Z [INFO] server: what happened`. One takes it some 4,300
//! instructions (callgrind), of which time and level are 2,900. All lines of one second, level and target begin alike
//! but for the milliseconds, so the first of them gives its head to the others: they take 1,400.
//!
//! Where lines wait and end up is our own. So is the rotation (`LogFile`), for what the crates for it bring along:
//! file-rotate 0.8 chrono and flate2, rolling-file 0.2 chrono, logroller 0.1 chrono, flate2 and regex; and none of
//! them goes on where a full disk cut a line.

mod file;
mod sink;
mod text;

pub(crate) use crate::text::escape;
pub use text::{LeftOut, RateLimit};

use file::{LogFile, create_folder};
use sink::{Notice, Output, Sink, Sinks};
use text::{Head, put_text};

use std::fmt::{self, Display};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use log::{Level, LevelFilter, Log, Metadata, Record};
use simplelog::WriteLogger;

use crate::time::Clock;

/// Name of the log file in the folder `LogPath`.
pub const FILE_NAME: &str = "kms-agent.log";
/// Mode of a log folder that is created.
pub const FOLDER_MODE: u32 = 0o750;
/// Mode of a log file that is created.
pub const FILE_MODE: u32 = 0o640;
/// Most backups that `LogBackupFiles` may ask for.
pub const BACKUP_FILES_MAX: u32 = 100;
/// Bytes of whole lines that wait for a full disk to have room again.
pub const BUFFER_BYTES_MAX: usize = 32 * 1024;
/// Bytes of a record's text, escaped; the rest is cut off.
pub const RECORD_BYTES_MAX: usize = 4096;
/// Bytes of lines after which they do not wait for the end of a tick.
const BATCH_BYTES: usize = 8 * 1024;
/// Between two tries to write after a failure, and between two looks whether the log file is still
/// the one at its path.
pub const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// First segment of the targets of our own records (library and binary have the same name).
const OWN_TARGET: &str = env!("CARGO_CRATE_NAME");

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
    let handle = build(settings, stderr_is_journal())?;
    // A file that would grow past RLIMIT_FSIZE is a write that fails, as on a full disk; without a handler
    // the signal for it ends the process.
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::new(AtomicBool::new(false)));
    log::set_boxed_logger(Box::new(Arc::clone(&handle.logger))).map_err(|_| LogError::AlreadySet)?;
    log::set_max_level(settings.level);
    Ok(handle)
}

/// What [`init`] sets up, not yet made the process's own. `journal`: standard error is read by journald.
#[expect(clippy::disallowed_methods, reason = "outputs that failed are tried again after a while")]
fn build(settings: &Settings, journal: bool) -> Result<LogHandle, LogError> {
    let stderr = Sink::new(Output::Stderr, journal);
    let (main, alarms) = match &settings.path {
        LogPath::Stderr => (stderr, None),
        LogPath::Folder(folder) => {
            let mut file = LogFile::new(folder, settings);
            create_folder(folder).map_err(|error| LogError::Folder { path: folder.clone(), error })?;
            file.open().map_err(|error| LogError::File { path: folder.clone(), error })?;
            (Sink::new(Output::File(file), false), Some(stderr))
        }
    };
    Ok(LogHandle::new(settings.level, Sinks { main, alarms, clock: Clock::start() }))
}

/// `true` if standard error goes to journald: `JOURNAL_STREAM` names its device and inode
/// (systemd.exec(5)). Only to compare them tells a redirected standard error apart.
fn stderr_is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    rustix::fs::fstat(io::stderr()).is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// The process's logger: decides which records are written, and has simplelog make lines of them.
struct Logger {
    level: LevelFilter,
    simplelog: Box<WriteLogger<Made>>,
    made: Made,
    clock: Clock,
    batch: Mutex<Batch>,
    sinks: Arc<Mutex<Sinks>>,
}

impl Logger {
    #[expect(clippy::disallowed_methods, reason = "it puts the time on each line")]
    fn new(level: LevelFilter, sinks: Arc<Mutex<Sinks>>) -> Logger {
        let made = Made::default();
        let batch = Batch { head: Head::none(), lines: Vec::new(), alarms: Vec::new() };
        Logger {
            level,
            simplelog: WriteLogger::new(level, text::layout(), made.clone()),
            made,
            clock: Clock::start(),
            batch: Mutex::new(batch),
            sinks,
        }
    }

    fn hand_over(&self, batch: &mut Batch) {
        if !batch.lines.is_empty() {
            lock(&self.sinks).write(&batch.lines, &batch.alarms);
            batch.lines.clear();
            batch.alarms.clear();
        }
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let level = metadata.level();
        level <= self.level && (level <= Level::Warn || room(metadata.target()).is_some())
    }

    fn log(&self, record: &Record<'_>) {
        let (level, room) = (record.level(), room(record.target()));
        if level > self.level || (level > Level::Warn && room.is_none()) {
            return;
        }
        let target = room.unwrap_or_else(|| first_segment(record.target()));
        let unix_ms = self.clock.unix_ms();
        let mut batch = lock(&self.batch);
        let Batch { head, lines, alarms } = &mut *batch;
        let begin = lines.len();
        if head.put(lines, unix_ms, level, target) {
            put_text(lines, *record.args());
            lines.push(b'\n');
        } else {
            let mut text = Vec::new();
            put_text(&mut text, *record.args());
            let args = format_args!("{}", String::from_utf8_lossy(&text));
            self.simplelog.log(&Record::builder().level(level).target(target).args(args).build());
            let mut made = lock(&self.made.0);
            let (made_head, _) = made.split_at(made.len().saturating_sub(text.len().saturating_add(1)));
            head.learn(made_head, unix_ms, level, target);
            lines.append(&mut made);
        }
        if level <= Level::Warn {
            alarms.extend_from_slice(lines.get(begin..).unwrap_or_default());
        }
        if level <= Level::Warn || lines.len() >= BATCH_BYTES {
            self.hand_over(&mut batch);
        }
    }

    fn flush(&self) {
        self.hand_over(&mut lock(&self.batch));
    }
}

/// The module of our own crate that a record is from, the outermost one; `None` for another crate's record.
fn room(target: &str) -> Option<&str> {
    let rest = target.strip_prefix(OWN_TARGET)?;
    if rest.is_empty() { Some(OWN_TARGET) } else { rest.strip_prefix("::").map(first_segment) }
}

fn first_segment(path: &str) -> &str {
    let end = path.bytes().position(|byte| byte == b':');
    end.and_then(|end| path.get(..end)).unwrap_or(path)
}

/// The lines of a tick.
#[derive(Debug)]
struct Batch {
    head: Head,
    lines: Vec<u8>,
    /// Those of the lines that are warnings and errors.
    alarms: Vec<u8>,
}

/// What simplelog writes its lines to.
#[derive(Clone, Debug, Default)]
struct Made(Arc<Mutex<Vec<u8>>>);

impl Write for Made {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The process's log, for the event loop.
pub struct LogHandle {
    logger: Arc<Logger>,
    sinks: Arc<Mutex<Sinks>>,
}

impl LogHandle {
    fn new(level: LevelFilter, sinks: Sinks) -> LogHandle {
        let sinks = Arc::new(Mutex::new(sinks));
        LogHandle { logger: Arc::new(Logger::new(level, Arc::clone(&sinks))), sinks }
    }

    /// Hands the waiting lines to the system. To be called once a tick; without waiting lines it
    /// costs two uncontended locks. Says in the log (so at least on standard error) when
    /// writing begins to fail, and once it works again how many lines were lost.
    pub fn flush(&self) {
        self.logger.flush();
        let notice = {
            let mut sinks = lock(&self.sinks);
            if !sinks.main.pending.is_empty() {
                sinks.retry();
            }
            sinks.main.notice.take()
        };
        match notice {
            None => {}
            Some(Notice::Failing(reason)) => {
                log::warn!("the log cannot be written, and the agent tries again every second: {reason}");
            }
            Some(Notice::Works { lost }) => {
                log::warn!("the log can be written again; {lost} lines were lost")
            }
        }
    }

    /// Flushes, closes the log file and opens it afresh (SIGHUP, after others moved it away). If
    /// that fails, it is tried again like every failed write. Nothing to do on standard error.
    pub fn reopen(&self) {
        self.logger.flush();
        lock(&self.sinks).reopen();
    }

    /// Lines that could not be written since the start.
    #[must_use]
    pub fn lost_lines(&self) -> u64 {
        lock(&self.sinks).main.lost
    }
}

impl Drop for LogHandle {
    fn drop(&mut self) {
        self.logger.flush();
        lock(&self.sinks).retry();
    }
}

#[cfg(test)]
mod tests;
