//! What a capture saw, and what follows from it: silences and losses.
//!
//! ```text
//! host a  ● ● ● ● ● ●
//! host b                      ● ● ● ●
//!                   └─ blackout ─┘
//! ```
//!
//! Pure: works on numbers only, without a clock.

use serde::{Deserialize, Serialize};

/// One frame of the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Frame {
    /// When it left its host, in nanoseconds since 1970
    pub at_ns: u64,
    /// At which host's port, by index
    pub host: u8,
    /// Its length on the wire
    pub bytes: u32,
    /// What it was
    pub kind: Kind,
}

/// What a frame was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// A sign of life from the guest's own program
    Heartbeat {
        /// Counted by the guest from 0
        sequence: u64,
        /// Drawn at each boot
        #[serde(default)]
        boot: u64,
    },
    /// Tells switches and neighbours where the VM is now
    Announcement(How),
    /// Any other traffic
    Other,
}

/// How a VM's place is announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum How {
    /// RARP, which switches learn from
    Rarp,
    /// Gratuitous ARP of the host's agent
    AgentArp,
    /// Gratuitous ARP of the guest itself
    GuestArp,
    /// Unsolicited neighbour advertisement, of either
    Advertisement,
}

impl Kind {
    /// Whether it tells where the VM is, and may be the host's own.
    pub(crate) fn is_announcement(self) -> bool {
        matches!(self, Self::Announcement(_))
    }
}

/// A time without frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Silence {
    /// The last frame before it, in nanoseconds since 1970
    pub from_ns: u64,
    /// The first frame after it, in nanoseconds since 1970
    pub to_ns: u64,
}

impl Silence {
    /// How long it lasted, in milliseconds.
    pub(crate) fn ms(&self) -> f64 {
        std::time::Duration::from_nanos(self.to_ns.saturating_sub(self.from_ns)).as_secs_f64() * 1e3
    }
}

/// All frames of one VM, in order of time.
#[derive(Debug, Clone, Default)]
pub(crate) struct Trace {
    hosts: Vec<String>,
    frames: Vec<Frame>,
}

impl Trace {
    /// Orders what several ports saw.
    pub(crate) fn new(hosts: Vec<String>, mut frames: Vec<Frame>) -> Self {
        frames.sort_by_key(|frame| frame.at_ns);
        Self { hosts, frames }
    }

    /// All frames, in order of time.
    pub(crate) fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// Name of the host with that index.
    pub(crate) fn host_name(&self, index: u8) -> Option<&str> {
        self.hosts.get(usize::from(index)).map(String::as_str)
    }

    /// The part between two moments, in nanoseconds since 1970.
    #[must_use]
    pub(crate) fn between(&self, from_ns: u64, to_ns: u64) -> Self {
        let inside = |frame: &&Frame| (from_ns..=to_ns).contains(&frame.at_ns);
        Self {
            hosts: self.hosts.clone(),
            frames: self.frames.iter().filter(inside).copied().collect(),
        }
    }

    /// Number of heartbeats seen.
    #[cfg(test)]
    pub(crate) fn heartbeat_count(&self) -> usize {
        self.heartbeats().count()
    }

    /// Numbers missing between the first and the last heartbeat seen.
    pub(crate) fn lost_heartbeats(&self) -> Vec<u64> {
        let mut seen: Vec<_> = self.heartbeats().map(|(_, sequence)| sequence).collect();
        seen.sort_unstable();
        seen.windows(2).flat_map(|pair| (pair[0] + 1)..pair[1]).collect()
    }

    /// Whether any heartbeat was seen twice or out of order, or an earlier boot
    /// was heard after a later one had begun: two running copies.
    pub(crate) fn two_copies(&self) -> bool {
        let mut ended = std::collections::HashSet::new();
        let mut latest: Option<(u64, u64)> = None;
        self.frames.iter().any(|frame| {
            let Kind::Heartbeat { sequence, boot } = frame.kind else { return false };
            let before = latest.replace((boot, sequence));
            match before {
                Some((of, highest)) if of == boot => sequence <= highest,
                Some((other, _)) => {
                    ended.insert(other);
                    ended.contains(&boot)
                }
                None => false,
            }
        })
    }

    /// The silence of the VM when it went from one host to another: from the
    /// last frame at the one to the first frame of the guest at the other.
    ///
    /// Announcements do not count as life, because the hypervisor sends them,
    /// not the guest. `None` when it was not heard at both.
    pub(crate) fn blackout(&self, from: &str, to: &str) -> Option<Silence> {
        let index = |name: &str| {
            self.hosts.iter().position(|host| host == name).and_then(|at| u8::try_from(at).ok())
        };
        let (from, to) = (index(from)?, index(to)?);
        let mut alive = self.frames.iter().filter(|frame| !frame.kind.is_announcement());
        let last = alive.clone().rfind(|frame| frame.host == from)?;
        let first = alive.find(|frame| frame.host == to)?;
        Some(Silence { from_ns: last.at_ns, to_ns: first.at_ns })
    }

    /// The longest time without a sign of the guest.
    pub(crate) fn longest_silence(&self) -> Option<Silence> {
        let alive: Vec<_> = self
            .frames
            .iter()
            .filter(|frame| !frame.kind.is_announcement())
            .map(|frame| frame.at_ns)
            .collect();
        alive
            .windows(2)
            .map(|pair| Silence { from_ns: pair[0], to_ns: pair[1] })
            .max_by_key(|silence| silence.to_ns - silence.from_ns)
    }

    fn heartbeats(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.frames.iter().filter_map(|frame| match frame.kind {
            Kind::Heartbeat { sequence, .. } => Some((frame.at_ns, sequence)),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn beat(at_ms: u64, host: u8, sequence: u64) -> Frame {
        of_boot(at_ms, host, sequence, 1)
    }

    fn of_boot(at_ms: u64, host: u8, sequence: u64, boot: u64) -> Frame {
        Frame { at_ns: at_ms * MS, host, bytes: 60, kind: Kind::Heartbeat { sequence, boot } }
    }

    fn trace(frames: Vec<Frame>) -> Trace {
        Trace::new(vec!["a".into(), "b".into()], frames)
    }

    /// Goal: the blackout is the gap between the hosts, the longest silence may be elsewhere.
    #[test]
    fn silences_are_told_apart() {
        let mut frames: Vec<_> = (0..5).map(|n| beat(n * 10, 0, n)).collect();
        frames.push(beat(240, 0, 5));
        // An announcement is the hypervisor's and ends no blackout.
        frames.push(Frame {
            at_ns: 250 * MS,
            host: 1,
            bytes: 60,
            kind: Kind::Announcement(How::Rarp),
        });
        frames.extend((0..5).map(|n| beat(300 + n * 10, 1, 8 + n)));
        frames.reverse();
        let trace = trace(frames);
        assert_eq!(trace.blackout("a", "b"), Some(Silence { from_ns: 240 * MS, to_ns: 300 * MS }));
        assert_eq!(trace.blackout("a", "c"), None);
        let longest = trace.longest_silence().unwrap();
        assert_eq!((longest.from_ns, longest.to_ns), (40 * MS, 240 * MS));
        assert!((longest.ms() - 200.0).abs() < 1e-9);
        assert_eq!(trace.heartbeat_count(), 11);
        assert_eq!(trace.lost_heartbeats(), [6, 7]);
        assert!(!trace.two_copies());
        assert_eq!(trace.between(240 * MS, 310 * MS).heartbeat_count(), 3);
    }

    /// Goal: two running copies of one guest are noticed from outside.
    #[test]
    fn two_copies_are_noticed() {
        assert!(trace(vec![beat(0, 0, 0), beat(5, 0, 1), beat(6, 1, 1)]).two_copies());
        assert!(trace(vec![beat(0, 0, 5), beat(5, 1, 6), beat(6, 0, 4)]).two_copies());
        // A guest that was started anew counts from 0 and is one copy, unless
        // the old one is heard again.
        let mut boots = vec![of_boot(0, 0, 7, 1), of_boot(5, 1, 0, 2), of_boot(9, 1, 1, 2)];
        assert!(!trace(boots.clone()).two_copies());
        boots.push(of_boot(12, 0, 8, 1));
        assert!(trace(boots).two_copies());
        assert!(trace(vec![]).blackout("a", "b").is_none());
    }
}
