//! `retire`: the source frees what the VM held. Only after the destination said
//! that it runs.

use limosa_protocol::migration::{Outcome as End, Phase};
use limosa_protocol::vm::VmDefinition;

use super::{Handed, Source, end_record, forget_job};
use crate::agent::Agent;
use crate::vm::{Qemu, files, run};

/// Frees everything, and ends the job as moved.
pub(super) async fn retire(mut source: Source, handed: Handed) {
    source.job.enter(Phase::Retire);
    // The last round and the device state are in these figures.
    if let Some(plane) = source.plane.as_ref() {
        let moved = plane.moved();
        source.job.progress(|progress| progress.moved = moved);
    }
    source.close_plane();
    let id = source.job.id();
    let mut inner = source.vm.lock().await;
    // From here on the watch on QEMU finds another one's VM.
    inner.qemu = None;
    let retain = source.record.retain_source_disks;
    let left = free_source(&source.agent, &inner.definition, Some(&source.qemu), retain).await;
    let reason = left_behind(&left);
    let record = &mut source.record;
    end_record(&source.job, record, End::Moved, reason, (handed.downtime, handed.proofs));
    if let Err(error) = source.agent.store.put_migration_and_vm(record, &source.vm.name, None) {
        // The record still says handed-over: a restart asks the peer again.
        tracing::error!(migration = %id, %error, "the end of a migration was not recorded");
    }
    source.agent.drop_vm(&source.vm.name);
    drop(inner);
    forget_job(&source.agent, id);
}

/// Ends the stopped QEMU and removes the VM's files. Says what stayed.
pub(crate) async fn free_source(
    agent: &Agent,
    definition: &VmDefinition,
    qemu: Option<&Qemu>,
    retain_disks: bool,
) -> Vec<String> {
    let mut left = Vec::new();
    if let Some(qemu) = qemu
        && let Err(failure) = run::end(qemu).await
    {
        left.push(failure.to_string());
        // Files of a process that lives are not removed below it.
        return left;
    }
    let runtime = agent.runtime_folder(&definition.name);
    if runtime.exists()
        && let Err(error) = std::fs::remove_dir_all(&runtime)
    {
        left.push(format!("{}: {error}", runtime.display()));
    }
    let all = files::everything(agent, definition, !retain_disks);
    let mut stayed = files::remove_made(&all);
    if retain_disks {
        // Folders that hold the retained images are not empty, as wished.
        stayed.clear();
    }
    left.extend(stayed);
    left
}

/// What an operator is told of leftovers.
pub(crate) fn left_behind(left: &[String]) -> Option<String> {
    (!left.is_empty()).then(|| {
        format!("the VM moved; left at the source, to be removed by hand: {}", left.join("; "))
    })
}
