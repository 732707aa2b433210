//! What an operator sees of the agent: `/metrics`, `/status`, systemd, the token, the process, the log.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::{
    Agent, Connection, DEADLINE, Folder, Reply, Setup, TOKEN, binary, command, emulator, http, secret_target,
    tool, wait_at_most, wait_for, wait_until,
};
use kms_emulator::{Emulator, Fault, FaultKind, KmsMode, MetadataFault, NewSecret, Options, Throttle};
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::net::TcpStream;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::UnixDatagram;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

/// All samples by name and labels, as Prometheus would read them: without a token.
#[track_caller]
fn metrics(agent: &Agent) -> BTreeMap<String, f64> {
    samples(&agent.get_with("/metrics", &[]))
}

/// The same once the agent has no other connection than this one. What was dropped here is closed later while
/// another test is starting a process, which has a copy of it until its exec.
#[track_caller]
fn alone(connection: &mut Connection) -> BTreeMap<String, f64> {
    wait_for("the others have left", || {
        connection.send(http::head("GET", "/metrics", &[]));
        Some(samples(&connection.reply().unwrap())).filter(|all| all["kms_agent_connections"] == 1.0)
    })
}

#[track_caller]
fn samples(reply: &Reply) -> BTreeMap<String, f64> {
    assert_eq!(reply.status, 200, "{}", reply.text());
    let text = reply.text();
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

/// What changes in the metrics while `act` runs, the agent's view of our own asking left out.
#[track_caller]
fn moved(agent: &Agent, act: impl FnOnce()) -> BTreeMap<String, f64> {
    let before = metrics(agent);
    act();
    let mut after = metrics(agent);
    after.retain(|name, value| {
        *value -= before.get(name).copied().unwrap_or(0.0);
        *value != 0.0
            && ["_bucket", "_sum", "connections_accepted_total", "connections ", "route=\"metrics\""]
                .iter()
                .all(|part| !name.contains(part))
            && name != "kms_agent_connections"
    });
    after
}

#[track_caller]
fn assert_moved(agent: &Agent, expected: &[(&str, f64)], act: impl FnOnce()) {
    let moved = moved(agent, act);
    let expected =
        expected.iter().map(|(name, by)| (format!("kms_agent_{name}"), *by)).collect::<BTreeMap<_, _>>();
    assert_eq!(moved, expected);
}

fn request(route: &str, result: &str) -> String {
    format!("requests_total{{route=\"{route}\",result=\"{result}\"}}")
}

fn refusal(code: &str) -> String {
    request("gate", code)
}

/// Lets at least this much time pass, where that is what a test is about.
fn let_pass(time: Duration) {
    thread::sleep(time);
}

#[track_caller]
fn status(agent: &Agent) -> Value {
    let reply = agent.get("/status");
    assert_eq!((reply.status, reply.header("Content-Type")), (200, Some("application/json")));
    reply.json()
}

// ---- /metrics ----

#[test]
fn requests_and_calls_are_counted() {
    let emulator = emulator(&[("a", "1"), ("gone", "2"), ("broken", "3")]);
    let agent = Agent::start(&emulator);
    let call = |result: &str| format!("upstream_calls_total{{result=\"{result}\"}}");
    let lookup = |result: &str| format!("cache_lookups_total{{result=\"{result}\"}}");
    const COUNT: &str = "upstream_call_duration_seconds_count";

    // A miss, and then a hit and another.
    let size = {
        let reply = agent.secret("a");
        assert_eq!(reply.verdict(), "200 MISS");
        reply.body.len()
    };
    let all = metrics(&agent);
    for (name, value) in [
        (request("secret", "miss"), 1.0),
        (lookup("miss"), 1.0),
        (call("ok"), 1.0),
        (COUNT.into(), 1.0),
        ("upstream_call_duration_seconds_bucket{le=\"+Inf\"}".into(), 1.0),
        ("cache_entries".into(), 1.0),
        ("cache_bytes".into(), size as f64),
        ("cache_max_entries".into(), 1000.0),
        ("cache_max_bytes".into(), 16_777_216.0),
        ("max_connections".into(), 800.0),
        ("credential_fetches_total{result=\"ok\"}".into(), 1.0),
        ("upstream_circuit_open".into(), 0.0),
        (format!("build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION")), 1.0),
    ] {
        assert_eq!(all.get(&format!("kms_agent_{name}")), Some(&value), "{name}");
    }
    assert!(all["kms_agent_upstream_call_duration_seconds_sum"] > 0.0);
    assert_moved(&agent, &[(&request("secret", "hit"), 2.0), (&lookup("hit"), 2.0)], || {
        for _ in 0..2 {
            assert_eq!(agent.secret("a").verdict(), "200 HIT");
        }
    });
    assert_moved(
        &agent,
        &[(&request("secret", "refresh"), 1.0), (&lookup("bypass"), 1.0), (&call("ok"), 1.0), (COUNT, 1.0)],
        || {
            assert_eq!(agent.get(&format!("{}&refreshNow=1", secret_target("a"))).verdict(), "200 REFRESH");
        },
    );

    // KMS says no, and the second time the agent remembers.
    emulator.delete_secret("gone", None).unwrap();
    assert_moved(
        &agent,
        &[
            (&request("secret", "kms_refused"), 2.0),
            (&lookup("miss"), 1.0),
            (&lookup("refused"), 1.0),
            (&call("refused"), 1.0),
            (COUNT, 1.0),
        ],
        || {
            for _ in 0..2 {
                assert_eq!(agent.secret("gone").status, 404);
            }
        },
    );
    emulator.fail_secret("broken", 503, "ServiceUnavailableTemporary");
    assert_moved(
        &agent,
        &[
            (&request("secret", "kms_failed"), 1.0),
            (&lookup("miss"), 1.0),
            (&call("failed"), 3.0),
            (COUNT, 3.0),
        ],
        || assert_eq!(agent.secret("broken").status, 503),
    );
    assert!(!agent.get_with("/metrics", &[]).text().contains("broken"), "no secret's name");
}

#[test]
fn refusals_are_counted_by_their_gate() {
    let emulator = emulator(&[]);
    let agent = Agent::start(&emulator);
    wait_until("credentials are there", || status(&agent)["credentials"]["ok"] == true);
    let with_token = [("X-KMS-Token", agent.token.as_str())];
    let asks: [(&str, &dyn Fn() -> Reply); 6] = [
        ("InvalidToken", &|| agent.get_with("/v1/a", &[])),
        ("ForbiddenHost", &|| agent.get_with("/ping", &[("Host", "evil")])),
        ("Forwarded", &|| agent.get_with("/metrics", &[("Forwarded", "for=a")])),
        ("MethodNotAllowed", &|| agent.request("POST", "/v1/a", &with_token)),
        ("NotFound", &|| agent.get("/elsewhere")),
        ("InvalidParameter", &|| agent.get("/v1/a?b")),
    ];
    for (code, ask) in asks {
        assert_moved(&agent, &[(&refusal(code), 1.0)], || assert_eq!(ask().field("Code"), code));
    }
    assert_moved(&agent, &[(&refusal("InvalidRequest"), 1.0)], || {
        agent.raw("nonsense\r\n\r\n");
    });
    assert_moved(&agent, &[(&request("ping", "ok"), 1.0), (&request("status", "ok"), 1.0)], || {
        agent.get_with("/ping", &[]);
        agent.get("/status");
    });
}

#[test]
fn connections_are_counted() {
    let emulator = emulator(&[]);
    let agent = Setup::new(&emulator).key("Server", "MaxConn", 2).start();
    let mut kept = agent.connect();
    let before = alone(&mut kept);
    let after = metrics(&agent);
    let grew = |name: &str| after[name] - before[name];
    assert_eq!(after["kms_agent_connections"], 2.0, "the idle one, and ours");
    assert_eq!(grew("kms_agent_connections_accepted_total"), 1.0);
    alone(&mut kept);
    // Two that begin a head cannot be asked to make room for a second: the third is told so.
    let mut heads = [agent.connect(), agent.connect()];
    for head in &mut heads {
        head.send("GET /p");
    }
    wait_until("the third is refused", || agent.get_with("/metrics", &[]).status == 429);
    drop(heads);
    wait_until("there is room again", || agent.get_with("/metrics", &[]).status == 200);
    let all = metrics(&agent);
    assert!(all["kms_agent_connections_refused_total"] >= 1.0);
    assert_eq!(all["kms_agent_connections_displaced_total"], 1.0, "the idle one made room");
    assert!(kept.is_at_end());
}

#[test]
fn a_client_that_says_nothing_is_counted_as_timed_out() {
    let emulator = emulator(&[]);
    let agent = Agent::start(&emulator);
    let mut silent = agent.connect();
    silent.send("GET /ping HTT");
    // 5 s for a head.
    assert!(silent.is_at_end());
    assert_eq!(metrics(&agent)["kms_agent_connections_timed_out_total"], 1.0);
}

#[test]
fn an_outage_shows() {
    let emulator = emulator(&[("a", "1"), ("b", "2"), ("c", "3")]);
    let agent = Setup::new(&emulator).key("Cache", "TTLSeconds", 1).start();
    for name in ["a", "b", "c"] {
        agent.secret(name);
    }
    emulator.set_kms_mode(KmsMode::Refuse).unwrap();
    wait_until("the circuit opens", || {
        for name in ["a", "b", "c"] {
            assert_eq!(agent.secret(name).status, 200);
        }
        let all = metrics(&agent);
        all["kms_agent_upstream_circuit_open"] == 1.0
            && all["kms_agent_requests_total{route=\"secret\",result=\"stale\"}"] > 0.0
    });
    let all = metrics(&agent);
    for name in [
        "kms_agent_upstream_calls_total{result=\"unreachable\"}",
        "kms_agent_cache_lookups_total{result=\"expired\"}",
    ] {
        assert!(all[name] > 0.0, "{name}");
    }
    emulator.set_kms_mode(KmsMode::Normal).unwrap();
    wait_until("the circuit closes", || {
        agent.secret("a");
        metrics(&agent)["kms_agent_upstream_circuit_open"] == 0.0
    });
    wait_until("hot secrets are refreshed behind the scenes", || {
        agent.secret("a");
        metrics(&agent)["kms_agent_cache_refreshes_total"] > 0.0
    });
}

#[test]
fn head_is_get_without_the_body_here_too() {
    let emulator = emulator(&[]);
    let agent = Agent::start(&emulator);
    let with_token = [("X-KMS-Token", agent.token.as_str())];
    for (target, content_type) in
        [("/metrics", "text/plain; version=0.0.4; charset=utf-8"), ("/status", "application/json")]
    {
        let head = agent.request("HEAD", target, &with_token);
        assert_eq!((head.status, head.header("Content-Type")), (200, Some(content_type)));
        assert!(head.header("Content-Length").unwrap().parse::<usize>().unwrap() > 100);
        assert_eq!(head.header("Cache-Control"), Some("no-store"));
    }
}

#[test]
fn promtool_has_nothing_to_say() {
    let Some(promtool) = tool("promtool") else { return };
    let emulator = emulator(&[("a", "1")]);
    let agent = Agent::start(&emulator);
    agent.secret("a");
    let text = agent.get_with("/metrics", &[]).body;
    let mut check = command(promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    check.stdin.take().unwrap().write_all(&text).unwrap();
    let output = check.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));
}

// ---- /status ----

#[test]
fn status_of_an_agent_that_is_well() {
    let emulator = emulator(&[("name-of-a-secret", "value-of-a-secret")]);
    let agent = Agent::start(&emulator);
    assert_eq!(agent.get_with("/status", &[]).verdict(), "403 InvalidToken");
    wait_until("credentials are there", || status(&agent)["credentials"]["ok"] == true);
    let first = status(&agent);
    assert_eq!(first["kms"], serde_json::json!({"ok": null, "since": null, "last_error": null}));
    let size = agent.secret("name-of-a-secret").body.len();
    let told = status(&agent);
    assert_eq!(told["status"], "Running");
    assert_eq!(told["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(told["pid"], agent.pid());
    assert!(told["uptime_seconds"].as_u64().unwrap() < 3600);
    assert_eq!(told["secrets"], serde_json::json!({"count": 1, "bytes": size}));
    assert_eq!(told["connections"]["max"], 800);
    assert!(told["connections"]["open"].as_u64().unwrap() >= 1);
    assert_eq!(told["kms"]["ok"], true);
    let expires = metrics(&agent)["kms_agent_credential_expiry_timestamp_seconds"];
    assert_eq!(unix_s(&told["credentials"]["expires"]) as f64, expires);
    let since = unix_s(&told["kms"]["since"]);
    assert!((emulator.now() - since).abs() <= 60, "{told}");
    let text = told.to_string();
    assert!(!text.contains("name-of") && !text.contains("value-of"), "{text}");
}

fn unix_s(text: &Value) -> i64 {
    let format = time::format_description::well_known::Rfc3339;
    time::OffsetDateTime::parse(text.as_str().unwrap(), &format).unwrap().unix_timestamp()
}

#[test]
fn status_says_since_when_kms_fails_and_why() {
    let emulator = emulator(&[("name-of-a-secret", "1"), ("b", "2")]);
    let agent = Agent::start(&emulator);
    agent.secret("b");
    emulator.set_throttle(Some(Throttle::qps(0)));
    assert_eq!(agent.secret("name-of-a-secret").verdict(), "429 Rejected.Throttling");
    let kms = status(&agent)["kms"].clone();
    assert_eq!(
        (&kms["ok"], &kms["last_error"]),
        (&false.into(), &"KMS answered 429 Rejected.Throttling".into())
    );
    emulator.set_throttle(None);
    emulator.set_kms_mode(KmsMode::Refuse).unwrap();
    assert_eq!(agent.secret("name-of-a-secret").status, 502);
    let down = status(&agent)["kms"].clone();
    assert_eq!((&down["ok"], &down["since"]), (&false.into(), &kms["since"]), "not fine since then");
    let error = down["last_error"].as_str().unwrap();
    assert!(error.starts_with(&format!("connect {}", emulator.kms_addr())), "{error}");
    emulator.set_kms_mode(KmsMode::Normal).unwrap();
    wait_until("it heals", || agent.secret("name-of-a-secret").status == 200);
    let healed = status(&agent)["kms"].clone();
    assert_eq!((&healed["ok"], &healed["last_error"]), (&true.into(), &down["last_error"]));
    assert_eq!(agent.get_with("/ping", &[]).status, 200);
}

#[test]
fn status_says_why_there_are_no_credentials() {
    let secrets = vec![NewSecret::generic("a", "1")];
    let fault = Some(MetadataFault::Status500);
    let emulator = Emulator::start(Options { secrets, metadata_fault: fault, ..Options::default() }).unwrap();
    let agent = Agent::start(&emulator);
    wait_until("it has tried", || status(&agent)["credentials"]["ok"] == false);
    let told = status(&agent);
    assert_eq!((&told["kms"]["ok"], &told["credentials"]["expires"]), (&Value::Null, &Value::Null));
    let error = told["credentials"]["last_error"].as_str().unwrap();
    assert!(error.starts_with("metadata service: ") && error.contains("500"), "{error}");
    assert!(metrics(&agent)["kms_agent_credential_fetches_total{result=\"failed\"}"] >= 1.0);
    assert!(!metrics(&agent).contains_key("kms_agent_credential_expiry_timestamp_seconds"));
    emulator.set_metadata_fault(None).unwrap();
    // By itself, after a pause of up to 10 s: nobody here needs credentials.
    wait_at_most(2 * DEADLINE, "it heals", || status(&agent)["credentials"]["ok"] == true);
}

// ---- systemd ----

/// What is told to a service manager that the agent was given, one datagram after another.
struct Manager {
    socket: UnixDatagram,
    /// Where it is, unless its name is an abstract one.
    folder: Option<Folder>,
}

impl Manager {
    /// Listens for an agent that is to be started.
    fn for_agent(setup: Setup) -> (Setup, Manager) {
        let folder = Folder::for_sockets();
        let path = folder.join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        (setup.env("NOTIFY_SOCKET", path), Manager { socket, folder: Some(folder) })
    }

    #[track_caller]
    fn told(&self) -> String {
        let mut bytes = [0; 4096];
        let count = self.socket.recv(&mut bytes).expect("the agent tells something");
        String::from_utf8(bytes[..count].to_vec()).unwrap()
    }
}

#[test]
fn the_service_manager_is_told_what_goes_on() {
    let emulator = emulator(&[]);
    let (setup, manager) = Manager::for_agent(Setup::new(&emulator));
    let mut agent = setup.start();
    let ready = format!("READY=1\nSTATUS=serving on port {}\n", agent.port);
    assert_eq!(manager.told(), ready);
    // Closed by the agent, so that it has none left when it ends.
    let ping = http::head("GET", "/ping", &[("Connection", "close")]);
    assert!(agent.raw(ping).starts_with(b"HTTP/1.1 200 "), "it does listen");
    agent.signal(Signal::HUP);
    let reloading = manager.told();
    let monotonic_us = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap().trim();
    assert!(monotonic_us.parse::<u64>().unwrap() > 0, "{reloading}");
    assert_eq!(manager.told(), ready);
    assert!(agent.stop().success());
    assert_eq!(manager.told(), "STOPPING=1\nSTATUS=finishing 0 connections\n");
}

#[test]
fn the_loop_itself_feeds_the_watchdog() {
    let emulator = emulator(&[]);
    let (setup, manager) = Manager::for_agent(Setup::new(&emulator).env("WATCHDOG_USEC", "200000"));
    let begun = Instant::now();
    let agent = setup.start();
    assert!(manager.told().starts_with("READY=1\n"));
    // Nobody asks it anything: the loop wakes for this alone.
    for _ in 0..4 {
        assert_eq!(manager.told(), "WATCHDOG=1\n");
    }
    // The first is due at once, the others 100 ms apart.
    assert!(begun.elapsed() >= Duration::from_millis(290), "half of what is allowed, and no oftener");
    // A process that stands still gives no sign of life.
    agent.signal(Signal::STOP);
    manager.socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let sent_before = std::iter::from_fn(|| manager.socket.recv(&mut [0; 64]).ok()).take(1000).count();
    assert!(sent_before < 1000, "it goes on");
    manager.socket.set_read_timeout(Some(DEADLINE)).unwrap();
    agent.signal(Signal::CONT);
    assert_eq!(manager.told(), "WATCHDOG=1\n");
}

#[test]
fn a_service_manager_that_does_not_listen_is_no_reason_to_end() {
    let emulator = emulator(&[]);
    let gone = Folder::for_sockets();
    let agent = Setup::new(&emulator).env("NOTIFY_SOCKET", gone.join("nobody")).start();
    assert_eq!(agent.get_with("/ping", &[]).status, 200);
    agent.wait_for_log("the service manager cannot be notified: No such file or directory");
}

#[test]
fn a_service_manager_that_reads_nothing_stops_nobody() {
    let emulator = emulator(&[("a", "1")]);
    let (setup, manager) = Manager::for_agent(Setup::new(&emulator).env("WATCHDOG_USEC", "200000"));
    let path = manager.folder.as_ref().unwrap().join("notify");
    let mut agent = setup.start();
    assert!(manager.told().starts_with("READY=1\n"));
    let filler = UnixDatagram::unbound().unwrap();
    filler.set_nonblocking(true).unwrap();
    while filler.send_to(b"more", &path).is_ok() {}
    agent.signal(Signal::HUP);
    agent.wait_for_log("the service manager does not read its notification socket");
    assert_eq!(agent.secret("a").data(), "1");
    assert!(agent.stop().success());
}

#[test]
fn an_abstract_notify_socket_is_one_too() {
    let emulator = emulator(&[]);
    let name = format!("kms-agent-test-{}", std::process::id());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
    let manager = Manager { socket: UnixDatagram::bind_addr(&address).unwrap(), folder: None };
    manager.socket.set_read_timeout(Some(DEADLINE)).unwrap();
    let _agent = Setup::new(&emulator).env("NOTIFY_SOCKET", format!("@{name}")).start();
    assert!(manager.told().starts_with("READY=1\n"));
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

/// The one line that an agent with a log file writes to standard error when all is well.
fn is_start_line(line: &str) -> bool {
    line.starts_with("kms-agent: serving on port ")
}

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
        assert!(emulator.wait_for(DEADLINE, |counters| counters.gets("slow") == 1));
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
        assert!(agent.log().contains("the agent has ended"));
        // One line says where to look for the log; a warning would stand here too.
        assert!(agent.warnings().is_empty(), "{:?}", agent.warnings());
        let stderr = agent.stderr();
        let complaints = stderr.lines().filter(|line| !is_start_line(line) && !agent.log().contains(line));
        assert_eq!(complaints.count(), 0, "{stderr}");
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
    assert!(emulator.wait_for(DEADLINE, |counters| counters.gets("slow") == 1));
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
    assert_eq!(emulator.counters().gets("a"), 2);
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
        code == 2 && stderr.contains("KMS_TOKEN: after file:// it must have an absolute path"),
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
    for proof in [
        "GET /v1/b 200 REFRESH",
        "InvalidToken",
        "KMS GetSecretValue",
        "SignatureDoesNotMatch",
        "the agent has ended",
    ] {
        assert!(written.contains(proof), "{proof} is missing, so this proves little:\n{written}");
    }
    assert!(secrets.len() == 8 && secrets.iter().all(|it| it.len() >= 9), "{secrets:?}");
    for secret in secrets {
        assert!(!written.contains(&secret), "{secret} is in\n{written}");
    }
}

#[test]
fn a_file_size_limit_is_survived_as_a_full_disk_is() {
    let emulator = emulator(&[("a", "1")]);
    let agent = Agent::start(&emulator);
    let limit = Rlimit { current: Some(2048), maximum: Some(2048) };
    prlimit(Some(Pid::from_raw(i32::try_from(agent.pid()).unwrap()).unwrap()), Resource::Fsize, limit)
        .unwrap();
    // The kernel's signal for it, SIGXFSZ, would end the process.
    wait_until("the log is full", || {
        assert_eq!(agent.secret("a").data(), "1");
        agent
            .stderr()
            .contains("the log cannot be written, and the agent tries again every second: File too large")
    });
    assert_eq!(agent.secret("a").verdict(), "200 HIT");
}

#[test]
fn a_standard_error_that_nobody_reads_any_more_is_survived() {
    // SIGPIPE would end the process.
    let emulator = emulator(&[("a", "1")]);
    let (reader, writer) = std::io::pipe().unwrap();
    let agent = Setup::new(&emulator).stderr_to(writer).start();
    drop(reader);
    for _ in 0..3 {
        assert_eq!(agent.get_with("/v1/a", &[]).status, 403);
    }
    agent.wait_for_log("403 InvalidToken");
    assert_eq!(agent.secret("a").data(), "1");
}

#[test]
fn a_standard_error_that_takes_nothing_stops_no_start() {
    let emulator = emulator(&[("a", "1")]);
    let full = || fs::File::options().write(true).open("/dev/full").unwrap();
    let setup = Setup::new(&emulator);
    let config = setup.folder.write("again.toml", setup.config());
    let agent = setup.stderr_to(full()).start();
    assert_eq!(agent.secret("a").data(), "1");
    let mut in_vain = command(binary());
    in_vain.arg("--config").arg(config).env("KMS_TOKEN", "file://no-path").stderr(full());
    assert_eq!(in_vain.status().unwrap().code(), Some(2));
}

#[test]
fn a_removed_log_folder_is_survived_and_told() {
    let emulator = emulator(&[("a", "1")]);
    let agent = Agent::start(&emulator);
    fs::remove_dir_all(agent.folder.join("logs")).unwrap();
    // Landlock forbids to make it again; without Landlock it is made again.
    wait_until("standard error says it, or there is a new one", || {
        assert_eq!(agent.secret("a").data(), "1");
        agent.stderr().contains("the log cannot be written") || agent.log().contains("200 HIT")
    });
    assert_eq!(agent.secret("a").verdict(), "200 HIT");
}

#[test]
fn refusals_in_a_flood_are_counted_and_not_written() {
    let emulator = emulator(&[]);
    let agent = Agent::start(&emulator);
    let before = agent.log().len();
    let begun = Instant::now();
    let mut connection = agent.connect();
    let head = http::head("GET", &format!("/v1/{}", "x".repeat(4000)), &[]);
    for _ in 0..2000 {
        connection.send(&head);
        assert_eq!(connection.reply().unwrap().status, 403);
    }
    let seconds = begun.elapsed().as_secs() + 1;
    let lines = agent.log().lines().filter(|line| line.contains("InvalidToken")).count();
    // 20 at once, and 5 a second.
    assert!(lines >= 20 && lines as u64 <= 20 + 5 * seconds, "{lines} in {seconds} s");
    assert!((agent.log().len() - before) < 500 * lines + 200, "each of them cut");
    // Which of them: the next one that is let through says how many were not.
    wait_until("the rest is counted", || {
        agent.get_with("/v1/a", &[]);
        agent.log().contains(" like it left out)")
    });
    assert!(metrics(&agent)["kms_agent_requests_total{route=\"gate\",result=\"InvalidToken\"}"] >= 2000.0);
}

#[test]
fn calls_that_fail_in_a_flood_are_warned_of_within_limits() {
    let emulator = emulator(&[("broken", "1")]);
    emulator.fail_secret("broken", 403, "Forbidden.NoPermission");
    let agent = Agent::start(&emulator);
    let begun = Instant::now();
    for n in 0..200 {
        assert_eq!(agent.get(&secret_target(&format!("no-such-{n}"))).status, 404);
    }
    let seconds = begun.elapsed().as_secs() + 1;
    let lines = |text: &str| agent.log().lines().filter(|line| line.contains(text)).count();
    wait_until("each call has its line", || lines(" KMS GetSecretValue \"no-such-") == 200);
    let warned = lines("[WARN] broker: KMS GetSecretValue");
    assert!(warned >= 20 && warned as u64 <= 20 + 5 * seconds, "{warned} in {seconds} s");
    assert_eq!(agent.stderr().matches("KMS GetSecretValue").count(), warned);
    wait_until("the next that is warned of counts them", || {
        agent.get(&format!("{}&refreshNow=1", secret_target("broken")));
        agent.log().contains(" like it left out)")
    });
}
