//! A connection to KMS or the metadata service: one enum of states over a plain or TLS byte stream.
//!
//! `Busy (Resolving -> Connecting -> [Handshaking] -> Exchanging) <-> Idle`. The server carries the bytes.

use super::tls::Tls;
use crate::call::{Call, CallError, Service};
use crate::config::HostPort;
use crate::http::response::{Progress, REPLY_BYTES_MAX, Response, ResponseParser};
use crate::time::Mono;
use rustls::ClientConfig;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use zeroize::Zeroize as _;

/// An unused connection is kept this long.
const IDLE_LIFE: Duration = Duration::from_secs(60);
const HANDSHAKE: &str = "TLS handshake with";

/// Where a connection stands; data lives only in the state that has it.
enum State {
    Idle {
        since: Mono,
    },
    Busy {
        call: Call,
        /// When the stage began.
        since: Mono,
        stage: Stage,
    },
    /// Its call was given back, or it had none: only a goodbye is left to be sent.
    Ended,
}

/// How far a call has come. `rest`: addresses that were not tried yet.
enum Stage {
    Resolving,
    Connecting { rest: Vec<SocketAddr> },
    Handshaking { rest: Vec<SocketAddr> },
    Exchanging { parser: Box<ResponseParser>, reused: bool },
}

impl Stage {
    /// The request goes out and the reply comes in. `reused`: on a connection that carried a call before.
    fn exchanging(reused: bool) -> Stage {
        Stage::Exchanging { parser: Box::new(ResponseParser::new(REPLY_BYTES_MAX)), reused }
    }

    /// What was tried, as messages have it before the origin.
    const fn name(&self) -> &'static str {
        match self {
            Stage::Resolving => "resolve",
            Stage::Connecting { .. } => "connect",
            Stage::Handshaking { .. } => HANDSHAKE,
            Stage::Exchanging { .. } => "reply of",
        }
    }
}

/// What bytes travel in.
enum Wire {
    Plain,
    Tls(Box<Tls>),
}

/// What came of an event.
#[derive(Debug)]
pub enum Step {
    /// Nothing yet.
    Wait,
    /// Connect the socket (a new one, if there was one) to this address.
    Connect(SocketAddr),
    /// The way is free: [`Outbound::send`] the request.
    SendRequest,
    /// The reply is there. The connection is idle now; if `close`, it is of no more use.
    Replied {
        /// The call that is answered.
        call: Call,
        /// Its status, headers and body.
        response: Response,
        /// Do not use the connection again.
        close: bool,
    },
    /// The call failed, and the connection with it.
    Failed(Call, CallError),
    /// An idle connection came to its end.
    Closed,
    /// A connection from the pool was dead before it was used: the call goes out again on a fresh one.
    Again(Call),
}

/// An outbound connection.
pub struct Outbound {
    service: Service,
    origin: Rc<HostPort>,
    state: State,
    wire: Wire,
    /// Bytes for the socket; `sent` of them are on their way.
    pending: Vec<u8>,
    sent: usize,
}

impl Outbound {
    /// A connection that is to be made for `call`.
    #[must_use]
    pub fn new(call: Call, now: Mono) -> Outbound {
        Outbound {
            service: call.service,
            origin: Rc::clone(&call.origin),
            state: State::Busy { call, since: now, stage: Stage::Resolving },
            wire: Wire::Plain,
            pending: Vec::new(),
            sent: 0,
        }
    }

    /// Whether it waits for the addresses of this name.
    #[must_use]
    pub fn is_resolving(&self, host: &str, port: u16) -> bool {
        matches!(self.stage(), Some(Stage::Resolving)) && self.origin.host == host && self.origin.port == port
    }

    /// Whether it is free to carry `call`.
    #[must_use]
    pub fn is_idle_for(&self, call: &Call) -> bool {
        self.is_idle() && self.service == call.service && self.origin == call.origin
    }

    /// Whether nothing is under way on it.
    #[must_use]
    pub const fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle { .. })
    }

    /// The service that it leads to.
    #[must_use]
    pub const fn service(&self) -> Service {
        self.service
    }

    /// Whether its socket is still being connected.
    #[must_use]
    pub const fn is_connecting(&self) -> bool {
        matches!(self.stage(), Some(Stage::Connecting { .. }))
    }

    const fn stage(&self) -> Option<&Stage> {
        match &self.state {
            State::Busy { stage, .. } => Some(stage),
            State::Idle { .. } | State::Ended => None,
        }
    }

    /// The addresses are known, or there are none.
    pub fn on_resolved(&mut self, result: &Result<Vec<SocketAddr>, String>, now: Mono) -> Step {
        let State::Busy { since, stage, .. } = &mut self.state else { return Step::Wait };
        let why = match result.as_deref() {
            Ok([first, rest @ ..]) => {
                (*since, *stage) = (now, Stage::Connecting { rest: rest.to_vec() });
                return Step::Connect(*first);
            }
            Ok([]) => "the name has no address",
            Err(why) => why,
        };
        self.give_up(CallError::unreachable("resolve", &self.origin, why))
    }

    /// Connecting failed; the next address, if there is one, is to be tried now.
    pub fn on_connect_failed(&mut self, why: &std::io::Error, now: Mono) -> Step {
        let why = crate::log::Reason(why).to_string();
        self.fail(now, |origin| CallError::unreachable("connect", origin, why))
    }

    /// The socket is connected. With `tls` a handshake begins.
    pub fn on_connected(&mut self, tls: Option<Arc<ClientConfig>>, now: Mono) -> Step {
        let State::Busy { since, stage, .. } = &mut self.state else { return Step::Wait };
        let Stage::Connecting { rest } = stage else { return Step::Wait };
        let rest = std::mem::take(rest);
        *since = now;
        let Some(config) = tls else {
            *stage = Stage::exchanging(false);
            return Step::SendRequest;
        };
        match Tls::new(config, &self.origin.host) {
            Ok(tls) => {
                self.wire = Wire::Tls(Box::new(tls));
                *stage = Stage::Handshaking { rest };
                self.fill_pending();
                Step::Wait
            }
            Err(error) => self.give_up(CallError::unreachable(HANDSHAKE, &self.origin, error)),
        }
    }

    /// An idle connection takes `call`; send its request.
    pub fn reuse(&mut self, call: Call, now: Mono) {
        debug_assert!(self.is_idle(), "one call at a time");
        self.state = State::Busy { call, since: now, stage: Stage::exchanging(true) };
    }

    /// Sends the request that `write` makes for the call under way. If it can make none, the call ends with its
    /// error, and the connection with it.
    pub fn request(&mut self, write: impl FnOnce(&Call, &mut Vec<u8>) -> Result<(), CallError>) -> Step {
        let State::Busy { call, .. } = &self.state else { return Step::Wait };
        let mut bytes = Vec::new();
        let step = match write(call, &mut bytes) {
            Ok(()) => {
                self.send(&bytes);
                Step::Wait
            }
            Err(error) => self.give_up(error),
        };
        bytes.zeroize();
        step
    }

    /// Takes a request to be sent.
    pub fn send(&mut self, request: &[u8]) {
        match &mut self.wire {
            Wire::Plain => self.pending.extend_from_slice(request),
            Wire::Tls(tls) => {
                let sent = tls.send(request);
                debug_assert!(sent.is_ok(), "a request is far below what rustls buffers");
            }
        }
        self.fill_pending();
    }

    /// The call, if there is one, ends with this error, and the connection with it.
    fn give_up(&mut self, error: CallError) -> Step {
        self.end().map_or(Step::Closed, |call| Step::Failed(call, error))
    }

    /// The connection ends; gives the call that was under way.
    fn end(&mut self) -> Option<Call> {
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Busy { call, .. } => Some(call),
            State::Idle { .. } | State::Ended => None,
        }
    }

    /// The bytes that the socket should take next.
    #[must_use]
    pub fn pending(&self) -> &[u8] {
        self.pending.get(self.sent..).unwrap_or_default()
    }

    /// The socket took `count` of them.
    pub fn on_sent(&mut self, count: usize) {
        self.sent = self.sent.saturating_add(count);
        debug_assert!(self.sent <= self.pending.len());
        if self.sent >= self.pending.len() {
            // In plain HTTP this holds a metadata token.
            self.pending.zeroize();
            self.sent = 0;
        }
    }

    fn fill_pending(&mut self) {
        if let Wire::Tls(tls) = &mut self.wire {
            tls.poll_ciphertext(&mut self.pending);
        }
    }

    /// Bytes came.
    pub fn on_bytes(&mut self, bytes: &[u8], now: Mono) -> Step {
        let Wire::Tls(tls) = &mut self.wire else { return self.on_plaintext(bytes, now) };
        let mut plaintext = Vec::new();
        let step = match tls.on_ciphertext(bytes, &mut plaintext) {
            Ok(()) => {
                let (handshaking, peer_has_closed) = (tls.is_handshaking(), tls.peer_has_closed());
                let step = self.on_decrypted(&plaintext, handshaking, peer_has_closed, now);
                self.fill_pending();
                step
            }
            Err(error) => {
                self.fill_pending();
                self.fail(now, |origin| CallError::unreachable(HANDSHAKE, origin, error))
            }
        };
        plaintext.zeroize();
        step
    }

    fn on_decrypted(
        &mut self,
        plaintext: &[u8],
        handshaking: bool,
        peer_has_closed: bool,
        now: Mono,
    ) -> Step {
        if !handshaking
            && let State::Busy { since, stage: stage @ Stage::Handshaking { .. }, .. } = &mut self.state
        {
            (*since, *stage) = (now, Stage::exchanging(false));
            return Step::SendRequest;
        }
        let step = if plaintext.is_empty() { Step::Wait } else { self.on_plaintext(plaintext, now) };
        if peer_has_closed && matches!(step, Step::Wait) { self.on_proper_end(now) } else { step }
    }

    fn on_plaintext(&mut self, bytes: &[u8], now: Mono) -> Step {
        let State::Busy { stage: Stage::Exchanging { parser, .. }, .. } = &mut self.state else {
            // No request has gone out that they could answer.
            return self.give_up(CallError::invalid(&self.origin, "bytes before any request"));
        };
        match parser.feed(bytes) {
            Ok(Progress::NeedMore) => Step::Wait,
            Ok(Progress::Done { used }) => self.replied(used == bytes.len(), now),
            Err(error) => self.fail(now, |origin| CallError::invalid(origin, error)),
        }
    }

    /// The reply is complete: the connection is idle.
    fn replied(&mut self, clean: bool, now: Mono) -> Step {
        let state = std::mem::replace(&mut self.state, State::Idle { since: now });
        let State::Busy { call, stage: Stage::Exchanging { parser, .. }, .. } = state else {
            debug_assert!(false, "a reply to no request");
            return Step::Closed;
        };
        let response = parser.into_response();
        // A reply before the whole request was taken leaves the stream in an unknown state.
        let close = !clean || !response.keep_alive || !self.pending().is_empty();
        Step::Replied { call, response, close }
    }

    /// The call fails, unless another address of the name is left to be tried.
    fn fail(&mut self, now: Mono, error: impl FnOnce(&HostPort) -> CallError) -> Step {
        let mut reached = false;
        if let State::Busy { call, since, stage } = &mut self.state {
            match stage {
                Stage::Connecting { rest } | Stage::Handshaking { rest }
                    if !rest.is_empty() && now < call.deadline =>
                {
                    // What was begun with the last one is void.
                    self.wire = Wire::Plain;
                    self.pending.zeroize();
                    self.sent = 0;
                    let address = rest.remove(0);
                    (*since, *stage) = (now, Stage::Connecting { rest: std::mem::take(rest) });
                    return Step::Connect(address);
                }
                Stage::Exchanging { .. } => reached = true,
                _ => {}
            }
        }
        let error = error(&self.origin);
        self.give_up(if reached { error.reached() } else { error })
    }

    /// The peer's bytes have come to a proper end: TLS's `close_notify`, or TCP's in plain HTTP.
    fn on_proper_end(&mut self, now: Mono) -> Step {
        if let Some(step) = self.dead_from_the_pool() {
            return step;
        }
        if let State::Busy { stage: Stage::Exchanging { parser, .. }, .. } = &mut self.state
            && parser.started()
            && parser.on_eof().is_ok()
        {
            return self.replied(false, now);
        }
        self.broken("the connection was closed before the reply was complete", now)
    }

    /// The socket has come to its end, or broke for this reason.
    pub fn on_end(&mut self, why: Option<&std::io::Error>, now: Mono) -> Step {
        if let Some(step) = self.dead_from_the_pool() {
            return step;
        }
        match (why, &self.wire) {
            (None, Wire::Plain) => self.on_proper_end(now),
            (None, Wire::Tls(_)) => {
                self.broken("the connection was closed before the reply was complete", now)
            }
            (Some(error), _) => {
                let why = crate::log::Reason(error).to_string();
                self.broken(&why, now)
            }
        }
    }

    /// A pooled connection that ended without a byte of reply was closed while it was idle.
    fn dead_from_the_pool(&mut self) -> Option<Step> {
        match &self.state {
            State::Busy { stage: Stage::Exchanging { reused: true, parser }, .. } if !parser.started() => {
                self.end().map(Step::Again)
            }
            State::Busy { .. } => None,
            State::Idle { .. } | State::Ended => Some(Step::Closed),
        }
    }

    fn broken(&mut self, why: &str, now: Mono) -> Step {
        let (name, truncated) = match self.stage() {
            Some(stage @ Stage::Exchanging { parser, .. }) => (stage.name(), parser.started()),
            Some(stage) => (stage.name(), false),
            None => return Step::Closed,
        };
        self.fail(now, |origin| {
            if truncated {
                CallError::invalid(origin, why)
            } else {
                CallError::unreachable(name, origin, why)
            }
        })
    }

    /// When [`Outbound::on_time`] is due.
    #[must_use]
    pub fn deadline(&self) -> Mono {
        let limits = self.service.timeouts();
        match &self.state {
            State::Busy { call, since, stage } => {
                let limit = match stage {
                    Stage::Resolving => limits.resolve,
                    Stage::Connecting { .. } => limits.connect,
                    Stage::Handshaking { .. } => limits.handshake,
                    Stage::Exchanging { .. } => limits.reply,
                };
                since.after(limit).min(call.deadline)
            }
            State::Idle { since } => since.after(IDLE_LIFE),
            State::Ended => Mono::default(),
        }
    }

    /// Its deadline has passed.
    pub fn on_time(&mut self, now: Mono) -> Step {
        let State::Busy { since, stage, .. } = &self.state else { return Step::Closed };
        // The limit as it was set, without the tick's delay.
        let after_ms = u64::try_from(now.since(*since).as_millis()).unwrap_or(u64::MAX) / 100 * 100;
        let (name, after) = (stage.name(), Duration::from_millis(after_ms));
        self.fail(now, |origin| CallError::timeout(name, origin, after))
    }

    /// Says goodbye as far as TLS wants it; send what is pending, then close.
    pub fn say_goodbye(&mut self) {
        if let Wire::Tls(tls) = &mut self.wire {
            tls.close();
        }
        self.fill_pending();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::{CallErrorKind, CallId};

    fn at(ms: u64) -> Mono {
        Mono::from_micros(ms * 1000)
    }

    fn call(id: u64) -> Call {
        let origin = Rc::new(HostPort { host: "metadata".into(), port: 80 });
        Call { id: CallId(id), service: Service::Metadata, origin, deadline: at(900) }
    }

    fn connecting(addresses: u16) -> Outbound {
        let mut conn = Outbound::new(call(1), at(0));
        let addresses = (0..addresses).map(|port| SocketAddr::from(([127, 0, 0, 1], port))).collect();
        assert!(matches!(conn.on_resolved(&Ok(addresses), at(0)), Step::Connect(_)));
        conn
    }

    #[test]
    fn a_failed_connection_is_neither_idle_nor_busy() {
        let mut conn = connecting(1);
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        assert!(matches!(
            conn.on_connect_failed(&refused, at(1)),
            Step::Failed(Call { id: CallId(1), .. }, _)
        ));
        assert!(!conn.is_idle() && !conn.is_idle_for(&call(2)) && !conn.is_connecting());
        assert_eq!(conn.deadline(), Mono::default(), "due at once, should it be kept");
        assert!(matches!(conn.on_time(at(2)), Step::Closed));
        assert!(matches!(conn.on_bytes(b"late", at(2)), Step::Closed));
        assert!(matches!(conn.on_end(None, at(2)), Step::Closed));
    }

    #[test]
    fn no_address_is_tried_after_the_calls_end() {
        let mut conn = connecting(3);
        assert!(matches!(conn.on_time(at(899)), Step::Connect(_)));
        assert_eq!(conn.deadline(), at(900), "the call's, which is nearer than the stage's");
        let Step::Failed(_, error) = conn.on_time(at(900)) else { panic!() };
        assert_eq!((error.kind, error.reached), (CallErrorKind::Timeout, false));
    }

    #[test]
    fn a_request_that_cannot_be_made_ends_its_call() {
        let mut conn = connecting(2);
        assert!(matches!(conn.on_connected(None, at(1)), Step::SendRequest));
        let error = CallError::unreachable("sign for", &call(1).origin, "no credentials");
        let step = conn.request(|call, _| {
            assert_eq!(call.id, CallId(1));
            Err(error.clone())
        });
        let Step::Failed(_, got) = step else { panic!("{step:?}") };
        assert_eq!(got, error, "as it is: no other address is tried, and nothing was reached");
        assert!(conn.pending().is_empty());
    }

    #[test]
    fn bytes_before_a_request_are_no_reply() {
        let mut conn = connecting(1);
        let Step::Failed(_, error) = conn.on_bytes(b"HTTP/1.1 200 OK\r\n", at(1)) else { panic!() };
        assert_eq!((error.kind, error.reached), (CallErrorKind::InvalidResponse, true));
    }
}
