//! What the agent asks of KMS: `GetSecretValue`, OpenAPI version 2016-01-20, RPC style.

#![warn(clippy::indexing_slicing)]

use std::fmt;

use super::sign::{self, Credentials, ToSign};
use crate::text::hex;
use crate::time::rfc_3339;

/// `x-acs-version` of KMS.
const API_VERSION: &str = "2016-01-20";

/// Sent as it is. Not signed, so that a proxy may change it.
const USER_AGENT: &str = concat!("kms-agent/", env!("CARGO_PKG_VERSION"));

/// Why no request can be made of what was given. Nothing has been written then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestError {
    /// Empty, or a character in it that no header value may have.
    Host,
    /// The same, of the credentials' `AccessKeyId`.
    AccessKeyId,
    /// The same, of the credentials' `SecurityToken`.
    SecurityToken,
    /// The time is not in the years 0 to 9999.
    Clock,
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RequestError::Host => {
                "the KMS endpoint is empty or has a character that a Host header may not have"
            }
            RequestError::AccessKeyId => {
                "the AccessKeyId is empty or has a character that a header may not have"
            }
            RequestError::SecurityToken => {
                "the SecurityToken is empty or has a character that a header may not have"
            }
            RequestError::Clock => "this machine's clock is not in the years 0 to 9999",
        })
    }
}

/// Appends a signed `GetSecretValue` request, head and (empty) body, to `out`.
///
/// `host` is `name[:port]` as the `Host` header has it. `secret_id`, `version_id` and `version_stage` may
/// be any text: judging them is for KMS. With neither of the latter KMS gives `ACSCurrent`.
/// `unix_s` is the time that KMS compares with its own (seconds since 1970), `nonce` is random, fresh for
/// every request, retries included.
///
/// # Errors
/// [`RequestError`] if something does not fit in a header: credentials come from outside, and a line
/// break in one would write headers of its own.
#[expect(clippy::too_many_arguments, reason = "one call, and each of them is a different thing")]
pub fn get_secret_value(
    out: &mut Vec<u8>,
    host: &str,
    secret_id: &str,
    version_id: Option<&str>,
    version_stage: Option<&str>,
    credentials: &Credentials,
    unix_s: i64,
    nonce: &[u8; 16],
) -> Result<(), RequestError> {
    let host = header_value(host).ok_or(RequestError::Host)?;
    let access_key_id = header_value(&credentials.access_key_id).ok_or(RequestError::AccessKeyId)?;
    let date = rfc_3339(unix_s).ok_or(RequestError::Clock)?;
    let nonce = hex(nonce);
    let content_sha256 = sign::content_sha256(b"");

    let mut parameters = vec![("SecretName", secret_id)];
    parameters.extend(version_id.map(|id| ("VersionId", id)));
    parameters.extend(version_stage.map(|stage| ("VersionStage", stage)));
    let query = sign::canonical_query(&parameters);

    let mut headers = vec![
        ("host", host),
        ("x-acs-action", "GetSecretValue"),
        ("x-acs-version", API_VERSION),
        ("x-acs-date", &date),
        ("x-acs-signature-nonce", &nonce),
        ("x-acs-content-sha256", &content_sha256),
    ];
    if let Some(token) = &credentials.security_token {
        let token = token.expose_str().and_then(header_value).ok_or(RequestError::SecurityToken)?;
        headers.push(("x-acs-accesskey-id", access_key_id));
        headers.push(("x-acs-security-token", token));
    }
    let authorization = sign::authorization(
        &ToSign {
            method: "POST",
            path: "/",
            query: &query,
            headers: &headers,
            content_sha256: &content_sha256,
        },
        credentials,
    );
    headers.push(("authorization", &authorization));
    headers.push(("accept", "application/json"));
    headers.push(("user-agent", USER_AGENT));
    headers.push(("content-length", "0"));

    for part in ["POST /?", &query, " HTTP/1.1\r\n"] {
        out.extend_from_slice(part.as_bytes());
    }
    for (name, value) in headers {
        for part in [name, ": ", value, "\r\n"] {
            out.extend_from_slice(part.as_bytes());
        }
    }
    out.extend_from_slice(b"\r\n");
    Ok(())
}

/// `text` if it can stand in a header line: visible ASCII, at least one character, no white space (of
/// which none of these values has any, and a trimmed value would be signed otherwise than it is sent).
fn header_value(text: &str) -> Option<&str> {
    (!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic())).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;

    const NONCE: [u8; 16] = *b"\x01\x23\x45\x67\x89\xab\xcd\xef\x01\x23\x45\x67\x89\xab\xcd\xef";
    /// 2025-01-02T03:04:05Z, the time of the vectors.
    const UNIX_S: i64 = 1_735_787_045;

    fn credentials(id: &str, secret: &str, token: Option<&str>) -> Credentials {
        Credentials {
            access_key_id: id.into(),
            access_key_secret: Secret::from(secret),
            security_token: token.map(Secret::from),
            expires_unix_s: None,
        }
    }

    fn vector(name: &str) -> serde_json::Value {
        let vectors = include_str!("../../tests/acs3_vectors.json");
        let file: serde_json::Value = serde_json::from_str(vectors).unwrap();
        file["acs3"].as_array().unwrap().iter().find(|vector| vector["name"] == name).unwrap().clone()
    }

    #[test]
    fn request_is_the_one_of_the_official_vector() {
        let vector = vector("gsv-ak-plain");
        let text = |key: &str| vector[key].as_str().unwrap();
        let credentials = credentials(text("access_key_id"), text("access_key_secret"), None);
        let mut out = b"before".to_vec();
        let host = "kms.cn-hangzhou.aliyuncs.com";
        get_secret_value(&mut out, host, "agent-test", None, None, &credentials, UNIX_S, &NONCE).unwrap();
        let expected = format!(
            "beforePOST /?SecretName=agent-test HTTP/1.1\r\n\
             host: kms.cn-hangzhou.aliyuncs.com\r\n\
             x-acs-action: GetSecretValue\r\n\
             x-acs-version: 2016-01-20\r\n\
             x-acs-date: 2025-01-02T03:04:05Z\r\n\
             x-acs-signature-nonce: 0123456789abcdef0123456789abcdef\r\n\
             x-acs-content-sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\r\n\
             authorization: {}\r\n\
             accept: application/json\r\n\
             user-agent: kms-agent/{}\r\n\
             content-length: 0\r\n\r\n",
            text("authorization"),
            env!("CARGO_PKG_VERSION")
        );
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn sts_headers_are_sent_and_signed_and_parameters_encoded_in_order() {
        let mut out = Vec::new();
        let credentials = credentials("STS.id", "hush", Some("CAIS/x+y=="));
        let (id, version, stage) = ("a b\r\n&", Some("v1"), Some(""));
        get_secret_value(&mut out, "h:8443", id, version, stage, &credentials, 0, &NONCE).unwrap();
        let request = String::from_utf8(out).unwrap();
        assert!(
            request.starts_with("POST /?SecretName=a%20b%0D%0A%26&VersionId=v1&VersionStage= HTTP/1.1\r\n"),
            "{request}"
        );
        for line in [
            "host: h:8443",
            "x-acs-date: 1970-01-01T00:00:00Z",
            "x-acs-accesskey-id: STS.id",
            "x-acs-security-token: CAIS/x+y==",
        ] {
            assert!(request.contains(&format!("\r\n{line}\r\n")), "{line}");
        }
        assert!(request.contains(
            "SignedHeaders=host;x-acs-accesskey-id;x-acs-action;x-acs-content-sha256;x-acs-date;\
             x-acs-security-token;x-acs-signature-nonce;x-acs-version,Signature="
        ));
        assert!(!request.contains("hush"));
    }

    #[test]
    fn refuses_what_would_break_out_of_a_header() {
        let fine = || credentials("id", "k", None);
        for (host, credentials, unix_s, error) in [
            ("", fine(), 0, RequestError::Host),
            ("h\r\nx: y", fine(), 0, RequestError::Host),
            ("h h", fine(), 0, RequestError::Host),
            ("h", credentials("", "k", None), 0, RequestError::AccessKeyId),
            ("h", credentials("id\n", "k", None), 0, RequestError::AccessKeyId),
            ("h", credentials("id", "k", Some("")), 0, RequestError::SecurityToken),
            ("h", credentials("id", "k", Some("t\r\n")), 0, RequestError::SecurityToken),
            ("h", credentials("id", "k", Some("t\u{e9}")), 0, RequestError::SecurityToken),
            ("h", fine(), i64::MAX, RequestError::Clock),
            ("h", fine(), i64::MIN, RequestError::Clock),
        ] {
            let mut out = Vec::new();
            let made = get_secret_value(&mut out, host, "s", None, None, &credentials, unix_s, &NONCE);
            assert_eq!(made, Err(error), "{host:?} {unix_s}");
            assert!(out.is_empty());
        }
    }
}
