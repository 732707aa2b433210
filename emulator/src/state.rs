//! Everything that can change, behind one lock, and the condition variable that tells tests of it.

use crate::clock::Clock;
use crate::counters::{Counters, RequestLog};
use crate::credentials::Credentials;
use crate::faults::{
    CredentialsUriFault, Faults, IdentityFault, KmsMode, MetadataFault, MetadataMode, Throttle,
};
use crate::identity::Identities;
use crate::kms::secrets::Store;
use crate::sts::Oidc;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// How long a nonce is remembered: twice the clock skew, past which the timestamp refuses a replay anyway.
const NONCE_LIFE: Duration = Duration::from_secs(2 * 15 * 60);

pub(crate) struct State {
    pub(crate) clock: Clock,
    pub(crate) store: Store,
    pub(crate) credentials: Credentials,
    pub(crate) faults: Faults,
    pub(crate) counters: Counters,
    pub(crate) log: RequestLog,
    pub(crate) nonces: Nonces,
    pub(crate) limiter: Option<Limiter>,
    pub(crate) latency: Duration,
    pub(crate) kms_mode: KmsMode,
    /// Connections that `kms_mode` still applies to; `None`: all until it is changed.
    pub(crate) kms_mode_left: Option<u64>,
    pub(crate) metadata_mode: MetadataMode,
    pub(crate) metadata_fault: Option<MetadataFault>,
    pub(crate) metadata_latency: Duration,
    /// Session tokens of the metadata service and when they end.
    pub(crate) session_tokens: BTreeMap<String, i64>,
    pub(crate) role: Option<String>,
    pub(crate) region: String,
    pub(crate) account: String,
    pub(crate) connections: u64,
    pub(crate) identities: Identities,
    pub(crate) identity_fault: Option<IdentityFault>,
    /// Names of the application access points.
    pub(crate) aaps: BTreeSet<String>,
    pub(crate) oidc: Oidc,
    pub(crate) credentials_uri_fault: Option<CredentialsUriFault>,
}

impl State {
    /// Brings the secrets up to the present and gives the time they go by.
    pub(crate) fn tick(&mut self) -> i64 {
        let now = self.clock.life();
        self.store.tick(now);
        now
    }

    /// Numbers the connections of both ports.
    pub(crate) fn next_connection(&mut self) -> u64 {
        self.connections += 1;
        self.connections
    }

    /// The mode for a connection just accepted.
    pub(crate) fn take_kms_mode(&mut self) -> KmsMode {
        let mode = self.kms_mode;
        if let Some(left) = &mut self.kms_mode_left {
            *left = left.saturating_sub(1);
            if *left == 0 {
                self.kms_mode_left = None;
                self.kms_mode = KmsMode::Normal;
            }
        }
        mode
    }
}

/// Nonces of requests that verified, and of those that need no signature.
#[derive(Debug, Default)]
pub(crate) struct Nonces {
    seen: BTreeSet<(String, String)>,
    by_age: VecDeque<(Instant, (String, String))>,
}

impl Nonces {
    /// False when this access key (empty: nobody's) used the nonce before.
    pub(crate) fn fresh(&mut self, access_key_id: &str, nonce: &str) -> bool {
        while let Some((at, oldest)) = self.by_age.front() {
            if at.elapsed() < NONCE_LIFE {
                break;
            }
            self.seen.remove(oldest);
            self.by_age.pop_front();
        }
        let key = (access_key_id.to_owned(), nonce.to_owned());
        if !self.seen.insert(key.clone()) {
            return false;
        }
        self.by_age.push_back((Instant::now(), key));
        true
    }
}

/// A token bucket that holds one second's worth.
#[derive(Debug)]
pub(crate) struct Limiter {
    pub(crate) throttle: Throttle,
    tokens: f64,
    filled: Instant,
}

impl Limiter {
    pub(crate) fn new(throttle: Throttle) -> Limiter {
        Limiter { throttle, tokens: f64::from(throttle.qps), filled: Instant::now() }
    }

    pub(crate) fn admit(&mut self) -> bool {
        let now = Instant::now();
        let qps = f64::from(self.throttle.qps);
        let gained = now.duration_since(self.filled).as_secs_f64() * qps;
        (self.tokens, self.filled) = ((self.tokens + gained).min(qps), now);
        let admitted = self.tokens >= 1.0;
        if admitted {
            self.tokens -= 1.0;
        }
        admitted
    }
}

pub(crate) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// A new value ends all open connections of the service.
    pub(crate) end_kms: watch::Sender<()>,
    pub(crate) end_metadata: watch::Sender<()>,
}

impl Shared {
    pub(crate) fn new(state: State) -> Shared {
        Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            end_kms: watch::Sender::new(()),
            end_metadata: watch::Sender::new(()),
        }
    }

    /// The state. Whoever waits in [`Shared::wait_for`] looks again when the guard goes.
    pub(crate) fn lock(&self) -> Guard<'_> {
        // A poisoned lock: a test thread panicked in a closure of its own; the state itself is whole.
        Guard { state: self.state.lock().unwrap_or_else(PoisonError::into_inner), changed: &self.changed }
    }

    pub(crate) fn wait_for(&self, timeout: Duration, met: impl Fn(&Counters) -> bool) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(state, timeout, |state| !met(&state.counters));
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

pub(crate) struct Guard<'a> {
    state: MutexGuard<'a, State>,
    changed: &'a Condvar,
}

impl Deref for Guard<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Guard<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.changed.notify_all();
    }
}
