//! Fault points of a build for tests.
//!
//! ```text
//! reach(kind, name, edge) ─► is anything armed? ─ no ─► goes on
//!                                 └─ this point ─► kill │ hold │ fail the write
//! ```
//!
//! **Invariant.** Unless the variable was set when the agent started, a point is
//! one look at a value that never changes: no file is looked for.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::point::{
    ARMED_FILE, Action, Armed, Edge, FOLDER_VARIABLE, HOLD_MS_MAX, Kind, REACHED_PREFIX, TRACE_FILE,
};

/// How often whoever holds looks whether he may go on.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// The folder of the test, if there is one.
static FOLDER: OnceLock<PathBuf> = OnceLock::new();

/// Looks, once, whether this agent is under test.
pub(crate) fn install() -> bool {
    let Some(folder) = std::env::var_os(FOLDER_VARIABLE) else { return false };
    tracing::warn!(folder = ?folder, "under test: this agent fails where it is ordered to");
    FOLDER.set(folder.into()).is_ok()
}

/// A point in async code: whoever holds here holds nobody else.
pub(crate) async fn reach(kind: Kind, name: &str, edge: Edge) {
    let Some(Held { file, until }) = look(kind, name, edge).as_ref().and_then(strike) else {
        return;
    };
    while file.exists() && Instant::now() < until {
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// A point in code that is not async, and that lets its thread wait.
pub(crate) fn reach_blocking(kind: Kind, name: &str, edge: Edge) {
    let Some(held) = look(kind, name, edge).as_ref().and_then(strike) else { return };
    held.wait();
}

/// A point at a record's write.
///
/// # Errors
/// The one that a test wants the write to have.
pub(crate) fn reach_write(name: Option<&str>, edge: Edge) -> std::io::Result<()> {
    let Some(found) = name.and_then(|name| look(Kind::Record, name, edge)) else { return Ok(()) };
    if found.armed.action == Action::FailStore {
        found.disarm();
        return Err(std::io::Error::other("a test wants this write to fail"));
    }
    if let Some(held) = strike(&found) {
        held.wait();
    }
    Ok(())
}

/// An armed point that was come to.
struct Found {
    folder: &'static Path,
    armed: Armed,
}

/// Somebody who waits at a point.
struct Held {
    file: PathBuf,
    until: Instant,
}

impl Held {
    fn wait(&self) {
        while self.file.exists() && Instant::now() < self.until {
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

impl Found {
    /// Tells the test; `false` when another task was faster.
    fn disarm(&self) -> bool {
        std::fs::rename(self.folder.join(ARMED_FILE), self.reached()).is_ok()
    }

    fn reached(&self) -> PathBuf {
        self.folder.join(format!("{REACHED_PREFIX}{}", self.armed.point))
    }
}

fn look(kind: Kind, name: &str, edge: Edge) -> Option<Found> {
    let folder = FOLDER.get()?;
    trace(folder, kind, name, edge);
    let file = folder.join(ARMED_FILE);
    let mut armed = Armed::parse(&std::fs::read_to_string(&file).ok()?)?;
    let is_it = armed
        .point
        .strip_prefix(kind.as_str())
        .and_then(|rest| rest.strip_prefix('.')?.strip_suffix(edge.as_str())?.strip_suffix('.'))
        .is_some_and(|armed| armed == name);
    if !is_it {
        return None;
    }
    if armed.skip > 0 {
        armed.skip -= 1;
        // Under test alone: a count that is not written ends the test, not a VM.
        std::fs::write(&file, armed.to_string()).ok();
        return None;
    }
    Some(Found { folder, armed })
}

/// Tells a test that wants to know it which point was passed.
fn trace(folder: &Path, kind: Kind, name: &str, edge: Edge) {
    let file = std::fs::File::options().append(true).open(folder.join(TRACE_FILE));
    if let Ok(mut file) = file {
        // One write, so that lines of several tasks stay whole. Under test alone: a
        // line that is not written fails a test, not a VM.
        let line = format!("{}.{name}.{}\n", kind.as_str(), edge.as_str());
        file.write_all(line.as_bytes()).ok();
    }
}

/// Does what the test wants; holding is left to the caller.
fn strike(found: &Found) -> Option<Held> {
    if !found.disarm() {
        return None;
    }
    tracing::warn!(point = found.armed.point, action = found.armed.action.as_str(), "fault");
    match found.armed.action {
        Action::Kill => {
            // Nothing may run after it, not even what is about to unwind.
            let own = rustix::process::getpid();
            rustix::process::kill_process(own, rustix::process::Signal::KILL).ok();
            std::process::abort();
        }
        Action::Hold => Some(Held {
            file: found.reached(),
            until: Instant::now() + Duration::from_millis(HOLD_MS_MAX),
        }),
        // Elsewhere than at a record there is nothing to fail.
        Action::FailStore => None,
    }
}
