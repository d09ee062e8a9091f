//! What stands against a move: everything at once, before anything is touched.
//!
//! The source looks at the VM and at what of its own host is attached, then the
//! destination looks at itself ([`check_offer`]); both lists are one answer.

use std::path::PathBuf;
use std::sync::Arc;

use limosa_protocol::api::Switch;
use limosa_protocol::id::MigrationId;
use limosa_protocol::migration::{MoveRequest, Problem, ProblemCode};
use limosa_protocol::peer::{DiskFacts, Offer, OfferAnswer};
use limosa_protocol::version::{PEER_VERSION, PEER_VERSION_MIN};
use limosa_protocol::vm::{DiskKind, Firmware, VmDefinition};
use limosa_qemu::image;
use uuid::Uuid;

use crate::agent::Agent;
use crate::failure::{Failure, OrFail, Outcome};
use crate::peer_link::{PeerError, PeerLink};
use crate::vm::{Inner, Vm, create, files};

/// Room that must stay free on the destination's disk, in bytes.
const DISK_RESERVE_BYTES: u64 = 64 << 20;
/// Memory that a VM's QEMU needs besides guest RAM, in bytes.
const QEMU_OVERHEAD_BYTES: u64 = 128 << 20;
/// Oldest QEMU that Limosa drives.
const QEMU_MAJOR_MIN: u32 = 7;

pub(crate) fn problem(
    code: ProblemCode,
    message: impl Into<String>,
    mend: impl Into<String>,
) -> Problem {
    Problem { code, message: message.into(), mend: mend.into() }
}

/// Compares a VM with a destination.
pub(crate) async fn compare(
    agent: &Arc<Agent>,
    vm: &Arc<Vm>,
    request: &MoveRequest,
) -> Outcome<Vec<Problem>> {
    let inner = vm.lock().await;
    let mut problems = check_source(agent, &inner, request).await;
    if request.to == agent.name {
        return Ok(problems);
    }
    let link = match PeerLink::new(agent, &request.to) {
        Ok(link) => link,
        Err(failure) => {
            problems.push(problem(
                ProblemCode::NotPaired,
                failure.0.message,
                format!("pair this host with {}", request.to),
            ));
            return Ok(problems);
        }
    };
    let offer = match make_offer(agent, &inner, request, MigrationId(Uuid::now_v7())).await {
        Ok(offer) => offer,
        // What stands in the way of an offer is among the problems already.
        Err(_) if !problems.is_empty() => return Ok(problems),
        Err(failure) => return Err(failure),
    };
    drop(inner);
    match link.post::<_, OfferAnswer>("/peer/v1/compare", &offer).await {
        Ok(answer) => problems.extend(answer.problems),
        Err(error) => problems.push(unreachable(&request.to, &error)),
    }
    Ok(problems)
}

fn unreachable(to: &limosa_protocol::id::HostName, error: &PeerError) -> Problem {
    problem(
        ProblemCode::Unreachable,
        format!("host {to} gave no answer: {error}"),
        format!(
            "see that limosad runs on {to} and its port is open; if {to} was set up anew, unpair \
             and pair again"
        ),
    )
}

async fn check_source(agent: &Agent, inner: &Inner, request: &MoveRequest) -> Vec<Problem> {
    let definition = &inner.definition;
    let mut problems = Vec::new();
    if request.to == agent.name {
        problems.push(problem(
            ProblemCode::SameHost,
            format!("VM {} is on {} already", definition.name, agent.name),
            "name another host with --to",
        ));
    }
    if let Some(fault) = &inner.fault {
        problems.push(problem(ProblemCode::Busy, fault.clone(), "mend that first"));
    }
    for disk in &definition.disks {
        let path = disk.path.clone().unwrap_or_default();
        let shown = path.display();
        if disk.kind == DiskKind::Cdrom {
            problems.push(problem(
                ProblemCode::HostAttached,
                format!("the CD-ROM {} shows {shown}, a file of this host", disk.id),
                format!("take {} out of the VM's definition", disk.id),
            ));
        } else if !path.is_file() {
            problems.push(problem(
                ProblemCode::HostAttached,
                format!("disk {} is {shown}, which is a device of this host or missing", disk.id),
                "move its content into an image file, or detach it",
            ));
        } else if let Some(backing) = backing_of(agent, disk).await {
            problems.push(problem(
                ProblemCode::HostAttached,
                format!("disk {} stands on {backing}, which would not move with it", disk.id),
                "make the image whole with `qemu-img convert`",
            ));
        }
    }
    for id in request.disks.keys() {
        if !definition.disks.iter().any(|disk| disk.id == *id) {
            problems.push(problem(
                ProblemCode::BadPath,
                format!("VM {} has no disk {id}", definition.name),
                "give --disk the id of one of its disks",
            ));
        }
    }
    for from in request.switches.keys() {
        if !definition.nics.iter().any(|nic| nic.switch == *from) {
            problems.push(problem(
                ProblemCode::SwitchMissing,
                format!("VM {} is not plugged into a virtual switch {from}", definition.name),
                "give --switch the name of one of its switches, then =, then the other name",
            ));
        }
    }
    problems
}

async fn backing_of(agent: &Agent, disk: &limosa_protocol::vm::Disk) -> Option<String> {
    let facts =
        image::image_facts(&agent.qemu.img, disk.path.as_deref()?, create::format_of(disk.format));
    facts.await.ok()?.backing
}

/// Says all that the destination must know of a VM.
pub(crate) async fn make_offer(
    agent: &Agent,
    inner: &Inner,
    request: &MoveRequest,
    migration: MigrationId,
) -> Outcome<Offer> {
    let definition = &inner.definition;
    let mut disks = Vec::new();
    for disk in definition.disks.iter().filter(|disk| disk.kind == DiskKind::Disk) {
        let path = files::image(disk)?;
        let facts = image::image_facts(&agent.qemu.img, path, create::format_of(disk.format))
            .await
            .or_fail(&format!("looking at {}", path.display()))?;
        disks.push(DiskFacts {
            virtual_bytes: facts.virtual_size,
            allocated_bytes: facts.actual_size,
        });
    }
    let mut small_files = Vec::new();
    for (name, path) in files::small_files(definition)? {
        let found = std::fs::metadata(&path).or_fail(&format!("looking at {}", path.display()))?;
        small_files.push((name.to_owned(), found.len()));
    }
    let version = agent.qemu.facts.version;
    Ok(Offer {
        peer_version: PEER_VERSION,
        migration,
        source: agent.name.clone(),
        epoch: inner.record.epoch,
        definition: definition.clone(),
        request: request.clone(),
        running: inner.qemu.is_some(),
        qemu_version: (version.major, version.minor, version.micro),
        accelerator: inner
            .qemu
            .as_ref()
            .map_or(agent.qemu.accelerator, |qemu| qemu.accelerator)
            .to_string(),
        cpu_features: agent.qemu.facts.cpu_features(&definition.cpu),
        cpu_lacking: agent
            .qemu
            .facts
            .lacking_features(&definition.cpu)
            .unwrap_or_default()
            .to_vec(),
        disks,
        files: small_files,
    })
}

/// The VM as it will be at the destination.
pub(crate) fn place_offer(agent: &Agent, offer: &Offer) -> VmDefinition {
    let mut definition = offer.definition.clone();
    let folder = offer
        .request
        .storage_path
        .clone()
        .unwrap_or_else(|| files::usual_folder(agent, &definition.name));
    definition.places = files::places_in(&folder);
    for (path, name) in [
        (&mut definition.boot.kernel, files::KERNEL_FILE),
        (&mut definition.boot.initrd, files::INITRD_FILE),
    ] {
        if let Some(path) = path {
            *path = folder.join(name);
        }
    }
    for disk in &mut definition.disks {
        let usual = || files::usual_image(&folder.join("disks"), disk.id.as_str(), disk.format);
        disk.path = Some(offer.request.disks.get(&disk.id).cloned().unwrap_or_else(usual));
    }
    for nic in &mut definition.nics {
        if let Some(renamed) = offer.request.switches.get(&nic.switch) {
            nic.switch = renamed.clone();
        }
    }
    definition
}

/// Everything at this host that stands against an offer. Touches nothing.
pub(crate) async fn check_offer(agent: &Agent, offer: &Offer) -> Outcome<Vec<Problem>> {
    if !(PEER_VERSION_MIN..=PEER_VERSION).contains(&offer.peer_version) {
        return Ok(vec![problem(
            ProblemCode::PeerVersion,
            format!(
                "{} speaks version {} between hosts, {} speaks {PEER_VERSION_MIN} to {PEER_VERSION}",
                offer.source, offer.peer_version, agent.name
            ),
            "upgrade the older of the two agents",
        )]);
    }
    offer
        .definition
        .check()
        .map_err(|error| Failure::bad_request(format!("the offered definition: {error}")))?;
    let disk_count =
        offer.definition.disks.iter().filter(|disk| disk.kind == DiskKind::Disk).count();
    if offer.disks.len() != disk_count {
        return Err(Failure::bad_request("the offer does not describe each of its disks"));
    }
    let placed = place_offer(agent, offer);
    let mut problems = Vec::new();
    if disk_count != placed.disks.len() {
        problems.push(problem(
            ProblemCode::HostAttached,
            "a file of the source host is attached as a CD-ROM",
            "take it out of the VM's definition",
        ));
    }
    check_names(agent, &placed, &mut problems).await;
    check_switches(agent, &placed, &mut problems)?;
    check_paths(&placed, offer, &mut problems);
    check_space(&placed, offer, &mut problems)?;
    check_machine(agent, offer, &mut problems)?;
    Ok(problems)
}

async fn check_names(agent: &Agent, placed: &VmDefinition, problems: &mut Vec<Problem>) {
    for vm in agent.vms() {
        let other = vm.lock().await.definition.clone();
        if other.name == placed.name || other.uuid == placed.uuid {
            problems.push(problem(
                ProblemCode::NameTaken,
                format!(
                    "host {} already has a VM {} ({})",
                    agent.name,
                    other.name,
                    other.uuid.unwrap_or_default()
                ),
                format!("delete VM {} on {}, or move to another host", other.name, agent.name),
            ));
            continue;
        }
        for mac in placed.nics.iter().filter_map(|nic| nic.mac) {
            if other.nics.iter().any(|nic| nic.mac == Some(mac)) {
                problems.push(problem(
                    ProblemCode::MacTaken,
                    format!("VM {} on {} has the MAC address {mac} too", other.name, agent.name),
                    "give one of the two another address",
                ));
            }
        }
    }
}

fn check_switches(
    agent: &Agent,
    placed: &VmDefinition,
    problems: &mut Vec<Problem>,
) -> Outcome<()> {
    for nic in &placed.nics {
        if agent.store.get::<Switch>(nic.switch.as_str())?.is_none() {
            problems.push(problem(
                ProblemCode::SwitchMissing,
                format!("host {} has no virtual switch {}", agent.name, nic.switch),
                format!(
                    "make it there with `limosa switch create {0}`, or name another one with \
                     --switch {0}=OTHER",
                    nic.switch
                ),
            ));
        }
    }
    Ok(())
}

fn check_paths(placed: &VmDefinition, offer: &Offer, problems: &mut Vec<Problem>) {
    if let Some(folder) = &placed.places.configuration {
        match files::is_free(folder) {
            Ok(true) => {}
            Ok(false) => problems.push(problem(
                ProblemCode::NotEmpty,
                format!("the folder {} at the destination is not empty", folder.display()),
                "empty it, or name another one with --storage-path",
            )),
            Err(error) => problems.push(problem(
                ProblemCode::BadPath,
                format!("the folder {} at the destination: {error}", folder.display()),
                "name another one with --storage-path",
            )),
        }
    }
    for path in placed.disks.iter().filter_map(|disk| disk.path.as_ref()) {
        if path.exists() {
            problems.push(problem(
                ProblemCode::NotEmpty,
                format!("{} exists at the destination", path.display()),
                "remove it there, or name another path with --disk",
            ));
        }
    }
    let storage = offer.request.storage_path.iter();
    let all: Vec<&PathBuf> = storage.chain(offer.request.disks.values()).collect();
    for path in all {
        let climbs = path.components().any(|part| part == std::path::Component::ParentDir);
        if !path.is_absolute() || climbs {
            problems.push(problem(
                ProblemCode::BadPath,
                format!("{} is not an absolute path without '..'", path.display()),
                "give the whole path at the destination",
            ));
        }
    }
}

fn check_space(placed: &VmDefinition, offer: &Offer, problems: &mut Vec<Problem>) -> Outcome<()> {
    // Disks of one file system need their room together.
    let mut needs = std::collections::BTreeMap::<u64, (u64, u64, PathBuf)>::new();
    let disks = placed.disks.iter().filter(|disk| disk.kind == DiskKind::Disk);
    for (disk, facts) in disks.zip(&offer.disks) {
        let path = files::image(disk)?;
        let Ok((device, free)) = files::file_system(path) else { continue };
        let need = needs.entry(device).or_insert((0, free, path.to_owned()));
        need.0 = need.0.saturating_add(facts.allocated_bytes.min(facts.virtual_bytes));
    }
    for (need, free, path) in needs.into_values() {
        if need.saturating_add(DISK_RESERVE_BYTES) > free {
            problems.push(problem(
                ProblemCode::NoSpace,
                format!(
                    "the disks need {} MiB at {}, where {} MiB are free",
                    need >> 20,
                    path.display(),
                    free >> 20
                ),
                "free space there, or name another place with --storage-path or --disk",
            ));
        }
    }
    let (_, memory_free) = crate::api::memory().or_fail("reading /proc/meminfo")?;
    let need = offer.definition.memory_bytes() + QEMU_OVERHEAD_BYTES;
    if offer.running && need > memory_free {
        problems.push(problem(
            ProblemCode::NoMemory,
            format!(
                "the VM needs {} MiB of memory, {} MiB are free",
                need >> 20,
                memory_free >> 20
            ),
            "stop or move other VMs of the destination first",
        ));
    }
    Ok(())
}

fn check_machine(agent: &Agent, offer: &Offer, problems: &mut Vec<Problem>) -> Outcome<()> {
    let facts = &agent.qemu.facts;
    let definition = &offer.definition;
    if facts.version.major < QEMU_MAJOR_MIN || offer.qemu_version.0 < QEMU_MAJOR_MIN {
        problems.push(problem(
            ProblemCode::QemuVersion,
            format!(
                "QEMU is {}.{}.{} at the source and {} at the destination",
                offer.qemu_version.0, offer.qemu_version.1, offer.qemu_version.2, facts.version
            ),
            format!("upgrade the older one to {QEMU_MAJOR_MIN}.0 or later"),
        ));
    }
    let code = &agent.config.qemu.uefi_code;
    if definition.boot.firmware == Firmware::Uefi && !code.is_file() {
        problems.push(problem(
            ProblemCode::FirmwareMissing,
            format!("{} has no UEFI firmware at {}", agent.name, code.display()),
            "install the package ovmf there, or set qemu.uefi_code",
        ));
    }
    if facts.resolve_machine(&definition.machine) != Some(definition.machine.as_str()) {
        problems.push(problem(
            ProblemCode::MachineType,
            format!(
                "QEMU {} of {} does not know the machine type {}",
                facts.version, agent.name, definition.machine
            ),
            "upgrade QEMU at the destination, or give the VM an older machine type while it is off",
        ));
    }
    if offer.running && offer.accelerator != agent.qemu.accelerator.to_string() {
        problems.push(problem(
            ProblemCode::Accelerator,
            format!(
                "the VM runs with {} and {} would run it with {} ({})",
                offer.accelerator,
                agent.name,
                agent.qemu.accelerator,
                agent.qemu.accelerator_reason
            ),
            "set qemu.accelerator alike on both hosts, or move the VM while it is off",
        ));
    }
    let here = facts.cpu_features(&definition.cpu);
    let mut missing: Vec<_> =
        offer.cpu_features.iter().filter(|feature| !here.contains(feature)).cloned().collect();
    match facts.lacking_features(&definition.cpu) {
        // What the source lacks too, the guest does not have.
        Some(lacking) => missing
            .extend(lacking.iter().filter(|feature| !offer.cpu_lacking.contains(feature)).cloned()),
        None => missing.push(format!("the whole model, unknown to QEMU {}", facts.version)),
    }
    if !missing.is_empty() {
        problems.push(problem(
            ProblemCode::CpuFeatures,
            format!(
                "the CPU of {} lacks what the model {} shows the guest: {}",
                agent.name,
                definition.cpu,
                missing.join(", ")
            ),
            "give the VM a CPU model that both hosts have, such as qemu64 or a versioned one",
        ));
    }
    Ok(())
}
