//! A move as it goes: bars in a terminal, lines elsewhere, JSON lines on wish.
//!
//! ```text
//! web1 to host2: pre-copy, 12 s, 113.2 MiB/s on the wire
//!   disk root  ━━━━━━━━━━━━━━━━━━━━ 100 %  8.0 GiB of 8.0 GiB
//!   memory     ━━━━━━━━━───────────  42 %  430.1 MiB of 1.0 GiB, 98.1 MiB/s
//!              593.9 MiB remaining, 6 s left
//!              round 2, the guest dirties 20.0 MiB/s, 1.2 GiB sent
//! ```
//!
//! All of it fits into 80 columns, for which what remains has a line of its own.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant, SystemTime};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use limosa_protocol::id::DiskId;
use limosa_protocol::migration::{Migration, Phase, Queued, Transfer};

use crate::show;

/// Where there is no terminal, a line comes at least this often.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// Bytes of a page of guest RAM.
const PAGE_BYTES: u64 = 4096;
/// Widest name of a bar, in characters; longer ones push the bar away.
const NAME_CHARS_MAX: usize = 24;
/// Columns for a name and its bar: a longer name has a shorter bar.
const NAME_AND_BAR_CHARS: usize = 30;

/// Shows a migration to people.
pub(crate) enum Progress {
    Bars(Bars),
    Lines { phase: Option<Phase>, last: Instant },
    Json,
}

/// A bar for each disk, one for memory, and lines around them.
pub(crate) struct Bars {
    all: MultiProgress,
    phase: ProgressBar,
    disks: BTreeMap<DiskId, ProgressBar>,
    /// Memory's bar and the line below it
    memory: Option<(ProgressBar, ProgressBar)>,
    name_chars: usize,
}

impl Progress {
    pub(crate) fn new(json: bool) -> Self {
        if json {
            return Self::Json;
        }
        let dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
        if dumb || !std::io::stderr().is_terminal() {
            return Self::Lines { phase: None, last: Instant::now() };
        }
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(10));
        let phase = all.add(ProgressBar::no_length());
        phase.set_style(style("{spinner} {wide_msg}"));
        phase.enable_steady_tick(Duration::from_millis(120));
        Self::Bars(Bars { all, phase, disks: BTreeMap::new(), memory: None, name_chars: 6 })
    }

    pub(crate) fn show(&mut self, view: &Migration) {
        match self {
            Self::Bars(bars) => bars.show(view),
            Self::Lines { phase, last } => {
                if *phase != Some(view.phase) || last.elapsed() >= LINE_EVERY {
                    *phase = Some(view.phase);
                    *last = Instant::now();
                    show::note(&line(view));
                }
            }
            Self::Json => {
                if let Ok(text) = serde_json::to_string(view) {
                    show::note(&text);
                }
            }
        }
    }

    /// A word to people in the middle of it.
    pub(crate) fn say(&self, text: &str) {
        match self {
            Self::Bars(bars) => bars.all.suspend(|| show::note(text)),
            Self::Lines { .. } => show::note(text),
            // Whoever reads the lines expects nothing but JSON.
            Self::Json => {}
        }
    }

    /// Leaves the bars where they stand, or takes them away when `clear`.
    pub(crate) fn end(self, clear: bool) {
        if let Self::Bars(bars) = self {
            bars.phase.finish_and_clear();
            for bar in bars.disks.values().chain(bars.memory.iter().map(|(bar, _)| bar)) {
                if clear {
                    bar.finish_and_clear();
                } else {
                    bar.abandon();
                }
            }
            if let Some((_, below)) = &bars.memory {
                below.finish_and_clear();
            }
        }
    }
}

impl Bars {
    fn show(&mut self, view: &Migration) {
        self.phase.set_message(headline(view));
        let progress = &view.progress;
        if self.disks.len() != progress.disks.len() {
            let longest = progress.disks.keys().map(|id| id.as_str().len() + 5).max();
            self.name_chars = longest.unwrap_or(0).clamp(6, NAME_CHARS_MAX);
            for id in progress.disks.keys() {
                if !self.disks.contains_key(id) {
                    let bar = self.bar(&format!("disk {id}"));
                    self.disks.insert(id.clone(), bar);
                }
            }
        }
        for (id, transfer) in &progress.disks {
            if let Some(bar) = self.disks.get(id) {
                set(bar, transfer, self.name_chars);
            }
        }
        if progress.memory.total_bytes == 0 {
            return;
        }
        let (bar, below) = match self.memory.take() {
            Some(bars) => bars,
            None => {
                let bar = self.bar("memory");
                let below = self.all.insert_after(&bar, ProgressBar::no_length());
                below.set_style(style(&format!("  {:1$} {{wide_msg}}", "", self.name_chars + 1)));
                (bar, below)
            }
        };
        set(&bar, &progress.memory, self.name_chars);
        below.set_message(rounds(view));
        self.memory = Some((bar, below));
    }

    /// A bar below those of the disks, above that of memory.
    fn bar(&self, name: &str) -> ProgressBar {
        let new = ProgressBar::new(0);
        let bar = match &self.memory {
            Some((memory, _)) => self.all.insert_before(memory, new),
            None => self.all.add(new),
        };
        let width = self.name_chars;
        let bar_width = NAME_AND_BAR_CHARS - width;
        bar.set_style(style(&format!(
            "  {{prefix:<{width}}}  {{bar:{bar_width}.cyan/dim}} {{percent:>3}} %  {{msg}}"
        )));
        bar.set_prefix(name.to_owned());
        bar
    }
}

fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template);
    style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━━─")
}

/// - `name_chars`: columns of the names, below which the second line begins.
fn set(bar: &ProgressBar, transfer: &Transfer, name_chars: usize) {
    bar.set_length(transfer.total_bytes);
    bar.set_position(transfer.done_bytes.min(transfer.total_bytes));
    let (done, remaining) = parts(transfer);
    bar.set_message(if remaining.is_empty() {
        done
    } else {
        format!("{done}\n{:1$}{remaining}", "", name_chars + 4)
    });
}

/// How far one transfer is, in one line.
pub(crate) fn sentence(transfer: &Transfer) -> String {
    let (done, remaining) = parts(transfer);
    if remaining.is_empty() { done } else { format!("{done}, {remaining}") }
}

/// What is done of a transfer, and what remains; nothing of it when it is done.
fn parts(transfer: &Transfer) -> (String, String) {
    let mut done =
        format!("{} of {}", show::bytes(transfer.done_bytes), show::bytes(transfer.total_bytes));
    let remaining_bytes = transfer.total_bytes.saturating_sub(transfer.done_bytes);
    if remaining_bytes == 0 {
        return (done, String::new());
    }
    if transfer.rate_bytes_per_second > 0 {
        done.push_str(&format!(", {}", show::rate(transfer.rate_bytes_per_second)));
    }
    let mut remaining = format!("{} remaining", show::bytes(remaining_bytes));
    if let Some(left) = transfer.left_seconds {
        remaining.push_str(&format!(", {} left", show::seconds(left)));
    }
    (done, remaining)
}

/// What is told of pre-copy beside memory's bar.
pub(crate) fn rounds(view: &Migration) -> String {
    let progress = &view.progress;
    let mut parts = Vec::new();
    if progress.round > 0 {
        let dirty = progress.dirty_pages_per_second.saturating_mul(PAGE_BYTES);
        parts.push(format!("round {}, the guest dirties {}", progress.round, show::rate(dirty)));
    }
    if progress.moved.wire_bytes > 0 {
        parts.push(format!("{} sent", show::bytes(progress.moved.wire_bytes)));
    }
    parts.join(", ")
}

/// The VM, where it goes, the phase, how long it takes already.
fn headline(view: &Migration) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    // The agent's clock may be another than ours: then it says too little, not nonsense.
    let elapsed = now.saturating_sub(Duration::from_millis(view.started_unix_ms)).as_secs();
    let mut text = format!(
        "{} to {}: {}, {}",
        view.vm,
        view.destination,
        view.status(),
        show::seconds(elapsed)
    );
    if let Some(queued) = &view.queued {
        return format!("{} to {}: queued, {}", view.vm, view.destination, self::queued(queued));
    }
    if let Some(loss) = &view.progress.link_loss {
        let until = Duration::from_millis(loss.until_unix_ms);
        let left = show::seconds(until.saturating_sub(now).as_secs());
        text.push_str(&format!(", the link is lost: waiting for it, {left} more"));
    } else if view.progress.wire_bytes_per_second > 0 {
        let rate = show::rate(view.progress.wire_bytes_per_second);
        text.push_str(&format!(", {rate} on the wire"));
    }
    text
}

/// Why a move waits, and for how long already.
pub(crate) fn queued(queued: &Queued) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let waited = now.saturating_sub(Duration::from_millis(queued.since_unix_ms)).as_secs();
    format!("{} already: {}", show::seconds(waited), queued.reason)
}

/// All of it in one line.
fn line(view: &Migration) -> String {
    let mut parts = vec![headline(view)];
    let progress = &view.progress;
    match view.phase {
        Phase::Mirror => {
            parts
                .extend(progress.disks.iter().map(|(id, disk)| format!("{id} {}", sentence(disk))));
        }
        Phase::PreCopy if progress.memory.total_bytes > 0 => {
            parts.push(format!("memory {}", sentence(&progress.memory)));
            parts.push(rounds(view));
        }
        _ => {}
    }
    parts.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: on a terminal of 80 columns nothing of a transfer is cut.
    #[test]
    fn a_transfer_fits_into_80_columns() {
        let transfer = Transfer {
            done_bytes: 511 << 30,
            total_bytes: 1023 << 30,
            rate_bytes_per_second: 1023 << 20,
            left_seconds: Some(3_599),
        };
        let (done, remaining) = parts(&transfer);
        assert_eq!(done, "511.0 GiB of 1023.0 GiB, 1023.0 MiB/s");
        assert_eq!(remaining, "512.0 GiB remaining, 59 min 59 s left");
        let before = 2 + NAME_AND_BAR_CHARS + 2 + " 100 %  ".len();
        assert!(before + done.chars().count() <= 80, "{done}");
        assert!(NAME_CHARS_MAX + 4 + remaining.chars().count() <= 80, "{remaining}");
        let done = Transfer { done_bytes: 5, total_bytes: 5, ..Transfer::default() };
        assert_eq!(sentence(&done), "5 B of 5 B");
    }
}
