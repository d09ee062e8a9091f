//! Hexadecimal digits, and secrets that are made of them.

use anyhow::Context;

use crate::failure::{Failure, Result};

/// Lower-case hexadecimal digits of some bytes.
pub fn encode_hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        write!(text, "{byte:02x}").ok();
        text
    })
}

/// The bytes of hexadecimal digits.
pub fn decode_hex(text: &str) -> anyhow::Result<Vec<u8>> {
    anyhow::ensure!(text.is_ascii() && text.len().is_multiple_of(2), "not hexadecimal");
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).context("not hexadecimal"))
        .collect()
}

/// A secret for a data channel: 128 random bits.
pub fn random_token() -> Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| Failure::internal(format!("the kernel gives no random bytes: {error}")))?;
    Ok(encode_hex(&bytes))
}
