//! Whether the guest runs.

use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

use crate::migrate::{self, MigrationStatus};
use crate::qmp::{Qmp, QmpError, QmpEvent, part};

/// Most looks whether QEMU has put a migration that ended behind it.
const FINISH_LOOK_COUNT_MAX: u32 = 500;
const FINISH_LOOK_EVERY: Duration = Duration::from_millis(10);

/// QEMU's run state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// vCPUs run
    Running,
    /// vCPUs stopped by a command
    Paused,
    /// Started with vCPUs stopped
    Prelaunch,
    /// Waits for, or has just loaded, a migration
    Inmigrate,
    /// Stopped for the last part of a migration
    FinishMigrate,
    /// Its migration completed
    Postmigrate,
    /// The guest powered off
    Shutdown,
    /// The guest sleeps
    Suspended,
    /// A disk error stopped the guest
    IoError,
    /// QEMU itself failed
    InternalError,
    /// The guest's watchdog fired
    Watchdog,
    /// The guest panicked
    GuestPanicked,
    /// A newer QEMU's word
    #[serde(other)]
    Unknown,
}

/// Asks for the run state.
///
/// # Errors
/// As every command.
pub async fn query_status(qmp: &Qmp) -> Result<RunState, QmpError> {
    let answer = qmp.execute("query-status", json!({})).await?;
    part::<StatusAnswer>("query-status", answer).map(|answer| answer.status)
}

#[derive(Deserialize)]
struct StatusAnswer {
    status: RunState,
}

/// Lets the vCPUs run; activates disks that a migration left inactive.
///
/// QEMU says that a migration ended a moment before it lets the vCPUs run again;
/// that moment is waited for.
///
/// # Errors
/// As every command; a disk that another process holds is one.
pub async fn cont(qmp: &Qmp) -> Result<(), QmpError> {
    let resume = || qmp.execute("cont", json!({}));
    match resume().await {
        Err(QmpError::Command { .. }) if has_ended(migrate::status(qmp).await?.status) => {
            wait_finished(qmp).await?;
            // Also when it was past that moment already: it may have been refused in it.
            resume().await.map(drop)
        }
        result => result.map(drop),
    }
}

fn has_ended(status: MigrationStatus) -> bool {
    use MigrationStatus::{Cancelled, Completed, Failed};
    matches!(status, Completed | Cancelled | Failed)
}

/// Waits, with a limit, until QEMU has put the last part of a migration behind it.
async fn wait_finished(qmp: &Qmp) -> Result<(), QmpError> {
    for _ in 0..FINISH_LOOK_COUNT_MAX {
        if query_status(qmp).await? != RunState::FinishMigrate {
            break;
        }
        tokio::time::sleep(FINISH_LOOK_EVERY).await;
    }
    Ok(())
}

/// Reads an event that the vCPUs were stopped: when they were, in microseconds
/// since 1970 by the host's clock.
#[must_use]
pub fn stop_event_us(event: &QmpEvent) -> Option<u64> {
    (event.name == "STOP").then_some(event.at_us)
}

/// Stops the vCPUs.
///
/// # Errors
/// As every command.
pub async fn stop(qmp: &Qmp) -> Result<(), QmpError> {
    qmp.execute("stop", json!({})).await.map(drop)
}

/// Wakes a guest that sleeps.
///
/// # Errors
/// As every command.
pub async fn system_wakeup(qmp: &Qmp) -> Result<(), QmpError> {
    qmp.execute("system_wakeup", json!({})).await.map(drop)
}

/// Presses the guest's power button.
///
/// # Errors
/// As every command.
pub async fn system_powerdown(qmp: &Qmp) -> Result<(), QmpError> {
    qmp.execute("system_powerdown", json!({})).await.map(drop)
}

/// Ends QEMU at once; its images are closed well.
///
/// # Errors
/// As every command, but a closed connection is success.
pub async fn quit(qmp: &Qmp) -> Result<(), QmpError> {
    match qmp.execute("quit", json!({})).await {
        Ok(_) | Err(QmpError::Closed) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Has the NICs announce themselves to the network, a few times.
///
/// # Errors
/// As every command.
pub async fn announce_self(qmp: &Qmp) -> Result<(), QmpError> {
    let times = json!({ "initial": 20, "max": 200, "rounds": 5, "step": 50 });
    qmp.execute("announce-self", times).await.map(drop)
}
