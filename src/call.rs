//! What the pure middle asks of the network: a [`Call`], answered by a response or a [`CallError`].

use crate::config::HostPort;
use crate::text::excerpt;
use crate::time::Mono;
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

/// The service that a call is for; decides TLS and the timeouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// KMS, over TLS.
    Kms,
    /// The Security Token Service, over TLS.
    Sts,
    /// The instance metadata service, in plain HTTP.
    Metadata,
    /// What `ALIBABA_CLOUD_CREDENTIALS_URI` names.
    CredentialsUri {
        /// Whether it is an `https` URI.
        tls: bool,
    },
}

/// How long each stage of a call may take.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// Looking the name up.
    pub resolve: Duration,
    /// TCP's handshake, for each address tried.
    pub connect: Duration,
    /// TLS's handshake.
    pub handshake: Duration,
    /// From the request's first byte to the reply's last.
    pub reply: Duration,
}

impl Service {
    /// Whether TLS is spoken with it.
    #[must_use]
    pub const fn uses_tls(self) -> bool {
        matches!(self, Service::Kms | Service::Sts | Service::CredentialsUri { tls: true })
    }

    /// The port that goes without saying in a `Host` header.
    #[must_use]
    pub const fn default_port(self) -> u16 {
        if self.uses_tls() { 443 } else { 80 }
    }

    /// The stage limits; the metadata service is a hop away, and official SDKs give it 1 s.
    #[must_use]
    pub const fn timeouts(self) -> Timeouts {
        let (resolve, connect, handshake, reply) = match self {
            Service::Kms | Service::Sts | Service::CredentialsUri { .. } => (5, 2, 3, 5),
            Service::Metadata => (1, 1, 1, 1),
        };
        Timeouts {
            resolve: Duration::from_secs(resolve),
            connect: Duration::from_secs(connect),
            handshake: Duration::from_secs(handshake),
            reply: Duration::from_secs(reply),
        }
    }
}

/// A call takes no longer than this: all its stages together, a second address included.
pub const CALL_LIFE: Duration = Duration::from_secs(15);

/// Longest message of a failed call, in bytes.
const MESSAGE_BYTES_MAX: usize = 1024;

/// Numbers calls; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CallId(pub u64);

/// One request to be made and answered.
#[derive(Clone, Debug)]
pub struct Call {
    /// Names it when its outcome is reported.
    pub id: CallId,
    /// The service that is called.
    pub service: Service,
    /// The host and port to connect to.
    pub origin: Rc<HostPort>,
    /// When it is given up, whatever stage it is in.
    pub deadline: Mono,
}

/// How a call failed before there was a usable reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallErrorKind {
    /// A stage took too long.
    Timeout,
    /// The name has no address, the connection is refused or breaks, or TLS fails.
    Unreachable,
    /// What came back is no HTTP/1.1 reply, is too large or was cut off.
    InvalidResponse,
}

/// A failed call, in words for the person who reads of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallError {
    /// The kind, which decides how the agent goes on.
    pub kind: CallErrorKind,
    /// What was tried, where, and what came of it: `connect host:443: timed out after 2 s`.
    pub message: String,
    /// The service had been reached: the failure may be this one request's own.
    pub reached: bool,
}

impl CallError {
    fn new(kind: CallErrorKind, message: &str) -> CallError {
        // A certificate's names or a resolver's words may be in it.
        CallError { kind, message: excerpt(message, MESSAGE_BYTES_MAX), reached: false }
    }

    /// The same, after the request was on its way.
    #[must_use]
    pub fn reached(self) -> CallError {
        CallError { reached: true, ..self }
    }

    /// A stage that ran out of time.
    #[must_use]
    pub fn timeout(stage: &str, origin: &HostPort, after: Duration) -> CallError {
        let after = if after.subsec_millis() == 0 {
            format!("{} s", after.as_secs())
        } else {
            format!("{:.1} s", after.as_secs_f64())
        };
        CallError::new(CallErrorKind::Timeout, &format!("{stage} {origin}: timed out after {after}"))
    }

    /// A stage that failed for a reason.
    #[must_use]
    pub fn unreachable(stage: &str, origin: &HostPort, why: impl fmt::Display) -> CallError {
        CallError::new(CallErrorKind::Unreachable, &format!("{stage} {origin}: {why}"))
    }

    /// A reply that cannot be used.
    #[must_use]
    pub fn invalid(origin: &HostPort, why: impl fmt::Display) -> CallError {
        CallError::new(CallErrorKind::InvalidResponse, &format!("reply of {origin}: {why}")).reached()
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}
