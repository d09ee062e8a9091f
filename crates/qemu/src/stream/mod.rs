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
//! answers `Ok` or `Err`, keeps at most [`PENDING_BYTES_MAX`] of them, the head
//! and a piece of a section, and never hands out a page outside its block. How the bytes are
//! cut makes no difference. QEMU's CONTINUE flag means "the block of the page
//! sent before"; where pages were taken out it would mean another one, so every
//! page passed on carries its block's name.

mod cursor;
mod error;
mod ram;
mod section;
#[cfg(test)]
mod tests;

use std::io;

use cursor::Cursor;

pub use error::StreamError;

/// Bytes of a guest page.
pub const PAGE_BYTES: usize = 4096;
/// Most bytes kept between two calls: one element and no more. The longest is a
/// page with its block's name.
pub const PENDING_BYTES_MAX: usize = 8 << 10;
const _: () = assert!(PENDING_BYTES_MAX >= 8 + 256 + PAGE_BYTES);
/// Most bytes before the first round: a block list and what stands before it.
pub const HEAD_BYTES_MAX: usize = 128 << 10;
/// Inline bytes from which on a section is cut, or a piece of the tail handed out.
pub(crate) const INLINE_BYTES_MAX: usize = 64 << 10;

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

/// Which part of a stream inline bytes belong to.
///
/// A destination's QEMU that got [`Self::Head`] once, any number of
/// [`Self::Sections`], also of several streams of one source, and one whole
/// [`Self::Tail`], has read one valid stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamPart {
    /// Header, configuration and block list: handed out once, whole
    Head,
    /// Whole sections of a round; a long one is cut into several
    Sections,
    /// From the last section of RAM to the end, in pieces
    Tail,
}

/// Where the parts of a stream go.
///
/// Pages come in their order among each other, inline bytes too. Between the
/// two only this holds: at a [`StreamSink::ram_section_end`] the section's pages
/// were handed out.
pub trait StreamSink {
    /// All RAM blocks, once, before the inline bytes that list them.
    ///
    /// # Errors
    /// The sink's; parsing stops.
    fn block_list(&mut self, blocks: &[RamBlock]) -> io::Result<()>;
    /// A page of backend number `backend` (as given to [`StreamParser::new`]),
    /// always a whole one inside the block.
    ///
    /// # Errors
    /// The sink's; parsing stops.
    fn page(
        &mut self,
        backend: usize,
        offset_bytes: u64,
        page: &[u8; PAGE_BYTES],
    ) -> io::Result<()>;
    /// A page of zeroes of backend number `backend`. It may have held something
    /// else before.
    ///
    /// # Errors
    /// The sink's; parsing stops.
    fn zero_page(&mut self, backend: usize, offset_bytes: u64) -> io::Result<()>;
    /// Bytes that must reach the destination's QEMU, in order; never empty.
    ///
    /// # Errors
    /// The sink's; parsing stops.
    fn inline(&mut self, part: StreamPart, bytes: &[u8]) -> io::Result<()>;
    /// A RAM section ended. After [`RamSection::End`] all that follows is
    /// inline, of the [`StreamPart::Tail`].
    ///
    /// # Errors
    /// The sink's; parsing stops.
    fn ram_section_end(&mut self, section: RamSection) -> io::Result<()>;
}

/// What the next bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// The file header
    Header,
    /// The configuration, or what follows it
    Opening,
    /// A section's first byte, or a footer
    Sections,
    /// Entries of the block list, until `rest_bytes` of RAM are listed
    BlockList { rest_bytes: u64 },
    /// Elements of the RAM section
    Ram(RamSection),
    /// Anything: all RAM is out
    Tail,
    /// Nothing more: an error was answered
    Broken,
}

/// One step: it needs more bytes, or took some.
enum Step {
    More,
    Took(usize),
}

/// A stream being taken apart.
///
/// It does no I/O: the owner reads QEMU's socket and feeds what comes. A page
/// that lies whole in the bytes fed is handed out as a reference into them.
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
    /// For each block, its number among `backends`.
    backend_of: Vec<Option<usize>>,
    /// The block of the page before, for CONTINUE.
    last_block: Option<usize>,
    /// Which part the inline bytes are of.
    part: StreamPart,
    /// Inline bytes not handed out yet.
    inline: Vec<u8>,
    /// Whether sections end with a footer.
    has_footers: bool,
}

impl StreamParser {
    /// - `backends`: names of the RAM blocks whose pages go out of band, each
    ///   once. A stream without one of them is refused.
    #[must_use]
    pub fn new(backends: Vec<String>) -> Self {
        Self {
            backends,
            place: Place::Header,
            pending: Vec::new(),
            offset: 0,
            ram_id: None,
            blocks: Vec::new(),
            backend_of: Vec::new(),
            last_block: None,
            part: StreamPart::Head,
            inline: Vec::new(),
            has_footers: false,
        }
    }

    /// Takes the next bytes, of any number, and hands out what they complete.
    ///
    /// # Errors
    /// [`StreamError`]; the parser follows nothing more afterwards.
    pub fn feed(&mut self, bytes: &[u8], sink: &mut impl StreamSink) -> Result<(), StreamError> {
        let fed = self.advance(bytes, sink);
        if fed.is_err() {
            self.place = Place::Broken;
        }
        fed
    }

    /// Says whether the stream may end here. After the end of RAM it may: only
    /// the destination's QEMU can tell whether its device states are whole.
    ///
    /// # Errors
    /// [`StreamError::Truncated`] before the end of RAM.
    pub fn finish(&self) -> Result<(), StreamError> {
        match self.place {
            Place::Tail => Ok(()),
            _ => Err(StreamError::Truncated { offset: self.fed_bytes() }),
        }
    }

    /// Bytes of the stream so far.
    #[must_use]
    pub fn fed_bytes(&self) -> u64 {
        self.offset + self.pending.len() as u64
    }

    fn advance(&mut self, bytes: &[u8], sink: &mut impl StreamSink) -> Result<(), StreamError> {
        if self.place == Place::Broken {
            return Err(self.malformed("bytes after an error"));
        }
        let mut rest = self.complete_pending(bytes, sink)?;
        while !rest.is_empty() {
            match self.step(rest, sink)? {
                Step::Took(taken) => {
                    self.offset += taken as u64;
                    rest = &rest[taken..];
                }
                Step::More if rest.len() < PENDING_BYTES_MAX => {
                    self.pending.extend_from_slice(rest);
                    break;
                }
                Step::More => return Err(self.malformed("an element without an end")),
            }
        }
        // The other parts are handed out in whole sections only.
        if self.part == StreamPart::Tail { self.flush(sink) } else { Ok(()) }
    }

    /// Tops up the element that began before, so that only this one is copied.
    ///
    /// Returns the bytes after it: none when it is still not whole.
    fn complete_pending<'a>(
        &mut self,
        bytes: &'a [u8],
        sink: &mut impl StreamSink,
    ) -> Result<&'a [u8], StreamError> {
        let mut rest = bytes;
        // Taken out for the time, because a step borrows it beside `self`.
        let mut pending = std::mem::take(&mut self.pending);
        while !pending.is_empty() && !rest.is_empty() {
            let before = pending.len();
            let top_up = rest.len().min(PENDING_BYTES_MAX - before);
            pending.extend_from_slice(&rest[..top_up]);
            match self.step(&pending, sink)? {
                Step::More if pending.len() < PENDING_BYTES_MAX => rest = &rest[top_up..],
                Step::More => return Err(self.malformed("an element without an end")),
                Step::Took(taken) => {
                    self.offset += taken as u64;
                    let from_rest = taken.saturating_sub(before);
                    rest = &rest[from_rest..];
                    pending.truncate(before);
                    pending.drain(..taken - from_rest);
                }
            }
        }
        self.pending = pending;
        Ok(rest)
    }

    fn step(&mut self, bytes: &[u8], sink: &mut impl StreamSink) -> Result<Step, StreamError> {
        let mut cursor = Cursor::new(bytes);
        let done = match self.place {
            Place::Ram(section) => self.ram(section, &mut cursor, sink)?,
            Place::Header => self.header(&mut cursor)?,
            Place::Opening | Place::Sections => self.section(&mut cursor, sink)?,
            Place::BlockList { rest_bytes } => self.block(rest_bytes, &mut cursor, sink)?,
            Place::Tail => {
                self.flush(sink)?;
                sink.inline(StreamPart::Tail, bytes).map_err(StreamError::Sink)?;
                return Ok(Step::Took(bytes.len()));
            }
            Place::Broken => return Ok(Step::More),
        };
        Ok(match done {
            Some(()) => Step::Took(cursor.taken()),
            None => Step::More,
        })
    }

    /// Hands out the inline bytes.
    fn flush(&mut self, sink: &mut impl StreamSink) -> Result<(), StreamError> {
        if self.inline.is_empty() {
            return Ok(());
        }
        sink.inline(self.part, &self.inline).map_err(StreamError::Sink)?;
        self.inline.clear();
        Ok(())
    }

    /// Refuses a beginning that does not come to its end.
    fn check_head(&self) -> Result<(), StreamError> {
        if self.part == StreamPart::Head && self.inline.len() > HEAD_BYTES_MAX {
            return Err(self.malformed("a beginning that does not end"));
        }
        Ok(())
    }

    fn malformed(&self, what: impl Into<String>) -> StreamError {
        StreamError::Malformed { offset: self.offset, what: what.into() }
    }

    fn capability(&self, capability: &str) -> StreamError {
        StreamError::Capability { offset: self.offset, capability: capability.to_owned() }
    }
}
