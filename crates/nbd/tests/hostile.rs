//! Whatever either side of an NBD connection sends, the other answers or refuses it.
//!
//! The checks are those of the fuzzer, in `fuzz/checks`.

#[path = "../../../fuzz/checks/nbd.rs"]
mod nbd;
#[path = "../../../fuzz/checks/replay.rs"]
mod replay;

#[test]
fn no_conversation_breaks_either_side_of_nbd() {
    // One request, which fits the small export of the check, and its answers.
    replay::replay("nbd", 500, nbd::check, |length| 4 * length + (2 << 20));
}
