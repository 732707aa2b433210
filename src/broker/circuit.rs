//! While KMS as a whole is down, one probe at a time goes out instead of a try for each secret.

use crate::cache::KeyRef;
use crate::kms::reply::bare_name;
use crate::kms::retry;
use crate::random::Random;
use crate::time::Mono;

/// So many different secrets have to fail, with no reply between, before KMS counts as down.
const SECRETS_TO_OPEN: usize = 3;

/// Whether KMS counts as down.
#[derive(Debug)]
pub(super) enum Circuit {
    /// Calls go out as they come. Fewer than [`SECRETS_TO_OPEN`] secrets have failed since the last reply.
    Closed { failed: Vec<Box<str>> },
    /// One probe at a time goes out, the next one for a refresh behind the scenes at `probe_at`. `failures` are those
    /// of probes, and the one that opened it; `failed_last` is the time of the last failure of any call.
    Open { failed: Vec<Box<str>>, failures: u32, failed_last: Mono, probe_at: Mono },
}

impl Default for Circuit {
    fn default() -> Circuit {
        Circuit::Closed { failed: Vec::new() }
    }
}

impl Circuit {
    pub(super) fn is_open(&self) -> bool {
        matches!(self, Circuit::Open { .. })
    }

    /// Whether it is open by news that is not old. Without calls for a while nothing is known of KMS.
    pub(super) fn is_known_open(&self, now: Mono) -> bool {
        matches!(self, Circuit::Open { failed_last, .. } if now < failed_last.after(retry::BACKOFF_CAP))
    }

    /// A call for `key` failed without a reply that shows KMS at work. `true`: this opened the circuit.
    pub(super) fn on_failure(&mut self, key: KeyRef<'_>, now: Mono, random: &mut Random) -> bool {
        let is_new = !self.has_failed(key);
        match self {
            Circuit::Closed { failed } => {
                if is_new {
                    failed.push(bare_name(key.id).into());
                }
                if failed.len() < SECRETS_TO_OPEN {
                    return false;
                }
                let probe_at = now.after(retry::backoff(1, retry::BACKOFF_CAP, random));
                let failed = std::mem::take(failed);
                *self = Circuit::Open { failed, failures: 1, failed_last: now, probe_at };
                true
            }
            Circuit::Open { failures, failed_last, probe_at, .. } => {
                *failed_last = now;
                // What fails before a probe was due had begun before: it says nothing about the next one.
                if now >= *probe_at {
                    *failures = failures.saturating_add(1);
                    *probe_at = now.after(retry::backoff(*failures, retry::BACKOFF_CAP, random));
                }
                false
            }
        }
    }

    /// Whether this secret is one of those that failed, whichever of its versions was asked for.
    pub(super) fn has_failed(&self, key: KeyRef<'_>) -> bool {
        let (Circuit::Closed { failed } | Circuit::Open { failed, .. }) = self;
        failed.iter().any(|name| **name == *bare_name(key.id))
    }

    /// KMS replied. `true`: this closed the circuit.
    pub(super) fn on_reply(&mut self) -> bool {
        matches!(std::mem::take(self), Circuit::Open { .. })
    }

    /// From when on a try may begin. For a waiting reader that is soon after the last failure, so that recovery is
    /// noticed by the first who asks.
    pub(super) fn next_try_at(&self, for_reader: bool) -> Mono {
        match self {
            Circuit::Closed { .. } => Mono::default(),
            Circuit::Open { failed_last, probe_at, .. } if for_reader => {
                (*probe_at).min(failed_last.after(retry::BACKOFF_BASE))
            }
            Circuit::Open { probe_at, .. } => *probe_at,
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
        assert_eq!(circuit.next_try_at(true), Mono::default());
        assert!(fail(&mut circuit, "d") && circuit.is_open());
        assert!(!fail(&mut circuit, "e"), "it is open already");
        assert!(circuit.is_known_open(now) && !circuit.is_known_open(now.after(retry::BACKOFF_CAP)));
        assert!(circuit.next_try_at(true) <= now.after(retry::BACKOFF_BASE));
        assert!(circuit.next_try_at(true) <= circuit.next_try_at(false));
        assert!(circuit.on_reply() && !circuit.is_open());
    }

    #[test]
    fn calls_that_were_out_when_it_opened_do_not_lengthen_the_pause() {
        let (mut circuit, mut random) = (Circuit::default(), Random::from_seed(1));
        let now = Mono::from_micros(1_000_000);
        for id in ["a", "b", "c", "d", "e", "f", "g", "h"] {
            circuit.on_failure(KeyRef::current(id), now, &mut random);
        }
        assert!(circuit.next_try_at(false) <= now.after(retry::BACKOFF_BASE));
        for _ in 0..10 {
            let now = circuit.next_try_at(false);
            circuit.on_failure(KeyRef::current("a"), now, &mut random);
        }
        assert!(matches!(circuit, Circuit::Open { failures: 11, .. }), "probes do");
        let now = circuit.next_try_at(false).after(retry::BACKOFF_CAP);
        circuit.on_failure(KeyRef::current("a"), now, &mut random);
        assert!(matches!(circuit, Circuit::Open { failures: 12, .. }), "late ones too");
    }

    #[test]
    fn a_reader_s_probe_is_never_far() {
        let (mut circuit, mut random) = (Circuit::default(), Random::from_seed(1));
        let mut now = Mono::from_micros(1_000_000);
        let mut pauses = Vec::new();
        for n in 0..100 {
            circuit.on_failure(KeyRef::current(&n.to_string()), now, &mut random);
            if circuit.is_open() {
                let soonest = now.after(retry::BACKOFF_BASE).min(circuit.next_try_at(false));
                assert_eq!(circuit.next_try_at(true), soonest);
                pauses.push(circuit.next_try_at(false).since(now));
                now = circuit.next_try_at(false);
            }
        }
        assert!(pauses.iter().max() > Some(&(retry::BACKOFF_CAP / 2)), "{pauses:?}");
    }
}
