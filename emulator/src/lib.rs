//! A KMS, an STS and an ECS instance metadata service on loopback, for tests, the quickstart and people by hand.
//! Never for production: it keeps secrets in memory in clear and trusts everybody on this host.
//!
//! ```
#![doc = include_str!("../examples/start.rs")]
//! ```
//!
//! Every call blocks; the services run on a thread of their own until the [`Emulator`] is dropped. All knobs
//! work at run time through `&self`. It shares no code with the agent, so that errors cannot cancel out.
//!
//! From the bottom up: `clock`, `random`, `json`, `rsa_key` (values), `faults`, `counters` (what tests set
//! and read), `tls`, `http`, `door` (transport), `credentials`, `identity` (who may sign, and as whom),
//! `kms::{signature, secrets, actions}`, `state` (all of it behind one lock), `sts`, `kms::aap`, `kms`,
//! `metadata` (the services), and [`Emulator`].

mod clock;
mod counters;
mod credentials;
mod door;
mod emulator;
mod faults;
mod http;
mod identity;
mod json;
mod kms;
mod metadata;
mod random;
mod rsa_key;
mod state;
mod sts;
mod tls;

pub use counters::{Counters, RECORDS_MAX, RequestRecord, Service};
pub use credentials::{ExpiredTokenReply, StsCredentials};
pub use emulator::{Emulator, Options};
pub use faults::{
    BadCertificate, CredentialsUriFault, Fault, FaultId, FaultKind, Framing, IdentityFault, KmsMode,
    MetadataFault, MetadataMode, RawReply, Throttle,
};
pub use kms::error::KmsError;
pub use kms::secrets::{NewSecret, SECRET_DATA_BYTES_MAX, Schedule, Secret, SecretType, Version};
pub use kms::signature;

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

/// The first of two futures to end: `Ok` the first, `Err` the second. (`tokio::select!` would cost a
/// procedural macro in everybody's first build.)
async fn race<A, B>(a: impl Future<Output = A>, b: impl Future<Output = B>) -> Result<A, B> {
    let (mut a, mut b) = (pin!(a), pin!(b));
    poll_fn(|cx| match (a.as_mut().poll(cx), ()) {
        (Poll::Ready(value), ()) => Poll::Ready(Ok(value)),
        (Poll::Pending, ()) => b.as_mut().poll(cx).map(Err),
    })
    .await
}
