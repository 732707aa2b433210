//! HTTP/1.1 over bytes, without I/O: RFC 9110 and RFC 9112.
//!
//! [`request`] reads what a client sends us, [`write`](mod@write) makes what we send it; [`response`] and
//! [`body`] read what KMS and the metadata service send.

pub(crate) mod body;
mod error;
pub mod percent;
pub mod request;
pub mod response;
pub(crate) mod write;

/// Text before and after the first `byte`, an ASCII character. What clients send is short: `str::split_once`, made
/// for long texts, takes several times as long, and this runs at every hit.
pub(crate) fn split_at_byte(text: &str, byte: u8) -> Option<(&str, &str)> {
    let at = text.bytes().position(|it| it == byte)?;
    Some((text.get(..at)?, text.get(at + 1..)?))
}
