//! What a command tells the person who started it: exit codes and words.

use crate::log::Reason;
use crate::text::excerpt;
use std::fmt::Display;
use std::io::{self, Write as _};

pub(super) const OK: u8 = 0;
pub(super) const FAILED: u8 = 1;
/// The arguments or the configuration are wrong.
pub(super) const USAGE: u8 = 2;

/// Tells the person at the terminal what went wrong, or what else they should know.
pub(super) fn complain(what: &dyn Display) {
    // Whoever closed standard error wants to hear nothing.
    let _ = writeln!(io::stderr(), "kms-agent: {}", lines(what));
}

/// A text of some lines for a terminal: paths and arguments in it may be foreign.
pub(super) fn lines(text: &dyn Display) -> String {
    let lines: Vec<String> = text.to_string().split('\n').map(|line| excerpt(line, usize::MAX)).collect();
    lines.join("\n")
}

/// Writes to standard output; a failure is told, since what it was meant for is missing now.
pub(super) fn print(bytes: &[u8]) -> u8 {
    let mut out = io::stdout();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => OK,
        Err(error) => {
            complain(&format_args!("cannot write to standard output: {}", Reason(&error)));
            FAILED
        }
    }
}
