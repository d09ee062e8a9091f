//! The server's side of the handshake: from the first byte to the first request.
//!
//! ```text
//! hello ─► client's flags ─► option, answer … ─► GO or EXPORT_NAME: transmission
//!                                             └► ABORT: the end
//! ```
//!
//! There is one export; it is also the default one, whose name is empty. What it
//! does not know (TLS, structured replies, extended headers, contexts) it
//! refuses, and clients go on without.

use std::io::{self, Read, Write};

use crate::export::Export;
use crate::wire::{
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, HAS_FLAGS, INFO_BLOCK_SIZE, INFO_EXPORT, MAGIC, OPT_ABORT,
    OPT_EXPORT_NAME, OPT_GO, OPT_INFO, OPT_LIST, OPTION_BYTES_MAX, OPTION_COUNT_MAX, OPTION_MAGIC,
    REP_ACK, REP_ERR_INVALID, REP_ERR_UNKNOWN, REP_ERR_UNSUP, REP_INFO, REP_SERVER, REPLY_MAGIC,
    REQUEST_BYTES_MAX, SEND_FAST_ZERO, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES, length,
    protocol, read_u32, read_u64,
};

/// What the export can do. Zeroing is always fast: it is a few bytes for the sink.
const TRANSMISSION: u16 =
    HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO;
/// Smallest request, in bytes: with more, QEMU would have to read around those
/// that are smaller, and the export cannot be read.
const MINIMUM_BYTES: u32 = 1;
/// Requests that QEMU should make, in bytes: a block of the mirror.
const PREFERRED_BYTES: u32 = 64 << 10;
/// Bytes of nothing after the answer to EXPORT_NAME, for old clients.
const PADDING_BYTES: usize = 124;

/// `true` when transmission begins.
pub(crate) fn handshake(
    reader: &mut impl Read,
    writer: &mut impl Write,
    export: &Export,
) -> io::Result<bool> {
    let mut hello = Vec::new();
    hello.extend_from_slice(&MAGIC.to_be_bytes());
    hello.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    hello.extend_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    writer.write_all(&hello)?;
    let flags = read_u32(reader)?;
    if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
        return Err(protocol("a client with unknown flags"));
    }
    let no_zeroes = flags & u32::from(FLAG_NO_ZEROES) != 0;
    for _ in 0..OPTION_COUNT_MAX {
        if read_u64(reader)? != OPTION_MAGIC {
            return Err(protocol("an option without its magic"));
        }
        let option = read_u32(reader)?;
        let bytes = read_u32(reader)?;
        if bytes > OPTION_BYTES_MAX {
            return Err(protocol("an option that is too long"));
        }
        let mut content = vec![0; bytes as usize];
        reader.read_exact(&mut content)?;
        match option {
            // This option has no answer for errors but the end.
            OPT_EXPORT_NAME if !is_named(export, &content) => {
                return Err(protocol("an export that is not here"));
            }
            OPT_EXPORT_NAME => {
                let mut answer = export.size_bytes.to_be_bytes().to_vec();
                answer.extend_from_slice(&TRANSMISSION.to_be_bytes());
                if !no_zeroes {
                    answer.resize(answer.len() + PADDING_BYTES, 0);
                }
                writer.write_all(&answer)?;
                return Ok(true);
            }
            OPT_ABORT => {
                // Many clients are gone before they could read that.
                reply(writer, option, REP_ACK, &[]).ok();
                return Ok(false);
            }
            OPT_LIST if content.is_empty() => {
                let mut server = length(export.name.as_bytes())?.to_be_bytes().to_vec();
                server.extend_from_slice(export.name.as_bytes());
                reply(writer, option, REP_SERVER, &server)?;
                reply(writer, option, REP_ACK, &[])?;
            }
            OPT_LIST => reply(writer, option, REP_ERR_INVALID, &[])?,
            OPT_INFO | OPT_GO => match wanted(&content) {
                None => reply(writer, option, REP_ERR_INVALID, &[])?,
                Some(name) if !is_named(export, name) => {
                    reply(writer, option, REP_ERR_UNKNOWN, &[])?;
                }
                Some(_) => {
                    describe(writer, option, export)?;
                    if option == OPT_GO {
                        return Ok(true);
                    }
                }
            },
            _ => reply(writer, option, REP_ERR_UNSUP, &[])?,
        }
    }
    Err(protocol("a handshake without an end"))
}

fn is_named(export: &Export, name: &[u8]) -> bool {
    name.is_empty() || name == export.name.as_bytes()
}

/// The export's name in an INFO or GO option, if the option is well formed:
/// length of the name, the name, number of particulars asked for, their numbers.
fn wanted(content: &[u8]) -> Option<&[u8]> {
    let (name_bytes, rest) = content.split_first_chunk::<4>()?;
    let name_bytes = usize::try_from(u32::from_be_bytes(*name_bytes)).ok()?;
    let (name, rest) = rest.split_at_checked(name_bytes)?;
    let (count, particulars) = rest.split_first_chunk::<2>()?;
    (particulars.len() == usize::from(u16::from_be_bytes(*count)) * 2).then_some(name)
}

/// All there is to say, whatever was asked for: the protocol allows that.
fn describe(writer: &mut impl Write, option: u32, export: &Export) -> io::Result<()> {
    let mut size = INFO_EXPORT.to_be_bytes().to_vec();
    size.extend_from_slice(&export.size_bytes.to_be_bytes());
    size.extend_from_slice(&TRANSMISSION.to_be_bytes());
    reply(writer, option, REP_INFO, &size)?;
    let mut blocks = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
    for bytes in [MINIMUM_BYTES, PREFERRED_BYTES, REQUEST_BYTES_MAX] {
        blocks.extend_from_slice(&bytes.to_be_bytes());
    }
    reply(writer, option, REP_INFO, &blocks)?;
    reply(writer, option, REP_ACK, &[])
}

fn reply(writer: &mut impl Write, option: u32, kind: u32, content: &[u8]) -> io::Result<()> {
    let mut bytes = REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&length(content)?.to_be_bytes());
    bytes.extend_from_slice(content);
    writer.write_all(&bytes)
}
