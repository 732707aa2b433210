//! KMS over the wire: replies, refusals, a secret's life, counters.

#![allow(clippy::expect_used, reason = "helpers of tests are tests")]

mod support;

use kms_emulator::{
    Emulator, ExpiredTokenReply, MetadataFault, MetadataMode, NewSecret, Options, Service, StsCredentials,
    Throttle,
};
use std::io::Write;
use std::time::Duration;
use support::{Call, connect, metadata, read_reply, tls_config};

fn start() -> (Emulator, StsCredentials) {
    let secrets = vec![NewSecret::generic("agent-test", "hello"), NewSecret::binary("bin", "AAEC")];
    let emulator = Emulator::start(Options { secrets, ..Options::default() }).expect("it starts");
    let who = emulator.issue_credentials();
    (emulator, who)
}

/// A call with the long-term key `AK`.
fn long_term(action: &str, params: &[(&str, &str)]) -> Call {
    let who = StsCredentials {
        access_key_id: "AK".into(),
        access_key_secret: "long-term".into(),
        security_token: String::new(),
        expiration: 0,
    };
    Call { token: None, ..Call::new(&who, action, params) }
}

fn get(emulator: &Emulator, who: &StsCredentials, params: &[(&str, &str)]) -> support::Reply {
    Call::new(who, "GetSecretValue", params).send(emulator).expect("a reply")
}

#[test]
fn get_secret_value_replies_in_the_documented_order() {
    let (emulator, who) = start();
    let reply = Call::get(&who, "agent-test").send(&emulator).expect("a reply");
    assert_eq!(reply.status, 200);
    let json = reply.json();
    let (version, created, id) = (&json["VersionId"], &json["CreateTime"], &json["RequestId"]);
    assert_eq!(
        reply.body,
        format!(
            "{{\"SecretName\":\"agent-test\",\"VersionId\":{version},\"SecretData\":\"hello\",\
             \"SecretDataType\":\"text\",\"SecretType\":\"Generic\",\"VersionStages\":{{\"VersionStage\":\
             [\"ACSCurrent\"]}},\"CreateTime\":{created},\"RequestId\":{id}}}"
        )
    );
    let by_arn = Call::get(&who, &emulator.arn("agent-test")).send(&emulator).expect("a reply").json();
    assert_eq!(by_arn["SecretName"], "agent-test");
    let binary = Call::get(&who, "bin").send(&emulator).expect("a reply").json();
    assert_eq!((&binary["SecretDataType"], &binary["SecretData"]), (&"binary".into(), &"AAEC".into()));

    // The same in a form body.
    let form = Call { form: true, ..Call::get(&who, "agent-test") };
    assert_eq!(form.send(&emulator).expect("a reply").status, 200);
}

#[test]
fn refusals_have_kms_codes() {
    let (emulator, who) = start();
    let code = |call: &Call| {
        let reply = call.send(&emulator).expect("a reply");
        assert_eq!(reply.json()["HttpStatus"], reply.status);
        (reply.status, reply.code())
    };
    let refused = |status: u16, name: &str, call: &Call| assert_eq!(code(call), (status, name.to_owned()));
    let good = || Call::get(&who, "agent-test");

    refused(404, "Forbidden.ResourceNotFound", &Call::get(&who, "nope"));
    refused(404, "Forbidden.ResourceNotFound", &Call::get(&who, "acs:kms:cn-hangzhou:9:secret/agent-test"));
    refused(400, "InvalidParameter", &Call::get(&who, "no spaces"));
    refused(400, "MissingParameter", &Call::new(&who, "GetSecretValue", &[]));
    refused(404, "InvalidAction.NotFound", &Call::new(&who, "Nope", &[]));
    refused(400, "SignatureDoesNotMatch", &Call { secret: "wrong".into(), ..good() });
    refused(
        404,
        "InvalidAccessKeyId.NotFound",
        &Call { id: "STS.nobody".into(), token: Some("x".into()), ..good() },
    );
    refused(404, "InvalidAccessKeyId.NotFound", &Call { token: None, ..good() });
    refused(400, "InvalidSecurityToken.Malformed", &Call { token: Some("x".into()), ..good() });
    let other = emulator.issue_credentials();
    let crossed = Call { token: Some(other.security_token.clone()), ..good() };
    refused(400, "InvalidSecurityToken.MismatchWithAccessKey", &crossed);

    let twice = good();
    assert_eq!(twice.send(&emulator).expect("a reply").status, 200);
    refused(400, "SignatureNonceUsed", &twice);

    emulator.set_clock_offset(3600);
    refused(400, "InvalidTimeStamp.Expired", &good());
    let date = Call::get(&other, "agent-test").send(&emulator).expect("a reply").head;
    assert!(date.contains("date: "), "{date}");
    emulator.set_clock_offset(-3600);
    refused(400, "IllegalTimestamp", &good());
    emulator.set_clock_offset(0);

    let before = emulator.counters();
    assert_eq!(before.signature_failures, 9);
    emulator.expire_credentials();
    refused(403, "InvalidSecurityToken.Expired", &good());
    emulator.set_expired_token_reply(ExpiredTokenReply::NotFound);
    refused(404, "InvalidAccessKeyId.NotFound", &good());

    emulator.add_access_key("AK", "long-term");
    let call = long_term("GetSecretValue", &[("SecretName", "agent-test")]);
    assert_eq!(call.send(&emulator).expect("a reply").status, 200);
}

#[test]
fn an_ecs_password_lives_its_life_over_the_wire() {
    let (emulator, _) = start();
    // A long-term key: time is about to pass, and STS credentials would end with it.
    emulator.add_access_key("AK", "long-term");
    let name = ("SecretName", "acs/ecs/db");
    let ask = |action: &str, params: &[(&str, &str)]| {
        let params: Vec<_> = [name].into_iter().chain(params.iter().copied()).collect();
        long_term(action, &params).send(&emulator).expect("a reply")
    };
    let value = |stage: &str| ask("GetSecretValue", &[("VersionStage", stage)]);
    let config =
        r#"{"SecretSubType":"Password","RegionId":"cn-hangzhou","InstanceId":"i-1","CustomData":{}}"#;
    let first = r#"{"UserName":"admin","Password":"first"}"#;
    let create = [
        ("VersionId", "v1"),
        ("SecretType", "ECS"),
        ("SecretData", first),
        ("ExtendedConfig", config),
        ("EnableAutomaticRotation", "true"),
        ("RotationInterval", "6h"),
    ];
    assert_eq!(ask("CreateSecret", &create).json()["RotationInterval"], "21600s");
    assert_eq!(ask("CreateSecret", &create).code(), "Rejected.ResourceExist");
    let extended = ask("GetSecretValue", &[("FetchExtendedConfig", "true")]).json();
    assert_eq!(
        (&extended["ExtendedConfig"], &extended["AutomaticRotation"]),
        (&config.into(), &"Enabled".into())
    );
    assert_eq!(value("ACSPrevious").code(), "Forbidden.ResourceNotFound");
    assert_eq!(value("Own").code(), "InvalidParameter");
    assert_eq!(
        ask("PutSecretValue", &[("VersionId", "x"), ("SecretData", "x")]).code(),
        "Rejected.UnsupportedOperation"
    );

    // By hand, twice with one version id: once.
    for _ in 0..2 {
        assert_eq!(ask("RotateSecret", &[("VersionId", "v2")]).status, 200);
    }
    let generated = value("ACSCurrent").json();
    let data: serde_json::Value =
        serde_json::from_str(generated["SecretData"].as_str().expect("text")).expect("JSON");
    assert_eq!(
        (data["UserName"].as_str(), data["Password"].as_str().map(str::len)),
        (Some("admin"), Some(32))
    );
    assert_eq!(value("ACSPrevious").json()["SecretData"], first);
    assert_eq!(ask("RotateSecret", &[("VersionId", "v3"), ("SecretData", "custom")]).status, 200);
    assert_eq!(value("ACSCurrent").json()["SecretData"], r#"{"UserName":"admin","Password":"custom"}"#);

    // By schedule: three intervals later it was rotated, and is due within one more.
    emulator.advance_clock(3 * 21_600 + 10);
    let rotated = emulator.secret(name.1).expect("it is there");
    let schedule = rotated.schedule.expect("on");
    assert!((1..=21_600).contains(&(schedule.next - emulator.now())), "{schedule:?}");
    assert_eq!(rotated.last_rotation, Some(schedule.next - 21_600));
    assert_eq!(value("ACSPrevious").json()["SecretData"], r#"{"UserName":"admin","Password":"custom"}"#);

    assert_eq!(ask("DeleteSecret", &[("RecoveryWindowInDays", "6")]).code(), "InvalidParameter");
    assert_eq!(ask("DeleteSecret", &[("RecoveryWindowInDays", "7")]).status, 200);
    let refused = value("ACSCurrent");
    assert_eq!((refused.status, refused.code().as_str()), (409, "Rejected.ResourceInDeleteWindow"));
    assert!(ask("DescribeSecret", &[]).json()["PlannedDeleteTime"].is_string());
    assert_eq!(ask("RestoreSecret", &[]).status, 200);
    assert_eq!(ask("RestoreSecret", &[]).status, 409);
    assert_eq!(value("ACSCurrent").status, 200);
    assert_eq!(ask("DeleteSecret", &[("ForceDeleteWithoutRecovery", "true")]).status, 200);
    assert_eq!(value("ACSCurrent").code(), "Forbidden.ResourceNotFound");

    emulator.put_secret("short", "x");
    emulator.delete_secret("short", Some(7)).expect("planned");
    emulator.advance_clock(7 * 86_400);
    assert_eq!(emulator.secret("short"), None);
}

#[test]
fn generic_versions_and_their_stages() {
    let (emulator, who) = start();
    let name = ("SecretName", "agent-test");
    let ask = |action: &str, params: &[(&str, &str)]| {
        let params: Vec<_> = [name].into_iter().chain(params.iter().copied()).collect();
        Call::new(&who, action, &params).send(&emulator).expect("a reply")
    };
    let first = emulator.secret("agent-test").expect("there").versions[0].id.clone();
    let put = [("VersionId", "v2"), ("SecretData", "two")];
    assert_eq!(ask("PutSecretValue", &put).json()["VersionStages"]["VersionStage"][0], "ACSCurrent");
    assert_eq!(ask("PutSecretValue", &put).status, 200);
    assert_eq!(ask("PutSecretValue", &[put[0], ("SecretData", "other")]).code(), "Rejected.ResourceExist");
    assert_eq!(get(&emulator, &who, &[name, ("VersionStage", "ACSPrevious")]).json()["SecretData"], "hello");
    assert_eq!(get(&emulator, &who, &[name, ("VersionId", &first)]).json()["SecretData"], "hello");
    // Both given must agree.
    let both = [name, ("VersionId", &first), ("VersionStage", "ACSCurrent")];
    assert_eq!(get(&emulator, &who, &both).code(), "Forbidden.ResourceNotFound");

    let staged = [("VersionId", "v3"), ("SecretData", "three"), ("VersionStages", r#"["Next"]"#)];
    assert_eq!(ask("PutSecretValue", &staged).status, 200);
    assert_eq!(emulator.current_value("agent-test").as_deref(), Some("two"));
    let promote = [("VersionStage", "ACSCurrent"), ("RemoveFromVersion", "v2"), ("MoveToVersion", "v3")];
    assert_eq!(ask("UpdateSecretVersionStage", &promote).status, 200);
    assert_eq!(ask("UpdateSecretVersionStage", &promote).code(), "InvalidParameter");
    let listed = ask("ListSecretVersionIds", &[("IncludeDeprecated", "true")]).json();
    let stages: Vec<String> = listed["VersionIds"]["VersionId"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|v| v["VersionStages"]["VersionStage"].to_string())
        .collect();
    assert_eq!(stages, ["[]", "[\"ACSPrevious\"]", "[\"Next\",\"ACSCurrent\"]"]);
    assert_eq!(ask("ListSecretVersionIds", &[]).json()["TotalCount"], 2);
    assert_eq!(ask("RotateSecret", &[("VersionId", "v4")]).code(), "Rejected.UnsupportedOperation");
}

#[test]
fn a_key_pair_is_made_and_rotated_while_others_are_served() {
    let (emulator, who) = start();
    emulator.create_secret(NewSecret::ecs_key_pair("acs/ecs/ssh", "i-1", "root")).expect("created");
    let first = emulator.current_value("acs/ecs/ssh").expect("a value");
    assert!(first.starts_with(r#"{"UserName":"root","PublicKey":"ssh-rsa AAAA"#), "{first}");
    std::thread::scope(|scope| {
        let rotate = scope.spawn(|| {
            Call::new(&who, "RotateSecret", &[("SecretName", "acs/ecs/ssh"), ("VersionId", "v2")])
                .send(&emulator)
        });
        assert!(emulator.wait_for(Duration::from_secs(60), |c| c.action("RotateSecret") == 1));
        assert_eq!(Call::get(&who, "agent-test").send(&emulator).expect("a reply").status, 200);
        assert_eq!(rotate.join().expect("no panic").expect("a reply").status, 200);
    });
    assert_ne!(emulator.current_value("acs/ecs/ssh").expect("a value"), first);
    let previous = get(&emulator, &who, &[("SecretName", "acs/ecs/ssh"), ("VersionStage", "ACSPrevious")]);
    assert_eq!(previous.json()["SecretData"], first);
}

#[test]
fn throttling_refuses_with_hints() {
    let (emulator, who) = start();
    emulator.set_throttle(Some(Throttle { qps: 0, retry_after_s: Some(3), acs_retry_after_ms: Some(1500) }));
    let reply = Call::get(&who, "agent-test").send(&emulator).expect("a reply");
    assert_eq!((reply.status, reply.code().as_str()), (429, "Rejected.Throttling"));
    assert!(
        reply.head.contains("\r\nretry-after: 3\r\n")
            && reply.head.contains("\r\nx-acs-retry-after: 1500\r\n")
    );
    emulator.set_throttle(Some(Throttle::qps(2)));
    let statuses: Vec<u16> =
        (0..2).map(|_| Call::get(&who, "agent-test").send(&emulator).expect("a reply").status).collect();
    assert_eq!(statuses, [200, 200]);
    assert_eq!(emulator.counters().throttled, 1);
}

#[test]
fn counters_log_and_resumption() {
    let (emulator, who) = start();
    let config = tls_config(&emulator);
    let mut kept = connect(&emulator, &config).expect("connects");
    for _ in 0..2 {
        kept.write_all(&Call::get(&who, "agent-test").bytes()).expect("sent");
        assert_eq!(read_reply(&mut kept).expect("a reply").status, 200);
    }
    let resumed = connect(&emulator, &config).expect("connects");
    assert!(emulator.wait_for(Duration::from_secs(60), |c| c.tls_handshakes == 2 && c.kms_open == 2));
    drop((kept, resumed));
    assert!(emulator.wait_for(Duration::from_secs(60), |c| c.kms_open == 0));
    let seen = emulator.counters();
    assert_eq!((seen.kms_accepted, seen.kms_open_max, seen.tls_resumed), (2, 2, 1));
    assert_eq!((seen.kms_requests, seen.gets("agent-test"), seen.action("GetSecretValue")), (2, 2, 2));
    let log = emulator.requests();
    assert_eq!(log.len(), 2);
    assert_eq!(log[0].connection, log[1].connection);
    assert!(log[0].arrived <= log[1].arrived && log[0].answered.is_some());
    assert_eq!((log[0].service, log[0].status), (Service::Kms, Some(200)));
    assert_eq!(log[0].access_key_id.as_deref(), Some(who.access_key_id.as_str()));
}

#[test]
fn metadata_hands_out_credentials_that_kms_accepts() {
    let (emulator, _) = start();
    let addr = emulator.metadata_addr();
    let role = "/latest/meta-data/ram/security-credentials/EcsRamRoleKms";
    let plain = |path: &str| metadata(addr, "GET", path, "").expect("a reply");
    let ttl = "X-aliyun-ecs-metadata-token-ttl-seconds";

    assert_eq!(plain("/latest/meta-data/region-id").body, "cn-hangzhou");
    assert_eq!(plain("/latest/meta-data/ram/security-credentials/").body, "EcsRamRoleKms");
    let document = plain("/latest/dynamic/instance-identity/document").json();
    assert_eq!(document["owner-account-id"], "1234567890123456");
    let json = plain(role).json();
    assert_eq!(json["Code"], "Success");
    assert_eq!(plain(role).json()["AccessKeyId"], json["AccessKeyId"], "the same until nearly over");
    let text = |field: &str| json[field].as_str().expect("text").to_owned();
    let who = StsCredentials {
        access_key_id: text("AccessKeyId"),
        access_key_secret: text("AccessKeySecret"),
        security_token: text("SecurityToken"),
        expiration: 0,
    };
    assert_eq!(Call::get(&who, "agent-test").send(&emulator).expect("a reply").status, 200);
    emulator.rotate_credentials();
    assert_ne!(plain(role).json()["AccessKeyId"], json["AccessKeyId"]);

    emulator.set_metadata_mode(MetadataMode::Hardened);
    assert_eq!(plain(role).status, 403);
    for bad in ["0", "21601", "x"] {
        assert_eq!(
            metadata(addr, "PUT", "/latest/api/token", &format!("{ttl}: {bad}\r\n")).expect("a reply").status,
            400
        );
    }
    let forwarded = format!("{ttl}: 60\r\nX-Forwarded-For: 1.2.3.4\r\n");
    assert_eq!(metadata(addr, "PUT", "/latest/api/token", &forwarded).expect("a reply").status, 403);
    let token = metadata(addr, "PUT", "/latest/api/token", &format!("{ttl}: 60\r\n")).expect("a reply").body;
    let with_token = format!("X-aliyun-ecs-metadata-token: {token}\r\n");
    assert_eq!(metadata(addr, "GET", role, &with_token).expect("a reply").status, 200);
    emulator.advance_clock(60);
    assert_eq!(metadata(addr, "GET", role, &with_token).expect("a reply").status, 401);
    emulator.set_metadata_mode(MetadataMode::Normal);

    emulator.set_role(None);
    assert_eq!(plain(role).status, 404);
    emulator.set_role(Some("Other"));
    assert_eq!(plain("/latest/meta-data/ram/security-credentials/").body, "Other");

    let seen = emulator.counters();
    assert_eq!((seen.metadata_token_puts, seen.metadata_hardened_gets), (1, 1));
    assert_eq!(seen.credential_reads["EcsRamRoleKms"], 4);
}

#[test]
fn metadata_fails_in_every_way() {
    let (emulator, _) = start();
    let addr = emulator.metadata_addr();
    let role = "/latest/meta-data/ram/security-credentials/EcsRamRoleKms";
    let ask = || metadata(addr, "GET", role, "");
    let fail = |fault| emulator.set_metadata_fault(fault).expect("set");
    fail(Some(MetadataFault::Refuse));
    assert_eq!(ask().err().expect("refused").kind(), std::io::ErrorKind::ConnectionRefused);
    fail(Some(MetadataFault::Close));
    assert!(ask().is_err());
    fail(Some(MetadataFault::Status500));
    assert_eq!(ask().expect("a reply").status, 500);
    fail(Some(MetadataFault::Garbage));
    assert!(serde_json::from_str::<serde_json::Value>(&ask().expect("a reply").body).is_err());
    fail(Some(MetadataFault::NotSuccess));
    assert_eq!(ask().expect("a reply").code(), "Failed");
    fail(Some(MetadataFault::Stall));
    let before = emulator.counters().metadata_requests;
    std::thread::scope(|scope| {
        let stalled = scope.spawn(ask);
        assert!(emulator.wait_for(Duration::from_secs(60), |c| c.metadata_requests == before + 1));
        // The next fault ends the stalled connection, which had no reply.
        fail(Some(MetadataFault::Refuse));
        assert!(stalled.join().expect("no panic").is_err());
    });
    fail(None);
    assert_eq!(ask().expect("a reply").status, 200);
}
