//! The points at which an agent can be made to fail, for tests of recovery.
//!
//! ```text
//! test: file `armed` ─► agent comes to the point ─► file `reached-POINT` ─► it dies, waits, fails
//! ```
//!
//! An agent looks for them only when [`FOLDER_VARIABLE`] was set at its start.
//! A point is named `KIND.NAME.EDGE`, such as `record.handed-over.after`; the
//! list adds the side at which a migration comes to it, though not in each one:
//! `source.record.handed-over.after`.
//!
//! A folder with a file `trace` gets the name of each point that is passed, a line
//! for each: so the list is held against what agents do.
//!
//! **Invariants.** One point is armed at a time; reaching it disarms it, because
//! `armed` becomes `reached-POINT` by a rename. Nobody waits at a point longer than
//! [`HOLD_MS_MAX`].

use crate::peer::Message;

/// Environment variable that names the folder of the two files.
pub const FOLDER_VARIABLE: &str = "LIMOSA_FAULT";
/// File in which a test arms one point: one [`Armed`] as text.
pub const ARMED_FILE: &str = "armed";
/// Beginning of what the file becomes when its point is reached, before the
/// point's name. Whoever holds there goes on once it is removed.
pub const REACHED_PREFIX: &str = "reached-";
/// File to which each point that is passed is added, when it is there.
pub const TRACE_FILE: &str = "trace";
/// Longest time that anybody holds at a point, in milliseconds.
pub const HOLD_MS_MAX: u64 = 60_000;

/// Which half of a migration comes to a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// The host that gives the VM
    Source,
    /// The host that takes it
    Destination,
}

impl Side {
    /// Its name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// What is done between the two edges of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A record of the handover is written and synced
    Record,
    /// A message to the other host, from asking to having its answer
    Send,
    /// A message from the other host is worked on, from knowing it to answering
    Answer,
    /// A command to QEMU, from giving it to having its answer
    Qmp,
    /// Something else on this host
    Host,
}

impl Kind {
    /// Its name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Record => "record",
            Self::Send => "send",
            Self::Answer => "answer",
            Self::Qmp => "qmp",
            Self::Host => "host",
        }
    }
}

/// Which end of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Edge {
    /// Nothing of it is done yet
    Before,
    /// It is done, well or not, and nobody was told
    After,
}

impl Edge {
    /// Its name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::After => "after",
        }
    }
}

/// A step with a point at each of its edges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Who comes to it
    pub side: Side,
    /// What it is
    pub kind: Kind,
    /// Its name among those of its kind
    pub name: &'static str,
}

impl Step {
    /// The name of one of its points, as agents know it.
    #[must_use]
    pub fn point(&self, edge: Edge) -> String {
        format!("{}.{}.{}", self.kind.as_str(), self.name, edge.as_str())
    }

    /// Whether no move comes to it in which nothing else fails than its link, not
    /// even one that is cancelled.
    #[must_use]
    pub fn needs_fault(&self) -> bool {
        NEED_FAULT.contains(&(self.side, self.kind, self.name))
    }
}

const fn steps<const N: usize>(side: Side, kind: Kind, names: [&'static str; N]) -> [Step; N] {
    let mut all = [Step { side, kind, name: "" }; N];
    let mut at = 0;
    while at < N {
        all[at].name = names[at];
        at += 1;
    }
    all
}

/// What a source sends: all its messages, and the hello of a data connection.
const FROM_SOURCE: [&str; Message::OF_SOURCE.len() + 1] = {
    let mut names = ["channel"; Message::OF_SOURCE.len() + 1];
    let mut at = 0;
    while at < Message::OF_SOURCE.len() {
        names[at] = Message::OF_SOURCE[at].name;
        at += 1;
    }
    names
};

const SOURCE_RECORDS: &[Step] = &steps(
    Side::Source,
    Kind::Record,
    ["offered", "handed-over", "owner", "done", "stayed", "superseded"],
);
const DESTINATION_RECORDS: &[Step] = &steps(
    Side::Destination,
    Kind::Record,
    ["preparing", "ready", "owner", "declined", "done", "stayed", "superseded"],
);
const SOURCE_SENDS: &[Step] = &steps(Side::Source, Kind::Send, FROM_SOURCE);
const DESTINATION_SENDS: &[Step] = &steps(Side::Destination, Kind::Send, [Message::DECISION.name]);
const DESTINATION_ANSWERS: &[Step] = &steps(Side::Destination, Kind::Answer, FROM_SOURCE);
const SOURCE_ANSWERS: &[Step] = &steps(Side::Source, Kind::Answer, [Message::DECISION.name]);
const SOURCE_COMMANDS: &[Step] = &steps(
    Side::Source,
    Kind::Qmp,
    [
        "blockdev-add",
        "blockdev-mirror",
        "migrate-set-capabilities",
        "migrate-set-parameters",
        "migrate",
        "block-job-cancel",
        "migrate-continue",
        "migrate_cancel",
        "blockdev-del",
        "blockdev-set-active",
        "cont",
        "stop",
        "announce-self",
        "quit",
    ],
);
const DESTINATION_COMMANDS: &[Step] = &steps(
    Side::Destination,
    Kind::Qmp,
    [
        "nbd-server-start",
        "block-export-add",
        "migrate-set-capabilities",
        "migrate-set-parameters",
        "migrate-incoming",
        "nbd-server-stop",
        "blockdev-set-active",
        "cont",
        "stop",
        "announce-self",
        "quit",
    ],
);
const DESTINATION_DEEDS: &[Step] = &steps(Side::Destination, Kind::Host, ["launch", "remove"]);
const SOURCE_DEEDS: &[Step] = &steps(Side::Source, Kind::Host, ["launch", "remove"]);

/// All steps of a migration, also of one that is given up.
pub const STEPS: &[&[Step]] = &[
    SOURCE_RECORDS,
    DESTINATION_RECORDS,
    SOURCE_SENDS,
    DESTINATION_SENDS,
    SOURCE_ANSWERS,
    DESTINATION_ANSWERS,
    SOURCE_COMMANDS,
    DESTINATION_COMMANDS,
    SOURCE_DEEDS,
    DESTINATION_DEEDS,
];

/// Steps to which a migration comes only after another fault.
const NEED_FAULT: &[(Side, Kind, &str)] = &[
    (Side::Source, Kind::Record, "owner"),
    (Side::Source, Kind::Record, "superseded"),
    (Side::Destination, Kind::Record, "superseded"),
    (Side::Source, Kind::Qmp, "blockdev-set-active"),
    (Side::Source, Kind::Qmp, "stop"),
    (Side::Destination, Kind::Qmp, "stop"),
];

/// What an agent does at an armed point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// The process kills itself, as a crash would
    Kill,
    /// The task waits, everything else goes on
    Hold,
    /// The write fails; means something at records alone
    FailStore,
}

impl Action {
    /// Its name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Hold => "hold",
            Self::FailStore => "fail-store",
        }
    }
}

/// What the file [`ARMED_FILE`] says: `POINT ACTION SKIP`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Armed {
    /// See [`Step::point`]
    pub point: String,
    /// What is done there
    pub action: Action,
    /// How often the point is passed before
    pub skip: u32,
}

impl Armed {
    /// Reads it; `None` when it is not one.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split_whitespace();
        let point = parts.next()?.to_owned();
        let name = parts.next()?;
        let all = [Action::Kill, Action::Hold, Action::FailStore];
        let action = all.into_iter().find(|action| action.as_str() == name)?;
        let skip = parts.next()?.parse().ok()?;
        parts.next().is_none().then_some(Self { point, action, skip })
    }
}

impl std::fmt::Display for Armed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.point, self.action.as_str(), self.skip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: what a test arms is what an agent reads, and half of it is nothing.
    #[test]
    fn armed_points_are_read_as_written() {
        let step = STEPS[0][1];
        let armed = Armed { point: step.point(Edge::After), action: Action::FailStore, skip: 2 };
        let text = armed.to_string();
        assert_eq!(text, "record.handed-over.after fail-store 2");
        assert_eq!(Armed::parse(&text), Some(armed));
        for bad in ["", "record.x.before", "record.x.before kill", "record.x.before burn 0"] {
            assert_eq!(Armed::parse(bad), None, "{bad}");
        }
    }

    /// Goal: a name means one step, or a test would arm another than it says.
    #[test]
    fn no_step_is_listed_twice() {
        let mut seen = std::collections::BTreeSet::new();
        for step in STEPS.iter().copied().flatten() {
            assert!(!step.name.is_empty());
            assert!(seen.insert((step.side, step.kind, step.name)), "{step:?}");
        }
    }
}
