//! A switchover that is given up: the guest runs on, and all of it is tried again.
//!
//! ```text
//! not everything has arrived ─► run on ──────────────────────────┐
//! all has, no *ready* heard ──► run on, *again* ─► other channels ┴─► pre-copy goes on
//! ```
//!
//! What the destination has by then is not sent another time, either way. In the second, its
//! QEMU has loaded the guest, or may have, and cannot load another one: a new QEMU takes its
//! place, and the destination tells the pages that it lost by that.

use std::sync::atomic::Ordering;
use std::time::Duration;

use limosa_plane::PagePlace;
use limosa_protocol::handover::{SourceAction, SourceEvent as On};
use limosa_protocol::migration::Phase;
use limosa_protocol::peer::{RetryRequest, RetryStarted};
use limosa_qemu::migrate::{self, MigrationStatus};

use super::outgoing::Outgoing;
use super::stop::{Finished, memory_failure};
use super::undo;
use limosa_host::failure::{Failure, OrFail, Result};

/// Longest wait for QEMU to end a stream that nobody wants any more.
const QEMU_ENDS_MAX: Duration = Duration::from_secs(10);
/// How often QEMU is asked whether it has.
const ENDED_LOOK_EVERY: Duration = Duration::from_millis(10);

impl Outgoing {
    /// Gives a switchover up and lets the guest run on, its disks mirrored.
    ///
    /// - `continued`: QEMU was told to go on, so it ends its stream.
    pub(super) async fn run_on(&mut self, continued: bool) -> Result<Finished> {
        if !self.plane()?.give_up_switchover() {
            return Ok(Finished::MayBeLoaded);
        }
        tracing::warn!(migration = %self.job.id(), "the switchover is given up; the guest runs on");
        self.job.progress(|progress| progress.given_up_switchover_count += 1);
        // What they say is of the switchover that was given up.
        self.check_exports()?;
        if continued {
            // Cancelled now, QEMU would let the guest run with its disks not mirrored.
            wait_ended(&self.qemu.qmp).await?;
        }
        self.let_run_on().await?;
        Ok(Finished::RunsOn)
    }

    /// The destination has everything, or may, and did not say so while the guest could
    /// stand: it runs on, and the destination begins again.
    pub(super) async fn resume_for_retry(&mut self) -> Result<()> {
        self.link_keeper = None;
        let orders = self.driver.feed(On::Retry).await;
        let Some(SourceAction::RunOn { attempt }) = orders.first() else {
            return Err(Failure::conflict("the move was given up"));
        };
        tracing::warn!(
            migration = %self.job.id(), attempt, "the switchover is tried again; the guest runs on"
        );
        self.job.progress(|progress| progress.given_up_switchover_count += 1);
        // What they say is of the attempt before.
        self.check_exports()?;
        wait_ended(&self.qemu.qmp).await?;
        self.let_run_on().await?;
        self.job.enter(Phase::PreCopy);
        let begun = self.resend(*attempt).await?;
        let changed = begun.changed.into_iter().map(|(block, page)| PagePlace { block, page });
        let changed: Vec<_> = changed.collect();
        self.plane()?.begin_retry(&changed).or_fail("beginning the switchover again")?;
        self.through.store(false, Ordering::Release);
        self.keep_link();
        self.wait_for_link().await;
        self.wait_ready().await?;
        self.catch_up().await
    }

    async fn resend(&self, attempt: u32) -> Result<RetryStarted> {
        let request = RetryRequest { attempt };
        let retry = self.retry_since_loss();
        Ok(retry.run(|| self.link.retry(self.job.id(), &request)).await?)
    }

    /// Lets the guest run on after QEMU has ended its stream, its disks mirrored.
    async fn let_run_on(&mut self) -> Result<()> {
        if self.mirrors_end {
            self.restart_mirrors().await?;
        }
        undo::end_migration(&self.qemu).await?;
        undo::resume_source(&self.qemu).await
    }
}

/// Waits until QEMU has ended a stream that is given up, with the guest stopped.
async fn wait_ended(qmp: &limosa_qemu::qmp::Qmp) -> Result<()> {
    let ended = async {
        loop {
            let status = migrate::status(qmp).await.or_fail("asking QEMU")?;
            match status.status {
                MigrationStatus::Completed => return Ok(()),
                MigrationStatus::Failed | MigrationStatus::Cancelled | MigrationStatus::None => {
                    return Err(memory_failure(status.error_desc.as_deref()));
                }
                _ => tokio::time::sleep(ENDED_LOOK_EVERY).await,
            }
        }
    };
    let waited = tokio::time::timeout(QEMU_ENDS_MAX, ended).await;
    waited.unwrap_or_else(|_| Err(Failure::internal("QEMU does not end its migration")))
}
