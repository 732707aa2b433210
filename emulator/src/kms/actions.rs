//! The actions: parameters from the wire in, the documented JSON out.

use super::error::KmsError;
use super::secrets::{CURRENT, NewSecret, Secret, SecretType, Store, is_name, wire_interval};
use crate::clock::iso8601;
use crate::json::Object;
use crate::random;
use crate::rsa_key::RsaKeyPair;
use serde_json::Value;
use std::collections::BTreeMap;

/// Parameters of a call, from the query and the form body.
#[derive(Debug, Default)]
pub(crate) struct Params(BTreeMap<String, String>);

impl Params {
    /// Later pairs do not override earlier ones: the query comes first.
    pub(crate) fn collect(pairs: impl IntoIterator<Item = (Vec<u8>, Vec<u8>)>) -> Params {
        let mut all = BTreeMap::new();
        for (name, value) in pairs {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            all.entry(text(&name)).or_insert_with(|| text(&value));
        }
        Params(all)
    }

    /// An empty value counts as none, as RPC gateways treat it.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    pub(crate) fn need(&self, name: &str) -> Result<&str, KmsError> {
        self.get(name).ok_or_else(|| KmsError::missing(name))
    }

    fn flag(&self, name: &str) -> Result<bool, KmsError> {
        match self.get(name) {
            None => Ok(false),
            Some(text) if text.eq_ignore_ascii_case("true") => Ok(true),
            Some(text) if text.eq_ignore_ascii_case("false") => Ok(false),
            Some(_) => Err(KmsError::invalid(name)),
        }
    }

    fn number(&self, name: &str, default: u64) -> Result<u64, KmsError> {
        self.get(name).map_or(Ok(default), |text| text.parse().map_err(|_| KmsError::invalid(name)))
    }

    fn is_binary(&self) -> Result<bool, KmsError> {
        match self.get("SecretDataType") {
            None | Some("text") => Ok(false),
            Some("binary") => Ok(true),
            Some(_) => Err(KmsError::invalid("SecretDataType")),
        }
    }
}

/// Whether the call would rotate a secret to a new key pair, which takes long enough to be done beforehand.
pub(crate) fn wants_key_pair(store: &Store, action: &str, params: &Params) -> bool {
    action == "RotateSecret"
        && params.get("SecretData").is_none()
        && params.get("SecretName").is_some_and(|id| store.needs_key_pair(id))
}

/// What this KMS can do.
const ACTIONS: [&str; 10] = [
    "GetSecretValue",
    "CreateSecret",
    "PutSecretValue",
    "DescribeSecret",
    "ListSecretVersionIds",
    "RotateSecret",
    "UpdateSecretRotationPolicy",
    "UpdateSecretVersionStage",
    "DeleteSecret",
    "RestoreSecret",
];

/// Runs one action and gives the reply's JSON.
pub(crate) fn run(
    store: &mut Store,
    action: &str,
    params: &Params,
    key_pair: Option<RsaKeyPair>,
    now: i64,
) -> Result<String, KmsError> {
    if !ACTIONS.contains(&action) {
        return Err(KmsError::new(404, "InvalidAction.NotFound", "Specified api is not found."));
    }
    let id = params.need("SecretName")?;
    let fields = match action {
        "CreateSecret" => create_secret(store, id, params, now)?,
        "PutSecretValue" => put_secret_value(store, id, params, now)?,
        "DescribeSecret" => describe(store, store.get(id)?),
        "ListSecretVersionIds" => list_versions(store.get(id)?, params)?,
        "RotateSecret" => rotate_secret(store, id, params, key_pair, now)?,
        "UpdateSecretRotationPolicy" => update_rotation(store, id, params, now)?,
        "UpdateSecretVersionStage" => update_stage(store, id, params, now)?,
        "DeleteSecret" => delete_secret(store, id, params, now)?,
        "RestoreSecret" => restore_secret(store, id, now)?,
        _ => get_secret_value(store, id, params)?,
    };
    Ok(fields.text("RequestId", &random::uuid()).end())
}

fn get_secret_value(store: &Store, id: &str, params: &Params) -> Result<Object, KmsError> {
    let (secret, version) = store.version(id, params.get("VersionStage"), params.get("VersionId"))?;
    let fetch_config = params.flag("FetchExtendedConfig")?;
    let config = secret.extended_config.as_deref().filter(|_| secret.is_managed() && fetch_config);
    let fields = Object::default()
        .text("SecretName", &secret.name)
        .text("VersionId", &version.id)
        .text("SecretData", &version.data)
        .text("SecretDataType", if version.binary { "binary" } else { "text" })
        .text("SecretType", secret.secret_type.as_str())
        .list("VersionStages", "VersionStage", &version.stages)
        .maybe("ExtendedConfig", config);
    Ok(rotation_fields(fields, secret).text("CreateTime", &iso8601(secret.created)))
}

/// Managed secrets always tell; a Generic one only when a test gave it a schedule.
fn rotation_fields(fields: Object, secret: &Secret) -> Object {
    let enabled = match (secret.schedule, secret.is_managed()) {
        (Some(_), _) => Some("Enabled"),
        (None, true) => Some("Disabled"),
        (None, false) => None,
    };
    let interval = secret.schedule.map(|s| format!("{}s", s.interval_s));
    fields
        .maybe("AutomaticRotation", enabled)
        .maybe("RotationInterval", interval.as_deref())
        .maybe("LastRotationDate", secret.last_rotation.map(iso8601).as_deref())
        .maybe("NextRotationDate", secret.schedule.map(|s| iso8601(s.next)).as_deref())
}

fn create_secret(store: &mut Store, name: &str, params: &Params, now: i64) -> Result<Object, KmsError> {
    let secret_type = params.get("SecretType").map_or(Some(SecretType::Generic), SecretType::parse);
    let secret_type = secret_type.ok_or_else(|| KmsError::invalid("SecretType"))?;
    let managed = secret_type != SecretType::Generic;
    let right_prefix = name.starts_with("acs/ecs/") == (secret_type == SecretType::Ecs)
        && (managed || !name.starts_with("acs/"));
    if !is_name(name) || !right_prefix {
        return Err(KmsError::invalid("SecretName"));
    }
    let config = params.get("ExtendedConfig").filter(|_| managed);
    if managed && config.is_none() {
        return Err(KmsError::missing("ExtendedConfig"));
    }
    let parsed = config.map(serde_json::from_str::<Value>).transpose();
    let parsed = parsed.map_err(|_| KmsError::invalid("ExtendedConfig"))?;
    if secret_type == SecretType::Ecs {
        let part = |name: &str| parsed.as_ref().and_then(|c| c.get(name)).and_then(Value::as_str);
        let sub_type_known = matches!(part("SecretSubType"), Some("Password" | "SSHKey"));
        if !sub_type_known || part("InstanceId").is_none() || part("RegionId").is_none() {
            return Err(KmsError::invalid("ExtendedConfig"));
        }
    }
    let new = NewSecret {
        name: name.to_owned(),
        data: params.need("SecretData")?.to_owned(),
        binary: params.is_binary()?,
        secret_type,
        version_id: Some(params.need("VersionId")?.to_owned()),
        extended_config: config.map(str::to_owned),
        rotation_interval_s: wanted_interval(params, managed)?,
        description: params.get("Description").unwrap_or_default().to_owned(),
    };
    if managed && new.binary {
        return Err(KmsError::invalid("SecretDataType"));
    }
    let arn = store.arn(name);
    let secret = store.create(new, now)?;
    let version = secret.at_stage(CURRENT).map(|v| v.id.as_str());
    let fields = Object::default()
        .text("Arn", &arn)
        .text("SecretName", &secret.name)
        .maybe("VersionId", version)
        .text("SecretType", secret.secret_type.as_str())
        .maybe("ExtendedConfig", secret.extended_config.as_deref());
    Ok(rotation_fields(fields, secret))
}

/// EnableAutomaticRotation with RotationInterval; ignored for Generic secrets, as KMS documents.
fn wanted_interval(params: &Params, managed: bool) -> Result<Option<i64>, KmsError> {
    if !params.flag("EnableAutomaticRotation")? || !managed {
        return Ok(None);
    }
    let interval = wire_interval(params.need("RotationInterval")?);
    interval.map(Some).ok_or_else(|| KmsError::invalid("RotationInterval"))
}

fn put_secret_value(store: &mut Store, id: &str, params: &Params, now: i64) -> Result<Object, KmsError> {
    let stages: Vec<String> = match params.get("VersionStages") {
        None => vec![CURRENT.to_owned()],
        Some(text) => {
            let list = serde_json::from_str::<Value>(text).ok();
            let list = list.as_ref().and_then(Value::as_array).filter(|list| !list.is_empty());
            let names: Option<Vec<String>> =
                list.and_then(|list| list.iter().map(|s| s.as_str().map(str::to_owned)).collect());
            names.ok_or_else(|| KmsError::invalid("VersionStages"))?
        }
    };
    let stages: Vec<&str> = stages.iter().map(String::as_str).collect();
    let name = store.get(id)?.name.clone();
    let (version_id, data) = (params.need("VersionId")?, params.need("SecretData")?);
    let version = store.put(id, version_id, data, params.is_binary()?, &stages, now)?;
    Ok(Object::default().text("SecretName", &name).text("VersionId", &version.id).list(
        "VersionStages",
        "VersionStage",
        &version.stages,
    ))
}

fn describe(store: &Store, secret: &Secret) -> Object {
    let fields = Object::default()
        .text("Arn", &store.arn(&secret.name))
        .text("SecretName", &secret.name)
        .text("SecretType", secret.secret_type.as_str())
        .text("Description", &secret.description)
        .text("CreateTime", &iso8601(secret.created))
        .text("UpdateTime", &iso8601(secret.updated))
        .maybe("PlannedDeleteTime", secret.planned_delete.map(iso8601).as_deref())
        .maybe("ExtendedConfig", secret.extended_config.as_deref());
    rotation_fields(fields, secret)
}

fn list_versions(secret: &Secret, params: &Params) -> Result<Object, KmsError> {
    let page = params.number("PageNumber", 1)?;
    let size = params.number("PageSize", 10)?;
    if page == 0 || !(1..=100).contains(&size) {
        return Err(KmsError::invalid(if page == 0 { "PageNumber" } else { "PageSize" }));
    }
    let deprecated_too = params.flag("IncludeDeprecated")?;
    let shown: Vec<_> = secret.versions.iter().filter(|v| deprecated_too || !v.stages.is_empty()).collect();
    let skip = usize::try_from((page - 1).saturating_mul(size)).unwrap_or(usize::MAX);
    let take = usize::try_from(size).unwrap_or(usize::MAX);
    let items: Vec<String> = shown
        .iter()
        .skip(skip)
        .take(take)
        .map(|v| {
            Object::default()
                .text("VersionId", &v.id)
                .text("CreateTime", &iso8601(v.created))
                .list("VersionStages", "VersionStage", &v.stages)
                .end()
        })
        .collect();
    let list = Object::default().raw("VersionId", &format!("[{}]", items.join(","))).end();
    Ok(Object::default()
        .text("SecretName", &secret.name)
        .raw("VersionIds", &list)
        .number("PageNumber", page)
        .number("PageSize", size)
        .number("TotalCount", shown.len() as u64))
}

/// KMS's API rotates to a generated value only; the console also takes one. The emulator takes that value as
/// `SecretData`, which is its own addition.
fn rotate_secret(
    store: &mut Store,
    id: &str,
    params: &Params,
    key_pair: Option<RsaKeyPair>,
    now: i64,
) -> Result<Object, KmsError> {
    let secret = store.live(id)?;
    if !secret.is_managed() {
        return Err(KmsError::unsupported(
            "RotateSecret does not support generic secrets; use PutSecretValue.",
        ));
    }
    let (name, version_id) = (secret.name.clone(), params.need("VersionId")?);
    store.rotate(id, version_id, params.get("SecretData"), key_pair, now)?;
    let arn = store.arn(&name);
    Ok(Object::default().text("Arn", &arn).text("SecretName", &name).text("VersionId", version_id))
}

fn update_rotation(store: &mut Store, id: &str, params: &Params, now: i64) -> Result<Object, KmsError> {
    let secret = store.live(id)?;
    if !secret.is_managed() {
        return Err(KmsError::unsupported("Generic secrets are not rotated automatically."));
    }
    params.need("EnableAutomaticRotation")?;
    let name = secret.name.clone();
    store.set_rotation(id, wanted_interval(params, true)?, now)?;
    Ok(Object::default().text("SecretName", &name))
}

fn update_stage(store: &mut Store, id: &str, params: &Params, now: i64) -> Result<Object, KmsError> {
    let name = store.get(id)?.name.clone();
    let (from, to) = (params.get("RemoveFromVersion"), params.get("MoveToVersion"));
    store.update_stage(id, params.need("VersionStage")?, from, to, now)?;
    Ok(Object::default().text("SecretName", &name))
}

fn restore_secret(store: &mut Store, id: &str, now: i64) -> Result<Object, KmsError> {
    let name = store.get(id)?.name.clone();
    store.restore(id, now)?;
    Ok(Object::default().text("SecretName", &name))
}

fn delete_secret(store: &mut Store, id: &str, params: &Params, now: i64) -> Result<Object, KmsError> {
    let name = store.get(id)?.name.clone();
    let planned = if params.flag("ForceDeleteWithoutRecovery")? {
        if params.get("RecoveryWindowInDays").is_some() {
            return Err(KmsError::invalid("RecoveryWindowInDays"));
        }
        store.delete_now(id)?;
        now
    } else {
        let days = i64::try_from(params.number("RecoveryWindowInDays", 30)?).unwrap_or(i64::MAX);
        store.delete_later(id, days, now)?
    };
    Ok(Object::default().text("SecretName", &name).text("PlannedDeleteTime", &iso8601(planned)))
}
