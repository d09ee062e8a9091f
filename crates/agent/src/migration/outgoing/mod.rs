//! The source's half: one migration from the request to its end.
//!
//! ```text
//! prepare ─► mirror ─► pre-copy ─► switchover ═ handed-over ═► retire
//!    └─────────┴──────────┴───────────┴─► abort: the VM stays
//! ```
//!
//! **Invariant.** What ends before the commit point leaves the guest as it was
//! found ([`abort`]). After it, [`retire`] and [`super::recover`] only ever go
//! forward. A commit whose record failed is neither: everything stands still.

mod abort;
mod memory;
mod mirror;
mod prepare;
mod retire;
mod switchover;

use std::sync::Arc;

use limosa_plane::{PlaneEvent, SourcePlane};
use limosa_protocol::id::{Epoch, MigrationId};
use limosa_protocol::migration::{
    Downtime, Migration, MoveRequest, Outcome as End, Phase, Role, Verify,
};
use limosa_protocol::peer::Offer;
use limosa_qemu::power::{self, RunState};
use tokio::sync::mpsc;
use uuid::Uuid;

pub(crate) use abort::clean_qemu;
pub(crate) use prepare::plane_settings;
pub(crate) use retire::{free_source, left_behind};

use super::compare;
use super::job::Job;
use crate::agent::Agent;
use crate::failure::{Failure, OrFail, Outcome};
use crate::peer_link::PeerLink;
use crate::store::{MigrationRecord, Stage};
use crate::vm::{Qemu, Vm, run};

/// Most plane events that wait to be looked at; the plane makes a handful.
const EVENT_COUNT_MAX: usize = 64;

/// One migration at its source.
pub(crate) struct Source {
    agent: Arc<Agent>,
    vm: Arc<Vm>,
    job: Arc<Job>,
    link: PeerLink,
    offer: Offer,
    record: MigrationRecord,
    /// The guest's QEMU; for a VM that is off, one that only reads its disks.
    qemu: Qemu,
    /// Whether the guest's vCPUs ran when the migration began.
    was_running: bool,
    plane: Option<SourcePlane>,
    events: Option<mpsc::Receiver<PlaneEvent>>,
    exports: Vec<limosa_plane::nbd::server::ServerHandle>,
}

/// What is known once the destination runs the VM.
struct Handed {
    downtime: Option<Downtime>,
    proofs: Vec<String>,
}

/// Begins a migration: compares, takes the VM, and leaves the rest to a task.
pub(crate) async fn begin(
    agent: &Arc<Agent>,
    vm: &Arc<Vm>,
    request: MoveRequest,
) -> Outcome<Migration> {
    drop(vm.lock_for_change().await?);
    let problems = compare::compare(agent, vm, &request).await?;
    if !problems.is_empty() {
        return Err(Failure::problems(
            format!("VM {} cannot move to {} yet; nothing was touched", vm.name, request.to),
            problems,
        ));
    }
    let link = PeerLink::new(agent, &request.to)?;
    let id = MigrationId(Uuid::now_v7());
    let job = Arc::new(Job::new(
        id,
        vm.name.clone(),
        Role::Source,
        agent.name.clone(),
        request.to.clone(),
    ));
    let mut inner = vm.lock_for_change().await?;
    let offer = compare::make_offer(agent, &inner, &request, id).await?;
    let was_running = match &inner.qemu {
        Some(qemu) => {
            let status = power::query_status(&qemu.qmp).await.or_fail("asking QEMU")?;
            match status {
                RunState::Running => true,
                // After a move that failed late, a paused guest is in `postmigrate`.
                RunState::Paused | RunState::Prelaunch | RunState::Postmigrate => false,
                other => {
                    return Err(Failure::conflict(format!(
                        "VM {} is {other:?} and cannot move: resume or stop it first",
                        vm.name
                    )));
                }
            }
        }
        None => false,
    };
    let mut record = MigrationRecord {
        stage: Stage::Offered,
        epoch: inner.record.epoch.next(),
        paused: inner.qemu.is_some() && !was_running,
        retain_source_disks: request.retain_source_disks,
        view: job.view(),
        definition: None,
        made: Vec::new(),
        run: None,
    };
    agent.migrations.add(Arc::clone(&job), None)?;
    let taken = async {
        agent.store.put(&id.to_string(), &record)?;
        match &inner.qemu {
            Some(qemu) => Ok(qemu.clone()),
            // A VM that is off needs something that reads its disks.
            None => run::launch(agent, &inner.definition, false).await,
        }
    };
    let qemu = match taken.await {
        Ok(qemu) => qemu,
        Err(failure) => {
            agent.migrations.remove(id);
            agent.store.remove::<MigrationRecord>(&id.to_string())?;
            return Err(failure);
        }
    };
    if !offer.running {
        record.run = Some(run::run_record(&qemu));
        agent.store.put(&id.to_string(), &record)?;
    }
    inner.migration = Some((id, Role::Source));
    drop(inner);
    let view = job.view();
    let source = Source {
        agent: Arc::clone(agent),
        vm: Arc::clone(vm),
        job,
        link,
        offer,
        record,
        qemu,
        was_running,
        plane: None,
        events: None,
        exports: Vec::new(),
    };
    tokio::spawn(source.run());
    Ok(view)
}

impl Source {
    async fn run(mut self) {
        match self.drive().await {
            Ok(handed) => retire::retire(self, handed).await,
            Err(Stopped::BeforeCommit(failure)) => abort::abort(self, &failure).await,
            Err(Stopped::AfterCommit(failure)) => {
                tracing::warn!(
                    migration = %self.job.id(), %failure,
                    "the destination did not say whether it runs; asking until it does"
                );
                super::recover::settle_source(self.into_in_doubt()).await;
            }
            Err(Stopped::Unknown(failure)) => self.stop_in_doubt(&failure).await,
        }
    }

    /// Goes through the phases up to the destination's word that it runs.
    async fn drive(&mut self) -> Result<Handed, Stopped> {
        let job = Arc::clone(&self.job);
        let before = async {
            self.prepare().await?;
            self.job.enter(Phase::Mirror);
            self.mirror().await?;
            let switched = if self.offer.running {
                self.job.enter(Phase::PreCopy);
                self.pre_copy().await?
            } else {
                self.job.enter(Phase::Switchover);
                self.stop_without_memory().await?
            };
            Ok::<_, Failure>(switched)
        };
        // An operator's cancel drops the work where it is; `abort` undoes it.
        let switched = tokio::select! {
            result = before => result.map_err(Stopped::BeforeCommit)?,
            () = job.cancelled() => {
                return Err(Stopped::BeforeCommit(Failure::conflict("cancelled by an operator")));
            }
        };
        self.hand_over(switched).await
    }

    fn epoch(&self) -> Epoch {
        self.record.epoch
    }

    fn path(&self, what: &str) -> String {
        format!("/peer/v1/migrations/{}/{what}", self.job.id())
    }

    fn verifies_fully(&self) -> bool {
        self.offer.request.verify == Verify::Full
    }

    /// The next event of the plane that is not a failure.
    async fn plane_event(&mut self) -> Outcome<PlaneEvent> {
        let events =
            self.events.as_mut().ok_or_else(|| Failure::internal("the data plane is not up"))?;
        match events.recv().await {
            Some(PlaneEvent::Failed(error)) => Err(plane_failure(&error)),
            Some(event) => Ok(event),
            None => Err(Failure::internal("the data plane ended")),
        }
    }

    /// The record of the commit may or may not be on the disk: neither host may
    /// run the guest before a restarted agent has read it.
    async fn stop_in_doubt(mut self, failure: &Failure) {
        self.close_plane();
        let reason = format!(
            "whether the VM was handed over could not be recorded ({failure}); it stays stopped on \
             both hosts until limosad of {} is restarted and reads its record",
            self.agent.name
        );
        tracing::error!(migration = %self.job.id(), reason, "in doubt");
        self.vm.lock().await.in_doubt = true;
        self.job.tell_in_doubt(reason);
    }

    /// What is left to settle when the destination does not answer.
    fn into_in_doubt(mut self) -> super::recover::InDoubt {
        self.close_plane();
        super::recover::InDoubt {
            agent: self.agent,
            vm: self.vm,
            job: self.job,
            link: self.link,
            record: self.record,
            qemu: Some(self.qemu),
        }
    }

    /// Ends the plane's threads and the exports.
    fn close_plane(&mut self) {
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

/// Why [`Source::drive`] did not reach the end.
enum Stopped {
    BeforeCommit(Failure),
    AfterCommit(Failure),
    /// Nobody knows whether the commit was recorded.
    Unknown(Failure),
}

fn plane_failure(error: &limosa_plane::PlaneError) -> Failure {
    Failure::peer(format!("moving the VM's contents: {}", crate::failure::chain(error)))
}

/// The last view and record of a migration that ended.
pub(crate) fn end_record(
    job: &Job,
    record: &mut MigrationRecord,
    end: End,
    reason: Option<String>,
    handed: (Option<Downtime>, Vec<String>),
) {
    record.view = job.end(end, reason, handed.0, handed.1);
    record.stage = Stage::Done;
    record.run = None;
}

/// What remains after every end: the job is a record, the oldest are forgotten.
pub(crate) fn forget_job(agent: &Agent, id: MigrationId) {
    agent.migrations.remove(id);
    if let Err(error) = agent.store.forget_old_migrations() {
        tracing::warn!(error = crate::failure::chain(&error), "old migrations stay recorded");
    }
}
