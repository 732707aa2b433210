//! The event loop, generic over [`Net`]: carries bytes between sockets, connections and the broker.
//!
//! A tick waits for events, reads the clock once, handles what came, does what is due, and writes the log.
//! Nothing here decides about requests or secrets; that is the broker's. The loop has two sides, `Clients` and
//! `Upstream`: neither sees the other, and both work with one `Ctx`.

mod clients;
mod context;
mod slab;
mod upstream;

use crate::broker::{Broker, Output};
use crate::net::{Event, Net, Signal};
use crate::secret::Secret;
use crate::time::Mono;
use clients::{Clients, RESERVE_CONNECTIONS};
use context::Ctx;
use rustls::ClientConfig;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use upstream::{OUTBOUND_SLOTS, Upstream};

/// Connections beside those of `MaxConn`: each needs a descriptor.
pub(crate) const OTHER_CONNECTIONS: usize = RESERVE_CONNECTIONS + OUTBOUND_SLOTS as usize;
/// The token is looked at again after this, when the loop wakes.
const TOKEN_AGE_MAX: Duration = Duration::from_millis(500);
/// How long requests in flight may take after SIGTERM.
const DRAIN_LIFE: Duration = Duration::from_secs(5);

/// What the process around the loop does for it.
pub trait Host {
    /// The token, if it is another one than before. Called at most every half second, and at SIGHUP.
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

/// The event loop.
pub struct Server<N> {
    ctx: Ctx<N>,
    clients: Clients,
    upstream: Upstream,
    host: Box<dyn Host>,
    token_seen: Mono,
    /// Set once SIGTERM came: when patience ends.
    drain_until: Option<Mono>,
}

impl<N: Net> Server<N> {
    /// A loop over `net` that serves `connections_max` clients at a time (`MaxConn`) with what `broker` decides.
    /// `tls`: for KMS; `None` speaks plain HTTP to it, which only the simulation does.
    #[must_use]
    pub fn new(
        net: N,
        broker: Broker,
        connections_max: usize,
        tls: Option<Arc<ClientConfig>>,
        host: Box<dyn Host>,
    ) -> Server<N> {
        let listeners = net.listeners();
        let ctx = Ctx::new(net, broker);
        let now = ctx.now.mono;
        Server {
            clients: Clients::new(OUTBOUND_SLOTS, connections_max, listeners, now),
            upstream: Upstream::new(tls),
            host,
            token_seen: now,
            drain_until: None,
            ctx,
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
        let timeout = (deadline != Mono::NEVER).then(|| deadline.since(self.ctx.net.now().mono));
        self.ctx.net.wait(timeout, events)?;
        self.ctx.now = self.ctx.net.now();
        let now = self.ctx.now.mono;
        // Also where no event came: an answer that a deadline brings lets its client's next request be served.
        if now.since(self.token_seen) >= TOKEN_AGE_MAX {
            self.see_token();
        }
        self.clients.go_on_with_unfinished(&mut self.ctx);
        for event in events.drain(..) {
            self.on_event(event);
        }
        self.clients.accept_all(&mut self.ctx);
        if now >= self.ctx.deadline_floor {
            self.ctx.deadline_floor = Mono::NEVER;
            self.clients.on_deadlines(&mut self.ctx);
            self.upstream.on_deadlines(&mut self.ctx);
        }
        self.carry_outputs();
        self.ctx.wipe_out();
        #[cfg(debug_assertions)]
        self.ctx.broker.check_invariants();
        self.host.on_tick_end();
        if now >= self.host.watchdog_due() {
            self.host.on_alive(now);
        }
        Ok(!self.ends())
    }

    /// The network, which the benches play themselves.
    pub fn net_mut(&mut self) -> &mut N {
        &mut self.ctx.net
    }

    /// Connections of clients that are open now.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.clients.len()
    }

    fn next_deadline(&self) -> Mono {
        let clients = self.clients.next_deadline(self.ctx.now.mono);
        let drained = self.drain_until.unwrap_or(Mono::NEVER);
        let due = [clients, self.ctx.broker.next_deadline(), drained, self.host.watchdog_due()];
        due.into_iter().fold(self.ctx.deadline_floor, Mono::min)
    }

    fn on_event(&mut self, event: Event) {
        let ctx = &mut self.ctx;
        match event {
            Event::Acceptable(listener) => self.clients.on_acceptable(listener),
            Event::Socket(token, ready) if token.slot < OUTBOUND_SLOTS => {
                self.upstream.on_ready(ctx, token, ready);
            }
            Event::Socket(token, ready) => self.clients.on_ready(ctx, token, ready),
            Event::Resolved { host, port, result } => self.upstream.on_resolved(ctx, &host, port, &result),
            Event::Signal(Signal::Terminate) => self.drain(),
            Event::Signal(Signal::Reload) => {
                log::info!("SIGHUP came: the agent reads the token and CaFile again and reopens the log");
                self.see_token();
                if let Some(tls) = self.host.on_reload() {
                    self.upstream.set_tls(&mut self.ctx, tls);
                }
            }
        }
    }

    /// Carries out what the broker wants, until it wants nothing more: what is due may bring answers, and an answer
    /// lets its client's next request be served.
    fn carry_outputs(&mut self) {
        let ctx = &mut self.ctx;
        loop {
            if ctx.now.mono >= ctx.broker.next_deadline() {
                ctx.broker.on_time(ctx.now.mono);
            }
            match ctx.broker.poll_output() {
                Some(Output::Call(call)) => self.upstream.start_call(ctx, call),
                Some(Output::Answer(answer)) => self.clients.deliver(ctx, &answer),
                None => return,
            }
        }
    }

    fn see_token(&mut self) {
        self.token_seen = self.ctx.now.mono;
        if let Some(token) = self.host.poll_token() {
            log::info!("the token has changed, and the old one does not work any more");
            self.ctx.broker.set_token(token);
        }
    }

    /// From now on no connection is accepted, and each ends with its next reply.
    fn drain(&mut self) {
        if self.drain_until.is_some() {
            return;
        }
        log::info!("the agent ends, and finishes what {} open connections wait for", self.clients.len());
        self.host.on_drain(self.clients.len());
        self.drain_until = Some(self.ctx.now.mono.after(DRAIN_LIFE));
        self.ctx.broker.drain();
        self.clients.drain(&mut self.ctx);
    }

    /// Ends the loop once it is drained: answers all clients that still wait with an error, and closes all
    /// connections. `false`: it goes on.
    fn ends(&mut self) -> bool {
        let Some(until) = self.drain_until else { return false };
        let ctx = &mut self.ctx;
        if ctx.now.mono < until && self.clients.len() > 0 {
            return false;
        }
        ctx.broker.give_up();
        while let Some(output) = ctx.broker.poll_output() {
            if let Output::Answer(answer) = output {
                self.clients.deliver(ctx, &answer);
            }
        }
        self.clients.close_all(ctx);
        self.upstream.close_all(ctx);
        true
    }
}
