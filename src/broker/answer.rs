//! What a client is told: a secret, or why not.

use super::gate::Denial;
use crate::cache::Body;
use crate::call::{CallError, CallErrorKind};
use crate::http::write::{self, Date, Persistence};
use crate::kms::reply::KmsError;
use crate::random::Random;
use crate::time::Mono;
use std::borrow::Cow;
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

const JSON: &str = "application/json";

/// Where the value of a reply came from: the `X-Cache` header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XCache {
    /// From memory.
    Hit,
    /// From KMS, for this reader.
    Miss,
    /// From KMS, because the reader asked with `refreshNow`.
    Refresh,
    /// From memory past its life, since KMS is failing.
    Stale,
}

impl fmt::Display for XCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            XCache::Hit => "HIT",
            XCache::Miss => "MISS",
            XCache::Refresh => "REFRESH",
            XCache::Stale => "STALE",
        })
    }
}

/// Why there is no value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The status.
    pub status: u16,
    /// The `Code`.
    pub code: Cow<'static, str>,
    /// The `Message`: what failed and where, nothing secret.
    pub message: Cow<'static, str>,
    /// KMS's `RequestId`; empty where the failure is the agent's to tell.
    pub request_id: String,
    /// `Retry-After`, seconds.
    pub retry_after_s: Option<u64>,
}

impl Failure {
    /// KMS's own words.
    #[must_use]
    pub fn from_kms(error: &KmsError) -> Failure {
        Failure {
            status: error.status,
            code: error.code.clone().into(),
            message: error.message.clone().into(),
            request_id: error.request_id.clone(),
            retry_after_s: None,
        }
    }

    /// A call that brought no reply.
    #[must_use]
    pub fn from_call(error: CallError) -> Failure {
        let (status, code) = match error.kind {
            CallErrorKind::Timeout => (504, "UpstreamTimeout"),
            CallErrorKind::Unreachable => (502, "UpstreamUnreachable"),
            CallErrorKind::InvalidResponse => (502, "UpstreamInvalidResponse"),
        };
        Failure::ours(status, code, error.message)
    }

    /// A reply that KMS cannot have meant.
    #[must_use]
    pub fn invalid_response(what: String) -> Failure {
        Failure::ours(502, "UpstreamInvalidResponse", what)
    }

    /// Nobody to be for KMS.
    #[must_use]
    pub fn no_credentials(why: &impl fmt::Display, retry_after: Duration) -> Failure {
        let seconds = retry_after.as_secs() + u64::from(retry_after.subsec_nanos() > 0);
        let failure = Failure::ours(503, "CredentialUnavailable", why.to_string());
        Failure { retry_after_s: Some(seconds.max(1)), ..failure }
    }

    /// A failure of the agent's own telling.
    #[must_use]
    pub fn ours(status: u16, code: &'static str, message: impl Into<Cow<'static, str>>) -> Failure {
        Failure {
            status,
            code: code.into(),
            message: message.into(),
            request_id: String::new(),
            retry_after_s: None,
        }
    }
}

impl From<Denial> for Failure {
    fn from(denial: Denial) -> Failure {
        let retry_after_s = (denial.status == 429).then_some(1);
        Failure { retry_after_s, ..Failure::ours(denial.status, denial.code, denial.message) }
    }
}

/// The content of a reply.
#[derive(Clone, Debug)]
pub enum Content {
    /// KMS's reply, when KMS gave it, and where it came from now.
    Secret(Body, Mono, XCache),
    /// None.
    Failure(Rc<Failure>),
}

/// Writes replies; holds what they share.
#[derive(Debug)]
pub struct Writer {
    date: Date,
    random: Random,
}

impl Writer {
    /// `random` makes request ids.
    #[must_use]
    pub fn new(random: Random) -> Writer {
        Writer { date: Date::default(), random }
    }

    /// Brings `Date` to the second; once a tick.
    pub fn set_time(&mut self, unix_s: i64) {
        self.date.set(unix_s);
    }

    /// A secret. HEAD gets the same without the body (RFC 9110 9.3.2).
    pub fn secret(&self, out: &mut Vec<u8>, body: &[u8], age: Duration, x_cache: XCache, to: Manner) {
        write::begin(out, &self.date, 200, JSON, body.len());
        write::header(out, "X-Cache", x_cache);
        write::header(out, "Age", age.as_secs());
        to.end(out, body);
    }

    /// A failure, as KMS words its own: `{"Code":..,"Message":..,"RequestId":..}`.
    pub fn failure(&mut self, out: &mut Vec<u8>, failure: &Failure, to: Manner) {
        let request_id = match failure.request_id.as_str() {
            "" => Cow::Owned(uuid(self.random.next_u128())),
            theirs => Cow::Borrowed(theirs),
        };
        let body = serde_json::json!({
            "Code": failure.code,
            "Message": failure.message,
            "RequestId": request_id,
        });
        let body = body.to_string();
        write::begin(out, &self.date, failure.status, JSON, body.len());
        if failure.status == 405 {
            write::header(out, "Allow", "GET, HEAD");
        }
        if let Some(seconds) = failure.retry_after_s {
            write::header(out, "Retry-After", seconds);
        }
        to.end(out, body.as_bytes());
    }

    /// `/ping`.
    pub fn healthy(&self, out: &mut Vec<u8>, to: Manner) {
        const HEALTHY: &[u8] = b"healthy";
        write::begin(out, &self.date, 200, "text/plain", HEALTHY.len());
        to.end(out, HEALTHY);
    }
}

/// How a client wants its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manner {
    /// HEAD: no body.
    pub head_only: bool,
    /// What becomes of the connection.
    pub persistence: Persistence,
}

impl Manner {
    fn end(self, out: &mut Vec<u8>, body: &[u8]) {
        write::end(out, self.persistence);
        if !self.head_only {
            out.extend_from_slice(body);
        }
    }
}

/// A version 4 UUID (RFC 9562 5.4), upper case as KMS's request ids are not: ours are told apart.
fn uuid(bits: u128) -> String {
    let bits = bits & !(0xf << 76) | (4 << 76);
    let bits = bits & !(3 << 62) | (2 << 62);
    let hex = format!("{bits:032X}");
    let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
    format!("{}-{}-{}-{}-{}", part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEP: Manner = Manner { head_only: false, persistence: Persistence::KeepAlive };

    fn text(write: impl FnOnce(&mut Writer, &mut Vec<u8>)) -> String {
        let (mut writer, mut out) = (Writer::new(Random::from_seed(1)), Vec::new());
        writer.set_time(784_111_777);
        write(&mut writer, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_secret_byte_for_byte() {
        let full =
            text(|w, out| w.secret(out, b"{\"a\": 1}", Duration::from_millis(2999), XCache::Hit, KEEP));
        assert_eq!(
            full,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 8\r\n\
             Date: Sun, 06 Nov 1994 08:49:37 GMT\r\nCache-Control: no-store\r\nX-Cache: HIT\r\nAge: 2\r\n\r\n{\"a\": 1}"
        );
        let head = text(|w, out| {
            let to = Manner { head_only: true, ..KEEP };
            w.secret(out, b"{\"a\": 1}", Duration::from_secs(2), XCache::Hit, to);
        });
        assert_eq!(Some(head.as_str()), full.strip_suffix("{\"a\": 1}"));
    }

    #[test]
    fn failures_are_json_whatever_they_quote() {
        let failure = Failure::ours(400, "InvalidParameter", "unknown parameter: a\"\\\u{1}é");
        let reply = text(|w, out| w.failure(out, &failure, KEEP));
        let (_, body) = reply.split_once("\r\n\r\n").unwrap();
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(body["Message"], "unknown parameter: a\"\\\u{1}é");
        let id = body["RequestId"].as_str().unwrap();
        assert_eq!((id.len(), &id[14..15]), (36, "4"), "{id}");
    }

    #[test]
    fn statuses_bring_their_headers() {
        let of = |failure: Failure| text(|w, out| w.failure(out, &failure, KEEP));
        assert!(of(Failure::ours(405, "MethodNotAllowed", "")).contains("\r\nAllow: GET, HEAD\r\n"));
        let wait = Duration::from_millis(1200);
        assert!(of(Failure::no_credentials(&"x", wait)).contains("\r\nRetry-After: 2\r\n"));
        assert!(of(Failure::no_credentials(&"x", Duration::ZERO)).contains("\r\nRetry-After: 1\r\n"));
    }
}
