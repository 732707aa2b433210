//! KMS: a connection from accept to close, a request from arrival to reply. STS shares the port and all of
//! this; what is its own is in [`crate::sts`].

pub(crate) mod aap;
pub(crate) mod actions;
pub(crate) mod error;
pub(crate) mod secrets;
pub mod signature;

use crate::counters::{RequestRecord, Service};
use crate::faults::{FaultKind, KmsMode, RawReply};
use crate::http::{self, Outcome, Received, Reply, Stream, TakeOver};
use crate::json::Object;
use crate::state::{Shared, State};
use crate::tls::Certificates;
use crate::{clock, race, random, rsa_key, sts};
use actions::Params;
use error::KmsError;
use signature::SignedRequest;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::HandshakeKind;

/// The version of the API that every call of KMS must name.
const API_VERSION: &str = "2016-01-20";

/// Counts a connection as open while it lives.
struct OpenConnection(Arc<Shared>);

impl OpenConnection {
    fn new(shared: &Arc<Shared>) -> OpenConnection {
        let counters = &mut shared.lock().counters;
        counters.kms_open += 1;
        counters.kms_open_max = counters.kms_open_max.max(counters.kms_open);
        OpenConnection(Arc::clone(shared))
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.lock().counters.kms_open -= 1;
    }
}

/// One connection, until it ends or all are ended.
pub(crate) async fn connection(shared: Arc<Shared>, certificates: Arc<Certificates>, tcp: TcpStream) {
    let mut end = shared.end_kms.subscribe();
    let (number, mode) = {
        let mut state = shared.lock();
        state.counters.kms_accepted += 1;
        (state.next_connection(), state.take_kms_mode())
    };
    let open = OpenConnection::new(&shared);
    // Small replies must not wait for the client's delayed acknowledgement.
    let _ = tcp.set_nodelay(true);
    let _ = race(end.changed(), serve(shared, certificates, tcp, number, mode)).await;
    drop(open);
}

async fn serve(
    shared: Arc<Shared>,
    certificates: Arc<Certificates>,
    mut tcp: TcpStream,
    number: u64,
    mode: KmsMode,
) {
    let bad = match mode {
        KmsMode::Refuse | KmsMode::Close => return,
        KmsMode::StallHandshake => {
            // Reads on, so that it notices when the client gives up.
            let mut scratch = [0; 1024];
            while tcp.read(&mut scratch).await.is_ok_and(|count| count > 0) {}
            return;
        }
        KmsMode::Certificate(bad) => Some(bad),
        KmsMode::Normal | KmsMode::StallReply => None,
    };
    let accepted = TlsAcceptor::from(certificates.config(bad)).accept(tcp).await;
    let Ok(tls) = accepted else {
        shared.lock().counters.tls_failed += 1;
        return;
    };
    {
        let mut state = shared.lock();
        state.counters.tls_handshakes += 1;
        state.counters.tls_resumed +=
            u64::from(tls.get_ref().1.handshake_kind() == Some(HandshakeKind::Resumed));
    }
    let handler = move |received| -> http::OutcomeFuture {
        Box::pin(answer(Arc::clone(&shared), number, mode == KmsMode::StallReply, received))
    };
    http::serve(Stream::Tls(Box::new(tls)), handler).await;
}

/// A request as the log sees it, with what was decided about it so far.
struct Call {
    shared: Arc<Shared>,
    log_id: u64,
    service: Service,
    host: String,
    action: String,
    params: Params,
}

async fn answer(shared: Arc<Shared>, connection: u64, stall: bool, received: Received) -> Outcome {
    let mut pairs = signature::decode_pairs(&received.query);
    if received.header("content-type").is_some_and(|t| t.starts_with("application/x-www-form-urlencoded")) {
        pairs.extend(signature::decode_pairs(&String::from_utf8_lossy(&received.body)));
    }
    let params = Params::collect(pairs);
    let action = received.header("x-acs-action").or(params.get("Action")).unwrap_or_default().to_owned();
    let host = received.header("host").unwrap_or_default().to_owned();
    let service = if sts::is_asked(&host, &action) { Service::Sts } else { Service::Kms };
    let (log_id, latency) = arrived(&shared, service, connection, &received, &action, &params);
    let call = Call { shared, log_id, service, host, action, params };

    if stall {
        std::future::pending::<()>().await;
    }
    pause(latency).await;
    let verdict = match call.admit(&received) {
        Ok(verdict) => verdict,
        Err(reply) => return call.finish(reply),
    };
    pause(verdict.delay).await;
    let Some(fate) = verdict.fate else {
        let reply = call.perform().await;
        return call.finish(reply);
    };
    call.suffer(fate).await
}

async fn pause(duration: Duration) {
    if !duration.is_zero() {
        tokio::time::sleep(duration).await;
    }
}

/// Counts and logs a request; gives its log id and the latency to simulate.
fn arrived(
    shared: &Shared,
    service: Service,
    connection: u64,
    received: &Received,
    action: &str,
    params: &Params,
) -> (u64, Duration) {
    let secret = params.get("SecretName").map(str::to_owned);
    let mut state = shared.lock();
    let counters = &mut state.counters;
    match service {
        Service::Sts => counters.sts_requests += 1,
        _ => counters.kms_requests += 1,
    }
    *counters.by_action.entry(action.to_owned()).or_default() += 1;
    if let Some(secret) = &secret {
        *counters.by_secret.entry((action.to_owned(), secret.clone())).or_default() += 1;
    }
    let claimed = received.header("authorization").and_then(signature::claimed_access_key_id);
    let log_id = state.log.push(RequestRecord {
        service,
        arrived: Instant::now(),
        answered: None,
        connection,
        action: action.to_owned(),
        secret,
        access_key_id: claimed.map(str::to_owned),
        status: None,
        code: None,
    });
    (log_id, state.latency)
}

impl Call {
    /// Signature, then rate limit, then what the injected faults say.
    fn admit(&self, received: &Received) -> Result<crate::faults::Verdict, Reply> {
        let mut guard = self.shared.lock();
        let state = &mut *guard;
        if let Err(error) = self.authenticate(state, received) {
            state.counters.signature_failures += 1;
            return Err(self.refusal(&error));
        }
        if received.path != "/" || !matches!(received.method.as_str(), "POST" | "GET") {
            let error = KmsError::new(404, "InvalidAction.NotFound", "Specified api is not found.");
            return Err(self.refusal(&error));
        }
        if self.service == Service::Kms && received.header("x-acs-version") != Some(API_VERSION) {
            return Err(self.refusal(&KmsError::invalid("Version")));
        }
        if let Some(limiter) = &mut state.limiter
            && !limiter.admit()
        {
            let throttle = limiter.throttle;
            state.counters.throttled += 1;
            let mut reply = self.refusal(&KmsError::new(429, "Rejected.Throttling", "QPS Limit Exceeded"));
            if let Some(seconds) = throttle.retry_after_s {
                reply = reply.with_header("retry-after", &seconds.to_string());
            }
            if let Some(ms) = throttle.acs_retry_after_ms {
                reply = reply.with_header("x-acs-retry-after", &ms.to_string());
            }
            return Err(reply);
        }
        let verdict = state.faults.take(&self.action, self.params.get("SecretName"));
        for name in &verdict.hit {
            *state.counters.faults.entry(name).or_default() += 1;
        }
        Ok(verdict)
    }

    /// The signature; for an action that has none, what stands in its place.
    fn authenticate(&self, state: &mut State, received: &Received) -> Result<(), KmsError> {
        if self.service == Service::Sts {
            return sts::admit(state, &self.params);
        }
        if self.action == aap::ACTION {
            signature::check_date(received.header("x-acs-date"), state.clock.server())?;
            let nonce = received.header("x-acs-signature-nonce").filter(|it| !it.is_empty());
            let nonce = nonce.ok_or_else(|| KmsError::missing("x-acs-signature-nonce"))?;
            return match state.nonces.fresh("", nonce) {
                true => Ok(()),
                false => Err(signature::Refusal::NonceUsed.into()),
            };
        }
        let request = SignedRequest {
            method: &received.method,
            path: &received.path,
            query: &received.query,
            headers: &received.headers,
            body: &received.body,
        };
        let life = state.clock.life();
        let credentials = &state.credentials;
        let who = signature::verify(&request, state.clock.server(), |id, token| {
            credentials.secret(id, token, life)
        })?;
        match state.nonces.fresh(&who.access_key_id, &who.nonce) {
            true => Ok(()),
            false => Err(signature::Refusal::NonceUsed.into()),
        }
    }

    /// What KMS or STS itself says.
    async fn perform(&self) -> Reply {
        let wants_key_pair = {
            let mut state = self.shared.lock();
            state.tick();
            actions::wants_key_pair(&state.store, &self.action, &self.params)
        };
        let key_pair =
            if wants_key_pair { tokio::task::spawn_blocking(rsa_key::generate).await.ok() } else { None };
        let mut state = self.shared.lock();
        let now = state.tick();
        let result = match (self.service, self.action.as_str()) {
            (Service::Sts, action) => sts::run(&mut state, action, &self.params).map(Object::end),
            (_, aap::ACTION) => aap::assume(&mut state, &self.params).map(Object::end),
            (_, action) => actions::run(&mut state.store, action, &self.params, key_pair, now),
        };
        drop(state);
        match result {
            Ok(json) => Reply::new(200, JSON, json),
            Err(error) => self.refusal(&error),
        }
    }

    async fn suffer(self, fate: FaultKind) -> Outcome {
        let plan = match fate {
            FaultKind::Error { status, code, message, headers } => {
                let reply = self.refusal(&KmsError { status, code, message });
                return self.finish(headers.iter().fold(reply, |reply, (n, v)| reply.with_header(n, v)));
            }
            FaultKind::Reply(raw) => {
                let reply = self.dated(self.perform().await);
                let (bytes, goes_on) = reply.render(&raw);
                self.log(Some(raw.status.unwrap_or(reply.status)), None);
                return Outcome::TakeOver(match goes_on {
                    true => TakeOver::Write(bytes),
                    false => TakeOver::WriteAndEnd(bytes),
                });
            }
            FaultKind::Bytes(bytes) => TakeOver::WriteAndEnd(bytes),
            FaultKind::DropBefore => TakeOver::WriteAndCut(Vec::new()),
            FaultKind::Reset => TakeOver::Reset,
            FaultKind::DropAmid => {
                let (mut bytes, body) = self.genuine().await;
                bytes.truncate(bytes.len() - body / 2 - body % 2);
                TakeOver::WriteAndCut(bytes)
            }
            FaultKind::DropAfter => TakeOver::WriteAndCut(self.genuine().await.0),
            FaultKind::HalfRecord => TakeOver::HalfRecord(self.genuine().await.0),
            FaultKind::Stall => std::future::pending().await,
            // Delays were served before; `Verdict` never hands one out as a fate.
            FaultKind::Delay(_) => return self.finish(self.perform().await),
        };
        self.log(None, None);
        Outcome::TakeOver(plan)
    }

    /// The genuine reply as bytes, and how many of them are its body.
    async fn genuine(&self) -> (Vec<u8>, usize) {
        let reply = self.dated(self.perform().await);
        (reply.render(&RawReply::default()).0, reply.body.len())
    }

    /// An error in the shape of the service that was asked.
    fn refusal(&self, error: &KmsError) -> Reply {
        let json = match self.service {
            Service::Sts => sts::error_json(error, &self.host),
            _ => Object::default()
                .number("HttpStatus", u64::from(error.status))
                .text("Code", &error.code)
                .text("Message", &error.message)
                .text("RequestId", &random::uuid())
                .end(),
        };
        Reply::new(error.status, JSON, json)
    }

    fn dated(&self, reply: Reply) -> Reply {
        let now = self.shared.lock().clock.server();
        reply.with_header("date", &clock::http_date(now))
    }

    fn log(&self, status: Option<u16>, code: Option<&str>) {
        self.shared.lock().log.answered(self.log_id, status, code);
    }

    fn finish(&self, reply: Reply) -> Outcome {
        let body = serde_json::from_slice::<serde_json::Value>(&reply.body).ok();
        let code = body.as_ref().and_then(|b| b.get("Code")).and_then(|c| c.as_str());
        self.log(Some(reply.status), code);
        Outcome::Reply(self.dated(reply))
    }
}

const JSON: &str = "application/json;charset=utf-8";
