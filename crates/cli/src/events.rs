//! Server-sent events, cut out of the bytes that bring them.

use anyhow::Result;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use limosa_protocol::migration::Migration;

/// Most bytes of one event.
const EVENT_BYTES_MAX: usize = 1 << 20;

/// Events of a migration as they come.
pub(crate) struct Events {
    body: Incoming,
    lines: Lines,
}

impl Events {
    pub(crate) fn new(body: Incoming) -> Self {
        Self { body, lines: Lines::default() }
    }

    /// The next event; `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Result<Option<Migration>> {
        loop {
            while let Some(line) = self.lines.next() {
                if let Some(text) = line.strip_prefix("data:") {
                    return Ok(Some(serde_json::from_str(text.trim_start())?));
                }
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    if let Ok(bytes) = frame?.into_data() {
                        self.lines.feed(&bytes)?;
                    }
                }
            }
        }
    }
}

/// Lines out of chunks of any size.
#[derive(Default)]
struct Lines(Vec<u8>);

impl Lines {
    fn feed(&mut self, bytes: &[u8]) -> Result<()> {
        self.0.extend_from_slice(bytes);
        anyhow::ensure!(self.0.len() <= EVENT_BYTES_MAX, "an event of the agent has no end");
        Ok(())
    }

    fn next(&mut self) -> Option<String> {
        let end = self.0.iter().position(|byte| *byte == b'\n')?;
        let line: Vec<u8> = self.0.drain(..=end).collect();
        Some(String::from_utf8_lossy(&line).trim_end().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_however_they_come() {
        let text = b"event: migration\ndata: {\"a\":1}\n\n: keep-alive\n";
        for size in 1..text.len() {
            let mut lines = Lines::default();
            let mut all = Vec::new();
            for chunk in text.chunks(size) {
                lines.feed(chunk).unwrap();
                while let Some(line) = lines.next() {
                    all.push(line);
                }
            }
            assert_eq!(all, ["event: migration", "data: {\"a\":1}", "", ": keep-alive"]);
        }
    }
}
