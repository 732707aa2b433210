//! `packaging/ram`: the policies are JSON, allow what the agent needs and nothing else, and its README knows
//! every file and placeholder.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use serde_json::{Value, json};
use std::fs;
use std::path::Path;

fn file(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

fn policy(name: &str) -> Value {
    serde_json::from_str(&file(&format!("packaging/ram/{name}"))).unwrap()
}

#[test]
fn only_ecs_instances_may_assume_the_role() {
    let expected = json!([{
        "Effect": "Allow",
        "Action": "sts:AssumeRole",
        "Principal": { "Service": ["ecs.aliyuncs.com"] },
    }]);
    let trust = policy("ecs-trust-policy.json");
    assert_eq!((&trust["Version"], &trust["Statement"]), (&json!("1"), &expected));
}

#[test]
fn the_permission_policy_allows_two_actions_on_named_resources() {
    let policy = policy("permission-policy.json");
    assert_eq!(policy["Version"], "1");
    let statements = policy["Statement"].as_array().unwrap();
    let text = |statement: &Value, field: &str| statement[field].as_str().unwrap().to_owned();
    let allowed: Vec<(String, String)> =
        statements.iter().map(|it| (text(it, "Action"), text(it, "Resource"))).collect();
    let expected = [
        ("kms:GetSecretValue", "acs:kms:REGION:ACCOUNT:secret/PREFIX*"),
        ("kms:Decrypt", "acs:kms:REGION:ACCOUNT:key/KEY_ID"),
    ];
    assert_eq!(allowed, expected.map(|(action, resource)| (action.to_owned(), resource.to_owned())));
    assert!(statements.iter().all(|it| it["Effect"] == "Allow"));
}

#[test]
fn the_readme_fills_in_every_placeholder_and_is_linked() {
    let readme = file("packaging/ram/README.md");
    for placeholder in ["REGION", "ACCOUNT", "PREFIX", "KEY_ID"] {
        assert!(readme.contains(&format!("\n{placeholder}=")), "{placeholder} is set nowhere");
        let filled_in =
            [format!("s/{placeholder}/${placeholder}/"), format!("s|{placeholder}|${placeholder}|")];
        assert!(filled_in.iter().any(|it| readme.contains(it)), "{placeholder} is not filled in");
    }
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/ram")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(name == "README.md" || readme.contains(&format!("]({name})")), "{name} is not in the README");
    }
    assert!(file("README.md").contains("(packaging/ram/README.md)"));
}
