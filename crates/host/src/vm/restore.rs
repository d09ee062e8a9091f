//! Finds the VMs of this host and their QEMUs again, when the agent starts.

use std::sync::Arc;

use limosa_protocol::id::VmName;
use limosa_protocol::migration::Role;
use limosa_protocol::vm::VmDefinition;

use super::{DEFINITION_FILE, Vm, cgroup, placeholder, read_definition, run};
use crate::Host;
use crate::failure::{Failure, Result};
use crate::store::{MigrationRecord, VmRecord};

/// Reads all recorded VMs and finds their QEMUs again. One that cannot be read
/// keeps no other from being found.
pub async fn restore(host: &Arc<Host>) -> anyhow::Result<()> {
    let migrations = host.store.all::<MigrationRecord>()?;
    for (key, record) in host.store.all::<VmRecord>()? {
        let Ok(name) = key.parse::<VmName>() else {
            tracing::error!(vm = key, "a record whose key is no name of a VM is left alone");
            continue;
        };
        let (vm, unusable) = match recorded_definition(&name, &record, &migrations) {
            Ok(definition) => (Vm::new(definition, record), None),
            Err(failure) => {
                (Vm::new(placeholder(name, &record), record), Some(failure.to_string()))
            }
        };
        let vm = Arc::new(vm);
        if let Err(failure) = host.vms.add(&host.name, Arc::clone(&vm)) {
            tracing::error!(vm = key, %failure, "a recorded VM is left out");
        } else if let Some(failure) = unusable {
            tracing::error!(vm = key, failure, "a recorded VM cannot be used");
            vm.lock().await.unusable = Some(format!(
                "{failure}. Mount or put back what is missing there, then restart limosad"
            ));
        } else {
            recall_addresses(&vm, &migrations).await;
            run::reattach(host, &vm).await;
        }
    }
    cgroup::remove_stale().await;
    Ok(())
}

/// The definition of a recorded VM. That of a VM which is just changing hosts is
/// also in its migration's record: its files may be half removed.
fn recorded_definition(
    name: &VmName,
    record: &VmRecord,
    migrations: &[(String, MigrationRecord)],
) -> Result<VmDefinition> {
    let read = read_definition(&record.configuration).and_then(|definition| {
        if definition.name == *name {
            return Ok(definition);
        }
        let path = record.configuration.join(DEFINITION_FILE);
        let other = definition.name;
        Err(Failure::conflict(format!("{} is the definition of VM {other}", path.display())))
    });
    read.or_else(|failure| {
        let unsettled = migrations.iter().map(|(_, migration)| migration);
        let mut unsettled = unsettled.filter(|migration| !migration.is_ended());
        let own = unsettled.rfind(|migration| migration.view.vm == *name);
        own.and_then(|migration| migration.definition.clone()).ok_or(failure)
    })
}

/// Addresses that came with the VM's last move: one that is still paused since
/// then has had no way to show them here.
async fn recall_addresses(vm: &Vm, migrations: &[(String, MigrationRecord)]) {
    let inner = vm.lock().await;
    let own = |record: &&MigrationRecord| {
        let moved = record.definition.as_ref().filter(|_| record.view.role == Role::Destination);
        moved.is_some_and(|moved| moved.uuid == inner.definition.uuid)
    };
    // Keys are in the order of time.
    if let Some(last) = migrations.iter().map(|(_, record)| record).rfind(own) {
        vm.addresses.take(&last.addresses, &inner.definition.nics);
    }
}

#[cfg(test)]
mod tests {
    use limosa_protocol::id::Epoch;

    use super::*;
    use crate::vm::write_definition;

    /// Goal: a folder that is not mounted, or holds another VM's definition,
    /// gives no definition, and the reason.
    #[test]
    fn a_definition_that_is_missing_or_anothers_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let configuration = folder.path().to_owned();
        let of_vm = VmRecord { configuration, epoch: Epoch(1), run: None, given_up_to: None };
        let name: VmName = "web1".parse().unwrap();
        let missing = recorded_definition(&name, &of_vm, &[]).unwrap_err().to_string();
        assert!(missing.contains(DEFINITION_FILE), "{missing}");
        let definition: VmDefinition = toml::from_str("name = 'web1'\nmemory_mib = 64").unwrap();
        write_definition(&definition, folder.path()).unwrap();
        assert_eq!(recorded_definition(&name, &of_vm, &[]).unwrap(), definition);
        let other = recorded_definition(&"web2".parse().unwrap(), &of_vm, &[]);
        let other = other.unwrap_err().to_string();
        assert!(other.contains("of VM web1"), "{other}");
    }
}
