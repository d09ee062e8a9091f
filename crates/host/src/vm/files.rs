//! A VM's files: its four places, its images, its kernel.
//!
//! **Invariant.** Only what a VM's definition names, or what lies in the places
//! that were made for it, is ever removed.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use limosa_protocol::vm::{Disk, Firmware, Places, VmDefinition};

use crate::Folders;
use crate::failure::{Failure, OrFail, Result};
use limosa_faults::{self as faults, Edge, Kind};

/// Name of the kernel in a configuration folder.
pub const KERNEL_FILE: &str = "kernel";
/// Name of the initial RAM disk in a configuration folder.
pub const INITRD_FILE: &str = "initrd";

/// Name of UEFI's variables in a configuration folder.
pub const UEFI_VARIABLES_FILE: &str = "uefi-variables.fd";

/// Where the variables of a VM with UEFI lie.
pub fn uefi_variables(definition: &VmDefinition) -> Result<Option<PathBuf>> {
    match definition.boot.firmware {
        Firmware::Bios => Ok(None),
        Firmware::Uefi => {
            let folder = place(&definition.places.configuration, "configuration")?;
            Ok(Some(folder.join(UEFI_VARIABLES_FILE)))
        }
    }
}

/// The small files that move with a VM beside its disks, each with its name in
/// the configuration folder.
pub fn small_files(definition: &VmDefinition) -> Result<Vec<(&'static str, PathBuf)>> {
    let boot = &definition.boot;
    let all = [
        (KERNEL_FILE, boot.kernel.clone()),
        (INITRD_FILE, boot.initrd.clone()),
        (UEFI_VARIABLES_FILE, uefi_variables(definition)?),
    ];
    Ok(all.into_iter().filter_map(|(name, path)| Some((name, path?))).collect())
}

/// The four places of a VM whose files all lie in one folder.
pub fn places_in(folder: &Path) -> Places {
    Places {
        configuration: Some(folder.to_owned()),
        disks: Some(folder.join("disks")),
        checkpoints: Some(folder.join("checkpoints")),
        smart_paging: Some(folder.join("smart-paging")),
    }
}

/// Fills in the places that a definition leaves open.
pub fn fill_places(folders: &Folders, definition: &mut VmDefinition) {
    let usual = places_in(&folders.files_of(&definition.name));
    let places = &mut definition.places;
    places.configuration = places.configuration.take().or(usual.configuration);
    places.disks = places.disks.take().or(usual.disks);
    places.checkpoints = places.checkpoints.take().or(usual.checkpoints);
    places.smart_paging = places.smart_paging.take().or(usual.smart_paging);
    if let Some(folder) = places.disks.clone() {
        for disk in &mut definition.disks {
            disk.path.get_or_insert_with(|| usual_image(&folder, disk.id.as_str(), disk.format));
        }
    }
}

/// Where a disk's image lies unless it is said otherwise.
pub fn usual_image(folder: &Path, id: &str, format: limosa_protocol::vm::DiskFormat) -> PathBuf {
    folder.join(format!("{id}.{}", format.as_str()))
}

/// A place of a definition that [`fill_places`] has completed.
pub fn place<'a>(place: &'a Option<PathBuf>, what: &str) -> Result<&'a Path> {
    place
        .as_deref()
        .ok_or_else(|| Failure::internal(format!("the definition names no {what} folder")))
}

/// A disk's image; there in every definition that [`fill_places`] completed.
pub fn image(disk: &Disk) -> Result<&Path> {
    disk.path
        .as_deref()
        .ok_or_else(|| Failure::internal(format!("the definition names no image of {}", disk.id)))
}

/// Makes a place with its parents; QEMU's user can reach files in it but list
/// nothing. Notes in `made` what was not there before.
pub fn make_place(folder: &Path, made: &mut Vec<PathBuf>) -> io::Result<()> {
    let mut missing = Vec::new();
    let mut at = Some(folder);
    while let Some(folder) = at.filter(|folder| !folder.exists()) {
        missing.push(folder.to_owned());
        at = folder.parent();
    }
    for folder in missing.into_iter().rev() {
        std::fs::create_dir(&folder)?;
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o711))?;
        made.push(folder);
    }
    Ok(())
}

/// Makes all four places of a VM, noting in `made` what was not there before.
pub fn make_places(places: &Places, made: &mut Vec<PathBuf>) -> Result<()> {
    for (what, folder) in places.each() {
        if let Some(folder) = folder {
            make_place(folder, made).or_fail(&format!("making {} for {what}", folder.display()))?;
        }
    }
    Ok(())
}

/// Makes it durable which files are in a folder.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    std::fs::File::open(folder)?.sync_all()
}

/// Makes it durable that files and folders are there which were just made. A record
/// that names them is written after that only.
pub fn sync_parents(made: &[PathBuf]) -> Result<()> {
    let folders: BTreeSet<&Path> = made.iter().filter_map(|path| path.parent()).collect();
    for folder in folders {
        sync_folder(folder).or_fail(&format!("syncing the folder {}", folder.display()))?;
    }
    Ok(())
}

/// Copies a file and syncs it.
pub fn copy(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::copy(from, to)?;
    std::fs::set_permissions(to, std::fs::Permissions::from_mode(0o644))?;
    std::fs::File::open(to)?.sync_all()
}

/// Removes what was made, newest first; folders only when they are empty: one
/// that holds what others put there stays.
///
/// Returns what could not be removed, with the reason.
pub fn remove_made(made: &[PathBuf]) -> Vec<String> {
    faults::reach_blocking(Kind::Host, "remove", Edge::Before);
    let mut left = Vec::new();
    for path in made.iter().rev() {
        let removed = match std::fs::symlink_metadata(path) {
            Ok(found) if found.is_dir() => std::fs::remove_dir(path),
            Ok(_) => std::fs::remove_file(path),
            Err(error) => Err(error),
        };
        if let Err(error) = removed
            && !matches!(
                error.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::DirectoryNotEmpty
                    // It is a mount point.
                    | io::ErrorKind::ResourceBusy
            )
        {
            left.push(format!("{}: {error}", path.display()));
        }
    }
    faults::reach_blocking(Kind::Host, "remove", Edge::After);
    left
}

/// Everything of a VM on the disk, in an order in which [`remove_made`] can
/// remove it: folders before what is in them.
///
/// - `images`: the disk images that are to go.
pub fn everything(
    folders: &Folders,
    definition: &VmDefinition,
    images: impl IntoIterator<Item = PathBuf>,
) -> Vec<PathBuf> {
    let mut all = Vec::new();
    let configuration = definition.places.configuration.clone();
    let usual = folders.files_of(&definition.name);
    all.extend(own_places(definition, &usual));
    all.extend(
        definition
            .boot
            .kernel
            .iter()
            .chain(&definition.boot.initrd)
            .filter(|file| {
                // A kernel elsewhere was not copied by us.
                configuration.as_deref().is_some_and(|folder| file.starts_with(folder))
            })
            .cloned(),
    );
    if let Some(folder) = &configuration {
        all.push(folder.join("vm.toml"));
        all.push(folder.join("qemu.log"));
        all.push(folder.join(UEFI_VARIABLES_FILE));
    }
    all.extend(images.into_iter().filter(|image| image.is_file()));
    all
}

/// The folders that are the VM's alone: its configuration and usual folder, its
/// places in them, and places that have its name. Any other one may be shared.
fn own_places(definition: &VmDefinition, usual: &Path) -> Vec<PathBuf> {
    let configuration = definition.places.configuration.as_deref();
    let is_own = |place: &&Path| {
        configuration.is_some_and(|folder| place.starts_with(folder))
            || place.starts_with(usual)
            || place.file_name().is_some_and(|last| last == definition.name.as_str())
    };
    let places = definition.places.each().filter_map(|(_, place)| place);
    let mut own: Vec<_> = places.filter(is_own).map(Path::to_owned).collect();
    own.push(usual.to_owned());
    // A folder sorts before what is in it.
    own.sort();
    own.dedup();
    own
}

/// Whether a folder is missing or holds nothing.
pub fn is_free(folder: &Path) -> io::Result<bool> {
    match std::fs::read_dir(folder) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: what a VM did not make is never removed with it.
    #[test]
    fn only_what_was_made_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("a/b");
        let mut made = Vec::new();
        make_place(&place, &mut made).unwrap();
        assert_eq!(made, [folder.path().join("a"), place.clone()]);
        let own = place.join("own");
        std::fs::write(&own, "x").unwrap();
        made.push(own);
        std::fs::write(folder.path().join("a/stranger"), "y").unwrap();
        assert_eq!(remove_made(&made), Vec::<String>::new());
        assert!(!place.exists() && folder.path().join("a/stranger").exists());
    }

    /// Goal: a folder that VMs share is not taken away with one of them.
    #[test]
    fn only_the_vms_own_places_are_its_to_remove() {
        let definition: VmDefinition = toml::from_str(
            "name = 'web1'\nmemory_mib = 64\n[places]\nconfiguration = '/srv/vms/one'\n\
             disks = '/srv/images'\ncheckpoints = '/srv/vms/one/checkpoints'\n\
             smart_paging = '/fast/web1'",
        )
        .unwrap();
        let own = own_places(&definition, Path::new("/var/lib/limosa/vms/web1"));
        let expected =
            ["/fast/web1", "/srv/vms/one", "/srv/vms/one/checkpoints", "/var/lib/limosa/vms/web1"];
        assert_eq!(own, expected.map(PathBuf::from));
    }
}
