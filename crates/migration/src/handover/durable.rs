//! The agent's store as the handover sees it: a migration's record and the
//! VM's, written in one step.

use limosa_protocol::handover::{Record, Store as HandoverStore};
use limosa_protocol::id::VmName;

use limosa_host::store::{MigrationRecord, Store, StoreError, VmRecord};

/// What becomes of the VM's record together with a migration's.
pub(crate) enum VmChange {
    Keep,
    Put(VmRecord),
    Remove,
}

/// The store, for one record of one migration.
pub(crate) struct Durable<'a> {
    pub(crate) store: &'a Store,
    pub(crate) migration: &'a mut MigrationRecord,
    pub(crate) vm: VmChange,
}

impl HandoverStore for Durable<'_> {
    type Error = StoreError;

    fn write_durably(&mut self, record: &Record) -> Result<(), StoreError> {
        let mut next = self.migration.clone();
        next.handover = *record;
        let vm: VmName = next.view.vm.clone();
        match &self.vm {
            VmChange::Keep => self.store.put(&next.view.id.to_string(), &next)?,
            VmChange::Put(of_vm) => self.store.put_migration_and_vm(&next, &vm, Some(of_vm))?,
            VmChange::Remove => self.store.put_migration_and_vm(&next, &vm, None)?,
        }
        *self.migration = next;
        Ok(())
    }
}
