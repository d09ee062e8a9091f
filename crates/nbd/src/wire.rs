//! Numbers, heads and options of the NBD protocol. All numbers are big-endian.
//!
//! | a request | bytes | | a simple reply | bytes |
//! |-----------|------:|-|----------------|------:|
//! | magic     |     4 | | magic          |     4 |
//! | flags     |     2 | | error          |     4 |
//! | command   |     2 | | cookie         |     8 |
//! | cookie    |     8 | |                |       |
//! | offset    |     8 | |                |       |
//! | length    |     4 | |                |       |
//! | payload of a write | length | |      |       |

use std::io::{self, Read, Write};

pub(crate) const MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(crate) const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(crate) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

pub(crate) const FLAG_FIXED_NEWSTYLE: u16 = 1;
pub(crate) const FLAG_NO_ZEROES: u16 = 1 << 1;

pub(crate) const OPT_EXPORT_NAME: u32 = 1;
pub(crate) const OPT_ABORT: u32 = 2;
pub(crate) const OPT_LIST: u32 = 3;
pub(crate) const OPT_INFO: u32 = 6;
pub(crate) const OPT_GO: u32 = 7;

pub(crate) const REP_ACK: u32 = 1;
pub(crate) const REP_SERVER: u32 = 2;
pub(crate) const REP_INFO: u32 = 3;
pub(crate) const REP_ERR_UNSUP: u32 = (1 << 31) | 1;
pub(crate) const REP_ERR_INVALID: u32 = (1 << 31) | 3;
pub(crate) const REP_ERR_UNKNOWN: u32 = (1 << 31) | 6;

pub(crate) const INFO_EXPORT: u16 = 0;
pub(crate) const INFO_BLOCK_SIZE: u16 = 3;

pub(crate) const HAS_FLAGS: u16 = 1;
pub(crate) const READ_ONLY: u16 = 1 << 1;
pub(crate) const SEND_FLUSH: u16 = 1 << 2;
pub(crate) const SEND_FUA: u16 = 1 << 3;
pub(crate) const SEND_TRIM: u16 = 1 << 5;
pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
pub(crate) const SEND_FAST_ZERO: u16 = 1 << 11;

pub(crate) const CMD_READ: u16 = 0;
pub(crate) const CMD_WRITE: u16 = 1;
pub(crate) const CMD_DISC: u16 = 2;
pub(crate) const CMD_FLUSH: u16 = 3;
pub(crate) const CMD_TRIM: u16 = 4;
pub(crate) const CMD_WRITE_ZEROES: u16 = 6;

pub(crate) const CMD_FLAG_FUA: u16 = 1;
pub(crate) const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
pub(crate) const CMD_FLAG_FAST_ZERO: u16 = 1 << 4;

pub(crate) const EIO: u32 = 5;
pub(crate) const EINVAL: u32 = 22;
pub(crate) const ENOSPC: u32 = 28;
pub(crate) const ENOTSUP: u32 = 95;

/// Largest payload of a request, in bytes.
pub const REQUEST_BYTES_MAX: u32 = 32 << 20;
/// Largest payload of an option, in bytes: the longest name, and more requests
/// for particulars than there are.
pub(crate) const OPTION_BYTES_MAX: u32 = 8192;
/// Most options of one handshake, and most answers to one option.
pub(crate) const OPTION_COUNT_MAX: u32 = 64;
/// Bytes of a request's head.
pub(crate) const REQUEST_HEAD_BYTES: usize = 28;
/// Bytes of a simple reply.
pub(crate) const REPLY_BYTES: usize = 16;

/// A request without its payload.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RequestHead {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) bytes: u32,
}

impl RequestHead {
    pub(crate) fn encode(&self) -> [u8; REQUEST_HEAD_BYTES] {
        let mut head = [0; REQUEST_HEAD_BYTES];
        head[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        head[4..6].copy_from_slice(&self.flags.to_be_bytes());
        head[6..8].copy_from_slice(&self.command.to_be_bytes());
        head[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        head[16..24].copy_from_slice(&self.offset.to_be_bytes());
        head[24..].copy_from_slice(&self.bytes.to_be_bytes());
        head
    }

    pub(crate) fn read(io: &mut impl Read) -> io::Result<Self> {
        let head: [u8; REQUEST_HEAD_BYTES] = read_array(io)?;
        let mut rest = &head[..];
        if read_u32(&mut rest)? != REQUEST_MAGIC {
            return Err(protocol("a request without its magic"));
        }
        Ok(Self {
            flags: read_u16(&mut rest)?,
            command: read_u16(&mut rest)?,
            cookie: read_u64(&mut rest)?,
            offset: read_u64(&mut rest)?,
            bytes: read_u32(&mut rest)?,
        })
    }
}

pub(crate) fn read_array<const N: usize>(io: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    io.read_exact(&mut bytes)?;
    Ok(bytes)
}

pub(crate) fn read_u16(io: &mut impl Read) -> io::Result<u16> {
    read_array(io).map(u16::from_be_bytes)
}

pub(crate) fn read_u32(io: &mut impl Read) -> io::Result<u32> {
    read_array(io).map(u32::from_be_bytes)
}

pub(crate) fn read_u64(io: &mut impl Read) -> io::Result<u64> {
    read_array(io).map(u64::from_be_bytes)
}

/// Sends an option of the handshake.
pub(crate) fn write_option(io: &mut impl Write, option: u32, content: &[u8]) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(16 + content.len());
    bytes.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&length(content)?.to_be_bytes());
    bytes.extend_from_slice(content);
    io.write_all(&bytes)
}

pub(crate) fn length(bytes: &[u8]) -> io::Result<u32> {
    u32::try_from(bytes.len()).map_err(io::Error::other)
}

pub(crate) fn protocol(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
