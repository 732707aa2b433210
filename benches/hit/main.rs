#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
//! Instructions of a cached hit, from the read to the write, counted by valgrind: repeatable where seconds are
//! not.
//!
//! `cargo bench --bench hit` runs itself under callgrind, twice for each case, with different numbers of hits: the difference
//! is free of start-up. The figures are compared with `benches/hit/baseline.txt`; more than 3 % above is a failure.
//! `cargo bench --bench hit -- --bless` writes it anew.

mod wire;

use kms_agent::config::ResponseType;
use kms_agent::log::{LogHandle, LogPath, Settings};
use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, ExitCode};
use wire::Agent;

/// What may be above the baseline, in per cent.
const GROWTH_MAX: f64 = 3.0;
/// Ticks of 50 hits.
const ROUNDS: (u64, u64) = (20, 120);

/// Name, response type, and whether the log is on, at its default level and into a file.
const CASES: [(&str, ResponseType, bool); 4] = [
    ("hit", ResponseType::Kms, false),
    ("hit, logged", ResponseType::Kms, true),
    ("hit, AWS", ResponseType::Aws, false),
    ("hit, Vault", ResponseType::Vault, false),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|it| it == "--rounds") {
        let (case, rounds) =
            (arguments[at + 1].parse::<usize>().unwrap(), arguments[at + 2].parse().unwrap());
        let (_, response_type, logged) = CASES[case];
        Agent::start(response_type, logged.then(log_into_a_file)).serve(rounds);
        return ExitCode::SUCCESS;
    }
    if !Command::new("valgrind").arg("--version").output().is_ok_and(|it| it.status.success()) {
        println!("skipped: valgrind is not installed");
        return ExitCode::SUCCESS;
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/hit/baseline.txt");
    let baseline = std::fs::read_to_string(&file).unwrap_or_default();
    let (mut lines, mut failed) = (String::new(), false);
    for (number, (name, ..)) in CASES.iter().enumerate() {
        let (few, many) = (instructions(number, ROUNDS.0), instructions(number, ROUNDS.1));
        let each = (many - few) / ((ROUNDS.1 - ROUNDS.0) * 50);
        let _ = writeln!(lines, "{name}: {each} instructions");
        let before = baseline.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let before: Option<f64> = before.and_then(|it| it.split(' ').next()?.parse().ok());
        let growth = before.map_or(0.0, |before| (each as f64 / before - 1.0) * 100.0);
        println!("{name}: {each} instructions a hit ({growth:+.1} % to the baseline)");
        failed |= growth > GROWTH_MAX;
    }
    if arguments.iter().any(|it| it == "--bless") {
        std::fs::write(&file, lines).unwrap();
    } else if failed {
        println!(
            "more than {GROWTH_MAX} % above {}: make it cheaper, or bless it with a reason",
            file.display()
        );
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Sets up the log of this process, in a new folder below that of the build.
fn log_into_a_file() -> LogHandle {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("hit-log");
    let _ = std::fs::remove_dir_all(&folder);
    kms_agent::log::init(&Settings { path: LogPath::Folder(folder), ..Settings::default() }).unwrap()
}

/// All instructions of a process that serves so many rounds.
fn instructions(case: usize, rounds: u64) -> u64 {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe().unwrap())
        .args(["--rounds", &case.to_string(), &rounds.to_string()])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}");
    let collected = text.lines().find_map(|line| line.split("Collected : ").nth(1));
    collected.unwrap_or_else(|| panic!("{text}")).trim().parse().unwrap()
}
