//! What Limosa hosts say to each other and to operators, and the names they use.
//!
//! ```text
//! operator ── api ──► agent ── peer ──► agent
//!                       └───── frame ═════┘      (data channels)
//! ```
//!
//! **Invariants.** This crate does no I/O, asks no clock and starts no thread.
//! Types that cross a process boundary live here; everything read from outside
//! is checked by the type that holds it (a [`id::VmName`] that exists is valid).

pub mod api;
pub mod frame;
pub mod handover;
pub mod id;
pub mod migration;
pub mod peer;
pub mod plan;
pub mod version;
pub mod vm;
