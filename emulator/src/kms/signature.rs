//! Signature V3 (`ACS3-HMAC-SHA256`), written from its description and checked against vectors of the
//! official SDKs. Shares nothing with the agent's signer, so that one mistake cannot hide the other.

use crate::clock;
use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};

/// The scheme's name, as it begins the `Authorization` header.
pub const ALGORITHM: &str = "ACS3-HMAC-SHA256";

/// How far a request's `x-acs-date` may be from the server's clock, either way, in seconds.
pub const CLOCK_SKEW_MAX_S: i64 = 15 * 60;

/// Every request must sign these.
const ALWAYS_SIGNED: [&str; 6] =
    ["host", "x-acs-action", "x-acs-version", "x-acs-date", "x-acs-signature-nonce", "x-acs-content-sha256"];

/// A request as it came over the wire.
#[derive(Debug, Clone, Copy)]
pub struct SignedRequest<'a> {
    /// `POST` or `GET`.
    pub method: &'a str,
    /// Path without the query.
    pub path: &'a str,
    /// Query as sent, without `?`.
    pub query: &'a str,
    /// Header fields in the order they came; names in lower case.
    pub headers: &'a [(String, String)],
    /// The whole body.
    pub body: &'a [u8],
}

impl SignedRequest<'_> {
    /// Value of a header field; several of one name are joined by `,` (RFC 9110 5.2).
    pub fn header(&self, name: &str) -> Option<String> {
        let values: Vec<&str> =
            self.headers.iter().filter(|(n, _)| n == name).map(|(_, v)| v.trim()).collect();
        if values.is_empty() { None } else { Some(values.join(",")) }
    }
}

/// Why a request was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// A part of the signature is missing or cannot be read.
    Incomplete(String),
    /// `x-acs-date` is ahead of the server's clock, or is no date.
    TimestampAhead,
    /// `x-acs-date` is behind the server's clock.
    TimestampExpired,
    /// No such access key.
    UnknownAccessKey,
    /// The security token is not one that was issued.
    TokenMalformed,
    /// The security token belongs to another access key.
    TokenMismatch,
    /// The security token was good once.
    TokenExpired,
    /// The nonce was used before.
    NonceUsed,
    /// The signature is another one. Carries the string that the server would have signed.
    Mismatch {
        /// `ACS3-HMAC-SHA256\n<hash>`: tells where the two sides differ, holds nothing secret.
        string_to_sign: String,
    },
}

/// Who signed a request that verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// The access key id.
    pub access_key_id: String,
    /// The nonce, to be refused the next time.
    pub nonce: String,
}

/// The three parts of an `Authorization` header.
#[derive(Debug, PartialEq, Eq)]
struct Authorization<'a> {
    access_key_id: &'a str,
    signed_headers: Vec<&'a str>,
    signature: &'a str,
}

/// The access key id of an `Authorization` header, read without verifying anything.
pub fn claimed_access_key_id(authorization: &str) -> Option<&str> {
    parse_authorization(authorization).map(|a| a.access_key_id)
}

fn parse_authorization(text: &str) -> Option<Authorization<'_>> {
    let fields = text.trim().strip_prefix(ALGORITHM)?.strip_prefix(' ')?;
    let (mut id, mut signed, mut signature) = (None, None, None);
    for field in fields.split(',') {
        let (name, value) = field.trim().split_once('=')?;
        let slot = match name {
            "Credential" => &mut id,
            "SignedHeaders" => &mut signed,
            "Signature" => &mut signature,
            _ => return None,
        };
        if slot.replace(value).is_some() {
            return None;
        }
    }
    Some(Authorization {
        access_key_id: id?,
        signed_headers: signed?.split(';').collect(),
        signature: signature?,
    })
}

/// Verifies a request. `secret_of` gives the access key secret for an access key id and the security token
/// that came with it, or says why there is none. `now` is the server's clock in Unix seconds.
///
/// # Errors
/// The first rule the request breaks. Nonces are the caller's to remember.
pub fn verify(
    request: &SignedRequest<'_>,
    now: i64,
    secret_of: impl FnOnce(&str, Option<&str>) -> Result<String, Refusal>,
) -> Result<Verified, Refusal> {
    let header = request
        .header("authorization")
        .ok_or_else(|| Refusal::Incomplete(
            "there is no Authorization header (kms-emulator supports signature V3 only, not the older RPC signature)"
                .into(),
        ))?;
    let authorization = parse_authorization(&header).ok_or_else(|| {
        Refusal::Incomplete("the Authorization header is not in the form of ACS3-HMAC-SHA256".into())
    })?;
    check_signed_headers(request, &authorization)?;

    check_date(request.header("x-acs-date").as_deref(), now)?;

    let claimed = request.header("x-acs-accesskey-id");
    if claimed.is_some_and(|id| id != authorization.access_key_id) {
        return Err(Refusal::Incomplete("x-acs-accesskey-id is not the Credential".into()));
    }
    let token = request.header("x-acs-security-token");
    let secret = secret_of(authorization.access_key_id, token.as_deref())?;

    let string_to_sign = string_to_sign(request, &authorization.signed_headers);
    let right_body = request.header("x-acs-content-sha256") == Some(sha256_hex(request.body));
    // Only the exact text counts: hex in capitals would be another signature.
    if !right_body || sign(&secret, &string_to_sign) != authorization.signature {
        return Err(Refusal::Mismatch { string_to_sign });
    }
    Ok(Verified {
        access_key_id: authorization.access_key_id.to_owned(),
        nonce: request.header("x-acs-signature-nonce").unwrap_or_default(),
    })
}

/// A request's timestamp against the server's clock.
pub(crate) fn check_date(date: Option<&str>, now: i64) -> Result<(), Refusal> {
    match date.and_then(clock::parse_iso8601).map(|date| date - now) {
        None => Err(Refusal::TimestampAhead),
        Some(ahead) if ahead > CLOCK_SKEW_MAX_S => Err(Refusal::TimestampAhead),
        Some(ahead) if ahead < -CLOCK_SKEW_MAX_S => Err(Refusal::TimestampExpired),
        Some(_) => Ok(()),
    }
}

/// Names that must be signed are; names that are signed exist, in order, once, in lower case.
fn check_signed_headers(
    request: &SignedRequest<'_>,
    authorization: &Authorization<'_>,
) -> Result<(), Refusal> {
    let signed = &authorization.signed_headers;
    if !signed.is_sorted_by(|a, b| a < b) {
        return Err(Refusal::Incomplete("SignedHeaders is not sorted".into()));
    }
    if let Some(absent) = signed.iter().find(|name| request.header(name).is_none()) {
        return Err(Refusal::Incomplete(format!("signed header {absent} was not sent")));
    }
    // Whatever steers the call must be signed, or somebody in between could change it.
    let sent = request.headers.iter().map(|(name, _)| name.as_str());
    let must = sent.filter(|name| name.starts_with("x-acs-") || *name == "content-type");
    match ALWAYS_SIGNED.into_iter().chain(must).find(|name| !signed.contains(name)) {
        Some(name) => Err(Refusal::Incomplete(format!("header {name} is not signed"))),
        None => Ok(()),
    }
}

/// The string to sign of a request, over the given header names (sorted, lower case).
pub fn string_to_sign(request: &SignedRequest<'_>, signed_headers: &[&str]) -> String {
    format!("{ALGORITHM}\n{}", sha256_hex(canonical_request(request, signed_headers).as_bytes()))
}

fn canonical_request(request: &SignedRequest<'_>, signed_headers: &[&str]) -> String {
    let mut text = format!("{}\n{}\n{}\n", request.method, request.path, canonical_query(request.query));
    for name in signed_headers {
        text.push_str(name);
        text.push(':');
        text.push_str(&request.header(name).unwrap_or_default());
        text.push('\n');
    }
    text.push('\n');
    text.push_str(&signed_headers.join(";"));
    text.push('\n');
    text.push_str(&sha256_hex(request.body));
    text
}

/// The wire query decoded and encoded again: clients may send `+` or `%20`, but sign `%20`.
fn canonical_query(wire: &str) -> String {
    let mut pairs = decode_pairs(wire);
    pairs.sort();
    let encoded: Vec<String> =
        pairs.iter().map(|(name, value)| format!("{}={}", encode(name), encode(value))).collect();
    encoded.join("&")
}

/// Lower-case hex of `HMAC-SHA256(secret, string_to_sign)`.
pub fn sign(access_key_secret: &str, string_to_sign: &str) -> String {
    match Hmac::<Sha256>::new_from_slice(access_key_secret.as_bytes()) {
        Ok(mut mac) => {
            mac.update(string_to_sign.as_bytes());
            hex::encode(mac.finalize().into_bytes())
        }
        // HMAC takes a key of any length; a signature that never matches is the safe answer all the same.
        Err(_) => String::new(),
    }
}

/// Lower-case hex of SHA-256.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// RFC 3986 percent-encoding over UTF-8; only `A-Za-z0-9-_.~` stay.
pub fn encode(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut out = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

/// Names and values of a query or form body. `+` is a space; a `%` that begins no byte stays itself.
pub fn decode_pairs(text: &str) -> Vec<(Vec<u8>, Vec<u8>)> {
    let pairs = text.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(n, v)| (decode(n), decode(v)))
        .collect()
}

fn decode(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let escaped = match (first, tail) {
            (b'%', [high, low, ..]) => hex::decode([*high, *low]).ok(),
            _ => None,
        };
        match escaped {
            Some(byte) => {
                out.extend(byte);
                rest = tail.get(2..).unwrap_or_default();
            }
            None => {
                out.push(if first == b'+' { b' ' } else { first });
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
#[path = "signature_tests.rs"]
mod tests;
