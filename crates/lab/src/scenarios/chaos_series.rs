//! Faults that are drawn, a few dozen of them: see [`crate::faults::chaos`].

use super::Scenario;
use crate::faults::chaos;

/// Seed of the series.
const SEED: u64 = 20;
/// Runs: each kind of fault has its turn, and more if it does not strike. As many as
/// `make test` has time for; `make chaos` runs 300.
const RUN_COUNT: u64 = 24;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "reboots",
        proves: "a host that restarts after any record, or both, leaves the VM where it is \
                 promised: one host has it, running or to be started, and the other refuses",
        topology: chaos::setup::topology,
        run: chaos::reboots::scenario,
    },
    Scenario {
        name: "chaos",
        proves: "whatever fails at whatever step, the VM ends at exactly one host, whole, and nothing \
             is left at the other",
        topology: chaos::setup::topology,
        run: |lab| chaos::scenario(lab, SEED, RUN_COUNT),
    },
];
