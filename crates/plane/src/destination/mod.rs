//! The destination's half: what the channels bring goes to RAM, disks and QEMU.
//!
//! ```text
//! channel 0 ═► receiver 0 ─┬─► memfd            ┐ page by page, each receiver
//! channel n ═► receiver n ─┴─► disks            ┘ only those of its route
//!              receiver 0 ───► QEMU's stream (the tail once it is released)
//!              flush 0 … m ──► disks: durable, early and at barriers
//!              ack thread ═══► return path: what is applied, digests
//! ```
//!
//! A switchover whose stream QEMU has loaded already may be tried again ([`again`]):
//! the plane goes on with another QEMU, and what the old one held.
//!
//! **Invariant.** A frame is applied once, whatever connections it came on: a
//! receiver says how many it has, and the source goes on there.

mod acks;
mod apply;
mod disks;
mod receiver;
mod retry;
mod shared;
mod tail;

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;

use crate::channel::ChannelIo;
use crate::digest::PageDigests;
use crate::link::Link;
use crate::page::PAGE_BYTES;
use crate::ram::Ram;
use crate::route::slot_count;
use crate::settings::PlaneSettings;
use crate::shutdown::{self, PlaneError, PlaneEvents, Shutdown};
use acks::AckState;
pub use disks::DestinationDisk;
use disks::Disks;
use shared::{Progress, Shared};
use tail::Tail;

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
    pub disks: Vec<DestinationDisk>,
    /// The destination QEMU's stream, if the VM runs
    pub qemu_incoming: Option<UnixStream>,
    /// Settings
    pub settings: PlaneSettings,
    /// Read all RAM again when it is in, before QEMU gets device state: loading
    /// devices may change pages (KVM's virtual APIC does)
    pub read_back: bool,
}

/// The plane of a destination, running.
pub struct DestinationPlane {
    shutdown: Arc<Shutdown>,
    link: Arc<Link>,
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl DestinationPlane {
    /// Starts the threads that receive; gives what they report, too.
    ///
    /// # Errors
    /// Memory that cannot be mapped, threads that cannot be made.
    pub fn start(spec: DestinationSpec) -> Result<(Self, PlaneEvents), PlaneError> {
        let (shutdown, events) = Shutdown::new();
        let ram = map(spec.ram)?;
        if let Some(stream) = &spec.qemu_incoming {
            close_with(&shutdown, stream)?;
        }
        let channel_count = spec.channels.len();
        let digests = || {
            let bytes = |ram: &Ram| ram.page_count() * PAGE_BYTES as u64;
            let slots = ram.iter().map(|ram| slot_count(bytes(ram), channel_count));
            Mutex::new(PageDigests::new(slots))
        };
        let shared = Arc::new(Shared {
            channel_count,
            digests: (0..channel_count).map(|_| digests()).collect(),
            ram: RwLock::new(ram),
            disks: Disks::new(spec.disks, channel_count),
            ack_state: AckState::new(channel_count),
            tail: Mutex::new(Tail::new(spec.qemu_incoming)),
            progress: Mutex::new(Progress {
                ram_passed: vec![0; channel_count],
                ram_is_in: 0,
                ram_digests: None,
                disk_passed: vec![0; channel_count],
            }),
            changed: Condvar::new(),
            read_back: spec.read_back,
            shutdown: Arc::clone(&shutdown),
        });
        let woken = Arc::downgrade(&shared);
        shutdown.on_shutdown(Box::new(move || {
            if let Some(shared) = woken.upgrade() {
                shared.ack_state.wake();
                shared.disks.wake();
            }
        }));
        let link = Link::new(&shutdown, spec.channels, spec.return_path);
        let failed = |error| PlaneError::local("starting a thread", error);
        let mut threads = Vec::new();
        for index in 0..channel_count {
            let receiver = receiver::Receiver::new(index, Arc::clone(&link), Arc::clone(&shared))?;
            let thread =
                shutdown::spawn(format!("receive-{index}"), &shutdown, move || receiver.run());
            threads.push(thread.map_err(failed)?);
        }
        for disk in 0..shared.disks.count() {
            let own = Arc::clone(&shared);
            let flush = move || {
                own.disks.flush_when_due(disk, &own.shutdown, |passed| own.pass_disks(passed))
            };
            threads
                .push(shutdown::spawn(format!("flush-{disk}"), &shutdown, flush).map_err(failed)?);
        }
        let (own, told) = (Arc::clone(&link), Arc::clone(&shared));
        let keep_alive_every = spec.settings.keep_alive_every;
        let thread = shutdown::spawn("acks".to_owned(), &shutdown, move || {
            told.ack_state.run(&own, channel_count, keep_alive_every, &told.shutdown)
        });
        threads.push(thread.map_err(failed)?);
        Ok((Self { shutdown, link, shared, threads: Mutex::new(threads) }, events))
    }

    /// Goes on over new connections, as many as before; the source is told what
    /// is here already. The event `LinkBack` follows, or `LinkLost` if they
    /// break before.
    ///
    /// # Errors
    /// When the number of channels is another one.
    pub fn reconnect(
        &self,
        channels: Vec<ChannelIo>,
        return_path: ChannelIo,
    ) -> Result<(), PlaneError> {
        self.link.replace(channels, return_path)
    }

    /// Digests of all RAM as it was read back, see [`crate::ram_digests`]; `None`
    /// before that, or if it was not wanted.
    #[must_use]
    pub fn ram_digests(&self) -> Option<Vec<u128>> {
        self.shared.lock_progress().ram_digests.clone()
    }

    /// Ends everything at once.
    pub fn abort(&self) {
        self.shutdown.fail(PlaneError::Aborted);
    }

    /// Ends everything, and waits for all threads; then nothing of the disks is
    /// open here any more.
    ///
    /// # Errors
    /// What ended the plane before.
    pub fn join(&self) -> Result<(), PlaneError> {
        self.abort();
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        let ended = shutdown::join(threads, &self.shutdown);
        self.shared.disks.close();
        drop(std::mem::take(&mut *self.shared.write_ram()));
        ended
    }
}

/// Maps all blocks of RAM.
fn map(targets: Vec<RamTarget>) -> Result<Vec<Ram>, PlaneError> {
    let map = |target: RamTarget| {
        let mapped = Ram::map(target.memfd, target.size_bytes);
        mapped
            .map_err(|error| PlaneError::local(format!("mapping guest RAM {}", target.name), error))
    };
    targets.into_iter().map(map).collect()
}

/// Has QEMU's socket closed when the plane ends.
fn close_with(shutdown: &Shutdown, qemu: &UnixStream) -> Result<(), PlaneError> {
    let closer =
        qemu.try_clone().map_err(|error| PlaneError::local("QEMU's incoming socket", error))?;
    shutdown.on_shutdown(Box::new(move || {
        // QEMU may have closed it before.
        closer.shutdown(std::net::Shutdown::Both).ok();
    }));
    Ok(())
}
