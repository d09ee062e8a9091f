//! The source's half: performs what [`limosa_protocol::handover::Source`] orders.
//!
//! ```text
//! source ─ Delivered, Ready, GiveUp ─► machine ─► records, QEMU, files
//!     ▲                                     │
//!     └────────────── words ◄───────────────┘
//! ```

mod messages;

use std::sync::Arc;

use limosa_protocol::handover::{
    Ended, Guest, Machine, Receipt, Record, Source, SourceAction as Do, SourceEvent as On, Stage,
    persist,
};
use limosa_protocol::id::HostName;
use limosa_protocol::migration::{Downtime, Outcome};
use tokio::sync::{Mutex, watch};

use super::durable::{Durable, VmChange};
use super::guest::{end_unanswering, stop_guest};
use super::lock::{Parties, initial_lock, publish_lock};
use super::report::{report_doubt, report_unknown};
use super::status::{PeerAnswer, Status};
use crate::context::Context;
use crate::job::Job;
use crate::peer::PeerClient;
use crate::source::{free_source, left_behind, resume_source, undo_in_qemu};
use limosa_host::failure::{Failure, Result};
use limosa_host::store::MigrationRecord;
use limosa_host::vm::lock::VmLock;
use limosa_host::vm::{Qemu, Vm, run};

/// One unsettled migration at its source.
pub(crate) struct SourceDriver {
    context: Arc<Context>,
    vm: Arc<Vm>,
    job: Arc<Job>,
    destination: HostName,
    inner: Mutex<Inner>,
    status: watch::Sender<Status>,
    /// The connection that is kept for the next message.
    link: std::sync::Mutex<Option<Arc<PeerClient>>>,
}

struct Inner {
    machine: Source,
    record: MigrationRecord,
    /// The guest's QEMU; for a VM that is off, one that only reads its disks.
    qemu: Option<Qemu>,
    handed: Handed,
    reason: Option<String>,
    /// The connection broke, so its reason is at the other end.
    reason_is_theirs: bool,
    /// What came of asking for the word that the destination owes.
    peer: PeerAnswer,
    /// Operators may work with the VM.
    is_open: bool,
    /// The VM is held for this migration: operators have not got it back.
    is_under_way: bool,
    /// The lock that was put on the VM last
    lock: Option<VmLock>,
}

/// What the end of a move tells of it.
#[derive(Default)]
pub(crate) struct Handed {
    pub(crate) downtime: Option<Downtime>,
    pub(crate) proofs: Vec<String>,
}

impl SourceDriver {
    /// Records the offer, and begins.
    pub(crate) fn begin(
        context: &Arc<Context>,
        vm: &Arc<Vm>,
        job: &Arc<Job>,
        mut record: MigrationRecord,
        qemu: &Qemu,
    ) -> Result<Arc<Self>> {
        let first = record.handover;
        let mut store =
            Durable { store: &context.host.store, migration: &mut record, vm: VmChange::Keep };
        let receipt = persist(&mut store, first)?;
        let guest = if record.is_off() { Guest::Off } else { Guest::Running };
        let machine =
            Source::begin(receipt, guest).map_err(|wrong| Failure::internal(wrong.to_string()))?;
        Ok(Self::new(context, vm, job, machine, record, Some(qemu.clone())))
    }

    /// Goes on from a record; what the machine orders first is to be given to
    /// [`SourceDriver::go_on`].
    pub(super) fn restore(
        context: &Arc<Context>,
        vm: &Arc<Vm>,
        record: MigrationRecord,
        receipt: Receipt,
        guest: Guest,
        qemu: Option<Qemu>,
    ) -> Result<(Arc<Self>, Vec<Do>)> {
        let (machine, actions) = Source::restore(receipt, guest)
            .map_err(|wrong| Failure::internal(wrong.to_string()))?;
        let job = Arc::new(Job::of_view(record.view.clone()));
        if !machine.may_give_up() {
            // Nobody can cancel what a restart found.
            job.pass_commit_point()?;
        }
        Ok((Self::new(context, vm, &job, machine, record, qemu), actions))
    }

    fn new(
        context: &Arc<Context>,
        vm: &Arc<Vm>,
        job: &Arc<Job>,
        machine: Source,
        record: MigrationRecord,
        qemu: Option<Qemu>,
    ) -> Arc<Self> {
        let destination = record.view.destination.clone();
        let now = Status::of(machine.snapshot(), PeerAnswer::Settles);
        let lock = initial_lock(&record.view, now);
        let is_under_way = record.view.ended_unix_ms.is_none();
        let status = watch::Sender::new(now);
        let driver = Arc::new(Self {
            context: Arc::clone(context),
            vm: Arc::clone(vm),
            job: Arc::clone(job),
            destination,
            inner: Mutex::new(Inner {
                machine,
                record,
                qemu,
                handed: Handed::default(),
                reason: None,
                reason_is_theirs: false,
                peer: PeerAnswer::Settles,
                is_open: false,
                is_under_way,
                lock,
            }),
            link: std::sync::Mutex::default(),
            status,
        });
        driver.spawn_qemu_watch();
        driver
    }

    pub(crate) fn job(&self) -> &Arc<Job> {
        &self.job
    }

    pub(crate) fn status(&self) -> Status {
        *self.status.borrow()
    }

    /// The lock with which a migration begins, or goes on after a restart. Whoever made this
    /// driver puts it on the VM, before it is used.
    pub(crate) fn initial_lock(&self) -> Option<VmLock> {
        initial_lock(&self.job.view(), self.status())
    }

    /// How it stands from now on.
    pub(super) fn watch(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// Which attempt to hand over this is.
    pub(crate) async fn attempt(&self) -> u32 {
        self.inner.lock().await.machine.attempt()
    }

    /// What the machine believes of this host's QEMU.
    pub(crate) async fn guest(&self) -> Guest {
        self.inner.lock().await.machine.guest()
    }

    /// Notes why a migration ends that a restart of this agent has ended.
    pub(super) async fn note_restart(&self) {
        let mut inner = self.inner.lock().await;
        inner.reason = Some("the source's agent was restarted; the VM stays".to_owned());
    }

    /// Notes what the end is to tell.
    pub(crate) async fn note_handed(&self, handed: Handed) {
        self.inner.lock().await.handed = handed;
    }

    /// Takes an event, performs what it leads to, and answers with the words
    /// that are to be said.
    pub(crate) async fn feed(&self, event: On) -> Vec<Do> {
        let mut inner = self.inner.lock().await;
        self.feed_locked(&mut inner, event).await
    }

    /// Performs what a restored machine orders first.
    pub(super) async fn go_on(&self, actions: Vec<Do>) -> Vec<Do> {
        let mut inner = self.inner.lock().await;
        let mut messages = Vec::new();
        if let Some(event) = self.perform(&mut inner, actions, &mut messages).await {
            messages.extend(self.feed_locked(&mut inner, event).await);
        }
        self.publish(&mut inner).await;
        messages
    }

    async fn feed_locked(&self, inner: &mut Inner, event: On) -> Vec<Do> {
        let mut messages = Vec::new();
        let mut next = Some(event);
        while let Some(event) = next.take() {
            match inner.machine.on(event) {
                Ok(actions) => next = self.perform(inner, actions, &mut messages).await,
                Err(illegal) => {
                    tracing::warn!(migration = %self.job.id(), %illegal, "nothing is done");
                }
            }
        }
        self.publish(inner).await;
        messages
    }

    /// Performs a list; its last action may have a result.
    async fn perform(
        &self,
        inner: &mut Inner,
        actions: Vec<Do>,
        messages: &mut Vec<Do>,
    ) -> Option<On> {
        for action in actions {
            match action {
                Do::Persist(record) => return Some(self.persist(inner, record).await),
                Do::TakeDisks => self.take_disks(inner).await,
                Do::RunGuest => return Some(self.run_guest(inner).await),
                Do::StopGuest => stop_guest(&self.vm).await,
                Do::FreeVm => {
                    self.free(inner).await;
                    return Some(On::Freed);
                }
                message => messages.push(message),
            }
        }
        None
    }

    async fn persist(&self, inner: &mut Inner, record: Record) -> On {
        let mut vm = VmChange::Keep;
        match record.stage {
            Stage::HandedOver => inner.record.view = self.job.view(),
            Stage::Owner | Stage::Stayed => {
                let mut of_vm = self.vm.lock().await;
                if of_vm.record.epoch != record.epoch {
                    of_vm.record.epoch = record.epoch;
                    vm = VmChange::Put(of_vm.record.clone());
                }
                drop(of_vm);
                if record.stage == Stage::Stayed {
                    self.note_end(inner, Outcome::Stayed);
                }
            }
            Stage::Done => {
                vm = VmChange::Remove;
                self.note_end(inner, Outcome::Moved);
            }
            Stage::Superseded => {
                let mut of_vm = self.vm.lock().await;
                of_vm.record.given_up_to = Some(self.destination.clone());
                vm = VmChange::Put(of_vm.record.clone());
                drop(of_vm);
                inner.reason = Some(format!(
                    "an operator gave the VM to {}; what is here is kept and never started",
                    self.destination
                ));
                // Whatever end was told before, it is not true any more.
                inner.record.view.ended_unix_ms = None;
                self.note_end(inner, Outcome::Moved);
            }
            Stage::Offered | Stage::Preparing | Stage::Ready | Stage::Declined => {}
        }
        let mut store =
            Durable { store: &self.context.host.store, migration: &mut inner.record, vm };
        match persist(&mut store, record) {
            Ok(receipt) => On::Recorded(receipt),
            Err(error) => {
                report_unknown(&inner.record, &error);
                On::RecordFailed
            }
        }
    }

    /// Puts the end into the record that is about to be written; it is told
    /// once that is durable.
    fn note_end(&self, inner: &mut Inner, end: Outcome) {
        inner.record.run = None;
        if inner.record.view.ended_unix_ms.is_none() {
            let Handed { downtime, proofs } = std::mem::take(&mut inner.handed);
            inner.record.view = self.job.ended_view(end, inner.reason.clone(), downtime, proofs);
        }
    }

    /// QEMU gives up what the migration began; its disks are its own again.
    async fn take_disks(&self, inner: &Inner) {
        if let Some(qemu) = &inner.qemu
            && let Err(failure) = undo_in_qemu(qemu).await
        {
            tracing::error!(vm = %self.vm.name, %failure, "the source's QEMU was not put in order");
        }
    }

    async fn run_guest(&self, inner: &mut Inner) -> On {
        // After a restart: it runs, or its user paused it since.
        let was_told = inner.record.view.outcome == Some(Outcome::Stayed);
        let Some(qemu) = inner.qemu.clone().filter(|_| !was_told && !inner.record.paused) else {
            return On::GuestRuns;
        };
        match resume_source(&qemu).await {
            Ok(()) => On::GuestRuns,
            Err(failure) => {
                tracing::error!(vm = %self.vm.name, %failure, "the guest was not let run again");
                let reason = inner.reason.take().unwrap_or_default();
                inner.reason = Some(format!("{reason}; besides, at the source: {failure}"));
                On::GuestNeverRan
            }
        }
    }

    async fn free(&self, inner: &mut Inner) {
        let mut of_vm = self.vm.lock().await;
        // From here on the watch on QEMU finds another one's VM.
        of_vm.qemu = None;
        let plan = &inner.record.plan;
        let qemu = inner.qemu.take();
        let left = match end_unanswering(qemu.as_ref(), of_vm.record.run.as_ref()).await {
            Ok(()) => {
                free_source(&self.context.host.folders, &of_vm.definition, qemu.as_ref(), plan)
                    .await
            }
            // Files of a process that lives are not removed below it.
            Err(failure) => vec![failure.to_string()],
        };
        inner.reason = left_behind(&left);
    }

    /// Tells where the machine stands now, and lets the VM go when it is ours.
    async fn publish(&self, inner: &mut Inner) {
        let status = Status::of(inner.machine.snapshot(), inner.peer);
        let before = self.status.send_replace(status);
        if status.is_ours && !inner.is_open {
            inner.is_open = true;
            self.let_go(inner).await;
        }
        if status.ended.is_none() {
            let lock = Parties::of(&self.job.view()).lock(status, inner.is_under_way);
            publish_lock(&self.vm, &mut inner.lock, lock).await;
        }
        report_doubt(&self.job, before, status);
        let Some(ended) = status.ended.filter(|_| before.ended.is_none()) else { return };
        // In one step, so that nobody finds a VM that is neither held nor gone.
        let mut of_vm = self.vm.lock().await;
        of_vm.lock = None;
        if ended == Ended::Moved {
            self.context.host.vms.remove(&self.vm, &mut of_vm);
        }
        drop(of_vm);
    }

    /// The VM is an operator's again; the other host is asked on beside it.
    async fn let_go(&self, inner: &mut Inner) {
        // The guest's own QEMU stays: the other host's word may yet order to stop it.
        let reader = if inner.record.is_off() { inner.qemu.take() } else { None };
        if let Some(qemu) = reader
            && let Err(failure) = run::end(&qemu).await
        {
            tracing::error!(vm = %self.vm.name, %failure, "a QEMU that read disks was not ended");
        }
        if !inner.record.is_off() && inner.machine.guest() == Guest::Gone {
            let reason = inner.reason.take().map_or_else(String::new, |reason| reason + "; ");
            inner.reason = Some(format!("{reason}QEMU of the VM ended, so it is off"));
        }
        inner.is_under_way = false;
    }
}
