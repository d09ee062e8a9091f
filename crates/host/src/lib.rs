//! A host: its folders, its QEMU, its network, its VMs, and the store that records them.
//!
//! ```text
//! vm (create, run, power, …) ─► Host ─┬─► VmRegistry ─► vm::Vm, its VmLock
//!                                     ├─► Store         what must outlive the agent
//!                                     ├─► Net           bridges, TAPs, announcements
//!                                     └─► HostQemu      programs, user, what this QEMU can do
//! ```
//!
//! **Invariant.** Nothing here knows of migrations, but for their records: whoever works with a
//! VM for longer puts a [`vm::lock::VmLock`] on it.

pub mod clock;
pub mod failure;
pub mod memory;
pub mod net;
pub mod qemu;
mod registry;
pub mod store;
mod switch;
pub mod token;
pub mod vm;

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use limosa_protocol::id::{HostName, VmName};
use limosa_protocol::migration::{Outcome, Role};

pub use qemu::{HostQemu, QemuSettings, wire_accelerator};
pub use registry::VmRegistry;

use crate::failure::{Failure, Result};
use crate::net::Net;
use crate::store::{MigrationRecord, Store, lock};
use crate::vm::Vm;

/// Where this host keeps files.
pub struct Folders {
    /// What must survive a reboot
    pub state: PathBuf,
    /// Sockets
    pub runtime: PathBuf,
}

impl Folders {
    /// Folder of a VM's sockets.
    pub fn runtime_of(&self, vm: &VmName) -> PathBuf {
        self.runtime.join("vms").join(vm.as_str())
    }

    /// Folder of a VM's files, unless its definition names others.
    pub fn files_of(&self, vm: &VmName) -> PathBuf {
        self.state.join("vms").join(vm.as_str())
    }
}

/// What the work on VMs needs of this host.
pub struct Host {
    pub name: HostName,
    pub folders: Folders,
    pub store: Store,
    pub net: Net,
    pub qemu: HostQemu,
    pub vms: VmRegistry,
    /// Held from the check whether a VM's place is free, or a switch is in use, until
    /// the place or the switch is taken or removed.
    pub allocation_lock: tokio::sync::Mutex<()>,
    /// No other agent has the folder of the sockets.
    _runtime_lock: File,
}

impl Host {
    /// Opens the state folder and looks at the host. Nothing is started or
    /// changed yet.
    pub async fn open(
        name: HostName,
        folders: Folders,
        qemu: &QemuSettings,
    ) -> anyhow::Result<Self> {
        let store = Store::open(&folders.state)?;
        make_folders(&folders)?;
        let runtime_lock = lock(&folders.runtime, "limosad.lock")?;
        let qemu = HostQemu::look(qemu).await?;
        let net = Net::open().context("cannot open a netlink socket")?;
        Ok(Self {
            name,
            folders,
            store,
            net,
            qemu,
            vms: VmRegistry::default(),
            allocation_lock: tokio::sync::Mutex::default(),
            _runtime_lock: runtime_lock,
        })
    }

    /// The VM of a name, or a failure that says how to find those there are.
    pub fn vm(&self, name: &VmName) -> Result<Arc<Vm>> {
        self.vms.get(name).ok_or_else(|| {
            Failure::not_found(match self.moved_to(name) {
                Some(owner) => format!(
                    "VM {name} was handed over to {owner}, which owns it: on {owner} run \
                     `limosa vm show {name}`"
                ),
                None => format!(
                    "no VM {name} on host {}: `limosa vm list` shows those there are",
                    self.name
                ),
            })
        })
    }

    /// The host to which a VM of that name went last, if it went from here and
    /// never came back.
    fn moved_to(&self, name: &VmName) -> Option<HostName> {
        // Without records the answer is only less helpful.
        let all = self.store.all::<MigrationRecord>().ok()?;
        let mut own = all.into_iter().map(|(_, record)| record.view);
        let last = own.rfind(|view| view.vm == *name && view.outcome == Some(Outcome::Moved))?;
        (last.role == Role::Source).then_some(last.destination)
    }
}

fn make_folders(folders: &Folders) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    // QEMU's user must reach its VM's files below; it can list nothing here.
    for (folder, mode) in [
        (folders.state.clone(), 0o711),
        (folders.state.join("vms"), 0o711),
        (folders.runtime.clone(), 0o711),
        (folders.runtime.join("vms"), 0o711),
    ] {
        let at = || format!("cannot make the folder {}", folder.display());
        std::fs::create_dir_all(&folder).with_context(at)?;
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(mode))
            .with_context(at)?;
    }
    Ok(())
}
