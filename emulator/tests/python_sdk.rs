//! Proof by a client that nobody here wrote: Alibaba Cloud's official Python SDK. The interpreter is
//! `KMS_AGENT_TEST_PYTHON` (default `python3`). Without the SDK (`pip install -r requirements.txt`) the test
//! says that it was skipped and passes, except where `CI` is `true`.

use kms_emulator::{Emulator, MetadataMode, NewSecret, Options};
use serde_json::json;
use std::process::Command;

const SECRET: &str = "agent-test/with+marks=@";
const VALUE: &str = "{\"user\":\"ü\",\"password\":\"p\\\"\"}";
/// What python_sdk.py exits with when the SDK cannot be imported.
const NOT_INSTALLED: i32 = 77;

#[test]
fn official_python_sdk_is_served() {
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

    let python = std::env::var("KMS_AGENT_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let output = Command::new(&python)
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
        // What the developer's own shell holds must not reach the SDK.
        .envs(["NO_PROXY", "no_proxy"].map(|name| (name, "127.0.0.1")))
        .env_remove("ALIBABA_CLOUD_ECS_METADATA")
        .env_remove("ALIBABA_CLOUD_ECS_METADATA_DISABLED")
        .env_remove("ALIBABA_CLOUD_IMDSV1_DISABLED")
        .output();
    let _ = std::fs::remove_file(&ca);

    let output = match output {
        Ok(output) if output.status.code() != Some(NOT_INSTALLED) => output,
        missing => {
            let why = missing
                .map_or_else(|e| e.to_string(), |o| String::from_utf8_lossy(&o.stdout).trim().to_owned());
            assert!(std::env::var("CI").as_deref() != Ok("true"), "CI must have the SDK: {python}: {why}");
            println!(
                "skipped: {python} has no Alibaba Cloud SDK ({why}); see emulator/tests/requirements.txt"
            );
            return;
        }
    };
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stdout}\n{stderr}");
    assert_eq!(stdout.lines().filter(|line| line.starts_with("ok: ")).count(), 5, "{stdout}");

    let counters = emulator.counters();
    assert_eq!(counters.signature_failures, 0);
    assert_eq!(counters.gets(SECRET), 3);
    assert_eq!(counters.metadata_plain_gets, 0, "the SDK uses session tokens");
    assert_eq!(counters.credential_reads_total(), 1);
}
