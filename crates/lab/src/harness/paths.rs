//! Where the lab finds the product's programs and keeps its own files.
//!
//! ```text
//! .lab/work/ID/    files of one run, removed at its end
//! .lab/cache/      guests and packages, kept
//! .lab/failed/     logs of scenarios that failed, kept until the next run
//! .lab/report/     the last demo's and benchmark's reports
//! /run/limosa-lab/ one record for each run that is alive
//! ```

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Records of runs that are alive. On a tmpfs, as namespaces do not outlive a boot either.
pub(crate) const RECORDS: &str = "/run/limosa-lab";

/// The folder of everything the lab keeps: `LIMOSA_LAB_DIR`, else `.lab` in the workspace.
pub(crate) fn lab_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("LIMOSA_LAB_DIR") {
        return PathBuf::from(dir);
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    match workspace.canonicalize() {
        Ok(workspace) => workspace.join(".lab"),
        Err(_) => PathBuf::from("/var/tmp/limosa-lab"),
    }
}

/// The folder of guests and packages: `LIMOSA_LAB_CACHE`, else in [`lab_dir`].
pub(crate) fn cache_dir() -> PathBuf {
    std::env::var_os("LIMOSA_LAB_CACHE").map_or_else(|| lab_dir().join("cache"), PathBuf::from)
}

/// A program of the product: in `LIMOSA_BIN_DIR`, else beside this one.
pub(crate) fn product(name: &str) -> Result<PathBuf> {
    let dir = match std::env::var_os("LIMOSA_BIN_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => {
            let own = std::env::current_exe().context("asking for the path of this program")?;
            let dir = own.parent().context("this program lies in no folder")?;
            // Test programs lie one folder deeper.
            if dir.ends_with("deps") { dir.join("..") } else { dir.to_owned() }
        }
    };
    let path = dir.join(name);
    if !path.is_file() {
        bail!("{} is missing: run `make build`, or set LIMOSA_BIN_DIR", path.display());
    }
    path.canonicalize().with_context(|| format!("resolving {}", path.display()))
}

/// The guest's program: `LIMOSA_WORKLOAD`, else where `make workload` puts it,
/// beside this program's folder.
pub(crate) fn workload() -> Result<PathBuf> {
    let path = match std::env::var_os("LIMOSA_WORKLOAD") {
        Some(path) => PathBuf::from(path),
        None => product("limosa-lab")?
            .ancestors()
            .nth(2)
            .context("this program lies in no target folder")?
            .join("guest/release/limosa-workload"),
    };
    if !path.is_file() {
        bail!("{} is missing: run `make workload`, or set LIMOSA_WORKLOAD", path.display());
    }
    Ok(path)
}
