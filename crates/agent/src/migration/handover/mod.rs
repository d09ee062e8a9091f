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
mod operator;
mod restore;
mod source;

use std::sync::Arc;
use std::time::Duration;

use limosa_protocol::handover::{ColdStart, Doubt, Ended};
use limosa_protocol::id::{HostName, MigrationId, VmName};
use limosa_qemu::{power, process};

pub(crate) use destination::{DestinationDriver, first_record as first_destination_record};
pub(crate) use durable::{Durable, VmChange};
pub(crate) use operator::{force_owner, recovery};
pub(crate) use restore::{restore, settle};
pub(crate) use source::{Handed, SourceDriver};

use super::job::Job;
use crate::agent::Agent;
use crate::failure::{Failure, Hindrance, OrFail, Result};
use crate::store::{MigrationRecord, RunRecord, StoreError};
use crate::vm::{Qemu, Vm};

/// How often a host that owes a word is asked again.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// Longest wait for the other host's last word before the VM's next move.
const SETTLE_MAX: Duration = Duration::from_secs(5);

/// What came of asking the other host for the word that it owes.
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

    /// Of what a machine cannot settle by itself: what the other host does not
    /// settle either.
    fn doubt(self, of_machine: Option<Doubt>) -> Option<Doubt> {
        of_machine.filter(|doubt| self != Self::Settles || *doubt == Doubt::UnknownDurability)
    }

    /// Why the other host does not settle it, and what makes it do so.
    fn text(self, peer: &HostName) -> String {
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

/// How one half stands, to be looked at without waiting for its machine.
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
    /// It was handed over: only the other host's word or an operator brings it back.
    pub(crate) is_theirs: bool,
    /// An operator may decide for this host.
    pub(crate) may_force_owner: bool,
    /// The other host, which does not answer, owes the word without which the VM
    /// cannot move on.
    pub(crate) awaits_peer: bool,
}

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
        let view = self.job().view();
        match self {
            Self::Source(_) => view.destination,
            Self::Destination(_) => view.source,
        }
    }

    /// Tells the machine that the VM's QEMU has ended.
    pub(crate) fn qemu_gone(&self) {
        match self {
            Self::Source(driver) => driver.gone.cancel(),
            Self::Destination(driver) => driver.gone.cancel(),
        }
    }

    /// Lets the VM go on to its next migration: waits a moment for the word that
    /// the other host of this one owes. Without it that host may be made the owner
    /// by its operator, and nobody here would hear of it.
    pub(crate) async fn move_on(&self) -> Result<()> {
        let mut status = match self {
            Self::Source(driver) => {
                driver.move_on().await;
                driver.watch()
            }
            Self::Destination(driver) => driver.watch(),
        };
        let settled = status.wait_for(|now| now.ended.is_some());
        if matches!(tokio::time::timeout(SETTLE_MAX, settled).await, Ok(Ok(_))) {
            return Ok(());
        }
        Err(self.awaited_answer().into())
    }

    /// That the VM cannot move on yet, and what to do about it.
    pub(crate) fn awaited_answer(&self) -> Hindrance {
        let (peer, vm) = (self.peer(), self.job().view().vm);
        Hindrance {
            message: format!(
                "VM {vm} is this host's, and {peer} has not confirmed yet that it is out of it"
            ),
            remedy: format!(
                "{peer} is asked every second, and then the VM can move. If {peer} is gone for \
                 good, `limosa vm recover {vm} --force-owner` does without its word"
            ),
        }
    }

    /// Why the VM may not be changed now, if it may not, and what to do about it.
    pub(crate) fn hindrance(&self) -> Option<Hindrance> {
        let status = self.status();
        let vm = self.job().view().vm;
        if status.is_ours {
            return None;
        }
        Some(match status.doubt {
            Some(doubt) => Hindrance {
                message: format!("VM {vm} is in doubt"),
                remedy: self.doubt_text(doubt),
            },
            None if status.is_theirs => Hindrance {
                message: format!("VM {vm} belongs to {}, to which it was handed over", self.peer()),
                remedy: format!(
                    "work with it there; `limosa migration show {}` tells what is left to do here",
                    self.id()
                ),
            },
            None => Hindrance {
                message: format!("VM {vm} is being moved"),
                remedy: format!(
                    "wait for it with `limosa migration watch {0}`, or end it with `limosa \
                     migration cancel {0}`",
                    self.id()
                ),
            },
        })
    }

    /// The same, as a failure.
    pub(crate) fn expect_ours(&self) -> Result<()> {
        match self.hindrance() {
            None => Ok(()),
            Some(hindrance) => Err(hindrance.into()),
        }
    }

    /// Why the VM may not be started anew from this host's disks, if it may not.
    pub(crate) fn expect_cold_start(&self) -> Result<()> {
        let (peer, vm) = (self.peer(), self.job().view().vm);
        match self.status().cold_start {
            ColdStart::Allowed => Ok(()),
            ColdStart::Unconfirmed => Err(Failure::conflict(format!(
                "VM {vm} is this host's, and {peer} has not confirmed yet that it is out of it; it \
                 is asked every second. If {peer} is gone for good, `limosa vm recover {vm}` says \
                 what to do"
            ))),
            ColdStart::NotOwner => self.expect_ours(),
        }
    }

    /// What a doubt is, and what settles it.
    pub(crate) fn doubt_text(&self, doubt: Doubt) -> String {
        doubt_text(doubt, self.status().peer, &self.peer(), &self.job().view().vm)
    }
}

/// What a doubt is, and what settles it.
fn doubt_text(doubt: Doubt, peer_answer: PeerAnswer, peer: &HostName, vm: &VmName) -> String {
    let what = match doubt {
        Doubt::CommitUnanswered => format!(
            "handed over to {peer}, which does not say whether the VM runs; the copy here stays \
             stopped"
        ),
        Doubt::CommitUnheard => format!(
            "the whole VM is here, and {peer} does not say whether it handed it over; the copy \
             here stays stopped"
        ),
        Doubt::Unconfirmed => format!(
            "the VM is this host's and off, and {peer} has not confirmed that it is out of it"
        ),
        Doubt::GivenBack => format!(
            "the whole VM is here, stopped; it was given back to {peer}, which has not said that \
             it has it"
        ),
        Doubt::UnknownDurability => {
            return "whether the last step was recorded is not known, because the \
            state store failed; the copy here stays as it is. Look at the disk of the state \
            folder, then restart limosad here: it settles by reading its record again"
                .to_owned();
        }
    };
    format!(
        "{what}. {}; if {peer} is gone for good, see `limosa vm recover {vm}`",
        peer_answer.text(peer)
    )
}

/// Tells a doubt when it comes or changes, and that it is over.
fn report_doubt(job: &Job, peer: &HostName, before: Status, now: Status) {
    if (before.doubt, before.peer) == (now.doubt, now.peer) {
        return;
    }
    match now.doubt {
        Some(doubt) => {
            let text = doubt_text(doubt, now.peer, peer, &job.view().vm);
            tracing::warn!(migration = %job.id(), reason = text, "in doubt");
            // A VM that is ours and off has ended its migration as far as an
            // operator who waits for it is concerned.
            if !now.is_ours {
                job.report_in_doubt(text);
            }
        }
        None if before.doubt.is_some() => job.clear_doubt(),
        None => {}
    }
}

/// Stops the vCPUs of a VM that another host owns, by ending its QEMU if need be:
/// two of them must not run.
async fn stop_guest(vm: &Vm) {
    let of_vm = vm.lock().await;
    let stopped = match &of_vm.qemu {
        Some(qemu) => power::stop(&qemu.qmp).await.or_fail("stopping the guest"),
        None => Err(Failure::internal("its QEMU does not answer")),
    };
    let Err(failure) = stopped else { return };
    let process = match (&of_vm.qemu, &of_vm.record.run) {
        (Some(qemu), _) => Some(&qemu.process),
        (None, run) => run.as_ref().map(|run| &run.process),
    };
    let Some(process) = process else { return };
    tracing::error!(vm = %vm.name, %failure, "another host owns the VM: its QEMU here is ended");
    if let Err(error) = process::kill(process).await {
        tracing::error!(vm = %vm.name, %error, "QEMU of a VM that another host owns was not ended");
    }
}

/// Ends a QEMU that was started and does not answer, known only by its record.
async fn end_unanswering(qemu: Option<&Qemu>, run: Option<&RunRecord>) -> Result<()> {
    match (qemu, run) {
        (None, Some(run)) => {
            process::kill(&run.process).await.or_fail("ending a QEMU that does not answer")
        }
        _ => Ok(()),
    }
}

/// Forgets a half that is settled; its record stays, and answers.
fn forget(agent: &Agent, id: MigrationId) {
    agent.migrations.remove(id);
    if let Err(error) = agent.store.forget_old_migrations() {
        tracing::warn!(error = crate::failure::chain(&error), "old migrations stay recorded");
    }
}

/// Logs a record that may or may not be durable.
fn report_unknown(record: &MigrationRecord, error: &StoreError) {
    tracing::error!(
        migration = %record.view.id,
        error = crate::failure::chain(error),
        "a record of the handover may or may not be written; nothing more is done until a restart"
    );
}
