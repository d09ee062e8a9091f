//! Writes into an export of the destination's QEMU.
//!
//! Requests are sent without waiting for the replies of those before, up to
//! [`IN_FLIGHT_BYTES_MAX`]; a request that touches a range still in flight waits,
//! because a server may do requests in any order. Replies are 16 bytes: those of
//! all requests in flight fit the socket, so the server can always answer, and
//! one thread is enough to send and to look for replies when the window is full.
//!
//! **Invariants.** The first error is told by the call that finds it; every call
//! after that fails. [`NbdClient::flush`] returns `Ok` only when every request
//! before it did well and is durable.

use std::collections::HashMap;
use std::io::{self, IoSlice, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::wire::{
    CMD_DISC, CMD_FLAG_NO_HOLE, CMD_FLUSH, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES,
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, HAS_FLAGS, INFO_BLOCK_SIZE, INFO_EXPORT, MAGIC, OPT_GO,
    OPTION_BYTES_MAX, OPTION_COUNT_MAX, OPTION_MAGIC, READ_ONLY, REP_ACK, REP_ERR_UNKNOWN,
    REP_INFO, REPLY_BYTES, REPLY_MAGIC, RequestHead, SEND_FLUSH, SEND_TRIM, SEND_WRITE_ZEROES,
    SIMPLE_REPLY_MAGIC, length, protocol, read_array, read_u16, read_u32, read_u64, write_option,
};

/// Most bytes of requests without their replies.
pub const IN_FLIGHT_BYTES_MAX: u64 = 8 << 20;
/// Most requests without their replies; QEMU's server takes 16 at a time.
pub const IN_FLIGHT_COUNT_MAX: usize = 16;
/// Longest write of one request; a longer one is cut, and its parts overlap in time.
const WRITE_BYTES_MAX: u32 = 1 << 20;
/// Longest range of one request without a payload.
const RANGE_BYTES_MAX: u64 = 1 << 30;
/// Longest silence of the server; a disk that takes longer is broken.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Longest silence while it flushes what its page cache has taken before.
const FLUSH_SILENCE_MAX: Duration = Duration::from_secs(600);

/// A request without its reply.
struct Request {
    offset: u64,
    bytes: u64,
    payload_bytes: u64,
}

impl Request {
    fn touches(&self, offset: u64, bytes: u64) -> bool {
        self.offset < offset + bytes && offset < self.offset + self.bytes
    }
}

/// What the server says about an export.
struct Description {
    size_bytes: u64,
    flags: u16,
    write_bytes_max: u32,
}

/// A connection to an export.
pub struct NbdClient {
    stream: UnixStream,
    export: Description,
    next_cookie: u64,
    in_flight: HashMap<u64, Request>,
    in_flight_bytes: u64,
    failed: Option<(io::ErrorKind, String)>,
}

impl NbdClient {
    /// Connects to an export by its name.
    ///
    /// # Errors
    /// The socket's, or a server that does not speak NBD, or lacks the export, or
    /// does not let it be written and flushed.
    pub fn connect(socket: &Path, export: &str) -> io::Result<Self> {
        Self::over(UnixStream::connect(socket)?, export)
    }

    /// Asks for an export on a connection.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub fn over(mut stream: UnixStream, export: &str) -> io::Result<Self> {
        stream.set_read_timeout(Some(SILENCE_MAX))?;
        stream.set_write_timeout(Some(SILENCE_MAX))?;
        if read_u64(&mut stream)? != MAGIC || read_u64(&mut stream)? != OPTION_MAGIC {
            return Err(protocol("this is not an NBD server"));
        }
        let flags = read_u16(&mut stream)?;
        if flags & FLAG_FIXED_NEWSTYLE == 0 {
            return Err(protocol("an NBD server that is too old"));
        }
        let ours = u32::from(flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES));
        stream.write_all(&ours.to_be_bytes())?;
        let mut content = length(export.as_bytes())?.to_be_bytes().to_vec();
        content.extend_from_slice(export.as_bytes());
        // No particulars are asked for: a server that is asked for its block sizes
        // may expect that its client keeps to the smallest.
        content.extend_from_slice(&0u16.to_be_bytes());
        write_option(&mut stream, OPT_GO, &content)?;
        let export = read_description(&mut stream)?;
        if export.flags & HAS_FLAGS == 0 || export.flags & SEND_FLUSH == 0 {
            return Err(protocol("an export that cannot be flushed"));
        }
        if export.flags & READ_ONLY != 0 {
            return Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "a read-only export"));
        }
        Ok(Self {
            stream,
            export,
            next_cookie: 0,
            in_flight: HashMap::with_capacity(IN_FLIGHT_COUNT_MAX),
            in_flight_bytes: 0,
            failed: None,
        })
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.export.size_bytes
    }

    /// Whether [`Self::write_zeroes`] works.
    #[must_use]
    pub fn can_zero(&self) -> bool {
        self.export.flags & SEND_WRITE_ZEROES != 0
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// The socket's; also those of requests before.
    pub fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> io::Result<()> {
        let mut offset = offset_bytes;
        for piece in bytes.chunks(self.export.write_bytes_max as usize) {
            self.request(CMD_WRITE, 0, (offset, piece.len() as u64), piece)?;
            offset += piece.len() as u64;
        }
        Ok(())
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_zeroes(&mut self, offset: u64, length: u64, may_unmap: bool) -> io::Result<()> {
        if !self.can_zero() {
            return Err(protocol("an export that cannot write zeroes"));
        }
        let flags = if may_unmap { 0 } else { CMD_FLAG_NO_HOLE };
        self.range(CMD_WRITE_ZEROES, flags, offset, length)
    }

    /// A range is not needed any more; what it reads as afterwards is not known.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn discard(&mut self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        if self.export.flags & SEND_TRIM == 0 {
            return Ok(());
        }
        self.range(CMD_TRIM, 0, offset_bytes, length_bytes)
    }

    fn range(&mut self, command: u16, flags: u16, offset: u64, length: u64) -> io::Result<()> {
        let mut done = 0;
        while done < length {
            let piece = (length - done).min(RANGE_BYTES_MAX);
            // What lies past the end of all numbers lies past the disk's end too.
            self.request(command, flags, (offset.saturating_add(done), piece), &[])?;
            done += piece;
        }
        Ok(())
    }

    /// Returns when everything before is durable.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn flush(&mut self) -> io::Result<()> {
        self.wait_below(0, 0)?;
        self.request(CMD_FLUSH, 0, (0, 0), &[])?;
        self.stream.set_read_timeout(Some(FLUSH_SILENCE_MAX))?;
        self.wait_below(0, 0)?;
        self.stream.set_read_timeout(Some(SILENCE_MAX))
    }

    /// Sends a request about `range`, an offset and a length.
    fn request(
        &mut self,
        command: u16,
        flags: u16,
        (offset, bytes): (u64, u64),
        payload: &[u8],
    ) -> io::Result<()> {
        self.check()?;
        if offset.checked_add(bytes).is_none_or(|end| end > self.export.size_bytes) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a request past the end of the disk",
            ));
        }
        while self.in_flight.values().any(|other| other.touches(offset, bytes)) {
            self.next_reply()?;
        }
        let payload_bytes = payload.len() as u64;
        self.wait_below(
            IN_FLIGHT_COUNT_MAX - 1,
            IN_FLIGHT_BYTES_MAX.saturating_sub(payload_bytes),
        )?;
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let wire_bytes = u32::try_from(bytes).map_err(io::Error::other)?;
        let head = RequestHead { flags, command, cookie, offset, bytes: wire_bytes };
        let sent = write_both(&mut self.stream, &head.encode(), payload);
        sent.inspect_err(|error| self.failed = Some((error.kind(), error.to_string())))?;
        self.in_flight.insert(cookie, Request { offset, bytes, payload_bytes });
        self.in_flight_bytes += payload_bytes;
        Ok(())
    }

    fn check(&self) -> io::Result<()> {
        match &self.failed {
            None => Ok(()),
            Some((kind, why)) => {
                Err(io::Error::new(*kind, format!("an earlier request to the disk failed: {why}")))
            }
        }
    }

    /// Reads replies until so few requests, and bytes, are in flight.
    fn wait_below(&mut self, count_max: usize, bytes_max: u64) -> io::Result<()> {
        self.check()?;
        while self.in_flight.len() > count_max || self.in_flight_bytes > bytes_max {
            self.next_reply()?;
        }
        Ok(())
    }

    fn next_reply(&mut self) -> io::Result<()> {
        self.read_reply().inspect_err(|error| self.failed = Some((error.kind(), error.to_string())))
    }

    fn read_reply(&mut self) -> io::Result<()> {
        let reply: [u8; REPLY_BYTES] = read_array(&mut self.stream).map_err(silence)?;
        let mut reader = &reply[..];
        if read_u32(&mut reader)? != SIMPLE_REPLY_MAGIC {
            return Err(protocol("a reply without its magic"));
        }
        let error = read_u32(&mut reader)?;
        let cookie = read_u64(&mut reader)?;
        let request =
            self.in_flight.remove(&cookie).ok_or_else(|| protocol("a reply to no request"))?;
        self.in_flight_bytes -= request.payload_bytes;
        match error {
            0 => Ok(()),
            // NBD's numbers are those of Linux.
            errno => Err(io::Error::from_raw_os_error(errno.cast_signed())),
        }
    }
}

impl Drop for NbdClient {
    fn drop(&mut self) {
        let head = RequestHead { flags: 0, command: CMD_DISC, cookie: 0, offset: 0, bytes: 0 };
        // Never waits: a server without room finds the end of the connection too,
        // and after an error it may be in the middle of a payload.
        if self.failed.is_none() && self.stream.set_nonblocking(true).is_ok() {
            self.stream.write_all(&head.encode()).ok();
        }
    }
}

/// The kernel's word for a timeout is that it would block.
fn silence(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => {
            io::Error::new(io::ErrorKind::TimedOut, "the server of the disk is silent")
        }
        _ => error,
    }
}

/// Writes both, together where the kernel takes them together.
fn write_both(stream: &mut UnixStream, head: &[u8], payload: &[u8]) -> io::Result<()> {
    let mut done = 0;
    while done < head.len() {
        let slices = [IoSlice::new(&head[done..]), IoSlice::new(payload)];
        match stream.write_vectored(&slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(bytes) => done += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(silence(error)),
        }
    }
    stream.write_all(&payload[done - head.len()..]).map_err(silence)
}

/// The answers to GO, until its last.
fn read_description(stream: &mut UnixStream) -> io::Result<Description> {
    let mut export = None;
    let mut write_bytes_max = WRITE_BYTES_MAX;
    for _ in 0..OPTION_COUNT_MAX {
        if read_u64(stream)? != REPLY_MAGIC || read_u32(stream)? != OPT_GO {
            return Err(protocol("an answer to another option"));
        }
        let kind = read_u32(stream)?;
        let bytes = read_u32(stream)?;
        if bytes > OPTION_BYTES_MAX {
            return Err(protocol("an answer that is too long"));
        }
        let mut content = vec![0; bytes as usize];
        stream.read_exact(&mut content)?;
        let mut reader = &content[..];
        match kind {
            REP_ACK => {
                let (size_bytes, flags) =
                    export.ok_or_else(|| protocol("an export without a size"))?;
                return Ok(Description { size_bytes, flags, write_bytes_max });
            }
            REP_INFO => match read_u16(&mut reader)? {
                INFO_EXPORT => export = Some((read_u64(&mut reader)?, read_u16(&mut reader)?)),
                INFO_BLOCK_SIZE => {
                    let [_minimum, _preferred, maximum] =
                        [read_u32(&mut reader)?, read_u32(&mut reader)?, read_u32(&mut reader)?];
                    write_bytes_max = WRITE_BYTES_MAX.min(maximum).max(1);
                }
                _ => {}
            },
            REP_ERR_UNKNOWN => {
                return Err(io::Error::new(io::ErrorKind::NotFound, "no such export"));
            }
            _ => return Err(protocol("an export that the server refuses")),
        }
    }
    Err(protocol("a handshake without an end"))
}
