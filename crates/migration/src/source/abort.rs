//! The way home: everything a migration did at its source is undone.

use std::time::Duration;

use super::outgoing::{Outgoing, plane_failure};
use super::undo::{resume_source, undo_in_qemu};
use limosa_host::failure::Failure;

/// Longest wait for the place of a difference.
const FIND_MAX: Duration = Duration::from_secs(15);

/// Gives up: ends the plane, lets the guest go on, and says so.
pub(super) async fn abort(mut source: Outgoing, why: &Failure) {
    let found = if source.differs { find_difference(&source).await } else { None };
    let why = found.as_ref().unwrap_or(why);
    // When the plane broke, what QEMU says of it is only an echo.
    let plane = source.plane.as_ref().and_then(|plane| plane.failure());
    let is_cancelled = source.job.is_cancelled();
    // Threads first: QEMU gives up at once when its sockets are closed.
    source.close_plane();
    let reason = match &plane {
        Some(error) if !is_cancelled => plane_failure(error).to_string(),
        _ => why.to_string(),
    };
    // The destination may know why.
    let is_echo = !source.link_state.borrow().is_up() && !is_cancelled;
    source.driver.give_up(reason, is_echo).await;
}

/// Waits for the destination's word on where the two hosts differ. The guest need
/// not stand for that: nothing was handed over, and nothing will be.
async fn find_difference(source: &Outgoing) -> Option<Failure> {
    let released = async {
        undo_in_qemu(&source.qemu).await?;
        if source.was_running { resume_source(&source.qemu).await } else { Ok(()) }
    };
    if let Err(failure) = released.await {
        // It is tried again, and told, when the VM is taken back.
        tracing::warn!(migration = %source.job.id(), %failure, "the guest does not run on yet");
    }
    let found = Outgoing::link_ended(source.link_state.subscribe());
    tokio::time::timeout(FIND_MAX, found).await.ok()
}
