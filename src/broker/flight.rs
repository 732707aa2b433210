//! A flight: the one fetch of a key that is under way, and who waits for it.

use super::answer::{Failure, Manner};
use crate::cache::Key;
use crate::kms::retry;
use crate::kms::sign::Credentials;
use crate::time::Mono;
use std::rc::Rc;
use std::time::Duration;

/// Names a client's connection to the server; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientId(pub u64);

/// Numbers flights, in the order in which they began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FlightId(pub(super) u64);

/// A client that waits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader {
    /// Who.
    pub(super) client: ClientId,
    /// How it wants its reply.
    pub(super) manner: Manner,
    /// Asked with `refreshNow`: only KMS's own reply will do.
    pub(super) refresh_now: bool,
}

/// What a flight is doing.
#[derive(Debug)]
pub(super) enum Phase {
    /// Waiting for its turn, for credentials, or for another secret's probe, since the given moment.
    Queued { began: Mono },
    /// The call is out.
    Calling { began: Mono, credentials: Rc<Credentials>, for_refresh: bool },
    /// Pausing after a failure.
    Pausing { until: Mono },
}

/// What a reader with nothing to fall back on is given.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    /// The end of its patience.
    pub(super) until: Mono,
    /// Tries that may still fail.
    pub(super) tries_left: u32,
}

impl Budget {
    /// A fresh one.
    fn from(now: Mono) -> Budget {
        Budget { until: now.after(retry::READER_BUDGET), tries_left: retry::TRIES_MAX }
    }
}

/// One fetch and those it is for.
#[derive(Debug)]
pub(super) struct Flight {
    /// Of what.
    pub(super) key: Key,
    /// Where it stands.
    pub(super) phase: Phase,
    /// Those the running try will answer.
    pub(super) readers: Vec<Reader>,
    /// `refreshNow` readers who came after an ordinary call had begun: its reply may be older than their
    /// wish, so another call follows.
    pub(super) next_round: Vec<Reader>,
    /// Set while somebody waits who has no cached value to fall back on.
    pub(super) budget: Option<Budget>,
    /// Failures in a row.
    pub(super) failures: u32,
    /// The last of them.
    pub(super) last_failure: Option<Rc<Failure>>,
    /// A server's `Retry-After`: no try before this.
    pub(super) not_before: Mono,
    /// Credentials were renewed for it once.
    pub(super) renewed: bool,
    /// The clock was corrected for it once.
    pub(super) clock_corrected: bool,
    /// Goes on behind the scenes after a failure, as long as there is a value to be renewed.
    pub(super) background: bool,
}

impl Flight {
    /// A flight that is ready to go.
    #[must_use]
    pub(super) fn new(key: Key, now: Mono) -> Flight {
        Flight {
            key,
            phase: Phase::Queued { began: now },
            readers: Vec::new(),
            next_round: Vec::new(),
            budget: None,
            failures: 0,
            last_failure: None,
            not_before: Mono::default(),
            renewed: false,
            clock_corrected: false,
            background: false,
        }
    }

    /// The budget of those who wait, begun if there is none: with the try where somebody waits already, for who came
    /// while there was a stale value began to wait with the try at the latest; else now.
    pub(super) fn budget_of_readers(&mut self, now: Mono) -> &mut Budget {
        let began = self.began().filter(|_| !self.readers.is_empty()).unwrap_or(now);
        self.budget.get_or_insert_with(|| Budget::from(began))
    }

    /// When the present try began; `None` in a pause.
    #[must_use]
    pub(super) fn began(&self) -> Option<Mono> {
        match self.phase {
            Phase::Queued { began } | Phase::Calling { began, .. } => Some(began),
            Phase::Pausing { .. } => None,
        }
    }

    /// Whether the call that is out must not answer this reader: it was begun before the reader's wish, and
    /// is not a refresh of the same `pause`.
    #[must_use]
    pub(super) fn is_too_early_for(&self, reader: &Reader, pause: Duration, now: Mono) -> bool {
        let early = match self.phase {
            Phase::Calling { began, for_refresh, .. } => !for_refresh || now.since(began) >= pause,
            Phase::Queued { .. } | Phase::Pausing { .. } => false,
        };
        reader.refresh_now && early
    }

    /// When something is due that no event brings.
    #[must_use]
    pub(super) fn next_deadline(&self, has_stale: bool) -> Mono {
        let phase = match self.phase {
            Phase::Pausing { until } => until,
            Phase::Queued { began } | Phase::Calling { began, .. } => {
                let patient = has_stale && self.readers.iter().any(|reader| !reader.refresh_now);
                if patient { began.after(retry::STALE_PATIENCE) } else { Mono::NEVER }
            }
        };
        phase.min(self.budget.map_or(Mono::NEVER, |budget| budget.until))
    }
}
