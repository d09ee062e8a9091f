//! Two hosts and what is between them, at one moment.

use std::collections::BTreeSet;

use limosa_protocol::handover::{
    Destination, Ended, Guest, Machine, Receipt, Record, Source, Stage, Store, persist,
};
use limosa_protocol::id::{Epoch, MigrationId};

/// The migration that is checked.
pub(crate) const MIGRATION: MigrationId = MigrationId(uuid::Uuid::from_u128(7));
/// At which the source owns the VM, and at which the destination would.
pub(crate) const OFFERED: Epoch = Epoch(6);
pub(crate) const RESERVED: Epoch = Epoch(7);
/// Epochs of an earlier move, whose words may still be under way.
pub(crate) const OLD_SOURCE_EPOCH: Epoch = Epoch(4);
pub(crate) const OLD_RESERVED: Epoch = Epoch(5);

/// A budget that is not used up.
pub(crate) const UNBOUNDED: u8 = u8::MAX;

/// Takes one out of a budget.
pub(crate) fn spend(budget: &mut u8) {
    if *budget != UNBOUNDED {
        *budget -= 1;
    }
}

/// How many faults of each kind may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Budget {
    /// Agents that crash, both hosts together.
    pub(crate) crashes: u8,
    /// Hosts that restart.
    pub(crate) reboots: u8,
    /// QEMUs that die while their host lives.
    pub(crate) qemu_deaths: u8,
    /// Syncs that fail.
    pub(crate) failed_writes: u8,
    /// Guests that QEMU refuses to let run at the destination.
    pub(crate) refused_starts: u8,
    /// Switchovers that are tried again.
    pub(crate) retries: u8,
    /// Operators who force an owner, being sure that the other host's QEMU ended.
    pub(crate) forces: u8,
    /// Operators who force an owner and only believe so.
    pub(crate) wrong_forces: u8,
    /// Hosts that are destroyed. Their operators know, and decide on the other.
    pub(crate) losses: u8,
    /// Third hosts to which the ledger gives the VM.
    pub(crate) claims: u8,
}

impl Budget {
    const NONE: Self = Self {
        crashes: 0,
        reboots: 0,
        qemu_deaths: 0,
        failed_writes: 0,
        refused_starts: 0,
        retries: 0,
        forces: 0,
        wrong_forces: 0,
        losses: 0,
        claims: 0,
    };
    /// Faults without end; no operator decides.
    pub(crate) const FAULTS: Self = Self {
        crashes: UNBOUNDED,
        reboots: UNBOUNDED,
        qemu_deaths: UNBOUNDED,
        failed_writes: UNBOUNDED,
        refused_starts: UNBOUNDED,
        retries: 2,
        ..Self::NONE
    };
    /// The same, and one operator who made sure.
    pub(crate) const OPERATOR: Self = Self { forces: 1, retries: 1, ..Self::FAULTS };
    /// Faults without end, and one host that never comes back.
    pub(crate) const LOSS: Self = Self { losses: 1, retries: 1, ..Self::FAULTS };
    /// Faults without end, and a ledger that gives the VM to a third host.
    pub(crate) const LEDGER: Self = Self { claims: 1, retries: 1, ..Self::FAULTS };
    /// An operator who did not.
    pub(crate) const WRONG_OPERATOR: Self = Self { crashes: 1, wrong_forces: 1, ..Self::NONE };
}

/// What is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MovingVm {
    /// A guest with its memory.
    Runs,
    /// Only disks.
    IsOff,
}

/// A third host, to which the ledger may give the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum ThirdHost {
    HasNothing,
    /// The ledger names it. It does not run the VM before it knows that the loser has stopped.
    Owns,
    Runs,
}

/// What one host says to the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Message {
    // To the destination.
    AskReady(u32),
    Retry(u32),
    Commit(Epoch),
    Stays(Epoch),
    Retired(Epoch),
    Undecided,
    // To the source.
    Ready(Epoch, u32),
    Running(Epoch),
    Declined(Epoch),
    Ask,
}

/// Work of an agent that has begun and of which a crash may keep all or nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Work {
    Persist(Record),
    RunGuest,
    Free,
}

/// One host.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Host<M> {
    /// The agent's machine, while the agent lives.
    pub(crate) machine: Option<M>,
    pub(crate) work: Option<Work>,
    /// What the store holds.
    pub(crate) stored: Record,
    pub(crate) qemu: Guest,
    /// QEMU may write the disks.
    pub(crate) disks_taken: bool,
    /// The VM's files are there.
    pub(crate) files: bool,
    /// They are what the guest wrote last.
    pub(crate) newest: bool,
    /// It is destroyed, with all it held.
    pub(crate) is_lost: bool,
}

/// A moment.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) source: Host<Source>,
    pub(crate) destination: Host<Destination>,
    /// All that was ever said: any of it may arrive, at any time, many times.
    pub(crate) said: BTreeSet<Message>,
    pub(crate) budget: Budget,
    /// An operator has decided: what he gave up may be lost.
    pub(crate) forced: bool,
    /// A second QEMU of the VM runs on one host.
    pub(crate) second_qemu: bool,
    pub(crate) third: ThirdHost,
    /// A guest was let run from a copy that was not the newest.
    pub(crate) stale_run: bool,
    /// A machine did not expect the result of its own order.
    pub(crate) illegal: Option<String>,
}

/// A disk that never fails: failures are steps of the world.
struct Disk;

impl Store for Disk {
    type Error = std::convert::Infallible;
    fn write_durably(&mut self, _: &Record) -> Result<(), Self::Error> {
        Ok(())
    }
}

/// The receipt of a record that the world has put into a store.
pub(crate) fn receipt(record: Record) -> Receipt {
    let Ok(receipt) = persist(&mut Disk, record);
    receipt
}

impl World {
    /// Both sides have written that they begin.
    pub(crate) fn new(budget: Budget, vm: MovingVm) -> Self {
        let (source_qemu, destination_qemu) = match vm {
            MovingVm::Runs => (Guest::Running, Guest::Stopped),
            MovingVm::IsOff => (Guest::Off, Guest::Off),
        };
        let at = |stage| Record::first(MIGRATION, stage, OFFERED);
        let (offered, preparing) = (at(Stage::Offered), at(Stage::Preparing));
        let source = Source::begin(receipt(offered), source_qemu).expect("it was offered");
        let destination =
            Destination::begin(receipt(preparing), destination_qemu).expect("it prepares");
        let said = [
            // The destination may ask at any time.
            Message::Ask,
            // Words of an earlier move, between the same hosts.
            Message::Ready(OLD_RESERVED, 1),
            Message::Running(OLD_RESERVED),
            Message::Declined(OLD_RESERVED),
            Message::Commit(OLD_RESERVED),
            Message::Stays(OLD_SOURCE_EPOCH),
            Message::Retired(OLD_RESERVED),
        ];
        Self {
            source: Host {
                machine: Some(source),
                work: None,
                stored: offered,
                qemu: source_qemu,
                disks_taken: vm == MovingVm::Runs,
                files: true,
                newest: true,
                is_lost: false,
            },
            destination: Host {
                machine: Some(destination),
                work: None,
                stored: preparing,
                qemu: destination_qemu,
                disks_taken: false,
                files: true,
                newest: false,
                is_lost: false,
            },
            said: said.into(),
            budget,
            forced: false,
            second_qemu: false,
            third: ThirdHost::HasNothing,
            stale_run: false,
            illegal: None,
        }
    }

    pub(crate) fn running_count(&self) -> usize {
        let runs = |qemu| usize::from(qemu == Guest::Running);
        let elsewhere = usize::from(self.second_qemu) + usize::from(self.third == ThirdHost::Runs);
        runs(self.source.qemu) + runs(self.destination.qemu) + elsewhere
    }

    /// Whoever has taken the disks has it in its durable record that it may.
    pub(crate) fn only_owner_writes(&self) -> bool {
        let (source, destination) = (&self.source, &self.destination);
        let source_owns =
            matches!(source.stored.stage, Stage::Offered | Stage::Owner | Stage::Stayed);
        let destination_owns = matches!(destination.stored.stage, Stage::Owner | Stage::Done);
        (!source.disks_taken || source_owns)
            && (!destination.disks_taken || destination_owns)
            && !(source.disks_taken && destination.disks_taken)
    }

    /// The newest copy is on a host that knows that it is whole; a host that is
    /// destroyed may take it along.
    pub(crate) fn is_recoverable(&self) -> bool {
        let (source, destination) = (&self.source, &self.destination);
        if source.is_lost || destination.is_lost || self.third == ThirdHost::Runs {
            return true;
        }
        let is_whole = destination.stored.stage != Stage::Preparing;
        (source.files && source.newest) || (destination.files && destination.newest && is_whole)
    }

    fn ended(&self) -> (Option<Ended>, Option<Ended>) {
        (
            self.source.machine.as_ref().and_then(Source::ended),
            self.destination.machine.as_ref().and_then(Destination::ended),
        )
    }

    pub(crate) fn has_ended(&self) -> bool {
        let (source, destination) = self.ended();
        source.is_some() && destination.is_some()
    }

    pub(crate) fn has_moved(&self) -> bool {
        self.ended() == (Some(Ended::Moved), Some(Ended::Moved))
            && self.destination.qemu == Guest::Running
            && !self.source.files
    }

    pub(crate) fn has_stayed(&self) -> bool {
        self.ended() == (Some(Ended::Stayed), Some(Ended::Stayed))
            && self.source.qemu == Guest::Running
            && !self.destination.files
    }

    pub(crate) fn was_taken_back(&self) -> bool {
        self.has_stayed() && self.source.stored.epoch > RESERVED
    }

    /// Whether a loser is durably superseded, so that the third host may start the VM.
    pub(crate) fn has_given_way(&self) -> bool {
        self.source.stored.stage == Stage::Superseded
            || self.destination.stored.stage == Stage::Superseded
    }

    pub(crate) fn was_superseded(&self) -> bool {
        let (source, destination) = self.ended();
        source == Some(Ended::Superseded) || destination == Some(Ended::Superseded)
    }
}

impl<M> Host<M> {
    /// The agent ends; of the work in flight all or nothing is done.
    pub(crate) fn agent_ends(&mut self, is_work_done: bool) -> Option<Work> {
        self.machine = None;
        let work = self.work.take();
        if is_work_done { work } else { None }
    }

    pub(crate) fn qemu_ends(&mut self) {
        if self.qemu != Guest::Off {
            self.qemu = Guest::Gone;
        }
        self.disks_taken = false;
    }

    pub(crate) fn destroy(&mut self) {
        self.agent_ends(false);
        self.free();
        self.is_lost = true;
    }

    pub(crate) fn stop(&mut self) {
        if self.qemu == Guest::Running {
            self.qemu = Guest::Stopped;
        }
        self.disks_taken = false;
    }

    pub(crate) fn free(&mut self) {
        self.qemu_ends();
        self.files = false;
        self.newest = false;
    }
}
