//! What agents hold of their own while a VM moves.
//!
//! The kernel keeps a peak only of everything that is mapped, which at the
//! destination holds the guest's memory; so it is looked at all the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often it is looked at.
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// Somebody who looks.
#[derive(Debug)]
pub(super) struct Watch {
    ends: Arc<AtomicBool>,
    looks: JoinHandle<Vec<u64>>,
}

impl Watch {
    /// Looks at these processes until it is told to stop.
    pub(super) fn start(pids: impl Iterator<Item = u32>) -> Self {
        let pids: Vec<u32> = pids.collect();
        let ends = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&ends);
        let looks = std::thread::spawn(move || {
            let mut most_kib = vec![0; pids.len()];
            while !told.load(Ordering::Acquire) {
                for (most, pid) in most_kib.iter_mut().zip(&pids) {
                    *most = own_kib(*pid).unwrap_or(0).max(*most);
                }
                std::thread::sleep(LOOK_PAUSE);
            }
            most_kib
        });
        Self { ends, looks }
    }

    /// Most that each held, in KiB.
    pub(super) fn stop(self) -> Vec<u64> {
        self.ends.store(true, Ordering::Release);
        self.looks.join().unwrap_or_default()
    }
}

/// Memory of a process that no other one shares, and the files that it maps.
fn own_kib(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    Some(field("RssAnon:")? + field("RssFile:")?)
}
