//! `make demo`: one VM with a disk and a client moves there and back, live, and
//! a report says what that looked like.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use limosa_protocol::migration::{Migration, Outcome};
use serde_json::Value;

use crate::harness::host::{Host, Storage};
use crate::harness::lab::{Lab, Topology};
use crate::harness::paths;
use crate::harness::scene::Scene;
use crate::harness::{steps, tiny};
use crate::print_line;
use crate::report::gather::Gathered;
use crate::report::{self, Report};

/// Speed of the link between the hosts.
const LINK_MBIT: u32 = 1000;
/// Longest time for a command that was just started to appear as a migration.
const APPEAR_TIMEOUT: Duration = Duration::from_secs(30);
/// Calm before and after each move, so that the picture has a beginning and an end.
const CALM: Duration = Duration::from_millis(1500);

/// Runs the demonstration.
pub(crate) fn run() -> Result<()> {
    let started = Instant::now();
    let wanted = tiny::wanted("web1", 512, 20)?;
    let topology = Topology {
        hosts: vec![("north", Storage::Folder), ("south", Storage::Folder)],
        links_mbit: vec![Some(LINK_MBIT)],
    };
    print_line(&format!("Two hosts, north and south, joined by a link of {LINK_MBIT} Mbit/s."));
    let mut lab = Lab::up(&topology)?;
    let report = present(&mut lab, &wanted);
    if report.is_err() {
        for host in lab.hosts() {
            let log = host.agent_log();
            print_line(&format!(
                "--- end of {}'s log\n{}",
                host.name(),
                crate::harness::exec::tail(&log, 3_000)
            ));
        }
    }
    let down = lab.down();
    let report = report?;
    down.context("taking the lab down")?;
    print_line(&format!("\n{}", report::terminal::text(&report)));
    let page = write(&report, &paths::lab_dir().join("report"), "demo")?;
    print_line(&format!("\nTimeline: {}", page.display()));
    print_line(&format!(
        "Done in {:.0} s; nothing is left running.",
        started.elapsed().as_secs_f64()
    ));
    Ok(())
}

fn present(lab: &mut Lab, wanted: &steps::Wanted) -> Result<Report> {
    print_line("Agents start, and the hosts pair with a one-time code.");
    steps::agents_ready(lab)?;
    print_line(&format!(
        "VM {} starts on north: {} MiB of memory, one disk; an outside client talks to it.",
        wanted.name, wanted.memory_mib
    ));
    let scene = Scene::on_ready_hosts(lab, wanted)?;
    let accelerator = steps::look(lab.host("north"), &wanted.name)?.and_then(|vm| vm.accelerator);
    let mut moves = Vec::new();
    for (from, to) in [("north", "south"), ("south", "north")] {
        std::thread::sleep(CALM);
        print_line(&format!("\n{from}$ limosa vm move {} --to {to}", wanted.name));
        let gathered = move_by_command(lab.host(from), &wanted.name, to)?;
        std::thread::sleep(CALM);
        let (noticed, trace) = scene.so_far();
        let it = gathered.into_move(&trace, Some(&noticed), Some(LINK_MBIT));
        moves.push(it.context("nothing was said about the move")?);
    }
    scene.end(lab, "north").context("after both moves")?;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(Report {
        title: format!("{} moves from north to south and back", wanted.name),
        machine: format!(
            "{cpus} processors shared by both hosts, {}; link {LINK_MBIT} Mbit/s",
            accelerator.map_or("unknown accelerator".to_owned(), |accelerator| accelerator
                .as_str()
                .to_uppercase()),
        ),
        moves,
    })
}

/// Moves with the command an operator would type, and listens to the agent meanwhile.
fn move_by_command(host: &Host, vm: &str, to: &str) -> Result<Gathered> {
    let earlier: Vec<Migration> = host.api::<Value>("GET", "/v1/migrations", None)?.read()?;
    let limit_s = crate::harness::host::LIMOSA_TIMEOUT_S;
    let mut command = host
        .command(limit_s, paths::product("limosa")?)
        .args(["vm", "move", vm, "--to", to])
        .stdin(Stdio::null())
        .spawn()
        .context("starting limosa")?;
    let deadline = Instant::now() + APPEAR_TIMEOUT;
    let migration = loop {
        let now: Vec<Migration> = host.api::<Value>("GET", "/v1/migrations", None)?.read()?;
        let is_new = |one: &Migration| earlier.iter().all(|other| other.id != one.id);
        if let Some(new) = now.into_iter().find(is_new) {
            break new;
        }
        let ended = command.try_wait()?.is_some();
        if ended || Instant::now() > deadline {
            bail!("`limosa vm move` began no migration");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let gathered = steps::follow(host, &migration, steps::MOVE_TIMEOUT)?;
    let status = command.wait()?;
    let last = gathered.last().context("nothing was said about the move")?;
    if !status.success() || last.outcome != Some(Outcome::Moved) {
        bail!("the move ended as {:?}: {:?}", last.outcome, last.reason);
    }
    Ok(gathered)
}

/// Writes the page, each picture, and the numbers; returns the page's path.
pub(crate) fn write(report: &Report, folder: &Path, name: &str) -> Result<std::path::PathBuf> {
    std::fs::create_dir_all(folder)?;
    for (index, it) in report.moves.iter().enumerate() {
        let path = folder.join(format!("{name}-{}.svg", index + 1));
        std::fs::write(path, report::svg(it))?;
    }
    std::fs::write(folder.join(format!("{name}.json")), serde_json::to_vec_pretty(report)?)?;
    let page = folder.join(format!("{name}.html"));
    std::fs::write(&page, report::html(report))?;
    Ok(page)
}
