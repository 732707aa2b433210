//! Who we are to KMS: credentials that are fetched once, renewed ahead of their end, and kept to it
//! if renewal fails.
//!
//! Pure: [`Identity::poll`] says when something is to be asked, the answers come in by
//! [`Identity::on_answer`].

pub mod metadata;

use crate::call::CallError;
use crate::http::response::Response;
use crate::kms::retry;
use crate::kms::sign::Credentials;
use crate::random::Random;
use crate::time::{Mono, Now};
use metadata::{Metadata, Progress, Wanted};
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

/// Failed fetches are repeated with a backoff that grows to this.
const BACKOFF_CAP: Duration = Duration::from_secs(10);
/// Somebody who waits may have a failed fetch repeated sooner, but not sooner than this.
const DEMAND_PAUSE: Duration = Duration::from_secs(1);
/// Renewed this long before their end, or at [`RENEW_AT_PER_CENT`] of their life, whichever is later.
const RENEW_AHEAD: Duration = Duration::from_secs(15 * 60);
const RENEW_AT_PER_CENT: u32 = 80;

/// Why there are no credentials. The text says what to do on the instance's side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IdentityError {
    /// The configured method is understood and still to come.
    NotInThisVersion(&'static str),
    /// No connection to the metadata service, or no reply in time.
    Unreachable(String),
    /// The instance has no RAM role, or not the one that is configured.
    NoRole(Option<String>),
    /// 401 or 403 although the token was new.
    Refused(u16),
    /// Tokens do not work and plain GETs are forbidden.
    HardenedOnly(String),
    /// An answer that is not what the service is documented to give.
    Malformed(&'static str),
    /// A `Code` other than `Success`.
    Code(String),
    /// Another status.
    Status(u16),
    /// The credentials were past their end when they came.
    Expired {
        /// For how long, in seconds.
        ago_s: i64,
    },
}

impl fmt::Display for IdentityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let IdentityError::NotInThisVersion(method) = self {
            return write!(
                f,
                "[KMS] AuthType: {method} is not in this version, which knows the RAM role alone"
            );
        }
        f.write_str("metadata service: ")?;
        match self {
            IdentityError::NotInThisVersion(_) => Ok(()),
            IdentityError::Unreachable(what) => f.write_str(what),
            IdentityError::NoRole(None) => f.write_str(
                "no RAM role is attached to this instance; attach one that may call kms:GetSecretValue",
            ),
            IdentityError::NoRole(Some(role)) => {
                write!(
                    f,
                    "the RAM role {role} is not attached to this instance; attach it, or correct [KMS] RoleName"
                )
            }
            IdentityError::Refused(status) => {
                write!(f, "it refused our request with {status} although its token is new")
            }
            IdentityError::HardenedOnly(why) => {
                write!(
                    f,
                    "hardened mode failed ({why}) and ALIBABA_CLOUD_IMDSV1_DISABLED forbids plain requests"
                )
            }
            IdentityError::Malformed(what) => write!(f, "it gave a {what} that cannot be read"),
            IdentityError::Code(code) => write!(f, "it has no credentials for the RAM role: {code}"),
            IdentityError::Status(status) => write!(f, "it answered {status}"),
            IdentityError::Expired { ago_s } => {
                write!(f, "it gave credentials that ended {ago_s} s ago; check this host's clock")
            }
        }
    }
}

#[derive(Debug)]
enum State {
    /// Nothing under way; the next fetch is due at `at`.
    Resting { at: Mono },
    /// A question is out, or about to go out.
    Asking { out: bool },
    /// The last fetch failed.
    Failed { error: IdentityError, failed: Mono, at: Mono },
}

#[derive(Debug)]
struct Held {
    credentials: Rc<Credentials>,
    ends: Mono,
}

/// What a caller who needs credentials gets.
#[derive(Debug)]
pub enum Standing<'a> {
    /// Credentials that have not ended.
    Ready(&'a Rc<Credentials>),
    /// Being fetched.
    Pending,
    /// Not to be had now; another fetch begins at `retry_at` at the latest.
    Failed {
        /// Why.
        error: &'a IdentityError,
        /// When the next fetch begins.
        retry_at: Mono,
    },
}

/// The credentials and their renewal: one fetch at a time.
#[derive(Debug)]
pub struct Identity {
    metadata: Metadata,
    held: Option<Held>,
    state: State,
    failures: u32,
    /// When KMS's refusal last set a renewal going, until renewed ones are accepted.
    refused_last: Option<Mono>,
}

impl Identity {
    /// Begins with a fetch at once, so that the first reader finds credentials.
    #[must_use]
    pub fn new(wanted: Wanted) -> Identity {
        Identity {
            metadata: Metadata::new(wanted),
            held: None,
            state: State::Resting { at: Mono::default() },
            failures: 0,
            refused_last: None,
        }
    }

    /// Never has credentials, for this reason.
    #[must_use]
    pub fn unavailable(error: IdentityError) -> Identity {
        let state = State::Failed { error, failed: Mono::NEVER, at: Mono::NEVER };
        Identity { state, ..Identity::new(Wanted::default()) }
    }

    /// The region that the metadata service named.
    #[must_use]
    pub fn region(&self) -> Option<&str> {
        self.metadata.region()
    }

    /// When the credentials that are held end, seconds since 1970 (UTC); `None`: never, or there are none.
    #[must_use]
    pub fn expires_unix_s(&self) -> Option<i64> {
        self.held.as_ref().and_then(|held| held.credentials.expires_unix_s)
    }

    /// What a caller gets. Who finds nothing sets a fetch going, unless one has just failed.
    pub fn standing(&mut self, now: Mono) -> Standing<'_> {
        if self.held.as_ref().is_some_and(|held| now >= held.ends) {
            self.held = None;
        }
        if self.held.is_none() {
            match &self.state {
                State::Failed { failed, at, .. } if now < (*at).min(failed.after(DEMAND_PAUSE)) => {}
                State::Failed { .. } | State::Resting { .. } => self.begin(now),
                State::Asking { .. } => {}
            }
        }
        match (&self.held, &self.state) {
            (Some(held), _) => Standing::Ready(&held.credentials),
            (None, State::Failed { error, at, .. }) => Standing::Failed { error, retry_at: *at },
            (None, _) => Standing::Pending,
        }
    }

    /// KMS refused these credentials: they are dropped and fetched anew. Those of an earlier life are
    /// ignored, so that a burst of refusals renews once. `false`: they were renewed for that reason a moment
    /// ago and have never worked; asking again would only burden the metadata service.
    pub fn refused(&mut self, refused: &Rc<Credentials>, now: Mono) -> bool {
        if !self.held.as_ref().is_some_and(|held| Rc::ptr_eq(&held.credentials, refused)) {
            return true;
        }
        if self.refused_last.is_some_and(|last| now < last.after(DEMAND_PAUSE)) {
            return false;
        }
        self.refused_last = Some(now);
        self.held = None;
        if !matches!(self.state, State::Asking { .. }) {
            self.begin(now);
        }
        true
    }

    /// KMS accepted the credentials it was shown: a later refusal is news.
    pub fn accepted(&mut self) {
        self.refused_last = None;
    }

    fn begin(&mut self, now: Mono) {
        self.metadata.begin(now);
        self.state = State::Asking { out: false };
    }

    /// Whether a question is to be asked now; its request is then taken by [`Identity::write_request`]
    /// and answered by [`Identity::on_answer`].
    pub fn poll(&mut self, now: Mono) -> bool {
        match &self.state {
            State::Resting { at } | State::Failed { at, .. } if now >= *at => self.begin(now),
            _ => {}
        }
        if let State::Asking { out: out @ false } = &mut self.state {
            *out = true;
            return true;
        }
        false
    }

    /// When [`Identity::poll`] is next worth calling.
    #[must_use]
    pub fn next_deadline(&self) -> Mono {
        match self.state {
            State::Resting { at } | State::Failed { at, .. } => at,
            State::Asking { out: false } => Mono::default(),
            State::Asking { out: true } => Mono::NEVER,
        }
    }

    /// Writes the request that is due, whole.
    pub fn write_request(&mut self, out: &mut Vec<u8>, authority: &str) {
        self.metadata.write_request(out, authority);
    }

    /// Takes the answer to it. `Some`: the fetch has ended, well or with the error.
    pub fn on_answer(
        &mut self,
        answer: Result<&Response, &CallError>,
        now: Now,
        random: &mut Random,
    ) -> Option<Result<(), IdentityError>> {
        match self.metadata.on_answer(answer, now) {
            Ok(Progress::More) => {
                self.state = State::Asking { out: false };
                None
            }
            Ok(Progress::Done(credentials)) => {
                self.failures = 0;
                let (ends, renew) = life(&credentials, now);
                self.held = Some(Held { credentials: Rc::new(credentials), ends });
                self.state = State::Resting { at: renew };
                Some(Ok(()))
            }
            Err(error) => {
                self.failures = self.failures.saturating_add(1);
                let at = now.mono.after(retry::backoff(self.failures, BACKOFF_CAP, random));
                self.state = State::Failed { error: error.clone(), failed: now.mono, at };
                Some(Err(error))
            }
        }
    }
}

/// When credentials end, and when they are renewed.
fn life(credentials: &Credentials, now: Now) -> (Mono, Mono) {
    let Some(expires_unix_s) = credentials.expires_unix_s else { return (Mono::NEVER, Mono::NEVER) };
    let life = Duration::from_secs(u64::try_from(expires_unix_s.saturating_sub(now.unix_s)).unwrap_or(0));
    let renew = (life * RENEW_AT_PER_CENT / 100).max(life.saturating_sub(RENEW_AHEAD));
    (now.mono.after(life), now.mono.after(renew))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::response::ResponseParser;

    fn at(seconds: u64) -> Now {
        Now { mono: Mono::from_micros(seconds * 1_000_000), unix_s: i64::try_from(seconds).unwrap() }
    }

    fn identity() -> Identity {
        Identity::new(Wanted { role: Some("app".into()), ..Wanted::default() })
    }

    fn answer(
        identity: &mut Identity,
        now: Now,
        status: u16,
        body: &str,
    ) -> Option<Result<(), IdentityError>> {
        let mut random = Random::from_seed(1);
        let mut parser = ResponseParser::new(10_000);
        let bytes = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        parser.feed(bytes.as_bytes()).unwrap();
        identity.on_answer(Ok(&parser.into_response()), now, &mut random)
    }

    fn fetch(identity: &mut Identity, now: Now, ends: &str) {
        assert!(identity.poll(now.mono));
        identity.write_request(&mut Vec::new(), "h");
        if answer(identity, now, 200, "token").is_none() {
            assert!(identity.poll(now.mono));
        }
        identity.write_request(&mut Vec::new(), "h");
        let body = format!(
            r#"{{"Code":"Success","AccessKeyId":"a","AccessKeySecret":"b","SecurityToken":"c","Expiration":"{ends}"}}"#
        );
        assert_eq!(answer(identity, now, 200, &body), Some(Ok(())));
    }

    #[test]
    fn renewed_at_80_per_cent_or_15_minutes_ahead_whichever_is_later() {
        for (life_s, renew_s) in [(1000, 800), (3600, 2880), (6 * 3600, 6 * 3600 - 900)] {
            let credentials = Credentials {
                access_key_id: String::new(),
                access_key_secret: vec![].into(),
                security_token: None,
                expires_unix_s: Some(100 + life_s),
            };
            let (ends, renew) = life(&credentials, at(100));
            assert_eq!(ends, at(100 + u64::try_from(life_s).unwrap()).mono);
            assert_eq!(renew, at(100 + renew_s).mono);
        }
    }

    #[test]
    fn kept_to_their_end_when_renewal_fails_and_healed_after() {
        let mut identity = identity();
        assert!(matches!(identity.standing(at(0).mono), Standing::Pending));
        fetch(&mut identity, at(0), "1970-01-01T00:16:40Z");
        assert!(matches!(identity.standing(at(1).mono), Standing::Ready(_)));
        assert_eq!(identity.next_deadline(), at(800).mono);

        assert!(!identity.poll(at(799).mono) && identity.poll(at(800).mono));
        assert!(!identity.poll(at(800).mono), "one fetch at a time");
        identity.write_request(&mut Vec::new(), "h");
        assert_eq!(answer(&mut identity, at(800), 500, ""), Some(Err(IdentityError::Status(500))));
        assert!(matches!(identity.standing(at(999).mono), Standing::Ready(_)));
        assert!(identity.next_deadline() <= at(801).mono, "retried soon");
        assert!(
            matches!(identity.standing(at(1000).mono), Standing::Pending),
            "somebody waits: asked at once"
        );

        assert!(identity.poll(at(1000).mono));
        identity.write_request(&mut Vec::new(), "h");
        answer(&mut identity, at(1000), 500, "");
        assert!(matches!(
            identity.standing(at(1000).mono),
            Standing::Failed { error: IdentityError::Status(500), .. }
        ));
        fetch(&mut identity, at(1011), "1970-01-01T10:00:00Z");
        assert!(matches!(identity.standing(at(1011).mono), Standing::Ready(_)));
    }

    #[test]
    fn a_method_that_is_not_there_is_nobody() {
        let mut identity = Identity::unavailable(IdentityError::NotInThisVersion("oidc"));
        assert!(!identity.poll(at(1_000_000).mono));
        let Standing::Failed { error, .. } = identity.standing(at(1_000_000).mono) else { panic!() };
        assert!(error.to_string().contains("oidc is not in this version"));
    }

    #[test]
    fn a_burst_of_refusals_renews_once() {
        let mut identity = identity();
        fetch(&mut identity, at(0), "1970-01-01T10:00:00Z");
        let Standing::Ready(old) = identity.standing(at(1).mono) else { panic!() };
        let old = Rc::clone(old);
        assert!(identity.refused(&old, at(1).mono) && identity.refused(&old, at(1).mono));
        fetch(&mut identity, at(1), "1970-01-01T10:00:00Z");
        assert!(identity.refused(&old, at(2).mono));
        let Standing::Ready(new) = identity.standing(at(1).mono) else { panic!() };
        let new = Rc::clone(new);
        assert!(!identity.refused(&new, at(1).mono), "renewed a moment ago: no use");
        identity.accepted();
        assert!(identity.refused(&new, at(1).mono), "they had worked");
        fetch(&mut identity, at(1), "1970-01-01T10:00:00Z");
        assert!(matches!(identity.standing(at(2).mono), Standing::Ready(_)));
        assert!(!identity.poll(at(2).mono));
    }
}
