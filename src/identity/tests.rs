//! Whole conversations, the services made by hand.

use super::error::ServiceError;
use super::*;
use crate::call::Service;
use crate::config::{AapArn, AuthType, HostPort};
use crate::http::response::ResponseParser;
use std::collections::BTreeMap;

const START_UNIX_S: i64 = 1_735_787_045; // 2025-01-02T03:04:05Z
const ROLES: &str = "GET /latest/meta-data/ram/security-credentials/";
const APP: &str = "GET /latest/meta-data/ram/security-credentials/app";
const AAP: &str = "acs:kms:cn-hangzhou:1234567890123456:applicationaccesspoint/app";

fn at(seconds: u64) -> Now {
    Now {
        mono: Mono::from_micros(seconds * 1_000_000),
        unix_s: START_UNIX_S + i64::try_from(seconds).unwrap(),
    }
}

/// The members of credentials that end so many seconds after [`START_UNIX_S`].
fn members(id: &str, ends_s: i64) -> String {
    let end = ::time::OffsetDateTime::from_unix_timestamp(START_UNIX_S + ends_s).unwrap();
    let end = end.format(&::time::format_description::well_known::Rfc3339).unwrap();
    format!(
        r#""AccessKeyId":"{id}","AccessKeySecret":"hush-key","SecurityToken":"hush-token","Expiration":"{end}""#
    )
}

fn flat(id: &str, ends_s: i64) -> String {
    format!(r#"{{"Code":"Success",{}}}"#, members(id, ends_s))
}

fn nested(id: &str, ends_s: i64) -> String {
    format!(r#"{{"RequestId":"r","Credentials":{{{}}}}}"#, members(id, ends_s))
}

fn kms(change: impl FnOnce(&mut KmsSection)) -> KmsSection {
    let endpoint = Some(HostPort { host: "kms.test".into(), port: 443 });
    let mut kms = KmsSection { endpoint, ..KmsSection::default() };
    change(&mut kms);
    kms
}

type Variables = [(&'static str, &'static str)];

fn configured(kms: &KmsSection, variables: &Variables) -> Result<Identity, NotConfigured> {
    let variables: BTreeMap<_, _> = variables.iter().copied().collect();
    let env = |name: &str| variables.get(name).map(OsString::from);
    Identity::from_config(kms, &env, Random::from_seed(1))
}

/// A reply: status, body, and `Date` as seconds from what our clock shows.
#[derive(Clone)]
struct Reply(u16, String, Option<i64>);

impl Reply {
    fn new(status: u16, body: impl Into<String>) -> Reply {
        Reply(status, body.into(), None)
    }
}

/// An identity, and what it asked: where, and each request whole.
struct Rig {
    identity: Identity,
    now: Now,
    asked: Vec<(Peer, String)>,
}

impl Rig {
    fn new(kms: &KmsSection, variables: &Variables) -> Rig {
        Rig { identity: configured(kms, variables).unwrap(), now: at(0), asked: Vec::new() }
    }

    fn ram_role() -> Rig {
        Rig::new(&kms(|it| it.role_name = Some("app".into())), &[])
    }

    /// Answers each question by the first of `replies` that its request begins with; 403 where there is none.
    /// What `None` replies to cannot be reached.
    fn converse(&mut self, replies: &[(&str, Option<Reply>)]) {
        while let Some(question) = self.identity.poll(self.now.mono) {
            let mut out = Vec::new();
            self.identity.write_request(&mut out, self.now);
            let request = String::from_utf8(out).unwrap();
            let authority = question.origin.authority(question.service.default_port());
            assert!(request.contains(&format!("\r\nHost: {authority}\r\n")), "{request}");
            let reply = replies.iter().find(|(begin, _)| request.starts_with(begin));
            let reply = reply.map_or(Some(Reply::new(403, "")), |(_, reply)| reply.clone());
            self.asked.push((question.clone(), request));
            assert!(self.asked.len() < 30, "{:?}", self.asked);
            match reply {
                None => {
                    let error = CallError::unreachable("connect", &question.origin, "connection refused");
                    self.identity.on_answer(Err(&error), self.now);
                }
                Some(Reply(status, body, date)) => {
                    let date = date.map(|offset| {
                        let unix_s = u64::try_from(self.now.unix_s + offset).unwrap();
                        httpdate::fmt_http_date(std::time::UNIX_EPOCH + Duration::from_secs(unix_s))
                    });
                    let date = date.map(|date| format!("Date: {date}\r\n")).unwrap_or_default();
                    let mut parser = ResponseParser::new(100_000);
                    let length = body.len();
                    let bytes =
                        format!("HTTP/1.1 {status} X\r\n{date}Content-Length: {length}\r\n\r\n{body}");
                    parser.feed(bytes.as_bytes()).unwrap();
                    self.identity.on_answer(Ok(&parser.into_response()), self.now);
                }
            }
        }
    }

    /// The same at this time.
    fn converse_at(&mut self, seconds: u64, replies: &[(&str, Option<Reply>)]) {
        self.now = at(seconds);
        self.converse(replies);
    }

    /// The access key id that it has, or why it has none.
    fn stands(&mut self) -> Result<String, String> {
        match self.identity.credentials(self.now.mono) {
            CredentialState::Ready(credentials) => Ok(credentials.access_key_id.clone()),
            CredentialState::Failed { error, .. } => Err(error.to_string()),
            CredentialState::Pending => Err("pending".into()),
        }
    }

    fn credentials(&mut self) -> Rc<Credentials> {
        let CredentialState::Ready(credentials) = self.identity.credentials(self.now.mono) else { panic!() };
        Rc::clone(credentials)
    }

    /// The request lines so far, with a mark at those that showed a metadata token.
    fn lines(&mut self) -> Vec<String> {
        let line = |(_, request): (Peer, String)| {
            let line = request.lines().next().unwrap().strip_suffix(" HTTP/1.1").unwrap();
            let token = request.contains("X-aliyun-ecs-metadata-token: ");
            format!("{line}{}", if token { " +token" } else { "" })
        };
        std::mem::take(&mut self.asked).into_iter().map(line).collect()
    }
}

fn ok(body: impl Into<String>) -> Option<Reply> {
    Some(Reply::new(200, body))
}

fn token() -> (&'static str, Option<Reply>) {
    ("PUT /latest/api/token ", ok(" tok "))
}

#[test]
fn renewed_at_80_per_cent_or_15_minutes_ahead_whichever_is_later() {
    for (life_s, renew_s) in [(1000, 800), (3600, 2880), (6 * 3600, 6 * 3600 - 900)] {
        let (ends, renew) = term(Duration::from_secs(life_s), at(100).mono);
        assert_eq!((ends, renew), (at(100 + life_s).mono, at(100 + renew_s).mono));
    }
}

#[test]
fn kept_to_their_end_when_renewal_fails_and_healed_after() {
    let good = [token(), (APP, ok(flat("STS.1", 1000)))];
    let bad = [token(), (APP, Some(Reply::new(500, "")))];
    let mut rig = Rig::ram_role();
    assert_eq!(rig.stands().unwrap_err(), "pending");
    assert_eq!((rig.identity.expires_unix_s(), rig.identity.is_ready(at(0).mono)), (None, false));
    rig.converse(&good);
    assert_eq!(rig.stands().unwrap(), "STS.1");
    assert_eq!(rig.identity.expires_unix_s(), Some(START_UNIX_S + 1000));
    assert!(rig.identity.is_ready(at(999).mono) && !rig.identity.is_ready(at(1000).mono));
    assert_eq!(rig.identity.next_deadline(), at(800).mono);
    assert_eq!(rig.lines().len(), 2);

    rig.converse_at(799, &bad);
    assert_eq!(rig.lines().len(), 0, "not yet");
    rig.now = at(800);
    assert!(rig.identity.poll(rig.now.mono).is_some());
    assert!(rig.identity.poll(rig.now.mono).is_none(), "one fetch at a time");
    let timeout = CallError::timeout("reply of", &HostPort { host: "m".into(), port: 80 }, Duration::ZERO);
    rig.identity.on_answer(Err(&timeout), rig.now);
    rig.now = at(999);
    assert_eq!(rig.stands().unwrap(), "STS.1");
    assert!(rig.identity.next_deadline() <= at(801).mono, "retried soon");
    rig.now = at(1000);
    assert_eq!(rig.stands().unwrap_err(), "pending", "somebody waits: asked at once");
    rig.converse(&bad);
    assert_eq!(rig.stands().unwrap_err(), "metadata service: it answered 500");
    rig.converse_at(1011, &[token(), (APP, ok(flat("STS.2", 9000)))]);
    assert_eq!(rig.stands().unwrap(), "STS.2");
}

#[test]
fn a_burst_of_refusals_renews_once() {
    let mut rig = Rig::ram_role();
    let renew = |rig: &mut Rig, id| rig.converse(&[token(), (APP, ok(flat(id, 9000)))]);
    renew(&mut rig, "STS.1");
    let old = rig.credentials();
    rig.now = at(1);
    assert!(rig.identity.refused(&old, at(1).mono) && rig.identity.refused(&old, at(1).mono));
    renew(&mut rig, "STS.2");
    assert!(rig.identity.refused(&old, at(2).mono));
    let new = rig.credentials();
    assert!(!rig.identity.refused(&new, at(1).mono), "renewed a moment ago: no use");
    rig.identity.accepted();
    assert!(rig.identity.refused(&new, at(1).mono), "they had worked");
    renew(&mut rig, "STS.3");
    assert_eq!(rig.stands().unwrap(), "STS.3");
    assert!(rig.identity.poll(at(2).mono).is_none());
}

#[test]
fn a_clock_that_is_hours_wrong_ends_no_credentials() {
    for offset in [-6 * 3600, 6 * 3600] {
        let mut rig = Rig::ram_role();
        let reply = |body: String| Some(Reply(200, body, Some(offset)));
        rig.converse(&[("PUT", reply("tok".into())), (APP, reply(flat("STS.1", offset + 1000)))]);
        assert_eq!(rig.stands().unwrap(), "STS.1");
        assert_eq!(rig.identity.next_deadline(), at(800).mono, "judged by the service's clock");
        assert_eq!(rig.identity.clock_offset_s(), offset);
    }
    let mut rig = Rig::ram_role();
    rig.converse(&[token(), (APP, ok(flat("STS.1", -5)))]);
    let error = rig.stands().unwrap_err();
    assert!(error.contains("expired at 2025-01-02T03:04:00Z") && error.contains("clock is wrong"), "{error}");
}

#[test]
fn trouble_is_told_when_it_changes_and_once_a_minute() {
    let mut trouble = Trouble::default();
    let mut told = Vec::new();
    for (second, text) in [(0, "a"), (1, "a"), (2, "b"), (3, "b"), (50, "b"), (61, "b"), (62, "b"), (63, "a")]
    {
        let before = (trouble.told.clone(), trouble.at);
        trouble.tell(text.to_owned(), at(second).mono);
        if before != (trouble.told.clone(), trouble.at) {
            told.push((second, trouble.left_out));
        }
    }
    assert_eq!(told, [(0, 0), (2, 0), (62, 0), (63, 0)]);
    trouble.tell("a".to_owned(), at(64).mono);
    assert_eq!(trouble.left_out, 1);
    trouble.tell("a".to_owned(), at(123).mono);
    assert_eq!(trouble.left_out, 0, "told again");
}

#[test]
fn hardened_mode_is_asked_first_and_its_token_is_kept() {
    let mut rig = Rig::new(&KmsSection::default(), &[]);
    let service = [
        token(),
        ("GET /latest/meta-data/region-id ", ok("cn-hangzhou\n")),
        (APP, ok(flat("STS.1", 1000))),
        (ROLES, ok("app\n")),
    ];
    assert_eq!((rig.stands().unwrap_err().as_str(), rig.identity.asked_for()), ("pending", "the region"));
    rig.converse(&service);
    assert_eq!(rig.stands().unwrap(), "STS.1");
    assert_eq!(rig.identity.asked_for(), "the instance's RAM role");
    assert_eq!(
        rig.lines(),
        [
            "PUT /latest/api/token",
            "GET /latest/meta-data/region-id +token",
            &format!("{ROLES} +token"),
            &format!("{APP} +token"),
        ]
    );
    assert_eq!(rig.identity.region(), Some("cn-hangzhou"));
    rig.converse_at(800, &[(APP, ok(flat("STS.2", 9000))), (ROLES, ok("app\n"))]);
    assert_eq!(rig.lines().len(), 2, "neither token nor region are asked again");
}

#[test]
fn what_only_the_metadata_service_could_mend_is_told_apart() {
    let of = |source, problem| IdentityError::Service(source, problem);
    let unreachable = || ServiceError::Unreachable("x".into());
    for (error, needs_metadata) in [
        (of(CredentialSource::Metadata, unreachable()), true),
        (of(CredentialSource::Metadata, ServiceError::Status(500)), true),
        (of(CredentialSource::Metadata, ServiceError::Status(499)), false),
        (of(CredentialSource::Sts, unreachable()), false),
        (IdentityError::Region(Box::new(of(CredentialSource::Metadata, unreachable()))), true),
        (IdentityError::Everyone(vec![("a", of(CredentialSource::Metadata, unreachable()))]), false),
    ] {
        assert_eq!(error.needs_metadata(), needs_metadata, "{error:?}");
    }
}

#[test]
fn plain_where_tokens_are_unknown() {
    let service = [("PUT", Some(Reply::new(404, ""))), (APP, ok(flat("STS.1", 1000)))];
    let mut rig = Rig::ram_role();
    rig.converse(&service);
    assert_eq!(rig.lines(), ["PUT /latest/api/token", APP]);
    let role = kms(|it| it.role_name = Some("app".into()));
    let mut rig = Rig::new(&role, &[("ALIBABA_CLOUD_IMDSV1_DISABLED", "TRUE")]);
    rig.converse(&service);
    assert_eq!(rig.lines(), ["PUT /latest/api/token"]);
    assert!(rig.stands().unwrap_err().contains("hardened mode failed"));

    let mut rig = Rig::ram_role();
    rig.converse(&[("PUT", Some(Reply::new(403, ""))), (APP, Some(Reply::new(403, "")))]);
    let error = rig.stands().unwrap_err();
    assert!(
        error.contains("gives no session token, and it refused a request without one with 403; check"),
        "{error}"
    );
}

#[test]
fn a_refused_token_is_replaced_once() {
    let mut rig = Rig::ram_role();
    rig.converse(&[token(), (APP, Some(Reply::new(401, "")))]);
    assert_eq!(rig.lines().iter().filter(|line| line.starts_with("PUT")).count(), 2);
    assert!(
        rig.stands().unwrap_err().contains("refused a request with 401, although the session token was new")
    );
}

#[test]
fn the_metadata_services_failures_say_what_to_do() {
    let named = || kms(|it| it.role_name = Some("app".into()));
    let any = || kms(|_| {});
    for (kms, path, reply, expected) in [
        (any(), ROLES, Some(Reply::new(404, "")), "no RAM role is attached to this instance; attach one"),
        (any(), ROLES, ok(" \n"), "no RAM role is attached to this instance; attach one"),
        (any(), ROLES, ok("a/b"), "it gave a role name that cannot be read"),
        (any(), ROLES, ok(".."), "it gave a role name that cannot be read"),
        (
            named(),
            APP,
            Some(Reply::new(404, "")),
            "RAM role app is not attached to this instance; attach it, or",
        ),
        (named(), APP, Some(Reply::new(500, "")), "it answered 500"),
        (named(), APP, ok("{}"), "it gave credentials that cannot be read"),
        (
            named(),
            APP,
            ok(r#"{"Code":"Failed"}"#),
            "it has no credentials: Failed; check that the RAM role exists",
        ),
        (named(), APP, None, "connect 100.100.100.200:80: connection refused; on an ECS instance"),
    ] {
        let mut rig = Rig::new(&kms, &[]);
        rig.converse(&[token(), (path, reply)]);
        let error = rig.stands().unwrap_err();
        assert!(error.starts_with("metadata service: ") && error.contains(expected), "{error}");
    }
    let mut rig = Rig::new(&KmsSection::default(), &[]);
    rig.converse(&[("PUT", None)]);
    let error = rig.stands().unwrap_err();
    assert!(
        error.contains(
            "connection refused; the agent asks it for the region because neither [KMS] Region nor Endpoint is set"
        ),
        "{error}"
    );
}

const KEY: [(&str, &str); 2] =
    [("ALIBABA_CLOUD_ACCESS_KEY_ID", "LTAI"), ("ALIBABA_CLOUD_ACCESS_KEY_SECRET", "hush-key")];

#[test]
fn an_access_key_is_there_at_once_and_for_good() {
    // Nobody comes after it, so what is wrong with those is no matter.
    let mut rig = Rig::new(&kms(|_| {}), &[KEY[0], KEY[1], ("ALIBABA_CLOUD_CREDENTIALS_URI", "h")]);
    assert_eq!(rig.stands().unwrap(), "LTAI");
    assert_eq!(rig.identity.next_deadline(), Mono::NEVER);
    let credentials = rig.credentials();
    assert!(!rig.identity.refused(&credentials, at(9).mono), "there is no other one");
    assert_eq!(rig.stands().unwrap(), "LTAI", "it may be let in again");
    assert!(rig.identity.poll(at(1_000_000).mono).is_none() && rig.asked.is_empty());

    let with_token = [KEY[0], KEY[1], ("ALIBABA_CLOUD_SECURITY_TOKEN", "hush-token")];
    let mut rig = Rig::new(&KmsSection::default(), &with_token);
    assert_eq!(rig.stands().unwrap_err(), "pending", "the region is asked for");
    rig.converse(&[token(), ("GET /latest/meta-data/region-id ", ok("cn-beijing"))]);
    assert!(rig.credentials().security_token.as_ref().unwrap().ct_eq(b"hush-token"));
    assert_eq!(rig.identity.region(), Some("cn-beijing"));
}

/// A file that goes with the value.
struct TokenFile(std::path::PathBuf);

impl TokenFile {
    fn new(name: &str, content: &str) -> TokenFile {
        let path = std::env::temp_dir().join(format!("kms-agent-oidc-{}-{name}", std::process::id()));
        std::fs::write(&path, content).unwrap();
        TokenFile(path)
    }
}

impl Drop for TokenFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// An identity by OIDC with the token in `file`.
fn oidc(kms: &KmsSection, file: &std::path::Path, more: &Variables) -> Rig {
    let mut variables: BTreeMap<&str, OsString> =
        more.iter().map(|(name, value)| (*name, value.into())).collect();
    variables.insert("ALIBABA_CLOUD_ROLE_ARN", "acs:ram::1:role/a b".into());
    variables.insert("ALIBABA_CLOUD_OIDC_PROVIDER_ARN", "acs:ram::1:oidc-provider/p".into());
    variables.insert("ALIBABA_CLOUD_OIDC_TOKEN_FILE", file.into());
    let env = |name: &str| variables.get(name).cloned();
    let identity = Identity::from_config(kms, &env, Random::from_seed(1)).unwrap();
    Rig { identity, now: at(0), asked: Vec::new() }
}

#[test]
fn oidc_asks_sts_with_the_token_that_is_in_the_file_now() {
    let file = TokenFile::new("reread", "first.to-ken\n");
    let mut rig = oidc(&kms(|it| it.region = Some("cn-beijing".into())), &file.0, &[]);
    rig.converse(&[("POST / ", ok(nested("STS.1", 1000)))]);
    assert_eq!(rig.stands().unwrap(), "STS.1");
    std::fs::write(&file.0, "second.token").unwrap();
    rig.converse_at(800, &[("POST / ", ok(nested("STS.2", 9000)))]);
    assert_eq!(rig.stands().unwrap(), "STS.2");
    let [(question, first), (_, second)] = rig.asked.as_slice() else { panic!() };
    let origin = Rc::new(HostPort { host: "sts.cn-beijing.aliyuncs.com".into(), port: 443 });
    assert_eq!(*question, Peer { service: Service::Sts, origin });
    let (head, form) = first.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(&format!("Content-Length: {}\r\n", form.len())), "{head}");
    let nonce = form.split("SignatureNonce=").nth(1).and_then(|rest| rest.get(..32)).unwrap();
    let expected = format!(
        "Action=AssumeRoleWithOIDC&Version=2015-04-01&Format=JSON&Timestamp=2025-01-02T03%3A04%3A05Z&SignatureNonce={nonce}&\
         DurationSeconds=3600&RoleArn=acs%3Aram%3A%3A1%3Arole%2Fa%20b&OIDCProviderArn=acs%3Aram%3A%3A1%3Aoidc-provider%2Fp&\
         RoleSessionName=kms-agent&OIDCToken=first.to-ken"
    );
    assert_eq!(form, expected);
    assert!(second.ends_with("&OIDCToken=second.token") && !second.contains(nonce));
}

#[test]
fn the_sts_endpoint_is_that_of_its_region() {
    let file = TokenFile::new("endpoint", "t");
    let region = |region: &str| kms(|it| it.region = Some(region.to_owned()));
    let vpc = ("ALIBABA_CLOUD_VPC_ENDPOINT_ENABLED", "True");
    let sts_region = ("ALIBABA_CLOUD_STS_REGION", "cn-a");
    let cases: [(KmsSection, &Variables, &str); 7] = [
        (region("cn-b"), &[], "sts.cn-b.aliyuncs.com:443"),
        (region("cn-b"), &[vpc], "sts-vpc.cn-b.aliyuncs.com:443"),
        (region("cn-b"), &[vpc, sts_region], "sts-vpc.cn-a.aliyuncs.com:443"),
        (kms(|_| {}), &[], "sts.aliyuncs.com:443"),
        (kms(|_| {}), &[("ALIBABA_CLOUD_STS_ENDPOINT", "https://sts.test/")], "sts.test:443"),
        (region("cn-b"), &[vpc, ("ALIBABA_CLOUD_STS_ENDPOINT", "127.0.0.1:99")], "127.0.0.1:99"),
        (KmsSection::default(), &[vpc], "sts-vpc.cn-m.aliyuncs.com:443"),
    ];
    for (kms, variables, expected) in cases {
        let mut rig = oidc(&kms, &file.0, variables);
        rig.converse(&[
            token(),
            ("GET /latest/meta-data/region-id ", ok("cn-m")),
            ("POST / ", ok(nested("STS.1", 1000))),
        ]);
        assert_eq!(rig.stands().unwrap(), "STS.1");
        assert_eq!(rig.asked.last().unwrap().0.origin.to_string(), expected);
    }
}

#[test]
fn oidc_explains_what_is_wrong_and_heals() {
    let file = TokenFile::new("wrong", "");
    let mut rig = oidc(&kms(|it| it.auth_type = AuthType::Oidc), &file.0, &[]);
    rig.converse(&[]);
    assert!(rig.stands().unwrap_err().contains("it is empty; correct it, or ALIBABA_CLOUD_OIDC_TOKEN_FILE"));
    std::fs::remove_file(&file.0).unwrap();
    rig.converse_at(20, &[]);
    let error = rig.stands().unwrap_err();
    assert!(error.starts_with("OIDC token file /") && error.contains("cannot read it: "), "{error}");
    for (content, expected) in [("a b", "it holds white space"), (&"x".repeat(20_000), "over 16 KiB")] {
        std::fs::write(&file.0, content).unwrap();
        rig.now = at(40 + content.len() as u64);
        rig.converse(&[]);
        assert!(rig.stands().unwrap_err().contains(expected));
    }
    assert!(rig.asked.is_empty());
    std::fs::write(&file.0, "hush.hush.hush").unwrap();
    let refusal = r#"{"Code":"AuthenticationFail.OIDCToken.Expired","Message":"It is over."}"#;
    rig.converse_at(90_000, &[("POST", Some(Reply::new(400, refusal)))]);
    assert_eq!(
        rig.stands().unwrap_err(),
        "STS: it refused with 400 AuthenticationFail.OIDCToken.Expired: It is over.; check the OIDC token, \
         ALIBABA_CLOUD_ROLE_ARN, ALIBABA_CLOUD_OIDC_PROVIDER_ARN and the role's trust policy"
    );
    rig.converse_at(90_020, &[("POST", ok(nested("STS.1", 100_000)))]);
    assert_eq!(rig.stands().unwrap(), "STS.1");
}

const URI: (&str, &str) = ("ALIBABA_CLOUD_CREDENTIALS_URI", "http://127.0.0.1:99/c?key=hush");

#[test]
fn the_chain_goes_on_until_one_works_and_stays_with_it() {
    let mut rig = Rig::new(&kms(|_| {}), &[URI]);
    rig.converse(&[("PUT", None), ("GET /c?key=hush ", Some(Reply::new(500, "")))]);
    assert_eq!(
        rig.stands().unwrap_err(),
        "the instance's RAM role: metadata service: connect 100.100.100.200:80: connection refused; on an ECS \
         instance, check the firewall and the routes to it; on another host, use another identity (see [KMS] \
         AuthType); the credentials URI: \
         credentials URI at 127.0.0.1:99: it answered 500"
    );
    rig.converse_at(20, &[("PUT", None), ("GET /c?key=hush ", ok(flat("STS.1", 1020)))]);
    assert_eq!((rig.stands().unwrap().as_str(), rig.identity.name()), ("STS.1", "the credentials URI"));
    rig.lines();
    rig.converse_at(820, &[("GET /c?key=hush ", None)]);
    assert_eq!(rig.lines(), ["GET /c?key=hush"], "that one alone from now on");
    assert_eq!(rig.stands().unwrap(), "STS.1");
}

fn by_aap() -> KmsSection {
    KmsSection { aap_arn: Some(AapArn::parse(AAP).unwrap()), ..KmsSection::default() }
}

#[test]
fn instance_identity_shows_a_signed_identity_to_the_access_point() {
    let mut rig = Rig::new(&by_aap(), &[]);
    let skewed = |body: &str| Some(Reply(200, body.to_owned(), Some(100)));
    let pkcs7 = "GET /latest/dynamic/instance-identity/pkcs7?audience=";
    rig.converse(&[
        ("PUT", skewed("tok")),
        (pkcs7, ok("MIIhush+/\nhush==\n")),
        ("POST / ", ok(nested("STS.1", 9000))),
    ]);
    assert_eq!(rig.stands().unwrap(), "STS.1");
    let [(_, put), (_, get), (question, post)] = rig.asked.as_slice() else { panic!("{:?}", rig.asked) };
    assert!(put.starts_with("PUT"));
    let audience = get.strip_prefix(pkcs7).and_then(|rest| rest.split(' ').next()).unwrap();
    let audience = crate::http::percent::decode_query(audience).unwrap();
    let signing_time = START_UNIX_S + 100;
    assert_eq!(
        audience,
        format!(r#"{{"aud":"{AAP}","signingTime":{signing_time}}}"#),
        "on the service's clock"
    );
    let origin = Rc::new(HostPort::kms_in("cn-hangzhou"));
    assert_eq!(*question, Peer { service: Service::Kms, origin });
    for line in [
        "x-acs-action: AssumeApplicationAccessPoint",
        "x-acs-version: 2016-01-20",
        "x-acs-date: 2025-01-02T03:05:45Z",
    ] {
        assert!(post.contains(&format!("\r\n{line}\r\n")), "{post}");
    }
    let form = post.split_once("\r\n\r\n").unwrap().1;
    let arn = AAP.replace(':', "%3A").replace('/', "%2F");
    assert_eq!(form, format!("AapArn={arn}&InstanceIdentity=MIIhush%2B%2Fhush%3D%3D"));
    assert!(!format!("{:?}", rig.identity).contains("hush"));
}

#[test]
fn instance_identity_explains_what_is_wrong() {
    let pkcs7 = "GET /latest/dynamic/instance-identity/pkcs7?";
    let identity = || (pkcs7, ok("MIIhush+/hush"));
    let refusal = |code: &str| {
        Some(Reply::new(
            403,
            format!(r#"{{"Code":"{code}","Message":"It is MIIhush+/hush.","RequestId":"r"}}"#),
        ))
    };
    for (replies, expected) in [
        (
            vec![(pkcs7, Some(Reply::new(404, "")))],
            "no signed identity of this instance; instance identity needs",
        ),
        (vec![(pkcs7, ok("<html>"))], "metadata service: it gave a signed identity that cannot be read"),
        (vec![(pkcs7, None)], "metadata service: connect "),
        (
            vec![identity(), ("POST", None)],
            "application access point: connect kms-vpc.cn-hangzhou.aliyuncs.com:443: ",
        ),
        (
            vec![identity(), ("POST", refusal("X.Y"))],
            "it refused with 403 X.Y; check [KMS] AapArn and the access point",
        ),
        (
            vec![identity(), ("POST", ok(nested("a", -1)))],
            "application access point: it gave credentials that expired",
        ),
    ] {
        let mut rig = Rig::new(&by_aap(), &[]);
        rig.converse(&[vec![token()], replies].concat());
        let error = rig.stands().unwrap_err();
        assert!(error.contains(expected) && !error.contains("hush"), "{error}");
    }
}

#[test]
fn who_it_is_follows_configuration_and_environment() {
    const OIDC: [(&str, &str); 3] = [
        ("ALIBABA_CLOUD_ROLE_ARN", "r"),
        ("ALIBABA_CLOUD_OIDC_PROVIDER_ARN", "p"),
        ("ALIBABA_CLOUD_OIDC_TOKEN_FILE", "/f"),
    ];
    let no_metadata = ("ALIBABA_CLOUD_ECS_METADATA_DISABLED", "true");
    let auth_type = |auth_type| KmsSection { auth_type, ..by_aap() };
    let auto = KmsSection::default;
    type Case = (KmsSection, Vec<(&'static str, &'static str)>, Result<&'static str, &'static str>);
    let cases: [Case; 17] = [
        (auto(), vec![], Ok("the instance's RAM role")),
        (auto(), vec![KEY[0]], Ok("the instance's RAM role")),
        (auto(), KEY.to_vec(), Ok("the access key in the environment")),
        (auto(), [&KEY[..], &OIDC[..]].concat(), Ok("the access key in the environment")),
        (auto(), OIDC.to_vec(), Ok("the OIDC role")),
        (auto(), OIDC[..2].to_vec(), Ok("the instance's RAM role")),
        (auto(), vec![URI], Ok("the instance's RAM role")),
        (auto(), vec![no_metadata, URI], Ok("the credentials URI")),
        (
            auto(),
            vec![no_metadata],
            Err("finds no identity that is configured: the access key in the environment (ALIBABA_"),
        ),
        (
            auto(),
            vec![("ALIBABA_CLOUD_CREDENTIALS_URI", "h")],
            Err("ALIBABA_CLOUD_CREDENTIALS_URI must be http"),
        ),
        (auto(), vec![KEY[0], ("ALIBABA_CLOUD_ACCESS_KEY_SECRET", "a\n")], Err("_SECRET holds white space")),
        (
            auto(),
            vec![("ALIBABA_CLOUD_ECS_METADATA", "a/b")],
            Err("ALIBABA_CLOUD_ECS_METADATA is not the name"),
        ),
        (by_aap(), KEY.to_vec(), Ok("the application access point")),
        (auth_type(AuthType::RamRole), KEY.to_vec(), Ok("the instance's RAM role")),
        (
            auth_type(AuthType::AccessKey),
            vec![],
            Err("AuthType = \"access_key\": ALIBABA_CLOUD_ACCESS_KEY_ID, "),
        ),
        (auth_type(AuthType::Oidc), OIDC[1..].to_vec(), Err("\"oidc\": ALIBABA_CLOUD_ROLE_ARN is not set")),
        (
            auth_type(AuthType::Oidc),
            [&OIDC[..], &[("ALIBABA_CLOUD_STS_REGION", "a b")]].concat(),
            Err("ALIBABA_CLOUD_STS_REGION must be a host name"),
        ),
    ];
    for (kms, variables, expected) in cases {
        match (configured(&kms, &variables), expected) {
            (Ok(identity), Ok(name)) => assert_eq!(identity.name(), name, "{variables:?}"),
            (Err(problem), Err(part)) => assert!(problem.to_string().contains(part), "{problem}"),
            (found, _) => panic!("{variables:?}: {found:?}, not {expected:?}"),
        }
    }
}

#[test]
fn a_service_that_only_knows_gets_is_asked_plainly() {
    let origin = HostPort { host: "m".into(), port: 80 };
    for error in [
        CallError::invalid(&origin, "the server does not speak HTTP/1"),
        CallError::timeout("reply of", &origin, Duration::from_secs(1)).reached(),
    ] {
        let mut rig = Rig::ram_role();
        assert!(rig.identity.poll(at(0).mono).is_some());
        rig.identity.on_answer(Err(&error), at(0));
        rig.converse(&[(APP, ok(flat("STS.1", 1000)))]);
        assert_eq!(rig.lines(), [APP]);
    }
}
