//! Who is at the other end, and may they: host certificates, pairing, TLS settings.
//!
//! ```text
//! identity ──► own certificate and key ──┐
//!                                        ├──► tls ──► rustls configurations
//! pairing ──► trust (pinned peers) ──────┘
//! ```
//!
//! Two hosts meet once, by [`pairing`]: a short code, shown on one of them and
//! typed on the other, proves that each sees the other's real certificate. From
//! then on each pins that certificate in its [`trust`] store, and [`tls`] lets
//! nobody else in.
//!
//! **Invariants.** This crate opens no socket and asks no clock; its only files
//! are the two of [`identity`]. A certificate is trusted for its fingerprint
//! alone: never for its issuer, its names or its dates. Nothing here makes a
//! new identity where an old one stands.

mod der;
mod fingerprint;
mod hex;
pub mod identity;
pub mod pairing;
mod provider;
pub mod tls;
pub mod trust;

pub use fingerprint::{BadFingerprint, Fingerprint};
pub use identity::{Identity, IdentityError};
pub use trust::{PeerRole, TrustError, TrustStore, TrustedPeer};
