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
    /// It works.
    pub(super) fn works(&mut self, now: Mono) {
        self.set(true, now);
    }

    /// It does not, for this reason: no secret, nor a secret's name.
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

/// A warning if its limit admits that, else what any other call is (the contract wants one line each). A warning goes to
/// standard error and to the disk at once, and a client with the token may ask for as many names that do not exist as
/// KMS takes calls.
fn log_call(warning: Option<LeftOut>, flight: &Flight, what: &dyn Display, now: Mono) {
    let KeyRef { id, version_id, version_stage } = flight.key();
    let (id, version) = (escape(id), escape(version_id.or(version_stage).unwrap_or_default()));
    let took_ms = now.since(flight.began().unwrap_or(now)).as_millis();
    let level = if warning.is_some() { log::Level::Warn } else { log::Level::Info };
    let left_out = warning.unwrap_or(LeftOut(0));
    log::log!(level, "KMS GetSecretValue \"{id}\" {version}: {what} ({took_ms} ms){left_out}");
}
