//! The source's half: what QEMU says goes out on the channels.
//!
//! ```text
//! migration socket ─► reader ─┐            ┌─► sender 0 ═► channel 0
//! nbd exports ─► disk sinks ──┴─ by route ─┴─► sender n ═► channel n
//! event RamDelivered, DisksEqual ◄─ return path thread ◄═ acks with digests
//! ```

mod disk;
mod reader;
mod sender;

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use limosa_protocol::frame::{Ack, FrameKind};
use limosa_protocol::migration::Moved;

use crate::channel::{ChannelIo, FrameReader};
use crate::halt::{self, Halt, PlaneError, PlaneEvent};
use crate::meter::Meter;
use crate::nbd::server::DiskSink;
use crate::settings::PlaneSettings;
use sender::Work;

/// Bytes of a piece of work in a queue, at most: a batch of pages or a piece of
/// a disk write.
pub(crate) const WORK_BYTES_MAX: usize = 256 << 10;

/// A block of guest RAM that goes out of band.
#[derive(Debug, Clone)]
pub struct RamBlockSpec {
    /// QEMU's name of it
    pub name: String,
    /// Bytes
    pub size_bytes: u64,
}

/// A disk that is mirrored.
#[derive(Debug, Clone, Copy)]
pub struct SourceDisk {
    /// Its number, the same at the destination
    pub index: u16,
    /// Bytes
    pub size_bytes: u64,
    /// The destination's image reads as zeroes where nothing was written
    pub fresh: bool,
}

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
    /// Told of what happens; must not wait
    pub on_event: Arc<dyn Fn(PlaneEvent) + Send + Sync>,
}

/// The plane of a source, running.
pub struct SourcePlane {
    halt: Arc<Halt>,
    meter: Arc<Meter>,
    queues: Vec<SyncSender<Work>>,
    ram: Vec<RamBlockSpec>,
    disks: Vec<SourceDisk>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What each channel's sender counted at a barrier, waiting for the ack.
#[derive(Default)]
pub(crate) struct Expected {
    ram: Vec<Option<[u8; 32]>>,
    disk: Vec<Option<[u8; 32]>>,
}

impl SourcePlane {
    /// Starts the threads that send.
    ///
    /// # Errors
    /// When threads or compressors cannot be made.
    pub fn start(spec: SourceSpec) -> Result<Self, PlaneError> {
        let halt = Halt::new(spec.on_event);
        let meter = Arc::new(Meter::default());
        let count = spec.channels.len();
        let expected =
            Arc::new(Mutex::new(Expected { ram: vec![None; count], disk: vec![None; count] }));
        // Half of a channel's window waits in its queue; the rest is the piece
        // that is being packed and the socket's buffer.
        let depth = (spec.settings.window_bytes / count / WORK_BYTES_MAX / 2).max(1);
        let mut queues = Vec::new();
        let mut threads = Vec::new();
        for (index, channel) in spec.channels.into_iter().enumerate() {
            let (queue, work) = sync_channel(depth);
            queues.push(queue);
            halt.on_halt(channel.shutdown);
            let sender = sender::Sender::new(
                index,
                count,
                channel.io,
                &spec.ram,
                spec.settings,
                Arc::clone(&meter),
                Arc::clone(&expected),
            )?;
            let watch = Arc::clone(&halt);
            threads.push(
                halt::spawn(format!("send-{index}"), &halt, move || sender.run(&work, &watch))
                    .map_err(|error| PlaneError::local("starting a thread", error))?,
            );
        }
        halt.on_halt(spec.return_path.shutdown);
        let acks = FrameReader::new(spec.return_path.io, "return path".to_owned())?;
        let (watch, with_ram) = (Arc::clone(&halt), !spec.ram.is_empty());
        threads.push(
            halt::spawn("acks".to_owned(), &halt, move || {
                take_acks(acks, &expected, count, with_ram, &watch)
            })
            .map_err(|error| PlaneError::local("starting a thread", error))?,
        );
        Ok(Self {
            halt,
            meter,
            queues,
            ram: spec.ram,
            disks: spec.disks,
            threads: Mutex::new(threads),
        })
    }

    /// Takes QEMU's migration stream from the first client of a socket.
    ///
    /// # Errors
    /// The kernel's.
    pub fn attach_migration_socket(&self, listener: UnixListener) -> io::Result<()> {
        let reader = reader::Reader::new(
            self.ram.clone(),
            self.queues.clone(),
            Arc::clone(&self.halt),
            Arc::clone(&self.meter),
        );
        let thread = halt::spawn("read-ram".to_owned(), &self.halt, move || reader.run(&listener))?;
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
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
        Ok(Box::new(disk::ChannelSink::new(*disk, self.queues.clone(), Arc::clone(&self.meter))))
    }

    /// Has everything that the sinks took made durable and compared; the event
    /// `DisksEqual` follows.
    ///
    /// # Errors
    /// When the plane has ended.
    pub fn start_disk_barrier(&self) -> io::Result<()> {
        for queue in &self.queues {
            queue.send(Work::DiskBarrier).map_err(|_| ended())?;
        }
        Ok(())
    }

    /// What moved so far.
    #[must_use]
    pub fn moved(&self) -> Moved {
        self.meter.moved()
    }

    /// Why the plane ended, if it has.
    #[must_use]
    pub fn failure(&self) -> Option<PlaneError> {
        self.halt.result().err()
    }

    /// Ends everything at once.
    pub fn abort(&self) {
        self.halt.fail(PlaneError::Aborted);
    }

    /// Waits for all threads.
    ///
    /// # Errors
    /// What ended the plane, unless the agent did.
    pub fn join(self) -> Result<(), PlaneError> {
        drop(self.queues);
        let threads = self.threads.into_inner().unwrap_or_else(PoisonError::into_inner);
        halt::join(threads, &self.halt)
    }
}

pub(crate) fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the migration has ended")
}

/// Compares what the destination acknowledges with what was sent.
fn take_acks(
    mut acks: FrameReader,
    expected: &Mutex<Expected>,
    channel_count: usize,
    with_ram: bool,
    halt: &Halt,
) -> Result<(), PlaneError> {
    let mut ram_left = if with_ram { channel_count } else { 0 };
    let mut disk_left = channel_count;
    while ram_left + disk_left > 0 {
        let frame = match acks.next() {
            Ok(Some(frame)) => frame,
            Ok(None) if halt.is_halted() => return Ok(()),
            Ok(None) => {
                let end = io::Error::from(io::ErrorKind::UnexpectedEof);
                return Err(PlaneError::lost("return path", end));
            }
            Err(_) if halt.is_halted() => return Ok(()),
            Err(error) => return Err(error),
        };
        let (kind, payload) = frame;
        let ack = Ack::decode(payload).map_err(|error| PlaneError::frame("return path", error))?;
        let channel = usize::from(ack.channel);
        let mut expected = expected.lock().unwrap_or_else(PoisonError::into_inner);
        let (place, left, event, what) = match kind {
            FrameKind::RamAck => {
                (&mut expected.ram, &mut ram_left, PlaneEvent::RamDelivered, "RAM pages")
            }
            FrameKind::DiskAck => {
                (&mut expected.disk, &mut disk_left, PlaneEvent::DisksEqual, "disk contents")
            }
            _ => return Err(PlaneError::protocol("return path", "a frame that is no ack")),
        };
        let ours = place
            .get_mut(channel)
            .and_then(Option::take)
            .ok_or_else(|| PlaneError::protocol("return path", "an ack of nothing"))?;
        if ours != ack.digest {
            return Err(PlaneError::Different { channel: channel.to_string(), what });
        }
        *left -= 1;
        if *left == 0 {
            halt.tell(event);
        }
    }
    Ok(())
}
