//! Retry of a switchover whose stream QEMU has loaded: another QEMU replaces it and gets
//! the contents of RAM.
//!
//! ```text
//! quiesce      connections closed, disks durable and detached ─► QEMU loads, or is ended
//! begin_retry  old memfd ─ each page that equals its digest ─► new memfd
//!                          └ else: reported, and zero on both hosts until it is sent
//! ```
//!
//! Loading devices may change pages (KVM's virtual APIC does), so each page is compared
//! with the digest that both hosts have of it.
//!
//! **Invariants.** After it, RAM, the digests here and those of a source that was told
//! are the same. No memory is held twice, but for a region.

use std::io;
use std::os::unix::net::UnixStream;

use super::disks::DestinationDisk;
use super::shared::Shared;
use super::{DestinationPlane, RamTarget, close_with, map};
use crate::digest::{PageDigests, page_digest};
use crate::page::{PagePlace, page_index};
use crate::ram::Ram;
use crate::route::{REGION_PAGES, page_channel, page_slot};
use crate::shutdown::PlaneError;

/// Most pages that QEMU may have changed while it loaded devices: 256 MiB. It changes a
/// few; a host that finds more is better off with a new migration.
const CHANGED_PAGES_MAX: usize = 64 << 10;

impl DestinationPlane {
    /// Makes all disks durable, detaches them and QEMU, and closes the connections without
    /// an event. The plane receives nothing more until [`Self::begin_retry`].
    ///
    /// # Errors
    /// A disk that cannot be flushed.
    pub fn quiesce(&self) -> Result<(), PlaneError> {
        self.link.close();
        let failed = |error| PlaneError::local("flushing a disk here", error);
        // Before QEMU's stream, without whose end it exits.
        self.shared.disks.detach().map_err(failed)?;
        self.shared.lock_tail().detach();
        Ok(())
    }

    /// Replaces QEMU after [`Self::quiesce`]; connections follow. Returns the pages that the
    /// old QEMU changed: they are zero here, and the source must treat them as zero
    /// ([`crate::SourcePlane::begin_retry`]).
    ///
    /// - `ram`, `disks`: the same as before, of the new QEMU.
    ///
    /// # Errors
    /// Memory that cannot be mapped or does not fit; more changed pages than
    /// [`CHANGED_PAGES_MAX`]. The plane is of no use then.
    pub fn begin_retry(
        &self,
        ram: Vec<RamTarget>,
        disks: Vec<DestinationDisk>,
        qemu_incoming: UnixStream,
    ) -> Result<Vec<PagePlace>, PlaneError> {
        let failed = |error| PlaneError::local("filling the memory of another QEMU", error);
        close_with(&self.shutdown, &qemu_incoming)?;
        let filled = map(ram)?;
        let changed = self.shared.fill(filled).map_err(failed)?;
        self.shared.lock_progress().ram_digests = None;
        self.shared.lock_tail().begin_retry(qemu_incoming);
        self.shared.disks.attach(disks).map_err(failed)?;
        Ok(changed)
    }
}

impl Shared {
    /// Puts other RAM in the place of that which is here, with the same contents but for
    /// the pages that are returned.
    fn fill(&self, others: Vec<Ram>) -> io::Result<Vec<PagePlace>> {
        // In the order of the receivers, which may still be at a frame.
        let mut ram = self.write_ram();
        let mut digests: Vec<_> = (0..self.channel_count).map(|at| self.lock_digests(at)).collect();
        let sizes = |ram: &[Ram]| ram.iter().map(Ram::page_count).collect::<Vec<_>>();
        if sizes(&ram) != sizes(&others) {
            return Err(io::Error::other("RAM of another size than before"));
        }
        let mut changed = Vec::new();
        for (block, (old, new)) in (0..).zip(ram.iter().zip(&others)) {
            for region in 0..old.page_count().div_ceil(REGION_PAGES) {
                let first = region * REGION_PAGES;
                let end = (first + REGION_PAGES).min(old.page_count());
                let digests = &mut *digests[page_channel(first, self.channel_count)];
                for page in first..end {
                    let slot = page_slot(page, self.channel_count);
                    fill_page(block, page, (old, new), (digests, slot), &mut changed);
                }
                old.clear(first, end - first)?;
                if self.shutdown.is_shut_down() {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                if changed.len() > CHANGED_PAGES_MAX {
                    return Err(io::Error::other("too many pages were changed meanwhile"));
                }
            }
        }
        *ram = others;
        Ok(changed)
    }
}

/// Takes a page over if it is what its digest says; else it is zero, and noted.
fn fill_page(
    block: u8,
    page: u64,
    (old, new): (&Ram, &Ram),
    (digests, slot): (&mut PageDigests, usize),
    changed: &mut Vec<PagePlace>,
) {
    let expected = digests.get(block.into(), slot);
    // Zero, as new memory is.
    if expected == 0 {
        return;
    }
    old.with_page(page, |content| {
        if page_digest(block, page, content) == expected {
            new.with_page(page, |place| place.copy_from_slice(content));
        } else {
            digests.set(block.into(), slot, 0);
            changed.push(PagePlace { block, page: page_index(page) });
        }
    });
}
