//! Credentials from whatever `ALIBABA_CLOUD_CREDENTIALS_URI` names: a helper on the host, most often.
#![warn(clippy::indexing_slicing)]

use super::env::{Env, NotConfigured};
use super::error::{CredentialSource, IdentityError, ServiceError};
use super::peer::Peer;
use super::provider::{Next, Provider, Shared};
use super::reply;
use crate::call::{CallError, Service};
use crate::config::HostPort;
use crate::http::response::Response;
use crate::random::Random;
use crate::secret::Secret;
use crate::time::Now;
use std::rc::Rc;

const URI: &str = "ALIBABA_CLOUD_CREDENTIALS_URI";

#[derive(Debug)]
pub(crate) struct CredentialsUri {
    peer: Peer,
    /// Path and query, the latter of which may hold a secret.
    target: Secret,
}

impl CredentialsUri {
    /// What the variable says.
    /// Errors: when it is missing, or not a URI that can be asked. Its value is not shown.
    pub(crate) fn find(env: &Env<'_>) -> Result<CredentialsUri, NotConfigured> {
        let [uri] = env.need([URI])?;
        parse(&uri).ok_or_else(|| {
            NotConfigured::Wrong(format!(
                "{URI} must be http://host[:port]/path or https://.., without a user, a fragment or white space"
            ))
        })
    }
}

fn parse(uri: &str) -> Option<CredentialsUri> {
    let (scheme, rest) = uri.split_once("://")?;
    let tls = match scheme {
        scheme if scheme.eq_ignore_ascii_case("https") => true,
        scheme if scheme.eq_ignore_ascii_case("http") => false,
        _ => return None,
    };
    let service = Service::CredentialsUri { tls };
    let (authority, target) = rest.split_at_checked(rest.find(['/', '?', '#']).unwrap_or(rest.len()))?;
    // A host and a port alone: a user before an @ is not a host's name.
    let origin = Rc::new(HostPort::parse(authority, service.default_port()).ok()?);
    let fits = target.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#');
    let slash = if target.starts_with('/') { "" } else { "/" };
    fits.then(|| CredentialsUri {
        peer: Peer { service, origin },
        target: Secret::from(format!("{slash}{target}")),
    })
}

impl Provider for CredentialsUri {
    fn name(&self) -> &'static str {
        "the credentials URI"
    }

    fn begin(&mut self, _: &mut Shared) -> Result<Next, IdentityError> {
        Ok(Next::Ask(self.peer.clone()))
    }

    fn write_request(&self, _: &Shared, out: &mut Vec<u8>, _: Now, _: &mut Random) {
        for part in [b"GET ", self.target.expose(), b" HTTP/1.1\r\nAccept: application/json\r\n"] {
            out.extend_from_slice(part);
        }
        self.peer.end_head(out);
    }

    fn on_answer(
        &mut self,
        _: &mut Shared,
        answer: Result<&Response, &CallError>,
        now: Now,
    ) -> Result<Next, IdentityError> {
        let asked = || CredentialSource::CredentialsUri(HostPort::clone(&self.peer.origin));
        let error = |problem| IdentityError::Service(asked(), problem);
        let response = answer.map_err(|it| IdentityError::unreachable(asked(), it))?;
        match response.status {
            200 => reply::flat(asked(), &response.body, now.unix_s).map(Next::Done),
            status => Err(error(ServiceError::Status(status))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::Mono;

    #[test]
    fn uris_are_taken_apart_or_refused() {
        for (uri, host, port, tls, target) in [
            ("http://h/c", "h", 80, false, "/c"),
            ("HTTPS://H.example:8443/a/b?t=1&u=%20", "h.example", 8443, true, "/a/b?t=1&u=%20"),
            ("http://127.0.0.1:99", "127.0.0.1", 99, false, "/"),
            ("https://[::1]?x", "::1", 443, true, "/?x"),
        ] {
            let parsed = parse(uri).unwrap();
            let origin = Rc::new(HostPort { host: host.into(), port });
            assert_eq!(parsed.peer, Peer { service: Service::CredentialsUri { tls }, origin }, "{uri}");
            assert_eq!(parsed.target.expose_str(), Some(target));
        }
        for uri in [
            "",
            "h/c",
            "ftp://h/c",
            "http://",
            "http://u:p@h/c",
            "http://h/c#f",
            "http://h/c d",
            "http://h:0/",
        ] {
            assert!(parse(uri).is_none(), "{uri}");
        }
    }

    #[test]
    fn the_request_is_one() {
        let provider = parse("http://h:81/c?t=1").unwrap();
        let shared = Shared {
            metadata: crate::identity::metadata::Metadata::new(
                HostPort { host: "m".into(), port: 80 },
                false,
            ),
            region: None,
        };
        let mut out = Vec::new();
        let now = Now { mono: Mono::default(), unix_s: 0 };
        provider.write_request(&shared, &mut out, now, &mut Random::from_seed(1));
        let request = String::from_utf8(out).unwrap();
        assert!(
            request.starts_with("GET /c?t=1 HTTP/1.1\r\n") && request.contains("\r\nHost: h:81\r\n"),
            "{request}"
        );
        assert!(!format!("{provider:?}").contains("t=1"));
    }
}
