//! The binary by hand: help, wrong usage, and a start that ends cleanly on SIGTERM.

#![allow(clippy::expect_used, reason = "helpers of tests are tests")]

mod support;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use support::host::command;

fn emulator() -> Command {
    command(env!("CARGO_BIN_EXE_kms-emulator"))
}

#[test]
fn help_is_help_and_wrong_usage_is_2() {
    let help = emulator().arg("--help").output().expect("runs");
    assert!(help.status.success() && help.stderr.is_empty());
    assert!(String::from_utf8_lossy(&help.stdout).lines().all(|line| line.chars().count() <= 110));
    let wrong = emulator().args(["--latency", "soon"]).output().expect("runs");
    assert_eq!(wrong.status.code(), Some(2));
    assert_eq!(
        String::from_utf8_lossy(&wrong.stderr),
        "kms-emulator: --latency soon: expected milliseconds\nTry 'kms-emulator --help'.\n"
    );
}

#[test]
fn sigterm_ends_it_and_takes_its_ca_file_along() {
    let mut child = emulator().stdout(Stdio::piped()).spawn().expect("runs");
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines().map_while(Result::ok);
    let told: Vec<String> = lines.take_while(|line| !line.starts_with("# The emulator is running")).collect();
    let value = |key: &str| {
        let line = told.iter().find_map(|line| line.strip_prefix(key)).expect("the line is there");
        line.trim_matches(|c| c == '"' || c == ' ').to_owned()
    };
    let ca = value("CaFile = ");
    assert!(std::fs::read_to_string(&ca).expect("the CA is there").contains("BEGIN CERTIFICATE"));
    assert!(std::net::TcpStream::connect(value("Endpoint = ")).is_ok());
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM)
        .expect("a signal to our own child");
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
    assert!(!std::path::Path::new(&ca).exists());
    // What it prints is a configuration file for the agent, as it stands.
    let is_toml = |line: &String| line.is_empty() || line.starts_with(['#', '[']) || line.contains(" = \"");
    assert!(told.iter().all(is_toml), "{told:?}");
}

#[test]
fn a_port_that_is_taken_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("its address");
    for (flag, service) in [("--kms-port", "KMS"), ("--metadata-port", "the metadata service")] {
        let out = emulator().args([flag, &address.port().to_string()]).output().expect("runs");
        assert_eq!(out.status.code(), Some(1));
        let told = String::from_utf8_lossy(&out.stderr).into_owned();
        let expected =
            format!("kms-emulator: cannot listen on {address} for {service}: Address already in use");
        assert!(told.starts_with(&expected), "{told}");
    }
}
