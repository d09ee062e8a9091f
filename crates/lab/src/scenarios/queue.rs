//! Moves that wait for room at their source or destination.

use anyhow::{Context, Result, ensure};
use limosa_protocol::migration::{Migration, Outcome, Phase, QueueReason};
use serde_json::{Value, json};

use super::Scenario;
use crate::harness::host::Host;
use crate::harness::lab::{Lab, Topology};
use crate::harness::points::wait;
use crate::harness::steps::{self, MOVE_TIMEOUT, Wanted};
use crate::harness::tiny;

/// A link on which mirroring takes long enough for the others to wait.
const HELD_LINK_MBIT: u32 = 40;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "queue-source-full",
        proves: "moves beyond a source's limit wait, outlive its agent, can be cancelled, and start",
        topology: || Topology { links_mbit: vec![Some(HELD_LINK_MBIT)], ..Topology::default() },
        run: |lab| queue(lab, "a", QueueReason::SourceFull),
    },
    Scenario {
        name: "queue-destination-full",
        proves: "moves to a full destination wait, outlive their agent, can be cancelled, and start",
        topology: || Topology { links_mbit: vec![Some(HELD_LINK_MBIT)], ..Topology::default() },
        run: |lab| queue(lab, "b", QueueReason::DestinationFull),
    },
];

/// Configuration of a host with room for one migration if it is the full one.
fn config(host: &Host, full: &str) -> String {
    let config = steps::agent_config(host, None, "");
    if host.name() == full { config + "concurrent_max = 1\n" } else { config }
}

fn queue(lab: &mut Lab, full: &str, code: QueueReason) -> Result<()> {
    for host in lab.hosts_mut() {
        let config = config(host, full);
        host.start_agent(&config, &[])?;
    }
    steps::join(lab)?;
    let running = tiny::heavy()?;
    let source = lab.host("a");
    steps::create_and_start(source, &running)?;
    create_off(source, &running, "web2")?;
    create_off(source, &running, "web3")?;
    let begin = |vm: &str| steps::begin_move(lab.host("a"), vm, "b", &Value::Null);
    let first = begin(&running.name)?;
    steps::wait_for_phase(source, &first, Phase::Mirror)?;
    let (second, third) = (begin("web2")?, begin("web3")?);
    for waiting in [&second, &third] {
        assert_queued(&steps::look_at_move(source, waiting)?, code)?;
    }
    let listed = source.limosa(&["migration", "list"])?;
    ensure!(listed.matches("queued").count() == 2, "the list is {listed}");
    let found = source.limosa(&["vm", "compare", "web2", "--to", "b", "--json"])?;
    ensure!(found.contains("-full"), "nothing is noted: {found}");
    source.limosa(&["migration", "cancel", &second.id.to_string()])?;
    let cancelled = steps::look_at_move(source, &second)?;
    ensure!(cancelled.outcome == Some(Outcome::Stayed), "a cancelled one is {cancelled:?}");

    restart_source(lab, full)?;
    lab.net().set_speed(0, None)?;
    let source = lab.host("a");
    let gathered = steps::follow(source, &third, MOVE_TIMEOUT)?;
    let last = gathered.last().context("nothing was said about the move")?;
    ensure!(last.outcome == Some(Outcome::Moved), "it ended as {last:?}");
    ensure!(last.queued.is_none(), "what moved still waits: {last:?}");
    wait("all of web3 at b", || {
        let is_here = steps::look(lab.host("a"), "web3")?.is_some();
        let is_there = steps::look(lab.host("b"), "web3")?.is_some();
        Ok((is_there && !is_here).then_some(()))
    })
}

/// Creates a VM with a small disk and no NIC, as all of the lab have the same address.
fn create_off(host: &Host, like: &Wanted, name: &str) -> Result<()> {
    let wanted = Wanted { name: name.to_owned(), disks: vec![("qcow2", 16)], ..like.clone() };
    let mut definition = wanted.definition();
    definition["nics"] = json!([]);
    let answer = host.api("POST", "/v1/vms", Some(&definition))?;
    answer.read::<Value>().map(drop).with_context(|| format!("creating {name}"))
}

fn assert_queued(view: &Migration, code: QueueReason) -> Result<()> {
    let queued = view.queued.as_ref().with_context(|| format!("it does not wait: {view:?}"))?;
    ensure!(queued.code == code && view.status() == "queued", "it waits so: {view:?}");
    ensure!(view.outcome.is_none(), "what waits has ended: {view:?}");
    Ok(())
}

/// Kills the source's agent with its queue, and starts it. The first move ends by that, and
/// makes room.
fn restart_source(lab: &mut Lab, full: &str) -> Result<()> {
    let host = lab.host_mut("a");
    host.kill_agent()?;
    let config = config(host, full);
    host.start_agent(&config, &[])
}
