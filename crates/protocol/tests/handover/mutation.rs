//! Bugs that somebody could write, each as a change of what a machine orders.

use limosa_protocol::handover::{
    Destination, DestinationAction, DestinationEvent, Record, Source, SourceAction, SourceEvent,
    Stage,
};

/// One bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// The source runs on when the answer to its commit is lost
    SourceResumesOnSilence,
    /// The source runs on when an operator cancels after the commit
    SourceResumesOnCancel,
    /// The source runs on when it could not write the commit
    FailedWriteCountsAsUnwritten,
    /// The source says commit before it is on the disk
    CommitBeforeRecord,
    /// The source removes its copy as soon as it has said commit
    SourceFreesTooEarly,
    /// The source starts its copy when it was handed over and its QEMU is gone
    ColdStartByNonOwner,
    /// The source takes the word of an earlier migration
    SourceTakesStaleRunning,
    /// The destination runs as soon as it is ready
    RunsWhenReady,
    /// The destination runs before its ownership is on the disk
    RunsBeforeRecord,
    /// The destination takes the commit of an earlier migration
    DestinationTakesStaleCommit,
    /// The destination gives up although it is the owner
    DeclinesAsOwner,
}

impl Mutation {
    pub(crate) const ALL: [Self; 11] = [
        Self::SourceResumesOnSilence,
        Self::SourceResumesOnCancel,
        Self::FailedWriteCountsAsUnwritten,
        Self::CommitBeforeRecord,
        Self::SourceFreesTooEarly,
        Self::ColdStartByNonOwner,
        Self::SourceTakesStaleRunning,
        Self::RunsWhenReady,
        Self::RunsBeforeRecord,
        Self::DestinationTakesStaleCommit,
        Self::DeclinesAsOwner,
    ];
}

/// The real machine, then the bug.
pub(crate) fn source_on(
    source: &mut Source,
    event: SourceEvent,
    mutation: Option<Mutation>,
) -> Option<Vec<SourceAction>> {
    let before = source.state();
    let event = match (mutation, event) {
        (Some(Mutation::SourceTakesStaleRunning), SourceEvent::Running { .. }) => {
            SourceEvent::Running { epoch: source.epoch() }
        }
        (_, event) => event,
    };
    let result = source.on(event).ok();
    let Some(mutation) = mutation else { return result };
    match (mutation, before, event) {
        (Mutation::SourceResumesOnSilence, "handed-over", SourceEvent::Silence)
        | (Mutation::SourceResumesOnCancel, "handed-over", SourceEvent::GiveUp)
        | (Mutation::FailedWriteCountsAsUnwritten, "committing", SourceEvent::RecordFailed) => {
            Some(vec![SourceAction::RunGuest])
        }
        (Mutation::CommitBeforeRecord, "offered", SourceEvent::Ready { .. }) => {
            result.map(|orders| [vec![SourceAction::SendCommit], orders].concat())
        }
        (Mutation::SourceFreesTooEarly, "committing", SourceEvent::Recorded(_)) => {
            result.map(|orders| [orders, vec![SourceAction::FreeVm]].concat())
        }
        _ => result,
    }
}

/// What a restarted source orders, then the bug.
pub(crate) fn source_restored(
    record: Record,
    is_gone: bool,
    mutation: Option<Mutation>,
) -> (Source, Vec<SourceAction>) {
    let (source, orders) = Source::restore(record);
    if mutation == Some(Mutation::ColdStartByNonOwner)
        && record.stage == Stage::HandedOver
        && is_gone
    {
        return (source, vec![SourceAction::RunGuest]);
    }
    (source, orders)
}

/// The real machine, then the bug.
pub(crate) fn destination_on(
    destination: &mut Destination,
    event: DestinationEvent,
    mutation: Option<Mutation>,
) -> Option<Vec<DestinationAction>> {
    let before = destination.state();
    let event = match (mutation, event) {
        (Some(Mutation::DestinationTakesStaleCommit), DestinationEvent::Commit { .. }) => {
            DestinationEvent::Commit { epoch: destination.epoch() }
        }
        (_, event) => event,
    };
    let epoch = destination.epoch();
    let result = destination.on(event).ok();
    let Some(mutation) = mutation else { return result };
    match (mutation, before, event) {
        (Mutation::RunsWhenReady, "readying", DestinationEvent::Recorded(_))
        | (Mutation::RunsBeforeRecord, "ready", DestinationEvent::Commit { .. }) => {
            result.map(|orders| [vec![DestinationAction::RunGuest], orders].concat())
        }
        (Mutation::DeclinesAsOwner, "running", DestinationEvent::GiveUp) => Some(vec![
            DestinationAction::Persist(Record { stage: Stage::Declined, epoch }),
            DestinationAction::SendDeclined,
            DestinationAction::FreeCopy,
        ]),
        _ => result,
    }
}
