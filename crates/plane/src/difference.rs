//! A page as its difference to the version sent before.
//!
//! ```text
//! 64 bytes: one bit for each word of 8 bytes that changed, word 0 is bit 0 of byte 0
//! then the changed chunks, in order
//! ```
//!
//! Counters and pointers change a few chunks of a page: 64 bytes and those chunks
//! replace 4096. The bitmap is mostly zero, which zstd shrinks to almost nothing.

use crate::page::PAGE_BYTES;

const CHUNK_BYTES: usize = 8;
const CHUNK_COUNT: usize = PAGE_BYTES / CHUNK_BYTES;
const BITMAP_BYTES: usize = CHUNK_COUNT / 8;
/// A difference longer than this is no gain over the whole page, compressed.
const DIFFERENCE_BYTES_MAX: usize = PAGE_BYTES * 3 / 4;

/// Puts the difference at the end of `out`.
///
/// Returns its length, or `None` (with `out` as it was) when it is too long.
pub(crate) fn encode(
    old: &[u8; PAGE_BYTES],
    new: &[u8; PAGE_BYTES],
    out: &mut Vec<u8>,
) -> Option<usize> {
    let start = out.len();
    out.resize(start + BITMAP_BYTES, 0);
    let chunks = old.as_chunks::<CHUNK_BYTES>().0.iter().zip(new.as_chunks::<CHUNK_BYTES>().0);
    for (index, (old, new)) in chunks.enumerate() {
        if old != new {
            out[start + index / 8] |= 1 << (index % 8);
            out.extend_from_slice(new);
        }
    }
    let length = out.len() - start;
    if length > DIFFERENCE_BYTES_MAX {
        out.truncate(start);
        return None;
    }
    Some(length)
}

/// A difference that does not fit a page.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a difference whose length does not fit its bitmap")]
pub(crate) struct BadDifference;

/// Applies a difference to the version before; on `Err` nothing was changed.
pub(crate) fn apply(page: &mut [u8; PAGE_BYTES], difference: &[u8]) -> Result<(), BadDifference> {
    let (bitmap, chunks) = difference.split_at_checked(BITMAP_BYTES).ok_or(BadDifference)?;
    let changed: usize = bitmap.iter().map(|byte| byte.count_ones() as usize).sum();
    if chunks.len() != changed * CHUNK_BYTES {
        return Err(BadDifference);
    }
    let mut chunks = chunks.chunks_exact(CHUNK_BYTES);
    for (index, place) in page.as_chunks_mut::<CHUNK_BYTES>().0.iter_mut().enumerate() {
        if bitmap[index / 8] & (1 << (index % 8)) != 0
            && let Some(chunk) = chunks.next()
        {
            place.copy_from_slice(chunk);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_difference_restores_the_page(
            changes in prop::collection::vec((0..PAGE_BYTES, any::<u8>()), 0..1500),
        ) {
            let mut old = [0; PAGE_BYTES];
            for (index, byte) in old.iter_mut().enumerate() {
                *byte = u8::try_from(index % 251).unwrap();
            }
            let mut new = old;
            for (at, value) in changes {
                new[at] = value;
            }
            let mut out = vec![9];
            if encode(&old, &new, &mut out).is_some() {
                let mut page = old;
                apply(&mut page, &out[1..]).unwrap();
                prop_assert!(page == new);
            } else {
                prop_assert_eq!(out, vec![9]);
            }
        }

        #[test]
        fn no_bytes_break_it(
            set in prop::collection::vec(0..CHUNK_COUNT, 0..40),
            cut in -9..9isize,
        ) {
            // Words that fit the bitmap, then as many bytes less or more.
            let mut bytes = vec![0u8; BITMAP_BYTES];
            for index in set {
                bytes[index / 8] |= 1 << (index % 8);
            }
            let count: u32 = bytes.iter().map(|byte| byte.count_ones()).sum();
            let fitting = BITMAP_BYTES + count as usize * CHUNK_BYTES;
            bytes.resize(fitting.saturating_add_signed(cut), 1);
            let mut page = [7; PAGE_BYTES];
            let applied = apply(&mut page, &bytes);
            prop_assert_eq!(applied.is_ok(), cut == 0);
            prop_assert!(applied.is_ok() || page == [7; PAGE_BYTES]);
        }
    }
}
