//! The secrets and their life: create, new versions, rotation by hand and by schedule, deletion, restoration.

use super::error::KmsError;
use crate::json::Object;
use crate::random;
use crate::rsa_key::{self, RsaKeyPair};
use serde_json::Value;
use std::collections::BTreeMap;

/// A value has at most this many bytes.
pub const SECRET_DATA_BYTES_MAX: usize = 30_720;
/// A secret keeps this many versions; the oldest that carry no stage go first.
const VERSIONS_MAX: usize = 10;
/// The longest name. The protocol page says 64, the SDK of 2025 says 192: the wider one is obeyed.
const NAME_CHARS_MAX: usize = 192;
const DAY_S: i64 = 86_400;
/// Rotation intervals, 6 hours to 365 days.
const ROTATION_S: std::ops::RangeInclusive<i64> = 6 * 3600..=365 * DAY_S;

pub(crate) const CURRENT: &str = "ACSCurrent";
pub(crate) const PREVIOUS: &str = "ACSPrevious";

/// `SecretType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub enum SecretType {
    #[default]
    Generic,
    Rds,
    Redis,
    RamCredentials,
    Ecs,
    PolarDb,
}

impl SecretType {
    const NAMES: [(SecretType, &'static str); 6] = [
        (SecretType::Generic, "Generic"),
        (SecretType::Rds, "Rds"),
        (SecretType::Redis, "Redis"),
        (SecretType::RamCredentials, "RAMCredentials"),
        (SecretType::Ecs, "ECS"),
        (SecretType::PolarDb, "PolarDB"),
    ];

    /// As KMS writes it.
    pub fn as_str(self) -> &'static str {
        Self::NAMES.iter().find(|(kind, _)| *kind == self).map_or("Generic", |(_, name)| name)
    }

    /// The reverse of [`SecretType::as_str`].
    pub fn parse(name: &str) -> Option<SecretType> {
        Self::NAMES.iter().find(|(_, known)| *known == name).map(|(kind, _)| *kind)
    }
}

/// A secret to be created. Start from one of the constructors and change what differs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NewSecret {
    /// `SecretName`.
    pub name: String,
    /// `SecretData`, at most [`SECRET_DATA_BYTES_MAX`] bytes; base64 when `binary`. Empty for an ECS secret:
    /// made as a rotation would make it.
    pub data: String,
    /// `SecretDataType` is `binary`, else `text`.
    pub binary: bool,
    /// `SecretType`.
    pub secret_type: SecretType,
    /// `VersionId`; `None`: made up.
    pub version_id: Option<String>,
    /// `ExtendedConfig`: a JSON object as text; only for types other than Generic.
    pub extended_config: Option<String>,
    /// Rotate by schedule every so many seconds.
    pub rotation_interval_s: Option<i64>,
    /// `Description`.
    pub description: String,
}

impl NewSecret {
    /// A Generic secret with text in it.
    pub fn generic(name: &str, data: &str) -> NewSecret {
        NewSecret { name: name.to_owned(), data: data.to_owned(), ..NewSecret::default() }
    }

    /// A Generic secret with bytes in it, given as base64.
    pub fn binary(name: &str, base64: &str) -> NewSecret {
        NewSecret { binary: true, ..NewSecret::generic(name, base64) }
    }

    /// An ECS secret that holds a password: `{"UserName":"..","Password":".."}`.
    pub fn ecs_password(name: &str, instance: &str, user: &str, password: &str) -> NewSecret {
        NewSecret::ecs(name, instance, "Password", password_data(user, password))
    }

    /// An ECS secret that holds an RSA-2048 key pair, made on creation:
    /// `{"UserName":"..","PublicKey":"ssh-rsa ..","PrivateKey":"-----BEGIN RSA PRIVATE KEY-----.."}`.
    pub fn ecs_key_pair(name: &str, instance: &str, user: &str) -> NewSecret {
        NewSecret::ecs(name, instance, "SSHKey", Object::default().text("UserName", user).end())
    }

    fn ecs(name: &str, instance: &str, sub_type: &str, data: String) -> NewSecret {
        let config = Object::default()
            .text("SecretSubType", sub_type)
            .text("RegionId", "cn-hangzhou")
            .text("InstanceId", instance)
            .raw("CustomData", "{}");
        NewSecret {
            secret_type: SecretType::Ecs,
            extended_config: Some(config.end()),
            ..NewSecret::generic(name, &data)
        }
    }
}

/// One version of a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// `VersionId`.
    pub id: String,
    /// `SecretData`.
    pub data: String,
    /// `SecretDataType` is `binary`.
    pub binary: bool,
    /// Stages it carries.
    pub stages: Vec<String>,
    /// When it was made, Unix seconds.
    pub created: i64,
}

/// A rotation by schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    /// Seconds from one rotation to the next.
    pub interval_s: i64,
    /// The next one, Unix seconds.
    pub next: i64,
}

/// A secret as the emulator keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Secret {
    /// `SecretName`.
    pub name: String,
    /// `SecretType`.
    pub secret_type: SecretType,
    /// `ExtendedConfig`.
    pub extended_config: Option<String>,
    /// `Description`.
    pub description: String,
    /// `CreateTime`, Unix seconds.
    pub created: i64,
    /// `UpdateTime`, Unix seconds.
    pub updated: i64,
    /// `LastRotationDate`, Unix seconds.
    pub last_rotation: Option<i64>,
    /// Rotation by schedule, when it is on.
    pub schedule: Option<Schedule>,
    /// `PlannedDeleteTime`, Unix seconds, when deletion is planned.
    pub planned_delete: Option<i64>,
    /// All versions, oldest first.
    pub versions: Vec<Version>,
}

impl Secret {
    /// The version that carries `stage`.
    pub fn at_stage(&self, stage: &str) -> Option<&Version> {
        self.versions.iter().find(|v| v.stages.iter().any(|s| s == stage))
    }

    fn version(&self, id: &str) -> Option<&Version> {
        self.versions.iter().find(|v| v.id == id)
    }

    /// Managed secrets know only ACSCurrent and ACSPrevious and are rotated, not put.
    pub(crate) fn is_managed(&self) -> bool {
        self.secret_type != SecretType::Generic
    }

    fn holds_key_pair(&self) -> bool {
        let config = self.extended_config.as_deref().and_then(|c| serde_json::from_str::<Value>(c).ok());
        config.is_some_and(|c| c.get("SecretSubType").and_then(Value::as_str) == Some("SSHKey"))
    }

    /// Moves `stage` to the version `id`. Who loses ACSCurrent gets ACSPrevious, from whoever had that.
    fn move_stage(&mut self, stage: &str, id: &str) {
        let holder = self.at_stage(stage).map(|v| v.id.clone());
        if holder.as_deref() == Some(id) {
            return;
        }
        for version in &mut self.versions {
            version.stages.retain(|s| s != stage);
            if version.id == id {
                version.stages.push(stage.to_owned());
            }
        }
        if let (CURRENT, Some(old)) = (stage, holder) {
            self.move_stage(PREVIOUS, &old);
        }
    }

    fn add_version(&mut self, id: &str, data: String, binary: bool, stages: &[&str], now: i64) {
        self.versions.push(Version { id: id.to_owned(), data, binary, stages: Vec::new(), created: now });
        for stage in stages {
            self.move_stage(stage, id);
        }
        self.updated = now;
        while self.versions.len() > VERSIONS_MAX {
            let Some(oldest) = self.versions.iter().position(|v| v.stages.is_empty()) else { break };
            self.versions.remove(oldest);
        }
    }

    /// The value a rotation makes, in the form this type of secret has.
    fn generated_data(&self, key_pair: Option<RsaKeyPair>, now: i64) -> String {
        let current = self.at_stage(CURRENT).and_then(|v| serde_json::from_str::<Value>(&v.data).ok());
        let field = |name: &str| {
            let value = current.as_ref().and_then(|c| c.get(name)).and_then(Value::as_str);
            value.unwrap_or("root").to_owned()
        };
        match self.secret_type {
            SecretType::Generic => random::password(),
            SecretType::Ecs if self.holds_key_pair() => {
                let pair = key_pair.unwrap_or_else(rsa_key::generate);
                Object::default()
                    .text("UserName", &field("UserName"))
                    .text("PublicKey", &pair.public_openssh)
                    .text("PrivateKey", &pair.private_pem)
                    .end()
            }
            SecretType::Ecs => password_data(&field("UserName"), &random::password()),
            SecretType::Rds | SecretType::Redis | SecretType::PolarDb => Object::default()
                .text("AccountName", &field("AccountName"))
                .text("AccountPassword", &random::password())
                .end(),
            SecretType::RamCredentials => Object::default()
                .text("AccessKeyId", &format!("LTAI5t{}", random::alphanumeric(18)))
                .text("AccessKeySecret", &random::alphanumeric(30))
                .text("GenerateTimestamp", &crate::clock::iso8601(now))
                .end(),
        }
    }

    /// A custom value: the whole JSON object, or (ECS with a password) the password alone.
    fn custom_data(&self, custom: &str) -> String {
        let is_object = serde_json::from_str::<Value>(custom).is_ok_and(|v| v.is_object());
        if self.secret_type != SecretType::Ecs || self.holds_key_pair() || is_object {
            return custom.to_owned();
        }
        let current = self.at_stage(CURRENT).and_then(|v| serde_json::from_str::<Value>(&v.data).ok());
        let user = current.as_ref().and_then(|c| c.get("UserName")).and_then(Value::as_str);
        password_data(user.unwrap_or("root"), custom)
    }
}

fn password_data(user: &str, password: &str) -> String {
    Object::default().text("UserName", user).text("Password", password).end()
}

/// All secrets of one account in one region. Times are Unix seconds of the emulator's clock.
#[derive(Debug)]
pub(crate) struct Store {
    arn_prefix: String,
    secrets: BTreeMap<String, Secret>,
}

impl Store {
    pub(crate) fn new(region: &str, account: &str) -> Store {
        Store { arn_prefix: format!("acs:kms:{region}:{account}:secret/"), secrets: BTreeMap::new() }
    }

    pub(crate) fn arn(&self, name: &str) -> String {
        format!("{}{name}", self.arn_prefix)
    }

    fn bare<'a>(&self, id: &'a str) -> &'a str {
        id.strip_prefix(&self.arn_prefix).unwrap_or(id)
    }

    /// The secret of this name or ARN, planned for deletion or not.
    pub(crate) fn get(&self, id: &str) -> Result<&Secret, KmsError> {
        match self.secrets.get(self.bare(id)) {
            Some(secret) => Ok(secret),
            None if id.starts_with("acs:") || is_name(id) => Err(KmsError::not_found()),
            None => Err(KmsError::invalid("SecretName")),
        }
    }

    /// As [`Store::get`], refusing one that is planned for deletion.
    pub(crate) fn live(&self, id: &str) -> Result<&Secret, KmsError> {
        let secret = self.get(id)?;
        match secret.planned_delete {
            None => Ok(secret),
            Some(_) => Err(KmsError::new(
                409,
                "Rejected.ResourceInDeleteWindow",
                "The request was rejected because the resource is planned for deletion.",
            )),
        }
    }

    fn live_mut(&mut self, id: &str) -> Result<&mut Secret, KmsError> {
        self.live(id)?;
        self.any_mut(id)
    }

    fn any_mut(&mut self, id: &str) -> Result<&mut Secret, KmsError> {
        let name = self.bare(id).to_owned();
        self.secrets.get_mut(&name).ok_or_else(KmsError::not_found)
    }

    /// Whether a rotation of this secret would make a key pair, which is better done outside the lock.
    pub(crate) fn needs_key_pair(&self, id: &str) -> bool {
        self.get(id).is_ok_and(Secret::holds_key_pair)
    }

    pub(crate) fn version(
        &self,
        id: &str,
        stage: Option<&str>,
        version: Option<&str>,
    ) -> Result<(&Secret, &Version), KmsError> {
        let secret = self.live(id)?;
        let stage = stage.filter(|s| !s.is_empty());
        let version = version.filter(|v| !v.is_empty() && !secret.is_managed());
        if secret.is_managed() && stage.is_some_and(|s| s != CURRENT && s != PREVIOUS) {
            return Err(KmsError::invalid("VersionStage"));
        }
        let found = match (stage, version) {
            (stage, Some(version)) => secret
                .version(version)
                .filter(|v| stage.is_none_or(|stage| v.stages.iter().any(|s| s == stage))),
            (stage, None) => secret.at_stage(stage.unwrap_or(CURRENT)),
        };
        found.map(|version| (secret, version)).ok_or_else(KmsError::not_found)
    }

    pub(crate) fn create(&mut self, new: NewSecret, now: i64) -> Result<&Secret, KmsError> {
        check_data(&new.data, new.binary)?;
        if new.name.is_empty() || new.name.starts_with(&self.arn_prefix) {
            return Err(KmsError::invalid("SecretName"));
        }
        if self.secrets.contains_key(&new.name) {
            return Err(KmsError::exists());
        }
        let mut secret = Secret {
            name: new.name.clone(),
            secret_type: new.secret_type,
            extended_config: new.extended_config,
            description: new.description,
            created: now,
            updated: now,
            last_rotation: None,
            schedule: None,
            planned_delete: None,
            versions: Vec::new(),
        };
        if let Some(interval_s) = new.rotation_interval_s {
            secret.schedule = Some(schedule(interval_s, now)?);
        }
        let version_id = new.version_id.unwrap_or_else(|| random::hex(32));
        secret.add_version(&version_id, new.data, new.binary, &[CURRENT], now);
        // A key pair or password that was not given is made as a rotation would make it.
        let value = secret.at_stage(CURRENT).and_then(|v| serde_json::from_str::<Value>(&v.data).ok());
        let key_missing = secret.holds_key_pair() && value.is_none_or(|v| v.get("PrivateKey").is_none());
        if secret.secret_type == SecretType::Ecs && key_missing {
            let data = secret.generated_data(None, now);
            if let Some(version) = secret.versions.first_mut() {
                version.data = data;
            }
        }
        Ok(self.secrets.entry(new.name).insert_entry(secret).into_mut())
    }

    /// PutSecretValue. The same version id with the same value again is a success that changes nothing.
    pub(crate) fn put(
        &mut self,
        id: &str,
        version_id: &str,
        data: &str,
        binary: bool,
        stages: &[&str],
        now: i64,
    ) -> Result<&Version, KmsError> {
        check_data(data, binary)?;
        let secret = self.live_mut(id)?;
        if secret.is_managed() {
            return Err(KmsError::unsupported(
                "PutSecretValue does not support managed secrets; use RotateSecret.",
            ));
        }
        match secret.version(version_id) {
            None => secret.add_version(version_id, data.to_owned(), binary, stages, now),
            Some(known) if known.data == data && known.binary == binary => {}
            Some(_) => return Err(KmsError::exists()),
        }
        secret.version(version_id).ok_or_else(KmsError::not_found)
    }

    /// A new current value whatever the secret's type and state; creates a Generic one if there is none.
    pub(crate) fn force_put(&mut self, name: &str, data: &str, now: i64) -> String {
        let version_id = random::hex(32);
        let secret = self.secrets.entry(name.to_owned()).or_insert_with(|| Secret {
            name: name.to_owned(),
            secret_type: SecretType::Generic,
            extended_config: None,
            description: String::new(),
            created: now,
            updated: now,
            last_rotation: None,
            schedule: None,
            planned_delete: None,
            versions: Vec::new(),
        });
        secret.planned_delete = None;
        secret.add_version(&version_id, data.to_owned(), false, &[CURRENT], now);
        version_id
    }

    /// RotateSecret: ACSCurrent becomes ACSPrevious. A version id that exists already is a success that
    /// changes nothing, as KMS documents.
    pub(crate) fn rotate(
        &mut self,
        id: &str,
        version_id: &str,
        custom: Option<&str>,
        key_pair: Option<RsaKeyPair>,
        now: i64,
    ) -> Result<(), KmsError> {
        if let Some(custom) = custom {
            check_data(custom, false)?;
        }
        let secret = self.live_mut(id)?;
        if secret.version(version_id).is_some() {
            return Ok(());
        }
        let data = match custom {
            Some(custom) => secret.custom_data(custom),
            None => secret.generated_data(key_pair, now),
        };
        secret.add_version(version_id, data, false, &[CURRENT], now);
        secret.last_rotation = Some(now);
        if let Some(schedule) = &mut secret.schedule {
            schedule.next = now.saturating_add(schedule.interval_s);
        }
        Ok(())
    }

    /// Rotation by schedule on (every so many seconds) or off.
    pub(crate) fn set_rotation(
        &mut self,
        id: &str,
        interval_s: Option<i64>,
        now: i64,
    ) -> Result<(), KmsError> {
        let new = interval_s.map(|s| schedule(s, now)).transpose()?;
        self.live_mut(id)?.schedule = new;
        Ok(())
    }

    /// UpdateSecretVersionStage.
    pub(crate) fn update_stage(
        &mut self,
        id: &str,
        stage: &str,
        remove_from: Option<&str>,
        move_to: Option<&str>,
        now: i64,
    ) -> Result<(), KmsError> {
        let secret = self.live_mut(id)?;
        if secret.is_managed() {
            return Err(KmsError::unsupported("UpdateSecretVersionStage does not support managed secrets."));
        }
        let holder = secret.at_stage(stage).map(|v| v.id.clone());
        if remove_from.is_some() && holder.as_deref() != remove_from {
            return Err(KmsError::invalid("RemoveFromVersion"));
        }
        match (move_to, remove_from) {
            (Some(to), _) if secret.version(to).is_none() => return Err(KmsError::not_found()),
            (Some(to), _) => secret.move_stage(stage, to),
            // A secret is never left without a current value.
            (None, Some(_)) if stage == CURRENT => return Err(KmsError::invalid("MoveToVersion")),
            (None, Some(from)) => {
                for version in secret.versions.iter_mut().filter(|v| v.id == from) {
                    version.stages.retain(|s| s != stage);
                }
            }
            (None, None) => return Err(KmsError::missing("MoveToVersion")),
        }
        secret.updated = now;
        Ok(())
    }

    /// DeleteSecret after a window of 7 to 30 days. Gives PlannedDeleteTime.
    pub(crate) fn delete_later(&mut self, id: &str, days: i64, now: i64) -> Result<i64, KmsError> {
        if !(7..=30).contains(&days) {
            return Err(KmsError::invalid("RecoveryWindowInDays"));
        }
        let secret = self.live_mut(id)?;
        let at = now.saturating_add(days * DAY_S);
        secret.planned_delete = Some(at);
        secret.updated = now;
        Ok(at)
    }

    /// DeleteSecret with ForceDeleteWithoutRecovery, planned for deletion before or not.
    pub(crate) fn delete_now(&mut self, id: &str) -> Result<(), KmsError> {
        let name = self.get(id)?.name.clone();
        self.secrets.remove(&name);
        Ok(())
    }

    /// RestoreSecret. What KMS says to one that is not planned for deletion is not published.
    pub(crate) fn restore(&mut self, id: &str, now: i64) -> Result<(), KmsError> {
        self.get(id)?;
        let secret = self.any_mut(id)?;
        if secret.planned_delete.take().is_none() {
            return Err(KmsError::new(
                409,
                "Rejected.UnsupportedOperation",
                "The secret is not planned for deletion.",
            ));
        }
        secret.updated = now;
        Ok(())
    }

    /// What time does by itself: due rotations, and deletions whose window is over.
    pub(crate) fn tick(&mut self, now: i64) {
        self.secrets.retain(|_, secret| secret.planned_delete.is_none_or(|at| at > now));
        for secret in self.secrets.values_mut().filter(|s| s.planned_delete.is_none()) {
            let Some(Schedule { interval_s, next }) = secret.schedule.filter(|s| s.next <= now) else {
                continue;
            };
            // However many were missed while nobody asked, the last one is the one that counts.
            let missed = (now - next) / interval_s;
            let last = next + missed * interval_s;
            let data = secret.generated_data(None, last);
            secret.add_version(&random::hex(32), data, false, &[CURRENT], last);
            secret.last_rotation = Some(last);
            secret.schedule = Some(Schedule { interval_s, next: last + interval_s });
        }
    }
}

/// Library calls may rotate faster than KMS allows; the wire checks [`wire_interval`] first.
fn schedule(interval_s: i64, now: i64) -> Result<Schedule, KmsError> {
    if !(1..=*ROTATION_S.end()).contains(&interval_s) {
        return Err(KmsError::invalid("RotationInterval"));
    }
    Ok(Schedule { interval_s, next: now.saturating_add(interval_s) })
}

/// `RotationInterval` as the API takes it: `7d`, `168h`, `10080m` or `604800s`, from 6 hours to 365 days.
pub(crate) fn wire_interval(text: &str) -> Option<i64> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let scale = match unit {
        "d" => DAY_S,
        "h" => 3600,
        "m" => 60,
        "s" => 1,
        _ => return None,
    };
    number.parse::<u32>().ok().map(|n| i64::from(n) * scale).filter(|s| ROTATION_S.contains(s))
}

/// Letters, digits and `_/+=.@-`.
pub(crate) fn is_name(name: &str) -> bool {
    (1..=NAME_CHARS_MAX).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_/+=.@-".contains(&b))
}

fn check_data(data: &str, binary: bool) -> Result<(), KmsError> {
    use base64::{Engine, engine::general_purpose::STANDARD};
    if data.len() > SECRET_DATA_BYTES_MAX || binary && STANDARD.decode(data).is_err() {
        return Err(KmsError::invalid("SecretData"));
    }
    Ok(())
}
