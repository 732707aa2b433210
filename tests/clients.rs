//! Clients that no one here wrote, against the real binary: curl, Python, Node, Java and Go for ResponseType 0,
//! an application of the AWS agent for 1, `hvac` for 2. And the programs of `examples/clients`, which show
//! people how to ask.
//!
//! A client that is not installed is skipped, unless `CI` is `true`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::{Agent, Folder, Setup, TOKEN, can_open_files, command, emulator, python_with, tool};
use kms_emulator::{Emulator, NewSecret};
use std::ffi::OsStr;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

/// What JSON has to escape, and what it need not.
const ODD: &str = "gr\u{fc}n \"q\" \\ / \t\u{1}\u{1f511}\u{2028} &<>%0a\nline 2";
/// What a URL has to escape.
const ODD_NAME: &str = "team/k\u{e4}se +1";

fn example(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/clients").join(path)
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(name)
}

fn url(agent: &Agent) -> String {
    format!("http://localhost:{}", agent.port)
}

fn token_file(agent: &Agent) -> String {
    agent.folder.join("kmstoken").display().to_string()
}

/// Exit code, standard output, standard error.
fn run(command: &mut Command, input: &str) -> (Option<i32>, String, String) {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    // Most do not read it at all.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// Runs a program that says `ok` if all it expects is true.
#[track_caller]
fn expect_ok(command: &mut Command, input: &str) {
    let (code, stdout, stderr) = run(command, input);
    assert_eq!((code, stdout.as_str()), (Some(0), "ok\n"), "{command:?}: {stderr}");
}

fn kms() -> (Emulator, Agent) {
    let emulator = emulator(&[("a", "1"), ("odd", ODD), (ODD_NAME, "gr\u{fc}n")]);
    let agent = Agent::start(&emulator);
    (emulator, agent)
}

/// What holds for each of `examples/clients`. `data` takes the value out of what was printed.
#[track_caller]
fn check_example(program: &[&OsStr], data: fn(&str) -> String) {
    let (_emulator, mut agent) = kms();
    let ask = |name: &str, token: &str| {
        let mut command = command(program[0]);
        command.args(&program[1..]).arg(name).env("KMS_AGENT", url(&agent)).env("KMS_TOKEN", token);
        run(&mut command, "")
    };
    let file = format!("file://{}", token_file(&agent));
    for (name, token, value) in
        [("a", file.as_str(), "1"), ("odd", TOKEN, ODD), (ODD_NAME, file.as_str(), "gr\u{fc}n")]
    {
        let (code, stdout, stderr) = ask(name, token);
        assert_eq!((code, stderr.as_str()), (Some(0), ""), "{name}");
        assert_eq!(data(&stdout), value, "{name}");
    }
    for (name, token, status, why) in
        [("missing", TOKEN, "404", "Forbidden.ResourceNotFound"), ("a", "wrong", "403", "InvalidToken")]
    {
        let (code, stdout, stderr) = ask(name, token);
        assert_ne!(code, Some(0), "{name} {token}");
        let said = stdout + &stderr;
        assert!(said.contains(status) && said.contains(why), "{name} {token}: {said}");
        assert!(!said.contains(TOKEN), "{said}");
    }
    // Nobody there.
    let _nobody = agent.stop_and_hold_port();
    let mut command = command(program[0]);
    command.args(&program[1..]).arg("a").env("KMS_AGENT", url(&agent));
    let (code, stdout, stderr) = run(command.env("KMS_TOKEN", TOKEN), "");
    assert!(code != Some(0) && stdout.is_empty() && !stderr.is_empty(), "{stdout}{stderr}");
    // No stack trace for that.
    assert!(stderr.lines().count() <= 2, "{stderr}");
}

fn line(stdout: &str) -> String {
    stdout.strip_suffix('\n').unwrap_or_default().to_owned()
}

#[test]
fn example_in_curl() {
    let (Some(sh), Some(_)) = (tool("sh"), tool("curl")) else { return };
    check_example(&[sh.as_os_str(), example("curl/get-secret").as_os_str()], |stdout| {
        let reply: serde_json::Value = serde_json::from_str(stdout).expect(stdout);
        reply["SecretData"].as_str().unwrap().to_owned()
    });
}

#[test]
fn example_in_python() {
    let Some(python) = python_with("urllib.request") else { return };
    check_example(&[python.as_os_str(), example("python/get_secret.py").as_os_str()], line);
}

#[test]
fn example_in_node() {
    let Some(node) = tool("node") else { return };
    check_example(&[node.as_os_str(), example("node/get-secret.mjs").as_os_str()], line);
}

/// Compiles once; `java GetSecret.java` would do it each time.
fn java(source: &Path, folder: &Folder) -> Option<(PathBuf, String)> {
    let (java, javac) = (tool("java")?, tool("javac")?);
    let (code, _, stderr) =
        run(command(javac).args(["-Xlint:all", "-Werror", "-d"]).arg(folder.path()).arg(source), "");
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    Some((java, folder.path().display().to_string()))
}

/// Starts fast, for a program that ends at once.
const JAVA: [&str; 3] = ["-XX:TieredStopAtLevel=1", "-Xshare:auto", "-cp"];

#[test]
fn example_in_java() {
    let folder = Folder::new();
    let Some((java, classes)) = java(&example("java/GetSecret.java"), &folder) else { return };
    let arguments: Vec<&OsStr> = [JAVA[0], JAVA[1], JAVA[2], &classes, "GetSecret"].map(OsStr::new).into();
    check_example(&[&[java.as_os_str()], arguments.as_slice()].concat(), line);
}

/// Compiles once, for `source` is a file or a folder with one.
fn build(go: &Path, source: &Path, folder: &Folder) -> PathBuf {
    let program = folder.join("program");
    let (inside, what) = match source.is_dir() {
        true => (source, "."),
        false => (source.parent().unwrap(), source.file_name().unwrap().to_str().unwrap()),
    };
    let mut command = command(go);
    // The standard library is all they need: nothing is to be fetched.
    command
        .current_dir(inside)
        .env("GOENV", "off")
        .env("GOPROXY", "off")
        .env("GOFLAGS", "-buildvcs=false")
        .env("CGO_ENABLED", "0");
    if std::env::var_os("HOME").is_none() {
        command.env("GOCACHE", folder.join("cache")).env("GOPATH", folder.join("path"));
    }
    let (code, _, stderr) = run(command.args(["build", "-o"]).arg(&program).arg(what), "");
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    program
}

#[test]
fn go_clients() {
    let Some(go) = tool("go") else { return };
    let folders = [Folder::new(), Folder::new()];
    let documented = build(&go, &example("go"), &folders[0]);
    let many = build(&go, &script("many.go"), &folders[1]);
    check_example(&[documented.as_os_str()], line);
    let (_emulator, agent) = kms();
    expect_ok(command(many).args([url(&agent), TOKEN.to_owned()]), "");
}

#[test]
fn curl_asks_as_people_do() {
    let Some(curl) = tool("curl") else { return };
    let (emulator, agent) = kms();
    let port = agent.port;
    let token = format!("X-KMS-Token: {TOKEN}");
    let ask = |arguments: &[&str], path: &str| {
        let mut command = command(&curl);
        command.args([
            "-q",
            "-sS",
            "-g",
            "--noproxy",
            "*",
            "-H",
            &token,
            "-w",
            " %{http_code} %{num_connects}\n",
        ]);
        let (code, stdout, stderr) =
            run(command.args(arguments).arg(format!("http://localhost:{port}{path}")), "body");
        assert_eq!((code, stderr.as_str()), (Some(0), ""), "{arguments:?} {path}");
        stdout
    };
    for arguments in
        [&[][..], &["-0"], &["-4"], &["--http2"], &["-H", "Connection: close"], &["--compressed"]]
    {
        let said = ask(arguments, "/v1/a");
        assert!(said.contains("\"SecretData\":\"1\"") && said.ends_with(" 200 1\n"), "{arguments:?}: {said}");
    }
    // Several URLs: one connection, even across refusals.
    let said = ask(&["-H", "Expect: 100-continue"], "/v1/missing");
    assert!(said.contains("Forbidden.ResourceNotFound") && said.ends_with(" 404 1\n"), "{said}");
    let first = format!("http://localhost:{port}/v1/missing");
    let said = ask(&[&first], "/v1/a");
    assert!(said.lines().last().unwrap().ends_with(" 200 0"), "{said}");
    // Bodies, of known and unknown length.
    for arguments in [&["-d", "x=1"][..], &["-T", "-"], &["-X", "DELETE"], &["-d", &"x".repeat(100_000)]] {
        let said = ask(arguments, "/v1/a");
        assert!(said.contains("MethodNotAllowed") && said.ends_with(" 405 1\n"), "{said}");
    }
    let said = ask(&["-X", "GET", "-d", "x"], "/v1/a");
    assert!(said.contains("InvalidRequest") && said.ends_with(" 400 1\n"), "{said}");
    // --path-as-is: curl would resolve the dots itself.
    let said = ask(&["--path-as-is"], "/v1/../ping");
    assert!(said.contains("must not have the segments . or .."), "{said}");
    assert!(ask(&["-I"], "/ping").contains("Content-Length: 7\r\n"));
    // As a proxy: absolute-form.
    let through = format!("http://127.0.0.1:{port}");
    let mut command = command(&curl);
    command.args([
        "-q",
        "-sS",
        "--noproxy",
        "",
        "-x",
        &through,
        "-w",
        " %{http_code}",
        "http://evil.example/ping",
    ]);
    let (_, said, _) = run(&mut command, "");
    assert!(said.contains("ForbiddenHost") && said.ends_with(" 403"), "{said}");
    assert_eq!(emulator.counters().gets("a"), 1);
}

#[test]
fn python_with_requests_and_urllib() {
    let Some(python) = python_with("requests") else { return };
    let (emulator, agent) = kms();
    expect_ok(command(python).arg(script("kms.py")).args([url(&agent), token_file(&agent)]), "");
    assert_eq!(emulator.counters().gets("a"), 1);
}

#[test]
fn node_with_fetch() {
    let Some(node) = tool("node").filter(|_| can_open_files(1_000)) else { return };
    let (emulator, agent) = kms();
    let mut hosts = vec!["localhost", "127.0.0.1"];
    if std::net::TcpListener::bind("[::1]:0").is_ok() {
        hosts.push("[::1]");
    }
    thread::scope(|scope| {
        for host in hosts {
            let address = format!("http://{host}:{}", agent.port);
            let node = &node;
            // `verbatim`: ::1 comes first wherever the host's resolver says so.
            scope.spawn(move || {
                let mut command = command(node);
                command.arg("--dns-result-order=verbatim").arg(script("fetch.mjs")).args([&address, TOKEN]);
                expect_ok(&mut command, "");
            });
        }
    });
    assert_eq!(emulator.counters().gets("a"), 1);
}

#[test]
fn java_with_http_client() {
    let folder = Folder::new();
    let Some((java, classes)) = java(&script("Many.java"), &folder) else { return };
    let (emulator, agent) = kms();
    let mut command = command(java);
    expect_ok(command.args(JAVA).args([&classes, "Many", &url(&agent), TOKEN]), "");
    assert_eq!(emulator.counters().gets("a"), 1);
}

#[test]
fn applications_of_the_aws_agent() {
    let Some(python) = python_with("requests") else { return };
    let emulator = emulator(&[("db", "old")]);
    emulator.put_secret("db", "{\"password\":\"new \\\"\u{fc}\\\"\"}");
    emulator.create_secret(NewSecret::binary("binary", "AAEC")).unwrap();
    let setup = Setup::new(&emulator).key("Server", "ResponseType", 1);
    let agent = setup.key("Server", "SSRFHeaders", "[\"X-Aws-Parameters-Secrets-Token\"]").start();
    let mut command = command(python);
    expect_ok(command.arg(script("aws.py")).args([url(&agent), token_file(&agent)]), &emulator.arn("db"));
}

#[test]
fn applications_of_vault() {
    let Some(python) = python_with("hvac, requests") else { return };
    let db = r#"{"user":"u","password":"p\"\\ü","port":3306,"nested":{"a":[1,null]}}"#;
    let emulator = emulator(&[
        ("db", db),
        ("team/db", "nested"),
        ("a/b/c", "deep"),
        ("plain", "line\n\"two\""),
        ("list", "[1,2]"),
        ("broken", "{\"a\":"),
        ("refused", "x"),
        ("disabled", "x"),
        ("unusable", "x"),
    ]);
    emulator.fail_secret("refused", 403, "Forbidden.NoPermission");
    emulator.fail_secret("disabled", 409, "Rejected.Disabled");
    emulator.raw_reply("unusable", 200, "[]");
    let agent = Setup::new(&emulator).key("Server", "ResponseType", 2).start();
    expect_ok(command(python).arg(script("kv.py")).args([url(&agent), token_file(&agent)]), "");
}
