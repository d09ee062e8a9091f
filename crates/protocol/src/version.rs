//! Versions of what hosts say to each other, newest first.
//!
//! Two agents talk when the source's number lies in the range of the
//! destination; otherwise `prepare` says which of the two is to be upgraded.
//! There is one version so far, so nothing older is spoken yet. The first change
//! that breaks it raises [`PEER_VERSION`]; whether the version before stays
//! understood, so that hosts can be upgraded one by one, is what
//! [`PEER_VERSION_MIN`] then says.

/// The peer protocol of this build: control messages ([`crate::peer`]) and
/// frames ([`crate::frame`]) together.
///
/// | version | since | what changed |
/// |--------:|-------|--------------|
/// |       1 | 0.1   | the first    |
pub const PEER_VERSION: u32 = 1;

/// The oldest peer protocol that this build still speaks.
pub const PEER_VERSION_MIN: u32 = 1;
