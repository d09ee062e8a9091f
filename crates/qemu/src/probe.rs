//! What a QEMU binary is and can do, asked of itself.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::process::ChildStderr;

use crate::accelerator::Accelerator;
use crate::process::{self, SANDBOX, User};
use crate::qmp::{Qmp, QmpError, part};
use crate::version::Version;

/// Longest a probed QEMU may take to answer.
const PROBE_MAX: Duration = Duration::from_secs(20);
/// Most bytes of what it says of its own fate, and longest wait for them.
const OUTPUT_BYTES_MAX: u64 = 1024;
const OUTPUT_MAX: Duration = Duration::from_secs(1);

/// What a QEMU is and can do.
#[derive(Debug, Clone)]
pub struct QemuFacts {
    /// Its version
    pub version: Version,
    /// Machine types with a version in their name
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
    #[error("it does not answer over QMP{}", said(output))]
    Qmp {
        /// What it said otherwise
        output: String,
        /// Why
        #[source]
        source: QmpError,
    },
}

fn said(output: &str) -> String {
    if output.is_empty() { String::new() } else { format!("; it says: {output}") }
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
/// - `user`: as whom it runs, the same as its VMs: what it can do depends on that.
///
/// # Errors
/// [`ProbeError`].
pub async fn probe(
    binary: &Path,
    accelerator: Accelerator,
    user: Option<&User>,
) -> Result<QemuFacts, ProbeError> {
    let mut command = tokio::process::Command::new(binary);
    command
        .args(["-S", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "none"])
        // Over its own standard streams: no file that somebody else could make.
        .args(["-accel", &accelerator.to_string(), "-qmp", "stdio", "-sandbox", SANDBOX])
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    process::run_as(&mut command, user);
    process::end_with_parent(&mut command);
    let mut child = command
        .spawn()
        .map_err(|source| ProbeError::Start { binary: binary.to_owned(), source })?;
    let asked = match (child.stdout.take(), child.stdin.take()) {
        (Some(reader), Some(writer)) => {
            async { ask(Qmp::over(reader, writer, None, PROBE_MAX).await?).await }.await
        }
        _ => Err(QmpError::Closed),
    };
    child.kill().await.ok();
    match asked {
        Ok(facts) => Ok(facts),
        Err(source) => {
            Err(ProbeError::Qmp { output: last_output(child.stderr.take()).await, source })
        }
    }
}

/// What a QEMU that has ended said of its fate.
async fn last_output(stderr: Option<ChildStderr>) -> String {
    let mut output = Vec::new();
    if let Some(stderr) = stderr {
        let mut stderr = stderr.take(OUTPUT_BYTES_MAX);
        // What came before an error is told, too.
        tokio::time::timeout(OUTPUT_MAX, stderr.read_to_end(&mut output)).await.ok();
    }
    String::from_utf8_lossy(&output).trim().to_owned()
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
        machines: machines
            .into_iter()
            .map(|machine| machine.name)
            .filter(|name| has_version(name))
            .collect(),
        lacking: cpus.into_iter().map(|cpu| (cpu.name, cpu.unavailable_features)).collect(),
        features,
        commands: commands.into_iter().map(|command| command.name).collect(),
    })
}

/// Whether a machine type is the same in every QEMU that has it, as `pc-q35-7.2`
/// is; what `microvm` or `isapc` is changes with each of them.
fn has_version(machine: &str) -> bool {
    let last = machine.rsplit_once('-').map_or("", |(_, last)| last);
    last.contains('.') && last.ends_with(|c: char| c.is_ascii_digit())
}

/// A CPU as a definition names it: `MODEL,+feature,-feature,feature=on`.
struct CpuWish<'a> {
    model: &'a str,
    /// Features by name, and whether the guest shall have them
    switched: BTreeMap<String, bool>,
}

impl<'a> CpuWish<'a> {
    fn read(cpu: &'a str) -> Self {
        let mut parts = cpu.split(',');
        let model = parts.next().unwrap_or_default();
        let (mut named, mut signed) = (BTreeMap::new(), BTreeMap::new());
        for part in parts {
            let name = |text: &str| text.replace('_', "-");
            if let Some(feature) = part.strip_prefix('+') {
                signed.insert(name(feature), true);
            } else if let Some(feature) = part.strip_prefix('-') {
                signed.insert(name(feature), false);
            } else {
                let (feature, value) = part.split_once('=').unwrap_or((part, "on"));
                named.insert(name(feature), matches!(value, "on" | "yes" | "true" | "y"));
            }
        }
        // QEMU takes those with a sign last, wherever they stand.
        named.extend(signed);
        Self { model, switched: named }
    }

    /// Whether a feature is switched off, whatever the model says.
    fn is_off(&self, feature: &str) -> bool {
        self.switched.get(&feature.replace('_', "-")) == Some(&false)
    }
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

    /// Features of a CPU's model that this host does not have and the guest would;
    /// `None` when QEMU does not know the model.
    #[must_use]
    pub fn lacking_features(&self, cpu: &str) -> Option<Vec<String>> {
        let wish = CpuWish::read(cpu);
        let lacking = self.lacking.get(wish.model)?.iter();
        Some(lacking.filter(|feature| !wish.is_off(feature)).cloned().collect())
    }

    /// Features that a guest sees only because this host has them: all, when its
    /// CPU model follows the host, and those that are added to a model. QEMU
    /// leaves out of the latter what the host lacks, and the guest runs without.
    #[must_use]
    pub fn cpu_features(&self, cpu: &str) -> Vec<String> {
        let wish = CpuWish::read(cpu);
        let follows_host = matches!(wish.model, "host" | "max");
        let is_added = |feature: &str| wish.switched.get(&feature.replace('_', "-")) == Some(&true);
        let seen = |feature: &&String| is_added(feature) || (follows_host && !wish.is_off(feature));
        self.features.iter().filter(seen).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl QemuFacts {
        /// The oldest QEMU, with these machine types.
        pub(crate) fn with_machines(machines: &[&str]) -> Self {
            let machines = machines.iter().map(|machine| (*machine).to_owned()).collect();
            Self { machines, ..facts(&[], &[]) }
        }
    }

    fn facts(features: &[&str], lacking: &[&str]) -> QemuFacts {
        let texts = |all: &[&str]| all.iter().map(|text| (*text).to_owned()).collect();
        QemuFacts {
            version: crate::quirk::VERSION_MIN,
            machines: BTreeSet::new(),
            aliases: BTreeMap::new(),
            lacking: [("qemu64", vec![]), ("Haswell", texts(lacking)), ("max", vec![])]
                .map(|(name, lacking)| (name.to_owned(), lacking))
                .into(),
            features: texts(features),
            commands: BTreeSet::new(),
        }
    }

    /// Goal: a feature that is added to a model counts where the host has it, one
    /// that is switched off never does.
    #[test]
    fn features_that_are_switched_count() {
        let new = facts(&["avx2", "sse4.1", "sse4-1", "sse4_1", "svm"], &[]);
        let old = facts(&["svm"], &["avx2", "rtm"]);
        for cpu in ["qemu64,+avx2", "qemu64,avx2", "qemu64,avx2=on,+x2apic"] {
            assert_eq!(new.cpu_features(cpu), ["avx2"], "{cpu}");
            assert_eq!(old.cpu_features(cpu), [""; 0], "{cpu}");
        }
        assert_eq!(new.cpu_features("qemu64,+sse4_1"), ["sse4-1", "sse4_1"]);
        for cpu in ["qemu64", "qemu64,-avx2", "qemu64,avx2=off", "qemu64,+avx2,-avx2"] {
            assert_eq!(new.cpu_features(cpu), [""; 0], "{cpu}");
        }
        assert_eq!(old.cpu_features("max"), ["svm"]);
        assert_eq!(old.cpu_features("max,-svm"), [""; 0]);
        assert_eq!(old.lacking_features("Haswell").unwrap(), ["avx2", "rtm"]);
        assert_eq!(old.lacking_features("Haswell,-rtm").unwrap(), ["avx2"]);
        assert_eq!(old.lacking_features("no-such-model,-rtm"), None);
    }

    #[test]
    fn only_machine_types_with_a_version_stay_the_same() {
        for name in ["pc-q35-7.2", "pc-i440fx-2.12", "pc-q35-4.0.1"] {
            assert!(has_version(name), "{name}");
        }
        for name in ["microvm", "isapc", "none", "x-remote", "pc-q35"] {
            assert!(!has_version(name), "{name}");
        }
    }
}
