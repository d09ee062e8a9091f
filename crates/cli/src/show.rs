//! What is shown: lines, tables, JSON, units.
//!
//! **Invariants.** What an agent says may come from another host or a guest:
//! nothing of it can command the terminal, since control characters are
//! replaced here, on the way out. A reader who closes our stdout had enough:
//! that is no failure.

use std::io::{ErrorKind, IsTerminal, Write};

use anyhow::{Context, Result};
use serde::Serialize;

/// A line of results.
pub(crate) fn line(text: &str) -> Result<()> {
    raw(format!("{}\n", clean(text)).as_bytes())
}

/// Results as they are.
pub(crate) fn raw(bytes: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(error).context("writing the results")
        }
        _ => Ok(()),
    }
}

/// A line for people.
pub(crate) fn note(text: &str) {
    // A terminal that went away is told nothing.
    writeln!(std::io::stderr(), "{}", clean(text)).ok();
}

/// A result as JSON.
pub(crate) fn json(value: &impl Serialize) -> Result<()> {
    line(&serde_json::to_string_pretty(value)?)
}

/// A table with its columns lined up; without rows, `none` is told instead.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>], none: &str) -> Result<()> {
    if rows.is_empty() && std::io::stdout().is_terminal() {
        note(none);
        return Ok(());
    }
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let head: Vec<String> = head.iter().map(|cell| (*cell).to_owned()).collect();
    for row in std::iter::once(&head).chain(rows) {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        line(cells.join("  ").trim_end())?;
    }
    Ok(())
}

/// Text that cannot move the cursor, change the title or ring.
fn clean(text: &str) -> String {
    let tame = |c: char| if c.is_control() && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c };
    text.chars().map(tame).collect()
}

/// Bytes as people read them.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut scale = 1u64;
    while count / scale >= 1024 && unit + 1 < UNITS.len() {
        scale <<= 10;
        unit += 1;
    }
    if unit == 0 {
        return format!("{count} B");
    }
    // In tenths, so that no precision is lost on the way to text.
    let tenths = u128::from(count) * 10 / u128::from(scale);
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

/// Bytes per second as people read them.
pub(crate) fn rate(bytes_per_second: u64) -> String {
    format!("{}/s", bytes(bytes_per_second))
}

/// Milliseconds as people read them.
pub(crate) fn millis(count: u64) -> String {
    match count {
        0..1000 => format!("{count} ms"),
        1000..60_000 => format!("{}.{} s", count / 1000, count % 1000 / 100),
        _ => seconds(count / 1000),
    }
}

/// Seconds as people read them.
pub(crate) fn seconds(count: u64) -> String {
    match count {
        0..60 => format!("{count} s"),
        60..3600 => format!("{} min {:02} s", count / 60, count % 60),
        _ => format!("{} h {:02} min", count / 3600, count % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_the_ones_people_read() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(5 << 30), "5.0 GiB");
        assert_eq!(bytes(u64::MAX), "16777215.9 TiB");
        assert_eq!(millis(999), "999 ms");
        assert_eq!(millis(9_990), "9.9 s");
        assert_eq!(millis(61_250), "1 min 01 s");
        assert_eq!(seconds(3_720), "1 h 02 min");
    }

    /// Goal: a guest or a peer cannot write to the operator's terminal.
    #[test]
    fn text_cannot_command_a_terminal() {
        assert_eq!(
            clean("a\x1b]0;x\x07b\u{9b}2Jc\r\n\td"),
            "a\u{fffd}]0;x\u{fffd}b\u{fffd}2Jc\u{fffd}\n\td"
        );
    }
}
