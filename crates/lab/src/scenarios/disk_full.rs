//! A state store without room: what a host does whose record was not written,
//! because a real file system was really full.
//!
//! ```text
//! held before the record ─► its file system is filled ─► let go ─► the write fails
//!    ─► room, and the agent is started again ─► one host has the VM, which goes on
//! ```
//!
//! The store lies on a file system of its own, so that nothing else fails. It writes
//! into holes of its file, for which there is no room then, and into places that it
//! has given up, for which there is: a later record may be the one that fails.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use limosa_faults::Action;
use limosa_protocol::migration::Migration;
use serde_json::{Value, json};

use super::Scenario;
use super::faults::SETTLE_TIMEOUT;
use crate::harness::api;
use crate::harness::host::Host;
use crate::harness::lab::{Lab, Topology};
use crate::harness::points::{Point, start_agent, wait};
use crate::harness::scene::{self, Scene};
use crate::harness::steps;
use crate::harness::tiny;

/// What the kernel calls it, in the agent's log.
const NO_SPACE: &str = "No space left on device";
/// Records before which the file system becomes full. The first is the commit point.
const RECORDS: [(&str, &str); 5] =
    [("a", "handed-over"), ("a", "offered"), ("b", "preparing"), ("b", "ready"), ("b", "owner")];
/// Least of them in whose move a write must have failed, the commit point among them.
const STRUCK_MIN: usize = 3;
/// Most moves until a write fails at the commit point: whether there is a hole to be
/// written differs from move to move.
const COMMIT_POINT_TRIES_MAX: usize = 6;

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "store-full",
    proves: "a host whose state store finds no room for a record hands nothing over by guess: it \
             says so, and settles once there is room and its agent is started again",
    topology: Topology::default,
    run: |lab| {
        for host in lab.hosts() {
            give_store(host).context("a file system for the store")?;
        }
        let scene = Scene::set(lab, &tiny::working()?)?;
        let mut struck = BTreeSet::new();
        let commit_point = RECORDS[0];
        let more = std::iter::repeat_n(commit_point, COMMIT_POINT_TRIES_MAX - 1);
        for (index, (host, record)) in RECORDS.into_iter().chain(more).enumerate() {
            if index >= RECORDS.len() && struck.contains(record) {
                break;
            }
            let has_struck = no_room(lab, &scene.vm, host, record)
                .with_context(|| format!("no room from {record} on at {host}"))?;
            struck.extend(has_struck.then_some(record));
        }
        ensure!(struck.contains(commit_point.1) && struck.len() >= STRUCK_MIN, "{struck:?}");
        let owner = steps::wait_for_owner(lab, &scene.vm, SETTLE_TIMEOUT)?;
        scene.end(lab, &owner).map(drop)
    },
}];

/// Gives a host's store a small file system of its own.
fn give_store(host: &Host) -> Result<()> {
    let make = "set -e; mkdir -p /run/limosa/store; \
                mount -t tmpfs -o size=8m none /run/limosa/store; \
                touch /run/limosa/store/state.redb /var/lib/limosa/state.redb; \
                mount --bind /run/limosa/store/state.redb /var/lib/limosa/state.redb";
    host.run(&["sh", "-c", make]).map(drop)
}

/// Moves the VM from a, with no room from that record on; brings it back to a. Returns
/// whether a write failed.
fn no_room(lab: &mut Lab, vm: &str, name: &str, record: &str) -> Result<bool> {
    lab.host(name).clear_logs()?;
    let point = Point::arm(lab, name, &format!("record.{record}.before"), Action::Hold)?;
    // Answered when it is recorded as offered, or is not.
    let (socket, path) = (lab.host("a").agent_socket(), format!("/v1/vms/{vm}/move"));
    let order = std::thread::spawn(move || {
        api::ask_within(&socket, "POST", &path, Some(&json!({"to": "b"})), SETTLE_TIMEOUT)
    });
    point.wait()?;
    lab.host(name).run(&["sh", "-c", "cat /dev/zero >/run/limosa/store/fill 2>/dev/null || :"])?;
    point.release()?;
    let has_struck = wait("a write without room, or the move's end", || {
        let has_failed = lab.host(name).agent_log().contains(NO_SPACE);
        let all: Vec<Migration> =
            lab.host("a").api::<Value>("GET", "/v1/migrations", None)?.read()?;
        let has_ended = all.iter().all(|one| one.outcome.is_some());
        Ok((has_failed || order.is_finished() && has_ended).then_some(has_failed))
    })?;
    if has_struck {
        let told = lab.host(name).api::<Value>("GET", "/v1/host", None)?.body;
        let has_remedy = told["remedy"].as_str().is_some_and(|it| it.contains("restart limosad"));
        ensure!(told["code"] == "store-failed" && has_remedy, "it does not say what to do: {told}");
    }
    lab.host(name).run(&["rm", "/run/limosa/store/fill"])?;
    lab.host_mut(name).kill_agent()?;
    start_agent(lab, name)?;
    // An agent that was killed may not have answered any more.
    let _ = order.join().map_err(|_| anyhow::anyhow!("the order panicked"))?;
    let owner = steps::wait_for_owner(lab, vm, SETTLE_TIMEOUT)?;
    steps::assert_only_at(lab, vm, &owner)?;
    scene::guest_is_well(lab)?;
    if owner == "b" {
        steps::move_vm(lab, vm, "b", "a")?;
    }
    Ok(has_struck)
}
