//! What a client is told: a secret, or why not.

use super::gate::Denial;
use crate::cache::{Body, Span};
use crate::call::{CallError, CallErrorKind};
use crate::config::ResponseType;
use crate::http::write::{self, Date, Persistence};
use crate::kms::format::{self, Kv};
use crate::kms::reply::KmsError;
use crate::metrics::{self, Outcome};
use crate::random::Random;
use crate::time::Mono;
use serde_json::json;
use std::borrow::Cow;
use std::fmt;
use std::rc::Rc;
use std::time::Duration;
use zeroize::Zeroizing;

/// A client without a secret is told to come back after this at the latest: an operator may be at work.
const NO_CREDENTIALS_RETRY_MAX: Duration = Duration::from_secs(60);
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
        f.write_str(self.as_str())
    }
}

impl XCache {
    /// The header's value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            XCache::Hit => "HIT",
            XCache::Miss => "MISS",
            XCache::Refresh => "REFRESH",
            XCache::Stale => "STALE",
        }
    }
}

impl From<XCache> for Outcome {
    fn from(x_cache: XCache) -> Outcome {
        match x_cache {
            XCache::Hit => Outcome::Hit,
            XCache::Miss => Outcome::Miss,
            XCache::Refresh => Outcome::Refresh,
            XCache::Stale => Outcome::Stale,
        }
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
    /// As what it is counted.
    pub outcome: Outcome,
    /// A gate refused the request: AWS's agent says that in plain text.
    at_gate: bool,
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
            outcome: Outcome::of_kms_status(error.status),
            at_gate: false,
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
        let retry_after = retry_after.min(NO_CREDENTIALS_RETRY_MAX);
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
            outcome: Outcome::of_code(code).unwrap_or(Outcome::of_kms_status(status)),
            at_gate: false,
        }
    }
}

impl From<Denial> for Failure {
    fn from(denial: Denial) -> Failure {
        let retry_after_s = (denial.status == 429).then_some(1);
        Failure { retry_after_s, at_gate: true, ..Failure::ours(denial.status, denial.code, denial.message) }
    }
}

/// The content of a reply.
#[derive(Clone, Debug)]
pub enum Content {
    /// A stored body, the span of its freshness, and where it came from now.
    Secret(Body, Span, XCache),
    /// None.
    Failure(Rc<Failure>),
}

/// What of KMS's reply is kept for `key`: for type 2, which has two forms and a lease that runs down, KMS's
/// reply itself; else the body as it goes out.
#[must_use]
pub fn to_be_kept(
    response_type: ResponseType,
    asked_id: &str,
    body: Zeroizing<Vec<u8>>,
) -> Zeroizing<Vec<u8>> {
    match response_type {
        ResponseType::Kms | ResponseType::Vault => body,
        // A copy, since the original has room to spare.
        ResponseType::Aws => Zeroizing::new(format::aws(asked_id, &body).to_vec()),
    }
}

/// Writes replies; holds what they share.
#[derive(Debug)]
pub struct Writer {
    response_type: ResponseType,
    date: Date,
    random: Random,
}

impl Writer {
    /// `random` makes request ids.
    #[must_use]
    pub fn new(response_type: ResponseType, random: Random) -> Writer {
        Writer { response_type, date: Date::default(), random }
    }

    /// Brings `Date` to the second; once a tick.
    pub fn set_time(&mut self, unix_s: i64) {
        self.date.set(unix_s);
    }

    /// A secret. HEAD gets the same without the body (RFC 9110 9.3.2).
    pub fn secret(&self, out: &mut Vec<u8>, kept: &[u8], span: Span, now: Mono, x_cache: XCache, to: Manner) {
        let rendered;
        let body = match self.response_type {
            ResponseType::Kms | ResponseType::Aws => kept,
            ResponseType::Vault => {
                rendered = format::vault(to.kv, kept, span.expires.since(now).as_secs());
                &rendered
            }
        };
        write::begin(out, &self.date, 200, JSON, body.len());
        write::header(out, "X-Cache", x_cache.as_str());
        write::number(out, "Age", now.since(span.fetched).as_secs());
        to.end(out, body);
    }

    /// A failure, in the words that the client's kind expects.
    pub fn failure(&mut self, out: &mut Vec<u8>, failure: &Failure, to: Manner) {
        let Failure { code, message, .. } = failure;
        let (content_type, body) = match self.response_type {
            ResponseType::Kms => {
                let request_id = match failure.request_id.as_str() {
                    "" => Cow::Owned(uuid(self.random.next_u128())),
                    theirs => Cow::Borrowed(theirs),
                };
                (JSON, json!({"Code": code, "Message": message, "RequestId": request_id}).to_string())
            }
            ResponseType::Aws if failure.at_gate => ("text/plain", message.clone().into_owned()),
            ResponseType::Aws => (JSON, json!({"__type": code, "message": message}).to_string()),
            ResponseType::Vault if failure.at_gate => (JSON, json!({"errors": [message]}).to_string()),
            ResponseType::Vault => (JSON, json!({"errors": [format!("{code}: {message}")]}).to_string()),
        };
        let status = match self.response_type {
            ResponseType::Vault if !failure.at_gate => vault_status(failure),
            _ => failure.status,
        };
        write::begin(out, &self.date, status, content_type, body.len());
        if status == 405 {
            write::header(out, "Allow", "GET, HEAD");
        }
        if let Some(seconds) = failure.retry_after_s {
            write::number(out, "Retry-After", seconds);
        }
        to.end(out, body.as_bytes());
    }

    /// `/ping`.
    pub fn healthy(&self, out: &mut Vec<u8>, to: Manner) {
        self.document(out, "text/plain", b"healthy", to);
    }

    /// `/metrics`.
    pub fn metrics(&self, out: &mut Vec<u8>, text: &str, to: Manner) {
        self.document(out, metrics::CONTENT_TYPE, text.as_bytes(), to);
    }

    /// `/status`.
    pub fn status(&self, out: &mut Vec<u8>, json: &str, to: Manner) {
        self.document(out, JSON, json.as_bytes(), to);
    }

    fn document(&self, out: &mut Vec<u8>, content_type: &str, body: &[u8], to: Manner) {
        write::begin(out, &self.date, 200, content_type, body.len());
        to.end(out, body);
    }
}

/// Vault's clients take 404 for "no such secret" and 403 for "not for you". KMS answers 404 for an access key or
/// an encryption key that is missing, too, and 409 for a secret that is disabled.
fn vault_status(failure: &Failure) -> u16 {
    match failure.status {
        404 if failure.code == "Forbidden.ResourceNotFound" => 404,
        404 | 409 => 403,
        status => status,
    }
}

/// How a client wants its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manner {
    /// HEAD: no body.
    pub head_only: bool,
    /// Which KV it speaks, where that matters.
    pub kv: Kv,
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

    const KEEP: Manner = Manner { head_only: false, kv: Kv::V1, persistence: Persistence::KeepAlive };

    const SPAN: Span = Span { fetched: Mono::from_micros(0), expires: Mono::from_micros(10_000_000) };
    const NOW: Mono = Mono::from_micros(2_999_000);

    fn text(write: impl FnOnce(&mut Writer, &mut Vec<u8>)) -> String {
        text_of(ResponseType::Kms, write)
    }

    fn text_of(response_type: ResponseType, write: impl FnOnce(&mut Writer, &mut Vec<u8>)) -> String {
        let (mut writer, mut out) = (Writer::new(response_type, Random::from_seed(1)), Vec::new());
        writer.set_time(784_111_777);
        write(&mut writer, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_secret_byte_for_byte() {
        let full = text(|w, out| w.secret(out, b"{\"a\": 1}", SPAN, NOW, XCache::Hit, KEEP));
        assert_eq!(
            full,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 8\r\n\
             Date: Sun, 06 Nov 1994 08:49:37 GMT\r\nCache-Control: no-store\r\nX-Cache: HIT\r\nAge: 2\r\n\r\n{\"a\": 1}"
        );
        let head = text(|w, out| {
            let to = Manner { head_only: true, ..KEEP };
            w.secret(out, b"{\"a\": 1}", SPAN, NOW, XCache::Hit, to);
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

    #[test]
    fn each_kind_of_client_gets_errors_in_its_own_words() {
        let gate = || Failure { at_gate: true, ..Failure::ours(403, "InvalidToken", "Bad Token") };
        let kms = || Failure::ours(409, "Rejected.Disabled", "it is \"off\"");
        let not_found = |code| Failure::ours(404, code, "");
        let no_path = || Failure { at_gate: true, ..Failure::ours(404, "NotFound", "Not found") };
        for (response_type, failure, status, body) in [
            (ResponseType::Aws, gate(), "403", "Bad Token"),
            (ResponseType::Aws, kms(), "409", r#"{"__type":"Rejected.Disabled","message":"it is \"off\""}"#),
            (ResponseType::Vault, gate(), "403", r#"{"errors":["Bad Token"]}"#),
            (ResponseType::Vault, kms(), "403", r#"{"errors":["Rejected.Disabled: it is \"off\""]}"#),
            (
                ResponseType::Vault,
                not_found("Forbidden.ResourceNotFound"),
                "404",
                r#"{"errors":["Forbidden.ResourceNotFound: "]}"#,
            ),
            (
                ResponseType::Vault,
                not_found("Forbidden.KeyNotFound"),
                "403",
                r#"{"errors":["Forbidden.KeyNotFound: "]}"#,
            ),
            (ResponseType::Vault, no_path(), "404", r#"{"errors":["Not found"]}"#),
        ] {
            let reply = text_of(response_type, |w, out| w.failure(out, &failure, KEEP));
            let (head, got) = reply.split_once("\r\n\r\n").unwrap();
            assert_eq!((&head[9..12], got), (status, body));
        }
    }

    #[test]
    fn what_is_kept_has_no_room_to_spare() {
        let body = br#"{"SecretName":"db","SecretData":"x"}"#.to_vec();
        let kept = to_be_kept(ResponseType::Aws, "db", Zeroizing::new(body));
        assert_eq!(kept.capacity(), kept.len());
    }

    #[test]
    fn a_lease_runs_down() {
        let kept = br#"{"SecretData":"x"}"#;
        let reply = text_of(ResponseType::Vault, |w, out| w.secret(out, kept, SPAN, NOW, XCache::Hit, KEEP));
        assert!(reply.contains(r#""lease_duration":7,"data":{"value":"x"}"#), "{reply}");
    }
}
