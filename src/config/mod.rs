//! The configuration file: TOML in, a [`Config`] out.
//!
//! [`parse`] is pure and reports every [`Problem`] of a file, each with its line. Sections, keys,
//! defaults and ranges are those of the agent's contract, section 2; the ranges are constants here.
//! Key names are case-sensitive, every key is optional, unknown ones are problems.

mod reader;
mod values;

use std::fmt::{self, Display};
use std::fs::File;
use std::io::{self, Read};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::DeTable;

use crate::log::{BACKUP_FILES_MAX, Reason};
pub use crate::log::{LogPath, Settings as Log};
use crate::text::is_name_byte;
use reader::{Case, Reader};
use values::*;

/// Bytes of a configuration file that [`load`] reads.
pub const FILE_BYTES_MAX: u64 = 64 * 1024;
/// Header names in `SSRFHeaders`.
pub const SSRF_HEADERS: RangeInclusive<usize> = 1..=8;
/// Bytes of a header name in `SSRFHeaders`.
pub const HEADER_NAME_BYTES_MAX: usize = 128;
/// Names in `SSRFEnvVariables`.
pub const SSRF_ENV_VARIABLES: RangeInclusive<usize> = 0..=16;
/// Bytes of a name in `SSRFEnvVariables`.
pub const ENV_NAME_BYTES_MAX: usize = 128;
/// Names in `AllowedHosts`.
pub const ALLOWED_HOSTS: RangeInclusive<usize> = 0..=64;
/// Bytes of a host name (RFC 1123 2.1).
pub const HOST_BYTES_MAX: usize = 253;
/// Bytes of one label of a host name (RFC 1123 2.1).
pub const HOST_LABEL_BYTES_MAX: usize = 63;
/// Bytes of `PathPrefix`.
pub const PATH_PREFIX_BYTES_MAX: usize = 256;
/// `MaxConn`: connections.
pub const MAX_CONN: RangeInclusive<usize> = 1..=1000;
/// `CacheSize`: entries.
pub const CACHE_SIZE: RangeInclusive<usize> = 1..=1000;
/// `CacheBytes`: bytes of cached values, 64 KiB to 256 MiB.
pub const CACHE_BYTES: RangeInclusive<usize> = 65_536..=268_435_456;
/// `TTLSeconds`: seconds, up to a week; 0: nothing is cached.
pub const TTL_S: RangeInclusive<u64> = 0..=604_800;
/// `MaxStaleSeconds`: seconds past the TTL, up to a week.
pub const MAX_STALE_S: RangeInclusive<u64> = 0..=604_800;
/// Bytes of `Region`, also of the one in `AapArn`.
pub const REGION_BYTES_MAX: usize = 32;
/// Digits of the account in `AapArn` (accounts have 16 today).
pub const ACCOUNT_DIGITS_MAX: usize = 20;
/// Bytes of the access point's name in `AapArn`.
pub const AAP_NAME_BYTES_MAX: usize = 128;
/// Bytes of a path: Linux's `PATH_MAX` with its final zero.
pub const PATH_BYTES_MAX: usize = 4095;
/// `LogFileSizeMB`: MiB.
pub const LOG_FILE_SIZE_MB: RangeInclusive<u32> = 1..=1024;
/// `LogBackupFiles`: files.
pub const LOG_BACKUP_FILES: RangeInclusive<u32> = 0..=BACKUP_FILES_MAX;
/// Port of `Endpoint` where none is written.
pub const ENDPOINT_PORT: u16 = 443;
/// Port of `MetadataEndpoint` where none is written.
pub const METADATA_PORT: u16 = 80;

/// How the host name of a KMS instance ends. Its certificate is of KMS's private CA.
const INSTANCE_ENDPOINT: &str = ".cryptoservice.kms.aliyuncs.com";
const NEEDS_CA_FILE: &str = "needs CaFile too: a KMS instance has a certificate of its private CA. Download that \
    CA's certificate from the instance's page in the KMS console (or CaCertificateChainPem of GetKmsInstance) and name \
    the file in CaFile";
/// Syntax errors reported of one file: past a few they only follow from each other.
const SYNTAX_ERRORS_MAX: usize = 20;
/// Characters of a wrong value that a message shows.
const FOUND_CHARS_MAX: usize = 60;
/// From this likeness on (0 to 1) a known name is taken for what an unknown one was meant to be.
const LIKENESS_MIN: f64 = 0.6;
/// Names longer than that (bytes) are not compared with the known ones.
const COMPARED_BYTES_MAX: usize = 64;

/// Every section with its keys.
const SECTIONS: [(&str, &[&str]); 4] = [
    (
        "Server",
        &[
            "HttpPort",
            "SSRFHeaders",
            "SSRFEnvVariables",
            "PathPrefix",
            "MaxConn",
            "ResponseType",
            "IgnoreTransientErrors",
            "AllowedHosts",
        ],
    ),
    ("Cache", &["CacheSize", "CacheBytes", "TTLSeconds", "MaxStaleSeconds"]),
    ("KMS", &["Region", "Endpoint", "AuthType", "RoleName", "AapArn", "CaFile", "MetadataEndpoint"]),
    ("Log", &["LogLevel", "LogPath", "LogFileSizeMB", "LogBackupFiles"]),
];

/// A whole configuration. The default is what an empty file gives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// `[Server]`: the local HTTP API.
    pub server: Server,
    /// `[Cache]`: the cached secrets.
    pub cache: Cache,
    /// `[KMS]`: where the secrets come from, and who asks for them.
    pub kms: Kms,
    /// `[Log]`.
    pub log: Log,
}

/// The `[Server]` section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
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

impl Default for Server {
    fn default() -> Server {
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        Server {
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
pub struct Cache {
    /// `CacheSize`: most entries.
    pub size: usize,
    /// `CacheBytes`: most bytes of all values together.
    pub bytes: usize,
    /// `TTLSeconds`: how long a value is fresh; zero: nothing is cached.
    pub ttl: Duration,
    /// `MaxStaleSeconds`: how long past that it may still be served with `IgnoreTransientErrors`.
    pub max_stale: Duration,
}

impl Default for Cache {
    fn default() -> Cache {
        Cache {
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
pub struct Kms {
    /// `Region`, as written; [`Kms::region`] knows more.
    pub region: Option<String>,
    /// `Endpoint`, as written; [`Kms::endpoint`] knows more.
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

impl Default for Kms {
    fn default() -> Kms {
        Kms {
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

impl Kms {
    /// The region: `Region`, else that of `AapArn`; `None`: the metadata service knows.
    #[must_use]
    pub fn region(&self) -> Option<&str> {
        self.region.as_deref().or(self.aap_arn.as_ref().map(|aap| aap.region.as_str()))
    }

    /// Where KMS is: `Endpoint`, else the region's VPC endpoint; `None`: the region is still to be asked.
    #[must_use]
    pub fn endpoint(&self) -> Option<HostPort> {
        self.endpoint.clone().or_else(|| self.region().map(HostPort::kms_in))
    }
}

/// `AuthType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthType {
    /// `auto`: with `AapArn` instance identity, else the default credential chain.
    Auto,
    /// `ram_role`: the instance's RAM role.
    RamRole,
    /// `instance_identity`: the instance identity document, by an application access point.
    InstanceIdentity,
    /// `access_key`: an access key from the environment.
    AccessKey,
    /// `oidc`: an OIDC token (RRSA).
    Oidc,
}

/// A host and its port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// A host name in lower case, or an IP address; IPv6 without brackets.
    pub host: String,
    /// TCP port, never 0 where it came from a configuration.
    pub port: u16,
}

impl HostPort {
    /// Reads `host`, `host:port`, `[IPv6]` or `[IPv6]:port`.
    ///
    /// # Errors
    /// What it must be instead, for a message.
    pub fn parse(text: &str, default_port: u16) -> Result<HostPort, String> {
        const FORM: &str = "must be host or host:port";
        if let Some((scheme, _)) = text.split_once("://") {
            return Err(format!("{FORM}: leave {scheme}:// away"));
        }
        if let Some((_, _)) = text.split_once(['/', '?', '#']) {
            return Err(format!("{FORM}: leave away what follows them"));
        }
        let (host, port) = match (text.starts_with('['), text.rsplit_once(':')) {
            (true, Some((host, port))) if host.ends_with(']') => (host, Some(port)),
            (false, Some((host, _))) if host.contains(':') => {
                return Err(format!("{FORM}, an IPv6 address in brackets: [::1]:{default_port}"));
            }
            (false, Some((host, port))) => (host, Some(port)),
            _ => (text, None),
        };
        let port = match port {
            None => default_port,
            Some(port) => Some(port)
                .filter(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
                .and_then(|port| port.parse().ok())
                .filter(|&port| port > 0)
                .ok_or_else(|| format!("{FORM}, the port 1 to 65535"))?,
        };
        Ok(HostPort { host: read_host(host)?, port })
    }

    /// KMS's endpoint in a region's VPCs: `kms-vpc.<region>.aliyuncs.com`.
    #[must_use]
    pub fn kms_in(region: &str) -> HostPort {
        HostPort { host: format!("kms-vpc.{region}.aliyuncs.com"), port: ENDPOINT_PORT }
    }

    /// As in a `Host` header or a URL: the port only if it is not `default_port`.
    #[must_use]
    pub fn authority(&self, default_port: u16) -> String {
        if self.port == default_port { self.bracketed() } else { self.to_string() }
    }

    fn bracketed(&self) -> String {
        if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() }
    }
}

/// `host:port`, IPv6 in brackets.
impl Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.bracketed(), self.port)
    }
}

/// `acs:kms:<region>:<account>:applicationaccesspoint/<name>`: an application access point of KMS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AapArn {
    /// Region id.
    pub region: String,
    /// Account id: digits.
    pub account: String,
    /// Name of the access point.
    pub name: String,
    text: String,
}

impl AapArn {
    /// Reads an ARN.
    ///
    /// # Errors
    /// What it must be instead, for a message.
    pub fn parse(text: &str) -> Result<AapArn, String> {
        let parts = || {
            let (region, rest) = text.strip_prefix("acs:kms:")?.split_once(':')?;
            let (account, rest) = rest.split_once(':')?;
            let name = rest.strip_prefix("applicationaccesspoint/")?;
            let valid = is_region(region)
                && consists_of(account, ACCOUNT_DIGITS_MAX, |byte| byte.is_ascii_digit())
                && consists_of(name, AAP_NAME_BYTES_MAX, is_name_byte);
            valid.then(|| AapArn {
                region: region.to_owned(),
                account: account.to_owned(),
                name: name.to_owned(),
                text: text.to_owned(),
            })
        };
        parts().ok_or_else(|| {
            "must be acs:kms:<region>:<account>:applicationaccesspoint/<name> (no <> around them)".to_owned()
        })
    }

    /// The whole ARN, as written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// Something wrong in a configuration. Displays as one line:
/// `line 4: [Server] HttpPort = 70000: must be 0 to 65535`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Line of the file, from 1; `None`: it is about the whole file.
    pub line: Option<usize>,
    /// Section or key: `[Server]`, `[Server] HttpPort`.
    pub key: Option<String>,
    /// The wrong value as written, shortened. Not that of an unknown key: it may be a secret.
    pub found: Option<String>,
    /// What it must be.
    pub message: String,
}

impl Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        match (&self.key, &self.found) {
            (Some(key), Some(found)) => write!(f, "{key} = {found}: ")?,
            (Some(key), None) => write!(f, "{key}: ")?,
            (None, Some(found)) => write!(f, "{found}: ")?,
            (None, None) => {}
        }
        f.write_str(&self.message)
    }
}

/// Why [`load`] failed. Displays as one line, or one and one more for each problem.
#[derive(Debug)]
pub enum LoadError {
    /// The file cannot be read.
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The file was read, but it is wrong.
    Invalid {
        /// The file.
        path: PathBuf,
        /// Everything that is wrong in it, by line; at least one.
        problems: Vec<Problem>,
    },
}

impl Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LoadError::Read { path, error } => {
                write!(f, "cannot read configuration {}: {}", path.display(), Reason(error))
            }
            LoadError::Invalid { path, problems } => {
                let plural = if problems.len() == 1 { "problem" } else { "problems" };
                write!(f, "{} {plural} in configuration {}:", problems.len(), path.display())?;
                problems.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
            }
        }
    }
}

impl std::error::Error for LoadError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            LoadError::Read { error, .. } => Some(error),
            LoadError::Invalid { .. } => None,
        }
    }
}

/// Reads a configuration file.
///
/// # Errors
/// If it cannot be read, or has problems: then all of them.
pub fn load(path: &Path) -> Result<Config, LoadError> {
    let read = || -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(|error| LoadError::Read { path: path.to_owned(), error })?;
    parse_bytes(&bytes).map_err(|problems| LoadError::Invalid { path: path.to_owned(), problems })
}

/// Where the configuration of the binary `exe` is looked for: `config.toml` beside the binary's
/// folder, so `/x/config.toml` for `/x/bin/kms-agent`.
#[must_use]
pub fn default_path(exe: &Path) -> Option<PathBuf> {
    Some(exe.parent()?.parent()?.join("config.toml"))
}

fn parse_bytes(bytes: &[u8]) -> Result<Config, Vec<Problem>> {
    let whole_file = |line, message| vec![Problem { line, key: None, found: None, message }];
    if u64::try_from(bytes.len()).is_ok_and(|len| len > FILE_BYTES_MAX) {
        return Err(whole_file(None, format!("must not be larger than {FILE_BYTES_MAX} bytes")));
    }
    match str::from_utf8(bytes) {
        Ok(text) => parse(text),
        Err(error) => {
            let before = bytes.get(..error.valid_up_to()).unwrap_or_default();
            let line = before.iter().filter(|&&byte| byte == b'\n').count().saturating_add(1);
            Err(whole_file(Some(line), "must be UTF-8 text".to_owned()))
        }
    }
}

/// Reads a configuration. Pure; takes any text.
///
/// # Errors
/// Everything that is wrong in it, sorted by line.
pub fn parse(text: &str) -> Result<Config, Vec<Problem>> {
    let (root, syntax_errors) = DeTable::parse_recoverable(text);
    let root = root.get_ref();
    let mut reader = Reader::new(text, root, &syntax_errors);
    reader.report_unknown(root);
    let mut config = Config::default();

    let mut server = reader.section(root, "Server");
    server.integer("HttpPort", 0..=u16::MAX, &mut config.server.http_port);
    server.list("SSRFHeaders", SSRF_HEADERS, read_header, Case::Ignored, &mut config.server.ssrf_headers);
    server.list(
        "SSRFEnvVariables",
        SSRF_ENV_VARIABLES,
        read_env_name,
        Case::Matters,
        &mut config.server.ssrf_env_variables,
    );
    server.text("PathPrefix", read_path_prefix, &mut config.server.path_prefix);
    server.integer("MaxConn", MAX_CONN, &mut config.server.max_conn);
    server.response_type("ResponseType", &mut config.server.response_type);
    server.boolean("IgnoreTransientErrors", &mut config.server.ignore_transient_errors);
    server.list(
        "AllowedHosts",
        ALLOWED_HOSTS,
        read_allowed_host,
        Case::Ignored,
        &mut config.server.allowed_hosts,
    );

    let mut cache = reader.section(root, "Cache");
    cache.integer("CacheSize", CACHE_SIZE, &mut config.cache.size);
    cache.integer("CacheBytes", CACHE_BYTES, &mut config.cache.bytes);
    cache.seconds("TTLSeconds", TTL_S, &mut config.cache.ttl);
    cache.seconds("MaxStaleSeconds", MAX_STALE_S, &mut config.cache.max_stale);

    let mut kms = reader.section(root, "KMS");
    kms.optional("Region", read_region, &mut config.kms.region);
    kms.optional("Endpoint", |text| HostPort::parse(text, ENDPOINT_PORT), &mut config.kms.endpoint);
    kms.text("AuthType", read_auth_type, &mut config.kms.auth_type);
    kms.optional("RoleName", read_role_name, &mut config.kms.role_name);
    kms.optional("AapArn", AapArn::parse, &mut config.kms.aap_arn);
    kms.optional("CaFile", read_path, &mut config.kms.ca_file);
    kms.text("MetadataEndpoint", read_metadata_endpoint, &mut config.kms.metadata_endpoint);
    if config.kms.auth_type == AuthType::InstanceIdentity && kms.is_unset("AapArn") {
        kms.problem("AuthType", "needs AapArn too: the application access point to ask".to_owned());
    }
    if let (Some(aap), Some(region)) = (&config.kms.aap_arn, &config.kms.region)
        && aap.region != *region
    {
        kms.problem("AapArn", format!("is in {}, but Region is {region}", aap.region));
    }
    if config.kms.endpoint.as_ref().is_some_and(|it| it.host.ends_with(INSTANCE_ENDPOINT))
        && kms.is_unset("CaFile")
    {
        kms.problem("Endpoint", NEEDS_CA_FILE.to_owned());
    }

    let mut log = reader.section(root, "Log");
    log.text("LogLevel", read_level, &mut config.log.level);
    log.text("LogPath", read_log_path, &mut config.log.path);
    log.integer("LogFileSizeMB", LOG_FILE_SIZE_MB, &mut config.log.file_size_mb);
    log.integer("LogBackupFiles", LOG_BACKUP_FILES, &mut config.log.backup_files);

    let problems = reader.into_problems();
    if problems.is_empty() { Ok(config) } else { Err(problems) }
}

#[cfg(test)]
mod tests;
