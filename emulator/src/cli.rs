//! Arguments and the secrets file.

use kms_emulator::{MetadataFault, MetadataMode, NewSecret, Options, SecretType, Throttle};
use lexopt::prelude::*;
use serde_json::Value as Json;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(crate) const HELP: &str = "\
kms-emulator - Alibaba Cloud KMS, STS and an ECS metadata service on this host, for trying and testing
kms-agent. It keeps secrets in memory and checks signatures as KMS does. It understands only signature
V3 (ACS3-HMAC-SHA256), not the older RPC signature of some SDKs. It is not for production.

Usage: kms-emulator [OPTIONS]

Services
  --kms-port PORT          KMS and STS over TLS, on one port [default: 0, any free port]
  --kms-address IP         address they listen on [default: 127.0.0.1]
  --metadata-port PORT     metadata service [default: 0, any free port]
  --metadata-address IP    address it listens on [default: 127.0.0.1]
  --region ID              region id [default: cn-hangzhou]
  --ca-out FILE            write the CA certificate here and keep it
                           [default: a temporary file, removed at the end]

Who gets in
  --role NAME              RAM role of the instance; an empty name means no role [default: EcsRamRoleKms]
  --no-role                the instance has no RAM role, so its credentials are answered with 404
  --aap NAME               application access point that trusts the instance identity (repeatable)
                           [default: kms-agent]
  --oidc-token TOKEN       the OIDC token that AssumeRoleWithOIDC accepts for the role KmsAgentOidcRole and
                           the provider ack-rrsa-emulator [default: emulator-oidc-token]
  --access-key ID:SECRET   also accept this long-term access key (repeatable)
  Credentials are also served at the credentials URI http://<metadata service>/credentials-uri.

Secrets
  --secrets FILE           JSON object: secret name -> text, or an object with
                           SecretData        the value, base64 if binary; without it an ECS secret gets
                                             a random one
                           SecretDataType    text or binary [default: text]
                           SecretType        Generic, Rds, Redis, RAMCredentials, ECS, PolarDB
                                             [default: Generic]
                           ExtendedConfig    what the type needs, as an object or as text
                           VersionId         [default: a random one]
                           RotationInterval  the secret rotates this often, for example 604800s
                           Description       what DescribeSecret shows

Trouble
  --latency MS             KMS and STS answer every request this much later
  --fail NAME=STATUS:CODE  requests for this secret fail (repeatable),
                           for example --fail db=403:Forbidden.NoPermission
  --throttle QPS           more requests a second than this get 429 Rejected.Throttling
  --metadata-mode MODE     normal: plain GETs work; hardened: they need session tokens [default: normal]
  --metadata-down          the metadata service refuses connections
  --clock-offset S         the emulator's clock is S seconds ahead of the host's (negative: behind)

  -h, --help               print this help
  -V, --version            print the version

Example
  echo '{\"agent-test\": \"hello\"}' > secrets.json
  kms-emulator --secrets secrets.json
It prints a configuration file for kms-agent with its addresses.
";

/// What the arguments ask for.
#[derive(Debug)]
pub(crate) enum Command {
    Help,
    Version,
    Run(Box<Settings>),
}

#[derive(Debug, Default)]
pub(crate) struct Settings {
    pub(crate) options: Options,
    /// Application access points; those given replace the default one.
    aaps: Vec<String>,
    /// Secret name, status, code.
    pub(crate) failures: Vec<(String, u16, String)>,
    pub(crate) ca_out: Option<PathBuf>,
}

/// Reads the arguments (without the program's name). The error is one line for the user.
pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, String> {
    let mut settings = Settings::default();
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next().map_err(|e| e.to_string())? {
        let flag = match arg {
            Short('h') | Long("help") => return Ok(Command::Help),
            Short('V') | Long("version") => return Ok(Command::Version),
            Long("metadata-down") => {
                settings.options.metadata_fault = Some(MetadataFault::Refuse);
                continue;
            }
            Long("no-role") => {
                settings.options.role = None;
                continue;
            }
            Long(name) if TAKE_A_VALUE.contains(&name) => name.to_owned(),
            other => return Err(other.unexpected().to_string()),
        };
        let value = parser.value().map_err(|e| e.to_string())?;
        let value = value.to_str().ok_or_else(|| format!("--{flag}: the value is not UTF-8 text"))?;
        set(&mut settings, &flag, value).map_err(|why| format!("--{flag} {value}: {why}"))?;
    }
    if !settings.aaps.is_empty() {
        settings.options.aaps = std::mem::take(&mut settings.aaps);
    }
    Ok(Command::Run(Box::new(settings)))
}

const TAKE_A_VALUE: [&str; 16] = [
    "kms-port",
    "kms-address",
    "metadata-port",
    "metadata-address",
    "region",
    "role",
    "aap",
    "oidc-token",
    "access-key",
    "ca-out",
    "secrets",
    "latency",
    "fail",
    "throttle",
    "metadata-mode",
    "clock-offset",
];

fn set(settings: &mut Settings, flag: &str, value: &str) -> Result<(), String> {
    let options = &mut settings.options;
    match flag {
        "kms-port" => options.kms_port = number(value, "a port, 0 to 65535")?,
        "kms-address" => options.kms_address = number(value, "an IP address")?,
        "metadata-address" => options.metadata_address = number(value, "an IP address")?,
        "metadata-port" => options.metadata_port = number(value, "a port, 0 to 65535")?,
        "region" if !is_label(value) => return Err("expected a region id such as cn-hangzhou".to_owned()),
        "region" => options.region = value.to_owned(),
        "role" | "aap" if value.contains('/') => return Err("expected a name without /".to_owned()),
        "role" => options.role = Some(value.to_owned()).filter(|name| !name.is_empty()),
        "aap" if value.is_empty() => return Err("expected a name".to_owned()),
        "aap" => settings.aaps.push(value.to_owned()),
        "oidc-token" if value.is_empty() => return Err("expected a token".to_owned()),
        "oidc-token" => options.oidc_token = Some(value.to_owned()),
        "access-key" => {
            let (id, secret) = value.split_once(':').unwrap_or_default();
            if id.is_empty() || secret.is_empty() {
                return Err("expected ID:SECRET".to_owned());
            }
            options.access_keys.push((id.to_owned(), secret.to_owned()));
        }
        "ca-out" => settings.ca_out = Some(PathBuf::from(value)),
        "secrets" => options.secrets.extend(read_secrets(Path::new(value))?),
        "latency" => options.latency = Duration::from_millis(number::<u32>(value, "milliseconds")?.into()),
        "fail" => settings.failures.push(failure(value)?),
        "throttle" => options.throttle = Some(Throttle::qps(number(value, "requests a second")?)),
        "metadata-mode" => {
            options.metadata_mode = match value {
                "normal" => MetadataMode::Normal,
                "hardened" => MetadataMode::Hardened,
                _ => return Err("expected normal or hardened".to_owned()),
            }
        }
        _ => options.clock_offset_s = i64::from(number::<i32>(value, "seconds")?),
    }
    Ok(())
}

/// A number or an address.
fn number<T: std::str::FromStr>(text: &str, what: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("expected {what}"))
}

fn is_label(text: &str) -> bool {
    (1..=40).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// `NAME=STATUS:CODE`; the name may hold `=`, so the last one counts.
fn failure(text: &str) -> Result<(String, u16, String), String> {
    let expected = || "expected NAME=STATUS:CODE with a status from 400 to 599".to_owned();
    let (name, rest) = text.rsplit_once('=').ok_or_else(expected)?;
    let (status, code) = rest.split_once(':').ok_or_else(expected)?;
    let status = status.parse().ok().filter(|s| (400..=599).contains(s)).ok_or_else(expected)?;
    if name.is_empty() || code.is_empty() {
        return Err(expected());
    }
    Ok((name.to_owned(), status, code.to_owned()))
}

fn read_secrets(path: &Path) -> Result<Vec<NewSecret>, String> {
    let text = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
    secrets_from_json(&text)
}

fn secrets_from_json(text: &str) -> Result<Vec<NewSecret>, String> {
    let file: Json = serde_json::from_str(text).map_err(|e| format!("the file is not JSON: {e}"))?;
    let object = file.as_object().ok_or("expected a JSON object from secret names to values")?;
    object
        .iter()
        .map(|(name, value)| secret(name, value).map_err(|why| format!("secret {name}: {why}")))
        .collect()
}

fn secret(name: &str, value: &Json) -> Result<NewSecret, String> {
    if let Json::String(data) = value {
        return Ok(NewSecret::generic(name, data));
    }
    let fields = value.as_object().ok_or("expected text or an object with SecretData")?;
    let mut new = NewSecret::generic(name, "");
    for (field, value) in fields {
        let text = || value.as_str().map(str::to_owned).ok_or_else(|| format!("{field} must be text"));
        match field.as_str() {
            "SecretData" => new.data = text()?,
            "VersionId" => new.version_id = Some(text()?),
            "Description" => new.description = text()?,
            "ExtendedConfig" => {
                new.extended_config = Some(value.as_str().map_or(value.to_string(), str::to_owned))
            }
            "SecretType" => {
                new.secret_type = SecretType::parse(&text()?)
                    .ok_or("SecretType must be Generic, Rds, Redis, RAMCredentials, ECS or PolarDB")?
            }
            "SecretDataType" => {
                new.binary = match text()?.as_str() {
                    "text" => false,
                    "binary" => true,
                    _ => return Err("SecretDataType must be text or binary".to_owned()),
                }
            }
            "RotationInterval" => {
                let seconds = text()?.strip_suffix('s').and_then(|s| s.parse().ok());
                new.rotation_interval_s = Some(seconds.ok_or("RotationInterval must look like 604800s")?);
            }
            _ => {
                return Err(format!(
                    "unknown field {field}; a value that is JSON itself must be given as text"
                ));
            }
        }
    }
    Ok(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(args: &[&str]) -> Result<Settings, String> {
        match parse(args.iter().map(OsString::from))? {
            Command::Run(settings) => Ok(*settings),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_reach_the_options() {
        let s = run(&[
            "--kms-port=7001",
            "--role",
            "r",
            "--access-key",
            "AK:s:x",
            "--fail",
            "a=b=404:Forbidden.ResourceNotFound",
            "--clock-offset=-3600",
            "--throttle",
            "5",
            "--metadata-mode",
            "hardened",
            "--metadata-down",
            "--latency",
            "250",
            "--aap=a",
            "--aap=b",
            "--oidc-token=t",
            "--metadata-address=100.100.100.200",
        ])
        .expect("valid");
        assert_eq!(s.options.role.as_deref(), Some("r"));
        assert_eq!(
            (s.options.aaps, s.options.oidc_token.as_deref()),
            (vec!["a".into(), "b".into()], Some("t"))
        );
        assert_eq!(s.options.metadata_address.to_string(), "100.100.100.200");
        assert_eq!((s.options.kms_port, s.options.clock_offset_s), (7001, -3600));
        assert_eq!(s.options.access_keys, [("AK".to_owned(), "s:x".to_owned())]);
        assert_eq!(s.failures, [("a=b".to_owned(), 404, "Forbidden.ResourceNotFound".to_owned())]);
        assert_eq!(s.options.metadata_mode, MetadataMode::Hardened);
        assert_eq!(s.options.metadata_fault, Some(MetadataFault::Refuse));
        assert_eq!(s.options.latency, Duration::from_millis(250));
        assert_eq!(s.options.throttle, Some(Throttle::qps(5)));
    }

    #[test]
    fn an_instance_may_have_no_role() {
        for args in [&["--no-role"][..], &["--role", ""]] {
            assert_eq!(run(args).expect("valid").options.role, None);
        }
    }

    #[test]
    fn every_flag_of_the_help_is_known_and_the_other_way_round() {
        for flag in TAKE_A_VALUE {
            assert!(HELP.contains(&format!("  --{flag} ")), "--{flag} is not in the help");
        }
        let named = HELP.lines().filter_map(|line| line.strip_prefix("  --")).count();
        assert_eq!(named, TAKE_A_VALUE.len() + 2);
    }

    #[test]
    fn wrong_usage_is_told_in_a_line() {
        for (args, part) in [
            (vec!["--kms-port", "70000"], "--kms-port 70000: expected a port"),
            (vec!["--kms-address", "here"], "--kms-address here: expected an IP address"),
            (vec!["--fail", "x"], "NAME=STATUS:CODE"),
            (vec!["--nope"], "--nope"),
            (vec!["stray"], "stray"),
            (vec!["--role"], "--role"),
            (vec!["--secrets", "/nonexistent.json"], "--secrets /nonexistent.json: No such file"),
        ] {
            let message = run(&args).expect_err("wrong");
            assert!(message.contains(part) && !message.contains('\n'), "{message}");
        }
    }

    #[test]
    fn secrets_come_as_text_or_as_objects() {
        let all = secrets_from_json(
            r#"{"a":"1","b":{"SecretData":"Zm9v","SecretDataType":"binary"},
                "acs/ecs/i":{"SecretType":"ECS","ExtendedConfig":{"SecretSubType":"SSHKey"}}}"#,
        )
        .expect("valid");
        assert_eq!(all[0], NewSecret::generic("a", "1"));
        assert_eq!(all[2], NewSecret::binary("b", "Zm9v"));
        assert_eq!(all[1].extended_config.as_deref(), Some(r#"{"SecretSubType":"SSHKey"}"#));
        assert_eq!(
            secrets_from_json(r#"{"a":{"Data":"x"}}"#),
            Err("secret a: unknown field Data; a value that is JSON itself must be given as text".to_owned())
        );
    }
}
