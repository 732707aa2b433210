//! The real binary against the emulated KMS, asked by real clients and by one that sees every byte.
//!
//! Where a test lets time pass ([`let_pass`]), that time is what it is about (a TTL, say); nothing is
//! synchronised by sleeping.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::{
    Agent, Connection, Folder, Reply, Setup, TOKEN, curl, emulator, http, python, run, secret_target,
    wait_until,
};
use kms_emulator::{
    BadCertificate, Emulator, Fault, FaultKind, Framing, KmsMode, MetadataFault, MetadataMode, NewSecret,
    Options, RawReply, Service,
};
use rustix::process::Signal;
use std::collections::BTreeSet;
use std::fs;
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(10);

/// Lets at least this much time pass.
fn let_pass(time: Duration) {
    thread::sleep(time);
}

fn gets(emulator: &Emulator, name: &str) -> u64 {
    emulator.counters().gets(name)
}

/// The one line that an agent with a log file writes to standard error when all is well.
fn is_start_line(line: &str) -> bool {
    line.starts_with("kms-agent: serving on port ")
}

/// Whether this host has `[::1]`.
fn has_ipv6() -> bool {
    TcpListener::bind("[::1]:0").is_ok()
}

/// A reply of KMS that no serialiser of the agent's would make: order, white space, escapes, unknown members.
const ODD_REPLY: &str = "{ \"Extra\" : [1, 2.50, {\"x\": null}],\n\t\"SecretData\":\"h\\u00e9llo \\/ \u{4e16}\", \
     \"SecretName\" : \"agent-test\",\"VersionStages\": {\"VersionStage\":[\"ACSCurrent\"]} , \"RequestId\":\"r-1\"}  ";

// ---- Clients that no one here wrote ----

#[test]
fn the_documented_curl_line_gets_the_reply_of_kms_byte_for_byte() {
    let (Some(_), Some(sh)) = (curl(), common::tool("sh")) else { return };
    let emulator = emulator(&[("agent-test", "hello")]);
    emulator.raw_reply("agent-test", 200, ODD_REPLY);
    let agent = Agent::start(&emulator);
    let (file, port) = (agent.folder.join("kmstoken"), agent.port);
    for expected in ["MISS", "HIT", "HIT"] {
        let head = agent.folder.join("head");
        let line = format!(
            "curl -sS --fail -D {} -H \"X-KMS-Token: $(cat {})\" \
             'http://localhost:{port}/secretsmanager/get?secretId=agent-test'",
            head.display(),
            file.display()
        );
        let body = run(&sh, &["-c", &line]);
        assert_eq!(String::from_utf8(body).unwrap(), ODD_REPLY);
        let head = fs::read_to_string(head).unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.contains(&format!("\r\nX-Cache: {expected}\r\n")), "{expected}: {head}");
    }
    assert_eq!(gets(&emulator, "agent-test"), 1, "hits ask nobody");
    assert_eq!(emulator.counters().signature_failures, 0);
}

#[test]
fn curl_reaches_it_by_every_name_of_loopback_and_by_path() {
    let Some(curl) = curl() else { return };
    let emulator = emulator(&[("agent-test", "hello"), ("team/db", "nested")]);
    let agent = Agent::start(&emulator);
    let token = format!("X-Vault-Token: {TOKEN}");
    let mut hosts = vec!["localhost", "127.0.0.1"];
    if has_ipv6() {
        hosts.push("[::1]");
    }
    for host in hosts {
        for (path, data) in [
            ("secretsmanager/get?secretId=agent-test", "hello"),
            ("v1/agent-test", "hello"),
            ("v1/team/db?versionStage=ACSCurrent", "nested"),
        ] {
            let url = format!("http://{host}:{}/{path}", agent.port);
            let body = run(&curl, &["-sS", "-g", "--fail", "-H", &token, &url]);
            let reply: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(reply["SecretData"], data, "{url}");
        }
        let url = format!("http://{host}:{}/ping", agent.port);
        assert_eq!(run(&curl, &["-sS", "-g", "--fail", &url]), b"healthy", "{url}");
    }
    assert_eq!((gets(&emulator, "agent-test"), gets(&emulator, "team/db")), (1, 1));
    // Two URLs in one command are one connection; -I is HEAD.
    let url = format!("http://127.0.0.1:{}/v1/agent-test", agent.port);
    let format = "%{http_code} %{num_connects}\n";
    let twice =
        run(&curl, &["-sS", "-o", "/dev/null", "-o", "/dev/null", "-w", format, "-H", &token, &url, &url]);
    assert_eq!(String::from_utf8(twice).unwrap(), "200 1\n200 0\n");
    let head = String::from_utf8(run(&curl, &["-sS", "-I", "-H", &token, &url])).unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("X-Cache: HIT"), "{head}");
}

#[test]
fn python_gets_values_and_errors() {
    let Some(python) = python() else { return };
    let emulator = emulator(&[("agent-test", "old"), ("käse/1", "grün")]);
    emulator.put_secret("agent-test", "new");
    let agent = Agent::start(&emulator);
    let script = r#"
import http.client, json, sys, urllib.error, urllib.parse, urllib.request
port, token = sys.argv[1:]
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
def get(path, token=token):
    request = urllib.request.Request(f"http://localhost:{port}{path}", headers={"X-KMS-Token": token})
    try:
        with opener.open(request, timeout=15) as reply:
            return [reply.status, reply.headers["X-Cache"], json.load(reply)["SecretData"]]
    except urllib.error.HTTPError as error:
        return [error.code, json.load(error)["Code"]]
out = [
    get("/secretsmanager/get?" + urllib.parse.urlencode({"secretId": "agent-test"})),
    get("/secretsmanager/get?" + urllib.parse.urlencode({"secretId": "agent-test"})),
    get("/v1/agent-test?versionStage=ACSPrevious"),
    get("/v1/" + urllib.parse.quote("käse/1")),
    get("/secretsmanager/get?" + urllib.parse.urlencode({"secretId": "käse/1"})),
    get("/v1/missing"),
    get("/v1/agent-test", "wrong"),
]
connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=15)
seen = set()
for _ in range(50):
    connection.request("GET", "/v1/agent-test", headers={"X-KMS-Token": token})
    reply = connection.getresponse()
    seen.add((reply.status, reply.headers["X-Cache"], json.load(reply)["SecretData"], connection.sock.getsockname()))
out.append(len(seen))
print(json.dumps(out))
"#;
    let out = run(&python, &["-c", script, &agent.port.to_string(), TOKEN]);
    let out: serde_json::Value = serde_json::from_slice(&out).unwrap();
    let expected = serde_json::json!([
        [200, "MISS", "new"],
        [200, "HIT", "new"],
        [200, "MISS", "old"],
        [200, "MISS", "grün"],
        [200, "HIT", "grün"],
        [404, "Forbidden.ResourceNotFound"],
        [403, "InvalidToken"],
        1
    ]);
    assert_eq!(out, expected);
}

// ---- The local API ----

#[test]
fn replies_carry_the_headers_of_the_contract() {
    let emulator = emulator(&[("a", "1")]);
    let agent = Agent::start(&emulator);
    let miss = agent.secret("a");
    assert_eq!((miss.verdict().as_str(), miss.header("Age")), ("200 MISS", Some("0")));
    let hit = agent.secret("a");
    assert_eq!(hit.body, miss.body);
    assert!(hit.header("Age").unwrap().parse::<u32>().unwrap() < 60);
    for reply in [&miss, &hit, &agent.get("/v1/missing"), &agent.get_with("/v1/a", &[])] {
        assert!(reply.header("Content-Type").unwrap().starts_with("application/json"));
        assert_eq!(reply.header("Content-Length").unwrap(), reply.body.len().to_string());
        assert_eq!(reply.header("Cache-Control"), Some("no-store"));
        let date = reply.header("Date").unwrap();
        assert!(date.len() == 29 && date.ends_with(" GMT"), "{date}");
        assert_eq!((reply.version.as_str(), reply.closes()), ("HTTP/1.1", false));
    }
    let ping = agent.get_with("/ping", &[]);
    assert_eq!((ping.status, ping.text().as_str()), (200, "healthy"));
    assert_eq!((ping.header("X-Cache"), ping.header("Cache-Control")), (None, Some("no-store")));
}

#[test]
fn versions_and_stages_are_secrets_of_their_own() {
    let emulator = emulator(&[]);
    let first = emulator.put_secret("db", "one");
    let second = emulator.put_secret("db", "two");
    let agent = Agent::start(&emulator);
    let ask = |more: &str| agent.get(&format!("/secretsmanager/get?secretId=db{more}"));
    for (more, data) in [
        ("", "two"),
        ("&versionStage=ACSPrevious", "one"),
        (&format!("&versionId={first}"), "one"),
        (&format!("&versionId={second}"), "two"),
    ] {
        let (miss, hit) = (ask(more), ask(more));
        assert_eq!((miss.verdict().as_str(), miss.data().as_str()), ("200 MISS", data), "{more}");
        assert_eq!((hit.verdict().as_str(), hit.body), ("200 HIT", miss.body), "{more}");
    }
    assert_eq!(ask("&versionStage=ACSCurrent").verdict(), "200 HIT", "the default stage, said aloud");
    assert_eq!(agent.get("/v1/db?versionStage=ACSPrevious").verdict(), "200 HIT", "the same by path");
    assert_eq!(gets(&emulator, "db"), 4);
    let unknown = ask("&versionId=no-such-version");
    assert_eq!(unknown.status, 404, "{}", unknown.text());
    assert_eq!(ask("").verdict(), "200 HIT", "a missing version says nothing about another");
}

#[test]
fn an_unknown_secret_is_told_in_the_words_of_kms() {
    let emulator = emulator(&[("known", "x")]);
    let agent = Agent::start(&emulator);
    let reply = agent.secret("nobody");
    assert_eq!(reply.verdict(), "404 Forbidden.ResourceNotFound");
    assert!(!reply.field("Message").is_empty() && reply.field("RequestId").len() == 36, "{}", reply.text());
    // Exactly its words, which a genuine reply cannot prove.
    let body = r#"{"HttpStatus":403,"Code":"Forbidden.NoPermission","Message":"Not \"you\", at all.","RequestId":"4f-QUITE-own","HostId":"kms"}"#;
    emulator.raw_reply("known", 403, body);
    for _ in 0..2 {
        let reply = agent.secret("known");
        assert_eq!(reply.verdict(), "403 Forbidden.NoPermission");
        assert_eq!(reply.field("Message"), "Not \"you\", at all.");
        assert_eq!(reply.field("RequestId"), "4f-QUITE-own");
    }
    assert_eq!(gets(&emulator, "known"), 1, "a refusal is remembered, so that a crash loop burns no quota");
}

#[test]
fn gates_refuse_before_anything_is_asked() {
    let emulator = emulator(&[("a", "1")]);
    let agent = Setup::new(&emulator)
        .key("Server", "AllowedHosts", r#"["agent.internal"]"#)
        .key("Server", "SSRFHeaders", r#"["X-Own-Token"]"#)
        .start();
    let target = secret_target("a");
    let good = ("X-Own-Token", TOKEN);
    type Headers<'a> = &'a [(&'a str, &'a str)];
    let cases: [(&str, &str, Headers, &str); 18] = [
        ("GET", &target, &[], "403 InvalidToken"),
        ("GET", &target, &[("X-Own-Token", "")], "403 InvalidToken"),
        ("GET", &target, &[("X-Own-Token", "wrong")], "403 InvalidToken"),
        ("GET", &target, &[("X-Own-Token", &TOKEN[1..])], "403 InvalidToken"),
        ("GET", &target, &[("X-KMS-Token", TOKEN)], "403 InvalidToken"),
        ("GET", "/", &[], "403 InvalidToken"),
        ("GET", &target, &[good, ("Host", "evil.example")], "403 ForbiddenHost"),
        ("GET", "/ping", &[("Host", "evil.example")], "403 ForbiddenHost"),
        ("GET", "http://evil.example/ping", &[("Host", "localhost")], "403 ForbiddenHost"),
        ("GET", &target, &[good, ("X-Forwarded-For", "10.0.0.1")], "400 Forwarded"),
        ("GET", &target, &[good, ("Forwarded", "for=10.0.0.1")], "400 Forwarded"),
        ("DELETE", &target, &[good], "405 MethodNotAllowed"),
        ("GET", "/secretsmanager", &[good], "404 NotFound"),
        ("GET", "/secretsmanager/get", &[good], "400 InvalidParameter"),
        ("GET", "/v1/a?refreshNow=maybe", &[good], "400 InvalidParameter"),
        ("GET", "/v1/a?region=x", &[good], "400 InvalidParameter"),
        ("GET", "/v1/a/../b", &[good], "400 InvalidParameter"),
        ("GET", "/secretsmanager/get?secretId=%ff", &[good], "400 InvalidParameter"),
    ];
    for (method, target, headers, expected) in cases {
        let reply = agent.request(method, target, headers);
        assert_eq!(reply.verdict(), expected, "{method} {target} {headers:?}");
        let allow = (reply.status == 405).then_some("GET, HEAD");
        assert_eq!(reply.header("Allow"), allow);
        assert!(!reply.text().contains(TOKEN));
    }
    assert_eq!(emulator.counters().kms_requests, 0, "nothing of this reached KMS");
    for headers in [&[good, ("Host", "agent.internal:99")], &[good, ("host", "LOCALHOST")]] {
        assert_eq!(agent.get_with(&target, headers).status, 200, "{headers:?}");
    }
    assert_eq!(agent.get_with("/ping", &[("Forwarded", "for=x")]).status, 200);
}

#[test]
fn head_is_get_without_the_body() {
    let emulator = emulator(&[("a", "1")]);
    let agent = Agent::start(&emulator);
    let get = agent.secret("a");
    let mut connection = agent.connect();
    for (target, status) in [(secret_target("a"), 200), ("/ping".into(), 200), ("/nothing".into(), 404)] {
        connection.send(http::head("HEAD", &target, &[("X-KMS-Token", TOKEN)]));
        let head = connection.reply_to("HEAD").unwrap();
        assert_eq!((head.status, head.body.len()), (status, 0), "{target}");
        if target.contains("secretId") {
            assert_eq!(head.header("Content-Length"), get.header("Content-Length"));
            assert_eq!(head.x_cache(), "HIT");
        }
    }
    // A body after any of them would be taken for the head of the next reply.
    connection.send(agent.head("/ping"));
    assert_eq!(connection.reply().unwrap().text(), "healthy");
    // A miss by HEAD fetches too.
    emulator.put_secret("b", "2");
    let miss = agent.request("HEAD", &secret_target("b"), &[("X-KMS-Token", TOKEN)]);
    assert_eq!((miss.status, miss.x_cache()), (200, "MISS"));
    assert_eq!(agent.secret("b").verdict(), "200 HIT");
}

#[test]
fn pipelined_requests_are_answered_in_order_around_a_slow_miss() {
    let emulator = emulator(&[("hot", "h"), ("slow", "s")]);
    emulator.delay_secret("slow", Duration::from_millis(300));
    let agent = Agent::start(&emulator);
    agent.secret("hot");
    let targets = [
        secret_target("hot"),
        secret_target("slow"),
        secret_target("hot"),
        "/ping".to_owned(),
        secret_target("missing"),
        secret_target("slow"),
        "/nothing".to_owned(),
    ];
    let mut connection = agent.connect();
    for round in 0..2 {
        connection.send(targets.iter().map(|target| agent.head(target)).collect::<String>());
        let replies: Vec<Reply> = targets.iter().map(|_| connection.reply().unwrap()).collect();
        let statuses: Vec<u16> = replies.iter().map(|reply| reply.status).collect();
        assert_eq!(statuses, [200, 200, 200, 200, 404, 200, 404]);
        for (at, data) in [(0, "h"), (1, "s"), (2, "h"), (5, "s")] {
            assert_eq!(replies[at].data(), data);
        }
        assert_eq!(replies[1].x_cache(), if round == 0 { "MISS" } else { "HIT" });
        assert_eq!(replies[3].text(), "healthy");
        assert_eq!(replies[6].field("Code"), "NotFound");
        assert!(replies.iter().all(|reply| !reply.closes()));
    }
    // Close is honoured, and what follows it is not answered.
    let closing =
        http::head("GET", &secret_target("hot"), &[("X-KMS-Token", TOKEN), ("Connection", "close")]);
    connection.send(closing + &agent.head("/ping"));
    assert!(connection.reply().unwrap().closes());
    assert!(connection.is_at_end());
    assert_eq!(gets(&emulator, "slow"), 1);
}

#[test]
fn a_long_pipeline_is_answered_whole() {
    // More than the agent reads, and more than it writes, in one go.
    const REQUESTS: usize = 3000;
    let emulator = emulator(&[("hot", &"x".repeat(2000))]);
    let agent = Agent::start(&emulator);
    agent.secret("hot");
    let mut connection = agent.connect();
    let all = agent.head(&secret_target("hot")).repeat(REQUESTS);
    thread::scope(|scope| {
        let mut sender = Connection::to(("127.0.0.1", agent.port));
        // Nobody reads while it is sent: the agent has to stop reading too, and go on later.
        let sent = scope.spawn(move || {
            sender.send(all);
            sender
        });
        let mut receiver = sent.join();
        let receiver = receiver.as_mut().unwrap();
        for n in 0..REQUESTS {
            assert_eq!(receiver.reply().unwrap_or_else(|error| panic!("reply {n}: {error}")).status, 200);
        }
    });
    connection.send(agent.head("/ping"));
    assert_eq!(connection.reply().unwrap().status, 200);
}

#[test]
fn a_client_that_half_closes_gets_its_replies_and_then_the_end() {
    let emulator = emulator(&[("a", "1"), ("slow", "s")]);
    emulator.delay_secret("slow", Duration::from_millis(300));
    let agent = Agent::start(&emulator);
    for (target, expected) in
        [("slow", "200 MISS"), ("slow", "200 HIT"), ("missing", "404 Forbidden.ResourceNotFound")]
    {
        let mut connection = agent.connect();
        connection.send(agent.head(&secret_target(target)));
        connection.half_close();
        assert_eq!(connection.reply().unwrap().verdict(), expected);
        assert!(connection.is_at_end());
    }
    // Several, a miss in their midst.
    let mut connection = agent.connect();
    let targets = ["/ping".to_owned(), secret_target("a"), "/ping".to_owned()];
    connection.send(targets.iter().map(|target| agent.head(target)).collect::<String>());
    connection.half_close();
    for target in &targets {
        assert_eq!(connection.reply().unwrap().status, 200, "{target}");
    }
    assert!(connection.is_at_end());
    // The end comes while a miss is waited for, behind one more request.
    emulator.put_secret("slower", "s");
    emulator.delay_secret("slower", Duration::from_millis(300));
    let mut connection = agent.connect();
    connection.send(agent.head(&secret_target("slower")));
    assert!(emulator.wait_for(PATIENCE, |counters| counters.gets("slower") == 1));
    connection.send(agent.head("/ping"));
    connection.half_close();
    assert_eq!(connection.reply().unwrap().verdict(), "200 MISS");
    assert_eq!(connection.reply().unwrap().text(), "healthy");
    assert!(connection.is_at_end());
    // Half a request and then nothing: no reply, an end.
    let mut connection = agent.connect();
    connection.send("GET /ping HTTP/1.1\r\nHost: loc");
    connection.half_close();
    assert!(connection.is_at_end());
}

#[test]
fn http_1_0_is_spoken() {
    let emulator = emulator(&[("a", "1")]);
    let agent = Agent::start(&emulator);
    for (headers, closes) in [("", true), ("Connection: keep-alive\r\n", false)] {
        let mut connection = agent.connect();
        connection.send(format!("GET /v1/a HTTP/1.0\r\nX-KMS-Token: {TOKEN}\r\n{headers}\r\n"));
        let reply = connection.reply().unwrap();
        assert_eq!((reply.status, reply.data().as_str()), (200, "1"));
        if closes {
            assert!(connection.is_at_end());
        } else {
            // A 1.0 client has to be told that it may go on.
            assert_eq!(reply.header("Connection").map(str::to_lowercase).as_deref(), Some("keep-alive"));
            connection.send(agent.head("/ping"));
            assert_eq!(connection.reply().unwrap().status, 200);
        }
    }
}

#[test]
fn a_request_may_come_byte_by_byte() {
    let emulator = emulator(&[("a", "1")]);
    let agent = Agent::start(&emulator);
    let mut connection = agent.connect();
    for expected in ["200 MISS", "200 HIT"] {
        for byte in agent.head(&secret_target("a")).as_bytes() {
            connection.send([*byte]);
        }
        assert_eq!(connection.reply().unwrap().verdict(), expected);
    }
    // Split anywhere; the second half brings the next request along.
    let (first, second) = (agent.head("/ping"), agent.head(&secret_target("a")));
    let both = format!("{first}{second}");
    for at in (1..both.len()).step_by(7) {
        let mut connection = agent.connect();
        connection.send(&both[..at]);
        connection.send(&both[at..]);
        assert_eq!(connection.reply().unwrap().text(), "healthy", "{at}");
        assert_eq!(connection.reply().unwrap().verdict(), "200 HIT", "{at}");
    }
}

#[test]
fn malformed_requests_get_one_reply_and_the_end() {
    let emulator = emulator(&[("a", "1")]);
    let agent = Agent::start(&emulator);
    let t = format!("X-KMS-Token: {TOKEN}\r\n");
    let h = "Host: localhost\r\n";
    let cases: Vec<(&str, String, u16)> = vec![
        ("not HTTP", "\x16\x03\x01\x02\r\n\r\n".into(), 400),
        ("no version", format!("GET /ping\r\n{h}\r\n"), 400),
        ("bad version", format!("GET /ping HTTP/one\r\n{h}\r\n"), 400),
        ("HTTP/2.0", format!("GET /ping HTTP/2.0\r\n{h}\r\n"), 505),
        ("no Host", format!("GET /v1/a HTTP/1.1\r\n{t}\r\n"), 400),
        ("two Hosts", format!("GET /v1/a HTTP/1.1\r\n{h}{h}{t}\r\n"), 400),
        ("invalid Host", format!("GET /v1/a HTTP/1.1\r\nHost: a b\r\n{t}\r\n"), 400),
        ("space before the colon", format!("GET /v1/a HTTP/1.1\r\nHost : localhost\r\n{t}\r\n"), 400),
        ("obs-fold", format!("GET /v1/a HTTP/1.1\r\n{h}A: b\r\n c\r\n{t}\r\n"), 400),
        ("bare CR", format!("GET /v1/a HTTP/1.1\r\n{h}A: b\rc\r\n{t}\r\n"), 400),
        ("NUL", format!("GET /v1/a HTTP/1.1\r\n{h}A: \0\r\n{t}\r\n"), 400),
        ("fragment", format!("GET /v1/a#b HTTP/1.1\r\n{h}{t}\r\n"), 400),
        ("non-ASCII target", format!("GET /v1/ä HTTP/1.1\r\n{h}{t}\r\n"), 400),
        ("space in the target", format!("GET /v1/a b HTTP/1.1\r\n{h}{t}\r\n"), 400),
        ("relative target", format!("GET v1/a HTTP/1.1\r\n{h}{t}\r\n"), 400),
        ("asterisk", format!("GET * HTTP/1.1\r\n{h}{t}\r\n"), 400),
        ("authority form", format!("GET localhost:1 HTTP/1.1\r\n{h}{t}\r\n"), 400),
        ("a body", format!("GET /v1/a HTTP/1.1\r\n{h}{t}Content-Length: 1\r\n\r\nx"), 400),
        (
            "a chunked body",
            format!("GET /v1/a HTTP/1.1\r\n{h}{t}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
            400,
        ),
        (
            "both framings",
            format!("GET /v1/a HTTP/1.1\r\n{h}{t}Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n"),
            400,
        ),
        ("bad length", format!("GET /v1/a HTTP/1.1\r\n{h}{t}Content-Length: +0\r\n\r\n"), 400),
        ("target over 8 KiB", format!("GET /v1/{} HTTP/1.1\r\n{h}{t}\r\n", "a".repeat(8200)), 414),
        ("head over 16 KiB", format!("GET /v1/a HTTP/1.1\r\n{h}A: {}\r\n{t}\r\n", "a".repeat(17_000)), 431),
        ("endless head", format!("GET /v1/a HTTP/1.1\r\n{h}A: {}", "a".repeat(40_000)), 431),
        ("65 headers", format!("GET /v1/a HTTP/1.1\r\n{h}{t}{}\r\n", "A: b\r\n".repeat(63)), 431),
    ];
    for (what, request, status) in cases {
        // A good request after it must not be answered: where it begins is anybody's guess.
        let mut connection = agent.connect();
        let _ = connection.try_send(request + &agent.head("/ping"));
        let reply = connection.reply_to("GET").unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(reply.status, status, "{what}: {}", reply.text());
        assert!(reply.closes(), "{what}");
        assert!(connection.is_at_end(), "{what}: it is the last reply");
    }
    let sixty_four = format!("GET /v1/a HTTP/1.1\r\n{h}{t}{}\r\n", "A: b\r\n".repeat(62));
    let mut connection = agent.connect();
    connection.send(sixty_four);
    assert_eq!(connection.reply().unwrap().status, 200);
    connection.send(format!("GET /v1/a HTTP/1.1\r\n{h}{t}Content-Length: 0\r\n\r\n"));
    assert_eq!(connection.reply().unwrap().status, 200, "a length of 0 is fine");
}

#[test]
fn ids_reach_kms_as_they_were_meant() {
    let names = [
        "a/b",
        "a+b",
        "a b",
        "grüße/世界",
        "it's \"quoted\"",
        "back\\slash",
        "a&b=c",
        "100%",
        "..a",
        "~-_.",
        "a?b#c",
        "a:b@c",
    ];
    let emulator = emulator(&names.map(|name| (name, name)));
    let agent = Agent::start(&emulator);
    for name in names {
        let reply = agent.secret(name);
        assert_eq!((reply.verdict().as_str(), reply.data().as_str()), ("200 MISS", name));
        // By path, `/` as itself; the same key, so a hit.
        let path = kms_emulator::signature::encode(name.as_bytes()).replace("%2F", "/");
        let reply = agent.get(&format!("/v1/{path}"));
        assert_eq!((reply.verdict().as_str(), reply.data().as_str()), ("200 HIT", name));
        assert_eq!(gets(&emulator, name), 1, "{name}");
    }
    // In a query `+` is a space, in a path it is itself.
    assert_eq!(agent.get("/secretsmanager/get?secretId=a+b").data(), "a b");
    assert_eq!(agent.get("/v1/a+b").data(), "a+b");
    assert_eq!(emulator.counters().signature_failures, 0);
}

#[test]
fn a_secret_may_be_asked_by_arn() {
    let emulator = emulator(&[("team/db", "x")]);
    let agent = Agent::start(&emulator);
    let arn = emulator.arn("team/db");
    for expected in ["200 MISS", "200 HIT"] {
        let reply = agent.secret(&arn);
        assert_eq!((reply.verdict().as_str(), reply.field("SecretName").as_str()), (expected, "team/db"));
    }
    assert_eq!(agent.get(&format!("/v1/{arn}")).verdict(), "200 HIT");
    assert_eq!(gets(&emulator, &arn), 1);
}

#[test]
fn it_listens_on_loopback_only() {
    let emulator = emulator(&[]);
    let agent = Agent::start(&emulator);
    let mut addresses = BTreeSet::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        for line in fs::read_to_string(table).unwrap_or_default().lines().skip(1) {
            let mut fields = line.split_whitespace().skip(1);
            let (local, state) = (fields.next().unwrap(), fields.nth(1).unwrap());
            let (address, port) = local.split_once(':').unwrap();
            if state == "0A" && u16::from_str_radix(port, 16).unwrap() == agent.port {
                addresses.insert(address.to_owned());
            }
        }
    }
    let mut expected = BTreeSet::from(["0100007F".to_owned()]);
    if has_ipv6() {
        expected.insert("00000000000000000000000001000000".to_owned());
    }
    assert_eq!(addresses, expected);
}

// ---- The cache ----

#[test]
fn readers_of_one_miss_share_one_call() {
    const READERS: usize = 50;
    let emulator = emulator(&[("slow", "s")]);
    emulator.delay_secret("slow", Duration::from_millis(300));
    let agent = Agent::start(&emulator);
    let mut readers: Vec<Connection> = (0..READERS).map(|_| agent.connect()).collect();
    for reader in &mut readers {
        reader.send(agent.head(&secret_target("slow")));
    }
    let replies: Vec<Reply> = readers.iter_mut().map(|reader| reader.reply().unwrap()).collect();
    assert!(replies.iter().all(|reply| reply.data() == "s"));
    assert_eq!(gets(&emulator, "slow"), 1);
    // On a very slow host the last of them may have come after the reply; the first have not.
    assert!(replies.iter().filter(|reply| reply.x_cache() == "MISS").count() > 1);
}

#[test]
fn readers_of_a_refusal_share_it_too() {
    let emulator = emulator(&[]);
    emulator.set_latency(Duration::from_millis(300));
    let agent = Agent::start(&emulator);
    let mut readers: Vec<Connection> = (0..20).map(|_| agent.connect()).collect();
    for reader in &mut readers {
        reader.send(agent.head(&secret_target("nobody")));
    }
    for reader in &mut readers {
        assert_eq!(reader.reply().unwrap().verdict(), "404 Forbidden.ResourceNotFound");
    }
    assert_eq!(gets(&emulator, "nobody"), 1);
}

#[test]
fn a_reader_that_leaves_does_not_cancel_the_call() {
    let emulator = emulator(&[("slow", "s")]);
    emulator.delay_secret("slow", Duration::from_millis(300));
    let agent = Agent::start(&emulator);
    let mut connection = agent.connect();
    connection.send(agent.head(&secret_target("slow")));
    assert!(emulator.wait_for(PATIENCE, |counters| counters.gets("slow") == 1));
    drop(connection);
    let answered =
        || emulator.requests().iter().any(|it| it.service == Service::Kms && it.answered.is_some());
    wait_until("KMS has answered", answered);
    wait_until("the answer is cached", || agent.secret("slow").verdict() == "200 HIT");
    assert_eq!(gets(&emulator, "slow"), 1);
}

#[test]
fn a_slow_secret_delays_no_other() {
    let emulator = emulator(&[("slow", "s"), ("quick", "q")]);
    emulator.delay_secret("slow", Duration::from_secs(2));
    let agent = Agent::start(&emulator);
    let mut slow = agent.connect();
    slow.send(agent.head(&secret_target("slow")));
    assert!(emulator.wait_for(PATIENCE, |counters| counters.gets("slow") == 1));
    assert_eq!(agent.secret("quick").verdict(), "200 MISS");
    assert_eq!(agent.secret("quick").verdict(), "200 HIT");
    assert!(!slow.has_something(), "the slow one is still on its way");
    assert_eq!(slow.reply().unwrap().data(), "s");
}

#[test]
fn a_value_ends_with_its_ttl() {
    let emulator = emulator(&[("a", "old")]);
    let agent = Setup::new(&emulator).key("Cache", "TTLSeconds", 1).start();
    assert_eq!(agent.secret("a").data(), "old");
    emulator.put_secret("a", "new");
    let_pass(Duration::from_millis(1100));
    let reply = agent.secret("a");
    assert_eq!((reply.verdict().as_str(), reply.data().as_str()), ("200 MISS", "new"));
    assert_eq!(gets(&emulator, "a"), 2);
}

#[test]
fn refresh_now_goes_to_kms_and_replaces_the_value() {
    let emulator = emulator(&[("a", "old")]);
    let agent = Agent::start(&emulator);
    assert_eq!(agent.secret("a").data(), "old");
    emulator.put_secret("a", "new");
    assert_eq!(agent.secret("a").data(), "old");
    let reply = agent.get("/v1/a?refreshNow=True");
    assert_eq!((reply.verdict().as_str(), reply.data().as_str()), ("200 REFRESH", "new"));
    let reply = agent.secret("a");
    assert_eq!((reply.verdict().as_str(), reply.data().as_str()), ("200 HIT", "new"));
    // Where KMS fails, the error is told and the value kept.
    let_pass(Duration::from_millis(1100));
    emulator.fail_secret("a", 500, "InternalFailure");
    assert_eq!(agent.get("/v1/a?refreshNow=1").verdict(), "500 InternalFailure");
    assert_eq!(agent.secret("a").verdict(), "200 HIT");
}

#[test]
fn the_least_recently_used_secret_makes_room() {
    let emulator = emulator(&[("a", "1"), ("b", "2"), ("c", "3")]);
    let agent = Setup::new(&emulator).key("Cache", "CacheSize", 2).start();
    for (name, expected) in [
        ("a", "MISS"),
        ("b", "MISS"),
        ("a", "HIT"),
        ("c", "MISS"),
        ("a", "HIT"),
        ("c", "HIT"),
        ("b", "MISS"),
        ("c", "HIT"),
        ("a", "MISS"),
    ] {
        assert_eq!(agent.secret(name).verdict(), format!("200 {expected}"), "{name}");
    }
}

#[test]
fn with_a_ttl_of_0_nothing_is_cached() {
    let emulator = emulator(&[("a", "1")]);
    let agent = Setup::new(&emulator).key("Cache", "TTLSeconds", 0).start();
    for count in 1..=3 {
        assert_eq!(agent.secret("a").verdict(), "200 MISS");
        assert_eq!(gets(&emulator, "a"), count);
    }
}

// ---- Connections at the cap ----

#[test]
fn at_the_cap_the_next_is_told_so_and_pings_are_answered() {
    let emulator = emulator(&[("slow", "s"), ("a", "1")]);
    emulator.delay_secret("slow", Duration::from_secs(2));
    let agent = Setup::new(&emulator).key("Server", "MaxConn", 2).start();
    agent.secret("a");
    let mut busy = [agent.connect(), agent.connect()];
    for connection in &mut busy {
        connection.send(agent.head(&secret_target("slow")));
    }
    assert!(emulator.wait_for(PATIENCE, |counters| counters.gets("slow") == 1));
    // Both wait once the log has nothing more to say about them; a hit would be served at once.
    let reply = {
        let mut reply = agent.secret("a");
        let end = Instant::now() + Duration::from_secs(1);
        while reply.status != 429 && Instant::now() < end {
            reply = agent.secret("a");
        }
        reply
    };
    assert_eq!(reply.verdict(), "429 ConnectionLimitExceeded");
    assert_eq!((reply.header("Retry-After"), reply.closes()), (Some("1"), true));
    assert_eq!(agent.get_with("/ping", &[]).text(), "healthy");
    for connection in &mut busy {
        assert_eq!(connection.reply().unwrap().data(), "s");
    }
    // Idle keep-alive connections make room.
    assert_eq!(agent.secret("a").verdict(), "200 HIT");
}

#[test]
fn connections_leave_no_descriptor_behind() {
    let emulator = emulator(&[("a", "1")]);
    let agent = Agent::start(&emulator);
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", agent.pid())).unwrap().count();
    agent.secret("a");
    wait_until("the first connection is closed", || descriptors() < 40);
    let before = descriptors();
    for n in 0..300 {
        match n % 3 {
            0 => drop(agent.connect()),
            1 => assert_eq!(agent.secret("a").status, 200),
            _ => assert!(agent.raw("\r\nx\r\n\r\n").starts_with(b"HTTP/1.1 400 ")),
        }
    }
    wait_until("they are closed", || descriptors() <= before + 2);
    // The same with many at a time: each has a slot of its own.
    let mut crowd: Vec<Connection> = (0..60).map(|_| agent.connect()).collect();
    for connection in &mut crowd {
        connection.send(agent.head("/ping"));
        assert_eq!(connection.reply().unwrap().status, 200);
    }
    assert!(descriptors() >= before + 50, "they are open at one time");
    drop(crowd);
    wait_until("the crowd is closed", || descriptors() <= before + 2);
}

// ---- Upstream ----

#[test]
fn connections_to_kms_are_used_again() {
    let emulator = emulator(&[("a", "1"), ("b", "2"), ("c", "3")]);
    let agent = Agent::start(&emulator);
    for name in ["a", "b", "missing", "c"] {
        agent.secret(name);
    }
    let counters = emulator.counters();
    assert_eq!((counters.kms_accepted, counters.tls_handshakes, counters.kms_requests), (1, 1, 4));
}

#[test]
fn a_pooled_connection_that_died_is_replaced_unnoticed() {
    for kind in [FaultKind::DropBefore, FaultKind::Reset] {
        let emulator = emulator(&[("a", "1"), ("b", "2")]);
        let agent = Agent::start(&emulator);
        agent.secret("a");
        emulator.inject(Fault::new(kind.clone()).times(1));
        assert_eq!(agent.secret("b").verdict(), "200 MISS", "{kind:?}");
        assert_eq!(gets(&emulator, "b"), 2, "{kind:?}");
        let connections: Vec<u64> = emulator
            .requests()
            .iter()
            .filter(|it| it.service == Service::Kms)
            .map(|it| it.connection)
            .collect();
        assert!(
            connections[0] == connections[1] && connections[1] != connections[2],
            "{kind:?}: the pool's, then a fresh one: {connections:?}"
        );
        // No failure, so no pause either.
        assert!(!agent.log().contains("WARN"), "{}", agent.log());
    }
}

#[test]
fn connections_that_kms_closes_while_idle_are_replaced() {
    let emulator = emulator(&[("a", "1"), ("b", "2")]);
    let agent = Agent::start(&emulator);
    agent.secret("a");
    emulator.close_kms_connections();
    assert_eq!(agent.secret("b").verdict(), "200 MISS");
    let counters = emulator.counters();
    assert_eq!((counters.kms_accepted, counters.tls_resumed), (2, 1), "and the TLS session is resumed");
}

#[test]
fn replies_in_any_framing_are_taken() {
    let raw = |framing, interim: &[u16]| {
        let headers = Vec::new();
        FaultKind::Reply(RawReply { status: None, body: None, headers, framing, interim: interim.into() })
    };
    let length = || Framing::ContentLength;
    let large = "L".repeat(30_000);
    let cases = [
        ("chunked", raw(Framing::Chunked(1), &[])),
        ("chunked-7", raw(Framing::Chunked(7), &[])),
        ("until-close", raw(Framing::UntilClose, &[])),
        ("interim", raw(length(), &[100, 103])),
        ("interim-chunked", raw(Framing::Chunked(5000), &[102])),
        ("dropped-after", FaultKind::DropAfter),
    ];
    let names: Vec<(&str, &str)> = cases.iter().map(|(name, _)| (*name, large.as_str())).collect();
    let emulator = emulator(&names);
    let agent = Agent::start(&emulator);
    for (name, kind) in cases {
        let fault = emulator.inject(Fault::new(kind).for_secret(name));
        let reply = agent.secret(name);
        assert_eq!((reply.verdict().as_str(), reply.data() == large), ("200 MISS", true), "{name}");
        assert_eq!(agent.secret(name).body, reply.body, "{name}");
        assert_eq!(emulator.fault_hits(fault), 1, "{name}: asked once");
    }
}

#[test]
fn unusable_replies_are_502_and_not_cached() {
    let value = |name: &str, data: &str| format!(r#"{{"SecretName":"{name}","SecretData":"{data}"}}"#);
    let reply = |body: Vec<u8>, framing| {
        let (status, body) = (Some(200), Some(body));
        FaultKind::Reply(RawReply { status, body, headers: Vec::new(), framing, interim: Vec::new() })
    };
    let plain = |body: &str| reply(body.into(), Framing::ContentLength);
    let too_large = value("too-large", &"x".repeat(129 * 1024)).into_bytes();
    let too_large_chunked = value("too-large-chunked", &"x".repeat(129 * 1024)).into_bytes();
    let too_large_endless = value("too-large-endless", &"x".repeat(129 * 1024)).into_bytes();
    let cases = [
        ("no-json", plain("<html>Welcome to the hotel's network</html>")),
        ("empty", plain("")),
        ("an-array", plain("[1]")),
        ("half-json", plain(r#"{"SecretName":"half-json","SecretData":"xyzzy-"#)),
        ("another", plain(&value("other", "xyzzy"))),
        ("no-data", plain(r#"{"SecretName":"no-data"}"#)),
        ("no-text", plain(r#"{"SecretName":"no-text","SecretData":{"a":1}}"#)),
        ("too-large", reply(too_large, Framing::ContentLength)),
        ("too-large-chunked", reply(too_large_chunked, Framing::Chunked(4096))),
        ("too-large-endless", reply(too_large_endless, Framing::UntilClose)),
        ("cut-off", FaultKind::DropAmid),
        ("false-length", reply(value("false-length", "x").into(), Framing::FalseLength(4000))),
        ("not-http", FaultKind::Bytes(b"SSH-2.0-OpenSSH_9.9\r\n\r\n".to_vec())),
        (
            "not-utf8",
            reply(b"{\"SecretName\":\"not-utf8\",\"SecretData\":\"\xff\"}".to_vec(), Framing::ContentLength),
        ),
    ];
    let names: Vec<(&str, &str)> = cases.iter().map(|(name, _)| (*name, "right")).collect();
    let emulator = emulator(&names);
    let agent = Agent::start(&emulator);
    for (name, kind) in cases {
        let fault = emulator.inject(Fault::new(kind).for_secret(name));
        let reply = agent.secret(name);
        assert_eq!(reply.verdict(), "502 UpstreamInvalidResponse", "{name}");
        assert!(!reply.field("Message").is_empty() && !reply.text().contains("xyzzy"), "{}", reply.text());
        assert!(emulator.fault_hits(fault) >= 1);
        emulator.clear_fault(fault);
        let reply = agent.secret(name);
        assert_eq!((reply.verdict().as_str(), reply.data().as_str()), ("200 MISS", "right"), "{name}");
    }
    assert!(!agent.everything_written().contains("xyzzy"), "what KMS sent stays out of the log");
}

#[test]
fn a_reply_of_almost_the_largest_size_passes() {
    let emulator = emulator(&[]);
    let body = format!(r#"{{"SecretName":"big","SecretData":"{}"}}"#, "x".repeat(127 * 1024));
    emulator.raw_reply("big", 200, body.clone());
    let agent = Agent::start(&emulator);
    for expected in ["200 MISS", "200 HIT"] {
        let reply = agent.secret("big");
        assert_eq!((reply.verdict().as_str(), reply.body == body.as_bytes()), (expected, true));
    }
}

#[test]
fn a_certificate_that_does_not_verify_stops_everything() {
    for (certificate, words) in [
        (BadCertificate::OtherCa, "certificate"),
        (BadCertificate::SelfSigned, "certificate"),
        (BadCertificate::WrongName, "not valid for"),
        (BadCertificate::Expired, "expired"),
    ] {
        let emulator = emulator(&[("a", "1")]);
        emulator.set_kms_mode(KmsMode::Certificate(certificate)).unwrap();
        let agent = Agent::start(&emulator);
        let reply = agent.secret("a");
        assert_eq!(reply.verdict(), "502 UpstreamUnreachable", "{certificate:?}");
        let message = reply.field("Message");
        let address = emulator.kms_addr().to_string();
        for part in [words, "the server's certificate does not verify", &address] {
            assert!(message.contains(part), "{certificate:?}: {message}");
        }
        let counters = emulator.counters();
        assert_eq!((counters.kms_requests, counters.tls_handshakes), (0, 0), "{certificate:?}: nothing sent");
        assert!(counters.tls_failed > 0);
        emulator.set_kms_mode(KmsMode::Normal).unwrap();
        assert_eq!(agent.secret("a").verdict(), "200 MISS", "{certificate:?}: it heals");
    }
}

#[test]
fn without_the_ca_file_nothing_private_is_trusted_and_sighup_reads_a_new_one() {
    let emulator = emulator(&[("a", "1")]);
    let other = common::emulator(&[]);
    let setup = Setup::new(&emulator);
    let ca_file = setup.folder.write("ca.pem", other.ca_pem());
    let agent = setup.start();
    assert_eq!(agent.secret("a").verdict(), "502 UpstreamUnreachable");
    // A broken file changes nothing, and says so.
    fs::write(&ca_file, "no certificate\n").unwrap();
    agent.signal(Signal::HUP);
    agent.wait_for_log("what was trusted before stays trusted");
    assert_eq!(agent.secret("a").verdict(), "502 UpstreamUnreachable");
    assert_eq!(emulator.counters().kms_requests, 0);
    fs::write(&ca_file, emulator.ca_pem()).unwrap();
    agent.signal(Signal::HUP);
    wait_until("the new CA is trusted", || agent.secret("a").status == 200);

    let agent = Setup::new(&emulator).without("KMS", "CaFile").start();
    let reply = agent.secret("a");
    assert_eq!(reply.verdict(), "502 UpstreamUnreachable");
    assert!(reply.field("Message").contains("CaFile"), "says what to set: {}", reply.text());
}

#[test]
fn credentials_come_from_hardened_metadata() {
    for mode in [MetadataMode::Normal, MetadataMode::Hardened] {
        let secrets = vec![NewSecret::generic("a", "1")];
        let emulator =
            Emulator::start(Options { secrets, metadata_mode: mode, ..Options::default() }).unwrap();
        let agent = Agent::start(&emulator);
        assert_eq!(agent.secret("a").data(), "1");
        let counters = emulator.counters();
        assert_eq!((counters.metadata_plain_gets, counters.metadata_token_puts), (0, 1), "{mode:?}");
        assert!(counters.metadata_hardened_gets >= 1);
        assert_eq!(counters.credential_reads.get("EcsRamRoleKms"), Some(&1));
    }
}

#[test]
fn without_the_metadata_service_it_starts_and_heals() {
    let secrets = vec![NewSecret::generic("a", "1")];
    let fault = Some(MetadataFault::Refuse);
    let emulator = Emulator::start(Options { secrets, metadata_fault: fault, ..Options::default() }).unwrap();
    let agent = Agent::start(&emulator);
    assert_eq!(agent.get_with("/ping", &[]).status, 200);
    let address = emulator.metadata_addr().to_string();
    for fault in
        [MetadataFault::Refuse, MetadataFault::Status500, MetadataFault::Garbage, MetadataFault::Close]
    {
        emulator.set_metadata_fault(Some(fault)).unwrap();
        let reply = agent.secret("a");
        assert_eq!(reply.verdict(), "503 CredentialUnavailable", "{fault:?}");
        assert!(reply.header("Retry-After").unwrap().parse::<u32>().unwrap() >= 1);
        let message = reply.field("Message");
        assert!(message.starts_with("metadata service: "), "{message}");
        if fault == MetadataFault::Refuse {
            assert!(message.contains(&address) && message.contains("refused"), "says where: {message}");
        }
    }
    assert_eq!(emulator.counters().kms_requests, 0);
    emulator.set_metadata_fault(None).unwrap();
    wait_until("it heals by itself", || agent.secret("a").status == 200);
}

#[test]
fn without_a_role_it_says_what_to_attach() {
    let secrets = vec![NewSecret::generic("a", "1")];
    let emulator = Emulator::start(Options { secrets, role: None, ..Options::default() }).unwrap();
    let agent = Agent::start(&emulator);
    let reply = agent.secret("a");
    assert_eq!(reply.verdict(), "503 CredentialUnavailable");
    assert!(reply.field("Message").contains("no RAM role is attached"), "{}", reply.text());
    emulator.set_role(Some("Late"));
    wait_until("it heals by itself", || agent.secret("a").status == 200);
}

#[test]
fn credentials_that_kms_refuses_are_renewed_unnoticed() {
    let emulator = emulator(&[("a", "1"), ("b", "2"), ("c", "3")]);
    let agent = Agent::start(&emulator);
    assert_eq!(agent.secret("a").verdict(), "200 MISS");
    emulator.expire_credentials();
    assert_eq!(agent.secret("b").verdict(), "200 MISS");
    emulator.revoke_credentials();
    assert_eq!(agent.secret("c").verdict(), "200 MISS");
    assert_eq!(emulator.counters().signature_failures, 2);
    assert_eq!(emulator.counters().credential_reads_total(), 3);
}

#[test]
fn a_wrong_clock_is_corrected_by_that_of_kms() {
    let emulator = emulator(&[("a", "1"), ("b", "2")]);
    emulator.set_clock_offset(3 * 3600);
    let agent = Agent::start(&emulator);
    assert_eq!(agent.secret("a").verdict(), "200 MISS");
    assert_eq!(agent.secret("b").verdict(), "200 MISS");
    assert_eq!(emulator.counters().signature_failures, 1, "once is enough");
    assert!(agent.log().contains("clock"));
}

// ---- The token ----

#[test]
fn the_token_may_be_the_variable_itself() {
    let emulator = emulator(&[("a", "1")]);
    let agent = Setup::new(&emulator).token_value("by-value").start();
    assert_eq!(agent.secret("a").status, 200);
    assert_eq!(agent.get_with("/v1/a", &[("X-KMS-Token", TOKEN)]).status, 403);
    // The first variable that is set wins.
    let setup = Setup::new(&emulator).key("Server", "SSRFEnvVariables", r#"["FIRST", "KMS_TOKEN"]"#);
    let agent = setup.env("FIRST", "first-wins").start();
    assert_eq!(agent.get_with("/v1/a", &[("X-Vault-Token", "first-wins")]).status, 200);
    assert_eq!(agent.secret("a").status, 403);
}

#[test]
fn an_empty_token_never_matches() {
    let emulator = emulator(&[("a", "1")]);
    let agent = Setup::new(&emulator).token_value(" ").start();
    for headers in [&[][..], &[("X-KMS-Token", "")], &[("X-KMS-Token", " ")]] {
        assert_eq!(agent.get_with("/v1/a", headers).verdict(), "403 InvalidToken");
    }
    assert!(agent.log().contains("the token is empty"));
}

#[test]
fn a_new_token_works_within_a_second_and_the_old_one_no_more() {
    let emulator = emulator(&[("a", "1")]);
    let agent = Agent::start(&emulator);
    let status = |token: &str| agent.get_with("/v1/a", &[("X-KMS-Token", token)]).status;
    assert_eq!(status(TOKEN), 200);
    // Replaced as `token rotate` does it, by a rename, without a word to the agent.
    let new = agent.folder.write("kmstoken.new", "second\n");
    fs::rename(new, agent.folder.join("kmstoken")).unwrap();
    let_pass(Duration::from_secs(1));
    assert_eq!((status("second"), status(TOKEN)), (200, 403));
    // With SIGHUP at once.
    agent.folder.write("kmstoken", "  third \n");
    agent.signal(Signal::HUP);
    wait_until("the third token works", || status("third") == 200);
    assert_eq!(status("second"), 403);
    // Empty or gone: the last good one stays.
    agent.folder.write("kmstoken", "\n");
    agent.signal(Signal::HUP);
    agent.wait_for_log("it is empty; the last good token stays in force");
    assert_eq!((status("third"), status("")), (200, 403));
    fs::remove_file(agent.folder.join("kmstoken")).unwrap();
    let_pass(Duration::from_secs(1));
    assert_eq!((status("third"), status("")), (200, 403));
    let log = agent.everything_written();
    for token in [TOKEN, "second", "third"] {
        assert!(!log.contains(token), "{token}");
    }
}

// ---- The process ----

#[test]
fn sigterm_finishes_what_is_in_flight_and_exits_0() {
    for signal in [Signal::TERM, Signal::INT] {
        let emulator = emulator(&[("slow", "s"), ("a", "1")]);
        emulator.delay_secret("slow", Duration::from_millis(700));
        let mut agent = Agent::start(&emulator);
        let mut idle = agent.connect();
        idle.send(agent.head(&secret_target("a")));
        assert_eq!(idle.reply().unwrap().status, 200);
        let mut busy = agent.connect();
        busy.send(agent.head(&secret_target("slow")));
        assert!(emulator.wait_for(PATIENCE, |counters| counters.gets("slow") == 1));
        agent.signal(signal);
        assert!(idle.is_at_end(), "idle connections end at once");
        let answered = || {
            emulator.requests().iter().any(|it| it.secret.as_deref() == Some("slow") && it.answered.is_some())
        };
        assert!(!busy.has_something() || answered(), "the other one has to wait");
        let refused = || TcpStream::connect(("127.0.0.1", agent.port)).is_err();
        wait_until("new connections are refused", refused);
        let reply = busy.reply().unwrap();
        assert_eq!((reply.data().as_str(), reply.closes()), ("s", true));
        assert!(busy.is_at_end());
        assert_eq!(agent.wait().code(), Some(0));
        assert!(agent.log().contains("ended"));
        // One line says where to look for the log; a warning would stand here too.
        let complaints: Vec<String> =
            agent.stderr().lines().filter(|line| !is_start_line(line)).map(str::to_owned).collect();
        assert!(complaints.is_empty(), "{complaints:?}");
    }
}

#[test]
fn sigterm_does_not_wait_for_ever() {
    let emulator = emulator(&[("slow", "s")]);
    let agent = Agent::start(&emulator);
    emulator.inject(Fault::new(FaultKind::Stall));
    let mut agent = agent;
    let mut busy = agent.connect();
    busy.send(agent.head(&secret_target("slow")));
    assert!(emulator.wait_for(PATIENCE, |counters| counters.gets("slow") == 1));
    let mut trickle = agent.connect();
    trickle.send("GET /ping HT");
    agent.signal(Signal::TERM);
    let reply = busy.reply().unwrap();
    assert!([503, 504].contains(&reply.status) && reply.closes(), "{} {}", reply.status, reply.text());
    assert_eq!(agent.wait().code(), Some(0));
}

#[test]
fn sighup_reopens_the_log() {
    let emulator = emulator(&[]);
    let agent = Agent::start(&emulator);
    let (file, moved) = (agent.folder.join("logs/kms-agent.log"), agent.folder.join("moved.log"));
    fs::rename(&file, &moved).unwrap();
    agent.signal(Signal::HUP);
    wait_until("there is a new log file", || file.exists());
    agent.get_with("/ping", &[]);
    wait_until("it is written to", || fs::read_to_string(&file).unwrap().contains("GET /ping 200"));
}

#[test]
fn the_log_may_go_to_standard_error() {
    let emulator = emulator(&[("a", "1")]);
    let agent = Setup::new(&emulator).text("Log", "LogPath", "-").start();
    agent.secret("a");
    wait_until("the request is logged", || {
        agent.stderr().contains("GET /secretsmanager/get?secretId=a 200 MISS")
    });
    assert!(!agent.folder.join("logs").exists());
}

#[test]
fn two_agents_live_side_by_side() {
    let emulator = emulator(&[("a", "1")]);
    let first = Agent::start(&emulator);
    let second = Setup::new(&emulator).token("other-token").start();
    for agent in [&first, &second] {
        assert_eq!(agent.secret("a").verdict(), "200 MISS");
        assert_eq!(agent.secret("a").verdict(), "200 HIT");
    }
    assert_eq!(second.get_with("/v1/a", &[("X-KMS-Token", TOKEN)]).status, 403);
    assert_eq!(gets(&emulator, "a"), 2);
}

#[test]
fn what_it_cannot_start_with_is_told_in_one_line() {
    let emulator = emulator(&[]);
    let taken = Agent::start(&emulator);
    let folder = Folder::new();
    let in_the_way = folder.write("file", "");
    let no_pem = folder.write("no.pem", "-----BEGIN NOTHING-----\n");
    let bad_pem = folder.write("bad.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    let setup = || Setup::new(&emulator);
    let text = |path: &std::path::Path| path.display().to_string();
    let cases: Vec<(Setup, Vec<String>)> = vec![
        (
            setup().key("Server", "HttpPort", taken.port),
            vec![format!("port {} is taken", taken.port), "HttpPort".into()],
        ),
        (
            setup().token_variable(format!("file://{}", text(folder.path()))),
            vec![text(folder.path()), "token file".into()],
        ),
        (
            setup().token_variable(format!("file://{}/none", text(folder.path()))),
            vec!["token file".into(), "No such file".into()],
        ),
        (
            setup().text("KMS", "CaFile", &text(&folder.join("none"))),
            vec!["CaFile".into(), "No such file".into()],
        ),
        (setup().text("KMS", "CaFile", &text(&no_pem)), vec!["CaFile".into(), text(&no_pem)]),
        (setup().text("KMS", "CaFile", &text(&bad_pem)), vec!["CaFile".into(), text(&bad_pem)]),
        (setup().text("Log", "LogPath", &text(&in_the_way)), vec!["LogPath".into(), text(&in_the_way)]),
    ];
    for (setup, parts) in cases {
        let (code, stderr) = setup.start_in_vain();
        assert_eq!(code, 1, "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "one line: {stderr}");
        assert!(stderr.starts_with("kms-agent: "), "{stderr}");
        for part in parts {
            assert!(stderr.contains(&part), "{part}: {stderr}");
        }
    }
    let (code, stderr) = setup().token_variable("file://kmstoken").start_in_vain();
    assert!(
        code == 2 && stderr.contains("KMS_TOKEN: file:// must be followed by an absolute path"),
        "{stderr}"
    );
}

#[test]
fn all_problems_of_a_configuration_are_told_together() {
    let emulator = emulator(&[]);
    let config = "\
[Server]
HttpPort = 70000
MaxCon = 5
PathPrefix = \"v1\"
[Cachee]
CacheSize = 1
[Cache]
TTLSeconds = \"300\"
CacheSize = 0
[Log]
LogLevel = \"verbose\"
";
    let (code, stderr) = Setup::new(&emulator).refused_config(config).start_in_vain();
    assert_eq!(code, 2, "{stderr}");
    for (line, parts) in [
        (2, &["HttpPort", "70000", "0 to 65535"][..]),
        (3, &["MaxCon", "did you mean MaxConn"]),
        (4, &["PathPrefix", "v1"]),
        (5, &["Cachee", "did you mean [Cache]"]),
        (8, &["TTLSeconds", "0 to 604800"]),
        (9, &["CacheSize", "1 to 1000"]),
        (11, &["LogLevel", "verbose", "debug", "info", "warn", "error"]),
    ] {
        let start = format!("line {line}: ");
        let told: Vec<&str> = stderr.lines().filter(|it| it.trim().starts_with(&start)).collect();
        assert_eq!(told.len(), 1, "{start}{stderr}");
        for part in parts {
            assert!(told[0].contains(part), "{part}: {}", told[0]);
        }
    }
    assert_eq!(stderr.lines().filter(|line| line.contains("line ")).count(), 7, "{stderr}");
    let (code, stderr) = Setup::new(&emulator).refused_config("[Server\nHttpPort = 1").start_in_vain();
    assert_eq!(code, 2);
    assert!(stderr.contains("line 1"), "{stderr}");
    for (code, stderr) in
        [common::run_binary(&["run", "--config", "/nonexistent.toml"]), common::run_binary(&["serve"])]
    {
        assert_eq!(code, 2, "{stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
}

// ---- The log ----

#[test]
fn a_request_cannot_forge_a_line_of_the_log() {
    let emulator = emulator(&[]);
    let agent = Agent::start(&emulator);
    let forged = "x%0aFORGED%20line%0d%0aSet-Cookie:%20a=b%1b%5b31m%e2%80%a8%c2%85";
    for target in [
        format!("/secretsmanager/get?secretId={forged}"),
        format!("/v1/{forged}"),
        format!("/{forged}"),
        format!("/v1/a?{forged}=1"),
        format!("/v1/a?versionId={forged}"),
        format!("/v1/a?versionStage={forged}"),
    ] {
        let reply = agent.get(&target);
        assert!(reply.status >= 400, "{target}");
        assert_eq!(reply.header("Set-Cookie"), None, "{target}");
    }
    agent.request("GET\u{7f}", "/ping", &[]);
    agent.get_with("/ping", &[("Host", "evil\tFORGED")]);
    agent.wait_for_log("FORGED");
    for line in agent.everything_written().lines() {
        let bytes = line.as_bytes();
        let stamped = bytes.len() > 25 && line.starts_with("20") && bytes[10] == b'T' && bytes[23] == b'Z';
        assert!(stamped || is_start_line(line), "not a line of the agent's: {line:?}");
        let foreign = |c: char| c.is_control() || ['\u{2028}', '\u{85}'].contains(&c);
        assert!(!line.contains(foreign), "{line:?}");
    }
}

#[test]
fn nothing_secret_is_ever_written() {
    const VALUE: &str = "value-9f2c";
    let emulator =
        emulator(&[("a", &format!("{VALUE}-a")), ("b", &format!("{VALUE}-b")), ("c", &format!("{VALUE}-c"))]);
    let mut secrets: Vec<String> = vec![VALUE.into(), TOKEN.into(), "tried-9f2c".into(), "next-9f2c".into()];
    let mut agent = Setup::new(&emulator).key("Cache", "TTLSeconds", 1).start();
    let note_credentials = |secrets: &mut Vec<String>| {
        let path = "/latest/meta-data/ram/security-credentials/EcsRamRoleKms";
        let mut connection = Connection::to(emulator.metadata_addr());
        connection.send(http::head("GET", path, &[]));
        let reply = connection.reply().unwrap();
        secrets.extend(["AccessKeySecret", "SecurityToken"].map(|name| reply.field(name)));
        reply.field("SecurityToken")
    };
    let sts_token = note_credentials(&mut secrets);
    // All goes well.
    agent.secret("a");
    agent.secret("a");
    agent.get("/v1/b?refreshNow=true");
    // Requests that are refused, with things in them that are nobody's business.
    agent.get_with("/v1/a", &[("X-KMS-Token", "tried-9f2c")]);
    agent.get_with("/v1/a", &[("X-KMS-Token", TOKEN), ("Forwarded", TOKEN)]);
    agent.get_with("/v1/a", &[("X-KMS-Token", TOKEN), ("Host", "evil")]);
    agent.get(&format!("/v1/a?token={TOKEN}"));
    agent.get(&format!("/v1/a?refreshNow={TOKEN}"));
    agent.raw(format!("GET /v1/a HTTP/1.1\r\nX-KMS-Token: {TOKEN}\r\nHost: a b\r\n\r\n"));
    agent.raw(format!("X-KMS-Token: {TOKEN}\r\n\r\n"));
    // KMS fails in every way, and quotes what it was sent.
    let quoting = format!(
        r#"{{"Code":"SignatureDoesNotMatch","Message":"not matched. server string to sign is:x-acs-security-token:{sts_token}","RequestId":"r"}}"#
    );
    let cut = format!(r#"{{"SecretName":"c","SecretData":"{VALUE}-c"#);
    let stray = format!(r#"{{"SecretName":"{VALUE}","SecretData":"{VALUE}"}}"#);
    for (status, body) in [(400, quoting), (200, cut), (200, stray), (500, format!("oops {VALUE}"))] {
        let fault = emulator.raw_reply("c", status, body);
        let reply = agent.secret("c");
        assert!(reply.status >= 400 && !reply.text().contains(VALUE), "{}", reply.text());
        assert!(!reply.text().contains(&sts_token), "{}", reply.text());
        emulator.clear_fault(fault);
    }
    for kind in [FaultKind::DropAmid, FaultKind::HalfRecord, FaultKind::Bytes(VALUE.into())] {
        emulator.inject(Fault::new(kind).times(3));
        agent.secret("c");
        emulator.clear_faults();
    }
    emulator.expire_credentials();
    agent.get("/v1/a?refreshNow=true");
    note_credentials(&mut secrets);
    emulator.set_metadata_fault(Some(MetadataFault::NotSuccess)).unwrap();
    emulator.revoke_credentials();
    agent.get("/v1/b?refreshNow=true");
    emulator.set_metadata_fault(None).unwrap();
    agent.folder.write("kmstoken", "next-9f2c");
    agent.signal(Signal::HUP);
    agent.wait_for_log("the token has changed");
    assert_eq!(agent.stop().code(), Some(0));

    let written = agent.everything_written();
    for proof in
        ["GET /v1/b 200 REFRESH", "InvalidToken", "KMS GetSecretValue", "SignatureDoesNotMatch", "ended"]
    {
        assert!(written.contains(proof), "{proof} is missing, so this proves little:\n{written}");
    }
    assert!(secrets.len() == 8 && secrets.iter().all(|it| it.len() >= 9), "{secrets:?}");
    for secret in secrets {
        assert!(!written.contains(&secret), "{secret} is in\n{written}");
    }
}
