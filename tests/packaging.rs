//! What is shipped around the binary: the installer's scripts staged into a folder, the Cloud Assistant documents.
//! Accounts, packages and a real systemd are for `.ci/full` (`packaging/test`): they need root and Debian.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::{Folder, Setup, binary, command, emulator, run, tool};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

const HOME: &str = "usr/local/alibabacloudkmsagent";
/// What hosts run; bash scripts are for those who build and test.
const HOST_SCRIPTS: [&str; 9] = [
    "install.sh",
    "uninstall.sh",
    "cloud-assistant/install.sh",
    "cloud-assistant/status.sh",
    "cloud-assistant/remove.sh",
    "scripts/preinst",
    "scripts/postinst",
    "scripts/prerm",
    "scripts/postrm",
];
const BUILD_SCRIPTS: [&str; 7] = [
    "build",
    "packages",
    "static-pie-linker",
    "cloud-assistant/make",
    "test/debian-root",
    "test/chroot",
    "test/boot",
];

fn packaging(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging").join(name)
}

fn text(name: &str) -> String {
    fs::read_to_string(packaging(name)).unwrap_or_else(|error| panic!("packaging/{name}: {error}"))
}

/// A script of `packaging/` with these arguments and variables; gives exit code and all it said.
fn script(name: &str, arguments: &[&str], variables: &[(&str, &str)]) -> (i32, String) {
    let mut command = command("sh");
    command.arg(packaging(name)).args(arguments).envs(variables.iter().copied());
    let output = command.output().expect("sh starts");
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    (output.status.code().expect("an exit code"), said)
}

/// A `PATH` with which scripts take their user for another one than root: what must not reach this host does not, even
/// where the script under test is wrong.
fn path_without_root(folder: &Folder) -> String {
    let id = folder.write("id", "#!/bin/sh\necho 1000\n");
    fs::set_permissions(&id, fs::Permissions::from_mode(0o755)).unwrap();
    format!("{}:{}", id.parent().unwrap().display(), std::env::var("PATH").unwrap())
}

/// A folder that the agent is staged into.
struct Stage(Folder);

impl Stage {
    fn new() -> Stage {
        Stage(Folder::new())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join("root").join(name)
    }

    fn config(&self) -> String {
        fs::read_to_string(self.file(&format!("{HOME}/config.toml"))).unwrap()
    }

    /// `install.sh` into it; the first two arguments are always there.
    fn install(&self, arguments: &[&str], variables: &[(&str, &str)]) -> (i32, String) {
        let (root, binary) = (self.file(""), binary());
        let mut all = vec!["--binary", binary.to_str().unwrap(), "--root", root.to_str().unwrap()];
        all.extend(arguments);
        script("install.sh", &all, variables)
    }

    #[track_caller]
    fn install_well(&self, arguments: &[&str], variables: &[(&str, &str)]) {
        let (code, said) = self.install(arguments, variables);
        assert_eq!(code, 0, "{said}");
    }

    /// Every file, link and empty folder in it.
    fn files(&self) -> BTreeSet<String> {
        fn collect(folder: &Path, prefix: &str, out: &mut BTreeSet<String>) {
            for entry in fs::read_dir(folder).unwrap().flatten() {
                let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
                if entry.file_type().unwrap().is_dir() {
                    collect(&entry.path(), &format!("{name}/"), out);
                } else {
                    out.insert(name);
                }
            }
        }
        let mut out = BTreeSet::new();
        collect(&self.file(""), "", &mut out);
        out
    }
}

/// The keys that are set in a configuration, a line each.
fn set_keys(config: &str) -> Vec<&str> {
    config.lines().filter(|line| !line.is_empty() && !line.starts_with(['#', '['])).collect()
}

#[test]
fn scripts_are_clean() {
    for name in HOST_SCRIPTS {
        run(Path::new("/bin/sh"), &["-n", packaging(name).to_str().unwrap()]);
        assert!(text(name).starts_with("#!/bin/sh\n"), "{name}");
    }
    for name in HOST_SCRIPTS.iter().chain(&BUILD_SCRIPTS) {
        let mode = fs::metadata(packaging(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o111, 0o111, "{name} can be run");
    }
    let Some(shellcheck) = tool("shellcheck") else { return };
    let paths: Vec<PathBuf> = HOST_SCRIPTS.iter().chain(&BUILD_SCRIPTS).map(|name| packaging(name)).collect();
    let paths: Vec<&str> = paths.iter().map(|path| path.to_str().unwrap()).collect();
    let output = command(shellcheck).args(paths).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn a_staged_agent_is_whole_and_serves() {
    let emulator = emulator(&[("agent-test", "hello")]);
    let setup = Setup::new(&emulator);
    let stage = Stage::new();
    let config = setup.folder.write("whole.toml", setup.config());
    stage.install_well(&["--config", config.to_str().unwrap(), "--ttl", "77"], &[]);
    let expected = [
        "etc/systemd/system/kms-agent.service",
        "etc/systemd/system/kms-agent.service.d/log-path.conf",
        "usr/local/alibabacloudkmsagent/bin/kms-agent",
        "usr/local/alibabacloudkmsagent/config.toml",
        "usr/local/alibabacloudkmsagent/config.toml.sample",
        "usr/local/alibabacloudkmsagent/uninstall.sh",
        "usr/local/bin/kms-agent",
        "usr/local/share/man/man8/kms-agent.8",
    ];
    assert_eq!(stage.files(), expected.map(str::to_owned).into());
    let drop_in = fs::read_to_string(stage.file(expected[1])).unwrap();
    assert!(
        drop_in.contains(&format!("\nReadWriteDirectories=\"{}\"\n", setup.folder.join("logs").display()))
    );
    assert_eq!(fs::read_to_string(stage.file(expected[4])).unwrap(), text("config.toml"));
    // The agent takes what the installer made of the configuration.
    let agent = setup.refused_config(&stage.config()).start();
    let reply = agent.secret("agent-test");
    assert_eq!(reply.status, 200);
    assert!(stage.config().contains("TTLSeconds = 77\n"));
}

#[test]
fn every_parameter_of_the_install_panel_is_a_flag_and_a_variable() {
    let ca = Folder::new();
    let ca_file = ca.write("my.pem", "a certificate\n");
    // Flag, value, and what comes of it. They stand in the order of the sample.
    let parameters = [
        ("http-port", "2099", "HttpPort = 2099"),
        ("ssrf-headers", "X-A, X-B", "SSRFHeaders = [\"X-A\", \"X-B\"]"),
        ("ssrf-env", "A_TOKEN", "SSRFEnvVariables = [\"A_TOKEN\"]"),
        ("max-conn", "100", "MaxConn = 100"),
        ("memory-limit", "50", "CacheSize = 50"),
        ("ttl", "900", "TTLSeconds = 900"),
        ("region", "cn-beijing", "Region = \"cn-beijing\""),
        ("endpoint", "kms.cn-beijing.aliyuncs.com", "Endpoint = \"kms.cn-beijing.aliyuncs.com\""),
        (
            "aap-arn",
            "acs:kms:cn-beijing:1:applicationaccesspoint/a",
            "AapArn = \"acs:kms:cn-beijing:1:applicationaccesspoint/a\"",
        ),
        ("ca-file", ca_file.to_str().unwrap(), "CaFile = \"/usr/local/alibabacloudkmsagent/ca.pem\""),
        ("log-level", "info", "LogLevel = \"info\""),
        ("log-path", "/var/log/kms-agent", "LogPath = \"/var/log/kms-agent\""),
        ("log-size", "10", "LogFileSizeMB = 10"),
        ("log-backups", "5", "LogBackupFiles = 5"),
    ];
    let expected: Vec<&str> = parameters.iter().map(|(_, _, line)| *line).collect();
    let (_, help) = script("install.sh", &["--help"], &[]);

    let by_flag = Stage::new();
    let flags = parameters.map(|(flag, value, _)| [format!("--{flag}"), value.to_owned()]);
    by_flag.install_well(&flags.iter().flatten().map(String::as_str).collect::<Vec<_>>(), &[]);
    assert_eq!(set_keys(&by_flag.config()), expected);
    assert_eq!(fs::read_to_string(by_flag.file(&format!("{HOME}/ca.pem"))).unwrap(), "a certificate\n");

    let by_variable = Stage::new();
    let variables = parameters.map(|(flag, value, _)| {
        assert!(help.contains(&format!("\n  --{flag} ")), "--help has --{flag}");
        (format!("KMS_AGENT_{}", flag.to_uppercase().replace('-', "_")), value)
    });
    by_variable.install_well(&[], &variables.each_ref().map(|(name, value)| (name.as_str(), *value)));
    assert_eq!(by_variable.config(), by_flag.config());
    // All but these lines is as in the sample.
    let unset =
        |config: &str| config.lines().filter(|line| line.is_empty() || line.starts_with("# ")).count();
    assert_eq!(unset(&by_flag.config()), unset(&text("config.toml")));

    let flag_wins = Stage::new();
    flag_wins.install_well(&["--ttl=1"], &[("KMS_AGENT_TTL", "2")]);
    assert_eq!(set_keys(&flag_wins.config()), ["TTLSeconds = 1"]);
}

#[test]
fn an_upgrade_keeps_the_configuration_but_for_what_is_given() {
    let stage = Stage::new();
    stage.install_well(&["--ttl", "900"], &[]);
    let mine = "# mine\n[Log]\n  LogLevel='info' # quiet\n\n[Cache] # here\nTTLSeconds = 900\n";
    let config = stage.file(&format!("{HOME}/config.toml"));
    fs::write(&config, mine).unwrap();
    fs::set_permissions(&config, fs::Permissions::from_mode(0o600)).unwrap();
    stage.install_well(&[], &[]);
    assert_eq!(stage.config(), mine);
    stage.install_well(&["--log-level", "warn", "--memory-limit", "7", "--region", "cn-hangzhou"], &[]);
    assert_eq!(
        stage.config(),
        "# mine\n[Log]\nLogLevel = \"warn\"\n\n[Cache] # here\nCacheSize = 7\nTTLSeconds = 900\n\n[KMS]\nRegion = \
         \"cn-hangzhou\"\n"
    );
    assert_eq!(fs::metadata(&config).unwrap().permissions().mode() & 0o777, 0o600);

    // The drop-in for a log elsewhere comes and goes with the path.
    let drop_in = stage.file("etc/systemd/system/kms-agent.service.d/log-path.conf");
    stage.install_well(&["--log-path", "/data/logs"], &[]);
    assert!(drop_in.exists());
    stage.install_well(&["--log-path", "-"], &[]);
    assert!(!drop_in.exists());
}

#[test]
fn what_is_wrong_is_said_before_anything_is_touched() {
    let stage = Stage::new();
    let several_lines = stage.0.write("several.toml", "[Server]\nSSRFHeaders = [\n\"X-A\"]\n");
    let not_a_binary = stage.0.write("not-a-binary", "?");
    for (arguments, code, part) in [
        (&["--ttl", "soon"][..], 2, "--ttl soon: the value must be a number"),
        (&["--region", "a\"b"], 2, "--region: the value must have no quotes"),
        (&["--region"], 2, "--region needs a value"),
        (&["--region", ""], 2, "--region needs a value"),
        (&["--ttl="], 2, "--ttl needs a value"),
        (&["--app-user", "root"], 2, "--app-user cannot be used with --root"),
        (&["--log-path", "/data/100%"], 1, "LogPath /data/100%: it must have no quotes, backslashes or %"),
        (&["--foo"], 2, "unknown option --foo"),
        (&["--cache", "1"], 2, "unknown option --cache"),
        (&["now"], 2, "unexpected argument now"),
        (&["--config", "/no/such/file"], 2, "the file does not exist"),
        (&["--ca-file", "/no/such/file"], 2, "the file cannot be read"),
        (&["--max-conn", "5000"], 2, "wrong value: --max-conn; nothing was changed:\n  line"),
        (&["--binary", not_a_binary.to_str().unwrap()], 1, "does not run here"),
        (&["--config", several_lines.to_str().unwrap(), "--ssrf-headers", "X-B"], 1, "spans several lines"),
    ] {
        let (got, said) = stage.install(arguments, &[]);
        assert_eq!(got, code, "{arguments:?}: {said}");
        assert!(said.contains(part), "{arguments:?}: {said}");
        assert!(!stage.file("usr").exists(), "{arguments:?}");
    }
    // What is empty by mistake must not become this host.
    let (code, said) = script("install.sh", &["--root", ""], &[("PATH", &path_without_root(&stage.0))]);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("--root needs a value"), "{said}");
    let (code, said) = stage.install(&[], &[("KMS_AGENT_NO_CHECK", "maybe")]);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("KMS_AGENT_NO_CHECK=maybe: it must be 1 or 0"), "{said}");
    assert!(!stage.file("usr").exists());
}

#[test]
fn help_says_which_options_take_a_value() {
    let (code, help) = script("install.sh", &["--help"], &[]);
    assert_eq!(code, 0);
    for line in [
        "--http-port N ",
        "--region TEXT ",
        "--ssrf-env A,B ",
        "--ca-file FILE ",
        "--app-user A,B ",
        "--root DIR ",
    ] {
        assert!(help.contains(&format!("\n  {line}")), "{line}: {help}");
    }
    assert!(help.contains("\n  --no-check  "), "{help}");
}

#[test]
fn what_cannot_be_finished_is_undone() {
    let stage = Stage::new();
    let manual = stage.file("usr/local/share/man");
    stage.install_well(&["--ttl", "900", "--log-path", "/data/logs"], &[]);
    let before = stage.files();
    // A file where a folder belongs stops root as well; the manual comes after the binary and its configuration.
    fs::remove_dir_all(&manual).unwrap();
    fs::write(&manual, "").unwrap();
    let newer = stage.0.write("newer", "#!/bin/sh\n[ \"$1\" != --version ] || echo kms-agent 99.0\n");
    fs::set_permissions(&newer, fs::Permissions::from_mode(0o755)).unwrap();
    let (code, said) =
        stage.install(&["--binary", newer.to_str().unwrap(), "--ttl", "1", "--log-path", "-"], &[]);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("the installation was not finished; what it had changed was put back"), "{said}");
    assert_eq!(set_keys(&stage.config()), ["TTLSeconds = 900", "LogPath = \"/data/logs\""]);
    assert_eq!(
        fs::read(stage.file(&format!("{HOME}/bin/kms-agent"))).unwrap(),
        fs::read(binary()).unwrap(),
        "the old binary"
    );
    fs::remove_file(&manual).unwrap();
    let mut expected = before;
    expected.remove("usr/local/share/man/man8/kms-agent.8");
    assert_eq!(stage.files(), expected, "nothing is left over, nothing is missing");

    // A first installation leaves no files, only folders.
    let stage = Stage::new();
    let manual = stage.file("usr/local/share/man");
    fs::create_dir_all(manual.parent().unwrap()).unwrap();
    fs::write(&manual, "").unwrap();
    let (code, said) = stage.install(&[], &[]);
    assert_eq!(code, 1, "{said}");
    assert_eq!(stage.files(), ["usr/local/share/man".to_owned()].into());
}

#[test]
fn whoever_calls_it_files_are_the_same() {
    let stage = Stage::new();
    let parent = stage.file("").parent().unwrap().to_owned();
    // From a folder that CDPATH finds, with a umask that shuts others out, and hardly a PATH.
    let line = format!(
        "umask 077; cd '{0}'; CDPATH='{0}' sh '{1}' --root root --binary '{2}' --log-path '/data/my logs'",
        parent.display(),
        packaging("install.sh").display(),
        binary().display()
    );
    let output = command("sh").args(["-c", &line]).env_clear().env("PATH", "/usr/bin:/bin").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for (name, mode) in [
        (HOME, 0o755),
        ("usr/local/alibabacloudkmsagent/config.toml", 0o644),
        ("usr/local/alibabacloudkmsagent/logs", 0o750),
        ("usr/local/bin", 0o755),
        ("usr/local/share/man/man8", 0o755),
        ("etc/systemd/system/kms-agent.service.d", 0o755),
        ("data", 0o755),
        ("data/my logs", 0o750),
    ] {
        let found = fs::metadata(stage.file(name)).unwrap().permissions().mode();
        assert_eq!(found & 0o777, mode, "{name}: {found:o}");
    }
    let drop_in =
        fs::read_to_string(stage.file("etc/systemd/system/kms-agent.service.d/log-path.conf")).unwrap();
    assert!(drop_in.ends_with("\nReadWriteDirectories=\"/data/my logs\"\n"), "{drop_in}");
    // What was made unusable by hand is usable again, though the content is the same.
    let binary = stage.file(&format!("{HOME}/bin/kms-agent"));
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o600)).unwrap();
    stage.install_well(&[], &[]);
    assert_eq!(fs::metadata(&binary).unwrap().permissions().mode() & 0o777, 0o755);
}

#[test]
fn configurations_as_people_write_them() {
    let stage = Stage::new();
    // Elsewhere, behind a link that has every permission itself.
    stage.install_well(&[], &[]);
    let config = stage.file(&format!("{HOME}/config.toml"));
    let elsewhere = stage.file("etc/mine.toml");
    fs::rename(&config, &elsewhere).unwrap();
    std::os::unix::fs::symlink("../../../etc/mine.toml", &config).unwrap();
    stage.install_well(&["--ttl", "5"], &[]);
    assert_eq!(set_keys(&stage.config()), ["TTLSeconds = 5"]);
    assert_eq!(fs::metadata(&config).unwrap().permissions().mode() & 0o777, 0o644);

    let config = stage.0.write(
        "own.toml",
        "  [ Server ]\n\tHttpPort = 2_025\n  [Cache]\n  TTLSeconds = 0x10 # hex\n[Log] # here\r\nLogFileSizeMB = 1_0\r\n",
    );
    stage.install_well(
        &[
            "--config",
            config.to_str().unwrap(),
            "--ttl",
            "5",
            "--http-port",
            "2026",
            "--ssrf-headers",
            "C*,X-|&",
        ],
        &[],
    );
    assert_eq!(
        stage.config(),
        "  [ Server ]\nSSRFHeaders = [\"C*\", \"X-|&\"]\nHttpPort = 2026\n  [Cache]\nTTLSeconds = 5\n[Log] # \
         here\r\nLogFileSizeMB = 1_0\r\n"
    );
}

#[test]
fn what_was_staged_can_be_removed() {
    let stage = Stage::new();
    stage.install_well(&["--log-path", "/data/logs"], &[]);
    let root = stage.file("");
    let uninstall = |more: &[&str]| {
        let mut arguments = vec!["--root", root.to_str().unwrap()];
        arguments.extend(more);
        let (code, said) = script("uninstall.sh", &arguments, &[]);
        assert_eq!(code, 0, "{said}");
    };
    for _ in 0..2 {
        uninstall(&[]);
        assert_eq!(stage.files(), [format!("{HOME}/config.toml")].into());
    }
    for _ in 0..2 {
        uninstall(&["--purge"]);
        assert_eq!(stage.files(), BTreeSet::new());
    }
    // What is empty by mistake must not become this host, and 0 must not become yes.
    let path = path_without_root(&stage.0);
    for arguments in [&["--everything"][..], &["--root"], &["--root", ""], &["--root="]] {
        assert_eq!(script("uninstall.sh", arguments, &[("PATH", &path)]).0, 2, "{arguments:?}");
    }
    stage.install_well(&[], &[]);
    for (purge, code, kept) in [("maybe", 2, true), ("0", 0, true), ("1", 0, false)] {
        let arguments = ["--root", root.to_str().unwrap()];
        assert_eq!(script("uninstall.sh", &arguments, &[("KMS_AGENT_PURGE", purge)]).0, code, "{purge}");
        assert_eq!(stage.file(&format!("{HOME}/config.toml")).exists(), kept, "{purge}");
    }
}

#[test]
fn cloud_assistant_documents_are_what_the_service_takes() {
    for (name, parameters) in
        [("install", &["options", "sha256", "url"][..]), ("status", &[]), ("remove", &["options"])]
    {
        let document: serde_json::Value =
            serde_json::from_str(&text(&format!("cloud-assistant/{name}.json"))).unwrap();
        let keys: Vec<&String> = document.as_object().unwrap().keys().collect();
        assert_eq!(
            keys,
            ["CommandContent", "Description", "EnableParameter", "Name", "Timeout", "Type", "WorkingDir"]
        );
        assert_eq!(document["Type"], "RunShellScript");
        let content = document["CommandContent"].as_str().unwrap();
        // The service's limit counts parameters, too; packaging/cloud-assistant/README.md.
        assert!(content.len() <= 18 * 1024 * 3 / 4, "{name}: {}", content.len());
        let script = text(&format!("cloud-assistant/{name}.sh"));
        assert_eq!(content, base64(script.as_bytes()), "packaging/cloud-assistant/make was not run");
        let found: BTreeSet<&str> = script
            .split("{{")
            .skip(1)
            .map(|rest| rest.split_once("}}").expect("braces only around parameters").0)
            .collect();
        assert_eq!(found, parameters.iter().copied().collect(), "{name}");
        assert_eq!(document["EnableParameter"], !parameters.is_empty());
    }
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for group in bytes.chunks(3) {
        let byte = |index: usize| u32::from(group.get(index).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for place in 0..4 {
            let index = (bits >> (18 - 6 * place)) as usize & 63;
            out.push(if place > group.len() { '=' } else { char::from(ALPHABET[index]) });
        }
    }
    out
}

#[test]
fn the_manual_page_knows_every_command_and_option() {
    let page = text("kms-agent.8");
    let output = common::command(binary()).arg("--help").output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    let (_, commands) = help.split_once("\nCommands:\n").expect("--help has a list of commands");
    let (commands, _) = commands.split_once("\n\n").unwrap();
    for line in commands.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   ")) {
        let command = line.split_whitespace().next().unwrap();
        assert!(page.contains(&format!(".TP\n.B {command}\n")), "kms-agent.8 has {command}");
        let output = common::command(binary()).args([command, "--help"]).output().unwrap();
        let help = String::from_utf8(output.stdout).unwrap();
        let (_, options) = help.split_once("\nOptions:\n").unwrap();
        let options = options.split("\n\n").next().unwrap();
        for option in options.split_whitespace().filter(|word| word.starts_with("--") && word.len() > 2) {
            let option =
                option.trim_end_matches(|letter: char| !letter.is_ascii_alphanumeric()).replace('-', "\\-");
            assert!(page.contains(&option), "kms-agent.8 has {option} of {command}");
        }
    }
}
