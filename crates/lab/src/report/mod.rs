//! What a migration looked like, from inside and from outside.
//!
//! ```text
//! agent's progress ─┐
//! capture's frames ─┼─► Report (numbers only) ─► text: the terminal
//! client's tallies ─┘                          └► page: HTML with one SVG a move
//! ```
//!
//! **Invariants.** Making text or pictures from a [`Report`] asks nobody and
//! reads no clock. All times are milliseconds since the start of the move.

mod canvas;
pub(crate) mod format;
pub(crate) mod gather;
mod page;
pub(crate) mod terminal;
mod timeline;

use serde::{Deserialize, Serialize};

pub(crate) use page::html;
pub(crate) use timeline::svg;

/// Several moves of one VM.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    /// What was shown
    pub title: String,
    /// On what it ran: processors, accelerator, speed of the link
    pub machine: String,
    /// The moves, in order
    pub moves: Vec<Move>,
}

/// One move.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Move {
    /// The VM
    pub vm: String,
    /// Host that gave it
    pub source: String,
    /// Host that got it
    pub destination: String,
    /// How it ended: `moved`, `stayed`, `in-doubt`
    pub outcome: String,
    /// Duration
    pub total_ms: f64,
    /// Phases in order
    pub phases: Vec<Span>,
    /// Moments of the transfer, in order of time
    pub samples: Vec<Sample>,
    /// What crossed, in all
    pub moved: Pages,
    /// Parts of the downtime in order, each with its length
    pub downtime: Vec<Part>,
    /// When the vCPUs stopped, when known
    pub stopped_at_ms: Option<f64>,
    /// Heartbeats as seen at the switch
    pub beats: Vec<Beat>,
    /// Heartbeats that were never seen
    pub beats_lost: u64,
    /// Silence between the last frame at the source and the first at the destination
    pub blackout: Option<Span>,
    /// Longest silence of the whole move
    pub longest_silence: Option<Span>,
    /// What the client noticed
    pub client: Option<ClientNoticed>,
    /// Speed of the link in bytes per second, when it is limited
    pub link_bytes_per_second: Option<f64>,
}

/// A named stretch of time.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Span {
    /// What it is
    pub name: String,
    /// Its begin
    pub from_ms: f64,
    /// Its end
    pub to_ms: f64,
}

impl Span {
    /// Its length.
    pub(crate) fn ms(&self) -> f64 {
        self.to_ms - self.from_ms
    }
}

/// A named length of time.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Part {
    /// What was done
    pub name: String,
    /// How long
    pub ms: f64,
}

/// Kinds of bytes on the wire, in the order of [`Sample::wire_bytes`].
pub(crate) const KINDS: [&str; 4] = ["disk", "memory", "device state", "framing"];

/// A moment of the transfer. All bytes are counted from the start.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// When
    pub at_ms: f64,
    /// Bytes on the wire, by [`KINDS`]
    pub wire_bytes: [u64; 4],
    /// Disk bytes done and to be done
    pub disk: (u64, u64),
    /// Memory bytes done and to be done
    pub memory: (u64, u64),
}

/// What crossed, before and after packing.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Pages {
    /// Pages of zeroes, not sent
    pub zero: u64,
    /// Pages that had not changed, not sent
    pub unchanged: u64,
    /// Pages sent as differences
    pub difference: u64,
    /// Pages sent whole
    pub full: u64,
    /// Bytes of memory before and after packing
    pub memory_bytes: (u64, u64),
    /// Bytes of disks before and after packing
    pub disk_bytes: (u64, u64),
    /// Bytes of disks that were holes, not sent
    pub disk_hole_bytes: u64,
    /// Bytes of device state
    pub device_bytes: u64,
    /// All bytes on the wire
    pub wire_bytes: u64,
}

/// A heartbeat of the guest.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Beat {
    /// When it was seen
    pub at_ms: f64,
    /// Whether the destination's port saw it
    pub at_destination: bool,
}

/// What the outside client noticed.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct ClientNoticed {
    /// TCP sessions kept open
    pub sessions: u64,
    /// Answers checked
    pub answers: u64,
    /// Sessions that broke
    pub broken: u64,
    /// Wrong bytes
    pub wrong: u64,
    /// Longest time without an answer
    pub longest_gap_ms: f64,
}

#[cfg(test)]
mod tests;
