//! The remote agents whose certificates were confirmed once, in a file of the user.
//!
//! ```toml
//! [agents]
//! "host2:6600" = "0d1c-…"
//! ```
//!
//! **Invariants.** An agent's fingerprint comes in only after a person or an
//! option confirmed it and a connection held with it. The file is replaced
//! whole, so a crash leaves the old one or the new one.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use limosa_auth::{Fingerprint, Identity};
use limosa_protocol::id::HostName;
use serde::{Deserialize, Serialize};

/// Name of the file in the user's folder.
const FILE: &str = "known-agents.toml";
/// Largest file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The agents known to this user.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Known {
    #[serde(default)]
    agents: BTreeMap<String, Fingerprint>,
}

/// The user's own folder for certificate and known agents.
pub(crate) fn folder() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CONFIG_HOME").filter(|folder| !folder.is_empty()) {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(
            std::env::var_os("HOME")
                .context("HOME is not set: set it, or XDG_CONFIG_HOME, to your own folder")?,
        )
        .join(".config"),
    };
    Ok(base.join("limosa"))
}

/// The user's own certificate, made when missing.
pub(crate) fn identity() -> Result<Identity> {
    let name = std::env::var("USER").unwrap_or_default();
    // It only decorates the certificate: any valid name will do.
    let name = if name.parse::<HostName>().is_ok() { name.as_str() } else { "operator" };
    Ok(Identity::load_or_create(&folder()?, name)?)
}

/// Where the certificate of [`identity`] stands.
pub(crate) fn certificate_file() -> Result<PathBuf> {
    Ok(folder()?.join(limosa_auth::identity::CERTIFICATE_FILE))
}

/// The file of known agents.
pub(crate) fn file() -> Result<PathBuf> {
    Ok(folder()?.join(FILE))
}

/// The fingerprint that was confirmed for an agent.
///
/// - `address`: `HOST:PORT`.
pub(crate) fn fingerprint(address: &str) -> Result<Option<Fingerprint>> {
    Ok(load(&file()?)?.agents.get(address).copied())
}

/// Keeps a fingerprint that was confirmed.
pub(crate) fn remember(address: &str, fingerprint: Fingerprint) -> Result<()> {
    let path = file()?;
    let mut known = load(&path)?;
    if known.agents.insert(address.to_owned(), fingerprint) == Some(fingerprint) {
        return Ok(());
    }
    let text = toml::to_string(&known)?;
    replace(&path, &text).with_context(|| format!("writing {}", path.display()))
}

/// Replaces a file durably: its content is on the disk before its name, and the name
/// before this returns.
fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    let folder = path.parent().ok_or(std::io::ErrorKind::InvalidInput)?;
    let mut new = tempfile::NamedTempFile::new_in(folder)?;
    new.write_all(text.as_bytes())?;
    new.as_file().sync_all()?;
    new.persist(path)?;
    std::fs::File::open(folder)?.sync_all()
}

fn load(path: &Path) -> Result<Known> {
    match read_limited(path, FILE_BYTES_MAX) {
        Ok(text) => toml::from_str(&text).with_context(|| {
            format!("{} is damaged: repair it, or remove it to confirm anew", path.display())
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Known::default()),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

/// Reads a text file, or standard input for `-`, of at most `bytes_max`.
pub(crate) fn read_limited(path: &Path, bytes_max: u64) -> std::io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    let limit = bytes_max.saturating_add(1);
    if path.as_os_str() == "-" {
        std::io::stdin().lock().take(limit).read_to_string(&mut text)?;
    } else {
        std::fs::File::open(path)?.take(limit).read_to_string(&mut text)?;
    }
    if u64::try_from(text.len()).unwrap_or(u64::MAX) > bytes_max {
        return Err(std::io::Error::other(format!("it has more than {bytes_max} bytes")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a file is replaced whole, only its user may read it, and nothing is left
    /// beside it, also when it cannot be replaced.
    #[test]
    fn a_file_is_replaced_and_nothing_is_left_beside_it() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join(FILE);
        for text in ["first, and longer", "second"] {
            replace(&path, text).expect("it is written");
            assert_eq!(std::fs::read_to_string(&path).expect("a file"), text);
        }
        let mode = std::fs::metadata(&path).expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        std::fs::create_dir(folder.path().join("taken")).expect("a folder");
        assert!(replace(&folder.path().join("taken"), "text").is_err());
        assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 2);
    }
}
