//! What a point is called, and how a test arms one.

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
    /// Its name, `KIND.NAME.EDGE`
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
        let point = "record.handed-over.after".to_owned();
        let armed = Armed { point, action: Action::FailStore, skip: 2 };
        let text = armed.to_string();
        assert_eq!(text, "record.handed-over.after fail-store 2");
        assert_eq!(Armed::parse(&text), Some(armed));
        for bad in ["", "record.x.before", "record.x.before kill", "record.x.before burn 0"] {
            assert_eq!(Armed::parse(bad), None, "{bad}");
        }
    }
}
