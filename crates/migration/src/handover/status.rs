//! The status of a driver, which is read without waiting for its state machine.

use std::time::Duration;

use limosa_protocol::handover::{ColdStart, Doubt, Ended, Snapshot};
use limosa_protocol::id::HostName;

/// How often a host that has not sent an expected message is asked.
pub(super) const ASK_EVERY: Duration = Duration::from_secs(1);

/// What came of asking the other host for the message that is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PeerAnswer {
    /// It answered, or was not asked yet.
    Settles,
    /// No answer.
    IsSilent,
    /// It has lost its records of the migration.
    HasForgotten,
    /// It answers, and does not say how it stands.
    Unclear,
}

impl PeerAnswer {
    pub(crate) fn is_silent(self) -> bool {
        self == Self::IsSilent
    }

    /// The doubt that remains after asking the peer.
    pub(super) fn doubt(self, of_machine: Option<Doubt>) -> Option<Doubt> {
        of_machine.filter(|doubt| self != Self::Settles || *doubt == Doubt::UnknownDurability)
    }

    /// Why the other host does not settle it, and what makes it do so.
    pub(super) fn text(self, peer: &HostName) -> String {
        match self {
            Self::Settles | Self::IsSilent => {
                format!("{peer} does not answer. It settles by itself when {peer} does")
            }
            Self::HasForgotten => format!(
                "{peer} answers, and has lost its records of this migration, so it cannot settle \
                 it: look there whether a QEMU of the VM runs"
            ),
            Self::Unclear => format!(
                "{peer} answers, and cannot say how it stands. It settles by itself once it can; \
                 its log says what holds it up (a state store that failed needs a restart of \
                 limosad there)"
            ),
        }
    }
}

/// The state of one half.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Status {
    /// For people
    pub(crate) state: &'static str,
    pub(crate) cold_start: ColdStart,
    pub(crate) doubt: Option<Doubt>,
    pub(crate) peer: PeerAnswer,
    pub(crate) ended: Option<Ended>,
    /// The guest is this host's, whatever the other host has yet to say.
    pub(crate) is_ours: bool,
    /// Something may still be received.
    pub(crate) is_receiving: bool,
    /// It was handed over: only a message of the other host or an operator brings it back.
    pub(crate) is_theirs: bool,
    /// An operator may decide for this host.
    pub(crate) may_force_owner: bool,
    /// The other host, which does not answer, owes the confirmation without which the VM
    /// cannot move on.
    pub(crate) awaits_peer: bool,
}

impl Status {
    /// The status of a machine, beside the outcome of the last request to the peer.
    pub(super) fn of(machine: Snapshot, peer: PeerAnswer) -> Self {
        Self {
            state: machine.state,
            cold_start: machine.cold_start,
            doubt: peer.doubt(machine.doubt),
            peer,
            ended: machine.ended,
            is_ours: machine.is_ours,
            is_receiving: machine.is_receiving,
            is_theirs: machine.is_theirs,
            may_force_owner: machine.may_force_owner,
            awaits_peer: machine.is_ours && peer.is_silent() && !machine.may_move_on,
        }
    }
}
