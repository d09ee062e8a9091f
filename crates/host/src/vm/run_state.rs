//! QEMU's run states as operators read them.

use limosa_protocol::api;
use limosa_qemu::power::{self, RunState};
use limosa_qemu::qmp::Qmp;

/// The power state of QEMU's guest, and why it is paused if nobody paused it.
pub(super) async fn power_state(qmp: &Qmp) -> (api::Power, Option<&'static str>) {
    let Ok(status) = power::query_status(qmp).await else { return (api::Power::Fault, None) };
    let power = match status {
        RunState::Running => api::Power::Running,
        RunState::Paused
        | RunState::Prelaunch
        | RunState::Postmigrate
        | RunState::FinishMigrate
        | RunState::Inmigrate
        | RunState::Suspended => api::Power::Paused,
        RunState::Shutdown => api::Power::Off,
        _ => api::Power::Fault,
    };
    (power, stopped_by(status))
}

/// Why a guest is paused that nobody paused.
pub fn stopped_by(status: RunState) -> Option<&'static str> {
    Some(match status {
        RunState::IoError => "was stopped by an error of its disk",
        RunState::InternalError => "was stopped by an error within QEMU",
        RunState::Watchdog => "was stopped by its watchdog",
        RunState::GuestPanicked => "has crashed",
        RunState::Unknown => "is in a condition that Limosa does not know",
        _ => return None,
    })
}
