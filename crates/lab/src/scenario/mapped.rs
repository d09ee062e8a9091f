//! A move to places of other names: switches, folders, images.

use anyhow::{Context, Result, ensure};
use limosa_protocol::api::Switch;
use serde_json::{Value, json};

use super::scene::{self, Scene};
use super::steps::{self, Wanted};
use super::{Story, tiny};
use crate::host::Host;
use crate::lab::{Lab, Plan};

/// A second switch of the source.
const SIDE: &str = "side";
/// The folder, and the image of one disk, that the operator chose at the destination.
const FOLDER: &str = "/var/lib/limosa/moved/web1";
const IMAGE: &str = "/var/lib/limosa/fast/second.qcow2";
/// What the guest may write meanwhile, and file systems' own, in KiB.
const GROWTH_KIB_MAX: u64 = 20 << 10;

pub(super) const STORIES: &[Story] = &[Story {
    name: "move-mapped",
    proves: "a VM moves to switches of other names and to the folder and image that were named; \
             holes stay holes",
    plan: Plan::default,
    run: mapped,
}];

fn mapped(lab: &mut Lab) -> Result<()> {
    let wanted = Wanted {
        disks: vec![("raw", 192), ("qcow2", 256)],
        further_switches: vec![SIDE],
        ..tiny::working()?
    };
    steps::agents_ready(lab)?;
    make_switch(lab.host("a"), SIDE, None)?;
    // At b neither is called as at a.
    let path = format!("/v1/switches/{}", steps::SWITCH);
    let removed = lab.host("b").api::<Value>("DELETE", &path, None)?;
    ensure!(removed.status < 300, "the switch was not removed: {removed:?}");
    let office = make_switch(lab.host("b"), "office", Some("lan0"))?;
    let back = make_switch(lab.host("b"), "back", None)?;
    let scene = Scene::on_ready_hosts(lab, &wanted)?;
    let disks = "/var/lib/limosa/vms/web1/disks";
    let before =
        allocated_kib(lab.host("a"), [&format!("{disks}/d0.raw"), &format!("{disks}/d1.qcow2")])?;
    ensure!(before.iter().all(|kib| *kib < 100 << 10), "there are no holes: {before:?} KiB");

    let order = ["vm", "move", &wanted.name, "--to", "b"];
    let refused = lab.host("a").try_limosa(&order)?;
    let said = crate::exec::lossy(&refused.stderr);
    ensure!(!refused.status.success() && said.contains("--switch"), "b has no such switch: {said}");
    let image = format!("d1={IMAGE}");
    let places = ["--storage-path", FOLDER, "--disk", &image];
    let switches = ["--switch", "lan=office", "--switch", "side=back"];
    lab.host("a").limosa(&[&order[..], &places, &switches].concat())?;

    steps::assert_only_at(lab, &wanted.name, "b")?;
    scene::guest_is_well(lab)?;
    let after = allocated_kib(lab.host("b"), [&format!("{FOLDER}/disks/d0.raw"), IMAGE])?;
    for (before, after) in before.iter().zip(&after) {
        ensure!(*after <= before + GROWTH_KIB_MAX, "{before} KiB became {after} KiB");
    }
    lab.host("b").run(&["test", "-f", &format!("{FOLDER}/vm.toml")])?;
    for bridge in [office, back] {
        let plugged = lab.host("b").run(&["ls", &format!("/sys/class/net/{bridge}/brif")])?;
        ensure!(plugged.contains("lm"), "no NIC of the VM is at {bridge}: {plugged}");
    }
    scene.end(lab, "b").map(drop)
}

/// Makes a switch; returns its bridge.
fn make_switch(host: &Host, name: &str, uplink: Option<&str>) -> Result<String> {
    let request = json!({"name": name, "uplink": uplink});
    let made: Switch = host.api("POST", "/v1/switches", Some(&request))?.read()?;
    made.bridge.context("a switch without a bridge")
}

fn allocated_kib(host: &Host, images: [&str; 2]) -> Result<Vec<u64>> {
    let told = host.run(&["du", "-k", images[0], images[1]])?;
    let sizes = told.lines().filter_map(|line| line.split_whitespace().next());
    Ok(sizes.map(str::parse).collect::<Result<_, _>>()?)
}
