//! `make bench`: Limosa against stock QEMU, same guest, same link, same run.
//!
//! Figures for people, not assertions: the machine's other work is in them. The guest
//! has 1 GiB, dirties 512 MiB of it round and round, and has 256 MiB on its disk.

mod medians;
mod memory;
mod qmp;
mod stock;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use limosa_protocol::migration::{Outcome, Phase};
use limosa_protocol::vm::Accelerator;
use serde::Serialize;
use serde_json::Value;

use crate::harness::capture::Trace;
use crate::harness::client::status;
use crate::harness::host::Host;
use crate::harness::lab::{Lab, Topology};
use crate::harness::paths;
use crate::harness::scene::Scene;
use crate::harness::steps::Wanted;
use crate::harness::{steps, tiny};
use crate::report::gather::Gathered;
use crate::{demo, print_line, report};

/// Speed of the link.
const LINK_MBIT: u32 = 1000;
/// The guest's memory, in MiB.
const MEMORY_MIB: u64 = 1024;
/// What it dirties of that, in MiB.
const DIRTIED_MIB: u64 = 512;
/// Its disk, of which it fills a third, in MiB.
const DISK_MIB: u64 = 768;
/// Most page versions that a source keeps, in MiB: what it keeps without a setting.
const VERSIONS_MIB_MAX: u64 = 512;
/// What an agent may hold besides page versions: this, and a hundredth of the
/// guest's memory.
const AGENT_MIB_MAX: u64 = 64;
/// After that long in the memory phase a move counts as not converging, and is cancelled.
const CONVERGE_TIMEOUT: Duration = Duration::from_secs(60);
/// How often a move is looked at.
const LOOK_PAUSE: Duration = Duration::from_millis(25);
/// Calm before and after, so that the guest's load is steady.
pub(crate) const CALM: Duration = Duration::from_secs(2);

/// One measured move.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Measured {
    /// With what it was moved
    pub how: String,
    /// Whether it came to its end
    pub converged: bool,
    /// Whether the guest still answered afterwards
    pub alive: bool,
    /// From the request to the VM running there
    pub total_s: f64,
    /// The disks
    pub mirror_s: f64,
    /// From the begin of pre-copy to the VM running there
    pub memory_s: f64,
    /// Bytes that the source sent on the link, all headers included
    pub wire_bytes: u64,
    /// By the agent's clock
    pub downtime_ms: Option<f64>,
    /// Silence between the hosts, from outside
    pub blackout_ms: Option<f64>,
    /// Longest silence of the whole move, from outside
    pub longest_silence_ms: Option<f64>,
    /// When that began, after the request
    pub silent_at_s: Option<f64>,
    /// Longest gap on any TCP session
    pub client_gap_ms: f64,
    /// What the guest really dirtied just before, in MB a second
    pub dirtied_mb_s: f64,
    /// Most memory of their own that the agents of source and destination held, in
    /// KiB: the guest's, which the destination's fills, is not theirs
    pub agents_kib: Vec<u64>,
}

/// Whether the source keeps what it sent, to send differences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Versions {
    Kept,
    None,
}

impl Versions {
    fn mib(self) -> u64 {
        match self {
            Self::Kept => VERSIONS_MIB_MAX,
            Self::None => 0,
        }
    }
}

/// Runs all comparisons.
pub(crate) fn run(times: u32, stock_only: bool) -> Result<()> {
    let topology = Topology { links_mbit: vec![Some(LINK_MBIT)], ..Topology::default() };
    let mut all = Vec::new();
    for (name, dirty_mb_s) in [("20 MB/s dirtied", 20), ("200 MB/s dirtied", 200)] {
        let mut wanted = tiny::wanted("bench", MEMORY_MIB, dirty_mb_s)?;
        wanted.boot.append.push_str(&format!(" limosa.memory_mib={DIRTIED_MIB}"));
        wanted.disks = vec![("qcow2", DISK_MIB)];
        for time in 1..=times {
            print_line(&format!(
                "\n{name} of {DIRTIED_MIB} MiB, {MEMORY_MIB} MiB in all, {} MiB on disk, link \
                 {LINK_MBIT} Mbit/s, run {time}",
                DISK_MIB / 3
            ));
            let mut accelerator = "tcg".to_owned();
            // Without versions, for what the agents need for themselves.
            let ways = [Versions::Kept, Versions::None];
            for versions in ways.into_iter().filter(|_| !stock_only) {
                let (chosen, ours) = limosa(&topology, &wanted, versions)?;
                show(&ours);
                show_agents(&ours, versions);
                all.push((name, ours));
                accelerator = chosen;
            }
            let theirs = stock::run(&topology, &wanted, &accelerator)?;
            show(&theirs);
            all.push((name, theirs));
        }
    }
    medians::show(&all);
    let folder = paths::lab_dir().join("report");
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join("bench.json"), serde_json::to_vec_pretty(&all)?)?;
    Ok(())
}

fn limosa(topology: &Topology, wanted: &Wanted, versions: Versions) -> Result<(String, Measured)> {
    let mut lab = Lab::up(topology)?;
    let measured = measure(&mut lab, wanted, versions);
    if measured.is_err() {
        for host in lab.hosts() {
            print_line(crate::harness::exec::tail(&host.agent_log(), 2_000));
        }
    }
    lab.down()?;
    measured
}

fn measure(lab: &mut Lab, wanted: &Wanted, versions: Versions) -> Result<(String, Measured)> {
    for host in lab.hosts_mut() {
        let mut config = steps::agent_config(host, None, "");
        config.push_str(&format!("page_versions_mib = {}\n", versions.mib()));
        host.start_agent(&config, &[])?;
    }
    steps::join(lab)?;
    let scene = Scene::on_ready_hosts(lab, wanted)?;
    let dirtied_mb_s = dirtied_mb_s(lab)?;
    let accelerator = steps::look(lab.host("a"), &wanted.name)?.and_then(|vm| vm.accelerator);
    memory::touch_ahead()?;
    let started_ns = steps::unix_ms()?.saturating_mul(1_000_000);
    let before = lab.net().link_bytes(0, "a")?.1;
    let own = memory::Watch::start(lab.hosts().iter().filter_map(Host::agent_pid));
    let gathered = moved_or_cancelled(lab.host("a"), &wanted.name)?;
    let agents_kib = own.stop();
    let wire_bytes = lab.net().link_bytes(0, "a")?.1 - before;
    std::thread::sleep(CALM);
    let (noticed, trace) = scene.so_far();
    let trace = trace.between(started_ns, u64::MAX);
    let last = gathered.last().context("nothing was said about the move")?;
    let summary = last.summary.clone().context("no summary")?;
    let phase_s = |phase: Phase| {
        let ms = summary.phase_ms.get(&phase).copied().unwrap_or(0);
        Duration::from_millis(ms).as_secs_f64()
    };
    let result = Measured {
        how: match versions {
            Versions::Kept => "Limosa".to_owned(),
            Versions::None => "no versions".to_owned(),
        },
        converged: last.outcome == Some(Outcome::Moved),
        alive: status::ask(lab.client(), crate::harness::net::guest_v4(0)).is_ok(),
        total_s: Duration::from_millis(summary.total_ms).as_secs_f64() - phase_s(Phase::Retire),
        mirror_s: phase_s(Phase::Prepare) + phase_s(Phase::Mirror),
        memory_s: phase_s(Phase::PreCopy) + phase_s(Phase::Switchover),
        wire_bytes,
        downtime_ms: summary.downtime.map(|downtime| downtime.total_ms),
        blackout_ms: trace.blackout("a", "b").map(|silence| silence.ms()),
        longest_silence_ms: trace.longest_silence().map(|silence| silence.ms()),
        silent_at_s: silent_at_s(&trace, started_ns),
        client_gap_ms: noticed.longest_tcp_gap_ms(),
        dirtied_mb_s,
        agents_kib,
    };
    let picture = gathered.into_move(&trace, Some(&noticed), Some(LINK_MBIT));
    let picture = report::Report {
        title: format!("Benchmark: {}", wanted.name),
        machine: format!("link {LINK_MBIT} Mbit/s"),
        moves: picture.into_iter().collect(),
    };
    demo::write(&picture, &paths::lab_dir().join("report"), "bench")?;
    Ok((accelerator.unwrap_or(Accelerator::Tcg).to_string(), result))
}

/// Moves a VM to the other host; one that does not converge in time is cancelled. Any
/// other end is an error.
fn moved_or_cancelled(from: &Host, vm: &str) -> Result<Gathered> {
    let migration = steps::begin_move(from, vm, "b", &Value::Null)?;
    let mut gathered = Gathered::default();
    let mut copies_since = None;
    let mut is_cancelled = false;
    loop {
        let now = steps::look_at_move(from, &migration)?;
        let (phase, outcome, reason) = (now.phase, now.outcome, now.reason.clone());
        gathered.add(steps::unix_ms()?, now);
        if let Some(outcome) = outcome {
            ensure!(outcome == Outcome::Moved || is_cancelled, "{vm} {outcome:?}: {reason:?}");
            return Ok(gathered);
        }
        if phase >= Phase::PreCopy {
            let since = copies_since.get_or_insert_with(Instant::now);
            if since.elapsed() > CONVERGE_TIMEOUT && !is_cancelled {
                let path = format!("/v1/migrations/{}/cancel", migration.id);
                // One that ends just now refuses it.
                from.api::<Value>("POST", &path, None)?;
                is_cancelled = true;
            }
        }
        std::thread::sleep(LOOK_PAUSE);
    }
}

/// When the longest silence began, in seconds after that moment.
pub(crate) fn silent_at_s(trace: &Trace, started_ns: u64) -> Option<f64> {
    let from_ns = trace.longest_silence()?.from_ns;
    Some(Duration::from_nanos(from_ns.saturating_sub(started_ns)).as_secs_f64())
}

/// What the guest dirties, once it has begun to, in MB a second.
pub(crate) fn dirtied_mb_s(lab: &Lab) -> Result<f64> {
    let guest = crate::harness::net::guest_v4(0);
    // All of its memory is there once it was compared.
    let before = status::check(lab.client(), guest)?;
    ensure!(before["errors"] == 0, "the guest found something wrong: {before}");
    let started = Instant::now();
    std::thread::sleep(CALM);
    let after = status::ask(lab.client(), guest)?;
    let pages = |status: &Value| status["pages_touched"].as_f64().unwrap_or(0.0);
    Ok((pages(&after) - pages(&before)) * 4096.0 / 1e6 / started.elapsed().as_secs_f64())
}

/// Says what the agents held, and whether that is within their limit.
fn show_agents(result: &Measured, versions: Versions) {
    let [source, destination] = result.agents_kib[..] else { return };
    let limit_mib = AGENT_MIB_MAX + MEMORY_MIB / 100;
    let told = |own_kib: u64, limit_mib: u64| {
        let verdict = if own_kib <= limit_mib << 10 { "within" } else { "PAST" };
        format!("{} MiB ({verdict} {limit_mib})", own_kib >> 10)
    };
    print_line(&format!(
        "              agents' own at most {} and {}",
        told(source, limit_mib + versions.mib()),
        told(destination, limit_mib)
    ));
}

fn show(result: &Measured) {
    let ms = |value: Option<f64>| value.map_or("-".to_owned(), |ms| format!("{ms:.0} ms"));
    print_line(&format!(
        "  {:<11} {:>6.2} s (disk {:.2}, memory {:.2}){}  {:>8} on the wire  downtime {}  \
         blackout {}  longest silence {} (at {:.1} s)  client gap {:.0} ms  dirtied {:.0} MB/s",
        result.how,
        result.total_s,
        result.mirror_s,
        result.memory_s,
        match (result.converged, result.alive) {
            (true, true) => "",
            (true, false) => " GUEST DEAD AFTERWARDS",
            (false, _) => " NOT CONVERGED",
        },
        report::format::bytes(result.wire_bytes),
        ms(result.downtime_ms),
        ms(result.blackout_ms),
        ms(result.longest_silence_ms),
        result.silent_at_s.unwrap_or(f64::NAN),
        result.client_gap_ms,
        result.dirtied_mb_s,
    ));
}
