//! The gates of `docs/contract.md`, section 3, in their order. The first one that a request fails gives the answer.
#![warn(clippy::indexing_slicing)]

use crate::code::Code;
use crate::config::{self, ResponseType};
use crate::http::percent::{self, BadEncoding};
use crate::http::request::{Reject, Request};
use crate::http::split_at_byte;
use crate::kms::format::{self, Kv};
use crate::secret::Secret;
use crate::text::excerpt;
use std::borrow::Cow;

/// The longest secret id, in bytes, after decoding.
pub const ID_BYTES_MAX: usize = 512;
/// Where KV version 2 has its secrets, behind `PathPrefix` (ResponseType 2).
const KV2_PREFIX: &str = "secret/data/";
/// The name of a parameter in a message is cut to this many bytes.
const NAME_BYTES_MAX: usize = 64;

/// A request that passed all gates.
#[derive(Debug, PartialEq, Eq)]
pub enum Route<'a> {
    /// `/ping`.
    Ping,
    /// `/metrics`.
    Metrics,
    /// `/status`.
    Status,
    /// A secret.
    Secret(SecretQuery<'a>),
}

/// What a reader wants to know.
#[derive(Debug, PartialEq, Eq)]
pub struct SecretQuery<'a> {
    /// The secret's name or ARN, decoded.
    pub id: Cow<'a, str>,
    /// `versionId`.
    pub version_id: Option<Cow<'a, str>>,
    /// `versionStage`.
    pub version_stage: Option<Cow<'a, str>>,
    /// `refreshNow`.
    pub refresh_now: bool,
    /// Which version of HashiCorp's KV was spoken, for ResponseType 2.
    pub kv: Kv,
}

/// A refused request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// The status.
    pub status: u16,
    /// The `Code` of the reply.
    pub code: Code,
    /// The `Message` of the reply.
    pub message: Cow<'static, str>,
}

impl Denial {
    const fn new(code: Code, message: &'static str) -> Denial {
        Denial { status: code.status(), code, message: Cow::Borrowed(message) }
    }

    /// A denial for which AWS's agent has a text of its own, `aws`. Its clients know that text, so `ResponseType` 1
    /// gives it as it is; the other types say in `message` what is wrong and what to do.
    fn of_aws(
        response_type: ResponseType,
        code: Code,
        aws: &'static str,
        message: impl Into<Cow<'static, str>>,
    ) -> Denial {
        match response_type {
            ResponseType::Aws => Denial::new(code, aws),
            ResponseType::Kms | ResponseType::Vault => {
                Denial { message: message.into(), ..Denial::new(code, "") }
            }
        }
    }

    fn parameter(message: impl Into<Cow<'static, str>>) -> Denial {
        Denial { message: message.into(), ..Denial::new(Code::InvalidParameter, "") }
    }

    fn unknown_parameter(name: &str, has_secret_id: bool, response_type: ResponseType) -> Denial {
        let unknown = format!("unknown parameter: {}", excerpt(name, NAME_BYTES_MAX));
        let known = if has_secret_id { "secretId, " } else { "" };
        Denial::parameter(match response_type {
            ResponseType::Aws => unknown,
            ResponseType::Kms | ResponseType::Vault => {
                format!("{unknown}; known: {known}versionId, versionStage, refreshNow")
            }
        })
    }
}

impl From<Reject> for Denial {
    fn from(reject: Reject) -> Denial {
        match reject {
            Reject::Malformed(what) => Denial::new(Code::InvalidRequest, what),
            // RFC 9110 15.6.6 has a status of its own for it.
            Reject::Version => Denial {
                status: 505,
                ..Denial::new(Code::InvalidRequest, "only HTTP/1.0 and HTTP/1.1 are supported")
            },
            Reject::HeadTooLarge => {
                Denial::new(Code::RequestHeaderTooLarge, "the request head is over 16 KiB")
            }
            Reject::TooManyHeaders => {
                Denial::new(Code::RequestHeaderTooLarge, "the request head has over 64 header lines")
            }
            Reject::TargetTooLong => Denial::new(Code::UriTooLong, "the request target is over 8 KiB"),
        }
    }
}

const FORBIDDEN_HOST: Denial = Denial::new(
    Code::ForbiddenHost,
    "the agent does not answer for this Host; use localhost, or add the name to [Server] AllowedHosts",
);
const TOKEN_REFUSED_AWS: &str = "Bad Token";
const TOKEN_MISSING: &str = "the request has no token; send it in a header of [Server] SSRFHeaders";
const TOKEN_EMPTY: &str = "the token in the request is empty";
const TOKEN_WRONG: &str = "the token in the request is wrong";
/// What a request without the right token is told. It learns no more than what it carried itself.
pub(crate) const TOKEN_REFUSALS: [&str; 4] = [TOKEN_REFUSED_AWS, TOKEN_MISSING, TOKEN_EMPTY, TOKEN_WRONG];

/// Takes a sound request through the gates. `busy`: it came on a reserve slot, past `MaxConn`.
///
/// # Errors
/// The denial of the first gate that fails.
pub fn pass<'b>(
    request: &Request<'_, 'b>,
    server: &config::ServerSection,
    token: &Secret,
    busy: bool,
) -> Result<Route<'b>, Denial> {
    let ping = request.path == "/ping";
    let deny = |code, aws, message| Err(Denial::of_aws(server.response_type, code, aws, message));
    if busy && !ping {
        let message = "all [Server] MaxConn connections are busy; try again in a second";
        return deny(Code::ConnectionLimitExceeded, "Connection limit exceeded", message);
    }
    // An HTTP/1.0 client may name no host; a browser, whose DNS could be rebound, always does.
    if request.host.is_some_and(|host| !is_our_host(host, &server.allowed_hosts)) {
        return Err(FORBIDDEN_HOST);
    }
    if !ping && (request.has_header("X-Forwarded-For") || request.has_header("Forwarded")) {
        let message =
            "the request has X-Forwarded-For or Forwarded, so a proxy is in between; ask without it";
        return deny(Code::Forwarded, "Forwarded", message);
    }
    let metrics = request.path == "/metrics";
    if !ping && !metrics {
        let mut given = server.ssrf_headers.iter().flat_map(|name| request.header(name));
        // An empty token counts as none, and so nothing matches it.
        if token.is_empty() || !given.any(|value| token.ct_eq(value)) {
            let given = server.ssrf_headers.iter().flat_map(|name| request.header(name));
            return deny(Code::InvalidToken, TOKEN_REFUSED_AWS, token_refusal(given));
        }
    }
    if !matches!(request.method, "GET" | "HEAD") {
        return deny(Code::MethodNotAllowed, "Not allowed", "the agent answers GET and HEAD only");
    }
    match request.path {
        "/ping" => return Ok(Route::Ping),
        "/metrics" => return Ok(Route::Metrics),
        "/status" => return Ok(Route::Status),
        "/secretsmanager/get" => {
            return secret_query(None, Kv::V1, server.response_type, request.query).map(Route::Secret);
        }
        _ => {}
    }
    let Some(id) = request.path.strip_prefix(server.path_prefix.as_str()) else {
        let message =
            "no such path; ask for /secretsmanager/get?secretId=NAME or [Server] PathPrefix and the name";
        return deny(Code::NotFound, "Not found", message);
    };
    let (id, kv) = match id.strip_prefix(KV2_PREFIX) {
        Some(id) if server.response_type == ResponseType::Vault => (id, Kv::V2),
        _ => (id, Kv::V1),
    };
    secret_query(Some(id), kv, server.response_type, request.query).map(Route::Secret)
}

/// What a request is told that carries these tokens, none of which is right.
fn token_refusal<'b>(mut given: impl Iterator<Item = &'b [u8]>) -> &'static str {
    match given.next() {
        None => TOKEN_MISSING,
        Some(b"") if given.all(<[u8]>::is_empty) => TOKEN_EMPTY,
        Some(_) => TOKEN_WRONG,
    }
}

fn is_our_host(host: &str, allowed: &[String]) -> bool {
    let bare = host.strip_prefix('[').and_then(|it| it.strip_suffix(']')).unwrap_or(host);
    ["localhost", "127.0.0.1", "[::1]"].iter().any(|ours| host.eq_ignore_ascii_case(ours))
        || allowed.iter().any(|name| name.eq_ignore_ascii_case(bare))
}

fn secret_query<'b>(
    path_id: Option<&'b str>,
    kv: Kv,
    response_type: ResponseType,
    query: Option<&'b str>,
) -> Result<SecretQuery<'b>, Denial> {
    let (mut id, mut version_id, mut version_stage, mut refresh_now) = (None, None, None, None);
    let mut rest = query.unwrap_or_default();
    while !rest.is_empty() {
        let pair;
        (pair, rest) = split_at_byte(rest, b'&').unwrap_or((rest, ""));
        if pair.is_empty() {
            continue;
        }
        let (name, value) = split_at_byte(pair, b'=').unwrap_or((pair, ""));
        let decode = |text| {
            percent::decode_query(text).map_err(|BadEncoding| {
                Denial::parameter(format!("badly encoded parameter: {}", excerpt(name, NAME_BYTES_MAX)))
            })
        };
        let plain_name = decode(name)?;
        let slot = match plain_name.as_ref() {
            "secretId" if path_id.is_none() => &mut id,
            "versionId" => &mut version_id,
            "versionStage" => &mut version_stage,
            "refreshNow" => &mut refresh_now,
            other => return Err(Denial::unknown_parameter(other, path_id.is_none(), response_type)),
        };
        if slot.is_some() {
            return Err(Denial::parameter(format!(
                "repeated parameter: {}",
                excerpt(&plain_name, NAME_BYTES_MAX)
            )));
        }
        *slot = Some(decode(value)?);
    }
    let id = match path_id {
        Some(raw) => {
            let id = percent::decode_path(raw)
                .map_err(|BadEncoding| Denial::parameter("the secret ID in the path is badly encoded"))?;
            if id.split('/').any(|segment| matches!(segment, "." | "..")) {
                return Err(Denial::parameter(
                    "the secret ID in the path must not have the segments . or ..",
                ));
            }
            id
        }
        None => id.ok_or_else(|| Denial::parameter("missing parameter secretId"))?,
    };
    if id.is_empty() {
        return Err(Denial::parameter("missing secret ID"));
    }
    if id.len() > ID_BYTES_MAX {
        return Err(Denial::parameter("the secret ID is over 512 bytes"));
    }
    let refresh_now = refresh_now.map_or(Ok(false), |text| read_bool(&text, response_type))?;
    // An empty one is a variable that a script did not set: as if it were not there.
    let version_id = version_id.filter(|it| !it.is_empty());
    let version_stage = version_stage.filter(|it| !it.is_empty()).map(|stage| match response_type {
        ResponseType::Aws => Cow::Owned(format::stage_from_aws(&stage).to_owned()),
        ResponseType::Kms | ResponseType::Vault => stage,
    });
    Ok(SecretQuery { id, version_id, version_stage, refresh_now, kv })
}

fn read_bool(text: &str, response_type: ResponseType) -> Result<bool, Denial> {
    const AWS: &str = "invalid refreshNow value";
    const MESSAGE: &str = "invalid refreshNow value: it must be true, false, 1 or 0";
    let is = |word: &str| text.eq_ignore_ascii_case(word);
    if is("true") || is("1") {
        return Ok(true);
    }
    if is("false") || is("0") {
        return Ok(false);
    }
    Err(Denial::of_aws(response_type, Code::InvalidParameter, AWS, MESSAGE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::request::{Parsed, header_room, parse};

    fn verdict(head: &str, busy: bool) -> String {
        verdict_of(ResponseType::Kms, head, busy)
    }

    fn verdict_of(response_type: ResponseType, head: &str, busy: bool) -> String {
        let server = config::ServerSection {
            response_type,
            allowed_hosts: vec!["agent.internal".into()],
            ..config::Config::default().server
        };
        let token = Secret::from(b"t0k".to_vec());
        let mut room = header_room();
        let Parsed::Request(request, _) = parse(head.as_bytes(), &mut room) else { panic!("{head}") };
        match pass(&request, &server, &token, busy) {
            Ok(Route::Ping) => "ping".into(),
            Ok(Route::Metrics) => "metrics".into(),
            Ok(Route::Status) => "status".into(),
            Ok(Route::Secret(q)) => {
                let (id, stage) = (q.version_id.as_deref(), q.version_stage.as_deref());
                format!("{} {id:?} {stage:?} {} {:?}", q.id, q.refresh_now, q.kv)
            }
            Err(denial) => format!("{} {} {}", denial.status, denial.code, denial.message),
        }
    }

    fn get(target: &str) -> String {
        verdict(&format!("GET {target} HTTP/1.1\r\nHost: localhost\r\nX-KMS-Token: t0k\r\n\r\n"), false)
    }

    #[test]
    fn questions() {
        for (target, expected) in [
            ("/secretsmanager/get?secretId=db", "db None None false V1"),
            (
                "/secretsmanager/get?secretId=a+b%2Bc%2Fd&versionStage=ACSPrevious&",
                "a b+c/d None Some(\"ACSPrevious\") false V1",
            ),
            ("/secretsmanager/get?secretId=db&versionId=1&refreshNow=TRUE", "db Some(\"1\") None true V1"),
            ("/secretsmanager/get?secretId=db&versionStage=&refreshNow=0", "db None None false V1"),
            ("/secretsmanager/get?&&secretId=a=b&&refreshNow=1&&", "a=b None None true V1"),
            ("/v1/db?", "db None None false V1"),
            ("/v1/db?&", "db None None false V1"),
            ("/v1/a/b+c%20d?refreshNow=1", "a/b+c d None None true V1"),
            ("/v1/a..b/...", "a..b/... None None false V1"),
            ("/ping?x", "ping"),
        ] {
            assert_eq!(get(target), expected, "{target}");
        }
    }

    #[test]
    fn bad_parameters() {
        for (target, message) in [
            ("/secretsmanager/get", "missing parameter secretId"),
            ("/secretsmanager/get?secretId=", "missing secret ID"),
            ("/v1/", "missing secret ID"),
            (
                "/secretsmanager/get?secretId=a&p=1",
                "unknown parameter: p; known: secretId, versionId, versionStage, refreshNow",
            ),
            ("/v1/a?secretId=b", "unknown parameter: secretId; known: versionId, versionStage, refreshNow"),
            (
                "/secretsmanager/get?secretid=a",
                "unknown parameter: secretid; known: secretId, versionId, versionStage, refreshNow",
            ),
            ("/secretsmanager/get?secretId=a&secretId=a", "repeated parameter: secretId"),
            ("/secretsmanager/get?secretId=%zz", "badly encoded parameter: secretId"),
            ("/secretsmanager/get?secretId=%ff", "badly encoded parameter: secretId"),
            ("/v1/a%f", "the secret ID in the path is badly encoded"),
            ("/v1/a/../b", "the secret ID in the path must not have the segments . or .."),
            ("/v1/a/%2E%2e", "the secret ID in the path must not have the segments . or .."),
            ("/v1/a%2f.%2fb", "the secret ID in the path must not have the segments . or .."),
            ("/v1/a?=", "unknown parameter: ; known: versionId, versionStage, refreshNow"),
            (
                "/v1/a?%0a%E2%80%AE=",
                r"unknown parameter: \n\u{202e}; known: versionId, versionStage, refreshNow",
            ),
            ("/v1/a?=1&", "unknown parameter: ; known: versionId, versionStage, refreshNow"),
            ("/v1/a?refreshNow=yes", "invalid refreshNow value: it must be true, false, 1 or 0"),
            ("/v1/a?refreshNow", "invalid refreshNow value: it must be true, false, 1 or 0"),
            (&format!("/v1/{}", "a".repeat(513)), "the secret ID is over 512 bytes"),
        ] {
            assert_eq!(get(target), format!("400 InvalidParameter {message}"), "{target}");
        }
        assert!(get(&format!("/v1/{}", "a".repeat(512))).ends_with("V1"));
    }

    #[test]
    fn other_response_types_have_names_of_their_own() {
        let get = |response_type, target: &str| {
            verdict_of(
                response_type,
                &format!("GET {target} HTTP/1.1\r\nHost: localhost\r\nX-KMS-Token: t0k\r\n\r\n"),
                false,
            )
        };
        let target = "/v1/secret/data/a/b?versionStage=AWSPREVIOUS";
        assert_eq!(get(ResponseType::Kms, target), "secret/data/a/b None Some(\"AWSPREVIOUS\") false V1");
        assert_eq!(get(ResponseType::Aws, target), "secret/data/a/b None Some(\"ACSPrevious\") false V1");
        assert_eq!(get(ResponseType::Vault, target), "a/b None Some(\"AWSPREVIOUS\") false V2");
        assert_eq!(get(ResponseType::Vault, "/v1/secret/x"), "secret/x None None false V1");
        assert!(get(ResponseType::Vault, "/v1/secret/data/").ends_with("missing secret ID"));
    }

    /// A request that would fail at every gate, mended gate by gate.
    #[test]
    fn gates_stand_in_their_order() {
        let steps = [
            (
                "POST /x HTTP/1.1\r\nHost: evil\r\nForwarded: for=a\r\n\r\n",
                "429 ConnectionLimitExceeded all [Server] MaxConn connections are busy",
            ),
            ("POST /x HTTP/1.1\r\nHost: evil\r\nForwarded: for=a\r\n\r\n", "403 ForbiddenHost"),
            (
                "POST /x HTTP/1.1\r\nHost: localhost\r\nForwarded: for=a\r\n\r\n",
                "400 Forwarded the request has X-Forwarded-For or Forwarded, so",
            ),
            (
                "POST /x HTTP/1.1\r\nHost: localhost\r\nx-forwarded-for: a\r\n\r\n",
                "400 Forwarded the request has X-Forwarded-For or Forwarded, so",
            ),
            ("POST /x HTTP/1.1\r\nHost: localhost\r\n\r\n", "403 InvalidToken the request has no token;"),
            (
                "POST /x HTTP/1.1\r\nHost: localhost\r\nX-KMS-Token:\r\nX-Vault-Token: \r\n\r\n",
                "403 InvalidToken the token in the request is empty",
            ),
            (
                "POST /x HTTP/1.1\r\nHost: localhost\r\nX-KMS-Token:\r\nX-Vault-Token: t0\r\n\r\n",
                "403 InvalidToken the token in the request is wrong",
            ),
            (
                "POST /x HTTP/1.1\r\nHost: localhost\r\nX-KMS-Token: t0k\r\n\r\n",
                "405 MethodNotAllowed the agent answers GET and HEAD only",
            ),
            (
                "GET /x HTTP/1.1\r\nHost: localhost\r\nX-Vault-Token: t0k\r\n\r\n",
                "404 NotFound no such path; ask for",
            ),
            (
                "GET /v1/a?b HTTP/1.1\r\nHost: localhost\r\nX-KMS-Token: t0k\r\n\r\n",
                "400 InvalidParameter unknown parameter: b",
            ),
            ("HEAD /v1/a HTTP/1.1\r\nHost: localhost\r\nX-KMS-Token: no\r\nX-KMS-Token: t0k\r\n\r\n", "a "),
        ];
        for (step, (head, expected)) in steps.into_iter().enumerate() {
            let got = verdict(head, step == 0);
            assert!(got.starts_with(expected), "{head}: {got}");
        }
    }

    #[test]
    fn ping_needs_neither_token_nor_a_free_slot() {
        assert_eq!(
            verdict("GET /ping HTTP/1.1\r\nHost: localhost\r\nForwarded: for=a\r\n\r\n", true),
            "ping"
        );
        assert!(verdict("POST /ping HTTP/1.1\r\nHost: localhost\r\n\r\n", true).starts_with("405"));
        assert!(verdict("GET /ping HTTP/1.1\r\nHost: evil\r\n\r\n", true).starts_with("403 ForbiddenHost"));
    }

    #[test]
    fn metrics_need_no_token_and_status_does() {
        let metrics = |head: &str, busy| verdict(&format!("GET /metrics HTTP/1.1\r\n{head}\r\n"), busy);
        assert_eq!(metrics("Host: localhost\r\n", false), "metrics");
        assert!(metrics("Host: localhost\r\n", true).starts_with("429"));
        assert!(metrics("Host: evil\r\n", false).starts_with("403 ForbiddenHost"));
        assert!(metrics("Host: localhost\r\nForwarded: for=a\r\n", false).starts_with("400 Forwarded"));
        assert!(verdict("POST /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", false).starts_with("405"));
        assert_eq!(get("/status?x"), "status");
        assert!(
            verdict("GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n", false).starts_with("403 InvalidToken")
        );
        assert!(get("/metrics/").starts_with("404") && get("/status/").starts_with("404"));
    }

    #[test]
    fn hosts() {
        for (host, ours) in [
            ("localhost:2025", true),
            ("LOCALHOST", true),
            ("127.0.0.1", true),
            ("[::1]:1", true),
            ("agent.internal", true),
            ("", false),
            ("localhost.", false),
            ("127.0.0.2", false),
            ("evil.localhost", false),
        ] {
            let head = format!("GET /ping HTTP/1.1\r\nHost: {host}\r\n\r\n");
            assert_eq!(verdict(&head, false) == "ping", ours, "{host}");
        }
        assert_eq!(verdict("GET /ping HTTP/1.0\r\n\r\n", false), "ping");
        assert!(
            verdict("GET http://evil/ping HTTP/1.1\r\nHost: localhost\r\n\r\n", false).starts_with("403")
        );
    }
}
