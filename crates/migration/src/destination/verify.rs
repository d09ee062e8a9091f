//! Full verification: digests of what really stands in RAM and in images, by
//! part, so that a difference can be followed to one page or block.

use limosa_protocol::migration::Role;
use limosa_protocol::peer::{Digests, Part};
use limosa_protocol::plan::MigrationPlan;
use limosa_protocol::vm::VmDefinition;
use limosa_qemu::image::{self, ImageTool};
use limosa_qemu::ram;
use tokio::io::AsyncReadExt;

use limosa_host::failure::{Failure, OrFail, Result};
use limosa_host::vm::{Qemu, create};

/// What both hosts tell of something: digests of its parts; none if theirs lacks
/// it.
type Told<'a> = (Part, &'a Vec<String>, Option<&'a Vec<String>>);

/// Something whose contents are read again.
pub(crate) struct Contents<'a> {
    /// Reads images
    pub(crate) img: &'a ImageTool,
    pub(crate) definition: &'a VmDefinition,
    /// The guest's QEMU, which stands. Without one there is no RAM.
    pub(crate) qemu: Option<&'a Qemu>,
    pub(crate) plan: &'a MigrationPlan,
    /// The end whose images are read
    pub(crate) side: Role,
}

impl Contents<'_> {
    /// Digests of everything.
    pub(crate) async fn all(&self) -> Result<Digests> {
        let ram = match self.whole_ram() {
            Some(ram) => self.ram(ram).await?,
            None => Vec::new(),
        };
        Ok(Digests { ram, disks: self.disks().await? })
    }

    /// Digests of the parts of a part that the other host wants to know.
    pub(crate) async fn part(&self, part: Part) -> Result<Digests> {
        let whole = match part.disk {
            None => self.whole_ram(),
            Some(disk) => self.whole_disks().nth(disk.into()),
        };
        let is_within = whole.is_some_and(|whole| {
            part.from_bytes < part.to_bytes
                && part.to_bytes <= whole.to_bytes
                && part.from_bytes.is_multiple_of(part.unit_bytes())
        });
        if !is_within {
            return Err(Failure::bad_request("there is no such part of the VM"));
        }
        Ok(match part.disk {
            None => Digests { ram: self.ram(part).await?, disks: Vec::new() },
            Some(_) => Digests { ram: Vec::new(), disks: vec![self.disk(part).await?] },
        })
    }

    /// Digests of what the guest sees on its disks, which nobody writes to.
    pub(crate) async fn disks(&self) -> Result<Vec<Vec<String>>> {
        let mut digests = Vec::new();
        for disk in self.whole_disks() {
            digests.push(self.disk(disk).await?);
        }
        Ok(digests)
    }

    /// The first part of which two hosts tell different digests.
    ///
    /// - `of`: the part that was asked for, or all.
    pub(crate) fn first_difference(
        &self,
        of: Option<Part>,
        ours: &Digests,
        theirs: &Digests,
    ) -> Option<Part> {
        let wholes: Vec<Told<'_>> = match of {
            Some(part @ Part { disk: None, .. }) => vec![(part, &ours.ram, Some(&theirs.ram))],
            Some(part) => ours
                .disks
                .first()
                .map(|ours| (part, ours, theirs.disks.first()))
                .into_iter()
                .collect(),
            None => {
                let ram = self.whole_ram().map(|ram| (ram, &ours.ram, Some(&theirs.ram)));
                let disks = self.whole_disks().zip(&ours.disks);
                let disks =
                    disks.enumerate().map(|(at, (disk, ours))| (disk, ours, theirs.disks.get(at)));
                ram.into_iter().chain(disks).collect()
            }
        };
        wholes.into_iter().find_map(|(whole, ours, theirs)| {
            whole.cut().zip(ours).enumerate().find_map(|(at, (part, digest))| {
                let is_same = theirs.and_then(|theirs| theirs.get(at)) == Some(digest);
                (!is_same).then_some(part)
            })
        })
    }

    /// A part as people know it.
    pub(crate) fn name(&self, part: &Part) -> String {
        let Part { from_bytes, to_bytes, .. } = part;
        let of_disk = part.disk.and_then(|disk| self.plan.mirrored().nth(disk.into()));
        match of_disk {
            Some(disk) => format!("disk {}, first in bytes {from_bytes} to {to_bytes}", disk.id),
            None if part.is_smallest() => format!("RAM, first in the page at {from_bytes:#x}"),
            None => format!("RAM, first between {from_bytes:#x} and {to_bytes:#x}"),
        }
    }

    fn whole_ram(&self) -> Option<Part> {
        let qemu = self.qemu?;
        let to_bytes = qemu.accelerator.ram_bytes(self.definition.memory_bytes());
        Some(Part { disk: None, from_bytes: 0, to_bytes })
    }

    fn whole_disks(&self) -> impl Iterator<Item = Part> {
        (0..).zip(self.plan.mirrored()).map(|(index, disk)| Part {
            disk: Some(index),
            from_bytes: 0,
            to_bytes: disk.virtual_bytes,
        })
    }

    async fn ram(&self, part: Part) -> Result<Vec<String>> {
        let doing = "reading RAM again";
        let qemu = self.qemu.ok_or_else(|| Failure::internal("there is no RAM to be read"))?;
        let size_bytes = qemu.accelerator.ram_bytes(self.definition.memory_bytes());
        let memory = ram::open(&qemu.process, size_bytes).or_fail(doing)?;
        let read = move || limosa_plane::ram_digests(&memory, &part);
        let digests = tokio::task::spawn_blocking(read).await.or_fail(doing)?.or_fail(doing)?;
        Ok(digests.into_iter().map(ram_text).collect())
    }

    async fn disk(&self, part: Part) -> Result<Vec<String>> {
        let number = usize::from(part.disk.unwrap_or_default());
        let disk = self.plan.mirrored().nth(number);
        let image = disk.and_then(|disk| disk.location(self.side));
        let image = image.ok_or_else(|| Failure::internal("there is no such disk"))?;
        let path = &image.path;
        let doing = format!("reading {} again", path.display());
        let range = part.from_bytes..part.to_bytes;
        let format = create::format_of(image.format);
        let tool = self.img;
        let mut child = image::read_content(tool, path, format, range).or_fail(&doing)?;
        let content = child.stdout.take().ok_or_else(|| Failure::internal(doing.clone()))?;
        let digests = digests(content, part).await.or_fail(&doing)?;
        if child.wait().await.or_fail(&doing)?.success() {
            Ok(digests)
        } else {
            Err(Failure::internal(format!("{doing}: the image tool failed")))
        }
    }
}

/// A digest of RAM as the hosts tell it each other.
pub(crate) fn ram_text(digest: u128) -> String {
    format!("{digest:032x}")
}

async fn digests(
    mut content: impl tokio::io::AsyncRead + Unpin,
    whole: Part,
) -> std::io::Result<Vec<String>> {
    let mut digests = Vec::new();
    let mut buffer = vec![0; 1 << 20];
    for part in whole.cut() {
        let mut hasher = blake3::Hasher::new();
        let mut left = part.to_bytes - part.from_bytes;
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            let length = content.read(&mut buffer[..most]).await?;
            if length == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            hasher.update(&buffer[..length]);
            left -= length as u64;
        }
        digests.push(hasher.finalize().to_hex()[..32].to_owned());
    }
    Ok(digests)
}
