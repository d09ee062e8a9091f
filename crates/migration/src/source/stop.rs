//! A guest that is stopped for its switchover, and what becomes of it.

use std::time::{Duration, Instant};

use limosa_host::failure::{Failure, chain};
use limosa_qemu::qmp::{QmpError, QmpEvent};
use tokio::sync::broadcast;

/// Longest a guest that ran is held stopped before the commit point, beyond its
/// downtime limit; past that it runs on at the source. With the link lost it does
/// so at the limit.
pub(super) const STOPPED_MAX: Duration = Duration::from_secs(5);
/// QEMU has stopped the guest and waits for the word to go on.
pub(super) struct Stopped {
    /// When the vCPUs stopped
    pub(super) at: Instant,
    /// What QEMU said since
    pub(super) events: broadcast::Receiver<QmpEvent>,
}

/// What became of sending the last pages and the device state.
pub(super) enum Finished {
    /// The destination has everything.
    Whole(Switched),
    /// It took too long; the guest runs on.
    RunsOn,
    /// It took too long, and the destination's QEMU may have loaded everything; the guest
    /// stands.
    MayBeLoaded,
}

/// Where the time of a switchover went so far.
pub(super) struct Switched {
    /// vCPUs stopped; `None` for a VM that was off or paused.
    pub(super) stopped: Option<Instant>,
    pub(super) mirrors_ended: Instant,
    pub(super) pages_sent: Instant,
}

pub(super) fn memory_failure(why: Option<&str>) -> Failure {
    Failure::internal(format!(
        "QEMU ended its migration: {}",
        why.unwrap_or("it does not say why; see qemu.log in the VM's configuration folder")
    ))
}

/// The text of a QMP failure.
pub(super) fn qmp_failure(doing: &str, error: &QmpError) -> Failure {
    Failure::internal(format!("{doing}: {}", chain(error)))
}
