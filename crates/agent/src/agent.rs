//! The agent: what its programs share, and how it starts. Only `main`, `api` and `listen` see it.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use data_encoding::HEXLOWER_PERMISSIVE;
use limosa_auth::Identity;
use limosa_auth::pairing::Invitation;
use limosa_auth::trust::{PeerRole, TrustStore, TrustedPeer};

use crate::config::Config;
use limosa_host::store::{OperatorRecord, PeerRecord};
use limosa_host::{Folders, Host, clock};
use limosa_migration::Migrations;

/// What the listeners and the API need.
pub(crate) struct Agent {
    pub(crate) config: Config,
    pub(crate) host: Arc<Host>,
    pub(crate) identity: Identity,
    pub(crate) trust: TrustStore,
    pub(crate) migrations: Arc<Migrations>,
    invitation: Mutex<Option<Invitation>>,
}

impl Agent {
    /// Opens the state folder and looks at the host. Nothing is started or
    /// changed yet.
    pub(crate) async fn open(config: Config) -> anyhow::Result<Arc<Self>> {
        let name = config.host_name()?;
        let folders =
            Folders { state: config.folder.clone(), runtime: config.runtime_folder.clone() };
        let host = Arc::new(Host::open(name, folders, &config.qemu).await?);
        let folder = config.folder.join("identity");
        let identity = Identity::load_or_create(&folder, host.name.as_str())?;
        let migrations =
            Migrations::new(Arc::clone(&host), identity.clone(), config.migration.clone());
        let agent = Self {
            config,
            host,
            identity,
            trust: TrustStore::new(),
            migrations: Arc::new(migrations),
            invitation: Mutex::default(),
        };
        agent.trust_recorded_peers()?;
        Ok(Arc::new(agent))
    }

    fn trust_recorded_peers(&self) -> anyhow::Result<()> {
        let trust = |name: &str, hex: &str, role| -> anyhow::Result<()> {
            let der = HEXLOWER_PERMISSIVE
                .decode(hex.as_bytes())
                .with_context(|| format!("certificate of {name}"))?;
            Ok(self.trust.insert(TrustedPeer::new(name.to_owned(), role, der))?)
        };
        for (name, peer) in self.host.store.all::<PeerRecord>()? {
            trust(&name, &peer.certificate_hex, PeerRole::Host)?;
        }
        for (name, operator) in self.host.store.all::<OperatorRecord>()? {
            // A certificate that is also a paired host's stays that.
            if let Err(error) = trust(&name, &operator.certificate_hex, PeerRole::Operator) {
                tracing::error!(operator = name, error = format!("{error:#}"), "not let in");
            }
        }
        Ok(())
    }

    /// Whether a stranger may try to pair just now.
    pub(crate) fn invitation_is_open(&self) -> bool {
        self.with_invitation(|invitation| {
            invitation
                .as_ref()
                .is_some_and(|invitation| invitation.check(clock::now_unix_s()).is_ok())
        })
    }

    /// Works on the invitation, of which there is at most one.
    pub(crate) fn with_invitation<T>(&self, work: impl FnOnce(&mut Option<Invitation>) -> T) -> T {
        work(&mut self.invitation.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
