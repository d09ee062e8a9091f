//! The bounded queue between two threads of a plane: a slow consumer slows its producer.
//!
//! **Invariant.** No call blocks forever: `close` wakes both ends, and `push` can be
//! abandoned.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Most items beyond its depth that a queue takes. Pieces of disk writes are 256 KiB at
/// most, and a mirror has 4 MiB of them under way: those of 16 disks.
const URGENT_COUNT_MAX: usize = 256;

/// A queue with one consumer.
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

/// The queue is closed, or the push was abandoned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotPushed;

/// Result of a pop.
pub(crate) enum Popped<T> {
    Item(T),
    /// The queue stayed empty for the whole wait.
    Empty,
    Closed,
}

impl<T> Queue<T> {
    /// - `depth`: how many may wait.
    pub(crate) fn new(depth: usize) -> Self {
        let items = Items { waiting: VecDeque::new(), is_closed: false };
        Self { items: Mutex::new(items), filled: Condvar::new(), room: Condvar::new(), depth }
    }

    /// Waits for room and adds an item, unless the queue is closed or `gives_up`, which is
    /// evaluated at every [`Self::wake`].
    pub(crate) fn push(&self, item: T, gives_up: impl Fn() -> bool) -> Result<(), NotPushed> {
        let mut items = self.lock();
        while !items.is_closed && items.waiting.len() >= self.depth && !gives_up() {
            items = self.room.wait(items).unwrap_or_else(PoisonError::into_inner);
        }
        if gives_up() {
            return Err(NotPushed);
        }
        self.add(items, item)
    }

    /// Adds an item when there is room, or past the depth when `is_urgent`, which is
    /// evaluated at every [`Self::wake`]; at most [`URGENT_COUNT_MAX`] past it.
    pub(crate) fn push_or_else(
        &self,
        item: T,
        is_urgent: impl Fn() -> bool,
    ) -> Result<(), NotPushed> {
        let is_full = |items: &mut Items<T>| {
            let depth = if is_urgent() { self.depth + URGENT_COUNT_MAX } else { self.depth };
            !items.is_closed && items.waiting.len() >= depth
        };
        let waited = self.room.wait_while(self.lock(), is_full);
        self.add(waited.unwrap_or_else(PoisonError::into_inner), item)
    }

    /// Adds an item without waiting for room. For the few that are small and must not wait.
    pub(crate) fn push_at_once(&self, item: T) -> Result<(), NotPushed> {
        self.add(self.lock(), item)
    }

    fn add(&self, mut items: MutexGuard<'_, Items<T>>, item: T) -> Result<(), NotPushed> {
        if items.is_closed {
            return Err(NotPushed);
        }
        items.waiting.push_back(item);
        drop(items);
        self.filled.notify_one();
        Ok(())
    }

    /// Removes the next item, or waits for one.
    pub(crate) fn pop(&self, patience: Duration) -> Popped<T> {
        let is_empty = |items: &mut Items<T>| items.waiting.is_empty() && !items.is_closed;
        let waited = self.filled.wait_timeout_while(self.lock(), patience, is_empty);
        let mut items = waited.unwrap_or_else(PoisonError::into_inner).0;
        match items.waiting.pop_front() {
            _ if items.is_closed => Popped::Closed,
            None => Popped::Empty,
            Some(item) => {
                drop(items);
                self.room.notify_one();
                Popped::Item(item)
            }
        }
    }

    /// Makes producers that wait for room evaluate their condition.
    pub(crate) fn wake(&self) {
        drop(self.lock());
        self.room.notify_all();
    }

    /// Ends the queue: every push fails, every pop reports `Closed`.
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
    fn a_push_that_waits_for_room_can_be_abandoned() {
        let queue = Arc::new(Queue::new(1));
        let given_up = Arc::new(AtomicBool::new(false));
        queue.push(1, || false).unwrap();
        queue.push_at_once(2).unwrap();
        let waiting = {
            let (queue, given_up) = (Arc::clone(&queue), Arc::clone(&given_up));
            std::thread::spawn(move || queue.push(3, || given_up.load(Ordering::SeqCst)))
        };
        given_up.store(true, Ordering::SeqCst);
        queue.wake();
        assert_eq!(waiting.join().unwrap(), Err(NotPushed));
        assert!(matches!(queue.pop(Duration::ZERO), Popped::Item(1)));
        assert!(matches!(queue.pop(Duration::ZERO), Popped::Item(2)));
        assert!(matches!(queue.pop(Duration::ZERO), Popped::Empty));
        queue.close();
        assert!(matches!(queue.pop(Duration::from_secs(60)), Popped::Closed));
        assert_eq!(queue.push_at_once(4), Err(NotPushed));
    }
}
