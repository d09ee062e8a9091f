//! A journal on each disk: written past the guest's cache, read back, compared.
//!
//! ```text
//! disk:  [ ring of records ........ ][ filled at boot ........ ][ turning ][ untouched ]
//!          sequence s in slot s-1 mod n read back for ever        zeroed (BLKZEROOUT)
//!          flushed now and then                                   and filled in turn
//! ```
//!
//! A record says which sequence was durable when it was written. So whoever
//! reads the disk later, after a crash or at another host, knows what must be
//! there: every record from the ring up to the highest that is called durable.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::mix::{self, Stream};
use crate::page::{PAGE_BYTES, Page};
use crate::record::{Found, RECORD_BYTES, Record, look};
use crate::report::Report;
use crate::settings::Settings;

/// Most of a disk that is one ring.
const RING_BYTES_MAX: u64 = 16 << 20;
/// Most of a disk that is filled at boot.
const FILLED_BYTES_MAX: u64 = 128 << 20;
/// Blocks that are zeroed and filled in turn.
const TURNING_BLOCKS: u64 = TURNING_COUNT as u64;
const TURNING_COUNT: usize = 256;
/// Distance of the slots that tell whether a disk is new.
const PROBE_EVERY_SLOTS: usize = 32;
/// Blocks of one write at boot.
const CHUNK_BLOCKS: usize = 256;
/// Time between two batches of records.
const TICK: Duration = Duration::from_millis(20);
/// Batches after which the disk is flushed.
const FLUSH_EVERY: u64 = 10;
const BLOCK_BYTES: u64 = RECORD_BYTES as u64;

/// Starts a journal on each disk of the guest.
pub(crate) fn start(settings: &Settings, report: &Arc<Report>) -> io::Result<Vec<JoinHandle<()>>> {
    let mut threads = Vec::new();
    for letter in 'a'..='h' {
        let name = format!("vd{letter}");
        let path = format!("/dev/{name}");
        if !std::path::Path::new(&path).exists() || is_mounted(&path) {
            continue;
        }
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&path)?;
        let mut journal = Journal::open(file, &name)?;
        journal.recover(report)?;
        journal.fill()?;
        report.disks.fetch_add(1, Ordering::Relaxed);
        let (settings, report) = (*settings, Arc::clone(report));
        threads.push(crate::spawn(&name.clone(), move || {
            if let Err(error) = journal.run(&settings, &report) {
                report.fault(&format!("{name}: {error}"));
            }
        })?);
    }
    Ok(threads)
}

fn is_mounted(path: &str) -> bool {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    mounts.lines().any(|line| line.starts_with(path))
}

struct Journal {
    name: String,
    file: File,
    slots: u64,
    filled: std::ops::Range<u64>,
    turning: u64,
    seed: u64,
    /// Sequence of the next record
    next: u64,
    /// Highest sequence that is durable
    flushed: u64,
    /// Sequence of the first record that this boot wrote
    first: u64,
    turned: Turned,
    order: Stream,
}

/// What the turning blocks hold.
#[derive(Debug, Clone, Copy)]
enum Turned {
    /// Whatever an earlier boot left
    Unknown,
    /// Zeroes
    Zero,
    /// Zeroes but for this block, which is filled
    Filled(u64),
}

impl Journal {
    fn open(file: File, name: &str) -> io::Result<Self> {
        use std::io::Seek;
        let blocks = (&file).seek(io::SeekFrom::End(0))? / BLOCK_BYTES;
        let slots = (blocks / 4).min(RING_BYTES_MAX / BLOCK_BYTES);
        let filled_count = (blocks / 3).min(FILLED_BYTES_MAX / BLOCK_BYTES);
        let turning = slots + filled_count;
        if slots == 0 || turning + TURNING_BLOCKS > blocks {
            return Err(io::Error::other(format!("{name} is too small for a journal")));
        }
        let seed = mix::fresh_seed();
        Ok(Self {
            name: name.to_owned(),
            file,
            slots,
            filled: slots..turning,
            turning,
            seed,
            next: 1,
            flushed: 0,
            first: 1,
            turned: Turned::Unknown,
            order: Stream::new(seed),
        })
    }

    /// Reads what an earlier boot left, and finds what it lost.
    fn recover(&mut self, report: &Report) -> io::Result<()> {
        if self.is_new()? {
            return Ok(());
        }
        let mut block = Page::ZERO;
        let mut found = vec![None; usize::try_from(self.slots).unwrap_or(0)];
        let (mut highest, mut durable) = (0, 0);
        for slot in 0..self.slots {
            self.file.read_exact_at(block.bytes_mut(), slot * BLOCK_BYTES)?;
            match look(block.bytes_mut()) {
                Found::Record(record) if record.slot == slot => {
                    highest = highest.max(record.sequence);
                    durable = durable.max(record.flushed);
                    found[usize::try_from(slot).unwrap_or(0)] = Some(record.sequence);
                }
                Found::Zero => {}
                // A write that was under way when the host died may be torn; one
                // that was called durable may not, which is what counts below.
                Found::Record(_) | Found::Broken | Found::Foreign => {}
            }
        }
        for sequence in durable.saturating_sub(self.slots / 2).max(1)..=durable {
            let there = found[usize::try_from((sequence - 1) % self.slots).unwrap_or(0)];
            if there.is_none_or(|there| there < sequence) {
                report.fault(&format!("{}: durable record {sequence} is lost", self.name));
                break;
            }
        }
        self.next = highest + 1;
        self.first = self.next;
        self.flushed = highest;
        Ok(())
    }

    /// Whether no boot has used this disk: reading the whole ring then would only
    /// take time. Looks in many places, as any of them may be what was lost.
    fn is_new(&self) -> io::Result<bool> {
        let mut block = Page::ZERO;
        for slot in (0..self.slots).step_by(PROBE_EVERY_SLOTS) {
            self.file.read_exact_at(block.bytes_mut(), slot * BLOCK_BYTES)?;
            if matches!(look(block.bytes_mut()), Found::Record(_) | Found::Broken) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes known blocks, so that there is something to move.
    fn fill(&self) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK_BLOCKS * RECORD_BYTES + PAGE_BYTES];
        // O_DIRECT wants aligned memory.
        let skip = buffer.as_ptr().align_offset(PAGE_BYTES);
        let mut page = Page::ZERO;
        let mut at = self.filled.start;
        while at < self.filled.end {
            let count = (self.filled.end - at).min(CHUNK_BLOCKS as u64);
            for step in 0..count {
                page.fill(at + step, self.seed);
                let start = skip + usize::try_from(step).unwrap_or(0) * RECORD_BYTES;
                buffer[start..start + RECORD_BYTES].copy_from_slice(page.bytes_mut());
            }
            let length = usize::try_from(count).unwrap_or(0) * RECORD_BYTES;
            self.file.write_all_at(&buffer[skip..skip + length], at * BLOCK_BYTES)?;
            at += count;
        }
        self.file.sync_data()
    }

    fn run(mut self, settings: &Settings, report: &Report) -> io::Result<()> {
        let per_tick =
            u64::try_from(TICK.as_micros()).unwrap_or(0) * settings.disk_bytes_s / 1_000_000;
        let records = (per_tick / BLOCK_BYTES).max(1);
        for tick in 1_u64.. {
            for _ in 0..records {
                self.write()?;
                report.records_written.fetch_add(1, Ordering::Relaxed);
            }
            if tick % FLUSH_EVERY == 0 || report.is_stopping() {
                self.file.sync_data()?;
                self.flushed = self.next - 1;
                self.turn(report)?;
            }
            self.check_record(report)?;
            self.check_filled(report)?;
            report.blocks_checked.fetch_add(2, Ordering::Relaxed);
            if report.is_stopping() {
                return Ok(());
            }
            std::thread::sleep(TICK);
        }
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let slot = (self.next - 1) % self.slots;
        let record = Record {
            sequence: self.next,
            slot,
            flushed: self.flushed,
            time_ns: u64::try_from(now.as_nanos()).unwrap_or(0),
            seed: self.seed,
        };
        let mut block = Page::ZERO;
        record.write(block.bytes_mut());
        self.file.write_all_at(block.bytes_mut(), slot * BLOCK_BYTES)?;
        self.next += 1;
        Ok(())
    }

    /// Reads one of this boot's records that are still in the ring.
    fn check_record(&mut self, report: &Report) -> io::Result<()> {
        let oldest = self.first.max(self.next.saturating_sub(self.slots));
        let count = usize::try_from(self.next - oldest).unwrap_or(usize::MAX);
        let sequence = oldest + self.order.below(count) as u64;
        let slot = (sequence - 1) % self.slots;
        let mut block = Page::ZERO;
        self.file.read_exact_at(block.bytes_mut(), slot * BLOCK_BYTES)?;
        match look(block.bytes_mut()) {
            Found::Record(record) if record.sequence == sequence && record.seed == self.seed => {}
            found => report.fault(&format!(
                "{}: slot {slot} should hold record {sequence} and holds {found:?}",
                self.name
            )),
        }
        Ok(())
    }

    fn check_filled(&mut self, report: &Report) -> io::Result<()> {
        let count = usize::try_from(self.filled.end - self.filled.start).unwrap_or(0);
        let at = self.filled.start + self.order.below(count) as u64;
        let mut block = Page::ZERO;
        self.file.read_exact_at(block.bytes_mut(), at * BLOCK_BYTES)?;
        if let Err(fault) = block.check_filled(at, self.seed) {
            report.fault(&format!("{}: a block written at boot: {fault}", self.name));
        }
        Ok(())
    }

    /// Fills one of the turning blocks, or zeroes all; looks at what was there before.
    fn turn(&mut self, report: &Report) -> io::Result<()> {
        let mut block = Page::ZERO;
        if let Turned::Zero = self.turned {
            let at = self.turning + self.order.below(TURNING_COUNT) as u64;
            self.file.read_exact_at(block.bytes_mut(), at * BLOCK_BYTES)?;
            if let Err(fault) = block.check_zero(at) {
                report.fault(&format!("{}: a zeroed block: {fault}", self.name));
            }
            block.fill(at, self.seed);
            self.file.write_all_at(block.bytes_mut(), at * BLOCK_BYTES)?;
            self.turned = Turned::Filled(at);
            return Ok(());
        }
        if let Turned::Filled(at) = self.turned {
            self.file.read_exact_at(block.bytes_mut(), at * BLOCK_BYTES)?;
            if let Err(fault) = block.check_filled(at, self.seed) {
                report.fault(&format!("{}: a block filled in turn: {fault}", self.name));
            }
        }
        let range: [u64; 2] = [self.turning * BLOCK_BYTES, TURNING_BLOCKS * BLOCK_BYTES];
        // SAFETY: BLKZEROOUT reads two words from the pointer, which are there.
        let done = unsafe { libc::ioctl(self.file.as_raw_fd(), BLKZEROOUT, (&raw const range)) };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
        self.turned = Turned::Zero;
        Ok(())
    }
}

/// The kernel's request to write zeroes; `_IO(0x12, 127)`.
const BLKZEROOUT: libc::Ioctl = 0x127f;

#[cfg(test)]
mod tests {
    use super::*;

    fn journal(file: &File) -> Journal {
        Journal::open(file.try_clone().unwrap(), "vda").unwrap()
    }

    fn faults(report: &Report) -> u64 {
        report.json()["errors"].as_u64().unwrap()
    }

    /// Goal: what an earlier boot called durable is missed when it is lost, and
    /// what it had not yet flushed is not.
    #[test]
    fn lost_durable_records_are_found() {
        let path = std::env::temp_dir().join(format!("limosa-journal-{}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.unwrap();
        std::fs::remove_file(&path).unwrap();
        file.set_len(16 << 20).unwrap();
        let report = Report::new();
        let mut first = journal(&file);
        first.recover(&report).unwrap();
        for sequence in 1..=2_100 {
            first.write().unwrap();
            if sequence == 2_000 {
                first.flushed = 2_000;
            }
        }
        first.check_record(&report).unwrap();
        journal(&file).recover(&report).unwrap();
        assert_eq!(faults(&report), 0);
        let slots = first.slots;
        file.write_all_at(&[0; RECORD_BYTES], 2_099 % slots * BLOCK_BYTES).unwrap();
        journal(&file).recover(&report).unwrap();
        assert_eq!(faults(&report), 0, "record 2100 was never called durable");
        file.write_all_at(&[0; RECORD_BYTES], 1_989 % slots * BLOCK_BYTES).unwrap();
        journal(&file).recover(&report).unwrap();
        assert_eq!(faults(&report), 1);
    }

    /// Goal: when the ring's beginning is lost, the disk is not taken for a new
    /// one: the loss is told, and the sequence goes on.
    #[test]
    fn a_lost_beginning_is_found() {
        let path = std::env::temp_dir().join(format!("limosa-begin-{}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.unwrap();
        std::fs::remove_file(&path).unwrap();
        file.set_len(16 << 20).unwrap();
        let report = Report::new();
        let mut first = journal(&file);
        first.recover(&report).unwrap();
        for sequence in 1..=200 {
            first.write().unwrap();
            first.flushed = sequence;
        }
        // As much as a cluster of a disk image.
        file.write_all_at(&[0; 64 << 10], 0).unwrap();
        let mut second = journal(&file);
        second.recover(&report).unwrap();
        assert_eq!(faults(&report), 1);
        assert_eq!(second.next, 201);
    }
}
