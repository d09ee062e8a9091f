//! Proof that a record is durable: a value that only a store's success makes.
//!
//! ```text
//! machine ─ Persist(record) ─► agent ─ persist(store, record) ─► Receipt ─► machine
//! ```
//!
//! **Invariants.** A [`Receipt`] has no other constructor, is not cloned and is
//! not read from anywhere: code that did not wait for its store has none. A
//! restarted agent gets one by writing again what it read, for what it read may
//! so far be only in the kernel's memory.

use super::Record;

/// Where records survive the host. An agent has one; tests may have others.
pub trait Store {
    /// Why a record is not, or perhaps not, durable.
    type Error;

    /// Writes a record, and whatever must be true together with it.
    ///
    /// On `Ok` it survives a power failure. On `Err` it may be there or not;
    /// whoever implements this then takes no more records until it was opened
    /// and read again.
    ///
    /// # Errors
    /// The store's.
    fn write_durably(&mut self, record: &Record) -> Result<(), Self::Error>;
}

/// Proof that a record is durable.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Receipt(Record);

impl Receipt {
    /// What is durable.
    #[must_use]
    pub fn record(&self) -> Record {
        self.0
    }
}

/// Writes a record; the only way to a [`Receipt`].
///
/// # Errors
/// The store's; nobody knows then what is durable: tell the machine so
/// (`RecordFailed`), and do not try again.
pub fn persist<S: Store>(store: &mut S, record: Record) -> Result<Receipt, S::Error> {
    store.write_durably(&record)?;
    Ok(Receipt(record))
}
