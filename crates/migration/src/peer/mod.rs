//! Paired hosts as this agent reaches them.
//!
//! ```text
//! PeerClient ─ a method for each message ─► limosa_http::Client ─ kept TLS connections ─► peer
//!      └────── open_channel ─► TCP, TLS, hello ─► a data channel for the plane
//! ```
//!
//! **Invariants.** Messages, their paths and limits come from [`limosa_protocol::peer::Message`]
//! alone. Every message passes the fault points of its name. Calls may run in parallel: each
//! has a connection of its own while it waits.

mod channel;
mod client;
mod connect;
mod error;

pub(crate) use channel::into_blocking;
pub(crate) use client::PeerClient;
pub use client::USER_AGENT;
pub use connect::{connect, tune, with_port};
pub(crate) use error::{NoPeer, PeerError, pairing_remedy};
