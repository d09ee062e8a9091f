//! The report as text for a terminal.

use std::fmt::Write;

use super::{Move, Report, format, page};

/// Width of the bar of phases, in characters.
const BAR_WIDTH: f64 = 60.0;
/// One letter-like block for each phase, so that neighbours differ without colours.
const BLOCKS: [char; 5] = ['░', '▓', '▒', '█', '░'];

/// The whole report, ending with a line break.
pub(crate) fn text(report: &Report) -> String {
    let mut text = format!("{}\n{}\n", report.title, report.machine);
    for it in &report.moves {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "\n{}: {} → {}   {} in {}",
            it.vm,
            it.source,
            it.destination,
            it.outcome,
            format::duration(it.total_ms)
        );
        let _ = writeln!(text, "  {}", bar(it));
        for (name, fact) in page::facts(it) {
            let _ = writeln!(text, "  {name:<12} {fact}");
        }
    }
    text
}

/// The phases to scale; each that took place has at least one character.
fn bar(it: &Move) -> String {
    let total = it.phases.last().map_or(1.0, |phase| phase.to_ms).max(1.0);
    let mut bar = String::new();
    for (index, phase) in it.phases.iter().enumerate() {
        let width = (phase.ms() / total * BAR_WIDTH).round().clamp(1.0, BAR_WIDTH);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "clamped to 1 to 60 just above"
        )]
        let width = width as usize;
        bar.extend(std::iter::repeat_n(BLOCKS[index % BLOCKS.len()], width));
    }
    bar
}
