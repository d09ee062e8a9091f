//! The scenario of a VM whose files and switches are others at the destination.
//!
//! ```text
//!  a: lan, back             b: front, store            a                     b
//!  usual folder  ─────────► --storage-path  ─────────► --disk d0=…  ───────► usual folder
//! ```
//!
//! **Invariant.** Each leg says where everything must lie after it; the next one
//! looks that nothing is left there.

use anyhow::{Context, Result, ensure};
use limosa_protocol::api::Vm;
use serde_json::{Value, json};

use super::Scenario;
use crate::harness::host::Host;
use crate::harness::lab::{Lab, Topology};
use crate::harness::scene::{self, Scene};
use crate::harness::steps::{self, Wanted};
use crate::harness::tiny;

/// Hardware address of the VM's second NIC.
const SECOND_MAC: &str = "52:54:00:11:05:02";
/// Size of each disk, in MiB. A good half of it is never written by the guest.
const DISK_MIB: u64 = 192;
/// Most that an image may grow by in a move, in bytes: the guest goes on writing
/// its journal, whose ring has 16 MiB.
const GROWTH_BYTES_MAX: u64 = 20 << 20;

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "move-mapped",
    proves: "a VM with two disks and two NICs goes where --storage-path, --disk and --switch say; \
             holes stay holes",
    topology: Topology::default,
    run: mapped,
}];

/// One move, and where the VM is after it.
struct Leg {
    from: &'static str,
    to: &'static str,
    options: &'static [&'static str],
    images: [&'static str; 2],
    switches: [&'static str; 2],
}

const USUAL: [&str; 2] =
    ["/var/lib/limosa/vms/web1/disks/d0.raw", "/var/lib/limosa/vms/web1/disks/d1.qcow2"];
const AT_A: [&str; 2] = [steps::SWITCH, "back"];
const AT_B: [&str; 2] = ["front", "store"];
/// Neither folder is one that Limosa would choose by itself.
const ELSEWHERE: &str = "/var/lib/limosa/elsewhere";
const IMAGES: &str = "/var/lib/limosa/images";

const LEGS: &[Leg] = &[
    Leg {
        from: "a",
        to: "b",
        options: &["--storage-path", ELSEWHERE, "--switch", "lan=front", "--switch", "back=store"],
        images: [
            "/var/lib/limosa/elsewhere/disks/d0.raw",
            "/var/lib/limosa/elsewhere/disks/d1.qcow2",
        ],
        switches: AT_B,
    },
    Leg {
        from: "b",
        to: "a",
        options: &[
            "--disk",
            "d0=/var/lib/limosa/images/first.raw",
            "--switch",
            "front=lan",
            "--switch",
            "store=back",
        ],
        images: ["/var/lib/limosa/images/first.raw", USUAL[1]],
        switches: AT_A,
    },
    Leg {
        from: "a",
        to: "b",
        options: &["--switch", "lan=front", "--switch", "back=store"],
        images: USUAL,
        switches: AT_B,
    },
];

fn mapped(lab: &mut Lab) -> Result<()> {
    steps::agents_ready(lab)?;
    switches(lab)?;
    let disks = vec![("raw", DISK_MIB), ("qcow2", DISK_MIB)];
    let wanted = Wanted { disks, ..tiny::working()? };
    let mut definition = wanted.definition();
    let nics = definition["nics"].as_array_mut().context("no list of NICs")?;
    nics.push(json!({"switch": AT_A[1], "mac": SECOND_MAC}));
    lab.host("a").api("POST", "/v1/vms", Some(&definition))?.read::<Vm>()?;
    let scene = Scene::of_created(lab, &wanted.name)?;
    unmapped_is_refused(lab.host("a"), &wanted.name)?;
    let mut images = USUAL;
    for leg in LEGS {
        go(lab, &wanted.name, leg, images)
            .with_context(|| format!("{} to {} with {:?}", leg.from, leg.to, leg.options))?;
        images = leg.images;
    }
    scene.end(lab, "b").map(drop)
}

/// Gives the hosts switches with other names; those with an uplink are one network.
fn switches(lab: &Lab) -> Result<()> {
    let path = format!("/v1/switches/{}", steps::SWITCH);
    let removed = lab.host("b").api::<Value>("DELETE", &path, None)?;
    ensure!(removed.status < 300, "the switch of b was not removed: {removed:?}");
    for (host, wanted) in [
        ("a", json!({"name": AT_A[1]})),
        ("b", json!({"name": AT_B[0], "uplink": "lan0"})),
        ("b", json!({"name": AT_B[1]})),
    ] {
        lab.host(host).api("POST", "/v1/switches", Some(&wanted))?.read::<Value>()?;
    }
    Ok(())
}

/// Without the mapping, the switches are missing there: both are told.
fn unmapped_is_refused(host: &Host, vm: &str) -> Result<()> {
    let refused = host.try_limosa(&["vm", "move", vm, "--to", "b"])?;
    let said = crate::harness::exec::lossy(&refused.stderr);
    ensure!(refused.status.code() == Some(1), "it ended with {}: {said}", refused.status);
    ensure!(AT_A.iter().all(|switch| said.contains(switch)), "not both are told: {said}");
    Ok(())
}

fn go(lab: &Lab, vm: &str, leg: &Leg, left: [&str; 2]) -> Result<()> {
    let (from, to) = (lab.host(leg.from), lab.host(leg.to));
    let before = left.iter().map(|path| from.allocated_bytes(path)).collect::<Result<Vec<_>>>()?;
    from.limosa(&[&["vm", "move", vm, "--to", leg.to], leg.options].concat())?;
    steps::assert_only_at(lab, vm, leg.to)?;
    for path in left.into_iter().chain([ELSEWHERE]) {
        let found = from.run(&["sh", "-c", &format!("ls -d {path} 2>/dev/null; :")])?;
        ensure!(found.is_empty(), "left behind at {}: {found}", leg.from);
    }
    let found = from.run(&["sh", "-c", &format!("ls {IMAGES} 2>/dev/null; :")])?;
    ensure!(found.is_empty(), "left behind at {}: {IMAGES}/{found}", leg.from);

    let told = steps::look(to, vm)?.context("it is not there")?.definition;
    for (index, path) in leg.images.into_iter().enumerate() {
        let disk = &told.disks[index];
        ensure!(
            disk.path.as_deref() == Some(path.as_ref()),
            "disk {index} should lie at {path}: {disk:?}"
        );
        let (before, after) = (before[index], to.allocated_bytes(path)?);
        ensure!(
            after <= before + GROWTH_BYTES_MAX,
            "{path}: {before} bytes were allocated, now {after}"
        );
        ensure!(after < DISK_MIB << 20, "{path} has no holes any more");
    }
    for (index, switch) in leg.switches.into_iter().enumerate() {
        let nic = &told.nics[index];
        ensure!(nic.switch.as_str() == switch, "NIC {index} should be on {switch}: {nic:?}");
        ensure!(taps_on(to, switch)? == 1, "no TAP of the VM is on the bridge of {switch}");
    }
    scene::guest_is_well(lab).map(drop)
}

/// How many TAPs are ports of a switch's bridge.
fn taps_on(host: &Host, switch: &str) -> Result<usize> {
    let look = format!(
        "for port in $(ls /sys/class/net/ls-{switch}/brif); do \
         [ ! -e /sys/class/net/$port/tun_flags ] || echo $port; done"
    );
    Ok(host.namespace().run(&["sh", "-c", &look])?.lines().count())
}
