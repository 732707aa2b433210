//! The event loop, generic over [`Net`]: carries bytes between sockets, connections and the broker.
//!
//! A tick waits for events, reads the clock once, handles what came, does what is due, and writes the log.
//! Nothing here decides about requests or secrets; that is the broker's.

mod clients;
mod slab;
mod upstream;

use crate::broker::{Broker, Output};
use crate::call::Service;
use crate::conn::inbound::{Inbound, READ_BYTES, State};
use crate::conn::outbound::Outbound;
use crate::log::RateLimit;
use crate::metrics::Connections;
use crate::net::{Event, Net, Readiness, Signal, Token};
use crate::secret::Secret;
use crate::time::{Mono, Now};
use rustls::ClientConfig;
use slab::Slab;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Slots for clients past `MaxConn`, who are told so or may `/ping`.
const RESERVE_CONNECTIONS: usize = 16;
/// Outbound slots come first: KMS's connections, and the metadata service's.
const OUTBOUND_SLOTS: u32 = 16;
/// The token is looked at again after this, when the loop wakes.
const TOKEN_AGE_MAX: Duration = Duration::from_millis(500);
/// With no descriptor left, accepting pauses for this long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long requests in flight may take after SIGTERM.
const DRAIN_LIFE: Duration = Duration::from_secs(5);
/// Bytes read from KMS and the metadata service in one go; clients' are fewer.
const SCRATCH_BYTES: usize = 32 * 1024;
const _: () = assert!(READ_BYTES <= SCRATCH_BYTES);
/// The scratch for replies: a batch and the largest reply fit, so that it never grows and leaves a copy
/// behind that nobody wipes. Memory is only taken for what is used of it.
const OUT_BYTES: usize = 256 * 1024;
/// Refused requests logged a second, and at once.
const REFUSALS_LOGGED: (u32, u32) = (5, 20);

/// What the process around the loop does for it.
pub trait Host {
    /// The token, if it is another one than before. Called at SIGHUP, and otherwise at most every half second.
    fn poll_token(&mut self) -> Option<Secret>;
    /// A tick ends: what was logged may be written now.
    fn on_tick_end(&mut self);
    /// SIGHUP came: reopen the log, and read the files again that TLS trusts. Gives what TLS uses from now on, or
    /// `None` to leave it as it is.
    fn on_reload(&mut self) -> Option<Arc<ClientConfig>>;
    /// SIGTERM or SIGINT came for the first time, with this many client connections open.
    fn on_drain(&mut self, _connections: usize) {}
    /// When [`Host::on_alive`] is to be called; [`Mono::NEVER`] where no watchdog is set.
    fn watchdog_due(&self) -> Mono {
        Mono::NEVER
    }
    /// The loop is alive after [`Host::watchdog_due`].
    fn on_alive(&mut self, _now: Mono) {}
}

/// What the loop is made of.
pub struct Parts<N> {
    /// Sockets and clocks.
    pub net: N,
    /// The decisions.
    pub broker: Broker,
    /// `MaxConn`.
    pub connections_max: usize,
    /// TLS for KMS; `None` speaks plain HTTP to it, which only the simulation does.
    pub tls: Option<Arc<ClientConfig>>,
    /// The process around the loop.
    pub host: Box<dyn Host>,
}

/// The loop.
pub struct Server<N> {
    net: N,
    broker: Broker,
    connections_max: usize,
    tls: Option<Arc<ClientConfig>>,
    host: Box<dyn Host>,
    now: Now,
    token_seen: Mono,
    inbound: Slab<Inbound>,
    /// What unfinished heads hold together; those taken out of their slots are not counted.
    head_bytes: usize,
    /// How many of the inbound connections are past `MaxConn`.
    reserve_used: usize,
    outbound: Slab<Outbound>,
    addresses: upstream::Addresses,
    /// Listeners that may have a connection to accept.
    acceptable: Vec<bool>,
    /// When the newest connection was accepted.
    last_accepted: Mono,
    /// With no descriptor left: when to accept again.
    accept_at: Mono,
    /// With no slot left: when to accept again, unless one is free before.
    room_at: Mono,
    /// Clients that had more to read than one tick allows.
    unfinished: Vec<(Token, Readiness)>,
    /// No connection's deadline lies before this.
    deadline_floor: Mono,
    /// Bytes are read into this, whoever sends them, and wiped from it after.
    scratch: Box<[u8]>,
    /// Replies are written into this before they go out, and wiped from it at the end of the tick.
    out: Vec<u8>,
    /// So much of it was written to in this tick.
    out_used: usize,
    refusals: RateLimit,
    accept_failures: RateLimit,
    counted: Connections,
    /// Set once SIGTERM came: when patience ends.
    drain_until: Option<Mono>,
}

impl<N: Net> Server<N> {
    /// Ready to run.
    #[must_use]
    pub fn new(parts: Parts<N>) -> Server<N> {
        let now = parts.net.now();
        Server {
            // A listener may have connections before its first event.
            acceptable: vec![true; parts.net.listeners()],
            net: parts.net,
            broker: parts.broker,
            connections_max: parts.connections_max,
            tls: parts.tls,
            host: parts.host,
            now,
            token_seen: now.mono,
            inbound: Slab::new(OUTBOUND_SLOTS),
            head_bytes: 0,
            reserve_used: 0,
            outbound: Slab::new(0),
            addresses: upstream::Addresses::default(),
            last_accepted: now.mono,
            accept_at: now.mono,
            room_at: now.mono,
            unfinished: Vec::new(),
            deadline_floor: Mono::NEVER,
            scratch: vec![0; SCRATCH_BYTES].into_boxed_slice(),
            out: Vec::with_capacity(OUT_BYTES),
            out_used: 0,
            refusals: RateLimit::new(REFUSALS_LOGGED.0, REFUSALS_LOGGED.1),
            accept_failures: RateLimit::new(1, 1),
            counted: Connections::default(),
            drain_until: None,
        }
    }

    /// Serves until SIGTERM or SIGINT, and what is in flight then.
    ///
    /// # Errors
    /// When waiting for events fails.
    pub fn run(&mut self) -> io::Result<()> {
        let mut events = Vec::new();
        while self.tick(&mut events)? {}
        Ok(())
    }

    /// One round of the loop; `false`: it was the last.
    ///
    /// # Errors
    /// When waiting for events fails.
    pub fn tick(&mut self, events: &mut Vec<Event>) -> io::Result<bool> {
        let deadline = self.next_deadline();
        let timeout = (deadline != Mono::NEVER).then(|| deadline.since(self.net.now().mono));
        self.net.wait(timeout, events)?;
        self.now = self.net.now();
        // Without an event too: a deadline's answer may free a client to ask on.
        if self.now.mono.since(self.token_seen) >= TOKEN_AGE_MAX {
            self.see_token();
        }
        for (token, ready) in std::mem::take(&mut self.unfinished) {
            self.on_inbound(token, ready);
        }
        for event in events.drain(..) {
            self.on_event(event);
        }
        self.accept_all();
        if self.now.mono >= self.deadline_floor {
            self.on_deadlines();
        }
        // What is due may bring answers, answers may free clients to ask on, and so forth.
        loop {
            if self.now.mono >= self.broker.next_deadline() {
                self.broker.on_time(self.now.mono);
            }
            match self.broker.poll_output() {
                Some(Output::Call(call)) => self.start_call(call),
                Some(Output::Answer(answer)) => self.deliver(&answer),
                None => break,
            }
        }
        self.wipe_out();
        #[cfg(debug_assertions)]
        self.broker.check_invariants();
        self.host.on_tick_end();
        if self.now.mono >= self.host.watchdog_due() {
            self.host.on_alive(self.now.mono);
        }
        Ok(!self.is_done())
    }

    /// The network, for whoever plays it: the benches.
    pub fn net_mut(&mut self) -> &mut N {
        &mut self.net
    }

    /// Connections of clients that are open now.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.inbound.len()
    }

    fn next_deadline(&self) -> Mono {
        if !self.unfinished.is_empty() {
            return self.now.mono;
        }
        let accepts = self.acceptable.contains(&true);
        let accept = if accepts { self.accept_at.max(self.room_at) } else { Mono::NEVER };
        let drained = self.drain_until.unwrap_or(Mono::NEVER);
        let alive = self.host.watchdog_due();
        self.deadline_floor.min(self.broker.next_deadline()).min(accept).min(drained).min(alive)
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Acceptable(listener) => {
                if let Some(flag) = self.acceptable.get_mut(listener) {
                    *flag = true;
                }
            }
            Event::Socket(token, ready) if token.slot < OUTBOUND_SLOTS => self.on_outbound(token, ready),
            Event::Socket(token, ready) => self.on_inbound(token, ready),
            Event::Resolved { host, port, result } => self.on_resolved(&host, port, result),
            Event::Signal(Signal::Terminate) => self.drain(),
            Event::Signal(Signal::Reload) => {
                log::info!("SIGHUP: reading the token and CaFile again, reopening the log");
                self.see_token();
                if let Some(tls) = self.host.on_reload() {
                    self.tls = Some(tls);
                    // What the old roots vouched for is not used again.
                    self.close_idle(Service::Kms);
                }
            }
        }
    }

    fn see_token(&mut self) {
        self.token_seen = self.now.mono;
        if let Some(token) = self.host.poll_token() {
            log::info!("the token has changed; the old one stops working");
            self.broker.set_token(token);
        }
    }

    /// No more connections; those that are idle end now, the others after their reply.
    fn drain(&mut self) {
        if self.drain_until.is_some() {
            return;
        }
        log::info!("ending: finishing {} connections", self.inbound.len());
        self.host.on_drain(self.inbound.len());
        self.drain_until = Some(self.now.mono.after(DRAIN_LIFE));
        self.net.stop_listening();
        self.acceptable.clear();
        self.broker.drain();
        let idle = |conn: &Inbound| matches!(conn.state, State::Idle) && conn.unsent.is_none();
        let tokens: Vec<Token> =
            self.inbound.iter().filter(|(_, conn)| idle(conn)).map(|(it, _)| it).collect();
        for token in tokens {
            // A request that has arrived and was not read yet is in flight too.
            self.on_inbound(token, Readiness { readable: true, ..Readiness::default() });
            if self.inbound.get(token).is_some_and(idle) {
                self.close_inbound(token);
            }
        }
    }

    fn is_done(&mut self) -> bool {
        let Some(until) = self.drain_until else { return false };
        if self.now.mono < until && self.inbound.len() > 0 {
            return false;
        }
        self.broker.give_up();
        while let Some(output) = self.broker.poll_output() {
            if let Output::Answer(answer) = output {
                self.deliver(&answer);
            }
        }
        let inbound: Vec<Token> = self.inbound.iter().map(|(token, _)| token).collect();
        for token in inbound {
            self.close_inbound(token);
        }
        let outbound: Vec<Token> = self.outbound.iter().map(|(token, _)| token).collect();
        for token in outbound {
            self.close_outbound(token);
        }
        true
    }

    fn on_deadlines(&mut self) {
        let now = self.now.mono;
        let (clients, clients_next) = due(&self.inbound, Inbound::deadline, now);
        let (upstream, upstream_next) = due(&self.outbound, Outbound::deadline, now);
        self.deadline_floor = clients_next.min(upstream_next);
        for token in clients {
            // After the last reply the end of the wait is nobody's fault.
            let lingers =
                self.inbound.get(token).is_some_and(|conn| matches!(conn.state, State::Lingering { .. }));
            self.counted.timed_out += u64::from(!lingers);
            // A client that broke its deadline gets no reply: it would not be the one to a request.
            self.close_inbound(token);
        }
        for token in upstream {
            self.on_outbound_time(token);
        }
    }
}

/// Wipes what was read into the scratch. It outlives every request, so the compiler cannot leave this out.
fn wipe(scratch: &mut [u8], count: usize) {
    if let Some(used) = scratch.get_mut(..count) {
        used.fill(0);
    }
}

/// The connections whose deadline has come, and the earliest of the others' deadlines.
fn due<T>(slab: &Slab<T>, deadline: impl Fn(&T) -> Mono, now: Mono) -> (Vec<Token>, Mono) {
    let (mut due, mut next) = (Vec::new(), Mono::NEVER);
    for (token, conn) in slab.iter() {
        let deadline = deadline(conn);
        if now >= deadline {
            due.push(token);
        } else {
            next = next.min(deadline);
        }
    }
    (due, next)
}
