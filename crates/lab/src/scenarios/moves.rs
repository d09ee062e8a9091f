//! Scenarios of moves that go well.

use anyhow::{Context, Result, ensure};
use limosa_protocol::api::Power;
use serde_json::{Value, json};

use super::Scenario;
use super::faults;
use crate::harness::capture::{How, Kind, Trace};
use crate::harness::host::Host;
use crate::harness::lab::{Lab, Topology};
use crate::harness::process;
use crate::harness::scene::{self, Scene};
use crate::harness::steps::{self, Boot, Wanted};
use crate::harness::tiny;

/// How often the VM goes there and back in the long scenario.
const ROUND_TRIPS: usize = 10;

/// Bytes of a whole page with its head.
const PAGE_SENT_BYTES_MAX: u64 = 4096 + 16;
/// What a guest that goes on may touch anew while it moves.
const MEMORY_GROWTH_BYTES: u64 = 64 << 20;
/// What pages of zeroes and framing may cost of 4 GiB.
const NOTHING_BYTES: u64 = 16 << 20;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "move-there-and-back",
        proves: "a working VM moves with its disk and comes back; no user notices more than a pause",
        topology: Topology::default,
        run: |lab| there_and_back(lab, tiny::working, 1),
    },
    Scenario {
        name: "move-ten-times",
        proves: "a VM under load moves there and back ten times without a wrong byte or a reset",
        topology: Topology::default,
        run: |lab| there_and_back(lab, tiny::working, ROUND_TRIPS),
    },
    Scenario {
        name: "move-raw-disk",
        proves: "a raw disk moves as a qcow2 disk does, and what was a hole stays one",
        topology: Topology::default,
        run: raw_disk,
    },
    Scenario {
        name: "move-three-disks-four-vcpus",
        proves: "several disks of both formats and several vCPUs move together",
        topology: Topology::default,
        run: |lab| {
            let disks = vec![("raw", 96), ("qcow2", 64), ("raw", 64)];
            there_and_back(lab, || Ok(Wanted { disks, vcpus: 4, ..tiny::working()? }), 1)
        },
    },
    Scenario {
        name: "move-uefi",
        proves: "a VM with UEFI moves with its variables, to and fro",
        topology: Topology::default,
        run: |lab| there_and_back(lab, uefi, 1),
    },
    Scenario {
        name: "move-4-gib",
        proves: "a large memory moves, and what was never touched costs nothing",
        topology: Topology::default,
        run: large_memory,
    },
    Scenario {
        name: "move-two-links-unused",
        proves: "a second network between the hosts does not disturb a move",
        topology: || Topology { links_mbit: vec![Some(1000), Some(1000)], ..Topology::default() },
        run: |lab| there_and_back(lab, tiny::working, 1),
    },
    Scenario {
        name: "move-paused",
        proves: "a paused VM is paused after its move, moves on as it is, and resumes as if nothing \
                 was; one whose move failed late is refused until it has run again",
        topology: Topology::default,
        run: paused,
    },
    Scenario {
        name: "move-off",
        proves: "a VM that is off moves with all that its disks hold, and starts at the destination",
        topology: Topology::default,
        run: off,
    },
    Scenario {
        name: "move-by-command",
        proves: "one command moves a VM and reads all of it again on both sides; lists agree about it",
        topology: Topology::default,
        run: by_command,
    },
    Scenario {
        name: "move-qemu-7-and-10",
        proves: "a VM moves between QEMU 7.2 and 10.x and back, also while it is paused",
        topology: Topology::default,
        run: other_qemu,
    },
    Scenario {
        name: "agent-restart-keeps-vms",
        proves: "a VM goes on while its agent is stopped or killed, is found again, and moves",
        topology: Topology::default,
        run: agent_restart,
    },
];

fn uefi() -> Result<Wanted> {
    let working = tiny::working()?;
    Ok(Wanted { boot: Boot { uefi: true, ..working.boot }, ..working })
}

fn there_and_back(
    lab: &mut Lab,
    wanted: impl FnOnce() -> Result<Wanted>,
    times: usize,
) -> Result<()> {
    let wanted = wanted()?;
    let scene = Scene::set(lab, &wanted)?;
    for time in 1..=times {
        for (from, to) in [("a", "b"), ("b", "a")] {
            // At last, the hosts themselves compare all of it once more.
            let verify = if (time, to) == (times, "a") { "full" } else { "running" };
            steps::move_vm_with(lab, &wanted.name, from, to, &json!({"verify": verify}))
                .with_context(|| format!("time {time} of {times}"))?;
            steps::assert_only_at(lab, &wanted.name, to)?;
            let status =
                scene::guest_is_well(lab).with_context(|| format!("after time {time} to {to}"))?;
            let disks = crate::harness::client::status::durable(&status)?.len();
            ensure!(disks == wanted.disks.len(), "the guest has other disks: {status}");
        }
    }
    let trace = scene.end(lab, "a")?.1;
    ["a", "b"].into_iter().try_for_each(|host| is_announced(&trace, host))
}

/// Fails unless the network was told, at a host's switch port, that the VM is there:
/// its switches, and neighbours of both families. The advertisement may be the guest's
/// own: nothing in it tells.
fn is_announced(trace: &Trace, host: &str) -> Result<()> {
    for how in [How::Rarp, How::AgentArp, How::Advertisement] {
        let is_told = trace.frames().iter().any(|frame| {
            frame.kind == Kind::Announcement(how) && trace.host_name(frame.host) == Some(host)
        });
        ensure!(is_told, "{host} sent no {how:?}");
    }
    Ok(())
}

fn large_memory(lab: &mut Lab) -> Result<()> {
    let mut wanted = Wanted { memory_mib: 4096, ..tiny::working()? };
    wanted.boot.append.push_str(" limosa.memory_mib=256");
    let scene = Scene::set(lab, &wanted)?;
    let memory_bytes = |host: &Host| host.allocated_bytes(&process::memory(host)?);
    // By then it has touched all that it works with.
    scene::guest_is_well(lab)?;
    for (from, to) in [("a", "b"), ("b", "a")] {
        let before_bytes = memory_bytes(lab.host(from))?;
        let gathered = steps::move_vm(lab, &wanted.name, from, to)?;
        let after_bytes = memory_bytes(lab.host(to))?;
        ensure!(
            after_bytes <= before_bytes + MEMORY_GROWTH_BYTES,
            "{before_bytes} bytes of memory became {after_bytes} at {to}"
        );
        let summary = gathered.last().and_then(|last| last.summary.clone());
        let moved = summary.context("no summary")?.moved;
        let zero_bytes = moved.zero_pages << 12;
        ensure!(zero_bytes >= 2 << 30, "only {zero_bytes} bytes were found to be zeroes");
        let sent_pages = moved.full_pages + moved.difference_pages;
        let others_bytes = moved.ram_payload_bytes.saturating_sub(sent_pages * PAGE_SENT_BYTES_MAX);
        ensure!(others_bytes < NOTHING_BYTES, "{others_bytes} bytes for pages of zeroes");
        let known_bytes = moved.ram_packed_bytes + moved.disk_packed_bytes + moved.stream_bytes;
        let rest_bytes = moved.wire_bytes.saturating_sub(known_bytes);
        ensure!(rest_bytes < NOTHING_BYTES, "{rest_bytes} bytes that are no contents");
        steps::assert_only_at(lab, &wanted.name, to)?;
        scene::guest_is_well(lab)?;
    }
    steps::assert_no_doubt(lab)?;
    scene.end(lab, "a").map(drop)
}

fn raw_disk(lab: &mut Lab) -> Result<()> {
    let wanted = Wanted { disks: vec![("raw", 192)], ..tiny::working()? };
    let scene = Scene::set(lab, &wanted)?;
    let allocated_bytes =
        |host: &Host| host.allocated_bytes("/var/lib/limosa/vms/web1/disks/d0.raw");
    for (from, to) in [("a", "b"), ("b", "a")] {
        let before = allocated_bytes(lab.host(from))?;
        steps::move_vm(lab, &wanted.name, from, to)?;
        steps::assert_only_at(lab, &wanted.name, to)?;
        scene::guest_is_well(lab)?;
        let after = allocated_bytes(lab.host(to))?;
        // The guest went on writing: its journal's ring has 16 MiB.
        ensure!(after <= before + (20 << 20), "{before} bytes became {after} at {to}");
    }
    scene.end(lab, "a").map(drop)
}

fn paused(lab: &mut Lab) -> Result<()> {
    let wanted = uefi()?;
    let scene = Scene::set(lab, &wanted)?;
    steps::power(lab.host("a"), &wanted.name, "pause")?;
    faults::cancel_late_while_paused(lab, &wanted.name)?;
    // Frames that were on their way may still come.
    std::thread::sleep(std::time::Duration::from_millis(300));
    let before = scene.so_far().1.frames().len();
    // It moves on as it came: its guest has not run in between.
    for (from, to) in [("a", "b"), ("b", "a"), ("a", "b")] {
        steps::move_vm(lab, &wanted.name, from, to)?;
        let vm = steps::look(lab.host(to), &wanted.name)?.context("it is not there")?;
        ensure!(vm.power == Power::Paused, "it is {:?} after the move to {to}", vm.power);
        lab.host(from).assert_clean()?;
    }
    let trace = scene.so_far().1;
    let lively = trace.frames()[before..].iter().filter(|frame| !frame.kind.is_announcement());
    let told = lively.count();
    ensure!(told == 0, "a paused VM sent {told} frames");
    steps::power(lab.host("b"), &wanted.name, "resume")?;
    is_announced(&scene.end(lab, "b")?.1, "b")
}

fn off(lab: &mut Lab) -> Result<()> {
    let wanted = Wanted { disks: vec![("raw", 192), ("qcow2", 192)], ..tiny::working()? };
    // Its disks are to hold what a guest wrote.
    Scene::set(lab, &wanted)?.end(lab, "a")?;
    let before = scene::guest_is_well(lab)?;
    lab.host("a").limosa(&["vm", "stop", &wanted.name])?;
    let copies = copy_images(lab.host("a"), &wanted.name)?;
    steps::move_vm(lab, &wanted.name, "a", "b")?;
    let vm = steps::look(lab.host("b"), &wanted.name)?.context("it is not at b")?;
    ensure!(vm.power == Power::Off, "it is {:?} after the move", vm.power);
    ensure!(steps::look(lab.host("a"), &wanted.name)?.is_none(), "it is still at a");
    lab.host("a").assert_clean()?;
    for ((disk, (format, _)), copy) in vm.definition.disks.iter().zip(&wanted.disks).zip(&copies) {
        let image = disk.path.as_ref().context("a disk without an image")?.to_string_lossy();
        let compare = ["qemu-img", "compare", "-f", format, "-F", format, &image, copy];
        lab.host("b").run(&compare).with_context(|| format!("disk {} differs", disk.id))?;
    }
    steps::power(lab.host("b"), &wanted.name, "start")?;
    scene::guest_came_back(lab, &before)
}

/// Copies the images of a VM that is off, to where all hosts can read them.
fn copy_images(host: &Host, vm: &str) -> Result<Vec<String>> {
    let vm = steps::look(host, vm)?.context("the VM is gone")?;
    let mut copies = Vec::new();
    for disk in &vm.definition.disks {
        let image = disk.path.as_ref().context("a disk without an image")?.to_string_lossy();
        let copy = host.fault_dir().with_file_name(format!("copy-{}", disk.id));
        let copy = copy.to_string_lossy().into_owned();
        host.run(&["cp", "--sparse=always", &image, &copy])?;
        copies.push(copy);
    }
    Ok(copies)
}

fn by_command(lab: &mut Lab) -> Result<()> {
    let wanted = tiny::working()?;
    let scene = Scene::set(lab, &wanted)?;
    lab.host("a").limosa(&["vm", "move", &wanted.name, "--to", "b", "--verify", "full"])?;
    let listed = lab.host("b").limosa(&["vm", "list"])?;
    ensure!(listed.contains(&wanted.name), "b does not list it: {listed}");
    let listed = lab.host("a").limosa(&["vm", "list"])?;
    ensure!(!listed.contains(&wanted.name), "a still lists it: {listed}");
    let migrations: Vec<Value> = lab.host("a").limosa_json(&["migration", "list"])?;
    ensure!(migrations.len() == 1, "a tells of {} migrations", migrations.len());
    ensure!(migrations[0]["outcome"] == "moved", "a tells: {}", migrations[0]);
    let refused = lab.host("a").try_limosa(&["vm", "move", &wanted.name, "--to", "b"])?;
    ensure!(!refused.status.success(), "a moves what it does not have");
    let refused = lab.host("a").try_limosa(&["vm", "start", &wanted.name])?;
    let said = crate::harness::exec::lossy(&refused.stderr);
    ensure!(!refused.status.success() && said.contains("handed over to b"), "a says: {said}");
    scene.end(lab, "b").map(drop)
}

fn other_qemu(lab: &mut Lab) -> Result<()> {
    super::start_with_other_qemu(lab, "b", &super::other_qemu()?)?;
    let versions: Vec<Value> = lab
        .hosts()
        .iter()
        .map(|host| host.api::<Value>("GET", "/v1/host", None)?.read())
        .collect::<Result<_>>()?;
    let version = |index: usize| versions[index]["qemu"]["version"].as_str().unwrap_or_default();
    let has = |release: &str| (0..2).any(|index| version(index).starts_with(release));
    ensure!(has("7.2.") && has("10."), "the hosts have QEMU {} and {}", version(0), version(1));
    // A machine type that both know: that of the older one.
    let wanted = Wanted { machine: "pc-q35-7.2".to_owned(), ..uefi()? };
    let scene = Scene::on_ready_hosts(lab, &wanted)?;
    for (from, to) in [("a", "b"), ("b", "a"), ("a", "b")] {
        steps::move_vm(lab, &wanted.name, from, to)?;
        steps::assert_only_at(lab, &wanted.name, to)?;
        scene::guest_is_well(lab).with_context(|| format!("after the move to {to}"))?;
    }
    // Each version has its own way to take the disks of one that does not run.
    steps::power(lab.host("b"), &wanted.name, "pause")?;
    for (from, to) in [("b", "a"), ("a", "b"), ("b", "a")] {
        steps::move_vm(lab, &wanted.name, from, to).with_context(|| format!("paused, to {to}"))?;
    }
    steps::power(lab.host("a"), &wanted.name, "resume")?;
    scene.end(lab, "a").map(drop)
}

fn agent_restart(lab: &mut Lab) -> Result<()> {
    let wanted = tiny::working()?;
    let scene = Scene::set(lab, &wanted)?;
    let before = lab.host("a").qemu_pids();
    process::is_confined(lab.host("a"), steps::QEMU_USER)?;
    for is_killed in [false, true] {
        if is_killed {
            lab.host_mut("a").kill_agent()?;
        } else {
            let status = lab.host_mut("a").stop_agent()?;
            ensure!(status.success(), "limosad ended with {status} on SIGTERM");
        }
        scene::guest_is_well(lab).context("while the agent is down")?;
        let config = steps::agent_config(lab.host("a"), None, "");
        lab.host_mut("a").start_agent(&config, &[])?;
        steps::assert_only_at(lab, &wanted.name, "a")?;
        ensure!(lab.host("a").qemu_pids() == before, "QEMU is another one");
    }
    steps::move_vm(lab, &wanted.name, "a", "b")?;
    process::is_confined(lab.host("b"), steps::QEMU_USER)?;
    scene.end(lab, "b").map(drop)
}
