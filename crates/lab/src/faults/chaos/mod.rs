//! `limosa-lab chaos`: moves with faults at drawn points, over and over, until
//! something does not hold.
//!
//! ```text
//! seed ─► plan ─► trial (move, strike, repair, settle) ─► oracle ─► tally
//!                   └────── setup: one lab, one VM ───────┘
//! ```
//!
//! **Invariants.** A run follows from its seed, but for what the machine's own
//! timing adds. Runs share a lab and a VM, which goes on from where it is; a
//! run that failed ends its lab.

mod oracle;
mod plan;
pub(crate) mod reboots;
mod rng;
pub(crate) mod setup;
mod tally;
mod trial;

use std::io::Write;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use limosa_protocol::api::Power;

use crate::harness::capture::Capture;
use crate::harness::exec;
use crate::harness::lab::Lab;
use crate::harness::paths;
use crate::harness::steps;
use crate::print_line;
use oracle::Copies;
use plan::{Initial, Plan};
use setup::Setup;
use tally::Tally;
use trial::Seen;

/// Runs after which the VM gets other disks.
const SHAPE_EVERY: u64 = 25;
/// Most further runs in which kinds of faults have their turn that have not struck in
/// a short series: six for each.
const FURTHER_COUNT_MAX: u64 = 96;
/// Longest part of a failed run's logs that is shown, in bytes each.
const SHOWN_LOG_BYTES_MAX: usize = 3_000;

/// A host of the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum At {
    A,
    B,
}

/// What `limosa-lab chaos` is asked for.
#[derive(Debug, Args)]
pub(crate) struct Request {
    /// Seed of the series; that of one run makes this run again
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Number of runs
    #[arg(long, default_value_t = 10)]
    runs: u64,
    /// Only at points whose name contains this, such as
    /// source.record.handed-over.after
    #[arg(long, value_name = "POINT")]
    only: Option<String>,
    /// Host that has the VM at first
    #[arg(long, value_enum, default_value_t = At::A)]
    at: At,
    /// Go on, in a new lab, when something does not hold
    #[arg(long)]
    keep_going: bool,
    /// Only say which points there are
    #[arg(long)]
    list: bool,
    /// Print the tally as JSON, all else to the standard error
    #[arg(long)]
    json: bool,
}

/// Performs it; `false` when something did not hold.
pub(crate) fn run(request: &Request) -> Result<bool> {
    if request.list {
        for step in crate::faults::steps::STEPS.iter().copied().flatten() {
            use limosa_faults::Edge;
            for edge in [Edge::Before, Edge::After] {
                print_line(&format!("{}.{}", step.side.as_str(), step.point(edge)));
            }
        }
        return Ok(true);
    }
    let mut tally = Tally::default();
    let mut next = 0;
    while next < request.runs && (request.keep_going || tally.failed_count() == 0) {
        next = series(request, next, &mut tally)?;
    }
    if request.json {
        print_line(&serde_json::to_string_pretty(&tally.json(request.seed))?);
    } else {
        tally.lines().iter().for_each(|line| print_line(line));
    }
    Ok(tally.failed_count() == 0)
}

/// Runs in one lab, from the `first` on, until all are done or something does
/// not hold; returns which is the next.
fn series(request: &Request, first: u64, tally: &mut Tally) -> Result<u64> {
    let mut lab = Lab::up(&setup::topology())?;
    let mut next = first;
    let shape = plan::shape_of(plan::seed_of(request.seed, first, SHAPE_EVERY));
    let mut setup = Setup::start_agents(&mut lab, shape, usize::from(request.at == At::B))
        .context("setting the lab up")?;
    while next < request.runs {
        let seed = plan::seed_of(request.seed, next, SHAPE_EVERY);
        next += 1;
        let Some(planned) = plan::draw(seed, request.only.as_deref()) else {
            ensure!(request.runs > 1, "this kind of fault has no point of that name: see --list");
            continue;
        };
        let from = setup.host(setup.at).name().to_owned();
        let started = Instant::now();
        match run_one(&mut setup, &planned, tally) {
            Ok(ended) => {
                let ending = tally::ending(&ended.seen, ended.has_moved);
                let took_s = started.elapsed().as_secs_f64();
                let line = format!(
                    "run {next:>4}  {took_s:>5.1} s  from {from}, {planned}: {ending} (seed {seed})"
                );
                say(request, &line);
            }
            Err(error) => {
                report_failure(request, &setup, &planned, &from, &error)?;
                tally.failed(seed, format!("{error:#}"));
                break;
            }
        }
    }
    lab.down().context("taking the lab down")?;
    Ok(next)
}

/// A few dozen runs in a lab that is up, and further ones of each kind of fault that
/// has not struck by then: a machine's timing decides whether some points are over
/// before. Fails on the first that does not hold, and when a kind never struck.
pub(crate) fn scenario(lab: &mut Lab, series: u64, runs: u64) -> Result<()> {
    let mut tally = Tally::default();
    let mut setup = Setup::start_agents(lab, plan::shape_of(series), 0)?;
    for index in 0..runs + FURTHER_COUNT_MAX {
        let seed = plan::seed_of(series, index, SHAPE_EVERY);
        let Some(plan) = plan::draw(seed, None) else { continue };
        let is_missing = || tally.kinds_missing().contains(&plan::fault_of(seed).as_str());
        if index >= runs && !is_missing() {
            continue;
        }
        let from = setup.host(setup.at).name().to_owned();
        run_one(&mut setup, &plan, &mut tally).with_context(|| {
            format!("{plan}; again with `limosa-lab chaos --seed {seed} --runs 1 --at {from}`")
        })?;
    }
    let missing = tally.kinds_missing();
    ensure!(missing.is_empty(), "never struck: {}", missing.join(", "));
    Ok(())
}

/// How a run ended in which all held.
struct Ended {
    seen: Seen,
    has_moved: bool,
    /// The VM was off until it was started again
    was_off: bool,
}

/// One run, from a VM at rest to a VM at rest.
fn run_one(setup: &mut Setup<'_>, plan: &Plan, tally: &mut Tally) -> Result<Ended> {
    for host in setup.lab.hosts() {
        host.clear_logs()?;
    }
    setup.reshape(plan.shape).context("before the run: another shape")?;
    let by_force = plan.seed & (1 << 40) != 0;
    setup.bring_to(plan.initial, by_force).context("before the run")?;
    setup.lab.net().set_speed(0, Some(plan.link_mbit))?;
    let copies = match plan.initial {
        Initial::Off => Some(Copies::make(setup).context("copying the disks")?),
        _ => None,
    };
    let capture = Capture::start(setup.lab.net(), steps::MAC)?;
    let from = setup.at;
    let seen = trial::run(setup, plan)?;
    let power = oracle::check(setup, plan, &seen, copies.as_ref(), capture)
        .with_context(|| format!("after it settled in {:.1} s", seen.settled_in.as_secs_f64()))?;
    let has_moved = setup.at != from;
    tally.passed(plan, &seen, has_moved);
    Ok(Ended { seen, has_moved, was_off: power == Power::Off })
}

fn report_failure(
    request: &Request,
    setup: &Setup<'_>,
    plan: &Plan,
    from: &str,
    error: &anyhow::Error,
) -> Result<()> {
    let kept = paths::lab_dir().join("failed").join(format!("chaos-{}", plan.seed));
    setup.lab.save_logs(&kept).context("keeping the logs")?;
    say(request, &format!("FAILED: {plan}"));
    say(request, &format!("found: {error:#}"));
    for entry in std::fs::read_dir(&kept)?.flatten() {
        let log = std::fs::read(entry.path()).unwrap_or_default();
        let text = exec::lossy(&log);
        let shown = exec::tail(&text, SHOWN_LOG_BYTES_MAX);
        if !shown.is_empty() {
            say(request, &format!("--- end of {}\n{shown}", entry.path().display()));
        }
    }
    say(request, &format!("logs: {}", kept.display()));
    let only = request.only.as_ref().map_or(String::new(), |only| format!(" --only {only}"));
    say(
        request,
        &format!("again: limosa-lab chaos --seed {} --runs 1 --at {from}{only}", plan.seed),
    );
    Ok(())
}

fn say(request: &Request, line: &str) {
    if request.json {
        let _ = writeln!(std::io::stderr(), "{line}");
    } else {
        print_line(line);
    }
}
