//! Comparisons of everything, on demand.
//!
//! Whoever holds a part of what is compared joins once, and does a whole round
//! over its part for each one that is asked for. A round is done when all did it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Rounds that were asked for, and those that were done.
#[derive(Debug, Default)]
pub(crate) struct Sweeps {
    asked: Arc<AtomicU64>,
    done: Mutex<Vec<Arc<AtomicU64>>>,
}

/// One who does rounds over a part.
#[derive(Debug)]
pub(crate) struct Sweeper {
    asked: Arc<AtomicU64>,
    done: Arc<AtomicU64>,
}

impl Sweeps {
    /// From now on, rounds wait for one more.
    pub(crate) fn join(&self) -> Sweeper {
        // Rounds asked for before are not its own.
        let done = Arc::new(AtomicU64::new(self.asked.load(Ordering::Acquire)));
        self.lock().push(Arc::clone(&done));
        Sweeper { asked: Arc::clone(&self.asked), done }
    }

    /// Asks for a round; returns its number.
    pub(crate) fn ask(&self) -> u64 {
        self.asked.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Number of the last round that all have done.
    pub(crate) fn done(&self) -> u64 {
        self.lock().iter().map(|one| one.load(Ordering::Acquire)).min().unwrap_or(0)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Arc<AtomicU64>>> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sweeper {
    /// The round that must be done next, if one was asked for. One round serves
    /// all who asked before it began.
    pub(crate) fn due(&self) -> Option<u64> {
        let asked = self.asked.load(Ordering::Acquire);
        (asked > self.done.load(Ordering::Acquire)).then_some(asked)
    }

    /// A round that was due when it began is done.
    pub(crate) fn did(&self, round: u64) {
        self.done.store(round, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a round is done when the last one did it, and one round serves all
    /// who asked before it began, but none who asked later.
    #[test]
    fn a_round_waits_for_all() {
        let sweeps = Sweeps::default();
        let (first, second) = (sweeps.join(), sweeps.join());
        assert_eq!(first.due(), None);
        assert_eq!((sweeps.ask(), sweeps.ask()), (1, 2));
        let round = first.due().unwrap();
        assert_eq!(sweeps.ask(), 3);
        first.did(round);
        assert_eq!((first.due(), sweeps.done()), (Some(3), 0));
        second.did(second.due().unwrap());
        assert_eq!(sweeps.done(), 2);
        assert_eq!(sweeps.join().due(), None);
    }
}
