//! The shadow model: what the agent may say, judged where its bytes leave it.

use super::client::{Ask, Unit};
use super::faults::Fault;
use super::logs::SECRET_MARK;
use super::net::Peer;
use super::world::{ConnId, SECOND, Stamp, World};
use kms_agent::config::ResponseType;
use std::rc::Rc;

/// `MaxConn` and the reserve.
const RESERVE: usize = 16;
const UPSTREAM_MAX: usize = 8;
/// What `docs/contract.md`, section 3, says of deadlines.
/// And a little: those accepted in one tick count as a microsecond apart.
const FIRST_BYTE_US: u64 = 10 * SECOND;
const HEAD_US: u64 = 5 * SECOND;
const IDLE_US: u64 = 75 * SECOND;
const WRITE_US: u64 = 10 * SECOND;
/// At the cap, replies may wait so long to be read.
const UNREAD_US: u64 = SECOND;
const LINGER_US: u64 = SECOND;
const DRAIN_US: u64 = 5 * SECOND;
const READER_BUDGET_US: u64 = 8 * SECOND;
const STALE_PATIENCE_US: u64 = SECOND;
const REFUSAL_US: u64 = 5 * SECOND;
/// A new token works, an old one has stopped working, within this.
const TOKEN_US: u64 = SECOND;

/// What can be asked for: a secret and which of its versions.
#[derive(Debug)]
pub struct Key {
    pub secret: usize,
    pub name: String,
    pub version_id: Option<u32>,
    pub previous: bool,
    /// What was delivered to the agent for it, in order: values and refusals.
    pub history: Vec<(Stamp, usize)>,
    /// The connection on which it is being fetched.
    in_flight: Option<ConnId>,
    pub refresh_read_us: Option<u64>,
}

impl Key {
    pub fn new(secret: usize, name: &str, version_id: Option<u32>, previous: bool) -> Key {
        Key {
            secret,
            name: name.to_owned(),
            version_id,
            previous,
            history: Vec::new(),
            in_flight: None,
            refresh_read_us: None,
        }
    }

    /// A target that asks for it; several mean the same.
    pub fn target(&self, way: usize, refresh: bool, aws: bool) -> String {
        let mut query = Vec::new();
        if let Some(version) = self.version_id {
            query.push(format!("versionId=v{version}"));
        } else if self.previous {
            query.push(format!("versionStage={}", if aws { "AWSPREVIOUS" } else { "ACSPrevious" }));
        } else if way == 1 {
            query.push(format!("versionStage={}", if aws { "AWSCURRENT" } else { "ACSCurrent" }));
        }
        if refresh {
            query.push(format!("refreshNow={}", if way == 1 { "true" } else { "1" }));
        }
        if way == 0 {
            let path = format!("/v1/{}", self.name);
            return if query.is_empty() { path } else { format!("{path}?{}", query.join("&")) };
        }
        query.insert(0, format!("secretId={}", self.name.replace('/', "%2F")));
        format!("/secretsmanager/get?{}", query.join("&"))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServeKind {
    Value {
        version: u32,
    },
    Refusal,
    /// A failure; its reader may be told.
    Failure,
    /// What must never reach a client.
    Lie,
}

/// A reply of KMS's.
#[derive(Debug)]
pub struct Serve {
    pub key: usize,
    pub kind: ServeKind,
    pub body: Rc<Vec<u8>>,
    /// When the agent had written the request.
    pub asked: Stamp,
    /// A `refreshNow` may be why.
    pub for_refresh: bool,
    /// When its last byte was read by the agent.
    pub delivered: Option<Stamp>,
    /// The rotation that it announces, as a true unix time.
    pub rotates_unix_s: Option<i64>,
}

#[derive(Debug, Default)]
pub struct Model {
    pub keys: Vec<Key>,
    pub serves: Vec<Serve>,
    /// Every token and since when.
    pub tokens: Vec<(u64, String)>,
    pub trouble_us: Option<u64>,
    pub no_descriptor_us: u64,
    pub replies: u64,
}

/// What the agent and a client have said to each other.
#[derive(Debug, Default)]
pub struct Talk {
    pub units: Vec<Unit>,
    pub sent_total: u64,
    pub last_sent_us: u64,
    pub client_fin: bool,
    pub accepted: Stamp,
    /// Where in the agent's stream each reply ends, and whether it says close.
    pub replies: Vec<(u64, bool)>,
    /// An unfinished reply, and when it was begun: not before, not after.
    reply: Vec<u8>,
    begun: Option<(Stamp, Stamp, u64)>,
    said_close: Option<Stamp>,
    /// When the last whole reply was out.
    last_reply: Option<Stamp>,
    partial_since: Option<Stamp>,
    blocked: Option<Stamp>,
}

impl Talk {
    fn owed(&self) -> usize {
        let read = self.units.iter().take_while(|unit| unit.read.is_some()).count();
        read.saturating_sub(self.replies.len())
    }

    /// Whether the agent should be reading what comes.
    pub fn is_listened_to(&self) -> bool {
        self.owed() == 0 && self.blocked.is_none() && self.reply.is_empty() && self.said_close.is_none()
    }
}

struct Reply<'a> {
    status: u16,
    head: &'a str,
    body: &'a [u8],
    close: bool,
}

impl Reply<'_> {
    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }
}

/// The first reply in `bytes`, if it is whole, and its length.
fn parse(bytes: &[u8], head_only: bool) -> Result<Option<(Reply<'_>, usize)>, String> {
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
    let head = std::str::from_utf8(&bytes[..end]).map_err(|error| error.to_string())?;
    let status = head.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).and_then(|it| it.parse().ok());
    let mut reply = Reply { status: status.ok_or("no status line")?, head, body: &[], close: false };
    if head.lines().filter(|line| line.starts_with("Content-Length: ")).count() != 1 {
        return Err(format!("not one Content-Length: {head}"));
    }
    let length: usize = reply.header("Content-Length").and_then(|it| it.parse().ok()).ok_or("no length")?;
    for name in ["Content-Type", "Date"] {
        if reply.header(name).is_none() {
            return Err(format!("no {name}: {head}"));
        }
    }
    if reply.header("Cache-Control") != Some("no-store") {
        return Err(format!("no Cache-Control: {head}"));
    }
    reply.close = reply.header("Connection") == Some("close");
    let body_bytes = if head_only { 0 } else { length };
    let Some(body) = bytes.get(end + 4..end + 4 + body_bytes) else { return Ok(None) };
    reply.body = body;
    Ok(Some((reply, end + 4 + body_bytes)))
}

/// The number of the KMS reply that this text comes from: values read `hush-<name>#<version>#<number>;`.
fn serve_in(body: &[u8]) -> Result<Option<usize>, String> {
    let text = std::str::from_utf8(body).map_err(|error| error.to_string())?;
    let mut found = None;
    for (at, _) in text.match_indices(SECRET_MARK) {
        let value = text[at..].split(';').next().unwrap_or_default();
        let number = value.rsplit('#').next().and_then(|it| it.parse().ok());
        let number = number.ok_or_else(|| format!("a broken value: {value:.80}"))?;
        if found.replace(number).is_some_and(|other: usize| other != number) {
            return Err("values of two replies in one".to_owned());
        }
    }
    Ok(found)
}

impl World {
    /// The agent has read from a client.
    pub fn on_read(&mut self, id: ConnId) {
        if !self.conns[id].is_client() {
            return;
        }
        let stamp = self.stamp();
        let total = self.conns[id].read_total;
        let talk = &self.conns[id].talk;
        let from = talk.units.iter().take_while(|unit| unit.read.is_some()).count();
        let mut whole = if from > 0 { talk.units[from - 1].end } else { 0 };
        let mut at = from;
        while self.conns[id].talk.units.get(at).is_some_and(|unit| unit.end <= total) {
            let unit = &self.conns[id].talk.units[at];
            whole = unit.end;
            if let Ask::Secret { key, refresh: true } = unit.ask {
                self.model.keys[key].refresh_read_us = Some(self.now_us);
            }
            let alone = at == self.conns[id].talk.replies.len() && self.conns[id].talk.is_listened_to();
            let expects = if alone { self.expected_from_memory(id, at) } else { None };
            let unit = &mut self.conns[id].talk.units[at];
            unit.read = Some(stamp);
            unit.expects = expects;
            at += 1;
        }
        let talk = &mut self.conns[id].talk;
        talk.partial_since = match talk.partial_since {
            _ if total <= whole => None,
            Some(since) if at == from => Some(since),
            _ => Some(stamp),
        };
    }

    /// What the cache must give for this request at once, if that is certain.
    fn expected_from_memory(&self, id: ConnId, at: usize) -> Option<usize> {
        let unit = &self.conns[id].talk.units[at];
        let Ask::Secret { key, refresh: false } = unit.ask else { return None };
        if !self.set.roomy || self.set.ttl_us == 0 {
            return None;
        }
        let (stamp, number) = *self.model.keys[key].history.last()?;
        let serve = &self.model.serves[number];
        let age_us = self.now_us - stamp.us;
        let fresh = match serve.kind {
            ServeKind::Value { .. } => age_us < self.set.ttl_us && serve.rotates_unix_s.is_none(),
            ServeKind::Refusal => age_us < REFUSAL_US,
            ServeKind::Failure | ServeKind::Lie => false,
        };
        fresh.then_some(number)
    }

    /// The socket took no more.
    pub fn on_blocked(&mut self, id: ConnId) {
        if self.conns[id].is_client() {
            let stamp = self.stamp();
            let talk = &mut self.conns[id].talk;
            talk.blocked.get_or_insert(stamp);
        }
    }

    /// The agent has written to a client.
    pub fn on_written(&mut self, id: ConnId, bytes: &[u8], whole: bool) {
        self.judge_written(id, bytes);
        if whole {
            // The agent has nothing left to send.
            self.conns[id].talk.blocked = None;
        }
    }

    fn judge_written(&mut self, id: ConnId, bytes: &[u8]) {
        let stamp = self.stamp();
        let mut rest = bytes;
        let total = self.conns[id].write_total;
        let talk = &mut self.conns[id].talk;
        if let Some(said) = talk.said_close {
            self.fail(format!("connection {id}: bytes after the last reply, which said close at {said:?}"));
        }
        while !rest.is_empty() {
            let read_total = self.conns[id].read_total;
            let talk = &mut self.conns[id].talk;
            let number = talk.replies.len();
            let Some(unit) = talk.units.get(number) else {
                self.fail(format!(
                    "connection {id}: a reply to no request: {}",
                    String::from_utf8_lossy(rest)
                ));
            };
            let head_only = unit.head;
            if talk.reply.is_empty() {
                talk.begun = Some((talk.blocked.unwrap_or(stamp), stamp, read_total));
            }
            let before = talk.reply.len();
            talk.reply.extend_from_slice(rest);
            let reply = std::mem::take(&mut talk.reply);
            match parse(&reply, head_only) {
                Err(why) => self.fail(format!("connection {id}: a malformed reply: {why}")),
                Ok(None) => {
                    self.conns[id].talk.reply = reply;
                    return;
                }
                Ok(Some((parsed, length))) => {
                    rest = &rest[length - before..];
                    let close = parsed.close;
                    self.check_reply(id, number, &parsed, stamp);
                    self.model.replies += 1;
                    let talk = &mut self.conns[id].talk;
                    talk.replies.push((total - rest.len() as u64, close));
                    talk.last_reply = Some(stamp);
                    if close {
                        talk.said_close = Some(stamp);
                        if !rest.is_empty() {
                            self.fail(format!("connection {id}: a reply after the one that said close"));
                        }
                    }
                }
            }
        }
    }

    #[track_caller]
    fn wrong(&self, id: ConnId, number: usize, reply: &Reply<'_>, what: impl std::fmt::Display) -> ! {
        let unit = &self.conns[id].talk.units[number];
        let body = String::from_utf8_lossy(&reply.body[..reply.body.len().min(200)]);
        self.fail(format!(
            "connection {id}, reply {number}: {what}\n  asked: {unit:?}\n  {}\n  {body}",
            reply.head
        ));
    }

    fn check_reply(&mut self, id: ConnId, number: usize, reply: &Reply<'_>, ended: Stamp) {
        let talk = &self.conns[id].talk;
        let unit = talk.units[number].clone();
        let (mut low, high, read_total) = talk.begun.unwrap_or((ended, ended, 0));
        // Garbage may be refused as soon as it shows.
        let readable = if unit.ask == Ask::Garbage { unit.begin + 1 } else { unit.end };
        if read_total < readable {
            self.wrong(id, number, reply, "answered before it was read");
        }
        let read = unit.read.unwrap_or(low);
        let blocked = low != high;
        if low.op < read.op {
            low = read;
        }
        self.check_in_time(id, number, reply, (read, high), blocked);
        self.check_persistence(id, number, reply, (low, high));
        let limited = reply.status == 429
            && unit.ask != Ask::Ping
            && (unit.head
                || self.says(
                    reply,
                    "ConnectionLimitExceeded",
                    &["Connection limit exceeded", "MaxConn connections are busy"],
                ));
        if limited && !unit.head {
            self.hit(Fault::Refused429);
            if !blocked && high.us == self.now_us {
                self.check_busy(id, number, reply);
            }
        }
        let secret = matches!(unit.ask, Ask::Secret { .. }) && reply.status == 200;
        if !secret && String::from_utf8_lossy(reply.body).contains(SECRET_MARK)
            || reply.head.contains(SECRET_MARK)
        {
            self.wrong(id, number, reply, "something secret where nothing secret belongs");
        }
        if limited {
            if unit.verifies {
                self.wrong(id, number, reply, "no room although nobody is there");
            }
            return;
        }
        let gated = !matches!(unit.ask, Ask::Ping | Ask::Garbage | Ask::BadHost | Ask::Forwarded);
        // Without a body a 403 does not tell who gave it.
        let denied = gated
            && reply.status == 403
            && (unit.head
                || self.says(
                    reply,
                    "InvalidToken",
                    &["Bad Token", "the request has no token", "the token in the request is"],
                ));
        // It was looked at somewhere between its reading and its answer.
        match self.token_works(unit.token, read.us, high.us) {
            Some(true) if denied && !unit.head => self.wrong(id, number, reply, "a good token is refused"),
            Some(false) if gated && !denied => self.wrong(id, number, reply, "a wrong token is accepted"),
            _ => {}
        }
        if denied {
            return;
        }
        let expected = match unit.ask {
            Ask::Secret { key, refresh } => {
                return if reply.status == 200 {
                    self.check_value(id, number, reply, key, refresh, (low, high));
                } else {
                    self.check_refusal(id, number, reply, key, (low, high));
                };
            }
            Ask::Ping => (200, ""),
            Ask::NotFound => (404, "NotFound"),
            Ask::BadMethod => (405, "MethodNotAllowed"),
            Ask::BadParameter => (400, "InvalidParameter"),
            Ask::BadHost => (403, "ForbiddenHost"),
            Ask::Forwarded => (400, "Forwarded"),
            Ask::Garbage => {
                if !reply.close || !matches!(reply.status, 400 | 414 | 431 | 505) {
                    self.wrong(id, number, reply, "not the answer to garbage");
                }
                return;
            }
        };
        if reply.status != expected.0 || !unit.head && !self.says(reply, expected.1, &[""]) {
            self.wrong(id, number, reply, format!("not {expected:?}"));
        }
    }

    /// Whether the reply carries this code, or in AWS's and HashiCorp's forms one of these texts.
    fn says(&self, reply: &Reply<'_>, code: &str, texts: &[&str]) -> bool {
        let body = String::from_utf8_lossy(reply.body);
        match self.set.response_type {
            ResponseType::Kms => code.is_empty() || body.contains(&format!("\"Code\":\"{code}\"")),
            ResponseType::Aws | ResponseType::Vault => texts.iter().any(|text| body.contains(text)),
        }
    }

    /// Whether a token works all the time between two moments: `None` if that is not certain.
    fn token_works(&self, token: Option<usize>, low_us: u64, high_us: u64) -> Option<bool> {
        let Some(number) = token else { return Some(false) };
        let since = self.model.tokens[number].0 + if number == 0 { 0 } else { TOKEN_US };
        match self.model.tokens.get(number + 1) {
            Some((next, _)) if low_us >= next + TOKEN_US => Some(false),
            Some((next, _)) if high_us >= *next => None,
            _ => (low_us >= since).then_some(true),
        }
    }

    /// Nobody waits longer than the contract says.
    fn check_in_time(
        &mut self,
        id: ConnId,
        number: usize,
        reply: &Reply<'_>,
        (read, high): (Stamp, Stamp),
        blocked: bool,
    ) {
        let talk = &self.conns[id].talk;
        let unit = &talk.units[number];
        let since = match talk.last_reply {
            Some(last) if last.op > read.op => last,
            _ => read,
        };
        if blocked {
            return;
        }
        let took_us = high.us - since.us;
        let limit_us = match unit.ask {
            Ask::Secret { refresh: true, .. } => 2 * READER_BUDGET_US,
            Ask::Secret { key, refresh: false } => {
                let certain = self.stale_until_us(key, since);
                // A value that is pushed out while its reader waits leaves it without a fall-back.
                let budget_us = if self.set.roomy { READER_BUDGET_US } else { 2 * READER_BUDGET_US };
                if certain > high.us { STALE_PATIENCE_US } else { budget_us }
            }
            _ => 0,
        };
        let limit_us = if unit.expects.is_some() { 0 } else { limit_us };
        if took_us > limit_us + (high.stall_us - since.stall_us) {
            self.wrong(id, number, reply, format!("it took {took_us} us, not at most {limit_us}"));
        }
    }

    /// Until when a value that the agent had at `since` may be served stale, if it surely still has it.
    fn stale_until_us(&self, key: usize, since: Stamp) -> u64 {
        let last = self.model.keys[key].history.iter().rev().find(|(stamp, _)| stamp.op < since.op);
        let Some((stamp, number)) = last else { return 0 };
        let newest = self.model.keys[key].history.last().is_some_and(|(_, newest)| newest == number);
        let serve = &self.model.serves[*number];
        let certain = self.set.roomy
            && self.set.ignore_transient
            && self.set.ttl_us > 0
            && newest
            && serve.rotates_unix_s.is_none()
            && matches!(serve.kind, ServeKind::Value { .. });
        if certain { stamp.us + self.set.ttl_us + self.set.max_stale_us } else { 0 }
    }

    fn check_persistence(&self, id: ConnId, number: usize, reply: &Reply<'_>, (low, high): (Stamp, Stamp)) {
        let conn = &self.conns[id];
        let unit = &conn.talk.units[number];
        if self.terminated.is_some_and(|at| at.op < low.op) && !reply.close {
            self.wrong(id, number, reply, "kept open although the agent ends");
        }
        if (unit.close || unit.ask == Ask::Garbage) && !reply.close {
            self.wrong(id, number, reply, "kept open although that was not wanted");
        }
        let may_close = unit.close
            || unit.ask == Ask::Garbage
            || reply.status == 429
            || conn.talk.client_fin
            || conn.fin
            || self.terminated.is_some_and(|at| at.op < high.op)
            // `/ping` on a reserve slot, when it was written.
            || high.us != self.now_us
            || self.open_clients() > self.set.connections_max;
        if reply.close && !may_close {
            self.wrong(id, number, reply, "closed for no reason");
        }
        if unit.http10 && !reply.close && reply.header("Connection") != Some("keep-alive") {
            self.wrong(id, number, reply, "kept open for HTTP/1.0 without saying so");
        }
    }

    /// 429 means that all are really busy.
    fn check_busy(&self, id: ConnId, number: usize, reply: &Reply<'_>) {
        if self.open_clients() <= self.set.connections_max {
            self.wrong(id, number, reply, "429 although there is room");
        }
        if self.conns[id].talk.blocked.is_some() {
            return;
        }
        for (other, conn) in self.conns.iter().enumerate() {
            let talk = &conn.talk;
            let idle = conn.token.is_some()
                && conn.is_client()
                && other != id
                && talk.is_listened_to()
                && talk.partial_since.is_none()
                && talk.last_reply.is_some_and(|at| at.us < self.now_us)
                && conn.rx.is_empty();
            if idle {
                self.wrong(id, number, reply, format!("429 although connection {other} is idle"));
            }
        }
    }

    pub fn open_clients(&self) -> usize {
        self.slots.iter().flatten().filter(|(_, id)| self.conns[*id].is_client()).count()
    }

    fn check_value(
        &mut self,
        id: ConnId,
        number: usize,
        reply: &Reply<'_>,
        key: usize,
        refresh: bool,
        (low, high): (Stamp, Stamp),
    ) {
        let unit = self.conns[id].talk.units[number].clone();
        let wrong = |what: String| -> ! { self.wrong(id, number, reply, what) };
        let Some(x_cache) = reply.header("X-Cache").map(str::to_owned) else { wrong("no X-Cache".into()) };
        let Some(age_s) = reply.header("Age").and_then(|it| it.parse::<u64>().ok()) else {
            wrong("no Age".into())
        };
        self.hit(match x_cache.as_str() {
            "HIT" => Fault::ServedHit,
            "MISS" => Fault::ServedMiss,
            "REFRESH" => Fault::ServedRefresh,
            "STALE" => Fault::ServedStale,
            other => self.wrong(id, number, reply, format!("X-Cache: {other}")),
        });
        let wrong = |what: String| -> ! { self.wrong(id, number, reply, what) };
        let Some(serve_number) = serve_in(reply.body).unwrap_or_else(|why| wrong(why)) else {
            if unit.head {
                return;
            }
            wrong("a secret without a value".into())
        };
        let Some(serve) = self.model.serves.get(serve_number) else { wrong("a value that never was".into()) };
        let (ServeKind::Value { version }, Some(fetched)) = (serve.kind, serve.delivered) else {
            wrong(format!("it comes from {:?}, read {:?}", serve.kind, serve.delivered))
        };
        if serve.key != key {
            wrong(format!("the value of another key: {:?}", self.model.keys[serve.key]));
        }
        if self.set.response_type == ResponseType::Kms && *serve.body != reply.body {
            wrong("not byte for byte what KMS gave".into());
        }
        // Nothing newer, and no refusal, may have come in between.
        if let Some((stamp, newer)) =
            self.model.keys[key].history.iter().find(|(stamp, _)| stamp.op > fetched.op && stamp.op < low.op)
        {
            let newer = &self.model.serves[*newer];
            wrong(format!(
                "an old value: {:?} was delivered at {stamp:?}, this one at {fetched:?}",
                newer.kind
            ));
        }
        // Ages are those of the moment of the writing.
        let (age_low, age_high) = (low.us.saturating_sub(fetched.us), high.us - fetched.us);
        if age_s < age_low / SECOND || age_s > age_high / SECOND {
            wrong(format!("Age {age_s} is not between {age_low} and {age_high} us"));
        }
        let ttl_us = self.set.ttl_us;
        let ceiling_us = ttl_us + if self.set.ignore_transient { self.set.max_stale_us } else { 0 };
        let rotated = serve.rotates_unix_s.is_some();
        match x_cache.as_str() {
            "MISS" | "REFRESH" => {
                if (x_cache == "REFRESH") != refresh {
                    wrong("asked otherwise".into());
                }
                if fetched.us > high.us || fetched.op < low.op && fetched.us != low.us {
                    wrong(format!("{x_cache}, but its value came at {fetched:?}, not {low:?} to {high:?}"));
                }
            }
            "HIT" if age_low >= ttl_us => wrong(format!("fresh after {age_low} us")),
            "HIT" => {}
            _ => {
                if !self.set.ignore_transient || age_low >= ceiling_us {
                    wrong(format!("stale after {age_low} us"));
                }
                if age_high < ttl_us && !rotated {
                    wrong("STALE, but fresh".into());
                }
                if self.model.trouble_us.is_none_or(|at| at < fetched.us.saturating_sub(2 * SECOND)) {
                    wrong("STALE, but KMS has been well since".into());
                }
            }
        }
        // A rotation announced ends the freshness; certain only while both clocks are right.
        if let Some(at) = serve.rotates_unix_s
            && x_cache == "HIT"
            && !self.wall_moved
            && !self.kms.skewed
        {
            let began_us = high.us.min(low.us);
            let rotates_us =
                super::world::BEGIN_US + u64::try_from(at - super::world::BEGIN_UNIX_S).unwrap() * SECOND;
            if began_us >= rotates_us + SECOND && fetched.us + SECOND < rotates_us {
                wrong(format!("fresh {} us after the rotation", began_us - rotates_us));
            }
        }
        if refresh {
            let read = unit.read.unwrap_or(low);
            // Within a second of the last such fetch its result answers.
            let just =
                |other: &Serve| other.for_refresh && other.key == key && other.asked.us + SECOND >= read.us;
            // In the order of KMS's answers, not of the questions: a slow one may stand behind.
            let covered =
                self.model.serves.iter().rev().any(|other| other.asked.op <= serve.asked.op && just(other));
            if serve.asked.us < read.us && !covered {
                wrong(format!("refreshNow read at {read:?} got what was asked at {:?}", serve.asked));
            }
            if x_cache == "STALE" {
                wrong("refreshNow got STALE".into());
            }
        }
        if let Some(expected) = unit.expects
            && (serve_number != expected || x_cache != "HIT")
        {
            wrong(format!("memory held {expected}"));
        }
        // The first reader may get STALE: an outage counts until something else is heard of KMS.
        let certain = refresh || self.set.ttl_us <= 100 * SECOND && x_cache != "STALE";
        let now = self.kms.secrets[self.model.keys[key].secret].version_for(&self.model.keys[key]);
        if unit.verifies && certain && now != Some(version) {
            wrong(format!("not the version of now, {now:?}"));
        }
    }

    fn check_refusal(
        &mut self,
        id: ConnId,
        number: usize,
        reply: &Reply<'_>,
        key: usize,
        (low, high): (Stamp, Stamp),
    ) {
        let unit = self.conns[id].talk.units[number].clone();
        let wrong = |what: String| -> ! { self.wrong(id, number, reply, what) };
        // KMS's own words carry the number of its reply.
        let text = String::from_utf8_lossy(reply.body);
        let quoted = text.split("kms-req-").nth(1).and_then(|rest| {
            rest.split(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse::<usize>().ok())
        });
        let refusal = quoted.map(|number| &self.model.serves[number]);
        match refusal {
            Some(serve) if matches!(serve.kind, ServeKind::Refusal | ServeKind::Failure) => {
                let Some(delivered) = serve.delivered else {
                    wrong(format!("a {:?} that never came", serve.kind))
                };
                if serve.key != key {
                    wrong(format!("a {:?} of another key: {}", serve.kind, self.model.keys[serve.key].name));
                }
                let newer = |stamp: Stamp| stamp.op > delivered.op && stamp.op < low.op;
                if self.model.keys[key].history.iter().any(|(stamp, _)| newer(*stamp)) {
                    wrong(format!("an old {:?}", serve.kind));
                }
                if serve.kind == ServeKind::Refusal {
                    if low.us >= delivered.us + REFUSAL_US {
                        wrong(format!("a refusal of {} us ago", low.us - delivered.us));
                    }
                    if low.us > delivered.us {
                        self.hit(Fault::RememberedRefusal);
                    }
                }
            }
            Some(serve) => wrong(format!("the words of {:?}", serve.kind)),
            None => {
                if !matches!(reply.status, 502..=504) && !unit.head {
                    wrong("no refusal that is known here".into());
                }
            }
        }
        let wrong = |what: String| -> ! { self.wrong(id, number, reply, what) };
        let secret = &self.kms.secrets[self.model.keys[key].secret];
        let alive = secret.version_for(&self.model.keys[key]).is_some();
        let definite = matches!(reply.status, 400..=499) && reply.status != 429;
        if unit.verifies && (alive || !definite) && self.terminated.is_none() {
            wrong(format!("KMS is well, and this secret {}", if alive { "is there" } else { "is not" }));
        }
        let ended = self.terminated.is_some_and(|at| at.op < high.op);
        if !definite && !ended {
            let read = unit.read.unwrap_or(low);
            // Backoffs and pauses asked for hold for a while after the last trouble.
            if self.wall_offset_s == 0 && self.model.trouble_us.is_none_or(|at| at + 60 * SECOND < read.us) {
                wrong("all has been well for a minute".into());
            }
        }
        if let Some(expected) = unit.expects
            && quoted != Some(expected)
            && !unit.head
        {
            wrong(format!("memory held {expected}"));
        }
    }

    /// The agent asks KMS for a key: rightly?
    pub fn on_fetch(&mut self, id: ConnId, key: usize) {
        let held = &self.model.keys[key];
        if let Some(other) = held.in_flight {
            self.fail(format!("connections {other} and {id} both fetch {}", held.name));
        }
        let refreshed = held.refresh_read_us.is_some_and(|at| self.now_us - at < 20 * SECOND + self.stall_us);
        if let Some((stamp, number)) = held.history.last()
            && !refreshed
        {
            let serve = &self.model.serves[*number];
            let age_us = self.now_us - stamp.us;
            let needless = match serve.kind {
                ServeKind::Value { .. } => {
                    self.set.roomy && serve.rotates_unix_s.is_none() && age_us < self.set.ttl_us * 7 / 10
                }
                // Less what passed between the decision and the writing of the request.
                ServeKind::Refusal => self.set.roomy && age_us < REFUSAL_US,
                ServeKind::Failure | ServeKind::Lie => false,
            };
            if needless && !self.refresh_is_owed(key) && self.model.trouble_us.is_none_or(|at| at < stamp.us)
            {
                self.fail(format!("{} is fetched {age_us} us after {:?}", held.name, serve.kind));
            }
        }
        self.model.keys[key].in_flight = Some(id);
    }

    /// Whether a client waits for a refresh of this key.
    pub fn refresh_is_owed(&self, key: usize) -> bool {
        let open = self.slots.iter().flatten().map(|(_, id)| &self.conns[*id].talk);
        open.into_iter().any(|talk| {
            let mut owed = talk.units.iter().skip(talk.replies.len());
            owed.any(|unit| unit.read.is_some() && unit.ask == Ask::Secret { key, refresh: true })
        })
    }

    /// The agent has read a reply of KMS's to its end.
    pub fn delivered(&mut self, serve: usize) {
        let stamp = self.stamp();
        self.model.serves[serve].delivered = Some(stamp);
        let key = self.model.serves[serve].key;
        self.model.keys[key].in_flight = None;
        if matches!(self.model.serves[serve].kind, ServeKind::Value { .. } | ServeKind::Refusal) {
            self.model.keys[key].history.push((stamp, serve));
        }
        self.say(|| format!("  KMS reply {serve} is delivered"));
    }

    pub fn check_caps(&self) {
        let count =
            |peer: Peer| self.slots.iter().flatten().filter(|(_, id)| self.conns[*id].peer == peer).count();
        let (kms, metadata) = (count(Peer::Kms), count(Peer::Metadata));
        if kms > UPSTREAM_MAX || metadata > 1 {
            self.fail(format!("{kms} connections to KMS, {metadata} to the metadata service"));
        }
        // One more for a moment: the newcomer is there before room is made for it.
        let clients = self.open_clients();
        if clients > self.set.connections_max + RESERVE + 1 {
            self.fail(format!("{clients} clients"));
        }
    }

    /// Why a client's connection may be ended at this moment.
    pub fn on_close(&mut self, id: ConnId) {
        if !self.conns[id].is_client() {
            for key in &mut self.model.keys {
                if key.in_flight == Some(id) {
                    key.in_flight = None;
                }
            }
            return;
        }
        let conn = &self.conns[id];
        let talk = &conn.talk;
        let write_overdue = talk.blocked.is_some_and(|at| self.now_us >= at.us + WRITE_US);
        let drained = self.terminated.is_some_and(|at| self.now_us >= at.us + DRAIN_US);
        let gone = conn.reset;
        let made_room =
            self.open_clients() >= self.set.connections_max || self.model.no_descriptor_us == self.now_us;
        let unread_at_cap = made_room && talk.blocked.is_some_and(|at| self.now_us >= at.us + UNREAD_US);
        if talk.said_close.is_none()
            && (talk.owed() > 0 || !talk.reply.is_empty())
            && !gone
            && !write_overdue
            && !unread_at_cap
            && !drained
        {
            self.fail(format!("connection {id} is closed and owes {} replies", talk.owed()));
        }
        if write_overdue {
            self.hit(Fault::WriteDeadline);
        }
        let conn = &self.conns[id];
        let talk = &conn.talk;
        let deadline = self.deadline_us(id).filter(|(at, _)| self.now_us >= *at);
        let rightly = talk.said_close.is_some()
            || gone
            || conn.fin
            || write_overdue
            || deadline.is_some()
            || made_room
            || self.terminated.is_some();
        if !rightly {
            self.fail(format!("connection {id} is closed for no reason: {talk:?}"));
        }
        if let Some((_, kind)) = deadline {
            self.hit(kind);
        }
        // Closing on bytes unread or on their way resets the connection, and the client may lose its last reply.
        let conn = &self.conns[id];
        let unread = (!conn.rx.is_empty() || conn.talk.sent_total > conn.read_total) && !conn.reset;
        let unseen = conn.arrived_total < conn.write_total;
        let lingered = conn.talk.said_close.is_some_and(|at| self.now_us >= at.us + LINGER_US);
        if unread
            && unseen
            && !conn.fin
            && !lingered
            && !write_overdue
            && !drained
            && !made_room
            && !conn.peer_gone
        {
            self.fail(format!("connection {id} is reset while its last reply is on its way"));
        }
    }

    /// When a quiet client's time is up, and which time that is.
    fn deadline_us(&self, id: ConnId) -> Option<(u64, Fault)> {
        let talk = &self.conns[id].talk;
        if let Some(said) = talk.said_close {
            return Some((said.us + LINGER_US, Fault::LingerDeadline));
        }
        if let Some(blocked) = talk.blocked {
            return Some((blocked.us + WRITE_US, Fault::WriteDeadline));
        }
        if talk.owed() > 0 {
            return None;
        }
        Some(match (talk.partial_since, talk.last_reply) {
            (Some(since), last) => {
                // Its head's time may begin with the reply before.
                (since.us.max(last.map_or(0, |at| at.us)) + HEAD_US, Fault::HeadDeadline)
            }
            (None, Some(last)) => (last.us + IDLE_US, Fault::IdleDeadline),
            (None, None) => (talk.accepted.us + FIRST_BYTE_US, Fault::FirstByteDeadline),
        })
    }

    /// After each tick.
    pub fn check(&mut self) {
        if let Some(leak) = super::logs::leak() {
            self.fail(format!("something secret is logged: {leak}"));
        }
        for slot in 0..self.slots.len() {
            let Some((_, id)) = self.slots[slot] else { continue };
            self.check_starvation(id);
            if !self.conns[id].is_client() {
                continue;
            }
            let talk = &self.conns[id].talk;
            if let Some((deadline_us, kind)) = self.deadline_us(id)
                && self.now_us > deadline_us + if kind == Fault::FirstByteDeadline { 1000 } else { 0 }
                // Once blocked, the agent's time runs from the first refusal; it may have been relieved since.
                && !(talk.said_close.is_some() && talk.blocked.is_some())
            {
                self.fail(format!("connection {id}: {kind:?} was at {deadline_us} us, and it is still open"));
            }
            let first = talk.units.get(talk.replies.len()).and_then(|unit| unit.read);
            if let Some(read) = first
                && talk.blocked.is_none()
                && talk.said_close.is_none()
            {
                let since = talk.last_reply.map_or(read.us, |last| last.us.max(read.us));
                let waited_us = self.now_us - since;
                if waited_us > 2 * READER_BUDGET_US + (self.stall_us - read.stall_us) {
                    self.fail(format!("connection {id} waits for its reply since {waited_us} us: {talk:?}"));
                }
            }
        }
        if self.open_clients() > self.set.connections_max + RESERVE {
            self.fail(format!("{} clients", self.open_clients()));
        }
        if let Some(at) = self.terminated
            && self.now_us > at.us + DRAIN_US + (self.stall_us - at.stall_us)
        {
            self.fail("SIGTERM was over 5 s ago");
        }
    }
}
