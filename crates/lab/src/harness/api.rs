//! Requests to the agent's socket: blocking, one request a connection.
//!
//! Scenarios that look closely use it; what an operator would type goes through
//! the `limosa` command instead.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Largest answer that is read, in bytes.
const ANSWER_BYTES_MAX: usize = 16 << 20;
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

/// Asks within a limit for the whole answer.
pub(crate) fn ask_within<B: Serialize>(
    socket: &Path,
    method: &str,
    path: &str,
    body: Option<&B>,
    limit: Duration,
) -> Result<Answer> {
    let body = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let client = limosa_http::Client::unix("limosa-lab", socket.to_owned());
    let method_name = method.parse().with_context(|| format!("no method: {method}"))?;
    let limits = limosa_http::Limits { wait: limit, answer_bytes: ANSWER_BYTES_MAX };
    let (status, bytes) = runtime
        .block_on(client.exchange(method_name, path, body.into(), limits))
        .with_context(|| format!("{method} {path} at {}", socket.display()))?;
    // An empty body, or text of something that is not the agent's API.
    let body = serde_json::from_slice(&bytes).unwrap_or_else(|_| {
        if bytes.is_empty() { Value::Null } else { crate::harness::exec::lossy(&bytes).into() }
    });
    Ok(Answer { status: status.as_u16(), body })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Goal: an error of the lab shows the agent's reason.
    #[test]
    fn a_refusal_keeps_its_reason() {
        let refused = Answer { status: 409, body: json!({ "message": "busy" }) };
        let said = refused.read::<Value>().unwrap_err().to_string();
        assert!(said.contains("409") && said.contains("busy"), "{said}");
    }
}
