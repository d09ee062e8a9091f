//! The full guest: a Debian whose PostgreSQL works for outside clients while it moves.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use limosa_protocol::api::Power;
use limosa_protocol::migration::Outcome;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::Scenario;
use crate::harness::guest::{self, FullGuest};
use crate::harness::lab::{Lab, Topology};
use crate::harness::namespace::Namespace;
use crate::harness::steps::{self, Boot, Wanted};
use crate::harness::{exec, net};

/// Longest time for a Debian with systemd to boot without KVM.
const BOOT_TIMEOUT: Duration = Duration::from_secs(240);
/// Longest time for it to shut down, in seconds.
const SHUTDOWN_TIMEOUT_S: u32 = 110;
/// Longest time for the clients' work, in seconds; how long they work before the move begins
/// and after it has ended.
const WORK_MAX_S: u32 = 200;
const WORK_AROUND: Duration = Duration::from_secs(4);
/// Longest time for one client program, in seconds.
const CLIENT_TIMEOUT_S: u32 = 240;
const CLIENTS: &str = "4";
const IMAGE: &str = "/var/lib/limosa/images/db.qcow2";
const VM: &str = "db1";

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "postgres-moves-under-load",
    proves: "no connection of pgbench breaks, no committed row is lost, tables and disk are whole",
    topology: Topology::default,
    run: under_load,
}];

/// PostgreSQL's client programs, out of the guest's own system.
struct Clients<'a> {
    namespace: &'a Namespace,
    root: &'a Path,
}

impl Clients<'_> {
    /// A program of PostgreSQL in the client's network.
    fn command(&self, program: &str, args: &[&str]) -> Result<Command> {
        let folder = std::fs::read_dir(self.root.join("usr/lib/postgresql"))?
            .next()
            .context("the guest has no PostgreSQL")??;
        let version = folder.file_name().into_string().ok().context("a strange version")?;
        let mut command = exec::limited(CLIENT_TIMEOUT_S, "ip");
        command.args(["netns", "exec", self.namespace.name(), "chroot"]);
        command.arg(self.root).arg(format!("/usr/lib/postgresql/{version}/bin/{program}"));
        command.args(["-h", &net::guest_v4(0).to_string(), "-U", "postgres"]).args(args);
        command.env("PGSSLMODE", "disable").env("LC_ALL", "C");
        Ok(command)
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let mut command = self.command(program, args)?;
        let output = exec::output(&mut command)?;
        exec::stdout_of(&command, &output)
    }

    fn wait_until_up(&self) -> Result<()> {
        let until = Instant::now() + BOOT_TIMEOUT;
        loop {
            match self.run("psql", &["-At", "-c", "select 1"]) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > until => {
                    return Err(error).context("PostgreSQL in the guest did not come up");
                }
                Err(_) => std::thread::sleep(Duration::from_millis(500)),
            }
        }
    }
}

fn under_load(lab: &mut Lab) -> Result<()> {
    let full = guest::full()?;
    steps::agents_ready(lab)?;
    start(lab, &full)?;
    let namespace = lab.client().clone();
    let clients = Clients { namespace: &namespace, root: &full.root };
    clients.wait_until_up()?;
    clients.run("createdb", &["bench"])?;
    clients.run("pgbench", &["-i", "-q", "-s", "2", "bench"])?;
    let committed = work_while_moving(lab, &clients)?;
    steps::assert_no_doubt(lab)?;
    let told = clients.run(
        "psql",
        &[
            "-At",
            "-c",
            "select count(*) from pgbench_history",
            "-c",
            "select (select sum(abalance) from pgbench_accounts) = sum(delta) and \
             (select sum(bbalance) from pgbench_branches) = sum(delta) from pgbench_history",
            "bench",
        ],
    )?;
    let lines: Vec<_> = told.lines().collect();
    ensure!(
        lines == [committed.to_string().as_str(), "t"],
        "{committed} transactions were committed, and the tables say: {told}"
    );
    clients.run(
        "pg_amcheck",
        &["--install-missing", "--heapallindexed", "--parent-check", "-d", "bench"],
    )?;
    check_disk(lab)
}

fn start(lab: &Lab, full: &FullGuest) -> Result<()> {
    let host = lab.host("a");
    host.run(&["mkdir", "-p", "/var/lib/limosa/images"])?;
    host.run(&["cp", "--sparse=always", &full.disk.to_string_lossy(), IMAGE])?;
    let wanted = Wanted {
        name: VM.to_owned(),
        memory_mib: 512,
        vcpus: 2,
        disks: Vec::new(),
        machine: "q35".to_owned(),
        boot: Boot {
            kernel: full.kernel.clone(),
            initrd: full.initrd.clone(),
            append: "console=ttyS0 quiet root=/dev/vda".to_owned(),
            uefi: false,
        },
    };
    let mut definition = wanted.definition();
    definition["disks"] = json!([{"id": "d0", "format": "qcow2", "path": IMAGE}]);
    host.api("POST", "/v1/vms", Some(&definition))?.read::<Value>()?;
    steps::power(host, VM, "start").map(drop)
}

/// Lets clients work, and moves the VM meanwhile; returns how many transactions
/// were committed.
fn work_while_moving(lab: &Lab, clients: &Clients<'_>) -> Result<u64> {
    let seconds = WORK_MAX_S.to_string();
    let mut command = clients.command("pgbench", &["-c", CLIENTS, "-T", &seconds, "bench"])?;
    let work =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    std::thread::sleep(WORK_AROUND);
    let moved = steps::begin_move(lab.host("a"), VM, "b", &Value::Null)
        .and_then(|migration| steps::follow(lab.host("a"), &migration, steps::MOVE_TIMEOUT));
    std::thread::sleep(WORK_AROUND);
    let mut work = work;
    let ended_before = work.try_wait()?.is_some();
    if !ended_before {
        ring(&work)?;
    }
    let output = work.wait_with_output()?;
    let last = moved?;
    let last = last.last().context("nothing was said about the move")?;
    ensure!(last.outcome == Some(Outcome::Moved), "it did not move: {:?}", last.reason);
    ensure!(!ended_before, "pgbench ended before the move did: make it work longer");
    let (told, complaints) = (exec::lossy(&output.stdout), exec::lossy(&output.stderr));
    ensure!(output.status.success(), "pgbench failed: {complaints}{told}");
    ensure!(!complaints.contains("aborted"), "a connection broke: {complaints}");
    let number = |what: &str| -> Result<u64> {
        let line = told.lines().find_map(|line| line.strip_prefix(what));
        let field = line.and_then(|line| line.split_whitespace().next());
        Ok(field.with_context(|| format!("pgbench says: {told}"))?.parse()?)
    };
    ensure!(number("number of failed transactions:")? == 0, "transactions failed: {told}");
    let committed = number("number of transactions actually processed:")?;
    ensure!(committed > 0, "nothing was committed");
    Ok(committed)
}

/// Rings pgbench's own alarm clock: it ends its transactions, then its connections, and reports.
fn ring(work: &Child) -> Result<()> {
    let id = work.id();
    // It is the child of `timeout`, for which the signal would mean to kill.
    let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
    let pgbench = children.trim().parse().ok().and_then(Pid::from_raw);
    let pgbench = pgbench.with_context(|| format!("pgbench is not alone in [{children}]"))?;
    kill_process(pgbench, Signal::ALARM).context("ringing pgbench's alarm clock")
}

/// Shuts the guest down and looks at its file system from outside.
fn check_disk(lab: &Lab) -> Result<()> {
    let host = lab.host("b");
    lab.host("a").assert_clean()?;
    let left = lab.host("a").run(&["ls", "/var/lib/limosa/images"])?;
    ensure!(left.is_empty(), "the source still has {left}");
    let vm: Value = host.api::<Value>("GET", &format!("/v1/vms/{VM}"), None)?.read()?;
    let path = vm["definition"]["disks"][0]["path"].as_str().context("the disk has no path")?;
    host.api(
        "POST",
        &format!("/v1/vms/{VM}/stop"),
        Some(&json!({"timeout_seconds": SHUTDOWN_TIMEOUT_S})),
    )?
    .read::<Value>()?;
    let vm = steps::look(host, VM)?.context("the VM is gone")?;
    ensure!(vm.power == Power::Off, "the guest does not shut down: it is {:?}", vm.power);
    let raw = "/var/lib/limosa/checked.raw";
    host.run(&["qemu-img", "convert", "-O", "raw", path, raw])?;
    host.run(&["e2fsck", "-fn", raw]).context("the guest's file system").map(drop)
}
