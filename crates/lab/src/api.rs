//! A small HTTP client for the agent's socket: blocking, one request a connection.
//!
//! Scenarios that look closely use it; what an operator would type goes through
//! the `limosa` command instead.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Largest answer that is read, in bytes.
const ANSWER_BYTES_MAX: u64 = 16 << 20;
/// Longest wait for one answer.
const TIMEOUT: Duration = Duration::from_secs(120);

/// What the agent answered.
#[derive(Debug)]
pub(crate) struct Answer {
    /// HTTP status
    pub status: u16,
    /// The body; null when it was empty or no JSON
    pub body: Value,
}

impl Answer {
    /// The body as what it should be; the agent's own words when it refused.
    pub(crate) fn read<T: DeserializeOwned>(self) -> Result<T> {
        if self.status >= 400 {
            bail!("the agent refused with {}: {}", self.status, self.body);
        }
        let text = self.body.to_string();
        serde_json::from_value(self.body).with_context(|| format!("the agent answered {text}"))
    }
}

/// Asks the agent whose socket that is.
pub(crate) fn ask<B: Serialize>(
    socket: &Path,
    method: &str,
    path: &str,
    body: Option<&B>,
) -> Result<Answer> {
    ask_within(socket, method, path, body, TIMEOUT)
}

/// The same, with a limit for each time that it waits.
pub(crate) fn ask_within<B: Serialize>(
    socket: &Path,
    method: &str,
    path: &str,
    body: Option<&B>,
    limit: Duration,
) -> Result<Answer> {
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("connecting to {}", socket.display()))?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let body = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), &body].concat())?;
    let mut bytes = Vec::new();
    stream
        .take(ANSWER_BYTES_MAX)
        .read_to_end(&mut bytes)
        .with_context(|| format!("{method} {path}"))?;
    parse(&bytes).with_context(|| format!("{method} {path}"))
}

/// Reads a whole answer: head, then a plain or chunked body.
fn parse(bytes: &[u8]) -> Result<Answer> {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").context("no HTTP answer")?;
    let head = std::str::from_utf8(&bytes[..end]).context("the head is no text")?;
    let status = head.split(' ').nth(1).and_then(|word| word.parse().ok()).context("no status")?;
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    let body = &bytes[end + 4..];
    let body = if chunked { unchunk(body)? } else { body.to_vec() };
    // An empty body, or the words of something that is not the agent's API.
    let value = serde_json::from_slice(&body).unwrap_or_else(|_| {
        if body.is_empty() { Value::Null } else { crate::exec::lossy(&body).into() }
    });
    Ok(Answer { status, body: value })
}

fn unchunk(mut rest: &[u8]) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line =
            rest.windows(2).position(|two| two == b"\r\n").context("cut in a chunk's size")?;
        let size = std::str::from_utf8(&rest[..line])?;
        let size = usize::from_str_radix(size.trim(), 16).context("a chunk's size")?;
        if size == 0 {
            return Ok(body);
        }
        let begin = line + 2;
        let end = begin.checked_add(size).context("a chunk's size")?;
        body.extend_from_slice(rest.get(begin..end).context("cut in a chunk")?);
        rest = rest.get(end + 2..).context("cut after a chunk")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: answers are read in both forms, and refusals keep the agent's words.
    #[test]
    fn answers_are_read() {
        let plain = b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n{\"a\":1}";
        let chunked =
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n{\"a\"\r\n3\r\n:1}\r\n0\r\n\r\n";
        for bytes in [&plain[..], chunked] {
            let answer = parse(bytes).unwrap();
            assert_eq!((answer.status, &answer.body["a"]), (200, &Value::from(1)));
        }
        for cut in 0..chunked.len() - 5 {
            assert!(parse(&chunked[..cut]).is_err(), "cut at {cut}");
        }
        let refused = parse(b"HTTP/1.1 409 Conflict\r\n\r\n{\"message\":\"busy\"}").unwrap();
        let said = refused.read::<Value>().unwrap_err().to_string();
        assert!(said.contains("409") && said.contains("busy"), "{said}");
    }
}
