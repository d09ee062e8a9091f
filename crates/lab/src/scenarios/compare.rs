//! Scenarios of what stands against a move: told before anything is touched, all at
//! once, each with its remedy.

use anyhow::{Context, Result, ensure};
use limosa_protocol::migration::Outcome;
use serde_json::{Value, json};

use super::Scenario;
use crate::harness::host::Storage;
use crate::harness::lab::{Lab, Topology};
use crate::harness::scene::Scene;
use crate::harness::steps::{self, Wanted};
use crate::harness::tiny;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "move-compare-says-why-not",
        proves: "what stands against a move is said before anything is touched",
        topology: || Topology {
            hosts: vec![("a", Storage::Folder), ("b", Storage::Limited { mib: 64 })],
            ..Topology::default()
        },
        run: says_why_not,
    },
    Scenario {
        name: "compare-names-all",
        proves: "names, switches, folders, files of the host, machine type and processor are all \
                 looked at, and what is wrong with them is told in one answer",
        topology: Topology::default,
        run: names_all,
    },
];

fn names_all(lab: &mut Lab) -> Result<()> {
    // The VM is made for the newer QEMU, and the other one does not know what it needs.
    let other = super::other_qemu()?;
    let is_newer = other.to_string_lossy().contains("qemu10");
    super::start_with_other_qemu(lab, if is_newer { "a" } else { "b" }, &other)?;
    let (a, b) = (lab.host("a"), lab.host("b"));
    let named = Wanted { disks: Vec::new(), ..tiny::working()? };
    a.run(&["sh", "-c", "head -c 1M /dev/zero >/var/lib/limosa/a.iso"])?;
    let mut definition = named.definition();
    definition["cpu"] = json!("max");
    definition["disks"] = json!([
        {"id": "d0", "size_mib": 16},
        {"id": "cd", "kind": "cdrom", "format": "raw", "path": "/var/lib/limosa/a.iso"},
    ]);
    a.api("POST", "/v1/vms", Some(&definition))?.read::<Value>()?;
    let mut same_name = named.definition();
    same_name["nics"] = json!([]);
    b.api("POST", "/v1/vms", Some(&same_name))?.read::<Value>()?;
    let path = format!("/v1/switches/{}", steps::SWITCH);
    ensure!(b.api::<Value>("DELETE", &path, None)?.status < 300, "the switch was not removed");
    b.run(&["mkdir", "-p", "/var/lib/limosa/full/of-things"])?;

    let answer = a.try_limosa(&[
        "vm",
        "compare",
        &named.name,
        "--to",
        "b",
        "--storage-path",
        "/var/lib/limosa/full",
        "--json",
    ])?;
    ensure!(answer.status.code() == Some(1), "compare ended with {}", answer.status);
    let told: Value = serde_json::from_slice(&answer.stdout).context("what compare told")?;
    let problems = told["problems"].as_array().context("no list of problems")?;
    for code in [
        "name-taken",
        "switch-missing",
        "not-empty",
        "host-attached",
        "machine-type",
        "cpu-features",
    ] {
        let problem = problems.iter().find(|problem| problem["code"] == code);
        let remedy = problem.and_then(|problem| problem["remedy"].as_str());
        ensure!(remedy.is_some_and(|remedy| !remedy.is_empty()), "{code} is not told: {told}");
    }
    // The VM is off on both hosts, as it was; nothing was made.
    b.run(&["test", "!", "-e", "/var/lib/limosa/full/vm.toml"])?;
    let unknown = a.try_limosa(&["vm", "compare", &named.name, "--to", "nowhere"])?;
    let said = crate::harness::exec::lossy(&unknown.stderr)
        + &crate::harness::exec::lossy(&unknown.stdout);
    ensure!(said.contains("limosa host pair"), "no word of pairing: {said}");
    Ok(())
}

fn says_why_not(lab: &mut Lab) -> Result<()> {
    let wanted = Wanted { disks: vec![("qcow2", 192)], ..tiny::working()? };
    let scene = Scene::set(lab, &wanted)?;
    let switch = format!("/v1/switches/{}", steps::SWITCH);
    let removed = lab.host("b").api::<Value>("DELETE", &switch, None)?;
    ensure!(removed.status < 300, "the switch was not removed: {removed:?}");
    let path = format!("/v1/vms/{}/compare", wanted.name);
    let request = json!({"to": "b"});
    let told: Value = lab.host("a").api("POST", &path, Some(&request))?.read()?;
    let problems = told["problems"].as_array().context("no list of problems")?;
    let codes: Vec<_> = problems.iter().filter_map(|problem| problem["code"].as_str()).collect();
    ensure!(codes.contains(&"switch-missing"), "the missing switch is not told: {told}");
    ensure!(codes.contains(&"no-space"), "the lack of space is not told: {told}");
    for problem in problems {
        ensure!(
            problem["remedy"].as_str().is_some_and(|remedy| !remedy.is_empty()),
            "no remedy: {problem}"
        );
    }
    let elsewhere = json!({"to": "b", "storage_path": "/etc/cron.d/vm"});
    let told: Value = lab.host("a").api("POST", &path, Some(&elsewhere))?.read()?;
    ensure!(told.to_string().contains("storage_roots"), "b would write to /etc: {told}");
    let path = format!("/v1/vms/{}/move", wanted.name);
    let refused = lab.host("a").api("POST", &path, Some(&request))?;
    if refused.status < 400 {
        let migration = refused.read()?;
        let ended = steps::follow(lab.host("a"), &migration, steps::MOVE_TIMEOUT)?;
        let last = ended.last().context("nothing was said")?;
        ensure!(last.outcome == Some(Outcome::Stayed), "it moved: {last:?}");
    }
    scene.end(lab, "a").map(drop)
}
