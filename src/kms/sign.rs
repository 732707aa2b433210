//! Signature V3 (`ACS3-HMAC-SHA256`), as Alibaba Cloud's "V3 request structure and signature" describes it.
//!
//! Pure: [`authorization`] is given every header it signs, the date and the nonce among them, and adds none.

use std::fmt;

use ring::{digest, hmac};

use crate::http::percent;
use crate::secret::Secret;
use crate::text::hex;

/// Name of the algorithm, as it stands in the string to sign and in `Authorization`.
pub(crate) const ALGORITHM: &str = "ACS3-HMAC-SHA256";

/// An access key, long-lived or handed out by STS.
pub struct Credentials {
    /// `AccessKeyId`: public, but kept out of the log all the same.
    pub access_key_id: String,
    /// `AccessKeySecret`: the key of the HMAC.
    pub access_key_secret: Secret,
    /// `SecurityToken`: there with credentials from STS.
    pub security_token: Option<Secret>,
    /// Seconds since 1970 (UTC) at which they end; `None`: they do not.
    pub expires_unix_s: Option<i64>,
}

impl fmt::Debug for Credentials {
    /// Kind and expiry only.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("sts", &self.security_token.is_some())
            .field("expires_unix_s", &self.expires_unix_s)
            .finish_non_exhaustive()
    }
}

/// What is signed of a request.
#[derive(Clone, Copy)]
pub(crate) struct ToSign<'a> {
    /// `GET` or `POST`.
    pub(crate) method: &'a str,
    /// The path as sent: encoded, `/` for OpenAPI's RPC style.
    pub(crate) path: &'a str,
    /// The query as [`canonical_query`] makes it.
    pub(crate) query: &'a str,
    /// Every header to sign, in any order, each name once and in lower case. At least `host` and the
    /// `x-acs-*` ones; with STS credentials `x-acs-accesskey-id` and `x-acs-security-token` too.
    pub(crate) headers: &'a [(&'a str, &'a str)],
    /// `x-acs-content-sha256`: [`content_sha256`] of the body.
    pub(crate) content_sha256: &'a str,
}

/// The query of `pairs`: encoded, sorted by name, joined by `&`; an empty value keeps its `=`.
///
/// Sent like this, it is the canonical query too.
pub(crate) fn canonical_query(pairs: &[(&str, &str)]) -> String {
    let mut sorted = pairs.to_vec();
    sorted.sort_unstable();
    let mut query = String::new();
    for (name, value) in sorted {
        if !query.is_empty() {
            query.push('&');
        }
        percent::encode(name, &mut query);
        query.push('=');
        percent::encode(value, &mut query);
    }
    query
}

/// SHA-256 of a request's body as 64 lower-case hex digits.
pub(crate) fn content_sha256(body: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, body).as_ref())
}

/// The request in canonical form, in which the security token stands, and the names of the headers that are signed.
fn canonical(request: &ToSign<'_>) -> (String, String) {
    let mut headers = request.headers.to_vec();
    headers.sort_unstable();
    debug_assert!(headers.iter().all(|(name, _)| !name.bytes().any(|byte| byte.is_ascii_uppercase())));
    let names: Vec<&str> = headers.iter().map(|(name, _)| *name).collect();
    let signed_headers = names.join(";");
    let mut canonical = format!("{}\n{}\n{}\n", request.method, request.path, request.query);
    for (name, value) in headers {
        canonical.extend([name, ":", value.trim(), "\n"]);
    }
    canonical.extend(["\n", &signed_headers, "\n", request.content_sha256]);
    (canonical, signed_headers)
}

/// What the signature is the HMAC of. When KMS answers `SignatureDoesNotMatch`, it shows its own.
fn string_to_sign(canonical_request: &str) -> String {
    format!("{ALGORITHM}\n{}", content_sha256(canonical_request.as_bytes()))
}

/// The `Authorization` header of a request.
pub(crate) fn authorization(request: &ToSign<'_>, credentials: &Credentials) -> String {
    let (canonical_request, signed_headers) = canonical(request);
    // ring keeps what it derives from the secret on the stack until this statement ends and does not wipe
    // it; the secret itself is copied nowhere.
    let signature = hex(hmac::sign(
        &hmac::Key::new(hmac::HMAC_SHA256, credentials.access_key_secret.expose()),
        string_to_sign(&canonical_request).as_bytes(),
    )
    .as_ref());
    let id = &credentials.access_key_id;
    format!("{ALGORITHM} Credential={id},SignedHeaders={signed_headers},Signature={signature}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `generated_with` in the file says which official SDKs made them.
    const VECTORS: &str = include_str!("../../tests/acs3_vectors.json");

    fn pairs(object: &serde_json::Value) -> Vec<(&str, &str)> {
        object
            .as_object()
            .unwrap()
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str().unwrap()))
            .collect()
    }

    #[test]
    fn reproduces_every_official_vector() {
        let file: serde_json::Value = serde_json::from_str(VECTORS).unwrap();
        let vectors = file["acs3"].as_array().unwrap();
        assert_eq!(vectors.len(), 8);
        for vector in vectors {
            let text = |key: &str| vector[key].as_str().unwrap();
            let name = text("name");
            let credentials = Credentials {
                access_key_id: text("access_key_id").to_owned(),
                access_key_secret: Secret::from(text("access_key_secret")),
                security_token: vector["security_token"].as_str().map(Secret::from),
                expires_unix_s: None,
            };
            let query = canonical_query(&pairs(&vector["query"]));
            assert_eq!(query, text("wire_query"), "{name}");
            let content_sha256 = content_sha256(text("body").as_bytes());
            assert_eq!(content_sha256, vector["headers"]["x-acs-content-sha256"].as_str().unwrap(), "{name}");
            let mut headers = pairs(&vector["headers"]);
            headers.reverse(); // Any order will do.
            let request = ToSign {
                method: text("method"),
                path: text("path"),
                query: &query,
                headers: &headers,
                content_sha256: &content_sha256,
            };
            let (canonical_request, _) = canonical(&request);
            assert_eq!(canonical_request, text("canonical_request"), "{name}");
            assert_eq!(string_to_sign(&canonical_request), text("string_to_sign"), "{name}");
            assert_eq!(authorization(&request, &credentials), text("authorization"), "{name}");
            assert!(text("authorization").ends_with(&format!(",Signature={}", text("signature"))), "{name}");
        }
    }

    #[test]
    fn trims_header_values_and_sorts_by_name_then_value() {
        let credentials = Credentials {
            access_key_id: "id".into(),
            access_key_secret: Secret::from("hush"),
            security_token: Some(Secret::from("hush")),
            expires_unix_s: Some(7),
        };
        let headers = [("x-acs-b", "  2\t"), ("host", "h")];
        let request =
            ToSign { method: "POST", path: "/", query: "", headers: &headers, content_sha256: "abc" };
        assert_eq!(canonical(&request).0, "POST\n/\n\nhost:h\nx-acs-b:2\n\nhost;x-acs-b\nabc");
        assert_eq!(canonical_query(&[("b", "2"), ("a", "3"), ("b", "1"), ("B", "")]), "B=&a=3&b=1&b=2");
        assert_eq!(format!("{credentials:?}"), "Credentials { sts: true, expires_unix_s: Some(7), .. }");
    }
}
