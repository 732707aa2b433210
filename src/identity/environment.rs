//! An access key from the environment.

use super::env::{Env, NotConfigured};
use super::error::IdentityError;
use super::provider::{Grant, Next, Provider, Shared};
use crate::call::CallError;
use crate::http::response::Response;
use crate::kms::sign::Credentials;
use crate::random::Random;
use crate::secret::Secret;
use crate::time::Now;
use std::rc::Rc;

/// What the log calls it.
pub(crate) const NAME: &str = "the access key in the environment";

const ID: &str = "ALIBABA_CLOUD_ACCESS_KEY_ID";
const SECRET: &str = "ALIBABA_CLOUD_ACCESS_KEY_SECRET";
const TOKEN: &str = "ALIBABA_CLOUD_SECURITY_TOKEN";

/// An access key that was in the environment when the agent started. Nobody needs to be asked, and nobody
/// can be asked for another one.
#[derive(Debug)]
pub(crate) struct Environment(Rc<Credentials>);

impl Environment {
    /// The variables' access key.
    /// Errors: which variable is missing, or has a value that cannot be one.
    pub(crate) fn find(env: &Env<'_>) -> Result<Environment, NotConfigured> {
        let ([id, secret], token) = (env.need([ID, SECRET])?, env.text(TOKEN)?);
        for (name, value) in [(ID, Some(&id)), (SECRET, Some(&secret)), (TOKEN, token.as_ref())] {
            // They go into header lines.
            if value.is_some_and(|value| !value.bytes().all(|byte| byte.is_ascii_graphic())) {
                return Err(NotConfigured::Wrong(format!(
                    "{name} holds white space or other characters that an access key does not have"
                )));
            }
        }
        Ok(Environment(Rc::new(Credentials {
            access_key_id: id,
            access_key_secret: Secret::from(secret),
            security_token: token.map(Secret::from),
            expires_unix_s: None,
        })))
    }
}

impl Provider for Environment {
    fn name(&self) -> &'static str {
        NAME
    }

    fn begin(&mut self, _: &mut Shared) -> Result<Next, IdentityError> {
        Ok(Next::Done(Grant { credentials: Rc::clone(&self.0), life: None }))
    }

    // Nothing is ever asked.
    fn write_request(&self, _: &Shared, _: &mut Vec<u8>, _: Now, _: &mut Random) {}

    fn on_answer(
        &mut self,
        shared: &mut Shared,
        _: Result<&Response, &CallError>,
        _: Now,
    ) -> Result<Next, IdentityError> {
        self.begin(shared)
    }
}
