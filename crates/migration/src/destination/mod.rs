//! The destination's half: from the offer to a VM that runs, or to nothing.
//!
//! ```text
//! offer ─► placed ─ receive ─► receiving ─ ready? ─► ready ─ commit ─► owner
//!             └───────────────────┴───────── abort, failure ─► declined
//! ```
//!
//! **Invariants.** Everything made here is noted in the record before or while
//! it is made, so that declining removes it also after a crash. What is received
//! goes to a QEMU that stands; only [`super::handover`] lets it run.

mod accept;
mod channels;
mod connections;
mod guest;
mod incoming;
mod place;
mod receive;
mod retry;
mod small_files;
mod take_over;
mod undo;
pub(crate) mod verify;

pub use channels::accept_channel;
pub(crate) use connections::ConnectionGroup;
pub(crate) use guest::{expect_paused, resume_guest};
pub(crate) use incoming::Incoming;
pub(crate) use undo::{end_plane, free, removable};
