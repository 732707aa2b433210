//! Writes reply heads (RFC 9112 4, RFC 9110 8 and 15). Nothing here allocates beyond `out`, and nothing goes
//! through `fmt`, which would cost a hit more than all else it does here.

use std::io::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The `Date` value of the current second, formatted once (RFC 9110 5.6.7).
#[derive(Debug, Default)]
pub(crate) struct Date {
    unix_s: Option<i64>,
    text: Vec<u8>,
}

impl Date {
    /// Brings it to this second; cheap if it is there already.
    pub(crate) fn set(&mut self, unix_s: i64) {
        if self.unix_s != Some(unix_s) {
            self.unix_s = Some(unix_s);
            // httpdate panics past the year 9999.
            let seconds = u64::try_from(unix_s).unwrap_or(0).min(253_402_300_799);
            let time = UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or(SystemTime::UNIX_EPOCH);
            self.text.clear();
            let _ = write!(self.text, "{}", httpdate::fmt_http_date(time));
        }
    }
}

/// What a reply says of its connection's future (RFC 9112 9.3, 9.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Persistence {
    /// HTTP/1.1's default: nothing needs saying.
    KeepAlive,
    /// To an HTTP/1.0 client that asked for it.
    KeepAliveSaid,
    /// The last reply on this connection.
    Close,
}

/// Begins a reply: status line, `Content-Type`, `Content-Length`, `Date` and `Cache-Control`.
pub(crate) fn begin(out: &mut Vec<u8>, date: &Date, status: u16, content_type: &str, content_length: usize) {
    if status == 200 {
        // Nearly all of them.
        out.extend_from_slice(b"HTTP/1.1 200 OK\r\nContent-Type: ");
    } else {
        let mut digits = itoa::Buffer::new();
        for part in ["HTTP/1.1 ", digits.format(status), " ", reason(status), "\r\nContent-Type: "] {
            out.extend_from_slice(part.as_bytes());
        }
    }
    out.extend_from_slice(content_type.as_bytes());
    number(out, "\r\nContent-Length", content_length as u64);
    out.extend_from_slice(b"Date: ");
    out.extend_from_slice(&date.text);
    out.extend_from_slice(b"\r\nCache-Control: no-store\r\n");
}

/// One more header line. `value` is ours, never foreign text.
pub(crate) fn header(out: &mut Vec<u8>, name: &str, value: &str) {
    for part in [name, ": ", value, "\r\n"] {
        out.extend_from_slice(part.as_bytes());
    }
}

/// A header line whose value is a number.
pub(crate) fn number(out: &mut Vec<u8>, name: &str, value: u64) {
    header(out, name, itoa::Buffer::new().format(value));
}

pub(crate) fn end(out: &mut Vec<u8>, persistence: Persistence) {
    out.extend_from_slice(match persistence {
        Persistence::KeepAlive => b"\r\n",
        Persistence::KeepAliveSaid => b"Connection: keep-alive\r\n\r\n",
        Persistence::Close => b"Connection: close\r\n\r\n",
    });
}

/// The reason phrases of RFC 9110 15 for the statuses that we or KMS give; empty for others, which
/// RFC 9112 4 allows.
pub(crate) const fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        414 => "URI Too Long",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_byte_for_byte() {
        let mut date = Date::default();
        date.set(784_111_777);
        let mut out = Vec::new();
        begin(&mut out, &date, 404, "application/json", 7);
        number(&mut out, "Age", 3);
        end(&mut out, Persistence::Close);
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length: 7\r\n\
             Date: Sun, 06 Nov 1994 08:49:37 GMT\r\nCache-Control: no-store\r\nAge: 3\r\n\
             Connection: close\r\n\r\n"
        );
    }

    #[test]
    fn an_absurd_clock_does_not_panic() {
        let mut date = Date::default();
        for unix_s in [-1, 0, i64::MAX] {
            date.set(unix_s);
            assert_eq!(date.text.len(), 29, "{unix_s}");
        }
    }
}
