//! Memory that is dirtied at a set rate and checks itself.
//!
//! ```text
//! pages:  [ touched: identity, counter, sum ............ ][ filled ][ zero ][ turning ]
//!           ▲ dirtied round and round, header checked       never     never   zero and
//!           └ swept bit by bit, whole pages                 written   written filled in turn
//! ```
//!
//! Each CPU of the guest has a thread and a share of all this, so that pages become
//! dirty on several at once, and a page never changes under its own check. What each
//! page must say is remembered apart from it: a page that is only old is found too.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::mix::{self, Stream};
use crate::page::{Fault, PAGE_BYTES, Page};
use crate::report::Report;
use crate::settings::Settings;
use crate::sweep::Sweeper;

/// Time between two batches.
const TICK: Duration = Duration::from_millis(10);
/// Pages that are compared whole in each batch.
const SWEEP_PAGES: usize = 8;
/// Pages of each special kind, in each share.
const SPECIAL_PAGES: usize = 128;
/// Most threads, and shares.
const SHARES_MAX: usize = 8;
/// Batches after which a turning page turns.
const TURN_EVERY: u64 = 4;
/// Longest debt of dirtying that is made up for: after a pause (a migration's,
/// mostly) the guest goes on as before instead of catching up.
const DEBT_MAX: Duration = Duration::from_millis(100);

struct Memory {
    /// Index of the first page: no other share has a page of the same index
    base: u64,
    pages: Vec<Page>,
    counters: Vec<u64>,
    special: Vec<Page>,
    /// For each turning page: filled with this seed, or zero
    turned: Vec<u64>,
    seed: u64,
    order: Stream,
    swept: usize,
}

/// Starts the threads that do it all.
pub(crate) fn start(settings: &Settings, report: &Arc<Report>) -> io::Result<()> {
    let shares = std::thread::available_parallelism().map_or(1, usize::from).min(SHARES_MAX);
    let bytes = usize::try_from(settings.memory_mib << 20).unwrap_or(usize::MAX);
    let pages = bytes / PAGE_BYTES / shares;
    for share in 0..shares {
        let (settings, report) = (*settings, Arc::clone(report));
        let sweeper = report.sweeps.join();
        crate::spawn("memory", move || {
            let memory = Memory::new((share * pages) as u64, pages, mix::fresh_seed());
            run(memory, settings.dirty_bytes_s / shares as u64, settings.qwords, &sweeper, &report);
        })?;
    }
    Ok(())
}

fn run(mut memory: Memory, dirty_bytes_s: u64, qwords: usize, sweeper: &Sweeper, report: &Report) {
    let mut next = 0;
    let mut owed_bytes = 0;
    let mut before = Instant::now();
    for tick in 0_u64.. {
        if report.is_stopping() {
            return;
        }
        let passed = before.elapsed().min(DEBT_MAX);
        before = Instant::now();
        let micros = u64::try_from(passed.as_micros()).unwrap_or(0);
        owed_bytes += dirty_bytes_s * micros / 1_000_000;
        let page_bytes = PAGE_BYTES as u64;
        let touches = owed_bytes / page_bytes;
        owed_bytes %= page_bytes;
        for _ in 0..touches {
            memory.touch(next, qwords, report);
            next = (next + 1) % memory.pages.len();
        }
        report.pages_touched.fetch_add(touches, Ordering::Relaxed);
        if tick % TURN_EVERY == 0 {
            memory.turn(report);
        }
        memory.sweep(SWEEP_PAGES, report);
        if let Some(round) = sweeper.due() {
            memory.sweep(memory.pages.len(), report);
            memory.check_special(report);
            sweeper.did(round);
        }
        std::thread::sleep(TICK.saturating_sub(before.elapsed()));
    }
}

impl Memory {
    fn new(base: u64, count: usize, seed: u64) -> Self {
        let mut pages = vec![Page::ZERO; count.max(1)];
        for (index, page) in (base..).zip(&mut pages) {
            page.begin(index, seed);
        }
        let mut special = vec![Page::ZERO; 3 * SPECIAL_PAGES];
        for (index, page) in (0..).zip(&mut special[..SPECIAL_PAGES]) {
            page.fill(index, seed);
        }
        let counters = vec![0; pages.len()];
        Self {
            base,
            pages,
            counters,
            special,
            turned: vec![0; SPECIAL_PAGES],
            seed,
            order: Stream::new(seed),
            swept: 0,
        }
    }

    fn index(&self, position: usize) -> u64 {
        self.base + position as u64
    }

    fn touch(&mut self, position: usize, qwords: usize, report: &Report) {
        let (index, counter) = (self.index(position), self.counters[position]);
        match self.pages[position].touch(index, counter, qwords) {
            Ok(()) => self.counters[position] = counter.wrapping_add(1),
            Err(fault) => self.found(position, &fault, report),
        }
    }

    /// Compares that many pages whole, going on where the last call ended.
    fn sweep(&mut self, count: usize, report: &Report) {
        for _ in 0..count {
            let position = self.swept;
            self.swept = (position + 1) % self.pages.len();
            let (index, counter) = (self.index(position), self.counters[position]);
            if let Err(fault) = self.pages[position].check(index, counter) {
                self.found(position, &fault, report);
            }
        }
        report.pages_checked.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// Reports a fault once: the page begins anew.
    fn found(&mut self, position: usize, fault: &Fault, report: &Report) {
        report.fault(&format!("memory: {fault}"));
        let index = self.index(position);
        self.pages[position].begin(index, self.seed);
        self.counters[position] = 0;
    }

    /// Turns one page from zero to filled or back.
    fn turn(&mut self, report: &Report) {
        let which = self.order.below(SPECIAL_PAGES);
        self.check_turning(which, report);
        let page = &mut self.special[2 * SPECIAL_PAGES + which];
        if self.turned[which] == 0 {
            let seed = self.order.next() | 1;
            page.fill(which as u64, seed);
            self.turned[which] = seed;
        } else {
            page.0.fill(0);
            self.turned[which] = 0;
        }
    }

    fn check_turning(&self, which: usize, report: &Report) {
        let page = &self.special[2 * SPECIAL_PAGES + which];
        let checked = match self.turned[which] {
            0 => page.check_zero(which as u64),
            seed => page.check_filled(which as u64, seed),
        };
        if let Err(fault) = checked {
            report.fault(&format!("memory: a page that turns: {fault}"));
        }
    }

    fn check_special(&self, report: &Report) {
        for (index, page) in (0..).zip(&self.special[..SPECIAL_PAGES]) {
            if let Err(fault) = page.check_filled(index, self.seed) {
                report.fault(&format!("memory: a page written once: {fault}"));
            }
        }
        for (index, page) in (0..).zip(&self.special[SPECIAL_PAGES..2 * SPECIAL_PAGES]) {
            if let Err(fault) = page.check_zero(index) {
                report.fault(&format!("memory: a page never written: {fault}"));
            }
        }
        for which in 0..SPECIAL_PAGES {
            self.check_turning(which, report);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(report: &Report) -> u64 {
        report.json()["errors"].as_u64().unwrap()
    }

    /// Goal: a calm memory has no faults, and each kind of damage is found.
    #[test]
    fn damage_of_each_kind_is_found() {
        let report = Report::new();
        let mut memory = Memory::new(640, 64, 5);
        for round in 0..200 {
            memory.touch(round % 64, 8, &report);
            memory.turn(&report);
        }
        memory.sweep(64, &report);
        memory.check_special(&report);
        assert_eq!(faults(&report), 0);
        memory.pages[3] = Page::ZERO;
        memory.special[0].0[9] ^= 1;
        memory.special[SPECIAL_PAGES].0[9] ^= 1;
        memory.special[2 * SPECIAL_PAGES].0[9] ^= 1;
        memory.sweep(64, &report);
        memory.check_special(&report);
        assert_eq!(faults(&report), 4);
    }
}
