//! What the process gives up before it serves, so that whoever takes it over gains little.
//!
//! | When | Step |
//! |---|---|
//! | before anything secret is read | no core dumps, not dumpable, no new privileges, memory locked |
//! | when all files are open, before the helper thread starts | Landlock: which files it may still open |
//! | when nothing is left to be set up | seccomp: which system calls it may still make |
//!
//! A step that the kernel lacks is left out with a warning: an agent that does not start protects nothing.

mod calls;
mod files;

pub use files::Files;

use crate::log::Reason;
use rustix::mm::MlockAllFlags;
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::CapabilitySet;
use std::fs;
use std::io;

/// The steps taken so far. They are told in the log by the last one.
#[derive(Debug, Default)]
pub struct Harden {
    in_force: Vec<String>,
    missing: Vec<String>,
}

impl Harden {
    /// What needs to know nothing of the agent. To be called before a secret is read.
    #[must_use]
    pub fn begin() -> Harden {
        let mut harden = Harden::default();
        let no_core = Rlimit { current: Some(0), maximum: Some(0) };
        harden.note("no core dumps", rustix::process::setrlimit(Resource::Core, no_core));
        harden.note("not dumpable", forbid_dumps());
        harden.note("no new privileges", rustix::thread::set_no_new_privs(true));
        match may_lock_memory() {
            Ok(()) => {
                let flags = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
                harden.note("memory locked", rustix::mm::mlockall(flags));
            }
            Err(why) => harden.missing.push(why),
        }
        harden
    }

    /// From now on this thread, and those that it starts later, open no other files than these.
    pub fn restrict_files(&mut self, files: &Files) {
        match files::restrict(files) {
            Ok(what) => self.in_force.push(what),
            Err(why) => self.missing.push(why),
        }
    }

    /// From now on no thread of the process makes other system calls than a serving agent
    /// makes. Tells the log what is in force, and warns of what is not.
    pub fn restrict_calls(mut self) {
        match calls::restrict() {
            Ok(count) => self.in_force.push(format!("{count} system calls")),
            Err(why) => self.missing.push(why),
        }
        log::info!("hardened: {}", self.in_force.join(", "));
        for why in &self.missing {
            log::warn!("not hardened: {why}");
        }
    }

    /// What is not in force so far, and why.
    #[must_use]
    pub fn missing(&self) -> &[String] {
        &self.missing
    }

    fn note(&mut self, step: &str, done: Result<(), rustix::io::Errno>) {
        match done {
            Ok(()) => self.in_force.push(step.to_owned()),
            Err(error) => self.missing.push(format!("{step}: {}", Reason(&io::Error::from(error)))),
        }
    }
}

/// No core dump of this process, and no other of the same user may read its memory. A program that takes its place
/// (execve(2)) is as dumpable as any.
/// Errors: never, as prctl(2) has it.
pub(crate) fn forbid_dumps() -> Result<(), rustix::io::Errno> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
}

/// Locked memory counts against a limit that is often 64 KiB or 8 MiB. Below that limit locking succeeds, and
/// an allocation fails once it is reached: such a lock is worse than none.
fn may_lock_memory() -> Result<(), String> {
    let Some(limit) = rustix::process::getrlimit(Resource::Memlock).current else { return Ok(()) };
    let capable =
        rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    // A capability that a container's user namespace gave does not lift the limit.
    let initial_namespace = || {
        fs::read_to_string("/proc/self/uid_map")
            .is_ok_and(|map| map.split_ascii_whitespace().eq(["0", "0", "4294967295"]))
    };
    if capable && initial_namespace() {
        return Ok(());
    }
    Err(format!(
        "memory is not locked and may be swapped to disk, because locked memory is limited to {} KiB; set \
         LimitMEMLOCK=infinity in the unit (or run: ulimit -l unlimited)",
        limit / 1024
    ))
}
