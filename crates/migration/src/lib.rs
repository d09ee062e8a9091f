//! Migrations: the jobs under way, those that wait, and what is reported of those that ended.
//!
//! ```text
//!  source                                   destination
//!  prepare ──── offer, files, receive ────► place, images, QEMU
//!  mirror  ════ disk frames ══════════════► its NBD export
//!  pre-copy ═══ RAM frames ═══════════════► its memfd
//!  switchover ─ ready? ───────────────────► flush, compare, record `ready`
//!  record `handed-over` ─ commit ─────────► record `owner`, run, announce
//!  retire                                   done
//! ```
//!
//! **Invariant.** [`source`] and [`destination`] bring the VM's contents across;
//! who may run it is decided by [`handover`] alone.

mod admission;
mod answer;
mod context;
mod destination;
mod handover;
mod job;
mod migrations;
pub mod peer;
mod preflight;
mod queue;
pub mod settings;
mod source;

pub use admission::{request_move, run as run_queue};
pub use answer::FilePart;
pub use destination::accept_channel;
pub use handover::{Restored, force_owner, recovery, restore, settle};
pub use migrations::{Migrations, delete_vm, start_vm};
