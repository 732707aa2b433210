//! Every key's bounds, and what is said of wrong ones.

use super::names::SECTIONS;
use super::reader::SYNTAX_ERRORS_MAX;
use super::sections::CacheSection;
use super::*;
use crate::log::Settings as LogSection;
use ::log::LevelFilter;
use std::fmt::{self, Display};
use std::time::Duration;

/// What comes out of a file with this one key.
fn with(section: &str, key: &str, value: impl Display) -> Result<Config, String> {
    parse(&format!("[{section}]\n{key} = {value}\n")).map_err(|problems| joined(&problems))
}

fn joined(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// The problems of a text, one a line.
fn problems(text: &str) -> String {
    joined(&parse(text).unwrap_err())
}

/// Asserts what a key's value gives, or the message it is refused with.
#[track_caller]
fn check<T: PartialEq + fmt::Debug>(
    section: &str,
    key: &str,
    of: fn(Config) -> T,
    cases: impl IntoIterator<Item = (impl Display, Result<T, &'static str>)>,
) {
    for (value, expected) in cases {
        let expected = expected.map_err(|message| format!("line 2: [{section}] {key} = {message}"));
        assert_eq!(with(section, key, &value).map(of), expected, "{value}");
    }
}

/// `docs/contract.md`, section 2.
#[test]
fn nothing_written_gives_the_defaults_of_the_contract() {
    let expected = Config {
        server: ServerSection {
            http_port: 2025,
            ssrf_headers: vec!["X-KMS-Token".into(), "X-Vault-Token".into()],
            ssrf_env_variables: vec![
                "KMS_TOKEN".into(),
                "KMS_SESSION_TOKEN".into(),
                "KMS_CONTAINER_AUTHORIZATION_TOKEN".into(),
            ],
            path_prefix: "/v1/".into(),
            max_conn: 800,
            response_type: ResponseType::Kms,
            ignore_transient_errors: true,
            allowed_hosts: vec![],
        },
        cache: CacheSection {
            size: 1000,
            bytes: 16_777_216,
            ttl: Duration::from_secs(300),
            max_stale: Duration::from_secs(86_400),
        },
        kms: KmsSection {
            region: None,
            endpoint: None,
            auth_type: AuthType::Auto,
            role_name: None,
            aap_arn: None,
            ca_file: None,
            metadata_endpoint: HostPort { host: "100.100.100.200".into(), port: 80 },
        },
        log: LogSection {
            level: LevelFilter::Debug,
            path: LogPath::Folder("./logs/".into()),
            file_size_mb: 100,
            backup_files: 2,
        },
    };
    assert_eq!(Config::default(), expected);
    for text in ["", "\n# nothing\n", "[Server]\n[Cache]\n[KMS]\n[Log]\n", "\u{feff}[Server]\r\n"] {
        assert_eq!(parse(text), Ok(expected.clone()), "{text:?}");
    }
}

#[test]
fn the_sample_file_shows_every_key_with_its_default() {
    let sample = include_str!("../../packaging/config.toml");
    assert_eq!(parse(sample), Ok(Config::default()), "all commented out");

    // A key's line begins with `#`, a comment's with `# `.
    let key_line = |line: &str| {
        line.strip_prefix('#').filter(|rest| rest.starts_with(char::is_alphabetic)).map(str::to_owned)
    };
    let written: String =
        sample.lines().map(|line| key_line(line).unwrap_or_else(|| line.to_owned()) + "\n").collect();
    assert_eq!(parse(&written), Ok(Config::default()), "all written out");

    let mut shown = Vec::new();
    for line in written.lines() {
        if let Some(section) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            shown.push((section, Vec::new()));
        } else if let (Some((key, _)), false) = (line.split_once(" = "), line.starts_with('#')) {
            shown.last_mut().unwrap().1.push(key);
        }
    }
    let known: Vec<_> = SECTIONS.iter().map(|(section, keys)| (*section, keys.to_vec())).collect();
    assert_eq!(shown, known);
}

#[test]
fn every_key_is_read() {
    // A table is no key's value: a key that nobody reads would let it pass.
    for (section, keys) in SECTIONS {
        for key in keys {
            let message = with(section, key, "{}").unwrap_err();
            assert!(message.starts_with(&format!("line 2: [{section}] {key} = {{}}: must be ")), "{message}");
        }
    }
}

#[test]
fn whole_numbers_have_bounds() {
    type Bounds = (&'static str, &'static str, i64, i64, fn(&Config) -> u64);
    let all: [Bounds; 9] = [
        ("Server", "HttpPort", 0, 65535, |config| config.server.http_port.into()),
        ("Server", "MaxConn", 1, 1000, |config| config.server.max_conn as u64),
        ("Server", "ResponseType", 0, 2, |config| config.server.response_type as u64),
        ("Cache", "CacheSize", 1, 1000, |config| config.cache.size as u64),
        ("Cache", "CacheBytes", 65536, 268_435_456, |config| config.cache.bytes as u64),
        ("Cache", "TTLSeconds", 0, 604_800, |config| config.cache.ttl.as_secs()),
        ("Cache", "MaxStaleSeconds", 0, 604_800, |config| config.cache.max_stale.as_secs()),
        ("Log", "LogFileSizeMB", 1, 1024, |config| config.log.file_size_mb.into()),
        ("Log", "LogBackupFiles", 0, 100, |config| config.log.backup_files.into()),
    ];
    for (section, key, min, max, of) in all {
        for good in [min, min + 1, max - 1, max] {
            let config = with(section, key, good).unwrap();
            assert_eq!(i64::try_from(of(&config)), Ok(good), "{key} = {good}");
        }
        let allowed = match key {
            "ResponseType" => "0 (KMS), 1 (AWS) or 2 (HashiCorp KV)".to_owned(),
            _ => format!("{min} to {max}"),
        };
        let huge = "9".repeat(80);
        for bad in [min - 1, max + 1, i64::MIN, i64::MAX].map(|n| n.to_string()).iter().chain([&huge]) {
            let message = with(section, key, bad).unwrap_err();
            let shown = if *bad == huge { "9".repeat(60) + "…" } else { bad.clone() };
            assert_eq!(message, format!("line 2: [{section}] {key} = {shown}: must be {allowed}"));
        }
        for (bad, must) in [
            (format!("\"{max}\""), "must be a whole number without quotes"),
            (format!("{max}.0"), "must be a whole number without a fraction"),
            ("nan".to_owned(), "must be a whole number without a fraction"),
            ("\"many\"".to_owned(), "must be a whole number and not a string"),
            ("true".to_owned(), "must be a whole number and not true or false"),
            ("[1]".to_owned(), "must be a whole number and not a list"),
            ("1979-05-27".to_owned(), "must be a whole number and not a date or time"),
        ] {
            let message = with(section, key, &bad).unwrap_err();
            assert_eq!(message, format!("line 2: [{section}] {key} = {bad}: {must}, {allowed}"));
        }
    }
}

#[test]
fn whole_numbers_are_read_in_every_form_of_toml() {
    check(
        "Server",
        "HttpPort",
        |config| config.server.http_port,
        [
            ("8_080", Ok(8080)),
            ("+80", Ok(80)),
            ("0x1F90", Ok(8080)),
            ("0o17", Ok(15)),
            ("0b11", Ok(3)),
            ("-0", Ok(0)),
        ],
    );
}

#[test]
fn booleans() {
    check(
        "Server",
        "IgnoreTransientErrors",
        |config| config.server.ignore_transient_errors,
        [
            ("true", Ok(true)),
            ("false", Ok(false)),
            ("\"false\"", Err("\"false\": must be true or false without quotes")),
            ("0", Err("0: must be true or false and not a number")),
        ],
    );
}

#[test]
fn header_names() {
    const NAME: &str = "must be a header name: 1 to 128 letters, digits or !#$%&'*+-.^_`|~";
    for (value, expected) in [
        (r#"["X-a"]"#, Ok(vec!["X-a"])),
        (r#"["1","2","3","4","5","6","7","8"]"#, Ok(vec!["1", "2", "3", "4", "5", "6", "7", "8"])),
        ("[]", Err("[]: must have 1 to 8 elements, and has 0".to_owned())),
        (
            r#"["1","2","3","4","5","6","7","8","9"]"#,
            Err(r#"["1","2","3","4","5","6","7","8","9"]: must have 1 to 8 elements, and has 9"#.to_owned()),
        ),
        (r#"["X Y"]"#, Err(format!(r#""X Y": {NAME}"#))),
        (r#"["X:"]"#, Err(format!(r#""X:": {NAME}"#))),
        (r#"["é"]"#, Err(format!(r#""é": {NAME}"#))),
        (r#"[""]"#, Err(format!(r#""": {NAME}"#))),
        (r#"["X-Token", "x-tokeN"]"#, Err(r#""x-tokeN": is in the list twice"#.to_owned())),
        (r#""X-Token""#, Err(r#""X-Token": must be a list of strings: ["..", ".."]"#.to_owned())),
        ("7", Err("7: must be a list of strings and not a number".to_owned())),
        (r#"["a", 7]"#, Err("7: each element must be a string in quotes and not a number".to_owned())),
    ] {
        let expected = expected
            .map(|names| names.into_iter().map(str::to_owned).collect())
            .map_err(|message| format!("line 2: [Server] SSRFHeaders = {message}"));
        let headers = with("Server", "SSRFHeaders", value).map(|config| config.server.ssrf_headers);
        assert_eq!(headers, expected, "{value}");
    }
    for taken in ["host", "CONNECTION", "Content-Length", "Transfer-Encoding", "Forwarded", "X-Forwarded-For"]
    {
        let message = with("Server", "SSRFHeaders", format!("[\"{taken}\"]")).unwrap_err();
        assert!(message.contains(&format!("\"{taken}\": cannot carry the token")), "{message}");
    }
    for (bytes, is_good) in [(128, true), (129, false)] {
        let value = format!("[\"{}\"]", "x".repeat(bytes));
        assert_eq!(with("Server", "SSRFHeaders", value).is_ok(), is_good, "{bytes}");
    }
}

#[test]
fn environment_variables() {
    let quoted = |count: usize| format!("{:?}", (0..count).map(|n| format!("V{n}")).collect::<Vec<_>>());
    let read = |value: &str| {
        with("Server", "SSRFEnvVariables", value).map(|config| config.server.ssrf_env_variables)
    };
    assert_eq!(read("[]"), Ok(vec![]));
    assert_eq!(read(r#"["_a1", "_A1"]"#), Ok(vec!["_a1".to_owned(), "_A1".to_owned()]));
    assert_eq!(read(&quoted(16)).unwrap().len(), 16);
    assert!(read(&quoted(17)).unwrap_err().ends_with("must have 0 to 16 elements, and has 17"));
    assert!(read(r#"["A", "A"]"#).unwrap_err().ends_with("\"A\": is in the list twice"));
    let name = |bytes| format!("[\"{}\"]", "x".repeat(bytes));
    assert!(read(&name(128)).is_ok());
    for bad in [r#"["A=B"]"#, r#"["1A"]"#, r#"[""]"#, r#"["A B"]"#, r#"["$A"]"#, &name(129)] {
        let message = read(bad).unwrap_err();
        assert!(message.contains("must be the name of an environment variable: 1 to 128 "), "{message}");
    }
}

#[test]
fn path_prefixes() {
    const ENDS: &str = "must begin and end with /";
    const CHARS: &str = "must consist of letters, digits and -._~!$&'()*+,;=:@/ only";
    const DOTS: &str = "must not contain //, /./ or /../";
    for (value, expected) in [
        ("/v1/", Ok(())),
        ("/", Ok(())),
        ("/a/b.c/..d/-._~!$&'()*+,;=:@/", Ok(())),
        ("", Err(ENDS)),
        ("v1/", Err(ENDS)),
        ("/v1", Err(ENDS)),
        ("/v%31/", Err(CHARS)),
        ("/a b/", Err(CHARS)),
        ("/a?/", Err(CHARS)),
        ("/a#/", Err(CHARS)),
        ("/ä/", Err(CHARS)),
        ("//", Err(DOTS)),
        ("/a//b/", Err(DOTS)),
        ("/./", Err(DOTS)),
        ("/a/../", Err(DOTS)),
    ] {
        let expected = expected
            .map(|()| value.to_owned())
            .map_err(|must| format!("line 2: [Server] PathPrefix = \"{value}\": {must}"));
        let prefix =
            with("Server", "PathPrefix", format!("\"{value}\"")).map(|config| config.server.path_prefix);
        assert_eq!(prefix, expected);
    }
    let of_bytes = |bytes: usize| with("Server", "PathPrefix", format!("\"/{}/\"", "x".repeat(bytes - 2)));
    assert!(of_bytes(256).is_ok());
    assert!(of_bytes(257).unwrap_err().ends_with("…: must have at most 256 bytes"));
}

#[test]
fn allowed_hosts() {
    let read = |name: &str| {
        with("Server", "AllowedHosts", format!("[\"{name}\"]"))
            .map(|config| config.server.allowed_hosts.concat())
    };
    for (name, expected) in [
        ("Agent.Internal", "agent.internal"),
        ("kms_agent", "kms_agent"),
        ("10.0.0.1", "10.0.0.1"),
        ("::1", "::1"),
        ("[FE80::0:1]", "fe80::1"),
    ] {
        assert_eq!(read(name).as_deref(), Ok(expected));
    }
    for (name, expected) in [
        ("agent:2025", "without a port"),
        ("[::1]:2025", "without a port"),
        ("http://agent", "without a scheme or a path"),
        ("agent/", "without a scheme or a path"),
        ("*.internal", "wildcards (*) are not supported"),
        ("", "this is empty"),
        ("a..b", "letters, digits and hyphens between dots"),
        ("a b", "letters, digits and hyphens between dots"),
        ("-a", "letters, digits and hyphens between dots"),
        ("a-", "letters, digits and hyphens between dots"),
        ("a.", "letters, digits and hyphens between dots"),
        ("10.0.0.256", "this is not an IPv4 address"),
        ("10.1", "this is not an IPv4 address"),
        ("[::g]", "this is not an IPv6 address in brackets"),
    ] {
        let message = read(name).unwrap_err();
        assert!(message.ends_with(expected), "{message}");
    }
    let names = |count: usize| format!("{:?}", (0..count).map(|n| format!("h{n}")).collect::<Vec<_>>());
    assert!(with("Server", "AllowedHosts", names(64)).is_ok());
    assert!(
        with("Server", "AllowedHosts", names(65))
            .unwrap_err()
            .ends_with("must have 0 to 64 elements, and has 65")
    );
    let twice = with("Server", "AllowedHosts", r#"["A", "a"]"#).unwrap_err();
    assert!(twice.ends_with("\"a\": is in the list twice"), "{twice}");
    let label = "x".repeat(63);
    assert!(read(&label).is_ok());
    assert!(read(&format!("{label}x")).is_err());
    let longest = format!("{label}.{label}.{label}.{}", &label[..61]);
    assert_eq!(longest.len(), 253);
    assert!(read(&longest).is_ok());
    assert!(read(&format!("{longest}x")).is_err());
}

#[test]
fn endpoints() {
    let kms = "kms-vpc.cn-hangzhou.aliyuncs.com";
    for (text, host, port) in [
        (kms, kms, 443),
        ("KMS.Example.com:8443", "kms.example.com", 8443),
        ("127.0.0.1:1", "127.0.0.1", 1),
        ("host:65535", "host", 65535),
        ("[::1]", "::1", 443),
        ("[2001:DB8:0::1]:8443", "2001:db8::1", 8443),
    ] {
        let endpoint = with("KMS", "Endpoint", format!("\"{text}\"")).unwrap().kms.endpoint;
        assert_eq!(endpoint, Some(HostPort { host: host.to_owned(), port }), "{text}");
    }
    assert_eq!(with("KMS", "Endpoint", "\"\"").unwrap().kms.endpoint, None);
    for (text, expected) in [
        ("https://kms.example.com", "must be host or host:port, without https://"),
        ("kms.example.com/path", "must be host or host:port, without a path or anything else after it"),
        ("kms.example.com/", "must be host or host:port, without a path or anything else after it"),
        ("kms?x", "must be host or host:port, without a path or anything else after it"),
        ("::1", "must be host or host:port, and an IPv6 address must be in brackets: [::1]:443"),
        ("host:", "must be host or host:port, and the port must be 1 to 65535"),
        ("host:0", "must be host or host:port, and the port must be 1 to 65535"),
        ("host:65536", "must be host or host:port, and the port must be 1 to 65535"),
        ("host:+80", "must be host or host:port, and the port must be 1 to 65535"),
        ("[::1]:x", "must be host or host:port, and the port must be 1 to 65535"),
        ("[::1", "must be a host name or an IP address: this is not an IPv6 address in brackets"),
        ("[::1]80", "must be a host name or an IP address: this is not an IPv6 address in brackets"),
        ("[fe80::1%eth0]", "must be a host name or an IP address: this is not an IPv6 address in brackets"),
        (":443", "must be a host name or an IP address: this is empty"),
        (
            "user@host",
            "must be a host name or an IP address: a name has letters, digits and hyphens between dots",
        ),
        (
            "<instance>.kms",
            "must be a host name or an IP address: a name has letters, digits and hyphens between dots",
        ),
        ("1.2.3", "must be a host name or an IP address: this is not an IPv4 address"),
    ] {
        let message = with("KMS", "Endpoint", format!("\"{text}\"")).unwrap_err();
        assert_eq!(message, format!("line 2: [KMS] Endpoint = \"{text}\": {expected}"));
    }
}

#[test]
fn hosts_and_ports_are_shown_as_in_a_url() {
    for (text, shown, authority) in [
        ("kms.example.com", "kms.example.com:443", "kms.example.com"),
        ("kms.example.com:8443", "kms.example.com:8443", "kms.example.com:8443"),
        ("[::1]", "[::1]:443", "[::1]"),
        ("[::1]:80", "[::1]:80", "[::1]:80"),
    ] {
        let endpoint = HostPort::parse(text, 443).unwrap();
        assert_eq!(endpoint.to_string(), shown);
        assert_eq!(endpoint.authority(443), authority);
        assert_eq!(HostPort::parse(shown, 1), Ok(endpoint), "and read back");
    }
}

#[test]
fn metadata_endpoints() {
    let host = |host: &str, port| Ok(HostPort { host: host.to_owned(), port });
    check(
        "KMS",
        "MetadataEndpoint",
        |config| config.kms.metadata_endpoint,
        [
            (r#""http://100.100.100.200""#, host("100.100.100.200", 80)),
            (r#""http://localhost:8080/""#, host("localhost", 8080)),
            (r#""http://[::1]:8080""#, host("::1", 8080)),
            (
                r#""https://100.100.100.200""#,
                Err(
                    r#""https://100.100.100.200": must begin with http://: the metadata service does not use TLS"#,
                ),
            ),
            (r#""100.100.100.200""#, Err(r#""100.100.100.200": must be http://host or http://host:port"#)),
            (r#""""#, Err(r#""": must be http://host or http://host:port"#)),
            (
                r#""http://a/latest""#,
                Err(
                    r#""http://a/latest": what follows http:// must be host or host:port, without a path or anything else after it"#,
                ),
            ),
        ],
    );
}

#[test]
fn regions_and_role_names() {
    let quoted = |text: &str| format!("\"{text}\"");
    let region = |text: &str| with("KMS", "Region", quoted(text)).map(|config| config.kms.region);
    let role = |text: &str| with("KMS", "RoleName", quoted(text)).map(|config| config.kms.role_name);
    assert_eq!(region("cn-hangzhou"), Ok(Some("cn-hangzhou".to_owned())));
    assert_eq!(region(""), Ok(None));
    assert_eq!(role("Role_1.a-b"), Ok(Some("Role_1.a-b".to_owned())));
    assert_eq!(role(""), Ok(None));
    assert!(region(&"a".repeat(32)).is_ok() && role(&"a".repeat(64)).is_ok());
    for bad in [&*"a".repeat(33), "CN-hangzhou", "cn_hangzhou", "cn.hangzhou", " ", "<Region>"] {
        assert!(region(bad).unwrap_err().contains("must be a region id such as cn-hangzhou"), "{bad}");
    }
    for bad in [&*"a".repeat(65), "a b", "a/b", "ä", ".", ".."] {
        assert!(role(bad).unwrap_err().contains("must be the name of a RAM role: 1 to 64"), "{bad}");
    }
}

#[test]
fn authentication_types() {
    let arn = "AapArn = \"acs:kms:cn-hangzhou:1234567890123456:applicationaccesspoint/app\"\n";
    for (name, expected) in [
        ("auto", AuthType::Auto),
        ("ram_role", AuthType::RamRole),
        ("instance_identity", AuthType::InstanceIdentity),
        ("access_key", AuthType::AccessKey),
        ("oidc", AuthType::Oidc),
    ] {
        let config = parse(&format!("[KMS]\n{arn}AuthType = \"{name}\"\n")).unwrap();
        assert_eq!(config.kms.auth_type, expected);
    }
    for bad in ["", "Auto", "ram-role", " auto"] {
        let message = with("KMS", "AuthType", format!("\"{bad}\"")).unwrap_err();
        let must = "must be auto, ram_role, instance_identity, access_key or oidc";
        assert_eq!(message, format!("line 2: [KMS] AuthType = \"{bad}\": {must}"));
    }
    for no_arn in ["", "AapArn = \"\"\n"] {
        assert_eq!(
            problems(&format!("[KMS]\nAuthType = \"instance_identity\"\n{no_arn}")),
            "line 2: [KMS] AuthType = \"instance_identity\": also needs AapArn, which names the application access point"
        );
    }
    let wrong_arn = problems("[KMS]\nAuthType = \"instance_identity\"\nAapArn = \"x\"\n");
    assert!(
        wrong_arn.starts_with("line 3: [KMS] AapArn") && !wrong_arn.contains('\n'),
        "one problem: {wrong_arn}"
    );
}

#[test]
fn region_and_endpoint_follow_from_each_other() {
    let arn = "AapArn = \"acs:kms:cn-a:1234567890123456:applicationaccesspoint/app\"\n";
    for (keys, region, endpoint) in [
        ("", None, None),
        ("Region = \"cn-b\"\n", Some("cn-b"), Some("kms-vpc.cn-b.aliyuncs.com:443")),
        (arn, Some("cn-a"), Some("kms-vpc.cn-a.aliyuncs.com:443")),
        (&format!("{arn}Region = \"cn-a\"\n"), Some("cn-a"), Some("kms-vpc.cn-a.aliyuncs.com:443")),
        (&format!("{arn}Endpoint = \"kms.test\"\n"), Some("cn-a"), Some("kms.test:443")),
        ("Endpoint = \"kms.test:1\"\n", None, Some("kms.test:1")),
    ] {
        let kms = parse(&format!("[KMS]\n{keys}")).unwrap().kms;
        assert_eq!(kms.region(), region, "{keys}");
        assert_eq!(kms.endpoint().map(|it| it.to_string()).as_deref(), endpoint, "{keys}");
    }
    let elsewhere = problems(&format!("[KMS]\nRegion = \"cn-b\"\n{arn}"));
    assert!(elsewhere.starts_with("line 3: [KMS] AapArn = "), "{elsewhere}");
    assert!(
        elsewhere.ends_with(": is in cn-a, but Region is cn-b: both must name the same region"),
        "{elsewhere}"
    );
}

#[test]
fn an_instance_endpoint_needs_the_private_ca() {
    let endpoint = "[KMS]\nEndpoint = \"kst-1.cryptoservice.kms.aliyuncs.com\"\n";
    assert!(parse(&format!("{endpoint}CaFile = \"ca.pem\"\n")).is_ok());
    for no_ca in ["", "CaFile = \"\"\n"] {
        let problem = problems(&format!("{endpoint}{no_ca}"));
        assert!(
            problem.starts_with("line 2: [KMS] Endpoint = ") && problem.contains("also needs CaFile"),
            "{problem}"
        );
        assert!(problem.contains("GetKmsInstance") && !problem.contains("  "), "{problem}");
    }
}

#[test]
fn application_access_points() {
    let text = "acs:kms:cn-hangzhou:1234567890123456:applicationaccesspoint/App_1.a-b";
    let arn = with("KMS", "AapArn", format!("\"{text}\"")).unwrap().kms.aap_arn.unwrap();
    assert_eq!((&*arn.region, &*arn.account, &*arn.name), ("cn-hangzhou", "1234567890123456", "App_1.a-b"));
    assert_eq!(arn.as_str(), text);
    assert_eq!(with("KMS", "AapArn", "\"\"").unwrap().kms.aap_arn, None);
    let of = |region: &str, account: &str, name: &str| {
        AapArn::parse(&format!("acs:kms:{region}:{account}:applicationaccesspoint/{name}"))
    };
    let (r32, a20, n128) = ("r".repeat(32), "1".repeat(20), "n".repeat(128));
    assert!(of(&r32, &a20, &n128).is_ok());
    for (region, account, name) in [
        ("", "1", "n"),
        ("r", "", "n"),
        ("r", "1", ""),
        ("R", "1", "n"),
        ("r", "x", "n"),
        ("r", "1", "a/b"),
        ("r", "1", "a:b"),
        (&*format!("{r32}r"), "1", "n"),
        ("r", &*format!("{a20}1"), "n"),
        ("r", "1", &*format!("{n128}n")),
    ] {
        assert!(of(region, account, name).is_err(), "{region} {account} {name}");
    }
    for bad in [
        "acs:kms",
        "acs:ram:r:1:applicationaccesspoint/n",
        "acs:kms:r:1:secret/n",
        "ACS:kms:r:1:applicationaccesspoint/n",
    ] {
        assert!(AapArn::parse(bad).unwrap_err().starts_with("must be acs:kms:<region>:<account>:"), "{bad}");
    }
}

#[test]
fn paths() {
    let ca_file = |text: &str| with("KMS", "CaFile", format!("\"{text}\"")).map(|config| config.kms.ca_file);
    assert_eq!(ca_file("ca/private.pem"), Ok(Some("ca/private.pem".into())), "as written");
    assert_eq!(ca_file(""), Ok(None));
    assert!(ca_file(&"x".repeat(4095)).is_ok());
    assert!(ca_file(&"x".repeat(4096)).unwrap_err().ends_with("must be a path of 1 to 4095 bytes"));
    assert!(ca_file("a\\u0000b").unwrap_err().ends_with("must be a path without control characters"));
    check(
        "Log",
        "LogPath",
        |config| config.log.path,
        [
            ("\"-\"", Ok(LogPath::Stderr)),
            ("'/var/log/kms-agent'", Ok(LogPath::Folder("/var/log/kms-agent".into()))),
            ("\"\"", Err("\"\": must be a folder, or \"-\" for standard error")),
            ("7", Err("7: must be a string in quotes and not a number")),
        ],
    );
}

#[test]
fn log_levels() {
    check(
        "Log",
        "LogLevel",
        |config| config.log.level,
        [
            ("\"debug\"", Ok(LevelFilter::Debug)),
            ("\"INFO\"", Ok(LevelFilter::Info)),
            ("\"Warn\"", Ok(LevelFilter::Warn)),
            ("\"error\"", Ok(LevelFilter::Error)),
            ("\"trace\"", Err("\"trace\": must be debug, info, warn or error")),
            ("\"off\"", Err("\"off\": must be debug, info, warn or error")),
            ("\"\"", Err("\"\": must be debug, info, warn or error")),
        ],
    );
}

#[test]
fn unknown_names_come_with_the_nearest_known_one() {
    for (text, expected) in [
        ("[Server]\nHttpPrt = 1", "line 2: [Server] HttpPrt: unknown key; did you mean HttpPort?"),
        (
            "[Server]\nPort = 1",
            "line 2: [Server] Port: unknown key; the keys of [Server] are HttpPort, SSRFHeaders, SSRFEnvVariables, PathPrefix, MaxConn, ResponseType, IgnoreTransientErrors, AllowedHosts",
        ),
        ("[Server]\nhttp_port = 1", "line 2: [Server] http_port: unknown key; did you mean HttpPort?"),
        (
            "[Server]\nhttpport = 1",
            "line 2: [Server] httpport: unknown key; did you mean HttpPort? (upper and lower case matter)",
        ),
        ("[Server]\nTTLSeconds = 1", "line 2: [Server] TTLSeconds: unknown key; it belongs in [Cache]"),
        (
            "[Server]\nttlSecond = 1",
            "line 2: [Server] ttlSecond: unknown key; did you mean TTLSeconds in [Cache]?",
        ),
        ("[Log]\nLevel = 1", "line 2: [Log] Level: unknown key; did you mean LogLevel?"),
        (
            "[Log]\nxyz = 1",
            "line 2: [Log] xyz: unknown key; the keys of [Log] are LogLevel, LogPath, LogFileSizeMB, LogBackupFiles",
        ),
        ("[Cache.CacheSizes]\nx = 1", "line 1: [Cache] CacheSizes: unknown key; did you mean CacheSize?"),
        ("\n[server]\n", "line 2: [server]: unknown section; did you mean [Server]?"),
        ("[Sever]\n", "line 1: [Sever]: unknown section; did you mean [Server]?"),
        (
            "[Storage]\n",
            "line 1: [Storage]: unknown section; the sections are [Server], [Cache], [KMS], [Log]",
        ),
        ("HttpPort = 1", "line 1: HttpPort: this key is outside of any section; it belongs in [Server]"),
        (
            "httpPort = 1",
            "line 1: httpPort: this key is outside of any section; did you mean HttpPort in [Server]?",
        ),
        (
            "x = 1",
            "line 1: x: this key is outside of any section; the sections are [Server], [Cache], [KMS], [Log]",
        ),
        ("Server = 1", "line 1: [Server]: must be one section: a line [Server] with its keys below it"),
        (
            "[[Log]]\nLogLevel = 'info'",
            "line 1: [Log]: must be one section: a line [Log] with its keys below it",
        ),
        (
            "[Log]\n\"a\\nb\" = 1",
            "line 2: [Log] a…: unknown key; the keys of [Log] are LogLevel, LogPath, LogFileSizeMB, LogBackupFiles",
        ),
    ] {
        assert_eq!(problems(text), expected, "{text}");
    }
}

#[test]
fn the_value_of_an_unknown_key_is_not_shown() {
    for text in [
        "[KMS]\nAccessKeySecret = 'hunter2'",
        "AccessKeySecret = 'hunter2'",
        "[KMS]\nAccessKeySecret = hunter2",
    ] {
        assert!(!problems(text).contains("hunter2"), "{text}");
    }
}

#[test]
fn all_problems_come_together_and_sorted() {
    let text = "\
# a comment
[Log]
LogLevel = 'verbose'

[Server]
HttpPort = 70000
SSRFHeaders = [
'X-Good',
'X Bad',
'Host',
]
PathPrefix = 'v1'
MaxCon = 3

[Storage]
[KMS]
AuthType = 'instance_identity'
";
    let lines: Vec<_> =
        parse(text).unwrap_err().iter().map(|problem| (problem.line.unwrap(), problem.key.clone())).collect();
    let expected = [
        (3, Some("[Log] LogLevel")),
        (6, Some("[Server] HttpPort")),
        (9, Some("[Server] SSRFHeaders")),
        (10, Some("[Server] SSRFHeaders")),
        (12, Some("[Server] PathPrefix")),
        (13, Some("[Server] MaxCon")),
        (15, Some("[Storage]")),
        (17, Some("[KMS] AuthType")),
    ]
    .map(|(line, key)| (line, key.map(str::to_owned)));
    assert_eq!(lines, expected);
}

#[test]
fn syntax_errors_have_their_line_once() {
    for (text, expected) in [
        ("[Server\nHttpPort = 1\n", "line 1: syntax error: unclosed table, expected `]`"),
        (
            "[Server]\nHttpPort =\nMaxConn = 3\n",
            "line 2: syntax error: string values must be quoted, expected literal string",
        ),
        ("[Server]\n\nHttpPort 12\n", "line 3: syntax error: key with no value, expected `=`"),
        (
            "[Server]\nPathPrefix = \"/v1/\nMaxConn = 3\n",
            "line 2: syntax error: invalid basic string, expected `\"`",
        ),
        ("[Server]\nMaxConn = 3\nMaxConn = 4\n", "line 3: syntax error at MaxConn: duplicate key"),
        ("[Log]\n[Cache]\n[Log]\n", "line 3: syntax error at Log: duplicate key"),
    ] {
        assert_eq!(problems(text), expected, "{text}");
    }
    // What is wrong otherwise is left for when the file can be read.
    let both =
        problems("[Server]\nMaxConn = many\nHttpPort = -1\nAllowedHosts = [1 2]\n[Cache]\nCacheSize = 0");
    let lines: Vec<_> =
        both.lines().map(|line| line.split(' ').take(3).collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(lines, ["line 2: syntax", "line 4: syntax"]);
    let many = problems(&"=\n".repeat(1000));
    assert_eq!(many.lines().count(), SYNTAX_ERRORS_MAX);
}

#[test]
fn any_text_is_taken() {
    let text = "[Server]\nHttpPort=0x1\nSSRFHeaders=['a',\"b\\u00e9\"]\n[KMS]\nEndpoint='[::1]:1'\n[[x]]\na.b={c=1}\n";
    for (offset, _) in text.char_indices() {
        let _ = parse(&text[..offset]);
        let _ = parse(&text[offset..]);
        for piece in ["\"", "'''", "[", "{", "=", "\n", "\0", "é", "\r", "#", "\u{2028}"] {
            let _ = parse(&format!("{}{piece}{}", &text[..offset], &text[offset..]));
        }
    }
    for nested in
        ["[".repeat(50_000), "a={".repeat(50_000), "a.".repeat(50_000), format!("a={}", "[".repeat(50_000))]
    {
        assert!(parse(&nested).is_err());
    }
    let long = format!("[Server]\n{}=1\nPathPrefix='{}'\n", "k".repeat(100_000), "ü".repeat(100_000));
    assert!(problems(&long).lines().all(|line| line.chars().count() < 400));
}

#[test]
fn files_that_cannot_be_read_as_text() {
    let lines = |bytes: &[u8]| joined(&parse_bytes(bytes).unwrap_err());
    assert_eq!(lines(b"[Log]\n# \xff\n"), "line 2: must be UTF-8 text");
    assert_eq!(lines(&[b'\n'; 65537]), "must not be larger than 65536 bytes");
    assert!(parse_bytes(&[b'\n'; 65536]).is_ok());
}

#[test]
fn load_says_which_file() {
    let path = std::env::temp_dir().join(format!("kms-agent-config-{}.toml", std::process::id()));
    let shown = path.display();
    let error = load(&path).unwrap_err().to_string();
    assert_eq!(error, format!("cannot read the configuration {shown}: No such file or directory"));
    let of = |text: &str| {
        std::fs::write(&path, text).unwrap();
        let result = load(&path).map_err(|error| error.to_string());
        std::fs::remove_file(&path).unwrap();
        result
    };
    assert_eq!(of("[Server]\nHttpPort = 1\n").unwrap().server.http_port, 1);
    assert_eq!(
        of("[Server]\nHttpPort = 70000\n").unwrap_err(),
        format!(
            "1 problem in the configuration {shown}:\n  line 2: [Server] HttpPort = 70000: must be 0 to 65535"
        )
    );
    let two = of("[Server]\nHttpPort = 70000\nMaxConn = 0\n").unwrap_err();
    assert_eq!(two.lines().count(), 3);
    assert!(two.starts_with(&format!("2 problems in the configuration {shown}:\n")));
}

#[test]
fn default_paths() {
    for (exe, expected) in [
        (
            "/usr/local/alibabacloudkmsagent/bin/kms-agent",
            Some("/usr/local/alibabacloudkmsagent/config.toml"),
        ),
        ("/bin/kms-agent", Some("/config.toml")),
        ("bin/kms-agent", Some("config.toml")),
        ("/kms-agent", None),
        ("kms-agent", None),
        ("", None),
    ] {
        assert_eq!(default_path(Path::new(exe)), expected.map(PathBuf::from), "{exe}");
    }
}
