//! Scenarios of hosts that hold different contents: the move ends before its commit
//! point, and the place of the first difference is named.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use limosa_faults::Action;
use limosa_protocol::migration::{Migration, Outcome};
use rustix::fs::SeekFrom;
use serde_json::json;

use super::Scenario;
use crate::harness::client;
use crate::harness::lab::{Lab, Topology};
use crate::harness::net;
use crate::harness::points::{Point, wait};
use crate::harness::process;
use crate::harness::scene::Scene;
use crate::harness::steps::{self, Wanted};
use crate::harness::tiny;

/// Longest time until a migration has ended.
const END_TIMEOUT: Duration = Duration::from_secs(120);
/// Bytes of a page
const PAGE_BYTES: u64 = 4096;
/// Where a byte of the disk is changed.
const DISK_OFFSET_BYTES: u64 = 37 * (64 << 10) + 5;
/// Where a byte of RAM is changed: in a page that a Linux guest leaves alone.
const RAM_OFFSET_BYTES: u64 = 0x0500_0123;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "verify-names-what-differs",
        proves: "with full verification a byte that is another one at the destination, on a disk \
                 or in memory, ends the move and is named; the VM stays",
        topology: Topology::default,
        run: names_what_differs,
    },
    Scenario {
        name: "digests-name-what-differs",
        proves: "without it, pages that the destination makes from wrong ones end the move and \
                 the first is named; the VM stays",
        topology: Topology::default,
        run: running_digests,
    },
    Scenario {
        name: "verify-with-freed-memory",
        proves: "memory that the guest frees while it moves, and its balloon driver reports to \
                 the host, is no difference to full verification",
        topology: super::faults::slow,
        run: freed_memory,
    },
];

fn freed_memory(lab: &mut Lab) -> Result<()> {
    let mut wanted = tiny::wanted("web1", 512, 10)?;
    wanted.boot.append.push_str(" limosa.freed_mib=224");
    let scene = Scene::set(lab, &wanted)?;
    let host = lab.host("a");
    let migration = steps::begin_move(host, &wanted.name, "b", &json!({"verify": "full"}))?;
    // A third of the memory was sent then. The rest takes longer than the guest's kernel
    // waits before it reports free memory (2 s).
    wait("third of the memory", || {
        let seen = steps::look_at_move(host, &migration)?;
        ensure!(seen.outcome.is_none(), "the move ended: {:?}", seen.reason);
        Ok((seen.progress.moved.ram_packed_bytes >= 80 << 20).then_some(()))
    })?;
    client::status::free(lab.client(), net::guest_v4(0))?;
    let gathered = steps::follow(host, &migration, END_TIMEOUT)?;
    let last = gathered.last().context("the agent reported no progress of the move")?;
    ensure!(last.outcome == Some(Outcome::Moved), "{:?}: {:?}", last.outcome, last.reason);
    scene.end(lab, "b").map(drop)
}

fn names_what_differs(lab: &mut Lab) -> Result<()> {
    let wanted = Wanted { disks: vec![("raw", 64)], ..tiny::working()? };
    let scene = Scene::set(lab, &wanted)?;
    let from = DISK_OFFSET_BYTES / (64 << 10) * (64 << 10);
    let named = format!("disk d0, first in bytes {from} to");
    let disk =
        |lab: &Lab| turn(lab, "$(find /var/lib/limosa/vms -name '*.raw')", DISK_OFFSET_BYTES);
    changed(lab, &scene, "full", "send.verify.before", disk, &named)?;
    // RAM is read again as soon as it is all there: it must change before.
    let named = format!("first in the page at {:#x}", RAM_OFFSET_BYTES & !0xfff);
    let ram = |lab: &Lab| turn(lab, &process::memory(lab.host("b"))?, RAM_OFFSET_BYTES);
    changed(lab, &scene, "full", "qmp.migrate-continue.before", ram, &named)?;
    scene.end(lab, "a").map(drop)
}

fn running_digests(lab: &mut Lab) -> Result<()> {
    let wanted = tiny::working()?;
    let scene = Scene::set(lab, &wanted)?;
    // The guest is paused, and what it wrote last is still to be sent: as differences
    // to what the destination has, which is now wrong in each page.
    let named = "source and destination differ in RAM, first in the page at 0x";
    changed(lab, &scene, "running", "qmp.migrate-continue.before", turn_all_pages, named)?;
    scene.end(lab, "a").map(drop)
}

/// Turns a bit of the last byte of each page that b's guest has.
fn turn_all_pages(lab: &Lab) -> Result<()> {
    let memory = File::options().read(true).write(true).open(process::memory(lab.host("b"))?)?;
    let mut at = 0;
    let mut byte = [0];
    loop {
        at = match rustix::fs::seek(&memory, SeekFrom::Data(at)) {
            Ok(found) => found,
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(&memory, SeekFrom::Hole(at))?;
        for last in (at | (PAGE_BYTES - 1)..end).step_by(1 << 12) {
            memory.read_exact_at(&mut byte, last)?;
            memory.write_all_at(&[byte[0] ^ 1], last)?;
        }
        at = end;
    }
}

/// Turns a bit of a byte of b's file round.
fn turn(lab: &Lab, file: &str, offset_bytes: u64) -> Result<()> {
    let turn = format!(
        "file={file}; test -n \"$file\" && old=$(dd if=$file bs=1 skip={offset_bytes} count=1 \
         2>/dev/null | od -An -tu1) && printf \"\\\\$(printf %o $((old ^ 1)))\" | dd of=$file bs=1 \
         seek={offset_bytes} count=1 conv=notrunc 2>&1"
    );
    lab.host("b").run(&["sh", "-c", &turn]).context("turning a bit round").map(drop)
}

/// Moves the VM until the source is held at a point, has something changed at b,
/// and expects that the end names it.
fn changed(
    lab: &mut Lab,
    scene: &Scene,
    verify: &str,
    held_at: &str,
    change: impl Fn(&Lab) -> Result<()>,
    named: &str,
) -> Result<()> {
    let point = Point::arm(lab, "a", held_at, Action::Hold)?;
    let wishes = json!({"verify": verify});
    let migration = steps::begin_move(lab.host("a"), &scene.vm, "b", &wishes)?;
    point.wait()?;
    change(lab)?;
    point.release()?;
    let gathered = steps::follow(lab.host("a"), &migration, END_TIMEOUT)?;
    let last: &Migration = gathered.last().context("nothing was said")?;
    ensure!(last.outcome == Some(Outcome::Stayed), "it ended as {:?}", last.outcome);
    let reason = last.reason.clone().unwrap_or_default();
    ensure!(reason.contains(named), "not {named}: {reason}");
    Ok(())
}
