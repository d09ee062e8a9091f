//! Both halves in one process, joined by sockets that can be cut.
//!
//! ```text
//! made-up QEMU ─► source plane ═ wires ═ destination plane ─► memory, disk, QEMU's end
//!                                  └ cut after so many bytes, or silent from then on
//! ```

mod disks;
mod ends;
mod links;
mod raw_target;
mod streams;

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::{
    ChannelIo, DestinationDisk, DestinationPlane, DestinationSpec, DiskTarget, PAGE_BYTES,
    PagePlace, PlaneEvent, PlaneEvents, PlaneSettings, RamBlockSpec, RamTarget, SourceDisk,
    SourcePlane, SourceSpec,
};

use raw_target::RawTarget;

const CHANNEL_COUNT: usize = 3;
const RAM_BYTES: u64 = 4 << 20;
const RAM_PAGES: u64 = RAM_BYTES / PAGE_BYTES as u64;
const DISK_BYTES: u64 = 8 << 20;
/// Generous; only a test that failed waits for it.
const WAIT: Duration = Duration::from_secs(60);
/// Small, so that a test of silence is short.
const SILENCE: Duration = Duration::from_millis(400);

/// What may happen to all connections of a link.
#[derive(Clone, Default)]
struct Fate {
    /// Bytes after which one of them breaks; `None` for never
    left: Option<Arc<AtomicI64>>,
    /// The first byte of this, wherever it is written, becomes another one
    turned: Option<&'static [u8]>,
    /// What is written is lost, and nobody is told
    source_is_mute: Arc<AtomicBool>,
    destination_is_mute: Arc<AtomicBool>,
    /// The memory of the source's guest, if its holes count
    memory: Option<Arc<File>>,
}

impl Fate {
    fn cut_after(bytes: u64) -> Self {
        let left = Arc::new(AtomicI64::new(i64::try_from(bytes).unwrap()));
        Self { left: Some(left), ..Self::default() }
    }
}

/// One end of a connection.
struct Wire {
    stream: UnixStream,
    left: Option<Arc<AtomicI64>>,
    turned: Option<&'static [u8]>,
    is_mute: Arc<AtomicBool>,
}

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer)
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.is_mute.load(Ordering::SeqCst) {
            return Ok(bytes.len());
        }
        let found = self
            .turned
            .and_then(|turned| bytes.windows(turned.len()).position(|window| window == turned));
        if let Some(at) = found {
            let mut other = bytes.to_vec();
            other[at] ^= 1;
            return self.stream.write_all(&other).map(|()| other.len());
        }
        let Some(left) = &self.left else { return self.stream.write(bytes) };
        let wanted = i64::try_from(bytes.len()).unwrap();
        let before = left.fetch_sub(wanted, Ordering::SeqCst);
        if before >= wanted {
            self.stream.write_all(bytes)?;
            return Ok(bytes.len());
        }
        // The peer gets the beginning, and then finds the end.
        let last = usize::try_from(before.max(0)).unwrap();
        self.stream.write_all(&bytes[..last]).ok();
        self.stream.shutdown(std::net::Shutdown::Both).ok();
        Err(io::ErrorKind::ConnectionReset.into())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn wire(stream: UnixStream, fate: &Fate, is_mute: &Arc<AtomicBool>) -> ChannelIo {
    stream.set_read_timeout(Some(SILENCE)).unwrap();
    let closer = stream.try_clone().unwrap();
    ChannelIo {
        io: Box::new(Wire {
            stream,
            left: fate.left.clone(),
            turned: fate.turned,
            is_mute: Arc::clone(is_mute),
        }),
        shutdown: Box::new(move || {
            closer.shutdown(std::net::Shutdown::Both).ok();
        }),
    }
}

/// Both ends of all connections: data channels, then the return path.
fn connections(fate: &Fate) -> [(Vec<ChannelIo>, ChannelIo); 2] {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..=CHANNEL_COUNT {
        let (a, b) = UnixStream::pair().unwrap();
        ours.push(wire(a, fate, &fate.source_is_mute));
        theirs.push(wire(b, fate, &fate.destination_is_mute));
    }
    [ours, theirs].map(|mut all| {
        let return_path = all.pop().unwrap();
        (all, return_path)
    })
}

/// A disk that notes each operation.
struct NotedDisk {
    disk: RawTarget,
    noted: Arc<Mutex<Vec<(u64, u64)>>>,
    slow_flush: Arc<AtomicBool>,
    flush_count: Arc<AtomicU32>,
}

impl DiskTarget for NotedDisk {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }
    fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> io::Result<()> {
        self.noted.lock().unwrap().push((offset_bytes, bytes.len() as u64));
        self.disk.write(offset_bytes, bytes)
    }
    fn write_zeroes(&mut self, offset: u64, length: u64, may_unmap: bool) -> io::Result<()> {
        self.noted.lock().unwrap().push((offset, length));
        self.disk.write_zeroes(offset, length, may_unmap)
    }
    fn flush(&mut self) -> io::Result<()> {
        while self.slow_flush.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.flush_count.fetch_add(1, Ordering::SeqCst);
        self.disk.flush()
    }
}

struct Both {
    source: SourcePlane,
    destination: DestinationPlane,
    source_events: Receiver<PlaneEvent>,
    destination_events: Receiver<PlaneEvent>,
    memory: File,
    disk: File,
    noted: Arc<Mutex<Vec<(u64, u64)>>>,
    slow_flush: Arc<AtomicBool>,
    flush_count: Arc<AtomicU32>,
    early_flush_count: Arc<AtomicU32>,
    /// Number of the last one
    disk_barrier: Cell<u32>,
    qemu: JoinHandle<Vec<u8>>,
    folder: tempfile::TempDir,
}

/// Events that a thread without a runtime can wait for.
fn with_timeouts(mut events: PlaneEvents) -> Receiver<PlaneEvent> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        while let Some(event) = events.blocking_recv() {
            sender.send(event).ok();
        }
    });
    receiver
}

fn settings() -> PlaneSettings {
    PlaneSettings {
        page_cache_bytes_max: 16 << 20,
        replay_bytes_max: CHANNEL_COUNT * (256 << 10),
        keep_alive_every: SILENCE / 8,
        ..PlaneSettings::default()
    }
}

impl Both {
    fn new() -> Self {
        Self::with(&Fate::default())
    }

    fn with(fate: &Fate) -> Self {
        let [(ours, ack_in), (theirs, ack_out)] = connections(fate);
        let settings = settings();
        let source = SourcePlane::start(SourceSpec {
            channels: ours,
            return_path: ack_in,
            ram: vec![RamBlockSpec {
                name: "ram0".into(),
                size_bytes: RAM_BYTES,
                memory: fate.memory.clone(),
            }],
            disks: vec![SourceDisk { index: 0, size_bytes: DISK_BYTES, fresh: true }],
            settings,
        });
        let memory = tempfile::tempfile().unwrap();
        memory.set_len(RAM_BYTES).unwrap();
        let disk = tempfile::tempfile().unwrap();
        disk.set_len(DISK_BYTES).unwrap();
        let (noted, slow_flush) = (Arc::default(), Arc::<AtomicBool>::default());
        let (flush_count, early_flush_count) = (Arc::default(), Arc::default());
        let noted_disk = |slow_flush: &Arc<AtomicBool>, flush_count: &Arc<AtomicU32>| {
            Box::new(NotedDisk {
                disk: RawTarget::new(disk.try_clone().unwrap()).unwrap(),
                noted: Arc::clone(&noted),
                slow_flush: Arc::clone(slow_flush),
                flush_count: Arc::clone(flush_count),
            })
        };
        let noted_disk = DestinationDisk {
            target: noted_disk(&slow_flush, &flush_count),
            early: Some(noted_disk(&Arc::default(), &early_flush_count)),
        };
        let (qemu, qemu_incoming) = UnixStream::pair().unwrap();
        let destination = DestinationPlane::start(DestinationSpec {
            channels: theirs,
            return_path: ack_out,
            ram: vec![RamTarget {
                name: "ram0".into(),
                size_bytes: RAM_BYTES,
                memfd: memory.try_clone().unwrap(),
            }],
            disks: vec![noted_disk],
            qemu_incoming: Some(qemu_incoming),
            settings,
            read_back: true,
        });
        let (source, source_events) = source.unwrap();
        let (destination, destination_events) = destination.unwrap();
        Self {
            source,
            destination,
            source_events: with_timeouts(source_events),
            destination_events: with_timeouts(destination_events),
            memory,
            disk,
            noted,
            slow_flush,
            flush_count,
            early_flush_count,
            disk_barrier: Cell::new(0),
            qemu: read_all(qemu),
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn start_disk_barrier(&self) {
        self.disk_barrier.set(self.source.start_disk_barrier().unwrap());
    }

    fn reconnect(&self, fate: &Fate) {
        let [(ours, ack_in), (theirs, ack_out)] = connections(fate);
        self.destination.reconnect(theirs, ack_out).unwrap();
        self.source.reconnect(ours, ack_in).unwrap();
    }

    /// Has both begin again, with another QEMU at the destination; returns what the old
    /// one got.
    fn begin_retry(&mut self) -> (Vec<u8>, Vec<PagePlace>) {
        self.destination.quiesce().unwrap();
        let memory = tempfile::tempfile().unwrap();
        memory.set_len(RAM_BYTES).unwrap();
        let ram = RamTarget {
            name: "ram0".into(),
            size_bytes: RAM_BYTES,
            memfd: memory.try_clone().unwrap(),
        };
        let disk = NotedDisk {
            disk: RawTarget::new(self.disk.try_clone().unwrap()).unwrap(),
            noted: Arc::clone(&self.noted),
            slow_flush: Arc::clone(&self.slow_flush),
            flush_count: Arc::clone(&self.flush_count),
        };
        let disk = DestinationDisk { target: Box::new(disk), early: None };
        let (qemu, qemu_incoming) = UnixStream::pair().unwrap();
        let changed = self.destination.begin_retry(vec![ram], vec![disk], qemu_incoming).unwrap();
        self.source.begin_retry(&changed).unwrap();
        self.memory = memory;
        let old = std::mem::replace(&mut self.qemu, read_all(qemu));
        (old.join().unwrap(), changed)
    }

    /// Lets the source have a stream of QEMU.
    fn attach(&self, number: u32) -> UnixStream {
        let socket = self.folder.path().join(format!("migrate-{number}.sock"));
        self.source.attach_migration_socket(UnixListener::bind(&socket).unwrap()).unwrap();
        UnixStream::connect(&socket).unwrap()
    }

    /// Waits for events of either side, in any order; brings another link
    /// whenever the one before is lost.
    fn expect(&self, fates: &mut dyn Iterator<Item = Fate>, mut wanted: Vec<&str>) -> usize {
        let mut lost_count = 0;
        while !wanted.is_empty() {
            let event = self.source_events.recv_timeout(WAIT);
            let event = event.unwrap_or_else(|_| panic!("waited in vain for {wanted:?}"));
            match &event {
                PlaneEvent::Failed(_) | PlaneEvent::Different(_) => panic!("{event:?}"),
                PlaneEvent::LinkLost(_) => {
                    lost_count += 1;
                    self.reconnect(&fates.next().unwrap_or_default());
                }
                PlaneEvent::LinkBack => {}
                // It was given up, and was told of at the same moment.
                PlaneEvent::DisksEqual(number) if *number < self.disk_barrier.get() => {}
                PlaneEvent::RamDelivered | PlaneEvent::DisksEqual(_) => {
                    let name = format!("{event:?}").replace(char::is_numeric, "").replace("()", "");
                    let index = wanted.iter().position(|wanted| *wanted == name);
                    wanted.remove(index.unwrap_or_else(|| panic!("{event:?} is not expected")));
                }
            }
        }
        lost_count
    }

    /// Waits until the destination has said that.
    fn expect_there(&self, wanted: &str) {
        loop {
            let event = self.destination_events.recv_timeout(WAIT);
            let event = event.unwrap_or_else(|_| panic!("waited in vain for {wanted}"));
            assert!(!matches!(event, PlaneEvent::Failed(_)), "{event:?}");
            if format!("{event:?}").starts_with(wanted) {
                return;
            }
        }
    }

    /// The failure that ends the source's plane.
    fn failure(&self) -> String {
        loop {
            match self.source_events.recv_timeout(WAIT).expect("the source's plane fails") {
                PlaneEvent::Failed(error) => return format!("{error}: {error:?}"),
                event => drop(event),
            }
        }
    }

    /// Ends both; returns what QEMU got.
    fn end(self) -> Vec<u8> {
        self.source.join().unwrap();
        self.destination.join().unwrap();
        self.qemu.join().unwrap()
    }

    fn page(&self, page: u64) -> Vec<u8> {
        let mut found = vec![0; PAGE_BYTES];
        self.memory.read_exact_at(&mut found, page * PAGE_BYTES as u64).unwrap();
        found
    }

    fn assert_pages(&self, expected: impl Fn(u64) -> Vec<u8>) {
        for page in 0..RAM_PAGES {
            assert!(self.page(page) == expected(page), "page {page}");
        }
    }
}

/// A QEMU that only reads its stream, to the end.
fn read_all(mut qemu: UnixStream) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut got = Vec::new();
        qemu.read_to_end(&mut got).unwrap();
        got
    })
}

/// A stream as QEMU writes it.
#[derive(Default)]
struct Stream(Vec<u8>);

impl Stream {
    fn be(&mut self, number: u64) {
        self.0.extend_from_slice(&number.to_be_bytes());
    }

    fn new() -> Self {
        Self::of("pc-q35-7.2")
    }

    fn of(machine: &str) -> Self {
        let mut stream = Self(b"QEVM\0\0\0\x03\x07\0\0\0".to_vec());
        stream.0.push(u8::try_from(machine.len()).unwrap());
        stream.0.extend_from_slice(machine.as_bytes());
        stream.0.extend_from_slice(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
        stream.be((RAM_BYTES + 0x2000) | 4);
        stream.0.extend_from_slice(b"\x04ram0");
        stream.be(RAM_BYTES);
        stream.0.extend_from_slice(b"\x03rom");
        stream.be(0x2000);
        stream.end();
        stream
    }

    fn begin(&mut self, kind: u8) {
        self.0.extend_from_slice(&[kind, 0, 0, 0, 2]);
    }

    fn page(&mut self, page: u64, content: Option<&[u8]>) {
        self.element("ram0", page, content);
    }

    fn element(&mut self, block: &str, page: u64, content: Option<&[u8]>) {
        self.be((page * PAGE_BYTES as u64) | if content.is_some() { 8 } else { 2 });
        self.0.push(u8::try_from(block.len()).unwrap());
        self.0.extend_from_slice(block.as_bytes());
        self.0.extend_from_slice(content.unwrap_or(&[0]));
    }

    fn end(&mut self) {
        self.be(0x10);
        self.0.extend_from_slice(b"\x7e\0\0\0\x02");
    }

    fn section(&mut self, kind: u8, pages: &[(u64, Option<Vec<u8>>)]) {
        self.begin(kind);
        for (page, content) in pages {
            self.page(*page, content.as_deref());
        }
        self.end();
    }

    /// Writes it to a plane and closes, as QEMU does at its end.
    fn write(self, mut to: UnixStream) -> JoinHandle<()> {
        std::thread::spawn(move || to.write_all(&self.0).unwrap())
    }
}

fn content(page: u64, version: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE_BYTES];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::try_from((index as u64 * (page + 1)) % 249).unwrap();
    }
    bytes[128..136].copy_from_slice(&version.to_le_bytes());
    bytes
}

/// Pages of a range with a version.
fn versions(pages: std::ops::Range<u64>, version: u64) -> Vec<(u64, Option<Vec<u8>>)> {
    pages.map(|page| (page, Some(content(page, version)))).collect()
}

/// The same numbers in each run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        // splitmix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

fn no_fates() -> std::iter::Empty<Fate> {
    std::iter::empty()
}
