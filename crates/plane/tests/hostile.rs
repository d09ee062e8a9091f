//! Whatever a peer sends on a channel, the destination refuses or applies it.
//!
//! The checks are those of the fuzzer, in `fuzz/checks`.

#[path = "../../../fuzz/checks/channel.rs"]
mod channel;
#[path = "../../../fuzz/checks/replay.rs"]
mod replay;

#[test]
fn no_channel_breaks_a_destination() {
    // It starts threads each time, so it is not tried as often as the others.
    // They take memory of their own, within the limits of frames.
    replay::replay("channel", 100, channel::check, |length| 2 * length + (64 << 10));
}
