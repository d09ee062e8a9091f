//! Two hosts learn each other's certificate, by a code that a person carries.
//!
//! ```text
//! initiator (the code is typed here)              responder (shows the code)
//!     ═══ TLS 1.3, both show any certificate and prove its key ═══
//!     Offer { element X, name }         ─────►  one attempt is counted
//!     (checks the responder's MAC)      ◄─────  Answer { element Y, name, MAC }
//!     pins the responder
//!     Confirmation { MAC }              ─────►  (checks it), pins the initiator
//! ```
//!
//! SPAKE2 turns the code into a strong key, so that what travels gives nothing
//! to guess with: the only way to try a code is to speak to one of the two, one
//! code an attempt. Both certificates' fingerprints are SPAKE2's identities and
//! stand, with both names, in what the MACs cover. Somebody in the middle must
//! show each side a certificate of his own; then the two sides compute with
//! different fingerprints and no MAC fits, though the code is right.
//!
//! **Invariants.** No I/O and no clock. Each value is used up by its next step,
//! so nothing can be replayed into it. A name is returned only by a `finish`
//! that verified the other side's MAC. An attempt counts when it begins, as the
//! answer already tells a guesser whether he was right.

mod code;
mod invitation;

pub use code::{BadCode, PairingCode, RandomFailed};
pub use invitation::{ATTEMPTS_MAX, Invitation, InvitationClosed, LIFETIME_S};

use std::fmt;

use limosa_protocol::id::{BadName, HostName};
use serde::{Deserialize, Serialize};
use spake2::{Ed25519Group, Identity as Side, Password, Spake2};

use crate::Fingerprint;
use crate::hex::HexArray;

/// Bytes of a SPAKE2 message: its side, then a compressed point.
const ELEMENT_BYTES: usize = 33;
/// Domain of the key that the MACs use; its text never changes.
const KEY_CONTEXT: &str = "limosa 2025-11 pairing v1 confirmation key";
/// Domains of the two MACs: one must never pass for the other.
const RESPONDER_LABEL: &[u8] = b"limosa pairing v1 responder";
const INITIATOR_LABEL: &[u8] = b"limosa pairing v1 initiator";

/// Why two hosts were not paired.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PairingError {
    /// The MAC does not fit: another code, or somebody between the hosts.
    #[error(
        "the pairing code is wrong, or somebody between the hosts changed their certificates: \
         compare the code and try again"
    )]
    NotConfirmed,
    /// The peer's message makes no sense.
    #[error("the peer sent a pairing message that is not valid")]
    BadMessage,
    /// Both ends show the same certificate.
    #[error("a host cannot be paired with itself")]
    Itself,
    /// Our own name breaks the rules.
    #[error("this host cannot be paired under its name")]
    OwnName(#[from] BadName),
}

/// First message, from the initiator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    element: HexArray<ELEMENT_BYTES>,
    name: HostName,
}

/// Second message, from the responder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    element: HexArray<ELEMENT_BYTES>,
    name: HostName,
    mac: HexArray<32>,
}

/// Third message, from the initiator, who trusts the responder by now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Confirmation {
    mac: HexArray<32>,
}

/// The side where the code was typed, waiting for an [`Answer`].
pub struct Initiator {
    spake: Spake2<Ed25519Group>,
    own: Party,
    peer_fingerprint: Fingerprint,
    element: HexArray<ELEMENT_BYTES>,
}

/// The side that shows the code, waiting for a [`Confirmation`].
pub struct Responder {
    /// What the initiator must send.
    expected: blake3::Hash,
    peer: Party,
}

impl Initiator {
    /// Begins a pairing.
    ///
    /// - `own_fingerprint`: of the certificate shown on this connection.
    /// - `peer_fingerprint`: of the one the peer showed, from
    ///   [`tls::peer_fingerprint`](crate::tls::peer_fingerprint); never from a message.
    /// - `own_name`: by which the peer will know us.
    pub fn start(
        code: &PairingCode,
        own_fingerprint: Fingerprint,
        peer_fingerprint: Fingerprint,
        own_name: &str,
    ) -> Result<(Self, Offer), PairingError> {
        let own = Party::new(own_fingerprint, own_name, peer_fingerprint)?;
        let (spake, element) = Spake2::start_a(
            &Password::new(code.secret()),
            &Side::new(&own_fingerprint.0),
            &Side::new(&peer_fingerprint.0),
        );
        let element = sized(&element);
        let offer = Offer { element, name: own.name.clone() };
        Ok((Self { spake, own, peer_fingerprint, element }, offer))
    }

    /// Checks the answer. On `Ok` the responder is who shows the code: send the
    /// confirmation, then trust the certificate under the returned name.
    ///
    /// The responder trusts us only once it has the confirmation: wait for its
    /// acknowledgement before telling the operator that both are paired.
    pub fn finish(self, answer: &Answer) -> Result<(Confirmation, String), PairingError> {
        let Self { spake, own, peer_fingerprint, element } = self;
        let peer = Party { fingerprint: peer_fingerprint, name: answer.name.clone() };
        let macs = Macs::new(spake, &answer.element, |key| {
            Macs::over(key, &own, &peer, &element, &answer.element)
        })?;
        // `blake3::Hash` compares in constant time.
        if macs.responder != blake3::Hash::from_bytes(answer.mac.0) {
            return Err(PairingError::NotConfirmed);
        }
        let mac = HexArray(*macs.initiator.as_bytes());
        Ok((Confirmation { mac }, peer.name.into()))
    }
}

impl Responder {
    /// Answers an offer. Before each call an attempt of the invitation must be
    /// counted, see [`Invitation::begin_attempt`].
    ///
    /// The parameters are as in [`Initiator::start`].
    pub fn respond(
        code: &PairingCode,
        own_fingerprint: Fingerprint,
        peer_fingerprint: Fingerprint,
        own_name: &str,
        offer: &Offer,
    ) -> Result<(Self, Answer), PairingError> {
        let own = Party::new(own_fingerprint, own_name, peer_fingerprint)?;
        let peer = Party { fingerprint: peer_fingerprint, name: offer.name.clone() };
        let (spake, element) = Spake2::start_b(
            &Password::new(code.secret()),
            &Side::new(&peer_fingerprint.0),
            &Side::new(&own_fingerprint.0),
        );
        let element = sized(&element);
        let macs = Macs::new(spake, &offer.element, |key| {
            Macs::over(key, &peer, &own, &offer.element, &element)
        })?;
        let mac = HexArray(*macs.responder.as_bytes());
        let answer = Answer { element, name: own.name, mac };
        Ok((Self { expected: macs.initiator, peer }, answer))
    }

    /// The only certificate that this pairing can end in trust for. Whoever
    /// brings the confirmation must be on a connection that showed it.
    #[must_use]
    pub fn peer_fingerprint(&self) -> Fingerprint {
        self.peer.fingerprint
    }

    /// Checks the confirmation. On `Ok` the initiator knows the code: use the
    /// invitation up, then trust the certificate of
    /// [`peer_fingerprint`](Self::peer_fingerprint) under the returned name.
    pub fn finish(self, confirmation: &Confirmation) -> Result<String, PairingError> {
        if self.expected != blake3::Hash::from_bytes(confirmation.mac.0) {
            return Err(PairingError::NotConfirmed);
        }
        Ok(self.peer.name.into())
    }
}

impl fmt::Debug for Initiator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Initiator").field("peer", &self.peer_fingerprint).finish_non_exhaustive()
    }
}

impl fmt::Debug for Responder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Responder").field("peer", &self.peer.fingerprint).finish_non_exhaustive()
    }
}

/// One side as the other sees it.
struct Party {
    fingerprint: Fingerprint,
    name: HostName,
}

impl Party {
    /// Our own side.
    fn new(own: Fingerprint, own_name: &str, peer: Fingerprint) -> Result<Self, PairingError> {
        if own == peer {
            return Err(PairingError::Itself);
        }
        Ok(Self { fingerprint: own, name: own_name.parse()? })
    }
}

/// What each side must show.
struct Macs {
    initiator: blake3::Hash,
    responder: blake3::Hash,
}

impl Macs {
    /// Ends SPAKE2 and has `over` compute with the key.
    fn new(
        spake: Spake2<Ed25519Group>,
        peer_element: &HexArray<ELEMENT_BYTES>,
        over: impl FnOnce(&[u8; 32]) -> Self,
    ) -> Result<Self, PairingError> {
        let shared = spake.finish(&peer_element.0).map_err(|_| PairingError::BadMessage)?;
        Ok(over(&blake3::derive_key(KEY_CONTEXT, &shared)))
    }

    /// Both MACs over the whole exchange. Every part has a fixed or a written
    /// length, so no two exchanges give the same bytes.
    fn over(
        key: &[u8; 32],
        initiator: &Party,
        responder: &Party,
        offered: &HexArray<ELEMENT_BYTES>,
        answered: &HexArray<ELEMENT_BYTES>,
    ) -> Self {
        let mac = |label: &[u8]| {
            let mut hasher = blake3::Hasher::new_keyed(key);
            for part in [
                label,
                &initiator.fingerprint.0,
                &responder.fingerprint.0,
                initiator.name.as_str().as_bytes(),
                responder.name.as_str().as_bytes(),
                &offered.0,
                &answered.0,
            ] {
                let length = u64::try_from(part.len()).expect("a length in memory fits 64 bits");
                hasher.update(&length.to_le_bytes()).update(part);
            }
            hasher.finalize()
        };
        Self { initiator: mac(INITIATOR_LABEL), responder: mac(RESPONDER_LABEL) }
    }
}

fn sized(element: &[u8]) -> HexArray<ELEMENT_BYTES> {
    HexArray(element.try_into().expect("SPAKE2 over Ed25519 sends a side and a point"))
}

#[cfg(test)]
mod tests;
