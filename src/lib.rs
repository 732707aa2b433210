//! A local secrets agent for Alibaba Cloud KMS: one event-loop thread that answers applications from a
//! cache and asks KMS in their place.
//!
//! # The map of this house
//!
//! Pure in the middle, thin at the bottom: parsing, cache, credentials, connection states and every
//! decision are functions over bytes, values and a [`time::Now`] handed in. Sockets and clocks live behind
//! [`net::Net`], names behind its helper thread. Imports point one way only, from a later line to an
//! earlier one (`tests/tidy.rs` checks it):
//!
//! | Floor | Modules | |
//! |---|---|---|
//! | 1 | [`time`] [`secret`] [`wipe`] [`buf`] [`text`] [`json`] [`log`] [`random`] | clocks, wiped bytes, rules about text, the log |
//! | 2 | [`config`] [`http`] [`call`] [`code`] [`metrics`] | the configuration; HTTP/1.1 over bytes; what is asked of the network; the codes of failures; counters |
//! | 3 | [`kms`] [`identity`] [`cache`] [`token`] | what is said to KMS, as whom, and what is remembered |
//! | 4 | [`conn`] | connections as state machines over bytes: TLS pump, inbound, outbound |
//! | 5 | [`broker`] | every decision: gates, lookup, coalescing, retries. Says *what*, never how |
//! | 6 | [`net`] [`harden`] | `trait Net`: eight verbs on sockets; [`net::mio`] is the only user of mio. What the process gives up |
//! | 7 | [`server`] | the event loop, generic over `Net`: carries bytes and answers between all of them |
//! | 8 | [`cli`] | arguments to a command, a command to an exit code |
//!
//! A request's way: [`server`] reads into a scratch buffer, [`http::request`] parses, [`broker`] passes it
//! through [`broker::gate`] and looks into [`cache`]. A hit goes out in one write. A miss joins the key's
//! one flight; the broker asks for a [`call::Call`], the server puts it on an outbound connection,
//! [`kms::request`] signs it when that is ready, [`kms::reply`] reads what comes back, and all readers of
//! the flight are answered.
//!
//! # Memory
//!
//! Small hosts pay for each MiB, so each has its reason (`benches/compare/run` measures):
//!
//! - The allocator is musl's own, behind [`wipe::WipingAllocator`]. A hit allocates nothing (`tests/no_allocation.rs`),
//!   so a faster one has nothing to win, and mimalloc in its place took 8 MiB more when idle (10.1 against 1.8) and 13
//!   more after 1,000 secrets and 800 clients (16.5 against 3.2).
//! - Half of the resident pages are code. Hence `opt-level`, inlining and the linker's flags in `Cargo.toml`,
//!   `.cargo/config.toml` and `packaging/build`.
//! - One scratch buffer to read into, and one to write to, for all clients. A client has a [`buf::Buf`] of its own only
//!   while it owes the rest of a head or has not read its reply, and a slot of 144 bytes; slots of a burst are given
//!   back.
//! - An entry of the cache is KMS's reply as it goes out, allocated at its size, and about 200 bytes.
//! - The web's roots are parsed once, shared by all connections, and again only at SIGHUP. An idle TLS connection to KMS
//!   is closed after a while; 16 sessions are remembered for resumption.

// Its readers are those who change it: cargo doc --document-private-items.
#![allow(rustdoc::private_intra_doc_links)]
// They panic where they cannot write: a full disk or a closed pipe must not end the agent.
#![warn(clippy::print_stdout, clippy::print_stderr)]
// See clippy.toml.
#![cfg_attr(not(test), warn(clippy::disallowed_methods, clippy::disallowed_types))]

pub mod broker;
pub mod buf;
pub mod cache;
pub mod call;
pub mod cli;
pub mod code;
pub mod config;
pub mod conn;
pub mod harden;
pub mod http;
pub mod identity;
mod json;
pub mod kms;
pub mod log;
pub mod metrics;
pub mod net;
pub mod random;
pub mod secret;
pub mod server;
mod text;
pub mod time;
pub mod token;
pub mod wipe;
