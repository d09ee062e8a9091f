//! Digests that are kept while the work goes on, so that comparing them costs no
//! blackout that grows with the VM.
//!
//! RAM: each page has a 128-bit digest of its content and place (BLAKE3, keyed
//! with the place); the digest of many pages is their sum modulo 2^128. A page
//! that changes takes its old digest off the sum and adds the new one. A page of
//! zeroes counts 0, as does one that was never touched. Disks: a BLAKE3 chain
//! over every operation in order; equal operations on equal (empty) disks give
//! equal disks.
//!
//! The sum protects against faults, not against an adversary who may choose
//! pages: the peer is authenticated, and a guest does not know when it is read.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;

use crate::PAGE_BYTES;

/// Digest of one page at its place; 0 for a page of zeroes.
pub(crate) fn page_digest(block: u8, page: u64, content: &[u8; PAGE_BYTES]) -> u128 {
    if is_zero(content) {
        return 0;
    }
    let mut key = *b"limosa page digest v1 ..........";
    key[23] = block;
    key[24..].copy_from_slice(&page.to_le_bytes());
    let hash = blake3::keyed_hash(&key, content);
    let mut short = [0; 16];
    short.copy_from_slice(&hash.as_bytes()[..16]);
    u128::from_le_bytes(short)
}

/// Whether a page holds only zeroes; leaves it at its first other line.
pub(crate) fn is_zero(page: &[u8; PAGE_BYTES]) -> bool {
    page.chunks_exact(64).all(|line| line.iter().fold(0, |or, byte| or | byte) == 0)
}

/// Digests of the pages that one channel carries.
pub(crate) struct PageDigests {
    /// By block, then by slot; 0 where nothing is known to stand.
    pages: Vec<Vec<u128>>,
    sum: u128,
}

impl PageDigests {
    /// - `slots`: by block, see [`crate::route::slot_count`].
    pub(crate) fn new(slots: impl Iterator<Item = usize>) -> Self {
        // Zeroed by the kernel when first touched: nothing is paid ahead.
        Self { pages: slots.map(|count| vec![0; count]).collect(), sum: 0 }
    }

    pub(crate) fn get(&self, block: usize, slot: usize) -> u128 {
        self.pages[block][slot]
    }

    pub(crate) fn set(&mut self, block: usize, slot: usize, digest: u128) {
        let old = std::mem::replace(&mut self.pages[block][slot], digest);
        self.sum = self.sum.wrapping_sub(old).wrapping_add(digest);
    }

    /// The sum, as an acknowledgement carries it.
    pub(crate) fn sum(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[..16].copy_from_slice(&self.sum.to_le_bytes());
        bytes
    }
}

/// Digest of a whole block of RAM as it stands in its memfd: the sum over all
/// its pages. Holes are not read.
///
/// # Errors
/// The file's.
pub fn full_ram_digest(memory: &File, size_bytes: u64) -> io::Result<u128> {
    let mut sum = 0u128;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < size_bytes {
        at = match rustix::fs::seek(memory, SeekFrom::Data(at)) {
            Ok(found) => found - found % PAGE_BYTES as u64,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(memory, SeekFrom::Hole(at))?.min(size_bytes);
        while at < end {
            let length = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
            memory.read_exact_at(&mut buffer[..length], at)?;
            for page in buffer[..length].as_chunks::<PAGE_BYTES>().0 {
                sum = sum.wrapping_add(page_digest(0, at / PAGE_BYTES as u64, page));
                at += PAGE_BYTES as u64;
            }
        }
    }
    Ok(sum)
}

/// Chain over the disk operations of one channel.
#[derive(Default)]
pub(crate) struct DiskChain(blake3::Hasher);

impl DiskChain {
    /// - `kind`, `head`: as in the operation's frame.
    pub(crate) fn add(&mut self, kind: u8, payload: &[u8]) {
        self.0.update(&[kind]).update(&(payload.len() as u64).to_le_bytes()).update(payload);
    }

    pub(crate) fn digest(&self) -> [u8; 32] {
        *self.0.finalize().as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_knows_content_and_place() {
        let (a, b) = ([1; PAGE_BYTES], [2; PAGE_BYTES]);
        let sum = |pages: &[(u64, &[u8; PAGE_BYTES])]| {
            let mut digests = PageDigests::new([8].into_iter());
            for (page, content) in pages {
                digests.set(0, usize::try_from(*page).unwrap(), page_digest(0, *page, content));
            }
            digests.sum()
        };
        assert_ne!(sum(&[(0, &a), (1, &b)]), sum(&[(0, &b), (1, &a)]));
        assert_eq!(sum(&[(0, &a), (1, &b), (1, &a), (1, &b)]), sum(&[(1, &b), (0, &a)]));
        assert_eq!(sum(&[(0, &a), (0, &[0; PAGE_BYTES])]), sum(&[]));
    }

    #[test]
    fn reading_again_gives_the_running_sum() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[3; PAGE_BYTES], 5 * PAGE_BYTES as u64).unwrap();
        let whole = full_ram_digest(&file, 1 << 20).unwrap();
        assert_eq!(whole, page_digest(0, 5, &[3; PAGE_BYTES]));
    }
}
