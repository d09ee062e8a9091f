//! The source's half.
//!
//! ```text
//!                     ┌────────────── declined, force-owner ─────────────┐
//! Copying ─► Asking ─► Committing ═► HandedOver ─► Retiring ─► Moved     ▼
//!    │  ◄─again─┤
//!    └──────────┴─ give up ────────────────────────► Keeping ◄─── TakingBack
//!                                                       ├─► Stayed
//!                                                       └─► Superseded
//! ```
//!
//! **Invariants.** `Keeping` is the only state that runs the guest, and it is
//! entered from a record that says so: `offered` or `owner`. From `Committing` on
//! nothing but the destination's word or the operator's leads back to it.

mod status;

use super::committed::Committed;
use super::event::{SourceAction as Do, SourceEvent as On};
use super::{
    Ended, Guest, IllegalEvent, Machine, Receipt, Record, Snapshot, Stage, WrongRecord, forced,
};
use crate::id::{Epoch, MigrationId};

/// Where the source stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum State {
    /// The guest is ours, and is being copied.
    Copying,
    /// All is sent; the destination was asked whether it is ready.
    Asking,
    /// `handed-over` is being written.
    Committing,
    /// The destination has not said what became of the VM.
    HandedOver,
    /// The destination runs it: what it held here is being freed.
    Retiring,
    /// `owner` is being written; `confirmed`: the destination declined.
    TakingBack { confirmed: bool },
    /// The guest is being let run again.
    Resuming { confirmed: bool },
    /// The VM is ours; the destination has not said that it is out of it.
    Keeping,
    /// The last record is being written.
    Closing(Ended),
    /// Nothing is left to do.
    Ended(Ended),
    /// A record may or may not be durable.
    UnknownDurability,
}

/// The source's state machine.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Source {
    migration: MigrationId,
    /// At which the VM was ours when it was offered.
    offered: Epoch,
    /// The destination's, if it gets the VM.
    reserved: Epoch,
    /// That at which the VM is ours, while it is.
    owned: Epoch,
    /// Which attempt to hand over, from 1.
    attempt: u32,
    guest: Guest,
    /// The destination may hold the whole VM and be ready, as far as is known.
    may_be_ready: bool,
    state: State,
}

impl Machine for Source {
    type Event = On;
    type Action = Do;

    fn begin(offered: Receipt, guest: Guest) -> Result<Self, WrongRecord> {
        let record = offered.record();
        if record.stage != Stage::Offered {
            return Err(WrongRecord { role: "source", stage: record.stage });
        }
        Ok(Self {
            migration: record.migration,
            offered: record.offered,
            reserved: record.epoch,
            owned: record.offered,
            attempt: record.attempt,
            guest,
            may_be_ready: false,
            state: State::Copying,
        })
    }

    fn restore(receipt: Receipt, guest: Guest) -> Result<(Self, Vec<Do>), WrongRecord> {
        let Record { migration, offered, stage, epoch, attempt } = receipt.record();
        let first = offered.next();
        let (reserved, owned, state) = match stage {
            // The channels died with the agent: the guest goes on here.
            Stage::Offered => (epoch, offered, State::Resuming { confirmed: false }),
            Stage::HandedOver => (epoch, offered, State::HandedOver),
            // Who declined or was overruled says so again when asked.
            Stage::Owner => (first, epoch, State::Resuming { confirmed: false }),
            Stage::Done => (epoch, offered, State::Ended(Ended::Moved)),
            Stage::Stayed => (first, epoch, State::Ended(Ended::Stayed)),
            Stage::Superseded => (epoch, offered, State::Ended(Ended::Superseded)),
            Stage::Preparing | Stage::Ready | Stage::Declined => {
                return Err(WrongRecord { role: "source", stage });
            }
        };
        let may_be_ready = true;
        let mut source =
            Self { migration, offered, reserved, owned, attempt, guest, may_be_ready, state };
        let actions = match state {
            State::Resuming { confirmed } => source.resume(confirmed),
            State::HandedOver => vec![source.commit()],
            _ => Vec::new(),
        };
        Ok((source, actions))
    }

    fn on(&mut self, event: On) -> Result<Vec<Do>, IllegalEvent> {
        let illegal = IllegalEvent { state: self.state(), event: event.name() };
        match event {
            On::Recorded(receipt) => self.on_recorded(&receipt),
            On::RecordFailed => self.on_record_failed(),
            On::Lost { .. } => self.on_lost(),
            On::QemuGone => Some(self.on_qemu_gone()),
            On::GuestRuns | On::GuestNeverRan => self.on_resumed(event == On::GuestRuns),
            On::Asked | On::Silence => Some(self.resend(event == On::Silence)),
            On::Ready { .. } | On::Running { .. } | On::Declined { .. } | On::Unheard => {
                self.on_message(&event)
            }
            On::Delivered | On::Retry | On::GiveUp | On::Freed | On::ForceOwner | On::MovesOn => {
                self.on_own(&event)
            }
        }
        .ok_or(illegal)
    }

    fn snapshot(&self) -> Snapshot {
        self.read()
    }
}

impl Source {
    /// What the host itself or its operator wants.
    fn on_own(&mut self, event: &On) -> Option<Vec<Do>> {
        Some(match (self.state, event) {
            (State::Copying, On::Delivered) => {
                self.state = State::Asking;
                self.may_be_ready = true;
                if self.guest == Guest::Running {
                    self.guest = Guest::Stopped;
                }
                vec![Do::AskReady { attempt: self.attempt }]
            }
            // With QEMU gone, what the destination has is all there is of the guest.
            (State::Copying | State::Asking, On::Retry) if !self.guest.is_absent() => {
                self.state = State::Copying;
                self.attempt += 1;
                self.guest = Guest::Running;
                vec![Do::RunOn { attempt: self.attempt }]
            }
            (State::Copying | State::Asking, On::GiveUp) => self.resume(false),
            // The second of two reasons to give up.
            (
                State::Resuming { .. }
                | State::Keeping
                | State::Closing(Ended::Stayed)
                | State::Ended(Ended::Stayed),
                On::GiveUp,
            ) => Vec::new(),
            (State::Retiring, On::Freed) => {
                self.close(Ended::Moved, Record { stage: Stage::Done, ..self.record() })
            }
            // With no guest to go on, the operator's word is also for its start.
            (State::HandedOver, On::ForceOwner) => self.take_back(self.guest.is_absent()),
            // Also for the start or the next move of a VM that this host has.
            (State::Keeping, On::ForceOwner) => {
                self.owned = forced(self.owned);
                self.stay()
            }
            // A destination that was never asked whether it is ready is not, and
            // cannot be made the owner: nothing need be heard of it.
            (State::Keeping, On::MovesOn) if self.may_move_on() => self.stay(),
            (State::Keeping | State::Closing(_) | State::Ended(_), On::MovesOn) => Vec::new(),
            _ => return None,
        })
    }

    /// What the destination says.
    fn on_message(&mut self, event: &On) -> Option<Vec<Do>> {
        Some(match (self.state, event) {
            (State::Asking, On::Ready { epoch, attempt })
                if *epoch == self.reserved && *attempt == self.attempt =>
            {
                self.state = State::Committing;
                vec![Do::Persist(Record { stage: Stage::HandedOver, ..self.record() })]
            }
            (State::Copying | State::Asking, On::Declined { epoch }) if *epoch >= self.reserved => {
                self.resume(true)
            }
            (State::HandedOver, On::Running { epoch }) if *epoch >= self.reserved => {
                self.reserved = *epoch;
                self.state = State::Retiring;
                vec![Do::FreeVm]
            }
            (State::HandedOver, On::Declined { epoch }) if *epoch >= self.reserved => {
                self.take_back(true)
            }
            // An operator gave it to the destination, sure that this host was
            // off. If it is not, the higher epoch is right.
            (State::Copying | State::Asking | State::Keeping, On::Running { epoch })
                if *epoch >= self.reserved && *epoch > self.owned =>
            {
                self.reserved = *epoch;
                self.supersede()
            }
            // Only the store can say how it goes on.
            (State::UnknownDurability, _) => Vec::new(),
            (State::Keeping, On::Declined { epoch }) if *epoch >= self.reserved => self.stay(),
            // It never took the offer, or has forgotten a migration that ended.
            (State::Keeping, On::Unheard) => self.stay(),
            // Two operators decided, each for his own host: nobody gives way.
            (State::Ended(Ended::Stayed), On::Running { epoch }) if *epoch > self.owned => {
                Vec::new()
            }
            // It asks, or has not heard: the answer is what was said before.
            (State::HandedOver, On::Ready { .. })
            | (State::Keeping | State::Ended(_), On::Ready { .. } | On::Running { .. }) => {
                self.resend(false)
            }
            // Late, repeated or of another epoch. A destination that was ready
            // when we handed over and has never heard of it has lost its store:
            // it may run the VM, so that stays in doubt.
            (State::Copying | State::Asking | State::HandedOver | State::Retiring, _)
            | (State::Keeping, On::Declined { .. })
            | (State::Ended(_), On::Declined { .. } | On::Unheard) => Vec::new(),
            _ => return None,
        })
    }

    fn on_recorded(&mut self, receipt: &Receipt) -> Option<Vec<Do>> {
        let record = receipt.record();
        if record.migration != self.migration {
            return None;
        }
        match (self.state, record.stage) {
            (State::Committing, Stage::HandedOver) if record.epoch == self.reserved => {
                self.state = State::HandedOver;
                Some(vec![self.commit()])
            }
            (State::TakingBack { confirmed }, Stage::Owner) if record.epoch == self.owned => {
                Some(self.resume(confirmed))
            }
            (State::Closing(Ended::Moved), Stage::Done)
            | (State::Closing(Ended::Stayed), Stage::Stayed)
            | (State::Closing(Ended::Superseded), Stage::Superseded) => {
                if let State::Closing(ended) = self.state {
                    self.state = State::Ended(ended);
                }
                Some(self.resend(false))
            }
            _ => None,
        }
    }

    fn on_record_failed(&mut self) -> Option<Vec<Do>> {
        match self.state {
            State::Committing | State::TakingBack { .. } | State::Closing(_) => {
                self.state = State::UnknownDurability;
                Some(Vec::new())
            }
            _ => None,
        }
    }

    /// The ledger has given the VM to another host. A guest stops, its memory and files stay.
    fn on_lost(&mut self) -> Option<Vec<Do>> {
        match self.state {
            State::Committing | State::TakingBack { .. } => Some(self.supersede()),
            _ => None,
        }
    }

    fn on_qemu_gone(&mut self) -> Vec<Do> {
        if self.guest != Guest::Off {
            self.guest = Guest::Gone;
        }
        match self.state {
            // Its memory was not all sent. Once it was, the destination has it,
            // and going on is what saves the guest.
            State::Copying => self.resume(false),
            _ => Vec::new(),
        }
    }

    fn on_resumed(&mut self, runs: bool) -> Option<Vec<Do>> {
        let State::Resuming { confirmed } = self.state else { return None };
        if runs && !self.guest.is_absent() {
            self.guest = Guest::Running;
        }
        Some(self.keep(confirmed))
    }

    /// The guest first: until it runs, its users wait. A crash in between finds
    /// a record that says the same.
    fn resume(&mut self, confirmed: bool) -> Vec<Do> {
        if self.guest.is_absent() {
            return self.keep(confirmed);
        }
        self.state = State::Resuming { confirmed };
        vec![Do::TakeDisks, Do::RunGuest]
    }

    fn keep(&mut self, confirmed: bool) -> Vec<Do> {
        self.state = State::Keeping;
        if confirmed { self.stay() } else { self.resend(false) }
    }

    fn stay(&mut self) -> Vec<Do> {
        let record = Record { stage: Stage::Stayed, epoch: self.owned, ..self.record() };
        self.close(Ended::Stayed, record)
    }

    fn take_back(&mut self, confirmed: bool) -> Vec<Do> {
        self.state = State::TakingBack { confirmed };
        // Past the epoch handed over, so that no repeated word of it fits.
        self.owned = self.reserved.next();
        vec![Do::Persist(Record { stage: Stage::Owner, epoch: self.owned, ..self.record() })]
    }

    /// Another host owns the VM: the guest stops, and nothing is freed.
    fn supersede(&mut self) -> Vec<Do> {
        let mut actions = Vec::new();
        // A guest that was not resumed may have been since, by its user.
        if !self.guest.is_absent() {
            actions.push(Do::StopGuest);
        }
        let record = Record { stage: Stage::Superseded, ..self.record() };
        actions.extend(self.close(Ended::Superseded, record));
        actions
    }

    fn close(&mut self, ended: Ended, record: Record) -> Vec<Do> {
        self.state = State::Closing(ended);
        vec![Do::Persist(record)]
    }

    /// What this state has to say, for whoever may not have heard it.
    fn resend(&self, unasked: bool) -> Vec<Do> {
        match self.state {
            State::Asking if unasked => vec![Do::AskReady { attempt: self.attempt }],
            State::Copying | State::Asking if !unasked => vec![Do::SayUndecided],
            State::HandedOver => vec![self.commit()],
            State::Keeping => vec![Do::SendStays { epoch: self.owned }],
            State::Ended(Ended::Stayed) if !unasked => {
                vec![Do::SendStays { epoch: self.owned }]
            }
            State::Ended(Ended::Moved | Ended::Superseded) if !unasked => {
                vec![Do::SendRetired { epoch: self.reserved }]
            }
            // Not known yet, or about to change: who asks will ask again.
            _ => Vec::new(),
        }
    }

    /// Only from [`State::HandedOver`], which has its receipt.
    fn commit(&self) -> Do {
        debug_assert_eq!(self.state, State::HandedOver);
        Do::SendCommit(Committed::new(self.migration, self.reserved))
    }

    fn record(&self) -> Record {
        Record {
            migration: self.migration,
            offered: self.offered,
            stage: Stage::Offered,
            epoch: self.reserved,
            attempt: self.attempt,
        }
    }
}
