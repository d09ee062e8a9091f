//! What the workload has done and what it found wrong, for everybody who asks.

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use crate::sweep::Sweeps;

/// Most faults that are kept as text; all are counted.
const FAULTS_KEPT_MAX: usize = 32;

/// Shared by all threads.
#[derive(Debug)]
pub(crate) struct Report {
    boot_id: String,
    faults: Mutex<Vec<String>>,
    fault_count: AtomicU64,
    stopping: AtomicBool,
    /// Pages dirtied
    pub pages_touched: AtomicU64,
    /// Pages compared whole
    pub pages_checked: AtomicU64,
    /// Rounds over all memory and all disks
    pub sweeps: Sweeps,
    /// Journal records written
    pub records_written: AtomicU64,
    /// Blocks of disks read back and compared
    pub blocks_checked: AtomicU64,
    disks: Mutex<Vec<Arc<DiskReport>>>,
}

/// How far the journal of one disk has come.
#[derive(Debug)]
pub(crate) struct DiskReport {
    name: String,
    /// Last record that this boot found; 0 on a new disk
    recovered: u64,
    /// Last record that is durable
    pub durable: AtomicU64,
}

impl Report {
    pub(crate) fn new() -> Self {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self {
            boot_id: id.trim().to_owned(),
            faults: Mutex::default(),
            fault_count: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            pages_touched: AtomicU64::new(0),
            pages_checked: AtomicU64::new(0),
            sweeps: Sweeps::default(),
            records_written: AtomicU64::new(0),
            blocks_checked: AtomicU64::new(0),
            disks: Mutex::default(),
        }
    }

    pub(crate) fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// Something is wrong. Stays for ever.
    pub(crate) fn fault(&self, what: &str) {
        self.fault_count.fetch_add(1, Ordering::Relaxed);
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        if faults.len() < FAULTS_KEPT_MAX {
            faults.push(what.to_owned());
            say(&format!("LIMOSA-GUEST-FAULT {what}"));
        }
    }

    /// A disk with a journal, and the last record that was found there.
    pub(crate) fn add_disk(&self, name: &str, recovered: u64) -> Arc<DiskReport> {
        let durable = AtomicU64::new(recovered);
        let disk = Arc::new(DiskReport { name: name.to_owned(), recovered, durable });
        self.disks().push(Arc::clone(&disk));
        disk
    }

    fn disks(&self) -> MutexGuard<'_, Vec<Arc<DiskReport>>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells every thread to come to an end.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    pub(crate) fn json(&self) -> Value {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let disk = |disk: &Arc<DiskReport>| {
            json!({
                "name": disk.name,
                "recovered": disk.recovered,
                "durable": count(&disk.durable),
            })
        };
        let disks: Vec<_> = self.disks().iter().map(disk).collect();
        json!({
            "boot_id": self.boot_id,
            "errors": count(&self.fault_count),
            "faults": faults,
            "pages_touched": count(&self.pages_touched),
            "pages_checked": count(&self.pages_checked),
            "sweeps": self.sweeps.done(),
            "disks": disks,
            "records_written": count(&self.records_written),
            "blocks_checked": count(&self.blocks_checked),
        })
    }
}

/// Writes a line to the console.
pub(crate) fn say(text: &str) {
    let mut line = String::new();
    // A console that takes nothing must not stop the guest.
    let _ = writeln!(line, "{text}");
    let _ = std::io::stdout().write_all(line.as_bytes());
}
