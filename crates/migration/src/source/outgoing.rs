//! The state of one migration at its source, which all phases share.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use limosa_host::failure::{Failure, Result, chain};
use limosa_host::vm::{Qemu, Vm};
use limosa_plane::{PlaneError, PlaneEvent, SourcePlane};
use limosa_protocol::id::DiskId;
use limosa_protocol::peer::Offer;
use limosa_protocol::plan::MigrationPlan;
use tokio::sync::{mpsc, watch};

use super::link::{Connector, LinkKeeper, LinkState, Retry};
use crate::context::Context;
use crate::handover::SourceDriver;
use crate::job::Job;
use crate::peer::PeerClient;

/// One migration at its source.
pub(crate) struct Outgoing {
    pub(super) context: Arc<Context>,
    pub(super) vm: Arc<Vm>,
    pub(super) job: Arc<Job>,
    pub(super) link: Arc<PeerClient>,
    pub(super) offer: Offer,
    pub(super) driver: Arc<SourceDriver>,
    /// The guest's QEMU; for a VM that is off, one that only reads its disks.
    pub(super) qemu: Qemu,
    /// Whether the guest's vCPUs ran when the migration began.
    pub(super) was_running: bool,
    pub(super) plane: Option<Arc<SourcePlane>>,
    pub(super) link_state: watch::Sender<LinkState>,
    /// The destination has all of the VM.
    pub(super) through: Arc<AtomicBool>,
    /// What the two hosts hold is not the same; the destination looks for the place.
    pub(super) differs: bool,
    /// Opens connections, once the destination waits for them
    pub(super) connector: Option<Connector>,
    pub(super) link_keeper: Option<LinkKeeper>,
    /// How often the guest was stopped for its switchover
    pub(super) stop_count: u32,
    /// Mirrors were told to end.
    pub(super) mirrors_end: bool,
    /// Disks whose mirror has ended well, with both sides equal.
    pub(super) mirrored: BTreeSet<DiskId>,
    pub(super) events: Option<mpsc::Receiver<PlaneEvent>>,
    pub(super) exports: Vec<limosa_nbd::server::ServerHandle>,
}

impl Outgoing {
    pub(super) fn plan(&self) -> &MigrationPlan {
        &self.offer.plan
    }

    pub(super) fn plane(&self) -> Result<&SourcePlane> {
        self.plane.as_deref().ok_or_else(|| Failure::internal("the data plane is not up"))
    }

    /// The next event of the plane that is not a failure.
    pub(super) async fn plane_event(&mut self) -> Result<PlaneEvent> {
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
    pub(super) fn close_plane(&mut self) {
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

    /// Retries for as long as a migration waits for a lost link.
    pub(super) fn retry(&self) -> Retry<'_> {
        self.retry_for(self.context.settings.link_wait())
    }

    pub(super) fn retry_for(&self, wait: Duration) -> Retry<'_> {
        Retry { job: &self.job, wait, lost: None }
    }

    /// Retries for what is left of the wait if the link is lost already: the destination
    /// counts from that moment, too.
    pub(super) fn retry_since_loss(&self) -> Retry<'_> {
        let lost = match &*self.link_state.borrow() {
            LinkState::Lost { since, .. } => Some(*since),
            _ => None,
        };
        Retry { job: &self.job, wait: self.context.settings.link_wait(), lost }
    }

    /// Ends with the reason when the link is given up.
    pub(super) async fn link_ended(mut state: watch::Receiver<LinkState>) -> Failure {
        let ended = state.wait_for(|state| matches!(state, LinkState::Ended(_))).await;
        match ended.as_deref() {
            Ok(LinkState::Ended(failure)) => failure.clone(),
            // Whoever asks has the sender.
            _ => Failure::internal("the link is not looked after any more"),
        }
    }

    /// Waits until there is a link.
    pub(super) async fn wait_for_link(&self) {
        // The sender is ours: it is never gone.
        self.link_state.subscribe().wait_for(LinkState::is_up).await.ok();
    }
}

pub(super) fn plane_failure(error: &PlaneError) -> Failure {
    Failure::peer(format!("moving the VM's contents: {}", chain(error)))
}
