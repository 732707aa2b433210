//! Deterministic simulation of the whole agent: the shipped loop on a simulated network and clock, from a seed.

pub mod client;
pub mod faults;
pub mod logs;
pub mod model;
pub mod net;
pub mod rng;
pub mod upstream;
pub mod world;

use faults::{Fault, Hits, Plan};
use kms_agent::broker::Broker;
use kms_agent::config::{Config, HostPort, ResponseType};
use kms_agent::identity::Identity;
use kms_agent::net::{Event, Signal};
use kms_agent::random::Random;
use kms_agent::secret::Secret;
use kms_agent::server::{Host, Server};
use net::SimNet;
use rng::Rng;
use rustls::ClientConfig;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use world::{BEGIN_US, Ev, SECOND, Settings, World};

/// A run that takes more ticks than this is stuck in some way that no check has named.
const TICKS_MAX: u64 = 400_000;

/// What a run came to.
pub struct Outcome {
    pub ticks: u64,
    pub replies: u64,
    pub fetches: u64,
    pub virtual_us: u64,
    pub log_lines: u64,
    pub trace: u64,
    pub hits: Hits,
}

struct Process {
    world: Rc<RefCell<World>>,
    given: usize,
}

impl Host for Process {
    fn poll_token(&mut self) -> Option<Secret> {
        let world = self.world.borrow();
        let newest = world.model.tokens.len() - 1;
        (newest > self.given).then(|| {
            self.given = newest;
            Secret::from(world.model.tokens[newest].1.as_str())
        })
    }

    fn on_tick_end(&mut self) {}

    fn on_reload(&mut self) -> Option<Arc<ClientConfig>> {
        None
    }
}

fn settings(rng: &mut Rng) -> Settings {
    let roomy = rng.chance(700);
    Settings {
        connections_max: usize::try_from(rng.magnitude(1, 64)).unwrap(),
        cache_entries: if roomy { 1000 } else { rng.below(4) + 1 },
        cache_bytes: if roomy { 16 * 1024 * 1024 } else { 65_536 },
        ttl_us: rng.pick(&[0, 1, 3, 10, 30, 60, 300]) * SECOND,
        max_stale_us: rng.pick(&[0, 2, 30, 300, 86_400]) * SECOND,
        ignore_transient: rng.chance(800),
        response_type: match rng.below(10) {
            0 => ResponseType::Aws,
            1 => ResponseType::Vault,
            _ => ResponseType::Kms,
        },
        roomy,
        rotations_announced: rng.chance(300),
        region_asked: rng.chance(200),
        named_metadata: rng.chance(200),
    }
}

fn config(set: &Settings) -> Config {
    let mut config = Config::default();
    config.server.max_conn = set.connections_max;
    config.server.response_type = set.response_type;
    config.server.ignore_transient_errors = set.ignore_transient;
    config.cache.size = set.cache_entries;
    config.cache.bytes = set.cache_bytes;
    config.cache.ttl = Duration::from_micros(set.ttl_us);
    config.cache.max_stale = Duration::from_micros(set.max_stale_us);
    let endpoint = HostPort { host: "kms.sim".to_owned(), port: 443 };
    config.kms.endpoint = (!set.region_asked).then_some(endpoint);
    if set.named_metadata {
        config.kms.metadata_endpoint = HostPort { host: "metadata.sim".to_owned(), port: 80 };
    }
    config
}

fn world(seed: u64, printing: bool) -> World {
    let mut rng = Rng::new(seed);
    let set = settings(&mut rng);
    let plan = Plan::random(&mut rng);
    let mut world = World {
        rng,
        plan,
        hits: Hits::default(),
        set,
        now_us: BEGIN_US,
        wall_offset_s: 0,
        wall_moved: false,
        op: 0,
        stall_us: 0,
        heap: std::collections::BinaryHeap::new(),
        seq: 0,
        conns: Vec::new(),
        slots: Vec::new(),
        ready: Vec::new(),
        extra: Vec::new(),
        listeners: Default::default(),
        listening: true,
        no_descriptors_until_us: 0,
        resolver_busy_until_us: 0,
        clients: Vec::new(),
        kms: Default::default(),
        metadata: Default::default(),
        model: Default::default(),
        terminated: None,
        verified: false,
        calmed: false,
        idle_ticks: 0,
        calls: 0,
        ticks: 0,
        trace: seed,
        printing,
    };
    world.model.tokens.push((BEGIN_US, format!("{}token-0", logs::SECRET_MARK)));
    match world.set.response_type {
        ResponseType::Aws => world.hit(Fault::ResponseAws),
        ResponseType::Vault => world.hit(Fault::ResponseVault),
        ResponseType::Kms => {}
    }
    let span_us = if world.rng.chance(40) {
        world.rng.magnitude(600 * SECOND, 40_000 * SECOND)
    } else {
        world.rng.magnitude(2 * SECOND, 240 * SECOND)
    };
    world.make_secrets(span_us);
    world.add_clients(span_us);
    if !world.plan.calm {
        add_chaos(&mut world, span_us);
    }
    world.after(span_us, Ev::Calm);
    if world.rng.chance(300) {
        let at = world.rng.range(0, span_us);
        world.after(at, Ev::Signal(Signal::Terminate));
    }
    world
}

/// What happens once in a while: outages, signals, clocks.
fn add_chaos(world: &mut World, span_us: u64) {
    const OUTAGES: &[Fault] = &[
        Fault::ConnectRefused,
        Fault::ConnectHangs,
        Fault::NameUnknown,
        Fault::KmsHangs,
        Fault::KmsFails,
        Fault::KmsFailsInHtml,
        Fault::KmsThrottles,
        Fault::KmsRefusesSignature,
        Fault::KmsDropsBeforeReply,
        Fault::KmsDropsMidReply,
        Fault::KmsGarbage,
    ];
    const METADATA_OUTAGES: &[Fault] = &[
        Fault::ConnectRefused,
        Fault::ConnectHangs,
        Fault::MetadataHangs,
        Fault::MetadataFails,
        Fault::MetadataNoRole,
        Fault::MetadataExpired,
    ];
    for _ in 0..world.rng.range(0, 3) {
        let from = world.rng.range(0, span_us);
        let long = world.rng.magnitude(SECOND / 2, span_us.max(SECOND));
        let (kms, fault) = if world.rng.chance(700) {
            (true, world.rng.pick(OUTAGES))
        } else {
            (false, world.rng.pick(METADATA_OUTAGES))
        };
        let ev = |fault| if kms { Ev::Outage(fault) } else { Ev::MetadataOutage(fault) };
        world.after(from, ev(Some(fault)));
        world.after(from + long, ev(None));
    }
    for _ in 0..world.rng.range(0, 2) {
        let at = world.rng.range(0, span_us);
        world.after(at, Ev::NewToken);
        if world.rng.chance(300) {
            world.after(at, Ev::Signal(Signal::Reload));
        }
    }
    if world.rng.chance(250) {
        for _ in 0..world.rng.range(1, 3) {
            let at = world.rng.range(0, span_us);
            let far = i64::try_from(world.rng.magnitude(1, 200_000)).unwrap();
            let offset = if world.rng.chance(500) { far } else { -far };
            world.after(at, Ev::WallClock(offset));
        }
    }
}

/// Runs one seed to its end, or so many ticks of it. Panics where something is wrong.
pub fn run(seed: u64, ticks_max: Option<u64>, printing: bool) -> Outcome {
    logs::begin(printing);
    let world = Rc::new(RefCell::new(world(seed, printing)));
    if printing {
        println!("{:#?}", world.borrow().set);
    }
    let set = world.borrow().set.clone();
    let config = config(&set);
    let token = Secret::from(world.borrow().model.tokens[0].1.as_str());
    let identity = Identity::from_config(&config.kms, &|_| None, Random::from_seed(!seed)).expect("a role");
    let broker = Broker::new(&config, token, identity, Random::from_seed(seed));
    let host = Process { world: Rc::clone(&world), given: 0 };
    let net = SimNet(Rc::clone(&world));
    let mut server = Server::new(net, broker, set.connections_max, None, Box::new(host));
    let mut events: Vec<Event> = Vec::new();
    let mut goes_on = true;
    while goes_on && ticks_max.is_none_or(|max| world.borrow().ticks < max) {
        goes_on = server.tick(&mut events).expect("the simulated wait never fails");
        let mut world = world.borrow_mut();
        if goes_on {
            world.check();
            if server.connections() != world.open_clients() {
                world.fail(format!("the agent counts {} clients", server.connections()));
            }
        }
        if world.ticks > TICKS_MAX {
            world.fail("it does not end");
        }
        world.stall();
    }
    let mut world = world.borrow_mut();
    if !goes_on {
        if let Some((_, id)) = world.slots.iter().flatten().next() {
            world.fail(format!("the loop has ended and connection {id} is open"));
        }
        match world.terminated {
            None => world.fail("the loop has ended for no reason"),
            Some(at) if world.now_us > at.us + 5 * SECOND + (world.stall_us - at.stall_us) => {
                world.fail("SIGTERM was over 5 s ago");
            }
            Some(_) => {}
        }
        // What is on its way arrives.
        world.now_us += 2 * SECOND;
        world.happen();
        world.check_verifiers();
        if let Some(leak) = logs::leak() {
            world.fail(format!("something secret is logged: {leak}"));
        }
    }
    Outcome {
        ticks: world.ticks,
        replies: world.model.replies,
        fetches: world.model.serves.len() as u64,
        virtual_us: world.now_us - BEGIN_US,
        log_lines: logs::lines(),
        trace: world.trace,
        hits: world.hits.clone(),
    }
}
