//! What the emulator saw: counters and a log of the last requests.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

/// A snapshot of everything counted since the start (or since [`Emulator::reset_counters`]).
///
/// [`Emulator::reset_counters`]: crate::Emulator::reset_counters
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// TCP connections that the KMS port accepted, those closed at once by a [`KmsMode`](crate::KmsMode) included.
    pub kms_accepted: u64,
    /// KMS connections open now.
    pub kms_open: u64,
    /// The most KMS connections that were open at one time.
    pub kms_open_max: u64,
    /// TLS handshakes completed on the KMS port, resumptions included.
    pub tls_handshakes: u64,
    /// TLS handshakes that resumed an earlier session.
    pub tls_resumed: u64,
    /// TLS handshakes that failed: a client that refused the certificate or left.
    pub tls_failed: u64,
    /// Requests KMS received, whatever became of them.
    pub kms_requests: u64,
    /// Requests STS received on the same port, whatever became of them.
    pub sts_requests: u64,
    /// KMS and STS requests by action.
    pub by_action: BTreeMap<String, u64>,
    /// KMS requests by (action, secret as the caller named it).
    pub by_secret: BTreeMap<(String, String), u64>,
    /// Requests whose signature, timestamp, nonce or credentials KMS or STS refused.
    pub signature_failures: u64,
    /// Requests refused with `Rejected.Throttling` by the rate limit (not by an injected fault).
    pub throttled: u64,
    /// Faults that took effect, by [`FaultKind::name`](crate::FaultKind::name).
    pub faults: BTreeMap<&'static str, u64>,
    /// TCP connections that the metadata port accepted.
    pub metadata_accepted: u64,
    /// Requests the metadata service received, whatever became of them.
    pub metadata_requests: u64,
    /// Session tokens given out (`PUT /latest/api/token` that succeeded).
    pub metadata_token_puts: u64,
    /// GETs without a session token, refused ones included.
    pub metadata_plain_gets: u64,
    /// GETs that carried a valid session token.
    pub metadata_hardened_gets: u64,
    /// Successful reads of STS credentials, by role.
    pub credential_reads: BTreeMap<String, u64>,
    /// Signed instance identities given out.
    pub identity_reads: u64,
    /// Reads of the credentials URI that gave good credentials.
    pub credentials_uri_reads: u64,
    /// Instance identities that KMS gave credentials for.
    pub aap_exchanges: u64,
    /// OIDC tokens that STS gave credentials for.
    pub oidc_exchanges: u64,
}

impl Counters {
    /// How often `action` was asked of KMS.
    pub fn action(&self, action: &str) -> u64 {
        self.by_action.get(action).copied().unwrap_or(0)
    }

    /// How often GetSecretValue was asked for `secret`, by the name or ARN that the caller used.
    pub fn gets(&self, secret: &str) -> u64 {
        self.by_secret.get(&("GetSecretValue".to_owned(), secret.to_owned())).copied().unwrap_or(0)
    }

    /// How often faults of this [`FaultKind::name`](crate::FaultKind::name) took effect.
    pub fn fault(&self, name: &str) -> u64 {
        self.faults.get(name).copied().unwrap_or(0)
    }

    /// Successful reads of STS credentials for any role.
    pub fn credential_reads_total(&self) -> u64 {
        self.credential_reads.values().sum()
    }
}

/// Which service a request went to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// KMS over TLS.
    Kms,
    /// STS, on the port of KMS.
    Sts,
    /// The instance metadata service.
    Metadata,
}

/// One request, as the log of the last [`RECORDS_MAX`] keeps it.
#[derive(Debug, Clone)]
pub struct RequestRecord {
    /// Who was asked.
    pub service: Service,
    /// When the whole request had arrived.
    pub arrived: Instant,
    /// When the fate of the request was decided and its reply handed to the connection; `None` while it is
    /// in work, stalled, or given up by the client.
    pub answered: Option<Instant>,
    /// Number of the connection, counted from 1 over both ports.
    pub connection: u64,
    /// KMS and STS: the action. Metadata: method and path.
    pub action: String,
    /// KMS: the secret as the caller named it.
    pub secret: Option<String>,
    /// KMS: access key id the request was signed with, verified or not.
    pub access_key_id: Option<String>,
    /// Status of the reply; `None` when there was none (dropped, stalled).
    pub status: Option<u16>,
    /// KMS or STS error code of the reply.
    pub code: Option<String>,
}

/// The log keeps this many requests; older ones are forgotten.
pub const RECORDS_MAX: usize = 20_000;

/// The log with stable ids, so that an answer finds its request after older ones were dropped.
#[derive(Debug, Default)]
pub(crate) struct RequestLog {
    records: VecDeque<RequestRecord>,
    forgotten: u64,
}

impl RequestLog {
    pub(crate) fn push(&mut self, record: RequestRecord) -> u64 {
        if self.records.len() == RECORDS_MAX {
            self.records.pop_front();
            self.forgotten += 1;
        }
        self.records.push_back(record);
        self.forgotten + self.records.len() as u64 - 1
    }

    pub(crate) fn answered(&mut self, id: u64, status: Option<u16>, code: Option<&str>) {
        let index = id.checked_sub(self.forgotten).and_then(|i| usize::try_from(i).ok());
        if let Some(record) = index.and_then(|i| self.records.get_mut(i)) {
            record.answered = Some(Instant::now());
            record.status = status;
            record.code = code.map(str::to_owned);
        }
    }

    pub(crate) fn snapshot(&self) -> Vec<RequestRecord> {
        self.records.iter().cloned().collect()
    }

    pub(crate) fn clear(&mut self) {
        self.forgotten += self.records.len() as u64;
        self.records.clear();
    }
}
