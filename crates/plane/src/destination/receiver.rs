//! One channel at the destination: frames in, over one connection after the other.

use std::io::Write;
use std::sync::Arc;

use limosa_protocol::frame::{FrameKind, Resume};

use super::apply::Apply;
use super::shared::Shared;
use crate::channel::{FrameMaker, FrameReader};
use crate::link::{Connection, Link};
use crate::shutdown::PlaneError;

pub(super) struct Receiver {
    index: usize,
    link: Arc<Link>,
    shared: Arc<Shared>,
    maker: FrameMaker,
    frames: FrameReader,
    apply: Apply,
    /// Number of the last frame that was taken over
    applied: u64,
}

impl Receiver {
    pub(super) fn new(
        index: usize,
        link: Arc<Link>,
        shared: Arc<Shared>,
    ) -> Result<Self, PlaneError> {
        Ok(Self {
            index,
            link,
            maker: FrameMaker::new(index.to_string(), false)?,
            frames: FrameReader::new(index.to_string())?,
            apply: Apply::new(index, Arc::clone(&shared)),
            shared,
            applied: 0,
        })
    }

    pub(super) fn run(mut self) -> Result<(), PlaneError> {
        let mut tried = 0;
        while let Some(mut connection) = self.link.take(self.index, tried) {
            tried = connection.number;
            let error = self.receive(&mut connection);
            if self.shared.shutdown.is_shut_down() {
                return Ok(());
            }
            if !error.is_lost() {
                return Err(error);
            }
            self.link.lost(tried, error);
        }
        Ok(())
    }

    /// Says what is there already, then applies what follows until the
    /// connection or something here fails.
    fn receive(&mut self, connection: &mut Connection) -> PlaneError {
        if let Err(error) = self.resume(connection) {
            return error;
        }
        let mut has_begun = false;
        loop {
            if let Err(error) = self.next(connection) {
                return error;
            }
            if !std::mem::replace(&mut has_begun, true) {
                self.link.caught_up(connection.number);
            }
        }
    }

    fn resume(&mut self, connection: &mut Connection) -> Result<(), PlaneError> {
        let resume = Resume { received: self.applied };
        let frame = self.maker.make(FrameKind::Resume, &resume.encode())?;
        let written = connection.write_all(frame).and_then(|()| connection.flush());
        written.map_err(|error| PlaneError::lost(self.index, error))
    }

    fn next(&mut self, connection: &mut Connection) -> Result<(), PlaneError> {
        let (kind, payload) = self.frames.next(connection)?;
        if kind == FrameKind::KeepAlive {
            return Ok(());
        }
        let number = self.applied + 1;
        self.apply.frame(kind, payload, number)?;
        self.applied = number;
        let is_urgent =
            matches!(kind, FrameKind::RamBarrier | FrameKind::DiskBarrier | FrameKind::StreamEnd);
        self.shared.ack_state.applied(self.index, number, self.frames.wire_bytes(), is_urgent);
        self.apply.after(kind)
    }
}
