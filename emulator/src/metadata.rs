//! The instance metadata service (`100.100.100.200` on a real host).

use crate::counters::{RequestRecord, Service};
use crate::faults::{MetadataFault, MetadataMode};
use crate::http::{self, Outcome, Received, Reply, Stream};
use crate::json::Object;
use crate::state::{Shared, State};
use crate::{clock, race, random};
use std::sync::Arc;
use std::time::Instant;
use tokio::net::TcpStream;

const TTL_HEADER: &str = "x-aliyun-ecs-metadata-token-ttl-seconds";
const TOKEN_HEADER: &str = "x-aliyun-ecs-metadata-token";
/// Session tokens live 1 second to 6 hours.
const TTL_S: std::ops::RangeInclusive<i64> = 1..=21_600;
const ROLES: &str = "/latest/meta-data/ram/security-credentials";
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
    get(state, &received.path, now)
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

fn get(state: &mut State, path: &str, now: i64) -> Reply {
    let text = |value: &str| Reply::new(200, "text/plain", value);
    if let Some(rest) = path.strip_prefix(ROLES) {
        return match (rest.trim_start_matches('/'), state.role.clone()) {
            ("", Some(role)) => text(&role),
            (asked, Some(role)) if asked == role => credentials(state, &role, now),
            _ => failure(404, "Not Found"),
        };
    }
    match path {
        "/latest/meta-data/region-id" => text(&state.region),
        "/latest/meta-data/zone-id" => text(&zone(state)),
        "/latest/meta-data/instance-id" => text(INSTANCE_ID),
        "/latest/meta-data/owner-account-id" => text(&state.account),
        "/latest/meta-data/private-ipv4" => text(PRIVATE_IPV4),
        "/latest/dynamic/instance-identity/document" => Reply::new(200, "text/plain", document(state)),
        _ => failure(404, "Not Found"),
    }
}

const INSTANCE_ID: &str = "i-bp1emulator0000000000";
const PRIVATE_IPV4: &str = "192.168.1.10";

fn zone(state: &State) -> String {
    format!("{}-h", state.region)
}

fn document(state: &State) -> String {
    Object::default()
        .text("zone-id", &zone(state))
        .text("instance-id", INSTANCE_ID)
        .text("region-id", &state.region)
        .text("owner-account-id", &state.account)
        .text("private-ipv4", PRIVATE_IPV4)
        .text("image-id", "aliyun_3_x64_20G_alibase_20250117.vhd")
        .text("instance-type", "ecs.g7.large")
        .text("mac", "00:16:3e:00:00:01")
        .text("serial-number", "00000000-0000-4000-8000-000000000001")
        .end()
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
