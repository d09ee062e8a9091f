//! Why a call gave no result.

use std::time::Duration;

use hyper::StatusCode;
use hyper_util::client::legacy;
use limosa_protocol::api;

use crate::BoxError;

/// Why a call gave no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request cannot be written.
    #[error("a request that cannot be written")]
    Request(#[source] BoxError),
    /// Nothing was sent.
    #[error(transparent)]
    Connect(ConnectError),
    /// The agent may or may not have done the request.
    #[error("the connection broke")]
    Broken(#[source] legacy::Error),
    /// The answer broke off, or is too large.
    #[error("the answer broke off")]
    Answer(#[source] BoxError),
    /// The agent may or may not have done the request.
    #[error("no answer within {} ms", wait.as_millis())]
    Silent {
        /// The limit
        wait: Duration,
    },
    /// The agent answered with a failure.
    #[error("{}", .0.message)]
    Refused(api::Failure),
    /// The answer is no success, and its body no failure.
    #[error("answered {0}, without a reason")]
    Status(StatusCode),
    /// The answer is not the JSON that was expected.
    #[error("an answer that is not understood")]
    NotUnderstood(#[source] serde_json::Error),
}

impl Error {
    pub(crate) fn from_pool(error: legacy::Error) -> Self {
        if error.is_connect() { Self::Connect(ConnectError(error)) } else { Self::Broken(error) }
    }
}

/// Why there is no connection. It reads as the error of the connector, for the pool adds
/// nothing to it.
#[derive(Debug)]
pub struct ConnectError(legacy::Error);

impl ConnectError {
    fn cause(&self) -> &(dyn std::error::Error + 'static) {
        std::error::Error::source(&self.0).unwrap_or(&self.0)
    }
}

impl std::fmt::Display for ConnectError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self.cause(), f)
    }
}

impl std::error::Error for ConnectError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause().source()
    }
}
