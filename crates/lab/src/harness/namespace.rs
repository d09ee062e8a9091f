//! Named network namespaces, threads within them, and the processes they hold.
//!
//! **Invariant.** Only namespaces whose name begins with [`PREFIX`] are ever
//! made, deleted or emptied.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal};
use rustix::thread::LinkNameSpaceType;
use serde::{Deserialize, Serialize};

use crate::harness::exec;

/// Beginning of the names of all namespaces of the lab.
pub(crate) const PREFIX: &str = "lm-";
/// Longest time for killed processes to be gone, in milliseconds.
const EMPTY_TIMEOUT_MS: u64 = 10_000;

/// A named network namespace made by the lab.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Namespace {
    name: String,
}

impl Namespace {
    /// The namespace of that name; [`Namespace::create`] makes it.
    pub(crate) fn named(name: String) -> Result<Self> {
        ensure!(name.starts_with(PREFIX), "{name} is not a namespace of the lab");
        Ok(Self { name })
    }

    /// Makes it, with loopback up and IPv6 addresses usable at once.
    pub(crate) fn create(&self) -> Result<()> {
        exec::run("ip", &["netns", "add", &self.name])?;
        self.ip(&["link", "set", "lo", "up"])?;
        // Duplicate address detection would keep every new address silent for a second.
        let quiet = "for scope in all default; do \
                     echo 0 > /proc/sys/net/ipv6/conf/$scope/accept_dad; \
                     echo 0 > /proc/sys/net/ipv6/conf/$scope/dad_transmits; done";
        self.run(&["sh", "-c", quiet]).map(drop)
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip` on it.
    pub(crate) fn ip(&self, args: &[&str]) -> Result<String> {
        exec::run("ip", &[&["-n", &self.name], args].concat())
    }

    /// Runs `tc` on it.
    pub(crate) fn tc(&self, args: &[&str]) -> Result<String> {
        exec::run("tc", &[&["-n", &self.name], args].concat())
    }

    /// Runs a command in it.
    pub(crate) fn run(&self, args: &[&str]) -> Result<String> {
        exec::run("ip", &[&["netns", "exec", &self.name], args].concat())
    }

    /// Starts a thread in it. Sockets opened there belong to it for ever.
    pub(crate) fn thread<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<JoinHandle<Result<T>>> {
        let path = self.path();
        let file = std::fs::File::open(&path)
            .with_context(|| format!("opening namespace {}", path.display()))?;
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                rustix::thread::move_into_link_name_space(
                    std::os::fd::AsFd::as_fd(&file),
                    Some(LinkNameSpaceType::Network),
                )
                .context("entering a network namespace")?;
                work()
            })
            .context("starting a thread")
    }

    /// Does one thing in it and waits for the end of it.
    pub(crate) fn enter<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.thread("lab-enter", work)?
            .join()
            .map_err(|_| anyhow::anyhow!("a thread in namespace {} panicked", self.name))?
    }

    /// Whether it exists.
    pub(crate) fn exists(&self) -> bool {
        self.path().exists()
    }

    /// Processes that live in it; empty when it does not exist.
    pub(crate) fn pids(&self) -> Vec<Pid> {
        let Ok(own) = std::fs::metadata("/proc/self/ns/net") else { return Vec::new() };
        match std::fs::metadata(self.path()) {
            // The name can outlive a failed mount: then it is a plain file, and
            // never our own namespace.
            Ok(it) if it.ino() != own.ino() && it.dev() == own.dev() => pids_in(it.ino()),
            _ => Vec::new(),
        }
    }

    /// Kills all processes in it and deletes it. Does nothing when it is gone.
    pub(crate) fn destroy(&self) -> Result<()> {
        self.empty()?;
        if self.exists() {
            exec::run("ip", &["netns", "del", &self.name])?;
        }
        Ok(())
    }

    /// Kills all processes in it and waits for their end.
    pub(crate) fn empty(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_millis(EMPTY_TIMEOUT_MS);
        loop {
            let pids = self.pids();
            if pids.is_empty() {
                break;
            }
            ensure!(Instant::now() < deadline, "processes {pids:?} of {} do not end", self.name);
            for pid in pids {
                // It may have ended by itself meanwhile.
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }
}

/// All processes whose network namespace has that inode, zombies not counted.
fn pids_in(inode: u64) -> Vec<Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let pid = path.file_name()?.to_str()?.parse().ok().and_then(Pid::from_raw)?;
            // A zombie's namespace link cannot be read, so zombies fall out here.
            (std::fs::metadata(path.join("ns/net")).ok()?.ino() == inode).then_some(pid)
        })
        .collect()
}
