//! Versions of what hosts say to each other, newest first.
//!
//! Two agents talk when both name the same number; a newer agent keeps speaking
//! the version before its own, so that hosts can be upgraded one by one.

/// The peer protocol of this build: control messages ([`crate::peer`]) and
/// frames ([`crate::frame`]) together.
///
/// | version | since | what changed |
/// |--------:|-------|--------------|
/// |       1 | 0.1   | the first    |
pub const PEER_VERSION: u32 = 1;

/// The oldest peer protocol that this build still speaks.
pub const PEER_VERSION_MIN: u32 = 1;
