//! Digests that are kept while the work goes on, so that comparing them costs no
//! blackout that grows with the VM.
//!
//! RAM: each page has a 128-bit digest of its content and place (BLAKE3, keyed
//! with the place); the digest of many pages is their sum modulo 2^128. A page
//! that changes takes its old digest off the sum and adds the new one. A page of
//! zeroes counts 0, as does one that was never touched. Disks: each disk is cut
//! into ranges, and each range has a BLAKE3 chain over the operations on it in
//! their order; equal operations on equal (empty) disks give equal disks.
//!
//! The tables of both stay until the end: if the two sides differ, they say where.
//!
//! The sum protects against faults, not against an adversary who may choose
//! pages: the peer is authenticated, and a guest does not know when it is read.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use limosa_protocol::peer::Part;
use rustix::fs::SeekFrom;

use crate::page::PAGE_BYTES;
use crate::route::REGION_BYTES;

/// Most ranges of a disk.
const RANGE_COUNT_MAX: u64 = 4096;

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

    /// All digests, by block and slot.
    pub(crate) fn tables(&self) -> &[Vec<u128>] {
        &self.pages
    }

    /// The sum, as an acknowledgement carries it.
    pub(crate) fn sum(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[..16].copy_from_slice(&self.sum.to_le_bytes());
        bytes
    }
}

/// Digests of the parts of a block of RAM as it stands in its memfd, each the sum
/// over its pages. Holes are not read.
///
/// # Errors
/// The file's.
pub fn ram_digests(memory: &File, of: &Part) -> io::Result<Vec<u128>> {
    of.cut().map(|part| ram_digest(memory, &part)).collect()
}

fn ram_digest(memory: &File, part: &Part) -> io::Result<u128> {
    let mut sum = 0u128;
    let mut buffer = vec![0; 1 << 20];
    let (mut at, size_bytes) = (part.from_bytes, part.to_bytes);
    while at < size_bytes {
        at = match rustix::fs::seek(memory, SeekFrom::Data(at)) {
            // A page of which only the end is written begins before it.
            Ok(found) => at.max(found - found % PAGE_BYTES as u64),
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

/// Digests of the disk operations that one channel carries.
pub(crate) struct DiskDigests {
    /// By disk
    disks: Vec<DiskRanges>,
}

/// A disk's digests, by range.
pub(crate) struct DiskRanges {
    size_bytes: u64,
    /// Bytes of each range but the last, which may be shorter
    range_bytes: u64,
    /// 0 where nothing was done
    pub(crate) chains: Vec<u128>,
}

impl DiskRanges {
    /// Where a range begins and ends, in bytes.
    pub(crate) fn place(&self, range: usize) -> (u64, u64) {
        let from_bytes = (range as u64).saturating_mul(self.range_bytes);
        (from_bytes, from_bytes.saturating_add(self.range_bytes).min(self.size_bytes))
    }
}

impl DiskDigests {
    /// - `sizes_bytes`: of the disks, by number.
    pub(crate) fn new(sizes_bytes: impl Iterator<Item = u64>) -> Self {
        let ranges = |size_bytes: u64| {
            let range_bytes = size_bytes
                .div_ceil(RANGE_COUNT_MAX)
                .next_multiple_of(REGION_BYTES)
                .max(REGION_BYTES);
            let count = usize::try_from(size_bytes.div_ceil(range_bytes)).unwrap_or(usize::MAX);
            DiskRanges { size_bytes, range_bytes, chains: vec![0; count] }
        };
        Self { disks: sizes_bytes.map(ranges).collect() }
    }

    /// Adds an operation on a disk that there is, which begins inside of it.
    ///
    /// - `kind`, `payload`: as in its frame.
    pub(crate) fn add(&mut self, disk: u16, offset_bytes: u64, kind: u8, payload: &[u8]) {
        let ranges = &mut self.disks[usize::from(disk)];
        let range = usize::try_from(offset_bytes / ranges.range_bytes).unwrap_or(usize::MAX);
        // An operation of no bytes may stand at the end.
        let Some(chain) = ranges.chains.get_mut(range) else { return };
        let mut hasher = blake3::Hasher::new();
        hasher.update(&chain.to_le_bytes()).update(&[kind]);
        hasher.update(&(payload.len() as u64).to_le_bytes()).update(payload);
        let mut short = [0; 16];
        hasher.finalize_xof().fill(&mut short);
        *chain = u128::from_le_bytes(short);
    }

    /// Digest of all of it.
    pub(crate) fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for chain in self.disks.iter().flat_map(|ranges| &ranges.chains) {
            hasher.update(&chain.to_le_bytes());
        }
        *hasher.finalize().as_bytes()
    }

    /// All chains, by disk and range.
    pub(crate) fn tables(&self) -> impl Iterator<Item = &[u128]> {
        self.disks.iter().map(|ranges| ranges.chains.as_slice())
    }

    /// A disk's digests; `None` for no disk.
    pub(crate) fn disk(&self, disk: u16) -> Option<&DiskRanges> {
        self.disks.get(usize::from(disk))
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
    fn operations_count_by_disk_range_and_order() {
        let digest = |operations: &[(u16, u64, &[u8])]| {
            let mut digests = DiskDigests::new([1 << 40, (4 << 20) + 512].into_iter());
            assert_eq!(digests.disk(0).unwrap().place(1), (256 << 20, 512 << 20));
            assert_eq!(digests.disk(1).unwrap().chains.len(), 5);
            assert_eq!(digests.disk(1).unwrap().place(4), (4 << 20, (4 << 20) + 512));
            for (disk, offset_bytes, payload) in operations {
                digests.add(*disk, *offset_bytes, 4, payload);
            }
            digests.digest()
        };
        assert_eq!(digest(&[(0, 0, b"a"), (1, 0, b"b")]), digest(&[(1, 0, b"b"), (0, 0, b"a")]));
        assert_ne!(digest(&[(0, 0, b"a"), (0, 9, b"b")]), digest(&[(0, 9, b"b"), (0, 0, b"a")]));
        assert_ne!(digest(&[(1, 0, b"a")]), digest(&[(1, 1 << 20, b"a")]));
        assert_ne!(digest(&[(1, 0, b"a")]), digest(&[]));
    }

    #[test]
    fn a_second_reading_gives_the_running_sum() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[3; PAGE_BYTES], 5 * PAGE_BYTES as u64).unwrap();
        let all = Part { disk: None, from_bytes: 0, to_bytes: 1 << 20 };
        let parts = ram_digests(&file, &all).unwrap();
        assert_eq!(parts.len(), 256);
        let expected = |page| if page == 5 { page_digest(0, 5, &[3; PAGE_BYTES]) } else { 0 };
        assert!((0..).zip(parts).all(|(page, digest)| digest == expected(page)));
    }
}
