//! Tests whose subject is time: deadlines, pauses, how long others wait. They say something about the agent only where
//! the host lets it run.

use super::host::skip;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// So many threads, on average, want each processor: the host has other work than these tests, which put half of it
/// there at most.
const CROWDED: f64 = 3.0;
const TRIES: u32 = 3;
const SAMPLE_PAUSE: Duration = Duration::from_millis(50);

/// Makes tests of functions: `timed_tests!(a, b)` has the tests `timed::a` and `timed::b`.
#[macro_export]
macro_rules! timed_tests {
    ($($name:ident),+ $(,)?) => {
        mod timed {
            $(#[test]
            fn $name() {
                super::common::timed::run(super::$name);
            })+
        }
    };
}

/// Runs a test. A failure counts, unless the host was crowded meanwhile: then it is tried again, and skipped at last.
pub fn run(test: fn()) {
    let mut threads = 0.0;
    for _ in 0..TRIES {
        let (end, ended) = mpsc::channel::<()>();
        let crowd = thread::spawn(move || mean_crowd(&ended));
        let outcome = catch_unwind(AssertUnwindSafe(test));
        drop(end);
        threads = crowd.join().expect("it only reads");
        match outcome {
            Ok(()) => return,
            Err(panic) if threads < CROWDED => resume_unwind(panic),
            Err(_) => {}
        }
    }
    skip(&format!("it failed {TRIES} times while {threads:.0} threads wanted each processor of this host"));
}

/// How many threads wanted each processor, on average, until `ended`.
fn mean_crowd(ended: &mpsc::Receiver<()>) -> f64 {
    let (mut sum, mut samples) = (0.0, 0.0);
    while ended.recv_timeout(SAMPLE_PAUSE) == Err(mpsc::RecvTimeoutError::Timeout) {
        // "0.20 0.18 0.12 1/80 11206", see proc_loadavg(5): one of 80 threads is running or wants to. It is this one.
        let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let running = text.split(' ').nth(3).and_then(|it| it.split('/').next()?.parse::<f64>().ok());
        sum += running.map_or(0.0, |running| running - 1.0);
        samples += 1.0;
    }
    let processors = thread::available_parallelism().map_or(1, |it| it.get());
    sum / f64::max(samples, 1.0) / processors as f64
}
