//! A small blocking client: TLS, signing, and replies as they came.

#![allow(dead_code, reason = "each test file uses its own part")]

#[path = "../../../tests/common/host.rs"]
pub(crate) mod host;

use kms_emulator::signature::{self, SignedRequest};
use kms_emulator::{Emulator, StsCredentials};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, crypto::ring};

/// Long, because an unoptimised build on a busy host takes its time to make a key pair.
pub(crate) const READ_TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) type Tls = StreamOwned<ClientConnection, TcpStream>;

/// A TLS configuration that trusts the emulator's CA and keeps sessions.
pub(crate) fn tls_config(emulator: &Emulator) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(emulator.ca_pem().as_bytes()).expect("PEM")).expect("a CA");
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    Arc::new(config)
}

/// Connects; the handshake is done when this returns.
pub(crate) fn connect(emulator: &Emulator, config: &Arc<ClientConfig>) -> io::Result<Tls> {
    let mut tcp = TcpStream::connect(emulator.kms_addr())?;
    tcp.set_read_timeout(Some(READ_TIMEOUT))?;
    let name = ServerName::try_from("kms-vpc.cn-hangzhou.aliyuncs.com").expect("a name");
    let mut session = ClientConnection::new(Arc::clone(config), name).map_err(io::Error::other)?;
    while session.is_handshaking() {
        session.complete_io(&mut tcp)?;
    }
    Ok(StreamOwned::new(session, tcp))
}

/// A request to be signed; the fields are there to be bent.
pub(crate) struct Call {
    pub(crate) id: String,
    pub(crate) secret: String,
    pub(crate) token: Option<String>,
    pub(crate) action: String,
    pub(crate) params: Vec<(String, String)>,
    pub(crate) date: String,
    pub(crate) nonce: String,
    pub(crate) form: bool,
}

impl Call {
    pub(crate) fn new(who: &StsCredentials, action: &str, params: &[(&str, &str)]) -> Call {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        Call {
            id: who.access_key_id.clone(),
            secret: who.access_key_secret.clone(),
            token: Some(who.security_token.clone()),
            action: action.to_owned(),
            params: params.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect(),
            date: iso8601(now),
            nonce: unique(),
            form: false,
        }
    }

    pub(crate) fn get(who: &StsCredentials, name: &str) -> Call {
        Call::new(who, "GetSecretValue", &[("SecretName", name)])
    }

    /// The request as bytes.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let pairs: Vec<String> = self
            .params
            .iter()
            .map(|(n, v)| format!("{}={}", signature::encode(n.as_bytes()), signature::encode(v.as_bytes())))
            .collect();
        let (query, body) =
            if self.form { (String::new(), pairs.join("&")) } else { (pairs.join("&"), String::new()) };
        let mut headers: Vec<(String, String)> = [
            ("host", "kms-vpc.cn-hangzhou.aliyuncs.com"),
            ("x-acs-action", &self.action),
            ("x-acs-version", "2016-01-20"),
            ("x-acs-date", &self.date),
            ("x-acs-signature-nonce", &self.nonce),
            ("x-acs-content-sha256", &signature::sha256_hex(body.as_bytes())),
        ]
        .map(|(n, v)| (n.to_owned(), v.to_owned()))
        .to_vec();
        if let Some(token) = &self.token {
            headers.push(("x-acs-accesskey-id".into(), self.id.clone()));
            headers.push(("x-acs-security-token".into(), token.clone()));
        }
        if self.form {
            headers.push(("content-type".into(), "application/x-www-form-urlencoded".into()));
        }
        headers.sort();
        let names: Vec<&str> = headers.iter().map(|(n, _)| n.as_str()).collect();
        let request = SignedRequest {
            method: "POST",
            path: "/",
            query: &query,
            headers: &headers,
            body: body.as_bytes(),
        };
        let sign = signature::sign(&self.secret, &signature::string_to_sign(&request, &names));
        let authorization = format!(
            "ACS3-HMAC-SHA256 Credential={},SignedHeaders={},Signature={sign}",
            self.id,
            names.join(";")
        );
        let mut out = format!("POST /?{query} HTTP/1.1\r\nauthorization: {authorization}\r\n");
        for (name, value) in &headers {
            out.push_str(&format!("{name}: {value}\r\n"));
        }
        out.push_str(&format!("content-length: {}\r\n\r\n{body}", body.len()));
        out.into_bytes()
    }

    /// Sends the call on a connection of its own and reads to the end of the reply.
    pub(crate) fn send(&self, emulator: &Emulator) -> io::Result<Reply> {
        let mut tls = connect(emulator, &tls_config(emulator))?;
        tls.write_all(&self.bytes())?;
        read_reply(&mut tls)
    }
}

pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Reply {
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).expect("JSON")
    }

    /// The KMS error code.
    pub(crate) fn code(&self) -> String {
        self.json()["Code"].as_str().expect("a Code").to_owned()
    }
}

/// Reads one reply with a Content-Length; an end before that is an error.
pub(crate) fn read_reply(stream: &mut impl Read) -> io::Result<Reply> {
    let mut bytes = Vec::new();
    let head_end = loop {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        bytes.push(byte[0]);
        if bytes.ends_with(b"\r\n\r\n") {
            break bytes.len();
        }
    };
    let head = String::from_utf8_lossy(&bytes[..head_end]).to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.and_then(|l| l.trim().parse().ok()).unwrap_or(0)];
    stream.read_exact(&mut body)?;
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    Ok(Reply { status, head, body: String::from_utf8_lossy(&body).into_owned() })
}

/// Plain HTTP to the metadata service.
pub(crate) fn metadata(addr: SocketAddr, method: &str, path: &str, headers: &str) -> io::Result<Reply> {
    let mut tcp = TcpStream::connect(addr)?;
    tcp.set_read_timeout(Some(READ_TIMEOUT))?;
    tcp.write_all(format!("{method} {path} HTTP/1.1\r\nhost: {addr}\r\n{headers}\r\n").as_bytes())?;
    read_reply(&mut tcp)
}

pub(crate) fn unique() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// `YYYY-MM-DDTHH:MM:SSZ` of Unix seconds.
pub(crate) fn iso8601(unix: u64) -> String {
    let t =
        time::OffsetDateTime::from_unix_timestamp(i64::try_from(unix).expect("in range")).expect("in range");
    let (date, time) = (t.date(), t.time());
    format!("{date}T{:02}:{:02}:{:02}Z", time.hour(), time.minute(), time.second())
}
