//! What a QEMU binary is and can do, asked of itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::accelerator::Accelerator;
use crate::process;
use crate::qmp::{Qmp, QmpError, part};

/// Longest a probed QEMU may take to answer.
const PROBE_MAX: Duration = Duration::from_secs(20);

/// A version: 7.2.22 and so on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Version {
    /// First number
    pub major: u32,
    /// Second number
    pub minor: u32,
    /// Third number
    pub micro: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// What a QEMU is and can do.
#[derive(Debug, Clone)]
pub struct QemuFacts {
    /// Its version
    pub version: Version,
    /// Versioned machine types
    machines: BTreeSet<String>,
    /// Short names, and the types for which they stand
    aliases: BTreeMap<String, String>,
    /// CPU models, and what this host lacks of each
    lacking: BTreeMap<String, Vec<String>>,
    /// What a CPU model can show at most on this host
    features: Vec<String>,
    /// QMP commands
    commands: BTreeSet<String>,
}

/// Why a binary gave no facts.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// It did not start.
    #[error("cannot start {}", binary.display())]
    Start {
        /// The program
        binary: PathBuf,
        /// Why
        #[source]
        source: std::io::Error,
    },
    /// It does not speak as QEMU does.
    #[error("it does not answer over QMP")]
    Qmp(#[from] QmpError),
}

#[derive(Deserialize)]
struct Machine {
    name: String,
    alias: Option<String>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

#[derive(Deserialize)]
struct Cpu {
    name: String,
    #[serde(default, rename = "unavailable-features")]
    unavailable_features: Vec<String>,
}

/// Asks a QEMU binary. To be called on the main thread: the probed QEMU ends with
/// the thread that started it, so that none is left behind by an agent that was
/// killed meanwhile.
///
/// # Errors
/// [`ProbeError`].
pub async fn probe(binary: &Path, accelerator: Accelerator) -> Result<QemuFacts, ProbeError> {
    let mut command = tokio::process::Command::new(binary);
    command
        .args(["-S", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "none"])
        // Over its own standard streams: no file that somebody else could make.
        .args(["-accel", &accelerator.to_string(), "-qmp", "stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    process::end_with_parent(&mut command);
    let mut child = command
        .spawn()
        .map_err(|source| ProbeError::Start { binary: binary.to_owned(), source })?;
    let (Some(reader), Some(writer)) = (child.stdout.take(), child.stdin.take()) else {
        return Err(ProbeError::Qmp(QmpError::Closed));
    };
    let asked = async { ask(Qmp::over(reader, writer, None, PROBE_MAX).await?).await };
    let facts = asked.await;
    child.kill().await.ok();
    Ok(facts?)
}

#[derive(Deserialize)]
struct VersionAnswer {
    qemu: Version,
}

#[derive(Deserialize)]
struct Expansion {
    model: Model,
}

#[derive(Deserialize)]
struct Model {
    props: BTreeMap<String, Value>,
}

async fn ask(qmp: Qmp) -> Result<QemuFacts, QmpError> {
    let version = qmp.execute("query-version", json!({})).await?;
    let machines = qmp.execute("query-machines", json!({})).await?;
    let machines: Vec<Machine> = part("query-machines", machines)?;
    let commands = qmp.execute("query-commands", json!({})).await?;
    let commands: Vec<Named> = part("query-commands", commands)?;
    let cpus = qmp.execute("query-cpu-definitions", json!({})).await?;
    let cpus: Vec<Cpu> = part("query-cpu-definitions", cpus)?;
    let wish = json!({ "type": "full", "model": { "name": "max" } });
    let most = qmp.execute("query-cpu-model-expansion", wish).await?;
    let most: Expansion = part("query-cpu-model-expansion", most)?;
    let features = most.model.props;
    let features = features
        .into_iter()
        .filter(|(_, value)| *value == Value::Bool(true))
        .map(|(name, _)| name)
        .collect();
    Ok(QemuFacts {
        version: part::<VersionAnswer>("query-version", version)?.qemu,
        aliases: machines
            .iter()
            .filter_map(|machine| Some((machine.alias.clone()?, machine.name.clone())))
            .collect(),
        machines: machines.into_iter().map(|machine| machine.name).collect(),
        lacking: cpus.into_iter().map(|cpu| (cpu.name, cpu.unavailable_features)).collect(),
        features,
        commands: commands.into_iter().map(|command| command.name).collect(),
    })
}

impl QemuFacts {
    /// The versioned machine type that a name stands for, if this QEMU has it.
    #[must_use]
    pub fn resolve_machine<'a>(&'a self, name: &str) -> Option<&'a str> {
        let versioned = self.aliases.get(name).map_or(name, String::as_str);
        self.machines.get(versioned).map(String::as_str)
    }

    /// The QMP commands that Limosa needs and this QEMU does not have.
    #[must_use]
    pub fn missing_commands(&self) -> Vec<&'static str> {
        let needed = crate::quirk::COMMANDS_NEEDED.into_iter();
        needed.filter(|command| !self.commands.contains(*command)).collect()
    }

    /// Versioned machine types.
    pub fn machines(&self) -> impl Iterator<Item = &str> {
        self.machines.iter().map(String::as_str)
    }

    /// Features of a CPU model that this host does not have; `None` when QEMU
    /// does not know the model.
    #[must_use]
    pub fn lacking_features(&self, cpu: &str) -> Option<&[String]> {
        let model = cpu.split(',').next().unwrap_or_default();
        self.lacking.get(model).map(Vec::as_slice)
    }

    /// Features that a guest sees whose CPU model follows the host; empty for
    /// models that are the same everywhere.
    #[must_use]
    pub fn cpu_features(&self, cpu: &str) -> Vec<String> {
        let model = cpu.split(',').next().unwrap_or_default();
        if matches!(model, "host" | "max") { self.features.clone() } else { Vec::new() }
    }
}
