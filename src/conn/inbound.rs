//! A client's connection: one enum of states, and the deadlines that go with them.
//!
//! `Idle -> Head -> (Waiting | Paused) -> Idle ... -> Closing -> Lingering`. The server carries the bytes
//! and asks the broker.

use crate::buf::Buf;
use crate::http::request::HEAD_BYTES_MAX;
use crate::time::Mono;
use std::time::Duration;

/// From accept to the first byte.
pub const FIRST_BYTE_LIFE: Duration = Duration::from_secs(10);
/// From a head's first byte to its last.
pub const HEAD_LIFE: Duration = Duration::from_secs(5);
/// An unused keep-alive connection.
pub const IDLE_LIFE: Duration = Duration::from_secs(75);
/// A client that does not read its reply.
pub const WRITE_LIFE: Duration = Duration::from_secs(10);
/// After the last reply: the client's bytes are read and thrown away for so long, since closing at once
/// would reset the connection and could take the reply away from it (RFC 9112 9.6).
pub const LINGER_LIFE: Duration = Duration::from_secs(1);
/// At the cap, a head may be unfinished for so long after its connection was accepted.
pub const HEAD_GRACE: Duration = Duration::from_secs(1);
/// At the cap, a client may leave its replies unread for so long.
pub const UNREAD_GRACE: Duration = Duration::from_secs(1);
/// Bytes read from a client in one go: many requests fit, and what is read of a client that does not read its
/// replies is all that it can make us hold.
pub const READ_BYTES: usize = 4 * 1024;

/// What a request was, kept for the log while its client waits.
#[derive(Debug)]
pub struct Pending {
    /// Method and target as they are logged; empty where they will not be.
    pub shown: Box<str>,
    /// When it came.
    pub since: Mono,
}

/// Where a connection stands.
#[derive(Debug)]
pub enum State {
    /// Between requests, or before the first.
    Idle,
    /// An unfinished head.
    Head {
        /// Its bytes so far.
        bytes: Buf,
        /// When it is given up.
        until: Mono,
    },
    /// The reply is still to come; what the client sent after its request waits.
    Waiting {
        /// Bytes of the next requests.
        rest: Buf,
        /// The request.
        pending: Pending,
    },
    /// The client is slow to read; what it sent waits.
    Paused {
        /// Bytes of the next requests.
        rest: Buf,
    },
    /// The last reply is being sent. `linger`: bytes of the client's may be left unread.
    Closing {
        /// Whether to read on for a moment.
        linger: bool,
    },
    /// The last reply is sent and our side is closed.
    Lingering {
        /// When it is closed for good.
        until: Mono,
    },
}

/// A client's connection.
#[derive(Debug)]
pub struct Inbound {
    /// Where it stands.
    pub state: State,
    /// When it was accepted.
    pub accepted: Mono,
    /// When it last went idle; `None` before its first reply.
    pub idle_since: Option<Mono>,
    /// Past `MaxConn`: it gets 429 or `/ping`.
    pub reserve: bool,
    /// The client has closed its side; it may still be reading.
    pub half_closed: bool,
    /// An event told of that end, which may be still to be read: no further event will.
    pub end_ahead: bool,
    /// Reply bytes that the socket did not take yet, and since when.
    pub unsent: Option<(Buf, Mono)>,
}

impl Inbound {
    /// Just accepted.
    #[must_use]
    pub const fn new(reserve: bool, now: Mono) -> Inbound {
        Inbound {
            state: State::Idle,
            accepted: now,
            idle_since: None,
            reserve,
            half_closed: false,
            end_ahead: false,
            unsent: None,
        }
    }

    /// A buffer for what a client has sent ahead: a whole head, and one read past it.
    #[must_use]
    pub fn input() -> Buf {
        Buf::with_max(HEAD_BYTES_MAX + READ_BYTES)
    }

    /// When it is to be closed if nothing happens.
    #[must_use]
    pub fn deadline(&self) -> Mono {
        let state = match &self.state {
            State::Idle => match self.idle_since {
                Some(since) => since.after(IDLE_LIFE),
                None => self.accepted.after(FIRST_BYTE_LIFE),
            },
            State::Head { until, .. } | State::Lingering { until } => *until,
            // The broker's deadlines and the write's hold here.
            State::Waiting { .. } | State::Paused { .. } | State::Closing { .. } => Mono::NEVER,
        };
        match &self.unsent {
            // A client whose replies are unsent is not read either: its head's time does not run.
            Some((_, since)) => since.after(WRITE_LIFE),
            None => state,
        }
    }

    /// Whether bytes of the client's are wanted now. A client that does not read is not read either.
    #[must_use]
    pub fn wants_bytes(&self) -> bool {
        let open = matches!(self.state, State::Idle | State::Head { .. } | State::Lingering { .. });
        open && self.unsent.is_none() && !self.half_closed
    }

    /// At the cap: how gladly it makes room at `now`, the smallest first; `None`: it is busy.
    ///
    /// Connections that are as good as closed go first, then keep-alive ones (longest idle first), then
    /// heads that are unfinished [`HEAD_GRACE`] after their connection was accepted (oldest first), then clients
    /// whose replies wait for [`UNREAD_GRACE`] to be read (longest first): who asks and never reads needs no token.
    #[must_use]
    pub fn makes_room(&self, now: Mono) -> Option<(u8, Mono)> {
        if let Some((_, since)) = &self.unsent {
            return (now >= since.after(UNREAD_GRACE)).then_some((3, *since));
        }
        match (&self.state, self.idle_since) {
            (State::Lingering { until }, _) => Some((0, *until)),
            (State::Idle, Some(since)) => Some((1, since)),
            (State::Idle | State::Head { .. }, _) if now >= self.accepted.after(HEAD_GRACE) => {
                Some((2, self.accepted))
            }
            _ => None,
        }
    }

    /// When [`Inbound::makes_room`] may change by itself.
    #[must_use]
    pub fn makes_room_at(&self) -> Mono {
        match (&self.unsent, &self.state) {
            (Some((_, since)), _) => since.after(UNREAD_GRACE),
            (None, State::Idle | State::Head { .. }) => self.accepted.after(HEAD_GRACE),
            (None, _) => Mono::NEVER,
        }
    }

    /// Bytes of memory that its unfinished head takes.
    #[must_use]
    pub fn head_bytes(&self) -> usize {
        match &self.state {
            State::Head { bytes, .. } => bytes.allocated(),
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Mono {
        Mono::from_micros(ms * 1000)
    }

    #[test]
    fn deadlines() {
        let mut conn = Inbound::new(false, at(0));
        assert_eq!(conn.deadline(), at(10_000));
        conn.state = State::Head { bytes: Inbound::input(), until: at(5_100) };
        assert_eq!(conn.deadline(), at(5_100));
        conn.state = State::Idle;
        conn.idle_since = Some(at(1_000));
        assert_eq!(conn.deadline(), at(76_000));
        conn.state = State::Closing { linger: true };
        assert_eq!(conn.deadline(), Mono::NEVER);
        conn.unsent = Some((Inbound::input(), at(1_000)));
        assert_eq!(conn.deadline(), at(11_000));
        assert!(!conn.wants_bytes());
    }

    #[test]
    fn who_makes_room_first() {
        let new = Inbound::new(false, at(0));
        assert_eq!(new.makes_room(at(999)), None);
        assert_eq!(new.makes_room(at(1000)), Some((2, at(0))));
        assert_eq!(new.makes_room_at(), at(1000));
        let idle = Inbound { idle_since: Some(at(500)), ..Inbound::new(false, at(0)) };
        assert!(idle.makes_room(at(501)) < new.makes_room(at(1000)));
        let waiting =
            State::Waiting { rest: Inbound::input(), pending: Pending { shown: "".into(), since: at(0) } };
        assert_eq!(Inbound { state: waiting, ..Inbound::new(true, at(0)) }.makes_room(at(9000)), None);
        let unread = Inbound { unsent: Some((Inbound::input(), at(1))), ..Inbound::new(false, at(0)) };
        assert_eq!(unread.makes_room(at(1000)), None, "a reply is on its way");
        assert_eq!(unread.makes_room_at(), at(1001));
        assert_eq!(unread.makes_room(at(1001)), Some((3, at(1))));
    }
}
