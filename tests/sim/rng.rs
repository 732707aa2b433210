//! The one source of randomness of a run.

use kms_agent::random::Random;

/// Everything random comes from here, and so from the seed.
pub struct Rng(Random);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        // Neighbouring seeds begin far apart.
        let mut random = Random::from_seed(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x005e_ed0f_51e5);
        random.next_u64();
        Rng(random)
    }

    /// Uniform in `0..bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.0.up_to(bound.max(1) as u64 - 1)).unwrap()
    }

    /// Uniform in `low..=high`.
    pub fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.0.up_to(high - low)
    }

    /// Every order of magnitude between `low` and `high` (both above 0) is as likely.
    pub fn magnitude(&mut self, low: u64, high: u64) -> u64 {
        let orders = u64::from(high.ilog2() - low.ilog2()) + 1;
        let low = (low << self.range(0, orders - 1)).min(high);
        self.range(low, (low * 2).min(high))
    }

    /// True so many times in a thousand.
    pub fn chance(&mut self, per_mille: u64) -> bool {
        per_mille > 0 && self.0.up_to(999) < per_mille
    }

    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}
