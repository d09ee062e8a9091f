//! Packs what one channel carries, and sends it.

use std::sync::Arc;
use std::time::Duration;

use limosa_protocol::frame::{
    Barrier, DigestSubject, DigestsHeader, FrameKind, PageForm, PageHeader, RamStart,
};

use super::ack_tracker::AckTracker;
use super::spec::{RamBlockSpec, SourceDisk};
use super::work::{Batch, DiskOperation, Work};
use super::writer::FrameWriter;
use crate::difference;
use crate::digest::{DiskDigests, PageDigests, page_digest};
use crate::meter::{Meter, add};
use crate::page::{PAGE_BYTES, PagePlace, block_number, page_index};
use crate::page_cache::PageCache;
use crate::queue::{Popped, Queue};
use crate::route::{page_slot, slot_count};
use crate::settings::PlaneSettings;
use crate::shutdown::{PlaneError, Shutdown};

/// How often an idle sender looks at its link.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Digests in a frame: 512 KiB.
const DIGESTS_COUNT_MAX: usize = 32 << 10;

pub(super) struct Sender {
    index: usize,
    channel_count: usize,
    writer: FrameWriter,
    digests: PageDigests,
    page_cache: PageCache,
    disks: DiskDigests,
    meter: Arc<Meter>,
    ack_tracker: Arc<AckTracker>,
    /// The stream of which pages come
    stream: u32,
    payload: Vec<u8>,
    /// Bytes in `payload` of differences, and of full pages
    kinds_bytes: (u64, u64),
}

impl Sender {
    pub(super) fn new(
        channel_count: usize,
        writer: FrameWriter,
        ram: &[RamBlockSpec],
        disks: &[SourceDisk],
        settings: PlaneSettings,
        meter: Arc<Meter>,
        ack_tracker: Arc<AckTracker>,
    ) -> Self {
        let slots = ram.iter().map(|block| slot_count(block.size_bytes, channel_count));
        Self {
            index: writer.channel(),
            channel_count,
            writer,
            digests: PageDigests::new(slots),
            page_cache: PageCache::new(settings.page_cache_bytes_max / channel_count as u64),
            disks: DiskDigests::new(disks.iter().map(|disk| disk.size_bytes)),
            meter,
            ack_tracker,
            stream: 0,
            payload: Vec::new(),
            kinds_bytes: (0, 0),
        }
    }

    pub(super) fn run(
        mut self,
        queue: &Queue<Work>,
        shutdown: &Shutdown,
    ) -> Result<(), PlaneError> {
        let result = self.writer.connect().and_then(|()| self.send_all(queue));
        if shutdown.is_shut_down() { Ok(()) } else { result }
    }

    fn send_all(&mut self, queue: &Queue<Work>) -> Result<(), PlaneError> {
        loop {
            match queue.pop(LOOK_EVERY) {
                Popped::Item(work) => self.take(work)?,
                Popped::Empty => self.writer.idle()?,
                Popped::Closed => return Ok(()),
            }
        }
    }

    fn take(&mut self, work: Work) -> Result<(), PlaneError> {
        match work {
            Work::RamStart(stream) => {
                self.stream = stream;
                self.send(FrameKind::RamStart, &RamStart { stream }.encode()).map(drop)
            }
            Work::Pages(batch) => self.pages(&batch),
            Work::Disk(operation) => self.disk(&operation),
            Work::Stream(bytes) => self.send(FrameKind::Stream, &bytes).map(drop),
            Work::Tail(bytes) => self.send(FrameKind::Tail, &bytes).map(drop),
            Work::StreamEnd => {
                self.ack_tracker.expect_end(self.stream, self.writer.next_number());
                self.send_now(FrameKind::StreamEnd)
            }
            Work::Release => self.send_now(FrameKind::Release),
            Work::RamBarrier => {
                let barrier = self.barrier(self.digests.sum());
                self.ack_tracker.expect_ram(self.index, self.stream, barrier);
                self.send_now(FrameKind::RamBarrier)
            }
            Work::Forget(pages) => {
                for PagePlace { block, page } in pages {
                    let (block, page) = (usize::from(block), u64::from(page));
                    self.digests.set(block, page_slot(page, self.channel_count), 0);
                    self.page_cache.forget(key(block, page));
                }
                Ok(())
            }
            Work::DiskBarrier(number) => {
                let barrier = self.barrier(self.disks.digest());
                self.ack_tracker.expect_disks(self.index, number, barrier);
                self.send_now(FrameKind::DiskBarrier)
            }
            Work::Digests => self.send_digests(),
        }
    }

    /// The barrier that the next frame is.
    fn barrier(&self, digest: [u8; 32]) -> Barrier {
        Barrier { at: self.writer.next_number(), digest }
    }

    fn send_now(&mut self, kind: FrameKind) -> Result<(), PlaneError> {
        self.send(kind, &[])?;
        self.writer.flush()
    }

    fn pages(&mut self, batch: &Batch) -> Result<(), PlaneError> {
        self.payload.clear();
        let mut contents = batch.bytes.as_chunks::<PAGE_BYTES>().0.iter();
        for &(block, page, is_zero) in &batch.pages {
            match if is_zero { None } else { contents.next() } {
                Some(content) => self.page(block, page, content),
                None => self.zero_page(block, page),
            }
        }
        if self.payload.is_empty() {
            return Ok(());
        }
        let payload = std::mem::take(&mut self.payload);
        let packed_bytes = self.send(FrameKind::Pages, &payload)?;
        let kinds_bytes = std::mem::take(&mut self.kinds_bytes);
        self.meter.pages_sent(payload.len() as u64, kinds_bytes, packed_bytes);
        self.payload = payload;
        Ok(())
    }

    fn page(&mut self, block: usize, page: u64, content: &[u8; PAGE_BYTES]) {
        let slot = page_slot(page, self.channel_count);
        let place = block_number(block);
        let digest = page_digest(place, page, content);
        if digest == 0 {
            return self.zero_page(block, page);
        }
        let before = self.digests.get(block, slot);
        if digest == before {
            return add(&self.meter.unchanged_pages, 1);
        }
        self.digests.set(block, slot, digest);
        let key = key(block, page);
        let head_at = self.payload.len();
        let head = |form, bytes: usize| PageHeader {
            index: page_index(page),
            block: place,
            form,
            content_bytes: u16::try_from(bytes).expect("a page has 4096 bytes"),
        };
        // The place of the head is kept free, then filled with what it was.
        head(PageForm::Full, PAGE_BYTES).encode_into(&mut self.payload);
        let known = if before == 0 { None } else { self.page_cache.get(key) };
        let difference = known.and_then(|old| difference::encode(old, content, &mut self.payload));
        if let Some(bytes) = difference {
            let mut corrected = Vec::with_capacity(PageHeader::BYTES);
            head(PageForm::Difference, bytes).encode_into(&mut corrected);
            self.payload[head_at..head_at + PageHeader::BYTES].copy_from_slice(&corrected);
            add(&self.meter.difference_pages, 1);
            self.kinds_bytes.0 += (self.payload.len() - head_at) as u64;
        } else {
            self.payload.extend_from_slice(content);
            add(&self.meter.full_pages, 1);
            self.kinds_bytes.1 += (self.payload.len() - head_at) as u64;
        }
        self.page_cache.put(key, content, before != 0);
    }

    fn zero_page(&mut self, block: usize, page: u64) {
        add(&self.meter.zero_pages, 1);
        let slot = page_slot(page, self.channel_count);
        // Zero there already: never sent, or zero when it was sent last.
        if self.digests.get(block, slot) == 0 {
            return;
        }
        self.digests.set(block, slot, 0);
        self.page_cache.forget(key(block, page));
        let head = PageHeader {
            index: page_index(page),
            block: block_number(block),
            form: PageForm::Zero,
            content_bytes: 0,
        };
        head.encode_into(&mut self.payload);
    }

    fn disk(&mut self, operation: &DiskOperation) -> Result<(), PlaneError> {
        self.payload.clear();
        self.payload.extend_from_slice(&operation.head.encode());
        self.payload.extend_from_slice(&operation.bytes);
        let payload = std::mem::take(&mut self.payload);
        self.disks.add(
            operation.head.disk,
            operation.head.offset_bytes,
            operation.kind as u8,
            &payload,
        );
        let packed_bytes = self.send(operation.kind, &payload)?;
        if operation.kind == FrameKind::DiskWrite {
            add(&self.meter.disk_payload_bytes, operation.bytes.len() as u64);
            add(&self.meter.disk_packed_bytes, packed_bytes);
        }
        self.payload = payload;
        Ok(())
    }

    /// Sends all digests of this channel.
    fn send_digests(&mut self) -> Result<(), PlaneError> {
        for (number, table) in (0..).zip(self.digests.tables()) {
            send_table(&mut self.writer, DigestSubject::Ram, number, table)?;
        }
        for (number, table) in (0..).zip(self.disks.tables()) {
            send_table(&mut self.writer, DigestSubject::Disk, number, table)?;
        }
        let last =
            DigestsHeader { subject: DigestSubject::Disk, is_last: true, number: 0, first: 0 };
        self.writer.send(FrameKind::Digests, &last.encode())?;
        self.writer.flush()
    }

    /// Sends a frame; returns the bytes of its payload on the wire.
    fn send(&mut self, kind: FrameKind, payload: &[u8]) -> Result<u64, PlaneError> {
        self.writer.send(kind, payload)
    }
}

/// Sends one table of digests, a piece at a time: those of a large VM are not
/// copied whole.
fn send_table(
    writer: &mut FrameWriter,
    subject: DigestSubject,
    number: u16,
    table: &[u128],
) -> Result<(), PlaneError> {
    for (at, piece) in table.chunks(DIGESTS_COUNT_MAX).enumerate() {
        let first = (at * DIGESTS_COUNT_MAX) as u64;
        let head = DigestsHeader { subject, is_last: false, number, first };
        let mut payload = head.encode().to_vec();
        payload.extend(piece.iter().flat_map(|digest| digest.to_le_bytes()));
        writer.send(FrameKind::Digests, &payload)?;
    }
    Ok(())
}

/// Key of a page in the page cache.
fn key(block: usize, page: u64) -> u64 {
    // 2^40 pages are 4 PiB of RAM.
    (block as u64) << 40 | page
}
