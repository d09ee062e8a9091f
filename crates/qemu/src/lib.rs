//! Everything Limosa knows about stock QEMU, 7.2 to 10.x, and nothing else.
//!
//! ```text
//! probe, accelerator, quirk, pci ─► launch (command line) ─► process (one QEMU)
//!                                ram (memory of the guest) ─┘   │
//!                      power, block, migrate ─► qmp ◄───────────┘
//!                                      image ─► files, with qemu-img
//! ```
//!
//! **Invariants.** No name, flag or format of QEMU is written anywhere else in the
//! workspace. Answers of QEMU are checked before they are used. This crate decides
//! nothing: callers order each act of QEMU.

pub mod accelerator;
pub mod block;
pub mod image;
pub mod launch;
pub mod migrate;
mod pci;
pub mod power;
pub mod probe;
pub mod process;
pub mod qmp;
pub mod quirk;
pub mod ram;
pub mod stream;
pub mod version;
#[cfg(feature = "faults")]
pub mod watch;

#[cfg(test)]
mod tests;
