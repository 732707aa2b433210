//! The broker alone, with a hand-made clock, KMS and metadata service.

use super::*;
use crate::call::{CallError, Service};
use crate::config::HostPort;
use crate::http::request::{Parsed, header_room, parse};
use crate::http::response::{Response, ResponseParser};
use crate::identity::IdentityError;

const CREDENTIALS: &str = r#"{"Code":"Success","AccessKeyId":"STS.a","AccessKeySecret":"k","SecurityToken":"t",
    "Expiration":"2100-01-01T00:00:00Z"}"#;

struct Rig {
    broker: Broker,
    now: Now,
    calls: Vec<Call>,
    /// Replies to those who waited, as `client: status X-Cache`.
    answers: Vec<(u64, String)>,
    next_client: u64,
    metadata_works: bool,
    metadata_hangs: bool,
    metadata_asked: u32,
}

impl Rig {
    fn new() -> Rig {
        Rig::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut Config)) -> Rig {
        let mut config = Config::default();
        config.cache.ttl = Duration::from_secs(100);
        config.cache.max_stale = Duration::from_secs(1000);
        config.kms.endpoint = Some(HostPort { host: "kms.test".into(), port: 443 });
        change(&mut config);
        config.kms.role_name = Some("app".into());
        let identity = Identity::from_config(&config.kms, &|_| None, Random::from_seed(7)).unwrap();
        let broker = Broker::new(&config, Secret::from(&b"tok"[..]), identity, Random::from_seed(42));
        let now = Now { mono: Mono::from_micros(1_000_000_000), unix_s: 1_700_000_000 };
        let mut rig = Rig {
            broker,
            now,
            calls: vec![],
            answers: vec![],
            next_client: 0,
            metadata_works: true,
            metadata_hangs: false,
            metadata_asked: 0,
        };
        rig.settle();
        rig
    }

    /// Asks for a secret; `None`: the client waits.
    fn ask(&mut self, target: &str) -> Option<String> {
        self.next_client += 1;
        let head = format!("GET {target} HTTP/1.1\r\nHost: localhost\r\nX-KMS-Token: tok\r\n\r\n");
        let (mut room, mut out) = (header_room(), Vec::new());
        let Parsed::Request(request, _) = parse(head.as_bytes(), &mut room) else { panic!("{target}") };
        let visit = Visit { last: false, past_cap: false, open: 1, counted: &Connections::default() };
        let asked = self.broker.ask(ClientId(self.next_client), &request, visit, self.now, &mut out);
        self.settle();
        match asked {
            Disposition::Answered(_) => Some(summary(&out)),
            Disposition::Waiting => None,
        }
    }

    /// Carries out what the broker wants; the metadata service answers at once.
    fn settle(&mut self) {
        while let Some(output) = self.broker.poll_output() {
            match output {
                Output::Call(call) if call.service == Service::Metadata => {
                    self.metadata_asked += 1;
                    if self.metadata_hangs {
                        continue;
                    }
                    let mut request = Vec::new();
                    self.broker.write_request(&call, self.now, &mut request).unwrap();
                    let (status, body) = match (self.metadata_works, request.starts_with(b"PUT")) {
                        (false, _) => (500, ""),
                        (true, true) => (200, "token"),
                        (true, false) => (200, CREDENTIALS),
                    };
                    self.broker.on_called(call.id, Ok(response(status, "", body)), self.now);
                }
                Output::Call(call) => self.calls.push(call),
                Output::Answer(answer) => {
                    let mut out = Vec::new();
                    self.broker.write_answer(&answer, false, self.now, &mut out);
                    self.answers.push((answer.client.0, summary(&out)));
                }
            }
        }
        self.broker.check_invariants();
    }

    fn sleep_ms(&mut self, ms: u64) {
        // As the loop does: stops at every deadline on the way.
        let end = self.now.mono.after(Duration::from_millis(ms));
        for round in 0.. {
            assert!(round < 10_000, "the broker asks to be woken without end");
            let next = self.broker.next_deadline().max(self.now.mono).min(end);
            self.now.unix_s += i64::try_from(next.since(self.now.mono).as_secs()).unwrap();
            self.now.mono = next;
            if next < end || self.broker.next_deadline() <= end {
                self.broker.on_time(next);
                self.settle();
            }
            if next == end && self.broker.next_deadline() > end {
                return;
            }
        }
    }

    fn reply(&mut self, status: u16, headers: &str, body: &str) {
        let call = self.calls.remove(0);
        self.broker.on_called(call.id, Ok(response(status, headers, body)), self.now);
        self.settle();
    }

    fn value(&mut self, name: &str, data: &str) {
        self.reply(200, "", &value(name, data));
    }

    fn error(&mut self, status: u16, code: &str) {
        self.reply(status, "", &error(code));
    }

    fn break_off(&mut self) {
        let call = self.calls.remove(0);
        let error = CallError::timeout("connect", &call.origin, Duration::from_secs(2));
        self.broker.on_called(call.id, Err(error), self.now);
        self.settle();
    }

    fn take_answers(&mut self) -> Vec<String> {
        std::mem::take(&mut self.answers).into_iter().map(|(_, text)| text).collect()
    }

    /// A secret in the cache, fetched just now.
    fn cached(&mut self, name: &str) {
        assert_eq!(self.ask(&format!("/v1/{name}")), None);
        self.value(name, "one");
        assert_eq!(self.take_answers(), ["200 MISS 0 one"]);
    }
}

fn response(status: u16, headers: &str, body: &str) -> Response {
    let mut parser = ResponseParser::new(100_000);
    let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n{headers}\r\n{body}", body.len());
    parser.feed(head.as_bytes()).unwrap();
    parser.into_response()
}

fn value(name: &str, data: &str) -> String {
    format!(r#"{{"SecretName":"{name}","SecretData":"{data}"}}"#)
}

fn error(code: &str) -> String {
    format!(r#"{{"HttpStatus":"x","Code":"{code}","Message":"m","RequestId":"r"}}"#)
}

/// `status X-Cache Age data` or `status code`.
fn summary(reply: &[u8]) -> String {
    let text = std::str::from_utf8(reply).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let header = |name: &str| {
        let line = head.lines().find_map(|line| line.strip_prefix(name));
        line.map(|value| format!("{} ", value.trim_start_matches(": "))).unwrap_or_default()
    };
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    let what = body.get("SecretData").or(body.get("Code")).unwrap().as_str().unwrap();
    format!("{} {}{}{what}", &head[9..12], header("X-Cache"), header("Age"))
}

#[test]
fn a_miss_then_hits() {
    let mut rig = Rig::new();
    rig.cached("db");
    rig.sleep_ms(3_500);
    assert_eq!(rig.ask("/v1/db").unwrap(), "200 HIT 3 one");
    assert_eq!(rig.ask("/secretsmanager/get?secretId=db&versionStage=ACSCurrent").unwrap(), "200 HIT 3 one");
    assert_eq!(rig.ask("/v1/db?versionStage=ACSPrevious"), None, "another key");
    assert_eq!(rig.calls.len(), 1);
}

#[test]
fn readers_of_a_miss_share_one_call() {
    let mut rig = Rig::new();
    for _ in 0..50 {
        assert_eq!(rig.ask("/v1/db"), None);
    }
    assert_eq!(rig.calls.len(), 1);
    rig.broker.left(ClientId(7));
    rig.value("db", "one");
    assert_eq!(rig.answers.len(), 49);
    assert!(rig.take_answers().iter().all(|it| it == "200 MISS 0 one"));
}

#[test]
fn a_call_goes_on_when_its_reader_leaves() {
    let mut rig = Rig::new();
    rig.ask("/v1/db");
    rig.broker.left(ClientId(rig.next_client));
    rig.value("db", "one");
    assert_eq!(rig.ask("/v1/db").unwrap(), "200 HIT 0 one");
}

#[test]
fn a_hot_value_is_refreshed_ahead_and_a_cold_one_is_not() {
    let mut rig = Rig::new();
    rig.cached("cold");
    rig.cached("hot");
    rig.ask("/v1/hot");
    rig.sleep_ms(69_000);
    assert!(rig.calls.is_empty(), "not before 70 %");
    rig.sleep_ms(11_500);
    assert_eq!(rig.calls.len(), 1, "after 80 % at the latest, though nobody asks");
    assert_eq!(rig.broker.metrics.refreshes, 1);
    assert_eq!(rig.ask("/v1/hot").unwrap(), "200 HIT 80 one");
    rig.value("hot", "two");
    assert_eq!(rig.ask("/v1/hot").unwrap(), "200 HIT 0 two");
    // First read in its last fifth: served, and refreshed behind its back.
    assert_eq!(rig.ask("/v1/cold").unwrap(), "200 HIT 80 one");
    assert_eq!(rig.calls.len(), 1);
    rig.value("cold", "two");
    rig.sleep_ms(101_000);
    assert!(rig.ask("/v1/cold").is_none(), "nobody read the refreshed one: it was left to expire");
}

#[test]
fn an_expired_value_waits_a_second_for_kms_and_not_at_all_once_a_try_failed() {
    let mut rig = Rig::new();
    rig.cached("db");
    rig.sleep_ms(101_000);
    assert_eq!(rig.ask("/v1/db"), None);
    rig.sleep_ms(600);
    assert_eq!(rig.ask("/v1/db"), None);
    rig.sleep_ms(399);
    assert!(rig.answers.is_empty());
    rig.sleep_ms(1);
    assert_eq!(
        rig.take_answers(),
        ["200 STALE 102 one", "200 STALE 102 one"],
        "a second after the try began"
    );
    assert_eq!(rig.calls.len(), 1, "which goes on");
    rig.break_off();
    assert_eq!(rig.ask("/v1/db").unwrap(), "200 STALE 102 one");
    // The retries go on by themselves.
    rig.sleep_ms(501);
    assert_eq!(rig.calls.len(), 1);
    rig.value("db", "two");
    assert_eq!(rig.ask("/v1/db").unwrap(), "200 HIT 0 two");
}

#[test]
fn retries_back_off_until_the_stale_ceiling() {
    let mut rig = Rig::new();
    rig.cached("db");
    rig.sleep_ms(101_000);
    rig.ask("/v1/db");
    let mut tries = 0;
    for _ in 0..1000 {
        if rig.calls.is_empty() {
            rig.sleep_ms(1000);
        } else {
            tries += 1;
            rig.error(503, "ServiceUnavailableTemporary");
        }
    }
    assert!((30..140).contains(&tries), "{tries} tries in some 900 s, a pause of 15 s on the average");
    rig.take_answers();
    rig.sleep_ms(200_000);
    assert_eq!(rig.ask("/v1/db"), None, "past the ceiling nothing is left to serve");
    assert!(rig.broker.flights.find(KeyRef::current("db")).is_some());
}

#[test]
fn without_a_value_three_tries_and_the_last_error() {
    let mut rig = Rig::new();
    rig.ask("/v1/db");
    for _ in 0..3 {
        assert!(rig.answers.is_empty());
        assert_eq!(rig.calls.len(), 1);
        rig.error(500, "InternalFailure");
        rig.sleep_ms(1_000);
    }
    assert_eq!(rig.take_answers(), ["500 InternalFailure"]);
    assert!(rig.calls.is_empty() && rig.broker.flights.find(KeyRef::current("db")).is_none());
}

#[test]
fn without_a_value_eight_seconds_and_not_more() {
    let mut rig = Rig::new();
    let began = rig.now.mono;
    rig.ask("/v1/db");
    let end = began.after(Duration::from_secs(8));
    assert_eq!(rig.calls[0].deadline, end, "a try is cut to what is left");
    rig.sleep_ms(5_000);
    rig.break_off();
    rig.sleep_ms(1_000);
    assert_eq!(rig.calls[0].deadline, end);
    rig.sleep_ms(2_001);
    assert_eq!(rig.take_answers(), ["504 UpstreamTimeout"]);
}

#[test]
fn eight_seconds_also_for_who_sees_the_stale_value_die() {
    let mut rig = Rig::new();
    rig.cached("db");
    rig.sleep_ms(1_099_500);
    assert_eq!(rig.ask("/v1/db"), None);
    rig.sleep_ms(1_000);
    assert!(rig.answers.is_empty(), "it died half a second ago");
    rig.sleep_ms(6_999);
    assert!(rig.answers.is_empty());
    rig.sleep_ms(1);
    assert_eq!(rig.take_answers(), ["504 UpstreamTimeout"], "from the beginning of the try");
}

#[test]
fn who_joins_after_the_stale_value_died_does_not_lengthen_anybody_s_wait() {
    let mut rig = Rig::new();
    rig.cached("db");
    rig.sleep_ms(1_099_500);
    assert_eq!(rig.ask("/v1/db"), None);
    rig.sleep_ms(600);
    assert_eq!(rig.ask("/v1/db"), None);
    rig.sleep_ms(7_400);
    assert_eq!(rig.take_answers(), ["504 UpstreamTimeout"; 2]);
}

#[test]
fn a_refusal_drops_the_value_and_is_remembered_for_five_seconds() {
    let mut rig = Rig::new();
    rig.cached("db");
    rig.sleep_ms(101_000);
    rig.ask("/v1/db");
    rig.error(404, "Forbidden.ResourceNotFound");
    assert_eq!(rig.take_answers(), ["404 Forbidden.ResourceNotFound"]);
    rig.sleep_ms(4_900);
    assert_eq!(rig.ask("/v1/db").unwrap(), "404 Forbidden.ResourceNotFound");
    assert!(rig.calls.is_empty());
    rig.sleep_ms(200);
    assert_eq!(rig.ask("/v1/db"), None);
}

#[test]
fn refresh_now_replaces_is_coalesced_and_limited() {
    let mut rig = Rig::new();
    rig.cached("db");
    for _ in 0..5 {
        assert_eq!(rig.ask("/v1/db?refreshNow=true"), None);
    }
    assert_eq!(rig.ask("/v1/db").unwrap(), "200 HIT 0 one", "others are not held up");
    assert_eq!(rig.calls.len(), 1);
    rig.value("db", "two");
    assert_eq!(rig.take_answers(), ["200 REFRESH 0 two"; 5]);
    rig.sleep_ms(900);
    assert_eq!(rig.ask("/v1/db?refreshNow=true").unwrap(), "200 HIT 0 two");
    rig.sleep_ms(101);
    assert_eq!(rig.ask("/v1/db?refreshNow=true"), None);
    for _ in 0..3 {
        rig.error(500, "InternalFailure");
        rig.sleep_ms(1_000);
    }
    assert_eq!(rig.take_answers(), ["500 InternalFailure"]);
    assert_eq!(rig.ask("/v1/db").unwrap(), "200 HIT 4 two", "the value stays");
}

#[test]
fn refresh_now_is_not_answered_by_a_call_that_began_before_it() {
    let mut rig = Rig::new();
    rig.ask("/v1/db");
    assert_eq!(rig.ask("/v1/db?refreshNow=1"), None);
    assert_eq!(rig.calls.len(), 1, "one call a key at a time");
    rig.value("db", "old");
    assert_eq!(rig.take_answers(), ["200 MISS 0 old"]);
    rig.value("db", "new");
    assert_eq!(rig.take_answers(), ["200 REFRESH 0 new"]);
}

#[test]
fn at_most_eight_calls_and_every_reader_in_turn() {
    let mut rig = Rig::new();
    for n in 0..200 {
        assert_eq!(rig.ask(&format!("/v1/s{n}")), None);
    }
    assert_eq!(rig.calls.len(), 8);
    for n in 0..200 {
        rig.value(&format!("s{n}"), "x");
        assert!(rig.calls.len() <= 8);
    }
    assert_eq!(rig.answers.len(), 200);
    assert!(rig.answers.iter().map(|(client, _)| *client).eq(1..=200), "first come, first served");
}

#[test]
fn refreshes_behind_the_scenes_leave_room_for_readers() {
    let mut rig = Rig::new();
    for n in 0..20 {
        rig.cached(&format!("s{n}"));
        rig.ask(&format!("/v1/s{n}"));
    }
    rig.sleep_ms(90_000);
    assert_eq!(rig.calls.len(), 4);
    rig.ask("/v1/new");
    assert_eq!(rig.calls.len(), 5);
}

/// Five hot values have expired while four refreshes were out for long and one, of the last name, was held back.
fn rig_with_a_refresh_held_back() -> (Rig, Vec<String>) {
    let mut rig = Rig::new();
    let mut names = ["a", "b", "c", "d", "e"].map(str::to_owned).to_vec();
    for name in &names {
        rig.cached(name);
        assert_eq!(rig.ask(&format!("/v1/{name}")).unwrap(), "200 HIT 0 one");
    }
    rig.sleep_ms(101_000);
    assert_eq!((rig.calls.len(), rig.broker.flights.queued().len()), (4, 1));
    let held_back = rig.broker.flights.get(rig.broker.flights.queued()[0]).unwrap().key().id.to_owned();
    names.sort_by_key(|name| *name == held_back);
    (rig, names)
}

#[test]
fn a_held_back_refresh_begins_with_its_first_reader() {
    let (mut rig, names) = rig_with_a_refresh_held_back();
    assert_eq!(rig.ask(&format!("/v1/{}", names[4])), None);
    rig.sleep_ms(999);
    assert_eq!((rig.calls.len(), rig.answers.len()), (5, 0));
    rig.sleep_ms(1);
    assert_eq!(rig.answers.len(), 1, "a second after the try began");
}

#[test]
fn a_held_back_refresh_begins_when_there_is_room_for_it() {
    let (mut rig, names) = rig_with_a_refresh_held_back();
    for name in names {
        assert_eq!(rig.ask(&format!("/v1/{name}")), None);
    }
    rig.sleep_ms(999);
    assert_eq!((rig.calls.len(), rig.answers.len()), (5, 4), "four calls have been out for long");
    rig.sleep_ms(1);
    assert_eq!(rig.answers.len(), 5, "a second after the try began");
}

#[test]
fn with_kms_down_one_probe_at_a_time() {
    let mut rig = Rig::new();
    for n in 0..20 {
        rig.cached(&format!("s{n}"));
    }
    rig.sleep_ms(101_000);
    for n in 0..20 {
        assert_eq!(rig.ask(&format!("/v1/s{n}")), None);
    }
    assert_eq!(rig.calls.len(), 8);
    rig.break_off();
    rig.break_off();
    assert_eq!(rig.take_answers().len(), 2);
    rig.break_off();
    assert_eq!(rig.take_answers().len(), 11, "the third failure tells those in the queue too");
    while !rig.calls.is_empty() {
        rig.break_off();
    }
    assert!(rig.take_answers().iter().all(|it| it.starts_with("200 STALE")));
    let mut probes = 0;
    for _ in 0..600 {
        rig.sleep_ms(100);
        assert!(rig.calls.len() <= 1, "one probe at a time");
        assert!(rig.ask("/v1/s1").unwrap().starts_with("200 STALE"));
        if !rig.calls.is_empty() {
            probes += 1;
            rig.break_off();
        }
    }
    assert!((3..25).contains(&probes), "{probes} probes in a minute");
    // A reader with nothing cached joins the probe.
    assert_eq!(rig.ask("/v1/new"), None);
    rig.sleep_ms(501);
    assert_eq!(rig.calls.len(), 1);
    rig.value("new", "x");
    assert_eq!(rig.take_answers(), ["200 MISS 0 x"]);
    rig.sleep_ms(31_000);
    assert!(rig.calls.len() > 1, "closed: the others catch up");
}

#[test]
fn throttling_is_waited_out() {
    let mut rig = Rig::new();
    rig.cached("db");
    rig.sleep_ms(101_000);
    rig.ask("/v1/db");
    rig.reply(429, "Retry-After: 20\r\n", &error("Rejected.Throttling"));
    assert_eq!(rig.take_answers(), ["200 STALE 101 one"]);
    rig.sleep_ms(19_900);
    assert!(rig.calls.is_empty());
    rig.sleep_ms(200);
    assert_eq!(rig.calls.len(), 1);
    // Who has nothing to fall back on is not kept waiting in vain.
    rig.ask("/v1/new");
    rig.calls.remove(0);
    rig.reply(429, "Retry-After: 20\r\n", &error("Rejected.Throttling"));
    assert_eq!(rig.take_answers(), ["429 Rejected.Throttling"]);
}

#[test]
fn refused_credentials_are_renewed_once() {
    let mut rig = Rig::new();
    rig.ask("/v1/db");
    rig.error(404, "InvalidAccessKeyId.NotFound");
    assert_eq!((rig.calls.len(), rig.answers.len()), (1, 0), "asked again at once");
    rig.error(404, "InvalidAccessKeyId.NotFound");
    assert_eq!(rig.take_answers(), ["404 InvalidAccessKeyId.NotFound"]);
    assert!(rig.calls.is_empty());
}

#[test]
fn a_wrong_clock_is_corrected_once() {
    let mut rig = Rig::new();
    rig.ask("/v1/db");
    rig.reply(400, "Date: Tue, 14 Nov 2023 23:00:00 GMT\r\n", &error("IllegalTimestamp"));
    let mut request = Vec::new();
    let call = rig.calls[0].clone();
    rig.broker.write_request(&call, rig.now, &mut request).unwrap();
    let request = String::from_utf8(request).unwrap().to_ascii_lowercase();
    assert!(request.contains("x-acs-date: 2023-11-14t23:00:00z"), "{request}");
    rig.reply(400, "Date: Tue, 14 Nov 2023 23:00:00 GMT\r\n", &error("IllegalTimestamp"));
    assert_eq!(rig.take_answers(), ["400 IllegalTimestamp"]);
}

#[test]
fn no_credentials_no_secret_and_both_heal() {
    let mut rig = Rig::with(|_| {});
    rig.cached("db");
    rig.metadata_works = false;
    rig.ask("/v1/new");
    rig.error(404, "InvalidAccessKeyId.NotFound");
    assert_eq!(rig.take_answers(), ["503 CredentialUnavailable"]);
    rig.sleep_ms(101_000);
    assert_eq!(rig.ask("/v1/db"), None);
    assert_eq!(rig.take_answers(), ["200 STALE 101 one"], "at once");
    rig.metadata_works = true;
    rig.sleep_ms(41_000);
    assert_eq!(rig.calls.len(), 1, "the refresh goes on by itself");
    let fetches = rig.broker.metrics.credential_fetches;
    assert!(fetches.ok == 2 && fetches.failed > 0, "{fetches:?}");
}

#[test]
fn kms_is_not_blamed_where_credentials_are_waited_for() {
    let mut rig = Rig::new();
    rig.metadata_hangs = true;
    rig.ask("/v1/db");
    rig.sleep_ms(7_900);
    assert!(rig.answers.is_empty() && rig.calls.is_empty());
    rig.sleep_ms(200);
    assert_eq!(rig.take_answers(), ["503 CredentialUnavailable"]);
}

#[test]
fn without_stale_an_expired_value_is_no_value() {
    let mut rig = Rig::with(|config| config.server.ignore_transient_errors = false);
    rig.cached("db");
    rig.sleep_ms(101_000);
    assert_eq!(rig.ask("/v1/db"), None);
    for _ in 0..3 {
        rig.error(500, "InternalFailure");
        rig.sleep_ms(1_000);
    }
    assert_eq!(rig.take_answers(), ["500 InternalFailure"]);
}

#[test]
fn unusable_replies_are_not_cached() {
    let mut rig = Rig::new();
    for body in ["", "{}", "[]", "x", &value("other", "x")] {
        rig.ask("/v1/db");
        rig.reply(200, "", body);
        assert_eq!(rig.take_answers(), ["502 UpstreamInvalidResponse"], "{body}");
    }
    rig.ask("/v1/acs:kms:cn-hangzhou:1:secret/db");
    rig.value("db", "by ARN");
    assert_eq!(rig.take_answers(), ["200 MISS 0 by ARN"]);
}

#[test]
fn a_rotation_ends_the_life_and_brings_a_fresh_fetch() {
    let mut rig = Rig::new();
    rig.ask("/v1/db");
    // 1_700_000_000 is 2023-11-14T22:13:20Z.
    let body = r#"{"SecretName":"db","SecretData":"one","NextRotationDate":"2023-11-14T22:13:50Z"}"#;
    rig.reply(200, "", body);
    rig.ask("/v1/db");
    rig.sleep_ms(29_000);
    assert!(rig.calls.is_empty(), "before it a refresh would bring the old value");
    rig.sleep_ms(1_000);
    assert_eq!(rig.calls.len(), 1);
}

#[test]
fn the_end_is_told_to_those_who_wait() {
    let mut rig = Rig::new();
    rig.ask("/v1/db");
    rig.broker.drain();
    rig.broker.give_up();
    rig.settle();
    assert_eq!(rig.take_answers(), ["503 ServiceUnavailable"]);
}

#[test]
fn a_crash_loop_does_not_shorten_what_the_server_asked_for() {
    let mut rig = Rig::new();
    rig.ask("/v1/db");
    rig.reply(429, "Retry-After: 60\r\n", &error("Rejected.Throttling"));
    assert_eq!(rig.take_answers(), ["429 Rejected.Throttling"]);
    for _ in 0..50 {
        assert_eq!(rig.ask("/v1/db").unwrap(), "429 Rejected.Throttling");
        rig.sleep_ms(1_000);
    }
    assert!(rig.calls.is_empty());
    rig.sleep_ms(3_000);
    assert_eq!(rig.ask("/v1/db"), None, "so near the end it is waited out");
    rig.sleep_ms(7_500);
    assert_eq!(rig.calls.len(), 1);
    rig.value("db", "one");
    assert_eq!(rig.take_answers(), ["200 MISS 0 one"]);
    assert!(rig.broker.flights.find(KeyRef::current("db")).is_none());
}

#[test]
fn readers_who_join_a_pause_do_not_cut_it_short() {
    let mut rig = Rig::new();
    let mut tries = Vec::new();
    for ms in 0..200 {
        rig.ask("/v1/db");
        if !rig.calls.is_empty() {
            tries.push(ms * 10);
            rig.error(503, "ServiceUnavailableTemporary");
        }
        rig.sleep_ms(10);
    }
    assert!(tries.len() < 20, "with a pause of up to 0.5 s and 1 s in turn: {tries:?}");
}

#[test]
fn credentials_that_stay_refused_are_not_fetched_for_every_reader() {
    let mut rig = Rig::new();
    for n in 0..20 {
        rig.ask(&format!("/v1/db{n}"));
        while !rig.calls.is_empty() {
            rig.error(404, "InvalidAccessKeyId.NotFound");
        }
    }
    assert_eq!(rig.take_answers(), ["404 InvalidAccessKeyId.NotFound"; 20]);
    assert!(rig.metadata_asked < 8, "{} requests to the metadata service", rig.metadata_asked);
}

#[test]
fn kms_is_not_asked_again_and_again_by_who_it_does_not_know() {
    for code in ["InvalidSecurityToken.Malformed", "SignatureDoesNotMatch"] {
        let mut rig = Rig::new();
        rig.cached("cached");
        rig.ask("/v1/db");
        while !rig.calls.is_empty() {
            rig.error(400, code);
        }
        assert_eq!(rig.take_answers(), [format!("400 {code}")]);
        rig.sleep_ms(900);
        assert_eq!(rig.ask("/v1/db").as_deref(), Some(&*format!("400 {code}")), "remembered");
        rig.sleep_ms(200);
        assert_eq!((rig.ask("/v1/db"), rig.calls.len()), (None, 1), "not for long");
        rig.value("db", "two");
        assert_eq!(rig.take_answers(), ["200 MISS 0 two"]);

        rig.sleep_ms(100_000);
        rig.ask("/v1/cached");
        while !rig.calls.is_empty() {
            rig.error(400, code);
        }
        assert_eq!(rig.take_answers(), ["200 STALE 101 one"], "no word on the secret");

        rig.ask("/v1/gone");
        rig.error(404, "Forbidden.ResourceNotFound");
        rig.ask("/v1/gone?refreshNow=1");
        while !rig.calls.is_empty() {
            rig.error(400, code);
        }
        rig.take_answers();
        let remembered = rig.ask("/v1/gone");
        assert_eq!(remembered.as_deref(), Some("404 Forbidden.ResourceNotFound"), "KMS's last word on it");
    }
}

#[test]
fn versions_of_one_secret_do_not_make_kms_count_as_down() {
    let mut rig = Rig::new();
    for target in
        ["/v1/db", "/v1/db?versionStage=ACSPrevious", "/v1/db?versionId=1", "/v1/acs:kms:r:1:secret/db"]
    {
        rig.ask(target);
        rig.break_off();
    }
    assert!(!rig.broker.circuit.is_open());
}

#[test]
fn three_dead_secrets_do_not_break_a_healthy_one() {
    let mut rig = Rig::new();
    for n in 0..20 {
        rig.ask(&format!("/v1/dead{n}"));
    }
    rig.ask("/v1/healthy");
    let stall = |rig: &mut Rig| {
        let call = rig.calls.remove(0);
        let error = CallError::timeout("reply of", &call.origin, Duration::from_secs(5)).reached();
        rig.broker.on_called(call.id, Err(error), rig.now);
        rig.settle();
    };
    while !rig.calls.is_empty() {
        stall(&mut rig);
    }
    assert!(rig.broker.circuit.is_open());
    assert!(rig.take_answers().is_empty(), "each has tries of its own");
    // The probes: those that have not failed first, so the healthy one comes to its turn.
    let mut probes = 0;
    while rig.answers.is_empty() {
        rig.sleep_ms(100);
        probes += rig.calls.len();
        assert!(probes < 20 && rig.calls.len() <= 1);
        if !rig.calls.is_empty() {
            if asked_for(&mut rig) == "healthy" {
                rig.value("healthy", "one");
            } else {
                stall(&mut rig);
            }
        }
    }
    assert_eq!(rig.take_answers(), ["200 MISS 0 one"]);
    assert!(!rig.broker.circuit.is_open());
}

#[test]
fn a_failed_renewal_is_noted_and_no_failure_while_there_are_credentials() {
    let mut rig = Rig::new();
    rig.cached("db");
    let Broker { health, access, .. } = &mut rig.broker;
    assert_eq!(health.credentials_expire_unix_s, Some(4_102_444_800), "2100-01-01");
    health.on_credentials(Err(IdentityError::Everyone(Vec::new())), &access.identity, rig.now.mono);
    assert!(health.credentials.is_well() && health.credentials.last_error.is_some());
}

#[test]
fn without_jitter_a_hot_value_is_refreshed_at_seventy_per_cent() {
    let mut rig = Rig::new();
    rig.broker.set_refresh_jitter(0);
    rig.cached("hot");
    rig.ask("/v1/hot");
    rig.sleep_ms(69_999);
    assert!(rig.calls.is_empty());
    rig.sleep_ms(1);
    assert_eq!(rig.calls.len(), 1);
}

#[test]
fn a_new_token_takes_the_place_of_the_old_one() {
    let mut rig = Rig::new();
    rig.broker.set_token(Secret::from(&b"new"[..]));
    assert_eq!(rig.ask("/v1/db").unwrap(), "403 InvalidToken");
    rig.broker.set_token(Secret::from(&b"tok"[..]));
    assert_eq!(rig.ask("/v1/db"), None);
}

#[test]
fn a_value_is_stale_from_the_end_of_its_life_on() {
    let mut rig = Rig::new();
    rig.cached("db");
    rig.sleep_ms(100_000);
    assert_eq!(rig.ask("/v1/db"), None);
    rig.break_off();
    assert_eq!(rig.take_answers(), ["200 STALE 100 one"]);
}

#[test]
fn a_refreshed_value_whose_life_is_over_answers_no_refresh_now() {
    let mut rig = Rig::with(|config| config.cache.ttl = Duration::from_millis(500));
    assert_eq!(rig.ask("/v1/db?refreshNow=1"), None);
    rig.value("db", "one");
    rig.sleep_ms(499);
    assert_eq!(rig.ask("/v1/db?refreshNow=1").unwrap(), "200 HIT 0 one");
    rig.sleep_ms(1);
    assert_eq!(rig.ask("/v1/db?refreshNow=1"), None);
}

#[test]
fn a_pause_as_long_as_patience_is_not_waited_for() {
    let mut rig = Rig::new();
    rig.ask("/v1/a");
    rig.reply(429, "Retry-After: 8\r\n", &error("Rejected.Throttling"));
    assert_eq!(rig.take_answers(), ["429 Rejected.Throttling"]);
    rig.ask("/v1/b");
    rig.reply(429, "Retry-After: 7\r\n", &error("Rejected.Throttling"));
    rig.sleep_ms(7_000);
    assert!(rig.answers.is_empty());
    rig.value("b", "one");
    assert_eq!(rig.take_answers(), ["200 MISS 0 one"]);
}

#[test]
fn readers_wait_up_to_half_a_second_for_the_second_try_and_a_whole_one_for_the_third() {
    let mut longest_ms = [0, 0];
    let mut rig = Rig::new();
    for n in 0..100 {
        rig.ask(&format!("/v1/s{n}"));
        for longest_ms in &mut longest_ms {
            rig.error(429, "Rejected.Throttling");
            let mut ms = 0;
            while rig.calls.is_empty() {
                rig.sleep_ms(10);
                ms += 10;
            }
            *longest_ms = ms.max(*longest_ms);
        }
        rig.value(&format!("s{n}"), "x");
    }
    assert!((450..=500).contains(&longest_ms[0]) && (900..=1000).contains(&longest_ms[1]), "{longest_ms:?}");
}

#[test]
fn a_flight_whose_readers_left_in_a_pause_is_given_up() {
    let mut rig = Rig::new();
    rig.ask("/v1/db");
    rig.error(500, "InternalFailure");
    rig.broker.left(ClientId(rig.next_client));
    rig.sleep_ms(10_000);
    assert!(rig.calls.is_empty() && rig.broker.flights.find(KeyRef::current("db")).is_none());
}

#[test]
fn in_a_long_queue_kms_is_blamed() {
    let mut rig = Rig::new();
    for n in 0..9 {
        rig.ask(&format!("/v1/s{n}"));
    }
    assert_eq!(rig.calls.len(), 8);
    rig.sleep_ms(8_000);
    assert_eq!(rig.take_answers(), ["504 UpstreamTimeout"; 9]);
}

#[test]
fn with_kms_down_a_reader_comes_before_a_refresh_even_of_a_secret_that_has_not_failed() {
    let mut rig = Rig::new();
    rig.broker.set_refresh_jitter(0);
    rig.cached("hot");
    rig.ask("/v1/hot");
    rig.sleep_ms(69_000);
    for name in ["a", "b", "c"] {
        rig.ask(&format!("/v1/{name}"));
    }
    while !rig.calls.is_empty() {
        rig.break_off();
    }
    assert!(rig.broker.circuit.is_open());
    let probe = loop {
        rig.sleep_ms(10);
        if !rig.calls.is_empty() {
            break rig.calls.remove(0);
        }
    };
    rig.sleep_ms(1_500);
    let queued: Vec<_> = rig.broker.flights.queued();
    let names = queued.iter().map(|id| rig.broker.flights.get(*id).unwrap().key().id);
    assert!(names.clone().any(|name| name == "hot") && names.count() > 1, "behind the probe");
    let error = CallError::timeout("reply of", &probe.origin, Duration::from_secs(5)).reached();
    rig.broker.on_called(probe.id, Err(error), rig.now);
    rig.settle();
    while rig.calls.is_empty() {
        rig.sleep_ms(10);
    }
    assert_ne!(asked_for(&mut rig), "hot");
}

/// The name of the secret that the first call asks for.
fn asked_for(rig: &mut Rig) -> String {
    let mut request = Vec::new();
    rig.broker.write_request(&rig.calls[0].clone(), rig.now, &mut request).unwrap();
    let request = String::from_utf8(request).unwrap();
    let (_, rest) = request.split_once("SecretName=").unwrap();
    rest.split([' ', '&', '\r']).next().unwrap().to_owned()
}

#[test]
fn those_that_have_not_failed_go_first_only_while_kms_is_down() {
    // `a` has failed, and waits behind eight calls with `fresh` after it.
    let rig = |others: &[&str]| {
        let mut rig = Rig::new();
        for name in ["a", "b", "c"].iter().filter(|name| others.contains(name)) {
            rig.ask(&format!("/v1/{name}?refreshNow=1"));
            rig.break_off();
        }
        rig
    };
    let mut closed = rig(&["a"]);
    closed.sleep_ms(1_000);
    assert_eq!(asked_for(&mut closed), "a");
    for n in 0..7 {
        closed.ask(&format!("/v1/s{n}"));
    }
    assert_eq!(closed.calls.len(), 8);
    closed.ask("/v1/a?versionId=1");
    closed.ask("/v1/fresh");
    closed.calls.drain(..7);
    closed.break_off();
    assert_eq!(asked_for(&mut closed), "a", "first come, first served");

    let mut open = rig(&["a", "b", "c"]);
    assert!(open.broker.circuit.is_open() && open.calls.is_empty());
    open.ask("/v1/a?versionId=1");
    open.ask("/v1/fresh");
    while open.calls.is_empty() {
        open.sleep_ms(1);
    }
    assert_eq!(asked_for(&mut open), "fresh");
}

#[test]
fn one_throttled_secret_holds_the_refreshes_of_others_back() {
    let mut rig = Rig::new();
    rig.broker.set_refresh_jitter(0);
    rig.cached("a");
    rig.ask("/v1/a");
    rig.sleep_ms(1_000);
    rig.cached("b");
    rig.ask("/v1/b");
    rig.sleep_ms(69_000);
    assert_eq!(asked_for(&mut rig), "a");
    rig.reply(429, "Retry-After: 20\r\n", &error("Rejected.Throttling"));
    rig.sleep_ms(19_999);
    assert!(rig.calls.is_empty(), "the refresh of b has been due for long");
    assert_eq!(rig.ask("/v1/c"), None);
    assert_eq!(rig.calls.len(), 1, "readers are not held back");
    rig.value("c", "one");
    assert_eq!(rig.broker.throttle.background_calls_max(), 4);
}

#[test]
fn credentials_that_have_worked_are_renewed_again_at_once() {
    let mut rig = Rig::new();
    for name in ["a", "b"] {
        rig.ask(&format!("/v1/{name}"));
        rig.error(404, "InvalidAccessKeyId.NotFound");
        assert_eq!((rig.calls.len(), rig.answers.len()), (1, 0), "asked again with others: {name}");
        rig.value(name, "one");
        assert_eq!(rig.take_answers(), ["200 MISS 0 one"]);
    }
}

#[test]
fn each_try_behind_the_scenes_may_renew_the_credentials() {
    let mut rig = Rig::new();
    rig.cached("db");
    rig.sleep_ms(101_000);
    rig.ask("/v1/db");
    for _ in 0..5 {
        rig.error(404, "InvalidAccessKeyId.NotFound");
        assert_eq!(rig.calls.len(), 1, "asked again with others");
        rig.error(404, "InvalidAccessKeyId.NotFound");
        assert!(rig.calls.is_empty());
        rig.sleep_ms(1_000);
        while rig.calls.is_empty() {
            rig.sleep_ms(100);
        }
    }
    assert_eq!(rig.take_answers(), ["200 STALE 101 one"]);
}

#[test]
fn a_call_goes_on_when_its_reader_leaves_after_a_failure() {
    let mut rig = Rig::new();
    rig.ask("/v1/db");
    rig.error(500, "InternalFailure");
    rig.sleep_ms(500);
    assert_eq!(rig.calls.len(), 1);
    rig.broker.left(ClientId(rig.next_client));
    rig.sleep_ms(10_000);
    rig.value("db", "one");
    assert_eq!(rig.ask("/v1/db").unwrap(), "200 HIT 0 one");
}

#[test]
fn a_call_for_nobody_has_fifteen_seconds() {
    let mut rig = Rig::new();
    rig.cached("db");
    rig.sleep_ms(101_000);
    rig.ask("/v1/db");
    assert_eq!(rig.calls[0].deadline, rig.now.mono.after(Duration::from_secs(15)));
}

#[test]
fn kms_counts_as_down_when_its_replies_are_failures() {
    let mut rig = Rig::new();
    for name in ["a", "b", "c"] {
        assert!(!rig.broker.circuit.is_open());
        rig.ask(&format!("/v1/{name}?refreshNow=1"));
        rig.error(503, "ServiceUnavailableTemporary");
    }
    assert!(rig.broker.circuit.is_open());
}

#[test]
fn a_try_renews_the_credentials_once_however_long_it_takes() {
    let mut rig = Rig::new();
    rig.ask("/v1/db");
    rig.error(404, "InvalidAccessKeyId.NotFound");
    rig.sleep_ms(1_100);
    rig.error(404, "InvalidAccessKeyId.NotFound");
    assert_eq!(rig.take_answers(), ["404 InvalidAccessKeyId.NotFound"]);
}
