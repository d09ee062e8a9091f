//! One run: a move, faults at their points, and all that follows until both
//! hosts have settled it.
//!
//! ```text
//! arm ─► move ─► reached? ─► strike, arm the next ─► let go ─┐
//!         ▲                                                  │ later: repair the link, make
//!         └──────────── look every few ms ◄──────────────────┘ place, start dead agents
//! settled: both agents answer, nothing is left to repair, one host has the VM
//! ```
//!
//! **Invariant.** Whatever a fault broke is repaired at its time, whether or not
//! anything waits for it: a run always comes to a world without faults.

use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use limosa_faults::{ARMED_FILE, Action, Armed, REACHED_PREFIX};
use limosa_protocol::api::{FailureCode, Power};

use crate::faults::steps::Side;
use limosa_protocol::migration::{Migration, Outcome};
use serde_json::{Value, json};

use super::plan::{Fault, Injection, Plan};
use super::setup::{Setup, VM};
use crate::harness::api::{self, Answer};
use crate::harness::net::Cut;

/// Longest time for both hosts to settle once nothing is broken any more.
const SETTLE_MAX: Duration = Duration::from_secs(90);
/// How often points are looked at.
const TICK: Duration = Duration::from_millis(2);
/// How often agents are asked how they stand.
const ASK_EVERY: Duration = Duration::from_millis(60);
/// Longest wait for a process that was killed.
const DEATH_MAX: Duration = Duration::from_secs(5);
/// Longest wait of an operator for an answer to an order.
const ORDER_LIMIT: Duration = Duration::from_secs(120);
/// How long a full disk stays full beyond a link's time, in milliseconds.
const FULL_MS: u64 = 1_500;

/// What happened in a run.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// For each fault, whether its point was reached
    pub(super) struck: Vec<bool>,
    /// Hosts whose QEMU of the VM was killed
    pub(super) qemu_killed: [bool; 2],
    /// An operator's order to start the VM was obeyed
    pub(super) was_started: bool,
    /// The agent told of doubt
    pub(super) was_in_doubt: bool,
    /// From a world without faults to one host that has the VM
    pub(super) settled_in: Duration,
    /// What an agent's own migration says at the end
    pub(super) told: Option<(Option<Outcome>, Option<String>)>,
    /// Why the move was refused, when it was
    pub(super) refused: Option<String>,
}

/// What is still to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Later {
    StartAgent(usize),
    /// Links and agent of a host that was without power
    Boot(usize),
    RestoreLink,
    FreeDisk,
}

/// A run that goes on.
pub(super) struct Trial<'a, 'lab> {
    setup: &'a mut Setup<'lab>,
    injections: &'a [Injection],
    verifies_all: bool,
    link_mbit: u32,
    source: usize,
    seen: Seen,
    /// The fault that is armed
    current: usize,
    later: Vec<(Instant, Later)>,
    away: Duration,
    orders: Vec<JoinHandle<Result<Answer>>>,
    request: Option<JoinHandle<Result<Answer>>>,
    migration: Option<Migration>,
}

/// Does what was drawn, and returns when all is settled.
pub(super) fn run(setup: &mut Setup<'_>, plan: &Plan) -> Result<Seen> {
    let source = setup.at;
    let seen = Seen { struck: vec![false; plan.injections.len()], ..Seen::default() };
    let mut trial = Trial {
        setup,
        injections: &plan.injections,
        verifies_all: plan.verifies_all,
        link_mbit: plan.link_mbit,
        source,
        seen,
        current: 0,
        later: Vec::new(),
        away: Duration::ZERO,
        orders: Vec::new(),
        request: None,
        migration: None,
    };
    let ended = trial.go();
    // Nobody may hold at a point, nor a link be cut, after the run.
    let repaired = trial.repair_all();
    ended?;
    repaired?;
    Ok(trial.seen)
}

impl Trial<'_, '_> {
    fn index(&self, side: Side) -> usize {
        match side {
            Side::Source => self.source,
            Side::Destination => 1 - self.source,
        }
    }

    fn go(&mut self) -> Result<()> {
        self.arm()?;
        let to = self.setup.host(1 - self.source).name();
        let verify = if self.verifies_all { "full" } else { "running" };
        let order = json!({"to": to, "verify": verify});
        self.request = Some(self.order(self.source, format!("/v1/vms/{VM}/move"), Some(order)));
        let mut quiet_since = None;
        let mut asked = Instant::now();
        loop {
            self.strike_if_reached()?;
            self.do_what_is_due()?;
            self.notice_deaths()?;
            if asked.elapsed() > ASK_EVERY && self.injection().is_none() && !self.later.is_empty() {
                asked = Instant::now();
                self.notice_doubt();
            }
            let is_quiet = self.later.is_empty() && self.agents_answer();
            let since = *quiet_since.get_or_insert_with(Instant::now);
            if !is_quiet {
                quiet_since = None;
            } else if asked.elapsed() > ASK_EVERY {
                asked = Instant::now();
                let settled = self.is_settled();
                // Asking takes a moment in which a point may have been reached.
                if matches!(settled, Ok(true)) && !self.is_reached() {
                    self.seen.settled_in = since.elapsed();
                    return Ok(());
                }
                if since.elapsed() > SETTLE_MAX {
                    let why = settled.err().map_or(String::new(), |error| format!("; {error:#}"));
                    bail!(
                        "it is not settled after {} s: {}{why}",
                        SETTLE_MAX.as_secs(),
                        self.standing()
                    );
                }
            }
            std::thread::sleep(TICK);
        }
    }

    /// Asks those agents that answer while something is still broken: a doubt is gone
    /// soon once nothing is.
    fn notice_doubt(&mut self) {
        for index in 0..2 {
            let doubt = self.setup.look(index).ok().flatten().and_then(|vm| vm.doubt);
            self.seen.was_in_doubt |= doubt.is_some();
        }
    }

    /// Gives an order that may be answered late, or never.
    fn order(&self, index: usize, path: String, body: Option<Value>) -> JoinHandle<Result<Answer>> {
        let socket = self.setup.host(index).agent_socket();
        std::thread::spawn(move || {
            api::ask_within(&socket, "POST", &path, body.as_ref(), ORDER_LIMIT)
        })
    }

    fn injection(&self) -> Option<Injection> {
        self.injections.get(self.current).copied()
    }

    fn fault_file(&self, injection: &Injection, name: &str) -> PathBuf {
        self.setup.host(self.index(injection.step.side)).fault_dir().join(name)
    }

    fn reached_file(&self, injection: &Injection) -> PathBuf {
        self.fault_file(
            injection,
            &format!("{REACHED_PREFIX}{}", injection.step.point(injection.edge)),
        )
    }

    /// Arms the current fault, if there is one left.
    fn arm(&self) -> Result<()> {
        let Some(injection) = self.injection() else { return Ok(()) };
        let action = match injection.fault {
            Fault::KillAgent => Action::Kill,
            Fault::FailStore => Action::FailStore,
            _ => Action::Hold,
        };
        let armed =
            Armed { point: injection.step.point(injection.edge), action, skip: injection.skip };
        let aside = self.fault_file(&injection, "arming");
        std::fs::write(&aside, armed.to_string())?;
        std::fs::rename(&aside, self.fault_file(&injection, ARMED_FILE)).context("arming a point")
    }

    fn is_reached(&self) -> bool {
        self.injection().is_some_and(|injection| self.reached_file(&injection).exists())
    }

    fn strike_if_reached(&mut self) -> Result<()> {
        let Some(injection) = self.injection().filter(|_| self.is_reached()) else { return Ok(()) };
        let reached = self.reached_file(&injection);
        self.seen.struck[self.current] = true;
        self.away = Duration::from_millis(injection.away_ms);
        self.strike(&injection).with_context(|| format!("striking: {injection}"))?;
        self.current += 1;
        self.arm()?;
        std::fs::remove_file(reached).context("letting go")
    }

    fn strike(&mut self, injection: &Injection) -> Result<()> {
        let (source, destination) = (self.source, 1 - self.source);
        match injection.fault {
            Fault::KillAgent => self.wait_for_death(self.index(injection.step.side))?,
            Fault::KillAgents => self.kill_agents(&[source, destination])?,
            Fault::KillSourceQemu => self.kill_qemu(&[source]),
            Fault::KillDestinationQemu => self.kill_qemu(&[destination]),
            Fault::KillQemus => self.kill_qemu(&[source, destination]),
            Fault::PowerCutSource => self.cut_power(&[source])?,
            Fault::PowerCutDestination => self.cut_power(&[destination])?,
            Fault::PowerCutBoth => self.cut_power(&[source, destination])?,
            Fault::CutCable | Fault::CutSilently | Fault::CutOneWay => self.cut_link(injection)?,
            // The agent did it; what it says next tells that it must be restarted.
            Fault::FailStore => {}
            Fault::FillDisk => self.fill_disk(injection)?,
            Fault::CancelAtSource => self.cancel(source),
            Fault::CancelAtDestination => self.cancel(destination),
            Fault::StartSomewhere => {
                let path = format!("/v1/vms/{VM}/start");
                let order = self.order(self.index(injection.side), path, None);
                self.orders.push(order);
            }
        }
        Ok(())
    }

    fn wait_for_death(&mut self, index: usize) -> Result<()> {
        let until = Instant::now() + DEATH_MAX;
        while self.setup.host_mut(index).agent_ended()?.is_none() {
            if Instant::now() > until {
                bail!("the agent of {} did not kill itself", self.setup.host(index).name());
            }
            std::thread::sleep(TICK);
        }
        Ok(())
    }

    fn kill_agents(&mut self, indexes: &[usize]) -> Result<()> {
        for index in indexes {
            self.setup.host_mut(*index).kill_agent()?;
            self.schedule(self.away, Later::StartAgent(*index));
        }
        Ok(())
    }

    fn kill_qemu(&mut self, indexes: &[usize]) {
        for index in indexes {
            if self.setup.host(*index).kill_qemu() > 0 {
                self.seen.qemu_killed[*index] = true;
            }
        }
    }

    /// Hosts are gone at once, and nobody hears it; they boot, and their agents come
    /// with the links a while later.
    fn cut_power(&mut self, indexes: &[usize]) -> Result<()> {
        for index in indexes {
            self.seen.qemu_killed[*index] |= !self.setup.host(*index).qemu_pids().is_empty();
        }
        self.setup.lab.power_cycle(indexes)?;
        for index in indexes {
            self.later.retain(|(_, what)| *what != Later::StartAgent(*index));
            self.schedule(self.away, Later::Boot(*index));
        }
        Ok(())
    }

    fn cut_link(&mut self, injection: &Injection) -> Result<()> {
        let name = self.setup.host(self.index(injection.side)).name().to_owned();
        let net = self.setup.lab.net();
        match injection.fault {
            Fault::CutCable => net.cut(0, &name, Cut::Cable)?,
            Fault::CutSilently => net.cut(0, &name, Cut::Silent)?,
            _ => net.deafen(0, &name)?,
        }
        self.schedule(Duration::from_millis(injection.lasts_ms), Later::RestoreLink);
        Ok(())
    }

    fn fill_disk(&mut self, injection: &Injection) -> Result<()> {
        let fill = "cd /var/lib/limosa; fallocate -l $(($(stat -f -c '%a*%S' .))) fill; \
                    dd if=/dev/zero of=fill2 bs=4k; :";
        self.setup.host(1 - self.source).run(&["sh", "-c", &format!("({fill}) 2>/dev/null")])?;
        self.schedule(Duration::from_millis(injection.lasts_ms + FULL_MS), Later::FreeDisk);
        Ok(())
    }

    /// Cancels whatever migration that host tells to be under way.
    fn cancel(&mut self, index: usize) {
        let Ok(all) = self.setup.migrations(index) else { return };
        if let Some(under_way) = all.iter().rfind(|migration| migration.outcome.is_none()) {
            let path = format!("/v1/migrations/{}/cancel", under_way.id);
            // Refused when it comes too late: as good as not asked.
            let _ = self.setup.ask_soon(index, "POST", &path);
        }
    }

    fn schedule(&mut self, after: Duration, what: Later) {
        let boots = |index| self.later.iter().any(|(_, known)| *known == Later::Boot(index));
        if matches!(what, Later::StartAgent(index) if boots(index)) {
            // It comes with its host.
            return;
        }
        if !self.later.iter().any(|(_, known)| *known == what) {
            self.later.push((Instant::now() + after, what));
        }
    }

    fn do_what_is_due(&mut self) -> Result<()> {
        let now = Instant::now();
        let (due, rest) = self.later.drain(..).partition(|(at, _)| *at <= now);
        self.later = rest;
        let due: Vec<(Instant, Later)> = due;
        due.into_iter().try_for_each(|(_, what)| self.perform(what))
    }

    fn perform(&mut self, what: Later) -> Result<()> {
        match what {
            Later::StartAgent(index) => self.setup.launch_agent(index),
            Later::Boot(index) => {
                let net = self.setup.lab.net();
                net.set_speed(0, Some(self.link_mbit))?;
                net.restore(0, &net.hosts[index].0)?;
                self.setup.launch_agent(index)
            }
            Later::RestoreLink => {
                ["a", "b"].into_iter().try_for_each(|name| self.setup.lab.net().restore(0, name))
            }
            Later::FreeDisk => {
                let remove = "rm -f /var/lib/limosa/fill /var/lib/limosa/fill2";
                self.setup.host(1 - self.source).run(&["sh", "-c", remove]).map(drop)
            }
        }
    }

    /// Starts again, after a while, every agent that has died.
    fn notice_deaths(&mut self) -> Result<()> {
        for index in 0..2 {
            if self.setup.host_mut(index).agent_ended()?.is_some() {
                self.kill_agents(&[index])?;
            }
        }
        Ok(())
    }

    fn agents_answer(&self) -> bool {
        (0..2).all(|index| {
            std::os::unix::net::UnixStream::connect(self.setup.host(index).agent_socket()).is_ok()
        })
    }

    /// Whether one host alone has the VM and neither waits for the other.
    /// An error is an agent that does not answer now.
    fn is_settled(&mut self) -> Result<bool> {
        self.take_answer();
        if self.request.is_some() {
            return Ok(false);
        }
        for index in 0..2 {
            if self.must_restart(index)? {
                return Ok(false);
            }
        }
        let mut owners = 0;
        for index in 0..2 {
            let Some(vm) = self.setup.look(index)? else { continue };
            owners += 1;
            self.seen.was_in_doubt |= vm.doubt.is_some();
            if matches!(vm.power, Power::MovingIn | Power::MovingOut | Power::InDoubt) {
                return Ok(false);
            }
            // Its agent has heard of QEMU's end, and waits until that is complete.
            if vm.power == Power::Fault && self.setup.host(index).qemu_pids().is_empty() {
                return Ok(false);
            }
            let path = format!("/v1/vms/{VM}/recover");
            if self.setup.ask_soon(index, "GET", &path)?.status == 200 {
                return Ok(false);
            }
        }
        Ok(owners == 1)
    }

    /// Takes the answer to the move, once it is there.
    fn take_answer(&mut self) {
        let Some(request) = self.request.take_if(|request| request.is_finished()) else { return };
        match request.join().map(|answer| answer.and_then(Answer::read::<Migration>)) {
            Ok(Ok(migration)) => self.migration = Some(migration),
            Ok(Err(error)) => self.seen.refused = Some(format!("{error:#}")),
            Err(_) => self.seen.refused = Some("asking for it panicked".to_owned()),
        }
    }

    /// An agent whose store failed says that it must be restarted: it is. All hosts
    /// are looked at before anything else, for others may wait for that one.
    fn must_restart(&mut self, index: usize) -> Result<bool> {
        // It tells of what is under way also without its store, but not of itself.
        let host = self.setup.ask_soon(index, "GET", "/v1/host")?;
        if host.body["code"] == json!(FailureCode::StoreFailed) {
            self.kill_agents(&[index])?;
            return Ok(true);
        }
        let known: Vec<Migration> = self.setup.ask_soon(index, "GET", "/v1/migrations")?.read()?;
        // An operator does as the agent says.
        let vm = self.setup.look(index)?;
        if vm.and_then(|vm| vm.doubt).is_some_and(|doubt| doubt.contains("restart limosad")) {
            self.seen.was_in_doubt = true;
            self.kill_agents(&[index])?;
            return Ok(true);
        }
        let own = self.migration.as_ref().map(|own| own.id);
        let ours = known.iter().rfind(|one| own.is_none_or(|own| own == one.id));
        if index == self.source {
            self.seen.told = ours.map(|ours| (ours.outcome, ours.reason.clone()));
            self.seen.was_in_doubt |=
                ours.is_some_and(|ours| ours.outcome == Some(Outcome::InDoubt));
        }
        Ok(false)
    }

    fn standing(&self) -> String {
        let mut told = Vec::new();
        for index in 0..2 {
            let host = self.setup.host(index);
            let said = match self.setup.look(index) {
                Ok(Some(vm)) => {
                    format!("{:?}, doubt {:?}, fault {:?}", vm.power, vm.doubt, vm.fault)
                }
                Ok(None) => "no such VM".to_owned(),
                Err(error) => format!("{error:#}"),
            };
            let recover = self.setup.ask_soon(index, "GET", &format!("/v1/vms/{VM}/recover"));
            let recover =
                recover.map_or_else(|error| error.to_string(), |told| told.body.to_string());
            told.push(format!(
                "{}: {said}, {} QEMUs, recovery {recover}",
                host.name(),
                host.qemu_pids().len()
            ));
        }
        told.join("; ")
    }

    /// Disarms, releases, repairs: also after a failure.
    fn repair_all(&mut self) -> Result<()> {
        for index in 0..2 {
            let folder = self.setup.host(index).fault_dir();
            for entry in std::fs::read_dir(&folder)?.flatten() {
                // An agent may rename it just now; its new name is listed next time.
                let _ = std::fs::remove_file(entry.path());
            }
        }
        for (_, what) in std::mem::take(&mut self.later) {
            self.perform(what)?;
        }
        for order in self.orders.drain(..) {
            let answer = order.join().map_err(|_| anyhow::anyhow!("an order panicked"))?;
            self.seen.was_started |= answer.is_ok_and(|answer| answer.status < 300);
        }
        Ok(())
    }
}

/// Whether the agent refuses by a rule of its own; a fault in it, or a state store that
/// failed, is no rule.
pub(super) fn is_refusal(answer: &Answer) -> bool {
    let injections = [json!(FailureCode::Internal), json!(FailureCode::StoreFailed)];
    answer.status >= 400 && !injections.contains(&answer.body["code"])
}
