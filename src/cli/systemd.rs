//! What the service manager is told (sd_notify(3)): nothing, where none listens.
//!
//! Socket activation is left out: to take over a descriptor by its number is unsafe code, and an agent that
//! starts in milliseconds and keeps its clients' connections for itself has little to win by it.

use crate::log::Reason;
use crate::time::Mono;
use sd_notify::NotifyState;
use std::fmt::Write as _;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// A socket's path, or `@` and the name of an abstract one.
const SOCKET: &str = "NOTIFY_SOCKET";
/// A service manager that reads nothing for so long is not waited for any longer: before the agent serves ..
const STARTING_MAX: Duration = Duration::from_secs(5);
/// .. and while clients wait meanwhile.
const SERVING_MAX: Duration = Duration::from_millis(10);

/// The agent listens, and is about to serve.
pub(super) fn ready(port: u16) {
    tell(&[NotifyState::Ready, NotifyState::Status(&serving(port))], STARTING_MAX);
}

/// SIGHUP came; [`reloaded`] follows when it is done with.
pub(super) fn reloading() {
    // Without this time `Type=notify-reload` would wait for it.
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now], SERVING_MAX),
        Err(_) => tell(&[NotifyState::Reloading], SERVING_MAX),
    }
}

/// All is as after the start.
pub(super) fn reloaded(port: u16) {
    tell(&[NotifyState::Ready, NotifyState::Status(&serving(port))], SERVING_MAX);
}

/// SIGTERM or SIGINT came.
pub(super) fn stopping(connections: usize) {
    let status = format!("finishing {connections} connections");
    tell(&[NotifyState::Stopping, NotifyState::Status(&status)], SERVING_MAX);
}

fn serving(port: u16) -> String {
    format!("serving on port {port}")
}

fn tell(states: &[NotifyState<'_>], wait_max: Duration) {
    if let Err(error) = send(states, wait_max) {
        match error.kind() {
            io::ErrorKind::WouldBlock => {
                log::warn!("the service manager does not read its notification socket")
            }
            _ => log::warn!("the service manager cannot be notified: {}", Reason(&error)),
        }
    }
}

/// As sd-notify's own, but not waiting for ever where the socket's queue is full.
fn send(states: &[NotifyState<'_>], wait_max: Duration) -> io::Result<()> {
    let Some(name) = std::env::var_os(SOCKET).filter(|name| !name.is_empty()) else { return Ok(()) };
    let mut message = String::new();
    for state in states {
        // A string takes everything.
        let _ = writeln!(message, "{state}");
    }
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(&name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(wait_max))?;
    socket.send_to_addr(message.as_bytes(), &address).map(|_| ())
}

/// The watchdog that the service manager wants to be told of (`WatchdogSec=`).
#[derive(Debug)]
pub(super) struct Watchdog {
    /// Half of what it allows: one late beat does not end the agent.
    interval: Option<Duration>,
    due: Mono,
}

impl Watchdog {
    /// As the environment has it; none without.
    pub(super) fn from_env(now: Mono) -> Watchdog {
        let interval = sd_notify::watchdog_enabled().map(|allowed| allowed / 2);
        if let Some(interval) = interval {
            log::info!("the watchdog of the service manager is notified every {} ms", interval.as_millis());
        }
        Watchdog { interval, due: if interval.is_some() { now } else { Mono::NEVER } }
    }

    /// When [`Watchdog::beat`] is to be called.
    pub(super) const fn due(&self) -> Mono {
        self.due
    }

    /// Gives a sign of life.
    pub(super) fn beat(&mut self, now: Mono) {
        if let Some(interval) = self.interval {
            self.due = now.after(interval);
            tell(&[NotifyState::Watchdog], SERVING_MAX);
        }
    }
}
