//! Writes into an export of the destination's QEMU.
//!
//! Requests are sent without waiting for the replies of those before, up to
//! [`IN_FLIGHT_BYTES_MAX`]; a request that touches a range still in flight waits,
//! because a server may do requests in any order. Replies are 16 bytes: those of
//! all requests in flight fit the socket, so nobody ever waits for the other.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::{
    CMD_DISC, CMD_FLAG_NO_HOLE, CMD_FLUSH, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES,
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, INFO_EXPORT, MAGIC, OPT_GO, OPTION_BYTES_MAX,
    OPTION_MAGIC, REP_ACK, REP_INFO, REPLY_BYTES, REPLY_MAGIC, REQUEST_BYTES_MAX,
    REQUEST_HEAD_BYTES, REQUEST_MAGIC, SEND_FLUSH, SEND_TRIM, SEND_WRITE_ZEROES,
    SIMPLE_REPLY_MAGIC, length, protocol, read_array, read_u16, read_u32, read_u64, write_option,
};

/// Most bytes of requests without their replies.
pub const IN_FLIGHT_BYTES_MAX: u64 = 8 << 20;
/// Most requests without their replies; QEMU's server takes 16 at a time.
pub const IN_FLIGHT_COUNT_MAX: usize = 16;
/// Longest silence of the server; a disk that takes longer is broken.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Longest range of one request without a payload.
const RANGE_BYTES_MAX: u64 = 1 << 30;

/// A request without its reply.
struct Request {
    offset: u64,
    bytes: u64,
    payload_bytes: u64,
}

/// A connection to an export.
pub struct NbdClient {
    stream: UnixStream,
    size_bytes: u64,
    flags: u16,
    next_cookie: u64,
    in_flight: HashMap<u64, Request>,
    in_flight_bytes: u64,
    failed: Option<io::ErrorKind>,
}

impl NbdClient {
    /// Connects to an export by its name.
    ///
    /// # Errors
    /// The socket's, or a server that does not speak NBD or lacks the export.
    pub fn connect(socket: &Path, export: &str) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
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
        content.extend_from_slice(&[0, 0]);
        write_option(&mut stream, OPT_GO, &content)?;
        let (size_bytes, flags) = go(&mut stream)?;
        if flags & SEND_FLUSH == 0 {
            return Err(protocol("an export that cannot be flushed"));
        }
        Ok(Self {
            stream,
            size_bytes,
            flags,
            next_cookie: 0,
            in_flight: HashMap::new(),
            in_flight_bytes: 0,
            failed: None,
        })
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// The socket's; also those of requests before.
    pub fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> io::Result<()> {
        let mut offset = offset_bytes;
        for piece in bytes.chunks(REQUEST_BYTES_MAX as usize) {
            self.request(CMD_WRITE, 0, offset, piece.len() as u64, piece)?;
            offset += piece.len() as u64;
        }
        Ok(())
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_zeroes(&mut self, offset: u64, length: u64, may_unmap: bool) -> io::Result<()> {
        if self.flags & SEND_WRITE_ZEROES == 0 {
            return Err(protocol("an export that cannot write zeroes"));
        }
        let flags = if may_unmap { 0 } else { CMD_FLAG_NO_HOLE };
        self.range(CMD_WRITE_ZEROES, flags, offset, length)
    }

    /// A range is not needed any more.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn discard(&mut self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        if self.flags & SEND_TRIM == 0 {
            return Ok(());
        }
        self.range(CMD_TRIM, 0, offset_bytes, length_bytes)
    }

    fn range(&mut self, command: u16, flags: u16, offset: u64, length: u64) -> io::Result<()> {
        let mut done = 0;
        while done < length {
            let piece = (length - done).min(RANGE_BYTES_MAX);
            self.request(command, flags, offset + done, piece, &[])?;
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
        self.request(CMD_FLUSH, 0, 0, 0, &[])?;
        self.wait_below(0, 0)
    }

    fn request(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        bytes: u64,
        payload: &[u8],
    ) -> io::Result<()> {
        if let Some(kind) = self.failed {
            return Err(io::Error::new(kind, "an earlier request to the disk failed"));
        }
        if offset.checked_add(bytes).is_none_or(|end| end > self.size_bytes) {
            return Err(protocol("a request past the end of the disk"));
        }
        let touches =
            |other: &Request| other.offset < offset + bytes && offset < other.offset + other.bytes;
        if self.in_flight.values().any(touches) {
            self.wait_below(0, 0)?;
        }
        let payload_bytes = payload.len() as u64;
        self.wait_below(
            IN_FLIGHT_COUNT_MAX - 1,
            IN_FLIGHT_BYTES_MAX.saturating_sub(payload_bytes),
        )?;
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut head = Vec::with_capacity(REQUEST_HEAD_BYTES);
        head.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        head.extend_from_slice(&flags.to_be_bytes());
        head.extend_from_slice(&command.to_be_bytes());
        head.extend_from_slice(&cookie.to_be_bytes());
        head.extend_from_slice(&offset.to_be_bytes());
        head.extend_from_slice(&u32::try_from(bytes).map_err(io::Error::other)?.to_be_bytes());
        let sent = self.stream.write_all(&head).and_then(|()| self.stream.write_all(payload));
        sent.inspect_err(|error| self.failed = Some(error.kind()))?;
        self.in_flight.insert(cookie, Request { offset, bytes, payload_bytes });
        self.in_flight_bytes += payload_bytes;
        Ok(())
    }

    /// Reads replies until so few requests, and bytes, are in flight.
    fn wait_below(&mut self, count_max: usize, bytes_max: u64) -> io::Result<()> {
        while self.in_flight.len() > count_max || self.in_flight_bytes > bytes_max {
            let result = self.read_reply();
            result.inspect_err(|error| self.failed = Some(error.kind()))?;
        }
        Ok(())
    }

    fn read_reply(&mut self) -> io::Result<()> {
        let reply: [u8; REPLY_BYTES] = read_array(&mut self.stream)?;
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
            errno => Err(io::Error::from_raw_os_error(errno.cast_signed())),
        }
    }
}

impl Drop for NbdClient {
    fn drop(&mut self) {
        let mut goodbye = Vec::with_capacity(REQUEST_HEAD_BYTES);
        goodbye.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        goodbye.extend_from_slice(&0u16.to_be_bytes());
        goodbye.extend_from_slice(&CMD_DISC.to_be_bytes());
        goodbye.resize(REQUEST_HEAD_BYTES, 0);
        // The server finds the end of the connection as well.
        self.stream.write_all(&goodbye).ok();
    }
}

/// The answers to GO: size and flags.
fn go(stream: &mut UnixStream) -> io::Result<(u64, u16)> {
    let mut export = None;
    loop {
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
        match kind {
            REP_ACK => return export.ok_or_else(|| protocol("an export without a size")),
            REP_INFO => {
                let mut reader = &content[..];
                if read_u16(&mut reader)? == INFO_EXPORT {
                    export = Some((read_u64(&mut reader)?, read_u16(&mut reader)?));
                }
            }
            _ => return Err(io::Error::new(io::ErrorKind::NotFound, "no such export")),
        }
    }
}
