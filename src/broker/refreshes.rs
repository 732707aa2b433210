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

#[cfg(test)]
mod tests {
    use super::super::answer::ReplyStyle;
    use super::super::flights::{ClientId, Flights, Reader};
    use super::*;
    use crate::code::Code;
    use crate::http::write::Persistence;
    use crate::kms::format::Kv;
    use crate::kms::sign::Credentials;
    use crate::secret::Secret;
    use std::time::Duration;

    const NOW: Mono = Mono::from_micros(1_000_000);

    /// Tells of a fetch whose call went out now, with `refreshNow` or without.
    fn fetch(refreshes: &mut Refreshes, refresh_now: bool, outcome: Result<(), Rc<Failure>>) {
        let mut flights = Flights::default();
        let manner = ReplyStyle { head_only: false, kv: Kv::V1, persistence: Persistence::KeepAlive };
        let reader = Reader { client: ClientId(1), manner, refresh_now };
        flights.join(KeyRef::current("db"), reader, true, NOW).unwrap();
        let id = flights.find(KeyRef::current("db")).unwrap();
        refreshes.remember(flights.get(id).unwrap(), Err(failure("not even asked")));
        let credentials = Credentials {
            access_key_id: "a".into(),
            access_key_secret: Secret::from(&b"k"[..]),
            security_token: None,
            expires_unix_s: None,
        };
        flights.call_out(id, Rc::new(credentials), true, NOW);
        refreshes.remember(flights.get(id).unwrap(), outcome);
    }

    fn failure(message: &'static str) -> Rc<Failure> {
        Rc::new(Failure::ours(Code::UpstreamUnreachable, message))
    }

    fn recent(refreshes: &Refreshes) -> Option<Result<(), Rc<Failure>>> {
        refreshes.recent(KeyRef::current("db"), NOW).cloned()
    }

    #[test]
    fn only_refresh_now_is_remembered_and_for_a_second_only() {
        let mut refreshes = Refreshes::new();
        fetch(&mut refreshes, false, Ok(()));
        assert_eq!(recent(&refreshes), None);
        fetch(&mut refreshes, true, Ok(()));
        assert_eq!(recent(&refreshes), Some(Ok(())));
        for (ms, is_recent) in [(999, true), (1000, false)] {
            let now = NOW.after(Duration::from_millis(ms));
            assert_eq!(refreshes.recent(KeyRef::current("db"), now).is_some(), is_recent, "{ms}");
        }
        assert!(refreshes.recent(KeyRef::new("db", Some("1"), None), NOW).is_none(), "another version");
    }

    #[test]
    fn an_ordinary_fetch_is_newer_than_a_failure() {
        let mut refreshes = Refreshes::new();
        fetch(&mut refreshes, true, Ok(()));
        fetch(&mut refreshes, false, Err(failure("a")));
        assert_eq!(recent(&refreshes), Some(Ok(())), "the value is in the cache");
        fetch(&mut refreshes, true, Err(failure("b")));
        assert_eq!(recent(&refreshes), Some(Err(failure("b"))));
        fetch(&mut refreshes, false, Err(failure("c")));
        assert_eq!(recent(&refreshes), Some(Err(failure("c"))));
        fetch(&mut refreshes, false, Ok(()));
        assert_eq!(recent(&refreshes), Some(Ok(())));
    }
}
