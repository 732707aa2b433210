//! The simulated world: its clock, its heap of things to come, its peers. One per run, all of it from one seed.

use super::client::Client;
use super::faults::{Fault, Hits, Plan};
use super::model::Model;
use super::net::{Conn, Listener};
use super::rng::Rng;
use super::upstream::{Kms, Metadata};
use kms_agent::config::ResponseType;
use kms_agent::net::{Event, Readiness, Signal, Token};
use kms_agent::time::{Mono, Now};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt::Display;
use std::io::ErrorKind;
use std::net::SocketAddr;

/// The monotonic clock begins an hour in, as the real one does.
pub const BEGIN_US: u64 = 3_600_000_000;
/// The true wall clock at that moment.
pub const BEGIN_UNIX_S: i64 = 1_760_000_000;
pub const SECOND: u64 = 1_000_000;

/// Index of a connection; those that are over keep theirs.
pub type ConnId = usize;

/// When something happened: the clock, the order among the calls of the agent, and how long the machine had
/// stood still until then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    pub us: u64,
    pub op: u64,
    pub stall_us: u64,
}

/// Something to come.
#[derive(Debug)]
pub enum Ev {
    /// Bytes reach the agent; the reply with this number is complete with the last of them.
    Bytes(ConnId, Vec<u8>, Option<usize>),
    /// The peer's end reaches the agent.
    Fin(ConnId, Option<usize>),
    /// A reset reaches the agent.
    Reset(ConnId),
    /// A client's connect reaches the backlog.
    Knock(ConnId),
    /// Bytes of the agent's reach the peer.
    Arrived(ConnId, usize),
    /// The agent's end, or its reset, reaches the peer.
    Ended(ConnId, bool),
    /// A connect of the agent's has its outcome.
    Outcome(ConnId, Option<ErrorKind>),
    /// A readiness that was withheld is told now.
    Tell(ConnId),
    /// Writing works again.
    Unblock(ConnId),
    /// An event for a socket that is gone.
    Stale(Token, Readiness),
    /// A look-up ends.
    Resolved(String, u16, Result<Vec<SocketAddr>, String>),
    /// A client goes on.
    Client(usize),
    /// A client reads a little.
    ClientReads(usize),
    /// A client gives up its connection, with or without a reset.
    ClientQuits(usize, bool),
    /// KMS closes a connection that has been idle since so many requests.
    KmsClosesIdle(ConnId, usize),
    Signal(Signal),
    NewToken,
    WallClock(i64),
    Rotate(usize),
    Fate(usize, bool),
    Outage(Option<Fault>),
    MetadataOutage(Option<Fault>),
    /// The faults stop.
    Calm,
    /// Everybody else must be gone; now the last clients come.
    Verify,
}

#[derive(Debug)]
pub struct Timed {
    at_us: u64,
    seq: u64,
    ev: Ev,
}

impl PartialEq for Timed {
    fn eq(&self, other: &Timed) -> bool {
        self.seq == other.seq
    }
}

impl Eq for Timed {}

impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Timed) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timed {
    fn cmp(&self, other: &Timed) -> std::cmp::Ordering {
        (self.at_us, self.seq).cmp(&(other.at_us, other.seq))
    }
}

/// What the agent is configured to in this run.
#[derive(Clone, Debug)]
pub struct Settings {
    pub connections_max: usize,
    pub cache_entries: usize,
    pub cache_bytes: usize,
    pub ttl_us: u64,
    pub max_stale_us: u64,
    pub ignore_transient: bool,
    pub response_type: ResponseType,
    /// Everything that can be asked for fits into the cache.
    pub roomy: bool,
    /// Secrets announce their next rotation.
    pub rotations_announced: bool,
    pub region_asked: bool,
    pub named_metadata: bool,
}

pub struct World {
    pub rng: Rng,
    pub plan: Plan,
    pub hits: Hits,
    pub set: Settings,
    pub now_us: u64,
    pub wall_offset_s: i64,
    /// The wall clock was moved in this run.
    pub wall_moved: bool,
    pub op: u64,
    pub stall_us: u64,
    pub heap: BinaryHeap<Reverse<Timed>>,
    pub seq: u64,
    pub conns: Vec<Conn>,
    /// By slot: the generation that lives there, and its connection.
    pub slots: Vec<Option<(u32, ConnId)>>,
    pub ready: Vec<ConnId>,
    pub extra: Vec<Event>,
    pub listeners: [Listener; 2],
    pub listening: bool,
    pub no_descriptors_until_us: u64,
    pub resolver_busy_until_us: u64,
    pub clients: Vec<Client>,
    pub kms: Kms,
    pub metadata: Metadata,
    pub model: Model,
    pub terminated: Option<Stamp>,
    pub verified: bool,
    /// The faults have stopped.
    pub calmed: bool,
    pub idle_ticks: u32,
    /// Of the agent in this tick.
    pub calls: u32,
    pub ticks: u64,
    pub trace: u64,
    pub printing: bool,
}

impl World {
    pub fn now(&self) -> Now {
        Now { mono: Mono::from_micros(self.now_us), unix_s: self.true_unix_s() + self.wall_offset_s }
    }

    /// What a right clock shows.
    pub fn true_unix_s(&self) -> i64 {
        BEGIN_UNIX_S + i64::try_from((self.now_us - BEGIN_US) / SECOND).unwrap()
    }

    pub fn stamp(&mut self) -> Stamp {
        self.op += 1;
        Stamp { us: self.now_us, op: self.op, stall_us: self.stall_us }
    }

    pub fn at(&mut self, at_us: u64, ev: Ev) {
        self.seq += 1;
        self.heap.push(Reverse(Timed { at_us: at_us.max(self.now_us), seq: self.seq, ev }));
    }

    pub fn after(&mut self, us: u64, ev: Ev) {
        self.at(self.now_us + us, ev);
    }

    /// Whether this kind of fault happens now; counted if so.
    pub fn roll(&mut self, fault: Fault) -> bool {
        let rate = self.plan.rate(fault);
        let hit = self.rng.chance(rate);
        if hit {
            self.hit(fault);
        }
        hit
    }

    pub fn hit(&mut self, fault: Fault) {
        self.hits.0[fault as usize] += 1;
    }

    /// Something happened that may make KMS's answers fail or late at this moment.
    pub fn trouble(&mut self) {
        self.trouble_for(0);
    }

    /// The same from now on, for so long.
    pub fn trouble_for(&mut self, us: u64) {
        self.model.trouble_us = self.model.trouble_us.max(Some(self.now_us + us));
    }

    /// A hop on the machine, or in the data centre.
    pub fn latency(&mut self) -> u64 {
        if self.plan.calm { self.rng.range(20, 400) } else { self.rng.magnitude(5, 20_000) }
    }

    /// Something that must not happen has.
    #[track_caller]
    pub fn fail(&self, what: impl Display) -> ! {
        let seconds = (self.now_us - BEGIN_US) as f64 / 1e6;
        panic!("{what} [at {seconds:.6} s, tick {}]", self.ticks);
    }

    /// Part of the trace: the same seed gives the same.
    pub fn note(&mut self, what: u64, detail: u64) {
        for word in [what, detail, self.now_us] {
            self.trace = (self.trace.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
        }
    }

    pub fn note_bytes(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.trace =
                (self.trace.rotate_left(5) ^ u64::from_le_bytes(word)).wrapping_mul(0x517c_c1b7_2722_0a95);
        }
    }

    pub fn say(&self, what: impl FnOnce() -> String) {
        if self.printing {
            println!("{:13.6} {:6} {}", (self.now_us - BEGIN_US) as f64 / 1e6, self.ticks, what());
        }
    }

    /// When the next thing happens.
    pub fn next_us(&self) -> Option<u64> {
        self.heap.peek().map(|Reverse(timed)| timed.at_us)
    }

    /// Lets happen what is due.
    pub fn happen(&mut self) {
        while self.next_us().is_some_and(|at| at <= self.now_us) {
            let Some(Reverse(Timed { ev, .. })) = self.heap.pop() else { return };
            self.on(ev);
        }
    }

    fn on(&mut self, ev: Ev) {
        match ev {
            Ev::Bytes(id, bytes, mark) => self.bytes_reach_agent(id, &bytes, mark),
            Ev::Fin(id, mark) => self.fin_reaches_agent(id, mark),
            Ev::Reset(id) => self.reset_reaches_agent(id),
            Ev::Knock(id) => self.on_knock(id),
            Ev::Arrived(id, count) => self.on_arrived(id, count),
            Ev::Ended(id, reset) => self.on_ended(id, reset),
            Ev::Outcome(id, error) => self.on_outcome(id, error),
            Ev::Tell(id) => self.tell(id),
            Ev::Unblock(id) => self.unblock(id),
            Ev::Stale(token, ready) => {
                if !self.is_open(token) {
                    self.hit(Fault::StaleEvent);
                    if matches!(self.slots.get(token.slot as usize), Some(Some(_))) {
                        self.hit(Fault::SlotReused);
                    }
                    self.extra.push(Event::Socket(token, ready));
                }
            }
            Ev::Resolved(host, port, result) => {
                self.say(|| format!("resolved {host}: {result:?}"));
                self.extra.push(Event::Resolved { host, port, result });
            }
            Ev::Client(client) => self.client_goes(client),
            Ev::ClientReads(client) => self.client_reads(client),
            Ev::ClientQuits(client, reset) => self.client_quits(client, reset),
            Ev::KmsClosesIdle(id, requests) => self.kms_closes_idle(id, requests),
            Ev::Signal(signal) => {
                self.say(|| format!("signal {signal:?}"));
                match signal {
                    Signal::Terminate => self.hit(Fault::Terminated),
                    Signal::Reload => self.hit(Fault::Reloaded),
                }
                self.extra.push(Event::Signal(signal));
            }
            Ev::NewToken => {
                self.hit(Fault::TokenChanged);
                let number = self.model.tokens.len();
                let token = format!("{}token-{number}", super::logs::SECRET_MARK);
                self.say(|| format!("the token is {token} now"));
                self.model.tokens.push((self.now_us, token));
            }
            Ev::WallClock(offset_s) => {
                self.say(|| format!("wall clock {offset_s:+} s"));
                if offset_s != self.wall_offset_s {
                    self.wall_moved = true;
                    self.trouble();
                    let forward = offset_s > self.wall_offset_s;
                    self.hit(if forward { Fault::WallClockForward } else { Fault::WallClockBack });
                }
                self.wall_offset_s = offset_s;
            }
            Ev::Rotate(secret) => self.rotate(secret),
            Ev::Fate(secret, alive) => self.change_fate(secret, alive),
            Ev::Outage(fault) => {
                self.say(|| format!("KMS outage: {fault:?}"));
                self.kms.outage = fault.filter(|_| !self.plan.calm);
            }
            Ev::MetadataOutage(fault) => {
                self.say(|| format!("metadata outage: {fault:?}"));
                self.metadata.outage = fault.filter(|_| !self.plan.calm);
            }
            Ev::Calm => self.calm(),
            Ev::Verify => self.verify(),
        }
    }

    /// The faults stop.
    fn calm(&mut self) {
        self.say(|| "the faults stop".to_owned());
        self.plan.end();
        self.calmed = true;
        self.kms.outage = None;
        self.kms.dead_addresses = [false; 3];
        self.metadata.outage = None;
        self.no_descriptors_until_us = 0;
        // Some hosts' clocks stay wrong: the agent has to do with KMS's. Not so wrong that credentials look expired.
        let stays_wrong = self.wall_moved && self.rng.chance(400);
        let wrong_s = i64::try_from(self.rng.range(1_200, 7_200)).unwrap();
        let offset_s = if !stays_wrong {
            0
        } else if self.rng.chance(500) {
            wrong_s
        } else {
            -wrong_s
        };
        self.on(Ev::WallClock(offset_s));
        self.after(180 * SECOND, Ev::Verify);
    }

    /// All clients so far must be served and gone; the last ones find everything in order.
    fn verify(&mut self) {
        if self.terminated.is_some() {
            return;
        }
        self.say(|| "verification".to_owned());
        for id in 0..self.conns.len() {
            let conn = &self.conns[id];
            if conn.token.is_some() && conn.is_client() {
                self.fail(format!("connection {id} is still open long after the faults have stopped"));
            }
        }
        self.verified = true;
        self.add_verifiers();
        let keys = self.model.keys.len() as u64;
        self.after((keys + 5) * SECOND, Ev::Signal(Signal::Terminate));
    }
}
