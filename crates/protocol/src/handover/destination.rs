//! The destination's half.
//!
//! ```text
//! Preparing ─► Readying ─► Ready ─ commit ─► Owning ═► Starting ─► Owner ─► Moved
//!     │  ◄─ Repeating ◄─again─┤                           │          └─► Superseded
//!     └──────────────────────┴── abort, never ran ────────┴─► Declining ─► Declined ─► Stayed
//! ```
//!
//! **Invariants.** The disks are taken and the guest runs only after the receipt
//! of `owner`. `declined` is written before it is said or anything is removed,
//! and a copy that was whole is removed only once the source said that it has the
//! VM.

mod status;

use super::event::{DestinationAction as Do, DestinationEvent as On};
use super::{
    Ended, Guest, IllegalEvent, Machine, Receipt, Record, Snapshot, Stage, WrongRecord, forced,
};
use crate::id::{Epoch, MigrationId};

/// Where the destination stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum State {
    /// Receives.
    Preparing,
    /// Has everything; `ready` is being written.
    Readying,
    /// Waits for the commit.
    Ready,
    /// The source tries again; `preparing` is being written anew.
    Repeating,
    /// `owner` is being written.
    Owning,
    /// The VM is ours; the guest is being let run.
    Starting,
    /// The VM is ours, running or off; the source has not said that it is out.
    Owner,
    /// `declined` is being written; `whole`: the copy is complete.
    Declining { whole: bool },
    /// Gave up; the copy waits for the source's word that it has the VM.
    Declined,
    /// What was made is being removed.
    Freeing,
    /// The last record is being written.
    Closing(Ended),
    /// Nothing is left to do.
    Ended(Ended),
    /// A record may or may not be durable.
    UnknownDurability,
}

/// The destination's state machine.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Destination {
    migration: MigrationId,
    /// At which the source owned the VM when it offered it.
    offered: Epoch,
    /// Ours, if we get the VM, and while we have it.
    epoch: Epoch,
    /// Which attempt of the source this is, from 1.
    attempt: u32,
    guest: Guest,
    state: State,
}

impl Machine for Destination {
    type Event = On;
    type Action = Do;

    fn begin(preparing: Receipt, guest: Guest) -> Result<Self, WrongRecord> {
        let Record { migration, offered, stage, epoch, attempt } = preparing.record();
        if stage != Stage::Preparing {
            return Err(WrongRecord { role: "destination", stage });
        }
        Ok(Self { migration, offered, epoch, attempt, guest, state: State::Preparing })
    }

    fn restore(receipt: Receipt, guest: Guest) -> Result<(Self, Vec<Do>), WrongRecord> {
        let Record { migration, offered, stage, epoch, attempt } = receipt.record();
        let state = State::Owner;
        let mut destination = Self { migration, offered, epoch, attempt, guest, state };
        let actions = match stage {
            // The channels died with the agent.
            Stage::Preparing => destination.decline(false),
            // Also without its QEMU: if the source is lost, these disks are what
            // is left of the VM, and only the source can say that it is not.
            Stage::Ready => {
                destination.state = State::Ready;
                destination.ask()
            }
            Stage::Owner if guest == Guest::Stopped => destination.start(),
            Stage::Owner => destination.ask(),
            Stage::Declined => {
                destination.state = State::Declined;
                destination.ask()
            }
            Stage::Done | Stage::Stayed | Stage::Superseded => {
                destination.state = State::Ended(match stage {
                    Stage::Done => Ended::Moved,
                    Stage::Stayed => Ended::Stayed,
                    _ => Ended::Superseded,
                });
                Vec::new()
            }
            Stage::Offered | Stage::HandedOver => {
                return Err(WrongRecord { role: "destination", stage });
            }
        };
        Ok((destination, actions))
    }

    fn on(&mut self, event: On) -> Result<Vec<Do>, IllegalEvent> {
        let illegal = IllegalEvent { state: self.state(), event: event.name() };
        match event {
            On::Recorded(receipt) => self.on_recorded(&receipt),
            On::RecordFailed => self.on_record_failed(),
            On::Lost { .. } => self.on_lost(),
            On::QemuGone => {
                if self.guest != Guest::Off {
                    self.guest = Guest::Gone;
                }
                Some(Vec::new())
            }
            On::GuestRuns | On::GuestNeverRan => self.on_started(event == On::GuestRuns),
            On::Asked => Some(self.say()),
            On::Silence => Some(self.ask()),
            On::Commit { .. }
            | On::Stays { .. }
            | On::Retired { .. }
            | On::Undecided
            | On::Unheard => self.on_message(&event),
            On::Retry { attempt } => self.on_retry(attempt),
            On::Complete { .. } | On::GiveUp | On::Freed | On::ForceOwner => self.on_own(&event),
        }
        .ok_or(illegal)
    }

    fn snapshot(&self) -> Snapshot {
        self.read()
    }
}

impl Destination {
    /// What the host itself or its operator wants.
    fn on_own(&mut self, event: &On) -> Option<Vec<Do>> {
        Some(match (self.state, event) {
            // A late question, or one that came before *again*.
            (State::Preparing | State::Ready, On::Complete { attempt })
                if *attempt != self.attempt =>
            {
                Vec::new()
            }
            (State::Preparing, On::Complete { .. }) => {
                self.state = State::Readying;
                self.persist(Stage::Ready)
            }
            // Asked again: the answer was lost.
            (State::Ready, On::Complete { .. }) => self.say(),
            (State::Preparing, On::GiveUp) => self.decline(false),
            (State::Ready, On::GiveUp) => self.decline(true),
            // The second of two reasons to give up.
            (State::Declined | State::Freeing | State::Ended(Ended::Stayed), On::GiveUp) => {
                Vec::new()
            }
            (State::Freeing, On::Freed) => {
                self.state = State::Closing(Ended::Stayed);
                self.persist(Stage::Stayed)
            }
            // Of a copy that was given back, too, when the source is lost for good:
            // it may be the last.
            (State::Ready | State::Declined, On::ForceOwner) => {
                self.epoch = forced(self.epoch);
                // With no guest to run, the operator's word is also for its start.
                if self.guest.is_absent() {
                    self.state = State::Closing(Ended::Moved);
                    return Some(self.persist(Stage::Done));
                }
                self.state = State::Owning;
                self.persist(Stage::Owner)
            }
            // For the start or the next move of a VM that this host has.
            (State::Owner, On::ForceOwner) => {
                self.epoch = forced(self.epoch);
                self.state = State::Closing(Ended::Moved);
                self.persist(Stage::Done)
            }
            _ => return None,
        })
    }

    /// The source has let its guest run on: what is here is not the newest any more,
    /// and is to be made so again. A copy that was ready is not, from the record on.
    fn on_retry(&mut self, attempt: u32) -> Option<Vec<Do>> {
        Some(match self.state {
            State::Preparing | State::Ready if attempt > self.attempt => {
                // A QEMU that is lost has taken along what was received.
                if self.guest.is_absent() {
                    return Some(self.decline(self.state == State::Ready));
                }
                self.attempt = attempt;
                self.state = State::Repeating;
                self.persist(Stage::Preparing)
            }
            // Late or repeated, or it has ended here: the answer is what was said before.
            State::Preparing
            | State::Ready
            | State::Owner
            | State::Declined
            | State::Freeing
            | State::Ended(_) => self.say(),
            // Only the store can say how it goes on.
            State::UnknownDurability => Vec::new(),
            _ => return None,
        })
    }

    /// What the source says.
    fn on_message(&mut self, event: &On) -> Option<Vec<Do>> {
        Some(match (self.state, event) {
            (State::Ready, On::Commit { epoch }) if *epoch == self.epoch => {
                // Without QEMU the guest's memory is lost here, and whole at the
                // source.
                if self.guest == Guest::Gone {
                    self.decline(true)
                } else {
                    self.state = State::Owning;
                    self.persist(Stage::Owner)
                }
            }
            (State::Preparing | State::Ready | State::Declined, On::Stays { epoch })
                if *epoch < self.offered =>
            {
                Vec::new()
            }
            // A source that has lost its store is no reason to give up a whole
            // copy: it may be the last.
            (State::Preparing, On::Stays { .. } | On::Unheard) => self.decline(false),
            (State::Ready, On::Stays { .. }) => self.decline(true),
            (State::Ready, On::Undecided) if self.guest == Guest::Gone => self.decline(true),
            (State::Declined, On::Stays { .. }) => {
                self.state = State::Freeing;
                vec![Do::FreeCopy]
            }
            // Only the store can say how it goes on.
            (State::UnknownDurability, _) => Vec::new(),
            (State::Owner, On::Retired { epoch }) if *epoch == self.epoch => {
                self.state = State::Closing(Ended::Moved);
                self.persist(Stage::Done)
            }
            // An operator took it back, sure that this host was off. If it is
            // not, the higher epoch is right.
            (State::Owner, On::Stays { epoch }) if *epoch > self.epoch => self.supersede(),
            // The ledger has given the VM to a third host, or the source lost it otherwise:
            // a copy that is whole is kept.
            (State::Ready | State::Declined, On::Retired { epoch }) if *epoch == self.epoch => {
                self.supersede()
            }
            // Two operators decided, each for his own host: nobody gives way.
            (State::Ended(Ended::Moved), On::Stays { epoch }) if *epoch > self.epoch => Vec::new(),
            // It asks, or has not heard: the answer is what was said before.
            (
                State::Owner | State::Declined | State::Ended(_),
                On::Commit { .. } | On::Stays { .. },
            ) => self.say(),
            // Late, repeated or of another epoch.
            (State::Ready, On::Commit { .. })
            | (State::Freeing, On::Commit { .. } | On::Stays { .. })
            | (
                State::Preparing
                | State::Ready
                | State::Owner
                | State::Declined
                | State::Freeing
                | State::Ended(_),
                On::Retired { .. } | On::Undecided | On::Unheard,
            ) => Vec::new(),
            _ => return None,
        })
    }

    fn on_recorded(&mut self, receipt: &Receipt) -> Option<Vec<Do>> {
        let Record { migration, stage, epoch, attempt, .. } = receipt.record();
        if migration != self.migration || epoch != self.epoch || attempt != self.attempt {
            return None;
        }
        match (self.state, stage) {
            (State::Readying, Stage::Ready) => {
                self.state = State::Ready;
                Some(vec![Do::SendReady { epoch, attempt }])
            }
            (State::Repeating, Stage::Preparing) => {
                self.state = State::Preparing;
                Some(vec![Do::BeginRetry])
            }
            (State::Owning, Stage::Owner) => Some(self.start()),
            (State::Declining { whole }, Stage::Declined) => {
                let mut actions = vec![Do::SendDeclined { epoch }];
                if whole {
                    self.state = State::Declined;
                } else {
                    self.state = State::Freeing;
                    actions.push(Do::FreeCopy);
                }
                Some(actions)
            }
            (State::Closing(Ended::Moved), Stage::Done)
            | (State::Closing(Ended::Stayed), Stage::Stayed)
            | (State::Closing(Ended::Superseded), Stage::Superseded) => {
                if let State::Closing(ended) = self.state {
                    self.state = State::Ended(ended);
                }
                Some(self.say())
            }
            _ => None,
        }
    }

    fn on_record_failed(&mut self) -> Option<Vec<Do>> {
        match self.state {
            State::Readying
            | State::Repeating
            | State::Owning
            | State::Declining { .. }
            | State::Closing(_) => {
                self.state = State::UnknownDurability;
                Some(Vec::new())
            }
            _ => None,
        }
    }

    /// The ledger has given the VM to another host. A guest stays stopped, all files stay.
    fn on_lost(&mut self) -> Option<Vec<Do>> {
        (self.state == State::Owning).then(|| self.supersede())
    }

    fn on_started(&mut self, runs: bool) -> Option<Vec<Do>> {
        if self.state != State::Starting {
            return None;
        }
        if runs {
            if !self.guest.is_absent() {
                self.guest = Guest::Running;
            }
            self.state = State::Owner;
            return Some(self.say());
        }
        if self.epoch != self.offered.next() {
            // The operator gave it to us, sure that the source is out of it.
            self.state = State::Owner;
            return Some(Vec::new());
        }
        Some(self.decline(true))
    }
}

impl Destination {
    /// Called with the receipt of `owner`.
    fn start(&mut self) -> Vec<Do> {
        if self.guest == Guest::Stopped {
            self.state = State::Starting;
            return vec![Do::TakeDisks, Do::RunGuest];
        }
        self.state = State::Owner;
        self.say()
    }

    /// Another host owns the VM: the guest stops, and nothing is freed.
    fn supersede(&mut self) -> Vec<Do> {
        self.state = State::Closing(Ended::Superseded);
        let mut actions = Vec::new();
        if !self.guest.is_absent() {
            actions.push(Do::StopGuest);
        }
        actions.extend(self.persist(Stage::Superseded));
        actions
    }

    fn decline(&mut self, whole: bool) -> Vec<Do> {
        self.state = State::Declining { whole };
        self.persist(Stage::Declined)
    }

    fn persist(&self, stage: Stage) -> Vec<Do> {
        let Self { migration, offered, epoch, attempt, .. } = *self;
        vec![Do::Persist(Record { migration, offered, stage, epoch, attempt })]
    }

    /// What a host asks that waits for the source's word.
    fn ask(&self) -> Vec<Do> {
        match self.state {
            State::Preparing | State::Ready | State::Owner | State::Declined => {
                vec![Do::AskSource]
            }
            _ => Vec::new(),
        }
    }

    /// What this state answers to a source that waits for a word.
    fn say(&self) -> Vec<Do> {
        let (epoch, attempt) = (self.epoch, self.attempt);
        match self.state {
            State::Ready => vec![Do::SendReady { epoch, attempt }],
            State::Owner | State::Ended(Ended::Moved) => vec![Do::SendRunning { epoch }],
            State::Declined | State::Freeing | State::Ended(Ended::Stayed | Ended::Superseded) => {
                vec![Do::SendDeclined { epoch }]
            }
            // About to change, or not known: who asks will ask again.
            _ => Vec::new(),
        }
    }
}
