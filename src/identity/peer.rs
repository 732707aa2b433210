//! Whom to ask for credentials, and the parts that the requests to all of them share.

use crate::call::Service;
use crate::config::HostPort;
use std::rc::Rc;

/// Whom to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// What sort of service.
    pub service: Service,
    pub(crate) origin: Rc<HostPort>,
}

impl Peer {
    /// The end of a request's head.
    pub(super) fn end_head(&self, out: &mut Vec<u8>) {
        let host = self.origin.authority(self.service.default_port());
        for part in ["Host: ", &host, "\r\nUser-Agent: kms-agent/", env!("CARGO_PKG_VERSION"), "\r\n\r\n"] {
            out.extend_from_slice(part.as_bytes());
        }
    }

    /// A POST of a form to `/`. `headers`: further lines, each with its line end.
    pub(super) fn post_form(&self, out: &mut Vec<u8>, headers: &str, form: &str) {
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
        self.end_head(out);
        out.extend_from_slice(form.as_bytes());
    }
}
