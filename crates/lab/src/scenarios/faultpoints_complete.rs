//! A scenario that holds the list of points of failure against what agents pass.
//!
//! ```text
//! both trace ─► moves of each kind ─► passed = listed, but for what only faults reach
//! ```
//!
//! **Invariant.** Questions to QEMU are no steps: they change nothing, so that an
//! agent which dies at one dies between two steps that are listed.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use limosa_faults::{ARMED_FILE, Action, Armed, Edge, FOLDER_VARIABLE, REACHED_PREFIX, TRACE_FILE};
use limosa_protocol::migration::{Migration, Outcome};
use serde_json::{Value, json};

use super::Scenario;
use super::faults::SETTLE_TIMEOUT;
use crate::faults::steps::{STEPS, Side};
use crate::harness::lab::{Lab, Topology};
use crate::harness::net::{self, Cut};
use crate::harness::points::wait;
use crate::harness::scene::BOOT_TIMEOUT;
use crate::harness::{client, host};
use crate::harness::{steps, tiny};

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "points-are-listed",
    proves: "each point of failure that an agent passes in a move is listed, and each one that is \
             listed is passed, but for those that only another fault reaches",
    topology: Topology::default,
    run: all_are_listed,
}];

/// Beginnings of the names of questions to QEMU.
const QUESTIONS: [&str; 2] = ["qmp.query-", "qmp.qmp_"];

/// Points that were passed, with the half of a migration that passed them.
type Passed = BTreeSet<String>;

fn all_are_listed(lab: &mut Lab) -> Result<()> {
    for name in ["a", "b"] {
        let config = steps::agent_config(lab.host(name), None, "");
        let folder = lab.host(name).fault_dir();
        let variable = (FOLDER_VARIABLE, &*folder.to_string_lossy());
        lab.host_mut(name).start_agent(&config, &[variable])?;
    }
    steps::join(lab)?;
    let wanted = tiny::working()?;
    steps::create_and_start(lab.host("a"), &wanted)?;
    client::status::wait(lab.client(), net::guest_v4(0), BOOT_TIMEOUT)?;
    let vm = &wanted.name;
    let mut passed = Passed::new();
    let none = Value::Null;
    traced(lab, &mut passed, ["a", "b"], Outcome::Moved, || {
        steps::begin_move(lab.host("a"), vm, "b", &none)
    })?;
    traced(lab, &mut passed, ["b", "a"], Outcome::Moved, || {
        steps::begin_move(lab.host("b"), vm, "a", &json!({"verify": "full"}))
    })?;
    for point in ["qmp.migrate-continue.before", "send.ready.before"] {
        traced(lab, &mut passed, ["a", "b"], Outcome::Stayed, || cancelled(lab, vm, point))?;
    }
    steps::power(lab.host("a"), vm, "pause")?;
    traced(lab, &mut passed, ["a", "b"], Outcome::Moved, || {
        steps::begin_move(lab.host("a"), vm, "b", &none)
    })?;
    lab.host("b").limosa(&["vm", "stop", vm, "--force"])?;
    traced(lab, &mut passed, ["b", "a"], Outcome::Moved, || {
        steps::begin_move(lab.host("b"), vm, "a", &none)
    })?;
    steps::power(lab.host("a"), vm, "start")?;
    client::status::wait(lab.client(), net::guest_v4(0), BOOT_TIMEOUT)?;
    // The last: a question that was under way may arrive when all is over.
    traced(lab, &mut passed, ["a", "b"], Outcome::Moved, || link_lost(lab, vm))?;
    compare(&passed)
}

/// Makes a move from one host to another, to its end at both, and adds what they
/// passed meanwhile.
fn traced(
    lab: &Lab,
    passed: &mut Passed,
    [from, to]: [&str; 2],
    expected: Outcome,
    begin: impl FnOnce() -> Result<Migration>,
) -> Result<()> {
    let trace = |name: &str| lab.host(name).fault_dir().join(TRACE_FILE);
    for name in [from, to] {
        std::fs::write(trace(name), "")?;
    }
    let migration = begin()?;
    let gathered = steps::follow(lab.host(from), &migration, SETTLE_TIMEOUT)?;
    let last = gathered.last().context("nothing was said")?;
    ensure!(last.outcome == Some(expected), "it ended as {:?}: {:?}", last.outcome, last.reason);
    for name in [from, to] {
        wait("the end at both hosts", || {
            let view = steps::look_at_move(lab.host(name), &migration)?;
            Ok(view.ended_unix_ms)
        })?;
    }
    // The last word of all may still be answered.
    lab.host(if expected == Outcome::Moved { from } else { to }).assert_clean()?;
    for (name, side) in [(from, Side::Source), (to, Side::Destination)] {
        let text = std::fs::read_to_string(trace(name))?;
        std::fs::remove_file(trace(name))?;
        passed.extend(text.lines().map(|point| format!("{}.{point}", side.as_str())));
    }
    Ok(())
}

/// Begins a move from a, holds it at a point, does something and lets it go on.
fn held(
    lab: &Lab,
    vm: &str,
    point: &str,
    deed: impl FnOnce(&host::Host, &Migration) -> Result<()>,
) -> Result<Migration> {
    let reached = arm(lab, point)?;
    let migration = steps::begin_move(lab.host("a"), vm, "b", &Value::Null)?;
    wait("coming to the point", || Ok(reached.exists().then_some(())))?;
    deed(lab.host("a"), &migration)?;
    std::fs::remove_file(reached)?;
    Ok(migration)
}

fn cancelled(lab: &Lab, vm: &str, point: &str) -> Result<Migration> {
    held(lab, vm, point, |host, migration| {
        let path = format!("/v1/migrations/{}/cancel", migration.id);
        host.api::<Value>("POST", &path, None)?.read::<Migration>().map(drop)
    })
}

fn link_lost(lab: &Lab, vm: &str) -> Result<Migration> {
    let cut = |_: &host::Host, _: &Migration| lab.net().cut(0, "b", Cut::Silent);
    let migration = held(lab, vm, "qmp.migrate.after", cut)?;
    wait("the loss is told", || {
        Ok(steps::look_at_move(lab.host("a"), &migration)?.progress.link_loss)
    })?;
    // The next time all is there, and nobody may say so.
    let reached = arm(lab, "send.ready.before")?;
    lab.net().restore(0, "b")?;
    wait("coming to the question", || Ok(reached.exists().then_some(())))?;
    lab.net().cut(0, "b", Cut::Silent)?;
    std::fs::remove_file(reached)?;
    wait("the guest's going on at the source", || {
        let progress = steps::look_at_move(lab.host("a"), &migration)?.progress;
        Ok((progress.given_up_switchover_count > 0).then_some(()))
    })?;
    lab.net().restore(0, "b")?;
    Ok(migration)
}

/// Has a hold at a point; returns the file by which that is seen and ended.
fn arm(lab: &Lab, point: &str) -> Result<PathBuf> {
    let folder = lab.host("a").fault_dir();
    let armed = Armed { point: point.to_owned(), action: Action::Hold, skip: 0 };
    std::fs::write(folder.join(ARMED_FILE), armed.to_string())?;
    Ok(folder.join(format!("{REACHED_PREFIX}{point}")))
}

fn compare(passed: &Passed) -> Result<()> {
    let mut expected = Passed::new();
    let mut listed = Passed::new();
    for step in STEPS.iter().copied().flatten() {
        for edge in [Edge::Before, Edge::After] {
            let point = format!("{}.{}", step.side.as_str(), step.point(edge));
            listed.insert(point.clone());
            if !step.needs_fault() {
                expected.insert(point);
            }
        }
    }
    let is_question = |point: &&String| {
        let name = point.split_once('.').map_or("", |(_, name)| name);
        QUESTIONS.iter().any(|question| name.starts_with(question))
    };
    let unlisted: Vec<_> = passed.difference(&listed).filter(|point| !is_question(point)).collect();
    let missed: Vec<_> = expected.difference(passed).collect();
    ensure!(
        unlisted.is_empty() && missed.is_empty(),
        "passed and not listed: {unlisted:?}; listed and not passed: {missed:?}"
    );
    Ok(())
}
