//! Tells the source what each channel brought, and that this host is there.
//!
//! ```text
//! receivers ─► AckState (what is applied, barriers) ─► ack thread ═► return path
//! ```
//!
//! An acknowledgement says all that is known of its channel, so one that was lost
//! with its connection is made good by the next.

use std::io::Write;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use limosa_protocol::frame::{Ack, Barrier, FrameKind};

use crate::channel::{FrameMaker, bare_frame};
use crate::link::{Connection, Link};
use crate::shutdown::{PlaneError, Shutdown};

/// Bytes that are applied before they are acknowledged: a small part of the
/// source's window.
const ACK_EVERY_BYTES: u64 = 256 << 10;
/// Longest wait until less than that is acknowledged.
const LINGER_MAX: Duration = Duration::from_millis(20);

/// What is to be acknowledged.
pub(super) struct AckState {
    written: Mutex<Written>,
    changed: Condvar,
}

struct Written {
    acks: Vec<Ack>,
    /// Bytes of frames applied since the source was told
    unsaid_bytes: u64,
    is_urgent: bool,
}

impl AckState {
    pub(super) fn new(channel_count: usize) -> Self {
        let channels = (0..channel_count)
            .map(|index| u8::try_from(index).expect("at most CHANNEL_COUNT_MAX channels"));
        let acks = channels.map(|channel| Ack { channel, ..Ack::default() }).collect();
        Self {
            written: Mutex::new(Written { acks, unsaid_bytes: 0, is_urgent: false }),
            changed: Condvar::new(),
        }
    }

    /// Notes that a frame was taken over for good. An urgent one is acknowledged
    /// at once: somebody waits for it.
    pub(super) fn applied(&self, channel: usize, number: u64, wire_bytes: u64, is_urgent: bool) {
        let mut written = self.lock();
        written.acks[channel].applied = number;
        written.unsaid_bytes += wire_bytes;
        written.is_urgent |= is_urgent;
        if written.is_urgent || written.unsaid_bytes >= ACK_EVERY_BYTES {
            drop(written);
            self.changed.notify_all();
        }
    }

    /// Notes a barrier of RAM; told when its frame is applied.
    pub(super) fn passed_ram(&self, channel: usize, barrier: Barrier) {
        self.lock().acks[channel].ram = barrier;
    }

    /// Notes a barrier of the disks, which are durable by now; told at once, or
    /// when its frame is applied.
    pub(super) fn passed_disks(&self, channel: usize, barrier: Barrier) {
        let mut written = self.lock();
        written.acks[channel].disk = barrier;
        written.is_urgent = true;
        drop(written);
        self.changed.notify_all();
    }

    /// Wakes the ack thread: the plane has ended, and somebody waits for its threads.
    pub(super) fn wake(&self) {
        self.lock().is_urgent = true;
        self.changed.notify_all();
    }

    /// Everything, once there is something new to say, or after a while.
    fn next(&self, said: &[Ack]) -> Vec<Ack> {
        let is_calm =
            |written: &mut Written| !written.is_urgent && written.unsaid_bytes < ACK_EVERY_BYTES;
        let waited = self.changed.wait_timeout_while(self.lock(), LINGER_MAX, is_calm);
        let mut written = waited.unwrap_or_else(PoisonError::into_inner).0;
        // A barrier counts with its frame, which may not be through yet.
        let whole = |ack: &&Ack| ack.ram.at.max(ack.disk.at) <= ack.applied;
        let news = written.acks.iter().filter(|ack| !said.contains(ack)).filter(whole);
        let news = news.copied().collect();
        written.unsaid_bytes = 0;
        written.is_urgent = false;
        news
    }

    fn lock(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the source, over one connection after the other, until the plane ends.
    pub(super) fn run(
        &self,
        link: &Link,
        role: usize,
        keep_alive_every: Duration,
        shutdown: &Shutdown,
    ) -> Result<(), PlaneError> {
        let mut frames = FrameMaker::new("return path".to_owned(), false)?;
        let mut tried = 0;
        while let Some(mut connection) = link.take(role, tried) {
            tried = connection.number;
            let Err(error) =
                self.send_reports(&mut connection, link, &mut frames, keep_alive_every, shutdown)
            else {
                return Ok(());
            };
            link.lost(tried, error);
        }
        Ok(())
    }

    /// Tells over one connection until it fails, or the plane ends.
    fn send_reports(
        &self,
        connection: &mut Connection,
        link: &Link,
        frames: &mut FrameMaker,
        keep_alive_every: Duration,
        shutdown: &Shutdown,
    ) -> Result<(), PlaneError> {
        let lost = |error| PlaneError::lost("return path", error);
        // Whoever opened the connection waits for a sign.
        let mut last_write: Option<Instant> = None;
        let mut said = Vec::new();
        while !shutdown.is_shut_down() {
            if !link.is_up(connection.number) {
                let replaced = std::io::ErrorKind::ConnectionReset.into();
                return Err(lost(replaced));
            }
            let is_due = last_write.is_none_or(|at| at.elapsed() >= keep_alive_every);
            let news = self.next(&said);
            if shutdown.is_shut_down() {
                return Ok(());
            }
            if news.is_empty() && !is_due {
                continue;
            }
            if news.is_empty() {
                connection.write_all(&bare_frame(FrameKind::KeepAlive)).map_err(lost)?;
            }
            for ack in &news {
                let frame = frames.make(FrameKind::Ack, &ack.encode())?;
                connection.write_all(frame).map_err(lost)?;
            }
            connection.flush().map_err(lost)?;
            said.retain(|ack: &Ack| news.iter().all(|new| new.channel != ack.channel));
            said.extend(news);
            if last_write.replace(Instant::now()).is_none() {
                link.caught_up(connection.number);
            }
        }
        Ok(())
    }
}
