//! Faults that are drawn, a few dozen of them: see [`crate::chaos`].

use super::Story;
use crate::chaos;

/// Seed of the series.
const SEED: u64 = 20;
/// Runs: each kind of fault has its turn more than once.
const RUN_COUNT: u64 = 24;

pub(super) const STORIES: &[Story] = &[Story {
    name: "chaos",
    proves: "whatever fails at whatever step, the VM ends at exactly one host, whole, and nothing \
             is left at the other",
    plan: chaos::stage::plan,
    run: |lab| chaos::story(lab, SEED, RUN_COUNT),
}];
