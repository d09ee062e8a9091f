//! The destination's part: names, switches, memory, QEMU and CPU. What becomes
//! of files is [`super::storage`]'s.

use std::time::Duration;

use limosa_protocol::api::Switch;
use limosa_protocol::id::{HostName, MigrationId};
use limosa_protocol::migration::{Problem, ProblemCode, Role};
use limosa_protocol::peer::Offer;
use limosa_protocol::plan::{DiskCarrier, Location, MigrationPlan};
use limosa_protocol::version::{PEER_VERSION, PEER_VERSION_MIN};
use limosa_protocol::vm::{Firmware, VmDefinition};
use serde_json::Value;

use super::problem::{check_qemu, problem};
use super::storage;
use crate::migrations::Migrations;
use limosa_host::failure::{Failure, OrFail, Result};
use limosa_host::memory::Memory;
use limosa_host::vm::files;
use limosa_host::wire_accelerator;

/// Longest wait to hear what becomes of the same VM, which somebody works on.
const SAME_VM_WAIT: Duration = Duration::from_secs(1);

/// Memory that a VM's QEMU needs besides guest RAM, in bytes.
const QEMU_OVERHEAD_BYTES: u64 = 128 << 20;

/// Reads an offer whose version this agent speaks; another one is a problem,
/// whatever else it holds.
pub(crate) fn read_offer(
    migrations: &Migrations,
    from: &HostName,
    offer: Value,
) -> Result<Result<Offer, Problem>> {
    if let Some(problem) = check_version(from, &migrations.context.host.name, &offer) {
        return Ok(Err(problem));
    }
    serde_json::from_value(offer).map(Ok).map_err(|error| {
        Failure::bad_request(format!(
            "the offer is not understood, though {from} and {} speak the same version: {error}",
            migrations.context.host.name
        ))
    })
}

/// Which of two agents is too old for the other, from the one field of an offer
/// that every version has.
fn check_version(from: &HostName, here: &HostName, offer: &Value) -> Option<Problem> {
    let spoken = offer.get("peer_version").and_then(Value::as_u64);
    let (what, older) = match spoken {
        Some(version) if version < PEER_VERSION_MIN.into() => (format!("version {version}"), from),
        Some(version) if version <= PEER_VERSION.into() => return None,
        Some(version) => (format!("version {version}"), here),
        None => ("no version that is known".to_owned(), here),
    };
    let own = if PEER_VERSION_MIN == PEER_VERSION {
        format!("version {PEER_VERSION}")
    } else {
        format!("versions {PEER_VERSION_MIN} to {PEER_VERSION}")
    };
    Some(problem(
        ProblemCode::PeerVersion,
        format!(
            "these versions of Limosa do not understand each other: between hosts {from} speaks \
             {what}, and {here} {own}"
        ),
        format!("upgrade Limosa on {older}"),
    ))
}

/// The VM as it will be at the destination.
pub(crate) struct Placed {
    pub(crate) definition: VmDefinition,
    /// The plan with the locations of this host
    pub(crate) plan: MigrationPlan,
}

/// Gives an offered VM its places at this host.
pub(crate) fn place_offer(migrations: &Migrations, offer: &Offer) -> Placed {
    let mut plan = offer.plan.clone();
    let mut definition = offer.definition.clone();
    let folder = offer
        .storage_path
        .clone()
        .unwrap_or_else(|| migrations.context.host.folders.files_of(&definition.name));
    definition.places = files::places_in(&folder);
    for (path, name) in [
        (&mut definition.boot.kernel, files::KERNEL_FILE),
        (&mut definition.boot.initrd, files::INITRD_FILE),
    ] {
        if let Some(path) = path {
            *path = folder.join(name);
        }
    }
    for (disk, item) in definition.disks.iter_mut().zip(&mut plan.disks) {
        let usual = || files::usual_image(&folder.join("disks"), disk.id.as_str(), disk.format);
        let path = item.destination.take().map_or_else(usual, |requested| requested.path);
        if item.carrier == DiskCarrier::Mirror {
            item.destination = Some(Location::file(path.clone(), disk.format));
        }
        disk.path = Some(path);
    }
    for nic in &mut definition.nics {
        if let Some(renamed) = offer.switches.get(&nic.switch) {
            nic.switch = renamed.clone();
        }
    }
    Placed { definition, plan }
}

/// Everything at this host that stands against an offer. Touches nothing.
pub(crate) async fn check_offer(migrations: &Migrations, offer: &Offer) -> Result<Vec<Problem>> {
    offer
        .definition
        .check()
        .map_err(|error| Failure::bad_request(format!("the offered definition: {error}")))?;
    offer
        .plan
        .check(&offer.definition)
        .map_err(|error| Failure::bad_request(format!("the offered plan: {error}")))?;
    let Placed { definition: placed, plan } = place_offer(migrations, offer);
    let mut problems = Vec::new();
    if let Some(disk) = plan.left_behind().next() {
        problems.push(problem(
            ProblemCode::HostAttached,
            format!("disk {} is attached to the source host and does not move", disk.id),
            format!("take {} out of the VM's definition", disk.id),
        ));
    }
    check_switches(migrations, &placed, &mut problems)?;
    // What lies in its places is its own, then, and not in the way.
    if !check_names(migrations, &placed, &mut problems).await {
        storage::check(migrations, &placed, &plan, offer, &mut problems).await?;
    }
    check_memory(migrations, offer, &mut problems)?;
    check_machine(migrations, offer, &mut problems);
    check_cpu(migrations, offer, &mut problems);
    Ok(problems)
}

/// Whether VMs of this host take the VM's name or addresses; `true` if it, or
/// what passes for it, is here or on its way already.
async fn check_names(
    migrations: &Migrations,
    placed: &VmDefinition,
    problems: &mut Vec<Problem>,
) -> bool {
    let mut is_here = false;
    for vm in migrations.context.host.vms.all() {
        let other = &vm.reserved;
        if other.uuid == placed.uuid {
            let inner = tokio::time::timeout(SAME_VM_WAIT, vm.lock()).await;
            problems.push(same_vm(
                migrations,
                other,
                inner.ok().and_then(|inner| inner.lock.as_ref()?.moving()),
            ));
            is_here = true;
            continue;
        }
        if other.name == placed.name {
            problems.push(problem(
                ProblemCode::NameTaken,
                format!(
                    "host {} already has another VM {}",
                    migrations.context.host.name, other.name
                ),
                format!(
                    "delete VM {} on {}, or move to another host",
                    other.name, migrations.context.host.name
                ),
            ));
            continue;
        }
        if other.places.configuration == placed.places.configuration {
            problems.push(problem(
                ProblemCode::NotEmpty,
                format!(
                    "VM {} on {} has the same folder",
                    other.name, migrations.context.host.name
                ),
                "name another one with --storage-path",
            ));
        }
        for mac in placed.nics.iter().filter_map(|nic| nic.mac) {
            if other.nics.iter().any(|nic| nic.mac == Some(mac)) {
                problems.push(problem(
                    ProblemCode::MacTaken,
                    format!(
                        "VM {} on {} has the MAC address {mac} too",
                        other.name, migrations.context.host.name
                    ),
                    "give one of the two another address",
                ));
            }
        }
    }
    is_here
}

/// A VM of the offered identity is at this host. Nobody is told to delete it:
/// it may be the one that is to live.
fn same_vm(
    migrations: &Migrations,
    other: &VmDefinition,
    migration: Option<(MigrationId, Role)>,
) -> Problem {
    let (name, here) = (&other.name, &migrations.context.host.name);
    match migration {
        Some((id, Role::Destination)) => problem(
            ProblemCode::Busy,
            format!("VM {name} is on its way to {here} already"),
            format!("wait for it with `limosa migration watch {id}`, or cancel that move"),
        ),
        Some((id, Role::Source)) => problem(
            ProblemCode::Busy,
            format!("VM {name} is not yet all gone from {here}, from which it moved"),
            format!("try again in a moment; on {here}, `limosa migration show {id}` tells more"),
        ),
        None => problem(
            ProblemCode::NameTaken,
            format!(
                "host {here} has a VM {name} of the same identity ({})",
                other.uuid.unwrap_or_default()
            ),
            format!(
                "see `limosa vm show {name}` and `limosa migration list` on both hosts: they may \
                 be one VM, of which only one may ever run"
            ),
        ),
    }
}

fn check_switches(
    migrations: &Migrations,
    placed: &VmDefinition,
    problems: &mut Vec<Problem>,
) -> Result<()> {
    let mut switches: Vec<_> = placed.nics.iter().map(|nic| &nic.switch).collect();
    switches.sort();
    switches.dedup();
    for switch in switches {
        if migrations.context.host.store.get::<Switch>(switch.as_str())?.is_none() {
            problems.push(problem(
                ProblemCode::SwitchMissing,
                format!("host {} has no virtual switch {switch}", migrations.context.host.name),
                format!(
                    "make it there with `limosa switch create {switch}`, or name another one with \
                     --switch {switch}=OTHER"
                ),
            ));
        }
    }
    Ok(())
}

fn check_memory(migrations: &Migrations, offer: &Offer, problems: &mut Vec<Problem>) -> Result<()> {
    let memory_free = Memory::read().or_fail("reading /proc/meminfo")?.available_bytes;
    // Guests that are on their way fill theirs only as they come.
    let receiving = migrations.receiving_but(offer.migration);
    let promised: u64 = receiving.iter().map(|incoming| incoming.memory_to_come_bytes()).sum();
    let memory_free = memory_free.saturating_sub(promised);
    let need = offer.definition.memory_bytes() + QEMU_OVERHEAD_BYTES;
    if offer.plan.moves_memory() && need > memory_free {
        problems.push(problem(
            ProblemCode::NoMemory,
            format!(
                "the VM needs {} MiB of memory, {} MiB are free besides what VMs that are moving \
                 in will take",
                need >> 20,
                memory_free >> 20
            ),
            "stop or move other VMs of the destination first",
        ));
    }
    Ok(())
}

fn check_machine(migrations: &Migrations, offer: &Offer, problems: &mut Vec<Problem>) {
    let facts = &migrations.context.host.qemu.facts;
    let definition = &offer.definition;
    problems.extend(check_qemu(
        &migrations.context.host.name,
        facts.version,
        &facts.missing_commands(),
    ));
    let code = &migrations.context.host.qemu.uefi_code;
    if definition.boot.firmware == Firmware::Uefi && !code.is_file() {
        problems.push(problem(
            ProblemCode::FirmwareMissing,
            format!("{} has no UEFI firmware at {}", migrations.context.host.name, code.display()),
            "install the package ovmf there, or set qemu.uefi_code",
        ));
    }
    if facts.resolve_machine(&definition.machine) != Some(definition.machine.as_str()) {
        let (major, minor, micro) = offer.qemu_version;
        problems.push(problem(
            ProblemCode::MachineType,
            format!(
                "QEMU {} of {} does not know the machine type {}; {} has QEMU \
                 {major}.{minor}.{micro}",
                facts.version, migrations.context.host.name, definition.machine, offer.source
            ),
            "upgrade QEMU at the destination, or give the VM an older machine type while it is off",
        ));
    }
    if offer.plan.moves_memory()
        && offer.accelerator != wire_accelerator(migrations.context.host.qemu.accelerator)
    {
        problems.push(problem(
            ProblemCode::Accelerator,
            format!(
                "the VM runs with {} and {} would run it with {} ({})",
                offer.accelerator,
                migrations.context.host.name,
                migrations.context.host.qemu.accelerator,
                migrations.context.host.qemu.accelerator_reason
            ),
            "set qemu.accelerator alike on both hosts, or move the VM while it is off",
        ));
    }
}

fn check_cpu(migrations: &Migrations, offer: &Offer, problems: &mut Vec<Problem>) {
    let facts = &migrations.context.host.qemu.facts;
    let cpu = &offer.definition.cpu;
    let here = facts.cpu_features(cpu);
    let mut missing: Vec<_> =
        offer.cpu_features.iter().filter(|feature| !here.contains(feature)).cloned().collect();
    match facts.lacking_features(cpu) {
        // What the source lacks too, the guest does not have.
        Some(lacking) => missing
            .extend(lacking.iter().filter(|feature| !offer.cpu_lacking.contains(feature)).cloned()),
        None => missing.push(format!("the whole model, unknown to QEMU {}", facts.version)),
    }
    if !missing.is_empty() {
        problems.push(problem(
            ProblemCode::CpuFeatures,
            format!(
                "the CPU of {} lacks what the model {cpu} shows the guest: {}",
                migrations.context.host.name,
                missing.join(", ")
            ),
            "give the VM a CPU model that both hosts have, such as qemu64 or a versioned one",
        ));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Goal: whatever else an offer of another version holds or lacks, it is
    /// told which host is to be upgraded.
    #[test]
    fn an_offer_of_another_version_names_the_older_host() {
        let (source, here) = ("a".parse().unwrap(), "b".parse().unwrap());
        let newer = json!({ "peer_version": PEER_VERSION + 1, "shape": { "unknown": [1, 2] } });
        let told = check_version(&source, &here, &newer).unwrap();
        assert_eq!(told.code, ProblemCode::PeerVersion);
        assert_eq!(told.remedy, "upgrade Limosa on b");
        let older = json!({ "peer_version": PEER_VERSION_MIN - 1 });
        assert_eq!(check_version(&source, &here, &older).unwrap().remedy, "upgrade Limosa on a");
        for unknown in [json!({}), json!([]), json!({ "peer_version": "2" })] {
            assert_eq!(
                check_version(&source, &here, &unknown).unwrap().remedy,
                "upgrade Limosa on b"
            );
        }
        assert_eq!(check_version(&source, &here, &json!({ "peer_version": PEER_VERSION })), None);
    }
}
