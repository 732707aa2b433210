//! KMS's `GetSecretValue`: the signed request, the reply and what it means, when to try again.

pub mod format;
pub mod reply;
pub mod request;
pub(crate) mod retry;
pub mod sign;
