//! Applies the frames of one channel.
//!
//! **Invariant.** A frame is applied whole or the plane ends: what counts as
//! taken over is never half done.

use std::io;
use std::sync::Arc;

use limosa_protocol::frame::{
    Barrier, DigestSubject, DigestsHeader, DiskHeader, FrameKind, PageForm, PageHeader, RamStart,
};

use super::shared::Shared;
use super::tail::TailError;
use crate::difference;
use crate::digest::{DiskDigests, PageDigests, page_digest};
use crate::page::PAGE_BYTES;
use crate::ram::Ram;
use crate::route::{disk_channel, is_in_one_region, page_channel, page_slot, slot_page};
use crate::shutdown::{Place, PlaneError};

/// What is done with frames.
pub(super) struct Apply {
    index: usize,
    shared: Arc<Shared>,
    disks: DiskDigests,
    /// The stream of QEMU of which pages come, from 1
    stream: u32,
    ram_passed: bool,
}

impl Apply {
    pub(super) fn new(index: usize, shared: Arc<Shared>) -> Self {
        Self {
            index,
            disks: DiskDigests::new(shared.disks.sizes_bytes()),
            shared,
            stream: 0,
            ram_passed: true,
        }
    }

    /// Applies a frame.
    ///
    /// - `number`: of the frame, from 1.
    pub(super) fn frame(
        &mut self,
        kind: FrameKind,
        payload: &[u8],
        number: u64,
    ) -> Result<(), PlaneError> {
        match kind {
            FrameKind::RamStart => self.ram_start(payload),
            FrameKind::Pages => self.pages(payload),
            FrameKind::Stream | FrameKind::Tail | FrameKind::StreamEnd | FrameKind::Release => {
                self.stream(kind, payload)
            }
            FrameKind::DiskWrite | FrameKind::DiskZero | FrameKind::DiskDiscard => {
                self.disk(kind, payload)
            }
            FrameKind::RamBarrier => self.ram_barrier(number),
            FrameKind::DiskBarrier => {
                self.disk_barrier(number);
                Ok(())
            }
            FrameKind::Digests => self.compare(payload),
            FrameKind::Ack | FrameKind::Resume | FrameKind::KeepAlive => {
                Err(self.bad("a frame of the return path on a channel"))
            }
        }
    }

    /// What follows from a frame once it is acknowledged.
    pub(super) fn after(&mut self, kind: FrameKind) -> Result<(), PlaneError> {
        match kind {
            FrameKind::RamBarrier => self.shared.pass_ram(self.index, self.stream),
            FrameKind::Release => self.shared.give_tail(),
            _ => Ok(()),
        }
    }

    fn bad(&self, what: &str) -> PlaneError {
        PlaneError::protocol(self.index, what)
    }

    fn pages(&mut self, mut payload: &[u8]) -> Result<(), PlaneError> {
        if self.ram_passed {
            return Err(self.bad("pages after the end of RAM"));
        }
        let ram = self.shared.read_ram();
        let mut digests = self.shared.lock_digests(self.index);
        while !payload.is_empty() {
            let (head, content) = PageHeader::decode(&mut payload)
                .map_err(|error| PlaneError::frame(self.index, error))?;
            self.page(&ram, &mut digests, head, content)?;
        }
        Ok(())
    }

    fn page(
        &self,
        ram: &[Ram],
        digests: &mut PageDigests,
        head: PageHeader,
        content: &[u8],
    ) -> Result<(), PlaneError> {
        let (block, page) = (usize::from(head.block), u64::from(head.index));
        let count = self.shared.channel_count;
        let ram = ram.get(block).ok_or_else(|| self.bad("a page of no block"))?;
        // Each page has one channel: two threads never have the same page.
        if page >= ram.page_count() || page_channel(page, count) != self.index {
            return Err(self.bad("a page out of its place"));
        }
        let slot = page_slot(page, count);
        let digest = match head.form {
            PageForm::Zero if content.is_empty() => {
                // One that was never written is a hole already, and stays one.
                if digests.get(block, slot) != 0 {
                    ram.clear(page, 1)
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
        digests.set(block, slot, digest);
        Ok(())
    }

    fn ram_start(&mut self, payload: &[u8]) -> Result<(), PlaneError> {
        let RamStart { stream } =
            RamStart::decode(payload).map_err(|error| PlaneError::frame(self.index, error))?;
        if stream <= self.stream || self.shared.read_ram().is_empty() {
            return Err(self.bad("a start of RAM where none belongs"));
        }
        self.stream = stream;
        self.ram_passed = false;
        if self.index == 0 {
            self.shared.lock_tail().begin().map_err(|error| self.tail_failed(error))?;
        }
        Ok(())
    }

    /// Takes what is for QEMU; all of it comes on one channel.
    fn stream(&mut self, kind: FrameKind, bytes: &[u8]) -> Result<(), PlaneError> {
        if self.index != 0 || self.stream == 0 {
            return Err(self.bad("a stream where none belongs"));
        }
        let shared = Arc::clone(&self.shared);
        let mut tail = shared.lock_tail();
        let taken = match kind {
            FrameKind::Stream => tail.stream(bytes),
            FrameKind::Tail if tail.is_long_with(bytes) => {
                drop(tail);
                return self.long_tail(bytes);
            }
            FrameKind::Tail => tail.hold(bytes),
            FrameKind::StreamEnd if self.ram_passed => tail.end(),
            FrameKind::Release => tail.release(),
            _ => return Err(self.bad("the stream ended before RAM")),
        };
        taken.map_err(|error| self.tail_failed(error))
    }

    /// Gives QEMU a tail that is too long to be held. After the end of RAM comes
    /// device state, and loading a device looks at RAM: all of it must be in.
    fn long_tail(&self, bytes: &[u8]) -> Result<(), PlaneError> {
        if self.ram_passed && !self.shared.wait_for_ram(self.stream) {
            return Ok(());
        }
        let passed = self.shared.lock_tail().pass_on(bytes);
        passed.map_err(|error| self.tail_failed(error))
    }

    fn tail_failed(&self, error: TailError) -> PlaneError {
        match error {
            TailError::Order(what) => self.bad(what),
            TailError::Qemu(source) => {
                PlaneError::local("giving QEMU its stream (see qemu.log)", source)
            }
        }
    }

    fn ram_barrier(&mut self, number: u64) -> Result<(), PlaneError> {
        if std::mem::replace(&mut self.ram_passed, true) {
            return Err(self.bad("a second end of RAM"));
        }
        let barrier = Barrier { at: number, digest: self.shared.lock_digests(self.index).sum() };
        self.shared.ack_state.passed_ram(self.index, barrier);
        Ok(())
    }

    fn disk(&mut self, kind: FrameKind, payload: &[u8]) -> Result<(), PlaneError> {
        let mut bytes = payload;
        let head =
            DiskHeader::decode(&mut bytes).map_err(|error| PlaneError::frame(self.index, error))?;
        let disks = &self.shared.disks;
        let mut target = disks.get(head.disk).ok_or_else(|| self.bad("an operation on no disk"))?;
        let (offset, length) = (head.offset_bytes, head.length_bytes);
        let length_fits = match kind {
            FrameKind::DiskWrite => bytes.len() as u64 == length,
            _ => bytes.is_empty(),
        };
        // Each region has one channel: no two of them write the same bytes.
        let ours = is_in_one_region(offset, length)
            && disk_channel(head.disk, offset, self.shared.channel_count) == self.index;
        if offset + length > target.size_bytes() || !length_fits || !ours {
            return Err(self.bad("a disk operation out of its place"));
        }
        let applied =
            disks.operate(head.disk, &mut target, bytes.len() as u64, |target| match kind {
                FrameKind::DiskWrite => target.write(offset, bytes),
                FrameKind::DiskZero => target.write_zeroes(offset, length, head.may_unmap),
                _ => target.write_zeroes(offset, length, true),
            });
        applied.map_err(|error| match error.kind() {
            io::ErrorKind::NotConnected => PlaneError::lost(self.index, error),
            _ => PlaneError::local(format!("writing disk {} here", head.disk), error),
        })?;
        drop(target);
        self.disks.add(head.disk, offset, kind as u8, payload);
        Ok(())
    }

    /// Compares a piece of the source's tables with what is here; the first
    /// difference ends the plane.
    fn compare(&self, mut payload: &[u8]) -> Result<(), PlaneError> {
        let head = DigestsHeader::decode(&mut payload)
            .map_err(|error| PlaneError::frame(self.index, error))?;
        if head.is_last {
            return Err(self.bad("the source told of a difference that is not there"));
        }
        let disk = self.disks.disk(head.number);
        let digests = self.shared.lock_digests(self.index);
        let ours = match head.subject {
            DigestSubject::Ram => digests.tables().get(usize::from(head.number)),
            DigestSubject::Disk => disk.map(|ranges| &ranges.chains),
        };
        let first = usize::try_from(head.first).unwrap_or(usize::MAX);
        let ours = ours
            .and_then(|table| table.get(first..))
            .filter(|table| table.len() >= payload.len() / 16)
            .ok_or_else(|| self.bad("digests of what there is not"))?;
        let theirs = payload.as_chunks::<16>().0.iter().map(|bytes| u128::from_le_bytes(*bytes));
        let Some(at) = ours.iter().zip(theirs).position(|(ours, theirs)| *ours != theirs) else {
            return Ok(());
        };
        let place = match (head.subject, disk) {
            (DigestSubject::Disk, Some(ranges)) => {
                let (from_bytes, to_bytes) = ranges.place(first + at);
                Place::Range { disk: head.number, from_bytes, to_bytes }
            }
            _ => {
                let page = slot_page(first + at, self.index, self.shared.channel_count);
                Place::Page { offset_bytes: page * PAGE_BYTES as u64 }
            }
        };
        Err(PlaneError::Different { channel: self.index.to_string(), place })
    }

    /// Has all disks flushed; it is told once they are.
    fn disk_barrier(&self, number: u64) {
        let barrier = Barrier { at: number, digest: self.disks.digest() };
        self.shared.disks.barrier(self.index, barrier, |passed| self.shared.pass_disks(passed));
    }
}
