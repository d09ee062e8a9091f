//! The peers that may come in, by the fingerprint of their certificate.
//!
//! ```text
//! agent's durable store ──insert──► TrustStore ◄──lookup── TLS handshakes
//! pairing ──────────────────insert──►     │
//! operator ─────────────────remove──►     └─ clones share one set
//! ```
//!
//! In memory only: the agent keeps the list durably and fills this at its start.
//!
//! **Invariants.** One fingerprint has one name and one name has one
//! fingerprint. A name that is taken never moves to another certificate by
//! itself: that would let whoever pairs next take the place of an old peer.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};

use crate::Fingerprint;
pub use crate::der::DER_BYTES_MAX;

/// What a peer may do. See `docs/security.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PeerRole {
    /// Another host: may offer and receive migrations.
    Host,
    /// A person or program: may use the API as the local administrator does.
    Operator,
}

/// A peer whose certificate is pinned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustedPeer {
    /// The name it gave when it was paired, or that the operator gave it.
    pub name: String,
    /// What it is recognised by.
    pub fingerprint: Fingerprint,
    /// What it may do.
    pub role: PeerRole,
    /// Its certificate, for display and export; trust comes from the fingerprint.
    #[serde(with = "crate::der")]
    pub certificate_der: Vec<u8>,
}

impl TrustedPeer {
    /// A peer with the fingerprint of this certificate.
    #[must_use]
    pub fn new(name: String, role: PeerRole, certificate_der: Vec<u8>) -> Self {
        let fingerprint = Fingerprint::of_certificate(&certificate_der);
        Self { name, fingerprint, role, certificate_der }
    }
}

/// A text that an operator gave as a certificate, and is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a certificate: expected one in PEM, as the other side has it in identity.crt")]
pub struct BadCertificate;

/// The DER of the one certificate in a PEM text, to be trusted.
///
/// A text with several is refused: it would not be clear which one is meant.
pub fn certificate_from_pem(pem: &str) -> Result<Vec<u8>, BadCertificate> {
    if pem.len() > 2 * DER_BYTES_MAX {
        return Err(BadCertificate);
    }
    let mut certificates = CertificateDer::pem_slice_iter(pem.as_bytes());
    let (Some(Ok(certificate)), None) = (certificates.next(), certificates.next()) else {
        return Err(BadCertificate);
    };
    rustls::server::ParsedCertificate::try_from(&certificate).map_err(|_| BadCertificate)?;
    Ok(certificate.to_vec())
}

/// Why a peer was not added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    /// Another certificate holds this name. Remove that peer first.
    #[error(
        "the name {name:?} belongs to another certificate ({fingerprint}): if that peer is gone \
         or was installed anew, remove it first, then pair again"
    )]
    NameTaken {
        /// The name both want.
        name: String,
        /// The certificate that has it.
        fingerprint: Fingerprint,
    },
    /// The certificate is trusted in another role. Remove that peer first.
    #[error("that certificate is trusted as {name:?} in another role: remove that peer first")]
    RoleTaken {
        /// The peer that has it.
        name: String,
    },
    /// The record does not fit itself; the store it came from is damaged.
    #[error("the certificate kept for {name:?} does not have the fingerprint {fingerprint}")]
    Damaged {
        name: String,
        /// The fingerprint in the record.
        fingerprint: Fingerprint,
    },
}

type Peers = HashMap<Fingerprint, TrustedPeer>;

/// The set of trusted peers. Clones share it; a change is seen by the next
/// handshake. Connections that are already open are the caller's to close.
#[derive(Debug, Clone, Default)]
pub struct TrustStore {
    peers: Arc<RwLock<Peers>>,
}

impl TrustStore {
    /// An empty store: nobody may come in.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Trusts a peer from now on. A peer that is known already (by its
    /// fingerprint) takes the new name; its role stays.
    pub fn insert(&self, peer: TrustedPeer) -> Result<(), TrustError> {
        add(&mut self.peers.write().unwrap_or_else(PoisonError::into_inner), peer)
    }

    /// Trusts a peer no more; returns what was removed.
    pub fn remove(&self, name: &str) -> Option<TrustedPeer> {
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        let fingerprint = peers.values().find(|peer| peer.name == name)?.fingerprint;
        peers.remove(&fingerprint)
    }

    /// The peer with this fingerprint, if it is trusted.
    #[must_use]
    pub fn lookup(&self, fingerprint: &Fingerprint) -> Option<TrustedPeer> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner).get(fingerprint).cloned()
    }

    /// Whether a peer with this fingerprint may come in.
    #[must_use]
    pub fn contains(&self, fingerprint: &Fingerprint) -> bool {
        self.peers.read().unwrap_or_else(PoisonError::into_inner).contains_key(fingerprint)
    }

    /// All peers, sorted by name.
    #[must_use]
    pub fn peers(&self) -> Vec<TrustedPeer> {
        let peers = self.peers.read().unwrap_or_else(PoisonError::into_inner);
        let mut peers: Vec<_> = peers.values().cloned().collect();
        peers.sort_by(|one, other| one.name.cmp(&other.name));
        peers
    }
}

/// Checks before it changes: a refused peer leaves the set as it was.
fn add(peers: &mut Peers, peer: TrustedPeer) -> Result<(), TrustError> {
    let TrustedPeer { name, fingerprint, certificate_der, .. } = &peer;
    if Fingerprint::of_certificate(certificate_der) != *fingerprint {
        return Err(TrustError::Damaged { name: name.clone(), fingerprint: *fingerprint });
    }
    let holder = peers.values().find(|other| other.name == *name);
    if let Some(holder) = holder.filter(|holder| holder.fingerprint != *fingerprint) {
        let fingerprint = holder.fingerprint;
        return Err(TrustError::NameTaken { name: name.clone(), fingerprint });
    }
    let known = peers.get(fingerprint);
    if let Some(known) = known.filter(|known| known.role != peer.role) {
        return Err(TrustError::RoleTaken { name: known.name.clone() });
    }
    peers.insert(peer.fingerprint, peer);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str, certificate: &[u8]) -> TrustedPeer {
        TrustedPeer::new(name.to_owned(), PeerRole::Host, certificate.to_vec())
    }

    /// Goal: a newcomer cannot take the name of a peer; the peer itself may be renamed.
    #[test]
    fn a_name_stays_with_its_certificate() {
        let store = TrustStore::new();
        store.insert(peer("one", b"first")).unwrap();
        assert!(matches!(
            store.insert(peer("one", b"second")),
            Err(TrustError::NameTaken { fingerprint, .. })
                if fingerprint == Fingerprint::of_certificate(b"first")
        ));
        assert_eq!(store.peers(), [peer("one", b"first")]);

        store.insert(peer("uno", b"first")).unwrap();
        assert_eq!(store.peers(), [peer("uno", b"first")]);
        store.insert(peer("one", b"second")).unwrap();
        assert_eq!(store.remove("uno"), Some(peer("uno", b"first")));
        assert_eq!(store.lookup(&Fingerprint::of_certificate(b"first")), None);
    }

    /// Goal: no certificate gains or loses rights by being added again.
    #[test]
    fn a_role_stays_with_its_certificate() {
        let store = TrustStore::new();
        store.insert(peer("one", b"first")).unwrap();
        let operator = TrustedPeer { role: PeerRole::Operator, ..peer("alice", b"first") };
        assert_eq!(store.insert(operator), Err(TrustError::RoleTaken { name: "one".to_owned() }));
        assert_eq!(store.peers(), [peer("one", b"first")]);
    }

    /// Goal: a damaged record is refused and changes nothing.
    #[test]
    fn a_damaged_record_changes_nothing() {
        let store = TrustStore::new();
        store.insert(peer("one", b"first")).unwrap();
        let mut damaged = peer("two", b"second");
        damaged.certificate_der.push(0);
        assert!(matches!(store.insert(damaged), Err(TrustError::Damaged { .. })));
        assert_eq!(store.peers(), [peer("one", b"first")]);
    }

    /// Goal: exactly one certificate is taken from a text, and nothing that is none.
    #[test]
    fn a_certificate_is_read_from_pem() {
        let folder = tempfile::tempdir().unwrap();
        let identity = crate::Identity::load_or_create(folder.path(), "alice").unwrap();
        let read = |name| std::fs::read_to_string(folder.path().join(name)).unwrap();
        let (certificate, key) = (read("identity.crt"), read("identity.key"));
        assert_eq!(
            certificate_from_pem(&certificate).unwrap(),
            identity.certificate_der().to_vec()
        );
        let twice = certificate.repeat(2);
        let no_certificate = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        for bad in ["", &key, &twice, &certificate[..200], no_certificate] {
            assert_eq!(certificate_from_pem(bad), Err(BadCertificate), "{bad}");
        }
    }

    /// Goal: a peer survives the agent's durable store.
    #[test]
    fn a_peer_round_trips_as_json() {
        let before = peer("one", b"first");
        let json = serde_json::to_string(&before).unwrap();
        assert_eq!(serde_json::from_str::<TrustedPeer>(&json).unwrap(), before);
        let long = "0".repeat(2 * DER_BYTES_MAX + 2);
        let json = json.replace(r#""certificate_der":""#, &format!(r#""certificate_der":"{long}"#));
        assert!(serde_json::from_str::<TrustedPeer>(&json).is_err());
    }
}
