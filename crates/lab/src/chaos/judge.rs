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

use super::draw::{Begins, Deed, Draw};
use super::stage::{Stage, VM};
use super::trial::{Seen, is_refusal};
use crate::capture::Capture;

/// Longest wait for a QEMU that is about to end.
const END_MAX: Duration = Duration::from_secs(10);

/// The disks of a VM that is off, as they were before its move.
pub(super) struct Copies {
    disks: Vec<(String, PathBuf)>,
}

impl Copies {
    /// Copies the images of a VM that is off.
    pub(super) fn make(stage: &Stage<'_>) -> Result<Self> {
        let vm = stage.look(stage.at)?.context("the VM is gone")?;
        let host = stage.host(stage.at);
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

    fn compare(&self, stage: &Stage<'_>) -> Result<()> {
        let vm = stage.look(stage.at)?.context("the VM is gone")?;
        let host = stage.host(stage.at);
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
pub(super) fn judge(
    stage: &mut Stage<'_>,
    draw: &Draw,
    seen: &Seen,
    copies: Option<&Copies>,
    capture: Capture,
) -> Result<Power> {
    let power = find_owner(stage)?;
    let other = 1 - stage.at;
    stage.host(other).assert_clean()?;
    processes(stage, power)?;
    expect_power(stage, draw, seen, power)?;
    let start = format!("/v1/vms/{VM}/start");
    let refused = stage.host(other).api::<Value>("POST", &start, None)?;
    ensure!(is_refusal(&refused), "{} starts it as well: {refused:?}", stage.host(other).name());
    if let Some(copies) = copies.filter(|_| !seen.was_started) {
        copies.compare(stage)?;
    }
    go_on(stage, draw, seen, power)?;
    ensure!(!capture.stop()?.two_copies(), "two copies of the VM were running");
    Ok(power)
}

/// Sets where the VM is; fails unless exactly one host has it.
fn find_owner(stage: &mut Stage<'_>) -> Result<Power> {
    let [a, b] = [stage.look(0)?, stage.look(1)?];
    let (at, vm) = match (a, b) {
        (Some(vm), None) => (0, vm),
        (None, Some(vm)) => (1, vm),
        (Some(_), Some(_)) => bail!("both hosts have the VM"),
        (None, None) => bail!("no host has the VM"),
    };
    stage.at = at;
    Ok(vm.power)
}

/// One QEMU where the VM is on, none anywhere else.
fn processes(stage: &Stage<'_>, power: Power) -> Result<()> {
    let expected = match power {
        Power::Off => 0,
        _ => 1,
    };
    let until = Instant::now() + END_MAX;
    loop {
        let here = stage.host(stage.at).qemu_pids().len();
        let there = stage.host(1 - stage.at).qemu_pids().len();
        if (here, there) == (expected, 0) {
            return Ok(());
        }
        ensure!(
            Instant::now() < until,
            "the VM is {power:?} at {}, where {here} QEMUs run, and {there} at the other host",
            stage.host(stage.at).name()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A fault may have turned the VM off where its QEMU was killed, and nothing else; one
/// that was killed while the move was looked at moved as a VM that is off.
fn expect_power(stage: &Stage<'_>, draw: &Draw, seen: &Seen, power: Power) -> Result<()> {
    let was_killed = seen.qemu_killed[stage.at];
    let was_full = draw
        .faults
        .iter()
        .zip(&seen.struck)
        .any(|(fault, struck)| *struck && fault.deed == Deed::FillDisk);
    let was_off_when_it_began = draw.faults.iter().zip(&seen.struck).any(|(fault, struck)| {
        let kills = matches!(fault.deed, Deed::KillSourceQemu | Deed::KillQemus);
        *struck && kills && fault.step.name == "compare"
    });
    let is_right = match (draw.begins, power) {
        (Begins::Running, Power::Running)
        | (Begins::Paused, Power::Paused)
        | (Begins::Off, Power::Off) => true,
        (Begins::Running | Begins::Paused, Power::Off) => was_killed || was_off_when_it_began,
        (_, Power::Running) => seen.was_started,
        // Its guest could not write; it waits for somebody to resume it.
        (Begins::Running, Power::Fault) => was_full,
        _ => false,
    };
    ensure!(
        is_right,
        "the VM was {:?} and is {power:?} at {} (QEMUs killed: {:?}, told: {:?})",
        draw.begins,
        stage.host(stage.at).name(),
        seen.qemu_killed,
        seen.told
    );
    Ok(())
}

/// Lets the VM run on, from wherever it is, and looks into its guest.
fn go_on(stage: &mut Stage<'_>, draw: &Draw, seen: &Seen, power: Power) -> Result<()> {
    if power == Power::Off && draw.begins == Begins::Off {
        return Ok(());
    }
    if seen.was_started {
        // Started while it moved: another boot, if it was off then.
        stage.boot = None;
    }
    match power {
        Power::Off => stage.start().context("starting the VM at its owner")?,
        Power::Paused | Power::Fault => stage.change("resume")?,
        _ => {}
    }
    stage.check_guest()
}
