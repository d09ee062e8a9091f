//! Both halves in one process: what goes in comes out, and faults are found.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use crate::{
    ChannelIo, DestinationPlane, DestinationSpec, PAGE_BYTES, PlaneEvent, PlaneSettings,
    RamBlockSpec, RamTarget, RawTarget, SourceDisk, SourcePlane, SourceSpec,
};

const RAM_BYTES: u64 = 4 << 20;
const DISK_BYTES: u64 = 8 << 20;
const WAIT: Duration = Duration::from_secs(20);

fn pair() -> (ChannelIo, ChannelIo) {
    let (a, b) = UnixStream::pair().unwrap();
    let io = |stream: UnixStream| {
        let closer = stream.try_clone().unwrap();
        ChannelIo {
            io: Box::new(stream),
            shutdown: Box::new(move || {
                closer.shutdown(std::net::Shutdown::Both).ok();
            }),
        }
    };
    (io(a), io(b))
}

struct Both {
    source: SourcePlane,
    destination: DestinationPlane,
    source_events: Receiver<PlaneEvent>,
    destination_events: Receiver<PlaneEvent>,
    memory: File,
    disk: File,
    qemu: UnixStream,
    socket: std::path::PathBuf,
    _folder: tempfile::TempDir,
}

fn both() -> Both {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let (a, b) = pair();
        ours.push(a);
        theirs.push(b);
    }
    let (ack_in, ack_out) = pair();
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(RAM_BYTES).unwrap();
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(DISK_BYTES).unwrap();
    let (qemu, qemu_incoming) = UnixStream::pair().unwrap();
    let (tell, source_events) = channel();
    let settings = PlaneSettings { page_versions_bytes_max: 16 << 20, ..Default::default() };
    let source = SourcePlane::start(SourceSpec {
        channels: ours,
        return_path: ack_in,
        ram: vec![RamBlockSpec { name: "ram0".into(), size_bytes: RAM_BYTES }],
        disks: vec![SourceDisk { index: 0, size_bytes: DISK_BYTES, fresh: true }],
        settings,
        on_event: Arc::new(move |event| {
            tell.send(event).ok();
        }),
    })
    .unwrap();
    let (tell, destination_events) = channel();
    let destination = DestinationPlane::start(DestinationSpec {
        channels: theirs,
        return_path: ack_out,
        ram: vec![RamTarget {
            name: "ram0".into(),
            size_bytes: RAM_BYTES,
            memfd: memory.try_clone().unwrap(),
        }],
        disks: vec![Box::new(RawTarget::new(disk.try_clone().unwrap()).unwrap())],
        qemu_incoming: Some(qemu_incoming),
        settings,
        read_back: true,
        on_event: Arc::new(move |event| {
            tell.send(event).ok();
        }),
    })
    .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("migrate.sock");
    source.attach_migration_socket(UnixListener::bind(&socket).unwrap()).unwrap();
    Both {
        source,
        destination,
        source_events,
        destination_events,
        memory,
        disk,
        qemu,
        socket,
        _folder: folder,
    }
}

fn be(out: &mut Vec<u8>, word: u64) {
    out.extend_from_slice(&word.to_be_bytes());
}

fn head(out: &mut Vec<u8>) {
    out.extend_from_slice(b"QEVM\0\0\0\x03\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    be(out, RAM_BYTES | 4);
    out.extend_from_slice(b"\x04ram0");
    be(out, RAM_BYTES);
    be(out, 0x10);
    out.extend_from_slice(b"\x7e\0\0\0\x02");
}

fn section(out: &mut Vec<u8>, kind: u8, pages: &[(u64, Option<Vec<u8>>)]) {
    out.extend_from_slice(&[kind, 0, 0, 0, 2]);
    for (page, content) in pages {
        let kind = if content.is_some() { 8 } else { 2 };
        be(out, (page * PAGE_BYTES as u64) | kind);
        out.extend_from_slice(b"\x04ram0");
        out.extend_from_slice(content.as_deref().unwrap_or(&[0]));
    }
    be(out, 0x10);
    out.extend_from_slice(b"\x7e\0\0\0\x02");
}

fn content(page: u64, version: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE_BYTES];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::try_from((index as u64 * (page + 1)) % 249).unwrap();
    }
    bytes[128..136].copy_from_slice(&version.to_le_bytes());
    bytes
}

/// Goal: memory and disk end equal, by the cheapest kind of each page.
#[test]
fn memory_and_disk_arrive() {
    let both = both();
    let pages = RAM_BYTES / PAGE_BYTES as u64;
    let mut stream = Vec::new();
    head(&mut stream);
    let all = |version| (0..pages).map(move |page| (page, Some(content(page, version))));
    section(&mut stream, 2, &all(1).collect::<Vec<_>>());
    section(&mut stream, 2, &all(2).take(100).collect::<Vec<_>>());
    section(&mut stream, 2, &all(2).take(50).collect::<Vec<_>>());
    section(&mut stream, 3, &[(7, None), (8, None), (8, Some(content(8, 9)))]);
    stream.extend_from_slice(b"device state");
    let mut sink = both.source.disk_sink(0).unwrap();
    sink.write_zeroes(0, DISK_BYTES, true).unwrap();
    sink.write(1000, vec![5; 3 << 20]).unwrap();
    sink.write(2000, vec![6; 100]).unwrap();
    sink.discard(1 << 20, 64 << 10).unwrap();
    let mut qemu = UnixStream::connect(&both.socket).unwrap();
    qemu.write_all(&stream).unwrap();
    drop(qemu);
    both.source.start_disk_barrier().unwrap();
    for events in [&both.source_events, &both.destination_events] {
        for _ in 0..2 {
            let event = events.recv_timeout(WAIT).unwrap();
            assert!(!matches!(event, PlaneEvent::Failed(_)), "{event:?}");
        }
    }
    let mut tail = Vec::new();
    std::io::Read::read_to_end(&mut &both.qemu, &mut tail).unwrap();
    assert!(tail.ends_with(b"device state"));
    for page in 0..pages {
        let mut found = vec![0; PAGE_BYTES];
        both.memory.read_exact_at(&mut found, page * PAGE_BYTES as u64).unwrap();
        let expected = match page {
            7 => vec![0; PAGE_BYTES],
            8 => content(8, 9),
            _ => content(page, if page < 100 { 2 } else { 1 }),
        };
        assert!(found == expected, "page {page}");
    }
    let mut disk = vec![1; usize::try_from(DISK_BYTES).unwrap()];
    both.disk.read_exact_at(&mut disk, 0).unwrap();
    assert_eq!(disk[..1000], [0; 1000]);
    assert_eq!((disk[1000], disk[2000], disk[2100], disk[1 << 20]), (5, 6, 5, 0));
    let moved = both.source.moved();
    assert_eq!((moved.unchanged_pages, moved.zero_pages), (50, 2));
    assert!(moved.difference_pages >= 80, "{moved:?}");
    both.source.abort();
    both.source.join().unwrap();
    both.destination.abort();
    both.destination.join().unwrap();
}

/// Goal: an abort wakes every thread; a lost peer is told.
#[test]
fn an_abort_ends_both() {
    let both = both();
    let mut qemu = UnixStream::connect(&both.socket).unwrap();
    let mut stream = Vec::new();
    head(&mut stream);
    qemu.write_all(&stream).unwrap();
    both.source.abort();
    both.source.join().unwrap();
    let event = both.destination_events.recv_timeout(WAIT).unwrap();
    assert!(matches!(event, PlaneEvent::Failed(_)), "{event:?}");
    assert!(both.destination.join().is_err());
}

/// Goal: a stream that cannot be followed is a clean end on both sides.
#[test]
fn a_strange_stream_ends_both() {
    let both = both();
    let mut qemu = UnixStream::connect(&both.socket).unwrap();
    qemu.write_all(b"not a migration stream at all").unwrap();
    let event = both.source_events.recv_timeout(WAIT).unwrap();
    assert!(format!("{event:?}").contains("Stream"), "{event:?}");
    assert!(both.source.join().is_err());
    both.destination_events.recv_timeout(WAIT).unwrap();
    assert!(both.destination.join().is_err());
}
