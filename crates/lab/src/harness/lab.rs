//! A lab: hosts and a client, joined by networks, made and taken down as one.
//!
//! **Invariants.** Everything is named in the [`Record`] before it is made.
//! Dropping a lab takes all of it down, whatever happened in between.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use crate::harness::host::{Host, Storage};
use crate::harness::namespace::Namespace;
use crate::harness::net::{Cut, Net};
use crate::harness::record::{self, Record};
use crate::harness::{paths, signals};

/// What a lab is to consist of.
#[derive(Debug, Clone)]
pub(crate) struct Topology {
    /// Hosts by short name, with their storage
    pub hosts: Vec<(&'static str, Storage)>,
    /// Speed of each migration link, in Mbit/s; `None` is as fast as it goes
    pub links_mbit: Vec<Option<u32>>,
}

impl Default for Topology {
    /// Two hosts and one link of 1 Gbit/s.
    fn default() -> Self {
        Self {
            hosts: vec![("a", Storage::Folder), ("b", Storage::Folder)],
            links_mbit: vec![Some(1000)],
        }
    }
}

/// A lab that is up.
#[derive(Debug)]
pub(crate) struct Lab {
    record: Record,
    hosts: Vec<Host>,
    stays: bool,
}

impl Lab {
    /// Builds a lab. Needs root.
    pub(crate) fn up(topology: &Topology) -> Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "the lab makes namespaces: run it as root");
        record::remove_leftovers();
        let record = Self::plan_record(topology)?;
        record.save()?;
        signals::watch(record.clone());
        // From here on, dropping it takes everything down.
        let mut lab = Self { record, hosts: Vec::new(), stays: false };
        lab.build(topology).context("building the lab")?;
        Ok(lab)
    }

    /// The lab of that record, or the only one that was meant to stay.
    pub(crate) fn attach(id: Option<&str>) -> Result<Self> {
        let mut records = Record::all();
        records.retain(|record| match id {
            Some(id) => record.id == id,
            None => record.owner.is_none(),
        });
        ensure!(records.len() < 2, "several labs are up: choose one with --id");
        let record = records.pop().context("no lab is up: start one with `limosa-lab up`")?;
        let hosts = (0..record.net.hosts.len())
            .map(|index| Host::attach(&record, index))
            .collect::<Result<_>>()?;
        Ok(Self { record, hosts, stays: true })
    }

    /// Lets the lab stay after the end of this process, until it is taken down.
    pub(crate) fn keep(mut self) -> Result<String> {
        self.record.owner = None;
        self.record.save()?;
        signals::forget(&self.record.id);
        self.stays = true;
        Ok(self.record.id.clone())
    }

    /// Takes the lab down and tells what went wrong in that.
    pub(crate) fn down(mut self) -> Result<()> {
        self.stays = true;
        self.hosts.clear();
        signals::forget(&self.record.id);
        self.record.teardown()
    }

    /// A host by its short name; panics when the plan had no such host.
    pub(crate) fn host(&self, name: &str) -> &Host {
        let found = self.hosts.iter().find(|host| host.name() == name);
        found.expect("scenarios name only hosts of their own plan")
    }

    /// Like [`Lab::host`], to start and stop its agent.
    pub(crate) fn host_mut(&mut self, name: &str) -> &mut Host {
        let found = self.hosts.iter_mut().find(|host| host.name() == name);
        found.expect("scenarios name only hosts of their own plan")
    }

    /// All hosts.
    pub(crate) fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// All hosts, to start and stop their agents.
    pub(crate) fn hosts_mut(&mut self) -> &mut [Host] {
        &mut self.hosts
    }

    /// Cuts the power of hosts at once, by number, and boots them: first their links
    /// fall silent, so that nobody hears them die; then all of their processes go,
    /// and their networks with TAPs, bridges and sockets. Agents are not started, and
    /// migration links stay cut: see [`Net::restore`], [`Net::set_speed`].
    pub(crate) fn power_cycle(&mut self, indexes: &[usize]) -> Result<()> {
        let net = &self.record.net;
        for index in indexes {
            for link in 0..net.link_count {
                // At the switch: the other hosts' own cables stay in.
                net.cut(link, &net.hosts[*index].0, Cut::Cable)?;
            }
        }
        for index in indexes {
            self.hosts[*index].power_off()?;
        }
        for index in indexes {
            net.renew(*index)?;
            self.hosts[*index].boot()?;
        }
        Ok(())
    }

    /// Its networks.
    pub(crate) fn net(&self) -> &Net {
        &self.record.net
    }

    /// The outside client's namespace.
    pub(crate) fn client(&self) -> &Namespace {
        &self.record.net.client
    }

    /// Copies all logs into `folder`.
    pub(crate) fn save_logs(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder)?;
        for host in &self.hosts {
            let logs = std::fs::read_dir(host.log_dir())?;
            for entry in logs.flatten() {
                let name = format!("{}-{}", host.name(), entry.file_name().to_string_lossy());
                std::fs::copy(entry.path(), folder.join(name))?;
            }
        }
        Ok(())
    }

    fn plan_record(topology: &Topology) -> Result<Record> {
        let id = fresh_id()?;
        let names: Vec<_> = topology.hosts.iter().map(|(name, _)| *name).collect();
        let pid = rustix::process::getpid();
        let started = record::start_ticks(pid).context("reading our own start time")?;
        let root = record::cgroup_root();
        Ok(Record {
            owner: Some((pid.as_raw_nonzero().get(), started)),
            net: Net::named(&id, &names, topology.links_mbit.len())?,
            cgroups: root.into_iter().map(|root| root.join(format!("limosa-lab-{id}"))).collect(),
            work: paths::lab_dir().join("work").join(&id),
            id,
        })
    }

    fn build(&mut self, topology: &Topology) -> Result<()> {
        std::fs::create_dir_all(&self.record.work)
            .with_context(|| format!("making {}", self.record.work.display()))?;
        self.record.net.create()?;
        for (link, mbit) in topology.links_mbit.iter().enumerate() {
            if mbit.is_some() {
                self.record.net.set_speed(link, *mbit)?;
            }
        }
        for (index, (_, storage)) in topology.hosts.iter().enumerate() {
            self.hosts.push(Host::create(&self.record, index, *storage)?);
        }
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.stays {
            self.hosts.clear();
            signals::forget(&self.record.id);
            // The record stays when this fails, and the next run tries again.
            let _ = self.record.teardown();
        }
    }
}

/// A name that no other run on this machine has now.
fn fresh_id() -> Result<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    let mix = now.as_nanos() ^ (u128::from(std::process::id()) << 20);
    let id = format!("{:05x}", mix & 0xf_ffff);
    let taken = PathBuf::from(paths::RECORDS).join(format!("{id}.json")).exists();
    ensure!(!taken, "the name {id} is taken: try again");
    Ok(id)
}
