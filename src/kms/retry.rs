//! When to try again: the policy alone, its randomness handed in.

use crate::random::Random;
use std::time::Duration;

/// The first window of the exponential backoff.
pub(crate) const BACKOFF_BASE: Duration = Duration::from_millis(500);
/// The window stops growing here.
pub(crate) const BACKOFF_CAP: Duration = Duration::from_secs(30);
/// Tries made for a reader who has no cached value to fall back on.
pub(crate) const TRIES_MAX: u32 = 3;
/// All the time such a reader waits, tries and pauses together.
pub(crate) const READER_BUDGET: Duration = Duration::from_secs(8);
/// How long after a try began a reader of an expired value waits for it.
pub(crate) const STALE_PATIENCE: Duration = Duration::from_secs(1);
/// A server's `Retry-After` is honoured up to here; a longer one is taken for a mistake.
pub(crate) const RETRY_AFTER_MAX: Duration = Duration::from_secs(300);

/// The pause after `failures` failures in a row (1 or more): full jitter, so uniform from nothing to a
/// window that doubles from [`BACKOFF_BASE`] to `cap`.
pub(crate) fn backoff(failures: u32, cap: Duration, random: &mut Random) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    let window = BACKOFF_BASE.saturating_mul(1 << doublings).min(cap);
    Duration::from_micros(random.up_to(u64::try_from(window.as_micros()).unwrap_or(u64::MAX)))
}

/// What a server's `Retry-After` is worth.
pub(crate) fn retry_after(seconds: Option<u32>) -> Duration {
    Duration::from_secs(u64::from(seconds.unwrap_or(0))).min(RETRY_AFTER_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_doubles_to_its_cap_and_is_used_whole() {
        let mut random = Random::from_seed(1);
        for (failures, window_ms) in [(0, 500), (1, 500), (2, 1000), (3, 2000), (7, 30_000), (4000, 30_000)] {
            let pauses: Vec<_> = (0..2000).map(|_| backoff(failures, BACKOFF_CAP, &mut random)).collect();
            let window = Duration::from_millis(window_ms);
            assert!(pauses.iter().all(|pause| *pause <= window), "{failures}");
            assert!(pauses.iter().any(|pause| *pause > window * 9 / 10), "{failures}");
            assert!(pauses.iter().any(|pause| *pause < window / 10), "{failures}");
        }
    }

    #[test]
    fn retry_after_is_bounded() {
        assert_eq!(retry_after(None), Duration::ZERO);
        assert_eq!(retry_after(Some(7)), Duration::from_secs(7));
        assert_eq!(retry_after(Some(u32::MAX)), RETRY_AFTER_MAX);
    }
}
