//! `make soak`: scenarios over and over, with moves in between, until interrupted.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::print_line;

/// Runs all scenarios again and again for that long; each round is counted.
pub(crate) fn run(minutes: u32) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(u64::from(minutes) * 60);
    let mut failed = 0;
    let mut round = 0;
    while Instant::now() < end {
        round += 1;
        print_line(&format!("round {round}"));
        failed += super::run_all(None)?.failed;
    }
    ensure!(failed == 0, "{failed} scenarios failed in {round} rounds");
    Ok(())
}
