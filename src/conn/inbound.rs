//! A client's connection: one enum of states, and the deadlines that go with them.
//!
//! | From | When | To |
//! |---|---|---|
//! | `Fresh`, `Idle`, `Head` | bytes come | `Answering` |
//! | `Answering` | all of them are answered | `Idle` |
//! | | part of a head is left | `Head` |
//! | | a reply is still to come | `Waiting` |
//! | | the replies are enough for now | `Paused` |
//! | | the last reply is written | `Closing` |
//! | `Waiting` | the reply is written | `Paused`, `Closing` |
//! | `Paused` | all replies are sent | `Answering`, `Idle` |
//! | `Closing` | the last reply is sent | `Lingering`, or closed |
//!
//! The server carries the bytes and asks the broker: it answers what
//! [`Inbound::on_bytes`] hands out, and says with [`Inbound::on_answered`] how far it came.

use crate::buf::{Buf, Full};
use crate::http::request::HEAD_BYTES_MAX;
use crate::time::Mono;
use std::io;
use std::time::Duration;

/// From accept to the first byte.
const FIRST_BYTE_LIFE: Duration = Duration::from_secs(10);
/// From a head's first byte to its last.
const HEAD_LIFE: Duration = Duration::from_secs(5);
/// An unused keep-alive connection.
const IDLE_LIFE: Duration = Duration::from_secs(75);
/// A client that does not read its reply.
const WRITE_LIFE: Duration = Duration::from_secs(10);
/// After the last reply the client's bytes are read and thrown away for so long, since closing at once would reset
/// the connection and could take the reply away from the client (RFC 9112 9.6).
const LINGER_LIFE: Duration = Duration::from_secs(1);
/// At the cap, a head may be unfinished for so long after its connection was accepted.
const HEAD_GRACE: Duration = Duration::from_secs(1);
/// At the cap, a client may leave its replies unread for so long.
const UNREAD_GRACE: Duration = Duration::from_secs(1);
/// Bytes read from a client in one go: many requests fit, and what is read of a client that does not read its
/// replies is all that it can make us hold.
pub(crate) const READ_BYTES: usize = 4 * 1024;
/// Unsent reply bytes of one client.
pub(crate) const UNSENT_BYTES_MAX: usize = 1024 * 1024;

/// Where a connection stands.
#[derive(Debug)]
enum State {
    /// Before the first byte.
    Fresh,
    /// Between two requests.
    Idle { since: Mono },
    /// The input is the beginning of a request's head.
    Head { until: Mono },
    /// The caller answers an [`Input`].
    Answering,
    /// A reply is still to come.
    Waiting(NotedRequest),
    /// What was sent ahead waits until the replies before it are sent, or for the next tick.
    Paused,
    /// The last reply is being sent. `linger`: bytes of the client's may be unread after it.
    Closing { linger: bool },
    /// The last reply is sent and our side is closed.
    Lingering { until: Mono },
}

/// Whether the client may send more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum PeerEnd {
    /// It may.
    Open,
    /// An event has announced its end, which is still to be read: no further event will.
    Announced,
    /// Its end was read. The client may still read replies.
    Read,
}

/// What the log says of a request whose client waits.
#[derive(Debug, Default)]
pub(crate) struct NotedRequest {
    /// Method and target as they are logged; empty where they will not be.
    pub(crate) shown: Box<str>,
    /// When the request was read.
    pub(crate) since: Mono,
}

/// Requests to be answered, and maybe the beginning of another at their end.
#[derive(Debug)]
pub(crate) struct Input<'a> {
    /// What was kept of earlier reads, with the newest bytes at its end.
    kept: Option<Buf>,
    /// The newest bytes, if none were kept before.
    fresh: &'a [u8],
    /// When the head that these bytes begin with is given up, should it be unfinished.
    head_until: Mono,
    /// The client sends nothing after these bytes.
    pub(crate) is_last: bool,
}

impl Input<'_> {
    #[inline]
    pub(crate) fn bytes(&self) -> &[u8] {
        self.kept.as_ref().map_or(self.fresh, Buf::as_slice)
    }
}

/// How a run through [`Input`] ended.
#[derive(Debug)]
pub(crate) enum End {
    /// All of it was answered.
    Drained,
    /// The rest is an unfinished head.
    Unfinished,
    /// The reply to the last request is still to come.
    Waiting(NotedRequest),
    /// These are enough replies for now.
    Batch,
    /// The last reply is written. `linger`: there may be unread bytes of the client's.
    Last {
        /// Whether to read on for a moment before the connection is closed.
        linger: bool,
    },
}

/// A client's connection.
#[derive(Debug)]
pub(crate) struct Inbound {
    state: State,
    accepted: Mono,
    /// Past `MaxConn`: it gets 429 or `/ping`.
    reserve: bool,
    peer: PeerEnd,
    /// Bytes that the client has sent ahead: a whole head, and one read past it, fit.
    input: Buf,
    /// Reply bytes that the socket has not taken yet, and since when.
    unsent: Option<(Buf, Mono)>,
}

impl Inbound {
    /// A connection that was just accepted. `reserve`: on a slot past `MaxConn`.
    pub(crate) fn new(reserve: bool, now: Mono) -> Inbound {
        let input = Buf::with_max(HEAD_BYTES_MAX + READ_BYTES);
        Inbound { state: State::Fresh, accepted: now, reserve, peer: PeerEnd::Open, input, unsent: None }
    }

    /// When it is to be closed if nothing happens.
    #[inline]
    pub(crate) fn deadline(&self) -> Mono {
        match (&self.unsent, &self.state) {
            // A client whose replies are unsent is not read either: its head's time does not run.
            (Some((_, since)), _) => since.after(WRITE_LIFE),
            (None, State::Fresh) => self.accepted.after(FIRST_BYTE_LIFE),
            (None, State::Idle { since }) => since.after(IDLE_LIFE),
            (None, State::Head { until } | State::Lingering { until }) => *until,
            // The broker's deadlines hold, or the next tick goes on.
            (None, _) => Mono::NEVER,
        }
    }

    /// From when it makes room for others at the cap, and how gladly, the smallest first; `None`: it is busy.
    ///
    /// Connections that are as good as closed go first, then keep-alive ones (longest idle first), then heads that
    /// are unfinished [`HEAD_GRACE`] after their connection was accepted (oldest first), then clients whose replies
    /// wait for [`UNREAD_GRACE`] to be read (longest first), since no token is needed to let replies pile up.
    pub(crate) fn room(&self) -> Option<(Mono, (u8, Mono))> {
        let at_once = Mono::default();
        match (&self.unsent, &self.state) {
            (Some((_, since)), _) => Some((since.after(UNREAD_GRACE), (3, *since))),
            (None, State::Lingering { until }) => Some((at_once, (0, *until))),
            (None, State::Idle { since }) => Some((at_once, (1, *since))),
            (None, State::Fresh | State::Head { .. }) => {
                Some((self.accepted.after(HEAD_GRACE), (2, self.accepted)))
            }
            (None, _) => None,
        }
    }

    /// How gladly it makes room, if it makes some now.
    pub(crate) fn makes_room(&self, now: Mono) -> Option<(u8, Mono)> {
        self.room().filter(|(from, _)| now >= *from).map(|(_, rank)| rank)
    }

    /// Bytes of memory that its unfinished head takes.
    pub(crate) fn head_bytes(&self) -> usize {
        if matches!(self.state, State::Head { .. }) { self.input.allocated() } else { 0 }
    }

    /// When it was accepted, if its head is unfinished.
    pub(crate) fn unfinished_since(&self) -> Option<Mono> {
        matches!(self.state, State::Head { .. }).then_some(self.accepted)
    }

    /// Whether it is on a slot past `MaxConn`.
    pub(crate) const fn is_reserve(&self) -> bool {
        self.reserve
    }

    /// It moves to one of `MaxConn`'s slots.
    pub(crate) const fn promote(&mut self) {
        self.reserve = false;
    }

    /// Whether it owes nothing: it may be closed when the agent ends.
    pub(crate) const fn is_at_rest(&self) -> bool {
        matches!(self.state, State::Fresh | State::Idle { .. }) && self.unsent.is_none()
    }

    /// Whether the broker owes it a reply.
    pub(crate) const fn is_waiting(&self) -> bool {
        matches!(self.state, State::Waiting(_))
    }

    /// Whether its last reply is sent.
    pub(crate) const fn is_lingering(&self) -> bool {
        matches!(self.state, State::Lingering { .. })
    }

    /// Whether replies wait to be sent.
    pub(crate) const fn has_unsent(&self) -> bool {
        self.unsent.is_some()
    }

    /// Whether [`Inbound::go_on`] is to be called, since no event will come for what the client sent ahead.
    pub(crate) const fn can_go_on(&self) -> bool {
        matches!(self.state, State::Paused) && self.unsent.is_none()
    }

    /// Whether the client's next bytes may be read. A client that does not read is not read either.
    const fn is_readable(&self) -> bool {
        let asks = matches!(self.state, State::Fresh | State::Idle { .. } | State::Head { .. });
        (asks || self.is_lingering()) && self.unsent.is_none()
    }

    /// Whether bytes of the client's are wanted now.
    pub(crate) fn wants_bytes(&self) -> bool {
        self.is_readable() && self.peer != PeerEnd::Read
    }

    /// Whether the client has ended and is owed nothing: the connection is to be closed.
    pub(crate) fn is_done(&self) -> bool {
        self.is_readable() && self.peer == PeerEnd::Read
    }

    /// Whether to read on although requests wait: towards an end that was announced, as far as there is room, so
    /// that the last reply can say that it is the last.
    pub(crate) fn wants_end(&self) -> bool {
        let waits = self.is_waiting() || matches!(self.state, State::Paused) && !self.input.is_empty();
        waits && self.peer == PeerEnd::Announced && self.input.room() >= READ_BYTES
    }

    pub(crate) const fn peer_end(&self) -> PeerEnd {
        self.peer
    }

    /// The client's end was announced or read.
    pub(crate) fn on_peer_end(&mut self, end: PeerEnd) {
        self.peer = self.peer.max(end);
    }

    /// Bytes were read; gives what is to be answered, which [`Inbound::on_answered`] waits for. `drained`: and no
    /// more are there now.
    ///
    /// # Errors
    /// Where they do not fit, which the limits of heads and reads rule out.
    #[inline]
    pub(crate) fn on_bytes<'a>(
        &mut self,
        fresh: &'a [u8],
        drained: bool,
        now: Mono,
    ) -> Result<Option<Input<'a>>, Full> {
        let is_last = drained && self.peer == PeerEnd::Announced;
        let head_until = match self.state {
            State::Fresh | State::Idle { .. } => now.after(HEAD_LIFE),
            State::Head { until } => until,
            State::Waiting(_) | State::Paused => return self.input.extend(fresh).map(|()| None),
            // After the last reply they are thrown away.
            State::Answering | State::Closing { .. } | State::Lingering { .. } => return Ok(None),
        };
        let mut kept = None;
        if !self.input.is_empty() {
            self.input.extend(fresh)?;
            kept = Some(self.take_input());
        }
        self.state = State::Answering;
        Ok(Some(Input { kept, fresh, head_until, is_last }))
    }

    /// Goes on with what the client has sent ahead, once its replies are out.
    pub(crate) fn go_on(&mut self, now: Mono) -> Option<Input<'static>> {
        debug_assert!(self.can_go_on());
        if self.input.is_empty() {
            self.state = State::Idle { since: now };
            return None;
        }
        self.state = State::Answering;
        let kept = Some(self.take_input());
        let is_last = self.peer == PeerEnd::Read;
        Some(Input { kept, fresh: &[], head_until: now.after(HEAD_LIFE), is_last })
    }

    /// `used` bytes of `input` need no more work: their replies are written, or one of them is still to come.
    pub(crate) fn on_answered(&mut self, input: &Input<'_>, used: usize, end: End, now: Mono) {
        debug_assert!(matches!(self.state, State::Answering) && used <= input.bytes().len());
        let rest = input.bytes().get(used..).unwrap_or_default();
        self.state = match end {
            End::Drained => return self.state = State::Idle { since: now },
            End::Unfinished if used == 0 => State::Head { until: input.head_until },
            End::Unfinished => State::Head { until: now.after(HEAD_LIFE) },
            End::Waiting(request) => State::Waiting(request),
            End::Batch => State::Paused,
            End::Last { linger } => return self.state = State::Closing { linger },
        };
        keep(&mut self.input, rest);
    }

    fn take_input(&mut self) -> Buf {
        std::mem::replace(&mut self.input, Buf::with_max(HEAD_BYTES_MAX + READ_BYTES))
    }

    /// Whether the reply that is still to come answers the client's last request.
    pub(crate) fn waits_for_its_last(&self) -> bool {
        self.is_waiting() && self.input.is_empty() && self.peer == PeerEnd::Read
    }

    /// The reply that it waited for is written; [`Inbound::send`] it. `last`: it says that it is the last one,
    /// `linger`: to a client that may be sending.
    pub(crate) fn on_reply(&mut self, last: bool, linger: bool) -> Option<NotedRequest> {
        let State::Waiting(request) = &mut self.state else { return None };
        let request = std::mem::take(request);
        self.state = State::Paused;
        if last {
            self.state = State::Closing { linger: linger || !self.take_input().is_empty() };
        }
        Some(request)
    }

    /// Sends what is unsent, then `more`, as far as `write` takes it, and keeps the rest. `false`: the connection is
    /// to be closed. If it [lingers](Inbound::is_lingering) now, our side of it is to be shut down.
    pub(crate) fn send(
        &mut self,
        more: &[u8],
        now: Mono,
        mut write: impl FnMut(&[u8]) -> io::Result<usize>,
    ) -> bool {
        let sends = !more.is_empty() || self.unsent.is_some();
        if let Some((unsent, _)) = &mut self.unsent {
            let Ok(count) = write_all(unsent.as_slice(), &mut write) else { return false };
            unsent.consume(count);
            if !unsent.is_empty() {
                return keep(unsent, more);
            }
            self.unsent = None;
        }
        let Ok(count) = write_all(more, &mut write) else { return false };
        debug_assert!(count <= more.len());
        match more.get(count..) {
            Some(rest @ [_, ..]) => {
                let (unsent, _) = self.unsent.insert((Buf::with_max(UNSENT_BYTES_MAX), now));
                keep(unsent, rest)
            }
            _ => self.on_sent(sends, now),
        }
    }

    /// All replies are sent. `sends`: there were some.
    fn on_sent(&mut self, sends: bool, now: Mono) -> bool {
        match &mut self.state {
            State::Closing { linger: false } => return false,
            State::Closing { linger: true } => {
                self.state = State::Lingering { until: now.after(LINGER_LIFE) };
            }
            State::Idle { since } if sends => *since = now,
            // The rest of it could not be read before.
            State::Head { until } if sends => *until = (*until).max(now.after(HEAD_LIFE)),
            _ => {}
        }
        // A client that has ended sends nothing that could reset the connection: it need not linger.
        !self.is_done()
    }
}

/// Appends `bytes`; `false`, which the limits of reads and replies rule out: they do not fit.
fn keep(buf: &mut Buf, bytes: &[u8]) -> bool {
    let fits = buf.extend(bytes).is_ok();
    debug_assert!(fits, "{} bytes on top of {}", bytes.len(), buf.len());
    fits
}

/// Writes until the socket takes no more, or all is written; gives how much it took.
#[inline]
fn write_all(bytes: &[u8], mut write: impl FnMut(&[u8]) -> io::Result<usize>) -> io::Result<usize> {
    let mut taken = 0;
    while let Some(rest @ [_, ..]) = bytes.get(taken..) {
        match write(rest) {
            Ok(count) => taken += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Mono {
        Mono::from_micros(ms * 1000)
    }

    fn blocked(_: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Reads `bytes` at `now`, answers `used` of them with `reply`, and writes it.
    fn read(conn: &mut Inbound, bytes: &[u8], (used, end): (usize, End), reply: &[u8], now: Mono) -> bool {
        let input = conn.on_bytes(bytes, true, now).unwrap().expect("requests");
        conn.on_answered(&input, used, end, now);
        conn.send(reply, now, |bytes| Ok(bytes.len()))
    }

    fn waiting() -> End {
        End::Waiting(NotedRequest { shown: "GET /".into(), since: at(0) })
    }

    /// A connection that has sent `bytes`, of which `used` wait for their reply.
    fn conn_waiting(bytes: &[u8], used: usize) -> Inbound {
        let mut conn = Inbound::new(false, at(0));
        assert!(read(&mut conn, bytes, (used, waiting()), b"", at(0)));
        conn
    }

    #[test]
    fn each_state_has_its_deadline() {
        let mut conn = Inbound::new(false, at(0));
        assert_eq!(conn.deadline(), at(10_000), "the first byte");
        assert!(read(&mut conn, b"GE", (0, End::Unfinished), b"", at(100)));
        assert_eq!((conn.deadline(), conn.unfinished_since()), (at(5_100), Some(at(0))), "a head");
        assert!(read(&mut conn, b"T", (0, End::Unfinished), b"", at(2_000)));
        assert_eq!(conn.deadline(), at(5_100), "more of it wins no time");
        assert!(read(&mut conn, b" /", (5, End::Drained), b"ok", at(3_000)));
        assert_eq!((conn.deadline(), conn.head_bytes()), (at(78_000), 0), "keep-alive");
        assert!(read(&mut conn, b"GET", (3, waiting()), b"", at(4_000)));
        assert_eq!(conn.deadline(), Mono::NEVER, "the broker's holds");
        assert!(conn.on_reply(true, true).is_some());
        assert!(conn.send(b"bye", at(5_000), blocked));
        assert_eq!(conn.deadline(), at(15_000), "the client does not read");
        assert!(conn.send(b"", at(6_000), |bytes| Ok(bytes.len())) && conn.is_lingering());
        assert_eq!((conn.deadline(), conn.is_lingering()), (at(7_000), true));
        assert!(matches!(conn.on_bytes(b"more", true, at(6_000)), Ok(None)), "thrown away");
    }

    #[test]
    fn a_heads_time_does_not_run_while_replies_are_unsent() {
        let mut conn = Inbound::new(false, at(0));
        let input = conn.on_bytes(b"GET /GE", true, at(0)).unwrap().unwrap();
        conn.on_answered(&input, 5, End::Unfinished, at(0));
        assert!(conn.send(b"reply", at(0), blocked));
        assert!(!conn.wants_bytes(), "who does not read is not read");
        assert_eq!(conn.deadline(), at(10_000));
        assert!(conn.send(b"", at(9_000), |bytes| Ok(bytes.len())));
        assert_eq!((conn.deadline(), conn.wants_bytes()), (at(14_000), true));
    }

    #[test]
    fn who_makes_room_first() {
        let new = Inbound::new(false, at(0));
        assert_eq!((new.makes_room(at(999)), new.room().unwrap().0), (None, at(1000)));
        assert_eq!(new.makes_room(at(1000)), Some((2, at(0))));
        let mut idle = Inbound::new(false, at(0));
        read(&mut idle, b"GET", (3, End::Drained), b"ok", at(500));
        assert_eq!(idle.makes_room(at(501)), Some((1, at(500))), "before heads");
        let waits = conn_waiting(b"GET", 3);
        assert_eq!((waits.makes_room(at(9000)), waits.room()), (None, None));
        assert!(idle.send(b"ok", at(600), blocked));
        assert_eq!(
            (idle.makes_room(at(1599)), idle.room().unwrap().0),
            (None, at(1600)),
            "a reply is on its way"
        );
        assert_eq!(idle.makes_room(at(1600)), Some((3, at(600))));
        let mut last = Inbound::new(false, at(0));
        assert!(read(&mut last, b"GET", (3, End::Last { linger: true }), b"bye", at(1)));
        assert_eq!(last.makes_room(at(1)), Some((0, at(1001))), "as good as closed");
    }

    #[test]
    fn replies_go_out_in_order_whatever_the_socket_takes() {
        let mut conn = Inbound::new(false, at(0));
        let (mut taken, mut turn) = (Vec::new(), 0);
        let mut write = |bytes: &[u8]| {
            turn += 1;
            match turn % 4 {
                0 => Err(io::ErrorKind::WouldBlock.into()),
                1 => Err(io::ErrorKind::Interrupted.into()),
                count => {
                    let some = &bytes[..bytes.len().min(count)];
                    taken.extend_from_slice(some);
                    Ok(some.len())
                }
            }
        };
        assert!(conn.send(b"first, ", at(1), &mut write));
        assert!(conn.send(b"second", at(2), &mut write));
        for _ in 0..100 {
            assert!(conn.send(b"", at(3), &mut write));
        }
        assert!(!conn.has_unsent());
        assert_eq!(taken, b"first, second");
        let broken = |_: &[u8]| Err(io::ErrorKind::BrokenPipe.into());
        assert!(!conn.send(b"x", at(4), broken));
    }

    #[test]
    fn what_was_sent_ahead_waits_for_the_reply_before_it() {
        let mut conn = conn_waiting(b"GET /GET /2", 5);
        assert!(conn.is_waiting() && !conn.wants_bytes() && !conn.can_go_on());
        let request = conn.on_reply(false, false).unwrap();
        assert_eq!((&*request.shown, request.since), ("GET /", at(0)));
        assert!(conn.send(b"reply", at(1), blocked));
        assert!(!conn.can_go_on(), "nor before it is sent");
        assert!(conn.send(b"", at(2), |bytes| Ok(bytes.len())));
        assert!(conn.can_go_on());
        let input = conn.go_on(at(3)).unwrap();
        assert_eq!((input.bytes(), input.is_last), (&b"GET /2"[..], false));
        conn.on_answered(&input, 6, End::Drained, at(3));
        assert!(conn.is_at_rest() && !conn.is_done());

        let mut conn = conn_waiting(b"GET", 3);
        assert!(conn.on_reply(false, false).is_some() && conn.on_reply(false, false).is_none());
        assert!(conn.go_on(at(4)).is_none(), "nothing was sent ahead");
        assert_eq!(conn.makes_room(at(4)), Some((1, at(4))), "idle");
    }

    #[test]
    fn the_last_request_is_known_once_the_end_is_near() {
        let is_last = |conn: &mut Inbound, drained| {
            conn.on_bytes(b"GET", drained, at(0)).unwrap().expect("a request").is_last
        };
        assert!(!is_last(&mut Inbound::new(false, at(0)), true));
        let mut announced = Inbound::new(false, at(0));
        announced.on_peer_end(PeerEnd::Announced);
        assert!(announced.wants_bytes() && announced.peer_end() == PeerEnd::Announced);
        assert!(is_last(&mut announced, true));
        let mut announced = Inbound::new(false, at(0));
        announced.on_peer_end(PeerEnd::Announced);
        assert!(!is_last(&mut announced, false), "there may be more");

        // While a reply is owed only an announced end is read towards.
        let mut conn = conn_waiting(b"GET", 3);
        assert!(!conn.wants_end());
        conn.on_peer_end(PeerEnd::Announced);
        assert!(conn.wants_end() && !conn.waits_for_its_last());
        conn.on_peer_end(PeerEnd::Read);
        conn.on_peer_end(PeerEnd::Announced);
        assert!(!conn.wants_end() && conn.waits_for_its_last(), "an end that was read stays read");
        conn.on_reply(false, false);
        assert!(conn.go_on(at(1)).is_none() && conn.is_done() && !conn.wants_bytes());

        let mut conn = conn_waiting(b"GET", 3);
        conn.on_peer_end(PeerEnd::Announced);
        assert!(matches!(conn.on_bytes(b"GET /2", true, at(1)), Ok(None)), "it is kept");
        conn.on_peer_end(PeerEnd::Read);
        assert!(!conn.waits_for_its_last());
        conn.on_reply(false, false);
        assert!(conn.go_on(at(1)).is_some_and(|input| input.is_last && input.bytes() == b"GET /2"));
    }
}
