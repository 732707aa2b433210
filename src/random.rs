//! Randomness for jitter, nonces and request ids: unpredictable enough to be unique, never a key.

use ring::rand::{SecureRandom, SystemRandom};

/// A small generator (splitmix64 over two words), seeded once; a seed of one's own replays a run.
#[derive(Debug)]
pub struct Random {
    words: [u64; 2],
}

impl Random {
    /// Seeded by the operating system.
    ///
    /// # Errors
    /// When the operating system gives no random bytes.
    pub fn from_system() -> Result<Random, ring::error::Unspecified> {
        let mut seed = [[0; 8]; 2];
        for word in &mut seed {
            SystemRandom::new().fill(word)?;
        }
        Ok(Random { words: seed.map(u64::from_ne_bytes) })
    }

    /// Seeded by hand, for tests and the simulation.
    #[must_use]
    pub const fn from_seed(seed: u64) -> Random {
        Random { words: [seed, !seed] }
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let [counter, key] = &mut self.words;
        *counter = counter.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *counter ^ key.rotate_left(17);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn next_u128(&mut self) -> u128 {
        (u128::from(self.next_u64()) << 64) | u128::from(self.next_u64())
    }

    /// Uniform in `0..=max`.
    pub fn up_to(&mut self, max: u64) -> u64 {
        match max.checked_add(1) {
            Some(bound) => self.next_u64() % bound,
            None => self.next_u64(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_replays_and_bounds_hold() {
        let (mut a, mut b) = (Random::from_seed(7), Random::from_seed(7));
        for _ in 0..1000 {
            assert_eq!(a.next_u64(), b.next_u64());
            assert!(a.up_to(9) <= 9);
            b.next_u64();
        }
        assert_ne!(Random::from_system().unwrap().next_u128(), Random::from_system().unwrap().next_u128());
    }
}
