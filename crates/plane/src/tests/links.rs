//! Links that break at every byte, fall silent, and come back.

use super::*;

/// RAM in rounds and a disk under way at the same time.
fn busy(both: &Both, numbers: &mut Numbers) -> (JoinHandle<()>, JoinHandle<usize>) {
    let mut stream = Stream::new();
    stream.section(2, &versions(0..RAM_PAGES, 1));
    for version in 2..6 {
        let from = numbers.below(RAM_PAGES - 200);
        stream.section(2, &versions(from..from + 200, version));
    }
    stream.section(2, &versions(0..RAM_PAGES, 6));
    stream.section(3, &[(7, None), (8, Some(content(8, 9)))]);
    stream.0.extend_from_slice(b"device state");
    let qemu = stream.write(both.attach(1));
    let mut sink = both.source.disk_sink(0).unwrap();
    let places: Vec<u64> = (0..40).map(|_| numbers.below(DISK_BYTES - 100_000)).collect();
    let mirror = std::thread::spawn(move || {
        for (index, place) in places.iter().enumerate() {
            let byte = u8::try_from(index + 1).unwrap();
            sink.write(*place, vec![byte; 100_000]).unwrap();
        }
        places.len()
    });
    (qemu, mirror)
}

fn assert_arrived(both: &Both) {
    both.assert_pages(|page| match page {
        7 => vec![0; PAGE_BYTES],
        8 => content(8, 9),
        _ => content(page, 6),
    });
}

/// Goal: wherever connections are cut, everything arrives, each frame once.
/// Method: cuts at seeded bytes, both ways counted together; the digests of disk
/// operations are chains, so they differ when one is applied twice or left out.
#[test]
fn cuts_at_any_byte_change_nothing() {
    let mut cut_count = 0;
    for seed in 0..30 {
        let mut numbers = Numbers(seed);
        let next = move |numbers: &mut Numbers| {
            // Short ones, so that resuming itself is cut too, and long ones.
            let most = [40, 500, 20_000, 200_000][usize::try_from(numbers.below(4)).unwrap()];
            Fate::cut_after(numbers.below(most))
        };
        let first = next(&mut numbers);
        let mut later = Numbers(seed + 1000);
        let fates: Vec<Fate> = (0..12).map(|_| next(&mut later)).collect();
        let both = Both::with(&first);
        let (qemu, mirror) = busy(&both, &mut numbers);
        let barrier = std::thread::scope(|scope| {
            let barrier = scope.spawn(|| {
                mirror.join().unwrap();
                both.source.start_disk_barrier().unwrap();
            });
            cut_count += both.expect(&mut fates.into_iter(), vec!["RamDelivered", "DisksEqual"]);
            barrier.join()
        });
        barrier.unwrap();
        qemu.join().unwrap();
        assert_arrived(&both);
        let operations = both.noted.lock().unwrap().len();
        let moved = both.source.moved();
        assert!(moved.resent_bytes < moved.wire_bytes, "seed {seed}: {moved:?}");
        assert!(operations >= 40, "seed {seed}");
        // The release may be on its way.
        let got = both_until_released(both);
        assert!(got.ends_with(b"device state"), "seed {seed}");
    }
    assert!(cut_count > 150, "only {cut_count} cuts");
}

/// Lets the last frame arrive, over as many links as are lost, then ends both.
fn both_until_released(both: Both) -> Vec<u8> {
    loop {
        while let Ok(event) = both.source_events.try_recv() {
            if matches!(event, PlaneEvent::LinkLost(_)) {
                both.reconnect(&Fate::default());
            }
        }
        match both.destination_events.recv_timeout(Duration::from_millis(10)) {
            Ok(PlaneEvent::RamDelivered) => return both.end(),
            Ok(PlaneEvent::Failed(error)) => panic!("{error:?}"),
            _ => {}
        }
    }
}

/// Goal: what the destination has is not sent again.
#[test]
fn only_what_is_missing_is_resent() {
    let both = Both::new();
    let mut sink = both.source.disk_sink(0).unwrap();
    sink.write(0, (0..=250).cycle().take(1 << 20).collect()).unwrap();
    both.start_disk_barrier();
    both.expect(&mut no_fates(), vec!["DisksEqual"]);
    both.reconnect(&Fate::default());
    sink.write(1 << 20, vec![7; 10]).unwrap();
    both.start_disk_barrier();
    both.expect_there("LinkBack");
    while !matches!(both.source_events.recv_timeout(WAIT), Ok(PlaneEvent::DisksEqual(_))) {}
    let moved = both.source.moved();
    // A frame that was just being made when the link went counts as sent again.
    assert!(moved.resent_bytes < 200, "{moved:?}");
    assert_eq!(both.noted.lock().unwrap().len(), 5);
    both.end();
}

/// Goal: a cut while a flush is pending neither loses nor repeats the barrier.
#[test]
fn a_cut_while_a_disk_barrier_is_pending() {
    let both = Both::new();
    both.slow_flush.store(true, Ordering::SeqCst);
    let mut sink = both.source.disk_sink(0).unwrap();
    for region in 0..8 {
        sink.write(region << 20, vec![3; 4096]).unwrap();
    }
    // Who flushes holds the disk.
    while both.noted.lock().unwrap().len() < 8 {
        std::thread::sleep(Duration::from_millis(2));
    }
    both.start_disk_barrier();
    for _ in 0..2 {
        both.reconnect(&Fate::default());
    }
    both.slow_flush.store(false, Ordering::SeqCst);
    both.expect(&mut no_fates(), vec!["DisksEqual"]);
    both.expect_there("DisksEqual");
    assert_eq!(both.noted.lock().unwrap().len(), 8);
    // The next barrier is another one.
    sink.write(0, vec![4; 4096]).unwrap();
    both.start_disk_barrier();
    both.expect(&mut no_fates(), vec!["DisksEqual"]);
    both.end();
}

/// Goal: a peer that is silent is as good as gone, whichever way the silence is;
/// one that has nothing to say is not.
#[test]
fn silence_is_noticed_on_both_sides() {
    for (source_is_mute, destination_is_mute) in [(true, false), (false, true), (true, true)] {
        let fate = Fate::default();
        let both = Both::with(&fate);
        // Long enough for a side without keep-alives to be given up.
        std::thread::sleep(SILENCE * 2);
        assert!(both.source_events.try_recv().is_err(), "idle is not silent");
        assert!(both.source.failure().is_none());
        fate.source_is_mute.store(source_is_mute, Ordering::SeqCst);
        fate.destination_is_mute.store(destination_is_mute, Ordering::SeqCst);
        let event = both.source_events.recv_timeout(WAIT).unwrap();
        assert!(matches!(event, PlaneEvent::LinkLost(_)), "{event:?}");
        both.expect_there("LinkLost");
        assert!(both.source.failure().is_none(), "it may come back");
        let (qemu, mirror) = busy(&both, &mut Numbers(1));
        both.reconnect(&Fate::default());
        mirror.join().unwrap();
        both.start_disk_barrier();
        both.expect(&mut no_fates(), vec!["RamDelivered", "DisksEqual"]);
        assert!(both.source.failure().is_none());
        qemu.join().unwrap();
        assert_arrived(&both);
        both.expect_there("RamDelivered");
        both.end();
    }
}
