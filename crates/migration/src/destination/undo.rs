//! Ends what a destination has of a migration: its plane, QEMU and files.

use std::path::PathBuf;
use std::sync::Arc;

use limosa_host::Folders;
use limosa_host::vm::{Qemu, cgroup, definition_files, files, run};
use limosa_plane::DestinationPlane;
use limosa_protocol::migration::{Outcome as End, Role};
use limosa_protocol::plan::MigrationPlan;
use limosa_protocol::vm::VmDefinition;

/// Ends a plane's threads; nobody needs to wait for them.
pub(crate) fn end_plane(plane: Arc<DestinationPlane>) {
    plane.abort();
    std::thread::spawn(move || {
        if let Err(error) = plane.join() {
            tracing::debug!(%error, "the data plane's end");
        }
    });
}

/// Of what was made for a VM that does not come, what may be removed: a disk that is no copy
/// stays.
pub(crate) fn removable(plan: &MigrationPlan, made: Vec<PathBuf>) -> Vec<PathBuf> {
    plan.without_kept(Role::Destination, End::Stayed, made)
}

/// Ends an incoming QEMU and removes what was made for it. Says what stayed.
pub(crate) async fn free(
    folders: &Folders,
    definition: &VmDefinition,
    qemu: Option<&Qemu>,
    made: &[PathBuf],
) -> Vec<String> {
    if let Some(qemu) = qemu
        && let Err(failure) = run::end(qemu).await
    {
        return vec![failure.to_string()];
    }
    cgroup::remove_of(definition);
    let mut left = Vec::new();
    let runtime = folders.runtime_of(&definition.name);
    if runtime.exists()
        && let Err(error) = std::fs::remove_dir_all(&runtime)
    {
        left.push(format!("{}: {error}", runtime.display()));
    }
    left.extend(remove(definition, made.to_vec()).await);
    left
}

/// Removes what was made, and what comes to lie beside it. Says what stayed.
pub(super) async fn remove(definition: &VmDefinition, mut made: Vec<PathBuf>) -> Vec<String> {
    if let Some(folder) = &definition.places.configuration {
        made.push(folder.join("qemu.log"));
        made.extend(definition_files(folder));
    }
    let removed = tokio::task::spawn_blocking(move || files::remove_made(&made)).await;
    removed.unwrap_or_else(|error| vec![format!("the VM's files: {error}")])
}
