//! Memory that is filled when the guest comes up, and freed when the outside asks for it.
//!
//! The guest's balloon driver reports freed memory to the host (free page reporting),
//! which takes it away: a migration sees pages that it has sent become zero without
//! a write.

use std::sync::{Mutex, PoisonError};

use crate::mix;
use crate::settings::Settings;

/// The memory, until it is freed.
#[derive(Debug)]
pub(crate) struct Filled(Mutex<Vec<u64>>);

impl Filled {
    /// Allocates and fills as much as the settings say.
    pub(crate) fn new(settings: &Settings) -> Self {
        let bytes = usize::try_from(settings.freed_mib << 20).unwrap_or(usize::MAX);
        let mut numbers = mix::Stream::new(mix::fresh_seed());
        Self(Mutex::new((0..bytes / size_of::<u64>()).map(|_| numbers.next()).collect()))
    }

    /// Gives the memory back to the guest's kernel.
    pub(crate) fn free(&self) {
        drop(std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)));
    }
}
