//! Server-sent events, cut out of the bytes that bring them; and a migration
//! followed through all that can break.
//!
//! ```text
//! follow ─► events ──broke──► one look (GET) ─► a short wait ─► events …
//! ```
//!
//! **Invariants.** [`Follower::next`] may be dropped at any await and called
//! again: no event is lost. A stream that is silent for too long counts as
//! broken, so a dead connection cannot hide the end.

use std::time::Duration;

use anyhow::{Result, ensure};
use http_body_util::BodyExt;
use hyper::body::Incoming;
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
    stream: Option<(Incoming, Events)>,
    /// The next attempt waits a little
    broken: bool,
}

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
            let Some((body, events)) = &mut self.stream else {
                match self.open().await {
                    Ok(Some(view)) => return Ok(News::View(Box::new(view))),
                    Ok(None) => continue,
                    Err(error) if error.is::<Refused>() => return Err(error),
                    Err(error) => return Ok(News::Trouble(error)),
                }
            };
            match next_event(body, events).await {
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
        self.stream = Some((body, Events::default()));
        Ok(None)
    }
}

async fn next_event(body: &mut Incoming, events: &mut Events) -> Result<Option<Migration>> {
    loop {
        if let Some(event) = events.next() {
            return Ok(Some(serde_json::from_str(&event)?));
        }
        match tokio::time::timeout(SILENCE_MAX, body.frame()).await? {
            None => return Ok(None),
            Some(frame) => {
                if let Ok(bytes) = frame?.into_data() {
                    events.feed(&bytes)?;
                }
            }
        }
    }
}

/// The text of events, out of chunks of any size.
///
/// Knows what the agents send: lines that end in LF or CR LF, `data` in one or
/// several lines, comments, and other fields, which say nothing more.
#[derive(Default)]
struct Events {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that hold no end of a line
    searched: usize,
    event: Option<String>,
}

impl Events {
    fn feed(&mut self, bytes: &[u8]) -> Result<()> {
        self.buffer.extend_from_slice(bytes);
        let length = self.buffer.len() + self.event.as_ref().map_or(0, String::len);
        ensure!(length <= EVENT_BYTES_MAX, "an event of the agent has no end");
        Ok(())
    }

    /// The next whole event, if there is one.
    fn next(&mut self) -> Option<String> {
        while let Some(line) = self.line() {
            if line.is_empty() {
                if let Some(event) = self.event.take() {
                    return Some(event);
                }
            } else if let Some(value) = line.strip_prefix("data:") {
                let value = value.strip_prefix(' ').unwrap_or(value);
                match &mut self.event {
                    None => self.event = Some(value.to_owned()),
                    Some(event) => {
                        event.push('\n');
                        event.push_str(value);
                    }
                }
            }
        }
        None
    }

    fn line(&mut self) -> Option<String> {
        let Some(end) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') else {
            self.searched = self.buffer.len();
            return None;
        };
        let line: Vec<u8> = self.buffer.drain(..=self.searched + end).collect();
        self.searched = 0;
        let line = line.strip_suffix(b"\n").unwrap_or(&line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        Some(String::from_utf8_lossy(line).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: events are the same however the network cuts their bytes.
    #[test]
    fn events_are_whole_however_they_come() {
        let text = "event: migration\ndata: {\"a\":\"\u{e4}\"}\n\n: keep-alive\n\n\
                    id: 7\r\ndata:one\r\ndata:  two\r\n\r\ndata: not yet";
        for size in 1..=text.len() {
            let mut events = Events::default();
            let mut all = Vec::new();
            for chunk in text.as_bytes().chunks(size) {
                events.feed(chunk).unwrap();
                while let Some(event) = events.next() {
                    all.push(event);
                }
            }
            assert_eq!(all, ["{\"a\":\"\u{e4}\"}", "one\n two"], "in chunks of {size}");
        }
    }

    #[test]
    fn an_endless_event_is_refused() {
        for piece in [vec![b'x'; 1 << 16], [&b"data: "[..], &[b'x'; 1 << 16], b"\n"].concat()] {
            let mut events = Events::default();
            let fed = (0..32).try_for_each(|_| {
                events.feed(&piece)?;
                assert_eq!(events.next(), None);
                anyhow::Ok(())
            });
            assert!(fed.is_err());
        }
    }
}
