//! A host's (or an operator's) own certificate and key, in two files.
//!
//! ```text
//! create:  key.new, crt.new written and synced ─► crt.new→crt ─► key.new→key ─► folder synced
//! load:    both files there, the key private to its owner, and made for each other
//! ```
//!
//! The certificate signs itself and never expires (it says the year 9999, which
//! is how X.509 writes that). Trust is by pin: peers compare its fingerprint,
//! so no authority could add to it, a date would only make hosts unreachable on
//! a known day, and a wrong clock must not keep a VM from leaving a failing
//! host. Removing the pin ends the trust, at once.
//!
//! **Invariants.** What stands on disk is never replaced: a damaged identity is
//! an error that names the file and the remedy. A crash while creating leaves
//! nothing that counts, or a pair that the next call completes.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use limosa_protocol::id::HostName;
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, date_time_ymd,
};
use rustix::fs::{FlockOperation, flock};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::Fingerprint;
use crate::provider::provider;

/// The certificate's file, in PEM.
pub const CERTIFICATE_FILE: &str = "identity.crt";
/// The key's file, in PEM (PKCS #8), readable by its owner alone.
pub const KEY_FILE: &str = "identity.key";
/// Longest file that is read, in bytes; ours have less than 1 KiB.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// A certificate with its key. Cheap to clone.
#[derive(Clone)]
pub struct Identity {
    inner: Arc<Inner>,
}

struct Inner {
    certified_key: CertifiedKey,
    key_der: PrivateKeyDer<'static>,
    fingerprint: Fingerprint,
}

/// Why there is no identity to use.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The name cannot stand in a certificate.
    #[error("no identity can be made for this name")]
    Name(#[source] limosa_protocol::id::BadName),
    /// A file or folder cannot be used; see the source.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried, e.g. `read`.
        action: &'static str,
        /// With what.
        path: PathBuf,
        source: io::Error,
    },
    /// One of the two files is gone.
    #[error(
        "{} is missing beside its other half: restore it from a backup, or move {} away to make a \
         new identity (every peer must then be paired again)", missing.display(), present.display()
    )]
    HalfMissing {
        /// The file that should be there.
        missing: PathBuf,
        /// The file that is.
        present: PathBuf,
    },
    /// The key may have been read by others.
    #[error(
        "{path} is open to other users (mode {mode:04o}): if nobody else can have read it, run \
         `chmod 600 {path}`; else move both files away to make a new identity and remove the \
         old one from every peer", path = path.display()
    )]
    KeyExposed { path: PathBuf, mode: u32 },
    /// A file does not hold what it should.
    #[error(
        "{} is damaged ({what}): restore it from a backup, or move {CERTIFICATE_FILE} and \
         {KEY_FILE} away to make a new identity (every peer must then be paired again)",
        path.display()
    )]
    Damaged {
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Certificate and key belong to different identities.
    #[error(
        "{} is not the key of {}: restore the one that was replaced, or move both away to make a \
         new identity (every peer must then be paired again)", key.display(), certificate.display()
    )]
    Mismatch { key: PathBuf, certificate: PathBuf },
    /// The key or certificate could not be made.
    #[error("cannot make a certificate")]
    Generate(#[from] rcgen::Error),
}

impl Identity {
    /// Loads the identity in `dir`, or makes one if there is none.
    ///
    /// - `dir`: created with mode 0700 if it is missing, its parents too.
    /// - `host_name`: by the rules of [`HostName`]; only decorates a new
    ///   certificate. An existing one is kept whatever it says.
    ///
    /// Several processes may call this at once: they get the same identity.
    pub fn load_or_create(dir: &Path, host_name: &str) -> Result<Self, IdentityError> {
        let host_name: HostName = host_name.parse().map_err(IdentityError::Name)?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|source| failed("create", dir, source))?;
        // Held until the end: two processes must not make two identities.
        let folder = File::open(dir).map_err(|source| failed("open", dir, source))?;
        flock(&folder, FlockOperation::LockExclusive)
            .map_err(|errno| failed("lock", dir, errno.into()))?;

        let (certificate_path, key_path) = (dir.join(CERTIFICATE_FILE), dir.join(KEY_FILE));
        match (exists(&certificate_path)?, exists(&key_path)?) {
            (true, true) => {}
            (false, false) => create(&folder, dir, &host_name)?,
            (false, true) => {
                let (missing, present) = (certificate_path, key_path);
                return Err(IdentityError::HalfMissing { missing, present });
            }
            (true, false) => complete(&folder, dir)?,
        }
        load(&certificate_path, &key_path)
    }

    /// What peers pin.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.inner.fingerprint
    }

    /// The certificate, for a peer to keep.
    #[must_use]
    pub fn certificate_der(&self) -> &CertificateDer<'static> {
        &self.inner.certified_key.cert[0]
    }

    /// The private key. It goes nowhere but into TLS.
    #[must_use]
    pub fn key_der(&self) -> &PrivateKeyDer<'static> {
        &self.inner.key_der
    }

    /// Certificate and parsed key together, as rustls wants them.
    pub(crate) fn certified_key(&self) -> CertifiedKey {
        self.inner.certified_key.clone()
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("fingerprint", &self.fingerprint()).finish_non_exhaustive()
    }
}

fn failed(action: &'static str, path: &Path, source: io::Error) -> IdentityError {
    IdentityError::File { action, path: path.to_owned(), source }
}

/// Whether something has this name, even a dangling link: it must not be replaced.
fn exists(path: &Path) -> Result<bool, IdentityError> {
    match path.symlink_metadata() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed("look at", path, error)),
    }
}

/// The name a file has until it is whole.
fn unfinished(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.new"))
}

/// Makes a new pair. `dir` holds neither file, and `folder` is locked.
fn create(folder: &File, dir: &Path, host_name: &HostName) -> Result<(), IdentityError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, host_name.as_str());
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(9999, 12, 31);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let certificate = params.self_signed(&key)?;

    write_unfinished(&unfinished(dir, KEY_FILE), &key.serialize_pem(), 0o600)?;
    write_unfinished(&unfinished(dir, CERTIFICATE_FILE), &certificate.pem(), 0o644)?;
    // The certificate first: a crash between the two leaves a certificate and
    // `identity.key.new`, which `complete` recognises. The other order would
    // leave a key without a certificate, which cannot be told from a loss.
    rename(dir, CERTIFICATE_FILE)?;
    rename(dir, KEY_FILE)?;
    folder.sync_all().map_err(|source| failed("sync", dir, source))
}

/// Ends a creation that a crash interrupted, if this is what happened.
fn complete(folder: &File, dir: &Path) -> Result<(), IdentityError> {
    let (certificate, key) = (dir.join(CERTIFICATE_FILE), dir.join(KEY_FILE));
    let unfinished_key = unfinished(dir, KEY_FILE);
    if !exists(&unfinished_key)? || load(&certificate, &unfinished_key).is_err() {
        return Err(IdentityError::HalfMissing { missing: key, present: certificate });
    }
    rename(dir, KEY_FILE)?;
    folder.sync_all().map_err(|source| failed("sync", dir, source))
}

fn rename(dir: &Path, name: &str) -> Result<(), IdentityError> {
    let from = unfinished(dir, name);
    std::fs::rename(&from, dir.join(name)).map_err(|source| failed("rename", &from, source))
}

/// Writes and syncs a whole file, in place of what a crash may have left there.
fn write_unfinished(path: &Path, text: &str, mode: u32) -> Result<(), IdentityError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed("remove", path, error));
        }
        _ => {}
    }
    // `create_new` follows no link, and the mode holds from the first byte.
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(|source| failed("create", path, source))?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(|source| failed("write", path, source))
}

/// Reads a file of bounded length, and its permission bits.
fn read(path: &Path) -> Result<(Vec<u8>, u32), IdentityError> {
    let file = File::open(path).map_err(|source| failed("open", path, source))?;
    let metadata = file.metadata().map_err(|source| failed("look at", path, source))?;
    let mut pem = Vec::new();
    file.take(FILE_BYTES_MAX)
        .read_to_end(&mut pem)
        .map_err(|source| failed("read", path, source))?;
    Ok((pem, metadata.permissions().mode() & 0o7777))
}

fn load(certificate_path: &Path, key_path: &Path) -> Result<Identity, IdentityError> {
    let damaged = |path: &Path, what| IdentityError::Damaged { path: path.to_owned(), what };

    let (pem, mode) = read(key_path)?;
    if mode & 0o077 != 0 {
        return Err(IdentityError::KeyExposed { path: key_path.to_owned(), mode });
    }
    let key_der = PrivateKeyDer::from_pem_slice(&pem)
        .map_err(|_| damaged(key_path, "it holds no private key in PEM"))?;
    let key = provider()
        .key_provider
        .load_private_key(key_der.clone_key())
        .map_err(|_| damaged(key_path, "its key is not valid"))?;

    let (pem, _) = read(certificate_path)?;
    let certificate = CertificateDer::from_pem_slice(&pem)
        .map_err(|_| damaged(certificate_path, "it holds no certificate in PEM"))?;
    rustls::server::ParsedCertificate::try_from(&certificate)
        .map_err(|_| damaged(certificate_path, "its certificate is not valid"))?;

    let fingerprint = Fingerprint::of_certificate(&certificate);
    let certified_key = CertifiedKey::new(vec![certificate], key);
    certified_key.keys_match().map_err(|_| IdentityError::Mismatch {
        key: key_path.to_owned(),
        certificate: certificate_path.to_owned(),
    })?;
    Ok(Identity { inner: Arc::new(Inner { certified_key, key_der, fingerprint }) })
}

#[cfg(test)]
#[path = "identity/tests.rs"]
mod tests;
