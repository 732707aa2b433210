//! No test: the last of the test targets that `cargo test --workspace` runs. It says how many tests were skipped, or
//! cut short, and why.

#[path = "../../tests/common/host.rs"]
mod host;

use std::collections::BTreeMap;
use std::fs;

fn main() {
    // What lists tests finds none here.
    if std::env::args().any(|argument| argument == "--list") {
        return;
    }
    let path = host::record();
    let record = fs::read_to_string(&path).unwrap_or_default();
    // Another run, by a process of the same id, begins anew.
    if std::env::var_os(host::RECORD).is_none() {
        let _ = fs::remove_file(&path);
    }
    println!("\n{}\n", summary(&record));
}

/// How many, and a line for each reason.
fn summary(record: &str) -> String {
    let mut tests: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (test, why) in record.lines().filter_map(|line| line.split_once('\t')) {
        tests.entry(why).or_default().push(test);
    }
    let mut out = match tests.values().map(Vec::len).sum() {
        0 => "no test was skipped".to_owned(),
        1 => "1 test was skipped or cut short:".to_owned(),
        count => format!("{count} tests were skipped or cut short:"),
    };
    for (why, tests) in tests {
        out += &format!("\n  {why}: {}", tests.join(", "));
    }
    out
}
