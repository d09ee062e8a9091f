//! Scenarios of VMs of one host that must not touch each other's files or names.

use anyhow::{Context, Result, ensure};
use limosa_protocol::api::Power;
use serde_json::{Value, json};

use super::Scenario;
use crate::harness::host::Host;
use crate::harness::lab::{Lab, Topology};
use crate::harness::points::start_agent;
use crate::harness::steps::{self, Wanted};
use crate::harness::tiny;

/// The folder of the first VM.
const FOLDER: &str = "/srv/web1";

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "vms-keep-apart",
    proves: "no VM is made in another one's folder, and one whose definition cannot be read keeps \
             its name and comes back with it",
    topology: Topology::default,
    run,
}];

/// What an operator is told whose request is refused.
fn refused(host: &Host, path: &str, body: Option<&Value>) -> Result<String> {
    let answer = host.api("POST", path, body)?;
    ensure!(answer.status == 409, "{path} was answered {answer:?}");
    Ok(format!("{answer:?}"))
}

fn run(lab: &mut Lab) -> Result<()> {
    steps::agents_ready(lab)?;
    let wanted = Wanted { disks: vec![("qcow2", 16)], ..tiny::working()? };
    let vm = wanted.name.clone();
    let mut first = wanted.definition();
    first["places"] = json!({ "configuration": FOLDER, "disks": "/srv/images" });
    let host = lab.host("a");
    host.run(&["mkdir", "-p", "/srv/images"])?;
    host.api("POST", "/v1/vms", Some(&first))?.read::<Value>()?;
    let before = host.run(&["cat", "/srv/web1/vm.toml"])?;

    let mut second = first.clone();
    second["name"] = json!("other");
    second["nics"] = json!([]);
    second["disks"] = json!([]);
    let said = refused(host, "/v1/vms", Some(&second))?;
    ensure!(said.contains(FOLDER) && said.contains(&vm), "it was refused with {said}");
    ensure!(host.run(&["cat", "/srv/web1/vm.toml"])? == before, "the definition was changed");

    // As when the agent starts before /srv is mounted.
    lab.host_mut("a").stop_agent()?;
    lab.host("a").run(&["mv", FOLDER, "/srv/away"])?;
    start_agent(lab, "a")?;
    let host = lab.host("a");
    let view = steps::look(host, &vm)?.context("the VM is not told of")?;
    let why = view.fault.context("no reason is told")?;
    ensure!(view.power == Power::Fault && why.contains("/srv/web1/vm.toml"), "it says {why}");
    ensure!(host.limosa(&["vm", "list"])?.contains(&vm), "it is not listed");
    refused(host, "/v1/vms", Some(&first))?;
    let said = refused(host, &format!("/v1/vms/{vm}/start"), None)?;
    ensure!(said.contains("restart limosad"), "the start was refused with {said}");

    lab.host_mut("a").stop_agent()?;
    lab.host("a").run(&["mv", "/srv/away", FOLDER])?;
    start_agent(lab, "a")?;
    let host = lab.host("a");
    steps::power(host, &vm, "start")?;
    steps::power(host, &vm, "pause")?;
    // It cannot hear its power button, which is said and not waited for.
    let stop = json!({ "timeout_seconds": 3600 });
    let said = refused(host, &format!("/v1/vms/{vm}/stop"), Some(&stop))?;
    ensure!(said.contains("vm resume"), "the stop was refused with {said}");
    host.limosa(&["vm", "stop", "--force", &vm])?;
    host.limosa(&["vm", "delete", &vm, "--yes"])?;
    host.run(&["test", "!", "-e", FOLDER]).context("its folder is there still")?;
    host.run(&["test", "-d", "/srv/images"]).context("a shared folder is gone")?;
    host.assert_clean()
}
