//! Who sent a request, as the kernel or TLS has proven it.
//!
//! **Invariant.** Only [`crate::listen`] makes a [`Caller`]; what a request may do follows from it alone.

use std::net::SocketAddr;

use limosa_protocol::id::HostName;

/// Who sent a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Caller {
    /// root or a member of the group, on this host.
    Local { uid: u32 },
    /// An operator with a certificate of their own.
    Operator { name: String },
    /// A paired host.
    Host { name: HostName },
    /// Nobody known, on a connection that can only pair.
    Stranger { certificate_der: Vec<u8>, address: SocketAddr },
}

impl std::fmt::Display for Caller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Local { uid } => write!(f, "user {uid} of this host"),
            Self::Operator { name } => write!(f, "operator {name}"),
            Self::Host { name } => write!(f, "host {name}"),
            Self::Stranger { address, .. } => write!(f, "a stranger at {address}"),
        }
    }
}
