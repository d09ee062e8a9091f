//! The time of this host.

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since 1970.
pub fn now_unix_s() -> u64 {
    now_unix_ms() / 1000
}

/// Milliseconds since 1970.
pub fn now_unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
