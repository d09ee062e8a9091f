//! Sockets of the agent that only the VM's own QEMU connects to.
//!
//! They lie in a folder that QEMU's user owns, and a QEMU that somebody has taken
//! over may put anything in their place at any moment.

use std::fs::Permissions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};

/// Listens at a path, in place of a socket that was left there, so that QEMU's
/// user may connect. The folder lets nobody else in.
///
/// # Errors
/// The kernel's; something else that took the socket's place meanwhile.
pub(super) fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = rustix::fs::open(path, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&found)?;
    let is_ours = FileType::from_raw_mode(stat.st_mode) == FileType::Socket
        && stat.st_uid == rustix::process::geteuid().as_raw();
    if !is_ours {
        return Err(io::Error::other("something else took the place of the agent's socket"));
    }
    // What was looked at, whatever stands at the path by now.
    let found = format!("/proc/self/fd/{}", found.as_raw_fd());
    std::fs::set_permissions(found, Permissions::from_mode(0o666))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// Goal: what lies at the path is replaced, never followed.
    #[test]
    fn a_link_in_its_place_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("m0.sock"), folder.path().join("other"));
        std::fs::write(&other, "secret").unwrap();
        std::fs::set_permissions(&other, Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        let listener = listen(&path).unwrap();
        assert_eq!(std::fs::symlink_metadata(&path).unwrap().mode() & 0o7777, 0o666);
        assert_eq!(std::fs::metadata(&other).unwrap().mode() & 0o777, 0o600);
        drop(listener);
        listen(&path).expect("it was left there, and is made anew");
    }
}
