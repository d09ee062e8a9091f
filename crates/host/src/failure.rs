//! Failures as the API reports them.
//!
//! ```text
//! an error of a domain (thiserror) ─ DomainError: code, remedy ─► Failure ─► api::failure ─► HTTP
//! ```
//!
//! Domains that have no error type of their own yet make a [`Failure`] where the cause is known.
//! The HTTP status is the business of the API alone.

use limosa_protocol::api::{self, FailureCode};
use limosa_protocol::migration::Problem;

/// A failed request. Made where the cause is known, so that the message can
/// name it and the next step.
#[derive(Debug, Clone)]
pub struct Failure(pub api::Failure);

/// A result whose error is a [`Failure`], if no other is given.
pub type Result<T, E = Failure> = std::result::Result<T, E>;

/// An error of one domain, with the code and the remedy that its callers read.
pub trait DomainError: std::error::Error {
    /// The stable code of the error.
    fn code(&self) -> FailureCode;

    /// What the operator can do, when the error knows it.
    fn remedy(&self) -> Option<String> {
        None
    }
}

impl<E: DomainError> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(api::Failure {
            code: error.code(),
            message: chain(&error),
            remedy: error.remedy(),
            problems: Vec::new(),
        })
    }
}

/// What keeps a VM from being changed, and what the operator can do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Hindrance {
    pub message: String,
    pub remedy: String,
}

impl Hindrance {
    /// A hindrance and what can be done about it.
    pub fn new(message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { message: message.into(), remedy: remedy.into() }
    }
}

impl DomainError for Hindrance {
    fn code(&self) -> FailureCode {
        FailureCode::VmLocked
    }

    fn remedy(&self) -> Option<String> {
        Some(self.remedy.clone())
    }
}

impl Failure {
    fn new(code: FailureCode, message: impl Into<String>) -> Self {
        let message = message.into();
        Self(api::Failure { code, message, remedy: None, problems: Vec::new() })
    }
    /// The request makes no sense.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(FailureCode::BadRequest, message)
    }
    /// The caller may not do this.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(FailureCode::Forbidden, message)
    }
    /// What the request names is not there.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(FailureCode::NotFound, message)
    }
    /// The request cannot be met as things are now.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(FailureCode::Conflict, message)
    }
    /// Something that should work did not.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(FailureCode::Internal, message)
    }
    /// The other host failed.
    pub fn peer(message: impl Into<String>) -> Self {
        Self::new(FailureCode::PeerFailed, message)
    }
    /// The other host does not answer.
    pub fn peer_unreachable(message: impl Into<String>) -> Self {
        Self::new(FailureCode::PeerUnreachable, message)
    }
    /// A move cannot begin: all reasons.
    pub fn problems(message: impl Into<String>, problems: Vec<Problem>) -> Self {
        let message = message.into();
        Self(api::Failure { code: FailureCode::Problems, message, remedy: None, problems })
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Joins an error and its sources to one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Turns an error of a library into a [`Failure`], with what was being done.
pub trait OrFail<T> {
    /// Something that should work did not.
    fn or_fail(self, doing: &str) -> Result<T>;
}

impl<T, E: std::error::Error> OrFail<T> for Result<T, E> {
    fn or_fail(self, doing: &str) -> Result<T> {
        self.map_err(|error| Failure::internal(format!("{doing}: {}", chain(&error))))
    }
}
