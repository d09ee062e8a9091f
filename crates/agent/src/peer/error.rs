//! Why a peer gave no result, and why there is no client for one.

use limosa_protocol::api;
use limosa_protocol::id::HostName;

use crate::failure::{Failure, chain};

/// Why a peer gave no result.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum PeerError {
    /// Nothing was sent: something on this host is wrong.
    #[error("{0}")]
    Here(String),
    /// The peer may or may not have done the request.
    #[error("{0}")]
    Unreachable(String),
    /// The peer answered with a failure.
    #[error("{}", .0.message)]
    Refused(api::Failure),
}

impl PeerError {
    /// - `peer`: name and address, for the message.
    pub(super) fn from_http(peer: &str, error: limosa_http::Error) -> Self {
        match error {
            limosa_http::Error::Refused(failure) => Self::Refused(failure),
            limosa_http::Error::Request(_) => Self::Here(chain(&error)),
            error => Self::Unreachable(format!("{peer}: {}", chain(&error))),
        }
    }
}

impl From<PeerError> for Failure {
    fn from(error: PeerError) -> Self {
        match error {
            PeerError::Here(message) => Self::internal(message),
            PeerError::Unreachable(message) => Self::peer(message),
            PeerError::Refused(failure) => Self(failure),
        }
    }
}

/// Why there is no client for a host.
#[derive(Debug)]
pub(crate) enum NoPeer {
    /// The two were never paired, or are no more.
    NotPaired,
    /// Its record cannot be read.
    Damaged,
    /// No record can be read.
    Store(Failure),
}

impl NoPeer {
    /// The failure of a request that needs the host `name`.
    pub(crate) fn of(self, name: &HostName) -> Failure {
        match self {
            Self::NotPaired => Failure::not_found(format!(
                "no host {name} is paired with this one: {}",
                pairing_remedy(name)
            )),
            Self::Damaged => Failure::internal(format!(
                "the record of host {name} is damaged: `limosa host unpair {name}`, then pair again"
            )),
            Self::Store(failure) => failure,
        }
    }
}

/// How to pair with a host, for people.
pub(crate) fn pairing_remedy(name: &HostName) -> String {
    format!("run `limosa host invite` on {name}, then `limosa host pair ADDRESS` here")
}
