//! What joins two threads of a plane: bounded, so that a slow one slows the one
//! before it.
//!
//! **Invariant.** Nobody waits here for ever: closing a queue wakes both sides,
//! and whoever puts something in may change his mind.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Most items beyond its depth that a queue takes. Pieces of disk writes are 256 KiB at
/// most, and a mirror has 4 MiB of them under way: those of 16 disks.
const URGENT_COUNT_MAX: usize = 256;

/// A queue with one taker.
pub(crate) struct Queue<T> {
    items: Mutex<Items<T>>,
    filled: Condvar,
    room: Condvar,
    depth: usize,
}

struct Items<T> {
    waiting: VecDeque<T>,
    is_closed: bool,
}

/// Why something was not put in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotTaken;

/// What there was to take.
pub(crate) enum Taken<T> {
    Item(T),
    Nothing,
    Closed,
}

impl<T> Queue<T> {
    /// - `depth`: how many may wait.
    pub(crate) fn new(depth: usize) -> Self {
        let items = Items { waiting: VecDeque::new(), is_closed: false };
        Self { items: Mutex::new(items), filled: Condvar::new(), room: Condvar::new(), depth }
    }

    /// Puts an item in when there is room, unless the queue is closed or
    /// `gives_up`, which is asked whenever somebody calls [`Self::wake`].
    pub(crate) fn put(&self, item: T, gives_up: impl Fn() -> bool) -> Result<(), NotTaken> {
        let mut items = self.lock();
        while !items.is_closed && items.waiting.len() >= self.depth && !gives_up() {
            items = self.room.wait(items).unwrap_or_else(PoisonError::into_inner);
        }
        if gives_up() {
            return Err(NotTaken);
        }
        self.add(items, item)
    }

    /// Puts an item in when there is room, or when `is_urgent`, which is asked whenever
    /// somebody calls [`Self::wake`]; even then not more than [`URGENT_COUNT_MAX`] too many.
    pub(crate) fn put_or_squeeze(
        &self,
        item: T,
        is_urgent: impl Fn() -> bool,
    ) -> Result<(), NotTaken> {
        let is_full = |items: &mut Items<T>| {
            let depth = if is_urgent() { self.depth + URGENT_COUNT_MAX } else { self.depth };
            !items.is_closed && items.waiting.len() >= depth
        };
        let waited = self.room.wait_while(self.lock(), is_full);
        self.add(waited.unwrap_or_else(PoisonError::into_inner), item)
    }

    /// Puts an item in at once. For the few that are small and may not wait.
    pub(crate) fn put_at_once(&self, item: T) -> Result<(), NotTaken> {
        self.add(self.lock(), item)
    }

    fn add(&self, mut items: MutexGuard<'_, Items<T>>, item: T) -> Result<(), NotTaken> {
        if items.is_closed {
            return Err(NotTaken);
        }
        items.waiting.push_back(item);
        drop(items);
        self.filled.notify_one();
        Ok(())
    }

    /// Takes the next item, or waits a while for one.
    pub(crate) fn take(&self, patience: Duration) -> Taken<T> {
        let is_empty = |items: &mut Items<T>| items.waiting.is_empty() && !items.is_closed;
        let waited = self.filled.wait_timeout_while(self.lock(), patience, is_empty);
        let mut items = waited.unwrap_or_else(PoisonError::into_inner).0;
        match items.waiting.pop_front() {
            _ if items.is_closed => Taken::Closed,
            None => Taken::Nothing,
            Some(item) => {
                drop(items);
                self.room.notify_one();
                Taken::Item(item)
            }
        }
    }

    /// Has those who wait for room think again.
    pub(crate) fn wake(&self) {
        drop(self.lock());
        self.room.notify_all();
    }

    /// Nothing is put in or taken any more.
    pub(crate) fn close(&self) {
        self.lock().is_closed = true;
        self.filled.notify_all();
        self.room.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Items<T>> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn who_waits_for_room_may_give_up() {
        let queue = Arc::new(Queue::new(1));
        let given_up = Arc::new(AtomicBool::new(false));
        queue.put(1, || false).unwrap();
        queue.put_at_once(2).unwrap();
        let waiting = {
            let (queue, given_up) = (Arc::clone(&queue), Arc::clone(&given_up));
            std::thread::spawn(move || queue.put(3, || given_up.load(Ordering::SeqCst)))
        };
        given_up.store(true, Ordering::SeqCst);
        queue.wake();
        assert_eq!(waiting.join().unwrap(), Err(NotTaken));
        assert!(matches!(queue.take(Duration::ZERO), Taken::Item(1)));
        assert!(matches!(queue.take(Duration::ZERO), Taken::Item(2)));
        assert!(matches!(queue.take(Duration::ZERO), Taken::Nothing));
        queue.close();
        assert!(matches!(queue.take(Duration::from_secs(60)), Taken::Closed));
        assert_eq!(queue.put_at_once(4), Err(NotTaken));
    }
}
