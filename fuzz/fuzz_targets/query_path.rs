//! Paths and queries through the gates, with everything else about the request in order. Any bytes: what may not
//! stand in a target is percent-encoded first, so that no input is wasted on the request parser.
#![no_main]

use kms_agent::broker::gate::{self, Denial, ID_BYTES_MAX, SecretQuery, Route};
use kms_agent::code::Code;
use kms_agent::config::ResponseType;
use kms_agent::http::percent;
use kms_agent::http::request::{Parsed, header_room, parse};
use kms_agent_fuzz::{AGENT, is_printable};
use libfuzzer_sys::fuzz_target;

/// A route that can be kept: a secret's question without its borrows.
#[derive(Clone, Debug, PartialEq)]
enum Answer {
    /// A route that is one path and nothing else.
    Fixed(&'static str),
    Secret {
        id: String,
        version_id: Option<String>,
        version_stage: Option<String>,
        refresh_now: bool,
        kv: String,
    },
    Denied(Denial),
}

impl From<SecretQuery<'_>> for Answer {
    fn from(question: SecretQuery<'_>) -> Answer {
        Answer::Secret {
            id: question.id.into_owned(),
            version_id: question.version_id.map(Into::into),
            version_stage: question.version_stage.map(Into::into),
            refresh_now: question.refresh_now,
            kv: format!("{:?}", question.kv),
        }
    }
}

/// The answer to `GET <target>`; `None`: the target is too long.
fn answer(target: &str, response_type: ResponseType) -> Option<Answer> {
    let ask = |line: &str| {
        let head = format!("{line} HTTP/1.1\r\nHost: localhost\r\nX-KMS-Token: t0k\r\n\r\n");
        let mut room = header_room();
        let Parsed::Request(request, _) = parse(head.as_bytes(), &mut room) else { return None };
        let server = AGENT.servers.iter().find(|server| server.response_type == response_type)?;
        Some(match gate::pass(&request, server, &AGENT.token, false) {
            Ok(Route::Ping) => Answer::Fixed("/ping"),
            Ok(Route::Metrics) => Answer::Fixed("/metrics"),
            Ok(Route::Status) => Answer::Fixed("/status"),
            Ok(Route::Secret(question)) => question.into(),
            Err(denial) => Answer::Denied(denial),
        })
    };
    let answer = ask(&format!("GET {target}"))?;
    assert_eq!(ask(&format!("HEAD {target}")).as_ref(), Some(&answer));
    if let Some(absolute) = ask(&format!("GET http://localhost:2025{target}")) {
        assert_eq!(absolute, answer);
    }
    Some(answer)
}

fuzz_target!(|bytes: &[u8]| {
    let mut target = String::from("/");
    for byte in bytes.strip_prefix(b"/").unwrap_or(bytes) {
        if byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=:@/?".contains(byte) {
            target.push(char::from(*byte));
        } else {
            target.push_str(&format!("%{byte:02x}"));
        }
    }
    for server in &AGENT.servers {
        let kind = server.response_type;
        match answer(&target, kind) {
            None => assert!(target.len() > 8000, "{target}"),
            Some(Answer::Fixed(path)) => {
                assert!(
                    target.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('?'))
                );
            }
            Some(Answer::Denied(denial)) => {
                assert!(is_printable(&denial.message) && denial.message.len() <= 512);
                assert!(matches!(denial.code, Code::InvalidParameter | Code::NotFound), "{denial:?}");
            }
            Some(answer) => check_secret(&target, kind, &answer),
        }
    }
    if let Ok(id) = std::str::from_utf8(bytes) {
        check_round_trip(id);
    }
});

/// The question, as the plainest reading of the target has it.
fn check_secret(target: &str, kind: ResponseType, answer: &Answer) {
    let Answer::Secret { id, version_id, version_stage, refresh_now, kv } = answer else { unreachable!() };
    assert!((1..=ID_BYTES_MAX).contains(&id.len()));
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut parameters: Vec<(String, String)> = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        parameters.push((naive_decode(name, true), naive_decode(value, true)));
    }
    let take = |name: &str| {
        let values: Vec<_> = parameters.iter().filter(|(known, _)| known == name).collect();
        assert!(values.len() <= 1, "a repeated parameter was let through");
        values.first().map(|(_, value)| value.clone()).filter(|value| !value.is_empty())
    };
    if path == "/secretsmanager/get" {
        assert_eq!(take("secretId").as_ref(), Some(id));
        assert_eq!(kv, "V1");
    } else {
        assert!(take("secretId").is_none());
        let rest = path.strip_prefix("/v1/").expect("neither of the two paths");
        let rest = match rest.strip_prefix("secret/data/") {
            Some(rest) if kind == ResponseType::Vault => {
                assert_eq!(kv, "V2");
                rest
            }
            _ => {
                assert_eq!(kv, "V1");
                rest
            }
        };
        assert_eq!(&naive_decode(rest, false), id);
        assert!(!id.split('/').any(|segment| matches!(segment, "." | "..")));
    }
    assert_eq!(&take("versionId"), version_id);
    let stage = take("versionStage").map(|stage| match (kind, stage.as_str()) {
        (ResponseType::Aws, "AWSCURRENT") => "ACSCurrent".to_owned(),
        (ResponseType::Aws, "AWSPREVIOUS") => "ACSPrevious".to_owned(),
        _ => stage,
    });
    assert_eq!(&stage, version_stage);
    let refresh = take("refreshNow").map(|value| value.to_ascii_lowercase());
    assert_eq!(*refresh_now, matches!(refresh.as_deref(), Some("true" | "1")));
    assert!(matches!(refresh.as_deref(), None | Some("true" | "1" | "false" | "0")));
    let known = ["secretId", "versionId", "versionStage", "refreshNow"];
    assert!(parameters.iter().all(|(name, _)| known.contains(&name.as_str())));
}

/// Percent-decoding by splitting at each `%`; panics on what the gate should have refused.
fn naive_decode(text: &str, plus_is_space: bool) -> String {
    let text = if plus_is_space { text.replace('+', " ") } else { text.to_owned() };
    let mut pieces = text.split('%');
    let mut bytes = pieces.next().unwrap_or_default().as_bytes().to_vec();
    for piece in pieces {
        let (code, rest) = piece.split_at_checked(2).expect("a cut escape was let through");
        bytes.push(u8::from_str_radix(code, 16).expect("an escape that is none was let through"));
        bytes.extend_from_slice(rest.as_bytes());
    }
    String::from_utf8(bytes).expect("a text that is none was let through")
}

/// Whatever an id is, a client that encodes it asks for exactly this id, and on both ways.
fn check_round_trip(id: &str) {
    let mut encoded = String::new();
    percent::encode(id, &mut encoded);
    assert_eq!(percent::decode_query(&encoded).as_deref(), Ok(id));
    assert_eq!(percent::decode_path(&encoded).as_deref(), Ok(id));
    if !(1..=ID_BYTES_MAX).contains(&id.len()) {
        return;
    }
    let is_dotted = id.split('/').any(|segment| matches!(segment, "." | ".."));
    for (target, must_pass) in
        [(format!("/secretsmanager/get?secretId={encoded}"), true), (format!("/v1/{encoded}"), !is_dotted)]
    {
        let answer = answer(&target, ResponseType::Kms);
        let passed = matches!(&answer, Some(Answer::Secret { id: asked, .. }) if asked == id);
        assert_eq!(passed, must_pass, "{target}: {answer:?}");
    }
}
