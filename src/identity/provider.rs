//! What every way to be someone has in common.

use super::IdentityError;
use super::metadata::Metadata;
use crate::call::{CallError, Service};
use crate::config::HostPort;
use crate::http::response::Response;
use crate::kms::sign::Credentials;
use crate::random::Random;
use crate::time::{Mono, Now};
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

/// A way to credentials: a conversation of questions and answers, carried by others.
///
/// Pure but for the OIDC token's file. A conversation ends with credentials or with an error; it is begun
/// anew for each renewal.
pub trait Provider: fmt::Debug {
    /// For the log, after "credentials of": `the instance's RAM role`.
    fn name(&self) -> &'static str;

    /// Begins a conversation.
    ///
    /// # Errors
    /// When there is not even a question to ask.
    fn begin(&mut self, shared: &mut Shared, now: Mono) -> Result<Progress, IdentityError>;

    /// Writes the request of the question asked last, whole. Again for the same question, when its
    /// connection turned out to be dead.
    fn write_request(&self, shared: &Shared, out: &mut Vec<u8>, now: Now, random: &mut Random);

    /// Takes the answer to it.
    ///
    /// # Errors
    /// When the conversation cannot go on; the message says what to do about it.
    fn on_answer(
        &mut self,
        shared: &mut Shared,
        answer: Result<&Response, &CallError>,
        now: Now,
    ) -> Result<Progress, IdentityError>;
}

/// How far a conversation has come.
#[derive(Debug)]
pub enum Progress {
    /// This is to be asked.
    Ask(Question),
    /// It has come to its end.
    Done(Grant),
}

/// Whom to ask; what, is written by [`Provider::write_request`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// What sort of service.
    pub service: Service,
    /// Where.
    pub origin: Rc<HostPort>,
}

/// Credentials, and how long they live.
#[derive(Debug)]
pub struct Grant {
    /// The credentials.
    pub credentials: Rc<Credentials>,
    /// From the answer on; `None`: for good.
    pub life: Option<Duration>,
}

/// What the providers share.
#[derive(Debug)]
pub struct Shared {
    /// The metadata service, and its token.
    pub metadata: Metadata,
    /// The region, as soon as the metadata service has told it; `None` where nobody needs to ask.
    pub region: Option<String>,
}

/// The end of a request without a body.
pub(super) fn end_head(out: &mut Vec<u8>, origin: &HostPort, service: Service) {
    let host = origin.authority(service.default_port());
    for part in ["Host: ", &host, "\r\nUser-Agent: kms-agent/", env!("CARGO_PKG_VERSION"), "\r\n\r\n"] {
        out.extend_from_slice(part.as_bytes());
    }
}

/// A POST of a form to `/`. `headers`: further lines, each with its line end.
pub(super) fn post_form(out: &mut Vec<u8>, question: &Question, headers: &str, form: &str) {
    let length = form.len().to_string();
    // Once, so that a form with a token in it is not moved, which would leave a copy behind.
    out.reserve(headers.len() + form.len() + 512);
    for part in [
        "POST / HTTP/1.1\r\nAccept: application/json\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: ",
        &length,
        "\r\n",
        headers,
    ] {
        out.extend_from_slice(part.as_bytes());
    }
    end_head(out, &question.origin, question.service);
    out.extend_from_slice(form.as_bytes());
}
