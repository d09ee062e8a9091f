//! The destination's half: performs what
//! [`limosa_protocol::handover::Destination`] orders.
//!
//! ```text
//! destination ─ Complete, GiveUp ─► machine ─► records, QEMU, files
//! source's words ──────────────►    └─────► word, the answer to it
//! ```
//!
//! The destination never calls on its own but to ask: each request of the source
//! is answered with the word that is true after it.

mod messages;

use std::sync::{Arc, Mutex as BlockingMutex, PoisonError};

use limosa_plane::DestinationPlane;
use limosa_protocol::handover::{
    Destination, DestinationAction as Do, DestinationEvent as On, Ended, Guest, Machine, Receipt,
    Record, Stage, persist,
};
use limosa_protocol::id::{HostName, MigrationId};
use limosa_protocol::migration::Outcome;
use limosa_protocol::vm::VmDefinition;
use tokio::sync::{Mutex, watch};

use super::durable::{Durable, VmChange};
use super::guest::{end_unanswering, stop_guest};
use super::lock::{Parties, initial_lock, publish_lock};
use super::report::{report_doubt, report_unknown};
use super::status::{PeerAnswer, Status};
use crate::context::Context;
use crate::destination::{self, ConnectionGroup, expect_paused, resume_guest};
use crate::job::Job;
use crate::peer::PeerClient;
use limosa_host::failure::{Failure, Result};
use limosa_host::store::{MigrationRecord, VmRecord};
use limosa_host::vm::announce::announce;
use limosa_host::vm::lock::VmLock;
use limosa_host::vm::{Qemu, Vm, run};

/// One unsettled migration at its destination.
pub(crate) struct DestinationDriver {
    context: Arc<Context>,
    vm: Arc<Vm>,
    job: Arc<Job>,
    source: HostName,
    inner: Mutex<Inner>,
    status: watch::Sender<Status>,
    /// Ended when the copy is given up, whoever waits for it.
    plane: BlockingMutex<Option<Arc<DestinationPlane>>>,
    /// The connection that is kept for the next question.
    link: BlockingMutex<Option<PeerClient>>,
}

struct Inner {
    machine: Destination,
    record: MigrationRecord,
    definition: VmDefinition,
    /// From its start until the VM has it.
    qemu: Option<Qemu>,
    /// Operators may work with the VM.
    is_open: bool,
    /// The VM is held for this migration: operators have not got it back.
    is_under_way: bool,
    /// The lock that was put on the VM last
    lock: Option<VmLock>,
    /// What came of asking for the message that the source owes.
    peer: PeerAnswer,
    /// Answers in a row that nothing is decided.
    undecided_count: u32,
}

impl DestinationDriver {
    /// Records that the offer is taken, and begins.
    pub(crate) fn begin(
        context: &Arc<Context>,
        vm: &Arc<Vm>,
        job: &Arc<Job>,
        mut record: MigrationRecord,
        definition: VmDefinition,
    ) -> Result<Arc<Self>> {
        let first = record.handover;
        let mut store =
            Durable { store: &context.host.store, migration: &mut record, vm: VmChange::Keep };
        let receipt = persist(&mut store, first)?;
        let guest = if record.is_off() { Guest::Off } else { Guest::Stopped };
        let machine = Destination::begin(receipt, guest)
            .map_err(|wrong| Failure::internal(wrong.to_string()))?;
        Ok(Self::new(context, vm, job, machine, record, definition, None))
    }

    /// Goes on from a record; what the machine orders first is to be given to
    /// [`DestinationDriver::go_on`].
    pub(super) fn restore(
        context: &Arc<Context>,
        vm: &Arc<Vm>,
        record: MigrationRecord,
        receipt: Receipt,
        guest: Guest,
        qemu: Option<Qemu>,
        definition: VmDefinition,
    ) -> Result<(Arc<Self>, Vec<Do>)> {
        let (machine, actions) = Destination::restore(receipt, guest)
            .map_err(|wrong| Failure::internal(wrong.to_string()))?;
        let job = Arc::new(Job::of_view(record.view.clone()));
        vm.addresses.take(&record.addresses, &definition.nics);
        if !machine.may_give_up() {
            job.pass_commit_point()?;
        }
        Ok((Self::new(context, vm, &job, machine, record, definition, qemu), actions))
    }

    fn new(
        context: &Arc<Context>,
        vm: &Arc<Vm>,
        job: &Arc<Job>,
        machine: Destination,
        record: MigrationRecord,
        definition: VmDefinition,
        qemu: Option<Qemu>,
    ) -> Arc<Self> {
        let source = record.view.source.clone();
        let now = Status::of(machine.snapshot(), PeerAnswer::Settles);
        let lock = initial_lock(&record.view, now);
        let is_under_way = record.view.ended_unix_ms.is_none();
        let status = watch::Sender::new(now);
        let driver = Arc::new(Self {
            context: Arc::clone(context),
            vm: Arc::clone(vm),
            job: Arc::clone(job),
            source,
            inner: Mutex::new(Inner {
                machine,
                record,
                definition,
                qemu,
                is_open: false,
                is_under_way,
                lock,
                peer: PeerAnswer::Settles,
                undecided_count: 0,
            }),
            status,
            plane: BlockingMutex::default(),
            link: BlockingMutex::default(),
        });
        driver.spawn_qemu_watch();
        driver.spawn_note_of_run();
        driver
    }

    pub(crate) fn job(&self) -> &Arc<Job> {
        &self.job
    }

    pub(crate) fn id(&self) -> MigrationId {
        self.job.id()
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

    /// What the machine believes of this host's QEMU.
    pub(super) async fn guest(&self) -> Guest {
        self.inner.lock().await.machine.guest()
    }

    /// Whether something may still be received.
    pub(crate) fn expect_preparing(&self) -> Result<()> {
        if self.status().is_receiving {
            return Ok(());
        }
        Err(Failure::conflict("this migration takes nothing more"))
    }

    /// The same, once nothing is being done: given up and freed, or not.
    pub(crate) async fn still_prepares(&self) -> bool {
        let _idle = self.inner.lock().await;
        self.expect_preparing().is_ok()
    }

    /// Changes the record while receiving, durably.
    pub(crate) async fn note(&self, change: impl FnOnce(&mut MigrationRecord)) -> Result<()> {
        let mut inner = self.inner.lock().await;
        self.expect_preparing()?;
        change(&mut inner.record);
        Ok(self.context.host.store.put(&self.id().to_string(), &inner.record)?)
    }

    /// Notes the QEMU that receives, durably.
    pub(crate) async fn note_qemu(&self, qemu: &Qemu) -> Result<()> {
        let mut inner = self.inner.lock().await;
        // Also when the migration was given up meanwhile: whoever made it ends it.
        self.expect_preparing()?;
        inner.qemu = Some(qemu.clone());
        inner.record.run = Some(run::run_record(qemu));
        Ok(self.context.host.store.put(&self.id().to_string(), &inner.record)?)
    }

    /// A VM that was off has no QEMU any more once its disks are here.
    pub(crate) async fn forget_reader(&self) {
        let mut inner = self.inner.lock().await;
        inner.qemu = None;
        inner.record.run = None;
    }

    pub(crate) fn hold_plane(&self, plane: DestinationPlane) {
        *self.lock_plane() = Some(Arc::new(plane));
    }

    /// The plane, unless nothing is received yet, or any more.
    pub(crate) fn plane(&self) -> Option<Arc<DestinationPlane>> {
        self.lock_plane().clone()
    }

    fn end_plane(&self) {
        let plane = self.lock_plane().take();
        if let Some(plane) = plane {
            destination::end_plane(plane);
        }
    }

    /// Has the plane go on over other connections; gives them back when there is
    /// none. Those that it cannot use are lost, which it tells itself.
    pub(crate) fn reconnect(&self, set: ConnectionGroup) -> Option<ConnectionGroup> {
        match &*self.lock_plane() {
            None => return Some(set),
            Some(plane) => {
                if let Err(error) = plane.reconnect(set.channels, set.return_path) {
                    tracing::warn!(migration = %self.id(), %error, "connections are not used");
                }
            }
        }
        None
    }

    fn lock_plane(&self) -> std::sync::MutexGuard<'_, Option<Arc<DestinationPlane>>> {
        self.plane.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an event, performs what it leads to, and answers with the words
    /// that are to be said.
    pub(crate) async fn feed(&self, event: On) -> Vec<Do> {
        let mut inner = self.inner.lock().await;
        self.feed_locked(&mut inner, event).await
    }

    /// Performs what a restored machine orders first.
    pub(super) async fn go_on(&self, actions: Vec<Do>) {
        let mut inner = self.inner.lock().await;
        let mut messages = Vec::new();
        if let Some(event) = self.perform(&mut inner, actions, &mut messages).await {
            self.feed_locked(&mut inner, event).await;
        }
        self.publish(&mut inner).await;
    }

    async fn feed_locked(&self, inner: &mut Inner, event: On) -> Vec<Do> {
        let mut messages = Vec::new();
        let mut next = Some(event);
        while let Some(event) = next.take() {
            match inner.machine.on(event) {
                Ok(actions) => next = self.perform(inner, actions, &mut messages).await,
                Err(illegal) => {
                    tracing::warn!(migration = %self.id(), %illegal, "nothing is done");
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
                // QEMU takes them when it lets the guest run.
                Do::TakeDisks => {}
                Do::RunGuest => return Some(self.run_guest(inner).await),
                Do::StopGuest => stop_guest(&self.vm).await,
                Do::FreeCopy => {
                    self.free(inner).await;
                    return Some(On::Freed);
                }
                message => messages.push(message),
            }
        }
        None
    }

    async fn persist(&self, inner: &mut Inner, record: Record) -> On {
        let vm = match record.stage {
            Stage::Owner => {
                // Nobody can cancel between here and the record; if somebody
                // just did, the commit was first.
                self.job.pass_commit_point().ok();
                VmChange::Put(self.vm_record(inner, record))
            }
            Stage::Declined => VmChange::Remove,
            Stage::Done => {
                let mut of_vm = self.vm.lock().await;
                of_vm.record.epoch = record.epoch;
                // Before its end is noted, which forgets its QEMU.
                let of_vm = if inner.is_open {
                    of_vm.record.clone()
                } else {
                    self.vm_record(inner, record)
                };
                self.note_end(inner, Outcome::Moved);
                VmChange::Put(of_vm)
            }
            Stage::Stayed => {
                self.note_end(inner, Outcome::Stayed);
                VmChange::Keep
            }
            Stage::Superseded => {
                let why = format!(
                    "an operator gave the VM to {}; what is here is kept and never started",
                    self.source
                );
                inner.record.view.reason = Some(why);
                self.note_end(inner, Outcome::Stayed);
                let mut of_vm = self.vm.lock().await;
                of_vm.record.given_up_to = Some(self.source.clone());
                VmChange::Put(of_vm.record.clone())
            }
            Stage::Preparing | Stage::Ready | Stage::Offered | Stage::HandedOver => VmChange::Keep,
        };
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

    fn vm_record(&self, inner: &Inner, record: Record) -> VmRecord {
        VmRecord {
            configuration: inner.definition.places.configuration.clone().unwrap_or_default(),
            epoch: record.epoch,
            run: inner.record.run.clone(),
            given_up_to: None,
        }
    }

    /// Puts the end into the record that is about to be written.
    fn note_end(&self, inner: &mut Inner, end: Outcome) {
        inner.record.run = None;
        let reason = inner.record.view.reason.clone();
        inner.record.view = self.job.ended_view(end, reason, None, Vec::new());
    }

    async fn run_guest(&self, inner: &mut Inner) -> On {
        let Some(qemu) = inner.qemu.clone() else { return On::GuestRuns };
        let runs = if inner.record.paused {
            expect_paused(&qemu, &self.context.host.folders.runtime_of(&inner.definition.name))
                .await
        } else {
            resume_guest(&qemu).await
        };
        if let Err(failure) = runs {
            inner.record.view.reason = Some(format!("the guest never ran here: {failure}"));
            return On::GuestNeverRan;
        }
        if !inner.record.paused {
            announce(&self.context.host.net, &self.vm, &inner.definition, &qemu).await;
        }
        On::GuestRuns
    }

    /// Notes, durably, that the guest is its users': one that stands after a
    /// restart is then not let run. Nobody waits for that.
    fn spawn_note_of_run(self: &Arc<Self>) {
        let (driver, mut status) = (Arc::downgrade(self), self.status.subscribe());
        self.job.spawn(async move {
            // The sender is the half's own: once that is gone, nothing is left to do.
            status.wait_for(|now| now.is_ours || now.ended.is_some()).await.ok();
            let Some(driver) = driver.upgrade() else { return };
            let mut inner = driver.inner.lock().await;
            if inner.machine.is_ours() && inner.machine.ended().is_none() && !inner.record.has_run {
                inner.record.has_run = true;
                if let Err(error) =
                    driver.context.host.store.put(&driver.id().to_string(), &inner.record)
                {
                    report_unknown(&inner.record, &error);
                }
            }
        });
    }

    async fn free(&self, inner: &mut Inner) {
        self.end_plane();
        let qemu = inner.qemu.take();
        // From here on the watch on QEMU finds another one's VM.
        self.vm.lock().await.qemu = None;
        let made = destination::removable(&inner.record.plan, inner.record.made.clone());
        let left = match end_unanswering(qemu.as_ref(), inner.record.run.as_ref()).await {
            Ok(()) => {
                destination::free(
                    &self.context.host.folders,
                    &inner.definition,
                    qemu.as_ref(),
                    &made,
                )
                .await
            }
            // Files of a process that lives are not removed below it.
            Err(failure) => vec![failure.to_string()],
        };
        if !left.is_empty() {
            let why = inner.record.view.reason.take().unwrap_or_default();
            inner.record.view.reason =
                Some(format!("{why}; left here, to be removed by hand: {}", left.join("; ")));
        }
        inner.record.made.clear();
    }

    /// Tells where the machine stands now, and opens the VM once it is ours.
    async fn publish(&self, inner: &mut Inner) {
        let status = Status::of(inner.machine.snapshot(), inner.peer);
        let before = self.status.send_replace(status);
        if status.is_ours && !inner.is_open {
            self.open(inner).await;
        }
        if status.ended.is_none() {
            let lock = Parties::of(&self.job.view()).lock(status, inner.is_under_way);
            publish_lock(&self.vm, &mut inner.lock, lock).await;
        }
        report_doubt(&self.job, before, status);
        let Some(ended) = status.ended.filter(|_| before.ended.is_none()) else { return };
        self.job.publish(&inner.record.view);
        // In one step, so that nobody finds a VM that is neither held nor gone.
        let mut of_vm = self.vm.lock().await;
        of_vm.lock = None;
        if ended == Ended::Stayed {
            self.context.host.vms.remove(&self.vm, &mut of_vm);
        }
        drop(of_vm);
    }

    /// The VM is this host's: operators may work with it from here on.
    async fn open(&self, inner: &mut Inner) {
        inner.is_open = true;
        // It was kept for another attempt.
        self.end_plane();
        inner.is_under_way = false;
        let mut of_vm = self.vm.lock().await;
        if let Some(qemu) = &of_vm.qemu {
            // Found again after a restart, which may have come before the
            // guest was announced.
            if !inner.record.paused {
                announce(&self.context.host.net, &self.vm, &inner.definition, qemu).await;
            }
            return;
        }
        of_vm.record = self.vm_record(inner, inner.record.handover);
        if let Some(qemu) = inner.qemu.take() {
            run::watch(&self.context.host, &self.vm, &mut of_vm, qemu).await;
        }
    }
}
