//! Who we are to KMS: credentials that are fetched once, renewed ahead of their end, and kept to it
//! if renewal fails.
//!
//! Pure: [`Identity::poll`] says when something is to be asked, the answers come in by
//! [`Identity::on_answer`].

pub(crate) mod chain;
mod env;
pub(crate) mod environment;
mod error;
pub(crate) mod instance_identity;
pub(crate) mod metadata;
pub(crate) mod oidc;
mod peer;
pub(crate) mod provider;
pub(crate) mod ram_role;
mod reply;
pub(crate) mod uri;

pub(crate) use env::NotConfigured;
pub(crate) use error::{CredentialSource, IdentityError};
pub(crate) use peer::Peer;

use crate::call::CallError;
use crate::config::KmsSection;
use crate::http::response::Response;
use crate::kms::retry;
use crate::kms::sign::Credentials;
use crate::log::LeftOut;
use crate::random::Random;
use crate::time::{Mono, Now};
use chain::Chain;
use provider::{Grant, Next};
use std::ffi::OsString;
use std::rc::Rc;
use std::time::Duration;

/// Failed fetches are repeated with a backoff that grows to this.
const BACKOFF_CAP: Duration = Duration::from_secs(10);
/// Somebody who waits may have a failed fetch repeated sooner, but not sooner than this.
const DEMAND_PAUSE: Duration = Duration::from_secs(1);
/// Renewed this long before their end, or at [`RENEW_AT_PER_CENT`] of their life, whichever is later.
const RENEW_AHEAD: Duration = Duration::from_secs(15 * 60);
const RENEW_AT_PER_CENT: u32 = 80;
/// Trouble that stays the same is told again after this.
const TOLD_AGAIN: Duration = Duration::from_secs(60);

#[derive(Debug)]
enum State {
    /// Nothing under way; the next fetch is due at `at`.
    Resting { at: Mono },
    /// This service is to be asked.
    ToAsk(Peer),
    /// The request is out.
    Asking,
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
pub enum CredentialState<'a> {
    /// Credentials that have not ended.
    Ready(&'a Rc<Credentials>),
    /// A fetch is under way or about to begin.
    Pending,
    /// Not to be had now; another fetch begins at `retry_at` at the latest.
    Failed {
        /// The last fetch's.
        error: &'a IdentityError,
        /// When the next fetch begins.
        retry_at: Mono,
    },
}

/// The credentials and their renewal: one fetch at a time.
#[derive(Debug)]
pub struct Identity {
    chain: Chain,
    held: Option<Held>,
    state: State,
    failures: u32,
    /// When KMS's refusal last set a renewal going, until renewed ones are accepted.
    refused_last: Option<Mono>,
    /// What the clock of those who answer shows more than ours, in seconds. Credentials are judged by it: a
    /// host's clock that is hours ahead does not end them.
    clock_offset_s: i64,
    outcome: Option<Result<(), IdentityError>>,
    trouble: Trouble,
    random: Random,
}

impl Identity {
    /// Whoever configuration and environment say. Begins with a fetch at once, so that the first reader finds
    /// credentials.
    ///
    /// # Errors
    /// When what they say cannot be; the message names key or variable.
    pub fn from_config(
        kms: &KmsSection,
        env: &dyn Fn(&str) -> Option<OsString>,
        random: Random,
    ) -> Result<Identity, NotConfigured> {
        Ok(Identity {
            chain: Chain::from_config(kms, env)?,
            held: None,
            state: State::Resting { at: Mono::default() },
            failures: 0,
            refused_last: None,
            clock_offset_s: 0,
            outcome: None,
            trouble: Trouble::default(),
            random,
        })
    }

    /// The region, if the metadata service had to be asked for it and has answered.
    #[must_use]
    pub fn region(&self) -> Option<&str> {
        self.chain.region()
    }

    /// Who it is, for a status line: `the instance's RAM role`.
    pub(crate) fn name(&self) -> &'static str {
        self.chain.name()
    }

    /// What the fetch under way asks for: `the OIDC role`, or `the region`.
    pub(crate) fn asked_for(&self) -> &'static str {
        self.chain.asked_for()
    }

    /// When the credentials that are held end, seconds since 1970 (UTC); `None`: never, or there are none.
    pub(crate) fn expires_unix_s(&self) -> Option<i64> {
        self.held.as_ref().and_then(|held| held.credentials.expires_unix_s)
    }

    /// What the clock by which the credentials end shows more than ours, in seconds.
    pub(crate) const fn clock_offset_s(&self) -> i64 {
        self.clock_offset_s
    }

    /// Whether credentials are held that have not ended.
    pub(crate) fn is_ready(&self, now: Mono) -> bool {
        self.held.as_ref().is_some_and(|held| now < held.ends)
    }

    /// How the last fetch ended, once after each.
    pub(crate) fn poll_outcome(&mut self) -> Option<Result<(), IdentityError>> {
        self.outcome.take()
    }

    /// What a caller gets. Who finds nothing sets a fetch going, unless one has just failed.
    pub fn credentials(&mut self, now: Mono) -> CredentialState<'_> {
        if self.held.as_ref().is_some_and(|held| now >= held.ends) {
            self.held = None;
        }
        if self.held.is_none() {
            match &self.state {
                State::Failed { failed, at, .. } if now < (*at).min(failed.after(DEMAND_PAUSE)) => {}
                State::Failed { .. } | State::Resting { .. } => self.begin(now),
                State::ToAsk(_) | State::Asking => {}
            }
        }
        match (&self.held, &self.state) {
            (Some(held), _) => CredentialState::Ready(&held.credentials),
            (None, State::Failed { error, at, .. }) => CredentialState::Failed { error, retry_at: *at },
            (None, _) => CredentialState::Pending,
        }
    }

    /// KMS refused these credentials: they are dropped and fetched anew. Those of an earlier life are
    /// ignored, so that a burst of refusals renews once. `false`: there are no others to be had, because they
    /// cannot be renewed, or were for that reason a moment ago and have never worked.
    pub(crate) fn refused(&mut self, refused: &Rc<Credentials>, now: Mono) -> bool {
        if !self.held.as_ref().is_some_and(|held| Rc::ptr_eq(&held.credentials, refused)) {
            return true;
        }
        if refused.expires_unix_s.is_none() {
            let name = self.chain.name();
            self.trouble.tell(format!("KMS refuses {name}; replace it and restart the agent"), now);
            return false;
        }
        if self.refused_last.is_some_and(|last| now < last.after(DEMAND_PAUSE)) {
            return false;
        }
        self.refused_last = Some(now);
        self.held = None;
        if !matches!(self.state, State::ToAsk(_) | State::Asking) {
            self.begin(now);
        }
        true
    }

    /// KMS accepted the credentials it was shown: a later refusal is news.
    pub(crate) fn accepted(&mut self) {
        self.refused_last = None;
    }

    fn begin(&mut self, now: Mono) {
        let outcome = self.chain.begin(now);
        self.go_on(outcome, now);
    }

    /// Whom to ask something now. The request is then written by [`Identity::write_request`] and its outcome
    /// told to [`Identity::on_answer`].
    pub fn poll(&mut self, now: Mono) -> Option<Peer> {
        match &self.state {
            State::Resting { at } | State::Failed { at, .. } if now >= *at => self.begin(now),
            _ => {}
        }
        let State::ToAsk(peer) = &self.state else { return None };
        let peer = peer.clone();
        self.state = State::Asking;
        Some(peer)
    }

    /// When [`Identity::poll`] is next worth calling.
    pub(crate) const fn next_deadline(&self) -> Mono {
        match self.state {
            State::Resting { at } | State::Failed { at, .. } => at,
            State::ToAsk(_) => Mono::from_micros(0),
            State::Asking => Mono::NEVER,
        }
    }

    /// Writes the request that is due, whole. It may hold a token: wipe it after use.
    pub fn write_request(&mut self, out: &mut Vec<u8>, now: Now) {
        let now = self.on_their_clock(now);
        self.chain.write_request(out, now, &mut self.random);
    }

    /// Takes the answer to it.
    pub fn on_answer(&mut self, answer: Result<&Response, &CallError>, now: Now) {
        debug_assert!(matches!(self.state, State::Asking), "an answer to nothing");
        if let Ok(Response { date_unix_s: Some(theirs), .. }) = answer {
            self.clock_offset_s = theirs.saturating_sub(now.unix_s);
        }
        let outcome = self.chain.on_answer(answer, self.on_their_clock(now));
        self.go_on(outcome, now.mono);
    }

    const fn on_their_clock(&self, now: Now) -> Now {
        Now { unix_s: now.unix_s.saturating_add(self.clock_offset_s), ..now }
    }

    fn go_on(&mut self, outcome: Result<Next, IdentityError>, now: Mono) {
        self.state = match outcome {
            Ok(Next::Ask(peer)) => State::ToAsk(peer),
            Ok(Next::Done(Grant { credentials, life })) => {
                self.failures = 0;
                self.outcome = Some(Ok(()));
                self.trouble = Trouble::default();
                let (ends, at) = life.map_or((Mono::NEVER, Mono::NEVER), |life| term(life, now));
                self.held = Some(Held { credentials, ends });
                log::info!("fetched credentials: {}", self.chain.name());
                State::Resting { at }
            }
            Err(error) => {
                self.failures = self.failures.saturating_add(1);
                self.outcome = Some(Err(error.clone()));
                self.trouble.tell(format!("there are no credentials for KMS: {error}"), now);
                let at = now.after(retry::backoff(self.failures, BACKOFF_CAP, &mut self.random));
                State::Failed { error, failed: now, at }
            }
        };
    }
}

/// When credentials with so much life left end, and when they are renewed.
fn term(life: Duration, now: Mono) -> (Mono, Mono) {
    let renew = (life * RENEW_AT_PER_CENT / 100).max(life.saturating_sub(RENEW_AHEAD));
    (now.after(life), now.after(renew))
}

/// Tells of trouble when it changes, and once in a while as long as it does not.
#[derive(Debug, Default)]
struct Trouble {
    told: String,
    at: Mono,
    left_out: u64,
}

impl Trouble {
    fn tell(&mut self, text: String, now: Mono) {
        if text == self.told && now < self.at.after(TOLD_AGAIN) {
            self.left_out = self.left_out.saturating_add(1);
            return;
        }
        let left_out = if text == self.told { self.left_out } else { 0 };
        log::warn!("{text}{}", LeftOut(left_out));
        *self = Trouble { told: text, at: now, left_out: 0 };
    }
}

#[cfg(test)]
mod tests;
