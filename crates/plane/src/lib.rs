//! The data plane: moves guest RAM and disk blocks between two hosts.
//!
//! ```text
//! source       QEMU ─► reader ─┬─► sender 0 (pack, digest) ═► channel 0 ┐
//!              QEMU ─► nbd ────┴─► sender n (pack, digest) ═► channel n │ TLS
//!                                        ◄═ return path (acks) ═════════┤
//! destination  memfd, QEMU's nbd ◄─ receiver 0 … n ◄════════════════════┘
//! ```
//!
//! Each box is a thread; bounded queues join them, so a slow stage slows the one
//! before it and memory does not grow. A connection is used one way after its
//! handshake, so no TLS state is shared by two threads.
//!
//! **Invariants.** This crate never stops or starts a guest: it reports, the
//! agent decides. A page or block always goes by the same channel
//! ([`route`]), so its versions never overtake each other. Bytes from a channel
//! are hostile until `protocol::frame` and the receiver accepted them.

mod channel;
mod destination;
mod difference;
mod digest;
mod disk;
mod halt;
mod meter;
pub mod nbd;
mod ram;
mod route;
mod settings;
mod source;
mod versions;

pub use channel::{ChannelIo, ReadWrite};
pub use destination::{DestinationPlane, DestinationSpec, RamTarget};
pub use digest::full_ram_digest;
pub use disk::{DiskTarget, RawTarget};
pub use halt::{PlaneError, PlaneEvent};
pub use settings::PlaneSettings;
pub use source::{RamBlockSpec, SourceDisk, SourcePlane, SourceSpec};

/// Bytes of a guest page.
pub const PAGE_BYTES: usize = limosa_qemu::stream::PAGE_BYTES;
