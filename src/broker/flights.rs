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

    /// A try failed. The next one is for all who wait.
    pub(super) fn on_failure(&mut self, last: Rc<Failure>, not_before: Mono) -> &Failures {
        self.readers.append(&mut self.next_round);
        let (count, earlier) = self.failures.as_ref().map_or((0, not_before), |it| (it.count, it.not_before));
        self.failures.insert(Failures {
            count: count.saturating_add(1),
            last,
            not_before: not_before.max(earlier),
        })
    }

    /// Takes those for whom a cached value will do.
    pub(super) fn take_patient_readers(&mut self) -> Vec<Reader> {
        self.readers.extract_if(.., |reader| !reader.refresh_now).collect()
    }

    /// Takes all who wait.
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

    /// How many flights there are.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.by_id.len()
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

    /// Ends a pause that is over.
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

    /// All flights, if something may be due with one of them; [`Flights::arm`] is to follow for each that has not
    /// landed.
    pub(super) fn take_due(&mut self, now: Mono) -> Vec<FlightId> {
        if now < self.floor {
            return Vec::new();
        }
        self.floor = Mono::NEVER;
        self.by_id.keys().copied().collect()
    }

    /// Has a flight looked at when something is due with it. Readers who have nothing to fall back on (any more) get
    /// their budget.
    pub(super) fn arm(&mut self, id: FlightId, has_value: bool, now: Mono) {
        let Some(flight) = self.get_mut(id) else { return };
        if !has_value && !flight.readers.is_empty() {
            flight.budget_of_readers(now);
        }
        let deadline = flight.next_deadline(has_value);
        self.floor = self.floor.min(deadline);
    }

    /// Its place in queue or calls is up to who calls this.
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
