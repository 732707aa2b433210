//! The shipped event loop over a wire that is a few lines long: no kernel, no clock, no randomness, so that what
//! is counted is the agent's own work and the same every time. Shared by the instruction count
//! (`benches/hit/main.rs`) and by the test that a hit allocates nothing (`tests/no_allocation.rs`).

use kms_agent::broker::Broker;
use kms_agent::config::{Config, HostPort, ResponseType};
use kms_agent::identity::Identity;
use kms_agent::log::LogHandle;
use kms_agent::net::{Event, Net, Readiness, Token};
use kms_agent::random::Random;
use kms_agent::secret::Secret;
use kms_agent::server::{Host, Server};
use kms_agent::time::{Mono, Now};
use rustls::ClientConfig;
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// What a keep-alive client sends: wrk's head, with the token.
pub(crate) const HIT: &str = "GET /secretsmanager/get?secretId=db HTTP/1.1\r\nHost: localhost:2025\r\n\
    X-KMS-Token: 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\r\n\r\n";
const TOKEN: &[u8] = b"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
/// Clients that ask in turn.
const CLIENTS: usize = 50;
const UNIX_S: i64 = 1_700_000_000;
/// Bytes of the secret's `SecretData`.
const DATA_BYTES: usize = 400;

/// A socket of the wire: bytes that wait to be read.
#[derive(Default)]
struct Socket {
    incoming: Vec<u8>,
    at: usize,
}

/// The network: clients that send [`HIT`] whenever they are told to, a metadata service and KMS in plain text.
pub(crate) struct Wire {
    now: Now,
    events: VecDeque<Event>,
    clients_to_come: usize,
    clients: Vec<Token>,
    sockets: Vec<Socket>,
    request: &'static str,
    /// Replies that began with 200, and their bytes.
    pub(crate) replies: u64,
    pub(crate) reply_bytes: u64,
}

impl Wire {
    fn new() -> Wire {
        Wire {
            now: Now { mono: Mono::from_micros(3_600_000_000), unix_s: UNIX_S },
            events: VecDeque::with_capacity(2 * CLIENTS),
            clients_to_come: CLIENTS,
            clients: Vec::with_capacity(CLIENTS),
            sockets: (0..1024).map(|_| Socket::default()).collect(),
            request: HIT,
            replies: 0,
            reply_bytes: 0,
        }
    }

    fn readable(&mut self, token: Token, bytes: &[u8]) {
        let socket = &mut self.sockets[token.slot as usize];
        socket.incoming.clear();
        socket.incoming.extend_from_slice(bytes);
        socket.at = 0;
        self.events.push_back(Event::Socket(token, Readiness { readable: true, ..Readiness::default() }));
    }

    /// All clients ask once.
    fn ask(&mut self) {
        for at in 0..self.clients.len() {
            self.readable(self.clients[at], self.request.as_bytes());
        }
    }

    fn upstream(&mut self, token: Token, request: &[u8]) {
        let request = String::from_utf8_lossy(request);
        let body = if request.starts_with("PUT /latest/api/token") {
            "metadata-token".to_owned()
        } else if request.contains("/security-credentials/") {
            r#"{"Code":"Success","AccessKeyId":"STS.a","AccessKeySecret":"b","SecurityToken":"c",
                "Expiration":"2099-01-01T00:00:00Z"}"#
                .to_owned()
        } else {
            format!(
                r#"{{"SecretName":"db","VersionId":"v1","SecretData":"{}","SecretDataType":"text","VersionStages":{{"VersionStage":["ACSCurrent"]}},"CreateTime":"2023-07-23T11:56:29Z","RequestId":"6a3e9c36"}}"#,
                "x".repeat(DATA_BYTES)
            )
        };
        let reply = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        self.readable(token, reply.as_bytes());
    }
}

impl Net for Wire {
    fn now(&self) -> Now {
        self.now
    }

    fn wait(&mut self, _: Option<Duration>, events: &mut Vec<Event>) -> io::Result<()> {
        events.extend(self.events.drain(..));
        Ok(())
    }

    fn listeners(&self) -> usize {
        1
    }

    fn accept(&mut self, _: usize, token: Token) -> io::Result<()> {
        if self.clients_to_come == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.clients_to_come -= 1;
        self.clients.push(token);
        Ok(())
    }

    fn stop_listening(&mut self) {}

    fn resolve(&mut self, host: &str, port: u16) {
        let result = Ok(vec![SocketAddr::from(([127, 0, 0, 1], port))]);
        self.events.push_back(Event::Resolved { host: host.to_owned(), port, result });
    }

    fn connect(&mut self, token: Token, _: SocketAddr) -> io::Result<()> {
        self.events.push_back(Event::Socket(token, Readiness { writable: true, ..Readiness::default() }));
        Ok(())
    }

    fn connected(&mut self, _: Token) -> io::Result<()> {
        Ok(())
    }

    fn read(&mut self, token: Token, into: &mut [u8]) -> io::Result<usize> {
        let socket = &mut self.sockets[token.slot as usize];
        let rest = &socket.incoming[socket.at..];
        if rest.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let count = rest.len().min(into.len());
        into[..count].copy_from_slice(&rest[..count]);
        socket.at += count;
        Ok(count)
    }

    fn write(&mut self, token: Token, bytes: &[u8]) -> io::Result<usize> {
        if bytes.starts_with(b"HTTP/1.1 200") {
            self.replies += 1;
            self.reply_bytes += bytes.len() as u64;
        } else if !bytes.starts_with(b"HTTP/1.1") {
            self.upstream(token, bytes);
        }
        Ok(bytes.len())
    }

    fn shutdown(&mut self, _: Token) {}

    fn close(&mut self, _: Token) {}
}

struct Process {
    log: Option<LogHandle>,
}

impl Host for Process {
    fn poll_token(&mut self) -> Option<Secret> {
        None
    }

    fn on_tick_end(&mut self) {
        if let Some(log) = &self.log {
            log.flush();
        }
    }

    fn on_reload(&mut self) -> Option<Arc<ClientConfig>> {
        None
    }
}

/// The agent with `db` in its cache and [`CLIENTS`] connections that have been served.
pub(crate) struct Agent {
    server: Server<Wire>,
    events: Vec<Event>,
}

impl Agent {
    /// `log`: the process's log, where one is set up.
    #[must_use]
    pub(crate) fn start(response_type: ResponseType, log: Option<LogHandle>) -> Agent {
        let mut config = Config::default();
        config.server.response_type = response_type;
        config.kms.endpoint = Some(HostPort { host: "kms.bench".into(), port: 443 });
        config.kms.role_name = Some("app".into());
        let identity = Identity::from_config(&config.kms, &|_| None, Random::from_seed(2)).expect("a role");
        let broker = Broker::new(&config, Secret::from(TOKEN), identity, Random::from_seed(1));
        let host = Box::new(Process { log });
        let server = Server::new(Wire::new(), broker, 800, None, host);
        let mut agent = Agent { server, events: Vec::with_capacity(1024) };
        for _ in 0..20 {
            agent.tick();
        }
        agent.server.net_mut().ask();
        while agent.server.net_mut().replies < CLIENTS as u64 {
            agent.tick();
        }
        agent
    }

    fn tick(&mut self) {
        assert!(self.server.tick(&mut self.events).unwrap());
    }

    /// `rounds` ticks in each of which every client asks once; gives the hits.
    pub(crate) fn serve(&mut self, rounds: u64) -> u64 {
        let before = self.server.net_mut().replies;
        for _ in 0..rounds {
            self.server.net_mut().ask();
            self.tick();
        }
        let hits = self.server.net_mut().replies - before;
        assert_eq!(hits, rounds * CLIENTS as u64, "every request is a hit");
        hits
    }
}
