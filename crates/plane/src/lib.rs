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
//! before it and memory does not grow. A connection belongs to one thread on each
//! side, so no TLS state is shared by two.
//!
//! A connection that breaks, or is silent, takes the others with it ([`link`]):
//! every stage stands still until new ones are brought, then goes on from what
//! the destination has. Frames wait in [`replay`] until they are acknowledged.
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
mod holes;
mod link;
mod meter;
mod page;
mod page_cache;
mod queue;
mod ram;
mod replay;
mod route;
mod settings;
mod shutdown;
mod source;
#[cfg(test)]
mod tests;

pub use channel::{ChannelIo, ReadWrite};
pub use destination::{DestinationDisk, DestinationPlane, DestinationSpec, RamTarget};
pub use digest::ram_digests;
pub use disk::DiskTarget;
pub use page::{PAGE_BYTES, PagePlace};
pub use settings::{PlaneSettings, SILENCE_MAX};
pub use shutdown::{EVENT_COUNT_MAX, Place, PlaneError, PlaneEvent, PlaneEvents};
pub use source::{RamBlockSpec, SourceDisk, SourcePlane, SourceSpec};
