//! Stock QEMU, driven by QMP: mirror over NBD, then `migrate tcp:`.
//!
//! ```text
//! source QEMU ── blockdev-mirror ─► NBD over tcp ─► destination QEMU
//!             ── migrate tcp: ────────────────────►
//! ```

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use super::qmp::Qmp;
use super::{CONVERGE_TIMEOUT, Measured};
use crate::harness::capture::Capture;
use crate::harness::client::{self, Client, Talk};
use crate::harness::host::Host;
use crate::harness::lab::{Lab, Topology};
use crate::harness::net;
use crate::harness::scene::BOOT_TIMEOUT;
use crate::harness::steps::{self, Wanted};

/// Ports of the destination for memory and for the disk.
const MEMORY_PORT: u16 = 4444;
const DISK_PORT: u16 = 10_809;
/// Moves the wanted VM once with stock QEMU.
pub(crate) fn run(topology: &Topology, wanted: &Wanted, accelerator: &str) -> Result<Measured> {
    let lab = Lab::up(topology)?;
    let measured = measure(&lab, wanted, accelerator);
    lab.down()?;
    measured
}

fn measure(lab: &Lab, wanted: &Wanted, accelerator: &str) -> Result<Measured> {
    let destination_address = net::host_v4(1, 0)?;
    let (source, destination) = (&lab.hosts()[0], &lab.hosts()[1]);
    let capture = Capture::start(lab.net(), steps::MAC)?;
    let mut from = start(source, wanted, accelerator, &[])?;
    let mut to = start(destination, wanted, accelerator, &["-S", "-incoming", "defer"])?;
    client::status::wait(lab.client(), net::guest_v4(0), BOOT_TIMEOUT)?;
    let client = Client::start(lab.client(), Talk::with(net::guest_v4(0)))?;
    client.wait_until_answered(BOOT_TIMEOUT)?;
    let dirtied_mb_s = super::dirtied_mb_s(lab)?;
    super::memory::touch_ahead()?;
    let started = Instant::now();
    let started_ns = steps::unix_ms()?.saturating_mul(1_000_000);
    let before = lab.net().link_bytes(0, source.name())?.1;
    mirror(&mut from, &mut to, destination_address)?;
    let mirrored = started.elapsed();
    let memory = Instant::now();
    let converged = memory_phase(&mut from, &mut to, destination_address)?;
    let (memory_s, total_s) = (memory.elapsed().as_secs_f64(), started.elapsed().as_secs_f64());
    let wire_bytes = lab.net().link_bytes(0, source.name())?.1 - before;
    std::thread::sleep(super::CALM);
    let alive = client::status::ask(lab.client(), net::guest_v4(0)).is_ok();
    let noticed = client.stop()?;
    let trace = capture.stop()?.between(started_ns, u64::MAX);
    let silence = trace.blackout(source.name(), destination.name());
    Ok(Measured {
        how: "stock QEMU".to_owned(),
        converged,
        alive,
        total_s,
        mirror_s: mirrored.as_secs_f64(),
        memory_s,
        wire_bytes,
        downtime_ms: None,
        blackout_ms: silence.filter(|_| converged).map(|silence| silence.ms()),
        longest_silence_ms: trace.longest_silence().map(|silence| silence.ms()),
        silent_at_s: super::silent_at_s(&trace, started_ns),
        client_gap_ms: noticed.longest_tcp_gap_ms(),
        dirtied_mb_s,
        agents_kib: Vec::new(),
    })
}

/// Starts a QEMU with the same machine that Limosa would give the VM.
fn start(host: &Host, wanted: &Wanted, accelerator: &str, further: &[&str]) -> Result<Qmp> {
    let namespace = host.namespace();
    for order in [
        "link add vmbr type bridge forward_delay 0 mcast_snooping 0",
        "link set vmbr up",
        "link set lan0 master vmbr",
        "tuntap add tap0 mode tap",
        "link set tap0 master vmbr up",
    ] {
        namespace.ip(&order.split(' ').collect::<Vec<_>>())?;
    }
    let args = command_line(host, wanted, accelerator, further)?;
    let mut child = host.start(&args, "stock-qemu.log")?;
    // It ends with the lab; only its status must be taken.
    std::thread::Builder::new().name("lab-reaper".to_owned()).spawn(move || child.wait())?;
    let mut qmp = Qmp::connect(&host.run_dir().join("bench.qmp"))?;
    qmp.ask(
        "migrate-set-capabilities",
        &json!({"capabilities": [
            {"capability": "pause-before-switchover", "state": true},
            {"capability": "late-block-activate", "state": true},
            {"capability": "events", "state": true},
        ]}),
    )?;
    qmp.ask(
        "migrate-set-parameters",
        &json!({"max-bandwidth": 10_000_000_000u64, "downtime-limit": 300}),
    )?;
    Ok(qmp)
}

/// The command line of stock QEMU with the benchmark's guest; makes its disks.
fn command_line(
    host: &Host,
    wanted: &Wanted,
    accelerator: &str,
    further: &[&str],
) -> Result<Vec<String>> {
    let mac = steps::MAC.map(|byte| format!("{byte:02x}")).join(":");
    // The size that Limosa gives an emulated guest, for the same reason: with
    // another one QEMU before 9.0 moves it wrongly.
    let odd_bytes = if accelerator == "tcg" { 8 << 10 } else { 0 };
    let memory = format!("{}B", (wanted.memory_mib << 20) + odd_bytes);
    let mut args = vec![
        "qemu-system-x86_64".to_owned(),
        "-nodefaults".into(),
        "-no-user-config".into(),
        "-display".into(),
        "none".into(),
        "-machine".into(),
        format!("{},accel={accelerator},memory-backend=ram", wanted.machine),
        "-object".into(),
        format!("memory-backend-memfd,id=ram,size={memory},share=on"),
        "-m".into(),
        format!("size={memory}"),
        "-smp".into(),
        wanted.vcpus.to_string(),
        "-cpu".into(),
        "qemu64".into(),
        "-kernel".into(),
        wanted.boot.kernel.to_string_lossy().into_owned(),
        "-initrd".into(),
        wanted.boot.initrd.to_string_lossy().into_owned(),
        "-append".into(),
        wanted.boot.append.clone(),
        "-netdev".into(),
        "tap,id=n0,ifname=tap0,script=no,downscript=no".into(),
        "-device".into(),
        format!("virtio-net-pci,netdev=n0,mac={mac}"),
        "-serial".into(),
        "file:/run/limosa/bench.serial".into(),
        "-qmp".into(),
        "unix:/run/limosa/bench.qmp,server=on,wait=off".into(),
    ];
    for (index, (format, mib)) in wanted.disks.iter().enumerate() {
        let path = format!("/var/lib/limosa/bench{index}.{format}");
        host.run(&["qemu-img", "create", "-q", "-f", format, &path, &format!("{mib}M")])?;
        args.push("-blockdev".into());
        args.push(format!(
            "driver={format},node-name=d{index},discard=unmap,file.driver=file,\
             file.filename={path},file.cache.direct=on,file.discard=unmap"
        ));
        args.push("-device".into());
        args.push(format!("virtio-blk-pci,drive=d{index},id=disk{index}"));
    }
    args.extend(further.iter().map(|arg| (*arg).to_owned()));
    Ok(args)
}

fn mirror(from: &mut Qmp, to: &mut Qmp, address: Ipv4Addr) -> Result<()> {
    let place = json!({"host": address.to_string(), "port": DISK_PORT.to_string()});
    to.ask("nbd-server-start", &json!({"addr": {"type": "inet", "data": place}}))?;
    let nodes = from.ask("query-named-block-nodes", &json!({"flat": true}))?;
    let names: Vec<String> = nodes
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|node| node["node-name"].as_str())
        .filter(|name| name.len() == 2 && name.starts_with('d'))
        .map(ToOwned::to_owned)
        .collect();
    for name in &names {
        let export = json!({"type": "nbd", "id": format!("e-{name}"), "node-name": name,
            "name": name, "writable": true});
        to.ask("block-export-add", &export)?;
        let server =
            json!({"type": "inet", "host": address.to_string(), "port": DISK_PORT.to_string()});
        let target = format!("t-{name}");
        let node = json!({"driver": "nbd", "node-name": target, "export": name, "server": server});
        from.ask("blockdev-add", &node)?;
        let job = json!({"job-id": format!("m-{name}"), "device": name, "target": target, "sync": "full"});
        from.ask("blockdev-mirror", &job)?;
    }
    for _ in &names {
        from.wait("BLOCK_JOB_READY")?;
    }
    Ok(())
}

/// The memory phase; `false` when it had to be cancelled.
fn memory_phase(from: &mut Qmp, to: &mut Qmp, address: Ipv4Addr) -> Result<bool> {
    let uri = json!({"uri": format!("tcp:{address}:{MEMORY_PORT}")});
    to.ask("migrate-incoming", &uri)?;
    let started = Instant::now();
    from.ask("migrate", &uri)?;
    loop {
        let told = from.ask("query-migrate", &json!({}))?;
        match told["status"].as_str().context("no status")? {
            "completed" => break,
            "failed" | "cancelled" => bail!("stock migration ended: {told}"),
            "pre-switchover" => {
                end_mirrors(from)?;
                let order = json!({"state": "pre-switchover"});
                // A guest that was stopped before passes this point by itself.
                if let Err(error) = from.ask("migrate-continue", &order) {
                    let now = from.ask("query-migrate", &json!({}))?;
                    ensure!(now["status"] == "completed", "{error:#}");
                }
            }
            _ if started.elapsed() > CONVERGE_TIMEOUT => {
                from.ask("migrate_cancel", &json!({}))?;
                return Ok(false);
            }
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
    }
    let loading = Instant::now();
    while to.ask("query-migrate", &json!({}))?["status"] != "completed" {
        ensure!(loading.elapsed() < CONVERGE_TIMEOUT, "the destination does not complete");
        std::thread::sleep(Duration::from_millis(1));
    }
    to.ask("nbd-server-stop", &json!({}))?;
    to.ask("cont", &json!({}))?;
    Ok(true)
}

fn end_mirrors(from: &mut Qmp) -> Result<()> {
    let jobs = from.ask("query-block-jobs", &json!({}))?;
    let names: Vec<_> =
        jobs.as_array().into_iter().flatten().filter_map(|job| job["device"].as_str()).collect();
    for name in &names {
        from.ask("block-job-cancel", &json!({"device": name}))?;
    }
    while from.ask("query-block-jobs", &json!({}))?.as_array().is_some_and(|jobs| !jobs.is_empty())
    {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
