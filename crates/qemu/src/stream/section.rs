//! The frame of the stream: header, configuration, commands, and where sections
//! begin and end. Everything here is small and passed on as it came.
//!
//! All integers are big-endian; `name` is a byte of length and that many bytes.
//!
//! | element       | layout                                                    |
//! |---------------|-----------------------------------------------------------|
//! | header        | u32 `"QEVM"`, u32 version 3                               |
//! | configuration | `07`, u32 length, machine type                            |
//! | subsection    | `05`, name, u32 version, content by name                  |
//! | start, full   | `01` or `04`, u32 id, name, u32 instance, u32 version     |
//! | part, end     | `02` or `03`, u32 id                                      |
//! | footer        | `7e`, u32 id                                              |
//! | command       | `08`, u16 command, u16 length, content                    |

use super::cursor::Cursor;
use super::{Place, RamSection, StreamError, StreamParser, StreamPart, StreamSink};

const MAGIC: u32 = 0x5145_564d;
const VERSION: u32 = 3;

const SECTION_EOF: u8 = 0;
const SECTION_START: u8 = 1;
pub(super) const SECTION_PART: u8 = 2;
const SECTION_END: u8 = 3;
const SECTION_FULL: u8 = 4;
const SECTION_SUBSECTION: u8 = 5;
const SECTION_CONFIGURATION: u8 = 7;
const SECTION_COMMAND: u8 = 8;
pub(super) const SECTION_FOOTER: u8 = 0x7e;

const COMMAND_OPEN_RETURN_PATH: u16 = 1;
const COMMAND_PING: u16 = 2;
/// From here to COLO all belong to post-copy.
const COMMAND_POSTCOPY_ADVISE: u16 = 3;
const COMMAND_ENABLE_COLO: u16 = 8;
/// From here to switchover again.
const COMMAND_POSTCOPY_RESUME: u16 = 9;
/// QEMU 10, with a machine type of 10.0 or later.
const COMMAND_SWITCHOVER_START: u16 = 11;
/// One past the last command that a QEMU is known to send.
const COMMAND_UNKNOWN: u16 = 12;

/// The only layout of the RAM section, since QEMU 0.14.
const RAM_VERSION: u32 = 4;
/// Longest name of a machine type; QEMU's are shorter than 40.
const MACHINE_BYTES_MAX: u32 = 255;
/// Most capabilities that a configuration may list; QEMU 10 knows two.
const CAPABILITY_COUNT_MAX: u32 = 16;
/// 4096 bytes, as 2 to the power of it.
const PAGE_BITS: u32 = 12;
const UUID_BYTES: usize = 16;

/// Capabilities that change what comes before the end of RAM.
const CAPABILITIES_NOT_FOLLOWED: [&str; 8] = [
    "x-ignore-shared",
    "mapped-ram",
    "postcopy-ram",
    "x-colo",
    "xbzrle",
    "compress",
    "dirty-bitmaps",
    "virtio-iterative",
];

/// `Ok(None)` of the methods here means that more bytes must come first.
impl StreamParser {
    pub(super) fn header(&mut self, cursor: &mut Cursor<'_>) -> Result<Option<()>, StreamError> {
        let Some(magic) = cursor.be32() else { return Ok(None) };
        if magic != MAGIC {
            return Err(self.malformed("this is not a migration stream of QEMU"));
        }
        let Some(version) = cursor.be32() else { return Ok(None) };
        if version != VERSION {
            return Err(self.malformed(format!("a migration stream of version {version}, not 3")));
        }
        self.inline.extend_from_slice(cursor.seen());
        self.place = Place::Opening;
        Ok(Some(()))
    }

    pub(super) fn section(
        &mut self,
        cursor: &mut Cursor<'_>,
        sink: &mut impl StreamSink,
    ) -> Result<Option<()>, StreamError> {
        let Some(kind) = cursor.byte() else { return Ok(None) };
        let is_opening = self.place == Place::Opening;
        let whole = match kind {
            SECTION_CONFIGURATION if is_opening => self.configuration(cursor)?.map(|()| None),
            SECTION_SUBSECTION if is_opening => self.subsection(cursor)?.map(|()| None),
            SECTION_COMMAND => self.command(cursor)?,
            SECTION_START | SECTION_FULL => self.section_start(kind, cursor)?.map(|()| None),
            SECTION_PART | SECTION_END => self.section_part(kind, cursor)?.map(Some),
            SECTION_FOOTER => match cursor.be32() {
                Some(id) if Some(id) == self.ram_id => Some(None),
                Some(id) => return Err(self.malformed(format!("a footer of section {id}"))),
                None => None,
            },
            SECTION_EOF => return Err(self.malformed("QEMU gave up before the end of RAM")),
            other => return Err(self.malformed(format!("a section of kind {other:#x} here"))),
        };
        let Some(begins) = whole else { return Ok(None) };
        if let Some(part) = begins {
            // Without footers, the section before is known to be whole only now.
            self.flush(sink)?;
            self.part = part;
        }
        self.inline.extend_from_slice(cursor.seen());
        self.check_head()?;
        if kind == SECTION_FOOTER {
            self.has_footers = true;
            self.flush(sink)?;
        }
        if !matches!(kind, SECTION_CONFIGURATION | SECTION_SUBSECTION) && is_opening {
            self.place = match self.place {
                Place::Opening => Place::Sections,
                place => place,
            };
        }
        Ok(Some(()))
    }

    fn configuration(&self, cursor: &mut Cursor<'_>) -> Result<Option<()>, StreamError> {
        let Some(length) = cursor.be32() else { return Ok(None) };
        if length > MACHINE_BYTES_MAX {
            return Err(self.malformed(format!("a machine type of {length} bytes")));
        }
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        Ok(cursor.bytes(length).map(drop))
    }

    /// A subsection of the configuration; each kind has a layout of its own.
    fn subsection(&self, cursor: &mut Cursor<'_>) -> Result<Option<()>, StreamError> {
        let Some(name) = cursor.name() else { return Ok(None) };
        let Some(version) = cursor.be32() else { return Ok(None) };
        if version != 1 {
            let name = String::from_utf8_lossy(name);
            return Err(self.malformed(format!("{name:?} of version {version}, not 1")));
        }
        match name {
            b"configuration/target-page-bits" => match cursor.be32() {
                Some(PAGE_BITS) => Ok(Some(())),
                Some(bits) => Err(self.malformed(format!("guest pages of 2^{bits} bytes"))),
                None => Ok(None),
            },
            b"configuration/uuid" => Ok(cursor.bytes(UUID_BYTES).map(drop)),
            b"configuration/capabilities" => self.capabilities(cursor),
            other => {
                let name = String::from_utf8_lossy(other);
                Err(self.malformed(format!("an unknown part {name:?} of the configuration")))
            }
        }
    }

    fn capabilities(&self, cursor: &mut Cursor<'_>) -> Result<Option<()>, StreamError> {
        let Some(count) = cursor.be32() else { return Ok(None) };
        if count > CAPABILITY_COUNT_MAX {
            return Err(self.malformed(format!("a list of {count} capabilities")));
        }
        for _ in 0..count {
            let Some(name) = cursor.name() else { return Ok(None) };
            if CAPABILITIES_NOT_FOLLOWED.iter().any(|known| known.as_bytes() == name) {
                return Err(self.capability(&String::from_utf8_lossy(name)));
            }
        }
        Ok(Some(()))
    }

    /// Post-copy and COLO are refused by their first command: pages that the
    /// destination's QEMU did not receive itself would count as missing. Says
    /// which part begins with the command, if one does.
    fn command(&self, cursor: &mut Cursor<'_>) -> Result<Option<Option<StreamPart>>, StreamError> {
        let (Some(command), Some(length)) = (cursor.be16(), cursor.be16()) else {
            return Ok(None);
        };
        let content_bytes = match command {
            COMMAND_OPEN_RETURN_PATH | COMMAND_SWITCHOVER_START => 0,
            COMMAND_PING => 4,
            // Without content it announces dirty bitmaps alone.
            COMMAND_POSTCOPY_ADVISE if length == 0 => return Err(self.capability("dirty-bitmaps")),
            COMMAND_POSTCOPY_ADVISE..COMMAND_ENABLE_COLO
            | COMMAND_POSTCOPY_RESUME..COMMAND_SWITCHOVER_START => {
                return Err(self.capability("postcopy-ram"));
            }
            COMMAND_ENABLE_COLO => return Err(self.capability("x-colo")),
            0 | COMMAND_UNKNOWN.. => {
                return Err(self.malformed(format!("an unknown command {command}")));
            }
        };
        if length != content_bytes {
            return Err(self.malformed(format!("{length} bytes of content for command {command}")));
        }
        let begins = match self.part {
            StreamPart::Head if self.blocks.is_empty() => None,
            // It is said once: a second switchover is not to be heard of twice.
            _ if command == COMMAND_SWITCHOVER_START => Some(StreamPart::Tail),
            _ => Some(StreamPart::Sections),
        };
        Ok(cursor.bytes(length.into()).map(|_| begins))
    }

    fn section_start(
        &mut self,
        kind: u8,
        cursor: &mut Cursor<'_>,
    ) -> Result<Option<()>, StreamError> {
        let Some(id) = cursor.be32() else { return Ok(None) };
        let Some(name) = cursor.name() else { return Ok(None) };
        let (Some(instance), Some(version)) = (cursor.be32(), cursor.be32()) else {
            return Ok(None);
        };
        if name == b"dirty-bitmap" {
            return Err(self.capability("dirty-bitmaps"));
        }
        if name != b"ram" || kind != SECTION_START {
            let device = String::from_utf8_lossy(name).into_owned();
            return Err(StreamError::Device { offset: self.offset, device });
        }
        if version != RAM_VERSION || instance != 0 {
            return Err(self.malformed(format!("RAM {instance} of version {version}")));
        }
        if self.ram_id.is_some() {
            return Err(self.malformed("a second RAM"));
        }
        self.ram_id = Some(id);
        self.place = Place::Ram(RamSection::Setup);
        Ok(Some(()))
    }

    fn section_part(
        &mut self,
        kind: u8,
        cursor: &mut Cursor<'_>,
    ) -> Result<Option<StreamPart>, StreamError> {
        let Some(id) = cursor.be32() else { return Ok(None) };
        if Some(id) != self.ram_id {
            return Err(self.malformed(format!("a part of section {id}, which is not RAM")));
        }
        let (section, part) = if kind == SECTION_END || self.part == StreamPart::Tail {
            (if kind == SECTION_END { RamSection::End } else { RamSection::Part }, StreamPart::Tail)
        } else {
            (RamSection::Part, StreamPart::Sections)
        };
        self.place = Place::Ram(section);
        Ok(Some(part))
    }
}
