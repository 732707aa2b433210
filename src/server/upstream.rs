//! The other side of the loop: connections to KMS and to the services that give credentials.

use super::context::{Ctx, SCRATCH_BYTES, filled, wipe};
use super::slab::Slab;
use crate::broker::UPSTREAM_CALLS_MAX;
use crate::call::{Call, Service};
use crate::conn::outbound::{Outbound, Step};
use crate::net::{Net, Readiness, Token};
use crate::time::Mono;
use rustls::ClientConfig;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// Upstream connections have the slots below this, clients those from there on.
pub(super) const OUTBOUND_SLOTS: u32 = 16;
/// The metadata service, STS and the credentials URI are asked one call at a time, and each may have an idle
/// connection.
const CREDENTIAL_CONNECTIONS_MAX: usize = 3;
const _: () = assert!(UPSTREAM_CALLS_MAX + CREDENTIAL_CONNECTIONS_MAX <= OUTBOUND_SLOTS as usize);
/// Looked-up addresses are used again for so long; a failed connect forgets them at once.
const ADDRESSES_LIFE: Duration = Duration::from_secs(60);

/// The addresses of the last name looked up: KMS's, but for the rare call to STS.
#[derive(Debug, Default)]
struct Addresses {
    host: String,
    port: u16,
    found: Vec<SocketAddr>,
    until: Mono,
    /// Names that the resolver has not answered yet: while it hangs it is asked once.
    asked: Vec<(String, u16)>,
}

impl Addresses {
    fn of(&self, host: &str, port: u16, now: Mono) -> Option<Vec<SocketAddr>> {
        if let Ok(address) = host.parse::<IpAddr>() {
            return Some(vec![SocketAddr::new(address, port)]);
        }
        let known = self.host == host && self.port == port && now < self.until && !self.found.is_empty();
        known.then(|| self.found.clone())
    }

    fn forget(&mut self) {
        self.found.clear();
    }
}

/// The connections to KMS and to the services that give credentials.
pub(super) struct Upstream {
    slots: Slab<Outbound>,
    addresses: Addresses,
    /// `None` speaks plain HTTP, also where TLS belongs.
    tls: Option<Arc<ClientConfig>>,
}

impl Upstream {
    pub(super) fn new(tls: Option<Arc<ClientConfig>>) -> Upstream {
        Upstream { slots: Slab::new(0), addresses: Addresses::default(), tls }
    }

    /// Puts a call on an idle connection, or makes one for it.
    pub(super) fn start_call(&mut self, ctx: &mut Ctx<impl Net>, call: Call) {
        let idle = self.slots.iter().find(|(_, conn)| conn.is_idle_for(&call)).map(|(token, _)| token);
        if let Some(token) = idle
            && let Some(mut conn) = self.slots.take(token)
        {
            conn.reuse(call, ctx.now.mono);
            return self.carry(ctx, token, conn, Step::SendRequest);
        }
        self.start_fresh(ctx, call);
    }

    fn start_fresh(&mut self, ctx: &mut Ctx<impl Net>, call: Call) {
        let (host, port) = (call.origin.host.clone(), call.origin.port);
        let token = self.slots.reserve();
        debug_assert!(token.slot < OUTBOUND_SLOTS, "it has the number of a client's slot");
        let mut conn = Outbound::new(call, ctx.now.mono);
        if let Some(addresses) = self.addresses.of(&host, port, ctx.now.mono) {
            let step = conn.on_resolved(&Ok(addresses), ctx.now.mono);
            return self.carry(ctx, token, conn, step);
        }
        if !self.addresses.asked.iter().any(|(name, at)| *name == host && *at == port) {
            ctx.net.resolve(&host, port);
            self.addresses.asked.push((host, port));
        }
        self.carry(ctx, token, conn, Step::Wait);
    }

    /// A name was looked up: all that wait for it go on.
    pub(super) fn on_resolved(
        &mut self,
        ctx: &mut Ctx<impl Net>,
        host: &str,
        port: u16,
        result: &Result<Vec<SocketAddr>, String>,
    ) {
        self.addresses.asked.retain(|(name, at)| name != host || *at != port);
        if let Ok(found) = result {
            let until = ctx.now.mono.after(ADDRESSES_LIFE);
            let asked = std::mem::take(&mut self.addresses.asked);
            self.addresses = Addresses { host: host.to_owned(), port, found: found.clone(), until, asked };
        }
        for token in self.slots.tokens(|conn| conn.is_resolving(host, port)) {
            if let Some(mut conn) = self.slots.take(token) {
                let step = conn.on_resolved(result, ctx.now.mono);
                self.carry(ctx, token, conn, step);
            }
        }
    }

    /// A socket is ready.
    pub(super) fn on_ready(&mut self, ctx: &mut Ctx<impl Net>, token: Token, ready: Readiness) {
        let Some(mut conn) = self.slots.take(token) else { return };
        let mut step = Step::Wait;
        if conn.is_connecting() {
            step = match ctx.net.connected(token) {
                Ok(()) => {
                    let tls = self.tls.clone().filter(|_| conn.service().uses_tls());
                    conn.on_connected(tls, ctx.now.mono)
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Step::Wait,
                Err(error) => self.on_connect_failed(ctx, &mut conn, &error),
            };
            if matches!(step, Step::SendRequest) {
                step = write_request(ctx, &mut conn);
            }
        }
        // A peer may talk or leave as soon as it is connected: the edge for that may be this very event.
        if ready.readable && !conn.is_connecting() && matches!(step, Step::Wait) {
            // Replies before writes: what the peer said last explains why it takes no more.
            step = read(ctx, token, &mut conn, ready.read_closed);
        }
        self.carry(ctx, token, conn, step);
    }

    fn on_connect_failed(&mut self, ctx: &Ctx<impl Net>, conn: &mut Outbound, error: &io::Error) -> Step {
        self.addresses.forget();
        conn.on_connect_failed(error, ctx.now.mono)
    }

    /// Does what a connection's step asks for, and puts it back or ends it.
    fn carry(&mut self, ctx: &mut Ctx<impl Net>, mut token: Token, mut conn: Outbound, mut step: Step) {
        loop {
            step = match step {
                Step::Wait => match flush(ctx, token, &mut conn) {
                    Ok(()) => {
                        ctx.wake_at(conn.deadline());
                        return self.slots.put(token, conn);
                    }
                    Err(error) => conn.on_end(Some(&error), ctx.now.mono),
                },
                Step::Connect(address) => {
                    ctx.net.close(token);
                    token = self.slots.renew(token);
                    let begun = ctx.net.connect(token, address);
                    begun.map_or_else(|error| self.on_connect_failed(ctx, &mut conn, &error), |()| Step::Wait)
                }
                Step::SendRequest => write_request(ctx, &mut conn),
                Step::Replied { call, response, close } => {
                    ctx.broker.on_called(call.id, Ok(response), ctx.now);
                    if close { Step::Closed } else { Step::Wait }
                }
                Step::Failed(call, error) => {
                    // The next try looks the name up again, since the address may be what failed.
                    self.addresses.forget();
                    self.end(ctx, token, conn);
                    if error.reached {
                        // What cut this one off may have cut off the idle ones: the next try gets a fresh one.
                        self.close_idle(ctx, call.service);
                    }
                    return ctx.broker.on_called(call.id, Err(error), ctx.now);
                }
                Step::Again(call) => {
                    self.end(ctx, token, conn);
                    return self.start_fresh(ctx, call);
                }
                Step::Closed => return self.end(ctx, token, conn),
            };
        }
    }

    /// Times out the connections whose deadline has come.
    pub(super) fn on_deadlines(&mut self, ctx: &mut Ctx<impl Net>) {
        for token in self.slots.due(ctx.now.mono, &mut ctx.deadline_floor, Outbound::deadline) {
            if let Some(mut conn) = self.slots.take(token) {
                let step = conn.on_time(ctx.now.mono);
                if matches!(step, Step::Connect(_)) {
                    self.addresses.forget();
                }
                self.carry(ctx, token, conn, step);
            }
        }
    }

    /// From now on connections are made with `tls`, and what the old roots vouched for is not used again.
    pub(super) fn set_tls(&mut self, ctx: &mut Ctx<impl Net>, tls: Arc<ClientConfig>) {
        self.tls = Some(tls);
        self.close_idle(ctx, Service::Kms);
    }

    /// Closes the connections to `service` that nothing is under way on.
    fn close_idle(&mut self, ctx: &mut Ctx<impl Net>, service: Service) {
        self.close(ctx, |conn| conn.is_idle() && conn.service() == service);
    }

    /// Closes all connections.
    pub(super) fn close_all(&mut self, ctx: &mut Ctx<impl Net>) {
        self.close(ctx, |_| true);
    }

    fn close(&mut self, ctx: &mut Ctx<impl Net>, which: impl Fn(&Outbound) -> bool) {
        for token in self.slots.tokens(which) {
            if let Some(conn) = self.slots.take(token) {
                self.end(ctx, token, conn);
            }
        }
    }

    fn end(&mut self, ctx: &mut Ctx<impl Net>, token: Token, mut conn: Outbound) {
        conn.say_goodbye();
        // One attempt: whether the peer hears it changes nothing.
        let _ = flush(ctx, token, &mut conn);
        ctx.net.close(token);
        self.slots.vacate(token);
    }
}

/// `read_closed`: an event has announced the peer's end, so no other will.
fn read(ctx: &mut Ctx<impl Net>, token: Token, conn: &mut Outbound, read_closed: bool) -> Step {
    loop {
        let count = match ctx.read(token, SCRATCH_BYTES) {
            Ok(0) => return conn.on_end(None, ctx.now.mono),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Step::Wait,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return conn.on_end(Some(&error), ctx.now.mono),
        };
        let step = match conn.on_bytes(filled(&ctx.scratch, count), ctx.now.mono) {
            // The request's own replies come with an edge of their own, unless they are here.
            Step::SendRequest => write_request(ctx, conn),
            step => step,
        };
        // From the metadata service they are credentials in the clear.
        wipe(&mut ctx.scratch, count);
        match step {
            Step::Wait => {}
            Step::Replied { call, response, close } => {
                // An end that was announced, or bytes that were not read, would never show again.
                let unread = read_closed || count == SCRATCH_BYTES;
                return Step::Replied { call, response, close: close || unread };
            }
            step => return step,
        }
    }
}

fn write_request(ctx: &mut Ctx<impl Net>, conn: &mut Outbound) -> Step {
    conn.request(|call, out| ctx.broker.write_request(call, ctx.now, out))
}

fn flush(ctx: &mut Ctx<impl Net>, token: Token, conn: &mut Outbound) -> io::Result<()> {
    while !conn.is_connecting() && !conn.pending().is_empty() {
        match ctx.net.write(token, conn.pending()) {
            Ok(count) => conn.on_sent(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
