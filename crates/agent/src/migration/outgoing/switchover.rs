//! `switchover`: from the stopped guest to the destination's word that it runs.
//!
//! ```text
//! stop ─► mirrors end ─► last pages ─► device state ─► ready? ─► ready
//!      disks flushed there ┘                              commit ─► running
//! ```
//!
//! What can go on side by side does: everything here is blackout.

use std::time::{Duration, Instant};

use limosa_plane::PlaneEvent;
use limosa_protocol::migration::Downtime;
use limosa_protocol::peer::{Commit, Ready, ReadyRequest, Running};
use limosa_qemu::block;
use limosa_qemu::migrate::{self, MigrationStatus};
use limosa_qemu::qmp::QmpEvent;
use tokio::sync::broadcast;

use super::memory::{memory_failure, qmp_failure};
use super::mirror::mirror_name;
use super::{Handed, Source, Stopped};
use crate::failure::{Failure, OrFail, Outcome, chain};
use crate::peer_link::PeerError;
use crate::store::Stage;

/// Longest a guest is held stopped before the commit point, in milliseconds;
/// past that the migration is aborted and the guest goes on.
const STOPPED_MS_MAX: u64 = 60_000;
/// Longest wait for the destination's word on a commit, in milliseconds. After
/// it the migration is in doubt and asks on.
const COMMIT_MS_MAX: u64 = 15_000;

/// Where the time of a switchover went so far.
pub(super) struct Switched {
    /// vCPUs stopped; `None` for a VM that was off or paused.
    stopped: Option<Instant>,
    mirrors_ended: Instant,
    pages_sent: Instant,
}

impl Source {
    /// Ends the mirrors and sends the last pages and the device state.
    pub(super) async fn finish_memory(
        &mut self,
        mut events: broadcast::Receiver<QmpEvent>,
    ) -> Outcome<Switched> {
        let stopped = Instant::now();
        let limit = Duration::from_millis(STOPPED_MS_MAX);
        let work = async {
            self.end_mirrors().await?;
            let mirrors_ended = Instant::now();
            self.start_disk_barrier()?;
            migrate::continue_from_pre_switchover(&self.qemu.qmp)
                .await
                .map_err(|error| qmp_failure("going on after the guest stopped", &error))?;
            wait_completed(&self.qemu.qmp, &mut events).await?;
            let pages_sent = Instant::now();
            self.wait_delivered(true).await?;
            Ok(Switched { stopped: self.was_running.then_some(stopped), mirrors_ended, pages_sent })
        };
        tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
            Err(Failure::peer(format!(
                "the guest stood still for {STOPPED_MS_MAX} ms and not everything had arrived"
            )))
        })
    }

    /// For a VM that is off: there is nothing but its disks.
    pub(super) async fn stop_without_memory(&mut self) -> Outcome<Switched> {
        let now = Instant::now();
        self.end_mirrors().await?;
        self.start_disk_barrier()?;
        self.wait_delivered(false).await?;
        Ok(Switched { stopped: None, mirrors_ended: now, pages_sent: now })
    }

    async fn end_mirrors(&mut self) -> Outcome<()> {
        let qmp = &self.qemu.qmp;
        let ids = self.disk_ids();
        let ends = ids.iter().map(|id| async move {
            let name = mirror_name(id);
            block::complete_mirror_without_pivot(qmp, &name)
                .await
                .or_fail(&format!("ending the mirror of disk {id}"))
        });
        futures_util::future::try_join_all(ends).await?;
        Ok(())
    }

    fn start_disk_barrier(&self) -> Outcome<()> {
        let plane =
            self.plane.as_ref().ok_or_else(|| Failure::internal("the data plane is not up"))?;
        plane.start_disk_barrier().or_fail("flushing the destination's disks")
    }

    /// Waits until the destination has everything and its digests are ours.
    async fn wait_delivered(&mut self, with_ram: bool) -> Outcome<()> {
        let mut ram = !with_ram;
        let mut disks = false;
        while !(ram && disks) {
            match self.plane_event().await? {
                PlaneEvent::RamDelivered => ram = true,
                PlaneEvent::DisksEqual => disks = true,
                _ => {}
            }
        }
        Ok(())
    }

    /// The commit, and what leads to it.
    pub(super) async fn hand_over(&mut self, switched: Switched) -> Result<Handed, Stopped> {
        let ready = self.ask_ready().await.map_err(Stopped::BeforeCommit)?;
        let device_state_done = Instant::now();
        if ready.epoch != self.epoch() {
            return Err(Stopped::BeforeCommit(Failure::peer(format!(
                "{} is ready for epoch {} and not for {}",
                self.link.name(),
                ready.epoch,
                self.epoch()
            ))));
        }
        self.job.pass_commit_point().map_err(Stopped::BeforeCommit)?;
        self.record.view = self.job.view();
        self.record.stage = Stage::HandedOver;
        if let Err(error) = self.agent.store.put(&self.job.id().to_string(), &self.record) {
            return Err(Stopped::Unknown(error.into()));
        }
        let committed = Instant::now();
        self.commit().await?;
        let resumed = Instant::now();
        let downtime = switched.stopped.map(|stopped| Downtime {
            stop_ms: ms(switched.mirrors_ended - stopped),
            final_round_ms: ms(switched.pages_sent - switched.mirrors_ended),
            device_state_ms: ms(device_state_done - switched.pages_sent),
            commit_ms: ms(committed - device_state_done),
            resume_ms: ms(resumed - committed),
            total_ms: ms(resumed - stopped),
        });
        Ok(Handed { downtime, proofs: self.proofs() })
    }

    async fn ask_ready(&mut self) -> Outcome<Ready> {
        let (full_ram_digest, full_disk_digests) =
            if self.verifies_fully() { self.read_everything_again().await? } else { (None, None) };
        let request = ReadyRequest {
            full_ram_digest,
            full_disk_digests,
            paused: !self.was_running,
            addresses: self.vm.addresses.list(),
        };
        let limit_ms = STOPPED_MS_MAX;
        let job = std::sync::Arc::clone(&self.job);
        let path = self.path("ready");
        tokio::select! {
            ready = self.link.post_within(&path, &request, limit_ms) => Ok(ready?),
            () = job.cancelled() => Err(Failure::conflict("cancelled by an operator")),
        }
    }

    /// With full verification: digests of what really stands in RAM and images.
    async fn read_everything_again(&self) -> Outcome<(Option<String>, Option<Vec<String>>)> {
        let ram = if self.offer.running {
            Some(super::super::incoming::verify::ram(&self.qemu, &self.offer.definition).await?)
        } else {
            None
        };
        let mut disks = Vec::new();
        for disk in &self.offer.definition.disks {
            if disk.kind == limosa_protocol::vm::DiskKind::Disk {
                disks.push(super::super::incoming::verify::disk(&self.agent, disk).await?);
            }
        }
        Ok((ram, Some(disks)))
    }

    async fn commit(&self) -> Result<(), Stopped> {
        let commit = Commit { epoch: self.epoch() };
        let path = self.path("commit");
        match self.link.post_within::<_, Running>(&path, &commit, COMMIT_MS_MAX).await {
            Ok(_running) => Ok(()),
            Err(PeerError::Unreachable(what)) => Err(Stopped::AfterCommit(Failure::peer(what))),
            Err(PeerError::Refused(failure)) => Err(Stopped::AfterCommit(Failure(failure))),
        }
    }

    fn proofs(&self) -> Vec<String> {
        let mut proofs = Vec::new();
        if self.offer.running {
            proofs.push("RAM: digests of all pages, kept on both hosts, are equal".to_owned());
        }
        if !self.offer.disks.is_empty() {
            proofs.push("disks: digests of all writes, in order, are equal and flushed".to_owned());
        }
        if self.verifies_fully() {
            proofs.push("RAM and disks were read again on both hosts and are equal".to_owned());
        }
        proofs
    }
}

async fn wait_completed(
    qmp: &limosa_qemu::qmp::Qmp,
    events: &mut broadcast::Receiver<QmpEvent>,
) -> Outcome<()> {
    loop {
        match events.recv().await {
            Ok(event) => match migrate::migration_event(&event) {
                Some(MigrationStatus::Completed) => return Ok(()),
                Some(MigrationStatus::Failed | MigrationStatus::Cancelled) => {
                    let why = migrate::status(qmp).await.ok().and_then(|status| status.error_desc);
                    return Err(memory_failure(why.as_deref()));
                }
                _ => {}
            },
            Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(error @ broadcast::error::RecvError::Closed) => {
                return Err(Failure::internal(format!("QEMU ended: {}", chain(&error))));
            }
        }
    }
}

fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 10_000.0).round() / 10.0
}
