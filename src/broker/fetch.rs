//! A fetch's way: its turn in the queue, credentials, the call, its outcome, and what a failure means to the
//! readers who wait.

use super::answer::{self, Content, Failure, XCache};
use super::flights::{Flight, FlightId, Phase, Reader, UPSTREAM_CALLS_MAX};
use super::{Answer, Broker, Output};
use crate::cache::{Cache, Key, KeyRef, Lookup, REFUSAL_LIFE, UNWELCOME_LIFE, Value};
use crate::call::{CALL_LIFE, Call, CallError, CallId, Service};
use crate::code::Code;
use crate::http::response::Response;
use crate::identity::{CredentialState, Identity};
use crate::kms::reply::{self, KmsError, Reply};
use crate::kms::sign::Credentials;
use crate::kms::{request as kms_request, retry};
use crate::metrics::CacheResult;
use crate::time::{Mono, Now};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

impl Broker {
    /// What a reader is told without KMS, if anything.
    pub(super) fn look_up(&mut self, key: KeyRef<'_>, now: Mono) -> Option<Content> {
        let (lookup, content, refresh) = match self.cache.lookup(key, now) {
            Lookup::Fresh { value, refresh } => (CacheResult::Hit, Some(from_cache(value, now)), refresh),
            Lookup::Refused(error) => {
                (CacheResult::Refused, Some(Content::Failure(Rc::new(Failure::from_kms(error)))), false)
            }
            Lookup::Expired(value) => {
                let content = from_cache(value, now);
                // Where the last try for this key has failed, or KMS is down as a whole, the reader need not wait.
                let flight = self.flights.find(key).and_then(|id| self.flights.get(id));
                let is_failing =
                    flight.is_some_and(|flight| flight.failures.is_some()) || self.circuit.is_known_open(now);
                (CacheResult::Expired, is_failing.then_some(content), is_failing)
            }
            Lookup::Absent => (CacheResult::Miss, None, false),
        };
        self.metrics.count_lookup(lookup);
        if refresh {
            self.refresh(key.to_owned(), now);
        }
        content
    }

    /// What a `refreshNow` reader is told without KMS: what the last such fetch of this key gave, if that was a
    /// moment ago.
    pub(super) fn just_refreshed(&mut self, key: KeyRef<'_>, now: Mono) -> Option<Content> {
        self.metrics.count_lookup(CacheResult::Bypass);
        match self.refreshes.recent(key, now)? {
            Ok(()) => {
                let value = self.cache.servable(key, now).filter(|value| now < value.span.expires)?;
                Some(from_cache(value, now))
            }
            Err(failure) => Some(Content::Failure(Rc::clone(failure))),
        }
    }

    /// Makes the reader wait for the key's flight, which begins if there is none; or says why it need not wait.
    pub(super) fn join(&mut self, key: KeyRef<'_>, reader: Reader, now: Mono) -> Option<Content> {
        let has_value = self.cache.servable(key, now).is_some();
        if let Err(failure) = self.flights.join(key, reader, has_value, now) {
            return Some(Content::Failure(failure));
        }
        self.advance(now);
        None
    }

    /// Fetches a key behind the scenes, unless that is under way.
    pub(super) fn refresh(&mut self, key: Key, now: Mono) {
        if self.flights.find(key.as_ref()).is_none() && self.flights.begin(key, true, now).is_some() {
            self.metrics.refreshes += 1;
            self.advance(now);
        }
    }

    /// Asks what the identity wants to know, and starts queued flights as far as they may.
    pub(super) fn advance(&mut self, now: Mono) {
        self.flights.queue_due = Mono::NEVER;
        loop {
            if let Some(call) = self.access.poll_call(now, || self.flights.next_call_id()) {
                self.outputs.push_back(Output::Call(call));
            }
            if let Some(outcome) = self.access.identity.poll_outcome() {
                let fetches = &mut self.metrics.credential_fetches;
                fetches.ok += u64::from(outcome.is_ok());
                fetches.failed += u64::from(outcome.is_err());
                self.health.on_credentials(outcome, &self.access.identity, now);
            }
            let Some(id) = self.next_turn(now) else { return };
            match self.access.identity.credentials(now) {
                CredentialState::Ready(credentials) => {
                    let credentials = Rc::clone(credentials);
                    self.start(id, credentials, now);
                }
                CredentialState::Pending => {
                    self.flights.move_to_front(id);
                    if self.access.call.is_some() {
                        return;
                    }
                    // The need for them has just set a fetch going: once more around to ask.
                }
                CredentialState::Failed { error, retry_at } => {
                    self.health.credentials.fails(error, now);
                    let failure = Failure::no_credentials(error, retry_at.since(now));
                    self.on_try_failed(id, Rc::new(failure), None, now);
                }
            }
        }
    }

    /// The flight whose turn it is, those that a reader waits for first. Where it has to wait, the queue is due then.
    fn next_turn(&mut self, now: Mono) -> Option<FlightId> {
        let is_open = self.circuit.is_open();
        if self.flights.calls() >= if is_open { 1 } else { UPSTREAM_CALLS_MAX } {
            return None;
        }
        let waited_for = |flight: &Flight| !flight.readers.is_empty();
        // With the circuit open, one that has not failed shows best whether KMS is there.
        let hopeful = |flight: &Flight| waited_for(flight) && !self.circuit.has_failed(flight.key());
        let hopeful = if is_open { self.flights.first_queued(hopeful) } else { None };
        let foreground = hopeful.or_else(|| self.flights.first_queued(waited_for));
        let (id, at) = match foreground {
            Some(id) => (id, self.circuit.next_try_at(true)),
            None if self.flights.background_calls() >= self.throttle.background_calls_max() => return None,
            None => {
                let id = self.flights.first_queued(|_| true)?;
                (id, self.circuit.next_try_at(false).max(self.throttle.next_try_at()))
            }
        };
        if now < at {
            self.flights.queue_due = at;
            return None;
        }
        Some(id)
    }

    fn start(&mut self, id: FlightId, credentials: Rc<Credentials>, now: Mono) {
        let Some(origin) = self.access.endpoint() else {
            let failure = Failure::no_credentials(
                &"the region, and so the address of KMS, is not known yet",
                Duration::from_secs(1),
            );
            return self.on_try_failed(id, Rc::new(failure), None, now);
        };
        let has_value = self.has_value(id, now);
        let budget = self.flights.get(id).and_then(|flight| flight.budget).filter(|_| !has_value);
        let deadline = budget.map_or(Mono::NEVER, |budget| budget.until).min(now.after(CALL_LIFE));
        let call = self.flights.call_out(id, credentials, has_value, now);
        self.outputs.push_back(Output::Call(Call { id: call, service: Service::Kms, origin, deadline }));
    }

    fn has_value(&self, id: FlightId, now: Mono) -> bool {
        self.flights.get(id).is_some_and(|flight| self.cache.servable(flight.key(), now).is_some())
    }

    /// Writes a call's request, signed now; its connection is ready to take it.
    ///
    /// # Errors
    /// When the request cannot be made; nothing is to be sent then.
    pub fn write_request(&mut self, call: &Call, now: Now, out: &mut Vec<u8>) -> Result<(), CallError> {
        if self.access.call == Some(call.id) {
            self.access.identity.write_request(out, now);
            return Ok(());
        }
        let flight = self.flights.called(call.id).and_then(|id| self.flights.get(id));
        let Some((key, Phase::Calling { credentials, .. })) = flight.map(|it| (it.key(), it.phase())) else {
            return Err(CallError::unreachable(
                "ask",
                &call.origin,
                "no reader waits for this call any more",
            ));
        };
        kms_request::get_secret_value(
            out,
            &call.origin.authority(call.service.default_port()),
            key.id,
            key.version_id,
            key.version_stage,
            credentials,
            self.access.on_kms_clock(now).unix_s,
            &self.random.next_u128().to_be_bytes(),
        )
        .map_err(|error| CallError::unreachable("ask", &call.origin, error))
    }

    /// Takes the outcome of a call.
    pub fn on_called(&mut self, call: CallId, outcome: Result<Response, CallError>, now: Now) {
        if self.access.call == Some(call) {
            self.access.call = None;
            self.access.identity.on_answer(outcome.as_ref(), now);
        } else if let Some(id) = self.flights.called(call) {
            self.on_fetched(id, outcome, now);
        }
        self.advance(now.mono);
    }

    fn on_fetched(&mut self, id: FlightId, outcome: Result<Response, CallError>, now: Now) {
        let Some(flight) = self.flights.get(id) else { return };
        let Phase::Calling { called, .. } = flight.phase() else { return };
        let took = now.mono.since(*called);
        let reply = match outcome {
            Ok(response) => reply::parse(flight.key().id, response, self.access.on_kms_clock(now).unix_s),
            Err(error) => {
                self.metrics.count_call(self.health.on_call_error(flight, &error, now.mono), took);
                let reached = error.reached;
                return self.on_down(id, Failure::from_call(error), reached, now.mono, now.mono);
            }
        };
        self.metrics.count_call(self.health.on_reply(flight, &reply, now.mono), took);
        if !matches!(reply, Reply::CredentialsRefused(_)) {
            self.access.identity.accepted();
        }
        if !matches!(reply, Reply::Transient { .. }) && self.circuit.on_reply() {
            log::info!("KMS replies again");
        }
        match reply {
            Reply::Value(value) => self.on_value(id, value, now),
            Reply::Refused(error) => self.on_refused(id, error, now.mono),
            Reply::Transient { error, retry_after_s } => {
                let retry_from = now.mono.after(retry::retry_after(retry_after_s));
                self.on_down(id, Failure::from_kms(&error), true, retry_from, now.mono);
            }
            Reply::Throttled { error, retry_after_s } => {
                self.on_throttled(id, &error, retry_after_s, now.mono);
            }
            Reply::CredentialsRefused(error) => self.on_credentials_refused(id, error, now.mono),
            Reply::ClockSkew { error, server_unix_s } => self.on_clock_skew(id, &error, server_unix_s, now),
            Reply::SignatureRefused(error) => self.on_unwelcome(id, error, now.mono),
            Reply::Invalid(what) => {
                self.on_try_failed(
                    id,
                    Rc::new(Failure::ours(Code::UpstreamInvalidResponse, what)),
                    None,
                    now.mono,
                );
            }
        }
    }

    fn on_value(&mut self, id: FlightId, value: reply::Value, now: Now) {
        let Some(flight) = self.flights.land(id, now.mono) else { return };
        self.throttle.on_value(now.mono, &mut self.random);
        let key = flight.key();
        let body = Rc::new(answer::to_be_kept(self.server.response_type, key.id, value.body));
        let (rotation, kms_now) = (value.next_rotation_unix_s, self.access.on_kms_clock(now));
        let span = self.cache.insert(key.to_owned(), Rc::clone(&body), rotation, kms_now, &mut self.random);
        self.refreshes.remember(&flight, Ok(()));
        queue_answers(&mut self.outputs, flight.readers, |reader| {
            let x_cache = if reader.refresh_now { XCache::Refresh } else { XCache::Miss };
            Content::Secret(Rc::clone(&body), span, x_cache)
        });
    }

    fn on_refused(&mut self, id: FlightId, error: KmsError, now: Mono) {
        let Some(flight) = self.flights.land(id, now) else { return };
        let failure = Rc::new(Failure::from_kms(&error));
        self.cache.refuse(flight.key().to_owned(), Rc::new(error), REFUSAL_LIFE, now);
        self.refreshes.remember(&flight, Err(Rc::clone(&failure)));
        queue_failure(&mut self.outputs, flight.readers, &failure);
    }

    fn on_throttled(&mut self, id: FlightId, error: &KmsError, retry_after_s: Option<u32>, now: Mono) {
        let retry_from = now.after(retry::retry_after(retry_after_s));
        self.throttle.on_throttled(retry_from, now, &mut self.random);
        self.on_try_failed(id, Rc::new(Failure::from_kms(error)), Some(retry_from), now);
    }

    fn on_credentials_refused(&mut self, id: FlightId, error: KmsError, now: Mono) {
        let Some(flight) = self.flights.get_mut(id) else { return };
        let Phase::Calling { credentials, .. } = flight.phase() else { return };
        if flight.renewed || !self.access.identity.refused(credentials, now) {
            return self.on_unwelcome(id, error, now);
        }
        flight.renewed = true;
        self.try_again(id, now);
    }

    fn on_clock_skew(&mut self, id: FlightId, error: &KmsError, server_unix_s: Option<i64>, now: Now) {
        let Some(flight) = self.flights.get_mut(id) else { return };
        let Some(theirs_unix_s) = server_unix_s.filter(|_| !flight.clock_corrected) else {
            return self.on_try_failed(id, Rc::new(Failure::from_kms(error)), None, now.mono);
        };
        self.access.correct_clock(theirs_unix_s, now);
        flight.clock_corrected = true;
        self.try_again(id, now.mono);
    }

    fn try_again(&mut self, id: FlightId, now: Mono) {
        let has_value = self.has_value(id, now);
        self.flights.queue_again(id, has_value, now);
    }

    /// A failure that says KMS itself is down: the circuit counts it, and those that queued behind the probe of
    /// an open circuit share its outcome. `reached`: it may be this secret's own.
    fn on_down(&mut self, id: FlightId, failure: Failure, reached: bool, retry_from: Mono, now: Mono) {
        let Some(flight) = self.flights.get(id) else { return };
        if self.circuit.on_failure(flight.key(), now, &mut self.random) {
            log::warn!("KMS is down, so the agent makes one call at a time until KMS replies");
        }
        let failure = Rc::new(failure);
        self.on_try_failed(id, Rc::clone(&failure), Some(retry_from), now);
        if !self.circuit.is_open() {
            return;
        }
        for id in self.flights.queued() {
            if !reached {
                self.on_try_failed(id, Rc::clone(&failure), Some(now), now);
            } else if let Some(flight) = self.flights.get_mut(id) {
                // Those in the queue have their turn. Readers who have a stale value need not wait for it.
                let has_value = answer_from_cache(flight, &self.cache, &mut self.outputs, now);
                self.flights.arm(id, has_value, now);
            }
        }
    }

    /// KMS does not know us. That says nothing about the secret, so what is cached of it stays; where there is
    /// nothing, this is remembered for a second: a reader that asks in a loop must not burn the quota.
    fn on_unwelcome(&mut self, id: FlightId, error: KmsError, now: Mono) {
        let Some(flight) = self.flights.get(id) else { return };
        let key = flight.key();
        let failure = Rc::new(Failure::from_kms(&error));
        if self.cache.servable(key, now).is_none() && !self.cache.is_refused(key, now) {
            self.cache.refuse(key.to_owned(), Rc::new(error), UNWELCOME_LIFE, now);
        }
        self.on_try_failed(id, failure, None, now);
    }

    /// A try failed: readers who have a fall-back get it, the others get another try or the error. `retry_from` is
    /// when another try may do better; `None`: it would not for those who wait.
    fn on_try_failed(&mut self, id: FlightId, failure: Rc<Failure>, retry_from: Option<Mono>, now: Mono) {
        let Some(flight) = self.flights.get_mut(id) else { return };
        self.refreshes.remember(flight, Err(Rc::clone(&failure)));
        let failures = flight.on_failure(Rc::clone(&failure), retry_from.unwrap_or_default());
        let pause = retry::backoff(failures.count, retry::BACKOFF_CAP, &mut self.random);
        let not_before = failures.not_before;
        let has_value = answer_from_cache(flight, &self.cache, &mut self.outputs, now);
        if !flight.readers.is_empty() {
            let until = now.after(pause.min(retry::BACKOFF_BASE * 2)).max(not_before);
            let budget = flight.budget_of_readers(now);
            budget.tries_left = budget.tries_left.saturating_sub(1);
            if retry_from.is_some() && budget.tries_left > 0 && until < budget.until {
                return self.flights.pause(id, until, has_value, now);
            }
            let failure = failure.after_tries(retry::TRIES_MAX.saturating_sub(budget.tries_left));
            queue_failure(&mut self.outputs, flight.take_all_readers(), &failure);
        }
        flight.budget = None;
        // Each try may renew the credentials and correct the clock once.
        (flight.renewed, flight.clock_corrected) = (false, false);
        if self.flights.is_pointless(id, has_value, now) {
            self.flights.land(id, now);
        } else {
            self.flights.pause(id, now.after(pause).max(not_before), has_value, now);
        }
    }

    /// Readers have waited long enough, or a pause is over.
    pub(super) fn on_flight_time(&mut self, id: FlightId, now: Mono) {
        let Some(flight) = self.flights.get_mut(id) else { return };
        if flight.began().is_some_and(|began| now >= began.after(retry::STALE_PATIENCE)) {
            answer_from_cache(flight, &self.cache, &mut self.outputs, now);
        }
        if let Some(budget) = flight.budget.filter(|budget| now >= budget.until) {
            let tries = retry::TRIES_MAX.saturating_sub(budget.tries_left);
            let failure = match &flight.failures {
                Some(failures) => failures.last.after_tries(tries),
                None => Rc::new(no_reply(flight, &self.access.identity, now)),
            };
            queue_failure(&mut self.outputs, flight.take_all_readers(), &failure);
        }
        let is_calling = matches!(flight.phase(), Phase::Calling { .. });
        let has_value = self.has_value(id, now);
        if !is_calling && self.flights.is_pointless(id, has_value, now) {
            self.flights.land(id, now);
        } else {
            self.flights.on_time(id, has_value, now);
        }
    }

    /// The agent ends: all who still wait are told so.
    pub fn give_up(&mut self) {
        let failure = Rc::new(Failure::ours(Code::ServiceUnavailable, "the agent is ending"));
        queue_failure(&mut self.outputs, self.flights.clear(), &failure);
    }
}

fn queue_answers(outputs: &mut VecDeque<Output>, readers: Vec<Reader>, content: impl Fn(&Reader) -> Content) {
    outputs.extend(readers.into_iter().map(|reader| {
        let content = content(&reader);
        Output::Answer(Answer { client: reader.client, manner: reader.manner, content })
    }));
}

fn queue_failure(outputs: &mut VecDeque<Output>, readers: Vec<Reader>, failure: &Rc<Failure>) {
    queue_answers(outputs, readers, |_| Content::Failure(Rc::clone(failure)));
}

fn from_cache(value: &Value, now: Mono) -> Content {
    let x_cache = if now < value.span.expires { XCache::Hit } else { XCache::Stale };
    Content::Secret(Rc::clone(&value.body), value.span, x_cache)
}

/// Gives the cached value, fresh or stale, to all readers for whom it will do. `false`: there is none.
fn answer_from_cache(flight: &mut Flight, cache: &Cache, outputs: &mut VecDeque<Output>, now: Mono) -> bool {
    let Some(value) = cache.servable(flight.key(), now) else { return false };
    let content = from_cache(value, now);
    queue_answers(outputs, flight.take_patient_readers(), |_| content.clone());
    true
}

/// The readers' patience is over, and nothing has failed yet.
fn no_reply(flight: &Flight, identity: &Identity, now: Mono) -> Failure {
    let seconds = retry::READER_BUDGET.as_secs();
    if matches!(flight.phase(), Phase::Queued { .. }) && !identity.is_ready(now) {
        // KMS has not even been asked.
        let asked_for = identity.asked_for();
        let why =
            format!("there were no credentials within {seconds} s: the agent still waits for {asked_for}");
        return Failure::no_credentials(&why, Duration::ZERO);
    }
    Failure::ours(Code::UpstreamTimeout, format!("KMS gave no reply within {seconds} s"))
}
