//! The flights: the one fetch of each key that is under way, and the readers who wait for it.
//!
//! Only [`Flights`] changes a flight's phase, so that phases, queue and calls agree. A flight's life:
//!
//! ```text
//!     a reader finds nothing fresh, or a refresh is due
//!                        │
//!                        │ begin
//!                        ▼
//!                   ┌─────────┐   queue_again: at once, with new
//!          on_time  │         │   credentials or with the right time
//!     ┌───────────► │ Queued  │ ◄─────────────────────────────────┐
//!     │             │         │                                   │
//!     │             └─────────┘                                   │
//!     │                │   │     call_out: its turn has     ┌─────────┐
//!     │                │   └──────────────────────────────► │ Calling │
//!     │          pause │    come, and there are credentials └─────────┘
//!     │ no credentials │                                       │   │
//!     │ or KMS is down ▼            pause: the try failed      │   │
//!     │             ┌─────────┐                                │   │
//!     └──────────── │ Pausing │ ◄──────────────────────────────┘   │
//!                   └─────────┘                                    │
//!                        │ land: no reader waits, and              │ land: KMS gave the value,
//!                        │ there is no value to be renewed         │ or refuses this secret
//!                        ▼                                         ▼
//!                       over; readers of the next round begin another flight
//! ```
//!
//! A queued flight that failed before and that nobody waits for any more lands as a pausing one does.

use super::answer::{Failure, ReplyStyle};
use crate::cache::{Key, KeyRef};
use crate::call::CallId;
use crate::code::Code;
use crate::kms::retry;
use crate::kms::sign::Credentials;
use crate::time::Mono;
use hashbrown::{DefaultHashBuilder, HashTable};
use std::collections::{BTreeMap, VecDeque};
use std::hash::BuildHasher;
use std::rc::Rc;
use std::time::Duration;

/// Calls to KMS at a time, and so connections.
pub const UPSTREAM_CALLS_MAX: usize = 8;
/// Fetches under way, queued and pausing ones included. Clients that ask and leave cannot pile up more.
const FLIGHTS_MAX: usize = 2048;
/// `refreshNow` fetches a key at most once in this time.
pub(super) const REFRESH_NOW_PAUSE: Duration = Duration::from_secs(1);

/// Names a client's connection to the server; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientId(pub u64);

/// Numbers flights, in the order in which they began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FlightId(u64);

/// A client that waits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader {
    pub(super) client: ClientId,
    pub(super) manner: ReplyStyle,
    /// It asked with `refreshNow`: only KMS's own reply will do.
    pub(super) refresh_now: bool,
}

/// What a flight is doing.
#[derive(Debug)]
pub(super) enum Phase {
    /// It waits for its turn, for credentials, or for another secret's probe. Its try began at `began`.
    Queued { began: Mono },
    /// Its call has been out since `called`.
    Calling { began: Mono, called: Mono, credentials: Rc<Credentials>, for_refresh: bool },
    /// A try has failed, and the next one is not due yet.
    Pausing { until: Mono },
}

/// What readers with nothing to fall back on are given.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    /// When they are told that there is no reply.
    pub(super) until: Mono,
    /// Tries that may still be made.
    pub(super) tries_left: u32,
}

/// Failed tries in a row.
#[derive(Debug)]
pub(super) struct Failures {
    pub(super) count: u32,
    pub(super) last: Rc<Failure>,
    /// A server's `Retry-After`: no try before this.
    pub(super) not_before: Mono,
}

/// One fetch, and those it is for.
#[derive(Debug)]
pub(super) struct Flight {
    key: Key,
    phase: Phase,
    /// Those whom the running try will answer.
    pub(super) readers: Vec<Reader>,
    /// `refreshNow` readers who came after an ordinary call had begun: its reply may be older than their
    /// wish, so another call follows.
    next_round: Vec<Reader>,
    /// Set while a reader waits who has no cached value to fall back on.
    pub(super) budget: Option<Budget>,
    /// Set since a try has failed.
    pub(super) failures: Option<Failures>,
    /// Credentials were renewed for this try.
    pub(super) renewed: bool,
    /// The clock was corrected for this try.
    pub(super) clock_corrected: bool,
    /// It goes on behind the scenes after a failure, as long as there is a value to be renewed.
    background: bool,
}

impl Flight {
    pub(super) fn key(&self) -> KeyRef<'_> {
        self.key.as_ref()
    }

    pub(super) fn phase(&self) -> &Phase {
        &self.phase
    }

    /// When the present try began; `None` in a pause.
    pub(super) fn began(&self) -> Option<Mono> {
        match self.phase {
            Phase::Queued { began } | Phase::Calling { began, .. } => Some(began),
            Phase::Pausing { .. } => None,
        }
    }

    /// The readers' budget. If there is none, it begins now, or, where readers wait already, with the try: while they
    /// had a value to fall back on they waited for that.
    pub(super) fn budget_of_readers(&mut self, now: Mono) -> &mut Budget {
        let began = self.began().filter(|_| !self.readers.is_empty()).unwrap_or(now);
        let until = began.after(retry::READER_BUDGET);
        self.budget.get_or_insert(Budget { until, tries_left: retry::TRIES_MAX })
    }

    /// A try failed. The next one is for all readers, those of the next round too.
    pub(super) fn on_failure(&mut self, last: Rc<Failure>, not_before: Mono) -> &Failures {
        self.readers.append(&mut self.next_round);
        let (count, earlier) = self.failures.as_ref().map_or((0, not_before), |it| (it.count, it.not_before));
        self.failures.insert(Failures {
            count: count.saturating_add(1),
            last,
            not_before: not_before.max(earlier),
        })
    }

    /// Takes the readers for whom a cached value will do.
    pub(super) fn take_patient_readers(&mut self) -> Vec<Reader> {
        self.readers.extract_if(.., |reader| !reader.refresh_now).collect()
    }

    /// Takes all readers, those of the next round too.
    pub(super) fn take_all_readers(&mut self) -> Vec<Reader> {
        self.budget = None;
        let mut all = std::mem::take(&mut self.readers);
        all.append(&mut self.next_round);
        all
    }

    /// Adds a reader. `has_value`: there is a cached one to fall back on.
    ///
    /// # Errors
    /// The last failure, where KMS asked for a pause that outlasts the reader's patience.
    fn join(&mut self, reader: Reader, has_value: bool, now: Mono) -> Result<(), Rc<Failure>> {
        self.background |= has_value;
        if let Phase::Queued { began } = &mut self.phase
            && self.readers.is_empty()
        {
            // A refresh that was held back: its try begins now that a reader waits for it.
            *began = now;
        }
        if reader.refresh_now || !has_value {
            let patience = self.budget_of_readers(now).until;
            if let (Phase::Pausing { until }, Some(failures)) = (&mut self.phase, &self.failures) {
                if failures.not_before >= patience {
                    self.budget = None;
                    return Err(Rc::clone(&failures.last));
                }
                if self.readers.is_empty() {
                    // It paused behind the scenes. Where readers wait already the pause is theirs, too.
                    *until = (*until).min(now.max(failures.not_before));
                }
            }
        }
        let round =
            if self.is_too_early_for(&reader, now) { &mut self.next_round } else { &mut self.readers };
        round.push(reader);
        Ok(())
    }

    /// Whether the call that is out must not answer this reader: it began before the reader's wish, and is no
    /// `refreshNow` fetch of the last moment.
    fn is_too_early_for(&self, reader: &Reader, now: Mono) -> bool {
        let Phase::Calling { began, for_refresh, .. } = self.phase else { return false };
        reader.refresh_now && (!for_refresh || now.since(began) >= REFRESH_NOW_PAUSE)
    }

    /// When something is due that no event brings.
    fn next_deadline(&self, has_value: bool) -> Mono {
        let phase = match self.phase {
            Phase::Pausing { until } => until,
            Phase::Queued { began } | Phase::Calling { began, .. } => {
                let patient = has_value && self.readers.iter().any(|reader| !reader.refresh_now);
                if patient { began.after(retry::STALE_PATIENCE) } else { Mono::NEVER }
            }
        };
        phase.min(self.budget.map_or(Mono::NEVER, |budget| budget.until))
    }
}

/// All flights, at most [`FLIGHTS_MAX`].
///
/// Where a phase changes, `has_value` says whether the cache has a value of that key to fall back on.
#[derive(Debug, Default)]
pub(super) struct Flights {
    by_id: BTreeMap<FlightId, Flight>,
    by_key: HashTable<FlightId>,
    hasher: DefaultHashBuilder,
    /// Those in [`Phase::Queued`], in their order.
    queue: VecDeque<FlightId>,
    /// Those in [`Phase::Calling`], at most [`UPSTREAM_CALLS_MAX`].
    calls: Vec<(CallId, FlightId)>,
    /// No flight has anything due before this.
    floor: Mono,
    /// When the queue may move although nothing else happens.
    pub(super) queue_due: Mono,
    last_number: u64,
}

impl Flights {
    /// The flight of a key, if there is one.
    pub(super) fn find(&self, key: KeyRef<'_>) -> Option<FlightId> {
        let has_key = |id: &FlightId| self.by_id.get(id).is_some_and(|flight| flight.key() == key);
        self.by_key.find(self.hasher.hash_one(key), has_key).copied()
    }

    /// The flight whose call this is.
    pub(super) fn called(&self, call: CallId) -> Option<FlightId> {
        self.calls.iter().find(|(id, _)| *id == call).map(|(_, flight)| *flight)
    }

    /// A flight that has not landed.
    pub(super) fn get(&self, id: FlightId) -> Option<&Flight> {
        let flight = self.by_id.get(&id);
        debug_assert!(flight.is_some(), "{id:?} has landed");
        flight
    }

    /// As [`Flights::get`], to change it.
    pub(super) fn get_mut(&mut self, id: FlightId) -> Option<&mut Flight> {
        let flight = self.by_id.get_mut(&id);
        debug_assert!(flight.is_some(), "{id:?} has landed");
        flight
    }

    /// How many calls to KMS are out.
    pub(super) fn calls(&self) -> usize {
        self.calls.len()
    }

    /// How many of them nobody waits for.
    pub(super) fn background_calls(&self) -> usize {
        let flights = self.calls.iter().filter_map(|(_, id)| self.get(*id));
        flights.filter(|flight| flight.readers.is_empty()).count()
    }

    /// The first in the queue that `may` go.
    pub(super) fn first_queued(&self, may: impl Fn(&Flight) -> bool) -> Option<FlightId> {
        self.queue.iter().copied().find(|id| self.get(*id).is_some_and(&may))
    }

    /// All in the queue.
    pub(super) fn queued(&self) -> Vec<FlightId> {
        self.queue.iter().copied().collect()
    }

    /// A new number for a call.
    pub(super) fn next_call_id(&mut self) -> CallId {
        self.last_number += 1;
        CallId(self.last_number)
    }

    /// Begins a flight at the end of the queue, for a refresh behind the scenes if `background`. `None`: there are
    /// too many.
    pub(super) fn begin(&mut self, key: Key, background: bool, now: Mono) -> Option<FlightId> {
        if self.by_id.len() >= FLIGHTS_MAX {
            return None;
        }
        self.last_number += 1;
        let id = FlightId(self.last_number);
        let (flights, hasher) = (&self.by_id, &self.hasher);
        let hash = |id: &FlightId| flights.get(id).map_or(0, |flight| hasher.hash_one(&flight.key));
        self.by_key.insert_unique(hasher.hash_one(&key), id, hash);
        self.queue.push_back(id);
        let flight = Flight {
            key,
            phase: Phase::Queued { began: now },
            readers: Vec::new(),
            next_round: Vec::new(),
            budget: None,
            failures: None,
            renewed: false,
            clock_corrected: false,
            background,
        };
        self.by_id.insert(id, flight);
        Some(id)
    }

    /// Makes a reader wait for the key's flight, which begins if there is none.
    ///
    /// # Errors
    /// What the reader is told at once: there are too many flights, or KMS asked for a pause that outlasts the
    /// reader's patience.
    pub(super) fn join(
        &mut self,
        key: KeyRef<'_>,
        reader: Reader,
        has_value: bool,
        now: Mono,
    ) -> Result<(), Rc<Failure>> {
        let id = self.find(key).or_else(|| self.begin(key.to_owned(), has_value, now));
        let Some((id, flight)) = id.and_then(|id| Some((id, self.get_mut(id)?))) else {
            let why = "too many secrets are being fetched at once";
            return Err(Rc::new(Failure::ours(Code::UpstreamUnreachable, why)));
        };
        flight.join(reader, has_value, now)?;
        self.arm(id, has_value, now);
        Ok(())
    }

    /// Sends a flight's call out.
    pub(super) fn call_out(
        &mut self,
        id: FlightId,
        credentials: Rc<Credentials>,
        has_value: bool,
        now: Mono,
    ) -> CallId {
        let call = self.next_call_id();
        self.change_phase(id, |flight| {
            // A refresh that was held back begins only now.
            let began = flight.began().filter(|_| !flight.readers.is_empty()).unwrap_or(now);
            let for_refresh = flight.readers.iter().any(|reader| reader.refresh_now);
            Phase::Calling { began, called: now, credentials, for_refresh }
        });
        self.calls.push((call, id));
        self.arm(id, has_value, now);
        call
    }

    /// The same try once more, ahead of all others.
    pub(super) fn queue_again(&mut self, id: FlightId, has_value: bool, now: Mono) {
        self.change_phase(id, |flight| Phase::Queued { began: flight.began().unwrap_or(now) });
        self.queue.push_front(id);
        self.arm(id, has_value, now);
    }

    /// A queued flight stays ahead of the others.
    pub(super) fn move_to_front(&mut self, id: FlightId) {
        self.queue.retain(|it| *it != id);
        self.queue.push_front(id);
    }

    /// No try before `until`.
    pub(super) fn pause(&mut self, id: FlightId, until: Mono, has_value: bool, now: Mono) {
        self.change_phase(id, |_| Phase::Pausing { until });
        self.arm(id, has_value, now);
    }

    /// Ends the flight's pause if that is over, and arms the flight.
    pub(super) fn on_time(&mut self, id: FlightId, has_value: bool, now: Mono) {
        if matches!(self.get(id), Some(Flight { phase: Phase::Pausing { until }, .. }) if now >= *until) {
            self.change_phase(id, |_| Phase::Queued { began: now });
            self.queue.push_back(id);
        }
        self.arm(id, has_value, now);
    }

    /// The flight is over. Readers who came too late for it begin the next one.
    pub(super) fn land(&mut self, id: FlightId, now: Mono) -> Option<Flight> {
        self.leave_phase(id);
        let mut flight = self.by_id.remove(&id)?;
        if let Ok(entry) = self.by_key.find_entry(self.hasher.hash_one(&flight.key), |it| *it == id) {
            entry.remove();
        }
        for reader in flight.next_round.drain(..) {
            // A cached value is no fall-back for them.
            let joined = self.join(flight.key.as_ref(), reader, false, now);
            debug_assert!(joined.is_ok(), "{joined:?}");
        }
        Some(flight)
    }

    /// Whether another try has no purpose: one has failed, no reader waits, there is no value to be renewed, and no
    /// `Retry-After` to be remembered for those who come next (as long as there is room).
    pub(super) fn is_pointless(&self, id: FlightId, has_value: bool, now: Mono) -> bool {
        let has_room = self.by_id.len() <= FLIGHTS_MAX / 2;
        self.get(id).is_some_and(|flight| {
            flight.failures.as_ref().is_some_and(|failures| now >= failures.not_before || !has_room)
                && flight.readers.is_empty()
                && flight.next_round.is_empty()
                && !(flight.background && has_value)
        })
    }

    /// A client went away; its flight goes on.
    pub(super) fn left(&mut self, client: ClientId) {
        for flight in self.by_id.values_mut() {
            flight.readers.retain(|reader| reader.client != client);
            flight.next_round.retain(|reader| reader.client != client);
        }
    }

    /// Ends all flights; gives those who wait for them.
    pub(super) fn clear(&mut self) -> Vec<Reader> {
        self.by_key.clear();
        self.queue.clear();
        self.calls.clear();
        let flights = std::mem::take(&mut self.by_id).into_values();
        flights.flat_map(|mut flight| flight.take_all_readers()).collect()
    }

    /// When [`Flights::take_due`] or the queue is worth a look.
    pub(super) fn next_deadline(&self) -> Mono {
        self.floor.min(self.queue_due)
    }

    /// All flights, if something may be due with one of them. Each is then armed again, or lands.
    pub(super) fn take_due(&mut self, now: Mono) -> Vec<FlightId> {
        if now < self.floor {
            return Vec::new();
        }
        self.floor = Mono::NEVER;
        self.by_id.keys().copied().collect()
    }

    /// Sees to it that a flight is looked at when something is due with it. Readers who have nothing to fall back on, or
    /// no longer have, get their budget.
    pub(super) fn arm(&mut self, id: FlightId, has_value: bool, now: Mono) {
        let Some(flight) = self.get_mut(id) else { return };
        if !has_value && !flight.readers.is_empty() {
            flight.budget_of_readers(now);
        }
        let deadline = flight.next_deadline(has_value);
        self.floor = self.floor.min(deadline);
    }

    /// The caller puts the flight into the queue or among the calls, where its new phase belongs there.
    fn change_phase(&mut self, id: FlightId, to: impl FnOnce(&Flight) -> Phase) {
        self.leave_phase(id);
        if let Some(flight) = self.get_mut(id) {
            flight.phase = to(flight);
        }
    }

    fn leave_phase(&mut self, id: FlightId) {
        match self.get(id).map(Flight::phase) {
            Some(Phase::Queued { .. }) => self.queue.retain(|it| *it != id),
            Some(Phase::Calling { .. }) => self.calls.retain(|(_, it)| *it != id),
            Some(Phase::Pausing { .. }) | None => {}
        }
    }

    /// Panics where phases, queue, calls and keys contradict each other.
    #[cfg(any(test, debug_assertions))]
    pub(super) fn check_invariants(&self) {
        assert!(self.calls.len() <= UPSTREAM_CALLS_MAX && self.by_id.len() <= FLIGHTS_MAX);
        assert_eq!(self.by_key.len(), self.by_id.len());
        let mut clients = hashbrown::HashSet::new();
        let mut placed = 0;
        for (id, flight) in &self.by_id {
            assert_eq!(self.find(flight.key()), Some(*id), "one flight a key");
            let queued = self.queue.iter().filter(|it| *it == id).count();
            let called = self.calls.iter().filter(|(_, it)| it == id).count();
            let place = match flight.phase {
                Phase::Queued { .. } => (1, 0),
                Phase::Calling { .. } => (0, 1),
                Phase::Pausing { .. } => (0, 0),
            };
            assert_eq!((queued, called), place, "a flight is where its phase says");
            placed += queued + called;
            for reader in flight.readers.iter().chain(&flight.next_round) {
                assert!(clients.insert(reader.client.0), "a client waits for one reply at a time");
            }
            assert!(flight.next_round.iter().all(|reader| reader.refresh_now));
            let waits_for_kms = flight.readers.iter().any(|reader| reader.refresh_now);
            assert!(
                flight.budget.is_some() || !waits_for_kms,
                "a reader who waits for KMS alone has a budget"
            );
            assert!(self.floor <= flight.next_deadline(false), "a flight is looked at in time");
        }
        assert_eq!(self.queue.len() + self.calls.len(), placed, "no flight in queue or calls has landed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::write::Persistence;
    use crate::kms::format::Kv;
    use crate::secret::Secret;

    const SECOND: Duration = Duration::from_secs(1);

    fn at(ms: u64) -> Mono {
        Mono::from_micros(1_000_000_000 + ms * 1000)
    }

    fn reader(client: u64) -> Reader {
        let manner = ReplyStyle { head_only: false, kv: Kv::V1, persistence: Persistence::KeepAlive };
        Reader { client: ClientId(client), manner, refresh_now: false }
    }

    fn refresher(client: u64) -> Reader {
        Reader { refresh_now: true, ..reader(client) }
    }

    fn clients(readers: &[Reader]) -> Vec<u64> {
        readers.iter().map(|reader| reader.client.0).collect()
    }

    fn failure() -> Rc<Failure> {
        Rc::new(Failure::ours(Code::UpstreamUnreachable, "x"))
    }

    fn credentials() -> Rc<Credentials> {
        Rc::new(Credentials {
            access_key_id: "a".into(),
            access_key_secret: Secret::from(&b"k"[..]),
            security_token: None,
            expires_unix_s: None,
        })
    }

    fn db() -> KeyRef<'static> {
        KeyRef::current("db")
    }

    /// Flights with one for `db`, begun at 0, for a refresh behind the scenes if `background`.
    fn one(background: bool) -> (Flights, FlightId) {
        let mut flights = Flights::default();
        flights.take_due(at(0));
        let id = flights.begin(db().to_owned(), background, at(0)).unwrap();
        (flights, id)
    }

    fn join(flights: &mut Flights, reader: Reader, has_value: bool, ms: u64) {
        flights.join(db(), reader, has_value, at(ms)).unwrap();
        flights.check_invariants();
    }

    fn fail(flights: &mut Flights, id: FlightId, not_before: Mono) {
        flights.get_mut(id).unwrap().on_failure(failure(), not_before);
    }

    #[test]
    fn a_life_with_every_change_of_phase() {
        let (mut flights, id) = one(false);
        assert_eq!((flights.find(db()), flights.queued()), (Some(id), vec![id]));
        join(&mut flights, reader(1), false, 0);

        let call = flights.call_out(id, credentials(), false, at(10));
        flights.check_invariants();
        assert_eq!((flights.queued(), flights.calls(), flights.called(call)), (vec![], 1, Some(id)));

        flights.queue_again(id, false, at(20));
        flights.check_invariants();
        assert_eq!((flights.queued(), flights.calls(), flights.called(call)), (vec![id], 0, None));
        assert_eq!(flights.get(id).unwrap().began(), Some(at(0)), "the same try");

        let second = flights.call_out(id, credentials(), false, at(30));
        assert_ne!(second, call);
        fail(&mut flights, id, at(0));
        flights.pause(id, at(500), false, at(40));
        flights.check_invariants();
        assert_eq!((flights.queued(), flights.calls()), (vec![], 0));
        assert_eq!(flights.get(id).unwrap().began(), None);

        flights.on_time(id, false, at(499));
        assert!(flights.queued().is_empty(), "the pause is not over");
        flights.on_time(id, false, at(500));
        flights.check_invariants();
        assert_eq!(flights.queued(), [id]);
        assert_eq!(flights.get(id).unwrap().began(), Some(at(500)), "another try");

        flights.call_out(id, credentials(), false, at(500));
        assert_eq!(clients(&flights.land(id, at(600)).unwrap().readers), [1]);
        flights.check_invariants();
        assert_eq!((flights.by_id.len(), flights.find(db()), flights.calls()), (0, None, 0));
    }

    #[test]
    fn the_queue_keeps_its_order_but_for_those_that_go_again() {
        let mut flights = Flights::default();
        let mut begin = |id| flights.begin(KeyRef::current(id).to_owned(), false, at(0)).unwrap();
        let (a, b, c) = (begin("a"), begin("b"), begin("c"));
        assert_eq!(flights.queued(), [a, b, c]);
        flights.move_to_front(c);
        assert_eq!(flights.queued(), [c, a, b]);
        flights.call_out(b, credentials(), false, at(0));
        flights.queue_again(b, false, at(0));
        assert_eq!(flights.queued(), [b, c, a]);
        flights.join(KeyRef::current("a"), reader(1), false, at(0)).unwrap();
        assert_eq!(flights.first_queued(|flight| !flight.readers.is_empty()), Some(a));
        flights.call_out(a, credentials(), false, at(0));
        flights.call_out(c, credentials(), false, at(0));
        assert_eq!((flights.calls(), flights.background_calls()), (2, 1));
        flights.check_invariants();
    }

    #[test]
    fn readers_with_the_same_wish_share_a_fetch_of_the_last_second() {
        for (ms, round) in [(999, [1, 2].as_slice()), (1000, &[1]), (5000, &[1])] {
            let (mut flights, id) = one(false);
            join(&mut flights, refresher(1), true, 0);
            flights.call_out(id, credentials(), true, at(0));
            join(&mut flights, refresher(2), true, ms);
            assert_eq!(clients(&flights.get(id).unwrap().readers), round, "{ms}");
        }
        let (mut flights, id) = one(false);
        join(&mut flights, reader(1), false, 0);
        flights.call_out(id, credentials(), false, at(0));
        join(&mut flights, reader(2), false, 5000);
        assert_eq!(clients(&flights.get(id).unwrap().readers), [1, 2], "an ordinary reader takes any");
        join(&mut flights, refresher(3), false, 5000);
        assert_eq!(
            clients(&flights.get(id).unwrap().readers),
            [1, 2],
            "an ordinary call began before its wish"
        );
    }

    #[test]
    fn the_next_round_is_another_flight_with_a_budget_of_its_own() {
        let (mut flights, id) = one(false);
        join(&mut flights, reader(1), true, 0);
        flights.call_out(id, credentials(), true, at(0));
        join(&mut flights, refresher(2), true, 100);
        join(&mut flights, refresher(3), true, 200);
        assert_eq!(clients(&flights.land(id, at(900)).unwrap().readers), [1]);
        flights.check_invariants();
        let next = flights.find(db()).unwrap();
        assert_eq!(flights.queued(), [next]);
        let flight = flights.get(next).unwrap();
        assert_eq!(clients(&flight.readers), [2, 3]);
        assert_eq!(flight.budget.unwrap().until, at(900).after(retry::READER_BUDGET));
        flights.queue_due = Mono::NEVER;
        assert_eq!(flights.take_due(at(1_000)), [next], "when the first reader's stale value was due");
        flights.arm(next, true, at(900));
        assert_eq!(flights.next_deadline(), at(900).after(retry::READER_BUDGET));
    }

    #[test]
    fn all_who_wait_are_for_the_next_try() {
        let (mut flights, id) = one(false);
        join(&mut flights, reader(1), true, 0);
        flights.call_out(id, credentials(), true, at(0));
        join(&mut flights, refresher(2), true, 0);
        let flight = flights.get_mut(id).unwrap();
        assert_eq!(flight.on_failure(failure(), at(9)).count, 1);
        assert_eq!(clients(&flight.take_patient_readers()), [1]);
        assert_eq!(clients(&flight.readers), [2]);
        let failures = flight.on_failure(failure(), at(5));
        assert_eq!((failures.count, failures.not_before), (2, at(9)), "the longer pause stays");
        assert_eq!(flight.on_failure(failure(), at(10)).not_before, at(10));
        assert!(flight.budget.is_some());
        assert_eq!(clients(&flight.take_all_readers()), [2]);
        assert!(flight.budget.is_none() && flight.readers.is_empty());
    }

    #[test]
    fn who_leaves_is_forgotten_in_both_rounds() {
        let (mut flights, id) = one(false);
        join(&mut flights, reader(1), true, 0);
        join(&mut flights, reader(2), true, 0);
        flights.call_out(id, credentials(), true, at(0));
        join(&mut flights, refresher(3), true, 0);
        join(&mut flights, refresher(4), true, 0);
        flights.left(ClientId(1));
        flights.left(ClientId(4));
        flights.left(ClientId(9));
        assert_eq!(clients(&flights.clear()), [2, 3]);
        flights.check_invariants();
        assert_eq!((flights.by_id.len(), flights.queued().len(), flights.calls()), (0, 0, 0));
        assert_eq!(flights.find(db()), None);
    }

    #[test]
    fn a_reader_who_joins_a_pause() {
        // Behind the scenes it ends at once, but not before KMS allows it.
        for (not_before, until) in [(0, 100), (100, 100), (300, 300), (8_099, 8_099)] {
            let (mut flights, id) = one(true);
            fail(&mut flights, id, at(not_before));
            flights.pause(id, at(9_000), true, at(0));
            join(&mut flights, refresher(1), true, 100);
            flights.on_time(id, true, at(until - 1));
            assert!(flights.queued().is_empty(), "{not_before}");
            flights.on_time(id, true, at(until));
            assert_eq!(flights.queued(), [id], "{not_before}");
        }
        // It is never longer than it was.
        let (mut flights, id) = one(true);
        fail(&mut flights, id, at(0));
        flights.pause(id, at(50), true, at(0));
        join(&mut flights, refresher(1), true, 100);
        flights.on_time(id, true, at(50));
        assert_eq!(flights.queued(), [id]);
        // Where others wait already it is theirs, too.
        let (mut flights, id) = one(false);
        join(&mut flights, reader(1), false, 0);
        fail(&mut flights, id, at(0));
        flights.pause(id, at(400), false, at(0));
        join(&mut flights, reader(2), false, 100);
        flights.on_time(id, false, at(399));
        assert!(flights.queued().is_empty());
    }

    #[test]
    fn a_pause_longer_than_patience_is_told_at_once() {
        let (mut flights, id) = one(true);
        fail(&mut flights, id, at(8_100));
        flights.pause(id, at(8_100), false, at(0));
        assert_eq!(flights.join(db(), reader(1), false, at(100)).unwrap_err(), failure());
        flights.check_invariants();
        let flight = flights.get(id).unwrap();
        assert!(flight.readers.is_empty() && flight.budget.is_none());
        flights.join(db(), reader(2), true, at(100)).unwrap();
        assert!(flights.get(id).unwrap().budget.is_none(), "a value to fall back on: it may wait");
    }

    #[test]
    fn a_flight_goes_on_only_with_a_purpose() {
        let pointless = |background: bool, has_value: bool, not_before: u64, reader: Option<Reader>| {
            let (mut flights, id) = one(background);
            flights.call_out(id, credentials(), has_value, at(0));
            assert!(!flights.is_pointless(id, false, at(99_000)), "nothing has failed");
            fail(&mut flights, id, at(not_before));
            if let Some(reader) = reader {
                join(&mut flights, reader, has_value, 0);
            }
            flights.is_pointless(id, has_value, at(1_000))
        };
        assert!(pointless(false, false, 0, None));
        assert!(pointless(false, true, 0, None), "nobody wants the value renewed");
        assert!(pointless(true, false, 0, None), "there is none any more");
        assert!(!pointless(true, true, 0, None), "to renew the value");
        assert!(!pointless(false, false, 0, Some(reader(1))), "for the reader");
        assert!(!pointless(false, false, 0, Some(refresher(1))), "for the reader of the next round");
        assert!(pointless(false, false, 1_000, None));
        assert!(!pointless(false, false, 1_001, None), "to remember that KMS wants a pause");
    }

    #[test]
    fn a_value_that_a_reader_had_to_fall_back_on_goes_on_being_renewed() {
        let (mut flights, id) = one(false);
        join(&mut flights, reader(1), true, 0);
        fail(&mut flights, id, at(0));
        flights.get_mut(id).unwrap().take_all_readers();
        assert!(!flights.is_pointless(id, true, at(0)));

        // But what the readers of a next round want is a reply, not that.
        let (mut flights, id) = one(true);
        flights.call_out(id, credentials(), true, at(0));
        join(&mut flights, refresher(1), true, 0);
        flights.land(id, at(0));
        let next = flights.find(db()).unwrap();
        fail(&mut flights, next, at(0));
        flights.get_mut(next).unwrap().take_all_readers();
        assert!(flights.is_pointless(next, true, at(0)));
    }

    #[test]
    fn there_is_room_for_so_many_and_half_of_it_for_memories() {
        let mut flights = Flights::default();
        let begin = |flights: &mut Flights, n: usize| {
            flights.begin(KeyRef::current(&n.to_string()).to_owned(), false, at(0))
        };
        let first = begin(&mut flights, 0).unwrap();
        fail(&mut flights, first, at(9_000));
        for n in 1..FLIGHTS_MAX / 2 {
            begin(&mut flights, n).unwrap();
        }
        assert!(!flights.is_pointless(first, false, at(0)));
        for n in FLIGHTS_MAX / 2..FLIGHTS_MAX {
            begin(&mut flights, n).unwrap();
            assert!(flights.is_pointless(first, false, at(0)), "{n}");
        }
        assert_eq!(begin(&mut flights, FLIGHTS_MAX), None);
        let told = flights.join(db(), reader(1), false, at(0)).unwrap_err();
        let why = "too many secrets are being fetched at once";
        assert_eq!(*told, Failure::ours(Code::UpstreamUnreachable, why));
        flights.join(KeyRef::current("7"), reader(1), false, at(0)).unwrap();
        flights.check_invariants();
    }

    #[test]
    fn it_is_looked_at_when_a_reader_has_waited_long_enough() {
        let deadline = |has_value, joins: &[(Reader, u64)]| {
            let (mut flights, id) = one(true);
            for (reader, ms) in joins {
                join(&mut flights, *reader, has_value, *ms);
            }
            flights.call_out(id, credentials(), has_value, at(300));
            flights.queue_due = Mono::NEVER;
            flights.next_deadline()
        };
        assert_eq!((deadline(true, &[]), deadline(false, &[])), (Mono::NEVER, Mono::NEVER));
        assert_eq!(deadline(true, &[(reader(1), 100), (reader(2), 200)]), at(100).after(SECOND));
        assert_eq!(deadline(true, &[(refresher(1), 100)]), at(100).after(SECOND * 8));
        assert_eq!(deadline(false, &[(reader(1), 100), (reader(2), 200)]), at(100).after(SECOND * 8));

        let (mut flights, id) = one(true);
        flights.queue_due = Mono::NEVER;
        fail(&mut flights, id, at(0));
        flights.pause(id, at(700), true, at(0));
        assert_eq!(flights.next_deadline(), at(700));
        assert!(flights.take_due(at(699)).is_empty());
        assert_eq!(flights.take_due(at(700)), [id]);
        assert_eq!(flights.next_deadline(), Mono::NEVER, "until it is armed again");
        flights.on_time(id, true, at(700));
        flights.queue_due = at(800);
        assert_eq!(flights.next_deadline(), at(800));
    }

    #[test]
    fn a_try_without_readers_begins_with_its_call_and_one_with_readers_with_them() {
        let (mut flights, id) = one(true);
        flights.call_out(id, credentials(), true, at(300));
        assert_eq!(flights.get(id).unwrap().began(), Some(at(300)));

        let (mut flights, id) = one(true);
        join(&mut flights, reader(1), true, 100);
        join(&mut flights, reader(2), true, 200);
        flights.call_out(id, credentials(), true, at(300));
        assert_eq!(flights.get(id).unwrap().began(), Some(at(100)));
    }

    #[test]
    fn readers_whose_value_is_gone_have_waited_since_the_try_began() {
        let (mut flights, id) = one(false);
        join(&mut flights, reader(1), true, 100);
        assert!(flights.get(id).unwrap().budget.is_none());
        flights.arm(id, false, at(900));
        let budget = flights.get(id).unwrap().budget.unwrap();
        assert_eq!((budget.until, budget.tries_left), (at(100).after(SECOND * 8), retry::TRIES_MAX));
        flights.arm(id, false, at(950));
        assert_eq!(flights.get(id).unwrap().budget.unwrap().until, budget.until, "once");

        // A reader who joins what went on behind the scenes waits from then on.
        let (mut flights, id) = one(true);
        flights.call_out(id, credentials(), true, at(0));
        join(&mut flights, refresher(1), true, 500);
        assert_eq!(flights.get(id).unwrap().budget.unwrap().until, at(500).after(SECOND * 8));
    }
}
