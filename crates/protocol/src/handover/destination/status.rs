//! What others may read of the destination's machine. Nothing here changes it.

use super::{Destination, State};
use crate::handover::{ColdStart, Doubt, Ended, Guest, Snapshot};
use crate::id::Epoch;

impl Destination {
    /// All of it at once.
    pub(super) fn read(&self) -> Snapshot {
        Snapshot {
            state: self.state(),
            attempt: self.attempt,
            guest: self.guest,
            cold_start: self.cold_start(),
            doubt: self.doubt(),
            ended: self.ended(),
            is_ours: self.is_ours(),
            is_theirs: false,
            is_receiving: self.is_preparing(),
            may_give_up: self.may_give_up(),
            may_force_owner: self.may_force_owner(),
            may_move_on: self.ended().is_some(),
        }
    }

    /// The epoch at which this host owns the VM, or would.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Which attempt of the source this is, from 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// What the machine believes of this host's QEMU.
    #[must_use]
    pub fn guest(&self) -> Guest {
        self.guest
    }

    /// How it ended, once it has.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        match self.state {
            State::Ended(ended) => Some(ended),
            _ => None,
        }
    }

    /// Whether the VM is this host's, whatever else is still to be settled.
    #[must_use]
    pub fn is_owner(&self) -> bool {
        matches!(
            self.state,
            State::Starting
                | State::Owner
                | State::Closing(Ended::Moved)
                | State::Ended(Ended::Moved)
        )
    }

    /// Whether something may still be received.
    #[must_use]
    pub fn is_preparing(&self) -> bool {
        self.state == State::Preparing
    }

    /// Whether an operator's decision for this host can be taken
    /// ([`On::ForceOwner`]).
    #[must_use]
    pub fn may_force_owner(&self) -> bool {
        matches!(self.state, State::Ready | State::Owner | State::Declined)
    }

    /// Whether the VM is this host's and open to its operators: past its start.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.is_owner() && self.state != State::Starting
    }

    /// Whether a failure or a cancel can still be taken
    /// ([`On::GiveUp`]).
    #[must_use]
    pub fn may_give_up(&self) -> bool {
        matches!(self.state, State::Preparing | State::Ready)
    }

    /// Whether the VM may be started here from the destination's disks.
    #[must_use]
    pub fn cold_start(&self) -> ColdStart {
        match self.state {
            State::Ended(Ended::Moved) => ColdStart::Allowed,
            State::Starting | State::Owner | State::Closing(Ended::Moved) => ColdStart::Unconfirmed,
            _ => ColdStart::NotOwner,
        }
    }

    /// What this host cannot settle by itself now.
    #[must_use]
    pub fn doubt(&self) -> Option<Doubt> {
        match self.state {
            State::Ready => Some(Doubt::CommitUnheard),
            State::Owner if self.guest.is_absent() => Some(Doubt::Unconfirmed),
            State::Declined => Some(Doubt::GivenBack),
            State::UnknownDurability => Some(Doubt::UnknownDurability),
            _ => None,
        }
    }

    /// Name of the state, for logs and errors.
    #[must_use]
    pub fn state(&self) -> &'static str {
        match self.state {
            State::Preparing => "preparing",
            State::Readying => "readying",
            State::Ready => "ready",
            State::Repeating => "repeating",
            State::Owning => "owning",
            State::Starting => "starting",
            State::Owner => "owner",
            State::Declining { .. } => "declining",
            State::Declined => "declined",
            State::Freeing => "freeing",
            State::Closing(_) => "closing",
            State::Ended(Ended::Moved) => "moved",
            State::Ended(Ended::Stayed) => "stayed",
            State::Ended(Ended::Superseded) => "superseded",
            State::UnknownDurability => "unknown-durability",
        }
    }
}
