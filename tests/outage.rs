#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
//! `docs/contract.md`, section 5, against the emulated KMS: outages, refusals, refreshes, throttling, credentials,
//! clocks and connections. The figures that the contract promises are printed (`--nocapture`).

mod common;

use common::*;
use kms_emulator::{
    BadCertificate, Emulator, Fault, FaultKind, Framing, KmsMode, MetadataFault, NewSecret, Options,
    RawReply, Service,
};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

/// What the contract calls 100 ms, on a machine that runs many tests at a time.
const AT_ONCE: Duration = Duration::from_millis(900);

/// Nobody knows how long the agent pauses before it asks by itself: any time up to 30 s, the backoff's cap.
const RECOVERY: Duration = Duration::from_secs(30).saturating_add(DEADLINE);

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn setup(emulator: &Emulator, ttl_s: u64) -> Setup {
    Setup::new(emulator).key("Cache", "TTLSeconds", ttl_s)
}

fn refresh_target(name: &str) -> String {
    secret_target(name) + "&refreshNow=true"
}

/// An error of KMS's.
fn fault(status: u16, code: &str) -> Fault {
    Fault::error(status, code)
}

/// Lets a moment pass that is a number of seconds after `since`: a TTL's end, for example.
fn let_pass(since: Instant, seconds: f64) {
    thread::sleep((since + Duration::from_secs_f64(seconds)).saturating_duration_since(Instant::now()));
}

/// Reads once, without making the value hot; gives the moments before and after.
#[track_caller]
fn first_read(agent: &Agent, name: &str, data: &str) -> (Instant, Instant) {
    let before = Instant::now();
    let reply = agent.secret(name);
    assert_eq!((reply.verdict().as_str(), reply.data().as_str()), ("200 MISS", data));
    (before, Instant::now())
}

/// Whether `Age` is the truth about a value fetched between `fetched.0` and `fetched.1`; `asked` is when the
/// reader asked.
#[track_caller]
fn assert_age(reply: &Reply, fetched: (Instant, Instant), asked: Instant) {
    let age: u64 = reply.header("Age").expect("an Age").parse().expect("seconds");
    let least = asked.duration_since(fetched.1).as_secs();
    let most = fetched.0.elapsed().as_secs();
    assert!((least..=most).contains(&age), "Age {age}, in truth {least} to {most}");
}

/// Failed tries, as the log tells them.
fn failed_tries(agent: &Agent, name: &str) -> usize {
    let mark = format!("KMS GetSecretValue \"{name}\"");
    agent.log().lines().filter(|line| line.contains(&mark) && !line.contains(": 200 (")).count()
}

/// All at once, each on its own connection.
fn together<T: Send>(count: usize, act: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let (barrier, act) = (Barrier::new(count), &act);
    thread::scope(|scope| {
        let begin = |number| {
            let barrier = &barrier;
            scope.spawn(move || {
                barrier.wait();
                act(number)
            })
        };
        let threads: Vec<_> = (0..count).map(begin).collect();
        threads.into_iter().map(|it| it.join().expect("a reader")).collect()
    })
}

fn kms_arrivals(emulator: &Emulator, name: &str) -> Vec<Instant> {
    let records = emulator.requests();
    let of =
        |it: &&kms_emulator::RequestRecord| it.service == Service::Kms && it.secret.as_deref() == Some(name);
    records.iter().filter(of).map(|it| it.arrived).collect()
}

fn fifty_readers_of_a_slow_miss_are_one_call() {
    let emulator = emulator(&[("slow", "v1")]);
    let agent = Agent::start(&emulator);
    emulator.delay_secret("slow", ms(700));
    let replies = together(50, |_| agent.secret("slow"));
    assert!(replies.iter().all(|it| it.data() == "v1"));
    assert_eq!(emulator.counters().gets("slow"), 1);
    // On a very slow host the last of them may have come after the reply; the first have not.
    assert!(replies.iter().filter(|it| it.verdict() == "200 MISS").count() > 1);
    println!("must show: 50 readers of a slow miss: {} call", emulator.counters().gets("slow"));
}

/// Ways in which KMS is down.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Down {
    Refuses,
    Closes,
    StallsHandshake,
    StallsReply,
    Says503,
    BreaksRecords,
    DropsAmid,
}

impl Down {
    fn begin(self, emulator: &Emulator) {
        let kind = match self {
            Down::Refuses => return emulator.set_kms_mode(KmsMode::Refuse).unwrap(),
            Down::Closes => return emulator.set_kms_mode(KmsMode::Close).unwrap(),
            Down::StallsHandshake => return emulator.set_kms_mode(KmsMode::StallHandshake).unwrap(),
            Down::StallsReply => return emulator.set_kms_mode(KmsMode::StallReply).unwrap(),
            Down::Says503 => fault(503, "ServiceUnavailableTemporary").kind,
            Down::BreaksRecords => FaultKind::HalfRecord,
            Down::DropsAmid => FaultKind::DropAmid,
        };
        emulator.inject(Fault::new(kind));
    }

    fn end(self, emulator: &Emulator) {
        emulator.clear_faults();
        emulator.set_kms_mode(KmsMode::Normal).unwrap();
        emulator.close_kms_connections();
    }

    /// A try takes longer than a reader of a cached value waits.
    fn is_slow(self) -> bool {
        matches!(self, Down::StallsHandshake | Down::StallsReply)
    }
}

fn outage_serves_stale_values_and_ends_by_itself() {
    let ways = [
        Down::Refuses,
        Down::Closes,
        Down::StallsHandshake,
        Down::StallsReply,
        Down::Says503,
        Down::BreaksRecords,
        Down::DropsAmid,
    ];
    for line in together(ways.len(), |number| outage(ways[number])) {
        println!("{line}");
    }
}

fn outage(way: Down) -> String {
    let emulator = emulator(&[("db", "old")]);
    let agent = setup(&emulator, 2).start();
    let fetched = first_read(&agent, "db", "old");
    let_pass(fetched.1, 2.05);
    way.begin(&emulator);

    // While the first try is under way a reader waits for it, but not past its first second.
    let first = agent.secret("db");
    assert_eq!(first.verdict(), "200 STALE", "{way:?}");
    let expected = if way.is_slow() { ms(900)..ms(1000) + AT_ONCE } else { ms(0)..AT_ONCE };
    assert!(expected.contains(&first.elapsed), "{way:?}: the first reader waited {:?}", first.elapsed);

    let (mut reads, mut slowest) = (0, Duration::ZERO);
    let began = Instant::now();
    while began.elapsed() < ms(2500) {
        let asked = Instant::now();
        let reply = agent.secret("db");
        assert_eq!((reply.verdict().as_str(), reply.data().as_str()), ("200 STALE", "old"), "{way:?}");
        assert_age(&reply, fetched, asked);
        slowest = slowest.max(reply.elapsed);
        reads += 1;
        thread::sleep(ms(5));
    }
    assert!(slowest < AT_ONCE, "{way:?}: {slowest:?}");
    let tries = failed_tries(&agent, "db");
    // Windows of 0.5, 1, 2, 4 s, used from their beginning to their end: about 4 tries in this time.
    assert!(tries <= 9, "{way:?}: {tries} tries for {reads} readers");

    let known = emulator.counters().gets("db");
    emulator.put_secret("db", "new");
    way.end(&emulator);
    let recovered = Instant::now();
    wait_at_most(RECOVERY, "the agent asks by itself", || emulator.counters().gets("db") > known);
    let mut reply = agent.secret("db");
    wait_at_most(RECOVERY, "the new value is there", || {
        reply = agent.secret("db");
        reply.verdict() != "200 STALE" || reply.data() == "new"
    });
    assert_eq!((reply.verdict().as_str(), reply.data().as_str()), ("200 HIT", "new"), "{way:?}");
    // Or two: one may have been on its way when the outage ended, and have ended with it.
    let calls = emulator.counters().gets("db") - known;
    assert!((1..=2).contains(&calls), "{way:?}: {calls} calls brought it");
    format!(
        "must show: outage ({way:?}): first reader {:?}; {reads} more, slowest {slowest:?}; {tries} failed \
         tries; new value {:?} after recovery, without a reader",
        first.elapsed,
        recovered.elapsed()
    )
}

fn stale_values_have_an_end() {
    let emulator = emulator(&[("db", "old")]);
    let agent = setup(&emulator, 1).key("Cache", "MaxStaleSeconds", 2).start();
    let fetched = first_read(&agent, "db", "old");
    emulator.set_kms_mode(KmsMode::Refuse).unwrap();
    let_pass(fetched.1, 1.05);
    let (mut stale, mut errors) = (0, 0);
    while errors < 2 {
        let asked = Instant::now();
        let reply = agent.secret("db");
        match reply.verdict().as_str() {
            "200 STALE" => {
                stale += 1;
                assert_age(&reply, fetched, asked);
                assert!(fetched.1 + ms(3000) > asked, "stale {:?} after the fetch", fetched.1.elapsed());
            }
            "502 UpstreamUnreachable" => {
                errors += 1;
                assert!(fetched.0.elapsed() >= ms(3000), "an error while the value may be served");
            }
            other => panic!("{other}"),
        }
        thread::sleep(ms(20));
    }
    assert!(stale > 5, "{stale}");
}

fn without_ignore_transient_errors_an_expired_value_is_an_error() {
    let emulator = emulator(&[("db", "old")]);
    let agent = setup(&emulator, 1).key("Server", "IgnoreTransientErrors", false).start();
    let fetched = first_read(&agent, "db", "old");
    emulator.inject(fault(503, "ServiceUnavailableTemporary"));
    assert_eq!(agent.secret("db").verdict(), "200 HIT", "it is fresh");
    let_pass(fetched.1, 1.05);
    assert_eq!(agent.secret("db").verdict(), "503 ServiceUnavailableTemporary");
}

fn a_deleted_secret_is_never_stale_and_its_refusal_is_remembered() {
    let emulator = emulator(&[("db", "old")]);
    let agent = setup(&emulator, 1).start();
    let fetched = first_read(&agent, "db", "old");
    emulator.delete_secret("db", None).unwrap();
    let_pass(fetched.1, 1.05);
    let asked = Instant::now();
    let reply = agent.secret("db");
    let refused = Instant::now();
    assert_eq!(reply.verdict(), "404 Forbidden.ResourceNotFound");
    assert!(!reply.field("RequestId").is_empty() && !reply.field("Message").is_empty());

    let mut readers = 0;
    while asked.elapsed() < ms(4000) {
        assert_eq!(agent.secret("db").verdict(), "404 Forbidden.ResourceNotFound");
        readers += 1;
        thread::sleep(ms(10));
    }
    assert_eq!(emulator.counters().gets("db"), 2, "one fetch, one refusal");
    let_pass(refused, 5.0);
    assert_eq!(agent.secret("db").verdict(), "404 Forbidden.ResourceNotFound");
    assert_eq!(emulator.counters().gets("db"), 3, "the memory has ended");

    // Nor does an outage bring the value back.
    emulator.set_kms_mode(KmsMode::Refuse).unwrap();
    wait_until("the second refusal is forgotten", || agent.secret("db").status != 404);
    assert_eq!(agent.secret("db").verdict(), "502 UpstreamUnreachable");
    println!("must show: a deleted secret: refused at once, {readers} readers in 4 s: no further call");
}

fn lost_permission_drops_a_fresh_value_too() {
    let emulator = emulator(&[("db", "old")]);
    let agent = Agent::start(&emulator);
    first_read(&agent, "db", "old");
    emulator.fail_secret("db", 403, "Forbidden.NoPermission");
    assert_eq!(agent.secret("db").verdict(), "200 HIT");
    assert_eq!(agent.get(&refresh_target("db")).verdict(), "403 Forbidden.NoPermission");
    // KMS cannot be asked any more: what is answered now is memory.
    emulator.set_kms_mode(KmsMode::Refuse).unwrap();
    assert_eq!(agent.secret("db").verdict(), "403 Forbidden.NoPermission");
    wait_until("the refusal is forgotten", || agent.secret("db").status != 403);
    assert_eq!(agent.secret("db").verdict(), "502 UpstreamUnreachable");
}

fn readers_of_a_hot_secret_never_wait() {
    const CALL: Duration = ms(600);
    let emulator = emulator(&[("hot", "v")]);
    emulator.set_latency(CALL);
    // Refreshed at 70 to 80 % of the TTL: at least 1 s is left for a call of 0.6 s.
    let agent = setup(&emulator, 5).start();
    assert_eq!(agent.secret("hot").verdict(), "200 MISS");
    let mut connection = agent.connect();
    let (began, mut slowest, mut reads) = (Instant::now(), Duration::ZERO, 0);
    while began.elapsed() < ms(9500) {
        connection.send(agent.head(&secret_target("hot")));
        let reply = connection.reply().unwrap();
        assert_eq!(reply.verdict(), "200 HIT");
        slowest = slowest.max(reply.elapsed);
        reads += 1;
        thread::sleep(ms(5));
    }
    assert!(slowest < CALL, "a reader waited {slowest:?}");
    let calls = emulator.counters().gets("hot");
    assert!((3..=4).contains(&calls), "{calls} calls");
    println!("must show: hot secret, KMS of {CALL:?}: slowest of {reads} reads {slowest:?}, {calls} calls");
}

fn two_hundred_misses_at_once_use_eight_connections() {
    let secrets: Vec<NewSecret> =
        (0..200).map(|it| NewSecret::generic(&format!("s{it}"), &format!("v{it}"))).collect();
    let emulator = Emulator::start(Options { secrets, ..Options::default() }).unwrap();
    emulator.set_latency(ms(20));
    let agent = Agent::start(&emulator);
    let replies = together(200, |it| (it, agent.secret(&format!("s{it}"))));
    for (number, reply) in &replies {
        assert_eq!((reply.verdict(), reply.data()), ("200 MISS".into(), format!("v{number}")));
    }
    let counters = emulator.counters();
    assert_eq!(counters.kms_requests, 200);
    assert!(counters.kms_open_max <= 8, "{} connections at once", counters.kms_open_max);
    assert!(counters.kms_accepted <= 8, "{} connections in all", counters.kms_accepted);
    let slowest = replies.iter().map(|(_, it)| it.elapsed).max().unwrap();
    println!(
        "must show: 200 distinct misses: all answered, slowest {slowest:?}, {} connections",
        counters.kms_open_max
    );
}

fn a_slow_secret_delays_no_other() {
    let names: Vec<String> = (0..40).map(|it| format!("quick{it}")).collect();
    let mut secrets: Vec<(&str, &str)> = names.iter().map(|it| (it.as_str(), "v")).collect();
    secrets.push(("slow", "v"));
    let emulator = emulator(&secrets);
    let agent = Agent::start(&emulator);
    emulator.delay_secret("slow", ms(4000));
    thread::scope(|scope| {
        let slow = scope.spawn(|| agent.secret("slow"));
        wait_until("the slow one is asked for", || emulator.counters().gets("slow") == 1);
        let began = Instant::now();
        for name in &names {
            let reply = agent.secret(name);
            assert_eq!(reply.verdict(), "200 MISS");
            assert!(reply.elapsed < AT_ONCE, "{name} took {:?}", reply.elapsed);
        }
        assert!(began.elapsed() < ms(3500), "all of them while the slow one is being fetched");
        let slow = slow.join().unwrap();
        assert_eq!(slow.verdict(), "200 MISS");
        assert!(slow.elapsed >= ms(4000));
    });
}

fn a_servers_wish_to_be_left_alone_is_honoured() {
    let cases = [
        ("Retry-After", "3", ms(3000)),
        ("x-acs-retry-after", "2500", ms(2500)),
        ("x-acs-retry-after", "1500", ms(1500)),
    ];
    let pauses = together(cases.len(), |number| {
        let (header, value, least) = cases[number];
        let emulator = emulator(&[("db", "old")]);
        let agent = setup(&emulator, 1).start();
        let fetched = first_read(&agent, "db", "old");
        let refusal = fault(429, "Rejected.Throttling").times(1).with_header(header, value);
        emulator.inject(refusal);
        let_pass(fetched.1, 1.05);
        while emulator.counters().gets("db") < 3 {
            let reply = agent.secret("db");
            assert!(reply.status == 200 && reply.elapsed < AT_ONCE, "{}", reply.verdict());
            thread::sleep(ms(10));
        }
        let arrivals = kms_arrivals(&emulator, "db");
        let pause = arrivals[2].duration_since(arrivals[1]);
        assert!(pause >= least, "{header}: {value}: asked again after {pause:?}");
        assert!(pause < least + ms(2000), "{header}: {value}: asked again only after {pause:?}");
        pause
    });
    println!("Retry-After 3 s, x-acs-retry-after 2.5 s and 1.5 s: asked again after {pauses:?}");
}

fn a_reader_without_a_cached_value_waits_out_a_short_wish_and_not_a_long_one() {
    let emulator = emulator(&[("a", "v"), ("b", "v")]);
    let agent = Agent::start(&emulator);
    emulator
        .inject(fault(429, "Rejected.Throttling").for_secret("a").times(1).with_header("Retry-After", "2"));
    let reply = agent.secret("a");
    assert_eq!(reply.verdict(), "200 MISS");
    assert!(reply.elapsed >= ms(2000), "{:?}", reply.elapsed);

    emulator.inject(fault(400, "Throttling.User").for_secret("b").with_header("Retry-After", "60"));
    for _ in 0..5 {
        let reply = agent.secret("b");
        assert_eq!(reply.verdict(), "400 Throttling.User");
        assert!(reply.elapsed < AT_ONCE, "{:?}", reply.elapsed);
    }
    // Each reader is a new flight: nobody is left to keep the server's wish for.
    println!("Retry-After: 60 without a cached value: {} calls for 5 readers", emulator.counters().gets("b"));
}

fn without_a_cached_value_there_are_three_tries_in_eight_seconds() {
    // What happens, what the reader is told, tries, seconds.
    let cases: [(Down, &str, &str, usize, std::ops::Range<f64>); 6] = [
        (Down::Refuses, "502 UpstreamUnreachable", "connect 127.0.0.1:", 3, 0.0..4.0),
        (Down::Closes, "502 UpstreamUnreachable", "TLS handshake with 127.0.0.1:", 3, 0.0..4.0),
        (Down::StallsHandshake, "504 UpstreamTimeout", "TLS handshake with 127.0.0.1:", 3, 5.5..11.0),
        (Down::StallsReply, "504 UpstreamTimeout", "reply of 127.0.0.1:", 2, 7.0..11.0),
        (Down::Says503, "503 ServiceUnavailableTemporary", "", 3, 0.0..4.0),
        (Down::BreaksRecords, "502 UpstreamUnreachable", "127.0.0.1:", 3, 0.0..4.0),
    ];
    let lines = together(cases.len(), |number| {
        let (way, verdict, message, tries, seconds) = cases[number].clone();
        let emulator = emulator(&[("db", "v")]);
        let agent = Agent::start(&emulator);
        way.begin(&emulator);
        let reply = agent.secret("db");
        assert_eq!(reply.verdict(), verdict, "{way:?}: {}", reply.text());
        let told = reply.field("Message");
        assert!(told.contains(message), "{way:?}: {told}");
        assert!(
            verdict.starts_with("503") || told.contains(&emulator.kms_port().to_string()),
            "{way:?}: where? {told}"
        );
        assert!(seconds.contains(&reply.elapsed.as_secs_f64()), "{way:?}: {:?}", reply.elapsed);
        let tried = failed_tries(&agent, "db");
        assert!(tried <= 3 && tried >= tries.min(2), "{way:?}: {tried} tries");
        assert!(!matches!(way, Down::Refuses | Down::Says503) || tried == tries, "{way:?}: {tried} tries");
        way.end(&emulator);
        assert_eq!(agent.secret("db").verdict(), "200 MISS", "{way:?}");
        format!("{way:?}: {verdict} after {tried} tries and {:?}: {told}", reply.elapsed)
    });
    for line in lines {
        println!("{line}");
    }
}

fn refresh_now_is_coalesced_and_limited_to_one_fetch_a_second() {
    let emulator = emulator(&[("db", "v1")]);
    let agent = Agent::start(&emulator);
    first_read(&agent, "db", "v1");
    let delay = emulator.inject(Fault::delay(ms(400)));
    emulator.put_secret("db", "v2");
    let asked = Instant::now();
    let replies = together(20, |_| agent.get(&refresh_target("db")));
    assert!(replies.iter().all(|it| it.verdict() == "200 REFRESH" && it.data() == "v2"));
    assert_eq!(emulator.counters().gets("db"), 2, "20 wishes, one call");
    emulator.clear_fault(delay);

    // Within the second, the result there is.
    emulator.put_secret("db", "v3");
    let reply = agent.get(&refresh_target("db"));
    if asked.elapsed() < ms(1000) {
        assert_eq!((reply.verdict().as_str(), reply.data().as_str()), ("200 HIT", "v2"));
    }

    let began = Instant::now();
    let mut wishes = 0;
    while began.elapsed() < ms(3300) {
        assert_eq!(agent.get(&refresh_target("db")).status, 200);
        wishes += 1;
        thread::sleep(ms(5));
    }
    let calls = emulator.counters().gets("db") - 2;
    assert!((2..=4).contains(&calls), "{calls} calls for {wishes} wishes in 3.3 s");
    // A second apart when they leave the agent; on a busy host one may be longer on its way than the next.
    let arrivals = kms_arrivals(&emulator, "db");
    for pair in arrivals[2..].windows(2) {
        assert!(pair[1].duration_since(pair[0]) > ms(500), "two fetches within a second");
    }
    assert_eq!(agent.secret("db").data(), "v3");
    println!("refreshNow: 20 at once: 1 call; {wishes} in 3.3 s: {calls} calls");
}

fn a_failed_refresh_now_gives_the_error_and_keeps_the_value() {
    let emulator = emulator(&[("db", "v1")]);
    let agent = setup(&emulator, 60).start();
    let fetched = first_read(&agent, "db", "v1");
    emulator.fail_secret("db", 503, "ServiceUnavailableTemporary");
    let reply = agent.get(&refresh_target("db"));
    assert_eq!(reply.verdict(), "503 ServiceUnavailableTemporary");
    let asked = Instant::now();
    let reply = agent.secret("db");
    assert_eq!((reply.verdict().as_str(), reply.data().as_str()), ("200 HIT", "v1"));
    assert_age(&reply, fetched, asked);
}

fn refresh_now_is_not_content_with_a_call_that_began_before_it() {
    let emulator = emulator(&[("db", "new")]);
    let agent = Agent::start(&emulator);
    // The call that is under way brings what was true when it began.
    let old =
        r#"{"SecretName":"db","VersionId":"1","SecretData":"old","SecretDataType":"text","RequestId":"r"}"#;
    emulator.inject(Fault::delay(ms(900)).times(1));
    emulator.inject(Fault::reply(200, old).times(1));
    thread::scope(|scope| {
        let ordinary = scope.spawn(|| agent.secret("db"));
        wait_until("the ordinary call is under way", || emulator.counters().gets("db") == 1);
        let wish = agent.get(&refresh_target("db"));
        assert_eq!((wish.verdict().as_str(), wish.data().as_str()), ("200 REFRESH", "new"));
        let ordinary = ordinary.join().unwrap();
        assert_eq!((ordinary.verdict().as_str(), ordinary.data().as_str()), ("200 MISS", "old"));
    });
    assert_eq!(emulator.counters().gets("db"), 2);
    assert_eq!(agent.secret("db").data(), "new");
}

/// 30 secrets, fetched and expired.
fn thirty(ttl_s: u64) -> (Emulator, Agent, Vec<String>) {
    let names: Vec<String> = (0..30).map(|it| format!("s{it}")).collect();
    let secrets: Vec<(&str, &str)> = names.iter().map(|it| (it.as_str(), "old")).collect();
    let emulator = emulator(&secrets);
    let agent = setup(&emulator, ttl_s).start();
    together(names.len(), |it| first_read(&agent, &names[it], "old"));
    let_pass(Instant::now(), ttl_s as f64 + 0.05);
    (emulator, agent, names)
}

fn an_open_circuit_makes_few_tries() {
    let (emulator, agent, names) = thirty(1);
    emulator.set_kms_mode(KmsMode::Close).unwrap();
    emulator.reset_counters();
    let began = Instant::now();
    let reads = together(6, |first| {
        let (mut reads, mut slowest) = (0, Duration::ZERO);
        while began.elapsed() < ms(4000) {
            for name in names.iter().skip(first * 5).take(5) {
                let reply = agent.secret(name);
                assert_eq!(reply.verdict(), "200 STALE");
                slowest = slowest.max(reply.elapsed);
                reads += 1;
            }
            thread::sleep(ms(10));
        }
        (reads, slowest)
    });
    let (reads, slowest) = (reads.iter().map(|it| it.0).sum::<u32>(), reads.iter().map(|it| it.1).max());
    assert!(slowest < Some(AT_ONCE), "{slowest:?}");
    let tries = emulator.counters().kms_accepted;
    // Up to 8 began before three had failed; from then on one at a time, with a growing pause.
    assert!((3..=20).contains(&tries), "{tries} tries");
    agent.wait_for_log("KMS is down");

    for name in &names {
        emulator.put_secret(name, "new");
    }
    emulator.set_kms_mode(KmsMode::Normal).unwrap();
    let recovered = Instant::now();
    wait_at_most(RECOVERY, "KMS replies again", || agent.log().contains("KMS replies again"));
    wait_at_most(RECOVERY, "every secret is new again", || {
        names.iter().all(|it| agent.secret(it).data() == "new")
    });
    println!(
        "circuit: {reads} readers of 30 secrets in 4 s: slowest {slowest:?}, {tries} connection attempts; \
         all new {:?} after recovery",
        recovered.elapsed()
    );
}

fn an_open_circuit_makes_one_try_at_a_time() {
    let (emulator, agent, names) = thirty(1);
    emulator.set_kms_mode(KmsMode::StallHandshake).unwrap();
    together(names.len(), |it| {
        let reply = agent.secret(&names[it]);
        assert_eq!(reply.verdict(), "200 STALE");
        assert!((ms(900)..ms(1000) + AT_ONCE).contains(&reply.elapsed), "{:?}", reply.elapsed);
    });
    agent.wait_for_log("KMS is down");
    wait_until("the tries that began before are over", || emulator.counters().kms_open <= 1);
    let (began, mut most) = (Instant::now(), 0);
    let before = emulator.counters().kms_accepted;
    while began.elapsed() < ms(4000) {
        for name in &names {
            let reply = agent.secret(name);
            assert_eq!(reply.verdict(), "200 STALE");
            assert!(reply.elapsed < AT_ONCE, "{:?}", reply.elapsed);
        }
        most = most.max(emulator.counters().kms_open);
        thread::sleep(ms(10));
    }
    assert!(most <= 1, "{most} tries at a time");
    let probes = emulator.counters().kms_accepted - before;
    assert!((1..=4).contains(&probes), "{probes} probes of 3 s in 4 s");
    println!("circuit: at most {most} connection at a time, {probes} probes in 4 s");
}

fn refused_credentials_are_renewed_once_and_the_call_is_retried() {
    type Act = fn(&Emulator);
    let acts: [(&str, Act); 3] = [
        ("InvalidAccessKeyId.NotFound", Emulator::revoke_credentials),
        ("InvalidSecurityToken.Expired", Emulator::expire_credentials),
        ("InvalidAccessKeyId.NotFound", |emulator| {
            emulator.set_expired_token_reply(kms_emulator::ExpiredTokenReply::NotFound);
            emulator.expire_credentials();
        }),
    ];
    for (code, act) in acts {
        let names: Vec<String> = (0..10).map(|it| format!("s{it}")).collect();
        let secrets: Vec<(&str, &str)> = names.iter().map(|it| (it.as_str(), "v")).collect();
        let emulator = emulator(&secrets);
        let agent = Agent::start(&emulator);
        first_read(&agent, "s0", "v");
        assert_eq!(emulator.counters().credential_reads_total(), 1);
        act(&emulator);
        let reply = agent.secret("s1");
        assert_eq!(reply.verdict(), "200 MISS", "{}", reply.text());
        assert!(agent.log().contains(code), "{code}");
        assert_eq!(emulator.counters().credential_reads_total(), 2);
        assert_eq!(emulator.counters().gets("s1"), 2);
        // Eight at once find out together; one renewal serves them all.
        act(&emulator);
        let replies = together(8, |it| agent.secret(&names[it + 2]));
        assert!(replies.iter().all(|it| it.verdict() == "200 MISS"), "{replies:?}");
        assert_eq!(emulator.counters().credential_reads_total(), 3);
    }
}

fn credentials_revoked_for_good_are_an_error_or_a_stale_value() {
    let emulator = emulator(&[("db", "old"), ("other", "v")]);
    let agent = setup(&emulator, 1).start();
    let fetched = first_read(&agent, "db", "old");
    emulator.inject(fault(404, "InvalidAccessKeyId.NotFound"));
    let reply = agent.secret("other");
    assert_eq!(reply.verdict(), "404 InvalidAccessKeyId.NotFound");
    assert_eq!(emulator.counters().gets("other"), 2, "renewed once, asked once more");
    assert_eq!(emulator.counters().credential_reads_total(), 2);
    let_pass(fetched.1, 1.05);
    assert_eq!(agent.secret("db").verdict(), "200 STALE", "it says nothing about the secret");
    emulator.clear_faults();
    // That was remembered for a second, where nothing is cached.
    let reply =
        wait_for("it is forgotten", || Some(agent.secret("other")).filter(|reply| reply.status != 404));
    assert_eq!(reply.verdict(), "200 MISS");
}

fn metadata_down_past_the_credentials_end_says_so_and_heals() {
    let secrets = ["db", "fresh"].into_iter().map(|name| NewSecret::generic(name, "v")).collect::<Vec<_>>();
    let options = Options { secrets, credentials_lifetime_s: 8, ..Options::default() };
    let emulator = Emulator::start(options).unwrap();
    let agent = setup(&emulator, 1).start();
    let fetched = first_read(&agent, "db", "v");
    emulator.set_metadata_fault(Some(MetadataFault::Refuse)).unwrap();
    assert_eq!(agent.secret("fresh").verdict(), "200 MISS", "the credentials still hold");
    let mut names = (0..).map(|number| format!("new{number}"));
    let ended = wait_for("the credentials have ended", || {
        let name = names.next()?;
        emulator.put_secret(&name, "v");
        thread::sleep(ms(20));
        Some(agent.secret(&name)).filter(|it| it.status != 200)
    });
    // Renewal was due, and failed, after 6.4 s; both sides count in whole seconds.
    let kept = fetched.0.elapsed();
    assert!(kept > ms(6800), "kept to their end: {kept:?}");
    assert_eq!(ended.verdict(), "503 CredentialUnavailable");
    let retry_after: u64 = ended.header("Retry-After").expect("Retry-After").parse().unwrap();
    assert!((1..=10).contains(&retry_after), "{retry_after}");
    let told = ended.field("Message");
    let port = emulator.metadata_addr().port().to_string();
    assert!(told.contains("metadata") && told.contains(&port), "{told}");
    let reply = agent.secret("db");
    assert_eq!(reply.verdict(), "200 STALE");
    assert!(reply.elapsed < ms(1000) + AT_ONCE, "{:?}", reply.elapsed);

    emulator.set_credentials_lifetime(3600);
    let reads = emulator.counters().credential_reads_total();
    emulator.set_metadata_fault(None).unwrap();
    let healed = Instant::now();
    wait_at_most(RECOVERY, "the credentials come by themselves", || {
        emulator.counters().credential_reads_total() > reads
    });
    let healed = healed.elapsed();
    emulator.put_secret("healed", "v");
    assert_eq!(agent.secret("healed").verdict(), "200 MISS");
    println!(
        "must show: metadata down past expiry (kept for {kept:?} of 8 s): 503 \"{told}\"; healed by itself \
         after {healed:?}"
    );
}

fn an_agent_that_starts_without_metadata_serves_once_it_is_there() {
    for fault in [MetadataFault::Refuse, MetadataFault::Status500, MetadataFault::Garbage] {
        let options = Options {
            secrets: vec![NewSecret::generic("db", "v")],
            metadata_fault: Some(fault),
            ..Options::default()
        };
        let emulator = Emulator::start(options).unwrap();
        let agent = Agent::start(&emulator);
        assert_eq!(agent.secret("db").verdict(), "503 CredentialUnavailable", "{fault:?}");
        emulator.set_metadata_fault(None).unwrap();
        wait_until("it serves", || agent.secret("db").status == 200);
    }
}

fn a_skewed_clock_is_corrected_from_the_servers_date() {
    for offset_s in [1200, -1200] {
        let secrets = ["a", "b"].into_iter().map(|name| NewSecret::generic(name, "v")).collect();
        let options = Options { secrets, clock_offset_s: offset_s, ..Options::default() };
        let emulator = Emulator::start(options).unwrap();
        let agent = Agent::start(&emulator);
        assert_eq!(agent.secret("a").verdict(), "200 MISS", "{offset_s}");
        assert_eq!(emulator.counters().gets("a"), 2);
        assert_eq!(agent.secret("b").verdict(), "200 MISS", "{offset_s}");
        assert_eq!(emulator.counters().gets("b"), 1, "the correction is remembered");
        assert_eq!(emulator.counters().signature_failures, 1);
        // The clocks agree again: corrected back.
        emulator.set_clock_offset(0);
        wait_until("a second of refreshNow's pause is over", || {
            agent.get(&refresh_target("a")).verdict() == "200 REFRESH"
        });
        assert_eq!(emulator.counters().signature_failures, 2);
    }
}

fn a_timestamp_that_is_never_right_is_an_error() {
    for code in ["IllegalTimestamp", "InvalidTimeStamp.Expired"] {
        let emulator = emulator(&[("db", "v")]);
        let agent = Agent::start(&emulator);
        emulator.inject(fault(400, code));
        let reply = agent.secret("db");
        assert_eq!(reply.verdict(), format!("400 {code}"));
        assert!(reply.elapsed < AT_ONCE * 2, "{:?}", reply.elapsed);
        assert_eq!(emulator.counters().gets("db"), 2, "corrected once");
    }
}

fn signature_refusals_and_senseless_replies_say_nothing_about_the_secret() {
    let emulator = emulator(&[("db", "old")]);
    let agent = setup(&emulator, 1).start();
    let fetched = first_read(&agent, "db", "old");
    let_pass(fetched.1, 1.05);
    emulator.inject(fault(400, "SignatureDoesNotMatch"));
    assert_eq!(agent.secret("db").verdict(), "200 STALE");
    emulator.clear_faults();
    for body in ["", "not json", r#"{"SecretName":"another","SecretData":"x"}"#, r#"{"SecretName":"db"}"#] {
        emulator.raw_reply("db", 200, body);
        assert_eq!(agent.secret("db").verdict(), "200 STALE", "{body}");
        let wish = wait_for("a fetch of its own", || {
            Some(agent.get(&refresh_target("db"))).filter(|it| it.verdict() != "400 SignatureDoesNotMatch")
        });
        assert_eq!(wish.verdict(), "502 UpstreamInvalidResponse", "{body}");
        emulator.clear_faults();
    }
}

fn throttling_is_transient_whatever_its_status() {
    for (status, code) in [(400, "Throttling"), (400, "Throttling.User"), (429, "Rejected.Throttling")] {
        let emulator = emulator(&[("db", "old")]);
        let agent = setup(&emulator, 1).start();
        let fetched = first_read(&agent, "db", "old");
        let_pass(fetched.1, 1.05);
        emulator.inject(fault(status, code));
        assert_eq!(agent.secret("db").verdict(), "200 STALE", "{code}");
        wait_until("it is tried again", || emulator.counters().gets("db") >= 3);
        assert_eq!(agent.secret("db").verdict(), "200 STALE", "{code}");
    }
}

fn an_announced_rotation_ends_a_values_life() {
    let mut secret = NewSecret::ecs_password("ecs", "i-1", "root", "first-Passw0rd");
    secret.rotation_interval_s = Some(3);
    let created = Instant::now();
    let emulator = Emulator::start(Options { secrets: vec![secret], ..Options::default() }).unwrap();
    let agent = setup(&emulator, 60).start();
    let first = agent.secret("ecs");
    assert_eq!(first.verdict(), "200 MISS");
    assert!(!first.field("NextRotationDate").is_empty());
    let second = wait_for("the rotated value is there", || {
        Some(agent.secret("ecs")).filter(|it| it.data() != first.data())
    });
    assert_ne!(second.field("VersionId"), "");
    // Dates are in whole seconds.
    assert!(created.elapsed() >= ms(2000), "{:?}", created.elapsed());
    assert_eq!(second.data(), emulator.current_value("ecs").unwrap());
}

fn a_pooled_connection_that_the_peer_closed_is_no_failure() {
    let emulator = emulator(&[("a", "v"), ("b", "v"), ("c", "v")]);
    let agent = Agent::start(&emulator);
    first_read(&agent, "a", "v");
    // Closed while it is in use, before a byte of the reply: as if it had been closed a moment earlier.
    emulator.inject(Fault::new(FaultKind::DropBefore).times(1));
    let reply = agent.secret("b");
    assert_eq!(reply.verdict(), "200 MISS");
    assert!(reply.elapsed < AT_ONCE, "{:?}", reply.elapsed);
    assert_eq!(emulator.counters().gets("b"), 2, "dropped, and asked again");
    assert_eq!(failed_tries(&agent, "b"), 0, "{}", agent.log());
    // Closed while idle.
    emulator.close_kms_connections();
    let reply = agent.secret("c");
    assert_eq!(reply.verdict(), "200 MISS");
    assert_eq!(failed_tries(&agent, "c"), 0);
    // On a fresh connection it is a failure, and another try follows.
    emulator.close_kms_connections();
    wait_until("no connection is open", || emulator.counters().kms_open == 0);
    emulator.put_secret("d", "v");
    emulator.inject(Fault::new(FaultKind::DropBefore).times(1));
    assert_eq!(agent.secret("d").verdict(), "200 MISS");
    assert_eq!(failed_tries(&agent, "d"), 1, "{}", agent.log());
}

fn tls_sessions_are_resumed() {
    let emulator = emulator(&[("a", "v"), ("b", "v")]);
    let agent = Agent::start(&emulator);
    first_read(&agent, "a", "v");
    assert_eq!((emulator.counters().tls_handshakes, emulator.counters().tls_resumed), (1, 0));
    emulator.close_kms_connections();
    first_read(&agent, "b", "v");
    assert_eq!((emulator.counters().tls_handshakes, emulator.counters().tls_resumed), (2, 1));
}

fn a_connection_is_kept_for_the_next_call() {
    let emulator = emulator(&[("a", "v"), ("b", "v")]);
    let agent = Agent::start(&emulator);
    first_read(&agent, "a", "v");
    first_read(&agent, "b", "v");
    assert_eq!(emulator.counters().kms_accepted, 1);
}

fn a_certificate_that_must_not_be_trusted_is_an_error() {
    let wrong = [
        BadCertificate::OtherCa,
        BadCertificate::SelfSigned,
        BadCertificate::WrongName,
        BadCertificate::Expired,
    ];
    let told = together(wrong.len(), |number| {
        let emulator = emulator(&[("db", "v")]);
        let agent = Agent::start(&emulator);
        emulator.set_kms_mode(KmsMode::Certificate(wrong[number])).unwrap();
        let reply = agent.secret("db");
        assert_eq!(reply.verdict(), "502 UpstreamUnreachable", "{:?}", wrong[number]);
        assert_eq!(emulator.counters().kms_requests, 0, "nothing was sent");
        let told = reply.field("Message");
        assert!(told.contains("TLS handshake with 127.0.0.1:"), "{told}");
        emulator.set_kms_mode(KmsMode::Normal).unwrap();
        assert_eq!(agent.secret("db").verdict(), "200 MISS");
        format!("{:?}: {told}", wrong[number])
    });
    for line in told {
        println!("{line}");
    }
}

fn connections_to_kms_are_used_again() {
    let emulator = emulator(&[("a", "1"), ("b", "2"), ("c", "3")]);
    let agent = Agent::start(&emulator);
    for name in ["a", "b", "missing", "c"] {
        agent.secret(name);
    }
    let counters = emulator.counters();
    assert_eq!((counters.kms_accepted, counters.tls_handshakes, counters.kms_requests), (1, 1, 4));
}

fn a_pooled_connection_that_died_is_replaced_unnoticed() {
    for kind in [FaultKind::DropBefore, FaultKind::Reset] {
        let emulator = emulator(&[("a", "1"), ("b", "2")]);
        let agent = Agent::start(&emulator);
        agent.secret("a");
        emulator.inject(Fault::new(kind.clone()).times(1));
        assert_eq!(agent.secret("b").verdict(), "200 MISS", "{kind:?}");
        assert_eq!(emulator.counters().gets("b"), 2, "{kind:?}");
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
        assert!(agent.warnings().is_empty(), "{}", agent.log());
    }
}

fn connections_that_kms_closes_while_idle_are_replaced() {
    let emulator = emulator(&[("a", "1"), ("b", "2")]);
    let agent = Agent::start(&emulator);
    agent.secret("a");
    emulator.close_kms_connections();
    assert_eq!(agent.secret("b").verdict(), "200 MISS");
    let counters = emulator.counters();
    assert_eq!((counters.kms_accepted, counters.tls_resumed), (2, 1), "and the TLS session is resumed");
}

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

fn a_wrong_clock_is_corrected_by_that_of_kms() {
    let emulator = emulator(&[("a", "1"), ("b", "2")]);
    emulator.set_clock_offset(3 * 3600);
    let agent = Agent::start(&emulator);
    assert_eq!(agent.secret("a").verdict(), "200 MISS");
    assert_eq!(agent.secret("b").verdict(), "200 MISS");
    assert_eq!(emulator.counters().signature_failures, 1, "once is enough");
    assert!(agent.log().contains("clock"));
}

timed_tests!(
    fifty_readers_of_a_slow_miss_are_one_call,
    outage_serves_stale_values_and_ends_by_itself,
    stale_values_have_an_end,
    without_ignore_transient_errors_an_expired_value_is_an_error,
    a_deleted_secret_is_never_stale_and_its_refusal_is_remembered,
    lost_permission_drops_a_fresh_value_too,
    readers_of_a_hot_secret_never_wait,
    two_hundred_misses_at_once_use_eight_connections,
    a_slow_secret_delays_no_other,
    a_servers_wish_to_be_left_alone_is_honoured,
    a_reader_without_a_cached_value_waits_out_a_short_wish_and_not_a_long_one,
    without_a_cached_value_there_are_three_tries_in_eight_seconds,
    refresh_now_is_coalesced_and_limited_to_one_fetch_a_second,
    a_failed_refresh_now_gives_the_error_and_keeps_the_value,
    refresh_now_is_not_content_with_a_call_that_began_before_it,
    an_open_circuit_makes_few_tries,
    an_open_circuit_makes_one_try_at_a_time,
    refused_credentials_are_renewed_once_and_the_call_is_retried,
    credentials_revoked_for_good_are_an_error_or_a_stale_value,
    metadata_down_past_the_credentials_end_says_so_and_heals,
    an_agent_that_starts_without_metadata_serves_once_it_is_there,
    a_skewed_clock_is_corrected_from_the_servers_date,
    a_timestamp_that_is_never_right_is_an_error,
    signature_refusals_and_senseless_replies_say_nothing_about_the_secret,
    throttling_is_transient_whatever_its_status,
    an_announced_rotation_ends_a_values_life,
    a_pooled_connection_that_the_peer_closed_is_no_failure,
    tls_sessions_are_resumed,
    a_connection_is_kept_for_the_next_call,
    a_certificate_that_must_not_be_trusted_is_an_error,
    connections_to_kms_are_used_again,
    a_pooled_connection_that_died_is_replaced_unnoticed,
    connections_that_kms_closes_while_idle_are_replaced,
    replies_in_any_framing_are_taken,
    unusable_replies_are_502_and_not_cached,
    a_reply_of_almost_the_largest_size_passes,
    a_wrong_clock_is_corrected_by_that_of_kms,
);
