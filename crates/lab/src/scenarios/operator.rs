//! The scenario of an operator who commands hosts from a machine of their own.
//!
//! ```text
//! pc: limosa, a certificate ── HTTPS ──► a, b: limosad
//!     no agent                           know the certificate, or answer nothing
//! ```
//!
//! **Invariant.** No agent runs on `pc`, and no host's certificate lies there: what
//! is answered there is answered to the operator.

use anyhow::{Context, Result, ensure};
use limosa_protocol::api::PORT;
use serde_json::Value;

use super::Scenario;
use crate::harness::host::{Host, LIMOSA_TIMEOUT_S, Storage};
use crate::harness::lab::{Lab, Topology};
use crate::harness::points::start_agent;
use crate::harness::scene::{self, Scene};
use crate::harness::steps::{self, Wanted};
use crate::harness::tiny;
use crate::harness::{exec, net, paths};

/// The operator's own folder on their machine.
const CONFIG_HOME: &str = "/etc/limosa/ann";
/// What a host's `/run/limosa` is called within it.
const RUN: &str = "/run/limosa";

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "remote-operator",
    proves: "an operator whose certificate was entered commands hosts from afar; without one, or \
             after its removal, nothing is answered",
    topology: || Topology {
        hosts: vec![("a", Storage::Folder), ("b", Storage::Folder), ("pc", Storage::Folder)],
        ..Topology::default()
    },
    run: remote,
}];

fn remote(lab: &mut Lab) -> Result<()> {
    for host in ["a", "b"] {
        start_agent(lab, host)?;
    }
    let pc = Desk { host: lab.host("pc") };
    not_let_in(lab, &pc)?;
    let certificate = certificate(&pc)?;
    for name in ["a", "b"] {
        let host = lab.host(name);
        std::fs::write(host.run_dir().join("ann.crt"), &certificate)?;
        let file = format!("{RUN}/ann.crt");
        host.limosa(&["operator", "add", "ann", "--certificate", &file])?;
        let listed = host.limosa(&["operator", "list"])?;
        ensure!(listed.contains("ann"), "{name} lists {listed}");
        trusted(lab, &pc, name)?;
    }
    set_up(lab, &pc)?;
    run_and_move(lab, &pc)?;
    hosts_do_not_command(lab)?;
    lab.host("b").limosa(&["operator", "remove", "ann"])?;
    pc.refused("b", &["vm", "list"], "does not know you")?;
    pc.says("a", &["vm", "list"]).context("a was not to forget")?;
    another_certificate(lab)
}

/// The operator's machine.
struct Desk<'a> {
    host: &'a Host,
}

impl Desk<'_> {
    fn limosa(&self, args: &[&str]) -> Result<std::process::Output> {
        let mut command = self.host.command(LIMOSA_TIMEOUT_S, paths::product("limosa")?);
        exec::output(command.args(args).env("XDG_CONFIG_HOME", CONFIG_HOME))
    }

    /// A command to a host that succeeds; returns what it prints.
    fn says(&self, to: &str, args: &[&str]) -> Result<String> {
        let output = self.limosa(&[&["--agent", &agent(to)?], args].concat())?;
        let (stdout, stderr) = (exec::lossy(&output.stdout), exec::lossy(&output.stderr));
        ensure!(output.status.success(), "{args:?} to {to} ended with {}: {stderr}", output.status);
        Ok(stdout)
    }

    fn json(&self, to: &str, args: &[&str]) -> Result<Value> {
        let text = self.says(to, &[args, &["--json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("{args:?} says no JSON: {text}"))
    }

    /// A command to a host that fails, learns nothing, and says why.
    fn refused(&self, to: &str, args: &[&str], why: &str) -> Result<()> {
        let output = self.limosa(&[&["--agent", &agent(to)?], args].concat())?;
        let (stdout, stderr) = (exec::lossy(&output.stdout), exec::lossy(&output.stderr));
        let is_refused = output.status.code() == Some(1) && stdout.is_empty();
        ensure!(is_refused, "{args:?} to {to} ended with {}: {stdout}{stderr}", output.status);
        ensure!(stderr.contains(why), "{args:?} to {to} was refused because {stderr}");
        Ok(())
    }
}

fn address(name: &str) -> Result<String> {
    let index = if name == "a" { 0 } else { 1 };
    Ok(net::host_v4(index, 0)?.to_string())
}

fn agent(name: &str) -> Result<String> {
    Ok(format!("https://{}", address(name)?))
}

/// What an administrator at the host reads out to the operator.
fn fingerprint(host: &Host) -> Result<String> {
    let shown: Value = host.limosa_json(&["host", "show"])?;
    Ok(shown["fingerprint"].as_str().context("no fingerprint")?.to_owned())
}

/// Before the certificate is entered, every way is refused.
fn not_let_in(lab: &Lab, pc: &Desk<'_>) -> Result<()> {
    for name in ["a", "b"] {
        let right = fingerprint(lab.host(name))?;
        let other = fingerprint(lab.host(if name == "a" { "b" } else { "a" }))?;
        pc.refused(name, &["vm", "list"], &right).context("an unknown host is not asked")?;
        let wrong = ["vm", "list", "--fingerprint", &other];
        pc.refused(name, &wrong, "another certificate")?;
        for args in [&["vm", "list"][..], &["host", "show"], &["operator", "list"]] {
            let args = [args, &["--fingerprint", &right]].concat();
            pc.refused(name, &args, "does not know you")?;
        }
        let got = without_limosa(pc.host, name, "")?;
        ensure!(got.is_empty(), "without a certificate {name} answers {got:?}");
    }
    Ok(())
}

/// What a plain TLS client gets; `how` may name a certificate.
fn without_limosa(host: &Host, to: &str, how: &str) -> Result<String> {
    let address = address(to)?;
    host.run(&[
        "sh",
        "-c",
        &format!(
            "(printf 'GET /v1/vms HTTP/1.1\\r\\nHost: {to}\\r\\nConnection: close\\r\\n\\r\\n'; \
             sleep 1) | timeout 5 openssl s_client -quiet -tls1_3 -alpn http/1.1 \
             -connect {address}:{PORT} {how} 2>/dev/null; :"
        ),
    ])
}

/// The operator's certificate, to be carried to the hosts.
fn certificate(pc: &Desk<'_>) -> Result<String> {
    let output = pc.limosa(&["operator", "identity"])?;
    let path = exec::lossy(&output.stdout).trim().to_owned();
    ensure!(path.starts_with(CONFIG_HOME), "the identity is at {path:?}");
    let text = pc.host.run(&["cat", &path])?;
    ensure!(text.starts_with("-----BEGIN CERTIFICATE"), "{path} holds {text}");
    Ok(text)
}

/// A host is confirmed once, and known from then on.
fn trusted(lab: &Lab, pc: &Desk<'_>, name: &str) -> Result<()> {
    let right = fingerprint(lab.host(name))?;
    let shown = pc.json(name, &["host", "show", "--fingerprint", &right])?;
    ensure!(shown["name"] == name, "{name} shows {shown}");
    let second = pc.json(name, &["host", "show"]).context("confirmed once")?;
    ensure!(second["fingerprint"] == *right, "{name} shows {second}");
    Ok(())
}

/// Switches, pairing and a VM, all from afar.
fn set_up(lab: &Lab, pc: &Desk<'_>) -> Result<()> {
    for name in ["a", "b"] {
        pc.says(name, &["switch", "create", steps::SWITCH, "--uplink", "lan0"])?;
    }
    let invited = pc.json("b", &["host", "invite"])?;
    let code = invited["code"].as_str().context("no code")?;
    pc.says("a", &["host", "pair", &address("b")?, "--code", code])?;
    let paired = pc.json("b", &["host", "list"])?;
    ensure!(paired[0]["name"] == "a", "b is paired with {paired}");
    let wanted = tiny::working()?;
    std::fs::write(lab.host("pc").run_dir().join("web1.toml"), toml(&wanted))?;
    pc.says("a", &["vm", "create", &format!("{RUN}/web1.toml")])?;
    let vms = pc.json("a", &["vm", "list"])?;
    ensure!(vms[0]["definition"]["name"] == *wanted.name, "a lists {vms}");
    Ok(())
}

/// The definition as a person writes it.
fn toml(wanted: &Wanted) -> String {
    let Wanted { name, memory_mib, machine, boot, disks, .. } = wanted;
    let (format, size_mib) = disks[0];
    format!(
        "name = \"{name}\"\nmemory_mib = {memory_mib}\nmachine = \"{machine}\"\n\n\
         [boot]\nkernel = \"{}\"\ninitrd = \"{}\"\nappend = \"{}\"\n\n\
         [[disks]]\nid = \"d0\"\nformat = \"{format}\"\nsize_mib = {size_mib}\n\n\
         [[nics]]\nswitch = \"{}\"\nmac = \"{}\"\n",
        boot.kernel.display(),
        boot.initrd.display(),
        boot.append,
        steps::SWITCH,
        steps::mac_text(steps::MAC),
    )
}

fn run_and_move(lab: &Lab, pc: &Desk<'_>) -> Result<()> {
    let scene = Scene::of_created(lab, "web1")?;
    let shown = pc.says("a", &["vm", "show", "web1"])?;
    ensure!(shown.contains("# power: running"), "a shows {shown}");
    // To its end, with the events of its progress, over HTTPS.
    let moved = pc.json("a", &["vm", "move", "web1", "--to", "b"])?;
    ensure!(moved["outcome"] == "moved", "it ended as {moved}");
    for name in ["a", "b"] {
        let listed = pc.json(name, &["migration", "list"])?;
        ensure!(listed[0]["id"] == moved["id"], "{name} lists {listed}");
    }
    scene::guest_is_well(lab)?;
    scene.end(lab, "b")?;
    pc.says("b", &["vm", "stop", "web1", "--force"])?;
    pc.refused("b", &["vm", "delete", "web1"], "--yes")?;
    pc.says("b", &["vm", "delete", "web1", "--yes"])?;
    lab.host("b").assert_clean()
}

/// A paired host may move VMs and not command.
fn hosts_do_not_command(lab: &Lab) -> Result<()> {
    let ours =
        "-cert /var/lib/limosa/identity/identity.crt -key /var/lib/limosa/identity/identity.key";
    let got = without_limosa(lab.host("a"), "b", ours)?;
    ensure!(got.starts_with("HTTP/1.1 403"), "a host asks for the VMs of b and gets {got:?}");
    Ok(())
}

/// A host that comes with another certificate is not asked anything.
fn another_certificate(lab: &mut Lab) -> Result<()> {
    lab.host_mut("a").stop_agent()?;
    lab.host("a").run(&["rm", "-r", "/var/lib/limosa/identity"])?;
    start_agent(lab, "a")?;
    let pc = Desk { host: lab.host("pc") };
    pc.refused("a", &["vm", "list"], "another certificate")
}
