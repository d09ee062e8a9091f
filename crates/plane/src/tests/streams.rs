//! Several streams of one QEMU are one to the other.

use limosa_qemu::stream::{RamBlock, RamSection, StreamParser, StreamPart, StreamSink};

use super::*;

/// What QEMU reads: it must be one valid stream.
#[derive(Default)]
struct Read {
    heads: usize,
    rom: Vec<u8>,
    tail: Vec<u8>,
}

impl StreamSink for Read {
    fn block_list(&mut self, _: &[RamBlock]) -> io::Result<()> {
        self.heads += 1;
        Ok(())
    }
    fn page(&mut self, backend: usize, _: u64, page: &[u8; PAGE_BYTES]) -> io::Result<()> {
        assert_eq!(backend, 0, "pages of the guest's RAM do not go this way");
        self.rom = page.to_vec();
        Ok(())
    }
    fn zero_page(&mut self, _: usize, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn inline(&mut self, part: StreamPart, bytes: &[u8]) -> io::Result<()> {
        if part == StreamPart::Tail {
            self.tail.extend_from_slice(bytes);
        }
        Ok(())
    }
    fn ram_section_end(&mut self, _: RamSection) -> io::Result<()> {
        Ok(())
    }
}

fn read(got: &[u8]) -> Read {
    let mut read = Read::default();
    let mut parser = StreamParser::new(vec!["rom".to_owned()]);
    parser.feed(got, &mut read).unwrap();
    parser.finish().unwrap();
    assert_eq!(read.heads, 1);
    read
}

/// A stream in which each part is there: rounds, a page of a ROM, a tail.
fn whole(version: u64) -> Stream {
    let mut stream = Stream::new();
    stream.section(2, &versions(0..RAM_PAGES, version));
    stream.begin(2);
    stream.element("rom", 1, Some(&content(99, version)));
    stream.page(3, Some(&content(3, version + 100)));
    stream.end();
    stream.section(3, &[(5, Some(content(5, version + 200)))]);
    stream.0.extend_from_slice(format!("device state {version}").as_bytes());
    stream
}

fn assert_version(both: &Both, version: u64) {
    both.assert_pages(|page| match page {
        3 => content(3, version + 100),
        5 => content(5, version + 200),
        _ => content(page, version),
    });
}

/// Goal: wherever a stream is cut, QEMU sees one valid stream with the last tail.
/// Method: the first is cut at seeded bytes, its end always among them.
#[test]
fn a_second_stream_takes_the_place_of_the_first() {
    let length = whole(1).0.len() as u64;
    let mut numbers = Numbers(7);
    let mut cuts: Vec<u64> = (0..12).map(|_| numbers.below(length)).collect();
    // In the head, in the section with the ROM, in the last one, in the tail.
    cuts.extend([0, 20, 60, length - 4300, length - 4200, length - 100, length - 3, length]);
    for cut in cuts {
        let both = Both::new();
        let mut first = whole(1);
        first.0.truncate(usize::try_from(cut).unwrap());
        let mut qemu = both.attach(1);
        qemu.write_all(&first.0).unwrap();
        // Some of it has arrived, or none.
        std::thread::sleep(Duration::from_millis(numbers.below(30)));
        assert!(both.source.give_up_switchover());
        drop(qemu);
        whole(2).write(both.attach(2)).join().unwrap();
        both.expect(&mut no_fates(), vec!["RamDelivered"]);
        both.expect_there("RamDelivered");
        assert_version(&both, 2);
        let read = read(&both.end());
        assert_eq!(read.rom, content(99, 2), "cut at {cut}");
        assert!(read.tail.ends_with(b"device state 2"), "cut at {cut}");
        assert!(!String::from_utf8_lossy(&read.tail).contains("device state 1"), "cut at {cut}");
    }
}

/// Goal: a page that the destination has costs nothing in the second stream.
#[test]
fn what_is_there_already_costs_nothing() {
    let both = Both::new();
    let mut first = whole(1);
    first.0.truncate(first.0.len() - 4);
    let mut qemu = both.attach(1);
    qemu.write_all(&first.0).unwrap();
    // All of it but its end.
    while both.source.moved().full_pages + both.source.moved().difference_pages < RAM_PAGES + 2 {
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(both.source.give_up_switchover());
    drop(qemu);
    let before = both.source.moved();
    let mut second = whole(1);
    second.0.extend_from_slice(b", later");
    second.write(both.attach(2)).join().unwrap();
    both.expect(&mut no_fates(), vec!["RamDelivered"]);
    let after = both.source.moved();
    // Pages 3 and 5 were changed within the stream, so they change twice more.
    assert_eq!(after.unchanged_pages - before.unchanged_pages, RAM_PAGES - 2);
    assert_eq!(after.full_pages, before.full_pages);
    assert!(after.wire_bytes - before.wire_bytes < 20_000, "{before:?} {after:?}");
    both.expect_there("RamDelivered");
    assert_version(&both, 1);
    assert!(read(&both.end()).tail.ends_with(b"device state 1, later"));
}

/// Goal: while the link is away a stream can be given up, and its QEMU, which
/// holds its lock while it writes, gets rid of all of it at once.
#[test]
fn a_stream_is_given_up_while_the_link_is_away() {
    for seed in 0..6 {
        let mut numbers = Numbers(seed);
        let both = Both::with(&Fate::cut_after(2_000 + numbers.below(30_000)));
        both.source.disk_sink(0).unwrap().write(5, vec![1; 9000]).unwrap();
        let mut first = whole(1);
        for version in 10..14 {
            first.0.extend_from_slice(&content(77, version).repeat(100));
        }
        let first = first.write(both.attach(1));
        both.start_disk_barrier();
        // The disk may have been faster.
        let is_lost = |event: PlaneEvent| matches!(event, PlaneEvent::LinkLost(_));
        while !is_lost(both.source_events.recv_timeout(WAIT).unwrap()) {}
        assert!(both.source.give_up_switchover());
        first.join().unwrap();
        // Nothing is told of what was given up, although it arrives now.
        both.reconnect(&Fate::default());
        both.expect_there("LinkBack");
        let second = whole(2).write(both.attach(2));
        both.start_disk_barrier();
        both.expect(&mut no_fates(), vec!["RamDelivered", "DisksEqual"]);
        second.join().unwrap();
        both.expect_there("RamDelivered");
        assert_version(&both, 2);
        assert!(read(&both.end()).tail.ends_with(b"device state 2"));
    }
}

/// Goal: once QEMU may have the tail there is no second stream; before, only one
/// at a time.
#[test]
fn a_released_stream_is_not_given_up() {
    let both = Both::new();
    let qemu = both.attach(1);
    let other = UnixListener::bind(both.folder.path().join("other.sock")).unwrap();
    assert!(both.source.attach_migration_socket(other.try_clone().unwrap()).is_err());
    whole(1).write(qemu).join().unwrap();
    both.expect(&mut no_fates(), vec!["RamDelivered"]);
    assert!(!both.source.give_up_switchover());
    assert!(both.source.attach_migration_socket(other).is_err());
    both.expect_there("RamDelivered");
    both.end();
}

/// Goal: a QEMU whose machine is another one than before is refused, cleanly.
#[test]
fn a_stream_with_another_head_is_refused() {
    let both = Both::new();
    let mut qemu = both.attach(1);
    qemu.write_all(&whole(1).0).unwrap();
    assert!(both.source.give_up_switchover());
    drop(qemu);
    let mut qemu = both.attach(2);
    qemu.write_all(&Stream::of("pc-q35-8.0").0).unwrap();
    let failure = both.failure();
    // The first head may not have been sent before it was given up.
    assert!(failure.contains("switchover that was given up"), "{failure}");
    assert!(both.source.join().is_err());
    both.destination.join().unwrap();
}

/// Goal: a tail that is too long to be held arrives all the same, and then
/// nothing can be tried again.
#[test]
fn a_very_long_tail_goes_to_qemu_as_it_comes() {
    let both = Both::new();
    let mut stream = Stream::new();
    stream.section(2, &versions(0..RAM_PAGES, 1));
    stream.begin(3);
    stream.element("rom", 1, Some(&content(99, 1)));
    stream.end();
    let long: Vec<u8> = (0..=250).cycle().take(20 << 20).collect();
    stream.0.extend_from_slice(&long);
    stream.write(both.attach(1)).join().unwrap();
    both.expect(&mut no_fates(), vec!["RamDelivered"]);
    both.expect_there("RamDelivered");
    assert!(read(&both.end()).tail.ends_with(&long));
}

/// Goal: a switchover that QEMU has loaded can be tried again: another QEMU gets one whole
/// stream, only what is not there is sent, and disks go on.
/// Method: the link is lost before the release, or after QEMU had it and changed pages;
/// writes to the disk are under way meanwhile.
#[test]
fn a_switchover_that_was_loaded_is_retried() {
    for loads in [false, true] {
        let mut both = Both::new();
        let mut sink = both.source.disk_sink(0).unwrap();
        sink.write(0, vec![1; 4096]).unwrap();
        whole(1).write(both.attach(1)).join().unwrap();
        both.start_disk_barrier();
        both.expect(&mut no_fates(), vec!["RamDelivered", "DisksEqual"]);
        if loads {
            both.expect_there("RamDelivered");
            both.memory.write_all_at(&[9; PAGE_BYTES], 20 * PAGE_BYTES as u64).unwrap();
            both.memory.write_all_at(&[0; PAGE_BYTES], 21 * PAGE_BYTES as u64).unwrap();
            both.memory.write_all_at(&[9; 8], 700 * PAGE_BYTES as u64).unwrap();
        }
        let before = both.source.moved();
        assert!(!both.source.give_up_switchover(), "it is released");
        let (first, changed) = both.begin_retry();
        let pages: Vec<u32> = changed.iter().map(|at| at.page).collect();
        assert_eq!(pages, if loads { vec![20, 21, 700] } else { vec![] });
        assert!(!loads || read(&first).tail.ends_with(b"device state 1"));
        sink.write(1 << 20, vec![2; 4096]).unwrap();
        let mut second = whole(1);
        second.0.extend_from_slice(b", later");
        let qemu = second.write(both.attach(2));
        both.reconnect(&Fate::default());
        both.start_disk_barrier();
        both.expect(&mut no_fates(), vec!["RamDelivered", "DisksEqual"]);
        qemu.join().unwrap();
        both.expect_there("RamDelivered");
        assert_version(&both, 1);
        let after = both.source.moved();
        // Pages 3 and 5 were changed within the stream, so they change twice more.
        let sent = changed.len() as u64;
        assert_eq!(after.unchanged_pages - before.unchanged_pages, RAM_PAGES - 2 - sent);
        assert_eq!(after.full_pages - before.full_pages, sent);
        let mut disk = vec![0; 4096];
        both.disk.read_exact_at(&mut disk, 1 << 20).unwrap();
        assert_eq!(disk, [2; 4096]);
        let read = read(&both.end());
        assert!(read.tail.ends_with(b"device state 1, later"), "loads: {loads}");
    }
}

/// Goal: pages of nowhere, told by the other host, are refused.
#[test]
fn a_changed_page_must_be_one() {
    let both = Both::new();
    for (block, page) in [(1, 0), (0, u32::try_from(RAM_PAGES).unwrap()), (255, u32::MAX)] {
        both.source.begin_retry(&[PagePlace { block, page }]).unwrap_err();
    }
    both.end();
}

/// Goal: a page that the guest gave back after it was sent is zero at the destination.
#[test]
fn a_page_that_the_guest_gave_back_is_zero_there() {
    const DISCARDED: u64 = 4;
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(RAM_BYTES).unwrap();
    for page in (0..RAM_PAGES).filter(|page| *page != DISCARDED) {
        memory.write_all_at(&[1], page * PAGE_BYTES as u64).unwrap();
    }
    let both = Both::with(&Fate { memory: Some(Arc::new(memory)), ..Fate::default() });
    whole(1).write(both.attach(1)).join().unwrap();
    both.expect(&mut no_fates(), vec!["RamDelivered"]);
    both.assert_pages(|page| match page {
        3 => content(3, 101),
        5 => content(5, 201),
        DISCARDED => vec![0; PAGE_BYTES],
        _ => content(page, 1),
    });
    both.end();
}
