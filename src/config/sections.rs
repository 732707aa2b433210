//! What a configuration holds, section by section; the defaults are those of
//! `docs/contract.md`, section 2.

use super::values::{AapArn, AuthType, HostPort, METADATA_PORT};
use crate::log::Settings as LogSection;
use std::path::PathBuf;
use std::time::Duration;

/// A whole configuration. The default is what an empty file gives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// `[Server]`: the local HTTP API.
    pub server: ServerSection,
    /// `[Cache]`: the cached secrets.
    pub cache: CacheSection,
    /// `[KMS]`: where the secrets come from, and who asks for them.
    pub kms: KmsSection,
    /// `[Log]`.
    pub log: LogSection,
}

/// The `[Server]` section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerSection {
    /// `HttpPort`: on loopback; 0: any free port.
    pub http_port: u16,
    /// `SSRFHeaders`: headers that may carry the token, as written. RFC 9110 tokens, 1 to 8, none twice
    /// in whatever case, none that HTTP or the gates use themselves.
    pub ssrf_headers: Vec<String>,
    /// `SSRFEnvVariables`: environment variables, of which the first one set is the token or
    /// `file:///path`. None: always the token file.
    pub ssrf_env_variables: Vec<String>,
    /// `PathPrefix`: begins and ends with `/` (and may be no more than that); nothing in it needs
    /// percent-encoding.
    pub path_prefix: String,
    /// `MaxConn`: connections served at a time.
    pub max_conn: usize,
    /// `ResponseType`: whose replies the agent's look like.
    pub response_type: ResponseType,
    /// `IgnoreTransientErrors`: serve an expired value while KMS is failing transiently.
    pub ignore_transient_errors: bool,
    /// `AllowedHosts`: accepted in `Host` beside the loopback names. Host names in lower case or IP
    /// addresses, without port; IPv6 without brackets, in its canonical form (RFC 5952).
    pub allowed_hosts: Vec<String>,
}

impl Default for ServerSection {
    fn default() -> ServerSection {
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        ServerSection {
            http_port: 2025,
            ssrf_headers: owned(&["X-KMS-Token", "X-Vault-Token"]),
            ssrf_env_variables: owned(&[
                "KMS_TOKEN",
                "KMS_SESSION_TOKEN",
                "KMS_CONTAINER_AUTHORIZATION_TOKEN",
            ]),
            path_prefix: "/v1/".to_owned(),
            max_conn: 800,
            response_type: ResponseType::Kms,
            ignore_transient_errors: true,
            allowed_hosts: Vec::new(),
        }
    }
}

/// `ResponseType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseType {
    /// 0: KMS's own reply.
    Kms,
    /// 1: as the AWS Secrets Manager Agent.
    Aws,
    /// 2: as the key-value engines of HashiCorp Vault.
    Vault,
}

/// The `[Cache]` section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheSection {
    /// `CacheSize`: most entries.
    pub size: usize,
    /// `CacheBytes`: most bytes of all values together.
    pub bytes: usize,
    /// `TTLSeconds`: how long a value is fresh; zero: nothing is cached.
    pub ttl: Duration,
    /// `MaxStaleSeconds`: how long past that it may still be served with `IgnoreTransientErrors`.
    pub max_stale: Duration,
}

impl Default for CacheSection {
    fn default() -> CacheSection {
        CacheSection {
            size: 1000,
            bytes: 16 * 1024 * 1024,
            ttl: Duration::from_secs(300),
            max_stale: Duration::from_secs(86_400),
        }
    }
}

/// The `[KMS]` section. In it an empty string is as good as no key, except for `AuthType` and
/// `MetadataEndpoint`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KmsSection {
    /// `Region`, as written; [`KmsSection::region`] knows more.
    pub region: Option<String>,
    /// `Endpoint`, as written; [`KmsSection::endpoint`] knows more.
    pub endpoint: Option<HostPort>,
    /// `AuthType`: who the agent is to KMS.
    pub auth_type: AuthType,
    /// `RoleName`: the instance's RAM role; `None`: the environment or the metadata service knows.
    pub role_name: Option<String>,
    /// `AapArn`: an application access point, in the region that `Region` names, if it does. Always there with
    /// [`AuthType::InstanceIdentity`].
    pub aap_arn: Option<AapArn>,
    /// `CaFile`: PEM with certificates to be trusted beside the web's roots. As written: a relative path
    /// is relative to the working directory.
    pub ca_file: Option<PathBuf>,
    /// `MetadataEndpoint`: spoken to in plain HTTP.
    pub metadata_endpoint: HostPort,
}

impl Default for KmsSection {
    fn default() -> KmsSection {
        KmsSection {
            region: None,
            endpoint: None,
            auth_type: AuthType::Auto,
            role_name: None,
            aap_arn: None,
            ca_file: None,
            metadata_endpoint: HostPort { host: "100.100.100.200".to_owned(), port: METADATA_PORT },
        }
    }
}

impl KmsSection {
    /// The region: `Region`, else that of `AapArn`; `None`: the metadata service knows.
    pub(crate) fn region(&self) -> Option<&str> {
        self.region.as_deref().or(self.aap_arn.as_ref().map(|aap| aap.region.as_str()))
    }

    /// Where KMS is: `Endpoint`, else the region's VPC endpoint; `None`: the region is still to be asked.
    pub(crate) fn endpoint(&self) -> Option<HostPort> {
        self.endpoint.clone().or_else(|| self.region().map(HostPort::kms_in))
    }
}
