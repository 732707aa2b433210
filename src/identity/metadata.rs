//! The RAM role's credentials, from the instance metadata service (KMS_PROTOCOL.md 3).
//!
//! Hardened mode first: a token is put and shown with every GET. Where the service does not know
//! tokens, plain GETs follow, unless `ALIBABA_CLOUD_IMDSV1_DISABLED` forbids them.
#![warn(clippy::indexing_slicing)]

use super::IdentityError;
use crate::call::{CallError, CallErrorKind};
use crate::http::response::Response;
use crate::kms::sign::Credentials;
use crate::secret::Secret;
use crate::time::{Mono, Now};
use ::time::OffsetDateTime;
use ::time::format_description::well_known::Rfc3339;
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::io::Write as _;
use std::time::Duration;

/// The life asked for a metadata token, in seconds: the longest that the service grants.
const TOKEN_LIFE_S: u64 = 21_600;
/// A token this close to its end is replaced before it is used.
const TOKEN_MARGIN: Duration = Duration::from_secs(300);
/// A token, role or region longer than this is not one.
const WORD_BYTES_MAX: usize = 512;

/// What the service is asked next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Question {
    Token,
    Region,
    RoleName,
    Credentials,
}

#[derive(Debug)]
enum Access {
    Unknown,
    Hardened { token: Secret, until: Mono },
    Plain,
}

/// What the answers have added up to.
#[derive(Debug)]
pub enum Progress {
    /// There is another question to ask.
    More,
    /// Everything is known; the credentials are fresh.
    Done(Credentials),
}

/// What to find out, and how.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// `RoleName`; asked of the service where it is not set.
    pub role: Option<String>,
    /// Whether the region is wanted too (it is configured otherwise).
    pub region: bool,
    /// `ALIBABA_CLOUD_IMDSV1_DISABLED`: never fall back to plain GETs.
    pub hardened_only: bool,
}

/// One conversation with the metadata service; pure, its requests and answers are carried by others.
#[derive(Debug)]
pub struct Metadata {
    wanted: Wanted,
    access: Access,
    region: Option<String>,
    role: Option<String>,
    asking: Option<Question>,
    /// A refused token is replaced once a conversation.
    token_replaced: bool,
}

impl Metadata {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(wanted: Wanted) -> Metadata {
        let role = wanted.role.clone();
        Metadata { wanted, access: Access::Unknown, region: None, role, asking: None, token_replaced: false }
    }

    /// The region, once it is known.
    #[must_use]
    pub fn region(&self) -> Option<&str> {
        self.region.as_deref()
    }

    /// Begins a conversation anew; what is known of the access is kept, the role is asked again, since
    /// another one may have been attached.
    pub fn begin(&mut self, now: Mono) {
        self.role.clone_from(&self.wanted.role);
        self.token_replaced = false;
        self.asking = None;
        match &self.access {
            Access::Hardened { until, .. } if now.after(TOKEN_MARGIN) < *until => {}
            _ => self.access = Access::Unknown,
        }
    }

    /// Writes the next request, whole.
    pub fn write_request(&mut self, out: &mut Vec<u8>, authority: &str) {
        let question = self.next_question();
        self.asking = Some(question);
        let role = self.role.as_deref().unwrap_or_default();
        let _ = match question {
            Question::Token => write!(
                out,
                "PUT /latest/api/token HTTP/1.1\r\nX-aliyun-ecs-metadata-token-ttl-seconds: {TOKEN_LIFE_S}\r\n\
                 Content-Length: 0\r\n"
            ),
            Question::Region => write!(out, "GET /latest/meta-data/region-id HTTP/1.1\r\n"),
            Question::RoleName => {
                write!(out, "GET /latest/meta-data/ram/security-credentials/ HTTP/1.1\r\n")
            }
            Question::Credentials => {
                write!(out, "GET /latest/meta-data/ram/security-credentials/{role} HTTP/1.1\r\n")
            }
        };
        if let (Access::Hardened { token, .. }, false) = (&self.access, question == Question::Token) {
            out.extend_from_slice(b"X-aliyun-ecs-metadata-token: ");
            out.extend_from_slice(token.expose());
            out.extend_from_slice(b"\r\n");
        }
        let _ =
            write!(out, "Host: {authority}\r\nUser-Agent: kms-agent/{}\r\n\r\n", env!("CARGO_PKG_VERSION"));
    }

    fn next_question(&self) -> Question {
        if matches!(self.access, Access::Unknown) {
            Question::Token
        } else if self.wanted.region && self.region.is_none() {
            Question::Region
        } else if self.role.is_none() {
            Question::RoleName
        } else {
            Question::Credentials
        }
    }

    /// Takes the answer to the request written last.
    ///
    /// # Errors
    /// When the conversation cannot go on; the message says what to do about it.
    pub fn on_answer(
        &mut self,
        answer: Result<&Response, &CallError>,
        now: Now,
    ) -> Result<Progress, IdentityError> {
        let question = self.asking.take().unwrap_or(Question::Token);
        let response = match answer {
            // Something that is there and does not speak tokens: plain GETs may do.
            Err(error) if question == Question::Token && error.kind == CallErrorKind::InvalidResponse => {
                return self.fall_back(&error.message);
            }
            Err(error) => return Err(IdentityError::Unreachable(error.message.clone())),
            Ok(response) => response,
        };
        let status = response.status;
        match question {
            Question::Token if status == 200 => {
                let token = word(&response.body).ok_or_else(|| malformed("token"))?;
                let until = now.mono.after(Duration::from_secs(TOKEN_LIFE_S));
                self.access = Access::Hardened { token: Secret::from(token.as_bytes().to_vec()), until };
                Ok(Progress::More)
            }
            Question::Token => self.fall_back(&format!("its token request was answered {status}")),
            _ if matches!(status, 401 | 403) && !self.token_replaced => {
                // The token ran out early or was made for another instance.
                self.token_replaced = true;
                if matches!(self.access, Access::Plain) {
                    return Err(IdentityError::Refused(status));
                }
                self.access = Access::Unknown;
                Ok(Progress::More)
            }
            _ if matches!(status, 401 | 403) => Err(IdentityError::Refused(status)),
            Question::RoleName | Question::Credentials if status == 404 => {
                Err(IdentityError::NoRole(self.wanted.role.clone()))
            }
            _ if status != 200 => Err(IdentityError::Status(status)),
            Question::Region => {
                let region = word(&response.body).filter(|it| is_region(it));
                self.region = Some(region.ok_or_else(|| malformed("region"))?.to_owned());
                Ok(Progress::More)
            }
            Question::RoleName => {
                let first = std::str::from_utf8(&response.body).ok().and_then(|text| text.lines().next());
                match first.map(str::trim) {
                    None | Some("") => Err(IdentityError::NoRole(None)),
                    Some(name) if is_role_name(name) => {
                        self.role = Some(name.to_owned());
                        Ok(Progress::More)
                    }
                    Some(_) => Err(malformed("role name")),
                }
            }
            Question::Credentials => parse_credentials(&response.body, now.unix_s).map(Progress::Done),
        }
    }

    fn fall_back(&mut self, why: &str) -> Result<Progress, IdentityError> {
        if self.wanted.hardened_only {
            return Err(IdentityError::HardenedOnly(why.to_owned()));
        }
        self.access = Access::Plain;
        Ok(Progress::More)
    }
}

fn malformed(what: &'static str) -> IdentityError {
    IdentityError::Malformed(what)
}

/// One printable ASCII word, trimmed: fit for a header line or a path.
fn word(body: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(body).ok()?.trim();
    let printable = text.bytes().all(|b| b.is_ascii_graphic());
    (printable && !text.is_empty() && text.len() <= WORD_BYTES_MAX).then_some(text)
}

fn is_region(text: &str) -> bool {
    text.len() <= 64 && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

fn is_role_name(text: &str) -> bool {
    // It goes into a path: a dot segment would be another question.
    let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    plain && text.len() <= 64 && !matches!(text, "." | "..")
}

/// The JSON of `/ram/security-credentials/<role>`; anything but `"Code":"Success"` is a failure.
///
/// # Errors
/// When it is not that, or the credentials are past their end.
pub fn parse_credentials(body: &[u8], unix_s: i64) -> Result<Credentials, IdentityError> {
    // Raw values first: only what is needed is copied, and each copy is wiped by its `Secret`.
    let fields: BTreeMap<String, &RawValue> =
        serde_json::from_slice(body).map_err(|_| malformed("credentials"))?;
    let text = |name: &str| fields.get(name).and_then(|raw| serde_json::from_str::<String>(raw.get()).ok());
    match text("Code").as_deref() {
        Some("Success") => {}
        Some(code) => {
            return Err(IdentityError::Code(code.chars().filter(|c| !c.is_control()).take(64).collect()));
        }
        None => return Err(malformed("credentials")),
    }
    // They go into header lines.
    let graphic = |value: &String| !value.is_empty() && value.bytes().all(|b| b.is_ascii_graphic());
    let field = |name: &str| text(name).filter(graphic).ok_or_else(|| malformed("credentials"));
    let secret = |name: &str| field(name).map(|value| Secret::from(value.into_bytes()));
    let (id, key, token) = (field("AccessKeyId")?, secret("AccessKeySecret")?, secret("SecurityToken")?);
    let expires = text("Expiration").and_then(|date| OffsetDateTime::parse(&date, &Rfc3339).ok());
    let expires_unix_s = expires.ok_or_else(|| malformed("expiry"))?.unix_timestamp();
    if expires_unix_s <= unix_s {
        return Err(IdentityError::Expired { ago_s: unix_s - expires_unix_s });
    }
    Ok(Credentials {
        access_key_id: id,
        access_key_secret: key,
        security_token: Some(token),
        expires_unix_s: Some(expires_unix_s),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::response::ResponseParser;

    const NOW: Now = Now { mono: Mono::from_micros(5), unix_s: 1_496_999_000 };
    const GOOD: &str = r#"{"AccessKeyId":"STS.J8X","AccessKeySecret":"9Pjf","Expiration":"2017-06-09T09:17:19Z",
        "SecurityToken":"CA\/IX","LastUpdated":"2017-06-09T03:17:18Z","Code":"Success"}"#;

    fn response(status: u16, body: &str) -> Response {
        let mut parser = ResponseParser::new(10_000);
        let bytes = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        parser.feed(bytes.as_bytes()).unwrap();
        parser.into_response()
    }

    /// Holds a whole conversation: what is asked is looked up in `service` (path, with a token, status, body).
    fn converse(
        metadata: &mut Metadata,
        service: &[(&str, bool, u16, &str)],
    ) -> (Vec<String>, Result<Credentials, IdentityError>) {
        let mut asked = Vec::new();
        metadata.begin(NOW.mono);
        loop {
            let mut out = Vec::new();
            metadata.write_request(&mut out, "100.100.100.200");
            let head = String::from_utf8(out).unwrap();
            let line = head.lines().next().unwrap().strip_suffix(" HTTP/1.1").unwrap();
            let token = head.contains("X-aliyun-ecs-metadata-token: ");
            assert!(head.ends_with("\r\n\r\n") && head.contains("\r\nHost: 100.100.100.200\r\n"), "{head}");
            asked.push(format!("{line}{}", if token { " +token" } else { "" }));
            assert!(asked.len() < 10, "{asked:?}");
            let found = service.iter().find(|(path, needs, ..)| line.ends_with(path) && (token || !needs));
            let (status, body) = found.map_or((403, ""), |(_, _, status, body)| (*status, *body));
            match metadata.on_answer(Ok(&response(status, body)), NOW) {
                Ok(Progress::More) => {}
                Ok(Progress::Done(credentials)) => return (asked, Ok(credentials)),
                Err(error) => return (asked, Err(error)),
            }
        }
    }

    const ROLES: &str = "/security-credentials/";
    const ROLE: &str = "/security-credentials/app";

    #[test]
    fn hardened_mode_is_asked_first_and_its_token_is_kept() {
        let service = [
            ("/token", false, 200, " tok "),
            ("/region-id", true, 200, "cn-hangzhou\n"),
            (ROLES, true, 200, "app\n"),
            (ROLE, true, 200, GOOD),
        ];
        let mut metadata = Metadata::new(Wanted { region: true, ..Wanted::default() });
        let (asked, credentials) = converse(&mut metadata, &service);
        assert_eq!(
            asked,
            [
                "PUT /latest/api/token",
                "GET /latest/meta-data/region-id +token",
                "GET /latest/meta-data/ram/security-credentials/ +token",
                "GET /latest/meta-data/ram/security-credentials/app +token",
            ]
        );
        let credentials = credentials.unwrap();
        assert_eq!(
            (credentials.access_key_id.as_str(), credentials.expires_unix_s),
            ("STS.J8X", Some(1_496_999_839))
        );
        assert!(credentials.security_token.unwrap().ct_eq(b"CA/IX"));
        assert_eq!(metadata.region(), Some("cn-hangzhou"));
        assert_eq!(converse(&mut metadata, &service).0.len(), 2, "neither token nor region are asked again");
    }

    #[test]
    fn plain_where_tokens_are_unknown() {
        let service = [("/token", false, 404, ""), (ROLE, false, 200, GOOD)];
        let role = Some("app".to_owned());
        let mut metadata = Metadata::new(Wanted { role: role.clone(), ..Wanted::default() });
        assert_eq!(
            converse(&mut metadata, &service).0,
            ["PUT /latest/api/token", "GET /latest/meta-data/ram/security-credentials/app"]
        );
        let mut metadata = Metadata::new(Wanted { role, hardened_only: true, ..Wanted::default() });
        assert!(matches!(converse(&mut metadata, &service).1, Err(IdentityError::HardenedOnly(_))));
    }

    #[test]
    fn a_refused_token_is_replaced_once() {
        let mut metadata = Metadata::new(Wanted { role: Some("app".into()), ..Wanted::default() });
        let (asked, result) = converse(&mut metadata, &[("/token", false, 200, "t"), (ROLE, true, 401, "")]);
        assert_eq!(asked.iter().filter(|line| line.starts_with("PUT")).count(), 2);
        assert!(matches!(result, Err(IdentityError::Refused(401))));
    }

    #[test]
    fn failures_say_what_they_are() {
        let cases: [(u16, &str, &str); 9] = [
            (404, "", "NoRole(Some"),
            (500, "", "Status(500)"),
            (200, "", "Malformed"),
            (200, "{}", "Malformed"),
            (200, "[1]", "Malformed"),
            (200, r#"{"Code":"Failed\n"}"#, "Code(\"Failed\")"),
            (200, &GOOD.replace("2017-06-09T09", "2017-06-09T01"), "Expired"),
            (200, &GOOD.replace("9Pjf", "9P\\r\\njf"), "Malformed"),
            (200, &GOOD.replace("\"Expiration\":\"2017", "\"Expiration\":\"x"), "Malformed"),
        ];
        for (status, body, expected) in cases {
            let mut metadata = Metadata::new(Wanted { role: Some("app".into()), ..Wanted::default() });
            let (_, result) =
                converse(&mut metadata, &[("/token", false, 200, "t"), (ROLE, true, status, body)]);
            let error = format!("{:?}", result.unwrap_err());
            assert!(error.starts_with(expected), "{body}: {error}");
        }
    }
}
