//! The agent's configuration: `/etc/limosa/limosad.toml`, every field optional.
//!
//! **Invariant.** A file with an unknown field or a wrong value stops the agent
//! before it touches anything; a missing file means the defaults below.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use limosa_protocol::api::PORT;
use limosa_protocol::id::HostName;
use limosa_protocol::peer::CHANNEL_COUNT_MAX;
use serde::Deserialize;
use tokio::net::TcpListener;

use limosa_host::QemuSettings;
use limosa_migration::settings::{CONCURRENT_COUNT_MAX, MigrationSettings};

/// Where the configuration is looked for when no other place is given.
pub(crate) const PATH_DEFAULT: &str = "/etc/limosa/limosad.toml";

/// Longest that a lost link may be waited for, in seconds.
const LINK_WAIT_S_MAX: u32 = 3600;

/// The whole file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    /// Name of this host among its peers; default: its host name.
    pub(crate) name: Option<HostName>,
    /// Addresses on which peers and remote operators are served; default: all.
    pub(crate) listen: Option<Vec<SocketAddr>>,
    /// Folder for everything that must survive a reboot.
    pub(crate) folder: PathBuf,
    /// Folder for sockets.
    pub(crate) runtime_folder: PathBuf,
    /// Group whose members may use the local socket, besides root.
    pub(crate) group: String,
    pub(crate) qemu: QemuSettings,
    pub(crate) migration: MigrationSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: None,
            listen: None,
            folder: "/var/lib/limosa".into(),
            runtime_folder: "/run/limosa".into(),
            group: "limosa".into(),
            qemu: QemuSettings::default(),
            migration: MigrationSettings::default(),
        }
    }
}

impl Config {
    /// Reads the file, or gives the defaults when `path` is `None` and the
    /// usual file does not exist.
    pub(crate) fn read(path: Option<&Path>) -> anyhow::Result<Self> {
        let given = path.is_some();
        let path = path.unwrap_or(Path::new(PATH_DEFAULT));
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !given => String::new(),
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("cannot read the configuration {}", path.display()));
            }
        };
        let config: Self = toml::from_str(&text)
            .with_context(|| format!("the configuration {} is not valid", path.display()))?;
        config.check().with_context(|| format!("in the configuration {}", path.display()))?;
        Ok(config)
    }

    fn check(&self) -> anyhow::Result<()> {
        for (field, folder) in [("folder", &self.folder), ("runtime_folder", &self.runtime_folder)]
        {
            if !folder.is_absolute() {
                bail!("{field} {} is not an absolute path", folder.display());
            }
        }
        let migration = &self.migration;
        if !(1..=CHANNEL_COUNT_MAX).contains(&migration.channels) {
            bail!(
                "migration.channels is {}: it must be 1 to {CHANNEL_COUNT_MAX}",
                migration.channels
            );
        }
        if !(1..=CONCURRENT_COUNT_MAX).contains(&migration.concurrent_max) {
            bail!(
                "migration.concurrent_max is {}: it must be 1 to {CONCURRENT_COUNT_MAX}",
                migration.concurrent_max
            );
        }
        if !(256..=1 << 20).contains(&migration.window_kib) {
            bail!("migration.window_kib is {}: it must be 256 to 1048576", migration.window_kib);
        }
        if let Some(root) = migration.storage_roots.iter().find(|root| !root.is_absolute()) {
            bail!("migration.storage_roots: {} is not an absolute path", root.display());
        }
        if !(1..=LINK_WAIT_S_MAX).contains(&migration.link_wait_s) {
            bail!(
                "migration.link_wait_s is {}: it must be 1 to {LINK_WAIT_S_MAX}",
                migration.link_wait_s
            );
        }
        Ok(())
    }

    /// The host's name: as configured, else the kernel's, without its domain.
    pub(crate) fn host_name(&self) -> anyhow::Result<HostName> {
        if let Some(name) = &self.name {
            return Ok(name.clone());
        }
        let uname = rustix::system::uname();
        let full = uname.nodename().to_string_lossy();
        let short = full.split('.').next().unwrap_or_default();
        short.parse().with_context(|| "set `name` in the configuration".to_owned())
    }

    /// Opens the configured addresses; of the default ones those that the host has.
    pub(crate) async fn listeners(&self) -> anyhow::Result<Vec<TcpListener>> {
        let Some(addresses) = &self.listen else { return Ok(vec![listen_everywhere().await?]) };
        let mut listeners = Vec::new();
        for address in addresses {
            let listener = TcpListener::bind(address).await;
            listeners.push(listener.with_context(|| format!("cannot listen on {address}"))?);
        }
        Ok(listeners)
    }

    /// The port that peers are told; of several addresses the first one's.
    pub(crate) fn port(&self) -> u16 {
        let first = self.listen.as_ref().and_then(|addresses| addresses.first());
        first.map_or(PORT, SocketAddr::port)
    }

    /// The local socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.runtime_folder.join("limosad.sock")
    }
}

/// Listens on all addresses, IPv4's alone where IPv6 is off.
async fn listen_everywhere() -> anyhow::Result<TcpListener> {
    let all = SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT));
    let error = match TcpListener::bind(all).await {
        Ok(listener) => return Ok(listener),
        Err(error) => error,
    };
    if !is_ipv6_off(&error) {
        return Err(error).with_context(|| format!("cannot listen on {all}"));
    }
    let all = SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT));
    tracing::info!(%all, %error, "IPv6 is off here, so only IPv4 is listened on");
    TcpListener::bind(all).await.with_context(|| format!("cannot listen on {all}"))
}

fn is_ipv6_off(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: only a host without IPv6 is served on IPv4 alone; a port that is taken is told.
    #[test]
    fn only_without_ipv6_it_is_left_out() {
        let is_off = |number| is_ipv6_off(&std::io::Error::from_raw_os_error(number));
        assert!(is_off(libc::EAFNOSUPPORT) && is_off(libc::EADDRNOTAVAIL));
        assert!(!is_off(libc::EADDRINUSE) && !is_off(libc::EACCES));
    }

    #[test]
    fn a_wrong_file_is_refused_with_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("limosad.toml");
        for (text, said) in [
            ("listenn = []", "unknown field"),
            ("[migration]\nchannels = 0", "channels is 0"),
            ("folder = 'x'", "not an absolute path"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = format!("{:#}", Config::read(Some(&path)).unwrap_err());
            assert!(error.contains(said) && error.contains("limosad.toml"), "{error}");
        }
        assert!(Config::read(Some(&folder.path().join("none"))).is_err());
        std::fs::write(&path, "").unwrap();
        let config = Config::read(Some(&path)).unwrap();
        assert_eq!((config.migration.channels, config.port()), (2, PORT));
        std::fs::write(&path, "listen = ['127.0.0.1:7', '[::1]:8']").unwrap();
        assert_eq!(Config::read(Some(&path)).unwrap().port(), 7);
    }
}
