//! The export into which QEMU mirrors a disk.
//!
//! A write is acknowledged as soon as the sink took it, so that QEMU's mirror,
//! which keeps 16 requests in flight, does not wait for the network's delay. A
//! flush is answered when the sink says so. Nothing is promised by that: before
//! a hand-over the plane proves, with a barrier of its own, that all of it is
//! durable at the destination, and a mirror is never pivoted to.

use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::{
    CMD_DISC, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE,
    CMD_WRITE_ZEROES, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, HAS_FLAGS, INFO_BLOCK_SIZE, INFO_EXPORT,
    MAGIC, OPT_ABORT, OPT_EXPORT_NAME, OPT_GO, OPT_INFO, OPTION_BYTES_MAX, OPTION_MAGIC, REP_ACK,
    REP_ERR_INVALID, REP_ERR_UNKNOWN, REP_ERR_UNSUP, REP_INFO, REPLY_MAGIC, REQUEST_BYTES_MAX,
    REQUEST_MAGIC, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES, SIMPLE_REPLY_MAGIC, length,
    protocol, read_u16, read_u32, read_u64,
};

/// How often a listener without a client looks whether it shall end.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Requests that QEMU should make, in bytes: a block of the mirror.
const PREFERRED_BYTES: u32 = 64 << 10;
/// Most options of one handshake.
const OPTION_COUNT_MAX: u32 = 64;

const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ENOTSUP: u32 = 95;

/// Takes the operations of one export, in order of their arrival. An error ends
/// the connection with it: QEMU's job fails, its guest does not notice.
pub trait DiskSink: Send {
    /// Takes bytes; may wait, which slows the mirror down.
    ///
    /// # Errors
    /// When nothing more can be taken.
    fn write(&mut self, offset_bytes: u64, bytes: Vec<u8>) -> io::Result<()>;
    /// Takes a range of zeroes.
    ///
    /// # Errors
    /// When nothing more can be taken.
    fn write_zeroes(&mut self, offset: u64, length: u64, may_unmap: bool) -> io::Result<()>;
    /// Takes a range that is not needed any more.
    ///
    /// # Errors
    /// When nothing more can be taken.
    fn discard(&mut self, offset_bytes: u64, length_bytes: u64) -> io::Result<()>;
    /// Orders everything before it.
    ///
    /// # Errors
    /// When nothing more can be taken.
    fn flush(&mut self) -> io::Result<()>;
}

/// What is exported.
#[derive(Debug, Clone)]
pub struct Export {
    /// Its name
    pub name: String,
    /// Bytes of the disk
    pub size_bytes: u64,
}

/// A served export; ends when it is dropped.
pub struct ServerHandle {
    stopped: Arc<AtomicBool>,
    client: Arc<Mutex<Option<UnixStream>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// Serves an export to one client after the other.
///
/// # Errors
/// The kernel's.
pub fn serve(
    listener: UnixListener,
    export: Export,
    mut sink: Box<dyn DiskSink>,
) -> io::Result<ServerHandle> {
    listener.set_nonblocking(true)?;
    let stopped = Arc::new(AtomicBool::new(false));
    let client = Arc::new(Mutex::new(None));
    let (stop, place) = (Arc::clone(&stopped), Arc::clone(&client));
    let thread =
        std::thread::Builder::new().name(format!("nbd-{}", export.name)).spawn(move || {
            while !stop.load(Ordering::Acquire) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        if let Err(error) = one_client(stream, &place, &export, &mut *sink) {
                            tracing::debug!(export = export.name, %error, "an NBD client ended");
                        }
                        *place.lock().unwrap_or_else(PoisonError::into_inner) = None;
                    }
                    Err(_) => std::thread::sleep(LOOK_EVERY),
                }
            }
        })?;
    Ok(ServerHandle { stopped, client, thread: Some(thread) })
}

impl ServerHandle {
    /// Ends the export and its client's connection.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Release);
        if let Some(stream) = &*self.client.lock().unwrap_or_else(PoisonError::into_inner) {
            // One that is closed already needs no closing.
            stream.shutdown(std::net::Shutdown::Both).ok();
        }
        // Joined elsewhere than here: a sink may wait for a plane that ends later.
        self.thread.take();
    }
}

fn one_client(
    stream: UnixStream,
    place: &Mutex<Option<UnixStream>>,
    export: &Export,
    sink: &mut dyn DiskSink,
) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream.try_clone()?);
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::with_capacity(64 << 10, stream);
    if handshake(&mut reader, &mut writer, export)? {
        transmission(&mut reader, &mut writer, export, sink)?;
    }
    Ok(())
}

/// What the export can do.
const TRANSMISSION: u16 = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES;

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
    let no_zeroes = read_u32(reader)? & u32::from(FLAG_NO_ZEROES) != 0;
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
            OPT_EXPORT_NAME if content == export.name.as_bytes() => {
                let mut answer = export.size_bytes.to_be_bytes().to_vec();
                answer.extend_from_slice(&TRANSMISSION.to_be_bytes());
                if !no_zeroes {
                    answer.resize(answer.len() + 124, 0);
                }
                writer.write_all(&answer)?;
                return Ok(true);
            }
            OPT_EXPORT_NAME => return Err(protocol("an export that is not here")),
            OPT_ABORT => {
                option_reply(writer, option, REP_ACK, &[])?;
                return Ok(false);
            }
            OPT_INFO | OPT_GO => match named(&content) {
                None => option_reply(writer, option, REP_ERR_INVALID, &[])?,
                Some(name) if name != export.name.as_bytes() => {
                    option_reply(writer, option, REP_ERR_UNKNOWN, &[])?;
                }
                Some(_) => {
                    describe(writer, option, export)?;
                    if option == OPT_GO {
                        return Ok(true);
                    }
                }
            },
            _ => option_reply(writer, option, REP_ERR_UNSUP, &[])?,
        }
    }
    Err(protocol("a handshake without an end"))
}

/// The export's name in an INFO or GO option.
fn named(content: &[u8]) -> Option<&[u8]> {
    let (length, rest) = content.split_first_chunk::<4>()?;
    rest.get(..usize::try_from(u32::from_be_bytes(*length)).ok()?)
}

fn describe(writer: &mut impl Write, option: u32, export: &Export) -> io::Result<()> {
    let mut info = INFO_EXPORT.to_be_bytes().to_vec();
    info.extend_from_slice(&export.size_bytes.to_be_bytes());
    info.extend_from_slice(&TRANSMISSION.to_be_bytes());
    option_reply(writer, option, REP_INFO, &info)?;
    let mut info = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
    for bytes in [1, PREFERRED_BYTES, REQUEST_BYTES_MAX] {
        info.extend_from_slice(&bytes.to_be_bytes());
    }
    option_reply(writer, option, REP_INFO, &info)?;
    option_reply(writer, option, REP_ACK, &[])
}

fn option_reply(writer: &mut impl Write, option: u32, kind: u32, content: &[u8]) -> io::Result<()> {
    let mut bytes = REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&length(content)?.to_be_bytes());
    bytes.extend_from_slice(content);
    writer.write_all(&bytes)
}

/// Serves requests until the client says goodbye.
pub(crate) fn transmission(
    reader: &mut impl Read,
    writer: &mut impl Write,
    export: &Export,
    sink: &mut dyn DiskSink,
) -> io::Result<()> {
    loop {
        if read_u32(reader)? != REQUEST_MAGIC {
            return Err(protocol("a request without its magic"));
        }
        let flags = read_u16(reader)?;
        let command = read_u16(reader)?;
        let cookie = read_u64(reader)?;
        let offset = read_u64(reader)?;
        let bytes = read_u32(reader)?;
        let mut payload = Vec::new();
        if command == CMD_WRITE {
            if bytes > REQUEST_BYTES_MAX {
                return Err(protocol("a write that is too long"));
            }
            payload.resize(bytes as usize, 0);
            reader.read_exact(&mut payload)?;
        }
        let inside = offset.checked_add(bytes.into()).is_some_and(|end| end <= export.size_bytes);
        let error = match command {
            CMD_DISC => return Ok(()),
            CMD_FLUSH => errno(sink.flush()),
            CMD_WRITE | CMD_WRITE_ZEROES if !inside => ENOSPC,
            CMD_TRIM | CMD_READ if !inside => EINVAL,
            CMD_WRITE => errno(sink.write(offset, payload)),
            CMD_WRITE_ZEROES => {
                let may_unmap = flags & CMD_FLAG_NO_HOLE == 0;
                errno(sink.write_zeroes(offset, bytes.into(), may_unmap))
            }
            CMD_TRIM => errno(sink.discard(offset, bytes.into())),
            // A mirror's target is written only; what it holds is elsewhere.
            CMD_READ => ENOTSUP,
            _ => EINVAL,
        };
        let error = match error {
            0 if flags & CMD_FLAG_FUA != 0 => errno(sink.flush()),
            error => error,
        };
        let mut reply = [0; 16];
        reply[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        reply[4..8].copy_from_slice(&error.to_be_bytes());
        reply[8..].copy_from_slice(&cookie.to_be_bytes());
        writer.write_all(&reply)?;
    }
}

fn errno(result: io::Result<()>) -> u32 {
    match result {
        Ok(()) => 0,
        Err(error) => {
            tracing::debug!(%error, "a mirrored operation was not taken");
            EIO
        }
    }
}
