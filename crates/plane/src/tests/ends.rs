//! What goes in comes out; every end is a clean one.

use super::*;

/// Goal: memory and disk end equal, by the cheapest kind of each page.
#[test]
fn memory_and_disk_arrive() {
    let both = Both::new();
    let mut stream = Stream::new();
    stream.section(2, &versions(0..RAM_PAGES, 1));
    stream.section(2, &versions(0..100, 2));
    stream.section(2, &versions(0..50, 2));
    stream.section(3, &[(7, None), (8, None), (8, Some(content(8, 9)))]);
    stream.0.extend_from_slice(b"device state");
    let mut sink = both.source.disk_sink(0).unwrap();
    sink.write_zeroes(0, DISK_BYTES, true).unwrap();
    sink.write(1000, vec![5; 3 << 20]).unwrap();
    sink.write(2000, vec![6; 100]).unwrap();
    sink.discard(1 << 20, 64 << 10).unwrap();
    stream.write(both.attach(1)).join().unwrap();
    both.start_disk_barrier();
    assert_eq!(both.expect(&mut no_fates(), vec!["RamDelivered", "DisksEqual"]), 0);
    both.expect_there("RamDelivered");
    both.assert_pages(|page| match page {
        7 => vec![0; PAGE_BYTES],
        8 => content(8, 9),
        _ => content(page, if page < 100 { 2 } else { 1 }),
    });
    let read_back = both.destination.ram_digests().unwrap();
    assert!(read_back.len() == 256 && !read_back.contains(&0));
    let mut disk = vec![1; usize::try_from(DISK_BYTES).unwrap()];
    both.disk.read_exact_at(&mut disk, 0).unwrap();
    assert_eq!(disk[..1000], [0; 1000]);
    assert_eq!((disk[1000], disk[2000], disk[2100], disk[1 << 20]), (5, 6, 5, 0));
    let moved = both.source.moved();
    assert_eq!((moved.unchanged_pages, moved.zero_pages, moved.resent_bytes), (50, 2, 0));
    assert!(moved.difference_pages >= 80, "{moved:?}");
    assert!(both.end().ends_with(b"device state"));
}

/// Goal: a page that is another one at the destination is named, and QEMU gets
/// no device state.
#[test]
fn a_page_that_differs_is_named() {
    let both = Both::new();
    let mut stream = Stream::new();
    stream.section(2, &versions(0..RAM_PAGES, 1));
    let mut qemu = both.attach(1);
    qemu.write_all(&stream.0).unwrap();
    // Once it is there, a bit falls over; what follows is a difference to it.
    let place = 700 * PAGE_BYTES as u64;
    let mut page = vec![0; PAGE_BYTES];
    while page != content(700, 1) {
        both.memory.read_exact_at(&mut page, place).unwrap();
    }
    both.memory.write_all_at(&[page[9] ^ 4], place + 9).unwrap();
    let mut rest = Stream(Vec::new());
    rest.section(2, &versions(0..RAM_PAGES, 2));
    rest.section(3, &[]);
    rest.0.extend_from_slice(b"device state");
    rest.write(qemu).join().unwrap();
    let found = named_difference(&both);
    assert!(found.contains("RAM, first in the page at 0x2bc000"), "{found}");
}

/// Goal: a disk that was written otherwise than the source did is named, with the
/// range.
#[test]
fn a_range_that_differs_is_named() {
    const TURNED: &[u8] = b"only one byte of this arrives as another";
    let both = Both::with(&Fate { turned: Some(TURNED), ..Fate::default() });
    let mut sink = both.source.disk_sink(0).unwrap();
    for offset_bytes in (0..DISK_BYTES).step_by(1 << 20) {
        sink.write(offset_bytes, vec![7; 4096]).unwrap();
    }
    sink.write((5 << 20) + 512, TURNED.to_vec()).unwrap();
    both.start_disk_barrier();
    let found = named_difference(&both);
    assert!(found.contains("disk number 0, first in bytes 5242880 to 6291456"), "{found}");
}

/// What the destination says after the source found that the two differ.
fn named_difference(both: &Both) -> String {
    let told = both.source_events.recv_timeout(WAIT).unwrap();
    assert!(matches!(told, PlaneEvent::Different(_)), "{told:?}");
    loop {
        match both.destination_events.recv_timeout(WAIT).unwrap() {
            PlaneEvent::Failed(error) => return error.to_string(),
            PlaneEvent::RamDelivered => panic!("device state was given to QEMU"),
            _ => {}
        }
    }
}

/// Goal: an abort wakes every thread; the other side is told that the link is lost.
#[test]
fn an_abort_ends_both() {
    let both = Both::new();
    let mut qemu = both.attach(1);
    qemu.write_all(&Stream::new().0).unwrap();
    both.source.abort();
    both.expect_there("LinkLost");
    both.end();
}

/// Goal: an abort is at once, also while the link is away and all queues are full.
#[test]
fn an_abort_while_the_link_is_away_ends_all() {
    let both = Both::with(&Fate::cut_after(100_000));
    let mut stream = Stream::new();
    for version in 0..4 {
        stream.section(2, &versions(0..RAM_PAGES, version));
    }
    let mut qemu = both.attach(1);
    let writing = std::thread::spawn(move || qemu.write_all(&stream.0));
    let mut sink = both.source.disk_sink(0).unwrap();
    let mirroring = std::thread::spawn(move || {
        (0..).map(|index| sink.write((index % 8) << 20, vec![1; 1 << 20])).find(Result::is_err)
    });
    both.expect_there("LinkLost");
    both.end();
    assert!(writing.join().unwrap().is_err() && mirroring.join().unwrap().is_some());
}

/// Goal: a stream that cannot be followed is a clean end on both sides.
#[test]
fn a_strange_stream_ends_both() {
    let both = Both::new();
    let mut qemu = both.attach(1);
    qemu.write_all(b"not a migration stream at all").unwrap();
    assert!(both.failure().contains("Stream"));
    assert!(both.source.join().is_err());
    both.destination_events.recv_timeout(WAIT).unwrap();
    both.destination.join().unwrap();
}

/// Goal: counts that cannot be end the migration, and nothing is sent again.
#[test]
fn a_peer_that_miscounts_ends_the_source() {
    use limosa_protocol::frame::{Ack, FrameHeader, FrameKind, HEADER_BYTES, Resume};
    let frame = |kind, payload: &[u8]| {
        let bytes = u32::try_from(payload.len()).unwrap();
        let header = FrameHeader { kind, packed: false, wire_bytes: bytes, plain_bytes: bytes };
        [&header.encode()[..], payload].concat()
    };
    let resume = |received| frame(FrameKind::Resume, &Resume { received }.encode());
    let ack =
        |applied| frame(FrameKind::Ack, &Ack { channel: 1, applied, ..Ack::default() }.encode());
    // What is said on channel 1 and on the return path, of the second link.
    let cases = [
        ("more than was sent", resume(1000), Vec::new()),
        ("less than was acknowledged", resume(0), Vec::new()),
        ("no count at all", frame(FrameKind::KeepAlive, &[]), Vec::new()),
        ("an ack of what was not sent", resume(1), ack(1000)),
        ("no ack", Vec::new(), resume(0)),
        ("no frame", vec![7; HEADER_BYTES], Vec::new()),
    ];
    for (what, on_channel, on_return_path) in cases {
        let both = Both::with(&Fate::default());
        both.source.disk_sink(0).unwrap().write(1 << 20, vec![1; 4096]).unwrap();
        both.start_disk_barrier();
        both.expect(&mut no_fates(), vec!["DisksEqual"]);
        let [(ours, ack_in), (mut theirs, mut ack_out)] = connections(&Fate::default());
        both.source.reconnect(ours, ack_in).unwrap();
        theirs[1].io.write_all(&on_channel).unwrap();
        ack_out.io.write_all(&on_return_path).unwrap();
        let failure = both.failure();
        assert!(failure.contains("Protocol"), "{what}: {failure}");
        assert!(both.source.join().is_err());
        both.destination.join().unwrap();
    }
}

/// Goal: a plane that is let go without a word leaves no thread behind.
/// Method: each thread holds what tells events; with the last of them that ends.
#[test]
fn a_plane_that_is_dropped_ends_its_threads() {
    let Both { source, source_events, destination, .. } = Both::new();
    drop(source);
    let ended = loop {
        if let Err(error) = source_events.recv_timeout(WAIT) {
            break error;
        }
    };
    assert_eq!(ended, std::sync::mpsc::RecvTimeoutError::Disconnected, "a thread lives on");
    destination.abort();
}
