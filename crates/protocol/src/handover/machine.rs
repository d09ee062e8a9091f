//! The interface that both state machines share.
//!
//! ```text
//! receipt of the first record ─► begin ──┐
//! receipt after a restart ─────► restore ┴─► machine ◄─ event ─ on ─► actions
//!                                               └─► Snapshot, for readers
//! ```
//!
//! **Invariant.** `on` alone changes a machine; a refused event leaves it as it was.

use super::{ColdStart, Doubt, Ended, Guest, IllegalEvent, Receipt, WrongRecord};

/// A state machine of the handover: events in, actions out.
pub trait Machine: Sized {
    /// What happens to it.
    type Event: std::fmt::Debug;
    /// What it orders.
    type Action: std::fmt::Debug;

    /// A machine whose first record is durable.
    ///
    /// - `guest`: the source's is `Running` or `Off`, the destination's `Stopped` or `Off`.
    ///
    /// # Errors
    /// [`WrongRecord`] when another record was written.
    fn begin(first: Receipt, guest: Guest) -> Result<Self, WrongRecord>;

    /// The machine of a restarted agent, and the actions with which it continues.
    ///
    /// - `receipt`: of the record that the store held, written anew.
    /// - `guest`: at a destination `Running`, unless it surely never ran there.
    ///
    /// # Errors
    /// [`WrongRecord`] when the record belongs to the other role.
    fn restore(receipt: Receipt, guest: Guest) -> Result<(Self, Vec<Self::Action>), WrongRecord>;

    /// Takes an event; the agent performs the actions in order. An event that is late,
    /// repeated or of another epoch gives no actions.
    ///
    /// # Errors
    /// [`IllegalEvent`]; the state is then as before.
    fn on(&mut self, event: Self::Event) -> Result<Vec<Self::Action>, IllegalEvent>;

    /// What others may read of the machine.
    fn snapshot(&self) -> Snapshot;
}

/// A machine's state for its readers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snapshot {
    /// The state's name, for logs and errors
    pub state: &'static str,
    /// The attempt, from 1
    pub attempt: u32,
    /// What the machine knows of this host's QEMU
    pub guest: Guest,
    /// Whether the VM may be started from this host's disks
    pub cold_start: ColdStart,
    /// What the machine cannot settle without its peer
    pub doubt: Option<Doubt>,
    /// How the migration ended, once it has
    pub ended: Option<Ended>,
    /// The VM belongs to this host, whatever the peer has yet to confirm
    pub is_ours: bool,
    /// The commit point is passed: the VM belongs to the peer
    pub is_theirs: bool,
    /// The destination may still receive contents
    pub is_receiving: bool,
    /// A failure or a cancel can still be taken
    pub may_give_up: bool,
    /// An operator's decision for this host can be taken
    pub may_force_owner: bool,
    /// The VM's next move needs no confirmation by the peer
    pub may_move_on: bool,
}
