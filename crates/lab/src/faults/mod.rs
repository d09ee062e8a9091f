//! Faults that strike moves at points drawn from a seed.

pub(crate) mod chaos;
pub(crate) mod steps;
