//! HTTP/1.1 over bytes, without I/O: RFC 9110 and RFC 9112.
//!
//! [`request`] reads what a client sends us, [`write`](mod@write) makes what we send it; [`response`] and
//! [`body`] read what KMS and the metadata service send.

pub mod body;
pub mod percent;
pub mod request;
pub mod response;
pub mod write;
