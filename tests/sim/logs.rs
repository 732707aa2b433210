//! Catches what the agent logs: none of it may hold what is secret.

use log::{LevelFilter, Log, Metadata, Record};
use std::cell::RefCell;
use std::fmt::Write as _;
use std::sync::Once;

/// Part of everything that is secret in a simulation: values, tokens, keys.
pub const SECRET_MARK: &str = "hush-";

#[derive(Default)]
struct Caught {
    leak: Option<String>,
    printing: bool,
    line: String,
    lines: u64,
}

thread_local! {
    static CAUGHT: RefCell<Caught> = RefCell::new(Caught::default());
}

struct Catcher;

impl Log for Catcher {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        CAUGHT.with_borrow_mut(|caught| {
            let Caught { leak, printing, line, lines } = caught;
            *lines += 1;
            line.clear();
            let _ = write!(line, "{}", record.args());
            if *printing {
                println!("      log {:5} {line}", record.level());
            }
            if line.contains(SECRET_MARK) {
                *leak = Some(line.clone());
            }
        });
    }

    fn flush(&self) {}
}

/// A new run begins on this thread.
pub fn begin(printing: bool) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Catcher).expect("the only logger");
        log::set_max_level(LevelFilter::Debug);
    });
    CAUGHT.set(Caught { printing, ..Caught::default() });
}

/// A line with a secret in it, if there was one.
pub fn leak() -> Option<String> {
    CAUGHT.with_borrow_mut(|caught| caught.leak.take())
}

/// Lines logged in this run.
pub fn lines() -> u64 {
    CAUGHT.with_borrow(|caught| caught.lines)
}
