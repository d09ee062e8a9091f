//! Undoes in QEMU what a migration did at its source.
//!
//! Each step looks at what it finds, so that it can be repeated, also by a
//! restarted agent that knows only the record.

use std::time::Duration;

use limosa_host::failure::{Failure, OrFail, Result};
use limosa_host::vm::Qemu;
use limosa_protocol::id::DiskId;
use limosa_qemu::block;
use limosa_qemu::migrate::{self, MigrationStatus};
use limosa_qemu::power::{self, RunState};

/// Longest wait for QEMU to give a cancelled migration up, in looks of
/// [`LOOK_EVERY`].
const LOOK_COUNT_MAX: u32 = 200;
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Name of a disk's mirror job and of its target node.
pub(crate) fn mirror_name(disk: &DiskId) -> String {
    format!("{MIRROR_PREFIX}{disk}")
}

/// Beginning of the names of all jobs and nodes of a migration.
pub(crate) const MIRROR_PREFIX: &str = "mirror-";

/// Ends migration and mirrors of a source QEMU.
pub(crate) async fn undo_in_qemu(qemu: &Qemu) -> Result<()> {
    if qemu.qmp.is_closed() {
        return Ok(());
    }
    end_migration(qemu).await?;
    end_mirrors(qemu).await
}

/// Lets a guest run that a migration stopped.
pub(crate) async fn resume_source(qemu: &Qemu) -> Result<()> {
    let qmp = &qemu.qmp;
    if qmp.is_closed() {
        return Err(Failure::internal("QEMU of the VM ended"));
    }
    let status = power::query_status(qmp).await.or_fail("asking QEMU")?;
    if !matches!(status, RunState::Running | RunState::Shutdown) {
        power::cont(qmp).await.or_fail("letting the guest run on")?;
        // Should switches have learnt the destination already, they learn again.
        power::announce_self(qmp).await.or_fail("announcing the guest")?;
    }
    Ok(())
}

/// Cancels a migration that is under way, and waits until it is.
pub(super) async fn end_migration(qemu: &Qemu) -> Result<()> {
    let qmp = &qemu.qmp;
    for look in 0..LOOK_COUNT_MAX {
        let status = migrate::status(qmp).await.or_fail("asking QEMU")?.status;
        match status {
            MigrationStatus::None
            | MigrationStatus::Completed
            | MigrationStatus::Failed
            | MigrationStatus::Cancelled => return Ok(()),
            _ if look == 0 => migrate::cancel(qmp).await.or_fail("ending QEMU's migration")?,
            _ => {}
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Err(Failure::internal("QEMU does not end its migration"))
}

/// Ends mirrors at once, whatever they were doing, and removes their targets.
pub(super) async fn end_mirrors(qemu: &Qemu) -> Result<()> {
    let qmp = &qemu.qmp;
    for _ in 0..LOOK_COUNT_MAX {
        let jobs = block::jobs(qmp).await.or_fail("asking QEMU for its mirrors")?;
        let ours: Vec<_> = jobs.iter().filter(|job| job.id.starts_with(MIRROR_PREFIX)).collect();
        if ours.is_empty() {
            break;
        }
        for job in ours {
            // One that ends just now is as good as ended.
            if let Err(error) = block::force_cancel(qmp, &job.id).await {
                tracing::debug!(job = job.id, %error, "a mirror was not cancelled");
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    for node in block::nodes(qmp).await.or_fail("asking QEMU for its block nodes")? {
        if node.starts_with(MIRROR_PREFIX) {
            block::remove_node(qmp, &node).await.or_fail("removing a mirror's target")?;
        }
    }
    Ok(())
}
