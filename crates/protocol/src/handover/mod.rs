//! Who may run a VM while it changes hosts: two state machines without I/O,
//! clock or threads. Events in, actions out; the agents only perform them.
//!
//! ```text
//! source                                   destination
//! offered ──────── everything sent ──────► preparing ─► ready (durable)
//! handed-over (durable: the commit point) ◄── ready
//!         ──────── commit ───────────────► owner (durable) ─► the guest runs
//! done ◄─────────── running ────────────── done
//!
//! any end before the commit point: the source goes on, the destination
//! declines (durable) and frees what it has
//! ```
//!
//! **Invariants**, checked by a model over this very code (`tests/handover.rs`):
//! the guest never runs on two hosts; a host runs it only from the newest copy;
//! there is always a host from which it can be started; every run that heals
//! ends with exactly one owner.
//!
//! What is durable is said by a [`Receipt`], which only [`persist`] makes: code
//! that did not wait for the store cannot claim that it did.

mod destination;
mod source;

use serde::{Deserialize, Serialize};

pub use destination::{Destination, DestinationAction, DestinationEvent};
pub use source::{Source, SourceAction, SourceEvent};

use crate::id::Epoch;

/// How far one host's half of a migration got, as the durable record says.
///
/// The order of a source is offered, handed-over, done, or stayed in place of
/// done; of a destination preparing, ready, owner, done, or declined in place of
/// any of the first three and, when the guest never ran, of owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Source: the VM is still its alone
    Offered,
    /// Source: past the commit point; the guest never runs here again unless
    /// the destination declines
    HandedOver,
    /// Destination: receiving
    Preparing,
    /// Destination: holds everything, waits for the commit
    Ready,
    /// Destination: the VM belongs to it; the guest may have run
    Owner,
    /// Destination: gave up, and ran nothing
    Declined,
    /// Source: the VM is its own again, or still
    Stayed,
    /// Both: the VM moved, and nothing is left to do
    Done,
}

/// What a host writes down before it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Record {
    /// How far it got
    pub stage: Stage,
    /// Epoch at which the destination owns the VM. A source that takes the VM
    /// back writes the next one, so that nothing repeated fits any more.
    pub epoch: Epoch,
}

/// A place in which records survive the host.
pub trait Store {
    /// Why a record is not, or perhaps not, durable
    type Error;

    /// Writes a record; on `Ok` it survives a power failure.
    ///
    /// # Errors
    /// When that cannot be said. Whether the record is there is then unknown.
    fn put(&mut self, record: &Record) -> Result<(), Self::Error>;
}

/// Proof that a record is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Receipt(Record);

impl Receipt {
    /// What is durable.
    #[must_use]
    pub fn record(&self) -> Record {
        self.0
    }
}

/// Writes a record and gives the proof of it.
///
/// # Errors
/// The store's.
pub fn persist<S: Store>(store: &mut S, record: Record) -> Result<Receipt, S::Error> {
    store.put(&record)?;
    Ok(Receipt(record))
}

/// What has become of the guest's QEMU while its agent was away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Guest {
    /// It lives, with the guest in it
    Alive,
    /// It ended, or the host was restarted
    Gone,
}

/// An event that must not happen in this state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{event} in state {state} of the hand-over")]
pub struct Unexpected {
    /// The state's name
    pub state: &'static str,
    /// The event, as it came
    pub event: String,
}
