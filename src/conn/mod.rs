//! Connections as state machines over bytes: no sockets, no clock of their own.

pub(crate) mod inbound;
pub mod outbound;
pub mod tls;
