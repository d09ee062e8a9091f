//! The VMs of this host, by name.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use limosa_protocol::id::{HostName, VmName};

use crate::failure::{Failure, Result};
use crate::vm::{Inner, Vm};

/// Most VMs of one host.
const VM_COUNT_MAX: usize = 1024;

/// The VMs of this host.
#[derive(Default)]
pub struct VmRegistry {
    vms: Mutex<BTreeMap<VmName, Arc<Vm>>>,
}

impl VmRegistry {
    /// All VMs, by name.
    pub fn all(&self) -> Vec<Arc<Vm>> {
        self.lock().values().cloned().collect()
    }

    /// The VM of a name.
    pub fn get(&self, name: &VmName) -> Option<Arc<Vm>> {
        self.lock().get(name).cloned()
    }

    /// Adds a VM of the host `here` unless its name is taken.
    pub fn add(&self, here: &HostName, vm: Arc<Vm>) -> Result<()> {
        let mut vms = self.lock();
        if vms.contains_key(&vm.name) {
            return Err(Failure::conflict(format!(
                "host {here} already has a VM {}: choose another name or delete that one",
                vm.name
            )));
        }
        if vms.len() >= VM_COUNT_MAX {
            return Err(Failure::conflict(format!(
                "host {here} has {VM_COUNT_MAX} VMs, the most it can have"
            )));
        }
        vms.insert(vm.name.clone(), vm);
        Ok(())
    }

    /// Forgets a VM, and turns away who waits for its mutex, which guards `inner`.
    pub fn remove(&self, vm: &Arc<Vm>, inner: &mut Inner) {
        inner.has_left = true;
        let mut vms = self.lock();
        if vms.get(&vm.name).is_some_and(|held| Arc::ptr_eq(held, vm)) {
            vms.remove(&vm.name);
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VmName, Arc<Vm>>> {
        // No code that holds this lock can panic halfway through a change.
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
