//! What `refreshNow` fetches came to. It answers other readers with the same wish in the same moment.

use super::answer::Failure;
use super::flights::{Flight, Phase, REFRESH_NOW_PAUSE};
use crate::cache::KeyRef;
use crate::cache::lru::Lru;
use crate::time::Mono;
use std::rc::Rc;

/// Keys whose last `refreshNow` fetch is remembered.
const KEYS_MAX: usize = 1024;

#[derive(Debug)]
struct Refresh {
    began: Mono,
    /// A value is in the cache.
    outcome: Result<(), Rc<Failure>>,
}

/// The last `refreshNow` fetch of each key.
#[derive(Debug)]
pub(super) struct Refreshes(Lru<Refresh>);

impl Refreshes {
    pub(super) fn new() -> Refreshes {
        Refreshes(Lru::new(KEYS_MAX, usize::MAX))
    }

    /// What the last one came to, if it began a moment ago.
    pub(super) fn recent(&self, key: KeyRef<'_>, now: Mono) -> Option<&Result<(), Rc<Failure>>> {
        let last = self.0.peek(key).filter(|last| now.since(last.began) < REFRESH_NOW_PAUSE);
        last.map(|last| &last.outcome)
    }

    /// A flight's call came to this.
    pub(super) fn remember(&mut self, flight: &Flight, outcome: Result<(), Rc<Failure>>) {
        let Phase::Calling { began, for_refresh, .. } = flight.phase() else { return };
        let key = flight.key();
        if *for_refresh {
            let key = key.to_owned();
            let weight_bytes = key.text_bytes();
            self.0.insert(key, Refresh { began: *began, outcome }, weight_bytes);
        } else if let Some(last) = self.0.peek_mut(key)
            && last.outcome.is_err()
        {
            // An ordinary fetch has brought a newer word than that failure.
            last.outcome = outcome;
        }
    }
}
