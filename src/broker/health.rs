//! How the process, KMS and the credentials do, as the log and `/status` tell it.

use super::flights::Flight;
use crate::cache::KeyRef;
use crate::call::{CallError, CallErrorKind};
use crate::identity::{Identity, IdentityError};
use crate::kms::reply::Reply;
use crate::log::{LeftOut, RateLimit, escape};
use crate::metrics::CallResult;
use crate::time::{Mono, Now};
use std::fmt::Display;

/// Warnings of calls to KMS a second, and at once.
const WARNINGS: (u32, u32) = (5, 20);

/// Whether something works, since when, and what failed last.
#[derive(Debug, Default)]
pub(super) struct Condition {
    /// `None`: not tried yet.
    pub(super) state: Option<(bool, Mono)>,
    pub(super) last_error: Option<String>,
}

impl Condition {
    pub(super) fn works(&mut self, now: Mono) {
        self.set(true, now);
    }

    /// It does not work. The reason is shown: it must hold no secret, nor a secret's name.
    pub(super) fn fails(&mut self, why: impl Display, now: Mono) {
        self.set(false, now);
        self.last_error = Some(why.to_string());
    }

    /// Whether it works, as far as is known.
    pub(super) fn is_well(&self) -> bool {
        self.state.is_some_and(|(ok, _)| ok)
    }

    fn set(&mut self, ok: bool, now: Mono) {
        if self.state.is_none_or(|(was, _)| was != ok) {
            self.state = Some((ok, now));
        }
    }
}

/// What is known of process, KMS and credentials.
#[derive(Debug)]
pub(super) struct Health {
    pub(super) pid: u32,
    pub(super) started: Now,
    pub(super) kms: Condition,
    pub(super) credentials: Condition,
    /// When the credentials fetched last end.
    pub(super) credentials_expire_unix_s: Option<i64>,
    /// Warnings of what KMS refused. Clients can provoke that: it must not hide anything that goes wrong.
    refusals: RateLimit,
    /// Warnings of all else that went wrong.
    failures: RateLimit,
}

impl Health {
    pub(super) fn new() -> Health {
        Health {
            pid: 0,
            started: Now::default(),
            kms: Condition::default(),
            credentials: Condition::default(),
            credentials_expire_unix_s: None,
            refusals: RateLimit::new(WARNINGS.0, WARNINGS.1),
            failures: RateLimit::new(WARNINGS.0, WARNINGS.1),
        }
    }

    /// Logs a reply, and notes what it says of KMS and the credentials: nothing of the secret.
    pub(super) fn on_reply(&mut self, flight: &Flight, reply: &Reply, now: Mono) -> CallResult {
        if matches!(reply, Reply::Value(_) | Reply::Refused(_)) {
            self.kms.works(now);
            self.credentials.works(now);
        }
        let (result, failing, error) = match reply {
            Reply::Value(_) => {
                log_call(None, flight, &200, now);
                return CallResult::Ok;
            }
            Reply::Refused(error) => {
                log_call(self.refusals.admit(now), flight, error, now);
                return CallResult::Refused;
            }
            Reply::Invalid(what) => {
                self.kms.fails(what, now);
                log_call(self.failures.admit(now), flight, what, now);
                return CallResult::Invalid;
            }
            Reply::Transient { error, .. } => (CallResult::Failed, &mut self.kms, error),
            Reply::Throttled { error, .. } => (CallResult::Throttled, &mut self.kms, error),
            Reply::ClockSkew { error, .. } => (CallResult::ClockSkew, &mut self.kms, error),
            Reply::CredentialsRefused(error) => {
                (CallResult::CredentialsRefused, &mut self.credentials, error)
            }
            Reply::SignatureRefused(error) => (CallResult::SignatureRefused, &mut self.credentials, error),
        };
        failing.fails(format_args!("KMS answered {} {}", error.status, error.code), now);
        log_call(self.failures.admit(now), flight, error, now);
        result
    }

    /// The same for a call that brought no reply.
    pub(super) fn on_call_error(&mut self, flight: &Flight, error: &CallError, now: Mono) -> CallResult {
        self.kms.fails(error, now);
        log_call(self.failures.admit(now), flight, error, now);
        match error.kind {
            CallErrorKind::Timeout => CallResult::Timeout,
            CallErrorKind::Unreachable => CallResult::Unreachable,
            CallErrorKind::InvalidResponse => CallResult::Invalid,
        }
    }

    /// Notes how a fetch of credentials ended.
    pub(super) fn on_credentials(
        &mut self,
        fetch: Result<(), IdentityError>,
        identity: &Identity,
        now: Mono,
    ) {
        match fetch {
            Ok(()) => {
                self.credentials_expire_unix_s = identity.expires_unix_s();
                self.credentials.works(now);
            }
            Err(error) if identity.is_ready(now) && self.credentials.is_well() => {
                // There are others, which still work.
                self.credentials.last_error = Some(error.to_string());
            }
            Err(error) => self.credentials.fails(error, now),
        }
    }
}

/// A warning if its limit admits that, else what any other call is (`docs/contract.md`, section 6, wants one line
/// each). A warning goes to standard error and to the disk at once, and a client with the token may ask for as many
/// names that do not exist as KMS takes calls.
fn log_call(warning: Option<LeftOut>, flight: &Flight, what: &dyn Display, now: Mono) {
    let KeyRef { id, version_id, version_stage } = flight.key();
    let (id, version) = (escape(id), escape(version_id.or(version_stage).unwrap_or_default()));
    let took_ms = now.since(flight.began().unwrap_or(now)).as_millis();
    let level = if warning.is_some() { log::Level::Warn } else { log::Level::Info };
    let left_out = warning.unwrap_or(LeftOut(0));
    log::log!(level, "KMS GetSecretValue \"{id}\" {version}: {what} ({took_ms} ms){left_out}");
}

#[cfg(test)]
mod tests {
    use super::super::flights::Flights;
    use super::*;
    use crate::config::{Config, HostPort};
    use crate::kms::reply::{KmsError, Value};
    use crate::random::Random;
    use std::time::Duration;
    use zeroize::Zeroizing;

    const NOW: Mono = Mono::from_micros(1_000_000);

    fn error() -> KmsError {
        KmsError { status: 418, code: "Teapot".into(), message: "of db".into(), request_id: "r".into() }
    }

    /// What a call that came to this counts as, and the last errors of KMS and of the credentials.
    fn after(
        note: impl FnOnce(&mut Health, &Flight) -> CallResult,
    ) -> (CallResult, [(Option<bool>, String); 2]) {
        let (mut health, mut flights) = (Health::new(), Flights::default());
        let id = flights.begin(KeyRef::current("db").to_owned(), true, NOW).unwrap();
        let result = note(&mut health, flights.get(id).unwrap());
        let seen = |it: Condition| (it.state.map(|(ok, _)| ok), it.last_error.unwrap_or_default());
        (result, [health.kms, health.credentials].map(seen))
    }

    #[test]
    fn what_replies_say_of_kms_and_of_the_credentials() {
        let well = || (Some(true), String::new());
        let unknown = || (None, String::new());
        let failing = || (Some(false), "KMS answered 418 Teapot".to_owned());
        let value = Value { body: Zeroizing::new(Vec::new()), next_rotation_unix_s: None };
        for (reply, result, kms, credentials) in [
            (Reply::Value(value), CallResult::Ok, well(), well()),
            (Reply::Refused(error()), CallResult::Refused, well(), well()),
            (
                Reply::Transient { error: error(), retry_after_s: None },
                CallResult::Failed,
                failing(),
                unknown(),
            ),
            (
                Reply::Throttled { error: error(), retry_after_s: None },
                CallResult::Throttled,
                failing(),
                unknown(),
            ),
            (
                Reply::ClockSkew { error: error(), server_unix_s: None },
                CallResult::ClockSkew,
                failing(),
                unknown(),
            ),
            (Reply::CredentialsRefused(error()), CallResult::CredentialsRefused, unknown(), failing()),
            (Reply::SignatureRefused(error()), CallResult::SignatureRefused, unknown(), failing()),
            (Reply::Invalid("x".into()), CallResult::Invalid, (Some(false), "x".into()), unknown()),
        ] {
            let got = after(|health, flight| health.on_reply(flight, &reply, NOW));
            assert_eq!(got, (result, [kms, credentials]), "{reply:?}");
        }
    }

    #[test]
    fn what_calls_without_a_reply_count_as() {
        let origin = HostPort { host: "kms.test".into(), port: 443 };
        for (error, result) in [
            (CallError::timeout("connect", &origin, Duration::from_secs(2)), CallResult::Timeout),
            (CallError::unreachable("connect", &origin, "refused"), CallResult::Unreachable),
            (CallError::invalid(&origin, "cut off"), CallResult::Invalid),
        ] {
            let (got, [kms, credentials]) = after(|health, flight| health.on_call_error(flight, &error, NOW));
            assert_eq!((got, kms), (result, (Some(false), error.message)));
            assert_eq!(credentials.0, None);
        }
    }

    #[test]
    fn what_kms_refuses_hides_nothing_of_what_goes_wrong() {
        let (mut health, mut flights) = (Health::new(), Flights::default());
        let id = flights.begin(KeyRef::current("db").to_owned(), true, NOW).unwrap();
        for _ in 0..30 {
            health.on_reply(flights.get(id).unwrap(), &Reply::Refused(error()), NOW);
        }
        assert_eq!(health.refusals.admit(NOW), None, "at most 20 at once");
        assert_eq!(health.failures.admit(NOW), Some(LeftOut(0)));
        for _ in 0..30 {
            health.on_reply(flights.get(id).unwrap(), &Reply::Invalid(String::new()), NOW);
        }
        assert_eq!(health.failures.admit(NOW), None);
    }

    #[test]
    fn a_failed_fetch_is_a_failure_where_there_are_no_credentials() {
        let mut kms = Config::default().kms;
        kms.role_name = Some("app".into());
        let identity = Identity::from_config(&kms, &|_| None, Random::from_seed(7)).unwrap();
        assert!(!identity.is_ready(NOW));
        let (mut health, failed) = (Health::new(), || Err(IdentityError::Everyone(Vec::new())));
        health.on_credentials(Ok(()), &identity, NOW);
        assert!(health.credentials.is_well() && health.credentials.last_error.is_none());
        health.on_credentials(failed(), &identity, NOW);
        assert!(!health.credentials.is_well(), "none are left");
        assert!(health.credentials.last_error.is_some());
    }
}
