//! All connections of a plane as one thing: the link. It is there, or it is lost
//! until somebody brings new connections.
//!
//! ```text
//! set 1 ── one breaks ─► lost: all of set 1 are closed ─► LinkLost
//!                          │ every stage stands still, nothing is dropped
//! set 2 ── replace ────────┴─► each role takes its own and says what it has ─► LinkBack
//! ```
//!
//! One connection that breaks takes the others with it: the two hosts then never
//! disagree about which of them still work, and what was on its way is sent again
//! from the replay buffers anyway.
//!
//! **Invariants.** A role gets each set at most once. An error on a connection
//! of a set that was replaced means nothing. Events are told in their order.

use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::channel::{ChannelIo, ReadWrite};
use crate::shutdown::{PlaneError, PlaneEvent, Shutdown};

/// The link of a plane. Roles are numbered: the data channels, then the return path.
pub(crate) struct Link {
    shutdown: Arc<Shutdown>,
    role_count: usize,
    set: Mutex<CurrentConnections>,
    changed: Condvar,
}

/// The connections of now.
#[derive(Default)]
struct CurrentConnections {
    /// Counts sets, from 1
    number: u64,
    is_up: bool,
    /// Why the last one was lost, until another is in use
    why_lost: Option<PlaneError>,
    /// Roles that have not yet gone on where they stood
    behind: usize,
    places: Vec<Option<Box<dyn ReadWrite + Send>>>,
    shutdowns: Vec<Box<dyn Fn() + Send + Sync>>,
}

/// One connection of a set.
pub(crate) struct Connection {
    pub(crate) number: u64,
    io: Box<dyn ReadWrite + Send>,
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.io.read(buffer)
    }
}

impl Write for Connection {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.io.write(buffer)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.io.flush()
    }
}

impl Link {
    /// A link with its first connections.
    pub(crate) fn new(
        shutdown: &Arc<Shutdown>,
        channels: Vec<ChannelIo>,
        return_path: ChannelIo,
    ) -> Arc<Self> {
        let link = Arc::new(Self {
            shutdown: Arc::clone(shutdown),
            role_count: channels.len() + 1,
            set: Mutex::default(),
            changed: Condvar::new(),
        });
        let own = Arc::downgrade(&link);
        shutdown.on_shutdown(Box::new(move || {
            if let Some(link) = own.upgrade() {
                link.lock().close();
                link.changed.notify_all();
            }
        }));
        link.place(&mut link.lock(), channels, return_path);
        link
    }

    /// Puts new connections in the place of those before, which may be half dead.
    pub(crate) fn replace(
        &self,
        channels: Vec<ChannelIo>,
        return_path: ChannelIo,
    ) -> Result<(), PlaneError> {
        if channels.len() + 1 != self.role_count {
            return Err(PlaneError::protocol("link", "another number of channels than before"));
        }
        let mut set = self.lock();
        if set.is_up {
            // Whoever brings others knows that these are lost: nobody is told.
            set.close();
            let replaced = io::Error::new(io::ErrorKind::ConnectionReset, "others were opened");
            set.why_lost = Some(PlaneError::lost("link", replaced));
        }
        self.place(&mut set, channels, return_path);
        Ok(())
    }

    fn place(
        &self,
        set: &mut CurrentConnections,
        channels: Vec<ChannelIo>,
        return_path: ChannelIo,
    ) {
        set.number += 1;
        set.is_up = true;
        set.behind = self.role_count;
        (set.places, set.shutdowns) = channels
            .into_iter()
            .chain([return_path])
            .map(|channel| (Some(channel.io), channel.shutdown))
            .unzip();
        if self.shutdown.is_shut_down() {
            set.close();
        }
        self.changed.notify_all();
    }

    /// Waits for a connection of a later set than `after`; `None` when the plane
    /// has ended.
    pub(crate) fn take(&self, role: usize, after: u64) -> Option<Connection> {
        let mut set = self.lock();
        loop {
            if self.shutdown.is_shut_down() {
                return None;
            }
            if set.is_up
                && set.number > after
                && let Some(io) = set.places[role].take()
            {
                return Some(Connection { number: set.number, io });
            }
            set = self.changed.wait(set).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether the connections of that set are in use.
    pub(crate) fn is_up(&self, number: u64) -> bool {
        let set = self.lock();
        set.is_up && set.number == number
    }

    /// Notes that a role goes on where it stood when the set before was lost.
    pub(crate) fn caught_up(&self, number: u64) {
        let mut set = self.lock();
        if !set.is_up || set.number != number {
            return;
        }
        set.behind = set.behind.saturating_sub(1);
        if set.behind == 0 && set.why_lost.take().is_some() {
            self.shutdown.emit(PlaneEvent::LinkBack);
        }
    }

    /// Closes the connections without a word of it here; others may take their place.
    pub(crate) fn close(&self) {
        self.lock().close();
    }

    /// Notes that a connection of a set broke.
    pub(crate) fn lost(&self, number: u64, error: PlaneError) {
        let mut set = self.lock();
        if set.is_up && set.number == number {
            set.close();
            set.why_lost = Some(error.clone());
            self.shutdown.emit(PlaneEvent::LinkLost(error));
        }
    }

    fn lock(&self) -> MutexGuard<'_, CurrentConnections> {
        self.set.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CurrentConnections {
    fn close(&mut self) {
        self.is_up = false;
        self.places.iter_mut().for_each(|place| *place = None);
        for shutdown in self.shutdowns.drain(..) {
            shutdown();
        }
    }
}
