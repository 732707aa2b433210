//! KMS and the metadata service: real bytes, healthy or not.

use super::faults::Fault;
use super::logs::SECRET_MARK;
use super::model::{Key, Serve, ServeKind};
use super::net::Peer;
use super::world::{BEGIN_UNIX_S, BEGIN_US, ConnId, Ev, SECOND, Stamp, World};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, UNIX_EPOCH};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// KMS accepts clocks that are off by less.
const SKEW_MAX_S: i64 = 900;
/// What hangs is trouble until the agent gives up, at the latest then.
pub const HANG_US: u64 = 15 * SECOND;

/// A secret, as KMS has it.
#[derive(Debug)]
pub struct Secret {
    pub name: String,
    /// Counts its rotations, from 1.
    pub version: u32,
    pub alive: bool,
    pub next_rotation_us: Option<u64>,
    filler: usize,
}

impl Secret {
    /// The version that this key stands for now.
    pub fn version_for(&self, key: &Key) -> Option<u32> {
        if !self.alive {
            return None;
        }
        match key.version_id {
            Some(version) => (version <= self.version).then_some(version),
            None if key.previous => (self.version > 1).then(|| self.version - 1),
            None => Some(self.version),
        }
    }
}

#[derive(Debug)]
struct Issued {
    access_key_id: String,
    token: String,
    expires_unix_s: i64,
    revoked: bool,
}

#[derive(Debug, Default)]
pub struct Kms {
    pub secrets: Vec<Secret>,
    pub outage: Option<Fault>,
    pub dead_addresses: [bool; 3],
    addresses: usize,
    /// Its clock was told wrong to the agent in this run.
    pub skewed: bool,
    issued: Vec<Issued>,
}

impl Kms {
    pub fn is_dead(&self, address: SocketAddr) -> bool {
        let SocketAddr::V4(address) = address else { return false };
        self.dead_addresses[usize::from(address.ip().octets()[3] - 1)]
    }
}

#[derive(Debug, Default)]
pub struct Metadata {
    pub outage: Option<Fault>,
    /// It does not know tokens.
    plain: bool,
    /// Its tokens, the valid ones.
    tokens: Vec<String>,
    tokens_given: usize,
}

/// The requests on one upstream connection.
#[derive(Debug, Default)]
pub struct Requests {
    bytes: Vec<u8>,
    waiting: VecDeque<Request>,
    /// Requests so far.
    count: usize,
    /// Replies that were sent whole.
    answered: usize,
    over: bool,
    /// It has talked before it was asked: nothing that follows can be a reply.
    spoiled: bool,
}

#[derive(Debug)]
struct Request {
    /// Where it ends in the agent's stream.
    end: u64,
    head: String,
    key: Option<usize>,
    asked: Stamp,
    for_refresh: bool,
}

impl Request {
    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (found, value) = line.split_once(": ")?;
            found.eq_ignore_ascii_case(name).then_some(value)
        })
    }
}

/// What follows a reply.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    Keep,
    Fin,
    Reset,
}

impl World {
    pub fn make_secrets(&mut self, span_us: u64) {
        // So many that KMS's connections run out, sometimes.
        let count = if self.rng.chance(100) { self.rng.range(10, 16) } else { self.rng.range(1, 6) };
        let large = self.rng.chance(200);
        for number in 0..count {
            let name = if number == 1 { "app/cred-1".to_owned() } else { format!("db-{number}") };
            let filler = if large && self.rng.chance(500) {
                self.hit(Fault::KmsLarge);
                self.rng.below(45_000)
            } else {
                self.rng.below(300)
            };
            let version = u32::try_from(self.rng.range(1, 3)).unwrap();
            let secret = self.kms.secrets.len();
            let rotations = self.rng.range(0, 5);
            let mut at: Vec<u64> = (0..rotations).map(|_| self.now_us + self.rng.range(0, span_us)).collect();
            at.sort_unstable();
            self.kms.secrets.push(Secret {
                name: name.clone(),
                version,
                alive: true,
                next_rotation_us: at.first().copied(),
                filler,
            });
            for at in at {
                self.at(at, Ev::Rotate(secret));
            }
            if self.rng.chance(300) {
                let mut alive = false;
                for _ in 0..self.rng.range(1, 3) {
                    let after = self.rng.range(0, span_us);
                    self.after(after, Ev::Fate(secret, alive));
                    alive = !alive;
                }
            }
            self.model.keys.push(Key::new(secret, &name, None, false));
            if self.rng.chance(300) {
                let version = u32::try_from(self.rng.range(1, 4)).unwrap();
                self.model.keys.push(Key::new(secret, &name, Some(version), false));
            }
            if self.rng.chance(200) {
                self.model.keys.push(Key::new(secret, &name, None, true));
            }
        }
        self.kms.addresses = self.rng.below(3) + 1;
        if self.kms.addresses > 1 && self.roll(Fault::AddressDead) {
            let dead = self.rng.below(self.kms.addresses);
            self.kms.dead_addresses[dead] = true;
        }
        self.metadata.plain = self.plan.rate(Fault::MetadataPlain) > 0;
    }

    pub fn rotate(&mut self, secret: usize) {
        self.hit(Fault::SecretRotated);
        let one = &mut self.kms.secrets[secret];
        one.version += 1;
        one.next_rotation_us = None;
        let version = one.version;
        self.say(|| format!("secret {secret} is at version {version}"));
    }

    pub fn change_fate(&mut self, secret: usize, alive: bool) {
        self.hit(if alive { Fault::SecretRestored } else { Fault::SecretDeleted });
        self.say(|| format!("secret {secret} {}", if alive { "is restored" } else { "is deleted" }));
        self.kms.secrets[secret].alive = alive;
    }

    pub fn addresses(&mut self, host: &str, port: u16) -> Vec<SocketAddr> {
        if host.starts_with("metadata") {
            return vec![SocketAddr::from(([10, 0, 1, 1], port))];
        }
        let last = u8::try_from(self.kms.addresses).unwrap();
        let mut all: Vec<SocketAddr> =
            (1..=last).map(|it| SocketAddr::from(([10, 0, 0, it], port))).collect();
        self.rng.shuffle(&mut all);
        all
    }

    /// The agent has written to a service.
    pub fn on_asked(&mut self, id: ConnId, bytes: &[u8]) {
        let stamp = self.stamp();
        let end = self.conns[id].write_total;
        let requests = &mut self.conns[id].requests;
        requests.bytes.extend_from_slice(bytes);
        let Some(length) = requests.bytes.windows(4).position(|window| window == b"\r\n\r\n") else { return };
        if requests.bytes.len() != length + 4 {
            self.fail(format!("connection {id}: bytes after a request that has no body"));
        }
        let head = String::from_utf8(std::mem::take(&mut requests.bytes)).unwrap_or_default();
        if requests.count != requests.answered {
            self.fail(format!("connection {id}: a request before the reply to the last one"));
        }
        requests.count += 1;
        let key = (self.conns[id].peer == Peer::Kms).then(|| self.key_of(&head));
        let for_refresh = key.is_some_and(|key| {
            let read_us = self.model.keys[key].refresh_read_us;
            self.refresh_is_owed(key)
                || read_us.is_some_and(|at| self.now_us - at < 16 * SECOND + self.stall_us)
        });
        let request = Request { end, head, key, asked: stamp, for_refresh };
        self.conns[id].requests.waiting.push_back(request);
        if let Some(key) = key {
            self.on_fetch(id, key);
        }
    }

    fn key_of(&self, head: &str) -> usize {
        let line = head.lines().next().unwrap_or_default();
        let query = line.strip_prefix("POST /?").and_then(|rest| rest.strip_suffix(" HTTP/1.1"));
        let Some(query) = query else { self.fail(format!("not a request to KMS: {line}")) };
        let value = |name: &str| {
            let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
            pairs.find(|(it, _)| *it == name).map(|(_, value)| value.replace("%2F", "/"))
        };
        let (name, version, stage) = (value("SecretName"), value("VersionId"), value("VersionStage"));
        let found = self.model.keys.iter().position(|key| {
            let previous = stage.as_deref() == Some("ACSPrevious");
            name.as_deref() == Some(key.name.as_str())
                && version == key.version_id.map(|version| format!("v{version}"))
                && previous == key.previous
        });
        found.unwrap_or_else(|| self.fail(format!("KMS is asked for what nobody wanted: {line}")))
    }

    /// The connection is there.
    pub fn upstream_connected(&mut self, id: ConnId) {
        if self.conns[id].peer == Peer::Kms && self.roll(Fault::KmsTalksFirst) {
            self.trouble();
            let bytes = self.rng.pick(&[
                b"220 mail.example ready\r\n".as_slice(),
                b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            ]);
            let after = self.rng.pick(&[0, 0, 200, 30_000]);
            self.send(id, after, Ev::Bytes(id, bytes.to_vec(), None));
            self.conns[id].requests.spoiled = true;
            if self.rng.chance(500) {
                self.send(id, 0, Ev::Fin(id, None));
                self.conns[id].requests.over = true;
            }
        }
    }

    /// Bytes of the agent's have come to a service.
    pub fn upstream_receives(&mut self, id: ConnId) {
        let conn = &mut self.conns[id];
        let arrived = conn.arrived_total;
        while let Some(request) = self.conns[id].requests.waiting.front()
            && request.end <= arrived
            && let Some(request) = self.conns[id].requests.waiting.pop_front()
        {
            if self.conns[id].requests.over {
                return;
            }
            match request.key {
                Some(key) => self.kms_answers(id, key, &request),
                None => self.metadata_answers(id, &request),
            }
        }
    }

    fn first_of(&mut self, faults: &[Fault]) -> Option<Fault> {
        faults.iter().copied().find(|fault| self.roll(*fault))
    }

    fn kms_answers(&mut self, id: ConnId, key: usize, request: &Request) {
        const FAULTS: &[Fault] = &[
            Fault::KmsHangs,
            Fault::KmsFails,
            Fault::KmsFailsInHtml,
            Fault::KmsThrottles,
            Fault::KmsRefusesCredentials,
            Fault::KmsRefusesClock,
            Fault::KmsRefusesSignature,
            Fault::KmsQuotesToken,
            Fault::KmsAnswersForAnother,
            Fault::KmsCutsBody,
            Fault::KmsGarbage,
            Fault::KmsCutsJson,
            Fault::KmsTooLarge,
            Fault::KmsDropsMidReply,
            Fault::KmsDropsBeforeReply,
            Fault::KmsResetsMidReply,
        ];
        let rolled = self.first_of(FAULTS);
        let outage = self.kms.outage.filter(|fault| FAULTS.contains(fault));
        if let Some(fault) = outage {
            self.hit(fault);
        }
        let fault = outage.or(rolled);
        match fault {
            Some(Fault::KmsHangs) => self.trouble_for(HANG_US),
            Some(_) => self.trouble(),
            None => {}
        }
        let number = self.model.serves.len();
        let request_id = format!("kms-req-{number}");
        let error = |code: &str, message: &str| {
            format!(
                r#"{{"Code":"{code}","Message":"{request_id}: {message}","RequestId":"{request_id}","HostId":"kms.sim"}}"#
            )
        };
        let secret = &self.kms.secrets[self.model.keys[key].secret];
        let version = secret.version_for(&self.model.keys[key]);
        let name = secret.name.clone();
        let value = |name: &str, version: u32, more: &str, filler: usize| {
            format!(
                r#"{{"RequestId":"{request_id}","SecretName":"{name}","VersionId":"v{version}","CreateTime":"2025-01-01T00:00:00Z","SecretData":"{SECRET_MARK}{name}#{version}#{number};","SecretDataType":"text","VersionStages":{{"VersionStage":["ACSCurrent"]}},{more}"SecretType":"Generic","ExtendedConfig":"{}"}}"#,
                "f".repeat(filler)
            )
        };
        let filler = secret.filler;
        let rotation = secret.next_rotation_us.filter(|_| self.set.rotations_announced);
        let rotates_unix_s =
            rotation.map(|at| BEGIN_UNIX_S + i64::try_from((at - BEGIN_US) / SECOND).unwrap());
        let mut head_more = String::new();
        let mut kind = ServeKind::Failure;
        let true_unix_s = self.true_unix_s();
        let mut date_unix_s = true_unix_s;
        let (status, body) = match fault {
            Some(Fault::KmsHangs) => return,
            Some(Fault::KmsDropsBeforeReply) => {
                self.send(id, 1000, Ev::Fin(id, None));
                self.conns[id].requests.over = true;
                return;
            }
            Some(Fault::KmsFails) => {
                let (status, code) = self.rng.pick(&[
                    (500, "InternalFailure"),
                    (503, "ServiceUnavailableTemporary"),
                    (502, "Bad"),
                ]);
                if self.rng.chance(200) {
                    head_more.push_str("Retry-After: 3\r\n");
                }
                (status, error(code, "it is broken"))
            }
            Some(Fault::KmsFailsInHtml) => (502, "<html>Bad Gateway</html>".to_owned()),
            Some(Fault::KmsThrottles) => {
                match self.rng.below(3) {
                    0 => {}
                    1 => head_more.push_str(&format!("Retry-After: {}\r\n", self.rng.range(1, 20))),
                    _ => head_more.push_str(&format!("x-acs-retry-after: {}\r\n", self.rng.range(1, 9000))),
                }
                (429, error("Rejected.Throttling", "too fast"))
            }
            Some(Fault::KmsRefusesCredentials) => {
                for issued in &mut self.kms.issued {
                    issued.revoked = true;
                }
                (403, error("InvalidSecurityToken.Expired", "Specified SecurityToken is expired."))
            }
            Some(Fault::KmsRefusesClock) => {
                self.kms.skewed = true;
                date_unix_s += i64::try_from(self.rng.range(0, 4_000)).unwrap() - 2_000;
                (400, error("IllegalTimestamp", "your clock is off"))
            }
            Some(Fault::KmsRefusesSignature) => (400, error("SignatureDoesNotMatch", "it does not match")),
            Some(Fault::KmsQuotesToken) => {
                let token = request.header("x-acs-security-token").unwrap_or_default();
                let message =
                    format!("does not match, server StringToSign is [x], x-acs-security-token:{token}");
                (400, error("SignatureDoesNotMatch", &message))
            }
            Some(Fault::KmsAnswersForAnother) => {
                kind = ServeKind::Lie;
                (200, value("another", 1, "", 0))
            }
            Some(Fault::KmsGarbage) => {
                kind = ServeKind::Lie;
                (200, format!("{SECRET_MARK}x#1#{number}; is no JSON"))
            }
            Some(Fault::KmsCutsJson) => {
                kind = ServeKind::Lie;
                let mut body = value(&name, 1, "", 0);
                body.truncate(body.len() - 1 - self.rng.below(20));
                (200, body)
            }
            Some(Fault::KmsTooLarge) => {
                kind = ServeKind::Lie;
                (200, value(&name, 1, "", 140_000))
            }
            _ => match self.judge(request) {
                Some((status, code)) => {
                    self.trouble();
                    (status, error(code, "no"))
                }
                None => match version {
                    Some(version) => {
                        kind = ServeKind::Value { version };
                        let date = rotates_unix_s.and_then(|at| {
                            OffsetDateTime::from_unix_timestamp(at).ok()?.format(&Rfc3339).ok()
                        });
                        let more =
                            date.map(|date| format!(r#""NextRotationDate":"{date}","#)).unwrap_or_default();
                        (200, value(&name, version, &more, filler))
                    }
                    None => {
                        kind = ServeKind::Refusal;
                        (404, error("Forbidden.ResourceNotFound", "there is no such thing"))
                    }
                },
            },
        };
        if self.conns[id].requests.spoiled {
            kind = ServeKind::Lie;
        }
        self.say(|| format!("  KMS answers {id} for key {key} with {number}: {status} {kind:?} {fault:?}"));
        self.model.serves.push(Serve {
            key,
            kind,
            body: Rc::new(body.clone().into_bytes()),
            asked: request.asked,
            for_refresh: request.for_refresh,
            delivered: None,
            rotates_unix_s,
        });
        let then = match fault {
            Some(Fault::KmsCutsBody | Fault::KmsDropsMidReply) => Then::Fin,
            Some(Fault::KmsResetsMidReply) => Then::Reset,
            _ => Then::Keep,
        };
        self.reply(id, status, &head_more, body.as_bytes(), date_unix_s, Some(number), then);
    }

    /// Why KMS would refuse who asks, or when.
    fn judge(&self, request: &Request) -> Option<(u16, &'static str)> {
        let token = request.header("x-acs-security-token").unwrap_or_default();
        let access_key_id = request.header("x-acs-accesskey-id").unwrap_or_default();
        let Some(issued) = self.kms.issued.iter().find(|issued| issued.token == token) else {
            self.fail(format!("KMS is shown a security token that nobody issued: {token}"));
        };
        if issued.access_key_id != access_key_id {
            self.fail("security token and access key are not of one issue");
        }
        let now = self.true_unix_s();
        if issued.revoked || issued.expires_unix_s <= now {
            return Some((403, "InvalidSecurityToken.Expired"));
        }
        let date = request.header("x-acs-date").and_then(|it| OffsetDateTime::parse(it, &Rfc3339).ok());
        let Some(date) = date else { self.fail("no x-acs-date") };
        ((date.unix_timestamp() - now).abs() > SKEW_MAX_S).then_some((400, "IllegalTimestamp"))
    }

    /// Sends a reply in one of the ways that HTTP knows. `then` other than `Keep` cuts it off.
    #[expect(clippy::too_many_arguments, reason = "each of them is a different thing")]
    fn reply(
        &mut self,
        id: ConnId,
        status: u16,
        head_more: &str,
        body: &[u8],
        date_unix_s: i64,
        serve: Option<usize>,
        then: Then,
    ) {
        let kms = serve.is_some();
        let mut delay_us =
            if self.plan.calm { self.rng.range(500, 30_000) } else { self.rng.magnitude(100, 200_000) };
        if self.roll(if kms { Fault::KmsSlow } else { Fault::MetadataSlow }) {
            delay_us += self.rng.magnitude(200_000, 6 * SECOND);
            self.trouble_for(delay_us);
        }
        let mut out = Vec::new();
        if self.roll(Fault::KmsInterim) {
            for _ in 0..self.rng.range(1, 4) {
                out.extend_from_slice(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n");
            }
        }
        let date = httpdate::fmt_http_date(
            UNIX_EPOCH + Duration::from_secs(u64::try_from(date_unix_s).unwrap_or(0)),
        );
        out.extend_from_slice(
            format!("HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nDate: {date}\r\n{head_more}")
                .as_bytes(),
        );
        let until_close = self.roll(Fault::KmsUntilClose);
        let says_close = until_close || self.roll(Fault::KmsSaysClose);
        if says_close {
            out.extend_from_slice(b"Connection: close\r\n");
        }
        if until_close {
            out.extend_from_slice(b"\r\n");
            out.extend_from_slice(body);
        } else if self.roll(Fault::KmsChunked) {
            out.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
            let mut rest = body;
            while !rest.is_empty() {
                let (part, more) = rest.split_at(self.rng.below(rest.len()) + 1);
                out.extend_from_slice(format!("{:x}\r\n", part.len()).as_bytes());
                out.extend_from_slice(part);
                out.extend_from_slice(b"\r\n");
                rest = more;
            }
            out.extend_from_slice(b"0\r\n\r\n");
        } else {
            out.extend_from_slice(format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes());
            out.extend_from_slice(body);
        }
        if then != Then::Keep {
            // Cut off somewhere; what only the end delimits would look whole if only its body were cut.
            let end = if until_close { out.len() - body.len() } else { out.len() };
            out.truncate(self.rng.below(end));
            self.send_in_parts(id, delay_us, &out, None);
            let end = if then == Then::Fin { Ev::Fin(id, None) } else { Ev::Reset(id) };
            let after = self.latency();
            self.send(id, after, end);
            self.conns[id].requests.over = true;
            return;
        }
        if until_close {
            self.send_in_parts(id, delay_us, &out, None);
            self.send(id, 0, Ev::Fin(id, serve));
            self.conns[id].requests.over = true;
            self.conns[id].requests.answered += 1;
            return;
        }
        self.send_in_parts(id, delay_us, &out, serve);
        self.conns[id].requests.answered += 1;
        if self.roll(Fault::KmsSaysMore) {
            // Nobody can tell this from the next reply, if it comes late enough.
            self.trouble();
            self.conns[id].requests.spoiled = true;
            self.send(id, 0, Ev::Bytes(id, b"HTTP/1.1 200 more\r\n".to_vec(), None));
        }
        if says_close {
            let after = self.rng.magnitude(1, 100_000);
            self.send(id, after, Ev::Fin(id, None));
            self.conns[id].requests.over = true;
        } else if self.roll(Fault::KmsClosesIdle) {
            let after = self.rng.magnitude(1, 70 * SECOND);
            let requests = self.conns[id].requests.count;
            let at = self.send(id, 0, Ev::Tell(id));
            self.at(at + after, Ev::KmsClosesIdle(id, requests));
        }
    }

    pub fn kms_closes_idle(&mut self, id: ConnId, requests: usize) {
        // A request may be on its way: that is what makes it interesting.
        let conn = &mut self.conns[id];
        let arrived = conn.requests.count - conn.requests.waiting.len();
        if arrived == requests && !conn.requests.over && conn.token.is_some() {
            conn.requests.over = true;
            conn.peer_gone = true;
            self.trouble();
            self.send(id, 0, Ev::Fin(id, None));
        }
    }

    fn send_in_parts(&mut self, id: ConnId, delay_us: u64, bytes: &[u8], serve: Option<usize>) {
        let trickles = self.roll(Fault::KmsTrickles);
        let parts = if trickles { self.rng.below(50) + 2 } else { self.rng.below(4) + 1 };
        let mut after = delay_us + self.latency();
        let mut rest = bytes;
        for part in (0..parts).rev() {
            if rest.is_empty() {
                break;
            }
            let count = if part == 0 { rest.len() } else { (rest.len() / (part + 1)).max(1) };
            let (bytes, more) = rest.split_at(count);
            rest = more;
            let mark = serve.filter(|_| rest.is_empty());
            self.send(id, after, Ev::Bytes(id, bytes.to_vec(), mark));
            let gap = if trickles { self.rng.magnitude(1000, 300_000) } else { self.rng.pick(&[0, 10, 400]) };
            after += gap;
        }
        if trickles {
            self.trouble_for(after);
        }
    }

    fn metadata_answers(&mut self, id: ConnId, request: &Request) {
        const FAULTS: &[Fault] = &[
            Fault::MetadataHangs,
            Fault::MetadataFails,
            Fault::MetadataGarbage,
            Fault::MetadataRefusesToken,
            Fault::MetadataNoRole,
            Fault::MetadataExpired,
            Fault::MetadataDrops,
        ];
        let rolled = self.first_of(FAULTS);
        let outage = self.metadata.outage.filter(|fault| FAULTS.contains(fault));
        if let Some(fault) = outage {
            self.hit(fault);
        }
        let fault = outage.or(rolled);
        match fault {
            Some(Fault::MetadataHangs) => self.trouble_for(HANG_US),
            Some(_) => self.trouble(),
            None => {}
        }
        let line = request.head.lines().next().unwrap_or_default();
        let Some(path) = line.strip_suffix(" HTTP/1.1") else { self.fail(format!("not HTTP/1.1: {line}")) };
        let token = request.header("X-aliyun-ecs-metadata-token");
        let authorized = self.metadata.plain
            || token.is_some_and(|token| self.metadata.tokens.iter().any(|it| it == token));
        let roles = "GET /latest/meta-data/ram/security-credentials/";
        let (status, body) = match (fault, path) {
            (Some(Fault::MetadataHangs), _) => return,
            (Some(Fault::MetadataDrops), _) => {
                return self.reply(id, 200, "", b"cut", BEGIN_UNIX_S, None, Then::Fin);
            }
            (Some(Fault::MetadataFails), _) => (500, String::new()),
            (Some(Fault::MetadataGarbage), _) => (200, "\u{1}<html>what?</html>\n\n".to_owned()),
            (_, "PUT /latest/api/token") if self.metadata.plain => {
                self.hit(Fault::MetadataPlain);
                (404, String::new())
            }
            (_, "PUT /latest/api/token") => {
                self.metadata.tokens_given += 1;
                let token = format!("{SECRET_MARK}imds-{}", self.metadata.tokens_given);
                self.metadata.tokens.push(token.clone());
                (200, token)
            }
            (Some(Fault::MetadataRefusesToken), _) => {
                self.metadata.tokens.clear();
                (401, String::new())
            }
            _ if !authorized => (403, String::new()),
            (Some(Fault::MetadataNoRole), _) => (404, String::new()),
            (_, "GET /latest/meta-data/region-id") => (200, "cn-sim\n".to_owned()),
            (_, path) if path == roles => (200, "sim-role\n".to_owned()),
            (fault, path) if path.strip_prefix(roles) == Some("sim-role") => (200, self.issue(fault)),
            (_, other) => self.fail(format!("the metadata service is asked {other}")),
        };
        self.say(|| format!("  metadata answers {id} to {path}: {status} {fault:?}"));
        self.reply(id, status, "", body.as_bytes(), self.true_unix_s(), None, Then::Keep);
    }

    fn issue(&mut self, fault: Option<Fault>) -> String {
        let number = self.kms.issued.len();
        let life_s = match fault {
            Some(Fault::MetadataExpired) => -60,
            _ if self.roll(Fault::MetadataShortLife) => {
                // They may end while a request is on its way.
                self.trouble();
                i64::try_from(self.rng.range(5, 200)).unwrap()
            }
            _ => 21_600,
        };
        let expires_unix_s = self.true_unix_s() + life_s;
        let issued = Issued {
            access_key_id: format!("STS.{SECRET_MARK}id-{number}"),
            token: format!("{SECRET_MARK}sts-{number}"),
            expires_unix_s,
            revoked: false,
        };
        let date = OffsetDateTime::from_unix_timestamp(expires_unix_s).unwrap().format(&Rfc3339).unwrap();
        let body = format!(
            r#"{{"AccessKeyId":"{}","AccessKeySecret":"{SECRET_MARK}aks-{number}","Expiration":"{date}","SecurityToken":"{}","LastUpdated":"2025-01-01T00:00:00Z","Code":"Success"}}"#,
            issued.access_key_id, issued.token
        );
        self.kms.issued.push(issued);
        body
    }
}
