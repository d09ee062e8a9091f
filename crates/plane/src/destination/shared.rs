//! What the receivers of a destination share: RAM, digests, disks, and how far
//! the streams of QEMU and the barriers are.

use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
};
use std::time::Duration;

use super::acks::AckState;
use super::disks::{Disks, PassedBarrier};
use super::tail::{Tail, TailError};
use crate::digest::PageDigests;
use crate::ram::Ram;
use crate::shutdown::{PlaneError, PlaneEvent, Shutdown};

/// How often a wait for the other channels looks whether the plane has ended.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What all receivers share.
pub(super) struct Shared {
    pub(super) channel_count: usize,
    pub(super) ram: RwLock<Vec<Ram>>,
    /// By channel: of the pages that it carries
    pub(super) digests: Vec<Mutex<PageDigests>>,
    pub(super) disks: Disks,
    pub(super) ack_state: AckState,
    pub(super) tail: Mutex<Tail>,
    pub(super) progress: Mutex<Progress>,
    pub(super) changed: Condvar,
    pub(super) read_back: bool,
    pub(super) shutdown: Arc<Shutdown>,
}

/// Which barriers the channels passed.
pub(super) struct Progress {
    /// By channel: the stream whose RAM barrier was passed last
    pub(super) ram_passed: Vec<u32>,
    /// The stream of which all RAM is in, and was read back if that is wanted
    pub(super) ram_is_in: u32,
    /// Digests of what was read back, by part
    pub(super) ram_digests: Option<Vec<u128>>,
    /// By channel: how many disk barriers were passed
    pub(super) disk_passed: Vec<u32>,
}

impl Shared {
    pub(super) fn read_ram(&self) -> RwLockReadGuard<'_, Vec<Ram>> {
        self.ram.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write_ram(&self) -> RwLockWriteGuard<'_, Vec<Ram>> {
        self.ram.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lock_digests(&self, channel: usize) -> MutexGuard<'_, PageDigests> {
        self.digests[channel].lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lock_progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lock_tail(&self) -> MutexGuard<'_, Tail> {
        self.tail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a channel passed the RAM barrier of a stream.
    pub(super) fn pass_ram(&self, channel: usize, stream: u32) -> Result<(), PlaneError> {
        let is_last = {
            let mut progress = self.lock_progress();
            progress.ram_passed[channel] = stream;
            progress.ram_passed.iter().all(|passed| *passed == stream)
        };
        if is_last {
            let digests = if self.read_back { Some(self.read_ram_back()?) } else { None };
            let mut progress = self.lock_progress();
            progress.ram_digests = digests;
            progress.ram_is_in = stream;
            drop(progress);
            self.changed.notify_all();
            self.give_tail()?;
        }
        Ok(())
    }

    fn read_ram_back(&self) -> Result<Vec<u128>, PlaneError> {
        let ram = self.read_ram();
        let digests = ram.iter().map(Ram::digests);
        let digests = digests.collect::<std::io::Result<Vec<_>>>().map(|all| all.concat());
        digests.map_err(|error| PlaneError::local("reading RAM again", error))
    }

    /// Gives QEMU the tail if it is released and all RAM is in.
    pub(super) fn give_tail(&self) -> Result<(), PlaneError> {
        {
            // A stream is released once all channels passed its barrier, so none
            // of them is at another one.
            let progress = self.lock_progress();
            if progress.ram_passed.iter().any(|passed| *passed != progress.ram_is_in) {
                return Ok(());
            }
        }
        match self.lock_tail().give() {
            Ok(true) => self.shutdown.emit(PlaneEvent::RamDelivered),
            Ok(false) => {}
            Err(TailError::Order(what)) => return Err(PlaneError::protocol(0, what)),
            Err(TailError::Qemu(error)) => {
                return Err(PlaneError::local("giving QEMU its stream (see qemu.log)", error));
            }
        }
        Ok(())
    }

    /// Notes that all disks passed a barrier, and those that it overtook.
    pub(super) fn pass_disks(&self, PassedBarrier { channel, barrier, count }: PassedBarrier) {
        self.ack_state.passed_disks(channel, barrier);
        let mut progress = self.lock_progress();
        progress.disk_passed[channel] += count;
        let passed = progress.disk_passed[channel];
        if progress.disk_passed.iter().all(|other| *other == passed) {
            drop(progress);
            self.shutdown.emit(PlaneEvent::DisksEqual(passed));
        }
    }

    /// Waits until every channel passed the RAM barrier of a stream; `false` when
    /// the plane ended first.
    pub(super) fn wait_for_ram(&self, stream: u32) -> bool {
        let mut progress = self.lock_progress();
        while progress.ram_is_in != stream {
            if self.shutdown.is_shut_down() {
                return false;
            }
            let waited = self.changed.wait_timeout(progress, LOOK_EVERY);
            progress = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}
