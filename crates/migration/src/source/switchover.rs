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

use futures_util::TryStreamExt;
use futures_util::stream::FuturesUnordered;
use limosa_plane::PlaneEvent;
use limosa_protocol::handover::{SourceAction, SourceEvent as On};
use limosa_protocol::migration::{Downtime, Phase, Role};
use limosa_protocol::peer::{DestinationVote, Digests, Part, ReadyRequest, VerifyRequest};
use limosa_qemu::block;
use limosa_qemu::migrate::{self, MigrationStatus};
use limosa_qemu::qmp::QmpEvent;
use tokio::sync::broadcast;

use super::super::destination::verify;
use super::super::handover::Handed;
use super::abort;
use super::link::NoAnswer;
use super::outgoing::Outgoing;
use super::stop::{Finished, STOPPED_MAX, Stopped, Switched, memory_failure, qmp_failure};
use super::undo::mirror_name;
use crate::job::millis;
use crate::peer::PeerError;
use limosa_host::failure::{Failure, OrFail, Result, chain};

/// Least time that the destination has to load and record what it holds.
const READY_MIN: Duration = Duration::from_secs(2);
/// Longest wait for QEMU to end mirrors that have nothing left. One that it has not
/// ended by then begins anew, for nobody knows whether its disks are equal.
const MIRRORS_END_MAX: Duration = Duration::from_secs(1);
/// Pause before *ready?* is asked again over a lost link.
const ASK_EVERY: Duration = Duration::from_millis(100);

/// Why the other host's contents were not read again.
enum Unread {
    /// The link is away for longer than the guest may stand for that.
    LinkAway,
    Failed(Failure),
}

impl Outgoing {
    /// Ends the mirrors and sends the last pages and the device state.
    pub(super) async fn finish_memory(&mut self, stopped: Stopped) -> Result<Finished> {
        let Stopped { at, mut events } = stopped;
        let too_long = self.hold(at);
        // What a mirror has left needs the link; ending one that has nothing left does not.
        let has_nothing_left = tokio::select! {
            () = too_long => false,
            mirrored = self.wait_mirrored() => mirrored.map(|()| true)?,
        };
        if !has_nothing_left {
            return self.run_on(false).await;
        }
        match tokio::time::timeout(MIRRORS_END_MAX, self.end_mirrors()).await {
            Ok(ended) => ended?,
            Err(_elapsed) => return self.run_on(false).await,
        }
        let mirrors_ended = Instant::now();
        let disk_barrier = self.start_disk_barrier()?;
        migrate::continue_from_pre_switchover(&self.qemu.qmp)
            .await
            .map_err(|error| qmp_failure("going on after the guest stopped", &error))?;
        let too_long = self.hold(at);
        let qmp = self.qemu.qmp.clone();
        let delivered = async {
            wait_completed(&qmp, &mut events).await?;
            let pages_sent = Instant::now();
            self.wait_delivered(true, disk_barrier).await?;
            Ok::<_, Failure>(pages_sent)
        };
        let pages_sent = tokio::select! {
            () = too_long => None,
            sent = delivered => Some(sent?),
        };
        let Some(pages_sent) = pages_sent else { return self.run_on(true).await };
        let stopped = self.was_running.then_some(at);
        Ok(Finished::Whole(Switched { stopped, mirrors_ended, pages_sent }))
    }

    pub(super) fn downtime_limit(&self) -> Duration {
        Duration::from_millis(self.plan().policy.downtime_limit_ms.into())
    }

    /// Ends when a guest that stopped at that moment may stand no longer.
    fn hold(&self, stopped: Instant) -> impl Future<Output = ()> + use<> {
        let limit = stopped + self.downtime_limit();
        let (was_running, mut link) = (self.was_running, self.link_state.subscribe());
        async move {
            if !was_running {
                // It stood before, and may go on standing.
                return std::future::pending().await;
            }
            tokio::time::sleep_until(limit.into()).await;
            let lost = link.wait_for(|state| !state.is_up());
            tokio::time::timeout_at((limit + STOPPED_MAX).into(), lost).await.ok();
        }
    }

    /// For a VM that is off: there is nothing but its disks.
    pub(super) async fn stop_without_memory(&mut self) -> Result<Switched> {
        let now = Instant::now();
        self.end_mirrors().await?;
        let disk_barrier = self.start_disk_barrier()?;
        self.wait_delivered(false, disk_barrier).await?;
        Ok(Switched { stopped: None, mirrors_ended: now, pages_sent: now })
    }

    /// Ends all mirrors, each with both sides equal.
    async fn end_mirrors(&mut self) -> Result<()> {
        self.mirrors_end = true;
        let qmp = &self.qemu.qmp;
        let ids = self.disk_ids();
        let mut ends: FuturesUnordered<_> = ids
            .iter()
            .map(|id| async move {
                block::complete_mirror_without_pivot(qmp, &mirror_name(id))
                    .await
                    .or_fail(&format!("ending the mirror of disk {id}"))
                    .map(|()| id)
            })
            .collect();
        while let Some(id) = ends.try_next().await? {
            self.mirrored.insert(id.clone());
        }
        Ok(())
    }

    fn start_disk_barrier(&self) -> Result<u32> {
        self.plane()?.start_disk_barrier().or_fail("flushing the destination's disks")
    }

    /// Waits until the destination has everything and its digests are ours; that
    /// an earlier disk barrier, given up since, was passed says nothing.
    async fn wait_delivered(&mut self, with_ram: bool, disk_barrier: u32) -> Result<()> {
        let mut ram = !with_ram;
        let mut disks = false;
        while !(ram && disks) {
            match self.plane_event().await? {
                PlaneEvent::RamDelivered => ram = true,
                PlaneEvent::DisksEqual(number) => disks |= number == disk_barrier,
                _ => {}
            }
        }
        Ok(())
    }

    /// With full verification: what really stands in RAM and images is read
    /// again on both hosts at the same time, and compared. `false` when the link was
    /// away for too long meanwhile.
    pub(super) async fn verify_fully(&self) -> Result<bool> {
        if !self.plan().verifies_fully() {
            return Ok(true);
        }
        match self.find_difference().await {
            Ok(None) => Ok(true),
            Ok(Some(place)) => Err(Failure::internal(format!(
                "source and destination differ in {place}: nothing was handed over; this is a \
                 fault in Limosa or in a host's memory or disk"
            ))),
            Err(Unread::LinkAway) => Ok(false),
            Err(Unread::Failed(failure)) => Err(failure),
        }
    }

    /// The first place in which the two hosts differ.
    async fn find_difference(&self) -> Result<Option<String>, Unread> {
        let contents = verify::Contents {
            img: &self.context.host.qemu.img,
            definition: &self.offer.definition,
            qemu: self.plan().moves_memory().then_some(&self.qemu),
            plan: self.plan(),
            side: Role::Source,
        };
        let ours = async { contents.all().await.map_err(Unread::Failed) };
        let (ours, theirs) = tokio::try_join!(ours, self.read_there(None))?;
        let difference = contents.first_difference(None, &ours, &theirs);
        let Some(mut part) = difference else { return Ok(None) };
        // Each time it becomes smaller: a byte would be found in the fifth.
        while !part.is_smallest() {
            let ours = async { contents.part(part).await.map_err(Unread::Failed) };
            let (ours, theirs) = match tokio::try_join!(ours, self.read_there(Some(part))) {
                // What was found so far is worth more than another attempt.
                Err(Unread::LinkAway) => break,
                read => read?,
            };
            match contents.first_difference(Some(part), &ours, &theirs) {
                Some(within) => part = within,
                None => break,
            }
        }
        Ok(Some(contents.name(&part)))
    }

    async fn read_there(&self, part: Option<Part>) -> Result<Digests, Unread> {
        let attempt = self.driver.attempt().await;
        let request = VerifyRequest { attempt, part };
        // The guest is paused because its operator asked for a full verification; a lost link
        // must not pause the guest for longer.
        let retry = if self.was_running {
            self.retry_for(self.downtime_limit() + STOPPED_MAX)
        } else {
            self.retry()
        };
        let read = retry.run(|| self.link.verify(self.job.id(), &request)).await;
        read.map_err(|error| match error {
            NoAnswer::LinkLost(_) if self.was_running => Unread::LinkAway,
            error => Unread::Failed(error.into()),
        })
    }

    /// *ready?*, the commit, and what follows. From here on the machine decides. Gives
    /// the source back when *ready* was not heard for as long as the guest may stand.
    pub(super) async fn handover(self, switched: Switched) -> Option<Self> {
        let asks = self.driver.feed(On::Delivered).await;
        let asked = match asks.first() {
            Some(SourceAction::AskReady { attempt }) => self.ask_ready(*attempt, &switched).await,
            // It was given up meanwhile, so the destination must not become ready.
            _ => Err(Failure::conflict("the move was given up")),
        };
        let asked = asked.and_then(|ready| match ready {
            Some(DestinationVote::Ready { .. }) => self.job.pass_commit_point().map(|()| ready),
            _ => Ok(ready),
        });
        match asked {
            Ok(Some(ready)) => self.take_vote(switched, ready).await,
            Ok(None) => return Some(self),
            Err(failure) => abort::abort(self, &failure).await,
        }
        None
    }

    /// The destination's answer to *ready?*: mostly that it is.
    async fn take_vote(mut self, switched: Switched, ready: DestinationVote) {
        let driver = Arc::clone(&self.driver);
        let device_state_done = Instant::now();
        self.link_keeper = None;
        let mut messages = driver.receive(ready).await;
        let committed = Instant::now();
        let answer = match messages.pop() {
            Some(commit @ SourceAction::SendCommit(_)) => driver.ask_destination(&commit).await,
            // It declined, or nobody knows whether the commit was recorded.
            other => {
                self.close_plane();
                messages.extend(other);
                return driver.finish(messages).await;
            }
        };
        let resumed = Instant::now();
        // When the guest ran there is not known if nobody said so.
        let stopped = switched.stopped.filter(|_| answer.is_ok());
        let downtime = stopped.map(|stopped| Downtime {
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
        driver.note_handed(Handed { downtime, proofs: self.proofs() }).await;
        let messages = match answer {
            Ok(message) => driver.receive(message).await,
            // Asked again until it is answered.
            Err(_) => Vec::new(),
        };
        driver.finish(messages).await;
    }

    /// Asks *ready?*, again while the link is lost and the guest may stand; `None` when it
    /// may not any more.
    async fn ask_ready(
        &self,
        attempt: u32,
        switched: &Switched,
    ) -> Result<Option<DestinationVote>> {
        let (began, limit) = (Instant::now(), self.downtime_limit());
        // Until when the guest is paused, whatever comes of it, and when the link is lost.
        let (until, until_if_lost) = match switched.stopped {
            Some(at) if !self.plan().verifies_fully() => (at + limit + STOPPED_MAX, at + limit),
            Some(_) => (began + limit + STOPPED_MAX, began + limit),
            None => {
                let patience = self.context.settings.link_wait().max(STOPPED_MAX);
                (began + patience, began + patience)
            }
        };
        let at_least = began + READY_MIN;
        let asked = self.ask_ready_until(attempt, until.max(at_least), until_if_lost.max(at_least));
        let mut vote = asked.await?;
        if vote.is_none() && switched.stopped.is_some() {
            if !self.driver.guest().await.is_absent() {
                return Ok(None);
            }
            // Its QEMU is gone: nobody stands any more, and the destination has all of it.
            let until = Instant::now() + self.context.settings.link_wait();
            vote = self.ask_ready_until(attempt, until, until).await?;
        }
        let Some(vote) = vote else {
            return Err(Failure::peer(format!(
                "{} had everything and did not say so within {} ms; move the VM again",
                self.link.name(),
                millis(began.elapsed())
            )));
        };
        match vote {
            DestinationVote::Undecided => Err(Failure::peer(format!(
                "{0} holds everything and could not record it; the log of limosad on {0} says \
                 why (a state store that failed, mostly)",
                self.link.name()
            ))),
            DestinationVote::Unknown => Err(Failure::peer(format!(
                "{} does not know this migration any more",
                self.link.name()
            ))),
            vote => Ok(Some(vote)),
        }
    }

    /// `None` when no answer came until then.
    async fn ask_ready_until(
        &self,
        attempt: u32,
        until: Instant,
        until_if_lost: Instant,
    ) -> Result<Option<DestinationVote>> {
        let paused = !self.was_running;
        let request = ReadyRequest { attempt, paused, addresses: self.vm.addresses.seen() };
        let limit = until.saturating_duration_since(Instant::now());
        let asking = async {
            loop {
                match self.link.ready(self.job.id(), &request, limit).await {
                    Err(PeerError::Unreachable(_)) if Instant::now() >= until_if_lost => {
                        return Ok(None);
                    }
                    Err(PeerError::Unreachable(_)) => tokio::time::sleep(ASK_EVERY).await,
                    answer => return answer.map(Some),
                }
            }
        };
        let asked = tokio::select! {
            asked = tokio::time::timeout_at(until.into(), asking) => asked.unwrap_or(Ok(None)),
            () = self.job.cancelled() => return Err(Failure::conflict("cancelled by an operator")),
        };
        Ok(asked?)
    }

    fn proofs(&self) -> Vec<String> {
        let mut proofs = Vec::new();
        if self.plan().moves_memory() {
            proofs.push("RAM: digests of all pages, kept on both hosts, are equal".to_owned());
        }
        if self.plan().mirrored().next().is_some() {
            proofs.push("disks: digests of all writes, in order, are equal and flushed".to_owned());
        }
        if self.plan().verifies_fully() {
            proofs.push("RAM and disks were read again on both hosts and are equal".to_owned());
        }
        proofs
    }
}

async fn wait_completed(
    qmp: &limosa_qemu::qmp::Qmp,
    events: &mut broadcast::Receiver<QmpEvent>,
) -> Result<()> {
    loop {
        let told = match events.recv().await {
            Ok(event) => migrate::migration_event(&event),
            // The one that is waited for may be among those that were lost.
            Err(broadcast::error::RecvError::Lagged(_)) => {
                Some(migrate::status(qmp).await.or_fail("asking QEMU")?.status)
            }
            Err(error @ broadcast::error::RecvError::Closed) => {
                return Err(Failure::internal(format!("QEMU ended: {}", chain(&error))));
            }
        };
        match told {
            Some(MigrationStatus::Completed) => return Ok(()),
            Some(MigrationStatus::Failed | MigrationStatus::Cancelled) => {
                let why = migrate::status(qmp).await.ok().and_then(|status| status.error_desc);
                return Err(memory_failure(why.as_deref()));
            }
            _ => {}
        }
    }
}

fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 10_000.0).round() / 10.0
}
