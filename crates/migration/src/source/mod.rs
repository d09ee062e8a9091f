//! The source's half: one migration from the request to its end.
//!
//! ```text
//! prepare ─► mirror ─► pre-copy ─► switchover ═ handed-over ═► retire
//!    │         │          │  ◄─ again ─┤
//!    └─────────┴──────────┴────────────┴─► abort: the VM stays
//! ```
//!
//! **Invariant.** What ends before the commit point leaves the guest as it was
//! found ([`abort`]). From *ready?* on only [`super::handover`] decides.

mod abort;
mod link;
mod memory;
mod mirror;
mod outgoing;
mod prepare;
mod rate;
mod retire;
mod retry;
mod socket;
mod stop;
mod switchover;
mod undo;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use limosa_protocol::handover::{Record, Stage};
use limosa_protocol::migration::{Migration, MoveRequest, Phase};
use limosa_protocol::peer::Offer;
use limosa_qemu::power;
use tokio::sync::watch;

pub(crate) use retire::{free_source, left_behind};
pub(crate) use undo::{resume_source, undo_in_qemu};

use super::handover::{Handover, SourceDriver};
use super::job::Job;
use super::preflight;
use crate::migrations::Migrations;
use crate::migrations::Slot;
use limosa_host::failure::{Failure, OrFail, Result};
use limosa_host::store::MigrationRecord;
use limosa_host::vm::{Inner, Qemu, Vm, run};
use link::LinkState;
use outgoing::Outgoing;
use stop::Switched;

/// Where the phases begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    /// At the first phase, with nothing at the destination
    First,
    /// With contents there, and a guest that runs on after a switchover that was given up
    Retry,
}

/// Begins a migration that has passed preflight: records it, and leaves the rest to a task.
pub(crate) async fn begin(
    migrations: &Arc<Migrations>,
    vm: &Arc<Vm>,
    request: MoveRequest,
    job: &Arc<Job>,
    slot: Slot<'_>,
) -> Result<Migration> {
    // What another host has to say of an earlier move, this one makes void.
    if let Some(earlier) = migrations.unsettled(&vm.name) {
        earlier.move_on().await?;
    }
    let mut inner = vm.lock_for_change().await?;
    inner.expect_owned()?;
    inner.expect_cold_start()?;
    job.begin();
    let offer = preflight::make_offer(migrations, &inner, &request, job.id()).await?;
    let was_running = runs(&inner).await?;
    let qemu = match &inner.qemu {
        Some(qemu) => qemu.clone(),
        // A VM that is off needs something that reads its disks.
        None => run::launch(&migrations.context.host, &inner.definition, false).await?,
    };
    let record = first_record(&inner, &offer, job, was_running, &qemu);
    let started = SourceDriver::begin(&migrations.context, vm, job, record, &qemu)
        .and_then(|driver| Ok((Arc::clone(&driver), driver.link()?)));
    let (driver, link) = match started {
        Ok(started) => started,
        Err(failure) => {
            if inner.qemu.is_none() {
                run::end(&qemu).await?;
            }
            migrations.context.host.store.remove::<MigrationRecord>(&job.id().to_string())?;
            return Err(failure);
        }
    };
    migrations.add(Handover::Source(Arc::clone(&driver)), None, slot);
    inner.lock = driver.initial_lock();
    drop(inner);
    let view = job.view();
    supervise(Outgoing {
        context: Arc::clone(&migrations.context),
        vm: Arc::clone(vm),
        job: Arc::clone(job),
        link,
        offer,
        driver,
        qemu,
        was_running,
        plane: None,
        link_state: watch::Sender::new(LinkState::Up),
        through: Arc::default(),
        differs: false,
        connector: None,
        link_keeper: None,
        stop_count: 0,
        mirrors_end: false,
        mirrored: BTreeSet::new(),
        events: None,
        exports: Vec::new(),
    });
    Ok(view)
}

/// The record of a migration whose offer is about to be made.
fn first_record(
    inner: &Inner,
    offer: &Offer,
    job: &Job,
    was_running: bool,
    qemu: &Qemu,
) -> MigrationRecord {
    let is_off = !offer.plan.moves_memory();
    MigrationRecord {
        handover: Record::first(offer.migration, Stage::Offered, offer.epoch),
        paused: !is_off && !was_running,
        plan: offer.plan.clone(),
        view: job.view(),
        definition: Some(inner.definition.clone()),
        made: Vec::new(),
        run: is_off.then(|| run::run_record(qemu)),
        addresses: Vec::new(),
        has_run: false,
        forced: None,
    }
}

/// Runs a source in a task of its own; a panic in it ends the move as any failure does.
fn supervise(source: Outgoing) {
    let (job, driver) = (Arc::clone(&source.job), Arc::clone(&source.driver));
    job.supervise(source.run(), async move {
        let reason = "a fault in limosad ended the move; its log says which";
        driver.give_up(reason.to_owned(), false).await;
    });
}

/// Whether the guest's vCPUs run; a failure when the VM does not move as it is.
async fn runs(inner: &Inner) -> Result<bool> {
    let Some(qemu) = &inner.qemu else { return Ok(false) };
    let status = power::query_status(&qemu.qmp).await.or_fail("asking QEMU")?;
    preflight::movable(&inner.definition.name, status)
        .map_err(|problem| Failure::problems("the VM changed meanwhile", vec![problem]))
}

impl Outgoing {
    async fn run(mut self) {
        let mut start = Start::First;
        loop {
            match self.drive(start).await {
                Ok(Some(switched)) => match self.handover(switched).await {
                    Some(source) => self = source,
                    None => return,
                },
                Ok(None) => {}
                Err(failure) => return abort::abort(self, &failure).await,
            }
            start = Start::Retry;
        }
    }

    /// Goes through the phases until everything is at the destination; `None` when that
    /// has it, or may, but the guest was paused for too long.
    async fn drive(&mut self, start: Start) -> Result<Option<Switched>> {
        let job = Arc::clone(&self.job);
        let link_ended = Self::link_ended(self.link_state.subscribe());
        let work = async {
            match start {
                Start::First => {
                    self.prepare().await?;
                    self.job.enter(Phase::Mirror);
                    self.mirror().await?;
                }
                Start::Retry => self.resume_for_retry().await?,
            }
            let switched = if self.plan().moves_memory() {
                self.pre_copy().await?
            } else {
                self.job.enter(Phase::Switchover);
                Some(self.stop_without_memory().await?)
            };
            let Some(switched) = switched else { return Ok(None) };
            self.through.store(true, Ordering::Release);
            Ok(self.verify_fully().await?.then_some(switched))
        };
        // An operator's cancel drops the work where it is; `abort` undoes it.
        tokio::select! {
            result = work => result,
            failure = link_ended => Err(failure),
            () = job.cancelled() => Err(Failure::conflict("cancelled by an operator")),
        }
    }
}
