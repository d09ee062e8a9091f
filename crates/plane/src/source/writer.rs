//! One channel as its sender sees it: frames go out in order, each once, whatever
//! becomes of the connections under it.
//!
//! ```text
//! frame ─► kept in the replay buffer ─► connection
//!              │ lost ─► another ─► the destination says what it has ─► the rest again
//!              ◄─ acknowledged (by the thread of the return path)
//! ```

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use limosa_protocol::frame::{FrameKind, HEADER_BYTES, Resume};

use crate::channel::{FrameMaker, FrameReader, bare_frame};
use crate::link::{Connection, Link};
use crate::meter::{Meter, add};
use crate::replay::Replay;
use crate::settings::PlaneSettings;
use crate::shutdown::PlaneError;

/// How often one who waits for room looks at the link.
const LOOK_EVERY: Duration = Duration::from_millis(100);

pub(super) struct FrameWriter {
    role: usize,
    link: Arc<Link>,
    replay: Arc<Replay>,
    meter: Arc<Meter>,
    maker: FrameMaker,
    reader: FrameReader,
    connection: Option<Connection>,
    /// Number of the set of connections that was tried last
    tried: u64,
    last_write: Instant,
    keep_alive_every: Duration,
}

impl FrameWriter {
    pub(super) fn new(
        role: usize,
        link: Arc<Link>,
        replay: Arc<Replay>,
        meter: Arc<Meter>,
        settings: &PlaneSettings,
    ) -> Result<Self, PlaneError> {
        Ok(Self {
            role,
            link,
            replay,
            meter,
            maker: FrameMaker::new(role.to_string(), settings.compression)?,
            reader: FrameReader::new(role.to_string())?,
            connection: None,
            tried: 0,
            last_write: Instant::now(),
            keep_alive_every: settings.keep_alive_every,
        })
    }

    /// Number of the channel.
    pub(super) fn channel(&self) -> usize {
        self.role
    }

    /// Number of the frame that is sent next.
    pub(super) fn next_number(&self) -> u64 {
        self.replay.sent() + 1
    }

    /// Sends a frame, packed if that makes it smaller; returns the bytes of its
    /// payload on the wire. Waits for room, and for a link.
    pub(super) fn send(&mut self, kind: FrameKind, payload: &[u8]) -> Result<u64, PlaneError> {
        let frame_bytes = self.maker.make(kind, payload)?.len();
        while !self.replay.has_room(frame_bytes, LOOK_EVERY) {
            self.idle()?;
        }
        let frame = self.maker.frame();
        self.replay.keep(frame);
        let written = match &mut self.connection {
            Some(connection) => {
                connection.write_all(frame).map_err(|error| (connection.number, error))
            }
            // Whoever connects sends all that is kept.
            None => Ok(()),
        };
        match written {
            Ok(()) if self.connection.is_some() => {
                self.last_write = Instant::now();
                add(&self.meter.wire_bytes, frame_bytes as u64);
            }
            Ok(()) => self.connect()?,
            Err((number, error)) => self.lose(number, PlaneError::lost(self.role, error))?,
        }
        Ok((frame_bytes - HEADER_BYTES) as u64)
    }

    /// Gives everything to the network now.
    pub(super) fn flush(&mut self) -> Result<(), PlaneError> {
        let Some(connection) = &mut self.connection else { return self.connect() };
        match connection.flush() {
            Ok(()) => Ok(()),
            Err(error) => {
                let number = connection.number;
                self.lose(number, PlaneError::lost(self.role, error))
            }
        }
    }

    /// To be called now and then by one who has nothing to send: says that it is
    /// there, and takes other connections when these are lost.
    pub(super) fn idle(&mut self) -> Result<(), PlaneError> {
        let Some(connection) = &mut self.connection else { return self.connect() };
        let number = connection.number;
        if !self.link.is_up(number) {
            return self.connect();
        }
        if self.last_write.elapsed() < self.keep_alive_every {
            return Ok(());
        }
        self.last_write = Instant::now();
        add(&self.meter.wire_bytes, HEADER_BYTES as u64);
        match say_alive(connection) {
            Ok(()) => Ok(()),
            Err(error) => self.lose(number, PlaneError::lost(self.role, error)),
        }
    }

    fn lose(&mut self, number: u64, error: PlaneError) -> Result<(), PlaneError> {
        self.link.lost(number, error);
        self.connect()
    }

    /// Waits for a connection and goes on where the destination stands. Fails
    /// only when the plane has ended or the peer broke the protocol.
    pub(super) fn connect(&mut self) -> Result<(), PlaneError> {
        self.connection = None;
        loop {
            let taken = self.link.take(self.role, self.tried).ok_or(PlaneError::Aborted)?;
            self.tried = taken.number;
            match self.resume(taken) {
                Ok(connection) => {
                    self.link.caught_up(connection.number);
                    self.connection = Some(connection);
                    return Ok(());
                }
                Err(error) if error.is_lost() => self.link.lost(self.tried, error),
                Err(error) => return Err(error),
            }
        }
    }

    fn resume(&mut self, mut connection: Connection) -> Result<Connection, PlaneError> {
        let (kind, payload) = self.reader.next(&mut connection)?;
        if kind != FrameKind::Resume {
            return Err(PlaneError::protocol(
                self.role,
                "a connection that does not begin with its count",
            ));
        }
        let Resume { received } =
            Resume::decode(payload).map_err(|error| PlaneError::frame(self.role, error))?;
        let resent =
            self.replay.after(received).map_err(|error| PlaneError::protocol(self.role, error))?;
        add(&self.meter.wire_bytes, (resent.len() + HEADER_BYTES) as u64);
        add(&self.meter.resent_bytes, resent.len() as u64);
        let lost = |error| PlaneError::lost(self.role, error);
        connection.write_all(&resent).map_err(lost)?;
        say_alive(&mut connection).map_err(lost)?;
        self.last_write = Instant::now();
        Ok(connection)
    }
}

fn say_alive(connection: &mut Connection) -> std::io::Result<()> {
    connection.write_all(&bare_frame(FrameKind::KeepAlive))?;
    connection.flush()
}
