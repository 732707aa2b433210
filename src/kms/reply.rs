//! What KMS answers to `GetSecretValue`, and what follows from it for the agent.

#![warn(clippy::indexing_slicing)]

use std::fmt;

use zeroize::Zeroizing;

use crate::code::Code;
use crate::http::response::Response;
use crate::json::Members;
use crate::text::excerpt;
use crate::time::unix_s_of;

/// Longest `Code` kept, in bytes.
pub const CODE_BYTES_MAX: usize = 128;
/// Longest `Message` kept, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 1024;
/// Longest `RequestId` kept, in bytes.
pub const REQUEST_ID_BYTES_MAX: usize = 128;

/// A reply of KMS, sorted by what to do about it.
#[derive(Debug)]
pub enum Reply {
    /// A sound reply for the secret that was asked for.
    Value(Value),
    /// A definite refusal of this secret to us: not found, no permission, disabled. Drop what is cached.
    Refused(KmsError),
    /// KMS, or something before it, fails. Try again later.
    Transient {
        /// KMS's words; status 502 and a code of ours where something else answered.
        error: KmsError,
        /// Seconds that it asks us to wait.
        retry_after_s: Option<u32>,
    },
    /// Too many calls of the whole account. Transient too.
    Throttled {
        /// KMS's words; status 502 and a code of ours where something else answered.
        error: KmsError,
        /// Seconds that it asks us to wait.
        retry_after_s: Option<u32>,
    },
    /// The access key or the security token is unknown or has expired. Renew once, then ask again.
    CredentialsRefused(KmsError),
    /// Our clock and that of KMS differ too much. Ask once more with its time.
    ClockSkew {
        /// `IllegalTimestamp` or `InvalidTimeStamp.Expired`.
        error: KmsError,
        /// Its `Date`, seconds since 1970 (UTC).
        server_unix_s: Option<i64>,
    },
    /// The signature is wrong: our mistake or a wrong secret of the access key, not this secret's.
    SignatureRefused(KmsError),
    /// No reply that KMS gives. Says what is wrong with it, for people; quotes nothing of it.
    Invalid(String),
}

/// A valid `GetSecretValue` reply.
pub struct Value {
    /// The reply as KMS sent it, byte for byte: a JSON object. Wiped on drop.
    pub body: Zeroizing<Vec<u8>>,
    /// `NextRotationDate` in seconds since 1970 (UTC), if it is a date and still to come.
    pub next_rotation_unix_s: Option<i64>,
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Value")
            .field("body_bytes", &self.body.len())
            .field("next_rotation_unix_s", &self.next_rotation_unix_s)
            .finish()
    }
}

/// An error of KMS. Made harmless, bounded, and free of what was signed: fit for the log and for the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KmsError {
    /// HTTP status; 502 if the reply was not one of KMS.
    pub status: u16,
    /// `Code`; at most [`CODE_BYTES_MAX`] bytes, not empty.
    pub code: String,
    /// `Message`; at most [`MESSAGE_BYTES_MAX`] bytes, may be empty.
    pub message: String,
    /// `RequestId`; at most [`REQUEST_ID_BYTES_MAX`] bytes, may be empty.
    pub request_id: String,
}

impl fmt::Display for KmsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.status, self.code)?;
        if !self.message.is_empty() {
            write!(f, ": {}", self.message)?;
        }
        if !self.request_id.is_empty() {
            write!(f, " (RequestId {})", self.request_id)?;
        }
        Ok(())
    }
}

/// Reads the reply to a request for the secret `asked_id` (a name or an ARN). `now_unix_s` tells a
/// rotation to come from one that is past.
#[must_use]
pub fn parse(asked_id: &str, response: Response, now_unix_s: i64) -> Reply {
    match response.status {
        200 => parse_value(asked_id, response.body, now_unix_s),
        400..=599 => parse_error(&response),
        status => {
            Reply::Invalid(format!("KMS answered HTTP {status}, which is neither a value nor an error"))
        }
    }
}

/// The name under which KMS answers for `secret_id`: what follows `secret/` in an ARN
/// `acs:kms:<region>:<account>:secret/<name>`, else the id itself.
#[must_use]
pub fn bare_name(secret_id: &str) -> &str {
    let resource = secret_id.strip_prefix("acs:kms:").and_then(|rest| rest.splitn(3, ':').nth(2));
    resource.and_then(|resource| resource.strip_prefix("secret/")).unwrap_or(secret_id)
}

fn parse_value(asked_id: &str, body: Zeroizing<Vec<u8>>, now_unix_s: i64) -> Reply {
    let next_rotation_unix_s = match check_value(asked_id, &body) {
        Ok(next_rotation_unix_s) => next_rotation_unix_s.filter(|at| *at > now_unix_s),
        Err(problem) => return Reply::Invalid(problem),
    };
    Reply::Value(Value { body, next_rotation_unix_s })
}

/// `NextRotationDate` of a reply that is one for `asked_id`, else what is wrong with it.
fn check_value(asked_id: &str, body: &[u8]) -> Result<Option<i64>, String> {
    let members = Members::of(body).map_err(|error| {
        // Not the error itself, which may quote the reply.
        let (line, column) = (error.line(), error.column());
        let what = if error.is_eof() { "is cut off" } else { "is not a JSON object" };
        format!("the reply of KMS {what} (line {line}, column {column} of {} bytes)", body.len())
    })?;
    let name = members.text("SecretName").ok_or("the reply of KMS has no SecretName")?;
    if *name != bare_name(asked_id) && *name != asked_id {
        return Err("the reply of KMS is for another secret".to_owned());
    }
    match members.raw("SecretData") {
        Some(data) if data.starts_with('"') => {}
        Some(_) => return Err("SecretData in the reply of KMS is not a string".to_owned()),
        None => return Err("the reply of KMS has no SecretData".to_owned()),
    }
    Ok(members.text("NextRotationDate").and_then(|date| unix_s_of(&date)))
}

fn parse_error(response: &Response) -> Reply {
    let status = response.status;
    let Some(error) = kms_error(response) else {
        let problem = format!("the reply has HTTP status {status} and no error of KMS in its body");
        // A gateway on the way that fails or throttles is as transient as KMS doing so.
        let error = || KmsError {
            status: 502,
            code: Code::UpstreamInvalidResponse.label().to_owned(),
            message: problem.clone(),
            request_id: String::new(),
        };
        return match status {
            429 => Reply::Throttled { error: error(), retry_after_s: response.retry_after_s },
            408 | 500.. => Reply::Transient { error: error(), retry_after_s: response.retry_after_s },
            _ => Reply::Invalid(problem),
        };
    };
    let retry_after_s = response.retry_after_s;
    // By code first: KMS gives several of them with more than one status.
    match error.code.as_str() {
        "Rejected.Throttling" => Reply::Throttled { error, retry_after_s },
        code if is_of(code, "Throttling") => Reply::Throttled { error, retry_after_s },
        "InternalFailure" | "ServiceUnavailableTemporary" => Reply::Transient { error, retry_after_s },
        "IllegalTimestamp" | "InvalidTimeStamp.Expired" => {
            Reply::ClockSkew { error, server_unix_s: response.date_unix_s }
        }
        "IncompleteSignature" | "SignatureDoesNotMatch" | "SignatureNonceUsed" => {
            Reply::SignatureRefused(error)
        }
        // Whole families: their other members, `.Inactive` or `.Format` say, are no word on the secret either.
        code if is_of(code, "InvalidTimeStamp") => Reply::SignatureRefused(error),
        code if is_of(code, "InvalidAccessKeyId") || is_of(code, "InvalidSecurityToken") => {
            Reply::CredentialsRefused(error)
        }
        _ => match status {
            429 => Reply::Throttled { error, retry_after_s },
            408 | 500.. => Reply::Transient { error, retry_after_s },
            // A code of KMS that is not in our table still refuses this very request.
            _ => Reply::Refused(error),
        },
    }
}

/// Whether `code` is `family` or `family.<something>`.
fn is_of(code: &str, family: &str) -> bool {
    code.strip_prefix(family).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// The error in a body as KMS, and STS likewise, gives it: a JSON object with at least a `Code`.
pub(crate) fn kms_error(response: &Response) -> Option<KmsError> {
    let members = Members::of(&response.body).ok()?;
    let field = |name, bytes_max| members.text(name).map(|text| excerpt(text.trim(), bytes_max));
    Some(KmsError {
        status: response.status,
        code: field("Code", CODE_BYTES_MAX).filter(|code| !code.is_empty())?,
        message: members
            .text("Message")
            .map(|message| excerpt(without_signed_text(message.trim()), MESSAGE_BYTES_MAX))
            .unwrap_or_default(),
        request_id: field("RequestId", REQUEST_ID_BYTES_MAX).unwrap_or_default(),
    })
}

/// `message` up to where it begins to quote what was signed.
///
/// Alibaba Cloud explains `SignatureDoesNotMatch` with its own string to sign and canonical request, and in
/// the latter stands the security token.
fn without_signed_text(message: &str) -> &str {
    const MARKS: [&str; 5] =
        ["stringtosign", "string to sign", "canonicalrequest", "canonical request", "security-token"];
    // ASCII case only, so that the positions are those of `message`.
    let lower = message.to_ascii_lowercase();
    let end = MARKS.iter().filter_map(|mark| lower.find(mark)).min();
    match end.and_then(|end| message.get(..end)) {
        // Of ".. our calculation. server StringToSign is .." nothing is left hanging.
        Some(kept) => kept.trim_end().trim_end_matches("server").trim_end(),
        None => message.trim_end(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_UNIX_S: i64 = 1_735_787_045;

    fn response(status: u16, body: &str) -> Response {
        Response {
            status,
            body: Zeroizing::new(body.as_bytes().to_vec()),
            date_unix_s: Some(77),
            retry_after_s: Some(9),
            keep_alive: true,
        }
    }

    fn parsed(status: u16, body: &str) -> Reply {
        parse("s", response(status, body), NOW_UNIX_S)
    }

    #[test]
    fn value_is_the_body_itself() {
        let body = r#" {"SecretName":"s","SecretData":"a\"b\u00e9","New":{"x":[1,2]},"NextRotationDate":"2025-01-02T03:04:06Z"} "#;
        let response = response(200, body);
        let at = response.body.as_ptr();
        let Reply::Value(value) = parse("s", response, NOW_UNIX_S) else { panic!() };
        assert_eq!(value.body.as_slice(), body.as_bytes());
        assert_eq!(value.body.as_ptr(), at, "moved, not copied");
        assert_eq!(value.next_rotation_unix_s, Some(NOW_UNIX_S + 1));
        assert!(!format!("{value:?}").contains("body: "));
    }

    #[test]
    fn name_must_be_the_one_asked_for() {
        for (asked, name, same) in [
            ("s", "s", true),
            ("s", "S", false),
            ("s", "", false),
            ("s", "secret/s", false),
            ("acs/ecs/i-1", r"acs\/ecs\u002fi-1", true),
            ("acs:kms:cn-hangzhou:1234:secret/s", "s", true),
            ("acs:kms:cn-hangzhou:1234:secret/s", "acs:kms:cn-hangzhou:1234:secret/s", true),
            ("acs:kms:cn-hangzhou:1234:secret/s", "acs:kms:cn-beijing:1234:secret/s", false),
            ("acs:kms:cn-hangzhou:1234:secret/a/secret/b:c", "a/secret/b:c", true),
            ("acs:kms:cn-hangzhou:1234:secret/a/secret/b", "b", false),
            ("acs:kms:cn-hangzhou:1234:key/s", "s", false),
            ("secret/s", "s", false),
        ] {
            let body = format!(r#"{{"SecretName":"{name}","SecretData":"x"}}"#);
            let reply = parse(asked, response(200, &body), NOW_UNIX_S);
            assert_eq!(matches!(reply, Reply::Value(_)), same, "{asked} {name}: {reply:?}");
        }
    }

    #[test]
    fn rotation_date_counts_only_if_it_is_one_to_come() {
        for (date, expected) in [
            (r#""2025-01-02T03:04:06Z""#, Some(NOW_UNIX_S + 1)),
            (r#""2025-01-02T11:04:07.5+08:00""#, Some(NOW_UNIX_S + 2)),
            (r#""2025-01-02T03:04:05Z""#, None),
            (r#""2020-01-01T00:00:00Z""#, None),
            (r#""2025-13-02T03:04:06Z""#, None),
            (r#""tomorrow""#, None),
            (r#""""#, None),
            ("1835787045", None),
            ("null", None),
        ] {
            let body = format!(r#"{{"SecretName":"s","SecretData":"x","NextRotationDate":{date}}}"#);
            let Reply::Value(value) = parsed(200, &body) else { panic!("{date}") };
            assert_eq!(value.next_rotation_unix_s, expected, "{date}");
        }
    }

    #[test]
    fn what_is_no_value_is_invalid_and_not_quoted() {
        let deep = format!(r#"{{"SecretName":"s","SecretData":"hush","x":{}"#, "[".repeat(100_000));
        for body in [
            "",
            "hush",
            "\"hush\"",
            "[\"hush\"]",
            "{",
            "<html>hush",
            "\u{feff}{\"SecretName\":\"s\",\"SecretData\":\"hush\"}",
            r#"{"SecretName":"s","SecretData":"hush""#,
            r#"{"SecretName":"s","SecretData":"hush"}x"#,
            r#"{"SecretName":"s","SecretData":"hush"}{}"#,
            r#"{"SecretName":"s","SecretData":"hush\q"}"#,
            "{\"SecretName\":\"s\",\"SecretData\":\"hush\n\"}",
            r#"{"SecretName":"s","SecretData":"hush","x":01}"#,
            r#"{"SecretName":"s","SecretData":null}"#,
            r#"{"SecretName":"s","SecretData":["hush"]}"#,
            r#"{"SecretName":"s"}"#,
            r#"{"SecretName":1,"SecretData":"hush"}"#,
            r#"{"SecretName":"hush","SecretData":"hush"}"#,
            r#"{"SecretData":"hush"}"#,
            r#"{"Code":"Forbidden.NoPermission","Message":"hush"}"#,
            &deep,
        ] {
            let Reply::Invalid(problem) = parsed(200, body) else { panic!("{body:.60}") };
            assert!(!problem.contains("hush"), "{problem}");
        }
        let not_text = Response {
            body: Zeroizing::new(b"{\"SecretName\":\"s\",\"SecretData\":\"\xff\"}".to_vec()),
            ..response(200, "")
        };
        assert!(matches!(parse("s", not_text, NOW_UNIX_S), Reply::Invalid(_)));
        for status in [0, 201, 204, 301, 304] {
            assert!(matches!(parsed(status, r#"{"SecretName":"s","SecretData":"x"}"#), Reply::Invalid(_)));
        }
    }

    #[test]
    fn odd_but_valid_json_passes() {
        let deep = format!("{}{}", "[".repeat(20_000), "]".repeat(20_000));
        for more in
            [r#""x":1e999999"#, r#""x":-0.00000000000000000000000001E-99999"#, &format!(r#""x":{deep}"#)]
        {
            let body = format!(r#"{{"SecretName":"z","SecretName":"s","SecretData":"\ud800",{more}}}"#);
            assert!(matches!(parsed(200, &body), Reply::Value(_)), "{more:.60}");
        }
    }

    #[test]
    fn errors_are_sorted_as_the_protocol_page_says() {
        for (status, code, kind) in [
            (400, "InvalidParameter", "Refused"),
            (400, "MissingParameter", "Refused"),
            (400, "IncompleteSignature", "SignatureRefused"),
            (400, "SignatureDoesNotMatch", "SignatureRefused"),
            (400, "SignatureNonceUsed", "SignatureRefused"),
            (400, "IllegalTimestamp", "ClockSkew"),
            (400, "InvalidTimeStamp.Expired", "ClockSkew"),
            (400, "Throttling", "Throttled"),
            (400, "Throttling.User", "Throttled"),
            (400, "Rejected.Throttling", "Throttled"),
            (429, "Rejected.Throttling", "Throttled"),
            (429, "Anything", "Throttled"),
            (403, "Forbidden.NoPermission", "Refused"),
            (403, "Forbidden.AccessKey", "Refused"),
            (403, "Forbidden.KmsServiceNotEnabled", "Refused"),
            (403, "Forbidden.InDebt", "Refused"),
            (403, "Forbidden.InDebtOverdue", "Refused"),
            (403, "Forbidden.ProhibitedByRiskControl", "Refused"),
            (404, "Forbidden.ResourceNotFound", "Refused"),
            (404, "Forbidden.KeyNotFound", "Refused"),
            (404, "InvalidAccessKeyId.NotFound", "CredentialsRefused"),
            (400, "InvalidSecurityToken.Expired", "CredentialsRefused"),
            (403, "InvalidSecurityToken.Malformed", "CredentialsRefused"),
            (400, "InvalidSecurityToken.MismatchWithAccessKey", "CredentialsRefused"),
            (404, "InvalidAccessKeyId", "CredentialsRefused"),
            (400, "InvalidAccessKeyId.Inactive", "CredentialsRefused"),
            (400, "InvalidTimeStamp.Format", "SignatureRefused"),
            (404, "InvalidAccessKeyIdentity", "Refused"),
            (404, "Throttlings", "Refused"),
            (409, "Rejected.Disabled", "Refused"),
            (409, "Rejected.PendingDeletion", "Refused"),
            (409, "Rejected.ResourceInDeleteWindow", "Refused"),
            (500, "InternalFailure", "Transient"),
            (503, "ServiceUnavailableTemporary", "Transient"),
            (400, "ServiceUnavailableTemporary", "Transient"),
            (502, "Forbidden.New", "Transient"),
            (408, "New", "Transient"),
            (418, "New", "Refused"),
        ] {
            let body = format!(r#"{{"HttpStatus":{status},"Code":"{code}","Message":"m","RequestId":"r"}}"#);
            let expected =
                KmsError { status, code: code.into(), message: "m".into(), request_id: "r".into() };
            let (got, error) = match parsed(status, &body) {
                Reply::Refused(error) => ("Refused", error),
                Reply::Transient { error, retry_after_s: Some(9) } => ("Transient", error),
                Reply::Throttled { error, retry_after_s: Some(9) } => ("Throttled", error),
                Reply::CredentialsRefused(error) => ("CredentialsRefused", error),
                Reply::ClockSkew { error, server_unix_s: Some(77) } => ("ClockSkew", error),
                Reply::SignatureRefused(error) => ("SignatureRefused", error),
                other => panic!("{status} {code}: {other:?}"),
            };
            assert_eq!((got, error), (kind, expected), "{status} {code}");
        }
    }

    #[test]
    fn errors_that_are_not_from_kms() {
        for body in
            ["", "<html>hush</html>", "{}", r#"{"Code":""}"#, r#"{"Code":7}"#, r#"{"Code":"A"}x"#, "[]"]
        {
            for status in [500, 502, 503, 599, 408] {
                let Reply::Transient { error, retry_after_s: Some(9) } = parsed(status, body) else {
                    panic!()
                };
                assert_eq!((error.status, error.code.as_str()), (502, "UpstreamInvalidResponse"));
                assert!(error.message.contains(&status.to_string()) && !error.message.contains("hush"));
            }
            assert!(matches!(parsed(429, body), Reply::Throttled { .. }));
            for status in [400, 403, 404, 499] {
                let Reply::Invalid(problem) = parsed(status, body) else { panic!() };
                assert!(problem.contains(&status.to_string()) && !problem.contains("hush"));
            }
        }
    }

    #[test]
    fn foreign_text_is_bounded_and_printable() {
        let body = format!(
            r#"{{"Code":"A\r\nB\u0000","Message":"x\u001b[31m\u202ey{}","RequestId":"{}"}}"#,
            "\u{e9}".repeat(MESSAGE_BYTES_MAX),
            "r".repeat(1000)
        );
        let Reply::Refused(error) = parsed(404, &body) else { panic!() };
        assert_eq!(error.code, r"A\r\nB\0");
        assert!(error.message.starts_with(r"x\u{1b}[31m\u{202e}yé"), "{}", error.message);
        assert!((MESSAGE_BYTES_MAX - 1..=MESSAGE_BYTES_MAX).contains(&error.message.len()));
        assert!(error.message.ends_with("é…"));
        assert_eq!(error.request_id.len(), REQUEST_ID_BYTES_MAX);
        // Only a code is a must.
        let Reply::Refused(error) = parsed(404, r#"{"Code":"A","Message":{}}"#) else { panic!() };
        assert_eq!(error.to_string(), "404 A");
    }

    #[test]
    fn messages_do_not_quote_the_security_token() {
        for message in [
            r"Specified signature does not match our calculation. server StringToSign is [..hush], server CanonicalRequest is [x-acs-security-token:hush]",
            r"Specified signature does not match our calculation. x-acs-Security-Token:hush",
            r"Specified signature does not match our calculation. \u00c9 server string to sign is:hush",
        ] {
            let body = format!(r#"{{"Code":"SignatureDoesNotMatch","Message":"{message}","RequestId":"r"}}"#);
            let Reply::SignatureRefused(error) = parsed(400, &body) else { panic!() };
            assert!(error.message.starts_with("Specified signature does not match"), "{}", error.message);
            assert!(
                !error.message.contains("hush") && !error.message.ends_with("server"),
                "{}",
                error.message
            );
        }
        let body =
            r#"{"Code":"InvalidSecurityToken.Expired","Message":"Specified SecurityToken is expired."}"#;
        let Reply::CredentialsRefused(error) = parsed(400, body) else { panic!() };
        assert_eq!(error.message, "Specified SecurityToken is expired.");
    }
}
