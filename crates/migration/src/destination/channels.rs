//! Data connections at the destination: the source opens them, as a set.
//!
//! ```text
//! hello (migration, token, set, role) ─► gathered until a set is whole
//!      first set ─► the plane starts      a later one ─► the plane goes on over it
//! ```
//!
//! **Invariants.** Only a connection with the migration's token from its source is
//! taken. A set takes the place of those before, never of a later one.

use std::sync::Arc;
use std::time::Duration;

use limosa_plane::PlaneError;
use limosa_protocol::id::HostName;
use limosa_protocol::peer::{
    CHANNEL_ACCEPTED, CHANNEL_HELLO_BYTES_MAX, CHANNEL_NOT_NEEDED, ChannelHello,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::server::TlsStream;
use tracing::Instrument;

use super::incoming::Incoming;
use crate::migrations::Migrations;
use crate::peer::into_blocking;
use limosa_faults::{self as faults, Edge, Kind};
use limosa_host::failure::{OrFail, Result, chain};

/// Longest wait for the hello of a connection.
const HELLO_MAX: Duration = Duration::from_secs(10);
/// How much longer than the source a destination waits for a lost link: whoever
/// has the guest is to give up first.
const WAIT_LONGER: Duration = Duration::from_secs(10);

/// Takes a data connection of a paired host, past its hello.
pub async fn accept_channel(
    migrations: &Arc<Migrations>,
    from: &HostName,
    mut stream: TlsStream<TcpStream>,
) -> anyhow::Result<()> {
    let read = async {
        let length = stream.read_u16().await?;
        anyhow::ensure!(length <= CHANNEL_HELLO_BYTES_MAX, "a hello of {length} bytes");
        let mut text = vec![0; length.into()];
        stream.read_exact(&mut text).await?;
        Ok(serde_json::from_slice::<ChannelHello>(&text)?)
    };
    let hello = tokio::time::timeout(HELLO_MAX, read).await??;
    let incoming = migrations
        .incoming(hello.migration, from)
        .ok_or_else(|| anyhow::anyhow!("a channel for a migration that is not under way"))?;
    faults::reach(Kind::Answer, "channel", Edge::Before).await;
    let added = incoming.add_channel(&hello, stream).await;
    faults::reach(Kind::Answer, "channel", Edge::After).await;
    added.map_err(|failure| anyhow::anyhow!("{failure}"))
}

impl Incoming {
    async fn add_channel(
        self: &Arc<Self>,
        hello: &ChannelHello,
        mut stream: TlsStream<TcpStream>,
    ) -> Result<()> {
        self.driver.expect_preparing()?;
        self.connections.check(hello)?;
        let doing = "accepting a channel";
        let is_needed = !self.connections.have_ended();
        let answer = if is_needed { CHANNEL_ACCEPTED } else { CHANNEL_NOT_NEEDED };
        let said = async {
            stream.write_u8(answer).await?;
            stream.flush().await
        };
        tokio::time::timeout(HELLO_MAX, said).await.or_fail(doing)?.or_fail(doing)?;
        if !is_needed {
            return Ok(());
        }
        let (socket, tls) = stream.into_inner();
        let io = into_blocking(socket, tls.into()).or_fail(doing)?;
        match self.connections.add(hello, io)? {
            None => Ok(()),
            Some(set) => match self.driver.reconnect(set) {
                None => Ok(()),
                Some(set) => self.start_plane(set).instrument(self.job.span()).await,
            },
        }
    }

    /// Declines if no channels come in time in this attempt.
    pub(super) fn spawn_channel_watch(self: &Arc<Self>) {
        let incoming = Arc::clone(self);
        let attempt = *self.attempt.borrow();
        self.job.spawn(async move {
            tokio::time::sleep(incoming.context.settings.link_wait() + WAIT_LONGER).await;
            let is_last = *incoming.attempt.borrow() == attempt;
            if is_last && !incoming.connections.have_come() {
                incoming.fail("the source opened no channels".to_owned()).await;
            }
        });
    }

    /// Declines if a lost link does not come back in time. Ends with whoever tells of it,
    /// the plane and this half, which it does not keep.
    pub(super) fn spawn_link_watch(
        self: &Arc<Self>,
        mut lost: watch::Receiver<Option<PlaneError>>,
    ) {
        let (incoming, job) = (Arc::downgrade(self), Arc::clone(&self.job));
        let wait = self.context.settings.link_wait() + WAIT_LONGER;
        self.job.spawn(async move {
            loop {
                let why = lost.wait_for(Option::is_some).await.map(|why| why.clone());
                let Ok(Some(why)) = why else { return };
                job.report_link_lost(chain(&why), wait);
                let back = tokio::time::timeout(wait, lost.wait_for(Option::is_none)).await;
                match back.map(|back| back.is_ok()) {
                    Ok(true) => job.report_link_back(),
                    Ok(false) => return,
                    Err(_elapsed) => {
                        let Some(incoming) = incoming.upgrade() else { return };
                        let source = incoming.source();
                        incoming.fail(format!(
                            "the link from {source} was lost and did not come back within {} s ({})",
                            wait.as_secs(),
                            chain(&why)
                        ))
                        .await;
                        return;
                    }
                }
            }
        });
    }
}
