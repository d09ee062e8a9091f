//! What must hold after every run, whatever struck.
//!
//! | looked at | must be |
//! |---|---|
//! | both agents | one has the VM, in the state in which it was, unless its QEMU was killed |
//! | both hosts' processes | one QEMU where it runs, none elsewhere |
//! | frames at the switch ports | never a heartbeat twice, out of order, or of an ended boot |
//! | the guest | the same boot; all its memory and each block of its disks are right |
//! | a VM that was off | its disks have every byte that they had |
//! | a VM that was turned off by a fault | starts at its owner and finds all that was durable; nowhere else |
//! | the other host | holds nothing of it |

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use limosa_protocol::api::Power;
use serde_json::Value;

use super::plan::{Fault, Initial, Plan};
use super::setup::{Setup, VM};
use super::trial::{Seen, is_refusal};
use crate::harness::capture::Capture;

/// Longest wait for a QEMU that is about to end.
const END_MAX: Duration = Duration::from_secs(10);

/// The disks of a VM that is off, as they were before its move.
pub(super) struct Copies {
    disks: Vec<(String, PathBuf)>,
}

impl Copies {
    /// Copies the images of a VM that is off.
    pub(super) fn make(setup: &Setup<'_>) -> Result<Self> {
        let vm = setup.look(setup.at)?.context("the VM is gone")?;
        let host = setup.host(setup.at);
        let mut disks = Vec::new();
        for disk in &vm.definition.disks {
            let image = disk.path.as_ref().context("a disk without an image")?;
            let copy = host.fault_dir().with_file_name(format!("copy-{}", disk.id));
            let (image, to) = (image.to_string_lossy(), copy.to_string_lossy());
            host.run(&["cp", "--sparse=always", &image, &to])?;
            disks.push((
                serde_json::to_value(disk.format)?.as_str().unwrap_or("raw").to_owned(),
                copy,
            ));
        }
        Ok(Self { disks })
    }

    fn compare(&self, setup: &Setup<'_>) -> Result<()> {
        let vm = setup.look(setup.at)?.context("the VM is gone")?;
        let host = setup.host(setup.at);
        for (disk, (format, copy)) in vm.definition.disks.iter().zip(&self.disks) {
            let image = disk.path.as_ref().context("a disk without an image")?.to_string_lossy();
            let copy = copy.to_string_lossy();
            host.run(&["qemu-img", "compare", "-f", format, "-F", format, &image, &copy])
                .with_context(|| format!("disk {} is not what it was", disk.id))?;
        }
        Ok(())
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        for (_, copy) in &self.disks {
            // The lab's folder goes with the lab.
            let _ = std::fs::remove_file(copy);
        }
    }
}

/// Looks at everything; leaves the VM as it should go on, and tells how it was found.
pub(super) fn check(
    setup: &mut Setup<'_>,
    plan: &Plan,
    seen: &Seen,
    copies: Option<&Copies>,
    capture: Capture,
) -> Result<Power> {
    let power = find_owner(setup)?;
    let other = 1 - setup.at;
    setup.host(other).assert_clean()?;
    processes(setup, power)?;
    expect_power(setup, plan, seen, power)?;
    let start = format!("/v1/vms/{VM}/start");
    let refused = setup.host(other).api::<Value>("POST", &start, None)?;
    ensure!(is_refusal(&refused), "{} starts it as well: {refused:?}", setup.host(other).name());
    if let Some(copies) = copies.filter(|_| !seen.was_started) {
        copies.compare(setup)?;
    }
    go_on(setup, plan, seen, power)?;
    ensure!(!capture.stop()?.two_copies(), "two copies of the VM were running");
    Ok(power)
}

/// Sets where the VM is; fails unless exactly one host has it.
fn find_owner(setup: &mut Setup<'_>) -> Result<Power> {
    let [a, b] = [setup.look(0)?, setup.look(1)?];
    let (at, vm) = match (a, b) {
        (Some(vm), None) => (0, vm),
        (None, Some(vm)) => (1, vm),
        (Some(_), Some(_)) => bail!("both hosts have the VM"),
        (None, None) => bail!("no host has the VM"),
    };
    setup.at = at;
    Ok(vm.power)
}

/// One QEMU where the VM is on, none anywhere else.
fn processes(setup: &Setup<'_>, power: Power) -> Result<()> {
    let expected = match power {
        Power::Off => 0,
        _ => 1,
    };
    let until = Instant::now() + END_MAX;
    loop {
        let here = setup.host(setup.at).qemu_pids().len();
        let there = setup.host(1 - setup.at).qemu_pids().len();
        if (here, there) == (expected, 0) {
            return Ok(());
        }
        ensure!(
            Instant::now() < until,
            "the VM is {power:?} at {}, where {here} QEMUs run, and {there} at the other host",
            setup.host(setup.at).name()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A fault may have turned the VM off where its QEMU was killed, and nothing else; one
/// that was killed while the move was looked at moved as a VM that is off.
fn expect_power(setup: &Setup<'_>, plan: &Plan, seen: &Seen, power: Power) -> Result<()> {
    let was_killed = seen.qemu_killed[setup.at];
    let was_full = plan
        .injections
        .iter()
        .zip(&seen.struck)
        .any(|(injection, struck)| *struck && injection.fault == Fault::FillDisk);
    let was_off_when_it_began =
        plan.injections.iter().zip(&seen.struck).any(|(injection, struck)| {
            let kills = matches!(injection.fault, Fault::KillSourceQemu | Fault::KillQemus);
            *struck && kills && injection.step.name == "compare"
        });
    let is_right = match (plan.initial, power) {
        (Initial::Running, Power::Running)
        | (Initial::Paused, Power::Paused)
        | (Initial::Off, Power::Off) => true,
        (Initial::Running | Initial::Paused, Power::Off) => was_killed || was_off_when_it_began,
        (_, Power::Running) => seen.was_started,
        // Its guest could not write; it waits for somebody to resume it.
        (Initial::Running, Power::Fault) => was_full,
        _ => false,
    };
    ensure!(
        is_right,
        "the VM was {:?} and is {power:?} at {} (QEMUs killed: {:?}, told: {:?})",
        plan.initial,
        setup.host(setup.at).name(),
        seen.qemu_killed,
        seen.told
    );
    Ok(())
}

/// Lets the VM run on, from wherever it is, and looks into its guest.
fn go_on(setup: &mut Setup<'_>, plan: &Plan, seen: &Seen, power: Power) -> Result<()> {
    if power == Power::Off && plan.initial == Initial::Off {
        return Ok(());
    }
    if seen.was_started {
        // Started while it moved: another boot, if it was off then.
        setup.boot = None;
    }
    match power {
        Power::Off => setup.start().context("starting the VM at its owner")?,
        Power::Paused | Power::Fault => setup.change("resume")?,
        _ => {}
    }
    setup.check_guest()
}
