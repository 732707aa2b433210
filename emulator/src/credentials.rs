//! Who may sign: long-term access keys, and STS credentials that the metadata service, STS and KMS hand out.

use crate::json::Object;
use crate::kms::signature::Refusal;
use crate::{clock, random};
use std::collections::BTreeMap;

/// STS credentials, as the metadata service would give them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StsCredentials {
    /// `STS.` and 25 letters and digits.
    pub access_key_id: String,
    /// The secret that signs.
    pub access_key_secret: String,
    /// The token that goes with every request.
    pub security_token: String,
    /// End of life in Unix seconds, by the emulator's clock.
    pub expiration: i64,
}

impl StsCredentials {
    /// The object that KMS and STS reply with.
    pub(crate) fn json(&self) -> String {
        self.fields(Object::default()).end()
    }

    /// The four fields, after those that are there.
    pub(crate) fn fields(&self, before: Object) -> Object {
        before
            .text("AccessKeyId", &self.access_key_id)
            .text("AccessKeySecret", &self.access_key_secret)
            .text("SecurityToken", &self.security_token)
            .text("Expiration", &clock::iso8601(self.expiration))
    }
}

/// How KMS refuses an STS token that has expired; the real one is known to do either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ExpiredTokenReply {
    /// 403 `InvalidSecurityToken.Expired`.
    #[default]
    Expired,
    /// 404 `InvalidAccessKeyId.NotFound`.
    NotFound,
}

#[derive(Debug)]
pub(crate) struct Credentials {
    access_keys: BTreeMap<String, String>,
    sts: BTreeMap<String, StsCredentials>,
    /// What the metadata service gives for a role until it is nearly over.
    by_role: BTreeMap<String, StsCredentials>,
    pub(crate) lifetime_s: i64,
    pub(crate) expired_reply: ExpiredTokenReply,
}

impl Credentials {
    pub(crate) fn new(access_keys: &[(String, String)], lifetime_s: i64) -> Credentials {
        Credentials {
            access_keys: access_keys.iter().cloned().collect(),
            sts: BTreeMap::new(),
            by_role: BTreeMap::new(),
            lifetime_s,
            expired_reply: ExpiredTokenReply::default(),
        }
    }

    pub(crate) fn add_access_key(&mut self, id: &str, secret: &str) {
        self.access_keys.insert(id.to_owned(), secret.to_owned());
    }

    pub(crate) fn remove_access_key(&mut self, id: &str) {
        self.access_keys.remove(id);
    }

    pub(crate) fn issue(&mut self, now: i64) -> StsCredentials {
        self.issue_for(now, self.lifetime_s)
    }

    /// Credentials with a life of their own, never longer than the usual one.
    pub(crate) fn issue_for(&mut self, now: i64, seconds: i64) -> StsCredentials {
        // Tokens that died a day ago are forgotten, so that a long run does not grow.
        self.sts.retain(|_, known| known.expiration + 86_400 > now);
        let credentials = StsCredentials {
            access_key_id: format!("STS.{}", random::alphanumeric(25)),
            access_key_secret: random::alphanumeric(44),
            // Real tokens are base64: `+`, `/` and `=` are there to be mishandled.
            security_token: format!("CAIS+/{}==", random::alphanumeric(120)),
            expiration: now + seconds.min(self.lifetime_s),
        };
        self.sts.insert(credentials.access_key_id.clone(), credentials.clone());
        credentials
    }

    /// What a read of a role's credentials gives: the same until a quarter of their life is left.
    pub(crate) fn for_role(&mut self, role: &str, now: i64) -> StsCredentials {
        match self.by_role.get(role) {
            Some(known) if known.expiration - now > self.lifetime_s / 4 => known.clone(),
            _ => {
                let fresh = self.issue(now);
                self.by_role.insert(role.to_owned(), fresh.clone());
                fresh
            }
        }
    }

    /// The next read of any role gives fresh credentials; the old ones live on.
    pub(crate) fn rotate(&mut self) {
        self.by_role.clear();
    }

    /// All issued so far are over as of `now`.
    pub(crate) fn expire(&mut self, now: i64) {
        for known in self.sts.values_mut() {
            known.expiration = known.expiration.min(now);
        }
        self.rotate();
    }

    /// All issued so far were never heard of.
    pub(crate) fn revoke(&mut self) {
        self.sts.clear();
        self.rotate();
    }

    /// The secret that verifies a request signed as `id` with this token.
    pub(crate) fn secret(&self, id: &str, token: Option<&str>, now: i64) -> Result<String, Refusal> {
        let Some(token) = token else {
            // Temporary keys without their token are unknown to the service.
            return self.access_keys.get(id).cloned().ok_or(Refusal::UnknownAccessKey);
        };
        match (self.sts.get(id), self.sts.values().find(|known| known.security_token == token)) {
            (_, Some(owner)) if owner.access_key_id != id => Err(Refusal::TokenMismatch),
            (Some(known), Some(_)) if known.expiration <= now => match self.expired_reply {
                ExpiredTokenReply::Expired => Err(Refusal::TokenExpired),
                ExpiredTokenReply::NotFound => Err(Refusal::UnknownAccessKey),
            },
            (Some(known), Some(_)) => Ok(known.access_key_secret.clone()),
            (Some(_), None) => Err(Refusal::TokenMalformed),
            (None, _) if self.access_keys.contains_key(id) => Err(Refusal::TokenMalformed),
            (None, _) => Err(Refusal::UnknownAccessKey),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_of_being_wrong_has_its_refusal() {
        let mut all = Credentials::new(&[("AK".into(), "secret".into())], 100);
        let (a, b) = (all.for_role("role", 0), all.issue(0));
        let (id, token) = (a.access_key_id.as_str(), a.security_token.as_str());
        assert_eq!(all.secret("AK", None, 0), Ok("secret".into()));
        assert_eq!(all.secret(id, Some(token), 99), Ok(a.access_key_secret.clone()));
        assert_eq!(all.secret(id, Some(token), 100), Err(Refusal::TokenExpired));
        assert_eq!(all.secret(id, None, 0), Err(Refusal::UnknownAccessKey));
        assert_eq!(all.secret(id, Some("x"), 0), Err(Refusal::TokenMalformed));
        assert_eq!(all.secret(id, Some(&b.security_token), 0), Err(Refusal::TokenMismatch));
        assert_eq!(all.secret("STS.x", Some("x"), 0), Err(Refusal::UnknownAccessKey));
        all.expired_reply = ExpiredTokenReply::NotFound;
        assert_eq!(all.secret(id, Some(token), 100), Err(Refusal::UnknownAccessKey));

        assert_eq!(all.for_role("role", 74), a);
        assert_ne!(all.for_role("role", 75), a);
        all.revoke();
        assert_eq!(all.secret(id, Some(token), 0), Err(Refusal::UnknownAccessKey));
    }
}
