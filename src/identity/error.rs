//! Why there are no credentials, told for the person who has to do something about it.

use crate::call::CallError;
use crate::config::HostPort;
use std::fmt;
use std::path::PathBuf;

/// Why there are no credentials. Nothing secret is in it, and its text stays the same as long as the trouble
/// does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IdentityError {
    /// Whom we asked did not give us what we need.
    Service(CredentialSource, ServiceError),
    /// The OIDC token's file holds no token, or cannot be read.
    TokenFile(PathBuf, String),
    /// The metadata service did not say which region this is.
    Region(Box<IdentityError>),
    /// Each one of the chain failed; with the names of the providers.
    Everyone(Vec<(&'static str, IdentityError)>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CredentialSource {
    /// The instance metadata service.
    Metadata,
    /// The Security Token Service.
    Sts,
    /// What `ALIBABA_CLOUD_CREDENTIALS_URI` names. Not the URI itself: its query may hold a secret.
    CredentialsUri(HostPort),
    /// KMS, by an application access point.
    AccessPoint,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServiceError {
    /// No connection, or no usable reply in time.
    Unreachable(String),
    /// The instance has no RAM role, or not the one that is configured.
    NoRole(Option<String>),
    /// The metadata service has no signed identity of this instance.
    NoSignedIdentity,
    /// The metadata service lets nobody in.
    Denied {
        /// 401 or 403.
        status: u16,
        /// We showed a token, and it was new.
        hardened: bool,
    },
    /// Metadata tokens do not work and plain GETs are forbidden.
    HardenedOnly(String),
    /// A refusal with its `Code` and `Message`.
    Refused {
        status: u16,
        /// `Code`, and `Message` unless that quoted a token.
        text: String,
    },
    Status(u16),
    /// A `Code` other than `Success`.
    Code(String),
    /// An answer that is not what it is documented to be.
    Malformed(&'static str),
    /// Credentials that were past their end when they came; their `Expiration`.
    Expired(String),
}

impl IdentityError {
    /// A question that brought no reply.
    pub(crate) fn unreachable(asked: CredentialSource, error: &CallError) -> IdentityError {
        IdentityError::Service(asked, ServiceError::Unreachable(error.message.clone()))
    }

    /// Whether it is that the metadata service cannot be reached, or fails as a whole.
    pub(crate) fn needs_metadata(&self) -> bool {
        match self {
            IdentityError::Service(
                CredentialSource::Metadata,
                ServiceError::Unreachable(_) | ServiceError::Status(500..),
            ) => true,
            IdentityError::Region(error) => error.needs_metadata(),
            _ => false,
        }
    }
}

impl fmt::Display for CredentialSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CredentialSource::Metadata => f.write_str("metadata service"),
            CredentialSource::Sts => f.write_str("STS"),
            CredentialSource::CredentialsUri(origin) => write!(f, "credentials URI at {origin}"),
            CredentialSource::AccessPoint => f.write_str("application access point"),
        }
    }
}

impl fmt::Display for IdentityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IdentityError::Service(asked, problem) => {
                write!(f, "{asked}: {problem}")?;
                f.write_str(advice(asked, problem))
            }
            IdentityError::TokenFile(path, why) => {
                write!(
                    f,
                    "OIDC token file {}: {why}; correct it, or ALIBABA_CLOUD_OIDC_TOKEN_FILE, which names it",
                    path.display()
                )
            }
            IdentityError::Region(error) => {
                match &**error {
                    // The advice is for want of credentials; here something else helps.
                    IdentityError::Service(asked, problem @ ServiceError::Unreachable(_)) => {
                        write!(f, "{asked}: {problem}")?;
                    }
                    error => write!(f, "{error}")?,
                }
                f.write_str(
                    "; the agent asks it for the region because neither [KMS] Region nor Endpoint is set. Set [KMS] Region; \
                     on a host that is no ECS instance, also choose another identity (see [KMS] AuthType)",
                )
            }
            IdentityError::Everyone(errors) => {
                errors.iter().enumerate().try_for_each(|(number, (name, error))| {
                    write!(f, "{}{name}: {error}", if number == 0 { "" } else { "; " })
                })
            }
        }
    }
}

impl fmt::Display for ServiceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ServiceError::Unreachable(what) => f.write_str(what),
            ServiceError::NoRole(None) => f.write_str("no RAM role is attached to this instance"),
            ServiceError::NoRole(Some(role)) => {
                write!(f, "the RAM role {role} is not attached to this instance")
            }
            ServiceError::NoSignedIdentity => f.write_str("it has no signed identity of this instance"),
            ServiceError::Denied { status, hardened: true } => {
                write!(f, "it refused a request with {status}, although the session token was new")
            }
            ServiceError::Denied { status, hardened: false } => {
                write!(f, "it gives no session token, and it refused a request without one with {status}")
            }
            ServiceError::HardenedOnly(why) => {
                write!(
                    f,
                    "hardened mode failed ({why}) and ALIBABA_CLOUD_IMDSV1_DISABLED forbids plain requests"
                )
            }
            ServiceError::Refused { status, text } => write!(f, "it refused with {status} {text}"),
            ServiceError::Status(status) => write!(f, "it answered {status}"),
            ServiceError::Code(code) => write!(f, "it has no credentials: {code}"),
            ServiceError::Malformed(what) => write!(f, "it gave {what} that cannot be read"),
            ServiceError::Expired(end) => {
                write!(
                    f,
                    "it gave credentials that expired at {end}; if that time is not over yet, this host's clock is wrong"
                )
            }
        }
    }
}

/// What to do about it, as the end of the message.
fn advice(asked: &CredentialSource, problem: &ServiceError) -> &'static str {
    match (asked, problem) {
        (CredentialSource::Metadata, ServiceError::Unreachable(_)) => {
            "; on an ECS instance, check the firewall and the routes to it; on another host, use another identity (see [KMS] AuthType)"
        }
        (_, ServiceError::NoRole(None)) => "; attach one that may call kms:GetSecretValue",
        (_, ServiceError::NoRole(Some(_))) => {
            "; attach it, or correct its name in [KMS] RoleName or ALIBABA_CLOUD_ECS_METADATA"
        }
        (_, ServiceError::NoSignedIdentity) => "; instance identity needs an ECS instance",
        (_, ServiceError::Denied { .. }) => {
            "; check the instance's metadata options (HttpEndpoint, HttpTokens)"
        }
        (CredentialSource::Metadata, ServiceError::Code(_)) => {
            "; check that the RAM role exists and trusts ecs.aliyuncs.com"
        }
        (CredentialSource::Sts, ServiceError::Unreachable(_)) => {
            "; check ALIBABA_CLOUD_STS_REGION and ALIBABA_CLOUD_VPC_ENDPOINT_ENABLED"
        }
        (CredentialSource::Sts, ServiceError::Refused { status: 400..=499, .. }) => {
            "; check the OIDC token, ALIBABA_CLOUD_ROLE_ARN, ALIBABA_CLOUD_OIDC_PROVIDER_ARN and the role's trust policy"
        }
        (CredentialSource::AccessPoint, ServiceError::Refused { status: 400..=499, .. }) => {
            "; check [KMS] AapArn and the access point in the KMS console. This exchange is provisional, and KMS may not \
             know it; a RAM role works ([KMS] AuthType = \"ram_role\")"
        }
        _ => "",
    }
}
