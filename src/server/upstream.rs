//! The other side of the loop: connections to KMS and to whoever gives credentials.

use super::{Server, wipe};
use crate::call::{Call, Service};
use crate::conn::outbound::{Outbound, Step};
use crate::net::{Net, Readiness, Token};
use crate::time::Mono;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// Looked-up addresses are used again for so long; a failed connect forgets them at once.
const ADDRESSES_LIFE: Duration = Duration::from_secs(60);

/// The addresses of the last name looked up: KMS's, but for the rare call to STS.
#[derive(Debug, Default)]
pub(super) struct Addresses {
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

impl<N: Net> Server<N> {
    /// Puts a call on an idle connection, or makes one for it.
    pub(super) fn start_call(&mut self, call: Call) {
        let idle = self.outbound.iter().find(|(_, conn)| conn.is_idle_for(&call)).map(|(token, _)| token);
        if let Some(token) = idle
            && let Some(mut conn) = self.outbound.take(token)
        {
            conn.reuse(call, self.now.mono);
            return self.carry(token, conn, Step::SendRequest);
        }
        self.start_fresh(call);
    }

    fn start_fresh(&mut self, call: Call) {
        let (host, port) = (call.origin.host.clone(), call.origin.port);
        let token = self.outbound.reserve();
        let mut conn = Outbound::new(call, self.now.mono);
        if let Some(addresses) = self.addresses.of(&host, port, self.now.mono) {
            let step = conn.on_resolved(&Ok(addresses), self.now.mono);
            return self.carry(token, conn, step);
        }
        if !self.addresses.asked.iter().any(|(name, at)| *name == host && *at == port) {
            self.net.resolve(&host, port);
            self.addresses.asked.push((host, port));
        }
        self.carry(token, conn, Step::Wait);
    }

    /// A name was looked up: all that wait for it go on.
    pub(super) fn on_resolved(&mut self, host: &str, port: u16, result: Result<Vec<SocketAddr>, String>) {
        self.addresses.asked.retain(|(name, at)| name != host || *at != port);
        if let Ok(found) = &result {
            let until = self.now.mono.after(ADDRESSES_LIFE);
            let asked = std::mem::take(&mut self.addresses.asked);
            self.addresses = Addresses { host: host.to_owned(), port, found: found.clone(), until, asked };
        }
        let waiting = self.outbound.iter().filter(|(_, conn)| conn.is_resolving(host, port));
        let waiting: Vec<Token> = waiting.map(|(token, _)| token).collect();
        for token in waiting {
            if let Some(mut conn) = self.outbound.take(token) {
                let step = conn.on_resolved(&result, self.now.mono);
                self.carry(token, conn, step);
            }
        }
    }

    /// An upstream socket is ready.
    pub(super) fn on_outbound(&mut self, token: Token, ready: Readiness) {
        let Some(mut conn) = self.outbound.take(token) else { return };
        let mut step = Step::Wait;
        let was_connecting = conn.is_connecting();
        if was_connecting {
            step = match self.net.connected(token) {
                Ok(()) => {
                    let tls = self.tls.clone().filter(|_| conn.service().uses_tls());
                    conn.on_connected(tls, self.now.mono)
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Step::Wait,
                Err(error) => {
                    self.addresses.forget();
                    conn.on_connect_failed(&error, self.now.mono)
                }
            };
        }
        if was_connecting && matches!(step, Step::SendRequest) {
            step = self.write_request(&mut conn);
        }
        // A peer may talk or leave as soon as it is connected: the edge for that may be this very event.
        if ready.readable && !conn.is_connecting() && matches!(step, Step::Wait) {
            // Replies before writes: what the peer said last explains why it takes no more.
            step = self.read_outbound(token, &mut conn, ready.read_closed);
        }
        self.carry(token, conn, step);
    }

    /// `read_closed`: an event has told of the peer's end, so no other will.
    fn read_outbound(&mut self, token: Token, conn: &mut Outbound, read_closed: bool) -> Step {
        loop {
            match self.net.read(token, &mut self.scratch) {
                Ok(0) => return conn.on_end(None, self.now.mono),
                Ok(count) => {
                    let bytes = self.scratch.get(..count).unwrap_or_default();
                    let step = conn.on_bytes(bytes, self.now.mono);
                    // From the metadata service they are credentials in the clear.
                    wipe(&mut self.scratch, count);
                    match step {
                        Step::Wait => {}
                        // The request's own replies come with an edge of their own, unless they are here.
                        Step::SendRequest => match self.write_request(conn) {
                            Step::Wait => {}
                            step => return step,
                        },
                        Step::Replied { call, response, close } => {
                            // An end that was told of, or bytes that were not read, would never show again.
                            let unread = read_closed || count == self.scratch.len();
                            return Step::Replied { call, response, close: close || unread };
                        }
                        step => return step,
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Step::Wait,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return conn.on_end(Some(&error), self.now.mono),
            }
        }
    }

    /// Does what a connection's step asks for, and puts it back or ends it.
    fn carry(&mut self, mut token: Token, mut conn: Outbound, mut step: Step) {
        loop {
            step = match step {
                Step::Wait => match self.flush_outbound(token, &mut conn) {
                    Ok(()) => {
                        self.deadline_floor = self.deadline_floor.min(conn.deadline());
                        return self.outbound.put(token, conn);
                    }
                    Err(error) => conn.on_end(Some(&error), self.now.mono),
                },
                Step::Connect(address) => {
                    self.net.close(token);
                    token = self.outbound.renew(token);
                    match self.net.connect(token, address) {
                        Ok(()) => Step::Wait,
                        Err(error) => {
                            self.addresses.forget();
                            conn.on_connect_failed(&error, self.now.mono)
                        }
                    }
                }
                Step::SendRequest => self.write_request(&mut conn),
                Step::Replied { call, response, close } => {
                    self.broker.on_called(call.id, Ok(response), self.now);
                    if close { Step::Closed } else { Step::Wait }
                }
                Step::Failed(call, error) => {
                    // The next try looks the name up anew: the failure may be the address's.
                    self.addresses.forget();
                    self.end_outbound(token, conn);
                    if error.reached {
                        // What cut this one off may have cut off those that rest: the next try gets a fresh one.
                        self.close_idle(call.service);
                    }
                    return self.broker.on_called(call.id, Err(error), self.now);
                }
                Step::Again(call) => {
                    self.end_outbound(token, conn);
                    return self.start_fresh(call);
                }
                Step::Closed => return self.end_outbound(token, conn),
            };
        }
    }

    fn write_request(&mut self, conn: &mut Outbound) -> Step {
        conn.request(|call, out| self.broker.write_request(call, self.now, out))
    }

    fn flush_outbound(&mut self, token: Token, conn: &mut Outbound) -> io::Result<()> {
        while !conn.is_connecting() && !conn.pending().is_empty() {
            match self.net.write(token, conn.pending()) {
                Ok(count) => conn.on_sent(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    pub(super) fn on_outbound_time(&mut self, token: Token) {
        if let Some(mut conn) = self.outbound.take(token) {
            let step = conn.on_time(self.now.mono);
            if matches!(step, Step::Connect(_)) {
                self.addresses.forget();
            }
            self.carry(token, conn, step);
        }
    }

    /// Ends the connections to `service` that nothing is under way on.
    pub(super) fn close_idle(&mut self, service: Service) {
        let idle = self.outbound.iter().filter(|(_, conn)| conn.is_idle() && conn.service() == service);
        let tokens: Vec<Token> = idle.map(|(token, _)| token).collect();
        for token in tokens {
            self.close_outbound(token);
        }
    }

    pub(super) fn close_outbound(&mut self, token: Token) {
        if let Some(conn) = self.outbound.take(token) {
            self.end_outbound(token, conn);
        }
    }

    fn end_outbound(&mut self, token: Token, mut conn: Outbound) {
        conn.say_goodbye();
        // One attempt: whether the peer hears it changes nothing.
        let _ = self.flush_outbound(token, &mut conn);
        self.net.close(token);
        self.outbound.vacate(token);
    }
}
