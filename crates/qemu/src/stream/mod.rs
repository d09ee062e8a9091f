//! Parser of the migration stream.
