//! Guests: made by scripts from Debian's packages, kept in the cache.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::harness::{exec, paths};

/// Longest time to fetch and make the tiny guest, in seconds.
const TINY_TIMEOUT_S: u32 = 300;
/// Longest time to fetch and make the full guest, in seconds.
const FULL_TIMEOUT_S: u32 = 1_200;

/// A kernel and what it boots from.
#[derive(Debug, Clone)]
pub(crate) struct TinyGuest {
    /// Kernel image
    pub kernel: PathBuf,
    /// Initial RAM disk
    pub initrd: PathBuf,
}

/// The tiny guest; made when it is not there yet.
pub(crate) fn tiny() -> Result<TinyGuest> {
    let workload = paths::workload()?;
    let folder = make("make-tiny-guest", TINY_TIMEOUT_S, &[&paths::cache_dir(), &workload])?;
    Ok(TinyGuest { kernel: folder.join("kernel"), initrd: folder.join("initrd") })
}

/// A Debian with PostgreSQL.
#[derive(Debug, Clone)]
pub(crate) struct FullGuest {
    /// Kernel image
    pub kernel: PathBuf,
    /// Initial RAM disk
    pub initrd: PathBuf,
    /// Its disk; to be copied, not used
    pub disk: PathBuf,
    /// Its system in a folder
    pub root: PathBuf,
}

/// The full guest; made when it is not there yet.
pub(crate) fn full() -> Result<FullGuest> {
    let workload = paths::workload()?;
    let folder = make("make-full-guest", FULL_TIMEOUT_S, &[&paths::cache_dir(), &workload])?;
    Ok(FullGuest {
        kernel: folder.join("kernel"),
        initrd: folder.join("initrd"),
        disk: folder.join("disk.qcow2"),
        root: folder.join("root"),
    })
}

/// Runs a script that keeps something in the cache; returns the path it prints.
/// One at a time, also with other labs on the same cache.
pub(crate) fn make(script: &str, limit_s: u32, args: &[&Path]) -> Result<PathBuf> {
    let cache = paths::cache_dir();
    std::fs::create_dir_all(&cache)?;
    let lock = File::create(cache.join("lock"))?;
    lock.lock().context("waiting for another lab that makes something in the cache")?;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts").join(script);
    let mut command = exec::limited(limit_s, path);
    command.args(args);
    let output = exec::output(&mut command)?;
    let told = exec::stdout_of(&command, &output).with_context(|| format!("running {script}"))?;
    let made = PathBuf::from(told.trim());
    ensure!(made.exists(), "{script} made nothing: {told}");
    Ok(made)
}
