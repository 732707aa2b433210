//! A body of KMS's under every status: how it is sorted, and what the two foreign formats make of a value.
#![no_main]

use kms_agent::http::response::Response;
use kms_agent::kms::format::{self, Kv};
use kms_agent::kms::reply::{
    self, CODE_BYTES_MAX, KmsError, MESSAGE_BYTES_MAX, REQUEST_ID_BYTES_MAX, Reply, Value, bare_name,
};
use kms_agent_fuzz::is_printable;
use libfuzzer_sys::fuzz_target;
use serde_json::value::RawValue;
use std::collections::BTreeMap;

const NOW_UNIX_S: i64 = 1_735_787_045;
/// The longest id that a client may ask for.
const ID_BYTES_MAX: usize = 512;

type Members<'a> = BTreeMap<String, &'a RawValue>;

fuzz_target!(|body: &[u8]| {
    for status in [200, 204, 302, 400, 403, 404, 408, 409, 429, 500, 503] {
        check(body, "db", status, &parse("db", status, body));
    }
    // Ask for what the reply is about, by its name and by an ARN.
    if let Some(name) = members(body).and_then(|members| text(&members, "SecretName")) {
        for asked in [format!("acs:kms:cn-hangzhou:1234:secret/{name}"), name] {
            check(body, &asked, 200, &parse(&asked, 200, body));
        }
    }
});

fn parse(asked: &str, status: u16, body: &[u8]) -> Reply {
    let response = Response {
        status,
        body: body.to_vec().into(),
        date_unix_s: Some(NOW_UNIX_S),
        retry_after_s: Some(9),
        keep_alive: true,
    };
    reply::parse(asked, response, NOW_UNIX_S)
}

fn members(body: &[u8]) -> Option<Members<'_>> {
    serde_json::from_slice(body).ok()
}

fn text(members: &Members<'_>, name: &str) -> Option<String> {
    serde_json::from_str(members.get(name)?.get()).ok()
}

fn check(body: &[u8], asked: &str, status: u16, reply: &Reply) {
    match reply {
        Reply::Value(value) => {
            assert_eq!(status, 200);
            check_value(body, asked, value);
        }
        Reply::Refused(error)
        | Reply::CredentialsRefused(error)
        | Reply::SignatureRefused(error)
        | Reply::Transient { error, .. }
        | Reply::Throttled { error, .. }
        | Reply::ClockSkew { error, .. } => {
            assert!((400..=599).contains(&status));
            check_error(error, status);
        }
        Reply::Invalid(problem) => {
            assert!(problem.is_ascii() && is_printable(problem) && problem.len() < 200)
        }
    }
    let transient = matches!(reply, Reply::Transient { .. } | Reply::Throttled { .. });
    assert!(transient || status != 429 || !matches!(reply, Reply::Refused(_) | Reply::Invalid(_)));
}

/// Fit for the log and for the client, whatever KMS wrote.
fn check_error(error: &KmsError, status: u16) {
    assert!(error.status == status || error.status == 502);
    assert!((1..=CODE_BYTES_MAX).contains(&error.code.len()));
    assert!(error.message.len() <= MESSAGE_BYTES_MAX && error.request_id.len() <= REQUEST_ID_BYTES_MAX);
    assert!(is_printable(&error.to_string()));
    assert!(!error.message.to_ascii_lowercase().contains("security-token"));
}

fn check_value(body: &[u8], asked: &str, value: &Value) {
    assert_eq!(value.body.as_slice(), body, "byte for byte");
    assert!(value.next_rotation_unix_s.is_none_or(|at| at > NOW_UNIX_S));
    let ours = members(body).expect("a value that is no JSON object");
    let name = text(&ours, "SecretName").expect("a value without a name");
    assert!(name == asked || name == bare_name(asked));
    let data = ours["SecretData"].get();

    if asked.len() <= ID_BYTES_MAX {
        let aws = json(format::aws(asked, body), body.len() + 6 * asked.len());
        let aws = members(&aws).unwrap();
        let (string, binary) = (aws.get("SecretString"), aws.get("SecretBinary"));
        assert!(string.is_some() != binary.is_some());
        assert_eq!(string.or(binary).unwrap().get(), data, "the secret as KMS wrote it");
        assert_eq!(text(&aws, "Name"), Some(name));
        assert!(serde_json::from_str::<Vec<String>>(aws["VersionStages"].get()).is_ok());
        assert_eq!(text(&aws, "ARN").as_deref(), asked.starts_with("acs:").then_some(asked));
        if let Some(created) = aws.get("CreatedDate") {
            let seconds: String = serde_json::from_str(created.get()).unwrap();
            seconds.parse::<i64>().expect("epoch seconds");
        }
    }

    let v1 = json(format::vault(Kv::V1, body, u64::MAX), body.len());
    check_vault_data(members(&v1).unwrap()["data"], data);
    let v2 = json(format::vault(Kv::V2, body, 0), body.len());
    let outer = members(members(&v2).unwrap()["data"].get().as_bytes()).unwrap();
    check_vault_data(outer["data"], data);
    let metadata = members(outer["metadata"].get().as_bytes()).unwrap();
    assert_eq!(metadata["version"].get(), "1");
    assert!(members(metadata["custom_metadata"].get().as_bytes()).is_some());
}

/// KV's `data` is always an object: that which the secret is, or one around it.
fn check_vault_data(data: &RawValue, secret: &str) {
    let inner = members(data.get().as_bytes());
    match serde_json::from_str::<String>(secret)
        .ok()
        .filter(|text| text.trim_start().starts_with('{') && serde_json::from_str::<&RawValue>(text).is_ok())
    {
        Some(object) => assert_eq!(data.get(), object.trim_matches([' ', '\t', '\r', '\n'])),
        None => assert_eq!(inner.expect("an object")["value"].get(), secret),
    }
}

/// Checks that it is JSON, each name once, and that its buffer never moved: a move would leave secret bytes behind.
fn json(formatted: impl AsRef<Vec<u8>>, foreign_bytes: usize) -> Vec<u8> {
    let formatted = formatted.as_ref();
    assert!(members(formatted).is_some(), "{}", String::from_utf8_lossy(formatted));
    assert_eq!(formatted.capacity(), foreign_bytes + format::OWN_BYTES);
    formatted.clone()
}
