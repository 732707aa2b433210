//! As on a real instance: the agent is told nothing about where KMS, STS and the metadata service are. Two network
//! namespaces joined by a cable, `instance` and `cloud`; in `cloud` the emulator has 100.100.100.200 port 80 and,
//! under KMS's and STS's own names, port 443.
//!
//! Needs root and `ip` (iproute2). Where namespaces are not allowed each test says so and passes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::{Connection, Reply, Setup, command, http, python_with, skip, tool, wait_until};
use kms_emulator::{Emulator, MetadataMode, NewSecret, Options};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::{panic, thread};

const METADATA: &str = "100.100.100.200";
/// Where the names below lead to: TEST-NET-1, which is nobody's (RFC 5737).
const CLOUD: &str = "192.0.2.1";
const NAMES: [&str; 4] = [
    "kms-vpc.cn-hangzhou.aliyuncs.com",
    "sts.aliyuncs.com",
    "sts.cn-hangzhou.aliyuncs.com",
    "sts-vpc.cn-hangzhou.aliyuncs.com",
];
/// `ip netns exec` puts what is in `<this>/<namespace>` over what is in `/etc`.
const NETNS: &str = "/etc/netns";

/// One at a time, so that the last one out can remove [`NETNS`].
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Two namespaces and what belongs to them; all of it goes with the value.
struct Lab {
    ip: PathBuf,
    instance: String,
    cloud: String,
    _turn: MutexGuard<'static, ()>,
}

impl Lab {
    /// `None` after saying why there is none.
    fn new() -> Option<Lab> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let ip = tool("ip")?;
        let name = format!("kms-agent-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let (instance, cloud) = (format!("{name}-instance"), format!("{name}-cloud"));
        let lab = Lab { ip, instance, cloud, _turn: turn };
        for namespace in [&lab.instance, &lab.cloud] {
            if let Err(why) = lab.ip(&format!("netns add {namespace}")) {
                skip(&format!("no network namespaces here: {why}"));
                return None;
            }
        }
        let (instance, cloud) = (&lab.instance, &lab.cloud);
        for arguments in [
            format!("-n {instance} link set lo up"),
            format!("link add eth0 netns {instance} type veth peer name eth0 netns {cloud}"),
            format!("-n {instance} address add 192.0.2.2/24 dev eth0"),
            format!("-n {cloud} address add {CLOUD}/24 dev eth0"),
            format!("-n {cloud} address add {METADATA}/32 dev eth0"),
            format!("-n {instance} link set eth0 up"),
            format!("-n {cloud} link set eth0 up"),
            format!("-n {instance} route add {METADATA}/32 via {CLOUD}"),
        ] {
            lab.ip(&arguments).unwrap_or_else(|why| panic!("ip {arguments}: {why}"));
        }
        // The kernel connects the ends a moment later: a SYN until then is lost, and sent again only after a second.
        for namespace in [instance, cloud] {
            wait_until("the cable is plugged in", || {
                lab.ip(&format!("-n {namespace} link show eth0"))
                    .is_ok_and(|told| told.contains(" state UP "))
            });
        }
        let files = Path::new(NETNS).join(instance);
        fs::create_dir_all(&files).unwrap();
        let hosts: String = NAMES.iter().map(|name| format!("{CLOUD} {name}\n")).collect();
        fs::write(files.join("hosts"), format!("127.0.0.1 localhost\n{hosts}")).unwrap();
        Some(lab)
    }

    /// What `ip` said; an error is what it said of that.
    fn ip(&self, arguments: &str) -> Result<String, String> {
        let output = command(&self.ip).args(arguments.split(' ')).output().unwrap();
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    /// Starts an emulator on the well-known addresses and ports.
    fn emulator(&self, options: Options) -> Emulator {
        let options = Options {
            kms_address: CLOUD.parse().unwrap(),
            kms_port: 443,
            metadata_address: METADATA.parse().unwrap(),
            metadata_port: 80,
            secrets: vec![NewSecret::generic("agent-test", "hello")],
            ..options
        };
        inside(&self.cloud, || Emulator::start(options).unwrap())
    }

    /// Does this on the instance.
    fn on_instance<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        inside(&self.instance, work)
    }

    /// An agent on the instance that knows the CA and nothing else.
    fn agent(&self, emulator: &Emulator) -> Setup {
        Setup::inside(&self.ip, &self.instance, emulator.ca_pem())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // The cable goes with either end. Nothing to be done about errors, and none when it never came to be.
        for namespace in [&self.instance, &self.cloud] {
            let _ = self.ip(&format!("netns delete {namespace}"));
        }
        let _ = fs::remove_dir_all(Path::new(NETNS).join(&self.instance));
        // Unless somebody else has files there.
        let _ = fs::remove_dir(NETNS);
    }
}

/// Does this on a thread that lives in a network namespace. Threads and processes that it starts do so, too.
fn inside<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> T {
    let file = File::open(Path::new("/run/netns").join(namespace)).unwrap();
    let stepped_in = || {
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        work()
    };
    thread::scope(|scope| scope.spawn(stepped_in).join()).unwrap_or_else(|why| panic::resume_unwind(why))
}

#[track_caller]
fn assert_hello(reply: &Reply, log: &str) {
    assert_eq!(reply.status, 200, "{}\n{log}", reply.text());
    assert_eq!(reply.json()["SecretData"], "hello");
}

#[test]
fn a_ram_role_is_all_it_takes() {
    for mode in [MetadataMode::Normal, MetadataMode::Hardened] {
        let Some(lab) = Lab::new() else { return };
        let emulator = lab.emulator(Options { metadata_mode: mode, ..Options::default() });
        lab.on_instance(|| {
            let agent = lab.agent(&emulator).start();
            assert_hello(&agent.secret("agent-test"), &agent.log());
        });
        let counters = emulator.counters();
        assert_eq!((counters.gets("agent-test"), counters.metadata_plain_gets), (1, 0));
        assert_eq!(counters.credential_reads_total(), 1);
    }
}

/// The provider that every official Python SDK uses. It cannot be told another address.
#[test]
fn the_official_credentials_provider_reads_the_metadata() {
    let Some(python) = python_with("alibabacloud_credentials") else { return };
    for (mode, argument) in [(MetadataMode::Normal, "normal"), (MetadataMode::Hardened, "hardened")] {
        let Some(lab) = Lab::new() else { return };
        let emulator = lab.emulator(Options::default());
        lab.on_instance(|| {
            let mut metadata = Connection::to((METADATA, 80));
            metadata.send(http::head("GET", "/latest/meta-data/ram/security-credentials/EcsRamRoleKms", &[]));
            let metadata = metadata.reply().unwrap().json();
            let expected = ["AccessKeyId", "AccessKeySecret", "SecurityToken"].map(|name| &metadata[name]);
            let expected = serde_json::to_value(expected).unwrap();

            emulator.set_metadata_mode(mode);
            emulator.reset_counters();
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/credentials.py");
            let output = command(&python).arg(script).arg(argument).output().unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{stderr}");
            let stdout = String::from_utf8(output.stdout).unwrap();
            let told: Vec<serde_json::Value> =
                stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            assert_eq!(told, [expected.clone(), expected], "{stderr}");
        });
        let counters = emulator.counters();
        assert_eq!((counters.credential_reads_total(), counters.metadata_plain_gets), (2, 0));
    }
}

/// No role is attached in the next two: the metadata service still knows the region.
fn without_a_role() -> Options {
    Options { role: None, ..Options::default() }
}

#[test]
fn an_oidc_token_goes_to_sts_by_its_own_name() {
    let Some(lab) = Lab::new() else { return };
    let emulator = lab.emulator(without_a_role());
    lab.on_instance(|| {
        let setup = lab.agent(&emulator).text("KMS", "AuthType", "oidc");
        let token = setup.folder.write("oidc-token", "emulator-oidc-token\n");
        let agent = setup
            .env("ALIBABA_CLOUD_ROLE_ARN", emulator.oidc_role_arn())
            .env("ALIBABA_CLOUD_OIDC_PROVIDER_ARN", emulator.oidc_provider_arn())
            .env("ALIBABA_CLOUD_OIDC_TOKEN_FILE", token)
            .start();
        assert_hello(&agent.secret("agent-test"), &agent.log());
    });
    let counters = emulator.counters();
    assert_eq!((counters.oidc_exchanges, counters.credential_reads_total()), (1, 0));
}

#[test]
fn the_instance_s_identity_opens_an_application_access_point() {
    let Some(lab) = Lab::new() else { return };
    let emulator = lab.emulator(Options { metadata_mode: MetadataMode::Hardened, ..without_a_role() });
    lab.on_instance(|| {
        let aap = emulator.aap_arn("kms-agent");
        let agent = lab.agent(&emulator).text("KMS", "AapArn", &aap).start();
        assert_hello(&agent.secret("agent-test"), &agent.log());
    });
    let counters = emulator.counters();
    assert_eq!((counters.identity_reads, counters.aap_exchanges), (1, 1));
    assert_eq!((counters.metadata_plain_gets, counters.credential_reads_total()), (0, 0));
}
