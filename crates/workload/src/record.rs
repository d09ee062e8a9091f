//! One record of the disk journal: a block that proves itself.
//!
//! | qword | field |
//! |-----:|-------|
//! |    0 | magic |
//! |    1 | sequence, from 1 |
//! |    2 | slot in which the record belongs |
//! |    3 | flushed: the highest sequence that was durable when it was written |
//! |    4 | time, nanoseconds since 1970 |
//! |    5 | seed of the disk |
//! |   6… | body: qwords that follow from seed and sequence |
//! |  511 | checksum over all qwords before |

use crate::mix::{Stream, mix};

/// Bytes of a record, and of the blocks in which disks are read and written.
pub(crate) const RECORD_BYTES: usize = 4096;
const QWORD_COUNT: usize = RECORD_BYTES / 8;
const BODY_START: usize = 6;
const MAGIC: u64 = u64::from_le_bytes(*b"LMSAJRNL");

/// What a record says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    /// Number of the record, from 1
    pub sequence: u64,
    /// Slot in which it belongs
    pub slot: u64,
    /// Highest sequence that was durable when it was written
    pub flushed: u64,
    /// Nanoseconds since 1970, by the guest's clock
    pub time_ns: u64,
    /// Seed of the disk, drawn when it was new
    pub seed: u64,
}

/// What a block turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// A whole record
    Record(Record),
    /// Zeroes only
    Zero,
    /// Begins like a record, but is none
    Broken,
    /// Anything else
    Foreign,
}

impl Record {
    /// Writes the record into a block.
    pub(crate) fn write(&self, block: &mut [u8]) {
        let header = [MAGIC, self.sequence, self.slot, self.flushed, self.time_ns, self.seed];
        let mut body = Stream::new(mix(self.seed, self.sequence));
        let mut checksum = 0;
        for (position, bytes) in block.chunks_exact_mut(8).take(QWORD_COUNT).enumerate() {
            let qword = match header.get(position) {
                Some(qword) => *qword,
                None if position == QWORD_COUNT - 1 => checksum,
                None => body.next(),
            };
            bytes.copy_from_slice(&qword.to_le_bytes());
            if position < QWORD_COUNT - 1 {
                checksum = add(checksum, qword);
            }
        }
    }
}

/// Looks at a block.
pub(crate) fn look(block: &[u8]) -> Found {
    let mut qwords = [0; QWORD_COUNT];
    for (qword, bytes) in qwords.iter_mut().zip(block.chunks_exact(8)) {
        *qword = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
    }
    if qwords.iter().all(|qword| *qword == 0) {
        return Found::Zero;
    }
    if qwords[0] != MAGIC {
        return Found::Foreign;
    }
    let [_, sequence, slot, flushed, time_ns, seed, ..] = qwords;
    let checksum = qwords[..QWORD_COUNT - 1].iter().fold(0, |sum, qword| add(sum, *qword));
    let mut body = Stream::new(mix(seed, sequence));
    let body_is_right =
        qwords[BODY_START..QWORD_COUNT - 1].iter().all(|qword| *qword == body.next());
    if checksum != qwords[QWORD_COUNT - 1] || !body_is_right {
        return Found::Broken;
    }
    Found::Record(Record { sequence, slot, flushed, time_ns, seed })
}

/// Adds a qword to a checksum; unlike a sum, order matters.
fn add(checksum: u64, qword: u64) -> u64 {
    (checksum ^ qword).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(record: &Record) -> Vec<u8> {
        let mut block = vec![0; RECORD_BYTES];
        record.write(&mut block);
        block
    }

    /// Goal: a record is read as it was written, and any changed byte is seen.
    #[test]
    fn any_changed_byte_shows() {
        let record = Record { sequence: 9, slot: 3, flushed: 8, time_ns: 5, seed: 77 };
        let block = written(&record);
        assert!(matches!(look(&block), Found::Record(found) if found == record));
        for position in 0..RECORD_BYTES {
            let mut broken = block.clone();
            broken[position] ^= 0x10;
            assert!(!matches!(look(&broken), Found::Record(..)), "byte {position}");
        }
    }

    /// Goal: a torn write, half of it old, is no record.
    #[test]
    fn torn_records_show() {
        let old = written(&Record { sequence: 1, slot: 3, flushed: 0, time_ns: 5, seed: 77 });
        let new = written(&Record { sequence: 9, slot: 3, flushed: 8, time_ns: 6, seed: 77 });
        let torn = [&new[..512], &old[512..]].concat();
        assert_eq!(look(&torn), Found::Broken);
        assert_eq!(look(&[0; RECORD_BYTES]), Found::Zero);
        assert_eq!(look(&[1; RECORD_BYTES]), Found::Foreign);
    }
}
