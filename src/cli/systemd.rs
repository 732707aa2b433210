//! What the service manager is told (sd_notify(3)): nothing, where none listens.
//!
//! Socket activation is left out: to take over a descriptor by its number is unsafe code, and an agent that
//! starts in milliseconds and keeps its clients' connections for itself has little to win by it.

use crate::log::Reason;
use crate::time::Mono;
use sd_notify::NotifyState;
use std::time::Duration;

/// The agent listens.
pub(super) fn ready(port: u16) {
    tell(&[NotifyState::Ready, NotifyState::Status(&serving(port))]);
}

/// SIGHUP came; [`ready`] follows when it is done with.
pub(super) fn reloading() {
    // Without this time `Type=notify-reload` would wait for it.
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(_) => tell(&[NotifyState::Reloading]),
    }
}

/// SIGTERM or SIGINT came.
pub(super) fn stopping(connections: usize) {
    tell(&[NotifyState::Stopping, NotifyState::Status(&format!("finishing {connections} connections"))]);
}

fn serving(port: u16) -> String {
    format!("serving on port {port}")
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        log::warn!("cannot tell the service manager: {}", Reason(&error));
    }
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
            log::info!("watchdog: a sign of life every {} ms", interval.as_millis());
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
            tell(&[NotifyState::Watchdog]);
        }
    }
}
