//! What a process inherits of the one that starts it: signals, umask, limits, descriptors, environment. The tests must
//! not depend on it (`common::host`), and the agent must serve and end whatever it is.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::*;
use rustix::process::Signal;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

/// Tells a child that it is the trial, and not the test.
const TRIAL: &str = "KMS_AGENT_TEST_TRIAL";

/// What is odd about how these tests may be started, for bash, which runs "$@" then.
const ODD: &str = r#"trap '' HUP INT QUIT ALRM TERM CHLD USR1 XFSZ; umask 077; ulimit -S -n 256 -c 0
    export KMS_TOKEN=x http_proxy=http://127.0.0.1:9 JAVA_TOOL_OPTIONS=-Da=b ALIBABA_CLOUD_ACCESS_KEY_ID=y
    exec env --block-signal "$@" <&-"#;

/// In the trial: how a program finds things that a test has started with [`command`].
#[test]
fn programs_inherit_nothing_odd_of_the_tests() {
    let name = "programs_inherit_nothing_odd_of_the_tests";
    let (Some(bash), Some(sh), Some(env)) = (tool("bash"), tool("sh"), tool("env")) else { return };
    if std::env::var_os(TRIAL).is_none() {
        if !knows_block_signal(&env) {
            return;
        }
        let output = command(bash)
            .args(["-c", ODD, "odd"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture", "--test-threads=1"])
            .env(TRIAL, "")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    let is_set = |row, signal: Signal| host::signal_mask(row) & 1 << (signal.as_raw() - 1) != 0;
    assert!(is_set("SigIgn:", Signal::QUIT) && is_set("SigBlk:", Signal::TERM), "it is odd here");
    let status = String::from_utf8(run(&tool("cat").unwrap(), &["/proc/self/status"])).unwrap();
    assert!(status.contains("\nSigBlk:") && status.contains("\nSigIgn:"));
    assert_eq!(["SigBlk:", "SigIgn:"].map(|row| host::mask_in(&status, row)), [0, 0], "{status}");
    let script = "umask; ulimit -n; read line || echo end; env";
    let told = String::from_utf8(run(&sh, &["-c", script])).unwrap();
    let lines: Vec<&str> = told.lines().collect();
    assert_eq!((lines[0], lines[2]), ("0022", "end"), "{told}");
    assert!(lines[1] == "unlimited" || lines[1].parse::<u64>().unwrap() > 256, "{told}");
    for name in ["KMS_TOKEN", "http_proxy", "JAVA_TOOL_OPTIONS", "ALIBABA_CLOUD_ACCESS_KEY_ID"] {
        assert!(std::env::var_os(name).is_some(), "it is odd here");
        assert!(!told.contains(&format!("{name}=")), "{told}");
    }
}

/// The test harness keeps what a test prints to itself when it passes.
#[test]
fn what_is_skipped_is_seen_and_fails_where_it_has_to_be_there() {
    let name = "what_is_skipped_is_seen_and_fails_where_it_has_to_be_there";
    if std::env::var_os(TRIAL).is_some() {
        return missing("a thing");
    }
    let folder = Folder::new();
    for (ci, passes) in [("", true), ("true", false)] {
        let record = folder.write("record", "");
        let output = command(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .envs([(TRIAL, "".as_ref()), ("CI", ci.as_ref()), (host::RECORD, record.as_os_str())])
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.success(), passes, "{stderr}");
        assert_eq!(
            stderr.contains("skipped: inherited") && stderr.contains(": a thing\n"),
            passes,
            "{stderr}"
        );
        assert_eq!(fs::read_to_string(&record).unwrap().ends_with("\ta thing\n"), passes);
    }
}

#[test]
fn all_programs_of_the_tests_are_started_by_one_function() {
    // Those of harden.rs have to be refused.
    let allowed = [("host.rs", 2), ("harden.rs", 3)];
    // In two pieces, so that it is not found in this file.
    let mark = ["Command", "::new("].concat();
    let mut seen = 0;
    for folder in ["tests", "tests/common", "emulator/tests", "emulator/tests/support"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
        for file in fs::read_dir(folder).unwrap().flatten().filter(|it| it.path().is_file()) {
            let name = file.file_name().into_string().unwrap();
            let Ok(text) = fs::read_to_string(file.path()) else { continue };
            let expected = allowed.iter().find(|(it, _)| *it == name).map_or(0, |(_, count)| *count);
            assert_eq!(text.matches(&mark).count(), expected, "{name}: common::command does it");
            seen += 1;
        }
    }
    assert!(seen > 20, "the tests are here");
}

/// The agent itself, started in circumstances that its parent is to blame for.
#[test]
fn an_agent_serves_and_ends_whatever_it_inherits() {
    let Some(bash) = tool("bash") else { return };
    for odd in [
        "trap '' HUP INT QUIT ALRM TERM CHLD PIPE USR1 XFSZ; exec \"$@\"",
        "umask 0; exec \"$@\" <&-",
        "umask 077; exec \"$@\"",
        "ulimit -c unlimited 2>/dev/null; ulimit -l 0; exec setsid \"$@\"",
        "exec \"$@\" <&- >&- 2>&-",
    ] {
        let emulator = emulator(&[("a", "1")]);
        let wrapper = [bash.as_os_str(), "-c".as_ref(), odd.as_ref(), "odd".as_ref()];
        let mut agent = Setup::new(&emulator).wrapped(wrapper).start();
        assert_eq!(agent.secret("a").data(), "1", "{odd}");
        agent.folder.write("kmstoken", "another");
        agent.signal(Signal::HUP);
        agent.token = "another".into();
        agent.wait_for_log("SIGHUP came: ");
        wait_until("the new token works", || agent.secret("a").status == 200);
        for file in ["logs", "logs/kms-agent.log"] {
            let mode = fs::metadata(agent.folder.join(file)).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode & 0o022, 0, "{odd}: {file} has mode {mode:o}");
        }
        assert_eq!(agent.stop().code(), Some(0), "{odd}: SIGTERM ends it");
    }
}

/// Whether this `env` is that of GNU's coreutils 8.31 or newer.
fn knows_block_signal(env: &Path) -> bool {
    let tried = command(env).args(["--block-signal=USR1", "true"]).output();
    let knows = tried.is_ok_and(|output| output.status.success());
    if !knows {
        missing("env knows no --block-signal");
    }
    knows
}
