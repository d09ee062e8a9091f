//! `limosa-lab chaos`: moves with faults at drawn points, over and over, until
//! something does not hold.
//!
//! ```text
//! seed ─► draw ─► trial (move, strike, repair, settle) ─► judge ─► tally
//!                   └────── stage: one lab, one VM ──────┘
//! ```
//!
//! **Invariants.** A run follows from its seed, but for what the machine's own
//! timing adds. Runs share a lab and a VM, which goes on from where it is; a
//! run that failed ends its lab.

mod dice;
mod draw;
mod judge;
pub(crate) mod reboots;
pub(crate) mod stage;
mod tally;
mod trial;

use std::io::Write;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use limosa_protocol::api::Power;

use crate::capture::Capture;
use crate::exec;
use crate::lab::Lab;
use crate::scenario::steps;
use crate::{paths, print_line};
use draw::{Begins, Draw};
use judge::Copies;
use stage::Stage;
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
pub(crate) struct Wish {
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
pub(crate) fn run(wish: &Wish) -> Result<bool> {
    if wish.list {
        for step in limosa_protocol::fault::STEPS.iter().copied().flatten() {
            use limosa_protocol::fault::Edge;
            for edge in [Edge::Before, Edge::After] {
                print_line(&format!("{}.{}", step.side.as_str(), step.point(edge)));
            }
        }
        return Ok(true);
    }
    let mut tally = Tally::default();
    let mut next = 0;
    while next < wish.runs && (wish.keep_going || tally.failed_count() == 0) {
        next = series(wish, next, &mut tally)?;
    }
    if wish.json {
        print_line(&serde_json::to_string_pretty(&tally.json(wish.seed))?);
    } else {
        tally.lines().iter().for_each(|line| print_line(line));
    }
    Ok(tally.failed_count() == 0)
}

/// Runs in one lab, from the `first` on, until all are done or something does
/// not hold; returns which is the next.
fn series(wish: &Wish, first: u64, tally: &mut Tally) -> Result<u64> {
    let mut lab = Lab::up(&stage::plan())?;
    let mut next = first;
    let shape = draw::shape_of(draw::seed_of(wish.seed, first, SHAPE_EVERY));
    let mut stage =
        Stage::set(&mut lab, shape, usize::from(wish.at == At::B)).context("setting the stage")?;
    while next < wish.runs {
        let seed = draw::seed_of(wish.seed, next, SHAPE_EVERY);
        next += 1;
        let Some(drawn) = draw::draw(seed, wish.only.as_deref()) else {
            ensure!(wish.runs > 1, "this kind of fault has no point of that name: see --list");
            continue;
        };
        let from = stage.host(stage.at).name().to_owned();
        let started = Instant::now();
        match run_one(&mut stage, &drawn, tally) {
            Ok(ended) => {
                let ending = tally::ending(&ended.seen, ended.has_moved);
                let took_s = started.elapsed().as_secs_f64();
                let line = format!(
                    "run {next:>4}  {took_s:>5.1} s  from {from}, {drawn}: {ending} (seed {seed})"
                );
                say(wish, &line);
            }
            Err(error) => {
                tell_failure(wish, &stage, &drawn, &from, &error)?;
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
    let mut stage = Stage::set(lab, draw::shape_of(series), 0)?;
    for index in 0..runs + FURTHER_COUNT_MAX {
        let seed = draw::seed_of(series, index, SHAPE_EVERY);
        let Some(draw) = draw::draw(seed, None) else { continue };
        let is_missing = || tally.kinds_missing().contains(&draw::deed_of(seed).as_str());
        if index >= runs && !is_missing() {
            continue;
        }
        let from = stage.host(stage.at).name().to_owned();
        run_one(&mut stage, &draw, &mut tally).with_context(|| {
            format!("{draw}; again with `limosa-lab chaos --seed {seed} --runs 1 --at {from}`")
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
fn run_one(stage: &mut Stage<'_>, draw: &Draw, tally: &mut Tally) -> Result<Ended> {
    for host in stage.lab.hosts() {
        host.clear_logs()?;
    }
    stage.reshape(draw.shape).context("before the run: another shape")?;
    let by_force = draw.seed & (1 << 40) != 0;
    stage.bring_to(draw.begins, by_force).context("before the run")?;
    stage.lab.net().set_speed(0, Some(draw.link_mbit))?;
    let copies = match draw.begins {
        Begins::Off => Some(Copies::make(stage).context("copying the disks")?),
        _ => None,
    };
    let capture = Capture::start(stage.lab.net(), steps::MAC)?;
    let from = stage.at;
    let seen = trial::run(stage, draw)?;
    let power = judge::judge(stage, draw, &seen, copies.as_ref(), capture)
        .with_context(|| format!("after it settled in {:.1} s", seen.settled_in.as_secs_f64()))?;
    let has_moved = stage.at != from;
    tally.passed(draw, &seen, has_moved);
    Ok(Ended { seen, has_moved, was_off: power == Power::Off })
}

fn tell_failure(
    wish: &Wish,
    stage: &Stage<'_>,
    draw: &Draw,
    from: &str,
    error: &anyhow::Error,
) -> Result<()> {
    let kept = paths::lab_dir().join("failed").join(format!("chaos-{}", draw.seed));
    stage.lab.save_logs(&kept).context("keeping the logs")?;
    say(wish, &format!("FAILED: {draw}"));
    say(wish, &format!("found: {error:#}"));
    for entry in std::fs::read_dir(&kept)?.flatten() {
        let log = std::fs::read(entry.path()).unwrap_or_default();
        let text = exec::lossy(&log);
        let shown = exec::tail(&text, SHOWN_LOG_BYTES_MAX);
        if !shown.is_empty() {
            say(wish, &format!("--- end of {}\n{shown}", entry.path().display()));
        }
    }
    say(wish, &format!("logs: {}", kept.display()));
    let only = wish.only.as_ref().map_or(String::new(), |only| format!(" --only {only}"));
    say(wish, &format!("again: limosa-lab chaos --seed {} --runs 1 --at {from}{only}", draw.seed));
    Ok(())
}

fn say(wish: &Wish, line: &str) {
    if wish.json {
        let _ = writeln!(std::io::stderr(), "{line}");
    } else {
        print_line(line);
    }
}
