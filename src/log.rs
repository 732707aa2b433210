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

use std::fmt::{self, Display, Write as _};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use log::{Level, LevelFilter, Log, Metadata, Record};
use simplelog::{ConfigBuilder, FormatItem, WriteLogger, format_description};

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

/// Whole lines on their way out. Never fails and never holds more than [`BUFFER_BYTES_MAX`].
#[derive(Debug)]
struct Lines {
    out: Box<dyn Output>,
    buffer: Vec<u8>,
    state: State,
    /// Lines that were dropped since the start.
    lost: u64,
    /// What the log's reader should know, not yet said.
    notice: Option<Notice>,
}

#[derive(Debug)]
enum State {
    Writing,
    /// The last write failed.
    Failing {
        retry_at: Mono,
        /// [`Lines::lost`] when this began.
        lost_before: u64,
    },
}

/// A change that the log's reader should know of.
#[derive(Debug, PartialEq, Eq)]
enum Notice {
    /// Writing began to fail.
    Failing(String),
    /// Writing works again, without so many lines.
    Works { lost: u64 },
}

impl Lines {
    fn new(out: Box<dyn Output>) -> Lines {
        Lines { out, buffer: Vec::new(), state: State::Writing, lost: 0, notice: None }
    }

    /// Takes a line if there is room for it.
    fn push(&mut self, line: &[u8]) -> bool {
        let fits = self.buffer.len().saturating_add(line.len()) <= BUFFER_BYTES_MAX;
        if fits {
            self.buffer.extend_from_slice(line);
        }
        fits
    }

    /// Writes what it can. What it cannot, it keeps for the next try.
    fn flush(&mut self, now: Mono) {
        if matches!(self.state, State::Failing { retry_at, .. } if now < retry_at) {
            return;
        }
        let mut written = 0;
        while let Some(rest) = self.buffer.get(written..).filter(|rest| !rest.is_empty()) {
            match self.out.write(rest, now) {
                Ok(0) => {
                    self.fail(&io::ErrorKind::WriteZero.into(), now);
                    break;
                }
                Ok(more) => {
                    written = written.saturating_add(more);
                    self.recover();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.fail(&error, now);
                    break;
                }
            }
        }
        self.buffer.drain(..written.min(self.buffer.len()));
    }

    fn reopen(&mut self, now: Mono) {
        match self.out.reopen() {
            // Let the next flush try, without the rest of the wait.
            Ok(()) => {
                if let State::Failing { retry_at, .. } = &mut self.state {
                    *retry_at = now;
                }
            }
            Err(error) => self.fail(&error, now),
        }
    }

    fn fail(&mut self, error: &io::Error, now: Mono) {
        let lost_before = match self.state {
            State::Failing { lost_before, .. } => lost_before,
            State::Writing => {
                self.notice = Some(Notice::Failing(Reason(error).to_string()));
                self.lost
            }
        };
        self.state = State::Failing { retry_at: now.after(RETRY_INTERVAL), lost_before };
    }

    fn recover(&mut self) {
        if let State::Failing { lost_before, .. } = self.state {
            self.notice = Some(Notice::Works { lost: self.lost.saturating_sub(lost_before) });
            self.state = State::Writing;
        }
    }
}

/// Where lines end up.
trait Output: fmt::Debug + Send {
    /// Writes the first bytes of `lines`; how many. After an error the next call starts afresh.
    fn write(&mut self, lines: &[u8], now: Mono) -> io::Result<usize>;

    /// Closes and opens, if that means anything.
    fn reopen(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
struct Stderr;

impl Output for Stderr {
    fn write(&mut self, lines: &[u8], _: Mono) -> io::Result<usize> {
        io::stderr().write(lines)
    }
}

/// The log file and its backups `.1` (newest) to `.N`.
#[derive(Debug)]
struct LogFile {
    path: PathBuf,
    bytes_max: u64,
    backup_files: u32,
    open: Option<OpenFile>,
}

#[derive(Debug)]
struct OpenFile {
    file: File,
    /// What is in it.
    bytes: u64,
    /// Device and inode: to notice that another file, or none, has taken its path.
    id: (u64, u64),
    /// When to compare them next.
    check_at: Mono,
}

impl LogFile {
    fn new(folder: &Path, settings: &Settings) -> LogFile {
        LogFile {
            path: folder.join(FILE_NAME),
            bytes_max: u64::from(settings.file_size_mb).saturating_mul(1024 * 1024),
            backup_files: settings.backup_files.min(BACKUP_FILES_MAX),
            open: None,
        }
    }

    /// Opens the file, which is created with its folder if need be.
    fn open(&mut self) -> io::Result<&mut OpenFile> {
        let mut options = OpenOptions::new();
        options.append(true).create(true).mode(FILE_MODE);
        let file = match options.open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.path.parent().map_or(Ok(()), create_folder)?;
                options.open(&self.path)?
            }
            opened => opened?,
        };
        let found = file.metadata()?;
        let id = (found.dev(), found.ino());
        Ok(self.open.insert(OpenFile { file, bytes: found.len(), id, check_at: Mono::default() }))
    }

    /// Path of the `n`-th backup.
    fn backup(&self, n: u32) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(format!(".{n}"));
        path.into()
    }

    /// Makes every backup one older, and the file the first of them. Backups past `backup_files`
    /// go. A try that fails half-way can be repeated: only the backups before the first gap move.
    fn rotate(&mut self) -> io::Result<()> {
        self.open = None;
        for n in self.backup_files.saturating_add(1)..=BACKUP_FILES_MAX {
            if fs::remove_file(self.backup(n)).is_err() {
                break;
            }
        }
        if self.backup_files == 0 {
            return OpenOptions::new().write(true).open(&self.path)?.set_len(0);
        }
        let in_a_row = (1..self.backup_files).take_while(|&n| self.backup(n).exists()).count();
        for n in (1..self.backup_files).take(in_a_row).collect::<Vec<_>>().into_iter().rev() {
            fs::rename(self.backup(n), self.backup(n.saturating_add(1)))?;
        }
        fs::rename(&self.path, self.backup(1))
    }

    fn try_write(&mut self, lines: &[u8], now: Mono) -> io::Result<usize> {
        if let Some(open) = self.open.as_mut().filter(|open| now >= open.check_at) {
            open.check_at = now.after(RETRY_INTERVAL);
            if fs::metadata(&self.path).map(|there| (there.dev(), there.ino())).ok() != Some(open.id) {
                self.open = None;
            }
        }
        let bytes_max = self.bytes_max;
        let full = |open: &OpenFile| {
            open.bytes > 0
                && open.bytes.saturating_add(u64::try_from(lines.len()).unwrap_or(u64::MAX)) > bytes_max
        };
        let mut open = match &mut self.open {
            Some(open) => open,
            None => self.open()?,
        };
        if full(open) {
            self.rotate()?;
            open = self.open()?;
        }
        let written = open.file.write(lines)?;
        open.bytes = open.bytes.saturating_add(u64::try_from(written).unwrap_or(u64::MAX));
        Ok(written)
    }
}

impl Output for LogFile {
    fn write(&mut self, lines: &[u8], now: Mono) -> io::Result<usize> {
        let written = self.try_write(lines, now);
        if written.is_err() {
            self.open = None;
        }
        written
    }

    fn reopen(&mut self) -> io::Result<()> {
        self.open = None;
        self.open().map(|_| ())
    }
}

/// Creates a folder with those above it; no error if it is there.
fn create_folder(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(folder)
}

/// At most so many records of one kind a second, after a burst. Pure: handed the time.
///
/// ```text
/// if let Some(left_out) = refusals.admit(now) {
///     warn!("refused: {code}{left_out}");
/// }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct RateLimit {
    interval: Duration,
    /// How far `due` may run ahead of the time: the burst.
    ahead_max: Duration,
    /// When the records let through would be spent at one an interval.
    due: Mono,
    left_out: u64,
}

impl RateLimit {
    /// Lets `burst` records through at once, and `per_second` a second in the long run. Both count as
    /// 1 if 0; more than a million a second is no limit.
    #[must_use]
    pub fn new(per_second: u32, burst: u32) -> RateLimit {
        let interval = Duration::from_secs(1).checked_div(per_second.max(1)).unwrap_or_default();
        let ahead_max = interval.saturating_mul(burst.max(1).saturating_sub(1));
        RateLimit { interval, ahead_max, due: Mono::default(), left_out: 0 }
    }

    /// Whether a record may be written now. If so, how many like it were left out since the last
    /// one, to be printed at its end.
    #[must_use]
    pub fn admit(&mut self, now: Mono) -> Option<LeftOut> {
        if self.due.since(now) > self.ahead_max {
            self.left_out = self.left_out.saturating_add(1);
            return None;
        }
        self.due = self.due.max(now).after(self.interval);
        Some(LeftOut(std::mem::take(&mut self.left_out)))
    }
}

/// How many records a [`RateLimit`] left out. Displays as ` (312 like it left out)`, or as nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeftOut(pub u64);

impl Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            count => write!(f, " ({count} like it left out)"),
        }
    }
}

/// Makes foreign text safe between quotes in one log line: quotes, backslashes, control characters
/// and whatever else is not seen as itself (U+2028, direction marks, ..) are escaped as in a Rust
/// string; text past [`ESCAPE_CHARS_MAX`] characters is cut off, with an ellipsis.
pub fn escape(text: &str) -> impl Display {
    Escaped(text)
}

struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut chars = self.0.chars();
        for c in chars.by_ref().take(ESCAPE_CHARS_MAX) {
            write!(f, "{}", c.escape_debug())?;
        }
        if chars.next().is_some() { f.write_char(ELLIPSIS) } else { Ok(()) }
    }
}

/// A record's text as one line of at most [`RECORD_BYTES_MAX`] bytes, whoever wrote it.
struct OneLine<'a>(&'a fmt::Arguments<'a>);

impl Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        LineFormatter { out: f, room: RECORD_BYTES_MAX, cut: false }.write_fmt(*self.0)
    }
}

struct LineFormatter<'a, 'b> {
    out: &'a mut fmt::Formatter<'b>,
    /// Bytes left.
    room: usize,
    cut: bool,
}

impl LineFormatter<'_, '_> {
    /// Writes `text`, or an ellipsis in place of it and of all that follows.
    fn put(&mut self, text: &str) -> fmt::Result {
        match self.room.checked_sub(text.len()) {
            _ if self.cut => Ok(()),
            Some(room) => {
                self.room = room;
                self.out.write_str(text)
            }
            None => {
                self.cut = true;
                self.out.write_char(ELLIPSIS)
            }
        }
    }
}

impl fmt::Write for LineFormatter<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let plain = |byte: u8| byte == b' ' || byte.is_ascii_graphic();
        if text.len() <= self.room && text.bytes().all(plain) {
            return self.put(text);
        }
        for c in text.chars() {
            if c.is_ascii() && !c.is_ascii_control() {
                self.put(c.encode_utf8(&mut [0; 4]))?;
            } else {
                for escaped in c.escape_debug() {
                    self.put(escaped.encode_utf8(&mut [0; 4]))?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// A folder that goes when the test ends.
    struct TempFolder(PathBuf);

    impl TempFolder {
        fn new() -> TempFolder {
            static COUNT: AtomicU32 = AtomicU32::new(0);
            let name =
                format!("kms-agent-log-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
            let path = std::env::temp_dir().join(name);
            fs::create_dir(&path).unwrap();
            TempFolder(path)
        }

        /// Names and contents, sorted.
        fn list(&self) -> Vec<(String, String)> {
            let mut files: Vec<_> = fs::read_dir(&self.0)
                .unwrap()
                .map(|entry| entry.unwrap())
                .map(|entry| {
                    (entry.file_name().into_string().unwrap(), fs::read_to_string(entry.path()).unwrap())
                })
                .collect();
            files.sort();
            files
        }
    }

    impl Drop for TempFolder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn at(seconds: u64) -> Mono {
        Mono::from_micros(seconds * 1_000_000)
    }

    fn log_file(folder: &Path, bytes_max: u64, backup_files: u32) -> LogFile {
        LogFile { bytes_max, ..LogFile::new(folder, &Settings { backup_files, ..Settings::default() }) }
    }

    fn settings(folder: &Path) -> Settings {
        Settings { path: LogPath::Folder(folder.to_owned()), ..Settings::default() }
    }

    fn say(logger: &dyn Log, level: Level, target: &str, text: &str) {
        logger.log(&Record::builder().level(level).target(target).args(format_args!("{text}")).build());
    }

    fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
        expected.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn files_rotate_before_they_grow_past_their_size() {
        for (backup_files, expected) in [
            (0, &[("kms-agent.log", "six\n")][..]),
            (1, &[("kms-agent.log", "six\n"), ("kms-agent.log.1", "five5678\n")]),
            (
                2,
                &[
                    ("kms-agent.log", "six\n"),
                    ("kms-agent.log.1", "five5678\n"),
                    ("kms-agent.log.2", "three\nfour\n"),
                ],
            ),
            (
                9,
                &[
                    ("kms-agent.log", "six\n"),
                    ("kms-agent.log.1", "five5678\n"),
                    ("kms-agent.log.2", "three\nfour\n"),
                    ("kms-agent.log.3", "one\ntwo\n"),
                ],
            ),
        ] {
            let temp = TempFolder::new();
            let mut file = log_file(&temp.0, 12, backup_files);
            for line in ["one\n", "two\n", "three\n", "four\n", "five5678\n", "six\n"] {
                assert_eq!(file.write(line.as_bytes(), at(1)).unwrap(), line.len());
            }
            assert_eq!(temp.list(), pairs(expected), "{backup_files} backups");
        }
    }

    #[test]
    fn a_file_may_be_exactly_full_and_a_longer_line_has_one_of_its_own() {
        let temp = TempFolder::new();
        let mut file = log_file(&temp.0, 4, 9);
        for line in ["abc\n", "a long line\n", "x\n", "y\n"] {
            file.write(line.as_bytes(), at(1)).unwrap();
        }
        let expected =
            [("kms-agent.log", "x\ny\n"), ("kms-agent.log.1", "a long line\n"), ("kms-agent.log.2", "abc\n")];
        assert_eq!(temp.list(), pairs(&expected));
    }

    #[test]
    fn a_restart_appends_and_counts_what_is_there() {
        let temp = TempFolder::new();
        log_file(&temp.0, 12, 1).write(b"before\n", at(1)).unwrap();
        let mut file = log_file(&temp.0, 12, 1);
        file.write(b"same\n", at(1)).unwrap();
        file.write(b"next\n", at(1)).unwrap();
        assert_eq!(temp.list(), pairs(&[("kms-agent.log", "next\n"), ("kms-agent.log.1", "before\nsame\n")]));
    }

    #[test]
    fn backups_past_a_lowered_number_go() {
        let temp = TempFolder::new();
        for n in 1..=4 {
            fs::write(temp.0.join(format!("{FILE_NAME}.{n}")), n.to_string()).unwrap();
        }
        let mut file = log_file(&temp.0, 4, 2);
        file.write(b"old\n", at(1)).unwrap();
        file.write(b"new\n", at(1)).unwrap();
        let expected = [("kms-agent.log", "new\n"), ("kms-agent.log.1", "old\n"), ("kms-agent.log.2", "1")];
        assert_eq!(temp.list(), pairs(&expected));
    }

    #[test]
    fn a_rotation_that_keeps_failing_loses_no_backup() {
        let temp = TempFolder::new();
        fs::write(temp.0.join("kms-agent.log.2"), "kept").unwrap();
        // A folder where the newest backup should go: the rename to it fails.
        let mut file = log_file(&temp.0, 4, 3);
        file.write(b"old\n", at(1)).unwrap();
        fs::create_dir_all(temp.0.join("kms-agent.log.1/in the way")).unwrap();
        fs::create_dir_all(temp.0.join("kms-agent.log.3/in the way")).unwrap();
        for _ in 0..3 {
            file.write(b"new\n", at(1)).unwrap_err();
        }
        assert_eq!(fs::read_to_string(temp.0.join("kms-agent.log.2")).unwrap(), "kept");
        assert_eq!(fs::read_to_string(temp.0.join(FILE_NAME)).unwrap(), "old\n", "and stays in its size");
    }

    #[test]
    fn a_removed_folder_and_a_moved_file_are_noticed_within_a_second() {
        let temp = TempFolder::new();
        let folder = temp.0.join("a/b");
        let mut file = log_file(&folder, 1000, 1);
        file.write(b"one\n", at(1)).unwrap();
        fs::remove_dir_all(temp.0.join("a")).unwrap();
        file.write(b"two\n", at(2)).unwrap();
        assert_eq!(fs::read_to_string(folder.join(FILE_NAME)).unwrap(), "two\n");
        file.write(b"three\n", at(3)).unwrap();
        fs::rename(folder.join(FILE_NAME), folder.join("moved")).unwrap();
        file.write(b"four\n", at(3)).unwrap();
        file.write(b"five\n", at(4)).unwrap();
        assert_eq!(fs::read_to_string(folder.join("moved")).unwrap(), "two\nthree\nfour\n");
        assert_eq!(fs::read_to_string(folder.join(FILE_NAME)).unwrap(), "five\n");
    }

    #[test]
    fn folder_and_file_are_not_for_others() {
        let temp = TempFolder::new();
        let folder = temp.0.join("logs");
        log_file(&folder, 1000, 1).open().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        // The process's umask may take more away.
        assert_eq!(mode(&folder) & !FOLDER_MODE, 0);
        assert_eq!(mode(&folder.join(FILE_NAME)) & !FILE_MODE, 0);
        assert_ne!(mode(&folder.join(FILE_NAME)) & 0o600, 0);
    }

    #[test]
    fn a_log_that_cannot_be_created_says_what_and_why() {
        let temp = TempFolder::new();
        let in_the_way = temp.0.join("file");
        fs::write(&in_the_way, "").unwrap();
        let error = build(&settings(&in_the_way.join("logs")), false).err().unwrap();
        assert_eq!(
            error.to_string(),
            format!("LogPath {}/logs: cannot create this folder: Not a directory", in_the_way.display())
        );
        fs::create_dir(temp.0.join(FILE_NAME)).unwrap();
        let error = build(&settings(&temp.0), false).err().unwrap();
        assert_eq!(
            error.to_string(),
            format!("LogPath {}: cannot create kms-agent.log: Is a directory", temp.0.display())
        );
        let denied = LogError::File {
            path: PathBuf::from("./logs/"),
            error: io::Error::from_raw_os_error(rustix::io::Errno::ACCESS.raw_os_error()),
        };
        assert_eq!(denied.to_string(), "LogPath ./logs/: cannot create kms-agent.log: Permission denied");
    }

    /// Answers writes from a script, then takes everything.
    #[derive(Debug, Default)]
    struct Script {
        answers: VecDeque<Result<usize, io::ErrorKind>>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Output for Script {
        fn write(&mut self, lines: &[u8], _: Mono) -> io::Result<usize> {
            let taken = match self.answers.pop_front() {
                None => lines.len(),
                Some(answer) => answer?.min(lines.len()),
            };
            self.written.lock().unwrap().extend_from_slice(&lines[..taken]);
            Ok(taken)
        }
    }

    #[test]
    fn writing_goes_on_where_it_failed() {
        use io::ErrorKind::{Interrupted, StorageFull};
        let script = Script {
            answers: [Ok(3), Err(Interrupted), Ok(2), Err(StorageFull), Err(StorageFull)].into(),
            ..Script::default()
        };
        let written = Arc::clone(&script.written);
        let written = || String::from_utf8(written.lock().unwrap().clone()).unwrap();
        let mut lines = Lines::new(Box::new(script));

        assert!(lines.push(b"first line\n"));
        lines.flush(at(10));
        assert_eq!(written(), "first");
        assert_eq!(lines.notice.take(), Some(Notice::Failing("no storage space".to_owned())));

        assert!(lines.push(b"second\n"));
        lines.flush(at(10));
        lines.flush(Mono::from_micros(10_999_999));
        assert_eq!(written(), "first", "no second try within the second");
        lines.flush(at(11));
        assert_eq!(lines.notice.take(), None, "said once");
        lines.flush(at(12));
        assert_eq!(written(), "first line\nsecond\n");
        assert_eq!(lines.notice.take(), Some(Notice::Works { lost: 0 }));
        assert!(lines.buffer.is_empty());
    }

    #[test]
    fn lines_past_the_buffer_are_dropped_whole_and_counted() {
        // A year of failing: the clock of `Writer` runs, so the script must not run out.
        let script =
            Script { answers: vec![Err(io::ErrorKind::StorageFull); 1000].into(), ..Script::default() };
        let written = Arc::clone(&script.written);
        let mut writer = Writer::new(Box::new(script));
        let line = [b"x".repeat(1023).as_slice(), b"\n"].concat();
        for _ in 0..BUFFER_BYTES_MAX / 1024 + 7 {
            writer.write_all(&line).unwrap();
        }
        assert_eq!(writer.lock().lost, 7);
        assert_eq!(writer.lock().buffer.len(), BUFFER_BYTES_MAX);
        writer.lock().out = Box::new(Script { written: Arc::clone(&written), ..Script::default() });
        writer.lock().flush(Mono::NEVER);
        assert_eq!(written.lock().unwrap().len(), BUFFER_BYTES_MAX);
        assert_eq!(writer.lock().notice.take(), Some(Notice::Works { lost: 7 }));
    }

    #[test]
    fn a_full_disk_is_survived() {
        if !Path::new("/dev/full").exists() {
            return;
        }
        let temp = TempFolder::new();
        std::os::unix::fs::symlink("/dev/full", temp.0.join(FILE_NAME)).unwrap();
        let (logger, handle) = build(&settings(&temp.0), false).unwrap();
        say(&logger, Level::Info, OWN_TARGET, "nobody will see this");
        handle.flush();
        assert_eq!(handle.lost_lines(), 0, "it still waits in the buffer");
        fs::remove_file(temp.0.join(FILE_NAME)).unwrap();
        handle.reopen();
        handle.flush();
        let list = temp.list();
        assert!(list[0].1.ends_with("INFO  nobody will see this\n"), "{list:?}");
    }

    #[test]
    fn records_become_lines() {
        let temp = TempFolder::new();
        let (logger, handle) = build(&settings(&temp.0), false).unwrap();
        let other = format!("{OWN_TARGET}_other");
        let module = format!("{OWN_TARGET}::server");
        for (level, target, text) in [
            (Level::Trace, OWN_TARGET, "below the level"),
            (Level::Debug, &module, "request GET /v1/agent-test 200"),
            (Level::Info, OWN_TARGET, "two\nlines, \"quotes\" and \u{2028}, ünïcode"),
            (Level::Info, "rustls::client", "not ours"),
            (Level::Info, &other, "not ours"),
        ] {
            say(&logger, level, target, text);
        }
        assert_eq!(temp.list(), pairs(&[(FILE_NAME, "")]), "lines wait for the flush");
        handle.flush();
        // Past the timestamp.
        let lines = || -> Vec<String> {
            temp.list()[0]
                .1
                .lines()
                .map(|line| line.split_at("2026-01-31T12:34:56.789Z ".len()).1.into())
                .collect()
        };
        let mut expected = vec![
            "DEBUG request GET /v1/agent-test 200",
            r#"INFO  two\nlines, "quotes" and \u{2028}, ünïcode"#,
        ];
        assert_eq!(lines(), expected);
        // A warning is written at once, also one of another crate.
        say(&logger, Level::Warn, "rustls::client", "odd");
        expected.push("WARN  rustls::client: odd");
        assert_eq!(lines(), expected);
        // The last ones are written when the handle goes.
        say(&logger, Level::Info, OWN_TARGET, "bye");
        drop(handle);
        expected.push("INFO  bye");
        assert_eq!(lines(), expected);
    }

    #[test]
    fn times_are_rfc_3339_in_utc() {
        let temp = TempFolder::new();
        let (logger, handle) = build(&settings(&temp.0), true).unwrap();
        say(&logger, Level::Info, OWN_TARGET, "x");
        handle.flush();
        let text = &temp.list()[0].1;
        let (time, rest) = text.split_once(' ').unwrap();
        assert_eq!(rest, "INFO  x\n");
        let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
        assert_eq!(shape, "0000-00-00T00:00:00.000Z");
        let format = ::time::format_description::well_known::Rfc3339;
        let parsed = ::time::OffsetDateTime::parse(time, &format).unwrap().unix_timestamp();
        assert!((Clock::start().now().unix_s - parsed).abs() <= 2);
    }

    #[test]
    fn to_the_journal_goes_no_time() {
        let script = Script::default();
        let written = Arc::clone(&script.written);
        let sink = sink(Writer::new(Box::new(script)), false);
        let logger = Logger { level: LevelFilter::Info, main: sink, alarms: None };
        say(&logger, Level::Warn, OWN_TARGET, "x");
        assert_eq!(*written.lock().unwrap(), b"WARN  x\n");
    }

    #[test]
    fn with_a_file_warnings_go_to_standard_error_too() {
        let (file, stderr) = (Script::default(), Script::default());
        let (in_file, on_stderr) = (Arc::clone(&file.written), Arc::clone(&stderr.written));
        let logger = Logger {
            level: LevelFilter::Info,
            main: sink(Writer::new(Box::new(file)), false),
            alarms: Some(sink(Writer::new(Box::new(stderr)), false)),
        };
        for level in [Level::Error, Level::Warn, Level::Info, Level::Debug] {
            say(&logger, level, OWN_TARGET, "x");
        }
        logger.flush();
        assert_eq!(*in_file.lock().unwrap(), b"ERROR x\nWARN  x\nINFO  x\n");
        assert_eq!(*on_stderr.lock().unwrap(), b"ERROR x\nWARN  x\n");
    }

    #[test]
    fn an_endless_record_is_cut() {
        let script = Script::default();
        let written = Arc::clone(&script.written);
        let logger = Logger {
            level: LevelFilter::Info,
            main: sink(Writer::new(Box::new(script)), false),
            alarms: None,
        };
        for text in ["x".repeat(RECORD_BYTES_MAX), "x".repeat(RECORD_BYTES_MAX + 1), "\0ü".repeat(100_000)] {
            say(&logger, Level::Warn, OWN_TARGET, &text);
        }
        let written = String::from_utf8(written.lock().unwrap().clone()).unwrap();
        let cut: Vec<_> =
            written.lines().map(|line| (line.len() <= RECORD_BYTES_MAX + 9, line.ends_with('…'))).collect();
        assert_eq!(cut, [(true, false), (true, true), (true, true)]);
    }

    #[test]
    fn reopening_follows_a_moved_file() {
        let temp = TempFolder::new();
        let (logger, handle) = build(&settings(&temp.0), false).unwrap();
        say(&logger, Level::Info, OWN_TARGET, "one");
        handle.flush();
        fs::rename(temp.0.join(FILE_NAME), temp.0.join("moved")).unwrap();
        handle.reopen();
        say(&logger, Level::Info, OWN_TARGET, "two");
        handle.flush();
        let list = temp.list();
        assert!(list[0].1.ends_with(" two\n") && list[1].1.ends_with(" one\n"), "{list:?}");
    }

    #[test]
    fn rate_limit_lets_a_burst_through_and_then_so_many_a_second() {
        let mut limit = RateLimit::new(10, 3);
        let mut seen = Vec::new();
        for ms in (0..=400).step_by(10) {
            if let Some(left_out) = limit.admit(Mono::from_micros(ms * 1000)) {
                seen.push((ms, left_out.0));
            }
        }
        // 3 at once, then one each 100 ms, with the 9 between them counted.
        assert_eq!(seen, [(0, 0), (10, 0), (20, 0), (100, 7), (200, 9), (300, 9), (400, 9)]);
        // After a pause the burst is whole again, and no larger.
        let burst = (0..5).filter_map(|_| limit.admit(at(100))).map(|left_out| left_out.0);
        assert_eq!(burst.collect::<Vec<_>>(), [0, 0, 0]);
        assert_eq!(limit.admit(at(200)), Some(LeftOut(2)));
    }

    #[test]
    fn rate_limit_survives_odd_numbers() {
        for (per_second, burst) in [(0, 0), (1, 0), (0, u32::MAX), (u32::MAX, u32::MAX)] {
            let mut limit = RateLimit::new(per_second, burst);
            assert_eq!(limit.admit(at(5)), Some(LeftOut(0)), "{per_second} {burst}");
            assert!(limit.admit(Mono::NEVER).is_some());
            // Time that runs backwards holds records back at worst.
            let _ = limit.admit(at(0));
        }
    }

    #[test]
    fn left_out_is_said_only_if_something_was() {
        assert_eq!(LeftOut(0).to_string(), "");
        assert_eq!(LeftOut(312).to_string(), " (312 like it left out)");
    }

    #[test]
    fn escape_makes_text_safe() {
        for (text, expected) in [
            ("agent-test", "agent-test"),
            ("", ""),
            ("geheim ö 秘密", "geheim ö 秘密"),
            ("a\nb\r\tc\0", r"a\nb\r\tc\0"),
            (r#"say "hi" \o/"#, r#"say \"hi\" \\o/"#),
            ("\u{1b}[31m", r"\u{1b}[31m"),
            ("\u{85}\u{2028}\u{202e}\u{200b}\u{feff}", r"\u{85}\u{2028}\u{202e}\u{200b}\u{feff}"),
        ] {
            assert_eq!(escape(text).to_string(), expected);
        }
        let longest = "é".repeat(ESCAPE_CHARS_MAX);
        assert_eq!(escape(&longest).to_string(), longest);
        assert_eq!(escape(&format!("{longest}é")).to_string(), format!("{longest}…"));
    }
}
