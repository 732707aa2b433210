//! The lines of a check: what they look like, and whether one of them failed.

use crate::cli::terminal::lines;
use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};

const GREEN: &str = "32";
const RED: &str = "1;31";
const YELLOW: &str = "33";

/// Prints a line a step, and remembers whether one failed.
#[derive(Debug)]
pub(super) struct Report {
    colour: bool,
    failed: bool,
}

impl Report {
    /// Colour only on a terminal that has it, and not against the user's will (<https://no-color.org>).
    pub(super) fn to_stdout() -> Report {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let dumb = set("TERM").is_none_or(|term| term == "dumb");
        Report { colour: io::stdout().is_terminal() && set("NO_COLOR").is_none() && !dumb, failed: false }
    }

    pub(super) fn ok(&mut self, step: &str, what: impl Display) {
        self.line("ok", GREEN, step, what);
    }

    /// It does not; `what` came back, and what to do.
    pub(super) fn failed(&mut self, step: &str, what: impl Display) {
        self.failed = true;
        self.line("FAILED", RED, step, what);
    }

    /// It cannot be tried, because an earlier one failed.
    pub(super) fn skipped(&mut self, step: &str, why: impl Display) {
        self.line("skipped", YELLOW, step, why);
    }

    /// Whether no step failed.
    pub(super) const fn all_is_well(&self) -> bool {
        !self.failed
    }

    fn line(&self, verdict: &str, colour: &str, step: &str, what: impl Display) {
        let (begin, end) =
            if self.colour { (format!("\u{1b}[{colour}m"), "\u{1b}[m") } else { (String::new(), "") };
        // Whoever closed the pipe has seen enough; the exit code still tells.
        let _ = writeln!(io::stdout(), "{begin}{verdict:<8}{end} {step:<14} {}", lines(&what));
    }
}
