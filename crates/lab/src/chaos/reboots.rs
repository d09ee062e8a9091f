//! A host that restarts right after each record: which host has the VM then.
//!
//! ```text
//! record is durable ─► its agent is held ─► power cut: source │ destination │ both
//!                          ─► boot ─► settled ─► judge, and the place that is promised
//! ```
//!
//! The table is that of `docs/handover.md`, "Every failure and its end". Who may
//! start the VM anew is judged as after every run: its owner may, the other is refused.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use limosa_protocol::fault::{Edge, Kind, STEPS, Side, Step};
use limosa_protocol::migration::Outcome;

use super::draw::{Begins, Deed, Draw, Fault, shape_of};
use super::run_one;
use super::stage::Stage;
use super::tally::Tally;
use crate::lab::Lab;
use crate::print_line;
use crate::scenario::points::wait;

/// How long hosts stay off, in milliseconds; chaos draws longer times.
const AWAY_MS: u64 = 300;
/// Speed of the link, in Mbit/s.
const LINK_MBIT: u32 = 1000;
const POWER_CUTS: [Deed; 3] = [Deed::PowerCutSource, Deed::PowerCutDestination, Deed::PowerCutBoth];

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
    let mut stage = Stage::set(lab, shape_of(0), 0)?;
    for Row(side, record, ends) in &ROWS {
        for (deed, end) in POWER_CUTS.into_iter().zip(ends) {
            let started = Instant::now();
            let draw = drawn(*side, record, deed)?;
            let source = stage.at;
            let found = reboot(&mut stage, &draw, *end, source, &mut tally);
            let what = format!("{} after {} {record}", deed.as_str(), side.as_str());
            found.with_context(|| format!("{what}: expected {end:?}"))?;
            print_line(&format!("  {:>5.1} s  {what}: {end:?}", started.elapsed().as_secs_f64()));
        }
    }
    Ok(())
}

fn reboot(
    stage: &mut Stage<'_>,
    draw: &Draw,
    end: End,
    source: usize,
    tally: &mut Tally,
) -> Result<()> {
    let ended = run_one(stage, draw, tally)?;
    ensure!(ended.seen.struck.iter().all(|struck| *struck), "its point was not reached");
    let is_at_source = stage.at == source;
    let found = match (is_at_source, ended.was_off) {
        (true, false) => SourceOn,
        (true, true) => SourceOff,
        (false, false) => DestinationOn,
        (false, true) => DestinationOff,
    };
    ensure!(found == end, "it ended {found:?}, told as {:?}", ended.seen.told);
    let expected = if is_at_source { Outcome::Stayed } else { Outcome::Moved };
    wait("the source's telling it", || {
        let told = stage.migrations(source)?.last().and_then(|last| last.outcome);
        Ok((told == Some(expected)).then_some(()))
    })
}

/// A run in which hosts restart once that record is durable.
fn drawn(side: Side, record: &str, deed: Deed) -> Result<Draw> {
    let mut faults = Vec::new();
    if record == "declined" {
        faults.push(fault(find(Side::Source, Kind::Send, "receive")?, Deed::CancelAtSource));
    }
    if (side, record) == (Side::Source, "owner") {
        let handed_over = find(Side::Source, Kind::Record, "handed-over")?;
        faults.push(fault(handed_over, Deed::PowerCutDestination));
    }
    faults.push(fault(find(side, Kind::Record, record)?, deed));
    Ok(Draw {
        seed: 0,
        shape: shape_of(0),
        begins: Begins::Running,
        link_mbit: LINK_MBIT,
        verifies_all: false,
        faults,
    })
}

fn find(side: Side, kind: Kind, name: &str) -> Result<Step> {
    let mut steps = STEPS.iter().copied().flatten().copied();
    steps
        .find(|step| (step.side, step.kind, step.name) == (side, kind, name))
        .with_context(|| format!("{} {name} is not listed", kind.as_str()))
}

fn fault(step: Step, deed: Deed) -> Fault {
    Fault { deed, step, edge: Edge::After, skip: 0, lasts_ms: 0, away_ms: AWAY_MS, side: step.side }
}
