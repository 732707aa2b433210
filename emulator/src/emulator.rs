//! [`Emulator`]: starting, stopping, and every knob.

use crate::clock::Clock;
use crate::counters::{Counters, RequestLog, RequestRecord};
use crate::credentials::{Credentials, ExpiredTokenReply, StsCredentials};
use crate::door::{Door, DoorCommand};
use crate::faults::{
    CredentialsUriFault, Fault, FaultId, FaultKind, Faults, IdentityFault, KmsMode, MetadataFault,
    MetadataMode, Throttle,
};
use crate::identity::Identities;
use crate::kms::error::KmsError;
use crate::kms::secrets::{NewSecret, Secret, Store};
use crate::state::{Guard, Limiter, Nonces, Shared, State};
use crate::sts::Oidc;
use crate::tls::Certificates;
use crate::{kms, metadata, random, rsa_key};
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// How an emulator starts. Everything but ports, region and account can be changed later.
#[derive(Debug, Clone)]
pub struct Options {
    /// Address that KMS and STS listen on.
    pub kms_address: IpAddr,
    /// Port of KMS and STS; 0: any free one.
    pub kms_port: u16,
    /// Address that the metadata service listens on.
    pub metadata_address: IpAddr,
    /// Port of the metadata service; 0: any free one.
    pub metadata_port: u16,
    /// Region id: in ARNs, in the metadata and in the certificate's names.
    pub region: String,
    /// Account id in ARNs and in the metadata.
    pub account: String,
    /// Role attached to the instance; `None`: the metadata service knows no role (404).
    pub role: Option<String>,
    /// Names of application access points that trust this instance.
    pub aaps: Vec<String>,
    /// Name of the RAM role that an OIDC token may assume.
    pub oidc_role: String,
    /// Name of the OIDC provider that this role trusts.
    pub oidc_provider: String,
    /// The OIDC token that STS accepts; `None`: none is.
    pub oidc_token: Option<String>,
    /// Whether the metadata service insists on session tokens.
    pub metadata_mode: MetadataMode,
    /// How the metadata service fails from the start.
    pub metadata_fault: Option<MetadataFault>,
    /// Secrets that exist from the start. Names are not held to KMS's rules here.
    pub secrets: Vec<NewSecret>,
    /// Long-term access keys: id and secret.
    pub access_keys: Vec<(String, String)>,
    /// Life of STS credentials, in seconds. The real service gives 6 hours.
    pub credentials_lifetime_s: i64,
    /// Seconds that the emulator's clock is ahead of this host's (behind, if negative).
    pub clock_offset_s: i64,
    /// Pause before KMS works on a request.
    pub latency: Duration,
    /// Rate limit of KMS.
    pub throttle: Option<Throttle>,
}

impl Default for Options {
    /// Free ports on 127.0.0.1, `cn-hangzhou`, the role `EcsRamRoleKms`, the application access point
    /// `kms-agent`, the OIDC token `emulator-oidc-token`, no secrets, nothing failing.
    fn default() -> Options {
        Options {
            kms_address: Ipv4Addr::LOCALHOST.into(),
            kms_port: 0,
            metadata_address: Ipv4Addr::LOCALHOST.into(),
            metadata_port: 0,
            region: "cn-hangzhou".to_owned(),
            account: "1234567890123456".to_owned(),
            role: Some("EcsRamRoleKms".to_owned()),
            aaps: vec!["kms-agent".to_owned()],
            oidc_role: "KmsAgentOidcRole".to_owned(),
            oidc_provider: "ack-rrsa-emulator".to_owned(),
            oidc_token: Some("emulator-oidc-token".to_owned()),
            metadata_mode: MetadataMode::Normal,
            metadata_fault: None,
            secrets: Vec::new(),
            access_keys: Vec::new(),
            credentials_lifetime_s: 6 * 3600,
            clock_offset_s: 0,
            latency: Duration::ZERO,
            throttle: None,
        }
    }
}

/// A running emulator. Dropping it closes both services and ends its thread.
pub struct Emulator {
    shared: Arc<Shared>,
    kms_addr: SocketAddr,
    metadata_addr: SocketAddr,
    ca_pem: String,
    identity_ca_pem: String,
    kms_door: mpsc::UnboundedSender<DoorCommand>,
    metadata_door: mpsc::UnboundedSender<DoorCommand>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Emulator {
    /// Starts both services; they listen when this returns.
    ///
    /// # Errors
    /// A port that is taken, a secret that KMS would refuse (two of one name, data too large), a region that
    /// is no host name.
    pub fn start(options: Options) -> io::Result<Emulator> {
        let certificates = Certificates::generate(&options.region, options.kms_address)?;
        let ca_pem = certificates.ca_pem.clone();
        let kms_addr = SocketAddr::from((options.kms_address, options.kms_port));
        let metadata_addr = SocketAddr::from((options.metadata_address, options.metadata_port));
        let refuse_metadata = options.metadata_fault == Some(MetadataFault::Refuse);
        let identities = Identities::generate()?;
        let identity_ca_pem = identities.ca_pem().to_owned();
        let shared = Arc::new(Shared::new(initial_state(options, identities).map_err(io::Error::other)?));
        let (kms_door, kms_commands) = mpsc::unbounded_channel();
        let (metadata_door, metadata_commands) = mpsc::unbounded_channel();
        let (stop, stopped) = oneshot::channel();
        let (ready, started) = std::sync::mpsc::sync_channel(1);

        let services = Services {
            shared: Arc::clone(&shared),
            certificates: Arc::new(certificates),
            kms_commands,
            metadata_commands,
        };
        let thread = std::thread::Builder::new().name("kms-emulator".to_owned()).spawn(move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => {
                    let _ = ready.send(Err(error));
                    return;
                }
            };
            runtime.block_on(async {
                let doors = Door::open("KMS", kms_addr)
                    .and_then(|kms| Ok((kms, Door::open("the metadata service", metadata_addr)?)));
                match doors {
                    Ok((kms, metadata)) => {
                        let _ = ready.send(Ok((kms.addr(), metadata.addr())));
                        services.spawn(kms, metadata);
                        // An error means that the emulator is gone, which is as good a reason to stop.
                        let _ = stopped.await;
                    }
                    Err(error) => {
                        let _ = ready.send(Err(error));
                    }
                }
            });
            // A key pair may be in the making on a helper thread; nobody waits for it any more.
            runtime.shutdown_background();
        })?;
        let started = started.recv().unwrap_or_else(|_| Err(io::Error::other("the emulator's thread ended")));
        let (kms_addr, metadata_addr) = started?;
        let (stop, thread) = (Some(stop), Some(thread));
        let emulator = Emulator {
            shared,
            kms_addr,
            metadata_addr,
            ca_pem,
            identity_ca_pem,
            kms_door,
            metadata_door,
            stop,
            thread,
        };
        if refuse_metadata {
            set_door(&emulator.metadata_door, false)?;
        }
        Ok(emulator)
    }

    /// Where KMS and STS listen, TLS.
    pub fn kms_addr(&self) -> SocketAddr {
        self.kms_addr
    }

    /// Port of KMS.
    pub fn kms_port(&self) -> u16 {
        self.kms_addr.port()
    }

    /// Where the metadata service listens.
    pub fn metadata_addr(&self) -> SocketAddr {
        self.metadata_addr
    }

    /// `http://<address>:<port>`, for the agent's `MetadataEndpoint`.
    pub fn metadata_url(&self) -> String {
        format!("http://{}", self.metadata_addr)
    }

    /// PEM of the CA that issued the server certificate, for the agent's `CaFile`. The certificate holds for
    /// 127.0.0.1, ::1, localhost, the address KMS listens on, `kms[-vpc].<region>.aliyuncs.com`,
    /// `*.cryptoservice.kms.aliyuncs.com`, `sts.aliyuncs.com` and `sts[-vpc].<region>.aliyuncs.com`.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// PEM of the other CA: the one that issued the certificate which signs instance identities.
    pub fn identity_ca_pem(&self) -> &str {
        &self.identity_ca_pem
    }

    // Watching.

    /// A snapshot of the counters.
    pub fn counters(&self) -> Counters {
        self.shared.lock().counters.clone()
    }

    /// Waits until the counters meet a condition; false when `timeout` came first.
    pub fn wait_for(&self, timeout: Duration, met: impl Fn(&Counters) -> bool) -> bool {
        self.shared.wait_for(timeout, met)
    }

    /// The last requests of all services, oldest first, at most [`RECORDS_MAX`](crate::RECORDS_MAX).
    pub fn requests(&self) -> Vec<RequestRecord> {
        self.shared.lock().log.snapshot()
    }

    /// Sets all counters to zero and empties the log. What is open stays counted as open.
    pub fn reset_counters(&self) {
        let mut state = self.shared.lock();
        let kms_open = state.counters.kms_open;
        state.counters = Counters { kms_open, kms_open_max: kms_open, ..Counters::default() };
        state.log.clear();
    }

    // Secrets.

    /// Gives a secret a new current value, whatever its type, and creates a Generic one if there is none.
    /// Takes back a planned deletion. Gives the version id.
    pub fn put_secret(&self, name: &str, data: &str) -> String {
        let mut state = self.shared.lock();
        let now = state.tick();
        state.store.force_put(name, data, now)
    }

    /// Creates a secret; gives the version id.
    ///
    /// # Errors
    /// Those of CreateSecret, except that names are not held to KMS's rules.
    pub fn create_secret(&self, new: NewSecret) -> Result<String, KmsError> {
        let mut state = self.shared.lock();
        let now = state.tick();
        let secret = state.store.create(new, now)?;
        Ok(secret.versions.last().map(|v| v.id.clone()).unwrap_or_default())
    }

    /// PutSecretValue with stages of choice (`["ACSCurrent"]` is KMS's default); gives the version id.
    ///
    /// # Errors
    /// Those of PutSecretValue.
    pub fn put_secret_value(&self, name: &str, data: &str, stages: &[&str]) -> Result<String, KmsError> {
        let mut state = self.shared.lock();
        let now = state.tick();
        let version = state.store.put(name, &random::hex(32), data, false, stages, now)?;
        Ok(version.id.clone())
    }

    /// The secret of this name or ARN, also when it is planned for deletion.
    pub fn secret(&self, name: &str) -> Option<Secret> {
        let mut state = self.shared.lock();
        state.tick();
        state.store.get(name).ok().cloned()
    }

    /// The value that GetSecretValue gives for ACSCurrent.
    pub fn current_value(&self, name: &str) -> Option<String> {
        self.secret(name)?.at_stage(crate::kms::secrets::CURRENT).map(|v| v.data.clone())
    }

    /// The secret's ARN.
    pub fn arn(&self, name: &str) -> String {
        self.shared.lock().store.arn(name)
    }

    /// Rotates at once: to `custom` (for an ECS password the password alone will do), or to a generated
    /// value: a password of 32 characters or an RSA-2048 key pair. Works on Generic secrets too. Gives the
    /// version id.
    ///
    /// # Errors
    /// Those of RotateSecret.
    pub fn rotate_secret(&self, name: &str, custom: Option<&str>) -> Result<String, KmsError> {
        let wants_key_pair = custom.is_none() && self.shared.lock().store.needs_key_pair(name);
        // Outside the lock: this takes seconds without optimisation.
        let key_pair = wants_key_pair.then(rsa_key::generate);
        let version_id = random::hex(32);
        let mut state = self.shared.lock();
        let now = state.tick();
        state.store.rotate(name, &version_id, custom, key_pair, now)?;
        Ok(version_id)
    }

    /// Rotates by schedule every `interval_s` seconds (1 to 365 days, below KMS's 6 hours too), or no more.
    /// The first rotation is one interval from now.
    ///
    /// # Errors
    /// No such secret, planned for deletion, interval out of range.
    pub fn set_rotation(&self, name: &str, interval_s: Option<i64>) -> Result<(), KmsError> {
        let mut state = self.shared.lock();
        let now = state.tick();
        state.store.set_rotation(name, interval_s, now)
    }

    /// Moves a stage of a Generic secret between versions, as UpdateSecretVersionStage.
    ///
    /// # Errors
    /// Those of UpdateSecretVersionStage.
    pub fn update_version_stage(
        &self,
        name: &str,
        stage: &str,
        remove_from: Option<&str>,
        move_to: Option<&str>,
    ) -> Result<(), KmsError> {
        let mut state = self.shared.lock();
        let now = state.tick();
        state.store.update_stage(name, stage, remove_from, move_to, now)
    }

    /// Plans deletion in 7 to 30 days, or deletes at once (`None`).
    ///
    /// # Errors
    /// Those of DeleteSecret.
    pub fn delete_secret(&self, name: &str, window_days: Option<i64>) -> Result<(), KmsError> {
        let mut state = self.shared.lock();
        let now = state.tick();
        match window_days {
            Some(days) => state.store.delete_later(name, days, now).map(drop),
            None => state.store.delete_now(name),
        }
    }

    /// Takes a planned deletion back.
    ///
    /// # Errors
    /// No such secret, or not planned for deletion.
    pub fn restore_secret(&self, name: &str) -> Result<(), KmsError> {
        let mut state = self.shared.lock();
        let now = state.tick();
        state.store.restore(name, now)
    }

    // Time.

    /// Sets how many seconds the emulator's clock is ahead of this host's. It shows in the `Date` header, in
    /// the check of timestamps, and in every date.
    pub fn set_clock_offset(&self, seconds: i64) {
        self.shared.lock().clock.offset_s = seconds;
    }

    /// Lets `seconds` pass for everything that has a life: scheduled rotation, recovery windows, STS
    /// credentials, session tokens. The `Date` header and the check of timestamps do not move, so that
    /// requests signed by a client's real clock are still accepted.
    pub fn advance_clock(&self, seconds: i64) {
        let mut state = self.shared.lock();
        state.clock.advanced_s = state.clock.advanced_s.saturating_add(seconds);
        state.tick();
    }

    /// The time that secrets and credentials go by, in Unix seconds.
    pub fn now(&self) -> i64 {
        self.shared.lock().clock.life()
    }

    // KMS going wrong.

    /// Pause before KMS works on any request.
    pub fn set_latency(&self, latency: Duration) {
        self.shared.lock().latency = latency;
    }

    /// Sets or lifts the rate limit. The first second's worth is there at once.
    pub fn set_throttle(&self, throttle: Option<Throttle>) {
        self.shared.lock().limiter = throttle.map(Limiter::new);
    }

    /// Puts a fault in force. Faults apply in the order they were injected, to requests whose signature is good.
    pub fn inject(&self, fault: Fault) -> FaultId {
        self.shared.lock().faults.inject(fault)
    }

    /// Shorthand: requests for `name` get this body under this status until cleared.
    pub fn raw_reply(&self, name: &str, status: u16, body: impl Into<Vec<u8>>) -> FaultId {
        self.inject(Fault::reply(status, body).for_secret(name))
    }

    /// Shorthand: requests for `name` fail with this KMS error until cleared.
    pub fn fail_secret(&self, name: &str, status: u16, code: &str) -> FaultId {
        self.inject(Fault::error(status, code).for_secret(name))
    }

    /// Shorthand: requests for `name` take this long until cleared.
    pub fn delay_secret(&self, name: &str, pause: Duration) -> FaultId {
        self.inject(Fault::new(FaultKind::Delay(pause)).for_secret(name))
    }

    /// Lifts one fault.
    pub fn clear_fault(&self, id: FaultId) {
        self.shared.lock().faults.clear(id);
    }

    /// Lifts the faults that were injected for this secret.
    pub fn clear_faults_for(&self, name: &str) {
        self.shared.lock().faults.clear_for(name);
    }

    /// Lifts all faults (not the modes, the latency or the rate limit).
    pub fn clear_faults(&self) {
        self.shared.lock().faults.clear_all();
    }

    /// How many requests a fault hit, also after it was lifted or used up.
    pub fn fault_hits(&self, id: FaultId) -> u64 {
        self.shared.lock().faults.hits(id)
    }

    /// How the KMS port treats connections from now on. Any mode but Normal ends the open ones, which would
    /// not see it otherwise. In force when this returns.
    ///
    /// # Errors
    /// The port could not be opened again.
    pub fn set_kms_mode(&self, mode: KmsMode) -> io::Result<()> {
        {
            let mut state = self.shared.lock();
            state.kms_mode = mode;
            state.kms_mode_left = None;
        }
        set_door(&self.kms_door, mode != KmsMode::Refuse)?;
        if mode != KmsMode::Normal {
            self.shared.end_kms.send_replace(());
        }
        Ok(())
    }

    /// As [`Emulator::set_kms_mode`], for the next `connections` only (at least 1); open ones stay. Refusing
    /// cannot be counted: `KmsMode::Refuse` closes those connections instead.
    pub fn set_kms_mode_for(&self, mode: KmsMode, connections: u64) {
        let mut state = self.shared.lock();
        state.kms_mode = mode;
        state.kms_mode_left = Some(connections.max(1));
    }

    /// Closes all open KMS connections, as an idle time-out or a restart would.
    pub fn close_kms_connections(&self) {
        self.shared.end_kms.send_replace(());
    }

    // Credentials.

    /// A long-term access key pair that KMS accepts.
    pub fn add_access_key(&self, id: &str, secret: &str) {
        self.shared.lock().credentials.add_access_key(id, secret);
    }

    /// Forgets a long-term access key.
    pub fn remove_access_key(&self, id: &str) {
        self.shared.lock().credentials.remove_access_key(id);
    }

    /// Fresh STS credentials that KMS accepts, beside those of the metadata service.
    pub fn issue_credentials(&self) -> StsCredentials {
        let mut state = self.shared.lock();
        let now = state.clock.life();
        state.credentials.issue(now)
    }

    /// Life of credentials issued from now on, in seconds.
    pub fn set_credentials_lifetime(&self, seconds: i64) {
        self.shared.lock().credentials.lifetime_s = seconds;
    }

    /// The next read of the role's credentials gives fresh ones; the old ones stay good until they expire.
    pub fn rotate_credentials(&self) {
        self.shared.lock().credentials.rotate();
    }

    /// Ends the life of all STS credentials at once; the next read gives fresh ones.
    pub fn expire_credentials(&self) {
        let mut state = self.shared.lock();
        let now = state.clock.life();
        state.credentials.expire(now);
    }

    /// KMS forgets all STS credentials (`InvalidAccessKeyId.NotFound`); the next read gives fresh ones.
    pub fn revoke_credentials(&self) {
        self.shared.lock().credentials.revoke();
    }

    /// How KMS refuses expired STS tokens.
    pub fn set_expired_token_reply(&self, reply: ExpiredTokenReply) {
        self.shared.lock().credentials.expired_reply = reply;
    }

    /// ARN of the application access point of this name, whether it exists or not.
    pub fn aap_arn(&self, name: &str) -> String {
        let state = self.shared.lock();
        kms::aap::arn(&state.region, &state.account, name)
    }

    /// Creates an application access point.
    pub fn add_aap(&self, name: &str) {
        self.shared.lock().aaps.insert(name.to_owned());
    }

    /// Deletes an application access point: 404 `Forbidden.AAPNotFound` from now on.
    pub fn remove_aap(&self, name: &str) {
        self.shared.lock().aaps.remove(name);
    }

    /// ARN of the role that an OIDC token may assume.
    pub fn oidc_role_arn(&self) -> String {
        let state = self.shared.lock();
        state.oidc.role_arn(&state.account)
    }

    /// ARN of the OIDC provider that this role trusts.
    pub fn oidc_provider_arn(&self) -> String {
        let state = self.shared.lock();
        state.oidc.provider_arn(&state.account)
    }

    /// The one OIDC token that STS accepts from now on; the former one has expired
    /// (`AuthenticationFail.OIDCToken.Expired`), any other is `AuthenticationFail.OIDCToken.Invalid`.
    pub fn set_oidc_token(&self, token: Option<&str>) {
        self.shared.lock().oidc.set_token(token);
    }

    /// For `ALIBABA_CLOUD_CREDENTIALS_URI`: on the metadata port, and down with it.
    pub fn credentials_uri(&self) -> String {
        self.metadata_url() + metadata::CREDENTIALS_URI
    }

    /// How the credentials URI fails; `None`: it works.
    pub fn set_credentials_uri_fault(&self, fault: Option<CredentialsUriFault>) {
        self.shared.lock().credentials_uri_fault = fault;
    }

    // Metadata.

    /// A signed instance identity as the metadata service gives it: base64 of PKCS#7.
    ///
    /// # Errors
    /// The signature could not be made.
    pub fn instance_identity(&self, audience: Option<&str>) -> io::Result<String> {
        metadata::signed_identity(&mut self.shared.lock(), audience)
    }

    /// What is wrong with signed instance identities from now on; `None`: nothing.
    pub fn set_identity_fault(&self, fault: Option<IdentityFault>) {
        self.shared.lock().identity_fault = fault;
    }

    /// Whether the metadata service insists on session tokens.
    pub fn set_metadata_mode(&self, mode: MetadataMode) {
        self.shared.lock().metadata_mode = mode;
    }

    /// How the metadata service fails; `None`: it works. Setting a fault ends its open connections. In force
    /// when this returns.
    ///
    /// # Errors
    /// The port could not be opened again.
    pub fn set_metadata_fault(&self, fault: Option<MetadataFault>) -> io::Result<()> {
        self.shared.lock().metadata_fault = fault;
        set_door(&self.metadata_door, fault != Some(MetadataFault::Refuse))?;
        if fault.is_some() {
            self.shared.end_metadata.send_replace(());
        }
        Ok(())
    }

    /// Pause before the metadata service answers.
    pub fn set_metadata_latency(&self, latency: Duration) {
        self.shared.lock().metadata_latency = latency;
    }

    /// Attaches a role to the instance, or detaches it (404 for its credentials).
    pub fn set_role(&self, role: Option<&str>) {
        self.shared.lock().role = role.map(str::to_owned);
    }

    /// Forgets all session tokens, as a restart of the service would: hardened GETs get 401.
    pub fn forget_session_tokens(&self) {
        let mut state: Guard<'_> = self.shared.lock();
        state.session_tokens.clear();
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // Either may be gone already if the thread ended by itself.
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn set_door(door: &mpsc::UnboundedSender<DoorCommand>, open: bool) -> io::Result<()> {
    let gone = || io::Error::other("the emulator's thread ended");
    let (done, outcome) = std::sync::mpsc::sync_channel(1);
    door.send(DoorCommand { open, done }).map_err(|_| gone())?;
    outcome.recv().unwrap_or_else(|_| Err(gone()))
}

fn initial_state(options: Options, identities: Identities) -> Result<State, KmsError> {
    let clock = Clock { offset_s: options.clock_offset_s, advanced_s: 0 };
    let mut store = Store::new(&options.region, &options.account);
    for secret in options.secrets {
        store.create(secret, clock.life())?;
    }
    Ok(State {
        clock,
        store,
        credentials: Credentials::new(&options.access_keys, options.credentials_lifetime_s),
        faults: Faults::default(),
        counters: Counters::default(),
        log: RequestLog::default(),
        nonces: Nonces::default(),
        limiter: options.throttle.map(Limiter::new),
        latency: options.latency,
        kms_mode: KmsMode::Normal,
        kms_mode_left: None,
        metadata_mode: options.metadata_mode,
        metadata_fault: options.metadata_fault,
        metadata_latency: Duration::ZERO,
        session_tokens: BTreeMap::new(),
        role: options.role,
        region: options.region,
        account: options.account,
        connections: 0,
        identities,
        identity_fault: None,
        aaps: options.aaps.into_iter().collect(),
        oidc: Oidc::new(options.oidc_role, options.oidc_provider, options.oidc_token),
        credentials_uri_fault: None,
    })
}

/// What the services' thread needs.
struct Services {
    shared: Arc<Shared>,
    certificates: Arc<Certificates>,
    kms_commands: mpsc::UnboundedReceiver<DoorCommand>,
    metadata_commands: mpsc::UnboundedReceiver<DoorCommand>,
}

impl Services {
    fn spawn(self, kms_door: Door, metadata_door: Door) {
        let (shared, certificates) = (Arc::clone(&self.shared), self.certificates);
        tokio::spawn(kms_door.run(self.kms_commands, move |tcp| {
            tokio::spawn(kms::connection(Arc::clone(&shared), Arc::clone(&certificates), tcp));
        }));
        let shared = self.shared;
        tokio::spawn(metadata_door.run(self.metadata_commands, move |tcp| {
            tokio::spawn(metadata::connection(Arc::clone(&shared), tcp));
        }));
    }
}
