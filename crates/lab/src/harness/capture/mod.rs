//! Sees every frame of a VM at the switch ports of the hosts: the outside view
//! of a migration.
//!
//! ```text
//! host a ── lan-a ─┐ thread: frames that enter here from the VM ─┐
//!                  ├ switch                                      ├─► Trace
//! host b ── lan-b ─┘ thread: frames that enter here from the VM ─┘
//! ```
//!
//! The kernel stamps each frame as it enters; both ports share one clock, so
//! that times at the two hosts can be compared directly.

mod socket;
pub(crate) mod trace;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

pub(crate) use trace::{Frame, How, Kind, Trace};

use crate::harness::heartbeat;
use crate::harness::net::Net;

/// Most frames that one capture keeps; at 1,000 a second, over an hour.
pub(crate) const FRAME_COUNT_MAX: usize = 4_000_000;
/// EtherType of RARP, which hypervisors send to announce a moved VM.
const RARP: [u8; 2] = [0x80, 0x35];
/// EtherType of ARP.
const ARP: [u8; 2] = [0x08, 0x06];
/// Bytes of a frame that its sender has padded to Ethernet's least. The agent does; the
/// guest's virtual card does not, so that they can be told apart.
const PADDED_BYTES: u32 = 60;
/// EtherType of IPv6.
const IPV6: [u8; 2] = [0x86, 0xdd];
/// Next header of ICMPv6 in IPv6.
const ICMPV6: u8 = 58;
/// Type of a neighbour advertisement in ICMPv6.
const ADVERTISEMENT: u8 = 136;

/// A capture that goes on until it is stopped or dropped.
#[derive(Debug)]
pub(crate) struct Capture {
    frames: Arc<Mutex<Vec<Frame>>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<u32>>>,
    hosts: Vec<String>,
}

impl Capture {
    /// Begins to record all frames that come from `mac`, at all hosts' ports.
    pub(crate) fn start(net: &Net, mac: [u8; 6]) -> Result<Self> {
        let mut capture = Self {
            frames: Arc::default(),
            stop: Arc::default(),
            threads: Vec::new(),
            hosts: net.hosts.iter().map(|(name, _)| name.clone()).collect(),
        };
        for (index, name) in capture.hosts.iter().enumerate() {
            let host = u8::try_from(index).context("too many hosts")?;
            let port = format!("lan-{name}");
            // Opened here and not in the thread that reads, so that nothing is
            // missed after the return.
            let socket = net.switch.enter(move || socket::PortSocket::open(&port))?;
            let (frames, stop) = (Arc::clone(&capture.frames), Arc::clone(&capture.stop));
            let thread = std::thread::Builder::new()
                .name(format!("lab-capture-{name}"))
                .spawn(move || record(&socket, host, mac, &frames, &stop))?;
            capture.threads.push(thread);
        }
        Ok(capture)
    }

    /// What was seen so far, in order of time.
    pub(crate) fn so_far(&self) -> Trace {
        let frames = self.frames.lock().map(|frames| frames.clone()).unwrap_or_default();
        Trace::new(self.hosts.clone(), frames)
    }

    /// Ends the capture. Fails when the kernel had to drop frames, because a
    /// silence would then prove nothing.
    pub(crate) fn stop(mut self) -> Result<Trace> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let dropped = thread.join().map_err(|_| anyhow::anyhow!("a capture panicked"))??;
            ensure!(dropped == 0, "the capture lost {dropped} frames");
        }
        Ok(self.so_far())
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Reads until told to stop; returns how many frames the kernel dropped.
fn record(
    socket: &socket::PortSocket,
    host: u8,
    mac: [u8; 6],
    frames: &Mutex<Vec<Frame>>,
    stop: &AtomicBool,
) -> Result<u32> {
    let mut buffer = [0; socket::SNAP_BYTES];
    let mut stopped_at_ns = None;
    loop {
        // Looked at before reading, so that all that came before the stop counts;
        // a guest that lives on sends for ever.
        if stop.load(Ordering::Relaxed) && stopped_at_ns.is_none() {
            stopped_at_ns = Some(now_ns()?);
        }
        let Some(received) = socket.receive(&mut buffer)? else {
            if stopped_at_ns.is_some() {
                return socket.dropped();
            }
            continue;
        };
        if stopped_at_ns.is_some_and(|stopped_at_ns| received.at_ns > stopped_at_ns) {
            return socket.dropped();
        }
        let Some(kind) = classify(&buffer[..received.kept_bytes], received.bytes, mac) else {
            continue;
        };
        let frame = Frame { at_ns: received.at_ns, host, bytes: received.bytes, kind };
        let mut frames = frames.lock().map_err(|_| anyhow::anyhow!("a capture panicked"))?;
        ensure!(frames.len() < FRAME_COUNT_MAX, "the capture is full");
        frames.push(frame);
    }
}

/// Nanoseconds since 1970, by the clock that stamps frames.
fn now_ns() -> Result<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    Ok(u64::try_from(now.as_nanos())?)
}

/// What a frame of that length is, when it comes from `mac`.
fn classify(frame: &[u8], bytes: u32, mac: [u8; 6]) -> Option<Kind> {
    if frame.get(6..12)? != mac {
        return None;
    }
    if let Some((sequence, boot)) = heartbeat::in_frame(frame) {
        return Some(Kind::Heartbeat { sequence, boot });
    }
    let ethertype = frame.get(12..14)?;
    let how = if ethertype == RARP {
        How::Rarp
    } else if ethertype == ARP && is_gratuitous(frame) {
        if bytes < PADDED_BYTES { How::GuestArp } else { How::AgentArp }
    } else if ethertype == IPV6 && is_advertisement(frame) {
        How::Advertisement
    } else {
        return Some(Kind::Other);
    };
    Some(Kind::Announcement(how))
}

/// Whether an ARP frame tells its sender's own address.
fn is_gratuitous(frame: &[u8]) -> bool {
    matches!((frame.get(28..32), frame.get(38..42)), (Some(sender), Some(target)) if sender == target)
}

/// Whether an IPv6 frame tells all nodes its sender's own address unasked.
fn is_advertisement(frame: &[u8]) -> bool {
    let (next, to) = (frame.get(20), frame.get(38..54));
    let is_to_all = to == Some(&[0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    let is_solicited = frame.get(58).is_none_or(|flags| flags & 0x40 != 0);
    next == Some(&ICMPV6) && is_to_all && frame.get(54) == Some(&ADVERTISEMENT) && !is_solicited
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

    /// Goal: only the VM's own frames count, each as what it is.
    #[test]
    fn frames_are_classified() {
        let frame =
            |ethertype: [u8; 2], body: &[u8]| [&[0xff; 6], &MAC[..], &ethertype, body].concat();
        let told = |how| Some(Kind::Announcement(how));
        assert_eq!(classify(&frame(RARP, &[0; 28]), 60, MAC), told(How::Rarp));
        assert_eq!(classify(&frame(ARP, &[0; 28]), 60, MAC), told(How::AgentArp));
        assert_eq!(classify(&frame(ARP, &[0; 28]), 42, MAC), told(How::GuestArp));
        let mut question = [0; 28];
        question[27] = 9;
        assert_eq!(classify(&frame(ARP, &question), 60, MAC), Some(Kind::Other));
        assert_eq!(classify(&frame([0x08, 0x00], &[0; 40]), 60, MAC), Some(Kind::Other));
        // As the destination's agent sends it: hop limit 255, to all nodes.
        let mut advertisement = [0; 72];
        advertisement[6] = ICMPV6;
        advertisement[24..26].copy_from_slice(&[0xff, 2]);
        advertisement[39] = 1;
        advertisement[40] = ADVERTISEMENT;
        advertisement[44] = 0x20;
        assert_eq!(classify(&frame(IPV6, &advertisement), 86, MAC), told(How::Advertisement));
        advertisement[44] = 0x60;
        assert_eq!(classify(&frame(IPV6, &advertisement), 86, MAC), Some(Kind::Other));
        assert_eq!(classify(&frame(RARP, &[0; 28]), 60, [0; 6]), None);
        assert_eq!(classify(&[0; 7], 7, MAC), None);
    }
}
