//! Where a VM's files would lie at the destination: whether each path can be
//! made, is free, has room, and can be reached by QEMU's user.
//!
//! ```text
//! /srv/vms/web1/disks/root.qcow2
//! └──┬───┘└──┬─────────────────┘
//!  ancestor    would be made
//! ```
//!
//! The *ancestor* of a path is the deepest folder of it that exists. Nothing is
//! made to find out.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::process::Stdio;

use limosa_protocol::migration::{Problem, ProblemCode};
use limosa_protocol::peer::Offer;
use limosa_protocol::plan::MigrationPlan;
use limosa_protocol::vm::VmDefinition;
use rustix::fs::Access;

use super::problem::problem;
use crate::migrations::Migrations;
use limosa_host::failure::Result;
use limosa_host::vm::files;
use limosa_qemu::process::User;

/// Room that must stay free on a file system, in bytes.
const DISK_RESERVE_BYTES: u64 = 64 << 20;

/// A folder of the VM and what will come to lie in it.
struct Wanted {
    folder: PathBuf,
    /// Bytes that will be written
    bytes: u64,
    /// The option that would name another place
    option: &'static str,
}

/// What stands against the paths of a placed VM.
pub(super) async fn check(
    migrations: &Migrations,
    placed: &VmDefinition,
    plan: &MigrationPlan,
    offer: &Offer,
    problems: &mut Vec<Problem>,
) -> Result<()> {
    check_form(placed, requested_paths(offer), problems);
    check_roots(migrations, offer, problems);
    check_free(placed, problems)?;
    let mut room = BTreeMap::<u64, Room>::new();
    let mut told = Vec::new();
    let wanted = wanted(placed, plan, offer)?;
    for wanted in wanted.iter().filter(|wanted| is_whole(&wanted.folder)) {
        let found = match nearest_existing_ancestor(&wanted.folder) {
            Ok(ancestor) => usable(migrations, &ancestor).await.map(|room| (ancestor, room)),
            Err(why) => Err(why),
        };
        match found {
            Ok((ancestor, found)) => {
                let room = room.entry(found.device).or_insert(Room { ancestor, ..found });
                room.needed_bytes = room.needed_bytes.saturating_add(wanted.bytes);
            }
            // Several folders of a VM mostly stand on the same ancestor.
            Err(why) if told.contains(&why) => {}
            Err(why) => {
                problems.push(problem(
                    ProblemCode::BadPath,
                    format!(
                        "{} at {}: {why}",
                        wanted.folder.display(),
                        migrations.context.host.name
                    ),
                    format!(
                        "fix that on {}, or name another place with {}",
                        migrations.context.host.name, wanted.option
                    ),
                ));
                told.push(why);
            }
        }
    }
    for (device, bytes) in promised(migrations, offer) {
        if let Some(room) = room.get_mut(&device) {
            room.free_bytes = room.free_bytes.saturating_sub(bytes);
        }
    }
    problems.extend(room.values().filter_map(Room::check));
    Ok(())
}

/// By file system: bytes that VMs which are moving in have yet to write.
fn promised(migrations: &Migrations, offer: &Offer) -> Vec<(u64, u64)> {
    let receiving = migrations.receiving_but(offer.migration);
    let images = receiving.iter().flat_map(|incoming| incoming.images_to_come_bytes());
    let on_device = images.filter_map(|(image, bytes)| {
        let folder = nearest_existing_ancestor(image.parent()?).ok()?;
        Some((std::fs::metadata(folder).ok()?.dev(), bytes))
    });
    on_device.collect()
}

/// Paths that the operator asked for.
fn requested_paths(offer: &Offer) -> impl Iterator<Item = &PathBuf> {
    offer.storage_path.iter().chain(requested_images(offer))
}

fn requested_images(offer: &Offer) -> impl Iterator<Item = &PathBuf> {
    let images = offer.plan.disks.iter().filter_map(|disk| disk.destination.as_ref());
    images.map(|image| &image.path)
}

/// Whether a path is such that one can look at it at all.
fn is_whole(path: &Path) -> bool {
    let climbs = path.components().any(|part| part == Component::ParentDir);
    path.is_absolute() && !climbs && path.file_name().is_some()
}

/// Whether the paths that were asked for lie where other hosts may have files
/// made: a paired host is not to write to any folder of this one.
fn check_roots(migrations: &Migrations, offer: &Offer, problems: &mut Vec<Problem>) {
    let roots = || {
        [&migrations.context.host.folders.state]
            .into_iter()
            .chain(&migrations.context.settings.storage_roots)
    };
    let outside = |path: &&PathBuf| is_whole(path) && !roots().any(|root| path.starts_with(root));
    for path in requested_paths(offer).filter(outside) {
        let list: Vec<String> = roots().map(|root| root.display().to_string()).collect();
        problems.push(problem(
            ProblemCode::BadPath,
            format!(
                "{} takes no VMs at {}, only in {}",
                migrations.context.host.name,
                path.display(),
                list.join(", ")
            ),
            format!(
                "name a place in one of these, or add one to `storage_roots` in section \
                 `migration` of limosad.toml on {} and restart limosad",
                migrations.context.host.name
            ),
        ));
    }
}

/// Paths that were asked for and cannot be meant.
fn check_form<'a>(
    placed: &VmDefinition,
    requested: impl Iterator<Item = &'a PathBuf>,
    problems: &mut Vec<Problem>,
) {
    for path in requested {
        if !is_whole(path) {
            problems.push(problem(
                ProblemCode::BadPath,
                format!("{} is not an absolute path without '..'", path.display()),
                "give the whole path at the destination",
            ));
        }
    }
    let images: Vec<&PathBuf> = placed.disks.iter().filter_map(|disk| disk.path.as_ref()).collect();
    for (at, path) in images.iter().enumerate() {
        if images[..at].contains(path) {
            problems.push(problem(
                ProblemCode::BadPath,
                format!("two disks would be {}", path.display()),
                "give each a path of its own with --disk",
            ));
        }
    }
}

/// Whether nothing lies there yet.
fn check_free(placed: &VmDefinition, problems: &mut Vec<Problem>) -> Result<()> {
    let folder = files::place(&placed.places.configuration, "configuration")?;
    // A folder that cannot be read is told with its ancestor.
    if is_whole(folder) && matches!(files::is_free(folder), Ok(false)) {
        problems.push(problem(
            ProblemCode::NotEmpty,
            format!("the folder {} at the destination is not empty", folder.display()),
            "empty it, or name another one with --storage-path",
        ));
    }
    let images = placed.disks.iter().filter_map(|disk| disk.path.as_ref());
    for path in images.filter(|path| is_whole(path)) {
        // A link counts as well, even to nothing.
        if std::fs::symlink_metadata(path).is_ok() {
            problems.push(problem(
                ProblemCode::NotEmpty,
                format!("{} exists at the destination", path.display()),
                "remove it there, or name another path with --disk",
            ));
        }
    }
    Ok(())
}

/// The folders of a VM and what each will hold.
fn wanted(placed: &VmDefinition, plan: &MigrationPlan, offer: &Offer) -> Result<Vec<Wanted>> {
    let folder = files::place(&placed.places.configuration, "configuration")?;
    let beside = offer.files.iter().fold(0, |sum: u64, (_, bytes)| sum.saturating_add(*bytes));
    let mut all =
        vec![Wanted { folder: folder.to_owned(), bytes: beside, option: "--storage-path" }];
    for (image, disk) in plan.images_to_make() {
        let is_requested = requested_images(offer).any(|path| *path == image.path);
        all.push(Wanted {
            folder: image.path.parent().unwrap_or(&image.path).to_owned(),
            bytes: disk.allocated_bytes.min(disk.virtual_bytes),
            option: if is_requested { "--disk" } else { "--storage-path" },
        });
    }
    Ok(all)
}

/// The deepest folder of a path that exists, or why nothing can be made there.
fn nearest_existing_ancestor(path: &Path) -> Result<PathBuf, String> {
    let mut at = path;
    loop {
        let missing = match std::fs::metadata(at) {
            Ok(found) if found.is_dir() => return Ok(at.to_owned()),
            Ok(_) => return Err(format!("{} is not a folder", at.display())),
            Err(error) => error,
        };
        match missing.kind() {
            io::ErrorKind::NotFound if std::fs::symlink_metadata(at).is_ok() => {
                return Err(format!("{} is a link to nothing", at.display()));
            }
            // What is in the way is found further up.
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {}
            _ => return Err(format!("{}: {missing}", at.display())),
        }
        at = at.parent().ok_or_else(|| format!("{}: {missing}", at.display()))?;
    }
}

/// A file system in which something will lie.
struct Room {
    ancestor: PathBuf,
    device: u64,
    free_bytes: u64,
    needed_bytes: u64,
}

impl Room {
    fn check(&self) -> Option<Problem> {
        let needed = self.needed_bytes.saturating_add(DISK_RESERVE_BYTES);
        (needed > self.free_bytes).then(|| {
            problem(
                ProblemCode::NoSpace,
                format!(
                    "the VM needs {} MiB at {}, with {} MiB to stay free, and {} MiB are free \
                     besides what VMs that are moving in will take",
                    self.needed_bytes >> 20,
                    self.ancestor.display(),
                    DISK_RESERVE_BYTES >> 20,
                    self.free_bytes >> 20
                ),
                "free space there, or name another place with --storage-path or --disk",
            )
        })
    }
}

/// Whether folders and files can be made in a ancestor and reached by QEMU; how
/// much room there is.
async fn usable(migrations: &Migrations, ancestor: &Path) -> Result<Room, String> {
    let shown = ancestor.display();
    let at = |error: io::Error| format!("{shown}: {error}");
    rustix::fs::access(ancestor, Access::WRITE_OK | Access::EXEC_OK).map_err(
        |error| match error {
            rustix::io::Errno::ROFS => format!("{shown} lies on a read-only file system"),
            _ => format!("limosad may make nothing in {shown}: {error}"),
        },
    )?;
    let user = migrations.context.host.qemu.user.as_ref();
    if let Some(closed) = first_closed(user, ancestor).await.map_err(at)? {
        return Err(format!(
            "QEMU's user may not pass through the folder {} (`chmod a+x`, or set qemu.user)",
            closed.display()
        ));
    }
    let found = rustix::fs::statvfs(ancestor).map_err(|error| at(error.into()))?;
    let device = std::fs::metadata(ancestor).map_err(at)?.dev();
    let free_bytes = found.f_bavail.saturating_mul(found.f_frsize);
    Ok(Room { ancestor: ancestor.to_owned(), device, free_bytes, needed_bytes: 0 })
}

/// The first folder on the way that QEMU's user may not pass through.
async fn first_closed(user: Option<&User>, ancestor: &Path) -> io::Result<Option<PathBuf>> {
    if may_pass(user, ancestor).await? {
        return Ok(None);
    }
    let mut way: Vec<&Path> = ancestor.ancestors().collect();
    way.reverse();
    for folder in way {
        if !may_pass(user, folder).await? {
            return Ok(Some(folder.to_owned()));
        }
    }
    // It was opened between the two looks.
    Ok(None)
}

/// Whether QEMU's user may pass through a folder and all above it.
///
/// The kernel is asked, by a process of that user: modes alone would miss access
/// control lists.
async fn may_pass(user: Option<&User>, folder: &Path) -> io::Result<bool> {
    let mut test = tokio::process::Command::new("test");
    test.arg("-x").arg(folder).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if let Some(user) = user {
        test.uid(user.uid).gid(user.gid);
    }
    Ok(test.status().await?.success())
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// Goal: what is in the way of a path is named, and nothing is skipped.
    #[test]
    fn the_ground_of_a_path_is_found_or_what_is_in_its_way() {
        let folder = tempfile::tempdir().unwrap();
        let at = |path: &str| folder.path().join(path);
        assert_eq!(nearest_existing_ancestor(&at("a/b/c")), Ok(folder.path().to_owned()));
        std::fs::create_dir(at("a")).unwrap();
        assert_eq!(nearest_existing_ancestor(&at("a/b/c")), Ok(at("a")));
        std::fs::write(at("file"), "").unwrap();
        for path in ["file", "file/b/c"] {
            let why = nearest_existing_ancestor(&at(path)).unwrap_err();
            assert_eq!(why, format!("{} is not a folder", at("file").display()));
        }
        std::os::unix::fs::symlink("nowhere", at("link")).unwrap();
        assert!(nearest_existing_ancestor(&at("link/b")).unwrap_err().contains("link to nothing"));
        let long = "x".repeat(300);
        assert!(nearest_existing_ancestor(&at(&long)).unwrap_err().contains("too long"));
    }

    /// Goal: a folder through which QEMU could not go is found before the move.
    /// Method: as root with a user of its own, else as ourselves.
    #[tokio::test]
    async fn a_closed_folder_on_the_way_is_named() {
        let user = rustix::process::geteuid().is_root().then_some(User {
            uid: 65534,
            gid: 65534,
            groups: Vec::new(),
        });
        let folder = tempfile::tempdir().unwrap();
        let mode = |path: &Path, mode| std::fs::set_permissions(path, Permissions::from_mode(mode));
        mode(folder.path(), 0o711).unwrap();
        let (closed, inner) = (folder.path().join("closed"), folder.path().join("closed/inner"));
        std::fs::create_dir_all(&inner).unwrap();
        mode(&closed, 0o711).unwrap();
        assert_eq!(first_closed(user.as_ref(), &inner).await.unwrap(), None);
        mode(&closed, 0o600).unwrap();
        let found = first_closed(user.as_ref(), &inner).await.unwrap();
        mode(&closed, 0o700).unwrap();
        assert_eq!(found, Some(closed));
    }

    #[test]
    fn paths_of_the_wrong_form_are_told() {
        let mut placed: VmDefinition = toml::from_str(
            "name = 'web1'\nmemory_mib = 64\n[[disks]]\nid = 'a'\npath = '/x/same'\n\
             [[disks]]\nid = 'b'\npath = '/x/same'\n[places]\nconfiguration = '/x/web1'",
        )
        .unwrap();
        let check = |placed: &VmDefinition, path: &str| {
            let mut problems = Vec::new();
            check_form(placed, [&PathBuf::from(path)].into_iter(), &mut problems);
            problems
        };
        let problems = check(&placed, "/x/same");
        assert_eq!(problems.len(), 1, "{problems:?}");
        placed.disks[1].path = Some("/x/other".into());
        for (path, count) in [("relative", 1), ("/x/../y", 1), ("/", 1), ("/x/other", 0)] {
            let problems = check(&placed, path);
            assert_eq!(problems.len(), count, "{path}: {problems:?}");
        }
    }

    #[test]
    fn room_is_counted_with_its_reserve() {
        let room = |needed_bytes| Room {
            ancestor: "/srv".into(),
            device: 1,
            free_bytes: 1 << 30,
            needed_bytes,
        };
        assert_eq!(room((1 << 30) - DISK_RESERVE_BYTES).check(), None);
        let told = room((1 << 30) - DISK_RESERVE_BYTES + 1).check().unwrap();
        assert_eq!(told.code, ProblemCode::NoSpace);
        assert!(room(u64::MAX).check().is_some());
    }
}
