//! Disks that lost something, in each of their parts.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::*;
use crate::page::PAGE_BYTES;

const DISK_BYTES: u64 = 16 << 20;

/// An empty disk without a name.
fn disk(name: &str) -> File {
    let path = std::env::temp_dir().join(format!("limosa-{name}-{}", std::process::id()));
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
    let file = file.unwrap();
    std::fs::remove_file(&path).unwrap();
    file.set_len(DISK_BYTES).unwrap();
    file
}

fn open(file: &File, report: &Report) -> Journal {
    Journal::open(Disk::of(file.try_clone().unwrap(), "vda").unwrap(), report).unwrap()
}

fn wreck(file: &File, block: u64, count: usize) {
    file.write_all_at(&vec![0; count * PAGE_BYTES], block * PAGE_BYTES as u64).unwrap();
}

fn faults(report: &Report) -> u64 {
    report.json()["errors"].as_u64().unwrap()
}

/// A disk with so many records, of which so many are durable.
fn written(name: &str, count: u64, durable: u64) -> (File, u64) {
    let file = disk(name);
    let report = Report::new();
    let mut journal = open(&file, &report);
    for sequence in 1..=count {
        journal.put(sequence, durable.min(sequence - 1)).unwrap();
    }
    journal.last = count;
    journal.compare(0..journal.disk.blocks, &report).unwrap();
    assert_eq!(faults(&report), 0);
    (file, journal.disk.slots)
}

/// Goal: what an earlier boot called durable is missed when it is lost; what it had
/// not yet flushed is not, and is there from then on.
#[test]
fn lost_durable_records_are_found() {
    let (file, slots) = written("durable", 2_100, 2_000);
    let report = Report::new();
    wreck(&file, (2_050 - 1) % slots, 1);
    let journal = open(&file, &report);
    assert_eq!((faults(&report), journal.last), (0, 2_100));
    wreck(&file, (1_990 - 1) % slots, 1);
    open(&file, &report);
    assert_eq!(faults(&report), 1);
}

/// Goal: a write that was torn over a durable record, after the ring's first lap, is no
/// loss; a torn record elsewhere is one.
#[test]
fn only_the_write_under_way_may_be_torn() {
    let (file, slots) = written("torn", 2_100, 2_100);
    for (sequence, so_far) in [(2_101, 0), (2_000, 1)] {
        let at = (sequence - 1) % slots * PAGE_BYTES as u64;
        file.write_all_at(&[9; 512], at + 512).unwrap();
        let report = Report::new();
        let journal = open(&file, &report);
        assert_eq!((faults(&report), journal.last), (so_far, 2_100));
    }
}

/// Goal: after a boot one turning block may be filled, and no more; what turns is
/// compared with what it must be now.
#[test]
fn what_turns_is_known() {
    let (file, _) = written("turning", 20, 19);
    let report = Report::new();
    let mut journal = open(&file, &report);
    let at = journal.disk.turning.start + 3;
    let mut block = [Page::ZERO];
    block[0].fill(at, journal.seed);
    journal.disk.write(at, &mut block).unwrap();
    let reopened = open(&file, &report);
    assert!(matches!(reopened.turned, Turned::Filled(found) if found == at));
    assert_eq!(faults(&report), 0);
    // A filled block that should be zero, and a zero one that should be filled.
    for (turned, wrong) in [(Turned::Zero, at), (Turned::Filled(at + 1), at + 1)] {
        let before = faults(&report);
        journal.turned = turned;
        journal.compare(wrong..wrong + 1, &report).unwrap();
        assert_eq!(faults(&report), before + 1);
    }
    block[0].fill(at + 1, journal.seed);
    journal.disk.write(at + 1, &mut block).unwrap();
    let report = Report::new();
    open(&file, &report);
    assert_eq!(faults(&report), 1);
}

/// Goal: when the ring's beginning is lost, the disk is not taken for a new one:
/// the loss is told, and the sequence goes on.
#[test]
fn a_lost_beginning_is_found() {
    let (file, _) = written("begin", 200, 199);
    let report = Report::new();
    // As much as a cluster of a disk image.
    wreck(&file, 0, 16);
    let journal = open(&file, &report);
    assert_eq!((faults(&report), journal.last), (1, 200));
}

/// Goal: an emptied disk is taken for a new one, and tells that nothing was found.
#[test]
fn an_emptied_disk_reports_that_nothing_was_found() {
    let (file, slots) = written("emptied", 20, 19);
    let recovered = |report: &Report| report.json()["disks"][0]["recovered"].as_u64().unwrap();
    let report = Report::new();
    open(&file, &report);
    assert_eq!(recovered(&report), 20);
    wreck(&file, 0, usize::try_from(slots).unwrap());
    let report = Report::new();
    open(&file, &report);
    assert_eq!((recovered(&report), faults(&report)), (0, 0));
}

/// Goal: a block that is wrong is found in any part of the disk, at the next boot and
/// by a round that somebody asks for.
#[test]
fn a_wrong_block_is_found_anywhere() {
    let (file, slots) = written("anywhere", 3_000, 2_999);
    let report = Report::new();
    let mut journal = open(&file, &report);
    let (filled, turning) = (journal.disk.filled.clone(), journal.disk.turning.clone());
    let wrong = [slots - 1, filled.start, filled.end - 1, turning.start, turning.end];
    for (at, so_far) in wrong.into_iter().zip(0..) {
        assert_eq!(faults(&report), so_far);
        let mut block = [Page::ZERO];
        journal.disk.read(at, &mut block).unwrap();
        block[0].0[17] ^= 4;
        journal.disk.write(at, &mut block).unwrap();
        let round = report.sweeps.ask();
        while report.sweeps.done() < round {
            journal.sweep(&report).unwrap();
        }
        assert_eq!(faults(&report), so_far + 1, "block {at}");
        assert_eq!(journal.sweeper.due(), None);
        block[0].0[17] ^= 4;
        journal.disk.write(at, &mut block).unwrap();
    }
    wreck(&file, filled.start + 9, 1);
    let report = Report::new();
    open(&file, &report);
    assert_eq!(faults(&report), 1);
}

/// Goal: a slot is expected to hold the latest record that belongs there.
#[test]
fn slots_hold_the_latest_record() {
    let disk = Disk::of(disk("slots"), "vda").unwrap();
    for (slot, last, wanted) in [
        (0, 0, None),
        (0, 1, Some(1)),
        (1, 1, None),
        (disk.slots - 1, disk.slots, Some(disk.slots)),
        (0, disk.slots, Some(1)),
        (0, disk.slots + 1, Some(disk.slots + 1)),
        (1, disk.slots + 1, Some(2)),
    ] {
        assert_eq!(disk.sequence_in(slot, last), wanted, "slot {slot} after {last}");
    }
}
