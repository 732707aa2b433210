//! A connection to KMS or the metadata service: one enum of states over a plain or TLS byte stream.
//!
//! `Resolving -> Connecting -> [Handshaking] -> Exchanging <-> Idle`. The server carries the bytes.

use super::tls::{Tls, TlsError};
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

/// Where a connection stands; data lives only in the state that has it.
enum State {
    Resolving { call: Call, since: Mono },
    Connecting { call: Call, since: Mono, rest: Vec<SocketAddr> },
    Handshaking { call: Call, since: Mono, rest: Vec<SocketAddr> },
    Exchanging { call: Call, since: Mono, parser: Box<ResponseParser>, reused: bool },
    Idle { since: Mono },
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
        /// To which call.
        call: Call,
        /// What it says.
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
            state: State::Resolving { call, since: now },
            wire: Wire::Plain,
            pending: Vec::new(),
            sent: 0,
        }
    }

    /// Whether it waits for the addresses of this name.
    #[must_use]
    pub fn is_resolving(&self, host: &str, port: u16) -> bool {
        matches!(self.state, State::Resolving { .. }) && self.origin.host == host && self.origin.port == port
    }

    /// Whether it is free to carry `call`.
    #[must_use]
    pub fn is_idle_for(&self, call: &Call) -> bool {
        matches!(self.state, State::Idle { .. }) && self.service == call.service && self.origin == call.origin
    }

    /// Whether nothing is under way on it.
    #[must_use]
    pub const fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle { .. })
    }

    /// Whom it leads to.
    #[must_use]
    pub const fn service(&self) -> Service {
        self.service
    }

    /// Whether its socket is still being connected.
    #[must_use]
    pub const fn is_connecting(&self) -> bool {
        matches!(self.state, State::Connecting { .. })
    }

    /// The addresses are known, or there are none.
    pub fn on_resolved(&mut self, result: &Result<Vec<SocketAddr>, String>, now: Mono) -> Step {
        let Some(call) = self.take_call() else { return Step::Wait };
        let why = match result.as_deref() {
            Ok([first, rest @ ..]) => {
                self.state = State::Connecting { call, since: now, rest: rest.to_vec() };
                return Step::Connect(*first);
            }
            Ok([]) => "the name has no address",
            Err(why) => why,
        };
        let error = CallError::unreachable("resolve", &self.origin, why);
        Step::Failed(call, error)
    }

    /// Connecting failed; the next address, if there is one, is to be tried now.
    pub fn on_connect_failed(&mut self, why: &std::io::Error, now: Mono) -> Step {
        let why = crate::log::Reason(why).to_string();
        self.failed(now, |origin| CallError::unreachable("connect", origin, why))
    }

    /// The socket is connected. With `tls` a handshake begins.
    pub fn on_connected(&mut self, tls: Option<Arc<ClientConfig>>, now: Mono) -> Step {
        let rest = match &mut self.state {
            State::Connecting { rest, .. } => std::mem::take(rest),
            _ => Vec::new(),
        };
        let Some(call) = self.take_call() else { return Step::Wait };
        let Some(config) = tls else {
            self.state = exchanging(call, now, false);
            return Step::SendRequest;
        };
        match Tls::new(config, &self.origin.host) {
            Ok(tls) => {
                self.wire = Wire::Tls(Box::new(tls));
                self.state = State::Handshaking { call, since: now, rest };
                self.fill_pending();
                Step::Wait
            }
            Err(error) => Step::Failed(call, self.tls_failed(&error)),
        }
    }

    /// An idle connection takes `call`; send its request.
    pub fn reuse(&mut self, call: Call, now: Mono) {
        self.state = exchanging(call, now, true);
    }

    /// The call that a request is to be written for.
    #[must_use]
    pub fn call(&self) -> Option<&Call> {
        match &self.state {
            State::Resolving { call, .. }
            | State::Connecting { call, .. }
            | State::Handshaking { call, .. }
            | State::Exchanging { call, .. } => Some(call),
            State::Idle { .. } => None,
        }
    }

    /// Sends the request that `write` makes. If it can make none, the call ends with its error, and the connection
    /// with it.
    pub fn request(&mut self, write: impl FnOnce(&mut Vec<u8>) -> Result<(), CallError>) -> Step {
        let mut bytes = Vec::new();
        let step = match write(&mut bytes) {
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
            // A request is far below what rustls buffers.
            Wire::Tls(tls) => {
                let _ = tls.send(request);
            }
        }
        self.fill_pending();
    }

    fn give_up(&mut self, error: CallError) -> Step {
        match self.take_call() {
            Some(call) => Step::Failed(call, error),
            None => Step::Closed,
        }
    }

    /// The bytes that the socket should take next.
    #[must_use]
    pub fn pending(&self) -> &[u8] {
        self.pending.get(self.sent..).unwrap_or_default()
    }

    /// The socket took so many of them.
    pub fn on_sent(&mut self, count: usize) {
        self.sent = self.sent.saturating_add(count);
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
        let mut plaintext = Vec::new();
        let read = match &mut self.wire {
            Wire::Plain => self.on_plaintext(bytes, now),
            Wire::Tls(tls) => match tls.on_ciphertext(bytes, &mut plaintext) {
                Ok(()) => {
                    let step = self.on_handshake_or(&plaintext, now);
                    self.fill_pending();
                    step
                }
                Err(error) => {
                    self.fill_pending();
                    let error = self.tls_failed(&error);
                    self.failed(now, |_| error)
                }
            },
        };
        plaintext.zeroize();
        read
    }

    fn on_handshake_or(&mut self, plaintext: &[u8], now: Mono) -> Step {
        let (handshaking, peer_has_closed) = match &mut self.wire {
            Wire::Tls(tls) => (tls.is_handshaking(), tls.peer_has_closed()),
            Wire::Plain => (false, false),
        };
        if matches!(self.state, State::Handshaking { .. })
            && !handshaking
            && let Some(call) = self.take_call()
        {
            self.state = exchanging(call, now, false);
            return Step::SendRequest;
        }
        let step = if plaintext.is_empty() { Step::Wait } else { self.on_plaintext(plaintext, now) };
        if peer_has_closed && matches!(step, Step::Wait) { self.on_proper_end(now) } else { step }
    }

    fn on_plaintext(&mut self, bytes: &[u8], now: Mono) -> Step {
        let State::Exchanging { parser, .. } = &mut self.state else {
            // Nobody was asked anything.
            return match self.take_call() {
                Some(call) => {
                    Step::Failed(call, CallError::invalid(&self.origin, "bytes before any request"))
                }
                None => Step::Closed,
            };
        };
        match parser.feed(bytes) {
            Ok(Progress::NeedMore) => Step::Wait,
            Ok(Progress::Done { used }) => self.replied(used == bytes.len(), now),
            Err(error) => self.failed(now, |origin| CallError::invalid(origin, error)),
        }
    }

    fn replied(&mut self, clean: bool, now: Mono) -> Step {
        match std::mem::replace(&mut self.state, State::Idle { since: now }) {
            State::Exchanging { call, parser, .. } => {
                let response = parser.into_response();
                // A reply before the whole request was taken leaves the stream in an unknown state.
                let close = !clean || !response.keep_alive || !self.pending().is_empty();
                Step::Replied { call, response, close }
            }
            other => {
                self.state = other;
                Step::Wait
            }
        }
    }

    /// The call fails, unless another address of the name is left to be tried.
    fn failed(&mut self, now: Mono, error: impl FnOnce(&HostPort) -> CallError) -> Step {
        let reached = matches!(self.state, State::Exchanging { .. });
        match std::mem::replace(&mut self.state, State::Idle { since: now }) {
            State::Connecting { call, mut rest, .. } | State::Handshaking { call, mut rest, .. }
                if !rest.is_empty() && now < call.deadline =>
            {
                // What was begun with the last one is void.
                self.wire = Wire::Plain;
                self.pending.zeroize();
                self.sent = 0;
                let address = rest.remove(0);
                self.state = State::Connecting { call, since: now, rest };
                Step::Connect(address)
            }
            State::Resolving { call, .. }
            | State::Connecting { call, .. }
            | State::Handshaking { call, .. }
            | State::Exchanging { call, .. } => {
                let error = error(&self.origin);
                Step::Failed(call, if reached { error.reached() } else { error })
            }
            State::Idle { .. } => Step::Closed,
        }
    }

    /// The peer's bytes have come to a proper end: TLS's `close_notify`, or TCP's in plain HTTP.
    fn on_proper_end(&mut self, now: Mono) -> Step {
        if let Some(step) = self.dead_from_the_pool() {
            return step;
        }
        if let State::Exchanging { parser, .. } = &mut self.state
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

    /// A pooled connection that ended without a byte of reply was closed while nobody looked.
    fn dead_from_the_pool(&mut self) -> Option<Step> {
        match &self.state {
            State::Exchanging { reused: true, parser, .. } if !parser.started() => {
                self.take_call().map(Step::Again)
            }
            State::Idle { .. } => Some(Step::Closed),
            _ => None,
        }
    }

    fn broken(&mut self, why: &str, now: Mono) -> Step {
        let stage = self.stage();
        let truncated = matches!(&self.state, State::Exchanging { parser, .. } if parser.started());
        self.failed(now, |origin| {
            if truncated {
                CallError::invalid(origin, why)
            } else {
                CallError::unreachable(stage, origin, why)
            }
        })
    }

    fn tls_failed(&self, error: &TlsError) -> CallError {
        CallError::unreachable("TLS handshake with", &self.origin, error)
    }

    const fn stage(&self) -> &'static str {
        match self.state {
            State::Resolving { .. } => "resolve",
            State::Connecting { .. } => "connect",
            State::Handshaking { .. } => "TLS handshake with",
            State::Exchanging { .. } | State::Idle { .. } => "reply of",
        }
    }

    /// When [`Outbound::on_time`] is due.
    #[must_use]
    pub fn deadline(&self) -> Mono {
        let limits = self.service.timeouts();
        let (call, end) = match &self.state {
            State::Resolving { call, since } => (call, since.after(limits.resolve)),
            State::Connecting { call, since, .. } => (call, since.after(limits.connect)),
            State::Handshaking { call, since, .. } => (call, since.after(limits.handshake)),
            State::Exchanging { call, since, .. } => (call, since.after(limits.reply)),
            State::Idle { since } => return since.after(IDLE_LIFE),
        };
        end.min(call.deadline)
    }

    /// Its deadline has passed.
    pub fn on_time(&mut self, now: Mono) -> Step {
        let stage = self.stage();
        let since = match &self.state {
            State::Resolving { since, .. }
            | State::Connecting { since, .. }
            | State::Handshaking { since, .. }
            | State::Exchanging { since, .. }
            | State::Idle { since } => *since,
        };
        // Told as it was set, not with the tick's delay.
        let after_ms = u64::try_from(now.since(since).as_millis()).unwrap_or(u64::MAX) / 100 * 100;
        let error = |origin: &HostPort| CallError::timeout(stage, origin, Duration::from_millis(after_ms));
        match &self.state {
            State::Idle { .. } => Step::Closed,
            _ => self.failed(now, error),
        }
    }

    /// Says goodbye as far as TLS wants it; send what is pending, then close.
    pub fn say_goodbye(&mut self) {
        if let Wire::Tls(tls) = &mut self.wire {
            tls.close();
        }
        self.fill_pending();
    }

    fn take_call(&mut self) -> Option<Call> {
        match std::mem::replace(&mut self.state, State::Idle { since: Mono::default() }) {
            State::Resolving { call, .. }
            | State::Connecting { call, .. }
            | State::Handshaking { call, .. }
            | State::Exchanging { call, .. } => Some(call),
            State::Idle { since } => {
                self.state = State::Idle { since };
                None
            }
        }
    }
}

fn exchanging(call: Call, now: Mono, reused: bool) -> State {
    State::Exchanging { call, since: now, parser: Box::new(ResponseParser::new(REPLY_BYTES_MAX)), reused }
}
