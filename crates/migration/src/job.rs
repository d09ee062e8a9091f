//! A migration as a job: its phase, progress and end, told to whoever watches.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use limosa_protocol::id::{HostName, MigrationId, VmName};
use limosa_protocol::migration::{
    Downtime, LinkLoss, Migration, Outcome, Phase, Progress, Queued, Role, Summary,
};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};

use limosa_host::clock::now_unix_ms;
use limosa_host::failure::{Failure, Result};

/// One migration under way.
pub(crate) struct Job {
    view: watch::Sender<Migration>,
    cancelled: CancellationToken,
    clock: Mutex<Clock>,
    span: Span,
}

/// Where the time goes.
struct Clock {
    started: Instant,
    phase_began: Instant,
    phase_ms: BTreeMap<Phase, u64>,
    committed: bool,
}

impl Job {
    /// A job that begins now.
    pub(crate) fn new(
        id: MigrationId,
        vm: VmName,
        role: Role,
        source: HostName,
        destination: HostName,
    ) -> Self {
        Self::of_view(Migration {
            id,
            vm,
            role,
            source,
            destination,
            phase: Phase::Prepare,
            outcome: None,
            reason: None,
            queued: None,
            started_unix_ms: now_unix_ms(),
            ended_unix_ms: None,
            progress: Progress::default(),
            summary: None,
        })
    }

    /// A job that goes on after a restart of the migrations.
    pub(crate) fn of_view(view: Migration) -> Self {
        let now = Instant::now();
        // A log of many moves is read by these three.
        let span = tracing::info_span!(
            parent: None, "migration", id = %view.id, vm = %view.vm, role = view.role.as_str()
        );
        Self {
            span,
            view: watch::Sender::new(view),
            cancelled: CancellationToken::new(),
            clock: Mutex::new(Clock {
                started: now,
                phase_began: now,
                phase_ms: BTreeMap::new(),
                committed: false,
            }),
        }
    }

    pub(crate) fn id(&self) -> MigrationId {
        self.view.borrow().id
    }

    /// The span of everything that is done for this migration.
    pub(crate) fn span(&self) -> Span {
        self.span.clone()
    }

    /// Spawns a task of this migration, within its span.
    pub(crate) fn spawn<F>(&self, work: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        tokio::spawn(work.instrument(self.span()))
    }

    /// Spawns `work`, and `on_panic` if it panics: a fault in limosad ends a migration as any
    /// failure does.
    pub(crate) fn supervise(
        self: &Arc<Self>,
        work: impl Future<Output = ()> + Send + 'static,
        on_panic: impl Future<Output = ()> + Send + 'static,
    ) {
        let worker = self.spawn(work);
        self.spawn(async move {
            if worker.await.is_err_and(|error| error.is_panic()) {
                on_panic.await;
            }
        });
    }

    pub(crate) fn view(&self) -> Migration {
        self.view.borrow().clone()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Migration> {
        self.view.subscribe()
    }

    /// Reports why the move waits, or that it does not wait any more.
    pub(crate) fn report_queued(&self, queued: Option<Queued>) {
        self.view.send_modify(|view| view.queued = queued);
    }

    /// Ends the wait in the queue, if there was one: time counts from here.
    pub(crate) fn begin(&self) {
        let now = Instant::now();
        let mut clock = self.clock();
        clock.started = now;
        clock.phase_began = now;
        drop(clock);
        self.view.send_modify(|view| {
            view.queued = None;
            view.started_unix_ms = now_unix_ms();
        });
    }

    /// Enters a phase.
    pub(crate) fn enter(&self, phase: Phase) {
        let mut clock = self.clock();
        let now = Instant::now();
        let left = self.view.borrow().phase;
        clock.add(left, now);
        drop(clock);
        self.view.send_modify(|view| view.phase = phase);
        let view = self.view.borrow();
        tracing::info!(migration = %view.id, vm = %view.vm, phase = phase.as_str(), "phase");
    }

    /// Tells a new moment.
    pub(crate) fn progress(&self, change: impl FnOnce(&mut Progress)) {
        self.view.send_modify(|view| change(&mut view.progress));
    }

    /// Tells that there is no link, and until when it is waited for.
    pub(crate) fn report_link_lost(&self, reason: String, wait: std::time::Duration) {
        let now = now_unix_ms();
        self.progress(|progress| {
            if progress.link_loss.is_none() {
                progress.link_loss_count += 1;
            }
            let since_unix_ms = progress.link_loss.as_ref().map_or(now, |loss| loss.since_unix_ms);
            let until_unix_ms = since_unix_ms + millis(wait);
            progress.link_loss = Some(LinkLoss { reason, since_unix_ms, until_unix_ms });
        });
    }

    /// Tells that the link is there again.
    pub(crate) fn report_link_back(&self) {
        self.progress(|progress| progress.link_loss = None);
    }

    /// Asks the job to end before its commit point.
    pub(crate) fn cancel(&self) -> Result<()> {
        let clock = self.clock();
        let view = self.view();
        if let (Some(outcome), Some(_)) = (view.outcome, view.ended_unix_ms) {
            return Err(Failure::conflict(format!(
                "migration {} has ended already: {}",
                view.id,
                outcome.as_str()
            )));
        }
        if clock.committed {
            return Err(Failure::conflict(format!(
                "migration {} cannot be cancelled any more: its end is being settled",
                view.id
            )));
        }
        self.cancelled.cancel();
        Ok(())
    }

    /// Ends when somebody cancelled.
    pub(crate) async fn cancelled(&self) {
        self.cancelled.cancelled().await;
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.is_cancelled()
    }

    /// Notes that nobody can cancel any more, unless somebody just did.
    pub(crate) fn pass_commit_point(&self) -> Result<()> {
        let mut clock = self.clock();
        if self.cancelled.is_cancelled() {
            return Err(Failure::conflict("cancelled by an operator"));
        }
        clock.committed = true;
        Ok(())
    }

    /// Tells that the end is not known yet.
    pub(crate) fn report_in_doubt(&self, reason: String) {
        self.view.send_modify(|view| {
            view.outcome = Some(Outcome::InDoubt);
            view.reason = Some(reason);
        });
    }

    /// Tells that the end will be known after all.
    pub(crate) fn clear_doubt(&self) {
        self.view.send_if_modified(|view| {
            let was_told = view.outcome == Some(Outcome::InDoubt) && view.ended_unix_ms.is_none();
            if was_told {
                view.outcome = None;
                view.reason = None;
            }
            was_told
        });
    }

    /// The view with its end, to be recorded before it is told.
    pub(crate) fn ended_view(
        &self,
        outcome: Outcome,
        reason: Option<String>,
        downtime: Option<Downtime>,
        proofs: Vec<String>,
    ) -> Migration {
        let mut view = self.view();
        let mut clock = self.clock();
        let now = Instant::now();
        clock.add(view.phase, now);
        view.summary = Some(Summary {
            total_ms: millis(now - clock.started),
            phase_ms: clock.phase_ms.clone(),
            moved: view.progress.moved,
            downtime,
            rounds: view.progress.round,
            link_loss_count: view.progress.link_loss_count,
            given_up_switchover_count: view.progress.given_up_switchover_count,
            proofs,
        });
        view.progress.link_loss = None;
        view.outcome = Some(outcome);
        view.reason = reason;
        view.ended_unix_ms = Some(now_unix_ms());
        view
    }

    /// Ends the job for everybody who watches it, once.
    pub(crate) fn publish(&self, ended: &Migration) {
        let is_new = self.view.send_if_modified(|view| {
            let is_new = view.ended_unix_ms.is_none();
            if is_new {
                view.clone_from(ended);
            }
            is_new
        });
        if !is_new {
            return;
        }
        // Whoever waits for a cancel need not wait any longer.
        self.cancelled.cancel();
        match (&ended.outcome, &ended.reason) {
            (Some(Outcome::Moved), _) => {
                tracing::info!(migration = %ended.id, vm = %ended.vm, "moved");
            }
            (outcome, reason) => {
                tracing::warn!(migration = %ended.id, vm = %ended.vm, ?outcome, ?reason, "ended");
            }
        }
    }

    fn clock(&self) -> std::sync::MutexGuard<'_, Clock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clock {
    fn add(&mut self, phase: Phase, now: Instant) {
        *self.phase_ms.entry(phase).or_default() += millis(now - self.phase_began);
        self.phase_began = now;
    }
}

/// Whole milliseconds of a duration.
pub(crate) fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
