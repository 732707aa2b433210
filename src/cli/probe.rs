//! One call to KMS or the metadata service as the agent itself makes it, carried by blocking sockets: the
//! connection's states, time limits and words for a failure are those of [`Outbound`].

use crate::call::{CALL_LIFE, Call, CallError, CallId, Service};
use crate::config::HostPort;
use crate::conn::outbound::{Outbound, Step};
use crate::http::response::Response;
use crate::log::Reason;
use crate::net::resolve::Resolver;
use crate::time::{Clock, Now};
use rustls::ClientConfig;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;
use zeroize::Zeroize as _;

/// How far a call came.
#[derive(Debug)]
pub(super) struct ProbeResult {
    /// What the name stands for; empty where it could not be looked up.
    pub(super) addresses: Vec<SocketAddr>,
    /// The address that accepted.
    pub(super) connected: Option<SocketAddr>,
    /// A request could be sent: with TLS, the server is who it should be.
    pub(super) secured: bool,
    pub(super) result: Result<Response, CallError>,
}

pub(super) struct Prober {
    clock: Clock,
    tls: Arc<ClientConfig>,
}

impl Prober {
    #[expect(clippy::disallowed_methods, reason = "a command has no loop that could hand it the time")]
    pub(super) fn new(tls: Arc<ClientConfig>) -> Prober {
        Prober { clock: Clock::start(), tls }
    }

    pub(super) fn now(&self) -> Now {
        self.clock.now()
    }

    /// Makes one call; `request` writes what is to be sent.
    pub(super) fn call(
        &self,
        service: Service,
        origin: &HostPort,
        request: &mut dyn FnMut(&mut Vec<u8>) -> Result<(), CallError>,
    ) -> ProbeResult {
        let mut outcome = ProbeResult {
            addresses: Vec::new(),
            connected: None,
            secured: false,
            result: Err(CallError::unreachable("reach", origin, "not tried")),
        };
        let begun = self.now().mono;
        let deadline = begun.after(CALL_LIFE);
        let call = Call { id: CallId(0), service, origin: Rc::new(origin.clone()), deadline };
        let mut conn = Outbound::new(call, begun);
        let mut step = match look_up(origin, service.timeouts().resolve) {
            Some(found) => {
                outcome.addresses = found.clone().unwrap_or_default();
                conn.on_resolved(&found, self.now().mono)
            }
            None => conn.on_time(self.now().mono),
        };
        let mut socket: Option<TcpStream> = None;
        outcome.result = loop {
            step = match step {
                Step::Connect(address) => {
                    socket = None;
                    match TcpStream::connect_timeout(&address, self.left(&conn)) {
                        Ok(stream) => {
                            outcome.connected = Some(address);
                            socket = Some(stream);
                            let tls = service.uses_tls().then(|| Arc::clone(&self.tls));
                            conn.on_connected(tls, self.now().mono)
                        }
                        Err(error) if is_timeout(&error) => conn.on_time(self.now().mono),
                        Err(error) => conn.on_connect_failed(&error, self.now().mono),
                    }
                }
                Step::SendRequest => {
                    outcome.secured = true;
                    conn.request(|_, out| request(out))
                }
                Step::Wait => match &mut socket {
                    Some(stream) => self.exchange(&mut conn, stream),
                    None => Step::Closed,
                },
                Step::Replied { response, .. } => break Ok(response),
                Step::Failed(_, error) => break Err(error),
                Step::Closed | Step::Again(_) => {
                    break Err(CallError::unreachable("reply of", origin, "the connection was closed"));
                }
            };
        };
        conn.say_goodbye();
        if let Some(stream) = &mut socket {
            // Whether the peer hears it changes nothing.
            let _ = stream.write_all(conn.pending());
        }
        outcome
    }

    /// Sends what is to be sent, then waits for bytes.
    fn exchange(&self, conn: &mut Outbound, stream: &mut TcpStream) -> Step {
        let mut scratch = [0; 16 * 1024];
        let step = match self.transfer(conn, stream, &mut scratch) {
            Ok(0) => conn.on_end(None, self.now().mono),
            Ok(count) => conn.on_bytes(scratch.get(..count).unwrap_or_default(), self.now().mono),
            Err(error) if is_timeout(&error) => conn.on_time(self.now().mono),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Step::Wait,
            Err(error) => conn.on_end(Some(&error), self.now().mono),
        };
        scratch.zeroize();
        step
    }

    fn transfer(&self, conn: &mut Outbound, stream: &mut TcpStream, into: &mut [u8]) -> io::Result<usize> {
        while !conn.pending().is_empty() {
            stream.set_write_timeout(Some(self.left(conn)))?;
            let count = stream.write(conn.pending())?;
            conn.on_sent(count);
        }
        stream.set_read_timeout(Some(self.left(conn)))?;
        stream.read(into)
    }

    /// Until the connection's next deadline; never zero, which sockets refuse.
    fn left(&self, conn: &Outbound) -> Duration {
        conn.deadline().since(self.now().mono).max(Duration::from_millis(1))
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
}

/// The addresses of a name; `None`: no answer in time. A look-up cannot be called off: the resolver's thread may be
/// left behind, and ends with the process.
fn look_up(origin: &HostPort, limit: Duration) -> Option<Result<Vec<SocketAddr>, String>> {
    let (wake, woken) = mpsc::channel();
    let resolver = match Resolver::start(move || wake.send(()).unwrap_or_default()) {
        Ok(resolver) => resolver,
        Err(error) => return Some(Err(Reason(&error).to_string())),
    };
    resolver.ask(&origin.host, origin.port);
    woken.recv_timeout(limit).ok()?;
    resolver.poll().map(|answer| answer.result)
}
