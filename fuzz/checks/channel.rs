//! Any bytes, as all that a peer sends on its only channel to a destination.
//!
//! Checks more than "no crash": disks are used only within their size and not
//! after they failed, and success is told only of what was acknowledged.

use std::fs::File;
use std::io::{self, Cursor, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use limosa_plane::{
    ChannelIo, DestinationPlane, DestinationSpec, DiskTarget, PAGE_BYTES, PlaneEvent,
    PlaneSettings, RamTarget,
};

const RAM_BYTES: u64 = 16 * PAGE_BYTES as u64;
const DISK_BYTES: u64 = 1 << 20;
/// Operations after which the disk fails.
const OPERATION_COUNT_MAX: u32 = 40;

/// One way of a connection: what comes is given, what goes is counted.
struct OneWay {
    incoming: Cursor<Vec<u8>>,
    outgoing_bytes: Arc<AtomicUsize>,
}

impl OneWay {
    fn channel(bytes: &[u8]) -> (ChannelIo, Arc<AtomicUsize>) {
        let outgoing_bytes = Arc::<AtomicUsize>::default();
        let io = Self {
            incoming: Cursor::new(bytes.to_vec()),
            outgoing_bytes: Arc::clone(&outgoing_bytes),
        };
        (ChannelIo { io: Box::new(io), shutdown: Box::new(|| ()) }, outgoing_bytes)
    }
}

impl Read for OneWay {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.incoming.read(buffer)
    }
}

impl Write for OneWay {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.outgoing_bytes.fetch_add(buffer.len(), Ordering::Relaxed);
        Ok(buffer.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A disk that fails in the end, and says when it was misused.
struct Disk {
    operation_count: u32,
    misused: Arc<AtomicBool>,
}

impl Disk {
    fn operation(&mut self, offset: u64, length: u64) -> io::Result<()> {
        let is_inside = offset.checked_add(length).is_some_and(|end| end <= DISK_BYTES);
        if !is_inside || self.operation_count > OPERATION_COUNT_MAX {
            self.misused.store(true, Ordering::Relaxed);
        }
        self.operation_count += 1;
        let failed = self.operation_count > OPERATION_COUNT_MAX;
        if failed { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

impl DiskTarget for Disk {
    fn size_bytes(&self) -> u64 {
        DISK_BYTES
    }
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.operation(offset, bytes.len() as u64)
    }
    fn write_zeroes(&mut self, offset: u64, length: u64, _may_unmap: bool) -> io::Result<()> {
        self.operation(offset, length)
    }
    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.operation(offset, length)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.operation(0, 0)
    }
}

/// Panics when the bytes break something.
pub(crate) fn check(bytes: &[u8]) {
    let memfd = rustix::fs::memfd_create("ram0", rustix::fs::MemfdFlags::CLOEXEC);
    let memory = File::from(memfd.expect("memory"));
    memory.set_len(RAM_BYTES).expect("memory");
    let misused = Arc::<AtomicBool>::default();
    let disk = Disk { operation_count: 0, misused: Arc::clone(&misused) };
    let (qemu, qemu_incoming) = UnixStream::pair().expect("a socket");
    // Whatever comes is taken: QEMU is not what is tried here.
    let qemu = std::thread::spawn(move || io::copy(&mut &qemu, &mut io::sink()));
    let (channel, _) = OneWay::channel(bytes);
    let (return_path, acknowledged_bytes) = OneWay::channel(&[]);
    let events = Arc::<Mutex<Vec<PlaneEvent>>>::default();
    let told = Arc::clone(&events);
    let plane = DestinationPlane::start(DestinationSpec {
        channels: vec![channel],
        return_path,
        ram: vec![RamTarget { name: "ram0".to_owned(), size_bytes: RAM_BYTES, memfd: memory }],
        disks: vec![Box::new(disk)],
        qemu_incoming: Some(qemu_incoming),
        settings: PlaneSettings::default(),
        read_back: true,
        on_event: Arc::new(move |event| told.lock().expect("nobody panicked").push(event)),
    });
    let ended = plane.expect("it starts").join();
    assert!(qemu.join().is_ok_and(|copied| copied.is_ok()));
    let reason = format!("{ended:?}");
    assert!(!reason.contains("panicked"), "{reason}");
    assert!(!misused.load(Ordering::Relaxed), "the disk was misused");

    let events = std::mem::take(&mut *events.lock().expect("nobody panicked"));
    let count = |is: fn(&PlaneEvent) -> bool| events.iter().filter(|event| is(event)).count();
    let delivered = count(|event| matches!(event, PlaneEvent::RamDelivered));
    let equal = count(|event| matches!(event, PlaneEvent::DisksEqual));
    let failed = count(|event| matches!(event, PlaneEvent::Failed(_)));
    assert!(delivered <= 1 && equal <= 1);
    assert_eq!(failed, usize::from(ended.is_err()));
    assert!(ended.is_err() || delivered + equal == 2, "it ended well and not all came");
    let ack_bytes = limosa_protocol::frame::HEADER_BYTES + limosa_protocol::frame::Ack::BYTES;
    assert!(acknowledged_bytes.load(Ordering::Relaxed) >= (delivered + equal) * ack_bytes);
}
