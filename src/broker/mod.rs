//! Every decision of the agent: who gets in, what is answered from memory, what KMS is asked and when
//! again, and who is told what came of it.
//!
//! Pure: it is handed requests, results and the time, and hands out [`Output`]s. A key has at most one
//! flight at a time, which all its readers share: `flights.rs` draws its life, `fetch.rs` leads it.

mod access;
pub mod answer;
mod circuit;
mod fetch;
mod flights;
pub mod gate;
mod health;
mod refreshes;
mod status;
mod throttle;

pub use flights::{ClientId, UPSTREAM_CALLS_MAX};

use crate::cache::{Cache, KeyRef, Lives};
use crate::call::Call;
use crate::config::Config;
use crate::http::request::{Reject, Request};
use crate::http::write::Persistence;
use crate::identity::Identity;
use crate::kms::format::Kv;
use crate::metrics::{Connections, Gauges, Metrics, Outcome};
use crate::random::Random;
use crate::secret::Secret;
use crate::time::{Mono, Now};
use access::Access;
use answer::{Content, ReplyStyle, Writer, XCache};
use circuit::Circuit;
use flights::{Flights, Reader};
use gate::{Denial, Route, SecretQuery};
use health::Health;
use refreshes::Refreshes;
use status::Status;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;
use throttle::Throttle;

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
    /// The client that waited.
    pub client: ClientId,
    manner: ReplyStyle,
    content: Content,
}

/// The connection that a request came on, and all of them as they are counted.
#[derive(Clone, Copy, Debug)]
pub struct Visit<'a> {
    /// The connection serves no other request after this one.
    pub last: bool,
    /// The connection is past `MaxConn`, so that only `/ping` is served.
    pub past_cap: bool,
    /// Client connections that are open now.
    pub open: usize,
    /// What became of client connections since the start.
    pub counted: &'a Connections,
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
    /// The refusal of the gate that it did not pass.
    pub denial: Option<Denial>,
    /// What it said of the connection.
    pub persistence: Persistence,
}

/// The broker. One for the agent's whole life.
#[derive(Debug)]
pub struct Broker {
    server: crate::config::ServerSection,
    token: Secret,
    draining: bool,
    writer: Writer,
    metrics: Metrics,
    health: Health,
    cache: Cache,
    refreshes: Refreshes,
    access: Access,
    flights: Flights,
    circuit: Circuit,
    throttle: Throttle,
    outputs: VecDeque<Output>,
    random: Random,
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
            draining: false,
            writer: Writer::new(config.server.response_type, Random::from_seed(random.next_u64())),
            metrics: Metrics::default(),
            health: Health::new(),
            cache: Cache::new(config.cache.size, config.cache.bytes, lives),
            refreshes: Refreshes::new(),
            access: Access::new(identity, config.kms.endpoint()),
            flights: Flights::default(),
            circuit: Circuit::default(),
            throttle: Throttle::default(),
            outputs: VecDeque::new(),
            random,
        }
    }

    /// A new token; the old one stops working at once.
    pub fn set_token(&mut self, token: Secret) {
        self.token = token;
    }

    /// As [`Cache::set_refresh_jitter`]; the fleet simulation shows what happens without.
    pub fn set_refresh_jitter(&mut self, per_mille: u32) {
        self.cache.set_refresh_jitter(per_mille);
    }

    /// What `/status` and `/metrics` say of the process.
    pub fn set_process(&mut self, pid: u32, started: Now) {
        (self.health.pid, self.health.started) = (pid, started);
    }

    /// From now on every reply is its connection's last.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// Whether [`Broker::drain`] was called.
    #[must_use]
    pub const fn is_draining(&self) -> bool {
        self.draining
    }

    /// Answers a request into `out`, or lets the client wait.
    pub fn ask(
        &mut self,
        client: ClientId,
        request: &Request<'_, '_>,
        visit: Visit<'_>,
        now: Now,
        out: &mut Vec<u8>,
    ) -> Disposition {
        self.writer.set_time(now.unix_s);
        let keep_alive = request.keep_alive && !visit.last && !visit.past_cap && !self.draining;
        let persistence = match (keep_alive, request.http10) {
            (false, _) => Persistence::Close,
            (true, false) => Persistence::KeepAlive,
            (true, true) => Persistence::KeepAliveSaid,
        };
        let mut manner = ReplyStyle { head_only: request.method == "HEAD", kv: Kv::V1, persistence };
        match gate::pass(request, &self.server, &self.token, visit.past_cap) {
            Ok(Route::Ping) => {
                self.writer.healthy(out, manner);
                Disposition::Answered(self.done(Outcome::Ping, persistence))
            }
            Ok(Route::Metrics) => {
                let done = self.done(Outcome::Metrics, persistence);
                self.writer.metrics(out, &self.metrics.render(&self.gauges(visit)), manner);
                Disposition::Answered(done)
            }
            Ok(Route::Status) => {
                self.writer.status(out, &self.status(visit.open, now), manner);
                Disposition::Answered(self.done(Outcome::Status, persistence))
            }
            Ok(Route::Secret(question)) => {
                manner.kv = question.kv;
                self.ask_secret(client, &question, manner, now.mono, out)
            }
            Err(denial) => Disposition::Answered(self.deny(denial, manner, now.mono, out)),
        }
    }

    /// Answers what is no request. `head_only`: it would have been a HEAD.
    pub fn reject(&mut self, reject: Reject, head_only: bool, now: Now, out: &mut Vec<u8>) -> Done {
        self.writer.set_time(now.unix_s);
        let manner = ReplyStyle { head_only, kv: Kv::V1, persistence: Persistence::Close };
        self.deny(reject.into(), manner, now.mono, out)
    }

    /// One of the agent's own pages was written.
    fn done(&mut self, outcome: Outcome, persistence: Persistence) -> Done {
        self.metrics.count_request(outcome);
        Done { status: 200, x_cache: None, denial: None, persistence }
    }

    fn gauges(&self, visit: Visit<'_>) -> Gauges {
        Gauges {
            cached: self.cache.size(),
            cached_max: self.cache.size_max(),
            connections: *visit.counted,
            connections_open: visit.open,
            connections_max: self.server.max_conn,
            circuit_open: self.circuit.is_open(),
            credentials_expire_unix_s: self.health.credentials_expire_unix_s,
            started_unix_s: self.health.started.unix_s,
        }
    }

    fn status(&self, connections_open: usize, now: Now) -> String {
        let status = Status {
            health: &self.health,
            cached: self.cache.size(),
            connections_open,
            connections_max: self.server.max_conn,
            clock_offset_s: self.access.identity.clock_offset_s(),
        };
        status.to_json(now)
    }

    fn deny(&mut self, denial: Denial, manner: ReplyStyle, now: Mono, out: &mut Vec<u8>) -> Done {
        let failure = Content::Failure(Rc::new(denial.clone().into()));
        let done = self.write(&failure, manner, now, out);
        Done { denial: Some(denial), ..done }
    }

    /// Writes an answer that [`Broker::poll_output`] gave. `last`: its connection serves no other.
    pub fn write_answer(&mut self, answer: &Answer, last: bool, now: Now, out: &mut Vec<u8>) -> Done {
        self.writer.set_time(now.unix_s);
        let persistence = if last || self.draining { Persistence::Close } else { answer.manner.persistence };
        self.write(&answer.content, ReplyStyle { persistence, ..answer.manner }, now.mono, out)
    }

    fn write(&mut self, content: &Content, manner: ReplyStyle, now: Mono, out: &mut Vec<u8>) -> Done {
        let (status, x_cache) = match content {
            Content::Secret(body, span, x_cache) => {
                self.metrics.count_request((*x_cache).into());
                self.writer.secret(out, body, *span, now, *x_cache, manner);
                (200, Some(*x_cache))
            }
            Content::Failure(failure) => {
                failure.count(&mut self.metrics);
                self.writer.failure(out, failure, manner);
                (failure.status, None)
            }
        };
        Done { status, x_cache, denial: None, persistence: manner.persistence }
    }

    fn ask_secret(
        &mut self,
        client: ClientId,
        question: &SecretQuery<'_>,
        manner: ReplyStyle,
        now: Mono,
        out: &mut Vec<u8>,
    ) -> Disposition {
        let key =
            KeyRef::new(&question.id, question.version_id.as_deref(), question.version_stage.as_deref());
        let reader = Reader { client, manner, refresh_now: question.refresh_now };
        let known = if reader.refresh_now { self.just_refreshed(key, now) } else { self.look_up(key, now) };
        let Some(content) = known.or_else(|| self.join(key, reader, now)) else {
            return Disposition::Waiting;
        };
        Disposition::Answered(self.write(&content, manner, now, out))
    }

    /// A client went away. Its call goes on: the result will be cached.
    pub fn left(&mut self, client: ClientId) {
        self.flights.left(client);
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
        for id in self.flights.take_due(now) {
            self.on_flight_time(id, now);
        }
        self.advance(now);
    }

    /// When [`Broker::on_time`] is to be called.
    #[must_use]
    pub fn next_deadline(&self) -> Mono {
        let identity = self.access.identity.next_deadline();
        self.flights.next_deadline().min(self.cache.next_refresh()).min(identity)
    }

    /// Panics where what the broker holds contradicts itself.
    #[cfg(any(test, debug_assertions))]
    pub fn check_invariants(&self) {
        self.cache.check_invariants();
        self.flights.check_invariants();
    }
}

#[cfg(test)]
mod tests;
