//! The instance's RAM role: its credentials are at the metadata service.
#![warn(clippy::indexing_slicing)]

use super::error::{CredentialSource, IdentityError, ServiceError};
use super::metadata::{malformed, problem};
use super::provider::{Next, Provider, Shared};
use super::reply;
use crate::call::CallError;
use crate::http::response::Response;
use crate::random::Random;
use crate::text::is_role_name;
use crate::time::Now;

const PATH: &str = "/latest/meta-data/ram/security-credentials/";

/// The instance's RAM role.
#[derive(Debug)]
pub(crate) struct RamRole {
    /// `RoleName`.
    wanted: Option<String>,
    /// The role of this conversation. CredentialSource anew in each, since another one may have been attached.
    role: Option<String>,
}

impl RamRole {
    /// With this role, or whichever is attached.
    pub(crate) const fn new(wanted: Option<String>) -> RamRole {
        RamRole { wanted, role: None }
    }
}

impl Provider for RamRole {
    fn name(&self) -> &'static str {
        "the instance's RAM role"
    }

    fn begin(&mut self, shared: &mut Shared) -> Result<Next, IdentityError> {
        self.role.clone_from(&self.wanted);
        Ok(Next::Ask(shared.metadata.peer()))
    }

    fn write_request(&self, shared: &Shared, out: &mut Vec<u8>, _: Now, _: &mut Random) {
        let path = format!("{PATH}{}", self.role.as_deref().unwrap_or_default());
        shared.metadata.write_request(out, &path);
    }

    fn on_answer(
        &mut self,
        shared: &mut Shared,
        answer: Result<&Response, &CallError>,
        now: Now,
    ) -> Result<Next, IdentityError> {
        let Some(response) = shared.metadata.on_answer(answer, now.mono)? else {
            return Ok(Next::Ask(shared.metadata.peer()));
        };
        match response.status {
            200 => {}
            404 => return Err(problem(ServiceError::NoRole(self.wanted.clone()))),
            status => return Err(problem(ServiceError::Status(status))),
        }
        if self.role.is_some() {
            return reply::flat(CredentialSource::Metadata, &response.body, now.unix_s).map(Next::Done);
        }
        let first = std::str::from_utf8(&response.body).ok().and_then(|text| text.lines().next());
        match first.map(str::trim) {
            None | Some("") => Err(problem(ServiceError::NoRole(None))),
            Some(name) if is_role_name(name) => {
                self.role = Some(name.to_owned());
                Ok(Next::Ask(shared.metadata.peer()))
            }
            Some(_) => Err(malformed("a role name")),
        }
    }
}
