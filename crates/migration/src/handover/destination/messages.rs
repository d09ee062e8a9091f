//! What a destination answers to the source, and what it asks it.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use limosa_protocol::handover::{DestinationAction as Do, DestinationEvent as On};
use limosa_protocol::id::Epoch;
use limosa_protocol::peer::{DestinationVote, SourceDecision};
use tracing::Instrument;

use super::DestinationDriver;
use crate::handover::operator::{expect_forcible, expect_recorded};
use crate::handover::status::{ASK_EVERY, PeerAnswer};
use crate::peer::{PeerClient, PeerError};
use limosa_host::failure::{Failure, Result};

/// How often a source that sends is asked whether it still means to.
const ASK_WHILE_RECEIVING_EVERY: Duration = Duration::from_secs(5);
/// Answers in a row that nothing is decided, after which a whole copy is in doubt.
const UNDECIDED_COUNT_MAX: u32 = 5;

impl DestinationDriver {
    /// What this half answers now.
    pub(crate) async fn vote(&self) -> DestinationVote {
        let messages = self.feed(On::Asked).await;
        self.vote_of(&messages).await
    }

    /// The answer to a request that led to some words.
    async fn vote_of(&self, messages: &[Do]) -> DestinationVote {
        match messages.last() {
            Some(Do::SendReady { epoch, attempt }) => {
                DestinationVote::Ready { epoch: *epoch, attempt: *attempt }
            }
            Some(Do::SendRunning { epoch }) => DestinationVote::Running { epoch: *epoch },
            Some(Do::SendDeclined { epoch }) => {
                let reason = self.inner.lock().await.record.view.reason.clone();
                let reason = reason.unwrap_or_else(|| "it gave up".to_owned());
                DestinationVote::Declined { epoch: *epoch, reason }
            }
            _ => DestinationVote::Undecided,
        }
    }

    /// Takes the source's word, and answers it.
    pub(crate) async fn receive(&self, message: On) -> DestinationVote {
        let messages = self.feed(message).instrument(self.job.span()).await;
        let answer = self.vote_of(&messages).await;
        match answer {
            DestinationVote::Undecided => self.vote().await,
            answer => answer,
        }
    }

    /// Takes the source's word that the VM stays there, and why.
    pub(crate) async fn receive_stays(&self, epoch: Epoch, reason: &str) -> DestinationVote {
        self.note_reason(&format!("the source gave up: {reason}")).await;
        self.receive(On::Stays { epoch }).await
    }

    /// All is here and equal, and is flushed.
    pub(crate) async fn complete(&self, attempt: u32, paused: bool) -> DestinationVote {
        let mut inner = self.inner.lock().await;
        inner.record.paused = paused;
        // A restarted agent announces them, too.
        inner.record.addresses = self.vm.addresses.seen();
        drop(inner);
        self.receive(On::Complete { attempt }).await
    }

    /// The source tries again; whether another QEMU is to take the place of the one here.
    pub(crate) async fn begins_retry(&self, attempt: u32) -> bool {
        self.feed(On::Retry { attempt }).await.contains(&Do::BeginRetry)
    }

    /// Something failed here, or somebody cancelled here.
    pub(crate) async fn give_up(&self, reason: &str) -> DestinationVote {
        let mut inner = self.inner.lock().await;
        if inner.machine.may_give_up() {
            inner.record.view.reason.get_or_insert_with(|| reason.to_owned());
            self.feed_locked(&mut inner, On::GiveUp).await;
        }
        drop(inner);
        self.vote().await
    }

    async fn note_reason(&self, reason: &str) {
        let mut inner = self.inner.lock().await;
        inner.record.view.reason.get_or_insert_with(|| reason.to_owned());
    }

    /// Asks the source what it has to say.
    pub(crate) async fn look_at_peer(&self) -> Result<SourceDecision, PeerError> {
        let kept = self.lock_link().take();
        let link = match kept {
            Some(link) => link,
            None => {
                PeerClient::open(&self.context.host.store, &self.context.identity, &self.source)
                    .map_err(|error| PeerError::Unreachable(Failure::from(error).to_string()))?
            }
        };
        let answer = link.decision(self.id()).await?;
        // One that failed is not used again: paired anew, the source may have
        // another address.
        *self.lock_link() = Some(link);
        Ok(answer)
    }

    fn lock_link(&self) -> std::sync::MutexGuard<'_, Option<PeerClient>> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the source, and takes its word.
    async fn ask_source(&self) {
        let answer = self.look_at_peer().await;
        let peer_answer = self.peer_answer_of(&answer).await;
        let event = match answer {
            Ok(SourceDecision::Unknown) => On::Unheard,
            Ok(SourceDecision::Undecided) => On::Undecided,
            Ok(SourceDecision::Commit(commit)) => On::Commit { epoch: commit.epoch() },
            Ok(SourceDecision::Stays { epoch }) => {
                self.note_reason("the source kept the VM").await;
                On::Stays { epoch }
            }
            Ok(SourceDecision::Retired { epoch }) => On::Retired { epoch },
            // Told once, as a doubt.
            Err(_) => return self.note_peer_answer(peer_answer).await,
        };
        self.feed(event).await;
        // Whether it settled anything is known only now.
        self.note_peer_answer(peer_answer).await;
    }

    /// Whether such an answer can settle anything.
    async fn peer_answer_of(&self, answer: &Result<SourceDecision, PeerError>) -> PeerAnswer {
        let is_receiving = self.status().is_receiving;
        let mut inner = self.inner.lock().await;
        // As long as something is received, nothing is to be decided: a long move
        // must not begin its switchover in doubt.
        if is_receiving || !matches!(answer, Ok(SourceDecision::Undecided)) {
            inner.undecided_count = 0;
        }
        match answer {
            Ok(SourceDecision::Unknown) => PeerAnswer::HasForgotten,
            Ok(SourceDecision::Undecided) if is_receiving => PeerAnswer::Settles,
            Ok(SourceDecision::Undecided) => {
                inner.undecided_count = inner.undecided_count.saturating_add(1);
                // It may be about to commit; for seconds it is not.
                if inner.undecided_count >= UNDECIDED_COUNT_MAX {
                    PeerAnswer::Unclear
                } else {
                    PeerAnswer::Settles
                }
            }
            Ok(_) => PeerAnswer::Settles,
            Err(_) => PeerAnswer::IsSilent,
        }
    }

    /// Notes what came of asking the source.
    async fn note_peer_answer(&self, peer_answer: PeerAnswer) {
        let mut inner = self.inner.lock().await;
        if inner.peer != peer_answer {
            inner.peer = peer_answer;
            self.publish(&mut inner).await;
        }
    }

    /// Asks the source, again and again, whenever the machine wants to know.
    pub(crate) fn spawn_settling(self: &Arc<Self>) {
        let driver = Arc::clone(self);
        self.job.spawn(async move {
            while driver.status().ended.is_none() {
                let is_receiving = driver.status().is_receiving;
                let pause = if is_receiving { ASK_WHILE_RECEIVING_EVERY } else { ASK_EVERY };
                tokio::time::sleep(pause).await;
                let messages = driver.feed(On::Silence).await;
                if messages.contains(&Do::AskSource) {
                    driver.ask_source().await;
                }
            }
        });
    }

    /// Tells the machine of QEMU's end, once its watch has seen it.
    pub(super) fn spawn_qemu_watch(self: &Arc<Self>) {
        let (driver, mut ends) = (Arc::downgrade(self), self.vm.qemu_ends());
        let mut status = self.status.subscribe();
        self.job.spawn(async move {
            let has_gone = tokio::select! {
                ended = ends.changed() => ended.is_ok(),
                // Settled, or never begun.
                _ = status.wait_for(|now| now.ended.is_some()) => false,
            };
            if let Some(driver) = driver.upgrade().filter(|_| has_gone) {
                driver.feed(On::QemuGone).await;
            }
        });
    }

    /// An operator gives the VM to this host.
    pub(crate) async fn force_owner(&self, by: String) -> Result<()> {
        let mut inner = self.inner.lock().await;
        expect_forcible(self.status())?;
        inner.record.forced = Some(by.clone());
        inner.record.view.reason = Some(format!("given to this host by an operator ({by})"));
        self.feed_locked(&mut inner, On::ForceOwner).await;
        drop(inner);
        expect_recorded(self.status())
    }
}
