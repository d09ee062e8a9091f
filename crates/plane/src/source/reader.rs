//! Reads QEMU's stream and deals its pages to the senders.

use std::io::{self, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use limosa_qemu::stream::{RamBlock, RamSection, StreamParser, StreamSink};

use super::sender::{Batch, Work};
use super::{RamBlockSpec, WORK_BYTES_MAX, ended};
use crate::PAGE_BYTES;
use crate::halt::{Halt, PlaneError};
use crate::meter::{Meter, add};
use crate::route::page_channel;

/// Bytes read from QEMU at a time.
const READ_BYTES: usize = 256 << 10;
/// How often a socket that QEMU has not connected to yet is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// Pages of a batch.
const BATCH_PAGES_MAX: usize = WORK_BYTES_MAX / PAGE_BYTES;

pub(super) struct Reader {
    ram: Vec<RamBlockSpec>,
    queues: Vec<SyncSender<Work>>,
    halt: Arc<Halt>,
    meter: Arc<Meter>,
}

impl Reader {
    pub(super) fn new(
        ram: Vec<RamBlockSpec>,
        queues: Vec<SyncSender<Work>>,
        halt: Arc<Halt>,
        meter: Arc<Meter>,
    ) -> Self {
        Self { ram, queues, halt, meter }
    }

    pub(super) fn run(self, listener: &UnixListener) -> Result<(), PlaneError> {
        let failed = |error| PlaneError::local("QEMU's migration socket", error);
        let Some(mut stream) = self.accept(listener).map_err(failed)? else { return Ok(()) };
        let names = self.ram.iter().map(|block| block.name.clone()).collect();
        let mut parser = StreamParser::new(names);
        let batches = (0..self.queues.len()).map(|_| Batch::default()).collect();
        let mut dealer = Dealer { ram: self.ram, queues: self.queues, meter: self.meter, batches };
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let length = match stream.read(&mut buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) if self.halt.is_halted() => return Ok(()),
                Err(error) => return Err(failed(error)),
            };
            if self.halt.is_halted() {
                return Ok(());
            }
            let result = if length == 0 {
                parser.finish()
            } else {
                parser.feed(&buffer[..length], &mut dealer)
            };
            if let Err(error) = result {
                if self.halt.is_halted() {
                    return Ok(());
                }
                return Err(PlaneError::Stream(Arc::new(error)));
            }
            if length == 0 {
                return match dealer.send(0, Work::StreamEnd) {
                    Err(_) if self.halt.is_halted() => Ok(()),
                    result => result.map_err(failed),
                };
            }
        }
    }

    /// Waits for QEMU; `None` when the plane ended first.
    fn accept(&self, listener: &UnixListener) -> io::Result<Option<UnixStream>> {
        listener.set_nonblocking(true)?;
        while !self.halt.is_halted() {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    let closer = stream.try_clone()?;
                    self.halt.on_halt(Box::new(move || {
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

/// Gathers pages by channel.
struct Dealer {
    ram: Vec<RamBlockSpec>,
    queues: Vec<SyncSender<Work>>,
    meter: Arc<Meter>,
    batches: Vec<Batch>,
}

impl Dealer {
    fn send(&self, channel: usize, work: Work) -> io::Result<()> {
        self.queues[channel].send(work).map_err(|_| ended())
    }

    fn batch(&mut self, backend: usize, offset_bytes: u64) -> (usize, u64) {
        debug_assert!(backend < self.ram.len());
        let page = offset_bytes / PAGE_BYTES as u64;
        (page_channel(page, self.queues.len()), page)
    }

    fn send_full(&mut self, channel: usize) -> io::Result<()> {
        if self.batches[channel].pages.len() < BATCH_PAGES_MAX {
            return Ok(());
        }
        let batch = std::mem::take(&mut self.batches[channel]);
        self.send(channel, Work::Pages(batch))
    }

    fn send_all(&mut self) -> io::Result<()> {
        for channel in 0..self.queues.len() {
            let batch = std::mem::take(&mut self.batches[channel]);
            if !batch.pages.is_empty() {
                self.send(channel, Work::Pages(batch))?;
            }
        }
        Ok(())
    }
}

impl StreamSink for Dealer {
    fn block_list(&mut self, blocks: &[RamBlock]) -> io::Result<()> {
        for ours in &self.ram {
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

    fn inline(&mut self, bytes: &[u8]) -> io::Result<()> {
        add(&self.meter.stream_bytes, bytes.len() as u64);
        self.send(0, Work::Stream(bytes.to_vec()))
    }

    fn ram_section_end(&mut self, section: RamSection) -> io::Result<()> {
        // What stands in a batch waits for nobody: QEMU may pause between two
        // sections.
        self.send_all()?;
        if section == RamSection::End {
            for channel in 0..self.queues.len() {
                self.send(channel, Work::RamBarrier)?;
            }
        }
        Ok(())
    }
}
