//! What a rule found.

/// A violation of a rule, at a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Relative to the root of the repository.
    pub path: String,
    pub line: usize,
    pub rule: String,
    /// Of lines for `length` and `functions`, else 1. Amounts of one file and rule are added up.
    pub amount: usize,
    pub message: String,
}
