//! Guest RAM: a memfd that the agent creates and QEMU inherits.
//!
//! ```text
//! agent ─ create ─► memfd ─ inherited ─► QEMU: memory-backend-file on /proc/self/fd/N
//!                     ▲
//! agent, restarted ───┴─ open: /proc/PID/fd/*
//! ```
//!
//! QEMU opens its own inherited descriptor, which it may do as any user: the mode of
//! a memfd admits everybody who has a link to it.
//!
//! **Invariants.** The size never changes: it is sealed, so that QEMU cannot truncate
//! memory that the agent maps. The memory lives as long as a process holds it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, SealFlags};

use crate::process::{ProcessError, ProcessId};

/// Name of the memfd.
const NAME: &str = "limosa-ram";
/// Link to the memfd, as `/proc` shows it.
const LINK: &str = "/memfd:limosa-ram (deleted)";
/// The size stays, and so do the seals.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// Creates the memory of a guest, all zero and not yet allocated.
///
/// # Errors
/// The kernel's.
pub fn create(size_bytes: u64) -> io::Result<OwnedFd> {
    let memfd = rustix::fs::memfd_create(NAME, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&memfd, size_bytes)?;
    rustix::fs::fcntl_add_seals(&memfd, SEALS)?;
    Ok(memfd)
}

/// Opens the memory of a running QEMU's guest.
///
/// The result is an open file description of its own, which outlives QEMU.
///
/// # Errors
/// [`ProcessError::NoRam`] when QEMU holds no sealed memory of that size.
pub fn open(id: &ProcessId, size_bytes: u64) -> Result<File, ProcessError> {
    let at = |source| ProcessError::Kernel { pid: id.pid, source };
    for entry in std::fs::read_dir(format!("/proc/{}/fd", id.pid)).map_err(at)? {
        let path = entry.map_err(at)?.path();
        // QEMU may close a descriptor at any time.
        if !std::fs::read_link(&path).is_ok_and(|link| link.as_os_str() == LINK) {
            continue;
        }
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(at)?;
        let seals = rustix::fs::fcntl_get_seals(&file).map_err(|error| at(error.into()))?;
        if seals.contains(SEALS) && file.metadata().map_err(at)?.len() == size_bytes {
            return Ok(file);
        }
    }
    Err(ProcessError::NoRam { pid: id.pid, size_bytes })
}
