//! The outside client: talks to a guest all the time and checks every answer.
//!
//! ```text
//! client namespace                         guest
//!   tcp 0..n  ── bytes, checked back ──►   TCP 7000 (echo)
//!   udp       ── numbered datagrams ───►   UDP 7001 (echo)
//!   status    ── one connection each ──►   TCP 7002 (JSON)
//!   beats     ◄─ heartbeats ────────────   UDP to 7003
//! ```
//!
//! Each arrow is a thread in the client's namespace. The client knows nothing
//! of migrations: whatever it notices, a user would have noticed.

mod echo;
pub(crate) mod status;
mod tally;

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};

pub(crate) use tally::Tally;

use crate::harness::namespace::Namespace;

/// TCP port of the guest that sends back what it gets.
pub(crate) const TCP_ECHO_PORT: u16 = 7000;
/// UDP port of the guest that sends back what it gets.
pub(crate) const UDP_ECHO_PORT: u16 = 7001;
/// TCP port of the guest that tells how it is.
pub(crate) const STATUS_PORT: u16 = 7002;
/// Most TCP sessions of one client.
pub(crate) const SESSION_COUNT_MAX: usize = 64;

/// What to talk to, and how much.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Talk {
    /// Address of the guest
    pub guest: IpAddr,
    /// Number of TCP sessions kept open
    pub sessions: usize,
    /// Pause between two exchanges of a session, in milliseconds
    pub pause_ms: u64,
}

impl Talk {
    /// Four sessions, each with an exchange every 5 ms.
    pub(crate) fn with(guest: IpAddr) -> Self {
        Self { guest, sessions: 4, pause_ms: 5 }
    }
}

/// All that the client noticed.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Noticed {
    /// Each TCP session
    pub tcp: Vec<Tally>,
    /// The UDP exchange
    pub udp: Tally,
    /// Heartbeats received
    pub heartbeats: Tally,
}

impl Noticed {
    /// TCP connections that broke, in all sessions.
    pub(crate) fn resets(&self) -> u64 {
        self.tcp.iter().map(|tally| tally.broken).sum()
    }

    /// Longest time without an answer on any TCP session, in milliseconds.
    pub(crate) fn longest_tcp_gap_ms(&self) -> f64 {
        self.tcp.iter().map(|tally| tally.longest_gap_ms).fold(0.0, f64::max)
    }

    /// Fails when a user would have noticed more than a short pause.
    pub(crate) fn assert_undisturbed(&self) -> Result<()> {
        for (index, tally) in self.tcp.iter().enumerate() {
            ensure!(tally.exchanges > 0, "TCP session {index} never got an answer");
            ensure!(tally.wrong == 0, "TCP session {index} got {} wrong bytes", tally.wrong);
            ensure!(tally.broken == 0, "TCP session {index} broke {} times", tally.broken);
        }
        ensure!(self.udp.wrong == 0, "{} UDP answers were wrong", self.udp.wrong);
        Ok(())
    }
}

/// A client that talks until it is stopped or dropped.
#[derive(Debug)]
pub(crate) struct Client {
    stop: Arc<AtomicBool>,
    tallies: Vec<(Channel, Arc<Mutex<Tally>>)>,
    threads: Vec<JoinHandle<Result<()>>>,
}

/// Which of the client's arrows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Channel {
    Tcp,
    Udp,
    Beats,
}

impl Client {
    /// Begins to talk from that namespace.
    pub(crate) fn start(namespace: &Namespace, talk: Talk) -> Result<Self> {
        ensure!(talk.sessions <= SESSION_COUNT_MAX, "at most {SESSION_COUNT_MAX} sessions");
        let mut client = Self { stop: Arc::default(), tallies: Vec::new(), threads: Vec::new() };
        client.add(namespace, Channel::Beats, echo::receive_beats)?;
        client.add(namespace, Channel::Udp, move |stop, tally| echo::udp(talk, stop, tally))?;
        for index in 0..talk.sessions {
            client.add(namespace, Channel::Tcp, move |stop, tally| {
                echo::tcp(talk, index, stop, tally)
            })?;
        }
        Ok(client)
    }

    /// What it noticed so far.
    pub(crate) fn so_far(&self) -> Noticed {
        let mut noticed = Noticed::default();
        for (channel, tally) in &self.tallies {
            let tally = tally.lock().map(|tally| tally.clone()).unwrap_or_default();
            match channel {
                Channel::Tcp => noticed.tcp.push(tally),
                Channel::Udp => noticed.udp = tally,
                Channel::Beats => noticed.heartbeats = tally,
            }
        }
        noticed
    }

    /// Waits until every session has got an answer and heartbeats arrive.
    pub(crate) fn wait_until_answered(&self, timeout: std::time::Duration) -> Result<()> {
        let deadline = std::time::Instant::now() + timeout;
        loop {
            let noticed = self.so_far();
            if noticed.tcp.iter().all(|tally| tally.exchanges > 0)
                && noticed.heartbeats.exchanges > 0
            {
                return Ok(());
            }
            if std::time::Instant::now() > deadline {
                bail!("the guest does not answer the client: {noticed:?}");
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    /// Ends it. A gap that was open counts up to now.
    pub(crate) fn stop(mut self) -> Result<Noticed> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().map_err(|_| anyhow::anyhow!("a thread of the client panicked"))??;
        }
        Ok(self.so_far())
    }

    fn add(
        &mut self,
        namespace: &Namespace,
        channel: Channel,
        work: impl FnOnce(&AtomicBool, &Mutex<Tally>) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let tally = Arc::<Mutex<Tally>>::default();
        let (stop, shared) = (Arc::clone(&self.stop), Arc::clone(&tally));
        let thread = namespace.thread("lab-client", move || work(&stop, &shared))?;
        self.tallies.push((channel, tally));
        self.threads.push(thread);
        Ok(())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
