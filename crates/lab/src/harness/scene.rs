//! The usual beginning and end of a scenario: a VM that works, watched from outside.
//!
//! ```text
//! Scene::set ─► agents, pair, VM, client, capture ─► scenario ─► Scene::end: all must be well
//! ```

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::points;
use super::steps::{self, Wanted};
use crate::harness::capture::{Capture, Trace};
use crate::harness::client::{self, Client, Noticed, Talk};
use crate::harness::lab::Lab;
use crate::harness::net;

/// Longest time for a tiny guest to boot without KVM on a busy machine.
pub(crate) const BOOT_TIMEOUT: Duration = Duration::from_secs(120);
/// Time in which a guest shows that it goes on, after everything.
const AFTERWARDS: Duration = Duration::from_millis(500);

/// A VM that works on the first host.
#[derive(Debug)]
pub(crate) struct Scene {
    /// Its name
    pub vm: String,
    client: Client,
    capture: Capture,
}

impl Scene {
    /// Brings everything up and waits until the guest talks to the client.
    pub(crate) fn set(lab: &mut Lab, wanted: &Wanted) -> Result<Self> {
        steps::agents_ready(lab)?;
        Self::on_ready_hosts(lab, wanted)
    }

    /// The same on hosts whose agents run and are paired.
    pub(crate) fn on_ready_hosts(lab: &Lab, wanted: &Wanted) -> Result<Self> {
        let capture = Capture::start(lab.net(), steps::MAC)?;
        steps::create_and_start(&lab.hosts()[0], wanted)?;
        Self::talking(lab, &wanted.name, capture)
    }

    /// The same with a VM that the first host has, off.
    pub(crate) fn of_created(lab: &Lab, vm: &str) -> Result<Self> {
        let capture = Capture::start(lab.net(), steps::MAC)?;
        steps::power(&lab.hosts()[0], vm, "start")?;
        Self::talking(lab, vm, capture)
    }

    fn talking(lab: &Lab, vm: &str, capture: Capture) -> Result<Self> {
        client::status::wait(lab.client(), net::guest_v4(0), BOOT_TIMEOUT)
            .context("the guest did not come up")?;
        let client = Client::start(lab.client(), Talk::with(net::guest_v4(0)))?;
        client.wait_until_answered(BOOT_TIMEOUT)?;
        Ok(Self { vm: vm.to_owned(), client, capture })
    }

    /// What the outside has seen so far.
    pub(crate) fn so_far(&self) -> (Noticed, Trace) {
        (self.client.so_far(), self.capture.so_far())
    }

    /// Ends it. Fails unless the VM runs at that host only, goes on living there,
    /// says that all is well, and no user noticed more than a pause.
    pub(crate) fn end(self, lab: &Lab, at: &str) -> Result<(Noticed, Trace)> {
        steps::assert_only_at(lab, &self.vm, at)?;
        let before = self.client.so_far();
        std::thread::sleep(AFTERWARDS);
        self.wait_for_exchanges(&before)?;
        let status = guest_is_well(lab)?;
        let noticed = self.client.stop()?;
        let trace = self.capture.stop()?;
        noticed.assert_undisturbed().with_context(|| format!("the guest says {status}"))?;
        ensure!(!trace.two_copies(), "two copies of the VM were running");
        Ok((noticed, trace))
    }
}

impl Scene {
    /// Waits until each session and the heart have gone on since then. After a long
    /// stop of the guest, TCP tries again only after seconds.
    fn wait_for_exchanges(&self, before: &Noticed) -> Result<()> {
        points::wait("all TCP sessions and the heart going on", || {
            let after = self.client.so_far();
            let mut sessions = before.tcp.iter().zip(&after.tcp);
            let is_going_on = sessions.all(|(before, after)| after.exchanges > before.exchanges)
                && after.heartbeats.exchanges > before.heartbeats.exchanges;
            Ok(is_going_on.then_some(()))
        })
    }
}

/// The guest's own report after it compared all its memory and disks; fails when
/// anything is wrong inside.
pub(crate) fn guest_is_well(lab: &Lab) -> Result<serde_json::Value> {
    client::status::wait(lab.client(), net::guest_v4(0), Duration::from_secs(20))?;
    let status = client::status::check(lab.client(), net::guest_v4(0))?;
    ensure!(status["errors"].as_u64() == Some(0), "the guest found something wrong: {status}");
    Ok(status)
}

/// Waits for a guest that was started anew: it must be well, and find on its disks
/// all that was durable when it reported last.
pub(crate) fn guest_came_back(lab: &Lab, before: &serde_json::Value) -> Result<()> {
    client::status::wait(lab.client(), net::guest_v4(0), BOOT_TIMEOUT)
        .context("the guest did not come up again")?;
    let status = guest_is_well(lab).context("after the restart")?;
    client::status::assert_recovered(&status, &client::status::durable(before)?)
}
