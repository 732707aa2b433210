//! The instance metadata service (`100.100.100.200` on a real host).

use crate::counters::{RequestRecord, Service};
use crate::faults::{CredentialsUriFault, IdentityFault, MetadataFault, MetadataMode};
use crate::http::{self, Outcome, Received, Reply, Stream};
use crate::identity::Signing;
use crate::json::Object;
use crate::kms::signature;
use crate::state::{Shared, State};
use crate::{clock, race, random};
use std::io;
use std::sync::Arc;
use std::time::Instant;
use tokio::net::TcpStream;

const TTL_HEADER: &str = "x-aliyun-ecs-metadata-token-ttl-seconds";
const TOKEN_HEADER: &str = "x-aliyun-ecs-metadata-token";
/// Session tokens live 1 second to 6 hours.
const TTL_S: std::ops::RangeInclusive<i64> = 1..=21_600;
const ROLES: &str = "/latest/meta-data/ram/security-credentials";
const IDENTITY: &str = "/latest/dynamic/instance-identity/";
/// What `ALIBABA_CLOUD_CREDENTIALS_URI` points to. Not part of the metadata service: it lives here so that a
/// test needs no third port, and knows no session tokens.
pub(crate) const CREDENTIALS_URI: &str = "/credentials-uri";
/// What a page of the wrong kind of server may look like.
const GARBAGE: &[u8] = b"\x00\xff\xfe<html>it works{{{\"Code\":";

/// One connection, until it ends or all are ended.
pub(crate) async fn connection(shared: Arc<Shared>, tcp: TcpStream) {
    let mut end = shared.end_metadata.subscribe();
    let number = {
        let mut state = shared.lock();
        state.counters.metadata_accepted += 1;
        if matches!(state.metadata_fault, Some(MetadataFault::Close | MetadataFault::Refuse)) {
            return;
        }
        state.next_connection()
    };
    let _ = tcp.set_nodelay(true);
    let handler =
        move |received| -> http::OutcomeFuture { Box::pin(answer(Arc::clone(&shared), number, received)) };
    let _ = race(end.changed(), http::serve(Stream::Plain(tcp), handler)).await;
}

async fn answer(shared: Arc<Shared>, connection: u64, received: Received) -> Outcome {
    let (log_id, fault, latency) = {
        let mut state = shared.lock();
        state.counters.metadata_requests += 1;
        let id = state.log.push(RequestRecord {
            service: Service::Metadata,
            arrived: Instant::now(),
            answered: None,
            connection,
            action: format!("{} {}", received.method, received.path),
            secret: None,
            access_key_id: None,
            status: None,
            code: None,
        });
        (id, state.metadata_fault, state.metadata_latency)
    };
    if !latency.is_zero() {
        tokio::time::sleep(latency).await;
    }
    let garbage = || Reply { status: 200, headers: Vec::new(), body: GARBAGE.to_vec() };
    let forced = match fault {
        Some(MetadataFault::Stall) => std::future::pending().await,
        Some(MetadataFault::Status500) => Some(failure(500, "Internal Server Error")),
        Some(MetadataFault::Garbage) => Some(garbage()),
        _ => None,
    };
    let mut state = shared.lock();
    let reply = forced.unwrap_or_else(|| reply(&mut state, &received));
    state.log.answered(log_id, Some(reply.status), None);
    let date = clock::http_date(state.clock.server());
    Outcome::Reply(reply.with_header("date", &date))
}

fn reply(state: &mut State, received: &Received) -> Reply {
    let now = state.clock.life();
    match (received.method.as_str(), received.path.as_str()) {
        ("PUT", "/latest/api/token") => return new_token(state, received, now),
        (_, "/latest/api/token") | ("POST" | "PUT" | "DELETE" | "PATCH", _) => {
            return failure(405, "Method Not Allowed");
        }
        _ => {}
    }
    if received.path == CREDENTIALS_URI {
        return credentials_uri(state, now);
    }
    match received.header(TOKEN_HEADER) {
        None => {
            state.counters.metadata_plain_gets += 1;
            if state.metadata_mode == MetadataMode::Hardened {
                return failure(403, "Forbidden");
            }
        }
        Some(token) => {
            if state.session_tokens.get(token).is_none_or(|end| *end <= now) {
                return failure(401, "Unauthorized");
            }
            state.counters.metadata_hardened_gets += 1;
        }
    }
    get(state, received, now)
}

fn new_token(state: &mut State, received: &Received, now: i64) -> Reply {
    if received.header("x-forwarded-for").is_some() {
        return failure(403, "Forbidden");
    }
    let ttl = received.header(TTL_HEADER).and_then(|text| text.parse::<i64>().ok());
    let Some(ttl) = ttl.filter(|ttl| TTL_S.contains(ttl)) else {
        return failure(400, "Bad Request");
    };
    state.session_tokens.retain(|_, end| *end > now);
    let token = format!("{}==", random::alphanumeric(54));
    state.session_tokens.insert(token.clone(), now + ttl);
    state.counters.metadata_token_puts += 1;
    Reply::new(200, "text/plain", token).with_header(TTL_HEADER, &ttl.to_string())
}

fn get(state: &mut State, received: &Received, now: i64) -> Reply {
    let path = received.path.as_str();
    let text = |value: &str| Reply::new(200, "text/plain", value);
    if let Some(rest) = path.strip_prefix(ROLES) {
        return match (rest.trim_start_matches('/'), state.role.clone()) {
            ("", Some(role)) => text(&role),
            (asked, Some(role)) if asked == role => credentials(state, &role, now),
            _ => failure(404, "Not Found"),
        };
    }
    if let Some(form) = path.strip_prefix(IDENTITY) {
        return match form {
            _ if state.identity_fault == Some(IdentityFault::NotFound) => failure(404, "Not Found"),
            "document" => text(&document(state, None)),
            "pkcs7" => {
                let pairs = signature::decode_pairs(&received.query);
                let audience = pairs.iter().find(|(name, _)| name == b"audience");
                let audience = audience.map(|(_, value)| String::from_utf8_lossy(value).into_owned());
                match signed_identity(state, audience.as_deref()) {
                    Ok(identity) => text(&identity),
                    Err(_) => failure(500, "Internal Server Error"),
                }
            }
            _ => failure(404, "Not Found"),
        };
    }
    match path {
        "/latest/meta-data/region-id" => text(&state.region),
        "/latest/meta-data/zone-id" => text(&zone(state)),
        "/latest/meta-data/instance-id" => text(INSTANCE_ID),
        "/latest/meta-data/owner-account-id" => text(&state.account),
        "/latest/meta-data/private-ipv4" => text(PRIVATE_IPV4),
        _ => failure(404, "Not Found"),
    }
}

/// The one instance there is.
pub(crate) const INSTANCE_ID: &str = "i-bp1emulator0000000000";
const PRIVATE_IPV4: &str = "192.168.1.10";

fn zone(state: &State) -> String {
    format!("{}-h", state.region)
}

/// The instance's document, with `audience` as its last field.
fn document(state: &State, audience: Option<&str>) -> String {
    let account = match state.identity_fault {
        Some(IdentityFault::OtherAccount) => "9999999999999999",
        _ => &state.account,
    };
    Object::default()
        .text("zone-id", &zone(state))
        .text("instance-id", INSTANCE_ID)
        .text("region-id", &state.region)
        .text("owner-account-id", account)
        .text("private-ipv4", PRIVATE_IPV4)
        .text("image-id", "aliyun_3_x64_20G_alibase_20250117.vhd")
        .text("instance-type", "ecs.g7.large")
        .text("mac", "00:16:3e:00:00:01")
        .text("serial-number", "00000000-0000-4000-8000-000000000001")
        .maybe("audience", audience)
        .end()
}

/// The signed document in base64, or what the fault in force makes of it.
pub(crate) fn signed_identity(state: &mut State, audience: Option<&str>) -> io::Result<String> {
    let fault = state.identity_fault;
    let document = document(state, audience.filter(|_| fault != Some(IdentityFault::NoAudience)));
    state.counters.identity_reads += 1;
    let signing = match fault {
        Some(IdentityFault::NotBase64) => return Ok("<html>no identity today</html>".to_owned()),
        Some(IdentityFault::Repeated) => {
            if let Some(last) = &state.identities.last {
                return Ok(last.clone());
            }
            Signing::Honest
        }
        Some(IdentityFault::OtherCa) => Signing::OtherCa,
        Some(IdentityFault::Tampered) => Signing::Tampered,
        _ => Signing::Honest,
    };
    state.identities.issue(&document, signing)
}

fn credentials_uri(state: &mut State, now: i64) -> Reply {
    let json = |body: String| Reply::new(200, "application/json", body);
    let fault = state.credentials_uri_fault;
    match fault {
        Some(CredentialsUriFault::NotFound) => return failure(404, "Not Found"),
        Some(CredentialsUriFault::Status500) => return failure(500, "Internal Server Error"),
        Some(CredentialsUriFault::NotSuccess) => {
            return json(Object::default().text("Code", "Failed").text("Message", "No credentials.").end());
        }
        Some(CredentialsUriFault::Expired | CredentialsUriFault::Malformed) | None => {}
    }
    // A role of its own, by a name that no role can have.
    let mut issued = state.credentials.for_role(CREDENTIALS_URI, now);
    if fault == Some(CredentialsUriFault::Expired) {
        issued.expiration = now - 60;
    }
    let mut body = issued.fields(Object::default().text("Code", "Success")).end();
    match fault {
        Some(CredentialsUriFault::Malformed) => body.truncate(body.len() / 2),
        None => state.counters.credentials_uri_reads += 1,
        Some(_) => {}
    }
    json(body)
}

fn credentials(state: &mut State, role: &str, now: i64) -> Reply {
    if state.metadata_fault == Some(MetadataFault::NotSuccess) {
        let body = Object::default().text("Code", "Failed").text("LastUpdated", &clock::iso8601(now)).end();
        return Reply::new(200, "text/plain", body);
    }
    let issued = state.credentials.for_role(role, now);
    *state.counters.credential_reads.entry(role.to_owned()).or_default() += 1;
    let body = Object::default()
        .text("AccessKeyId", &issued.access_key_id)
        .text("AccessKeySecret", &issued.access_key_secret)
        .text("Expiration", &clock::iso8601(issued.expiration))
        .text("SecurityToken", &issued.security_token)
        .text("LastUpdated", &clock::iso8601(now))
        .text("Code", "Success")
        .end();
    Reply::new(200, "text/plain", body)
}

/// The bodies of the real service's failures are not published; this is what such a server tends to send.
fn failure(status: u16, text: &str) -> Reply {
    let page = format!(
        "<?xml version=\"1.0\" encoding=\"iso-8859-1\"?>\n<html>\n <head><title>{status} - {text}</title></head>\n \
         <body><h1>{status} - {text}</h1></body>\n</html>\n"
    );
    Reply::new(status, "text/html", page)
}
