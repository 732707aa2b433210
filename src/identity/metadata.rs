//! Questions to the instance metadata service (`docs/kms-protocol.md`, section 3).
//!
//! Hardened mode first: a token is put and shown with every GET. Where the service does not know
//! tokens, plain GETs follow, unless `ALIBABA_CLOUD_IMDSV1_DISABLED` forbids them.
#![warn(clippy::indexing_slicing)]

use super::error::{CredentialSource, IdentityError, ServiceError};
use super::peer::Peer;
use crate::call::{CallError, Service};
use crate::config::HostPort;
use crate::http::response::Response;
use crate::secret::Secret;
use crate::time::Mono;
use std::rc::Rc;
use std::time::Duration;

/// The life asked for a metadata token, in seconds: the longest that the service grants.
const TOKEN_LIFE_S: u64 = 21_600;
/// A token this close to its end is replaced before it is used.
const TOKEN_MARGIN: Duration = Duration::from_secs(300);
/// A token, role or region longer than this is not one.
const WORD_BYTES_MAX: usize = 512;
const REGION_PATH: &str = "/latest/meta-data/region-id";

#[derive(Debug)]
enum Access {
    /// The next question is for a token, whatever path is wanted.
    Unknown,
    Hardened {
        token: Secret,
        until: Mono,
    },
    Plain,
}

/// The metadata service, seen from here.
#[derive(Debug)]
pub(crate) struct Metadata {
    origin: Rc<HostPort>,
    /// `ALIBABA_CLOUD_IMDSV1_DISABLED`: never fall back to plain GETs.
    hardened_only: bool,
    access: Access,
    /// A refused token is replaced once a conversation.
    token_replaced: bool,
}

impl Metadata {
    /// Nothing is known yet.
    pub(crate) fn new(origin: HostPort, hardened_only: bool) -> Metadata {
        Metadata { origin: Rc::new(origin), hardened_only, access: Access::Unknown, token_replaced: false }
    }

    /// Begins a conversation anew; what is known of the access is kept.
    pub(crate) fn begin(&mut self, now: Mono) {
        self.token_replaced = false;
        match &self.access {
            Access::Hardened { until, .. } if now.after(TOKEN_MARGIN) < *until => {}
            _ => self.access = Access::Unknown,
        }
    }

    pub(crate) fn peer(&self) -> Peer {
        Peer { service: Service::Metadata, origin: Rc::clone(&self.origin) }
    }

    /// Writes the next request on the way to what is at `path`, whole.
    pub(crate) fn write_request(&self, out: &mut Vec<u8>, path: &str) {
        match &self.access {
            Access::Unknown => {
                let life = TOKEN_LIFE_S.to_string();
                for part in [
                    "PUT /latest/api/token HTTP/1.1\r\nX-aliyun-ecs-metadata-token-ttl-seconds: ",
                    &life,
                    "\r\nContent-Length: 0\r\n",
                ] {
                    out.extend_from_slice(part.as_bytes());
                }
            }
            access => {
                for part in ["GET ", path, " HTTP/1.1\r\n"] {
                    out.extend_from_slice(part.as_bytes());
                }
                if let Access::Hardened { token, .. } = access {
                    for part in [b"X-aliyun-ecs-metadata-token: ", token.expose(), b"\r\n"] {
                        out.extend_from_slice(part);
                    }
                }
            }
        }
        self.peer().end_head(out);
    }

    /// Takes the answer. `Some`: the reply to the GET, whatever its status; `None`: ask once more.
    /// Errors: when the service cannot be asked.
    pub(crate) fn on_answer<'a>(
        &mut self,
        answer: Result<&'a Response, &CallError>,
        now: Mono,
    ) -> Result<Option<&'a Response>, IdentityError> {
        let asked_token = matches!(self.access, Access::Unknown);
        let response = match answer {
            // Something that is there and does not speak tokens, or drops what is no GET: plain GETs may do.
            Err(error) if asked_token && error.reached => return self.fall_back(&error.message),
            Err(error) => return Err(IdentityError::unreachable(CredentialSource::Metadata, error)),
            Ok(response) => response,
        };
        match response.status {
            200 if asked_token => {
                let token = word(&response.body).ok_or_else(|| malformed("a token"))?;
                let until = now.after(Duration::from_secs(TOKEN_LIFE_S));
                self.access = Access::Hardened { token: Secret::from(token), until };
                Ok(None)
            }
            status if asked_token => {
                self.fall_back(&format!("it answered {status} to the request for a session token"))
            }
            401 | 403 if matches!(self.access, Access::Hardened { .. }) && !self.token_replaced => {
                // The token ran out early or was made for another instance.
                self.token_replaced = true;
                self.access = Access::Unknown;
                Ok(None)
            }
            status @ (401 | 403) => {
                let hardened = matches!(self.access, Access::Hardened { .. });
                Err(problem(ServiceError::Denied { status, hardened }))
            }
            _ => Ok(Some(response)),
        }
    }

    fn fall_back<'a>(&mut self, why: &str) -> Result<Option<&'a Response>, IdentityError> {
        if self.hardened_only {
            return Err(problem(ServiceError::HardenedOnly(why.to_owned())));
        }
        self.access = Access::Plain;
        Ok(None)
    }

    /// Writes the next request on the way to the region.
    pub(crate) fn write_region_request(&self, out: &mut Vec<u8>) {
        self.write_request(out, REGION_PATH);
    }

    /// Takes the answer. `None`: ask once more.
    /// Errors: when there is no region to be had.
    pub(crate) fn on_region_answer(
        &mut self,
        answer: Result<&Response, &CallError>,
        now: Mono,
    ) -> Result<Option<String>, IdentityError> {
        let Some(response) = self.on_answer(answer, now)? else { return Ok(None) };
        if response.status != 200 {
            return Err(problem(ServiceError::Status(response.status)));
        }
        let region = word(&response.body).filter(|it| is_region(it)).ok_or_else(|| malformed("a region"))?;
        Ok(Some(region.to_owned()))
    }
}

/// An error of the metadata service.
pub(super) const fn problem(problem: ServiceError) -> IdentityError {
    IdentityError::Service(CredentialSource::Metadata, problem)
}

/// The same, where an answer is not what it should be.
pub(super) const fn malformed(what: &'static str) -> IdentityError {
    problem(ServiceError::Malformed(what))
}

/// One printable ASCII word, trimmed: fit for a header line or a path.
fn word(body: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(body).ok()?.trim();
    let printable = text.bytes().all(|b| b.is_ascii_graphic());
    (printable && !text.is_empty() && text.len() <= WORD_BYTES_MAX).then_some(text)
}

fn is_region(text: &str) -> bool {
    text.len() <= 64 && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}
