//! The quickstart as a newcomer meets it: its help, what ends it, and what it says of a port that is taken. Cargo
//! builds it for a run of all tests; `cargo test --test quickstart` alone does not.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::{Folder, command, missing, tool, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

fn quickstart() -> Option<PathBuf> {
    let test = std::env::current_exe().unwrap();
    let built = test.ancestors().nth(2).unwrap().join("examples/quickstart");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/quickstart.rs");
    let changed = |path: &Path| fs::metadata(path).and_then(|file| file.modified()).ok();
    let is_new = changed(&built) >= changed(&source);
    if !is_new {
        missing("the quickstart is not built: cargo build --example quickstart");
    }
    is_new.then_some(built)
}

/// A running quickstart. It ends with this value.
struct Running {
    child: Child,
    /// `TMPDIR` is in it, with a space in its name.
    folder: Folder,
    /// How it has introduced itself.
    told: String,
}

impl Running {
    #[track_caller]
    fn start(program: &Path) -> Running {
        loop {
            let folder = Folder::new();
            let tmpdir = folder.join("a folder");
            fs::create_dir(&tmpdir).unwrap();
            let child = command(program)
                .env("TMPDIR", tmpdir)
                .stdout(File::create(folder.join("stdout")).unwrap())
                .stderr(File::create(folder.join("stderr")).unwrap())
                .spawn()
                .unwrap();
            let mut running = Running { child, folder, told: String::new() };
            let status = wait_for("it says how to end it, or ends", || {
                running.told = running.written("stdout");
                let is_up = running.told.contains("ends the quickstart and removes its files.");
                if is_up { Some(None) } else { running.child.try_wait().unwrap().map(Some) }
            });
            // Another quickstart, of another test perhaps, has listened there since this one has tried.
            match status {
                Some(_) if running.written("stderr").contains("port 2025 is taken") => {}
                Some(status) => panic!("{status}: {}", running.written("stderr")),
                None => return running,
            }
        }
    }

    fn written(&self, name: &str) -> String {
        fs::read_to_string(self.folder.join(name)).unwrap()
    }

    #[track_caller]
    fn ends_with(mut self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        let status = wait_for("it ends", || self.child.try_wait().unwrap());
        assert_eq!(status.code(), Some(0), "{signal:?}: {status}: {}", self.written("stderr"));
        assert_eq!(
            fs::read_dir(self.folder.join("a folder")).unwrap().count(),
            0,
            "{signal:?}: it cleans up"
        );
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn output(command: &mut Command) -> (Option<i32>, String, String) {
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn help_is_help_and_wrong_usage_is_2() {
    let Some(quickstart) = quickstart() else { return };
    for flag in ["--help", "-h"] {
        let (code, stdout, stderr) = output(command(&quickstart).arg(flag));
        assert_eq!((code, stderr.as_str()), (Some(0), ""), "{flag}");
        assert!(
            stdout.contains("\nUsage: cargo run --release --example quickstart [-- --once]\n"),
            "{stdout}"
        );
    }
    let (code, stdout, stderr) = output(command(&quickstart).args(["--once", "--twice"]));
    assert_eq!((code, stdout.as_str()), (Some(2), ""));
    assert_eq!(stderr, "quickstart: it takes --once or nothing; --help tells more\n");
}

#[test]
fn a_closed_terminal_and_ctrl_c_end_it_and_leave_nothing_behind() {
    let Some(quickstart) = quickstart() else { return };
    for signal in [Signal::HUP, Signal::INT, Signal::TERM] {
        Running::start(&quickstart).ends_with(signal);
    }
}

#[test]
fn what_it_prints_can_be_pasted() {
    let (Some(quickstart), Some(sh), Some(_)) = (quickstart(), tool("sh"), tool("curl")) else { return };
    let running = Running::start(&quickstart);
    let told = &running.told;
    let from = told.find("  curl -i").expect("a curl line");
    let line = &told[from..from + told[from..].find("\n\n").unwrap()];
    let (code, stdout, stderr) = output(command(sh).args(["-c", line]).env("HOME", running.folder.path()));
    assert!(code == Some(0) && stdout.contains("\r\nX-Cache: MISS\r\n"), "{line}: {stdout}{stderr}");
    running.ends_with(Signal::TERM);
}

#[test]
fn it_says_who_holds_its_port() {
    let Some(quickstart) = quickstart() else { return };
    // Unless another program has it: then that one is named, if it is still there.
    let (held, running) = loop {
        let held = TcpListener::bind("127.0.0.1:2025");
        let running = Running::start(&quickstart);
        if held.is_ok() || running.told.starts_with("Port") {
            break (held, running);
        }
    };
    let told = &running.told;
    let (first, _) = told.split_once('\n').unwrap();
    assert!(first.starts_with("Port 2025 is held by "), "{first}");
    assert!(first.ends_with(", so this agent takes a free one."), "{first}");
    if held.is_ok() {
        let us = format!("(pid {})", std::process::id());
        assert!(first.contains(&us), "{us}: {first}");
    }
    let (_, port) = told.split_once("kms-agent      http://localhost:").unwrap();
    let port: u16 = port.lines().next().unwrap().parse().unwrap();
    assert!(port != 2025 && TcpStream::connect(("127.0.0.1", port)).is_ok());
    running.ends_with(Signal::TERM);
}
