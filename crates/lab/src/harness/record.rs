//! What a run writes down before it makes anything, so that whoever comes next
//! can take it all away.
//!
//! ```text
//! run ─► record on disk ─► namespaces, processes, folders
//!            │
//!            └─► teardown: by the run itself, on a signal, by `limosa-lab down`,
//!                or by the next run when this one is dead
//! ```
//!
//! **Invariant.** A record is written before the first thing that it names is
//! made, and removed after the last of them is gone.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use crate::harness::net::Net;
use crate::harness::paths;

/// Everything of one run that outlives its process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Short name, unique on this machine
    pub id: String,
    /// Process of the run and its start time in clock ticks since boot;
    /// missing when the lab stays until it is taken down
    pub owner: Option<(i32, u64)>,
    /// Namespaces
    pub net: Net,
    /// Control groups of the hosts
    pub cgroups: Vec<PathBuf>,
    /// Folder of the run's files
    pub work: PathBuf,
}

impl Record {
    /// Writes the record.
    pub(crate) fn save(&self) -> Result<()> {
        std::fs::create_dir_all(paths::RECORDS).context("making the folder of records")?;
        let path = self.path();
        // A half-written record must never be read: write aside, then rename.
        let aside = path.with_extension("new");
        std::fs::write(&aside, serde_json::to_vec_pretty(self)?)
            .and_then(|()| std::fs::rename(&aside, &path))
            .with_context(|| format!("writing {}", path.display()))
    }

    /// All records on this machine. Unreadable ones are left out.
    pub(crate) fn all() -> Vec<Self> {
        let Ok(entries) = std::fs::read_dir(paths::RECORDS) else { return Vec::new() };
        entries
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                let is_record = path.extension().is_some_and(|ending| ending == "json");
                is_record.then(|| serde_json::from_slice(&std::fs::read(path).ok()?).ok())?
            })
            .collect()
    }

    /// Whether the run still goes on, or the lab is meant to stay.
    pub(crate) fn is_alive(&self) -> bool {
        self.owner.is_none_or(|(pid, started)| {
            Pid::from_raw(pid).and_then(start_ticks).is_some_and(|now| now == started)
        })
    }

    /// Takes away everything of the run. May be repeated.
    pub(crate) fn teardown(&self) -> Result<()> {
        for namespace in self.net.namespaces() {
            namespace.destroy()?;
        }
        for cgroup in &self.cgroups {
            remove_cgroup(cgroup);
        }
        if self.work.exists() {
            std::fs::remove_dir_all(&self.work)
                .with_context(|| format!("removing {}", self.work.display()))?;
        }
        match std::fs::remove_file(self.path()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).context("removing the record")
            }
            _ => Ok(()),
        }
    }

    fn path(&self) -> PathBuf {
        Path::new(paths::RECORDS).join(format!("{}.json", self.id))
    }
}

/// Takes away what runs left behind that are dead. Returns their names.
pub(crate) fn remove_leftovers() -> Vec<String> {
    let dead = Record::all().into_iter().filter(|record| !record.is_alive());
    dead.filter_map(|record| record.teardown().is_ok().then_some(record.id)).collect()
}

/// When a process started, in clock ticks since boot: with its number, its identity.
pub(crate) fn start_ticks(pid: Pid) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // The second field is the name in brackets and may hold anything.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(19)?.parse().ok()
}

/// The mount point of the unified control group hierarchy, if there is one.
pub(crate) fn cgroup_root() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (place, kind) = (fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(place))
    })
}

/// Removes a control group and the empty ones within it.
pub(crate) fn remove_cgroup(cgroup: &Path) {
    let Ok(entries) = std::fs::read_dir(cgroup) else { return };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    // A killed process leaves its group a moment later; an empty group that
    // stays for that reason harms nobody.
    for _ in 0..50 {
        if std::fs::remove_dir(cgroup).is_ok() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a record belongs to one process only, not to the next one of that number.
    #[test]
    fn a_reused_process_number_is_not_alive() {
        let own = rustix::process::getpid();
        let ticks = start_ticks(own).unwrap();
        let mut record = Record {
            id: "test".into(),
            owner: Some((own.as_raw_nonzero().get(), ticks)),
            net: Net::named("test", &["a"], 0).unwrap(),
            cgroups: Vec::new(),
            work: PathBuf::from("/nonexistent"),
        };
        assert!(record.is_alive());
        record.owner = Some((own.as_raw_nonzero().get(), ticks + 1));
        assert!(!record.is_alive());
        record.owner = None;
        assert!(record.is_alive());
    }
}
