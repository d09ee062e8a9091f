//! `checks/nbd.rs`, with bytes that libFuzzer finds.

#![no_main]

#[path = "../checks/nbd.rs"]
mod nbd;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| nbd::check(bytes));
