//! Migrations: the jobs under way, those that wait, and what is reported of those that ended.
//!
//! ```text
//!            source                                   destination
//!  outgoing: prepare ──── offer, files, receive ────► incoming: place, images, QEMU
//!            mirror  ════ disk frames ══════════════► its NBD export
//!            pre-copy ═══ RAM frames ═══════════════► its memfd
//!            switchover ─ ready? ───────────────────► flush, compare, record `ready`
//!            record `handed-over` ─ commit ─────────► record `owner`, run, announce
//!            retire                                   done
//! ```
//!
//! **Invariant.** [`outgoing`] and [`incoming`] bring the VM's contents across;
//! who may run it is decided by [`handover`] alone.

mod answer;
mod compare;
mod handover;
mod incoming;
mod job;
mod migrations;
mod outgoing;
pub mod peer;
mod queue;
pub mod settings;

pub use answer::FilePart;
pub use handover::{Restored, force_owner, recovery, restore, settle};
pub use incoming::accept_channel;
pub use migrations::{Migrations, delete_vm, start_vm};
pub use queue::{request_move, run as run_queue};
