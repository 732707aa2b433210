//! The floor of the house: sockets, names and clocks behind one small trait.
//!
//! [`mio::MioNet`] ships. Whatever implements [`Net`] may be edge-triggered: after a readiness the server
//! reads or writes until `WouldBlock`, a short count, or until it has reasons of its own to stop.

pub mod mio;
pub mod resolve;

use crate::time::Now;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

/// Names a socket: a slot of the server's, and the generation of what lives there, so that an event for
/// a socket that is gone cannot hit its successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token {
    /// Position in the server's slab.
    pub slot: u32,
    /// Counts the slot's tenants.
    pub generation: u32,
}

impl Token {
    /// Both in one number.
    #[must_use]
    pub const fn to_bits(self) -> u64 {
        ((self.generation as u64) << 32) | self.slot as u64
    }

    /// The inverse of [`Token::to_bits`].
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the two halves of the number")]
    pub const fn from_bits(bits: u64) -> Token {
        Token { slot: bits as u32, generation: (bits >> 32) as u32 }
    }
}

/// What a socket is ready for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// There are bytes, an end or an error to be read.
    pub readable: bool,
    /// Bytes can be written, or a connect has an outcome.
    pub writable: bool,
    /// The peer will send no more.
    pub read_closed: bool,
    /// The peer is gone: nothing that is sent will arrive.
    pub gone: bool,
}

/// What the operating system asks of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM or SIGINT: finish and end.
    Terminate,
    /// SIGHUP: read again what can be read again.
    Reload,
}

/// Something happened.
#[derive(Debug)]
pub enum Event {
    /// A listener has connections to accept.
    Acceptable(usize),
    /// A socket is ready.
    Socket(Token, Readiness),
    /// A name was looked up.
    Resolved {
        /// The name that was asked.
        host: String,
        /// The port that was asked with it.
        port: u16,
        /// Its addresses, or why there are none.
        result: Result<Vec<SocketAddr>, String>,
    },
    /// A signal came.
    Signal(Signal),
}

/// The verbs that the server needs; errors are those of the system calls.
pub trait Net {
    /// Both clocks.
    fn now(&self) -> Now;

    /// Waits for events, at most for `timeout`, and appends them.
    ///
    /// # Errors
    /// When waiting itself fails; the agent cannot go on then.
    fn wait(&mut self, timeout: Option<Duration>, events: &mut Vec<Event>) -> io::Result<()>;

    /// How many listeners there are; they are numbered from 0.
    fn listeners(&self) -> usize;

    /// Takes the next connection of a listener, as `token`.
    ///
    /// # Errors
    /// `WouldBlock`: there is none.
    fn accept(&mut self, listener: usize, token: Token) -> io::Result<()>;

    /// Stops listening.
    fn stop_listening(&mut self);

    /// Looks a name up; the answer is an [`Event::Resolved`].
    fn resolve(&mut self, host: &str, port: u16);

    /// Begins to connect `token`; a writable event tells that there is an outcome.
    ///
    /// # Errors
    /// When it fails at once.
    fn connect(&mut self, token: Token, address: SocketAddr) -> io::Result<()>;

    /// The outcome of [`Net::connect`].
    ///
    /// # Errors
    /// `WouldBlock`: none yet.
    fn connected(&mut self, token: Token) -> io::Result<()>;

    /// Reads; 0 is the end.
    ///
    /// # Errors
    /// `WouldBlock`: nothing there.
    fn read(&mut self, token: Token, into: &mut [u8]) -> io::Result<usize>;

    /// Writes.
    ///
    /// # Errors
    /// `WouldBlock`: no room.
    fn write(&mut self, token: Token, bytes: &[u8]) -> io::Result<usize>;

    /// Sends an end; reading goes on. Failures do not matter: closing follows.
    fn shutdown(&mut self, token: Token);

    /// Closes; the token is void from now on.
    fn close(&mut self, token: Token);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_packing() {
        for token in [Token { slot: 0, generation: 0 }, Token { slot: 7, generation: u32::MAX }] {
            assert_eq!(Token::from_bits(token.to_bits()), token);
        }
    }
}
