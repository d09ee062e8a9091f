//! What the destination's QEMU gets of the source's streams.
//!
//! ```text
//! Stream ──────────────────────────► QEMU      at once: whole sections, harmless
//! Tail ─► held ─ Release, all RAM ─► QEMU      once: loading cannot be undone
//!           └── a new stream begins ─► thrown away
//!
//! detach ─ what is left of this stream is dropped ─► another QEMU ─► a new stream begins
//! ```
//!
//! **Invariant.** A QEMU gets bytes of one tail only, and device state only after all
//! RAM is in.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;

/// Most bytes of a tail that are held. Device state is some 100 KiB, and memory
/// of a display can come with it. What is longer goes to QEMU as it comes, and
/// then a switchover that fails cannot be tried again.
const TAIL_BYTES_MAX: usize = 16 << 20;

/// QEMU's end of a stream, and what waits for it.
pub(super) struct Tail {
    /// `None` for a VM without memory, and once QEMU has all of it
    qemu: Option<UnixStream>,
    held: Vec<u8>,
    /// The source's QEMU has ended its stream
    is_whole: bool,
    is_released: bool,
    /// QEMU has read a part of the tail
    is_begun: bool,
    /// Let go of: the stream of before is not for anybody any more
    is_over: bool,
}

/// Why a frame of a stream is not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum TailError {
    /// The source is wrong.
    #[error("{0}")]
    Order(&'static str),
    /// QEMU does not take it.
    #[error("giving QEMU its stream (see qemu.log)")]
    Qemu(#[source] io::Error),
}

impl Tail {
    pub(super) fn new(qemu: Option<UnixStream>) -> Self {
        Self {
            qemu,
            held: Vec::new(),
            is_whole: false,
            is_released: false,
            is_begun: false,
            is_over: false,
        }
    }

    /// Lets go of QEMU, which has all of the stream or ends.
    pub(super) fn detach(&mut self) {
        if let Some(qemu) = &self.qemu {
            // It may have closed it before.
            qemu.shutdown(std::net::Shutdown::Both).ok();
        }
        *self = Self { is_over: true, ..Self::new(None) };
    }

    /// Takes another QEMU, which gets the stream that begins next.
    pub(super) fn begin_retry(&mut self, qemu: UnixStream) {
        *self = Self { is_over: true, ..Self::new(Some(qemu)) };
    }

    /// Throws away what a stream before left.
    pub(super) fn begin(&mut self) -> Result<(), TailError> {
        if self.is_begun || self.is_released {
            return Err(TailError::Order("another stream, and QEMU has begun to load this one"));
        }
        self.held = Vec::new();
        self.is_whole = false;
        self.is_over = false;
        Ok(())
    }

    /// Sections that QEMU may read at any time.
    pub(super) fn stream(&mut self, bytes: &[u8]) -> Result<(), TailError> {
        if self.is_over {
            return Ok(());
        }
        if self.is_begun || self.is_released {
            return Err(TailError::Order("sections after the tail"));
        }
        self.write(bytes)
    }

    /// Whether the tail with these bytes is too long to be held.
    pub(super) fn is_long_with(&self, bytes: &[u8]) -> bool {
        !self.is_over && (self.is_begun || self.held.len() + bytes.len() > TAIL_BYTES_MAX)
    }

    /// Holds a piece of the tail.
    pub(super) fn hold(&mut self, bytes: &[u8]) -> Result<(), TailError> {
        if self.is_over {
            return Ok(());
        }
        if self.is_whole || self.qemu.is_none() {
            return Err(TailError::Order("a tail where none belongs"));
        }
        self.held.extend_from_slice(bytes);
        Ok(())
    }

    /// Gives a tail that is too long to QEMU.
    pub(super) fn pass_on(&mut self, bytes: &[u8]) -> Result<(), TailError> {
        self.hold(bytes)?;
        if self.is_over {
            return Ok(());
        }
        self.is_begun = true;
        let held = std::mem::take(&mut self.held);
        self.write(&held)
    }

    /// The source's QEMU has ended its stream.
    pub(super) fn end(&mut self) -> Result<(), TailError> {
        if self.is_over {
            return Ok(());
        }
        if self.is_whole || self.qemu.is_none() {
            return Err(TailError::Order("an end where none belongs"));
        }
        self.is_whole = true;
        Ok(())
    }

    /// The source does not send another stream.
    pub(super) fn release(&mut self) -> Result<(), TailError> {
        if self.is_over {
            return Ok(());
        }
        if !self.is_whole || self.is_released {
            return Err(TailError::Order("a release of no whole stream"));
        }
        self.is_released = true;
        Ok(())
    }

    /// Gives QEMU the rest if it is released; says whether it did. All RAM is in.
    pub(super) fn give(&mut self) -> Result<bool, TailError> {
        if !self.is_released || self.qemu.is_none() {
            return Ok(false);
        }
        self.is_begun = true;
        let held = std::mem::take(&mut self.held);
        self.write(&held)?;
        if let Some(qemu) = self.qemu.take() {
            // QEMU may have closed its end when it had read all.
            qemu.shutdown(std::net::Shutdown::Write).ok();
        }
        Ok(true)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), TailError> {
        let qemu = self.qemu.as_mut().ok_or(TailError::Order("a stream for no QEMU"))?;
        qemu.write_all(bytes).map_err(TailError::Qemu)
    }
}
