//! A role by OIDC: STS gives credentials for a token that somebody else signed (RRSA on ACK).
#![warn(clippy::indexing_slicing)]

use super::env::{Env, NotConfigured};
use super::error::{CredentialSource, IdentityError};
use super::peer::Peer;
use super::provider::{Next, Provider, Shared};
use super::reply;
use crate::call::{CallError, Service};
use crate::config::{self, HostPort};
use crate::http::percent;
use crate::http::response::Response;
use crate::log::Reason;
use crate::random::Random;
use crate::secret::Secret;
use crate::text::hex;
use crate::time::{Now, rfc_3339};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use zeroize::Zeroizing;

const ROLE_ARN: &str = "ALIBABA_CLOUD_ROLE_ARN";
const PROVIDER_ARN: &str = "ALIBABA_CLOUD_OIDC_PROVIDER_ARN";
const TOKEN_FILE: &str = "ALIBABA_CLOUD_OIDC_TOKEN_FILE";
const SESSION_NAME: &str = "ALIBABA_CLOUD_ROLE_SESSION_NAME";
const STS_ENDPOINT: &str = "ALIBABA_CLOUD_STS_ENDPOINT";
const STS_REGION: &str = "ALIBABA_CLOUD_STS_REGION";
const VPC: &str = "ALIBABA_CLOUD_VPC_ENDPOINT_ENABLED";

/// A larger file is not a token's.
const TOKEN_BYTES_MAX: usize = 16 * 1024;
/// The life asked for, in seconds; a role's own maximum is at least that.
const LIFE_S: u32 = 3600;

/// `AssumeRoleWithOIDC`.
#[derive(Debug)]
pub(crate) struct Oidc {
    role_arn: String,
    provider_arn: String,
    token_file: PathBuf,
    session_name: String,
    /// `None`: to be known with the region.
    sts: Option<Rc<HostPort>>,
    in_vpc: bool,
    /// As it was in the file when the conversation began.
    token: Secret,
}

impl Oidc {
    /// What the variables say, which are those of the official SDKs; `ALIBABA_CLOUD_STS_ENDPOINT` is what ACK
    /// sets beside them in a pod. STS's own region goes before that of KMS: `sts-vpc` is to be reached from
    /// within its region only.
    /// Errors: which variable is missing, or has a value that cannot be one.
    pub(crate) fn find(env: &Env<'_>, kms: &config::KmsSection) -> Result<Oidc, NotConfigured> {
        let [role_arn, provider_arn, token_file] = env.need([ROLE_ARN, PROVIDER_ARN, TOKEN_FILE])?;
        let in_vpc = env.is_true(VPC);
        let wrong =
            |name: &'static str| move |message: String| NotConfigured::Wrong(format!("{name} {message}"));
        let sts = match (env.text(STS_ENDPOINT)?, env.text(STS_REGION)?, kms.region()) {
            (Some(endpoint), ..) => {
                let host = endpoint.strip_prefix("https://").unwrap_or(&endpoint);
                let host = host.strip_suffix('/').unwrap_or(host);
                Some(HostPort::parse(host, config::ENDPOINT_PORT).map_err(wrong(STS_ENDPOINT))?)
            }
            (None, Some(region), _) => {
                let host = sts_in(Some(&region), in_vpc);
                Some(HostPort::parse(&host, config::ENDPOINT_PORT).map_err(wrong(STS_REGION))?)
            }
            (None, None, Some(region)) => Some(at_port(sts_in(Some(region), in_vpc))),
            (None, None, None) => None,
        };
        Ok(Oidc {
            role_arn,
            provider_arn,
            token_file: token_file.into(),
            session_name: env.text(SESSION_NAME)?.unwrap_or_else(|| "kms-agent".to_owned()),
            sts: sts.map(Rc::new),
            in_vpc,
            token: Secret::from(""),
        })
    }

    fn peer(&mut self, region: Option<&str>) -> Peer {
        let in_vpc = self.in_vpc;
        let sts = self.sts.get_or_insert_with(|| Rc::new(at_port(sts_in(region, in_vpc))));
        Peer { service: Service::Sts, origin: Rc::clone(sts) }
    }
}

/// STS's host name, as the official SDKs have it.
fn sts_in(region: Option<&str>, in_vpc: bool) -> String {
    match region {
        Some(region) => format!("sts{}.{region}.aliyuncs.com", if in_vpc { "-vpc" } else { "" }),
        None => "sts.aliyuncs.com".to_owned(),
    }
}

const fn at_port(host: String) -> HostPort {
    HostPort { host, port: config::ENDPOINT_PORT }
}

impl Provider for Oidc {
    fn name(&self) -> &'static str {
        "the OIDC role"
    }

    fn begin(&mut self, shared: &mut Shared) -> Result<Next, IdentityError> {
        self.token = read_token(&self.token_file)
            .map_err(|why| IdentityError::TokenFile(self.token_file.clone(), why))?;
        Ok(Next::Ask(self.peer(shared.region.as_deref())))
    }

    fn write_request(&self, _: &Shared, out: &mut Vec<u8>, now: Now, random: &mut Random) {
        debug_assert!(self.sts.is_some() && self.token.expose_str().is_some(), "a conversation has begun");
        let Some(sts) = &self.sts else { return };
        let timestamp = rfc_3339(now.unix_s).unwrap_or_default();
        let nonce = hex(&random.next_u128().to_be_bytes());
        let life = LIFE_S.to_string();
        let pairs = [
            ("Action", "AssumeRoleWithOIDC"),
            ("Version", "2015-04-01"),
            ("Format", "JSON"),
            ("Timestamp", &timestamp),
            ("SignatureNonce", &nonce),
            ("DurationSeconds", &life),
            ("RoleArn", &self.role_arn),
            ("OIDCProviderArn", &self.provider_arn),
            ("RoleSessionName", &self.session_name),
            ("OIDCToken", self.token.expose_str().unwrap_or_default()),
        ];
        let peer = Peer { service: Service::Sts, origin: Rc::clone(sts) };
        peer.post_form(out, "", &percent::form(&pairs));
    }

    fn on_answer(
        &mut self,
        _: &mut Shared,
        answer: Result<&Response, &CallError>,
        now: Now,
    ) -> Result<Next, IdentityError> {
        let token = std::mem::replace(&mut self.token, Secret::from(""));
        let response = answer.map_err(|error| IdentityError::unreachable(CredentialSource::Sts, error))?;
        reply::nested(CredentialSource::Sts, response, &token, now.unix_s).map(Next::Done)
    }
}

/// The token in a file, without the white space around it; else why there is none.
fn read_token(path: &Path) -> Result<Secret, String> {
    // Never grows: a vector that moves leaves its old bytes behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(TOKEN_BYTES_MAX + 512));
    let mut read = || -> io::Result<()> {
        // Without waiting, should it be a pipe that nobody writes to.
        let file =
            rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?;
        File::from(file).take(TOKEN_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
        Ok(())
    };
    read().map_err(|error| format!("the agent cannot read it: {}", Reason(&error)))?;
    match bytes.trim_ascii() {
        _ if bytes.len() > TOKEN_BYTES_MAX => Err("it is over 16 KiB".to_owned()),
        [] => Err("it is empty".to_owned()),
        token if token.iter().all(u8::is_ascii_graphic) => Ok(Secret::from(token)),
        _ => Err("it holds white space or other characters that a token does not have".to_owned()),
    }
}
