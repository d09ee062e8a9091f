//! Points at which a scenario holds or kills an agent, so that what it does next
//! meets a migration exactly there.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use limosa_faults::{ARMED_FILE, Action, Armed, FOLDER_VARIABLE, REACHED_PREFIX};

use super::steps;
use crate::harness::lab::Lab;

/// Longest time for something to happen, on a busy machine.
const WAIT_TIMEOUT: Duration = Duration::from_secs(90);
const LOOK_PAUSE: Duration = Duration::from_millis(5);

/// A point of one agent that is armed.
#[derive(Debug)]
pub(crate) struct Point {
    folder: PathBuf,
    name: String,
}

impl Point {
    /// Starts a host's agent anew, with that point armed.
    pub(crate) fn arm(lab: &mut Lab, host: &str, name: &str, action: Action) -> Result<Self> {
        let folder = lab.host(host).fault_dir();
        let armed = Armed { point: name.to_owned(), action, skip: 0 };
        std::fs::write(folder.join(ARMED_FILE), armed.to_string())?;
        lab.host_mut(host).stop_agent()?;
        let config = steps::agent_config(lab.host(host), None, "");
        let variable = (FOLDER_VARIABLE, &*folder.to_string_lossy());
        lab.host_mut(host).start_agent(&config, &[variable])?;
        Ok(Self { folder, name: name.to_owned() })
    }

    /// Waits until the agent is there.
    pub(crate) fn wait(&self) -> Result<()> {
        wait(&format!("coming to {} (limosad needs the feature `faults`)", self.name), || {
            Ok(self.reached().exists().then_some(()))
        })
    }

    /// Lets an agent that holds there go on.
    pub(crate) fn release(&self) -> Result<()> {
        Ok(std::fs::remove_file(self.reached())?)
    }

    fn reached(&self) -> PathBuf {
        self.folder.join(format!("{REACHED_PREFIX}{}", self.name))
    }
}

/// Looks until something is there.
pub(crate) fn wait<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + WAIT_TIMEOUT;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        ensure!(Instant::now() < deadline, "{what}: it did not happen");
        std::thread::sleep(LOOK_PAUSE);
    }
}

/// Starts a host's agent with nothing armed.
pub(crate) fn start_agent(lab: &mut Lab, host: &str) -> Result<()> {
    let config = steps::agent_config(lab.host(host), None, "");
    lab.host_mut(host).start_agent(&config, &[])
}
