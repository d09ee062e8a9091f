//! The page cache: the version of each page that was sent last, the base of differences.
//!
//! Memory is bounded. The guest and the rounds of a migration loop over RAM, and LRU would
//! evict exactly the page that is needed next when the loop is larger than the cache (clock
//! has the same weakness). So:
//!
//! - a page that is sent for the first time gets a free slot, or none;
//! - a page that is resent evicts a page that was sent once or not for long. If the cursor
//!   finds no such page within a few steps, the cache keeps its contents.

use std::collections::HashMap;

use crate::page::PAGE_BYTES;

/// Pages of a piece: 1 MiB. Huge pages were tried for larger ones, and took longer.
const PIECE_PAGES: usize = 256;

/// Slots that the cursor examines for a page that is resent.
const CURSOR_STEPS_MAX: usize = 16;
/// A page that was not sent again in this many rounds is no longer dirtied.
const FORGOTTEN_AFTER_ROUNDS: u64 = 4;
/// Weight of one page in the estimate of a round's length: one in so many.
const ROUND_WEIGHT: u64 = 64;

/// Cached versions of the pages of one channel.
pub(crate) struct PageCache {
    places: HashMap<u64, usize>,
    owners: Vec<Owner>,
    /// Contents by place, in pieces: one `Vec` would hold twice the memory while it grows.
    pieces: Vec<Box<[[u8; PAGE_BYTES]]>>,
    place_count_max: usize,
    cursor: usize,
    /// Pages sent so far
    sent_count: u64,
    /// Pages that are sent until a kept one is sent again, on average of late; 0 at first
    round_pages: u64,
}

/// Whose version a place holds.
#[derive(Debug, Clone, Copy)]
struct Owner {
    key: u64,
    /// Count of pages sent when it was sent last
    sent_at: u64,
    /// It was sent more than once
    is_repeat: bool,
}

impl Owner {
    const EMPTY: Self = Self { key: EMPTY, sent_at: 0, is_repeat: false };
}

impl PageCache {
    pub(crate) fn new(bytes_max: u64) -> Self {
        let place_count_max =
            usize::try_from(bytes_max / PAGE_BYTES as u64).unwrap_or(usize::MAX / PAGE_BYTES);
        Self {
            places: HashMap::new(),
            owners: Vec::new(),
            pieces: Vec::new(),
            place_count_max,
            cursor: 0,
            sent_count: 0,
            round_pages: 0,
        }
    }

    /// The version that was sent last, if it is kept.
    pub(crate) fn get(&self, key: u64) -> Option<&[u8; PAGE_BYTES]> {
        let place = *self.places.get(&key)?;
        Some(&self.pieces[place / PIECE_PAGES][place % PIECE_PAGES])
    }

    /// Keeps a version, in the place of the one before.
    ///
    /// - `is_repeat`: the page was sent before.
    pub(crate) fn put(&mut self, key: u64, page: &[u8; PAGE_BYTES], is_repeat: bool) {
        self.sent_count += 1;
        let known = self.places.get(&key).copied();
        let Some(place) = known.or_else(|| self.free_place(is_repeat)) else { return };
        if known.is_some() {
            self.note_round(self.sent_count - self.owners[place].sent_at);
        } else {
            self.places.insert(key, place);
        }
        self.owners[place] = Owner { key, sent_at: self.sent_count, is_repeat };
        self.pieces[place / PIECE_PAGES][place % PIECE_PAGES] = *page;
    }

    /// Forgets a page, which is zero now.
    pub(crate) fn forget(&mut self, key: u64) {
        if let Some(place) = self.places.remove(&key) {
            self.owners[place] = Owner::EMPTY;
        }
    }

    /// A kept page was sent again after so many others.
    fn note_round(&mut self, pages: u64) {
        self.round_pages = match self.round_pages {
            0 => pages,
            before => before - before / ROUND_WEIGHT + pages / ROUND_WEIGHT,
        };
    }

    fn free_place(&mut self, is_repeat: bool) -> Option<usize> {
        if self.owners.len() < self.place_count_max {
            if self.owners.len() == self.pieces.len() * PIECE_PAGES {
                self.pieces.push(vec![[0; PAGE_BYTES]; PIECE_PAGES].into_boxed_slice());
            }
            self.owners.push(Owner::EMPTY);
            return Some(self.owners.len() - 1);
        }
        // A round is at least as long as what is kept.
        let long_ago = FORGOTTEN_AFTER_ROUNDS * self.round_pages.max(self.owners.len() as u64);
        for _ in 0..CURSOR_STEPS_MAX.min(self.owners.len()) {
            let place = self.cursor;
            self.cursor = (self.cursor + 1) % self.owners.len();
            let Owner { key, sent_at, is_repeat: was_repeat } = self.owners[place];
            let is_unused = !was_repeat || self.sent_count - sent_at > long_ago;
            if key == EMPTY || is_repeat && is_unused {
                self.places.remove(&key);
                return Some(place);
            }
        }
        None
    }
}

/// Owner of a place that nobody has; no page has this key.
const EMPTY: u64 = u64::MAX;

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: [u8; PAGE_BYTES] = [1; PAGE_BYTES];

    fn of(places: u64) -> PageCache {
        PageCache::new(places * PAGE_BYTES as u64)
    }

    /// How many of these pages are kept.
    fn kept(cache: &PageCache, keys: impl Iterator<Item = u64>) -> usize {
        keys.filter(|key| cache.get(*key).is_some()).count()
    }

    /// Goal: of a loop that is larger than the memory, a little or many times, as much is
    /// kept as fits, round after round.
    #[test]
    fn a_loop_that_does_not_fit_is_kept_in_part() {
        for loop_pages in [410, 500, 1_700, 2_000, 4_000] {
            let mut cache = of(400);
            let mut found = 0;
            (0..loop_pages).for_each(|key| cache.put(key, &PAGE, false));
            for _ in 0..10 {
                found = 0;
                for key in 0..loop_pages {
                    found += usize::from(cache.get(key).is_some());
                    cache.put(key, &PAGE, true);
                }
            }
            assert!(found >= 380, "{found} of a loop of {loop_pages}");
        }
    }

    /// Goal: what is sent once, and never again, gives way to what is.
    #[test]
    fn what_is_sent_once_gives_way() {
        let mut cache = of(400);
        (1_000..1_300).for_each(|key| cache.put(key, &PAGE, false));
        for round in 0..3 {
            (0..500).for_each(|key| cache.put(key, &PAGE, round > 0));
        }
        assert_eq!(kept(&cache, 0..500), 400);
        assert_eq!(cache.places.len(), 400);
    }

    /// Goal: pages that are not dirtied any more give way in time.
    #[test]
    fn what_is_dirtied_changes() {
        let mut cache = of(100);
        for keys in [0..100, 100..200] {
            for _ in 0..8 {
                keys.clone().for_each(|key| cache.put(key, &PAGE, true));
            }
            assert_eq!(kept(&cache, keys), 100);
        }
    }

    /// Goal: a page that became zero gives its place to any other.
    #[test]
    fn a_forgotten_page_gives_its_place() {
        let mut cache = of(4);
        (0..4).for_each(|key| cache.put(key, &PAGE, true));
        cache.put(9, &PAGE, false);
        assert!(cache.get(9).is_none());
        cache.forget(2);
        assert!(cache.get(2).is_none());
        cache.put(9, &[9; PAGE_BYTES], false);
        assert_eq!(cache.get(9), Some(&[9; PAGE_BYTES]));
        assert_eq!(kept(&cache, 0..4), 3);
        let mut none = of(0);
        none.put(1, &PAGE, true);
        assert!(none.get(1).is_none());
    }
}
