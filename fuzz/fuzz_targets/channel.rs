//! `checks/channel.rs`, with bytes that libFuzzer finds.

#![no_main]

#[path = "../checks/channel.rs"]
mod channel;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| channel::check(bytes));
