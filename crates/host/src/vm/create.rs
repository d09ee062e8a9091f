//! Making a VM, and deleting it.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use limosa_protocol::id::Epoch;
use limosa_protocol::vm::{Disk, DiskFormat, DiskKind, Firmware, VmDefinition};
use limosa_qemu::image::{self, ImageError, ImageFormat};
use uuid::Uuid;

use super::{DEFINITION_FILE, Vm, files, write_definition};
use crate::failure::{Failure, OrFail, Result};
use crate::net::{Net, deterministic_mac};
use crate::store::VmRecord;
use crate::{Host, HostQemu};

/// Machine type that stands for "the newest q35 of this QEMU".
const MACHINE_ALIAS: &str = "q35";

/// Makes a VM from a definition: checks all of it, then makes its files.
pub async fn create(host: &Arc<Host>, mut definition: VmDefinition) -> Result<Arc<Vm>> {
    definition.check().map_err(|error| Failure::bad_request(error.to_string()))?;
    complete(host, &mut definition)?;
    let _placing = host.allocation_lock.lock().await;
    check_host(host, &definition).await?;
    let configuration = files::place(&definition.places.configuration, "configuration")?.to_owned();
    let record = VmRecord {
        configuration: configuration.clone(),
        epoch: Epoch(1),
        run: None,
        given_up_to: None,
    };
    // The name is taken from here on, so that a second request finds it taken.
    let vm = Arc::new(Vm::new(definition.clone(), record.clone()));
    let mut locked = vm.lock().await;
    host.vms.add(&host.name, Arc::clone(&vm))?;
    let mut made = Vec::new();
    let result = make_files(&host.qemu, &mut definition, &mut made).await;
    let result = result.and_then(|()| {
        made.push(configuration.join(DEFINITION_FILE));
        write_definition(&definition, &configuration)?;
        files::sync_parents(&made)?;
        Ok(host.store.put(definition.name.as_str(), &record)?)
    });
    if let Err(failure) = result {
        for left in files::remove_made(&made) {
            tracing::warn!(vm = %definition.name, left, "not removed after a failed creation");
        }
        host.vms.remove(&vm, &mut locked);
        return Err(failure);
    }
    locked.definition = definition;
    drop(locked);
    tracing::info!(vm = %vm.name, "created");
    Ok(vm)
}

/// Fills in everything that the definition leaves open.
fn complete(host: &Host, definition: &mut VmDefinition) -> Result<()> {
    let uuid = *definition.uuid.get_or_insert_with(Uuid::new_v4);
    for (index, nic) in definition.nics.iter_mut().enumerate() {
        nic.mac.get_or_insert_with(|| deterministic_mac(uuid, index));
    }
    definition.machine = resolve_machine(&host.qemu, &definition.machine)?;
    files::fill_places(&host.folders, definition);
    Ok(())
}

fn resolve_machine(qemu: &HostQemu, wished: &str) -> Result<String> {
    let facts = &qemu.facts;
    let resolved = facts.resolve_machine(wished).ok_or_else(|| {
        Failure::bad_request(format!(
            "QEMU {} has no machine type {wished} with a version in its name, which is the same \
             on every host: give one that `{} -machine help` lists, such as pc-q35-7.2; \
             {MACHINE_ALIAS} takes the newest",
            facts.version,
            qemu.binary.display()
        ))
    })?;
    Ok(resolved.to_owned())
}

async fn check_host(host: &Host, definition: &VmDefinition) -> Result<()> {
    for nic in &definition.nics {
        if host.net.index(&Net::bridge_name(&nic.switch)).await?.is_none() {
            return Err(Failure::bad_request(format!(
                "no virtual switch {0} here: make it with `limosa switch create {0}`",
                nic.switch
            )));
        }
    }
    for vm in host.vms.all() {
        let other = &vm.reserved;
        if other.name != definition.name
            && other.places.configuration == definition.places.configuration
        {
            return Err(Failure::conflict(format!(
                "VM {} already has the configuration folder {}: give this one another",
                other.name,
                files::place(&definition.places.configuration, "configuration")?.display()
            )));
        }
        if other.uuid == definition.uuid && other.name != definition.name {
            return Err(Failure::conflict(format!("VM {} already has that uuid", other.name)));
        }
        for mac in definition.nics.iter().filter_map(|nic| nic.mac) {
            if other.name != definition.name && other.nics.iter().any(|nic| nic.mac == Some(mac)) {
                return Err(Failure::conflict(format!(
                    "VM {} already has the MAC address {mac}",
                    other.name
                )));
            }
        }
        for disk in &definition.disks {
            let shared = other.disks.iter().find(|theirs| {
                theirs.kind == DiskKind::Disk
                    && disk.kind == DiskKind::Disk
                    && theirs.path == disk.path
            });
            if let (true, Some(theirs)) = (other.name != definition.name, shared) {
                return Err(Failure::conflict(format!(
                    "VM {} already has the image {}: two VMs on one image destroy it",
                    other.name,
                    files::image(theirs)?.display()
                )));
            }
        }
    }
    for path in definition.boot.kernel.iter().chain(&definition.boot.initrd) {
        std::fs::File::open(path).map_err(|error| {
            Failure::bad_request(format!("cannot read {}: {error}", path.display()))
        })?;
    }
    if definition.boot.firmware == Firmware::Uefi {
        for file in [&host.qemu.uefi_code, &host.qemu.uefi_variables] {
            std::fs::File::open(file).map_err(|error| {
                Failure::bad_request(format!(
                    "no UEFI firmware here: {}: {error}: install the package ovmf, or set \
                     qemu.uefi_code and qemu.uefi_variables",
                    file.display()
                ))
            })?;
        }
    }
    for disk in &definition.disks {
        check_disk(&host.qemu, disk).await?;
    }
    Ok(())
}

/// Whether nothing in the configuration folder would be overwritten: it would be
/// another VM's, or all that is left of one.
fn check_configuration(definition: &VmDefinition) -> Result<()> {
    let folder = files::place(&definition.places.configuration, "configuration")?;
    let boot = &definition.boot;
    // A kernel that lies there already stays as it is.
    let copied = [(&boot.kernel, files::KERNEL_FILE), (&boot.initrd, files::INITRD_FILE)];
    let copied = copied.into_iter().filter_map(|(from, name)| {
        let to = folder.join(name);
        from.as_ref().is_some_and(|from| *from != to).then_some(to)
    });
    let written = copied.chain(files::uefi_variables(definition)?);
    for path in written.chain([folder.join(DEFINITION_FILE)]) {
        // A link counts as well, even to nothing.
        if std::fs::symlink_metadata(&path).is_ok() {
            return Err(Failure::conflict(format!(
                "{} exists and would be overwritten: move it away, or give VM {} another \
                 places.configuration",
                path.display(),
                definition.name
            )));
        }
    }
    Ok(())
}

async fn check_disk(qemu: &HostQemu, disk: &Disk) -> Result<()> {
    let path = files::image(disk)?;
    if !path.exists() {
        return match (disk.kind, disk.size_mib) {
            (DiskKind::Disk, Some(_)) => Ok(()),
            (DiskKind::Disk, None) => Err(Failure::bad_request(format!(
                "{} does not exist: give disk {} a size_mib to have it made, or the path of an \
                 image",
                path.display(),
                disk.id
            ))),
            (DiskKind::Cdrom, _) => {
                Err(Failure::bad_request(format!("{} does not exist", path.display())))
            }
        };
    }
    check_is_file(path, disk)?;
    let facts = image::image_facts(&qemu.img, path, format_of(disk.format))
        .await
        .map_err(|error| unusable_image(qemu, disk, path, &error))?;
    if let Some(backing) = facts.backing {
        return Err(Failure::bad_request(format!(
            "{} stands on the image {backing}, which would not move with it: make it whole with \
             `qemu-img convert -O {} {} NEW`",
            path.display(),
            disk.format.as_str(),
            path.display()
        )));
    }
    Ok(())
}

/// Whether an image is a file. A device would be given to QEMU's user for good,
/// and could not move.
fn check_is_file(path: &Path, disk: &Disk) -> Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let shown = path.display();
    let found = std::fs::metadata(path).or_fail(&format!("looking at {shown}"))?.file_type();
    if found.is_file() {
        return Ok(());
    }
    let remedy = if found.is_block_device() {
        format!(
            "copy its content into one with `qemu-img convert -f raw -O {} {shown} NEW`",
            disk.format.as_str()
        )
    } else {
        "give the path of an image".to_owned()
    };
    Err(Failure::bad_request(format!(
        "{shown} of disk {} is not a file but {}, and a VM has its disks in image files: {remedy}",
        disk.id,
        if found.is_dir() { "a folder" } else { "a device of this host" }
    )))
}

fn unusable_image(qemu: &HostQemu, disk: &Disk, path: &Path, error: &ImageError) -> Failure {
    let (shown, reason) = (path.display(), crate::failure::chain(error));
    Failure::bad_request(match error {
        ImageError::Closed { .. } => format!(
            "{shown}: {reason}: give it the image with `chown {} {shown}`, and a way through its \
             folders with `chmod a+x`",
            qemu.user.as_ref().map_or(0, |user| user.uid)
        ),
        _ => format!("{shown} is not an image of format {}: {reason}", disk.format.as_str()),
    })
}

/// A format in the words of the crate that knows QEMU.
pub fn format_of(format: DiskFormat) -> ImageFormat {
    match format {
        DiskFormat::Raw => ImageFormat::Raw,
        DiskFormat::Qcow2 => ImageFormat::Qcow2,
    }
}

async fn make_files(
    qemu: &HostQemu,
    definition: &mut VmDefinition,
    made: &mut Vec<PathBuf>,
) -> Result<()> {
    check_configuration(definition)?;
    files::make_places(&definition.places, made)?;
    let configuration = files::place(&definition.places.configuration, "configuration")?.to_owned();
    let boot = &mut definition.boot;
    for (from, name) in
        [(&mut boot.kernel, files::KERNEL_FILE), (&mut boot.initrd, files::INITRD_FILE)]
    {
        let to = configuration.join(name);
        if let Some(from) = from.as_mut().filter(|from| **from != to) {
            files::copy(from, &to).or_fail(&format!(
                "copying {} to {}",
                from.display(),
                to.display()
            ))?;
            made.push(to.clone());
            *from = to;
        }
    }
    if let Some(to) = files::uefi_variables(definition)? {
        let from = &qemu.uefi_variables;
        files::copy(from, &to).or_fail(&format!(
            "copying {} to {}",
            from.display(),
            to.display()
        ))?;
        made.push(to);
    }
    for disk in &definition.disks {
        let path = files::image(disk)?;
        let Some(size_mib) = disk.size_mib.filter(|_| !path.exists()) else { continue };
        make_image(qemu, path, disk.format, size_mib << 20, made).await?;
    }
    Ok(())
}

/// Makes an empty image for QEMU's user.
pub async fn make_image(
    qemu: &HostQemu,
    path: &Path,
    format: DiskFormat,
    size_bytes: u64,
    made: &mut Vec<PathBuf>,
) -> Result<()> {
    if let Some(folder) = path.parent() {
        files::make_place(folder, made)
            .or_fail(&format!("making the folder {}", folder.display()))?;
    }
    let doing = format!("making the image {}", path.display());
    // Never into a file that is there: it would be another VM's.
    std::fs::File::create_new(path).or_fail(&doing)?;
    made.push(path.to_owned());
    // What is in it is the guest's: nobody else of this host reads it.
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).or_fail(&doing)?;
    qemu.give_file(path).or_fail(&doing)?;
    image::image_create(&qemu.img, path, format_of(format), size_bytes).await.or_fail(&doing)?;
    // A record will name it.
    let file = tokio::fs::File::open(path).await.or_fail(&doing)?;
    file.sync_all().await.or_fail(&doing)
}

/// Deletes a VM that is off, with the files that lie in its own places. Its name
/// is free only when they are gone.
pub async fn delete(host: &Host, vm: &Arc<Vm>) -> Result<()> {
    let mut inner = vm.lock_for_change().await?;
    if inner.qemu.is_some() {
        return Err(Failure::conflict(format!(
            "VM {0} runs: stop it first with `limosa vm stop {0}`",
            vm.name
        )));
    }
    inner.expect_deletable()?;
    host.store.remove::<VmRecord>(vm.name.as_str())?;
    let disks = inner.definition.places.disks.clone();
    let own = inner.definition.disks.iter().filter(|disk| disk.kind == DiskKind::Disk);
    let images = own.filter_map(|disk| disk.path.clone());
    let mut all = files::everything(&host.folders, &inner.definition, images);
    // An image that an operator brought from elsewhere is theirs.
    all.retain(|path| {
        let is_image = inner.definition.disks.iter().any(|disk| disk.path.as_ref() == Some(path));
        !is_image || disks.as_deref().is_some_and(|folder| path.starts_with(folder))
    });
    let runtime = host.folders.runtime_of(&vm.name);
    if runtime.exists()
        && let Err(error) = std::fs::remove_dir_all(&runtime)
    {
        tracing::warn!(vm = %vm.name, folder = %runtime.display(), %error, "not removed with its VM");
    }
    for left in files::remove_made(&all) {
        tracing::warn!(vm = %vm.name, left, "not removed with its VM");
    }
    host.vms.remove(vm, &mut inner);
    tracing::info!(vm = %vm.name, "deleted");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: no creation overwrites what lies in its configuration folder.
    #[test]
    fn a_configuration_folder_in_use_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let mut definition: VmDefinition =
            toml::from_str("name = 'web1'\nmemory_mib = 64\n[boot]\nkernel = '/boot/vmlinuz'")
                .unwrap();
        definition.places.configuration = Some(folder.path().to_owned());
        check_configuration(&definition).unwrap();
        for name in [DEFINITION_FILE, files::KERNEL_FILE, files::UEFI_VARIABLES_FILE] {
            let uefi = name == files::UEFI_VARIABLES_FILE;
            definition.boot.firmware = if uefi { Firmware::Uefi } else { Firmware::Bios };
            std::fs::write(at(name), "another VM's").unwrap();
            let refused = check_configuration(&definition).unwrap_err().to_string();
            assert!(refused.contains(name), "{refused}");
            std::fs::remove_file(at(name)).unwrap();
        }
        // A kernel that lies there already is not copied.
        std::fs::write(at(files::KERNEL_FILE), "its own").unwrap();
        definition.boot.kernel = Some(at(files::KERNEL_FILE));
        check_configuration(&definition).unwrap();
    }
}
