//! The certificates: a CA of our own, a good server certificate and one for each way of being bad.

use crate::faults::BadCertificate;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};
use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use time::{Duration, OffsetDateTime};
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// A client may have been set back or forward by a test: the certificates hold for this long either way.
const VALID_DAYS: i64 = 400;

pub(crate) struct Certificates {
    pub(crate) ca_pem: String,
    good: Arc<ServerConfig>,
    bad: BTreeMap<BadCertificate, Arc<ServerConfig>>,
}

type Ca = CertifiedIssuer<'static, KeyPair>;

impl Certificates {
    /// `address` is where the port listens; clients may use it as the server's name.
    pub(crate) fn generate(region: &str, address: IpAddr) -> io::Result<Certificates> {
        let mut names = vec![
            "localhost".to_owned(),
            "127.0.0.1".to_owned(),
            "::1".to_owned(),
            format!("kms.{region}.aliyuncs.com"),
            format!("kms-vpc.{region}.aliyuncs.com"),
            "*.cryptoservice.kms.aliyuncs.com".to_owned(),
            "sts.aliyuncs.com".to_owned(),
            format!("sts.{region}.aliyuncs.com"),
            format!("sts-vpc.{region}.aliyuncs.com"),
        ];
        if !address.is_loopback() {
            names.push(address.to_string());
        }
        let ca = new_ca().map_err(io::Error::other)?;
        let other_ca = new_ca().map_err(io::Error::other)?;
        let wrong_names = ["wrong-name.invalid".to_owned()];
        let bad = [
            (BadCertificate::OtherCa, server_config(&names, Some(&other_ca), VALID_DAYS)?),
            (BadCertificate::SelfSigned, server_config(&names, None, VALID_DAYS)?),
            (BadCertificate::WrongName, server_config(&wrong_names, Some(&ca), VALID_DAYS)?),
            (BadCertificate::Expired, server_config(&names, Some(&ca), -1)?),
        ];
        Ok(Certificates {
            ca_pem: ca.pem(),
            good: server_config(&names, Some(&ca), VALID_DAYS)?,
            bad: bad.into_iter().collect(),
        })
    }

    /// The configuration for a connection that is to see this certificate (`None`: the good one).
    pub(crate) fn config(&self, bad: Option<BadCertificate>) -> Arc<ServerConfig> {
        let config = bad.and_then(|bad| self.bad.get(&bad)).unwrap_or(&self.good);
        Arc::clone(config)
    }
}

/// Good now, whichever way a test moves the client's clock.
pub(crate) fn valid(params: &mut CertificateParams) {
    valid_until(params, VALID_DAYS);
}

fn valid_until(params: &mut CertificateParams, days_from_now: i64) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - Duration::days(VALID_DAYS);
    params.not_after = now + Duration::days(days_from_now);
}

fn new_ca() -> Result<Ca, rcgen::Error> {
    let mut params = CertificateParams::new(Vec::new())?;
    valid(&mut params);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(DnType::CommonName, "kms-emulator root (not for production)");
    Ca::self_signed(params, KeyPair::generate()?)
}

fn server_config(names: &[String], ca: Option<&Ca>, days_from_now: i64) -> io::Result<Arc<ServerConfig>> {
    let (chain, key) = server_certificate(names, ca, days_from_now).map_err(io::Error::other)?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(io::Error::other)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn server_certificate(
    names: &[String],
    ca: Option<&Ca>,
    days_from_now: i64,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), rcgen::Error> {
    let mut params = CertificateParams::new(names)?;
    valid_until(&mut params, days_from_now);
    params.distinguished_name.push(DnType::CommonName, "kms-emulator");
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    let key = KeyPair::generate()?;
    let certificate = match ca {
        Some(ca) => params.signed_by(&key, ca)?,
        None => params.self_signed(&key)?,
    };
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|_| rcgen::Error::CouldNotParseKeyPair)?;
    Ok((vec![certificate.der().clone()], key))
}
