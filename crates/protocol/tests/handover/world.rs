//! Two hosts, what is between them, and all that can go wrong.

use std::collections::BTreeSet;

use limosa_protocol::handover::{
    Destination, DestinationAction, DestinationEvent, Guest, Receipt, Record, Source, SourceAction,
    SourceEvent, Stage, Store, persist,
};
use limosa_protocol::id::Epoch;

use crate::mutation::{Mutation, destination_on, source_on, source_restored};

/// Epoch of the migration, and that of one before it.
const EPOCH: Epoch = Epoch(5);
const STALE: Epoch = Epoch(4);
/// Most steps until a world without further faults must have come to rest.
const HEALING_STEPS_MAX: usize = 200;

/// How many faults of each kind may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Budget {
    pub crashes: u8,
    pub losses: u8,
    pub duplicates: u8,
    pub failed_writes: u8,
    pub qemu_deaths: u8,
    pub give_ups: u8,
}

impl Budget {
    /// Faults that are let loose together; all at once would take hours.
    pub(crate) const TOGETHER: [Self; 4] = [
        Self::of([1, 1, 0, 1, 1, 1]),
        Self::of([2, 0, 0, 0, 1, 1]),
        Self::of([1, 0, 1, 1, 0, 1]),
        Self::of([2, 1, 0, 0, 0, 1]),
    ];
    /// One of each, as far as a planted bug needs.
    pub(crate) const ONE_OF_EACH: Self = Self::of([1, 1, 0, 1, 1, 1]);

    const fn of(most: [u8; 6]) -> Self {
        let [crashes, losses, duplicates, failed_writes, qemu_deaths, give_ups] = most;
        Self { crashes, losses, duplicates, failed_writes, qemu_deaths, give_ups }
    }
}

/// What is on the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Message {
    AskReady,
    Ready(Epoch),
    Commit(Epoch),
    Running(Epoch),
    Declined(Epoch),
    Abort,
    AskSource,
    SaysHandedOver(Epoch),
    SaysOffered,
    SaysStayed,
}

/// The guest at one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Vm {
    Stopped,
    Running,
    Gone,
}

/// One host. `M` is its machine, `A` what the machine orders.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Host<M, A> {
    pub machine: Option<M>,
    pub orders: Vec<A>,
    pub writing: Option<Record>,
    pub stored: Record,
    pub vm: Vm,
    /// The VM's files are there.
    pub files: bool,
    /// The agent was restarted: what it did before it does not know.
    pub restored: bool,
}

/// A moment.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub source: Host<Source, SourceAction>,
    pub destination: Host<Destination, DestinationAction>,
    pub messages: BTreeSet<Message>,
    pub budget: Budget,
    /// The guest ran at the source after its copy was complete.
    pub ran_on: bool,
    /// The guest ran at the destination.
    pub ran_there: bool,
    /// An order of a machine that its own agent could not report back.
    pub unexpected: Option<String>,
}

/// What happens next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    SourceDoes,
    DestinationDoes,
    SourceWrites,
    DestinationWrites,
    SourceWriteFails { there: bool },
    DestinationWriteFails { there: bool },
    Deliver { message: Message, again: bool },
    Lose(Message),
    SourceCrashes { written: bool },
    DestinationCrashes { written: bool },
    SourceRestarts,
    DestinationRestarts,
    SourceSilence,
    DestinationSilence,
    SourceGivesUp,
    DestinationGivesUp,
    SourceQemuDies,
    DestinationQemuDies,
}

/// A store that never fails: failures are steps of the world.
struct Disk;

impl Store for Disk {
    type Error = std::convert::Infallible;
    fn put(&mut self, _: &Record) -> Result<(), Self::Error> {
        Ok(())
    }
}

fn receipt(record: Record) -> Receipt {
    let Ok(receipt) = persist(&mut Disk, record);
    receipt
}

impl World {
    /// Everything is sent, the guest is stopped, digests are equal.
    pub(crate) fn new(budget: Budget) -> Self {
        let at = |stage| Record { stage, epoch: EPOCH };
        Self {
            source: Host {
                machine: Some(Source::new(EPOCH)),
                orders: Vec::new(),
                writing: None,
                stored: at(Stage::Offered),
                vm: Vm::Stopped,
                files: true,
                restored: false,
            },
            destination: Host {
                machine: Some(Destination::new(EPOCH)),
                orders: Vec::new(),
                writing: None,
                stored: at(Stage::Preparing),
                vm: Vm::Stopped,
                files: true,
                restored: false,
            },
            // Words of an earlier migration may still be under way.
            messages: [Message::AskReady, Message::Commit(STALE), Message::Running(STALE)].into(),
            budget,
            ran_on: false,
            ran_there: false,
            unexpected: None,
        }
    }

    pub(crate) fn both_run(&self) -> bool {
        self.source.vm == Vm::Running && self.destination.vm == Vm::Running
    }

    pub(crate) fn is_stale(&self) -> bool {
        (self.source.vm == Vm::Running && self.ran_there)
            || (self.destination.vm == Vm::Running && self.ran_on)
    }

    /// Whoever runs the guest has it in its durable record that it may.
    pub(crate) fn writers_own(&self) -> bool {
        let source = matches!(self.source.stored.stage, Stage::Offered | Stage::Stayed);
        let destination = matches!(self.destination.stored.stage, Stage::Owner | Stage::Done);
        (self.source.vm != Vm::Running || source)
            && (self.destination.vm != Vm::Running || destination)
    }

    /// The newest copy is on a disk from which it may be started, or can be
    /// once the hosts have spoken.
    pub(crate) fn is_recoverable(&self) -> bool {
        if self.ran_there {
            self.destination.files
        } else {
            self.source.files || self.owned_there()
        }
    }

    fn owned_there(&self) -> bool {
        let stage = self.destination.stored.stage;
        self.destination.files && matches!(stage, Stage::Owner | Stage::Done)
    }

    pub(crate) fn has_moved(&self) -> bool {
        self.source.stored.stage == Stage::Done && self.destination.vm == Vm::Running
    }

    pub(crate) fn has_stayed(&self) -> bool {
        self.source.stored.stage == Stage::Stayed
            && self.source.vm == Vm::Running
            && self.destination.stored.stage == Stage::Declined
    }

    /// All that can happen now.
    pub(crate) fn steps(&self, steps: &mut Vec<Step>) {
        let budget = &self.budget;
        if !self.source.orders.is_empty() {
            steps.push(Step::SourceDoes);
        }
        if !self.destination.orders.is_empty() {
            steps.push(Step::DestinationDoes);
        }
        if self.source.writing.is_some() {
            steps.push(Step::SourceWrites);
        }
        if self.destination.writing.is_some() {
            steps.push(Step::DestinationWrites);
        }
        if budget.failed_writes > 0 {
            for there in [false, true] {
                if self.source.writing.is_some() {
                    steps.push(Step::SourceWriteFails { there });
                }
                if self.destination.writing.is_some() {
                    steps.push(Step::DestinationWriteFails { there });
                }
            }
        }
        for message in self.messages.iter().copied() {
            steps.push(Step::Deliver { message, again: false });
            if budget.duplicates > 0 {
                steps.push(Step::Deliver { message, again: true });
            }
            if budget.losses > 0 {
                steps.push(Step::Lose(message));
            }
        }
        self.faults(steps);
    }

    fn faults(&self, steps: &mut Vec<Step>) {
        let budget = &self.budget;
        if self.source.must_restart(Source::state) {
            steps.push(Step::SourceRestarts);
        } else {
            // Asked again only when nothing is under way any more.
            if self.source.is_idle() && !self.messages.contains(&Message::Commit(EPOCH)) {
                steps.push(Step::SourceSilence);
            }
            if budget.give_ups > 0 {
                steps.push(Step::SourceGivesUp);
            }
        }
        if self.destination.must_restart(Destination::state) {
            steps.push(Step::DestinationRestarts);
        } else {
            if self.destination.is_idle() && !self.messages.contains(&Message::AskSource) {
                steps.push(Step::DestinationSilence);
            }
            if budget.give_ups > 0 {
                steps.push(Step::DestinationGivesUp);
            }
        }
        if budget.crashes > 0 {
            for written in [false, true] {
                if self.source.machine.is_some() && (!written || self.source.writing.is_some()) {
                    steps.push(Step::SourceCrashes { written });
                }
                let destination = &self.destination;
                if destination.machine.is_some() && (!written || destination.writing.is_some()) {
                    steps.push(Step::DestinationCrashes { written });
                }
            }
        }
        if budget.qemu_deaths > 0 {
            if self.source.vm != Vm::Gone {
                steps.push(Step::SourceQemuDies);
            }
            if self.destination.vm != Vm::Gone {
                steps.push(Step::DestinationQemuDies);
            }
        }
    }

    /// Lets it happen.
    pub(crate) fn take(&mut self, step: Step, mutation: Option<Mutation>) {
        match step {
            Step::SourceDoes => self.source_does(mutation),
            Step::DestinationDoes => self.destination_does(mutation),
            Step::SourceWrites => {
                if let Some(record) = self.source.written(true) {
                    self.tell_source(SourceEvent::Recorded(receipt(record)), mutation, true);
                }
            }
            Step::DestinationWrites => {
                if let Some(record) = self.destination.written(true) {
                    let event = DestinationEvent::Recorded(receipt(record));
                    self.tell_destination(event, mutation, true);
                }
            }
            Step::SourceWriteFails { there } => {
                self.budget.failed_writes -= 1;
                self.source.written(there);
                self.tell_source(SourceEvent::RecordFailed, mutation, true);
            }
            Step::DestinationWriteFails { there } => {
                self.budget.failed_writes -= 1;
                self.destination.written(there);
                self.tell_destination(DestinationEvent::RecordFailed, mutation, true);
            }
            Step::Deliver { message, again } => {
                if again {
                    self.budget.duplicates -= 1;
                } else {
                    self.messages.remove(&message);
                }
                self.deliver(message, mutation);
            }
            Step::Lose(message) => {
                self.budget.losses -= 1;
                self.messages.remove(&message);
            }
            other => self.take_fault(other, mutation),
        }
    }

    fn take_fault(&mut self, step: Step, mutation: Option<Mutation>) {
        match step {
            Step::SourceCrashes { written } => {
                self.budget.crashes -= 1;
                self.source.crash(written);
            }
            Step::DestinationCrashes { written } => {
                self.budget.crashes -= 1;
                self.destination.crash(written);
            }
            Step::SourceRestarts => {
                let gone = self.source.vm == Vm::Gone;
                let (machine, orders) = source_restored(self.source.stored, gone, mutation);
                self.source.restart(machine, orders);
            }
            Step::DestinationRestarts => {
                let guest =
                    if self.destination.vm == Vm::Gone { Guest::Gone } else { Guest::Alive };
                let (machine, orders) = Destination::restore(self.destination.stored, guest);
                self.destination.restart(machine, orders);
            }
            Step::SourceSilence => self.tell_source(SourceEvent::Silence, mutation, false),
            Step::DestinationSilence => {
                self.tell_destination(DestinationEvent::Silence, mutation, false);
            }
            Step::SourceGivesUp => {
                self.budget.give_ups -= 1;
                self.tell_source(SourceEvent::GiveUp, mutation, false);
            }
            Step::DestinationGivesUp => {
                self.budget.give_ups -= 1;
                self.tell_destination(DestinationEvent::GiveUp, mutation, false);
            }
            Step::SourceQemuDies => {
                self.budget.qemu_deaths -= 1;
                self.source.vm = Vm::Gone;
            }
            Step::DestinationQemuDies => {
                self.budget.qemu_deaths -= 1;
                self.destination.vm = Vm::Gone;
            }
            _ => {}
        }
    }

    fn tell_source(&mut self, event: SourceEvent, mutation: Option<Mutation>, is_own: bool) {
        let Some(machine) = &mut self.source.machine else { return };
        match source_on(machine, event, mutation) {
            Some(orders) => self.source.order(orders),
            None if is_own && mutation.is_none() => {
                self.unexpected = Some(format!("{event:?} in {}", machine.state()));
            }
            None => {}
        }
    }

    fn tell_destination(
        &mut self,
        event: DestinationEvent,
        mutation: Option<Mutation>,
        is_own: bool,
    ) {
        let Some(machine) = &mut self.destination.machine else { return };
        match destination_on(machine, event, mutation) {
            Some(orders) => self.destination.order(orders),
            None if is_own && mutation.is_none() => {
                self.unexpected = Some(format!("{event:?} in {}", machine.state()));
            }
            None => {}
        }
    }

    fn source_does(&mut self, mutation: Option<Mutation>) {
        // Orders are performed one after the other; a write is waited for.
        if self.source.writing.is_some() {
            return;
        }
        match self.source.orders.remove(0) {
            SourceAction::Persist(record) => self.source.writing = Some(record),
            SourceAction::SendCommit => drop(self.messages.insert(Message::Commit(EPOCH))),
            SourceAction::SendAbort => drop(self.messages.insert(Message::Abort)),
            SourceAction::RunGuest => {
                let cold = mutation == Some(Mutation::ColdStartByNonOwner) && self.source.files;
                if self.source.vm == Vm::Stopped || cold {
                    self.source.vm = Vm::Running;
                    self.ran_on = true;
                }
            }
            SourceAction::FreeVm => {
                self.source.vm = Vm::Gone;
                self.source.files = false;
                self.tell_source(SourceEvent::Freed, mutation, true);
            }
            SourceAction::AnswerOffered => drop(self.messages.insert(Message::SaysOffered)),
            SourceAction::AnswerHandedOver => {
                self.messages.insert(Message::SaysHandedOver(EPOCH));
            }
            SourceAction::AnswerStayed => drop(self.messages.insert(Message::SaysStayed)),
        }
    }

    fn destination_does(&mut self, mutation: Option<Mutation>) {
        if self.destination.writing.is_some() {
            return;
        }
        match self.destination.orders.remove(0) {
            DestinationAction::Persist(record) => self.destination.writing = Some(record),
            DestinationAction::SendReady => drop(self.messages.insert(Message::Ready(EPOCH))),
            DestinationAction::RunGuest => {
                let event = match self.destination.vm {
                    // Whether it ran before a restart, a restarted agent cannot know.
                    Vm::Gone if !self.destination.restored => DestinationEvent::GuestNeverRan,
                    Vm::Gone => DestinationEvent::GuestRan,
                    Vm::Stopped | Vm::Running => {
                        self.destination.vm = Vm::Running;
                        self.ran_there = true;
                        DestinationEvent::GuestRan
                    }
                };
                self.tell_destination(event, mutation, true);
            }
            DestinationAction::SendRunning => drop(self.messages.insert(Message::Running(EPOCH))),
            DestinationAction::SendDeclined => {
                self.messages.insert(Message::Declined(EPOCH));
            }
            DestinationAction::FreeCopy => {
                self.destination.vm = Vm::Gone;
                self.destination.files = false;
            }
            DestinationAction::AskSource => drop(self.messages.insert(Message::AskSource)),
        }
    }

    fn deliver(&mut self, message: Message, mutation: Option<Mutation>) {
        let to_source = |event| (Some(event), None);
        let to_destination = |event| (None, Some(event));
        let (source, destination) = match message {
            // Complete only while there is something that could be.
            Message::AskReady if self.destination.vm == Vm::Gone => {
                to_destination(DestinationEvent::GiveUp)
            }
            Message::AskReady => to_destination(DestinationEvent::Complete),
            Message::Ready(epoch) => to_source(SourceEvent::Ready { epoch }),
            Message::Commit(epoch) | Message::SaysHandedOver(epoch) => {
                to_destination(DestinationEvent::Commit { epoch })
            }
            Message::Running(epoch) => to_source(SourceEvent::Running { epoch }),
            Message::Declined(epoch) => to_source(SourceEvent::Declined { epoch }),
            Message::Abort | Message::SaysStayed => to_destination(DestinationEvent::Abort),
            Message::AskSource => to_source(SourceEvent::Asked),
            Message::SaysOffered => (None, None),
        };
        if let Some(event) = source {
            self.tell_source(event, mutation, false);
        }
        if let Some(event) = destination {
            self.tell_destination(event, mutation, false);
        }
    }

    /// Without further faults it comes to rest with exactly one owner.
    pub(crate) fn heals(&self, mutation: Option<Mutation>) -> bool {
        let mut world = self.clone();
        for _ in 0..HEALING_STEPS_MAX {
            match world.next_healing_step() {
                Some(step) => {
                    world.budget.give_ups = u8::MAX;
                    world.take(step, mutation);
                }
                None => return world.has_one_owner(),
            }
        }
        false
    }

    fn next_healing_step(&self) -> Option<Step> {
        if self.source.must_restart(Source::state) {
            return Some(Step::SourceRestarts);
        }
        if self.destination.must_restart(Destination::state) {
            return Some(Step::DestinationRestarts);
        }
        if self.source.writing.is_some() {
            return Some(Step::SourceWrites);
        }
        if self.destination.writing.is_some() {
            return Some(Step::DestinationWrites);
        }
        if !self.source.orders.is_empty() {
            return Some(Step::SourceDoes);
        }
        if !self.destination.orders.is_empty() {
            return Some(Step::DestinationDoes);
        }
        if let Some(message) = self.messages.first() {
            return Some(Step::Deliver { message: *message, again: false });
        }
        // Nothing moves: whoever waits asks again.
        let source = self.source.machine.as_ref().map(Source::state);
        let destination = self.destination.machine.as_ref().map(Destination::state);
        match (source, destination) {
            (Some("handed-over"), _) => Some(Step::SourceSilence),
            (Some("offered"), _) => Some(Step::SourceGivesUp),
            (_, Some("ready")) => Some(Step::DestinationSilence),
            (_, Some("preparing")) => Some(Step::DestinationGivesUp),
            _ => None,
        }
    }

    fn has_one_owner(&self) -> bool {
        // One that gave up and could not write so owns it as before.
        let stage = self.source.stored.stage;
        let here = matches!(stage, Stage::Offered | Stage::Stayed) && self.source.files;
        here != self.owned_there()
    }
}

impl<M, A: PartialEq> Host<M, A> {
    /// What is ordered already is not ordered twice: without that the list of a
    /// slow agent would have no end, and so the model.
    fn order(&mut self, orders: Vec<A>) {
        for order in orders {
            if !self.orders.contains(&order) {
                self.orders.push(order);
            }
        }
    }

    fn written(&mut self, there: bool) -> Option<Record> {
        let record = self.writing.take()?;
        if there {
            self.stored = record;
        }
        Some(record)
    }

    fn crash(&mut self, written: bool) {
        self.written(written);
        self.machine = None;
        self.orders.clear();
    }

    fn restart(&mut self, machine: M, orders: Vec<A>) {
        self.machine = Some(machine);
        self.orders = orders;
        self.writing = None;
        self.restored = true;
    }

    fn is_idle(&self) -> bool {
        self.orders.is_empty() && self.writing.is_none()
    }

    /// Its agent is down, or has stopped trusting its store.
    fn must_restart(&self, state: fn(&M) -> &'static str) -> bool {
        self.machine.as_ref().is_none_or(|machine| state(machine) == "unknown")
    }
}
