//! The real binary against the emulated KMS, asked by real clients and by one that sees every byte: clients, the
//! local API, the cache.
//!
//! Where a test lets time pass ([`let_pass`]), that time is what it is about (a TTL, say); nothing is
//! synchronised by sleeping.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::{Agent, Connection, Reply, Setup, TOKEN, emulator, http, run, secret_target, tool, wait_until};
use kms_emulator::{Emulator, Service};
use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::thread;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(10);

/// Lets at least this much time pass.
fn let_pass(time: Duration) {
    thread::sleep(time);
}

fn gets(emulator: &Emulator, name: &str) -> u64 {
    emulator.counters().gets(name)
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
    let (Some(_), Some(sh)) = (tool("curl"), tool("sh")) else { return };
    let emulator = emulator(&[("agent-test", "hello")]);
    emulator.raw_reply("agent-test", 200, ODD_REPLY);
    let agent = Agent::start(&emulator);
    let port = agent.port;
    for expected in ["MISS", "HIT", "HIT"] {
        // Not with the options of a `.curlrc`.
        let line = format!(
            "HOME='{0}' curl -sS --fail -D '{0}/head' -H \"X-KMS-Token: $(cat '{0}/kmstoken')\" \
             'http://localhost:{port}/secretsmanager/get?secretId=agent-test'",
            agent.folder.path().display(),
        );
        let body = run(&sh, &["-c", &line]);
        assert_eq!(String::from_utf8(body).unwrap(), ODD_REPLY);
        let head = fs::read_to_string(agent.folder.join("head")).unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.contains(&format!("\r\nX-Cache: {expected}\r\n")), "{expected}: {head}");
    }
    assert_eq!(gets(&emulator, "agent-test"), 1, "hits ask nobody");
    assert_eq!(emulator.counters().signature_failures, 0);
}

#[test]
fn curl_reaches_it_by_every_name_of_loopback_and_by_path() {
    let Some(curl) = tool("curl") else { return };
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
            let body = run(&curl, &["-q", "-sS", "-g", "--fail", "-H", &token, &url]);
            let reply: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(reply["SecretData"], data, "{url}");
        }
        let url = format!("http://{host}:{}/ping", agent.port);
        assert_eq!(run(&curl, &["-q", "-sS", "-g", "--fail", &url]), b"healthy", "{url}");
    }
    assert_eq!((gets(&emulator, "agent-test"), gets(&emulator, "team/db")), (1, 1));
    // Two URLs in one command are one connection; -I is HEAD.
    let url = format!("http://127.0.0.1:{}/v1/agent-test", agent.port);
    let format = "%{http_code} %{num_connects}\n";
    let twice = run(
        &curl,
        &["-q", "-sS", "-o", "/dev/null", "-o", "/dev/null", "-w", format, "-H", &token, &url, &url],
    );
    assert_eq!(String::from_utf8(twice).unwrap(), "200 1\n200 0\n");
    let head = String::from_utf8(run(&curl, &["-q", "-sS", "-I", "-H", &token, &url])).unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("X-Cache: HIT"), "{head}");
}

#[test]
fn python_gets_values_and_errors() {
    let Some(python) = tool("python3") else { return };
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

/// `docs/contract.md`, section 3.
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
