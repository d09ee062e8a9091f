//! Bugs that somebody could write. Each is a change around the real machines: of
//! what they are told, or of what is done with what they order.

/// One bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Mutation {
    /// The source lets its guest run when the answer to its commit is lost
    SourceResumesOnLostReply,
    /// The source lets its guest run on while it asks, and does not begin a new attempt
    SourceRunsOnUnnumbered,
    /// The source takes *ready* of an earlier attempt for one of this
    ReadyOfEarlierAttemptAccepted,
    /// The source lets its guest run when somebody cancels after the commit
    AbortAfterHandedOver,
    /// The source takes a failed sync of the commit for a commit not written
    FailedSyncCountsAsUnwritten,
    /// The source says commit before its record is durable
    CommitBeforeRecord,
    /// The source removes its copy before it heard that the destination runs
    SourceFreesBeforeRunning,
    /// The source's restarted agent lets the guest run although it handed over
    RestartForgetsHandover,
    /// The destination runs the guest as soon as it is ready
    DestinationRunsAtReady,
    /// The destination runs the guest before `owner` is durable
    DestinationStartsBeforeRecord,
    /// The destination removes its copy before `declined` is durable
    DestinationFreesBeforeRecord,
    /// The destination says that it declined while it owns the VM
    DeclinedWhileOwner,
    /// A repeated commit starts a second QEMU
    RepeatedCommitStartsSecondQemu,
    /// Words of an earlier epoch are taken for words of this one
    StaleEpochAccepted,
    /// A host starts the VM anew from its disk although it is not the owner
    ColdStartByNonOwner,
    /// An owner whose QEMU is gone starts the VM anew without asking
    ColdStartUnasked,
    /// The source writes its record although the ledger names another owner
    SourceWritesAfterLost,
    /// The source resumes its guest when the ledger names another owner
    LoserResumes,
    /// A host removes its copy when the ledger names another owner
    LoserFrees,
}

impl Mutation {
    pub(crate) const ALL: [Self; 19] = [
        Self::SourceResumesOnLostReply,
        Self::SourceRunsOnUnnumbered,
        Self::ReadyOfEarlierAttemptAccepted,
        Self::AbortAfterHandedOver,
        Self::FailedSyncCountsAsUnwritten,
        Self::CommitBeforeRecord,
        Self::SourceFreesBeforeRunning,
        Self::RestartForgetsHandover,
        Self::DestinationRunsAtReady,
        Self::DestinationStartsBeforeRecord,
        Self::DestinationFreesBeforeRecord,
        Self::DeclinedWhileOwner,
        Self::RepeatedCommitStartsSecondQemu,
        Self::StaleEpochAccepted,
        Self::ColdStartByNonOwner,
        Self::ColdStartUnasked,
        Self::SourceWritesAfterLost,
        Self::LoserResumes,
        Self::LoserFrees,
    ];

    /// Whether only a ledger that refuses brings it out.
    pub(crate) fn is_of_ledger(self) -> bool {
        matches!(self, Self::SourceWritesAfterLost | Self::LoserResumes | Self::LoserFrees)
    }
}
