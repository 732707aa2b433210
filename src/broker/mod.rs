//! Every decision of the agent: who gets in, what is answered from memory, what KMS is asked and when
//! again, and who is told what came of it.
//!
//! Pure: it is handed requests, results and the time, and hands out [`Output`]s. A key has at most one
//! [`flight`] at a time; all its readers share it.

pub mod answer;
mod circuit;
mod flight;
pub mod gate;

pub use flight::ClientId;

use crate::cache::{Cache, Key, KeyRef, Lives, Lookup, REFRESH_JITTER_PER_MILLE};
use crate::call::{Call, CallError, CallId, Service};
use crate::config::{Config, HostPort};
use crate::http::request::{Reject, Request};
use crate::http::response::Response;
use crate::http::write::Persistence;
use crate::identity::{Identity, Standing};
use crate::kms::format::Kv;
use crate::kms::reply::{self, Reply};
use crate::kms::{request as kms_request, retry};
use crate::log::escape;
use crate::random::Random;
use crate::secret::Secret;
use crate::time::{Mono, Now};
use answer::{Content, Failure, Manner, Writer, XCache};
use circuit::Circuit;
use flight::{Budget, Flight, FlightId, Phase, Reader};
use gate::{Denial, Question, Route};
use hashbrown::HashMap;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

/// Calls to KMS at a time, and so connections.
pub const UPSTREAM_CALLS_MAX: usize = 8;
/// Of these, so many may be refreshes that nobody waits for.
const BACKGROUND_CALLS_MAX: usize = 4;
/// Fetches under way, queued and pausing ones included. Clients that ask and leave cannot pile up more.
const FLIGHTS_MAX: usize = 2048;
/// A call that nobody's budget cuts short: all its stages together, a second address included.
const CALL_LIFE: Duration = Duration::from_secs(15);
/// `refreshNow` fetches a key at most once in this time.
const REFRESH_NOW_PAUSE: Duration = Duration::from_secs(1);

/// What is to be done outside.
#[derive(Debug)]
pub enum Output {
    /// Make this call.
    Call(Call),
    /// Give this answer.
    Answer(Answer),
}

/// An answer to a client that waited.
#[derive(Debug)]
pub struct Answer {
    /// To whom.
    pub client: ClientId,
    manner: Manner,
    content: Content,
}

/// What became of a request.
#[derive(Debug)]
pub enum Asked {
    /// The reply is written.
    Answered(Done),
    /// The reply comes as an [`Output::Answer`].
    Waiting,
}

/// A reply that was written, for the log.
#[derive(Debug, PartialEq, Eq)]
pub struct Done {
    /// Its status.
    pub status: u16,
    /// Where a secret came from.
    pub x_cache: Option<XCache>,
    /// The code of the gate that refused it.
    pub code: Option<&'static str>,
    /// What it said of the connection.
    pub persistence: Persistence,
}

/// The answer that a `refreshNow` fetch got last.
#[derive(Debug)]
struct Refreshed {
    began: Mono,
    failure: Option<Rc<Failure>>,
}

/// The broker. One for the agent's whole life.
#[derive(Debug)]
pub struct Broker {
    server: crate::config::Server,
    token: Secret,
    cache: Cache,
    identity: Identity,
    endpoint: Option<Rc<HostPort>>,
    metadata: Rc<HostPort>,
    identity_call: Option<CallId>,
    flights: BTreeMap<FlightId, Flight>,
    by_key: HashMap<Key, FlightId>,
    queue: VecDeque<FlightId>,
    /// Calls that are out to KMS; at most [`UPSTREAM_CALLS_MAX`].
    calls: Vec<(CallId, FlightId)>,
    circuit: Circuit,
    refreshed: crate::cache::lru::Lru<Refreshed>,
    outputs: VecDeque<Output>,
    writer: Writer,
    random: Random,
    refresh_jitter_per_mille: u32,
    last_number: u64,
    /// What KMS's clock shows more than ours, in seconds.
    clock_offset_s: i64,
    /// No flight has anything due before this.
    flight_floor: Mono,
    /// When the queue may move although nothing else happens.
    queue_due: Mono,
    draining: bool,
}

impl Broker {
    /// Begins with an empty cache.
    #[must_use]
    pub fn new(config: &Config, token: Secret, identity: Identity, mut random: Random) -> Broker {
        let max_stale =
            if config.server.ignore_transient_errors { config.cache.max_stale } else { Duration::ZERO };
        let lives = Lives { ttl: config.cache.ttl, max_stale };
        let region_endpoint = |region: &String| HostPort { host: vpc_endpoint(region), port: 443 };
        let endpoint = config
            .kms
            .endpoint
            .clone()
            .or_else(|| config.kms.region.as_ref().map(region_endpoint))
            .map(Rc::new);
        Broker {
            server: config.server.clone(),
            token,
            cache: Cache::new(config.cache.size, config.cache.bytes, lives),
            identity,
            endpoint,
            metadata: Rc::new(config.kms.metadata_endpoint.clone()),
            identity_call: None,
            flights: BTreeMap::new(),
            by_key: HashMap::new(),
            queue: VecDeque::new(),
            calls: Vec::new(),
            circuit: Circuit::default(),
            refreshed: crate::cache::lru::Lru::new(config.cache.size, usize::MAX),
            outputs: VecDeque::new(),
            writer: Writer::new(config.server.response_type, Random::from_seed(random.next_u64())),
            random,
            refresh_jitter_per_mille: REFRESH_JITTER_PER_MILLE,
            last_number: 0,
            clock_offset_s: 0,
            flight_floor: Mono::NEVER,
            queue_due: Mono::default(),
            draining: false,
        }
    }

    /// A new token; the old one stops working at once.
    pub fn set_token(&mut self, token: Secret) {
        self.token = token;
    }

    /// Spreads refreshes over so much of a value's life, at most [`REFRESH_JITTER_PER_MILLE`]; the fleet
    /// simulation shows what happens without.
    pub fn set_refresh_jitter(&mut self, per_mille: u32) {
        self.refresh_jitter_per_mille = per_mille;
    }

    /// From now on every reply is its connection's last.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// Answers a request into `out`, or lets the client wait. `last`: its connection serves no other;
    /// `busy`: it came past `MaxConn`.
    pub fn ask(
        &mut self,
        client: ClientId,
        request: &Request<'_, '_>,
        last: bool,
        busy: bool,
        now: Now,
        out: &mut Vec<u8>,
    ) -> Asked {
        self.writer.set_time(now.unix_s);
        let persistence = match (request.keep_alive && !last && !busy && !self.draining, request.http10) {
            (false, _) => Persistence::Close,
            (true, false) => Persistence::KeepAlive,
            (true, true) => Persistence::KeepAliveSaid,
        };
        let mut manner = Manner { head_only: request.method == "HEAD", kv: Kv::V1, persistence };
        match gate::pass(request, &self.server, &self.token, busy) {
            Ok(Route::Ping) => {
                self.writer.healthy(out, manner);
                Asked::Answered(Done { status: 200, x_cache: None, code: None, persistence })
            }
            Ok(Route::Secret(question)) => {
                manner.kv = question.kv;
                self.ask_secret(client, &question, manner, now.mono, out)
            }
            Err(denial) => Asked::Answered(self.deny(denial, manner, out)),
        }
    }

    /// Answers what is no request.
    pub fn reject(&mut self, reject: Reject, now: Now, out: &mut Vec<u8>) -> Done {
        self.writer.set_time(now.unix_s);
        self.deny(
            reject.into(),
            Manner { head_only: false, kv: Kv::V1, persistence: Persistence::Close },
            out,
        )
    }

    fn deny(&mut self, denial: Denial, manner: Manner, out: &mut Vec<u8>) -> Done {
        let (status, code) = (denial.status, Some(denial.code));
        self.writer.failure(out, &denial.into(), manner);
        Done { status, x_cache: None, code, persistence: manner.persistence }
    }

    /// Writes an answer that [`Broker::poll_output`] gave. `last`: its connection serves no other.
    pub fn write_answer(&mut self, answer: &Answer, last: bool, now: Now, out: &mut Vec<u8>) -> Done {
        self.writer.set_time(now.unix_s);
        let persistence = if last || self.draining { Persistence::Close } else { answer.manner.persistence };
        self.write(&answer.content, Manner { persistence, ..answer.manner }, now.mono, out)
    }

    fn write(&mut self, content: &Content, manner: Manner, now: Mono, out: &mut Vec<u8>) -> Done {
        let persistence = manner.persistence;
        match content {
            Content::Secret(body, span, x_cache) => {
                self.writer.secret(out, body, *span, now, *x_cache, manner);
                Done { status: 200, x_cache: Some(*x_cache), code: None, persistence }
            }
            Content::Failure(failure) => {
                self.writer.failure(out, failure, manner);
                Done { status: failure.status, x_cache: None, code: None, persistence }
            }
        }
    }

    fn ask_secret(
        &mut self,
        client: ClientId,
        question: &Question<'_>,
        manner: Manner,
        now: Mono,
        out: &mut Vec<u8>,
    ) -> Asked {
        let key =
            KeyRef::new(&question.id, question.version_id.as_deref(), question.version_stage.as_deref());
        let reader = Reader { client, manner, refresh_now: question.refresh_now };
        if question.refresh_now {
            if let Some(content) = self.just_refreshed(key, now) {
                return Asked::Answered(self.write(&content, manner, now, out));
            }
            return self.join(key, reader, now, out);
        }
        let persistence = manner.persistence;
        let known_failing = self.is_known_failing(key);
        match self.cache.lookup(key, now) {
            Lookup::Fresh { value, refresh } => {
                self.writer.secret(out, &value.body, value.span, now, XCache::Hit, manner);
                if refresh {
                    self.refresh(key.to_owned(), now);
                }
                Asked::Answered(Done { status: 200, x_cache: Some(XCache::Hit), code: None, persistence })
            }
            Lookup::Refused(error) => {
                let content = Content::Failure(Rc::new(Failure::from_kms(error)));
                Asked::Answered(self.write(&content, manner, now, out))
            }
            Lookup::Expired(value) if known_failing => {
                let content = Content::Secret(Rc::clone(&value.body), value.span, XCache::Stale);
                self.refresh(key.to_owned(), now);
                Asked::Answered(self.write(&content, manner, now, out))
            }
            Lookup::Expired(_) | Lookup::Absent => self.join(key, reader, now, out),
        }
    }

    /// Whether a try for this key has failed and none succeeded since, or KMS is down as a whole: a
    /// reader with a stale value at hand need not wait to find out.
    fn is_known_failing(&self, key: KeyRef<'_>) -> bool {
        let flight = self.by_key.get(&Lookable(key)).and_then(|id| self.flights.get(id));
        self.circuit.is_open() || flight.is_some_and(|flight| flight.failures > 0)
    }

    /// What the last `refreshNow` fetch of this key gave, if that was a moment ago.
    fn just_refreshed(&self, key: KeyRef<'_>, now: Mono) -> Option<Content> {
        let last = self.refreshed.peek(key).filter(|last| now.since(last.began) < REFRESH_NOW_PAUSE)?;
        match &last.failure {
            Some(failure) => Some(Content::Failure(Rc::clone(failure))),
            None => {
                let value = self.cache.servable(key, now).filter(|value| now < value.span.expires)?;
                Some(Content::Secret(Rc::clone(&value.body), value.span, XCache::Hit))
            }
        }
    }

    /// Makes the reader wait for the key's flight, which is begun if there is none.
    fn join(&mut self, key: KeyRef<'_>, reader: Reader, now: Mono, out: &mut Vec<u8>) -> Asked {
        let has_stale = self.cache.servable(key, now).is_some();
        let (id, mut flight) = match self.take_flight(key) {
            Some(taken) => taken,
            None if self.flights.len() >= FLIGHTS_MAX => {
                let failure =
                    Failure::ours(502, "UpstreamUnreachable", "too many secrets are being fetched at once");
                return Asked::Answered(self.write(
                    &Content::Failure(Rc::new(failure)),
                    reader.manner,
                    now,
                    out,
                ));
            }
            None => self.new_flight(key.to_owned(), now),
        };
        if has_stale {
            flight.background = true;
        }
        if reader.refresh_now || !has_stale {
            let budget = *flight.budget.get_or_insert_with(|| Budget::from(now));
            if let Phase::Pausing { until } = &mut flight.phase {
                if flight.not_before >= budget.until {
                    // The server asked for a pause that outlasts the reader's patience.
                    let failure = flight.last_failure.clone().unwrap_or_else(|| Rc::new(no_reply()));
                    flight.budget = None;
                    self.put_back(id, flight, now);
                    return Asked::Answered(self.write(&Content::Failure(failure), reader.manner, now, out));
                }
                *until = (*until).min(now.max(flight.not_before));
            }
        }
        if flight.is_too_early_for(&reader) {
            flight.next_round.push(reader);
        } else {
            flight.readers.push(reader);
        }
        self.put_back(id, flight, now);
        self.advance(now);
        Asked::Waiting
    }

    /// Fetches a key behind the scenes, unless that is under way.
    fn refresh(&mut self, key: Key, now: Mono) {
        if self.by_key.contains_key(&key) || self.flights.len() >= FLIGHTS_MAX {
            return;
        }
        let (id, mut flight) = self.new_flight(key, now);
        flight.background = true;
        self.put_back(id, flight, now);
        self.advance(now);
    }

    /// A client went away. Its call goes on: the result will be cached.
    pub fn left(&mut self, client: ClientId) {
        for flight in self.flights.values_mut() {
            flight.readers.retain(|reader| reader.client != client);
            flight.next_round.retain(|reader| reader.client != client);
        }
    }

    /// The next thing to be done outside.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Does what is due. Call it when [`Broker::next_deadline`] has come.
    pub fn on_time(&mut self, now: Mono) {
        for key in self.cache.take_due_refreshes(now) {
            self.refresh(key, now);
        }
        if now >= self.flight_floor {
            self.flight_floor = Mono::NEVER;
            let ids: Vec<FlightId> = self.flights.keys().copied().collect();
            for id in ids {
                if let Some(flight) = self.flights.remove(&id) {
                    self.on_flight_time(id, flight, now);
                }
            }
        }
        self.advance(now);
    }

    /// When [`Broker::on_time`] is to be called.
    #[must_use]
    pub fn next_deadline(&self) -> Mono {
        let identity = if self.identity_call.is_some() { Mono::NEVER } else { self.identity.next_deadline() };
        self.flight_floor.min(self.queue_due).min(self.cache.next_refresh()).min(identity)
    }

    fn on_flight_time(&mut self, id: FlightId, mut flight: Flight, now: Mono) {
        if flight.began().is_some_and(|began| now >= began.after(retry::STALE_PATIENCE)) {
            self.answer_from_cache(&mut flight, now);
        }
        if flight.budget.is_some_and(|budget| now >= budget.until) {
            let failure = flight.last_failure.clone().unwrap_or_else(|| Rc::new(no_reply()));
            self.fail_readers(&mut flight, &failure);
        }
        match flight.phase {
            Phase::Calling { .. } => self.put_back(id, flight, now),
            _ if self.is_pointless(&flight, now) => self.land(id, flight, now),
            Phase::Pausing { until } if now >= until => {
                flight.phase = Phase::Queued { began: now };
                self.queue.push_back(id);
                self.put_back(id, flight, now);
            }
            _ => self.put_back(id, flight, now),
        }
    }

    /// Nobody waits, and there is no value to be renewed.
    fn is_pointless(&self, flight: &Flight, now: Mono) -> bool {
        flight.readers.is_empty()
            && flight.next_round.is_empty()
            && flight.failures > 0
            && !(flight.background && self.cache.servable(flight.key.as_ref(), now).is_some())
    }

    /// Gives all who accept it the cached value, fresh or stale.
    fn answer_from_cache(&mut self, flight: &mut Flight, now: Mono) {
        let Some(value) = self.cache.servable(flight.key.as_ref(), now) else { return };
        let x_cache = if now < value.span.expires { XCache::Hit } else { XCache::Stale };
        let content = Content::Secret(Rc::clone(&value.body), value.span, x_cache);
        let (waiting, answered) = flight.readers.drain(..).partition(|reader| reader.refresh_now);
        flight.readers = waiting;
        self.answer_all(answered, |_| content.clone());
    }

    fn fail_readers(&mut self, flight: &mut Flight, failure: &Rc<Failure>) {
        flight.budget = None;
        self.answer_all(std::mem::take(&mut flight.readers), |_| Content::Failure(Rc::clone(failure)));
        self.answer_all(std::mem::take(&mut flight.next_round), |_| Content::Failure(Rc::clone(failure)));
    }

    fn answer_all(&mut self, readers: Vec<Reader>, content: impl Fn(&Reader) -> Content) {
        self.outputs.extend(readers.into_iter().map(|reader| {
            let content = content(&reader);
            Output::Answer(Answer { client: reader.client, manner: reader.manner, content })
        }));
    }

    /// Asks what the identity wants to know, and starts queued flights as far as they may.
    fn advance(&mut self, now: Mono) {
        self.queue_due = Mono::NEVER;
        loop {
            if self.identity_call.is_none() && self.identity.poll(now) {
                let id = self.next_call_id();
                self.identity_call = Some(id);
                let deadline = now.after(CALL_LIFE);
                let origin = Rc::clone(&self.metadata);
                self.outputs.push_back(Output::Call(Call {
                    id,
                    service: Service::Metadata,
                    origin,
                    deadline,
                }));
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
        let foreground = self.queue.iter().position(waited_for);
        let position = match foreground {
            Some(position) => {
                let at = self.circuit.open_until(true);
                if now < at {
                    self.queue_due = at;
                    return None;
                }
                position
            }
            None if self.queue.is_empty() || self.background_calls() >= BACKGROUND_CALLS_MAX => return None,
            None => {
                let at = self.circuit.open_until(false);
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

    fn background_calls(&self) -> usize {
        let nobody_waits = |id| self.flights.get(id).is_some_and(|flight: &Flight| flight.readers.is_empty());
        self.calls.iter().filter(|(_, id)| nobody_waits(id)).count()
    }

    fn start(
        &mut self,
        id: FlightId,
        mut flight: Flight,
        credentials: Rc<crate::kms::sign::Credentials>,
        now: Mono,
    ) {
        if let (None, Some(region)) = (&self.endpoint, self.identity.region()) {
            let host = vpc_endpoint(region);
            log::info!("KMS endpoint: {host}:443, from the region that the metadata service names");
            self.endpoint = Some(Rc::new(HostPort { host, port: 443 }));
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
        let began = flight.began().unwrap_or(now);
        let for_refresh = flight.readers.iter().any(|reader| reader.refresh_now);
        flight.phase = Phase::Calling { began, credentials, for_refresh };
        self.calls.push((call, id));
        self.outputs.push_back(Output::Call(Call { id: call, service: Service::Kms, origin, deadline }));
        self.put_back(id, flight, now);
    }

    /// Writes a call's request, signed now; its connection is ready to take it.
    ///
    /// # Errors
    /// When the request cannot be made; nothing is to be sent then.
    pub fn write_request(&mut self, call: &Call, now: Now, out: &mut Vec<u8>) -> Result<(), CallError> {
        let authority = call.origin.authority(match call.service {
            Service::Kms => 443,
            Service::Metadata => 80,
        });
        if self.identity_call == Some(call.id) {
            self.identity.write_request(out, &authority);
            return Ok(());
        }
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
        self.calls.iter().find(|(id, _)| *id == call).map(|(_, flight)| *flight)
    }

    /// Takes the outcome of a call.
    pub fn on_called(&mut self, call: CallId, outcome: Result<Response, CallError>, now: Now) {
        if self.identity_call == Some(call) {
            self.identity_call = None;
            match self.identity.on_answer(outcome.as_ref(), now, &mut self.random) {
                Some(Ok(())) => log::info!("credentials of the instance's RAM role fetched"),
                Some(Err(error)) => log::warn!("no credentials: {error}"),
                None => {}
            }
        } else if let Some(id) = self.flight_of(call) {
            self.calls.retain(|(it, _)| *it != call);
            if let Some(flight) = self.flights.remove(&id) {
                self.on_fetched(id, flight, outcome, now);
            }
        }
        self.advance(now.mono);
    }

    fn on_fetched(
        &mut self,
        id: FlightId,
        mut flight: Flight,
        outcome: Result<Response, CallError>,
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
                log_reply(&flight.key, &reply, took_ms);
                reply
            }
            Err(error) => {
                let KeyRef { id: name, .. } = flight.key.as_ref();
                log::warn!("KMS GetSecretValue \"{}\": {error} ({took_ms} ms)", escape(name));
                return self.on_down(
                    id,
                    flight,
                    Setback::passing(Failure::from_call(error), now.mono),
                    now.mono,
                );
            }
        };
        if !matches!(reply, Reply::Transient { .. }) && self.circuit.on_reply() {
            log::info!("KMS replies again");
        }
        match reply {
            Reply::Value(value) => {
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
                self.cache.refuse(flight.key.clone(), Rc::new(error), now.mono);
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
                self.on_setback(id, flight, Setback::passing(Failure::from_kms(&error), until), now.mono);
            }
            Reply::CredentialsRefused(error) => {
                self.identity.refused(&used, now.mono);
                if flight.renewed {
                    return self.on_setback(
                        id,
                        flight,
                        Setback::lasting(Failure::from_kms(&error)),
                        now.mono,
                    );
                }
                flight.renewed = true;
                self.again(id, flight, now.mono);
            }
            Reply::ClockSkew { error, server_unix_s } => match server_unix_s {
                Some(theirs) if !flight.clock_corrected => {
                    self.clock_offset_s = theirs.saturating_sub(now.unix_s);
                    log::warn!(
                        "this host's clock is {} s off KMS's; signing with KMS's time",
                        -self.clock_offset_s
                    );
                    flight.clock_corrected = true;
                    self.again(id, flight, now.mono);
                }
                _ => self.on_setback(id, flight, Setback::lasting(Failure::from_kms(&error)), now.mono),
            },
            Reply::SignatureRefused(error) => {
                self.on_setback(id, flight, Setback::lasting(Failure::from_kms(&error)), now.mono);
            }
            Reply::Invalid(what) => {
                self.on_setback(id, flight, Setback::lasting(Failure::invalid_response(what)), now.mono);
            }
        }
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
        if self.circuit.is_open() {
            for id in std::mem::take(&mut self.queue) {
                if let Some(flight) = self.flights.remove(&id) {
                    self.on_setback(id, flight, shared.clone(), now);
                }
            }
        }
    }

    /// A try failed: who has a fall-back gets it, who has none gets another try or the error.
    fn on_setback(&mut self, id: FlightId, mut flight: Flight, setback: Setback, now: Mono) {
        let Setback { failure, retryable, not_before } = setback;
        flight.failures = flight.failures.saturating_add(1);
        flight.last_failure = Some(Rc::clone(&failure));
        flight.not_before = flight.not_before.max(not_before);
        self.remember_refresh(&flight, Some(&failure));
        self.answer_from_cache(&mut flight, now);
        flight.readers.append(&mut flight.next_round);
        let pause = retry::backoff(flight.failures, retry::BACKOFF_CAP, &mut self.random);
        if !flight.readers.is_empty() {
            let budget = flight.budget.get_or_insert_with(|| Budget::from(now));
            budget.tries_left = budget.tries_left.saturating_sub(1);
            let until = now.after(pause.min(retry::BACKOFF_BASE * 2)).max(flight.not_before);
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
        if let Phase::Calling { began, for_refresh: true, .. } = flight.phase {
            let refreshed = Refreshed { began, failure: failure.cloned() };
            self.refreshed.insert(flight.key.clone(), refreshed, flight.key.text_bytes());
        }
    }

    fn new_flight(&mut self, key: Key, now: Mono) -> (FlightId, Flight) {
        self.last_number += 1;
        let id = FlightId(self.last_number);
        self.by_key.insert(key.clone(), id);
        self.queue.push_back(id);
        (id, Flight::new(key, now))
    }

    fn next_call_id(&mut self) -> CallId {
        self.last_number += 1;
        CallId(self.last_number)
    }

    fn take_flight(&mut self, key: KeyRef<'_>) -> Option<(FlightId, Flight)> {
        let id = *self.by_key.get(&Lookable(key))?;
        self.flights.remove(&id).map(|flight| (id, flight))
    }

    fn put_back(&mut self, id: FlightId, flight: Flight, now: Mono) {
        let has_stale = self.cache.servable(flight.key.as_ref(), now).is_some();
        self.flight_floor = self.flight_floor.min(flight.next_deadline(has_stale));
        self.flights.insert(id, flight);
    }

    /// The flight is over. Readers who came too late for it begin the next one.
    fn land(&mut self, id: FlightId, flight: Flight, now: Mono) {
        self.by_key.remove(&flight.key);
        if matches!(flight.phase, Phase::Queued { .. }) {
            self.queue.retain(|it| *it != id);
        }
        if !flight.next_round.is_empty() {
            let (id, mut next) = self.new_flight(flight.key, now);
            next.readers = flight.next_round;
            next.budget = Some(Budget::from(now));
            self.put_back(id, next, now);
        }
    }

    /// The agent ends: all who still wait are told so.
    pub fn give_up(&mut self) {
        let failure = Rc::new(Failure::ours(503, "ServiceUnavailable", "the agent is ending"));
        for (_, mut flight) in std::mem::take(&mut self.flights) {
            self.fail_readers(&mut flight, &failure);
        }
        self.by_key.clear();
        self.queue.clear();
        self.calls.clear();
    }

    /// How many secrets are cached, and their bytes.
    #[must_use]
    pub fn cached(&self) -> (usize, usize) {
        self.cache.size()
    }

    /// Panics where what the broker holds contradicts itself.
    #[cfg(any(test, debug_assertions))]
    pub fn check_invariants(&self) {
        self.cache.check_invariants();
        assert!(self.calls.len() <= UPSTREAM_CALLS_MAX && self.flights.len() <= FLIGHTS_MAX);
        assert_eq!(self.by_key.len(), self.flights.len());
        let mut clients = hashbrown::HashSet::new();
        for (id, flight) in &self.flights {
            assert_eq!(self.by_key.get(&flight.key), Some(id), "one flight a key");
            assert_eq!(
                self.queue.iter().filter(|it| *it == id).count(),
                usize::from(matches!(flight.phase, Phase::Queued { .. }))
            );
            let called = self.calls.iter().filter(|(_, it)| it == id).count();
            assert_eq!(called, usize::from(matches!(flight.phase, Phase::Calling { .. })));
            for reader in flight.readers.iter().chain(&flight.next_round) {
                assert!(clients.insert(reader.client.0), "a client waits for one reply at a time");
            }
            let needs = |reader: &Reader| reader.refresh_now;
            assert!(
                flight.budget.is_some() || !flight.readers.iter().any(needs),
                "who waits has an end to it"
            );
        }
        for id in &self.queue {
            assert!(self.flights.contains_key(id));
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
}

impl Setback {
    fn passing(failure: Failure, not_before: Mono) -> Setback {
        Setback { failure: Rc::new(failure), retryable: true, not_before }
    }

    fn lasting(failure: Failure) -> Setback {
        Setback { failure: Rc::new(failure), retryable: false, not_before: Mono::default() }
    }
}

/// Lets a map of owned keys be asked with a borrowed one.
struct Lookable<'a>(KeyRef<'a>);

impl std::hash::Hash for Lookable<'_> {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl hashbrown::Equivalent<Key> for Lookable<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        key.as_ref() == self.0
    }
}

fn vpc_endpoint(region: &str) -> String {
    format!("kms-vpc.{region}.aliyuncs.com")
}

fn no_reply() -> Failure {
    let seconds = retry::READER_BUDGET.as_secs();
    Failure::ours(504, "UpstreamTimeout", format!("KMS gave no reply within {seconds} s"))
}

fn log_reply(key: &Key, reply: &Reply, took_ms: u128) {
    let KeyRef { id, version_id, version_stage } = key.as_ref();
    let (id, version) = (escape(id), escape(version_id.or(version_stage).unwrap_or_default()));
    match reply {
        Reply::Value(_) => log::info!("KMS GetSecretValue \"{id}\" {version}: 200 ({took_ms} ms)"),
        Reply::Invalid(what) => log::warn!("KMS GetSecretValue \"{id}\" {version}: {what} ({took_ms} ms)"),
        Reply::Refused(error)
        | Reply::Transient { error, .. }
        | Reply::Throttled { error, .. }
        | Reply::CredentialsRefused(error)
        | Reply::ClockSkew { error, .. }
        | Reply::SignatureRefused(error) => {
            log::warn!("KMS GetSecretValue \"{id}\" {version}: {error} ({took_ms} ms)");
        }
    }
}

#[cfg(test)]
mod tests;
