//! What scenarios do with the product, in steps of one line each.
//!
//! Setting up goes through the API, because its answers are exact; moving goes
//! through whichever way the scenario is about.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use limosa_protocol::api::{Invitation, Power, Vm};
use limosa_protocol::migration::{Migration, Outcome, Phase};
use serde_json::{Value, json};

use crate::harness::host::Host;
use crate::harness::lab::Lab;
use crate::harness::net;
use crate::report::gather::Gathered;

/// Longest time for one migration, unless a scenario says otherwise.
pub(crate) const MOVE_TIMEOUT: Duration = Duration::from_secs(300);
/// Pause between two looks at a migration.
const LOOK_PAUSE: Duration = Duration::from_millis(25);
/// Switch on which all VMs of the lab are.
pub(crate) const SWITCH: &str = "lan";
/// How long agents wait for a lost link, in seconds: scenarios do not wait a minute.
const LINK_WAIT_S: u32 = 12;
/// Unprivileged user of Debian as whom QEMU runs in the lab.
pub(crate) const QEMU_USER: &str = "nobody";

/// A virtual machine that a scenario wants.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    /// Its name
    pub name: String,
    /// Memory in MiB
    pub memory_mib: u64,
    /// vCPUs
    pub vcpus: u32,
    /// Format (`raw`, `qcow2`) and size in MiB of each disk
    pub disks: Vec<(&'static str, u64)>,
    /// Machine type
    pub machine: String,
    /// Kernel, initial RAM disk and command line
    pub boot: Boot,
}

/// What a VM starts from.
#[derive(Debug, Clone, Default)]
pub(crate) struct Boot {
    /// Kernel image
    pub kernel: PathBuf,
    /// Initial RAM disk
    pub initrd: PathBuf,
    /// Kernel command line
    pub append: String,
    /// UEFI instead of SeaBIOS
    pub uefi: bool,
}

impl Wanted {
    /// Its definition as the API wants it.
    pub(crate) fn definition(&self) -> Value {
        let disks: Vec<_> = self
            .disks
            .iter()
            .enumerate()
            .map(|(n, (format, mib))| json!({"id": format!("d{n}"), "format": format, "size_mib": mib}))
            .collect();
        json!({
            "name": self.name,
            "memory_mib": self.memory_mib,
            "vcpus": self.vcpus,
            "machine": self.machine,
            "boot": {
                "kernel": self.boot.kernel,
                "initrd": self.boot.initrd,
                "append": self.boot.append,
                "firmware": if self.boot.uefi { "uefi" } else { "bios" },
            },
            "disks": disks,
            "nics": [{"switch": SWITCH, "mac": mac_text(MAC)}],
        })
    }
}

/// Hardware address of the scenarios' VM.
pub(crate) const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x11, 0x05, 0x01];

/// An Ethernet address as people write it.
pub(crate) fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Configuration of a host's agent; `further` is TOML for its section `qemu`.
pub(crate) fn agent_config(host: &Host, qemu: Option<&str>, further: &str) -> String {
    let binary = qemu.map_or(String::new(), |path| format!("binary = \"{path}\"\n"));
    format!(
        "name = \"{}\"\n\n[qemu]\nuser = \"{QEMU_USER}\"\n{binary}{further}\n[migration]\n\
         link_wait_s = {LINK_WAIT_S}\n",
        host.name()
    )
}

/// Starts all agents, makes the switches, and pairs each host with the first one.
pub(crate) fn agents_ready(lab: &mut Lab) -> Result<()> {
    for host in lab.hosts_mut() {
        let config = agent_config(host, None, "");
        host.start_agent(&config, &[])?;
    }
    join(lab)
}

/// Makes the switches of hosts whose agents run, and pairs the hosts.
pub(crate) fn join(lab: &Lab) -> Result<()> {
    for host in lab.hosts() {
        host.api("POST", "/v1/switches", Some(&json!({"name": SWITCH, "uplink": "lan0"})))?
            .read::<Value>()
            .with_context(|| format!("making the switch of host {}", host.name()))?;
    }
    (1..lab.hosts().len()).try_for_each(|index| pair(lab, 0, index))
}

/// Pairs two hosts, by number.
pub(crate) fn pair(lab: &Lab, first: usize, second: usize) -> Result<()> {
    let (host, other) = (&lab.hosts()[first], &lab.hosts()[second]);
    let invitation: Invitation = other.api::<Value>("POST", "/v1/hosts/invite", None)?.read()?;
    let address = net::host_v4(second, 0)?.to_string();
    let request = json!({"address": address, "code": invitation.code});
    host.api("POST", "/v1/hosts/pair", Some(&request))?
        .read::<Value>()
        .map(drop)
        .with_context(|| format!("pairing {} with {}", host.name(), other.name()))
}

/// Creates a VM on a host and starts it.
pub(crate) fn create_and_start(host: &Host, wanted: &Wanted) -> Result<Vm> {
    create(host, wanted)?;
    power(host, &wanted.name, "start")
}

/// Creates a VM on a host.
pub(crate) fn create(host: &Host, wanted: &Wanted) -> Result<Vm> {
    let answer = host.api("POST", "/v1/vms", Some(&wanted.definition()))?;
    answer.read().with_context(|| format!("creating {} on {}", wanted.name, host.name()))
}

/// Starts, pauses or resumes a VM.
pub(crate) fn power(host: &Host, vm: &str, order: &str) -> Result<Vm> {
    let answer = host.api::<Value>("POST", &format!("/v1/vms/{vm}/{order}"), None)?;
    answer.read().with_context(|| format!("{order} of {vm} on {}", host.name()))
}

/// A VM as its host sees it; `None` when the host does not have it.
pub(crate) fn look(host: &Host, vm: &str) -> Result<Option<Vm>> {
    let answer = host.api::<Value>("GET", &format!("/v1/vms/{vm}"), None)?;
    if answer.status == 404 { Ok(None) } else { answer.read().map(Some) }
}

/// Asks for a move and returns at once.
pub(crate) fn begin_move(from: &Host, vm: &str, to: &str, further: &Value) -> Result<Migration> {
    let mut request = json!({"to": to});
    if let (Some(request), Some(further)) = (request.as_object_mut(), further.as_object()) {
        request.extend(further.clone());
    }
    let answer = from.api("POST", &format!("/v1/vms/{vm}/move"), Some(&request))?;
    answer.read().with_context(|| format!("moving {vm} from {} to {to}", from.name()))
}

/// A migration as its host sees it.
pub(crate) fn look_at_move(host: &Host, migration: &Migration) -> Result<Migration> {
    host.api::<Value>("GET", &format!("/v1/migrations/{}", migration.id), None)?.read()
}

/// Follows a migration to its outcome and keeps what the agent said meanwhile.
pub(crate) fn follow(host: &Host, migration: &Migration, timeout: Duration) -> Result<Gathered> {
    let deadline = Instant::now() + timeout;
    let mut gathered = Gathered::default();
    loop {
        let now = look_at_move(host, migration)?;
        let ended = now.outcome.is_some();
        let phase = now.phase;
        gathered.add(unix_ms()?, now);
        if ended {
            return Ok(gathered);
        }
        ensure!(Instant::now() < deadline, "the move does not end; it is in {}", phase.as_str());
        std::thread::sleep(LOOK_PAUSE);
    }
}

/// Moves a VM and waits; fails unless it moved.
pub(crate) fn move_vm(lab: &Lab, vm: &str, from: &str, to: &str) -> Result<Gathered> {
    move_vm_with(lab, vm, from, to, &Value::Null)
}

/// The same with further wishes.
pub(crate) fn move_vm_with(
    lab: &Lab,
    vm: &str,
    from: &str,
    to: &str,
    further: &Value,
) -> Result<Gathered> {
    let host = lab.host(from);
    let migration = begin_move(host, vm, to, further)?;
    let gathered = follow(host, &migration, MOVE_TIMEOUT)?;
    let last = gathered.last().context("nothing was said about the move")?;
    if last.outcome != Some(Outcome::Moved) {
        bail!("{vm} did not move from {from} to {to}: {:?}, {:?}", last.outcome, last.reason);
    }
    Ok(gathered)
}

/// Waits until a migration is in that phase or a later one, or has ended.
/// Returns what was seen then.
pub(crate) fn wait_for_phase(
    host: &Host,
    migration: &Migration,
    phase: Phase,
) -> Result<Migration> {
    let deadline = Instant::now() + MOVE_TIMEOUT;
    loop {
        let now = look_at_move(host, migration)?;
        if now.phase >= phase || now.outcome.is_some() {
            return Ok(now);
        }
        ensure!(Instant::now() < deadline, "the move never came to {}", phase.as_str());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until a VM is on exactly one host with a QEMU, and that one runs it;
/// returns the host's name.
pub(crate) fn wait_for_owner(lab: &Lab, vm: &str, timeout: Duration) -> Result<String> {
    let deadline = Instant::now() + timeout;
    loop {
        let mut seen = Vec::new();
        for host in lab.hosts() {
            // A host whose agent is down is not asked, but its QEMU counts.
            let power = look(host, vm).ok().flatten().map(|vm| vm.power);
            seen.push((host.name().to_owned(), power, host.qemu_pids().len()));
        }
        let with_qemu: Vec<_> = seen.iter().filter(|(_, _, count)| *count > 0).collect();
        let known = seen.iter().filter(|(_, power, _)| power.is_some()).count();
        if let [(name, Some(Power::Running), 1)] = with_qemu[..]
            && known == 1
        {
            return Ok(name.clone());
        }
        ensure!(Instant::now() < deadline, "{vm} does not come to rest: {seen:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Fails unless the VM runs on that host only and the others hold nothing of it.
pub(crate) fn assert_only_at(lab: &Lab, vm: &str, at: &str) -> Result<()> {
    let owner = wait_for_owner(lab, vm, Duration::from_secs(30))?;
    ensure!(owner == at, "{vm} is on {owner} and should be on {at}");
    lab.hosts().iter().filter(|host| host.name() != at).try_for_each(Host::assert_clean)
}

/// Fails when an agent told of doubt: in moves that nothing disturbs there is none.
pub(crate) fn assert_no_doubt(lab: &Lab) -> Result<()> {
    let has_doubted = |host: &&Host| host.agent_log().contains("in doubt");
    let doubting = lab.hosts().iter().find(has_doubted).map(Host::name);
    ensure!(doubting.is_none(), "the log of {doubting:?} tells of doubt");
    Ok(())
}

/// Milliseconds since 1970.
pub(crate) fn unix_ms() -> Result<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    Ok(u64::try_from(now.as_millis())?)
}
