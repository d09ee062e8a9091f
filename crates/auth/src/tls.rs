//! TLS settings: who a connection is with is decided here and nowhere else.
//!
//! ```text
//! ClientHello ─► wants_pairing? ─yes─► pairing_server_config: any certificate, only `limosa-pair/1`
//!                     └─no──────────► server_config: trusted certificates only
//! ```
//!
//! Both ends always show a certificate, and each checks that the other holds
//! its key: the handshake's signature is verified in every configuration, also
//! where any certificate will do.
//!
//! **Invariants.** TLS 1.3 only. No tickets, no resumption, no early data: each
//! connection shows its certificate anew, so a removed peer cannot come back on
//! an old session. Names and dates in certificates decide nothing.
//!
//! With TLS 1.3 a client's handshake ends before the server has judged its
//! certificate: a refused client learns it from its first read, as an alert
//! (`AccessDenied`), and has received nothing until then.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientConfig, Resumption};
use rustls::crypto::verify_tls13_signature;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ServerConfig};
use rustls::sign::SingleCertAndKey;
use rustls::version::TLS13;
use rustls::{
    CertificateError, CommonState, DigitallySignedStruct, DistinguishedName, Error, OtherError,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::provider::provider;
use crate::{Fingerprint, Identity, TrustStore};

/// Application protocol of data channels between hosts.
pub const ALPN_CHANNEL: &[u8] = limosa_protocol::peer::CHANNEL_ALPN;
/// Application protocol of the API and of the control link between hosts.
pub const ALPN_HTTP: &[u8] = b"http/1.1";
/// Application protocol of pairing, the only one that strangers may speak.
pub const ALPN_PAIR: &[u8] = b"limosa-pair/1";

/// The server showed another certificate than the pinned one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the host shows the certificate {found}, but {expected} was expected")]
pub struct PinMismatch {
    pub expected: Fingerprint,
    /// The certificate that came.
    pub found: Fingerprint,
}

/// Settings of the listener for paired peers.
///
/// A client must show a certificate, and it must be in `trust` at the time of
/// the handshake (later changes of `trust` count). Who it is, and with which
/// role, tell [`peer_fingerprint`] and [`TrustStore::lookup`] together.
#[must_use]
pub fn server_config(identity: &Identity, trust: &TrustStore) -> Arc<ServerConfig> {
    let verifier = Clients { accepted: Accepted::Trusted(trust.clone()) };
    server(identity, verifier, &[ALPN_CHANNEL, ALPN_HTTP])
}

/// Settings for a client that asks for pairing: any certificate will do.
///
/// Whatever the client says on such a connection may go to
/// [`pairing`](crate::pairing) alone.
#[must_use]
pub fn pairing_server_config(identity: &Identity) -> Arc<ServerConfig> {
    server(identity, Clients { accepted: Accepted::Any }, &[ALPN_PAIR])
}

/// Whether a client asks for pairing: then [`pairing_server_config`] applies,
/// else [`server_config`].
///
/// The client alone chooses, which is harmless: choosing pairing leaves it
/// with nothing but pairing.
#[must_use]
pub fn wants_pairing(hello: &ClientHello<'_>) -> bool {
    hello.alpn().is_some_and(|mut protocols| protocols.any(|protocol| protocol == ALPN_PAIR))
}

/// Settings for a connection to a paired host.
///
/// - `expected`: the only certificate that the host may show.
/// - `alpn`: [`ALPN_CHANNEL`] or [`ALPN_HTTP`].
///
/// Use it with [`server_name`].
#[must_use]
pub fn client_config(identity: &Identity, expected: Fingerprint, alpn: &[u8]) -> Arc<ClientConfig> {
    client(identity, Servers { expected: Some(expected) }, alpn)
}

/// Settings for a connection to a host that is to be paired: takes any
/// certificate, which [`peer_fingerprint`] then tells.
///
/// Until pairing has ended well the other end is unknown: send nothing else.
/// Use it with [`server_name`].
#[must_use]
pub fn pairing_client_config(identity: &Identity) -> Arc<ClientConfig> {
    client(identity, Servers { expected: None }, ALPN_PAIR)
}

/// The name that rustls wants to be told for a server.
///
/// Always the same: it is neither sent nor compared with anything, since the
/// pin alone counts.
#[must_use]
pub fn server_name() -> ServerName<'static> {
    ServerName::try_from("limosa.invalid").expect("a constant that is a valid DNS name")
}

/// The fingerprint of the peer's certificate; `None` before the handshake's end.
#[must_use]
pub fn peer_fingerprint(connection: &CommonState) -> Option<Fingerprint> {
    peer_certificate(connection).map(|certificate| Fingerprint::of_certificate(certificate))
}

/// The peer's certificate; `None` before the handshake's end.
#[must_use]
pub fn peer_certificate(connection: &CommonState) -> Option<&CertificateDer<'static>> {
    // Rustls tells it once the signature is checked; we need not rely on when.
    if connection.is_handshaking() {
        return None;
    }
    connection.peer_certificates()?.first()
}

fn server(identity: &Identity, verifier: Clients, alpn: &[&[u8]]) -> Arc<ServerConfig> {
    let mut config = ServerConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has suites for TLS 1.3")
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified_key())));
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
    Arc::new(config)
}

fn client(identity: &Identity, verifier: Servers, alpn: &[u8]) -> Arc<ClientConfig> {
    let mut config = ClientConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has suites for TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified_key())));
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    // It would tell listeners on the way a name and decide nothing.
    config.enable_sni = false;
    Arc::new(config)
}

/// Never called, as only TLS 1.3 is negotiated; refuses all the same.
fn refuse_tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(Error::General("only TLS 1.3 is spoken here".to_owned()))
}

/// The schemes that a peer may sign the handshake with.
fn schemes() -> Vec<SignatureScheme> {
    provider().signature_verification_algorithms.supported_schemes()
}

/// Judges the certificates of clients.
#[derive(Debug)]
struct Clients {
    accepted: Accepted,
}

#[derive(Debug)]
enum Accepted {
    Trusted(TrustStore),
    Any,
}

impl ClientCertVerifier for Clients {
    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        match &self.accepted {
            Accepted::Any => Ok(ClientCertVerified::assertion()),
            Accepted::Trusted(trust)
                if trust.contains(&Fingerprint::of_certificate(end_entity)) =>
            {
                Ok(ClientCertVerified::assertion())
            }
            // Becomes the alert `access_denied`.
            Accepted::Trusted(_) => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &provider().signature_verification_algorithms;
        verify_tls13_signature(message, cert, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

/// Judges the certificates of servers: the pinned one, or any while pairing.
#[derive(Debug)]
struct Servers {
    expected: Option<Fingerprint>,
}

impl ServerCertVerifier for Servers {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let found = Fingerprint::of_certificate(end_entity);
        match self.expected {
            Some(expected) if expected != found => {
                let mismatch = PinMismatch { expected, found };
                Err(CertificateError::Other(OtherError(Arc::new(mismatch))).into())
            }
            _ => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &provider().signature_verification_algorithms;
        verify_tls13_signature(message, cert, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}
