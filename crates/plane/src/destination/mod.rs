//! The destination's half: what the channels bring goes to RAM, disks and QEMU.
//!
//! ```text
//! channel 0 ═► receiver 0 ─┬─► memfd            ┐ page by page, each receiver
//! channel n ═► receiver n ─┴─► disks            ┘ only those of its route
//!              receiver 0 ───► QEMU's stream (the tail after all RAM is in)
//! acks with digests ═► return path
//! ```

mod receiver;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use limosa_protocol::frame::{Ack, FrameKind};

use crate::channel::{ChannelIo, FrameReader, FrameWriter};
use crate::disk::DiskTarget;
use crate::halt::{self, Halt, PlaneError, PlaneEvent};
use crate::ram::Ram;
use crate::settings::PlaneSettings;

/// How often a wait for the other channels looks whether the plane has ended.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A block of guest RAM to be filled.
pub struct RamTarget {
    /// QEMU's name of it
    pub name: String,
    /// Bytes
    pub size_bytes: u64,
    /// Its memory, all zero
    pub memfd: File,
}

/// What a destination's plane is made of.
pub struct DestinationSpec {
    /// Data channels, by number
    pub channels: Vec<ChannelIo>,
    /// Acknowledgements
    pub return_path: ChannelIo,
    /// RAM, if the VM runs
    pub ram: Vec<RamTarget>,
    /// Disks, by number
    pub disks: Vec<Box<dyn DiskTarget + Send>>,
    /// The destination QEMU's stream, if the VM runs
    pub qemu_incoming: Option<UnixStream>,
    /// Settings
    pub settings: PlaneSettings,
    /// Read all RAM again when it is in, before QEMU gets device state: loading
    /// devices may change pages (KVM's virtual APIC does)
    pub read_back: bool,
    /// Told of what happens; must not wait
    pub on_event: Arc<dyn Fn(PlaneEvent) + Send + Sync>,
}

/// The plane of a destination, running.
pub struct DestinationPlane {
    halt: Arc<Halt>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What all receivers share.
struct Shared {
    channel_count: usize,
    ram: Vec<Ram>,
    disks: Vec<Mutex<Box<dyn DiskTarget + Send>>>,
    acks: Mutex<FrameWriter>,
    progress: Mutex<Progress>,
    changed: Condvar,
    read_back: bool,
    halt: Arc<Halt>,
}

/// How many channels passed which barrier.
#[derive(Default)]
struct Progress {
    ram_passed: usize,
    /// All RAM is in, and was read back if that is wanted.
    ram_is_in: bool,
    /// Digest of what was read back.
    ram_digest: Option<u128>,
    disk_passed: usize,
    stream_ended: bool,
}

impl DestinationPlane {
    /// Starts the threads that receive.
    ///
    /// # Errors
    /// Memory that cannot be mapped, threads that cannot be made.
    pub fn start(spec: DestinationSpec) -> Result<Self, PlaneError> {
        let halt = Halt::new(spec.on_event);
        let mut ram = Vec::new();
        for target in spec.ram {
            let mapped = Ram::map(target.memfd, target.size_bytes);
            ram.push(mapped.map_err(|error| {
                PlaneError::local(format!("mapping guest RAM {}", target.name), error)
            })?);
        }
        halt.on_halt(spec.return_path.shutdown);
        let acks = FrameWriter::new(spec.return_path.io, "return path".to_owned(), false)?;
        if let Some(stream) = &spec.qemu_incoming {
            let closer = stream
                .try_clone()
                .map_err(|error| PlaneError::local("QEMU's incoming socket", error))?;
            halt.on_halt(Box::new(move || {
                // QEMU may have closed it before.
                closer.shutdown(std::net::Shutdown::Both).ok();
            }));
        }
        let shared = Arc::new(Shared {
            channel_count: spec.channels.len(),
            ram,
            disks: spec.disks.into_iter().map(Mutex::new).collect(),
            acks: Mutex::new(acks),
            progress: Mutex::default(),
            changed: Condvar::new(),
            read_back: spec.read_back,
            halt: Arc::clone(&halt),
        });
        let mut qemu = spec.qemu_incoming;
        let mut threads = Vec::new();
        for (index, channel) in spec.channels.into_iter().enumerate() {
            halt.on_halt(channel.shutdown);
            let frames = FrameReader::new(channel.io, index.to_string())?;
            let receiver = receiver::Receiver::new(index, frames, Arc::clone(&shared), qemu.take());
            threads.push(
                halt::spawn(format!("receive-{index}"), &halt, move || receiver.run())
                    .map_err(|error| PlaneError::local("starting a thread", error))?,
            );
        }
        Ok(Self { halt, shared, threads })
    }

    /// Digest of all RAM as it was read back; `None` before that, or if it was
    /// not wanted.
    #[must_use]
    pub fn ram_digest(&self) -> Option<u128> {
        self.shared.lock_progress().ram_digest
    }

    /// Ends everything at once.
    pub fn abort(&self) {
        self.halt.fail(PlaneError::Aborted);
    }

    /// Waits for all threads; then nothing of the disks is open here any more.
    ///
    /// # Errors
    /// What ended the plane, unless the agent did.
    pub fn join(self) -> Result<(), PlaneError> {
        let ended = halt::join(self.threads, &self.halt);
        // With the threads gone, nobody else has it.
        if let Some(Shared { ram, disks, .. }) = Arc::into_inner(self.shared) {
            drop(disks);
            // Letting go of a large RAM takes long, and the guest stands still:
            // nobody waits for it. Without a thread for it, it goes here.
            let later = std::thread::Builder::new().name("unmap-ram".to_owned());
            later.spawn(move || drop(ram)).ok();
        }
        ended
    }
}

impl Shared {
    fn lock_progress(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ack(&self, kind: FrameKind, channel: usize, digest: [u8; 32]) -> Result<(), PlaneError> {
        let channel = u8::try_from(channel).unwrap_or(u8::MAX);
        let mut acks = self.acks.lock().unwrap_or_else(PoisonError::into_inner);
        acks.send(kind, &Ack { channel, digest }.encode())?;
        acks.flush()
    }

    /// Notes that a channel passed the RAM barrier.
    fn pass_ram(&self) -> Result<(), PlaneError> {
        let is_last = {
            let mut progress = self.lock_progress();
            progress.ram_passed += 1;
            progress.ram_passed == self.channel_count
        };
        if is_last {
            let digest = if self.read_back { Some(self.read_ram_back()?) } else { None };
            let mut progress = self.lock_progress();
            progress.ram_digest = digest;
            progress.ram_is_in = true;
            drop(progress);
            self.changed.notify_all();
            self.tell_ram();
        }
        Ok(())
    }

    fn read_ram_back(&self) -> Result<u128, PlaneError> {
        let digests = self.ram.iter().map(Ram::full_digest);
        let sum = digests.sum::<std::io::Result<u128>>();
        sum.map_err(|error| PlaneError::local("reading RAM again", error))
    }

    /// Notes that QEMU has all of its stream.
    fn end_stream(&self) {
        self.lock_progress().stream_ended = true;
        self.tell_ram();
    }

    fn tell_ram(&self) {
        let mut progress = self.lock_progress();
        if progress.stream_ended && progress.ram_is_in {
            // Told once.
            progress.stream_ended = false;
            drop(progress);
            self.halt.tell(PlaneEvent::RamDelivered);
        }
    }

    /// Notes that a channel passed the disk barrier.
    fn pass_disk(&self) {
        let mut progress = self.lock_progress();
        progress.disk_passed += 1;
        if progress.disk_passed == self.channel_count {
            drop(progress);
            self.halt.tell(PlaneEvent::DisksEqual);
        }
    }

    /// Waits until every channel passed the RAM barrier; `false` when the plane
    /// ended first.
    fn wait_for_ram(&self) -> bool {
        let mut progress = self.lock_progress();
        while !progress.ram_is_in {
            if self.halt.is_halted() {
                return false;
            }
            let waited = self.changed.wait_timeout(progress, LOOK_EVERY);
            progress = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}
