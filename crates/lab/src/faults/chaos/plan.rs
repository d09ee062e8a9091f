//! What one run does, drawn from its seed alone.
//!
//! ```text
//! seed ─┬ lowest bits: shape of the VM, kind of the main fault
//!       └ rng:  state of the VM, speed, points, times, further faults
//! ```
//!
//! A series chooses shape and kind by the seed's bits: shapes change only now and
//! then, every kind has its turn, and any run can be repeated by its seed.

use std::fmt;

use limosa_faults::{Edge, Kind};

use crate::faults::steps::{STEPS, Side, Step};

use super::rng::{Rng, one_of, percent};

/// Bits of a seed that are the VM's shape, and above them those of the fault.
const SHAPE_BITS: u32 = 2;
const FAULT_BITS: u32 = 4;
/// Longest time for which a link is cut in most runs, in milliseconds.
const SHORT_CUT_MS: u64 = 2_500;
/// Longest time for which a link is cut in the others, so that what has been
/// waiting for an answer gives up.
const LONG_CUT_MS: u64 = 16_000;
/// A little more than the time for which a guest may be paused while the peer does not
/// answer, in milliseconds.
const PAUSED_MS: u64 = 6_000;
/// Longest time for which a dead agent stays away.
const AWAY_MS: u64 = 2_000;
/// How many of a hundred runs compare all contents before the commit.
const VERIFIES_ALL_PERCENT: u64 = 20;
/// Most times that a point is passed before it counts.
const SKIP_MAX: u64 = 3;

/// A VM's disks, by format and MiB, and how much memory it dirties.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) disks: &'static [(&'static str, u64)],
    pub(super) dirty_mb_s: u32,
}

const SHAPES: [Shape; 1 << SHAPE_BITS] = [
    Shape { disks: &[("qcow2", 64)], dirty_mb_s: 10 },
    Shape { disks: &[("raw", 64)], dirty_mb_s: 30 },
    Shape { disks: &[("raw", 48), ("qcow2", 64)], dirty_mb_s: 20 },
    Shape { disks: &[("qcow2", 64), ("qcow2", 48)], dirty_mb_s: 5 },
];

/// State of the VM when it is asked to move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Initial {
    Running,
    Paused,
    Off,
}

/// What is done to the hosts when a point is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    KillAgent,
    KillAgents,
    KillSourceQemu,
    KillDestinationQemu,
    KillQemus,
    PowerCutSource,
    PowerCutDestination,
    PowerCutBoth,
    CutCable,
    CutSilently,
    CutOneWay,
    FailStore,
    FillDisk,
    CancelAtSource,
    CancelAtDestination,
    StartSomewhere,
}

/// All of them, in the order of their numbers in seeds.
pub(super) const FAULTS: [Fault; 1 << FAULT_BITS] = [
    Fault::KillAgent,
    Fault::KillAgents,
    Fault::KillSourceQemu,
    Fault::KillDestinationQemu,
    Fault::KillQemus,
    Fault::PowerCutSource,
    Fault::PowerCutDestination,
    Fault::PowerCutBoth,
    Fault::CutCable,
    Fault::CutSilently,
    Fault::CutOneWay,
    Fault::FailStore,
    Fault::FillDisk,
    Fault::CancelAtSource,
    Fault::CancelAtDestination,
    Fault::StartSomewhere,
];

impl Fault {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::KillAgent => "agent killed",
            Self::KillAgents => "both agents killed",
            Self::KillSourceQemu => "source's QEMU killed",
            Self::KillDestinationQemu => "destination's QEMU killed",
            Self::KillQemus => "both QEMUs killed",
            Self::PowerCutSource => "source's power cut",
            Self::PowerCutDestination => "destination's power cut",
            Self::PowerCutBoth => "both hosts' power cut",
            Self::CutCable => "link out",
            Self::CutSilently => "link silent",
            Self::CutOneWay => "link silent one way",
            Self::FailStore => "store fails",
            Self::FillDisk => "destination's disk full",
            Self::CancelAtSource => "cancelled at source",
            Self::CancelAtDestination => "cancelled at destination",
            Self::StartSomewhere => "operator starts the VM",
        }
    }
}

/// One fault, and where it strikes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Injection {
    pub(super) fault: Fault,
    pub(super) step: Step,
    pub(super) edge: Edge,
    /// How often the point is passed before
    pub(super) skip: u32,
    /// How long the link is cut, in milliseconds
    pub(super) lasts_ms: u64,
    /// How long dead agents stay away, in milliseconds
    pub(super) away_ms: u64,
    /// The side at which an operator starts the VM, or to which frames are lost
    pub(super) side: Side,
}

impl Injection {
    /// The point's name, with its side.
    pub(super) fn point(&self) -> String {
        format!("{}.{}", self.step.side.as_str(), self.step.point(self.edge))
    }
}

impl fmt::Display for Injection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.fault.as_str(), self.point())?;
        if self.skip > 0 {
            write!(f, " (after {} times)", self.skip)?;
        }
        match self.fault {
            Fault::CutCable | Fault::CutSilently => write!(f, " for {} ms", self.lasts_ms),
            Fault::CutOneWay => write!(f, " to {} for {} ms", self.side.as_str(), self.lasts_ms),
            Fault::StartSomewhere => write!(f, " on the {}", self.side.as_str()),
            _ => Ok(()),
        }
    }
}

/// One run.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) seed: u64,
    pub(super) shape: Shape,
    pub(super) initial: Initial,
    pub(super) link_mbit: u32,
    /// All contents are compared before the commit
    pub(super) verifies_all: bool,
    /// In the order in which they are armed: the next once one has struck.
    pub(super) injections: Vec<Injection>,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let initial = match self.initial {
            Initial::Running => "running",
            Initial::Paused => "paused",
            Initial::Off => "off",
        };
        let disks: Vec<_> = self.shape.disks.iter().map(|(format, _)| *format).collect();
        write!(f, "{initial}, {}, {} Mbit/s", disks.join("+"), self.link_mbit)?;
        f.write_str(if self.verifies_all { ", verifies all: " } else { ": " })?;
        let injections: Vec<_> = self.injections.iter().map(ToString::to_string).collect();
        f.write_str(&injections.join("; then "))
    }
}

/// The seed of the `index`-th run of a series: shapes change every
/// `shape_every` runs, kinds of faults with each one.
pub(super) fn seed_of(series: u64, index: u64, shape_every: u64) -> u64 {
    if index == 0 {
        return series;
    }
    let mask = (1 << (SHAPE_BITS + FAULT_BITS)) - 1;
    let shape = (series + index / shape_every.max(1)) & ((1 << SHAPE_BITS) - 1);
    let fault = ((series >> SHAPE_BITS) + index) & ((1 << FAULT_BITS) - 1);
    let mut rng = Rng::with_seed(series ^ index.wrapping_mul(0x2545_f491_4f6c_dd1d));
    (rng.u64(..) & !mask) | (fault << SHAPE_BITS) | shape
}

/// The VM of a run.
pub(super) fn shape_of(seed: u64) -> Shape {
    SHAPES[low_bits(seed, SHAPE_BITS)]
}

/// Kind of the main fault of a run.
pub(super) fn fault_of(seed: u64) -> Fault {
    FAULTS[low_bits(seed >> SHAPE_BITS, FAULT_BITS)]
}

fn low_bits(seed: u64, bits: u32) -> usize {
    usize::try_from(seed & ((1 << bits) - 1)).unwrap_or(0)
}

/// Draws a run.
///
/// - `only`: part of the name of the main fault's point.
pub(super) fn draw(seed: u64, only: Option<&str>) -> Option<Plan> {
    let mut rng = Rng::with_seed(seed);
    let shape = shape_of(seed);
    let fault = fault_of(seed);
    let initial = match rng.u64(..10) {
        0 => Initial::Off,
        1 => Initial::Paused,
        _ => Initial::Running,
    };
    let link_mbit = one_of(&mut rng, &[1000, 1000, 300]);
    let verifies_all = percent(&mut rng, VERIFIES_ALL_PERCENT);
    let can_be =
        |step: &Step, fault| fits(step, fault, initial) && comes(step, initial, verifies_all);
    let steps: Vec<Step> = STEPS
        .iter()
        .copied()
        .flatten()
        .filter(|step| can_be(step, fault))
        .filter(|step| only.is_none_or(|only| named(step, only)))
        .copied()
        .collect();
    let wanted = match rng.u64(..10) {
        0 => When::InDoubt,
        1 | 2 => When::GivenUp,
        3 => When::Retried,
        _ => When::Always,
    };
    let chosen: Vec<Step> = steps.iter().filter(|step| when(step) == wanted).copied().collect();
    let chosen = if chosen.is_empty() { &steps } else { &chosen };
    if chosen.is_empty() {
        return None;
    }
    let mut main = injection(&mut rng, fault, chosen);
    if let Some(edge) = only.and_then(edge_of) {
        main.edge = edge;
    }
    let mut injections = Vec::new();
    injections.extend(provoke(&mut rng, when(&main.step), initial));
    injections.push(main);
    if percent(&mut rng, 25) {
        let second = one_of(
            &mut rng,
            &[
                Fault::KillAgent,
                Fault::KillAgent,
                Fault::KillAgents,
                Fault::KillSourceQemu,
                Fault::KillDestinationQemu,
                Fault::PowerCutSource,
                Fault::PowerCutDestination,
                Fault::CutSilently,
                Fault::FailStore,
            ],
        );
        let fitting = STEPS.iter().copied().flatten().filter(|step| can_be(step, second));
        let fitting: Vec<Step> = fitting.copied().collect();
        injections.push(injection(&mut rng, second, &fitting));
    }
    Some(Plan { seed, shape, initial, link_mbit, verifies_all, injections })
}

fn named(step: &Step, only: &str) -> bool {
    [Edge::Before, Edge::After]
        .into_iter()
        .any(|edge| format!("{}.{}", step.side.as_str(), step.point(edge)).contains(only))
}

fn edge_of(only: &str) -> Option<Edge> {
    [Edge::Before, Edge::After].into_iter().find(|edge| only.ends_with(edge.as_str()))
}

fn injection(rng: &mut Rng, fault: Fault, steps: &[Step]) -> Injection {
    let step = one_of(rng, steps);
    let long = percent(rng, 12);
    let times_ms = if long { LONG_CUT_MS } else { SHORT_CUT_MS };
    Injection {
        fault,
        step,
        edge: one_of(rng, &[Edge::Before, Edge::After]),
        skip: if percent(rng, 85) {
            0
        } else {
            u32::try_from(1 + rng.u64(..SKIP_MAX)).unwrap_or(1)
        },
        lasts_ms: 100 + rng.u64(..times_ms),
        away_ms: rng.u64(..AWAY_MS),
        side: one_of(rng, &[Side::Source, Side::Destination]),
    }
}

/// When a migration comes to a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// In each one
    Always,
    /// When it is given up
    GivenUp,
    /// When its switchover is retried although all data was transferred
    Retried,
    /// When a host is in doubt
    InDoubt,
}

fn when(step: &Step) -> When {
    use Kind::{Answer, Host, Qmp, Record, Send};
    use Side::{Destination, Source};
    match (step.side, step.kind, step.name) {
        (_, Record, "stayed")
        | (_, _, "stays")
        | (Source, Qmp, "migrate_cancel" | "cont" | "announce-self")
        | (Destination, Record, "declined")
        | (Destination, Qmp, "quit")
        | (Destination, Host, "remove") => When::GivenUp,
        (_, _, "retry") => When::Retried,
        (Source, Record, "owner")
        | (Source, Qmp, "blockdev-set-active")
        | (_, Send | Answer, "ask") => When::InDoubt,
        _ => When::Always,
    }
}

/// A fault before the main one, so that its point is reached.
fn provoke(rng: &mut Rng, when: When, initial: Initial) -> Option<Injection> {
    let fault = match when {
        When::Always => return None,
        When::GivenUp => one_of(
            rng,
            &[
                Fault::CancelAtSource,
                Fault::CancelAtSource,
                Fault::CancelAtDestination,
                Fault::KillDestinationQemu,
            ],
        ),
        When::Retried => one_of(rng, &[Fault::CutCable, Fault::CutSilently, Fault::CutOneWay]),
        When::InDoubt => one_of(
            rng,
            &[
                Fault::KillAgent,
                Fault::PowerCutDestination,
                Fault::KillDestinationQemu,
                Fault::CutSilently,
            ],
        ),
    };
    let before_commit = |step: &&Step| match when {
        When::Retried => matches!(
            (step.side, step.kind, step.name),
            (Side::Source, Kind::Send, "ready")
                | (Side::Destination, Kind::Answer, "ready")
                | (Side::Destination, Kind::Record, "ready")
        ),
        When::InDoubt => matches!(
            (step.side, step.kind, step.name),
            (Side::Source, Kind::Record, "handed-over")
                | (Side::Source, Kind::Send, "commit")
                | (Side::Destination, Kind::Record, "ready")
        ),
        _ => matches!(
            (step.side, step.kind, step.name),
            (Side::Source, Kind::Send, "receive" | "channel" | "ready")
                | (Side::Source, Kind::Qmp, "blockdev-mirror" | "migrate" | "block-job-cancel")
                | (Side::Destination, Kind::Qmp, "nbd-server-stop")
        ),
    };
    let fitting: Vec<Step> = STEPS
        .iter()
        .copied()
        .flatten()
        .filter(before_commit)
        .filter(|step| fits(step, fault, initial))
        .copied()
        .collect();
    let mut first = injection(rng, fault, &fitting);
    first.skip = 0;
    if when == When::Retried {
        first.lasts_ms = PAUSED_MS + rng.u64(..LONG_CUT_MS / 2);
    }
    Some(first)
}

/// Whether such a move comes to a step, or does after faults that are drawn here.
fn comes(step: &Step, initial: Initial, verifies_all: bool) -> bool {
    let is_all = verifies_all || step.name != "verify";
    // What gives way to an operator's decision is the matter of scenarios.
    let is_given_way = step.name == "superseded" || (step.kind == Kind::Qmp && step.name == "stop");
    let launches_here = step.side == Side::Source && step.name == "launch";
    // A guest that runs takes its disks by that.
    let takes_disks = step.side == Side::Destination && step.name == "blockdev-set-active";
    is_all
        && !is_given_way
        && (initial == Initial::Running || step.name != "retry")
        && (!launches_here || initial == Initial::Off)
        && (!takes_disks || initial == Initial::Paused)
}

/// Whether a fault means something at a step, for such a VM.
fn fits(step: &Step, fault: Fault, initial: Initial) -> bool {
    let without_guest = initial == Initial::Off
        && step.kind == Kind::Qmp
        && (step.name.starts_with("migrate") || matches!(step.name, "cont" | "announce-self"));
    let fits = match fault {
        Fault::FailStore => step.kind == Kind::Record,
        // Later its guest runs there, and would have to live with it.
        Fault::FillDisk => {
            step.side == Side::Destination
                && matches!(
                    (step.kind, step.name),
                    (Kind::Record, "preparing")
                        | (Kind::Answer, "offer" | "file" | "receive")
                        | (Kind::Qmp, "nbd-server-start" | "block-export-add")
                        | (Kind::Host, "launch")
                )
        }
        _ => true,
    };
    fits && !without_guest
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a seed always means the same run, and a series gives every kind of
    /// fault its turn.
    #[test]
    fn runs_follow_from_seeds() {
        for series in [0, 1, 77, u64::MAX] {
            let kinds: std::collections::BTreeSet<_> = (0..16)
                .map(|index| {
                    let seed = seed_of(series, index, 20);
                    let planned = draw(seed, None).unwrap();
                    assert_eq!(planned.to_string(), draw(seed, None).unwrap().to_string());
                    FAULTS[usize::try_from((seed >> SHAPE_BITS) & 15).unwrap()]
                })
                .collect();
            assert_eq!(kinds.len(), FAULTS.len());
        }
    }

    /// Goal: a point that is asked for is the one that is drawn.
    #[test]
    fn a_wanted_point_is_drawn() {
        for seed in 0..200 {
            let Some(planned) = draw(seed, Some("source.record.handed-over.after")) else {
                continue;
            };
            let hit = planned
                .injections
                .iter()
                .any(|injection| injection.point() == "source.record.handed-over.after");
            assert!(hit, "{planned}");
        }
        assert!(draw(0, Some("no.such.point")).is_none());
    }
}
