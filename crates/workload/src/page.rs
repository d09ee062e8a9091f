//! A page of memory that proves itself.
//!
//! | qword | field |
//! |-----:|-------|
//! |    0 | identity: magic mixed with the page's index |
//! |    1 | counter: how often the page was touched |
//! |    2 | sum over all other qwords |
//! |   3… | body: qwords rewritten a few at a time |
//!
//! **Invariant.** The sum changes with each single qword, so a touch keeps it right
//! without reading the whole page. A *stale* page is consistent in itself; that
//! is why whoever owns the page also remembers its counter elsewhere.

use std::fmt;

use crate::mix::{Stream, mix};

/// Qwords of one page.
pub(crate) const QWORD_COUNT: usize = 512;
/// Bytes of one page.
pub(crate) const PAGE_BYTES: usize = QWORD_COUNT * 8;
/// Qwords in front of the body.
const HEADER_QWORDS: usize = 3;
/// Most qwords that one touch can rewrite: the whole body.
pub(crate) const TOUCH_QWORDS_MAX: usize = QWORD_COUNT - HEADER_QWORDS;
const MAGIC: u64 = u64::from_le_bytes(*b"LMSAPAGE");
const IDENTITY: usize = 0;
const COUNTER: usize = 1;
const SUM: usize = 2;

/// One page, aligned as the guest's kernel maps it.
#[derive(Debug, Clone)]
#[repr(C, align(4096))]
pub(crate) struct Page(pub [u64; QWORD_COUNT]);

/// What is wrong with a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Another page's content, or none
    Identity { index: u64, found: u64 },
    /// An earlier (or impossible) version
    Counter { index: u64, found: u64, expected: u64 },
    /// The page does not agree with its own sum
    Sum { index: u64, counter: u64 },
    /// A qword of a page whose content is known
    Qword { index: u64, qword: usize, found: u64, expected: u64 },
}

impl fmt::Display for Fault {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Identity { index, found } => {
                write!(out, "page {index}: not this page (first qword {found:#x})")
            }
            Self::Counter { index, found, expected } => {
                write!(out, "page {index}: version {found}, expected {expected}")
            }
            Self::Sum { index, counter } => {
                write!(out, "page {index}: wrong sum in version {counter}")
            }
            Self::Qword { index, qword, found, expected } => {
                write!(out, "page {index}: qword {qword} is {found:#x}, expected {expected:#x}")
            }
        }
    }
}

impl Page {
    /// A page of zeroes.
    pub(crate) const ZERO: Self = Self([0; QWORD_COUNT]);

    /// Makes it page `index` with counter 0; half of its body is random.
    pub(crate) fn begin(&mut self, index: u64, seed: u64) {
        let mut stream = Stream::new(mix(seed, index));
        for (position, qword) in self.0.iter_mut().enumerate() {
            // Real memory is neither all random nor all text.
            *qword = if position % 2 == 0 { stream.next() } else { index };
        }
        self.0[IDENTITY] = identity(index);
        self.0[COUNTER] = 0;
        self.0[SUM] = self.sum();
    }

    /// Rewrites counter, sum and `qwords` qwords of the body; `counter` is what it must say now.
    pub(crate) fn touch(&mut self, index: u64, counter: u64, qwords: usize) -> Result<(), Fault> {
        self.check_header(index, counter)?;
        let next = counter.wrapping_add(1);
        self.put(COUNTER, next);
        let start = usize::try_from(mix(index, next) % 509).unwrap_or(0);
        let mut value = mix(next, index);
        for step in 0..qwords.min(TOUCH_QWORDS_MAX) {
            value = value.rotate_left(9).wrapping_add(next);
            self.put(HEADER_QWORDS + (start + step) % TOUCH_QWORDS_MAX, value);
        }
        Ok(())
    }

    /// Checks all of it; `counter` is what it must say now.
    pub(crate) fn check(&self, index: u64, counter: u64) -> Result<(), Fault> {
        self.check_header(index, counter)?;
        if self.sum() == self.0[SUM] { Ok(()) } else { Err(Fault::Sum { index, counter }) }
    }

    /// Its bytes, for disks.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        as_bytes(std::slice::from_mut(self))
    }

    /// Fills the page with qwords that follow from `seed` and `index` alone.
    pub(crate) fn fill(&mut self, index: u64, seed: u64) {
        let mut stream = Stream::new(mix(seed, index));
        self.0.iter_mut().for_each(|qword| *qword = stream.next());
    }

    /// Checks what [`Page::fill`] wrote.
    pub(crate) fn check_filled(&self, index: u64, seed: u64) -> Result<(), Fault> {
        let mut stream = Stream::new(mix(seed, index));
        self.check_qwords(index, || stream.next())
    }

    /// Checks that the page holds zeroes only.
    pub(crate) fn check_zero(&self, index: u64) -> Result<(), Fault> {
        self.check_qwords(index, || 0)
    }

    fn check_qwords(&self, index: u64, mut next: impl FnMut() -> u64) -> Result<(), Fault> {
        for (qword, found) in self.0.iter().copied().enumerate() {
            let expected = next();
            if found != expected {
                return Err(Fault::Qword { index, qword, found, expected });
            }
        }
        Ok(())
    }

    fn check_header(&self, index: u64, expected: u64) -> Result<(), Fault> {
        if self.0[IDENTITY] != identity(index) {
            return Err(Fault::Identity { index, found: self.0[IDENTITY] });
        }
        let found = self.0[COUNTER];
        if found == expected { Ok(()) } else { Err(Fault::Counter { index, found, expected }) }
    }

    /// Replaces one qword and keeps the sum right.
    fn put(&mut self, position: usize, value: u64) {
        let old = std::mem::replace(&mut self.0[position], value);
        self.0[SUM] =
            self.0[SUM].wrapping_sub(share(position, old)).wrapping_add(share(position, value));
    }

    fn sum(&self) -> u64 {
        let qwords = self.0.iter().enumerate().filter(|(position, _)| *position != SUM);
        qwords.fold(0, |sum, (position, qword)| sum.wrapping_add(share(position, *qword)))
    }
}

/// The bytes of pages, for disks.
pub(crate) fn as_bytes(pages: &mut [Page]) -> &mut [u8] {
    let bytes = size_of_val(pages);
    // SAFETY: qwords are whole bytes without padding, pages follow each other without
    // gaps, and any byte is allowed in a qword.
    unsafe { std::slice::from_raw_parts_mut(pages.as_mut_ptr().cast(), bytes) }
}

fn identity(index: u64) -> u64 {
    MAGIC ^ index.rotate_left(20)
}

/// What one qword adds to the sum of its page.
fn share(position: usize, qword: u64) -> u64 {
    mix(u64::try_from(position).unwrap_or(0), qword)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touched(times: u64, qwords: usize) -> Page {
        let mut page = Page::ZERO;
        page.begin(7, 1);
        for counter in 0..times {
            page.touch(7, counter, qwords).unwrap();
        }
        page
    }

    /// Goal: the sum stays right over touches of any size, and any flipped bit shows.
    #[test]
    fn any_flipped_bit_shows() {
        for qwords in [0, 1, 8, TOUCH_QWORDS_MAX, usize::MAX] {
            let page = touched(40, qwords);
            page.check(7, 40).unwrap();
            for qword in 0..QWORD_COUNT {
                let mut broken = page.clone();
                broken.0[qword] ^= 1 << (qword % 64);
                assert!(broken.check(7, 40).is_err(), "bit of qword {qword}");
            }
        }
    }

    /// Goal: a page that is right in itself but old, foreign or zero is found,
    /// also by the touch that would else make it look new.
    #[test]
    fn stale_foreign_and_zero_pages_show() {
        let mut stale = touched(4, 8);
        assert_eq!(stale.check(7, 5), Err(Fault::Counter { index: 7, found: 4, expected: 5 }));
        assert!(stale.touch(7, 5, 8).is_err());
        assert!(matches!(touched(4, 8).check(8, 4), Err(Fault::Identity { .. })));
        assert!(matches!(Page::ZERO.check(7, 0), Err(Fault::Identity { .. })));
    }

    /// Goal: known content and zeroes are compared qword by qword.
    #[test]
    fn known_content_is_compared() {
        let mut page = Page::ZERO;
        page.check_zero(3).unwrap();
        page.fill(3, 9);
        page.check_filled(3, 9).unwrap();
        assert!(page.check_filled(4, 9).is_err());
        page.0[511] ^= 1;
        assert!(matches!(page.check_filled(3, 9), Err(Fault::Qword { qword: 511, .. })));
        assert!(page.check_zero(3).is_err());
    }
}
