//! The agent's clients: each has one connection and a manner of its own.

use super::faults::Fault;
use super::net::{Conn, Peer};
use super::world::{ConnId, Ev, SECOND, World};
use kms_agent::config::ResponseType;

pub type ClientId = usize;

/// How a client behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// One request at a time, keep-alive.
    Steady,
    /// All at once.
    Pipeline,
    /// A few bytes at a time.
    Trickle,
    /// Connects, perhaps begins a head, and says no more.
    Silent,
    /// Is gone before its reply.
    Vanish,
    /// Closes its side after its requests, and reads on.
    HalfClose,
    /// Asks for a lot and reads nothing.
    NeverRead,
    /// Asks for a lot and reads a little at a time.
    SlowRead,
    /// What is no HTTP, perhaps after requests that are.
    Garbage,
}

const STYLES: [(Style, Fault); 9] = [
    (Style::Steady, Fault::ClientSteady),
    (Style::Pipeline, Fault::ClientPipelines),
    (Style::Trickle, Fault::ClientTrickles),
    (Style::Silent, Fault::ClientSilent),
    (Style::Vanish, Fault::ClientVanishes),
    (Style::HalfClose, Fault::ClientHalfCloses),
    (Style::NeverRead, Fault::ClientNeverReads),
    (Style::SlowRead, Fault::ClientReadsSlowly),
    (Style::Garbage, Fault::ClientGarbage),
];

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// A key, perhaps with `refreshNow`.
    Secret {
        key: usize,
        refresh: bool,
    },
    Ping,
    NotFound,
    BadMethod,
    BadParameter,
    BadHost,
    Forwarded,
    /// No request at all.
    Garbage,
}

/// A request in a client's stream, and what the agent knows of it.
#[derive(Clone, Debug)]
pub struct Unit {
    pub ask: Ask,
    /// Number of the token that it shows; `None`: one that never was any.
    pub token: Option<usize>,
    pub head: bool,
    pub close: bool,
    pub http10: bool,
    /// One of the last: it must succeed.
    pub verifies: bool,
    /// Where in the client's stream.
    pub begin: u64,
    pub end: u64,
    /// When the agent had read it whole.
    pub read: Option<super::world::Stamp>,
    /// When it came nothing was in its way, and the cache held this for it.
    pub expects: Option<usize>,
}

#[derive(Debug)]
pub struct Client {
    pub style: Style,
    conn: Option<ConnId>,
    asks: Vec<Ask>,
    sent: usize,
    received: usize,
    think_us: u64,
    verifies: bool,
    done: bool,
    reading_begun: bool,
}

impl World {
    /// The clients of the faulty part.
    pub fn add_clients(&mut self, span_us: u64) {
        let heavy = self.rng.chance(150);
        let count = if heavy { self.rng.range(30, 60) } else { self.rng.range(2, 25) };
        let mut at_us = 0;
        let burst = self.rng.chance(300);
        let favourite = self.rng.pick(&STYLES);
        for _ in 0..count {
            // A burst has all of them come together, and for the same.
            if !burst || self.rng.chance(200) {
                at_us = self.rng.range(0, span_us);
            } else {
                self.hit(Fault::ClientsBurst);
            }
            let (style, kind) = match self.rng.below(10) {
                0..3 => favourite,
                3..6 => STYLES[self.rng.below(2)],
                _ => self.rng.pick(&STYLES),
            };
            self.hit(kind);
            let asks = match style {
                Style::Silent => 0,
                Style::NeverRead | Style::SlowRead => self.rng.range(5, 120),
                Style::Pipeline if self.rng.chance(100) => self.rng.range(100, 700),
                _ => self.rng.range(1, 10),
            };
            let one = self.any_ask();
            let same = self.rng.chance(300);
            let mut asks: Vec<Ask> = (0..asks).map(|_| if same { one } else { self.any_ask() }).collect();
            if style == Style::Garbage {
                asks.truncate(self.rng.below(4));
                asks.push(Ask::Garbage);
            }
            let think_us = self.rng.magnitude(100, 20 * SECOND);
            self.add_client(style, asks, think_us, false, at_us);
        }
    }

    /// The last ones: each key once from memory and once from KMS.
    pub fn add_verifiers(&mut self) {
        for key in 0..self.model.keys.len() {
            let asks =
                vec![Ask::Secret { key, refresh: false }, Ask::Secret { key, refresh: true }, Ask::Ping];
            // One after the other: even one connection is enough.
            self.add_client(Style::Steady, asks, 10_000, true, key as u64 * SECOND);
        }
    }

    fn add_client(&mut self, style: Style, asks: Vec<Ask>, think_us: u64, verifies: bool, after_us: u64) {
        let id = self.clients.len();
        self.clients.push(Client {
            style,
            conn: None,
            asks,
            sent: 0,
            received: 0,
            think_us,
            verifies,
            done: false,
            reading_begun: false,
        });
        self.after(after_us, Ev::Client(id));
    }

    fn any_ask(&mut self) -> Ask {
        match self.rng.below(20) {
            0 => Ask::Ping,
            1 => self.rng.pick(&[
                Ask::NotFound,
                Ask::BadMethod,
                Ask::BadParameter,
                Ask::BadHost,
                Ask::Forwarded,
            ]),
            other => {
                let refresh = other < 5;
                // The first keys are asked for most.
                let keys = self.model.keys.len();
                let key = self.rng.below(keys).min(self.rng.below(keys));
                Ask::Secret { key, refresh }
            }
        }
    }

    /// A client's next step.
    pub fn client_goes(&mut self, client: ClientId) {
        if self.clients[client].done {
            return;
        }
        let Some(id) = self.clients[client].conn else { return self.client_connects(client) };
        let style = self.clients[client].style;
        if self.calmed && !self.clients[client].verifies {
            // Everybody comes to an end now.
            let one = &mut self.clients[client];
            one.asks.truncate(one.sent);
        }
        let left = self.clients[client].asks.len() - self.clients[client].sent;
        match style {
            Style::Steady | Style::Trickle => {
                if left == 0 {
                    let reset = self.rng.chance(100);
                    return self.client_quits(client, reset);
                }
                self.client_sends(client, 1);
            }
            Style::Pipeline | Style::NeverRead | Style::SlowRead | Style::Garbage => {
                self.client_sends(client, left);
                if style == Style::SlowRead && !self.clients[client].reading_begun {
                    self.clients[client].reading_begun = true;
                    self.after(1000, Ev::ClientReads(client));
                }
            }
            Style::HalfClose => {
                self.client_sends(client, left);
                let latency = self.rng.pick(&[0, 0, 1, 5_000, 400_000]);
                self.send(id, latency, Ev::Fin(id, None));
                self.conns[id].talk.client_fin = true;
            }
            Style::Vanish => {
                self.client_sends(client, left);
                let (after, reset) = (self.rng.magnitude(1, 10 * SECOND), self.rng.chance(500));
                self.after(after, Ev::ClientQuits(client, reset));
            }
            Style::Silent => {
                if self.rng.chance(500) {
                    let part = b"GET /v1/db-0 HTTP/1.1\r\nHost: local";
                    let count = self.rng.below(part.len()) + 1;
                    let latency = self.rng.magnitude(1, 12 * SECOND);
                    self.send(id, latency, Ev::Bytes(id, part[..count].to_vec(), None));
                    if self.rng.chance(400) {
                        // Its end is told with its last bytes, or soon after.
                        let after = self.rng.pick(&[0, 0, 10, 100_000]);
                        self.send(id, after, Ev::Fin(id, None));
                    }
                }
            }
        }
    }

    fn client_connects(&mut self, client: ClientId) {
        // A small window makes a slow reader felt.
        let window = match self.clients[client].style {
            Style::NeverRead | Style::SlowRead => self.rng.magnitude(64, 100_000),
            _ => self.rng.magnitude(2_000, 2_000_000),
        };
        let id = self.conns.len();
        self.conns.push(Conn::new(Peer::Client(client), window));
        self.clients[client].conn = Some(id);
        let latency = self.latency();
        let at = self.send(id, latency, Ev::Knock(id));
        self.say(|| format!("client {client} ({:?}) connects as {id}", self.clients[client].style));
        self.at(at, Ev::Client(client));
    }

    /// Sends the next `count` requests.
    fn client_sends(&mut self, client: ClientId, count: usize) {
        let Some(id) = self.clients[client].conn else { return };
        let mut bytes = Vec::new();
        for _ in 0..count {
            let ask = self.clients[client].asks[self.clients[client].sent];
            self.clients[client].sent += 1;
            let begin = self.conns[id].talk.sent_total;
            let verifies = self.clients[client].verifies;
            let unit = self.write_unit(ask, verifies, begin, &mut bytes);
            self.conns[id].talk.sent_total = unit.end;
            let closes = unit.close;
            self.conns[id].talk.units.push(unit);
            if closes {
                // What came after it would never be answered.
                let client = &mut self.clients[client];
                client.asks.truncate(client.sent);
                break;
            }
        }
        let trickles = self.clients[client].style == Style::Trickle;
        let gap_us = if trickles { self.rng.magnitude(100, 2 * SECOND) } else { 0 };
        let in_one = self.rng.chance(600);
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let count = if trickles {
                self.rng.below(40) + 1
            } else if in_one {
                rest.len()
            } else {
                self.rng.below(rest.len()) + 1
            };
            let (part, more) = rest.split_at(count.min(rest.len()));
            let latency = self.latency();
            let base = self.conns[id].talk.last_sent_us.max(self.now_us) - self.now_us;
            let at = self.send(id, base + gap_us + latency, Ev::Bytes(id, part.to_vec(), None));
            if trickles {
                self.conns[id].talk.last_sent_us = at;
            }
            rest = more;
        }
    }

    fn write_unit(&mut self, ask: Ask, verifies: bool, begin: u64, out: &mut Vec<u8>) -> Unit {
        let before = out.len();
        let plain = verifies || self.rng.chance(700);
        let newest = self.model.tokens.len() - 1;
        let token = match self.rng.below(20) {
            0 if !verifies => {
                self.hit(Fault::ClientWrongToken);
                None
            }
            1 if !verifies && newest > 0 => {
                self.hit(Fault::ClientOldToken);
                Some(self.rng.below(newest))
            }
            _ => Some(newest),
        };
        let head = !plain && self.rng.chance(200) && !matches!(ask, Ask::BadMethod | Ask::Garbage);
        let http10 = !plain && self.rng.chance(200);
        let close = !plain && self.rng.chance(100) || ask == Ask::Garbage;
        if ask == Ask::Garbage {
            self.write_garbage(out);
        } else {
            self.write_request(ask, token, (head, http10, close), out);
        }
        let end = begin + (out.len() - before) as u64;
        // HTTP/1.0 keeps a connection only if asked to.
        Unit { ask, token, head, close, http10, verifies, begin, end, read: None, expects: None }
    }

    fn write_request(
        &mut self,
        ask: Ask,
        token: Option<usize>,
        (head, http10, close): (bool, bool, bool),
        out: &mut Vec<u8>,
    ) {
        let method = if head { "HEAD" } else { "GET" };
        let (mut method, mut more) = (method, String::new());
        let mut host = self.rng.pick(&["localhost", "127.0.0.1:2025", "[::1]"]);
        let target = match ask {
            Ask::Secret { key, refresh } => {
                if refresh {
                    self.hit(Fault::ClientRefreshes);
                }
                let aws = self.set.response_type == ResponseType::Aws;
                let way = self.rng.below(2);
                self.model.keys[key].target(way, refresh, aws)
            }
            Ask::Ping => "/ping".to_owned(),
            Ask::NotFound => "/nothing/here".to_owned(),
            Ask::BadMethod => {
                method = "DELETE";
                "/v1/db-0".to_owned()
            }
            Ask::BadParameter => "/v1/db-0?colour=red".to_owned(),
            Ask::BadHost => {
                host = "evil.example";
                "/v1/db-0".to_owned()
            }
            Ask::Forwarded => {
                more.push_str("X-Forwarded-For: 1.2.3.4\r\n");
                "/v1/db-0".to_owned()
            }
            Ask::Garbage => unreachable!("written elsewhere"),
        };
        let version = if http10 { "1.0" } else { "1.1" };
        if close {
            more.push_str("Connection: close\r\n");
        } else if http10 {
            more.push_str("Connection: keep-alive\r\n");
        }
        if self.rng.chance(50) {
            let filler = "x".repeat(self.rng.below(6000));
            more.push_str(&format!("X-Filler: {filler}\r\n"));
        }
        let header = self.rng.pick(&["X-KMS-Token", "x-vault-token"]);
        let token = match token {
            Some(number) => self.model.tokens[number].1.clone(),
            None => "hush-wrong".to_owned(),
        };
        out.extend_from_slice(
            format!("{method} {target} HTTP/{version}\r\nHost: {host}\r\n{header}: {token}\r\n{more}\r\n")
                .as_bytes(),
        );
    }

    fn write_garbage(&mut self, out: &mut Vec<u8>) {
        match self.rng.below(6) {
            0 => out.extend_from_slice(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
            1 => out.extend_from_slice(b"GET /v1/db-0 HTTP/9.9\r\nHost: localhost\r\n\r\n"),
            2 => out.extend_from_slice(b"GET /v1/db-0 HTTP/1.1\r\nX-KMS-Token: hush-x\r\n\r\n"),
            3 => {
                out.extend_from_slice(b"GET /v1/db-0 HTTP/1.1\r\nHost: localhost\r\nX: ");
                out.extend(std::iter::repeat_n(b'y', 30_000));
                out.extend_from_slice(b"\r\n\r\n");
            }
            4 => out.extend_from_slice(
                b"GET /v1/db-0 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nsome body",
            ),
            _ => {
                out.extend_from_slice(b"GET /v1/");
                out.extend(std::iter::repeat_n(b'z', 9_000));
                out.extend_from_slice(b" HTTP/1.1\r\nHost: localhost\r\n\r\n");
            }
        }
    }

    /// The agent's bytes are in the client's kernel.
    pub fn client_receives(&mut self, client: ClientId) {
        match self.clients[client].style {
            Style::NeverRead | Style::SlowRead => {}
            _ => self.client_takes(client, u64::MAX),
        }
    }

    pub fn client_reads(&mut self, client: ClientId) {
        if self.clients[client].done {
            return;
        }
        let most = if self.calmed { u64::MAX } else { self.rng.magnitude(1, 50_000) };
        self.client_takes(client, most);
        let after = self.rng.magnitude(1_000, 3 * SECOND);
        self.after(if self.calmed { 1_000 } else { after }, Ev::ClientReads(client));
    }

    fn client_takes(&mut self, client: ClientId, most: u64) {
        let Some(id) = self.clients[client].conn else { return };
        let conn = &self.conns[id];
        let count = (conn.arrived_total - conn.consumed_total).min(most);
        if count == 0 {
            return;
        }
        self.consumed(id, count);
        let conn = &self.conns[id];
        let consumed = conn.consumed_total;
        let received = conn.talk.replies.iter().take_while(|(end, _)| *end <= consumed).count();
        let news = received > self.clients[client].received;
        self.clients[client].received = received;
        let one = &self.clients[client];
        if !news || received < one.sent || one.done {
            return;
        }
        // Everything asked so far is answered.
        let think_us = if one.verifies { one.think_us } else { self.rng.range(0, one.think_us) };
        match one.style {
            Style::Steady | Style::Trickle => self.after(think_us, Ev::Client(client)),
            Style::Pipeline | Style::SlowRead => {
                // Sometimes it forgets to close.
                if self.rng.chance(700) {
                    self.after(think_us, Ev::ClientQuits(client, false));
                }
            }
            Style::Silent | Style::Vanish | Style::HalfClose | Style::NeverRead | Style::Garbage => {}
        }
    }

    /// Closes its socket: what still comes is answered with a reset.
    pub fn client_quits(&mut self, client: ClientId, reset: bool) {
        let Some(id) = self.clients[client].conn else { return };
        if self.clients[client].done {
            return;
        }
        self.clients[client].done = true;
        self.conns[id].peer_gone = true;
        self.say(|| format!("client {client} quits {id}{}", if reset { " with a reset" } else { "" }));
        let latency = self.latency();
        if reset {
            self.send(id, latency, Ev::Reset(id));
        } else {
            self.send(id, latency, Ev::Fin(id, None));
        }
    }

    /// The agent has ended the connection.
    pub fn client_sees_end(&mut self, client: ClientId, reset: bool) {
        self.client_takes(client, u64::MAX);
        let Some(id) = self.clients[client].conn else { return };
        self.say(|| format!("client {client} sees the {} of {id}", if reset { "reset" } else { "end" }));
        if self.clients[client].verifies && !self.clients[client].done && self.terminated.is_none() {
            self.fail(format!("verifying client {client} lost its connection"));
        }
        if !self.clients[client].done {
            // A well-behaved one closes too; others take their time.
            let after = if self.rng.chance(800) { 0 } else { self.rng.magnitude(1000, 5 * SECOND) };
            self.after(after, Ev::ClientQuits(client, false));
        }
    }

    /// At the end: every verifier was answered in full.
    pub fn check_verifiers(&self) {
        for (number, client) in self.clients.iter().enumerate().filter(|(_, client)| client.verifies) {
            if client.received < client.asks.len() {
                self.fail(format!(
                    "verifying client {number} got {} of {} replies",
                    client.received,
                    client.asks.len()
                ));
            }
        }
    }
}
