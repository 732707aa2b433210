//! What a line may hold: foreign text made safe, and not too much of anything.

use std::fmt::{self, Display, Write as _};
use std::io::Write as _;
use std::time::Duration;

use ::time::OffsetDateTime;
use log::Level;

use super::{ELLIPSIS, ESCAPE_CHARS_MAX, RECORD_BYTES_MAX};
use crate::time::Mono;

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
        let plain = |byte: u8| is_plain(byte) && !matches!(byte, b'"' | b'\'' | b'\\');
        if self.0.len() <= ESCAPE_CHARS_MAX && self.0.bytes().all(plain) {
            return f.write_str(self.0);
        }
        let mut chars = self.0.chars();
        for c in chars.by_ref().take(ESCAPE_CHARS_MAX) {
            write!(f, "{}", c.escape_debug())?;
        }
        if chars.next().is_some() { f.write_char(ELLIPSIS) } else { Ok(()) }
    }
}

/// How a line begins.
#[derive(Clone, Copy, Debug)]
pub(super) enum Prefix {
    /// RFC 3339 in UTC, to the millisecond.
    Time,
    /// For journald, which has a time of its own and takes the priority from here (sd-daemon(3)).
    Priority,
}

impl Prefix {
    /// Writes it, the level included.
    pub(super) fn put(self, out: &mut Vec<u8>, stamp: &mut Stamp, unix_ms: u64, level: Level) {
        match self {
            Prefix::Time => stamp.put(out, unix_ms),
            Prefix::Priority => out.extend_from_slice(match level {
                Level::Error => b"<3>",
                Level::Warn => b"<4>",
                Level::Info => b"<6>",
                Level::Debug | Level::Trace => b"<7>",
            }),
        }
        out.extend_from_slice(match level {
            Level::Error => b"ERROR ",
            Level::Warn => b"WARN  ",
            Level::Info => b"INFO  ",
            Level::Debug => b"DEBUG ",
            Level::Trace => b"TRACE ",
        });
    }
}

/// The current second as text, formatted once.
#[derive(Debug, Default)]
pub(super) struct Stamp {
    unix_s: Option<u64>,
    /// `2026-01-31T12:34:56.`
    text: Vec<u8>,
}

impl Stamp {
    pub(super) fn put(&mut self, out: &mut Vec<u8>, unix_ms: u64) {
        let (unix_s, ms) = (unix_ms / 1000, unix_ms % 1000);
        if self.unix_s != Some(unix_s) {
            self.unix_s = Some(unix_s);
            let time = i64::try_from(unix_s).ok().and_then(|it| OffsetDateTime::from_unix_timestamp(it).ok());
            let time = time.unwrap_or(OffsetDateTime::UNIX_EPOCH);
            self.text.clear();
            let (year, month, day) = (time.year(), u8::from(time.month()), time.day());
            let (hour, minute, second) = (time.hour(), time.minute(), time.second());
            let _ = write!(self.text, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.");
        }
        out.extend_from_slice(&self.text);
        let digit = |value: u64| u8::try_from(value % 10).map_or(b'0', |it| b'0' + it);
        out.extend_from_slice(&[digit(ms / 100), digit(ms / 10), digit(ms), b'Z', b' ']);
    }
}

/// Writes a record's text as one line of at most [`RECORD_BYTES_MAX`] bytes, whoever wrote it. `origin`: the
/// crate it is of, if not ours.
pub(super) fn put_line(out: &mut Vec<u8>, origin: Option<&str>, text: &fmt::Arguments<'_>) {
    let mut line = Line { out, room: RECORD_BYTES_MAX, cut: false };
    // What is displayed may fail, the line does not: what there is of it is kept.
    let _ = match origin {
        Some(origin) => write!(line, "{origin}: {text}"),
        None => line.write_fmt(*text),
    };
    out.push(b'\n');
}

struct Line<'a> {
    out: &'a mut Vec<u8>,
    /// Bytes left.
    room: usize,
    cut: bool,
}

impl Line<'_> {
    /// Writes `text`, or an ellipsis in place of it and of all that follows.
    fn put(&mut self, text: &str) {
        match self.room.checked_sub(text.len()) {
            _ if self.cut => {}
            Some(room) => {
                self.room = room;
                self.out.extend_from_slice(text.as_bytes());
            }
            None => {
                self.cut = true;
                self.out.extend_from_slice(ELLIPSIS.encode_utf8(&mut [0; 4]).as_bytes());
            }
        }
    }
}

impl fmt::Write for Line<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if text.len() <= self.room && text.bytes().all(is_plain) {
            self.put(text);
            return Ok(());
        }
        for c in text.chars() {
            if c.is_ascii() && !c.is_ascii_control() {
                self.put(c.encode_utf8(&mut [0; 4]));
            } else {
                for escaped in c.escape_debug() {
                    self.put(escaped.encode_utf8(&mut [0; 4]));
                }
            }
        }
        Ok(())
    }
}

/// Whether a byte stands for itself in a line.
fn is_plain(byte: u8) -> bool {
    byte == b' ' || byte.is_ascii_graphic()
}
