//! The host that tests run on: what a process inherits of it and no test may depend on, which programs it has, and
//! which tests it leaves nothing to do for. The emulator's tests share this file.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]
#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests are tests")]

use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit, umask};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::process::parent_id;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Once};
use std::{env, thread};

/// What programs keep of the environment of the tests: no proxy, no access key, no token, no `JAVA_TOOL_OPTIONS`, and
/// nothing else that is meant for another program.
const KEPT_VARIABLES: [&str; 5] = ["PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "LLVM_PROFILE_FILE"];

/// More than any test or agent needs.
const OPEN_FILES: u64 = 8192;

/// Names the file that takes down what is skipped; otherwise it is one of the build folder.
pub const RECORD: &str = "KMS_AGENT_TEST_SKIPPED";

// ---- What a process inherits ----

/// A program to be started. All programs of the tests are started by this function (`tests/inherited.rs` checks it),
/// so that it does not matter how the tests were: signals have their default action and none is blocked, the umask is
/// 022, many files may be open, standard input is empty, and the environment has a `PATH` and little else.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    settle();
    let mut command = unblocked(program.as_ref());
    command.env_clear().env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
    for name in KEPT_VARIABLES {
        command.envs(env::var_os(name).map(|value| (name, value)));
    }
    command
}

/// Undoes for this process, and so for those that it starts, what it has inherited.
pub fn settle() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        catch_ignored_signals();
        umask(Mode::from_raw_mode(0o022));
        raise_open_files();
    });
}

/// A program to be started with no signal blocked. Neither the standard library nor most shells see to that, so where
/// one is blocked Python does.
fn unblocked(program: &OsStr) -> Command {
    const SCRIPT: &str = "import os, signal, sys
for ignored_by_python in signal.SIGPIPE, signal.SIGXFSZ:
    signal.signal(ignored_by_python, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
os.execvp(sys.argv[1], sys.argv[1:])";
    if signal_mask("SigBlk:") == 0 {
        return Command::new(program);
    }
    let mut command = Command::new("python3");
    command.args(["-I", "-S", "-c", SCRIPT]).arg(program);
    command
}

/// execve(2) resets a signal that is caught to its default action, and leaves one that is ignored ignored. So each
/// signal that is ignored is caught here, to no effect. (With SIGCHLD ignored wait(2) finds no children either.)
fn catch_ignored_signals() {
    let ignored = signal_mask("SigIgn:");
    for signal in 1..=31 {
        // Rust's runtime ignores SIGPIPE itself, and undoes that in a child.
        let may_be_caught =
            signal != signal_hook::consts::SIGPIPE && !signal_hook::consts::FORBIDDEN.contains(&signal);
        if ignored & 1 << (signal - 1) != 0 && may_be_caught {
            signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))
                .unwrap_or_else(|error| panic!("signal {signal}: {error}"));
        }
    }
}

/// A mask of this thread's signals.
pub fn signal_mask(row: &str) -> u64 {
    mask_in(&fs::read_to_string("/proc/thread-self/status").unwrap_or_default(), row)
}

/// A mask in the text of /proc/PID/status, see proc_pid_status(5): signal n is bit n - 1. Real-time signals are left
/// out, as two of them are the C library's own.
pub fn mask_in(status: &str, row: &str) -> u64 {
    let digits = status.lines().find_map(|line| line.strip_prefix(row));
    let mask = digits.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok());
    mask.unwrap_or(0) & 0x7fff_ffff
}

/// To [`OPEN_FILES`], or as far as it goes: only root may raise the maximum.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    for maximum in [limit.maximum.map(|maximum| maximum.max(OPEN_FILES)), limit.maximum] {
        let current = maximum.unwrap_or(OPEN_FILES).min(OPEN_FILES);
        let enough = limit.current.is_none_or(|now| now >= current);
        if enough || setrlimit(Resource::Nofile, Rlimit { current: Some(current), maximum }).is_ok() {
            return;
        }
    }
}

/// Whether a process may have so many open files; false after [`skip`] took down that it may not.
#[must_use]
pub fn can_open_files(count: u64) -> bool {
    settle();
    let enough = getrlimit(Resource::Nofile).current.is_none_or(|current| current >= count);
    if !enough {
        skip(&format!("it needs {count} open files, and ulimit -n allows fewer"));
    }
    enough
}

// ---- Programs ----

/// A program on the `PATH`; `None` after [`missing`] took down that there is none.
#[track_caller]
pub fn tool(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|folder| folder.join(name)).find(|it| it.is_file());
    if found.is_none() {
        missing(&format!("{name} is not installed"));
    }
    found
}

/// A Python with these modules: `KMS_AGENT_TEST_PYTHON`, else `python3`. As [`tool`] if there is none.
#[track_caller]
pub fn python_with(modules: &str) -> Option<PathBuf> {
    let python = match env::var_os("KMS_AGENT_TEST_PYTHON") {
        Some(path) => PathBuf::from(path),
        None => tool("python3")?,
    };
    let mut import = command(&python);
    import.args(["-c", &format!("import {modules}")]).stderr(Stdio::null());
    let has_them = import.status().is_ok_and(|status| status.success());
    if !has_them {
        missing(&format!("{} has no {modules}", python.display()));
    }
    has_them.then_some(python)
}

// ---- What is skipped ----

/// The calling test is skipped for want of something that can be installed. `.ci/run` installs it: with `CI=true` that
/// is a failure.
#[track_caller]
pub fn missing(what: &str) {
    assert!(env::var_os("CI").is_none_or(|it| it != "true"), "{what}, and CI=true");
    skip(what);
}

/// The calling test, or the rest of it, is skipped for want of something that only the host can give. It is said at
/// once, past the test harness, which would keep it to itself as the test passes; and the last of the test targets,
/// `emulator/tests/skipped.rs`, says how many there were and why.
pub fn skip(why: &str) {
    let test = test_name();
    let why = why.trim().replace('\n', " ");
    let _ = writeln!(io::stderr(), "skipped: {test}: {why}");
    let path = record();
    let folder = path.parent().map_or(Ok(()), fs::create_dir_all);
    let file = folder.and_then(|()| File::options().create(true).append(true).open(&path));
    // In one piece: tests run side by side.
    if let Err(error) = file.and_then(|mut file| file.write_all(format!("{test}\t{why}\n").as_bytes())) {
        let _ = writeln!(io::stderr(), "{}: {error}", path.display());
    }
}

/// `target::test`; the target alone where a test has no thread of its own (`--test-threads=1`).
fn test_name() -> String {
    let target = env::current_exe().ok().and_then(|path| Some(path.file_stem()?.to_str()?.to_owned()));
    // Cargo puts a hash behind the name.
    let target = target.as_deref().and_then(|stem| Some(stem.rsplit_once('-')?.0)).unwrap_or("tests");
    match thread::current().name() {
        None | Some("main") => target.to_owned(),
        Some(test) => format!("{target}::{test}"),
    }
}

/// Where it is taken down: a file for each run of the tests, which is known by the process that runs them (cargo) and
/// when that began, see proc_pid_stat(5).
pub fn record() -> PathBuf {
    if let Some(path) = env::var_os(RECORD) {
        return path.into();
    }
    let stat = fs::read_to_string(format!("/proc/{}/stat", parent_id())).unwrap_or_default();
    let start = stat.rsplit_once(") ").and_then(|(_, fields)| fields.split(' ').nth(19)).unwrap_or("0");
    let name = format!("{}-{start}", parent_id());
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("skipped").join(name)
}
