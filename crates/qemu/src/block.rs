//! Block jobs and exports of a running QEMU.
//!
//! ```text
//! source:      disk node ─ mirror job ─► NBD client node ─► the agent's socket
//! destination: QEMU's NBD server ─ export ─► disk node
//! ```
//!
//! **Invariant.** A mirror counts as ended well only by QEMU's own word for it:
//! a job that is gone without one has failed.

use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::launch::FLASH_NODES;
use crate::qmp::{Qmp, QmpError, QmpEvent, part};

/// Most bytes of one mirror that are under way. QEMU and its guest stand while it waits
/// for them, at each stop, and when the guest resets a disk.
const MIRROR_UNDER_WAY_BYTES_MAX: u32 = 4 << 20;

/// How often a job is looked at that is about to end.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// How often a job is looked at whose last event may have been lost.
const END_LOOK_EVERY: Duration = Duration::from_millis(50);
/// Longest wait for a job to go that has ended.
const JOB_GO_MAX: Duration = Duration::from_secs(10);

/// A block job.
#[derive(Debug, Clone, Deserialize)]
pub struct Job {
    /// Its name
    #[serde(rename = "device")]
    pub id: String,
    /// Bytes done
    pub offset: u64,
    /// Bytes in all; grows as the guest writes
    pub len: u64,
    /// A mirror: both sides are equal from now on
    pub ready: bool,
    /// Its run state, such as `running` or `ready`
    pub status: String,
    /// Why it stands still
    pub error: Option<String>,
}

/// Makes a node that is an NBD client of the agent's socket.
///
/// # Errors
/// As every command.
pub async fn add_nbd_node(
    qmp: &Qmp,
    node: &str,
    socket: &Path,
    export: &str,
) -> Result<(), QmpError> {
    let options = json!({
        "driver": "nbd",
        "node-name": node,
        "server": { "type": "unix", "path": socket },
        "export": export,
        "discard": "unmap",
        "detect-zeroes": "unmap",
    });
    qmp.execute("blockdev-add", options).await.map(drop)
}

/// Which data a mirror copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MirrorSync {
    /// The whole disk, and every write from now on
    Full,
    /// Only the writes from now on
    None,
}

/// Makes all nodes usable again that the end of a migration made inactive. QEMU before
/// 10.0 has no command for it, and mirrors inactive nodes.
///
/// # Errors
/// As every command.
pub async fn activate_all(qmp: &Qmp) -> Result<(), QmpError> {
    match qmp.execute("blockdev-set-active", json!({ "active": true })).await {
        Err(QmpError::Command { class, .. }) if class == "CommandNotFound" => Ok(()),
        answer => answer.map(drop),
    }
}

/// Starts to mirror a node to another.
///
/// # Errors
/// As every command.
pub async fn start_mirror(
    qmp: &Qmp,
    job: &str,
    from: &str,
    to: &str,
    sync: MirrorSync,
    granularity_bytes: u32,
) -> Result<(), QmpError> {
    let options = json!({
        "job-id": job,
        "device": from,
        "target": to,
        "sync": match sync {
            MirrorSync::Full => "full",
            MirrorSync::None => "none",
        },
        "granularity": granularity_bytes,
        "buf-size": MIRROR_UNDER_WAY_BYTES_MAX,
        // A job that fails goes away; the guest does not notice.
        "on-source-error": "report",
        "on-target-error": "report",
        "auto-finalize": true,
        "auto-dismiss": true,
    });
    qmp.execute("blockdev-mirror", options).await.map(drop)
}

/// All block jobs.
///
/// # Errors
/// As every command.
pub async fn jobs(qmp: &Qmp) -> Result<Vec<Job>, QmpError> {
    part("query-block-jobs", qmp.execute("query-block-jobs", json!({})).await?)
}

/// Ends a ready mirror with both sides equal; the guest stays on the first.
///
/// The job is gone afterwards, well ended or not, so that its nodes are free.
///
/// # Errors
/// As every command; [`QmpError::Command`] also when the job failed.
pub async fn complete_mirror_without_pivot(qmp: &Qmp, job: &str) -> Result<(), QmpError> {
    let mut events = qmp.events();
    qmp.execute("block-job-cancel", json!({ "device": job })).await?;
    loop {
        match tokio::time::timeout(END_LOOK_EVERY, events.recv()).await {
            Ok(Ok(event)) if event.data["device"] == job => {
                if let Some(ended) = end_of(job, &event) {
                    let gone = wait_gone(qmp, job).await;
                    return ended.and(gone);
                }
            }
            Ok(Ok(_)) => {}
            Ok(Err(_)) if qmp.is_closed() => return Err(QmpError::Closed),
            // An event may have been lost: a job that is gone without one would
            // never be known to have ended well, so that is a failure.
            Ok(Err(_)) | Err(_) => {
                if !jobs(qmp).await?.iter().any(|found| found.id == job) && events.is_empty() {
                    return Err(failed(job, "it ended without a word"));
                }
            }
        }
    }
}

/// What an event of a job that is to end says of its end.
fn end_of(job: &str, event: &QmpEvent) -> Option<Result<(), QmpError>> {
    match event.name.as_str() {
        "BLOCK_JOB_COMPLETED" => Some(match event.data["error"].as_str() {
            None => Ok(()),
            Some(error) => Err(failed(job, error)),
        }),
        "BLOCK_JOB_CANCELLED" => Some(Err(failed(job, "it was cancelled before it was ready"))),
        "BLOCK_JOB_ERROR" => Some(Err(failed(job, "reading or writing failed"))),
        _ => None,
    }
}

/// QEMU tells of a job's end a moment before it lets its nodes go.
async fn wait_gone(qmp: &Qmp, job: &str) -> Result<(), QmpError> {
    let gone = async {
        while jobs(qmp).await?.iter().any(|found| found.id == job) {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    };
    tokio::time::timeout(JOB_GO_MAX, gone).await.unwrap_or_else(|_| {
        let command = "block-job-cancel".to_owned();
        Err(QmpError::Timeout { command, limit: JOB_GO_MAX })
    })
}

fn failed(job: &str, why: &str) -> QmpError {
    QmpError::Command {
        command: format!("block job {job}"),
        class: "GenericError".to_owned(),
        desc: why.to_owned(),
    }
}

/// Ends a job at once, whatever it was doing.
///
/// # Errors
/// As every command.
pub async fn force_cancel(qmp: &Qmp, job: &str) -> Result<(), QmpError> {
    qmp.execute("block-job-cancel", json!({ "device": job, "force": true })).await.map(drop)
}

/// Names of all block nodes that have one.
///
/// # Errors
/// As every command.
pub async fn nodes(qmp: &Qmp) -> Result<Vec<String>, QmpError> {
    let answer = qmp.execute("query-named-block-nodes", json!({ "flat": true })).await?;
    let list: Vec<Value> = part("query-named-block-nodes", answer)?;
    Ok(list.iter().filter_map(|node| node["node-name"].as_str()).map(str::to_owned).collect())
}

/// Removes a node.
///
/// # Errors
/// As every command.
pub async fn remove_node(qmp: &Qmp, node: &str) -> Result<(), QmpError> {
    qmp.execute("blockdev-del", json!({ "node-name": node })).await.map(drop)
}

/// Starts QEMU's NBD server.
///
/// # Errors
/// As every command.
pub async fn start_nbd_server(qmp: &Qmp, socket: &Path) -> Result<(), QmpError> {
    let address = json!({ "addr": { "type": "unix", "data": { "path": socket } } });
    qmp.execute("nbd-server-start", address).await.map(drop)
}

/// Exports a node under a name.
///
/// # Errors
/// As every command.
pub async fn export(
    qmp: &Qmp,
    id: &str,
    node: &str,
    name: &str,
    writable: bool,
) -> Result<(), QmpError> {
    let options = json!({
        "type": "nbd",
        "id": id,
        "node-name": node,
        "name": name,
        "writable": writable,
    });
    qmp.execute("block-export-add", options).await.map(drop)
}

/// Makes all nodes usable of a QEMU that has loaded a guest which does not run yet.
/// QEMU does so by itself when the guest first runs; and before 10.0 it aborts, guest and
/// all, when a node is still inactive as it migrates on (QEMU issue 2395).
///
/// Disks were exported, which makes a node usable; the firmware's are now, for QEMU had
/// no other command before 10.0.
///
/// - `socket`: where an NBD server may listen for a moment.
///
/// # Errors
/// As every command.
pub async fn activate_loaded(qmp: &Qmp, socket: &Path) -> Result<(), QmpError> {
    activate_all(qmp).await?;
    let all = nodes(qmp).await?;
    let flash = FLASH_NODES.into_iter().filter(|node| all.iter().any(|known| known == node));
    let flash: Vec<&str> = flash.collect();
    if flash.is_empty() {
        return Ok(());
    }
    // An agent that was killed just here left one.
    stop_nbd_server(qmp).await.ok();
    start_nbd_server(qmp, socket).await?;
    let mut exported = Ok(());
    for node in flash {
        exported = exported.and(export(qmp, node, node, node, false).await);
    }
    stop_nbd_server(qmp).await?;
    exported
}

/// Stops QEMU's NBD server and all its exports.
///
/// # Errors
/// As every command.
pub async fn stop_nbd_server(qmp: &Qmp) -> Result<(), QmpError> {
    qmp.execute("nbd-server-stop", json!({})).await.map(drop)
}
