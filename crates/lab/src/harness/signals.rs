//! On SIGINT and SIGTERM the lab takes down what it made, then ends.
//!
//! The signal's own code only writes a byte into a pipe; a thread does the rest.

use std::io::Read;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::{Context, Result};

use crate::harness::record::Record;

/// Write end of the pipe; never closed once it is set.
static PIPE: AtomicI32 = AtomicI32::new(-1);
/// What must go when a signal comes.
static RECORDS: Mutex<Vec<Record>> = Mutex::new(Vec::new());

extern "C" fn on_signal(signal: libc::c_int) {
    let byte = u8::try_from(signal).unwrap_or(0);
    // SAFETY: `write` may be called in a signal's code; the pipe stays open for
    // the life of the process and `byte` outlives the call.
    unsafe { libc::write(PIPE.load(Ordering::Relaxed), (&raw const byte).cast(), 1) };
}

/// Begins to watch. Call once, before the first lab is made.
pub(crate) fn install() -> Result<()> {
    let (read, write): (OwnedFd, OwnedFd) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context("making a pipe")?;
    PIPE.store(write.into_raw_fd(), Ordering::Relaxed);
    std::thread::Builder::new()
        .name("lab-signals".to_owned())
        .spawn(move || {
            let mut byte = [0];
            if std::fs::File::from(read).read_exact(&mut byte).is_ok() {
                tear_all_down();
                std::process::exit(128 + i32::from(byte[0]));
            }
        })
        .context("starting the signal thread")?;
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let code: extern "C" fn(libc::c_int) = on_signal;
        // SAFETY: the code given only calls functions that are allowed there.
        let before = unsafe { libc::signal(signal, code as libc::sighandler_t) };
        anyhow::ensure!(before != libc::SIG_ERR, "watching for signal {signal} failed");
    }
    Ok(())
}

/// Adds a run that must be taken down.
pub(crate) fn watch(record: Record) {
    if let Ok(mut records) = RECORDS.lock() {
        records.push(record);
    }
}

/// Forgets a run that is gone, or that is meant to stay.
pub(crate) fn forget(id: &str) {
    if let Ok(mut records) = RECORDS.lock() {
        records.retain(|record| record.id != id);
    }
}

fn tear_all_down() {
    if let Ok(records) = RECORDS.lock() {
        for record in records.iter() {
            // Nothing better to do than to go on: the next run tries again.
            let _ = record.teardown();
        }
    }
}
