//! NBD over unix sockets: the server into which the source's QEMU mirrors a
//! disk, and the client that writes into the destination's QEMU.
//!
//! ```text
//! source QEMU, mirror job ─► server ─► DiskSink ═ plane ═► client ─► destination QEMU's export
//! ```
//!
//! The protocol is that of the NBD project's `doc/proto.md`: fixed newstyle
//! handshake, simple replies.
//!
//! **Invariant.** Lengths are checked before memory is allocated for them.

pub mod client;
mod export;
mod negotiation;
pub mod server;
#[cfg(test)]
mod tests;
mod wire;

pub use export::Export;
pub use wire::REQUEST_BYTES_MAX;
