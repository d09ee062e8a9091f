//! One summary at the end of a migration, and the same of one that goes on.
//!
//! ```text
//! web1 moved from host1 to host2 in 41.3 s
//!   downtime  187 ms: stop 12.1, final round 94.0, device state 51.2, commit 20.3, resume 9.4
//!   phases    prepare 112 ms, mirror 28.1 s, pre-copy 12.5 s, switchover 190 ms, retire 388 ms
//!   memory    …
//! ```

use limosa_protocol::migration::{Downtime, Migration, Moved, Outcome, Summary};

use crate::progress;
use crate::show::{bytes, millis};

/// All that is said of a migration.
pub(crate) fn text(view: &Migration) -> String {
    let mut lines = vec![headline(view)];
    let mut add = |what: &str, text: &str| lines.push(format!("  {what:<9} {text}"));
    if let Some(reason) = &view.reason {
        // A move that succeeded has no reason, but may have left something to be done.
        add(if view.outcome == Some(Outcome::Moved) { "note" } else { "why" }, reason);
    }
    if let Some(next) = next_step(view) {
        add("next", &next);
    }
    match &view.summary {
        Some(summary) => details(summary, &mut add),
        None => under_way(view, &mut add),
    }
    add("id", &view.id.to_string());
    lines.join("\n")
}

fn headline(view: &Migration) -> String {
    let (vm, source, destination) = (&view.vm, &view.source, &view.destination);
    let total = view.summary.as_ref().map(|summary| millis(summary.total_ms));
    let time = |word: &str| total.map_or(String::new(), |time| format!(" {word} {time}"));
    match view.outcome {
        Some(Outcome::Moved) => format!("{vm} moved from {source} to {destination}{}", time("in")),
        Some(Outcome::Stayed) => format!("{vm} stayed at {source}{}", time("after")),
        Some(Outcome::InDoubt) => {
            format!("{vm} is in doubt between {source} and {destination}: both copies are stopped")
        }
        None => format!("{vm} moves from {source} to {destination}: {}", view.phase.as_str()),
    }
}

/// What people should do now, if anything.
fn next_step(view: &Migration) -> Option<String> {
    let (vm, source, destination) = (&view.vm, &view.source, &view.destination);
    match view.outcome? {
        Outcome::Moved => None,
        Outcome::Stayed => Some(format!(
            "mend the cause and move it again; on {source}, `limosa vm compare {vm} --to \
             {destination}` finds what stands against it"
        )),
        Outcome::InDoubt => Some(format!(
            "see that limosad runs on both hosts and that they reach each other; they settle it by \
             themselves, and `limosa migration show {}` then tells how. Start no copy by hand",
            view.id
        )),
    }
}

fn under_way(view: &Migration, add: &mut impl FnMut(&str, &str)) {
    for (id, disk) in &view.progress.disks {
        add("disk", &format!("{id}: {}", progress::sentence(disk)));
    }
    if view.progress.memory.total_bytes > 0 {
        add("memory", &progress::sentence(&view.progress.memory));
    }
    let rounds = progress::rounds(view);
    if !rounds.is_empty() {
        add("", &rounds);
    }
}

fn details(summary: &Summary, add: &mut impl FnMut(&str, &str)) {
    match &summary.downtime {
        Some(downtime) => add("downtime", &parts(downtime)),
        None => add("downtime", "none: the guest was never stopped"),
    }
    let phases: Vec<String> = summary
        .phase_ms
        .iter()
        .map(|(phase, ms)| format!("{} {}", phase.as_str(), millis(*ms)))
        .collect();
    if !phases.is_empty() {
        add("phases", &phases.join(", "));
    }
    let moved = &summary.moved;
    memory(moved, summary.rounds, add);
    if moved.disk_payload_bytes > 0 || moved.disk_zero_bytes > 0 {
        let holes = bytes(moved.disk_zero_bytes);
        let packed = packed(moved.disk_payload_bytes, moved.disk_packed_bytes);
        add("disks", &format!("{packed}; {holes} of zeroes and holes"));
    }
    if moved.wire_bytes > 0 {
        add("wire", &format!("{} in all", bytes(moved.wire_bytes)));
    }
    if let Some(text) = link(summary) {
        add("link", &text);
    }
    for proof in &summary.proofs {
        add("proof", proof);
    }
}

/// What became of a link that was not always there.
fn link(summary: &Summary) -> Option<String> {
    let times = |count: u32| if count == 1 { "once".to_owned() } else { format!("{count} times") };
    let mut parts = Vec::new();
    if summary.link_loss_count > 0 {
        let again = bytes(summary.moved.resent_bytes);
        parts.push(format!("lost {}, {again} sent again", times(summary.link_loss_count)));
    }
    if summary.given_up_switchover_count > 0 {
        let count = times(summary.given_up_switchover_count);
        parts.push(format!("the guest ran on {count} because its switchover took too long"));
    }
    (!parts.is_empty()).then(|| parts.join("; "))
}

fn memory(moved: &Moved, rounds: u64, add: &mut impl FnMut(&str, &str)) {
    let kinds = [
        ("zero", moved.zero_pages),
        ("unchanged", moved.unchanged_pages),
        ("difference", moved.difference_pages),
        ("full", moved.full_pages),
    ];
    if kinds.iter().all(|(_, pages)| *pages == 0) {
        return;
    }
    let kinds: Vec<String> = kinds
        .iter()
        .map(|(kind, pages)| format!("{} {kind}", bytes(pages.saturating_mul(4096))))
        .collect();
    let rounds = if rounds == 1 { "1 round".to_owned() } else { format!("{rounds} rounds") };
    add("memory", &format!("{} of pages, in {rounds}", kinds.join(", ")));
    add("", &packed(moved.ram_payload_bytes, moved.ram_packed_bytes));
}

fn packed(payload_bytes: u64, packed_bytes: u64) -> String {
    format!("{} before compression, {} after", bytes(payload_bytes), bytes(packed_bytes))
}

fn parts(downtime: &Downtime) -> String {
    format!(
        "{:.0} ms: stop {:.1}, final round {:.1}, device state {:.1}, commit {:.1}, resume {:.1}",
        downtime.total_ms,
        downtime.stop_ms,
        downtime.final_round_ms,
        downtime.device_state_ms,
        downtime.commit_ms,
        downtime.resume_ms
    )
}
