//! The source's half.

use super::{Receipt, Record, Stage, Unexpected};
use crate::id::Epoch;

/// Where the source stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum State {
    /// The VM is ours; it moves
    Offered,
    /// `handed-over` is being written: nobody knows yet
    Committing,
    /// Past the commit point; the destination has not answered
    HandedOver,
    /// The destination runs: what the VM held here is being freed
    Retiring,
    /// The destination declined: our ownership is being written
    TakingBack,
    /// The VM moved
    Moved,
    /// The VM is ours, and no longer moves
    Stayed,
    /// A write failed: only a restarted agent can tell what is on the disk
    Unknown,
}

/// The source's state machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Source {
    state: State,
    epoch: Epoch,
}

/// What happens to a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SourceEvent {
    /// The destination is ready, durably
    Ready {
        /// At which epoch
        epoch: Epoch,
    },
    /// A record is durable
    Recorded(Receipt),
    /// A record may or may not be durable
    RecordFailed,
    /// The destination runs the guest
    Running {
        /// At which epoch
        epoch: Epoch,
    },
    /// The destination gave the VM up and never ran it
    Declined {
        /// At which epoch
        epoch: Epoch,
    },
    /// The destination has not answered for a while
    Silence,
    /// Something failed, or somebody cancelled
    GiveUp,
    /// What the VM held here is freed
    Freed,
    /// The destination asks how the source stands
    Asked,
    /// An operator takes the responsibility: the VM is to be ours
    ForceOwner,
}

/// What the source's agent is to do, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SourceAction {
    /// Write this, then report [`SourceEvent::Recorded`] or `RecordFailed`
    Persist(Record),
    /// Say (again) that the VM was handed over
    SendCommit,
    /// Say that the VM stays
    SendAbort,
    /// Let the guest go on as it was found
    RunGuest,
    /// End the stopped QEMU and remove the VM's files; then report `Freed`
    FreeVm,
    /// Answer: not yet committed
    AnswerOffered,
    /// Answer: committed, run it
    AnswerHandedOver,
    /// Answer: it stayed, do not run it
    AnswerStayed,
}

use SourceAction as Do;
use SourceEvent as On;

impl Source {
    /// A source that has written `offered`.
    ///
    /// - `epoch`: the destination's, if it gets the VM.
    #[must_use]
    pub fn new(epoch: Epoch) -> Self {
        Self { state: State::Offered, epoch }
    }

    /// What a restarted agent makes of its record.
    #[must_use]
    pub fn restore(record: Record) -> (Self, Vec<SourceAction>) {
        let epoch = record.epoch;
        match record.stage {
            Stage::Offered => {
                // The channels died with the agent: the guest goes on here.
                let mut source = Self::new(epoch);
                let actions = source.stay();
                (source, actions)
            }
            Stage::HandedOver => {
                // Also when its QEMU is gone: the guest is the destination's.
                (Self { state: State::HandedOver, epoch }, vec![Do::SendCommit])
            }
            Stage::Stayed => (Self { state: State::Stayed, epoch }, Vec::new()),
            _ => (Self { state: State::Moved, epoch }, Vec::new()),
        }
    }

    /// The epoch of the destination.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Name of the state, for logs.
    #[must_use]
    pub fn state(&self) -> &'static str {
        match self.state {
            State::Offered => "offered",
            State::Committing => "committing",
            State::HandedOver => "handed-over",
            State::Retiring => "retiring",
            State::TakingBack => "taking-back",
            State::Moved => "moved",
            State::Stayed => "stayed",
            State::Unknown => "unknown",
        }
    }

    /// Takes an event.
    ///
    /// # Errors
    /// [`Unexpected`]; the state is then as before.
    pub fn on(&mut self, event: SourceEvent) -> Result<Vec<SourceAction>, Unexpected> {
        let epoch = self.epoch;
        match (self.state, event) {
            (State::Offered, On::Ready { epoch: theirs }) if theirs == epoch => {
                self.state = State::Committing;
                Ok(vec![Do::Persist(Record { stage: Stage::HandedOver, epoch })])
            }
            (State::Offered, On::GiveUp | On::Declined { .. }) => Ok(self.stay()),
            (State::Offered, On::Asked) => Ok(vec![Do::AnswerOffered]),
            // The `stayed` of an abort: the guest runs already, for it was ours.
            (State::Stayed, On::Recorded(_) | On::RecordFailed) => Ok(Vec::new()),
            (State::Committing, On::Recorded(receipt)) if self.is_commit(receipt) => {
                self.state = State::HandedOver;
                Ok(vec![Do::SendCommit])
            }
            (State::Committing | State::TakingBack, On::RecordFailed) => {
                self.state = State::Unknown;
                Ok(Vec::new())
            }
            (State::HandedOver, On::Running { epoch: theirs }) if theirs == epoch => {
                self.state = State::Retiring;
                Ok(vec![Do::FreeVm])
            }
            (State::HandedOver, On::Declined { epoch: theirs }) if theirs == epoch => {
                Ok(self.take_back())
            }
            (State::HandedOver, On::ForceOwner) => Ok(self.take_back()),
            (State::HandedOver, On::Silence) => Ok(vec![Do::SendCommit]),
            (State::Retiring, On::Freed) => {
                self.state = State::Moved;
                Ok(vec![Do::Persist(Record { stage: Stage::Done, epoch })])
            }
            (State::TakingBack, On::Recorded(receipt)) if receipt.record().epoch > epoch => {
                self.state = State::Stayed;
                Ok(vec![Do::RunGuest])
            }
            // The record said so before; a restart only repeats what is done.
            (State::Moved, On::Recorded(_) | On::RecordFailed) => Ok(Vec::new()),
            (State::HandedOver | State::Retiring | State::Moved, On::Asked) => {
                Ok(vec![Do::AnswerHandedOver])
            }
            (State::Stayed, On::Asked) => Ok(vec![Do::AnswerStayed]),
            // Not known yet: who asks will ask again.
            (State::Committing | State::TakingBack | State::Unknown, On::Asked) => Ok(Vec::new()),
            // Repeated or late, and without meaning by now.
            (
                State::Committing | State::HandedOver | State::Retiring | State::Moved,
                On::Ready { .. },
            )
            | (State::Retiring | State::Moved, On::Running { .. } | On::Silence)
            | (State::Stayed, On::Ready { .. } | On::Declined { .. } | On::GiveUp) => {
                Ok(Vec::new())
            }
            (_, event) => Err(self.unexpected(&event)),
        }
    }

    /// Whether a receipt is for the commit of this migration.
    fn is_commit(&self, receipt: Receipt) -> bool {
        receipt.record() == Record { stage: Stage::HandedOver, epoch: self.epoch }
    }

    fn stay(&mut self) -> Vec<SourceAction> {
        self.state = State::Stayed;
        // The guest first: until it runs, its users wait. A crash in between
        // finds `offered` and does the same again.
        let record = Record { stage: Stage::Stayed, epoch: self.epoch };
        vec![Do::RunGuest, Do::SendAbort, Do::Persist(record)]
    }

    fn take_back(&mut self) -> Vec<SourceAction> {
        self.state = State::TakingBack;
        // Past the declined epoch: a repeated `ready` of it fits no more.
        vec![Do::Persist(Record { stage: Stage::Stayed, epoch: self.epoch.next() })]
    }

    fn unexpected(&self, event: &SourceEvent) -> Unexpected {
        Unexpected { state: self.state(), event: format!("{event:?}") }
    }
}
