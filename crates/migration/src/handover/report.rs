//! Reports what operators should know of a handover that cannot go on by itself.

use super::lock::Parties;
use super::status::Status;
use crate::job::Job;
use limosa_host::store::{MigrationRecord, StoreError};

/// Reports a doubt when it comes or changes, and that it is over.
pub(super) fn report_doubt(job: &Job, before: Status, now: Status) {
    if (before.doubt, before.peer) == (now.doubt, now.peer) {
        return;
    }
    match now.doubt {
        Some(doubt) => {
            let text = Parties::of(&job.view()).doubt_text(doubt, now.peer);
            tracing::warn!(migration = %job.id(), reason = text, "in doubt");
            // A VM that is ours and off has ended its migration as far as an
            // operator who waits for it is concerned.
            if !now.is_ours {
                job.report_in_doubt(text);
            }
        }
        None if before.doubt.is_some() => job.clear_doubt(),
        None => {}
    }
}

/// Logs a record that may or may not be durable.
pub(super) fn report_unknown(record: &MigrationRecord, error: &StoreError) {
    tracing::error!(
        migration = %record.view.id,
        error = limosa_host::failure::chain(error),
        "a record of the handover may or may not be written; nothing more is done until a restart"
    );
}
