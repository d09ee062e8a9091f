//! The destination guest's RAM, written directly into the memfd of its QEMU.

use std::fs::File;
use std::io;

use limosa_protocol::peer::Part;
use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::FallocateFlags;

use crate::digest::ram_digests;
use crate::page::PAGE_BYTES;

/// A block of guest RAM. Threads may work on different pages at a time; which
/// thread has which page is decided by [`crate::route`] and checked by the
/// receiver.
pub(crate) struct Ram {
    map: MmapRaw,
    memfd: File,
    page_count: u64,
}

impl Ram {
    /// Maps the memory.
    ///
    /// # Errors
    /// The kernel's, or a size that is not the file's.
    pub(crate) fn map(memfd: File, size_bytes: u64) -> io::Result<Self> {
        let odd = size_bytes == 0 || !size_bytes.is_multiple_of(PAGE_BYTES as u64);
        if odd || memfd.metadata()?.len() != size_bytes {
            return Err(io::Error::other("guest RAM of an unexpected size"));
        }
        let map = MmapOptions::new().map_raw(&memfd)?;
        Ok(Self { map, memfd, page_count: size_bytes / PAGE_BYTES as u64 })
    }

    pub(crate) fn page_count(&self) -> u64 {
        self.page_count
    }

    /// Lets `work` change a page.
    ///
    /// The caller is the only thread that has this page.
    pub(crate) fn with_page<T>(
        &self,
        page: u64,
        work: impl FnOnce(&mut [u8; PAGE_BYTES]) -> T,
    ) -> T {
        assert!(page < self.page_count, "the receiver checks pages before it has them written");
        let offset = usize::try_from(page).expect("the map fits the address space") * PAGE_BYTES;
        // SAFETY: the page lies within the map, which lives as long as `self`.
        // Within this process only the caller's thread has it (see above). QEMU
        // maps the same memory, but its vCPUs are stopped, its devices are not
        // loaded before all pages are in, and one whose pages are taken over by
        // another has ended: nobody else writes.
        let content = unsafe { &mut *self.map.as_mut_ptr().add(offset).cast::<[u8; PAGE_BYTES]>() };
        work(content)
    }

    /// Digests of all pages as they stand; see [`ram_digests`].
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn digests(&self) -> io::Result<Vec<u128>> {
        let to_bytes = self.page_count * PAGE_BYTES as u64;
        ram_digests(&self.memfd, &Part { disk: None, from_bytes: 0, to_bytes })
    }

    /// Makes pages zero by giving their memory back.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn clear(&self, first: u64, count: u64) -> io::Result<()> {
        assert!(
            first < self.page_count && count <= self.page_count - first,
            "pages are checked before they are cleared"
        );
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let bytes = PAGE_BYTES as u64;
        Ok(rustix::fs::fallocate(&self.memfd, flags, first * bytes, count * bytes)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_written_and_given_back() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * PAGE_BYTES as u64).unwrap();
        let ram = Ram::map(file, 4 * PAGE_BYTES as u64).unwrap();
        ram.with_page(2, |page| page.fill(7));
        assert!(ram.with_page(2, |page| *page == [7; PAGE_BYTES]));
        ram.clear(2, 1).unwrap();
        assert!(ram.with_page(2, |page| *page == [0; PAGE_BYTES]));
    }
}
