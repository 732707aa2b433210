//! The server side's request head: bytes in, [`Parsed`] out (RFC 9112).
//!
//! A head is either complete and sound, or incomplete, or rejected; whatever is rejected ends its
//! connection, because where the next request would begin cannot be known.
#![warn(clippy::indexing_slicing)]

use super::split_at_byte;
use crate::text::decimal;
use std::mem::MaybeUninit;
use std::net::Ipv6Addr;

/// A whole request head, request line included, in bytes. More: 431.
pub const HEAD_BYTES_MAX: usize = 16 * 1024;
/// The request target in bytes. More: 414 (RFC 9110 15.5.15).
pub const TARGET_BYTES_MAX: usize = 8 * 1024;
/// Header lines in one head. More: 431 (RFC 6585 5).
pub const HEADERS_MAX: usize = 64;
/// Room for a method and the blanks around a target, when a request line is still incomplete.
const METHOD_BYTES_MAX: usize = 64;

/// Room for the header lines of one head; the caller's, so that a request can borrow from it.
pub(crate) type HeaderRoom<'b> = [MaybeUninit<httparse::Header<'b>>; HEADERS_MAX];

/// Fresh [`HeaderRoom`]; costs nothing, since it is not initialised.
#[must_use]
pub const fn header_room<'b>() -> HeaderRoom<'b> {
    [const { MaybeUninit::uninit() }; HEADERS_MAX]
}

/// What a buffer's beginning holds.
#[derive(Debug)]
pub enum Parsed<'h, 'b> {
    /// A head that is not complete yet.
    NeedMore,
    /// Never going to be a request; answer and close.
    Reject(Reject),
    /// A request, and how many bytes its head took.
    Request(Request<'h, 'b>, usize),
}

/// Why a head is refused before anyone looks at what it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reject {
    /// Malformed by RFC 9112; says what.
    Malformed(&'static str),
    /// Well-formed, of an HTTP version other than 1.0 and 1.1 (RFC 9110 15.6.6).
    Version,
    /// Head over [`HEAD_BYTES_MAX`].
    HeadTooLarge,
    /// More than [`HEADERS_MAX`] header lines.
    TooManyHeaders,
    /// Target over [`TARGET_BYTES_MAX`].
    TargetTooLong,
}

/// A sound request head.
#[derive(Debug)]
pub struct Request<'h, 'b> {
    /// The method, as sent; methods are case-sensitive (RFC 9110 9.1).
    pub method: &'b str,
    /// The target's path, still percent-encoded; `*` for `OPTIONS *`, empty for CONNECT.
    pub path: &'b str,
    /// What follows the target's first `?`.
    pub query: Option<&'b str>,
    /// The host the client meant, without port, brackets kept: an absolute-form target's, else the
    /// `Host` header's (RFC 9112 3.2.2). `None`: an HTTP/1.0 request that names none.
    pub host: Option<&'b str>,
    /// Whether the connection may serve another request (RFC 9112 9.3).
    pub keep_alive: bool,
    /// A body follows, which is not read: the connection ends with the reply.
    pub has_body: bool,
    /// HTTP/1.0: a reply that keeps the connection must say so.
    pub http10: bool,
    headers: &'h [httparse::Header<'b>],
}

impl<'h, 'b> Request<'h, 'b> {
    /// The values of every header line of this name, compared without case.
    pub fn header(&self, name: &str) -> impl Iterator<Item = &'b [u8]> {
        self.headers.iter().filter(move |line| line.name.eq_ignore_ascii_case(name)).map(|line| line.value)
    }

    /// Whether any header line has this name.
    #[must_use]
    pub fn has_header(&self, name: &str) -> bool {
        self.header(name).next().is_some()
    }
}

/// Reads one request head from the beginning of `bytes`.
///
/// Asked anew as more bytes come, it does not change its mind: after a request comes the same request, after a
/// rejection a rejection (`fuzz/fuzz_targets/request_split.rs`).
pub fn parse<'h, 'b>(bytes: &'b [u8], room: &'h mut HeaderRoom<'b>) -> Parsed<'h, 'b> {
    // What lies past the limit must not count: it may not have come yet.
    let bytes = bytes.get(..HEAD_BYTES_MAX).unwrap_or(bytes);
    let mut raw = httparse::Request::new(&mut []);
    match raw.parse_with_uninit_headers(bytes, room) {
        Ok(httparse::Status::Complete(used)) => match sound(raw) {
            Ok(request) => Parsed::Request(request, used),
            Err(reject) => Parsed::Reject(reject),
        },
        Ok(httparse::Status::Partial) => unfinished(bytes),
        // httparse knows no other version and does not wait for the end of this one.
        Err(httparse::Error::Version) => match version(bytes) {
            Version::WellFormed => Parsed::Reject(Reject::Version),
            Version::Unfinished => unfinished(bytes),
            Version::Malformed => Parsed::Reject(Reject::Malformed("the HTTP version is malformed")),
        },
        Err(error) => Parsed::Reject(reject_for(error)),
    }
}

/// The request line so far, and whether its end is there. Empty lines before it are skipped
/// (RFC 9112 2.2).
fn request_line(bytes: &[u8]) -> (&[u8], bool) {
    let start = bytes.iter().position(|b| !matches!(b, b'\r' | b'\n')).unwrap_or(bytes.len());
    let rest = bytes.get(start..).unwrap_or_default();
    match rest.iter().position(|b| *b == b'\n') {
        Some(end) => (rest.get(..end).unwrap_or_default(), true),
        None => (rest, false),
    }
}

/// Whether `bytes` begin with a HEAD request, be it sound or not: its reply has no body (RFC 9110 9.3.2).
pub(crate) fn asks_for_head(bytes: &[u8]) -> bool {
    request_line(bytes).0.starts_with(b"HEAD ")
}

fn unfinished<'h, 'b>(bytes: &[u8]) -> Parsed<'h, 'b> {
    let (line, _) = request_line(bytes);
    let mut words = line.split(|b| *b == b' ').map(<[u8]>::len);
    // The method too, whether its end is there or not: the answer must not depend on how the bytes were cut.
    let method_too_long = words.next().is_some_and(|len| len > TARGET_BYTES_MAX + METHOD_BYTES_MAX);
    if method_too_long || words.next().is_some_and(|len| len > TARGET_BYTES_MAX) {
        Parsed::Reject(Reject::TargetTooLong)
    } else if bytes.len() >= HEAD_BYTES_MAX {
        Parsed::Reject(Reject::HeadTooLarge)
    } else {
        Parsed::NeedMore
    }
}

const fn reject_for(error: httparse::Error) -> Reject {
    match error {
        httparse::Error::TooManyHeaders => Reject::TooManyHeaders,
        httparse::Error::Version => Reject::Malformed("the HTTP version is malformed"),
        httparse::Error::HeaderName => Reject::Malformed("a header name is malformed"),
        httparse::Error::HeaderValue => Reject::Malformed("a header value is malformed"),
        httparse::Error::NewLine => Reject::Malformed("a line end is malformed"),
        httparse::Error::Token | httparse::Error::Status => {
            Reject::Malformed("the request line is malformed")
        }
    }
}

/// What stands at the end of a request line where httparse found no version that it knows.
enum Version {
    WellFormed,
    /// What there is of it can still become well-formed.
    Unfinished,
    Malformed,
}

/// `HTTP-version = "HTTP/" DIGIT "." DIGIT` (RFC 9112 2.3), then the line's end.
fn version(bytes: &[u8]) -> Version {
    let (line, complete) = request_line(bytes);
    // httparse looks at a version only behind a method, a target, and a blank after each.
    let version = line.splitn(3, |b| *b == b' ').nth(2).unwrap_or_default();
    let fits = version.iter().zip(b"HTTP/0.0\r").all(|(byte, form)| match form {
        b'0' => byte.is_ascii_digit(),
        _ => byte == form,
    });
    match version.len() {
        0..=7 if fits && !complete => Version::Unfinished,
        8 | 9 if fits && complete => Version::WellFormed,
        8 | 9 if fits => Version::Unfinished,
        _ => Version::Malformed,
    }
}

fn sound<'h, 'b>(raw: httparse::Request<'h, 'b>) -> Result<Request<'h, 'b>, Reject> {
    let (Some(method), Some(target), Some(minor)) = (raw.method, raw.path, raw.version) else {
        return Err(Reject::Malformed("the request line is malformed"));
    };
    // A method that long would have been taken for a target before its end had come.
    if target.len() > TARGET_BYTES_MAX || method.len() > TARGET_BYTES_MAX + METHOD_BYTES_MAX {
        return Err(Reject::TargetTooLong);
    }
    let headers: &'h [httparse::Header<'b>] = raw.headers;
    let http10 = minor == 0;
    let target = split_target(method, target)?;
    let control = ControlData::of(headers, http10)?;
    if control.has_body && matches!(method, "GET" | "HEAD") {
        return Err(Reject::Malformed("a GET or HEAD request must have no body"));
    }
    let host = match (control.host, target.authority) {
        (None, _) if !http10 => return Err(Reject::Malformed("the Host header is missing")),
        (_, Some(authority)) => Some(authority),
        (host, None) => host,
    };
    let has_body = control.has_body;
    let keep_alive = !has_body && !control.close && (!http10 || control.asks_keep_alive);
    Ok(Request {
        method,
        path: target.path,
        query: target.query,
        host,
        keep_alive,
        has_body,
        http10,
        headers,
    })
}

/// The parts of a request target (RFC 9112 3.2).
struct Target<'b> {
    authority: Option<&'b str>,
    path: &'b str,
    query: Option<&'b str>,
}

/// Each method's forms of RFC 9112 3.2: origin-form and absolute-form for all, authority-form for
/// CONNECT alone, asterisk-form for OPTIONS alone.
fn split_target<'b>(method: &str, target: &'b str) -> Result<Target<'b>, Reject> {
    if method == "CONNECT" {
        return match host_of(target) {
            Some(host) if host.len() < target.len() => {
                Ok(Target { authority: Some(host), path: "", query: None })
            }
            _ => Err(Reject::Malformed("the request target is malformed")),
        };
    }
    if method == "OPTIONS" && target == "*" {
        return Ok(Target { authority: None, path: "*", query: None });
    }
    let (authority, rest) = if target.starts_with('/') {
        (None, target)
    } else {
        let (scheme, rest) =
            target.split_once("://").ok_or(Reject::Malformed("the request target is malformed"))?;
        if !scheme.eq_ignore_ascii_case("http") {
            return Err(Reject::Malformed("the request target has another scheme than http"));
        }
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, rest) = rest.split_at_checked(end).unwrap_or((rest, ""));
        // Empty hosts and user information are refused by RFC 9110 4.2.1 and 4.2.4.
        match host_of(authority) {
            Some(host) if !host.is_empty() => (Some(host), rest),
            _ => return Err(Reject::Malformed("the authority in the request target is malformed")),
        }
    };
    let (path, query) = match split_at_byte(rest, b'?') {
        Some((path, query)) => (path, Some(query)),
        None => (rest, None),
    };
    if !path.bytes().all(is_path_byte) || !query.unwrap_or("").bytes().all(|b| is_path_byte(b) || b == b'?') {
        return Err(Reject::Malformed("the request target has a character that is not allowed there"));
    }
    // An absolute-form target without a path means "/" (RFC 9112 3.2.1).
    Ok(Target { authority, path: if path.is_empty() { "/" } else { path }, query })
}

/// `pchar` of RFC 3986 3.3 and `/`; what follows a `%` is judged where it is decoded.
#[expect(clippy::indexing_slicing, reason = "a byte, and 256 places")]
fn is_path_byte(b: u8) -> bool {
    CLASSES[b as usize] & PATH != 0
}

/// `unreserved / pct-encoded / sub-delims` of RFC 3986.
#[expect(clippy::indexing_slicing, reason = "a byte, and 256 places")]
fn is_reg_name_byte(b: u8) -> bool {
    CLASSES[b as usize] & REG_NAME != 0
}

const REG_NAME: u8 = 1;
const PATH: u8 = 2;

/// What each byte may be. Every byte of every target is looked up here.
#[expect(clippy::indexing_slicing, reason = "made by the compiler, indices below 256")]
static CLASSES: [u8; 256] = {
    let mut classes = [0; 256];
    let mut b = 0;
    while b < 256 {
        #[expect(clippy::cast_possible_truncation, reason = "below 256")]
        if (b as u8).is_ascii_alphanumeric() {
            classes[b] = REG_NAME | PATH;
        }
        b += 1;
    }
    let marks = b"-._~%!$&'()*+,;=";
    b = 0;
    while b < marks.len() {
        classes[marks[b] as usize] = REG_NAME | PATH;
        b += 1;
    }
    classes[b':' as usize] = PATH;
    classes[b'@' as usize] = PATH;
    classes[b'/' as usize] = PATH;
    classes
};

/// The host of `uri-host [ ":" port ]` (RFC 9110 7.2), brackets kept; `None` if it is malformed.
fn host_of(authority: &str) -> Option<&str> {
    let end = if authority.starts_with('[') {
        authority.find(']')? + 1
    } else {
        authority.bytes().position(|b| b == b':').unwrap_or(authority.len())
    };
    let (host, rest) = authority.split_at_checked(end)?;
    let host_is_sound = match host.strip_prefix('[') {
        Some(literal) => literal.strip_suffix(']')?.parse::<Ipv6Addr>().is_ok(),
        None => host.bytes().all(is_reg_name_byte),
    };
    let port_is_sound = match rest.strip_prefix(':') {
        Some(port) => {
            port.bytes().all(|b| b.is_ascii_digit()) && (port.is_empty() || port.parse::<u16>().is_ok())
        }
        None => rest.is_empty(),
    };
    (host_is_sound && port_is_sound).then_some(host)
}

/// What the header lines say of the message's frame and the connection.
#[derive(Default)]
struct ControlData<'b> {
    host: Option<&'b str>,
    has_body: bool,
    close: bool,
    asks_keep_alive: bool,
}

impl<'b> ControlData<'b> {
    fn of(headers: &[httparse::Header<'b>], http10: bool) -> Result<ControlData<'b>, Reject> {
        let mut control = ControlData::default();
        let (mut length, mut coded) = (None, false);
        for line in headers {
            // The length first: it rules out nearly every line of an ordinary request at once.
            match line.name.len() {
                4 if line.name.eq_ignore_ascii_case("host") => {
                    if control.host.is_some() {
                        return Err(Reject::Malformed("there is more than one Host header"));
                    }
                    let host = std::str::from_utf8(line.value).ok().and_then(host_of);
                    control.host = Some(host.ok_or(Reject::Malformed("the Host header is malformed"))?);
                }
                10 if line.name.eq_ignore_ascii_case("connection") => {
                    for option in line.value.split(|b| *b == b',').map(<[u8]>::trim_ascii) {
                        control.close |= option.eq_ignore_ascii_case(b"close");
                        control.asks_keep_alive |= option.eq_ignore_ascii_case(b"keep-alive");
                    }
                }
                14 if line.name.eq_ignore_ascii_case("content-length") => {
                    if length.is_some() {
                        return Err(Reject::Malformed("there is more than one Content-Length header"));
                    }
                    length = Some(
                        decimal(line.value).ok_or(Reject::Malformed("the Content-Length is malformed"))?,
                    );
                }
                17 if line.name.eq_ignore_ascii_case("transfer-encoding") => {
                    // RFC 9112 6.1 and 6.3: anything but a single, final "chunked" leaves the end unknown.
                    if coded || http10 || !line.value.eq_ignore_ascii_case(b"chunked") {
                        return Err(Reject::Malformed("the Transfer-Encoding is not chunked alone"));
                    }
                    coded = true;
                }
                _ => {}
            }
        }
        if coded && length.is_some() {
            return Err(Reject::Malformed("the request has both Content-Length and Transfer-Encoding"));
        }
        control.has_body = coded || length.is_some_and(|n| n > 0);
        Ok(control)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(bytes: &[u8]) -> String {
        let mut room = header_room();
        match parse(bytes, &mut room) {
            Parsed::NeedMore => "more".into(),
            Parsed::Reject(reject) => format!("{reject:?}"),
            Parsed::Request(r, used) => format!(
                "{} {} {:?} host={:?} keep={} used={}",
                r.method,
                r.path,
                r.query,
                r.host,
                r.keep_alive,
                used == bytes.len()
            ),
        }
    }

    #[test]
    fn sound_requests() {
        for (bytes, expected) in [
            (
                "GET /ping?a=b?c HTTP/1.1\r\nHost: localhost:2025\r\n\r\n",
                r#"GET /ping Some("a=b?c") host=Some("localhost") keep=true used=true"#,
            ),
            ("GET /ping HTTP/1.0\r\n\r\n", "GET /ping None host=None keep=false used=true"),
            (
                "GET /ping HTTP/1.0\r\nConnection: x, Keep-Alive\r\n\r\n",
                "GET /ping None host=None keep=true used=true",
            ),
            (
                "GET /ping HTTP/1.1\r\nhost:[::1]:80\r\nconnection: CLOSE\r\n\r\n",
                r#"GET /ping None host=Some("[::1]") keep=false used=true"#,
            ),
            (
                "GET HTTP://LocalHost:2025?x HTTP/1.1\r\nHost: elsewhere\r\n\r\n",
                r#"GET / Some("x") host=Some("LocalHost") keep=true used=true"#,
            ),
            (
                "OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
                r#"OPTIONS * None host=Some("localhost") keep=true used=true"#,
            ),
            (
                "CONNECT a:1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
                r#"CONNECT  None host=Some("a") keep=true used=true"#,
            ),
            (
                "GET /x HTTP/1.1\r\nHost:\r\nContent-Length: 0\r\n\r\n",
                r#"GET /x None host=Some("") keep=true used=true"#,
            ),
            (
                "POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\n",
                r#"POST /x None host=Some("localhost") keep=false used=true"#,
            ),
            ("GET /ping HTTP/1.1\r\nHost: local", "more"),
            ("", "more"),
        ] {
            assert_eq!(verdict(bytes.as_bytes()), expected, "{bytes:?}");
        }
    }

    #[test]
    fn malformed_requests() {
        for bytes in [
            &b"\x16\x03\x01\x02\x00\x01\x00"[..],
            b"GET /ping\r\n\r\n",
            b"GET  /ping HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET ping HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET * HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"CONNECT /x HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"CONNECT localhost HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET https://localhost/ping HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET http://u@localhost/ping HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET http:///ping HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET /p#frag HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET /\xc3\xa9 HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET /a\\b HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET /ping HTTP/1.1\r\n\r\n",
            b"GET /ping HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
            b"GET /ping HTTP/1.0\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
            b"GET /ping HTTP/1.1\r\nHost: u@localhost\r\n\r\n",
            b"GET /ping HTTP/1.1\r\nHost: localhost:99999\r\n\r\n",
            b"GET /ping HTTP/1.1\r\nHost: [::1\r\n\r\n",
            b"GET /ping HTTP/1.1\r\nHost: a b\r\n\r\n",
            b"GET /ping HTTP/1.1\r\nHost: localhost\r\nA: b\r\n c\r\n\r\n",
            b"GET /ping HTTP/1.1\r\nHost: localhost\r\nA: b\rc\r\n\r\n",
            b"GET /ping HTTP/1.1\r\nHost: localhost\r\nA: b\0c\r\n\r\n",
            b"GET /ping HTTP/1.1\r\nHost : localhost\r\n\r\n",
            b"GET /ping HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx",
            b"GET /ping HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"POST /ping HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n",
            b"POST /ping HTTP/1.1\r\nHost: localhost\r\nContent-Length: +5\r\n\r\n",
            b"POST /ping HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n",
            b"POST /p HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"POST /p HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            b"POST /p HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"GET /ping HTTP/1.x\r\nHost: localhost\r\n\r\n",
            b"GET /ping HTTP/11.1\r\nHost: localhost\r\n\r\n",
            b"GET /ping http/1.1\r\nHost: localhost\r\n\r\n",
        ] {
            let verdict = verdict(bytes);
            assert!(verdict.starts_with("Malformed"), "{:?}: {verdict}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn heads_are_known_even_where_they_are_refused() {
        for (bytes, is_head) in [
            ("HEAD / HTTP/1.1\r\n\r\n", true),
            ("\r\n\nHEAD ", true),
            ("HEAD", false),
            ("GET / HEAD ", false),
        ] {
            assert_eq!(asks_for_head(bytes.as_bytes()), is_head, "{bytes:?}");
        }
    }

    #[test]
    fn versions() {
        for version in ["HTTP/0.9", "HTTP/1.2", "HTTP/2.0", "HTTP/3.0"] {
            let head = format!("GET /ping {version}\r\nHost: localhost\r\n\r\n");
            assert_eq!(verdict(head.as_bytes()), "Version", "{version}");
        }
    }

    /// Found by fuzzing: the answer depended on how the bytes were cut.
    #[test]
    fn trickled_bytes_get_the_answer_that_whole_ones_get() {
        let fields = |n: usize| "A: b\r\n".repeat(n);
        for head in [
            "GET /ping HTTP/2.0\r\nHost: localhost\r\n\r\n".to_owned(),
            "GET /ping HTTP/0.9\nHost: localhost\n\n".to_owned(),
            "GET /ping HTTP/2.00\r\n\r\n".to_owned(),
            "GET /ping HTTP/2.0\rx\n".to_owned(),
            "GET /ping HTTP/2\r\n\r\n".to_owned(),
            "GET /ping HTTQ/1.1\r\n\r\n".to_owned(),
            format!("{} / HTTP/1.1\r\nHost: localhost\r\n\r\n", "G".repeat(9000)),
            format!("GET / HTTP/1.1\r\nHost: localhost\r\nA: {}\0", "x".repeat(2 * HEAD_BYTES_MAX)),
            format!("GET / HTTP/1.1\r\nA: {}\r\n{}\r\n", "x".repeat(2 * HEAD_BYTES_MAX), fields(64)),
            format!("GET / HTTP/1.1\r\nHost: localhost\r\n{}\r\n", fields(64)),
        ] {
            let bytes = head.as_bytes();
            // Long ones by many bytes at a time: each step reads all of them anew.
            let step = bytes.len() / 64 + 1;
            let mut grown = (0..bytes.len()).step_by(step).map(|len| verdict(&bytes[..len]));
            assert_eq!(grown.find(|it| it != "more").unwrap_or(verdict(bytes)), verdict(bytes), "{head:.40}");
            assert!(!verdict(bytes).starts_with("GET"), "{head:.40}");
        }
    }

    #[test]
    fn limits() {
        let target = |n: usize| format!("GET /{} HTTP/1.1\r\nHost: localhost\r\n\r\n", "a".repeat(n - 1));
        assert!(verdict(target(TARGET_BYTES_MAX).as_bytes()).starts_with("GET"));
        assert_eq!(verdict(target(TARGET_BYTES_MAX + 1).as_bytes()), "TargetTooLong");
        // Known before the line ends, and for what has no end in sight.
        assert_eq!(verdict(format!("GET /{}", "a".repeat(TARGET_BYTES_MAX)).as_bytes()), "TargetTooLong");
        assert_eq!(verdict("a".repeat(65536).as_bytes()), "TargetTooLong");
        assert_eq!(verdict(format!("{} /unfinished", "a".repeat(9000)).as_bytes()), "TargetTooLong");

        let headers =
            |n: usize| format!("GET / HTTP/1.1\r\nHost: localhost\r\n{}\r\n", "a: b\r\n".repeat(n - 1));
        assert!(verdict(headers(HEADERS_MAX).as_bytes()).starts_with("GET"));
        assert_eq!(verdict(headers(HEADERS_MAX + 1).as_bytes()), "TooManyHeaders");

        let head = |n: usize| {
            let frame = "GET / HTTP/1.1\r\nHost: localhost\r\nA: \r\n\r\n";
            frame.replace("A: ", &format!("A: {}", "x".repeat(n - frame.len())))
        };
        assert!(verdict(head(HEAD_BYTES_MAX).as_bytes()).starts_with("GET"));
        assert_eq!(verdict(head(HEAD_BYTES_MAX + 1).as_bytes()), "HeadTooLarge");
        let unfinished = head(HEAD_BYTES_MAX + 9);
        assert_eq!(verdict(&unfinished.as_bytes()[..HEAD_BYTES_MAX]), "HeadTooLarge");
        assert_eq!(verdict(&unfinished.as_bytes()[..HEAD_BYTES_MAX - 1]), "more");
    }

    #[test]
    fn headers_are_found_without_case_and_repeated() {
        let bytes = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-KMS-Token: a\r\nx-kms-token:  b \r\n\r\n";
        let mut room = header_room();
        let Parsed::Request(request, _) = parse(bytes, &mut room) else { panic!("not a request") };
        assert_eq!(request.header("X-Kms-Token").collect::<Vec<_>>(), [&b"a"[..], b"b"]);
        assert!(request.has_header("HOST") && !request.has_header("Forwarded"));
    }
}
