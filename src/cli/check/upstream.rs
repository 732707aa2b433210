//! The steps of a check from this host to KMS.

use super::report::Report;
use crate::call::{CallError, CallErrorKind, Service};
use crate::cli::probe::{ProbeResult, Prober};
use crate::cli::{run, status};
use crate::config::{Config, ENDPOINT_PORT, HostPort};
use crate::conn::tls;
use crate::http::response::Response;
use crate::identity::metadata::Metadata;
use crate::identity::{CredentialSource, CredentialState, IdentityError, environment};
use crate::kms::reply::{self, KmsError, Reply};
use crate::kms::request;
use crate::kms::sign::Credentials;
use crate::random::Random;
use std::io::Write as _;
use std::rc::Rc;

/// KMS refuses a request whose time is further off, in seconds.
const SKEW_MAX_S: u64 = 15 * 60;
/// From here on the difference is worth a word, in seconds.
const SKEW_NOTED_S: u64 = 60;

/// The steps from the metadata service to the permission.
pub(super) fn check(config: &Config, secret: Option<&str>, report: &mut Report) {
    let tls = run::client_config(config.kms.ca_file.as_deref());
    let ca_problem = tls.as_ref().err().map(ToString::to_string);
    let (Ok(tls), Ok(mut random)) = (tls.or_else(|_| tls::client_config(None)), Random::from_system()) else {
        return report.failed("TLS", "the operating system gives no random bytes");
    };
    let prober = Prober::new(tls);
    let (metadata, is_no_ecs) = ask_metadata(&prober, &config.kms.metadata_endpoint);
    let fetched = fetch_credentials(&prober, config, &mut random);
    report_metadata(config, &metadata, is_no_ecs, &fetched, report);
    report_credentials(&metadata, &fetched, &prober, report);

    let metadata_clock = metadata.as_ref().ok().map(|reply| skew(reply.date_unix_s, &prober));
    let Some(endpoint) = endpoint(config, &fetched) else {
        for step in ["DNS", "TCP", "TLS"] {
            report.skipped(
                step,
                "the address of KMS is not known: neither [KMS] Endpoint nor Region is set, and the metadata service did not \
                 name the region. Set [KMS] Region",
            );
        }
        report_clock(metadata_clock.flatten(), "the metadata service", report);
        return report.skipped("permission", "this step needs a connection to KMS");
    };
    let made_up = format!("kms-agent-check-{:016x}", random.next_u64());
    let query = TestQuery { endpoint: &endpoint, id: secret.unwrap_or(&made_up), made_up: secret.is_none() };
    let outcome = query.call(&prober, fetched.credentials.as_ref().ok(), None, &mut random);
    report_way(config, &endpoint, &outcome, ca_problem.as_deref(), report);
    let kms_clock = outcome.result.as_ref().ok().and_then(|reply| skew(reply.date_unix_s, &prober));
    match kms_clock {
        Some(_) => report_clock(kms_clock, "KMS", report),
        None => report_clock(metadata_clock.flatten(), "the metadata service", report),
    }
    if let (Err(error), true) = (&outcome.result, outcome.secured) {
        return report.failed("permission", format_args!("{error}. {}", no_reply_advice(error)));
    }
    let Ok(credentials) = &fetched.credentials else {
        return report.skipped("permission", "this step needs credentials");
    };
    let Ok(response) = outcome.result else {
        return report.skipped("permission", "this step needs a connection to KMS");
    };
    let mut reply = reply::parse(query.id, response, prober.now().unix_s);
    if let Reply::ClockSkew { server_unix_s: Some(unix_s), .. } = reply {
        // As the agent does it: once more, by KMS's own clock.
        let again = query.call(&prober, Some(credentials), Some(unix_s), &mut random);
        if let Ok(response) = again.result {
            reply = reply::parse(query.id, response, unix_s);
        }
    }
    query.report_permission(reply, fetched.name, report);
}

/// Seconds that this host is ahead of a reply's `Date`.
fn skew(date_unix_s: Option<i64>, prober: &Prober) -> Option<i64> {
    date_unix_s.map(|date| prober.now().unix_s.saturating_sub(date))
}

// ---- Credentials ----

/// The credentials as the agent would get them.
struct Fetched {
    credentials: Result<Rc<Credentials>, NoCredentials>,
    /// `the instance's RAM role`.
    name: &'static str,
    region: Option<String>,
    /// What the clock by which the credentials end shows more than ours, in seconds.
    clock_offset_s: i64,
}

/// Why there are none.
struct NoCredentials {
    why: String,
    needs_metadata: bool,
    /// The metadata service was asked, and did not give what was needed.
    metadata_failed: bool,
}

/// Runs the agent's own credential fetch to its first end.
fn fetch_credentials(prober: &Prober, config: &Config, random: &mut Random) -> Fetched {
    let mut identity = match run::identity(config, &|name| std::env::var_os(name), random) {
        Ok(identity) => identity,
        Err(error) => {
            let none =
                NoCredentials { why: error.to_string(), needs_metadata: false, metadata_failed: false };
            return Fetched { credentials: Err(none), name: "no identity", region: None, clock_offset_s: 0 };
        }
    };
    let credentials = loop {
        let now = prober.now().mono;
        match identity.credentials(now) {
            CredentialState::Ready(credentials) => break Ok(Rc::clone(credentials)),
            CredentialState::Failed { error, .. } => {
                break Err(NoCredentials {
                    why: error.to_string(),
                    needs_metadata: error.needs_metadata(),
                    metadata_failed: is_of_metadata(error),
                });
            }
            CredentialState::Pending => {}
        }
        if let Some(question) = identity.poll(now) {
            let outcome = prober.call(question.service, &question.origin, &mut |out| {
                identity.write_request(out, prober.now());
                Ok(())
            });
            identity.on_answer(outcome.result.as_ref(), prober.now());
        }
    };
    Fetched {
        credentials,
        name: identity.name(),
        region: identity.region().map(str::to_owned),
        clock_offset_s: identity.clock_offset_s(),
    }
}

/// Whether the metadata service was asked in vain.
fn is_of_metadata(error: &IdentityError) -> bool {
    match error {
        IdentityError::Service(CredentialSource::Metadata, _) | IdentityError::Region(_) => true,
        IdentityError::Everyone(errors) => errors.iter().any(|(_, error)| is_of_metadata(error)),
        IdentityError::Service(..) | IdentityError::TokenFile(..) => false,
    }
}

/// The answer to the request for a session token with which the agent's conversation with the service begins (any
/// answer shows that it is there), and whether what answers is no metadata service: one may be older than session
/// tokens and answer 404, but not to the plain request for the region as well, which every instance has.
fn ask_metadata(prober: &Prober, origin: &HostPort) -> (Result<Response, CallError>, bool) {
    let mut metadata = Metadata::new(origin.clone(), false);
    let ask = |metadata: &Metadata| {
        let write = &mut |out: &mut Vec<u8>| {
            metadata.write_region_request(out);
            Ok(())
        };
        prober.call(Service::Metadata, origin, write).result
    };
    let answer = ask(&metadata);
    let is_not_found = |answer: &Result<Response, CallError>| matches!(answer, Ok(it) if it.status == 404);
    let is_no_ecs = is_not_found(&answer)
        && metadata.on_region_answer(answer.as_ref(), prober.now().mono).is_ok()
        && is_not_found(&ask(&metadata));
    (answer, is_no_ecs)
}

fn report_metadata(
    config: &Config,
    answer: &Result<Response, CallError>,
    is_no_ecs: bool,
    fetched: &Fetched,
    report: &mut Report,
) {
    const STEP: &str = "metadata";
    let origin = &config.kms.metadata_endpoint;
    let what = match answer {
        Ok(reply) if reply.status == 200 => {
            return report.ok(STEP, format_args!("{origin} answers and gives session tokens"));
        }
        Ok(_) if is_no_ecs => format!("{origin} answers 404 to everything, so it is no metadata service"),
        Ok(reply) if reply.status < 500 => {
            return report.ok(
                STEP,
                format_args!("{origin} answers ({} to a request for a session token)", reply.status),
            );
        }
        Ok(reply) => format!("{origin} answers {}", reply.status),
        Err(error) => error.to_string(),
    };
    let is_needed = fetched
        .credentials
        .as_ref()
        .is_err_and(|none| none.needs_metadata || is_no_ecs && none.metadata_failed);
    if !is_needed && endpoint(config, fetched).is_some() {
        return report.ok(STEP, format_args!("this configuration does not need it ({what})"));
    }
    if is_no_ecs {
        return report.failed(
            STEP,
            format_args!("{what}. On an ECS instance, correct [KMS] MetadataEndpoint; on another host, use another identity (see \
                 [KMS] AuthType)"),
        );
    }
    report.failed(
        STEP,
        format_args!(
            "{what}. The metadata service exists on ECS instances only. On such an instance, check the firewall and \
             the routes to it, and the instance's metadata access in the ECS console; on another host, set [KMS] \
             Region and use another identity (see [KMS] AuthType)"
        ),
    );
}

fn report_credentials(
    metadata: &Result<Response, CallError>,
    fetched: &Fetched,
    prober: &Prober,
    report: &mut Report,
) {
    const STEP: &str = "credentials";
    match &fetched.credentials {
        Ok(credentials) => match credentials.expires_unix_s {
            Some(end) => {
                let left_s = end.saturating_sub(prober.now().unix_s).saturating_sub(fetched.clock_offset_s);
                let left = status::duration(u64::try_from(left_s).unwrap_or(0));
                report.ok(
                    STEP,
                    format_args!("{} gave credentials that are valid for another {left}", fetched.name),
                );
            }
            None => report.ok(STEP, format_args!("{} does not expire", fetched.name)),
        },
        Err(none) if none.needs_metadata && metadata.is_err() => {
            report.skipped(STEP, "this step needs the metadata service");
        }
        Err(none) => report.failed(STEP, &none.why),
    }
}

// ---- The way to KMS ----

fn endpoint(config: &Config, fetched: &Fetched) -> Option<HostPort> {
    config.kms.endpoint().or_else(|| fetched.region.as_deref().map(HostPort::kms_in))
}

fn report_way(
    config: &Config,
    endpoint: &HostPort,
    outcome: &ProbeResult,
    ca_problem: Option<&str>,
    report: &mut Report,
) {
    let why = outcome.result.as_ref().err().map(ToString::to_string).unwrap_or_default();
    if outcome.addresses.is_empty() {
        report.failed(
            "DNS",
            format_args!("{why}. Check [KMS] Endpoint and Region, and the name servers in /etc/resolv.conf"),
        );
        report.skipped("TCP", "this step needs an address");
    } else {
        let addresses: Vec<String> = outcome.addresses.iter().map(|it| it.ip().to_string()).collect();
        match addresses.join(", ") {
            itself if itself == endpoint.host => {
                report.ok("DNS", format_args!("{itself} is an address already"))
            }
            addresses => report.ok("DNS", format_args!("{}: {addresses}", endpoint.host)),
        }
        match outcome.connected {
            Some(address) => report.ok("TCP", address),
            None => report.failed(
                "TCP",
                format_args!(
                    "{why}. Open TCP port {} to it (security group, routes, firewall); a kms-vpc endpoint can be reached \
                     only from VPCs of its own region",
                    endpoint.port
                ),
            ),
        }
    }
    match (ca_problem, outcome.connected) {
        (Some(problem), _) => {
            report.failed("TLS", format_args!("{problem}. The agent does not start until this is corrected"))
        }
        (None, None) => report.skipped("TLS", "this step needs a TCP connection"),
        (None, Some(_)) if outcome.secured => report.ok("TLS", "the certificate verifies"),
        (None, Some(_)) => {
            let advice = match &config.kms.ca_file {
                Some(file) => format!(
                    "Check that [KMS] CaFile {} has the CA of this endpoint (the KMS console has an instance's CA). A proxy that \
                     intercepts TLS, or a wrong clock of this host, can also be the cause",
                    file.display()
                ),
                None => {
                    "A proxy that intercepts TLS, or a wrong clock of this host, can be the cause".to_owned()
                }
            };
            report.failed("TLS", format_args!("{why}. {advice}"));
        }
    }
}

/// What to check where something else than KMS may have answered.
const NOT_KMS: &str = "Check that [KMS] Endpoint is KMS, and that no proxy or gateway answers in its place";

/// What to do where the connection to KMS works and brings no usable reply.
const fn no_reply_advice(error: &CallError) -> &'static str {
    match error.kind {
        CallErrorKind::Timeout => "The connection works, but KMS is slow or overloaded. Try again later",
        CallErrorKind::Unreachable | CallErrorKind::InvalidResponse => NOT_KMS,
    }
}

fn report_clock(ahead_s: Option<i64>, of: &str, report: &mut Report) {
    const STEP: &str = "clock";
    let Some(ahead_s) = ahead_s else {
        return report.skipped(STEP, "this step needs a reply with a date, and no service gave one");
    };
    let off = ahead_s.unsigned_abs();
    let side = if ahead_s < 0 { "behind" } else { "ahead of" };
    if off > SKEW_MAX_S {
        report.failed(
            STEP,
            format_args!(
                "this host's clock is {} min {side} that of {of}, and KMS refuses more than 15 min. Switch on chrony: \
                 systemctl enable --now chronyd",
                off / 60
            ),
        );
    } else if off > SKEW_NOTED_S {
        report.ok(STEP, format_args!(
                "this host's clock is {off} s {side} that of {of}; correct it, since KMS refuses more than 15 min"
            ));
    } else {
        report.ok(STEP, format_args!("this host's clock agrees with that of {of} to {off} s"));
    }
}

// ---- What KMS says ----

/// The question to KMS.
struct TestQuery<'a> {
    endpoint: &'a HostPort,
    id: &'a str,
    /// There is no such secret.
    made_up: bool,
}

impl TestQuery<'_> {
    /// Signed at `unix_s`, or now; without credentials not signed at all, for the sake of the way there.
    fn call(
        &self,
        prober: &Prober,
        credentials: Option<&Rc<Credentials>>,
        unix_s: Option<i64>,
        random: &mut Random,
    ) -> ProbeResult {
        let host = self.endpoint.authority(ENDPOINT_PORT);
        let mut write = |out: &mut Vec<u8>| {
            let Some(credentials) = credentials else {
                let _ = write!(out, "GET / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n");
                return Ok(());
            };
            let unix_s = unix_s.unwrap_or(prober.now().unix_s);
            let nonce = random.next_u128().to_ne_bytes();
            request::get_secret_value(out, &host, self.id, None, None, credentials, unix_s, &nonce)
                .map_err(|error| CallError::unreachable("sign a request for", self.endpoint, error))
        };
        prober.call(Service::Kms, self.endpoint, &mut write)
    }

    fn report_permission(&self, reply: Reply, name: &str, report: &mut Report) {
        const STEP: &str = "permission";
        let id = self.id;
        match reply {
            Reply::Value(_) => report.ok(STEP, format_args!("kms:GetSecretValue of {id} is allowed")),
            Reply::Refused(error) if error.code == "Forbidden.ResourceNotFound" && self.made_up => report.ok(
                STEP,
                "KMS accepts the credentials. It was asked for a name that does not exist; --secret ID checks a certain secret",
            ),
            Reply::Refused(error) => report.failed(STEP, format_args!("{error}. {}", self.advice(&error))),
            Reply::CredentialsRefused(error) => {
                // Nobody renews these.
                let advice = if name == environment::NAME {
                    "; replace the access key in the environment and restart the agent"
                } else {
                    ""
                };
                report.failed(
                    STEP,
                    format_args!(
                        "KMS does not know these credentials: {error}. They have expired or were revoked{advice}"
                    ),
                );
            }
            Reply::SignatureRefused(error) => report.failed(
                STEP,
                format_args!("KMS does not accept the signature: {error}. Check the secret of the access key"),
            ),
            Reply::ClockSkew { error, .. } => {
                report.failed(STEP, format_args!("{error}. Correct this host's clock"));
            }
            Reply::Throttled { error, .. } => report.failed(
                STEP,
                format_args!("{error}. The account's limit of calls a second is reached. A larger [Cache] TTLSeconds makes fewer calls"),
            ),
            Reply::Transient { error, .. } => report.failed(STEP, format_args!("{error}. KMS is failing. Try again later")),
            Reply::Invalid(what) => report.failed(STEP, format_args!("{what}. {NOT_KMS}")),
        }
    }

    fn advice(&self, error: &KmsError) -> String {
        let id = self.id;
        match error.code.as_str() {
            "Forbidden.NoPermission" if self.made_up => "Grant the agent's role kms:GetSecretValue (and kms:Decrypt for \
                the secret's key). If its policy names single secrets, this is to be expected: check one of them \
                with --secret ID"
                .to_owned(),
            "Forbidden.NoPermission" => format!(
                "Grant the agent's role kms:GetSecretValue on {id}, and kms:Decrypt for the key that it is encrypted with"
            ),
            "Forbidden.ResourceNotFound" => {
                format!("There is no secret {id} in this region: check its name, and [KMS] Region and Endpoint")
            }
            "Forbidden.KeyNotFound" => "The key that the secret is encrypted with does not exist any more".to_owned(),
            _ => "KMS refuses this secret; the KMS console shows its state".to_owned(),
        }
    }
}
