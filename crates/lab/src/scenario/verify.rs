//! Stories of hosts that hold different contents: the move ends before its commit
//! point, and the place of the first difference is named.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use limosa_protocol::fault::Action;
use limosa_protocol::migration::{Migration, Outcome};
use serde_json::json;

use super::points::Point;
use super::scene::Scene;
use super::steps::{self, Wanted};
use super::{Story, tiny};
use crate::lab::{Lab, Plan};

/// Longest time until a migration has ended.
const END_TIMEOUT: Duration = Duration::from_secs(120);
/// Where a byte of the disk is changed.
const DISK_OFFSET_BYTES: u64 = 37 * (64 << 10) + 5;
/// Where a byte of RAM is changed: in a page that a Linux guest leaves alone.
const RAM_OFFSET_BYTES: u64 = 0x0500_0123;

pub(super) const STORIES: &[Story] = &[Story {
    name: "verify-names-what-differs",
    proves: "with full verification a byte that is another one at the destination, on a disk or \
             in memory, ends the move and is named; the VM stays",
    plan: Plan::default,
    run: names_what_differs,
}];

fn names_what_differs(lab: &mut Lab) -> Result<()> {
    let wanted = Wanted { disks: vec![("raw", 64)], ..tiny::working()? };
    let scene = Scene::set(lab, &wanted)?;
    let image = |_: &Lab| Ok("$(find /var/lib/limosa/vms -name '*.raw')".to_owned());
    let from = DISK_OFFSET_BYTES / (64 << 10) * (64 << 10);
    let named = format!("first in bytes {from} to");
    changed(lab, &scene, "send.verify.before", image, DISK_OFFSET_BYTES, &named)?;
    // RAM is read again as soon as it is all there: it must change before.
    let named = format!("first in the page at {:#x}", RAM_OFFSET_BYTES & !0xfff);
    changed(lab, &scene, "qmp.migrate-continue.before", memory, RAM_OFFSET_BYTES, &named)?;
    scene.end(lab, "a").map(drop)
}

/// The memory of b's guest.
fn memory(lab: &Lab) -> Result<String> {
    let pids = lab.host("b").qemu_pids();
    let pid = pids.first().context("b has no QEMU")?.as_raw_nonzero();
    Ok(format!(
        "$(for fd in /proc/{pid}/fd/*; do readlink $fd | grep -q memfd && echo $fd; done | head -1)"
    ))
}

/// Moves the VM until the source is held at a point, turns a bit of a file of b
/// round, and expects that the end names it.
fn changed(
    lab: &mut Lab,
    scene: &Scene,
    held_at: &str,
    file: impl Fn(&Lab) -> Result<String>,
    offset_bytes: u64,
    named: &str,
) -> Result<()> {
    let point = Point::arm(lab, "a", held_at, Action::Hold)?;
    let migration = steps::begin_move(lab.host("a"), &scene.vm, "b", &json!({"verify": "full"}))?;
    point.wait()?;
    let file = file(lab)?;
    let turn = format!(
        "file={file}; test -n \"$file\" && old=$(dd if=$file bs=1 skip={offset_bytes} count=1 \
         2>/dev/null | od -An -tu1) && printf \"\\\\$(printf %o $((old ^ 1)))\" | dd of=$file bs=1 \
         seek={offset_bytes} count=1 conv=notrunc 2>&1"
    );
    lab.host("b").run(&["sh", "-c", &turn]).context("turning a bit round")?;
    point.release()?;
    let gathered = steps::follow(lab.host("a"), &migration, END_TIMEOUT)?;
    let last: &Migration = gathered.last().context("nothing was said")?;
    ensure!(last.outcome == Some(Outcome::Stayed), "it ended as {:?}", last.outcome);
    let reason = last.reason.clone().unwrap_or_default();
    ensure!(reason.contains(named), "not {named}: {reason}");
    Ok(())
}
