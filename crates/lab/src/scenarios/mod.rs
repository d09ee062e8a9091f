//! Scenarios: each one builds a lab, does something to it and says what must hold.
//!
//! ```text
//! scenario ─► Lab::up(plan) ─► run(&mut lab) ─► passed, or logs kept and shown ─► down
//! ```
//!
//! **Invariant.** A scenario never asserts how long something takes; it asserts
//! what is there, what is gone and what a user noticed.

mod chaos_series;
mod commands;
mod compare;
mod console;
mod disk_full;
mod faultpoints_complete;
mod faults;
mod in_doubt;
mod isolation;
mod kvm;
mod lab_smoke;
mod links;
mod moves;
mod operator;
mod path_mapping;
mod postgres;
mod queue;
pub(crate) mod soak;
mod unpaired_peers;
mod verify;

use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use crate::harness::lab::{Lab, Topology};
use crate::harness::{exec, guest, paths, steps};

/// Longest time to fetch a QEMU, in seconds.
const FETCH_TIMEOUT_S: u32 = 300;
/// Longest part of one log that is shown for a scenario that failed, in bytes.
const SHOWN_LOG_BYTES_MAX: usize = 3_000;

/// One scenario.
#[derive(Debug)]
pub(crate) struct Scenario {
    /// By which it is chosen
    pub name: &'static str,
    /// What it proves, in one sentence
    pub proves: &'static str,
    /// The lab that it needs
    pub topology: fn() -> Topology,
    /// What happens
    pub run: fn(&mut Lab) -> Result<()>,
}

/// All scenarios of `make test`, in their order.
pub(crate) fn all() -> Vec<&'static Scenario> {
    [
        lab_smoke::SCENARIOS,
        isolation::SCENARIOS,
        unpaired_peers::SCENARIOS,
        operator::SCENARIOS,
        console::SCENARIOS,
        moves::SCENARIOS,
        compare::SCENARIOS,
        path_mapping::SCENARIOS,
        kvm::SCENARIOS,
        postgres::SCENARIOS,
        faults::SCENARIOS,
        commands::SCENARIOS,
        queue::SCENARIOS,
        links::SCENARIOS,
        verify::SCENARIOS,
        in_doubt::SCENARIOS,
        disk_full::SCENARIOS,
        faultpoints_complete::SCENARIOS,
        chaos_series::SCENARIOS,
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// How a run of scenarios ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Count {
    /// Scenarios whose assertions all held
    pub passed: usize,
    /// Scenarios that ended with an error or a panic
    pub failed: usize,
    /// Scenarios that this machine cannot run
    pub skipped: usize,
}

/// Why a scenario cannot run on this machine. It counts neither as passed nor
/// as failed.
#[derive(Debug)]
pub(crate) struct Skipped(pub String);

impl std::fmt::Display for Skipped {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(&self.0)
    }
}

impl std::error::Error for Skipped {}

/// A QEMU of another version than the machine's, fetched once into the cache.
fn other_qemu() -> Result<PathBuf> {
    guest::make("fetch-qemu", FETCH_TIMEOUT_S, &[&paths::cache_dir()])
}

/// Starts the agents of hosts a and b, one of them with another QEMU than the
/// machine's, and joins them.
fn start_with_other_qemu(lab: &mut Lab, at: &str, qemu: &Path) -> Result<()> {
    let folder = qemu.parent().context("QEMU lies in no folder")?;
    let host = lab.host(at);
    // Into a place that QEMU's unprivileged user can reach, wherever the clone is.
    host.run(&["mkdir", "-p", "/etc/limosa/qemu"])?;
    host.run(&["mount", "--bind", &folder.to_string_lossy(), "/etc/limosa/qemu"])?;
    for name in ["a", "b"] {
        let binary = (name == at).then_some("/etc/limosa/qemu/qemu-system-x86_64");
        let config = steps::agent_config(lab.host(name), binary, "");
        lab.host_mut(name).start_agent(&config, &[])?;
    }
    steps::join(lab)
}

/// Runs those scenarios whose name contains `only`, one after the other.
pub(crate) fn run_all(only: Option<&str>) -> Result<Count> {
    let chosen: Vec<_> = all()
        .into_iter()
        .filter(|scenario| only.is_none_or(|only| scenario.name.contains(only)))
        .collect();
    anyhow::ensure!(
        !chosen.is_empty(),
        "no scenario has that name; see `limosa-lab scenarios --list`"
    );
    let failed_dir = paths::lab_dir().join("failed");
    if failed_dir.exists() {
        std::fs::remove_dir_all(&failed_dir).context("removing the logs of the last run")?;
    }
    let mut count = Count::default();
    for scenario in chosen {
        let started = Instant::now();
        let kept = failed_dir.join(scenario.name);
        match run_one(scenario, &kept) {
            Ok(()) => {
                count.passed += 1;
                say(scenario, "passed", started.elapsed());
            }
            Err(error) if error.is::<Skipped>() => {
                count.skipped += 1;
                say(scenario, "skipped", started.elapsed());
                crate::print_line(&format!("      {error}"));
            }
            Err(error) => {
                count.failed += 1;
                say(scenario, "FAILED", started.elapsed());
                crate::print_line(&format!("      {error:#}"));
                show_logs(&kept);
            }
        }
    }
    let Count { passed, failed, skipped } = count;
    crate::print_line(&format!("{passed} passed, {failed} failed, {skipped} skipped"));
    Ok(count)
}

/// Runs one scenario in a lab of its own. Logs go to `kept` when it fails.
pub(crate) fn run_one(scenario: &Scenario, kept: &Path) -> Result<()> {
    let mut lab = Lab::up(&(scenario.topology)())?;
    // A panic must not leave the lab standing, nor end the other scenarios.
    let ended = std::panic::catch_unwind(AssertUnwindSafe(|| (scenario.run)(&mut lab)))
        .unwrap_or_else(|cause| Err(anyhow!("panicked: {}", panic_text(cause.as_ref()))));
    if ended.as_ref().is_err_and(|error| !error.is::<Skipped>()) {
        lab.save_logs(kept).context("keeping the logs")?;
    }
    let down = lab.down();
    ended?;
    down.context("taking the lab down")
}

fn panic_text(cause: &(dyn std::any::Any + Send)) -> String {
    let text = cause.downcast_ref::<String>().cloned();
    text.or_else(|| cause.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

fn say(scenario: &Scenario, ended: &str, took: Duration) {
    crate::print_line(&format!("{ended} {:>6.1} s  {}", took.as_secs_f64(), scenario.name));
}

fn show_logs(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let Ok(log) = std::fs::read(&path) else { continue };
        let text = exec::lossy(&log);
        let shown = exec::tail(&text, SHOWN_LOG_BYTES_MAX);
        if !shown.is_empty() {
            crate::print_line(&format!("      --- end of {}\n{shown}", path.display()));
        }
    }
}
