//! QEMU as its host's kernel sees it.

use anyhow::{Context, Result, ensure};

use crate::harness::host::Host;

/// A seccomp filter, in `/proc/PID/status`.
const FILTERED: &str = "2";

/// The one QEMU of a host.
fn only_one(host: &Host) -> Result<i32> {
    let pids = host.qemu_pids();
    ensure!(pids.len() == 1, "{} has {} QEMUs", host.name(), pids.len());
    Ok(pids[0].as_raw_nonzero().get())
}

/// The guest's memory on a host, as a path.
pub(crate) fn memory(host: &Host) -> Result<String> {
    let find = format!(
        "for fd in /proc/{}/fd/*; do readlink $fd | grep -q memfd && echo $fd; done | head -1",
        only_one(host)?
    );
    let found = host.run(&["sh", "-c", &find])?.trim().to_owned();
    ensure!(!found.is_empty(), "the QEMU of {} has no memfd", host.name());
    Ok(found)
}

/// Fails unless the host's QEMU is an unprivileged user's, without capabilities,
/// behind a seccomp filter, in a session and, where there are cgroups, one of its own.
pub(crate) fn is_confined(host: &Host, user: &str) -> Result<()> {
    let pid = only_one(host)?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| -> Result<Vec<&str>> {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        Ok(line.with_context(|| format!("no {name} in {status}"))?.split_whitespace().collect())
    };
    let uid = host.run(&["id", "-u", user])?;
    ensure!(field("Uid:")?.iter().all(|id| *id == uid.trim()), "its users: {:?}", field("Uid:")?);
    ensure!(!field("Gid:")?.contains(&"0") && !field("Groups:")?.contains(&"0"), "{status}");
    for capabilities in ["CapEff:", "CapPrm:", "CapInh:", "CapAmb:"] {
        let held = u64::from_str_radix(field(capabilities)?.concat().as_str(), 16)?;
        ensure!(held == 0, "{capabilities} {held:#x}");
    }
    ensure!(field("Seccomp:")? == [FILTERED], "without a seccomp filter: {status}");
    let own = rustix::process::Pid::from_raw(pid);
    ensure!(rustix::process::getsid(own)? == own.context("pid 0")?, "in the agent's session");
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    ensure!(!host.has_cgroup() || cgroup.contains("/limosa/"), "it is in {cgroup}");
    Ok(())
}
