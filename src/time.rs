//! Time as the agent sees it. The only file that reads a clock.
//!
//! Everything else is handed a [`Now`], so that tests and the simulation own the time.

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
    pub fn start() -> Clock {
        let now = Instant::now();
        Clock { origin: now.checked_sub(Duration::from_secs(3600)).unwrap_or(now) }
    }

    /// Both clocks now. A wall clock before 1970 reads as 0.
    #[must_use]
    pub fn now(&self) -> Now {
        let mono = Mono::default().after(self.origin.elapsed());
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Now { mono, unix_s: i64::try_from(unix.as_secs()).unwrap_or(i64::MAX) }
    }
}

impl Clock {
    /// The wall clock, in milliseconds since 1970 (UTC); 0 before that.
    #[must_use]
    pub fn unix_ms(&self) -> u64 {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(unix.as_millis()).unwrap_or(u64::MAX)
    }
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
    fn clock_does_not_run_backwards() {
        let clock = Clock::start();
        let first = clock.now();
        assert!(clock.now().mono >= first.mono);
        assert!(first.unix_s > 1_700_000_000);
    }
}
