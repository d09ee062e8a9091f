//! The RAM section: the block list, then pages. This is where nearly all bytes
//! go, so a page is handed out from the caller's bytes without a copy.
//!
//! Each element begins with a u64: the upper bits are an address in the block
//! (or the sum of all lengths), the lower 12 are flags. `name` is a byte of
//! length and that many bytes, and is absent with CONTINUE.
//!
//! | flags          | what follows                                          |
//! |----------------|-------------------------------------------------------|
//! | MEM_SIZE       | (name, u64 used length) until the sum is used up      |
//! | PAGE           | name, 4096 bytes                                      |
//! | ZERO           | name, one byte `00`                                   |
//! | MULTIFD_FLUSH  | nothing                                               |
//! | EOS            | nothing; the section ends                             |

use super::cursor::Cursor;
use super::section::{SECTION_FOOTER, SECTION_PART};
use super::{
    INLINE_BYTES_MAX, PAGE_BYTES, Place, RamBlock, RamSection, StreamError, StreamParser,
    StreamPart, StreamSink,
};

/// Most RAM blocks of one VM. A q35 with a dozen devices has about 20.
const BLOCK_COUNT_MAX: usize = 256;
/// Longest RAM block: 64 TiB, beyond any host of today.
const BLOCK_BYTES_MAX: u64 = 1 << 46;

pub(super) const FLAG_ZERO: u64 = 0x02;
pub(super) const FLAG_MEM_SIZE: u64 = 0x04;
pub(super) const FLAG_PAGE: u64 = 0x08;
pub(super) const FLAG_EOS: u64 = 0x10;
pub(super) const FLAG_CONTINUE: u64 = 0x20;
const FLAG_XBZRLE: u64 = 0x40;
const FLAG_HOOK: u64 = 0x80;
/// QEMU up to 9.0.
const FLAG_COMPRESS_PAGE: u64 = 0x100;
pub(super) const FLAG_MULTIFD_FLUSH: u64 = 0x200;

const PAGE_BYTES_U64: u64 = PAGE_BYTES as u64;
const FLAGS: u64 = PAGE_BYTES_U64 - 1;

/// `Ok(None)` of the methods here means that more bytes must come first.
impl StreamParser {
    pub(super) fn ram(
        &mut self,
        section: RamSection,
        cursor: &mut Cursor<'_>,
        sink: &mut impl StreamSink,
    ) -> Result<Option<()>, StreamError> {
        let Some(header) = cursor.be64() else { return Ok(None) };
        let (address, flags) = (header & !FLAGS, header & FLAGS);
        if self.inline.len() >= INLINE_BYTES_MAX && flags != FLAG_EOS {
            self.cut_section(sink)?;
        }
        match flags & !FLAG_CONTINUE {
            FLAG_PAGE | FLAG_ZERO => self.ram_page(address, flags, cursor, sink),
            FLAG_MEM_SIZE if section == RamSection::Setup => {
                if address == 0 || !self.blocks.is_empty() {
                    return Err(self.malformed("an empty block list, or a second one"));
                }
                self.inline.extend_from_slice(cursor.seen());
                self.place = Place::BlockList { rest_bytes: address };
                Ok(Some(()))
            }
            FLAG_MULTIFD_FLUSH => {
                self.inline.extend_from_slice(cursor.seen());
                Ok(Some(()))
            }
            FLAG_EOS => self.ram_end(section, cursor, sink),
            FLAG_XBZRLE => Err(self.capability("xbzrle")),
            FLAG_COMPRESS_PAGE => Err(self.capability("compress")),
            FLAG_HOOK => Err(self.malformed("RAM that goes by RDMA")),
            _ => Err(self.malformed(format!("RAM in an unknown form (flags {flags:#x})"))),
        }
    }

    fn ram_end(
        &mut self,
        section: RamSection,
        cursor: &Cursor<'_>,
        sink: &mut impl StreamSink,
    ) -> Result<Option<()>, StreamError> {
        if self.blocks.is_empty() {
            return Err(self.malformed("RAM without a block list"));
        }
        self.inline.extend_from_slice(cursor.seen());
        sink.ram_section_end(section).map_err(StreamError::Sink)?;
        self.place = match section {
            RamSection::End => Place::Tail,
            RamSection::Setup | RamSection::Part => Place::Sections,
        };
        Ok(Some(()))
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
        // No overflow: lengths are below `BLOCK_BYTES_MAX` and addresses whole pages.
        if address >= self.blocks[block].used_bytes {
            let name = &self.blocks[block].name;
            return Err(self.malformed(format!("a page at {address:#x} of {name:?}, past its end")));
        }
        let is_zero = flags & FLAG_ZERO != 0;
        let Some(content) = cursor.bytes(if is_zero { 1 } else { PAGE_BYTES }) else {
            return Ok(None);
        };
        if is_zero && content != [0] {
            return Err(self.malformed("a page filled with something else than zeroes"));
        }
        self.last_block = Some(block);
        match (self.backend_of[block], <&[u8; PAGE_BYTES]>::try_from(content)) {
            (Some(backend), Ok(page)) => {
                sink.page(backend, address, page).map_err(StreamError::Sink)?;
            }
            (Some(backend), Err(_)) => {
                sink.zero_page(backend, address).map_err(StreamError::Sink)?;
            }
            (None, _) => {
                self.page_inline(block, address | (flags & !FLAG_CONTINUE), content);
            }
        }
        Ok(Some(()))
    }

    /// Passes a page on with its block's name, whatever stood there: the page
    /// that QEMU's CONTINUE means may have gone out of band.
    fn page_inline(&mut self, block: usize, header: u64, content: &[u8]) {
        let name = self.blocks[block].name.as_bytes();
        self.inline.extend_from_slice(&header.to_be_bytes());
        self.inline.push(u8::try_from(name.len()).expect("the name came with a byte of length"));
        self.inline.extend_from_slice(name);
        self.inline.extend_from_slice(content);
    }

    /// Makes two sections of one, so that what is handed out is whole and small.
    fn cut_section(&mut self, sink: &mut impl StreamSink) -> Result<(), StreamError> {
        let Some(id) = self.ram_id.filter(|_| self.part == StreamPart::Sections) else {
            // The tail goes in any pieces; the head must come to its end.
            return if self.part == StreamPart::Tail {
                self.flush(sink)
            } else {
                self.check_head()
            };
        };
        self.inline.extend_from_slice(&FLAG_EOS.to_be_bytes());
        if self.has_footers {
            self.inline.push(SECTION_FOOTER);
            self.inline.extend_from_slice(&id.to_be_bytes());
        }
        self.flush(sink)?;
        self.inline.push(SECTION_PART);
        self.inline.extend_from_slice(&id.to_be_bytes());
        Ok(())
    }

    /// One entry of the block list, of which `rest_bytes` of RAM are still to come.
    pub(super) fn block(
        &mut self,
        rest_bytes: u64,
        cursor: &mut Cursor<'_>,
        sink: &mut impl StreamSink,
    ) -> Result<Option<()>, StreamError> {
        let Some(name) = cursor.name() else { return Ok(None) };
        let Some(used_bytes) = cursor.be64() else { return Ok(None) };
        let name = match str::from_utf8(name) {
            Ok(name) if !name.is_empty() && !name.chars().any(char::is_control) => name,
            _ => return Err(self.malformed("a RAM block whose name is not text")),
        };
        if self.blocks.iter().any(|block| block.name == name) {
            return Err(self.malformed(format!("RAM block {name:?} twice")));
        }
        if self.blocks.len() == BLOCK_COUNT_MAX {
            return Err(self.malformed(format!("more than {BLOCK_COUNT_MAX} RAM blocks")));
        }
        let is_whole = used_bytes != 0 && used_bytes.is_multiple_of(PAGE_BYTES_U64);
        let rest_bytes = rest_bytes.checked_sub(used_bytes);
        let Some(rest_bytes) = rest_bytes.filter(|_| is_whole && used_bytes <= BLOCK_BYTES_MAX)
        else {
            return Err(self.malformed(format!("RAM block {name:?} of {used_bytes} bytes")));
        };
        self.inline.extend_from_slice(cursor.seen());
        self.backend_of.push(self.backends.iter().position(|backend| backend == name));
        self.blocks.push(RamBlock { name: name.to_owned(), used_bytes });
        self.place = Place::BlockList { rest_bytes };
        if rest_bytes == 0 {
            self.block_list_end(sink)?;
        }
        Ok(Some(()))
    }

    fn block_list_end(&mut self, sink: &mut impl StreamSink) -> Result<(), StreamError> {
        let is_listed = |name: &String| self.blocks.iter().any(|block| block.name == *name);
        if let Some(name) = self.backends.iter().find(|name| !is_listed(name)) {
            return Err(self.malformed(format!("this VM has no RAM block {name:?}")));
        }
        sink.block_list(&self.blocks).map_err(StreamError::Sink)?;
        self.place = Place::Ram(RamSection::Setup);
        Ok(())
    }
}
