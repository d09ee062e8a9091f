//! A host that restarts right after each record: which host has the VM then.
//!
//! ```text
//! record is durable ─► its agent is held ─► power cut: source │ destination │ both
//!                          ─► boot ─► settled ─► oracle, and the place that is promised
//! ```
//!
//! The table is that of `docs/handover.md`, "Every failure and its end". Who may
//! start the VM anew is judged as after every run: its owner may, the other is refused.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use limosa_faults::{Edge, Kind};

use crate::faults::steps::{STEPS, Side, Step};
use limosa_protocol::migration::Outcome;

use super::plan::{Fault, Initial, Injection, Plan, shape_of};
use super::run_one;
use super::setup::Setup;
use super::tally::Tally;
use crate::harness::lab::Lab;
use crate::harness::points::wait;
use crate::print_line;

/// How long hosts stay off, in milliseconds; chaos draws longer times.
const AWAY_MS: u64 = 300;
/// Speed of the link, in Mbit/s.
const LINK_MBIT: u32 = 1000;
const POWER_CUTS: [Fault; 3] =
    [Fault::PowerCutSource, Fault::PowerCutDestination, Fault::PowerCutBoth];

/// Where the VM is after a restart of hosts, and whether its guest goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    SourceOn,
    SourceOff,
    DestinationOn,
    DestinationOff,
}

use End::{DestinationOff, DestinationOn, SourceOff, SourceOn};

/// A record, and its ends after a restart of the source's host, of the
/// destination's, and of both.
struct Row(Side, &'static str, [End; 3]);

const ROWS: [Row; 8] = [
    // The destination was told of nothing yet: its restart is a link that comes back.
    Row(Side::Source, "offered", [SourceOff, DestinationOn, SourceOff]),
    Row(Side::Destination, "preparing", [SourceOff, SourceOn, SourceOff]),
    Row(Side::Destination, "declined", [SourceOff, SourceOn, SourceOff]),
    Row(Side::Destination, "ready", [SourceOff, SourceOn, SourceOff]),
    Row(Side::Source, "handed-over", [DestinationOn, SourceOn, SourceOff]),
    // Taken back: before that, the destination restarted and lost the guest's memory.
    Row(Side::Source, "owner", [SourceOff, SourceOn, SourceOff]),
    Row(Side::Destination, "owner", [DestinationOn, DestinationOff, DestinationOff]),
    Row(Side::Source, "done", [DestinationOn, DestinationOff, DestinationOff]),
];

/// All rows, one after the other, with one VM that goes on from where it is.
pub(crate) fn scenario(lab: &mut Lab) -> Result<()> {
    let mut tally = Tally::default();
    let mut setup = Setup::start_agents(lab, shape_of(0), 0)?;
    for Row(side, record, ends) in &ROWS {
        for (fault, end) in POWER_CUTS.into_iter().zip(ends) {
            let started = Instant::now();
            let plan = planned(*side, record, fault)?;
            let source = setup.at;
            let found = reboot(&mut setup, &plan, *end, source, &mut tally);
            let what = format!("{} after {} {record}", fault.as_str(), side.as_str());
            found.with_context(|| format!("{what}: expected {end:?}"))?;
            print_line(&format!("  {:>5.1} s  {what}: {end:?}", started.elapsed().as_secs_f64()));
        }
    }
    Ok(())
}

fn reboot(
    setup: &mut Setup<'_>,
    plan: &Plan,
    end: End,
    source: usize,
    tally: &mut Tally,
) -> Result<()> {
    let ended = run_one(setup, plan, tally)?;
    ensure!(ended.seen.struck.iter().all(|struck| *struck), "its point was not reached");
    let is_at_source = setup.at == source;
    let found = match (is_at_source, ended.was_off) {
        (true, false) => SourceOn,
        (true, true) => SourceOff,
        (false, false) => DestinationOn,
        (false, true) => DestinationOff,
    };
    ensure!(found == end, "it ended {found:?}, told as {:?}", ended.seen.told);
    let expected = if is_at_source { Outcome::Stayed } else { Outcome::Moved };
    wait("the source's telling it", || {
        let told = setup.migrations(source)?.last().and_then(|last| last.outcome);
        Ok((told == Some(expected)).then_some(()))
    })
}

/// A run in which hosts restart once that record is durable.
fn planned(side: Side, record: &str, fault: Fault) -> Result<Plan> {
    let mut injections = Vec::new();
    if record == "declined" {
        injections
            .push(injection(find(Side::Source, Kind::Send, "receive")?, Fault::CancelAtSource));
    }
    if (side, record) == (Side::Source, "owner") {
        let handed_over = find(Side::Source, Kind::Record, "handed-over")?;
        injections.push(injection(handed_over, Fault::PowerCutDestination));
    }
    injections.push(injection(find(side, Kind::Record, record)?, fault));
    Ok(Plan {
        seed: 0,
        shape: shape_of(0),
        initial: Initial::Running,
        link_mbit: LINK_MBIT,
        verifies_all: false,
        injections,
    })
}

fn find(side: Side, kind: Kind, name: &str) -> Result<Step> {
    let mut steps = STEPS.iter().copied().flatten().copied();
    steps
        .find(|step| (step.side, step.kind, step.name) == (side, kind, name))
        .with_context(|| format!("{} {name} is not listed", kind.as_str()))
}

fn injection(step: Step, fault: Fault) -> Injection {
    Injection {
        fault,
        step,
        edge: Edge::After,
        skip: 0,
        lasts_ms: 0,
        away_ms: AWAY_MS,
        side: step.side,
    }
}
