//! Clients that trickle, hoard, never read, or are simply too many. After each of them the agent still answers,
//! and ends with 0. Figures are printed (`--nocapture`).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::{
    Agent, Connection, DEADLINE, Reply, Setup, can_open_files, emulator, http, secret_target, wait_for,
    wait_until,
};
use kms_emulator::Emulator;
use rustix::net::{AddressFamily, SocketType, sockopt};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

const PING: &str = "GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n";
/// Slots past `MaxConn`, for 429 and `/ping`.
const RESERVE: usize = 16;
/// What `docs/contract.md`, section 3, calls 100 ms, on a machine that runs many tests at a time, unoptimised.
const AT_ONCE: Duration = Duration::from_secs(1);
/// Far above what the agent needs: a leak, or a large buffer for each connection, goes past it.
const RSS_KIB_MAX: u64 = 12 * 1024;

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Tests with hundreds of clients: one at a time, and none where the host allows too few open files.
#[must_use]
fn turn() -> Option<MutexGuard<'static, ()>> {
    static TURN: Mutex<()> = Mutex::new(());
    // The clients', the agent's and the emulator's, and those of the tests beside it.
    can_open_files(2_000).then(|| TURN.lock().unwrap_or_else(PoisonError::into_inner))
}

fn capped(emulator: &Emulator, connections_max: usize) -> Agent {
    Setup::new(emulator).key("Server", "MaxConn", connections_max).start()
}

/// A number of the agent's `/proc/PID/status`.
fn status_of(agent: &Agent, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// The agent's resident memory, in KiB.
fn rss_kib(agent: &Agent) -> u64 {
    status_of(agent, "VmRSS:")
}

/// The agent's processor time, user's and system's.
fn cpu_time(agent: &Agent) -> Duration {
    let text = fs::read_to_string(format!("/proc/{}/stat", agent.pid())).unwrap();
    let (_, fields) = text.rsplit_once(") ").unwrap();
    let fields: Vec<u64> = fields.split(' ').skip(11).take(2).map(|it| it.parse().unwrap()).collect();
    // 100 a second on every Linux that this runs on.
    Duration::from_millis((fields[0] + fields[1]) * 10)
}

fn descriptors(agent: &Agent) -> usize {
    fs::read_dir(format!("/proc/{}/fd", agent.pid())).unwrap().count()
}

/// A new client's request, and how long it took from connecting to the last byte.
#[track_caller]
fn served(agent: &Agent, head: &str) -> (Reply, Duration) {
    let begun = Instant::now();
    let mut connection = agent.connect();
    connection.send(head);
    let reply = connection.reply().expect("a reply");
    (reply, begun.elapsed())
}

/// Nothing is left of whatever happened.
#[track_caller]
fn finish(mut agent: Agent) {
    let (reply, _) = served(&agent, PING);
    assert_eq!(reply.text(), "healthy");
    let reply = agent.secret("a");
    assert_eq!(reply.data(), "1");
    assert!(agent.stop().success());
    assert!(!agent.everything_written().contains("panicked"));
}

/// Many clients that have each sent these bytes.
fn crowd(agent: &Agent, count: usize, bytes: &str) -> Vec<Connection> {
    let open = |_| {
        let mut connection = agent.connect();
        connection.send(bytes);
        connection
    };
    (0..count).map(open).collect()
}

/// `slow` takes nearly as long as KMS may.
fn make_slow(emulator: &Emulator) {
    emulator.delay_secret("slow", seconds(4));
}

/// Clients that wait for a slow secret: they are busy when this returns.
fn busy(agent: &Agent, count: usize) -> Vec<Connection> {
    // In one piece: who has answered the ping knows the other request too.
    let mut all = crowd(agent, count, &(PING.to_owned() + &agent.head(&secret_target("slow"))));
    for connection in &mut all {
        assert_eq!(connection.reply().unwrap().text(), "healthy");
    }
    all
}

#[track_caller]
fn assert_busy_reply(reply: &Reply) {
    assert_eq!(reply.verdict(), "429 ConnectionLimitExceeded");
    assert_eq!((reply.header("Retry-After"), reply.closes()), (Some("1"), true));
}

fn idle_connections_make_room_longest_idle_first() {
    const MAX: usize = 8;
    let emulator = emulator(&[("a", "1")]);
    let agent = capped(&emulator, MAX);
    let mut idle = Vec::new();
    for _ in 0..MAX {
        let mut connection = agent.connect();
        connection.send(PING);
        connection.reply().unwrap();
        idle.push(connection);
    }
    // The first is used once more, and is the last to go then.
    let mut connection = idle.remove(0);
    connection.send(PING);
    connection.reply().unwrap();
    idle.push(connection);
    let mut newcomers = Vec::new();
    for gone in 0..MAX {
        let mut connection = agent.connect();
        connection.send(agent.head("/v1/a"));
        let reply = connection.reply().unwrap();
        assert_eq!((reply.status, reply.closes()), (200, false), "newcomer {gone}");
        newcomers.push(connection);
        assert!(idle[gone].is_at_end(), "{gone} goes");
        for (number, later) in idle.iter().enumerate().skip(gone + 1) {
            assert!(!later.has_something(), "{number} stays when {gone} goes");
        }
    }
    drop(newcomers);
    finish(agent);
}

fn heads_a_second_old_make_room_oldest_first() {
    const MAX: usize = 4;
    let emulator = emulator(&[("a", "1"), ("slow", "2")]);
    let agent = capped(&emulator, MAX);
    agent.secret("a");
    make_slow(&emulator);
    // The youngest will sit where an older client was.
    let mut older = agent.connect();
    // What was dropped here is closed later while another test starts a process, which has a copy of it.
    wait_until("it is alone", || {
        older.send(http::head("GET", "/metrics", &[]));
        older.reply().unwrap().text().contains("\nkms_agent_connections 1\n")
    });
    let before = descriptors(&agent);
    let begun = Instant::now();
    // Some say nothing at all.
    let mut heads = crowd(&agent, 1, "GET /v1/a HTTP/1.1\r\nHo");
    heads.extend(crowd(&agent, MAX - 2, ""));
    wait_until("they are in", || descriptors(&agent) == before + MAX - 1);
    drop(older);
    wait_until("it has left", || descriptors(&agent) == before + MAX - 2);
    heads.extend(crowd(&agent, 1, "G"));
    let (reply, _) = served(&agent, &agent.head("/v1/a"));
    if begun.elapsed() < seconds(1) {
        assert_busy_reply(&reply);
    }
    let mut newcomers = Vec::new();
    for gone in 0..MAX {
        newcomers.push(wait_for("a head makes room", || {
            let mut connection = agent.connect();
            connection.send(agent.head(&secret_target("slow")));
            // Who gets in waits, who does not is told so.
            wait_until("either way", || connection.has_something() || heads[gone].has_something());
            heads[gone].has_something().then_some(connection)
        }));
        assert!(begun.elapsed() >= Duration::from_millis(990), "{gone} goes after {:?}", begun.elapsed());
        assert!(heads[gone].is_at_end(), "{gone} goes");
        for (number, later) in heads.iter().enumerate().skip(gone + 1) {
            assert!(!later.has_something(), "{number} stays when {gone} goes");
        }
    }
    for connection in &mut newcomers {
        assert_eq!(connection.reply().unwrap().data(), "2");
    }
    drop((heads, newcomers));
    finish(agent);
}

fn only_when_all_are_really_busy_the_next_is_told_so() {
    const MAX: usize = 8;
    let emulator = emulator(&[("a", "1"), ("slow", "2")]);
    let agent = capped(&emulator, MAX);
    agent.secret("a");
    make_slow(&emulator);
    let mut waiting = busy(&agent, MAX);
    let secret = agent.head("/v1/a");
    assert_busy_reply(&served(&agent, &secret).0);
    let (ping, took) = served(&agent, PING);
    assert_eq!((ping.text().as_str(), ping.closes()), ("healthy", true));
    println!("/ping at the cap: {took:?}");

    // A client that is being shown the door, and heads past the cap that take too long, are no room for a
    // request: the MaxConn others are still busy.
    let mut leaving = agent.connect();
    leaving.send("POST /v1/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n");
    assert_busy_reply(&leaving.reply().unwrap());
    assert_busy_reply(&served(&agent, &secret).0);
    drop(leaving);
    let stale = crowd(&agent, 1, "GET /v1/a HTTP/1.1\r\n");
    let since = Instant::now();
    wait_until("the head is a second old", || since.elapsed() > Duration::from_millis(1100));
    assert_busy_reply(&served(&agent, &secret).0);
    drop(stale);

    // Who goes on sending can still read why it was refused.
    let mut pipelining = agent.connect();
    pipelining.send(&secret);
    wait_until("it is told so", || pipelining.has_something());
    // The first of these would be reset, the others could not even be sent.
    for _ in 0..3 {
        pipelining.send(&secret);
    }
    assert_busy_reply(&pipelining.reply().unwrap());
    assert_eq!(pipelining.rest().expect("no reset"), b"");

    // The reserve has an end. Past it nobody is accepted, until a slot is free.
    let mut reserve = crowd(&agent, RESERVE, "GET /v1/a HTTP/1.1\r\n");
    let since = Instant::now();
    let mut outside = agent.connect();
    outside.send(PING);
    thread::sleep(Duration::from_millis(200));
    let unanswered = !outside.has_something();
    assert!(unanswered || since.elapsed() > Duration::from_millis(900), "past the reserve");
    reserve.pop();
    assert_eq!(outside.reply().unwrap().text(), "healthy");
    drop(reserve);

    for connection in &mut waiting {
        let reply = connection.reply().unwrap();
        assert_eq!((reply.data().as_str(), reply.closes()), ("2", false));
    }
    // They are idle now.
    assert_eq!(served(&agent, &secret).0.verdict(), "200 HIT");
    drop(waiting);
    finish(agent);
}

fn the_cap_is_the_documented_800() {
    let Some(_turn) = turn() else { return };
    const MAX: usize = 800;
    let emulator = emulator(&[("a", "1"), ("slow", "2")]);
    let agent = capped(&emulator, MAX);
    agent.secret("a");
    let mut all = crowd(&agent, MAX, PING);
    for connection in &mut all {
        assert_eq!(connection.reply().unwrap().text(), "healthy");
    }
    let (reply, took) = served(&agent, &agent.head("/v1/a"));
    assert_eq!(reply.verdict(), "200 HIT");
    println!("beside {MAX} idle connections: {took:?}, RSS {} KiB", rss_kib(&agent));
    assert!(all[0].is_at_end());
    drop(all);
    make_slow(&emulator);
    let mut all = busy(&agent, MAX);
    assert_busy_reply(&served(&agent, &agent.head("/v1/a")).0);
    let (ping, took) = served(&agent, PING);
    assert_eq!(ping.status, 200);
    println!("/ping beside {MAX} busy connections: {took:?}, RSS {} KiB", rss_kib(&agent));
    for (number, connection) in all.iter_mut().enumerate() {
        let reply = connection.reply().unwrap_or_else(|error| panic!("{number}: {error}"));
        assert_eq!(reply.data(), "2", "{number}");
    }
    assert_eq!(emulator.counters().gets("slow"), 1, "one call for all of them");
    drop(all);
    finish(agent);
}

fn at_the_cap_the_next_is_told_so_and_pings_are_answered() {
    let emulator = emulator(&[("slow", "s"), ("a", "1")]);
    emulator.delay_secret("slow", Duration::from_secs(2));
    let agent = Setup::new(&emulator).key("Server", "MaxConn", 2).start();
    agent.secret("a");
    let mut busy = [agent.connect(), agent.connect()];
    for connection in &mut busy {
        connection.send(agent.head(&secret_target("slow")));
    }
    assert!(emulator.wait_for(DEADLINE, |counters| counters.gets("slow") == 1));
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

/// 1,000 clients that are a second old, each of them sending `then` once a second: how long others wait.
fn new_clients_beside(first: &str, then: &str) {
    let Some(_turn) = turn() else { return };
    let emulator = emulator(&[("a", "1")]);
    let agent = capped(&emulator, 800);
    agent.secret("a");
    let mut crowd = crowd(&agent, 1000, first);
    let begun = Instant::now();
    let mut next_byte = begun;
    let (mut slowest, mut count, mut rss) = (Duration::ZERO, 0, 0);
    // The first ones break their deadline after 5 s.
    while begun.elapsed() < Duration::from_millis(2800) {
        if next_byte <= Instant::now() {
            next_byte += seconds(1);
            for connection in &mut crowd {
                // Some have been closed by now.
                let _ = connection.try_send(then);
            }
        }
        if begun.elapsed() > Duration::from_millis(1100) {
            for head in [PING, &agent.head("/v1/a")] {
                let (reply, took) = served(&agent, head);
                assert_eq!(reply.status, 200, "{}", reply.text());
                slowest = slowest.max(took);
                count += 1;
            }
        }
        rss = rss.max(rss_kib(&agent));
        thread::sleep(Duration::from_millis(20));
    }
    println!(
        "1,000 clients that send {first:?} and then {then:?}: {count} others waited {slowest:?} at most, RSS {rss} KiB"
    );
    assert!(slowest < AT_ONCE);
    assert!(rss < RSS_KIB_MAX);
    drop(crowd);
    finish(agent);
}

fn trickling_clients_keep_nobody_waiting() {
    new_clients_beside("G", "E");
}

fn half_open_heads_keep_nobody_waiting() {
    new_clients_beside("GET /v1/a HTTP/1.1\r\nHost: localhost\r\nX-KMS-Token: ", "");
}

fn silent_clients_keep_nobody_waiting() {
    new_clients_beside("", "");
}

fn unfinished_heads_together_hold_little_memory() {
    let Some(_turn) = turn() else { return };
    let emulator = emulator(&[("a", "1")]);
    let agent = capped(&emulator, 800);
    agent.secret("a");
    let before = rss_kib(&agent);
    let head = format!("GET /v1/a HTTP/1.1\r\nA: {}", "a".repeat(15 * 1024));
    // In waves, each all in before the next begins: those that come at the same moment are of one age. No more
    // than it takes, so that a slow host has read them all before their 5 s are over.
    const COUNT: usize = 460;
    let (mut all, mut took) = (Vec::new(), Duration::ZERO);
    for wave in [200, 200, 60] {
        all.extend(crowd(&agent, wave, &head));
        let (reply, waited) = served(&agent, PING);
        assert_eq!(reply.text(), "healthy");
        took = took.max(waited);
    }
    let rss = rss_kib(&agent);
    let gone = all.iter().filter(|it| it.has_something()).count();
    println!(
        "{COUNT} heads of 15 KiB: {gone} of them closed, RSS {before} -> {rss} KiB, another waited {took:?}"
    );
    assert!(rss < before + 5 * 1024);
    // 4 MiB are 273 such heads. The oldest go, the newest stay.
    assert!((COUNT - 280..COUNT - 60).contains(&gone), "{gone}");
    assert!(all[..COUNT - 280].iter().all(Connection::has_something));
    assert!(!all[COUNT - 60..].iter().any(Connection::has_something));
    drop(all);
    finish(agent);
}

fn who_never_reads_makes_room_after_a_second() {
    const MAX: usize = 4;
    let emulator = emulator(&[("a", "1")]);
    let agent = capped(&emulator, MAX);
    agent.secret("a");
    let mut hoarders: Vec<TcpStream> = (0..MAX).map(|_| connect_small(&agent)).collect();
    let stuffed = Instant::now();
    thread::scope(|scope| {
        for stream in &mut hoarders {
            scope.spawn(|| stuff(stream, PING.repeat(1000).as_bytes()));
        }
    });
    let secret = agent.head("/v1/a");
    let reply = wait_for("one of them makes room", || {
        let (reply, _) = served(&agent, &secret);
        (reply.status != 429).then_some(reply)
    });
    // Before the deadline of those that do not read.
    assert_eq!(reply.verdict(), "200 HIT");
    assert!(stuffed.elapsed() < seconds(9), "{:?}", stuffed.elapsed());
    drop(hoarders);
    finish(agent);
}

/// Without a token, too: a ping is enough.
fn many_that_ask_and_never_read_hold_little_memory() {
    let Some(_turn) = turn() else { return };
    const COUNT: usize = 400;
    let emulator = emulator(&[("a", "1")]);
    let agent = capped(&emulator, 800);
    agent.secret("a");
    let before = rss_kib(&agent);
    let mut hoarders: Vec<TcpStream> = (0..COUNT).map(|_| connect_small(&agent)).collect();
    let (mut rss, mut slowest) = (0, Duration::ZERO);
    for _ in 0..3 {
        for stream in &mut hoarders {
            stream.set_nonblocking(true).unwrap();
            // A full socket takes nothing; a part of a request at its end does no harm.
            let _ = stream.write(PING.repeat(1000).as_bytes());
        }
        // They have been read by then, as far as they ever will be.
        let (reply, took) = served(&agent, PING);
        assert_eq!(reply.text(), "healthy");
        slowest = slowest.max(took);
        rss = rss.max(rss_kib(&agent));
    }
    println!(
        "{COUNT} clients that never read: RSS {before} -> {rss} KiB, another waited {slowest:?} at most"
    );
    assert!(rss < before + 6 * 1024);
    drop(hoarders);
    finish(agent);
}

fn without_descriptors_it_neither_spins_nor_floods_its_log() {
    let emulator = emulator(&[("a", "1"), ("slow", "2")]);
    let agent = capped(&emulator, 800);
    agent.secret("a");
    let before = descriptors(&agent);
    let limit = before as u64 + 10;
    let pid = Pid::from_raw(agent.pid().cast_signed());
    let old = prlimit(pid, Resource::Nofile, Rlimit { current: Some(limit), maximum: Some(limit) }).unwrap();
    assert!(old.current.is_none_or(|old| old > limit));
    make_slow(&emulator);
    // More than there is room for, whatever else is open at the moment.
    let mut inside = crowd(&agent, 20, &agent.head(&secret_target("slow")));
    let mut outside = crowd(&agent, 40, PING);
    agent.wait_for_log("cannot accept a connection");
    let (cpu, lines) = (cpu_time(&agent), agent.log().lines().count());
    thread::sleep(seconds(2));
    let (cpu, lines) = (cpu_time(&agent).saturating_sub(cpu), agent.log().lines().count() - lines);
    println!("2 s without descriptors: {cpu:?} of processor time, {lines} lines of log");
    assert!(cpu < Duration::from_millis(300) && lines < 10, "{}", agent.log());
    assert!(outside.iter().all(|it| !it.has_something()), "all were busy");
    for connection in &mut inside {
        assert_eq!(connection.reply().unwrap().data(), "2");
    }
    // What is idle now makes room, though it never left by itself.
    for connection in &mut outside {
        assert_eq!(connection.reply().unwrap().text(), "healthy");
    }
    drop((inside, outside));
    wait_until("the descriptors are free again", || descriptors(&agent) <= before);
    finish(agent);
}

fn a_flood_of_refusals_does_not_fill_the_log() {
    let emulator = emulator(&[("a", "1")]);
    let agent = capped(&emulator, 800);
    agent.secret("a");
    let begun = Instant::now();
    let mut connection = agent.connect();
    for _ in 0..10 {
        connection.send(http::head("GET", "/v1/a", &[]).repeat(100));
        for _ in 0..100 {
            assert_eq!(connection.reply().unwrap().verdict(), "403 InvalidToken");
        }
    }
    for _ in 0..500 {
        assert!(agent.raw("\x16\x03\x01").starts_with(b"HTTP/1.1 400 "));
    }
    let lines = agent.log().lines().filter(|line| line.contains("refused")).count();
    let took = begun.elapsed();
    println!("1,500 refused requests in {took:?}: {lines} lines of log");
    // 20 at once, 5 a second.
    assert!(lines >= 1 && lines as u64 <= 21 + 5 * (took.as_secs() + 1), "{lines}");
    finish(agent);
}

/// Three that take their time, side by side.
fn deadlines() {
    thread::scope(|scope| {
        scope.spawn(whoever_breaks_a_deadline_is_closed);
        scope.spawn(who_asks_and_never_reads_is_not_read_either_and_closed_after_10_s);
        scope.spawn(who_reads_slowly_gets_everything);
    });
}

fn whoever_breaks_a_deadline_is_closed() {
    // 5 s and 10 s, counted here from before the agent can: each is over in time if it is not the next one.
    const HEAD: Range<Duration> = Duration::from_millis(4990)..seconds(9);
    const FIRST_BYTE: Range<Duration> = Duration::from_millis(9990)..seconds(19);
    let emulator = emulator(&[("a", "1")]);
    let agent = capped(&emulator, 800);
    thread::scope(|scope| {
        scope.spawn(|| {
            let begun = Instant::now();
            assert!(agent.connect().is_at_end());
            assert!(FIRST_BYTE.contains(&begun.elapsed()), "no byte: {:?}", begun.elapsed());
        });
        scope.spawn(|| {
            let (begun, mut connection) = (Instant::now(), agent.connect());
            connection.send("GET /ping HTTP/1.1\r\n");
            assert!(connection.is_at_end());
            assert!(HEAD.contains(&begun.elapsed()), "half a head: {:?}", begun.elapsed());
        });
        scope.spawn(|| {
            // The head's deadline is the same for a connection that has served before.
            let (begun, mut connection) = (Instant::now(), agent.connect());
            connection.send(PING.to_owned() + "GET /ping");
            assert_eq!(connection.reply().unwrap().status, 200);
            assert!(connection.is_at_end());
            assert!(HEAD.contains(&begun.elapsed()), "half a second head: {:?}", begun.elapsed());
        });
        scope.spawn(|| {
            // And no byte puts it off.
            let (begun, mut connection) = (Instant::now(), agent.connect());
            while connection.try_send("a").is_ok() && !connection.has_something() {
                assert!(begun.elapsed() < HEAD.end, "trickled on for {:?}", begun.elapsed());
                thread::sleep(Duration::from_millis(100));
            }
            assert!(HEAD.contains(&begun.elapsed()), "a trickle: {:?}", begun.elapsed());
        });
        scope.spawn(|| {
            // Between requests there is more time than that.
            let mut connection = agent.connect();
            for _ in 0..2 {
                connection.send(PING);
                assert_eq!(connection.reply().unwrap().status, 200);
                thread::sleep(seconds(6));
            }
            assert!(!connection.has_something(), "an idle connection has 75 s");
        });
    });
    finish(agent);
}

const BIG: usize = 30_000;

/// Writes until the agent takes no more; gives how much it took.
fn stuff(stream: &mut TcpStream, bytes: &[u8]) -> usize {
    stream.set_nonblocking(true).unwrap();
    let mut taken = 0;
    let mut since = Instant::now();
    while since.elapsed() < Duration::from_millis(500) {
        match stream.write(bytes) {
            Ok(count) => {
                taken += count;
                since = Instant::now();
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(Duration::from_millis(10)),
            Err(error) => panic!("{error}"),
        }
    }
    taken
}

fn who_asks_and_never_reads_is_not_read_either_and_closed_after_10_s() {
    let emulator = emulator(&[("a", "1"), ("big", &"b".repeat(BIG))]);
    let agent = capped(&emulator, 800);
    agent.secret("a");
    assert_eq!(agent.secret("big").data().len(), BIG);
    let requests = agent.head("/v1/big").repeat(1000);
    let before = rss_kib(&agent);
    let begun = Instant::now();
    let mut hoarders: Vec<TcpStream> =
        (0..8).map(|_| TcpStream::connect(("127.0.0.1", agent.port)).unwrap()).collect();
    let taken: usize = thread::scope(|scope| {
        let stuffing: Vec<_> =
            hoarders.iter_mut().map(|stream| scope.spawn(|| stuff(stream, requests.as_bytes()))).collect();
        stuffing.into_iter().map(|it| it.join().unwrap()).sum()
    });
    let rss = rss_kib(&agent);
    let (reply, took) = served(&agent, PING);
    assert_eq!(reply.text(), "healthy");
    println!(
        "8 clients that never read: {} KiB of requests taken, RSS {before} -> {rss} KiB, another waited {took:?}",
        taken / 1024
    );
    assert!(took < AT_ONCE);
    assert!(rss < RSS_KIB_MAX && rss < before + 4 * 1024);
    for (number, stream) in hoarders.iter_mut().enumerate() {
        // A full socket takes nothing, a closed one gives another error.
        let end = wait_for_end(stream);
        assert!((seconds(9)..seconds(15)).contains(&(end - begun)), "{number}: {:?}", end - begun);
    }
    assert!(rss_kib(&agent) < RSS_KIB_MAX);
    finish(agent);
}

/// When this stream's peer closed it.
fn wait_for_end(stream: &mut TcpStream) -> Instant {
    let end = Instant::now() + seconds(20);
    loop {
        match stream.write(b"G") {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return Instant::now(),
        }
        assert!(Instant::now() < end, "it is never closed");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A client with a small receive buffer, so that what is on its way is in the agent's hands.
fn connect_small(agent: &Agent) -> TcpStream {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    sockopt::set_socket_recv_buffer_size(&socket, 4096).unwrap();
    rustix::net::connect(&socket, &SocketAddr::from(([127, 0, 0, 1], agent.port))).unwrap();
    TcpStream::from(socket)
}

fn who_reads_slowly_gets_everything() {
    let emulator = emulator(&[("a", "1"), ("big", &"b".repeat(BIG))]);
    let agent = capped(&emulator, 800);
    let body = agent.secret("big").body;
    let last = http::head("GET", "/v1/big", &[("X-KMS-Token", &agent.token), ("Connection", "close")]);
    // Bytes a second. Both take longer than the deadline of one that does not read.
    thread::scope(|scope| {
        for (rate, count) in [(1_100_000, 420), (20_000, 20)] {
            let requests = agent.head("/v1/big").repeat(count - 1) + &last;
            let (agent, body) = (&agent, &body);
            scope.spawn(move || {
                let mut stream = connect_small(agent);
                stream.write_all(requests.as_bytes()).unwrap();
                let begun = Instant::now();
                let (mut got, mut chunk) = (Vec::new(), vec![0; 16 * 1024]);
                loop {
                    // The slower one has shown enough then.
                    let hurry = begun.elapsed() > seconds(12);
                    let due = if hurry { Duration::ZERO } else { seconds(got.len() as u64) / rate };
                    thread::sleep(due.saturating_sub(begun.elapsed()));
                    match stream.read(&mut chunk) {
                        Ok(0) => break,
                        Ok(count) => got.extend_from_slice(&chunk[..count]),
                        Err(error) => panic!("after {} bytes and {:?}: {error}", got.len(), begun.elapsed()),
                    }
                }
                assert!(begun.elapsed() > seconds(11), "{rate}: {:?}", begun.elapsed());
                let whole = got.windows(body.len()).filter(|it| it == body).count();
                assert_eq!(whole, count, "{rate}: {} bytes", got.len());
            });
        }
    });
    finish(agent);
}

fn clients_that_vanish_leave_nothing_behind() {
    let emulator = emulator(&[("a", "1"), ("slow", "2")]);
    let agent = capped(&emulator, 800);
    agent.secret("a");
    let before = descriptors(&agent);
    emulator.delay_secret("slow", Duration::from_millis(200));
    let slow = agent.head(&secret_target("slow"));
    for bytes in ["", "G", PING, &slow, "BAD\r\n\r\n", &PING.repeat(1000)] {
        for _ in 0..20 {
            // Dropped with replies unread: a reset.
            drop(crowd(&agent, 5, bytes));
        }
    }
    wait_until("all descriptors are free again", || descriptors(&agent) <= before);
    finish(agent);
}

timed_tests!(
    idle_connections_make_room_longest_idle_first,
    heads_a_second_old_make_room_oldest_first,
    only_when_all_are_really_busy_the_next_is_told_so,
    the_cap_is_the_documented_800,
    at_the_cap_the_next_is_told_so_and_pings_are_answered,
    connections_leave_no_descriptor_behind,
    trickling_clients_keep_nobody_waiting,
    half_open_heads_keep_nobody_waiting,
    silent_clients_keep_nobody_waiting,
    unfinished_heads_together_hold_little_memory,
    who_never_reads_makes_room_after_a_second,
    many_that_ask_and_never_read_hold_little_memory,
    without_descriptors_it_neither_spins_nor_floods_its_log,
    a_flood_of_refusals_does_not_fill_the_log,
    deadlines,
    clients_that_vanish_leave_nothing_behind,
);
