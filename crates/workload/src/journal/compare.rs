//! What a block must hold.

use super::{Journal, Turned};
use crate::page::Page;
use crate::record::{Found, look};

impl Journal {
    /// Compares one block with what it must hold now; says what is wrong.
    pub(super) fn compare_block(&self, at: u64, block: &mut Page) -> Result<(), String> {
        if at < self.disk.slots {
            return self.compare_record(at, block);
        }
        let must_be_filled = match self.turned {
            _ if self.disk.filled.contains(&at) => true,
            Turned::Filled(filled) => at == filled,
            Turned::Zero => false,
            Turned::Unknown => self.disk.turning.contains(&at) && block.check_zero(at).is_err(),
        };
        let compared =
            if must_be_filled { block.check_filled(at, self.seed) } else { block.check_zero(at) };
        compared.map_err(|fault| fault.to_string())
    }

    fn compare_record(&self, slot: u64, block: &mut Page) -> Result<(), String> {
        let wanted = self.disk.sequence_in(slot, self.last);
        match (look(block.bytes_mut()), wanted) {
            (Found::Record(record), Some(sequence))
                if record.sequence == sequence && record.seed == self.seed =>
            {
                Ok(())
            }
            (Found::Zero, None) => Ok(()),
            (found, wanted) => Err(format!("should hold record {wanted:?} and holds {found:?}")),
        }
    }
}
