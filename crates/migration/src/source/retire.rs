//! `retire`: the source frees what the VM held. Only after the destination said
//! that it runs.

use std::path::Path;

use limosa_protocol::migration::{Outcome as End, Role};
use limosa_protocol::plan::MigrationPlan;
use limosa_protocol::vm::VmDefinition;

use limosa_host::Folders;
use limosa_host::vm::{Qemu, cgroup, files, run};

/// Ends the stopped QEMU and removes the VM's files. Says what stayed.
pub(crate) async fn free_source(
    folders: &Folders,
    definition: &VmDefinition,
    qemu: Option<&Qemu>,
    plan: &MigrationPlan,
) -> Vec<String> {
    let mut left = Vec::new();
    if let Some(qemu) = qemu
        && let Err(failure) = run::end(qemu).await
    {
        left.push(failure.to_string());
        // Files of a process that lives are not removed below it.
        return left;
    }
    cgroup::remove_of(definition);
    let runtime = folders.runtime_of(&definition.name);
    if runtime.exists()
        && let Err(error) = std::fs::remove_dir_all(&runtime)
    {
        left.push(format!("{}: {error}", runtime.display()));
    }
    let images = plan.freeable(Role::Source, End::Moved).map(Path::to_owned);
    let all = files::everything(folders, definition, images);
    left.extend(files::remove_made(&plan.without_kept(Role::Source, End::Moved, all)));
    left
}

/// What an operator is told of leftovers.
pub(crate) fn left_behind(left: &[String]) -> Option<String> {
    (!left.is_empty()).then(|| {
        format!("the VM moved; left at the source, to be removed by hand: {}", left.join("; "))
    })
}
