//! The hosts and the one VM that all runs of a series share.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use limosa_faults::FOLDER_VARIABLE;
use limosa_protocol::api::{Power, Vm};
use limosa_protocol::migration::Migration;
use serde_json::{Value, json};

use super::plan::{Initial, Shape};
use crate::harness::api::{self, Answer};
use crate::harness::client::status;
use crate::harness::host::{Host, Storage};
use crate::harness::lab::{Lab, Topology};
use crate::harness::net;
use crate::harness::scene::BOOT_TIMEOUT;
use crate::harness::steps::{self, Wanted};
use crate::harness::tiny;

/// The VM's name.
pub(super) const VM: &str = "web1";
/// Its memory, in MiB: little, so that a run is short.
const MEMORY_MIB: u64 = 192;
/// What each host has for its VMs, in MiB, so that it can become full.
const STORAGE_MIB: u32 = 512;
/// Longest wait for one answer of an agent while faults strike.
const ANSWER_LIMIT: Duration = Duration::from_millis(1_500);
/// Longest wait for a change of a VM that nothing disturbs.
const CHANGE_LIMIT: Duration = Duration::from_secs(60);

/// A lab with a VM.
#[derive(Debug)]
pub(super) struct Setup<'lab> {
    pub(super) lab: &'lab mut Lab,
    /// Index of the host that has the VM
    pub(super) at: usize,
    shape: Shape,
    /// Boot of the guest that runs, as the guest tells
    pub(super) boot: Option<String>,
    /// How far each disk's journal was durable when the guest reported last
    durable: Vec<u64>,
}

/// Hosts of a lab for chaos.
pub(crate) fn topology() -> Topology {
    let storage = Storage::Limited { mib: STORAGE_MIB };
    Topology { hosts: vec![("a", storage), ("b", storage)], links_mbit: vec![Some(1000)] }
}

impl<'lab> Setup<'lab> {
    /// Starts the agents of a lab, and makes a VM at the host of that number.
    pub(super) fn start_agents(lab: &'lab mut Lab, shape: Shape, at: usize) -> Result<Self> {
        let mut setup = Self { lab, at, shape, boot: None, durable: vec![0; shape.disks.len()] };
        for index in 0..setup.lab.hosts().len() {
            setup.launch_agent(index)?;
            setup.host_mut(index).wait_for_agent()?;
        }
        steps::join(setup.lab)?;
        steps::create(setup.host(at), &setup.wanted()?)?;
        Ok(setup)
    }

    pub(super) fn host(&self, index: usize) -> &Host {
        &self.lab.hosts()[index]
    }

    pub(super) fn host_mut(&mut self, index: usize) -> &mut Host {
        &mut self.lab.hosts_mut()[index]
    }

    fn wanted(&self) -> Result<Wanted> {
        let tiny = tiny::wanted(VM, MEMORY_MIB, self.shape.dirty_mb_s)?;
        Ok(Wanted { disks: self.shape.disks.to_vec(), ..tiny })
    }

    /// Starts an agent that can be made to fail; does not wait until it answers.
    pub(super) fn launch_agent(&mut self, index: usize) -> Result<()> {
        let host = self.host_mut(index);
        let config = steps::agent_config(host, None, "");
        let folder = host.fault_dir();
        host.launch_agent(&config, &[(FOLDER_VARIABLE, &folder.to_string_lossy())])
    }

    /// Replaces the VM by one of another shape, unless it has that already.
    pub(super) fn reshape(&mut self, shape: Shape) -> Result<()> {
        if self.shape == shape {
            return Ok(());
        }
        self.bring_to(Initial::Off, true)?;
        self.ask(self.at, "DELETE", &format!("/v1/vms/{VM}"), None)?.read::<Value>()?;
        self.shape = shape;
        self.durable = vec![0; shape.disks.len()];
        steps::create(self.host(self.at), &self.wanted()?).map(drop)
    }

    /// Brings the VM into a state, and checks its guest on the way there.
    ///
    /// - `by_force`: a guest that must go off is not asked.
    pub(super) fn bring_to(&mut self, initial: Initial, by_force: bool) -> Result<()> {
        let vm = self.look(self.at)?.context("the VM is not where it should be")?;
        match (vm.power, initial) {
            (Power::Off, Initial::Off) => return Ok(()),
            (Power::Off, _) => self.start()?,
            (Power::Paused, Initial::Running) => self.change("resume")?,
            (Power::Running | Power::Paused, Initial::Off) => {
                if vm.power == Power::Paused {
                    self.change("resume")?;
                }
                let order = json!({"force": by_force, "timeout_seconds": 30});
                self.ask(self.at, "POST", &format!("/v1/vms/{VM}/stop"), Some(&order))?
                    .read::<Value>()
                    .context("turning the VM off")?;
                self.boot = None;
                return self.wait_for(Power::Off);
            }
            (Power::Running | Power::Paused, _) => {}
            (other, _) => bail!("the VM is {other:?} between two runs"),
        }
        if initial == Initial::Paused {
            return self.change("pause");
        }
        Ok(())
    }

    /// Starts the VM where it is, and waits until its guest has looked at its
    /// disks and answers; fails when they are not what they were.
    pub(super) fn start(&mut self) -> Result<()> {
        self.change("start")?;
        let status = status::wait(self.lab.client(), net::guest_v4(0), BOOT_TIMEOUT)
            .context("the guest does not come up")?;
        ensure!(status["errors"] == 0, "the guest found something wrong: {status}");
        status::assert_recovered(&status, &self.durable)?;
        self.boot = Some(boot_of(&status)?);
        Ok(())
    }

    /// Starts, pauses or resumes the VM.
    pub(super) fn change(&self, order: &str) -> Result<()> {
        let answer = self.ask(self.at, "POST", &format!("/v1/vms/{VM}/{order}"), None)?;
        answer.read::<Value>().with_context(|| format!("{order} of the VM")).map(drop)
    }

    /// Lets the guest compare all its memory and each block of its disks; fails when
    /// anything is wrong inside, or when it is not the boot that it should be.
    pub(super) fn check_guest(&mut self) -> Result<()> {
        let client = self.lab.client();
        status::wait(client, net::guest_v4(0), Duration::from_secs(20))?;
        let status = status::check(client, net::guest_v4(0))?;
        ensure!(status["errors"] == 0, "the guest found something wrong: {status}");
        let (boot, told) = (boot_of(&status)?, self.boot.as_ref());
        ensure!(
            told.is_none_or(|told| *told == boot),
            "it is another boot of the guest: {boot}, and not {told:?}"
        );
        if told.is_none() {
            status::assert_recovered(&status, &self.durable)?;
        }
        self.boot = Some(boot);
        self.durable = status::durable(&status)?;
        Ok(())
    }

    fn wait_for(&self, power: Power) -> Result<()> {
        let until = std::time::Instant::now() + CHANGE_LIMIT;
        loop {
            let now = self.look(self.at)?.map(|vm| vm.power);
            if now == Some(power) {
                return Ok(());
            }
            ensure!(std::time::Instant::now() < until, "the VM is {now:?} and not {power:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The VM as a host sees it; `None` when that one does not have it.
    pub(super) fn look(&self, index: usize) -> Result<Option<Vm>> {
        let answer = self.ask_soon(index, "GET", &format!("/v1/vms/{VM}"))?;
        if answer.status == 404 { Ok(None) } else { answer.read().map(Some) }
    }

    /// All migrations that a host tells of.
    pub(super) fn migrations(&self, index: usize) -> Result<Vec<Migration>> {
        self.ask_soon(index, "GET", "/v1/migrations")?.read()
    }

    /// Asks an agent that may be about to die.
    pub(super) fn ask_soon(&self, index: usize, method: &str, path: &str) -> Result<Answer> {
        let socket = self.host(index).agent_socket();
        api::ask_within::<Value>(&socket, method, path, None, ANSWER_LIMIT)
    }

    fn ask(&self, index: usize, method: &str, path: &str, body: Option<&Value>) -> Result<Answer> {
        self.host(index).api(method, path, body)
    }
}

fn boot_of(status: &Value) -> Result<String> {
    Ok(status["boot_id"].as_str().context("the guest does not tell its boot")?.to_owned())
}
