//! Any text as a configuration: either within every documented range, or refused in lines that a person can read.
#![no_main]

use kms_agent::config::{AapArn, AuthType, Config, ENDPOINT_PORT, HostPort, Problem, parse};
use kms_agent_fuzz::is_printable;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| match parse(text) {
    Ok(config) => check(&config),
    Err(problems) => check_problems(text, &problems),
});

/// The ranges of `docs/contract.md`, which the agent has as constants of its own.
fn check(config: &Config) {
    let server = &config.server;
    assert!((1..=8).contains(&server.ssrf_headers.len()));
    let is_token = |name: &String| {
        (1..=128).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"(),/:;<=>?@[\\]{}".contains(&byte))
    };
    assert!(server.ssrf_headers.iter().all(is_token));
    assert!(server.ssrf_env_variables.len() <= 16);
    let is_variable = |name: &String| {
        (1..=128).contains(&name.len()) && !name.contains(['=', '\0', ' ']) && name.is_ascii()
    };
    assert!(server.ssrf_env_variables.iter().all(is_variable));
    assert!(server.path_prefix.starts_with('/') && server.path_prefix.ends_with('/'));
    assert!(server.path_prefix.len() <= 256 && !server.path_prefix.contains(['%', '?', '#', ' ']));
    assert!((1..=1000).contains(&server.max_conn));
    assert!(server.allowed_hosts.len() <= 64);
    server.allowed_hosts.iter().for_each(|host| check_host(host));

    assert!((1..=1000).contains(&config.cache.size));
    assert!((65_536..=268_435_456).contains(&config.cache.bytes));
    for life in [config.cache.ttl, config.cache.max_stale] {
        assert!(life.as_secs() <= 604_800 && life.subsec_nanos() == 0);
    }

    let kms = &config.kms;
    assert!(kms.region.as_ref().is_none_or(|region| (1..=32).contains(&region.len())));
    assert!(kms.role_name.as_ref().is_none_or(|role| (1..=64).contains(&role.len())));
    for origin in kms.endpoint.iter().chain([&kms.metadata_endpoint]) {
        assert!(origin.port > 0);
        check_host(&origin.host);
        assert_eq!(HostPort::parse(&origin.to_string(), 1).as_ref(), Ok(origin), "reads what it wrote");
        let authority = origin.authority(ENDPOINT_PORT);
        assert_eq!(HostPort::parse(&authority, ENDPOINT_PORT).as_ref(), Ok(origin));
    }
    assert!(kms.aap_arn.is_some() || kms.auth_type != AuthType::InstanceIdentity);
    if let Some(arn) = &kms.aap_arn {
        assert!((1..=128).contains(&arn.name.len()));
        assert_eq!(AapArn::parse(arn.as_str()).as_ref(), Ok(arn));
    }

    assert!((1..=1024).contains(&config.log.file_size_mb));
    assert!(config.log.backup_files <= 100);
}

/// Goes into `Host` headers, and is compared with them.
fn check_host(host: &str) {
    assert!((1..=253).contains(&host.len()), "{host}");
    assert!(host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte)), "{host}");
    assert!(!host.bytes().any(|byte| byte.is_ascii_uppercase()), "{host}");
}

/// At least one, in the order of their lines, each a line of its own.
fn check_problems(text: &str, problems: &[Problem]) {
    assert!(!problems.is_empty());
    let lines = text.split('\n').count();
    let place = |problem: &Problem| problem.line.unwrap_or(usize::MAX);
    assert!(problems.is_sorted_by_key(place));
    for problem in problems {
        assert!(problem.line.is_none_or(|line| (1..=lines).contains(&line)), "{problem}: {lines} lines");
        let shown = problem.to_string();
        assert!(is_printable(&shown), "{shown:?}");
        assert!(shown.chars().count() < 1200, "{shown}");
        assert!(!problem.message.is_empty());
    }
}
