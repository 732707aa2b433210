//! Which ways to be someone there are here, and in which order they are tried: `AuthType`, or the default
//! credential chain of the official SDKs (`docs/kms-protocol.md`, section 4).

use super::env::{Env, NotConfigured};
use super::environment::{self, Environment};
use super::error::IdentityError;
use super::instance_identity::{self, InstanceIdentity};
use super::metadata::Metadata;
use super::oidc::Oidc;
use super::provider::{Next, Provider, Shared};
use super::ram_role::RamRole;
use super::uri::CredentialsUri;
use crate::call::CallError;
use crate::config::{AuthType, KmsSection};
use crate::http::response::Response;
use crate::random::Random;
use crate::text::is_role_name;
use crate::time::{Mono, Now};
use std::ffi::OsString;

const ROLE_NAME: &str = "ALIBABA_CLOUD_ECS_METADATA";
const METADATA_DISABLED: &str = "ALIBABA_CLOUD_ECS_METADATA_DISABLED";
const PLAIN_DISABLED: &str = "ALIBABA_CLOUD_IMDSV1_DISABLED";

/// What is being asked.
#[derive(Clone, Copy, Debug)]
enum Stage {
    Region,
    Provider(usize),
}

/// The providers in their order. Until one has given credentials, the next is tried when one fails; from
/// then on it is that one alone.
#[derive(Debug)]
pub(crate) struct Chain {
    shared: Shared,
    /// The metadata service is to be asked for the region, which nothing else names.
    region_wanted: bool,
    /// At least one.
    providers: Vec<Box<dyn Provider>>,
    stage: Stage,
    serving: Option<usize>,
    /// Those before `stage` that failed in this conversation.
    failed: Vec<(&'static str, IdentityError)>,
}

impl Chain {
    /// The providers that configuration and environment ask for. Says in the log which ones, and why not others
    /// before them.
    /// Errors: when what is asked for cannot be: the message names key or variable.
    pub(crate) fn from_config(
        kms: &KmsSection,
        env: &dyn Fn(&str) -> Option<OsString>,
    ) -> Result<Chain, NotConfigured> {
        let env = &Env(env);
        let providers = match (kms.auth_type, &kms.aap_arn) {
            (AuthType::Auto, None) => default_chain(kms, env)?,
            (AuthType::RamRole, _) => vec![ram_role(kms, env)?],
            (AuthType::Auto | AuthType::InstanceIdentity, _) => vec![instance_identity(kms)?],
            (AuthType::AccessKey, _) => vec![pinned("access_key", boxed(Environment::find(env)))?],
            (AuthType::Oidc, _) => vec![pinned("oidc", boxed(Oidc::find(env, kms)))?],
        };
        let names: Vec<_> = providers.iter().map(|provider| provider.name()).collect();
        log::info!("identity for KMS: {}", names.join(", or else "));
        let metadata = Metadata::new(kms.metadata_endpoint.clone(), env.is_true(PLAIN_DISABLED));
        Ok(Chain {
            shared: Shared { metadata, region: None },
            region_wanted: kms.endpoint().is_none(),
            providers,
            stage: Stage::Provider(0),
            serving: None,
            failed: Vec::new(),
        })
    }

    /// The region, if the metadata service was asked for it and has answered.
    pub(crate) fn region(&self) -> Option<&str> {
        self.shared.region.as_deref()
    }

    /// Who gave the credentials, or is tried first.
    pub(crate) fn name(&self) -> &'static str {
        self.name_of(self.serving.unwrap_or(0))
    }

    /// What is being asked for: `the OIDC role`, or `the region`.
    pub(crate) fn asked_for(&self) -> &'static str {
        match self.stage {
            Stage::Region => "the region",
            Stage::Provider(at) => self.name_of(at),
        }
    }

    fn name_of(&self, at: usize) -> &'static str {
        debug_assert!(at < self.providers.len(), "provider {at} of {}", self.providers.len());
        self.providers.get(at).map_or("no provider", |provider| provider.name())
    }

    /// Begins a conversation.
    /// Errors: when it ends before anybody is asked.
    pub(crate) fn begin(&mut self, now: Mono) -> Result<Next, IdentityError> {
        self.failed.clear();
        self.shared.metadata.begin(now);
        if self.region_wanted && self.shared.region.is_none() {
            self.stage = Stage::Region;
            return Ok(self.ask_region());
        }
        self.begin_with(self.serving.unwrap_or(0))
    }

    fn ask_region(&self) -> Next {
        Next::Ask(self.shared.metadata.peer())
    }

    fn begin_with(&mut self, at: usize) -> Result<Next, IdentityError> {
        self.stage = Stage::Provider(at);
        let Some(provider) = self.providers.get_mut(at) else {
            return Err(IdentityError::Everyone(std::mem::take(&mut self.failed)));
        };
        let outcome = provider.begin(&mut self.shared);
        self.go_on(at, outcome)
    }

    /// What follows from a provider's step.
    fn go_on(&mut self, at: usize, outcome: Result<Next, IdentityError>) -> Result<Next, IdentityError> {
        match outcome {
            Ok(Next::Done(grant)) => {
                self.serving = Some(at);
                for (name, error) in self.failed.drain(..) {
                    log::info!("{name} gave no credentials: {error}");
                }
                Ok(Next::Done(grant))
            }
            Err(error) if self.serving.is_none() && self.providers.len() > 1 => {
                self.failed.push((self.name_of(at), error));
                self.begin_with(at.saturating_add(1))
            }
            other => other,
        }
    }

    /// Writes the request of the question asked last.
    pub(crate) fn write_request(&self, out: &mut Vec<u8>, now: Now, random: &mut Random) {
        match self.stage {
            Stage::Region => self.shared.metadata.write_region_request(out),
            Stage::Provider(at) => {
                debug_assert!(at < self.providers.len(), "no provider is asked");
                if let Some(provider) = self.providers.get(at) {
                    provider.write_request(&self.shared, out, now, random);
                }
            }
        }
    }

    /// Takes the answer to it.
    /// Errors: when the conversation has ended without credentials.
    pub(crate) fn on_answer(
        &mut self,
        answer: Result<&Response, &CallError>,
        now: Now,
    ) -> Result<Next, IdentityError> {
        match self.stage {
            Stage::Region => {
                let region = self.shared.metadata.on_region_answer(answer, now.mono);
                self.shared.region = region.map_err(|error| IdentityError::Region(Box::new(error)))?;
                if self.shared.region.is_none() {
                    return Ok(self.ask_region());
                }
                self.begin_with(self.serving.unwrap_or(0))
            }
            Stage::Provider(at) => {
                let Some(provider) = self.providers.get_mut(at) else { return self.begin_with(at) };
                let outcome = provider.on_answer(&mut self.shared, answer, now);
                self.go_on(at, outcome)
            }
        }
    }
}

type Found = Result<Box<dyn Provider>, NotConfigured>;

fn boxed<P: Provider + 'static>(found: Result<P, NotConfigured>) -> Found {
    found.map(|provider| Box::new(provider) as Box<dyn Provider>)
}

/// With `AuthType` set to this one a missing variable is a mistake.
fn pinned(auth_type: &str, found: Found) -> Found {
    found.map_err(|problem| NotConfigured::Wrong(format!("[KMS] AuthType = \"{auth_type}\": {problem}")))
}

fn ram_role(kms: &KmsSection, env: &Env<'_>) -> Found {
    let role = match &kms.role_name {
        Some(role) => Some(role.clone()),
        None => env.text(ROLE_NAME)?,
    };
    if role.as_deref().is_some_and(|role| !is_role_name(role)) {
        return Err(NotConfigured::Wrong(format!("the value of {ROLE_NAME} is not the name of a RAM role")));
    }
    Ok(Box::new(RamRole::new(role)))
}

fn instance_identity(kms: &KmsSection) -> Found {
    let (Some(aap), Some(endpoint)) = (&kms.aap_arn, kms.endpoint()) else {
        return Err(NotConfigured::Wrong("[KMS] AuthType = \"instance_identity\" needs AapArn".to_owned()));
    };
    log::warn!("{}", instance_identity::PROVISIONAL);
    Ok(Box::new(InstanceIdentity::new(aap.clone(), endpoint)))
}

/// Those of the default credential chain that are configured. The SDKs' profile files are not among them: they
/// are a person's, and this is a daemon.
fn default_chain(kms: &KmsSection, env: &Env<'_>) -> Result<Vec<Box<dyn Provider>>, NotConfigured> {
    let on_ecs = || match env.is_true(METADATA_DISABLED) {
        true => Err(NotConfigured::Missing(format!("{METADATA_DISABLED} is true"))),
        false => ram_role(kms, env),
    };
    let candidates: [(&str, &dyn Fn() -> Found); 4] = [
        (environment::NAME, &|| boxed(Environment::find(env))),
        ("the OIDC role", &|| boxed(Oidc::find(env, kms))),
        ("the instance's RAM role", &on_ecs),
        ("the credentials URI", &|| boxed(CredentialsUri::find(env))),
    ];
    let mut providers = Vec::new();
    let mut skipped = Vec::new();
    for (name, find) in candidates {
        match find() {
            // It never fails, so that nobody after it would ever be asked.
            Ok(provider) if name == environment::NAME => {
                providers.push(provider);
                break;
            }
            Ok(provider) => providers.push(provider),
            Err(NotConfigured::Missing(why)) if providers.is_empty() => {
                skipped.push(format!("{name} ({why})"))
            }
            Err(NotConfigured::Missing(_)) => {}
            Err(wrong) => return Err(wrong),
        }
    }
    if providers.is_empty() {
        return Err(NotConfigured::Wrong(format!(
            "[KMS] AuthType = \"auto\" finds no identity that is configured: {}. Configure one of them",
            skipped.join(", ")
        )));
    }
    for skipped in skipped {
        log::info!("identity for KMS: skipped {skipped}");
    }
    Ok(providers)
}
