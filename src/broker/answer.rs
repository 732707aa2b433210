//! What a client is told: a secret, or why not.

use super::gate::Denial;
use crate::cache::{Body, Span};
use crate::call::{CallError, CallErrorKind};
use crate::code::Code;
use crate::config::ResponseType;
use crate::http::write::{self, Date, Persistence};
use crate::kms::format::{self, Kv};
use crate::kms::reply::KmsError;
use crate::kms::retry::READER_BUDGET;
use crate::metrics::{self, Metrics, Outcome};
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
    pub(crate) const fn as_str(self) -> &'static str {
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

/// Where a failure originates.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Origin {
    Agent(Code),
    Kms { code: String, request_id: String },
}

/// Why there is no value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(super) status: u16,
    origin: Origin,
    /// What failed and where, nothing secret.
    message: Cow<'static, str>,
    retry_after_s: Option<u64>,
}

impl Failure {
    pub(super) fn from_kms(error: &KmsError) -> Failure {
        Failure {
            status: error.status,
            origin: Origin::Kms { code: error.code.clone(), request_id: error.request_id.clone() },
            message: error.message.clone().into(),
            retry_after_s: None,
        }
    }

    /// A call that brought no reply.
    pub(super) fn from_call(error: CallError) -> Failure {
        let code = match error.kind {
            CallErrorKind::Timeout => Code::UpstreamTimeout,
            CallErrorKind::Unreachable => Code::UpstreamUnreachable,
            CallErrorKind::InvalidResponse => Code::UpstreamInvalidResponse,
        };
        Failure::ours(code, error.message)
    }

    /// No usable credentials for KMS. `retry_after`: when there may be some.
    pub(super) fn no_credentials(why: &impl fmt::Display, retry_after: Duration) -> Failure {
        let retry_after = retry_after.min(NO_CREDENTIALS_RETRY_MAX);
        let seconds = retry_after.as_secs() + u64::from(retry_after.subsec_nanos() > 0);
        let failure = Failure::ours(Code::CredentialUnavailable, why.to_string());
        Failure { retry_after_s: Some(seconds.max(1)), ..failure }
    }

    /// A failure that originates in the agent.
    pub(super) fn ours(code: Code, message: impl Into<Cow<'static, str>>) -> Failure {
        Failure {
            status: code.status(),
            origin: Origin::Agent(code),
            message: message.into(),
            retry_after_s: None,
        }
    }

    /// The same failure for readers who have waited for `tries` tries. A time limit that the message names is that of
    /// the last try, and could be taken for the whole time of waiting.
    pub(super) fn after_tries(self: &Rc<Failure>, tries: u32) -> Rc<Failure> {
        if tries < 2 || !matches!(self.origin, Origin::Agent(Code::UpstreamTimeout)) {
            return Rc::clone(self);
        }
        let limit_s = READER_BUDGET.as_secs();
        let message = format!("{} in try {tries}; all tries together may take {limit_s} s", self.message);
        Rc::new(Failure { message: message.into(), ..Failure::clone(self) })
    }

    fn code(&self) -> &str {
        match &self.origin {
            Origin::Agent(code) => code.label(),
            Origin::Kms { code, .. } => code,
        }
    }

    /// A gate refused the request: AWS's agent says that in plain text.
    const fn is_at_gate(&self) -> bool {
        matches!(self.origin, Origin::Agent(code) if code.is_at_gate())
    }

    /// Counts a request that was answered with it.
    pub(super) const fn count(&self, metrics: &mut Metrics) {
        match self.origin {
            Origin::Agent(code) => metrics.count_failure(code),
            Origin::Kms { .. } => metrics.count_request(Outcome::of_kms_status(self.status)),
        }
    }
}

impl From<Denial> for Failure {
    fn from(denial: Denial) -> Failure {
        let retry_after_s = (denial.status == 429).then_some(1);
        Failure { status: denial.status, retry_after_s, ..Failure::ours(denial.code, denial.message) }
    }
}

/// The content of a reply.
#[derive(Clone, Debug)]
pub(crate) enum Content {
    /// A stored body, the span of its freshness, and where it came from now.
    Secret(Body, Span, XCache),
    Failure(Rc<Failure>),
}

/// What of KMS's reply is kept for `key`: for type 2, which has two forms and a lease that runs down, KMS's
/// reply itself; else the body as it goes out.
pub(crate) fn to_be_kept(
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
pub(crate) struct Writer {
    response_type: ResponseType,
    date: Date,
    random: Random,
}

impl Writer {
    /// `random` makes request ids.
    pub(crate) fn new(response_type: ResponseType, random: Random) -> Writer {
        Writer { response_type, date: Date::default(), random }
    }

    /// Brings `Date` to the second; once a tick.
    pub(crate) fn set_time(&mut self, unix_s: i64) {
        self.date.set(unix_s);
    }

    /// A secret. HEAD gets the same without the body (RFC 9110 9.3.2).
    pub(crate) fn secret(
        &self,
        out: &mut Vec<u8>,
        kept: &[u8],
        span: Span,
        now: Mono,
        x_cache: XCache,
        to: ReplyStyle,
    ) {
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
    pub(crate) fn failure(&mut self, out: &mut Vec<u8>, failure: &Failure, to: ReplyStyle) {
        let (code, message, at_gate) = (failure.code(), &failure.message, failure.is_at_gate());
        let (content_type, body) = match self.response_type {
            ResponseType::Kms => {
                let request_id = match &failure.origin {
                    Origin::Kms { request_id, .. } if !request_id.is_empty() => {
                        Cow::Borrowed(request_id.as_str())
                    }
                    _ => Cow::Owned(uuid(self.random.next_u128())),
                };
                (JSON, json!({"Code": code, "Message": message, "RequestId": request_id}).to_string())
            }
            ResponseType::Aws if at_gate => ("text/plain", message.clone().into_owned()),
            ResponseType::Aws => (JSON, json!({"__type": code, "message": message}).to_string()),
            ResponseType::Vault if at_gate => (JSON, json!({"errors": [message]}).to_string()),
            ResponseType::Vault => (JSON, json!({"errors": [format!("{code}: {message}")]}).to_string()),
        };
        let status = match self.response_type {
            ResponseType::Vault if !at_gate => vault_status(failure),
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

    pub(crate) fn healthy(&self, out: &mut Vec<u8>, to: ReplyStyle) {
        self.document(out, "text/plain", b"healthy", to);
    }

    pub(crate) fn metrics(&self, out: &mut Vec<u8>, text: &str, to: ReplyStyle) {
        self.document(out, metrics::CONTENT_TYPE, text.as_bytes(), to);
    }

    pub(crate) fn status(&self, out: &mut Vec<u8>, json: &str, to: ReplyStyle) {
        self.document(out, JSON, json.as_bytes(), to);
    }

    fn document(&self, out: &mut Vec<u8>, content_type: &str, body: &[u8], to: ReplyStyle) {
        write::begin(out, &self.date, 200, content_type, body.len());
        to.end(out, body);
    }
}

/// Vault's clients take 404 for "no such secret" and 403 for "not for you". KMS answers 404 for an access key or
/// an encryption key that is missing, too, and 409 for a secret that is disabled.
fn vault_status(failure: &Failure) -> u16 {
    match failure.status {
        404 if failure.code() == "Forbidden.ResourceNotFound" => 404,
        404 | 409 => 403,
        status => status,
    }
}

/// How a client wants its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReplyStyle {
    /// HEAD: no body.
    pub(crate) head_only: bool,
    /// Which KV it speaks, where that matters.
    pub(crate) kv: Kv,
    /// What becomes of the connection.
    pub(crate) persistence: Persistence,
}

impl ReplyStyle {
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

    const KEEP: ReplyStyle = ReplyStyle { head_only: false, kv: Kv::V1, persistence: Persistence::KeepAlive };

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
            let to = ReplyStyle { head_only: true, ..KEEP };
            w.secret(out, b"{\"a\": 1}", SPAN, NOW, XCache::Hit, to);
        });
        assert_eq!(Some(head.as_str()), full.strip_suffix("{\"a\": 1}"));
    }

    #[test]
    fn failures_are_json_whatever_they_quote() {
        let failure = Failure::ours(Code::InvalidParameter, "unknown parameter: a\"\\\u{1}é");
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
        assert!(of(Failure::ours(Code::MethodNotAllowed, "")).contains("\r\nAllow: GET, HEAD\r\n"));
        for (ms, seconds) in [(0, 1), (1, 1), (1000, 1), (1200, 2), (2000, 2), (60_001, 60)] {
            let reply = of(Failure::no_credentials(&"x", Duration::from_millis(ms)));
            assert!(reply.contains(&format!("\r\nRetry-After: {seconds}\r\n")), "{ms} ms: {reply}");
        }
    }

    #[test]
    fn a_time_limit_is_told_apart_from_the_time_of_waiting() {
        let timeout = Rc::new(Failure::ours(Code::UpstreamTimeout, "reply of h:443: timed out after 2.9 s"));
        assert_eq!(timeout.after_tries(1).message, "reply of h:443: timed out after 2.9 s");
        assert_eq!(
            timeout.after_tries(2).message,
            "reply of h:443: timed out after 2.9 s in try 2; all tries together may take 8 s"
        );
        let refused = Rc::new(Failure::ours(Code::UpstreamUnreachable, "connect h:443: refused"));
        assert_eq!(refused.after_tries(3), refused);
    }

    #[test]
    fn each_kind_of_client_gets_errors_in_its_own_words() {
        let gate = || Failure::ours(Code::InvalidToken, "Bad Token");
        let from_kms = |status, code: &str, message: &str| {
            let (code, message, request_id) = (code.into(), message.into(), String::new());
            Failure::from_kms(&KmsError { status, code, message, request_id })
        };
        let kms = || from_kms(409, "Rejected.Disabled", "it is \"off\"");
        let not_found = |code| from_kms(404, code, "");
        let no_path = || Failure::ours(Code::NotFound, "Not found");
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
    fn failures_are_counted_by_their_origin() {
        let count = |failure: &Failure| {
            let mut metrics = Metrics::default();
            failure.count(&mut metrics);
            let text = metrics.render(&metrics::Gauges::default());
            let line = text.lines().find(|it| it.contains("requests_total{") && it.ends_with(" 1"));
            line.map(str::to_owned).unwrap()
        };
        assert!(count(&Failure::ours(Code::UpstreamTimeout, "")).contains("\"UpstreamTimeout\""));
        for (status, result) in [(404, "kms_refused"), (429, "kms_throttled"), (500, "kms_failed")] {
            // Whatever KMS's code, be it one of ours.
            let (code, message, request_id) = ("NotFound".into(), String::new(), String::new());
            let failure = Failure::from_kms(&KmsError { status, code, message, request_id });
            assert!(count(&failure).contains(result), "{status}");
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
