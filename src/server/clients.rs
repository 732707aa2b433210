//! The clients' side of the loop: accept, read, ask, write, close.

use super::{ACCEPT_PAUSE, RESERVE_CONNECTIONS, Server, wipe};
use crate::broker::{Answer, ClientId, Disposition, Done, Visit};
use crate::buf::Buf;
use crate::conn::inbound::{HEAD_LIFE, Inbound, LINGER_LIFE, Pending, READ_BYTES, State};
use crate::http::request::{Parsed, Request, asks_for_head, header_room, parse};
use crate::http::write::Persistence;
use crate::log::{Reason, escape};
use crate::net::{Net, Readiness, Token};
use crate::time::Mono;
use std::fmt;
use std::io;
use std::time::Duration;
use zeroize::Zeroize as _;

/// Unfinished heads together hold at most this much; past it the oldest go.
const HEAD_BYTES_IN_ALL_MAX: usize = 4 * 1024 * 1024;
/// Reads from one client, and connections accepted, in one tick: nobody keeps the others waiting.
const READS_MAX: usize = 4;
const ACCEPTS_MAX: usize = 256;
/// Pipelined requests are answered in batches of about this size, one a tick: with 800 clients that pipeline
/// without end, a tick is still some 20 ms.
const BATCH_BYTES: usize = 4 * 1024;
/// A batch, and the largest reply on top of it.
const UNSENT_BYTES_MAX: usize = 1024 * 1024;

/// How a run through a client's bytes ended.
enum End {
    /// All of it was answered.
    Drained,
    /// The rest is an unfinished head.
    Unfinished,
    /// A reply is still to come.
    Waiting(Pending),
    /// Enough replies for now.
    Batch,
    /// The last reply is written. `linger`: there may be bytes of the client's left.
    Last { linger: bool },
}

/// What is to be made free.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Room {
    /// A slot of `MaxConn`'s: one of the reserve would not let another request be served.
    Regular,
    /// Any slot, or a descriptor.
    Any,
}

impl<N: Net> Server<N> {
    /// Accepts what there is, as far as there is room.
    pub(super) fn accept_all(&mut self) {
        for listener in 0..self.acceptable.len() {
            let mut accepted = 0;
            while accepted < ACCEPTS_MAX
                && self.acceptable.get(listener) == Some(&true)
                && self.now.mono >= self.accept_at.max(self.room_at)
            {
                if !self.has_room() {
                    // Until one closes or falls idle, or a head's grace ends.
                    let graces = self.inbound.iter().map(|(_, conn)| conn.makes_room_at());
                    self.room_at = graces.filter(|at| *at > self.now.mono).min().unwrap_or(Mono::NEVER);
                    return;
                }
                let token = self.inbound.reserve();
                match self.net.accept(listener, token) {
                    Ok(()) => {
                        accepted += 1;
                        self.counted.accepted += 1;
                        self.welcome(token);
                    }
                    Err(error) => {
                        self.inbound.vacate(token);
                        self.on_accept_error(listener, &error);
                    }
                }
            }
        }
    }

    fn has_room(&self) -> bool {
        self.inbound.len() < self.connections_max + RESERVE_CONNECTIONS
            || self.inbound.iter().any(|(_, conn)| conn.makes_room(self.now.mono).is_some())
    }

    fn welcome(&mut self, token: Token) {
        // The newcomer is counted already.
        let regular = self.inbound.len() - 1 - self.reserve_used;
        let reserve = regular >= self.connections_max && !self.make_room(Room::Regular);
        self.reserve_used += usize::from(reserve);
        if self.inbound.len() > self.connections_max + RESERVE_CONNECTIONS {
            self.make_room(Room::Any);
        }
        // Many are accepted in one tick: each a little later than the one before, so that "oldest" is an order.
        let accepted = self.now.mono.max(self.last_accepted.after(Duration::from_micros(1)));
        self.last_accepted = accepted;
        let conn = Inbound::new(reserve, accepted);
        self.deadline_floor = self.deadline_floor.min(conn.deadline());
        self.inbound.put(token, conn);
    }

    fn on_accept_error(&mut self, listener: usize, error: &io::Error) {
        match error.kind() {
            io::ErrorKind::WouldBlock => {
                if let Some(flag) = self.acceptable.get_mut(listener) {
                    *flag = false;
                }
            }
            // The client was gone before we came to it.
            io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted => {}
            _ => {
                self.counted.accept_failures += 1;
                // No descriptor or no memory: the connection stays in the backlog, and asking again at once
                // would only burn the core.
                if let Some(left_out) = self.accept_failures.admit(self.now.mono) {
                    log::error!("cannot accept a connection: {}{left_out}", Reason(error));
                }
                self.make_room(Room::Any);
                self.accept_at = self.now.mono.after(ACCEPT_PAUSE);
            }
        }
    }

    /// Closes the connection that makes room most gladly; `false`: all are busy.
    fn make_room(&mut self, room: Room) -> bool {
        let now = self.now.mono;
        let fitting = self.inbound.iter().filter(|(_, conn)| room == Room::Any || !conn.reserve);
        let gladly = fitting.filter_map(|(token, conn)| Some((conn.makes_room(now)?, token)));
        match gladly.min_by_key(|(rank, _)| *rank) {
            Some((_, token)) => {
                self.counted.displaced += 1;
                self.close_inbound(token);
                true
            }
            None => false,
        }
    }

    /// A client's socket is ready.
    pub(super) fn on_inbound(&mut self, token: Token, ready: Readiness) {
        let Some(mut conn) = self.take_inbound(token) else { return };
        let mut open = !ready.gone;
        conn.end_ahead |= ready.read_closed;
        if open && ready.writable && conn.unsent.is_some() {
            open = self.resume(token, &mut conn);
        } else if open && conn.unsent.is_none() && matches!(conn.state, State::Paused { .. }) {
            open = self.resume_paused(token, &mut conn);
        }
        if open && ready.readable {
            open = self.read_all(token, &mut conn);
        }
        self.settle(token, conn, open);
    }

    /// Takes a connection out of its slot for a moment; [`Server::settle`] brings it back.
    fn take_inbound(&mut self, token: Token) -> Option<Inbound> {
        let conn = self.inbound.take(token)?;
        self.head_bytes -= conn.head_bytes();
        Some(conn)
    }

    /// The connection goes back to its slot, or ends.
    fn settle(&mut self, token: Token, conn: Inbound, open: bool) {
        if open {
            self.deadline_floor = self.deadline_floor.min(conn.deadline());
            if conn.makes_room(self.now.mono).is_some() {
                self.room_at = self.now.mono;
            }
            if conn.unsent.is_none() && matches!(conn.state, State::Paused { .. }) {
                // Its replies went out whole, so no event will come for the rest of its requests.
                self.unfinished.push((token, Readiness { readable: true, ..Readiness::default() }));
            }
            self.head_bytes += conn.head_bytes();
            self.inbound.put(token, conn);
        } else {
            self.forget(token, &conn);
        }
    }

    pub(super) fn close_inbound(&mut self, token: Token) {
        if let Some(conn) = self.take_inbound(token) {
            self.forget(token, &conn);
        }
    }

    fn forget(&mut self, token: Token, conn: &Inbound) {
        if matches!(conn.state, State::Waiting { .. }) {
            self.broker.left(ClientId(token.to_bits()));
        }
        self.reserve_used -= usize::from(conn.reserve);
        self.net.close(token);
        self.inbound.vacate(token);
        self.room_at = self.now.mono;
    }

    /// Reads until there is nothing more, or no more is wanted. `false`: the connection is at its end.
    fn read_all(&mut self, token: Token, conn: &mut Inbound) -> bool {
        for _ in 0..READS_MAX {
            if !conn.wants_bytes() {
                return true;
            }
            let piece = self.scratch.get_mut(..READ_BYTES).unwrap_or_default();
            match self.net.read(token, piece) {
                // Who is owed a reply is not read: nobody is left who waits for one.
                Ok(0) => return false,
                Ok(count) => {
                    let drained = count < READ_BYTES;
                    if !self.on_bytes(token, conn, count, conn.end_ahead && drained) {
                        return false;
                    }
                    // A short read empties the socket; whatever comes later is a new edge, but for an end
                    // that was told of already.
                    if drained && !conn.end_ahead {
                        return true;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        // Others have their turn before this one goes on.
        self.unfinished.push((token, Readiness { readable: true, ..Readiness::default() }));
        true
    }

    /// Reads on towards an end that an event told of, as far as there is room, so that the last reply can say
    /// that it is the last.
    fn read_to_end(&mut self, token: Token, conn: &mut Inbound, rest: &mut Buf) {
        while conn.end_ahead && !conn.half_closed && rest.room() >= READ_BYTES {
            let piece = self.scratch.get_mut(..READ_BYTES).unwrap_or_default();
            match self.net.read(token, piece) {
                Ok(0) => conn.half_closed = true,
                Ok(count) => {
                    let _ = rest.extend(self.scratch.get(..count).unwrap_or_default());
                    wipe(&mut self.scratch, count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    /// `count` bytes of a client's lie in the scratch buffer. `ended`: they are its last.
    fn on_bytes(&mut self, token: Token, conn: &mut Inbound, count: usize, ended: bool) -> bool {
        let mut scratch = std::mem::take(&mut self.scratch);
        let fresh = scratch.get(..count).unwrap_or_default();
        let open = match std::mem::replace(&mut conn.state, State::Idle) {
            State::Idle => self.serve(token, conn, fresh, self.now.mono.after(HEAD_LIFE), ended),
            State::Head { mut bytes, until } => {
                // A head and a whole read always fit.
                bytes.extend(fresh).is_ok() && self.serve(token, conn, bytes.as_slice(), until, ended)
            }
            // After the last reply: thrown away.
            other => {
                conn.state = other;
                true
            }
        };
        wipe(&mut scratch, count);
        self.scratch = scratch;
        open
    }

    /// Answers the requests in `bytes`, sends the replies, and keeps what is left. `until` is the deadline
    /// of the first head.
    fn serve(&mut self, token: Token, conn: &mut Inbound, bytes: &[u8], until: Mono, ended: bool) -> bool {
        let mut out = std::mem::take(&mut self.out);
        out.clear();
        let (used, end) = self.answer(token, conn, bytes, ended, &mut out);
        let rest = bytes.get(used..).unwrap_or_default();
        let until = if used == 0 { until } else { self.now.mono.after(HEAD_LIFE) };
        conn.state = match end {
            End::Drained => State::Idle,
            End::Unfinished => State::Head { bytes: kept(rest), until },
            End::Waiting(pending) => State::Waiting { rest: kept(rest), pending },
            End::Batch => State::Paused { rest: kept(rest) },
            End::Last { linger } => State::Closing { linger },
        };
        let open = self.send(token, conn, &out);
        self.put_out_back(out);
        if matches!(conn.state, State::Head { .. }) {
            self.limit_head_bytes(conn);
        }
        open
    }

    /// The reply scratch goes back. It is wiped at the end of the tick, once for all replies that were written
    /// over one another in it.
    fn put_out_back(&mut self, out: Vec<u8>) {
        self.out_used = self.out_used.max(out.len());
        self.out = out;
    }

    /// Leaves no secret in the reply scratch.
    pub(super) fn wipe_out(&mut self) {
        self.out.resize(self.out_used, 0);
        self.out.as_mut_slice().zeroize();
        self.out.clear();
        self.out_used = 0;
    }

    fn answer(
        &mut self,
        token: Token,
        conn: &mut Inbound,
        bytes: &[u8],
        ended: bool,
        out: &mut Vec<u8>,
    ) -> (usize, End) {
        let mut used = 0;
        loop {
            let rest = bytes.get(used..).unwrap_or_default();
            if rest.is_empty() {
                return (used, End::Drained);
            }
            if out.len() >= BATCH_BYTES {
                return (used, End::Batch);
            }
            let mut room = header_room();
            match parse(rest, &mut room) {
                Parsed::NeedMore => return (used, End::Unfinished),
                Parsed::Reject(reject) => {
                    let done = self.broker.reject(reject, asks_for_head(rest), self.now, out);
                    self.log_request(format_args!("malformed request"), &done, self.now.mono);
                    return (used, End::Last { linger: true });
                }
                Parsed::Request(request, head_bytes) => {
                    used += head_bytes;
                    let last = ended && used == bytes.len();
                    let busy = conn.reserve && !self.promote(conn);
                    let open = self.inbound.len();
                    let visit = Visit { last, past_cap: busy, open, counted: &self.counted };
                    match self.broker.ask(ClientId(token.to_bits()), &request, visit, self.now, out) {
                        Disposition::Waiting => {
                            let shown = if log::log_enabled!(log::Level::Debug) {
                                Shown(&request).to_string()
                            } else {
                                String::new()
                            };
                            let pending = Pending { shown: shown.into(), since: self.now.mono };
                            return (used, End::Waiting(pending));
                        }
                        Disposition::Answered(done) => {
                            self.log_request(format_args!("{}", Shown(&request)), &done, self.now.mono);
                            if done.persistence == Persistence::Close {
                                // A body, or more requests, may be on their way.
                                // A client that is not told yet that we end, too.
                                let linger = used < bytes.len()
                                    || request.has_body
                                    || busy
                                    || self.drain_until.is_some();
                                return (used, End::Last { linger });
                            }
                        }
                    }
                }
            }
        }
    }

    /// A client on a reserve slot moves to a regular one if there is room by now.
    fn promote(&mut self, conn: &mut Inbound) -> bool {
        if self.inbound.len() - self.reserve_used < self.connections_max || self.make_room(Room::Regular) {
            self.reserve_used -= 1;
            conn.reserve = false;
        }
        !conn.reserve
    }

    /// An answer for a client that waited.
    pub(super) fn deliver(&mut self, answer: &Answer) {
        let token = Token::from_bits(answer.client.0);
        let Some(mut conn) = self.take_inbound(token) else { return };
        let mut open = true;
        match std::mem::replace(&mut conn.state, State::Idle) {
            State::Waiting { mut rest, pending } => {
                self.read_to_end(token, &mut conn, &mut rest);
                let mut out = std::mem::take(&mut self.out);
                out.clear();
                let last = conn.half_closed && rest.is_empty();
                let done = self.broker.write_answer(answer, last, self.now, &mut out);
                self.log_request(format_args!("{}", pending.shown), &done, pending.since);
                conn.state = match done.persistence {
                    Persistence::Close => {
                        State::Closing { linger: !rest.is_empty() || self.drain_until.is_some() }
                    }
                    _ => State::Paused { rest },
                };
                open = self.send(token, &mut conn, &out);
                self.put_out_back(out);
                if open {
                    open = self.resume_paused(token, &mut conn);
                }
            }
            // The broker answers a client once; whoever does not wait has been answered.
            other => conn.state = other,
        }
        self.settle(token, conn, open);
    }

    /// The socket takes bytes again.
    fn resume(&mut self, token: Token, conn: &mut Inbound) -> bool {
        self.send(token, conn, &[]) && self.resume_paused(token, conn)
    }

    /// Goes on with what the client has sent ahead, once its replies are out: one batch of it.
    fn resume_paused(&mut self, token: Token, conn: &mut Inbound) -> bool {
        if conn.unsent.is_none() {
            match std::mem::replace(&mut conn.state, State::Idle) {
                State::Paused { mut rest } if !rest.is_empty() => {
                    self.read_to_end(token, conn, &mut rest);
                    let until = self.now.mono.after(HEAD_LIFE);
                    if !self.serve(token, conn, rest.as_slice(), until, conn.half_closed) {
                        return false;
                    }
                }
                State::Paused { .. } => {}
                other => conn.state = other,
            }
        }
        if conn.half_closed && conn.unsent.is_none() && matches!(conn.state, State::Idle | State::Head { .. })
        {
            return false;
        }
        // The edge for what arrived meanwhile may be long past.
        !conn.wants_bytes() || self.read_all(token, conn)
    }

    /// Sends what is unsent, then `more`. `false`: the connection is at its end.
    fn send(&mut self, token: Token, conn: &mut Inbound, mut more: &[u8]) -> bool {
        let sends = !more.is_empty() || conn.unsent.is_some();
        if let Some((mut unsent, since)) = conn.unsent.take() {
            while !unsent.is_empty() {
                match self.net.write(token, unsent.as_slice()) {
                    Ok(count) => unsent.consume(count),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        let fits = unsent.extend(more).is_ok();
                        conn.unsent = Some((unsent, since));
                        return fits;
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => return false,
                }
            }
        }
        while !more.is_empty() {
            match self.net.write(token, more) {
                Ok(count) => more = more.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let mut unsent = Buf::with_max(UNSENT_BYTES_MAX);
                    let fits = unsent.extend(more).is_ok();
                    conn.unsent = Some((unsent, self.now.mono));
                    return fits;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        match conn.state {
            State::Closing { linger: false } => false,
            State::Closing { linger: true } => {
                self.net.shutdown(token);
                conn.state = State::Lingering { until: self.now.mono.after(LINGER_LIFE) };
                !conn.half_closed
            }
            _ => {
                if sends {
                    conn.idle_since = Some(self.now.mono);
                    if let State::Head { until, .. } = &mut conn.state {
                        // The rest of it could not be read before.
                        *until = (*until).max(self.now.mono.after(HEAD_LIFE));
                    }
                }
                true
            }
        }
    }

    /// `newest` has an unfinished head; where all heads together hold too much, the oldest go.
    fn limit_head_bytes(&mut self, newest: &Inbound) {
        while self.head_bytes + newest.head_bytes() > HEAD_BYTES_IN_ALL_MAX {
            let heads = self.inbound.iter().filter(|(_, conn)| matches!(conn.state, State::Head { .. }));
            match heads.min_by_key(|(_, conn)| conn.accepted) {
                Some((token, _)) => {
                    self.counted.displaced += 1;
                    self.close_inbound(token);
                }
                None => return,
            }
        }
    }

    fn log_request(&mut self, shown: fmt::Arguments<'_>, done: &Done, since: Mono) {
        if let Some(code) = &done.code {
            if let Some(left_out) = self.refusals.admit(self.now.mono) {
                log::warn!("refused: {shown}: {} {code}{left_out}", done.status);
            }
        } else if log::log_enabled!(log::Level::Debug) {
            let took_us = self.net.now().mono.since(since).as_micros();
            match done.x_cache {
                Some(x_cache) => log::debug!("{shown} {} {x_cache} {took_us} us", done.status),
                None => log::debug!("{shown} {} {took_us} us", done.status),
            }
        }
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

fn kept(rest: &[u8]) -> Buf {
    let mut kept = Inbound::input();
    // The rest of a buffer of the same size always fits.
    let _ = kept.extend(rest);
    kept
}
