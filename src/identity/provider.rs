//! What every way to be someone has in common.

use super::error::IdentityError;
use super::metadata::Metadata;
use super::peer::Peer;
use crate::call::CallError;
use crate::http::response::Response;
use crate::kms::sign::Credentials;
use crate::random::Random;
use crate::time::Now;
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

/// A way to credentials: a conversation of questions and answers, carried by others.
///
/// Pure but for the OIDC token's file. A conversation ends with credentials or with an error; it is begun
/// anew for each renewal.
pub(crate) trait Provider: fmt::Debug {
    /// For the log, after "credentials of": `the instance's RAM role`.
    fn name(&self) -> &'static str;

    /// Begins a conversation.
    /// Errors: when there is not even a question to ask.
    fn begin(&mut self, shared: &mut Shared) -> Result<Next, IdentityError>;

    /// Writes the request of the question asked last, whole. Again for the same question, when its
    /// connection turned out to be dead.
    fn write_request(&self, shared: &Shared, out: &mut Vec<u8>, now: Now, random: &mut Random);

    /// Takes the answer to it.
    /// Errors: when the conversation cannot go on; the message says what to do about it.
    fn on_answer(
        &mut self,
        shared: &mut Shared,
        answer: Result<&Response, &CallError>,
        now: Now,
    ) -> Result<Next, IdentityError>;
}

/// How far a conversation has come.
#[derive(Debug)]
pub(crate) enum Next {
    /// This is to be asked.
    Ask(Peer),
    /// It has come to its end.
    Done(Grant),
}

/// Credentials, and how long they live.
#[derive(Debug)]
pub(crate) struct Grant {
    pub(crate) credentials: Rc<Credentials>,
    /// From the answer on; `None`: for good.
    pub(crate) life: Option<Duration>,
}

/// What the providers share.
#[derive(Debug)]
pub(crate) struct Shared {
    /// The metadata service, and its token.
    pub(crate) metadata: Metadata,
    /// The region, as soon as the metadata service has told it; `None` where nobody needs to ask.
    pub(crate) region: Option<String>,
}
