//! QEMU's command line: one VM, the same devices at the same places on every
//! host and in every version, so that its state fits wherever it goes.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use serde_json::json;

use crate::accelerator::Accelerator;
use crate::image::ImageFormat;
use crate::probe::QemuFacts;
use crate::quirk::{RAM_BACKEND_NAMED_BY_ID, memory_argument};

/// Name of the RAM backend, which is the block's name in the stream.
pub const RAM_BACKEND_ID: &str = "ram0";
/// QMP socket in the runtime folder.
pub const QMP_SOCKET: &str = "qmp.sock";
/// Serial console's socket in the runtime folder.
pub const CONSOLE_SOCKET: &str = "console.sock";
/// PCI slot of the first NIC, and of the first disk after all NICs: fixed, so
/// that taking one away does not move the others.
const NIC_SLOT_FIRST: usize = 2;
const DISK_SLOT_FIRST: usize = 10;

/// What QEMU is kept from: old system calls, more rights, other programs, and
/// taking more of the host than it is given.
pub(crate) const SANDBOX: &str =
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// Block nodes of UEFI's two flash chips.
const UEFI_CODE_NODE: &str = "uefi-code";
const UEFI_VARIABLES_NODE: &str = "uefi-variables";
/// Block nodes of the firmware, where the guest boots by UEFI.
pub(crate) const FLASH_NODES: [&str; 2] = [UEFI_CODE_NODE, UEFI_VARIABLES_NODE];

/// Everything a QEMU is started with.
#[derive(Debug, Clone)]
pub struct LaunchSpec {
    /// The VM's name, for people who look at processes
    pub name: String,
    /// The VM's identity
    pub uuid: String,
    /// Size of guest RAM
    pub ram_bytes: u64,
    /// Inherited descriptor of guest RAM, see [`crate::ram::create`]
    pub ram_fd: RawFd,
    /// Virtual CPUs
    pub vcpus: u32,
    /// Versioned machine type
    pub machine: String,
    /// CPU model
    pub cpu: String,
    /// How vCPUs are run
    pub accelerator: Accelerator,
    /// What the guest starts from
    pub boot: BootSpec,
    /// Disks in the guest's order
    pub disks: Vec<DiskSpec>,
    /// NICs in the guest's order
    pub nics: Vec<NicSpec>,
    /// Folder for QEMU's sockets
    pub runtime_dir: PathBuf,
    /// Waits for a migration
    pub incoming: bool,
}

/// What a VM starts from.
#[derive(Debug, Clone, Default)]
pub struct BootSpec {
    /// UEFI; `None` is SeaBIOS, QEMU's own
    pub uefi: Option<UefiSpec>,
    /// A kernel directly; `None` is the firmware's boot order
    pub kernel: Option<KernelSpec>,
}

/// UEFI as two flash chips.
#[derive(Debug, Clone)]
pub struct UefiSpec {
    /// The firmware, read only
    pub code: PathBuf,
    /// The VM's own variables
    pub variables: PathBuf,
}

/// A kernel that is started directly.
#[derive(Debug, Clone)]
pub struct KernelSpec {
    /// The kernel
    pub kernel: PathBuf,
    /// Its initial RAM disk
    pub initrd: Option<PathBuf>,
    /// Its command line
    pub append: String,
}

/// One disk.
#[derive(Debug, Clone)]
pub struct DiskSpec {
    /// Its name, see [`disk_node`]
    pub id: String,
    /// Image file
    pub path: PathBuf,
    /// Image format
    pub format: ImageFormat,
    /// Host cache
    pub cache: CacheMode,
    /// Whether discards reach the image
    pub discard: bool,
    /// A CD-ROM
    pub read_only: bool,
}

/// Host cache of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheMode {
    /// Past the page cache
    None,
    /// Through the page cache
    Writeback,
    /// Through the page cache, flushed at each write
    Writethrough,
    /// Past the page cache, flushed at each write
    Directsync,
    /// Through the page cache, never flushed: lost with the host
    Unsafe,
}

/// One NIC.
#[derive(Debug, Clone)]
pub struct NicSpec {
    /// Its name
    pub id: String,
    /// Hardware address
    pub mac: String,
    /// Inherited descriptor of its TAP
    pub tap_fd: RawFd,
}

/// Name of a disk's block node.
#[must_use]
pub fn disk_node(disk: &str) -> String {
    format!("disk-{disk}")
}

/// A VM that does not fit this QEMU.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// Too many of something.
    #[error("{count} {what} are more than the {most} that have a place on the PCI bus")]
    TooMany {
        /// Of what
        what: &'static str,
        /// How many
        count: usize,
        /// How many fit
        most: usize,
    },
    /// QEMU is too old.
    #[error("this is QEMU {version}; {} or newer is needed", crate::quirk::VERSION_MIN)]
    TooOld {
        /// QEMU's version
        version: String,
    },
    /// The machine type is unknown.
    #[error("QEMU {version} does not know the machine type {machine}")]
    Machine {
        /// The type
        machine: String,
        /// QEMU's version
        version: String,
    },
}

/// Makes the arguments for QEMU.
///
/// # Errors
/// [`LaunchError`], when the VM does not fit.
pub fn command_line(spec: &LaunchSpec, facts: &QemuFacts) -> Result<Vec<OsString>, LaunchError> {
    if facts.version < crate::quirk::VERSION_MIN {
        return Err(LaunchError::TooOld { version: facts.version.to_string() });
    }
    if facts.resolve_machine(&spec.machine).is_none() {
        return Err(LaunchError::Machine {
            machine: spec.machine.clone(),
            version: facts.version.to_string(),
        });
    }
    fits("nics", spec.nics.len(), DISK_SLOT_FIRST - NIC_SLOT_FIRST)?;
    fits("disks", spec.disks.len(), 30 - DISK_SLOT_FIRST)?;
    let mut line = Line(Vec::new());
    line.pair("-name", comma(&spec.name));
    line.pair("-uuid", &spec.uuid);
    for flag in ["-nodefaults", "-no-user-config", "-S"] {
        line.0.push(flag.into());
    }
    line.pair("-display", "none");
    line.pair("-sandbox", SANDBOX);
    let flash = match spec.boot.uefi {
        Some(_) => format!(",pflash0={UEFI_CODE_NODE},pflash1={UEFI_VARIABLES_NODE}"),
        None => String::new(),
    };
    let machine = &spec.machine;
    line.pair("-machine", format!("{machine},memory-backend={RAM_BACKEND_ID},usb=off{flash}"));
    line.pair("-accel", accelerator(spec.accelerator));
    line.pair("-cpu", &spec.cpu);
    line.pair("-smp", spec.vcpus.to_string());
    line.pair("-m", memory_argument(spec.ram_bytes));
    line.pair(
        "-object",
        format!(
            "memory-backend-file,id={RAM_BACKEND_ID},mem-path=/proc/self/fd/{},size={},share=on,\
             {RAM_BACKEND_NAMED_BY_ID}",
            spec.ram_fd, spec.ram_bytes
        ),
    );
    line.chardev("qmp", &spec.runtime_dir.join(QMP_SOCKET));
    line.pair("-mon", "chardev=qmp,mode=control");
    line.chardev("console", &spec.runtime_dir.join(CONSOLE_SOCKET));
    line.pair("-serial", "chardev:console");
    line.boot(&spec.boot);
    for (disk, slot) in spec.disks.iter().zip(DISK_SLOT_FIRST..) {
        line.disk(disk, slot);
    }
    for (nic, slot) in spec.nics.iter().zip(NIC_SLOT_FIRST..) {
        line.pair("-netdev", format!("tap,id={},fd={}", nic.id, nic.tap_fd));
        // No option ROM: its content differs by version, and it is not booted.
        line.pair(
            "-device",
            format!(
                "virtio-net-pci,netdev={0},id=card-{0},mac={1},addr={slot:#x},romfile=",
                nic.id, nic.mac
            ),
        );
    }
    if spec.incoming {
        line.pair("-incoming", "defer");
    }
    Ok(line.0)
}

fn fits(what: &'static str, count: usize, most: usize) -> Result<(), LaunchError> {
    if count <= most { Ok(()) } else { Err(LaunchError::TooMany { what, count, most }) }
}

fn accelerator(accelerator: Accelerator) -> &'static str {
    match accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "tcg,thread=multi",
    }
}

/// QEMU's option syntax: a comma in a value is written twice.
fn comma(text: &str) -> String {
    text.replace(',', ",,")
}

struct Line(Vec<OsString>);

impl Line {
    fn pair(&mut self, flag: &str, value: impl AsRef<str>) {
        self.0.push(flag.into());
        self.0.push(value.as_ref().into());
    }

    fn chardev(&mut self, id: &str, socket: &std::path::Path) {
        let path = comma(&socket.to_string_lossy());
        self.pair("-chardev", format!("socket,id={id},path={path},server=on,wait=off"));
    }

    fn boot(&mut self, boot: &BootSpec) {
        if let Some(uefi) = &boot.uefi {
            self.flash(UEFI_CODE_NODE, &uefi.code, true);
            self.flash(UEFI_VARIABLES_NODE, &uefi.variables, false);
        }
        let Some(KernelSpec { kernel, initrd, append }) = &boot.kernel else { return };
        self.0.push("-kernel".into());
        self.0.push(kernel.into());
        if let Some(initrd) = initrd {
            self.0.push("-initrd".into());
            self.0.push(initrd.into());
        }
        if !append.is_empty() {
            self.pair("-append", append);
        }
    }

    fn flash(&mut self, node: &str, path: &std::path::Path, read_only: bool) {
        let file = json!({
            "driver": "file",
            "node-name": node,
            "filename": path,
            "read-only": read_only,
        });
        self.pair("-blockdev", file.to_string());
    }

    fn disk(&mut self, disk: &DiskSpec, slot: usize) {
        // Not the other way round: a disk may be called `a-file`.
        let (node, file_node) = (disk_node(&disk.id), format!("file-{}", disk.id));
        let direct = matches!(disk.cache, CacheMode::None | CacheMode::Directsync);
        let no_flush = disk.cache == CacheMode::Unsafe;
        let unmap = if disk.discard { "unmap" } else { "ignore" };
        let file = json!({
            "driver": "file",
            "node-name": file_node,
            "filename": disk.path,
            "cache": { "direct": direct, "no-flush": no_flush },
            "discard": unmap,
            "read-only": disk.read_only,
        });
        let image = json!({
            "driver": disk.format.as_str(),
            "node-name": node,
            "file": file_node,
            "cache": { "direct": direct, "no-flush": no_flush },
            "discard": unmap,
            "read-only": disk.read_only,
        });
        self.pair("-blockdev", file.to_string());
        self.pair("-blockdev", image.to_string());
        if disk.read_only {
            self.pair("-device", format!("ide-cd,drive={node},id=drive-{}", disk.id));
            return;
        }
        let write_cache = match disk.cache {
            CacheMode::None | CacheMode::Writeback | CacheMode::Unsafe => "on",
            CacheMode::Writethrough | CacheMode::Directsync => "off",
        };
        self.pair(
            "-device",
            format!(
                "virtio-blk-pci,drive={node},id=drive-{},addr={slot:#x},write-cache={write_cache}",
                disk.id
            ),
        );
    }
}
