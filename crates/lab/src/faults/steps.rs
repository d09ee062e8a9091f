//! The fault points of a migration: those of messages follow from the table of messages, those
//! of records, QMP commands and the host are listed here.
//!
//! The scenario `points-are-listed` holds the list against what agents pass, both ways.

use limosa_faults::{Edge, Kind};
use limosa_protocol::peer::Message;

/// Which half of a migration comes to a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Side {
    /// The host that gives the VM
    Source,
    /// The host that takes it
    Destination,
}

impl Side {
    /// Its name.
    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// A step with a point at each of its edges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Step {
    /// Who comes to it
    pub(crate) side: Side,
    /// What it is
    pub(crate) kind: Kind,
    /// Its name among those of its kind
    pub(crate) name: &'static str,
}

impl Step {
    /// The name of one of its points, as agents know it: without the side.
    #[must_use]
    pub(crate) fn point(&self, edge: Edge) -> String {
        format!("{}.{}.{}", self.kind.as_str(), self.name, edge.as_str())
    }

    /// Whether no move comes to it in which nothing else fails than its link, not
    /// even one that is cancelled.
    #[must_use]
    pub(crate) fn needs_fault(&self) -> bool {
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
const DESTINATION_HOST_STEPS: &[Step] = &steps(Side::Destination, Kind::Host, ["launch", "remove"]);
const SOURCE_HOST_STEPS: &[Step] = &steps(Side::Source, Kind::Host, ["launch", "remove"]);

/// All steps of a migration, also of one that is given up.
pub(crate) const STEPS: &[&[Step]] = &[
    SOURCE_RECORDS,
    DESTINATION_RECORDS,
    SOURCE_SENDS,
    DESTINATION_SENDS,
    SOURCE_ANSWERS,
    DESTINATION_ANSWERS,
    SOURCE_COMMANDS,
    DESTINATION_COMMANDS,
    SOURCE_HOST_STEPS,
    DESTINATION_HOST_STEPS,
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

#[cfg(test)]
mod tests {
    use super::*;

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
