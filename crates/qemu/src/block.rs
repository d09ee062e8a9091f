//! Block jobs and exports of a running QEMU.
//!
//! ```text
//! source:      disk node ─ mirror job ─► NBD client node ─► the agent's socket
//! destination: QEMU's NBD server ─ export ─► disk node
//! ```

use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::qmp::{Qmp, QmpError, part};

/// How often a job is looked at that is about to end.
const LOOK_EVERY: Duration = Duration::from_millis(1);

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

/// Starts to mirror a node to another.
///
/// # Errors
/// As every command.
pub async fn start_mirror(
    qmp: &Qmp,
    job: &str,
    from: &str,
    to: &str,
    granularity_bytes: u32,
) -> Result<(), QmpError> {
    let options = json!({
        "job-id": job,
        "device": from,
        "target": to,
        "sync": "full",
        "granularity": granularity_bytes,
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
/// # Errors
/// As every command; [`QmpError::Command`] also when the job failed.
pub async fn complete_mirror_without_pivot(qmp: &Qmp, job: &str) -> Result<(), QmpError> {
    let mut events = qmp.events();
    qmp.execute("block-job-cancel", json!({ "device": job })).await?;
    loop {
        match tokio::time::timeout(Duration::from_millis(50), events.recv()).await {
            Ok(Ok(event)) if event.data["device"] == job => match event.name.as_str() {
                "BLOCK_JOB_COMPLETED" => {
                    return match event.data["error"].as_str() {
                        None => wait_gone(qmp, job).await,
                        Some(error) => Err(failed(job, error)),
                    };
                }
                "BLOCK_JOB_CANCELLED" => {
                    return Err(failed(job, "it was cancelled before it was ready"));
                }
                "BLOCK_JOB_ERROR" => return Err(failed(job, "reading or writing failed")),
                _ => {}
            },
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

async fn wait_gone(qmp: &Qmp, job: &str) -> Result<(), QmpError> {
    while jobs(qmp).await?.iter().any(|found| found.id == job) {
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(())
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

/// Stops QEMU's NBD server and all its exports.
///
/// # Errors
/// As every command.
pub async fn stop_nbd_server(qmp: &Qmp) -> Result<(), QmpError> {
    qmp.execute("nbd-server-stop", json!({})).await.map(drop)
}
