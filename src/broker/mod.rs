//! Every decision of the agent: who gets in, what is answered from memory, what KMS is asked and when
//! again, and who is told what came of it.
//!
//! Pure: it is handed requests, results and the time, and hands out [`Output`]s. A key has at most one
//! `flight` at a time; all its readers share it.

pub mod answer;
mod circuit;
mod fetch;
mod flight;
pub mod gate;
mod status;

pub use flight::ClientId;

use crate::cache::lru::Lru;
use crate::cache::{Cache, Key, KeyRef, Lives, Lookup, REFRESH_JITTER_PER_MILLE};
use crate::call::{Call, CallId};
use crate::config::{Config, HostPort};
use crate::http::request::{Reject, Request};
use crate::http::write::Persistence;
use crate::identity::Identity;
use crate::kms::format::Kv;
use crate::kms::retry;
use crate::log::RateLimit;
use crate::metrics::{Gauges, Lookup as Looked, Metrics, Outcome};
use crate::random::Random;
use crate::secret::Secret;
use crate::time::{Mono, Now};
use answer::{Content, Failure, Manner, Writer, XCache};
use circuit::Circuit;
use flight::{Flight, FlightId, Phase, Reader};
use gate::{Denial, Question, Route};
use hashbrown::HashMap;
use status::{Health, Status};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

/// Calls to KMS at a time, and so connections.
pub const UPSTREAM_CALLS_MAX: usize = 8;
/// Fetches under way, queued and pausing ones included. Clients that ask and leave cannot pile up more.
const FLIGHTS_MAX: usize = 2048;
/// Throttled calls counted; the pause between refreshes has reached its cap by then.
const THROTTLED_MAX: u32 = 7;
/// Warnings of calls to KMS a second, and at once.
const CALLS_WARNED_OF: (u32, u32) = (5, 20);
/// Keys whose last `refreshNow` fetch is remembered.
const REMEMBERED_MAX: usize = 1024;
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
pub enum Disposition {
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
    identity_call: Option<CallId>,
    flights: BTreeMap<FlightId, Flight>,
    by_key: HashMap<Key, FlightId>,
    queue: VecDeque<FlightId>,
    /// Calls that are out to KMS, and since when; at most [`UPSTREAM_CALLS_MAX`].
    calls: Vec<(CallId, FlightId, Mono)>,
    circuit: Circuit,
    /// Throttled calls, less those that succeeded since: how far refreshes behind the scenes hold back. The
    /// limit is the whole account's, so what one secret meets the others would meet too.
    throttled: u32,
    /// None of them goes out before this.
    throttled_until: Mono,
    /// Warnings of what KMS refused, and of all else that went wrong.
    refusals_logged: RateLimit,
    failures_logged: RateLimit,
    refreshed: Lru<Refreshed>,
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
    metrics: Metrics,
    kms_health: Health,
    credentials_health: Health,
    /// When the credentials fetched last end.
    credentials_expire_unix_s: Option<i64>,
    /// The process's id, and when it started.
    pid: u32,
    started: Now,
    cached_max: (usize, usize),
}

impl Broker {
    /// Begins with an empty cache.
    #[must_use]
    pub fn new(config: &Config, token: Secret, identity: Identity, mut random: Random) -> Broker {
        let max_stale =
            if config.server.ignore_transient_errors { config.cache.max_stale } else { Duration::ZERO };
        let lives = Lives { ttl: config.cache.ttl, max_stale };
        Broker {
            server: config.server.clone(),
            token,
            cache: Cache::new(config.cache.size, config.cache.bytes, lives),
            identity,
            endpoint: config.kms.endpoint().map(Rc::new),
            identity_call: None,
            flights: BTreeMap::new(),
            by_key: HashMap::new(),
            queue: VecDeque::new(),
            calls: Vec::new(),
            circuit: Circuit::default(),
            throttled: 0,
            throttled_until: Mono::default(),
            refusals_logged: RateLimit::new(CALLS_WARNED_OF.0, CALLS_WARNED_OF.1),
            failures_logged: RateLimit::new(CALLS_WARNED_OF.0, CALLS_WARNED_OF.1),
            refreshed: Lru::new(REMEMBERED_MAX, usize::MAX),
            outputs: VecDeque::new(),
            writer: Writer::new(config.server.response_type, Random::from_seed(random.next_u64())),
            random,
            refresh_jitter_per_mille: REFRESH_JITTER_PER_MILLE,
            last_number: 0,
            clock_offset_s: 0,
            flight_floor: Mono::NEVER,
            queue_due: Mono::default(),
            draining: false,
            metrics: Metrics::default(),
            kms_health: Health::default(),
            credentials_health: Health::default(),
            credentials_expire_unix_s: None,
            pid: 0,
            started: Now { mono: Mono::default(), unix_s: 0 },
            cached_max: (config.cache.size, config.cache.bytes),
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

    /// What `/status` and `/metrics` say of the process.
    pub fn set_process(&mut self, pid: u32, started: Now) {
        (self.pid, self.started) = (pid, started);
    }

    /// The counters; the server adds those of connections.
    pub fn metrics_mut(&mut self) -> &mut Metrics {
        &mut self.metrics
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
    ) -> Disposition {
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
                Disposition::Answered(self.done(Outcome::Ping, persistence))
            }
            Ok(Route::Metrics) => {
                let done = self.done(Outcome::Metrics, persistence);
                self.writer.metrics(out, &self.metrics.render(&self.gauges()), manner);
                Disposition::Answered(done)
            }
            Ok(Route::Status) => {
                self.writer.status(out, &self.status(now), manner);
                Disposition::Answered(self.done(Outcome::Status, persistence))
            }
            Ok(Route::Secret(question)) => {
                manner.kv = question.kv;
                self.ask_secret(client, &question, manner, now.mono, out)
            }
            Err(denial) => Disposition::Answered(self.deny(denial, manner, out)),
        }
    }

    /// Answers what is no request. `head_only`: it would have been a HEAD.
    pub fn reject(&mut self, reject: Reject, head_only: bool, now: Now, out: &mut Vec<u8>) -> Done {
        self.writer.set_time(now.unix_s);
        self.deny(reject.into(), Manner { head_only, kv: Kv::V1, persistence: Persistence::Close }, out)
    }

    /// One of the agent's own pages was written.
    fn done(&mut self, outcome: Outcome, persistence: Persistence) -> Done {
        self.metrics.count_request(outcome);
        Done { status: 200, x_cache: None, code: None, persistence }
    }

    fn gauges(&self) -> Gauges {
        Gauges {
            cached: self.cache.size(),
            cached_max: self.cached_max,
            connections_max: self.server.max_conn,
            circuit_open: self.circuit.is_open(),
            credentials_expire_unix_s: self.credentials_expire_unix_s,
            started_unix_s: self.started.unix_s,
        }
    }

    fn status(&self, now: Now) -> String {
        let status = Status {
            pid: self.pid,
            started: self.started,
            cached: self.cache.size(),
            connections_open: self.metrics.connections.open,
            connections_max: self.server.max_conn,
            kms: &self.kms_health,
            credentials: &self.credentials_health,
            credentials_expire_unix_s: self.credentials_expire_unix_s,
            clock_offset_s: self.identity.clock_offset_s(),
        };
        status.to_json(now)
    }

    fn deny(&mut self, denial: Denial, manner: Manner, out: &mut Vec<u8>) -> Done {
        let (status, code) = (denial.status, Some(denial.code));
        let failure = Failure::from(denial);
        self.metrics.count_request(failure.outcome);
        self.writer.failure(out, &failure, manner);
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
                self.metrics.count_request((*x_cache).into());
                self.writer.secret(out, body, *span, now, *x_cache, manner);
                Done { status: 200, x_cache: Some(*x_cache), code: None, persistence }
            }
            Content::Failure(failure) => {
                self.metrics.count_request(failure.outcome);
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
    ) -> Disposition {
        let key =
            KeyRef::new(&question.id, question.version_id.as_deref(), question.version_stage.as_deref());
        let reader = Reader { client, manner, refresh_now: question.refresh_now };
        if question.refresh_now {
            self.metrics.count_lookup(Looked::Bypass);
            if let Some(content) = self.just_refreshed(key, now) {
                return Disposition::Answered(self.write(&content, manner, now, out));
            }
            return self.join(key, reader, now, out);
        }
        let persistence = manner.persistence;
        match self.cache.lookup(key, now) {
            Lookup::Fresh { value, refresh } => {
                self.metrics.count_lookup(Looked::Hit);
                self.metrics.count_request(Outcome::Hit);
                self.writer.secret(out, &value.body, value.span, now, XCache::Hit, manner);
                if refresh {
                    self.refresh(key.to_owned(), now);
                }
                Disposition::Answered(Done {
                    status: 200,
                    x_cache: Some(XCache::Hit),
                    code: None,
                    persistence,
                })
            }
            Lookup::Refused(error) => {
                self.metrics.count_lookup(Looked::Refused);
                let content = Content::Failure(Rc::new(Failure::from_kms(error)));
                Disposition::Answered(self.write(&content, manner, now, out))
            }
            Lookup::Expired(value) => {
                self.metrics.count_lookup(Looked::Expired);
                let content = Content::Secret(Rc::clone(&value.body), value.span, XCache::Stale);
                if !self.is_known_failing(key, now) {
                    return self.join(key, reader, now, out);
                }
                self.refresh(key.to_owned(), now);
                Disposition::Answered(self.write(&content, manner, now, out))
            }
            Lookup::Absent => {
                self.metrics.count_lookup(Looked::Miss);
                self.join(key, reader, now, out)
            }
        }
    }

    /// Whether a try for this key has failed and none succeeded since, or KMS is down as a whole: a
    /// reader with a stale value at hand need not wait to find out.
    fn is_known_failing(&self, key: KeyRef<'_>, now: Mono) -> bool {
        let flight = self.by_key.get(&Lookable(key)).and_then(|id| self.flights.get(id));
        self.circuit.is_known_open(now) || flight.is_some_and(|flight| flight.failures > 0)
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
    fn join(&mut self, key: KeyRef<'_>, reader: Reader, now: Mono, out: &mut Vec<u8>) -> Disposition {
        let has_stale = self.cache.servable(key, now).is_some();
        let (id, mut flight) = match self.take_flight(key) {
            Some(taken) => taken,
            None if self.flights.len() >= FLIGHTS_MAX => {
                let failure =
                    Failure::ours(502, "UpstreamUnreachable", "too many secrets are being fetched at once");
                return Disposition::Answered(self.write(
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
        if let Phase::Queued { began } = &mut flight.phase
            && flight.readers.is_empty()
        {
            // A refresh that was held back: its try begins now that somebody waits for it.
            *began = now;
        }
        if reader.refresh_now || !has_stale {
            let budget = *flight.budget_of_readers(now);
            if let Phase::Pausing { until } = &mut flight.phase {
                if flight.not_before >= budget.until {
                    // The server asked for a pause that outlasts the reader's patience.
                    let failure =
                        flight.last_failure.clone().unwrap_or_else(|| Rc::new(self.no_reply(&flight, now)));
                    flight.budget = None;
                    self.put_back(id, flight, now);
                    return Disposition::Answered(self.write(
                        &Content::Failure(failure),
                        reader.manner,
                        now,
                        out,
                    ));
                }
                if flight.readers.is_empty() {
                    // It paused behind the scenes; somebody waits now. Where others wait already the pause is
                    // theirs, too.
                    *until = (*until).min(now.max(flight.not_before));
                }
            }
        }
        if flight.is_too_early_for(&reader, REFRESH_NOW_PAUSE, now) {
            flight.next_round.push(reader);
        } else {
            flight.readers.push(reader);
        }
        self.put_back(id, flight, now);
        self.advance(now);
        Disposition::Waiting
    }

    /// Fetches a key behind the scenes, unless that is under way.
    fn refresh(&mut self, key: Key, now: Mono) {
        if self.by_key.contains_key(&key) || self.flights.len() >= FLIGHTS_MAX {
            return;
        }
        self.metrics.refreshes += 1;
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
            let failure = flight.last_failure.clone().unwrap_or_else(|| Rc::new(self.no_reply(&flight, now)));
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

    /// Nobody waits, there is no value to be renewed, and no `Retry-After` to be remembered for those who
    /// come next (as long as there is room for that).
    fn is_pointless(&self, flight: &Flight, now: Mono) -> bool {
        flight.readers.is_empty()
            && flight.next_round.is_empty()
            && flight.failures > 0
            && (now >= flight.not_before || self.flights.len() >= FLIGHTS_MAX / 2)
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

    /// A reader's patience is over and nothing has failed yet.
    fn no_reply(&self, flight: &Flight, now: Mono) -> Failure {
        let seconds = retry::READER_BUDGET.as_secs();
        if matches!(flight.phase, Phase::Queued { .. }) && !self.identity.is_ready(now) {
            // KMS has not even been asked.
            let asked_for = self.identity.asked_for();
            let why = format!("no credentials within {seconds} s: {asked_for} is still being asked for");
            return Failure::no_credentials(&why, Duration::ZERO);
        }
        Failure::ours(504, "UpstreamTimeout", format!("KMS gave no reply within {seconds} s in all"))
    }

    fn answer_all(&mut self, readers: Vec<Reader>, content: impl Fn(&Reader) -> Content) {
        self.outputs.extend(readers.into_iter().map(|reader| {
            let content = content(&reader);
            Output::Answer(Answer { client: reader.client, manner: reader.manner, content })
        }));
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

    fn put_back(&mut self, id: FlightId, mut flight: Flight, now: Mono) {
        let has_stale = self.cache.servable(flight.key.as_ref(), now).is_some();
        if !has_stale && !flight.readers.is_empty() {
            // Whoever came while there was a stale value has nothing to fall back on once that is dead.
            flight.budget_of_readers(now);
        }
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
            next.budget_of_readers(now);
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
            let called = self.calls.iter().filter(|(_, it, _)| it == id).count();
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

#[cfg(test)]
mod tests;
