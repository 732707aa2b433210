#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
//! A fleet against KMS's limit: a discrete simulation of 10,000 agents, without sockets or clocks.
//!
//! Every host is a whole [`Broker`], the agent's own: gates, cache, flights, retries, circuit, identity.
//! Simulated are its applications, the network and a KMS that answers 450 calls a second for all of them
//! together and refuses the rest with 429 `Rejected.Throttling`.
//!
//! What it shows (TTLs of 300 and 900 s; a start of everything within a second, 35 quiet minutes, ten minutes
//! without KMS, the recovery):
//!
//! - **The TTL is what counts.** Hot secrets are refreshed at 70 to 80 % of it, so a fleet needs
//!   `hosts x secrets / (0.75 x TTLSeconds)` calls a second. At the default of 300 s that is 888 for this fleet,
//!   twice the limit: no reader fails, but more than a third of the reads are stale for good, and three of
//!   five calls are refused (19 of 20 without the broker's holding back after a throttled call). At 900 s it is
//!   296, and no read of the steady state is stale or waits. Choose `TTLSeconds` so that the result is at most two thirds of the account's limit,
//!   whatever else uses the account included: here 200,000 / (0.75 x 300) = 889 s or more, so 900.
//! - **Start-up is the limit's business.** 200,000 first reads take 200,000 / 450 = 444 s at the very least,
//!   whatever an agent does: until then readers get KMS's 429 after three tries. Start fleets in batches.
//! - **In an outage** the tries of the whole fleet fall to a few hundred a second (one probe a host, 30 s apart
//!   at most); every read of what was cached is answered at once, fresh or stale.
//! - **After it** all that has expired wants to be fetched, within the limit: the herd is served in
//!   minutes, and readers go on getting the stale value, not an error.
//! - **Jitter** ends the pattern of the start: without it the fleet asks in step, full waves at the limit and
//!   pauses between them, for ever; with it the waves spread with each TTL. While a wave still is as high as
//!   the limit, its fluctuations bring refusals that a perfect (and unreal) step does not have.
//!
//! `cargo bench --bench fleet`. Hosts meet only at KMS's limit, so by default every tenth of them is simulated,
//! under a tenth of the limit, and all counts are given times ten; `KMS_FLEET_SCALE=1` simulates all 10,000
//! (some ten minutes). The smaller fleet's figures fluctuate more: 15 % around a wave's mean instead of 5 %.

use kms_agent::broker::answer::XCache;
use kms_agent::broker::{Broker, ClientId, Disposition, Output, Visit};
use kms_agent::call::{Call, CallError, CallId, Service};
use kms_agent::config::{Config, HostPort};
use kms_agent::http::request::{Parsed, header_room, parse};
use kms_agent::http::response::Response;
use kms_agent::identity::Identity;
use kms_agent::metrics::Connections;
use kms_agent::random::Random;
use kms_agent::secret::Secret;
use kms_agent::time::{Mono, Now};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

const SECRETS: usize = 20;
const HOSTS: usize = 10_000;
/// One simulated host stands for so many.
const SCALE: usize = 10;
/// KMS's limit for an account and region.
const CALLS_PER_SECOND: usize = 450;
/// All hosts start within this.
const START_WITHIN_US: u64 = SECOND_US;
/// An application reads each of its secrets once in this time, on average; exponentially distributed.
const READ_EVERY_S: f64 = 60.0;
/// One that got an error asks again after about this, twice as long each time, up to a minute, as restarts do.
const ASK_AGAIN_US: u64 = 5 * SECOND_US;
const ASK_AGAIN_MAX_US: u64 = 60 * SECOND_US;
/// From a call to its reply; also to a refused connect.
const ROUND_TRIP_US: u64 = 20_000;
const SECOND_US: u64 = 1_000_000;
/// The simulation's origin.
const ORIGIN_US: u64 = 1000 * SECOND_US;
const ORIGIN_UNIX_S: i64 = 1_700_000_000;

/// Phases: name, and when they end, in seconds.
const PHASES: [(&str, usize); 5] =
    [("start-up", 600), ("first refresh", 1500), ("steady", 2700), ("KMS down", 3300), ("recovery", 4200)];
const DOWN: usize = 3;

#[derive(Clone, Copy)]
struct Scenario {
    ttl_s: u64,
    jitter: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    /// A host's application asks for a secret.
    Read { host: u32, secret: u8 },
    /// A host's call reaches KMS and is answered.
    Reply { host: u32, call: u64 },
    /// A host's broker wanted to be woken.
    Wake { host: u32 },
}

struct Host {
    broker: Broker,
    wake_us: u64,
    /// Calls that are out.
    calls: Vec<Call>,
    /// When each secret's reader began to wait.
    asked_us: [u64; SECRETS],
    /// Errors in a row, for each secret.
    errors: [u8; SECRETS],
}

/// One second of the fleet's life.
#[derive(Clone, Copy, Default)]
struct Second {
    calls: usize,
    served: usize,
    reads: usize,
    waited: usize,
    stale: usize,
    errors: usize,
}

struct Fleet {
    hosts: Vec<Host>,
    scale: usize,
    /// Calls a second that the simulated hosts may share.
    limit: usize,
    now_us: u64,
    events: BinaryHeap<Reverse<(u64, What)>>,
    random: Random,
    heads: Vec<String>,
    replies: Vec<String>,
    seconds: Vec<Second>,
    /// When a reader who waited had begun, and for how long.
    waits: Vec<(u32, u32)>,
    scratch: Vec<u8>,
    events_done: u64,
}

impl Fleet {
    fn new(scenario: Scenario, scale: usize) -> Fleet {
        let hosts = HOSTS / scale;
        let mut config = Config::default();
        config.cache.ttl = Duration::from_secs(scenario.ttl_s);
        config.kms.endpoint = Some(HostPort { host: "kms.fleet".into(), port: 443 });
        config.kms.role_name = Some("app".into());
        let mut random = Random::from_seed(20_240_607);
        let mut fleet = Fleet {
            hosts: Vec::with_capacity(hosts),
            scale,
            limit: CALLS_PER_SECOND / scale,
            now_us: ORIGIN_US,
            events: BinaryHeap::new(),
            heads: (0..SECRETS).map(head).collect(),
            replies: (0..SECRETS)
                .map(|it| format!(r#"{{"SecretName":"s{it:02}","SecretData":"x"}}"#))
                .collect(),
            seconds: vec![Second::default(); PHASES.last().unwrap().1 + 1],
            waits: Vec::new(),
            random: Random::from_seed(random.next_u64()),
            scratch: Vec::new(),
            events_done: 0,
        };
        for number in 0..hosts {
            let seed = Random::from_seed(random.next_u64());
            let identity = Identity::from_config(&config.kms, &|_| None, Random::from_seed(number as u64))
                .expect("the default is the instance's RAM role");
            let mut broker = Broker::new(&config, Secret::from(&b"tok"[..]), identity, seed);
            if !scenario.jitter {
                broker.set_refresh_jitter(0);
            }
            fleet.hosts.push(Host {
                broker,
                wake_us: u64::MAX,
                calls: Vec::new(),
                asked_us: [0; SECRETS],
                errors: [0; SECRETS],
            });
            let start_us = ORIGIN_US + random.up_to(START_WITHIN_US);
            let host = u32::try_from(number).unwrap();
            for secret in 0..u8::try_from(SECRETS).unwrap() {
                fleet.events.push(Reverse((start_us, What::Read { host, secret })));
            }
        }
        fleet
    }

    fn now(&self) -> Now {
        let unix_s = ORIGIN_UNIX_S + i64::try_from((self.now_us - ORIGIN_US) / SECOND_US).unwrap();
        Now { mono: Mono::from_micros(self.now_us), unix_s }
    }

    fn second(&mut self) -> &mut Second {
        let at = usize::try_from((self.now_us - ORIGIN_US) / SECOND_US).unwrap();
        &mut self.seconds[at]
    }

    fn is_down(&self) -> bool {
        let at = usize::try_from((self.now_us - ORIGIN_US) / SECOND_US).unwrap();
        (PHASES[DOWN - 1].1..PHASES[DOWN].1).contains(&at)
    }

    fn run(&mut self) {
        let end_us = ORIGIN_US + PHASES.last().unwrap().1 as u64 * SECOND_US;
        while let Some(Reverse((at, what))) = self.events.pop() {
            if at >= end_us {
                return;
            }
            self.now_us = at;
            self.events_done += 1;
            let host = match what {
                What::Read { host, secret } => {
                    self.read(host, secret);
                    host
                }
                What::Reply { host, call } => {
                    self.reply(host, CallId(call));
                    host
                }
                What::Wake { host } => {
                    let it = &mut self.hosts[host as usize];
                    if it.wake_us != at {
                        continue;
                    }
                    it.wake_us = u64::MAX;
                    host
                }
            };
            self.settle(host);
        }
    }

    fn read(&mut self, host: u32, secret: u8) {
        let now = self.now();
        self.second().reads += 1;
        let it = &mut self.hosts[host as usize];
        let mut room = header_room();
        let head = &self.heads[usize::from(secret)];
        let Parsed::Request(request, _) = parse(head.as_bytes(), &mut room) else { panic!("{head}") };
        self.scratch.clear();
        let client = ClientId(u64::from(host) * SECRETS as u64 + u64::from(secret));
        let visit = Visit { last: false, past_cap: false, open: 1, counted: &Connections::default() };
        match it.broker.ask(client, &request, visit, now, &mut self.scratch) {
            Disposition::Answered(done) => {
                self.answered(host, secret, done.status, done.x_cache);
            }
            Disposition::Waiting => {
                it.asked_us[usize::from(secret)] = self.now_us;
                self.second().waited += 1;
            }
        }
    }

    /// A reader got its reply, and will ask again.
    fn answered(&mut self, host: u32, secret: u8, status: u16, x_cache: Option<XCache>) {
        if status != 200 {
            self.second().errors += 1;
        } else if x_cache == Some(XCache::Stale) {
            self.second().stale += 1;
        }
        let errors = &mut self.hosts[host as usize].errors[usize::from(secret)];
        *errors = if status == 200 { 0 } else { errors.saturating_add(1) };
        let errors = u32::from(*errors);
        let pause_us = if status == 200 {
            let share =
                (self.random.up_to(u64::from(u32::MAX)) as f64 + 1.0) / (u64::from(u32::MAX) + 1) as f64;
            let pause = Duration::from_secs_f64(-share.ln() * READ_EVERY_S);
            u64::try_from(pause.as_micros()).unwrap()
        } else {
            let pause_us = (ASK_AGAIN_US << (errors - 1).min(8)).min(ASK_AGAIN_MAX_US);
            pause_us / 2 + self.random.up_to(pause_us)
        };
        self.events.push(Reverse((self.now_us + pause_us, What::Read { host, secret })));
    }

    fn reply(&mut self, host: u32, id: CallId) {
        let (now, down, limit) = (self.now(), self.is_down(), self.limit);
        let it = &mut self.hosts[host as usize];
        let position = it.calls.iter().position(|call| call.id == id).unwrap();
        let call = it.calls.swap_remove(position);
        let second = self.second();
        second.calls += 1;
        let outcome = if down {
            Err(CallError::unreachable("connect", &call.origin, "connection refused"))
        } else if second.served >= limit {
            let body =
                br#"{"HttpStatus":"429","Code":"Rejected.Throttling","Message":"QPS","RequestId":"r"}"#;
            Ok(response(429, body))
        } else {
            second.served += 1;
            let it = &mut self.hosts[host as usize];
            self.scratch.clear();
            it.broker.write_request(&call, now, &mut self.scratch).unwrap();
            Ok(response(200, self.replies[secret_of(&self.scratch)].as_bytes()))
        };
        self.hosts[host as usize].broker.on_called(call.id, outcome, now);
    }

    /// Does what a host's broker wants, and has it woken when it wants to be.
    fn settle(&mut self, host: u32) {
        let now = self.now();
        loop {
            let it = &mut self.hosts[host as usize];
            if now.mono >= it.broker.next_deadline() {
                it.broker.on_time(now.mono);
            }
            match it.broker.poll_output() {
                Some(Output::Call(call)) if call.service == Service::Metadata => {
                    self.scratch.clear();
                    it.broker.write_request(&call, now, &mut self.scratch).unwrap();
                    let body = if self.scratch.starts_with(b"PUT") { &b"token"[..] } else { CREDENTIALS };
                    it.broker.on_called(call.id, Ok(response(200, body)), now);
                }
                Some(Output::Call(call)) => {
                    let event = What::Reply { host, call: call.id.0 };
                    it.calls.push(call);
                    self.events.push(Reverse((self.now_us + ROUND_TRIP_US, event)));
                }
                Some(Output::Answer(answer)) => {
                    self.scratch.clear();
                    let done = it.broker.write_answer(&answer, false, now, &mut self.scratch);
                    let secret = u8::try_from(answer.client.0 % SECRETS as u64).unwrap();
                    let asked_us = it.asked_us[usize::from(secret)];
                    let asked_s = u32::try_from((asked_us - ORIGIN_US) / SECOND_US).unwrap();
                    self.waits.push((asked_s, u32::try_from((self.now_us - asked_us) / 1000).unwrap()));
                    self.answered(host, secret, done.status, done.x_cache);
                }
                None => break,
            }
        }
        let it = &mut self.hosts[host as usize];
        let due_us = it.broker.next_deadline().as_micros();
        assert!(due_us > self.now_us, "a broker that is never content");
        if due_us < it.wake_us {
            it.wake_us = due_us;
            self.events.push(Reverse((due_us, What::Wake { host })));
        }
    }
}

const CREDENTIALS: &[u8] = br#"{"Code":"Success","AccessKeyId":"STS.a","AccessKeySecret":"k","SecurityToken":"t","Expiration":"2100-01-01T00:00:00Z"}"#;

fn head(secret: usize) -> String {
    format!("GET /v1/s{secret:02} HTTP/1.1\r\nHost: localhost\r\nX-KMS-Token: tok\r\n\r\n")
}

fn response(status: u16, body: &[u8]) -> Response {
    Response { status, body: body.to_vec().into(), date_unix_s: None, retry_after_s: None, keep_alive: true }
}

/// Of a request to KMS.
fn secret_of(request: &[u8]) -> usize {
    let mark = b"SecretName=s";
    let at = request.windows(mark.len()).position(|it| it == mark).unwrap() + mark.len();
    std::str::from_utf8(&request[at..at + 2]).unwrap().parse().unwrap()
}

fn report(scenario: Scenario, scale: usize) -> String {
    let began = Instant::now();
    let mut fleet = Fleet::new(scenario, scale);
    fleet.run();
    let mut text = String::new();
    let jitter = if scenario.jitter { "with jitter" } else { "WITHOUT jitter" };
    let needed = HOSTS * SECRETS * 4 / 3 / usize::try_from(scenario.ttl_s).unwrap();
    writeln!(
        text,
        "TTL {} s, {jitter}: needs {needed} calls/s, the limit is {CALLS_PER_SECOND}",
        scenario.ttl_s
    )
    .unwrap();
    writeln!(
        text,
        "  phase            min | calls/s median    p99    max refused | reads/s  waited  p99 s  max s   stale  errors"
    )
    .unwrap();
    let mut from = 0;
    for (name, until) in PHASES {
        let seconds = &fleet.seconds[from..until];
        let mut calls: Vec<usize> = seconds.iter().map(|it| it.calls * scale).collect();
        calls.sort_unstable();
        let sum = |of: fn(&Second) -> usize| seconds.iter().map(of).sum::<usize>();
        let (all, served, reads) = (sum(|it| it.calls), sum(|it| it.served), sum(|it| it.reads));
        let mut waits: Vec<u32> = fleet
            .waits
            .iter()
            .filter(|(asked_s, _)| (from..until).contains(&(*asked_s as usize)))
            .map(|(_, ms)| *ms)
            .collect();
        waits.sort_unstable();
        let percent = |part: usize, whole: usize| part as f64 * 100.0 / whole.max(1) as f64;
        let seconds_of = |ms: Option<&u32>| f64::from(ms.copied().unwrap_or(0)) / 1000.0;
        writeln!(
            text,
            "  {name:<14} {:>5} | {:>14} {:>6} {:>6} {:>6.1}% | {:>7} {:>6.2}% {:>6.2} {:>6.2} {:>6.2}% {:>6.2}%",
            format!("{}-{}", from / 60, until / 60),
            calls[calls.len() / 2],
            calls[calls.len() * 99 / 100],
            calls[calls.len() - 1],
            percent(all - served, all),
            reads * scale / (until - from),
            percent(sum(|it| it.waited), reads),
            seconds_of(waits.get(waits.len() * 99 / 100)),
            seconds_of(waits.last()),
            percent(sum(|it| it.stale), reads),
            percent(sum(|it| it.errors), reads),
        )
        .unwrap();
        from = until;
    }
    plot(&mut text, &fleet.seconds[..from], fleet.scale);
    let took = began.elapsed();
    writeln!(text, "  ({} events in {:.1} s)", fleet.events_done, took.as_secs_f64()).unwrap();
    text
}

/// Calls a second over the minutes: `#` served, `.` refused, `^` beyond the plot.
fn plot(text: &mut String, seconds: &[Second], scale: usize) {
    const ROWS: usize = 10;
    const ROW: usize = CALLS_PER_SECOND / 3;
    const BAR_S: usize = 60;
    let bars: Vec<(usize, usize)> = seconds
        .chunks(BAR_S)
        .map(|bar| {
            let mean = |of: fn(&Second) -> usize| bar.iter().map(of).sum::<usize>() * scale / bar.len();
            (mean(|it| it.served), mean(|it| it.calls))
        })
        .collect();
    for row in (0..ROWS).rev() {
        // To the nearest row, but nothing is invisible.
        let reaches = |count: usize| count >= row * ROW + if row == 0 { 1 } else { ROW / 2 };
        let sign = |(served, calls): &(usize, usize)| match () {
            () if row == ROWS - 1 && *calls > ROWS * ROW => '^',
            () if reaches(*served) => '#',
            () if reaches(*calls) => '.',
            () => ' ',
        };
        let line: String = bars.iter().map(sign).collect();
        writeln!(text, "  {:>8} |{}", (row + 1) * ROW, line.trim_end()).unwrap();
    }
    let mut axis = vec!['-'; bars.len()];
    for (_, until) in PHASES {
        if let Some(mark) = axis.get_mut(until / BAR_S) {
            *mark = '+';
        }
    }
    writeln!(text, "   calls/s +{}", axis.into_iter().collect::<String>()).unwrap();
}

fn main() {
    // `cargo test` runs benches too, as a check that they work.
    let quick = !std::env::args().any(|it| it == "--bench");
    let scale = std::env::var("KMS_FLEET_SCALE").ok().and_then(|it| it.parse().ok());
    let scale = scale.unwrap_or(if quick { 450 } else { SCALE });
    let scenarios = [(300, false), (300, true), (900, false), (900, true)];
    println!(
        "{HOSTS} hosts x {SECRETS} hot secrets, all started within 1 s; KMS's limit is {CALLS_PER_SECOND}/s."
    );
    println!("A secret is read every {READ_EVERY_S} s. One host in {scale} is simulated.\n");
    println!("TTLSeconds  calls/s needed = hosts x secrets / (0.75 x TTL)");
    for ttl_s in [300, 600, 900, 1800, 3600] {
        println!("{ttl_s:>10}  {:>6}", HOSTS * SECRETS * 4 / 3 / ttl_s);
    }
    println!(
        "\nPlots: a column is a minute, # served, . refused (throttled, or KMS down), ^ beyond the plot.\n"
    );
    std::thread::scope(|scope| {
        for pair in scenarios.chunks(2) {
            let runs: Vec<_> = pair
                .iter()
                .map(|(ttl_s, jitter)| {
                    let scenario = Scenario { ttl_s: *ttl_s, jitter: *jitter };
                    scope.spawn(move || report(scenario, scale))
                })
                .collect();
            for run in runs {
                println!("{}", run.join().unwrap());
            }
        }
    });
}
