//! What calls to KMS are made with: credentials, KMS's endpoint, and the time on its clock.

use crate::call::{CALL_LIFE, Call, CallId};
use crate::config::HostPort;
use crate::identity::{Identity, Peer};
use crate::time::{Mono, Now};
use std::rc::Rc;

/// The identity, with its calls, and what else a signed request needs.
#[derive(Debug)]
pub(super) struct Access {
    pub(super) identity: Identity,
    /// The identity's call that is out.
    pub(super) call: Option<CallId>,
    /// `None` where it is not configured, until the metadata service has named the region.
    endpoint: Option<Rc<HostPort>>,
    /// What KMS's clock shows more than ours, in seconds.
    clock_offset_s: i64,
}

impl Access {
    pub(super) fn new(identity: Identity, endpoint: Option<HostPort>) -> Access {
        Access { identity, call: None, endpoint: endpoint.map(Rc::new), clock_offset_s: 0 }
    }

    /// The call that the identity wants to be made next.
    pub(super) fn poll_call(&mut self, now: Mono, id: impl FnOnce() -> CallId) -> Option<Call> {
        let Peer { service, origin } = self.identity.poll(now)?;
        debug_assert!(self.call.is_none(), "the identity asks one thing at a time");
        let id = id();
        self.call = Some(id);
        Some(Call { id, service, origin, deadline: now.after(CALL_LIFE) })
    }

    /// Where KMS is, once that is known.
    pub(super) fn endpoint(&mut self) -> Option<Rc<HostPort>> {
        if let (None, Some(region)) = (&self.endpoint, self.identity.region()) {
            let endpoint = HostPort::kms_in(region);
            log::info!("KMS endpoint: {endpoint}, from the region that the metadata service names");
            self.endpoint = Some(Rc::new(endpoint));
        }
        self.endpoint.clone()
    }

    /// The time on KMS's clock.
    pub(super) fn on_kms_clock(&self, now: Now) -> Now {
        Now { unix_s: now.unix_s.saturating_add(self.clock_offset_s), ..now }
    }

    /// KMS's clock shows `theirs_unix_s`; requests are signed with that from now on.
    pub(super) fn correct_clock(&mut self, theirs_unix_s: i64, now: Now) {
        self.clock_offset_s = theirs_unix_s.saturating_sub(now.unix_s);
        log::warn!(
            "this host's clock is {} that of KMS; the agent signs with KMS's time",
            away(self.clock_offset_s)
        );
    }
}

/// How far a clock is from another that shows `offset_s` more.
fn away(offset_s: i64) -> String {
    let side = if offset_s > 0 { "behind" } else { "ahead of" };
    format!("{} s {side}", offset_s.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_shows_less_is_behind() {
        assert_eq!(away(90), "90 s behind");
        assert_eq!(away(-3600), "3600 s ahead of");
        assert_eq!(away(i64::MIN), "9223372036854775808 s ahead of");
    }
}
