//! Why a stream cannot be followed. Each variant names its remedy.

use std::io;

/// Why a stream could not be followed. The migration must be aborted; the guest
/// stays where it is.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// It is not QEMU's stream, one of another version, or a damaged one.
    #[error("byte {offset}: {what}")]
    Malformed {
        /// Where in the stream
        offset: u64,
        /// What is wrong
        what: String,
    },
    /// A device sends its state before the end of RAM, with a length that only
    /// this device knows.
    #[error(
        "byte {offset}: this VM has device {device:?} whose state Limosa cannot follow: detach \
         the device, or move the VM while it is off"
    )]
    Device {
        /// Where in the stream
        offset: u64,
        /// QEMU's name of it
        device: String,
    },
    /// A migration capability of QEMU is on that changes the stream.
    #[error(
        "byte {offset}: QEMU's migration capability {capability:?} is on, which Limosa cannot \
         follow: turn it off"
    )]
    Capability {
        /// Where in the stream
        offset: u64,
        /// QEMU's name of it
        capability: String,
    },
    /// It ended too early.
    #[error("the stream ended after {offset} bytes, before the end of RAM")]
    Truncated {
        /// Bytes that came
        offset: u64,
    },
    /// Whoever takes the parts failed.
    #[error("passing on what came")]
    Sink(#[source] io::Error),
}
