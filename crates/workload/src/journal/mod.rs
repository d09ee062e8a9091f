//! A journal on each disk: written past the guest's cache, read back, compared.
//!
//! ```text
//! disk:  [ ring of records ........ ][ filled when new ....... ][ turning ][ untouched ]
//!          sequence s in slot s-1 mod n  never written again      zeroed (BLKZEROOUT)
//!          flushed now and then                                   and filled in turn
//! ```
//!
//! A record says which sequence was durable when it was written. So whoever
//! reads the disk later, after a crash or at another host, knows what must be
//! there: every record from the ring up to the highest that is called durable, and
//! all the rest of the disk, which follows from the seed in any record.
//!
//! A disk without a record is taken for a new one. Whether it may be new only the
//! outside knows: it is told how far each journal had come that was found.

mod compare;
mod layout;

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::mix::{self, Stream};
use crate::page::Page;
use crate::record::{Found, Record, look};
use crate::report::{DiskReport, Report};
use crate::settings::Settings;
use crate::sweep::Sweeper;
use layout::{CHUNK_BLOCKS, Disk, TURNING_COUNT};

/// Time between two batches of records.
const TICK: Duration = Duration::from_millis(20);
/// Blocks of a round over the whole disk that are compared after each batch.
const SWEEP_BLOCKS: u64 = 16 * CHUNK_BLOCKS as u64;
/// Batches after which the disk is flushed.
const FLUSH_EVERY: u64 = 10;

/// Starts a journal on each disk of the guest.
pub(crate) fn start(settings: &Settings, report: &Arc<Report>) -> io::Result<Vec<JoinHandle<()>>> {
    let mut threads = Vec::new();
    for letter in 'a'..='h' {
        let name = format!("vd{letter}");
        let path = format!("/dev/{name}");
        if !std::path::Path::new(&path).exists() || is_mounted(&path) {
            continue;
        }
        let mut journal = Journal::open(Disk::open(&name)?, report)?;
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
    disk: Disk,
    /// Drawn when the disk was new: all that it holds follows from it
    seed: u64,
    /// Sequence of the last record
    last: u64,
    turned: Turned,
    order: Stream,
    told: Arc<DiskReport>,
    sweeper: Sweeper,
    sweep: Option<Sweep>,
}

/// What the turning blocks hold.
#[derive(Debug, Clone, Copy)]
enum Turned {
    /// Whatever a new disk has there, or one that is wrong
    Unknown,
    /// Zeroes
    Zero,
    /// Zeroes but for this block, which is filled
    Filled(u64),
}

/// A round over the whole disk.
#[derive(Debug, Clone, Copy)]
struct Sweep {
    round: u64,
    /// The next block
    at: u64,
}

/// What an earlier boot left in the ring.
struct Ring {
    seed: u64,
    /// Highest sequence
    last: u64,
    /// Highest sequence that was called durable
    durable: u64,
    /// By slot
    found: Vec<Option<u64>>,
    /// Slots that hold a part of a record
    torn: Vec<u64>,
}

impl Journal {
    /// Takes a disk on: fills it when it is new; else finds what it lost.
    fn open(disk: Disk, report: &Report) -> io::Result<Self> {
        let ring = Ring::read(&disk, report)?;
        let (seed, last) =
            ring.as_ref().map_or((mix::fresh_seed(), 0), |ring| (ring.seed, ring.last));
        let mut journal = Self {
            seed,
            last,
            turned: Turned::Unknown,
            order: Stream::new(mix::fresh_seed()),
            told: report.add_disk(&disk.name, last),
            sweeper: report.sweeps.join(),
            sweep: None,
            disk,
        };
        match ring {
            None => journal.fill()?,
            Some(ring) => {
                journal.recover(&ring, report)?;
                journal.find_turned(report)?;
                journal.compare(0..journal.disk.blocks, report)?;
            }
        }
        journal.told.durable.store(last, Ordering::Relaxed);
        Ok(journal)
    }

    /// Fills a new disk, so that there is something to move. Before the first record:
    /// a disk that has one is filled.
    fn fill(&self) -> io::Result<()> {
        let mut chunk = vec![Page::ZERO; CHUNK_BLOCKS];
        let filled = &self.disk.filled;
        for at in filled.clone().step_by(CHUNK_BLOCKS) {
            let count = usize::try_from(filled.end - at).unwrap_or(CHUNK_BLOCKS).min(CHUNK_BLOCKS);
            for (index, page) in (at..).zip(&mut chunk[..count]) {
                page.fill(index, self.seed);
            }
            self.disk.write(at, &mut chunk[..count])?;
        }
        self.disk.flush()
    }

    /// Finds what the ring lost. What was never called durable may have been lost, and
    /// is written again: from now on, all of it must be there. Records are written one at
    /// a time, so that one write may be torn: it may have been over a durable record.
    fn recover(&self, ring: &Ring, report: &Report) -> io::Result<()> {
        let mut is_told = false;
        let next_slot = self.disk.slot_of(ring.last + 1);
        for (slot, found) in (0..).zip(&ring.found) {
            let wanted = self.disk.sequence_in(slot, ring.last);
            let Some(sequence) = wanted.filter(|_| *found != wanted) else { continue };
            let is_torn = slot == next_slot && ring.torn.contains(&slot);
            if sequence <= ring.durable && !is_torn && !is_told {
                report.fault(&format!("{}: durable record {sequence} is lost", self.disk.name));
                is_told = true;
            }
            self.put(sequence, ring.durable)?;
        }
        self.disk.flush()
    }

    /// Finds which of the turning blocks an earlier boot had filled: one at most.
    fn find_turned(&mut self, report: &Report) -> io::Result<()> {
        let mut filled = Vec::new();
        self.disk.each(self.disk.turning.clone(), |at, block| {
            if block.check_zero(at).is_err() {
                filled.push(at);
            }
            Ok(())
        })?;
        self.turned = match filled[..] {
            [] => Turned::Zero,
            [at] => Turned::Filled(at),
            _ => {
                let count = filled.len();
                report.fault(&format!("{}: {count} turning blocks are filled", self.disk.name));
                Turned::Unknown
            }
        };
        Ok(())
    }

    fn run(&mut self, settings: &Settings, report: &Report) -> io::Result<()> {
        let per_tick =
            u64::try_from(TICK.as_micros()).unwrap_or(0) * settings.disk_bytes_s / 1_000_000;
        let records = (per_tick / crate::record::RECORD_BYTES as u64).max(1);
        for tick in 1_u64.. {
            let ends = Instant::now() + TICK;
            for _ in 0..records {
                self.last += 1;
                self.put(self.last, self.told.durable.load(Ordering::Relaxed))?;
                report.records_written.fetch_add(1, Ordering::Relaxed);
            }
            if tick % FLUSH_EVERY == 0 || report.is_stopping() {
                self.disk.flush()?;
                self.told.durable.store(self.last, Ordering::Relaxed);
                self.turn(report)?;
            }
            self.look_somewhere(report)?;
            if report.is_stopping() {
                return Ok(());
            }
            self.sweep(report)?;
            if self.sweep.is_none() {
                std::thread::sleep(ends.saturating_duration_since(Instant::now()));
            }
        }
        Ok(())
    }

    /// Writes the record of that number.
    fn put(&self, sequence: u64, flushed: u64) -> io::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let slot = self.disk.slot_of(sequence);
        let record = Record {
            sequence,
            slot,
            flushed,
            time_ns: u64::try_from(now.as_nanos()).unwrap_or(0),
            seed: self.seed,
        };
        let mut block = [Page::ZERO];
        record.write(block[0].bytes_mut());
        self.disk.write(slot, &mut block)
    }

    /// Compares a record and a filled block, wherever.
    fn look_somewhere(&mut self, report: &Report) -> io::Result<()> {
        let parts = [0..self.disk.slots.min(self.last), self.disk.filled.clone()];
        for part in parts {
            let count = usize::try_from(part.end - part.start).unwrap_or(0);
            let at = part.start + self.order.below(count) as u64;
            self.compare(at..at + 1, report)?;
        }
        Ok(())
    }

    /// Goes on with the round that was asked for, if there is one.
    fn sweep(&mut self, report: &Report) -> io::Result<()> {
        if self.sweep.is_none() {
            self.sweep = self.sweeper.due().map(|round| Sweep { round, at: 0 });
        }
        let Some(Sweep { round, at }) = self.sweep else { return Ok(()) };
        let until = (at + SWEEP_BLOCKS).min(self.disk.blocks);
        self.compare(at..until, report)?;
        self.sweep = (until < self.disk.blocks).then_some(Sweep { round, at: until });
        if self.sweep.is_none() {
            self.sweeper.did(round);
        }
        Ok(())
    }

    /// Fills one of the turning blocks, or zeroes all; looks at what was there before.
    fn turn(&mut self, report: &Report) -> io::Result<()> {
        if let Turned::Zero = self.turned {
            let at = self.disk.turning.start + self.order.below(TURNING_COUNT) as u64;
            self.compare(at..at + 1, report)?;
            let mut block = [Page::ZERO];
            block[0].fill(at, self.seed);
            self.disk.write(at, &mut block)?;
            self.turned = Turned::Filled(at);
            return Ok(());
        }
        if let Turned::Filled(at) = self.turned {
            self.compare(at..at + 1, report)?;
        }
        self.disk.zero_turning()?;
        self.turned = Turned::Zero;
        Ok(())
    }

    /// Compares blocks with what they must hold, and reports those that differ.
    fn compare(&self, blocks: Range<u64>, report: &Report) -> io::Result<()> {
        let count = blocks.end - blocks.start;
        self.disk.each(blocks, |at, block| {
            if let Err(fault) = self.compare_block(at, block) {
                report.fault(&format!("{}: block {at}: {fault}", self.disk.name));
            }
            Ok(())
        })?;
        report.blocks_checked.fetch_add(count, Ordering::Relaxed);
        Ok(())
    }
}

impl Ring {
    /// Reads the ring; `None` when no record is in it.
    fn read(disk: &Disk, report: &Report) -> io::Result<Option<Self>> {
        let mut ring: Option<Self> = None;
        let mut found = vec![None; usize::try_from(disk.slots).unwrap_or(0)];
        let mut torn = Vec::new();
        disk.each(0..disk.slots, |slot, block| {
            let record = match look(block.bytes_mut()) {
                Found::Record(record) => record,
                Found::Broken => {
                    torn.push(slot);
                    return Ok(());
                }
                Found::Zero | Found::Foreign => return Ok(()),
            };
            let (seed, last, durable) = ring
                .as_ref()
                .map_or((record.seed, 0, 0), |ring| (ring.seed, ring.last, ring.durable));
            if record.seed != seed || record.slot != slot {
                report.fault(&format!("{}: slot {slot} holds {record:?}", disk.name));
                return Ok(());
            }
            found[usize::try_from(slot).unwrap_or(0)] = Some(record.sequence);
            let (last, durable) = (last.max(record.sequence), durable.max(record.flushed));
            ring = Some(Self { seed, last, durable, found: Vec::new(), torn: Vec::new() });
            Ok(())
        })?;
        Ok(ring.map(|ring| Self { found, torn, ..ring }))
    }
}

#[cfg(test)]
mod tests;
