//! `SimNet`: the simulated kernel. Edge-triggered and stricter than epoll: once a readiness of a socket was
//! told, no other of its kind is told until the agent has seen `WouldBlock` or a short read.

use super::client::ClientId;
use super::faults::Fault;
use super::model::Talk;
use super::upstream::{HANG_US, Requests};
use super::world::{ConnId, Ev, SECOND, World};
use kms_agent::net::{Event, Net, Readiness, Token};
use kms_agent::time::Now;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    Client(ClientId),
    Kms,
    Metadata,
}

/// How far a connect has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connect {
    Pending,
    Failed(ErrorKind),
    Done,
}

/// Both ends of a connection.
#[derive(Debug)]
pub struct Conn {
    pub peer: Peer,
    /// While the agent has it.
    pub token: Option<Token>,
    pub connect: Connect,
    /// Bytes that the agent has not read.
    pub rx: VecDeque<u8>,
    /// The peer's end is behind them.
    pub fin: bool,
    /// The agent was told so.
    pub fin_told: bool,
    pub fin_read: bool,
    pub reset: bool,
    pub read_total: u64,
    pub received_total: u64,
    /// Where in the stream to the agent which reply is complete.
    marks: VecDeque<(u64, usize)>,
    fin_mark: Option<usize>,
    /// A readable edge may be raised.
    read_armed: bool,
    /// One is to be told.
    pub read_edge: bool,
    write_armed: bool,
    write_edge: bool,
    reset_edge: bool,
    queued: bool,
    /// Bytes written, arrived at the peer, read by the peer; the send buffer's size.
    pub write_total: u64,
    pub arrived_total: u64,
    pub consumed_total: u64,
    pub window: u64,
    pub shut: bool,
    /// What is under way arrives in order.
    arrive_us: u64,
    depart_us: u64,
    /// The peer has closed its socket: what comes is answered with a reset.
    pub peer_gone: bool,
    /// Unread bytes and no edge to come for them, since so many ticks.
    starved_ticks: u32,
    pub talk: Talk,
    pub requests: Requests,
}

impl Conn {
    pub fn new(peer: Peer, window: u64) -> Conn {
        let connect = if matches!(peer, Peer::Client(_)) { Connect::Done } else { Connect::Pending };
        Conn {
            peer,
            token: None,
            connect,
            rx: VecDeque::new(),
            fin: false,
            fin_told: false,
            fin_read: false,
            reset: false,
            read_total: 0,
            received_total: 0,
            marks: VecDeque::new(),
            fin_mark: None,
            read_armed: true,
            read_edge: false,
            write_armed: false,
            write_edge: false,
            reset_edge: false,
            queued: false,
            write_total: 0,
            arrived_total: 0,
            consumed_total: 0,
            window,
            shut: false,
            arrive_us: 0,
            depart_us: 0,
            peer_gone: false,
            starved_ticks: 0,
            talk: Talk::default(),
            requests: Requests::default(),
        }
    }

    pub const fn is_client(&self) -> bool {
        matches!(self.peer, Peer::Client(_))
    }
}

#[derive(Debug)]
pub struct Listener {
    pub backlog: VecDeque<ConnId>,
    armed: bool,
    edge: bool,
}

impl Default for Listener {
    fn default() -> Listener {
        Listener { backlog: VecDeque::new(), armed: true, edge: false }
    }
}

impl World {
    pub fn is_open(&self, token: Token) -> bool {
        self.find(token).is_some()
    }

    fn find(&self, token: Token) -> Option<ConnId> {
        match self.slots.get(token.slot as usize) {
            Some(Some((generation, id))) if *generation == token.generation => Some(*id),
            _ => None,
        }
    }

    fn socket(&self, token: Token) -> io::Result<ConnId> {
        self.find(token).ok_or_else(|| ErrorKind::NotConnected.into())
    }

    fn occupy(&mut self, token: Token, id: ConnId) {
        let slot = token.slot as usize;
        if self.slots.len() <= slot {
            self.slots.resize(slot + 1, None);
        }
        if self.slots[slot].is_some() {
            self.fail(format!("{token:?} is given out while its slot is in use"));
        }
        self.slots[slot] = Some((token.generation, id));
        self.conns[id].token = Some(token);
    }

    fn enqueue(&mut self, id: ConnId) {
        let conn = &mut self.conns[id];
        if conn.token.is_some() && !conn.queued {
            conn.queued = true;
            self.ready.push(id);
        }
    }

    fn raise_read(&mut self, id: ConnId) {
        let conn = &mut self.conns[id];
        if conn.read_armed {
            conn.read_armed = false;
            conn.read_edge = true;
            self.enqueue(id);
        }
    }

    fn raise_write(&mut self, id: ConnId) {
        let conn = &mut self.conns[id];
        if conn.write_armed {
            conn.write_armed = false;
            conn.write_edge = true;
            self.enqueue(id);
        }
    }

    /// What the peer sends reaches the agent after this, in order.
    pub fn send(&mut self, id: ConnId, after_us: u64, ev: Ev) -> u64 {
        let at = self.conns[id].arrive_us.max(self.now_us + after_us);
        self.conns[id].arrive_us = at;
        self.at(at, ev);
        at
    }

    pub fn bytes_reach_agent(&mut self, id: ConnId, bytes: &[u8], mark: Option<usize>) {
        let conn = &mut self.conns[id];
        if conn.reset || conn.shut && conn.token.is_none() {
            return;
        }
        conn.received_total += bytes.len() as u64;
        if conn.token.is_none() && !self.is_in_backlog(id) {
            // Closed by the agent: the kernel answers with a reset.
            let at = self.now_us + self.latency();
            return self.at(at, Ev::Ended(id, true));
        }
        let conn = &mut self.conns[id];
        conn.rx.extend(bytes);
        if let Some(serve) = mark {
            conn.marks.push_back((conn.received_total, serve));
        }
        self.raise_read(id);
    }

    pub fn fin_reaches_agent(&mut self, id: ConnId, mark: Option<usize>) {
        let conn = &mut self.conns[id];
        if !conn.fin {
            conn.fin = true;
            conn.fin_mark = mark;
            self.raise_read(id);
        }
    }

    pub fn reset_reaches_agent(&mut self, id: ConnId) {
        let loses = self.rng.chance(500);
        let conn = &mut self.conns[id];
        if conn.reset {
            return;
        }
        conn.reset = true;
        conn.reset_edge = true;
        if loses {
            conn.rx.clear();
            conn.marks.clear();
        }
        let what = conn.peer;
        if !matches!(what, Peer::Client(_)) {
            self.hit(Fault::UpstreamReset);
            self.trouble();
        }
        self.enqueue(id);
    }

    pub fn on_knock(&mut self, id: ConnId) {
        if !self.listening {
            self.conns[id].reset = true;
            return self.on_ended(id, true);
        }
        let number = self.rng.below(2);
        let listener = &mut self.listeners[number];
        listener.backlog.push_back(id);
        if listener.armed {
            listener.armed = false;
            listener.edge = true;
        }
    }

    fn is_in_backlog(&self, id: ConnId) -> bool {
        self.listeners.iter().any(|listener| listener.backlog.contains(&id))
    }

    pub fn on_outcome(&mut self, id: ConnId, error: Option<ErrorKind>) {
        let conn = &mut self.conns[id];
        if conn.token.is_none() {
            return;
        }
        conn.connect = match error {
            Some(kind) => Connect::Failed(kind),
            None => Connect::Done,
        };
        conn.write_edge = true;
        conn.reset_edge |= error.is_some();
        self.enqueue(id);
        if error.is_none() {
            self.upstream_connected(id);
        }
    }

    pub fn tell(&mut self, id: ConnId) {
        let conn = &mut self.conns[id];
        conn.queued = false;
        if conn.read_edge || conn.write_edge || conn.reset_edge {
            self.enqueue(id);
        }
    }

    pub fn unblock(&mut self, id: ConnId) {
        self.raise_write(id);
    }

    /// The peer has read so many bytes.
    pub fn consumed(&mut self, id: ConnId, count: u64) {
        self.conns[id].consumed_total += count;
        self.raise_write(id);
    }

    pub fn on_arrived(&mut self, id: ConnId, count: usize) {
        let conn = &mut self.conns[id];
        if conn.peer_gone {
            // Nobody is there any more.
            let at = self.now_us + self.latency();
            return self.at(at, Ev::Reset(id));
        }
        conn.arrived_total += count as u64;
        match conn.peer {
            Peer::Client(client) => self.client_receives(client),
            Peer::Kms | Peer::Metadata => {
                self.consumed(id, count as u64);
                self.upstream_receives(id);
            }
        }
    }

    /// The agent's end has come to the peer.
    pub fn on_ended(&mut self, id: ConnId, reset: bool) {
        match self.conns[id].peer {
            Peer::Client(client) => self.client_sees_end(client, reset),
            Peer::Kms | Peer::Metadata => {
                if self.conns[id].token.is_none() || reset {
                    self.conns[id].peer_gone = true;
                }
            }
        }
    }

    /// Tells what there is to tell; the number of events.
    fn harvest(&mut self, events: &mut Vec<Event>) -> usize {
        for number in 0..self.listeners.len() {
            if std::mem::take(&mut self.listeners[number].edge) && self.listening {
                events.push(Event::Acceptable(number));
            }
        }
        for id in std::mem::take(&mut self.ready) {
            if self.conns[id].token.is_none() {
                self.conns[id].queued = false;
            } else if self.roll(Fault::WithheldReadiness) {
                let after = self.rng.magnitude(1, 5_000);
                self.after(after, Ev::Tell(id));
            } else {
                self.tell_readiness(id, events);
            }
        }
        events.append(&mut self.extra);
        if self.roll(Fault::SpuriousReadiness) {
            let open: Vec<Token> =
                self.slots.iter().flatten().filter_map(|(_, id)| self.conns[*id].token).collect();
            if !open.is_empty() {
                let (readable, writable) = (self.rng.chance(700), self.rng.chance(700));
                let ready = Readiness { readable, writable, ..Readiness::default() };
                events.push(Event::Socket(self.rng.pick(&open), ready));
            }
        }
        if events.len() > 1 && self.rng.chance(500) {
            self.hit(Fault::ShuffledBatch);
            self.rng.shuffle(events);
        }
        events.len()
    }

    fn tell_readiness(&mut self, id: ConnId, events: &mut Vec<Event>) {
        let (full, split) = (self.roll(Fault::FullReadiness), self.roll(Fault::SplitReadiness));
        let conn = &mut self.conns[id];
        let Some(token) = conn.token else { return };
        conn.queued = false;
        let gone = conn.reset_edge;
        let readable = gone || conn.read_edge || full && !conn.rx.is_empty();
        let writable = gone || conn.write_edge;
        (conn.read_edge, conn.write_edge, conn.reset_edge) = (false, false, false);
        if readable {
            conn.read_armed = false;
        }
        let read_closed = readable && conn.fin;
        conn.fin_told |= read_closed;
        let ready = Readiness { readable, writable, read_closed, gone };
        if split && readable && writable && !gone {
            let one = Readiness { writable: false, ..ready };
            let two = Readiness { readable: false, read_closed: false, ..ready };
            events.extend([Event::Socket(token, two), Event::Socket(token, one)]);
        } else if readable || writable {
            events.push(Event::Socket(token, ready));
        }
    }

    fn wait(&mut self, timeout: Option<Duration>, events: &mut Vec<Event>) {
        let before_us = self.now_us;
        self.calls = 0;
        self.ticks += 1;
        let until = timeout.map(|timeout| self.now_us + u64::try_from(timeout.as_micros()).unwrap());
        self.note(1, until.unwrap_or(0));
        let wakes_at = if self.roll(Fault::SpuriousWakeUp) {
            Some(self.now_us + self.rng.magnitude(1, 100_000))
        } else {
            None
        };
        self.happen();
        while self.harvest(events) == 0 {
            let until = until.into_iter().chain(wakes_at).min();
            match (self.next_us(), until) {
                (Some(at), until) if until.is_none_or(|until| at <= until) => {
                    self.now_us = self.now_us.max(at);
                    if self.roll(Fault::LateWakeUp) {
                        self.oversleep(3_000);
                    }
                    self.happen();
                }
                (_, Some(until)) => {
                    self.now_us = self.now_us.max(until);
                    if self.roll(Fault::LateWakeUp) {
                        self.oversleep(3_000);
                    }
                    self.happen();
                    self.harvest(events);
                    break;
                }
                (_, None) => self.fail("the loop sleeps for good"),
            }
        }
        self.note(2, events.len() as u64);
        if self.printing {
            for event in events.iter() {
                self.say(|| format!("> {event:?}"));
            }
        }
        // A loop that is woken for nothing and does nothing burns a core.
        let idle = events.is_empty() && self.now_us == before_us;
        self.idle_ticks = if idle { self.idle_ticks + 1 } else { 0 };
        if self.idle_ticks > 200 {
            self.fail("the loop spins: 200 waits without an event and without a pause");
        }
    }

    fn oversleep(&mut self, max_us: u64) {
        let us = self.rng.range(1, max_us);
        self.stall_us += us;
        self.now_us += us;
    }

    /// The whole machine stands still for a while.
    pub fn stall(&mut self) {
        if self.roll(Fault::Stall) {
            let us = self.rng.magnitude(100, 20 * SECOND);
            self.say(|| format!("the machine stands still for {us} us"));
            self.stall_us += us;
            self.now_us += us;
            self.trouble();
        }
    }

    /// A tick comes to an end.
    fn count_call(&mut self) {
        self.calls += 1;
        if self.calls > 100_000 {
            self.fail("a tick that does not end");
        }
    }

    fn accept(&mut self, number: usize, token: Token) -> io::Result<()> {
        self.count_call();
        if !self.listening {
            self.fail("accept although it does not listen any more");
        }
        if self.is_without_descriptors(Fault::AcceptWithoutDescriptor) {
            return Err(io::Error::from_raw_os_error(24));
        }
        let Some(id) = self.listeners[number].backlog.pop_front() else {
            self.listeners[number].armed = true;
            return Err(ErrorKind::WouldBlock.into());
        };
        if self.roll(Fault::AcceptAborted) {
            self.conns[id].reset = true;
            self.on_ended(id, true);
            return Err(ErrorKind::ConnectionAborted.into());
        }
        if self.conns[id].reset {
            self.hit(Fault::ResetBeforeAccept);
        }
        self.occupy(token, id);
        self.note(3, id as u64);
        self.say(|| format!("accept {id} as {token:?}"));
        let stamp = self.stamp();
        let conn = &mut self.conns[id];
        conn.talk.accepted = stamp;
        // Being registered tells what there is.
        conn.write_edge = true;
        let has = !conn.rx.is_empty() || conn.fin;
        conn.read_armed = true;
        self.enqueue(id);
        if has {
            self.raise_read(id);
        }
        self.check_caps();
        Ok(())
    }

    fn is_without_descriptors(&mut self, fault: Fault) -> bool {
        if self.roll(fault) {
            let us = self.rng.magnitude(1, 3 * SECOND);
            self.no_descriptors_until_us = self.now_us + us;
        } else if self.now_us < self.no_descriptors_until_us {
            self.hit(fault);
        }
        let without = self.now_us < self.no_descriptors_until_us;
        if without {
            self.model.no_descriptor_us = self.now_us;
            self.trouble();
        }
        without
    }

    fn read(&mut self, token: Token, into: &mut [u8]) -> io::Result<usize> {
        self.count_call();
        let id = self.socket(token)?;
        if self.roll(Fault::Interrupted) {
            return Err(ErrorKind::Interrupted.into());
        }
        let partial = self.plan.rate(Fault::PartialRead);
        let partial = self.rng.chance(partial);
        let conn = &mut self.conns[id];
        if conn.connect != Connect::Done {
            self.fail(format!("read of {id}, which is not connected"));
        }
        if conn.rx.is_empty() {
            if conn.reset {
                return Err(ErrorKind::ConnectionReset.into());
            }
            if conn.fin {
                conn.fin_read = true;
                let mark = conn.fin_mark.take();
                self.note(4, id as u64);
                self.say(|| format!("read {id}: end"));
                if let Some(serve) = mark {
                    self.delivered(serve);
                }
                return Ok(0);
            }
            conn.read_armed = true;
            return Err(ErrorKind::WouldBlock.into());
        }
        let there = conn.rx.len().min(into.len());
        // What is left counts as having come right after: not after the end was told.
        let count =
            if partial && !conn.fin_told && there > 1 { self.rng.below(there - 1) + 1 } else { there };
        let conn = &mut self.conns[id];
        let (front, back) = conn.rx.as_slices();
        let first = front.len().min(count);
        into[..first].copy_from_slice(&front[..first]);
        into[first..count].copy_from_slice(&back[..count - first]);
        conn.rx.drain(..count);
        conn.read_total += count as u64;
        if count < into.len() {
            conn.read_armed = true;
            if !conn.rx.is_empty() || conn.fin && !conn.fin_told {
                self.raise_read(id);
            }
        }
        if count < there {
            self.hit(Fault::PartialRead);
        }
        self.note(5, count as u64);
        self.say(|| format!("read {id}: {count}"));
        self.on_read(id);
        while let Some((at, serve)) = self.conns[id].marks.front().copied()
            && at <= self.conns[id].read_total
        {
            self.conns[id].marks.pop_front();
            self.delivered(serve);
        }
        Ok(count)
    }

    fn write(&mut self, token: Token, bytes: &[u8]) -> io::Result<usize> {
        self.count_call();
        let id = self.socket(token)?;
        if self.roll(Fault::Interrupted) {
            return Err(ErrorKind::Interrupted.into());
        }
        let conn = &self.conns[id];
        if conn.connect != Connect::Done {
            self.fail(format!("write to {id}, which is not connected"));
        }
        if bytes.is_empty() {
            self.fail("a write of nothing");
        }
        if conn.reset || conn.shut {
            return Err(ErrorKind::BrokenPipe.into());
        }
        let room = conn.window.saturating_sub(conn.write_total - conn.consumed_total);
        if room == 0 || self.roll(Fault::WriteBlockedAnyway) {
            if room > 0 {
                let after = self.rng.magnitude(1, 5_000);
                self.after(after, Ev::Unblock(id));
            } else {
                self.hit(Fault::WriteBlocked);
            }
            self.say(|| format!("write {id}: blocked"));
            self.conns[id].write_armed = true;
            self.on_blocked(id);
            return Err(ErrorKind::WouldBlock.into());
        }
        let fits = usize::try_from(room).unwrap().min(bytes.len());
        let count = if self.roll(Fault::PartialWrite) { self.rng.below(fits) + 1 } else { fits };
        self.note(6, count as u64);
        self.note_bytes(&bytes[..count]);
        self.say(|| {
            let line = bytes.split(|byte| *byte == b'\r').next().unwrap_or_default();
            format!(
                "write {id}: {count} of {}: {}",
                bytes.len(),
                String::from_utf8_lossy(&line[..line.len().min(80)])
            )
        });
        let latency = self.latency();
        let conn = &mut self.conns[id];
        conn.write_total += count as u64;
        let at = conn.depart_us.max(self.now_us + latency);
        conn.depart_us = at;
        self.at(at, Ev::Arrived(id, count));
        match self.conns[id].peer {
            Peer::Client(_) => self.on_written(id, &bytes[..count], count == bytes.len()),
            Peer::Kms | Peer::Metadata => self.on_asked(id, &bytes[..count]),
        }
        Ok(count)
    }

    fn connect(&mut self, token: Token, address: SocketAddr) -> io::Result<()> {
        self.count_call();
        if self.is_without_descriptors(Fault::ConnectWithoutDescriptor) {
            return Err(io::Error::from_raw_os_error(24));
        }
        if self.roll(Fault::ConnectUnreachable) {
            self.trouble();
            return Err(ErrorKind::NetworkUnreachable.into());
        }
        let peer = if address.port() == 80 { Peer::Metadata } else { Peer::Kms };
        let id = self.conns.len();
        self.conns.push(Conn::new(peer, 65_536));
        self.occupy(token, id);
        self.note(7, id as u64);
        self.say(|| format!("connect {id} as {token:?} to {address}"));
        self.check_caps();
        let dead = peer == Peer::Kms && self.kms.is_dead(address);
        if dead {
            self.hit(Fault::AddressDead);
        }
        let outage = match peer {
            Peer::Kms => self.kms.outage,
            _ => self.metadata.outage,
        };
        let refuses = outage == Some(Fault::ConnectRefused);
        let hangs = outage == Some(Fault::ConnectHangs);
        if hangs || self.roll(Fault::ConnectHangs) || dead && self.rng.chance(500) {
            self.hit(Fault::ConnectHangs);
            self.trouble_for(HANG_US);
            return Ok(());
        }
        let mut latency = self.latency();
        if self.roll(Fault::ConnectSlow) {
            latency += self.rng.magnitude(100_000, 3 * SECOND);
            self.trouble_for(latency);
        }
        let refused = dead || refuses || self.roll(Fault::ConnectRefused);
        if refused {
            self.hit(Fault::ConnectRefused);
            self.trouble();
        }
        self.after(latency, Ev::Outcome(id, refused.then_some(ErrorKind::ConnectionRefused)));
        Ok(())
    }

    fn connected(&mut self, token: Token) -> io::Result<()> {
        let id = self.socket(token)?;
        self.note(8, id as u64);
        match self.conns[id].connect {
            Connect::Pending => Err(ErrorKind::WouldBlock.into()),
            Connect::Failed(kind) => Err(kind.into()),
            Connect::Done if self.conns[id].reset => Err(ErrorKind::ConnectionReset.into()),
            Connect::Done => Ok(()),
        }
    }

    fn resolve(&mut self, host: &str, port: u16) {
        // One helper thread: one name after the other.
        let mut took = self.latency();
        if self.roll(Fault::NameSlow) {
            took += self.rng.magnitude(100_000, 12 * SECOND);
        }
        let result = if self.roll(Fault::NameUnknown) || self.kms.outage == Some(Fault::NameUnknown) {
            self.hit(Fault::NameUnknown);
            self.trouble();
            Err("Name or service not known".to_owned())
        } else if self.roll(Fault::NameWithoutAddress) {
            self.trouble();
            Ok(Vec::new())
        } else {
            Ok(self.addresses(host, port))
        };
        let at = self.resolver_busy_until_us.max(self.now_us) + took;
        if at > self.now_us + SECOND / 10 {
            self.trouble_for(at - self.now_us);
        }
        self.resolver_busy_until_us = at;
        self.note(9, at);
        self.at(at, Ev::Resolved(host.to_owned(), port, result));
    }

    fn shutdown(&mut self, token: Token) {
        if let Some(id) = self.find(token)
            && !self.conns[id].shut
        {
            self.note(10, id as u64);
            self.say(|| format!("shutdown {id}"));
            let latency = self.latency();
            let conn = &mut self.conns[id];
            conn.shut = true;
            let at = conn.depart_us.max(self.now_us + latency);
            conn.depart_us = at;
            self.at(at, Ev::Ended(id, false));
        }
    }

    fn close(&mut self, token: Token) {
        let Some(id) = self.find(token) else { return };
        self.note(11, id as u64);
        self.say(|| format!("close {id}"));
        self.on_close(id);
        self.slots[token.slot as usize] = None;
        let latency = self.latency();
        let conn = &mut self.conns[id];
        conn.token = None;
        let reset = !conn.rx.is_empty();
        let at = conn.depart_us.max(self.now_us + latency);
        conn.depart_us = at;
        if reset || !conn.shut {
            self.at(at, Ev::Ended(id, reset));
        }
        if self.roll(Fault::StaleEvent) {
            let ready = Readiness {
                readable: true,
                writable: self.rng.chance(500),
                read_closed: self.rng.chance(300),
                gone: self.rng.chance(300),
            };
            let after = self.rng.magnitude(1, 50_000);
            self.after(after, Ev::Stale(token, ready));
        }
    }

    /// Whether something lies unread for which no edge will come, although the agent does not wait with it.
    pub fn check_starvation(&mut self, id: ConnId) {
        let conn = &self.conns[id];
        let wanted = match conn.peer {
            Peer::Client(_) => conn.talk.is_listened_to(),
            // A connection that has been told of its end may be closed at the next use.
            _ => conn.connect == Connect::Done,
        };
        let unread = !conn.rx.is_empty() || conn.fin && !conn.fin_read;
        let starved = wanted && unread && !conn.reset && !conn.read_edge && !conn.queued;
        let conn = &mut self.conns[id];
        conn.starved_ticks = if starved { conn.starved_ticks + 1 } else { 0 };
        if conn.starved_ticks > 3 {
            let (bytes, fin) = (conn.rx.len(), conn.fin);
            self.fail(format!(
                "connection {id}: {bytes} unread bytes (end: {fin}), and no event will tell the agent again"
            ));
        }
    }
}

/// The agent's view of the world.
pub struct SimNet(pub Rc<RefCell<World>>);

impl Net for SimNet {
    fn now(&self) -> Now {
        self.0.borrow().now()
    }

    fn wait(&mut self, timeout: Option<Duration>, events: &mut Vec<Event>) -> io::Result<()> {
        self.0.borrow_mut().wait(timeout, events);
        Ok(())
    }

    fn listeners(&self) -> usize {
        2
    }

    fn accept(&mut self, listener: usize, token: Token) -> io::Result<()> {
        self.0.borrow_mut().accept(listener, token)
    }

    fn stop_listening(&mut self) {
        let mut world = self.0.borrow_mut();
        world.listening = false;
        let stamp = world.stamp();
        world.terminated = Some(stamp);
        for number in 0..2 {
            for id in std::mem::take(&mut world.listeners[number].backlog) {
                world.conns[id].reset = true;
                world.on_ended(id, true);
            }
        }
    }

    fn resolve(&mut self, host: &str, port: u16) {
        self.0.borrow_mut().resolve(host, port);
    }

    fn connect(&mut self, token: Token, address: SocketAddr) -> io::Result<()> {
        self.0.borrow_mut().connect(token, address)
    }

    fn connected(&mut self, token: Token) -> io::Result<()> {
        self.0.borrow_mut().connected(token)
    }

    fn read(&mut self, token: Token, into: &mut [u8]) -> io::Result<usize> {
        self.0.borrow_mut().read(token, into)
    }

    fn write(&mut self, token: Token, bytes: &[u8]) -> io::Result<usize> {
        self.0.borrow_mut().write(token, bytes)
    }

    fn shutdown(&mut self, token: Token) {
        self.0.borrow_mut().shutdown(token);
    }

    fn close(&mut self, token: Token) {
        self.0.borrow_mut().close(token);
    }
}
