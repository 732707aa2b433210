//! A client's bytes through the request parser and the gates. What is accepted must satisfy RFC 9112 as a
//! second, naive reading of the same bytes sees it: the two ends of a connection never disagree.
#![no_main]

use kms_agent::broker::gate::{self, Denial, ID_BYTES_MAX, Route};
use kms_agent::config::ResponseType;
use kms_agent::http::request::{
    HEAD_BYTES_MAX, HEADERS_MAX, Parsed, Request, TARGET_BYTES_MAX, header_room, parse,
};
use kms_agent_fuzz::{AGENT, TOKEN, is_printable};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut room = header_room();
    match parse(bytes, &mut room) {
        Parsed::NeedMore => assert!(bytes.len() < HEAD_BYTES_MAX, "a head without end is waited for"),
        Parsed::Reject(reject) => check_denial(&Denial::from(reject)),
        Parsed::Request(request, used) => {
            let head = bytes.get(..used).expect("more bytes used than there are");
            check_head(head, &request);
            check_again(head, &request);
            for server in &AGENT.servers {
                for busy in [false, true] {
                    match gate::pass(&request, server, &AGENT.token, busy) {
                        Ok(route) => check_route(head, &request, &route, server.response_type, busy),
                        Err(denial) => check_denial(&denial),
                    }
                }
            }
        }
    }
});

/// The accepted head, read once more in the plainest way there is.
fn check_head(head: &[u8], request: &Request<'_, '_>) {
    assert!(head.len() <= HEAD_BYTES_MAX);
    assert!(head.ends_with(b"\n\r\n") || head.ends_with(b"\n\n"));
    assert!(!head.contains(&0), "NUL");
    let bare_cr = head.windows(2).any(|pair| pair[0] == b'\r' && pair[1] != b'\n');
    assert!(!bare_cr, "a bare CR");

    let start = head.iter().position(|byte| !b"\r\n".contains(byte)).expect("nothing but empty lines");
    let mut lines =
        head[start..].split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let words: Vec<&[u8]> = lines.next().expect("a request line").split(|byte| *byte == b' ').collect();
    let [method, target, version] = words[..] else { panic!("not three words in the request line") };
    assert_eq!(method, request.method.as_bytes());
    assert!(target.len() <= TARGET_BYTES_MAX && target.iter().all(u8::is_ascii_graphic));
    assert_eq!(version, if request.http10 { &b"HTTP/1.0"[..] } else { b"HTTP/1.1" });

    let fields: Vec<&[u8]> = lines.take_while(|line| !line.is_empty()).collect();
    assert!(fields.len() <= HEADERS_MAX);
    for field in &fields {
        assert!(!field[0].is_ascii_whitespace(), "obs-fold");
        let colon = field.iter().position(|byte| *byte == b':').expect("a field without a colon");
        assert!(field[..colon].iter().all(|byte| byte.is_ascii_graphic()), "white space in a field's name");
    }
    let values = |name: &str| -> Vec<&[u8]> {
        let value = |field: &&'_ [u8]| -> Option<(usize, usize)> {
            let colon = field.iter().position(|byte| *byte == b':')?;
            field[..colon].eq_ignore_ascii_case(name.as_bytes()).then_some((colon + 1, field.len()))
        };
        fields
            .iter()
            .filter_map(|field| value(field).map(|(from, to)| field[from..to].trim_ascii()))
            .collect()
    };
    for name in ["Host", "Content-Length", "Transfer-Encoding", "Forwarded", "X-KMS-Token", "A"] {
        let found: Vec<&[u8]> = request.header(name).map(<[u8]>::trim_ascii).collect();
        assert_eq!(found, values(name), "{name}");
    }

    let (lengths, codings) = (values("Content-Length"), values("Transfer-Encoding"));
    assert!(lengths.len() + codings.len() <= 1, "two framings");
    let length = lengths.first().map(|value| {
        assert!(value.iter().all(u8::is_ascii_digit));
        std::str::from_utf8(value).unwrap().parse::<u64>().expect("a length")
    });
    assert_eq!(request.has_body, !codings.is_empty() || length.is_some_and(|length| length > 0));
    assert!(!(request.has_body && request.keep_alive), "a body that is not read ends the connection");
    assert!(!(request.has_body && matches!(request.method, "GET" | "HEAD")));
    let hosts = values("Host");
    assert!(hosts.len() == 1 || (hosts.is_empty() && request.http10));

    let target = std::str::from_utf8(target).unwrap();
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=:@/".contains(&byte);
    assert!(request.path.bytes().all(allowed), "{:?}", request.path);
    assert!(request.query.unwrap_or("").bytes().all(|byte| allowed(byte) || byte == b'?'));
    match request.method {
        "CONNECT" => assert!(request.path.is_empty() && request.query.is_none()),
        "OPTIONS" if request.path == "*" => assert_eq!(target, "*"),
        _ => {
            assert!(request.path.starts_with('/'));
            let query = request.query.map(|query| format!("?{query}")).unwrap_or_default();
            let end = format!("{}{query}", request.path);
            assert!(target.ends_with(&end) || (request.path == "/" && target.ends_with(&query)));
            // A host of the header counts only where the target names none (RFC 9112 3.2.2).
            let host = request.host.map(str::as_bytes);
            if target.starts_with('/') {
                assert_eq!(host.is_some(), !hosts.is_empty());
                assert!(host.is_none_or(|host| hosts[0].starts_with(host)));
            } else {
                assert!(target[7..].as_bytes().starts_with(host.expect("an authority has a host")));
            }
        }
    }
}

/// The head alone, and with something behind it, is the same request.
fn check_again(head: &[u8], request: &Request<'_, '_>) {
    let mut more = head.to_vec();
    more.extend_from_slice(b"\r\nGET /ping\x00: \xff");
    for bytes in [head, &more] {
        let mut room = header_room();
        let Parsed::Request(again, used) = parse(bytes, &mut room) else {
            panic!("no request the second time")
        };
        assert_eq!(used, head.len());
        assert_eq!(format!("{again:?}"), format!("{request:?}"));
    }
}

fn check_route(head: &[u8], request: &Request<'_, '_>, route: &Route<'_>, kind: ResponseType, busy: bool) {
    assert!(matches!(request.method, "GET" | "HEAD"));
    let host = request.host.unwrap_or("localhost").to_ascii_lowercase();
    assert!(
        ["localhost", "127.0.0.1", "[::1]", "agent.internal", "[agent.internal]", "[::2]"]
            .contains(&host.as_str()),
        "{host}"
    );
    let Route::Secret(question) = route else {
        assert_eq!(request.path, "/ping");
        return;
    };
    assert!(!busy && request.path != "/ping");
    assert!(head.windows(TOKEN.len()).any(|window| window == TOKEN), "no token");
    assert!(!request.has_header("Forwarded") && !request.has_header("X-Forwarded-For"));
    assert!((1..=ID_BYTES_MAX).contains(&question.id.len()));
    if request.path != "/secretsmanager/get" {
        assert!(!question.id.split('/').any(|segment| matches!(segment, "." | "..")));
    }
    assert!(question.version_id.as_deref() != Some("") && question.version_stage.as_deref() != Some(""));
    if kind == ResponseType::Aws {
        assert!(!matches!(question.version_stage.as_deref(), Some("AWSCURRENT" | "AWSPREVIOUS")));
    }
}

/// A denial is one of the table in `docs/contract.md`, section 3, and its text is fit to be shown.
fn check_denial(denial: &Denial) {
    let known = [
        (400, "InvalidRequest"),
        (505, "InvalidRequest"),
        (431, "RequestHeaderTooLarge"),
        (414, "UriTooLong"),
        (429, "ConnectionLimitExceeded"),
        (403, "ForbiddenHost"),
        (400, "Forwarded"),
        (403, "InvalidToken"),
        (405, "MethodNotAllowed"),
        (404, "NotFound"),
        (400, "InvalidParameter"),
    ];
    assert!(known.contains(&(denial.status, denial.code.label())), "{denial:?}");
    assert!(is_printable(&denial.message) && denial.message.chars().count() <= 192, "{denial:?}");
}
