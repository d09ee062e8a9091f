//! The way home: everything a migration did at its source is undone.
//!
//! Each step looks at what it finds, so that it can be repeated, also by a
//! restarted agent that knows only the record.

use std::time::Duration;

use limosa_plane::PlaneError;
use limosa_protocol::migration::Outcome as End;
use limosa_protocol::peer::{Abort, PeerView};
use limosa_qemu::migrate::{self, MigrationStatus};
use limosa_qemu::power::{self, RunState};
use limosa_qemu::{block, process};

use super::mirror::MIRROR_PREFIX;
use super::{Source, end_record, forget_job, plane_failure};
use crate::failure::{Failure, OrFail, Outcome};
use crate::vm::{Qemu, run};

/// Longest wait for QEMU to give a cancelled migration up, in looks of
/// [`LOOK_EVERY`].
const LOOK_COUNT_MAX: u32 = 200;
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Longest wait for the destination's word on an abort, in milliseconds.
const ABORT_MS_MAX: u64 = 10_000;

/// Leaves the VM at the source as it was found.
pub(super) async fn abort(mut source: Source, why: &Failure) {
    let id = source.job.id();
    // When the plane broke, what QEMU says of it is only an echo.
    let plane = source.plane.as_ref().and_then(limosa_plane::SourcePlane::failure);
    let is_cancelled = source.job.is_cancelled();
    // Threads first: QEMU gives up at once when its sockets are closed.
    source.close_plane();
    let mut reason = match &plane {
        Some(error) if !is_cancelled => plane_failure(error).to_string(),
        _ => why.to_string(),
    };
    if source.offer.running {
        if let Err(failure) = clean_qemu(&source.qemu, source.was_running).await {
            tracing::error!(migration = %id, %failure, "the source was not put in order");
            reason = format!("{reason}; besides, at the source: {failure}");
        }
    } else if let Err(failure) = run::end(&source.qemu).await {
        reason = format!("{reason}; besides, at the source: {failure}");
    }
    let mut inner = source.vm.lock().await;
    let abort = Abort { reason: reason.clone() };
    let told =
        source.link.post_within::<_, PeerView>(&source.path("abort"), &abort, ABORT_MS_MAX).await;
    match told {
        // A connection that breaks has its reason at the other end.
        Ok(PeerView::Declined { reason: theirs })
            if !theirs.ends_with(&abort.reason)
                && matches!(plane, Some(PlaneError::PeerLost { .. })) =>
        {
            reason = format!("{} gave up: {theirs}", source.link.name());
        }
        Ok(_) => {}
        // It asks back by itself, finds no offer, and cleans up.
        Err(error) => {
            tracing::warn!(migration = %id, %error, "the destination was not told of the abort");
        }
    }
    if source.offer.running && !process::is_alive(&source.qemu.process) {
        reason = format!("{reason}; QEMU of the VM ended, so it is off");
    }
    let record = &mut source.record;
    end_record(&source.job, record, End::Stayed, Some(reason), (None, Vec::new()));
    if let Err(error) = source.agent.store.put(&id.to_string(), &*record) {
        tracing::error!(migration = %id, %error, "the end of a migration was not recorded");
    }
    inner.migration = None;
    drop(inner);
    forget_job(&source.agent, id);
}

/// Ends migration and mirrors of a source QEMU, and lets the guest run if it
/// ran before.
pub(crate) async fn clean_qemu(qemu: &Qemu, was_running: bool) -> Outcome<()> {
    let qmp = &qemu.qmp;
    if qmp.is_closed() {
        return Ok(());
    }
    end_migration(qemu).await?;
    end_mirrors(qemu).await?;
    let status = power::query_status(qmp).await.or_fail("asking QEMU")?;
    let stands = !matches!(status, RunState::Running | RunState::Shutdown);
    if was_running && stands {
        power::cont(qmp).await.or_fail("letting the guest run on")?;
        // Should switches have learnt the destination already, they learn again.
        power::announce_self(qmp).await.or_fail("announcing the guest")?;
    }
    Ok(())
}

async fn end_migration(qemu: &Qemu) -> Outcome<()> {
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

async fn end_mirrors(qemu: &Qemu) -> Outcome<()> {
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
