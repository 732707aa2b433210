//! What the tests of the whole agent share: the real binary beside an emulated KMS, a small HTTP client that
//! sees every byte, and waiting for conditions.
//!
//! ```ignore
//! let emulator = emulator(&[("agent-test", "hello")]);
//! let agent = Agent::start(&emulator);                       // the defaults
//! let agent = Setup::new(&emulator).key("Cache", "TTLSeconds", 1).start();
//! assert_eq!(agent.secret("agent-test").status, 200);
//! ```
//!
//! An agent is never started without `Endpoint` and `MetadataEndpoint` on loopback, except inside a network
//! namespace, nor with the environment of the tests: nothing here can reach a real KMS.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

pub mod host;
pub mod http;
#[macro_use]
pub mod timed;

pub use host::*;
pub use http::{Connection, Reply};

use kms_emulator::{Emulator, NewSecret, Options};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Display;
use std::fs::{self, File};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// A condition that does not come true in this time never will.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// Between two looks.
const POLL: Duration = Duration::from_millis(5);
/// The token of agents that are started without another one.
pub const TOKEN: &str = "5ea1ed-test-token-0123456789abcdef";

/// The agent's binary: the one that was built for these tests, or what `KMS_AGENT_TEST_BINARY` names, such as
/// the static one that is shipped, or a script that runs it in an empty root (`.ci/full`).
pub fn binary() -> PathBuf {
    match std::env::var_os("KMS_AGENT_TEST_BINARY") {
        Some(path) => path.into(),
        None => env!("CARGO_BIN_EXE_kms-agent").into(),
    }
}

/// Waits until `met`; panics with `what` after [`DEADLINE`].
#[track_caller]
pub fn wait_until(what: &str, met: impl FnMut() -> bool) {
    wait_at_most(DEADLINE, what, met);
}

/// The same with a deadline of its own.
#[track_caller]
pub fn wait_at_most(deadline: Duration, what: &str, mut met: impl FnMut() -> bool) {
    let end = Instant::now() + deadline;
    while !met() {
        assert!(Instant::now() < end, "waited {deadline:?} in vain until {what}");
        thread::sleep(POLL);
    }
}

/// Waits until `found` gives something; panics with `what` after [`DEADLINE`].
#[track_caller]
pub fn wait_for<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let mut result = None;
    wait_until(what, || {
        result = found();
        result.is_some()
    });
    result.expect("just found")
}

/// An emulator with these secrets.
pub fn emulator(secrets: &[(&str, &str)]) -> Emulator {
    let secrets = secrets.iter().map(|(name, data)| NewSecret::generic(name, data)).collect();
    Emulator::start(Options { secrets, ..Options::default() }).expect("the emulator starts")
}

/// A folder of this test's own. Goes with the value, unless the test is failing: then its path is printed.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Folder {
        Folder::below(&std::env::temp_dir())
    }

    /// One whose path is short enough for sockets in it: 107 bytes, see unix(7).
    pub fn for_sockets() -> Folder {
        let usual = std::env::temp_dir();
        if usual.as_os_str().len() < 60 { Folder::below(&usual) } else { Folder::below(Path::new("/tmp")) }
    }

    fn below(parent: &Path) -> Folder {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        host::settle();
        let name = format!("kms-agent-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = parent.join(name);
        fs::create_dir_all(&path).expect("a temporary folder");
        Folder(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The path of a file in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a file in it; gives its path.
    pub fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.join(name);
        fs::write(&path, text).expect("a file in the temporary folder");
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("kept for a look: {}", self.0.display());
        } else {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

/// An agent about to be started: its configuration, token and environment.
pub struct Setup {
    pub folder: Folder,
    keys: BTreeMap<&'static str, BTreeMap<&'static str, String>>,
    env: BTreeMap<OsString, OsString>,
    token: String,
    raw_config: Option<String>,
    /// What starts the agent's binary; empty: we do.
    wrapper: Vec<OsString>,
    stderr: Option<Stdio>,
}

impl Setup {
    /// The default: free port, everything from this emulator, log at debug into a folder of its own, token
    /// [`TOKEN`] in a file.
    pub fn new(emulator: &Emulator) -> Setup {
        Setup::beside(&emulator.kms_addr().to_string(), &emulator.metadata_url(), emulator.ca_pem())
    }

    /// The same beside something else on loopback.
    pub fn beside(endpoint: &str, metadata: &str, ca_pem: &str) -> Setup {
        let loopback =
            |it: &str| ["127.0.0.1:", "localhost:", "[::1]:"].iter().any(|host| it.starts_with(host));
        assert!(loopback(endpoint), "{endpoint} is not on loopback");
        assert!(metadata.strip_prefix("http://").is_some_and(loopback), "{metadata} is not on loopback");
        Setup::plain(ca_pem, Vec::new()).text("KMS", "Endpoint", endpoint).text(
            "KMS",
            "MetadataEndpoint",
            metadata,
        )
    }

    /// As on a real instance, nothing said about where KMS and the metadata service are, inside a network
    /// namespace that leads nowhere else. `ip netns exec` puts the files of `/etc/netns/<namespace>` over those
    /// of `/etc`. To reach the agent, be in that namespace.
    pub fn inside(ip: &Path, namespace: &str, ca_pem: &str) -> Setup {
        Setup::plain(ca_pem, vec![ip.into(), "netns".into(), "exec".into(), namespace.into()])
    }

    fn plain(ca_pem: &str, wrapper: Vec<OsString>) -> Setup {
        let folder = Folder::new();
        let ca_file = folder.write("ca.pem", ca_pem);
        let token_file = folder.write("kmstoken", format!("{TOKEN}\n"));
        // As the agent makes it; later writes leave the mode alone.
        let mode = fs::Permissions::from_mode(0o640);
        fs::set_permissions(&token_file, mode).expect("our own file");
        let log_path = folder.join("logs");
        let (keys, env) = (BTreeMap::new(), BTreeMap::new());
        Setup { folder, keys, env, token: TOKEN.into(), raw_config: None, wrapper, stderr: None }
            .key("Server", "HttpPort", 0)
            .text("KMS", "CaFile", &ca_file.display().to_string())
            .text("Log", "LogPath", &log_path.display().to_string())
            .text("Log", "LogLevel", "debug")
            .env("KMS_TOKEN", format!("file://{}", token_file.display()))
    }

    /// Sets a key to a number, a boolean or anything else that is TOML as written.
    pub fn key(mut self, section: &'static str, key: &'static str, toml: impl Display) -> Setup {
        self.keys.entry(section).or_default().insert(key, toml.to_string());
        self
    }

    /// Sets a key to a string.
    pub fn text(self, section: &'static str, key: &'static str, value: &str) -> Setup {
        // A JSON string is a TOML basic string.
        let quoted = serde_json::Value::from(value).to_string();
        self.key(section, key, quoted)
    }

    /// Leaves a key out.
    pub fn without(mut self, section: &'static str, key: &'static str) -> Setup {
        assert!(!["Endpoint", "MetadataEndpoint"].contains(&key), "{key} keeps the agent on loopback");
        self.keys.entry(section).or_default().remove(key);
        self
    }

    /// An `Endpoint` that has no address: `.invalid` is nobody's (RFC 6761 6.4).
    pub fn no_such_endpoint(self) -> Setup {
        self.text("KMS", "Endpoint", "kms.invalid")
    }

    /// Sets a variable of the agent's environment.
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Setup {
        self.env.insert(name.into(), value.into());
        self
    }

    /// The token, in the file as always.
    pub fn token(mut self, token: &str) -> Setup {
        self.folder.write("kmstoken", format!("{token}\n"));
        self.token = token.to_owned();
        self
    }

    /// The token as the variable's value, without a file.
    pub fn token_value(mut self, token: &str) -> Setup {
        self.token = token.to_owned();
        self.env("KMS_TOKEN", token)
    }

    /// `KMS_TOKEN` as given, whatever it means.
    pub fn token_variable(self, value: impl Into<OsString>) -> Setup {
        self.env("KMS_TOKEN", value)
    }

    /// The configuration file as it will be written.
    pub fn config(&self) -> String {
        if let Some(raw) = &self.raw_config {
            return raw.clone();
        }
        let mut out = String::new();
        for (section, keys) in &self.keys {
            out += &format!("[{section}]\n");
            for (key, value) in keys {
                out += &format!("{key} = {value}\n");
            }
        }
        out
    }

    /// A configuration file that the agent has to refuse; its text is not looked at here.
    pub fn refused_config(mut self, text: &str) -> Setup {
        self.raw_config = Some(text.to_owned());
        self
    }

    /// A program with arguments that starts the agent's binary.
    pub fn wrapped(mut self, words: impl IntoIterator<Item = impl Into<OsString>>) -> Setup {
        self.wrapper = words.into_iter().map(Into::into).collect();
        self
    }

    /// Its standard error, in place of a file.
    pub fn stderr_to(mut self, to: impl Into<Stdio>) -> Setup {
        self.stderr = Some(to.into());
        self
    }

    fn spawn(self) -> Agent {
        let config = self.folder.write("config.toml", self.config());
        let output = |name| File::create(self.folder.join(name)).expect("a file for the agent's output");
        let binary = binary().into_os_string();
        let mut words = self.wrapper.iter().chain([&binary]);
        let mut command = command(words.next().expect("the binary at least"));
        command.args(words).arg("run").arg("--config").arg(&config).current_dir(self.folder.path());
        command.envs(&self.env).stdout(output("stdout"));
        command.stderr(self.stderr.unwrap_or_else(|| output("stderr").into()));
        let child = command.spawn().expect("the agent's binary starts");
        let log_folder = match self.keys.get("Log").and_then(|keys| keys.get("LogPath")) {
            Some(path) if path != "\"-\"" => Some(self.folder.join("logs")),
            _ => None,
        };
        let port = self.keys.get("Server").and_then(|keys| keys.get("HttpPort")?.parse().ok());
        Agent {
            child,
            port: port.unwrap_or(0),
            token: self.token,
            log_folder,
            folder: self.folder,
            ended: None,
        }
    }

    /// Starts the agent; it listens when this returns.
    #[track_caller]
    pub fn start(self) -> Agent {
        let mut agent = self.spawn();
        let fixed = agent.port;
        agent.port = wait_for("the agent listens", || {
            if let Some(status) = agent.poll_end() {
                panic!("the agent ended with {status}: {}", agent.stderr());
            }
            if fixed != 0 {
                return std::net::TcpStream::connect(("127.0.0.1", fixed)).ok().map(|_| fixed);
            }
            let log = agent.log();
            let (_, rest) = log.split_once("listens on 127.0.0.1:")?;
            rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
        });
        agent
    }

    /// Starts an agent that must end by itself; gives its exit code and standard error.
    #[track_caller]
    pub fn start_in_vain(self) -> (i32, String) {
        let mut agent = self.spawn();
        let status = wait_for("the agent gives up", || agent.poll_end());
        (status.code().expect("an exit code"), agent.stderr())
    }
}

/// A running agent; it ends with this value.
pub struct Agent {
    child: Child,
    pub port: u16,
    /// What goes into `X-KMS-Token`.
    pub token: String,
    /// Where the log is; `None`: on standard error.
    log_folder: Option<PathBuf>,
    pub folder: Folder,
    ended: Option<ExitStatus>,
}

impl Agent {
    /// Starts one with the defaults of [`Setup::new`].
    #[track_caller]
    pub fn start(emulator: &Emulator) -> Agent {
        Setup::new(emulator).start()
    }

    /// A connection to it.
    #[track_caller]
    pub fn connect(&self) -> Connection {
        Connection::to(("127.0.0.1", self.port))
    }

    /// GET with the token, on a connection of its own.
    #[track_caller]
    pub fn get(&self, target: &str) -> Reply {
        self.get_with(target, &[("X-KMS-Token", &self.token)])
    }

    /// GET with these headers, and `Host` unless it is among them; no token.
    #[track_caller]
    pub fn get_with(&self, target: &str, headers: &[(&str, &str)]) -> Reply {
        self.request("GET", target, headers)
    }

    /// The same with any method.
    #[track_caller]
    pub fn request(&self, method: &str, target: &str, headers: &[(&str, &str)]) -> Reply {
        let mut connection = self.connect();
        connection.send(http::head(method, target, headers));
        connection.reply_to(method).unwrap_or_else(|error| panic!("{method} {target}: {error}"))
    }

    /// The head of a GET with the token.
    pub fn head(&self, target: &str) -> String {
        http::head("GET", target, &[("X-KMS-Token", &self.token)])
    }

    /// The documented question for a secret; the name is percent-encoded.
    #[track_caller]
    pub fn secret(&self, name: &str) -> Reply {
        self.get(&secret_target(name))
    }

    /// Sends these bytes, leaves the connection open, and reads until the agent closes it.
    #[track_caller]
    pub fn raw(&self, bytes: impl AsRef<[u8]>) -> Vec<u8> {
        let mut connection = self.connect();
        connection.send(bytes);
        connection.rest().expect("the agent closes the connection")
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        assert!(self.ended.is_none(), "the agent has ended");
        kill_process(Pid::from_child(&self.child), signal).expect("a signal to our own child");
    }

    /// Its exit status, if it has ended.
    pub fn poll_end(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().expect("our own child");
        }
        self.ended
    }

    /// Waits until it ends.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        wait_for("the agent ends", || self.poll_end())
    }

    /// SIGTERM, and waits for the end.
    #[track_caller]
    pub fn stop(&mut self) -> ExitStatus {
        if self.poll_end().is_none() {
            self.signal(Signal::TERM);
        }
        self.wait()
    }

    /// The same, and nobody else listens on its port from then on: connections are refused while the result lives.
    #[track_caller]
    pub fn stop_and_hold_port(&mut self) -> HeldPort {
        self.stop();
        HeldPort::new(self.port)
    }

    /// What the log warns of, except for what the host denies an agent: locked memory, open files.
    pub fn warnings(&self) -> Vec<String> {
        let of_the_host = ["not hardened: ", "the limit of open files is "];
        let log = self.log();
        let all = log.lines().filter(|line| line.contains("WARN") || line.contains("ERROR"));
        all.filter(|line| !of_the_host.iter().any(|part| line.contains(part))).map(str::to_owned).collect()
    }

    /// The log so far: all files of the log folder.
    pub fn log(&self) -> String {
        let Some(folder) = &self.log_folder else { return self.stderr() };
        let files = fs::read_dir(folder).into_iter().flatten().flatten();
        files.map(|file| lossy(&file.path())).collect()
    }

    /// Waits until the log contains `text`.
    #[track_caller]
    pub fn wait_for_log(&self, text: &str) {
        wait_until(&format!("the log says {text:?}"), || self.log().contains(text));
    }

    /// Its standard error so far.
    pub fn stderr(&self) -> String {
        lossy(&self.folder.join("stderr"))
    }

    /// All it has written: log, standard error, standard output.
    pub fn everything_written(&self) -> String {
        self.log() + &self.stderr() + &lossy(&self.folder.join("stdout"))
    }
}

/// A port that is bound on loopback and not listened on.
pub struct HeldPort {
    _sockets: Vec<OwnedFd>,
}

impl HeldPort {
    #[track_caller]
    fn new(port: u16) -> HeldPort {
        let hold = |address: SocketAddr| {
            let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
            let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            // Connections that the agent has closed are remembered for a while.
            sockopt::set_socket_reuseaddr(&socket, true)?;
            rustix::net::bind(&socket, &address)?;
            Ok::<OwnedFd, rustix::io::Errno>(socket)
        };
        let mut sockets = vec![hold((Ipv4Addr::LOCALHOST, port).into()).expect("the port is free again")];
        // Not every host has it.
        sockets.extend(hold((Ipv6Addr::LOCALHOST, port).into()));
        HeldPort { _sockets: sockets }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if self.poll_end().is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Runs the agent's binary with arguments that end it at once; gives exit code and standard error.
#[track_caller]
pub fn run_binary(arguments: &[&str]) -> (i32, String) {
    let output = command(binary()).args(arguments).output().expect("the binary starts");
    (output.status.code().expect("an exit code"), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn lossy(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// The documented target for a secret.
pub fn secret_target(name: &str) -> String {
    format!("/secretsmanager/get?secretId={}", kms_emulator::signature::encode(name.as_bytes()))
}

/// Runs a program to its end; gives its standard output. Panics if it fails.
#[track_caller]
pub fn run(program: &Path, arguments: &[&str]) -> Vec<u8> {
    let output = command(program).args(arguments).output().expect("the program starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} {arguments:?}: {}: {stderr}", program.display(), output.status);
    output.stdout
}
