//! QEMU's command line: one VM, the same devices at the same places on every
//! host and in every version, so that its state fits wherever it goes.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use serde_json::json;

use crate::accelerator::Accelerator;
use crate::image::ImageFormat;
use crate::pci::{self, Chipset};
use crate::probe::QemuFacts;
use crate::process::SANDBOX;
use crate::quirk::{RAM_BACKEND_NAMED_BY_ID, memory_argument};

/// Name of the RAM backend, which is the block's name in the stream.
pub const RAM_BACKEND_ID: &str = "ram0";
/// QMP socket in the runtime folder.
pub const QMP_SOCKET: &str = "qmp.sock";
/// Serial console's socket in the runtime folder.
pub const CONSOLE_SOCKET: &str = "console.sock";
/// Id of the balloon.
const BALLOON_ID: &str = "bal0";

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
    #[error("{count} {what} are more than the {most} that have an address")]
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
    let chipset = Chipset::of(&spec.machine);
    fits("NICs", spec.nics.len(), pci::NICS.count())?;
    fits("disks", spec.disks.len(), pci::DISKS.count())?;
    let cdroms = spec.disks.iter().filter(|disk| disk.read_only).count();
    fits("CD-ROMs", cdroms, chipset.cdrom_count_max())?;
    let mut line = Line { arguments: Vec::new(), chipset };
    line.pair("-name", comma(&spec.name));
    line.pair("-uuid", &spec.uuid);
    for flag in ["-nodefaults", "-no-user-config", "-S"] {
        line.arguments.push(flag.into());
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
    line.root_ports();
    line.balloon();
    let mut cdrom_count = 0;
    for (disk, slot) in spec.disks.iter().zip(pci::DISKS.each()) {
        line.disk_nodes(disk);
        // A CD-ROM leaves its slot empty, so that the disks after it keep theirs.
        if disk.read_only {
            line.cdrom(disk, cdrom_count);
            cdrom_count += 1;
        } else {
            line.disk(disk, slot);
        }
    }
    for (nic, slot) in spec.nics.iter().zip(pci::NICS.each()) {
        line.nic(nic, slot);
    }
    if spec.incoming {
        line.pair("-incoming", "defer");
    }
    Ok(line.arguments)
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

/// A command line that is being made.
struct Line {
    arguments: Vec<OsString>,
    chipset: Chipset,
}

impl Line {
    fn pair(&mut self, flag: &str, value: impl AsRef<str>) {
        self.arguments.push(flag.into());
        self.arguments.push(value.as_ref().into());
    }

    /// A device on the PCI root bus.
    fn pci_device(&mut self, driver: &str, address: impl std::fmt::Display, options: &str) {
        let bus = self.chipset.root_bus();
        self.pair("-device", format!("{driver},bus={bus},addr={address},{options}"));
    }

    /// Empty ports that devices can be plugged into while the guest runs. None can be
    /// added to a running machine.
    fn root_ports(&mut self) {
        if self.chipset != Chipset::Q35 {
            return;
        }
        let slot = pci::ROOT_PORT_SLOT;
        for port in 0..pci::ROOT_PORT_COUNT {
            // Function 0 alone says whether there are others.
            let multifunction = if port == 0 { ",multifunction=on" } else { "" };
            // Guest firmware has I/O space for few ports only, and virtio needs none.
            let options = format!(
                "id=rp{port},chassis={number},slot={number},io-reserve=0{multifunction}",
                number = port + 1
            );
            self.pci_device("pcie-root-port", format_args!("{slot:#x}.{port:#x}"), &options);
        }
    }

    /// Gives memory back to the host: on demand, and by itself what the guest frees.
    fn balloon(&mut self) {
        let options = format!("id={BALLOON_ID},deflate-on-oom=on,free-page-reporting=on");
        self.pci_device("virtio-balloon-pci", format_args!("{:#x}", pci::BALLOON_SLOT), &options);
    }

    fn nic(&mut self, nic: &NicSpec, slot: u8) {
        self.pair("-netdev", format!("tap,id={},fd={}", nic.id, nic.tap_fd));
        // No option ROM: its content differs by version, and it is not booted.
        let options = format!("netdev={0},id=device-{0},mac={1},romfile=", nic.id, nic.mac);
        self.pci_device("virtio-net-pci", format_args!("{slot:#x}"), &options);
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
        self.arguments.push("-kernel".into());
        self.arguments.push(kernel.into());
        if let Some(initrd) = initrd {
            self.arguments.push("-initrd".into());
            self.arguments.push(initrd.into());
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

    fn disk_nodes(&mut self, disk: &DiskSpec) {
        // Not the other way round: a disk may be called `a-file`.
        let (node, file_node) = (disk_node(&disk.id), format!("file-{}", disk.id));
        let direct = matches!(disk.cache, CacheMode::None | CacheMode::Directsync);
        let unmap = if disk.discard { "unmap" } else { "ignore" };
        let file = json!({
            "driver": "file",
            "node-name": file_node,
            "filename": disk.path,
            "cache": { "direct": direct, "no-flush": false },
            "discard": unmap,
            "read-only": disk.read_only,
        });
        let image = json!({
            "driver": disk.format.as_str(),
            "node-name": node,
            "file": file_node,
            "cache": { "direct": direct, "no-flush": false },
            "discard": unmap,
            "read-only": disk.read_only,
        });
        self.pair("-blockdev", file.to_string());
        self.pair("-blockdev", image.to_string());
    }

    fn cdrom(&mut self, disk: &DiskSpec, index: usize) {
        let node = disk_node(&disk.id);
        let address = self.chipset.cdrom_address(index);
        self.pair("-device", format!("ide-cd,drive={node},id=drive-{},{address}", disk.id));
    }

    fn disk(&mut self, disk: &DiskSpec, slot: u8) {
        let node = disk_node(&disk.id);
        let write_cache = match disk.cache {
            CacheMode::None | CacheMode::Writeback => "on",
            CacheMode::Writethrough | CacheMode::Directsync => "off",
        };
        let options = format!("drive={node},id=drive-{},write-cache={write_cache}", disk.id);
        self.pci_device("virtio-blk-pci", format_args!("{slot:#x}"), &options);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::probe::QemuFacts;

    fn full_vm(machine: &str, cdrom_count: usize) -> LaunchSpec {
        let disk = |index: usize| DiskSpec {
            id: format!("disk{index}"),
            path: format!("/disk{index}").into(),
            format: ImageFormat::Raw,
            cache: CacheMode::None,
            discard: true,
            read_only: index < cdrom_count,
        };
        let nic = |index: usize| NicSpec {
            id: format!("nic{index}"),
            mac: format!("52:54:00:00:00:{index:02}"),
            tap_fd: 11,
        };
        LaunchSpec {
            name: "full".to_owned(),
            uuid: "5f1a6c1e-7a0b-4c55-9c55-0d5a4f1c0f01".to_owned(),
            ram_bytes: 64 << 20,
            ram_fd: 10,
            vcpus: 1,
            machine: machine.to_owned(),
            cpu: "qemu64".to_owned(),
            accelerator: Accelerator::Kvm,
            boot: BootSpec::default(),
            disks: (0..16).map(disk).collect(),
            nics: (0..8).map(nic).collect(),
            runtime_dir: "/run".into(),
            incoming: false,
        }
    }

    fn options<'a>(device: &'a str, name: &str) -> Option<&'a str> {
        let mut options = device.split(',').filter_map(|option| option.split_once('='));
        options.find(|(known, _)| *known == name).map(|(_, value)| value)
    }

    /// Goal: QEMU never chooses an address, and no two devices share one.
    /// Method: the largest VM that fits, with and without PCI Express.
    #[test]
    fn every_device_has_an_address_of_its_own() {
        for (machine, cdrom_count, device_count) in
            [("pc-q35-7.2", 6, 16 + 8 + 8 + 1), ("pc-i440fx-7.2", 4, 16 + 8 + 1)]
        {
            let facts = QemuFacts::with_machines(&["pc-q35-7.2", "pc-i440fx-7.2"]);
            let line = command_line(&full_vm(machine, cdrom_count), &facts).expect("it fits");
            let line: Vec<String> =
                line.into_iter().map(|part| part.into_string().expect("text")).collect();
            let devices: Vec<&str> =
                line.windows(2).filter(|pair| pair[0] == "-device").map(|pair| &*pair[1]).collect();
            let addresses: BTreeSet<_> = devices
                .iter()
                .map(|device| {
                    let unit = options(device, "addr").or_else(|| options(device, "unit"));
                    (options(device, "bus").expect("a bus"), unit.expect("an address"))
                })
                .collect();
            assert_eq!(devices.len(), device_count, "{devices:#?}");
            assert_eq!(addresses.len(), device_count, "{devices:#?}");
            let too_many = command_line(&full_vm(machine, cdrom_count + 1), &facts);
            assert!(matches!(too_many, Err(LaunchError::TooMany { .. })), "{too_many:?}");
        }
    }
}
