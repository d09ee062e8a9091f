//! Scenarios of moves that something ends early: the VM runs at exactly one
//! place, its checks pass, and nothing is left behind at the other.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use limosa_faults::Action;
use limosa_protocol::api::Power;
use limosa_protocol::migration::{Migration, Outcome, Phase};
use serde_json::Value;

use super::Scenario;
use crate::harness::host::Storage;
use crate::harness::lab::{Lab, Topology};
use crate::harness::points::{Point, start_agent, wait};
use crate::harness::scene::{self, Scene};
use crate::harness::steps::{self, Wanted};
use crate::harness::tiny;

/// Slow enough for every phase with bytes in it to be met.
const SLOW_LINK_MBIT: u32 = 200;
/// Longest time for both hosts to agree after a fault.
pub(super) const SETTLE_TIMEOUT: Duration = Duration::from_secs(90);

pub(super) fn slow() -> Topology {
    Topology { links_mbit: vec![Some(SLOW_LINK_MBIT)], ..Topology::default() }
}

/// A scenario of one fault in one phase.
const fn fault(
    name: &'static str,
    proves: &'static str,
    run: fn(&mut Lab) -> Result<()>,
) -> Scenario {
    Scenario { name, proves, topology: slow, run }
}

pub(super) const SCENARIOS: &[Scenario] = &[
    fault(
        "cancel",
        "cancelled in each phase before the commit point, the VM stays as if nothing was, and \
         moves afterwards",
        cancel,
    ),
    fault(
        "cancel-retire",
        "a cancel after the commit point is refused, and the VM moves",
        cancel_too_late,
    ),
    fault(
        "destination-agent-dies",
        "the destination's agent dies, in each phase: the VM runs at one place",
        |lab| agent_dies(lab, "b"),
    ),
    fault(
        "source-agent-dies",
        "the source's agent dies, in each phase: the VM runs at one place",
        |lab| agent_dies(lab, "a"),
    ),
    fault(
        "destination-qemu-dies",
        "the destination's QEMU dies, in each phase: the VM goes on at the source; once it was \
         handed over, it is off at the destination and starts there",
        destination_qemu_dies,
    ),
    fault(
        "source-qemu-dies",
        "the source's QEMU dies, in each phase: the VM is off at the source, and nowhere else; \
         once it was handed over, it runs at the destination",
        source_qemu_dies,
    ),
    Scenario {
        name: "destination-full",
        proves: "the destination's disk becomes full meanwhile: the VM goes on at the source",
        topology: || Topology {
            hosts: vec![("a", Storage::Folder), ("b", Storage::Limited { mib: 512 })],
            ..slow()
        },
        run: destination_full,
    },
];

/// A move that is held in one phase.
pub(super) struct Held {
    pub(super) scene: Scene,
    pub(super) migration: Migration,
    pub(super) point: Point,
}

/// Where the source's agent is held for each phase.
pub(super) fn point_in(phase: Phase) -> &'static str {
    match phase {
        Phase::Prepare => "send.receive.before",
        Phase::Mirror => "qmp.blockdev-mirror.after",
        Phase::PreCopy => "qmp.migrate.after",
        Phase::Switchover => "qmp.migrate-continue.before",
        Phase::Retire => "send.retired.before",
    }
}

/// A scene with a move under way that stands in that phase, and in no other.
pub(super) fn held(lab: &mut Lab, phase: Phase) -> Result<Held> {
    let scene = Scene::set(lab, &tiny::heavy()?)?;
    let (migration, point) = hold(lab, &scene.vm, phase)?;
    Ok(Held { scene, migration, point })
}

/// Begins a move of a VM from a to b that stands in that phase, and in no other.
fn hold(lab: &mut Lab, vm: &str, phase: Phase) -> Result<(Migration, Point)> {
    let point = Point::arm(lab, "a", point_in(phase), Action::Hold)?;
    let begun = steps::begin_move(lab.host("a"), vm, "b", &Value::Null)?;
    point.wait()?;
    let migration = steps::look_at_move(lab.host("a"), &begun)?;
    ensure!(migration.phase == phase, "the move is held in {}", migration.phase.as_str());
    Ok((migration, point))
}

/// A scene with a move under way that has come to that phase.
pub(super) fn moving(lab: &mut Lab, phase: Phase) -> Result<(Scene, Migration)> {
    let scene = Scene::set(lab, &tiny::heavy()?)?;
    let begun = steps::begin_move(lab.host("a"), &scene.vm, "b", &Value::Null)?;
    let migration = steps::wait_for_phase(lab.host("a"), &begun, phase)?;
    Ok((scene, migration))
}

/// Waits for the outcome and fails unless the VM stayed; says why it stayed.
pub(super) fn stayed(lab: &Lab, migration: &Migration) -> Result<String> {
    let gathered = steps::follow(lab.host("a"), migration, SETTLE_TIMEOUT)?;
    let last = gathered.last().context("nothing was said")?;
    if last.outcome != Some(Outcome::Stayed) {
        bail!("the outcome is {:?}, {:?}", last.outcome, last.reason);
    }
    last.reason.clone().context("no reason was given")
}

fn cancel(lab: &mut Lab) -> Result<()> {
    let scene = Scene::set(lab, &tiny::heavy()?)?;
    let vm = scene.vm.clone();
    for phase in [Phase::Prepare, Phase::Mirror, Phase::PreCopy, Phase::Switchover] {
        let (migration, _point) = hold(lab, &vm, phase)?;
        let path = format!("/v1/migrations/{}/cancel", migration.id);
        lab.host("a").api::<Value>("POST", &path, None)?.read::<Migration>()?;
        let reason = stayed(lab, &migration)?;
        ensure!(reason.contains("cancelled by an operator"), "it stayed because {reason}");
        steps::assert_only_at(lab, &vm, "a").with_context(|| phase.as_str())?;
    }
    let trace = scene.end(lab, "a")?.1;
    ensure!(trace.blackout("a", "b").is_none(), "the VM was heard at b");
    // And it can still move afterwards.
    lab.net().set_speed(0, None)?;
    steps::move_vm(lab, &vm, "a", "b").context("the next move")?;
    steps::assert_only_at(lab, &vm, "b")
}

/// A paused VM whose move fails late at a: QEMU would not move it again, so that is
/// refused with what to do; it is paused again afterwards.
pub(super) fn cancel_late_while_paused(lab: &mut Lab, vm: &str) -> Result<()> {
    let (migration, _point) = hold(lab, vm, Phase::Switchover)?;
    let path = format!("/v1/migrations/{}/cancel", migration.id);
    lab.host("a").api::<Value>("POST", &path, None)?.read::<Migration>()?;
    stayed(lab, &migration)?;
    let power = steps::look(lab.host("a"), vm)?.context("it is not at a")?.power;
    ensure!(power == Power::Paused, "it is {power:?} after the cancel");
    let refused = steps::begin_move(lab.host("a"), vm, "b", &Value::Null);
    let why = format!("{:#}", refused.err().context("QEMU would not move it")?);
    ensure!(why.contains("limosa vm resume"), "it is refused because {why}");
    steps::power(lab.host("a"), vm, "resume")?;
    // The agent, started anew, learns the guest's addresses from what it says.
    wait("its address", || {
        let seen = steps::look(lab.host("a"), vm)?.context("it is not at a")?.addresses;
        Ok((!seen.is_empty()).then_some(()))
    })?;
    steps::power(lab.host("a"), vm, "pause").map(drop)
}

fn cancel_too_late(lab: &mut Lab) -> Result<()> {
    let Held { scene, migration, point } = held(lab, Phase::Retire)?;
    let path = format!("/v1/migrations/{}/cancel", migration.id);
    let answer = lab.host("a").api::<Value>("POST", &path, None)?;
    ensure!(answer.status == 409, "a cancel after the commit was answered {}", answer.status);
    point.release()?;
    moved(lab, &migration)?;
    scene.end(lab, "b").map(drop)
}

fn agent_dies(lab: &mut Lab, host: &str) -> Result<()> {
    let scene = Scene::set(lab, &tiny::heavy()?)?;
    let vm = scene.vm.clone();
    for phase in [Phase::Prepare, Phase::Mirror, Phase::PreCopy, Phase::Switchover, Phase::Retire] {
        let (_, point) = hold(lab, &vm, phase)?;
        lab.host_mut(host).kill_agent()?;
        point.release()?;
        // The other one must come to terms with it alone for a while.
        std::thread::sleep(Duration::from_secs(2));
        start_agent(lab, host)?;
        let owner = steps::wait_for_owner(lab, &vm, SETTLE_TIMEOUT)?;
        let expected = if phase == Phase::Retire { "b" } else { "a" };
        ensure!(owner == expected, "the VM is at {owner} after a fault in {}", phase.as_str());
        steps::assert_only_at(lab, &vm, expected).with_context(|| phase.as_str())?;
        scene::guest_is_well(lab)?;
    }
    scene.end(lab, "b").map(drop)
}

/// Phases in which both hosts have a QEMU of a VM that is still the source's.
const BEFORE_COMMIT: [Phase; 3] = [Phase::Mirror, Phase::PreCopy, Phase::Switchover];

fn destination_qemu_dies(lab: &mut Lab) -> Result<()> {
    let scene = Scene::set(lab, &tiny::heavy()?)?;
    let vm = scene.vm.clone();
    for phase in BEFORE_COMMIT {
        let (migration, point) = hold(lab, &vm, phase)?;
        ensure!(lab.host("b").kill_qemu() == 1, "b had no QEMU in {}", phase.as_str());
        point.release()?;
        stayed(lab, &migration).with_context(|| format!("killed in {}", phase.as_str()))?;
        steps::assert_only_at(lab, &vm, "a")?;
    }
    scene.end(lab, "a")?;
    let before = scene::guest_is_well(lab)?;
    let (migration, point) = hold(lab, &vm, Phase::Retire)?;
    ensure!(lab.host("b").kill_qemu() == 1, "b had no QEMU after the commit");
    point.release()?;
    moved(lab, &migration)?;
    is_off_at(lab, &vm, "b")?;
    steps::power(lab.host("b"), &vm, "start").context("starting it again")?;
    scene::guest_came_back(lab, &before)
}

fn source_qemu_dies(lab: &mut Lab) -> Result<()> {
    let scene = Scene::set(lab, &tiny::heavy()?)?;
    let vm = scene.vm.clone();
    for phase in BEFORE_COMMIT {
        let before = scene::guest_is_well(lab)?;
        let (migration, point) = hold(lab, &vm, phase)?;
        ensure!(lab.host("a").kill_qemu() == 1, "a had no QEMU in {}", phase.as_str());
        point.release()?;
        stayed(lab, &migration).with_context(|| format!("killed in {}", phase.as_str()))?;
        is_off_at(lab, &vm, "a")?;
        steps::power(lab.host("a"), &vm, "start").context("starting it again")?;
        scene::guest_came_back(lab, &before)
            .with_context(|| format!("killed in {}", phase.as_str()))?;
    }
    // Handed over, and its QEMU at the source is still there.
    let point = Point::arm(lab, "a", "record.handed-over.after", Action::Hold)?;
    let migration = steps::begin_move(lab.host("a"), &vm, "b", &Value::Null)?;
    point.wait()?;
    ensure!(lab.host("a").kill_qemu() == 1, "a had no QEMU any more");
    point.release()?;
    moved(lab, &migration)?;
    steps::assert_only_at(lab, &vm, "b")?;
    scene::guest_is_well(lab)?;
    ensure!(!scene.so_far().1.two_copies(), "two copies of the VM were running");
    Ok(())
}

/// Follows a move from a to its end; fails unless the VM moved.
pub(super) fn moved(lab: &Lab, migration: &Migration) -> Result<Migration> {
    let gathered = steps::follow(lab.host("a"), migration, SETTLE_TIMEOUT)?;
    let last = gathered.last().context("nothing was said")?;
    ensure!(
        last.outcome == Some(Outcome::Moved),
        "it ended as {:?}, {:?}",
        last.outcome,
        last.reason
    );
    Ok(last.clone())
}

/// Fails unless the VM is off at that host, and the other one holds nothing of it.
fn is_off_at(lab: &Lab, vm: &str, at: &str) -> Result<()> {
    let other = if at == "a" { "b" } else { "a" };
    lab.host(other).assert_clean()?;
    ensure!(steps::look(lab.host(other), vm)?.is_none(), "{other} still tells of the VM");
    wait("the VM's being off", || {
        let power = steps::look(lab.host(at), vm)?.context("its owner lost it")?.power;
        Ok((power == Power::Off).then_some(()))
    })
}

fn destination_full(lab: &mut Lab) -> Result<()> {
    let wanted = Wanted { disks: vec![("qcow2", 384)], ..tiny::heavy()? };
    let scene = Scene::set(lab, &wanted)?;
    let begun = steps::begin_move(lab.host("a"), &scene.vm, "b", &Value::Null)?;
    let migration = steps::wait_for_phase(lab.host("a"), &begun, Phase::Mirror)?;
    let fill = "dd if=/dev/zero of=/var/lib/limosa/fill bs=1M 2>/dev/null || :";
    lab.host("b").run(&["sh", "-c", fill])?;
    let reason = stayed(lab, &migration)?;
    ensure!(reason.to_lowercase().contains("space"), "the reason does not tell of space: {reason}");
    lab.host("b").run(&["rm", "/var/lib/limosa/fill"])?;
    scene.end(lab, "a").map(drop)
}
