//! Applies what one channel brings.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError};

use limosa_protocol::frame::{DiskHeader, FrameKind, PageForm, PageHeader};

use super::Shared;
use crate::PAGE_BYTES;
use crate::channel::FrameReader;
use crate::difference;
use crate::digest::{DiskChain, PageDigests, page_digest};
use crate::halt::PlaneError;
use crate::route::{disk_channel, page_channel, page_slot, slot_count};

/// Disk bytes after which they are flushed, so that the last flush, which is
/// blackout, is short.
const FLUSH_EVERY_BYTES: u64 = 64 << 20;

pub(super) struct Receiver {
    index: usize,
    frames: FrameReader,
    apply: Apply,
}

/// What is done with frames.
struct Apply {
    index: usize,
    shared: Arc<Shared>,
    qemu: Option<UnixStream>,
    digests: PageDigests,
    chain: DiskChain,
    ram_passed: bool,
    disk_passed: bool,
    unflushed_bytes: u64,
}

impl Receiver {
    pub(super) fn new(
        index: usize,
        frames: FrameReader,
        shared: Arc<Shared>,
        qemu: Option<UnixStream>,
    ) -> Self {
        let slots = shared
            .ram
            .iter()
            .map(|ram| slot_count(ram.page_count() * PAGE_BYTES as u64, shared.channel_count));
        let digests = PageDigests::new(slots);
        let apply = Apply {
            index,
            shared,
            qemu,
            digests,
            chain: DiskChain::default(),
            ram_passed: false,
            disk_passed: false,
            unflushed_bytes: 0,
        };
        Self { index, frames, apply }
    }

    pub(super) fn run(mut self) -> Result<(), PlaneError> {
        loop {
            let halted = self.apply.shared.halt.is_halted();
            let result = match self.frames.next() {
                Ok(Some((kind, payload))) => self.apply.frame(kind, payload),
                // All was acknowledged, or the plane was ended: the connection
                // may go.
                Ok(None) if self.apply.is_done() || halted => return Ok(()),
                Ok(None) => {
                    let end = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
                    return Err(PlaneError::lost(self.index, end));
                }
                Err(_) if self.apply.is_done() => return Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = result {
                let halted = self.apply.shared.halt.is_halted();
                return if halted { Ok(()) } else { Err(error) };
            }
        }
    }
}

impl Apply {
    fn is_done(&self) -> bool {
        let ram_is_done = self.ram_passed || self.shared.ram.is_empty();
        // Who feeds QEMU has it until its stream has ended.
        self.disk_passed && ram_is_done && self.qemu.is_none()
    }

    fn frame(&mut self, kind: FrameKind, payload: &[u8]) -> Result<(), PlaneError> {
        match kind {
            FrameKind::Pages => self.pages(payload),
            FrameKind::Stream => self.stream(payload),
            FrameKind::StreamEnd => self.stream_end(),
            FrameKind::DiskWrite | FrameKind::DiskZero | FrameKind::DiskDiscard => {
                self.disk(kind, payload)
            }
            FrameKind::RamBarrier => self.ram_barrier(),
            FrameKind::DiskBarrier => self.disk_barrier(),
            FrameKind::RamAck | FrameKind::DiskAck => Err(self.bad("an ack on a data channel")),
        }
    }

    fn bad(&self, what: &str) -> PlaneError {
        PlaneError::protocol(self.index, what)
    }

    fn pages(&mut self, mut payload: &[u8]) -> Result<(), PlaneError> {
        if self.ram_passed {
            return Err(self.bad("pages after the end of RAM"));
        }
        while !payload.is_empty() {
            let (head, content) = PageHeader::decode(&mut payload)
                .map_err(|error| PlaneError::frame(self.index, error))?;
            self.page(head, content)?;
        }
        Ok(())
    }

    fn page(&mut self, head: PageHeader, content: &[u8]) -> Result<(), PlaneError> {
        let (block, page) = (usize::from(head.block), u64::from(head.index));
        let count = self.shared.channel_count;
        let ram = self.shared.ram.get(block).ok_or_else(|| self.bad("a page of no block"))?;
        // Each page has one channel: two threads never have the same page.
        if page >= ram.page_count() || page_channel(page, count) != self.index {
            return Err(self.bad("a page out of its place"));
        }
        let slot = page_slot(page, count);
        let digest = match head.form {
            PageForm::Zero if content.is_empty() => {
                // One that was never written is a hole already, and stays one.
                if self.digests.get(block, slot) != 0 {
                    ram.clear_page(page)
                        .map_err(|error| PlaneError::local("clearing a page", error))?;
                }
                0
            }
            PageForm::Full => {
                let content: &[u8; PAGE_BYTES] =
                    content.try_into().map_err(|_| self.bad("a page that is not whole"))?;
                ram.with_page(page, |place| {
                    place.copy_from_slice(content);
                    page_digest(head.block, page, place)
                })
            }
            PageForm::Difference => ram
                .with_page(page, |place| {
                    difference::apply(place, content).map(|()| page_digest(head.block, page, place))
                })
                .map_err(|error| PlaneError::protocol(self.index, error))?,
            PageForm::Zero => return Err(self.bad("a page of zeroes with a content")),
        };
        self.digests.set(block, slot, digest);
        Ok(())
    }

    fn stream(&mut self, bytes: &[u8]) -> Result<(), PlaneError> {
        // After the end of RAM comes device state, and loading a device looks at
        // RAM: all of it must be in.
        if self.ram_passed && !self.shared.wait_for_ram() {
            return Ok(());
        }
        let Some(qemu) = &mut self.qemu else { return Err(self.bad("a stream for no QEMU")) };
        qemu.write_all(bytes)
            .map_err(|error| PlaneError::local("giving QEMU its stream (see qemu.log)", error))
    }

    fn stream_end(&mut self) -> Result<(), PlaneError> {
        if !self.ram_passed || !self.shared.wait_for_ram() {
            return Err(self.bad("the stream ended before RAM"));
        }
        let Some(qemu) = self.qemu.take() else { return Err(self.bad("a stream for no QEMU")) };
        // QEMU may have closed its end when it had read all.
        qemu.shutdown(std::net::Shutdown::Write).ok();
        self.shared.end_stream();
        Ok(())
    }

    fn ram_barrier(&mut self) -> Result<(), PlaneError> {
        if std::mem::replace(&mut self.ram_passed, true) {
            return Err(self.bad("a second end of RAM"));
        }
        self.shared.ack(FrameKind::RamAck, self.index, self.digests.sum())?;
        self.shared.pass_ram()
    }

    fn disk(&mut self, kind: FrameKind, payload: &[u8]) -> Result<(), PlaneError> {
        if self.disk_passed {
            return Err(self.bad("a disk operation after the last barrier"));
        }
        let mut bytes = payload;
        let head =
            DiskHeader::decode(&mut bytes).map_err(|error| PlaneError::frame(self.index, error))?;
        let target = self
            .shared
            .disks
            .get(usize::from(head.disk))
            .ok_or_else(|| self.bad("an operation on no disk"))?;
        let mut target = target.lock().unwrap_or_else(PoisonError::into_inner);
        let end = head.offset_bytes + head.length_bytes;
        let length_fits = match kind {
            FrameKind::DiskWrite => bytes.len() as u64 == head.length_bytes,
            _ => bytes.is_empty(),
        };
        let ours =
            disk_channel(head.disk, head.offset_bytes, self.shared.channel_count) == self.index;
        if end > target.size_bytes() || !length_fits || !ours {
            return Err(self.bad("a disk operation out of its place"));
        }
        let (offset, length) = (head.offset_bytes, head.length_bytes);
        let applied = match kind {
            FrameKind::DiskWrite => target.write(offset, bytes),
            FrameKind::DiskZero => target.write_zeroes(offset, length, head.may_unmap),
            _ => target.write_zeroes(offset, length, true),
        };
        let failed = |error| PlaneError::local(format!("writing disk {} here", head.disk), error);
        applied.map_err(failed)?;
        self.unflushed_bytes += bytes.len() as u64;
        if self.unflushed_bytes >= FLUSH_EVERY_BYTES {
            self.unflushed_bytes = 0;
            target.flush().map_err(failed)?;
        }
        drop(target);
        self.chain.add(kind as u8, payload);
        Ok(())
    }

    fn disk_barrier(&mut self) -> Result<(), PlaneError> {
        if std::mem::replace(&mut self.disk_passed, true) {
            return Err(self.bad("a second end of the disks"));
        }
        for target in &self.shared.disks {
            let mut target = target.lock().unwrap_or_else(PoisonError::into_inner);
            target.flush().map_err(|error| PlaneError::local("flushing a disk here", error))?;
        }
        self.shared.ack(FrameKind::DiskAck, self.index, self.chain.digest())?;
        self.shared.pass_disk();
        Ok(())
    }
}
