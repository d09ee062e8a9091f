//! Against real QEMU, in software: no KVM, no root and no guest is needed.
//!
//! `LIMOSA_TEST_QEMU` names another binary than the one in `PATH`. A machine
//! without QEMU fails these tests; it does not skip them. Where the lab fetched
//! QEMU 10, whatever depends on the version is tried with that one too, and moves
//! go from the older to the newer.

mod client;
mod image;
mod life;
mod moving;

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::accelerator::Accelerator;
use crate::image::{ImageFormat, ImageTool};
use crate::launch::{self, BootSpec, CacheMode, DiskSpec, LaunchSpec};
use crate::probe::{self, QemuFacts};
use crate::process::{self, InheritedFds, ProcessSpec, QemuProcess, User};
use crate::qmp::Qmp;
use crate::ram;

const RAM_BYTES: u64 = 64 << 20;
/// More than is read from an image at once.
const DISK_BYTES: u64 = 80 << 20;
const START_MAX: Duration = Duration::from_secs(30);
/// `nobody` and `nogroup` on Debian.
const NOBODY: u32 = 65534;

fn qemu_binary() -> PathBuf {
    std::env::var_os("LIMOSA_TEST_QEMU").unwrap_or("qemu-system-x86_64".into()).into()
}

fn image_tool() -> ImageTool {
    ImageTool { program: "qemu-img".into(), user: nobody() }
}

/// QEMU 10, if the lab fetched it, with its tools in `root/usr/bin` beside it.
fn newer_qemu() -> Option<PathBuf> {
    let path = "../../.lab/cache/qemu10/qemu-system-x86_64";
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path).canonicalize().ok()
}

fn qemu_binaries() -> Vec<PathBuf> {
    std::iter::once(qemu_binary()).chain(newer_qemu()).collect()
}

/// QEMU's image tools; the newer one finds its libraries through a script.
fn image_tools(folder: &Path) -> Vec<ImageTool> {
    let newer = newer_qemu().map(|qemu| {
        let root = qemu.with_file_name("root");
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        let tool = root.join("usr/bin/qemu-img");
        let path = folder.join("qemu-img-10");
        let script = format!(
            "#!/bin/sh\nLD_LIBRARY_PATH={} exec {} \"$@\"\n",
            libraries.display(),
            tool.display()
        );
        std::fs::write(&path, script).expect("a script");
        let all = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&path, all).expect("its permissions");
        ImageTool { program: path, user: nobody() }
    });
    std::iter::once(image_tool()).chain(newer).collect()
}

async fn facts(binary: &Path) -> QemuFacts {
    probe::probe(binary, Accelerator::Tcg, nobody().as_ref()).await.unwrap_or_else(|error| {
        panic!("{} is needed (Debian: qemu-system-x86): {error:?}", binary.display())
    })
}

fn nobody() -> Option<User> {
    let root = rustix::process::geteuid().is_root();
    root.then(|| User { uid: NOBODY, gid: NOBODY, groups: Vec::new() })
}

/// A folder that QEMU's user may write into.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let all = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(folder.path(), all).expect("its permissions");
    folder
}

/// Makes an image that QEMU's user may write to.
fn make_image(path: &Path, format: ImageFormat, writes: &[&str]) {
    let run = |tool: &str, args: &[&str]| {
        let done = Command::new(tool).args(args).arg(path).output();
        let done = done.unwrap_or_else(|error| panic!("{tool} (Debian: qemu-utils): {error}"));
        assert!(done.status.success(), "{tool}: {done:?}");
    };
    let done = Command::new("qemu-img")
        .args(["create", "-q", "-f", format.as_str()])
        .arg(path)
        .arg(DISK_BYTES.to_string())
        .status()
        .expect("qemu-img (Debian: qemu-utils)");
    assert!(done.success());
    for write in writes {
        run("qemu-io", &["-f", format.as_str(), "-c", write]);
    }
    let all = std::fs::Permissions::from_mode(0o666);
    std::fs::set_permissions(path, all).expect("its permissions");
}

/// A disk whose first sector counts in memory for ever.
fn make_counting_disk(path: &Path) {
    let mut disk = vec![0; 8 << 20];
    // xor ax,ax; mov ds,ax; again: inc dword [0x7e00]; jmp again
    let code = [0x31, 0xc0, 0x8e, 0xd8, 0x66, 0xff, 0x06, 0x00, 0x7e, 0xeb, 0xf9];
    disk[..code.len()].copy_from_slice(&code);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk[5 << 20..6 << 20].fill(0xc7);
    std::fs::write(path, disk).expect("a disk");
    let all = std::fs::Permissions::from_mode(0o666);
    std::fs::set_permissions(path, all).expect("its permissions");
}

fn disk(path: &Path, format: ImageFormat) -> DiskSpec {
    DiskSpec {
        id: "root".to_owned(),
        path: path.to_owned(),
        format,
        cache: CacheMode::Writeback,
        discard: true,
        read_only: false,
    }
}

/// A VM of the machine type that all versions know.
fn spec(folder: &Path, disks: Vec<DiskSpec>) -> LaunchSpec {
    LaunchSpec {
        name: "godwit".to_owned(),
        uuid: "5f1a6c1e-7a0b-4c55-9c55-0d5a4f1c0f01".to_owned(),
        ram_bytes: RAM_BYTES,
        // Replaced by `start`.
        ram_fd: -1,
        vcpus: 1,
        machine: "pc-q35-7.2".to_owned(),
        cpu: "qemu64".to_owned(),
        accelerator: Accelerator::Tcg,
        boot: BootSpec::default(),
        disks,
        nics: Vec::new(),
        runtime_dir: folder.to_owned(),
        incoming: false,
    }
}

struct Running {
    process: Guard,
    qmp: Qmp,
}

/// A process that is killed with its test.
struct Guard(QemuProcess);

impl std::ops::Deref for Guard {
    type Target = QemuProcess;

    fn deref(&self) -> &QemuProcess {
        &self.0
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let pid = i32::try_from(self.id.pid).ok().and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid
            && process::is_alive(&self.id)
        {
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
        }
    }
}

async fn start(folder: &Path, spec: &LaunchSpec) -> Running {
    start_as(&qemu_binary(), folder, spec).await
}

async fn start_as(binary: &Path, folder: &Path, spec: &LaunchSpec) -> Running {
    let memory = ram::create(spec.ram_bytes).expect("memory");
    start_with_ram(binary, folder, spec, memory).await
}

async fn start_with_ram(
    binary: &Path,
    folder: &Path,
    spec: &LaunchSpec,
    memory: OwnedFd,
) -> Running {
    let mut inherited = InheritedFds::default();
    let ram_fd = inherited.add(memory);
    let spec = LaunchSpec { ram_fd, ..spec.clone() };
    let args = launch::command_line(&spec, &facts(binary).await).expect("a VM that fits");
    let process = spawn(folder, binary, args, inherited).await;
    let qmp = process.wait_ready(&folder.join(launch::QMP_SOCKET), START_MAX).await;
    Running { process, qmp: qmp.expect("QEMU starts") }
}

async fn spawn(
    folder: &Path,
    binary: &Path,
    args: Vec<OsString>,
    inherited: InheritedFds,
) -> Guard {
    let spec = ProcessSpec {
        binary: binary.to_owned(),
        args,
        user: nobody(),
        cgroup: None,
        stderr_log: folder.join("qemu.log"),
        inherited,
    };
    Guard(process::spawn(&spec).await.expect("it starts"))
}
