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
//! ([`Inner::migration`]), nothing else may change it. A QEMU is recorded in
//! the store before its guest runs the first instruction.

pub(crate) mod announce;
pub(crate) mod cgroup;
pub(crate) mod create;
pub(crate) mod files;
pub(crate) mod power;
pub(crate) mod run;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use limosa_protocol::api;
use limosa_protocol::id::{MigrationId, VmName};
use limosa_protocol::migration::Role;
use limosa_protocol::vm::VmDefinition;
use limosa_qemu::accelerator::Accelerator;
use limosa_qemu::process::{self, ProcessId};
use limosa_qemu::qmp::Qmp;
use tokio::sync::{Mutex, MutexGuard};

use crate::agent::Agent;
use crate::failure::{Failure, OrFail, Outcome};
use crate::migration::handover::HandOver;
use crate::net::learn::Addresses;
use crate::store::{MigrationRecord, VmRecord};

/// One VM of this host.
pub(crate) struct Vm {
    pub(crate) name: VmName,
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
    pub(crate) hand_over: Option<HandOver>,
    /// Why the VM cannot be used, when it cannot.
    pub(crate) fault: Option<String>,
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
            addresses: Addresses::default(),
            console: Arc::default(),
            inner: Mutex::new(Inner {
                definition,
                record,
                qemu: None,
                migration: None,
                fault: None,
                hand_over: None,
            }),
        }
    }

    /// Waits until nobody else works on the VM.
    pub(crate) async fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().await
    }

    /// Locks the VM for a change that an operator wants.
    pub(crate) async fn lock_for_change(&self) -> Outcome<MutexGuard<'_, Inner>> {
        let inner = self.inner.lock().await;
        match inner.hindrance() {
            None => Ok(inner),
            Some((what, mend)) => Err(Failure::conflict(format!("{what}: {mend}"))),
        }
    }

    /// The VM as operators see it.
    pub(crate) async fn view(&self) -> api::Vm {
        let inner = self.inner.lock().await;
        let standing = inner.hand_over.as_ref().map(HandOver::standing);
        let doubt = standing.and_then(|standing| standing.doubt);
        let is_ours = standing.is_none_or(|standing| standing.is_ours);
        let power = match (&inner.migration, &inner.qemu) {
            _ if doubt.is_some() && !is_ours => api::Power::InDoubt,
            _ if inner.record.given_up_to.is_some() => api::Power::GivenUp,
            (Some((_, Role::Source)), _) => api::Power::MovingOut,
            (Some((_, Role::Destination)), _) => api::Power::MovingIn,
            (None, None) if inner.fault.is_some() => api::Power::Fault,
            (None, None) => api::Power::Off,
            (None, Some(qemu)) => power::look(&qemu.qmp).await,
        };
        api::Vm {
            definition: inner.definition.clone(),
            power,
            epoch: inner.record.epoch,
            pid: inner.qemu.as_ref().map(|qemu| qemu.process.pid),
            accelerator: inner.qemu.as_ref().map(|qemu| qemu.accelerator.to_string()),
            migration: inner.migration.map(|(id, _)| id),
            addresses: self.addresses.list(),
            fault: inner.fault.clone(),
            doubt: inner.hand_over.as_ref().zip(doubt).map(|(hand, doubt)| hand.doubt_text(doubt)),
            given_up_to: inner.record.given_up_to.clone(),
        }
    }
}

impl Inner {
    /// Whether that QEMU is the VM's now.
    fn has(&self, qemu: &Qemu) -> bool {
        self.qemu.as_ref().is_some_and(|current| current.process == qemu.process)
    }

    /// What keeps anybody from changing the VM now, and what to do about it.
    pub(crate) fn hindrance(&self) -> Option<(String, String)> {
        let name = &self.definition.name;
        if let Some(hindrance) = self.hand_over.as_ref().and_then(HandOver::hindrance) {
            return Some(hindrance);
        }
        if let Some((id, _)) = self.migration {
            return Some((
                format!("VM {name} is being moved"),
                format!(
                    "wait for it with `limosa migration watch {id}`, or end it with \
                     `limosa migration cancel {id}`"
                ),
            ));
        }
        self.unanswering()
    }

    /// A QEMU that lives and does not answer has the VM's files and guest:
    /// nothing may be done as if it were off.
    fn unanswering(&self) -> Option<(String, String)> {
        let run = self.record.run.as_ref().filter(|_| self.qemu.is_none())?;
        process::is_alive(&run.process).then(|| {
            (
                format!(
                    "QEMU of VM {} (process {}) runs and does not answer",
                    self.definition.name, run.process.pid
                ),
                "restart limosad to try it again, or end that process and restart limosad"
                    .to_owned(),
            )
        })
    }

    /// Fails when QEMU lives and does not answer.
    pub(crate) fn expect_answering(&self) -> Outcome<()> {
        match self.unanswering() {
            None => Ok(()),
            Some((what, mend)) => Err(Failure::conflict(format!("{what}: {mend}"))),
        }
    }

    /// Whether the VM may be started anew from the disks of this host, or
    /// deleted with them.
    pub(crate) fn expect_cold_start(&self) -> Outcome<()> {
        self.hand_over.as_ref().map_or(Ok(()), HandOver::expect_cold_start)
    }

    /// Only the owner may start a VM.
    pub(crate) fn expect_owned(&self) -> Outcome<()> {
        match &self.record.given_up_to {
            None => Ok(()),
            Some(owner) => Err(Failure::conflict(format!(
                "VM {0} belongs to {owner}: an operator gave it to that host, and what is here is \
                 an old copy. `limosa vm delete {0}` removes it, once nothing of it is needed",
                self.definition.name
            ))),
        }
    }

    /// Forgets a hand-over that is settled.
    pub(crate) fn leave_hand_over(&mut self, id: MigrationId) {
        if self.hand_over.as_ref().is_some_and(|hand_over| hand_over.id() == id) {
            self.hand_over = None;
        }
        if self.migration.is_some_and(|(under_way, _)| under_way == id) {
            self.migration = None;
        }
    }

    /// The running QEMU, or a failure that says that there is none.
    pub(crate) fn running(&self) -> Outcome<&Qemu> {
        self.qemu.as_ref().ok_or_else(|| {
            let name = &self.definition.name;
            Failure::conflict(format!("VM {name} is off: start it with `limosa vm start {name}`"))
        })
    }
}

/// File of a VM's definition in its configuration folder.
const DEFINITION_FILE: &str = "vm.toml";
/// The same while it is written.
const FRESH_DEFINITION_FILE: &str = ".vm.toml.new";

/// Writes a definition to its configuration folder, whole or not at all.
pub(crate) fn write_definition(definition: &VmDefinition, folder: &Path) -> Outcome<()> {
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
pub(crate) fn read_definition(folder: &Path) -> Outcome<VmDefinition> {
    let path = folder.join(DEFINITION_FILE);
    let doing = format!("reading {}", path.display());
    let text = std::fs::read_to_string(&path).or_fail(&doing)?;
    let definition: VmDefinition = toml::from_str(&text).or_fail(&doing)?;
    definition.check().or_fail(&doing)?;
    Ok(definition)
}

/// Reads all recorded VMs and finds their QEMUs again.
pub(crate) async fn restore(agent: &Arc<Agent>) -> anyhow::Result<()> {
    let migrations = agent.store.all::<MigrationRecord>()?;
    for (name, record) in agent.store.all::<VmRecord>()? {
        let definition = match read_definition(&record.configuration) {
            Ok(definition) => definition,
            Err(failure) => {
                tracing::error!(vm = name, %failure, "a VM is left out: its definition is missing");
                continue;
            }
        };
        let vm = Arc::new(Vm::new(definition, record));
        recall_addresses(&vm, &migrations).await;
        agent
            .add_vm(Arc::clone(&vm))
            .map_err(|failure| anyhow::anyhow!("in the state store: {failure}"))?;
        run::find_again(agent, &vm).await;
    }
    cgroup::remove_stale().await;
    Ok(())
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
