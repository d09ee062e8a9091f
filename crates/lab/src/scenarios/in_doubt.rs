//! Scenarios of handovers that two hosts cannot settle at once: told everywhere,
//! started nowhere, settled by the other host's word or by an operator.
//!
//! ```text
//! a point is armed ─► move ─► a host dies there ─► the other one is in doubt
//!                        word, when the host comes back ─┤
//!                        operator, when it never does ───┴─► exactly one copy
//! ```

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use limosa_faults::Action;
use limosa_protocol::api::{Power, Recovery, Vm};
use limosa_protocol::migration::{Migration, Outcome};
use serde_json::{Value, json};

use super::Scenario;
use crate::harness::capture::Kind;
use crate::harness::host::{Host, Storage};
use crate::harness::lab::{Lab, Topology};
use crate::harness::net::Cut;
use crate::harness::points::{Point, start_agent, wait};
use crate::harness::scene::Scene;
use crate::harness::steps;
use crate::harness::tiny;

/// Longest time for hosts to agree.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(90);
/// How long is listened for a guest that must not run.
const LISTEN: Duration = Duration::from_secs(2);
/// Code by which `limosa vm move` tells of a doubt.
const IN_DOUBT_CODE: i32 = 4;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "in-doubt-settles",
        proves: "a commit that nobody answers is told as a doubt, nothing starts, and it settles \
                 by itself when the destination is back",
        topology: Topology::default,
        run: settles,
    },
    Scenario {
        name: "in-doubt-forced-at-source",
        proves: "with the destination gone, an operator gives the VM back to its source, and the \
                 destination gives way when it comes back",
        topology: Topology::default,
        run: forced_at_source,
    },
    Scenario {
        name: "in-doubt-forced-at-destination",
        proves: "with the source gone, an operator gives the VM to its destination, and the \
                 source keeps its old copy without ever starting it",
        topology: Topology::default,
        run: forced_at_destination,
    },
    Scenario {
        name: "delete-needs-last-message",
        proves: "a VM whose source died before its last message is not deleted until the source \
                 has sent it",
        topology: Topology::default,
        run: is_deleted,
    },
    Scenario {
        name: "forced-while-the-source-runs",
        proves: "a destination that an operator forces although the source's guest runs on: once \
                 the hosts hear each other, the source stops its guest and gives way",
        topology: Topology::default,
        run: forced_while_source_runs,
    },
    Scenario {
        name: "destination-store-lost",
        proves: "a destination that lost its records while a commit was unanswered leaves the VM \
                 in doubt, told everywhere, and `vm move` ends with its own code",
        topology: Topology::default,
        run: store_lost,
    },
    Scenario {
        name: "next-move-needs-last-message",
        proves: "a VM whose source died before its last message moves on to a third host only \
                 after an operator's `--force-owner`, and the source gives way when it returns",
        topology: || Topology {
            hosts: vec![("a", Storage::Folder), ("b", Storage::Folder), ("c", Storage::Folder)],
            ..Topology::default()
        },
        run: moves_on,
    },
];

/// A move from a to b that came to that point of that host.
fn moved_until(
    lab: &mut Lab,
    host: &str,
    point: &str,
    action: Action,
) -> Result<(Scene, Migration)> {
    let scene = Scene::set(lab, &tiny::heavy()?)?;
    let point = Point::arm(lab, host, point, action)?;
    let migration = steps::begin_move(lab.host("a"), &scene.vm, "b", &Value::Null)?;
    point.wait()?;
    Ok((scene, migration))
}

/// Power of all that is left of a host whose agent died at its point.
fn power_cut(lab: &mut Lab, host: &str) -> Result<()> {
    lab.host_mut(host).kill_agent()?;
    lab.host(host).kill_qemu();
    wait("the end of QEMU", || Ok(lab.host(host).qemu_pids().is_empty().then_some(())))
}

/// Waits until a host tells its doubt, and that it does so wherever one looks.
fn doubt_is_told(host: &Host, vm: &str, migration: &Migration) -> Result<()> {
    let view: Vm = wait("the doubt", || {
        let view = steps::look(host, vm)?.context("the VM is not told of")?;
        Ok((view.power == Power::InDoubt).then_some(view))
    })?;
    let doubt = view.doubt.context("the VM is in doubt without a reason")?;
    ensure!(doubt.contains("limosa vm recover"), "the doubt names no next step: {doubt}");
    let told = steps::look_at_move(host, migration)?;
    ensure!(told.outcome == Some(Outcome::InDoubt), "the migration is {:?}", told.outcome);
    ensure!(told.reason.is_some(), "the migration is in doubt without a reason");
    let shown = host.limosa(&["vm", "show", vm])?;
    ensure!(shown.contains("in doubt"), "`vm show` does not tell: {shown}");
    let shown = host.limosa(&["migration", "show", &migration.id.to_string()])?;
    ensure!(shown.contains("in doubt"), "`migration show` does not tell: {shown}");
    ensure!(host.agent_log().contains("in doubt"), "the log does not tell");
    for order in ["start", "resume"] {
        let answer = host.api::<Value>("POST", &format!("/v1/vms/{vm}/{order}"), None)?;
        ensure!(answer.status == 409, "{order} of a VM in doubt was answered {}", answer.status);
    }
    Ok(())
}

fn settles(lab: &mut Lab) -> Result<()> {
    let (scene, migration) = moved_until(lab, "b", "answer.commit.before", Action::Kill)?;
    lab.host_mut("b").kill_agent()?;
    doubt_is_told(lab.host("a"), &scene.vm, &migration)?;
    // Both hosts answer again: there is nothing for an operator to decide.
    start_agent(lab, "b")?;
    let owner = steps::wait_for_owner(lab, &scene.vm, SETTLE_TIMEOUT)?;
    ensure!(owner == "b", "the VM is at {owner} although it was handed over");
    let last = wait("the end", || {
        let last = steps::look_at_move(lab.host("a"), &migration)?;
        Ok(last.ended_unix_ms.is_some().then_some(last))
    })?;
    ensure!(last.outcome == Some(Outcome::Moved), "it ended as {:?}", last.outcome);
    let refused = lab.host("a").try_limosa(&["vm", "start", &scene.vm])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && said.contains("handed over to b"), "start said {said}");
    scene.end(lab, "b").map(drop)
}

/// What an operator reads, and that a slip of the name forces nothing.
fn force(host: &Host, vm: &str) -> Result<()> {
    let known: Recovery = host.limosa_json(&["vm", "recover", vm])?;
    ensure!(known.may_force && !known.peer.answers, "told to the operator: {known:?}");
    let slip = host.try_limosa(&["vm", "recover", vm, "--force-owner", "--confirm", "other"])?;
    ensure!(!slip.status.success(), "a wrong name was taken");
    let path = format!("/v1/vms/{vm}/recover");
    let answer = host.api("POST", &path, Some(&json!({"confirm": "other"})))?;
    ensure!(answer.status == 400, "a wrong name was answered {}", answer.status);
    host.limosa(&["vm", "recover", vm, "--force-owner", "--confirm", vm]).map(drop)
}

fn is_deleted(lab: &mut Lab) -> Result<()> {
    let (scene, _) = moved_until(lab, "a", "send.commit.after", Action::Kill)?;
    power_cut(lab, "a")?;
    wait("the VM's run at b", || {
        let found = steps::look(lab.host("b"), &scene.vm)?;
        Ok(found.filter(|vm| vm.power == Power::Running))
    })?;
    let delete = ["vm", "delete", &scene.vm, "--yes"];
    lab.host("b").limosa(&["vm", "stop", "--force", &scene.vm])?;
    let refused = lab.host("b").try_limosa(&delete)?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && said.contains("a has not confirmed"), "said {said}");
    start_agent(lab, "a")?;
    wait("the delete at b", || {
        Ok(lab.host("b").try_limosa(&delete)?.status.success().then_some(()))
    })?;
    for host in lab.hosts() {
        ensure!(steps::look(host, &scene.vm)?.is_none(), "{} has it still", host.name());
        host.assert_clean()?;
    }
    Ok(())
}

fn moves_on(lab: &mut Lab) -> Result<()> {
    let (scene, _) = moved_until(lab, "a", "send.commit.after", Action::Kill)?;
    power_cut(lab, "a")?;
    wait("the VM's run at b", || {
        let found = steps::look(lab.host("b"), &scene.vm)?;
        Ok(found.filter(|vm| vm.power == Power::Running))
    })?;
    steps::pair(lab, 1, 2)?;
    // An operator of a could still make a the owner: b must not lose sight of that.
    let refused = lab.host("b").try_limosa(&["vm", "move", &scene.vm, "--to", "c"])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success(), "the move was not refused");
    ensure!(said.contains("a has not confirmed") && said.contains("--force-owner"), "said {said}");
    force(lab.host("b"), &scene.vm)?;
    steps::move_vm(lab, &scene.vm, "b", "c")?;
    start_agent(lab, "a")?;
    wait("a giving way", || Ok(steps::look(lab.host("a"), &scene.vm)?.is_none().then_some(())))?;
    scene.end(lab, "c").map(drop)
}

fn forced_at_source(lab: &mut Lab) -> Result<()> {
    let (scene, migration) = moved_until(lab, "b", "answer.commit.before", Action::Kill)?;
    power_cut(lab, "b")?;
    doubt_is_told(lab.host("a"), &scene.vm, &migration)?;
    force(lab.host("a"), &scene.vm)?;
    let owner = steps::wait_for_owner(lab, &scene.vm, SETTLE_TIMEOUT)?;
    ensure!(owner == "a", "the VM is at {owner}");
    start_agent(lab, "b")?;
    scene.end(lab, "a").map(drop)
}

fn forced_at_destination(lab: &mut Lab) -> Result<()> {
    let (scene, migration) = moved_until(lab, "a", "record.handed-over.before", Action::Kill)?;
    power_cut(lab, "a")?;
    doubt_is_told(lab.host("b"), &scene.vm, &migration)?;
    force(lab.host("b"), &scene.vm)?;
    let owner = steps::wait_for_owner(lab, &scene.vm, SETTLE_TIMEOUT)?;
    ensure!(owner == "b", "the VM is at {owner}");
    start_agent(lab, "a")?;
    let old = wait("the source giving way", || {
        let view = steps::look(lab.host("a"), &scene.vm)?.context("a has lost its old copy")?;
        Ok((view.power == Power::GivenUp).then_some(view))
    })?;
    let Some(owner) = old.given_up_to else { bail!("a does not say who owns the VM") };
    ensure!(owner.as_str() == "b", "a says that {owner} owns the VM");
    let refused = lab.host("a").try_limosa(&["vm", "start", &scene.vm])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && said.contains("belongs to b"), "start said {said}");
    lab.host("a").limosa(&["vm", "delete", &scene.vm, "--yes"])?;
    scene.end(lab, "b").map(drop)
}

/// The link is lost between *ready* and the commit, and each host's operator sees its
/// own half alone: the source's guest runs on, and the destination is forced.
fn forced_while_source_runs(lab: &mut Lab) -> Result<()> {
    let scene = Scene::set(lab, &tiny::heavy()?)?;
    let point = Point::arm(lab, "b", "record.ready.after", Action::Hold)?;
    let migration = steps::begin_move(lab.host("a"), &scene.vm, "b", &Value::Null)?;
    point.wait()?;
    lab.net().cut(0, "b", Cut::Silent)?;
    point.release()?;
    wait("the guest's going on at the source", || {
        let view = steps::look_at_move(lab.host("a"), &migration)?;
        let power = steps::look(lab.host("a"), &scene.vm)?.map(|vm| vm.power);
        Ok((view.outcome.is_some() && power == Some(Power::Running)).then_some(()))
    })?;
    wait("the destination's doubt", || {
        let view = steps::look(lab.host("b"), &scene.vm)?;
        Ok(view.filter(|vm| vm.power == Power::InDoubt))
    })?;
    force(lab.host("b"), &scene.vm)?;
    let runs = |lab: &Lab, name: &str| -> Result<Option<Power>> {
        Ok(steps::look(lab.host(name), &scene.vm)?.map(|vm| vm.power))
    };
    wait("the VM's run at b", || Ok((runs(lab, "b")? == Some(Power::Running)).then_some(())))?;
    lab.net().restore(0, "b")?;
    wait("the source giving way", || Ok((runs(lab, "a")? == Some(Power::GivenUp)).then_some(())))?;
    ensure!(runs(lab, "b")? == Some(Power::Running), "b does not run the VM that it was given");
    // What the agent says of its guest is one thing, what the guest does another.
    let from_ns = steps::unix_ms()? * 1_000_000;
    std::thread::sleep(LISTEN);
    let heard = scene.so_far().1.between(from_ns, u64::MAX);
    let at = |name| {
        let beats = heard.frames().iter().filter(|frame| {
            matches!(frame.kind, Kind::Heartbeat { .. })
                && heard.host_name(frame.host) == Some(name)
        });
        beats.count()
    };
    ensure!(at("a") == 0, "the guest still runs at a, which gave way");
    ensure!(at("b") > 0, "no guest runs at b");
    Ok(())
}

fn store_lost(lab: &mut Lab) -> Result<()> {
    let scene = Scene::set(lab, &tiny::heavy()?)?;
    let point = Point::arm(lab, "b", "answer.commit.before", Action::Kill)?;
    let args = ["move", &scene.vm, "--to", "b"].map(str::to_owned);
    let program = crate::harness::paths::product("limosa")?.to_string_lossy().into_owned();
    let args: Vec<_> = [program, "vm".to_owned()].into_iter().chain(args).collect();
    let mut waiting = lab.host("a").start(&args, "move.log")?;
    point.wait()?;
    lab.host_mut("b").kill_agent()?;
    lab.host("b").run(&["rm", "/var/lib/limosa/state.redb"])?;
    start_agent(lab, "b")?;
    let known: Vec<Migration> =
        lab.host("a").api::<Value>("GET", "/v1/migrations", None)?.read()?;
    let migration = known.last().context("a knows no migration")?;
    doubt_is_told(lab.host("a"), &scene.vm, migration)?;
    let code = wait("the end of `vm move`", || Ok(waiting.try_wait()?))?.code();
    ensure!(code == Some(IN_DOUBT_CODE), "`vm move` ended with {code:?}");
    let recovery: Recovery = lab.host("a").limosa_json(&["vm", "recover", &scene.vm])?;
    ensure!(recovery.may_force, "an operator cannot decide: {recovery:?}");
    lab.host("b").kill_qemu();
    lab.host("a").limosa(&["vm", "recover", &scene.vm, "--force-owner", "--confirm", &scene.vm])?;
    let owner = steps::wait_for_owner(lab, &scene.vm, SETTLE_TIMEOUT)?;
    ensure!(owner == "a", "the VM is at {owner}");
    crate::harness::scene::guest_is_well(lab).map(drop)
}
