//! The plan of a migration: each item of a VM, its location at both ends, and its carrier.
//!
//! ```text
//! preflight ─► MigrationPlan ─► offer ─► destination places it ─► record there
//!                    └─► record here
//! ```
//!
//! A disk that both hosts reach and a move without a peer are values of the plan, not special
//! cases of the code that performs it.
//!
//! **Invariant.** [`MigrationPlan::may_free`] alone decides which images a host may remove. It
//! allows a removal only if the other copy is another file and belongs to the VM's owner.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::id::{DiskId, HostName};
use crate::migration::{MoveRequest, Outcome, Role, Verify};
use crate::vm::{DiskFormat, DiskKind, VmDefinition};

/// What a migration does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationPlan {
    /// Host that receives the VM; none if the VM stays at its host and only its disks move
    pub peer: Option<HostName>,
    pub memory: MemoryItem,
    /// Disks, in the definition's order
    pub disks: Vec<DiskItem>,
    /// Limits and wishes of the operator
    pub policy: Policy,
}

/// Guest RAM as an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryItem {
    pub bytes: u64,
    /// How it gets to the destination
    pub carrier: MemoryCarrier,
}

/// How guest RAM gets to the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryCarrier {
    /// In rounds while the guest runs
    PreCopy,
    /// Not at all: the VM is off
    None,
}

/// A disk as an item.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskItem {
    /// Name of the disk in the definition
    pub id: DiskId,
    /// Its location at the source
    pub source: Location,
    /// Its location at the destination; none until the destination has placed the VM
    pub destination: Option<Location>,
    /// How its content gets to the destination
    pub carrier: DiskCarrier,
    /// Size that the guest sees, in bytes
    pub virtual_bytes: u64,
    /// Bytes in use at the source
    pub allocated_bytes: u64,
}

/// How the content of a disk gets to the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskCarrier {
    /// QEMU mirrors the source's image into one that the destination makes
    Mirror,
    /// Both hosts use the same storage: nothing moves
    AlreadyThere,
    /// Not at all: the medium stays at the source
    None,
}

/// Where a disk lies at one end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Location {
    /// What the path names
    pub kind: LocationKind,
    /// Path at that host
    pub path: PathBuf,
    /// Format of the content
    pub format: DiskFormat,
    /// Which hosts reach it
    pub reach: Reach,
}

/// What the path of a location names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LocationKind {
    /// A file, which can be removed
    File,
    /// A device, whose node is never removed
    Device,
}

/// Which hosts reach a location.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reach {
    /// The host at that end
    OneHost,
    /// The host at the other end too
    BothHosts,
}

/// Limits and wishes of the operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Longest downtime to aim for, in milliseconds
    pub downtime_limit_ms: u32,
    /// How much is compared before the commit point
    pub verify: Verify,
    /// Keep the disk images at the source
    pub retain_source_disks: bool,
}

/// Why a plan does not fit the VM that it is for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// No host is to receive the VM.
    #[error("the plan names no host that receives the VM")]
    NoPeer,
    /// The disks of the plan and of the definition differ.
    #[error("the plan does not describe each disk of the definition, in its order")]
    OtherDisks,
    /// A carrier or location that this version does not handle.
    #[error("disk {0}: its carrier and location do not go together")]
    Carrier(DiskId),
}

impl Location {
    /// A file that only the host at this end reaches.
    #[must_use]
    pub fn file(path: PathBuf, format: DiskFormat) -> Self {
        Self { kind: LocationKind::File, path, format, reach: Reach::OneHost }
    }

    /// A device that only the host at this end reaches.
    #[must_use]
    pub fn device(path: PathBuf, format: DiskFormat) -> Self {
        Self { kind: LocationKind::Device, ..Self::file(path, format) }
    }
}

impl Policy {
    /// What an operator asked for.
    #[must_use]
    pub fn of(request: &MoveRequest) -> Self {
        Self {
            downtime_limit_ms: request.downtime_limit_ms,
            verify: request.verify,
            retain_source_disks: request.retain_source_disks,
        }
    }
}

impl DiskItem {
    /// Its location at one end, if it is known.
    #[must_use]
    pub fn location(&self, side: Role) -> Option<&Location> {
        match side {
            Role::Source => Some(&self.source),
            Role::Destination => self.destination.as_ref(),
        }
    }

    /// Whether the two ends surely are two files, each with the whole content once the disk
    /// has moved.
    fn has_two_copies(&self, is_local: bool) -> bool {
        if self.carrier != DiskCarrier::Mirror {
            return false;
        }
        let destination = self.destination.as_ref();
        if is_local {
            return destination.is_some_and(|there| there.path != self.source.path);
        }
        // Two hosts may reach the same storage by different paths.
        self.source.reach == Reach::OneHost
            || destination.is_some_and(|there| there.reach == Reach::OneHost)
    }
}

impl MigrationPlan {
    /// Whether guest RAM moves; otherwise the VM is off.
    #[must_use]
    pub fn moves_memory(&self) -> bool {
        self.memory.carrier == MemoryCarrier::PreCopy
    }

    /// Whether everything is read a second time on both hosts.
    #[must_use]
    pub fn verifies_fully(&self) -> bool {
        self.policy.verify == Verify::Full
    }

    /// Disks whose content moves, in the order in which data channels number them.
    pub fn mirrored(&self) -> impl Iterator<Item = &DiskItem> {
        self.disks.iter().filter(|disk| disk.carrier == DiskCarrier::Mirror)
    }

    /// Images that the destination makes, each with its disk.
    pub fn images_to_make(&self) -> impl Iterator<Item = (&Location, &DiskItem)> {
        self.mirrored().filter_map(|disk| Some((disk.destination.as_ref()?, disk)))
    }

    /// Disks that stay at the source, such as a CD-ROM.
    pub fn left_behind(&self) -> impl Iterator<Item = &DiskItem> {
        self.disks.iter().filter(|disk| disk.carrier == DiskCarrier::None)
    }

    /// Refuses a plan that does not fit the VM, or that this version cannot perform.
    ///
    /// # Errors
    /// The first mismatch.
    pub fn check(&self, definition: &VmDefinition) -> Result<(), PlanError> {
        if self.peer.is_none() {
            return Err(PlanError::NoPeer);
        }
        if !self.disks.iter().map(|disk| &disk.id).eq(definition.disks.iter().map(|disk| &disk.id))
        {
            return Err(PlanError::OtherDisks);
        }
        for (item, disk) in self.disks.iter().zip(&definition.disks) {
            let is_file = item.source.kind == LocationKind::File;
            let fits = match item.carrier {
                DiskCarrier::Mirror => {
                    disk.kind == DiskKind::Disk && is_file && item.source.reach == Reach::OneHost
                }
                DiskCarrier::AlreadyThere => false,
                DiskCarrier::None => disk.kind == DiskKind::Cdrom || !is_file,
            };
            if !fits {
                return Err(PlanError::Carrier(disk.id.clone()));
            }
        }
        Ok(())
    }

    /// Whether a host may remove the image of a disk at its end, after a migration that ended
    /// so.
    ///
    /// The source frees its copy once the VM has moved, the destination its own once the VM
    /// has stayed. Nobody frees a disk of which there may be one copy only, a device, or
    /// anything while the outcome is in doubt.
    #[must_use]
    pub fn may_free(&self, disk: &DiskItem, side: Role, outcome: Outcome) -> bool {
        let is_surplus = match (side, outcome) {
            (Role::Source, Outcome::Moved) => !self.policy.retain_source_disks,
            (Role::Destination, Outcome::Stayed) => true,
            (Role::Source, Outcome::Stayed)
            | (Role::Destination, Outcome::Moved)
            | (_, Outcome::InDoubt) => false,
        };
        let is_file = disk.location(side).is_some_and(|at| at.kind == LocationKind::File);
        is_surplus && is_file && disk.has_two_copies(self.peer.is_none())
    }

    /// Images that a host may remove at its end.
    pub fn freeable(&self, side: Role, outcome: Outcome) -> impl Iterator<Item = &Path> {
        let may_free = move |disk: &&DiskItem| self.may_free(disk, side, outcome);
        let freeable = self.disks.iter().filter(may_free);
        freeable.filter_map(move |disk| Some(disk.location(side)?.path.as_path()))
    }

    /// Of paths that a host is about to remove, those that it may: all but the images that
    /// it has to keep.
    #[must_use]
    pub fn without_kept(
        &self,
        side: Role,
        outcome: Outcome,
        mut paths: Vec<PathBuf>,
    ) -> Vec<PathBuf> {
        let sides = match self.peer {
            Some(_) => &[side][..],
            // Both ends are at this host.
            None => &[Role::Source, Role::Destination],
        };
        paths.retain(|path| {
            let is_kept = |disk: &DiskItem| {
                sides.iter().any(|end| {
                    disk.location(*end).is_some_and(|at| at.path == *path)
                        && !(*end == side && self.may_free(disk, side, outcome))
                })
            };
            !self.disks.iter().any(is_kept)
        });
        paths
    }
}

#[cfg(test)]
mod tests;
