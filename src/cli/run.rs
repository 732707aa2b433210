//! `kms-agent run`: puts the agent together and serves.

use super::configuration::{Loaded, load};
use super::systemd::{self, Watchdog};
use super::terminal::{self, complain};
use crate::broker::Broker;
use crate::config::{Config, LogPath};
use crate::conn::tls;
use crate::harden::{Files, Harden};
use crate::identity::Identity;
use crate::log::{LogHandle, Reason};
use crate::net::Net as _;
use crate::net::mio::{MioNet, listen};
use crate::random::Random;
use crate::secret::Secret;
use crate::server::{Host, OTHER_CONNECTIONS, Server};
use crate::time::Mono;
use crate::token::{self, Source, TokenError, Watch};
use rustix::process::{Resource, Rlimit};
use rustls::ClientConfig;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Descriptors beside those of `MaxConn`: other connections, listeners, pipes, log, resolver.
const OTHER_DESCRIPTORS: u64 = OTHER_CONNECTIONS as u64 + 32;

pub(super) const HELP: &str = "\
kms-agent run - serve applications on 127.0.0.1 and [::1]

Usage: kms-agent run [--config FILE]

Options:
  -c, --config FILE    the configuration, TOML; without it config.toml beside the folder of the
                       binary (/usr/local/alibabacloudkmsagent/config.toml when installed there),
                       and built-in defaults where that does not exist
  -h, --help           print this

The token is the value of KMS_TOKEN (or what file:///path in it names), else of the file
/var/run/kmstoken, made at the first start. The log is ./logs/kms-agent.log; see [Log] LogPath.

Signals:
  SIGTERM, SIGINT      finish what is in flight (at most 5 s), then end
  SIGHUP               read the token and CaFile again, reopen the log

Exit codes: 0 ended by a signal, 1 failed, 2 wrong usage or configuration
";

/// Why the agent did not start; told to the person who started it.
#[derive(Debug)]
pub enum StartError {
    /// Configuration or environment ask for what cannot be.
    Configuration(String),
    /// Something that is needed cannot be had.
    Failed(String),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StartError::Configuration(message) | StartError::Failed(message) => f.write_str(message),
        }
    }
}

impl std::error::Error for StartError {}

/// The command; the result is the exit code.
#[must_use]
pub fn main(file: Option<PathBuf>) -> u8 {
    let Loaded { config, file } = match load(file) {
        Ok(loaded) => loaded,
        Err(exit_code) => return exit_code,
    };
    let env = |name: &str| std::env::var_os(name);
    let serve = |agent: Agent| {
        match &file {
            Some(file) => log::info!("the configuration is {}", file.display()),
            None => {
                log::info!("the configuration is the built-in defaults, since no file was given or found")
            }
        }
        if let LogPath::Folder(folder) = &config.log.path {
            // Whoever started it by hand should not have to guess.
            let log =
                std::path::absolute(folder).unwrap_or_else(|_| folder.clone()).join(crate::log::FILE_NAME);
            complain(&format_args!("serving on port {}, log in {}", agent.port(), log.display()));
        }
        agent.serve()
    };
    match Agent::prepare(&config, &env, Some(Harden::begin())).and_then(serve) {
        Ok(()) => terminal::OK,
        Err(error) => {
            complain(&error);
            match error {
                StartError::Configuration(_) => terminal::USAGE,
                StartError::Failed(_) => terminal::FAILED,
            }
        }
    }
}

/// An agent that listens and is not serving yet.
pub struct Agent {
    server: Server<MioNet>,
    port: u16,
}

impl Agent {
    /// Opens everything the agent needs: log, token, CA file, sockets. Needs no network. With `harden` it then
    /// gives up what it needs no more; that concerns the whole process.
    ///
    /// # Errors
    /// The first of them that cannot be had, in one line.
    pub fn prepare(
        config: &Config,
        env: &dyn Fn(&str) -> Option<OsString>,
        mut harden: Option<Harden>,
    ) -> Result<Agent, StartError> {
        let log = crate::log::init(&config.log).map_err(|error| StartError::Failed(error.to_string()))?;
        let mut random = Random::from_system()
            .map_err(|_| StartError::Failed("the operating system gives no random bytes".to_owned()))?;
        let identity = identity(config, env, &mut random)?;
        let (source, token) = find_token(config, env, &mut random)?;
        let ca_file = config.kms.ca_file.clone();
        let tls = client_config(ca_file.as_deref())?;
        let listeners = listen(config.server.http_port)
            .map_err(|error| cannot_listen(config.server.http_port, &error))?;
        let port = port_of(&listeners)?;
        raise_descriptor_limit(config.server.max_conn);
        log::info!("kms-agent {} listens on {}", env!("CARGO_PKG_VERSION"), addresses(&listeners));
        log::info!("the token comes from {source}");
        for complaint in source.complaints() {
            log::warn!("{complaint}");
        }
        if token.is_empty() {
            log::warn!("the token is empty: every request that needs one will be refused");
        }
        if let Some(harden) = &mut harden {
            // Before the net, whose helper thread inherits it.
            harden.restrict_files(&files(config, &source, env));
        }
        let net = MioNet::new(listeners)
            .map_err(|error| StartError::Failed(format!("cannot start: {}", Reason(&error))))?;
        let watchdog = Watchdog::from_env(net.now().mono);
        let mut broker = Broker::new(config, token.duplicate(), identity, random);
        broker.set_process(std::process::id(), net.now());
        let host = Process { token: Watch::new(source, token), log, ca_file, port, watchdog };
        let server = Server::new(net, broker, config.server.max_conn, Some(tls), Box::new(host));
        if let Some(harden) = harden {
            harden.restrict_calls();
        }
        Ok(Agent { server, port })
    }

    /// The port that it listens on.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Serves until SIGTERM or SIGINT.
    ///
    /// # Errors
    /// When the kernel gives no more events.
    pub fn serve(mut self) -> Result<(), StartError> {
        systemd::ready(self.port);
        self.server.run().map_err(|error| StartError::Failed(format!("cannot go on: {}", Reason(&error))))?;
        log::info!("the agent has ended");
        Ok(())
    }
}

/// What the loop wants of its process.
struct Process {
    token: Watch,
    log: LogHandle,
    ca_file: Option<PathBuf>,
    port: u16,
    watchdog: Watchdog,
}

impl Host for Process {
    fn poll_token(&mut self) -> Option<Secret> {
        self.token.poll()
    }

    fn on_tick_end(&mut self) {
        self.log.flush();
    }

    fn on_reload(&mut self) -> Option<Arc<ClientConfig>> {
        systemd::reloading();
        self.log.reopen();
        let tls = client_config(self.ca_file.as_deref());
        if let Err(error) = &tls {
            log::error!("{error}; the certificates that were trusted before stay trusted");
        }
        systemd::reloaded(self.port);
        tls.ok()
    }

    fn on_drain(&mut self, connections: usize) {
        systemd::stopping(connections);
    }

    fn watchdog_due(&self) -> Mono {
        self.watchdog.due()
    }

    fn on_alive(&mut self, now: Mono) {
        self.watchdog.beat(now);
    }
}

fn find_token(
    config: &Config,
    env: &dyn Fn(&str) -> Option<OsString>,
    random: &mut Random,
) -> Result<(Source, Secret), StartError> {
    let source = Source::find(&config.server.ssrf_env_variables, env)
        .map_err(|error| StartError::Configuration(error.to_string()))?;
    if let Source::File { path, default: true } = &source {
        match token::create_if_missing(path, random) {
            Ok(true) => log::info!("the token file {} was made", path.display()),
            Ok(false) => {}
            Err(error) => return Err(StartError::Failed(cannot_create(&error, config))),
        }
    }
    let token = source.read().map_err(|error| StartError::Failed(error.to_string()))?;
    Ok((source, token))
}

/// What to do where the default file, in a folder of root's, cannot be made.
fn cannot_create(error: &TokenError, config: &Config) -> String {
    match error {
        TokenError::Create(_, reason) if reason.kind() == io::ErrorKind::PermissionDenied => {
            let variable = config.server.ssrf_env_variables.first().map_or("KMS_TOKEN", String::as_str);
            format!(
                "{error}; start as root, or make one with 'kms-agent token create --file FILE' and set \
                 {variable}=file:///path/FILE"
            )
        }
        error => error.to_string(),
    }
}

pub(super) fn client_config(ca_file: Option<&Path>) -> Result<Arc<ClientConfig>, StartError> {
    let pem = match ca_file {
        Some(path) => Some(fs::read(path).map_err(|error| {
            StartError::Failed(format!("[KMS] CaFile {}: cannot read it: {}", path.display(), Reason(&error)))
        })?),
        None => None,
    };
    tls::client_config(pem.as_deref()).map_err(|error| {
        StartError::Failed(format!("[KMS] CaFile {}: {error}", ca_file.unwrap_or(Path::new("")).display()))
    })
}

/// The files that are opened while the agent serves.
fn files(config: &Config, token: &Source, env: &dyn Fn(&str) -> Option<OsString>) -> Files {
    let mut files = Files::default();
    if let Source::File { path, .. } = token {
        files.read(path);
    }
    if let Some(path) = &config.kms.ca_file {
        files.read(path);
    }
    if let Some(path) = env("ALIBABA_CLOUD_OIDC_TOKEN_FILE") {
        files.read(Path::new(&path));
    }
    if let LogPath::Folder(folder) = &config.log.path {
        files.write(folder);
    }
    files
}

fn cannot_listen(port: u16, error: &io::Error) -> StartError {
    StartError::Failed(if error.kind() == io::ErrorKind::AddrInUse {
        format!(
            "port {port} is taken: another program (or another kms-agent) listens on it; see [Server] HttpPort"
        )
    } else {
        format!("cannot listen on port {port}: {}", Reason(error))
    })
}

fn port_of(listeners: &[TcpListener]) -> Result<u16, StartError> {
    let address = listeners.first().map(TcpListener::local_addr).transpose();
    match address {
        Ok(Some(address)) => Ok(address.port()),
        _ => Err(StartError::Failed("cannot listen: the kernel names no address".to_owned())),
    }
}

fn addresses(listeners: &[TcpListener]) -> String {
    let names: Vec<String> =
        listeners.iter().filter_map(|listener| listener.local_addr().ok()).map(|it| it.to_string()).collect();
    names.join(" and ")
}

/// `MaxConn` connections need as many descriptors; the soft limit is often 1,024.
fn raise_descriptor_limit(connections_max: usize) {
    let needed = connections_max as u64 + OTHER_DESCRIPTORS;
    let limit = rustix::process::getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= needed) {
        return;
    }
    let current = limit.maximum.map_or(needed, |maximum| maximum.min(needed));
    let raised = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: Some(current), ..limit });
    if raised.is_err() || current < needed {
        log::warn!("the limit of open files is {current}, and MaxConn needs {needed}: raise LimitNOFILE");
    }
}

/// Who the agent is to KMS.
pub(super) fn identity(
    config: &Config,
    env: &dyn Fn(&str) -> Option<OsString>,
    random: &mut Random,
) -> Result<Identity, StartError> {
    let random = Random::from_seed(random.next_u64());
    Identity::from_config(&config.kms, env, random)
        .map_err(|error| StartError::Configuration(error.to_string()))
}
