//! Tables of digests, sent once the two sides are known to differ.

use super::{FrameError, Reader};

/// What digests are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DigestSubject {
    /// Pages of a block of RAM, by slot
    Ram,
    /// Ranges of a disk
    Disk,
}

/// Head of a piece of a table of digests.
///
/// | offset | bytes | field |
/// |-------:|------:|-------|
/// |      0 |     1 | subject: 0 RAM, 1 disk |
/// |      1 |     1 | 1 if no other piece follows |
/// |      2 |     2 | number of the block or disk |
/// |      4 |     4 | zero |
/// |      8 |     8 | place of the first digest in its table |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DigestsHeader {
    pub subject: DigestSubject,
    /// Nothing follows
    pub is_last: bool,
    /// Which block or disk
    pub number: u16,
    /// Which page or range is the first
    pub first: u64,
}

impl DigestsHeader {
    /// Bytes of the head.
    pub const BYTES: usize = 16;

    /// The head as it is on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0] = u8::from(self.subject == DigestSubject::Disk);
        bytes[1] = u8::from(self.is_last);
        bytes[2..4].copy_from_slice(&self.number.to_le_bytes());
        bytes[8..].copy_from_slice(&self.first.to_le_bytes());
        bytes
    }

    /// Takes the head off the front of a payload; whole digests are left.
    ///
    /// # Errors
    /// [`FrameError`].
    pub fn decode(payload: &mut &[u8]) -> Result<Self, FrameError> {
        let mut reader = Reader(payload);
        let [subject, is_last] = reader.array()?;
        let number = u16::from_le_bytes(reader.array()?);
        if subject > 1 || is_last > 1 || reader.array::<4>()? != [0; 4] {
            return Err(FrameError::Range("table of digests"));
        }
        let first = reader.le64()?;
        if reader.0.len() % 16 != 0 {
            return Err(FrameError::Short);
        }
        *payload = reader.0;
        let subject = if subject == 0 { DigestSubject::Ram } else { DigestSubject::Disk };
        Ok(Self { subject, is_last: is_last == 1, number, first })
    }
}
