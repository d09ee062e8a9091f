//! One summary at the end of a migration, and the same of one that goes on.
//!
//! ```text
//! web1 moved from host1 to host2 in 41.3 s
//!   downtime  187 ms: stop 12.1, final round 94.0, device state 51.2, commit 20.3, resume 9.4
//!   phases    prepare 112 ms, mirror 28.1 s, pre-copy 12.5 s, switchover 190 ms, retire 388 ms
//!   memory    4 rounds: 1.1 GiB of zero pages, …
//! ```

use limosa_protocol::migration::{Downtime, Migration, Moved, Outcome, Phase, Role, Summary};

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
        Some(summary) => details(view, summary, &mut add),
        None => under_way(view, &mut add),
    }
    add("id", &view.id.to_string());
    lines.join("\n")
}

fn headline(view: &Migration) -> String {
    let (vm, source, destination) = (&view.vm, &view.source, &view.destination);
    let total = view.summary.as_ref().map(|summary| millis(summary.total_ms));
    let time = |label: &str| total.map_or(String::new(), |time| format!(" {label} {time}"));
    match view.outcome {
        Some(Outcome::Moved) => format!("{vm} moved from {source} to {destination}{}", time("in")),
        Some(Outcome::Stayed) => format!("{vm} stayed at {source}{}", time("after")),
        Some(Outcome::InDoubt) => {
            format!(
                "{vm} is in doubt between {source} and {destination}: the copy at {} is stopped, \
                 and the other host may run it",
                match view.role {
                    Role::Source => source,
                    Role::Destination => destination,
                }
            )
        }
        None if view.queued.is_some() => {
            format!("{vm} waits at {source} to move to {destination}")
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
            "remove the cause and move it again; on {source}, `limosa vm compare {vm} --to \
             {destination}` finds what stands against it"
        )),
        Outcome::InDoubt => Some(format!(
            "see that limosad runs on both hosts and that they reach each other, and do what the \
             reason asks for; `limosa migration show {}` tells how it was settled. Start no copy by \
             hand",
            view.id
        )),
    }
}

fn under_way(view: &Migration, add: &mut impl FnMut(&str, &str)) {
    if let Some(queued) = &view.queued {
        add("queued", &progress::queued(queued));
    }
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

fn details(view: &Migration, summary: &Summary, add: &mut impl FnMut(&str, &str)) {
    match &summary.downtime {
        Some(downtime) => add("downtime", &parts(downtime)),
        None => {
            if let Some(why) = no_downtime(view, summary) {
                add("downtime", why);
            }
        }
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

/// Why there is no downtime, as far as that is known. An agent that was restarted
/// in the middle has not seen the phases before.
fn no_downtime(view: &Migration, summary: &Summary) -> Option<&'static str> {
    let saw = |phase| summary.phase_ms.contains_key(&phase);
    let was_tried = saw(Phase::Switchover) || summary.given_up_switchover_count > 0;
    match view.outcome? {
        Outcome::Moved if was_tried => Some("none: the guest did not run"),
        Outcome::Moved => Some("not known: limosad was restarted during the move"),
        _ if was_tried => Some("not measured: the switchover began and was given up"),
        Outcome::Stayed if saw(Phase::Mirror) || saw(Phase::PreCopy) => {
            Some("none: the guest was never stopped")
        }
        // In `prepare` nothing is stopped, or a restart hides what came after.
        Outcome::Stayed | Outcome::InDoubt => None,
    }
}

/// What became of a link that was not always there.
fn link(summary: &Summary) -> Option<String> {
    let times = |count: u32| if count == 1 { "once".to_owned() } else { format!("{count} times") };
    let mut parts = Vec::new();
    if summary.link_loss_count > 0 {
        let resent = bytes(summary.moved.resent_bytes);
        parts.push(format!("lost {}, {resent} sent again", times(summary.link_loss_count)));
    }
    if summary.given_up_switchover_count > 0 {
        let count = times(summary.given_up_switchover_count);
        parts.push(format!("the guest ran on {count} because its switchover took too long"));
    }
    (!parts.is_empty()).then(|| parts.join("; "))
}

fn memory(moved: &Moved, rounds: u64, add: &mut impl FnMut(&str, &str)) {
    let pages = [moved.zero_pages, moved.unchanged_pages, moved.difference_pages, moved.full_pages];
    if pages.iter().all(|pages| *pages == 0) {
        return;
    }
    let size = |pages: u64| bytes(pages.saturating_mul(4096));
    let rounds = if rounds == 1 { "1 round".to_owned() } else { format!("{rounds} rounds") };
    add(
        "memory",
        &format!(
            "{rounds}: {} of zero pages, {} of unchanged ones",
            size(moved.zero_pages),
            size(moved.unchanged_pages)
        ),
    );
    let sent = [
        ("difference", moved.difference_packed_bytes, moved.difference_pages),
        ("full", moved.full_packed_bytes, moved.full_pages),
    ]
    .map(|(kind, sent_bytes, pages)| format!("{kind} {} in {pages} pages", bytes(sent_bytes)));
    add("", &sent.join(", "));
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

#[cfg(test)]
mod tests {
    use limosa_protocol::migration::Progress;

    use super::*;

    fn view(outcome: Outcome, phases: &[Phase]) -> Migration {
        let moved = Moved {
            zero_pages: 256,
            difference_pages: 7,
            difference_packed_bytes: 2048,
            full_pages: 3,
            full_packed_bytes: 10_240,
            ..Moved::default()
        };
        Migration {
            id: "0199a1b2-0000-7000-8000-000000000000".parse().unwrap(),
            vm: "web1".parse().unwrap(),
            role: Role::Source,
            source: "host1".parse().unwrap(),
            destination: "host2".parse().unwrap(),
            phase: Phase::Retire,
            outcome: Some(outcome),
            reason: None,
            queued: None,
            started_unix_ms: 0,
            ended_unix_ms: Some(1),
            progress: Progress::default(),
            summary: Some(Summary {
                phase_ms: phases.iter().map(|phase| (*phase, 1)).collect(),
                rounds: 1,
                moved,
                ..Summary::default()
            }),
        }
    }

    /// Goal: of a stop that nobody measured it is not said that there was none.
    #[test]
    fn a_missing_downtime_is_told_as_what_it_is() {
        use Phase::{Mirror, PreCopy, Prepare, Retire, Switchover};
        for (outcome, phases, said) in [
            (Outcome::Moved, &[Prepare, Switchover, Retire][..], "the guest did not run"),
            (Outcome::Moved, &[Retire], "not known"),
            (Outcome::Stayed, &[Prepare, Mirror, PreCopy], "never stopped"),
            (Outcome::Stayed, &[Prepare, Mirror, PreCopy, Switchover], "given up"),
        ] {
            let text = text(&view(outcome, phases));
            assert!(text.contains(said), "{outcome:?} {phases:?}: {text}");
        }
        let mut tried = view(Outcome::Stayed, &[Prepare, Mirror, PreCopy]);
        tried.summary.as_mut().unwrap().given_up_switchover_count = 1;
        assert!(text(&tried).contains("given up"));
        assert!(!text(&view(Outcome::Stayed, &[Prepare])).contains("downtime"));
    }

    /// Goal: each kind of page is told with the bytes that it really cost.
    #[test]
    fn kinds_of_pages_are_told_with_their_bytes() {
        let text = text(&view(Outcome::Moved, &[]));
        assert!(text.contains("1 round: 1.0 MiB of zero pages, 0 B of unchanged ones"), "{text}");
        assert!(text.contains("difference 2.0 KiB in 7 pages, full 10.0 KiB in 3 pages"), "{text}");
    }

    #[test]
    fn in_doubt_it_says_which_copy_is_paused() {
        let text = text(&view(Outcome::InDoubt, &[]));
        assert!(text.contains("the copy at host1 is stopped"), "{text}");
    }
}
