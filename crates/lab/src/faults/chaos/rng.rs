//! Draws from a seeded generator: the same seed gives the same draws on every machine.

pub(super) use fastrand::Rng;

/// `true` in `of_hundred` of a hundred cases.
pub(super) fn percent(rng: &mut Rng, of_hundred: u64) -> bool {
    rng.u64(..100) < of_hundred
}

/// One of several choices.
///
/// # Panics
///
/// Without a choice.
pub(super) fn one_of<T: Copy>(rng: &mut Rng, choices: &[T]) -> T {
    *rng.choice(choices).expect("callers give at least one choice")
}
