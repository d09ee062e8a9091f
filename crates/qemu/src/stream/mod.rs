//! QEMU's migration stream: taken apart as it comes, and put together again
//! without the guest's RAM.
//!
//! ```text
//! header, configuration, START ram ── block list ── EOS
//! { PART ram ── pages … ── EOS, footer }*            ◄ pages of the backends go
//! END ram ── last pages ── EOS, footer                 out of band, others inline
//! device state …                                     ◄ the tail: passed on as it is
//! ```
//!
//! Sections carry no length, so everything before the end of RAM must be known:
//! a section that is not ends the migration with the device's name. The layout
//! is that of `migration/savevm.c` and `migration/ram.c` of QEMU 7.2 to 10.x.
//!
//! **Invariants.** Bytes are hostile: whatever comes, [`StreamParser::feed`]
//! answers `Ok` or `Err`, keeps at most [`PENDING_BYTES_MAX`] of them, and never
//! hands out a page outside its block. QEMU's CONTINUE flag means "the block of
//! the page sent before"; where pages were taken out it would mean another one,
//! so every page passed on carries its block's name.

mod cursor;
#[cfg(test)]
mod tests;

use std::io;

use cursor::Cursor;

/// Bytes of a guest page.
pub const PAGE_BYTES: usize = 4096;
/// Most bytes kept between two calls: one element and no more.
pub const PENDING_BYTES_MAX: usize = 256 << 10;
/// Most RAM blocks of one VM.
const BLOCK_COUNT_MAX: usize = 256;
/// Most bytes of inline stream handed out at once.
const INLINE_BYTES_MAX: usize = 64 << 10;

const MAGIC: u32 = 0x5145_564d;
const VERSION: u32 = 3;

const SECTION_START: u8 = 1;
const SECTION_PART: u8 = 2;
const SECTION_END: u8 = 3;
const SECTION_FULL: u8 = 4;
const SECTION_SUBSECTION: u8 = 5;
const SECTION_CONFIGURATION: u8 = 7;
const SECTION_COMMAND: u8 = 8;
const SECTION_FOOTER: u8 = 0x7e;

const FLAG_ZERO: u64 = 0x02;
const FLAG_MEM_SIZE: u64 = 0x04;
const FLAG_PAGE: u64 = 0x08;
const FLAG_EOS: u64 = 0x10;
const FLAG_CONTINUE: u64 = 0x20;
const FLAG_MULTIFD_FLUSH: u64 = 0x200;
const FLAGS: u64 = PAGE_BYTES as u64 - 1;

/// A RAM block as QEMU lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// Its name
    pub name: String,
    /// Bytes in use
    pub used_bytes: u64,
}

/// Which part of the RAM section ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RamSection {
    /// The block list
    Setup,
    /// A piece of a round
    Part,
    /// The last pages: all RAM is out
    End,
}

/// Where the parts of a stream go, in order.
pub trait StreamSink {
    /// All RAM blocks, once.
    ///
    /// # Errors
    /// The sink's; parsing stops.
    fn block_list(&mut self, blocks: &[RamBlock]) -> io::Result<()>;
    /// A page of backend number `backend`.
    ///
    /// # Errors
    /// The sink's; parsing stops.
    fn page(
        &mut self,
        backend: usize,
        offset_bytes: u64,
        page: &[u8; PAGE_BYTES],
    ) -> io::Result<()>;
    /// A page of zeroes of backend number `backend`.
    ///
    /// # Errors
    /// The sink's; parsing stops.
    fn zero_page(&mut self, backend: usize, offset_bytes: u64) -> io::Result<()>;
    /// Bytes that must reach the destination's QEMU, in order.
    ///
    /// # Errors
    /// The sink's; parsing stops.
    fn inline(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// A RAM section ended; its inline bytes were handed out before.
    ///
    /// # Errors
    /// The sink's; parsing stops.
    fn ram_section_end(&mut self, section: RamSection) -> io::Result<()>;
}

/// Why a stream could not be followed. The migration must be aborted.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// It is not QEMU's stream, or one of another version.
    #[error("byte {offset}: {what}")]
    Malformed {
        /// Where in the stream
        offset: u64,
        /// What is wrong
        what: String,
    },
    /// A device sends its state in a way that cannot be delimited.
    #[error(
        "byte {offset}: the state of device {device:?} comes before the end of RAM, and Limosa \
         cannot follow it: detach the device, or move the VM while it is off"
    )]
    Device {
        /// Where in the stream
        offset: u64,
        /// QEMU's name of it
        device: String,
    },
    /// It ended too early.
    #[error("the stream ended after {offset} bytes, before the end of RAM")]
    Truncated {
        /// Bytes that came
        offset: u64,
    },
    /// Whoever takes the parts failed.
    #[error("passing on what came")]
    Sink(#[source] io::Error),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Header,
    Section,
    Ram(RamSection),
    Tail,
}

/// A stream being taken apart.
#[derive(Debug)]
pub struct StreamParser {
    backends: Vec<String>,
    place: Place,
    /// The start of an element whose end has not come yet.
    pending: Vec<u8>,
    /// Bytes of the stream before `pending`.
    offset: u64,
    ram_id: Option<u32>,
    blocks: Vec<RamBlock>,
    /// The block of the page before, for CONTINUE.
    last_block: Option<usize>,
    inline: Vec<u8>,
}

/// One step: it needs more bytes, or took some.
enum Step {
    More,
    Took(usize),
}

impl StreamParser {
    /// - `backends`: names of the RAM blocks whose pages go out of band.
    #[must_use]
    pub fn new(backends: Vec<String>) -> Self {
        Self {
            backends,
            place: Place::Header,
            pending: Vec::new(),
            offset: 0,
            ram_id: None,
            blocks: Vec::new(),
            last_block: None,
            inline: Vec::new(),
        }
    }

    /// Takes the next bytes, of any number.
    ///
    /// # Errors
    /// [`StreamError`]; the parser is of no use afterwards.
    pub fn feed(&mut self, bytes: &[u8], sink: &mut impl StreamSink) -> Result<(), StreamError> {
        let mut rest = bytes;
        // An element that began before: topped up bit by bit, so that at most
        // one element is ever copied.
        while !self.pending.is_empty() && !rest.is_empty() {
            let top_up = rest.len().min(PAGE_BYTES + 300);
            let before = self.pending.len();
            self.pending.extend_from_slice(&rest[..top_up]);
            let pending = std::mem::take(&mut self.pending);
            match self.step(&pending, sink)? {
                Step::More => {
                    self.pending = pending;
                    rest = &rest[top_up..];
                    if self.pending.len() > PENDING_BYTES_MAX {
                        return Err(self.malformed("an element without an end"));
                    }
                }
                Step::Took(taken) if taken >= before => {
                    self.offset += taken as u64;
                    rest = &rest[taken - before..];
                }
                Step::Took(taken) => {
                    self.offset += taken as u64;
                    self.pending = pending[taken..before].to_vec();
                }
            }
        }
        while !rest.is_empty() {
            match self.step(rest, sink)? {
                Step::More => {
                    self.pending = rest.to_vec();
                    break;
                }
                Step::Took(taken) => {
                    self.offset += taken as u64;
                    rest = &rest[taken..];
                }
            }
        }
        if self.pending.len() > PENDING_BYTES_MAX {
            return Err(self.malformed("an element without an end"));
        }
        self.flush(sink)
    }

    /// Says whether the stream may end here.
    ///
    /// # Errors
    /// [`StreamError::Truncated`] before the end of RAM.
    pub fn finish(&self) -> Result<(), StreamError> {
        match self.place {
            Place::Tail => Ok(()),
            _ => Err(StreamError::Truncated { offset: self.offset + self.pending.len() as u64 }),
        }
    }

    fn step(&mut self, bytes: &[u8], sink: &mut impl StreamSink) -> Result<Step, StreamError> {
        let mut cursor = Cursor::new(bytes);
        let done = match self.place {
            Place::Header => self.header(&mut cursor)?,
            Place::Section => self.section(&mut cursor)?,
            Place::Ram(section) => self.ram(section, &mut cursor, sink)?,
            Place::Tail => {
                self.flush(sink)?;
                sink.inline(bytes).map_err(StreamError::Sink)?;
                return Ok(Step::Took(bytes.len()));
            }
        };
        Ok(match done {
            Some(()) => Step::Took(cursor.taken()),
            None => Step::More,
        })
    }

    fn header(&mut self, cursor: &mut Cursor<'_>) -> Result<Option<()>, StreamError> {
        let (Some(magic), Some(version)) = (cursor.be32(), cursor.be32()) else {
            return Ok(None);
        };
        if magic != MAGIC || version != VERSION {
            return Err(self.malformed("this is not a migration stream of version 3"));
        }
        self.inline.extend_from_slice(cursor.seen());
        self.place = Place::Section;
        Ok(Some(()))
    }

    fn section(&mut self, cursor: &mut Cursor<'_>) -> Result<Option<()>, StreamError> {
        let Some(kind) = cursor.byte() else { return Ok(None) };
        let whole = match kind {
            SECTION_CONFIGURATION => cursor.be32().and_then(|length| {
                // A machine type's name; more is nonsense and ends in `feed`.
                cursor.bytes(usize::try_from(length).unwrap_or(usize::MAX)).map(drop)
            }),
            SECTION_SUBSECTION => self.subsection(cursor)?,
            SECTION_COMMAND => cursor.be16().and_then(|_command| {
                let length = cursor.be16()?;
                cursor.bytes(length.into()).map(drop)
            }),
            SECTION_START | SECTION_FULL => self.section_start(kind, cursor)?,
            SECTION_PART | SECTION_END => self.section_part(kind, cursor)?,
            SECTION_FOOTER => match cursor.be32() {
                Some(id) if Some(id) == self.ram_id => Some(()),
                Some(id) => return Err(self.malformed(format!("a footer of section {id}"))),
                None => None,
            },
            other => return Err(self.malformed(format!("a section of unknown kind {other}"))),
        };
        if whole.is_some() {
            self.inline.extend_from_slice(cursor.seen());
        }
        Ok(whole)
    }

    /// A subsection of the configuration; each kind has a layout of its own.
    fn subsection(&self, cursor: &mut Cursor<'_>) -> Result<Option<()>, StreamError> {
        let Some(name) = cursor.name() else { return Ok(None) };
        let Some(_version) = cursor.be32() else { return Ok(None) };
        Ok(match name {
            b"configuration/target-page-bits" => cursor.be32().map(drop),
            b"configuration/uuid" => cursor.bytes(16).map(drop),
            b"configuration/capabilities" => cursor.be32().and_then(|count| {
                for _ in 0..count {
                    cursor.name()?;
                }
                Some(())
            }),
            other => {
                let name = String::from_utf8_lossy(other).into_owned();
                return Err(self.malformed(format!("an unknown configuration {name:?}")));
            }
        })
    }

    fn section_start(
        &mut self,
        kind: u8,
        cursor: &mut Cursor<'_>,
    ) -> Result<Option<()>, StreamError> {
        let Some(id) = cursor.be32() else { return Ok(None) };
        let Some(name) = cursor.name() else { return Ok(None) };
        let (Some(_instance), Some(version)) = (cursor.be32(), cursor.be32()) else {
            return Ok(None);
        };
        if name != b"ram" || kind != SECTION_START {
            return Err(StreamError::Device {
                offset: self.offset,
                device: String::from_utf8_lossy(name).into_owned(),
            });
        }
        if version != 4 || self.ram_id.is_some() {
            return Err(self.malformed(format!("a second RAM, or RAM of version {version}")));
        }
        self.ram_id = Some(id);
        self.place = Place::Ram(RamSection::Setup);
        Ok(Some(()))
    }

    fn section_part(
        &mut self,
        kind: u8,
        cursor: &mut Cursor<'_>,
    ) -> Result<Option<()>, StreamError> {
        let Some(id) = cursor.be32() else { return Ok(None) };
        if Some(id) != self.ram_id {
            return Err(self.malformed(format!("a part of section {id}, which is not RAM")));
        }
        let section = if kind == SECTION_END { RamSection::End } else { RamSection::Part };
        self.place = Place::Ram(section);
        Ok(Some(()))
    }

    fn ram(
        &mut self,
        section: RamSection,
        cursor: &mut Cursor<'_>,
        sink: &mut impl StreamSink,
    ) -> Result<Option<()>, StreamError> {
        let Some(word) = cursor.be64() else { return Ok(None) };
        let (address, flags) = (word & !FLAGS, word & FLAGS);
        match flags & !FLAG_CONTINUE {
            FLAG_PAGE | FLAG_ZERO => self.ram_page(address, flags, cursor, sink),
            FLAG_MEM_SIZE if section == RamSection::Setup => self.block_list(address, cursor, sink),
            FLAG_MULTIFD_FLUSH => {
                self.inline.extend_from_slice(cursor.seen());
                Ok(Some(()))
            }
            FLAG_EOS => {
                self.inline.extend_from_slice(cursor.seen());
                self.flush(sink)?;
                sink.ram_section_end(section).map_err(StreamError::Sink)?;
                self.place = match section {
                    RamSection::End => Place::Tail,
                    _ => Place::Section,
                };
                Ok(Some(()))
            }
            other => Err(self.malformed(format!("RAM in an unknown form (flags {other:#x})"))),
        }
    }

    fn ram_page(
        &mut self,
        address: u64,
        flags: u64,
        cursor: &mut Cursor<'_>,
        sink: &mut impl StreamSink,
    ) -> Result<Option<()>, StreamError> {
        let block = if flags & FLAG_CONTINUE == 0 {
            let Some(name) = cursor.name() else { return Ok(None) };
            self.blocks.iter().position(|block| block.name.as_bytes() == name)
        } else {
            self.last_block
        };
        let Some(block) = block else {
            return Err(self.malformed("a page of a block that is not listed"));
        };
        let is_zero = flags & FLAG_ZERO != 0;
        let Some(content) = cursor.bytes(if is_zero { 1 } else { PAGE_BYTES }) else {
            return Ok(None);
        };
        let listed = &self.blocks[block];
        if address.checked_add(PAGE_BYTES as u64).is_none_or(|end| end > listed.used_bytes) {
            let name = listed.name.clone();
            return Err(self.malformed(format!("a page at {address:#x} of {name}, past its end")));
        }
        if is_zero && content != [0] {
            return Err(self.malformed("a page filled with something else than zeroes"));
        }
        self.last_block = Some(block);
        let backend = self.backends.iter().position(|name| *name == listed.name);
        match (backend, <&[u8; PAGE_BYTES]>::try_from(content)) {
            (Some(backend), Ok(page)) => {
                sink.page(backend, address, page).map_err(StreamError::Sink)?;
            }
            (Some(backend), Err(_)) => {
                sink.zero_page(backend, address).map_err(StreamError::Sink)?;
            }
            (None, _) => {
                let name = self.blocks[block].name.as_bytes();
                let word = address | (flags & !FLAG_CONTINUE);
                self.inline.extend_from_slice(&word.to_be_bytes());
                self.inline.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
                self.inline.extend_from_slice(name);
                self.inline.extend_from_slice(content);
                if self.inline.len() >= INLINE_BYTES_MAX {
                    self.flush(sink)?;
                }
            }
        }
        Ok(Some(()))
    }

    fn block_list(
        &mut self,
        total_bytes: u64,
        cursor: &mut Cursor<'_>,
        sink: &mut impl StreamSink,
    ) -> Result<Option<()>, StreamError> {
        let mut blocks: Vec<RamBlock> = Vec::new();
        let mut listed_bytes = 0u64;
        while listed_bytes < total_bytes {
            let Some(name) = cursor.name() else { return Ok(None) };
            let Some(used_bytes) = cursor.be64() else { return Ok(None) };
            let name = String::from_utf8(name.to_vec())
                .map_err(|_| self.malformed("a block's name that is not text"))?;
            if name.is_empty() || blocks.iter().any(|block| block.name == name) {
                return Err(self.malformed(format!("a block {name:?} listed twice or nameless")));
            }
            // The last pages of a ROM may be short; QEMU rounds them up itself.
            if used_bytes == 0 || blocks.len() == BLOCK_COUNT_MAX {
                return Err(self.malformed("an empty block, or too many of them"));
            }
            listed_bytes = listed_bytes.saturating_add(used_bytes);
            blocks.push(RamBlock { name, used_bytes });
        }
        if listed_bytes != total_bytes || !self.blocks.is_empty() {
            return Err(self.malformed("a block list that does not add up"));
        }
        for backend in &self.backends {
            if !blocks.iter().any(|block| block.name == *backend) {
                return Err(self.malformed(format!("no RAM block {backend}")));
            }
        }
        self.inline.extend_from_slice(cursor.seen());
        sink.block_list(&blocks).map_err(StreamError::Sink)?;
        self.blocks = blocks;
        Ok(Some(()))
    }

    fn flush(&mut self, sink: &mut impl StreamSink) -> Result<(), StreamError> {
        if !self.inline.is_empty() {
            sink.inline(&self.inline).map_err(StreamError::Sink)?;
            self.inline.clear();
        }
        Ok(())
    }

    fn malformed(&self, what: impl Into<String>) -> StreamError {
        StreamError::Malformed { offset: self.offset, what: what.into() }
    }
}
