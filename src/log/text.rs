//! What a line may hold: foreign text made safe, and not too much of anything.

use std::fmt::{self, Display, Write as _};
use std::ops::Range;
use std::time::Duration;

use log::{Level, LevelFilter};
use simplelog::{Config, ConfigBuilder, FormatItem, format_description};

use super::RECORD_BYTES_MAX;
use crate::text::{ELLIPSIS, is_plain, shown};
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

/// Bytes of a line's time and of the space behind it: `2026-01-31T12:34:56.789Z `.
pub(super) const TIME_BYTES: usize = 25;
/// Where its milliseconds are.
const MILLISECONDS: Range<usize> = 20..23;
/// RFC 3339 in UTC.
const TIME: &[FormatItem<'static>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");

/// What simplelog makes of a record: `2026-01-31T12:34:56.789Z [INFO] server: what happened`.
pub(super) fn layout() -> Config {
    ConfigBuilder::new()
        .set_time_format_custom(TIME)
        .set_target_level(LevelFilter::Error)
        .set_thread_level(LevelFilter::Off)
        .set_location_level(LevelFilter::Off)
        .build()
}

/// The level of a line of this layout.
pub(super) fn level_of(line: &[u8]) -> Level {
    let rest = line.get(TIME_BYTES..).unwrap_or_default();
    let levels = [(Level::Error, &b"[ERROR]"[..]), (Level::Warn, b"[WARN]"), (Level::Info, b"[INFO]")];
    levels.into_iter().find(|(_, name)| rest.starts_with(name)).map_or(Level::Debug, |(level, _)| level)
}

/// journald takes a line's priority from here (sd-daemon(3)).
pub(super) const fn priority(level: Level) -> &'static [u8] {
    match level {
        Level::Error => b"<3>",
        Level::Warn => b"<4>",
        Level::Info => b"<6>",
        Level::Debug | Level::Trace => b"<7>",
    }
}

/// What stands in front of the text in the line that simplelog made last. Lines of the same second, level and
/// target differ in nothing else but the milliseconds.
#[derive(Debug)]
pub(super) struct Head {
    unix_s: u64,
    level: Level,
    target: String,
    bytes: Vec<u8>,
}

impl Head {
    /// One that no line has.
    pub(super) const fn none() -> Head {
        Head { unix_s: u64::MAX, level: Level::Trace, target: String::new(), bytes: Vec::new() }
    }

    /// Writes it with the milliseconds of this time; `false`: a line of this time, level and target has another
    /// one.
    pub(super) fn put(&mut self, out: &mut Vec<u8>, unix_ms: u64, level: Level, target: &str) -> bool {
        let fits = self.unix_s == unix_ms / 1000 && self.level == level && self.target == target;
        if fits {
            let digit = |value: u64| u8::try_from(value % 10).map_or(b'0', |it| b'0' + it);
            if let Some(milliseconds) = self.bytes.get_mut(MILLISECONDS) {
                milliseconds.copy_from_slice(&[digit(unix_ms / 100), digit(unix_ms / 10), digit(unix_ms)]);
            }
            out.extend_from_slice(&self.bytes);
        }
        fits
    }

    /// This is the head of lines of this time, level and target.
    pub(super) fn learn(&mut self, bytes: &[u8], unix_ms: u64, level: Level, target: &str) {
        (self.unix_s, self.level) = (unix_ms / 1000, level);
        self.target.clear();
        self.target.push_str(target);
        self.bytes.clear();
        self.bytes.extend_from_slice(bytes);
    }
}

/// Writes a record's text without line ends, and at most [`RECORD_BYTES_MAX`] bytes of it.
pub(super) fn put_text(out: &mut Vec<u8>, text: fmt::Arguments<'_>) {
    // A value that fails to display itself costs the rest of the text, and not the line.
    let _ = Text { out, room: RECORD_BYTES_MAX, cut: false }.write_fmt(text);
}

struct Text<'a> {
    out: &'a mut Vec<u8>,
    /// Bytes left.
    room: usize,
    cut: bool,
}

impl Text<'_> {
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

impl fmt::Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // Without a branch for each byte, as most of what is written passes.
        if text.len() <= self.room && text.bytes().fold(true, |plain, byte| plain & is_plain(byte)) {
            self.put(text);
            return Ok(());
        }
        for c in text.chars().flat_map(shown) {
            self.put(c.encode_utf8(&mut [0; 4]));
        }
        Ok(())
    }
}
