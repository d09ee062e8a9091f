//! Who may run a VM while it changes hosts: two state machines without I/O,
//! clock or threads. Events in, actions out; an agent only performs them.
//!
//! ```text
//! source                                      destination
//! offered                                     preparing
//!   │ guest stopped, all sent ── ready? ───►    │ loaded, equal, flushed
//!   │ ◄──────────────── ready ─────────────── ready
//! handed-over  ═ the commit point
//!   │ ─────────────── commit ──────────────► owner ─► takes the disks, runs
//!   │ ◄────────────── running ───────────────   │
//! done         ─────────────── retired ─────► done
//! ```
//!
//! Each word in lower case is a durable record ([`Stage`]); what may follow a
//! record needs its [`Receipt`]. Any end before the commit point leaves the VM at
//! the source (`stayed`), and the destination gives its copy up (`declined`).
//!
//! A source that has not heard *ready* may let its guest run on and try again: it says
//! *again*, and the destination is `preparing` anew. Each such attempt has a number,
//! so that no word of an earlier one counts.
//!
//! **Invariants**, checked over this very code by `tests/handover_model`, with
//! every order of messages lost, repeated and late, of crashes, of QEMUs that
//! die and of an operator who is sure:
//! - at most one host runs the guest, and only that host has taken the disks;
//! - a host takes the disks only while its durable record says that it owns them;
//! - a whole, newest copy is always there;
//! - once faults end, exactly one host runs the VM or may start it.
//!
//! **The ledger decides between hosts** where there is one: it is asked before `handed-over`
//! and `owner` are written. A host that lost stops its guest, frees nothing, and ends as
//! `superseded`; so does a whole copy whose source retired without a commit.
//!
//! **An open record never allows a cold start.** While its QEMU lives, an owner
//! needs nobody. Once QEMU is gone, only the other host's word that it is out of
//! it (`retired`, `declined`) or the operator's allows starting the VM anew.

mod committed;
mod destination;
mod event;
mod machine;
#[cfg(test)]
mod pairs;
mod receipt;
mod source;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use committed::Committed;
pub use destination::Destination;
pub use event::{DestinationAction, DestinationEvent, SourceAction, SourceEvent};
pub use machine::{Machine, Snapshot};
pub use receipt::{Receipt, Store, persist};
pub use source::Source;

use crate::id::{Epoch, MigrationId};

/// How far one host's half of a migration got, as its durable record says.
///
/// | stage | whose | [`Record::epoch`] is |
/// |---|---|---|
/// | `offered`, `handed-over` | source | the one reserved for the destination |
/// | `preparing`, `ready`, `declined`, `stayed` | destination | the same |
/// | `owner` | either | that at which this host owns the VM |
/// | `stayed` | source | that at which the source owns the VM |
/// | `done`, `superseded` | either | the destination's last that this host knew |
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Source: the VM is its alone.
    Offered,
    /// Source: the commit point is passed. The guest does not run here again
    /// unless the destination declines or the operator takes it back.
    HandedOver,
    /// Destination: receiving.
    Preparing,
    /// Destination: holds everything, flushed, and waits for the commit.
    Ready,
    /// The VM belongs to this host; the other one has not yet said that it is
    /// out of it. At a source: taken back.
    Owner,
    /// Destination: gave up and ran nothing; its copy may still be there.
    Declined,
    /// The VM moved. The destination owns it.
    Done,
    /// The VM did not move. The source owns it.
    Stayed,
    /// An operator or the ledger gave the VM to another host. The copy here is kept
    /// for an operator to inspect; it is never started.
    Superseded,
}

impl Stage {
    /// Its name, as records and tests have it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Offered => "offered",
            Self::HandedOver => "handed-over",
            Self::Preparing => "preparing",
            Self::Ready => "ready",
            Self::Owner => "owner",
            Self::Declined => "declined",
            Self::Done => "done",
            Self::Stayed => "stayed",
            Self::Superseded => "superseded",
        }
    }
}

/// What a host writes down before it goes on: all that its machine needs to go on
/// after a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Record {
    /// Which migration
    pub migration: MigrationId,
    /// At which the source owned the VM when it offered it; the next one is
    /// reserved for the destination
    pub offered: Epoch,
    /// How far it got
    pub stage: Stage,
    /// See [`Stage`]
    pub epoch: Epoch,
    /// Which attempt to hand over, from 1. Of the destination's records it says which
    /// copy is meant; the source's only tell it.
    pub attempt: u32,
}

/// What is known of this host's QEMU of the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Guest {
    /// Its vCPUs run, or ran here since the migration began (a guest that its
    /// user paused, or that stands at an I/O error).
    Running,
    /// It lives, and holds the whole guest stopped by the migration: at the
    /// destination it never ran.
    Stopped,
    /// It ended, or the host was restarted: the guest's memory is lost here.
    Gone,
    /// There never was one: the VM was off when it began to move, and its disks
    /// are all of it.
    Off,
}

impl Guest {
    /// Whether no QEMU of the VM lives here.
    #[must_use]
    pub fn is_absent(self) -> bool {
        matches!(self, Self::Gone | Self::Off)
    }
}

/// Whether the VM may be started anew on a host, from that host's disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ColdStart {
    /// Yes: it is ours, and the other host is out of it.
    Allowed,
    /// Not yet: ours, but the other host has not said that it is out of it. It
    /// is asked; without it, only the operator can decide.
    Unconfirmed,
    /// No: the VM belongs to the other host, or nobody can say yet to whom.
    NotOwner,
}

impl Record {
    /// The first record of a source (`offered`) or destination (`preparing`).
    ///
    /// - `offered`: the epoch at which the source owns the VM.
    #[must_use]
    pub fn first(migration: MigrationId, stage: Stage, offered: Epoch) -> Self {
        Self { migration, offered, stage, epoch: offered.next(), attempt: 1 }
    }
}

/// Why a host cannot settle a migration by itself now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Doubt {
    /// Source: handed over, and the destination has not said what became of it.
    /// Settled by its word, or by the operator.
    CommitUnanswered,
    /// Destination: ready, and the source has not said whether it handed over.
    /// Settled by its word, or by the operator.
    CommitUnheard,
    /// The VM is ours and off, and the other host has not said that it is out of
    /// it. Settled by its word, or by the operator.
    Unconfirmed,
    /// Destination: its whole copy was given back, and the source has not said
    /// that it has the VM. Settled by its word, or by the operator.
    GivenBack,
    /// A record may or may not be on the disk. Settled by reading the store
    /// again: a restart of the agent.
    UnknownDurability,
}

/// How a migration ended for one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ended {
    /// The destination owns the VM.
    Moved,
    /// The source owns the VM.
    Stayed,
    /// An operator or the ledger gave the VM to another host.
    Superseded,
}

/// An event that must not happen in this state. The state is as before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("handover: {event} cannot happen in state {state}")]
pub struct IllegalEvent {
    /// The state's name
    pub state: &'static str,
    /// The event's name
    pub event: &'static str,
}

/// A record from which a machine of this role cannot begin or go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("handover: the {role} cannot go on from the record {stage:?}")]
pub struct WrongRecord {
    /// Source or destination
    pub role: &'static str,
    /// What the record says
    pub stage: Stage,
}

/// The epoch of an operator's decision: past both that this host knew, and one
/// that the other host does not choose. A source has even distances from the
/// epoch that it began with, a destination odd ones.
fn forced(epoch: Epoch) -> Epoch {
    epoch.next().next()
}
