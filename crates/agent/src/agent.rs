//! The agent: what all parts of it share, and how it starts.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use limosa_auth::pairing::Invitation;
use limosa_auth::trust::{PeerRole, TrustStore, TrustedPeer};
use limosa_auth::{Identity, tls};
use limosa_protocol::api::Switch;
use limosa_protocol::id::{HostName, VmName};
use limosa_protocol::migration::{Outcome, Role};
use limosa_qemu::accelerator::Accelerator;
use limosa_qemu::image::ImageTool;
use limosa_qemu::probe::QemuFacts;
pub(crate) use limosa_qemu::process::User as QemuUser;
use limosa_qemu::quirk::VERSION_MIN;

use crate::config::{self, Config};
use crate::failure::{Failure, Result};
use crate::migration::Migrations;
use crate::net::Net;
use crate::store::{MigrationRecord, OperatorRecord, PeerRecord, Store, lock};
use crate::vm::{Inner, Vm};

/// Most VMs of one host.
pub(crate) const VM_COUNT_MAX: usize = 1024;

/// What all parts of the agent share.
pub(crate) struct Agent {
    pub(crate) config: Config,
    pub(crate) name: HostName,
    pub(crate) store: Store,
    pub(crate) net: Net,
    pub(crate) identity: Identity,
    pub(crate) trust: TrustStore,
    pub(crate) qemu: QemuHost,
    pub(crate) migrations: Migrations,
    vms: Mutex<BTreeMap<VmName, Arc<Vm>>>,
    invitation: Mutex<Option<Invitation>>,
    /// Held from looking whether a VM's place is free, or a switch is in use, to
    /// having acted on it.
    pub(crate) placing: tokio::sync::Mutex<()>,
    /// No other agent has the folder of the sockets.
    _runtime_lock: File,
}

/// QEMU on this host, looked at once when the agent starts.
pub(crate) struct QemuHost {
    pub(crate) binary: PathBuf,
    pub(crate) img: ImageTool,
    pub(crate) facts: QemuFacts,
    pub(crate) accelerator: Accelerator,
    pub(crate) accelerator_reason: String,
    /// User and groups of QEMU's process, and of its tools; `None` when the agent is not root.
    pub(crate) user: Option<QemuUser>,
}

impl Agent {
    /// Opens the state folder and looks at the host. Nothing is started or
    /// changed yet.
    pub(crate) async fn open(config: Config) -> anyhow::Result<Arc<Self>> {
        let name = config.host_name()?;
        let store = Store::open(&config.folder)?;
        make_folders(&config)?;
        let runtime_lock = lock(&config.runtime_folder, "limosad.lock")?;
        let identity = Identity::load_or_create(&config.folder.join("identity"), name.as_str())?;
        let trust = TrustStore::new();
        let qemu = QemuHost::look(&config).await?;
        let net = Net::open().context("cannot open a netlink socket")?;
        let migrations = Migrations::new(config.migration.concurrent_max.into());
        let agent = Self {
            config,
            name,
            store,
            net,
            identity,
            trust,
            qemu,
            migrations,
            vms: Mutex::default(),
            invitation: Mutex::default(),
            placing: tokio::sync::Mutex::default(),
            _runtime_lock: runtime_lock,
        };
        agent.trust_recorded_peers()?;
        Ok(Arc::new(agent))
    }

    fn trust_recorded_peers(&self) -> anyhow::Result<()> {
        let trust = |name: &str, hex: &str, role| -> anyhow::Result<()> {
            let der = decode_hex(hex).with_context(|| format!("certificate of {name}"))?;
            Ok(self.trust.insert(TrustedPeer::new(name.to_owned(), role, der))?)
        };
        for (name, peer) in self.store.all::<PeerRecord>()? {
            trust(&name, &peer.certificate_hex, PeerRole::Host)?;
        }
        for (name, operator) in self.store.all::<OperatorRecord>()? {
            // A certificate that is also a paired host's stays that.
            if let Err(error) = trust(&name, &operator.certificate_hex, PeerRole::Operator) {
                tracing::error!(operator = name, error = format!("{error:#}"), "not let in");
            }
        }
        Ok(())
    }

    /// Makes the bridges of all recorded switches that are missing, as after a
    /// reboot. One that cannot be made is logged; its VMs say so when started.
    pub(crate) async fn restore_switches(&self) -> anyhow::Result<()> {
        for (name, switch) in self.store.all::<Switch>()? {
            let made = self.net.ensure_bridge(&switch.name, switch.uplink.as_deref()).await;
            if let Err(failure) = made {
                tracing::error!(switch = name, %failure, "a virtual switch could not be restored");
            }
        }
        Ok(())
    }

    /// All VMs, by name.
    pub(crate) fn vms(&self) -> Vec<Arc<Vm>> {
        self.lock_vms().values().cloned().collect()
    }

    /// The VM of a name, or a failure that says how to find those there are.
    pub(crate) fn vm(&self, name: &VmName) -> Result<Arc<Vm>> {
        self.lock_vms().get(name).cloned().ok_or_else(|| {
            Failure::not_found(match self.moved_to(name) {
                Some(owner) => format!(
                    "VM {name} was handed over to {owner}, which owns it: on {owner} run \
                     `limosa vm show {name}`"
                ),
                None => format!(
                    "no VM {name} on host {}: `limosa vm list` shows those there are",
                    self.name
                ),
            })
        })
    }

    /// The host to which a VM of that name went last, if it went from here and
    /// never came back.
    fn moved_to(&self, name: &VmName) -> Option<HostName> {
        // Without records the answer is only less helpful.
        let all = self.store.all::<MigrationRecord>().ok()?;
        let mut own = all.into_iter().map(|(_, record)| record.view);
        let last = own.rfind(|view| view.vm == *name && view.outcome == Some(Outcome::Moved))?;
        (last.role == Role::Source).then_some(last.destination)
    }

    /// Adds a VM unless its name is taken.
    pub(crate) fn add_vm(&self, vm: Arc<Vm>) -> Result<()> {
        let mut vms = self.lock_vms();
        if vms.contains_key(&vm.name) {
            return Err(Failure::conflict(format!(
                "host {} already has a VM {}: choose another name or delete that one",
                self.name, vm.name
            )));
        }
        if vms.len() >= VM_COUNT_MAX {
            return Err(Failure::conflict(format!(
                "host {} has {VM_COUNT_MAX} VMs, the most it can have",
                self.name
            )));
        }
        vms.insert(vm.name.clone(), vm);
        Ok(())
    }

    /// Forgets a VM, and turns away who waits for its lock, which `inner` is.
    pub(crate) fn drop_vm(&self, vm: &Arc<Vm>, inner: &mut Inner) {
        inner.has_left = true;
        let mut vms = self.lock_vms();
        if vms.get(&vm.name).is_some_and(|held| Arc::ptr_eq(held, vm)) {
            vms.remove(&vm.name);
        }
    }

    fn lock_vms(&self) -> std::sync::MutexGuard<'_, BTreeMap<VmName, Arc<Vm>>> {
        // No code that holds this lock can panic halfway through a change.
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Folder of a VM's sockets.
    pub(crate) fn runtime_folder(&self, vm: &VmName) -> PathBuf {
        self.config.runtime_folder.join("vms").join(vm.as_str())
    }

    /// Gives a file or socket to QEMU's user.
    pub(crate) fn give_to_qemu(&self, path: &Path) -> std::io::Result<()> {
        match &self.qemu.user {
            Some(user) => std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid)),
            None => Ok(()),
        }
    }

    /// Whether a stranger may try to pair just now.
    pub(crate) fn invitation_is_open(&self) -> bool {
        self.with_invitation(|invitation| {
            invitation.as_ref().is_some_and(|invitation| invitation.check(now_unix_s()).is_ok())
        })
    }

    /// Works on the invitation, of which there is at most one.
    pub(crate) fn with_invitation<T>(&self, work: impl FnOnce(&mut Option<Invitation>) -> T) -> T {
        work(&mut self.invitation.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn make_folders(config: &Config) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    // QEMU's user must reach its VM's files below; it can list nothing here.
    for (folder, mode) in [
        (config.folder.clone(), 0o711),
        (config.folder.join("vms"), 0o711),
        (config.runtime_folder.clone(), 0o711),
        (config.runtime_folder.join("vms"), 0o711),
    ] {
        let at = || format!("cannot make the folder {}", folder.display());
        std::fs::create_dir_all(&folder).with_context(at)?;
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(mode))
            .with_context(at)?;
    }
    Ok(())
}

impl QemuHost {
    async fn look(config: &Config) -> anyhow::Result<Self> {
        let find = |program: &Path| {
            find_program(program).with_context(|| {
                format!(
                    "{} is not there: install Debian's qemu-system-x86 and qemu-utils, \
                     or set it under [qemu] in the configuration",
                    program.display()
                )
            })
        };
        let binary = find(&config.qemu.binary)?;
        let img = find(&config.qemu.img)?;
        let wish = match config.qemu.accelerator {
            config::Accelerator::Auto => None,
            config::Accelerator::Kvm => Some(Accelerator::Kvm),
            config::Accelerator::Tcg => Some(Accelerator::Tcg),
        };
        let choice = limosa_qemu::accelerator::choose(wish);
        let user = qemu_user(&config.qemu.user)?;
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
fn qemu_user(name: &str) -> anyhow::Result<Option<QemuUser>> {
    use nix::unistd::{Group, User};
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let user = match User::from_name(name)? {
        Some(user) => user,
        None => {
            tracing::warn!(user = name, "no such user: QEMU runs as nobody");
            User::from_name("nobody")?.with_context(|| {
                format!("neither the user {name} nor nobody exists: make one, or set qemu.user")
            })?
        }
    };
    let kvm = Group::from_name("kvm")?.map(|group| group.gid.as_raw());
    Ok(Some(QemuUser {
        uid: user.uid.as_raw(),
        gid: user.gid.as_raw(),
        groups: kvm.into_iter().collect(),
    }))
}

/// Seconds since 1970.
pub(crate) fn now_unix_s() -> u64 {
    now_unix_ms() / 1000
}

/// An accelerator as peers and operators read it.
pub(crate) const fn wire_accelerator(accelerator: Accelerator) -> limosa_protocol::vm::Accelerator {
    match accelerator {
        Accelerator::Kvm => limosa_protocol::vm::Accelerator::Kvm,
        Accelerator::Tcg => limosa_protocol::vm::Accelerator::Tcg,
    }
}

/// Milliseconds since 1970.
pub(crate) fn now_unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Lower-case hexadecimal digits of some bytes.
pub(crate) fn encode_hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        write!(text, "{byte:02x}").ok();
        text
    })
}

/// The bytes of hexadecimal digits.
pub(crate) fn decode_hex(text: &str) -> anyhow::Result<Vec<u8>> {
    anyhow::ensure!(text.is_ascii() && text.len().is_multiple_of(2), "not hexadecimal");
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).context("not hexadecimal"))
        .collect()
}

/// A secret for a data channel: 128 random bits.
pub(crate) fn random_token() -> Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| Failure::internal(format!("the kernel gives no random bytes: {error}")))?;
    Ok(encode_hex(&bytes))
}

/// Settings for a connection on which only pairing is possible.
pub(crate) fn pairing_connector(agent: &Agent) -> tokio_rustls::TlsConnector {
    tls::pairing_client_config(&agent.identity).into()
}
