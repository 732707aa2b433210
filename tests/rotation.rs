#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
//! The life of a secret as a reader of the agent sees it: created, rotated, planned for deletion, restored,
//! deleted.

mod common;

use common::*;
use kms_emulator::{Emulator, NewSecret, Options};
use std::time::{Duration, Instant};

const TTL: Duration = Duration::from_secs(2);

fn begin(secret: NewSecret) -> (Emulator, Agent) {
    let emulator = Emulator::start(Options { secrets: vec![secret], ..Options::default() }).unwrap();
    let agent = Setup::new(&emulator).key("Cache", "TTLSeconds", TTL.as_secs()).start();
    (emulator, agent)
}

fn stage_target(name: &str, stage: &str) -> String {
    format!("{}&versionStage={stage}", secret_target(name))
}

/// Asks with `refreshNow`, as often as it takes to be past the pause between two such fetches.
#[track_caller]
fn refreshed(agent: &Agent, name: &str) -> Reply {
    let target = secret_target(name) + "&refreshNow=true";
    wait_for("a refreshNow fetch", || {
        Some(agent.get(&target)).filter(|reply| reply.status != 200 || reply.x_cache() == "REFRESH")
    })
}

/// Member of the JSON object that an ECS secret's `SecretData` is.
#[track_caller]
fn member(data: &str, name: &str) -> String {
    let data: serde_json::Value = serde_json::from_str(data).expect("SecretData is an object");
    data[name].as_str().unwrap_or_default().to_owned()
}

/// Reads until the value is another one, which has to be within the TTL; a reader sees the old or the new one,
/// never an error.
#[track_caller]
fn until_changed(agent: &Agent, name: &str, old: &str, rotated: Instant) -> String {
    let mut reads = 0;
    loop {
        let asked = Instant::now();
        let data = agent.secret(name).data();
        if data != old {
            assert!(reads > 0, "the agent serves from its cache");
            return data;
        }
        reads += 1;
        let since = asked.saturating_duration_since(rotated);
        assert!(since < TTL, "the old value {since:?} after the rotation");
    }
}

fn the_life_of_an_ecs_password() {
    let (emulator, agent) = begin(NewSecret::ecs_password("db/ecs", "i-bp1", "root", "First-Passw0rd"));
    let read = |name: &str| agent.secret(name);
    let first = read("db/ecs");
    assert_eq!((first.verdict().as_str(), first.field("SecretType").as_str()), ("200 MISS", "ECS"));
    let first = first.data();
    assert_eq!(member(&first, "Password"), "First-Passw0rd");
    assert_eq!(Some(&first), emulator.current_value("db/ecs").as_ref());

    // Rotated to a value of KMS's making: the old one serves on within its TTL, and no longer.
    emulator.rotate_secret("db/ecs", None).unwrap();
    let rotated = Instant::now();
    let second = until_changed(&agent, "db/ecs", &first, rotated);
    assert_eq!(member(&second, "Password").len(), 32);
    assert_eq!(Some(&second), emulator.current_value("db/ecs").as_ref());
    assert_eq!(agent.get(&stage_target("db/ecs", "ACSPrevious")).data(), first);
    assert_eq!(agent.get(&stage_target("db/ecs", "ACSCurrent")).data(), second);

    // Rotated to a custom value: refreshNow has it at once, and all readers after it.
    emulator.rotate_secret("db/ecs", Some("Custom-Passw0rd")).unwrap();
    let reply = refreshed(&agent, "db/ecs");
    assert_eq!((reply.x_cache(), member(&reply.data(), "Password").as_str()), ("REFRESH", "Custom-Passw0rd"));
    let third = reply.data();
    let reply = read("db/ecs");
    assert_eq!((reply.verdict().as_str(), reply.data().as_str()), ("200 HIT", third.as_str()));
    // The previous one as it is now is another key of the cache: its own TTL.
    let previous = wait_for("ACSPrevious has moved on", || {
        Some(agent.get(&stage_target("db/ecs", "ACSPrevious")).data()).filter(|data| *data != first)
    });
    assert_eq!(previous, second);

    // Planned for deletion: refused, the stale value never.
    emulator.delete_secret("db/ecs", Some(7)).unwrap();
    let planned = Instant::now();
    let refused = wait_for("the refusal", || {
        let (asked, reply) = (Instant::now(), read("db/ecs"));
        assert_ne!(reply.x_cache(), "STALE");
        assert!(reply.status != 200 || asked.saturating_duration_since(planned) < TTL, "{}", reply.verdict());
        Some(reply).filter(|it| it.status != 200)
    });
    assert_eq!(refused.status, 409, "{}", refused.text());
    assert!(refused.field("Code").starts_with("Rejected."), "{}", refused.text());
    let refusals = Instant::now();
    for _ in 0..50 {
        assert_eq!(read("db/ecs").status, 409);
    }

    // Restored: works again once the refusal is forgotten.
    emulator.restore_secret("db/ecs").unwrap();
    wait_until("it works again", || {
        let (asked, reply) = (Instant::now(), read("db/ecs"));
        let since = asked.saturating_duration_since(refusals);
        assert!(reply.status == 200 || since < Duration::from_secs(5), "refused after {since:?}");
        reply.status == 200
    });
    println!("restored: serves again {:?} after the last refusal of KMS", refusals.elapsed());
    assert_eq!(read("db/ecs").data(), third);

    // refreshNow learns of a restored secret at once.
    emulator.delete_secret("db/ecs", Some(30)).unwrap();
    assert_eq!(refreshed(&agent, "db/ecs").status, 409);
    assert_eq!(read("db/ecs").status, 409, "the value is gone");
    emulator.restore_secret("db/ecs").unwrap();
    let asked = Instant::now();
    let reply = wait_for("refreshNow fetches it", || {
        Some(agent.get(&(secret_target("db/ecs") + "&refreshNow=1"))).filter(|it| it.status == 200)
    });
    assert_eq!((reply.x_cache(), reply.data()), ("REFRESH", third.clone()));
    // The pause between two is a second, and a refusal is remembered for five.
    assert!(asked.elapsed() < Duration::from_secs(4), "{:?}", asked.elapsed());
    assert_eq!(read("db/ecs").data(), third, "the refusal is forgotten");

    // Deleted at once.
    emulator.delete_secret("db/ecs", None).unwrap();
    assert_eq!(refreshed(&agent, "db/ecs").verdict(), "404 Forbidden.ResourceNotFound");
    assert_eq!(read("db/ecs").verdict(), "404 Forbidden.ResourceNotFound");
    for secret in ["First-Passw0rd", "Custom-Passw0rd", &member(&second, "Password")] {
        assert!(!agent.everything_written().contains(secret), "a secret in the log");
    }
}

fn the_life_of_an_ecs_key_pair() {
    let (emulator, agent) = begin(NewSecret::ecs_key_pair("pair", "i-bp1", "root"));
    let first = agent.secret("pair").data();
    assert!(member(&first, "PrivateKey").contains("PRIVATE KEY"), "{first}");
    emulator.rotate_secret("pair", None).unwrap();
    let reply = refreshed(&agent, "pair");
    let second = reply.data();
    assert!(member(&second, "PrivateKey").contains("PRIVATE KEY"));
    assert_ne!(member(&second, "PrivateKey"), member(&first, "PrivateKey"));
    // Byte for byte, line breaks within the key included.
    assert_eq!(Some(&second), emulator.current_value("pair").as_ref());
    assert_eq!(agent.get(&stage_target("pair", "ACSPrevious")).data(), first);
    emulator.delete_secret("pair", None).unwrap();
    assert_eq!(refreshed(&agent, "pair").verdict(), "404 Forbidden.ResourceNotFound");
}

fn the_life_of_a_generic_secret() {
    let (emulator, agent) = begin(NewSecret::generic("generic", "one"));
    let first = agent.secret("generic");
    assert_eq!((first.verdict().as_str(), first.data().as_str()), ("200 MISS", "one"));
    emulator.put_secret_value("generic", "two", &["ACSCurrent"]).unwrap();
    // Read once, so not hot: the value ends with its TTL, and the next reader waits for the new one.
    std::thread::sleep(TTL + Duration::from_millis(50));
    let second = agent.secret("generic");
    assert_eq!((second.verdict().as_str(), second.data().as_str()), ("200 MISS", "two"));
    assert_eq!(agent.get(&stage_target("generic", "ACSPrevious")).data(), "one");

    // A version of a stage of its own leaves the current one alone.
    let version = emulator.put_secret_value("generic", "three", &["candidate"]).unwrap();
    assert_eq!(refreshed(&agent, "generic").data(), "two");
    assert_eq!(agent.get(&stage_target("generic", "candidate")).data(), "three");
    let by_id = agent.get(&format!("{}&versionId={version}", secret_target("generic")));
    assert_eq!((by_id.data().as_str(), by_id.field("VersionId")), ("three", version.clone()));
    let old = first.field("VersionId");
    assert_eq!(agent.get(&format!("{}&versionId={old}", secret_target("generic"))).data(), "one");

    // The stage moves; versions by id stay what they are.
    emulator.update_version_stage("generic", "ACSCurrent", None, Some(&version)).unwrap();
    let reply = refreshed(&agent, "generic");
    assert_eq!((reply.data().as_str(), reply.field("VersionId")), ("three", version));
    let unknown = agent.get(&format!("{}&versionId=none", secret_target("generic")));
    assert_eq!(unknown.status, 404, "{}", unknown.text());
    assert_eq!(agent.secret("generic").status, 200, "another version's refusal is not this one's");
}

fn a_rotation_by_schedule_is_seen_when_it_was_announced() {
    let mut secret = NewSecret::ecs_password("ecs", "i-1", "root", "First-Passw0rd");
    secret.rotation_interval_s = Some(86_400);
    let emulator = Emulator::start(Options { secrets: vec![secret], ..Options::default() }).unwrap();
    let agent = Agent::start(&emulator);
    let first = agent.secret("ecs");
    assert_eq!(first.field("AutomaticRotation"), "Enabled");
    emulator.advance_clock(86_400);
    assert_eq!(agent.secret("ecs").data(), first.data(), "the agent's own clock has not moved");
    let second = refreshed(&agent, "ecs");
    assert_ne!(second.data(), first.data());
    assert_eq!(agent.get(&stage_target("ecs", "ACSPrevious")).data(), first.data());
}

timed_tests!(
    the_life_of_an_ecs_password,
    the_life_of_an_ecs_key_pair,
    the_life_of_a_generic_secret,
    a_rotation_by_schedule_is_seen_when_it_was_announced,
);
