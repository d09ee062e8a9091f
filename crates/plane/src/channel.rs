//! Frames as bytes: packed on their way out, checked and unpacked on their way in.

use std::io::{Read, Write};

use limosa_protocol::frame::{FrameHeader, FrameKind, HEADER_BYTES, WIRE_BYTES_MAX};

use crate::shutdown::PlaneError;

/// zstd's fastest ordinary level: a level more costs more time than it saves on
/// the links Limosa is made for.
const ZSTD_LEVEL: i32 = 1;
/// Payloads smaller than this are sent as they are.
const PACK_BYTES_MIN: usize = 256;
/// After a payload that did not shrink, this many are not tried.
const SKIP_COUNT: u32 = 15;

/// Both ways of a connection.
pub trait ReadWrite: Read + Write {}
impl<T: Read + Write> ReadWrite for T {}

/// An authenticated connection, past its hello.
pub struct ChannelIo {
    /// Its bytes. A read that got nothing for [`crate::SILENCE_MAX`] fails: the
    /// peer says something more often than that
    pub io: Box<dyn ReadWrite + Send>,
    /// Wakes whoever reads or writes, with an end or an error
    pub shutdown: Box<dyn Fn() + Send + Sync>,
}

/// Makes frames.
pub(crate) struct FrameMaker {
    name: String,
    compressor: Option<zstd::bulk::Compressor<'static>>,
    frame: Vec<u8>,
    skip: u32,
}

impl FrameMaker {
    pub(crate) fn new(name: String, compression: bool) -> Result<Self, PlaneError> {
        let compressor = compression
            .then(|| zstd::bulk::Compressor::new(ZSTD_LEVEL))
            .transpose()
            .map_err(|error| PlaneError::local("setting zstd up", error))?;
        Ok(Self { name, compressor, frame: Vec::new(), skip: 0 })
    }

    /// The whole frame, its payload packed if that makes it smaller.
    pub(crate) fn make(&mut self, kind: FrameKind, payload: &[u8]) -> Result<&[u8], PlaneError> {
        let packed = payload.len() >= PACK_BYTES_MIN && self.pack(payload);
        if !packed {
            self.frame.resize(HEADER_BYTES, 0);
            self.frame.extend_from_slice(payload);
        }
        let length = |bytes: usize| {
            u32::try_from(bytes)
                .map_err(|_| PlaneError::protocol(&self.name, "a frame that is too long"))
        };
        let header = FrameHeader {
            kind,
            packed,
            wire_bytes: length(self.frame.len() - HEADER_BYTES)?,
            plain_bytes: length(payload.len())?,
        };
        self.frame[..HEADER_BYTES].copy_from_slice(&header.encode());
        Ok(&self.frame)
    }

    /// The frame that was made last.
    pub(crate) fn frame(&self) -> &[u8] {
        &self.frame
    }

    /// Puts the packed payload behind the place of the header; `false` if that
    /// is not worth it.
    fn pack(&mut self, payload: &[u8]) -> bool {
        let Some(compressor) = &mut self.compressor else { return false };
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        self.frame.resize(HEADER_BYTES + zstd::zstd_safe::compress_bound(payload.len()), 0);
        let packed = compressor.compress_to_buffer(payload, &mut self.frame[HEADER_BYTES..]);
        match packed {
            Ok(bytes) if bytes < payload.len() - payload.len() / 16 => {
                self.frame.truncate(HEADER_BYTES + bytes);
                true
            }
            _ => {
                self.skip = SKIP_COUNT;
                false
            }
        }
    }
}

/// A frame without a payload.
pub(crate) fn bare_frame(kind: FrameKind) -> [u8; HEADER_BYTES] {
    FrameHeader { kind, packed: false, wire_bytes: 0, plain_bytes: 0 }.encode()
}

/// Reads frames.
pub(crate) struct FrameReader {
    name: String,
    decompressor: zstd::bulk::Decompressor<'static>,
    wire: Vec<u8>,
    plain: Vec<u8>,
}

impl FrameReader {
    pub(crate) fn new(name: String) -> Result<Self, PlaneError> {
        let decompressor = zstd::bulk::Decompressor::new()
            .map_err(|error| PlaneError::local("setting zstd up", error))?;
        Ok(Self { name, decompressor, wire: Vec::new(), plain: Vec::new() })
    }

    /// The next frame, unpacked. One that does not come whole is as good as none.
    pub(crate) fn next(&mut self, io: &mut impl Read) -> Result<(FrameKind, &[u8]), PlaneError> {
        let lost = |error| PlaneError::lost(&self.name, error);
        let mut header = [0; HEADER_BYTES];
        io.read_exact(&mut header).map_err(lost)?;
        let header =
            FrameHeader::decode(&header).map_err(|error| PlaneError::frame(&self.name, error))?;
        let wire_bytes = header.wire_bytes as usize;
        let plain_bytes = header.plain_bytes as usize;
        debug_assert!(wire_bytes <= WIRE_BYTES_MAX, "the header was checked");
        self.wire.resize(wire_bytes, 0);
        io.read_exact(&mut self.wire).map_err(lost)?;
        if !header.packed {
            return Ok((header.kind, &self.wire));
        }
        self.plain.resize(plain_bytes, 0);
        // The buffer bounds what a hostile block can unpack to.
        let unpacked = self.decompressor.decompress_to_buffer(&self.wire, &mut self.plain[..]);
        match unpacked {
            Ok(length) if length == plain_bytes => Ok((header.kind, &self.plain)),
            _ => Err(PlaneError::protocol(&self.name, "a payload that does not unpack")),
        }
    }

    /// Bytes on the wire of the frame that was read last.
    pub(crate) fn wire_bytes(&self) -> u64 {
        (HEADER_BYTES + self.wire.len()) as u64
    }
}
