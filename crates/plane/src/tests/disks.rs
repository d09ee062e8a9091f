//! When the destination's disks are flushed, and who waits for it.

use super::*;

/// Goal: the last pages are not held up by a disk that is slow to flush, and
/// nobody is told that disks are there before they are flushed.
#[test]
fn pages_do_not_wait_for_a_flush() {
    let both = Both::new();
    both.slow_flush.store(true, Ordering::SeqCst);
    let mut sink = both.source.disk_sink(0).unwrap();
    for region in 0..8 {
        sink.write(region << 20, vec![3; 4096]).unwrap();
    }
    both.start_disk_barrier();
    let mut stream = Stream::new();
    stream.section(3, &versions(0..RAM_PAGES, 1));
    stream.write(both.attach(1)).join().unwrap();
    both.expect(&mut no_fates(), vec!["RamDelivered"]);
    both.expect_there("RamDelivered");
    assert!(both.source_events.try_recv().is_err());
    assert_eq!(both.flush_count.load(Ordering::SeqCst), 0);
    both.slow_flush.store(false, Ordering::SeqCst);
    both.expect(&mut no_fates(), vec!["DisksEqual"]);
    assert_eq!(both.flush_count.load(Ordering::SeqCst), 1, "once for all channels");
    both.end();
}

/// Goal: a disk that is durable as it stands costs the blackout nothing; an empty
/// one counts as written.
#[test]
fn a_clean_disk_is_flushed_once() {
    let both = Both::new();
    both.start_disk_barrier();
    both.expect(&mut no_fates(), vec!["DisksEqual"]);
    assert_eq!(both.flush_count.load(Ordering::SeqCst), 1);
    both.start_disk_barrier();
    both.expect(&mut no_fates(), vec!["DisksEqual"]);
    assert_eq!(both.flush_count.load(Ordering::SeqCst), 1);
    let mut sink = both.source.disk_sink(0).unwrap();
    sink.write(0, vec![3; 4096]).unwrap();
    both.start_disk_barrier();
    both.expect(&mut no_fates(), vec!["DisksEqual"]);
    assert_eq!(both.flush_count.load(Ordering::SeqCst), 2);
    both.end();
}

/// Goal: what is written is flushed before anybody waits for it, and that takes
/// the place of no barrier's flush.
#[test]
fn a_written_disk_is_flushed_early() {
    let both = Both::new();
    let mut sink = both.source.disk_sink(0).unwrap();
    sink.write(0, vec![3; 4096]).unwrap();
    while both.early_flush_count.load(Ordering::SeqCst) == 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(both.flush_count.load(Ordering::SeqCst), 0);
    both.start_disk_barrier();
    both.expect(&mut no_fates(), vec!["DisksEqual"]);
    assert_eq!(both.flush_count.load(Ordering::SeqCst), 1);
    both.end();
}

/// Goal: an operation that two channels could do in either order is refused.
#[test]
fn an_operation_over_two_regions_is_refused() {
    use limosa_protocol::frame::{DiskHeader, FrameHeader, FrameKind};
    for (offset_bytes, is_refused) in [((1 << 20) - 4096, false), ((1 << 20) - 512, true)] {
        let both = Both::new();
        let head = DiskHeader { disk: 0, may_unmap: true, offset_bytes, length_bytes: 4096 };
        let payload = head.encode();
        let bytes = u32::try_from(payload.len()).unwrap();
        let kind = FrameKind::DiskZero;
        let header = FrameHeader { kind, packed: false, wire_bytes: bytes, plain_bytes: bytes };
        let [(mut ours, ack_in), (theirs, ack_out)] = connections(&Fate::default());
        both.destination.reconnect(theirs, ack_out).unwrap();
        ours[0].io.write_all(&[&header.encode()[..], &payload].concat()).unwrap();
        let failed = loop {
            match both.destination_events.recv_timeout(WAIT) {
                Ok(PlaneEvent::Failed(error)) => break Some(error.to_string()),
                _ if both.noted.lock().unwrap().len() == 1 => break None,
                _ => {}
            }
        };
        assert_eq!(failed.is_some(), is_refused, "{failed:?}");
        drop((ours, ack_in));
    }
}
