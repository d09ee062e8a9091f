//! One move as a picture.
//!
//! ```text
//! title, result
//! phases      ▐ mirror ▐ pre-copy ▐…    bands through all panels
//! wire        stacked bytes per second by kind
//! progress    disk and memory, done of total
//! heartbeats  one lane a host, as seen at the switch
//! close-up    the switchover: heartbeats, blackout, parts of the downtime
//! ```

use super::canvas::{Anchor, Canvas, tick_step};
use super::{KINDS, Move, Sample, format};

/// Size of the picture.
const WIDTH: f64 = 1120.0;
const HEIGHT: f64 = 752.0;
/// Where panels begin and end from left to right.
const LEFT: f64 = 92.0;
const RIGHT: f64 = 1092.0;
/// Panels from top to bottom: begin and height.
const PHASES: (f64, f64) = (74.0, 24.0);
const WIRE: (f64, f64) = (128.0, 200.0);
const PROGRESS: (f64, f64) = (378.0, 76.0);
const BEATS: (f64, f64) = (488.0, 48.0);
const CLOSE: (f64, f64) = (594.0, 100.0);
/// Shown on either side of the switchover in the close-up, at least.
const CLOSE_MARGIN_MS: f64 = 80.0;
/// Most points of one curve: more than one for each pixel shows nothing new.
const POINT_COUNT_MAX: usize = 1_000;
/// Most rates, likewise.
const RATE_COUNT_MAX: f64 = 1_000.0;
/// Figures of the agent that did not change for so long did not change.
const FIGURES_EVERY_MS: f64 = 250.0;

const STYLE: &str = "\
text{font-family:'Inter','Segoe UI','DejaVu Sans',Helvetica,Arial,sans-serif;font-size:12px;fill:#3d4653}\
.back{fill:#ffffff}.title{font-size:20px;font-weight:600;fill:#17202c}.result{font-size:13px;fill:#5a6472}\
.panel{font-size:12px;font-weight:600;fill:#17202c}.small{font-size:11px;fill:#6b7583}\
.onband{font-size:11px;font-weight:600;fill:#ffffff}.red{font-size:12px;font-weight:600;fill:#b3261e}\
.frame{fill:#f7f8fa}.grid{stroke:#e2e6eb;stroke-width:1}.edge{stroke:#b9c1cb;stroke-width:1;stroke-dasharray:2 3}\
.limit{stroke:#8a94a1;stroke-width:1.2;stroke-dasharray:6 4}\
.p0{fill:#8793a3}.p1{fill:#2f6db3}.p2{fill:#c9762b}.p3{fill:#b3261e}.p4{fill:#4e8a5a}\
.k0{fill:#2f6db3}.k1{fill:#e39a4a}.k2{fill:#8a63b0}.k3{fill:#aeb6c0}\
.l0{fill:none;stroke:#2f6db3;stroke-width:2}.l1{fill:none;stroke:#c9762b;stroke-width:2}\
.b0{fill:#2a7f76}.b1{fill:#5b4fb0}.dark{fill:#b3261e;fill-opacity:.16}.quiet{fill:#d9a400;fill-opacity:.20}\
.d0{fill:#7a2018}.d1{fill:#c9762b}.d2{fill:#8a63b0}.d3{fill:#2f6db3}.d4{fill:#4e8a5a}";

/// The picture of one move.
pub(crate) fn svg(it: &Move) -> String {
    let mut canvas = Canvas::default();
    canvas.rect(0.0, 0.0, WIDTH, HEIGHT, "back");
    let across = Scale { from: 0.0, to: it.total_ms.max(1.0) };
    title(&mut canvas, it);
    wire(&mut canvas, it, across);
    progress(&mut canvas, it, across);
    beats(&mut canvas, it, across);
    phases(&mut canvas, it, across);
    close_up(&mut canvas, it);
    let label = format!("Move of {} from {} to {}", it.vm, it.source, it.destination);
    canvas.finish(WIDTH, HEIGHT, &label, STYLE)
}

/// Milliseconds to pixels.
#[derive(Debug, Clone, Copy)]
struct Scale {
    from: f64,
    to: f64,
}

impl Scale {
    fn x(self, ms: f64) -> f64 {
        let share = (ms - self.from) / (self.to - self.from);
        LEFT + share.clamp(0.0, 1.0) * (RIGHT - LEFT)
    }

    fn holds(self, ms: f64) -> bool {
        (self.from..=self.to).contains(&ms)
    }
}

fn title(canvas: &mut Canvas, it: &Move) {
    let heading = format!("{}: {} → {}", it.vm, it.source, it.destination);
    canvas.text(LEFT, 34.0, Anchor::Start, "title", &heading);
    let mut result = format!("{} in {}", it.outcome, format::duration(it.total_ms));
    result += &format!("   ·   {} on the wire", format::bytes(it.moved.wire_bytes));
    if !it.downtime.is_empty() {
        let downtime: f64 = it.downtime.iter().map(|part| part.ms).sum();
        result += &format!("   ·   downtime {}", format::duration(downtime));
    }
    if let Some(blackout) = &it.blackout {
        result += &format!("   ·   blackout {}", format::duration(blackout.ms()));
    }
    canvas.text(LEFT, 57.0, Anchor::Start, "result", &result);
}

fn phases(canvas: &mut Canvas, it: &Move, across: Scale) {
    for (index, phase) in it.phases.iter().enumerate() {
        let (from, to) = (across.x(phase.from_ms), across.x(phase.to_ms));
        // The shortest phase still shows that it was there.
        let width = (to - from).max(2.0);
        canvas.rect(from, PHASES.0, width, PHASES.1, &format!("p{}", index % 5));
        let long = format!("{} {}", phase.name, format::duration(phase.ms()));
        let middle = (from + to) / 2.0;
        if let Some(text) = [long, phase.name.clone()].into_iter().find(|text| fits(text, width)) {
            canvas.text(middle, PHASES.0 + 16.0, Anchor::Middle, "onband", &text);
        }
        if index > 0 {
            canvas.line((from, PHASES.0 + PHASES.1), (from, BEATS.0 + BEATS.1), "edge");
        }
    }
}

/// Whether a small text fits into that many pixels.
fn fits(text: &str, width: f64) -> bool {
    let characters = u32::try_from(text.chars().count()).unwrap_or(u32::MAX);
    f64::from(characters) * 6.4 + 8.0 < width
}

/// Draws a panel's ground with its name, and ticks below it when wished.
fn panel(canvas: &mut Canvas, place: (f64, f64), name: &str) {
    canvas.rect(LEFT, place.0, RIGHT - LEFT, place.1, "frame");
    canvas.text(LEFT, place.0 - 8.0, Anchor::Start, "panel", name);
}

fn time_ticks(canvas: &mut Canvas, place: (f64, f64), across: Scale, zero_ms: f64) {
    let length = across.to - across.from;
    let step = tick_step(length, 10.0);
    let mut tick = ((across.from - zero_ms) / step).ceil() * step;
    while tick + zero_ms <= across.to {
        let x = across.x(tick + zero_ms);
        canvas.line((x, place.0), (x, place.0 + place.1), "grid");
        let text = if length > 3_000.0 {
            format!("{} s", trimmed(tick / 1e3))
        } else {
            format!("{} ms", trimmed(tick))
        };
        canvas.text(x, place.0 + place.1 + 15.0, Anchor::Middle, "small", &text);
        tick += step;
    }
}

fn trimmed(number: f64) -> String {
    let text = format!("{number:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".to_owned() } else { text.to_owned() }
}

/// Bytes per second by kind between one sample and the next: (from, to, rates).
fn rates(samples: &[Sample]) -> Vec<(f64, f64, [f64; 4])> {
    // The agent tells new figures less often than it is asked: a rate is over the
    // time since they changed last, but a pause stays a pause.
    let length_ms = samples.last().map_or(0.0, |last| last.at_ms - samples[0].at_ms);
    let shortest_ms = length_ms / RATE_COUNT_MAX;
    let mut kept: Vec<&Sample> = Vec::new();
    let mut before: Option<&Sample> = None;
    for sample in samples {
        let Some(last) = kept.last() else {
            kept.push(sample);
            continue;
        };
        let is_new = sample.wire_bytes != last.wire_bytes;
        let waited = sample.at_ms - last.at_ms > FIGURES_EVERY_MS;
        if waited || (is_new && sample.at_ms - last.at_ms >= shortest_ms) {
            kept.push(sample);
        }
        before = Some(sample);
    }
    kept.extend(before);
    let between = |pair: &[&Sample]| {
        let seconds = (pair[1].at_ms - pair[0].at_ms) / 1e3;
        let mut rates = [0.0; 4];
        for (kind, rate) in rates.iter_mut().enumerate() {
            let bytes = pair[1].wire_bytes[kind].saturating_sub(pair[0].wire_bytes[kind]);
            #[expect(clippy::cast_precision_loss, reason = "a pixel is coarser")]
            let bytes = bytes as f64;
            *rate = bytes / seconds;
        }
        (seconds > 0.0).then_some((pair[0].at_ms, pair[1].at_ms, rates))
    };
    kept.windows(2).filter_map(between).collect()
}

fn wire(canvas: &mut Canvas, it: &Move, across: Scale) {
    panel(canvas, WIRE, "On the wire, MB/s");
    let rates = rates(&it.samples);
    let highest = rates.iter().map(|(_, _, rates)| rates.iter().sum::<f64>()).fold(0.0, f64::max);
    let link = it.link_bytes_per_second.filter(|link| *link < highest * 4.0);
    let top = highest.max(link.unwrap_or(0.0)).max(1e6) * 1.08;
    let bottom = WIRE.0 + WIRE.1;
    let y = |rate: f64| bottom - rate / top * WIRE.1;
    time_ticks(canvas, WIRE, across, 0.0);
    let step = tick_step(top, 4.0);
    let mut tick = 0.0;
    while tick <= top {
        canvas.line((LEFT, y(tick)), (RIGHT, y(tick)), "grid");
        canvas.text(LEFT - 8.0, y(tick) + 4.0, Anchor::End, "small", &trimmed(tick / 1e6));
        tick += step;
    }
    for kind in 0..KINDS.len() {
        // A step for each sample: the shape says when bytes crossed, not how it
        // would look if it were smooth.
        let mut upper = Vec::new();
        let mut lower = Vec::new();
        for (from, to, rates) in &rates {
            let below: f64 = rates[..kind].iter().sum();
            for at in [*from, *to] {
                lower.push((across.x(at), y(below)));
                upper.push((across.x(at), y(below + rates[kind])));
            }
        }
        lower.reverse();
        upper.append(&mut lower);
        canvas.polygon(&upper, &format!("k{kind}"));
    }
    if let Some(link) = link {
        canvas.line((LEFT, y(link)), (RIGHT, y(link)), "limit");
        canvas.text(RIGHT - 4.0, y(link) - 5.0, Anchor::End, "small", "speed of the link");
    }
    legend(
        canvas,
        WIRE.0 - 8.0,
        KINDS.iter().enumerate().map(|(kind, name)| (format!("k{kind}"), *name)),
    );
}

/// Coloured squares with names, ending at the right edge.
fn legend<'a>(
    canvas: &mut Canvas,
    y: f64,
    entries: impl DoubleEndedIterator<Item = (String, &'a str)>,
) {
    let mut x = RIGHT;
    for (class, name) in entries.rev() {
        let characters = u32::try_from(name.chars().count()).unwrap_or(u32::MAX);
        x -= f64::from(characters) * 7.0;
        canvas.text(x, y, Anchor::Start, "small", name);
        x -= 15.0;
        canvas.rect(x, y - 9.0, 10.0, 10.0, &class);
        x -= 18.0;
    }
}

fn progress(canvas: &mut Canvas, it: &Move, across: Scale) {
    panel(canvas, PROGRESS, "Done, %");
    let bottom = PROGRESS.0 + PROGRESS.1;
    for percent in [0.0, 50.0, 100.0] {
        let y = bottom - percent / 100.0 * PROGRESS.1;
        canvas.line((LEFT, y), (RIGHT, y), "grid");
        canvas.text(LEFT - 8.0, y + 4.0, Anchor::End, "small", &trimmed(percent));
    }
    let stride = it.samples.len() / POINT_COUNT_MAX + 1;
    for (class, is_disk) in [("l0", true), ("l1", false)] {
        let pick = |sample: &Sample| if is_disk { sample.disk } else { sample.memory };
        let points: Vec<_> = it
            .samples
            .iter()
            .step_by(stride)
            .filter(|sample| pick(sample).1 > 0)
            .map(|sample| {
                let (done, total) = pick(sample);
                #[expect(clippy::cast_precision_loss, reason = "a pixel is coarser")]
                let share = (done as f64 / total as f64).min(1.0);
                (across.x(sample.at_ms), bottom - share * PROGRESS.1)
            })
            .collect();
        canvas.polyline(&points, class);
    }
    let entries = [("p1".to_owned(), "disk"), ("p2".to_owned(), "memory")];
    legend(canvas, PROGRESS.0 - 8.0, entries.into_iter());
}

/// Heights of the two lanes of a panel: source above, destination below.
fn lanes(place: (f64, f64)) -> [f64; 2] {
    [place.0 + place.1 * 0.28, place.0 + place.1 * 0.72]
}

fn lane_names(canvas: &mut Canvas, it: &Move, lanes: [f64; 2]) {
    canvas.text(LEFT - 8.0, lanes[0] + 4.0, Anchor::End, "small", &it.source);
    canvas.text(LEFT - 8.0, lanes[1] + 4.0, Anchor::End, "small", &it.destination);
}

fn beats(canvas: &mut Canvas, it: &Move, across: Scale) {
    panel(canvas, BEATS, "Heartbeats of the guest, seen at the hosts' switch ports");
    let lanes = lanes(BEATS);
    lane_names(canvas, it, lanes);
    time_ticks(canvas, BEATS, across, 0.0);
    // There may be a hundred thousand: marks on whole pixels, one for each, and
    // neighbours drawn as one.
    for (lane, y) in lanes.into_iter().enumerate() {
        let mut pixels: Vec<f64> = it
            .beats
            .iter()
            .filter(|beat| usize::from(beat.at_destination) == lane && across.holds(beat.at_ms))
            .map(|beat| across.x(beat.at_ms).floor())
            .collect();
        pixels.dedup();
        for run in pixels.chunk_by(|one, next| next - one <= 1.0) {
            let width = run[run.len() - 1] - run[0] + 1.0;
            canvas.rect(run[0], y - 8.0, width, 16.0, &format!("b{lane}"));
        }
    }
    let mut notes = vec![format!(
        "{} seen, {} lost",
        format::count(count_of(&it.beats)),
        format::count(it.beats_lost)
    )];
    if let Some(silence) = &it.longest_silence {
        notes.push(format!("longest silence {}", format::duration(silence.ms())));
        let (from, to) = (across.x(silence.from_ms), across.x(silence.to_ms));
        // Mostly it is the blackout, which has its own colour.
        let is_blackout = it.blackout.as_ref().is_some_and(|it| it.from_ms == silence.from_ms);
        if !is_blackout {
            canvas.rect(from, BEATS.0, (to - from).max(2.0), BEATS.1, "quiet");
        }
    }
    if let Some(blackout) = &it.blackout {
        let (from, to) = (across.x(blackout.from_ms), across.x(blackout.to_ms));
        canvas.rect(from, BEATS.0, (to - from).max(2.0), BEATS.1, "dark");
    }
    canvas.text(RIGHT, BEATS.0 - 8.0, Anchor::End, "small", &notes.join("   ·   "));
}

fn count_of<T>(items: &[T]) -> u64 {
    u64::try_from(items.len()).unwrap_or(u64::MAX)
}

/// The switchover, with zero where the vCPUs stopped (or the blackout began).
fn close_up(canvas: &mut Canvas, it: &Move) {
    let downtime: f64 = it.downtime.iter().map(|part| part.ms).sum();
    let Some((from, to)) = close_up_range(it, downtime) else { return };
    let margin = ((to - from) * 0.35).max(CLOSE_MARGIN_MS);
    let across = Scale { from: from - margin, to: to + margin };
    let zero = it.stopped_at_ms.unwrap_or(from);
    panel(canvas, CLOSE, "Switchover, close up");
    let y = [CLOSE.0 + 20.0, CLOSE.0 + 46.0];
    lane_names(canvas, it, y);
    time_ticks(canvas, CLOSE, across, zero);
    if let Some(blackout) = &it.blackout {
        let (from, to) = (across.x(blackout.from_ms), across.x(blackout.to_ms));
        canvas.rect(from, CLOSE.0, to - from, 66.0, "dark");
        let text = format!("blackout {}", format::duration(blackout.ms()));
        canvas.text((from + to) / 2.0, CLOSE.0 + 37.0, Anchor::Middle, "red", &text);
    }
    for beat in it.beats.iter().filter(|beat| across.holds(beat.at_ms)) {
        let lane = usize::from(beat.at_destination);
        canvas.dot(across.x(beat.at_ms), y[lane], 3.0, &format!("b{lane}"));
    }
    let Some(stopped) = it.stopped_at_ms else { return };
    canvas.text(LEFT - 8.0, CLOSE.0 + 85.0, Anchor::End, "small", "downtime");
    let mut at = stopped;
    for (index, part) in it.downtime.iter().enumerate() {
        let (left, right) = (across.x(at), across.x(at + part.ms));
        canvas.rect(left, CLOSE.0 + 72.0, (right - left).max(1.0), 18.0, &format!("d{index}"));
        if fits(&part.name, right - left) {
            canvas.text((left + right) / 2.0, CLOSE.0 + 85.0, Anchor::Middle, "onband", &part.name);
        }
        at += part.ms;
    }
    let mut x = LEFT;
    for (index, part) in it.downtime.iter().enumerate() {
        let text = format!("{} {}", part.name, format::duration(part.ms));
        canvas.rect(x, HEIGHT - 26.0, 10.0, 10.0, &format!("d{index}"));
        canvas.text(x + 15.0, HEIGHT - 17.0, Anchor::Start, "small", &text);
        let characters = u32::try_from(text.chars().count()).unwrap_or(u32::MAX);
        x += f64::from(characters) * 6.3 + 34.0;
    }
}

/// What the close-up must show, from and to; `None` when nothing switched over.
fn close_up_range(it: &Move, downtime_ms: f64) -> Option<(f64, f64)> {
    let stopped = it.stopped_at_ms.map(|at| (at, at + downtime_ms));
    let blackout = it.blackout.as_ref().map(|silence| (silence.from_ms, silence.to_ms));
    match (stopped, blackout) {
        (Some(one), Some(other)) => Some((one.0.min(other.0), one.1.max(other.1))),
        (one, other) => one.or(other),
    }
}
