//! `AssumeApplicationAccessPoint`: a signed instance identity for credentials. **Provisional**: the real
//! exchange is not published, so action, parameters, audience and codes are this project's own.

use super::actions::Params;
use super::error::KmsError;
use crate::identity::Distrust;
use crate::json::Object;
use crate::metadata::INSTANCE_ID;
use crate::random;
use crate::state::State;
use serde_json::Value;

/// The action. It is unsigned: the identity is the proof.
pub(crate) const ACTION: &str = "AssumeApplicationAccessPoint";
/// How far an identity's `signingTime` may be from the server's clock, either way, in seconds.
const FRESH_S: i64 = 5 * 60;

/// ARN of an application access point.
pub(crate) fn arn(region: &str, account: &str, name: &str) -> String {
    format!("acs:kms:{region}:{account}:applicationaccesspoint/{name}")
}

/// Gives credentials for `AapArn` and `InstanceIdentity`.
pub(crate) fn assume(state: &mut State, params: &Params) -> Result<Object, KmsError> {
    let (asked, identity) = (params.need("AapArn")?, params.need("InstanceIdentity")?);
    let name = name_in(asked).ok_or_else(|| KmsError::invalid("AapArn"))?;
    let (document, fingerprint) = state.identities.verify(identity).map_err(|distrust| match distrust {
        Distrust::Malformed => refused(400, "Malformed", "The instance identity is no base64 of PKCS#7."),
        Distrust::Signature => refused(403, "Signature", "The instance identity's signature is not valid."),
    })?;

    let malformed = || refused(400, "Malformed", "The instance identity's document is not JSON.");
    let document: Value = serde_json::from_str(&document).map_err(|_| malformed())?;
    let field = |name: &str| document.get(name).and_then(Value::as_str);
    let (aud, signing_time) = field("audience").and_then(audience).ok_or_else(|| {
        refused(403, "Audience", "The audience is not {\"aud\":\"<AapArn>\",\"signingTime\":<seconds>}.")
    })?;
    if aud != asked {
        return Err(refused(403, "Audience", "The audience is another application access point."));
    }
    let now = state.clock.server();
    if now.saturating_sub(signing_time).saturating_abs() > FRESH_S {
        return Err(refused(
            403,
            "Expired",
            "The instance identity was not signed within the last 5 minutes.",
        ));
    }
    let owned = field("region-id") == Some(state.region.as_str())
        && field("owner-account-id") == Some(state.account.as_str())
        && field("instance-id") == Some(INSTANCE_ID);
    if !owned {
        return Err(refused(403, "Mismatch", "The instance is not of this region and account."));
    }
    // By the whole ARN: one of another region or account is not here either.
    if !state.aaps.contains(name) || asked != arn(&state.region, &state.account, name) {
        return Err(KmsError::new(404, "Forbidden.AAPNotFound", "The specified AAP is not found."));
    }
    if !state.identities.spend(fingerprint, signing_time.saturating_add(FRESH_S), now) {
        return Err(refused(403, "Replayed", "The instance identity was used before."));
    }
    state.counters.aap_exchanges += 1;
    let issued = state.credentials.issue(state.clock.life());
    Ok(Object::default().raw("Credentials", &issued.json()).text("RequestId", &random::uuid()))
}

fn refused(status: u16, why: &str, message: &str) -> KmsError {
    KmsError::new(status, &format!("InvalidInstanceIdentity.{why}"), message)
}

/// `name` of `acs:kms:<region>:<account>:applicationaccesspoint/<name>`.
fn name_in(arn: &str) -> Option<&str> {
    let (region, rest) = arn.strip_prefix("acs:kms:")?.split_once(':')?;
    let (account, resource) = rest.split_once(':')?;
    let name = resource.strip_prefix("applicationaccesspoint/")?;
    (!region.is_empty() && !account.is_empty() && !name.is_empty()).then_some(name)
}

/// `aud` and `signingTime` of an audience.
fn audience(text: &str) -> Option<(String, i64)> {
    let audience: Value = serde_json::from_str(text).ok()?;
    Some((audience.get("aud")?.as_str()?.to_owned(), audience.get("signingTime")?.as_i64()?))
}
