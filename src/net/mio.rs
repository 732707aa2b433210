//! [`Net`] on the real machine: mio's epoll, the system's sockets and clocks. The only user of mio.
#![expect(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "the only user of mio; gives the loop its time"
)]

use super::resolve::Resolver;
use super::{Event, Net, Readiness, Signal, Token};
use crate::time::{Clock, Now};
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Waker};
use rustix::net::{AddressFamily, SocketType, sockopt};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

/// Connections that may wait to be accepted. The kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 1024;
/// A client's socket buffers: some heads, and the largest reply. The kernel doubles them for its own needs.
const RECEIVE_BUFFER_BYTES: usize = 32 * 1024;
const SEND_BUFFER_BYTES: usize = 128 * 1024;
/// Packets to clients live for one hop: a reply never leaves the host.
const TTL: u32 = 1;
/// With `HttpPort` 0: draws until a port is free on both addresses.
const PORT_DRAWS: u32 = 8;
/// Events taken from the kernel in one wait.
const EVENTS_MAX: usize = 1024;

const WAKER: mio::Token = mio::Token(usize::MAX);
const TERMINATE: mio::Token = mio::Token(usize::MAX - 1);
const RELOAD: mio::Token = mio::Token(usize::MAX - 2);
/// Listeners count down from here.
const LISTENER: usize = usize::MAX - 16;

/// The agent's sockets.
#[derive(Debug)]
pub struct MioNet {
    poll: Poll,
    events: Events,
    clock: Clock,
    listeners: Vec<TcpListener>,
    /// By slot: the generation that lives there, and its socket.
    sockets: Vec<Option<(u32, TcpStream)>>,
    resolver: Resolver,
    terminate: mio::net::UnixStream,
    reload: mio::net::UnixStream,
}

impl MioNet {
    /// Takes bound listeners, catches SIGTERM, SIGINT and SIGHUP from now on.
    ///
    /// # Errors
    /// When the kernel has no descriptor, thread or memory for it.
    pub fn new(listeners: Vec<std::net::TcpListener>) -> io::Result<MioNet> {
        let poll = Poll::new()?;
        let registry = poll.registry();
        let waker = Arc::new(Waker::new(registry, WAKER)?);
        let resolver = Resolver::start(move || {
            // A full eventfd is awake already.
            let _ = waker.wake();
        })?;
        let mut terminate = catch(&[SIGTERM, SIGINT])?;
        registry.register(&mut terminate, TERMINATE, Interest::READABLE)?;
        let mut reload = catch(&[SIGHUP])?;
        registry.register(&mut reload, RELOAD, Interest::READABLE)?;
        let mut listeners: Vec<TcpListener> = listeners.into_iter().map(TcpListener::from_std).collect();
        for (number, listener) in listeners.iter_mut().enumerate() {
            registry.register(listener, mio::Token(LISTENER - number), Interest::READABLE)?;
        }
        Ok(MioNet {
            poll,
            events: Events::with_capacity(EVENTS_MAX),
            clock: Clock::start(),
            listeners,
            sockets: Vec::new(),
            resolver,
            terminate,
            reload,
        })
    }

    fn socket(&mut self, token: Token) -> io::Result<&mut TcpStream> {
        match self.sockets.get_mut(token.slot as usize) {
            Some(Some((generation, stream))) if *generation == token.generation => Ok(stream),
            _ => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn insert(&mut self, token: Token, mut stream: TcpStream) -> io::Result<()> {
        let slot = token.slot as usize;
        // Both interests at once and for good: with edges, readiness that nobody wants costs nothing.
        let interest = Interest::READABLE | Interest::WRITABLE;
        let name = usize::try_from(token.to_bits()).map_err(io::Error::other)?;
        self.poll.registry().register(&mut stream, mio::Token(name), interest)?;
        if self.sockets.len() <= slot {
            self.sockets.resize_with(slot + 1, || None);
        }
        if let Some(place) = self.sockets.get_mut(slot) {
            *place = Some((token.generation, stream));
        }
        Ok(())
    }
}

/// A pipe that becomes readable when one of the signals comes.
fn catch(signals: &[i32]) -> io::Result<mio::net::UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    theirs.set_nonblocking(true)?;
    for signal in signals {
        signal_hook::low_level::pipe::register(*signal, theirs.try_clone()?)?;
    }
    Ok(mio::net::UnixStream::from_std(ours))
}

fn drain(pipe: &mut mio::net::UnixStream) {
    let mut bytes = [0; 64];
    while pipe.read(&mut bytes).is_ok_and(|count| count > 0) {}
}

/// Binds 127.0.0.1 and, where the host has it, `[::1]`, both on `port`; port 0 is any free one, the same
/// for both.
///
/// # Errors
/// When 127.0.0.1 cannot be bound, or `[::1]` exists and cannot.
pub fn listen(port: u16) -> io::Result<Vec<std::net::TcpListener>> {
    for _ in 0..PORT_DRAWS {
        match listen_once(port) {
            // The port that was free on 127.0.0.1 is taken on [::1]: draw another.
            Err(error) if port == 0 && error.kind() == io::ErrorKind::AddrInUse => {}
            listening => return listening,
        }
    }
    listen_once(port)
}

fn listen_once(port: u16) -> io::Result<Vec<std::net::TcpListener>> {
    let v4 = bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))?;
    let port = v4.local_addr()?.port();
    match bind(SocketAddr::from((Ipv6Addr::LOCALHOST, port))) {
        Ok(v6) => Ok(vec![v4, v6]),
        // Switched off, or loopback without it.
        Err(error) if is_without_ipv6(&error) => Ok(vec![v4]),
        Err(error) => Err(error),
    }
}

fn is_without_ipv6(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
        || error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error())
}

fn bind(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    // Set here, inherited by every accepted socket: two system calls less for each.
    sockopt::set_tcp_nodelay(&socket, true)?;
    // Kernel memory is the host's too: what a client sends ahead or leaves unread is bounded by these.
    sockopt::set_socket_recv_buffer_size(&socket, RECEIVE_BUFFER_BYTES)?;
    sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER_BYTES)?;
    if address.is_ipv4() {
        sockopt::set_ip_ttl(&socket, TTL)?;
    } else {
        sockopt::set_ipv6_v6only(&socket, true)?;
        sockopt::set_ipv6_unicast_hops(&socket, Some(1))?;
    }
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(std::net::TcpListener::from(socket))
}

impl Net for MioNet {
    fn now(&self) -> Now {
        self.clock.now()
    }

    fn wait(&mut self, timeout: Option<Duration>, events: &mut Vec<Event>) -> io::Result<()> {
        match self.poll.poll(&mut self.events, timeout) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(error),
        }
        for event in &self.events {
            match event.token() {
                WAKER => {
                    while let Some(it) = self.resolver.poll() {
                        events.push(Event::Resolved { host: it.host, port: it.port, result: it.result });
                    }
                }
                TERMINATE => {
                    drain(&mut self.terminate);
                    events.push(Event::Signal(Signal::Terminate));
                }
                RELOAD => {
                    drain(&mut self.reload);
                    events.push(Event::Signal(Signal::Reload));
                }
                mio::Token(name) if name > LISTENER - 16 && name <= LISTENER => {
                    events.push(Event::Acceptable(LISTENER - name));
                }
                mio::Token(name) => {
                    let token = Token::from_bits(name as u64);
                    let ready = Readiness {
                        readable: event.is_readable() || event.is_read_closed() || event.is_error(),
                        writable: event.is_writable() || event.is_error(),
                        read_closed: event.is_read_closed(),
                        gone: event.is_error() || event.is_read_closed() && event.is_write_closed(),
                    };
                    events.push(Event::Socket(token, ready));
                }
            }
        }
        Ok(())
    }

    fn listeners(&self) -> usize {
        self.listeners.len()
    }

    fn accept(&mut self, listener: usize, token: Token) -> io::Result<()> {
        let listener = self.listeners.get(listener).ok_or(io::ErrorKind::WouldBlock)?;
        let (stream, _) = listener.accept()?;
        self.insert(token, stream)
    }

    fn stop_listening(&mut self) {
        for mut listener in self.listeners.drain(..) {
            // Closing it takes it out of epoll in any case.
            let _ = self.poll.registry().deregister(&mut listener);
        }
    }

    fn resolve(&mut self, host: &str, port: u16) {
        self.resolver.ask(host, port);
    }

    fn connect(&mut self, token: Token, address: SocketAddr) -> io::Result<()> {
        let stream = TcpStream::connect(address)?;
        // A request is one write; waiting for an acknowledgement would only add latency.
        let _ = stream.set_nodelay(true);
        self.insert(token, stream)
    }

    fn connected(&mut self, token: Token) -> io::Result<()> {
        let stream = self.socket(token)?;
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
        match stream.peer_addr() {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotConnected => {
                Err(io::ErrorKind::WouldBlock.into())
            }
            Err(error) => Err(error),
        }
    }

    fn read(&mut self, token: Token, into: &mut [u8]) -> io::Result<usize> {
        self.socket(token)?.read(into)
    }

    fn write(&mut self, token: Token, bytes: &[u8]) -> io::Result<usize> {
        self.socket(token)?.write(bytes)
    }

    fn shutdown(&mut self, token: Token) {
        if let Ok(stream) = self.socket(token) {
            let _ = stream.shutdown(Shutdown::Write);
        }
    }

    fn close(&mut self, token: Token) {
        if self.socket(token).is_ok()
            && let Some(place) = self.sockets.get_mut(token.slot as usize)
        {
            // Dropping the stream closes it, and closing takes it out of epoll.
            *place = None;
        }
    }
}
