//! A move as it goes: bars in a terminal, lines elsewhere.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use limosa_protocol::id::DiskId;
use limosa_protocol::migration::{Migration, Phase, Transfer};

use crate::show;

/// Where there is no terminal, a line comes at least this often.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Shows a migration.
pub(crate) enum Progress {
    Bars(Bars),
    Lines { phase: Option<Phase>, last: Instant },
    Json,
}

/// Bars for each disk, for memory, and a line for the phase.
pub(crate) struct Bars {
    all: MultiProgress,
    phase: ProgressBar,
    disks: BTreeMap<DiskId, ProgressBar>,
    memory: Option<ProgressBar>,
}

impl Progress {
    pub(crate) fn new(json: bool) -> Self {
        if json {
            return Self::Json;
        }
        if !std::io::stderr().is_terminal() {
            return Self::Lines { phase: None, last: Instant::now() };
        }
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(10));
        let phase = all.add(ProgressBar::no_length());
        phase.set_style(style("{spinner} {msg}"));
        phase.enable_steady_tick(Duration::from_millis(120));
        Self::Bars(Bars { all, phase, disks: BTreeMap::new(), memory: None })
    }

    pub(crate) fn show(&mut self, view: &Migration) {
        match self {
            Self::Bars(bars) => bars.show(view),
            Self::Lines { phase, last } => {
                if *phase != Some(view.phase) || last.elapsed() >= LINE_EVERY {
                    *phase = Some(view.phase);
                    *last = Instant::now();
                    show::note(&sentence(view));
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
            Self::Json => {}
        }
    }

    pub(crate) fn end(self) {
        if let Self::Bars(bars) = self {
            bars.phase.finish_and_clear();
            for bar in bars.disks.values().chain(&bars.memory) {
                bar.abandon();
            }
        }
    }
}

impl Bars {
    fn show(&mut self, view: &Migration) {
        self.phase.set_message(sentence(view));
        for (id, transfer) in &view.progress.disks {
            let bar = self
                .disks
                .entry(id.clone())
                .or_insert_with(|| bar(&self.all, &format!("disk {id}")));
            set(bar, transfer, String::new());
        }
        let memory = &view.progress.memory;
        if memory.total_bytes > 0 {
            let bar = self.memory.get_or_insert_with(|| bar(&self.all, "memory"));
            let dirty = view.progress.dirty_pages_per_second.saturating_mul(4096);
            let further =
                format!("round {}, {}/s dirtied", view.progress.round, show::bytes(dirty));
            set(bar, memory, further);
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template);
    style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━━─")
}

fn bar(all: &MultiProgress, name: &str) -> ProgressBar {
    let bar = all.add(ProgressBar::new(0));
    bar.set_style(style("  {prefix:<12} {bar:24.cyan/dim} {msg}"));
    bar.set_prefix(name.to_owned());
    bar
}

fn set(bar: &ProgressBar, transfer: &Transfer, further: String) {
    bar.set_length(transfer.total_bytes);
    bar.set_position(transfer.done_bytes);
    let mut parts = vec![
        format!("{} of {}", show::bytes(transfer.done_bytes), show::bytes(transfer.total_bytes)),
        format!("{}/s", show::bytes(transfer.rate_bytes_per_second)),
    ];
    let left_bytes = transfer.total_bytes.saturating_sub(transfer.done_bytes);
    if left_bytes > 0 {
        let left = transfer.left_seconds.map_or("?".to_owned(), |seconds| format!("{seconds} s"));
        parts.push(format!("{} remaining, {left} left", show::bytes(left_bytes)));
    }
    if !further.is_empty() {
        parts.push(further);
    }
    bar.set_message(parts.join(", "));
}

fn sentence(view: &Migration) -> String {
    let mut text =
        format!("{}: {} to {}: {}", view.vm, view.source, view.destination, view.phase.as_str());
    let progress = &view.progress;
    if progress.wire_bytes_per_second > 0 {
        text.push_str(&format!(
            ", {}/s on the wire, {} sent",
            show::bytes(progress.wire_bytes_per_second),
            show::bytes(progress.moved.wire_bytes)
        ));
    }
    text
}
