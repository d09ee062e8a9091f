//! VMs of this host: what they are, whether they run, and who may change them.
//!
//! ```text
//!          start             stop, guest's own power-off
//!   off ─────────► running ─────────────────────────────► off
//!                  ▲     │ pause
//!            resume│     ▼
//!                  paused
//! ```
//!
//! **Invariants.** Everything that changes a VM holds its mutex ([`Vm::lock`]),
//! so that two requests never work on one QEMU. While a migration holds the VM
//! ([`lock::VmLock`]), nothing else may change it. A reference to a VM that
//! has left this host ([`Inner::has_left`]) cannot change it either. A QEMU is
//! recorded in the store before its guest runs the first instruction. A recorded
//! VM whose definition cannot be read keeps its name and record.

pub mod announce;
pub mod cgroup;
pub mod console;
pub mod create;
pub mod files;
pub mod lock;
pub mod power;
pub mod restore;
pub mod run;
pub mod run_state;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use limosa_protocol::api;
use limosa_protocol::id::VmName;
use limosa_protocol::migration::Role;
use limosa_protocol::vm::{Boot, Places, VmDefinition};
use limosa_qemu::accelerator::Accelerator;
use limosa_qemu::process::{self, ProcessId};
use limosa_qemu::qmp::Qmp;
use tokio::sync::{Mutex, MutexGuard, watch};

use self::lock::{Activity, Blocks, VmLock, expect_none};
use crate::failure::{Failure, Hindrance, OrFail, Result};
use crate::net::learn::Addresses;
use crate::qemu::wire_accelerator;
use crate::store::VmRecord;

/// Longest wait for QEMU when somebody only looks at its VM.
const LOOK_MAX: Duration = Duration::from_secs(3);

/// One VM of this host.
pub struct Vm {
    pub name: VmName,
    /// The definition it came with: its identity, addresses, images and places,
    /// which no other VM may have, to be compared without waiting for its mutex.
    pub reserved: VmDefinition,
    pub addresses: Addresses,
    /// Held by the console that is open: QEMU's serial line takes one at a time.
    pub console: Arc<Mutex<()>>,
    /// The process of the QEMU that ended last.
    qemu_ends: watch::Sender<Option<ProcessId>>,
    inner: Mutex<Inner>,
}

/// What the mutex of a VM protects.
#[derive(Clone)]
pub struct Inner {
    pub definition: VmDefinition,
    pub record: VmRecord,
    pub qemu: Option<Qemu>,
    /// Of the migration that has the VM, or has yet to be settled.
    pub lock: Option<VmLock>,
    /// Why the VM cannot be used, when it cannot.
    pub fault: Option<String>,
    /// Why nothing of the VM may be changed until the agent is restarted.
    pub unusable: Option<String>,
    /// It was moved away or deleted, or never came to be; set under the lock, for
    /// those who waited for it.
    pub has_left: bool,
}

/// A QEMU that runs.
#[derive(Clone)]
pub struct Qemu {
    pub process: ProcessId,
    pub qmp: Qmp,
    pub accelerator: Accelerator,
    pub cgroup: Option<PathBuf>,
}

impl Vm {
    /// A VM that does not run.
    pub fn new(definition: VmDefinition, record: VmRecord) -> Self {
        Self {
            name: definition.name.clone(),
            reserved: definition.clone(),
            addresses: Addresses::default(),
            console: Arc::default(),
            qemu_ends: watch::Sender::new(None),
            inner: Mutex::new(Inner {
                definition,
                record,
                qemu: None,
                lock: None,
                fault: None,
                unusable: None,
                has_left: false,
            }),
        }
    }

    /// The process of the QEMU that ended last, whenever one ends while it is the VM's.
    pub fn qemu_ends(&self) -> watch::Receiver<Option<ProcessId>> {
        self.qemu_ends.subscribe()
    }

    /// Waits until nobody else works on the VM.
    pub async fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().await
    }

    /// Locks the VM for a change that an operator wants.
    pub async fn lock_for_change(&self) -> Result<MutexGuard<'_, Inner>> {
        let inner = self.inner.lock().await;
        expect_none(inner.hindrance())?;
        Ok(inner)
    }

    /// The VM as operators see it. QEMU is asked without the lock: one that does
    /// not answer keeps nobody from turning it off.
    pub async fn view(&self) -> api::Vm {
        let (mut view, asked) = self.view_without_qemu().await;
        if let Some(qemu) = asked {
            let looked = tokio::time::timeout(LOOK_MAX, run_state::power_state(&qemu.qmp)).await;
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
        let moving = inner.lock.as_ref().and_then(VmLock::moving);
        let is_in_doubt =
            inner.lock.as_ref().is_some_and(|lock| lock.activity == Activity::InDoubt);
        let mut asked = None;
        let power = match (moving, &inner.qemu) {
            _ if inner.unusable.is_some() => api::Power::Fault,
            _ if is_in_doubt => api::Power::InDoubt,
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
            migration: moving.map(|(id, _)| id),
            addresses: self.addresses.list(),
            fault: inner.unusable.clone().or_else(|| inner.fault.clone()),
            doubt: inner.lock.as_ref().and_then(|lock| lock.doubt.clone()),
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

    /// Why the VM may not be changed now, if it may not.
    pub fn hindrance(&self) -> Option<Hindrance> {
        let name = &self.definition.name;
        if self.has_left {
            return Some(Hindrance::new(
                format!("VM {name} has left this host meanwhile"),
                "`limosa vm list` shows those there are",
            ));
        }
        if let Some(why) = &self.unusable {
            return Some(Hindrance::new(format!("VM {name} cannot be used"), why));
        }
        self.blocks().and_then(|blocks| blocks.change.clone()).or_else(|| self.unanswering())
    }

    /// What the holder of the VM refuses to others.
    pub fn blocks(&self) -> Option<&Blocks> {
        self.lock.as_ref().map(|lock| &lock.blocks)
    }

    /// A QEMU that lives and does not answer has the VM's files and guest:
    /// nothing may be done as if it were off.
    fn unanswering(&self) -> Option<Hindrance> {
        let run = self.record.run.as_ref().filter(|_| self.qemu.is_none())?;
        process::is_alive(&run.process).then(|| {
            Hindrance::new(
                format!(
                    "QEMU of VM {} (process {}) runs and does not answer",
                    self.definition.name, run.process.pid
                ),
                "restart limosad to connect to it once more, or end that process and restart limosad",
            )
        })
    }

    /// Fails when QEMU lives and does not answer.
    pub fn expect_answering(&self) -> Result<()> {
        expect_none(self.unanswering())
    }

    /// Fails when the guest may not be started from the disks of this host.
    pub fn expect_cold_start(&self) -> Result<()> {
        expect_none(self.blocks().and_then(|blocks| blocks.cold_start.clone()))
    }

    /// Fails when the disks of this host may not be removed.
    pub fn expect_deletable(&self) -> Result<()> {
        expect_none(self.blocks().and_then(|blocks| blocks.delete.clone()))
    }

    /// Only the owner may start a VM.
    pub fn expect_owned(&self) -> Result<()> {
        match &self.record.given_up_to {
            None => Ok(()),
            Some(owner) => Err(Failure::conflict(format!(
                "VM {0} belongs to {owner}: an operator gave it to that host, and what is here is \
                 an old copy. `limosa vm delete {0}` removes it, once nothing of it is needed",
                self.definition.name
            ))),
        }
    }

    /// The running QEMU, or a failure that says that there is none.
    pub fn running(&self) -> Result<&Qemu> {
        self.qemu.as_ref().ok_or_else(|| {
            let name = &self.definition.name;
            Failure::conflict(format!("VM {name} is off: start it with `limosa vm start {name}`"))
        })
    }
}

/// File of a VM's definition in its configuration folder.
pub const DEFINITION_FILE: &str = "vm.toml";
/// The same while it is written.
const FRESH_DEFINITION_FILE: &str = ".vm.toml.new";

/// Writes a definition to its configuration folder, whole or not at all.
pub fn write_definition(definition: &VmDefinition, folder: &Path) -> Result<()> {
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
pub fn definition_files(folder: &Path) -> [PathBuf; 2] {
    [folder.join(DEFINITION_FILE), folder.join(FRESH_DEFINITION_FILE)]
}

/// Reads a definition from its configuration folder.
pub fn read_definition(folder: &Path) -> Result<VmDefinition> {
    let path = folder.join(DEFINITION_FILE);
    let doing = format!("reading {}", path.display());
    let text = std::fs::read_to_string(&path).or_fail(&doing)?;
    let definition: VmDefinition = toml::from_str(&text).or_fail(&doing)?;
    definition.check().or_fail(&doing)?;
    Ok(definition)
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

    /// Goal: what a holder refuses is refused with its text, and nothing else is.
    #[tokio::test]
    async fn a_held_vm_refuses_what_its_lock_blocks() {
        use limosa_protocol::id::MigrationId;

        use super::lock::Holder;

        let of_vm = record(Path::new("/nowhere"));
        let vm = Vm::new(placeholder("web1".parse().unwrap(), &of_vm), of_vm);
        let id = MigrationId(uuid::Uuid::nil());
        let held = |activity, blocks| VmLock {
            holder: Holder::Migration { id, role: Role::Source },
            activity,
            blocks,
            doubt: None,
        };
        let change = Some(Hindrance::new("VM web1 is being moved", "wait for it"));
        vm.lock().await.lock = Some(held(Activity::Moving, Blocks { change, ..Blocks::default() }));
        let refused = vm.lock_for_change().await.err().unwrap().to_string();
        assert_eq!(refused, "VM web1 is being moved: wait for it");
        let view = vm.view().await;
        assert_eq!((view.power, view.migration), (api::Power::MovingOut, Some(id)));
        let delete = Some(Hindrance::new("VM web1 is not confirmed", "wait for it"));
        vm.lock().await.lock =
            Some(held(Activity::Settling, Blocks { delete, ..Blocks::default() }));
        let inner = vm.lock_for_change().await.unwrap();
        assert!(inner.expect_cold_start().is_ok() && inner.expect_deletable().is_err());
        drop(inner);
        let view = vm.view().await;
        assert_eq!((view.power, view.migration), (api::Power::Off, None));
    }
}
