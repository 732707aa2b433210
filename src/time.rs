//! Time as the agent sees it. The only file that reads a clock.
//!
//! Everything else is handed a [`Now`], so that tests and the simulation own the time.

use ::time::OffsetDateTime;
use ::time::format_description::well_known::Rfc3339;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A point on the monotonic clock: microseconds since an origin of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Mono(u64);

impl Mono {
    /// A point that is never reached: about 584,000 years ahead.
    pub const NEVER: Mono = Mono(u64::MAX);

    /// The point `us` microseconds after the origin.
    #[must_use]
    pub const fn from_micros(us: u64) -> Mono {
        Mono(us)
    }

    /// Microseconds since the origin.
    #[must_use]
    pub const fn as_micros(self) -> u64 {
        self.0
    }

    /// This point moved `by` later; stays at [`Mono::NEVER`] once there.
    #[must_use]
    pub fn after(self, by: Duration) -> Mono {
        Mono(self.0.saturating_add(u64::try_from(by.as_micros()).unwrap_or(u64::MAX)))
    }

    /// How long after `earlier` this point is; zero if it is not.
    #[must_use]
    pub const fn since(self, earlier: Mono) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

/// The time of one tick of the event loop: both clocks, read together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Now {
    /// The monotonic clock: deadlines, ages, life times.
    pub mono: Mono,
    /// The wall clock, in whole seconds since 1970 (UTC): `Date`, signatures, expiry dates that
    /// others gave us. It may jump.
    pub unix_s: i64,
}

/// Reads the machine's clocks.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    origin: Instant,
}

impl Clock {
    /// A clock whose monotonic origin is one hour ago, so that "an hour before now" exists.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "this file alone reads clocks")]
    pub fn start() -> Clock {
        let now = Instant::now();
        Clock { origin: now.checked_sub(Duration::from_secs(3600)).unwrap_or(now) }
    }

    /// Both clocks now. A wall clock before 1970 reads as 0.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "this file alone reads clocks")]
    pub fn now(&self) -> Now {
        let mono = Mono::default().after(self.origin.elapsed());
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Now { mono, unix_s: i64::try_from(unix.as_secs()).unwrap_or(i64::MAX) }
    }
}

impl Clock {
    /// The wall clock, in milliseconds since 1970 (UTC); 0 before that.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "this file alone reads clocks")]
    pub fn unix_ms(&self) -> u64 {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(unix.as_millis()).unwrap_or(u64::MAX)
    }
}

/// A moment in seconds since 1970 (UTC) as `YYYY-MM-DDTHH:MM:SSZ` (RFC 3339); `None` outside of the years 0 to 9999.
pub(crate) fn rfc_3339(unix_s: i64) -> Option<String> {
    OffsetDateTime::from_unix_timestamp(unix_s).ok()?.format(&Rfc3339).ok()
}

/// Seconds since 1970 (UTC) of a date and time by RFC 3339, whatever its offset.
pub(crate) fn unix_s_of(rfc_3339: &str) -> Option<i64> {
    OffsetDateTime::parse(rfc_3339, &Rfc3339).ok().map(OffsetDateTime::unix_timestamp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mono_saturates_instead_of_wrapping() {
        assert_eq!(Mono::NEVER.after(Duration::from_secs(1)), Mono::NEVER);
        assert_eq!(Mono::from_micros(5).since(Mono::from_micros(9)), Duration::ZERO);
        assert_eq!(Mono::from_micros(9).since(Mono::from_micros(5)), Duration::from_micros(4));
    }

    #[test]
    fn dates_are_written_in_utc_and_read_with_any_offset() {
        assert_eq!(rfc_3339(1_735_787_045).as_deref(), Some("2025-01-02T03:04:05Z"));
        assert_eq!([i64::MIN, i64::MAX].map(rfc_3339), [None, None]);
        for (text, unix_s) in [
            ("2025-01-02T03:04:05Z", Some(1_735_787_045)),
            ("2025-01-02T11:04:05.9+08:00", Some(1_735_787_045)),
            ("2025-13-02T03:04:05Z", None),
            ("2025-01-02", None),
            ("", None),
        ] {
            assert_eq!(unix_s_of(text), unix_s, "{text}");
        }
    }

    #[test]
    fn clock_does_not_run_backwards() {
        let clock = Clock::start();
        let first = clock.now();
        assert!(clock.now().mono >= first.mono);
        assert!(first.unix_s > 1_700_000_000);
    }
}
