//! A VM's definition: TOML on disk, JSON on the API, the same fields.
//!
//! ```toml
//! name = "web1"
//! memory_mib = 1024
//! vcpus = 2
//!
//! [[disks]]
//! id = "root"
//! size_mib = 8192
//!
//! [[nics]]
//! switch = "lan"
//! ```
//!
//! **Invariant.** What may be left out in a file is filled in when the VM is
//! created ([`VmDefinition::check`] then holds), so that a stored definition
//! says everything and both hosts of a migration read the same machine in it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::id::{DiskId, SwitchName, VmName};

/// Most disks of one VM.
pub const DISK_COUNT_MAX: usize = 16;
/// Most NICs of one VM.
pub const NIC_COUNT_MAX: usize = 8;
/// Most vCPUs of one VM.
pub const VCPU_COUNT_MAX: u32 = 288;
/// Least and most memory of one VM, in MiB.
pub const MEMORY_MIB_MIN: u64 = 16;
/// See [`MEMORY_MIB_MIN`].
pub const MEMORY_MIB_MAX: u64 = 16 << 20;

/// How the vCPUs of a QEMU run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// On the processor
    Kvm,
    /// In software
    Tcg,
}

impl Accelerator {
    /// The name that QEMU uses.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

impl std::fmt::Display for Accelerator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Everything that makes a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmDefinition {
    /// Name, unique on its host
    pub name: VmName,
    /// Identity that stays when the VM moves or is renamed; made when missing
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<Uuid>,
    pub memory_mib: u64,
    #[serde(default = "one")]
    pub vcpus: u32,
    /// QEMU machine type with a version; "q35" and "pc" become the newest one at creation
    #[serde(default = "default_machine")]
    pub machine: String,
    /// QEMU CPU model; `,+feature` and `,-feature` may follow
    #[serde(default = "default_cpu")]
    pub cpu: String,
    /// What the guest starts from
    #[serde(default)]
    pub boot: Boot,
    /// Disks, in the order in which the guest sees them
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// Network cards, in the order in which the guest sees them
    #[serde(default)]
    pub nics: Vec<Nic>,
    /// The four places of the VM's files
    #[serde(default)]
    pub places: Places,
}

fn one() -> u32 {
    1
}
fn default_machine() -> String {
    "q35".to_owned()
}
fn default_cpu() -> String {
    "qemu64".to_owned()
}

/// What the guest starts from: the firmware's boot order, or a kernel directly.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    #[serde(default)]
    pub firmware: Firmware,
    /// Kernel to start directly; copied into the VM's configuration folder
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk for the kernel; copied likewise
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub initrd: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub append: String,
}

/// Firmware of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Firmware {
    /// SeaBIOS, QEMU's own
    #[default]
    Bios,
    /// UEFI, with variables of the VM's own
    Uefi,
}

/// One disk of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Name of the disk within the VM
    pub id: DiskId,
    /// Image file; default `DISKS/ID.FORMAT`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub path: Option<PathBuf>,
    /// Image format; never guessed from the content
    #[serde(default)]
    pub format: DiskFormat,
    /// Size in MiB of the image that is made when the file does not exist
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_mib: Option<u64>,
    #[serde(default)]
    pub cache: Cache,
    /// Whether the guest's discards free space in the image
    #[serde(default = "yes")]
    pub discard: bool,
    /// Disk or CD-ROM; a CD-ROM's file belongs to the host and blocks a move
    #[serde(default)]
    pub kind: DiskKind,
}

fn yes() -> bool {
    true
}

/// Format of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFormat {
    /// The bytes as they are
    Raw,
    /// QEMU's copy-on-write format
    #[default]
    Qcow2,
}

impl DiskFormat {
    /// The name QEMU and the file ending use.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// How the host caches a disk, in QEMU's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Cache {
    /// Past the host's page cache; flushes are honoured
    #[default]
    None,
    /// Through the host's page cache; flushes are honoured
    Writeback,
    /// Through the host's page cache; every write is flushed
    Writethrough,
    /// Past the host's page cache; every write is flushed
    Directsync,
}

/// What kind of drive the guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DiskKind {
    /// A disk of the VM, moved with it
    #[default]
    Disk,
    /// A read-only image of the host (an ISO)
    Cdrom,
}

/// One network card of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Virtual switch to which it is plugged
    pub switch: SwitchName,
    /// Hardware address; made from the VM's identity when missing
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub mac: Option<Mac>,
}

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

/// Text that is not an Ethernet address of one station.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a MAC address of one station, such as 52:54:00:12:34:56")]
pub struct BadMac(String);

impl TryFrom<String> for Mac {
    type Error = BadMac;
    fn try_from(text: String) -> Result<Self, BadMac> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            *byte = parts
                .next()
                .filter(|part| part.len() == 2)
                .and_then(|part| u8::from_str_radix(part, 16).ok())
                .ok_or_else(|| BadMac(text.clone()))?;
        }
        // A multicast or all-zero address would never receive an answer.
        if parts.next().is_some() || bytes[0] & 1 == 1 || bytes == [0; 6] {
            return Err(BadMac(text));
        }
        Ok(Self(bytes))
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> String {
        mac.to_string()
    }
}

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The four places of a VM's files, each an absolute folder of its own.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Places {
    /// Definition, kernel and initial RAM disk
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub configuration: Option<PathBuf>,
    /// Disks without a path of their own
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub disks: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub checkpoints: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub smart_paging: Option<PathBuf>,
}

/// A definition that cannot become a VM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadDefinition {
    /// A number is out of its range.
    #[error("{field} is {value}: it must be {least} to {most}")]
    OutOfRange { field: &'static str, value: u64, least: u64, most: u64 },
    /// Two disks share a name or a file.
    #[error("two disks share {0:?}: give each its own id and path")]
    DiskTwice(String),
    /// Two NICs share an address.
    #[error("two nics share the MAC address {0}: leave it out to get one made")]
    MacTwice(Mac),
    /// A path would depend on where the agent was started.
    #[error("{field} {path:?} is not an absolute path without '..'")]
    BadPath { field: &'static str, path: PathBuf },
    /// Text that would change the meaning of QEMU's command line.
    #[error("{field} {text:?} may hold only letters, digits and any of . _ - + , =")]
    BadText { field: &'static str, text: String },
    /// An initial RAM disk or command line without a kernel.
    #[error("boot.{0} needs boot.kernel")]
    NeedsKernel(&'static str),
}

impl VmDefinition {
    /// Checks all that can be checked without looking at a host.
    pub fn check(&self) -> Result<(), BadDefinition> {
        range("memory_mib", self.memory_mib, MEMORY_MIB_MIN, MEMORY_MIB_MAX)?;
        range("vcpus", self.vcpus.into(), 1, VCPU_COUNT_MAX.into())?;
        range("number of disks", count(self.disks.len()), 0, count(DISK_COUNT_MAX))?;
        range("number of nics", count(self.nics.len()), 0, count(NIC_COUNT_MAX))?;
        plain_text("machine", &self.machine)?;
        plain_text("cpu", &self.cpu)?;
        self.check_boot()?;
        self.check_disks()?;
        for (field, place) in self.places.each() {
            place.map_or(Ok(()), |place| absolute(field, place))?;
        }
        let mut macs = BTreeSet::new();
        for mac in self.nics.iter().filter_map(|nic| nic.mac) {
            if !macs.insert(mac.0) {
                return Err(BadDefinition::MacTwice(mac));
            }
        }
        Ok(())
    }

    fn check_boot(&self) -> Result<(), BadDefinition> {
        let boot = &self.boot;
        if boot.kernel.is_none() {
            if boot.initrd.is_some() {
                return Err(BadDefinition::NeedsKernel("initrd"));
            }
            if !boot.append.is_empty() {
                return Err(BadDefinition::NeedsKernel("append"));
            }
        }
        for (field, path) in [("boot.kernel", &boot.kernel), ("boot.initrd", &boot.initrd)] {
            path.as_deref().map_or(Ok(()), |path| absolute(field, path))?;
        }
        Ok(())
    }

    fn check_disks(&self) -> Result<(), BadDefinition> {
        let mut ids = BTreeSet::new();
        let mut paths = BTreeSet::new();
        for disk in &self.disks {
            if !ids.insert(&disk.id) {
                return Err(BadDefinition::DiskTwice(disk.id.to_string()));
            }
            if let Some(size_mib) = disk.size_mib {
                range("disk size_mib", size_mib, 1, 1 << 30)?;
            }
            if let Some(path) = &disk.path {
                absolute("disk path", path)?;
                if !paths.insert(path) {
                    return Err(BadDefinition::DiskTwice(path.display().to_string()));
                }
            }
        }
        Ok(())
    }

    /// Guest memory in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.memory_mib << 20
    }
}

impl Places {
    /// The places with the names of their fields.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, Option<&Path>)> {
        [
            ("places.configuration", self.configuration.as_deref()),
            ("places.disks", self.disks.as_deref()),
            ("places.checkpoints", self.checkpoints.as_deref()),
            ("places.smart_paging", self.smart_paging.as_deref()),
        ]
        .into_iter()
    }
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

fn range(field: &'static str, value: u64, least: u64, most: u64) -> Result<(), BadDefinition> {
    if (least..=most).contains(&value) {
        Ok(())
    } else {
        Err(BadDefinition::OutOfRange { field, value, least, most })
    }
}

fn absolute(field: &'static str, path: &Path) -> Result<(), BadDefinition> {
    let climbs = path.components().any(|part| part == std::path::Component::ParentDir);
    if path.is_absolute() && !climbs {
        Ok(())
    } else {
        Err(BadDefinition::BadPath { field, path: path.to_owned() })
    }
}

fn plain_text(field: &'static str, text: &str) -> Result<(), BadDefinition> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-+,=".contains(&byte);
    if !text.is_empty() && text.len() <= 256 && text.bytes().all(plain) {
        Ok(())
    } else {
        Err(BadDefinition::BadText { field, text: text.chars().take(80).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(toml: &str) -> VmDefinition {
        toml::from_str(toml).unwrap()
    }

    #[test]
    fn a_short_file_is_enough() {
        let vm = parse("name = 'web1'\nmemory_mib = 64\n[[disks]]\nid = 'root'\nsize_mib = 10\n");
        vm.check().unwrap();
        assert_eq!((vm.vcpus, vm.machine.as_str()), (1, "q35"));
        assert_eq!(toml::from_str::<VmDefinition>(&toml::to_string(&vm).unwrap()).unwrap(), vm);
    }

    #[test]
    fn bad_definitions_say_what_is_wrong() {
        let with = |extra: &str| parse(&format!("name = 'a'\nmemory_mib = 64\n{extra}"));
        for (extra, said) in [
            ("vcpus = 0", "vcpus is 0: it must be 1 to 288"),
            ("machine = 'q35 -device x'", "machine"),
            ("[boot]\ninitrd = '/i'", "boot.initrd needs boot.kernel"),
            ("[[disks]]\nid = 'a'\npath = 'x.img'", "absolute"),
            ("[[disks]]\nid = 'a'\npath = '/d/../../x'", "absolute"),
            ("[[disks]]\nid = 'a'\n[[disks]]\nid = 'a'", "two disks share"),
            (
                "[[nics]]\nswitch = 'l'\nmac = '52:54:00:00:00:01'\n\
                 [[nics]]\nswitch = 'l'\nmac = '52:54:00:00:00:01'",
                "two nics share",
            ),
        ] {
            let message = with(extra).check().unwrap_err().to_string();
            assert!(message.contains(said), "{extra:?} gave {message:?}");
        }
        assert!(toml::from_str::<VmDefinition>("name = 'a'\nmemory_mib = 1\nram = 2").is_err());
        assert!(Mac::try_from("01:00:5e:00:00:01".to_owned()).is_err());
    }
}
