//! While KMS as a whole is down, one probe at a time goes out instead of a try for each secret.

use crate::cache::KeyRef;
use crate::kms::reply::bare_name;
use crate::kms::retry;
use crate::random::Random;
use crate::time::Mono;

/// So many different secrets have to fail, with no reply between, before KMS counts as down.
const SECRETS_TO_OPEN: usize = 3;

/// Closed: calls go out as they come. Open: one probe at a time.
#[derive(Debug, Default)]
pub(super) struct Circuit {
    /// The secrets that failed since the last reply; at most [`SECRETS_TO_OPEN`].
    failed: Vec<Box<str>>,
    /// Probes that failed since it opened, and the failure that opened it.
    failures: u32,
    /// When it was last seen to fail.
    failed_last: Mono,
    /// When the next probe may go out for a background refresh.
    probe_at: Mono,
    /// The same for a reader who waits: sooner, so that recovery is noticed by the first who asks.
    probe_for_reader_at: Mono,
}

impl Circuit {
    /// Whether KMS counts as down.
    #[must_use]
    pub(super) fn is_open(&self) -> bool {
        self.failed.len() >= SECRETS_TO_OPEN
    }

    /// Whether it is open by news that is not old: where nobody asked for a while, nobody knows.
    #[must_use]
    pub(super) fn is_known_open(&self, now: Mono) -> bool {
        self.is_open() && now < self.failed_last.after(retry::BACKOFF_CAP)
    }

    /// A call for `key` failed without a reply that shows KMS at work. `true`: this opened the circuit.
    pub(super) fn on_failure(&mut self, key: KeyRef<'_>, now: Mono, random: &mut Random) -> bool {
        let was_open = self.is_open();
        self.failed_last = now;
        if !was_open && !self.has_failed(key) {
            self.failed.push(bare_name(key.id).into());
        }
        if self.is_open() {
            // What fails before a probe was due had begun before: it says nothing about the next one.
            if !was_open || now >= self.probe_at {
                self.failures = self.failures.saturating_add(1);
                self.probe_at = now.after(retry::backoff(self.failures, retry::BACKOFF_CAP, random));
            }
            self.probe_for_reader_at = self.probe_at.min(now.after(retry::BACKOFF_BASE));
        }
        self.is_open() && !was_open
    }

    /// Whether this secret is one of those that opened it, whichever of its versions was asked for.
    #[must_use]
    pub(super) fn has_failed(&self, key: KeyRef<'_>) -> bool {
        self.failed.iter().any(|name| **name == *bare_name(key.id))
    }

    /// KMS replied. `true`: this closed the circuit.
    pub(super) fn on_reply(&mut self) -> bool {
        let was_open = self.is_open();
        self.failed.clear();
        self.failures = 0;
        was_open
    }

    /// From when on a try may begin, for a waiting reader or behind the scenes.
    #[must_use]
    pub(super) fn open_until(&self, for_reader: bool) -> Mono {
        match (self.is_open(), for_reader) {
            (false, _) => Mono::default(),
            (true, true) => self.probe_for_reader_at,
            (true, false) => self.probe_at,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_different_secrets_open_it_and_a_reply_closes_it() {
        let (mut circuit, mut random) = (Circuit::default(), Random::from_seed(1));
        let now = Mono::from_micros(1_000_000);
        let mut fail = |circuit: &mut Circuit, id| circuit.on_failure(KeyRef::current(id), now, &mut random);
        for _ in 0..5 {
            assert!(!fail(&mut circuit, "a"));
        }
        assert!(!fail(&mut circuit, "b"));
        assert!(!circuit.on_reply(), "was closed");
        assert!(!fail(&mut circuit, "b") && !fail(&mut circuit, "c"));
        assert!(
            !circuit.on_failure(KeyRef::new("c", Some("1"), None), now, &mut Random::from_seed(1)),
            "the same secret"
        );
        assert_eq!(circuit.open_until(true), Mono::default());
        assert!(fail(&mut circuit, "d") && circuit.is_open());
        assert!(!fail(&mut circuit, "e"), "it is open already");
        assert!(circuit.is_known_open(now) && !circuit.is_known_open(now.after(retry::BACKOFF_CAP)));
        assert!(circuit.open_until(true) <= now.after(retry::BACKOFF_BASE));
        assert!(circuit.open_until(true) <= circuit.open_until(false));
        assert!(circuit.on_reply() && !circuit.is_open());
    }

    #[test]
    fn calls_that_were_out_when_it_opened_do_not_lengthen_the_pause() {
        let (mut circuit, mut random) = (Circuit::default(), Random::from_seed(1));
        let now = Mono::from_micros(1_000_000);
        for id in ["a", "b", "c", "d", "e", "f", "g", "h"] {
            circuit.on_failure(KeyRef::current(id), now, &mut random);
        }
        assert!(circuit.open_until(false) <= now.after(retry::BACKOFF_BASE));
        for _ in 0..10 {
            let now = circuit.open_until(false);
            circuit.on_failure(KeyRef::current("a"), now, &mut random);
        }
        assert!(circuit.failures == 11, "probes do");
    }
}
