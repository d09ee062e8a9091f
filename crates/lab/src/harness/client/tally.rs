//! What is counted on one of the client's channels.

use std::time::Instant;

use serde::{Deserialize, Serialize};

/// Counts of one channel.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Tally {
    /// Right answers, or heartbeats
    pub exchanges: u64,
    /// Bytes of right answers
    pub bytes: u64,
    /// Bytes or datagrams that were not what was sent
    pub wrong: u64,
    /// Datagrams or heartbeats that never came
    pub lost: u64,
    /// Connections that ended without the client's wish
    pub broken: u64,
    /// Why the latest one ended
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken_by: Option<String>,
    /// Longest time between two right answers, in milliseconds
    pub longest_gap_ms: f64,
    #[serde(skip)]
    latest: Option<Instant>,
}

impl Tally {
    /// Counts a right answer.
    pub(super) fn answered(&mut self, bytes: usize) {
        self.exchanges += 1;
        self.bytes += u64::try_from(bytes).unwrap_or(u64::MAX);
        self.close_gap();
        self.latest = Some(Instant::now());
    }

    /// Counts a connection that broke.
    pub(super) fn broke(&mut self, why: &std::io::Error) {
        self.broken += 1;
        self.broken_by = Some(why.to_string());
    }

    /// Lets the time since the last answer count as a gap.
    pub(super) fn close_gap(&mut self) {
        if let Some(latest) = self.latest {
            let gap_ms = latest.elapsed().as_secs_f64() * 1e3;
            self.longest_gap_ms = self.longest_gap_ms.max(gap_ms);
        }
    }
}
