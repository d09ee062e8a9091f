//! One summary at the end of a migration.

use limosa_protocol::migration::{Migration, Outcome, Summary};

use crate::show::{bytes, millis};

/// All that is said of an ended migration.
pub(crate) fn text(view: &Migration) -> String {
    let mut lines = vec![headline(view)];
    if let Some(reason) = &view.reason {
        lines.push(format!("  why         {reason}"));
    }
    if let Some(summary) = &view.summary {
        details(summary, &mut lines);
    }
    match view.outcome {
        Some(Outcome::Stayed) => lines.push(format!(
            "  next        the VM is on {} as before; mend the cause and move it again",
            view.source
        )),
        Some(Outcome::InDoubt) => lines.push(format!(
            "  next        see that limosad runs on {} and can be reached; it settles by itself",
            view.destination
        )),
        _ => {}
    }
    lines.join("\n")
}

fn headline(view: &Migration) -> String {
    let (vm, source, destination) = (&view.vm, &view.source, &view.destination);
    let total = view.summary.as_ref().map_or(0, |summary| summary.total_ms);
    match view.outcome {
        Some(Outcome::Moved) => {
            format!("{vm} moved from {source} to {destination} in {}", millis(total))
        }
        Some(Outcome::Stayed) => format!("{vm} stayed on {source}, after {}", millis(total)),
        Some(Outcome::InDoubt) => format!("{vm} is in doubt between {source} and {destination}"),
        None => format!("{vm} moves from {source} to {destination}: {}", view.phase.as_str()),
    }
}

fn details(summary: &Summary, lines: &mut Vec<String>) {
    let phases: Vec<String> = summary
        .phase_ms
        .iter()
        .map(|(phase, ms)| format!("{} {}", phase.as_str(), millis(*ms)))
        .collect();
    lines.push(format!("  phases      {}", phases.join(", ")));
    if let Some(downtime) = &summary.downtime {
        lines.push(format!(
            "  downtime    {:.0} ms: stop {:.0}, final round {:.0}, device state {:.0}, commit \
             {:.0}, resume {:.0}",
            downtime.total_ms,
            downtime.stop_ms,
            downtime.final_round_ms,
            downtime.device_state_ms,
            downtime.commit_ms,
            downtime.resume_ms
        ));
    }
    let moved = &summary.moved;
    if summary.rounds > 0 {
        lines.push(format!(
            "  memory      {} pages zero, {} unchanged, {} differences, {} full; {} rounds",
            moved.zero_pages,
            moved.unchanged_pages,
            moved.difference_pages,
            moved.full_pages,
            summary.rounds
        ));
        lines.push(format!(
            "              {} before compression, {} after",
            bytes(moved.ram_payload_bytes),
            bytes(moved.ram_packed_bytes)
        ));
    }
    lines.push(format!(
        "  disks       {} before compression, {} after; {} of zeroes and holes",
        bytes(moved.disk_payload_bytes),
        bytes(moved.disk_packed_bytes),
        bytes(moved.disk_zero_bytes)
    ));
    lines.push(format!("  wire        {}", bytes(moved.wire_bytes)));
    for proof in &summary.proofs {
        lines.push(format!("  proof       {proof}"));
    }
}
