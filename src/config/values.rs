//! What a single value has to look like. Each function reads a text, or says what is allowed.

use crate::log::LogPath;
use crate::text::{ROLE_NAME_BYTES_MAX, is_name_byte, is_role_name, is_token_byte};
use ::log::LevelFilter;
use std::fmt::{self, Display};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

/// Bytes of a header name in `SSRFHeaders`.
const HEADER_NAME_BYTES_MAX: usize = 128;
/// Bytes of a name in `SSRFEnvVariables`.
const ENV_NAME_BYTES_MAX: usize = 128;
/// Bytes of a host name (RFC 1123 2.1).
const HOST_BYTES_MAX: usize = 253;
/// Bytes of one label of a host name (RFC 1123 2.1).
const HOST_LABEL_BYTES_MAX: usize = 63;
/// Bytes of `PathPrefix`.
const PATH_PREFIX_BYTES_MAX: usize = 256;
/// Bytes of `Region`, also of the one in `AapArn`.
const REGION_BYTES_MAX: usize = 32;
/// Digits of the account in `AapArn` (accounts have 16 today).
const ACCOUNT_DIGITS_MAX: usize = 20;
/// Bytes of the access point's name in `AapArn`.
const AAP_NAME_BYTES_MAX: usize = 128;
/// Bytes of a path: Linux's `PATH_MAX` with its final zero.
const PATH_BYTES_MAX: usize = 4095;
/// Port of `Endpoint` where none is written.
pub const ENDPOINT_PORT: u16 = 443;
/// Port of `MetadataEndpoint` where none is written.
pub(super) const METADATA_PORT: u16 = 80;

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
            return Err(format!("{FORM}, without {scheme}://"));
        }
        if let Some((_, _)) = text.split_once(['/', '?', '#']) {
            return Err(format!("{FORM}, without a path or anything else after it"));
        }
        let (host, port) = match (text.starts_with('['), text.rsplit_once(':')) {
            (true, Some((host, port))) if host.ends_with(']') => (host, Some(port)),
            (false, Some((host, _))) if host.contains(':') => {
                return Err(format!("{FORM}, and an IPv6 address must be in brackets: [::1]:{default_port}"));
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
                .ok_or_else(|| format!("{FORM}, and the port must be 1 to 65535"))?,
        };
        Ok(HostPort { host: read_host(host)?, port })
    }

    /// KMS's endpoint in a region's VPCs: `kms-vpc.<region>.aliyuncs.com`.
    pub(crate) fn kms_in(region: &str) -> HostPort {
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
    pub(crate) region: String,
    pub(crate) account: String,
    /// Name of the access point: 1 to 128 letters, digits, dots, `_` or `-`.
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
            "must be acs:kms:<region>:<account>:applicationaccesspoint/<name>, with your own values in place of <..>".to_owned()
        })
    }

    /// The whole ARN, as written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// `true` for 1 to `bytes_max` bytes that all satisfy `allowed`.
pub(super) fn consists_of(text: &str, bytes_max: usize, allowed: impl Fn(u8) -> bool) -> bool {
    (1..=bytes_max).contains(&text.len()) && text.bytes().all(allowed)
}

pub(super) fn is_region(text: &str) -> bool {
    consists_of(text, REGION_BYTES_MAX, |byte| {
        byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-'
    })
}

/// A header that may carry the token: an RFC 9110 5.6.2 token.
pub(super) fn read_header(text: &str) -> Result<String, String> {
    /// What HTTP itself or the gates before the token's read from these is not a token.
    const TAKEN: [&str; 6] =
        ["Host", "Connection", "Content-Length", "Transfer-Encoding", "Forwarded", "X-Forwarded-For"];
    if !consists_of(text, HEADER_NAME_BYTES_MAX, is_token_byte) {
        return Err(format!(
            "must be a header name: 1 to {HEADER_NAME_BYTES_MAX} letters, digits or !#$%&'*+-.^_`|~"
        ));
    }
    if TAKEN.iter().any(|taken| taken.eq_ignore_ascii_case(text)) {
        return Err(format!(
            "cannot carry the token, because HTTP or the agent itself uses it. Choose another header than {}",
            TAKEN.join(", ")
        ));
    }
    Ok(text.to_owned())
}

pub(super) fn read_env_name(text: &str) -> Result<String, String> {
    let valid = consists_of(text, ENV_NAME_BYTES_MAX, |byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && !text.starts_with(|c: char| c.is_ascii_digit());
    if valid {
        Ok(text.to_owned())
    } else {
        Err(format!(
            "must be the name of an environment variable: 1 to {ENV_NAME_BYTES_MAX} letters, digits or _, and the first one no digit"
        ))
    }
}

/// Path characters of RFC 3986 3.3 other than percent-encoded ones.
pub(super) fn read_path_prefix(text: &str) -> Result<String, String> {
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
pub(super) fn read_host(text: &str) -> Result<String, String> {
    let must = |what: &str| Err(format!("must be a host name or an IP address: {what}"));
    if let Some(inner) = text.strip_prefix('[') {
        return match inner.strip_suffix(']').map(str::parse::<Ipv6Addr>) {
            Some(Ok(address)) => Ok(address.to_string()),
            _ => must("this is not an IPv6 address in brackets"),
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
        must("a name has letters, digits and hyphens between dots")
    } else if text.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()))
        && text.parse::<Ipv4Addr>().is_err()
    {
        must("this is not an IPv4 address")
    } else {
        Ok(text.to_ascii_lowercase())
    }
}

pub(super) fn read_allowed_host(text: &str) -> Result<String, String> {
    let is_ipv6 = text.parse::<Ipv6Addr>().is_ok() || (text.starts_with('[') && text.ends_with(']'));
    if text.contains('*') {
        Err("must be a whole host name: wildcards (*) are not supported".to_owned())
    } else if text.contains("://") || text.contains('/') {
        Err("must be a host name or an IP address alone, without a scheme or a path".to_owned())
    } else if text.contains(':') && !is_ipv6 {
        Err("must be a host name or an IP address alone, without a port".to_owned())
    } else {
        read_host(text)
    }
}

pub(super) fn read_region(text: &str) -> Result<String, String> {
    if is_region(text) {
        Ok(text.to_owned())
    } else {
        Err(format!(
            "must be a region id such as cn-hangzhou: 1 to {REGION_BYTES_MAX} of a-z, 0-9 and -; or \"\""
        ))
    }
}

pub(super) fn read_auth_type(text: &str) -> Result<AuthType, String> {
    match text {
        "auto" => Ok(AuthType::Auto),
        "ram_role" => Ok(AuthType::RamRole),
        "instance_identity" => Ok(AuthType::InstanceIdentity),
        "access_key" => Ok(AuthType::AccessKey),
        "oidc" => Ok(AuthType::Oidc),
        _ => Err("must be auto, ram_role, instance_identity, access_key or oidc".to_owned()),
    }
}

pub(super) fn read_role_name(text: &str) -> Result<String, String> {
    if is_role_name(text) {
        Ok(text.to_owned())
    } else {
        Err(format!(
            "must be the name of a RAM role: 1 to {ROLE_NAME_BYTES_MAX} of A-Z, a-z, 0-9, . _ -; or \"\""
        ))
    }
}

pub(super) fn read_path(text: &str) -> Result<PathBuf, String> {
    if text.chars().any(char::is_control) {
        Err("must be a path without control characters".to_owned())
    } else if !(1..=PATH_BYTES_MAX).contains(&text.len()) {
        Err(format!("must be a path of 1 to {PATH_BYTES_MAX} bytes"))
    } else {
        Ok(PathBuf::from(text))
    }
}

pub(super) fn read_metadata_endpoint(text: &str) -> Result<HostPort, String> {
    if text.starts_with("https://") {
        return Err("must begin with http://: the metadata service does not use TLS".to_owned());
    }
    let Some(rest) = text.strip_prefix("http://") else {
        return Err("must be http://host or http://host:port".to_owned());
    };
    HostPort::parse(rest.strip_suffix('/').unwrap_or(rest), METADATA_PORT)
        .map_err(|message| format!("what follows http:// {message}"))
}

pub(super) fn read_level(text: &str) -> Result<LevelFilter, String> {
    match text.to_ascii_lowercase().as_str() {
        "debug" => Ok(LevelFilter::Debug),
        "info" => Ok(LevelFilter::Info),
        "warn" => Ok(LevelFilter::Warn),
        "error" => Ok(LevelFilter::Error),
        _ => Err("must be debug, info, warn or error".to_owned()),
    }
}

pub(super) fn read_log_path(text: &str) -> Result<LogPath, String> {
    match text {
        "-" => Ok(LogPath::Stderr),
        "" => Err("must be a folder, or \"-\" for standard error".to_owned()),
        folder => read_path(folder).map(LogPath::Folder),
    }
}
