//! The source's part: the VM's condition, its files, and what of this host is
//! attached to it.

use std::path::Path;

use limosa_protocol::id::{DiskId, MigrationId, VmName};
use limosa_protocol::migration::{MoveRequest, Problem, ProblemCode};
use limosa_protocol::peer::{FILE_BYTES_MAX, Offer};
use limosa_protocol::plan::{
    DiskCarrier, DiskItem, Location, MemoryCarrier, MemoryItem, MigrationPlan, Policy,
};
use limosa_protocol::version::PEER_VERSION;
use limosa_protocol::vm::{Disk, DiskKind, VmDefinition};
use limosa_qemu::image::{self, ImageFacts};
use limosa_qemu::power::{self, RunState};

use super::problem::{check_qemu, problem};
use crate::migrations::Migrations;
use limosa_host::failure::{Hindrance, Result, chain};
use limosa_host::vm::run_state::stopped_by;
use limosa_host::vm::{Inner, create, files};
use limosa_host::wire_accelerator;

/// Everything at this host that stands against a move, apart from files.
pub(super) async fn check(
    migrations: &Migrations,
    inner: &Inner,
    request: &MoveRequest,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    if request.to == migrations.context.host.name {
        problems.push(problem(
            ProblemCode::SameHost,
            format!("VM {} is on {} already", inner.definition.name, migrations.context.host.name),
            "name another host with --to",
        ));
    }
    problems.extend(check_condition(inner).await);
    let facts = &migrations.context.host.qemu.facts;
    problems.extend(check_qemu(
        &migrations.context.host.name,
        facts.version,
        &facts.missing_commands(),
    ));
    check_request(&inner.definition, request, &mut problems);
    problems
}

/// Whether the VM is in a condition in which it can be moved.
async fn check_condition(inner: &Inner) -> Option<Problem> {
    let of_next_move = || inner.blocks()?.next_move.clone();
    if let Some(Hindrance { message, remedy }) = inner.hindrance().or_else(of_next_move) {
        return Some(problem(ProblemCode::Busy, message, remedy));
    }
    if let Err(failure) = inner.expect_owned() {
        return Some(problem(
            ProblemCode::Busy,
            failure.0.message,
            "move it from the host it is at",
        ));
    }
    if let Some(fault) = &inner.fault {
        return Some(problem(ProblemCode::Busy, fault.clone(), "fix that first"));
    }
    let name = &inner.definition.name;
    match power::query_status(&inner.qemu.as_ref()?.qmp).await {
        Ok(status) => movable(name, status).err(),
        Err(error) => Some(problem(
            ProblemCode::Busy,
            format!("QEMU of VM {name} does not say how it is: {}", chain(&error)),
            format!("if it stays so, turn the VM off with `limosa vm stop --force {name}`"),
        )),
    }
}

/// Whether a guest runs (`true`) or is paused (`false`); a problem when it is in
/// a condition that does not move.
pub(crate) fn movable(vm: &VmName, status: RunState) -> Result<bool, Problem> {
    let (what, remedy) = match status {
        RunState::Running => return Ok(true),
        RunState::Paused | RunState::Prelaunch => return Ok(false),
        RunState::Postmigrate => (
            "was paused while an earlier move of it failed late, and QEMU moves such a guest \
             only once it has run again",
            format!("`limosa vm resume {vm}`, `limosa vm pause {vm}`, then move it"),
        ),
        RunState::IoError => (
            stopped_by(status).unwrap_or_default(),
            format!("free or repair the file system of its images, then `limosa vm resume {vm}`"),
        ),
        RunState::Suspended => ("sleeps", format!("`limosa vm resume {vm}` wakes it")),
        RunState::Inmigrate | RunState::FinishMigrate => {
            ("is between two hosts in QEMU's eyes", "try again in a moment".to_owned())
        }
        RunState::Shutdown => {
            ("has powered off and its QEMU is still there", "try again in a moment".to_owned())
        }
        RunState::InternalError
        | RunState::Watchdog
        | RunState::GuestPanicked
        | RunState::Unknown => (stopped_by(status).unwrap_or_default(), turn_off(vm)),
    };
    Err(problem(ProblemCode::Busy, format!("VM {vm} {what}"), remedy))
}

fn turn_off(vm: &VmName) -> String {
    format!("see its console; turn it off with `limosa vm stop --force {vm}`, then move it")
}

/// What was asked for and the VM does not have.
fn check_request(definition: &VmDefinition, request: &MoveRequest, problems: &mut Vec<Problem>) {
    let name = &definition.name;
    for id in request.disks.keys() {
        if !definition.disks.iter().any(|disk| disk.id == *id) {
            problems.push(problem(
                ProblemCode::BadPath,
                format!("VM {name} has no disk {id}"),
                "give --disk the id of one of its disks",
            ));
        }
    }
    for from in request.switches.keys() {
        if !definition.nics.iter().any(|nic| nic.switch == *from) {
            problems.push(problem(
                ProblemCode::SwitchMissing,
                format!("VM {name} is not plugged into a virtual switch {from}"),
                "give --switch the name of one of its switches, then =, then the other name",
            ));
        }
    }
}

/// Says all that the destination must know of a VM, and which of its files
/// cannot move.
pub(super) async fn describe(
    migrations: &Migrations,
    inner: &Inner,
    request: &MoveRequest,
    migration: MigrationId,
) -> Result<(Offer, Vec<Problem>)> {
    let definition = &inner.definition;
    let mut problems = Vec::new();
    let mut disks = Vec::new();
    for disk in &definition.disks {
        let path = files::image(disk)?;
        let (item, unusable) = plan_disk(migrations, disk, path, request).await;
        problems.extend(unusable);
        disks.push(item);
    }
    let mut small_files = Vec::new();
    for (name, path) in files::small_files(definition)? {
        let size = look_at_file(name, &path).map_err(|problem| problems.push(problem));
        small_files.push((name.to_owned(), size.unwrap_or(0)));
    }
    let facts = &migrations.context.host.qemu.facts;
    let accelerator = inner
        .qemu
        .as_ref()
        .map_or(migrations.context.host.qemu.accelerator, |qemu| qemu.accelerator);
    let offer = Offer {
        peer_version: PEER_VERSION,
        migration,
        source: migrations.context.host.name.clone(),
        epoch: inner.record.epoch,
        definition: definition.clone(),
        plan: MigrationPlan {
            peer: Some(request.to.clone()),
            memory: memory_item(inner),
            disks,
            policy: Policy::of(request),
        },
        storage_path: request.storage_path.clone(),
        switches: request.switches.clone(),
        qemu_version: (facts.version.major, facts.version.minor, facts.version.micro),
        accelerator: wire_accelerator(accelerator),
        cpu_features: facts.cpu_features(&definition.cpu),
        cpu_lacking: facts.lacking_features(&definition.cpu).unwrap_or_default().to_vec(),
        files: small_files,
    };
    Ok((offer, problems))
}

fn memory_item(inner: &Inner) -> MemoryItem {
    let carrier = match inner.qemu {
        Some(_) => MemoryCarrier::PreCopy,
        None => MemoryCarrier::None,
    };
    MemoryItem { bytes: inner.definition.memory_bytes(), carrier }
}

/// A disk as an item of the plan, and why it cannot move if it cannot. A file that cannot be
/// read is planned as an empty one, so that the destination checks the rest.
async fn plan_disk(
    migrations: &Migrations,
    disk: &Disk,
    path: &Path,
    request: &MoveRequest,
) -> (DiskItem, Option<Problem>) {
    let requested = request.disks.get(&disk.id);
    let mut item = DiskItem {
        id: disk.id.clone(),
        source: Location::file(path.to_owned(), disk.format),
        destination: requested.map(|path| Location::file(path.clone(), disk.format)),
        carrier: DiskCarrier::Mirror,
        virtual_bytes: 0,
        allocated_bytes: 0,
    };
    if disk.kind == DiskKind::Cdrom {
        item.carrier = DiskCarrier::None;
        let found = problem(
            ProblemCode::HostAttached,
            format!("the CD-ROM {} shows {}, a file of this host", disk.id, path.display()),
            format!("take {} out of the VM's definition", disk.id),
        );
        return (item, Some(found));
    }
    match look_at_image(migrations, disk, path).await {
        Ok(facts) => {
            item.virtual_bytes = facts.virtual_size;
            item.allocated_bytes = facts.actual_size;
            (item, None)
        }
        Err(found) => {
            if std::fs::metadata(path).is_ok_and(|found| !found.is_file()) {
                item.source = Location::device(path.to_owned(), disk.format);
                item.carrier = DiskCarrier::None;
            }
            (item, Some(found))
        }
    }
}

/// Facts of a disk's image, or why it cannot move.
async fn look_at_image(
    migrations: &Migrations,
    disk: &Disk,
    path: &Path,
) -> Result<ImageFacts, Problem> {
    let shown = path.display();
    let found = std::fs::metadata(path).map_err(|error| {
        problem(
            ProblemCode::FileUnusable,
            format!("the image {shown} of disk {} cannot be used: {error}", disk.id),
            format!("bring it back, or take {} out of the VM's definition", disk.id),
        )
    })?;
    if !found.is_file() {
        return Err(problem(
            ProblemCode::HostAttached,
            format!("disk {} is {shown}, which is not a file but a device of this host", disk.id),
            "move its content into an image file, or detach it",
        ));
    }
    let facts =
        image::image_facts(&migrations.context.host.qemu.img, path, create::format_of(disk.format))
            .await;
    let facts = facts.map_err(|error| {
        problem(
            ProblemCode::FileUnusable,
            format!("disk {}: {}", disk.id, chain(&error)),
            format!("see what is wrong with `qemu-img info -U {shown}`"),
        )
    })?;
    match not_copied_by_mirror(&disk.id, &shown.to_string(), &facts) {
        None => Ok(facts),
        Some(Hindrance { message, remedy }) => {
            Err(problem(ProblemCode::HostAttached, message, remedy))
        }
    }
}

/// What of an image a mirror would not bring across, and what to do about it: it copies
/// what the guest sees and nothing else.
fn not_copied_by_mirror(disk: &DiskId, image: &str, facts: &ImageFacts) -> Option<Hindrance> {
    if let Some(backing) = &facts.backing {
        return Some(Hindrance::new(
            format!("disk {disk} stands on {backing}, which would not move with it"),
            "make the image whole with `qemu-img convert`",
        ));
    }
    let (kept, what, remedy) = match (&facts.snapshots[..], &facts.bitmaps[..]) {
        ([], []) => return None,
        ([], bitmaps) => (bitmaps, "dirty bitmaps", "qemu-img bitmap --remove"),
        (snapshots, _) => (snapshots, "snapshots", "qemu-img snapshot -d"),
    };
    Some(Hindrance::new(
        format!(
            "disk {disk} keeps {what} inside its image ({}), which would not move with it",
            kept.join(", ")
        ),
        format!(
            "with the VM off, save what is needed of them with `qemu-img convert`, then remove \
             them with `{remedy}` from {image}"
        ),
    ))
}

/// Size of a file that moves beside the disks, or why it cannot move.
fn look_at_file(name: &str, path: &Path) -> Result<u64, Problem> {
    let unusable = |why: String| {
        problem(
            ProblemCode::FileUnusable,
            format!("the VM's {name}, {}, {why}", path.display()),
            "put a good one in its place",
        )
    };
    // Opened, because it will have to be read.
    let opened = std::fs::File::open(path).and_then(|file| file.metadata());
    let found = opened.map_err(|error| unusable(format!("cannot be read: {error}")))?;
    if !found.is_file() {
        return Err(unusable("is not a file".to_owned()));
    }
    if found.len() > FILE_BYTES_MAX {
        return Err(unusable(format!(
            "has {} MiB, more than the {} that can move beside disks",
            found.len() >> 20,
            FILE_BYTES_MAX >> 20
        )));
    }
    Ok(found.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm() -> VmName {
        "web1".parse().unwrap()
    }

    /// Goal: an image that holds more than the guest sees does not move without it unasked.
    #[test]
    fn what_a_mirror_leaves_behind_is_told() {
        let whole = ImageFacts {
            virtual_size: 1 << 20,
            actual_size: 0,
            backing: None,
            snapshots: vec![],
            bitmaps: vec![],
        };
        let told = |facts| not_copied_by_mirror(&"root".parse().unwrap(), "/i.qcow2", &facts);
        assert_eq!(told(whole.clone()), None);
        let snapshots = vec!["monday".to_owned(), "tuesday".to_owned()];
        let found = told(ImageFacts { snapshots, ..whole.clone() }).unwrap();
        assert!(found.message.contains("monday, tuesday"), "{found:?}");
        assert!(found.remedy.contains("snapshot -d"), "{found:?}");
        let bitmaps = vec!["backup".to_owned()];
        let found = told(ImageFacts { bitmaps, ..whole.clone() }).unwrap();
        assert!(found.message.contains("backup"), "{found:?}");
        assert!(found.remedy.contains("bitmap --remove"), "{found:?}");
        let backing = Some("/base.qcow2".to_owned());
        assert!(told(ImageFacts { backing, ..whole }).unwrap().message.contains("/base.qcow2"));
    }

    /// Goal: a guest that an error stopped is not taken for a paused one.
    #[test]
    fn only_guests_that_run_or_are_paused_move() {
        assert_eq!(movable(&vm(), RunState::Running), Ok(true));
        for paused in [RunState::Paused, RunState::Prelaunch] {
            assert_eq!(movable(&vm(), paused), Ok(false));
        }
        for bad in [
            RunState::Postmigrate,
            RunState::IoError,
            RunState::Suspended,
            RunState::Inmigrate,
            RunState::FinishMigrate,
            RunState::Shutdown,
            RunState::InternalError,
            RunState::Watchdog,
            RunState::GuestPanicked,
            RunState::Unknown,
        ] {
            let told = movable(&vm(), bad).unwrap_err();
            assert_eq!(told.code, ProblemCode::Busy);
            assert!(told.message.contains("web1") && !told.remedy.is_empty(), "{told:?}");
        }
    }

    #[test]
    fn a_file_beside_the_disks_must_be_readable_and_small() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel");
        let missing = look_at_file("kernel", &path).unwrap_err();
        assert_eq!(missing.code, ProblemCode::FileUnusable);
        assert!(missing.message.contains(&path.display().to_string()), "{missing:?}");
        std::fs::write(&path, "12345").unwrap();
        assert_eq!(look_at_file("kernel", &path), Ok(5));
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(FILE_BYTES_MAX + 1).unwrap();
        assert!(look_at_file("kernel", &path).unwrap_err().message.contains("more than"));
        assert!(look_at_file("kernel", folder.path()).unwrap_err().message.contains("not a file"));
    }

    /// Goal: each wrong option of a request is told, not only the first.
    #[test]
    fn all_wrong_options_are_told() {
        let definition: VmDefinition = toml::from_str(
            "name = 'web1'\nmemory_mib = 64\n[[disks]]\nid = 'root'\n[[nics]]\nswitch = 'lan'",
        )
        .unwrap();
        let request: MoveRequest = serde_json::from_str(
            r#"{"to": "b", "disks": {"root": "/x", "log": "/y"}, "switches": {"wan": "lan"}}"#,
        )
        .unwrap();
        let mut problems = Vec::new();
        check_request(&definition, &request, &mut problems);
        let codes: Vec<_> = problems.iter().map(|problem| problem.code).collect();
        assert_eq!(codes, [ProblemCode::BadPath, ProblemCode::SwitchMissing]);
    }
}
