//! The source's half: what QEMU says goes out on the channels.
//!
//! ```text
//! migration socket ─► reader ─┐            ┌─► sender 0 ═► channel 0
//! nbd exports ─► disk sinks ──┴─ by route ─┴─► sender n ═► channel n
//!                                                 ▲ what may be forgotten
//! event RamDelivered, DisksEqual ◄─ return path thread ◄═ acks with digests
//! ```
//!
//! **Invariant.** A frame that a sender made reaches the destination once, in
//! order, over any number of links, or the plane ends.

mod ack_tracker;
mod disk;
mod reader;
mod sender;
mod spec;
mod work;
mod writer;

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use limosa_protocol::frame::{Ack, FrameKind};
use limosa_protocol::migration::Moved;

use crate::channel::{ChannelIo, FrameReader};
use crate::link::{Connection, Link};
use crate::meter::Meter;
use crate::page::{PAGE_BYTES, PagePlace};
use crate::queue::Queue;
use crate::replay::Replay;
use crate::route::page_channel;
use crate::settings::PlaneSettings;
use crate::shutdown::{self, PlaneError, PlaneEvent, PlaneEvents, Shutdown};
use ack_tracker::{AckTracker, Acked};
use limosa_nbd::server::DiskSink;
pub use spec::{RamBlockSpec, SourceDisk};
use work::{Queues, WORK_BYTES_MAX, Work, ended};
use writer::FrameWriter;

/// What a source's plane is made of.
pub struct SourceSpec {
    /// Data channels, by number
    pub channels: Vec<ChannelIo>,
    /// Acknowledgements
    pub return_path: ChannelIo,
    /// RAM, if the VM runs
    pub ram: Vec<RamBlockSpec>,
    /// Disks
    pub disks: Vec<SourceDisk>,
    /// Settings
    pub settings: PlaneSettings,
}

/// The plane of a source, running.
pub struct SourcePlane {
    shutdown: Arc<Shutdown>,
    link: Arc<Link>,
    meter: Arc<Meter>,
    queues: Queues,
    ack_tracker: Arc<AckTracker>,
    head: Arc<reader::Head>,
    ram: Vec<RamBlockSpec>,
    disks: Vec<SourceDisk>,
    is_urgent: Arc<AtomicBool>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    reader: Mutex<Option<JoinHandle<()>>>,
}

impl SourcePlane {
    /// Starts the threads that send; gives what they report, too.
    ///
    /// # Errors
    /// When threads or compressors cannot be made.
    pub fn start(spec: SourceSpec) -> Result<(Self, PlaneEvents), PlaneError> {
        let (shutdown, events) = Shutdown::new();
        let meter = Arc::new(Meter::default());
        let (count, settings) = (spec.channels.len(), spec.settings);
        // Half of a channel's window waits in its queue; the rest is the piece
        // that is being packed and the socket's buffer.
        let depth = (settings.window_bytes / count / WORK_BYTES_MAX / 2).max(1);
        let queues: Queues = (0..count).map(|_| Queue::new(depth)).collect();
        let closed = Arc::clone(&queues);
        shutdown.on_shutdown(Box::new(move || closed.iter().for_each(Queue::close)));
        let link = Link::new(&shutdown, spec.channels, spec.return_path);
        let ack_tracker = Arc::new(AckTracker::new(count));
        let replays: Arc<[Arc<Replay>]> =
            (0..count).map(|_| Arc::new(Replay::new(settings.replay_bytes_max / count))).collect();
        let mut threads = Vec::new();
        let mut spawn = |name: String, work: Box<dyn FnOnce() -> Result<(), PlaneError> + Send>| {
            let thread = shutdown::spawn(name, &shutdown, work);
            thread
                .map(|thread| threads.push(thread))
                .map_err(|error| PlaneError::local("starting a thread", error))
        };
        for (index, replay) in replays.iter().enumerate() {
            let (link, replay, own) = (Arc::clone(&link), Arc::clone(replay), Arc::clone(&meter));
            let writer = FrameWriter::new(index, link, replay, own, &settings)?;
            let sender = sender::Sender::new(
                count,
                writer,
                &spec.ram,
                &spec.disks,
                settings,
                Arc::clone(&meter),
                Arc::clone(&ack_tracker),
            );
            let (watch, queues) = (Arc::clone(&shutdown), Arc::clone(&queues));
            spawn(format!("send-{index}"), Box::new(move || sender.run(&queues[index], &watch)))?;
        }
        let acks = Acks {
            frames: FrameReader::new("return path".to_owned())?,
            replays,
            ack_tracker: Arc::clone(&ack_tracker),
            queues: Arc::clone(&queues),
            shutdown: Arc::clone(&shutdown),
            differs: false,
        };
        let own = Arc::clone(&link);
        spawn("acks".to_owned(), Box::new(move || acks.run(&own)))?;
        let plane = Self {
            shutdown,
            link,
            meter,
            queues,
            ack_tracker,
            head: Arc::default(),
            ram: spec.ram,
            disks: spec.disks,
            is_urgent: Arc::default(),
            threads: Mutex::new(threads),
            reader: Mutex::default(),
        };
        Ok((plane, events))
    }

    /// Goes on over new connections, as many as before, from what the
    /// destination has; the event `LinkBack` follows, or `LinkLost` if they
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

    /// Takes QEMU's migration stream from the first client of a socket. After
    /// [`Self::give_up_switchover`] another one may follow, of the same QEMU.
    ///
    /// # Errors
    /// The kernel's; a stream that is under way and was not given up.
    pub fn attach_migration_socket(&self, listener: UnixListener) -> io::Result<()> {
        let stream = self
            .ack_tracker
            .begin_stream()
            .ok_or_else(|| io::Error::other("another stream of QEMU is under way"))?;
        let reader = reader::Reader {
            stream,
            ram: self.ram.clone(),
            queues: Arc::clone(&self.queues),
            ack_tracker: Arc::clone(&self.ack_tracker),
            head: Arc::clone(&self.head),
            shutdown: Arc::clone(&self.shutdown),
            meter: Arc::clone(&self.meter),
        };
        let mut own = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        let before = own.take();
        let work = move || reader.run(&listener, before);
        *own = Some(shutdown::spawn("read-ram".to_owned(), &self.shutdown, work)?);
        Ok(())
    }

    /// Gives the stream of now and a disk barrier up: what is still to come of
    /// the stream is read and dropped, so that QEMU never waits, and no event
    /// tells of it any more. Returns `false`, and changes nothing, when the
    /// destination's QEMU may have the whole stream already.
    #[must_use]
    pub fn give_up_switchover(&self) -> bool {
        let given_up = self.ack_tracker.give_up();
        self.queues.iter().for_each(Queue::wake);
        given_up
    }

    /// Undoes a switchover that the destination's QEMU may have loaded, once the
    /// destination has begun again ([`crate::DestinationPlane::begin_retry`]): another
    /// stream may follow, and only pages that are not there are sent.
    ///
    /// - `changed`: pages that are zero there now.
    ///
    /// # Errors
    /// A page that there is not; a plane that has ended.
    pub fn begin_retry(&self, changed: &[PagePlace]) -> io::Result<()> {
        let is_page = |at: &PagePlace| {
            let block = self.ram.get(usize::from(at.block));
            block.is_some_and(|block| u64::from(at.page) < block.size_bytes / PAGE_BYTES as u64)
        };
        if !changed.iter().all(is_page) {
            return Err(io::Error::other("the destination tells of a page that there is not"));
        }
        self.ack_tracker.begin_retry();
        // Another QEMU needs it, too.
        *self.head.lock().unwrap_or_else(PoisonError::into_inner) = None;
        for (channel, queue) in self.queues.iter().enumerate() {
            let own = |at: &&PagePlace| page_channel(at.page.into(), self.queues.len()) == channel;
            let own = changed.iter().filter(own).copied().collect();
            queue.push_at_once(Work::Forget(own)).map_err(|_| ended())?;
        }
        Ok(())
    }

    /// Where the operations of a disk go.
    ///
    /// # Errors
    /// A disk that was not in the specification.
    pub fn disk_sink(&self, index: u16) -> io::Result<Box<dyn DiskSink>> {
        let disk = self
            .disks
            .iter()
            .find(|disk| disk.index == index)
            .ok_or_else(|| io::Error::other("a disk that is not part of this migration"))?;
        Ok(Box::new(disk::ChannelSink::new(
            *disk,
            self.queues.clone(),
            Arc::clone(&self.is_urgent),
            Arc::clone(&self.meter),
        )))
    }

    /// Lifts or restores the byte limit of the disk queues: QEMU blocks its main loop until
    /// the writes of its mirrors are accepted. Without the limit, a queue accepts at most
    /// the writes that its mirrors have in flight.
    pub fn set_backpressure(&self, is_on: bool) {
        self.is_urgent.store(!is_on, Ordering::Release);
        self.queues.iter().for_each(Queue::wake);
    }

    /// Has everything that the sinks took made durable and compared; the event
    /// `DisksEqual` with the number that is returned follows. Never waits.
    ///
    /// # Errors
    /// When the plane has ended.
    pub fn start_disk_barrier(&self) -> io::Result<u32> {
        let number = self.ack_tracker.begin_disks();
        let put = |queue: &Queue<Work>| queue.push_at_once(Work::DiskBarrier(number));
        self.queues.iter().try_for_each(put).map_err(|_| ended())?;
        Ok(number)
    }

    /// What moved so far.
    #[must_use]
    pub fn moved(&self) -> Moved {
        self.meter.moved()
    }

    /// Why the plane ended, if it did.
    #[must_use]
    pub fn failure(&self) -> Option<PlaneError> {
        self.shutdown.result().err()
    }

    /// Ends everything at once.
    pub fn abort(&self) {
        self.shutdown.fail(PlaneError::Aborted);
    }

    /// Ends everything, and waits for all threads.
    ///
    /// # Errors
    /// What ended the plane before.
    pub fn join(&self) -> Result<(), PlaneError> {
        self.abort();
        let threads = &mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let mut threads = std::mem::take(threads);
        threads.extend(self.reader.lock().unwrap_or_else(PoisonError::into_inner).take());
        shutdown::join(threads, &self.shutdown)
    }
}

impl Drop for SourcePlane {
    /// Whoever had it may have been cut off: its threads are not to stay behind.
    fn drop(&mut self) {
        self.abort();
    }
}

/// Takes what the destination acknowledges.
struct Acks {
    frames: FrameReader,
    replays: Arc<[Arc<Replay>]>,
    ack_tracker: Arc<AckTracker>,
    queues: Queues,
    shutdown: Arc<Shutdown>,
    /// The destination has been told what is here
    differs: bool,
}

impl Acks {
    /// Has the destination find out where the two differ, once.
    fn differ(&mut self, ack: &Ack, error: PlaneError) {
        if !std::mem::replace(&mut self.differs, true) {
            // First of all: the destination closes its link once it has the digests.
            self.shutdown.emit(PlaneEvent::Different(error));
            // One whose queue is closed has ended.
            self.queues[usize::from(ack.channel)].push_at_once(Work::Digests).ok();
        }
    }

    fn run(mut self, link: &Link) -> Result<(), PlaneError> {
        let mut tried = 0;
        while let Some(mut connection) = link.take(self.replays.len(), tried) {
            tried = connection.number;
            let error = self.listen(&mut connection, link);
            if self.shutdown.is_shut_down() {
                return Ok(());
            }
            if !error.is_lost() {
                return Err(error);
            }
            link.lost(tried, error);
        }
        Ok(())
    }

    /// Takes acknowledgements until the connection or the peer fails.
    fn listen(&mut self, connection: &mut Connection, link: &Link) -> PlaneError {
        let mut has_begun = false;
        loop {
            if let Err(error) = self.next(connection) {
                return error;
            }
            if !std::mem::replace(&mut has_begun, true) {
                link.caught_up(connection.number);
            }
        }
    }

    fn next(&mut self, connection: &mut Connection) -> Result<(), PlaneError> {
        let broken = |what: &str| PlaneError::protocol("return path", what);
        let ack = match self.frames.next(connection)? {
            (FrameKind::KeepAlive, _) => return Ok(()),
            (FrameKind::Ack, payload) => Ack::decode(payload),
            _ => return Err(broken("a frame that is no ack")),
        };
        let ack = ack.map_err(|error| PlaneError::frame("return path", error))?;
        let replay = self.replays.get(usize::from(ack.channel));
        let replay = replay.ok_or_else(|| broken("an ack of no channel"))?;
        replay
            .acknowledge(ack.applied)
            .map_err(|error| PlaneError::protocol(ack.channel, error))?;
        let all_acked = match self.ack_tracker.take(&ack) {
            Err(error @ PlaneError::Different { .. }) => {
                self.differ(&ack, error);
                return Ok(());
            }
            taken => taken?,
        };
        for acked in all_acked {
            match acked {
                Acked::Ram => {
                    // One whose queue is closed has ended.
                    self.queues[0].push_at_once(Work::Release).ok();
                    self.shutdown.emit(PlaneEvent::RamDelivered);
                }
                Acked::Disks(number) => self.shutdown.emit(PlaneEvent::DisksEqual(number)),
            }
        }
        Ok(())
    }
}
