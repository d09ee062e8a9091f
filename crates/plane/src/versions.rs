//! The versions of pages that were sent last, for differences.
//!
//! Bounded memory. Guests go over their memory again and again, and so do the rounds
//! of a migration: who takes the place of the page that was used longest ago takes
//! that of the next one to be sent, and no difference is ever found (the known
//! weakness of LRU and clock on loops larger than the cache). So:
//!
//! - a page that is sent for the first time gets a free place, or none;
//! - one that is sent again takes the place of one that never was, or was not for
//!   long; if a hand finds none in a few steps, it gets none, and those that are there
//!   stay useful.

use std::collections::HashMap;

use crate::PAGE_BYTES;

/// Pages of a piece: 1 MiB. Huge pages were tried for larger ones, and took longer.
const PIECE_PAGES: usize = 256;

/// Places that are looked at for a page that is sent again.
const HAND_STEPS: usize = 16;
/// A page that was not sent again while this many times all places were is no longer
/// dirtied.
const FORGOTTEN_AFTER_ROUNDS: u64 = 4;

/// Versions of the pages that one channel carries.
pub(crate) struct Versions {
    places: HashMap<u64, usize>,
    owners: Vec<Owner>,
    /// Contents by place, in pieces: one `Vec` would hold twice the memory while it grows.
    pieces: Vec<Box<[[u8; PAGE_BYTES]]>>,
    place_count_max: usize,
    hand: usize,
    /// Pages sent so far, from 1
    sent_count: u64,
}

/// Whose version a place holds.
#[derive(Debug, Clone, Copy)]
struct Owner {
    key: u64,
    /// Count of pages sent when it was sent again last; 0 if it never was
    again_at: u64,
}

impl Versions {
    pub(crate) fn new(bytes_max: u64) -> Self {
        let place_count_max =
            usize::try_from(bytes_max / PAGE_BYTES as u64).unwrap_or(usize::MAX / PAGE_BYTES);
        Self {
            places: HashMap::new(),
            owners: Vec::new(),
            pieces: Vec::new(),
            place_count_max,
            hand: 0,
            sent_count: 1,
        }
    }

    /// The version that was sent last, if it is kept.
    pub(crate) fn get(&self, key: u64) -> Option<&[u8; PAGE_BYTES]> {
        let place = *self.places.get(&key)?;
        Some(&self.pieces[place / PIECE_PAGES][place % PIECE_PAGES])
    }

    /// Keeps a version, in the place of the one before.
    ///
    /// - `is_again`: the page was sent before.
    pub(crate) fn put(&mut self, key: u64, page: &[u8; PAGE_BYTES], is_again: bool) {
        self.sent_count += 1;
        let known = self.places.get(&key).copied();
        let Some(place) = known.or_else(|| self.free_place(is_again)) else { return };
        if known.is_none() {
            self.places.insert(key, place);
        }
        let again_at = if is_again { self.sent_count } else { 0 };
        self.owners[place] = Owner { key, again_at };
        self.pieces[place / PIECE_PAGES][place % PIECE_PAGES] = *page;
    }

    /// Forgets a page, which is zero now.
    pub(crate) fn forget(&mut self, key: u64) {
        if let Some(place) = self.places.remove(&key) {
            self.owners[place] = Owner { key: NOBODY, again_at: 0 };
        }
    }

    fn free_place(&mut self, is_again: bool) -> Option<usize> {
        if self.owners.len() < self.place_count_max {
            if self.owners.len() == self.pieces.len() * PIECE_PAGES {
                self.pieces.push(vec![[0; PAGE_BYTES]; PIECE_PAGES].into_boxed_slice());
            }
            self.owners.push(Owner { key: NOBODY, again_at: 0 });
            return Some(self.owners.len() - 1);
        }
        let long_ago = FORGOTTEN_AFTER_ROUNDS * self.owners.len() as u64;
        for _ in 0..HAND_STEPS.min(self.owners.len()) {
            let place = self.hand;
            self.hand = (self.hand + 1) % self.owners.len();
            let Owner { key, again_at } = self.owners[place];
            let is_unused = again_at == 0 || self.sent_count - again_at > long_ago;
            if key == NOBODY || is_again && is_unused {
                self.places.remove(&key);
                return Some(place);
            }
        }
        None
    }
}

/// Owner of a place that nobody has; no page has this key.
const NOBODY: u64 = u64::MAX;

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: [u8; PAGE_BYTES] = [1; PAGE_BYTES];

    fn of(places: u64) -> Versions {
        Versions::new(places * PAGE_BYTES as u64)
    }

    /// How many of these pages are kept.
    fn kept(versions: &Versions, keys: impl Iterator<Item = u64>) -> usize {
        keys.filter(|key| versions.get(*key).is_some()).count()
    }

    /// Goal: of a loop that is larger than the memory, as much is kept as fits, round
    /// after round.
    #[test]
    fn a_loop_that_does_not_fit_is_kept_in_part() {
        let mut versions = of(400);
        // What is sent once, and never again, comes first and gives way.
        (1_000..1_300).for_each(|key| versions.put(key, &PAGE, false));
        (0..500).for_each(|key| versions.put(key, &PAGE, false));
        for round in 0..10 {
            let found = kept(&versions, 0..500);
            assert!(round < 2 || found == 400, "{found} found in round {round}");
            (0..500).for_each(|key| versions.put(key, &PAGE, true));
        }
        assert_eq!(versions.places.len(), 400);
    }

    /// Goal: pages that are not dirtied any more give way in time.
    #[test]
    fn what_is_dirtied_changes() {
        let mut versions = of(100);
        for keys in [0..100, 100..200] {
            for _ in 0..8 {
                keys.clone().for_each(|key| versions.put(key, &PAGE, true));
            }
            assert_eq!(kept(&versions, keys), 100);
        }
    }

    /// Goal: a page that became zero gives its place to any other.
    #[test]
    fn a_forgotten_page_gives_its_place() {
        let mut versions = of(4);
        (0..4).for_each(|key| versions.put(key, &PAGE, true));
        versions.put(9, &PAGE, false);
        assert!(versions.get(9).is_none());
        versions.forget(2);
        assert!(versions.get(2).is_none());
        versions.put(9, &[9; PAGE_BYTES], false);
        assert_eq!(versions.get(9), Some(&[9; PAGE_BYTES]));
        assert_eq!(kept(&versions, 0..4), 3);
        let mut none = of(0);
        none.put(1, &PAGE, true);
        assert!(none.get(1).is_none());
    }
}
