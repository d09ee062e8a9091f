//! Fault points: named steps at which an agent under test fails.
//!
//! ```text
//! test: file `armed` ─► agent comes to the point ─► file `reached-POINT` ─► it dies, waits, fails
//! ```
//!
//! A point is named `KIND.NAME.EDGE`, such as `record.handed-over.after`. An agent that was built
//! with the feature `armed` looks for points when [`FOLDER_VARIABLE`] was set at its start; in any
//! other build the functions here are empty. A folder with a file `trace` gets the name of each
//! point that is passed, a line for each: so tests hold their list of points against what agents
//! do.
//!
//! **Invariants.** One point is armed at a time; reaching it disarms it, because `armed` becomes
//! `reached-POINT` by a rename. No task holds at a point longer than [`HOLD_MS_MAX`].

#[cfg(feature = "armed")]
mod armed;
mod point;

pub use point::{
    ARMED_FILE, Action, Armed, Edge, FOLDER_VARIABLE, HOLD_MS_MAX, Kind, REACHED_PREFIX, TRACE_FILE,
};

/// Looks, once, whether this process is under test.
pub fn install() -> bool {
    #[cfg(feature = "armed")]
    return armed::install();
    #[cfg(not(feature = "armed"))]
    false
}

/// A point in async code: a task that holds here holds no other.
pub async fn reach(kind: Kind, name: &str, edge: Edge) {
    #[cfg(feature = "armed")]
    armed::reach(kind, name, edge).await;
    #[cfg(not(feature = "armed"))]
    let _ = (kind, name, edge);
}

/// A point in code that is not async, and that lets its thread wait.
pub fn reach_blocking(kind: Kind, name: &str, edge: Edge) {
    #[cfg(feature = "armed")]
    armed::reach_blocking(kind, name, edge);
    #[cfg(not(feature = "armed"))]
    let _ = (kind, name, edge);
}

/// A point at a record's write.
///
/// # Errors
/// The one that a test wants the write to have.
pub fn reach_write(name: Option<&str>, edge: Edge) -> std::io::Result<()> {
    #[cfg(feature = "armed")]
    return armed::reach_write(name, edge);
    #[cfg(not(feature = "armed"))]
    {
        let _ = (name, edge);
        Ok(())
    }
}
