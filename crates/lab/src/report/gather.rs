//! Collects a [`Move`] while it happens: from the agent's events, the capture
//! and the client.

use limosa_protocol::migration::{Migration, Phase};

use super::{Beat, ClientNoticed, Move, Pages, Part, Sample, Span};
use crate::harness::capture::{Kind, Trace, trace::Silence};
use crate::harness::client::Noticed;

/// The agent's words about one migration, as they came.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gathered {
    moments: Vec<(u64, Migration)>,
}

impl Gathered {
    /// Adds what the agent said at a moment, in milliseconds since 1970.
    pub(crate) fn add(&mut self, at_unix_ms: u64, migration: Migration) {
        self.moments.push((at_unix_ms, migration));
    }

    /// The last word.
    pub(crate) fn last(&self) -> Option<&Migration> {
        self.moments.last().map(|(_, migration)| migration)
    }

    /// Puts everything on one scale of time.
    pub(crate) fn into_move(
        self,
        trace: &Trace,
        noticed: Option<&Noticed>,
        link_mbit: Option<u32>,
    ) -> Option<Move> {
        let last = self.last()?.clone();
        let started_ms = last.started_unix_ms;
        let relative = |unix_ms: u64| ms_since(unix_ms, started_ms);
        let ended_ms =
            last.ended_unix_ms.unwrap_or_else(|| self.moments.last().map_or(0, |(at, _)| *at));
        let summary = last.summary.clone().unwrap_or_default();
        let phases = phase_spans(&summary.phase_ms);
        let from_ns = started_ms.saturating_mul(1_000_000);
        let seen = trace.between(from_ns, ended_ms.saturating_add(500).saturating_mul(1_000_000));
        let (source, destination) = (last.source.to_string(), last.destination.to_string());
        let silence = |name: &str, silence: Silence| Span {
            name: name.to_owned(),
            from_ms: ns_since(silence.from_ns, from_ns),
            to_ms: ns_since(silence.to_ns, from_ns),
        };
        let switchover = phases.iter().find(|span| span.name == Phase::Switchover.as_str());
        Some(Move {
            vm: last.vm.to_string(),
            outcome: last.outcome.map_or("unfinished", |outcome| outcome.as_str()).to_owned(),
            total_ms: relative(ended_ms),
            samples: self
                .moments
                .iter()
                .filter(|(at, _)| *at <= ended_ms)
                .map(|(at, migration)| sample(relative(*at), migration))
                .collect(),
            moved: pages(&last),
            downtime: downtime_parts(&last),
            stopped_at_ms: last
                .summary
                .as_ref()
                .and_then(|summary| summary.downtime)
                .and(switchover)
                .map(|span| span.from_ms),
            beats: beats(&seen, &destination, from_ns),
            beats_lost: u64::try_from(seen.lost_heartbeats().len()).unwrap_or(u64::MAX),
            blackout: seen.blackout(&source, &destination).map(|it| silence("blackout", it)),
            longest_silence: seen.longest_silence().map(|it| silence("silence", it)),
            client: noticed.map(client),
            link_bytes_per_second: link_mbit.map(|mbit| f64::from(mbit) * 1e6 / 8.0),
            phases,
            source,
            destination,
        })
    }
}

#[expect(clippy::cast_precision_loss, reason = "differences are far below 2^52")]
fn ms_since(unix_ms: u64, zero_ms: u64) -> f64 {
    unix_ms.saturating_sub(zero_ms) as f64
}

fn ns_since(at_ns: u64, zero_ns: u64) -> f64 {
    std::time::Duration::from_nanos(at_ns.saturating_sub(zero_ns)).as_secs_f64() * 1e3
}

fn phase_spans(lengths: &std::collections::BTreeMap<Phase, u64>) -> Vec<Span> {
    let mut at_ms = 0.0;
    let mut spans = Vec::new();
    for (phase, length_ms) in lengths {
        let to_ms = at_ms + ms_since(*length_ms, 0);
        spans.push(Span { name: phase.as_str().to_owned(), from_ms: at_ms, to_ms });
        at_ms = to_ms;
    }
    spans
}

fn sample(at_ms: f64, migration: &Migration) -> Sample {
    let progress = &migration.progress;
    let moved = &progress.moved;
    let known = moved.disk_packed_bytes + moved.ram_packed_bytes + moved.stream_bytes;
    let disk = progress
        .disks
        .values()
        .fold((0, 0), |sum: (u64, u64), disk| (sum.0 + disk.done_bytes, sum.1 + disk.total_bytes));
    Sample {
        at_ms,
        wire_bytes: [
            moved.disk_packed_bytes,
            moved.ram_packed_bytes,
            moved.stream_bytes,
            moved.wire_bytes.saturating_sub(known),
        ],
        disk,
        memory: (progress.memory.done_bytes, progress.memory.total_bytes),
    }
}

fn pages(last: &Migration) -> Pages {
    let moved = last.summary.as_ref().map_or(last.progress.moved, |summary| summary.moved);
    Pages {
        zero: moved.zero_pages,
        unchanged: moved.unchanged_pages,
        difference: moved.difference_pages,
        full: moved.full_pages,
        memory_bytes: (moved.ram_payload_bytes, moved.ram_packed_bytes),
        disk_bytes: (moved.disk_payload_bytes, moved.disk_packed_bytes),
        disk_hole_bytes: moved.disk_zero_bytes,
        device_bytes: moved.stream_bytes,
        wire_bytes: moved.wire_bytes,
    }
}

fn downtime_parts(last: &Migration) -> Vec<Part> {
    let Some(downtime) = last.summary.as_ref().and_then(|summary| summary.downtime) else {
        return Vec::new();
    };
    [
        ("stop", downtime.stop_ms),
        ("final round", downtime.final_round_ms),
        ("device state", downtime.device_state_ms),
        ("commit", downtime.commit_ms),
        ("resume", downtime.resume_ms),
    ]
    .map(|(name, ms)| Part { name: name.to_owned(), ms })
    .to_vec()
}

fn beats(trace: &Trace, destination: &str, from_ns: u64) -> Vec<Beat> {
    let is_beat = |kind| matches!(kind, Kind::Heartbeat { .. });
    trace
        .frames()
        .iter()
        .filter(|frame| is_beat(frame.kind))
        .map(|frame| Beat {
            at_ms: ns_since(frame.at_ns, from_ns),
            at_destination: trace.host_name(frame.host) == Some(destination),
        })
        .collect()
}

fn client(noticed: &Noticed) -> ClientNoticed {
    ClientNoticed {
        sessions: u64::try_from(noticed.tcp.len()).unwrap_or(u64::MAX),
        answers: noticed.tcp.iter().map(|tally| tally.exchanges).sum(),
        broken: noticed.resets(),
        wrong: noticed.tcp.iter().map(|tally| tally.wrong).sum(),
        longest_gap_ms: noticed.longest_tcp_gap_ms(),
    }
}
