//! What a hostile QEMU may send as its migration stream.
//!
//! The checks are those of the fuzzer, in `fuzz/checks`.

#[path = "../../../fuzz/checks/replay.rs"]
mod replay;
#[path = "../../../fuzz/checks/stream.rs"]
mod stream;

#[test]
fn no_stream_breaks_its_parser() {
    // Inline bytes and a note of each page, of three parses, with room to grow.
    replay::replay("stream", 500, stream::check, |length| 32 * length + (256 << 10));
}
