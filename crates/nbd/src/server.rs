//! The export into which QEMU mirrors a disk.
//!
//! A write is acknowledged as soon as the sink took it, so that QEMU's mirror,
//! which keeps 16 requests in flight, does not wait for the network's delay. A
//! flush is answered when the sink says so. Nothing is promised by that: before
//! a handover the plane proves, with a barrier of its own, that all of it is
//! durable at the destination, and a mirror is never pivoted to.
//!
//! **Invariants.** One thread calls the sink, in order of arrival, with ranges
//! that are not empty and lie inside the export. Once the sink failed it is not
//! called again and every request gets an error: a mirror with a gap in it never
//! looks complete.

use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::export::Export;
use crate::negotiation::handshake;
use crate::wire::{
    CMD_DISC, CMD_FLAG_FAST_ZERO, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, CMD_FLUSH, CMD_READ, CMD_TRIM,
    CMD_WRITE, CMD_WRITE_ZEROES, EINVAL, EIO, ENOSPC, ENOTSUP, REPLY_BYTES, REQUEST_BYTES_MAX,
    RequestHead, SIMPLE_REPLY_MAGIC, protocol,
};

/// Longest silence of a client before its handshake is done. Others wait for it.
const HANDSHAKE_SILENCE_MAX: Duration = Duration::from_secs(10);
/// Pause after `accept` failed, for example for want of descriptors.
const ACCEPT_RETRY_PAUSE: Duration = Duration::from_millis(50);
/// Bytes that are read ahead: more than the heads of all requests in flight.
const READ_AHEAD_BYTES: usize = 32 << 10;

/// Takes the operations of one export, in order of their arrival.
///
/// Ranges are in bytes, never empty, and end inside the export. After the first
/// error nothing more is asked of it: QEMU's job fails, its guest does not notice.
pub trait DiskSink: Send {
    /// Takes bytes; may wait, which slows the mirror down.
    ///
    /// # Errors
    /// When nothing more can be taken.
    fn write(&mut self, offset_bytes: u64, bytes: Vec<u8>) -> io::Result<()>;
    /// Takes a range of zeroes, which may be a hole if it `may_unmap`.
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

/// What the server's thread and its handle share.
#[derive(Default)]
struct Shared {
    stopped: AtomicBool,
    /// The connection of now
    client: Mutex<Option<UnixStream>>,
    /// The sink's error
    failure: OnceLock<(io::ErrorKind, String)>,
}

impl Shared {
    fn client(&self) -> MutexGuard<'_, Option<UnixStream>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }
}

/// A served export; ends when it is dropped.
pub struct ServerHandle {
    shared: Arc<Shared>,
    listener: UnixListener,
    thread: Option<JoinHandle<()>>,
}

/// Serves an export to one client after the other, on a thread of its own.
///
/// # Errors
/// The kernel's.
pub fn serve(
    listener: UnixListener,
    export: Export,
    mut sink: Box<dyn DiskSink>,
) -> io::Result<ServerHandle> {
    listener.set_nonblocking(false)?;
    let shared = Arc::new(Shared::default());
    let (own, accepting) = (Arc::clone(&shared), listener.try_clone()?);
    // The only character that a thread's name cannot have.
    let thread_name = format!("nbd-{}", export.name).replace('\0', "");
    let span = tracing::Span::current();
    let thread = std::thread::Builder::new().name(thread_name).spawn(move || {
        let _entered = span.entered();
        while !own.is_stopped() {
            match accepting.accept() {
                Ok((stream, _)) => {
                    if let Err(error) = one_client(stream, &own, &export, &mut *sink) {
                        tracing::debug!(export = export.name, %error, "an NBD client ended");
                    }
                    *own.client() = None;
                }
                Err(_) if own.is_stopped() => {}
                Err(_) => std::thread::sleep(ACCEPT_RETRY_PAUSE),
            }
        }
    })?;
    Ok(ServerHandle { shared, listener, thread: Some(thread) })
}

impl ServerHandle {
    /// Why the sink takes nothing more, if that is so.
    #[must_use]
    pub fn failure(&self) -> Option<io::Error> {
        self.shared.failure.get().map(|(kind, text)| io::Error::new(*kind, text.clone()))
    }

    /// Ends the export and its client's connection, without waiting for a sink
    /// that is in the middle of a call.
    pub fn stop(self) {
        drop(self);
    }

    /// Ends the export and returns when its sink is dropped. Only for those who
    /// know that the sink does not wait for them.
    ///
    /// # Errors
    /// The sink's, if it failed; or what the sink panicked with.
    pub fn stop_and_join(mut self) -> io::Result<()> {
        self.close();
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| io::Error::other("the thread of the export panicked"))?;
        }
        self.failure().map_or(Ok(()), Err)
    }

    fn close(&self) {
        self.shared.stopped.store(true, Ordering::Release);
        // Wakes the one who waits for a client, and refuses those who come. What
        // is closed already needs no closing.
        rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both).ok();
        if let Some(stream) = &*self.shared.client() {
            stream.shutdown(std::net::Shutdown::Both).ok();
        }
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.close();
    }
}

fn one_client(
    stream: UnixStream,
    shared: &Shared,
    export: &Export,
    sink: &mut dyn DiskSink,
) -> io::Result<()> {
    *shared.client() = Some(stream.try_clone()?);
    // Who stops the export shuts down the client that it finds; one that came
    // later finds the export stopped.
    if shared.is_stopped() {
        return Ok(());
    }
    stream.set_read_timeout(Some(HANDSHAKE_SILENCE_MAX))?;
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::with_capacity(READ_AHEAD_BYTES, stream);
    if handshake(&mut reader, &mut writer, export)? {
        reader.get_ref().set_read_timeout(None)?;
        transmission(&mut reader, &mut writer, export, &mut Intake { sink, shared })?;
    }
    Ok(())
}

/// Talks to one client over any connection, from the hello to the goodbye.
///
/// # Errors
/// The connection's, and a client that does not follow the protocol.
pub fn converse(
    reader: &mut impl Read,
    writer: &mut impl Write,
    export: &Export,
    sink: &mut dyn DiskSink,
) -> io::Result<()> {
    if handshake(reader, writer, export)? {
        let intake = &mut Intake { sink, shared: &Shared::default() };
        transmission(reader, writer, export, intake)?;
    }
    Ok(())
}

/// The sink, until it fails.
struct Intake<'a> {
    sink: &'a mut dyn DiskSink,
    shared: &'a Shared,
}

impl Intake<'_> {
    /// Gives an operation to the sink; 0 or the number of an error.
    fn take(&mut self, operation: impl FnOnce(&mut dyn DiskSink) -> io::Result<()>) -> u32 {
        if self.shared.failure.get().is_some() {
            return EIO;
        }
        let Err(error) = operation(self.sink) else { return 0 };
        let kind = error.kind();
        // Nobody else sets it.
        self.shared.failure.set((kind, error.to_string())).ok();
        tracing::debug!(%error, "a mirrored operation was not taken");
        if kind == io::ErrorKind::StorageFull { ENOSPC } else { EIO }
    }
}

/// Serves requests until the client says goodbye, or the export is stopped.
fn transmission(
    reader: &mut impl Read,
    writer: &mut impl Write,
    export: &Export,
    intake: &mut Intake<'_>,
) -> io::Result<()> {
    loop {
        let head = RequestHead::read(reader)?;
        // What had arrived can be read after the connection was shut down.
        if intake.shared.is_stopped() || head.command == CMD_DISC {
            return Ok(());
        }
        let error = match refusal(&head, export) {
            Some(error) => {
                skip_payload(reader, &head)?;
                error
            }
            None => perform(reader, &head, intake)?,
        };
        let mut reply = [0; REPLY_BYTES];
        reply[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        reply[4..8].copy_from_slice(&error.to_be_bytes());
        reply[8..].copy_from_slice(&head.cookie.to_be_bytes());
        writer.write_all(&reply)?;
    }
}

/// The error to which a request leads by its head alone.
fn refusal(head: &RequestHead, export: &Export) -> Option<u32> {
    let (flags_allowed, past_the_end) = match head.command {
        CMD_WRITE => (CMD_FLAG_FUA, ENOSPC),
        CMD_WRITE_ZEROES => (CMD_FLAG_FUA | CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO, ENOSPC),
        CMD_TRIM => (CMD_FLAG_FUA, EINVAL),
        CMD_FLUSH => return (head.flags & !CMD_FLAG_FUA != 0).then_some(EINVAL),
        // The mirror's target is written only; what it holds is elsewhere.
        CMD_READ => return Some(ENOTSUP),
        _ => return Some(EINVAL),
    };
    if head.flags & !flags_allowed != 0 {
        return Some(EINVAL);
    }
    let end = head.offset.checked_add(head.bytes.into());
    end.is_none_or(|end| end > export.size_bytes).then_some(past_the_end)
}

/// Passes over the payload of a refused write, without keeping it.
fn skip_payload(reader: &mut impl Read, head: &RequestHead) -> io::Result<()> {
    let payload_bytes = payload_bytes(head)?;
    let skipped = io::copy(&mut reader.take(payload_bytes), &mut io::sink())?;
    if skipped == payload_bytes { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Bytes that follow the head.
fn payload_bytes(head: &RequestHead) -> io::Result<u64> {
    match head.command {
        CMD_WRITE if head.bytes > REQUEST_BYTES_MAX => Err(protocol("a write that is too long")),
        CMD_WRITE => Ok(head.bytes.into()),
        _ => Ok(0),
    }
}

/// Does a request that was not refused; 0 or the number of an error.
fn perform(reader: &mut impl Read, head: &RequestHead, intake: &mut Intake<'_>) -> io::Result<u32> {
    let mut payload = vec![0; usize::try_from(payload_bytes(head)?).map_err(io::Error::other)?];
    reader.read_exact(&mut payload)?;
    let (offset, bytes) = (head.offset, u64::from(head.bytes));
    let error = intake.take(|sink| match head.command {
        CMD_FLUSH => sink.flush(),
        // What an empty request does is not specified: here, nothing.
        _ if bytes == 0 => Ok(()),
        CMD_WRITE => sink.write(offset, payload),
        CMD_WRITE_ZEROES => sink.write_zeroes(offset, bytes, head.flags & CMD_FLAG_NO_HOLE == 0),
        _ => sink.discard(offset, bytes),
    });
    if error == 0 && head.command != CMD_FLUSH && head.flags & CMD_FLAG_FUA != 0 {
        return Ok(intake.take(|sink| sink.flush()));
    }
    Ok(error)
}
