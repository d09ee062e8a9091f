//! Full verification: digests of what really stands in RAM and in images.

use limosa_protocol::peer::Digests;
use limosa_protocol::vm::{Disk, DiskKind, VmDefinition};
use limosa_qemu::image;
use limosa_qemu::process;

use crate::agent::Agent;
use crate::failure::{Failure, OrFail, Outcome};
use crate::vm::{Qemu, create, files};

/// Digests of everything, of a guest that stands. Without a QEMU there is no RAM.
pub(crate) async fn digests(
    agent: &Agent,
    definition: &VmDefinition,
    qemu: Option<&Qemu>,
) -> Outcome<Digests> {
    let ram = match qemu {
        Some(qemu) => Some(ram(qemu, definition).await?),
        None => None,
    };
    Ok(Digests { ram, disks: disks(agent, definition).await? })
}

/// Digests of what the guest sees on its disks, which nobody writes to.
pub(crate) async fn disks(agent: &Agent, definition: &VmDefinition) -> Outcome<Vec<String>> {
    let mut digests = Vec::new();
    for of_vm in definition.disks.iter().filter(|disk| disk.kind == DiskKind::Disk) {
        digests.push(disk(agent, of_vm).await?);
    }
    Ok(digests)
}

/// What differs first between two hosts, if anything does.
pub(crate) fn first_difference(
    definition: &VmDefinition,
    ours: &Digests,
    theirs: &Digests,
) -> Option<String> {
    if ours.ram != theirs.ram {
        return Some("RAM".to_owned());
    }
    if ours.disks.len() != theirs.disks.len() {
        return Some("the number of disks".to_owned());
    }
    let own = definition.disks.iter().filter(|disk| disk.kind == DiskKind::Disk);
    let mut pairs = own.zip(ours.disks.iter().zip(&theirs.disks));
    pairs.find(|(_, (ours, theirs))| ours != theirs).map(|(disk, _)| format!("disk {}", disk.id))
}

/// Digest of a QEMU's whole guest RAM.
async fn ram(qemu: &Qemu, definition: &VmDefinition) -> Outcome<String> {
    let doing = "reading RAM again";
    let size_bytes = qemu.accelerator.ram_bytes(definition.memory_bytes());
    let memory = process::ram_backend_file(&qemu.process, size_bytes).or_fail(doing)?;
    let digest =
        tokio::task::spawn_blocking(move || limosa_plane::full_ram_digest(&memory, size_bytes))
            .await
            .or_fail(doing)?
            .or_fail(doing)?;
    Ok(ram_text(digest))
}

/// A digest of RAM as the hosts tell it each other.
pub(crate) fn ram_text(digest: u128) -> String {
    format!("{digest:032x}")
}

/// Digest of what the guest sees on a disk that nobody writes to.
async fn disk(agent: &Agent, disk: &Disk) -> Outcome<String> {
    let path = files::image(disk)?;
    let doing = format!("reading {} again", path.display());
    let mut child = image::read_content(&agent.qemu.img, path, create::format_of(disk.format))
        .or_fail(&doing)?;
    let content = child.stdout.take().ok_or_else(|| Failure::internal(doing.clone()))?;
    let digest = digest(content).await.or_fail(&doing)?;
    if child.wait().await.or_fail(&doing)?.success() {
        Ok(digest)
    } else {
        Err(Failure::internal(format!("{doing}: the image tool failed")))
    }
}

async fn digest(mut content: impl tokio::io::AsyncRead + Unpin) -> std::io::Result<String> {
    use tokio::io::AsyncReadExt;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let length = content.read(&mut buffer).await?;
        if length == 0 {
            return Ok(hasher.finalize().to_string());
        }
        hasher.update(&buffer[..length]);
    }
}
