//! Who gets credentials, and for what: instance identity, OIDC token, credentials URI.

#![allow(clippy::expect_used, reason = "helpers of tests are tests")]

mod support;

use kms_emulator::{
    CredentialsUriFault, Emulator, Fault, IdentityFault, MetadataMode, NewSecret, Options, StsCredentials,
    signature,
};
use std::fs;
use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};
use support::host::{command, tool};
use support::{Call, Reply, connect, iso8601, metadata, read_reply, tls_config, unique};

const PKCS7: &str = "/latest/dynamic/instance-identity/pkcs7";

fn start() -> Emulator {
    let secrets = vec![NewSecret::generic("agent-test", "hello")];
    Emulator::start(Options { secrets, ..Options::default() }).expect("it starts")
}

fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    i64::try_from(now).expect("in range")
}

fn form(pairs: &[(&str, &str)]) -> String {
    let encode = |text: &str| signature::encode(text.as_bytes());
    pairs.iter().map(|(n, v)| format!("{n}={}", encode(v))).collect::<Vec<_>>().join("&")
}

/// An unsigned POST with a form.
fn post(emulator: &Emulator, headers: &str, pairs: &[(&str, &str)]) -> Reply {
    let body = form(pairs);
    let mut tls = connect(emulator, &tls_config(emulator)).expect("connects");
    let request = format!(
        "POST / HTTP/1.1\r\n{headers}content-type: application/x-www-form-urlencoded\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    tls.write_all(request.as_bytes()).expect("sent");
    read_reply(&mut tls).expect("a reply")
}

fn issued(reply: &Reply) -> StsCredentials {
    assert_eq!(reply.status, 200, "{}", reply.body);
    let json = reply.json();
    let text = |name: &str| json["Credentials"][name].as_str().expect("a text").to_owned();
    StsCredentials {
        access_key_id: text("AccessKeyId"),
        access_key_secret: text("AccessKeySecret"),
        security_token: text("SecurityToken"),
        expiration: 0,
    }
}

fn gets_the_secret(emulator: &Emulator, who: &StsCredentials) {
    let reply = Call::get(who, "agent-test").send(emulator).expect("a reply");
    assert_eq!(reply.json()["SecretData"], "hello");
}

// Instance identity.

fn audience(aap: &str, signing_time: i64) -> String {
    format!("{{\"aud\":\"{aap}\",\"signingTime\":{signing_time}}}")
}

/// The identity as an agent gets it, over the wire.
fn identity(emulator: &Emulator, audience: &str) -> String {
    let path = format!("{PKCS7}?audience={}", signature::encode(audience.as_bytes()));
    let reply = metadata(emulator.metadata_addr(), "GET", &path, "").expect("a reply");
    assert_eq!(reply.status, 200);
    reply.body
}

fn assume(emulator: &Emulator, aap: &str, identity: &str) -> Reply {
    let headers = format!(
        "host: kms-vpc.cn-hangzhou.aliyuncs.com\r\nx-acs-action: AssumeApplicationAccessPoint\r\n\
         x-acs-version: 2016-01-20\r\nx-acs-date: {}\r\nx-acs-signature-nonce: {}\r\n",
        iso8601(now().unsigned_abs()),
        unique()
    );
    post(emulator, &headers, &[("AapArn", aap), ("InstanceIdentity", identity)])
}

#[test]
fn an_instance_identity_opens_its_application_access_point_once() {
    let emulator = start();
    let aap = emulator.aap_arn("kms-agent");
    assert_eq!(aap, "acs:kms:cn-hangzhou:1234567890123456:applicationaccesspoint/kms-agent");
    let identity = identity(&emulator, &audience(&aap, now()));
    gets_the_secret(&emulator, &issued(&assume(&emulator, &aap, &identity)));

    let again = assume(&emulator, &aap, &identity);
    assert_eq!((again.status, again.code()), (403, "InvalidInstanceIdentity.Replayed".into()));
    let counters = emulator.counters();
    assert_eq!((counters.identity_reads, counters.aap_exchanges), (1, 1));
    assert_eq!(counters.action("AssumeApplicationAccessPoint"), 2);
}

#[test]
fn each_flaw_of_an_identity_has_its_code() {
    let emulator = start();
    let aap = emulator.aap_arn("kms-agent");
    let code = |aap: &str, identity: &str| {
        let reply = assume(&emulator, aap, identity);
        assert_eq!(reply.json()["HttpStatus"], reply.status);
        (reply.status, reply.code())
    };
    let refused = |status: u16, why: &str, aap: &str, audience: &str| {
        let expected = (status, format!("InvalidInstanceIdentity.{why}"));
        assert_eq!(code(aap, &identity(&emulator, audience)), expected);
    };
    let fresh = || audience(&aap, now());

    assert_eq!(code(&aap, "").1, "MissingParameter");
    assert_eq!(code("acs:kms:cn-hangzhou:1:key/x", "x").1, "InvalidParameter");
    assert_eq!(code(&aap, "AAEC"), (400, "InvalidInstanceIdentity.Malformed".into()));
    for (fault, status, why) in [
        (IdentityFault::NotBase64, 400, "Malformed"),
        (IdentityFault::OtherCa, 403, "Signature"),
        (IdentityFault::Tampered, 403, "Signature"),
        (IdentityFault::NoAudience, 403, "Audience"),
        (IdentityFault::OtherAccount, 403, "Mismatch"),
    ] {
        emulator.set_identity_fault(Some(fault));
        refused(status, why, &aap, &fresh());
    }
    emulator.set_identity_fault(None);

    refused(403, "Audience", &aap, "somebody");
    refused(403, "Audience", &aap, &audience(&emulator.aap_arn("other"), now()));
    for off in [-310, 310] {
        refused(403, "Expired", &aap, &audience(&aap, now() + off));
    }
    for off in [-290, 290] {
        issued(&assume(&emulator, &aap, &identity(&emulator, &audience(&aap, now() + off))));
    }
    for unknown in [emulator.aap_arn("other"), aap.replace("hangzhou", "beijing")] {
        let identity = identity(&emulator, &audience(&unknown, now()));
        assert_eq!(code(&unknown, &identity), (404, "Forbidden.AAPNotFound".into()));
    }
    emulator.add_aap("other");
    let other = emulator.aap_arn("other");
    issued(&assume(&emulator, &other, &identity(&emulator, &audience(&other, now()))));
    emulator.remove_aap("kms-agent");
    assert_eq!(code(&aap, &identity(&emulator, &fresh())).1, "Forbidden.AAPNotFound");

    emulator.set_identity_fault(Some(IdentityFault::Repeated));
    let (a, b) = (identity(&emulator, &fresh()), identity(&emulator, "another"));
    assert_eq!(a, b);

    emulator
        .inject(Fault::error(503, "ServiceUnavailable").for_action("AssumeApplicationAccessPoint").times(1));
    assert_eq!(code(&other, &a), (503, "ServiceUnavailable".into()));
    gets_the_secret(&emulator, &emulator.issue_credentials());
    emulator.set_clock_offset(3600);
    assert_eq!(code(&aap, &a), (400, "InvalidTimeStamp.Expired".into()));
}

#[test]
fn the_identity_is_served_as_the_rest_of_the_metadata() {
    let emulator = start();
    let get = |path: &str, headers: &str| {
        metadata(emulator.metadata_addr(), "GET", path, headers).expect("a reply")
    };
    let document = get("/latest/dynamic/instance-identity/document", "").body;
    assert!(document.ends_with('}') && !document.contains("audience"));
    let plain = get(PKCS7, "").body;
    assert!(!plain.contains(['\n', '-']) && !plain.is_empty());

    emulator.set_metadata_mode(MetadataMode::Hardened);
    assert_eq!(get(PKCS7, "").status, 403);
    let ttl = "x-aliyun-ecs-metadata-token-ttl-seconds: 60\r\n";
    let token = metadata(emulator.metadata_addr(), "PUT", "/latest/api/token", ttl).expect("a reply").body;
    let token = format!("x-aliyun-ecs-metadata-token: {token}\r\n");
    assert_eq!(get(PKCS7, &token).status, 200);
    emulator.set_identity_fault(Some(IdentityFault::NotFound));
    assert_eq!(get(PKCS7, &token).status, 404);
    assert_eq!(get("/latest/dynamic/instance-identity/document", &token).status, 404);
}

/// Neither our own writer nor our own reader of CMS is the judge here.
#[test]
fn openssl_verifies_the_identity() {
    let Some(openssl) = tool("openssl") else { return };
    let emulator = start();
    let folder = std::env::temp_dir().join(format!("kms-emulator-openssl-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder");
    let file = |name: &str| folder.join(name).display().to_string();
    let verify = |identity: &str| {
        let pem = format!("-----BEGIN PKCS7-----\n{identity}\n-----END PKCS7-----\n");
        fs::write(file("identity.pem"), pem).expect("written");
        fs::write(file("ca.pem"), emulator.identity_ca_pem()).expect("written");
        let (identity, ca) = (file("identity.pem"), file("ca.pem"));
        let arguments =
            ["cms", "-verify", "-purpose", "any", "-inform", "PEM", "-in", &identity, "-CAfile", &ca];
        command(&openssl).args(arguments).output().expect("openssl runs")
    };
    let good = verify(&emulator.instance_identity(Some("X")).expect("signed"));
    emulator.set_identity_fault(Some(IdentityFault::Tampered));
    let tampered = verify(&emulator.instance_identity(Some("X")).expect("signed"));
    emulator.set_identity_fault(Some(IdentityFault::OtherCa));
    let other = verify(&emulator.instance_identity(Some("X")).expect("signed"));
    let _ = fs::remove_dir_all(&folder);
    assert!(good.status.success(), "{}", String::from_utf8_lossy(&good.stderr));
    let document = String::from_utf8_lossy(&good.stdout).into_owned();
    assert!(
        document.starts_with("{\"zone-id\":\"cn-hangzhou-h\"") && document.ends_with(",\"audience\":\"X\"}")
    );
    assert!(!tampered.status.success() && !other.status.success());
}

// STS.

fn oidc(emulator: &Emulator, host: &str, changes: &[(&str, &str)]) -> Reply {
    let (role, provider) = (emulator.oidc_role_arn(), emulator.oidc_provider_arn());
    let (timestamp, nonce) = (iso8601(now().unsigned_abs()), unique());
    let mut pairs = vec![
        ("Action", "AssumeRoleWithOIDC"),
        ("Version", "2015-04-01"),
        ("Format", "JSON"),
        ("Timestamp", &timestamp),
        ("SignatureNonce", &nonce),
        ("RoleArn", &role),
        ("OIDCProviderArn", &provider),
        ("OIDCToken", "emulator-oidc-token"),
        ("RoleSessionName", "kms-agent"),
        ("DurationSeconds", "3600"),
    ];
    for (name, value) in changes {
        pairs.retain(|(n, _)| n != name);
        pairs.push((name, value));
    }
    post(emulator, &format!("host: {host}\r\n"), &pairs)
}

#[test]
fn an_oidc_token_assumes_its_role() {
    let emulator = start();
    for host in ["sts.aliyuncs.com", "sts-vpc.cn-hangzhou.aliyuncs.com:443", "127.0.0.1"] {
        let reply = oidc(&emulator, host, &[]);
        let who = issued(&reply);
        assert_eq!(
            reply.json()["AssumedRoleUser"]["Arn"],
            "acs:ram::1234567890123456:role/KmsAgentOidcRole/kms-agent"
        );
        gets_the_secret(&emulator, &who);
    }
    let counters = emulator.counters();
    assert_eq!((counters.sts_requests, counters.oidc_exchanges, counters.kms_requests), (3, 3, 3));

    let short = issued(&oidc(&emulator, "sts.aliyuncs.com", &[("DurationSeconds", "900")]));
    emulator.advance_clock(901);
    let reply = Call::get(&short, "agent-test").send(&emulator).expect("a reply");
    assert_eq!(reply.code(), "InvalidSecurityToken.Expired");
}

#[test]
fn sts_refuses_in_its_own_shape() {
    let emulator = start();
    let refused = |status: u16, code: &str, changes: &[(&str, &str)]| {
        let reply = oidc(&emulator, "sts.cn-hangzhou.aliyuncs.com", changes);
        let json = reply.json();
        assert_eq!((reply.status, json["Code"].as_str()), (status, Some(code)), "{changes:?}");
        assert_eq!(json["HostId"], "sts.cn-hangzhou.aliyuncs.com");
        assert!(json["RequestId"].is_string() && json["Message"].is_string());
    };
    let old = iso8601(now().unsigned_abs() - 3600);
    refused(401, "AuthenticationFail.OIDCToken.Invalid", &[("OIDCToken", "nonsense")]);
    refused(401, "AuthenticationFail.NoPermission", &[("OIDCProviderArn", "acs:ram::1:oidc-provider/x")]);
    refused(404, "EntityNotExist.Role", &[("RoleArn", "acs:ram::1234567890123456:role/other")]);
    refused(400, "InvalidParameter.RoleSessionName", &[("RoleSessionName", "a b")]);
    refused(400, "InvalidParameter.DurationSeconds", &[("DurationSeconds", "899")]);
    refused(400, "MissingParameter", &[("OIDCToken", "")]);
    refused(400, "InvalidVersion", &[("Version", "2016-01-20")]);
    refused(400, "InvalidTimeStamp.Expired", &[("Timestamp", &old)]);
    refused(404, "InvalidAction.NotFound", &[("Action", "AssumeRole")]);
    issued(&oidc(&emulator, "sts.aliyuncs.com", &[("SignatureNonce", "once")]));
    refused(400, "SignatureNonceUsed", &[("SignatureNonce", "once")]);

    emulator.set_oidc_token(Some("second"));
    refused(401, "AuthenticationFail.OIDCToken.Expired", &[]);
    issued(&oidc(&emulator, "sts.aliyuncs.com", &[("OIDCToken", "second")]));
    emulator.set_oidc_token(None);
    refused(401, "AuthenticationFail.OIDCToken.Expired", &[("OIDCToken", "second")]);
    emulator.inject(Fault::error(500, "InternalError").for_action("AssumeRoleWithOIDC"));
    refused(500, "InternalError", &[]);
}

// Credentials URI.

#[test]
fn the_credentials_uri_gives_credentials_or_fails_as_told() {
    let emulator = start();
    emulator.set_metadata_mode(MetadataMode::Hardened);
    assert!(emulator.credentials_uri().starts_with("http://127.0.0.1:"));
    let get = || metadata(emulator.metadata_addr(), "GET", "/credentials-uri", "").expect("a reply");
    let json = get().json();
    let text = |name: &str| json[name].as_str().expect("a text").to_owned();
    assert_eq!(text("Code"), "Success");
    let who = StsCredentials {
        access_key_id: text("AccessKeyId"),
        access_key_secret: text("AccessKeySecret"),
        security_token: text("SecurityToken"),
        expiration: 0,
    };
    gets_the_secret(&emulator, &who);
    assert_eq!(get().json()["AccessKeyId"], who.access_key_id.as_str());

    let with = |fault| {
        emulator.set_credentials_uri_fault(Some(fault));
        get()
    };
    assert_eq!(with(CredentialsUriFault::NotFound).status, 404);
    assert_eq!(with(CredentialsUriFault::Status500).status, 500);
    assert_eq!(with(CredentialsUriFault::NotSuccess).json()["Code"], "Failed");
    let malformed = with(CredentialsUriFault::Malformed);
    assert!(serde_json::from_str::<serde_json::Value>(&malformed.body).is_err());
    let expired = with(CredentialsUriFault::Expired).json();
    assert!(expired["Expiration"].as_str().expect("a date") < iso8601(now().unsigned_abs()).as_str());
    assert_eq!(emulator.counters().credentials_uri_reads, 2);
}
