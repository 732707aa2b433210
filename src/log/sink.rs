//! Where lines end up: outputs that may fail for a while, and what waits for them.

use std::io::{self, Write as _};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::file::LogFile;
use super::text::{TIME_BYTES, level_of, priority};
use super::{BUFFER_BYTES_MAX, RETRY_INTERVAL, Reason};
use crate::time::{Clock, Mono};

/// All outputs of the log. Writing to them never fails; what they do not take is kept for the next try.
#[derive(Debug)]
pub(super) struct Sinks {
    pub(super) main: Sink,
    /// Standard error, for warnings and errors, where the log itself goes to a file.
    pub(super) alarms: Option<Sink>,
    pub(super) clock: Clock,
}

impl Sinks {
    /// Writes these lines, and to standard error those among them that are `alarms`.
    pub(super) fn write(&mut self, lines: &[u8], alarms: &[u8]) {
        let now = self.clock.now().mono;
        if let Some(stderr) = self.alarms.as_mut().filter(|_| !alarms.is_empty()) {
            stderr.put(alarms);
            stderr.flush(now);
        }
        self.main.put(lines);
        self.main.flush(now);
    }

    /// Tries again what could not be written before, if it is time.
    pub(super) fn retry(&mut self) {
        let now = self.clock.now().mono;
        self.main.flush(now);
        if let Some(alarms) = &mut self.alarms {
            alarms.flush(now);
        }
    }

    /// Writes what waits, closes the log file and opens it afresh.
    pub(super) fn reopen(&mut self) {
        let now = self.clock.now().mono;
        self.main.flush(now);
        self.main.reopen(now);
    }
}

/// An output, and whole lines that wait for it: at most [`BUFFER_BYTES_MAX`].
#[derive(Debug)]
pub(super) struct Sink {
    pub(super) out: Output,
    /// journald reads this output: it takes a priority in front of a line, and has a time of its own.
    journal: bool,
    pub(super) pending: Vec<u8>,
    state: State,
    /// Lines that were dropped since the start.
    pub(super) lost: u64,
    /// What the log's reader should know and was not told yet.
    pub(super) notice: Option<Notice>,
}

#[derive(Debug)]
enum State {
    Writing,
    /// The last write failed.
    Failing {
        retry_at: Mono,
        /// [`Sink::lost`] when this began.
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

impl Sink {
    pub(super) fn new(out: Output, journal: bool) -> Sink {
        Sink { out, journal, pending: Vec::new(), state: State::Writing, lost: 0, notice: None }
    }

    /// Takes whole lines, to be written by the next flush. A line that finds no room is counted as lost.
    pub(super) fn put(&mut self, lines: &[u8]) {
        if !self.journal && self.pending.len().saturating_add(lines.len()) <= BUFFER_BYTES_MAX {
            self.pending.extend_from_slice(lines);
            return;
        }
        for line in lines.split_inclusive(|byte| *byte == b'\n') {
            let (priority, line) = if self.journal {
                (priority(level_of(line)), line.get(TIME_BYTES..).unwrap_or_default())
            } else {
                (&b""[..], line)
            };
            let bytes = priority.len().saturating_add(line.len());
            if self.pending.len().saturating_add(bytes) <= BUFFER_BYTES_MAX {
                self.pending.extend_from_slice(priority);
                self.pending.extend_from_slice(line);
            } else {
                self.lost = self.lost.saturating_add(1);
            }
        }
    }

    /// Writes what it can. What it cannot, it keeps for the next try.
    pub(super) fn flush(&mut self, now: Mono) {
        if matches!(self.state, State::Failing { retry_at, .. } if now < retry_at) {
            return;
        }
        let mut written = 0;
        while let Some(rest) = self.pending.get(written..).filter(|rest| !rest.is_empty()) {
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
        self.pending.drain(..written.min(self.pending.len()));
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

/// What lines are written to.
#[derive(Debug)]
pub(super) enum Output {
    File(LogFile),
    Stderr,
    #[cfg(test)]
    Script(super::tests::Script),
}

impl Output {
    /// Writes the first bytes of `lines`; how many. After an error the next call starts afresh.
    fn write(&mut self, lines: &[u8], now: Mono) -> io::Result<usize> {
        match self {
            Output::File(file) => file.write(lines, now),
            Output::Stderr => write_stderr(lines),
            #[cfg(test)]
            Output::Script(script) => script.write(lines),
        }
    }

    fn reopen(&mut self) -> io::Result<()> {
        match self {
            Output::File(file) => file.reopen(),
            _ => Ok(()),
        }
    }
}

/// POSIX's `PIPE_BUF` on Linux, in bytes.
const PIPE_BYTES: usize = 4096;

fn write_stderr(lines: &[u8]) -> io::Result<usize> {
    let mut stderr = io::stderr();
    // Whoever should read it may have stopped: then lines are lost, and the agent goes on. A pipe that
    // polls writable takes this much at once.
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    if poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], Some(&at_once))? == 0 {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    stderr.write(lines.get(..PIPE_BYTES).unwrap_or(lines))
}
