//! Questions to the operator at the terminal.

use std::io::{BufRead, IsTerminal, Write};

use anyhow::Result;

/// Longest answer to a question, in bytes.
const REPLY_BYTES_MAX: u64 = 4096;

/// Whether there is somebody to ask.
pub(crate) fn can_ask() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Asks a question on the terminal.
///
/// - `option`: what answers it where there is no terminal.
pub(crate) fn ask(question: &str, option: &str) -> Result<String> {
    anyhow::ensure!(can_ask(), "there is no terminal to ask on: give {option}");
    write!(std::io::stderr(), "{question} ")?;
    let mut reply = String::new();
    std::io::Read::take(std::io::stdin().lock(), REPLY_BYTES_MAX).read_line(&mut reply)?;
    Ok(reply.trim().to_owned())
}
