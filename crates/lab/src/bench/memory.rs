//! The machine's memory before and while a VM moves: what it costs to touch, and what
//! agents hold of their own.
//!
//! The kernel keeps a peak only of everything that is mapped, which at the
//! destination holds the guest's memory; so it is looked at all the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

/// How often it is looked at.
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// Most that is touched ahead: more than a move needs on both hosts.
const TOUCHED_MIB_MAX: u64 = 4096;

/// Touches as much memory as a move will, and gives it back. A virtual machine's free
/// memory goes back to its host, and costs ten times as much when it is touched next
/// (measured: 14 µs a page, not 1.6): whoever moves first would pay for all others.
pub(super) fn touch_ahead() -> Result<()> {
    let text = std::fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: u64 = line
        .and_then(|line| line.split_whitespace().next()?.parse().ok())
        .context("/proc/meminfo tells no MemAvailable")?;
    let mib = TOUCHED_MIB_MAX.min(kib / 1024 / 2);
    std::hint::black_box(vec![1_u8; usize::try_from(mib << 20)?]);
    Ok(())
}

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
