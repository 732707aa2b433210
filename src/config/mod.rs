//! The configuration file: TOML in, a [`Config`] out.
//!
//! [`parse`] is pure and reports every [`Problem`] of a file together, each with its line; of a file that is not TOML
//! only the first syntax errors, since the rest would be guesses. Sections, keys, defaults and ranges are those of
//! `docs/contract.md`, section 2; the ranges are constants here.
//! Key names are case-sensitive, every key is optional, unknown ones are problems.

mod names;
mod problem;
mod reader;
mod sections;
mod values;

pub(crate) use crate::log::LogPath;
pub use problem::{LoadError, Problem};
pub use sections::{Config, KmsSection, ResponseType, ServerSection};
pub use values::{AapArn, AuthType, ENDPOINT_PORT, HostPort};

use reader::{Case, Findings};
use std::fs::File;
use std::io::{self, Read as _};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use toml::de::DeTable;
use values::*;

/// Bytes of a configuration file that [`load`] reads.
const FILE_BYTES_MAX: u64 = 64 * 1024;
// Elements of the lists, then the ranges of the numbers.
const SSRF_HEADERS: RangeInclusive<usize> = 1..=8;
const SSRF_ENV_VARIABLES: RangeInclusive<usize> = 0..=16;
const ALLOWED_HOSTS: RangeInclusive<usize> = 0..=64;
const MAX_CONN: RangeInclusive<usize> = 1..=1000;
const CACHE_SIZE: RangeInclusive<usize> = 1..=1000;
/// `CacheBytes`: bytes of cached values, 64 KiB to 256 MiB.
const CACHE_BYTES: RangeInclusive<usize> = 65_536..=268_435_456;
/// `TTLSeconds`: seconds, up to a week; 0: nothing is cached.
const TTL_S: RangeInclusive<u64> = 0..=604_800;
/// `MaxStaleSeconds`: seconds past the TTL, up to a week.
const MAX_STALE_S: RangeInclusive<u64> = 0..=604_800;
/// `LogFileSizeMB`: MiB.
const LOG_FILE_SIZE_MB: RangeInclusive<u32> = 1..=1024;
const LOG_BACKUP_FILES: RangeInclusive<u32> = 0..=crate::log::BACKUP_FILES_MAX;

/// How the host name of a KMS instance ends. Its certificate is of KMS's private CA.
const INSTANCE_ENDPOINT: &str = ".cryptoservice.kms.aliyuncs.com";
const NEEDS_CA_FILE: &str = "also needs CaFile: a private CA of KMS issues the certificate of an instance. Download that \
    CA's certificate from the instance's page in the KMS console (or CaCertificateChainPem of GetKmsInstance) and name \
    the file in CaFile";
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
pub(crate) fn default_path(exe: &Path) -> Option<PathBuf> {
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
/// The first syntax errors, or else everything that is wrong in it, sorted by line.
pub fn parse(text: &str) -> Result<Config, Vec<Problem>> {
    let (root, syntax_errors) = DeTable::parse_recoverable(text);
    let root = root.get_ref();
    let mut findings = Findings::new(text);
    if !syntax_errors.is_empty() {
        findings.report_syntax(&syntax_errors);
        return Err(findings.into_problems());
    }
    findings.report_unknown(root);
    let mut config = Config::default();

    let (mut section, server) = (findings.section(root, "Server"), &mut config.server);
    section.integer("HttpPort", 0..=u16::MAX, &mut server.http_port);
    section.list("SSRFHeaders", SSRF_HEADERS, read_header, Case::Ignored, &mut server.ssrf_headers);
    let variables = &mut server.ssrf_env_variables;
    section.list("SSRFEnvVariables", SSRF_ENV_VARIABLES, read_env_name, Case::Matters, variables);
    section.text("PathPrefix", read_path_prefix, &mut server.path_prefix);
    section.integer("MaxConn", MAX_CONN, &mut server.max_conn);
    section.response_type("ResponseType", &mut server.response_type);
    section.boolean("IgnoreTransientErrors", &mut server.ignore_transient_errors);
    section.list("AllowedHosts", ALLOWED_HOSTS, read_allowed_host, Case::Ignored, &mut server.allowed_hosts);

    let (mut section, cache) = (findings.section(root, "Cache"), &mut config.cache);
    section.integer("CacheSize", CACHE_SIZE, &mut cache.size);
    section.integer("CacheBytes", CACHE_BYTES, &mut cache.bytes);
    section.seconds("TTLSeconds", TTL_S, &mut cache.ttl);
    section.seconds("MaxStaleSeconds", MAX_STALE_S, &mut cache.max_stale);

    let (mut section, kms) = (findings.section(root, "KMS"), &mut config.kms);
    section.optional("Region", read_region, &mut kms.region);
    section.optional("Endpoint", |text| HostPort::parse(text, ENDPOINT_PORT), &mut kms.endpoint);
    section.text("AuthType", read_auth_type, &mut kms.auth_type);
    section.optional("RoleName", read_role_name, &mut kms.role_name);
    section.optional("AapArn", AapArn::parse, &mut kms.aap_arn);
    section.optional("CaFile", read_path, &mut kms.ca_file);
    section.text("MetadataEndpoint", read_metadata_endpoint, &mut kms.metadata_endpoint);
    if kms.auth_type == AuthType::InstanceIdentity && section.is_unset("AapArn") {
        section.problem("AuthType", "also needs AapArn, which names the application access point".to_owned());
    }
    if let (Some(aap), Some(region)) = (&kms.aap_arn, &kms.region)
        && aap.region != *region
    {
        section.problem(
            "AapArn",
            format!("is in {}, but Region is {region}: both must name the same region", aap.region),
        );
    }
    let is_instance = kms.endpoint.as_ref().is_some_and(|it| it.host.ends_with(INSTANCE_ENDPOINT));
    if is_instance && section.is_unset("CaFile") {
        section.problem("Endpoint", NEEDS_CA_FILE.to_owned());
    }

    let (mut section, log) = (findings.section(root, "Log"), &mut config.log);
    section.text("LogLevel", read_level, &mut log.level);
    section.text("LogPath", read_log_path, &mut log.path);
    section.integer("LogFileSizeMB", LOG_FILE_SIZE_MB, &mut log.file_size_mb);
    section.integer("LogBackupFiles", LOG_BACKUP_FILES, &mut log.backup_files);

    let problems = findings.into_problems();
    if problems.is_empty() { Ok(config) } else { Err(problems) }
}

#[cfg(test)]
mod tests;
