//! Numbers that look random and are cheap on an emulated CPU.
//!
//! They need to reveal accidents (stale, swapped, torn or zeroed bytes), not attacks.

/// Odd constant with bits well spread (2^64 divided by the golden ratio).
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
/// A second one, for the product.
const FACTOR: u64 = 0xd6e8_feb8_6659_fd93;

/// One word for a pair of words; a change of one bit of either changes it.
pub(crate) fn mix(seed: u64, value: u64) -> u64 {
    let mixed = (value ^ seed.wrapping_add(1).wrapping_mul(SPREAD)).wrapping_mul(FACTOR);
    (mixed ^ (mixed >> 32)).wrapping_mul(FACTOR)
}

/// A stream of pseudo-random words (xorshift64).
#[derive(Debug, Clone)]
pub(crate) struct Stream(u64);

impl Stream {
    /// The same seed gives the same words.
    pub(crate) fn new(seed: u64) -> Self {
        // Zero is the one word from which xorshift never leaves.
        Self(mix(seed, 0x6c69_6d6f_7361) | 1)
    }

    /// The next word.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `limit`; 0 when `limit` is 0.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit).unwrap_or(u64::MAX);
        usize::try_from(self.next().checked_rem(limit).unwrap_or(0)).unwrap_or(0)
    }
}

/// A seed that differs from boot to boot, from the kernel's own generator.
pub(crate) fn fresh_seed() -> u64 {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap_or_default();
    text.bytes().fold(0, |seed, byte| mix(seed, u64::from(byte)))
}
