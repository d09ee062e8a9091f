//! The versions of pages that were sent last, for differences.
//!
//! Bounded memory: when it is full, a clock hand goes round and takes the place
//! of a page that was not sent again since the hand passed. Pages that the guest
//! keeps dirtying stay; those of the first round give way to them.

use std::collections::HashMap;

use crate::PAGE_BYTES;

/// Pages of a piece: 1 MiB.
const PIECE_PAGES: usize = 256;

/// Versions of the pages that one channel carries.
pub(crate) struct Versions {
    places: HashMap<u64, usize>,
    owners: Vec<u64>,
    used: Vec<bool>,
    /// Contents by place, in pieces: one `Vec` would hold twice the memory while it grows.
    pieces: Vec<Box<[[u8; PAGE_BYTES]]>>,
    place_count_max: usize,
    hand: usize,
}

impl Versions {
    pub(crate) fn new(bytes_max: u64) -> Self {
        let place_count_max =
            usize::try_from(bytes_max / PAGE_BYTES as u64).unwrap_or(usize::MAX / PAGE_BYTES);
        Self {
            places: HashMap::new(),
            owners: Vec::new(),
            used: Vec::new(),
            pieces: Vec::new(),
            place_count_max,
            hand: 0,
        }
    }

    /// The version that was sent last, if it is kept. Counts as use.
    pub(crate) fn get(&mut self, key: u64) -> Option<&[u8; PAGE_BYTES]> {
        let place = *self.places.get(&key)?;
        self.used[place] = true;
        Some(&self.pieces[place / PIECE_PAGES][place % PIECE_PAGES])
    }

    /// Keeps a version, in the place of the one before.
    pub(crate) fn put(&mut self, key: u64, page: &[u8; PAGE_BYTES]) {
        let place = match self.places.get(&key) {
            Some(place) => *place,
            None => match self.free_place() {
                Some(place) => {
                    self.owners[place] = key;
                    self.places.insert(key, place);
                    place
                }
                None => return,
            },
        };
        self.pieces[place / PIECE_PAGES][place % PIECE_PAGES] = *page;
    }

    /// Forgets a page, which is zero now.
    pub(crate) fn forget(&mut self, key: u64) {
        if let Some(place) = self.places.remove(&key) {
            self.used[place] = false;
            self.owners[place] = NOBODY;
        }
    }

    fn free_place(&mut self) -> Option<usize> {
        if self.owners.len() < self.place_count_max {
            self.owners.push(NOBODY);
            self.used.push(false);
            if self.owners.len() > self.pieces.len() * PIECE_PAGES {
                self.pieces.push(vec![[0; PAGE_BYTES]; PIECE_PAGES].into_boxed_slice());
            }
            return Some(self.owners.len() - 1);
        }
        // Two rounds at most: the first clears every mark.
        for _ in 0..self.owners.len() * 2 {
            let place = self.hand;
            self.hand = (self.hand + 1) % self.owners.len();
            if std::mem::take(&mut self.used[place]) {
                continue;
            }
            self.places.remove(&self.owners[place]);
            return Some(place);
        }
        None
    }
}

/// Owner of a place that nobody has; no page has this key.
const NOBODY: u64 = u64::MAX;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_in_use_stay_and_memory_is_bounded() {
        let mut versions = Versions::new(4 * PAGE_BYTES as u64);
        for key in 0..4 {
            versions.put(key, &[1; PAGE_BYTES]);
        }
        assert!(versions.get(2).is_some());
        for key in 10..13 {
            versions.put(key, &[2; PAGE_BYTES]);
        }
        assert!(versions.get(2).is_some(), "the used one stays");
        assert_eq!(versions.places.len(), 4);
        versions.forget(2);
        assert!(versions.get(2).is_none());
        let mut none = Versions::new(0);
        none.put(1, &[1; PAGE_BYTES]);
        assert!(none.get(1).is_none());
    }
}
