//! What a series did and found, as text and as JSON.

use std::collections::BTreeMap;
use std::time::Duration;

use limosa_protocol::migration::Outcome;
use serde_json::{Value, json};

use super::plan::{FAULTS, Plan};
use super::trial::Seen;

/// How often something was drawn, and how often its point was reached.
#[derive(Debug, Default, Clone, Copy)]
struct Struck {
    reached: u32,
    drawn: u32,
}

/// Counts of a series.
#[derive(Debug, Default)]
pub(super) struct Tally {
    runs: u32,
    moved: u32,
    stayed: u32,
    in_doubt_then_settled: u32,
    refused: u32,
    kinds: BTreeMap<&'static str, Struck>,
    points: BTreeMap<String, Struck>,
    longest_to_settle: Duration,
    longest_seed: u64,
    /// Seeds of runs that failed, with what was found
    failed: Vec<(u64, String)>,
}

impl Tally {
    /// Counts a run in which all held.
    pub(super) fn passed(&mut self, plan: &Plan, seen: &Seen, has_moved: bool) {
        self.runs += 1;
        for (injection, struck) in plan.injections.iter().zip(&seen.struck) {
            let of_kind = self.kinds.entry(injection.fault.as_str()).or_default();
            let of_point = self.points.entry(injection.point()).or_default();
            for counted in [of_kind, of_point] {
                counted.drawn += 1;
                counted.reached += u32::from(*struck);
            }
        }
        self.moved += u32::from(has_moved);
        self.stayed += u32::from(!has_moved);
        self.in_doubt_then_settled += u32::from(seen.was_in_doubt);
        self.refused += u32::from(seen.refused.is_some());
        if seen.settled_in > self.longest_to_settle {
            self.longest_to_settle = seen.settled_in;
            self.longest_seed = plan.seed;
        }
    }

    /// Counts a run in which something did not hold.
    pub(super) fn failed(&mut self, seed: u64, why: String) {
        self.runs += 1;
        self.failed.push((seed, why));
    }

    /// Number of runs in which something did not hold.
    pub(super) fn failed_count(&self) -> usize {
        self.failed.len()
    }

    /// Kinds of faults whose points were never reached.
    pub(super) fn kinds_missing(&self) -> Vec<&'static str> {
        let reached = |name: &str| self.kinds.get(name).is_some_and(|struck| struck.reached > 0);
        FAULTS.iter().map(|fault| fault.as_str()).filter(|name| !reached(name)).collect()
    }

    /// For people.
    pub(super) fn lines(&self) -> Vec<String> {
        let mut lines = vec![
            format!(
                "{} runs: {} moved, {} stayed, {} failed; {} were in doubt and settled",
                self.runs,
                self.moved,
                self.stayed,
                self.failed.len(),
                self.in_doubt_then_settled
            ),
            format!(
                "longest time to settle once nothing was broken: {:.1} s (seed {})",
                self.longest_to_settle.as_secs_f64(),
                self.longest_seed
            ),
            "faults that struck (of those drawn):".to_owned(),
        ];
        for (name, struck) in &self.kinds {
            lines.push(format!("  {:>4} ({:>4})  {name}", struck.reached, struck.drawn));
        }
        lines.push("points reached (of those drawn):".to_owned());
        for (name, struck) in &self.points {
            lines.push(format!("  {:>4} ({:>4})  {name}", struck.reached, struck.drawn));
        }
        for (seed, why) in &self.failed {
            lines.push(format!("failed: seed {seed}: {why}"));
        }
        lines
    }

    /// For programs.
    pub(super) fn json(&self, series: u64) -> Value {
        let struck = |counts: Struck| json!({"reached": counts.reached, "drawn": counts.drawn});
        let kinds: serde_json::Map<_, _> =
            self.kinds.iter().map(|(name, counts)| ((*name).to_owned(), struck(*counts))).collect();
        let points: serde_json::Map<_, _> =
            self.points.iter().map(|(name, counts)| (name.clone(), struck(*counts))).collect();
        let failed: Vec<_> =
            self.failed.iter().map(|(seed, why)| json!({"seed": seed, "found": why})).collect();
        json!({
            "seed": series,
            "runs": self.runs,
            "moved": self.moved,
            "stayed": self.stayed,
            "in_doubt_then_settled": self.in_doubt_then_settled,
            "moves_refused": self.refused,
            "longest_to_settle_ms": u64::try_from(self.longest_to_settle.as_millis()).unwrap_or(u64::MAX),
            "longest_to_settle_seed": self.longest_seed,
            "faults": kinds,
            "points": points,
            "failed": failed,
        })
    }
}

/// How a run ended, in a few words.
pub(super) fn ending(seen: &Seen, has_moved: bool) -> String {
    let missed = seen.struck.iter().filter(|struck| !**struck).count();
    let mut text = if has_moved { "moved" } else { "stayed" }.to_owned();
    if seen.was_in_doubt {
        text.push_str(" after doubt");
    }
    if missed > 0 {
        text.push_str(&format!(", {missed} not reached"));
    }
    if let Some((Some(Outcome::InDoubt), _)) = seen.told {
        text.push_str(", still told as in doubt");
    }
    format!("{text}, settled in {:.1} s", seen.settled_in.as_secs_f64())
}
