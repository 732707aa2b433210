//! Every way to be someone, end to end: the real agent, an emulated KMS, STS and metadata service. Each way gets a
//! secret; credentials that end, are revoked or are missing heal or explain themselves; none is ever written.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::{Agent, Setup, wait_until};
use kms_emulator::{
    CredentialsUriFault, Emulator, IdentityFault, MetadataFault, MetadataMode, NewSecret, Options,
};

const AK_ID: &str = "LTAI5tIdentityTest";
const AK_SECRET: &str = "hush-access-key-secret";
const OIDC_TOKEN: &str = "eyJhbGciOiJub25lIn0.first.hush-oidc-token";

fn emulator_with(change: impl FnOnce(&mut Options)) -> Emulator {
    let mut options = Options {
        secrets: vec![NewSecret::generic("db", "opensesame")],
        access_keys: vec![(AK_ID.into(), AK_SECRET.into())],
        oidc_token: Some(OIDC_TOKEN.into()),
        ..Options::default()
    };
    change(&mut options);
    Emulator::start(options).expect("the emulator starts")
}

fn emulator() -> Emulator {
    emulator_with(|_| {})
}

/// An agent that caches nothing, so that each read needs credentials.
fn setup(emulator: &Emulator) -> Setup {
    Setup::new(emulator).key("Cache", "TTLSeconds", 0)
}

fn with_access_key(setup: Setup) -> Setup {
    setup.env("ALIBABA_CLOUD_ACCESS_KEY_ID", AK_ID).env("ALIBABA_CLOUD_ACCESS_KEY_SECRET", AK_SECRET)
}

/// By OIDC, the token in the file `token` of the agent's folder.
fn with_oidc(emulator: &Emulator, setup: Setup) -> Setup {
    let file = setup.folder.join("token");
    setup
        .env("ALIBABA_CLOUD_ROLE_ARN", emulator.oidc_role_arn())
        .env("ALIBABA_CLOUD_OIDC_PROVIDER_ARN", emulator.oidc_provider_arn())
        .env("ALIBABA_CLOUD_OIDC_TOKEN_FILE", file)
        .env("ALIBABA_CLOUD_STS_ENDPOINT", emulator.kms_addr().to_string())
}

fn with_uri(emulator: &Emulator, setup: Setup) -> Setup {
    setup.env("ALIBABA_CLOUD_CREDENTIALS_URI", format!("{}?hush-query", emulator.credentials_uri()))
}

fn with_aap(emulator: &Emulator, setup: Setup) -> Setup {
    setup.text("KMS", "AapArn", &emulator.aap_arn("kms-agent"))
}

#[track_caller]
fn gets_the_secret(agent: &Agent) {
    let reply = agent.secret("db");
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(reply.text().contains("opensesame"));
}

#[track_caller]
fn heals(agent: &Agent) {
    wait_until("the secret is there", || agent.secret("db").status == 200);
}

/// 503 with this in its message, and in the log too.
#[track_caller]
fn explains(agent: &Agent, part: &str) {
    let reply = agent.secret("db");
    assert_eq!(reply.status, 503, "{}", reply.text());
    assert!(
        reply.text().contains("CredentialUnavailable") && reply.text().contains(part),
        "{}",
        reply.text()
    );
    agent.wait_for_log(part);
}

/// Nothing that credentials begin with or consist of is in what the agent has written.
#[track_caller]
fn writes_no_credentials(agent: &mut Agent) {
    agent.stop();
    let written = agent.everything_written();
    // Access key ids, security tokens, signed identities.
    for secret in ["hush", AK_ID, "STS.", "CAIS", "MII", "eyJ", "opensesame"] {
        let line = written.lines().find(|line| line.contains(secret));
        assert_eq!(line, None, "{secret} is written");
    }
}

#[test]
fn the_ram_role_is_read_once_a_renewal_and_not_once_a_call() {
    let emulator = emulator();
    let mut agent = setup(&emulator).text("KMS", "AuthType", "ram_role").start();
    for _ in 0..5 {
        gets_the_secret(&agent);
    }
    let reads = |emulator: &Emulator| emulator.counters().credential_reads["EcsRamRoleKms"];
    assert_eq!((reads(&emulator), emulator.counters().metadata_token_puts), (1, 1));
    agent.wait_for_log("identity for KMS: the instance's RAM role");
    emulator.expire_credentials();
    gets_the_secret(&agent);
    emulator.revoke_credentials();
    heals(&agent);
    assert_eq!((reads(&emulator), emulator.counters().metadata_token_puts), (3, 1));

    emulator.set_role(None);
    emulator.revoke_credentials();
    wait_until("it has noticed", || agent.secret("db").status == 503);
    explains(&agent, "no RAM role is attached to this instance; attach one");
    emulator.set_role(Some("Another"));
    heals(&agent);
    writes_no_credentials(&mut agent);
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
    let emulator = common::emulator(&[("a", "1"), ("b", "2"), ("c", "3")]);
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
fn an_access_key_from_the_environment_needs_nobody() {
    let emulator = emulator();
    for auth_type in ["access_key", "auto"] {
        let mut agent = with_access_key(setup(&emulator)).text("KMS", "AuthType", auth_type).start();
        gets_the_secret(&agent);
        agent.wait_for_log("identity for KMS: the access key in the environment");
        emulator.remove_access_key(AK_ID);
        let refused = agent.secret("db");
        assert_eq!(refused.status, 404, "{}", refused.text());
        assert!(refused.text().contains("InvalidAccessKeyId.NotFound"));
        agent.wait_for_log("KMS refuses the access key in the environment; replace it");
        let calls = emulator.counters().kms_requests;
        for _ in 0..100 {
            assert_eq!(agent.secret("db").status, 404);
        }
        // One more each 5 s, however long the loop takes.
        assert!(emulator.counters().kms_requests < calls + 20, "a loop of readers does not flood KMS");
        emulator.add_access_key(AK_ID, AK_SECRET);
        heals(&agent);
        writes_no_credentials(&mut agent);
    }
    let sts = emulator.issue_credentials();
    let agent = setup(&emulator)
        .env("ALIBABA_CLOUD_ACCESS_KEY_ID", &sts.access_key_id)
        .env("ALIBABA_CLOUD_ACCESS_KEY_SECRET", &sts.access_key_secret)
        .env("ALIBABA_CLOUD_SECURITY_TOKEN", &sts.security_token)
        .start();
    gets_the_secret(&agent);
    assert_eq!(emulator.counters().metadata_requests, 0);
}

#[test]
fn a_role_by_oidc_follows_its_token() {
    let emulator = emulator();
    // As Kubernetes projects it: a link to a link to a folder, of which the middle one is replaced.
    let setup = with_oidc(&emulator, setup(&emulator)).text("KMS", "AuthType", "oidc");
    let folder = setup.folder.path().to_owned();
    let project = |generation: &str, token: &str| {
        std::fs::create_dir(folder.join(generation)).unwrap();
        std::fs::write(folder.join(generation).join("token"), token).unwrap();
        std::os::unix::fs::symlink(generation, folder.join("..new")).unwrap();
        std::fs::rename(folder.join("..new"), folder.join("..data")).unwrap();
    };
    project("1", OIDC_TOKEN);
    std::os::unix::fs::symlink("..data/token", folder.join("token")).unwrap();
    let mut agent = setup.start();
    gets_the_secret(&agent);
    gets_the_secret(&agent);
    assert_eq!((emulator.counters().oidc_exchanges, emulator.counters().metadata_requests), (1, 0));

    emulator.set_oidc_token(Some("eyJ.second.hush-token"));
    emulator.expire_credentials();
    wait_until("it has noticed", || agent.secret("db").status == 503);
    explains(&agent, "STS: it refused with 401 AuthenticationFail.OIDCToken.Expired");
    project("2", "eyJ.second.hush-token\n");
    heals(&agent);

    std::fs::remove_file(folder.join("2").join("token")).unwrap();
    emulator.expire_credentials();
    wait_until("it has noticed", || agent.secret("db").status == 503);
    explains(&agent, "cannot read it: ");
    project("3", "");
    wait_until("it has noticed", || agent.secret("db").text().contains("it is empty"));
    project("4", "eyJ.second.hush-token");
    heals(&agent);
    writes_no_credentials(&mut agent);
}

#[test]
fn the_chain_moves_on_to_a_credentials_uri_and_says_why() {
    let emulator = emulator_with(|options| options.role = None);
    let mut agent = with_uri(&emulator, setup(&emulator)).start();
    gets_the_secret(&agent);
    agent.wait_for_log("identity for KMS: the instance's RAM role, or else the credentials URI");
    agent.wait_for_log(
        "identity for KMS: skipped the access key in the environment (ALIBABA_CLOUD_ACCESS_KEY_ID, ",
    );
    agent.wait_for_log(
        "the instance's RAM role gave no credentials: metadata service: no RAM role is attached",
    );
    agent.wait_for_log("fetched credentials: the credentials URI");
    gets_the_secret(&agent);
    assert_eq!(emulator.counters().credentials_uri_reads, 1);

    for (fault, part) in [
        (CredentialsUriFault::NotFound, "it answered 404"),
        (CredentialsUriFault::Status500, "it answered 500"),
        (CredentialsUriFault::NotSuccess, "it has no credentials: "),
        (CredentialsUriFault::Malformed, "it gave credentials that cannot be read"),
        (CredentialsUriFault::Expired, "it gave credentials that expired at 20"),
    ] {
        emulator.set_credentials_uri_fault(Some(fault));
        emulator.revoke_credentials();
        wait_until(part, || agent.secret("db").text().contains(part));
        explains(&agent, "credentials URI at 127.0.0.1:");
        emulator.set_credentials_uri_fault(None);
        heals(&agent);
    }
    writes_no_credentials(&mut agent);

    let agent =
        with_uri(&emulator, setup(&emulator)).env("ALIBABA_CLOUD_ECS_METADATA_DISABLED", "true").start();
    gets_the_secret(&agent);
    agent.wait_for_log(
        "identity for KMS: skipped the instance's RAM role (ALIBABA_CLOUD_ECS_METADATA_DISABLED is true)",
    );
}

#[test]
fn instance_identity_is_exchanged_at_the_access_point() {
    let emulator = emulator();
    let mut agent = with_aap(&emulator, setup(&emulator)).start();
    agent.wait_for_log("[WARN] identity: instance identity is provisional");
    gets_the_secret(&agent);
    gets_the_secret(&agent);
    assert_eq!((emulator.counters().identity_reads, emulator.counters().aap_exchanges), (1, 1));
    assert_eq!(emulator.counters().metadata_plain_gets, 0);
    emulator.expire_credentials();
    gets_the_secret(&agent);
    assert_eq!(emulator.counters().aap_exchanges, 2);

    for (fault, part) in [
        (IdentityFault::NotFound, "it has no signed identity of this instance"),
        (IdentityFault::NotBase64, "it gave a signed identity that cannot be read"),
        (IdentityFault::OtherCa, "it refused with 403 InvalidInstanceIdentity.Signature"),
        (IdentityFault::Tampered, "it refused with 403 InvalidInstanceIdentity.Signature"),
        (IdentityFault::OtherAccount, "it refused with 403 InvalidInstanceIdentity.Mismatch"),
        (IdentityFault::NoAudience, "it refused with 403 InvalidInstanceIdentity.Audience"),
        (IdentityFault::Repeated, "it refused with 403 InvalidInstanceIdentity.Replayed"),
    ] {
        emulator.set_identity_fault(Some(fault));
        emulator.revoke_credentials();
        wait_until(part, || agent.secret("db").text().contains(part));
        explains(&agent, part);
        emulator.set_identity_fault(None);
        heals(&agent);
    }
    emulator.remove_aap("kms-agent");
    emulator.revoke_credentials();
    wait_until("it has noticed", || {
        agent.secret("db").text().contains("application access point: it refused with 404")
    });
    emulator.add_aap("kms-agent");
    heals(&agent);
    writes_no_credentials(&mut agent);
}

#[test]
fn a_host_clock_that_is_hours_wrong_hinders_nobody() {
    for offset in [-6 * 3600, 6 * 3600] {
        let emulator = emulator_with(|options| {
            options.clock_offset_s = offset;
            options.credentials_lifetime_s = 3600;
        });
        for identify in [with_aap, with_uri, with_oidc, |_: &Emulator, setup| setup] {
            let setup = identify(&emulator, setup(&emulator));
            setup.folder.write("token", OIDC_TOKEN);
            heals(&setup.start());
        }
    }
}

#[test]
fn trouble_that_stays_the_same_is_told_once_a_minute() {
    let emulator = emulator();
    emulator.set_metadata_fault(Some(MetadataFault::Status500)).unwrap();
    let agent = setup(&emulator).start();
    wait_until("it has tried five times", || {
        explains(&agent, "metadata service: it answered 500");
        // A token and, in plain mode, the role.
        emulator.counters().metadata_requests >= 10
    });
    assert_eq!(agent.log().matches("there are no credentials for KMS: metadata service").count(), 1);
    emulator.set_metadata_fault(None).unwrap();
    heals(&agent);
}

#[test]
fn what_cannot_be_ends_the_start_with_code_2() {
    let emulator = emulator();
    let set = |key: &'static str, value: &str| setup(&emulator).text("KMS", key, value);
    for (setup, part) in [
        (set("AuthType", "instance_identity"), "also needs AapArn"),
        (set("AapArn", "acs:kms:cn-hangzhou:x:applicationaccesspoint/a"), "[KMS] AapArn"),
        (
            set("AapArn", &emulator.aap_arn("a")).text("KMS", "Region", "cn-beijing"),
            "is in cn-hangzhou, but Region",
        ),
        (
            set("AuthType", "access_key").env("ALIBABA_CLOUD_ACCESS_KEY_ID", AK_ID),
            "[KMS] AuthType = \"access_key\": ALIBABA_CLOUD_ACCESS_KEY_SECRET is not set",
        ),
        (set("AuthType", "oidc"), "ALIBABA_CLOUD_ROLE_ARN, "),
        (
            setup(&emulator).env("ALIBABA_CLOUD_ECS_METADATA_DISABLED", "true"),
            "finds no identity that is configured",
        ),
        (
            setup(&emulator).env("ALIBABA_CLOUD_CREDENTIALS_URI", "hush"),
            "ALIBABA_CLOUD_CREDENTIALS_URI must be",
        ),
        (
            set("Endpoint", "kst-hzz1.cryptoservice.kms.aliyuncs.com").without("KMS", "CaFile"),
            "also needs CaFile: a private CA of KMS issues the certificate of an instance",
        ),
    ] {
        let (code, stderr) = setup.start_in_vain();
        assert_eq!(code, 2, "{stderr}");
        assert!(stderr.contains(part) && !stderr.contains("hush"), "{part}: {stderr}");
    }
}
