//! What a line may hold: foreign text made safe, and not too much of anything.

use std::fmt::{self, Display, Write as _};
use std::time::Duration;

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
        let mut chars = self.0.chars();
        for c in chars.by_ref().take(ESCAPE_CHARS_MAX) {
            write!(f, "{}", c.escape_debug())?;
        }
        if chars.next().is_some() { f.write_char(ELLIPSIS) } else { Ok(()) }
    }
}

/// A record's text as one line of at most [`RECORD_BYTES_MAX`] bytes, whoever wrote it.
pub(super) struct OneLine<'a>(pub(super) &'a fmt::Arguments<'a>);

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
