//! Who holds a VM, and what nobody else may do with it meanwhile.
//!
//! ```text
//! no lock ─ offered ─► Moving ─┬──────────────────────► Settling ─ settled ─► no lock
//!                              └─ peer silent ─► InDoubt ──┘
//! ```
//!
//! A lock holds no live object of its holder: it lists what is refused and the text of each refusal, so
//! that a VM knows nothing of migrations.
//!
//! **Invariants.** Only the holder replaces or removes its lock, and does so under the VM's own mutex. A
//! holder with a mutex of its own takes that one first, the VM's second, never the other way round.

use limosa_protocol::id::MigrationId;
use limosa_protocol::migration::Role;

use crate::failure::{Failure, Hindrance};

/// The lock of a VM, as its holder published it last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmLock {
    pub holder: Holder,
    pub activity: Activity,
    pub blocks: Blocks,
    /// What the holder does not know and cannot find out by itself.
    pub doubt: Option<String>,
}

/// Who has locked a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    Migration { id: MigrationId, role: Role },
}

/// What the holder does with the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity {
    /// Contents or ownership are on their way.
    Moving,
    /// Nobody knows whether this host or another one owns the VM.
    InDoubt,
    /// The VM is this host's; another host has yet to confirm that.
    Settling,
}

/// What is refused while the lock is held, each with the text of its refusal.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Blocks {
    /// Any change of the VM
    pub change: Option<Hindrance>,
    /// Starting the guest from the disks of this host
    pub cold_start: Option<Hindrance>,
    /// The next move
    pub next_move: Option<Hindrance>,
    /// Removing the disks of this host
    pub delete: Option<Hindrance>,
}

impl VmLock {
    /// The migration that has the VM now, with the part of this host in it.
    pub fn moving(&self) -> Option<(MigrationId, Role)> {
        let Holder::Migration { id, role } = self.holder;
        (self.activity != Activity::Settling).then_some((id, role))
    }
}

/// Fails if something prevents the request.
pub fn expect_none(hindrance: Option<Hindrance>) -> Result<(), Failure> {
    hindrance.map_or(Ok(()), |hindrance| Err(hindrance.into()))
}
