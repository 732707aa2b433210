//! Where lines go: a buffer, the file with its rotation, standard error.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::text::{Prefix, Stamp};
use super::{
    BACKUP_FILES_MAX, BUFFER_BYTES_MAX, FILE_MODE, FILE_NAME, FOLDER_MODE, RETRY_INTERVAL, Reason, Settings,
};
use crate::time::Mono;

/// Whole lines on their way out. Never fails and never holds more than [`BUFFER_BYTES_MAX`].
#[derive(Debug)]
pub(super) struct Lines {
    pub(super) out: Box<dyn Output>,
    pub(super) buffer: Vec<u8>,
    prefix: Prefix,
    stamp: Stamp,
    /// A line that found no room in the buffer.
    late: Vec<u8>,
    state: State,
    /// Lines that were dropped since the start.
    pub(super) lost: u64,
    /// What the log's reader should know, not yet said.
    pub(super) notice: Option<Notice>,
}

#[derive(Debug)]
pub(super) enum State {
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
pub(super) enum Notice {
    /// Writing began to fail.
    Failing(String),
    /// Writing works again, without so many lines.
    Works { lost: u64 },
}

impl Lines {
    pub(super) fn new(out: Box<dyn Output>, prefix: Prefix) -> Lines {
        Lines {
            out,
            buffer: Vec::new(),
            prefix,
            stamp: Stamp::default(),
            late: Vec::new(),
            state: State::Writing,
            lost: 0,
            notice: None,
        }
    }

    /// Has a line written to the buffer's end. `false`: it found no room, and waits for [`Lines::retry`].
    pub(super) fn put(&mut self, write: impl FnOnce(&mut Vec<u8>, &mut Stamp, Prefix)) -> bool {
        let begin = self.buffer.len();
        write(&mut self.buffer, &mut self.stamp, self.prefix);
        let fits = self.buffer.len() <= BUFFER_BYTES_MAX;
        if !fits {
            self.late.clear();
            self.late.extend(self.buffer.drain(begin..));
        }
        fits
    }

    /// Makes room for the line that found none, or counts it as lost.
    pub(super) fn retry(&mut self, now: Mono) {
        self.flush(now);
        if self.buffer.len().saturating_add(self.late.len()) <= BUFFER_BYTES_MAX {
            self.buffer.append(&mut self.late);
        } else {
            self.lost = self.lost.saturating_add(1);
        }
    }

    /// Writes what it can. What it cannot, it keeps for the next try.
    pub(super) fn flush(&mut self, now: Mono) {
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

    pub(super) fn reopen(&mut self, now: Mono) {
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

    pub(super) fn fail(&mut self, error: &io::Error, now: Mono) {
        let lost_before = match self.state {
            State::Failing { lost_before, .. } => lost_before,
            State::Writing => {
                self.notice = Some(Notice::Failing(Reason(error).to_string()));
                self.lost
            }
        };
        self.state = State::Failing { retry_at: now.after(RETRY_INTERVAL), lost_before };
    }

    pub(super) fn recover(&mut self) {
        if let State::Failing { lost_before, .. } = self.state {
            self.notice = Some(Notice::Works { lost: self.lost.saturating_sub(lost_before) });
            self.state = State::Writing;
        }
    }
}

/// Where lines end up.
pub(super) trait Output: fmt::Debug + Send {
    /// Writes the first bytes of `lines`; how many. After an error the next call starts afresh.
    fn write(&mut self, lines: &[u8], now: Mono) -> io::Result<usize>;

    /// Closes and opens, if that means anything.
    fn reopen(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
pub(super) struct Stderr;

/// POSIX's `PIPE_BUF` on Linux, in bytes.
const PIPE_BYTES: usize = 4096;

impl Output for Stderr {
    fn write(&mut self, lines: &[u8], _: Mono) -> io::Result<usize> {
        let stderr = io::stderr();
        // Whoever should read it may have stopped: then lines are lost, and the agent goes on. A pipe that
        // polls writable takes this much at once.
        let ready =
            poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        if ready == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        io::stderr().write(lines.get(..PIPE_BYTES).unwrap_or(lines))
    }
}

/// The log file and its backups `.1` (newest) to `.N`.
#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    pub(super) bytes_max: u64,
    backup_files: u32,
    open: Option<OpenFile>,
}

#[derive(Debug)]
pub(super) struct OpenFile {
    file: File,
    /// What is in it.
    bytes: u64,
    /// Device and inode: to notice that another file, or none, has taken its path.
    id: (u64, u64),
    /// When to compare them next.
    check_at: Mono,
}

impl LogFile {
    pub(super) fn new(folder: &Path, settings: &Settings) -> LogFile {
        LogFile {
            path: folder.join(FILE_NAME),
            bytes_max: u64::from(settings.file_size_mb).saturating_mul(1024 * 1024),
            backup_files: settings.backup_files.min(BACKUP_FILES_MAX),
            open: None,
        }
    }

    /// Opens the file, which is created with its folder if need be.
    pub(super) fn open(&mut self) -> io::Result<&mut OpenFile> {
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
    pub(super) fn backup(&self, n: u32) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(format!(".{n}"));
        path.into()
    }

    /// Makes every backup one older, and the file the first of them. Backups past `backup_files`
    /// go. A try that fails half-way can be repeated: only the backups before the first gap move.
    pub(super) fn rotate(&mut self) -> io::Result<()> {
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

    pub(super) fn try_write(&mut self, lines: &[u8], now: Mono) -> io::Result<usize> {
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
pub(super) fn create_folder(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(folder)
}
