//! The control group (version 2) of a VM's QEMU: an agent under systemd ends
//! without it, and the VM's use of the host can be told apart. Without one the VM
//! runs as well.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use limosa_protocol::vm::VmDefinition;
use limosa_qemu::process;

/// How often the removal of a busy group is tried, and the pause between: it is
/// busy until the kernel has taken all memory of its last process back.
const TRY_COUNT_MAX: u32 = 1200;
const TRY_EVERY: Duration = Duration::from_millis(50);
/// The same while an agent starts, and its users wait for it.
const STALE_TRY_COUNT_MAX: u32 = 100;

/// Parent of the groups of all VMs.
fn parent() -> Option<PathBuf> {
    let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from);
    let root = roots.into_iter().find(|root| root.join("cgroup.controllers").exists())?;
    Some(root.join("limosa"))
}

/// Where a VM's group is, or would be, on this host.
pub(super) fn of(definition: &VmDefinition) -> Option<PathBuf> {
    Some(parent()?.join(definition.uuid.unwrap_or_default().to_string()))
}

/// Makes a VM's group.
pub(super) fn make(definition: &VmDefinition) -> Option<PathBuf> {
    let group = of(definition)?;
    match std::fs::create_dir_all(&group) {
        Ok(()) => Some(group),
        Err(error) => {
            tracing::warn!(vm = %definition.name, %error, "the VM gets no cgroup of its own");
            None
        }
    }
}

/// Removes the group of a VM whose processes have ended, whoever ended them.
pub fn remove_of(definition: &VmDefinition) {
    remove(of(definition).as_deref());
}

/// Removes a group, in a moment. One that stays busy has another QEMU of the VM
/// by now.
pub(super) fn remove(group: Option<&Path>) {
    if let Some(group) = group.map(Path::to_owned) {
        tokio::spawn(async move { try_remove(&group, TRY_COUNT_MAX).await });
    }
}

async fn try_remove(group: &Path, try_count: u32) {
    for _ in 0..try_count {
        match std::fs::remove_dir(group) {
            Err(error) if error.kind() == ErrorKind::ResourceBusy => {
                tokio::time::sleep(TRY_EVERY).await;
            }
            _ => return,
        }
    }
}

/// Removes groups that nobody is in: those of VMs that left while an agent ended.
pub(super) async fn remove_stale() {
    let groups = parent().and_then(|parent| std::fs::read_dir(parent).ok());
    for group in groups.into_iter().flatten().flatten() {
        let is_group = group.file_type().is_ok_and(|kind| kind.is_dir());
        if is_group && process::in_cgroup(&group.path()).is_empty() {
            try_remove(&group.path(), STALE_TRY_COUNT_MAX).await;
        }
    }
}
