//! What a source says to the destination, and what it hears from it.

use std::sync::{Arc, PoisonError};

use limosa_protocol::handover::{SourceAction as Do, SourceEvent as On};
use limosa_protocol::migration::Outcome;
use limosa_protocol::peer::{Commit, DestinationVote, Retired, SourceDecision, Stays};

use super::SourceDriver;
use crate::handover::operator::{expect_forcible, expect_recorded};
use crate::handover::report::report_unknown;
use crate::handover::status::{ASK_EVERY, PeerAnswer};
use crate::peer::{PeerClient, PeerError};
use limosa_host::failure::{Failure, Result};

/// Most words that are said in a row; what is left is said at the next silence.
const MESSAGE_COUNT_MAX: u32 = 8;

impl SourceDriver {
    /// The connection to the destination, made when there is none.
    pub(crate) fn link(&self) -> Result<Arc<PeerClient>, PeerError> {
        let mut kept = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(link) = kept.as_ref() {
            return Ok(Arc::clone(link));
        }
        let made =
            PeerClient::open(&self.context.host.store, &self.context.identity, &self.destination)
                .map_err(|error| PeerError::Unreachable(Failure::from(error).to_string()))?;
        Ok(Arc::clone(kept.insert(Arc::new(made))))
    }

    /// Says words and takes the answers, until nothing is left to say or the
    /// destination does not answer.
    pub(crate) async fn say(&self, mut messages: Vec<Do>) -> Result<(), PeerError> {
        for _ in 0..MESSAGE_COUNT_MAX {
            let Some(message) = messages.pop() else { break };
            let answer = self.ask_destination(&message).await?;
            // The last word: what is answered to it was said before.
            if !matches!(message, Do::SendRetired { .. }) {
                messages.extend(self.receive(answer).await);
            }
        }
        Ok(())
    }

    /// Takes the destination's word.
    pub(crate) async fn receive(&self, message: DestinationVote) -> Vec<Do> {
        let (event, peer_answer) = match message {
            DestinationVote::Unknown => (Some(On::Unheard), PeerAnswer::HasForgotten),
            DestinationVote::Undecided => (None, PeerAnswer::Unclear),
            DestinationVote::Ready { epoch, attempt } => {
                (Some(On::Ready { epoch, attempt }), PeerAnswer::Settles)
            }
            DestinationVote::Running { epoch } => {
                (Some(On::Running { epoch }), PeerAnswer::Settles)
            }
            DestinationVote::Declined { epoch, reason } => {
                self.note_their_reason(&reason).await;
                (Some(On::Declined { epoch }), PeerAnswer::Settles)
            }
        };
        let messages = match event {
            Some(event) => self.feed(event).await,
            None => Vec::new(),
        };
        // Whether it settled anything is known only now.
        self.note_peer_answer(peer_answer).await;
        messages
    }

    async fn note_their_reason(&self, theirs: &str) {
        let mut inner = self.inner.lock().await;
        let is_ours = inner.reason.as_ref().is_some_and(|ours| {
            // It may only repeat what it was told.
            !inner.reason_is_theirs || theirs.ends_with(ours.as_str())
        });
        if !is_ours {
            inner.reason = Some(format!("{} gave up: {theirs}", self.destination));
        }
    }

    /// Says one word, and gives the answer to it.
    pub(crate) async fn ask_destination(&self, message: &Do) -> Result<DestinationVote, PeerError> {
        let (link, id) = (self.link()?, self.job.id());
        let answer = match message {
            Do::SendCommit(committed) => link.commit(id, &Commit::of(committed)).await,
            Do::SendStays { epoch } => {
                let reason = self.inner.lock().await.reason.clone();
                let reason = reason.unwrap_or_else(|| "the VM stays at its source".to_owned());
                link.stays(id, &Stays { epoch: *epoch, reason }).await
            }
            Do::SendRetired { epoch } => link.retired(id, &Retired { epoch: *epoch }).await,
            // Asked by `crate::source`, which knows what goes with it; a state that
            // only repeats it has nothing to add.
            _ => return Ok(DestinationVote::Undecided),
        };
        if answer.is_err() {
            // Paired again it may have another certificate or address.
            self.link.lock().unwrap_or_else(PoisonError::into_inner).take();
            self.note_peer_answer(PeerAnswer::IsSilent).await;
        }
        answer
    }

    /// Notes what came of asking the destination.
    async fn note_peer_answer(&self, peer_answer: PeerAnswer) {
        let mut inner = self.inner.lock().await;
        if inner.peer != peer_answer {
            inner.peer = peer_answer;
            self.publish(&mut inner).await;
        }
    }

    /// What the destination is answered when it asks.
    pub(crate) async fn answer(&self) -> SourceDecision {
        let messages = self.feed(On::Asked).await;
        messages.first().map_or(SourceDecision::Undecided, |message| match message {
            Do::SendCommit(committed) => SourceDecision::Commit(Commit::of(committed)),
            Do::SendStays { epoch } => SourceDecision::Stays { epoch: *epoch },
            Do::SendRetired { epoch } => SourceDecision::Retired { epoch: *epoch },
            _ => SourceDecision::Undecided,
        })
    }

    /// Gives up, says so, and tells the end; asks on in the background when
    /// the destination does not confirm.
    ///
    /// - `is_echo`: only the connection broke; the destination may know why.
    pub(crate) async fn give_up(self: &Arc<Self>, reason: String, is_echo: bool) {
        let mut inner = self.inner.lock().await;
        inner.reason.get_or_insert(reason);
        inner.reason_is_theirs = is_echo;
        drop(inner);
        let messages = self.feed(On::GiveUp).await;
        self.finish(messages).await;
    }

    /// Says what is left to say, and tells the end.
    pub(crate) async fn finish(self: &Arc<Self>, messages: Vec<Do>) {
        if let Err(error) = self.say(messages).await {
            tracing::warn!(migration = %self.job.id(), %error, "the destination did not answer");
        }
        self.report_end().await;
        if self.status().ended.is_none() {
            self.spawn_settling();
        }
    }

    /// Tells an operator who waits how it ended, as soon as that is certain.
    async fn report_end(&self) {
        let mut inner = self.inner.lock().await;
        let status = self.status();
        if status.ended.is_none() && status.is_ours && inner.record.view.outcome.is_none() {
            // The VM is here; that the destination has not confirmed it yet
            // concerns nobody but us.
            let reason = inner.reason.clone();
            let view = self.job.ended_view(Outcome::Stayed, reason, None, Vec::new());
            inner.record.view = view;
            let stored = self.context.host.store.put(&self.job.id().to_string(), &inner.record);
            if let Err(error) = stored {
                report_unknown(&inner.record, &error);
            }
        }
        if inner.record.view.ended_unix_ms.is_some() {
            self.job.publish(&inner.record.view);
        }
    }

    /// Repeats what has to be heard until it is.
    pub(crate) fn spawn_settling(self: &Arc<Self>) {
        let driver = Arc::clone(self);
        self.job.spawn(async move {
            while driver.status().ended.is_none() {
                tokio::time::sleep(ASK_EVERY).await;
                let messages = driver.feed(On::Silence).await;
                // Told once, as a doubt; the log need not repeat it each second.
                driver.say(messages).await.ok();
            }
            driver.report_end().await;
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
                let messages = driver.feed(On::QemuGone).await;
                driver.say(messages).await.ok();
            }
        });
    }

    pub(crate) async fn move_on(&self) {
        let messages = self.feed(On::MovesOn).await;
        self.say(messages).await.ok();
    }

    /// An operator gives the VM to this host.
    pub(crate) async fn force_owner(self: &Arc<Self>, by: String) -> Result<()> {
        let mut inner = self.inner.lock().await;
        expect_forcible(self.status())?;
        inner.record.forced = Some(by.clone());
        inner.reason = Some(format!("given to this host by an operator ({by})"));
        let messages = self.feed_locked(&mut inner, On::ForceOwner).await;
        drop(inner);
        self.finish(messages).await;
        expect_recorded(self.status())
    }

    /// Asks the destination how it stands.
    pub(crate) async fn look_at_peer(&self) -> Result<DestinationVote, PeerError> {
        self.link()?.vote(self.job.id()).await
    }
}
