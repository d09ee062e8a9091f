//! Counters that threads of the plane add to and others read.

use std::sync::atomic::{AtomicU64, Ordering};

use limosa_protocol::migration::Moved;

/// What moved, by kind.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    pub(crate) zero_pages: AtomicU64,
    pub(crate) unchanged_pages: AtomicU64,
    pub(crate) difference_pages: AtomicU64,
    pub(crate) full_pages: AtomicU64,
    pub(crate) ram_payload_bytes: AtomicU64,
    pub(crate) ram_packed_bytes: AtomicU64,
    pub(crate) difference_payload_bytes: AtomicU64,
    pub(crate) difference_packed_bytes: AtomicU64,
    pub(crate) full_payload_bytes: AtomicU64,
    pub(crate) full_packed_bytes: AtomicU64,
    pub(crate) stream_bytes: AtomicU64,
    pub(crate) disk_payload_bytes: AtomicU64,
    pub(crate) disk_packed_bytes: AtomicU64,
    pub(crate) disk_zero_bytes: AtomicU64,
    pub(crate) wire_bytes: AtomicU64,
    pub(crate) resent_bytes: AtomicU64,
}

/// Adds to a counter. Counters are only looked at, so no order is needed.
pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

impl Meter {
    /// Counts a frame of pages: its payload, that of its differences and that of
    /// its full pages, and what all of it became on the wire. Packing mixes the
    /// kinds; each is given its share of it.
    pub(crate) fn pages_sent(&self, payload: u64, (differences, full): (u64, u64), packed: u64) {
        let share = |bytes: u64| packed * bytes / payload.max(1);
        add(&self.ram_payload_bytes, payload);
        add(&self.ram_packed_bytes, packed);
        add(&self.difference_payload_bytes, differences);
        add(&self.difference_packed_bytes, share(differences));
        add(&self.full_payload_bytes, full);
        add(&self.full_packed_bytes, share(full));
    }

    /// The counters at this moment.
    pub(crate) fn moved(&self) -> Moved {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Moved {
            zero_pages: read(&self.zero_pages),
            unchanged_pages: read(&self.unchanged_pages),
            difference_pages: read(&self.difference_pages),
            full_pages: read(&self.full_pages),
            ram_payload_bytes: read(&self.ram_payload_bytes),
            ram_packed_bytes: read(&self.ram_packed_bytes),
            difference_payload_bytes: read(&self.difference_payload_bytes),
            difference_packed_bytes: read(&self.difference_packed_bytes),
            full_payload_bytes: read(&self.full_payload_bytes),
            full_packed_bytes: read(&self.full_packed_bytes),
            stream_bytes: read(&self.stream_bytes),
            disk_payload_bytes: read(&self.disk_payload_bytes),
            disk_packed_bytes: read(&self.disk_packed_bytes),
            disk_zero_bytes: read(&self.disk_zero_bytes),
            wire_bytes: read(&self.wire_bytes),
            resent_bytes: read(&self.resent_bytes),
        }
    }
}
