//! A migration, followed by server-sent events through all that can break.
//!
//! ```text
//! follow ─► events ──broke──► one look (GET) ─► a short wait ─► events …
//! ```
//!
//! **Invariants.** [`Follower::next`] may be dropped at any await and called
//! again: no event is lost. A stream that is silent for too long counts as
//! broken, so a dead connection cannot hide the end.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use eventsource_stream::Eventsource;
use futures_util::{Stream, StreamExt};
use http_body_util::BodyDataStream;
use hyper::body::Bytes;
use limosa_protocol::id::MigrationId;
use limosa_protocol::migration::Migration;

use crate::client::{Client, Refused};

/// Most bytes of one event.
const EVENT_BYTES_MAX: usize = 1 << 20;
/// Longest silence of a stream; agents send a sign of life every 15 s.
const SILENCE_MAX: Duration = Duration::from_secs(45);
/// How long to wait before asking again.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// A migration as it goes, until its end.
pub(crate) struct Follower {
    client: Client,
    id: MigrationId,
    stream: Option<Events>,
    /// The next attempt waits a little
    broken: bool,
}

/// The text of each event.
type Events = Pin<Box<dyn Stream<Item = Result<String>> + Send>>;

/// What is known anew.
pub(crate) enum News {
    View(Box<Migration>),
    /// The agent cannot be reached at present; it is asked on
    Trouble(anyhow::Error),
}

impl Follower {
    pub(crate) fn new(client: Client, id: MigrationId) -> Self {
        Self { client, id, stream: None, broken: false }
    }

    /// The next news. An error when the agent knows no such migration.
    pub(crate) async fn next(&mut self) -> Result<News> {
        loop {
            let Some(events) = &mut self.stream else {
                match self.open().await {
                    Ok(Some(view)) => return Ok(News::View(Box::new(view))),
                    Ok(None) => continue,
                    Err(error) if error.is::<Refused>() => return Err(error),
                    Err(error) => return Ok(News::Trouble(error)),
                }
            };
            match next_view(events).await {
                Ok(Some(view)) => return Ok(News::View(Box::new(view))),
                // An end before the outcome and a breach are the same to us.
                Ok(None) | Err(_) => {
                    self.stream = None;
                    self.broken = true;
                }
            }
        }
    }

    /// Opens the stream. After a breach it looks once by itself, in case that
    /// streams do not get through.
    async fn open(&mut self) -> Result<Option<Migration>> {
        let path = format!("/v1/migrations/{}", self.id);
        if self.broken {
            tokio::time::sleep(ASK_EVERY).await;
            let view: Migration = self.client.get(&path).await?;
            if view.outcome.is_some() {
                return Ok(Some(view));
            }
        }
        // Until the stream has opened, this attempt is a broken one.
        self.broken = true;
        let body = self.client.stream(&format!("{path}/events")).await?;
        self.stream = Some(texts(BodyDataStream::new(body)));
        Ok(None)
    }
}

/// The texts of the events in a body.
///
/// The parser keeps the bytes of an event that has no end yet, so they are counted before it.
fn texts<E: Into<anyhow::Error> + 'static>(
    chunks: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
) -> Events {
    let bytes_since = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&bytes_since);
    let chunks = chunks.map(move |chunk| {
        let chunk = chunk.map_err(E::into)?;
        let pending_bytes = counted.fetch_add(chunk.len(), Ordering::Relaxed) + chunk.len();
        ensure!(pending_bytes <= EVENT_BYTES_MAX, "an event of the agent has no end");
        Ok(chunk)
    });
    let texts = chunks.eventsource().map(move |event| {
        bytes_since.store(0, Ordering::Relaxed);
        Ok(event.map_err(|error| anyhow!("{error}"))?.data)
    });
    Box::pin(texts)
}

/// The next view; `None` at the end of the stream.
async fn next_view(events: &mut Events) -> Result<Option<Migration>> {
    let next = tokio::time::timeout(SILENCE_MAX, events.next()).await?;
    next.map(|event| Ok(serde_json::from_str(&event?)?)).transpose()
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::*;

    fn chunks(all: Vec<Bytes>) -> Events {
        texts(stream::iter(all.into_iter().map(anyhow::Ok)))
    }

    /// Goal: events are the same however the network cuts their bytes.
    #[tokio::test]
    async fn events_are_whole_however_they_come() {
        let text = "event: migration\ndata: {\"a\":\"\u{e4}\"}\n\n: keep-alive\n\n\
                    id: 7\r\ndata:one\r\ndata:  two\r\n\r\ndata: not yet";
        for size in 1..=text.len() {
            let cut = text.as_bytes().chunks(size).map(Bytes::copy_from_slice);
            let all: Vec<_> = chunks(cut.collect()).map(Result::unwrap).collect().await;
            assert_eq!(all, ["{\"a\":\"\u{e4}\"}", "one\n two"], "in chunks of {size}");
        }
    }

    #[tokio::test]
    async fn an_endless_event_is_refused() {
        for piece in [vec![b'x'; 1 << 16], [&b"data: "[..], &[b'x'; 1 << 16], b"\n"].concat()] {
            let mut events = chunks(vec![Bytes::from(piece); 32]);
            assert!(events.next().await.is_some_and(|event| event.is_err()));
        }
    }
}
