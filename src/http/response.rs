//! An HTTP/1.1 response as a client reads it: RFC 9112, incremental and without I/O.
//!
//! Strict where a lenient reading would let two parties disagree on where the reply ends (RFC 9112
//! section 11.2): lines end in CRLF, lengths are digits, a reply has one framing.

#![warn(clippy::indexing_slicing)]

use std::fmt;
use std::time::UNIX_EPOCH;

use zeroize::Zeroizing;

use super::body::{Body, Framing};
use super::error::INTERIM_RESPONSES_MAX;
pub use super::error::{HEAD_BYTES_MAX, HEADERS_MAX, ResponseError};
use crate::buf::Buf;
use crate::text::decimal;

/// Longest reply body in bytes that the agent takes: a secret is at most about 30 KiB.
pub(crate) const REPLY_BYTES_MAX: usize = 128 * 1024;

/// A head begins like this. What does not is told from the first wrong byte: a TLS record or another
/// protocol's greeting need not run into the head's limit.
const HEAD_PREFIX: &[u8] = b"HTTP/1.";
const HEAD_END: &[u8] = b"\r\n\r\n";

/// A complete response.
pub struct Response {
    /// 200 to 599; 0 only from a parser that was asked too early.
    pub status: u16,
    /// The body, chunks joined; wiped on drop. Its allocation fits exactly if `Content-Length` announced it
    /// and is up to twice as large otherwise.
    pub body: Zeroizing<Vec<u8>>,
    /// `Date`, in seconds since 1970 (UTC), if there is a valid one.
    pub date_unix_s: Option<i64>,
    /// Seconds that the server asks us to wait: `x-acs-retry-after` (milliseconds, rounded up), else
    /// `Retry-After` (seconds, or a date relative to `Date`). As the server says it, up to `u32::MAX`: the
    /// ceiling is for the caller to set.
    pub retry_after_s: Option<u32>,
    /// Whether the connection may be used again (RFC 9112 section 9.3), as far as the response goes.
    /// Surplus bytes after it forbid that as well.
    pub keep_alive: bool,
}

impl fmt::Debug for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Response")
            .field("status", &self.status)
            .field("body_bytes", &self.body.len())
            .field("date_unix_s", &self.date_unix_s)
            .field("retry_after_s", &self.retry_after_s)
            .field("keep_alive", &self.keep_alive)
            .finish()
    }
}

/// How far a response has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Not complete; all bytes were taken.
    NeedMore,
    /// Complete. Of the bytes just fed `used` belonged to it; if that is not all of them, the server sent
    /// more than was asked for, and the connection must not be used again.
    Done {
        /// How many of the bytes fed last.
        used: usize,
    },
}

/// Reads one response to a request that was not `HEAD` or `CONNECT`. Gives the same result however the
/// bytes are split.
pub struct ResponseParser {
    body_bytes_max: usize,
    started: bool,
    interim_responses: u8,
    state: State,
}

enum State {
    /// The head as far as it has come.
    Head(Buf),
    Body {
        head: Head,
        body: Body,
    },
    Failed(ResponseError),
}

/// What the agent wants to know of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    status: u16,
    framing: Framing,
    date_unix_s: Option<i64>,
    retry_after_s: Option<u32>,
    keep_alive: bool,
}

impl ResponseParser {
    /// A parser of one response whose body may be `body_bytes_max` long.
    #[must_use]
    pub fn new(body_bytes_max: usize) -> ResponseParser {
        ResponseParser {
            body_bytes_max,
            started: false,
            interim_responses: 0,
            state: State::Head(Buf::with_max(HEAD_BYTES_MAX)),
        }
    }

    /// Takes the next bytes. Once complete, takes none (`used` is 0).
    ///
    /// # Errors
    /// What is wrong with the response; the same again on every later call.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Progress, ResponseError> {
        self.started |= !bytes.is_empty();
        let progress = self.advance(bytes);
        if let Err(error) = progress {
            self.state = State::Failed(error);
        }
        progress
    }

    /// The connection has ended. `Ok`: the response is complete, because that is how its end is told or
    /// because it was before.
    ///
    /// Over TLS this is for a proper `close_notify`: a bare end of the TCP connection can be forged and is
    /// [`ResponseError::Truncated`] for a body that only the end delimits.
    ///
    /// # Errors
    /// [`ResponseError::Truncated`], or what [`ResponseParser::feed`] has failed with.
    pub fn on_eof(&mut self) -> Result<(), ResponseError> {
        let ended = match &mut self.state {
            State::Head(_) => Err(ResponseError::Truncated),
            State::Body { body, .. } => body.on_eof(),
            State::Failed(error) => Err(*error),
        };
        if let Err(error) = ended {
            self.state = State::Failed(error);
        }
        ended
    }

    /// Whether a byte has come. If not, the request may be sent again on another connection (RFC 9110
    /// section 9.2.2 permitting).
    #[must_use]
    pub const fn started(&self) -> bool {
        self.started
    }

    /// The response, after [`Progress::Done`] or an `Ok` of [`ResponseParser::on_eof`].
    ///
    /// Called before that, which is the caller's mistake, it gives status 0 and no body: a response that
    /// nobody takes for a valid one. What has come of a body is not given away then.
    #[must_use]
    pub fn into_response(self) -> Response {
        match self.state {
            State::Body { head, body } if body.is_complete() => Response {
                status: head.status,
                body: body.into_bytes(),
                date_unix_s: head.date_unix_s,
                retry_after_s: head.retry_after_s,
                keep_alive: head.keep_alive,
            },
            State::Head(_) | State::Body { .. } | State::Failed(_) => Response {
                status: 0,
                body: Zeroizing::default(),
                date_unix_s: None,
                retry_after_s: None,
                keep_alive: false,
            },
        }
    }

    fn advance(&mut self, bytes: &[u8]) -> Result<Progress, ResponseError> {
        let mut rest = bytes;
        loop {
            match &mut self.state {
                State::Head(held) => {
                    let complete;
                    (complete, rest) = take_head(held, rest)?;
                    if !complete {
                        return Ok(Progress::NeedMore);
                    }
                    let head = parse_head(held.as_slice())?;
                    self.state = match head.status {
                        101 => return Err(ResponseError::UnexpectedUpgrade),
                        100..200 if self.interim_responses == INTERIM_RESPONSES_MAX => {
                            return Err(ResponseError::TooManyInterimResponses);
                        }
                        100..200 => {
                            self.interim_responses += 1;
                            State::Head(Buf::with_max(HEAD_BYTES_MAX))
                        }
                        _ => State::Body { head, body: Body::new(head.framing, self.body_bytes_max)? },
                    };
                }
                State::Body { body, .. } => {
                    rest = body.feed(rest)?;
                    return Ok(if body.is_complete() {
                        Progress::Done { used: bytes.len() - rest.len() }
                    } else {
                        Progress::NeedMore
                    });
                }
                State::Failed(error) => return Err(*error),
            }
        }
    }
}

/// Moves what belongs to the head from the front of `bytes` to `held`. Gives whether the head is complete
/// and what is left.
///
/// Looks at each byte once, however they come: a head that trickles in costs no more than one in one piece.
/// It must look for what httparse would forgive: a bare LF as the end of a line, empty lines before it.
fn take_head<'a>(held: &mut Buf, bytes: &'a [u8]) -> Result<(bool, &'a [u8]), ResponseError> {
    let mut tail = [0; HEAD_END.len()]; // The last bytes, newest last; wide enough to see the head's end.
    for (to, from) in tail.iter_mut().rev().zip(held.as_slice().iter().rev()) {
        *to = *from;
    }
    let mut complete = false;
    let mut used = 0;
    for &byte in bytes {
        let at = held.len() + used;
        if at == HEAD_BYTES_MAX {
            return Err(ResponseError::HeadTooLarge);
        }
        if HEAD_PREFIX.get(at).is_some_and(|expected| *expected != byte) {
            return Err(ResponseError::NotHttp);
        }
        if byte == b'\n' && !tail.ends_with(b"\r") {
            return Err(ResponseError::BadHead("a line ends in a bare LF"));
        }
        tail.rotate_left(1);
        if let Some(newest) = tail.last_mut() {
            *newest = byte;
        }
        used += 1;
        if tail == HEAD_END {
            complete = true;
            break;
        }
    }
    let (head, rest) = bytes.split_at(used);
    held.extend(head).map_err(|_| ResponseError::HeadTooLarge)?;
    Ok((complete, rest))
}

fn parse_head(bytes: &[u8]) -> Result<Head, ResponseError> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    match response.parse(bytes) {
        Ok(httparse::Status::Complete(used)) if used == bytes.len() => {}
        Ok(_) => return Err(ResponseError::BadHead("it ends early")),
        Err(error) => return Err(head_error(error)),
    }
    let (Some(minor_version), Some(status)) = (response.version, response.code) else {
        return Err(ResponseError::BadHead("it has no status line"));
    };
    if !(100..=599).contains(&status) {
        return Err(ResponseError::BadHead("the status is not between 100 and 599"));
    }
    let fields = Fields(response.headers);
    let framing = framing(status, minor_version, &fields)?;
    let date_unix_s = fields.first("date").and_then(http_date);
    Ok(Head {
        status,
        framing,
        date_unix_s,
        retry_after_s: retry_after_s(&fields, date_unix_s),
        keep_alive: framing != Framing::UntilClose && is_persistent(minor_version, &fields),
    })
}

const fn head_error(error: httparse::Error) -> ResponseError {
    match error {
        httparse::Error::TooManyHeaders => ResponseError::TooManyHeaders,
        httparse::Error::Version => ResponseError::BadHead("the version is not HTTP/1.0 or HTTP/1.1"),
        httparse::Error::Status => ResponseError::BadHead("the status line is malformed"),
        httparse::Error::HeaderName => ResponseError::BadHead("a header name is malformed"),
        httparse::Error::HeaderValue => ResponseError::BadHead("a header value is malformed"),
        httparse::Error::NewLine => ResponseError::BadHead("a line does not end in CRLF"),
        httparse::Error::Token => ResponseError::BadHead("it has a character that is not allowed"),
    }
}

/// The header fields of a head.
struct Fields<'a>(&'a [httparse::Header<'a>]);

impl<'a> Fields<'a> {
    /// Values of the fields of this name, in order, without the white space around them.
    fn values(&self, name: &'static str) -> impl Iterator<Item = &'a [u8]> {
        let fields = self.0.iter().filter(move |field| field.name.eq_ignore_ascii_case(name));
        fields.map(|field| field.value.trim_ascii())
    }

    fn first(&self, name: &'static str) -> Option<&'a str> {
        self.values(name).next().and_then(|value| std::str::from_utf8(value).ok())
    }

    /// Members of the comma-separated lists in the fields of this name, empty ones included.
    fn members(&self, name: &'static str) -> impl Iterator<Item = &'a [u8]> {
        self.values(name).flat_map(|value| value.split(|byte| *byte == b',')).map(<[u8]>::trim_ascii)
    }
}

/// RFC 9112 section 6.3, stricter where it lets a recipient be.
fn framing(status: u16, minor_version: u8, fields: &Fields<'_>) -> Result<Framing, ResponseError> {
    if status < 200 || status == 204 || status == 304 {
        return Ok(Framing::Length(0)); // Whatever the header says.
    }
    let length = content_length(fields)?;
    if fields.values("transfer-encoding").next().is_none() {
        return Ok(length.map_or(Framing::UntilClose, Framing::Length));
    }
    if length.is_some() {
        return Err(ResponseError::TwoFramings);
    }
    // Empty members count for nothing (RFC 9110 section 5.6.1.2); HTTP/1.0 knows no transfer codings.
    let mut codings = fields.members("transfer-encoding").filter(|coding| !coding.is_empty());
    let is_chunked = codings.next().is_some_and(|coding| coding.eq_ignore_ascii_case(b"chunked"));
    if is_chunked && codings.next().is_none() && minor_version == 1 {
        Ok(Framing::Chunked)
    } else {
        Err(ResponseError::BadTransferEncoding)
    }
}

/// `Content-Length`: digits, or several times the same number, in a list or in several fields.
fn content_length(fields: &Fields<'_>) -> Result<Option<usize>, ResponseError> {
    let mut length = None;
    for member in fields.members("content-length") {
        let number = decimal(member).and_then(|number| usize::try_from(number).ok());
        let number = number.ok_or(ResponseError::BadContentLength)?;
        if length.replace(number).is_some_and(|before| before != number) {
            return Err(ResponseError::BadContentLength);
        }
    }
    Ok(length)
}

/// RFC 9112 section 9.3.
fn is_persistent(minor_version: u8, fields: &Fields<'_>) -> bool {
    let has = |option: &[u8]| fields.members("connection").any(|member| member.eq_ignore_ascii_case(option));
    !has(b"close") && (minor_version == 1 || has(b"keep-alive"))
}

/// What the server asks of us, in whole seconds.
///
/// The unit of `x-acs-retry-after` is not documented; the official SDK's core takes it for milliseconds
/// (PyPI alibabacloud-tea-openapi 0.4.6 `Utils.get_throttling_time_left` gives it to darabonba-core 1.0.9
/// `DaraCore.sleep`, which divides by 1,000) and ignores what is not a positive integer.
fn retry_after_s(fields: &Fields<'_>, date_unix_s: Option<i64>) -> Option<u32> {
    let saturated = |seconds: u64| u32::try_from(seconds).unwrap_or(u32::MAX);
    let own_ms = fields.values("x-acs-retry-after").find_map(decimal).filter(|ms| *ms > 0);
    if let Some(ms) = own_ms {
        return Some(saturated(ms.div_ceil(1000)));
    }
    let value = fields.first("retry-after")?;
    if let Some(seconds) = decimal(value.as_bytes()) {
        return Some(saturated(seconds));
    }
    let wait = http_date(value)?.saturating_sub(date_unix_s?);
    Some(saturated(u64::try_from(wait).unwrap_or(0)))
}

fn http_date(text: &str) -> Option<i64> {
    let since = httpdate::parse_http_date(text).ok()?.duration_since(UNIX_EPOCH).ok()?;
    i64::try_from(since.as_secs()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES_MAX: usize = 64;
    const DATE: &str = "Date: Thu, 02 Jan 2025 03:04:05 GMT\r\n";
    const DATE_UNIX_S: i64 = 1_735_787_045;

    /// The response and the number of surplus bytes, or the error; `pieces` end with the connection.
    fn run(pieces: &[&[u8]]) -> Result<(Response, usize), ResponseError> {
        let mut parser = ResponseParser::new(BYTES_MAX);
        let mut surplus = 0;
        let mut done = false;
        for piece in pieces {
            match parser.feed(piece)? {
                Progress::NeedMore => assert!(!done),
                Progress::Done { used } => {
                    assert!(!done || used == 0);
                    done = true;
                    surplus += piece.len() - used;
                }
            }
        }
        parser.on_eof()?;
        assert!(parser.started() != pieces.concat().is_empty());
        Ok((parser.into_response(), surplus))
    }

    /// As [`run`] in one piece, after checking that every split in two and single bytes give the same.
    fn run_split(bytes: &[u8]) -> Result<(Response, usize), ResponseError> {
        let whole = run(&[bytes]);
        let seen = |result: &Result<(Response, usize), ResponseError>| match result {
            Ok((response, surplus)) => format!("{response:?} {:?} {surplus}", response.body.as_slice()),
            Err(error) => format!("{error:?}"),
        };
        for at in 0..bytes.len() {
            assert_eq!(seen(&run(&[&bytes[..at], &bytes[at..]])), seen(&whole), "split at {at}");
        }
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(seen(&run(&single)), seen(&whole), "byte by byte");
        whole
    }

    #[test]
    fn responses_end_where_their_framing_says() {
        for (bytes, status, body, surplus, keep_alive) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", 200, "hello", 0, true),
            ("HTTP/1.1 200\r\ncontent-length:5\r\n\r\nhello!?", 200, "hello", 2, true),
            ("HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", 200, "", 0, true),
            ("HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\nhello", 200, "hello", 0, true),
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 05\r\n\r\nhello",
                200,
                "hello",
                0,
                true,
            ),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
                200,
                "hello",
                0,
                true,
            ),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: , Chunked ,\r\n\r\n2;x\r\nhi\r\n0\r\nA: b\r\n\r\nX",
                200,
                "hi",
                1,
                true,
            ),
            ("HTTP/1.1 200 OK\r\n\r\nhello", 200, "hello", 0, false),
            ("HTTP/1.1 200 OK\r\n\r\n", 200, "", 0, false),
            ("HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx", 200, "x", 0, false),
            ("HTTP/1.0 200 OK\r\nConnection: x, Keep-Alive\r\nContent-Length: 1\r\n\r\nx", 200, "x", 0, true),
            ("HTTP/1.1 404 No\r\nConnection: CLOSE\r\nContent-Length: 1\r\n\r\nx", 404, "x", 0, false),
            (
                "HTTP/1.1 200 OK\r\nConnection: a\r\nConnection: keep-alive,close\r\nContent-Length: 0\r\n\r\n",
                200,
                "",
                0,
                false,
            ),
            ("HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", 204, "", 0, true),
            ("HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n", 304, "", 0, true),
            (
                "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: a\r\nContent-Length: 9\r\n\r\nHTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\nno",
                503,
                "no",
                0,
                true,
            ),
            ("HTTP/1.1 200 \u{e9}\r\nX: \u{e9}\t\r\nContent-Length: 0\r\n\r\n", 200, "", 0, true),
        ] {
            let (response, extra) =
                run_split(bytes.as_bytes()).unwrap_or_else(|error| panic!("{bytes:?}: {error}"));
            assert_eq!(
                (response.status, response.body.as_slice(), extra, response.keep_alive),
                (status, body.as_bytes(), surplus, keep_alive),
                "{bytes:?}"
            );
        }
    }

    #[test]
    fn malformed_responses_are_refused() {
        use ResponseError as E;
        for (bytes, error) in [
            ("", E::Truncated),
            ("HTTP/1.1 200 OK\r\n", E::Truncated),
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell", E::Truncated),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n", E::Truncated),
            ("HTTP/1.1 100 Continue\r\n\r\n", E::Truncated),
            ("SSH-2.0-OpenSSH\r\n", E::NotHttp),
            ("\x15\x03\x01", E::NotHttp),
            ("\r\nHTTP/1.1 200 OK\r\n\r\n", E::NotHttp),
            ("HTTP/2 200\r\n\r\n", E::NotHttp),
            ("http/1.1 200 OK\r\n\r\n", E::NotHttp),
            ("HTTP/1.2 200 OK\r\n\r\n", E::BadHead("the version is not HTTP/1.0 or HTTP/1.1")),
            ("HTTP/1.1 2000 OK\r\n\r\n", E::BadHead("the status line is malformed")),
            ("HTTP/1.1 20 OK\r\n\r\n", E::BadHead("the status line is malformed")),
            ("HTTP/1.1 +20 OK\r\n\r\n", E::BadHead("the status line is malformed")),
            ("HTTP/1.1 099 Low\r\n\r\n", E::BadHead("the status is not between 100 and 599")),
            ("HTTP/1.1 600 High\r\n\r\n", E::BadHead("the status is not between 100 and 599")),
            ("HTTP/1.1 200 O\0K\r\n\r\n", E::BadHead("the status line is malformed")),
            ("HTTP/1.1 200 OK\nContent-Length: 0\r\n\r\n", E::BadHead("a line ends in a bare LF")),
            ("HTTP/1.1 200 OK\r\nA: b\n\n", E::BadHead("a line ends in a bare LF")),
            ("HTTP/1.1 200 OK\r\nA: b\rc\r\n\r\n", E::BadHead("a header value is malformed")),
            ("HTTP/1.1 200 OK\r\nA: b\0\r\n\r\n", E::BadHead("a header value is malformed")),
            ("HTTP/1.1 200 OK\r\nA\0: b\r\n\r\n", E::BadHead("a header name is malformed")),
            ("HTTP/1.1 200 OK\r\nA : b\r\n\r\n", E::BadHead("a header name is malformed")),
            ("HTTP/1.1 200 OK\r\n: b\r\n\r\n", E::BadHead("a header name is malformed")),
            ("HTTP/1.1 200 OK\r\nNoColon\r\n\r\n", E::BadHead("a header name is malformed")),
            ("HTTP/1.1 200 OK\r\nA: b\r\n folded\r\n\r\n", E::BadHead("a header name is malformed")),
            ("HTTP/1.1 200 OK\r\n A: b\r\n\r\n", E::BadHead("a header name is malformed")),
            ("HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n", E::UnexpectedUpgrade),
            ("HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello", E::BadContentLength),
            ("HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello", E::BadContentLength),
            ("HTTP/1.1 200 OK\r\nContent-Length: 5x\r\n\r\nhello", E::BadContentLength),
            ("HTTP/1.1 200 OK\r\nContent-Length: 0x5\r\n\r\nhello", E::BadContentLength),
            ("HTTP/1.1 200 OK\r\nContent-Length: 5 5\r\n\r\nhello", E::BadContentLength),
            ("HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\nhello", E::BadContentLength),
            ("HTTP/1.1 200 OK\r\nContent-Length: 5,\r\n\r\nhello", E::BadContentLength),
            ("HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\nhello", E::BadContentLength),
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", E::BadContentLength),
            ("HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551621\r\n\r\nhello", E::BadContentLength),
            ("HTTP/1.1 200 OK\r\nContent-Length: 65\r\n\r\n", E::BodyTooLarge { bytes_max: BYTES_MAX }),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n41\r\n",
                E::BodyTooLarge { bytes_max: BYTES_MAX },
            ),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\rx", E::BadChunk),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", E::TwoFramings),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", E::BadTransferEncoding),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", E::BadTransferEncoding),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
                E::BadTransferEncoding,
            ),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: xchunked\r\n\r\n", E::BadTransferEncoding),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding:\r\n\r\n", E::BadTransferEncoding),
            ("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", E::BadTransferEncoding),
        ] {
            assert_eq!(run_split(bytes.as_bytes()).map(|_| ()), Err(error), "{bytes:?}");
        }
    }

    #[test]
    fn limits_hold_to_the_byte_and_to_the_field() {
        let pieces = |bytes: &[u8]| run(&bytes.chunks(1000).collect::<Vec<_>>()).map(|_| ());
        let head = |bytes: usize| {
            let fixed = "HTTP/1.1 204 No\r\nA: \r\n\r\n".len();
            format!("HTTP/1.1 204 No\r\nA: {}\r\n\r\n", "x".repeat(bytes - fixed))
        };
        assert_eq!(head(HEAD_BYTES_MAX).len(), HEAD_BYTES_MAX);
        for (bytes, result) in [
            (head(HEAD_BYTES_MAX), Ok(())),
            (head(HEAD_BYTES_MAX + 1), Err(ResponseError::HeadTooLarge)),
            ("HTTP/1.".to_owned() + &"x".repeat(HEAD_BYTES_MAX), Err(ResponseError::HeadTooLarge)),
            (format!("HTTP/1.1 204 No\r\n{}\r\n", "A: b\r\n".repeat(HEADERS_MAX)), Ok(())),
            (
                format!("HTTP/1.1 204 No\r\n{}\r\n", "A: b\r\n".repeat(HEADERS_MAX + 1)),
                Err(ResponseError::TooManyHeaders),
            ),
            ("HTTP/1.1 100 C\r\n\r\n".repeat(8) + "HTTP/1.1 204 No\r\n\r\n", Ok(())),
            (
                "HTTP/1.1 100 C\r\n\r\n".repeat(9) + "HTTP/1.1 204 No\r\n\r\n",
                Err(ResponseError::TooManyInterimResponses),
            ),
            (format!("HTTP/1.1 200 OK\r\n\r\n{}", "x".repeat(BYTES_MAX)), Ok(())),
            (
                format!("HTTP/1.1 200 OK\r\n\r\n{}", "x".repeat(BYTES_MAX + 1)),
                Err(ResponseError::BodyTooLarge { bytes_max: BYTES_MAX }),
            ),
        ] {
            assert_eq!(pieces(bytes.as_bytes()), result, "{:.40}", bytes);
            assert_eq!(run(&[bytes.as_bytes()]).map(|_| ()), result, "{:.40}", bytes);
        }
    }

    #[test]
    fn date_and_retry_after() {
        let http_date = "Thu, 02 Jan 2025 03:05:05 GMT";
        for (header, retry_after_s) in [
            ("", None),
            ("Retry-After: 7\r\n", Some(7)),
            ("Retry-After: 0\r\n", Some(0)),
            ("Retry-After: -7\r\n", None),
            ("Retry-After: +7\r\n", None),
            ("Retry-After: 1.5\r\n", None),
            ("Retry-After: soon\r\n", None),
            ("Retry-After: 99999999999\r\n", Some(u32::MAX)),
            (&format!("Retry-After: {http_date}\r\n"), Some(60)),
            ("Retry-After: Thu, 02 Jan 2025 03:04:00 GMT\r\n", Some(0)),
            ("x-acs-retry-after: 1500\r\nRetry-After: 7\r\n", Some(2)),
            ("X-Acs-Retry-After: 1\r\n", Some(1)),
            ("x-acs-retry-after: 0\r\n", None),
            ("x-acs-retry-after: -1\r\nRetry-After: 7\r\n", Some(7)),
            ("x-acs-retry-after: 18446744073709551615\r\n", Some(u32::MAX)),
        ] {
            let bytes = format!("HTTP/1.1 429 Slow\r\n{DATE}{header}Content-Length: 0\r\n\r\n");
            let (response, _) = run_split(bytes.as_bytes()).unwrap();
            assert_eq!(response.date_unix_s, Some(DATE_UNIX_S));
            assert_eq!(response.retry_after_s, retry_after_s, "{header:?}");
        }
        let bytes = format!("HTTP/1.1 204 No\r\nDate: today\r\nRetry-After: {http_date}\r\n\r\n");
        let (response, _) = run(&[bytes.as_bytes()]).unwrap();
        assert_eq!((response.date_unix_s, response.retry_after_s), (None, None));
    }

    #[test]
    fn stays_done_and_stays_failed() {
        let mut parser = ResponseParser::new(BYTES_MAX);
        assert!(!parser.started());
        assert_eq!(parser.feed(b""), Ok(Progress::NeedMore));
        assert!(!parser.started());
        let bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nxyz";
        assert_eq!(parser.feed(bytes), Ok(Progress::Done { used: bytes.len() - 2 }));
        assert_eq!(parser.feed(b"more"), Ok(Progress::Done { used: 0 }));
        assert_eq!(parser.on_eof(), Ok(()));
        assert_eq!(parser.into_response().body.as_slice(), b"x");

        let mut parser = ResponseParser::new(BYTES_MAX);
        assert_eq!(parser.feed(b"SMTP"), Err(ResponseError::NotHttp));
        assert_eq!(parser.feed(b"HTTP/1.1 204 No\r\n\r\n"), Err(ResponseError::NotHttp));
        assert_eq!(parser.on_eof(), Err(ResponseError::NotHttp));
        assert_eq!(parser.into_response().status, 0);

        let mut parser = ResponseParser::new(BYTES_MAX);
        assert_eq!(parser.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nx"), Ok(Progress::NeedMore));
        let response = parser.into_response();
        assert_eq!((response.status, response.body.len(), response.keep_alive), (0, 0, false));
    }

    #[test]
    fn debug_shows_no_body() {
        let (response, _) = run(&[b"HTTP/1.1 200 OK\r\n\r\nhush"]).unwrap();
        assert!(!format!("{response:?}").contains(&format!("{:?}", b"hush")));
        assert!(format!("{response:?}").contains("body_bytes: 4"));
    }
}
