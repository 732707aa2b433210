//! What comes in and what becomes of it: raw requests, the replies they must get, and whether the connection
//! is kept or closed. Sections are those of RFC 9112 unless another document is named; "contract" is
//! `docs/contract.md`, section 3.
//!
//! Each row is sent twice: in one piece, and in many (byte by byte, if it is short). Replies are written as
//! `status Code`, or `200 X-Cache` for a secret, one for each request that must be answered, in order, with
//! ` | ` between them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use Fate::{Closed, Kept};
use common::{Agent, Connection, Reply, Setup, TOKEN, emulator, http, secret_target, wait_until};
use std::time::Duration;

/// What becomes of the connection after the last reply.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Kept,
    Closed,
}

/// Rule, bytes, replies, fate.
type Row<B> = (&'static str, B, &'static str, Fate);

const PING: &str = "GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n";
/// Malformed.
const BAD: &str = "400 InvalidRequest";
/// Sound, but without a token.
const NO_TOKEN: &str = "403 InvalidToken";

/// An agent of its own for a table.
fn check_all<B: AsRef<[u8]>>(rows: impl IntoIterator<Item = Row<B>>) {
    let emulator = emulator(&[("a", "1")]);
    let agent = Agent::start(&emulator);
    for (rule, bytes, replies, fate) in rows {
        check(&agent, rule, bytes.as_ref(), replies, fate);
    }
}

#[track_caller]
fn check(agent: &Agent, rule: &str, bytes: &[u8], replies: &str, fate: Fate) {
    let many = match bytes.len() {
        // A client must not send another request after its last one (RFC 9112 9.6): what comes once the agent
        // has closed is answered by a reset, so these rows are only sent whole.
        length if rule.contains("up to the last") => length,
        0..=1024 => 1,
        _ => 1000,
    };
    for piece in [bytes.len(), many] {
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]);
        let context = format!("{rule}: {shown:?} in pieces of {piece}");
        let mut connection = agent.connect();
        for piece in bytes.chunks(piece) {
            connection.try_send(piece).unwrap_or_else(|error| panic!("{context}: {error}"));
        }
        check_replies(&mut connection, &context, replies, fate);
    }
}

#[track_caller]
fn check_replies(connection: &mut Connection, context: &str, replies: &str, fate: Fate) {
    let expected: Vec<&str> = replies.split(" | ").collect();
    for (number, one) in expected.iter().enumerate() {
        let (method, one) = one.strip_prefix("HEAD ").map_or(("GET", *one), |rest| ("HEAD", rest));
        let reply = connection.reply_to(method).unwrap_or_else(|error| panic!("{context}: {error}"));
        assert_eq!(verdict(&reply), one, "{context}: {}", reply.text());
        assert_sound(&reply, context);
        let is_last = number + 1 == expected.len();
        assert_eq!(reply.closes(), is_last && fate == Closed, "{context}: {:?}", reply.headers);
    }
    match fate {
        // An error here is a reset, which may take the reply away from a client that has not read it yet.
        Closed => {
            assert_eq!(connection.rest().unwrap_or_else(|e| panic!("{context}: {e}")), b"", "{context}")
        }
        Kept => {
            connection.send(PING);
            let reply = connection.reply().unwrap_or_else(|error| panic!("{context}: not kept: {error}"));
            assert_eq!(reply.text(), "healthy", "{context}: something else was left over");
        }
    }
}

fn verdict(reply: &Reply) -> String {
    let json = reply.header("Content-Type") == Some("application/json") && !reply.body.is_empty();
    if json { reply.verdict() } else { reply.status.to_string() }
}

/// Contract: what every reply carries.
#[track_caller]
fn assert_sound(reply: &Reply, context: &str) {
    let date = reply.header("Date").unwrap_or_default();
    assert!(date.len() == 29 && date.ends_with(" GMT"), "{context}: Date {date:?}");
    assert_eq!(reply.header("Cache-Control"), Some("no-store"), "{context}");
    let content_type = reply.header("Content-Type");
    assert!(matches!(content_type, Some("application/json" | "text/plain")), "{context}: {content_type:?}");
    assert!(reply.header("Content-Length").is_some(), "{context}");
    assert_eq!(reply.header("Transfer-Encoding"), None, "{context}");
    assert_eq!(reply.version, "HTTP/1.1", "{context}: RFC 9110 2.5: our own highest version");
    assert_eq!(reply.header("Allow"), (reply.status == 405).then_some("GET, HEAD"), "{context}");
}

/// A GET of `/ping` with further header lines.
fn lines(lines: &str) -> String {
    format!("GET /ping HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n")
}

// ---- RFC 9112 2 and 3: the request line ----

#[test]
fn request_lines() {
    let long_method = "M".repeat(65) + " /ping HTTP/1.1";
    let rows = [
        ("3 single spaces", "GET /ping HTTP/1.1", "200", Kept),
        ("3 two spaces", "GET  /ping HTTP/1.1", BAD, Closed),
        ("3 two spaces", "GET /ping  HTTP/1.1", BAD, Closed),
        ("3 a tab", "GET\t/ping HTTP/1.1", BAD, Closed),
        ("3 a space before it", " GET /ping HTTP/1.1", BAD, Closed),
        ("3 a space after it", "GET /ping HTTP/1.1 ", BAD, Closed),
        ("3 four words", "GET /ping x HTTP/1.1", BAD, Closed),
        ("3 no target", "GET HTTP/1.1", BAD, Closed),
        ("3 HTTP/0.9", "GET /ping", BAD, Closed),
        ("3.1 a method is a token", "G@T /ping HTTP/1.1", BAD, Closed),
        ("3.1 a method is a token", "G\"T /ping HTTP/1.1", BAD, Closed),
        ("3.1 a method is a token", "G\0T /ping HTTP/1.1", BAD, Closed),
        ("3.1 methods are case-sensitive", "get /ping HTTP/1.1", "405 MethodNotAllowed", Kept),
        ("RFC 9110 9.1 a method nobody knows", "BREW /ping HTTP/1.1", "405 MethodNotAllowed", Kept),
        ("3.1 a long one is a method too", &long_method, "405 MethodNotAllowed", Kept),
        ("2.3 in lower case", "GET /ping http/1.1", BAD, Closed),
        ("2.3 without numbers", "GET /ping HTTP/", BAD, Closed),
        ("2.3 one digit each", "GET /ping HTTP/1.10", BAD, Closed),
        ("2.3 one digit each", "GET /ping HTTP/01.1", BAD, Closed),
        ("2.3 no digit", "GET /ping HTTP/1.x", BAD, Closed),
        ("2.3 no dot", "GET /ping HTTP/1", BAD, Closed),
        ("2.3 another name", "GET /ping HTTPS/1.1", BAD, Closed),
        ("RFC 9110 15.6.6 a sound version", "GET /ping HTTP/0.9", "505 InvalidRequest", Closed),
        ("RFC 9110 15.6.6 a sound version", "GET /ping HTTP/1.2", "505 InvalidRequest", Closed),
        ("RFC 9110 15.6.6 a sound version", "GET /ping HTTP/2.0", "505 InvalidRequest", Closed),
        ("RFC 9110 15.6.6 a sound version", "BREW /x HTTP/9.9", "505 InvalidRequest", Closed),
    ];
    check_all(rows.map(|(rule, line, replies, fate)| {
        (rule, format!("{line}\r\nHost: localhost\r\n\r\n"), replies, fate)
    }));
}

#[test]
fn line_ends_and_empty_lines() {
    check_all([
        (
            "2.2 an empty line before a request",
            "\r\nGET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n",
            "200",
            Kept,
        ),
        ("2.2 several", "\r\n\r\n\r\nGET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n", "200", Kept),
        (
            "2.2 and between requests",
            "GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n\r\nGET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n",
            "200 | 200",
            Kept,
        ),
        (
            "2.2 a bare LF ends a line (a recipient may)",
            "GET /ping HTTP/1.1\nHost: localhost\n\n",
            "200",
            Kept,
        ),
        ("2.2 a bare CR does not", "GET /ping HTTP/1.1\rHost: localhost\r\r", BAD, Closed),
        ("2.2 nor in a value", "GET /ping HTTP/1.1\r\nHost: localhost\r\nA: b\rc\r\n\r\n", BAD, Closed),
        ("2.2 nor before a name", "GET /ping HTTP/1.1\r\nHost: localhost\r\n\rA: b\r\n\r\n", BAD, Closed),
        ("2.2 nor at the end", "GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\r\n", BAD, Closed),
        ("2.2 CR CR LF", "GET /ping HTTP/1.1\r\r\nHost: localhost\r\n\r\n", BAD, Closed),
        (
            "2.2 a space before the first header",
            "GET /ping HTTP/1.1\r\n Host: localhost\r\n\r\n",
            BAD,
            Closed,
        ),
    ]);
}

#[test]
fn request_targets() {
    check_all(
        [
            ("3.2.1 origin-form", "GET /ping", "localhost", "200", Kept),
            ("3.2.1 with a query", "GET /ping?a=b?c&d=/:@!$'()*,;~%41", "localhost", "200", Kept),
            ("3.2.1 path-abempty", "GET //ping", "localhost", NO_TOKEN, Kept),
            ("3.2.1 no leading slash", "GET ping", "localhost", BAD, Closed),
            ("3.2.1 a query alone", "GET ?x", "localhost", BAD, Closed),
            ("3.2.2 absolute-form", "GET http://localhost/ping", "localhost", "200", Kept),
            ("3.2.2 it overrides Host", "GET http://localhost/ping", "evil.example", "200", Kept),
            ("3.2.2 either way", "GET http://evil.example/ping", "localhost", "403 ForbiddenHost", Kept),
            ("3.2.2 with a port", "GET http://127.0.0.1:2025/ping", "x", "200", Kept),
            ("RFC 3986 3.1 in any case", "GET HTTP://LOCALHOST/ping", "x", "200", Kept),
            ("RFC 3986 3.2.2 IPv6", "GET http://[::1]:2025/ping", "x", "200", Kept),
            ("3.2.2 without a path", "GET http://localhost", "localhost", NO_TOKEN, Kept),
            ("3.2.2 a query without a path", "GET http://localhost?x", "localhost", NO_TOKEN, Kept),
            ("contract: Host is wanted all the same", "GET http://localhost/ping", "\0", BAD, Closed),
            ("RFC 9110 4.2.1 an empty host", "GET http:///ping", "localhost", BAD, Closed),
            ("RFC 9110 4.2.4 user information", "GET http://u:p@localhost/ping", "localhost", BAD, Closed),
            ("RFC 3986 3.2.3 no port", "GET http://localhost:x/ping", "localhost", BAD, Closed),
            ("RFC 3986 3.2.2 an open bracket", "GET http://[::1/ping", "localhost", BAD, Closed),
            (
                "RFC 9110 4.2.2 https is another service",
                "GET https://localhost/ping",
                "localhost",
                BAD,
                Closed,
            ),
            ("3.2.2 another scheme", "GET ftp://localhost/ping", "localhost", BAD, Closed),
            ("3.2.2 no scheme", "GET ://localhost/ping", "localhost", BAD, Closed),
            ("3.2.3 authority-form is for CONNECT", "GET localhost:80", "localhost", BAD, Closed),
            ("3.2.3 and CONNECT has no other", "CONNECT /ping", "localhost", BAD, Closed),
            ("3.2.3 nor this", "CONNECT http://localhost:80/", "localhost", BAD, Closed),
            ("3.2.3 nor this", "CONNECT *", "localhost", BAD, Closed),
            ("3.2.3 a port is wanted", "CONNECT localhost", "localhost", BAD, Closed),
            ("3.2.3 sound", "CONNECT localhost:80", "localhost", NO_TOKEN, Kept),
            ("3.2.3 its host counts", "CONNECT evil.example:80", "localhost", "403 ForbiddenHost", Kept),
            ("3.2.4 asterisk-form is for OPTIONS", "GET *", "localhost", BAD, Closed),
            ("3.2.4 asterisk-form is for OPTIONS", "HEAD *", "localhost", "HEAD 400", Closed),
            ("3.2.4 sound", "OPTIONS *", "localhost", NO_TOKEN, Kept),
            ("3.2.4 OPTIONS has origin-form too", "OPTIONS /ping", "localhost", "405 MethodNotAllowed", Kept),
            ("3.2.4 not quite", "OPTIONS **", "localhost", BAD, Closed),
            ("3.2 a fragment", "GET /ping#x", "localhost", BAD, Closed),
            ("3.2 in a query", "GET /ping?x#y", "localhost", BAD, Closed),
            ("3.2 in absolute-form", "GET http://localhost/ping#y", "localhost", BAD, Closed),
            ("3.2 in an authority", "GET http://localhost#y", "localhost", BAD, Closed),
            ("RFC 3986 2 UTF-8", "GET /p\u{ef}ng", "localhost", BAD, Closed),
            ("RFC 3986 2 UTF-8 in a query", "GET /ping?\u{ef}", "localhost", BAD, Closed),
            ("RFC 3986 2 a quote", "GET /ping?\"", "localhost", BAD, Closed),
            ("RFC 3986 2 a backslash", "GET /a\\b", "localhost", BAD, Closed),
            ("RFC 3986 2 a caret", "GET /a^b", "localhost", BAD, Closed),
            ("RFC 3986 2 braces", "GET /{a}", "localhost", BAD, Closed),
            ("RFC 3986 2 brackets", "GET /ping?a[]=b", "localhost", BAD, Closed),
            ("RFC 3986 2 a bar", "GET /a|b", "localhost", BAD, Closed),
            ("RFC 3986 2 NUL", "GET /ping?\0", "localhost", BAD, Closed),
            ("RFC 3986 2 DEL", "GET /ping?\x7f", "localhost", BAD, Closed),
        ]
        .map(|(rule, target, host, replies, fate)| {
            // Never a Host with a NUL: that row has none.
            let host = if host == "\0" { String::new() } else { format!("Host: {host}\r\n") };
            (rule, format!("{target} HTTP/1.1\r\n{host}\r\n"), replies, fate)
        }),
    );
    check_all([
        ("3.2 bytes that are no text", &b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n"[..], BAD, Closed),
        ("3.2 nor in a query", b"GET /ping?\xc3 HTTP/1.1\r\nHost: localhost\r\n\r\n", BAD, Closed),
    ]);
}

// ---- RFC 9112 3.2 and RFC 9110 7.2: Host ----

#[test]
fn hosts() {
    const FORBIDDEN: &str = "403 ForbiddenHost";
    let rows = [
        ("contract", "Host: localhost\r\n", "200", Kept),
        ("RFC 9110 4.2.3 in any case", "hOST: LocalHost\r\n", "200", Kept),
        ("RFC 9110 7.2 with a port", "Host: localhost:2025\r\n", "200", Kept),
        ("RFC 3986 3.2.3 an empty port", "Host: localhost:\r\n", "200", Kept),
        ("contract", "Host: 127.0.0.1:1\r\n", "200", Kept),
        ("contract", "Host: [::1]\r\n", "200", Kept),
        ("contract: AllowedHosts", "Host: agent.internal:2025\r\n", "200", Kept),
        ("5.1 white space around it", "Host: \t localhost \t \r\n", "200", Kept),
        ("3.2 missing", "A: b\r\n", BAD, Closed),
        ("3.2 repeated", "Host: localhost\r\nHost: localhost\r\n", BAD, Closed),
        ("3.2 repeated, far apart", "Host: localhost\r\nA: b\r\nhOsT: evil.example\r\n", BAD, Closed),
        ("contract: another one", "Host: evil.example\r\n", FORBIDDEN, Kept),
        ("contract: no suffixes", "Host: localhost.evil.example\r\n", FORBIDDEN, Kept),
        ("contract: no suffixes", "Host: localhost.\r\n", FORBIDDEN, Kept),
        ("contract: no prefixes", "Host: evil-localhost\r\n", FORBIDDEN, Kept),
        ("contract: no other loopback", "Host: 127.0.0.2\r\n", FORBIDDEN, Kept),
        ("contract: no other loopback", "Host: 127.1\r\n", FORBIDDEN, Kept),
        ("contract: no other address", "Host: [::]\r\n", FORBIDDEN, Kept),
        ("contract: not decoded", "Host: %6cocalhost\r\n", FORBIDDEN, Kept),
        ("RFC 9110 7.2 an empty one is sound", "Host:\r\n", FORBIDDEN, Kept),
        ("RFC 3986 3.2.2 a list is one odd name", "Host: localhost,evil.example\r\n", FORBIDDEN, Kept),
        ("RFC 9110 7.2 white space", "Host: localhost evil.example\r\n", BAD, Closed),
        ("RFC 9110 7.2 white space", "Host: localhost, evil.example\r\n", BAD, Closed),
        ("RFC 9110 7.2 user information", "Host: u@localhost\r\n", BAD, Closed),
        ("RFC 9110 7.2 a path", "Host: localhost/ping\r\n", BAD, Closed),
        ("RFC 9110 7.2 a URL", "Host: http://localhost\r\n", BAD, Closed),
        ("RFC 9110 7.2 no port", "Host: localhost:x\r\n", BAD, Closed),
        ("RFC 9110 7.2 no port", "Host: localhost:-1\r\n", BAD, Closed),
        ("RFC 9110 7.2 no such port", "Host: localhost:65536\r\n", BAD, Closed),
        ("RFC 3986 3.2.2 IPv6 without brackets", "Host: ::1\r\n", BAD, Closed),
        ("RFC 3986 3.2.2 an open bracket", "Host: [::1\r\n", BAD, Closed),
        ("RFC 3986 3.2.2 more behind it", "Host: [::1]x\r\n", BAD, Closed),
        ("RFC 3986 3.2.2 no address", "Host: [localhost]\r\n", BAD, Closed),
        ("RFC 3986 3.2.2 UTF-8", "Host: l\u{f6}calhost\r\n", BAD, Closed),
    ];
    let emulator = emulator(&[]);
    let agent = Setup::new(&emulator).key("Server", "AllowedHosts", "[\"agent.internal\"]").start();
    for (rule, host, replies, fate) in rows {
        let bytes = format!("GET /ping HTTP/1.1\r\n{host}\r\n");
        check(&agent, rule, bytes.as_bytes(), replies, fate);
    }
    for (rule, bytes, replies) in [
        ("3.2 HTTP/1.0 may leave it out", "GET /ping HTTP/1.0\r\n\r\n", "200"),
        ("3.2 but not repeat it", "GET /ping HTTP/1.0\r\nHost: localhost\r\nHost: localhost\r\n\r\n", BAD),
        ("contract", "GET /ping HTTP/1.0\r\nHost: evil.example\r\n\r\n", FORBIDDEN),
        ("3.2.2", "GET http://evil.example/ping HTTP/1.0\r\n\r\n", FORBIDDEN),
    ] {
        check(&agent, rule, bytes.as_bytes(), replies, Closed);
    }
}

// ---- RFC 9112 5: header lines ----

#[test]
fn header_lines() {
    check_all(
        [
            ("5 no space is needed", "A:b\r\n", "200", Kept),
            ("5.1 nor a value", "A:\r\n", "200", Kept),
            ("RFC 9110 5.6.2 a token", "!#$%&'*+-.^_`|~09aZ: b\r\n", "200", Kept),
            ("RFC 9110 5.5 a tab", "A: b\tc\r\n", "200", Kept),
            ("RFC 9110 5.5 obs-text", "A: b\u{fc}c\r\n", "200", Kept),
            ("RFC 9110 5.3 repeated", "A: b\r\nA: c\r\n", "200", Kept),
            ("5.1 a space before the colon", "A : b\r\n", BAD, Closed),
            ("5.1 a tab before the colon", "A\t: b\r\n", BAD, Closed),
            ("5 no colon", "A\r\n", BAD, Closed),
            ("5 no name", ": b\r\n", BAD, Closed),
            ("RFC 9110 5.1 no token", "A(b): c\r\n", BAD, Closed),
            ("RFC 9110 5.1 no token", "A\u{fc}: c\r\n", BAD, Closed),
            ("RFC 9110 5.1 no token", "A\0: c\r\n", BAD, Closed),
            ("RFC 9110 5.5 NUL", "A: b\0c\r\n", BAD, Closed),
            ("RFC 9110 5.5 NUL at the end", "A: b\0\r\n", BAD, Closed),
            ("RFC 9110 5.5 a control character", "A: b\x01c\r\n", BAD, Closed),
            ("RFC 9110 5.5 DEL", "A: b\x7fc\r\n", BAD, Closed),
            ("5.2 obs-fold with a space", "A: b\r\n c\r\n", BAD, Closed),
            ("5.2 obs-fold with a tab", "A: b\r\n\tc\r\n", BAD, Closed),
            ("5.2 obs-fold that is empty", "A: b\r\n \r\n", BAD, Closed),
        ]
        .map(|(rule, text, replies, fate)| (rule, lines(text), replies, fate)),
    );
}

// ---- RFC 9112 6: the body, which no request here has any use for ----

#[test]
fn bodies_on_get() {
    check_all(
        [
            ("contract", "Content-Length: 0\r\n", "200", Kept),
            ("RFC 9110 8.6 1*DIGIT", "Content-Length: 000\r\n", "200", Kept),
            ("contract", "Content-Length: 1\r\n", BAD, Closed),
            ("contract", "Transfer-Encoding: chunked\r\n", BAD, Closed),
            ("RFC 9110 10.1.1 nothing to continue with", "Expect: 100-continue\r\n", "200", Kept),
            ("RFC 9110 7.8 Upgrade may be ignored", "Connection: upgrade\r\nUpgrade: h2c\r\n", "200", Kept),
        ]
        .map(|(rule, text, replies, fate)| (rule, lines(text), replies, fate)),
    );
    check_all([(
        "contract: a body on HEAD",
        "HEAD /ping HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx",
        "HEAD 400",
        Closed,
    )]);
}

#[test]
fn bodies_on_other_methods() {
    const NOT_ALLOWED: &str = "405 MethodNotAllowed";
    // In each of these the body is a request of its own, and must never be answered as one.
    let rows = [
        ("6.3 no body", "", NOT_ALLOWED, Kept),
        ("6.2", "Content-Length: 0\r\n", NOT_ALLOWED, Kept),
        ("6.2 unread, so closed", "Content-Length: 40\r\n", NOT_ALLOWED, Closed),
        ("6.2 more announced than there is", "Content-Length: 9999999\r\n", NOT_ALLOWED, Closed),
        ("7.1 unread, so closed", "Transfer-Encoding: chunked\r\n", NOT_ALLOWED, Closed),
        ("RFC 9110 5.6.2 in any case", "transfer-encoding: CHUNKED\r\n", NOT_ALLOWED, Closed),
        ("6.3 both", "Content-Length: 40\r\nTransfer-Encoding: chunked\r\n", BAD, Closed),
        ("6.3 both", "Transfer-Encoding: chunked\r\nContent-Length: 0\r\n", BAD, Closed),
        ("6.3 two lengths", "Content-Length: 0\r\nContent-Length: 40\r\n", BAD, Closed),
        ("6.3 twice the same length", "Content-Length: 0\r\nContent-Length: 0\r\n", BAD, Closed),
        ("6.3 a list of lengths", "Content-Length: 0, 0\r\n", BAD, Closed),
        ("RFC 9110 8.6 a sign", "Content-Length: +40\r\n", BAD, Closed),
        ("RFC 9110 8.6 a sign", "Content-Length: -1\r\n", BAD, Closed),
        ("RFC 9110 8.6 hexadecimal", "Content-Length: 0x28\r\n", BAD, Closed),
        ("RFC 9110 8.6 white space", "Content-Length: 4 0\r\n", BAD, Closed),
        ("RFC 9110 8.6 empty", "Content-Length:\r\n", BAD, Closed),
        ("RFC 9110 8.6 not a decimal digit", "Content-Length: \u{664}\r\n", BAD, Closed),
        ("RFC 9110 8.6 too much", "Content-Length: 18446744073709551656\r\n", BAD, Closed),
        ("6.1 not chunked", "Transfer-Encoding: identity\r\n", BAD, Closed),
        ("6.1 chunked must be last", "Transfer-Encoding: chunked, gzip\r\n", BAD, Closed),
        ("6.1 chunked but once", "Transfer-Encoding: chunked, chunked\r\n", BAD, Closed),
        ("6.1 chunked but once", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", BAD, Closed),
        ("6.1 nothing else is known here", "Transfer-Encoding: gzip, chunked\r\n", BAD, Closed),
        ("6.1 not quite", "Transfer-Encoding: xchunked\r\n", BAD, Closed),
        ("6.1 not quite", "Transfer-Encoding: \"chunked\"\r\n", BAD, Closed),
        ("6.1 no parameters", "Transfer-Encoding: chunked;a=b\r\n", BAD, Closed),
        ("6.1 empty", "Transfer-Encoding:\r\n", BAD, Closed),
        ("RFC 9110 5.5 a vertical tab", "Transfer-Encoding: \x0bchunked\r\n", BAD, Closed),
        ("5.1 smuggled by a space", "Transfer-Encoding : chunked\r\nContent-Length: 40\r\n", BAD, Closed),
        ("5.2 smuggled by a fold", "Transfer-Encoding:\r\n chunked\r\nContent-Length: 40\r\n", BAD, Closed),
        ("2.2 smuggled by a CR", "A: b\rTransfer-Encoding: chunked\r\nContent-Length: 40\r\n", BAD, Closed),
    ];
    let post = |text: &str| format!("POST /ping HTTP/1.1\r\nHost: localhost\r\n{text}\r\n");
    check_all(rows.map(|(rule, text, replies, fate)| match fate {
        Kept => (rule, post(text), replies, fate),
        Closed => (rule, post(text) + PING, replies, fate),
    }));
    check_all(
        [
            (
                "7.1.1 chunk extensions",
                "0;a=\"\r\n\r\nGET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n",
                NOT_ALLOWED,
                Closed,
            ),
            (
                "7.1.1 a bare LF in one",
                "1;a\nx\r\n0\r\n\r\nGET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n",
                NOT_ALLOWED,
                Closed,
            ),
            (
                "7.1.2 trailers",
                "0\r\nHost: evil\r\n\r\nGET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n",
                NOT_ALLOWED,
                Closed,
            ),
            ("7.1 no chunks at all", "GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n", NOT_ALLOWED, Closed),
        ]
        .map(|(rule, body, replies, fate)| {
            (rule, post("Transfer-Encoding: chunked\r\n") + body, replies, fate)
        }),
    );
    check_all([(
        "6.1 not in HTTP/1.0",
        "POST /ping HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        BAD,
        Closed,
    )]);
}

// ---- Contract: sizes ----

/// A GET of `/ping` whose target has `bytes` bytes.
fn target_of(bytes: usize) -> String {
    format!("GET /ping?{} HTTP/1.1\r\nHost: localhost\r\n\r\n", "a".repeat(bytes - "/ping?".len()))
}

/// A GET of `/ping` whose head has `bytes` bytes.
fn head_of(bytes: usize) -> String {
    lines(&format!("A: {}\r\n", "b".repeat(bytes - lines("A: \r\n").len())))
}

#[test]
fn sizes() {
    const TOO_LARGE: &str = "431 RequestHeaderTooLarge";
    const TOO_LONG: &str = "414 UriTooLong";
    let kib = |n: usize| n * 1024;
    let headers = |count: usize| lines(&"A: b\r\n".repeat(count - 1));
    check_all([
        ("a target of 8 KiB", target_of(kib(8)), "200", Kept),
        ("a byte more", target_of(kib(8) + 1), TOO_LONG, Closed),
        (
            "in absolute-form too",
            format!("GET http://localhost/{} HTTP/1.1\r\n\r\n", "a".repeat(kib(8))),
            TOO_LONG,
            Closed,
        ),
        ("a head of 16 KiB", head_of(kib(16)), "200", Kept),
        ("a byte more", head_of(kib(16) + 1), TOO_LARGE, Closed),
        ("the largest twice", head_of(kib(16)) + &head_of(kib(16)), "200 | 200", Kept),
        ("64 headers", headers(64), "200", Kept),
        ("one more", headers(65), TOO_LARGE, Closed),
        ("1,000 of them", headers(1000), TOO_LARGE, Closed),
        ("a method of 64 KiB", "a".repeat(kib(64)), TOO_LONG, Closed),
        ("a target of 64 KiB", target_of(kib(64)), TOO_LONG, Closed),
        ("one without an end", format!("GET /{}", "a".repeat(kib(64))), TOO_LONG, Closed),
        ("a header of 64 KiB", head_of(kib(64)), TOO_LARGE, Closed),
        (
            "a name without an end",
            format!("GET /ping HTTP/1.1\r\n{}", "a".repeat(kib(64))),
            TOO_LARGE,
            Closed,
        ),
        ("a value of 1 MiB", head_of(kib(1024)), TOO_LARGE, Closed),
        ("64 KiB of empty lines", "\r\n".repeat(kib(32)), TOO_LARGE, Closed),
        (
            "good ones first",
            format!("{PING}{PING}{}", target_of(kib(64))),
            "200 | 200 | 414 UriTooLong",
            Closed,
        ),
        ("1 MiB after a bad one", format!("BAD\r\n\r\n{}", PING.repeat(kib(25))), BAD, Closed),
        ("1 MiB after the last one", lines("Connection: close\r\n") + &PING.repeat(kib(25)), "200", Closed),
        (
            "a body of 1 MiB",
            format!(
                "POST /ping HTTP/1.1\r\nHost: a\r\nContent-Length: 1048576\r\n\r\n{}",
                "a".repeat(kib(1024))
            ),
            "403 ForbiddenHost",
            Closed,
        ),
    ]);
}

// ---- RFC 9112 9: connections ----

#[test]
fn persistence() {
    let http10 = |text: &str| format!("GET /ping HTTP/1.0\r\nHost: localhost\r\n{text}\r\n");
    check_all([
        ("9.3 1.1 persists", lines(""), "200", Kept),
        ("9.6 close", lines("Connection: close\r\n"), "200", Closed),
        ("RFC 9110 7.6.1 in any case", lines("connection: CLOSE\r\n"), "200", Closed),
        ("RFC 9110 7.6.1 in a list", lines("Connection: TE , close\r\n"), "200", Closed),
        ("RFC 9110 5.3 in a second line", lines("Connection: TE\r\nConnection: close\r\n"), "200", Closed),
        ("9.3 close wins", lines("Connection: keep-alive, close\r\n"), "200", Closed),
        ("9.3 not quite", lines("Connection: closed\r\n"), "200", Kept),
        ("9.3 keep-alive needs no saying", lines("Connection: keep-alive\r\n"), "200", Kept),
        ("9.3 1.0 does not persist", http10(""), "200", Closed),
        ("9.3 unless it asks to", http10("Connection: Keep-Alive\r\n"), "200", Kept),
        ("9.3 close wins", http10("Connection: keep-alive\r\nConnection: close\r\n"), "200", Closed),
        ("9.3 an error persists too", "GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n".into(), NO_TOKEN, Kept),
        ("9.3.2 pipelining", PING.repeat(5), "200 | 200 | 200 | 200 | 200", Kept),
        (
            "9.3.2 in order",
            ["/ping", "/x", "/ping", "/y"].map(|it| http::head("GET", it, &[])).concat(),
            "200 | 403 InvalidToken | 200 | 403 InvalidToken",
            Kept,
        ),
        (
            "9.3.2 with HEAD",
            format!("{PING}HEAD /ping HTTP/1.1\r\nHost: localhost\r\n\r\n{PING}"),
            "200 | HEAD 200 | 200",
            Kept,
        ),
        (
            "9.3.2 up to a bad one",
            format!("{PING}{PING}BAD\r\n\r\n{PING}"),
            "200 | 200 | 400 InvalidRequest",
            Closed,
        ),
        (
            "9.6 up to the last, by close",
            format!("{PING}{}{PING}", lines("Connection: close\r\n")),
            "200 | 200",
            Closed,
        ),
        ("9.3 up to the last, by 1.0", format!("{PING}{}{PING}", http10("")), "200 | 200", Closed),
        (
            "9.3.2 up to a body",
            format!("{PING}POST /ping HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\nhi{PING}"),
            "200 | 405 MethodNotAllowed",
            Closed,
        ),
    ]);
    let emulator = emulator(&[]);
    let agent = Agent::start(&emulator);
    let mut connection = agent.connect();
    connection.send(http10("Connection: keep-alive\r\n"));
    let said = connection.reply().unwrap();
    assert_eq!(said.header("Connection"), Some("keep-alive"), "RFC 9112 C.2.2: 1.0 has to be told");
    connection.send(lines("Connection: keep-alive\r\n"));
    assert_eq!(connection.reply().unwrap().header("Connection"), None);
}

#[test]
fn protocols_that_are_not_spoken_here() {
    // A TLS 1.3 ClientHello, as far as it matters: the record's head, then bytes of all values.
    let mut hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec();
    hello.extend((0..=255).chain(0..=255));
    check_all([
        ("TLS", hello, BAD, Closed),
        (
            "RFC 9113 3.4 HTTP/2",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec(),
            "505 InvalidRequest",
            Closed,
        ),
        ("SSH", b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(), BAD, Closed),
        ("Redis", b"*1\r\n$4\r\nPING\r\n".to_vec(), BAD, Closed),
        ("zeroes", vec![0; 64], BAD, Closed),
    ]);
}

#[test]
fn a_pipeline_longer_than_any_buffer_is_answered_whole_and_in_order() {
    const COUNT: usize = 4000;
    let names = ["s0", "s1", "s2"];
    let emulator = emulator(&names.map(|name| (name, name)));
    let agent = Agent::start(&emulator);
    let requests: String = (0..COUNT).map(|n| agent.head(&secret_target(names[n % 3]))).collect();
    let mut connection = agent.connect();
    connection.send(&requests);
    for n in 0..COUNT {
        let reply = connection.reply().unwrap_or_else(|error| panic!("reply {n}: {error}"));
        assert_eq!(reply.data(), names[n % 3], "reply {n}");
    }
}

#[test]
fn a_slow_secret_holds_up_its_own_connection_only_and_keeps_the_order() {
    let emulator = emulator(&[("slow", "1"), ("fast", "2")]);
    let agent = Agent::start(&emulator);
    let fast = agent.head(&secret_target("fast"));
    agent.secret("fast");
    emulator.delay_secret("slow", Duration::from_millis(300));
    let mut connection = agent.connect();
    connection.send(agent.head(&secret_target("slow")) + &fast + "BAD\r\n\r\n" + &fast);
    check_replies(&mut connection, "9.3.2", "200 MISS | 200 HIT | 400 InvalidRequest", Closed);
}

#[test]
fn half_closed_clients_are_answered() {
    let emulator = emulator(&[("a", "1"), ("slow", "2")]);
    let agent = Agent::start(&emulator);
    let unfinished = "GET /ping HTTP/1.1\r\nHost: loc";
    for (rule, bytes, replies) in [
        ("contract", PING.to_owned(), "200"),
        ("contract, with a miss", agent.head(&secret_target("a")), "200 MISS"),
        ("contract, with two", PING.to_owned() + &agent.head(&secret_target("a")), "200 | 200 HIT"),
        ("contract, with an error", http::head("GET", "/v1/a", &[]), NO_TOKEN),
        ("9.6, with a bad one", "BAD\r\n\r\n".to_owned() + PING, BAD),
    ] {
        let mut connection = agent.connect();
        connection.send(bytes);
        connection.half_close();
        // Whether the last reply could say so depends on what arrived first.
        for expected in replies.split(" | ") {
            let reply = connection.reply().unwrap_or_else(|error| panic!("{rule}: {error}"));
            assert_eq!(verdict(&reply), expected, "{rule}");
        }
        assert!(connection.is_at_end(), "{rule}");
    }
    // The end comes while the reply is still on its way: then the reply says that it is the last.
    let on_its_way = Duration::from_millis(1500);
    emulator.delay_secret("slow", on_its_way);
    let mut connection = agent.connect();
    connection.send(agent.head(&secret_target("slow")));
    wait_until("KMS is asked", || emulator.counters().gets("slow") == 1);
    connection.half_close();
    check_replies(&mut connection, "9.6 the last one says close", "200 MISS", Closed);
    // With more requests before it.
    emulator.put_secret("slower", "3");
    emulator.delay_secret("slower", on_its_way);
    let mut connection = agent.connect();
    connection.send(agent.head(&secret_target("slower")) + PING + PING);
    connection.half_close();
    check_replies(&mut connection, "9.6 the last one says close", "200 MISS | 200 | 200", Closed);
    // 8: what is unfinished at the end is no request.
    let mut connection = agent.connect();
    connection.send(unfinished);
    connection.half_close();
    assert!(connection.is_at_end(), "8: an unfinished head");
}

/// RFC 9112 9.6: a server that closed at once would reset the connection under a client that is still sending,
/// which may then never see why.
#[test]
fn who_goes_on_sending_after_the_last_reply_can_still_read_it() {
    let emulator = emulator(&[]);
    let agent = Agent::start(&emulator);
    for (request, expected) in [
        ("BAD\r\n\r\n".to_owned(), BAD),
        (target_of(9000), "414 UriTooLong"),
        (
            "POST /ping HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n".into(),
            "405 MethodNotAllowed",
        ),
        (
            "POST /ping HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".into(),
            "405 MethodNotAllowed",
        ),
    ] {
        let mut connection = agent.connect();
        connection.send(&request);
        wait_until("the reply is there", || connection.has_something());
        for _ in 0..20 {
            connection.send([b'x'; 10_000]);
        }
        check_replies(&mut connection, "9.6", expected, Closed);
    }
}

#[test]
fn head_is_get_without_the_body() {
    for response_type in 0..=2 {
        let emulator = emulator(&[("a", "{\"k\":\"v\"}")]);
        let agent = Setup::new(&emulator).key("Server", "ResponseType", response_type).start();
        agent.secret("a");
        for target in ["/ping", "/secretsmanager/get?secretId=a", "/v1/a", "/x", "/v1/a?b", "/v1/missing"] {
            let token = [("X-KMS-Token", TOKEN)];
            let (get, head) = (agent.request("GET", target, &token), agent.request("HEAD", target, &token));
            let shown = |reply: &Reply| {
                let mut headers = reply.headers.clone();
                headers.retain(|(name, _)| !["Date", "Age"].contains(&name.as_str()));
                (reply.status, headers)
            };
            assert_eq!(shown(&head), shown(&get), "RFC 9110 9.3.2: {target}");
            assert_eq!(get.header("Content-Length"), Some(get.body.len().to_string().as_str()));
        }
    }
    // Also where the request is refused before anyone looks at what it wants.
    check_all([
        ("RFC 9110 9.3.2", "HEAD /ping HTTP/1.1\r\n\r\n", "HEAD 400", Closed),
        ("RFC 9110 9.3.2", "\r\nHEAD /ping HTTP/1.1\r\nHost: a b\r\n\r\n", "HEAD 400", Closed),
        ("RFC 9110 9.3.2", "HEAD /ping HTTP/1.2\r\nHost: localhost\r\n\r\n", "HEAD 505", Closed),
    ]);
}

// ---- Contract: the gates ----

/// Each row fails at its own gate and at all later ones, and its text is what each ResponseType says.
#[test]
fn gates_stand_in_their_order() {
    let token = format!("X-KMS-Token: {TOKEN}\r\n");
    let post = |host: &str, lines: &str| format!("POST /x?p HTTP/1.1\r\nHost: {host}\r\n{lines}\r\n");
    let long = "a".repeat(9000);
    let malformed = format!("POST /{long}#x HTTP/1.1\r\nHost: evil\r\nForwarded: a\r\nA : b\r\n\r\n");
    let path = "no such path; ask for /secretsmanager/get?secretId=NAME or [Server] PathPrefix and the name";
    let [none, empty, wrong] = [
        "the request has no token; send it in a header of [Server] SSRFHeaders",
        "the token in the request is empty",
        "the token in the request is wrong",
    ];
    let forwarded = "the request has X-Forwarded-For or Forwarded, so a proxy is in between; ask without it";
    let method = "the agent answers GET and HEAD only";
    // The last text is that of AWS's agent, where it has one.
    let rows: Vec<(bool, String, &str, &str, Option<&str>)> = vec![
        (true, post("evil", "A : b\r\nForwarded: a\r\n"), BAD, "a header name is malformed", None),
        (true, malformed.replace(&long, "p"), BAD, "a header name is malformed", None),
        (
            true,
            malformed.replace("/1.1", "/1.2").replace(&long, "p"),
            "505 InvalidRequest",
            "only HTTP/1.0 and HTTP/1.1 are supported",
            None,
        ),
        (
            true,
            post("evil", &"Forwarded: a\r\n".repeat(64)),
            "431 RequestHeaderTooLarge",
            "the request head has over 64 header lines",
            None,
        ),
        (
            true,
            post("evil", &format!("Forwarded: {}\r\n", "a".repeat(20_000))),
            "431 RequestHeaderTooLarge",
            "the request head is over 16 KiB",
            None,
        ),
        (
            true,
            post("evil", "Forwarded: a\r\n").replace("/x", &format!("/{long}")),
            "414 UriTooLong",
            "the request target is over 8 KiB",
            None,
        ),
        (
            true,
            post("evil", "Forwarded: a\r\n"),
            "429 ConnectionLimitExceeded",
            "all [Server] MaxConn connections are busy; try again in a second",
            Some("Connection limit exceeded"),
        ),
        (
            false,
            post("evil", "Forwarded: a\r\n"),
            "403 ForbiddenHost",
            "the agent does not answer for this Host; use localhost, or add the name to [Server] AllowedHosts",
            None,
        ),
        (false, post("localhost", "Forwarded: a\r\n"), "400 Forwarded", forwarded, Some("Forwarded")),
        (false, post("localhost", "x-forwarded-for: a\r\n"), "400 Forwarded", forwarded, Some("Forwarded")),
        (false, post("localhost", ""), NO_TOKEN, none, Some("Bad Token")),
        (false, post("localhost", "X-KMS-Token: wrong\r\n"), NO_TOKEN, wrong, Some("Bad Token")),
        (false, post("localhost", "X-KMS-Token:\r\n"), NO_TOKEN, empty, Some("Bad Token")),
        (false, post("localhost", &format!("X-KMS-Token: {TOKEN}x\r\n")), NO_TOKEN, wrong, Some("Bad Token")),
        (
            false,
            post("localhost", &format!("X-KMS-Token: {}\r\n", &TOKEN[1..])),
            NO_TOKEN,
            wrong,
            Some("Bad Token"),
        ),
        (false, post("localhost", &format!("Authorization: {TOKEN}\r\n")), NO_TOKEN, none, Some("Bad Token")),
        (false, post("localhost", &token), "405 MethodNotAllowed", method, Some("Not allowed")),
        (
            false,
            post("localhost", &token).replace("POST", "DELETE"),
            "405 MethodNotAllowed",
            method,
            Some("Not allowed"),
        ),
        (false, post("localhost", &token).replace("POST", "GET"), "404 NotFound", path, Some("Not found")),
        (
            false,
            post("localhost", &token).replace("POST /x", "GET /v1/a"),
            "400 InvalidParameter",
            "unknown parameter: p; known: versionId, versionStage, refreshNow",
            Some("unknown parameter: p"),
        ),
    ];
    for response_type in 0..=2 {
        let emulator = emulator(&[("a", "1"), ("slow", "2")]);
        emulator.delay_secret("slow", Duration::from_secs(5));
        let start = |connections_max: u32| {
            let setup = Setup::new(&emulator).key("Server", "ResponseType", response_type);
            setup.key("Server", "MaxConn", connections_max).start()
        };
        let (free, full) = (start(8), start(1));
        let mut busy = full.connect();
        busy.send(full.head(&secret_target("slow")));
        wait_until("its one connection is busy", || emulator.counters().gets("slow") == 1);
        for (is_full, bytes, expected, text, aws) in &rows {
            let agent = if *is_full { &full } else { &free };
            let mut connection = agent.connect();
            connection.send(bytes);
            let reply = connection.reply().unwrap_or_else(|error| panic!("{bytes:.200?}: {error}"));
            let (status, code) = expected.split_once(' ').unwrap();
            let context = format!("type {response_type}: {bytes:.200?}: {}", reply.text());
            assert_eq!(reply.status.to_string(), status, "{context}");
            assert_sound(&reply, &context);
            assert_eq!(reply.header("Retry-After"), (status == "429").then_some("1"), "{context}");
            let at_cap =
                ["400 InvalidRequest", "505", "414", "431", "429"].iter().any(|it| expected.starts_with(it));
            assert_eq!(reply.closes(), at_cap, "{context}");
            match response_type {
                0 => {
                    assert_eq!(
                        (reply.field("Code").as_str(), reply.field("Message").as_str()),
                        (code, *text),
                        "{context}"
                    );
                    assert_eq!(reply.field("RequestId").len(), 36, "{context}");
                    assert_eq!(reply.json().as_object().unwrap().len(), 3, "{context}");
                }
                1 => {
                    assert_eq!(
                        (reply.text().as_str(), reply.header("Content-Type")),
                        (aws.unwrap_or(text), Some("text/plain")),
                        "{context}"
                    );
                }
                _ => assert_eq!(reply.json(), serde_json::json!({ "errors": [text] }), "{context}"),
            }
        }
    }
}

#[test]
fn pings_need_nothing_but_a_sound_get_of_a_host_of_ours() {
    check_all(
        [
            ("no token", "GET /ping", "", "200", Kept),
            ("nor the right one", "GET /ping", "X-KMS-Token: wrong\r\n", "200", Kept),
            ("forwarded", "GET /ping", "X-Forwarded-For: a\r\nForwarded: for=a\r\n", "200", Kept),
            ("another method", "PUT /ping", "", "405 MethodNotAllowed", Kept),
            ("nothing else is a ping", "GET /ping/", "", NO_TOKEN, Kept),
            ("nothing else is a ping", "GET /PING", "", NO_TOKEN, Kept),
            ("nothing else is a ping", "GET /ping;x", "", NO_TOKEN, Kept),
            ("nothing else is a ping", "GET /a/../ping", "", NO_TOKEN, Kept),
        ]
        .map(|(rule, target, lines, replies, fate)| {
            (rule, format!("{target} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n"), replies, fate)
        }),
    );
}

#[test]
fn any_configured_header_may_carry_the_token() {
    let emulator = emulator(&[("a", "1")]);
    let agent = Agent::start(&emulator);
    for (headers, status) in [
        (&[("X-KMS-Token", TOKEN)][..], 200),
        (&[("x-vault-TOKEN", TOKEN)], 200),
        (&[("X-KMS-Token", "wrong"), ("X-Vault-Token", TOKEN)], 200),
        (&[("X-KMS-Token", "wrong"), ("X-KMS-Token", TOKEN)], 200),
        (&[("X-Aws-Parameters-Secrets-Token", TOKEN)], 403),
        (&[("X-KMS-Token", "")], 403),
    ] {
        assert_eq!(agent.get_with("/v1/a", headers).status, status, "{headers:?}");
    }
    let setup = Setup::new(&emulator).key("Server", "SSRFHeaders", "[\"X-Aws-Parameters-Secrets-Token\"]");
    let agent = setup.start();
    assert_eq!(agent.get_with("/v1/a", &[("X-Aws-Parameters-Secrets-Token", TOKEN)]).status, 200);
    assert_eq!(agent.get("/v1/a").status, 403);
}

// ---- Contract: targets, ids, parameters ----

#[test]
fn targets_name_secrets() {
    let ids = ["a", "a b", "a+b", "a/b", "a%b", "\u{fc}", "a..b/...", "a?b", "a//b", "a%25b"];
    let long = ["i".repeat(512), "\u{fc}".repeat(256)];
    let emulator = emulator(&ids.map(|id| (id, id)));
    for id in &long {
        emulator.put_secret(id, id);
    }
    let agent = Agent::start(&emulator);
    let query = |rest: &str| format!("/secretsmanager/get?{rest}");
    let missing = "404 Forbidden.ResourceNotFound";
    for (target, expected) in [
        (query("secretId=a"), "a"),
        (query("secretId=%61"), "a"),
        (query("secret%49d=a"), "a"),
        (query("&secretId=a&&"), "a"),
        (query("secretId=a+b"), "a b"),
        (query("secretId=a%20b"), "a b"),
        (query("secretId=a%2Bb"), "a+b"),
        (query("secretId=a%2bb"), "a+b"),
        (query("secretId=a/b"), "a/b"),
        (query("secretId=a%2Fb"), "a/b"),
        (query("secretId=a%25b"), "a%b"),
        (query("secretId=a?b"), "a?b"),
        (query("secretId=%C3%BC"), "\u{fc}"),
        ("/v1/a".into(), "a"),
        ("/v1/%61".into(), "a"),
        ("/v1/a%20b".into(), "a b"),
        ("/v1/a+b".into(), "a+b"),
        ("/v1/a%2Bb".into(), "a+b"),
        ("/v1/a/b".into(), "a/b"),
        ("/v1/a%2Fb".into(), "a/b"),
        ("/v1/a//b".into(), "a//b"),
        ("/v1/a%25b".into(), "a%b"),
        ("/v1/a%3Fb".into(), "a?b"),
        ("/v1/%c3%bc".into(), "\u{fc}"),
        ("/v1/a..b/...".into(), "a..b/..."),
        ("/v1/a?".into(), "a"),
        ("/v1/a?versionStage=ACSCurrent".into(), "a"),
        ("/v1/a?versionStage=&versionId=".into(), "a"),
        ("/v1/a%2525b".into(), "a%25b"),
        (format!("/v1/{}", long[0]), &long[0]),
        (format!("/v1/{}", "%C3%BC".repeat(256)), &long[1]),
        (query(&format!("secretId={}", long[0])), &long[0]),
        ("/v1/a?versionStage=ACSPrevious".into(), missing),
        ("/v1/a?versionStage=acscurrent".into(), missing),
        ("/v1/a?versionId=other".into(), missing),
        ("/v1".into(), "404 NotFound"),
        ("/V1/a".into(), "404 NotFound"),
        ("/".into(), "404 NotFound"),
        ("//v1/a".into(), "404 NotFound"),
        ("/x/../v1/a".into(), "404 NotFound"),
        ("/secretsmanager/get/".into(), "404 NotFound"),
        ("/secretsmanager/get/a".into(), "404 NotFound"),
    ] {
        let reply = agent.get(&target);
        let got = if reply.status == 200 { reply.data() } else { reply.verdict() };
        assert_eq!(got, expected, "{target}");
    }
}

#[test]
fn parameters_that_are_refused() {
    let emulator = emulator(&[("a", "1")]);
    let agent = Agent::start(&emulator);
    let query = |rest: &str| format!("/secretsmanager/get?{rest}");
    for (target, message) in [
        ("/secretsmanager/get".into(), "missing parameter secretId"),
        (query(""), "missing parameter secretId"),
        (query("versionId=1"), "missing parameter secretId"),
        (query("secretId"), "missing secret ID"),
        (query("secretId="), "missing secret ID"),
        ("/v1/".into(), "missing secret ID"),
        (
            query("secretId=a&p=1"),
            "unknown parameter: p; known: secretId, versionId, versionStage, refreshNow",
        ),
        (query("secretId=a&p"), "unknown parameter: p; known: secretId, versionId, versionStage, refreshNow"),
        (query("secretId=a&=1"), "unknown parameter: ; known: secretId, versionId, versionStage, refreshNow"),
        (
            query("SecretId=a"),
            "unknown parameter: SecretId; known: secretId, versionId, versionStage, refreshNow",
        ),
        (
            query("secretId=a&%3cscript%3e=1"),
            "unknown parameter: <script>; known: secretId, versionId, versionStage, refreshNow",
        ),
        (
            query("secretId=a&%0d%0aSet-Cookie:+a=1"),
            r"unknown parameter: \r\nSet-Cookie: a; known: secretId, versionId, versionStage, refreshNow",
        ),
        (
            "/v1/a?secretId=a".into(),
            "unknown parameter: secretId; known: versionId, versionStage, refreshNow",
        ),
        (query("secretId=a&secretId=a"), "repeated parameter: secretId"),
        (query("secretId=a&secret%49d=b"), "repeated parameter: secretId"),
        ("/v1/a?refreshNow=1&refreshNow=1".into(), "repeated parameter: refreshNow"),
        ("/v1/a?versionId=&versionId=".into(), "repeated parameter: versionId"),
        (query("secretId=%"), "badly encoded parameter: secretId"),
        (query("secretId=%6"), "badly encoded parameter: secretId"),
        (query("secretId=%6g"), "badly encoded parameter: secretId"),
        (query("secretId=%C3"), "badly encoded parameter: secretId"),
        (query("secretId=%C0%AF"), "badly encoded parameter: secretId"),
        (query("secretId=%ED%A0%80"), "badly encoded parameter: secretId"),
        ("/v1/a?versionId=%".into(), "badly encoded parameter: versionId"),
        ("/v1/%".into(), "the secret ID in the path is badly encoded"),
        ("/v1/%ff".into(), "the secret ID in the path is badly encoded"),
        ("/v1/.".into(), "the secret ID in the path must not have the segments . or .."),
        ("/v1/..".into(), "the secret ID in the path must not have the segments . or .."),
        ("/v1/a/../b".into(), "the secret ID in the path must not have the segments . or .."),
        ("/v1/a/./b".into(), "the secret ID in the path must not have the segments . or .."),
        ("/v1/a/%2e%2E".into(), "the secret ID in the path must not have the segments . or .."),
        ("/v1/a%2f..%2fb".into(), "the secret ID in the path must not have the segments . or .."),
        ("/v1/../ping".into(), "the secret ID in the path must not have the segments . or .."),
        (format!("/v1/{}", "i".repeat(513)), "the secret ID is over 512 bytes"),
        (format!("/v1/i{}", "%C3%BC".repeat(256)), "the secret ID is over 512 bytes"),
        (query(&format!("secretId={}", "i".repeat(513))), "the secret ID is over 512 bytes"),
        ("/v1/a?refreshNow=yes".into(), "invalid refreshNow value: it must be true, false, 1 or 0"),
        ("/v1/a?refreshNow=2".into(), "invalid refreshNow value: it must be true, false, 1 or 0"),
        ("/v1/a?refreshNow=01".into(), "invalid refreshNow value: it must be true, false, 1 or 0"),
        ("/v1/a?refreshNow=true+".into(), "invalid refreshNow value: it must be true, false, 1 or 0"),
        ("/v1/a?refreshNow=".into(), "invalid refreshNow value: it must be true, false, 1 or 0"),
        ("/v1/a?refreshNow".into(), "invalid refreshNow value: it must be true, false, 1 or 0"),
    ] {
        let reply = agent.get(&target);
        assert_eq!(
            (reply.verdict().as_str(), reply.field("Message").as_str()),
            ("400 InvalidParameter", message),
            "{target}"
        );
        assert!(!reply.closes(), "{target}");
    }
    assert_eq!(emulator.counters().kms_requests, 0, "none of these is a question for KMS");
    assert_eq!(agent.secret("a").verdict(), "200 MISS");
    for text in ["false", "False", "FALSE", "0"] {
        assert_eq!(agent.get(&format!("/v1/a?refreshNow={text}")).verdict(), "200 HIT", "{text}");
    }
    assert_eq!(emulator.counters().gets("a"), 1);
    for (number, text) in ["true", "True", "TRUE", "1", "tr%75e"].iter().enumerate() {
        // A key of its own each, since there is but one fetch a second for one.
        let name = format!("b{number}");
        emulator.put_secret(&name, "1");
        assert_eq!(agent.get(&format!("/v1/{name}?refreshNow={text}")).verdict(), "200 REFRESH", "{text}");
    }
}
