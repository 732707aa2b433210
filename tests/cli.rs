//! The commands beside `run`, as a person or a script calls them: the real binary beside an agent, an emulated KMS
//! and what breaks.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::{Agent, Folder, Setup, TOKEN, binary, emulator, secret_target, skip, wait_until};
use kms_emulator::{BadCertificate, Emulator, KmsMode, MetadataFault};
use rustix::process::Signal;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// What a command left behind.
struct Done {
    code: Option<i32>,
    signal: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Done {
    #[track_caller]
    fn prints(&self, stdout: &str) {
        assert_eq!((self.stdout.as_str(), self.code), (stdout, Some(0)), "{}", self.stderr);
    }

    #[track_caller]
    fn fails(&self, code: i32, part: &str) {
        assert_eq!((self.stdout.as_str(), self.code), ("", Some(code)), "{}", self.stderr);
        assert!(self.stderr.starts_with("kms-agent: ") && self.stderr.contains(part), "{}", self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
    }
}

/// The binary, with a `KMS_TOKEN` and nothing else in its environment.
fn command(token: &str) -> Command {
    let mut command = common::command(binary());
    command.env_clear().env("KMS_TOKEN", token).env("PATH", "/usr/bin:/bin");
    command
}

fn finish(command: &mut Command) -> Done {
    let output = command.output().expect("the binary starts");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    Done {
        code: output.status.code(),
        signal: output.status.signal(),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    }
}

/// An agent, and the configuration by which its commands find it.
struct World {
    agent: Agent,
    config: String,
}

impl World {
    fn new(setup: Setup) -> World {
        let config = setup.config();
        let agent = setup.start();
        let config = config.replace("HttpPort = 0", &format!("HttpPort = {}", agent.port));
        let config = agent.folder.write("cli.toml", config).display().to_string();
        World { agent, config }
    }

    /// A command line, with this world's configuration behind the command's name.
    fn command(&self, line: &[&str]) -> Command {
        let mut command = command(&format!("file://{}", self.token_file().display()));
        command.arg(line[0]).args(["--config", &self.config]).args(&line[1..]);
        command
    }

    fn run(&self, line: &[&str]) -> Done {
        finish(&mut self.command(line))
    }

    fn token_file(&self) -> PathBuf {
        self.agent.folder.join("kmstoken")
    }
}

const DB: &str = r#"{"user":"app","password":"p\"w\u00e9","port":3306}"#;

// ---- get ----

#[test]
fn get_prints_what_kms_has() {
    let emulator = emulator(&[("db", DB), ("pem", "line\nline\n"), ("acs/e c+s", "odd")]);
    let world = World::new(Setup::new(&emulator));
    world.run(&["get", "db"]).prints(DB);
    world.run(&["get", "pem"]).prints("line\nline\n");
    world.run(&["get", "acs/e c+s"]).prints("odd");
    world.run(&["get", "--", "db"]).prints(DB);
    world.run(&["get", "db", "--field", "password"]).prints("p\"w\u{e9}");
    world.run(&["get", "--field=port", "db"]).prints("3306");
    let whole = world.run(&["get", "db", "--json"]);
    let whole: serde_json::Value = serde_json::from_str(&whole.stdout).unwrap();
    assert_eq!((&whole["SecretData"], &whole["SecretName"]), (&DB.into(), &"db".into()));

    let first = emulator.secret("pem").unwrap().versions[0].id.clone();
    emulator.put_secret("pem", "new");
    world.run(&["get", "pem"]).prints("line\nline\n");
    world.run(&["get", "pem", "--refresh"]).prints("new");
    world.run(&["get", "pem", "--version-id", &first]).prints("line\nline\n");
    world.run(&["get", "pem", "--version-stage", "ACSPrevious"]).prints("line\nline\n");
}

#[test]
fn get_says_why_not() {
    let emulator = emulator(&[("db", DB), ("plain", "hush")]);
    let mut world = World::new(Setup::new(&emulator));
    let done = world.run(&["get", "nothing"]);
    done.fails(1, "kms-agent: nothing: 404 Forbidden.ResourceNotFound: ");
    done.fails(1, "; 'kms-agent check --secret nothing' tells more\n");
    world.run(&["get", "db", "--field", "nothing"]).fails(1, "no field \"nothing\"");
    let done = world.run(&["get", "plain", "--field", "x"]);
    done.fails(1, "no JSON object");
    assert!(!done.stderr.contains("hush"));
    finish(world.command(&["get", "db"]).env("KMS_TOKEN", "another"))
        .fails(1, "403: the agent has another token than environment variable KMS_TOKEN");
    finish(world.command(&["get", "db"]).env("KMS_TOKEN", "")).fails(1, "the token is empty");
    finish(world.command(&["get", "db"]).env("KMS_TOKEN", "file:///nowhere/token"))
        .fails(1, "cannot read the token file /nowhere/token: No such file");
    finish(command(TOKEN).args(["get", "db", "--config", "/nowhere"]))
        .fails(2, "cannot read the configuration");
    let any_port = world.agent.folder.write("any.toml", "[Server]\nHttpPort = 0\n");
    finish(command(TOKEN).args(["get", "db", "-c"]).arg(any_port)).fails(1, "HttpPort is 0");
    let _nobody = world.agent.stop_and_hold_port();
    world.run(&["get", "db"]).fails(1, "nobody listens on port");
}

#[test]
fn get_reads_each_response_type() {
    let emulator = emulator(&[("db", DB), ("plain", "x")]);
    for (response_type, unknown, bad_token) in [
        (1, "404 Forbidden.ResourceNotFound: ", "403: the agent has another token"),
        (2, "404 Forbidden.ResourceNotFound: ", "403: the agent has another token"),
    ] {
        let world = World::new(Setup::new(&emulator).key("Server", "ResponseType", response_type));
        world.run(&["get", "db"]).prints(DB);
        world.run(&["get", "plain"]).prints("x");
        world.run(&["get", "db", "--field", "user"]).prints("app");
        world.run(&["get", "nothing"]).fails(1, unknown);
        finish(world.command(&["get", "db"]).env("KMS_TOKEN", "another")).fails(1, bad_token);
    }
}

// ---- exec ----

#[test]
fn exec_becomes_the_program() {
    let emulator = emulator(&[("db", DB), ("plain", "x y")]);
    let world = World::new(Setup::new(&emulator));
    let env = [
        "exec",
        "--env",
        "PLAIN=plain",
        "--env",
        "DB_USER=db#user",
        "--env",
        "DB_PW=db#password",
        "--",
        "sh",
        "-c",
    ];
    let sh = |script: &str| world.run(&[&env[..], &[script, "name", "--env"]].concat());
    sh(r#"printf '%s|%s|%s|%s' "$PLAIN" "$DB_USER" "$DB_PW" "$1""#).prints("x y|app|p\"w\u{e9}|--env");
    assert_eq!(sh("exit 7").code, Some(7));
    assert_eq!(sh("kill -TERM $$").signal, Some(15));

    // The very same process: signals to it are the program's.
    let mut child = world.command(&[&env[..], &["echo $$; read x"]].concat());
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut pid = [0; 16];
    let count = child.stdout.as_mut().unwrap().read(&mut pid).unwrap();
    assert_eq!(String::from_utf8_lossy(&pid[..count]).trim(), child.id().to_string());
    let environment = fs::read_to_string(format!("/proc/{}/environ", child.id())).unwrap();
    let mut names: Vec<&str> = environment.split('\0').filter_map(|it| it.split('=').next()).collect();
    names.retain(|name| !["", "PWD", "OLDPWD", "SHLVL", "_"].contains(name));
    names.sort_unstable();
    assert_eq!(names, ["DB_PW", "DB_USER", "KMS_TOKEN", "PATH", "PLAIN"], "what it had, and the secrets");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn exec_runs_nothing_without_its_secrets() {
    let emulator = emulator(&[("db", DB), ("nul", "a\0b")]);
    let world = World::new(Setup::new(&emulator));
    for (variable, part) in [
        ("A=nothing", "A=nothing: 404 Forbidden.ResourceNotFound"),
        ("A=db#nothing", "A=db: the secret has no field \"nothing\""),
        ("A=nul", "A=nul: the value has a NUL character"),
    ] {
        world.run(&["exec", "--env", "B=db", "--env", variable, "--", "echo", "ran"]).fails(1, part);
    }
    let run = |program: &str| world.run(&["exec", "--env", "A=db", "--", program]);
    run("/nowhere/program").fails(127, "cannot run /nowhere/program: ");
    run("no-such-program-here").fails(127, "cannot run no-such-program-here: ");
    run(&world.agent.folder.path().display().to_string()).fails(126, "Permission denied");
}

// ---- status ----

#[test]
fn status_tells_the_four_states() {
    let emulator = emulator(&[("db", DB)]);
    let mut world = World::new(Setup::new(&emulator));
    world.run(&["get", "db"]).prints(DB);
    let done = world.run(&["status"]);
    assert_eq!(done.code, Some(0), "{}", done.stdout);
    let lines = [
        "Running\n  version      0.1.0\n".to_owned(),
        format!("\n  pid          {}\n  uptime       ", world.agent.pid()),
        "\n  secrets      1 cached, ".to_owned(),
        "\n  connections  1 of 800\n  KMS          ok since 20".to_owned(),
        "\n  credentials  ok since 20".to_owned(),
    ];
    for part in lines {
        assert!(done.stdout.contains(&part), "{part}: {}", done.stdout);
    }

    let unknown = |done: Done, part: &str| {
        assert_eq!(done.code, Some(4), "{}", done.stdout);
        assert!(done.stdout.starts_with("Unknown\n") && done.stdout.contains(part), "{}", done.stdout);
    };
    unknown(finish(world.command(&["status"]).env("KMS_TOKEN", "another")), "another token");
    unknown(finish(world.command(&["status"]).env("KMS_TOKEN", "file:///nowhere")), "/nowhere");
    let squatter = Squatter::start("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi");
    unknown(
        finish(command(TOKEN).args(["status", "-c"]).arg(squatter.config())),
        "something other than kms-agent",
    );

    let _nobody = world.agent.stop_and_hold_port();
    let done = world.run(&["status"]);
    assert_eq!((done.code, done.stdout.as_str()), (Some(3), "Not running\n"));
    finish(command(TOKEN).args(["status", "-c", "/nowhere"])).fails(2, "cannot read the configuration");
}

/// Something else on a port: says this to everybody who asks.
struct Squatter {
    port: u16,
    folder: Folder,
    end: &'static AtomicBool,
}

impl Squatter {
    fn start(reply: &'static str) -> Squatter {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let end: &'static AtomicBool = Box::leak(Box::default());
        thread::spawn(move || {
            for stream in listener.incoming() {
                if end.load(Ordering::Relaxed) {
                    return;
                }
                let mut stream = stream.unwrap();
                let _ = stream.read(&mut [0; 4096]);
                let _ = stream.write_all(reply.as_bytes());
            }
        });
        Squatter { port, folder: Folder::new(), end }
    }

    fn config(&self) -> PathBuf {
        self.folder.write("config.toml", format!("[Server]\nHttpPort = {}\n", self.port))
    }
}

impl Drop for Squatter {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        let _ = std::net::TcpStream::connect(("127.0.0.1", self.port));
    }
}

// ---- check ----

/// `check` of a set-up without an agent; `wrap` is a program that runs it.
fn check(setup: &Setup, token: &str, more: &[&str], wrap: &[&str]) -> Done {
    let config = setup.folder.write("check.toml", setup.config());
    let mut command = match wrap {
        [] => common::command(binary()),
        [program, arguments @ ..] => {
            let mut command = common::command(program);
            command.args(arguments).arg(binary());
            command
        }
    };
    command.args(["check", "--config"]).arg(config).args(more);
    command.env_clear().env("KMS_TOKEN", token).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    finish(&mut command)
}

fn token_of(setup: &Setup) -> String {
    format!("file://{}", setup.folder.join("kmstoken").display())
}

const STEPS: [&str; 10] =
    ["configuration", "port", "token", "metadata", "credentials", "DNS", "TCP", "TLS", "clock", "permission"];

/// The steps in order, and for each its verdict.
#[track_caller]
fn verdicts(done: &Done) -> Vec<(String, String)> {
    let verdict = |line: &str| {
        let mut words = line.split_ascii_whitespace().map(str::to_owned);
        let verdict = words.next().unwrap();
        (words.next().unwrap(), verdict)
    };
    let found: Vec<(String, String)> = done.stdout.lines().map(verdict).collect();
    let steps: Vec<&str> = found.iter().map(|(step, _)| step.as_str()).collect();
    assert_eq!(steps, STEPS, "one line a step:\n{}{}", done.stdout, done.stderr);
    found
}

/// A broken set-up, and what `check` has to say of it.
struct Broken {
    name: &'static str,
    /// Breaks it; undone when the emulator is dropped.
    by: fn(&Emulator, Setup) -> Setup,
    /// The steps that fail.
    failed: &'static [&'static str],
    /// Parts of what the first of them says.
    says: &'static [&'static str],
    /// The steps that then cannot be tried.
    skipped: &'static [&'static str],
}

#[test]
fn check_names_the_cause() {
    let squatter: &Squatter =
        Box::leak(Box::new(Squatter::start("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")));
    static PORT: std::sync::OnceLock<u16> = std::sync::OnceLock::new();
    PORT.set(squatter.port).unwrap();
    let table = [
        Broken {
            name: "port taken",
            by: |_, setup| setup.key("Server", "HttpPort", PORT.get().unwrap()),
            failed: &["port"],
            says: &["cli-", "(pid ", "End it, or set another [Server] HttpPort"],
            skipped: &[],
        },
        Broken {
            name: "no token",
            by: |_, setup| {
                fs::remove_file(setup.folder.join("kmstoken")).unwrap();
                setup
            },
            failed: &["token"],
            says: &["kmstoken does not exist", "kms-agent token create"],
            skipped: &[],
        },
        Broken {
            name: "metadata down",
            by: |emulator, setup| {
                emulator.set_metadata_fault(Some(MetadataFault::Refuse)).unwrap();
                setup
            },
            failed: &["metadata"],
            says: &["connect 127.0.0.1:", "Connection refused", "ECS instances only"],
            skipped: &["credentials", "permission"],
        },
        Broken {
            name: "no role",
            by: |emulator, setup| {
                emulator.set_role(None);
                setup
            },
            failed: &["credentials"],
            says: &["no RAM role is attached", "kms:GetSecretValue"],
            skipped: &["permission"],
        },
        Broken {
            name: "DNS fails",
            by: |_, setup| setup.no_such_endpoint(),
            failed: &["DNS"],
            says: &["resolve kms.invalid:443", "[KMS] Endpoint and Region"],
            skipped: &["TCP", "TLS", "permission"],
        },
        Broken {
            name: "wrong CA",
            by: |emulator, setup| {
                emulator.set_kms_mode(KmsMode::Certificate(BadCertificate::OtherCa)).unwrap();
                setup
            },
            failed: &["TLS"],
            says: &["certificate does not verify", "CaFile"],
            skipped: &["permission"],
        },
        Broken {
            name: "KMS breaks off",
            by: |emulator, setup| {
                emulator.inject(kms_emulator::Fault::new(kms_emulator::FaultKind::DropBefore));
                setup
            },
            failed: &["permission"],
            says: &["reply of 127.0.0.1:", "[KMS] Endpoint is KMS"],
            skipped: &[],
        },
        Broken {
            name: "no permission",
            by: |emulator, setup| {
                emulator.fail_secret("db", 403, "Forbidden.NoPermission");
                setup
            },
            failed: &["permission"],
            says: &["403 Forbidden.NoPermission", "kms:GetSecretValue on db"],
            skipped: &[],
        },
        Broken {
            name: "clock 20 minutes off",
            by: |emulator, setup| {
                emulator.set_clock_offset(20 * 60);
                setup
            },
            failed: &["clock"],
            says: &["20 min behind that of KMS", "chrony"],
            skipped: &[],
        },
    ];
    for Broken { name, by, failed, says, skipped } in table {
        let emulator = emulator(&[("db", DB)]);
        let setup = by(&emulator, Setup::new(&emulator));
        let wrap: &[&str] = if name == "DNS fails" { without_dns() } else { &[] };
        let done = check(&setup, &token_of(&setup), &["--secret", "db"], wrap);
        println!("\n== {name}\n{}", done.stdout);
        let of = |wanted: &str| -> Vec<String> {
            let found = verdicts(&done).into_iter().filter(|(_, verdict)| verdict == wanted);
            found.map(|(step, _)| step).collect()
        };
        assert_eq!(
            (of("FAILED"), of("skipped")),
            (owned(failed), owned(skipped)),
            "{name}:\n{}",
            done.stdout
        );
        let first = done.stdout.lines().find(|line| line.starts_with("FAILED")).unwrap();
        for part in says {
            assert!(first.contains(part), "{name}: {part}: {first}");
        }
        assert_eq!((done.code, done.stderr.as_str()), (Some(1), ""), "{name}");
        assert!(!done.stdout.contains("p\\\"w") && !done.stdout.contains('\u{1b}'), "{name}");
    }
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// A program that runs another one with a DNS server that is not there. Where that cannot be had, the name
/// `kms.invalid` does as well: no resolver knows it (RFC 6761 6.4).
fn without_dns() -> &'static [&'static str] {
    const SCRIPT: &str = "f=$(mktemp) && echo 'nameserver 127.0.0.1' >$f && mount --bind $f /etc/resolv.conf \
        && rm $f && exec \"$0\" \"$@\"";
    static WRAPPED: [&str; 5] = ["unshare", "-rm", "sh", "-c", SCRIPT];
    let works = common::command(WRAPPED[0]).args(&WRAPPED[1..]).arg("true").stderr(Stdio::null()).status();
    if works.is_ok_and(|status| status.success()) { &WRAPPED } else { &[] }
}

#[test]
fn check_finds_all_well() {
    let emulator = emulator(&[("db", DB)]);
    let world = World::new(Setup::new(&emulator));
    for more in [&["check", "--secret", "db"][..], &["check"]] {
        let done = world.run(more);
        assert!(verdicts(&done).iter().all(|(_, verdict)| verdict == "ok"), "{}", done.stdout);
        assert_eq!((done.code, done.stderr.as_str()), (Some(0), ""));
        let holder = format!("is held by this agent (pid {}, version 0.1.0)", world.agent.pid());
        assert!(done.stdout.contains(&holder), "{}", done.stdout);
        println!("\n== all is well\n{}", done.stdout);
    }
    let setup = Setup::new(&emulator);
    let done = check(&setup, &token_of(&setup), &[], &[]);
    assert_eq!(done.code, Some(0), "no agent is running: {}", done.stdout);
}

#[test]
fn check_tells_more_than_the_eight() {
    let emulator = emulator(&[("db", DB)]);
    let line = |done: &Done, step: &str| {
        verdicts(done);
        let at = STEPS.iter().position(|it| *it == step).unwrap();
        done.stdout.lines().nth(at).unwrap().to_owned()
    };
    let failed = |done: &Done, step: &str, part: &str| {
        let line = line(done, step);
        assert!(line.starts_with("FAILED") && line.contains(part), "{part}: {}", done.stdout);
        assert_eq!(done.code, Some(1));
    };

    // A running agent that has another token than this command.
    let world = World::new(Setup::new(&emulator));
    let done = finish(world.command(&["check"]).env("KMS_TOKEN", "another"));
    failed(&done, "token", "the running agent has another token");
    assert!(line(&done, "port").starts_with("ok"), "{}", done.stdout);

    // The token's file.
    let setup = Setup::new(&emulator);
    let mode =
        |mode| fs::set_permissions(setup.folder.join("kmstoken"), fs::Permissions::from_mode(mode)).unwrap();
    mode(0o644);
    failed(&check(&setup, &token_of(&setup), &[], &[]), "token", "every user of this host");
    mode(0o640);
    failed(&check(&setup, "", &[], &[]), "token", "the token in environment variable KMS_TOKEN is empty");
    failed(&check(&setup, "file:///dev/zero", &[], &[]), "token", "not a regular file");

    // What else KMS and the metadata service may say.
    let ask = |secret: &str| check(&setup, &token_of(&setup), &["--secret", secret], &[]);
    failed(&ask("nothing"), "permission", "no secret nothing in this region");
    let fault = emulator.fail_secret("db", 400, "Throttling.User");
    failed(&ask("db"), "permission", "TTLSeconds");
    emulator.clear_fault(fault);
    emulator.inject(kms_emulator::Fault::error(403, "Forbidden.NoPermission").times(1));
    failed(&check(&setup, &token_of(&setup), &[], &[]), "permission", "--secret ID");
    emulator.set_clock_offset(-120);
    let done = ask("db");
    assert!(line(&done, "clock").contains("s ahead of that of KMS; correct it"), "{}", done.stdout);
    assert_eq!(done.code, Some(0));
    emulator.set_clock_offset(0);
    emulator.set_kms_mode(KmsMode::Refuse).unwrap();
    failed(&ask("db"), "TCP", "security group");
    emulator.set_kms_mode(KmsMode::Normal).unwrap();
    emulator.set_metadata_fault(Some(MetadataFault::Status500)).unwrap();
    failed(&ask("db"), "metadata", "answers 500");
    emulator.set_metadata_fault(None).unwrap();

    // Something that is no metadata service at its address.
    let stranger = Squatter::start("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
    let address = format!("http://127.0.0.1:{}", stranger.port);
    let elsewhere = Setup::new(&emulator).text("KMS", "MetadataEndpoint", &address);
    let done = check(&elsewhere, &token_of(&elsewhere), &[], &[]);
    failed(&done, "metadata", "answers 404 to everything, so it is no metadata service");

    // An access key that nobody renews.
    let mut gone = world.command(&["check"]);
    gone.env("ALIBABA_CLOUD_ACCESS_KEY_ID", "gone").env("ALIBABA_CLOUD_ACCESS_KEY_SECRET", "x");
    failed(&finish(&mut gone), "permission", "replace the access key in the environment");

    let no_ca = Setup::new(&emulator).text("KMS", "CaFile", "/nowhere/ca.pem");
    failed(&check(&no_ca, &token_of(&no_ca), &[], &[]), "TLS", "CaFile /nowhere/ca.pem: cannot read it");

    // A broken configuration leaves nothing to look at.
    let wrong = setup.folder.write("wrong.toml", "[Server]\nHttpPorts = 1\n");
    let done = finish(command(TOKEN).args(["check", "-c"]).arg(wrong));
    assert_eq!(done.code, Some(2));
    assert!(
        done.stdout.starts_with("FAILED   configuration") && done.stdout.contains("HttpPort"),
        "{}",
        done.stdout
    );
}

// ---- token ----

fn token(line: &[&str], variable: &str) -> Done {
    finish(command(variable).arg("token").args(line))
}

fn mode_and_group(path: &Path) -> (u32, u32) {
    let file = fs::metadata(path).unwrap();
    (file.mode() & 0o7777, file.gid())
}

#[test]
fn token_create_and_rotate() {
    let folder = Folder::new();
    let path = folder.join("kmstoken");
    let variable = format!("file://{}", path.display());
    let told = |what: &str| format!("{what} {}\n", path.display());

    token(&["create"], &variable).prints(&told("wrote a new token to"));
    let first = fs::read_to_string(&path).unwrap();
    assert!(first.len() == 64 && first.bytes().all(|byte| byte.is_ascii_hexdigit()), "{first}");
    assert_eq!(mode_and_group(&path).0, 0o640);
    token(&["create"], &variable).prints(&told("kept the valid token in"));
    assert_eq!(fs::read_to_string(&path).unwrap(), first);
    token(&["rotate"], &variable).prints(&told("wrote a new token to"));
    assert_ne!(fs::read_to_string(&path).unwrap(), first);
    fs::write(&path, " \n").unwrap();
    token(&["create"], &variable).prints(&told("wrote a new token to"));
    assert_eq!(fs::read_to_string(&path).unwrap().len(), 64);

    // A file that is there is left alone, and told of.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let done = token(&["create"], &variable);
    done.prints(&told("kept the valid token in"));
    assert!(
        done.stderr.contains("warning") && done.stderr.contains("0644 lets every user"),
        "{}",
        done.stderr
    );
    assert_eq!(mode_and_group(&path).0, 0o644);

    let other = folder.join("other");
    let other_name = other.display().to_string();
    token(&["create", "--file", &other_name], "not-a-file")
        .prints(&format!("wrote a new token to {other_name}\n"));
    token(&["create"], "not-a-file").fails(2, "KMS_TOKEN holds the token itself");
    token(&["create", "--file", "/nowhere/token"], "")
        .fails(1, "cannot create the token file /nowhere/token: No such file");
    token(&["create", "--file", &other_name, "--group", "no-such-group"], "")
        .fails(1, "no group no-such-group");
    token(&["create", "--file", "/dev/null"], "").fails(1, "something other than a regular file");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "no temporary file is left");
}

#[test]
fn a_command_that_is_ended_leaves_no_core_and_its_program_may() {
    let emulator = emulator(&[("db", DB)]);
    let world = World::new(Setup::new(&emulator));
    let with_cores = |line: &[&str]| {
        let it = world.command(line);
        let mut command = common::command("sh");
        command
            .args([
                "-c",
                r#"ulimit -c unlimited 2>/dev/null || ulimit -S -c "$(ulimit -H -c)"; exec "$0" "$@""#,
            ])
            .arg(it.get_program())
            .args(it.get_args());
        command
            .envs(it.get_envs().filter_map(|(name, value)| Some((name, value?))))
            .current_dir(world.agent.folder.path());
        command
    };
    let program = with_cores(&["exec", "--env", "A=db", "--", "sh", "-c", "kill -QUIT $$"]).status().unwrap();
    assert_eq!(program.signal(), Some(Signal::QUIT.as_raw()));
    if !program.core_dumped() {
        skip("no program dumps a core here");
    }
    emulator.set_kms_mode(KmsMode::StallReply).unwrap();
    let mut get = with_cores(&["get", "never-answered"]).spawn().unwrap();
    wait_until("it waits for the reply, with the token in its memory", || {
        emulator.counters().gets("never-answered") == 1
    });
    rustix::process::kill_process(rustix::process::Pid::from_child(&get), Signal::QUIT).unwrap();
    let get = get.wait().unwrap();
    assert!(get.signal() == Some(Signal::QUIT.as_raw()) && !get.core_dumped(), "{get}");
}

#[test]
fn an_agent_that_is_busy_is_running() {
    let emulator = emulator(&[("db", DB)]);
    let world = World::new(Setup::new(&emulator).key("Server", "MaxConn", 1));
    world.run(&["get", "db"]).prints(DB);
    emulator.set_kms_mode(KmsMode::StallReply).unwrap();
    let busy = "Running\n  connections  all of [Server] MaxConn are busy\n";
    // Each waits for seconds, so this ends soon.
    let mut waiting = world.agent.connect();
    waiting.send(world.agent.head(&secret_target("never-answered")));
    wait_until("its only connection is busy", || world.run(&["status"]).stdout == busy);
    let done = world.run(&["check"]);
    assert!(
        done.stdout.contains(" by an agent: kms-agent")
            && done.stdout.contains("all its connections ([Server] MaxConn) are busy"),
        "{}",
        done.stdout
    );
    assert_eq!(waiting.reply().unwrap().status, 504);
}

/// Else everybody would be locked out whose group the installer gave it to.
#[test]
fn a_rotated_token_keeps_its_group() {
    let folder = Folder::new();
    let path = folder.join("kmstoken");
    let file = path.to_str().unwrap();
    assert_eq!(token(&["create", "--file", file], "").code, Some(0));
    let gid = if rustix::process::geteuid().is_root() { 4711 } else { mode_and_group(&path).1 };
    std::os::unix::fs::chown(&path, None, Some(gid)).unwrap();
    assert_eq!(token(&["rotate", "--file", file], "").code, Some(0));
    assert_eq!(mode_and_group(&path), (0o640, gid));
    fs::write(&path, "").unwrap();
    assert_eq!(token(&["create", "--file", file], "").code, Some(0));
    assert_eq!(mode_and_group(&path), (0o640, gid));
}

/// While the file is made again and again, no look at the folder ever finds one that others may read, or one that
/// a group other than the wanted one may.
#[test]
fn at_no_instant_can_others_read_a_token() {
    let folder = Folder::new();
    let path = folder.join("kmstoken");
    let root = rustix::process::geteuid().is_root();
    let gid = if root { 4711 } else { rustix::process::getegid().as_raw() };
    let (folder_path, end) = (folder.path().to_owned(), std::sync::Arc::new(AtomicBool::new(false)));
    let watcher = thread::spawn({
        let end = end.clone();
        move || {
            let mut looks = 0_u64;
            while !end.load(Ordering::Relaxed) {
                for file in fs::read_dir(&folder_path).unwrap().flatten() {
                    let Ok(file) = file.metadata() else { continue };
                    let (mode, group) = (file.mode() & 0o777, file.gid());
                    assert_eq!(mode & 0o137, 0, "{mode:o}");
                    assert!(mode & 0o040 == 0 || group == gid, "{mode:o} while the group is {group}");
                    looks += 1;
                }
            }
            looks
        }
    });
    for _ in 0..40 {
        let line = ["rotate", "--file", path.to_str().unwrap(), "--group", &gid.to_string()];
        // A umask that forbids nothing.
        let script = r#"umask 0; exec "$0" token "$@""#;
        let mut command = common::command("sh");
        command.args(["-c", script]).arg(binary()).args(line);
        assert_eq!(finish(&mut command).code, Some(0));
        assert_eq!(mode_and_group(&path), (0o640, gid));
    }
    end.store(true, Ordering::Relaxed);
    assert!(watcher.join().expect("nothing was readable") > 0);
}

#[test]
fn a_rotated_token_is_taken_up_and_a_lax_file_told_of() {
    let emulator = emulator(&[("db", DB)]);
    let setup = Setup::new(&emulator);
    fs::set_permissions(setup.folder.join("kmstoken"), fs::Permissions::from_mode(0o666)).unwrap();
    let world = World::new(setup);
    world.agent.wait_for_log("mode 0666 lets every user of this host access the token");
    world.run(&["get", "db"]).prints(DB);
    let file = world.token_file().display().to_string();
    assert_eq!(token(&["rotate", "--file", &file], "").code, Some(0));
    wait_until("the agent has the new token", || world.run(&["get", "db"]).code == Some(0));
    assert_eq!(world.agent.secret("db").status, 403, "the old one has gone");
}

#[test]
fn a_fifo_as_token_does_not_hang_the_agent() {
    let emulator = emulator(&[]);
    let setup = Setup::new(&emulator);
    let fifo = setup.folder.join("fifo");
    let made = common::command("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let variable = format!("file://{}", fifo.display());
    let (code, stderr) = setup.token_variable(variable).start_in_vain();
    assert!(code == 1 && stderr.contains("it is not a regular file"), "{stderr}");
}
