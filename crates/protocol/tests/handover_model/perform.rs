//! The agents: they give their machines events, and perform the actions.

use limosa_protocol::handover::{
    Destination, DestinationAction, DestinationEvent, Guest, Machine, Source, SourceAction,
    SourceEvent, Stage,
};

use crate::mutation::Mutation;
use crate::world::{Message, Work, World, receipt};

impl World {
    /// Gives the source's machine an event. `is_own`: of what it ordered, or of
    /// what its host may do now, so that it must expect it.
    pub(crate) fn feed_source(
        &mut self,
        event: SourceEvent,
        is_own: bool,
        mutation: Option<Mutation>,
    ) {
        let Some(machine) = &mut self.source.machine else { return };
        match machine.on(event) {
            Ok(actions) => self.source_performs(actions, mutation),
            Err(illegal) if is_own => self.illegal = Some(illegal.to_string()),
            Err(_) => {}
        }
    }

    /// The same for the destination's.
    pub(crate) fn feed_destination(
        &mut self,
        event: DestinationEvent,
        is_own: bool,
        mutation: Option<Mutation>,
    ) {
        let Some(machine) = &mut self.destination.machine else { return };
        match machine.on(event) {
            Ok(actions) => self.destination_performs(actions, mutation),
            Err(illegal) if is_own => self.illegal = Some(illegal.to_string()),
            Err(_) => {}
        }
    }

    fn source_performs(&mut self, actions: Vec<SourceAction>, mutation: Option<Mutation>) {
        for action in actions {
            if self.source.work.is_some() {
                self.illegal = Some(format!("{action:?} after work"));
            }
            match action {
                SourceAction::Persist(record) => {
                    if mutation == Some(Mutation::CommitBeforeRecord)
                        && record.stage == Stage::HandedOver
                    {
                        self.said.insert(Message::Commit(record.epoch));
                    }
                    self.source.work = Some(Work::Persist(record));
                }
                SourceAction::AskReady { attempt } => self.say(Message::AskReady(attempt)),
                SourceAction::RunOn { attempt } => {
                    self.run_source();
                    self.say(Message::Retry(attempt));
                }
                SourceAction::SendCommit(committed) => {
                    self.say(Message::Commit(committed.epoch()));
                    if mutation == Some(Mutation::SourceFreesBeforeRunning) {
                        self.source.free();
                    }
                }
                SourceAction::SendStays { epoch } => self.say(Message::Stays(epoch)),
                SourceAction::SendRetired { epoch } => self.say(Message::Retired(epoch)),
                SourceAction::SayUndecided => self.say(Message::Undecided),
                SourceAction::TakeDisks => {
                    self.source.disks_taken = !self.source.qemu.is_absent();
                }
                SourceAction::RunGuest => self.source.work = Some(Work::RunGuest),
                SourceAction::StopGuest => {
                    self.source.stop();
                }
                SourceAction::FreeVm => self.source.work = Some(Work::Free),
            }
        }
    }

    fn destination_performs(
        &mut self,
        actions: Vec<DestinationAction>,
        mutation: Option<Mutation>,
    ) {
        for action in actions {
            if self.destination.work.is_some() {
                self.illegal = Some(format!("{action:?} after work"));
            }
            match action {
                DestinationAction::Persist(record) => {
                    match (mutation, record.stage) {
                        (Some(Mutation::DestinationStartsBeforeRecord), Stage::Owner) => {
                            self.run_destination();
                        }
                        (Some(Mutation::DestinationFreesBeforeRecord), Stage::Declined) => {
                            self.destination.free();
                        }
                        _ => {}
                    }
                    self.destination.work = Some(Work::Persist(record));
                }
                DestinationAction::BeginRetry => {
                    // Of the one that ended, the agent still has what RAM held.
                    self.destination.qemu = Guest::Stopped;
                }
                DestinationAction::SendReady { epoch, attempt } => {
                    self.say(Message::Ready(epoch, attempt));
                    if mutation == Some(Mutation::DestinationRunsAtReady) {
                        self.run_destination();
                    }
                }
                DestinationAction::SendRunning { epoch } => self.say(Message::Running(epoch)),
                DestinationAction::SendDeclined { epoch } => self.say(Message::Declined(epoch)),
                DestinationAction::AskSource => self.say(Message::Ask),
                DestinationAction::TakeDisks => {
                    self.destination.disks_taken = !self.destination.qemu.is_absent();
                }
                DestinationAction::RunGuest => self.destination.work = Some(Work::RunGuest),
                DestinationAction::StopGuest => {
                    self.destination.stop();
                }
                DestinationAction::FreeCopy => self.destination.work = Some(Work::Free),
            }
        }
    }

    fn say(&mut self, message: Message) {
        self.said.insert(message);
    }

    /// The source's QEMU lets the guest run, if it lives.
    pub(crate) fn run_source(&mut self) -> bool {
        if self.source.qemu.is_absent() {
            return false;
        }
        self.source_runs();
        true
    }

    /// The destination's QEMU lets the guest run, if it lives.
    pub(crate) fn run_destination(&mut self) -> bool {
        if self.destination.qemu.is_absent() {
            return false;
        }
        self.destination_runs();
        true
    }

    pub(crate) fn source_runs(&mut self) {
        self.stale_run |= !self.source.newest && !self.forced;
        self.source.qemu = Guest::Running;
        self.source.disks_taken = true;
        self.source.newest = true;
        self.destination.newest = false;
    }

    pub(crate) fn destination_runs(&mut self) {
        self.stale_run |= !self.destination.newest && !self.forced;
        self.destination.qemu = Guest::Running;
        self.destination.disks_taken = true;
        self.destination.newest = true;
        self.source.newest = false;
    }

    /// The source's work in flight is done, whether its agent lives or not.
    pub(crate) fn do_source(&mut self, work: Work) -> Option<SourceEvent> {
        Some(match work {
            Work::Persist(record) => {
                self.source.stored = record;
                SourceEvent::Recorded(receipt(record))
            }
            Work::RunGuest if self.run_source() => SourceEvent::GuestRuns,
            Work::RunGuest => SourceEvent::GuestNeverRan,
            Work::Free => {
                self.source.free();
                SourceEvent::Freed
            }
        })
    }

    /// The destination's work in flight is done, whether its agent lives or not.
    pub(crate) fn do_destination(&mut self, work: Work) -> Option<DestinationEvent> {
        Some(match work {
            Work::Persist(record) => {
                self.destination.stored = record;
                DestinationEvent::Recorded(receipt(record))
            }
            Work::RunGuest if self.run_destination() => DestinationEvent::GuestRuns,
            Work::RunGuest => DestinationEvent::GuestNeverRan,
            Work::Free => {
                self.destination.free();
                DestinationEvent::Freed
            }
        })
    }

    /// The source's agent comes back with what its store holds.
    pub(crate) fn restart_source(&mut self, mutation: Option<Mutation>) {
        let mut record = self.source.stored;
        if mutation == Some(Mutation::RestartForgetsHandover) && record.stage == Stage::HandedOver {
            record.stage = Stage::Offered;
        }
        self.source.work = None;
        match Source::restore(receipt(record), self.source.qemu) {
            Ok((machine, actions)) => {
                self.source.machine = Some(machine);
                self.source_performs(actions, mutation);
            }
            Err(wrong) => self.illegal = Some(wrong.to_string()),
        }
    }

    /// The destination's agent comes back with what its store holds.
    pub(crate) fn restart_destination(&mut self, mutation: Option<Mutation>) {
        let record = self.destination.stored;
        self.destination.work = None;
        match Destination::restore(receipt(record), self.destination.qemu) {
            Ok((machine, actions)) => {
                self.destination.machine = Some(machine);
                self.destination_performs(actions, mutation);
            }
            Err(wrong) => self.illegal = Some(wrong.to_string()),
        }
    }
}
