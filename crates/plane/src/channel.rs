//! One connection: frames out, or frames in.

use std::io::{Read, Write};

use limosa_protocol::frame::{FrameHeader, FrameKind, HEADER_BYTES};

use crate::halt::PlaneError;

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
    /// Its bytes; each side uses one way
    pub io: Box<dyn ReadWrite + Send>,
    /// Wakes whoever reads or writes, with an end or an error
    pub shutdown: Box<dyn Fn() + Send + Sync>,
}

/// The sending end.
pub(crate) struct FrameWriter {
    io: Box<dyn ReadWrite + Send>,
    name: String,
    compressor: Option<zstd::bulk::Compressor<'static>>,
    packed: Vec<u8>,
    skip: u32,
}

/// Bytes of a frame that was sent.
pub(crate) struct Sent {
    /// Header and payload
    pub(crate) wire_bytes: u64,
    /// Payload alone
    pub(crate) packed_bytes: u64,
}

impl FrameWriter {
    pub(crate) fn new(
        io: Box<dyn ReadWrite + Send>,
        name: String,
        compression: bool,
    ) -> Result<Self, PlaneError> {
        let compressor = compression
            .then(|| zstd::bulk::Compressor::new(ZSTD_LEVEL))
            .transpose()
            .map_err(|error| PlaneError::local("setting zstd up", error))?;
        Ok(Self { io, name, compressor, packed: Vec::new(), skip: 0 })
    }

    /// Sends a frame; packs it if that makes it smaller.
    pub(crate) fn send(&mut self, kind: FrameKind, payload: &[u8]) -> Result<Sent, PlaneError> {
        let packed = payload.len() >= PACK_BYTES_MIN && self.pack(payload);
        let body = if packed { &self.packed[..] } else { payload };
        let length = |bytes: usize| {
            u32::try_from(bytes)
                .map_err(|_| PlaneError::protocol(&self.name, "a frame that is too long"))
        };
        let header = FrameHeader {
            kind,
            packed,
            wire_bytes: length(body.len())?,
            plain_bytes: length(payload.len())?,
        };
        let sent = Sent {
            wire_bytes: (HEADER_BYTES + body.len()) as u64,
            packed_bytes: body.len() as u64,
        };
        let io = &mut self.io;
        let write = io.write_all(&header.encode()).and_then(|()| io.write_all(body));
        write.map_err(|error| PlaneError::lost(&self.name, error))?;
        Ok(sent)
    }

    /// Gives everything to the network now.
    pub(crate) fn flush(&mut self) -> Result<(), PlaneError> {
        self.io.flush().map_err(|error| PlaneError::lost(&self.name, error))
    }

    /// Fills `packed`; `false` if that is not worth it.
    fn pack(&mut self, payload: &[u8]) -> bool {
        let Some(compressor) = &mut self.compressor else { return false };
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        self.packed.clear();
        self.packed.reserve(zstd::zstd_safe::compress_bound(payload.len()));
        let shrunk = compressor
            .compress_to_buffer(payload, &mut self.packed)
            .is_ok_and(|packed| packed < payload.len() - payload.len() / 16);
        if !shrunk {
            self.skip = SKIP_COUNT;
        }
        shrunk
    }
}

/// The receiving end.
pub(crate) struct FrameReader {
    io: Box<dyn ReadWrite + Send>,
    name: String,
    decompressor: zstd::bulk::Decompressor<'static>,
    wire: Vec<u8>,
    plain: Vec<u8>,
}

impl FrameReader {
    pub(crate) fn new(io: Box<dyn ReadWrite + Send>, name: String) -> Result<Self, PlaneError> {
        let decompressor = zstd::bulk::Decompressor::new()
            .map_err(|error| PlaneError::local("setting zstd up", error))?;
        Ok(Self { io, name, decompressor, wire: Vec::new(), plain: Vec::new() })
    }

    /// The next frame, unpacked; `None` when the peer ended between two frames.
    pub(crate) fn next(&mut self) -> Result<Option<(FrameKind, &[u8])>, PlaneError> {
        let lost = |error| PlaneError::lost(&self.name, error);
        let mut header = [0; HEADER_BYTES];
        match self.io.read(&mut header).map_err(lost)? {
            0 => return Ok(None),
            length => self.io.read_exact(&mut header[length..]).map_err(lost)?,
        }
        let header =
            FrameHeader::decode(&header).map_err(|error| PlaneError::frame(&self.name, error))?;
        let wire_bytes = header.wire_bytes as usize;
        let plain_bytes = header.plain_bytes as usize;
        self.wire.resize(wire_bytes, 0);
        self.io.read_exact(&mut self.wire).map_err(lost)?;
        if !header.packed {
            return Ok(Some((header.kind, &self.wire)));
        }
        self.plain.resize(plain_bytes, 0);
        // The buffer bounds what a hostile block can unpack to.
        let unpacked = self.decompressor.decompress_to_buffer(&self.wire, &mut self.plain[..]);
        match unpacked {
            Ok(length) if length == plain_bytes => Ok(Some((header.kind, &self.plain))),
            _ => Err(PlaneError::protocol(&self.name, "a payload that does not unpack")),
        }
    }
}
