//! The destination's half.

use super::{Guest, Receipt, Record, Stage, Unexpected};
use crate::id::Epoch;

/// Where the destination stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum State {
    /// Receives
    Preparing,
    /// Has everything; `ready` is being written
    Readying,
    /// Waits for the commit
    Ready,
    /// `owner` is being written
    Owning,
    /// The VM is ours; the guest is about to run
    Owner,
    /// The guest runs, or has ended here
    Running,
    /// `declined` is being written
    Declining,
    /// Gave up; never ran the guest
    Declined,
    /// A write failed: only a restarted agent can tell what is on the disk
    Unknown,
}

/// The destination's state machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Destination {
    state: State,
    epoch: Epoch,
}

/// What happens to a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DestinationEvent {
    /// Everything is here, equal to the source's, and the disks are flushed
    Complete,
    /// A record is durable
    Recorded(Receipt),
    /// A record may or may not be durable
    RecordFailed,
    /// The source has handed over
    Commit {
        /// At which epoch
        epoch: Epoch,
    },
    /// The source says that the VM stays with it
    Abort,
    /// Something failed here, or somebody cancelled here
    GiveUp,
    /// The source has not spoken for a while
    Silence,
    /// The guest runs, or ran and has ended
    GuestRan,
    /// The guest surely did not run a single instruction
    GuestNeverRan,
    /// An operator takes the responsibility: the VM is to be ours
    ForceOwner,
}

/// What the destination's agent is to do, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DestinationAction {
    /// Write this, then report [`DestinationEvent::Recorded`] or `RecordFailed`
    Persist(Record),
    /// Say that everything is here
    SendReady,
    /// Let the guest run (unless it was paused or off), then report whether it did
    RunGuest,
    /// Say that the guest runs
    SendRunning,
    /// Say that the VM was given up
    SendDeclined,
    /// End the QEMU and remove everything that was made
    FreeCopy,
    /// Ask the source how it stands
    AskSource,
}

use DestinationAction as Do;
use DestinationEvent as On;

impl Destination {
    /// A destination that has written `preparing`.
    ///
    /// - `epoch`: ours, if we get the VM.
    #[must_use]
    pub fn new(epoch: Epoch) -> Self {
        Self { state: State::Preparing, epoch }
    }

    /// What a restarted agent makes of its record.
    #[must_use]
    pub fn restore(record: Record, guest: Guest) -> (Self, Vec<DestinationAction>) {
        let epoch = record.epoch;
        let with = |state| Self { state, epoch };
        match (record.stage, guest) {
            // The channels died with the agent; and a copy whose QEMU is gone
            // lost the guest's memory before anybody owned it.
            (Stage::Preparing, _) | (Stage::Ready, Guest::Gone) => {
                let mut destination = with(State::Preparing);
                let actions = destination.decline();
                (destination, actions)
            }
            (Stage::Ready, Guest::Alive) => (with(State::Ready), vec![Do::AskSource]),
            // The guest may have run before the restart: this is the newest
            // copy. Without its QEMU the VM is off, and here.
            (Stage::Owner, Guest::Alive) => (with(State::Owner), vec![Do::RunGuest]),
            (Stage::Owner, Guest::Gone) => {
                let record = Record { stage: Stage::Done, epoch };
                (with(State::Running), vec![Do::Persist(record), Do::SendRunning])
            }
            (Stage::Declined, _) => (with(State::Declined), vec![Do::FreeCopy]),
            _ => (with(State::Running), Vec::new()),
        }
    }

    /// Our epoch, if we get the VM.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Name of the state, for logs.
    #[must_use]
    pub fn state(&self) -> &'static str {
        match self.state {
            State::Preparing => "preparing",
            State::Readying => "readying",
            State::Ready => "ready",
            State::Owning => "owning",
            State::Owner => "owner",
            State::Running => "running",
            State::Declining => "declining",
            State::Declined => "declined",
            State::Unknown => "unknown",
        }
    }

    /// Takes an event.
    ///
    /// # Errors
    /// [`Unexpected`]; the state is then as before.
    pub fn on(&mut self, event: DestinationEvent) -> Result<Vec<DestinationAction>, Unexpected> {
        let epoch = self.epoch;
        let persist = |stage| vec![Do::Persist(Record { stage, epoch })];
        match (self.state, event) {
            (State::Preparing, On::Complete) => {
                self.state = State::Readying;
                Ok(persist(Stage::Ready))
            }
            (State::Readying, On::Recorded(receipt)) if self.is(receipt, Stage::Ready) => {
                self.state = State::Ready;
                Ok(vec![Do::SendReady])
            }
            // Asked again: the answer was lost.
            (State::Ready, On::Complete) => Ok(vec![Do::SendReady]),
            (State::Ready, On::Commit { epoch: theirs }) if theirs == epoch => {
                self.state = State::Owning;
                Ok(persist(Stage::Owner))
            }
            (State::Ready, On::ForceOwner) => {
                self.state = State::Owning;
                Ok(persist(Stage::Owner))
            }
            (State::Ready, On::Silence) => Ok(vec![Do::AskSource]),
            (State::Owning, On::Recorded(receipt)) if self.is(receipt, Stage::Owner) => {
                self.state = State::Owner;
                Ok(vec![Do::RunGuest])
            }
            (State::Owner, On::GuestRan) => {
                self.state = State::Running;
                let record = Record { stage: Stage::Done, epoch };
                Ok(vec![Do::SendRunning, Do::Persist(record)])
            }
            (State::Owner, On::GuestNeverRan) => Ok(self.decline()),
            (State::Running, On::Commit { epoch: theirs }) if theirs == epoch => {
                Ok(vec![Do::SendRunning])
            }
            (State::Preparing | State::Ready, On::Abort | On::GiveUp) => Ok(self.decline()),
            (State::Declining, On::Recorded(receipt)) if self.is(receipt, Stage::Declined) => {
                self.state = State::Declined;
                Ok(vec![Do::FreeCopy, Do::SendDeclined])
            }
            (State::Declined, On::Commit { epoch: theirs }) if theirs == epoch => {
                Ok(vec![Do::SendDeclined])
            }
            (State::Readying | State::Owning | State::Declining, On::RecordFailed) => {
                self.state = State::Unknown;
                Ok(Vec::new())
            }
            // `done` only shortens what a restart would do again.
            (State::Running, On::Recorded(_) | On::RecordFailed) => Ok(Vec::new()),
            // Repeated or late, and without meaning by now.
            (State::Owning | State::Owner, On::Commit { .. })
            | (State::Running, On::Silence | On::GiveUp)
            | (State::Declining | State::Declined, On::Abort | On::GiveUp | On::Silence) => {
                Ok(Vec::new())
            }
            (_, event) => Err(self.unexpected(&event)),
        }
    }

    fn is(&self, receipt: Receipt, stage: Stage) -> bool {
        receipt.record() == Record { stage, epoch: self.epoch }
    }

    fn decline(&mut self) -> Vec<DestinationAction> {
        self.state = State::Declining;
        vec![Do::Persist(Record { stage: Stage::Declined, epoch: self.epoch })]
    }

    fn unexpected(&self, event: &DestinationEvent) -> Unexpected {
        Unexpected { state: self.state(), event: format!("{event:?}") }
    }
}
