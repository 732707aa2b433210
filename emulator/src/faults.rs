//! What can go wrong on demand: for a request by secret, and for a whole service.

use std::time::Duration;

/// How a [`RawReply`] is framed on the wire (RFC 9112 section 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// A truthful `Content-Length`.
    ContentLength,
    /// `Transfer-Encoding: chunked` with chunks of this many bytes (at least 1).
    Chunked(usize),
    /// Neither: the body ends where the connection does.
    UntilClose,
    /// A `Content-Length` of this many bytes whatever the body is; the connection is closed after the body.
    FalseLength(u64),
}

/// A reply that replaces or reframes KMS's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawReply {
    /// Status to send; `None`: that of the genuine reply.
    pub status: Option<u16>,
    /// Body to send; `None`: that of the genuine reply.
    pub body: Option<Vec<u8>>,
    /// Further header fields.
    pub headers: Vec<(String, String)>,
    /// How the body is delimited.
    pub framing: Framing,
    /// Statuses of interim responses (100-199) sent first.
    pub interim: Vec<u16>,
}

impl Default for RawReply {
    /// The genuine reply, with a truthful `Content-Length`.
    fn default() -> RawReply {
        RawReply {
            status: None,
            body: None,
            headers: Vec::new(),
            framing: Framing::ContentLength,
            interim: Vec::new(),
        }
    }
}

/// What happens to a KMS request that passed the signature check.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultKind {
    /// The request waits this long, then goes on (to the next fault that matches, or to KMS).
    Delay(Duration),
    /// KMS answers with this error.
    Error {
        /// HTTP status.
        status: u16,
        /// KMS error code.
        code: String,
        /// Text for people.
        message: String,
        /// Further header fields, for example `Retry-After`.
        headers: Vec<(String, String)>,
    },
    /// Another reply, or the genuine one in other framing.
    Reply(RawReply),
    /// Exactly these bytes instead of an HTTP response, then the connection is closed.
    Bytes(Vec<u8>),
    /// The connection is closed before the reply, without a TLS close_notify.
    DropBefore,
    /// The connection is reset (RST) before the reply.
    Reset,
    /// The head and half the body of the genuine reply, then the connection is closed.
    DropAmid,
    /// The whole genuine reply, without `Connection: close`, then the connection is closed.
    DropAfter,
    /// Half of the TLS record that carries the genuine reply, then the connection is closed.
    HalfRecord,
    /// No reply, and the connection stays open.
    Stall,
}

impl FaultKind {
    /// Name under which [`Counters::faults`](crate::Counters::faults) counts it.
    pub fn name(&self) -> &'static str {
        match self {
            FaultKind::Delay(_) => "delay",
            FaultKind::Error { .. } => "error",
            FaultKind::Reply(_) => "reply",
            FaultKind::Bytes(_) => "bytes",
            FaultKind::DropBefore => "drop_before",
            FaultKind::Reset => "reset",
            FaultKind::DropAmid => "drop_amid",
            FaultKind::DropAfter => "drop_after",
            FaultKind::HalfRecord => "half_record",
            FaultKind::Stall => "stall",
        }
    }
}

/// A fault, whom it hits and how often. Build it with [`Fault::new`] or one of the shorthands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What happens.
    pub kind: FaultKind,
    /// Only requests for this secret, by name or by the ARN that ends in it; `None`: every KMS and STS request.
    pub secret: Option<String>,
    /// Only requests for this action, for example `AssumeRoleWithOIDC`; `None`: any.
    pub action: Option<String>,
    /// Only the next so many matching requests; `None`: until it is cleared.
    pub times: Option<u64>,
}

impl Fault {
    /// `kind` for every KMS and STS request until cleared.
    pub fn new(kind: FaultKind) -> Fault {
        Fault { kind, secret: None, action: None, times: None }
    }

    /// A KMS error reply.
    pub fn error(status: u16, code: &str) -> Fault {
        Fault::new(FaultKind::Error {
            status,
            code: code.to_owned(),
            message: "Injected by kms-emulator.".to_owned(),
            headers: Vec::new(),
        })
    }

    /// A pause before the request is worked on.
    pub fn delay(pause: Duration) -> Fault {
        Fault::new(FaultKind::Delay(pause))
    }

    /// Another body under another status.
    pub fn reply(status: u16, body: impl Into<Vec<u8>>) -> Fault {
        Fault::new(FaultKind::Reply(RawReply {
            status: Some(status),
            body: Some(body.into()),
            ..RawReply::default()
        }))
    }

    /// The genuine reply in other framing.
    pub fn framed(framing: Framing) -> Fault {
        Fault::new(FaultKind::Reply(RawReply { framing, ..RawReply::default() }))
    }

    /// Only for the secret of this name.
    #[must_use]
    pub fn for_secret(self, name: &str) -> Fault {
        Fault { secret: Some(name.to_owned()), ..self }
    }

    /// Only for this action.
    #[must_use]
    pub fn for_action(self, action: &str) -> Fault {
        Fault { action: Some(action.to_owned()), ..self }
    }

    /// Only for the next `times` requests that match.
    #[must_use]
    pub fn times(self, times: u64) -> Fault {
        Fault { times: Some(times), ..self }
    }

    /// Adds a header field to an error or a raw reply; other kinds have no head to put it in.
    #[must_use]
    pub fn with_header(mut self, name: &str, value: &str) -> Fault {
        let field = (name.to_owned(), value.to_owned());
        match &mut self.kind {
            FaultKind::Error { headers, .. } => headers.push(field),
            FaultKind::Reply(reply) => reply.headers.push(field),
            _ => {}
        }
        self
    }
}

/// Handle of an injected fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FaultId(u64);

#[derive(Debug)]
struct Armed {
    id: u64,
    fault: Fault,
    hits: u64,
}

/// The faults in force, in the order they were injected.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    armed: Vec<Armed>,
    /// Hits of faults that were used up or cleared, so that a test can still ask.
    past_hits: Vec<(u64, u64)>,
    next_id: u64,
}

/// What the faults in force ask for one request.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    pub(crate) delay: Duration,
    pub(crate) fate: Option<FaultKind>,
    pub(crate) hit: Vec<&'static str>,
}

impl Faults {
    pub(crate) fn inject(&mut self, fault: Fault) -> FaultId {
        let id = self.next_id;
        self.next_id += 1;
        self.armed.push(Armed { id, fault, hits: 0 });
        FaultId(id)
    }

    pub(crate) fn clear(&mut self, id: FaultId) {
        self.retire(|armed| armed.id == id.0);
    }

    pub(crate) fn clear_for(&mut self, secret: &str) {
        self.retire(|armed| armed.fault.secret.as_deref() == Some(secret));
    }

    pub(crate) fn clear_all(&mut self) {
        self.retire(|_| true);
    }

    pub(crate) fn hits(&self, id: FaultId) -> u64 {
        let armed = self.armed.iter().find(|a| a.id == id.0).map(|a| a.hits);
        let past = || self.past_hits.iter().find(|(past, _)| *past == id.0).map(|(_, hits)| *hits);
        armed.or_else(past).unwrap_or(0)
    }

    fn retire(&mut self, done: impl Fn(&Armed) -> bool) {
        for armed in self.armed.iter().filter(|a| done(a)) {
            self.past_hits.push((armed.id, armed.hits));
        }
        self.armed.retain(|a| !done(a));
    }

    /// Takes what applies to a request: all delays up to the first fault that ends it.
    pub(crate) fn take(&mut self, action: &str, secret: Option<&str>) -> Verdict {
        let mut verdict = Verdict::default();
        for armed in &mut self.armed {
            let fault = &armed.fault;
            if fault.times == Some(0)
                || fault.action.as_deref().is_some_and(|wanted| wanted != action)
                || !matches(fault.secret.as_deref(), secret)
            {
                continue;
            }
            armed.hits += 1;
            if let Some(times) = &mut armed.fault.times {
                *times -= 1;
            }
            verdict.hit.push(armed.fault.kind.name());
            match &armed.fault.kind {
                FaultKind::Delay(pause) => verdict.delay += *pause,
                fate => {
                    verdict.fate = Some(fate.clone());
                    break;
                }
            }
        }
        self.retire(|armed| armed.fault.times == Some(0));
        verdict
    }
}

fn matches(wanted: Option<&str>, asked: Option<&str>) -> bool {
    match (wanted, asked) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(wanted), Some(asked)) => {
            asked == wanted || asked.split_once(":secret/").is_some_and(|(_, name)| name == wanted)
        }
    }
}

/// How the KMS port treats connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum KmsMode {
    /// Serves.
    #[default]
    Normal,
    /// Does not listen: connects are refused. The port stays reserved.
    Refuse,
    /// Accepts and closes at once.
    Close,
    /// Accepts and never answers the TLS handshake.
    StallHandshake,
    /// Completes the handshake and never answers a request.
    StallReply,
    /// Presents a certificate that must not be trusted.
    Certificate(BadCertificate),
}

/// What is wrong with the certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum BadCertificate {
    /// Issued by another CA that calls itself the same.
    OtherCa,
    /// Its own issuer.
    SelfSigned,
    /// Right CA, for another host name.
    WrongName,
    /// Right CA and name, expired a day ago.
    Expired,
}

/// Whether the metadata service insists on session tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MetadataMode {
    /// Plain GETs work too.
    #[default]
    Normal,
    /// `HttpTokens=required`: plain GETs are refused with 403.
    Hardened,
}

/// How the metadata service is failing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MetadataFault {
    /// Does not listen: connects are refused. The port stays reserved.
    Refuse,
    /// Accepts and closes at once.
    Close,
    /// Takes requests and never answers.
    Stall,
    /// Answers everything with 500.
    Status500,
    /// Answers everything with 200 and bytes that mean nothing.
    Garbage,
    /// Credentials come with 200 and a `Code` other than `Success`; the rest works.
    NotSuccess,
}

/// What is wrong with the signed instance identity that the metadata service gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum IdentityFault {
    /// There is none: 404, for the plain document too.
    NotFound,
    /// 200 and text that is no base64.
    NotBase64,
    /// Signed under another CA that calls itself the same.
    OtherCa,
    /// The document was changed after it was signed.
    Tampered,
    /// Truly signed, of an instance of another account.
    OtherAccount,
    /// The parameter `audience` is ignored.
    NoAudience,
    /// The identity of the last request once more.
    Repeated,
}

/// How the credentials URI fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum CredentialsUriFault {
    /// 404.
    NotFound,
    /// 500.
    Status500,
    /// 200 with a `Code` other than `Success`.
    NotSuccess,
    /// Credentials whose life is over.
    Expired,
    /// 200 and JSON that breaks off.
    Malformed,
}

/// The rate limit on KMS requests that passed the signature check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Throttle {
    /// Requests a second, all callers together; as many may come in one burst. 0 refuses everything.
    pub qps: u32,
    /// `Retry-After` of a refusal, in seconds.
    pub retry_after_s: Option<u32>,
    /// `x-acs-retry-after` of a refusal, in milliseconds.
    pub acs_retry_after_ms: Option<u32>,
}

impl Throttle {
    /// `qps` without hints when to come back.
    pub fn qps(qps: u32) -> Throttle {
        Throttle { qps, retry_after_s: None, acs_retry_after_ms: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_apply_in_order_and_run_out() {
        let mut faults = Faults::default();
        let slow = faults.inject(Fault::delay(Duration::from_secs(1)));
        let once = faults.inject(Fault::error(500, "InternalFailure").for_secret("a").times(1));
        let rest = faults.inject(Fault::new(FaultKind::Stall).for_secret("a"));

        let other = faults.take("GetSecretValue", Some("b"));
        assert_eq!((other.delay, other.fate), (Duration::from_secs(1), None));
        let first = faults.take("GetSecretValue", Some("acs:kms:cn-hangzhou:1:secret/a"));
        assert!(matches!(first.fate, Some(FaultKind::Error { status: 500, .. })));
        assert_eq!(faults.take("GetSecretValue", Some("a")).fate, Some(FaultKind::Stall));
        assert_eq!((faults.hits(slow), faults.hits(once), faults.hits(rest)), (3, 1, 1));

        faults.clear_for("a");
        assert_eq!(faults.take("GetSecretValue", Some("a")).fate, None);
        faults.clear_all();
        assert_eq!(faults.take("GetSecretValue", None).delay, Duration::ZERO);
        assert_eq!(faults.hits(slow), 4);

        faults.inject(Fault::new(FaultKind::Reset).for_action("CreateSecret"));
        assert_eq!(faults.take("GetSecretValue", None).fate, None);
        assert_eq!(faults.take("CreateSecret", None).fate, Some(FaultKind::Reset));
    }
}
