//! A fetch's way: its turn in the queue, credentials, the call, its outcome, and what a failure means to
//! those who wait.

use super::answer::{self, Content, Failure, XCache};
use super::flight::{Flight, FlightId, Phase};
use super::{Broker, Output, Refreshed, UPSTREAM_CALLS_MAX};
use crate::cache::{Key, KeyRef, Lookup, REFUSAL_LIFE, UNWELCOME_LIFE};
use crate::call::{Call, CallError, CallErrorKind, CallId, Service};
use crate::config::HostPort;
use crate::http::response::Response;
use crate::identity::{IdentityError, Question, Standing};
use crate::kms::reply::{self, KmsError, Reply};
use crate::kms::sign::Credentials;
use crate::kms::{request as kms_request, retry};
use crate::log::{LeftOut, RateLimit, escape};
use crate::metrics::CallResult;
use crate::time::{Mono, Now};
use std::fmt::Display;
use std::rc::Rc;
use std::time::Duration;

/// Of the calls to KMS, so many may be refreshes that nobody waits for.
const BACKGROUND_CALLS_MAX: usize = 4;
/// A call that nobody's budget cuts short: all its stages together, a second address included.
const CALL_LIFE: Duration = Duration::from_secs(15);

impl Broker {
    /// Asks what the identity wants to know, and starts queued flights as far as they may.
    pub(super) fn advance(&mut self, now: Mono) {
        self.queue_due = Mono::NEVER;
        loop {
            if self.identity_call.is_none()
                && let Some(Question { service, origin }) = self.identity.poll(now)
            {
                let id = self.next_call_id();
                self.identity_call = Some(id);
                let deadline = now.after(CALL_LIFE);
                self.outputs.push_back(Output::Call(Call { id, service, origin, deadline }));
            }
            if let Some(outcome) = self.identity.poll_outcome() {
                self.on_credentials(outcome, now);
            }
            let calls_max = if self.circuit.is_open() { 1 } else { UPSTREAM_CALLS_MAX };
            if self.calls.len() >= calls_max {
                return;
            }
            let Some((id, flight)) = self.next_in_queue(now) else { return };
            match self.identity.standing(now) {
                Standing::Ready(credentials) => {
                    let credentials = Rc::clone(credentials);
                    self.start(id, flight, credentials, now);
                }
                Standing::Pending => {
                    self.queue.push_front(id);
                    self.flights.insert(id, flight);
                    if self.identity_call.is_some() {
                        return;
                    }
                    // The need for them has just set a fetch going: once more around to ask.
                }
                Standing::Failed { error, retry_at } => {
                    self.credentials_health.fails(error, now);
                    let failure = Failure::no_credentials(error, retry_at.since(now));
                    self.on_setback(id, flight, Setback::lasting(failure), now);
                }
            }
        }
    }

    /// Takes the flight whose turn it is: those that somebody waits for first.
    fn next_in_queue(&mut self, now: Mono) -> Option<(FlightId, Flight)> {
        let waited_for =
            |id: &FlightId| self.flights.get(id).is_some_and(|flight| !flight.readers.is_empty());
        // With the circuit open, one that has not failed shows best whether KMS is there.
        let fresh = |id: &FlightId| {
            self.flights.get(id).is_some_and(|flight| !self.circuit.has_failed(flight.key.as_ref()))
        };
        let hopeful = self.queue.iter().position(|id| waited_for(id) && fresh(id));
        let foreground = match hopeful {
            Some(position) if self.circuit.is_open() => Some(position),
            _ => self.queue.iter().position(waited_for),
        };
        let position = match foreground {
            Some(position) => {
                let at = self.circuit.open_until(true);
                if now < at {
                    self.queue_due = at;
                    return None;
                }
                position
            }
            None if self.queue.is_empty() || self.background_calls() >= self.background_calls_max() => {
                return None;
            }
            None => {
                let at = self.circuit.open_until(false).max(self.throttled_until);
                if now < at {
                    self.queue_due = at;
                    return None;
                }
                0
            }
        };
        let id = self.queue.remove(position)?;
        self.flights.remove(&id).map(|flight| (id, flight))
    }

    fn background_calls_max(&self) -> usize {
        if self.throttled > 0 { 1 } else { BACKGROUND_CALLS_MAX }
    }

    fn background_calls(&self) -> usize {
        let nobody_waits = |id| self.flights.get(id).is_some_and(|flight: &Flight| flight.readers.is_empty());
        self.calls.iter().filter(|(_, id, _)| nobody_waits(id)).count()
    }

    fn start(&mut self, id: FlightId, mut flight: Flight, credentials: Rc<Credentials>, now: Mono) {
        if let (None, Some(region)) = (&self.endpoint, self.identity.region()) {
            let endpoint = HostPort::kms_in(region);
            log::info!("KMS endpoint: {endpoint}, from the region that the metadata service names");
            self.endpoint = Some(Rc::new(endpoint));
        }
        let Some(origin) = self.endpoint.clone() else {
            let failure = Failure::no_credentials(&"the region is not known yet", Duration::from_secs(1));
            return self.on_setback(id, flight, Setback::lasting(failure), now);
        };
        let call = self.next_call_id();
        let falls_back = self.cache.servable(flight.key.as_ref(), now).is_some();
        let deadline = now.after(CALL_LIFE);
        let deadline = match flight.budget {
            Some(budget) if !falls_back => deadline.min(budget.until),
            _ => deadline,
        };
        // A refresh that was held back begins only now.
        let began = flight.began().filter(|_| !flight.readers.is_empty()).unwrap_or(now);
        let for_refresh = flight.readers.iter().any(|reader| reader.refresh_now);
        flight.phase = Phase::Calling { began, credentials, for_refresh };
        self.calls.push((call, id, now));
        self.outputs.push_back(Output::Call(Call { id: call, service: Service::Kms, origin, deadline }));
        self.put_back(id, flight, now);
    }

    /// Writes a call's request, signed now; its connection is ready to take it.
    ///
    /// # Errors
    /// When the request cannot be made; nothing is to be sent then.
    pub fn write_request(&mut self, call: &Call, now: Now, out: &mut Vec<u8>) -> Result<(), CallError> {
        if self.identity_call == Some(call.id) {
            self.identity.write_request(out, now);
            return Ok(());
        }
        let authority = call.origin.authority(call.service.default_port());
        let flight = self.flight_of(call.id).and_then(|id| self.flights.get(&id));
        let Some(Flight { key, phase: Phase::Calling { credentials, .. }, .. }) = flight else {
            return Err(CallError::unreachable("ask", &call.origin, "nobody wants this any more"));
        };
        let KeyRef { id, version_id, version_stage } = key.as_ref();
        let unix_s = now.unix_s.saturating_add(self.clock_offset_s);
        let nonce = self.random.next_u128().to_be_bytes();
        kms_request::get_secret_value(
            out,
            &authority,
            id,
            version_id,
            version_stage,
            credentials,
            unix_s,
            &nonce,
        )
        .map_err(|error| CallError::unreachable("ask", &call.origin, error))
    }

    fn flight_of(&self, call: CallId) -> Option<FlightId> {
        self.calls.iter().find(|(id, ..)| *id == call).map(|(_, flight, _)| *flight)
    }

    /// A fetch of credentials has ended.
    fn on_credentials(&mut self, outcome: Result<(), IdentityError>, now: Mono) {
        match outcome {
            Ok(()) => {
                self.metrics.credential_fetches.ok += 1;
                self.credentials_expire_unix_s = self.identity.expires_unix_s();
                self.credentials_health.works(now);
            }
            Err(error) => {
                self.metrics.credential_fetches.failed += 1;
                if self.identity.is_ready(now) && self.credentials_health.is_well() {
                    self.credentials_health.notes(error);
                } else {
                    self.credentials_health.fails(error, now);
                }
            }
        }
    }

    /// Takes the outcome of a call.
    pub fn on_called(&mut self, call: CallId, outcome: Result<Response, CallError>, now: Now) {
        if self.identity_call == Some(call) {
            self.identity_call = None;
            self.identity.on_answer(outcome.as_ref(), now);
        } else if let Some(position) = self.calls.iter().position(|(it, ..)| *it == call) {
            let (_, id, since) = self.calls.swap_remove(position);
            if let Some(flight) = self.flights.remove(&id) {
                self.on_fetched(id, flight, outcome, now.mono.since(since), now);
            }
        }
        self.advance(now.mono);
    }

    fn on_fetched(
        &mut self,
        id: FlightId,
        mut flight: Flight,
        outcome: Result<Response, CallError>,
        call_took: Duration,
        now: Now,
    ) {
        let (began, used) = match &flight.phase {
            Phase::Calling { began, credentials, .. } => (*began, Rc::clone(credentials)),
            _ => return self.put_back(id, flight, now.mono),
        };
        let took_ms = now.mono.since(began).as_millis();
        let on_kms_clock = Now { unix_s: now.unix_s.saturating_add(self.clock_offset_s), ..now };
        let reply = match outcome {
            Ok(response) => {
                let reply = reply::parse(flight.key.as_ref().id, response, on_kms_clock.unix_s);
                self.log_reply(&flight.key, &reply, took_ms, now.mono);
                self.note_reply(&reply, call_took, now.mono);
                reply
            }
            Err(error) => {
                let what = format_args!("{error}");
                log_failure(&mut self.failures_logged, &flight.key, &what, took_ms, now.mono);
                let reached = error.reached;
                self.note_call_error(&error, call_took, now.mono);
                let setback = Setback { reached, ..Setback::passing(Failure::from_call(error), now.mono) };
                return self.on_down(id, flight, setback, now.mono);
            }
        };
        if !matches!(reply, Reply::CredentialsRefused(_)) {
            self.identity.accepted();
        }
        if !matches!(reply, Reply::Transient { .. }) && self.circuit.on_reply() {
            log::info!("KMS replies again");
        }
        match reply {
            Reply::Value(value) => {
                self.throttled = self.throttled.saturating_sub(1);
                self.throttled_until = match self.throttled {
                    0 => Mono::default(),
                    throttled => {
                        now.mono.after(retry::backoff(throttled, retry::BACKOFF_CAP, &mut self.random))
                    }
                };
                let asked_id = flight.key.as_ref().id;
                let body = Rc::new(answer::to_be_kept(self.server.response_type, asked_id, value.body));
                let jitter = self.random.up_to(u64::from(self.refresh_jitter_per_mille));
                let jitter = u32::try_from(jitter).unwrap_or(0);
                let key = flight.key.clone();
                let rotation = value.next_rotation_unix_s;
                let span = self.cache.insert(key, Rc::clone(&body), rotation, on_kms_clock, jitter);
                self.remember_refresh(&flight, None);
                self.answer_all(std::mem::take(&mut flight.readers), |reader| {
                    let x_cache = if reader.refresh_now { XCache::Refresh } else { XCache::Miss };
                    Content::Secret(Rc::clone(&body), span, x_cache)
                });
                self.land(id, flight, now.mono);
            }
            Reply::Refused(error) => {
                let failure = Rc::new(Failure::from_kms(&error));
                self.cache.refuse(flight.key.clone(), Rc::new(error), REFUSAL_LIFE, now.mono);
                self.remember_refresh(&flight, Some(&failure));
                self.answer_all(std::mem::take(&mut flight.readers), |_| {
                    Content::Failure(Rc::clone(&failure))
                });
                self.land(id, flight, now.mono);
            }
            Reply::Transient { error, retry_after_s } => {
                let until = now.mono.after(retry::retry_after(retry_after_s));
                self.on_down(id, flight, Setback::passing(Failure::from_kms(&error), until), now.mono);
            }
            Reply::Throttled { error, retry_after_s } => {
                let until = now.mono.after(retry::retry_after(retry_after_s));
                self.throttled = (self.throttled + 1).min(super::THROTTLED_MAX);
                let pause = retry::backoff(self.throttled, retry::BACKOFF_CAP, &mut self.random);
                self.throttled_until = now.mono.after(pause).max(until);
                self.on_setback(id, flight, Setback::passing(Failure::from_kms(&error), until), now.mono);
            }
            Reply::CredentialsRefused(error) => {
                if flight.renewed || !self.identity.refused(&used, now.mono) {
                    return self.on_unwelcome(id, flight, error, now.mono);
                }
                flight.renewed = true;
                self.again(id, flight, now.mono);
            }
            Reply::ClockSkew { error, server_unix_s } => match server_unix_s {
                Some(theirs) if !flight.clock_corrected => {
                    self.clock_offset_s = theirs.saturating_sub(now.unix_s);
                    let (off_s, way) = (
                        self.clock_offset_s.unsigned_abs(),
                        if self.clock_offset_s > 0 { "behind" } else { "ahead of" },
                    );
                    log::warn!("this host's clock is {off_s} s {way} KMS's; signing with KMS's time");
                    flight.clock_corrected = true;
                    self.again(id, flight, now.mono);
                }
                _ => self.on_setback(id, flight, Setback::lasting(Failure::from_kms(&error)), now.mono),
            },
            Reply::SignatureRefused(error) => self.on_unwelcome(id, flight, error, now.mono),
            Reply::Invalid(what) => {
                self.on_setback(id, flight, Setback::lasting(Failure::invalid_response(what)), now.mono);
            }
        }
    }

    /// Counts a reply, and what it says of KMS's and the credentials' health: nothing of the secret.
    fn note_reply(&mut self, reply: &Reply, took: Duration, now: Mono) {
        let named = |error: &KmsError| format!("KMS answered {} {}", error.status, error.code);
        let result = match reply {
            Reply::Value(_) | Reply::Refused(_) => {
                self.kms_health.works(now);
                self.credentials_health.works(now);
                if matches!(reply, Reply::Value(_)) { CallResult::Ok } else { CallResult::Refused }
            }
            Reply::Transient { error, .. } => {
                self.kms_health.fails(named(error), now);
                CallResult::Failed
            }
            Reply::Throttled { error, .. } => {
                self.kms_health.fails(named(error), now);
                CallResult::Throttled
            }
            Reply::CredentialsRefused(error) => {
                self.credentials_health.fails(named(error), now);
                CallResult::CredentialsRefused
            }
            Reply::ClockSkew { error, .. } => {
                self.kms_health.fails(named(error), now);
                CallResult::ClockSkew
            }
            Reply::SignatureRefused(error) => {
                self.credentials_health.fails(named(error), now);
                CallResult::SignatureRefused
            }
            Reply::Invalid(what) => {
                self.kms_health.fails(what, now);
                CallResult::Invalid
            }
        };
        self.metrics.count_call(result, took);
    }

    fn note_call_error(&mut self, error: &CallError, took: Duration, now: Mono) {
        self.kms_health.fails(error, now);
        let result = match error.kind {
            CallErrorKind::Timeout => CallResult::Timeout,
            CallErrorKind::Unreachable => CallResult::Unreachable,
            CallErrorKind::InvalidResponse => CallResult::Invalid,
        };
        self.metrics.count_call(result, took);
    }

    fn log_reply(&mut self, key: &Key, reply: &Reply, took_ms: u128, now: Mono) {
        let (limit, what): (_, &dyn Display) = match reply {
            Reply::Value(_) => {
                let KeyRef { id, version_id, version_stage } = key.as_ref();
                let (id, version) = (escape(id), escape(version_id.or(version_stage).unwrap_or_default()));
                log::info!("KMS GetSecretValue \"{id}\" {version}: 200 ({took_ms} ms)");
                return;
            }
            // What clients can provoke hides nothing of what goes wrong.
            Reply::Refused(error) => (&mut self.refusals_logged, error),
            Reply::Invalid(what) => (&mut self.failures_logged, what),
            Reply::Transient { error, .. }
            | Reply::Throttled { error, .. }
            | Reply::CredentialsRefused(error)
            | Reply::ClockSkew { error, .. }
            | Reply::SignatureRefused(error) => (&mut self.failures_logged, error),
        };
        log_failure(limit, key, what, took_ms, now);
    }

    /// The same try once more, ahead of all others.
    fn again(&mut self, id: FlightId, mut flight: Flight, now: Mono) {
        flight.phase = Phase::Queued { began: flight.began().unwrap_or(now) };
        self.queue.push_front(id);
        self.put_back(id, flight, now);
    }

    /// A failure that says KMS itself is down: the circuit counts it, and who queued behind the probe of
    /// an open circuit shares its outcome.
    fn on_down(&mut self, id: FlightId, flight: Flight, setback: Setback, now: Mono) {
        if self.circuit.on_failure(flight.key.as_ref(), now, &mut self.random) {
            log::warn!("KMS is down: one probe at a time from now on");
        }
        let shared = Setback { not_before: now, ..setback.clone() };
        self.on_setback(id, flight, setback, now);
        if !self.circuit.is_open() {
            return;
        }
        for id in self.queue.clone() {
            let Some(mut flight) = self.flights.remove(&id) else { continue };
            if shared.reached {
                // It may be that secret's own trouble: those in the queue have their turn. Who has a stale
                // value need not wait for it.
                self.answer_from_cache(&mut flight, now);
                self.put_back(id, flight, now);
            } else {
                self.queue.retain(|it| *it != id);
                self.on_setback(id, flight, shared.clone(), now);
            }
        }
    }

    /// KMS does not know us. That says nothing about the secret, so what is cached of it stays; where there is
    /// nothing, this is remembered for a second: a reader that asks in a loop must not burn the quota.
    fn on_unwelcome(&mut self, id: FlightId, flight: Flight, error: KmsError, now: Mono) {
        let setback = Setback::lasting(Failure::from_kms(&error));
        let key = flight.key.as_ref();
        if self.cache.servable(key, now).is_none() && matches!(self.cache.lookup(key, now), Lookup::Absent) {
            self.cache.refuse(flight.key.clone(), Rc::new(error), UNWELCOME_LIFE, now);
        }
        self.on_setback(id, flight, setback, now);
    }

    /// A try failed: who has a fall-back gets it, who has none gets another try or the error.
    fn on_setback(&mut self, id: FlightId, mut flight: Flight, setback: Setback, now: Mono) {
        let Setback { failure, retryable, not_before, .. } = setback;
        flight.failures = flight.failures.saturating_add(1);
        flight.last_failure = Some(Rc::clone(&failure));
        flight.not_before = flight.not_before.max(not_before);
        self.remember_refresh(&flight, Some(&failure));
        self.answer_from_cache(&mut flight, now);
        flight.readers.append(&mut flight.next_round);
        let pause = retry::backoff(flight.failures, retry::BACKOFF_CAP, &mut self.random);
        if !flight.readers.is_empty() {
            let until = now.after(pause.min(retry::BACKOFF_BASE * 2)).max(flight.not_before);
            let budget = flight.budget_of_readers(now);
            budget.tries_left = budget.tries_left.saturating_sub(1);
            if retryable && budget.tries_left > 0 && until < budget.until {
                flight.phase = Phase::Pausing { until };
                return self.put_back(id, flight, now);
            }
            self.fail_readers(&mut flight, &failure);
        }
        flight.budget = None;
        if self.is_pointless(&flight, now) {
            return self.land(id, flight, now);
        }
        flight.phase = Phase::Pausing { until: now.after(pause).max(flight.not_before) };
        // Each try may renew the credentials and correct the clock once.
        (flight.renewed, flight.clock_corrected) = (false, false);
        self.put_back(id, flight, now);
    }

    fn remember_refresh(&mut self, flight: &Flight, failure: Option<&Rc<Failure>>) {
        let Phase::Calling { began, for_refresh, .. } = flight.phase else { return };
        if for_refresh {
            let refreshed = Refreshed { began, failure: failure.cloned() };
            self.refreshed.insert(flight.key.clone(), refreshed, flight.key.text_bytes());
        } else if let Some(last) = self.refreshed.peek_mut(flight.key.as_ref())
            && last.failure.is_some()
        {
            // An ordinary fetch has brought a newer word than that failure.
            last.failure = failure.cloned();
        }
    }
}

/// A try's failure.
#[derive(Clone, Debug)]
struct Setback {
    failure: Rc<Failure>,
    /// Whether another try may do better.
    retryable: bool,
    /// Not before this.
    not_before: Mono,
    /// KMS had been reached: the failure may be this secret's own.
    reached: bool,
}

impl Setback {
    fn passing(failure: Failure, not_before: Mono) -> Setback {
        Setback { failure: Rc::new(failure), retryable: true, not_before, reached: true }
    }

    fn lasting(failure: Failure) -> Setback {
        Setback { failure: Rc::new(failure), retryable: false, not_before: Mono::default(), reached: true }
    }
}

/// A call that brought no secret: a warning, or, past its limit, what any other call is (the contract wants one line
/// each). A warning goes to standard error and to the disk at once, and whoever has the token may ask for as many names
/// that do not exist as KMS takes calls.
fn log_failure(limit: &mut RateLimit, key: &Key, what: &dyn Display, took_ms: u128, now: Mono) {
    let KeyRef { id, version_id, version_stage } = key.as_ref();
    let (id, version) = (escape(id), escape(version_id.or(version_stage).unwrap_or_default()));
    let (level, left_out) = match limit.admit(now) {
        Some(left_out) => (log::Level::Warn, left_out),
        None => (log::Level::Info, LeftOut(0)),
    };
    log::log!(level, "KMS GetSecretValue \"{id}\" {version}: {what} ({took_ms} ms){left_out}");
}
