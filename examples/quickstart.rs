//! From nothing to a secret: an emulated KMS and the agent in one process, on loopback, without an account.
//!
//! ```text
//! cargo run --release --example quickstart              # runs until Ctrl-C; paste the curl line that it prints
//! cargo run --release --example quickstart -- --once    # asks twice by itself, and ends
//! ```
//!
//! Everything it writes is in one temporary folder, which is removed at the end.

use kms_agent::cli;
use kms_agent::cli::run::Agent;
use kms_agent::log::Reason;
use kms_agent::random::Random;
use kms_agent::{config, net, token};
use kms_emulator::{Emulator, KmsMode, NewSecret, Options};
use rustix::process::{Signal, getpid, kill_process};
use signal_hook::consts::SIGHUP;
use std::ffi::OsString;
use std::fmt::Display;
use std::fs;
use std::io::{self, BufRead as _, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const SECRET: &str = "agent-test";
/// The secret that the README's examples of clients ask for.
const OTHER_SECRET: &str = "db";
/// The TTL is short, so that a value expires while a person watches. The agent's own default is 300 s.
const TTL_S: u64 = 20;
/// This is longer than the agent takes for any reply.
const PATIENCE: Duration = Duration::from_secs(15);
const HELP: &str = "\
Runs a kms-agent beside an emulated KMS, and says how to ask it for a secret.

Usage: cargo run --release --example quickstart [-- --once]

Options:
      --once    ask twice, show the replies, and end
  -h, --help    print this
";

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T> = std::result::Result<T, Error>;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let outcome = match arguments.as_slice() {
        [] => run(false),
        [only] if only == "--once" => run(true),
        [only] if only == "--help" || only == "-h" => {
            io::stdout().write_all(HELP.as_bytes()).map_err(Error::from)
        }
        _ => {
            complain("it takes --once or nothing; --help tells more");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(error);
            ExitCode::FAILURE
        }
    }
}

/// Unlike `eprintln!` it does not panic where the terminal has been closed.
fn complain(what: impl Display) {
    let _ = writeln!(io::stderr(), "quickstart: {what}");
}

fn run(once: bool) -> Result<()> {
    let hangup = Hangup::catch()?;
    let folder = Folder::create()?;
    let secrets = vec![
        NewSecret::generic(SECRET, r#"{"user":"app","password":"correct horse"}"#),
        NewSecret::generic(OTHER_SECRET, r#"{"user":"app","password":"battery staple"}"#),
    ];
    let kms = Emulator::start(Options { secrets, ..Options::default() })?;
    let (port, agent) = start_agent(&folder, &kms)?;
    hangup.ends_the_agent();
    let outcome = if once {
        let outcome = ask_twice(&folder, port);
        // The agent catches the signal and ends, as it does when systemd stops it.
        kill_process(getpid(), Signal::TERM)?;
        outcome
    } else {
        introduce(&folder, &kms, port)?;
        // This thread is never joined: it is blocked in a read of standard input when Ctrl-C comes.
        thread::spawn(move || obey(&kms));
        Ok(())
    };
    agent.join().map_err(|_| "the agent's thread panicked")??;
    outcome
}

/// The terminal is closed: that ends this program and cleans up, as Ctrl-C does. The agent alone would take SIGHUP for
/// the wish to read its files again.
struct Hangup(UnixStream);

impl Hangup {
    fn catch() -> io::Result<Hangup> {
        let (ours, theirs) = UnixStream::pair()?;
        signal_hook::low_level::pipe::register(SIGHUP, theirs)?;
        Ok(Hangup(ours))
    }

    /// To be called when the agent catches SIGTERM.
    fn ends_the_agent(mut self) {
        thread::spawn(move || {
            if self.0.read_exact(&mut [0]).is_ok() {
                let _ = kill_process(getpid(), Signal::TERM);
            }
        });
    }
}

/// The folder of this run: token, CA, configuration and log.
struct Folder(PathBuf);

impl Folder {
    fn create() -> Result<Folder> {
        let path = std::env::temp_dir().join(format!("kms-agent-quickstart-{}", std::process::id()));
        // This fails if the folder exists, since it would then be another user's. Only this user may read the token.
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|error| format!("cannot create the folder {}: {error}", path.display()))?;
        Ok(Folder(path))
    }

    fn token(&self) -> PathBuf {
        self.0.join("kmstoken")
    }

    fn config(&self) -> PathBuf {
        self.0.join("config.toml")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            complain(format_args!("cannot remove the folder {}: {error}", self.0.display()));
        }
    }
}

/// Starts the agent as `kms-agent run` would, on a thread of this process. Gives its port.
fn start_agent(folder: &Folder, kms: &Emulator) -> Result<(u16, JoinHandle<Result<()>>)> {
    let mut random = Random::from_system().map_err(|error| error.to_string())?;
    token::create_if_missing(&folder.token(), &mut random).map_err(|error| error.to_string())?;
    fs::write(folder.0.join("ca.pem"), kms.ca_pem())?;
    fs::write(folder.config(), configuration(&folder.0, kms, free_port()?))?;
    let config = config::load(&folder.config()).map_err(|error| error.to_string())?;
    let mut token = OsString::from("file://");
    token.push(folder.token());

    let (ready, port) = mpsc::channel();
    // An agent is not `Send`, so it is made on the thread that it runs on, and only its port is handed back.
    let thread = thread::spawn(move || -> Result<()> {
        let env = |name: &str| (name == "KMS_TOKEN").then(|| token.clone());
        // The agent is not hardened, because the emulated KMS runs in the same process.
        let agent = Agent::prepare(&config, &env, None).map_err(|error| error.to_string());
        ready.send(agent.as_ref().map(Agent::port).map_err(String::clone))?;
        agent?.serve().map_err(|error| error.to_string().into())
    });
    Ok((port.recv()??, thread))
}

fn configuration(folder: &Path, kms: &Emulator, port: u16) -> String {
    // A JSON string is a TOML basic string.
    let quoted = |path: &Path| serde_json::Value::from(path.display().to_string());
    let (folder, ca_file) = (quoted(folder), quoted(&folder.join("ca.pem")));
    let (kms, metadata) = (kms.kms_addr(), kms.metadata_url());
    format!(
        "[Server]\n\
         HttpPort = {port}\n\
         \n\
         [Cache]\n\
         TTLSeconds = {TTL_S}\n\
         \n\
         [KMS]\n\
         Endpoint = \"{kms}\"\n\
         CaFile = {ca_file}\n\
         MetadataEndpoint = \"{metadata}\"\n\
         \n\
         [Log]\n\
         LogPath = {folder}\n"
    )
}

/// The agent's default port, or 0 (any free port) if another program listens on that.
fn free_port() -> io::Result<u16> {
    let default = config::ServerSection::default().http_port;
    let Err(error) = net::mio::listen(default) else { return Ok(default) };
    let why = match error.kind() {
        io::ErrorKind::AddrInUse => format!("is held by {}", cli::port_holder(default)),
        _ => format!("cannot be used ({})", Reason(&error)),
    };
    writeln!(io::stdout(), "Port {default} {why}, so this agent takes a free one.")?;
    Ok(0)
}

/// A path, quoted for a shell where it has to be.
fn shell_word(path: &Path) -> String {
    let path = path.display().to_string();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    if path.chars().all(is_plain) { path } else { format!("'{}'", path.replace('\'', r"'\''")) }
}

fn introduce(folder: &Folder, kms: &Emulator, port: u16) -> io::Result<()> {
    let (kms, config, folder, token) = (kms.kms_addr(), folder.config(), &folder.0, folder.token());
    let (config, folder, token_word) = (config.display(), folder.display(), shell_word(&token));
    let token = token.display();
    // Clients look for the agent on its default port.
    let variables = if port == config::ServerSection::default().http_port {
        format!("export KMS_TOKEN=file://{token_word}")
    } else {
        format!("export KMS_TOKEN=file://{token_word} KMS_AGENT=http://localhost:{port}")
    };
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "
  kms-agent      http://localhost:{port}
  emulated KMS   https://{kms}, with the secrets \"{SECRET}\" and \"{OTHER_SECRET}\"
  token file     {token}
  configuration  {config}
  log            {folder}/kms-agent.log

Paste this into another terminal:

  curl -i --noproxy localhost -H \"X-KMS-Token: $(cat {token_word})\" \\
    'http://localhost:{port}/secretsmanager/get?secretId={SECRET}'; echo

Run it twice: X-Cache says MISS first (the agent asked KMS), then HIT (the value came from memory,
which here happens for {TTL_S} s).

To run kms-agent with --config {config}, or the programs in examples/clients, there, first paste this:

  {variables}

Then type one of these here:
  set VALUE   gives the secret a new value; readers get it within {TTL_S} s, or at once with &refreshNow=true
  stop        stops KMS; after {TTL_S} s X-Cache says STALE, and the secret is still served
  start       starts KMS again; the agent notices it within 30 s
Ctrl-C, or closing the terminal, ends the quickstart and removes its files.
"
    )?;
    out.flush()
}

/// Does what the user types. The agent goes on after the end of the input.
fn obey(kms: &Emulator) {
    for line in io::stdin().lock().lines().map_while(io::Result::ok) {
        let (word, rest) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
        let done = match (word, rest.trim()) {
            ("set", value) if !value.is_empty() => {
                format!("the secret has a new value, version {}", kms.put_secret(SECRET, value))
            }
            ("stop", "") => tell(kms.set_kms_mode(KmsMode::Refuse), "KMS is stopped"),
            ("start", "") => tell(kms.set_kms_mode(KmsMode::Normal), "KMS is running again"),
            ("", _) => continue,
            _ => "type set VALUE, stop or start; Ctrl-C ends the quickstart".to_owned(),
        };
        // The terminal may be closed; then this program is about to end.
        let _ = writeln!(io::stdout(), "  {done}");
    }
    // The emulator is dropped when this function returns, and it must outlive the input.
    loop {
        thread::park();
    }
}

fn tell(outcome: io::Result<()>, done: &str) -> String {
    match outcome {
        Ok(()) => done.to_owned(),
        Err(error) => error.to_string(),
    }
}

/// The round trip of `--once`: a miss, then a hit.
fn ask_twice(folder: &Folder, port: u16) -> Result<()> {
    let token = fs::read_to_string(folder.token())?;
    let (_, miss) = ask(port, token.trim(), "MISS")?;
    let (body, hit) = ask(port, token.trim(), "HIT")?;
    writeln!(io::stdout(), "GET /secretsmanager/get?secretId={SECRET}\n{miss}\n{hit}\n\n{body}")?;
    Ok(())
}

/// Asks for the secret; gives the reply's body and a line about it.
fn ask(port: u16, token: &str, x_cache: &str) -> Result<(String, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let begun = Instant::now();
    write!(
        stream,
        "GET /secretsmanager/get?secretId={SECRET} HTTP/1.1\r\n\
         Host: localhost\r\nX-KMS-Token: {token}\r\nConnection: close\r\n\r\n"
    )?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    let took_us = begun.elapsed().as_micros();
    let (head, body) = reply.split_once("\r\n\r\n").ok_or("the reply was cut off")?;
    let status = head.lines().next().and_then(|line| line.strip_prefix("HTTP/1.1 ")).unwrap_or(head);
    let told = head.lines().find_map(|line| line.strip_prefix("X-Cache: ")).unwrap_or("none");
    if status != "200 OK" || told != x_cache {
        return Err(format!("expected 200 OK and X-Cache {x_cache}, got:\n{reply}").into());
    }
    Ok((body.to_owned(), format!("  {status}   X-Cache: {told:4}   {took_us:>6} µs")))
}
