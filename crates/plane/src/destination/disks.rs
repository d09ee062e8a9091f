//! The disks, and what makes them durable: most of it while they are mirrored,
//! the rest at a barrier.
//!
//! ```text
//! receivers ─► target ─► unflushed ─► early flush, on a way of its own, now and then
//!     └─ barrier of all channels ─► target's flush, all disks at once ─► ack_state: passed
//! ```
//!
//! Each disk has a thread that flushes it, once, when the last channel has brought
//! the barrier. A receiver that brings one goes on at once, and none has another
//! operation by then: the last pages do not queue behind a disk.
//!
//! Targets may be detached, all durable, and others of the same disks be attached:
//! QEMU, which has the images open, is another one then.
//!
//! **Invariants.** A barrier is told only when each disk was flushed after it came,
//! on the way on which its operations went, or had none since such a flush. An
//! early flush promises nothing; but one that fails ends the plane, for a host may
//! tell only once of what it could not write.

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use limosa_protocol::frame::Barrier;

use crate::disk::DiskTarget;
use crate::shutdown::{PlaneError, Shutdown};

/// Unflushed bytes of a disk at which it is flushed early, so that the last
/// flush, which is blackout, is short.
const EARLY_BYTES: u64 = 64 << 20;
/// Longest time for which a disk stays unflushed, for the same reason.
const EARLY_AFTER: Duration = Duration::from_secs(1);
/// Unflushed bytes of a disk at which its writers wait for a flush: a disk that
/// is slower than the network is not to fill the host's memory.
const UNFLUSHED_BYTES_MAX: u64 = 256 << 20;

type Way = Box<dyn DiskTarget + Send>;

/// A disk to be filled.
pub struct DestinationDisk {
    /// Where its operations go
    pub target: Box<dyn DiskTarget + Send>,
    /// Another way to the same disk, on which it is flushed while operations go
    /// on; without one that is left to the barriers
    pub early: Option<Box<dyn DiskTarget + Send>>,
}

/// All disks of a plane, by number.
pub(super) struct Disks {
    targets: Vec<Mutex<Target>>,
    /// By disk: the way on which it is flushed early
    early: Vec<Mutex<Option<Way>>>,
    due: Mutex<Due>,
    changed: Condvar,
}

pub(super) struct Target {
    /// `None` while it is detached
    target: Option<Way>,
    size_bytes: u64,
    /// Not known to be durable as it stands; at first, neither is an empty image
    is_dirty: bool,
}

/// What is to be flushed.
struct Due {
    /// By channel: barriers that it brought
    brought: Vec<u64>,
    /// By channel: the last barrier that is not told yet
    waiting: Vec<Option<Waiting>>,
    disks: Vec<Unflushed>,
}

#[derive(Clone, Copy)]
struct Waiting {
    /// Which one of its channel, from 1
    number: u64,
    barrier: Barrier,
    /// Barriers of the channel that are told with it: it and those it overtook
    count: u32,
}

/// A barrier of a channel that all disks have passed.
pub(super) struct PassedBarrier {
    pub(super) channel: usize,
    pub(super) barrier: Barrier,
    /// Barriers of the channel: this one and those that it overtook
    pub(super) count: u32,
}

#[derive(Default)]
struct Unflushed {
    /// Barriers that the disk has passed
    passed: u64,
    /// Bytes written since the last flush began
    bytes: u64,
    since: Option<Instant>,
}

/// What a disk's thread does next.
enum Work {
    Early,
    Barrier(u64),
}

impl Unflushed {
    fn is_due(&self) -> bool {
        self.bytes >= EARLY_BYTES || self.since.is_some_and(|since| since.elapsed() >= EARLY_AFTER)
    }

    fn begin_flush(&mut self) {
        self.bytes = 0;
        self.since = None;
    }
}

impl Disks {
    pub(super) fn new(disks: Vec<DestinationDisk>, channel_count: usize) -> Self {
        let (targets, early): (Vec<_>, Vec<_>) =
            disks.into_iter().map(|disk| (disk.target, disk.early)).unzip();
        Self {
            due: Mutex::new(Due {
                brought: vec![0; channel_count],
                waiting: vec![None; channel_count],
                disks: targets.iter().map(|_| Unflushed::default()).collect(),
            }),
            targets: targets
                .into_iter()
                .map(|target| {
                    let size_bytes = target.size_bytes();
                    Mutex::new(Target { target: Some(target), size_bytes, is_dirty: true })
                })
                .collect(),
            early: early.into_iter().map(Mutex::new).collect(),
            changed: Condvar::new(),
        }
    }

    /// Bytes of each disk.
    pub(super) fn sizes_bytes(&self) -> impl Iterator<Item = u64> {
        self.targets.iter().map(|target| lock(target).size_bytes)
    }

    pub(super) fn count(&self) -> usize {
        self.targets.len()
    }

    /// Makes all disks durable and detaches them: operations fail until others are attached.
    pub(super) fn detach(&self) -> io::Result<()> {
        for (target, early) in self.targets.iter().zip(&self.early) {
            // Under one lock: what is written after the flush would be lost, and counted.
            let mut target = lock(target);
            target.flush()?;
            target.target = None;
            drop(target);
            *lock(early) = None;
        }
        Ok(())
    }

    /// Lets go of all disks as they are.
    pub(super) fn close(&self) {
        for (target, early) in self.targets.iter().zip(&self.early) {
            lock(target).target = None;
            *lock(early) = None;
        }
    }

    /// Attaches other ways to the same disks.
    pub(super) fn attach(&self, disks: Vec<DestinationDisk>) -> io::Result<()> {
        if disks.len() != self.targets.len() {
            return Err(io::Error::other("another number of disks than before"));
        }
        for (disk, (target, early)) in disks.into_iter().zip(self.targets.iter().zip(&self.early)) {
            let mut target = lock(target);
            if disk.target.size_bytes() != target.size_bytes {
                return Err(io::Error::other("a disk of another size than before"));
            }
            target.target = Some(disk.target);
            *lock(early) = disk.early;
        }
        Ok(())
    }

    /// A disk, for one operation.
    pub(super) fn get(&self, disk: u16) -> Option<MutexGuard<'_, Target>> {
        self.targets.get(usize::from(disk)).map(lock)
    }

    /// Does an operation on a disk that writes so many bytes.
    pub(super) fn operate(
        &self,
        disk: u16,
        target: &mut Target,
        bytes: u64,
        work: impl FnOnce(&mut dyn DiskTarget) -> io::Result<()>,
    ) -> io::Result<()> {
        // Nobody counts it as done: it comes again over the next connection.
        let way = target.target.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        target.is_dirty = true;
        work(&mut **way)?;
        let mut due = lock(&self.due);
        let unflushed = &mut due.disks[usize::from(disk)];
        // Its thread waits for the first operation, then for time or bytes.
        let is_first = unflushed.since.is_none();
        let was_below = unflushed.bytes < EARLY_BYTES;
        unflushed.bytes += bytes;
        unflushed.since.get_or_insert_with(Instant::now);
        let wakes = is_first || (was_below && unflushed.bytes >= EARLY_BYTES);
        let is_too_much = unflushed.bytes >= UNFLUSHED_BYTES_MAX;
        if is_too_much {
            unflushed.begin_flush();
        }
        drop(due);
        if is_too_much {
            return target.flush();
        }
        if wakes {
            self.changed.notify_all();
        }
        Ok(())
    }

    /// Wakes the threads: the plane has ended.
    pub(super) fn wake(&self) {
        drop(lock(&self.due));
        self.changed.notify_all();
    }

    /// A channel brought a barrier; it is told once all disks are durable.
    ///
    /// - `report`: called under the lock, see [`Due::report`].
    pub(super) fn barrier(&self, channel: usize, barrier: Barrier, report: impl Fn(PassedBarrier)) {
        let mut due = lock(&self.due);
        due.brought[channel] += 1;
        let number = due.brought[channel];
        let overtaken = due.waiting[channel].map_or(0, |waiting| waiting.count);
        due.waiting[channel] = Some(Waiting { number, barrier, count: overtaken + 1 });
        due.report(&report);
        drop(due);
        self.changed.notify_all();
    }

    /// Flushes a disk whenever that is due, until the plane ends.
    pub(super) fn flush_when_due(
        &self,
        disk: usize,
        shutdown: &Shutdown,
        report: impl Fn(PassedBarrier),
    ) -> Result<(), PlaneError> {
        let failed = |error| PlaneError::local(format!("flushing disk {disk} here"), error);
        let may_be_early = lock(&self.early[disk]).is_some();
        while let Some(work) = self.next(shutdown, disk, may_be_early) {
            match work {
                Work::Early => {
                    if let Some(early) = &mut *lock(&self.early[disk]) {
                        early.flush().map_err(failed)?;
                    }
                }
                Work::Barrier(count) => {
                    lock(&self.targets[disk]).flush().map_err(failed)?;
                    let mut due = lock(&self.due);
                    due.disks[disk].passed = count;
                    due.report(&report);
                }
            }
        }
        Ok(())
    }

    /// Waits for work; `None` when the plane has ended.
    fn next(&self, shutdown: &Shutdown, disk: usize, may_be_early: bool) -> Option<Work> {
        let mut due = lock(&self.due);
        loop {
            if shutdown.is_shut_down() {
                return None;
            }
            let count = due.whole_count();
            let unflushed = &mut due.disks[disk];
            if unflushed.passed < count {
                unflushed.begin_flush();
                return Some(Work::Barrier(count));
            }
            if may_be_early && unflushed.is_due() {
                unflushed.begin_flush();
                return Some(Work::Early);
            }
            let patience = unflushed.since.filter(|_| may_be_early);
            due = match patience.map(|since| EARLY_AFTER.saturating_sub(since.elapsed())) {
                Some(patience) => {
                    let waited = self.changed.wait_timeout(due, patience);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(due).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

impl Due {
    /// Barriers that all channels have brought.
    fn whole_count(&self) -> u64 {
        self.brought.iter().min().copied().unwrap_or(0)
    }

    /// Reports the barriers that all disks have passed. The caller holds the lock: of
    /// two barriers of a channel, the later one is reported last.
    fn report(&mut self, report: &impl Fn(PassedBarrier)) {
        let passed = self.disks.iter().map(|disk| disk.passed).min();
        let passed = passed.unwrap_or(self.whole_count());
        for (channel, waiting) in self.waiting.iter_mut().enumerate() {
            if let Some(Waiting { barrier, count, .. }) =
                waiting.take_if(|one| one.number <= passed)
            {
                report(PassedBarrier { channel, barrier, count });
            }
        }
    }
}

impl Target {
    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Returns when it is durable as it stands.
    fn flush(&mut self) -> io::Result<()> {
        if self.is_dirty {
            self.target.as_mut().ok_or(io::ErrorKind::NotConnected)?.flush()?;
            self.is_dirty = false;
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
