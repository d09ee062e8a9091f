//! The program inside the tiny guest: it keeps every part of a VM busy that a
//! migration carries, and knows at any time what each part must hold.
//!
//! ```text
//!  /proc/cmdline ─► settings
//!                      │
//!   journal ◄──────────┼──────────► memory        power button ─► flush, power off
//!   each disk: write,  │            touch, scrub        ▲
//!   read back, flush   │                                │
//!        └──────► report (counters, errors) ◄── echo, status, heartbeats: the outside
//! ```
//!
//! **Invariants.** Whatever a thread finds wrong goes into the [`report`] and stays
//! there; the status and the serial console repeat it.
//! Nothing here ends by itself: the guest lives until it is powered off.

mod freed;
mod journal;
mod memory;
mod mix;
mod page;
mod power;
mod record;
mod report;
mod serve;
mod settings;
mod sweep;

use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use report::Report;
use settings::Settings;

fn main() -> ExitCode {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let free_mib = settings::free_mib(&read("/proc/meminfo"));
    let (settings, complaints) = Settings::parse(&read("/proc/cmdline"), free_mib);
    let report = Arc::new(Report::new());
    for complaint in complaints {
        report.fault(&complaint);
    }
    match start(&settings, &report) {
        Ok(journals) => {
            report::say(&format!("LIMOSA-GUEST-UP {}", report.boot_id()));
            power::wait_for_button(&report, journals)
        }
        Err(error) => {
            report.fault(&format!("the workload did not start: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Starts every thread; returns those that must be joined before power-off.
fn start(settings: &Settings, report: &Arc<Report>) -> io::Result<Vec<JoinHandle<()>>> {
    // Answers last: who gets one can rely on everything being under way.
    let journals = journal::start(settings, report)?;
    memory::start(settings, report)?;
    serve::start(settings, report, freed::Filled::new(settings))?;
    Ok(journals)
}

/// Starts a thread with a name that shows in the guest's process list.
fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    Builder::new().name(name.to_owned()).spawn(body)
}
