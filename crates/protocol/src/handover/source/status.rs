//! What others may read of the source's machine. Nothing here changes it.

use super::{Source, State};
use crate::handover::{ColdStart, Doubt, Ended, Guest, Snapshot};
use crate::id::Epoch;

impl Source {
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
            is_theirs: self.is_handed_over(),
            is_receiving: false,
            may_give_up: self.may_give_up(),
            may_force_owner: self.may_force_owner(),
            may_move_on: self.ended().is_some() || self.may_move_on(),
        }
    }

    /// The epoch reserved for the destination.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.reserved
    }

    /// Which attempt to hand over this is, from 1.
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

    /// Whether an abort or a cancel can still be taken ([`On::GiveUp`]).
    #[must_use]
    pub fn may_give_up(&self) -> bool {
        matches!(self.state, State::Copying | State::Asking)
    }

    /// Whether an operator's decision for this host can be taken
    /// ([`On::ForceOwner`]).
    #[must_use]
    pub fn may_force_owner(&self) -> bool {
        matches!(self.state, State::HandedOver | State::Keeping)
    }

    /// Whether the commit point is passed: only the destination's word or the
    /// operator's brings the VM back.
    #[must_use]
    pub fn is_handed_over(&self) -> bool {
        matches!(self.state, State::HandedOver | State::Retiring | State::Closing(Ended::Moved))
    }

    /// Whether the VM is this host's, whatever the destination has yet to confirm.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        matches!(
            self.state,
            State::Keeping | State::Closing(Ended::Stayed) | State::Ended(Ended::Stayed)
        )
    }

    /// Whether a VM that was kept can move on without the destination's word
    /// ([`On::MovesOn`]).
    #[must_use]
    pub fn may_move_on(&self) -> bool {
        self.state == State::Keeping && !self.may_be_ready
    }

    /// Whether the VM may be started here from the source's disks.
    #[must_use]
    pub fn cold_start(&self) -> ColdStart {
        match self.state {
            State::Ended(Ended::Stayed) => ColdStart::Allowed,
            State::Copying
            | State::Asking
            | State::Resuming { .. }
            | State::Keeping
            | State::Closing(Ended::Stayed) => ColdStart::Unconfirmed,
            _ => ColdStart::NotOwner,
        }
    }

    /// What this host cannot settle by itself now.
    #[must_use]
    pub fn doubt(&self) -> Option<Doubt> {
        match self.state {
            State::HandedOver => Some(Doubt::CommitUnanswered),
            State::Keeping if self.guest.is_absent() => Some(Doubt::Unconfirmed),
            State::UnknownDurability => Some(Doubt::UnknownDurability),
            _ => None,
        }
    }

    /// Name of the state, for logs and errors.
    #[must_use]
    pub fn state(&self) -> &'static str {
        match self.state {
            State::Copying => "copying",
            State::Asking => "asking",
            State::Committing => "committing",
            State::HandedOver => "handed-over",
            State::Retiring => "retiring",
            State::TakingBack { .. } => "taking-back",
            State::Resuming { .. } => "resuming",
            State::Keeping => "keeping",
            State::Closing(_) => "closing",
            State::Ended(Ended::Moved) => "moved",
            State::Ended(Ended::Stayed) => "stayed",
            State::Ended(Ended::Superseded) => "superseded",
            State::UnknownDurability => "unknown-durability",
        }
    }
}
