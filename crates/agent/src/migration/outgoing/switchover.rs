//! `switchover`: from the stopped guest to the destination's word that it runs.
//!
//! ```text
//! stop ─► mirrors end ─► last pages ─► device state ─► ready? ─► ready
//!      disks flushed there ┘                              commit ─► running
//! ```
//!
//! What can go on side by side does: everything here is blackout.

use std::sync::Arc;
use std::time::{Duration, Instant};

use limosa_plane::PlaneEvent;
use limosa_protocol::handover::{SourceAction, SourceEvent as On};
use limosa_protocol::migration::{Downtime, Phase};
use limosa_protocol::peer::{DestinationWord, Digests, ReadyRequest};
use limosa_qemu::block;
use limosa_qemu::migrate::{self, MigrationStatus};
use limosa_qemu::qmp::QmpEvent;
use tokio::sync::broadcast;

use super::super::handover::Handed;
use super::super::incoming::verify;
use super::memory::{memory_failure, qmp_failure};
use super::mirror::mirror_name;
use super::{Source, abort};
use crate::failure::{Failure, OrFail, Outcome, chain};

/// Longest a guest is held stopped before the commit point, in milliseconds;
/// past that the migration is aborted and the guest goes on.
const STOPPED_MS_MAX: u64 = 60_000;
/// Longest time for reading everything again on both hosts, in milliseconds; the
/// guest stands meanwhile, as its operator wished.
const VERIFY_MS_MAX: u64 = 30 * 60_000;

/// Where the time of a switchover went so far.
pub(super) struct Switched {
    /// vCPUs stopped; `None` for a VM that was off or paused.
    stopped: Option<Instant>,
    mirrors_ended: Instant,
    pages_sent: Instant,
}

impl Source {
    /// Ends the mirrors and sends the last pages and the device state.
    ///
    /// - `stopped`: when the vCPUs were stopped.
    pub(super) async fn finish_memory(
        &mut self,
        mut events: broadcast::Receiver<QmpEvent>,
        stopped: Instant,
    ) -> Outcome<Switched> {
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

    /// With full verification: what really stands in RAM and images is read
    /// again on both hosts at the same time, and compared.
    pub(super) async fn verify_fully(&self) -> Outcome<()> {
        if !self.verifies_fully() {
            return Ok(());
        }
        let (path, definition) = (self.path("verify"), &self.offer.definition);
        let qemu = self.offer.running.then_some(&self.qemu);
        let (ours, theirs) = tokio::join!(
            verify::digests(&self.agent, definition, qemu),
            self.link.post_within::<_, Digests>(&path, &(), VERIFY_MS_MAX)
        );
        let (ours, theirs) = (ours?, theirs?);
        match verify::first_difference(definition, &ours, &theirs) {
            None => Ok(()),
            Some(what) => Err(Failure::internal(format!(
                "{what} differs between source and destination: nothing was handed over; this is \
                 a fault in Limosa or in a host's memory or disk"
            ))),
        }
    }

    /// *ready?*, the commit, and what follows. From here on the machine decides.
    pub(super) async fn hand_over(mut self, switched: Switched) {
        let hand = Arc::clone(&self.hand);
        hand.feed(On::Delivered).await;
        let ready = match self.ask_ready().await {
            Ok(ready) => ready,
            Err(failure) => return abort::abort(self, &failure).await,
        };
        let device_state_done = Instant::now();
        if matches!(ready, DestinationWord::Ready { .. })
            && let Err(failure) = self.job.pass_commit_point()
        {
            return abort::abort(self, &failure).await;
        }
        let mut words = hand.hear(ready).await;
        let committed = Instant::now();
        let answer = match words.pop() {
            Some(commit @ SourceAction::SendCommit(_)) => hand.ask_destination(&commit).await,
            // It declined, or nobody knows whether the commit was recorded.
            other => {
                self.close_plane();
                words.extend(other);
                return hand.finish(words).await;
            }
        };
        let resumed = Instant::now();
        let downtime = switched.stopped.map(|stopped| Downtime {
            stop_ms: ms(switched.mirrors_ended - stopped),
            final_round_ms: ms(switched.pages_sent - switched.mirrors_ended),
            device_state_ms: ms(device_state_done - switched.pages_sent),
            commit_ms: ms(committed - device_state_done),
            resume_ms: ms(resumed - committed),
            total_ms: ms(resumed - stopped),
        });
        self.job.enter(Phase::Retire);
        // The last round and the device state are in these figures.
        if let Some(plane) = self.plane.as_ref() {
            let moved = plane.moved();
            self.job.progress(|progress| progress.moved = moved);
        }
        self.close_plane();
        hand.note_handed(Handed { downtime, proofs: self.proofs() }).await;
        let words = match answer {
            Ok(word) => hand.hear(word).await,
            // Asked again until it is answered.
            Err(_) => Vec::new(),
        };
        hand.finish(words).await;
    }

    async fn ask_ready(&self) -> Outcome<DestinationWord> {
        let request =
            ReadyRequest { paused: !self.was_running, addresses: self.vm.addresses.seen() };
        let path = self.path("ready");
        tokio::select! {
            word = self.link.post_within(&path, &request, STOPPED_MS_MAX) => match word? {
                DestinationWord::Undecided | DestinationWord::Unheard => Err(Failure::peer(
                    format!("{} does not receive this migration any more", self.link.name()),
                )),
                word => Ok(word),
            },
            () = self.job.cancelled() => Err(Failure::conflict("cancelled by an operator")),
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
