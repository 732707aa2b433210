//! A request to the agent on this host: what `get`, `exec`, `status` and `check` have in common.

use crate::broker::gate;
use crate::config::{Config, ResponseType};
use crate::http::percent;
use crate::http::response::{Progress, REPLY_BYTES_MAX, Response, ResponseError, ResponseParser};
use crate::json::{self, Members};
use crate::log::Reason;
use crate::secret::Secret;
use crate::text::excerpt;
use crate::time::{Clock, Mono};
use crate::token::Source;
use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;
use zeroize::Zeroizing;

/// The agent is on this host: it accepts at once, or not at all.
const CONNECT_MAX: Duration = Duration::from_secs(2);
/// A reader with nothing cached waits at most 8 s; past this there is no agent that works.
const SECRET_MAX: Duration = Duration::from_secs(12);
/// What the agent knows by itself it tells at once.
const ANSWER_MAX: Duration = Duration::from_secs(3);
/// Shapes other than KMS's own are somewhat longer than KMS's reply.
const BODY_BYTES_MAX: usize = 2 * REPLY_BYTES_MAX;
/// For a reply that is not what its configuration promises.
pub(super) const UNUSABLE: &str = "the reply holds no secret in the shape of [Server] ResponseType: is the \
    configuration that of the running agent?";
/// Foreign text in a message is cut to this many bytes.
const MESSAGE_BYTES_MAX: usize = 1024;

/// Why there was no reply.
#[derive(Debug)]
pub(super) enum LocalError {
    UnknownPort,
    Refused {
        port: u16,
    },
    /// Somebody listens, and does not answer in time.
    Timeout {
        port: u16,
    },
    /// Somebody listens, and does not speak HTTP.
    NotHttp {
        port: u16,
        error: ResponseError,
    },
    Broken {
        port: u16,
        /// What the system says.
        error: io::Error,
    },
}

impl fmt::Display for LocalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LocalError::UnknownPort => f.write_str(
                "[Server] HttpPort is 0: the agent took any free port, and only its log says which. Set a fixed one",
            ),
            LocalError::Refused { port } => write!(
                f,
                "nobody listens on port {port}: the agent is not running, or has another [Server] HttpPort"
            ),
            LocalError::Timeout { port } => write!(
                f,
                "port {port}: no answer in time; 'kms-agent check' tells who listens there"
            ),
            LocalError::NotHttp { port, error } => {
                write!(f, "port {port}: {error}; 'kms-agent check' tells who listens there")
            }
            LocalError::Broken { port, error } => write!(f, "port {port}: {}", Reason(error)),
        }
    }
}

/// GET /ping, which needs no token, from this port.
/// Errors: when nobody answers in HTTP.
pub(super) fn ping(port: u16) -> Result<Response, LocalError> {
    get(port, "/ping", None, ANSWER_MAX)
}

/// `header` is a name and what it carries.
#[expect(clippy::disallowed_methods, reason = "a command has no loop that could hand it the time")]
fn get(
    port: u16,
    target: &str,
    header: Option<(&str, &Secret)>,
    limit: Duration,
) -> Result<Response, LocalError> {
    if port == 0 {
        return Err(LocalError::UnknownPort);
    }
    let broken = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => LocalError::Timeout { port },
        _ => LocalError::Broken { port, error },
    };
    let clock = Clock::start();
    let deadline = clock.now().mono.after(limit);
    let mut stream = connect(port)?;
    let mut request = Zeroizing::new(Vec::with_capacity(16 * 1024));
    let _ = write!(request, "GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
    if let Some((name, value)) = header {
        let _ = write!(request, "{name}: ");
        request.extend_from_slice(value.expose());
        request.extend_from_slice(b"\r\n");
    }
    request.extend_from_slice(b"\r\n");
    stream.set_write_timeout(Some(CONNECT_MAX)).map_err(broken)?;
    stream.write_all(&request).map_err(broken)?;
    read(&mut stream, &clock, deadline).map_err(|error| match error {
        ReadError::Http(error) => LocalError::NotHttp { port, error },
        ReadError::Io(error) => broken(error),
    })
}

fn connect(port: u16) -> Result<TcpStream, LocalError> {
    let to = |address: IpAddr| TcpStream::connect_timeout(&SocketAddr::new(address, port), CONNECT_MAX);
    let refused = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    match to(Ipv4Addr::LOCALHOST.into()) {
        Ok(stream) => Ok(stream),
        // Without IPv6 its refusal has other names.
        Err(error) if refused(&error) => {
            to(Ipv6Addr::LOCALHOST.into()).map_err(|_| LocalError::Refused { port })
        }
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Err(LocalError::Timeout { port }),
        Err(error) => Err(LocalError::Broken { port, error }),
    }
}

enum ReadError {
    Http(ResponseError),
    Io(io::Error),
}

fn read(stream: &mut TcpStream, clock: &Clock, deadline: Mono) -> Result<Response, ReadError> {
    let mut parser = ResponseParser::new(BODY_BYTES_MAX);
    let mut scratch = Zeroizing::new([0; 16 * 1024]);
    loop {
        let left = deadline.since(clock.now().mono);
        if left.is_zero() {
            return Err(ReadError::Io(io::ErrorKind::TimedOut.into()));
        }
        stream.set_read_timeout(Some(left)).map_err(ReadError::Io)?;
        match stream.read(scratch.as_mut()) {
            Ok(0) => {
                parser.on_eof().map_err(ReadError::Http)?;
                return Ok(parser.into_response());
            }
            Ok(count) => {
                debug_assert!(count <= scratch.len());
                match parser.feed(scratch.get(..count).unwrap_or_default()) {
                    Ok(Progress::NeedMore) => {}
                    Ok(Progress::Done { .. }) => return Ok(parser.into_response()),
                    Err(error) => return Err(ReadError::Http(error)),
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(ReadError::Io(error)),
        }
    }
}

/// The agent as a command meets it: its port, its token, its way of answering.
pub(super) struct AgentClient<'a> {
    config: &'a Config,
    source: Source,
    token: Secret,
}

/// Which secret is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SecretRequest {
    pub(super) id: String,
    pub(super) version_id: Option<String>,
    pub(super) version_stage: Option<String>,
    pub(super) refresh: bool,
}

impl<'a> AgentClient<'a> {
    /// The agent of this configuration, with the token that the daemon's own rule finds in this process's
    /// environment.
    /// Errors: why there is no token, and what to do, for a message.
    pub(super) fn of(config: &'a Config) -> Result<AgentClient<'a>, String> {
        let source = Source::find(&config.server.ssrf_env_variables, &|name| std::env::var_os(name))
            .map_err(|error| error.to_string())?;
        let token = source.read().map_err(|error| format!("{error}; 'kms-agent check' tells more"))?;
        if token.is_empty() {
            return Err(format!("{source}: the token is empty; 'kms-agent check' tells more"));
        }
        Ok(AgentClient { config, source, token })
    }

    /// GET /status.
    /// Errors: when nobody answers in HTTP.
    pub(super) fn status(&self) -> Result<Response, LocalError> {
        self.get("/status", ANSWER_MAX)
    }

    fn get(&self, target: &str, limit: Duration) -> Result<Response, LocalError> {
        let header = self.config.server.ssrf_headers.first().map_or("X-KMS-Token", String::as_str);
        get(self.config.server.http_port, target, Some((header, &self.token)), limit)
    }

    /// The reply for a secret, whole.
    /// Errors: why there is none, in one line.
    pub(super) fn ask(&self, request: &SecretRequest) -> Result<Zeroizing<Vec<u8>>, String> {
        let reply = self.get(&target(request), SECRET_MAX).map_err(|error| error.to_string())?;
        match reply.status {
            200 => Ok(reply.body),
            // These have nothing to do with the secret.
            _ if is_token_refusal(&reply) || is_busy(&reply) => Err(self.refusal(&reply)),
            _ => {
                Err(format!("{}; 'kms-agent check --secret {}' tells more", self.refusal(&reply), request.id))
            }
        }
    }

    /// Why the agent gave something else than was asked for.
    pub(super) fn refusal(&self, reply: &Response) -> String {
        if is_token_refusal(reply) {
            format!("403: the agent has another token than {}; see 'kms-agent check'", self.source)
        } else {
            failure(reply)
        }
    }

    /// `SecretData` in a reply, in whichever shape this agent answers.
    pub(super) fn secret_data(&self, body: &[u8]) -> Option<Zeroizing<String>> {
        secret_data(self.config.server.response_type, body)
    }
}

fn target(request: &SecretRequest) -> String {
    let mut target = String::from("/secretsmanager/get?secretId=");
    percent::encode(&request.id, &mut target);
    for (name, value) in [("versionId", &request.version_id), ("versionStage", &request.version_stage)] {
        if let Some(value) = value {
            target.push_str(&format!("&{name}="));
            percent::encode(value, &mut target);
        }
    }
    if request.refresh {
        target.push_str("&refreshNow=true");
    }
    target
}

fn secret_data(response_type: ResponseType, body: &[u8]) -> Option<Zeroizing<String>> {
    let members = Members::of(body).ok()?;
    match response_type {
        ResponseType::Kms => members.text("SecretData"),
        ResponseType::Aws => members.text("SecretString").or_else(|| members.text("SecretBinary")),
        ResponseType::Vault => {
            // What is no JSON object came as {"value": ..}. An object of just that member looks the same.
            let data = members.raw("data")?;
            let inner = Members::of(data.as_bytes()).ok()?;
            let plain = inner.text("value").filter(|_| inner.len() == 1);
            Some(plain.unwrap_or_else(|| Zeroizing::new(data.to_owned())))
        }
    }
}

/// One member of `data`, which must be a JSON object: a string's text, anything else as JSON.
/// Errors: what is wrong, without showing any of it.
pub(super) fn field(data: &str, key: &str) -> Result<Zeroizing<String>, String> {
    let members =
        Members::of(data.as_bytes()).map_err(|_| "the secret is no JSON object, so it has no fields")?;
    let raw = members.raw(key).ok_or_else(|| format!("the secret has no field {key:?}"))?;
    Ok(json::text(raw).unwrap_or_else(|| Zeroizing::new(raw.to_owned())))
}

/// Whether the agent did not like the token, in any of its ways to say so.
pub(super) fn is_token_refusal(reply: &Response) -> bool {
    let text = failure(reply);
    let is_refusal = |text: &str| gate::TOKEN_REFUSALS.contains(&text);
    text.starts_with("403 InvalidToken") || text.strip_prefix("403 ").is_some_and(is_refusal)
}

/// Whether all of `MaxConn` serve others: the agent is there, and has looked at nothing else of the request.
pub(super) fn is_busy(reply: &Response) -> bool {
    reply.status == 429
}

/// An error reply in one line: the status, then code and message in any of the agent's three ways to say them,
/// or what else stands there.
pub(super) fn failure(reply: &Response) -> String {
    let body = reply.body.as_slice();
    let told = match Members::of(body) {
        Ok(members) => {
            let text = |name| members.text(name).map(|it| it.to_string()).filter(|it| !it.is_empty());
            let errors = members.raw("errors").and_then(|raw| serde_json::from_str::<Vec<String>>(raw).ok());
            let code = text("Code").or_else(|| text("__type"));
            let message = text("Message").or_else(|| text("message"));
            let parts = [code, message, errors.map(|it| it.join("; "))];
            let told = parts.into_iter().flatten().collect::<Vec<String>>().join(": ");
            match text("RequestId") {
                Some(id) if !told.is_empty() => format!("{told} (RequestId {id})"),
                _ => told,
            }
        }
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    let told = excerpt(told.trim(), MESSAGE_BYTES_MAX);
    format!("{} {told}", reply.status).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(status: u16, body: &str) -> Response {
        let mut parser = ResponseParser::new(10_000);
        let text = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        parser.feed(text.as_bytes()).unwrap();
        parser.into_response()
    }

    #[test]
    fn secret_data_in_each_shape() {
        for (response_type, body, data) in [
            (ResponseType::Kms, r#"{"SecretData":"a\"\n\u00e9"}"#, Some("a\"\n\u{e9}")),
            (ResponseType::Kms, r#"{"SecretString":"a"}"#, None),
            (ResponseType::Kms, "nonsense", None),
            (ResponseType::Aws, r#"{"SecretString":"a"}"#, Some("a")),
            (ResponseType::Aws, r#"{"SecretBinary":"AAEC"}"#, Some("AAEC")),
            (ResponseType::Vault, r#"{"data":{"value":"a"}}"#, Some("a")),
            (ResponseType::Vault, r#"{"data":{"u":"a", "n":1}}"#, Some(r#"{"u":"a", "n":1}"#)),
            (ResponseType::Vault, r#"{"data":{"value":7}}"#, Some(r#"{"value":7}"#)),
        ] {
            let found = secret_data(response_type, body.as_bytes());
            assert_eq!(found.as_ref().map(|it| it.as_str()), data, "{body}");
        }
    }

    #[test]
    fn fields() {
        let data = r#"{"user":"u","port":3306,"tls":{"on": true}}"#;
        for (key, value) in [("user", "u"), ("port", "3306"), ("tls", r#"{"on": true}"#)] {
            assert_eq!(field(data, key).unwrap().as_str(), value);
        }
        assert_eq!(field(data, "pass").unwrap_err(), "the secret has no field \"pass\"");
        assert!(field("hush", "user").unwrap_err().ends_with("so it has no fields"));
    }

    #[test]
    fn errors_in_each_shape() {
        for (status, body, told, token) in [
            (404, r#"{"Code":"A.B","Message":"no","RequestId":"r"}"#, "404 A.B: no (RequestId r)", false),
            (403, r#"{"Code":"InvalidToken","Message":"Bad Token"}"#, "403 InvalidToken: Bad Token", true),
            (403, "Bad Token", "403 Bad Token", true),
            (400, r#"{"__type":"A","message":"no"}"#, "400 A: no", false),
            (
                403,
                r#"{"errors":["the token in the request is wrong"]}"#,
                "403 the token in the request is wrong",
                true,
            ),
            (403, r#"{"errors":["A: no"]}"#, "403 A: no", false),
            (500, "<html>\u{1b}[31m\r\n", r"500 <html>\u{1b}[31m", false),
            (500, "", "500", false),
        ] {
            let reply = reply(status, body);
            assert_eq!((failure(&reply).as_str(), is_token_refusal(&reply)), (told, token), "{body}");
        }
    }

    #[test]
    fn targets_are_encoded() {
        let request = SecretRequest { id: "a/b&c d".into(), ..SecretRequest::default() };
        assert_eq!(target(&request), "/secretsmanager/get?secretId=a%2Fb%26c%20d");
        let all = SecretRequest {
            version_id: Some("v".into()),
            version_stage: Some("S+".into()),
            refresh: true,
            ..request
        };
        assert!(target(&all).ends_with("&versionId=v&versionStage=S%2B&refreshNow=true"));
    }
}
