//! A switchover is tried again: the guest runs on at the source, and another QEMU takes the
//! place of the one here, which has loaded the guest or may have. What has arrived stays.
//!
//! ```text
//! plane rests ─► QEMU ends ─► another one waits ─► its RAM is filled ─► channels may connect
//! ```
//!
//! **Invariant.** The record says `preparing`, durably, before anything of a copy that was
//! ready is touched.

use std::sync::Arc;

use limosa_protocol::migration::Phase;
use limosa_protocol::peer::{DestinationVote, RetryStarted};

use super::incoming::{Arrived, Incoming, Inner};
use limosa_host::failure::{Failure, OrFail, Result};
use limosa_host::vm::run;

impl Incoming {
    /// Begins an attempt, once; whoever asks again is told the same.
    pub(crate) async fn begin_retry(self: &Arc<Self>, attempt: u32) -> Result<RetryStarted> {
        let incoming = Arc::clone(self);
        // Whoever asks may be cut off: it is done to its end.
        let work = self.job.spawn(async move { incoming.begin_attempt(attempt).await });
        work.await.or_fail("beginning the switchover again")?
    }

    async fn begin_attempt(self: &Arc<Self>, attempt: u32) -> Result<RetryStarted> {
        // Whoever waits for what will not come any more makes way.
        self.attempt.send_if_modified(|last| {
            let is_later = attempt > *last;
            *last = attempt.max(*last);
            is_later
        });
        let mut inner = self.inner.lock().await;
        if let Some((of, begun)) = &inner.begun
            && *of == attempt
        {
            return match self.driver.expect_preparing() {
                Ok(()) => Ok(begun.clone()),
                Err(_) => Err(self.why_not().await),
            };
        }
        if !self.driver.begins_retry(attempt).await {
            return Err(self.why_not().await);
        }
        match self.fill_another(&mut inner).await {
            Ok(begun) => {
                inner.begun = Some((attempt, begun.clone()));
                drop(inner);
                self.enter(Phase::PreCopy);
                self.spawn_channel_watch();
                Ok(begun)
            }
            Err(failure) => {
                drop(inner);
                self.fail(failure.to_string()).await;
                Err(failure)
            }
        }
    }

    /// Why it does not begin again.
    async fn why_not(&self) -> Failure {
        Failure::conflict(match self.driver.vote().await {
            DestinationVote::Declined { reason, .. } => reason,
            _ => "this migration takes nothing more".to_owned(),
        })
    }

    /// Ends when an attempt is not the last one.
    pub(super) async fn is_over(&self, attempt: u32) {
        // The sender is ours: it is never gone.
        self.attempt.subscribe().wait_for(|last| *last != attempt).await.ok();
    }

    /// Has the plane let go of QEMU and its disks; it is kept, for it may be needed again.
    pub(super) async fn rest(&self, inner: &mut Inner) -> Result<()> {
        let doing = "closing the data plane";
        self.connections.end();
        if let Some(plane) = self.driver.plane() {
            tokio::task::spawn_blocking(move || plane.quiesce())
                .await
                .or_fail(doing)?
                .or_fail(doing)?;
        }
        // A link that is not needed is not missed.
        if let Some(lost) = &inner.lost {
            lost.send_replace(None);
        }
        Ok(())
    }

    async fn fill_another(&self, inner: &mut Inner) -> Result<RetryStarted> {
        let doing = "beginning the switchover again";
        self.rest(inner).await?;
        if let Some(qemu) = inner.qemu.take() {
            run::end(&qemu).await?;
        }
        inner.settled = None;
        inner.arrived = Arrived::default();
        let parts = self.start_qemu(inner).await?;
        let plane = self.driver.plane().ok_or_else(|| Failure::conflict("nothing is received"))?;
        let incoming =
            parts.qemu_incoming.ok_or_else(|| Failure::internal("there is no RAM to be filled"))?;
        let begin = move || plane.begin_retry(parts.ram, parts.disks, incoming);
        let changed = tokio::task::spawn_blocking(begin).await.or_fail(doing)?.or_fail(doing)?;
        // What was told is of the attempt before.
        if let Some(events) = &mut inner.events {
            while events.try_recv().is_ok() {}
        }
        self.connections.begin_retry();
        let changed = changed.into_iter().map(|at| (at.block, at.page)).collect();
        Ok(RetryStarted { changed })
    }
}
