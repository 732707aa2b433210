//! The configuration file: TOML in, a [`Config`] out.
//!
//! [`parse`] is pure and reports every [`Problem`] of a file, each with its line. Sections, keys,
//! defaults and ranges are those of the agent's contract, section 2; the ranges are constants here.
//! Key names are case-sensitive, every key is optional, unknown ones are problems.

use std::fmt::{self, Display};
use std::fs::File;
use std::io::{self, Read};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ::log::LevelFilter;
use toml::Spanned;
use toml::de::{DeTable, DeValue, Error as SyntaxError};

use crate::log::{BACKUP_FILES_MAX, Reason};
pub use crate::log::{LogPath, Settings as Log};

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
/// Bytes of `RoleName`.
pub const ROLE_NAME_BYTES_MAX: usize = 64;
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
    /// `Region`; `None`: the metadata service knows.
    pub region: Option<String>,
    /// `Endpoint`; `None`: the region's VPC endpoint, `kms-vpc.<Region>.aliyuncs.com`.
    pub endpoint: Option<HostPort>,
    /// `AuthType`: who the agent is to KMS.
    pub auth_type: AuthType,
    /// `RoleName`: the instance's RAM role; `None`: the metadata service knows.
    pub role_name: Option<String>,
    /// `AapArn`: an application access point. Always there with [`AuthType::InstanceIdentity`].
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

    let mut log = reader.section(root, "Log");
    log.text("LogLevel", read_level, &mut config.log.level);
    log.text("LogPath", read_log_path, &mut config.log.path);
    log.integer("LogFileSizeMB", LOG_FILE_SIZE_MB, &mut config.log.file_size_mb);
    log.integer("LogBackupFiles", LOG_BACKUP_FILES, &mut config.log.backup_files);

    let problems = reader.into_problems();
    if problems.is_empty() { Ok(config) } else { Err(problems) }
}

/// Gathers the problems of a file.
struct Reader<'t> {
    text: &'t str,
    /// Offset of each line's first byte.
    line_starts: Vec<usize>,
    /// Where the syntax is wrong, sorted. What was recovered from such places is not judged.
    broken: Vec<usize>,
    problems: Vec<Problem>,
}

impl<'t> Reader<'t> {
    fn new(text: &'t str, root: &DeTable<'_>, syntax_errors: &[SyntaxError]) -> Reader<'t> {
        let after_breaks = text.bytes().enumerate().filter(|&(_, byte)| byte == b'\n');
        let line_starts = after_breaks.map(|(offset, _)| offset.saturating_add(1));
        let mut reader = Reader {
            text,
            line_starts: std::iter::once(0).chain(line_starts).collect(),
            broken: Vec::new(),
            problems: Vec::new(),
        };
        reader.report_syntax(root, syntax_errors);
        reader
    }

    /// Line of a byte, from 1.
    fn line(&self, offset: usize) -> usize {
        self.line_starts.partition_point(|&start| start <= offset)
    }

    /// One problem for each line and value with syntax errors: the first.
    fn report_syntax(&mut self, root: &DeTable<'_>, syntax_errors: &[SyntaxError]) {
        let end = self.text.len();
        let mut errors: Vec<_> =
            syntax_errors.iter().map(|error| (error.span().unwrap_or(end..end), error.message())).collect();
        errors.sort_by_key(|(span, _)| span.start);
        self.broken = errors.iter().map(|(span, _)| span.start).collect();
        errors.dedup_by_key(|(span, _)| self.line(span.start));

        let mut values: Vec<_> =
            root.values().filter_map(|value| value.get_ref().as_table()).flat_map(DeTable::values).collect();
        values.sort_by_key(|value| value.span().start);
        let mut reported_until = 0;
        let mut reported = 0;
        for (span, message) in errors {
            if span.start < reported_until {
                continue;
            }
            reported += 1;
            if reported > SYNTAX_ERRORS_MAX {
                break;
            }
            let mut within = String::new();
            let before = values.partition_point(|value| value.span().start <= span.start);
            if let Some(value) = before.checked_sub(1).and_then(|last| values.get(last)) {
                reported_until = value.span().end;
                let begin = self.line(value.span().start);
                if span.start < reported_until && begin < self.line(span.start) {
                    within = format!(" (within the value that begins in line {begin})");
                }
            }
            // Only a name of ours is safe to be shown: anything else may be part of a secret.
            let at = match self.text.get(span.clone()).filter(|name| is_known(name)) {
                Some(name) => format!(" at {name}"),
                None => String::new(),
            };
            let message = format!("syntax error{at}: {message}{within}");
            self.problems.push(Problem {
                line: Some(self.line(span.start)),
                key: None,
                found: None,
                message,
            });
        }
    }

    /// `true` if the syntax is wrong in this place, or anywhere on its first line.
    fn is_broken(&self, span: &Range<usize>) -> bool {
        self.is_line_broken(self.line(span.start)) || self.is_syntax_wrong_in(span.start, span.end)
    }

    fn is_line_broken(&self, line: usize) -> bool {
        let start = |line: usize| self.line_starts.get(line.saturating_sub(1)).copied().unwrap_or(usize::MAX);
        self.is_syntax_wrong_in(start(line), start(line.saturating_add(1)))
    }

    fn is_syntax_wrong_in(&self, start: usize, end: usize) -> bool {
        let first = self.broken.partition_point(|&offset| offset < start);
        self.broken.get(first).is_some_and(|&offset| offset < end)
    }

    /// Reports a problem of the key or value at `span`.
    fn report(&mut self, span: &Range<usize>, key: String, found: Option<String>, message: String) {
        if !self.is_broken(span) {
            let line = Some(self.line(span.start));
            self.problems.push(Problem { line, key: Some(key), found, message });
        }
    }

    /// Reports unknown sections and keys.
    fn report_unknown(&mut self, root: &DeTable<'_>) {
        for (name, value) in root {
            let (span, name) = (name.span(), name.get_ref().as_ref());
            match (SECTIONS.iter().find(|(section, _)| *section == name), value.get_ref()) {
                (Some((section, keys)), DeValue::Table(table)) => {
                    for key in table.keys().filter(|key| !keys.contains(&key.get_ref().as_ref())) {
                        let message = format!("unknown key; {}", hint(Some((section, keys)), key.get_ref()));
                        self.report(
                            &key.span(),
                            format!("[{section}] {}", excerpt(key.get_ref())),
                            None,
                            message,
                        );
                    }
                }
                (Some((section, _)), _) => {
                    let message = format!("must be one section: a line [{section}], its keys below it");
                    self.report(&span, format!("[{section}]"), None, message);
                }
                // After a header without its `]` the next key is taken for a section.
                (None, DeValue::Table(_)) if self.is_line_broken(self.line(span.start).saturating_sub(1)) => {
                }
                (None, DeValue::Table(_)) => {
                    let message = format!("unknown section; {}", section_hint(name));
                    self.report(&span, format!("[{}]", excerpt(name)), None, message);
                }
                (None, _) => {
                    let message = format!("a key outside of any section; {}", hint(None, name));
                    self.report(&span, excerpt(name), None, message);
                }
            }
        }
    }

    fn section<'r>(&'r mut self, root: &'r DeTable<'t>, name: &'static str) -> Section<'r, 't> {
        let table = root.get(name).and_then(|value| value.get_ref().as_table());
        Section { name, table, reader: self }
    }

    fn into_problems(mut self) -> Vec<Problem> {
        self.problems.sort_by_key(|problem| problem.line.unwrap_or(usize::MAX));
        self.problems
    }
}

/// One section being read. Its methods put a valid value where it belongs, report any other, and
/// leave the default where there is none.
struct Section<'r, 't> {
    name: &'static str,
    table: Option<&'r DeTable<'t>>,
    reader: &'r mut Reader<'t>,
}

/// Whether names that differ in case only are different names.
#[derive(Clone, Copy)]
enum Case {
    Matters,
    Ignored,
}

impl<'r, 't> Section<'r, 't> {
    fn value(&self, key: &str) -> Option<&'r Spanned<DeValue<'t>>> {
        self.table?.get(key)
    }

    /// `true` if there is no such key, or an empty string.
    fn is_unset(&self, key: &str) -> bool {
        self.value(key).is_none_or(|value| value.get_ref().as_str() == Some(""))
    }

    /// Reports a problem of a key's value.
    fn problem(&mut self, key: &str, message: String) {
        if let Some(value) = self.value(key) {
            self.problem_at(key, value, message);
        }
    }

    /// Reports a problem of `value`, which is a key's or an element of it.
    fn problem_at(&mut self, key: &str, value: &Spanned<DeValue<'_>>, message: String) {
        let span = value.span();
        let found = self.reader.text.get(span.clone()).map(excerpt);
        self.reader.report(&span, format!("[{}] {key}", self.name), found, message);
    }

    /// A whole number in `range`.
    fn integer<T>(&mut self, key: &str, range: RangeInclusive<T>, slot: &mut T)
    where
        T: Copy + Display + PartialOrd + TryFrom<i128>,
    {
        let allowed = format!("{} to {}", range.start(), range.end());
        if let Some(number) = self.number(key, &allowed) {
            match T::try_from(number).ok().filter(|number| range.contains(number)) {
                Some(number) => *slot = number,
                None => self.problem(key, format!("must be {allowed}")),
            }
        }
    }

    /// A whole number; one past 128 bits counts as the largest. `allowed` says which ones, for messages.
    fn number(&mut self, key: &str, allowed: &str) -> Option<i128> {
        let value = self.value(key)?;
        let must = match value.get_ref() {
            DeValue::Integer(number) => {
                return Some(i128::from_str_radix(number.as_str(), number.radix()).unwrap_or(i128::MAX));
            }
            DeValue::String(text) if text.trim().parse::<i128>().is_ok() => {
                "must be a whole number without quotes,".to_owned()
            }
            DeValue::Float(_) => "must be a whole number without a fraction,".to_owned(),
            other => format!("must be a whole number and not {},", kind(other)),
        };
        self.problem(key, format!("{must} {allowed}"));
        None
    }

    /// A whole number of seconds.
    fn seconds(&mut self, key: &str, range: RangeInclusive<u64>, slot: &mut Duration) {
        let mut seconds = slot.as_secs();
        self.integer(key, range, &mut seconds);
        *slot = Duration::from_secs(seconds);
    }

    fn response_type(&mut self, key: &str, slot: &mut ResponseType) {
        const ALLOWED: &str = "0 (KMS), 1 (AWS) or 2 (HashiCorp KV)";
        match self.number(key, ALLOWED) {
            None => {}
            Some(0) => *slot = ResponseType::Kms,
            Some(1) => *slot = ResponseType::Aws,
            Some(2) => *slot = ResponseType::Vault,
            Some(_) => self.problem(key, format!("must be {ALLOWED}")),
        }
    }

    fn boolean(&mut self, key: &str, slot: &mut bool) {
        match self.value(key).map(Spanned::get_ref) {
            None => {}
            Some(DeValue::Boolean(value)) => *slot = *value,
            Some(DeValue::String(_)) => self.problem(key, "must be true or false without quotes".to_owned()),
            Some(other) => self.problem(key, format!("must be true or false and not {}", kind(other))),
        }
    }

    /// A string that `read` makes a value of.
    fn text<T>(&mut self, key: &str, read: impl FnOnce(&str) -> Result<T, String>, slot: &mut T) {
        let Some(value) = self.value(key) else { return };
        let result = match value.get_ref() {
            DeValue::String(text) => read(text),
            other => Err(format!("must be a string in quotes and not {}", kind(other))),
        };
        match result {
            Ok(value) => *slot = value,
            Err(message) => self.problem(key, message),
        }
    }

    /// The same, where an empty string is none.
    fn optional<T>(&mut self, key: &str, read: impl FnOnce(&str) -> Result<T, String>, slot: &mut Option<T>) {
        if !self.is_unset(key) {
            self.text(key, |text| read(text).map(Some), slot);
        }
    }

    /// A list of strings that `read` checks, and none of them twice.
    fn list(
        &mut self,
        key: &str,
        count: RangeInclusive<usize>,
        read: fn(&str) -> Result<String, String>,
        case: Case,
        slot: &mut Vec<String>,
    ) {
        let values = match self.value(key).map(Spanned::get_ref) {
            None => return,
            Some(DeValue::Array(values)) => values,
            Some(DeValue::String(_)) => {
                return self.problem(key, "must be a list of strings: [\"..\", \"..\"]".to_owned());
            }
            Some(other) => {
                return self.problem(key, format!("must be a list of strings and not {}", kind(other)));
            }
        };
        if !count.contains(&values.len()) {
            let message =
                format!("must have {} to {} elements, has {}", count.start(), count.end(), values.len());
            return self.problem(key, message);
        }
        let mut names: Vec<String> = Vec::with_capacity(values.len());
        for value in values.iter() {
            let result = match value.get_ref() {
                DeValue::String(text) => read(text),
                other => Err(format!("each element must be a string in quotes and not {}", kind(other))),
            };
            let is_same = |name: &str, other: &str| match case {
                Case::Matters => name == other,
                Case::Ignored => name.eq_ignore_ascii_case(other),
            };
            match result {
                Ok(name) if names.iter().any(|other| is_same(&name, other)) => {
                    self.problem_at(key, value, "is in the list twice".to_owned());
                }
                Ok(name) => names.push(name),
                Err(message) => self.problem_at(key, value, message),
            }
        }
        *slot = names;
    }
}

/// What a value is, with its article.
fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) | DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date or time",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// A value or name of the file for a message: its first line, shortened, without control characters.
fn excerpt(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    let mut shown: String = line
        .chars()
        .take(FOUND_CHARS_MAX)
        .map(|c| if c.is_ascii() && !c.is_ascii_control() { c.into() } else { c.escape_debug().to_string() })
        .collect();
    if line.chars().nth(FOUND_CHARS_MAX).is_some() || line.len() < text.trim_end().len() {
        shown.push('…');
    }
    shown
}

/// `true` for the name of a section or key.
fn is_known(name: &str) -> bool {
    SECTIONS.iter().any(|(section, keys)| *section == name || keys.contains(&name))
}

/// How alike two names are, from 0 to 1. Case and marks between words do not count.
fn likeness(name: &str, known: &str) -> f64 {
    if name.len() > COMPARED_BYTES_MAX {
        return 0.0;
    }
    let plain = |name: &str| -> String {
        name.chars().filter(|c| !matches!(c, '_' | '-' | ' ')).map(|c| c.to_ascii_lowercase()).collect()
    };
    strsim::normalized_damerau_levenshtein(&plain(name), &plain(known))
}

/// The candidate most like `name`, the first of several, if it is alike enough to be meant.
fn nearest<T>(name: &str, candidates: impl Iterator<Item = (T, &'static str)>) -> Option<(T, &'static str)> {
    let mut best = None;
    let mut best_likeness = LIKENESS_MIN;
    for (place, known) in candidates {
        let likeness = likeness(name, known);
        if likeness > best_likeness || (best.is_none() && likeness >= best_likeness) {
            (best, best_likeness) = (Some((place, known)), likeness);
        }
    }
    best
}

/// What the unknown key `name` in `section` was meant to be; `None`: it is in no section.
fn hint(section: Option<(&str, &[&'static str])>, name: &str) -> String {
    let own = section.into_iter().flat_map(|(_, keys)| keys.iter().map(|&key| (None, key)));
    let others = SECTIONS
        .iter()
        .filter(|(other, _)| section.is_none_or(|(own, _)| own != *other))
        .flat_map(|(other, keys)| keys.iter().map(|&key| (Some(*other), key)));
    match (nearest(name, own.chain(others)), section) {
        (Some((Some(place), known)), _) if known == name => format!("it belongs in [{place}]"),
        (Some((Some(place), known)), _) => format!("did you mean {known} in [{place}]?"),
        (Some((None, known)), _) if known.eq_ignore_ascii_case(name) => {
            format!("did you mean {known}? (upper and lower case matter)")
        }
        (Some((None, known)), _) => format!("did you mean {known}?"),
        (None, Some((section, keys))) => format!("[{section}] knows {}", keys.join(", ")),
        (None, None) => sections(),
    }
}

/// What the unknown section `name` was meant to be.
fn section_hint(name: &str) -> String {
    match nearest(name, SECTIONS.iter().map(|&(section, _)| ((), section))) {
        Some(((), known)) => format!("did you mean [{known}]?"),
        None => sections(),
    }
}

fn sections() -> String {
    let names: Vec<_> = SECTIONS.iter().map(|(section, _)| format!("[{section}]")).collect();
    format!("the sections are {}", names.join(", "))
}

/// `true` for 1 to `bytes_max` bytes that all satisfy `allowed`.
fn consists_of(text: &str, bytes_max: usize, allowed: impl Fn(u8) -> bool) -> bool {
    (1..=bytes_max).contains(&text.len()) && text.bytes().all(allowed)
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"._-".contains(&byte)
}

fn is_region(text: &str) -> bool {
    consists_of(text, REGION_BYTES_MAX, |byte| {
        byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-'
    })
}

/// A header that may carry the token: an RFC 9110 5.6.2 token.
fn read_header(text: &str) -> Result<String, String> {
    /// What HTTP itself or the gates before the token's read from these is not a token.
    const TAKEN: [&str; 6] =
        ["Host", "Connection", "Content-Length", "Transfer-Encoding", "Forwarded", "X-Forwarded-For"];
    let is_token_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if !consists_of(text, HEADER_NAME_BYTES_MAX, is_token_byte) {
        return Err(format!(
            "must be a header name: 1 to {HEADER_NAME_BYTES_MAX} letters, digits or !#$%&'*+-.^_`|~"
        ));
    }
    if TAKEN.iter().any(|taken| taken.eq_ignore_ascii_case(text)) {
        return Err(format!("cannot carry the token: none of {} can", TAKEN.join(", ")));
    }
    Ok(text.to_owned())
}

fn read_env_name(text: &str) -> Result<String, String> {
    let valid = consists_of(text, ENV_NAME_BYTES_MAX, |byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && !text.starts_with(|c: char| c.is_ascii_digit());
    if valid {
        Ok(text.to_owned())
    } else {
        Err(format!(
            "must be the name of an environment variable: 1 to {ENV_NAME_BYTES_MAX} letters, digits or _, no digit first"
        ))
    }
}

/// Path characters of RFC 3986 3.3 other than percent-encoded ones.
fn read_path_prefix(text: &str) -> Result<String, String> {
    let is_path_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@/".contains(&byte);
    if text.len() > PATH_PREFIX_BYTES_MAX {
        Err(format!("must have at most {PATH_PREFIX_BYTES_MAX} bytes"))
    } else if !text.starts_with('/') || !text.ends_with('/') {
        Err("must begin and end with /".to_owned())
    } else if !text.bytes().all(is_path_byte) {
        Err("must consist of letters, digits and -._~!$&'()*+,;=:@/ only".to_owned())
    } else if text.contains("//") || text.split('/').any(|segment| segment == "." || segment == "..") {
        Err("must not contain //, /./ or /../".to_owned())
    } else {
        Ok(text.to_owned())
    }
}

/// A host name (underscores are let pass: container networks have them) in lower case, or an IP address;
/// IPv6 with or without brackets, given without.
fn read_host(text: &str) -> Result<String, String> {
    let must = |what: &str| Err(format!("must be a host name or an IP address: {what}"));
    if let Some(inner) = text.strip_prefix('[') {
        return match inner.strip_suffix(']').map(str::parse::<Ipv6Addr>) {
            Some(Ok(address)) => Ok(address.to_string()),
            _ => must("this is no IPv6 address in brackets"),
        };
    }
    if let Ok(address) = text.parse::<Ipv6Addr>() {
        return Ok(address.to_string());
    }
    let is_label = |label: &str| {
        consists_of(label, HOST_LABEL_BYTES_MAX, |byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if text.is_empty() {
        must("this is empty")
    } else if text.len() > HOST_BYTES_MAX || !text.split('.').all(is_label) {
        must("letters, digits and hyphens between dots")
    } else if text.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()))
        && text.parse::<Ipv4Addr>().is_err()
    {
        must("this is no IPv4 address")
    } else {
        Ok(text.to_ascii_lowercase())
    }
}

fn read_allowed_host(text: &str) -> Result<String, String> {
    let is_ipv6 = text.parse::<Ipv6Addr>().is_ok() || (text.starts_with('[') && text.ends_with(']'));
    if text.contains('*') {
        Err("must be a whole host name: * stands for nothing here".to_owned())
    } else if text.contains("://") || text.contains('/') {
        Err("must be a host name or an IP address alone: leave scheme and path away".to_owned())
    } else if text.contains(':') && !is_ipv6 {
        Err("must be a host name or an IP address alone: leave the port away".to_owned())
    } else {
        read_host(text)
    }
}

fn read_region(text: &str) -> Result<String, String> {
    if is_region(text) {
        Ok(text.to_owned())
    } else {
        Err(format!(
            "must be a region id such as cn-hangzhou: 1 to {REGION_BYTES_MAX} of a-z, 0-9 and -; or \"\""
        ))
    }
}

fn read_auth_type(text: &str) -> Result<AuthType, String> {
    match text {
        "auto" => Ok(AuthType::Auto),
        "ram_role" => Ok(AuthType::RamRole),
        "instance_identity" => Ok(AuthType::InstanceIdentity),
        "access_key" => Ok(AuthType::AccessKey),
        "oidc" => Ok(AuthType::Oidc),
        _ => Err("must be auto, ram_role, instance_identity, access_key or oidc".to_owned()),
    }
}

fn read_role_name(text: &str) -> Result<String, String> {
    if consists_of(text, ROLE_NAME_BYTES_MAX, is_name_byte) {
        Ok(text.to_owned())
    } else {
        Err(format!(
            "must be the name of a RAM role: 1 to {ROLE_NAME_BYTES_MAX} of A-Z, a-z, 0-9, . _ -; or \"\""
        ))
    }
}

fn read_path(text: &str) -> Result<PathBuf, String> {
    if text.chars().any(char::is_control) {
        Err("must be a path without control characters".to_owned())
    } else if !(1..=PATH_BYTES_MAX).contains(&text.len()) {
        Err(format!("must be a path of 1 to {PATH_BYTES_MAX} bytes"))
    } else {
        Ok(PathBuf::from(text))
    }
}

fn read_metadata_endpoint(text: &str) -> Result<HostPort, String> {
    if text.starts_with("https://") {
        return Err("must begin with http://: the metadata service speaks no TLS".to_owned());
    }
    let Some(rest) = text.strip_prefix("http://") else {
        return Err("must be http://host or http://host:port".to_owned());
    };
    HostPort::parse(rest.strip_suffix('/').unwrap_or(rest), METADATA_PORT)
        .map_err(|message| format!("after http:// {message}"))
}

fn read_level(text: &str) -> Result<LevelFilter, String> {
    match text.to_ascii_lowercase().as_str() {
        "debug" => Ok(LevelFilter::Debug),
        "info" => Ok(LevelFilter::Info),
        "warn" => Ok(LevelFilter::Warn),
        "error" => Ok(LevelFilter::Error),
        _ => Err("must be debug, info, warn or error".to_owned()),
    }
}

fn read_log_path(text: &str) -> Result<LogPath, String> {
    match text {
        "-" => Ok(LogPath::Stderr),
        "" => Err("must be a folder, or \"-\" for standard error".to_owned()),
        folder => read_path(folder).map(LogPath::Folder),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes out of a file with this one key.
    fn with(section: &str, key: &str, value: impl Display) -> Result<Config, String> {
        parse(&format!("[{section}]\n{key} = {value}\n")).map_err(|problems| joined(&problems))
    }

    fn joined(problems: &[Problem]) -> String {
        problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    }

    /// The problems of a text, one a line.
    fn problems(text: &str) -> String {
        joined(&parse(text).unwrap_err())
    }

    /// Asserts what a key's value gives, or the message it is refused with.
    #[track_caller]
    fn check<T: PartialEq + fmt::Debug>(
        section: &str,
        key: &str,
        of: fn(Config) -> T,
        cases: impl IntoIterator<Item = (impl Display, Result<T, &'static str>)>,
    ) {
        for (value, expected) in cases {
            let expected = expected.map_err(|message| format!("line 2: [{section}] {key} = {message}"));
            assert_eq!(with(section, key, &value).map(of), expected, "{value}");
        }
    }

    #[test]
    fn nothing_written_gives_the_defaults_of_the_contract() {
        let expected = Config {
            server: Server {
                http_port: 2025,
                ssrf_headers: vec!["X-KMS-Token".into(), "X-Vault-Token".into()],
                ssrf_env_variables: vec![
                    "KMS_TOKEN".into(),
                    "KMS_SESSION_TOKEN".into(),
                    "KMS_CONTAINER_AUTHORIZATION_TOKEN".into(),
                ],
                path_prefix: "/v1/".into(),
                max_conn: 800,
                response_type: ResponseType::Kms,
                ignore_transient_errors: true,
                allowed_hosts: vec![],
            },
            cache: Cache {
                size: 1000,
                bytes: 16_777_216,
                ttl: Duration::from_secs(300),
                max_stale: Duration::from_secs(86_400),
            },
            kms: Kms {
                region: None,
                endpoint: None,
                auth_type: AuthType::Auto,
                role_name: None,
                aap_arn: None,
                ca_file: None,
                metadata_endpoint: HostPort { host: "100.100.100.200".into(), port: 80 },
            },
            log: Log {
                level: LevelFilter::Debug,
                path: LogPath::Folder("./logs/".into()),
                file_size_mb: 100,
                backup_files: 2,
            },
        };
        assert_eq!(Config::default(), expected);
        for text in ["", "\n# nothing\n", "[Server]\n[Cache]\n[KMS]\n[Log]\n", "\u{feff}[Server]\r\n"] {
            assert_eq!(parse(text), Ok(expected.clone()), "{text:?}");
        }
    }

    #[test]
    fn the_sample_file_shows_every_key_with_its_default() {
        let sample = include_str!("../packaging/config.toml");
        assert_eq!(parse(sample), Ok(Config::default()), "all commented out");

        // A key's line begins with `#`, a comment's with `# `.
        let key_line = |line: &str| {
            line.strip_prefix('#').filter(|rest| rest.starts_with(char::is_alphabetic)).map(str::to_owned)
        };
        let written: String =
            sample.lines().map(|line| key_line(line).unwrap_or_else(|| line.to_owned()) + "\n").collect();
        assert_eq!(parse(&written), Ok(Config::default()), "all written out");

        let mut shown = Vec::new();
        for line in written.lines() {
            if let Some(section) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
                shown.push((section, Vec::new()));
            } else if let (Some((key, _)), false) = (line.split_once(" = "), line.starts_with('#')) {
                shown.last_mut().unwrap().1.push(key);
            }
        }
        let known: Vec<_> = SECTIONS.iter().map(|(section, keys)| (*section, keys.to_vec())).collect();
        assert_eq!(shown, known);
    }

    #[test]
    fn every_key_is_read() {
        // A table is no key's value: a key that nobody reads would let it pass.
        for (section, keys) in SECTIONS {
            for key in keys {
                let message = with(section, key, "{}").unwrap_err();
                assert!(
                    message.starts_with(&format!("line 2: [{section}] {key} = {{}}: must be ")),
                    "{message}"
                );
            }
        }
    }

    #[test]
    fn whole_numbers_have_bounds() {
        type Bounds = (&'static str, &'static str, i64, i64, fn(&Config) -> u64);
        let all: [Bounds; 9] = [
            ("Server", "HttpPort", 0, 65535, |config| config.server.http_port.into()),
            ("Server", "MaxConn", 1, 1000, |config| config.server.max_conn as u64),
            ("Server", "ResponseType", 0, 2, |config| config.server.response_type as u64),
            ("Cache", "CacheSize", 1, 1000, |config| config.cache.size as u64),
            ("Cache", "CacheBytes", 65536, 268_435_456, |config| config.cache.bytes as u64),
            ("Cache", "TTLSeconds", 0, 604_800, |config| config.cache.ttl.as_secs()),
            ("Cache", "MaxStaleSeconds", 0, 604_800, |config| config.cache.max_stale.as_secs()),
            ("Log", "LogFileSizeMB", 1, 1024, |config| config.log.file_size_mb.into()),
            ("Log", "LogBackupFiles", 0, 100, |config| config.log.backup_files.into()),
        ];
        for (section, key, min, max, of) in all {
            for good in [min, min + 1, max - 1, max] {
                let config = with(section, key, good).unwrap();
                assert_eq!(i64::try_from(of(&config)), Ok(good), "{key} = {good}");
            }
            let allowed = match key {
                "ResponseType" => "0 (KMS), 1 (AWS) or 2 (HashiCorp KV)".to_owned(),
                _ => format!("{min} to {max}"),
            };
            let huge = "9".repeat(80);
            for bad in [min - 1, max + 1, i64::MIN, i64::MAX].map(|n| n.to_string()).iter().chain([&huge]) {
                let message = with(section, key, bad).unwrap_err();
                let shown = if *bad == huge { "9".repeat(60) + "…" } else { bad.clone() };
                assert_eq!(message, format!("line 2: [{section}] {key} = {shown}: must be {allowed}"));
            }
            for (bad, must) in [
                (format!("\"{max}\""), "must be a whole number without quotes"),
                (format!("{max}.0"), "must be a whole number without a fraction"),
                ("nan".to_owned(), "must be a whole number without a fraction"),
                ("\"many\"".to_owned(), "must be a whole number and not a string"),
                ("true".to_owned(), "must be a whole number and not true or false"),
                ("[1]".to_owned(), "must be a whole number and not a list"),
                ("1979-05-27".to_owned(), "must be a whole number and not a date or time"),
            ] {
                let message = with(section, key, &bad).unwrap_err();
                assert_eq!(message, format!("line 2: [{section}] {key} = {bad}: {must}, {allowed}"));
            }
        }
    }

    #[test]
    fn whole_numbers_are_read_in_every_form_of_toml() {
        check(
            "Server",
            "HttpPort",
            |config| config.server.http_port,
            [
                ("8_080", Ok(8080)),
                ("+80", Ok(80)),
                ("0x1F90", Ok(8080)),
                ("0o17", Ok(15)),
                ("0b11", Ok(3)),
                ("-0", Ok(0)),
            ],
        );
    }

    #[test]
    fn booleans() {
        check(
            "Server",
            "IgnoreTransientErrors",
            |config| config.server.ignore_transient_errors,
            [
                ("true", Ok(true)),
                ("false", Ok(false)),
                ("\"false\"", Err("\"false\": must be true or false without quotes")),
                ("0", Err("0: must be true or false and not a number")),
            ],
        );
    }

    #[test]
    fn header_names() {
        const NAME: &str = "must be a header name: 1 to 128 letters, digits or !#$%&'*+-.^_`|~";
        for (value, expected) in [
            (r#"["X-a"]"#, Ok(vec!["X-a"])),
            (r#"["1","2","3","4","5","6","7","8"]"#, Ok(vec!["1", "2", "3", "4", "5", "6", "7", "8"])),
            ("[]", Err("[]: must have 1 to 8 elements, has 0".to_owned())),
            (
                r#"["1","2","3","4","5","6","7","8","9"]"#,
                Err(r#"["1","2","3","4","5","6","7","8","9"]: must have 1 to 8 elements, has 9"#.to_owned()),
            ),
            (r#"["X Y"]"#, Err(format!(r#""X Y": {NAME}"#))),
            (r#"["X:"]"#, Err(format!(r#""X:": {NAME}"#))),
            (r#"["é"]"#, Err(format!(r#""é": {NAME}"#))),
            (r#"[""]"#, Err(format!(r#""": {NAME}"#))),
            (r#"["X-Token", "x-tokeN"]"#, Err(r#""x-tokeN": is in the list twice"#.to_owned())),
            (r#""X-Token""#, Err(r#""X-Token": must be a list of strings: ["..", ".."]"#.to_owned())),
            ("7", Err("7: must be a list of strings and not a number".to_owned())),
            (r#"["a", 7]"#, Err("7: each element must be a string in quotes and not a number".to_owned())),
        ] {
            let expected = expected
                .map(|names| names.into_iter().map(str::to_owned).collect())
                .map_err(|message| format!("line 2: [Server] SSRFHeaders = {message}"));
            let headers = with("Server", "SSRFHeaders", value).map(|config| config.server.ssrf_headers);
            assert_eq!(headers, expected, "{value}");
        }
        for taken in
            ["host", "CONNECTION", "Content-Length", "Transfer-Encoding", "Forwarded", "X-Forwarded-For"]
        {
            let message = with("Server", "SSRFHeaders", format!("[\"{taken}\"]")).unwrap_err();
            assert!(message.contains(&format!("\"{taken}\": cannot carry the token")), "{message}");
        }
        for (bytes, is_good) in [(128, true), (129, false)] {
            let value = format!("[\"{}\"]", "x".repeat(bytes));
            assert_eq!(with("Server", "SSRFHeaders", value).is_ok(), is_good, "{bytes}");
        }
    }

    #[test]
    fn environment_variables() {
        let quoted = |count: usize| format!("{:?}", (0..count).map(|n| format!("V{n}")).collect::<Vec<_>>());
        let read = |value: &str| {
            with("Server", "SSRFEnvVariables", value).map(|config| config.server.ssrf_env_variables)
        };
        assert_eq!(read("[]"), Ok(vec![]));
        assert_eq!(read(r#"["_a1", "_A1"]"#), Ok(vec!["_a1".to_owned(), "_A1".to_owned()]));
        assert_eq!(read(&quoted(16)).unwrap().len(), 16);
        assert!(read(&quoted(17)).unwrap_err().ends_with("must have 0 to 16 elements, has 17"));
        assert!(read(r#"["A", "A"]"#).unwrap_err().ends_with("\"A\": is in the list twice"));
        let name = |bytes| format!("[\"{}\"]", "x".repeat(bytes));
        assert!(read(&name(128)).is_ok());
        for bad in [r#"["A=B"]"#, r#"["1A"]"#, r#"[""]"#, r#"["A B"]"#, r#"["$A"]"#, &name(129)] {
            let message = read(bad).unwrap_err();
            assert!(message.contains("must be the name of an environment variable: 1 to 128 "), "{message}");
        }
    }

    #[test]
    fn path_prefixes() {
        const ENDS: &str = "must begin and end with /";
        const CHARS: &str = "must consist of letters, digits and -._~!$&'()*+,;=:@/ only";
        const DOTS: &str = "must not contain //, /./ or /../";
        for (value, expected) in [
            ("/v1/", Ok(())),
            ("/", Ok(())),
            ("/a/b.c/..d/-._~!$&'()*+,;=:@/", Ok(())),
            ("", Err(ENDS)),
            ("v1/", Err(ENDS)),
            ("/v1", Err(ENDS)),
            ("/v%31/", Err(CHARS)),
            ("/a b/", Err(CHARS)),
            ("/a?/", Err(CHARS)),
            ("/a#/", Err(CHARS)),
            ("/ä/", Err(CHARS)),
            ("//", Err(DOTS)),
            ("/a//b/", Err(DOTS)),
            ("/./", Err(DOTS)),
            ("/a/../", Err(DOTS)),
        ] {
            let expected = expected
                .map(|()| value.to_owned())
                .map_err(|must| format!("line 2: [Server] PathPrefix = \"{value}\": {must}"));
            let prefix =
                with("Server", "PathPrefix", format!("\"{value}\"")).map(|config| config.server.path_prefix);
            assert_eq!(prefix, expected);
        }
        let of_bytes =
            |bytes: usize| with("Server", "PathPrefix", format!("\"/{}/\"", "x".repeat(bytes - 2)));
        assert!(of_bytes(256).is_ok());
        assert!(of_bytes(257).unwrap_err().ends_with("…: must have at most 256 bytes"));
    }

    #[test]
    fn allowed_hosts() {
        let read = |name: &str| {
            with("Server", "AllowedHosts", format!("[\"{name}\"]"))
                .map(|config| config.server.allowed_hosts.concat())
        };
        for (name, expected) in [
            ("Agent.Internal", "agent.internal"),
            ("kms_agent", "kms_agent"),
            ("10.0.0.1", "10.0.0.1"),
            ("::1", "::1"),
            ("[FE80::0:1]", "fe80::1"),
        ] {
            assert_eq!(read(name).as_deref(), Ok(expected));
        }
        for (name, expected) in [
            ("agent:2025", "leave the port away"),
            ("[::1]:2025", "leave the port away"),
            ("http://agent", "leave scheme and path away"),
            ("agent/", "leave scheme and path away"),
            ("*.internal", "* stands for nothing here"),
            ("", "this is empty"),
            ("a..b", "letters, digits and hyphens between dots"),
            ("a b", "letters, digits and hyphens between dots"),
            ("-a", "letters, digits and hyphens between dots"),
            ("a-", "letters, digits and hyphens between dots"),
            ("a.", "letters, digits and hyphens between dots"),
            ("10.0.0.256", "this is no IPv4 address"),
            ("10.1", "this is no IPv4 address"),
            ("[::g]", "this is no IPv6 address in brackets"),
        ] {
            let message = read(name).unwrap_err();
            assert!(message.ends_with(expected), "{message}");
        }
        let names = |count: usize| format!("{:?}", (0..count).map(|n| format!("h{n}")).collect::<Vec<_>>());
        assert!(with("Server", "AllowedHosts", names(64)).is_ok());
        assert!(
            with("Server", "AllowedHosts", names(65))
                .unwrap_err()
                .ends_with("must have 0 to 64 elements, has 65")
        );
        let twice = with("Server", "AllowedHosts", r#"["A", "a"]"#).unwrap_err();
        assert!(twice.ends_with("\"a\": is in the list twice"), "{twice}");
        let label = "x".repeat(63);
        assert!(read(&label).is_ok());
        assert!(read(&format!("{label}x")).is_err());
        let longest = format!("{label}.{label}.{label}.{}", &label[..61]);
        assert_eq!(longest.len(), HOST_BYTES_MAX);
        assert!(read(&longest).is_ok());
        assert!(read(&format!("{longest}x")).is_err());
    }

    #[test]
    fn endpoints() {
        let kms = "kms-vpc.cn-hangzhou.aliyuncs.com";
        for (text, host, port) in [
            (kms, kms, 443),
            ("KMS.Example.com:8443", "kms.example.com", 8443),
            ("127.0.0.1:1", "127.0.0.1", 1),
            ("host:65535", "host", 65535),
            ("[::1]", "::1", 443),
            ("[2001:DB8:0::1]:8443", "2001:db8::1", 8443),
        ] {
            let endpoint = with("KMS", "Endpoint", format!("\"{text}\"")).unwrap().kms.endpoint;
            assert_eq!(endpoint, Some(HostPort { host: host.to_owned(), port }), "{text}");
        }
        assert_eq!(with("KMS", "Endpoint", "\"\"").unwrap().kms.endpoint, None);
        for (text, expected) in [
            ("https://kms.example.com", "must be host or host:port: leave https:// away"),
            ("kms.example.com/path", "must be host or host:port: leave away what follows them"),
            ("kms.example.com/", "must be host or host:port: leave away what follows them"),
            ("kms?x", "must be host or host:port: leave away what follows them"),
            ("::1", "must be host or host:port, an IPv6 address in brackets: [::1]:443"),
            ("host:", "must be host or host:port, the port 1 to 65535"),
            ("host:0", "must be host or host:port, the port 1 to 65535"),
            ("host:65536", "must be host or host:port, the port 1 to 65535"),
            ("host:+80", "must be host or host:port, the port 1 to 65535"),
            ("[::1]:x", "must be host or host:port, the port 1 to 65535"),
            ("[::1", "must be a host name or an IP address: this is no IPv6 address in brackets"),
            ("[::1]80", "must be a host name or an IP address: this is no IPv6 address in brackets"),
            ("[fe80::1%eth0]", "must be a host name or an IP address: this is no IPv6 address in brackets"),
            (":443", "must be a host name or an IP address: this is empty"),
            ("user@host", "must be a host name or an IP address: letters, digits and hyphens between dots"),
            (
                "<instance>.kms",
                "must be a host name or an IP address: letters, digits and hyphens between dots",
            ),
            ("1.2.3", "must be a host name or an IP address: this is no IPv4 address"),
        ] {
            let message = with("KMS", "Endpoint", format!("\"{text}\"")).unwrap_err();
            assert_eq!(message, format!("line 2: [KMS] Endpoint = \"{text}\": {expected}"));
        }
    }

    #[test]
    fn hosts_and_ports_are_shown_as_in_a_url() {
        for (text, shown, authority) in [
            ("kms.example.com", "kms.example.com:443", "kms.example.com"),
            ("kms.example.com:8443", "kms.example.com:8443", "kms.example.com:8443"),
            ("[::1]", "[::1]:443", "[::1]"),
            ("[::1]:80", "[::1]:80", "[::1]:80"),
        ] {
            let endpoint = HostPort::parse(text, 443).unwrap();
            assert_eq!(endpoint.to_string(), shown);
            assert_eq!(endpoint.authority(443), authority);
            assert_eq!(HostPort::parse(shown, 1), Ok(endpoint), "and read back");
        }
    }

    #[test]
    fn metadata_endpoints() {
        let host = |host: &str, port| Ok(HostPort { host: host.to_owned(), port });
        check(
            "KMS",
            "MetadataEndpoint",
            |config| config.kms.metadata_endpoint,
            [
                (r#""http://100.100.100.200""#, host("100.100.100.200", 80)),
                (r#""http://localhost:8080/""#, host("localhost", 8080)),
                (r#""http://[::1]:8080""#, host("::1", 8080)),
                (
                    r#""https://100.100.100.200""#,
                    Err(
                        r#""https://100.100.100.200": must begin with http://: the metadata service speaks no TLS"#,
                    ),
                ),
                (
                    r#""100.100.100.200""#,
                    Err(r#""100.100.100.200": must be http://host or http://host:port"#),
                ),
                (r#""""#, Err(r#""": must be http://host or http://host:port"#)),
                (
                    r#""http://a/latest""#,
                    Err(
                        r#""http://a/latest": after http:// must be host or host:port: leave away what follows them"#,
                    ),
                ),
            ],
        );
    }

    #[test]
    fn regions_and_role_names() {
        let quoted = |text: &str| format!("\"{text}\"");
        let region = |text: &str| with("KMS", "Region", quoted(text)).map(|config| config.kms.region);
        let role = |text: &str| with("KMS", "RoleName", quoted(text)).map(|config| config.kms.role_name);
        assert_eq!(region("cn-hangzhou"), Ok(Some("cn-hangzhou".to_owned())));
        assert_eq!(region(""), Ok(None));
        assert_eq!(role("Role_1.a-b"), Ok(Some("Role_1.a-b".to_owned())));
        assert_eq!(role(""), Ok(None));
        assert!(region(&"a".repeat(32)).is_ok() && role(&"a".repeat(64)).is_ok());
        for bad in [&*"a".repeat(33), "CN-hangzhou", "cn_hangzhou", "cn.hangzhou", " ", "<Region>"] {
            assert!(region(bad).unwrap_err().contains("must be a region id such as cn-hangzhou"), "{bad}");
        }
        for bad in [&*"a".repeat(65), "a b", "a/b", "ä"] {
            assert!(role(bad).unwrap_err().contains("must be the name of a RAM role: 1 to 64"), "{bad}");
        }
    }

    #[test]
    fn authentication_types() {
        let arn = "AapArn = \"acs:kms:cn-hangzhou:1234567890123456:applicationaccesspoint/app\"\n";
        for (name, expected) in [
            ("auto", AuthType::Auto),
            ("ram_role", AuthType::RamRole),
            ("instance_identity", AuthType::InstanceIdentity),
            ("access_key", AuthType::AccessKey),
            ("oidc", AuthType::Oidc),
        ] {
            let config = parse(&format!("[KMS]\n{arn}AuthType = \"{name}\"\n")).unwrap();
            assert_eq!(config.kms.auth_type, expected);
        }
        for bad in ["", "Auto", "ram-role", " auto"] {
            let message = with("KMS", "AuthType", format!("\"{bad}\"")).unwrap_err();
            let must = "must be auto, ram_role, instance_identity, access_key or oidc";
            assert_eq!(message, format!("line 2: [KMS] AuthType = \"{bad}\": {must}"));
        }
        for no_arn in ["", "AapArn = \"\"\n"] {
            assert_eq!(
                problems(&format!("[KMS]\nAuthType = \"instance_identity\"\n{no_arn}")),
                "line 2: [KMS] AuthType = \"instance_identity\": needs AapArn too: the application access point to ask"
            );
        }
        let wrong_arn = problems("[KMS]\nAuthType = \"instance_identity\"\nAapArn = \"x\"\n");
        assert!(
            wrong_arn.starts_with("line 3: [KMS] AapArn") && !wrong_arn.contains('\n'),
            "one problem: {wrong_arn}"
        );
    }

    #[test]
    fn application_access_points() {
        let text = "acs:kms:cn-hangzhou:1234567890123456:applicationaccesspoint/App_1.a-b";
        let arn = with("KMS", "AapArn", format!("\"{text}\"")).unwrap().kms.aap_arn.unwrap();
        assert_eq!(
            (&*arn.region, &*arn.account, &*arn.name),
            ("cn-hangzhou", "1234567890123456", "App_1.a-b")
        );
        assert_eq!(arn.as_str(), text);
        assert_eq!(with("KMS", "AapArn", "\"\"").unwrap().kms.aap_arn, None);
        let of = |region: &str, account: &str, name: &str| {
            AapArn::parse(&format!("acs:kms:{region}:{account}:applicationaccesspoint/{name}"))
        };
        let (r32, a20, n128) = ("r".repeat(32), "1".repeat(20), "n".repeat(128));
        assert!(of(&r32, &a20, &n128).is_ok());
        for (region, account, name) in [
            ("", "1", "n"),
            ("r", "", "n"),
            ("r", "1", ""),
            ("R", "1", "n"),
            ("r", "x", "n"),
            ("r", "1", "a/b"),
            ("r", "1", "a:b"),
            (&*format!("{r32}r"), "1", "n"),
            ("r", &*format!("{a20}1"), "n"),
            ("r", "1", &*format!("{n128}n")),
        ] {
            assert!(of(region, account, name).is_err(), "{region} {account} {name}");
        }
        for bad in [
            "acs:kms",
            "acs:ram:r:1:applicationaccesspoint/n",
            "acs:kms:r:1:secret/n",
            "ACS:kms:r:1:applicationaccesspoint/n",
        ] {
            assert!(
                AapArn::parse(bad).unwrap_err().starts_with("must be acs:kms:<region>:<account>:"),
                "{bad}"
            );
        }
    }

    #[test]
    fn paths() {
        let ca_file =
            |text: &str| with("KMS", "CaFile", format!("\"{text}\"")).map(|config| config.kms.ca_file);
        assert_eq!(ca_file("ca/private.pem"), Ok(Some("ca/private.pem".into())), "as written");
        assert_eq!(ca_file(""), Ok(None));
        assert!(ca_file(&"x".repeat(4095)).is_ok());
        assert!(ca_file(&"x".repeat(4096)).unwrap_err().ends_with("must be a path of 1 to 4095 bytes"));
        assert!(ca_file("a\\u0000b").unwrap_err().ends_with("must be a path without control characters"));
        check(
            "Log",
            "LogPath",
            |config| config.log.path,
            [
                ("\"-\"", Ok(LogPath::Stderr)),
                ("'/var/log/kms-agent'", Ok(LogPath::Folder("/var/log/kms-agent".into()))),
                ("\"\"", Err("\"\": must be a folder, or \"-\" for standard error")),
                ("7", Err("7: must be a string in quotes and not a number")),
            ],
        );
    }

    #[test]
    fn log_levels() {
        check(
            "Log",
            "LogLevel",
            |config| config.log.level,
            [
                ("\"debug\"", Ok(LevelFilter::Debug)),
                ("\"INFO\"", Ok(LevelFilter::Info)),
                ("\"Warn\"", Ok(LevelFilter::Warn)),
                ("\"error\"", Ok(LevelFilter::Error)),
                ("\"trace\"", Err("\"trace\": must be debug, info, warn or error")),
                ("\"off\"", Err("\"off\": must be debug, info, warn or error")),
                ("\"\"", Err("\"\": must be debug, info, warn or error")),
            ],
        );
    }

    #[test]
    fn unknown_names_come_with_the_nearest_known_one() {
        for (text, expected) in [
            ("[Server]\nHttpPrt = 1", "line 2: [Server] HttpPrt: unknown key; did you mean HttpPort?"),
            (
                "[Server]\nPort = 1",
                "line 2: [Server] Port: unknown key; [Server] knows HttpPort, SSRFHeaders, SSRFEnvVariables, PathPrefix, MaxConn, ResponseType, IgnoreTransientErrors, AllowedHosts",
            ),
            ("[Server]\nhttp_port = 1", "line 2: [Server] http_port: unknown key; did you mean HttpPort?"),
            (
                "[Server]\nhttpport = 1",
                "line 2: [Server] httpport: unknown key; did you mean HttpPort? (upper and lower case matter)",
            ),
            ("[Server]\nTTLSeconds = 1", "line 2: [Server] TTLSeconds: unknown key; it belongs in [Cache]"),
            (
                "[Server]\nttlSecond = 1",
                "line 2: [Server] ttlSecond: unknown key; did you mean TTLSeconds in [Cache]?",
            ),
            ("[Log]\nLevel = 1", "line 2: [Log] Level: unknown key; did you mean LogLevel?"),
            (
                "[Log]\nxyz = 1",
                "line 2: [Log] xyz: unknown key; [Log] knows LogLevel, LogPath, LogFileSizeMB, LogBackupFiles",
            ),
            ("[Cache.CacheSizes]\nx = 1", "line 1: [Cache] CacheSizes: unknown key; did you mean CacheSize?"),
            ("\n[server]\n", "line 2: [server]: unknown section; did you mean [Server]?"),
            ("[Sever]\n", "line 1: [Sever]: unknown section; did you mean [Server]?"),
            (
                "[Storage]\n",
                "line 1: [Storage]: unknown section; the sections are [Server], [Cache], [KMS], [Log]",
            ),
            ("HttpPort = 1", "line 1: HttpPort: a key outside of any section; it belongs in [Server]"),
            (
                "httpPort = 1",
                "line 1: httpPort: a key outside of any section; did you mean HttpPort in [Server]?",
            ),
            (
                "x = 1",
                "line 1: x: a key outside of any section; the sections are [Server], [Cache], [KMS], [Log]",
            ),
            ("Server = 1", "line 1: [Server]: must be one section: a line [Server], its keys below it"),
            (
                "[[Log]]\nLogLevel = 'info'",
                "line 1: [Log]: must be one section: a line [Log], its keys below it",
            ),
            (
                "[Log]\n\"a\\nb\" = 1",
                "line 2: [Log] a…: unknown key; [Log] knows LogLevel, LogPath, LogFileSizeMB, LogBackupFiles",
            ),
        ] {
            assert_eq!(problems(text), expected, "{text}");
        }
    }

    #[test]
    fn the_value_of_an_unknown_key_is_not_shown() {
        for text in [
            "[KMS]\nAccessKeySecret = 'hunter2'",
            "AccessKeySecret = 'hunter2'",
            "[KMS]\nAccessKeySecret = hunter2",
        ] {
            assert!(!problems(text).contains("hunter2"), "{text}");
        }
    }

    #[test]
    fn all_problems_come_together_and_sorted() {
        let text = "\
# a comment
[Log]
LogLevel = 'verbose'

[Server]
HttpPort = 70000
SSRFHeaders = [
    'X-Good',
    'X Bad',
    'Host',
]
PathPrefix = v1
MaxCon = 3

[Storage]
[KMS]
AuthType = 'instance_identity'
";
        let lines: Vec<_> = parse(text)
            .unwrap_err()
            .iter()
            .map(|problem| (problem.line.unwrap(), problem.key.clone()))
            .collect();
        let expected = [
            (3, Some("[Log] LogLevel")),
            (6, Some("[Server] HttpPort")),
            (9, Some("[Server] SSRFHeaders")),
            (10, Some("[Server] SSRFHeaders")),
            (12, None),
            (13, Some("[Server] MaxCon")),
            (15, Some("[Storage]")),
            (17, Some("[KMS] AuthType")),
        ]
        .map(|(line, key)| (line, key.map(str::to_owned)));
        assert_eq!(lines, expected);
    }

    #[test]
    fn syntax_errors_have_their_line_once() {
        for (text, expected) in [
            ("[Server\nHttpPort = 1\n", "line 1: syntax error: unclosed table, expected `]`"),
            (
                "[Server]\nHttpPort =\nMaxConn = 3\n",
                "line 2: syntax error: string values must be quoted, expected literal string",
            ),
            ("[Server]\n\nHttpPort 12\n", "line 3: syntax error: key with no value, expected `=`"),
            (
                "[Server]\nPathPrefix = \"/v1/\nMaxConn = 3\n",
                "line 2: syntax error: invalid basic string, expected `\"`",
            ),
            ("[Server]\nMaxConn = 3\nMaxConn = 4\n", "line 3: syntax error at MaxConn: duplicate key"),
            ("[Log]\n[Cache]\n[Log]\n", "line 3: syntax error at Log: duplicate key"),
            (
                "[Server]\nSSRFHeaders = ['a',\nMaxConn = 3\nHttpPort = 4\n",
                "line 3: syntax error at MaxConn: string values must be quoted, expected literal string (within the value that begins in line 2)",
            ),
        ] {
            assert_eq!(problems(text), expected, "{text}");
        }
        let both =
            problems("[Server]\nMaxConn = many\nHttpPort = -1\nAllowedHosts = [1 2]\n[Cache]\nCacheSize = 0");
        let lines: Vec<_> =
            both.lines().map(|line| line.split(' ').take(3).collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(lines, ["line 2: syntax", "line 3: [Server]", "line 4: syntax", "line 6: [Cache]"]);
        let many = problems(&"=\n".repeat(1000));
        assert_eq!(many.lines().count(), SYNTAX_ERRORS_MAX);
    }

    #[test]
    fn any_text_is_taken() {
        let text = "[Server]\nHttpPort=0x1\nSSRFHeaders=['a',\"b\\u00e9\"]\n[KMS]\nEndpoint='[::1]:1'\n[[x]]\na.b={c=1}\n";
        for (offset, _) in text.char_indices() {
            let _ = parse(&text[..offset]);
            let _ = parse(&text[offset..]);
            for piece in ["\"", "'''", "[", "{", "=", "\n", "\0", "é", "\r", "#", "\u{2028}"] {
                let _ = parse(&format!("{}{piece}{}", &text[..offset], &text[offset..]));
            }
        }
        for nested in [
            "[".repeat(50_000),
            "a={".repeat(50_000),
            "a.".repeat(50_000),
            format!("a={}", "[".repeat(50_000)),
        ] {
            assert!(parse(&nested).is_err());
        }
        let long = format!("[Server]\n{}=1\nPathPrefix='{}'\n", "k".repeat(100_000), "ü".repeat(100_000));
        assert!(problems(&long).lines().all(|line| line.chars().count() < 400));
    }

    #[test]
    fn files_that_cannot_be_read_as_text() {
        let lines = |bytes: &[u8]| joined(&parse_bytes(bytes).unwrap_err());
        assert_eq!(lines(b"[Log]\n# \xff\n"), "line 2: must be UTF-8 text");
        assert_eq!(lines(&[b'\n'; 65537]), "must not be larger than 65536 bytes");
        assert!(parse_bytes(&[b'\n'; 65536]).is_ok());
    }

    #[test]
    fn load_says_which_file() {
        let path = std::env::temp_dir().join(format!("kms-agent-config-{}.toml", std::process::id()));
        let shown = path.display();
        let error = load(&path).unwrap_err().to_string();
        assert_eq!(error, format!("cannot read configuration {shown}: No such file or directory"));
        let of = |text: &str| {
            std::fs::write(&path, text).unwrap();
            let result = load(&path).map_err(|error| error.to_string());
            std::fs::remove_file(&path).unwrap();
            result
        };
        assert_eq!(of("[Server]\nHttpPort = 1\n").unwrap().server.http_port, 1);
        assert_eq!(
            of("[Server]\nHttpPort = 70000\n").unwrap_err(),
            format!(
                "1 problem in configuration {shown}:\n  line 2: [Server] HttpPort = 70000: must be 0 to 65535"
            )
        );
        let two = of("[Server]\nHttpPort = 70000\nMaxConn = 0\n").unwrap_err();
        assert_eq!(two.lines().count(), 3);
        assert!(two.starts_with(&format!("2 problems in configuration {shown}:\n")));
    }

    #[test]
    fn default_paths() {
        for (exe, expected) in [
            (
                "/usr/local/alibabacloudkmsagent/bin/kms-agent",
                Some("/usr/local/alibabacloudkmsagent/config.toml"),
            ),
            ("/bin/kms-agent", Some("/config.toml")),
            ("bin/kms-agent", Some("config.toml")),
            ("/kms-agent", None),
            ("kms-agent", None),
            ("", None),
        ] {
            assert_eq!(default_path(Path::new(exe)), expected.map(PathBuf::from), "{exe}");
        }
    }
}
