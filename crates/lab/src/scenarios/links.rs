//! Scenarios of links between hosts that break: before the commit point a migration
//! waits for them, and only for so long.
//!
//! ```text
//! move ─► link lost ─┬─ back in time ─► both go on where they stood ─► moved
//!                    └─ not back ─────► the VM stays, nothing is left at the other
//! ```

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use limosa_faults::Action;
use limosa_protocol::migration::{Moved, Phase};
use serde_json::{Value, json};

use super::Scenario;
use super::faults::{self, moved, point_in, slow, stayed};
use crate::harness::client;
use crate::harness::lab::{Lab, Topology};
use crate::harness::net::{self, Cut};
use crate::harness::points::{Point, wait};
use crate::harness::scene::{BOOT_TIMEOUT, Scene};
use crate::harness::steps;
use crate::harness::tiny;

/// How long a link is away that comes back: longer than it takes to be noticed.
const AWAY: Duration = Duration::from_secs(7);
/// Most that may be sent twice after a loss, in bytes: what a sender keeps until it
/// is acknowledged.
const RESENT_BYTES_MAX: u64 = 16 << 20;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "link-lost-in-prepare",
        proves: "a link that comes back while the destination prepares is waited for",
        topology: slow,
        run: |lab| comes_back(lab, Phase::Prepare, Cut::Cable),
    },
    Scenario {
        name: "link-lost-in-mirror",
        proves: "a link that falls silent while disks are mirrored is waited for, and what has \
                 arrived is not sent again",
        topology: slow,
        run: |lab| comes_back(lab, Phase::Mirror, Cut::Silent),
    },
    Scenario {
        name: "link-lost-in-pre-copy",
        proves: "a link that is pulled while memory is copied is waited for, and what has \
                 arrived is not sent again",
        topology: slow,
        run: |lab| comes_back(lab, Phase::PreCopy, Cut::Cable),
    },
    Scenario {
        name: "link-lost-in-switchover",
        proves: "a guest that is stopped when the link is lost soon runs on at the source, and \
                 moves once the link is back",
        topology: slow,
        run: in_switchover,
    },
    Scenario {
        name: "link-lost-when-all-is-there",
        proves: "a link that is lost when the destination is ready, or reads again what it has \
                 loaded: the guest runs on at the source, and moves in another attempt, which \
                 sends little",
        topology: Topology::default,
        run: when_all_is_there,
    },
    Scenario {
        name: "link-cut",
        proves: "the cable is pulled for good: the VM goes on at the source",
        topology: slow,
        run: |lab| is_gone(lab, Cut::Cable),
    },
    Scenario {
        name: "link-silent",
        proves: "the link drops everything silently for good: the VM goes on at the source, and can \
                 be started anew there at once",
        topology: slow,
        run: |lab| is_gone(lab, Cut::Silent),
    },
];

fn comes_back(lab: &mut Lab, phase: Phase, how: Cut) -> Result<()> {
    let (scene, migration) = if phase == Phase::Prepare {
        let held = faults::held(lab, phase)?;
        lab.net().cut(0, "b", how)?;
        held.point.release()?;
        (held.scene, held.migration)
    } else {
        let (scene, migration) = faults::moving(lab, phase)?;
        lab.net().cut(0, "b", how)?;
        (scene, migration)
    };
    let before = scene.so_far().0;
    let lost = Instant::now();
    wait("the loss is told", || {
        let view = steps::look_at_move(lab.host("a"), &migration)?;
        ensure!(view.outcome.is_none(), "it ended: {:?}", view.reason);
        Ok(view.progress.link_loss)
    })?;
    std::thread::sleep(AWAY.saturating_sub(lost.elapsed()));
    let meanwhile = scene.so_far().0;
    ensure!(
        meanwhile.heartbeats.exchanges > before.heartbeats.exchanges,
        "the guest stood while the link was lost"
    );
    lab.net().restore(0, "b")?;
    let view = moved(lab, &migration)?;
    let summary = view.summary.context("a move without a summary")?;
    ensure!(summary.link_loss_count > 0, "nobody noticed that the link was lost");
    let resent_bytes = summary.moved.resent_bytes;
    ensure!(resent_bytes <= RESENT_BYTES_MAX, "{resent_bytes} bytes were sent again");
    scene.end(lab, "b").map(drop)
}

fn in_switchover(lab: &mut Lab) -> Result<()> {
    let scene = Scene::set(lab, &tiny::heavy()?)?;
    retried(lab, &scene, ("a", point_in(Phase::Switchover)), &Value::Null)?;
    scene.end(lab, "b").map(drop)
}

fn when_all_is_there(lab: &mut Lab) -> Result<()> {
    let scene = Scene::set(lab, &tiny::working()?)?;
    let rounds = [
        ("b", "answer.ready.after", Value::Null),
        ("a", "send.verify.before", json!({"verify": "full"})),
    ];
    for (at, point, wishes) in rounds {
        let moved = retried(lab, &scene, (at, point), &wishes).context(point)?;
        // The second attempt went over all memory, and found most of it there.
        ensure!(moved.unchanged_pages > moved.full_pages / 2, "{point}: {moved:?}");
        steps::move_vm(lab, &scene.vm, "b", "a").context("the way back")?;
    }
    without_source_qemu(lab, &scene)?;
    scene.end(lab, "b").map(drop)
}

/// The source's QEMU dies when all is at the destination, and the link is away for longer
/// than a guest may stand: nobody stands, so that the destination's word is waited for.
fn without_source_qemu(lab: &mut Lab, scene: &Scene) -> Result<()> {
    let point = Point::arm(lab, "a", "send.ready.before", Action::Hold)?;
    let migration = steps::begin_move(lab.host("a"), &scene.vm, "b", &Value::Null)?;
    point.wait()?;
    lab.net().cut(0, "b", Cut::Silent)?;
    ensure!(lab.host("a").kill_qemu() == 1, "a had no QEMU");
    point.release()?;
    std::thread::sleep(AWAY);
    let view = steps::look_at_move(lab.host("a"), &migration)?;
    ensure!(view.outcome.is_none(), "it ended: {:?}", view.reason);
    lab.net().restore(0, "b")?;
    moved(lab, &migration).map(drop)
}

/// Moves a VM from a to b whose link is silent from a point on until the guest runs on at
/// the source; it moves all the same.
fn retried(
    lab: &mut Lab,
    scene: &Scene,
    (at, point): (&str, &str),
    wishes: &Value,
) -> Result<Moved> {
    let point = Point::arm(lab, at, point, Action::Hold)?;
    let migration = steps::begin_move(lab.host("a"), &scene.vm, "b", wishes)?;
    point.wait()?;
    lab.net().cut(0, "b", Cut::Silent)?;
    point.release()?;
    let stood = scene.so_far().0.heartbeats.exchanges;
    wait("the guest's going on at the source", || {
        let view = steps::look_at_move(lab.host("a"), &migration)?;
        ensure!(view.outcome.is_none(), "it ended: {:?}", view.reason);
        let beats = scene.so_far().0.heartbeats.exchanges;
        Ok((view.progress.given_up_switchover_count > 0 && beats > stood).then_some(()))
    })?;
    lab.net().restore(0, "b")?;
    let view = moved(lab, &migration)?;
    let summary = view.summary.context("a move without a summary")?;
    ensure!(summary.given_up_switchover_count == 1, "{summary:?}");
    ensure!(!scene.so_far().1.two_copies(), "two copies of the VM were running");
    Ok(summary.moved)
}

fn is_gone(lab: &mut Lab, how: Cut) -> Result<()> {
    let (scene, migration) = faults::moving(lab, Phase::Mirror)?;
    lab.net().cut(0, "b", how)?;
    let reason = stayed(lab, &migration)?;
    ensure!(reason.contains("did not come back"), "it stayed because {reason}");
    let vm = scene.vm.clone();
    if how == Cut::Silent {
        // Its destination can have nothing of it, so the VM is its operator's.
        lab.host("a").limosa(&["vm", "stop", &vm, "--force"])?;
        steps::power(lab.host("a"), &vm, "start").context("with b out of reach")?;
        client::status::wait(lab.client(), net::guest_v4(0), BOOT_TIMEOUT)?;
        lab.net().restore(0, "b")?;
        steps::assert_only_at(lab, &vm, "a")?;
    } else {
        lab.net().restore(0, "b")?;
        scene.end(lab, "a")?;
    }
    lab.net().set_speed(0, None)?;
    steps::move_vm(lab, &vm, "a", "b").context("the next move")?;
    steps::assert_only_at(lab, &vm, "b")
}
