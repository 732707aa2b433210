//! The TLS pump: ciphertext in, plaintext out, and back; no I/O. A thin layer over rustls.

use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, InvalidDnsNameError, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::sync::Arc;
use zeroize::Zeroize as _;

/// TLS sessions remembered for resumption; there is one KMS, and each connection uses one up.
const SESSIONS_MAX: usize = 16;
/// Plaintext is moved in pieces of this size.
const PIECE_BYTES: usize = 4096;

/// Why a `CaFile` cannot be used.
#[derive(Debug)]
pub enum CaError {
    /// No certificate in it.
    NoCertificate,
    /// Not PEM.
    Pem(String),
    /// A certificate that no trust can be put in.
    Certificate(rustls::Error),
}

impl fmt::Display for CaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CaError::NoCertificate => f.write_str("there is no PEM certificate in it"),
            CaError::Pem(what) => write!(f, "it is not PEM: {what}"),
            CaError::Certificate(error) => write!(f, "a certificate in it cannot be used: {error}"),
        }
    }
}

/// What every TLS connection shares: the web's roots, and beside them those of `ca_pem`.
///
/// # Errors
/// When `ca_pem` is given and holds no usable certificate.
pub fn client_config(ca_pem: Option<&[u8]>) -> Result<Arc<ClientConfig>, CaError> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    if let Some(pem) = ca_pem {
        let mut found = false;
        for certificate in CertificateDer::pem_slice_iter(pem) {
            let certificate = certificate.map_err(|error| CaError::Pem(error.to_string()))?;
            roots.add(certificate).map_err(CaError::Certificate)?;
            found = true;
        }
        if !found {
            return Err(CaError::NoCertificate);
        }
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_safe_default_protocol_versions()
        .map_err(CaError::Certificate)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.resumption = Resumption::in_memory_sessions(SESSIONS_MAX);
    Ok(Arc::new(config))
}

/// rustls decrypts in its buffer, and keeps that as it is until more comes. What it offers to be read into is all
/// of the buffer that is of no more use.
struct Wiper;

impl io::Read for Wiper {
    fn read(&mut self, unused: &mut [u8]) -> io::Result<usize> {
        unused.zeroize();
        // Nothing has come, and nothing has ended.
        Err(io::ErrorKind::WouldBlock.into())
    }
}

/// The cryptography of TLS. aws-lc-rs knows X25519MLKEM768; ring is smaller, and is here anyway for signatures.
fn provider() -> CryptoProvider {
    #[cfg(feature = "post-quantum")]
    return rustls::crypto::aws_lc_rs::default_provider();
    #[cfg(not(feature = "post-quantum"))]
    return rustls::crypto::ring::default_provider();
}

/// One TLS connection's state.
#[derive(Debug)]
pub struct Tls {
    session: ClientConnection,
}

/// The peer broke TLS, or its certificate does not verify.
#[derive(Debug)]
pub struct TlsError(rustls::Error);

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            rustls::Error::InvalidCertificate(why) => {
                write!(f, "the server's certificate does not verify: {why}")?;
                if *why == rustls::CertificateError::UnknownIssuer {
                    f.write_str("; for an instance endpoint set [KMS] CaFile to its CA")?;
                }
                Ok(())
            }
            other => other.fmt(f),
        }
    }
}

impl Tls {
    /// Begins a handshake with a server of this name (or IP address).
    ///
    /// # Errors
    /// When `host` is neither a DNS name nor an address.
    pub fn new(config: Arc<ClientConfig>, host: &str) -> Result<Tls, TlsError> {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|error: InvalidDnsNameError| TlsError(rustls::Error::General(error.to_string())))?;
        ClientConnection::new(config, name).map(|session| Tls { session }).map_err(TlsError)
    }

    /// Takes ciphertext as it came, and appends what plaintext there is in it. After an error,
    /// [`Tls::poll_ciphertext`] still has the alert for the peer.
    ///
    /// # Errors
    /// When the peer breaks TLS or is not who it should be.
    pub fn on_ciphertext(&mut self, bytes: &[u8], plaintext: &mut Vec<u8>) -> Result<(), TlsError> {
        let decrypted = self.decrypt(bytes, plaintext);
        let _ = self.session.read_tls(&mut Wiper);
        decrypted
    }

    fn decrypt(&mut self, mut bytes: &[u8], plaintext: &mut Vec<u8>) -> Result<(), TlsError> {
        while !bytes.is_empty() {
            let taken = self.session.read_tls(&mut bytes);
            let state = self.session.process_new_packets().map_err(TlsError)?;
            let mut left = state.plaintext_bytes_to_read();
            let mut piece = [0; PIECE_BYTES];
            while left > 0 {
                let want = left.min(PIECE_BYTES);
                match self.session.reader().read(piece.get_mut(..want).unwrap_or_default()) {
                    Ok(0) | Err(_) => break,
                    Ok(count) => {
                        plaintext.extend_from_slice(piece.get(..count).unwrap_or_default());
                        left = left.saturating_sub(count);
                    }
                }
            }
            piece.zeroize();
            match taken {
                // After a close_notify rustls takes no more: what follows is not the peer's to say.
                Ok(0) => return Ok(()),
                Ok(_) => {}
                // Its buffers are full though all packets were processed: not a peer that speaks TLS.
                Err(error) => return Err(TlsError(rustls::Error::General(error.to_string()))),
            }
        }
        Ok(())
    }

    /// Takes plaintext to be sent.
    ///
    /// # Errors
    /// When it is more than rustls will buffer (64 KiB unsent).
    pub fn send(&mut self, plaintext: &[u8]) -> io::Result<()> {
        self.session.writer().write_all(plaintext)
    }

    /// Appends the ciphertext that is to be sent now.
    pub fn poll_ciphertext(&mut self, out: &mut Vec<u8>) {
        while self.session.wants_write() {
            // Writing to memory does not fail.
            if self.session.write_tls(out).is_err() {
                return;
            }
        }
    }

    /// Whether the handshake is still going on.
    #[must_use]
    pub fn is_handshaking(&self) -> bool {
        self.session.is_handshaking()
    }

    /// Whether the peer said properly that it has ended (RFC 8446 6.1).
    pub fn peer_has_closed(&mut self) -> bool {
        self.session.process_new_packets().is_ok_and(|state| state.peer_has_closed())
    }

    /// Says that we have ended.
    pub fn close(&mut self) {
        self.session.send_close_notify();
    }
}
