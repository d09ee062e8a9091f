//! What a data channel carries: frames with a fixed header, little-endian.
//!
//! | offset | bytes | field         |                                            |
//! |-------:|------:|---------------|--------------------------------------------|
//! |      0 |     4 | magic         | `b"LMF1"`                                  |
//! |      4 |     1 | `kind`        | see [`FrameKind`]                          |
//! |      5 |     1 | `packing`     | 0 as it is, 1 one zstd block               |
//! |      6 |     2 | zero          |                                            |
//! |      8 |     4 | `wire_bytes`  | payload that follows, 0 ..= [`WIRE_BYTES_MAX`] |
//! |     12 |     4 | `plain_bytes` | payload unpacked, 0 ..= [`PLAIN_BYTES_MAX`]    |
//!
//! Payloads, unpacked:
//!
//! | kind | payload |
//! |------|---------|
//! | `Pages` | page records, each a [`PageHeader`] and its content |
//! | `RamStart` | 32 bits: number of a stream of QEMU that begins; pages follow |
//! | `Stream` | bytes for the destination's QEMU, in order: whole sections |
//! | `Tail` | bytes for the destination's QEMU that are held until `Release` |
//! | `StreamEnd` | nothing: QEMU's stream is complete |
//! | `Release` | nothing: the tail goes to QEMU; no other stream follows |
//! | `DiskWrite` | [`DiskHeader`], then the bytes |
//! | `DiskZero`, `DiskDiscard` | [`DiskHeader`] |
//! | `RamBarrier`, `DiskBarrier` | nothing: all before this is to be acknowledged |
//! | `Ack` | [`Ack`]; on the return path only |
//! | `Resume` | [`Resume`]; against the stream, first on each connection of a channel |
//! | `KeepAlive` | nothing; either way, not counted |
//! | `Digests` | [`DigestsHeader`], then digests of 16 bytes: the two sides differ, find where |
//!
//! Frames of a channel are counted from 1, on whichever connection they come;
//! the number is not sent. `Ack`, `Resume` and `KeepAlive` have none.
//!
//! **Invariant.** A header is checked before any memory is taken for what it
//! announces.

mod digests;

pub use digests::{DigestSubject, DigestsHeader};

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 16;
/// Largest payload, unpacked: 1 MiB of content and its headers.
pub const PLAIN_BYTES_MAX: usize = (1 << 20) + (64 << 10);
/// Largest payload on the wire; a zstd block is never much larger than its content.
pub const WIRE_BYTES_MAX: usize = PLAIN_BYTES_MAX + (16 << 10);
const MAGIC: [u8; 4] = *b"LMF1";

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FrameKind {
    /// Pages of guest RAM
    Pages = 1,
    /// A piece of QEMU's stream
    Stream = 2,
    /// The end of QEMU's stream
    StreamEnd = 3,
    /// Bytes for a disk
    DiskWrite = 4,
    /// Zeroes for a disk
    DiskZero = 5,
    /// A part of a disk is not needed any more
    DiskDiscard = 6,
    /// Acknowledge all RAM before this
    RamBarrier = 7,
    /// Flush and acknowledge all disk operations before this
    DiskBarrier = 8,
    /// Return path: what the destination holds of a channel
    Ack = 9,
    /// First on a new connection: what the destination has already
    Resume = 10,
    /// Nothing to say, and still there
    KeepAlive = 11,
    /// A stream of QEMU begins
    RamStart = 12,
    /// A piece of QEMU's stream after its last round
    Tail = 13,
    /// The tail may go to QEMU
    Release = 14,
    /// What the source has of each page or range, once a barrier showed a difference
    Digests = 15,
}

impl FrameKind {
    const ALL: [Self; 15] = [
        Self::Pages,
        Self::Stream,
        Self::StreamEnd,
        Self::DiskWrite,
        Self::DiskZero,
        Self::DiskDiscard,
        Self::RamBarrier,
        Self::DiskBarrier,
        Self::Ack,
        Self::Resume,
        Self::KeepAlive,
        Self::RamStart,
        Self::Tail,
        Self::Release,
        Self::Digests,
    ];

    fn decode(byte: u8) -> Result<Self, FrameError> {
        // The kinds are numbered from 1, without gaps.
        let index = usize::from(byte).checked_sub(1);
        index.and_then(|index| Self::ALL.get(index)).copied().ok_or(FrameError::Kind(byte))
    }
}

/// A header or payload that breaks the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// No frame begins here.
    #[error("not a frame")]
    Magic,
    /// A kind that this version does not know.
    #[error("a frame of unknown kind {0}")]
    Kind(u8),
    /// A length or a field out of its range.
    #[error("a frame whose {0} is out of range")]
    Range(&'static str),
    /// A payload that ends in the middle of something.
    #[error("a payload that ends in the middle")]
    Short,
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    pub kind: FrameKind,
    /// Whether the payload is a zstd block
    pub packed: bool,
    /// Bytes that follow on the wire
    pub wire_bytes: u32,
    /// Bytes of the payload, unpacked
    pub plain_bytes: u32,
}

impl FrameHeader {
    /// The header as it is on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = self.kind as u8;
        bytes[5] = u8::from(self.packed);
        bytes[8..12].copy_from_slice(&self.wire_bytes.to_le_bytes());
        bytes[12..].copy_from_slice(&self.plain_bytes.to_le_bytes());
        bytes
    }

    /// Reads and checks a header.
    ///
    /// # Errors
    /// [`FrameError`] for anything that [`Self::encode`] cannot have made.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let mut reader = Reader(bytes);
        if reader.array()? != MAGIC {
            return Err(FrameError::Magic);
        }
        let [kind, packing] = reader.array()?;
        let kind = FrameKind::decode(kind)?;
        if packing > 1 || reader.array::<2>()? != [0; 2] {
            return Err(FrameError::Range("packing"));
        }
        let packed = packing == 1;
        let wire_bytes = reader.le32()?;
        let plain_bytes = reader.le32()?;
        let within = |bytes: u32, most: usize| usize::try_from(bytes).is_ok_and(|b| b <= most);
        if !within(wire_bytes, WIRE_BYTES_MAX) || !within(plain_bytes, PLAIN_BYTES_MAX) {
            return Err(FrameError::Range("length"));
        }
        if !packed && wire_bytes != plain_bytes {
            return Err(FrameError::Range("length"));
        }
        Ok(Self { kind, packed, wire_bytes, plain_bytes })
    }
}

/// How a page is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum PageForm {
    /// Only zeroes; no content follows
    Zero = 0,
    /// What changed since the version before
    Difference = 1,
    /// All of it
    Full = 2,
}

/// Head of a page record.
///
/// | offset | bytes | field |
/// |-------:|------:|-------|
/// |      0 |     4 | `index`: page of 4 KiB within its block |
/// |      4 |     1 | `block` |
/// |      5 |     1 | `form` |
/// |      6 |     2 | `content_bytes` that follow |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageHeader {
    /// Page of 4 KiB within its block
    pub index: u32,
    /// Number of the RAM block
    pub block: u8,
    pub form: PageForm,
    /// Bytes that follow
    pub content_bytes: u16,
}

impl PageHeader {
    /// Bytes of the head.
    pub const BYTES: usize = 8;

    /// Puts the head at the end of a payload.
    pub fn encode_into(&self, payload: &mut Vec<u8>) {
        payload.extend_from_slice(&self.index.to_le_bytes());
        payload.extend_from_slice(&[self.block, self.form as u8]);
        payload.extend_from_slice(&self.content_bytes.to_le_bytes());
    }

    /// Takes a record off the front of a payload: its head and content.
    ///
    /// # Errors
    /// [`FrameError`]; also for a page of zeroes with a content.
    pub fn decode<'a>(payload: &mut &'a [u8]) -> Result<(Self, &'a [u8]), FrameError> {
        let mut reader = Reader(payload);
        let index = reader.le32()?;
        let [block, form] = reader.array()?;
        let form = match form {
            0 => PageForm::Zero,
            1 => PageForm::Difference,
            2 => PageForm::Full,
            _ => return Err(FrameError::Range("page form")),
        };
        let content_bytes = u16::from_le_bytes(reader.array()?);
        if form == PageForm::Zero && content_bytes > 0 {
            return Err(FrameError::Range("page form"));
        }
        let content = reader.bytes(content_bytes.into())?;
        *payload = reader.0;
        Ok((Self { index, block, form, content_bytes }, content))
    }
}

/// Head of a disk operation.
///
/// | offset | bytes | field |
/// |-------:|------:|-------|
/// |      0 |     2 | `disk` |
/// |      2 |     1 | `may_unmap`: 1 if zeroes may become a hole |
/// |      3 |     5 | zero |
/// |      8 |     8 | `offset_bytes` |
/// |     16 |     8 | `length_bytes` |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskHeader {
    pub disk: u16,
    /// Whether zeroes may become a hole
    pub may_unmap: bool,
    pub offset_bytes: u64,
    pub length_bytes: u64,
}

impl DiskHeader {
    /// Bytes of the head.
    pub const BYTES: usize = 24;

    /// The head as it is on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..2].copy_from_slice(&self.disk.to_le_bytes());
        bytes[2] = u8::from(self.may_unmap);
        bytes[8..16].copy_from_slice(&self.offset_bytes.to_le_bytes());
        bytes[16..].copy_from_slice(&self.length_bytes.to_le_bytes());
        bytes
    }

    /// Takes the head off the front of a payload.
    ///
    /// # Errors
    /// [`FrameError`]; also when the range runs over the end of all numbers.
    pub fn decode(payload: &mut &[u8]) -> Result<Self, FrameError> {
        let mut reader = Reader(payload);
        let disk = u16::from_le_bytes(reader.array()?);
        let may_unmap = match reader.array()? {
            [0, 0, 0, 0, 0, 0] => false,
            [1, 0, 0, 0, 0, 0] => true,
            _ => return Err(FrameError::Range("disk operation")),
        };
        let offset_bytes = reader.le64()?;
        let length_bytes = reader.le64()?;
        if offset_bytes.checked_add(length_bytes).is_none() {
            return Err(FrameError::Range("disk range"));
        }
        *payload = reader.0;
        Ok(Self { disk, may_unmap, offset_bytes, length_bytes })
    }
}

/// What the destination holds of one channel. It says all of it each time, so
/// that one that was lost is made good by the next.
///
/// | offset | bytes | field |
/// |-------:|------:|-------|
/// |      0 |     1 | `channel` |
/// |      1 |     7 | zero |
/// |      8 |     8 | `applied`: number of the last frame taken over for good |
/// |     16 |    40 | `ram`: [`Barrier`] |
/// |     56 |    40 | `disk`: [`Barrier`] |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ack {
    pub channel: u8,
    /// Frames of it that were taken over for good
    pub applied: u64,
    /// The last barrier of RAM
    pub ram: Barrier,
    /// The last barrier of the disks
    pub disk: Barrier,
}

/// A barrier that was passed.
///
/// | offset | bytes | field |
/// |-------:|------:|-------|
/// |      0 |     8 | `at`: number of the barrier's frame, 0 for none yet |
/// |      8 |    32 | `digest`: of RAM (16 bytes, then zeroes) or of disk operations |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Barrier {
    /// Number of its frame
    pub at: u64,
    /// Digest of all that the channel brought up to it
    pub digest: [u8; 32],
}

impl Ack {
    /// Bytes of the payload.
    pub const BYTES: usize = 96;

    /// The payload as it is on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0] = self.channel;
        bytes[8..16].copy_from_slice(&self.applied.to_le_bytes());
        for (place, barrier) in [(16, self.ram), (56, self.disk)] {
            bytes[place..place + 8].copy_from_slice(&barrier.at.to_le_bytes());
            bytes[place + 8..place + 40].copy_from_slice(&barrier.digest);
        }
        bytes
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// [`FrameError`] for anything that [`Self::encode`] cannot have made, and a
    /// barrier that is not among the frames taken over.
    pub fn decode(payload: &[u8]) -> Result<Self, FrameError> {
        let mut reader = Reader(payload);
        let [channel, padding @ ..] = reader.array::<8>()?;
        let applied = reader.le64()?;
        let mut barrier = || Ok(Barrier { at: reader.le64()?, digest: reader.array()? });
        let (ram, disk) = (barrier()?, barrier()?);
        if padding != [0; 7] || !reader.0.is_empty() || ram.at.max(disk.at) > applied {
            return Err(FrameError::Range("ack"));
        }
        Ok(Self { channel, applied, ram, disk })
    }
}

/// What the destination has of a channel when a new connection begins: 8 bytes,
/// the number of the last frame that it took over. The next one follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resume {
    /// Frames that need not be sent again
    pub received: u64,
}

impl Resume {
    /// The payload as it is on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; 8] {
        self.received.to_le_bytes()
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// [`FrameError`] for another length.
    pub fn decode(payload: &[u8]) -> Result<Self, FrameError> {
        let received = payload.try_into().map_err(|_| FrameError::Range("resume"))?;
        Ok(Self { received: u64::from_le_bytes(received) })
    }
}

/// Number of a stream of QEMU that begins: 4 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamStart {
    /// From 1; larger than all before
    pub stream: u32,
}

impl RamStart {
    /// The payload as it is on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; 4] {
        self.stream.to_le_bytes()
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// [`FrameError`] for another length.
    pub fn decode(payload: &[u8]) -> Result<Self, FrameError> {
        let stream = payload.try_into().map_err(|_| FrameError::Range("start of RAM"))?;
        Ok(Self { stream: u32::from_le_bytes(stream) })
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], FrameError> {
        let (bytes, rest) = self.0.split_at_checked(count).ok_or(FrameError::Short)?;
        self.0 = rest;
        Ok(bytes)
    }
    fn array<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        self.bytes(N)?.try_into().map_err(|_| FrameError::Short)
    }
    fn le32(&mut self) -> Result<u32, FrameError> {
        self.array().map(u32::from_le_bytes)
    }
    fn le64(&mut self) -> Result<u64, FrameError> {
        self.array().map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests;
