//! The log file and its rotation.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{BACKUP_FILES_MAX, FILE_MODE, FILE_NAME, FOLDER_MODE, RETRY_INTERVAL, Settings};
use crate::time::Mono;

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

    /// Writes the first bytes of `lines`; how many. After an error the next call starts afresh.
    pub(super) fn write(&mut self, lines: &[u8], now: Mono) -> io::Result<usize> {
        let written = self.try_write(lines, now);
        if written.is_err() {
            self.open = None;
        }
        written
    }

    /// Closes the file and opens what is at its path now, or makes it.
    pub(super) fn reopen(&mut self) -> io::Result<()> {
        self.open = None;
        self.open().map(|_| ())
    }
}

/// Creates a folder with those above it; no error if it is there.
pub(super) fn create_folder(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(folder)
}
