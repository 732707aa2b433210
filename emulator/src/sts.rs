//! STS on the port of KMS: `AssumeRoleWithOIDC`, version 2015-04-01, in the RPC style and unsigned.
//!
//! Errors have STS's shape, `{"RequestId","Message","HostId","Code"}`. Codes and statuses are those of its
//! public list: 401 `AuthenticationFail.OIDCToken.Invalid` and `.Expired`, 401 `AuthenticationFail.NoPermission`
//! (no such provider), 404 `EntityNotExist.Role`, 400 `InvalidParameter.RoleSessionName` and
//! `.DurationSeconds`; and the RPC gateway's: 400 `MissingParameter`, `InvalidVersion`, `IllegalTimestamp`,
//! `InvalidTimeStamp.Expired`, `SignatureNonceUsed`, 404 `InvalidAction.NotFound`.

use crate::json::Object;
use crate::kms::actions::Params;
use crate::kms::error::KmsError;
use crate::kms::signature::check_date;
use crate::random;
use crate::state::State;
use std::collections::BTreeSet;

/// The action.
pub(crate) const ACTION: &str = "AssumeRoleWithOIDC";
const API_VERSION: &str = "2015-04-01";
/// Lives that a role may be asked for, in seconds; a role's own longest session is not emulated.
const DURATION_S: std::ops::RangeInclusive<i64> = 900..=43_200;
const DURATION_DEFAULT_S: i64 = 3600;

/// Whom STS knows.
#[derive(Debug)]
pub(crate) struct Oidc {
    /// Name of the RAM role that trusts the provider.
    pub(crate) role: String,
    /// Name of the OIDC provider.
    pub(crate) provider: String,
    token: Option<String>,
    /// Tokens that were good once: they have expired, others never were tokens.
    past: BTreeSet<String>,
}

impl Oidc {
    pub(crate) fn new(role: String, provider: String, token: Option<String>) -> Oidc {
        Oidc { role, provider, token, past: BTreeSet::new() }
    }

    pub(crate) fn set_token(&mut self, token: Option<&str>) {
        self.past.extend(std::mem::replace(&mut self.token, token.map(str::to_owned)));
    }

    pub(crate) fn role_arn(&self, account: &str) -> String {
        format!("acs:ram::{account}:role/{}", self.role)
    }

    pub(crate) fn provider_arn(&self, account: &str) -> String {
        format!("acs:ram::{account}:oidc-provider/{}", self.provider)
    }
}

/// Whether a request is for STS: by the host it names, or by the one action that STS has here.
pub(crate) fn is_asked(host: &str, action: &str) -> bool {
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    action == ACTION
        || name == "sts.aliyuncs.com"
        || (name.starts_with("sts.") || name.starts_with("sts-vpc.")) && name.ends_with(".aliyuncs.com")
}

/// What every call must bring, signed or not.
pub(crate) fn admit(state: &mut State, params: &Params) -> Result<(), KmsError> {
    if params.need("Version")? != API_VERSION {
        return Err(KmsError::new(400, "InvalidVersion", "Specified parameter Version is not valid."));
    }
    check_date(Some(params.need("Timestamp")?), state.clock.server())?;
    if !state.nonces.fresh("", params.need("SignatureNonce")?) {
        return Err(crate::kms::signature::Refusal::NonceUsed.into());
    }
    Ok(())
}

/// Runs the action.
pub(crate) fn run(state: &mut State, action: &str, params: &Params) -> Result<Object, KmsError> {
    if action != ACTION {
        return Err(KmsError::new(404, "InvalidAction.NotFound", "Specified api is not found."));
    }
    let (role, provider) = (params.need("RoleArn")?, params.need("OIDCProviderArn")?);
    let (token, session) = (params.need("OIDCToken")?, params.need("RoleSessionName")?);
    let invalid =
        |name: &str, message: &str| KmsError::new(400, &format!("InvalidParameter.{name}"), message);
    if !is_session_name(session) {
        return Err(invalid("RoleSessionName", "The parameter RoleSessionName is wrongly formed."));
    }
    let duration = params.get("DurationSeconds").map_or(Ok(DURATION_DEFAULT_S), str::parse);
    let duration = duration
        .ok()
        .filter(|it| DURATION_S.contains(it))
        .ok_or_else(|| invalid("DurationSeconds", "The Min/Max value of DurationSeconds is 15min/12hr."))?;

    let oidc = &state.oidc;
    let denied =
        |code: &str, message: &str| KmsError::new(401, &format!("AuthenticationFail.{code}"), message);
    if provider != oidc.provider_arn(&state.account) {
        return Err(denied("NoPermission", "No such OIDC Provider registered."));
    }
    if oidc.token.as_deref() != Some(token) {
        return Err(match oidc.past.contains(token) {
            true => denied("OIDCToken.Expired", "This JsonWebToken is expired."),
            false => denied("OIDCToken.Invalid", "The Jwt content is invalid that cannot be recognized."),
        });
    }
    if role != oidc.role_arn(&state.account) {
        return Err(KmsError::new(404, "EntityNotExist.Role", format!("The role not exists: {role}.")));
    }
    let user = Object::default()
        .text("AssumedRoleId", &format!("300000000000000001:{session}"))
        .text("Arn", &format!("{role}/{session}"));
    state.counters.oidc_exchanges += 1;
    let issued = state.credentials.issue_for(state.clock.life(), duration);
    Ok(Object::default()
        .text("RequestId", &random::uuid())
        .raw("AssumedRoleUser", &user.end())
        .raw("Credentials", &issued.json()))
}

/// 2 to 64 letters, digits, `.`, `@`, `-`, `_`.
fn is_session_name(name: &str) -> bool {
    (2..=64).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b".@-_".contains(&b))
}

/// An error's JSON. `host` is the name that was asked.
pub(crate) fn error_json(error: &KmsError, host: &str) -> String {
    Object::default()
        .text("RequestId", &random::uuid())
        .text("Message", &error.message)
        .text("HostId", host)
        .text("Code", &error.code)
        .end()
}
