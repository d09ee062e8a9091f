//! Any bytes, as all that a peer sends on its only channel to a destination.
//!
//! Checks more than "no crash": disks are used only within their size and not
//! after they failed, the end of the connection is never the plane's, and what
//! breaks the protocol is.

use std::fs::File;
use std::io::{self, Cursor, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use limosa_plane::{
    ChannelIo, DestinationDisk, DestinationPlane, DestinationSpec, DiskTarget, PAGE_BYTES,
    PlaneEvent, PlaneSettings, RamTarget,
};

const RAM_BYTES: u64 = 16 * PAGE_BYTES as u64;
const DISK_BYTES: u64 = 1 << 20;
/// Operations after which the disk fails.
const OPERATION_COUNT_MAX: u32 = 40;

/// A connection that says something and takes everything.
struct Peer(Cursor<Vec<u8>>);

impl Peer {
    fn channel(bytes: &[u8]) -> ChannelIo {
        ChannelIo { io: Box::new(Self(Cursor::new(bytes.to_vec()))), shutdown: Box::new(|| ()) }
    }
}

impl Read for Peer {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Peer {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
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
    let plane = DestinationPlane::start(DestinationSpec {
        channels: vec![Peer::channel(bytes)],
        return_path: Peer::channel(&[]),
        ram: vec![RamTarget { name: "ram0".to_owned(), size_bytes: RAM_BYTES, memfd: memory }],
        disks: vec![DestinationDisk { target: Box::new(disk), early: None }],
        qemu_incoming: Some(qemu_incoming),
        settings: PlaneSettings::default(),
        read_back: true,
    });
    let (plane, mut events) = plane.expect("it starts");
    let mut told = Vec::new();
    let (mut is_lost, mut is_failed) = (false, false);
    while !is_lost && !is_failed {
        let event = events.blocking_recv().expect("a plane that ends says so");
        is_lost = matches!(event, PlaneEvent::LinkLost(_));
        is_failed = matches!(event, PlaneEvent::Failed(_));
        told.push(event);
    }
    let ended = plane.join();
    // With it goes whoever tells events.
    drop(plane);
    assert!(qemu.join().is_ok_and(|copied| copied.is_ok()));
    let reason = format!("{ended:?}");
    assert!(!reason.contains("panicked"), "{reason}");
    assert!(!misused.load(Ordering::Relaxed), "the disk was misused");
    assert_eq!(is_failed, ended.is_err(), "{reason}");
    told.extend(std::iter::from_fn(|| events.blocking_recv()));
    let count = |is: fn(&PlaneEvent) -> bool| told.iter().filter(|event| is(event)).count();
    assert!(count(|event| matches!(event, PlaneEvent::RamDelivered)) <= 1, "QEMU is fed once");
    assert!(count(|event| matches!(event, PlaneEvent::LinkBack)) == 0);
    let ends =
        |event: &PlaneEvent| matches!(event, PlaneEvent::Failed(_) | PlaneEvent::LinkLost(_));
    assert_eq!(count(ends), 1, "{told:?}");
}
