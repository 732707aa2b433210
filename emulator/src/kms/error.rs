//! KMS errors and how a refused signature maps to them.

use super::signature::Refusal;
use std::fmt;

/// An error reply of KMS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KmsError {
    /// HTTP status.
    pub status: u16,
    /// KMS error code, for example `Forbidden.ResourceNotFound`.
    pub code: String,
    /// Text for people.
    pub message: String,
}

impl KmsError {
    pub(crate) fn new(status: u16, code: &str, message: impl Into<String>) -> KmsError {
        KmsError { status, code: code.to_owned(), message: message.into() }
    }

    pub(crate) fn not_found() -> KmsError {
        KmsError::new(404, "Forbidden.ResourceNotFound", "Resource not found.")
    }

    pub(crate) fn missing(parameter: &str) -> KmsError {
        KmsError::new(
            400,
            "MissingParameter",
            format!("The parameter {parameter} is needed but no value was given."),
        )
    }

    pub(crate) fn invalid(parameter: &str) -> KmsError {
        KmsError::new(400, "InvalidParameter", format!("The specified parameter {parameter} is not valid."))
    }

    pub(crate) fn unsupported(what: &str) -> KmsError {
        KmsError::new(400, "Rejected.UnsupportedOperation", what)
    }

    pub(crate) fn exists() -> KmsError {
        KmsError::new(409, "Rejected.ResourceExist", "The specified resource already exists.")
    }
}

impl fmt::Display for KmsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.status, self.code, self.message)
    }
}

impl std::error::Error for KmsError {}

impl From<Refusal> for KmsError {
    fn from(refusal: Refusal) -> KmsError {
        let (status, code, message) = match refusal {
            Refusal::Incomplete(why) => {
                (400, "IncompleteSignature", format!("The signature is incomplete: {why}."))
            }
            Refusal::TimestampAhead => (
                400,
                "IllegalTimestamp",
                "The x-acs-date is no date or ahead of the server's clock.".to_owned(),
            ),
            Refusal::TimestampExpired => {
                (400, "InvalidTimeStamp.Expired", "Specified time stamp or date value is expired.".to_owned())
            }
            Refusal::UnknownAccessKey => {
                (404, "InvalidAccessKeyId.NotFound", "Specified access key is not found.".to_owned())
            }
            Refusal::TokenMalformed => {
                (400, "InvalidSecurityToken.Malformed", "Specified SecurityToken is malformed.".to_owned())
            }
            Refusal::TokenMismatch => (
                400,
                "InvalidSecurityToken.MismatchWithAccessKey",
                "Specified SecurityToken mismatch with the AccessKey.".to_owned(),
            ),
            Refusal::TokenExpired => {
                (403, "InvalidSecurityToken.Expired", "Specified SecurityToken is expired.".to_owned())
            }
            Refusal::NonceUsed => {
                (400, "SignatureNonceUsed", "Specified signature nonce was used already.".to_owned())
            }
            Refusal::Mismatch { string_to_sign } => (
                400,
                "SignatureDoesNotMatch",
                format!(
                    "Specified signature is not matched with our calculation. server string to sign is:{string_to_sign}"
                ),
            ),
        };
        KmsError::new(status, code, message)
    }
}
