//! How a plane ends: the first failure wins, is told once, and everything that
//! waits wakes up.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use limosa_protocol::frame::FrameError;
use limosa_qemu::stream::StreamError;
use tokio::sync::mpsc;

/// Why a plane failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PlaneError {
    /// The peer or the network went away. Other connections may take its place.
    #[error("channel {channel}: lost the peer")]
    PeerLost {
        /// Which connection
        channel: String,
        /// Why
        #[source]
        source: Arc<io::Error>,
    },
    /// The peer broke the protocol.
    #[error("channel {channel}: {what}")]
    Protocol {
        /// Which connection
        channel: String,
        /// How
        what: String,
    },
    /// QEMU's stream cannot be followed.
    #[error("QEMU's migration stream")]
    Stream(#[source] Arc<StreamError>),
    /// A local file, socket or memory failed.
    #[error("{what}")]
    Local {
        /// What was being done
        what: String,
        /// Why
        #[source]
        source: Arc<io::Error>,
    },
    /// Source and destination hold different contents.
    #[error("channel {channel}: source and destination differ in {place}")]
    Different {
        /// Which connection
        channel: String,
        /// Where
        place: Place,
    },
    /// The agent ended it.
    #[error("ended by the agent")]
    Aborted,
}

#[expect(clippy::needless_pass_by_value, reason = "callers give a name or a number as it is")]
impl PlaneError {
    pub(crate) fn local(what: impl Into<String>, source: io::Error) -> Self {
        Self::Local { what: what.into(), source: Arc::new(source) }
    }
    pub(crate) fn lost(channel: impl ToString, source: io::Error) -> Self {
        // TLS has a long text for a connection that ends without its goodbye.
        let source = match source.kind() {
            io::ErrorKind::UnexpectedEof => io::Error::new(source.kind(), "it was closed"),
            // The kernel's word for a read that timed out.
            io::ErrorKind::WouldBlock => io::Error::new(io::ErrorKind::TimedOut, "it is silent"),
            _ => source,
        };
        Self::PeerLost { channel: channel.to_string(), source: Arc::new(source) }
    }
    pub(crate) fn protocol(channel: impl ToString, what: impl ToString) -> Self {
        Self::Protocol { channel: channel.to_string(), what: what.to_string() }
    }
    pub(crate) fn frame(channel: impl ToString, error: FrameError) -> Self {
        Self::protocol(channel, error)
    }

    /// Whether another connection may be better.
    pub(crate) fn is_lost(&self) -> bool {
        matches!(self, Self::PeerLost { .. })
    }
}

/// Where contents differ, as far as is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Somewhere in RAM
    Ram,
    /// A page of RAM, the first of its channel
    Page {
        /// Where it begins, in bytes from the beginning of RAM
        offset_bytes: u64,
    },
    /// Somewhere on the disks
    Disks,
    /// A range of a disk, the first of its channel
    Range {
        /// Number of the disk
        disk: u16,
        /// Where it begins, in bytes
        from_bytes: u64,
        /// Where it ends, in bytes
        to_bytes: u64,
    },
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ram => f.write_str("RAM"),
            Self::Page { offset_bytes } => write!(f, "RAM, first in the page at {offset_bytes:#x}"),
            Self::Disks => f.write_str("disk contents"),
            Self::Range { disk, from_bytes, to_bytes } => {
                write!(f, "disk number {disk}, first in bytes {from_bytes} to {to_bytes}")
            }
        }
    }
}

/// What a plane reports.
#[derive(Debug, Clone)]
pub enum PlaneEvent {
    /// All RAM is at the destination and equal, and QEMU's stream is complete.
    RamDelivered,
    /// All disks are at the destination, equal and durable, up to the barrier of
    /// this number. One that was given up may still be told of.
    DisksEqual(u32),
    /// The two sides differ. The destination is told what the source has, finds
    /// the place and fails with it; nothing else is sent.
    Different(PlaneError),
    /// A connection broke or fell silent, and with it all: everything stands
    /// still until others are brought. Told at most once for each set of
    /// connections.
    LinkLost(PlaneError),
    /// The connections that were brought are in use, and both sides go on.
    LinkBack,
    /// Nothing more will come. Told once.
    Failed(PlaneError),
}

/// Most events that wait to be received; a plane makes a handful, and a few for each lost link.
pub const EVENT_COUNT_MAX: usize = 64;

/// The events of a plane, in order; `None` once the plane is gone.
pub type PlaneEvents = mpsc::Receiver<PlaneEvent>;

type Closer = Box<dyn Fn() + Send + Sync>;

/// Shared by all threads of a plane.
pub(crate) struct Shutdown {
    is_shut_down: AtomicBool,
    error: Mutex<Option<PlaneError>>,
    closers: Mutex<Vec<Closer>>,
    /// Held while it is sent on, so that the last slot is kept for the failure.
    events: Mutex<mpsc::Sender<PlaneEvent>>,
}

impl Shutdown {
    pub(crate) fn new() -> (Arc<Self>, PlaneEvents) {
        let (sender, events) = mpsc::channel(EVENT_COUNT_MAX);
        let shutdown = Arc::new(Self {
            is_shut_down: AtomicBool::new(false),
            error: Mutex::default(),
            closers: Mutex::default(),
            events: Mutex::new(sender),
        });
        (shutdown, events)
    }

    /// Has something closed when the plane ends.
    pub(crate) fn on_shutdown(&self, closer: Closer) {
        let mut closers = self.closers.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_shut_down() {
            closer();
        } else {
            closers.push(closer);
        }
    }

    pub(crate) fn is_shut_down(&self) -> bool {
        self.is_shut_down.load(Ordering::Acquire)
    }

    /// Ends the plane with an error, unless it has ended.
    pub(crate) fn fail(&self, error: PlaneError) {
        if self.stop(error.clone()) && !matches!(error, PlaneError::Aborted) {
            let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
            // Fails only without a receiver, which wants to know no more.
            events.try_send(PlaneEvent::Failed(error)).ok();
        }
    }

    fn stop(&self, error: PlaneError) -> bool {
        let mut closers = self.closers.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_shut_down.swap(true, Ordering::AcqRel) {
            return false;
        }
        *self.error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        for close in closers.drain(..) {
            close();
        }
        true
    }

    pub(crate) fn emit(&self, event: PlaneEvent) {
        if self.is_shut_down() {
            return;
        }
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.capacity() > 1 {
            events.try_send(event).ok();
            return;
        }
        drop(events);
        let unread = io::Error::other(format!("{EVENT_COUNT_MAX} events are not read"));
        self.fail(PlaneError::local("reporting", unread));
    }

    /// What ended the plane.
    pub(crate) fn result(&self) -> Result<(), PlaneError> {
        match self.error.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            None | Some(PlaneError::Aborted) => Ok(()),
            Some(error) => Err(error),
        }
    }
}

/// Starts a thread of a plane, within the span of its maker; its error ends the plane.
pub(crate) fn spawn(
    name: String,
    shutdown: &Arc<Shutdown>,
    work: impl FnOnce() -> Result<(), PlaneError> + Send + 'static,
) -> io::Result<std::thread::JoinHandle<()>> {
    let (shutdown, span) = (Arc::clone(shutdown), tracing::Span::current());
    std::thread::Builder::new().name(name).spawn(move || {
        let _entered = span.entered();
        if let Err(error) = work() {
            shutdown.fail(error);
        }
    })
}

/// Waits for threads, then says what ended the plane.
pub(crate) fn join(
    threads: Vec<std::thread::JoinHandle<()>>,
    shutdown: &Shutdown,
) -> Result<(), PlaneError> {
    for thread in threads {
        if thread.join().is_err() {
            shutdown.fail(PlaneError::local("a thread", io::Error::other("it panicked")));
        }
    }
    shutdown.result()
}
