//! The signed instance identity: the metadata service issues it, KMS verifies it. A CMS SignedData
//! (RFC 5652) around the instance's document, signed with ECDSA P-256 under a CA of its own.
#![warn(clippy::indexing_slicing)]

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use cms::cert::x509::der::asn1::{ObjectIdentifier, OctetString, SetOfVec};
use cms::cert::x509::der::{self, Any, Decode, Encode, Tag};
use cms::cert::x509::spki::AlgorithmIdentifierOwned;
use cms::cert::{CertificateChoices, IssuerAndSerialNumber};
use cms::content_info::{CmsVersion, ContentInfo};
use cms::signed_data::{
    CertificateSet, EncapsulatedContentInfo, SignedData, SignerIdentifier, SignerInfo, SignerInfos,
};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, SigningKey,
};
use std::collections::BTreeMap;
use std::io;
use tokio_rustls::rustls::pki_types::{CertificateDer, UnixTime};
use webpki::ring::ECDSA_P256_SHA256;

const ID_DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.7.1");
const ID_SIGNED_DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.7.2");
const ID_SHA_256: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.1");
const ECDSA_WITH_SHA_256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.2");
/// The one extended key usage that webpki lets a certificate lack and that none of ours has.
const CODE_SIGNING: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 3];

/// Why KMS does not believe an identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Distrust {
    /// Not base64, not CMS, or not of the shape that the metadata service gives.
    Malformed,
    /// The signature is not that of the document, or the signer's certificate not our CA's.
    Signature,
}

/// A CA and the certificate that it gave the metadata service.
struct Authority {
    ca: CertificateDer<'static>,
    ca_pem: String,
    signer: CertificateChoices,
    key: KeyPair,
}

impl Authority {
    fn generate() -> io::Result<Authority> {
        let (ca, certificate, key) = certificates().map_err(io::Error::other)?;
        let signer = CertificateChoices::from_der(certificate.der()).map_err(io::Error::other)?;
        Ok(Authority { ca: ca.der().clone(), ca_pem: ca.pem(), signer, key })
    }

    /// DER of a SignedData with `content` and the signature of `signed` in it: the same bytes, in honesty.
    fn enclose(&self, content: &[u8], signed: &[u8]) -> io::Result<Vec<u8>> {
        let signature = self.key.sign(signed).map_err(io::Error::other)?;
        self.signed_data(content, signature).map_err(io::Error::other)
    }

    fn signed_data(&self, content: &[u8], signature: Vec<u8>) -> der::Result<Vec<u8>> {
        let CertificateChoices::Certificate(certificate) = &self.signer else {
            return Err(Tag::Sequence.value_error());
        };
        let sha_256 = AlgorithmIdentifierOwned { oid: ID_SHA_256, parameters: None };
        let signer = SignerInfo {
            version: CmsVersion::V1,
            sid: SignerIdentifier::IssuerAndSerialNumber(IssuerAndSerialNumber {
                issuer: certificate.tbs_certificate.issuer.clone(),
                serial_number: certificate.tbs_certificate.serial_number.clone(),
            }),
            digest_alg: sha_256.clone(),
            // None: the signature is that of the content itself (RFC 5652 section 5.4).
            signed_attrs: None,
            signature_algorithm: AlgorithmIdentifierOwned { oid: ECDSA_WITH_SHA_256, parameters: None },
            signature: OctetString::new(signature)?,
            unsigned_attrs: None,
        };
        let data = SignedData {
            version: CmsVersion::V1,
            digest_algorithms: SetOfVec::try_from(vec![sha_256])?,
            encap_content_info: EncapsulatedContentInfo {
                econtent_type: ID_DATA,
                econtent: Some(Any::new(Tag::OctetString, content)?),
            },
            certificates: Some(CertificateSet(SetOfVec::try_from(vec![self.signer.clone()])?)),
            crls: None,
            signer_infos: SignerInfos(SetOfVec::try_from(vec![signer])?),
        };
        ContentInfo { content_type: ID_SIGNED_DATA, content: Any::encode_from(&data)? }.to_der()
    }

    /// The content of a SignedData that this authority signed.
    fn open(&self, signed_data: &[u8]) -> Result<Vec<u8>, Distrust> {
        let (content, certificate, signature) = parts(signed_data).ok_or(Distrust::Malformed)?;
        let certificate = CertificateDer::from(certificate);
        let verify = || {
            let anchor = webpki::anchor_from_trusted_cert(&self.ca)?;
            let signer = webpki::EndEntityCert::try_from(&certificate)?;
            signer.verify_for_usage(
                &[ECDSA_P256_SHA256],
                &[anchor],
                &[],
                UnixTime::now(),
                webpki::KeyUsage::required_if_present(CODE_SIGNING),
                None,
                None,
            )?;
            signer.verify_signature(ECDSA_P256_SHA256, &content, &signature)
        };
        verify().map_err(|_: webpki::Error| Distrust::Signature)?;
        Ok(content)
    }
}

/// Content, signer's certificate and signature of a SignedData with one signer and no signed attributes.
fn parts(signed_data: &[u8]) -> Option<(Vec<u8>, Vec<u8>, Vec<u8>)> {
    let info = ContentInfo::from_der(signed_data).ok().filter(|info| info.content_type == ID_SIGNED_DATA)?;
    let data: SignedData = info.content.decode_as().ok()?;
    let content = data.encap_content_info.econtent?.decode_as::<OctetString>().ok()?;
    let [signer] = data.signer_infos.0.as_slice() else { return None };
    let SignerIdentifier::IssuerAndSerialNumber(id) = &signer.sid else { return None };
    let certificates = data.certificates?;
    let certificate = certificates.0.iter().find(|choice| match choice {
        CertificateChoices::Certificate(it) => {
            it.tbs_certificate.issuer == id.issuer && it.tbs_certificate.serial_number == id.serial_number
        }
        CertificateChoices::Other(_) => false,
    })?;
    let usual = signer.signed_attrs.is_none()
        && signer.digest_alg.oid == ID_SHA_256
        && signer.signature_algorithm.oid == ECDSA_WITH_SHA_256;
    usual.then_some((content.into_bytes(), certificate.to_der().ok()?, signer.signature.as_bytes().to_vec()))
}

/// A CA's certificate, a signer's and the signer's key. The CA's key has done its duty.
fn certificates() -> Result<(rcgen::Certificate, rcgen::Certificate, KeyPair), rcgen::Error> {
    let mut ca = CertificateParams::new(Vec::new())?;
    crate::tls::valid(&mut ca);
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    ca.distinguished_name.push(DnType::CommonName, "kms-emulator instance identity root");
    let ca_key = KeyPair::generate()?;
    let ca_certificate = ca.self_signed(&ca_key)?;
    let ca = Issuer::new(ca, ca_key);

    let mut signer = CertificateParams::new(Vec::new())?;
    crate::tls::valid(&mut signer);
    signer.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    signer.distinguished_name.push(DnType::CommonName, "kms-emulator instance identity");
    let key = KeyPair::generate()?;
    let signer = signer.signed_by(&key, &ca)?;
    Ok((ca_certificate, signer, key))
}

/// Issues identities and remembers which were used.
pub(crate) struct Identities {
    authority: Authority,
    /// One that KMS does not trust, by the same name.
    other: Authority,
    /// What was issued last, for [`IdentityFault::Repeated`](crate::IdentityFault::Repeated).
    pub(crate) last: Option<String>,
    /// Fingerprints of identities that were exchanged, and when they cease to be fresh.
    spent: BTreeMap<String, i64>,
}

/// How an identity is signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signing {
    Honest,
    OtherCa,
    Tampered,
}

impl Identities {
    pub(crate) fn generate() -> io::Result<Identities> {
        let (authority, other) = (Authority::generate()?, Authority::generate()?);
        Ok(Identities { authority, other, last: None, spent: BTreeMap::new() })
    }

    /// PEM of the CA.
    pub(crate) fn ca_pem(&self) -> &str {
        &self.authority.ca_pem
    }

    /// Base64 of the document, signed; one line.
    pub(crate) fn issue(&mut self, document: &str, signing: Signing) -> io::Result<String> {
        let document = document.as_bytes();
        let der = match signing {
            Signing::Honest => self.authority.enclose(document, document)?,
            Signing::OtherCa => self.other.enclose(document, document)?,
            // Another document than the one that was signed: white space does.
            Signing::Tampered => self.authority.enclose(&[document, b" "].concat(), document)?,
        };
        let issued = BASE64_STANDARD.encode(der);
        self.last = Some(issued.clone());
        Ok(issued)
    }

    /// The document of an identity that was signed here, and the identity's fingerprint.
    pub(crate) fn verify(&self, base64: &str) -> Result<(String, String), Distrust> {
        let compact: String = base64.chars().filter(|c| !c.is_ascii_whitespace()).collect();
        let der = BASE64_STANDARD.decode(compact).map_err(|_| Distrust::Malformed)?;
        let document = String::from_utf8(self.authority.open(&der)?).map_err(|_| Distrust::Malformed)?;
        Ok((document, crate::kms::signature::sha256_hex(&der)))
    }

    /// False when the identity was spent before. It is forgotten after `until`, when it is stale anyway.
    pub(crate) fn spend(&mut self, fingerprint: String, until: i64, now: i64) -> bool {
        self.spent.retain(|_, until| *until >= now);
        self.spent.insert(fingerprint, until).is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_signed_here_is_believed() {
        let mut ours = Identities::generate().expect("keys");
        let issued = ours.issue("{\"a\":1}", Signing::Honest).expect("signed");
        assert!(issued.bytes().all(|b| b.is_ascii_alphanumeric() || b"+/=".contains(&b)));
        let (document, fingerprint) = ours.verify(&issued).expect("our own");
        assert_eq!(document, "{\"a\":1}");

        for signing in [Signing::OtherCa, Signing::Tampered] {
            let bad = ours.issue("{\"a\":1}", signing).expect("signed");
            assert_eq!(ours.verify(&bad), Err(Distrust::Signature), "{signing:?}");
        }
        let strangers = Identities::generate().expect("keys");
        assert_eq!(strangers.verify(&issued), Err(Distrust::Signature));
        for bad in ["", "!", "AAEC", &issued[..issued.len() - 8]] {
            assert_eq!(ours.verify(bad), Err(Distrust::Malformed), "{bad}");
        }

        assert!(ours.spend(fingerprint.clone(), 300, 0));
        assert!(!ours.spend(fingerprint.clone(), 300, 300));
        assert!(ours.spend(fingerprint, 900, 301), "forgotten when it cannot be fresh any more");
    }
}
