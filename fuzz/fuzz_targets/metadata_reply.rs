//! A whole conversation with the metadata service, its answers given by the input.
//!
//! The input is cut at each 0xff. The first piece says what is wanted (its first byte: 1 the region too, 2 hardened
//! mode only, 4 a configured role), each other one is an answer: one byte for what comes back (`2` is 200, `1` 401,
//! `3` 403, `4` 404, `5` 500, `x` no HTTP, `t` a timeout), then the body.
#![no_main]

use kms_agent::call::{CallError, CallErrorKind};
use kms_agent::http::request::{Parsed, header_room, parse};
use kms_agent::http::response::Response;
use kms_agent::identity::metadata::{Metadata, Progress, Wanted, parse_credentials};
use kms_agent::kms::sign::Credentials;
use kms_agent::time::{Mono, Now};
use kms_agent_fuzz::is_printable;
use libfuzzer_sys::fuzz_target;

const UNIX_S: i64 = 1_735_787_045;
/// Token, region, role, credentials; the token once more, and what had been asked when it was refused.
const QUESTIONS_MAX: usize = 6;

fuzz_target!(|bytes: &[u8]| {
    let mut pieces = bytes.split(|byte| *byte == 0xff);
    let flags = pieces.next().and_then(<[u8]>::first).copied().unwrap_or(0);
    let wanted = Wanted {
        role: (flags & 4 != 0).then(|| "role".to_owned()),
        region: flags & 1 != 0,
        hardened_only: flags & 2 != 0,
    };
    let mut metadata = Metadata::new(wanted);
    let mut mono = Mono::from_micros(3_600_000_000);
    metadata.begin(mono);
    let mut questions = 0;
    for piece in pieces {
        mono = mono.after(std::time::Duration::from_secs(600));
        let (kind, body) = piece.split_first().unwrap_or((&b'2', &[]));
        if let Ok(credentials) = parse_credentials(body, UNIX_S) {
            check(&credentials);
        }
        check_request(&mut metadata, flags);
        questions += 1;
        assert!(questions <= QUESTIONS_MAX, "a conversation without end");
        let answer = answer(*kind, body);
        match metadata.on_answer(answer.as_ref(), Now { mono, unix_s: UNIX_S }) {
            Ok(Progress::More) => continue,
            Ok(Progress::Done(credentials)) => {
                check(&credentials);
                assert_eq!(metadata.region().is_some(), flags & 1 != 0);
            }
            Err(error) => assert!(is_printable(&error.to_string()), "{error}"),
        }
        metadata.begin(mono);
        questions = 0;
    }
    if let Some(region) = metadata.region() {
        assert!(!region.is_empty() && region.bytes().all(|byte| byte.is_ascii_graphic()));
    }
});

fn answer(kind: u8, body: &[u8]) -> Result<Response, CallError> {
    let failed = |kind| Err(CallError { kind, message: "reply of host:80: no good".to_owned(), reached: false });
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
fn check_request(metadata: &mut Metadata, flags: u8) {
    let mut out = Vec::new();
    metadata.write_request(&mut out, "100.100.100.200");
    let mut room = header_room();
    let Parsed::Request(request, used) = parse(&out, &mut room) else {
        panic!("{}", String::from_utf8_lossy(&out));
    };
    assert_eq!(used, out.len());
    assert_eq!(request.host, Some("100.100.100.200"));
    let token = request.header("X-aliyun-ecs-metadata-token").count();
    match request.method {
        "PUT" => assert!(request.path == "/latest/api/token" && token == 0),
        "GET" => {
            assert!(request.path.starts_with("/latest/meta-data/"));
            assert!(token == 1 || (token == 0 && flags & 2 == 0), "a plain GET though they are forbidden");
        }
        other => panic!("{other}"),
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
