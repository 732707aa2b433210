//! Proof by a client that nobody here wrote: Alibaba Cloud's official Python SDK. The interpreter is
//! `KMS_AGENT_TEST_PYTHON` (default `python3`). Without the SDK (`pip install -r requirements.txt`) the test is
//! skipped, except where `CI` is `true`.

#![allow(clippy::expect_used, reason = "helpers of tests are tests")]

mod support;

use kms_emulator::{Emulator, MetadataMode, NewSecret, Options};
use serde_json::json;
use support::host::{command, python_with};

const SECRET: &str = "agent-test/with+marks=@";
const VALUE: &str = "{\"user\":\"ü\",\"password\":\"p\\\"\"}";
const MODULES: &str = "alibabacloud_credentials, alibabacloud_kms20160120, alibabacloud_tea_openapi";

#[test]
fn official_python_sdk_is_served() {
    let Some(python) = python_with(MODULES) else { return };
    let emulator = Emulator::start(Options {
        secrets: vec![NewSecret::generic(SECRET, VALUE)],
        access_keys: vec![("LTAI5tTest".into(), "TestSecret".into())],
        metadata_mode: MetadataMode::Hardened,
        ..Options::default()
    })
    .expect("the emulator starts");
    let ca = std::env::temp_dir().join(format!("kms-emulator-test-{}.pem", std::process::id()));
    std::fs::write(&ca, emulator.ca_pem()).expect("the CA is written");
    let sts = emulator.issue_credentials();

    let output = command(&python)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python_sdk.py"))
        .env("EMULATOR_ENDPOINT", emulator.kms_addr().to_string())
        .env("EMULATOR_METADATA", emulator.metadata_addr().to_string())
        .env("EMULATOR_CA", &ca)
        .env("EMULATOR_SECRET", SECRET)
        .env("EMULATOR_VALUE", VALUE)
        .env("EMULATOR_AK", json!(["LTAI5tTest", "TestSecret"]).to_string())
        .env(
            "EMULATOR_STS",
            json!([sts.access_key_id, sts.access_key_secret, sts.security_token]).to_string(),
        )
        .output();
    let _ = std::fs::remove_file(&ca);
    let output = output.expect("Python starts");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stdout}\n{stderr}");
    assert_eq!(stdout.lines().filter(|line| line.starts_with("ok: ")).count(), 5, "{stdout}");

    let counters = emulator.counters();
    assert_eq!(counters.signature_failures, 0);
    assert_eq!(counters.gets(SECRET), 3);
    assert_eq!(counters.metadata_plain_gets, 0, "the SDK uses session tokens");
    assert_eq!(counters.credential_reads_total(), 1);
}
