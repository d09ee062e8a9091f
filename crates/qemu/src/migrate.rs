//! Migration as QEMU does it, seen from outside.
//!
//! ```text
//! source       setup ─► active ─► (guest stops) pre-switchover ─► device ─► completed
//! destination  waits ─► active ───────────────────────────────────────────► completed
//! ```
//!
//! `return-path` stays off: with it a lost peer makes QEMU resume the guest by
//! itself, and who runs the guest is the agents' to decide.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::qmp::{CLOSED_EVENT, Qmp, QmpError, QmpEvent, part};

/// Most bytes per second that QEMU sends into the agent's socket: no limit that
/// matters; the agent's window is what slows it.
const MAX_BANDWIDTH: u64 = 1 << 40;

/// Where a migration stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// There was none
    #[default]
    None,
    /// Being set up
    Setup,
    /// Being cancelled
    Cancelling,
    /// Cancelled
    Cancelled,
    /// Under way
    Active,
    /// The guest is stopped; QEMU waits for the word to go on
    PreSwitchover,
    /// Device state is under way
    Device,
    /// Done
    Completed,
    /// Failed
    Failed,
    /// Another one, not used by Limosa
    #[serde(other)]
    Other,
}

/// What QEMU says of its migration.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct MigrateStatus {
    /// Where it stands
    #[serde(default)]
    pub status: MigrationStatus,
    /// What it says of RAM, once it does
    pub ram: Option<RamStatus>,
    /// Why it failed
    #[serde(rename = "error-desc")]
    pub error_desc: Option<String>,
}

/// What QEMU says of RAM.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub struct RamStatus {
    /// Bytes still to be sent in this round
    #[serde(rename = "remaining", default)]
    pub remaining_bytes: u64,
    /// Pages dirtied per second
    #[serde(rename = "dirty-pages-rate", default)]
    pub dirty_pages_rate: u64,
    /// Rounds over the dirty bitmap
    #[serde(rename = "dirty-sync-count", default)]
    pub dirty_sync_count: u64,
}

/// Settings of a source.
#[derive(Debug, Clone, Copy)]
pub struct SourceParameters {
    /// Longest stop that QEMU may aim for, in milliseconds
    pub downtime_limit_ms: u32,
}

/// Every capability that Limosa ever sets. They stay set in a QEMU, and one that
/// came here as a destination is the source of the next move.
const CAPABILITIES: [&str; 5] =
    ["events", "pause-before-switchover", "auto-converge", "late-block-activate", "return-path"];

async fn set_capabilities(qmp: &Qmp, on: &[&str]) -> Result<(), QmpError> {
    let list: Vec<Value> = CAPABILITIES
        .iter()
        .map(|name| json!({ "capability": name, "state": on.contains(name) }))
        .collect();
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": list })).await.map(drop)
}

/// Sets capabilities and parameters of a source.
///
/// # Errors
/// As every command.
pub async fn prepare_source(qmp: &Qmp, parameters: &SourceParameters) -> Result<(), QmpError> {
    // Throttling begins only when the guest dirties faster than the agent takes
    // (differences and zero pages already taken off): then nothing else helps.
    set_capabilities(qmp, &["events", "pause-before-switchover", "auto-converge"]).await?;
    let settings = json!({
        "max-bandwidth": MAX_BANDWIDTH,
        "downtime-limit": parameters.downtime_limit_ms,
        "throttle-trigger-threshold": 100,
        "cpu-throttle-initial": 20,
        "cpu-throttle-increment": 10,
        "announce-rounds": 0,
    });
    qmp.execute("migrate-set-parameters", settings).await.map(drop)
}

/// Sets capabilities and parameters of a destination.
///
/// # Errors
/// As every command.
pub async fn prepare_destination(qmp: &Qmp) -> Result<(), QmpError> {
    set_capabilities(qmp, &["events", "late-block-activate"]).await?;
    // QEMU would announce the guest as soon as it is loaded, before the commit
    // point: switches would send its frames to a host that may not run it.
    qmp.execute("migrate-set-parameters", json!({ "announce-rounds": 0 })).await.map(drop)
}

/// Changes the stop that QEMU may aim for.
///
/// # Errors
/// As every command.
pub async fn set_downtime_limit(qmp: &Qmp, limit_ms: u32) -> Result<(), QmpError> {
    let settings = json!({ "downtime-limit": limit_ms });
    qmp.execute("migrate-set-parameters", settings).await.map(drop)
}

/// Starts to send into a unix socket.
///
/// # Errors
/// As every command.
pub async fn start_outgoing(qmp: &Qmp, socket: &Path) -> Result<(), QmpError> {
    qmp.execute("migrate", json!({ "uri": unix(socket) })).await.map(drop)
}

/// Makes a QEMU that waits for a migration listen on a unix socket.
///
/// # Errors
/// As every command.
pub async fn start_incoming(qmp: &Qmp, socket: &Path) -> Result<(), QmpError> {
    qmp.execute("migrate-incoming", json!({ "uri": unix(socket) })).await.map(drop)
}

fn unix(socket: &Path) -> String {
    format!("unix:{}", socket.display())
}

/// Gives a migration up. It goes through `cancelling` to `cancelled`.
///
/// # Errors
/// As every command.
pub async fn cancel(qmp: &Qmp) -> Result<(), QmpError> {
    qmp.execute("migrate_cancel", json!({})).await.map(drop)
}

/// Says the word that `pre-switchover` waits for.
///
/// # Errors
/// As every command.
pub async fn continue_from_pre_switchover(qmp: &Qmp) -> Result<(), QmpError> {
    qmp.execute("migrate-continue", json!({ "state": "pre-switchover" })).await.map(drop)
}

/// Asks where the migration stands.
///
/// # Errors
/// As every command.
pub async fn status(qmp: &Qmp) -> Result<MigrateStatus, QmpError> {
    part("query-migrate", qmp.execute("query-migrate", json!({})).await?)
}

/// Reads an event about the migration. The end of QEMU counts as its failure.
#[must_use]
pub fn migration_event(event: &QmpEvent) -> Option<MigrationStatus> {
    match event.name.as_str() {
        "MIGRATION" => serde_json::from_value(event.data["status"].clone()).ok(),
        CLOSED_EVENT => Some(MigrationStatus::Failed),
        _ => None,
    }
}
