//! QEMU on this host: its programs, its user, and what it can do.

use std::path::{Path, PathBuf};

use anyhow::Context;
use limosa_qemu::accelerator::Accelerator;
use limosa_qemu::image::ImageTool;
use limosa_qemu::probe::QemuFacts;
use limosa_qemu::process::User;
use limosa_qemu::quirk::VERSION_MIN;
use serde::Deserialize;

/// Which QEMU is used, and how.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QemuSettings {
    /// The emulator; a bare name is looked up in PATH.
    pub binary: PathBuf,
    /// The image tool; a bare name is looked up in PATH.
    pub img: PathBuf,
    /// UEFI firmware of VMs that want it.
    pub uefi_code: PathBuf,
    /// UEFI variables with which such a VM begins.
    pub uefi_variables: PathBuf,
    /// `auto`, `kvm` or `tcg`.
    pub accelerator: AcceleratorChoice,
    /// User as whom QEMU runs when the agent is root.
    pub user: String,
}

/// Accelerator asked for by the operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AcceleratorChoice {
    Auto,
    Kvm,
    Tcg,
}

/// QEMU on this host, looked at once when the agent starts.
pub struct HostQemu {
    pub binary: PathBuf,
    pub img: ImageTool,
    pub facts: QemuFacts,
    pub accelerator: Accelerator,
    pub accelerator_reason: String,
    /// User and groups of QEMU's process, and of its tools; `None` when the agent is not root.
    pub user: Option<User>,
    pub uefi_code: PathBuf,
    pub uefi_variables: PathBuf,
}

impl Default for QemuSettings {
    fn default() -> Self {
        Self {
            binary: "qemu-system-x86_64".into(),
            img: "qemu-img".into(),
            uefi_code: "/usr/share/OVMF/OVMF_CODE_4M.fd".into(),
            uefi_variables: "/usr/share/OVMF/OVMF_VARS_4M.fd".into(),
            accelerator: AcceleratorChoice::Auto,
            user: "limosa-qemu".into(),
        }
    }
}

impl HostQemu {
    /// Makes QEMU's user the owner of a file or socket.
    pub fn give_file(&self, path: &Path) -> std::io::Result<()> {
        match &self.user {
            Some(user) => std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid)),
            None => Ok(()),
        }
    }

    /// Looks for QEMU and asks it what it can do.
    pub async fn look(settings: &QemuSettings) -> anyhow::Result<Self> {
        let find = |program: &Path| {
            find_program(program).with_context(|| {
                format!(
                    "{} is not there: install Debian's qemu-system-x86 and qemu-utils, \
                     or set it under [qemu] in the configuration",
                    program.display()
                )
            })
        };
        let binary = find(&settings.binary)?;
        let img = find(&settings.img)?;
        let wish = match settings.accelerator {
            AcceleratorChoice::Auto => None,
            AcceleratorChoice::Kvm => Some(Accelerator::Kvm),
            AcceleratorChoice::Tcg => Some(Accelerator::Tcg),
        };
        let choice = limosa_qemu::accelerator::choose(wish);
        let user = qemu_user(&settings.user)?;
        let facts = limosa_qemu::probe::probe(&binary, choice.accelerator, user.as_ref())
            .await
            .with_context(|| {
                let asked = match &user {
                    Some(user) => format!(", started as the user {}", user.uid),
                    None => String::new(),
                };
                format!("{} does not answer as QEMU does{asked}", binary.display())
            })?;
        // VMs that run are looked after all the same; starting and moving say it too.
        let missing = facts.missing_commands();
        if facts.version < VERSION_MIN || !missing.is_empty() {
            tracing::warn!(
                version = %facts.version, ?missing,
                "this QEMU cannot do all that is needed; {VERSION_MIN} or newer is"
            );
        }
        Ok(Self {
            binary,
            img: ImageTool { program: img, user: user.clone() },
            facts,
            accelerator: choice.accelerator,
            accelerator_reason: choice.reason,
            user,
            uefi_code: settings.uefi_code.clone(),
            uefi_variables: settings.uefi_variables.clone(),
        })
    }
}

fn find_program(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return program.exists().then(|| program.to_owned());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|full| full.is_file())
}

/// The unprivileged user for QEMU: the configured one, else `nobody`.
fn qemu_user(name: &str) -> anyhow::Result<Option<User>> {
    use nix::unistd::{Group, User as SystemUser};
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let user = match SystemUser::from_name(name)? {
        Some(user) => user,
        None => {
            tracing::warn!(user = name, "no such user: QEMU runs as nobody");
            SystemUser::from_name("nobody")?.with_context(|| {
                format!("neither the user {name} nor nobody exists: make one, or set qemu.user")
            })?
        }
    };
    let kvm = Group::from_name("kvm")?.map(|group| group.gid.as_raw());
    Ok(Some(User {
        uid: user.uid.as_raw(),
        gid: user.gid.as_raw(),
        groups: kvm.into_iter().collect(),
    }))
}

/// An accelerator as peers and operators read it.
pub const fn wire_accelerator(accelerator: Accelerator) -> limosa_protocol::vm::Accelerator {
    match accelerator {
        Accelerator::Kvm => limosa_protocol::vm::Accelerator::Kvm,
        Accelerator::Tcg => limosa_protocol::vm::Accelerator::Tcg,
    }
}
