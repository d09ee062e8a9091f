//! What happens to the two machines, and what they order.
//!
//! ```text
//!              Ready, Running, Declined, Asked ◄── words ──► Commit, Stays, Retired, Undecided
//! store ──► Recorded, RecordFailed, Lost ─────► machine ──► Persist ──► store
//! QEMU  ──► GuestRuns, GuestNeverRan, QemuGone ─►     └──► TakeDisks, RunGuest, FreeVm ──► QEMU
//! ```
//!
//! **Invariant.** A list of actions has at most one whose result the machine
//! waits for, and that is its last.

use super::{Committed, Receipt, Record};
use crate::id::Epoch;

/// What happens to a source.
#[derive(Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// The guest is stopped, the mirrors have ended and QEMU has let the disks
    /// go; everything is sent and acknowledged
    Delivered,
    /// The destination is ready, durably
    Ready {
        /// At which epoch it would own the VM
        epoch: Epoch,
        /// Of which attempt it holds all
        attempt: u32,
    },
    /// A record is durable
    Recorded(Receipt),
    /// A record may or may not be durable
    RecordFailed,
    /// The ledger names another owner, so that `handed-over` or `owner` was not written
    Lost {
        /// The epoch at which the other owner has the VM
        owner: Epoch,
    },
    /// The destination owns the VM and runs it, or it is off there
    Running {
        /// At which epoch it owns it
        epoch: Epoch,
    },
    /// The destination gave up, and will never run this
    Declined {
        /// The epoch that it gave up
        epoch: Epoch,
    },
    /// The destination answers, and has never heard of this migration
    Unheard,
    /// The guest is paused for too long without the destination's vote: it is to resume,
    /// and all is tried again
    Retry,
    /// The destination asks for the source's decision
    Asked,
    /// The destination has not spoken for a while
    Silence,
    /// Something failed, or somebody cancelled
    GiveUp,
    /// The guest runs, or stays paused as it was found
    GuestRuns,
    /// The guest could not be let run
    GuestNeverRan,
    /// QEMU has ended
    QemuGone,
    /// What the VM held here is freed
    Freed,
    /// An operator who knows the risk gives the VM to this host
    ForceOwner,
    /// The VM, which runs here, is about to be moved again: a destination that
    /// cannot get it any more is not waited for
    MovesOn,
}

impl SourceEvent {
    /// The event's name, for logs.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Ready { .. } => "ready",
            Self::Recorded(_) => "recorded",
            Self::RecordFailed => "record-failed",
            Self::Lost { .. } => "lost",
            Self::Running { .. } => "running",
            Self::Declined { .. } => "declined",
            Self::Unheard => "unheard",
            Self::Retry => "retry",
            Self::Asked => "asked",
            Self::Silence => "silence",
            Self::GiveUp => "give-up",
            Self::GuestRuns => "guest-runs",
            Self::GuestNeverRan => "guest-never-ran",
            Self::QemuGone => "qemu-gone",
            Self::Freed => "freed",
            Self::ForceOwner => "force-owner",
            Self::MovesOn => "moves-on",
        }
    }
}

/// What the source's agent is to do, in this order. Only the last of a list has
/// a result that is reported back (of `Persist`, `RunGuest` and `FreeVm`); until
/// then the machine is given nothing else but `Asked` and `QemuGone`.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum SourceAction {
    /// Write this; then report `Recorded` or `RecordFailed`
    Persist(Record),
    /// Ask the destination whether it is ready
    AskReady {
        /// With all of which attempt
        attempt: u32,
    },
    /// Take the disks, mirrored as before, let the guest run on, and say *again*; a
    /// failure is a reason to give up
    RunOn {
        /// The attempt that begins
        attempt: u32,
    },
    /// Say that the VM is the destination's
    SendCommit(Committed),
    /// Say that the VM stays: do not run it
    SendStays {
        /// At which epoch the source owns it
        epoch: Epoch,
    },
    /// Say that the source is out of it for good
    SendRetired {
        /// At which epoch the destination owns the VM
        epoch: Epoch,
    },
    /// Answer that nothing is decided yet
    SayUndecided,
    /// Take the disks back from the state in which the migration left them
    TakeDisks,
    /// Let the guest run, if it ran when the migration began; then report
    /// `GuestRuns` or `GuestNeverRan`
    RunGuest,
    /// Stop the guest's vCPUs; keep its QEMU and its disks
    StopGuest,
    /// End QEMU and remove the VM's files; then report `Freed`
    FreeVm,
}

/// What happens to a destination.
#[derive(Debug, PartialEq, Eq)]
pub enum DestinationEvent {
    /// The source asks, and everything is here: loaded, equal to the source's,
    /// and the disks are flushed
    Complete {
        /// Of which attempt it asks
        attempt: u32,
    },
    /// The source let its guest run on, and tries again
    Retry {
        /// The attempt that begins
        attempt: u32,
    },
    /// A record is durable
    Recorded(Receipt),
    /// A record may or may not be durable
    RecordFailed,
    /// The ledger names another owner, so that `owner` was not written
    Lost {
        /// The epoch at which the other owner has the VM
        owner: Epoch,
    },
    /// The source has handed over, durably
    Commit {
        /// At which epoch
        epoch: Epoch,
    },
    /// The source has the VM: do not run it
    Stays {
        /// At which epoch it owns it
        epoch: Epoch,
    },
    /// The source is out of it for good
    Retired {
        /// At which epoch it knows the VM to be ours
        epoch: Epoch,
    },
    /// The source answers that nothing is decided yet
    Undecided,
    /// The source answers, and has never heard of this migration
    Unheard,
    /// The source asks for the destination's vote
    Asked,
    /// The source has not spoken for a while
    Silence,
    /// Something failed here, or somebody cancelled here
    GiveUp,
    /// The guest runs, or stays paused as it was at the source
    GuestRuns,
    /// The guest surely did not run a single instruction here
    GuestNeverRan,
    /// QEMU has ended
    QemuGone,
    /// What was made here is removed
    Freed,
    /// An operator who knows the risk gives the VM to this host
    ForceOwner,
}

impl DestinationEvent {
    /// The event's name, for logs.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Complete { .. } => "complete",
            Self::Retry { .. } => "retry",
            Self::Recorded(_) => "recorded",
            Self::RecordFailed => "record-failed",
            Self::Lost { .. } => "lost",
            Self::Commit { .. } => "commit",
            Self::Stays { .. } => "stays",
            Self::Retired { .. } => "retired",
            Self::Undecided => "undecided",
            Self::Unheard => "unheard",
            Self::Asked => "asked",
            Self::Silence => "silence",
            Self::GiveUp => "give-up",
            Self::GuestRuns => "guest-runs",
            Self::GuestNeverRan => "guest-never-ran",
            Self::QemuGone => "qemu-gone",
            Self::Freed => "freed",
            Self::ForceOwner => "force-owner",
        }
    }
}

/// What the destination's agent is to do, in this order. Only the last of a
/// list has a result that is reported back (of `Persist`, `RunGuest` and
/// `FreeCopy`); until then the machine is given nothing else but `QemuGone`.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum DestinationAction {
    /// Write this; then report `Recorded` or `RecordFailed`
    Persist(Record),
    /// Say that everything is here
    SendReady {
        /// At which epoch this host would own the VM
        epoch: Epoch,
        /// Of which attempt everything is here
        attempt: u32,
    },
    /// End QEMU and have another one wait for what comes, with RAM as it is here; a
    /// failure is a reason to give up
    BeginRetry,
    /// Say that the VM is ours, and runs or is off here
    SendRunning {
        /// At which epoch this host owns it
        epoch: Epoch,
    },
    /// Say that this host gave up, and ran nothing
    SendDeclined {
        /// The epoch that it gave up
        epoch: Epoch,
    },
    /// Ask the source for its decision
    AskSource,
    /// Take the disks: from here on this host writes them
    TakeDisks,
    /// Let the guest run, unless it was paused; then report `GuestRuns` or
    /// `GuestNeverRan`
    RunGuest,
    /// Stop the guest's vCPUs; keep its QEMU and its disks
    StopGuest,
    /// End QEMU and remove what was made here; then report `Freed`
    FreeCopy,
}
