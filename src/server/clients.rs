//! The clients' side of the loop: accept, read, ask, write, close.

use super::context::{Ctx, OUT_BYTES, filled, wipe};
use super::slab::Slab;
use crate::broker::gate::Denial;
use crate::broker::{Answer, ClientId, Disposition, Done, Visit};
use crate::buf::Full;
use crate::conn::inbound::{End, Inbound, Input, NotedRequest, PeerEnd, READ_BYTES, UNSENT_BYTES_MAX};
use crate::http::request::{Parsed, Request, asks_for_head, header_room, parse};
use crate::http::response::REPLY_BYTES_MAX;
use crate::http::write::Persistence;
use crate::log::{RateLimit, Reason, escape};
use crate::metrics::Connections;
use crate::net::{Net, Readiness, Token};
use crate::time::Mono;
use std::fmt;
use std::io;
use std::time::Duration;

/// Slots for connections past `MaxConn`: a request on one gets 429, unless it is `/ping`.
pub(super) const RESERVE_CONNECTIONS: usize = 16;
/// With no descriptor left, accepting pauses for this long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Unfinished heads together hold at most this much; past it the oldest go.
const HEAD_BYTES_IN_ALL_MAX: usize = 4 * 1024 * 1024;
/// Reads from one client, and connections accepted, in one tick, so that none keeps the others waiting.
const READS_MAX: usize = 4;
const ACCEPTS_MAX: usize = 256;
/// Pipelined requests are answered in batches of about this size, one a tick: with 800 clients that pipeline
/// without end, a tick is still some 20 ms.
const BATCH_BYTES: usize = 4 * 1024;
const _: () = assert!(BATCH_BYTES + REPLY_BYTES_MAX < OUT_BYTES);
// Replies before one that is still to come may be unsent when that is written, too.
const _: () = assert!(2 * OUT_BYTES <= UNSENT_BYTES_MAX);
/// Refused requests logged a second, and at once.
const REFUSALS_LOGGED: (u32, u32) = (5, 20);

const READABLE: Readiness = Readiness { readable: true, writable: false, read_closed: false, gone: false };

/// The clients' connections.
pub(super) struct Clients {
    slots: Slab<Inbound>,
    /// `MaxConn`.
    connections_max: usize,
    /// How many of the connections are past `MaxConn`.
    reserve_used: usize,
    /// What unfinished heads hold together; those of connections that are out of their slots are not counted.
    head_bytes: usize,
    accepting: Accepting,
    /// Clients that had more to read, or more requests to be answered, than one tick allows.
    unfinished: Vec<Token>,
    refusals: RateLimit,
    counted: Connections,
}

/// A connection that is out of its slot.
struct Client {
    token: Token,
    conn: Inbound,
}

/// Which listeners to accept from, and when.
struct Accepting {
    /// Listeners that may have a connection to accept.
    ready: Vec<bool>,
    /// With no descriptor left: when to accept again.
    paused_until: Mono,
    /// With no slot left: when to accept again, unless one is free before.
    room_at: Mono,
    /// When the newest connection was accepted.
    newest: Mono,
    failures: RateLimit,
}

impl Accepting {
    fn set_ready(&mut self, listener: usize, is_ready: bool) {
        if let Some(ready) = self.ready.get_mut(listener) {
            *ready = is_ready;
        }
    }

    fn is_due(&self, listener: usize, now: Mono) -> bool {
        self.ready.get(listener) == Some(&true) && now >= self.paused_until.max(self.room_at)
    }

    fn next(&self) -> Mono {
        if self.ready.contains(&true) { self.paused_until.max(self.room_at) } else { Mono::NEVER }
    }
}

impl Clients {
    /// Slots are numbered from `base`.
    pub(super) fn new(base: u32, connections_max: usize, listeners: usize, now: Mono) -> Clients {
        Clients {
            slots: Slab::new(base),
            connections_max,
            reserve_used: 0,
            head_bytes: 0,
            accepting: Accepting {
                // A listener may have connections before its first event.
                ready: vec![true; listeners],
                paused_until: now,
                room_at: now,
                newest: now,
                failures: RateLimit::new(1, 1),
            },
            unfinished: Vec::new(),
            refusals: RateLimit::new(REFUSALS_LOGGED.0, REFUSALS_LOGGED.1),
            counted: Connections::default(),
        }
    }

    /// Connections that are open now.
    pub(super) const fn len(&self) -> usize {
        self.slots.len()
    }

    /// When there is something to do without an event, connections' deadlines aside.
    pub(super) fn next_deadline(&self, now: Mono) -> Mono {
        let unfinished = if self.unfinished.is_empty() { Mono::NEVER } else { now };
        self.accepting.next().min(unfinished)
    }

    /// A listener has connections to accept.
    pub(super) fn on_acceptable(&mut self, listener: usize) {
        self.accepting.set_ready(listener, true);
    }

    /// Accepts what there is, as far as there is room.
    pub(super) fn accept_all(&mut self, ctx: &mut Ctx<impl Net>) {
        for listener in 0..self.accepting.ready.len() {
            let mut accepted = 0;
            while accepted < ACCEPTS_MAX && self.accepting.is_due(listener, ctx.now.mono) {
                if !self.has_room(ctx.now.mono) {
                    // Until one closes or falls idle, or a grace ends.
                    let graces = self.slots.iter().filter_map(|(_, conn)| conn.room());
                    self.accepting.room_at = graces.map(|(from, _)| from).min().unwrap_or(Mono::NEVER);
                    return;
                }
                let token = self.slots.reserve();
                match ctx.net.accept(listener, token) {
                    Ok(()) => {
                        accepted += 1;
                        self.welcome(ctx, token);
                    }
                    Err(error) => {
                        self.slots.vacate(token);
                        self.on_accept_error(ctx, listener, &error);
                    }
                }
            }
        }
    }

    fn has_room(&self, now: Mono) -> bool {
        self.slots.len() < self.connections_max + RESERVE_CONNECTIONS
            || self.slots.iter().any(|(_, conn)| conn.makes_room(now).is_some())
    }

    fn welcome(&mut self, ctx: &mut Ctx<impl Net>, token: Token) {
        self.counted.accepted += 1;
        // The newcomer has its slot already.
        let regular = self.slots.len() - 1 - self.reserve_used;
        let reserve = regular >= self.connections_max && !self.make_regular_room(ctx);
        self.reserve_used += usize::from(reserve);
        if self.slots.len() > self.connections_max + RESERVE_CONNECTIONS {
            self.make_room(ctx, |_| true);
        }
        // Many are accepted in one tick: each a little later than the one before, so that no two are equally old.
        let accepted = ctx.now.mono.max(self.accepting.newest.after(Duration::from_micros(1)));
        self.accepting.newest = accepted;
        let conn = Inbound::new(reserve, accepted);
        ctx.wake_at(conn.deadline());
        self.slots.put(token, conn);
    }

    fn on_accept_error(&mut self, ctx: &mut Ctx<impl Net>, listener: usize, error: &io::Error) {
        match error.kind() {
            io::ErrorKind::WouldBlock => self.accepting.set_ready(listener, false),
            // The client was gone before we came to it.
            io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted => {}
            _ => {
                self.counted.accept_failures += 1;
                // No descriptor or no memory: the connection stays in the backlog, and asking again at once
                // would only burn the core.
                if let Some(left_out) = self.accepting.failures.admit(ctx.now.mono) {
                    log::error!(
                        "the agent cannot accept a connection, and tries again: {}{left_out}",
                        Reason(error)
                    );
                }
                self.make_room(ctx, |_| true);
                self.accepting.paused_until = ctx.now.mono.after(ACCEPT_PAUSE);
            }
        }
    }

    /// Makes one of `MaxConn`'s slots free: one of the reserve would not let another request be served.
    fn make_regular_room(&mut self, ctx: &mut Ctx<impl Net>) -> bool {
        self.make_room(ctx, |conn| !conn.is_reserve())
    }

    /// Closes the connection that makes room most gladly of those that are `fitting`; `false`: all are busy.
    fn make_room(&mut self, ctx: &mut Ctx<impl Net>, fitting: impl Fn(&Inbound) -> bool) -> bool {
        let fitting = self.slots.iter().filter(|(_, conn)| fitting(conn));
        let gladly = fitting.filter_map(|(token, conn)| Some((conn.makes_room(ctx.now.mono)?, token)));
        let first = gladly.min_by_key(|(rank, _)| *rank);
        if let Some((_, token)) = first {
            self.counted.displaced += 1;
            self.close(ctx, token);
        }
        first.is_some()
    }

    /// Goes on with the clients that the last tick has not finished.
    pub(super) fn go_on_with_unfinished(&mut self, ctx: &mut Ctx<impl Net>) {
        for token in std::mem::take(&mut self.unfinished) {
            self.on_ready(ctx, token, READABLE);
        }
    }

    /// A client's socket is ready.
    pub(super) fn on_ready(&mut self, ctx: &mut Ctx<impl Net>, token: Token, ready: Readiness) {
        let Some(mut client) = self.take(token) else { return };
        if ready.read_closed {
            client.conn.on_peer_end(PeerEnd::Announced);
        }
        let mut open = !ready.gone;
        if open && ready.writable && client.conn.has_unsent() {
            open = client.send(ctx) && self.go_on(ctx, &mut client);
        } else if open && client.conn.can_go_on() {
            open = self.go_on(ctx, &mut client);
        }
        if open && ready.readable {
            open = self.read_all(ctx, &mut client);
        }
        self.settle(ctx, client, open);
    }

    /// Closes the connections whose deadline has come. They get no reply: it would not be the one to a request.
    pub(super) fn on_deadlines(&mut self, ctx: &mut Ctx<impl Net>) {
        for token in self.slots.due(ctx.now.mono, &mut ctx.deadline_floor, Inbound::deadline) {
            if let Some(client) = self.take(token) {
                // A client that lingers after its last reply has missed no deadline.
                self.counted.timed_out += u64::from(!client.conn.is_lingering());
                self.release(ctx, &client);
            }
        }
    }

    /// An answer for a client that waited.
    pub(super) fn deliver(&mut self, ctx: &mut Ctx<impl Net>, answer: &Answer) {
        let Some(mut client) = self.take(Token::from_bits(answer.client.0)) else { return };
        if !client.conn.is_waiting() {
            debug_assert!(false, "the broker answers a client once");
            return self.settle(ctx, client, true);
        }
        client.read_ahead(ctx);
        let is_last = client.conn.waits_for_its_last();
        let done = ctx.broker.write_answer(answer, is_last, ctx.now, &mut ctx.out);
        let closes = done.persistence == Persistence::Close;
        if let Some(request) = client.conn.on_reply(closes, ctx.broker.is_draining()) {
            self.log_request(ctx, format_args!("{}", request.shown), &done, request.since);
        }
        let open = client.send(ctx) && self.go_on(ctx, &mut client);
        self.settle(ctx, client, open);
    }

    /// No more connections; those at rest end now, the others after their reply.
    pub(super) fn drain(&mut self, ctx: &mut Ctx<impl Net>) {
        ctx.net.stop_listening();
        self.accepting.ready.clear();
        for token in self.slots.tokens(Inbound::is_at_rest) {
            // A request that has arrived and was not read yet is in flight too.
            self.on_ready(ctx, token, READABLE);
            if self.slots.get(token).is_some_and(Inbound::is_at_rest) {
                self.close(ctx, token);
            }
        }
    }

    /// Closes all connections.
    pub(super) fn close_all(&mut self, ctx: &mut Ctx<impl Net>) {
        for token in self.slots.tokens(|_| true) {
            self.close(ctx, token);
        }
    }

    /// Takes a connection out of its slot for a moment; [`Clients::settle`] brings it back.
    #[inline]
    fn take(&mut self, token: Token) -> Option<Client> {
        let client = Client { token, conn: self.slots.take(token)? };
        self.head_bytes -= client.conn.head_bytes();
        Some(client)
    }

    /// The connection goes back to its slot, or ends.
    fn settle(&mut self, ctx: &mut Ctx<impl Net>, client: Client, open: bool) {
        if !open {
            return self.release(ctx, &client);
        }
        let Client { token, conn } = client;
        ctx.wake_at(conn.deadline());
        if self.accepting.room_at > ctx.now.mono && conn.makes_room(ctx.now.mono).is_some() {
            self.accepting.room_at = ctx.now.mono;
        }
        if conn.can_go_on() {
            // Its replies went out whole, so no event will come for the rest of its requests.
            self.unfinished.push(token);
        }
        self.head_bytes += conn.head_bytes();
        self.slots.put(token, conn);
    }

    fn close(&mut self, ctx: &mut Ctx<impl Net>, token: Token) {
        if let Some(client) = self.take(token) {
            self.release(ctx, &client);
        }
    }

    /// Closes the socket of a connection that is out of its slot, and gives the slot up.
    fn release(&mut self, ctx: &mut Ctx<impl Net>, client: &Client) {
        if client.conn.is_waiting() {
            ctx.broker.left(client.id());
        }
        self.reserve_used -= usize::from(client.conn.is_reserve());
        ctx.net.close(client.token);
        self.slots.vacate(client.token);
        self.accepting.room_at = ctx.now.mono;
    }

    /// Reads until there is nothing more, or no more is wanted. `false`: the connection is at its end.
    fn read_all(&mut self, ctx: &mut Ctx<impl Net>, client: &mut Client) -> bool {
        for _ in 0..READS_MAX {
            if !client.conn.wants_bytes() {
                return !client.conn.is_done();
            }
            match ctx.read(client.token, READ_BYTES) {
                // A connection that is owed a reply is not read, so no reply is lost.
                Ok(0) => return false,
                Ok(count) => {
                    let drained = count < READ_BYTES;
                    if !self.on_bytes(ctx, client, count, drained) {
                        return false;
                    }
                    // A short read empties the socket; whatever comes later is a new edge, but for an end
                    // that was announced already.
                    if drained && client.conn.peer_end() == PeerEnd::Open {
                        return true;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        // Others have their turn before this one goes on.
        self.unfinished.push(client.token);
        true
    }

    /// `count` bytes of a client's lie in the scratch buffer. `drained`: no more are there now.
    fn on_bytes(
        &mut self,
        ctx: &mut Ctx<impl Net>,
        client: &mut Client,
        count: usize,
        drained: bool,
    ) -> bool {
        let mut scratch = std::mem::take(&mut ctx.scratch);
        let open = match client.conn.on_bytes(filled(&scratch, count), drained, ctx.now.mono) {
            Ok(Some(input)) => self.serve(ctx, client, &input),
            Ok(None) => true,
            Err(Full) => {
                debug_assert!(false, "a head and one read fit");
                false
            }
        };
        wipe(&mut scratch, count);
        ctx.scratch = scratch;
        open
    }

    /// Goes on with what the client has sent ahead, once its replies are out: one batch of it.
    fn go_on(&mut self, ctx: &mut Ctx<impl Net>, client: &mut Client) -> bool {
        if client.conn.can_go_on() {
            client.read_ahead(ctx);
            if let Some(input) = client.conn.go_on(ctx.now.mono)
                && !self.serve(ctx, client, &input)
            {
                return false;
            }
        }
        // The edge for what arrived meanwhile may be long past.
        self.read_all(ctx, client)
    }

    /// Answers the requests in `input`, sends the replies, and keeps what is left.
    fn serve(&mut self, ctx: &mut Ctx<impl Net>, client: &mut Client, input: &Input<'_>) -> bool {
        let (used, end) = self.answer_requests(ctx, client, input);
        client.conn.on_answered(input, used, end, ctx.now.mono);
        let open = client.send(ctx);
        self.limit_head_bytes(ctx, client.conn.head_bytes());
        open
    }

    /// Parses the requests, asks the broker, and writes its replies; gives how many bytes that took, and why it
    /// ended.
    fn answer_requests(
        &mut self,
        ctx: &mut Ctx<impl Net>,
        client: &mut Client,
        input: &Input<'_>,
    ) -> (usize, End) {
        debug_assert!(ctx.out.is_empty(), "another client's replies");
        let (bytes, mut used) = (input.bytes(), 0);
        loop {
            let rest = bytes.get(used..).unwrap_or_default();
            if rest.is_empty() {
                return (used, End::Drained);
            }
            if ctx.out.len() >= BATCH_BYTES {
                return (used, End::Batch);
            }
            let mut room = header_room();
            match parse(rest, &mut room) {
                Parsed::NeedMore => return (used, End::Unfinished),
                Parsed::Reject(reject) => {
                    let done = ctx.broker.reject(reject, asks_for_head(rest), ctx.now, &mut ctx.out);
                    self.log_request(ctx, format_args!("malformed request"), &done, ctx.now.mono);
                    return (used, End::Last { linger: true });
                }
                Parsed::Request(request, head_bytes) => {
                    used += head_bytes;
                    debug_assert!(used <= bytes.len());
                    let past_cap = client.conn.is_reserve() && !self.promote(ctx, &mut client.conn);
                    let (last, open) = (input.is_last && used == bytes.len(), self.slots.len());
                    let visit = Visit { last, past_cap, open, counted: &self.counted };
                    let asked = ctx.broker.ask(client.id(), &request, visit, ctx.now, &mut ctx.out);
                    if let Some(end) = self.on_asked(ctx, &request, asked, past_cap || used < bytes.len()) {
                        return (used, end);
                    }
                }
            }
        }
    }

    /// What the broker's decision means for the connection; `None`: its next request may come. `unread`: there may
    /// be bytes after this request.
    fn on_asked(
        &mut self,
        ctx: &Ctx<impl Net>,
        request: &Request<'_, '_>,
        asked: Disposition,
        unread: bool,
    ) -> Option<End> {
        match asked {
            Disposition::Waiting => {
                let is_logged = log::log_enabled!(log::Level::Debug);
                let shown = if is_logged { Shown(request).to_string() } else { String::new() };
                Some(End::Waiting(NotedRequest { shown: shown.into(), since: ctx.now.mono }))
            }
            Disposition::Answered(done) => {
                self.log_request(ctx, format_args!("{}", Shown(request)), &done, ctx.now.mono);
                // While the agent ends, the client cannot have known that this reply is the last: it may be sending.
                (done.persistence == Persistence::Close)
                    .then(|| End::Last { linger: unread || request.has_body || ctx.broker.is_draining() })
            }
        }
    }

    /// A client on a reserve slot moves to a regular one if there is room by now.
    fn promote(&mut self, ctx: &mut Ctx<impl Net>, conn: &mut Inbound) -> bool {
        let regular = self.slots.len() - self.reserve_used;
        let is_room = regular < self.connections_max || self.make_regular_room(ctx);
        if is_room {
            self.reserve_used -= 1;
            conn.promote();
        }
        is_room
    }

    /// The newest unfinished head takes `newest` bytes. Where all heads together hold too much, the oldest go.
    fn limit_head_bytes(&mut self, ctx: &mut Ctx<impl Net>, newest: usize) {
        while self.head_bytes + newest > HEAD_BYTES_IN_ALL_MAX {
            let heads = self.slots.iter().filter_map(|(token, conn)| Some((conn.unfinished_since()?, token)));
            let Some((_, token)) = heads.min_by_key(|(since, _)| *since) else { return };
            self.counted.displaced += 1;
            self.close(ctx, token);
        }
    }

    fn log_request(&mut self, ctx: &Ctx<impl Net>, shown: fmt::Arguments<'_>, done: &Done, since: Mono) {
        if let Some(Denial { status, code, message }) = &done.denial {
            if let Some(left_out) = self.refusals.admit(ctx.now.mono) {
                log::warn!("the agent refused {shown}: {status} {code}: {message}{left_out}");
            }
        } else if log::log_enabled!(log::Level::Debug) {
            let took_us = ctx.net.now().mono.since(since).as_micros();
            match done.x_cache {
                Some(x_cache) => log::debug!("{shown} {} {x_cache} {took_us} us", done.status),
                None => log::debug!("{shown} {} {took_us} us", done.status),
            }
        }
    }
}

impl Client {
    const fn id(&self) -> ClientId {
        ClientId(self.token.to_bits())
    }

    /// Reads on towards an end that an event has announced, as far as that is wanted.
    fn read_ahead(&mut self, ctx: &mut Ctx<impl Net>) {
        while self.conn.wants_end() {
            match ctx.read(self.token, READ_BYTES) {
                Ok(0) => self.conn.on_peer_end(PeerEnd::Read),
                Ok(count) => {
                    let kept = self.conn.on_bytes(filled(&ctx.scratch, count), false, ctx.now.mono);
                    debug_assert!(matches!(kept, Ok(None)), "requests that wait are not answered");
                    wipe(&mut ctx.scratch, count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    /// Sends what is unsent, then the replies that were written. `false`: the connection is at its end.
    fn send(&mut self, ctx: &mut Ctx<impl Net>) -> bool {
        let open = self.conn.send(&ctx.out, ctx.now.mono, |bytes| ctx.net.write(self.token, bytes));
        ctx.clear_out();
        if self.conn.is_lingering() {
            ctx.net.shutdown(self.token);
        }
        open
    }
}

/// A request as it is logged: method and path, of the query nothing but the secret's id.
struct Shown<'a>(&'a Request<'a, 'a>);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shown(request) = self;
        write!(f, "{} {}", escape(request.method), escape(request.path))?;
        let mut pairs = request.query.unwrap_or_default().split('&');
        match pairs.find_map(|pair| pair.strip_prefix("secretId=")) {
            Some(id) => write!(f, "?secretId={}", escape(id)),
            None => Ok(()),
        }
    }
}
