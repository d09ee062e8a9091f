//! Tests of [`super`]: what stands on disk is kept, or refused with a reason.

use super::*;
use std::fs;

fn reload(dir: &Path) -> Result<Identity, IdentityError> {
    Identity::load_or_create(dir, "host1")
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Goal: an identity is made once, privately, and stays, whatever the name.
#[test]
fn is_made_once_and_stays() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("state/identity");
    let made = reload(&dir).unwrap();
    assert_eq!(Identity::load_or_create(&dir, "other").unwrap().fingerprint(), made.fingerprint());
    assert_eq!(Fingerprint::of_certificate(made.certificate_der()), made.fingerprint());

    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&dir), 0o700);
    assert_eq!(mode(&dir.join(KEY_FILE)), 0o600);
    let mut names: Vec<_> = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, [CERTIFICATE_FILE, KEY_FILE]);

    let other = Identity::load_or_create(&folder.path().join("b"), "host1").unwrap();
    assert_ne!(other.fingerprint(), made.fingerprint());
    assert!(matches!(
        Identity::load_or_create(&folder.path().join("c"), "no/name"),
        Err(IdentityError::Name(_))
    ));
}

/// Goal: many who start at once agree on one identity.
#[test]
fn a_crowd_gets_one_identity() {
    let folder = tempfile::tempdir().unwrap();
    let found: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..8).map(|_| scope.spawn(|| reload(folder.path()).unwrap().fingerprint())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(found.iter().all(|fingerprint| *fingerprint == found[0]), "{found:?}");
}

/// Goal: every damage is named with its file and its remedy, and changes nothing.
#[test]
fn damage_is_an_error_and_never_a_new_identity() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, other) = (folder.path().join("a"), folder.path().join("b"));
    let fingerprint = reload(&dir).unwrap().fingerprint();
    reload(&other).unwrap();
    let (crt, key) = (dir.join(CERTIFICATE_FILE), dir.join(KEY_FILE));
    let (good_crt, good_key) = (fs::read(&crt).unwrap(), fs::read(&key).unwrap());

    let refused = |what: &str, file: &Path| {
        let files = || (fs::read(&crt).ok(), fs::read(&key).ok());
        let before = files();
        let message = reload(&dir).expect_err(what).to_string();
        assert!(message.contains(&file.display().to_string()), "{what}: {message}");
        assert!(message.contains("identity") && message.contains("peer"), "{what}: {message}");
        assert_eq!(files(), before, "{what}");
    };
    let flipped = {
        // Still PEM, no longer a certificate.
        let mut pem = good_crt.clone();
        pem[40] = if pem[40] == b'A' { b'B' } else { b'A' };
        pem
    };
    for (what, bytes) in [("empty", &b""[..]), ("cut", &good_crt[..90]), ("flipped", &flipped)] {
        fs::write(&crt, bytes).unwrap();
        refused(what, &crt);
    }
    fs::copy(other.join(CERTIFICATE_FILE), &crt).unwrap();
    refused("foreign certificate", &key);
    fs::write(&crt, &good_crt).unwrap();

    for bytes in [&b""[..], &good_key[..60], b"-----BEGIN PRIVATE KEY-----\nAAAA\n"] {
        fs::write(&key, bytes).unwrap();
        refused("bad key", &key);
    }
    fs::write(&key, &good_key).unwrap();
    set_mode(&key, 0o640);
    refused("exposed key", &key);
    set_mode(&key, 0o600);

    fs::remove_file(&crt).unwrap();
    refused("no certificate", &crt);
    fs::write(&crt, &good_crt).unwrap();
    fs::remove_file(&key).unwrap();
    refused("no key", &key);
    // The unfinished key of some other identity does not pass for ours.
    fs::copy(other.join(KEY_FILE), dir.join("identity.key.new")).unwrap();
    refused("foreign unfinished key", &key);

    fs::write(&key, &good_key).unwrap();
    set_mode(&key, 0o600);
    assert_eq!(reload(&dir).unwrap().fingerprint(), fingerprint);
}

/// Goal: a crash at each step of the creation is repaired by the next start.
#[test]
fn an_interrupted_creation_is_completed() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    // Before the renames: nothing counts yet.
    fs::write(dir.join("identity.key.new"), "half a k").unwrap();
    fs::write(dir.join("identity.crt.new"), "").unwrap();
    let fingerprint = reload(dir).unwrap().fingerprint();
    // Between the renames: the key only lacks its name.
    fs::rename(dir.join(KEY_FILE), dir.join("identity.key.new")).unwrap();
    assert_eq!(reload(dir).unwrap().fingerprint(), fingerprint);
    assert!(!dir.join("identity.key.new").exists());
}
