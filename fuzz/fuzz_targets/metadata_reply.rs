//! Whole conversations about who the agent is, the answers given by the input.
//!
//! The input is cut at each 0xff. The first piece says who it is: its first byte, 1: the region is asked for too,
//! 2: hardened mode only, 4: a configured role, 8: by an access point, 16: a credentials URI to fall back on. Each
//! other piece is an answer: one byte for what comes back (`2` is 200, `1` 401, `3` 403, `4` 404, `5` 500, `x` no
//! HTTP, `t` a timeout), then the body.
#![no_main]

use kms_agent::call::{CallError, CallErrorKind, Service};
use kms_agent::config::{AapArn, HostPort, KmsSection};
use kms_agent::http::request::{Parsed, header_room, parse};
use kms_agent::http::response::Response;
use kms_agent::identity::{Identity, CredentialState};
use kms_agent::kms::sign::Credentials;
use kms_agent::random::Random;
use kms_agent::time::{Mono, Now};
use kms_agent_fuzz::is_printable;
use libfuzzer_sys::fuzz_target;
use std::time::Duration;

const UNIX_S: i64 = 1_735_787_045;
/// Token, region, role, credentials, the URI; the token once more, and what had been asked when it was refused.
const QUESTIONS_MAX: usize = 7;

fuzz_target!(|bytes: &[u8]| {
    let mut pieces = bytes.split(|byte| *byte == 0xff);
    let flags = pieces.next().and_then(<[u8]>::first).copied().unwrap_or(0);
    let mut identity = identity(flags);
    let mut mono = Mono::from_micros(3_600_000_000);
    let mut questions = 0;
    for piece in pieces {
        mono = mono.after(Duration::from_secs(600));
        let (kind, body) = piece.split_first().unwrap_or((&b'2', &[]));
        let Some(question) = identity.poll(mono) else { continue };
        check_request(&mut identity, question.service, Now { mono, unix_s: UNIX_S }, flags);
        questions += 1;
        assert!(questions <= QUESTIONS_MAX, "a conversation without end");
        identity.on_answer(answer(*kind, body).as_ref(), Now { mono, unix_s: UNIX_S });
        match identity.credentials(mono) {
            CredentialState::Pending => continue,
            CredentialState::Ready(credentials) => check(credentials),
            CredentialState::Failed { error, .. } => assert!(is_printable(&error.to_string()), "{error}"),
        }
        questions = 0;
    }
    if let Some(region) = identity.region() {
        assert!(!region.is_empty() && region.bytes().all(|byte| byte.is_ascii_graphic()));
    }
});

fn identity(flags: u8) -> Identity {
    let aap = AapArn::parse("acs:kms:cn-hangzhou:1234:applicationaccesspoint/app").expect("an ARN");
    let kms = KmsSection {
        endpoint: (flags & 1 == 0).then(|| HostPort { host: "kms".to_owned(), port: 443 }),
        role_name: (flags & 4 != 0).then(|| "role".to_owned()),
        aap_arn: (flags & 8 != 0).then_some(aap),
        ..KmsSection::default()
    };
    let env = |name: &str| match name {
        "ALIBABA_CLOUD_IMDSV1_DISABLED" if flags & 2 != 0 => Some("true".into()),
        "ALIBABA_CLOUD_CREDENTIALS_URI" if flags & 16 != 0 => Some("http://127.0.0.1/c".into()),
        _ => None,
    };
    Identity::from_config(&kms, &env, Random::from_seed(1)).expect("somebody to be")
}

fn answer(kind: u8, body: &[u8]) -> Result<Response, CallError> {
    let failed =
        |kind| Err(CallError { kind, message: "reply of host:80: no good".to_owned(), reached: false });
    let status = match kind {
        b'1' => 401,
        b'3' => 403,
        b'4' => 404,
        b'5' => 500,
        b'x' => return failed(CallErrorKind::InvalidResponse),
        b't' => return failed(CallErrorKind::Timeout),
        _ => 200,
    };
    Ok(Response {
        status,
        body: body.to_vec().into(),
        date_unix_s: None,
        retry_after_s: None,
        keep_alive: true,
    })
}

/// Whatever came before, what is asked next is one sound request: nothing of an answer breaks out of its line.
fn check_request(identity: &mut Identity, service: Service, now: Now, flags: u8) {
    let mut out = Vec::new();
    identity.write_request(&mut out, now);
    let text = || String::from_utf8_lossy(&out);
    if service == Service::Kms {
        // The agent's own parser takes no body.
        let (head, form) = out.split_at(out.windows(4).position(|it| it == b"\r\n\r\n").expect("a head") + 4);
        assert!(head.starts_with(b"POST / HTTP/1.1\r\n") && form.starts_with(b"AapArn="), "{}", text());
        assert!(form.iter().all(u8::is_ascii_graphic), "{}", text());
        return;
    }
    let mut room = header_room();
    let Parsed::Request(request, used) = parse(&out, &mut room) else { panic!("{}", text()) };
    assert_eq!(used, out.len());
    let token = request.header("X-aliyun-ecs-metadata-token").count();
    match (service, request.method) {
        (Service::Metadata, "PUT") => assert!(request.path == "/latest/api/token" && token == 0),
        (Service::Metadata, "GET") => {
            assert_eq!(request.host, Some("100.100.100.200"));
            assert!(request.path.starts_with("/latest/"));
            assert!(token == 1 || (token == 0 && flags & 2 == 0), "a plain GET though they are forbidden");
        }
        (Service::CredentialsUri { tls: false }, "GET") => assert_eq!((request.path, token), ("/c", 0)),
        (_, other) => panic!("{other}"),
    }
}

/// They go into header lines, and are still good.
fn check(credentials: &Credentials) {
    let is_word = |bytes: &[u8]| !bytes.is_empty() && bytes.iter().all(u8::is_ascii_graphic);
    assert!(is_word(credentials.access_key_id.as_bytes()));
    assert!(is_word(credentials.access_key_secret.expose()));
    assert!(credentials.security_token.as_ref().is_some_and(|token| is_word(token.expose())));
    assert!(credentials.expires_unix_s.is_some_and(|expires| expires > UNIX_S));
}
