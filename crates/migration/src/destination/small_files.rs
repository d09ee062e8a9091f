//! Receives the small files that move beside the disks: kernel, initial RAM disk, UEFI variables.

use std::fs::{OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use hyper::body::Bytes;
use limosa_host::failure::{Failure, OrFail, Result};
use limosa_host::vm::files;
use limosa_protocol::peer::{self, FileReceived};

use super::incoming::Incoming;

impl Incoming {
    /// Takes a part of a small file that moves beside the disks. A part that is
    /// here already, whose answer was lost, changes nothing.
    pub(crate) async fn take_file(
        &self,
        name: &str,
        offset: u64,
        part: Bytes,
    ) -> Result<FileReceived> {
        self.driver.expect_preparing()?;
        let expected = self.offer.files.iter().find(|(offered, _)| offered == name);
        let known = files::small_files(&self.definition)?;
        let is_known = known.iter().any(|(known, _)| *known == name);
        let Some((_, size_bytes)) = expected.filter(|_| is_known) else {
            return Err(Failure::bad_request(format!("the offer names no file {name}")));
        };
        let folder =
            files::place(&self.definition.places.configuration, "configuration")?.to_owned();
        let path = folder.join(name);
        let noted = path.clone();
        // One part at a time, also when an earlier request is still being done.
        let _turn = self.file_turn.lock().await;
        if offset == 0 {
            self.driver
                .note(|record| {
                    if !record.made.contains(&noted) {
                        record.made.push(noted);
                    }
                })
                .await?;
        }
        append(&path, offset, part, *size_bytes).await
    }
}

/// Writes the next part of a file of a known size, and syncs the file once it is
/// whole. Returns the length that the file has then.
///
/// On a thread of its own and without a buffer: a part is answered only when the
/// kernel has it, since the next request looks at the file's length.
async fn append(path: &Path, offset: u64, part: Bytes, size_bytes: u64) -> Result<FileReceived> {
    let path = path.to_owned();
    let write = move || append_blocking(&path, offset, &part, size_bytes);
    tokio::task::spawn_blocking(write).await.or_fail("receiving a file")?
}

fn append_blocking(path: &Path, offset: u64, part: &[u8], size_bytes: u64) -> Result<FileReceived> {
    let doing = format!("receiving {}", path.display());
    if size_bytes > peer::FILE_BYTES_MAX {
        return Err(Failure::bad_request(format!("{doing}: {size_bytes} bytes are too many")));
    }
    // The first part makes the file, in a folder that only the agent writes.
    let mut file = OpenOptions::new()
        .append(true)
        .create(offset == 0)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .or_fail(&doing)?;
    let here = file.metadata().or_fail(&doing)?.len();
    if offset < here {
        return Ok(FileReceived { received_bytes: here });
    }
    let received_bytes = offset.saturating_add(part.len() as u64);
    if offset > here || received_bytes > size_bytes {
        return Err(Failure::bad_request(format!(
            "{doing}: {} bytes at {offset} of {size_bytes} do not follow the {here} that are here",
            part.len()
        )));
    }
    // QEMU's user reads it, whatever the agent's umask is.
    file.set_permissions(Permissions::from_mode(0o644)).or_fail(&doing)?;
    file.write_all(part).or_fail(&doing)?;
    if received_bytes == size_bytes {
        file.sync_all().or_fail(&doing)?;
        files::sync_folder(path.parent().unwrap_or(path)).or_fail(&doing)?;
    }
    Ok(FileReceived { received_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a part whose answer was lost changes nothing when it comes again, and
    /// nothing but the next part is taken.
    #[tokio::test]
    async fn a_file_grows_by_its_next_part_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel");
        let append = async |offset, part: &'static [u8]| {
            let received = append(&path, offset, Bytes::from_static(part), 6).await;
            received.map(|received| received.received_bytes).ok()
        };
        assert_eq!(append(0, b"abcd").await, Some(4));
        assert_eq!(append(0, b"abcd").await, Some(4));
        assert_eq!(append(5, b"f").await, None);
        assert_eq!(append(4, b"efg").await, None);
        assert_eq!(append(4, b"ef").await, Some(6));
        assert_eq!(append(4, b"ef").await, Some(6));
        assert_eq!(append(6, b"g").await, None);
        assert_eq!(std::fs::read(&path).unwrap(), b"abcdef");
        let too_large = peer::FILE_BYTES_MAX + 1;
        assert!(super::append(&path, 0, Bytes::new(), too_large).await.is_err());
    }

    /// Goal: what is answered is written: a part that follows at once never finds the file
    /// shorter than the answer before it.
    #[tokio::test]
    async fn a_part_is_answered_once_it_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let (part, last) =
            (Bytes::from(vec![7; peer::FILE_PART_BYTES_MAX]), Bytes::from_static(b"x"));
        let part_bytes = part.len() as u64;
        let size_bytes = part_bytes + 1;
        for number in 0..50 {
            let path = folder.path().join(format!("kernel-{number}"));
            let first = append(&path, 0, part.clone(), size_bytes).await.unwrap();
            assert_eq!(first.received_bytes, part_bytes);
            assert_eq!(std::fs::metadata(&path).unwrap().len(), part_bytes);
            let whole = append(&path, part_bytes, last.clone(), size_bytes).await.unwrap();
            assert_eq!(whole.received_bytes, size_bytes);
        }
    }
}
