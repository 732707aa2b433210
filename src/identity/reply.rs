//! Credentials as the services give them, and their refusals.
#![warn(clippy::indexing_slicing)]

use super::error::{CredentialSource, IdentityError, ServiceError};
use super::provider::Grant;
use crate::http::response::Response;
use crate::json::Members;
use crate::kms::reply::kms_error;
use crate::kms::sign::Credentials;
use crate::secret::Secret;
use crate::text::excerpt;
use crate::time::{rfc_3339, unix_s_of};
use std::rc::Rc;
use std::time::Duration;
use zeroize::Zeroizing;

/// Longest `Code` of a failure that a message shows, in bytes.
const CODE_BYTES_MAX: usize = 64;
/// A refusal that repeats so many bytes of a token in a row quotes it.
const QUOTED_BYTES_MIN: usize = 8;

/// Reads `{"Code":"Success","AccessKeyId":..,"AccessKeySecret":..,"SecurityToken":..,"Expiration":..}`, as the
/// metadata service and a credentials URI give it. `unix_s`: the time by which its end is judged.
/// Errors: when it is not that, or the credentials are past their end.
pub(super) fn flat(asked: CredentialSource, body: &[u8], unix_s: i64) -> Result<Grant, IdentityError> {
    let members = Members::of(body).unwrap_or_default();
    let grant = match members.text("Code") {
        Some(code) if *code == "Success" => grant(&members, unix_s),
        Some(code) => Err(ServiceError::Code(excerpt(code.trim(), CODE_BYTES_MAX))),
        None => Err(ServiceError::Malformed(CREDENTIALS)),
    };
    grant.map_err(|problem| IdentityError::Service(asked, problem))
}

/// Reads `{"Credentials":{"AccessKeyId":..,"AccessKeySecret":..,"SecurityToken":..,"Expiration":..}}`, as STS
/// gives it, or its refusal. `shown`: the token that was shown, for the case that the refusal quotes it.
/// Errors: when it is not that, or the credentials are past their end.
pub(super) fn nested(
    asked: CredentialSource,
    response: &Response,
    shown: &Secret,
    unix_s: i64,
) -> Result<Grant, IdentityError> {
    let read = || -> Option<Result<Grant, ServiceError>> {
        let credentials = Members::of(&response.body).ok()?.raw("Credentials")?;
        Some(grant(&Members::of(credentials.as_bytes()).ok()?, unix_s))
    };
    let grant = match response.status {
        200 => read().unwrap_or(Err(ServiceError::Malformed(CREDENTIALS))),
        _ => Err(refusal(response, shown)),
    };
    grant.map_err(|problem| IdentityError::Service(asked, problem))
}

const CREDENTIALS: &str = "credentials";

fn grant(members: &Members<'_>, unix_s: i64) -> Result<Grant, ServiceError> {
    // They go into header lines.
    let graphic =
        |value: &Zeroizing<String>| !value.is_empty() && value.bytes().all(|b| b.is_ascii_graphic());
    let field = |name| members.text(name).filter(graphic).ok_or(ServiceError::Malformed(CREDENTIALS));
    let secret = |name| field(name).map(|value| Secret::from(value.as_str()));
    let (id, key, token) = (field("AccessKeyId")?, secret("AccessKeySecret")?, secret("SecurityToken")?);
    let expires_unix_s = members.text("Expiration").and_then(|date| unix_s_of(&date));
    let expires_unix_s = expires_unix_s.ok_or(ServiceError::Malformed("an expiry"))?;
    let life_s = expires_unix_s.saturating_sub(unix_s);
    let Some(life_s) = u64::try_from(life_s).ok().filter(|life_s| *life_s > 0) else {
        return Err(ServiceError::Expired(rfc_3339(expires_unix_s).unwrap_or_default()));
    };
    let credentials = Credentials {
        access_key_id: id.to_string(),
        access_key_secret: key,
        security_token: Some(token),
        expires_unix_s: Some(expires_unix_s),
    };
    Ok(Grant { credentials: Rc::new(credentials), life: Some(Duration::from_secs(life_s)) })
}

/// What an error reply says, without what it quotes of the token it was shown.
fn refusal(response: &Response, shown: &Secret) -> ServiceError {
    let Some(error) = kms_error(response).filter(|error| !quotes(&error.code, shown.expose())) else {
        return ServiceError::Status(response.status);
    };
    let text = match error.message {
        message if message.is_empty() || quotes(&message, shown.expose()) => error.code,
        message => format!("{}: {message}", error.code),
    };
    ServiceError::Refused { status: response.status, text }
}

/// Whether `message` repeats a part of `secret`, or all of it where that is short.
fn quotes(message: &str, secret: &[u8]) -> bool {
    let bytes = QUOTED_BYTES_MIN.min(secret.len()).max(1);
    let message = message.as_bytes();
    secret.windows(bytes).any(|part| message.windows(bytes).any(|it| it == part))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::response::ResponseParser;

    const UNIX_S: i64 = 1_496_999_000;
    const FIELDS: &str = r#""AccessKeyId":"STS.J8X","AccessKeySecret":"9Pjf","SecurityToken":"CA\/IX","Expiration":"2017-06-09T09:17:19Z""#;

    fn response(status: u16, body: &str) -> Response {
        let mut parser = ResponseParser::new(10_000);
        let bytes = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        parser.feed(bytes.as_bytes()).unwrap();
        parser.into_response()
    }

    #[test]
    fn credentials_are_read_from_both_shapes() {
        let shown = Secret::from("shown-token");
        let flat =
            flat(CredentialSource::Metadata, format!(r#"{{"Code":"Success",{FIELDS}}}"#).as_bytes(), UNIX_S);
        let body = format!(r#"{{"RequestId":"r","Credentials":{{{FIELDS}}}}}"#);
        let nested = nested(CredentialSource::Sts, &response(200, &body), &shown, UNIX_S);
        for grant in [flat, nested] {
            let Grant { credentials, life } = grant.unwrap();
            assert_eq!(life, Some(Duration::from_secs(839)));
            assert_eq!(credentials.access_key_id, "STS.J8X");
            assert!(credentials.access_key_secret.ct_eq(b"9Pjf"));
            assert!(credentials.security_token.as_ref().unwrap().ct_eq(b"CA/IX"));
        }
    }

    #[test]
    fn what_is_wrong_is_told_and_nothing_quoted() {
        let whole = format!(r#"{{"Code":"Success",{FIELDS}}}"#);
        let malformed = ServiceError::Malformed("credentials");
        for (body, expected) in [
            (String::new(), malformed.clone()),
            ("[1]".into(), malformed.clone()),
            ("{}".into(), malformed.clone()),
            (whole.replace("9Pjf", "9P\\r\\njf"), malformed.clone()),
            (whole.replace("9Pjf", ""), malformed),
            (whole.replace("2017", "x"), ServiceError::Malformed("an expiry")),
            (whole.replace("Success", "Failed\\n"), ServiceError::Code("Failed".into())),
            (whole.replace("T09", "T01"), ServiceError::Expired("2017-06-09T01:17:19Z".into())),
        ] {
            let error = flat(CredentialSource::Metadata, body.as_bytes(), UNIX_S).unwrap_err();
            assert_eq!(error, IdentityError::Service(CredentialSource::Metadata, expected), "{body}");
            assert!(!error.to_string().contains("9P"), "{error}");
        }
    }

    #[test]
    fn a_refusal_is_told_without_the_token_that_it_quotes() {
        let shown = Secret::from("eyJhbGciOiJSUzI1NiJ9.hush");
        for (status, body, expected) in [
            (
                400,
                r#"{"Code":"A.B","Message":"no such role"}"#,
                "STS: it refused with 400 A.B: no such role;",
            ),
            (400, r#"{"Code":"A.B","Message":"'eyJhbGciOiJS' is bad"}"#, "STS: it refused with 400 A.B;"),
            (400, r#"{"Code":"A.B","Message":"..NiJ9.hush"}"#, "STS: it refused with 400 A.B;"),
            (400, r#"{"Code":"RSUzI1NiJ9","Message":"m"}"#, "STS: it answered 400"),
            (503, "<html>eyJhbGciOiJSUzI1NiJ9.hush", "STS: it answered 503"),
        ] {
            let error = nested(CredentialSource::Sts, &response(status, body), &shown, UNIX_S)
                .unwrap_err()
                .to_string();
            assert!(error.starts_with(expected), "{error}");
            assert!(!error.contains("eyJ") && !error.contains("hush"), "{error}");
        }
        let error = nested(CredentialSource::Sts, &response(200, "{}"), &shown, UNIX_S).unwrap_err();
        assert_eq!(error.to_string(), "STS: it gave credentials that cannot be read");
    }
}
