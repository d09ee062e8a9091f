//! A migration as a job: its phase, progress and end, told to whoever watches.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use limosa_protocol::id::{HostName, MigrationId, VmName};
use limosa_protocol::migration::{
    Downtime, Migration, Outcome as End, Phase, Progress, Role, Summary,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::agent::now_unix_ms;
use crate::failure::{Failure, Outcome};

/// One migration under way.
pub(crate) struct Job {
    view: watch::Sender<Migration>,
    cancelled: CancellationToken,
    clock: Mutex<Clock>,
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
            started_unix_ms: now_unix_ms(),
            ended_unix_ms: None,
            progress: Progress::default(),
            summary: None,
        })
    }

    /// A job that goes on after a restart of the agent.
    pub(crate) fn of_view(view: Migration) -> Self {
        let now = Instant::now();
        Self {
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

    pub(crate) fn view(&self) -> Migration {
        self.view.borrow().clone()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Migration> {
        self.view.subscribe()
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

    /// Asks the job to end before its commit point.
    pub(crate) fn cancel(&self) -> Outcome<()> {
        let clock = self.clock();
        if clock.committed {
            return Err(Failure::conflict(format!(
                "migration {} is past its commit point: the VM belongs to {} now",
                self.id(),
                self.view.borrow().destination
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
    pub(crate) fn pass_commit_point(&self) -> Outcome<()> {
        let mut clock = self.clock();
        if self.cancelled.is_cancelled() {
            return Err(Failure::conflict("cancelled by an operator"));
        }
        clock.committed = true;
        Ok(())
    }

    /// Tells that the end is not known yet.
    pub(crate) fn tell_in_doubt(&self, reason: String) {
        self.view.send_modify(|view| {
            view.outcome = Some(End::InDoubt);
            view.reason = Some(reason);
        });
    }

    /// Ends the job: the view has an outcome and a summary from here on.
    pub(crate) fn end(
        &self,
        outcome: End,
        reason: Option<String>,
        downtime: Option<Downtime>,
        proofs: Vec<String>,
    ) -> Migration {
        let mut clock = self.clock();
        let now = Instant::now();
        clock.add(self.view.borrow().phase, now);
        let summary = Summary {
            total_ms: millis(now - clock.started),
            phase_ms: clock.phase_ms.clone(),
            moved: self.view.borrow().progress.moved,
            downtime,
            rounds: self.view.borrow().progress.round,
            proofs,
        };
        drop(clock);
        self.view.send_modify(|view| {
            view.outcome = Some(outcome);
            view.reason = reason;
            view.ended_unix_ms = Some(now_unix_ms());
            view.summary = Some(summary);
        });
        // Whoever waits for a cancel need not wait any longer.
        self.cancelled.cancel();
        let view = self.view();
        match (&view.outcome, &view.reason) {
            (Some(End::Moved), _) => {
                tracing::info!(migration = %view.id, vm = %view.vm, "moved");
            }
            (outcome, reason) => {
                tracing::warn!(migration = %view.id, vm = %view.vm, ?outcome, ?reason, "ended");
            }
        }
        view
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
