//! What the process has given up: the kernel refuses it, whatever the code tries. That every feature works
//! without it is shown by all tests that start the binary, which is hardened there as everywhere.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::{Folder, Setup, command, emulator, host, secret_target, skip, tool, wait_until};
use kms_agent::harden::{Files, Harden};
use kms_emulator::{Emulator, NewSecret, Options};
use rustix::fs::MemfdFlags;
use rustix::net::{AddressFamily, SocketType};
use rustix::process::{DumpableBehavior, Resource, Signal};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{TcpListener, TcpStream, ToSocketAddrs as _, UdpSocket};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

/// Tells a child which trial it is.
const TRIAL: &str = "KMS_AGENT_TEST_TRIAL";

/// Runs the one test `name` of this file again, in a process that it may harden; gives how that ended.
fn in_a_child(name: &str, trial: &str, folder: &Path) -> (ExitStatus, String) {
    let output = command(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(TRIAL, trial)
        .env(host::RECORD, host::record())
        .current_dir(folder)
        .output()
        .unwrap();
    (output.status, String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

fn trial() -> Option<String> {
    std::env::var(TRIAL).ok()
}

#[track_caller]
fn assert_refused<T>(what: &str, result: Result<T, impl Into<io::Error>>) {
    match result.map_err(Into::into) {
        Ok(_) => panic!("{what} works"),
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{what}: {error}"),
    }
}

#[test]
fn a_forbidden_system_call_fails_or_kills() {
    let Some(trial) = trial() else {
        let folder = Folder::new();
        let name = "a_forbidden_system_call_fails_or_kills";
        let (status, output) = in_a_child(name, "refused", folder.path());
        assert!(status.success(), "{output}");
        for fatal in ["execve", "memfd_create"] {
            let (status, output) = in_a_child(name, fatal, folder.path());
            assert_eq!(status.signal(), Some(Signal::SYS.as_raw()), "{fatal}: {status}: {output}");
        }
        return;
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    Harden::begin().restrict_calls();
    match trial.as_str() {
        "execve" => drop(Command::new("/bin/true").exec()),
        "memfd_create" => drop(rustix::fs::memfd_create("m", MemfdFlags::empty())),
        _ => {
            assert_refused("another listener", TcpListener::bind("127.0.0.1:0"));
            assert_refused("another process", Command::new("/bin/true").spawn());
            assert_refused("another thread", std::thread::Builder::new().spawn(|| ()));
            let socket = |family| rustix::net::socket(family, SocketType::RAW, None);
            assert_refused("a netlink socket", socket(AddressFamily::NETLINK));
            assert_refused("raw packets", socket(AddressFamily::PACKET));
            assert_refused("chmod", fs::set_permissions(".", fs::metadata(".").unwrap().permissions()));
            assert_refused("a symbolic link", std::os::unix::fs::symlink("a", "b"));
            assert_refused("a folder's list", fs::read_dir(".").and_then(|mut list| list.next().unwrap()));
            let limit = rustix::process::getrlimit(Resource::Nofile);
            assert_refused("another limit", rustix::process::setrlimit(Resource::Nofile, limit));
            // What an agent does goes on.
            drop(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
            listener.accept().unwrap();
            UdpSocket::bind("127.0.0.1:0").unwrap();
            UnixDatagram::unbound().unwrap();
            assert!(("localhost", 1).to_socket_addrs().unwrap().next().is_some());
        }
    }
}

#[test]
fn other_files_than_the_agents_own_are_out_of_reach() {
    if trial().is_none() {
        let folder = Folder::new();
        let (status, output) =
            in_a_child("other_files_than_the_agents_own_are_out_of_reach", "files", folder.path());
        assert!(status.success(), "{output}");
        return;
    }
    for name in ["token", "elsewhere", "logs"] {
        fs::create_dir(name).unwrap();
    }
    fs::write("elsewhere/token", "linked to").unwrap();
    std::os::unix::fs::symlink("../elsewhere/token", "token/kmstoken").unwrap();
    fs::write("other", "not the agent's").unwrap();
    let mut files = Files::default();
    files.read(Path::new("token/kmstoken"));
    files.write(Path::new("logs"));
    let mut harden = Harden::default();
    harden.restrict_files(&files);
    if let Some(why) = harden.missing().first() {
        skip(why);
        return;
    }
    assert_eq!(fs::read_to_string("token/kmstoken").unwrap(), "linked to");
    assert!(fs::read("/etc/hosts").is_ok() || !Path::new("/etc/hosts").exists(), "names are resolved");
    assert_refused("another file", fs::read("other"));
    assert_refused("another file's content", fs::write("other", "x"));
    assert_refused("a new file", fs::write("new", "x"));
    assert_refused("a new token", fs::write("token/new", "x"));
    assert_refused("a removed token", fs::remove_file("token/kmstoken"));
    assert_refused("a program", Command::new("/bin/true").status());
    assert_refused("a listener", TcpListener::bind("127.0.0.1:0"));
    // Rotation.
    fs::write("logs/a", "line").unwrap();
    fs::rename("logs/a", "logs/a.1").unwrap();
    fs::File::options().write(true).open("logs/a.1").unwrap().set_len(0).unwrap();
    fs::remove_file("logs/a.1").unwrap();
    assert_refused("a moved log", fs::write("logs/b", "x").and_then(|()| fs::rename("logs/b", "token/b")));
    assert_refused("a folder in the log's", fs::create_dir("logs/c"));
}

#[test]
fn names_are_resolved_by_files_that_are_linked_out_of_etc() {
    let name = "names_are_resolved_by_files_that_are_linked_out_of_etc";
    if trial().is_none() {
        let Some(unshare) = tool("unshare") else { return };
        let try_it = command(&unshare).args(["-m", "mount", "-t", "tmpfs", "none", "/etc"]).output();
        if !try_it.is_ok_and(|output| output.status.success()) {
            skip("no mount namespaces here");
            return;
        }
        let folder = Folder::new();
        folder.write("hosts", "127.0.0.1 linked.test\n");
        folder.write("nsswitch.conf", "hosts: files\n");
        // An /etc of its own.
        let script =
            r#"mount -t tmpfs none /etc && ln -s "$PWD/hosts" "$PWD/nsswitch.conf" /etc && exec "$0" "$@""#;
        let output = command(unshare)
            .args(["-m", "sh", "-c", script])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture", "--test-threads=1"])
            .env(TRIAL, "links")
            .current_dir(folder.path())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&[output.stdout, output.stderr].concat())
        );
        return;
    }
    let mut harden = Harden::default();
    harden.restrict_files(&Files::default());
    let found = ("linked.test", 1).to_socket_addrs().unwrap().next();
    assert_eq!(found, Some(([127, 0, 0, 1], 1).into()));
}

#[test]
fn no_core_no_dump_no_new_privileges() {
    if trial().is_none() {
        let folder = Folder::new();
        let (status, output) = in_a_child("no_core_no_dump_no_new_privileges", "limits", folder.path());
        assert!(status.success(), "{output}");
        return;
    }
    let harden = Harden::begin();
    let core = rustix::process::getrlimit(Resource::Core);
    assert_eq!((core.current, core.maximum), (Some(0), Some(0)));
    assert_eq!(rustix::process::dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
    assert!(rustix::thread::no_new_privs().unwrap());
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap().trim() != "0 kB";
    let missing = harden.missing();
    assert_eq!(missing.is_empty(), locked, "{missing:?}");
    assert!(missing.iter().all(|why| why.contains("LimitMEMLOCK=infinity")), "{missing:?}");
}

#[test]
fn the_log_says_what_is_in_force() {
    let emulator = emulator(&[]);
    let agent = Setup::new(&emulator).start();
    agent.wait_for_log("hardened: no core dumps, not dumpable, no new privileges");
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    for thread in fs::read_dir(format!("/proc/{}/task", agent.pid())).unwrap() {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        assert!(status.contains("\nNoNewPrivs:\t1\n") && status.contains("\nSeccomp:\t2\n"), "{status}");
    }
    assert!(status.contains("\nThreads:\t2\n"), "{status}");
}

#[test]
fn a_hardened_agent_rotates_its_log_follows_its_files_and_resolves_names() {
    // Long, so that few requests fill a megabyte of log.
    let name = "n".repeat(250);
    let secrets = vec![NewSecret::generic(&name, "value")];
    let emulator = Emulator::start(Options { secrets, ..Options::default() }).unwrap();
    let endpoint = format!("localhost:{}", emulator.kms_addr().port());
    let mut agent = Setup::beside(&endpoint, &emulator.metadata_url(), emulator.ca_pem())
        .key("Log", "LogFileSizeMB", 1)
        .start();
    let target = secret_target(&name);
    assert_eq!(agent.get(&target).status, 200, "by name");

    let replace = |file: &str, content: &str| {
        let new = agent.folder.write("new", content);
        fs::rename(new, agent.folder.join(file)).unwrap();
    };
    replace("kmstoken", "the next token");
    replace("ca.pem", "no certificate");
    agent.signal(Signal::HUP);
    agent.wait_for_log("there is no PEM certificate in it");
    agent.token = "the next token".into();
    wait_until("the new token works", || agent.get(&target).status == 200);

    let mut connection = agent.connect();
    for _ in 0..100 {
        connection.send(agent.head(&target).repeat(40));
        for _ in 0..40 {
            assert_eq!(connection.reply().unwrap().status, 200);
        }
    }
    wait_until("the log is rotated", || agent.folder.join("logs/kms-agent.log.1").exists());
    assert!(agent.stop().success());
    assert!(
        fs::read_to_string(agent.folder.join("logs/kms-agent.log"))
            .unwrap()
            .ends_with("[INFO] cli: the agent has ended\n")
    );
}

/// As Kubernetes renews what is in a volume: `token` leads to `..data/token`, and `..data` to a folder that is made
/// anew each time, the old one being removed.
struct Volume {
    folder: PathBuf,
    current: Option<PathBuf>,
}

impl Volume {
    fn new(folder: PathBuf) -> Volume {
        fs::create_dir(&folder).unwrap();
        std::os::unix::fs::symlink("..data/token", folder.join("token")).unwrap();
        Volume { folder, current: None }
    }

    fn publish(&mut self, name: &str, token: &str) {
        let next = self.folder.join(name);
        fs::create_dir(&next).unwrap();
        fs::write(next.join("token"), token).unwrap();
        std::os::unix::fs::symlink(name, self.folder.join("..data_tmp")).unwrap();
        fs::rename(self.folder.join("..data_tmp"), self.folder.join("..data")).unwrap();
        if let Some(old) = self.current.replace(next) {
            fs::remove_dir_all(old).unwrap();
        }
    }
}

#[test]
fn a_kubernetes_volume_that_is_published_anew_can_still_be_read() {
    let emulator = emulator(&[("a", "1")]);
    // As it is meant to be named, and through the link that is replaced.
    for file in ["volume/token", "volume/..data/token"] {
        // Not in the folder of `CaFile`, which may be read anyway.
        let folder = Folder::new();
        let mut volume = Volume::new(folder.join("volume"));
        volume.publish("..2026_11_22_1", "the first");
        let token = format!("file://{}", folder.join(file).display());
        let mut agent = Setup::new(&emulator).token_variable(token).start();
        for (name, token) in [("..2026_11_22_2", "the second"), ("..2026_11_22_3", "the third")] {
            volume.publish(name, token);
            agent.token = token.into();
            wait_until("the new token works", || agent.get("/v1/a").status == 200);
        }
        assert!(!agent.log().contains("cannot read"), "{file}: {}", agent.log());
    }
}

/// `packaging/systemd/kms-agent.service` with what it names in place, so that only the unit itself is judged.
#[test]
fn the_unit_file_is_sound_and_exposes_little() {
    let Some(analyze) = tool("systemd-analyze") else { return };
    let unit = include_str!("../packaging/systemd/kms-agent.service")
        .replace("/usr/local/alibabacloudkmsagent/bin/kms-agent", env!("CARGO_BIN_EXE_kms-agent"));
    let folder = Folder::new();
    let unit = folder.write("kms-agent.service", unit).display().to_string();
    let output = command(&analyze).args(["verify", "--man=no", &unit]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && !said.contains("kms-agent.service"), "{said}");
    // In tenths: 1.0.
    let security = ["security", "--offline=yes", "--no-pager", "--threshold=10", &unit];
    let output = command(&analyze).args(security).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let exposed: Vec<&str> = said.lines().filter(|line| !line.starts_with('\u{2713}')).collect();
    assert!(output.status.success(), "{exposed:#?}");
    println!("{}", exposed.join("\n"));
}

/// Text that is nowhere else, in blocks that can be told apart: a part of it is a trace, too.
struct Marked {
    prefix: String,
    blocks: u32,
}

impl Marked {
    fn new(name: &str, blocks: u32) -> Marked {
        Marked { prefix: format!("<{name}-{}-", std::process::id()), blocks }
    }

    fn text(&self) -> String {
        (0..self.blocks).map(|n| format!("{}{n:04}>", self.prefix)).collect()
    }

    /// How many of its blocks, whole or cut off, are in the memory of a process.
    fn blocks_in_memory(&self, pid: u32) -> usize {
        what_follows_in_memory(pid, self.prefix.as_bytes()).len()
    }
}

/// The different four bytes that come after `prefix` in the memory that a process may write to.
fn what_follows_in_memory(pid: u32, prefix: &[u8]) -> BTreeSet<Vec<u8>> {
    let memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mut found = BTreeSet::new();
    for line in maps.lines().filter(|line| line.contains(" rw")) {
        let (from, to) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let [from, to] = [from, to].map(|it| u64::from_str_radix(it, 16).unwrap());
        let mut bytes = vec![0; usize::try_from(to - from).unwrap()];
        // Some of the kernel's own cannot be read.
        let Ok(count) = memory.read_at(&mut bytes, from) else { continue };
        let mut rest = &bytes[..count];
        while let Some(at) = rest.iter().position(|byte| *byte == prefix[0]) {
            rest = &rest[at..];
            if rest.starts_with(prefix) {
                found.insert(rest[prefix.len()..].get(..4).unwrap_or_default().to_vec());
            }
            rest = &rest[1..];
        }
    }
    found
}

#[test]
fn what_is_evicted_rotated_or_renewed_leaves_no_trace_in_memory() {
    // The long value first: what comes later does not write over all of it by chance.
    let [long, next] = [Marked::new("long", 500), Marked::new("next", 1)];
    let [old_token, new_token] = [Marked::new("old", 8), Marked::new("new", 1)];
    let emulator = emulator(&[("long", &long.text()), ("next", &next.text())]);
    let mut agent = Setup::new(&emulator).key("Cache", "CacheSize", 1).token(&old_token.text()).start();
    let pid = agent.pid();
    // In two pieces, so that the first is kept; it has been read when the ping is answered.
    let head = agent.head(&secret_target("long"));
    let (first, second) = head.split_at(head.len() - 3);
    let mut connection = agent.connect();
    connection.send(first);
    assert_eq!(agent.get_with("/ping", &[]).status, 200);
    connection.send(second);
    assert_eq!(connection.reply().unwrap().status, 200);
    if fs::File::open(format!("/proc/{pid}/mem")).is_err() {
        skip("the agent is not dumpable, so only root may look into its memory");
        return;
    }
    let credentials = credentials(&emulator);
    // What is there is found.
    assert!(long.blocks_in_memory(pid) >= 500);
    assert!(old_token.blocks_in_memory(pid) >= 8);
    for part in &credentials {
        assert!(!what_follows_in_memory(pid, part.as_bytes()).is_empty(), "{part}");
    }

    emulator.revoke_credentials();
    assert_eq!(agent.secret("next").status, 200);
    // The last that is read of the old token, so that nothing longer takes its place.
    assert_eq!(agent.secret("next").verdict(), "200 HIT");
    agent.folder.write("kmstoken", new_token.text());
    agent.token = new_token.text();
    wait_until("the new token works", || agent.secret("next").status == 200);
    assert!(next.blocks_in_memory(pid) >= 1 && new_token.blocks_in_memory(pid) >= 1);
    assert_eq!(long.blocks_in_memory(pid), 0, "the evicted value");
    assert_eq!(old_token.blocks_in_memory(pid), 0, "the old token");
    for part in &credentials {
        let found = what_follows_in_memory(pid, part.as_bytes());
        assert!(found.is_empty(), "{part} of the old credentials is followed by {found:?}");
    }
}

/// Secret and security token that the metadata service hands out now.
fn credentials(emulator: &Emulator) -> [String; 2] {
    let url = emulator.metadata_url();
    let mut connection = common::Connection::to(url.strip_prefix("http://").unwrap());
    let role = Options::default().role.unwrap();
    let target = format!("/latest/meta-data/ram/security-credentials/{role}");
    connection.send(common::http::head("GET", &target, &[]));
    let reply: serde_json::Value = serde_json::from_slice(&connection.reply().unwrap().body).unwrap();
    ["AccessKeySecret", "SecurityToken"].map(|key| reply[key].as_str().unwrap().to_owned())
}
