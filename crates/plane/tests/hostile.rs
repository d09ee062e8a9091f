//! What a peer may send on a channel, and either side of an NBD connection say.
//!
//! The checks are those of the fuzzer, in `fuzz/checks`.

#[path = "../../../fuzz/checks/channel.rs"]
mod channel;
#[path = "../../../fuzz/checks/nbd.rs"]
mod nbd;
#[path = "../../../fuzz/checks/replay.rs"]
mod replay;

#[test]
fn no_conversation_breaks_either_side_of_nbd() {
    // One request, which fits the small export of the check, and its answers.
    replay::replay("nbd", 500, nbd::check, |length| 4 * length + (2 << 20));
}

#[test]
fn no_channel_breaks_a_destination() {
    // It starts threads each time, so it is not tried as often as the others.
    // They take memory of their own, within the limits of frames.
    replay::replay("channel", 100, channel::check, |length| 2 * length + (64 << 10));
}
