//! Runs the two state machines of [`limosa_protocol::handover`]: gives them
//! events, performs what they order, and says their words to the other host.
//!
//! ```text
//! phases, QEMU's end, operator ─┐                     ┌─► store (a receipt comes back)
//! the other host's words ───────┼─► feed ─► machine ──┼─► QEMU, files
//! silence ──────────────────────┘                     └─► words ─► the other host
//! ```
//!
//! **Invariants.** Nothing else writes a migration's stage, runs or frees a VM
//! that changes hosts. A machine is locked while its orders are performed, and
//! never while a word is on its way: two hosts cannot wait for each other. The
//! lock of a machine is taken before that of its VM, never after.

mod destination;
mod durable;
mod guest;
mod lock;
mod operator;
mod report;
mod restore;
mod source;
mod status;

use std::sync::Arc;
use std::time::Duration;

use limosa_protocol::handover::Doubt;
use limosa_protocol::id::{HostName, MigrationId};
use tokio::sync::watch;

pub(crate) use destination::DestinationDriver;
pub(crate) use durable::{Durable, VmChange};
pub use operator::{force_owner, recovery};
pub use restore::{Restored, restore, settle};
pub(crate) use source::{Handed, SourceDriver};

use self::lock::Parties;
use self::status::Status;
use super::job::Job;
use limosa_host::failure::Result;

/// Longest wait for the other host's last word before the VM's next move.
const SETTLE_MAX: Duration = Duration::from_secs(5);

/// One half of a migration that is not settled yet.
#[derive(Clone)]
pub(crate) enum Handover {
    Source(Arc<SourceDriver>),
    Destination(Arc<DestinationDriver>),
}

impl Handover {
    pub(crate) fn status(&self) -> Status {
        match self {
            Self::Source(driver) => driver.status(),
            Self::Destination(driver) => driver.status(),
        }
    }

    /// The status from now on.
    pub(crate) fn watch(&self) -> watch::Receiver<Status> {
        match self {
            Self::Source(driver) => driver.watch(),
            Self::Destination(driver) => driver.watch(),
        }
    }

    pub(crate) fn job(&self) -> &Arc<Job> {
        match self {
            Self::Source(driver) => driver.job(),
            Self::Destination(driver) => driver.job(),
        }
    }

    pub(crate) fn id(&self) -> MigrationId {
        self.job().id()
    }

    /// The other host.
    pub(crate) fn peer(&self) -> HostName {
        Parties::of(&self.job().view()).into_peer()
    }

    /// Lets the VM go on to its next migration: waits a moment for the word that
    /// the other host of this one owes. Without it that host may be made the owner
    /// by its operator, and nobody here would hear of it.
    pub(crate) async fn move_on(&self) -> Result<()> {
        if let Self::Source(driver) = self {
            driver.move_on().await;
        }
        let mut status = self.watch();
        let settled = status.wait_for(|now| now.ended.is_some());
        if matches!(tokio::time::timeout(SETTLE_MAX, settled).await, Ok(Ok(_))) {
            return Ok(());
        }
        Err(Parties::of(&self.job().view()).unconfirmed().into())
    }

    /// What a doubt is, and what settles it.
    pub(crate) fn doubt_text(&self, doubt: Doubt) -> String {
        Parties::of(&self.job().view()).doubt_text(doubt, self.status().peer)
    }
}
