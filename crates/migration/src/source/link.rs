//! The link of a migration at its source, which opens all connections.
//!
//! ```text
//!                 ┌─ up ◄──────────────── LinkBack ────────────────┐
//! plane: LinkLost ▼                                                │
//!        lost ─► ask the destination ─► open a new set ─► the plane goes on
//!          │          └ it gave up ─┐       └ not to be had: again in a moment
//!          └ `link_wait_s` over ────┴─► ended: the migration is aborted
//! ```
//!
//! **Invariants.** A set of connections has a number of its own, and no number
//! comes twice. Once ended, a link stays ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use limosa_plane::{ChannelIo, PlaneError, PlaneEvent, PlaneEvents, SourcePlane};
use limosa_protocol::id::MigrationId;
use limosa_protocol::peer::{ChannelHello, ChannelRole, DestinationVote};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::Instrument;

use crate::job::Job;
use crate::peer::{PeerClient, PeerError, into_blocking};
use limosa_host::failure::{Failure, Result, chain};

/// A destination that has everything closes its connections; until the source
/// hears that it is ready, it need not look after them.
const THROUGH_GRACE: Duration = Duration::from_secs(1);
/// Pause between two tries to have a link again.
const TRY_EVERY: Duration = Duration::from_millis(500);
/// Longest wait for the vote of a destination whose link is lost.
const VOTE_MAX: Duration = Duration::from_secs(5);

/// Where the link stands.
#[derive(Debug, Clone)]
pub(super) enum LinkState {
    Up,
    Lost {
        why: PlaneError,
        since: Instant,
    },
    /// Nobody waits for it any more
    Ended(Failure),
}

impl LinkState {
    pub(super) fn is_up(&self) -> bool {
        matches!(self, Self::Up)
    }
}

/// Takes the events of the link out of those of the plane, and reports them.
pub(super) struct LinkEvents {
    pub(super) state: watch::Sender<LinkState>,
    pub(super) job: Arc<Job>,
    /// How long a lost link is waited for
    pub(super) wait: Duration,
    /// The destination has everything, so that a loss is no news
    pub(super) through: Arc<AtomicBool>,
}

impl LinkEvents {
    /// Runs until the plane is gone; all other events go to `others`.
    pub(super) async fn run(self, mut events: PlaneEvents, others: mpsc::Sender<PlaneEvent>) {
        while let Some(event) = events.recv().await {
            match event {
                PlaneEvent::LinkLost(why) => {
                    self.take(LinkState::Lost { why, since: Instant::now() });
                }
                PlaneEvent::LinkBack => self.take(LinkState::Up),
                other => {
                    if others.send(other).await.is_err() {
                        tracing::debug!("a plane event came after the migration's end");
                    }
                }
            }
        }
    }

    fn take(&self, next: LinkState) {
        match &next {
            _ if self.through.load(Ordering::Acquire) => {}
            LinkState::Lost { why, .. } => {
                tracing::warn!(error = chain(why), "the link is lost");
                self.job.report_link_lost(chain(why), self.wait);
            }
            _ => {
                tracing::info!("the link is back");
                self.job.report_link_back();
            }
        }
        self.state.send_if_modified(|state| {
            let is_open = !matches!(state, LinkState::Ended(_));
            if is_open {
                *state = next;
            }
            is_open
        });
    }
}

/// Opens all connections of a plane, one set after the other.
#[derive(Clone)]
pub(super) struct Connector {
    pub(super) link: Arc<PeerClient>,
    pub(super) migration: MigrationId,
    pub(super) token: String,
    pub(super) channel_count: u8,
    /// Number of the set that was tried last, whoever tried
    pub(super) set: Arc<AtomicU32>,
}

impl Connector {
    /// Opens the channels, by number, and the return path; `None` when the
    /// destination has everything already.
    pub(super) async fn open(&self) -> Result<Option<(Vec<ChannelIo>, ChannelIo)>, PeerError> {
        let set = self.set.fetch_add(1, Ordering::Relaxed) + 1;
        let mut channels = Vec::new();
        for index in 0..self.channel_count {
            let Some(channel) = self.open_one(set, ChannelRole::Channel(index)).await? else {
                return Ok(None);
            };
            channels.push(channel);
        }
        let return_path = self.open_one(set, ChannelRole::ReturnPath).await?;
        Ok(return_path.map(|return_path| (channels, return_path)))
    }

    async fn open_one(&self, set: u32, role: ChannelRole) -> Result<Option<ChannelIo>, PeerError> {
        let token = self.token.clone();
        let hello = ChannelHello { migration: self.migration, token, set, role };
        let Some(stream) = self.link.open_channel(&hello).await? else { return Ok(None) };
        let (socket, tls) = stream.into_inner();
        into_blocking(socket, tls.into())
            .map(Some)
            .map_err(|error| PeerError::Here(format!("opening a data channel: {error}")))
    }
}

/// Brings new connections whenever those of a plane are lost; ends when dropped.
pub(super) struct LinkKeeper(tokio::task::JoinHandle<()>);

impl Drop for LinkKeeper {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// - `wait`: how long a lost link is waited for.
pub(super) fn keep(
    connector: Connector,
    plane: &Arc<SourcePlane>,
    state: watch::Sender<LinkState>,
    wait: Duration,
    through: Arc<AtomicBool>,
) -> LinkKeeper {
    let plane = Arc::clone(plane);
    let keeping = async move {
        let mut changes = state.subscribe();
        loop {
            // The sender is ours: it is never gone.
            let lost = changes.wait_for(|state| !state.is_up()).await.map(|state| state.clone());
            let Ok(LinkState::Lost { why, .. }) = lost else { return };
            if through.load(Ordering::Acquire) {
                tokio::time::sleep(THROUGH_GRACE).await;
            }
            let retry = reconnect(&connector, &plane, &mut changes);
            let ended = match tokio::time::timeout(wait, retry).await {
                Ok(Ok(true)) => continue,
                Ok(Ok(false)) => return,
                Ok(Err(failure)) => failure,
                Err(_elapsed) => Failure::peer(format!(
                    "the link to {} was lost and did not come back within {} s ({})",
                    connector.link.name(),
                    wait.as_secs(),
                    chain(&why)
                )),
            };
            state.send_replace(LinkState::Ended(ended));
        }
    };
    LinkKeeper(tokio::spawn(keeping.in_current_span()))
}

/// Tries until the link is there again, or cannot come back; `false` when it is
/// not needed any more.
async fn reconnect(
    connector: &Connector,
    plane: &SourcePlane,
    changes: &mut watch::Receiver<LinkState>,
) -> Result<bool> {
    loop {
        expect_receiving(connector).await?;
        match connector.open().await {
            Ok(None) => return Ok(false),
            Ok(Some((channels, return_path))) => {
                changes.mark_unchanged();
                plane
                    .reconnect(channels, return_path)
                    .map_err(|error| Failure::internal(chain(&error)))?;
                // The plane says what becomes of them, before long: it does not
                // suffer silence.
                if changes.changed().await.is_err() || changes.borrow().is_up() {
                    return Ok(true);
                }
            }
            Err(PeerError::Here(message)) => return Err(Failure::internal(message)),
            // One that refuses has its reasons, which it tells when asked.
            Err(error) => tracing::debug!(%error, "no link yet"),
        }
        tokio::time::sleep(TRY_EVERY).await;
    }
}

/// Fails when the destination does not receive any more; one that does not
/// answer may.
async fn expect_receiving(connector: &Connector) -> Result<()> {
    let host = connector.link.name();
    match connector.link.vote_within(connector.migration, VOTE_MAX).await {
        Ok(DestinationVote::Declined { reason, .. }) => {
            Err(Failure::peer(format!("{host} gave up: {reason}")))
        }
        Ok(DestinationVote::Unknown) => {
            Err(Failure::peer(format!("{host} does not know this migration any more")))
        }
        Ok(_) => Ok(()),
        Err(error) => {
            tracing::debug!(%error, "no link yet");
            Ok(())
        }
    }
}

/// Repeats a request to a destination that cannot be reached, for as long as a migration
/// waits for a lost link.
pub(super) struct Retry<'a> {
    pub(super) job: &'a Job,
    pub(super) wait: Duration,
    pub(super) lost: Option<Instant>,
}

/// Why a request that was repeated has no answer.
#[derive(Debug)]
pub(super) enum NoAnswer {
    /// The link was lost, and the wait is over
    LinkLost(Failure),
    /// Another try would change nothing
    Failed(Failure),
}

impl From<NoAnswer> for Failure {
    fn from(error: NoAnswer) -> Self {
        match error {
            NoAnswer::LinkLost(failure) | NoAnswer::Failed(failure) => failure,
        }
    }
}

impl Retry<'_> {
    /// Sends the request until the destination answers.
    pub(super) async fn run<R, F>(mut self, mut request: impl FnMut() -> F) -> Result<R, NoAnswer>
    where
        F: Future<Output = Result<R, PeerError>>,
    {
        loop {
            match request().await {
                Ok(answer) => return Ok(answer),
                Err(PeerError::Unreachable(reason)) => self.wait(reason).await?,
                Err(error) => return Err(NoAnswer::Failed(error.into())),
            }
        }
    }

    /// Waits a moment before the next try; fails when the whole wait is over.
    async fn wait(&mut self, reason: String) -> Result<(), NoAnswer> {
        let lost = *self.lost.get_or_insert_with(Instant::now);
        if lost.elapsed() >= self.wait {
            let message = format!("{reason}, for {} s", self.wait.as_secs());
            return Err(NoAnswer::LinkLost(Failure::peer(message)));
        }
        self.job.report_link_lost(reason, self.wait);
        tokio::time::sleep(TRY_EVERY).await;
        Ok(())
    }
}

impl Drop for Retry<'_> {
    fn drop(&mut self) {
        if self.lost.is_some() {
            self.job.report_link_back();
        }
    }
}
