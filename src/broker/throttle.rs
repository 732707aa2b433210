//! Holding back behind the scenes while KMS throttles. Its limit is the whole account's, so what one secret
//! meets the others would meet too.

use crate::kms::retry;
use crate::random::Random;
use crate::time::Mono;

/// Of the calls to KMS, so many may be refreshes that nobody waits for.
const BACKGROUND_CALLS_MAX: usize = 4;
/// Throttled calls counted; the pause between refreshes has reached its cap by then.
const COUNT_MAX: u32 = 7;

/// How far refreshes behind the scenes hold back. Readers who wait are not held back.
#[derive(Debug, Default)]
pub(super) struct Throttle {
    /// Throttled calls, less those that succeeded since; at most [`COUNT_MAX`].
    count: u32,
    next_try_at: Mono,
}

impl Throttle {
    /// KMS throttled a call, and asked for a pause until `not_before`.
    pub(super) fn on_throttled(&mut self, not_before: Mono, now: Mono, random: &mut Random) {
        self.count = (self.count + 1).min(COUNT_MAX);
        self.next_try_at = self.pause_from(now, random).max(not_before);
    }

    /// KMS gave a value.
    pub(super) fn on_value(&mut self, now: Mono, random: &mut Random) {
        self.count = self.count.saturating_sub(1);
        self.next_try_at = if self.count == 0 { Mono::default() } else { self.pause_from(now, random) };
    }

    fn pause_from(&self, now: Mono, random: &mut Random) -> Mono {
        now.after(retry::backoff(self.count, retry::BACKOFF_CAP, random))
    }

    /// From when on a refresh behind the scenes may begin.
    pub(super) fn next_try_at(&self) -> Mono {
        self.next_try_at
    }

    /// How many calls at a time may be refreshes that nobody waits for.
    pub(super) fn background_calls_max(&self) -> usize {
        if self.count > 0 { 1 } else { BACKGROUND_CALLS_MAX }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const NOW: Mono = Mono::from_micros(1_000_000);

    #[test]
    fn a_throttled_call_holds_refreshes_back_until_as_many_values_came() {
        let (mut throttle, mut random) = (Throttle::default(), Random::from_seed(1));
        assert_eq!((throttle.next_try_at(), throttle.background_calls_max()), (Mono::default(), 4));
        throttle.on_value(NOW, &mut random);
        assert_eq!((throttle.next_try_at(), throttle.background_calls_max()), (Mono::default(), 4));

        throttle.on_throttled(NOW, NOW, &mut random);
        throttle.on_throttled(NOW, NOW, &mut random);
        assert!(throttle.next_try_at() >= NOW);
        throttle.on_value(NOW, &mut random);
        assert!(throttle.next_try_at() >= NOW && throttle.next_try_at() <= NOW.after(retry::BACKOFF_BASE));
        assert_eq!(throttle.background_calls_max(), 1, "one of the two is still owed");
        throttle.on_value(NOW, &mut random);
        assert_eq!((throttle.next_try_at(), throttle.background_calls_max()), (Mono::default(), 4));
    }

    #[test]
    fn a_longer_pause_that_kms_asks_for_is_kept() {
        let (mut throttle, mut random) = (Throttle::default(), Random::from_seed(1));
        let not_before = NOW.after(Duration::from_secs(60));
        throttle.on_throttled(not_before, NOW, &mut random);
        assert_eq!(throttle.next_try_at(), not_before);
    }

    #[test]
    fn the_pause_grows_to_its_cap_and_the_count_to_its_own() {
        let mut random = Random::from_seed(1);
        let mut longest = |throttled: u32| {
            let pauses = (0..500).map(|_| {
                let mut throttle = Throttle::default();
                (0..throttled).for_each(|_| throttle.on_throttled(NOW, NOW, &mut random));
                throttle.next_try_at().since(NOW)
            });
            pauses.max().unwrap()
        };
        let windows = [1, 2, 7, 70].map(|throttled| (longest(throttled), throttled));
        for ((pause, throttled), window_ms) in windows.into_iter().zip([500, 1_000, 30_000, 30_000]) {
            let window = Duration::from_millis(window_ms);
            assert!(pause <= window && pause > window * 9 / 10, "{throttled}: {pause:?}");
        }
        let mut throttle = Throttle::default();
        (0..70).for_each(|_| throttle.on_throttled(NOW, NOW, &mut random));
        (0..6).for_each(|_| throttle.on_value(NOW, &mut random));
        assert_eq!(throttle.background_calls_max(), 1);
        throttle.on_value(NOW, &mut random);
        assert_eq!(
            throttle.background_calls_max(),
            4,
            "seven values make up for any number of throttled calls"
        );
    }
}
