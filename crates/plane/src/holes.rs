//! The parts of a block's memfd that have no memory: pages that the guest never
//! touched, and those it gave back.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::page::PAGE_BYTES;

/// The first hole of whole pages that begins at `from` or later, in bytes.
///
/// # Errors
/// The kernel's.
pub(crate) fn next_hole(
    memory: &File,
    from: u64,
    size_bytes: u64,
) -> io::Result<Option<Range<u64>>> {
    let mut at = from;
    while at < size_bytes {
        let start =
            rustix::fs::seek(memory, SeekFrom::Hole(at))?.next_multiple_of(PAGE_BYTES as u64);
        if start >= size_bytes {
            break;
        }
        let data = match rustix::fs::seek(memory, SeekFrom::Data(start)) {
            Ok(found) => found.min(size_bytes),
            Err(Errno::NXIO) => size_bytes,
            Err(error) => return Err(error.into()),
        };
        let end = data - data % PAGE_BYTES as u64;
        if start < end {
            return Ok(Some(start..end));
        }
        at = data.max(start + 1);
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn holes_are_found_in_order() {
        let page = PAGE_BYTES as u64;
        let name = rustix::fs::memfd_create("holes", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(name);
        file.set_len(64 * page).unwrap();
        for written in [0, 1, 5, 40, 63] {
            file.write_all_at(&[1], written * page + 7).unwrap();
        }
        let mut found = Vec::new();
        let mut at = 0;
        while let Some(hole) = next_hole(&file, at, 64 * page).unwrap() {
            at = hole.end;
            found.push((hole.start / page, hole.end / page));
        }
        assert_eq!(found, [(2, 5), (6, 40), (41, 63)]);
        assert_eq!(next_hole(&file, 63 * page, 64 * page).unwrap(), None);
    }
}
