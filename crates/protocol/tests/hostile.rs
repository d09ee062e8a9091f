//! What a hostile peer may put on a data channel.
//!
//! The checks are those of the fuzzer, in `fuzz/checks`.

#![expect(clippy::disallowed_methods, reason = "seeds are read from files")]

#[path = "../../../fuzz/checks/frame.rs"]
mod frame;
#[path = "../../../fuzz/checks/replay.rs"]
mod replay;

#[test]
fn no_frame_breaks_its_reader() {
    // Twice the page records, which the check puts together again.
    replay::replay("frame", 500, frame::check, |length| 4 * length + 4096);
}
