//! `make bench`: Limosa against stock QEMU, same guest, same link, same run.
//!
//! Figures for people, not assertions: the machine's other work is in them.

mod memory;
mod qmp;
mod stock;

use std::time::Duration;

use anyhow::{Context, Result};
use limosa_protocol::migration::Phase;
use serde::Serialize;

use crate::lab::{Lab, Plan};
use crate::scenario::scene::Scene;
use crate::scenario::steps::Wanted;
use crate::scenario::{steps, tiny};
use crate::{demo, paths, print_line, report};

/// Speed of the link.
const LINK_MBIT: u32 = 1000;
/// A guest that dirties memory so fast converges by page versions only.
const FAST_MB_S: u32 = 100;
/// What an agent may hold besides page versions: this, and a hundredth of the
/// guest's memory.
const AGENT_MIB_MAX: u64 = 64;
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
    /// Longest gap on any TCP session
    pub client_gap_ms: f64,
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

/// Runs all comparisons.
pub(crate) fn run(times: u32, stock_only: bool) -> Result<()> {
    let plan = Plan { links_mbit: vec![Some(LINK_MBIT)], ..Plan::default() };
    let mut all = Vec::new();
    for (name, dirty_mb_s) in [("20 MB/s dirtied", 20), ("200 MB/s dirtied", 200)] {
        let wanted = tiny::wanted("bench", 1024, dirty_mb_s)?;
        for time in 1..=times {
            print_line(&format!(
                "\n{name}, {} MiB, link {LINK_MBIT} Mbit/s, run {time}",
                wanted.memory_mib
            ));
            let mut accelerator = "tcg".to_owned();
            if !stock_only {
                let (chosen, ours) = limosa(&plan, &wanted, Versions::Kept)?;
                show(&ours);
                all.push((name, ours));
                accelerator = chosen;
                if dirty_mb_s < FAST_MB_S {
                    // What the agents need for themselves.
                    let (_, ours) = limosa(&plan, &wanted, Versions::None)?;
                    show(&ours);
                    let limit_kib = (AGENT_MIB_MAX << 10) + (wanted.memory_mib << 10) / 100;
                    let is_within = ours.agents_kib.iter().all(|own| *own <= limit_kib);
                    let verdict = if is_within { "within" } else { "PAST" };
                    print_line(&format!("  {verdict} the agents' {} MiB", limit_kib >> 10));
                    all.push((name, ours));
                }
            }
            let theirs = stock::run(&plan, &wanted, &accelerator)?;
            show(&theirs);
            all.push((name, theirs));
        }
    }
    let folder = paths::lab_dir().join("report");
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join("bench.json"), serde_json::to_vec_pretty(&all)?)?;
    Ok(())
}

fn limosa(plan: &Plan, wanted: &Wanted, versions: Versions) -> Result<(String, Measured)> {
    let mut lab = Lab::up(plan)?;
    let measured = measure(&mut lab, wanted, versions);
    if measured.is_err() {
        for host in lab.hosts() {
            print_line(crate::exec::tail(&host.agent_log(), 2_000));
        }
    }
    lab.down()?;
    measured
}

fn measure(lab: &mut Lab, wanted: &Wanted, versions: Versions) -> Result<(String, Measured)> {
    for host in lab.hosts_mut() {
        let mut config = steps::agent_config(host, None, "");
        if versions == Versions::None {
            config.push_str("page_versions_mib = 0\n");
        }
        host.start_agent(&config, &[])?;
    }
    steps::join(lab)?;
    let scene = Scene::on_ready_hosts(lab, wanted)?;
    std::thread::sleep(CALM);
    let accelerator = steps::look(lab.host("a"), &wanted.name)?.and_then(|vm| vm.accelerator);
    let started_ns = steps::unix_ms()?.saturating_mul(1_000_000);
    let before = lab.net().link_bytes(0, "a")?.1;
    let own = memory::Watch::start(lab.hosts().iter().filter_map(crate::host::Host::agent_pid));
    let gathered = steps::move_vm(lab, &wanted.name, "a", "b")?;
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
        converged: true,
        alive: crate::client::status::ask(lab.client(), crate::net::guest_v4(0)).is_ok(),
        total_s: Duration::from_millis(summary.total_ms).as_secs_f64() - phase_s(Phase::Retire),
        mirror_s: phase_s(Phase::Prepare) + phase_s(Phase::Mirror),
        memory_s: phase_s(Phase::PreCopy) + phase_s(Phase::Switchover),
        wire_bytes,
        downtime_ms: summary.downtime.map(|downtime| downtime.total_ms),
        blackout_ms: trace.blackout("a", "b").map(|silence| silence.ms()),
        longest_silence_ms: trace.longest_silence().map(|silence| silence.ms()),
        client_gap_ms: noticed.longest_tcp_gap_ms(),
        agents_kib,
    };
    let picture = gathered.into_move(&trace, Some(&noticed), Some(LINK_MBIT));
    let picture = report::Report {
        title: format!("Benchmark: {}", wanted.name),
        machine: format!("link {LINK_MBIT} Mbit/s"),
        moves: picture.into_iter().collect(),
    };
    demo::write(&picture, &paths::lab_dir().join("report"), "bench")?;
    Ok((accelerator.unwrap_or_else(|| "tcg".to_owned()), result))
}

fn show(result: &Measured) {
    let ms = |value: Option<f64>| value.map_or("-".to_owned(), |ms| format!("{ms:.0} ms"));
    print_line(&format!(
        "  {:<11} {:>6.2} s (disk {:.2}, memory {:.2}){}  {:>8} on the wire  downtime {}  \
         blackout {}  longest silence {}  client gap {:.0} ms{}",
        result.how,
        result.total_s,
        result.mirror_s,
        result.memory_s,
        match (result.converged, result.alive) {
            (true, true) => "",
            (true, false) => " GUEST DEAD AFTERWARDS",
            (false, _) => " NOT CONVERGED",
        },
        report::words::bytes(result.wire_bytes),
        ms(result.downtime_ms),
        ms(result.blackout_ms),
        ms(result.longest_silence_ms),
        result.client_gap_ms,
        match result.agents_kib[..] {
            [source, destination] =>
                format!("  agents' own at most {} and {} MiB", source / 1024, destination / 1024),
            _ => String::new(),
        },
    ));
}
