//! What one run does, drawn from its seed alone.
//!
//! ```text
//! seed ─┬ lowest bits: shape of the VM, kind of the main fault
//!       └ dice: state of the VM, speed, points, times, further faults
//! ```
//!
//! The two in the seed's bits can be chosen by a series: so shapes change only
//! now and then, and every kind has its turn, while any run can be made again
//! by its seed.

use std::fmt;

use limosa_protocol::fault::{Edge, Kind, STEPS, Side, Step};

use super::dice::Dice;

/// Bits of a seed that are the VM's shape, and above them those of the fault.
const SHAPE_BITS: u32 = 2;
const DEED_BITS: u32 = 4;
/// Longest time for which a link is cut in most runs, in milliseconds.
const SHORT_CUT_MS: u64 = 2_500;
/// Longest time for which a link is cut in the others, so that what has been
/// waiting for an answer gives up.
const LONG_CUT_MS: u64 = 16_000;
/// Time for which a guest that was stopped may stand without the other host's word, in
/// milliseconds, and a little more.
const STANDS_MS: u64 = 6_000;
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
pub(super) enum Begins {
    Running,
    Paused,
    Off,
}

/// What is done to the hosts when a point is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Deed {
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
pub(super) const DEEDS: [Deed; 1 << DEED_BITS] = [
    Deed::KillAgent,
    Deed::KillAgents,
    Deed::KillSourceQemu,
    Deed::KillDestinationQemu,
    Deed::KillQemus,
    Deed::PowerCutSource,
    Deed::PowerCutDestination,
    Deed::PowerCutBoth,
    Deed::CutCable,
    Deed::CutSilently,
    Deed::CutOneWay,
    Deed::FailStore,
    Deed::FillDisk,
    Deed::CancelAtSource,
    Deed::CancelAtDestination,
    Deed::StartSomewhere,
];

impl Deed {
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
pub(super) struct Fault {
    pub(super) deed: Deed,
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

impl Fault {
    /// The point's name, with its side.
    pub(super) fn point(&self) -> String {
        format!("{}.{}", self.step.side.as_str(), self.step.point(self.edge))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.deed.as_str(), self.point())?;
        if self.skip > 0 {
            write!(f, " (after {} times)", self.skip)?;
        }
        match self.deed {
            Deed::CutCable | Deed::CutSilently => write!(f, " for {} ms", self.lasts_ms),
            Deed::CutOneWay => write!(f, " to {} for {} ms", self.side.as_str(), self.lasts_ms),
            Deed::StartSomewhere => write!(f, " on the {}", self.side.as_str()),
            _ => Ok(()),
        }
    }
}

/// One run.
#[derive(Debug, Clone)]
pub(super) struct Draw {
    pub(super) seed: u64,
    pub(super) shape: Shape,
    pub(super) begins: Begins,
    pub(super) link_mbit: u32,
    /// All contents are compared before the commit
    pub(super) verifies_all: bool,
    /// In the order in which they are armed: the next once one has struck.
    pub(super) faults: Vec<Fault>,
}

impl fmt::Display for Draw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let begins = match self.begins {
            Begins::Running => "running",
            Begins::Paused => "paused",
            Begins::Off => "off",
        };
        let disks: Vec<_> = self.shape.disks.iter().map(|(format, _)| *format).collect();
        write!(f, "{begins}, {}, {} Mbit/s", disks.join("+"), self.link_mbit)?;
        f.write_str(if self.verifies_all { ", verifies all: " } else { ": " })?;
        let faults: Vec<_> = self.faults.iter().map(ToString::to_string).collect();
        f.write_str(&faults.join("; then "))
    }
}

/// The seed of the `index`-th run of a series: shapes change every
/// `shape_every` runs, kinds of faults with each one.
pub(super) fn seed_of(series: u64, index: u64, shape_every: u64) -> u64 {
    if index == 0 {
        return series;
    }
    let mask = (1 << (SHAPE_BITS + DEED_BITS)) - 1;
    let shape = (series + index / shape_every.max(1)) & ((1 << SHAPE_BITS) - 1);
    let deed = ((series >> SHAPE_BITS) + index) & ((1 << DEED_BITS) - 1);
    let mut dice = Dice::new(series ^ index.wrapping_mul(0x2545_f491_4f6c_dd1d));
    (dice.next() & !mask) | (deed << SHAPE_BITS) | shape
}

/// The VM of a run.
pub(super) fn shape_of(seed: u64) -> Shape {
    SHAPES[low_bits(seed, SHAPE_BITS)]
}

/// Kind of the main fault of a run.
pub(super) fn deed_of(seed: u64) -> Deed {
    DEEDS[low_bits(seed >> SHAPE_BITS, DEED_BITS)]
}

fn low_bits(seed: u64, bits: u32) -> usize {
    usize::try_from(seed & ((1 << bits) - 1)).unwrap_or(0)
}

/// Draws a run.
///
/// - `only`: part of the name of the main fault's point.
pub(super) fn draw(seed: u64, only: Option<&str>) -> Option<Draw> {
    let mut dice = Dice::new(seed);
    let shape = shape_of(seed);
    let deed = deed_of(seed);
    let begins = match dice.below(10) {
        0 => Begins::Off,
        1 => Begins::Paused,
        _ => Begins::Running,
    };
    let link_mbit = dice.one_of(&[1000, 1000, 300]);
    let verifies_all = dice.percent(VERIFIES_ALL_PERCENT);
    let can_be = |step: &Step, deed| fits(step, deed, begins) && comes(step, begins, verifies_all);
    let steps: Vec<Step> = STEPS
        .iter()
        .copied()
        .flatten()
        .filter(|step| can_be(step, deed))
        .filter(|step| only.is_none_or(|only| named(step, only)))
        .copied()
        .collect();
    let wanted = match dice.below(10) {
        0 => When::InDoubt,
        1 | 2 => When::GivenUp,
        3 => When::TriedAgain,
        _ => When::Always,
    };
    let chosen: Vec<Step> = steps.iter().filter(|step| when(step) == wanted).copied().collect();
    let chosen = if chosen.is_empty() { &steps } else { &chosen };
    if chosen.is_empty() {
        return None;
    }
    let mut main = fault(&mut dice, deed, chosen);
    if let Some(edge) = only.and_then(edge_of) {
        main.edge = edge;
    }
    let mut faults = Vec::new();
    faults.extend(provoke(&mut dice, when(&main.step), begins));
    faults.push(main);
    if dice.percent(25) {
        let again = dice.one_of(&[
            Deed::KillAgent,
            Deed::KillAgent,
            Deed::KillAgents,
            Deed::KillSourceQemu,
            Deed::KillDestinationQemu,
            Deed::PowerCutSource,
            Deed::PowerCutDestination,
            Deed::CutSilently,
            Deed::FailStore,
        ]);
        let fitting = STEPS.iter().copied().flatten().filter(|step| can_be(step, again));
        let fitting: Vec<Step> = fitting.copied().collect();
        faults.push(fault(&mut dice, again, &fitting));
    }
    Some(Draw { seed, shape, begins, link_mbit, verifies_all, faults })
}

fn named(step: &Step, only: &str) -> bool {
    [Edge::Before, Edge::After]
        .into_iter()
        .any(|edge| format!("{}.{}", step.side.as_str(), step.point(edge)).contains(only))
}

fn edge_of(only: &str) -> Option<Edge> {
    [Edge::Before, Edge::After].into_iter().find(|edge| only.ends_with(edge.as_str()))
}

fn fault(dice: &mut Dice, deed: Deed, steps: &[Step]) -> Fault {
    let step = dice.one_of(steps);
    let long = dice.percent(12);
    let times_ms = if long { LONG_CUT_MS } else { SHORT_CUT_MS };
    Fault {
        deed,
        step,
        edge: dice.one_of(&[Edge::Before, Edge::After]),
        skip: if dice.percent(85) {
            0
        } else {
            u32::try_from(1 + dice.below(SKIP_MAX)).unwrap_or(1)
        },
        lasts_ms: 100 + dice.below(times_ms),
        away_ms: dice.below(AWAY_MS),
        side: dice.one_of(&[Side::Source, Side::Destination]),
    }
}

/// When a migration comes to a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// In each one
    Always,
    /// When it is given up
    GivenUp,
    /// When its switchover is tried again although all was there
    TriedAgain,
    /// When somebody does not know how it stands
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
        (_, _, "retry") => When::TriedAgain,
        (Source, Record, "owner")
        | (Source, Qmp, "blockdev-set-active")
        | (_, Send | Answer, "ask") => When::InDoubt,
        _ => When::Always,
    }
}

/// A fault before the main one, so that its point is reached.
fn provoke(dice: &mut Dice, when: When, begins: Begins) -> Option<Fault> {
    let deed = match when {
        When::Always => return None,
        When::GivenUp => dice.one_of(&[
            Deed::CancelAtSource,
            Deed::CancelAtSource,
            Deed::CancelAtDestination,
            Deed::KillDestinationQemu,
        ]),
        When::TriedAgain => dice.one_of(&[Deed::CutCable, Deed::CutSilently, Deed::CutOneWay]),
        When::InDoubt => dice.one_of(&[
            Deed::KillAgent,
            Deed::PowerCutDestination,
            Deed::KillDestinationQemu,
            Deed::CutSilently,
        ]),
    };
    let before_commit = |step: &&Step| match when {
        When::TriedAgain => matches!(
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
        .filter(|step| fits(step, deed, begins))
        .copied()
        .collect();
    let mut first = fault(dice, deed, &fitting);
    first.skip = 0;
    if when == When::TriedAgain {
        first.lasts_ms = STANDS_MS + dice.below(LONG_CUT_MS / 2);
    }
    Some(first)
}

/// Whether such a move comes to a step, or does after faults that are drawn here.
fn comes(step: &Step, begins: Begins, verifies_all: bool) -> bool {
    let is_all = verifies_all || step.name != "verify";
    // What gives way to an operator's decision is the matter of scenarios.
    let is_given_way = step.name == "superseded" || (step.kind == Kind::Qmp && step.name == "stop");
    let launches_here = step.side == Side::Source && step.name == "launch";
    // A guest that runs takes its disks by that.
    let takes_disks = step.side == Side::Destination && step.name == "blockdev-set-active";
    is_all
        && !is_given_way
        && (begins == Begins::Running || step.name != "retry")
        && (!launches_here || begins == Begins::Off)
        && (!takes_disks || begins == Begins::Paused)
}

/// Whether a deed means something at a step, for such a VM.
fn fits(step: &Step, deed: Deed, begins: Begins) -> bool {
    let without_guest = begins == Begins::Off
        && step.kind == Kind::Qmp
        && (step.name.starts_with("migrate") || matches!(step.name, "cont" | "announce-self"));
    let fits = match deed {
        Deed::FailStore => step.kind == Kind::Record,
        // Later its guest runs there, and would have to live with it.
        Deed::FillDisk => {
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
                    let drawn = draw(seed, None).unwrap();
                    assert_eq!(drawn.to_string(), draw(seed, None).unwrap().to_string());
                    DEEDS[usize::try_from((seed >> SHAPE_BITS) & 15).unwrap()]
                })
                .collect();
            assert_eq!(kinds.len(), DEEDS.len());
        }
    }

    /// Goal: a point that is asked for is the one that is drawn.
    #[test]
    fn a_wanted_point_is_drawn() {
        for seed in 0..200 {
            let Some(drawn) = draw(seed, Some("source.record.handed-over.after")) else { continue };
            let hit =
                drawn.faults.iter().any(|fault| fault.point() == "source.record.handed-over.after");
            assert!(hit, "{drawn}");
        }
        assert!(draw(0, Some("no.such.point")).is_none());
    }
}
