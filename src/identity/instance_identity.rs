//! Instance identity: credentials for what this instance is, by an application access point (AAP) of KMS.
//!
//! **PROVISIONAL.** Alibaba Cloud has published that its agent authenticates like this (the signed identity
//! from the metadata service, `AapArn` names the access point, no RAM role), but not with which call: action,
//! parameters, reply and audience are in no public documentation or SDK. So all up to the signed identity is
//! real, and the exchange for credentials is our guess, alone in this file:
//!
//! ```text
//! POST / of the KMS endpoint, unsigned
//! x-acs-action: AssumeApplicationAccessPoint   x-acs-version: 2016-01-20   x-acs-date   x-acs-signature-nonce
//! AapArn=..&InstanceIdentity=<PKCS#7, base64>          audience = {"aud":"<AapArn>","signingTime":<Unix time>}
//! -> {"Credentials":{"AccessKeyId","AccessKeySecret","SecurityToken","Expiration"},"RequestId"}
//! ```
//!
//! KMS as it is today will refuse it. When the call is known, this file and its twin in the emulator change.
#![warn(clippy::indexing_slicing)]

use super::error::{CredentialSource, IdentityError, ServiceError};
use super::metadata::{malformed, problem};
use super::peer::Peer;
use super::provider::{Next, Provider, Shared};
use super::reply;
use crate::call::{CallError, Service};
use crate::config::{AapArn, HostPort};
use crate::http::percent;
use crate::http::response::Response;
use crate::random::Random;
use crate::secret::Secret;
use crate::text::hex;
use crate::time::{Now, rfc_3339};
use std::rc::Rc;
use zeroize::Zeroizing;

/// Said in the log at start.
pub(crate) const PROVISIONAL: &str = "instance identity is provisional: how KMS exchanges it for credentials is not published, so KMS may \
    refuse it";

/// A longer identity is not one: a document and a chain of certificates are a few KiB.
const IDENTITY_BYTES_MAX: usize = 32 * 1024;

/// This instance, by an access point.
#[derive(Debug)]
pub(crate) struct InstanceIdentity {
    aap: AapArn,
    kms: Rc<HostPort>,
    /// The signed identity: base64 of a PKCS#7. For who holds it, this instance is we.
    identity: Option<Secret>,
}

impl InstanceIdentity {
    /// With this access point, asked at this endpoint.
    pub(crate) fn new(aap: AapArn, kms: HostPort) -> InstanceIdentity {
        InstanceIdentity { aap, kms: Rc::new(kms), identity: None }
    }

    fn exchange(&self) -> Peer {
        Peer { service: Service::Kms, origin: Rc::clone(&self.kms) }
    }
}

impl Provider for InstanceIdentity {
    fn name(&self) -> &'static str {
        "the application access point"
    }

    fn begin(&mut self, shared: &mut Shared) -> Result<Next, IdentityError> {
        self.identity = None;
        Ok(Next::Ask(shared.metadata.peer()))
    }

    fn write_request(&self, shared: &Shared, out: &mut Vec<u8>, now: Now, random: &mut Random) {
        let Some(identity) = self.identity.as_ref().and_then(Secret::expose_str) else {
            // Nothing in an ARN needs JSON's escapes.
            let audience = format!(r#"{{"aud":"{}","signingTime":{}}}"#, self.aap.as_str(), now.unix_s);
            let mut path = "/latest/dynamic/instance-identity/pkcs7?audience=".to_owned();
            percent::encode(&audience, &mut path);
            return shared.metadata.write_request(out, &path);
        };
        let date = rfc_3339(now.unix_s).unwrap_or_default();
        let nonce = hex(&random.next_u128().to_be_bytes());
        let headers = format!(
            "x-acs-action: AssumeApplicationAccessPoint\r\nx-acs-version: 2016-01-20\r\nx-acs-date: {date}\r\n\
             x-acs-signature-nonce: {nonce}\r\n"
        );
        let form = percent::form(&[("AapArn", self.aap.as_str()), ("InstanceIdentity", identity)]);
        self.exchange().post_form(out, &headers, &form);
    }

    fn on_answer(
        &mut self,
        shared: &mut Shared,
        answer: Result<&Response, &CallError>,
        now: Now,
    ) -> Result<Next, IdentityError> {
        if let Some(identity) = self.identity.take() {
            let response =
                answer.map_err(|it| IdentityError::unreachable(CredentialSource::AccessPoint, it))?;
            return reply::nested(CredentialSource::AccessPoint, response, &identity, now.unix_s)
                .map(Next::Done);
        }
        let Some(response) = shared.metadata.on_answer(answer, now.mono)? else {
            return Ok(Next::Ask(shared.metadata.peer()));
        };
        match response.status {
            200 => {}
            404 => return Err(problem(ServiceError::NoSignedIdentity)),
            status => return Err(problem(ServiceError::Status(status))),
        }
        self.identity = Some(base64(&response.body).ok_or_else(|| malformed("a signed identity"))?);
        Ok(Next::Ask(self.exchange()))
    }
}

/// Base64 without its line ends, if it is no more than that.
fn base64(body: &[u8]) -> Option<Secret> {
    if body.len() > IDENTITY_BYTES_MAX {
        return None;
    }
    let mut text = Zeroizing::new(Vec::with_capacity(body.len()));
    text.extend(body.iter().filter(|byte| !byte.is_ascii_whitespace()));
    let is_base64 = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=');
    (!text.is_empty() && text.iter().all(is_base64)).then(|| Secret::from(text.as_slice()))
}
