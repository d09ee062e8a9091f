//! Reads QEMU's streams, one after the other, and deals their pages to the senders.
//!
//! ```text
//! stream 1   head ─► sections, pages … ─► tail            given up: the rest is read and dropped
//! stream 2   head (compared, not sent) ─► sections, pages … ─► tail ─► end
//! ```
//!
//! To the destination's QEMU this is one stream: it gets the first head, whole
//! sections of all streams, and the tail of the last. Pages are only told apart
//! by their content: one that the destination has already costs nothing.
//!
//! **Invariant.** Once a stream is given up nobody waits for its reader, and its
//! reader waits for nobody: QEMU can always write to its end.

use std::io::{self, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use limosa_qemu::stream::{RamBlock, RamSection, StreamParser, StreamPart, StreamSink};

use super::ack_tracker::AckTracker;
use super::spec::RamBlockSpec;
use super::work::{Batch, Queues, WORK_BYTES_MAX, Work, ended};
use crate::holes::next_hole;
use crate::meter::{Meter, add};
use crate::page::PAGE_BYTES;
use crate::route::page_channel;
use crate::shutdown::{PlaneError, Shutdown};

/// Bytes read from QEMU at a time.
const READ_BYTES: usize = 256 << 10;
/// How often a socket that QEMU has not connected to yet is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// Pages of a batch.
const BATCH_PAGES_MAX: usize = WORK_BYTES_MAX / PAGE_BYTES;

/// The head of the first stream that got that far.
pub(super) type Head = Mutex<Option<Vec<u8>>>;

pub(super) struct Reader {
    pub(super) stream: u32,
    pub(super) ram: Vec<RamBlockSpec>,
    pub(super) queues: Queues,
    pub(super) ack_tracker: Arc<AckTracker>,
    pub(super) head: Arc<Head>,
    pub(super) shutdown: Arc<Shutdown>,
    pub(super) meter: Arc<Meter>,
}

/// How a stream ended.
enum End {
    /// All of it was taken apart
    Whole,
    /// Somebody does not want it any more; it may not be at its end
    GivenUp,
}

impl Reader {
    /// - `before`: who reads the stream before; it was given up.
    pub(super) fn run(
        self,
        listener: &UnixListener,
        before: Option<JoinHandle<()>>,
    ) -> Result<(), PlaneError> {
        let failed = |error| PlaneError::local("QEMU's migration socket", error);
        // Its last pages must not come after the first of this one. A panic in it
        // is no news by now.
        before.map(JoinHandle::join);
        let Some(mut stream) = self.accept(listener).map_err(failed)? else { return Ok(()) };
        match self.follow(&mut stream) {
            _ if self.shutdown.is_shut_down() => Ok(()),
            Ok(End::Whole) => Ok(()),
            Ok(End::GivenUp) => drain(&mut stream).or_else(|error| {
                tracing::debug!(%error, "the end of a stream that was given up");
                Ok(())
            }),
            Err(error) => Err(error),
        }
    }

    /// Takes QEMU's stream apart until it ends or is given up.
    fn follow(&self, stream: &mut UnixStream) -> Result<End, PlaneError> {
        let failed = |error| PlaneError::local("QEMU's migration socket", error);
        let names = self.ram.iter().map(|block| block.name.clone()).collect();
        let mut parser = StreamParser::new(names);
        let batches = (0..self.queues.len()).map(|_| Batch::default()).collect();
        let mut dispatcher = Dispatcher { reader: self, batches };
        let mut buffer = vec![0; READ_BYTES];
        let mut result = dispatcher.begin().map(|()| false).map_err(failed);
        loop {
            if self.is_given_up() {
                return Ok(End::GivenUp);
            }
            if result? {
                return Ok(End::Whole);
            }
            let length = match stream.read(&mut buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    result = Ok(false);
                    continue;
                }
                Err(error) => return Err(failed(error)),
            };
            result = if length > 0 {
                parser.feed(&buffer[..length], &mut dispatcher).map(|()| false)
            } else {
                parser.finish().map(|()| true)
            }
            .map_err(|error| PlaneError::Stream(Arc::new(error)))
            .and_then(|ended| {
                if ended {
                    dispatcher.push(0, Work::StreamEnd).map_err(failed)?;
                }
                Ok(ended)
            });
        }
    }

    fn is_given_up(&self) -> bool {
        self.shutdown.is_shut_down() || self.ack_tracker.is_given_up(self.stream)
    }

    /// Waits for QEMU; `None` when the stream is not wanted any more.
    fn accept(&self, listener: &UnixListener) -> io::Result<Option<UnixStream>> {
        listener.set_nonblocking(true)?;
        while !self.is_given_up() {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    let closer = stream.try_clone()?;
                    self.shutdown.on_shutdown(Box::new(move || {
                        // QEMU may have closed it before.
                        closer.shutdown(std::net::Shutdown::Both).ok();
                    }));
                    return Ok(Some(stream));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    std::thread::sleep(LOOK_EVERY);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

/// Reads to the end: QEMU holds its lock until it has written everything.
fn drain(stream: &mut UnixStream) -> Result<(), PlaneError> {
    io::copy(stream, &mut io::sink())
        .map(drop)
        .map_err(|error| PlaneError::local("QEMU's migration socket", error))
}

/// Gathers pages by channel.
struct Dispatcher<'a> {
    reader: &'a Reader,
    batches: Vec<Batch>,
}

impl Dispatcher<'_> {
    fn begin(&self) -> io::Result<()> {
        (0..self.batches.len())
            .try_for_each(|channel| self.push(channel, Work::RamStart(self.reader.stream)))
    }

    fn push(&self, channel: usize, work: Work) -> io::Result<()> {
        let gives_up = || self.reader.is_given_up();
        self.reader.queues[channel].push(work, gives_up).map_err(|_| ended())
    }

    fn batch(&mut self, backend: usize, offset_bytes: u64) -> (usize, u64) {
        debug_assert!(backend < self.reader.ram.len());
        let page = offset_bytes / PAGE_BYTES as u64;
        (page_channel(page, self.batches.len()), page)
    }

    fn send_full(&mut self, channel: usize) -> io::Result<()> {
        if self.batches[channel].pages.len() < BATCH_PAGES_MAX {
            return Ok(());
        }
        let batch = std::mem::take(&mut self.batches[channel]);
        self.push(channel, Work::Pages(batch))
    }

    fn send_all(&mut self) -> io::Result<()> {
        for channel in 0..self.batches.len() {
            let batch = std::mem::take(&mut self.batches[channel]);
            if !batch.pages.is_empty() {
                self.push(channel, Work::Pages(batch))?;
            }
        }
        Ok(())
    }

    /// Sends the holes of each block's memory as zero pages. The guest is paused: no
    /// hole closes, and none opens, before the stream has ended.
    fn discarded_pages(&mut self) -> io::Result<()> {
        for backend in 0..self.reader.ram.len() {
            let block = &self.reader.ram[backend];
            let (Some(memory), size_bytes) = (block.memory.clone(), block.size_bytes) else {
                continue;
            };
            let mut at = 0;
            while let Some(hole) = next_hole(&memory, at, size_bytes)? {
                at = hole.end;
                for offset in hole.step_by(PAGE_BYTES) {
                    self.zero_page(backend, offset)?;
                }
            }
        }
        self.send_all()
    }

    /// Sends the head once. Another one would be of another machine: the
    /// destination's QEMU could not go on with it.
    fn head(&self, bytes: &[u8]) -> io::Result<()> {
        let mut head = self.reader.head.lock().unwrap_or_else(PoisonError::into_inner);
        match &*head {
            None => {
                self.push(0, Work::Stream(bytes.to_vec()))?;
                *head = Some(bytes.to_vec());
                Ok(())
            }
            Some(first) if first == bytes => Ok(()),
            Some(_) => Err(io::Error::other(
                "QEMU's blocks of RAM are not those of the switchover that was given up",
            )),
        }
    }
}

impl StreamSink for Dispatcher<'_> {
    fn block_list(&mut self, blocks: &[RamBlock]) -> io::Result<()> {
        for ours in &self.reader.ram {
            let same = |block: &&RamBlock| block.name == ours.name;
            let listed = blocks.iter().find(same).map_or(0, |block| block.used_bytes);
            if listed != ours.size_bytes {
                return Err(io::Error::other(format!(
                    "RAM block {} has {listed} bytes in QEMU's stream and {} in the definition",
                    ours.name, ours.size_bytes
                )));
            }
        }
        Ok(())
    }

    fn page(&mut self, backend: usize, offset: u64, page: &[u8; PAGE_BYTES]) -> io::Result<()> {
        let (channel, index) = self.batch(backend, offset);
        let batch = &mut self.batches[channel];
        if batch.bytes.capacity() == 0 {
            batch.bytes.reserve_exact(WORK_BYTES_MAX);
        }
        batch.bytes.extend_from_slice(page);
        batch.pages.push((backend, index, false));
        self.send_full(channel)
    }

    fn zero_page(&mut self, backend: usize, offset: u64) -> io::Result<()> {
        let (channel, index) = self.batch(backend, offset);
        self.batches[channel].pages.push((backend, index, true));
        self.send_full(channel)
    }

    fn inline(&mut self, part: StreamPart, bytes: &[u8]) -> io::Result<()> {
        add(&self.reader.meter.stream_bytes, bytes.len() as u64);
        match part {
            StreamPart::Head => self.head(bytes),
            StreamPart::Sections => self.push(0, Work::Stream(bytes.to_vec())),
            StreamPart::Tail => self.push(0, Work::Tail(bytes.to_vec())),
        }
    }

    fn ram_section_end(&mut self, section: RamSection) -> io::Result<()> {
        // What stands in a batch waits for nobody: QEMU may pause between two
        // sections.
        self.send_all()?;
        if section == RamSection::End {
            self.discarded_pages()?;
            for channel in 0..self.batches.len() {
                self.push(channel, Work::RamBarrier)?;
            }
        }
        Ok(())
    }
}
