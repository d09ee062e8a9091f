//! Why a peer gave no result, and why there is no client for one.

use limosa_protocol::api::{self, FailureCode};
use limosa_protocol::id::HostName;

use limosa_host::failure::{DomainError, Failure, chain};
use limosa_host::store::StoreError;

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
    #[error("{0}")]
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
            PeerError::Unreachable(message) => Self::peer_unreachable(message),
            PeerError::Refused(failure) => Self(failure),
        }
    }
}

/// Why there is no client for a host.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoPeer {
    /// The two were never paired, or are no more.
    #[error("no host {0} is paired with this one")]
    NotPaired(HostName),
    /// Its record cannot be read.
    #[error("the record of host {0} is damaged")]
    Damaged(HostName),
    /// No record can be read.
    #[error(transparent)]
    Store(StoreError),
}

impl DomainError for NoPeer {
    fn code(&self) -> FailureCode {
        match self {
            Self::NotPaired(_) => FailureCode::NotPaired,
            Self::Damaged(_) => FailureCode::PairingDamaged,
            Self::Store(error) => error.code(),
        }
    }

    fn remedy(&self) -> Option<String> {
        match self {
            Self::NotPaired(name) => Some(pairing_remedy(name)),
            Self::Damaged(name) => Some(format!("`limosa host unpair {name}`, then pair again")),
            Self::Store(error) => error.remedy(),
        }
    }
}

/// How to pair with a host, for people.
pub(crate) fn pairing_remedy(name: &HostName) -> String {
    format!("run `limosa host invite` on {name}, then `limosa host pair ADDRESS` here")
}
