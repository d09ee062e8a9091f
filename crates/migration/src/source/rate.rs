//! How fast something grows, and what is left of it.

use std::time::Instant;

use limosa_protocol::migration::Transfer;

use crate::job::millis;

/// Rate of something that grows, over the last look.
pub(super) struct Rate {
    last: Instant,
    last_bytes: u64,
    per_second: u64,
}

impl Rate {
    pub(super) fn new() -> Self {
        Self { last: Instant::now(), last_bytes: 0, per_second: 0 }
    }

    /// Takes a new total; gives bytes per second, smoothed.
    pub(super) fn update(&mut self, bytes: u64) -> u64 {
        let now = Instant::now();
        let millis = millis(now - self.last).max(1);
        let fresh = bytes.saturating_sub(self.last_bytes).saturating_mul(1000) / millis;
        self.per_second =
            if self.per_second == 0 { fresh } else { (self.per_second * 3 + fresh) / 4 };
        self.last = now;
        self.last_bytes = bytes;
        self.per_second
    }
}

/// A moment of a transfer.
pub(super) fn transfer(done_bytes: u64, total_bytes: u64, rate: &mut Rate) -> Transfer {
    let per_second = rate.update(done_bytes);
    Transfer {
        done_bytes,
        total_bytes,
        rate_bytes_per_second: per_second,
        left_seconds: total_bytes.saturating_sub(done_bytes).checked_div(per_second),
    }
}
