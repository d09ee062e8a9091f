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
mod again;
mod link;
mod memory;
mod mirror;
mod prepare;
mod retire;
mod socket;
mod switchover;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use limosa_plane::{PlaneEvent, SourcePlane};
use limosa_protocol::handover::{Record, Stage};
use limosa_protocol::id::{DiskId, MigrationId};
use limosa_protocol::migration::{Migration, MoveRequest, Phase, Role};
use limosa_protocol::peer::Offer;
use limosa_protocol::plan::MigrationPlan;
use limosa_qemu::power;
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

pub(crate) use abort::{let_run_again, undo_in_qemu};
pub(crate) use link::link_wait;
pub(crate) use prepare::plane_settings;
pub(crate) use retire::{free_source, left_behind};

use super::compare;
use super::handover::{HandOver, SourceHand};
use super::job::Job;
use crate::agent::Agent;
use crate::failure::{Failure, OrFail, Result};
use crate::peer_link::PeerLink;
use crate::store::MigrationRecord;
use crate::vm::{Qemu, Vm, run};
use link::{Connector, LinkKeeper, LinkState};
use switchover::Switched;

/// Most plane events that wait to be looked at; the plane makes a handful.
const EVENT_COUNT_MAX: usize = 64;

/// One migration at its source.
pub(crate) struct Source {
    agent: Arc<Agent>,
    vm: Arc<Vm>,
    job: Arc<Job>,
    link: Arc<PeerLink>,
    offer: Offer,
    hand: Arc<SourceHand>,
    /// The guest's QEMU; for a VM that is off, one that only reads its disks.
    qemu: Qemu,
    /// Whether the guest's vCPUs ran when the migration began.
    was_running: bool,
    plane: Option<Arc<SourcePlane>>,
    link_state: watch::Sender<LinkState>,
    /// The destination has all of the VM.
    through: Arc<AtomicBool>,
    /// What the two hosts hold is not the same; the destination looks for the place.
    differs: bool,
    /// Opens connections, once the destination waits for them
    connector: Option<Connector>,
    link_keeper: Option<LinkKeeper>,
    /// How often the guest was stopped for its switchover
    stop_count: u32,
    /// Mirrors were told to end.
    mirrors_end: bool,
    /// Disks whose mirror has ended well, with both sides equal.
    mirrored: BTreeSet<DiskId>,
    events: Option<mpsc::Receiver<PlaneEvent>>,
    exports: Vec<limosa_plane::nbd::server::ServerHandle>,
}

/// Begins a migration: compares, takes the VM, and leaves the rest to a task.
pub(crate) async fn begin(
    agent: &Arc<Agent>,
    vm: &Arc<Vm>,
    request: MoveRequest,
) -> Result<Migration> {
    expect_movable(agent, vm, &request).await?;
    let id = MigrationId(Uuid::now_v7());
    let job = Arc::new(Job::new(
        id,
        vm.name.clone(),
        Role::Source,
        agent.name.clone(),
        request.to.clone(),
    ));
    let mut inner = vm.lock_for_change().await?;
    inner.expect_owned()?;
    inner.expect_cold_start()?;
    let offer = compare::make_offer(agent, &inner, &request, id).await?;
    let was_running = runs(&inner).await?;
    let off = !offer.plan.moves_memory();
    let qemu = match &inner.qemu {
        Some(qemu) => qemu.clone(),
        // A VM that is off needs something that reads its disks.
        None => run::launch(agent, &inner.definition, false).await?,
    };
    let record = MigrationRecord {
        handover: Record::first(id, Stage::Offered, inner.record.epoch),
        paused: !off && !was_running,
        plan: offer.plan.clone(),
        view: job.view(),
        definition: Some(inner.definition.clone()),
        made: Vec::new(),
        run: off.then(|| run::run_record(&qemu)),
        addresses: Vec::new(),
        has_run: false,
        forced: None,
    };
    let begun = SourceHand::begin(agent, vm, &job, record, &qemu).and_then(|hand| {
        let link = hand.link()?;
        agent.migrations.add(HandOver::Source(Arc::clone(&hand)), None)?;
        Ok((hand, link))
    });
    let (hand, link) = match begun {
        Ok(begun) => begun,
        Err(failure) => {
            if off {
                run::end(&qemu).await?;
            }
            agent.store.remove::<MigrationRecord>(&id.to_string())?;
            return Err(failure);
        }
    };
    inner.migration = Some((id, Role::Source));
    inner.hand_over = Some(HandOver::Source(Arc::clone(&hand)));
    drop(inner);
    let view = job.view();
    let source = Source {
        agent: Arc::clone(agent),
        vm: Arc::clone(vm),
        job,
        link,
        offer,
        hand,
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
    };
    spawn(source);
    Ok(view)
}

/// Lets a source do its work; a fault in it ends the move as any failure does.
fn spawn(source: Source) {
    let hand = Arc::clone(&source.hand);
    tokio::spawn(async move {
        let ended = tokio::spawn(source.run()).await;
        if ended.is_err_and(|error| error.is_panic()) {
            hand.give_up("a fault in limosad ended the move; its log says which".to_owned(), false)
                .await;
        }
    });
}

/// Fails when anything stands against the move; closes what an earlier one left
/// open.
async fn expect_movable(agent: &Arc<Agent>, vm: &Arc<Vm>, request: &MoveRequest) -> Result<()> {
    let problems = compare::compare(agent, vm, request).await?;
    if !problems.is_empty() {
        return Err(Failure::problems(
            format!("VM {} cannot move to {} yet; nothing was touched", vm.name, request.to),
            problems,
        ));
    }
    // What another host has to say of an earlier move, this one makes void.
    let earlier = vm.lock().await.hand_over.clone();
    match earlier {
        Some(earlier) => earlier.move_on().await,
        None => Ok(()),
    }
}

/// Whether the guest's vCPUs run; a failure when the VM does not move as it is.
async fn runs(inner: &crate::vm::Inner) -> Result<bool> {
    let Some(qemu) = &inner.qemu else { return Ok(false) };
    let status = power::query_status(&qemu.qmp).await.or_fail("asking QEMU")?;
    compare::movable(&inner.definition.name, status)
        .map_err(|problem| Failure::problems("the VM changed meanwhile", vec![problem]))
}

impl Source {
    async fn run(mut self) {
        let mut is_again = false;
        loop {
            match self.drive(is_again).await {
                Ok(Some(switched)) => match self.hand_over(switched).await {
                    Some(source) => self = source,
                    None => return,
                },
                Ok(None) => {}
                Err(failure) => return abort::abort(self, &failure).await,
            }
            is_again = true;
        }
    }

    /// Goes through the phases until everything is at the destination; `None` when that
    /// has it, or may, but the guest stood for too long.
    async fn drive(&mut self, is_again: bool) -> Result<Option<Switched>> {
        let job = Arc::clone(&self.job);
        let link_ended = Self::link_ended(self.link_state.subscribe());
        let work = async {
            if is_again {
                self.run_on_again().await?;
            } else {
                self.prepare().await?;
                self.job.enter(Phase::Mirror);
                self.mirror().await?;
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

    fn path(&self, what: &str) -> String {
        format!("/peer/v1/migrations/{}/{what}", self.job.id())
    }

    fn plan(&self) -> &MigrationPlan {
        &self.offer.plan
    }

    fn plane(&self) -> Result<&SourcePlane> {
        self.plane.as_deref().ok_or_else(|| Failure::internal("the data plane is not up"))
    }

    /// The next event of the plane that is not a failure.
    async fn plane_event(&mut self) -> Result<PlaneEvent> {
        let events =
            self.events.as_mut().ok_or_else(|| Failure::internal("the data plane is not up"))?;
        match events.recv().await {
            Some(PlaneEvent::Failed(error)) => Err(plane_failure(&error)),
            Some(PlaneEvent::Different(error)) => {
                self.differs = true;
                Err(plane_failure(&error))
            }
            Some(event) => Ok(event),
            None => Err(Failure::internal("the data plane ended")),
        }
    }

    /// Ends the plane's threads and the exports.
    fn close_plane(&mut self) {
        self.link_keeper = None;
        for export in self.exports.drain(..) {
            export.stop();
        }
        if let Some(plane) = self.plane.take() {
            plane.abort();
            let name = self.vm.name.clone();
            // Threads end within moments; nobody needs to wait for them.
            std::thread::spawn(move || {
                if let Err(error) = plane.join() {
                    tracing::debug!(vm = %name, %error, "the data plane's end");
                }
            });
        }
    }
}

fn plane_failure(error: &limosa_plane::PlaneError) -> Failure {
    Failure::peer(format!("moving the VM's contents: {}", crate::failure::chain(error)))
}
