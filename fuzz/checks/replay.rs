//! The corpus of a fuzz target, and what becomes of it when it is damaged, through
//! the target's check in an ordinary test.
//!
//! ```text
//! corpus/<target>/* ─► as it is ─┐
//!                  └─► damaged ──┴─► check ─► no panic, and no memory beyond the limit
//! ```
//!
//! The damage is the same in each run, so that a failure comes again; its number
//! is told. Whoever includes this gets the allocator that counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Largest file of a corpus.
const FILE_BYTES_MAX: usize = 200_000;
/// Most bytes of a corpus.
const CORPUS_BYTES_MAX: usize = 2_000_000;
/// Most bytes of all damaged versions of a file: large ones get fewer of them.
const DAMAGED_BYTES_MAX: u64 = 8 << 20;
/// Where lengths and counts mostly are.
const HEAD_BYTES: usize = 512;

thread_local! {
    static LIVE_BYTES: Cell<isize> = const { Cell::new(0) };
    static PEAK_BYTES: Cell<isize> = const { Cell::new(0) };
}

/// Counts what each thread takes and gives back.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(bytes: isize) {
    // A thread that ends has no counter any more, and nobody asks for it.
    let _ = LIVE_BYTES.try_with(|live| {
        live.set(live.get().wrapping_add(bytes));
        let _ = PEAK_BYTES.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
}

// SAFETY: everything is the system's allocator's; counting neither allocates nor
// unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(layout.size().cast_signed().wrapping_neg());
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Most bytes that `work` held at once, beyond what was held before.
fn peak_bytes(work: impl FnOnce()) -> usize {
    let before = LIVE_BYTES.get();
    PEAK_BYTES.set(before);
    work();
    usize::try_from(PEAK_BYTES.get() - before).unwrap_or(0)
}

/// The same numbers in each run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        // splitmix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `end`, or 0.
    fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end).expect("an index fits");
        usize::try_from(self.next().checked_rem(end).unwrap_or(0)).expect("it is below an index")
    }

    /// A place; as often as not near the start.
    fn place(&mut self, length: usize) -> usize {
        let end = if self.next().is_multiple_of(2) { length } else { length.min(HEAD_BYTES) };
        self.below(end)
    }
}

/// Damages bytes in one to four places.
fn damage(bytes: &mut Vec<u8>, numbers: &mut Numbers) {
    for _ in 0..=numbers.below(4) {
        let at = numbers.place(bytes.len());
        match numbers.below(6) {
            0 => bytes.truncate(at),
            1 => {
                let end = (at + 1 + numbers.below(64)).min(bytes.len());
                bytes.drain(at..end);
            }
            2 => {
                let end = (at + 1 + numbers.below(64)).min(bytes.len());
                let repeated = bytes[at..end].to_vec();
                bytes.splice(at..at, repeated);
            }
            3 => blow_up(bytes, at, numbers),
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << numbers.below(8);
                }
            }
        }
    }
}

/// Writes an extreme number of 1 to 8 bytes, in either order, as a length might be.
fn blow_up(bytes: &mut [u8], at: usize, numbers: &mut Numbers) {
    let width = 1 << numbers.below(4);
    let length = u64::try_from(bytes.len()).expect("a length fits");
    let extremes =
        [u64::MAX, u64::MAX >> 1, 1 << 31, 0, length, length + 1, 1 << 20, (1 << 20) + 1];
    let number = extremes[numbers.below(extremes.len())];
    let number = if numbers.next().is_multiple_of(2) {
        number.to_le_bytes()[..width].to_vec()
    } else {
        number.to_be_bytes()[8 - width..].to_vec()
    };
    for (byte, new) in bytes.iter_mut().skip(at).zip(number) {
        *byte = new;
    }
}

fn run(what: &str, bytes: &[u8], check: fn(&[u8]), bytes_max: fn(usize) -> usize) {
    let peak = catch_unwind(AssertUnwindSafe(|| peak_bytes(|| check(bytes))));
    let peak = peak.unwrap_or_else(|_| panic!("{what} broke it"));
    assert!(peak <= bytes_max(bytes.len()), "{what}, {} bytes, took {peak}", bytes.len());
}

/// Gives the corpus of a target to its check, whole and damaged. `bytes_max` is
/// the most memory that an input of a length may take, `damaged_count` how many
/// damaged versions of each file are tried.
pub(crate) fn replay(
    target: &str,
    damaged_count: u64,
    check: fn(&[u8]),
    bytes_max: fn(usize) -> usize,
) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let entries = fs::read_dir(&folder).expect("a corpus").map(|entry| entry.expect("a file"));
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} is empty", folder.display());
    let mut corpus_bytes = 0;
    for path in paths {
        let bytes = fs::read(&path).expect("a file");
        assert!(bytes.len() <= FILE_BYTES_MAX, "{} is too large", path.display());
        corpus_bytes += bytes.len();
        run(&path.display().to_string(), &bytes, check, bytes_max);
        let length = u64::try_from(bytes.len()).expect("a length fits");
        for seed in 0..damaged_count.min(DAMAGED_BYTES_MAX / (length + 1)) {
            let mut damaged = bytes.clone();
            damage(&mut damaged, &mut Numbers(seed));
            run(&format!("{} with damage {seed}", path.display()), &damaged, check, bytes_max);
        }
    }
    assert!(corpus_bytes <= CORPUS_BYTES_MAX, "{} is too large", folder.display());
}
