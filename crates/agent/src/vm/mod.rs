//! VMs of this host: what they are, whether they run, and the one lock of each.
//!
//! ```text
//!          start             stop, guest's own power-off
//!   off ─────────► running ─────────────────────────────► off
//!                  ▲     │ pause
//!            resume│     ▼
//!                  paused
//! ```
//!
//! **Invariants.** Everything that changes a VM holds its lock ([`Vm::lock`]),
//! so that two requests never work on one QEMU. While a migration has the VM
//! ([`Inner::migration`]), nothing else may change it. Who still holds a VM that
//! has left this host ([`Inner::has_left`]) cannot change it either. A QEMU is
//! recorded in the store before its guest runs the first instruction. A recorded
//! VM whose definition cannot be read keeps its name and record.

pub(crate) mod announce;
pub(crate) mod cgroup;
pub(crate) mod create;
pub(crate) mod files;
pub(crate) mod power;
pub(crate) mod run;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use limosa_protocol::api;
use limosa_protocol::id::{MigrationId, VmName};
use limosa_protocol::migration::Role;
use limosa_protocol::vm::{Boot, Places, VmDefinition};
use limosa_qemu::accelerator::Accelerator;
use limosa_qemu::process::{self, ProcessId};
use limosa_qemu::qmp::Qmp;
use tokio::sync::{Mutex, MutexGuard};

use crate::agent::{Agent, wire_accelerator};
use crate::failure::{Failure, Hindrance, OrFail, Result};
use crate::migration::handover::Handover;
use crate::net::learn::Addresses;
use crate::store::{MigrationRecord, VmRecord};

/// Longest wait for QEMU when somebody only looks at its VM.
const LOOK_MAX: Duration = Duration::from_secs(3);

/// One VM of this host.
pub(crate) struct Vm {
    pub(crate) name: VmName,
    /// The definition it came with: its identity, addresses, images and places,
    /// which no other VM may have, to be compared without waiting for its lock.
    pub(crate) taken: VmDefinition,
    pub(crate) addresses: Addresses,
    /// Held by the console that is open: QEMU's serial line takes one at a time.
    pub(crate) console: Arc<Mutex<()>>,
    inner: Mutex<Inner>,
}

/// What the lock of a VM protects.
pub(crate) struct Inner {
    pub(crate) definition: VmDefinition,
    pub(crate) record: VmRecord,
    pub(crate) qemu: Option<Qemu>,
    /// The migration that has the VM, and which half is done here.
    pub(crate) migration: Option<(MigrationId, Role)>,
    /// A migration that is not settled with the other host yet; the VM may be
    /// ours, and run, long before it is.
    pub(crate) handover: Option<Handover>,
    /// Why the VM cannot be used, when it cannot.
    pub(crate) fault: Option<String>,
    /// Why nothing of the VM may be changed until the agent is restarted.
    pub(crate) unusable: Option<String>,
    /// It was moved away or deleted, or never came to be; set under the lock, for
    /// those who waited for it.
    pub(crate) has_left: bool,
}

/// A QEMU that runs.
#[derive(Clone)]
pub(crate) struct Qemu {
    pub(crate) process: ProcessId,
    pub(crate) qmp: Qmp,
    pub(crate) accelerator: Accelerator,
    pub(crate) cgroup: Option<PathBuf>,
}

impl Vm {
    /// A VM that does not run.
    pub(crate) fn new(definition: VmDefinition, record: VmRecord) -> Self {
        Self {
            name: definition.name.clone(),
            taken: definition.clone(),
            addresses: Addresses::default(),
            console: Arc::default(),
            inner: Mutex::new(Inner {
                definition,
                record,
                qemu: None,
                migration: None,
                fault: None,
                unusable: None,
                has_left: false,
                handover: None,
            }),
        }
    }

    /// Closes an earlier move of a VM that stayed, if that needs no word of its
    /// destination: one that was never asked whether it is ready can have nothing of it.
    pub(crate) async fn settle_alone(&self) {
        let earlier = self.lock().await.handover.clone();
        if let Some(Handover::Source(driver)) = earlier
            && driver.status().is_ours
        {
            driver.move_on().await;
        }
    }

    /// Waits until nobody else works on the VM.
    pub(crate) async fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().await
    }

    /// Locks the VM for a change that an operator wants.
    pub(crate) async fn lock_for_change(&self) -> Result<MutexGuard<'_, Inner>> {
        let inner = self.inner.lock().await;
        match inner.hindrance() {
            None => Ok(inner),
            Some(hindrance) => Err(hindrance.into()),
        }
    }

    /// The VM as operators see it. QEMU is asked without the lock: one that does
    /// not answer keeps nobody from turning it off.
    pub(crate) async fn view(&self) -> api::Vm {
        let (mut view, asked) = self.view_without_qemu().await;
        if let Some(qemu) = asked {
            let looked = tokio::time::timeout(LOOK_MAX, power::look(&qemu.qmp)).await;
            let (power, stopped_by) = match looked {
                Ok((power, why)) => (power, why.map(|why| format!("its guest {why}"))),
                Err(_) => {
                    let pid = qemu.process.pid;
                    (api::Power::Fault, Some(format!("QEMU (process {pid}) does not answer")))
                }
            };
            view.power = power;
            view.fault = view.fault.or(stopped_by);
        }
        view
    }

    /// What is known of the VM here, and the QEMU that is to be asked for more.
    async fn view_without_qemu(&self) -> (api::Vm, Option<Qemu>) {
        let inner = self.inner.lock().await;
        let status = inner.handover.as_ref().map(Handover::status);
        let doubt = status.and_then(|status| status.doubt);
        let is_ours = status.is_none_or(|status| status.is_ours);
        let mut asked = None;
        let power = match (&inner.migration, &inner.qemu) {
            _ if inner.unusable.is_some() => api::Power::Fault,
            _ if doubt.is_some() && !is_ours => api::Power::InDoubt,
            _ if inner.record.given_up_to.is_some() => api::Power::GivenUp,
            (Some((_, Role::Source)), _) => api::Power::MovingOut,
            (Some((_, Role::Destination)), _) => api::Power::MovingIn,
            (None, None) if inner.fault.is_some() => api::Power::Fault,
            (None, None) => api::Power::Off,
            (None, Some(qemu)) => {
                asked = Some(qemu.clone());
                // Until it has answered.
                api::Power::Fault
            }
        };
        let view = api::Vm {
            definition: inner.definition.clone(),
            power,
            epoch: inner.record.epoch,
            pid: inner.qemu.as_ref().map(|qemu| qemu.process.pid),
            accelerator: inner.qemu.as_ref().map(|qemu| wire_accelerator(qemu.accelerator)),
            migration: inner.migration.map(|(id, _)| id),
            addresses: self.addresses.list(),
            fault: inner.unusable.clone().or_else(|| inner.fault.clone()),
            doubt: inner
                .handover
                .as_ref()
                .zip(doubt)
                .map(|(driver, doubt)| driver.doubt_text(doubt)),
            given_up_to: inner.record.given_up_to.clone(),
        };
        (view, asked)
    }
}

impl Inner {
    /// Whether that QEMU is the VM's now.
    fn has(&self, qemu: &Qemu) -> bool {
        self.qemu.as_ref().is_some_and(|current| current.process == qemu.process)
    }

    /// What keeps anybody from changing the VM now, and what to do about it.
    pub(crate) fn hindrance(&self) -> Option<Hindrance> {
        let name = &self.definition.name;
        if self.has_left {
            return Some(Hindrance {
                message: format!("VM {name} has left this host meanwhile"),
                remedy: "`limosa vm list` shows those there are".to_owned(),
            });
        }
        if let Some(why) = &self.unusable {
            let message = format!("VM {name} cannot be used");
            return Some(Hindrance { message, remedy: why.clone() });
        }
        if let Some(hindrance) = self.handover.as_ref().and_then(Handover::hindrance) {
            return Some(hindrance);
        }
        if let Some((id, _)) = self.migration {
            return Some(Hindrance {
                message: format!("VM {name} is being moved"),
                remedy: format!(
                    "wait for it with `limosa migration watch {id}`, or end it with \
                     `limosa migration cancel {id}`"
                ),
            });
        }
        self.unanswering()
    }

    /// A QEMU that lives and does not answer has the VM's files and guest:
    /// nothing may be done as if it were off.
    fn unanswering(&self) -> Option<Hindrance> {
        let run = self.record.run.as_ref().filter(|_| self.qemu.is_none())?;
        process::is_alive(&run.process).then(|| Hindrance {
            message: format!(
                "QEMU of VM {} (process {}) runs and does not answer",
                self.definition.name, run.process.pid
            ),
            remedy: "restart limosad to try it again, or end that process and restart limosad"
                .to_owned(),
        })
    }

    /// Fails when QEMU lives and does not answer.
    pub(crate) fn expect_answering(&self) -> Result<()> {
        match self.unanswering() {
            None => Ok(()),
            Some(hindrance) => Err(hindrance.into()),
        }
    }

    /// Whether the VM may be started anew from the disks of this host, or
    /// deleted with them.
    pub(crate) fn expect_cold_start(&self) -> Result<()> {
        self.handover.as_ref().map_or(Ok(()), Handover::expect_cold_start)
    }

    /// Only the owner may start a VM.
    pub(crate) fn expect_owned(&self) -> Result<()> {
        match &self.record.given_up_to {
            None => Ok(()),
            Some(owner) => Err(Failure::conflict(format!(
                "VM {0} belongs to {owner}: an operator gave it to that host, and what is here is \
                 an old copy. `limosa vm delete {0}` removes it, once nothing of it is needed",
                self.definition.name
            ))),
        }
    }

    /// Forgets a handover that is settled.
    pub(crate) fn leave_handover(&mut self, id: MigrationId) {
        if self.handover.as_ref().is_some_and(|handover| handover.id() == id) {
            self.handover = None;
        }
        if self.migration.is_some_and(|(under_way, _)| under_way == id) {
            self.migration = None;
        }
    }

    /// The running QEMU, or a failure that says that there is none.
    pub(crate) fn running(&self) -> Result<&Qemu> {
        self.qemu.as_ref().ok_or_else(|| {
            let name = &self.definition.name;
            Failure::conflict(format!("VM {name} is off: start it with `limosa vm start {name}`"))
        })
    }
}

/// File of a VM's definition in its configuration folder.
pub(crate) const DEFINITION_FILE: &str = "vm.toml";
/// The same while it is written.
const FRESH_DEFINITION_FILE: &str = ".vm.toml.new";

/// Writes a definition to its configuration folder, whole or not at all.
pub(crate) fn write_definition(definition: &VmDefinition, folder: &Path) -> Result<()> {
    let doing = format!("writing the definition of {}", definition.name);
    let text = toml::to_string_pretty(definition).or_fail(&doing)?;
    let path = folder.join(DEFINITION_FILE);
    let fresh = folder.join(FRESH_DEFINITION_FILE);
    let write = || -> std::io::Result<()> {
        std::fs::write(&fresh, text)?;
        std::fs::File::open(&fresh)?.sync_all()?;
        std::fs::rename(&fresh, &path)?;
        std::fs::File::open(folder)?.sync_all()
    };
    write().or_fail(&doing)
}

/// What [`write_definition`] may leave in a folder.
pub(crate) fn definition_files(folder: &Path) -> [PathBuf; 2] {
    [folder.join(DEFINITION_FILE), folder.join(FRESH_DEFINITION_FILE)]
}

/// Reads a definition from its configuration folder.
pub(crate) fn read_definition(folder: &Path) -> Result<VmDefinition> {
    let path = folder.join(DEFINITION_FILE);
    let doing = format!("reading {}", path.display());
    let text = std::fs::read_to_string(&path).or_fail(&doing)?;
    let definition: VmDefinition = toml::from_str(&text).or_fail(&doing)?;
    definition.check().or_fail(&doing)?;
    Ok(definition)
}

/// Reads all recorded VMs and finds their QEMUs again. One that cannot be read
/// keeps no other from being found.
pub(crate) async fn restore(agent: &Arc<Agent>) -> anyhow::Result<()> {
    let migrations = agent.store.all::<MigrationRecord>()?;
    for (key, record) in agent.store.all::<VmRecord>()? {
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
        if let Err(failure) = agent.add_vm(Arc::clone(&vm)) {
            tracing::error!(vm = key, %failure, "a recorded VM is left out");
        } else if let Some(failure) = unusable {
            tracing::error!(vm = key, failure, "a recorded VM cannot be used");
            vm.lock().await.unusable = Some(format!(
                "{failure}. Mount or put back what is missing there, then restart limosad"
            ));
        } else {
            recall_addresses(&vm, &migrations).await;
            run::reattach(agent, &vm).await;
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

/// What stands for a definition that cannot be read: its name and its folder.
fn placeholder(name: VmName, record: &VmRecord) -> VmDefinition {
    VmDefinition {
        name,
        uuid: None,
        memory_mib: 0,
        vcpus: 0,
        machine: String::new(),
        cpu: String::new(),
        boot: Boot::default(),
        disks: Vec::new(),
        nics: Vec::new(),
        places: Places { configuration: Some(record.configuration.clone()), ..Places::default() },
    }
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

    fn record(configuration: &Path) -> VmRecord {
        let configuration = configuration.to_owned();
        VmRecord { configuration, epoch: Epoch(1), run: None, given_up_to: None }
    }

    /// Goal: who held a VM while it left changes nothing of it any more.
    #[tokio::test]
    async fn a_vm_that_has_left_is_changed_no_more() {
        let of_vm = record(Path::new("/nowhere"));
        let vm = Vm::new(placeholder("web1".parse().unwrap(), &of_vm), of_vm);
        assert!(vm.lock_for_change().await.is_ok());
        vm.lock().await.has_left = true;
        let refused = vm.lock_for_change().await.err().unwrap().to_string();
        assert!(refused.contains("has left"), "{refused}");
    }

    /// Goal: a folder that is not mounted, or holds another VM's definition,
    /// gives no definition, and the reason.
    #[test]
    fn a_definition_that_is_missing_or_anothers_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let of_vm = record(folder.path());
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
