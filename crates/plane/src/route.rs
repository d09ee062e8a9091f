//! Which channel carries what.
//!
//! RAM and disks are cut into regions of 1 MiB, dealt to the channels in turn.
//! All versions of a page cross on one channel, in order, and one thread has all
//! that is known of it: no locks, and a difference always meets its base.

use crate::page::PAGE_BYTES;

/// Bytes of a region.
pub(crate) const REGION_BYTES: u64 = 1 << 20;
/// Pages of a region.
pub(crate) const REGION_PAGES: u64 = REGION_BYTES / PAGE_BYTES as u64;

/// Channel of a page.
pub(crate) fn page_channel(page: u64, channel_count: usize) -> usize {
    shard(page / REGION_PAGES, channel_count)
}

/// Place of a page among those of its channel.
pub(crate) fn page_slot(page: u64, channel_count: usize) -> usize {
    let turn = page / REGION_PAGES / channel_count as u64;
    usize::try_from(turn * REGION_PAGES + page % REGION_PAGES).unwrap_or(usize::MAX)
}

/// The page that has a slot of a channel.
pub(crate) fn slot_page(slot: usize, channel: usize, channel_count: usize) -> u64 {
    let (slot, channel) = (slot as u64, channel as u64);
    let region = slot / REGION_PAGES * channel_count as u64 + channel;
    region * REGION_PAGES + slot % REGION_PAGES
}

/// Slots that a channel needs for a block of RAM.
pub(crate) fn slot_count(size_bytes: u64, channel_count: usize) -> usize {
    let regions = size_bytes.div_ceil(REGION_BYTES).div_ceil(channel_count as u64);
    usize::try_from(regions * REGION_PAGES).unwrap_or(usize::MAX)
}

/// Channel of a byte of a disk.
pub(crate) fn disk_channel(disk: u16, offset_bytes: u64, channel_count: usize) -> usize {
    shard(offset_bytes / REGION_BYTES + u64::from(disk), channel_count)
}

/// Whether a range of a disk lies within one region, so that it has one channel.
pub(crate) fn is_in_one_region(offset_bytes: u64, length_bytes: u64) -> bool {
    offset_bytes % REGION_BYTES + length_bytes <= REGION_BYTES
}

fn shard(region: u64, channel_count: usize) -> usize {
    usize::try_from(region % channel_count as u64).expect("below a usize")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_range_has_one_channel_or_is_cut() {
        assert!(is_in_one_region(0, REGION_BYTES) && is_in_one_region(3 * REGION_BYTES - 1, 1));
        assert!(!is_in_one_region(1, REGION_BYTES) && !is_in_one_region(REGION_BYTES - 1, 2));
    }

    #[test]
    fn every_page_has_a_slot_of_its_own() {
        for channel_count in [1, 2, 3, 7] {
            let pages = 5000u64;
            let mut seen = HashSet::new();
            for page in 0..pages {
                let slot = page_slot(page, channel_count);
                assert!(slot < slot_count(pages * 4096, channel_count));
                let channel = page_channel(page, channel_count);
                assert_eq!(slot_page(slot, channel, channel_count), page);
                assert!(seen.insert((channel, slot)));
            }
        }
    }
}
