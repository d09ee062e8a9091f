//! The proof without which no commit is sent.

use crate::id::{Epoch, MigrationId};

/// Proof that the commit point is passed: made of the receipt of `handed-over`.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Committed {
    migration: MigrationId,
    epoch: Epoch,
}

impl Committed {
    /// Called only by the source's machine, in states that it enters with that receipt.
    pub(super) fn new(migration: MigrationId, epoch: Epoch) -> Self {
        Self { migration, epoch }
    }

    /// Which migration.
    #[must_use]
    pub fn migration(&self) -> MigrationId {
        self.migration
    }

    /// The epoch handed over.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }
}
