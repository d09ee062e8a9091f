//! `pre-copy`: RAM in rounds while the guest runs, until the rest is small
//! enough to move within the downtime limit.
//!
//! QEMU decides by the speed at which the agent takes its stream (the window is
//! small, so that speed is the network's) and its `downtime-limit`. The agent
//! holds that limit low at first, so that an easy guest stops for the shortest
//! time, and raises it round by round up to what the operator allows.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use limosa_protocol::migration::Phase;
use limosa_qemu::migrate::{self, MigrationStatus, SourceParameters};
use limosa_qemu::power;
use limosa_qemu::qmp::QmpEvent;
use tokio::sync::broadcast;

use super::outgoing::Outgoing;
use super::rate::{Rate, transfer};
use super::socket;
use super::stop::{Finished, STOPPED_MAX, Stopped, Switched, memory_failure};
use limosa_host::failure::{Failure, OrFail, Result};

/// How often progress is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Downtime that is aimed for first, in milliseconds.
const DOWNTIME_FIRST_MS: u32 = 20;
/// How often a guest is stopped for its switchover, at most.
const SWITCHOVER_COUNT_MAX: u32 = 8;
/// Rounds that are given to each downtime limit before it is raised.
const ROUNDS_PER_LIMIT: u64 = 2;

impl Outgoing {
    /// Copies RAM and ends with the guest stopped and everything at the
    /// destination. A guest that would stand too long runs on, and all of it
    /// begins again: what the destination has by then is not sent another time.
    ///
    /// `None` when the destination has everything, or may, and the guest would stand too
    /// long until it says so.
    pub(super) async fn pre_copy(&mut self) -> Result<Option<Switched>> {
        while self.stop_count < SWITCHOVER_COUNT_MAX {
            self.job.enter(Phase::PreCopy);
            let stopped = self.copy_rounds().await?;
            self.stop_count += 1;
            self.job.enter(Phase::Switchover);
            match self.finish_memory(stopped).await? {
                Finished::Whole(switched) => return Ok(Some(switched)),
                Finished::MayBeLoaded => return Ok(None),
                Finished::RunsOn => {}
            }
            self.wait_for_link().await;
            // A mirror that was ending when its link went had to begin anew.
            self.wait_ready().await?;
            self.catch_up().await?;
        }
        Err(Failure::peer(format!(
            "{SWITCHOVER_COUNT_MAX} times the guest was stopped and not everything arrived within \
             its downtime limit and {} s: give it a better link or a higher downtime limit",
            STOPPED_MAX.as_secs()
        )))
    }

    /// Copies RAM in rounds until QEMU stops the guest.
    async fn copy_rounds(&mut self) -> Result<Stopped> {
        let mut events = self.qemu.qmp.events();
        let began = Instant::now();
        self.start_memory().await?;
        let most_ms = self.plan().policy.downtime_limit_ms.max(1);
        let mut limit_ms = DOWNTIME_FIRST_MS.min(most_ms);
        let mut limit_round = 0;
        let mut memory = Rate::new();
        let mut wire = Rate::new();
        let mut stopped_us = None;
        loop {
            if self.wait_for_stop(&mut events, &mut stopped_us).await? {
                let at = Instant::now() - since_stop(unix_now(), stopped_us, began.elapsed());
                return Ok(Stopped { at, events });
            }
            self.check_exports()?;
            let status = self.answered(migrate::status(&self.qemu.qmp)).await?;
            let status = status.or_fail("asking QEMU")?;
            match status.status {
                MigrationStatus::Failed | MigrationStatus::Cancelled => {
                    return Err(memory_failure(status.error_desc.as_deref()));
                }
                // Its event was lost among others: nothing else would tell.
                MigrationStatus::PreSwitchover => {
                    stopped_us = last_stop_us(&mut events).or(stopped_us);
                    let at = Instant::now() - since_stop(unix_now(), stopped_us, began.elapsed());
                    return Ok(Stopped { at, events });
                }
                _ => {}
            }
            let Some(ram) = status.ram else { continue };
            let total = self.offer.definition.memory_bytes();
            let done = total.saturating_sub(ram.remaining_bytes);
            let moment = transfer(done, total, &mut memory);
            self.job.progress(|progress| {
                progress.memory = moment;
                progress.round = ram.dirty_sync_count;
                progress.dirty_pages_per_second = ram.dirty_pages_rate;
            });
            self.report_moved(&mut wire);
            if limit_round == 0 {
                limit_round = ram.dirty_sync_count;
            }
            if ram.dirty_sync_count >= limit_round + ROUNDS_PER_LIMIT && limit_ms < most_ms {
                limit_ms = (limit_ms * 2).min(most_ms);
                limit_round = ram.dirty_sync_count;
                migrate::set_downtime_limit(&self.qemu.qmp, limit_ms)
                    .await
                    .or_fail("raising QEMU's downtime limit")?;
            }
        }
    }

    async fn start_memory(&mut self) -> Result<()> {
        let doing = "starting the move of RAM";
        let socket = self.context.host.folders.runtime_of(&self.vm.name).join("migrate.sock");
        let listener = socket::listen(&socket).or_fail(doing)?;
        let plane = self.plane()?;
        plane.attach_migration_socket(listener).or_fail(doing)?;
        let most_ms = self.plan().policy.downtime_limit_ms.max(1);
        let qmp = &self.qemu.qmp;
        migrate::prepare_source(
            qmp,
            &SourceParameters { downtime_limit_ms: DOWNTIME_FIRST_MS.min(most_ms) },
        )
        .await
        .or_fail(doing)?;
        migrate::start_outgoing(qmp, &socket).await.or_fail(doing)
    }

    /// Waits a moment; `true` once QEMU has stopped the guest and waits.
    ///
    /// - `stopped_us`: when QEMU says that the vCPUs stopped, by the host's clock.
    async fn wait_for_stop(
        &mut self,
        events: &mut broadcast::Receiver<QmpEvent>,
        stopped_us: &mut Option<u64>,
    ) -> Result<bool> {
        let until = Instant::now() + LOOK_EVERY;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match tokio::time::timeout(left, events.recv()).await {
                Ok(Ok(event)) => match migrate::migration_event(&event) {
                    None => *stopped_us = power::stop_event_us(&event).or(*stopped_us),
                    Some(MigrationStatus::PreSwitchover) => return Ok(true),
                    Some(MigrationStatus::Failed | MigrationStatus::Cancelled) => {
                        let status = migrate::status(&self.qemu.qmp).await.ok();
                        let why = status.and_then(|status| status.error_desc);
                        return Err(memory_failure(why.as_deref()));
                    }
                    _ => {}
                },
                Ok(Err(broadcast::error::RecvError::Lagged(_))) => {}
                Ok(Err(broadcast::error::RecvError::Closed)) => {
                    return Err(Failure::internal("QEMU of the VM ended"));
                }
                Err(_elapsed) => return Ok(false),
            }
        }
    }
}

/// Time since 1970 by the host's clock.
fn unix_now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// When the vCPUs stopped, of events that came and were not looked at yet.
fn last_stop_us(events: &mut broadcast::Receiver<QmpEvent>) -> Option<u64> {
    let mut stopped_us = None;
    loop {
        match events.try_recv() {
            Ok(event) => stopped_us = power::stop_event_us(&event).or(stopped_us),
            Err(broadcast::error::TryRecvError::Lagged(_)) => {}
            Err(_) => return stopped_us,
        }
    }
}

/// How long ago the vCPUs stopped, by the host's clock; that may have been set
/// meanwhile, so it is believed only within the time that pre-copy took. Not at
/// all if QEMU's word on it was lost.
fn since_stop(now: Duration, stopped_us: Option<u64>, most: Duration) -> Duration {
    let stopped = stopped_us.map_or(now, Duration::from_micros);
    now.saturating_sub(stopped).min(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the downtime counts from QEMU's stop, whatever became of the clock.
    #[test]
    fn a_stop_lies_within_pre_copy() {
        let (now, most) = (Duration::from_secs(9000), Duration::from_secs(60));
        let since = |stopped_us| since_stop(now, stopped_us, most);
        assert_eq!(since(Some(8_995_000_000)), Duration::from_secs(5));
        assert_eq!(since(Some(1)), most);
        assert_eq!(since(Some(u64::MAX)), Duration::ZERO);
        assert_eq!(since(None), Duration::ZERO);
    }
}
